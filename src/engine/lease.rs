// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A lease's life in use: Mount begins it, the last Unmount ends it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use nix::sys::stat::{fstat, stat};
use tracing::{error, warn};

use super::bounds::REQUEST_PATIENCE;
use super::error::{Refusal, Refused, io_error, refuse};
use super::volume::{
    Backing, Lease, MOUNT, OpenFs, Phase, Prepared, Restored, UNMOUNT, Volume, WAIT, may_publish,
};
use super::{Engine, EngineError, lock, survey, tag, volume};
use crate::cache::names::{LvName, Tag, VolumeName};
use crate::cache::spec::{Kind, OnError};
use crate::cache::tags::{FAILED, LEASE, MAKING};
use crate::failpoint::reach;
use crate::mount::{self, Mounted};
use crate::storage::StoreError;
use crate::userns::Ids;

/// How long Unmount waits for its own work before it answers. Podman gives up
/// after 5 seconds, and then never unmounts that volume again.
const UNMOUNT_ANSWER: Duration = Duration::from_secs(3);

impl Engine {
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
            if let Some(lease) = now.lease_mut()
                && lease.is_at(&at)
            {
                self.is_used_by(lease, id);
                return Ok(at);
            }
            now.begin(&MOUNT)
                .ok_or_else(|| EngineError::NoSuchVolume(name.clone()))?
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
                now.set(&volume::LEASE, Phase::Leased(lease));
                drop(now);
                Ok(at)
            }
            Err(refused) => {
                lock(&volume.now).set(&WAIT, refused.phase);
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
    pub(super) fn count(&self, volume: &Volume, lease: &Lease) {
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
    pub(super) fn backing(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        phase: Phase,
    ) -> Result<Backing, Refused> {
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
                if let Err(refused) = self.may_begin(volume) {
                    return Err(refuse(Phase::Ready(copy), refused));
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
            Phase::Making | Phase::Changing | Phase::Leased(_) | Phase::Removed => (None, None),
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

    /// Refuses a lease of a copy that waits, where the store has no room for what it writes, or takes nothing of it.
    fn may_begin(&self, volume: &Volume) -> Result<(), EngineError> {
        if !volume.keeps() {
            return self.with_room(&volume.spec, REQUEST_PATIENCE, || self.room_for_lease());
        }
        // What it holds is nowhere else, and may be what is to be cleared away.
        match self.room_for_lease() {
            Err(shut_out @ EngineError::Store(StoreError::ShutOut { .. })) => Err(shut_out),
            _ => Ok(()),
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
        let mounted = Mounted::scratch(size, survey::SCRATCH_SOURCE).map_err(failed)?;
        crate::fs::dress(mounted.root(), volume.spec.owner, volume.spec.mode).map_err(failed)?;
        Ok(mounted)
    }

    /// Marks an LV as leased, so that the lease's end is not forgotten if we die
    /// between it and its settlement. In the store behind Mount's answer: until it is written
    /// there, another life of ours learns it from what is [`Pending`]. In use, it is not being made any more (a late
    /// mount's is, up to here); `failed` says that its work is known to have.
    pub(super) fn mark_leased(
        self: &Arc<Self>,
        lv: LvName,
        failed: bool,
    ) -> thread::JoinHandle<()> {
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

    pub(super) fn lease_tag(&self) -> Tag {
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
        let clients: Vec<_> = match lock(&self.volume(name)?.now).phase() {
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
            let Some(lease) = now.lease_mut() else {
                return;
            };
            if self.telling.asks_about(id) {
                lease.told.docker_uses_it();
            }
            lease.ids.remove(id);
            if !lease.ids.is_empty() {
                return;
            }
            let Some(Phase::Leased(lease)) = now.begin(&UNMOUNT) else {
                return;
            };
            lease
        };
        let next = self.end(volume, lease);
        lock(&volume.now).set(&WAIT, next);
    }
}

impl Lease {
    /// Whether it is still what one sees at its mountpoint.
    fn is_at(&self, at: &Path) -> bool {
        matches!((stat(at), fstat(self.mounted().root())), (Ok(seen), Ok(held)) if seen.st_dev == held.st_dev)
    }
}
