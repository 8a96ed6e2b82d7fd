// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon, the supervisor and the commands send to each other over HTTP, as both ends have it.

pub mod runners;
pub mod volumes;
