// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volumes as images in a Ceph pool, mapped by the kernel: the same entries on every host of a fleet.
//!
//! What there is, and every tag, is in one object beside the images (see [`index`]), so a listing is one read, and all tags of
//! a volume change in one step. Images, snapshots and clones are made by Ceph's own library ([`ceph`]), devices by the kernel
//! (`kernel`).
//!
//! An inactive snapshot is no image of its own: only once it is activated it becomes a clone. So publishing costs
//! one snapshot, whatever it holds, and copies of an entry cost none.
//!
//! With the cluster away every call fails in bounded time ([`ceph::PATIENCE`] for each message) but for I/O on devices, which
//! waits as long as it takes.

pub mod ceph;
mod change;
mod devices;
pub mod fleet;
mod hosts;
mod images;
pub mod index;
mod kernel;
mod report;
mod room;
mod turn;
mod volumes;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::FlockOperation;

use self::ceph::{CephError, Cluster, ConnectError, Pool};
use self::fleet::{Beat, Evictor, Observer};
pub use self::hosts::machine_id;
use self::index::{Change, Content, GENERATION, Index, Maker, Volume};
use self::kernel::Kernel;
pub use self::report::Report;
use self::volumes::as_listed;
use crate::cache::names::{LvName, Tag};
use crate::cache::spec::FsType;
use crate::cache::tags::{DEFAULT, DOOMED, MAKING, PIN, SNAPSHOT};
use crate::cache::units::Bytes;
use crate::storage::hosts::{Fleet, Host, HostLv, Lost};
use crate::storage::{Capacity, Listing, NewLv, Store, StoreError, Usage, Watch, private_dir};
use crate::text::unix_now;

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
/// fail.
const LIMIT: f64 = 90.0;

/// How late `ceph df` is at most: OSDs report to the manager every 5 seconds (`mgr_stats_period`), and that to the monitors every
/// 2 (`mgr_tick_period`). Ceph's own tests wait 12.
const LAG: Duration = Duration::from_secs(15);

/// How often a copy is begun anew whose beginning others removed.
const ATTEMPTS: usize = 5;

/// From how many parents on an image that is cloned is made free of them, in the background. The kernel opens 16 at most
/// (`RBD_MAX_PARENT_CHAIN_LEN`, drivers/block/rbd.c), and each one with every map: benches/rbd.rs has what that costs. ceph-csi
/// begins at 4 too (`--rbdsoftmaxclonedepth`).
const DEEP: usize = 4;
/// From how many on it is not cloned before that.
const TOO_DEEP: usize = 14;

/// The kernel reads so many snapshots of an image, and does not map one that has more, nor write to it
/// (`RBD_MAX_SNAP_COUNT`, drivers/block/rbd.c).
const MOST_SNAPSHOTS: usize = 510;
/// While it is mounted so many are taken of one: the end of what uses it has some left.
const MOST_WHILE_MOUNTED: usize = 500;
/// From how many on a volume gets another image when it is activated next.
const MANY_SNAPSHOTS: usize = 250;

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

    /// The command that grants the user what suffices.
    fn grant(&self) -> String {
        let namespace = if self.namespace.is_empty() {
            String::new()
        } else {
            format!(" namespace={}", self.namespace)
        };
        format!(
            "ceph auth caps client.{} mon 'profile rbd' osd 'profile rbd pool={}{namespace}'",
            self.user, self.pool
        )
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
    /// The thread that does so by itself.
    collector: OnceLock<Thread>,
    /// It has something to remove that this process gave up.
    gave_up: AtomicBool,
    /// How many operations were begun, and those that have not ended: see [`Maker`].
    operations: AtomicU64,
    making: Mutex<BTreeSet<String>>,
    /// This host's key, once it has joined.
    beat: Mutex<Option<Beat>>,
    /// What this process has seen of other hosts.
    observer: Mutex<Observer>,
    /// Its turn to evict.
    turn: Mutex<Option<Evictor>>,
    /// Images may be mapped on this host that are none of its volumes.
    strays: AtomicBool,
    /// How full the pool was, and when that was asked.
    capacity: Mutex<Option<(Instant, Capacity)>>,
    /// No other machine has this host's id, as far as a process that has not joined can tell.
    is_ours: AtomicBool,
    /// Images that are being copied from their parents by this process.
    flattening: Mutex<BTreeSet<String>>,
    /// Which processes of this host live is told by who holds its file.
    _alive: Flock<File>,
}

