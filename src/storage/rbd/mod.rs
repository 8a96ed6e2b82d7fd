// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volumes as images in a Ceph pool, mapped by the kernel: the same entries on every host of a fleet.
//!
//! What there is, and every tag, is in one object beside the images (see [`index`]), so a listing is one read, and all tags of
//! a volume change in one step. Images, snapshots and clones are made by Ceph's own library ([`ceph`]), devices by the kernel
//! ([`kernel`]).
//!
//! An inactive snapshot is no image of its own: only once it is activated it becomes a clone. So publishing costs
//! one snapshot, whatever it holds, and copies of an entry cost none.
//!
//! With the cluster away every call fails in bounded time ([`ceph::PATIENCE`] for each message) but for I/O on devices, which
//! waits as long as it takes.

pub mod ceph;
pub mod fleet;
pub mod index;
mod kernel;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::FlockOperation;
use serde_json::{Value, json};
use tracing::{debug, warn};

use self::ceph::{CephError, Cluster, ConnectError, Image, PATIENCE, Pool};
use self::fleet::{Beat, Observer};
use self::index::{
    Change, Content, GENERATION, Garbage, Index, Maker, Origin, Snapshot, SnapshotOf, Volume,
};
use self::kernel::{Device, Kernel};
use super::freeze::{self, Frozen};
use super::{Capacity, Listing, Lv, NewLv, Store, StoreError, Usage, Watch};
use crate::cache::names::{LvName, Tag};
use crate::cache::record::{DEFAULT, DOOMED, MAKING, SNAPSHOT};
use crate::cache::spec::FsType;
use crate::cache::units::Bytes;
use crate::mount::Mounted;

/// The object that is the index, in the images' namespace.
const INDEX: &str = "lvm-cache-friend.index";

/// Sizes are rounded up to this, in bytes: an object of an image.
const GRAIN: u64 = 4 * Bytes::MIB;

/// How many keys of the index are read at once: as many as an OSD gives (`osd_max_omap_entries_per_request`).
const PAGE: u64 = 1024;

/// How long a change is tried while other hosts change the index too.
const TURN: Duration = Duration::from_secs(60);

/// How often the index is looked at for changes by other hosts: one read of a few bytes.
const LOOK: Duration = Duration::from_secs(1);

/// Share of the pool in use from which on no volume is made, in percent. At its quota, and where an OSD is full, writes
/// wait.
const LIMIT: f64 = 90.0;

/// From how many parents on an image that is cloned is made free of them, in the background. The kernel opens 16 at most
/// (`RBD_MAX_PARENT_CHAIN_LEN`, drivers/block/rbd.c), and each one with every map.
const DEEP: usize = 8;
/// From how many on it is not cloned before that.
const TOO_DEEP: usize = 14;

/// In the runtime directory: this store's files.
const RUN: &str = "rbd";
/// Written when the index has changed, for those who watch.
const SEEN: &str = "generation";
/// Held by the process that maps.
const LOCK: &str = "lock";

/// Where a store on Ceph is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The pool.
    pub pool: String,
    /// The namespace in it; empty: the pool's own.
    pub namespace: String,
    /// The cluster's user, without `client.`.
    pub user: String,
    /// The client's configuration; `None`: where Ceph's tools look for it.
    pub conf: Option<PathBuf>,
}

impl Place {
    /// `POOL` or `POOL/NAMESPACE`, as `rbd` has it.
    #[must_use]
    pub fn name(&self) -> String {
        if self.namespace.is_empty() {
            self.pool.clone()
        } else {
            format!("{}/{}", self.pool, self.namespace)
        }
    }
}

/// A namespace of images.
pub struct RbdStore {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    place: Place,
    pool: Pool,
    kernel: Kernel,
    me: Maker,
    run: PathBuf,
    /// As it was last read, or left by a change of this process's.
    known: Mutex<Arc<Index>>,
    /// Whose turn it is to remove what nothing needs, among this process's threads.
    collecting: Mutex<()>,
    /// This host's key, once it has joined.
    beat: Mutex<Option<Beat>>,
    /// Images that are being copied from their parents by this process.
    flattening: Mutex<BTreeSet<String>>,
    /// Which processes of this host live is told by who holds its file.
    _alive: Flock<File>,
}

/// A snapshot to make a volume of.
struct Source {
    at: SnapshotOf,
    origin: Origin,
    size: u64,
    /// It was taken for that, in this generation of the origin's activation, if that was not active.
    taken: Option<Option<u64>>,
}

/// Prepares a namespace and its base, an empty XFS of `base_size`: once, and again without any change. `host` is
/// this host's id, `run_dir` where this host's runtime files are.
///
/// # Errors
/// Where the namespace is not there, the user may not use it, or what else failed.
pub fn init(
    place: &Place,
    host: &str,
    run_dir: &Path,
    base_size: Bytes,
) -> Result<RbdStore, StoreError> {
    let store = RbdStore::at(place, host, run_dir)?;
    let is_base = |volume: &Volume| volume.tags.iter().any(|tag| tag == DEFAULT);
    if store.shared.view()?.volumes.values().any(is_base) {
        store.shared.start();
        return Ok(store);
    }
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| StoreError::Failed(error.to_string()))?;
    let tag = |text: &str| text.parse::<Tag>().expect("is a tag");
    let base = NewLv {
        name: LvName::fresh(unix_now(), random),
        tags: vec![tag(SNAPSHOT), tag(MAKING)],
        active: true,
    };
    let made = (|| {
        let device = store
            .create(&base, base_size)?
            .expect("it was asked to be active");
        let held = store.hold(&base.name)?;
        crate::fs::make(&device, FsType::Xfs)?;
        drop(held);
        store.deactivate(&base.name)?;
        store.shared.change(|index| {
            let mut change = Change::default();
            // Another host may have been quicker.
            let wanted = !index.volumes.values().any(is_base);
            if wanted {
                let mut volume = store.shared.get(index, &base.name)?.clone();
                volume.tags = vec![DEFAULT.to_owned(), SNAPSHOT.to_owned()];
                change.volumes.insert(base.name.clone(), Some(volume));
            }
            Ok((change, wanted))
        })
    })();
    if !matches!(made, Ok(true)) {
        let removed = store.remove(&base.name);
        made?;
        removed?;
    }
    store.shared.start();
    Ok(store)
}

