// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The life of a lease: volumes are made, mounted, written to, and published.
//!
//! A volume always has one logical volume that carries its name and
//! specification: a copy of the best entry, made and mounted (detached) before
//! anybody asks for it. Mount moves it into place; the last Unmount takes it out
//! of sight, and what takes long happens behind the answer, in a thread for that
//! lease alone: flush, last close, publish, the next copy, removal.
//!
//! - `catalog`: what is known of the store
//! - `prepare`: choosing an entry and making a copy of it
//! - `settle`: the end of a lease
//! - `told`: how containers ended, as hooks and Docker tell
//! - `job`: job volumes, and what is mounted in them while they are in use
//! - `bounds`: which entries go, and when
//! - `budget`: what one job may cost the store
//! - `cutoff`: a lease that fills the store
//! - `users`: who uses a volume
//! - `pending`: what the store is still to be told of leases
//! - `start`: what the store and the mount table say after a restart
//! - `upkeep`: removals, refreshes, and changes made by others
//!
//! What never happens: a request waits for another volume's I/O (no lock but a
//! volume's own `op` is held over I/O); an LV that somebody writes to carries a
//! cache tag; a volume that a client was told of has no LV.

pub mod bounds;
mod budget;
mod catalog;
mod cutoff;
mod job;
mod pending;
mod prepare;
mod settle;
mod start;
mod tally;
#[cfg(test)]
mod tests;
mod told;
mod upkeep;
mod users;
mod volume;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{fmt, fs, io, mem, thread};

use nix::sys::stat::{fstat, stat};
use rustix::fs::{Gid, Uid};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info, warn};

use crate::cache::evict::{Policy, Steady};
use crate::cache::names::{LvName, Tag, VolumeName};
use crate::cache::record::{FAILED, LEASE, MAKING, Role, VOLUME};
use crate::cache::spec::{BadOption, Kind, OnError, Owner, Spec};
use crate::cache::units::Bytes;
use crate::container::Container;
use crate::failpoint::reach;
use crate::mount::{self, Mounted};
use crate::storage::{Listing, Store, StoreError};
use crate::userns::Ids;
use bounds::REQUEST_PATIENCE;
use catalog::Catalog;
pub use job::{Job, JobSocket, LateView, Saved};
use pending::Pending;
pub use tally::{Failed, Hits, REFUSED, RESTORED, Stats, Tally, UNPUBLISHED};
pub use told::DockerAsk;
use told::Telling;
pub(crate) use told::now as now_ns;
use upkeep::Upkeep;
use volume::{Backing, Lease, OpenFs, Phase, Prepared, Restored, Volume, may_publish};

/// How long Unmount waits for its own work before it answers. Podman gives up
/// after 5 seconds, and then never unmounts that volume again.
const UNMOUNT_ANSWER: Duration = Duration::from_secs(3);

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

/// How the work in a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It succeeded.
    Success,
    /// It failed.
    Failure,
    /// Nobody said.
    #[default]
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Unknown => "unknown",
        })
    }
}

/// What is said of a container that uses volumes.
#[derive(Debug, Clone)]
pub enum Happened {
    /// It runs, and is this one where that is known.
    Started(Option<Container>),
    /// It has ended so.
    Ended(Verdict),
    /// Whoever has it do its work says how that ended, whatever its exit code was.
    Judged(Verdict),
}

/// A volume as Get and List show it.
#[derive(Debug, Clone)]
pub struct VolumeView {
    /// Its name.
    pub name: VolumeName,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// Where it is mounted, while it is.
    pub mountpoint: Option<PathBuf>,
    /// What was restored, from where, how old, how long it took, and what became
    /// of the last lease.
    pub status: serde_json::Map<String, serde_json::Value>,
}

