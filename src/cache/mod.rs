// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pure decisions. No I/O, no clock: the same input always gives the same answer,
//! and no input panics. Each file needs those above it alone:
//!
//! - [`names`] · tags and names, made only by parsing; how text becomes part of a tag.
//! - [`units`] · sizes. [`verdict`] · how the work that uses a cache ended.
//! - [`tags`] · the tags that we give to logical volumes.
//! - [`lineage`] · what was made from what, as it is drawn.
//! - [`criteria`] · what an entry must have to be restored.
//! - [`late_path`] · where in a job volume something is mounted.
//! - [`spec`] · a volume's options, from what Podman or Docker hands over to the tags
//!   on its LV and back; their table is in [`spec::options`].
//! - [`record`] · what an LV is to us, told by its tags. What does not parse is
//!   [`record::Role::Unclear`] and left alone.
//! - [`select`] · which entry a volume restores from. Cases are rows of
//!   `select_cases.txt`.
//! - [`evict`] · which entries are evicted, and why.

pub mod criteria;
pub mod evict;
pub mod late_path;
pub mod lineage;
pub mod names;
pub mod record;
pub mod select;
pub mod spec;
pub mod tags;
pub mod units;
pub mod verdict;