impl RbdStore {
    /// Opens a namespace that [`init`] prepared, and thaws what a process of this host left frozen that was killed.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] where it is not prepared, or the cluster cannot be reached.
    pub fn open(place: &Place, host: &str, run_dir: &Path) -> Result<Self, StoreError> {
        let store = Self::at(place, host, run_dir)?;
        if store.shared.view()?.generation == 0 {
            return Err(StoreError::Unusable(format!(
                "{} is not prepared as a store: run: lvm-cache-friend init --rbd {0}",
                store.shared.name
            )));
        }
        store.shared.thaw();
        store.shared.start();
        Ok(store)
    }

    /// Has this process be the host's daemon: from now on it counts on, other hosts see whether it does, and it sees whether
    /// they do. What a host had that is lost becomes its own, to be removed. `true`: this host itself was declared lost since
    /// its last daemon joined, and what that had is gone.
    ///
    /// # Errors
    /// When the cluster cannot be reached.
    pub fn join(&self) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let mut beat = shared.beat();
        let key = fleet::key(&shared.me.host);
        loop {
            let keys = shared
                .pool
                .keys(INDEX, &[&key])
                .map_err(|error| shared.failed(&error))?;
            let was = fleet::hosts(&keys).remove(&shared.me.host);
            let now = Beat {
                process: shared.me.process.clone(),
                count: 1,
                lost: false,
            };
            let write = fleet::beat(&shared.me.host, was.as_ref(), &now);
            if shared
                .pool
                .write(INDEX, &write)
                .map_err(|error| shared.failed(&error))?
            {
                *beat = Some(now);
                return Ok(was.is_some_and(|was| was.lost));
            }
        }
    }

    fn at(place: &Place, host: &str, run_dir: &Path) -> Result<Self, StoreError> {
        let name = place.name();
        let unusable =
            |error: &dyn std::fmt::Display| StoreError::Unusable(format!("{name}: {error}"));
        let cluster = Cluster::connect(&place.user, place.conf.as_deref()).map_err(|error| {
            let help = match &error {
                ConnectError::NoLibrary(_) => String::new(),
                ConnectError::Failed(_) => format!(
                    ": does `rbd --id {} ls {name}` work on this host?",
                    place.user
                ),
            };
            StoreError::Unusable(format!("{name}: {error}{help}"))
        })?;
        let refused = |error: CephError| match error.errno {
            Errno::EPERM | Errno::EACCES => StoreError::Unusable(format!(
                "{name}: {error}. What client.{} has to be allowed, an administrator of the cluster grants: ceph auth caps client.{0} mon 'profile rbd' osd 'profile rbd pool={}{}'",
                place.user,
                place.pool,
                if place.namespace.is_empty() {
                    String::new()
                } else {
                    format!(" namespace={}", place.namespace)
                },
            )),
            _ => unusable(&error),
        };
        let pool = cluster
            .pool(&place.pool, &place.namespace)
            .map_err(|error| match error.errno {
                Errno::ENOENT => StoreError::Unusable(format!(
                    "{name}: there is no pool {0}; an administrator of the cluster makes it: ceph osd pool create {0} && rbd pool init {0}",
                    place.pool
                )),
                _ => refused(error),
            })?;
        // A user who may do things in the namespace alone is not told which ones there are.
        if !place.namespace.is_empty() && matches!(pool.has_namespace(&place.namespace), Ok(false))
        {
            return Err(StoreError::Unusable(format!(
                "{name}: there is no such namespace; an administrator of the cluster makes it: rbd namespace create {name}"
            )));
        }
        // That the user may read here, at all.
        pool.keys(INDEX, &[GENERATION]).map_err(refused)?;
        let kernel = Kernel::new(&cluster, &place.user, &place.pool, &place.namespace)
            .map_err(|error| unusable(&error))?;
        let run = run_dir.join(RUN);
        let failed = |what: &str| io_failed(what, &run);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&run)
            .map_err(failed("making"))?;
        let process = format!(
            "{:016x}",
            getrandom::u64().map_err(|error| StoreError::Failed(error.to_string()))?
        );
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(process_file(&run, &process))
            .map_err(failed("making a file in"))?;
        let alive = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| failed("locking a file in")(error.into()))?;
        Ok(Self {
            shared: Arc::new(Shared {
                name,
                place: place.clone(),
                pool,
                kernel,
                me: Maker {
                    host: host.to_owned(),
                    process,
                },
                run,
                known: Mutex::default(),
                collecting: Mutex::default(),
                beat: Mutex::default(),
                flattening: Mutex::default(),
                _alive: alive,
            }),
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_file(process_file(&self.run, &self.me.process));
    }
}

fn process_file(run: &Path, process: &str) -> PathBuf {
    run.join(format!("process.{process}"))
}

/// Tells those who watch when the index changes, for as long as the store is open.
fn look_for_changes(store: &Weak<Shared>) {
    let mut seen = None;
    let mut away = false;
    let mut observer = Observer::default();
    let begun = Instant::now();
    let mut next_beat = Duration::ZERO;
    while let Some(store) = store.upgrade() {
        if begun.elapsed() >= next_beat {
            next_beat = begun.elapsed() + fleet::BEAT;
            if let Err(error) = store.look_at_hosts(&mut observer, begun.elapsed()) {
                observer.interrupted();
                debug!(%error, "the other hosts are not seen");
            }
        }
        match store.generation() {
            Ok(now) => {
                away = false;
                if seen.is_some_and(|seen| seen != now) {
                    store.tell(now);
                }
                seen = Some(now);
            }
            Err(error) if !away => {
                away = true;
                warn!(%error, "changes by other hosts are not seen");
            }
            Err(_) => {}
        }
        drop(store);
        thread::sleep(LOOK);
    }
}

impl Shared {
    /// Begins to look for changes by others.
    fn start(self: &Arc<Self>) {
        self.tell(0);
        let store = Arc::downgrade(self);
        thread::spawn(move || look_for_changes(&store));
    }

    fn tell(&self, generation: u64) {
        let file = self.run.join(SEEN);
        if let Err(error) = fs::write(&file, format!("{generation}\n")) {
            debug!(%error, "a change is not told");
        }
    }