/// A request that was refused or did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no such volume. The wording is the one that plugin clients expect.
    #[error("no volume with name {0} found")]
    NoSuchVolume(VolumeName),
    /// A volume of that name is there, with other options.
    #[error("volume {0} exists with other options")]
    Exists(VolumeName),
    /// A volume is in use.
    #[error(
        "volume {name} is in use by {users}, mounted at {}: stop that first; or have it taken away by `lvm-cache-friend remove --force {name}`",
        at.display()
    )]
    InUse {
        /// Which.
        name: VolumeName,
        /// Who uses it.
        users: String,
        /// Where it is mounted.
        at: PathBuf,
    },
    /// An option is refused.
    #[error(transparent)]
    Option(#[from] BadOption),
    /// No criterion matches and the volume says `on-miss=fail`.
    #[error("no entry matches the criteria of volume {0}, and its on-miss is fail")]
    Miss(VolumeName),
    /// What a volume starts from has more than the size that it asks for.
    #[error("{0}")]
    TooLarge(String),
    /// The engine is stopping and takes no new requests.
    #[error("the daemon is stopping")]
    Stopping,
    /// What a volume starts from is damaged.
    #[error("{0}")]
    Damaged(String),
    /// A job asked for what it cannot have.
    #[error("{0}")]
    Job(String),
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something else failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to what.
        what: String,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// The engine. Its calls block, and may be made from any thread; work that was
/// begun goes on when a caller loses interest.
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
    /// How full the store was when a lease was last cut off for that, in percent.
    last_cut: Option<f64>,
    stopping: bool,
    /// Requests and settlements that are being worked on.
    under_way: usize,
}

/// A Mount that did not succeed, and what the volume goes on from.
struct Refusal {
    phase: Phase,
    error: EngineError,
}

type Refused = Box<Refusal>;

