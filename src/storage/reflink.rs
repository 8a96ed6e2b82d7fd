// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volumes as image files that share blocks, on XFS or btrfs, behind loop
//! devices: for hosts without device-mapper.
//!
//! ```text
//! DIR/friend-…/image       what the volume holds, sparse
//! DIR/friend-…/tags.json   its tags, and what else LVM would know of it
//! DIR/~new                 one that is being made
//! DIR/~old.…               one that is being removed
//! DIR/~seq                 the highest number given so far; written at each change, for those who watch
//! DIR/~lock                empty
//! ```
//! A volume is made complete under a name that no volume can have, and appears by
//! one rename; it goes the same way. So there are never half of one, nor one
//! without its tags, and what is left over after a crash is told by its name
//! alone. Whatever else lies in the directory is not ours and is left alone.
//!
//! Changes take turns, by a lock on a file: threads and processes alike.
//! Listings take no lock.
//!
//! Removing works on a file system without a free block: it is a rename, and `~seq` is written over in place. Where
//! even that fails, the change that it announces holds all the same.
//!
//! A snapshot of a mounted volume is consistent: its file system is frozen meanwhile, through one more mount of the
//! same device, before it is this store's turn. What a killed helper leaves frozen is thawed when the store is opened.

mod loops;

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use fiemap::{Fiemap, FiemapExtentFlags};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::{Statvfs, statvfs};
use rustix::fs::{CWD, FlockOperation, IFlags, Mode, OFlags, RenameFlags};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use self::loops::Loop;
use super::freeze::{self, Frozen};
use super::{Capacity, Listing, Lv, NewLv, Store, StoreError, Usage, Watch};
use crate::cache::names::{LvName, Tag};
use crate::cache::spec::FsType;
use crate::cache::tags::{DEFAULT, SNAPSHOT};
use crate::cache::units::Bytes;
use crate::mount::Mounted;
use crate::text::unix_now;

/// What the store is called in messages and in the job protocol.
const NAME: &str = "reflink";

// Names in the store's directory that no volume can have: `~` is not in LVM's
// alphabet.
const NEW: &str = "~new";
const OLD: &str = "~old.";
const SEQ: &str = "~seq";
const LOCK: &str = "~lock";

// In a volume's directory.
const IMAGE: &str = "image";
const TAGS: &str = "tags.json";
const NEW_TAGS: &str = "tags.json~";

/// Sizes are rounded up to this, in bytes.
const GRAIN: u64 = Bytes::MIB;

/// How long the lock is waited for, in seconds. What holds it is
/// one clone, or one mkfs of the base.
const LOCK_SECONDS: u64 = 60;

/// How often it is tried.
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// How long a device that nobody has mounted may take to go: udev's probes, and
/// children that have not reached their exec yet, hold it for moments.
const LINGER: Duration = Duration::from_millis(500);

/// A directory of image files.
#[derive(Debug)]
pub struct ReflinkStore {
    dir: PathBuf,
    /// Whose turn it is among this process's threads.
    turn: Mutex<()>,
}

/// What is kept beside an image.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    seq: u64,
    /// Seconds since 1970.
    created: u64,
    origin: Option<Origin>,
    tags: Vec<String>,
}

/// What an image was cloned from: the name may have been given again since.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    name: String,
    seq: u64,
}

/// Prepares `dir` (which is made where it is not there) and its base, an empty
/// XFS of `base_size`: once, and again without any change.
///
/// # Errors
/// When the directory's file system cannot share blocks between files, when
/// others could write to it, or what else failed.
pub fn init(dir: &Path, base_size: Bytes) -> Result<ReflinkStore, StoreError> {
    if !dir.is_dir() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed("making", dir))?;
    }
    let store = ReflinkStore::at(dir)?;
    can_clone(&store.dir)?;
    let turn = store.lock()?;
    store.recover(&turn)?;
    let lvs = store.list()?.lvs;
    if !lvs
        .iter()
        .any(|lv| lv.tags.iter().any(|tag| tag.as_str() == DEFAULT))
    {
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| StoreError::Failed(error.to_string()))?;
        let base = NewLv {
            name: LvName::fresh(unix_now(), random),
            tags: [DEFAULT, SNAPSHOT]
                .map(|tag| tag.parse().expect("is a tag"))
                .into(),
            active: false,
        };
        store.make(&turn, &base, None, |image| {
            resize(image, base_size)?;
            // Through a device, so that the file system suits its block size.
            let device = loops::attach(image).map_err(failed("a loop device for", image))?;
            let made = crate::fs::make(&device.path(), FsType::Xfs);
            store.gone(&device)?;
            Ok(made?)
        })?;
    }
    drop(turn);
    Ok(store)
}

