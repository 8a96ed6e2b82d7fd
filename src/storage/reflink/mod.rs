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
//! same device, before it is this store's turn. What a killed helper leaves frozen is thawed by the next daemon.
//!
//! The directory and its records are in `dir`, the lock and the numbers in `turn`, what is done to an image in `image`,
//! and its device in `loops`. Here volumes are made and taken away.

mod dir;
mod image;
mod loops;
mod turn;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags};
use tracing::warn;

use self::dir::{
    Dir, IMAGE, NAME, NEW, NEW_TAGS, OLD, Origin, Record, SEQ, TAGS, failed, is_absent, is_old,
    not_prepared, remove_tree, sync_dir, write_record,
};
use self::loops::Loop;
use self::turn::Turn;
use super::freeze::{self, Frozen};
use super::{Capacity, Listing, Lv, NewLv, Store, StoreError, Usage, Watch, retagged};
use crate::cache::names::{LvName, Tag};
use crate::cache::spec::FsType;
use crate::cache::tags::{DEFAULT, SNAPSHOT};
use crate::cache::units::Bytes;
use crate::mount::Mounted;
use crate::text::unix_now;

/// How long a device that nobody has mounted may take to go: udev's probes, and
/// children that have not reached their exec yet, hold it for moments.
const LINGER: Duration = Duration::from_millis(500);

