// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The life of a lease: volumes are made, mounted, written to, and published.
//!
//! A volume always has one logical volume that carries its name and
//! specification: a copy of the best entry, made and mounted (detached) before
//! anybody asks for it. Mount moves it into place; the last Unmount takes it out
//! of sight, and what takes long happens behind the answer, in a thread for that
//! lease alone: flush, last close, publish, the next copy, removal.
//!
//! What is known:
//! - `catalog`: entries and the base
//! - `volume`: a volume and its phases, and what its lease has: a job volume's, the caches mounted in it
//! - `pending`: tags of leases that the store does not have yet
//! - `tally`: what is counted
//!
//! Requests:
//! - `create`, `lease` (Mount and Unmount), `remove`, `view` (Get and List)
//! - `containers`: what hooks, the supervisor and Docker report; `told`: how containers ended by that
//! - `owners`: whose files a container sees; `users`: what uses a volume
//! - `job`: job volumes, and what is mounted in them while they are in use
//!
//! What they need, and what follows:
//! - `prepare`: choosing an entry and making a copy of it
//! - `settle`: the end of a lease; `publish`: whether it becomes an entry, and how
//! - `bounds`: which entries are evicted, and when
//! - `budget`: what one job may cost the store; `cutoff`: a lease that fills the store
//! - `error`: how a request fails
//! - `survey`: what the store and the mount table say; `recovery`: what a restart makes of it
//! - `upkeep`: removals, refreshes, and changes made by others
//!
//! What never happens: a request waits for another volume's I/O; an LV that is being written to carries a
//! cache tag; a volume whose Create succeeded has no LV. Which lock protects what, and what may wait for what: [`Engine`].

pub mod bounds;
mod budget;
mod catalog;
mod containers;
mod create;
mod cutoff;
mod error;
mod job;
mod lease;
mod owners;
mod pending;
mod prepare;
mod publish;
mod recovery;
mod remove;
mod settle;
mod survey;
mod tally;
#[cfg(test)]
mod tests;
mod told;
mod upkeep;
mod users;
mod view;
mod volume;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

use crate::cache::evict::{Policy, Steady};
use crate::cache::names::{Tag, VolumeName};
use crate::cache::units::Bytes;
use crate::cache::verdict::Verdict;
use crate::container::Container;
use crate::mount;
use crate::storage::hosts::Fleet;
use crate::storage::{Listing, Store, StoreError};
use crate::text::unix_now;
use catalog::Catalog;
pub use error::EngineError;
use error::io_error;
pub use job::{JobSocket, LateView, Saved};
use pending::Pending;
pub use tally::{Failed, Hits, REFUSED, RESTORED, Stats, Tally, UNPUBLISHED};
pub use told::DockerAsk;
use told::Telling;
pub(crate) use told::now as now_ns;
use upkeep::Upkeep;
pub use view::VolumeView;
pub use volume::Job;
use volume::Volume;
#[cfg(test)]
pub(crate) use volume::drawn as phases;

/// How long the store's present command may take to end after [`Engine::stop`] has waited for what is under way, at
/// least. The unit's `TimeoutStopSec=` is more than this and the longest usual `stop-timeout` together.
const COMMAND_END: Duration = Duration::from_secs(20);

/// What the engine is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where volumes are mounted: `DIR/NAME`.
    pub mount_dir: PathBuf,
    /// How many volumes are kept mounted, detached, while no container uses
    /// them. Each costs the kernel about 0.8 MB; beyond it a volume is only a
    /// snapshot, and its next Mount takes a mount(2) longer.
    pub premounted: usize,
    /// Size of the directory in memory that `on-error=scratch` gives where the
    /// volume names none.
    pub scratch_size: Bytes,
    /// Virtual size of volumes that start empty, where neither the volume nor a
    /// base says it.
    pub empty_size: Bytes,
    /// The bounds of the store.
    pub policy: Policy,
    /// For how long an entry is kept in any case that something was restored from.
    pub keep_used: Duration,
    /// Who serves the sockets of job volumes.
    pub jobs: UnboundedSender<JobSocket>,
    /// Who listens to Docker; `None`: how its containers end is not asked.
    pub docker: Option<UnboundedSender<DockerAsk>>,
}

/// What is said of a container that uses volumes.
#[derive(Debug, Clone)]
pub enum Happened {
    /// It runs, and is this one where that is known.
    Started(Option<Container>),
    /// It has ended so.
    Ended(Verdict),
    /// The supervisor says how its job ended, whatever its exit code was.
    Judged(Verdict),
}