impl ReflinkStore {
    /// Opens a directory that [`init`] prepared, and clears away what a crash
    /// left.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] when it is not there or not prepared.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let store = Self::at(dir)?;
        if !store.dir.join(SEQ).exists() {
            return Err(not_prepared(dir));
        }
        store.recover(&store.lock()?)?;
        Ok(store)
    }

    fn at(dir: &Path) -> Result<Self, StoreError> {
        let dir = dir.canonicalize().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => not_prepared(dir),
            _ => failed("looking for", dir)(error),
        })?;
        let stat = fs::metadata(&dir).map_err(failed("looking at", &dir))?;
        if stat.uid() != nix::unistd::geteuid().as_raw() || stat.mode() & 0o022 != 0 {
            return Err(StoreError::Unusable(format!(
                "{}: others than root can write to it",
                dir.display()
            )));
        }
        Ok(Self {
            dir,
            turn: Mutex::new(()),
        })
    }

    /// Removes what a crash left, thaws what it left frozen, and sees that the
    /// next number is higher than any. Nobody is told of a change where there
    /// was none.
    fn recover(&self, turn: &Turn<'_>) -> Result<(), StoreError> {
        let what = failed("clearing away in", &self.dir);
        for entry in fs::read_dir(&self.dir).map_err(&what)? {
            let entry = entry.map_err(&what)?;
            let name = entry.file_name();
            if name == NEW {
                remove_tree(&entry.path())?;
            } else if is_old(&name) {
                // What cannot be freed now is tried again at the next removal.
                let freed = remove_tree(&entry.path());
                if let Err(error) = freed {
                    warn!(%error, "what a removed volume held is not freed yet");
                }
            } else if let Some(lv) = name.to_str().and_then(|name| name.parse().ok())
                && self.record(&lv)?.is_none()
            {
                warn!(path = %entry.path().display(), "not a volume, or one whose {TAGS} is damaged: left alone");
            }
        }
        let loops = loops::all(IMAGE).map_err(failed("looking for loop devices in", "/sys"))?;
        let mut last = 0;
        for (name, record) in self.records()? {
            last = last.max(record.seq);
            // Of a change of tags that was never made.
            let unmade = self.lv_dir(&name).join(NEW_TAGS);
            match fs::remove_file(&unmade) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("removing", &unmade)(error));
                }
                _ => {}
            }
            let device = fs::metadata(self.image(&name))
                .ok()
                .and_then(|image| loops.iter().find(|device| device.backs(&image)));
            match device.map(|device| self.mounted(device)) {
                Some(Ok(Some(mounted))) => freeze::thaw(&mounted),
                // One that has shut down, say: no reason to keep the others waiting.
                Some(Err(error)) => warn!(lv = %name, %error, "whether it is frozen is not known"),
                _ => {}
            }
        }
        if last > self.noted_seq() {
            self.commit(turn, last)?;
        }
        Ok(())
    }

    /// Frees what removed volumes held, also those that an earlier removal could not free. Another thread or process
    /// may be at the same.
    fn sweep(&self) -> Result<(), StoreError> {
        let what = failed("clearing away in", &self.dir);
        let mut first = Ok(());
        for entry in fs::read_dir(&self.dir).map_err(&what)? {
            let entry = entry.map_err(&what)?;
            if is_old(&entry.file_name()) {
                first = first.and(remove_tree(&entry.path()));
            }
        }
        first
    }

    fn lv_dir(&self, lv: &LvName) -> PathBuf {
        self.dir.join(lv.as_str())
    }

    fn image(&self, lv: &LvName) -> PathBuf {
        self.lv_dir(lv).join(IMAGE)
    }

    fn lock(&self) -> Result<Turn<'_>, StoreError> {
        let deadline = Instant::now() + Duration::from_secs(LOCK_SECONDS);
        let late = || StoreError::Timeout {
            store: NAME.to_owned(),
            seconds: LOCK_SECONDS,
        };
        let thread = loop {
            match self.turn.try_lock() {
                Ok(turn) => break turn,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Err(late()),
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
            }
        };
        let path = self.dir.join(LOCK);
        // Never written to, so that those who watch see only changes.
        let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::CLOEXEC;
        let mut file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|error| failed("opening", &path)(error.into()))?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(process) => {
                    return Ok(Turn {
                        _thread: thread,
                        _process: process,
                    });
                }
                Err((_, nix::Error::EAGAIN)) if Instant::now() >= deadline => return Err(late()),
                Err((back, nix::Error::EAGAIN)) => file = back,
                Err((_, error)) => return Err(failed("locking", &path)(error.into())),
            }
            thread::sleep(LOCK_RETRY);
        }
    }

    /// All volumes that are ours, with what is kept beside them.
    fn records(&self) -> Result<Vec<(LvName, Record)>, StoreError> {
        let what = failed("reading", &self.dir);
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(&what)? {
            let name = entry.map_err(&what)?.file_name();
            let Some(lv) = name.to_str().and_then(|name| name.parse::<LvName>().ok()) else {
                continue;
            };
            if let Some(record) = self.record(&lv)? {
                records.push((lv, record));
            }
        }
        Ok(records)
    }

    /// What is kept beside an image; `None` where there is no such volume, or
    /// something else of that name.
    fn record(&self, lv: &LvName) -> Result<Option<Record>, StoreError> {
        let path = self.lv_dir(lv).join(TAGS);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(failed("reading", &path)(error)),
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                debug!(path = %path.display(), %error, "not a record of ours");
                Ok(None)
            }
        }
    }

    fn known(&self, lv: &LvName) -> Result<Record, StoreError> {
        self.record(lv)?
            .ok_or_else(|| StoreError::NotFound(lv.clone()))
    }

    /// The loop device of a volume, if it is active. [`StoreError::NotFound`]
    /// when the image is not there.
    fn device(&self, lv: &LvName) -> Result<Option<Loop>, StoreError> {
        let image = self.image(lv);
        loops::of(&image).map_err(|error| {
            if is_absent(&error) {
                StoreError::NotFound(lv.clone())
            } else {
                failed("looking for the loop device of", &image)(error)
            }
        })
    }

    /// One more mount of what is mounted from the device. `None`: nothing is.
    fn mounted(&self, device: &Loop) -> Result<Option<Mounted>, StoreError> {
        let Some(fs) = device.mounted() else {
            return Ok(None);
        };
        match Mounted::device(&device.path(), fs) {
            Ok(mounted) => Ok(Some(mounted)),
            // Unmounted in the meantime, and now somebody else's.
            Err(_) if device.mounted().is_none() => Ok(None),
            Err(error) => Err(failed("freezing", device.path())(error.into())),
        }
    }

    /// Writes to the image what was written to the volume so far, and freezes its file system where that is in use.
    fn freeze(&self, lv: &LvName) -> Result<Option<Frozen>, StoreError> {
        let Some(device) = self.device(lv)? else {
            return Ok(None);
        };
        let what = failed("writing to", device.path());
        let Some(mounted) = self.mounted(&device)? else {
            device.flush().map_err(what)?;
            return Ok(None);
        };
        // All of it now: little is written while it is frozen.
        mounted.sync().map_err(what)?;
        Frozen::new(&mounted, lv, None).map(Some)
    }

    /// Waits for a device to go that nobody has mounted.
    fn gone(&self, device: &Loop) -> Result<bool, StoreError> {
        let deadline = Instant::now() + LINGER;
        loop {
            let there = device
                .detach()
                .map_err(failed("taking down", device.path()))?;
            if !there || Instant::now() >= deadline {
                return Ok(!there);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The turn to change a volume, once it has no device.
    fn lock_inactive(&self, lv: &LvName) -> Result<Turn<'_>, StoreError> {
        // What lingers is waited for before it is anybody's turn.
        let busy = || StoreError::Busy(lv.clone());
        if let Some(device) = self.device(lv)?
            && !self.gone(&device)?
        {
            return Err(busy());
        }
        let turn = self.lock()?;
        match self.device(lv)? {
            Some(device)
                if device
                    .detach()
                    .map_err(failed("taking down", device.path()))? =>
            {
                Err(busy())
            }
            _ => Ok(turn),
        }
    }

    /// Makes a volume: `fill` makes the image, an empty file at its path so far.
    fn make(
        &self,
        turn: &Turn<'_>,
        new: &NewLv,
        origin: Option<Origin>,
        fill: impl FnOnce(&Path) -> Result<(), StoreError>,
    ) -> Result<Option<PathBuf>, StoreError> {
        let place = self.lv_dir(&new.name);
        if fs::symlink_metadata(&place).is_ok() {
            return Err(StoreError::Exists(new.name.clone()));
        }
        self.room()?;
        let unfinished = self.dir.join(NEW);
        remove_tree(&unfinished)?;
        let seq = self.next_seq()?;
        let made = (|| {
            DirBuilder::new()
                .mode(0o700)
                .create(&unfinished)
                .map_err(failed("making", &unfinished))?;
            let image = unfinished.join(IMAGE);
            let file = new_file(&image)?;
            without_checksums(&file);
            fill(&image)?;
            file.sync_all().map_err(failed("writing", &image))?;
            let record = Record {
                seq,
                created: unix_now(),
                origin,
                tags: distinct(new.tags.iter().map(Tag::to_string)),
            };
            write_record(&unfinished.join(TAGS), &record)?;
            sync_dir(&unfinished)?;
            rustix::fs::renameat_with(CWD, &unfinished, CWD, &place, RenameFlags::NOREPLACE)
                .map_err(|error| failed("making", &place)(error.into()))
        })();
        if let Err(error) = made {
            let _ = remove_tree(&unfinished);
            return Err(error);
        }
        let ready = self.commit(turn, seq).and_then(|()| {
            if !new.active {
                return Ok(None);
            }
            let attached = loops::attach(&self.image(&new.name));
            attached
                .map(|device| Some(device.path()))
                .map_err(failed("a loop device for", self.image(&new.name)))
        });
        if ready.is_err() {
            // All or nothing: what its caller is told was not made is not there.
            let undone = self.discard(turn, &new.name).and_then(|()| self.sweep());
            if let Err(error) = undone {
                warn!(lv = %new.name, %error, "a volume that could not be made whole is left");
            }
        }
        ready
    }

    /// Takes a volume away; what it held is freed by [`ReflinkStore::sweep`].
    fn discard(&self, turn: &Turn<'_>, lv: &LvName) -> Result<(), StoreError> {
        let mut seq = self.next_seq()?;
        let from = self.lv_dir(lv);
        loop {
            let place = self.dir.join(format!("{OLD}{seq}"));
            match rustix::fs::renameat_with(CWD, &from, CWD, &place, RenameFlags::NOREPLACE) {
                Ok(()) => break,
                // Of a removal whose number could not be noted.
                Err(rustix::io::Errno::EXIST) => seq += 1,
                Err(error) => return Err(failed("removing", &from)(error.into())),
            }
        }
        self.commit(turn, seq)
    }

    /// Takes a volume away where it is there and not in use.
    fn take_away(&self, lv: &LvName) -> Result<(), StoreError> {
        if self.record(lv)?.is_none() {
            return Ok(());
        }
        let turn = match self.lock_inactive(lv) {
            Err(StoreError::NotFound(_)) => return Ok(()),
            turn => turn?,
        };
        if self.record(lv)?.is_none() {
            return Ok(());
        }
        self.discard(&turn, lv)
    }

    fn noted_seq(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join(SEQ)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn next_seq(&self) -> Result<u64, StoreError> {
        let last = match self.noted_seq() {
            // Lost: what is there tells as well.
            0 => {
                let records = self.records()?;
                records
                    .iter()
                    .map(|(_, record)| record.seq)
                    .max()
                    .unwrap_or(0)
            }
            last => last,
        };
        Ok(last + 1)
    }

    /// Makes the renames so far last, and tells those who watch. That the number itself lasts is not needed: opening
    /// the store looks for the highest.
    fn commit(&self, _turn: &Turn<'_>, seq: u64) -> Result<(), StoreError> {
        sync_dir(&self.dir)?;
        if let Err(error) = self.note_seq(seq) {
            // The change is made, and closing the file has told of it.
            debug!(%error, "the highest number is not noted");
        }
        Ok(())
    }

    /// Writes the highest number given so far.
    fn note_seq(&self, seq: u64) -> io::Result<()> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.dir.join(SEQ))?;
        // In place and always as long, which takes no block on a full file system.
        let written = file.write_all_at(format!("{seq:020}\n").as_bytes(), 0);
        // Rather none than an old one: then the volumes tell which is the highest.
        written.inspect_err(|_| drop(file.set_len(0)))
    }

    fn capacity(&self) -> Result<Capacity, StoreError> {
        let stat = self.space()?;
        let (blocks, block) = (stat.blocks().max(1), stat.fragment_size());
        let used = blocks - stat.blocks_available();
        Ok(Capacity {
            data_size: Bytes(blocks * block),
            data_percent: used as f64 * 100.0 / blocks as f64,
            data_limit: 100.0 - floor(blocks * block) as f64 * 100.0 / (blocks * block) as f64,
            ..Capacity::default()
        })
    }

    fn space(&self) -> Result<Statvfs, StoreError> {
        statvfs(&self.dir).map_err(|error| failed("looking at", &self.dir)(error.into()))
    }

    /// Makes `image`, an empty file, share all blocks of what `origin` holds now; `frozen`, where that is in use.
    fn clone_image(
        &self,
        origin: &LvName,
        frozen: Option<&Frozen>,
        image: &Path,
    ) -> Result<(), StoreError> {
        let source = self.image(origin);
        let what = failed("cloning", &source);
        if frozen.is_none()
            && let Some(device) = self.device(origin)?
        {
            if device.mounted().is_some() {
                return Err(StoreError::Busy(origin.clone()));
            }
            device.flush().map_err(&what)?;
        }
        let from = open_image(&source)?;
        let to = open_image(image)?;
        rustix::fs::ioctl_ficlone(&to, &from).map_err(|error| what(error.into()))
    }
}

