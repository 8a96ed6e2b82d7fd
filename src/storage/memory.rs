// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A store in memory, for tests: it keeps what [`Store`] promises, and fails when it is asked to.
//!
//! Each volume's content is a memfd(2), and its device a path that leads to that, for as long as the volume is
//! active. So content can be read and written through the path, copies are independent, and an open device is
//! noticed, as long as this process has it open.
//!
//! What it does not model:
//! - Block devices: nothing can be mounted, the device numbers that it lists are the kernel's for nothing, and
//!   what another process has open is not seen.
//! - Power cuts and restarts of the host: it ends with its last handle.
//! - Sharing: a snapshot is a full copy. [`Store::usage`] counts as shared what two volumes have alike in the same
//!   place, however that came about.
//! - Metadata's room, which never runs out.
//! - Changes by others: all that it holds came through the trait, and [`Store::watch`] tells of that.
//!
//! It can play a fleet: each of several hosts has a handle of its own ([`Memory::of_host`]), and one takes another for lost
//! when a test says so ([`Memory::declare_lost`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;

use super::hosts::{Fleet, Host, HostLv, Lost, is_shared};
use super::{Capacity, Listing, Lv, NewLv, Store, StoreError, Usage, Watch, doom};
use crate::cache::names::{LvName, Tag};
use crate::cache::tags::DOOMED;
use crate::cache::units::Bytes;
use crate::text::unix_now;

/// What sizes are rounded up to, in bytes: an extent of LVM's, as it is by default.
const GRAIN: u64 = 4 * Bytes::MIB;

/// What is compared for [`Store::usage`], in bytes: a chunk of a thin pool.
const CHUNK: u64 = 64 * Bytes::KIB;

/// Share of the data's room in use from which on no volume is made, in percent.
const LIMIT: f64 = 90.0;

/// The major number of its devices. Linux gives block devices none of 512 or more (`BLKDEV_MAJOR_MAX`,
/// linux/blkdev.h), so no mount is ever taken for one of them.
const MAJOR: u32 = 4095;

/// What becomes of a change that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is done, and answered.
    Done,
    /// It is not done, and not answered in time.
    Refused,
    /// It is done, and not answered in time.
    Unanswered,
    /// It is not answered in time, and done after that: before whatever is asked for next and answered, since a
    /// store does one thing after another.
    Late,
}

/// A store in memory. Clones are handles of the same one.
#[derive(Clone)]
pub struct Memory {
    shared: Arc<Shared>,
    /// The host of the fleet that this handle is for; see [`Memory::of_host`].
    host: Option<Arc<str>>,
}

struct Shared {
    /// Has `dev/`, the devices of active volumes, and `changes/`, where changes show.
    dir: PathBuf,
    held: Mutex<Held>,
    /// Notified when `Held::waits` changes.
    listings: Condvar,
}

/// What the store holds.
struct Held {
    volumes: BTreeMap<LvName, Volume>,
    data_size: Bytes,
    /// The number of the newest volume there ever was.
    seq: u64,
    /// The minor number of the newest device there ever was.
    minor: u32,
    full: bool,
    /// How many more calls are not answered, as another command holds the lock.
    locked: usize,
    fates: VecDeque<Fate>,
    /// It is locked after these.
    then_locked: bool,
    /// Each with the host that asked for it.
    late: Vec<(Option<Arc<str>>, Change)>,
    /// The hosts that have joined, and whether each was declared lost since.
    hosts: BTreeMap<Arc<str>, bool>,
    /// What those had, until they know.
    lost: BTreeMap<Arc<str>, Vec<Lost>>,
    /// The host that has the turn to evict.
    evictor: Option<Arc<str>>,
    /// Whether a listing waits, so that it is answered once it is out of date.
    waits: Waits,
}

#[derive(PartialEq, Eq)]
enum Waits {
    No,
    /// The next one will.
    Next,
    /// One is read, and not answered yet.
    Read,
}

