// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stores hand out block devices and hold tags; all else is shared.
//!
//! There are three, and one body of tests for all (`tests/system/store.rs`):
//! [`lvm`], a thin pool in a volume group; [`reflink`], image files on XFS
//! or btrfs with loop devices, for hosts without device-mapper; and [`rbd`], images in a Ceph pool, which several
//! hosts share ([`hosts`]). A fourth one, in memory, is held to the same and there for tests alone.
//!
//! A file system in use stands still while it is copied: `freeze`, for all.

mod devmapper;
mod freeze;
pub mod hosts;
pub mod lvm;
#[cfg(any(test, feature = "failpoints"))]
pub mod memory;
pub mod rbd;
pub mod reflink;

use std::collections::{BTreeSet, HashMap};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::cache::evict::{Fill, Space};
use crate::cache::names::{LvName, Tag};
use crate::cache::record::after_tag;
use crate::cache::tags::DOOMED;
use crate::cache::units::Bytes;
use crate::exec::ExecError;
use hosts::{Fleet, Lost};

/// One logical volume in the store, ours or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lv {
    /// Its name, unique in the store.
    pub name: LvName,
    /// Grows with each volume made in this store, whatever the clock says: the
    /// thin device id in LVM (one more than the highest in the pool), a
    /// counter in the reflink store.
    pub seq: u64,
    /// When it was made, in seconds since 1970, for people to read.
    pub created: u64,
    /// Virtual size.
    pub size: Bytes,
    /// Its tags, as the store has them.
    pub tags: Vec<Tag>,
    /// What it was made a snapshot of, as long as that is there.
    pub origin: Option<LvName>,
    /// The device's number `(major, minor)` while it is active.
    pub device: Option<(u32, u32)>,
    /// Somebody has the device open: mounted, mostly.
    pub open: bool,
}

/// What the store holds, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// Every volume of the pool (other pools and plain volumes are not looked at).
    pub lvs: Vec<Lv>,
    /// How full it is.
    pub capacity: Capacity,
}

impl Listing {
    /// The tag that makes `lv`, an entry that is published now, newer than all that was made since it was; `None`: nothing
    /// was.
    #[must_use]
    pub fn published_after(&self, lv: &LvName) -> Option<Tag> {
        let own = self.lvs.iter().find(|other| other.name == *lv)?.seq;
        let highest = self.lvs.iter().map(|other| other.seq).max()?;
        (highest > own).then(|| after_tag(highest))
    }
}

/// How full a store is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Capacity {
    /// Bytes that data can take, in all.
    pub data_size: Bytes,
    /// Share of them in use, 0 to 100.
    pub data_percent: f64,
    /// Share in use from which on no volume is made.
    pub data_limit: f64,
    /// Bytes that the pool's own metadata can take; 0 where there is none.
    pub metadata_size: Bytes,
    /// Share of them in use, 0 to 100.
    pub metadata_percent: f64,
    /// Share in use from which on no volume is made.
    pub metadata_limit: f64,
    /// Bytes that the description of all volumes can take, names and tags, where that has
    /// a fixed size (a volume group's metadata area); 0 where it has not.
    pub group_size: Bytes,
    /// Share of them in use, 0 to 100. What it refuses is told by a volume's own size.
    pub group_percent: f64,
}

impl Capacity {
    /// The same, as the policy of eviction looks at it.
    #[must_use]
    pub const fn fill(&self) -> Fill {
        const fn space(size: Bytes, percent: f64, limit: f64) -> Space {
            Space {
                size,
                percent,
                limit,
            }
        }
        Fill {
            data: space(self.data_size, self.data_percent, self.data_limit),
            metadata: space(
                self.metadata_size,
                self.metadata_percent,
                self.metadata_limit,
            ),
            group: space(self.group_size, self.group_percent, GROUP_LIMIT),
        }
    }
}

/// Share in use of what describes the volumes above which entries are evicted in any case: what
/// is left of the smallest area that LVM makes is enough for one more volume with tags of the usual length.
const GROUP_LIMIT: f64 = 95.0;

/// How much of the pool one volume takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes mapped by it, shared ones included.
    pub mapped: Bytes,
    /// Bytes that only it maps: what removing it gives back.
    pub exclusive: Bytes,
}

/// A volume to be made.
#[derive(Debug, Clone)]
pub struct NewLv {
    /// Its name.
    pub name: LvName,
    /// All its tags: they are there from the first moment on.
    pub tags: Vec<Tag>,
    /// Whether its device is wanted. Never at boot: activation is ours alone.
    pub active: bool,
}

/// Where changes made by others show: a directory to watch with inotify.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The directory.
    pub dir: PathBuf,
    /// The only file name in it that matters; `None`: all do.
    pub file: Option<String>,
}

/// Something is wrong with a store, or may come to be, that no listing shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What.
    pub finding: String,
    /// What to do about it, a command mostly.
    pub fix: String,
}