    fn generation(&self) -> Result<u64, CephError> {
        let keys = self.pool.keys(INDEX, &[GENERATION])?;
        let value = keys.get(GENERATION);
        Ok(value
            .and_then(|value| index::generation(value))
            .unwrap_or(0))
    }

    fn beat(&self) -> MutexGuard<'_, Option<Beat>> {
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts on, where this process has joined, and declares lost which hosts do so no more.
    fn look_at_hosts(&self, observer: &mut Observer, now: Duration) -> Result<(), StoreError> {
        let mine = {
            let mut beat = self.beat();
            let Some(was) = beat.clone().filter(|was| !was.lost) else {
                return Ok(());
            };
            let next = Beat {
                count: was.count + 1,
                ..was.clone()
            };
            let write = fleet::beat(&self.me.host, Some(&was), &next);
            if self
                .pool
                .write(INDEX, &write)
                .map_err(|error| self.failed(&error))?
            {
                *beat = Some(next.clone());
                next
            } else {
                self.is_here(&mut beat)?
            }
        };
        let (keys, _) = self
            .pool
            .page(INDEX, fleet::HOST, "", PAGE)
            .map_err(|error| self.failed(&error))?;
        observer.look(now, &fleet::hosts(&keys));
        let silent: Vec<(String, Beat)> = observer
            .silent(fleet::LOST)
            .filter(|(host, _)| *host != self.me.host)
            .map(|(host, beat)| (host.to_owned(), beat.clone()))
            .collect();
        for (host, beat) in silent {
            let index = self.view()?;
            let mut write = fleet::declare_lost(&index, &host, &beat, &self.me.host);
            fleet::guard(&mut write, &self.me.host, &mine);
            // Where another change came first, at the next look.
            if self
                .pool
                .write(INDEX, &write)
                .map_err(|error| self.failed(&error))?
            {
                warn!(host, "a host is lost: what it had is removed");
            }
        }
        Ok(())
    }

    /// This host's key as it is in the index: a write of it that was in doubt may have been made.
    ///
    /// # Errors
    /// Where it was declared lost, or another process of the host's has joined.
    fn is_here(&self, beat: &mut Option<Beat>) -> Result<Beat, StoreError> {
        let key = fleet::key(&self.me.host);
        let keys = self
            .pool
            .keys(INDEX, &[&key])
            .map_err(|error| self.failed(&error))?;
        match fleet::hosts(&keys).remove(&self.me.host) {
            Some(found) if found.process == self.me.process && !found.lost => {
                *beat = Some(found.clone());
                Ok(found)
            }
            found => {
                if let Some(beat) = beat {
                    beat.lost = true;
                }
                Err(self.shut_out(found.is_some_and(|found| found.lost)))
            }
        }
    }

    fn shut_out(&self, lost: bool) -> StoreError {
        let why = if lost {
            "this host was away for so long that another one took it for lost, and what its volumes held is gone"
        } else {
            "another daemon has joined with this host's id: are there two hosts with one /etc/machine-id?"
        };
        StoreError::OutOfService {
            store: self.name.clone(),
            detail: format!("{why}; to begin anew: systemctl restart lvm-cache-friend"),
        }
    }

    fn known(&self) -> MutexGuard<'_, Arc<Index>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index as it is now.
    fn view(&self) -> Result<Arc<Index>, StoreError> {
        let generation = self.generation().map_err(|error| self.failed(&error))?;
        let known = Arc::clone(&self.known());
        if known.generation == generation {
            return Ok(known);
        }
        let read = Arc::new(self.load()?);
        let mut known = self.known();
        if known.generation < read.generation {
            *known = Arc::clone(&read);
        }
        Ok(read)
    }

    /// Reads all of the index, as it was at one moment.
    fn load(&self) -> Result<Index, StoreError> {
        let deadline = Instant::now() + TURN;
        loop {
            let before = self.generation().map_err(|error| self.failed(&error))?;
            let mut keys = ceph::Omap::new();
            loop {
                let after = keys.last_key_value().map_or("", |(key, _)| key.as_str());
                let (page, more) = self
                    .pool
                    .page(INDEX, "", after, PAGE)
                    .map_err(|error| self.failed(&error))?;
                keys.extend(page);
                if !more {
                    break;
                }
            }
            let index = Index::parse(&keys).map_err(StoreError::Unusable)?;
            // In one page it is of one moment anyway.
            if index.generation == before
                && self.generation().map_err(|error| self.failed(&error))? == before
            {
                return Ok(index);
            }
            if Instant::now() >= deadline {
                return Err(self.late(TURN));
            }
        }
    }

    /// Makes the change that `work` works out from the index, and gives what else it gives. It is worked out again where
    /// another host's or thread's change came first, and where `work` refuses what is not the newest.
    fn change<T>(
        &self,
        work: impl Fn(&Index) -> Result<(Change, T), StoreError>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + TURN;
        let mut newest = false;
        loop {
            let index = if newest {
                self.view()?
            } else {
                Arc::clone(&self.known())
            };
            let (change, result) = match work(&index) {
                Ok((change, result)) if !change.is_empty() => (change, result),
                Ok((_, result)) if newest => return Ok(result),
                Err(error) if newest => return Err(error),
                _ => {
                    newest = true;
                    continue;
                }
            };
            let mut write = change.write(&index);
            let mut mine = self.beat().clone();
            if mine.as_ref().is_some_and(|mine| mine.lost) {
                mine = Some(self.is_here(&mut self.beat())?);
            }
            if let Some(mine) = &mine {
                fleet::guard(&mut write, &self.me.host, mine);
            }
            let written = self
                .pool
                .write(INDEX, &write)
                .map_err(|error| self.failed(&error))?;
            if written {
                let mut known = self.known();
                if known.generation == index.generation {
                    drop(index);
                    Arc::make_mut(&mut known).apply(&change);
                }
                return Ok(result);
            }
            if mine.is_some() {
                self.is_here(&mut self.beat())?;
            }
            newest = true;
            if Instant::now() >= deadline {
                return Err(self.late(TURN));
            }
            // Of several who met, not all try again at once.
            let wait = getrandom::u32().unwrap_or_default() % 8;
            thread::sleep(Duration::from_millis(wait.into()));
        }
    }

