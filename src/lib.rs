//! lvm-cache-friend: copy-on-write caches for CI containers.

pub mod cache;
pub mod engine;
pub mod exec;
pub mod fs;
pub mod mount;
pub mod storage;