fn refuse(phase: Phase, error: EngineError) -> Refused {
    Box::new(Refusal { phase, error })
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

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
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

    /// Makes a volume; no error where it is there with the same options.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn create(
        self: &Arc<Self>,
        name: &VolumeName,
        options: &BTreeMap<String, String>,
    ) -> Result<(), EngineError> {
        let spec = Spec::parse(options)?;
        let _work = self.begin()?;
        loop {
            let fresh = Arc::new(Volume::new(
                name.clone(),
                spec.clone(),
                unix_now(),
                Phase::Making,
            ));
            let _op = lock(&fresh.op);
            let there = lock(&self.state)
                .volumes
                .entry(name.clone())
                .or_insert_with(|| Arc::clone(&fresh))
                .clone();
            if Arc::ptr_eq(&there, &fresh) {
                return self.make(&fresh);
            }
            // Somebody makes it now, or made it before: once that is done it is
            // either the same volume, or gone again.
            let _op = lock(&there.op);
            if !lock(&there.now).removed {
                return if there.spec == spec {
                    Ok(())
                } else {
                    Err(EngineError::Exists(name.clone()))
                };
            }
        }
    }

    /// The first copy of a new volume, whose `op` the caller holds.
    fn make(self: &Arc<Self>, volume: &Arc<Volume>) -> Result<(), EngineError> {
        reach("create", 1);
        let copy = match volume.spec.kind {
            Kind::Cache => self
                .with_room(&volume.spec, REQUEST_PATIENCE, || {
                    self.prepare(volume, "create")
                })
                .map(Phase::Ready),
            Kind::Job => Err(EngineError::Miss(volume.name.clone())),
        };
        let made = match copy {
            Err(EngineError::Miss(_)) => self
                .with_room(&volume.spec, REQUEST_PATIENCE, || self.placeholder(volume))
                .map(|lv| Phase::Stale(Some(lv))),
            other => other,
        };
        reach("create", 4);
        match made {
            Ok(phase) => {
                lock(&volume.now).phase = phase;
                Ok(())
            }
            Err(error)
                if volume.spec.on_error == OnError::Scratch
                    && !matches!(error, EngineError::TooLarge(_)) =>
            {
                error!(volume = %volume.name, %error, "no copy could be made: on-error=scratch, only this daemon knows the volume until the store serves");
                lock(&volume.now).phase = Phase::Stale(None);
                self.upkeep.recheck();
                Ok(())
            }
            Err(error) => {
                lock(&volume.now).removed = true;
                self.drop_volume(volume);
                Err(error)
            }
        }
    }

    /// Mounts a volume for the client `id` and gives the mountpoint.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn mount(self: &Arc<Self>, name: &VolumeName, id: &str) -> Result<PathBuf, EngineError> {
        let began = Instant::now();
        let _work = self.begin()?;
        let volume = self.volume(name)?;
        self.telling.is_mounted_by(id);
        let at = self.mountpoint(name);
        let _op = lock(&volume.op);
        let mut phase = {
            let mut now = lock(&volume.now);
            if now.removed {
                return Err(EngineError::NoSuchVolume(name.clone()));
            }
            if let Phase::Leased(lease) = &mut now.phase
                && lease.is_at(&at)
            {
                self.is_used_by(lease, id);
                return Ok(at);
            }
            mem::replace(&mut now.phase, Phase::Changing)
        };
        if let Phase::Leased(lease) = phase {
            warn!(volume = %name, "its mount was taken away by somebody else: that ends the lease");
            phase = self.end(&volume, lease);
        }
        match self.open_lease(&volume, phase, &at, began) {
            Ok(mut lease) => {
                self.is_used_by(&mut lease, id);
                self.telling.add(name, &lease.told);
                let mut now = lock(&volume.now);
                now.leases += 1;
                now.phase = Phase::Leased(lease);
                drop(now);
                Ok(at)
            }
            Err(refused) => {
                lock(&volume.now).phase = refused.phase;
                Err(refused.error)
            }
        }
    }

    /// Takes note of a client of a lease.
    fn is_used_by(&self, lease: &mut Lease, id: &str) {
        lease.ids.insert(id.to_owned());
        if self.telling.asks_about(id) {
            lease.told.docker_uses_it();
        }
    }

    /// Begins a lease from what `phase` has; gives back what to go on from where
    /// that fails.
    fn open_lease(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        phase: Phase,
        at: &Path,
        began: Instant,
    ) -> Result<Lease, Refused> {
        let mut lease = Lease::new(self.backing(volume, phase)?);
        lease.shown = Some(Ids::host());
        lease.plain_below = true;
        let shown = self.show(lease.mounted(), at).and_then(|()| {
            // From here on the job's container can reach it.
            match &lease.backing {
                Backing::Job { job, .. } => self.serve_job(job),
                _ => Ok(()),
            }
        });
        if let Err(error) = shown {
            let phase = match lease.backing {
                // Whatever was attached of it is not to be trusted to be detached.
                Backing::Lv { copy, .. } if !volume.keeps() => Phase::Stale(Some(copy.lv)),
                Backing::Lv { copy, .. } => Phase::Ready(copy),
                Backing::Scratch(_) => Phase::Stale(None),
                Backing::Job { lv, .. } => {
                    let _ = mount::detach_all(at);
                    let _ = fs::remove_dir(at);
                    Phase::Stale(lv)
                }
            };
            return Err(refuse(phase, error));
        }
        reach("mount", 3);
        lease.took = began.elapsed();
        self.count(volume, &lease);
        if let Backing::Lv { copy, .. } = &lease.backing {
            self.note_lease(&copy.source);
        }
        if let Backing::Lv { copy, .. } = &lease.backing
            && may_publish(&volume.spec)
        {
            lease.mark = Some(self.mark_leased(copy.lv.clone(), false));
        }
        Ok(lease)
    }

    /// Counts a lease that has begun.
    fn count(&self, volume: &Volume, lease: &Lease) {
        let (how, entry) = match &lease.backing {
            Backing::Lv { copy, .. } => (copy.source.how, copy.source.lv.as_ref()),
            Backing::Scratch(_) => (Restored::Scratch, None),
            // Nothing is restored in it yet.
            Backing::Job { .. } => return,
        };
        let held = lease.mounted().used().map_or(0, |bytes| bytes.0);
        self.tally
            .mounted(&volume.spec, how, entry, held, lease.took);
    }

    /// What is to be mounted, attached nowhere.
    fn backing(self: &Arc<Self>, volume: &Arc<Volume>, phase: Phase) -> Result<Backing, Refused> {
        if volume.spec.kind == Kind::Job {
            return match (self.open_job(volume), phase) {
                (Ok(job), Phase::Stale(lv)) => Ok(Backing::Job { lv, job }),
                (Ok(job), _) => Ok(Backing::Job { lv: None, job }),
                (Err(error), phase) => Err(refuse(phase, error)),
            };
        }
        match self.ready(volume, phase) {
            Ok((copy, open)) => {
                let baseline = open
                    .mounted
                    .device_number()
                    .and_then(crate::fs::sectors_written)
                    .ok();
                Ok(Backing::Lv {
                    copy,
                    open,
                    baseline,
                })
            }
            Err(refused)
                if volume.spec.on_error == OnError::Scratch
                    && !matches!(refused.error, EngineError::Miss(_)) =>
            {
                let Refusal { phase, error } = *refused;
                error!(volume = %volume.name, %error, "the store does not serve: on-error=scratch, the job runs uncached");
                self.tally
                    .failed("scratch", format!("{}: {error}", volume.name));
                let scratch = self.scratch(volume).map_err(|e| refuse(phase, e))?;
                Ok(Backing::Scratch(scratch))
            }
            Err(refused) => Err(refused),
        }
    }

    /// A copy that is the best now, mounted and attached nowhere.
    fn ready(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        phase: Phase,
    ) -> Result<(Prepared, OpenFs), Refused> {
        let (old, premounted) = match phase {
            Phase::Ready(mut copy) if self.is_best(volume, &copy) => {
                // What a kept volume holds is nowhere else, and may be what is to be cleared away.
                if !volume.keeps()
                    && let Err(full) =
                        self.with_room(&volume.spec, REQUEST_PATIENCE, || self.room_for_lease())
                {
                    return Err(refuse(Phase::Ready(copy), full));
                }
                if let Some(premounted) = copy.premounted.take() {
                    return Ok((copy, premounted.fs));
                }
                match self.open(volume, &mut copy) {
                    Ok(open) => return Ok((copy, open)),
                    Err(error) if self.give_up_damaged(&copy.source, &error) => {
                        (Some(copy.lv), None)
                    }
                    Err(error) => return Err(refuse(Phase::Ready(copy), error.into())),
                }
            }
            Phase::Ready(copy) => (Some(copy.lv), copy.premounted),
            Phase::Stale(lv) => (lv, None),
            Phase::Making | Phase::Changing | Phase::Leased(_) => (None, None),
        };
        reach("refresh", 1);
        match self.with_room(&volume.spec, REQUEST_PATIENCE, || {
            self.prepare_open(volume, "refresh")
        }) {
            Ok(ready) => {
                reach("refresh", 4);
                if let Some(lv) = old {
                    self.discard(lv, premounted);
                }
                Ok(ready)
            }
            Err(error) => Err(refuse(Phase::Stale(old), error)),
        }
    }

    /// Attaches a mount at a volume's mountpoint.
    fn show(&self, mounted: &Mounted, at: &Path) -> Result<(), EngineError> {
        reach("mount", 1);
        match fs::create_dir(at) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // Left by an earlier life, or by somebody else: never mount upon it.
                mount::detach_all(at).map_err(|e| io_error("unmounting", at, e))?;
            }
            other => other.map_err(|e| io_error("making", at, e))?,
        }
        reach("mount", 2);
        mounted.attach(at).map_err(|e| {
            let _ = fs::remove_dir(at);
            io_error("mounting at", at, e)
        })
    }

    fn scratch(&self, volume: &Volume) -> Result<Mounted, EngineError> {
        let size = volume.spec.size.unwrap_or(self.settings.scratch_size);
        let failed = |e| {
            io_error(
                "mounting scratch space for",
                Path::new(volume.name.as_str()),
                e,
            )
        };
        let mounted = Mounted::scratch(size, start::SCRATCH_SOURCE).map_err(failed)?;
        crate::fs::dress(mounted.root(), volume.spec.owner, volume.spec.mode).map_err(failed)?;
        Ok(mounted)
    }

    /// Marks an LV as leased, so that the lease's end is not forgotten if we die
    /// between it and its settlement. In the store behind Mount's answer: until it is written
    /// there, another life of ours learns it from what is [`Pending`]. In use, it is not being made any more (a late
    /// mount's is, up to here); `failed` says that its work is known to have.
    fn mark_leased(self: &Arc<Self>, lv: LvName, failed: bool) -> thread::JoinHandle<()> {
        let work = self.work();
        let mut add = vec![self.lease_tag()];
        add.extend(failed.then(|| tag(FAILED)));
        for tag in &add {
            self.pending.add(&lv, tag.clone());
        }
        thread::spawn(move || {
            match work.0.store.change_tags(&lv, &add, &[tag(MAKING)]) {
                Ok(()) => {
                    for tag in &add {
                        work.0.pending.settle(&lv, tag);
                    }
                }
                Err(error) => {
                    warn!(%lv, %error, "a lease could not be marked: its cache is not published if this machine stops now");
                }
            }
            reach("mount", 4);
        })
    }

    fn lease_tag(&self) -> Tag {
        tag(&format!("{LEASE}{}", self.boot))
    }

    /// Ends the use of a volume by the client `id`; with the last one, the lease.
    /// Never fails, and returns within 4 seconds: what takes longer goes on behind it.
    pub fn unmount(self: &Arc<Self>, name: &VolumeName, id: &str) {
        let Ok(volume) = self.volume(name) else {
            return;
        };
        let work = self.work();
        let id = id.to_owned();
        // At once: a Remove may be asked for before what follows has its turn.
        lock(&volume.now).leaving.insert(id.clone());
        let (done, answer) = mpsc::channel::<()>();
        thread::spawn(move || {
            work.0.end_use(&volume, &id);
            drop(done);
        });
        let _ = answer.recv_timeout(UNMOUNT_ANSWER);
    }

    /// Ends the use of a volume by all its clients, as each of them would: for containers that are known to be gone, whatever
    /// of them still has the mount.
    ///
    /// # Errors
    /// When there is no such volume.
    pub fn release(self: &Arc<Self>, name: &VolumeName) -> Result<(), EngineError> {
        let clients: Vec<_> = match &lock(&self.volume(name)?.now).phase {
            Phase::Leased(lease) => lease.ids.iter().cloned().collect(),
            _ => Vec::new(),
        };
        for client in clients {
            self.unmount(name, &client);
        }
        Ok(())
    }

    fn end_use(self: &Arc<Self>, volume: &Arc<Volume>, id: &str) {
        let _op = lock(&volume.op);
        let lease = {
            let mut now = lock(&volume.now);
            now.leaving.remove(id);
            let Phase::Leased(lease) = &mut now.phase else {
                return;
            };
            if self.telling.asks_about(id) {
                lease.told.docker_uses_it();
            }
            lease.ids.remove(id);
            if !lease.ids.is_empty() {
                return;
            }
            let Phase::Leased(lease) = mem::replace(&mut now.phase, Phase::Changing) else {
                unreachable!("seen above, under the same lock");
            };
            lease
        };
        let next = self.end(volume, lease);
        lock(&volume.now).phase = next;
    }

    /// Shows a volume in use as a container with the ids `ids` is to see it, which is about to
    /// start: files are whoever's they were inside of the last one. Nothing happens where there is no lease.
    ///
    /// The mount that the lease began with stays at the bottom; one with other ids lies upon it.
    ///
    /// # Errors
    /// See [`EngineError`]; the volume is still mounted, as it was.
    pub fn fit(&self, name: &VolumeName, ids: &Ids) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let _op = lock(&volume.op);
        let mut now = lock(&volume.now);
        let Phase::Leased(lease) = &mut now.phase else {
            return Ok(());
        };
        if lease.shown.as_ref() == Some(ids) {
            return Ok(());
        }
        let at = self.mountpoint(name);
        let Backing::Lv { copy, open, .. } = &lease.backing else {
            own_scratch(lease.mounted(), &volume.spec, ids)
                .map_err(|e| io_error("changing the owner of", &at, e))?;
            lease.shown = Some(ids.clone());
            return Ok(());
        };
        let (lv, device, fs) = (copy.lv.clone(), copy.device.clone(), open.fs);
        let plain_below = lease.plain_below;
        drop(now);
        let mounted = if plain_below && ids.is_host() {
            None
        } else {
            let device = device.map_or_else(|| self.store.activate(&lv), Ok)?;
            let mounted = Mounted::device(&device, fs)
                .map_err(|e| io_error("mounting", &device, e.into()))?;
            self.map_ids(&mounted, ids);
            Some(mounted)
        };
        reach("fit", 1);
        // The lowest one stays: at no moment, and whatever ends the daemon now, is there a mountpoint with nothing on it, where a
        // container would write to the host's memory.
        mount::uncover(&at).map_err(|e| io_error("unmounting", &at, e))?;
        reach("fit", 2);
        if let Some(mounted) = mounted {
            mounted
                .attach(&at)
                .map_err(|e| io_error("mounting at", &at, e))?;
        }
        reach("fit", 3);
        if let Phase::Leased(lease) = &mut lock(&volume.now).phase {
            lease.shown = Some(ids.clone());
        }
        Ok(())
    }

    /// Has a mount that was never attached show files with `ids`; where the kernel cannot do that, they are
    /// this host's.
    fn map_ids(&self, mounted: &Mounted, ids: &Ids) {
        if ids.is_host() {
            return;
        }
        if let Err(error) = mounted.map_ids(ids)
            && !self.unmapped.swap(true, Ordering::Relaxed)
        {
            error!(%error, "the kernel makes no idmapped mount: in a container with a user namespace, files have the host's owners (said once)");
        }
    }

    /// Takes what is said of a container that uses a volume's present lease, at once, whatever the store or the volume is
    /// busy with. Nothing happens where there is no such lease. `true`: it is to be written down for another life of the
    /// daemon, by [`Engine::write_verdict`].
    pub fn container(&self, name: &VolumeName, container: &str, happened: &Happened) -> bool {
        let Ok(volume) = self.volume(name) else {
            return false;
        };
        let now = lock(&volume.now);
        match &now.phase {
            Phase::Leased(lease) => {
                if let Backing::Job { job, .. } = &lease.backing {
                    job.note_container(container, happened);
                }
                let failed = || lease.heard().verdict() == Verdict::Failure;
                let before = failed();
                lease.told.take(container, happened, now_ns());
                before != failed()
            }
            // Its end is under way, and its settlement looks at this.
            Phase::Changing => {
                if let Some(told) = self.telling.newest(name) {
                    told.take(container, happened, now_ns());
                }
                false
            }
            Phase::Making | Phase::Stale(_) | Phase::Ready(_) => false,
        }
    }

    /// Has the store know whether the work in a volume's present lease has failed, so that another life of the daemon does.
    pub fn write_verdict(self: &Arc<Self>, name: &VolumeName) {
        let Ok(volume) = self.volume(name) else {
            return;
        };
        let _work = self.work();
        let _op = lock(&volume.op);
        let told = match &lock(&volume.now).phase {
            Phase::Leased(lease) => Arc::clone(&lease.told),
            _ => return,
        };
        self.note_verdict(&volume, &told);
    }

    /// Takes what Docker says of a container that uses a volume, or used it, which happened `at`, in nanoseconds since
    /// 1970. At once: what is to be written of it is written behind the caller.
    pub fn docker_container(
        self: &Arc<Self>,
        name: &VolumeName,
        container: &str,
        happened: &Happened,
        at: u64,
    ) {
        let Some(told) = self.telling.take(name, container, happened, at) else {
            return;
        };
        if let Ok(volume) = self.volume(name) {
            let work = self.work();
            thread::spawn(move || {
                let _op = lock(&volume.op);
                work.0.note_verdict(&volume, &told);
            });
        }
    }

    /// Takes Docker's word that a container of a volume does not run, when it was last started and ended, in
    /// nanoseconds since 1970, and how.
    pub fn docker_container_is_done(
        &self,
        name: &VolumeName,
        container: &str,
        times: (u64, u64),
        verdict: Verdict,
    ) {
        self.telling.does_not_run(name, container, times, verdict);
    }

    /// Docker has told of each container that used the volume until `at`, in nanoseconds since 1970.
    pub fn docker_named_all(&self, name: &VolumeName, at: u64) {
        self.telling.all_named(name, at);
    }

    /// Docker will tell no more of leases that have ended: of this volume, or of any.
    pub fn docker_tells_no_more(&self, name: Option<&VolumeName>) {
        self.telling.give_up(name);
    }

    /// The volumes whose leases are not settled: of those Docker may have something to tell.
    #[must_use]
    pub fn volumes_in_use(&self) -> Vec<VolumeName> {
        self.telling.volumes()
    }

    /// Whether a lease of the volume has ended, and how its containers did is still to be told by Docker.
    #[must_use]
    pub fn awaits_docker(&self, name: &VolumeName) -> bool {
        self.telling.is_awaited(name)
    }

    /// Notes in the store whether the work of a volume's present lease has failed, so that no other life of ours
    /// publishes what did. Its `op` the caller holds.
    fn note_verdict(&self, volume: &Volume, told: &Arc<told::Told>) {
        let (lvs, job, failed) = {
            let now = lock(&volume.now);
            let Phase::Leased(lease) = &now.phase else {
                return;
            };
            if !Arc::ptr_eq(&lease.told, told) {
                return;
            }
            let lvs = match &lease.backing {
                Backing::Lv { copy, .. } if may_publish(&volume.spec) => vec![copy.lv.clone()],
                Backing::Job { .. } | Backing::Lv { .. } | Backing::Scratch(_) => Vec::new(),
            };
            let job = match &lease.backing {
                Backing::Job { job, .. } => Some(Arc::clone(job)),
                Backing::Lv { .. } | Backing::Scratch(_) => None,
            };
            (lvs, job, lease.heard().verdict() == Verdict::Failure)
        };
        let noted = job.map_or(Ok(()), |job| self.note_job(&job, failed));
        if let Err(error) = noted {
            warn!(volume = %volume.name, %error, "how its work ended could not be noted: it is not known if the daemon dies now");
        }
        for lv in lvs {
            if let Err(error) = self.note_failure(&lv, failed) {
                warn!(volume = %volume.name, %error, "how its work ended could not be noted: it is not known if the daemon dies now");
            }
        }
    }

    /// Says whose job it is that a job volume with `admit=later` is for: its requests are served from
    /// now on, with these scopes. Said once; the same again changes nothing.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn admit(
        &self,
        name: &VolumeName,
        options: &BTreeMap<String, String>,
    ) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let _op = lock(&volume.op);
        let spec = volume.spec.admitted(options)?;
        if let Some(known) = volume.for_requests() {
            return if known == spec {
                Ok(())
            } else {
                Err(EngineError::Exists(name.clone()))
            };
        }
        let lv = match &lock(&volume.now).phase {
            Phase::Leased(Lease {
                backing: Backing::Job { lv, .. },
                ..
            })
            | Phase::Stale(lv) => lv.clone(),
            _ => None,
        };
        // First where another life of ours reads it: what a job was given must not be asked for again.
        if let Some(lv) = lv {
            let (old, new) = (volume.spec.to_tags(), spec.to_tags());
            let without = |all: &[Tag], others: &[Tag]| -> Vec<Tag> {
                let others: HashSet<_> = others.iter().collect();
                all.iter()
                    .filter(|tag| !others.contains(tag))
                    .cloned()
                    .collect()
            };
            self.store
                .change_tags(&lv, &without(&new, &old), &without(&old, &new))?;
        }
        info!(volume = %name, scope = spec.scope.as_ref().map_or("-", Tag::as_str), "its job is known");
        volume.admitted.send_replace(Some(spec));
        Ok(())
    }

    /// Removes a volume that nobody uses; a lease whose users are gone without an Unmount ends.
    ///
    /// # Errors
    /// [`EngineError::InUse`], and see [`EngineError`].
    pub fn remove(self: &Arc<Self>, name: &VolumeName) -> Result<(), EngineError> {
        self.remove_unless(name, |volume| {
            self.users_of(volume).map(|users| EngineError::InUse {
                name: name.clone(),
                users,
                at: self.mountpoint(name),
            })
        })
    }

    /// Removes a volume; a lease that goes on ends, whoever uses it.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn remove_by_force(self: &Arc<Self>, name: &VolumeName) -> Result<(), EngineError> {
        self.remove_unless(name, |volume| {
            if let Some(users) = self.users_of(volume) {
                warn!(volume = %name, users, "removed by force while it is in use");
            }
            None
        })
    }

    fn remove_unless(
        self: &Arc<Self>,
        name: &VolumeName,
        refusal: impl FnOnce(&Volume) -> Option<EngineError>,
    ) -> Result<(), EngineError> {
        let _work = self.begin()?;
        let volume = self.volume(name)?;
        let _op = lock(&volume.op);
        if let Some(refused) = refusal(&volume) {
            return Err(refused);
        }
        let phase = {
            let mut now = lock(&volume.now);
            if now.removed {
                return Err(EngineError::NoSuchVolume(name.clone()));
            }
            mem::replace(&mut now.phase, Phase::Changing)
        };
        let phase = match phase {
            Phase::Leased(lease) => self.end(&volume, lease),
            other => other,
        };
        let current = match &phase {
            Phase::Ready(copy) => Some(&copy.lv),
            Phase::Stale(lv) => lv.as_ref(),
            Phase::Making | Phase::Changing | Phase::Leased(_) => None,
        };
        match self.remove_lvs(&volume, current) {
            Ok(()) => {
                self.persist();
                let mut now = lock(&volume.now);
                now.phase = Phase::Stale(None);
                now.removed = true;
                drop(now);
                self.drop_volume(&volume);
                info!(volume = %name, "removed");
                Ok(())
            }
            Err(error) => {
                lock(&volume.now).phase = phase;
                Err(error)
            }
        }
    }

    /// Has what was answered last outlast a power cut. It is done, whether that succeeds or not.
    fn persist(&self) {
        if let Err(error) = self.store.persist() {
            warn!(%error, "a power cut may undo what was just changed");
        }
    }

    /// Commits that a volume is no more, before anybody is told so: no LV bears its
    /// name any longer. The store says which do, copies that were replaced and wait
    /// for their removal among them; the current one goes last.
    fn remove_lvs(&self, volume: &Volume, current: Option<&LvName>) -> Result<(), EngineError> {
        reach("remove", 1);
        let settling = lock(&volume.now).settling.clone();
        let mut lvs = self.store.list()?.lvs;
        // What only looks half ours may bear the name too.
        lvs.retain(|lv| match Role::from_tags(&lv.tags) {
            Role::Volume { volume: of, .. } => of.as_ref() == Some(&volume.name),
            _ => false,
        });
        lvs.sort_by_key(|lv| Some(&lv.name) == current);
        let name = tag(&format!("{VOLUME}{}", volume.name));
        for lv in lvs {
            if !settling.contains(&lv.name) || !may_publish(&volume.spec) {
                self.mark_doomed(&lv.name)?;
                continue;
            }
            // What the lease wrote is still to be published, under no volume's name.
            match self
                .store
                .change_tags(&lv.name, &[self.lease_tag()], std::slice::from_ref(&name))
            {
                Err(StoreError::NotFound(_)) => {}
                other => other?,
            }
        }
        reach("remove", 2);
        Ok(())
    }

    /// What was counted.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// What was counted since the start, and what there is now. From memory.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        let leased = |volume: &&Arc<Volume>| matches!(lock(&volume.now).phase, Phase::Leased(_));
        Stats {
            volumes: volumes.len(),
            leases: volumes.iter().filter(leased).count(),
            ..self.tally.stats()
        }
    }

    /// What the store holds now: waits for it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn listing(&self) -> Result<Listing, StoreError> {
        self.store.list()
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

    /// A volume, from memory: never waits for the store.
    #[must_use]
    pub fn get(&self, name: &VolumeName) -> Option<VolumeView> {
        self.view(&*self.volume(name).ok()?)
    }

    /// All volumes, from memory: never waits for the store.
    #[must_use]
    pub fn list(&self) -> Vec<VolumeView> {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        volumes
            .iter()
            .filter_map(|volume| self.view(volume))
            .collect()
    }

    fn view(&self, volume: &Volume) -> Option<VolumeView> {
        let now = lock(&volume.now);
        if now.removed || matches!(now.phase, Phase::Making) {
            return None;
        }
        let mut status = serde_json::Map::new();
        let mut say = |key: &str, value: serde_json::Value| {
            if !value.is_null() {
                status.insert(key.to_owned(), value);
            }
        };
        let mut say_copy = |copy: &Prepared| {
            say("lv", copy.lv.as_str().into());
            say("restored", copy.source.how.as_str().into());
            say("from", copy.source.lv.as_ref().map(LvName::as_str).into());
            say("criterion", copy.source.criterion.as_deref().into());
            let age = copy.source.created.map(|t| unix_now().saturating_sub(t));
            say("age_seconds", age.into());
            say("prepare_ms", millis(copy.took).into());
        };
        let mut mountpoint = None;
        let state = match &now.phase {
            Phase::Ready(copy) => {
                say_copy(copy);
                "ready"
            }
            Phase::Leased(lease) => {
                mountpoint = Some(self.mountpoint(&volume.name));
                match &lease.backing {
                    Backing::Lv {
                        copy,
                        open,
                        baseline,
                    } => {
                        say_copy(copy);
                        let device = open.mounted.device_number();
                        let written = device.and_then(crate::fs::sectors_written).ok();
                        if let (Some(written), Some(baseline)) = (written, baseline) {
                            say(
                                "bytes_written",
                                (written.saturating_sub(*baseline) * 512).into(),
                            );
                        }
                    }
                    Backing::Scratch(_) => say("restored", Restored::Scratch.as_str().into()),
                    Backing::Job { job, .. } => say("mounts", job.shown()),
                }
                say("mount_ms", millis(lease.took).into());
                let running = lease.told.running();
                if !running.is_empty() {
                    say("containers", running.into());
                }
                "mounted"
            }
            Phase::Making | Phase::Changing => "changing",
            Phase::Stale(_) => "stale",
        };
        say("state", state.into());
        say("last_lease", now.last.clone().into());
        Some(VolumeView {
            name: volume.name.clone(),
            created: volume.created,
            mountpoint,
            status,
        })
    }

    /// Takes no more requests, finishes what is under way within `bound`, upkeep's work too, and
    /// leaves visible mounts alone; then closes the store, whose present command has [`COMMAND_END`]
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

/// Gives a directory in memory to its owner inside of a container: it needs no other mount, as
/// it is nobody's afterwards.
fn own_scratch(dir: &Mounted, spec: &Spec, ids: &Ids) -> io::Result<()> {
    let Owner { uid, gid } = spec.owner.unwrap_or_default();
    let Some((uid, gid)) = ids.outside(uid, gid) else {
        return Ok(());
    };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(rustix::fs::fchown(dir.root(), Some(uid), Some(gid))?)
}

impl Lease {
    /// Whether it is still what one sees at its mountpoint.
    fn is_at(&self, at: &Path) -> bool {
        matches!((stat(at), fstat(self.mounted().root())), (Ok(seen), Ok(held)) if seen.st_dev == held.st_dev)
    }
}

fn io_error(doing: &str, to: &Path, source: io::Error) -> EngineError {
    EngineError::Io {
        what: format!("{doing} {}", to.display()),
        source,
    }
}

/// A tag that is one by construction.
fn tag(text: &str) -> Tag {
    text.parse().expect("made of names that were parsed")
}