/// Tags as a store keeps them, of which some are added and some deleted: each once, where it first was.
fn retagged(tags: &[String], add: &[Tag], del: &[Tag]) -> Vec<String> {
    let kept = tags
        .iter()
        .filter(|tag| del.iter().all(|del| del.as_str() != *tag));
    let mut seen = BTreeSet::new();
    kept.cloned()
        .chain(add.iter().map(Tag::to_string))
        .filter(|tag| seen.insert(tag.clone()))
        .collect()
}

/// Commits that a volume is to be removed: it is out of every choice then, and whatever becomes of its removal, the next daemon
/// finds it. `false`: there is no room for that mark; what nothing uses can be removed all the same. What is not there any more
/// needs none.
///
/// # Errors
/// What else the store says.
pub fn doom<S: Store + ?Sized>(store: &S, lv: &LvName) -> Result<bool, StoreError> {
    let doomed = DOOMED.parse().expect("is a tag");
    match store.change_tags(lv, &[doomed], &[]) {
        Ok(()) | Err(StoreError::NotFound(_)) => Ok(true),
        Err(StoreError::Full { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A store's operation did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such volume, as a fresh listing showed.
    #[error("{0}: there is no such logical volume")]
    NotFound(LvName),
    /// The volume is in use: mounted or held open.
    #[error("{0}: in use")]
    Busy(LvName),
    /// Its file system is in use and could not be frozen for the moment of a snapshot.
    #[error("{lv}: its file system could not be frozen: {why}")]
    Unfreezable {
        /// The volume.
        lv: LvName,
        /// What kept it from that.
        why: String,
    },
    /// A volume of that name is there already.
    #[error("{0}: a logical volume of that name exists")]
    Exists(LvName),
    /// No room: for data, for the pool's metadata, or for the group's.
    #[error("{store} is full: {detail}")]
    Full {
        /// Which store.
        store: String,
        /// Which bound, how full, and what to do.
        detail: String,
    },
    /// The store did not answer in time: locked by another command, or stuck.
    #[error(
        "{store} did not answer within {seconds} s: locked by another command, or its disk is stuck"
    )]
    Timeout {
        /// Which store.
        store: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The store is not there or cannot be used: not prepared, no such group.
    #[error("{0}")]
    Unusable(String),
    /// It is there, but takes no writes until it is repaired: a thin pool that has failed, is read-only, or needs a check.
    #[error("{store} is out of service: {detail}")]
    OutOfService {
        /// Which store.
        store: String,
        /// What is wrong, and which command helps.
        detail: String,
    },
    /// It takes no changes from this process any more, whatever is tried: another host took this one for lost. What
    /// the leases of this host wrote is gone.
    #[error("{store} has shut this host out: {detail}")]
    ShutOut {
        /// Which store.
        store: String,
        /// Why, and what to do.
        detail: String,
    },
    /// A command of the store failed.
    #[error("{0}")]
    Failed(String),
    /// A tool failed.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to what.
        what: String,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// A place for thin volumes with tags.
///
/// Every call blocks, is safe to make from several threads at once, and is all
/// or nothing over `kill -9` and a power cut: a volume is there with all its
/// tags or not at all. Removals never hold up the other calls for longer than
/// one removal takes.
pub trait Store: Send + Sync + 'static {
    /// What it is called in messages and in the job protocol's `VG LV` line.
    fn name(&self) -> &str;

    /// Everything in the store, and how full it is. A change that was asked for before, and failed or was not answered in
    /// time, shows in it, or is never made.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn list(&self) -> Result<Listing, StoreError>;

    /// This host's id, where hosts share the store. From memory.
    fn host(&self) -> Option<&str> {
        None
    }

    /// What this host had when another one took it for lost, until [`Store::forget_lost`].
    ///
    /// # Errors
    /// When the store cannot be read.
    fn lost(&self) -> Result<Vec<Lost>, StoreError> {
        Ok(Vec::new())
    }

    /// Forgets what [`Store::lost`] gave: a later daemon need not know of it.
    ///
    /// # Errors
    /// When the store cannot be changed.
    fn forget_lost(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Thaws file systems that an earlier daemon of this host's froze and was killed. For a daemon that starts: beside one that runs
    /// it would thaw what that has frozen for a copy.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn thaw(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// The hosts that share it, and what each of them has. For views and evictions; `None`: it is one host's alone.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn fleet(&self) -> Result<Option<Fleet>, StoreError> {
        Ok(None)
    }

    /// Takes the turn to evict entries, which one host has at a time. `false`: another one has it.
    ///
    /// # Errors
    /// When the store cannot be read or changed.
    fn begin_evicting(&self) -> Result<bool, StoreError> {
        Ok(true)
    }

    /// As [`doom`], for an entry that is evicted: within one's turn.
    ///
    /// # Errors
    /// Where the turn has passed to another host, [`StoreError::Busy`] where another host has pinned the entry, and as [`doom`].
    fn evict(&self, lv: &LvName) -> Result<bool, StoreError> {
        doom(self, lv)
    }

    /// Ends one's turn to evict.
    fn end_evicting(&self) {}

    /// What makes it slower here than it could be, if it has met anything of the kind.
    fn drawback(&self) -> Option<String> {
        None
    }

    /// What is wrong with it beside. Slow, and for people.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn troubles(&self) -> Result<Vec<Trouble>, StoreError> {
        Ok(Vec::new())
    }

    /// Removes what commands that were killed left of ours and no listing shows. Changes nothing where there is none;
    /// a daemon calls it once it serves.
    ///
    /// # Errors
    /// What kept it from that; nothing is lost by it.
    fn clear_away(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Has all changes of tags that were answered so far outlast a power cut. New volumes do without.
    ///
    /// # Errors
    /// When a disk cannot be written to.
    fn persist(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// How full it is, as far as that changes without a change to the volumes. So cheap that
    /// it may be asked for each lease.
    ///
    /// # Errors
    /// [`StoreError::Full`] where no volume would be made: a write that finds no room is an
    /// I/O error to whoever has written before. [`StoreError::OutOfService`] where all writes are.
    fn room(&self) -> Result<Capacity, StoreError>;

    /// How late what it says of its room may be: what a removal gives back shows by then.
    fn lag(&self) -> Duration {
        Duration::ZERO
    }

    /// What each volume takes, active or not. Slower than [`Store::list`], and
    /// for people: nothing is decided by it.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn usage(&self) -> Result<HashMap<LvName, Usage>, StoreError>;

    /// Bytes mapped by an active volume, shared ones included. Cheap enough to be asked for each lease.
    ///
    /// # Errors
    /// When it cannot be told.
    fn mapped(&self, lv: &LvName) -> Result<Bytes, StoreError> {
        let usage = self.usage()?.remove(lv);
        usage
            .map(|usage| usage.mapped)
            .ok_or_else(|| StoreError::NotFound(lv.clone()))
    }

    /// Makes `new` a snapshot of `origin`, of the same virtual size, and gives
    /// the path of its block device if `new.active`. Where `origin` is mounted, its file system is frozen for that
    /// moment, within seconds; no other call waits for that.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when `origin` is gone, [`StoreError::Exists`],
    /// [`StoreError::Full`], [`StoreError::Unfreezable`], or what else failed.
    fn snapshot(&self, origin: &LvName, new: &NewLv) -> Result<Option<PathBuf>, StoreError>;

    /// Makes `new` an empty volume of `size` bytes (rounded up to the store's grain).
    ///
    /// # Errors
    /// As [`Store::snapshot`].
    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError>;

    /// Adds and deletes tags in one commit. Adding one that is there or
    /// deleting one that is not is no error.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what else failed.
    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError>;

    /// Removes a volume and deactivates its device. Removing what is not there
    /// is no error.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while it is in use.
    fn remove(&self, lv: &LvName) -> Result<(), StoreError>;

    /// Grows a volume, active or not, to at least `size`; never shrinks one.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Full`], or what else failed.
    fn grow(&self, lv: &LvName, size: Bytes) -> Result<(), StoreError>;

    /// Makes the volume's block device appear (once; nothing comes up by itself
    /// at boot) and returns its path. Activating an active one is no error.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what else failed.
    fn activate(&self, lv: &LvName) -> Result<PathBuf, StoreError>;

    /// Makes the block device disappear. Deactivating an inactive one is no error.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while it is in use.
    fn deactivate(&self, lv: &LvName) -> Result<(), StoreError>;

    /// Has listings show an active volume as [`Lv::open`] until what this gives is dropped, or the process ends.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn hold(&self, lv: &LvName) -> Result<File, StoreError> {
        let device = self.activate(lv)?;
        File::open(&device).map_err(|source| StoreError::Io {
            what: format!("opening {}", device.display()),
            source,
        })
    }

    /// Where changes made by others show.
    fn watch(&self) -> Watch;

    /// Takes no more calls, and waits until `until` for what is being done, by tools above all, to end. `false`: it goes
    /// on by itself, and whichever daemon comes next waits for it as for anybody's.
    fn close(&self, _until: Instant) -> bool {
        true
    }
}

/// How often a lock is tried that another process has.
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// Waits for a file's lock until `deadline` at most; `None`: another process had it till then.
fn lock_until(mut file: File, deadline: Instant) -> io::Result<Option<Flock<File>>> {
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= deadline => return Ok(None),
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err((_, error)) => return Err(error.into()),
        }
        thread::sleep(LOCK_RETRY);
    }
}

/// Makes a directory of a store's own in the runtime directory, for root alone, and gives its path. The runtime directory is for others
/// too: the plugin's socket will be there.
fn private_dir(run_dir: &Path, name: &str) -> io::Result<PathBuf> {
    let dir = run_dir.join(name);
    for (dir, mode) in [(run_dir, 0o755), (&dir, 0o700)] {
        DirBuilder::new().recursive(true).mode(mode).create(dir)?;
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Whichever store comes first there: others than root go by it to the plugin's socket.
    #[test]
    fn a_private_dir() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let private = private_dir(&run, "store").unwrap();
        assert_eq!(private_dir(&run, "store").unwrap(), private);
        let mode = |dir: &Path| fs::metadata(dir).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&run), mode(&private)), (0o755, 0o700));
    }
}
