// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a job asks for: mounts, checkpoints, and its own result.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tracing::warn;

use super::{LateView, Saved, ended, refused};
use crate::cache::criteria::Criterion;
use crate::cache::late_path::LatePath;
use crate::cache::names::{LvName, Tag};
use crate::cache::record::entry_tags;
use crate::cache::spec::{Publish, Spec};
use crate::cache::tags::{CHECKPOINT, FAILED, SAVE};
use crate::config::JobLimits;
use crate::engine::budget::{OF_MOUNT, OF_SAVE};
use crate::engine::error::io_error;
use crate::engine::owners::own_scratch;
use crate::engine::volume::{
    Backing, Heard, Job, JobNow, LEAVE, Late, Lease, Phase, Restored, Source, Volume, may_publish,
};
use crate::engine::{Engine, EngineError, Verdict, lock, millis, tag};
use crate::mount;
use crate::storage::StoreError;
use crate::userns::Ids;

/// How much of a processor's time the kernel may take to attach a mount. It copies that to each mount of the job volume
/// that follows it, in all namespaces below the job's containers, with the lock on all mounts of the host held: 0.4 kB and
/// up to 14 µs for each (Linux 6.18; 10,000 binds of the job volume in a namespace: 0.14 s and 4 MB). A namespace takes 100,000 mounts
/// (`fs.mount-max`), beyond which attaching fails; how many namespaces there are, the job decides.
const ATTACHING: Duration = Duration::from_millis(100);

