// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pure decisions. No I/O, no clock: the same input always gives the same answer,
//! and no input panics.
//!
//! - [`evict`] · which entries go, and why.
//! - [`lineage`] · what was made from what, as it is drawn.
//! - [`names`] · tags and names, made only by parsing; how text becomes part of a tag.
//! - [`units`] · sizes.
//! - [`options`] · the table of a volume's options.
//! - [`spec`] · a volume's options, from what Podman or Docker hands over to the tags
//!   on its LV and back.
//! - [`record`] · what an LV is to us, told by its tags. What does not parse is
//!   [`record::Role::Unclear`] and left alone.
//! - [`request`] · what a job asks for on its job volume's socket.
//! - [`verdict`] · how the work that uses a cache ended.
//! - [`select`] · which entry a volume restores from. Cases are rows of
//!   `select_cases.txt`.

pub mod evict;
pub mod lineage;
pub mod names;
pub mod options;
pub mod record;
pub mod request;
pub mod select;
pub mod spec;
pub mod units;
pub mod verdict;
