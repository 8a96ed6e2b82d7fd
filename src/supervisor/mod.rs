// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor: ephemeral GitHub runners, each a container for one job with caches of its own.
//!
//! - [`slot`]: what is done next, decided without I/O
//! - [`backoff`]: when the next runner may be started, where the last ones had no job
//! - [`scope`]: which caches a job may read and write
//! - [`github`]: the client of GitHub; [`secret`]: what it says who we are with
//! - [`podman`]: the client of Podman; `container`: what it is asked for; [`handover`]: how a runner's configuration gets into it
//! - [`pool`]: what a pool's slots share; `task`: does what was decided for a slot; `exchange`: what these tell each other; `image`: has the pool's image be there;
//!   `trouble`: what went wrong, and when it is tried again
//! - `listener`: a scale set's session, and `messages`: what is done with what it tells; [`jobs`]: what is known of the jobs that
//!   runners have; [`demand`]: how many more there are
//! - [`run`]: the program; [`control`]: its socket; [`config`]: its settings
//!
//! What never happens: a secret in an argument, a log, or a container, but for the one-time
//! configuration of the runner in it; a job's cache published on anybody's word but GitHub's, or the
//! runner's exit code; a job's request for a cache served before it is known whose job it is; a
//! registration removed that was not read to be idle a moment before.
//!
//! Podman's labels and GitHub's names are all that a start needs, but for what GitHub tells once: that is below /run, as long as
//! the container is there whose job it was told of. The id of a scale set's session is kept, as without it GitHub has the next one wait.

pub mod backoff;
pub mod config;
mod container;
pub mod control;
pub mod demand;
mod exchange;
pub mod github;
pub mod handover;
mod image;
pub mod jobs;
mod listener;
mod messages;
pub mod podman;
pub mod pool;
pub mod run;
pub mod scope;
pub mod secret;
pub mod slot;
mod task;
mod trouble;
