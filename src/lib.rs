// SPDX-License-Identifier: Apache-2.0 OR MIT
//! lvm-cache-friend: copy-on-write caches for CI containers.
//!
//! # The flow
//!
//! `podman volume create` reaches [`plugin`] over a unix socket, which has the
//! [`engine`] make a volume: its options become a [`cache::spec::Spec`],
//! [`cache::select`] chooses an entry, the [`storage`] makes a snapshot of it that
//! carries the volume's tags from its first moment, and [`mount`] mounts that
//! out of sight. When a container starts, Podman asks for a Mount: the
//! choice is made again in memory, and where it holds the mount is moved into
//! place. After the last Unmount the engine flushes, waits for the last close,
//! looks whether the file system is whole, publishes (one more snapshot, with cache
//! tags), makes the volume's next copy, and has the old one removed. Entries over the
//! policy's limits are then evicted: [`cache::evict`].
//!
//! How the work in it ended is told meanwhile: by Podman's hooks ([`commands::hook`], which reads Podman's record:
//! [`podman`]), by `docker`, by the [`supervisor`], by the job itself ([`job`]). `engine::told` makes a verdict of the first
//! three, `engine::volume::Heard` adds the job's, and `engine::publish` decides by it.
//!
//! # The rooms
//!
//! From the ground up: each needs rooms that stand above it here, and none below
//! (`rooms` is the test that keeps it so).
//!
//! - [`text`]: lines that are safe on a terminal, times and ages as people read them.
//! - [`failpoint`]: where tests have the daemon die.
//! - [`logging`]: to the journal, or to standard error.
//! - `exec`: runs the system's tools.
//! - [`cache`] decides, without I/O and clock: names, tags, criteria, a volume's options ([`cache::spec::options`]),
//!   what an LV's tags make of it, which entry is restored ([`cache::select`]) and which are evicted ([`cache::evict`]).
//! - `userns`: user-namespace ID mapping.
//! - `container`: which processes are in a container.
//! - `acl`: who gets to the mounts at all.
//! - `selinux`: the label that mounts have.
//! - [`fs`](mod@fs): what is on a block device: made, checked, grown.
//! - [`mount`]: where it shows, and the kernel's mount table.
//! - [`storage`] hands out block devices and holds tags: LVM thin pools, image
//!   files with reflinks, or images on Ceph, which several hosts share ([`storage::hosts`]). What LVM reports is read in
//!   `storage::lvm::report`; a file system in use is frozen for its copy in `storage::freeze`.
//! - [`http`]: server, sockets, locks, and the other end of the connection.
//! - `api`: what the daemon, the supervisor and the commands send to each other.
//! - [`config`]: the settings.
//! - [`engine`]: the life of a lease, and recovery; verdicts (`engine::told`); when entries are evicted (`engine::bounds`).
//! - [`plugin`]: the volume plugin's endpoints, served by the engine.
//! - [`job`]: both ends of a job volume's socket. [`job::client`]: the
//!   program that asks, which each job volume has in it.
//! - [`podman`]: how its containers ended, and what it is configured to do. Not its API: that is the supervisor's.
//! - `docker`: how its containers ended.
//! - [`supervisor`]: GitHub runners, beside the daemon, whose socket it uses. What GitHub says is read in
//!   [`supervisor::github`].
//! - `views`: the store's contents as rows and tables, for commands and the status page.
//! - [`cli`]: the arguments.
//! - [`commands`]: what each of them does.
//! - `status`: metrics and a page.
//! - [`serve`]: the daemon.
//!
//! # What never happens
//!
//! - A cache tag on what is being written, or was not written to its end.
//! - A change to an LV that is not clearly ours.
//! - State anywhere but in the store's tags and the kernel's mount table. Files below /run only repeat, in the boot that
//!   they were written in, what others have not taken yet or announce only once: tags that the store is still to get
//!   (`engine::pending`), and what GitHub told the supervisor ([`supervisor`]). None speaks against the store.
//! - An Unmount that fails, or a Get that waits for the store.
//! - A request that waits for another volume's flush, mkfs or recovery.
//!
//! # The words
//!
//! docs/glossary.md has them all. Those that the code is full of:
//!
//! - *base*: what volumes start from on a miss. *Entry*: a published cache; never written again.
//!   *Copy*: a writable snapshot of one of these. *Volume*: options, and a copy that waits or is used.
//! - *Term*: a tag or a tag prefix. *Criterion* (for users: restore key): terms that an entry must have.
//!   *Scope*: what keeps entries apart; set on the host alone.
//! - *Lease*: one use of a volume, from the first mount to the last unmount; *settled* when its content
//!   was published or discarded. *Verdict* (for users: result): how the work in it ended.
//! - *Job volume*: a directory in which a job mounts caches. *Checkpoint*: published while the job goes on.
//! - *Doomed*: marked for removal. *Floor*: free space that eviction keeps. *Scratch*: a directory in
//!   memory in place of a cache.

pub(crate) mod acl;
pub(crate) mod api;
pub mod cache;
pub mod cli;
pub mod commands;
pub mod config;
pub(crate) mod container;
pub(crate) mod docker;
#[cfg(test)]
mod documents;
pub mod engine;
pub(crate) mod exec;
pub mod failpoint;
pub mod fs;
pub mod http;
pub mod job;
pub mod logging;
pub mod mount;
pub mod plugin;
pub mod podman;
#[cfg(test)]
mod rooms;
pub(crate) mod selinux;
pub mod serve;
pub(crate) mod status;
pub mod storage;
pub mod supervisor;
pub mod text;
pub(crate) mod userns;
pub(crate) mod views;
