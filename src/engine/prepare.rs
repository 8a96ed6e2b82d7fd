// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Choosing an entry and making a copy of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use std::{fs, io};

use tracing::{error, warn};

use super::volume::{OpenFs, Premounted, Prepared, Restored, Slot, Source, Volume};
use super::{Engine, EngineError, io_error, lock, tag, unix_now};
use crate::cache::names::LvName;
use crate::cache::record::{late_tags, volume_tags};
use crate::cache::select::Choice;
use crate::cache::spec::{FsType, OnMiss, Spec};
use crate::cache::tags::{DOOMED, MAKING, SNAPSHOT};
use crate::cache::units::Bytes;
use crate::exec::ExecError;
use crate::failpoint::reach;
use crate::fs::Content;
use crate::mount::Mounted;
use crate::storage::{NewLv, StoreError};

/// How often a choice is made again when what was chosen turns out to be gone or
/// damaged. Each round gives one entry up, so this bounds one request's work.
const ROUNDS: usize = 16;

/// What a size asked for may be rounded up by, in bytes: stores round to their grain, LVM to extents of
/// 4 MiB, or of more where somebody made the group so.
const GRAIN: u64 = 256 * Bytes::MIB;

/// What a new LV holds.
#[derive(Clone, Copy)]
pub(super) enum Of<'a> {
    /// What that one holds now.
    Lv(&'a LvName),
    /// Nothing, and has so many bytes for.
    Nothing(Bytes),
}

/// A copy's file system could not be opened.
#[derive(Debug)]
pub(super) enum OpenError {
    /// What it was copied from is damaged: no file system that we mount, or one
    /// that the kernel refuses as corrupt.
    Damaged(String),
    /// Anything else.
    Other(EngineError),
}

impl From<OpenError> for EngineError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Damaged(what) => Self::Damaged(what),
            OpenError::Other(error) => error,
        }
    }
}

impl From<StoreError> for OpenError {
    fn from(error: StoreError) -> Self {
        Self::Other(error.into())
    }
}

impl Engine {
    /// What a volume with `spec` restores from now, and the catalog's generation that says so. `None`: nothing matches, and
    /// it does not want to start from anything else (`on-miss=fail`).
    pub(super) fn choose(&self, spec: &Spec) -> (u64, Option<Source>) {
        let (index, base, generation) = {
            let state = lock(&self.state);
            let catalog = &state.catalog;
            (
                Arc::clone(catalog.index()),
                catalog.base().cloned(),
                catalog.generation(),
            )
        };
        let source = match (index.choose(spec), spec.on_miss) {
            (Some(choice), _) => Some(entry_source(spec, choice)),
            (None, OnMiss::Fail) => None,
            (None, OnMiss::Empty) => Some(Source::of(Restored::Empty)),
            (None, OnMiss::Base) => Some(match base {
                Some(base) => Source {
                    lv: Some(base.lv),
                    created: Some(base.created),
                    ..Source::of(Restored::Base)
                },
                None => Source::of(Restored::Empty),
            }),
        };
        (generation, source)
    }