struct Volume {
    /// The host that made it, or took it over.
    host: Option<Arc<str>>,
    seq: u64,
    created: u64,
    size: Bytes,
    tags: Vec<Tag>,
    /// The number of what it is a snapshot of.
    origin: Option<u64>,
    content: File,
    /// The minor number of its device.
    device: Option<u32>,
}

/// What changes the store for good.
enum Change {
    Make {
        origin: Option<LvName>,
        size: Bytes,
        new: NewLv,
    },
    Tags {
        lv: LvName,
        add: Vec<Tag>,
        del: Vec<Tag>,
    },
    Remove(LvName),
    Grow(LvName, Bytes),
}

/// For as long as this lives, one listing is read and not answered.
pub struct HeldListing<'a>(&'a Memory);

impl HeldListing<'_> {
    /// Waits until that listing is read.
    pub fn wait_until_read(&self) {
        let held = self.0.held();
        let waited = (self.0.shared.listings).wait_while(held, |held| held.waits != Waits::Read);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for HeldListing<'_> {
    fn drop(&mut self) {
        self.0.held().waits = Waits::No;
        self.0.shared.listings.notify_all();
    }
}

impl Memory {
    /// An empty store with room for `data_size` of data.
    ///
    /// # Errors
    /// When no directory for its devices can be made.
    pub fn new(data_size: Bytes) -> io::Result<Self> {
        let dir = nix::unistd::mkdtemp(&std::env::temp_dir().join("store-XXXXXX"))?;
        for part in ["dev", "changes"] {
            fs::create_dir(dir.join(part))?;
        }
        Ok(Self {
            host: None,
            shared: Arc::new(Shared {
                dir,
                held: Mutex::new(Held {
                    volumes: BTreeMap::new(),
                    data_size,
                    seq: 0,
                    minor: 0,
                    full: false,
                    locked: 0,
                    fates: VecDeque::new(),
                    then_locked: false,
                    late: Vec::new(),
                    hosts: BTreeMap::new(),
                    lost: BTreeMap::new(),
                    evictor: None,
                    waits: Waits::No,
                }),
                listings: Condvar::new(),
            }),
        })
    }

    /// The same store, as a host of a fleet has it: it sees its own volumes, and entries and the base.
    #[must_use]
    pub fn of_host(&self, id: &str) -> Self {
        Self {
            host: Some(id.into()),
            ..self.clone()
        }
    }

    /// Has this host be one of the fleet, also after it was taken for lost.
    pub fn join(&self) {
        if let Some(host) = &self.host {
            self.held().hosts.insert(Arc::clone(host), false);
        }
    }

    /// Has this host take `lost` for lost, and what that had for its own.
    pub fn declare_lost(&self, lost: &str) {
        let mut held = self.held();
        let mut gone = Vec::new();
        for (name, volume) in &mut held.volumes {
            if volume.host.as_deref() == Some(lost) && !is_shared(&volume.tags) {
                gone.push(Lost {
                    lv: name.clone(),
                    tags: volume.tags.clone(),
                });
                volume.tags.push(DOOMED.parse().expect("is a tag"));
                volume.host.clone_from(&self.host);
            }
        }
        held.hosts.insert(lost.into(), true);
        held.lost.insert(lost.into(), gone);
        drop(held);
        self.tell();
    }

    fn tell(&self) {
        let changes = self.shared.dir.join("changes/seq");
        let _ = fs::write(changes, "a host is lost");
    }