    fn late(&self, waited: Duration) -> StoreError {
        StoreError::Timeout {
            store: self.name.clone(),
            seconds: waited.as_secs(),
        }
    }

    /// What a failure of Ceph's is to the engine.
    fn failed(&self, error: &CephError) -> StoreError {
        match error.errno {
            Errno::ETIMEDOUT => self.late(PATIENCE),
            Errno::ENOSPC | Errno::EDQUOT => StoreError::Full {
                store: self.name.clone(),
                detail: format!("{error}: `ceph df` and `ceph health detail` say more"),
            },
            // EBLOCKLISTED (include/rados.h).
            Errno::ESHUTDOWN => StoreError::OutOfService {
                store: self.name.clone(),
                detail: format!(
                    "{error}: the cluster has shut this host out (`ceph osd blocklist ls`), mostly since it was taken for lost; restart the daemon"
                ),
            },
            _ => StoreError::Failed(format!("{}: {error}", self.name)),
        }
    }

    fn io(&self, what: &str, image: &str, error: io::Error) -> StoreError {
        if error.raw_os_error() == Some(libc::ETIMEDOUT) {
            return self.late(PATIENCE);
        }
        StoreError::Io {
            what: format!("{what} {}/{image}", self.name),
            source: error,
        }
    }

    /// A volume that this host sees.
    fn get<'a>(&self, index: &'a Index, lv: &LvName) -> Result<&'a Volume, StoreError> {
        index
            .volumes
            .get(lv)
            .filter(|volume| fleet::is_seen_by(volume, &self.me.host))
            .ok_or_else(|| StoreError::NotFound(lv.clone()))
    }

    fn volume(&self, lv: &LvName) -> Result<Volume, StoreError> {
        self.get(&*self.view()?, lv).cloned()
    }

    /// Whether a process may still finish what it makes. Of other hosts' the answer is yes.
    fn may_finish(&self, maker: &Maker) -> bool {
        if maker.host != self.me.host || maker.process == self.me.process {
            return true;
        }
        let Ok(file) = File::open(process_file(&self.run, &maker.process)) else {
            return false;
        };
        let held = Flock::lock(file, FlockArg::LockSharedNonblock);
        matches!(held, Err((_, Errno::EWOULDBLOCK)))
    }

    /// Removes what nothing needs. What cannot be removed now is tried again at the next removal.
    fn collect(&self) -> Result<(), StoreError> {
        let _turn = self
            .collecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut first = Ok(());
        let mut in_vain = Vec::new();
        loop {
            let index = self.view()?;
            let garbage = index.garbage(|maker| self.may_finish(maker));
            let Some(next) = garbage.into_iter().find(|next| !in_vain.contains(next)) else {
                return first;
            };
            if let Err(error) = self.remove_garbage(&index, &next) {
                debug!(?next, %error, "not removed yet");
                first = first.and(Err(error));
                in_vain.push(next);
            }
        }
    }

    fn remove_garbage(&self, index: &Index, garbage: &Garbage) -> Result<(), StoreError> {
        let gone = |done: Result<(), CephError>| match done {
            Err(error) if error.errno == Errno::ENOENT => Ok(()),
            done => done.map_err(|error| self.failed(&error)),
        };
        let change_image = |image: &str, change: &dyn Fn(&mut index::Image)| {
            self.change(|index| {
                let mut changed = Change::default();
                if let Some(found) = index.images.get(image) {
                    let mut found = found.clone();
                    change(&mut found);
                    changed.images.insert(image.to_owned(), Some(found));
                }
                Ok((changed, ()))
            })
        };
        match garbage {
            Garbage::Snapshot(SnapshotOf { image, snapshot }) => {
                let removed = self
                    .pool
                    .image(image)
                    .and_then(|image| image.remove_snapshot(snapshot));
                gone(removed)?;
                change_image(image, &|image| _ = image.snapshots.remove(snapshot))
            }
            Garbage::Image(image) => {
                let snapshots = index.images.get(image).map(|image| &image.snapshots);
                if snapshots.is_some_and(|snapshots| !snapshots.is_empty()) {
                    // They are garbage too, and come first.
                    return Err(StoreError::Failed(format!("{image} has snapshots still")));
                }
                gone(self.pool.remove_image(image))?;
                self.change(|index| {
                    let mut change = Change::default();
                    if index.images.contains_key(image) {
                        change.images.insert(image.clone(), None);
                    }
                    Ok((change, ()))
                })
            }
        }
    }

    /// After a failure: what this process was to make is made no more.
    fn give_up(&self, image: &str, snapshot: Option<&str>) {
        let given_up = self.change(|index| {
            let mut change = Change::default();
            if let Some(found) = index.images.get(image) {
                let mut found = found.clone();
                match snapshot {
                    None => found.maker = None,
                    Some(snapshot) => {
                        if let Some(snapshot) = found.snapshots.get_mut(snapshot) {
                            snapshot.maker = None;
                        }
                    }
                }
                change.images.insert(image.to_owned(), Some(found));
            }
            Ok((change, ()))
        });
        if let Err(error) = given_up.and_then(|()| self.collect()) {
            warn!(image, %error, "what was half made is left until this process ends");
        }
    }

    /// Announces an image for `volume`, a clone of `parent` or an empty one, and makes it.
    fn make_image(
        &self,
        volume: &LvName,
        parent: Option<&SnapshotOf>,
        size: u64,
    ) -> Result<String, StoreError> {
        let name = self.change(|index| {
            let there = |parent: &SnapshotOf| {
                let image = index.images.get(&parent.image);
                image.is_some_and(|image| image.snapshots.contains_key(&parent.snapshot))
            };
            if !parent.is_none_or(there) {
                return Err(StoreError::NotFound(volume.clone()));
            }
            let name = index.fresh_name(volume);
            let image = index::Image {
                maker: Some(self.me.clone()),
                parent: parent.cloned(),
                snapshots: BTreeMap::new(),
            };
            let mut change = Change::default();
            change.images.insert(name.clone(), Some(image));
            Ok((change, name))
        })?;
        let made = match parent {
            Some(parent) => self
                .pool
                .clone_image(&parent.image, &parent.snapshot, &name),
            None => self.pool.create_image(&name, size),
        };
        if let Err(error) = made {
            self.give_up(&name, None);
            return Err(self.failed(&error));
        }
        Ok(name)
    }

    /// Has an image have all that it holds itself, in the background where it is not too deep to be cloned once more.
    fn keep_shallow(self: &Arc<Self>, index: &Index, image: &str) -> Result<(), StoreError> {
        let depth = index.depth(image);
        if depth < DEEP {
            return Ok(());
        }
        // One at a time: it is the cluster's bandwidth.
        let mut flattening = self
            .flattening
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if depth < TOO_DEEP && !flattening.is_empty() {
            return Ok(());
        }
        if !flattening.insert(image.to_owned()) {
            return Ok(());
        }
        drop(flattening);
        let (store, image) = (Arc::clone(self), image.to_owned());
        let flatten = move || {
            let done = store.flatten(&image);
            let mut flattening = store
                .flattening
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            flattening.remove(&image);
            done
        };
        if depth >= TOO_DEEP {
            return flatten();
        }
        thread::spawn(move || {
            if let Err(error) = flatten() {
                warn!(%error, "an image could not be made free of its parents, and is tried again at its next use");
            }
        });
        Ok(())
    }

    /// Copies to an image what it has from its parents, also for its snapshots.
    fn flatten(&self, image: &str) -> Result<(), StoreError> {
        match self.pool.image(image).and_then(|image| image.flatten()) {
            Ok(()) => {}
            // Another host was quicker; or it is gone.
            Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(self.failed(&error)),
        }
        self.change(|index| {
            let mut change = Change::default();
            if let Some(found) = index.images.get(image)
                && found.parent.is_some()
            {
                let mut found = found.clone();
                found.parent = None;
                change.images.insert(image.to_owned(), Some(found));
            }
            Ok((change, ()))
        })?;
        // What only it needed.
        self.collect()
    }

    /// Has a volume appear that was made, with all its tags.
    fn appear(
        &self,
        new: &NewLv,
        size: u64,
        source: Option<&Source>,
        content: &Content,
    ) -> Result<(), StoreError> {
        self.change(|index| {
            if index.volumes.contains_key(&new.name) {
                return Err(StoreError::Exists(new.name.clone()));
            }
            let mut change = Change::default();
            let seq = index.generation + 1;
            let mut content = content.clone();
            if let Content::Own {
                image,
                active,
                live,
                ..
            } = &mut content
            {
                if *live {
                    *active = seq;
                }
                let mut made = index.images.get(image).cloned().ok_or_else(|| {
                    StoreError::Failed(format!(
                        "{}: {image} is not in the index any more",
                        self.name
                    ))
                })?;
                made.maker = None;
                change.images.insert(image.clone(), Some(made));
            }
            if let Some(source) = source {
                self.settle_source(index, source, &mut change);
            }
            change.volumes.insert(
                new.name.clone(),
                Some(Volume {
                    seq,
                    created: unix_now(),
                    size,
                    tags: distinct(new.tags.iter().map(Tag::to_string)),
                    origin: source.map(|source| source.origin.clone()),
                    host: Some(self.me.host.clone()),
                    content,
                }),
            );
            Ok((change, ()))
        })
    }

    /// A snapshot that was taken is needed from now on by more than the process that took it; and by its origin too, as long as that is not
    /// activated.
    fn settle_source(&self, index: &Index, source: &Source, change: &mut Change) {
        let Some(unchanged_since) = source.taken else {
            return;
        };
        if let Some(image) = index.images.get(&source.at.image) {
            let mut image = image.clone();
            if let Some(snapshot) = image.snapshots.get_mut(&source.at.snapshot) {
                snapshot.maker = None;
            }
            change.images.insert(source.at.image.clone(), Some(image));
        }
        let Some(origin) = source
            .origin
            .name
            .parse()
            .ok()
            .and_then(|name: LvName| Some((index.volumes.get(&name)?.clone(), name)))
        else {
            return;
        };
        let (mut volume, name) = origin;
        if let Content::Own {
            image,
            same,
            active,
            live: false,
        } = &mut volume.content
            && *image == source.at.image
            && unchanged_since == Some(*active)
            && volume.size == source.size
        {
            *same = Some(source.at.snapshot.clone());
            change.volumes.insert(name, Some(volume));
        }
    }

    /// A snapshot that holds what `origin` holds now, for the volume `new`: one that there is, or one that is taken.
    fn source(&self, origin: &LvName, new: &LvName) -> Result<Source, StoreError> {
        let volume = self.volume(origin)?;
        let from = |volume: &Volume| Origin {
            name: origin.to_string(),
            seq: volume.seq,
        };
        if let Some(at) = volume.content.snapshot() {
            return Ok(Source {
                at,
                origin: from(&volume),
                size: volume.size,
                taken: None,
            });
        }
        let image = volume.content.image().to_owned();
        // How long that takes a job decides.
        let frozen = self.freeze(origin, &image)?;
        let (source, name) = self.change(|index| {
            let volume = self.get(index, origin)?;
            if index.volumes.contains_key(new) {
                return Err(StoreError::Exists(new.clone()));
            }
            let (
                Content::Own {
                    image: now,
                    active,
                    live,
                    ..
                },
                Some(found),
            ) = (&volume.content, index.images.get(&image))
            else {
                return Err(StoreError::NotFound(origin.clone()));
            };
            if *now != image {
                return Err(StoreError::NotFound(origin.clone()));
            }
            let name = index.fresh_name(new);
            let mut found = found.clone();
            found.snapshots.insert(
                name.clone(),
                Snapshot {
                    at: index.generation + 1,
                    maker: Some(self.me.clone()),
                },
            );
            let mut change = Change::default();
            change.images.insert(image.clone(), Some(found));
            let source = Source {
                at: SnapshotOf {
                    image: image.clone(),
                    snapshot: name.clone(),
                },
                origin: from(volume),
                size: volume.size,
                taken: Some((!live).then_some(*active)),
            };
            Ok((change, (source, name)))
        })?;
        let taken = self
            .pool
            .image(&image)
            .and_then(|image| image.snapshot(&name));
        drop(frozen);
        if let Err(error) = taken {
            self.give_up(&image, Some(&name));
            return Err(self.failed(&error));
        }
        Ok(source)
    }

    /// Writes to the image what was written to its device so far, and freezes its file system where that is in use.
    fn freeze(&self, lv: &LvName, image: &str) -> Result<Option<Frozen>, StoreError> {
        let device = self.kernel.device(image);
        let Some(device) = device.map_err(|error| self.io("looking for", image, error))? else {
            return Ok(None);
        };
        let what = |error| self.io("writing to", image, error);
        let Some(fs) = device.mounted() else {
            device.flush().map_err(what)?;
            return Ok(None);
        };
        let mounted = match Mounted::device(&device.path(), fs) {
            Ok(mounted) => mounted,
            // Unmounted in the meantime.
            Err(_) if device.mounted().is_none() => {
                device.flush().map_err(what)?;
                return Ok(None);
            }
            Err(error) => return Err(self.io("freezing", image, error.into())),
        };
        // All of it now: little is written while it is frozen.
        mounted.sync().map_err(what)?;
        Frozen::new(&mounted, lv, None).map(Some)
    }

    /// Thaws what a process left frozen that was killed.
    fn thaw(&self) {
        let devices = match self.kernel.devices() {
            Ok(devices) => devices,
            Err(error) => {
                warn!(%error, "whether anything is frozen is not known");
                return;
            }
        };
        for (image, device) in devices {
            let mounted = device
                .mounted()
                .map(|fs| Mounted::device(&device.path(), fs));
            match mounted {
                Some(Ok(mounted)) => freeze::thaw(&mounted),
                Some(Err(error)) => warn!(image, %error, "whether it is frozen is not known"),
                None => {}
            }
        }
    }

    /// The device of an image, mapped where it is not.
    fn map(&self, image: &str) -> Result<PathBuf, StoreError> {
        let path = self.run.join(LOCK);
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .and_then(|file| Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e.into()))
            .map_err(io_failed("locking", &path))?;
        let mapped = match self.kernel.device(image) {
            Ok(Some(device)) => Ok(device),
            Ok(None) => self.kernel.map(self.pool.cluster(), image),
            Err(error) => Err(error),
        };
        drop(lock);
        mapped
            .map(|device| device.path())
            .map_err(|error| self.io("mapping", image, error))
    }

    /// Has the device of an image go, where it has one.
    fn unmap(&self, lv: &LvName, image: &str) -> Result<(), StoreError> {
        let device = self.kernel.device(image);
        let unmapped = device.and_then(|device| match device {
            Some(device) if device.mounted().is_some() => Ok(false),
            Some(device) => self.kernel.unmap(&device),
            None => Ok(true),
        });
        match unmapped {
            Ok(true) => Ok(()),
            Ok(false) => Err(StoreError::Busy(lv.clone())),
            Err(error) => Err(self.io("unmapping", image, error)),
        }
    }

    /// The image of a volume, which becomes one where it is a snapshot. With `live`, its content may change from now on.
    fn own_image(&self, lv: &LvName, live: bool) -> Result<String, StoreError> {
        loop {
            let volume = self.volume(lv)?;
            match &volume.content {
                Content::Own {
                    image,
                    same,
                    live: is_live,
                    ..
                } => {
                    if !live || (*is_live && same.is_none()) {
                        return Ok(image.clone());
                    }
                    let mine = self.change(|index| {
                        let mut volume = self.get(index, lv)?.clone();
                        let mut change = Change::default();
                        let Content::Own {
                            image: now,
                            same,
                            active,
                            live,
                        } = &mut volume.content
                        else {
                            return Ok((change, false));
                        };
                        let mine = now == image;
                        (*same, *active, *live) = (None, index.generation + 1, true);
                        change.volumes.insert(lv.clone(), Some(volume));
                        Ok((change, mine))
                    })?;
                    if mine {
                        return Ok(image.clone());
                    }
                }
                Content::At(at) => {
                    let image = self.make_image(lv, Some(at), volume.size)?;
                    let taken = self.change(|index| {
                        let mut change = Change::default();
                        let (Some(volume), Some(made)) =
                            (index.volumes.get(lv), index.images.get(&image))
                        else {
                            return Ok((change, false));
                        };
                        if volume.content != Content::At(at.clone()) {
                            return Ok((change, false));
                        }
                        let (mut volume, mut made) = (volume.clone(), made.clone());
                        made.maker = None;
                        volume.content = Content::Own {
                            image: image.clone(),
                            same: None,
                            active: if live { index.generation + 1 } else { 0 },
                            live,
                        };
                        change.images.insert(image.clone(), Some(made));
                        change.volumes.insert(lv.clone(), Some(volume));
                        Ok((change, true))
                    });
                    match taken {
                        Ok(true) => return Ok(image),
                        Ok(false) => self.give_up(&image, None),
                        Err(error) => {
                            self.give_up(&image, None);
                            return Err(error);
                        }
                    }
                }
            }
        }
    }

    /// Makes the device of a new volume, or has there be no such volume.
    fn ready(&self, new: &NewLv, content: &Content) -> Result<Option<PathBuf>, StoreError> {
        if !new.active {
            return Ok(None);
        }
        match self.map(content.image()) {
            Ok(path) => Ok(Some(path)),
            Err(error) => {
                if let Err(error) = self.take_away(&new.name) {
                    warn!(lv = %new.name, %error, "a volume that could not be made whole is left");
                }
                Err(error)
            }
        }
    }

    /// Takes a volume out of the index, and removes what nothing needs then.
    fn take_away(&self, lv: &LvName) -> Result<(), StoreError> {
        self.change(|index| {
            let mut change = Change::default();
            if index.volumes.contains_key(lv) {
                change.volumes.insert(lv.clone(), None);
            }
            Ok((change, ()))
        })?;
        if let Err(error) = self.collect() {
            // The volume is gone; what it held is tried again.
            warn!(%lv, %error, "what a removed volume held is not freed yet");
        }
        Ok(())
    }

    fn capacity(&self) -> Result<Capacity, StoreError> {
        let answer = self
            .pool
            .cluster()
            .ask(&json!({"prefix": "df", "detail": "detail", "format": "json"}))
            .map_err(|error| self.failed(&error))?;
        capacity(&answer, &self.place.pool).ok_or_else(|| {
            StoreError::Failed(format!(
                "{}: `ceph df` says nothing of pool {}",
                self.name, self.place.pool
            ))
        })
    }

    fn check_room(&self) -> Result<Capacity, StoreError> {
        let capacity = self.capacity()?;
        if capacity.data_size.0 == 0 {
            return Err(StoreError::OutOfService {
                store: self.name.clone(),
                detail:
                    "the cluster does not say how full the pool is: does a manager run (`ceph -s`)?"
                        .to_owned(),
            });
        }
        if capacity.data_percent < capacity.data_limit {
            return Ok(capacity);
        }
        Err(StoreError::Full {
            store: self.name.clone(),
            detail: format!(
                "pool {} is {:.0} % full of {}, and nothing is made from {:.0} % on: remove entries, or give it room (`ceph df detail`)",
                self.place.pool, capacity.data_percent, capacity.data_size, capacity.data_limit
            ),
        })
    }

    /// What a volume takes, counted in whole objects of its image.
    fn usage(&self, index: &Index, volume: &Volume) -> Result<Usage, CephError> {
        let at = match &volume.content {
            Content::Own { .. } => None,
            Content::At(at) => Some(at.snapshot.as_str()),
        };
        let name = volume.content.image();
        let image = index.images.get(name);
        let mut snapshots: Vec<(u64, &str)> = image
            .into_iter()
            .flat_map(|image| &image.snapshots)
            .map(|(name, snapshot)| (snapshot.at, name.as_str()))
            .collect();
        snapshots.sort_unstable();
        let opened = self.pool.look_at(name, at)?;
        let mapped = opened.differs(None, true)?.0;
        let exclusive = match at {
            // Nothing is shared but with its own snapshots, of which the last has the most.
            None => {
                opened
                    .differs(snapshots.last().map(|(_, name)| *name), false)?
                    .0
            }
            Some(at) => {
                let this = volume.content.snapshot();
                let shared = index
                    .volumes
                    .values()
                    .filter(|other| other.content.snapshot() == this)
                    .count()
                    > 1
                    || index.images.values().any(|image| image.parent == this);
                let place = snapshots.iter().position(|(_, name)| *name == at);
                if shared {
                    0
                } else {
                    self.only_at(name, &opened, &snapshots, place.unwrap_or(0))?
                }
            }
        };
        Ok(Usage {
            mapped: Bytes(mapped),
            exclusive: Bytes(exclusive),
        })
    }

    /// What is in the snapshot at `place` and in no later one, nor in the head, nor in the one before.
    fn only_at(
        &self,
        name: &str,
        opened: &Image<'_>,
        snapshots: &[(u64, &str)],
        place: usize,
    ) -> Result<u64, CephError> {
        let before = place.checked_sub(1).map(|place| snapshots[place].1);
        let own = opened.differs(before, false)?.0;
        let next = snapshots.get(place + 1).map(|(_, name)| *name);
        let next = self.pool.look_at(name, next)?;
        let (changed, gone) = next.differs(Some(snapshots[place].1), false)?;
        Ok(own.min(changed + gone))
    }
}