/// Prepares a namespace and its base, an empty XFS of `base_size`: once, and again without any change. `host` is
/// this host's id, `run_dir` where this host's runtime files are; `say` is told what is made.
///
/// # Errors
/// [`StoreError::Unusable`] where the pool is not there, the namespace neither and the user may not make it, or the cluster, the
/// kernel or the user's rights do not suffice, by name; or what else failed.
pub fn init(
    place: &Place,
    host: &str,
    run_dir: &Path,
    base_size: Bytes,
    say: &mut dyn FnMut(String),
) -> Result<RbdStore, StoreError> {
    let store = RbdStore::at(place, host, run_dir, Some(&mut *say))?;
    report::check_cluster(store.shared.pool.cluster())
        .map_err(|why| StoreError::Unusable(format!("{}: {why}", store.shared.name)))?;
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
    } else {
        say(format!(
            "made the base {}/{}, an empty XFS of {base_size}",
            store.shared.name, base.name
        ));
    }
    store.shared.start();
    Ok(store)
}

impl RbdStore {
    /// Opens a namespace that [`init`] prepared.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] where it is not prepared, or the cluster cannot be reached.
    pub fn open(place: &Place, host: &str, run_dir: &Path) -> Result<Self, StoreError> {
        let store = Self::at(place, host, run_dir, None)?;
        if store.shared.view()?.generation == 0 {
            return Err(StoreError::Unusable(format!(
                "{} is not prepared as a store: run: lvm-cache-friend init --rbd {0}",
                store.shared.name
            )));
        }
        store.shared.start();
        Ok(store)
    }

    /// Connects. With `say`, which is told of it, a namespace that is not there is made.
    fn at(
        place: &Place,
        host: &str,
        run_dir: &Path,
        say: Option<&mut dyn FnMut(String)>,
    ) -> Result<Self, StoreError> {
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
                "{name}: {error}. What client.{} has to be allowed, an administrator of the cluster grants: {}",
                place.user,
                place.grant(),
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
            match say {
                Some(say) if pool.create_namespace(&place.namespace).is_ok() => {
                    say(format!("made namespace {name}"));
                }
                _ => {
                    return Err(StoreError::Unusable(format!(
                        "{name}: there is no such namespace; an administrator of the cluster makes it: rbd namespace create {name}"
                    )));
                }
            }
        }
        // That the user may read here, at all.
        pool.keys(INDEX, &[GENERATION]).map_err(refused)?;
        let kernel = Kernel::new(&cluster, &place.user, &place.pool, &place.namespace)
            .map_err(|error| unusable(&error))?;
        let run = private_dir(run_dir, RUN).map_err(io_failed("making a directory in", run_dir))?;
        let failed = |what: &str| io_failed(what, &run);
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
                collector: OnceLock::new(),
                gave_up: AtomicBool::new(false),
                operations: AtomicU64::new(0),
                making: Mutex::default(),
                beat: Mutex::default(),
                observer: Mutex::default(),
                turn: Mutex::default(),
                strays: AtomicBool::new(true),
                capacity: Mutex::default(),
                is_ours: AtomicBool::new(false),
                flattening: Mutex::default(),
                _alive: alive,
            }),
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_file(process_file(&self.run, &self.me.process));
        // It sees that the store is closed.
        self.wake_collector();
    }
}