    /// Whether this host is one that was declared lost.
    fn check_host(&self, held: &Held) -> Result<(), StoreError> {
        match self.host.as_ref().and_then(|host| held.hosts.get(host)) {
            Some(true) => Err(StoreError::ShutOut {
                store: "memory".to_owned(),
                detail: "it was taken for lost".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn sees(&self, volume: &Volume) -> bool {
        volume.host.is_none() || volume.host == self.host || is_shared(&volume.tags)
    }

    fn get<'a>(&self, held: &'a mut Held, lv: &LvName) -> Result<&'a mut Volume, StoreError> {
        held.volumes
            .get_mut(lv)
            .filter(|volume| self.sees(volume))
            .ok_or_else(|| StoreError::NotFound(lv.clone()))
    }

    /// What becomes of the next changes, in order: of volumes made, tagged, grown and removed. What comes after
    /// these is done.
    pub fn next(&self, fates: impl IntoIterator<Item = Fate>) {
        self.held().fates.extend(fates);
    }

    /// As [`Memory::next`], and the store is locked once these have been asked for.
    pub fn next_then_lock(&self, fates: impl IntoIterator<Item = Fate>) {
        let mut held = self.held();
        held.fates.extend(fates);
        held.then_locked = true;
    }

    /// Has the next `calls` calls not answered in time, and what they ask for not done: another command has the
    /// store locked.
    pub fn lock_for(&self, calls: usize) {
        self.held().locked = calls;
    }

    /// Whether the store is locked still.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.held().locked > 0
    }

    /// Leaves no room, whatever it holds.
    pub fn fill(&self) {
        self.held().full = true;
    }

    /// Serves again: it is neither locked nor full, and the changes to come are done.
    pub fn serve(&self) {
        let mut held = self.held();
        held.locked = 0;
        held.full = false;
        held.fates.clear();
    }

    /// Has the next listing read and not answered until the guard is dropped: it says what was so before that changed.
    #[must_use]
    pub fn hold_listing(&self) -> HeldListing<'_> {
        self.held().waits = Waits::Next;
        HeldListing(self)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A test that panics while it holds this has failed already.
        self.shared
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn timeout() -> StoreError {
        StoreError::Timeout {
            store: "memory".to_owned(),
            seconds: 0,
        }
    }

    /// The store, once it is one's turn and what is late is done.
    fn turn(&self) -> Result<MutexGuard<'_, Held>, StoreError> {
        let mut held = self.held();
        if held.locked > 0 {
            held.locked -= 1;
            return Err(Self::timeout());
        }
        for (host, change) in std::mem::take(&mut held.late) {
            let asked = Self {
                host,
                ..self.clone()
            };
            // No client waits for the outcome.
            let _ = asked.apply(&mut held, change);
        }
        self.check_host(&held)?;
        Ok(held)
    }

    fn change(&self, change: Change) -> Result<Option<PathBuf>, StoreError> {
        let mut held = self.turn()?;
        let fate = held.fates.pop_front().unwrap_or(Fate::Done);
        if held.fates.is_empty() && std::mem::take(&mut held.then_locked) {
            held.locked = usize::MAX;
        }
        match fate {
            Fate::Done => self.apply(&mut held, change),
            Fate::Refused => Err(Self::timeout()),
            Fate::Unanswered => {
                let _ = self.apply(&mut held, change);
                Err(Self::timeout())
            }
            Fate::Late => {
                held.late.push((self.host.clone(), change));
                Err(Self::timeout())
            }
        }
    }

    fn apply(&self, held: &mut Held, change: Change) -> Result<Option<PathBuf>, StoreError> {
        self.check_host(held)?;
        let device = match change {
            Change::Make { origin, size, new } => self.make(held, origin.as_ref(), size, new)?,
            Change::Tags { lv, add, del } => {
                let volume = self.get(held, &lv)?;
                if add.iter().any(|tag| tag.as_str() == DOOMED) {
                    // The host that dooms an entry has it to remove.
                    volume.host.clone_from(&self.host);
                }
                volume.tags.retain(|tag| !del.contains(tag));
                for tag in add {
                    if !volume.tags.contains(&tag) {
                        volume.tags.push(tag);
                    }
                }
                None
            }
            Change::Remove(lv) => {
                if self.get(held, &lv).is_ok() {
                    self.take_device(held, &lv)?;
                    held.volumes.remove(&lv);
                }
                None
            }
            Change::Grow(lv, size) => {
                let size = size.round_up(GRAIN);
                if self.get(held, &lv)?.size < size {
                    held.check_room()?;
                    let volume = self.get(held, &lv)?;
                    volume.content.set_len(size.0).map_err(failed("growing"))?;
                    volume.size = size;
                }
                None
            }
        };
        let changes = self.shared.dir.join("changes/seq");
        fs::write(changes, held.seq.to_string()).map_err(failed("telling of a change"))?;
        Ok(device)
    }