/// How full a pool is, from what `ceph df detail` says.
fn capacity(answer: &[u8], pool: &str) -> Option<Capacity> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let pools = answer["pools"].as_array()?;
    let stats = &pools.iter().find(|found| found["name"] == pool)?["stats"];
    let stored = stats["stored"].as_u64()?;
    let room = stored + stats["max_avail"].as_u64()?;
    let size = match stats["quota_bytes"].as_u64() {
        Some(quota) if quota > 0 => room.min(quota),
        _ => room,
    };
    let percent = if size == 0 {
        0.0
    } else {
        (stored as f64 * 100.0 / size as f64).min(100.0)
    };
    Some(Capacity {
        data_size: Bytes(size),
        data_percent: percent,
        data_limit: LIMIT,
        ..Capacity::default()
    })
}

/// Whether a device is held: see [`Store::hold`].
fn is_held(device: &Device) -> bool {
    File::open(device.path()).is_ok_and(|device| {
        // Shared, as others may be looking too.
        matches!(
            Flock::lock(device, FlockArg::LockSharedNonblock),
            Err((_, Errno::EWOULDBLOCK))
        )
    })
}

impl Store for RbdStore {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn clear_away(&self) -> Result<(), StoreError> {
        self.shared.collect()
    }

    fn list(&self) -> Result<Listing, StoreError> {
        let index = self.shared.view()?;
        let devices = self
            .shared
            .kernel
            .devices()
            .map_err(|error| self.shared.io("looking for devices of", "", error))?;
        let lvs = fleet::seen_by(&index, &self.shared.me.host)
            .map(|(name, volume)| {
                let device = match &volume.content {
                    Content::Own { image, .. } => devices.get(image),
                    Content::At(_) => None,
                };
                let origin = volume.origin.as_ref().and_then(|origin| {
                    let (name, found) = index.volumes.get_key_value(origin.name.as_str())?;
                    (found.seq == origin.seq).then(|| name.clone())
                });
                Lv {
                    name: name.clone(),
                    seq: volume.seq,
                    created: volume.created,
                    size: Bytes(volume.size),
                    tags: volume
                        .tags
                        .iter()
                        .filter_map(|tag| tag.parse().ok())
                        .collect(),
                    origin,
                    device: device.map(|device| device.number),
                    open: device
                        .is_some_and(|device| device.mounted().is_some() || is_held(device)),
                }
            })
            .collect();
        Ok(Listing {
            lvs,
            capacity: self.shared.capacity()?,
        })
    }