/// A directory of image files.
#[derive(Debug)]
pub struct ReflinkStore {
    dir: Dir,
    /// Whose turn it is among this process's threads.
    turns: Mutex<()>,
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
    image::can_clone(store.dir.path())?;
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
            image::resize(image, base_size)?;
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
        Ok(Self {
            dir: Dir::open(dir)?,
            turns: Mutex::new(()),
        })
    }

    /// Removes what a crash left, and sees that the next number is higher than
    /// any. Nobody is told of a change where there was none.
    fn recover(&self, turn: &Turn<'_>) -> Result<(), StoreError> {
        let what = failed("clearing away in", self.dir.path());
        for entry in fs::read_dir(self.dir.path()).map_err(&what)? {
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
                && self.dir.record(&lv)?.is_none()
            {
                warn!(path = %entry.path().display(), "not a volume, or one whose {TAGS} is damaged: left alone");
            }
        }
        let mut last = 0;
        for (name, record) in self.dir.records()? {
            last = last.max(record.seq);
            // Of a change of tags that was never made.
            let unmade = self.dir.lv(&name).join(NEW_TAGS);
            match fs::remove_file(&unmade) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("removing", &unmade)(error));
                }
                _ => {}
            }
        }
        if last > turn.noted_seq() {
            turn.commit(last)?;
        }
        Ok(())
    }

    fn lock(&self) -> Result<Turn<'_>, StoreError> {
        Turn::take(&self.dir, &self.turns)
    }

    /// The loop device of a volume, if it is active. [`StoreError::NotFound`]
    /// when the image is not there.
    fn device(&self, lv: &LvName) -> Result<Option<Loop>, StoreError> {
        let image = self.dir.image(lv);
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
        let place = self.dir.lv(&new.name);
        if fs::symlink_metadata(&place).is_ok() {
            return Err(StoreError::Exists(new.name.clone()));
        }
        self.dir.room()?;
        let unfinished = self.dir.join(NEW);
        remove_tree(&unfinished)?;
        let seq = turn.next_seq()?;
        let made = (|| {
            DirBuilder::new()
                .mode(0o700)
                .create(&unfinished)
                .map_err(failed("making", &unfinished))?;
            let image = unfinished.join(IMAGE);
            let file = image::make(&image)?;
            fill(&image)?;
            file.sync_all().map_err(failed("writing", &image))?;
            let record = Record {
                seq,
                created: unix_now(),
                origin,
                tags: retagged(&[], &new.tags, &[]),
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
        let ready = turn.commit(seq).and_then(|()| {
            if !new.active {
                return Ok(None);
            }
            let attached = loops::attach(&self.dir.image(&new.name));
            attached
                .map(|device| Some(device.path()))
                .map_err(failed("a loop device for", self.dir.image(&new.name)))
        });
        if ready.is_err() {
            // All or nothing: what its caller is told was not made is not there.
            let undone = self
                .discard(turn, &new.name)
                .and_then(|()| self.dir.sweep());
            if let Err(error) = undone {
                warn!(lv = %new.name, %error, "a volume that could not be made whole is left");
            }
        }
        ready
    }

    /// Takes a volume away; what it held is freed by [`Dir::sweep`].
    fn discard(&self, turn: &Turn<'_>, lv: &LvName) -> Result<(), StoreError> {
        let mut seq = turn.next_seq()?;
        let from = self.dir.lv(lv);
        loop {
            let place = self.dir.join(&format!("{OLD}{seq}"));
            match rustix::fs::renameat_with(CWD, &from, CWD, &place, RenameFlags::NOREPLACE) {
                Ok(()) => break,
                // Of a removal whose number could not be noted.
                Err(rustix::io::Errno::EXIST) => seq += 1,
                Err(error) => return Err(failed("removing", &from)(error.into())),
            }
        }
        turn.commit(seq)
    }

    /// Takes a volume away where it is there and not in use.
    fn take_away(&self, lv: &LvName) -> Result<(), StoreError> {
        if self.dir.record(lv)?.is_none() {
            return Ok(());
        }
        let turn = match self.lock_inactive(lv) {
            Err(StoreError::NotFound(_)) => return Ok(()),
            turn => turn?,
        };
        if self.dir.record(lv)?.is_none() {
            return Ok(());
        }
        self.discard(&turn, lv)
    }

    /// Makes `image`, an empty file, share all blocks of what `origin` holds now; `frozen`, where that is in use.
    fn clone_image(
        &self,
        origin: &LvName,
        frozen: Option<&Frozen>,
        image: &Path,
    ) -> Result<(), StoreError> {
        let source = self.dir.image(origin);
        if frozen.is_none()
            && let Some(device) = self.device(origin)?
        {
            if device.mounted().is_some() {
                return Err(StoreError::Busy(origin.clone()));
            }
            device.flush().map_err(failed("cloning", &source))?;
        }
        image::clone(&source, image)
    }
}

impl Store for ReflinkStore {
    fn name(&self) -> &str {
        NAME
    }

    fn clear_away(&self) -> Result<(), StoreError> {
        self.dir.sweep()
    }

    fn thaw(&self) -> Result<(), StoreError> {
        let _turn = self.lock()?;
        let loops = loops::all(IMAGE).map_err(failed("looking for loop devices in", "/sys"))?;
        for (name, _) in self.dir.records()? {
            let device = fs::metadata(self.dir.image(&name))
                .ok()
                .and_then(|image| loops.iter().find(|device| device.backs(&image)));
            match device.map(|device| self.mounted(device)) {
                Some(Ok(Some(mounted))) => freeze::thaw(&mounted),
                // One that has shut down, say: no reason to keep the others waiting.
                Some(Err(error)) => warn!(lv = %name, %error, "whether it is frozen is not known"),
                _ => {}
            }
        }
        Ok(())
    }

    fn list(&self) -> Result<Listing, StoreError> {
        let records = self.dir.records()?;
        let numbers: HashMap<LvName, u64> = records
            .iter()
            .map(|(name, record)| (name.clone(), record.seq))
            .collect();
        let loops = loops::all(IMAGE).map_err(failed("looking for loop devices in", "/sys"))?;
        let mut lvs = Vec::with_capacity(records.len());
        for (name, record) in records {
            let image = match fs::metadata(self.dir.image(&name)) {
                Ok(image) => image,
                // Removed in the meantime.
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(failed("looking at", self.dir.image(&name))(error)),
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
                    device.mounted().is_some() || image::is_held(&self.dir.image(&name))
                }),
                name,
            });
        }
        Ok(Listing {
            lvs,
            capacity: self.dir.capacity()?,
        })
    }

    fn room(&self) -> Result<Capacity, StoreError> {
        self.dir.room()
    }

    fn usage(&self) -> Result<HashMap<LvName, Usage>, StoreError> {
        let mut usages = HashMap::new();
        for (name, _) in self.dir.records()? {
            match image::usage(&self.dir.image(&name)) {
                Ok(usage) => {
                    usages.insert(name, usage);
                }
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(failed("looking at", self.dir.image(&name))(error)),
            }
        }
        Ok(usages)
    }

    fn mapped(&self, lv: &LvName) -> Result<Bytes, StoreError> {
        let image = self.dir.image(lv);
        let stat = fs::metadata(&image).map_err(failed("looking at", &image))?;
        Ok(Bytes(stat.blocks() * 512))
    }

    fn snapshot(&self, origin: &LvName, new: &NewLv) -> Result<Option<PathBuf>, StoreError> {
        self.dir.known(origin)?;
        // How long that takes a job decides, so no turn is held for it.
        let frozen = self.freeze(origin)?;
        let turn = self.lock()?;
        let cloned = Origin {
            seq: self.dir.known(origin)?.seq,
            name: origin.to_string(),
        };
        self.make(&turn, new, Some(cloned), |image| {
            self.clone_image(origin, frozen.as_ref(), image)
        })
    }

    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError> {
        let turn = self.lock()?;
        self.make(&turn, new, None, |image| image::resize(image, size))
    }

    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError> {
        let turn = self.lock()?;
        let mut record = self.dir.known(lv)?;
        let tags = retagged(&record.tags, add, del);
        if tags == record.tags {
            return Ok(());
        }
        record.tags = tags;
        let dir = self.dir.lv(lv);
        let (new, old) = (dir.join(NEW_TAGS), dir.join(TAGS));
        let written = write_record(&new, &record)
            .and_then(|()| fs::rename(&new, &old).map_err(failed("writing", &old)));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written?;
        sync_dir(&dir)?;
        turn.commit(turn.noted_seq().max(record.seq))
    }

    fn remove(&self, lv: &LvName) -> Result<(), StoreError> {
        let taken_away = self.take_away(lv);
        // What an earlier try could not free too: its volume is not there to be removed again.
        taken_away.and(self.dir.sweep())
    }

    fn grow(&self, lv: &LvName, size: Bytes) -> Result<(), StoreError> {
        let turn = self.lock()?;
        let record = self.dir.known(lv)?;
        let image = self.dir.image(lv);
        let now = fs::metadata(&image)
            .map_err(failed("looking at", &image))?
            .len();
        if size.0 > now {
            image::resize(&image, size)?;
            turn.commit(turn.noted_seq().max(record.seq))?;
        }
        // Also where a crash came between the two.
        match self.device(lv)? {
            Some(device) => device.resize().map_err(failed("growing", device.path())),
            None => Ok(()),
        }
    }

    fn activate(&self, lv: &LvName) -> Result<PathBuf, StoreError> {
        let _turn = self.lock()?;
        self.dir.known(lv)?;
        match self.device(lv)? {
            Some(device) => Ok(device.path()),
            None => loops::attach(&self.dir.image(lv))
                .map(|device| device.path())
                .map_err(failed("a loop device for", self.dir.image(lv))),
        }
    }

    fn deactivate(&self, lv: &LvName) -> Result<(), StoreError> {
        self.dir.known(lv)?;
        self.lock_inactive(lv).map(drop)
    }

    fn hold(&self, lv: &LvName) -> Result<File, StoreError> {
        image::hold(&self.dir.image(lv))
    }

    fn watch(&self) -> Watch {
        Watch {
            dir: self.dir.path().to_owned(),
            file: Some(SEQ.to_owned()),
        }
    }
}