/// Whether an image is held: see [`Store::hold`]. How often a loop device is open the kernel does not tell.
fn is_held(image: &Path) -> bool {
    File::open(image).is_ok_and(|image| {
        // Shared, as others may be looking too.
        matches!(
            Flock::lock(image, FlockArg::LockSharedNonblock),
            Err((_, Errno::EWOULDBLOCK))
        )
    })
}

impl Store for ReflinkStore {
    fn name(&self) -> &str {
        NAME
    }

    fn clear_away(&self) -> Result<(), StoreError> {
        self.sweep()
    }

    fn list(&self) -> Result<Listing, StoreError> {
        let records = self.records()?;
        let numbers: HashMap<LvName, u64> = records
            .iter()
            .map(|(name, record)| (name.clone(), record.seq))
            .collect();
        let loops = loops::all(IMAGE).map_err(failed("looking for loop devices in", "/sys"))?;
        let mut lvs = Vec::with_capacity(records.len());
        for (name, record) in records {
            let image = match fs::metadata(self.image(&name)) {
                Ok(image) => image,
                // Removed in the meantime.
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(failed("looking at", self.image(&name))(error)),
            };
            let device = loops.iter().find(|device| device.backs(&image));
            let origin = record.origin.and_then(|origin| {
                let (name, seq) = numbers.get_key_value(origin.name.as_str())?;
                (*seq == origin.seq).then(|| name.clone())
            });
            lvs.push(Lv {
                seq: record.seq,
                created: record.created,
                size: Bytes(image.len()),
                tags: record
                    .tags
                    .iter()
                    .filter_map(|tag| tag.parse().ok())
                    .collect(),
                origin,
                device: device.map(|device| device.number),
                open: device.is_some_and(|device| {
                    device.mounted().is_some() || is_held(&self.image(&name))
                }),
                name,
            });
        }
        Ok(Listing {
            lvs,
            capacity: self.capacity()?,
        })
    }