    fn room(&self) -> Result<Capacity, StoreError> {
        self.shared.check_room()
    }

    fn usage(&self) -> Result<HashMap<LvName, Usage>, StoreError> {
        let index = self.shared.view()?;
        let mut usages = HashMap::new();
        for (name, volume) in &index.volumes {
            match self.shared.usage(&index, volume) {
                Ok(usage) => _ = usages.insert(name.clone(), usage),
                // Removed in the meantime.
                Err(error) if error.errno == Errno::ENOENT => {}
                Err(error) => return Err(self.shared.failed(&error)),
            }
        }
        Ok(usages)
    }

    fn mapped(&self, lv: &LvName) -> Result<Bytes, StoreError> {
        let volume = self.shared.volume(lv)?;
        let at = match &volume.content {
            Content::Own { .. } => None,
            Content::At(at) => Some(at.snapshot.as_str()),
        };
        let counted = self
            .shared
            .pool
            .look_at(volume.content.image(), at)
            .and_then(|image| image.differs(None, true));
        counted
            .map(|(there, _)| Bytes(there))
            .map_err(|error| self.shared.failed(&error))
    }

    fn snapshot(&self, origin: &LvName, new: &NewLv) -> Result<Option<PathBuf>, StoreError> {
        let shared = &self.shared;
        let index = shared.view()?;
        shared.get(&index, origin)?;
        if index.volumes.contains_key(&new.name) {
            return Err(StoreError::Exists(new.name.clone()));
        }
        shared.check_room()?;
        let source = shared.source(origin, &new.name)?;
        if let Err(error) = shared.keep_shallow(&index, &source.at.image) {
            if source.taken.is_some() {
                shared.give_up(&source.at.image, Some(&source.at.snapshot));
            }
            return Err(error);
        }
        let content = if new.active {
            shared
                .make_image(&new.name, Some(&source.at), source.size)
                .map(|image| Content::Own {
                    image,
                    same: None,
                    active: 0,
                    live: true,
                })
        } else {
            Ok(Content::At(source.at.clone()))
        };
        let made = content.and_then(|content| {
            let appeared = shared.appear(new, source.size, Some(&source), &content);
            if let (Err(_), Content::Own { image, .. }) = (&appeared, &content) {
                shared.give_up(image, None);
            }
            appeared.map(|()| content)
        });
        match made {
            Ok(content) => shared.ready(new, &content),
            Err(error) => {
                if source.taken.is_some() {
                    shared.give_up(&source.at.image, Some(&source.at.snapshot));
                }
                Err(error)
            }
        }
    }

    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError> {
        let shared = &self.shared;
        if shared.view()?.volumes.contains_key(&new.name) {
            return Err(StoreError::Exists(new.name.clone()));
        }
        shared.check_room()?;
        let size = size.round_up(GRAIN).0;
        let image = shared.make_image(&new.name, None, size)?;
        let content = Content::Own {
            image,
            same: None,
            active: 0,
            live: new.active,
        };
        if let Err(error) = shared.appear(new, size, None, &content) {
            shared.give_up(content.image(), None);
            return Err(error);
        }
        shared.ready(new, &content)
    }

    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError> {
        self.shared.change(|index| {
            let mut volume = self.shared.get(index, lv)?.clone();
            let before = volume.tags.clone();
            volume
                .tags
                .retain(|tag| del.iter().all(|del| del.as_str() != tag));
            volume.tags.extend(add.iter().map(Tag::to_string));
            volume.tags = distinct(volume.tags);
            if add.iter().any(|tag| tag.as_str() == DOOMED) {
                // The host that dooms an entry has it to remove.
                volume.host = Some(self.shared.me.host.clone());
            }
            let mut change = Change::default();
            if volume.tags != before {
                change.volumes.insert(lv.clone(), Some(volume));
            }
            Ok((change, ()))
        })
    }

