//! The supervisor: ephemeral GitHub runners, each a container for one job with caches of its own.
//!
//! - [`slot`]: what is done next, decided without I/O
//! - [`scope`]: which caches a job may read and write
//! - [`github`]: the client of GitHub; [`secret`]: what it says who we are with

pub mod github;
pub mod scope;
pub mod secret;
pub mod slot;
