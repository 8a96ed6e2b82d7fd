//! lvm-cache-friend: copy-on-write caches for CI containers.

pub mod cache;
pub mod engine;
pub mod exec;
pub mod failpoint;
pub mod fs;
pub mod mount;
pub mod storage;