    fn room(&self) -> Result<Capacity, StoreError> {
        let stat = self.space()?;
        let block = stat.fragment_size();
        let (size, free) = (stat.blocks() * block, stat.blocks_available() * block);
        let floor = floor(size);
        if free >= floor {
            return self.capacity();
        }
        Err(StoreError::Full {
            store: NAME.to_owned(),
            detail: format!(
                "{} of {} are free in {}, and nothing is made below {}: remove entries, or make room there",
                Bytes(free),
                Bytes(size),
                self.dir.display(),
                Bytes(floor)
            ),
        })
    }

    fn usage(&self) -> Result<HashMap<LvName, Usage>, StoreError> {
        let mut usages = HashMap::new();
        for (name, _) in self.records()? {
            match usage(&self.image(&name)) {
                Ok(usage) => {
                    usages.insert(name, usage);
                }
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(failed("looking at", self.image(&name))(error)),
            }
        }
        Ok(usages)
    }

    fn mapped(&self, lv: &LvName) -> Result<Bytes, StoreError> {
        let image = self.image(lv);
        let stat = fs::metadata(&image).map_err(failed("looking at", &image))?;
        Ok(Bytes(stat.blocks() * 512))
    }

    fn snapshot(&self, origin: &LvName, new: &NewLv) -> Result<Option<PathBuf>, StoreError> {
        self.known(origin)?;
        // How long that takes a job decides, so no turn is held for it.
        let frozen = self.freeze(origin)?;
        let turn = self.lock()?;
        let cloned = Origin {
            seq: self.known(origin)?.seq,
            name: origin.to_string(),
        };
        self.make(&turn, new, Some(cloned), |image| {
            self.clone_image(origin, frozen.as_ref(), image)
        })
    }

    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError> {
        let turn = self.lock()?;
        self.make(&turn, new, None, |image| resize(image, size))
    }

    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError> {
        let turn = self.lock()?;
        let mut record = self.known(lv)?;
        let before = record.tags.clone();
        record
            .tags
            .retain(|tag| del.iter().all(|del| del.as_str() != tag));
        record.tags.extend(add.iter().map(Tag::to_string));
        record.tags = distinct(record.tags);
        if record.tags == before {
            return Ok(());
        }
        let dir = self.lv_dir(lv);
        let (new, old) = (dir.join(NEW_TAGS), dir.join(TAGS));
        let written = write_record(&new, &record)
            .and_then(|()| fs::rename(&new, &old).map_err(failed("writing", &old)));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written?;
        sync_dir(&dir)?;
        self.commit(&turn, self.noted_seq().max(record.seq))
    }

