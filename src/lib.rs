//! lvm-cache-friend: copy-on-write caches for CI containers.
#![warn(missing_docs)]

pub mod cache;
pub mod exec;
pub mod storage;