    fn remove(&self, lv: &LvName) -> Result<(), StoreError> {
        let volume = match self.shared.volume(lv) {
            Err(StoreError::NotFound(_)) => return Ok(()),
            volume => volume?,
        };
        if let Content::Own { image, .. } = &volume.content {
            self.shared.unmap(lv, image)?;
        }
        self.shared.take_away(lv)
    }

    fn grow(&self, lv: &LvName, size: Bytes) -> Result<(), StoreError> {
        let shared = &self.shared;
        let size = size.round_up(GRAIN).0;
        if size > shared.volume(lv)?.size {
            let image = shared.own_image(lv, false)?;
            let resized = shared.pool.image(&image).and_then(|opened| {
                // Where another process was quicker it may be longer by now.
                if size > opened.size()? {
                    opened.resize(size)
                } else {
                    Ok(())
                }
            });
            resized.map_err(|error| shared.failed(&error))?;
            shared.change(|index| {
                let mut volume = self.shared.get(index, lv)?.clone();
                let mut change = Change::default();
                if volume.size < size {
                    volume.size = size;
                    if let Content::Own { same, .. } = &mut volume.content {
                        *same = None;
                    }
                    change.volumes.insert(lv.clone(), Some(volume));
                }
                Ok((change, ()))
            })?;
        }
        // Also where a crash came between the two.
        let volume = shared.volume(lv)?;
        let image = volume.content.image();
        let refreshed = match (&volume.content, shared.kernel.device(image)) {
            (Content::Own { .. }, Ok(Some(device))) => device.refresh(),
            (_, Err(error)) => Err(error),
            _ => Ok(()),
        };
        refreshed.map_err(|error| shared.io("growing", image, error))
    }