    /// Whether `copy` is still what its volume's next use should start from.
    pub(super) fn is_best(&self, volume: &Volume, copy: &Prepared) -> bool {
        let generation = copy.generation.load(Ordering::Relaxed);
        if volume.keeps() || generation == lock(&self.state).catalog.generation() {
            return true;
        }
        match self.choose(&volume.spec) {
            (generation, Some(best)) if best.lv == copy.source.lv => {
                copy.generation.store(generation, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    /// A new copy, mounted (detached) where the settings allow one more.
    pub(super) fn prepare(&self, volume: &Volume, stage: &str) -> Result<Prepared, EngineError> {
        let Some(slot) = Slot::take(&self.premounted, self.settings.premounted) else {
            return self.snapshot(volume, stage);
        };
        let (mut copy, fs) = self.prepare_open(volume, stage)?;
        copy.premounted = Some(Premounted { fs, _slot: slot });
        Ok(copy)
    }

    /// A new copy, mounted, attached nowhere.
    pub(super) fn prepare_open(
        &self,
        volume: &Volume,
        stage: &str,
    ) -> Result<(Prepared, OpenFs), EngineError> {
        let began = Instant::now();
        let mut round = 0;
        loop {
            round += 1;
            let mut copy = self.snapshot(volume, stage)?;
            match self.open(volume, &mut copy) {
                Ok(open) => {
                    reach(stage, 3);
                    copy.took = began.elapsed();
                    return Ok((copy, open));
                }
                Err(error) => {
                    let again = self.give_up_damaged(&copy.source, &error) && round < ROUNDS;
                    // At once: a volume whose Create fails must not come back.
                    if let Err(error) = self.doom(&copy.lv) {
                        warn!(lv = %copy.lv, %error, "a copy that was not finished could not be given up");
                    }
                    if !again {
                        return Err(error.into());
                    }
                }
            }
        }
    }

    /// Only the LV of a new copy.
    fn snapshot(&self, volume: &Volume, stage: &str) -> Result<Prepared, EngineError> {
        let began = Instant::now();
        let mut round = 0;
        loop {
            round += 1;
            let (generation, source) = self.choose(&volume.spec);
            let source = source.ok_or_else(|| EngineError::Miss(volume.name.clone()))?;
            let new = self.new_lv(volume, source.lv.as_ref(), volume.keeps(), true)?;
            let of = match &source.lv {
                Some(origin) => Of::Lv(origin),
                None => Of::Nothing(self.empty_size(&volume.spec)),
            };
            let made = self.make_lv(of, &new);
            match (made, &source.lv) {
                (Ok(device), _) => {
                    reach(stage, 2);
                    if let Err(error) = fits(&volume.spec, device.as_ref(), &source) {
                        let _ = self.doom(&new.name);
                        return Err(error);
                    }
                    self.note_copy(&source);
                    return Ok(Prepared {
                        lv: new.name,
                        device,
                        premounted: None,
                        making: volume.keeps(),
                        source,
                        generation: generation.into(),
                        took: began.elapsed(),
                    });
                }
                (Err(StoreError::NotFound(gone)), Some(origin))
                    if gone == *origin && round < ROUNDS =>
                {
                    self.forget(origin);
                }
                (Err(error), _) => return Err(error.into()),
            }
        }
    }

    /// An LV that only carries a volume's name and specification, until there is
    /// something to restore from (`on-miss=fail`).
    pub(super) fn placeholder(&self, volume: &Volume) -> Result<LvName, EngineError> {
        let new = self.new_lv(volume, None, true, false)?;
        self.make_lv(Of::Nothing(Bytes::mib(4)), &new)?;
        Ok(new.name)
    }

    /// Has the store make an LV, and keeps in mind what listings may say of it. A store that refuses, or does not answer
    /// in time, may have made it all the same, or do so yet.
    pub(super) fn make_lv(&self, of: Of<'_>, new: &NewLv) -> Result<Option<PathBuf>, StoreError> {
        let made = match of {
            Of::Lv(origin) => self.store.snapshot(origin, new),
            Of::Nothing(size) => self.store.create(new, size),
        };
        let catalog = &mut lock(&self.state).catalog;
        match &made {
            Ok(_) => catalog.make(new.name.clone(), Instant::now()),
            Err(StoreError::NotFound(_) | StoreError::Exists(_) | StoreError::Full { .. }) => {}
            Err(_) => {
                catalog.doubt(new.name.clone(), Instant::now());
                self.upkeep.list();
            }
        }
        made
    }

    fn new_lv(
        &self,
        volume: &Volume,
        from: Option<&LvName>,
        making: bool,
        active: bool,
    ) -> Result<NewLv, EngineError> {
        let mut tags = if volume.late.is_some() {
            late_tags(&volume.spec, from)
        } else {
            volume_tags(&volume.name, &volume.spec, from)
        };
        if making {
            tags.push(tag(MAKING));
        }
        Ok(NewLv {
            name: fresh_lv_name(),
            tags,
            active,
        })
    }

    fn empty_size(&self, spec: &Spec) -> Bytes {
        let base = lock(&self.state).catalog.base().map(|base| base.size);
        spec.size.or(base).unwrap_or(self.settings.empty_size)
    }

    /// Opens a copy's file system: made where there is none yet, mounted, grown,
    /// and its root given the owner and mode that the volume asks for.
    pub(super) fn open(&self, volume: &Volume, copy: &mut Prepared) -> Result<OpenFs, OpenError> {
        let spec = &volume.spec;
        let device = match &copy.device {
            Some(device) => device.clone(),
            None => self.store.activate(&copy.lv)?,
        };
        let failed = |doing: &str, e| OpenError::Other(io_error(doing, &device, e));
        let held = crate::fs::probe(&device).map_err(|e| failed("reading", e))?;
        let fs = match usable(volume, copy, held, &device).map_err(OpenError::Damaged)? {
            Some(fs) => fs,
            None => make_fs(copy, &device, spec.fs.unwrap_or_default())?,
        };
        if let Some(size) = spec.size
            && device_size(&device).map_err(|e| failed("reading", e))? < size
        {
            self.store.grow(&copy.lv, size)?;
        }
        let mounted = Mounted::device(&device, fs).map_err(|e| {
            if e.damaged {
                OpenError::Damaged(format!("{}: {e}", copy.lv))
            } else {
                failed("mounting", e.into())
            }
        })?;
        crate::fs::grow(mounted.root(), fs).map_err(|e| failed("growing the file system on", e))?;
        crate::fs::dress(mounted.root(), spec.owner, spec.mode)
            .map_err(|e| failed("setting owner and mode on", e))?;
        // So that writes from now on are the job's.
        mounted.sync().map_err(|e| failed("writing to", e))?;
        if copy.making {
            self.store.change_tags(&copy.lv, &[], &[tag(MAKING)])?;
            copy.making = false;
        }
        copy.device = Some(device);
        Ok(OpenFs { mounted, fs })
    }

    /// Gives up the entry that a copy was made from, if that is what failed.
    /// `false`: the fault is not an entry's.
    pub(super) fn give_up_damaged(&self, source: &Source, error: &OpenError) -> bool {
        let (Restored::Exact | Restored::Fallback, Some(entry)) = (source.how, &source.lv) else {
            return false;
        };
        match error {
            OpenError::Damaged(what) => self.give_up(entry, what),
            // Damage has many faces, EIO among them, which a full pool has too.
            OpenError::Other(EngineError::Io { .. }) => self.give_up_if_damaged(entry),
            OpenError::Other(_) => false,
        }
    }

    /// Gives up an entry, if that is what it is, whose file system its checker
    /// finds damaged. `false`: it is whole, or that cannot be told now.
    pub(super) fn give_up_if_damaged(&self, entry: &LvName) -> bool {
        if !lock(&self.state).catalog.has(entry) {
            return false;
        }
        match self.is_whole(entry) {
            Ok(true) => false,
            Ok(false) => self.give_up(entry, "its file system's checker finds errors"),
            Err(error) => {
                warn!(%entry, %error, "it cannot be told whether this entry is damaged");
                false
            }
        }
    }

    /// Has an entry's file system checked, on a copy that nobody wrote to.
    fn is_whole(&self, entry: &LvName) -> Result<bool, EngineError> {
        let copy = NewLv {
            name: fresh_lv_name(),
            tags: vec![tag(SNAPSHOT), tag(MAKING)],
            active: true,
        };
        let device = self.make_lv(Of::Lv(entry), &copy)?;
        let whole = (|| {
            let device = device.map_or_else(|| self.store.activate(&copy.name), Ok)?;
            match crate::fs::probe(&device).map_err(|e| io_error("reading", &device, e))? {
                Content::Fs(fs) => {
                    let whole = crate::fs::is_whole(&device, fs);
                    Ok(whole.map_err(StoreError::from)?)
                }
                Content::Blank | Content::Unknown => Ok(false),
            }
        })();
        self.discard(copy.name, None);
        whole
    }

    /// Has a damaged entry removed, unless somebody works on it: entries of ours are never active.
    fn give_up(&self, entry: &LvName, fault: &str) -> bool {
        if self.is_active(entry) {
            warn!(%entry, fault, "an entry that somebody has active is damaged, or not finished: it is not used");
            lock(&self.state).catalog.hold_back(entry.clone());
            self.forget(entry);
            return true;
        }
        error!(%entry, fault, "an entry is damaged: it is given up, and the next best used");
        self.tally.damaged(format!("{entry}: {fault}"));
        if let Err(error) = self.doom(entry) {
            warn!(%entry, %error, "a damaged entry could not be marked");
        }
        true
    }

    /// Whether an LV is active, or may be.
    fn is_active(&self, lv: &LvName) -> bool {
        self.store.list().map_or(true, |listing| {
            listing
                .lvs
                .iter()
                .any(|listed| listed.name == *lv && listed.device.is_some())
        })
    }

    /// Forgets an entry or base that is gone.
    pub(super) fn forget(&self, lv: &LvName) {
        self.tally.forget(lv);
        lock(&self.state).catalog.give_up(lv, Instant::now());
    }

    /// Commits that an LV is to be removed, and has it removed; where the first
    /// fails, the second is tried all the same.
    pub(super) fn doom(&self, lv: &LvName) -> Result<(), StoreError> {
        let marked = self.mark_doomed(lv);
        if marked.is_err() {
            self.discard(lv.clone(), None);
        }
        marked
    }

    /// Commits that an LV is to be removed, and only then has it removed; where there is no room for that mark, removes it.
    pub(super) fn mark_doomed(&self, lv: &LvName) -> Result<(), StoreError> {
        match self.store.change_tags(lv, &[tag(DOOMED)], &[]) {
            Ok(()) => self.upkeep.remove(lv.clone(), true),
            Err(StoreError::NotFound(_)) => {}
            Err(full @ StoreError::Full { .. }) => match self.store.remove(lv) {
                Err(StoreError::Busy(_)) => return Err(full),
                removed => removed?,
            },
            Err(error) => return Err(error),
        }
        self.pending.forget(lv);
        self.forget(lv);
        Ok(())
    }

    /// [`Engine::doom`], behind the caller's back: for copies that another one of
    /// the same volume has replaced already. To unmount one takes longer than to
    /// mount its successor.
    pub(super) fn discard(&self, lv: LvName, premounted: Option<Premounted>) {
        self.tally.forget(&lv);
        lock(&self.state).catalog.discard(&lv, Instant::now());
        self.upkeep.discard(lv, premounted);
    }
}

/// Which of what a copy holds it is used with; `None`: with a new file system. An error says why with neither.
fn usable(
    volume: &Volume,
    copy: &Prepared,
    held: Content,
    device: &Path,
) -> Result<Option<FsType>, String> {
    let from_entry = matches!(copy.source.how, Restored::Exact | Restored::Fallback);
    let is_kept = volume.keeps() && !copy.making;
    // An entry is taken with the file system that it has. The base and new
    // volumes are empty: they get the one that was asked for.
    match (held, volume.spec.fs) {
        (Content::Fs(fs), None) => Ok(Some(fs)),
        (Content::Fs(fs), Some(wanted)) if fs == wanted || from_entry || is_kept => Ok(Some(fs)),
        // What it holds is nowhere else: whatever that looks like now, nothing is written over it.
        (Content::Unknown | Content::Blank, _) if is_kept => Err(format!(
            "{}: no XFS or ext4 file system is found on it, and a volume with reuse=keep is never formatted again: \
             what it held may be recovered from {} (`xfs_repair`, `e2fsck -b`), and it is used again then; or remove the volume",
            copy.lv,
            device.display()
        )),
        (Content::Unknown | Content::Blank, wanted)
            if from_entry || held == Content::Unknown && wanted.is_none() =>
        {
            Err(format!(
                "{}: there is no XFS or ext4 file system on it",
                copy.lv
            ))
        }
        _ => Ok(None),
    }
}

/// Makes a copy's file system. What it was copied from is not in it any more.
fn make_fs(copy: &mut Prepared, device: &Path, fs: FsType) -> Result<FsType, OpenError> {
    crate::fs::make(device, fs).map_err(|e: ExecError| StoreError::from(e))?;
    if copy.source.how == Restored::Base {
        copy.source = Source {
            lv: copy.source.lv.take(),
            ..Source::of(Restored::Empty)
        };
    }
    Ok(fs)
}

fn entry_source(spec: &Spec, choice: Choice<'_>) -> Source {
    let entry = choice.entry;
    Source {
        how: if choice.exact {
            Restored::Exact
        } else {
            Restored::Fallback
        },
        lv: Some(entry.lv.clone()),
        created: Some(entry.created),
        tags: entry.tags.clone(),
        criterion: spec
            .restore
            .0
            .get(choice.criterion)
            .map(ToString::to_string),
        saved: entry.scope == spec.scope && spec.save.iter().all(|tag| entry.tags.contains(tag)),
    }
}

pub(super) fn fresh_lv_name() -> LvName {
    let mut random = [0; 4];
    getrandom::fill(&mut random).expect("the kernel has random numbers");
    LvName::fresh(unix_now(), random)
}

/// Refuses to hand out more than a volume may have: a file system is never shrunk.
fn fits(spec: &Spec, device: Option<&PathBuf>, source: &Source) -> Result<(), EngineError> {
    let (Some(size), Some(device), Some(origin)) = (spec.size, device, &source.lv) else {
        return Ok(());
    };
    let has = device_size(device).map_err(|e| io_error("reading", device, e))?;
    if has <= size.round_up(GRAIN) {
        return Ok(());
    }
    // A base with another file system than the volume's gives way to an empty one.
    if let (Restored::Base, Some(wanted)) = (source.how, spec.fs) {
        let held = crate::fs::probe(device).map_err(|e| io_error("reading", device, e))?;
        if !matches!(held, Content::Fs(fs) if fs == wanted) {
            return Ok(());
        }
    }
    let what = match source.how {
        Restored::Base => "the base",
        _ => "the entry to restore",
    };
    let instead = match source.how {
        Restored::Base => "on-miss=empty for a new file system of this size",
        _ => "remove that entry",
    };
    Err(EngineError::TooLarge(format!(
        "size={}: {what}, {origin}, has {has}, and a file system is never shrunk: ask for size={} or more, or {instead}",
        size.0, has.0
    )))
}

fn device_size(device: &PathBuf) -> io::Result<Bytes> {
    use std::io::{Seek, SeekFrom};
    Ok(Bytes(fs::File::open(device)?.seek(SeekFrom::End(0))?))
}