    fn remove(&self, lv: &LvName) -> Result<(), StoreError> {
        let taken_away = self.take_away(lv);
        // What an earlier try could not free too: its volume is not there to be removed again.
        taken_away.and(self.sweep())
    }

    fn grow(&self, lv: &LvName, size: Bytes) -> Result<(), StoreError> {
        let turn = self.lock()?;
        let record = self.known(lv)?;
        let image = self.image(lv);
        let now = fs::metadata(&image)
            .map_err(failed("looking at", &image))?
            .len();
        if size.0 > now {
            resize(&image, size)?;
            self.commit(&turn, self.noted_seq().max(record.seq))?;
        }
        // Also where a crash came between the two.
        match self.device(lv)? {
            Some(device) => device.resize().map_err(failed("growing", device.path())),
            None => Ok(()),
        }
    }

    fn activate(&self, lv: &LvName) -> Result<PathBuf, StoreError> {
        let _turn = self.lock()?;
        self.known(lv)?;
        match self.device(lv)? {
            Some(device) => Ok(device.path()),
            None => loops::attach(&self.image(lv))
                .map(|device| device.path())
                .map_err(failed("a loop device for", self.image(lv))),
        }
    }

    fn deactivate(&self, lv: &LvName) -> Result<(), StoreError> {
        self.known(lv)?;
        self.lock_inactive(lv).map(drop)
    }