    fn activate(&self, lv: &LvName) -> Result<PathBuf, StoreError> {
        let image = self.shared.own_image(lv, true)?;
        self.shared.map(&image)
    }

    fn deactivate(&self, lv: &LvName) -> Result<(), StoreError> {
        let volume = self.shared.volume(lv)?;
        let Content::Own { image, live, .. } = &volume.content else {
            return Ok(());
        };
        self.shared.unmap(lv, image)?;
        if !live {
            return Ok(());
        }
        self.shared.change(|index| {
            let mut volume = self.shared.get(index, lv)?.clone();
            let mut change = Change::default();
            if let Content::Own { live, .. } = &mut volume.content
                && *live
            {
                *live = false;
                change.volumes.insert(lv.clone(), Some(volume));
            }
            Ok((change, ()))
        })
    }

    fn hold(&self, lv: &LvName) -> Result<File, StoreError> {
        let device = self.activate(lv)?;
        let file = File::open(&device).map_err(io_failed("opening", &device))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| io_failed("locking", &device)(error.into()))?;
        Ok(file)
    }

    fn watch(&self) -> Watch {
        Watch {
            dir: self.shared.run.clone(),
            file: Some(SEEN.to_owned()),
        }
    }
}

/// Each tag once, where it first was.
fn distinct(tags: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    tags.into_iter()
        .filter(|tag| seen.insert(tag.clone()))
        .collect()
}

fn unix_now() -> u64 {
    SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_secs())
}

/// The error that doing something to a path gave.
fn io_failed(doing: &str, to: &Path) -> impl Fn(io::Error) -> StoreError + use<> {
    let what = format!("{doing} {}", to.display());
    move |source| StoreError::Io {
        what: what.clone(),
        source,
    }
}
