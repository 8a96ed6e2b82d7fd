// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What containers ask for on a job volume's socket: `protocol` has requests and answers, `server` the daemon's end,
//! [`client`] the program at the other.

pub mod client;
pub(crate) mod protocol;
pub(crate) mod server;