    fn hold(&self, lv: &LvName) -> Result<File, StoreError> {
        let image = self.image(lv);
        let file = File::open(&image).map_err(failed("opening", &image))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| failed("locking", &image)(error.into()))?;
        Ok(file)
    }

    fn watch(&self) -> Watch {
        Watch {
            dir: self.dir.clone(),
            file: Some(SEQ.to_owned()),
        }
    }
}

/// The right to change things, until it is dropped.
struct Turn<'a> {
    _thread: MutexGuard<'a, ()>,
    _process: Flock<File>,
}

fn not_prepared(dir: &Path) -> StoreError {
    StoreError::Unusable(format!(
        "{} is not prepared as a store: is its disk mounted? Otherwise run: lvm-cache-friend init --reflink {0}",
        dir.display()
    ))
}

/// Tries whether two files in `dir` can share blocks.
fn can_clone(dir: &Path) -> Result<(), StoreError> {
    let unnamed = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map(File::from)
    };
    let tried = (|| {
        let (mut from, to) = (unnamed()?, unnamed()?);
        from.write_all(&[1; 4096])?;
        Ok::<_, io::Error>(rustix::fs::ioctl_ficlone(&to, &from)?)
    })();
    match tried {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS)
            ) =>
        {
            Err(StoreError::Unusable(format!(
                "{}: files there cannot share blocks ({error}): it must be on XFS (made with reflink=1, as mkfs.xfs does) or btrfs",
                dir.display()
            )))
        }
        other => other.map_err(failed("trying to share blocks in", dir)),
    }
}