fn process_file(run: &Path, process: &str) -> PathBuf {
    run.join(format!("process.{process}"))
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
        let devices = self.shared.devices()?;
        let lvs = fleet::seen_by(&index, &self.shared.me.host)
            .map(|(name, volume)| as_listed(&index, &devices, name, volume))
            .collect();
        Ok(Listing {
            lvs,
            capacity: self.shared.capacity()?,
        })
    }

    fn host(&self) -> Option<&str> {
        Some(&self.shared.me.host)
    }

    fn lost(&self) -> Result<Vec<Lost>, StoreError> {
        let me = &self.shared.me.host;
        let keys = self.shared.keys(&[&fleet::left_key(me)])?;
        Ok(fleet::left(&keys, me))
    }

    fn forget_lost(&self) -> Result<(), StoreError> {
        self.shared.forget_lost()
    }

    fn thaw(&self) -> Result<(), StoreError> {
        self.shared.thaw()
    }

    fn fleet(&self) -> Result<Option<Fleet>, StoreError> {
        let me = &self.shared.me.host;
        let index = self.shared.view()?;
        let devices = self.shared.devices()?;
        let hosts = fleet::hosts(&self.shared.host_keys()?);
        let lvs = index.volumes.iter().map(|(name, volume)| {
            let mut lv = as_listed(&index, &devices, name, volume);
            if !fleet::is_seen_by(volume, me) {
                let live = |content: &Content| matches!(content, Content::Own { live: true, .. });
                (lv.device, lv.open) = (None, live(&volume.content));
            }
            let host = volume.host.clone();
            HostLv { host, lv }
        });
        Ok(Some(Fleet {
            me: me.clone(),
            hosts: hosts
                .into_iter()
                .map(|(id, beat)| Host {
                    id,
                    lost: beat.lost,
                })
                .collect(),
            lvs: lvs.collect(),
        }))
    }

    fn begin_evicting(&self) -> Result<bool, StoreError> {
        self.shared.take_turn()
    }

    fn evict(&self, lv: &LvName) -> Result<bool, StoreError> {
        let turn = self.shared.held_turn().clone();
        let Some(turn) = turn else {
            return Err(StoreError::Failed(format!(
                "{}: it is not this host's turn to evict",
                self.shared.name
            )));
        };
        let doomed = [DOOMED.parse().expect("is a tag")];
        let work = |index: &Index| {
            // Another host may have pinned it since it was chosen.
            let tags = &self.shared.get(index, lv)?.tags;
            if tags.iter().any(|tag| tag == PIN) {
                return Err(StoreError::Busy(lv.clone()));
            }
            self.shared.tagged(index, lv, &doomed, &[])
        };
        match self.shared.change_in_turn(Some(&turn), work) {
            Ok(()) | Err(StoreError::NotFound(_)) => Ok(true),
            Err(StoreError::Full { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn end_evicting(&self) {
        self.shared.end_turn();
    }

    fn lag(&self) -> Duration {
        LAG
    }

    fn room(&self) -> Result<Capacity, StoreError> {
        // Whether this host is one still.
        self.shared.generation()?;
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
        for _ in 1..ATTEMPTS {
            match self.shared.copy(origin, new) {
                // The snapshot that it was to start from was of volumes that were all removed meanwhile; the origin is there.
                Err(StoreError::NotFound(lv)) if lv == new.name => {}
                done => return done,
            }
        }
        self.shared.copy(origin, new)
    }

    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError> {
        let shared = &self.shared;
        if shared.view()?.volumes.contains_key(&new.name) {
            return Err(StoreError::Exists(new.name.clone()));
        }
        shared.check_room()?;
        let size = size.round_up(GRAIN).0;
        let content = shared.make(|making| {
            let image = shared.make_image(&new.name, None, size, making)?;
            let content = Content::Own {
                image,
                same: None,
                active: 0,
                live: new.active,
            };
            shared.appear(new, size, None, &content, making)?;
            Ok(content)
        })?;
        shared.ready(new, &content)
    }

    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError> {
        let work = |index: &Index| self.shared.tagged(index, lv, add, del);
        self.shared.change(work)
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
            let resized = shared.open_watched(&image).and_then(|opened| {
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
            (Content::Own { .. }, Ok(Some(device))) => device.refresh(ceph::PATIENCE),
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
        self.shared.rest(lv)
    }

    fn hold(&self, lv: &LvName) -> Result<File, StoreError> {
        loop {
            let device = self.activate(lv)?;
            let file = File::open(&device).map_err(io_failed("opening", &device))?;
            rustix::fs::flock(&file, FlockOperation::LockExclusive)
                .map_err(|error| io_failed("locking", &device)(error.into()))?;
            // Before it was open it may have been unmapped, and the kernel gives its number to the next one.
            if self.activate(lv)? == device {
                return Ok(file);
            }
        }
    }

    fn watch(&self) -> Watch {
        Watch {
            dir: self.shared.run.clone(),
            file: Some(SEEN.to_owned()),
        }
    }
}

/// The error that doing something to a path gave.
fn io_failed(doing: &str, to: &Path) -> impl Fn(io::Error) -> StoreError + use<> {
    let what = format!("{doing} {}", to.display());
    move |source| StoreError::Io {
        what: what.clone(),
        source,
    }
}