    fn make(
        &self,
        held: &mut Held,
        origin: Option<&LvName>,
        size: Bytes,
        new: NewLv,
    ) -> Result<Option<PathBuf>, StoreError> {
        if held.volumes.contains_key(&new.name) {
            return Err(StoreError::Exists(new.name));
        }
        let content = rustix::fs::memfd_create(new.name.as_str(), MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|e| failed("making a volume")(e.into()))?;
        let (size, origin) = match origin {
            Some(origin) => {
                let origin = self.get(held, origin)?;
                copy(&origin.content, &content).map_err(failed("copying"))?;
                (origin.size, Some(origin.seq))
            }
            None => (size.round_up(GRAIN), None),
        };
        content.set_len(size.0).map_err(failed("making a volume"))?;
        held.check_room()?;
        held.seq += 1;
        let mut tags: Vec<Tag> = Vec::new();
        for tag in new.tags {
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        let volume = Volume {
            host: self.host.clone(),
            seq: held.seq,
            created: unix_now(),
            size,
            tags,
            origin,
            content,
            device: None,
        };
        held.volumes.insert(new.name.clone(), volume);
        new.active
            .then(|| self.give_device(held, &new.name))
            .transpose()
    }

    fn give_device(&self, held: &mut Held, lv: &LvName) -> Result<PathBuf, StoreError> {
        let path = self.shared.dir.join("dev").join(lv.as_str());
        let minor = held.minor + 1;
        let volume = self.get(held, lv)?;
        if volume.device.is_none() {
            let content = format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                volume.content.as_raw_fd()
            );
            symlink(content, &path).map_err(failed("activating"))?;
            volume.device = Some(minor);
            held.minor = minor;
        }
        Ok(path)
    }