/// The engine. Its calls block, and may be made from any thread; work that was
/// begun goes on when a caller loses interest.
///
/// # Who owns what
///
/// - A volume, its mountpoint and the LV that its phase has belong to the thread that holds its `Volume::op`. In
///   `Phase::Changing` that thread has on its stack what the volume had; all others see only that it is changing.
/// - The LV of an ended lease belongs to the thread that settles it, one for each lease. `Now::settling` lists
///   it, so that a Remove meanwhile takes the volume's name off it and leaves it there.
/// - An LV that was given up belongs to the thread `removals`, which evicts, too. Others remove an LV only where the store
///   is too full to mark it.
/// - Caches in a job volume belong to its [`Job`] from their mount on: each is a volume of its own that no map knows.
/// - What is known of the store, and which volumes there are, is `State`'s.
///
/// # Lock order
///
/// A thread that holds a lock takes only locks that come after it here.
///
/// 1. `missing`, held over I/O, behind all answers.
/// 2. `Volume::op`, held over all the I/O that a change takes. No thread holds two, but for Create: its own one, of a volume
///    that no other thread knows, while it waits for the one of the volume that has the name already. After it `Job::judging`, held
///    over I/O as well, by one job alone.
/// 3. `Volume::now`. Get and List read it, so this and all that follow are held for moments: no store is asked under
///    them, and what is dropped may be unmounted, so it is dropped after them.
/// 4. `Job::now`. A mount is attached under it: either the job has ended, or its end sees the mount.
/// 5. `State`.
/// 6. The rest, of which no two are held at once: the queues of `Upkeep`, `Telling` and each lease's `Told`, [`Tally`],
///    `clock`; and two that are held over small files: `Pending`'s, as what it keeps must be on its file before Mount is
///    answered, and `passing`.
///
/// # What may wait for what
///
/// - Get, List and reports of containers: for nothing.
/// - Create, Mount and Remove: for another change of the same volume, for the store, and for room in it, at most
///   `REQUEST_PATIENCE`. An Unmount waits for these too, but answers after `UNMOUNT_ANSWER` in any case.
/// - A settlement: for the last close of its file system, for Docker's report, and for the store, as long as that takes;
///   only at its end for the volume's `op`. So a volume is used again while its last lease is not settled yet. One of a volume
///   that keeps its content publishes under `op`: the next Mount waits for that.
/// - The thread `upkeep`: for the store, and for the `op` of one volume after the other. Nothing waits for it.
/// - The thread `removals`: for the store alone. All that needs room waits for it, with `op` held, so it must not take `op`.
/// - [`Engine::stop`]: for requests and settlements (`State::under_way`) and the two threads, within its bound. All that waits
///   longer than a request may looks at `State::stopping` (`Engine::rest`) and leaves the rest to the next start.
pub struct Engine {
    store: Arc<dyn Store>,
    settings: Settings,
    /// The kernel's boot id, its first 8 hexadecimal digits.
    boot: String,
    state: Mutex<State>,
    /// Told when `State::under_way` falls to 0.
    quiet: Condvar,
    /// Told when `State::stopping` is set.
    stopped: Condvar,
    upkeep: Upkeep,
    premounted: Arc<AtomicUsize>,
    /// It was said that the kernel makes no idmapped mounts.
    unmapped: AtomicBool,
    tally: Tally,
    telling: Telling,
    /// The time for the rules about age.
    clock: Mutex<Steady>,
    pending: Pending,
    /// Held at a lease's end from looking whether an entry is missing until it is there.
    missing: Mutex<()>,
    /// Held while the mount directory's list of users is changed.
    passing: Mutex<()>,
}

/// What is known in memory. Never locked over I/O.
#[derive(Default)]
struct State {
    volumes: HashMap<VolumeName, Arc<Volume>>,
    catalog: Catalog,
    /// Volumes that are no more, and since when: in a listing begun before, LVs have their names still.
    dropped: HashMap<VolumeName, Instant>,
    /// The store tells of volumes that this host has lost.
    has_lost: bool,
    /// How full the store was when a lease was last cut off for that, in percent.
    last_cut: Option<f64>,
    stopping: bool,
    /// Requests and settlements that are being worked on.
    under_way: usize,
}

/// Something is being worked on, for as long as this lives.
struct Work(Arc<Engine>);

impl Drop for Work {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.under_way -= 1;
        if state.under_way == 0 {
            self.0.quiet.notify_all();
        }
    }
}