/// btrfs checks each block that it reads against a checksum, and direct I/O of
/// pages that change under way makes wrong ones; what the file system inside
/// writes is its own business to check. Other file systems have no such thing.
fn without_checksums(file: &File) {
    if let Ok(flags) = rustix::fs::ioctl_getflags(file)
        && rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == libc::BTRFS_SUPER_MAGIC)
    {
        let _ = rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW);
    }
}

/// How much of `size` bytes must be free for volumes to be made. btrfs counts as free what it
/// will yet take for metadata: 60 MiB of 2 GiB.
fn floor(size: u64) -> u64 {
    (size / 20).min(Bytes::GIB)
}

fn usage(image: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    for extent in Fiemap::new_from_path(image)? {
        let extent = extent?;
        usage.mapped.0 += extent.fe_length;
        if !extent.fe_flags.contains(FiemapExtentFlags::SHARED) {
            usage.exclusive.0 += extent.fe_length;
        }
    }
    Ok(usage)
}

fn new_file(path: &Path) -> Result<File, StoreError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("making", path))
}

fn open_image(path: &Path) -> Result<File, StoreError> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed("opening", path))
}

/// Gives an image a size of at least `size`.
fn resize(image: &Path, size: Bytes) -> Result<(), StoreError> {
    let file = open_image(image)?;
    file.set_len(size.round_up(GRAIN).0)
        .and_then(|()| file.sync_all())
        .map_err(failed("growing", image))
}

fn write_record(path: &Path, record: &Record) -> Result<(), StoreError> {
    let text = serde_json::to_vec(record).expect("numbers and strings");
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        })
        .map_err(failed("writing", path))
}

fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("writing", path))
}

/// Whether a name in the store's directory is that of a volume that was taken away.
fn is_old(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(OLD)
}

fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if !is_absent(&error) => Err(failed("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Each tag once, where it first was.
fn distinct(tags: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    tags.into_iter()
        .filter(|tag| seen.insert(tag.clone()))
        .collect()
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// The error that doing something to a path gave.
fn failed(doing: &str, to: impl AsRef<Path>) -> impl Fn(io::Error) -> StoreError {
    let what = format!("{doing} {}", to.as_ref().display());
    move |source| match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StoreError::Full {
            store: NAME.to_owned(),
            detail: format!("{what}: {source}"),
        },
        _ => StoreError::Io {
            what: what.clone(),
            source,
        },
    }
}