impl Engine {
    /// Mounts the best entry for a job, or what its job volume says that stands in. `peer`: the ids of
    /// the client.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn mount_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        criteria: &[Criterion],
        save: &[Tag],
        limits: &JobLimits,
        peer: &Ids,
    ) -> Result<LateView, EngineError> {
        let began = Instant::now();
        let _work = self.begin()?;
        let spec = job.spec()?.of_request(criteria, save)?;
        let _reserved = job.reserve(path, limits.mounts)?;
        job.charge(OF_MOUNT, save, limits)?;
        let place = job.place(path).map_err(|e| unplaceable(path, &e))?;
        let volume = Arc::new(Volume::late_of(&job.volume, path, spec));
        let backing = self
            .backing(&volume, Phase::Stale(None))
            .map_err(|refused| refused.error)?;
        let lease = Lease {
            took: began.elapsed(),
            ..Lease::new(backing)
        };
        self.count(&volume, &lease);
        let ids = job.ids_for(peer);
        match &lease.backing {
            Backing::Lv { open, .. } => self.map_ids(&open.mounted, &ids),
            _ => own_scratch(lease.mounted(), &volume.spec, &ids)
                .map_err(|e| unplaceable(path, &e))?,
        }
        let late = Late {
            volume,
            lease,
            place,
        };
        self.attach_late(job, path, late)
    }

    /// Attaches a mount upon its place, and has the job have it.
    fn attach_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        mut late: Late,
    ) -> Result<LateView, EngineError> {
        let own = late.lease.mounted().mount_fd();
        let mut now = lock(&job.now);
        let before = processor_time();
        let attached = if now.closed {
            Err(ended())
        } else {
            let upon = late.place.as_fd();
            own.and_then(|own| late.lease.mounted().attach_upon(upon).map(|()| own))
                .map_err(|e| unplaceable(path, &e))
        };
        now.multiplied |= took_long(job, processor_time().saturating_sub(before));
        match attached {
            Ok(place) => late.place = place,
            Err(error) => {
                drop(now);
                if let Backing::Lv { copy, open, .. } = late.lease.backing {
                    drop(open);
                    self.discard(copy.lv, None);
                }
                return Err(error);
            }
        }
        self.note_late(&mut now, &mut late);
        let view = late.view();
        now.mounts.insert(path.clone(), Some(late));
        Ok(view)
    }

    /// Notes that the lease of a cache in a job volume has begun.
    fn note_late(self: &Arc<Self>, job: &mut JobNow, late: &mut Late) {
        let Backing::Lv { copy, .. } = &late.lease.backing else {
            return;
        };
        self.note_lease(&copy.source);
        if may_publish(&late.volume.spec) {
            let failed = job.verdict == Verdict::Failure;
            if failed {
                job.failed.insert(copy.lv.clone());
            }
            late.lease.mark = Some(self.mark_leased(copy.lv.clone(), failed));
        }
    }

    /// What [`Engine::mount_late`] would restore now. Nothing, where nothing matches and that would refuse it (`on-miss=fail`).
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn lookup(&self, job: &Job, criteria: &[Criterion]) -> Result<LateView, EngineError> {
        let began = Instant::now();
        let spec = job.spec()?.of_request(criteria, &[])?;
        let (_, source) = self.choose(&spec);
        let source = source.unwrap_or(Source::of(Restored::Empty));
        Ok(LateView::of(&source, None, began.elapsed()))
    }

    /// Publishes what a late mount holds now, while the job goes on writing.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn save_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        tags: &[Tag],
        limits: &JobLimits,
    ) -> Result<Saved, EngineError> {
        let began = Instant::now();
        let _work = self.begin()?;
        let held = job.hold(path)?;
        let spec = job.spec_of_save(&held.volume, path, tags)?;
        // One checkpoint of a mount at a time; its end waits for it.
        let _op = lock(&held.volume.op);
        let entry = match self.there(&spec) {
            Some(there) => there,
            None => self.save_held(job, path, &held, &spec, tags, limits)?,
        };
        Ok(Saved {
            lv: entry,
            tags: spec.save,
            took: began.elapsed(),
        })
    }

    /// Makes a checkpoint of a mount, whose volume's `op` the caller holds. It is charged for the `tags` that were asked for.
    fn save_held(
        &self,
        job: &Job,
        path: &LatePath,
        held: &Held,
        spec: &Spec,
        tags: &[Tag],
        limits: &JobLimits,
    ) -> Result<LvName, EngineError> {
        // Before the store is asked for anything: it waits for whatever is not written yet.
        self.write_out(job, path, &held.root)?;
        let written = held
            .device
            .and_then(|device| crate::fs::sectors_written(device).ok());
        let mut of_entry = entry_tags(&spec.save, &spec.scope, held.source.lv.as_ref());
        of_entry.push(tag(CHECKPOINT));
        let entry = job.count_save(limits.saves, || {
            job.charge(OF_SAVE, tags, limits)?;
            let write_out = || self.write_out(job, path, &held.root);
            self.publish_mounted(spec, &held.lv, &of_entry, write_out)
                .inspect_err(|error| {
                    if let EngineError::Store(StoreError::Unfreezable { .. }) = error {
                        let _ = job.with_mount(path, |late| {
                            late.lease.stuck = true;
                            Ok(())
                        });
                    }
                })
        })?;
        let own = &held.volume.spec.save;
        if own.iter().all(|tag| spec.save.contains(tag)) {
            job.note_saved(path, written);
        }
        Ok(entry)
    }

    /// Has the end of a late mount not published.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn discard_late(&self, job: &Job, path: &LatePath) -> Result<(), EngineError> {
        job.with_mount(path, |late| {
            late.lease.discarded = true;
            Ok(())
        })?;
        self.withhold(job, path)
    }

    /// Has no other life of ours publish the end of a late mount either, unless the store has that already.
    fn withhold(&self, job: &Job, path: &LatePath) -> Result<(), EngineError> {
        let (lv, save, withheld) = job.with_mount(path, |late| {
            let lv = late.copy().expect("it has an LV").lv.clone();
            Ok((lv, late.volume.spec.save.clone(), late.lease.withheld))
        })?;
        if withheld || save.is_empty() {
            return Ok(());
        }
        let save: Vec<_> = save
            .iter()
            .map(|saved| tag(&format!("{SAVE}{saved}")))
            .collect();
        self.store.change_tags(&lv, &[], &save)?;
        // Nor does it matter any more where the lease has ended meanwhile.
        let _ = job.with_mount(path, |late| {
            late.lease.withheld = true;
            Ok(())
        });
        Ok(())
    }

    /// [`Job::write_out`]. The kernel says once that something could not be stored: another life of ours would not be told.
    fn write_out(&self, job: &Job, path: &LatePath, root: &OwnedFd) -> Result<(), EngineError> {
        job.write_out(path, root).inspect_err(|_| {
            let lost = job.with_mount(path, |late| Ok(late.lease.lost));
            if let Ok(true) = lost
                && let Err(error) = self.withhold(job, path)
            {
                warn!(volume = job.name(), %path, %error, "that not all of it could be stored is not known if the daemon dies now");
            }
        })
    }

    /// Takes what a job says of how it ended: that goes before how its containers end.
    ///
    /// # Errors
    /// When it could not be noted for another life of the daemon. One that takes back a failure is refused where it costs
    /// more changes than are left to the job; a failure never is.
    pub fn judge(&self, job: &Job, success: bool, limits: &JobLimits) -> Result<(), EngineError> {
        let _turn = lock(&job.judging);
        if success {
            let failed = lock(&job.now).failed.len();
            job.charge(u32::try_from(failed).unwrap_or(u32::MAX), &[], limits)?;
        }
        lock(&job.now).verdict = if success {
            Verdict::Success
        } else {
            Verdict::Failure
        };
        self.note_job(job, !success)
    }

    /// Tags or untags the LVs of a job that are not so already, as ones whose work failed.
    pub(in crate::engine) fn note_job(&self, job: &Job, failed: bool) -> Result<(), EngineError> {
        for lv in job.lvs() {
            let changed = {
                let noted = &mut lock(&job.now).failed;
                if failed {
                    noted.insert(lv.clone())
                } else {
                    noted.remove(&lv)
                }
            };
            if changed && let Err(error) = self.note_failure(&lv, failed) {
                // Which it is is not known: it is noted again next time.
                let noted = &mut lock(&job.now).failed;
                if failed {
                    noted.remove(&lv);
                } else {
                    noted.insert(lv);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Tags or untags an LV as one whose work failed.
    pub(in crate::engine) fn note_failure(
        &self,
        lv: &LvName,
        failed: bool,
    ) -> Result<(), EngineError> {
        let mark = [tag(FAILED)];
        let (add, delete): (&[Tag], &[Tag]) = if failed { (&mark, &[]) } else { (&[], &mark) };
        if failed {
            self.pending.add(lv, tag(FAILED));
        }
        self.store.change_tags(lv, add, delete)?;
        self.pending.settle(lv, &tag(FAILED));
        Ok(())
    }

    /// Ends all that is mounted in a job volume.
    pub(in crate::engine) fn end_lates(self: &Arc<Self>, job: &Job, heard: &Heard) {
        let lates = job.close();
        // All of it out of sight first: what follows waits for the store.
        for late in &lates {
            let place = format!("/proc/self/fd/{}", late.place.as_raw_fd());
            if let Err(error) = mount::detach_following(Path::new(&place)) {
                warn!(volume = job.name(), %error, "unmounting failed");
            }
        }
        for late in lates {
            drop(late.place);
            lock(&late.volume.now).set(&LEAVE, Phase::Removed);
            self.settle_lease(&late.volume, late.lease, heard.clone(), None);
        }
    }
}

/// What is needed of a mount to make a checkpoint of it.
struct Held {
    volume: Arc<Volume>,
    lv: LvName,
    source: Source,
    device: Option<(u32, u32)>,
    root: OwnedFd,
}

impl Job {
    fn hold(&self, path: &LatePath) -> Result<Held, EngineError> {
        self.with_mount(path, |late| {
            let copy = late.copy().expect("it has an LV");
            let mounted = late.lease.mounted();
            let root = mounted.root().try_clone_to_owned();
            Ok(Held {
                volume: Arc::clone(&late.volume),
                lv: copy.lv.clone(),
                source: copy.source.clone(),
                device: mounted.device_number().ok(),
                root: root.map_err(|e| io_error("holding", Path::new(path.as_str()), e))?,
            })
        })
    }

    /// The specification that a checkpoint of `volume` is published with; refused where none may be.
    fn spec_of_save(
        &self,
        volume: &Volume,
        path: &LatePath,
        tags: &[Tag],
    ) -> Result<Spec, EngineError> {
        let mut spec = volume.spec.clone();
        if !tags.is_empty() {
            spec.save = self.spec()?.of_request(&[], tags)?.save;
        }
        if spec.save.is_empty() {
            return Err(refused(format!(
                "save {path}: it has no tags: write them after its name"
            )));
        }
        if spec.publish == Publish::Never {
            return Err(refused("the job volume says publish=never"));
        }
        if spec.publish != Publish::Always && lock(&self.now).verdict == Verdict::Failure {
            return Err(refused(format!(
                "save {path}: the job said that it failed, and what a failed job leaves is not published"
            )));
        }
        Ok(spec)
    }

    /// Notes that all of a mount's own tags are on a checkpoint: unchanged from here on, its end has nothing new to publish.
    fn note_saved(&self, path: &LatePath, written: Option<u64>) {
        let _ = self.with_mount(path, |late| {
            if let Backing::Lv { copy, baseline, .. } = &mut late.lease.backing {
                *baseline = written;
                copy.source.saved = true;
            }
            Ok(())
        });
    }
}

/// Why nothing is mounted at `path`.
fn unplaceable(path: &LatePath, error: &io::Error) -> EngineError {
    let why = match Errno::from_io_error(error) {
        Some(Errno::LOOP | Errno::NOTDIR) => {
            "there is something else than a directory in this place".to_owned()
        }
        Some(Errno::XDEV) => "nothing is mounted upon a mount".to_owned(),
        _ => error.to_string(),
    };
    refused(format!("{path}: {why}"))
}

/// Whether attaching a mount took so long that the job is to get no more.
fn took_long(job: &Job, took: Duration) -> bool {
    if took <= ATTACHING {
        return false;
    }
    warn!(
        volume = job.name(),
        took_ms = millis(took),
        "mounted in very many places: the job gets no more mounts"
    );
    true
}

/// What this thread has had of a processor: unlike a clock's, waiting for others is no part of it.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}
