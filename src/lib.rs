//! lvm-cache-friend: copy-on-write caches for CI containers.

pub mod cache;
pub mod cli;
pub mod commands;
pub mod config;
pub mod engine;
pub mod exec;
pub mod failpoint;
pub mod fs;
pub mod logging;
pub mod mount;
pub mod plugin;
pub mod serve;
pub mod storage;
