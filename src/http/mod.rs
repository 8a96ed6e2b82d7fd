// SPDX-License-Identifier: Apache-2.0 OR MIT
//! HTTP over unix sockets, as the plugin and the supervisor have it, and on a loopback port for the status page: `server` has the
//! connections, `socket` the socket's making and the locks, `body` and `answer` the two halves of a
//! request; [`client`] is the other end.

pub(crate) mod answer;
pub(crate) mod body;
pub mod client;
pub(crate) mod server;
pub(crate) mod socket;

/// The client at the other end of a connection, as the kernel knows it: of a TCP connection, nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peer {
    /// The process that connected.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: Option<u32>,
}
