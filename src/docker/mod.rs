// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How Docker's containers ended. dockerd runs no OCI hooks; its API tells.
//!
//! [`listen`] follows `GET /events` from the first time that a client mounts a volume whose id can be dockerd's, and
//! tells the engine. What was missed it asks for: `GET /containers/json`, `GET /containers/ID/json`. What happens to a
//! container comes in this order (dockerd 26.1): `mount` of each volume, `start`, our Unmount, `unmount` of each, `die`; with
//! `--rm` then `destroy`, after which nobody knows it any more. One that cannot be started has neither `start` nor `die`.
//!
//! A container's own word is never taken. Its labels, which the image's author sets, are
//! among its events' attributes, in place of dockerd's own of the same name (moby, daemon/events.go): of one with a label
//! `exitCode`, `die` says whatever that says.

mod api;
mod listener;

pub use api::Docker;
pub use listener::listen;