    fn take_device(&self, held: &mut Held, lv: &LvName) -> Result<(), StoreError> {
        let volume = self.get(held, lv)?;
        if volume.device.is_none() {
            return Ok(());
        }
        if volume.is_open(&open_files()?)? {
            return Err(StoreError::Busy(lv.clone()));
        }
        let path = self.shared.dir.join("dev").join(lv.as_str());
        fs::remove_file(path).map_err(failed("deactivating"))?;
        volume.device = None;
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Held {
    fn lv(
        &self,
        name: &LvName,
        volume: &Volume,
        open: &HashMap<(u64, u64), usize>,
    ) -> Result<Lv, StoreError> {
        let origin = |of: u64| self.volumes.iter().find(|(_, other)| other.seq == of);
        Ok(Lv {
            name: name.clone(),
            seq: volume.seq,
            created: volume.created,
            size: volume.size,
            tags: volume.tags.clone(),
            origin: volume.origin.and_then(origin).map(|(name, _)| name.clone()),
            device: volume.device.map(|minor| (MAJOR, minor)),
            open: volume.is_open(open)?,
        })
    }

    fn check_room(&self) -> Result<(), StoreError> {
        let capacity = self.capacity()?;
        if self.full || capacity.data_percent >= capacity.data_limit {
            let detail = format!("{:.0} % of its data are in use", capacity.data_percent);
            return Err(StoreError::Full {
                store: "memory".to_owned(),
                detail,
            });
        }
        Ok(())
    }

    fn capacity(&self) -> Result<Capacity, StoreError> {
        Ok(Capacity {
            data_size: self.data_size,
            data_percent: (self.taken()? as f64 * 100.0 / self.data_size.0 as f64).min(100.0),
            data_limit: LIMIT,
            metadata_limit: 100.0,
            ..Capacity::default()
        })
    }

    /// Bytes that all volumes take together.
    fn taken(&self) -> Result<u64, StoreError> {
        let alike = self.alike()?;
        Ok(alike
            .values()
            .map(|groups| groups.len() as u64 * CHUNK)
            .sum())
    }

    /// The volumes that have something written in a chunk, in groups that have the same in it; by the chunk's number in
    /// a volume.
    fn alike(&self) -> Result<HashMap<u64, Vec<Vec<&LvName>>>, StoreError> {
        let mut written: HashMap<u64, Vec<(&LvName, &File)>> = HashMap::new();
        for (name, volume) in &self.volumes {
            for extent in extents(&volume.content).map_err(failed("reading"))? {
                for chunk in extent.start / CHUNK..extent.end.div_ceil(CHUNK) {
                    let volumes = written.entry(chunk).or_default();
                    if volumes.last().is_none_or(|(last, _)| *last != name) {
                        volumes.push((name, &volume.content));
                    }
                }
            }
        }
        let mut alike = HashMap::new();
        for (chunk, volumes) in written {
            let mut groups: Vec<(Vec<u8>, Vec<&LvName>)> = Vec::new();
            let is_alone = volumes.len() == 1;
            for (name, file) in volumes {
                let mut content = vec![0; if is_alone { 0 } else { CHUNK as usize }];
                let read = file.read_exact_at(&mut content, chunk * CHUNK);
                read.map_err(failed("reading"))?;
                match groups.iter_mut().find(|(known, _)| *known == content) {
                    Some((_, group)) => group.push(name),
                    None => groups.push((content, vec![name])),
                }
            }
            alike.insert(chunk, groups.into_iter().map(|(_, group)| group).collect());
        }
        Ok(alike)
    }
}

impl Volume {
    /// Whether it is among `open`, beside this store's own descriptor.
    fn is_open(&self, open: &HashMap<(u64, u64), usize>) -> Result<bool, StoreError> {
        let metadata = self.content.metadata().map_err(failed("looking at"))?;
        let count = open.get(&(metadata.dev(), metadata.ino()));
        Ok(count.is_some_and(|count| *count > 1))
    }
}

/// The files that this process has open, by device and inode, and how often.
fn open_files() -> Result<HashMap<(u64, u64), usize>, StoreError> {
    let mut open = HashMap::new();
    let descriptors = fs::read_dir("/proc/self/fd").map_err(failed("looking for open files in"))?;
    for descriptor in descriptors.flatten() {
        // One may be closed meanwhile.
        if let Ok(metadata) = fs::metadata(descriptor.path()) {
            *open.entry((metadata.dev(), metadata.ino())).or_default() += 1;
        }
    }
    Ok(open)
}

/// Where a sparse file holds something.
fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    let mut end = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        extents.push(start..end);
    }
}

fn copy(from: &File, to: &File) -> io::Result<()> {
    for extent in extents(from)? {
        let mut content = vec![0; Bytes::MIB as usize];
        for at in extent.clone().step_by(content.len()) {
            let length = (extent.end - at).min(Bytes::MIB) as usize;
            from.read_exact_at(&mut content[..length], at)?;
            to.write_all_at(&content[..length], at)?;
        }
    }
    Ok(())
}

fn failed(doing: &str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io {
        what: format!("{doing} a store in memory"),
        source,
    }
}