/// Locks, also after a panic of another holder: what our locks protect is
/// changed in single steps only.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Engine {
    /// Reads the store and the mount table, takes up the leases that go on, and
    /// sets about what an earlier life left undone.
    ///
    /// # Errors
    /// When the store cannot be read or the mount directory cannot be made.
    pub fn start(store: Arc<dyn Store>, settings: Settings) -> Result<Arc<Self>, EngineError> {
        mount::ensure_shared(&settings.mount_dir)
            .map_err(|source| io_error("making", &settings.mount_dir, source))?;
        let engine = Self::new(store, settings)?;
        engine.take_up()?;
        engine.upkeep.tidy();
        engine.start_upkeep()?;
        Ok(engine)
    }

    /// An engine that knows nothing of the store yet, and has no threads.
    fn new(store: Arc<dyn Store>, settings: Settings) -> Result<Arc<Self>, EngineError> {
        let boot_file = Path::new("/proc/sys/kernel/random/boot_id");
        let mut boot =
            fs::read_to_string(boot_file).map_err(|e| io_error("reading", boot_file, e))?;
        boot.truncate(8);
        Ok(Arc::new(Self {
            pending: Pending::read(&settings.mount_dir, &boot),
            telling: Telling::new(settings.docker.clone()),
            store,
            settings,
            boot,
            state: Mutex::default(),
            quiet: Condvar::new(),
            stopped: Condvar::new(),
            upkeep: Upkeep::default(),
            premounted: Arc::default(),
            unmapped: AtomicBool::default(),
            tally: Tally::default(),
            clock: Mutex::default(),
            missing: Mutex::new(()),
            passing: Mutex::new(()),
        }))
    }

    /// Has what was answered last outlast a power cut. It is done, whether that succeeds or not.
    fn persist(&self) {
        if let Err(error) = self.store.persist() {
            warn!(%error, "a power cut may undo what was just changed");
        }
    }

    /// What was counted.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// What the store holds now: waits for it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn listing(&self) -> Result<Listing, StoreError> {
        self.store.list()
    }

    /// The hosts that share the store, and what they have: waits for it. `None`: it is this host's alone.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn fleet(&self) -> Result<Option<Fleet>, StoreError> {
        self.store.fleet()
    }

    /// The bounds of the store.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.settings.policy
    }

    /// What the store is called where a job is told of it.
    #[must_use]
    pub fn store_name(&self) -> &str {
        self.store.name()
    }

    /// Takes no more requests, finishes what is under way within `bound`, upkeep's work too, and
    /// leaves visible mounts alone; then closes the store, whose present command has `COMMAND_END`
    /// to end in any case. `false`: something was left undone, and the next start takes it up.
    pub fn stop(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        let mut state = lock(&self.state);
        state.stopping = true;
        self.stopped.notify_all();
        self.upkeep.stop();
        let (state, _) = self
            .quiet
            .wait_timeout_while(state, bound, |state| state.under_way > 0)
            .unwrap_or_else(PoisonError::into_inner);
        let requests_done = state.under_way == 0;
        drop(state);
        let upkeep_done = self.upkeep.has_ended(until);
        let closed = self.store.close(until.max(Instant::now() + COMMAND_END));
        requests_done && upkeep_done && closed
    }

    fn begin(self: &Arc<Self>) -> Result<Work, EngineError> {
        let mut state = lock(&self.state);
        // Under the lock that counts it: what begins is waited for.
        if state.stopping {
            return Err(EngineError::Stopping);
        }
        state.under_way += 1;
        Ok(Work(Arc::clone(self)))
    }

    fn work(self: &Arc<Self>) -> Work {
        lock(&self.state).under_way += 1;
        Work(Arc::clone(self))
    }

    /// Whether the daemon is about to end: what can be left to the next start is.
    fn is_stopping(&self) -> bool {
        lock(&self.state).stopping
    }

    /// Waits, unless that is cut short by the daemon's end: `false`.
    fn rest(&self, pause: Duration) -> bool {
        let state = lock(&self.state);
        let (state, _) = self
            .stopped
            .wait_timeout_while(state, pause, |state| !state.stopping)
            .unwrap_or_else(PoisonError::into_inner);
        !state.stopping
    }

    fn volume(&self, name: &VolumeName) -> Result<Arc<Volume>, EngineError> {
        lock(&self.state)
            .volumes
            .get(name)
            .cloned()
            .ok_or_else(|| EngineError::NoSuchVolume(name.clone()))
    }

    /// Forgets a volume, unless another of its name has taken its place.
    fn drop_volume(&self, volume: &Arc<Volume>) {
        let mut state = lock(&self.state);
        if state
            .volumes
            .get(&volume.name)
            .is_some_and(|v| Arc::ptr_eq(v, volume))
        {
            state.volumes.remove(&volume.name);
            state.dropped.insert(volume.name.clone(), Instant::now());
        }
    }

    /// Lets a user through to what is mounted, who may use the plugin: the OCI runtime that he runs gives up his groups before it
    /// binds a volume (crun: setgroups(2) as it begins).
    pub fn let_pass(&self, uid: u32) {
        let dir = &self.settings.mount_dir;
        let _turn = lock(&self.passing);
        if let Err(error) = crate::acl::let_pass(dir, uid) {
            warn!(uid, dir = %dir.display(), %error, "this user's containers cannot bind volumes");
        }
    }

    /// Where a job volume is mounted on this host.
    pub(crate) fn place_of(&self, job: &Job) -> PathBuf {
        self.settings.mount_dir.join(job.name())
    }

    fn mountpoint(&self, name: &VolumeName) -> PathBuf {
        self.settings.mount_dir.join(name.as_str())
    }
}

/// A tag that is one by construction.
fn tag(text: &str) -> Tag {
    text.parse().expect("made of names that were parsed")
}
