// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor: ephemeral GitHub runners, each a container for one job with caches of its own.
//!
//! - [`slot`]: what is done next, decided without I/O
//! - [`backoff`]: when the next runner may be started, where the last ones had no job
//! - [`scope`]: which caches a job may read and write
//! - [`github`]: the client of GitHub; [`secret`]: what it says who we are with
//! - [`podman`]: the client of Podman; [`handover`]: how a runner's configuration gets into its container
//! - [`pool`]: does what was decided; `listener`: what a scale set tells meanwhile
//! - [`run`]: the program; [`control`]: its socket; [`config`]: its settings
//!
//! What never happens: a secret in an argument, a log, or a container, but for the one-time
//! configuration of the runner in it; a job's cache published on anybody's word but GitHub's, or the
//! runner's exit code; a job's request for a cache served before it is known whose job it is; a
//! registration removed that was not read to be idle a moment before.
//!
//! No file holds state that a start needs: Podman's labels and GitHub's names are all. The id of a scale set's session is kept, as
//! without it GitHub has the next one wait.

pub mod backoff;
pub mod config;
pub mod control;
pub mod github;
pub mod handover;
mod listener;
pub mod podman;
pub mod pool;
pub mod run;
pub mod scope;
pub mod secret;
pub mod slot;