impl Store for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    fn lost(&self) -> Result<Vec<Lost>, StoreError> {
        let held = self.turn()?;
        let lost = (self.host.as_ref()).and_then(|host| held.lost.get(host));
        Ok(lost.cloned().unwrap_or_default())
    }

    fn forget_lost(&self) -> Result<(), StoreError> {
        if let Some(host) = &self.host {
            self.turn()?.lost.remove(host);
        }
        Ok(())
    }

    fn fleet(&self) -> Result<Option<Fleet>, StoreError> {
        let Some(me) = &self.host else {
            return Ok(None);
        };
        let held = self.turn()?;
        let open = open_files()?;
        let mut fleet = Fleet {
            me: me.to_string(),
            ..Fleet::default()
        };
        for (id, lost) in &held.hosts {
            fleet.hosts.push(Host {
                id: id.to_string(),
                lost: *lost,
            });
        }
        for (name, volume) in &held.volumes {
            let mut lv = held.lv(name, volume, &open)?;
            if !self.sees(volume) {
                lv.open = lv.device.take().is_some();
            }
            let host = volume.host.as_ref().map(ToString::to_string);
            fleet.lvs.push(HostLv { host, lv });
        }
        Ok(Some(fleet))
    }

    fn begin_evicting(&self) -> Result<bool, StoreError> {
        let mut held = self.turn()?;
        let free = held.evictor.is_none() || held.evictor == self.host;
        if free {
            held.evictor.clone_from(&self.host);
        }
        Ok(free)
    }

    fn evict(&self, lv: &LvName) -> Result<bool, StoreError> {
        if self.held().evictor != self.host {
            return Err(StoreError::Failed("another host evicts".to_owned()));
        }
        doom(self, lv)
    }

    fn end_evicting(&self) {
        let mut held = self.held();
        if held.evictor == self.host {
            held.evictor = None;
        }
    }

    fn list(&self) -> Result<Listing, StoreError> {
        let mut held = self.turn()?;
        let open = open_files()?;
        let mut lvs = Vec::new();
        for (name, volume) in &held.volumes {
            if self.sees(volume) {
                lvs.push(held.lv(name, volume, &open)?);
            }
        }
        let capacity = held.capacity()?;
        if held.waits == Waits::Next {
            held.waits = Waits::Read;
            self.shared.listings.notify_all();
            let waited = (self.shared.listings).wait_while(held, |held| held.waits == Waits::Read);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        Ok(Listing { lvs, capacity })
    }

    fn room(&self) -> Result<Capacity, StoreError> {
        let held = self.held();
        self.check_host(&held)?;
        held.check_room()?;
        held.capacity()
    }

    fn usage(&self) -> Result<HashMap<LvName, Usage>, StoreError> {
        let held = self.turn()?;
        let mut usage: HashMap<LvName, Usage> = held
            .volumes
            .keys()
            .map(|name| (name.clone(), Usage::default()))
            .collect();
        for group in held.alike()?.values().flatten() {
            for name in group {
                let usage = usage.get_mut(*name).expect("each volume is in it");
                usage.mapped.0 += CHUNK;
                if group.len() == 1 {
                    usage.exclusive.0 += CHUNK;
                }
            }
        }
        Ok(usage)
    }

    fn snapshot(&self, origin: &LvName, new: &NewLv) -> Result<Option<PathBuf>, StoreError> {
        self.change(Change::Make {
            origin: Some(origin.clone()),
            size: Bytes(0),
            new: new.clone(),
        })
    }

    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError> {
        self.change(Change::Make {
            origin: None,
            size,
            new: new.clone(),
        })
    }

    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError> {
        self.change(Change::Tags {
            lv: lv.clone(),
            add: add.to_vec(),
            del: del.to_vec(),
        })
        .map(drop)
    }

    fn remove(&self, lv: &LvName) -> Result<(), StoreError> {
        self.change(Change::Remove(lv.clone())).map(drop)
    }

    fn grow(&self, lv: &LvName, size: Bytes) -> Result<(), StoreError> {
        self.change(Change::Grow(lv.clone(), size)).map(drop)
    }

    fn activate(&self, lv: &LvName) -> Result<PathBuf, StoreError> {
        let mut held = self.turn()?;
        self.give_device(&mut held, lv)
    }

    fn deactivate(&self, lv: &LvName) -> Result<(), StoreError> {
        let mut held = self.turn()?;
        self.take_device(&mut held, lv)
    }

    fn watch(&self) -> Watch {
        Watch {
            dir: self.shared.dir.join("changes"),
            file: None,
        }
    }
}
