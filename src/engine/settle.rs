// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end of a lease: flush, last close, verdict, publish or drop, next copy.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::json;
use tracing::{debug, info, warn};

use super::bounds::PUBLISH_PATIENCE;
use super::publish::{End, Outcome, refusal};
use super::volume::{
    Backing, Heard, Lease, OpenFs, Phase, Premounted, Prepared, REPLACE, Restored, Slot, Source,
    Volume, WAIT, may_publish,
};
use super::{Engine, EngineError, Tally, Verdict, io_error, lock, millis, tag, unix_now};
use crate::cache::names::{LvName, Tag};
use crate::cache::record::entry_tags;
use crate::cache::spec::Spec;
use crate::cache::tags::FAILED;
use crate::failpoint::reach;
use crate::fs::Content;
use crate::mount::{self, Mounted};
use crate::storage::StoreError;
use crate::userns::Ids;

/// How long a file system may stay mounted after its lease before that is
/// reported: a mount namespace somewhere holds on to it.
const STILL_MOUNTED: Duration = Duration::from_secs(10);

/// The first and the longest pause before a store that does not serve is asked again at the end of a lease.
const AGAIN: (Duration, Duration) = if cfg!(test) {
    (Duration::from_millis(1), Duration::from_millis(1))
} else {
    (Duration::from_secs(1), Duration::from_secs(30))
};

/// A lease that has ended, until it is settled.
#[derive(Debug)]
pub(super) struct Ended {
    pub lv: LvName,
    pub device: Option<PathBuf>,
    pub source: Source,
    /// `None` where another life of the daemon saw its end.
    pub open: Option<OpenFs>,
    /// Sectors written when it began.
    pub baseline: Option<u64>,
    /// How its work did, as far as that is told yet.
    pub heard: Heard,
    /// The job wants none of it published.
    pub discarded: bool,
    /// See [`Lease::lost`].
    pub lost: bool,
    /// See [`Lease::stuck`].
    pub stuck: bool,
    /// See [`Lease::cut_off`].
    pub cut_off: bool,
    /// It was cut short: by a reboot.
    pub cut_short: bool,
    /// What the LV carries as long as it is not settled.
    pub mark: Tag,
    /// Writes that, from before its end on.
    pub marking: Option<JoinHandle<()>>,
    /// How long Mount took, and the lease.
    pub mount: Duration,
    pub lasted: Duration,
    /// How many leases of its volume had begun when it ended, in this life of the daemon.
    pub nth: u64,
}

impl Ended {
    /// Has everything written, and tells how the lease ended and how many bytes
    /// were written in it, as far as that shows while it is mounted. What was deleted in it is given
    /// back, so that nothing is published that nobody sees.
    fn flush(&self, spec: &Spec) -> (End, Option<u64>) {
        let mut end = End {
            verdict: self.heard.verdict(),
            clean: !(self.cut_short || self.lost),
            changed: true,
            saved: self.source.saved,
            discarded: self.discarded,
            cut_off: self.cut_off,
        };
        let mut bytes = None;
        if let Some(open) = &self.open {
            if let Err(error) = open.mounted.sync() {
                warn!(lv = %self.lv, %error, "not everything could be written");
                end.clean = false;
            }
            let written = open
                .mounted
                .device_number()
                .and_then(crate::fs::sectors_written);
            if let (Ok(written), Some(baseline)) = (written, self.baseline) {
                bytes = Some(written.saturating_sub(baseline) * 512);
                end.changed = written != baseline;
            }
            // A thread that waits to change what is being frozen cannot be ended, nor can its daemon.
            if end.changed
                && !self.stuck
                && refusal(spec, end).is_none()
                && let Err(error) = crate::fs::trim(open.mounted.root())
            {
                debug!(lv = %self.lv, %error, "its free space is not given back");
            }
        }
        (end, bytes)
    }
}

impl Engine {
    /// Ends a lease, whose volume's `op` the caller holds: out of sight at once,
    /// settled behind it. Gives what the volume's next use starts from.
    pub(super) fn end(self: &Arc<Self>, volume: &Arc<Volume>, lease: Lease) -> Phase {
        self.telling.ask(&volume.name, &lease.told);
        reach("unmount", 1);
        let at = self.mountpoint(&volume.name);
        let heard = lease.heard();
        if let Backing::Job { job, .. } = &lease.backing {
            lock(&volume.now).last = None;
            self.end_lates(job, &heard);
        }
        // A kept volume that is not published stays mounted out of sight; only a
        // mount that is attached can be cloned, and one with a container's ids is of no use to the next.
        let plain = lease.shown.as_ref().is_some_and(Ids::is_host);
        let slot = (volume.keeps() && plain && matches!(lease.backing, Backing::Lv { .. }))
            .then(|| Slot::take(&self.premounted, self.settings.premounted))
            .flatten();
        let held = slot.and_then(|slot| Some((slot, Mounted::attached(&at).ok()?)));
        if let Err(error) = mount::detach_all(&at) {
            warn!(volume = %volume.name, %error, "unmounting failed");
        }
        reach("unmount", 2);
        // So that a client that still thinks it mounted fails loudly.
        if let Err(error) = fs::remove_dir(&at) {
            warn!(volume = %volume.name, %error, "the mountpoint could not be removed");
        }
        reach("unmount", 3);
        self.settle_lease(volume, lease, heard, held)
    }

    /// Settles a lease that is out of sight, behind the caller. Gives what the volume's next use
    /// starts from; `held` is the mount of one that keeps its content.
    pub(super) fn settle_lease(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        lease: Lease,
        heard: Heard,
        held: Option<(Slot, Mounted)>,
    ) -> Phase {
        let lasted = lease.began.elapsed();
        let (copy, open, baseline) = match lease.backing {
            Backing::Lv {
                copy,
                open,
                baseline,
            } => (copy, open, baseline),
            Backing::Job { lv, .. } => {
                info!(volume = %volume.name, lasted_ms = millis(lasted), verdict = %heard.verdict(), "job ended");
                self.upkeep.recheck();
                return Phase::Stale(lv);
            }
            Backing::Scratch(_) => {
                self.end_scratch(volume, lasted);
                return Phase::Stale(None);
            }
        };
        let fs = open.fs;
        let ended = Ended {
            lv: copy.lv.clone(),
            device: copy.device.clone(),
            source: copy.source.clone(),
            open: Some(open),
            baseline,
            heard,
            discarded: lease.discarded,
            lost: lease.lost,
            stuck: lease.stuck,
            cut_off: lease.cut_off,
            cut_short: false,
            mark: self.lease_tag(),
            marking: lease.mark,
            mount: lease.took,
            lasted,
            nth: lock(&volume.now).leases,
        };
        // Of a volume that keeps its content, only what is still to be published outlives a Remove.
        if !volume.keeps() || may_publish(&volume.spec) {
            lock(&volume.now).settling.push(ended.lv.clone());
        }
        if !volume.keeps() {
            self.settle_behind(Arc::clone(volume), ended);
            return Phase::Stale(None);
        }
        self.settle_behind(Arc::clone(volume), ended);
        let premounted = held.map(|(slot, mounted)| Premounted {
            fs: OpenFs { mounted, fs },
            _slot: slot,
        });
        Phase::Ready(kept(copy, premounted))
    }

    /// Ends a lease that used memory in place of a cache: there is nothing to settle.
    fn end_scratch(&self, volume: &Volume, lasted: Duration) {
        let story = json!({"restored": "scratch", "published": null, "why": "scratch space"});
        info!(volume = %volume.name, restored = "scratch", lasted_ms = millis(lasted), "lease ended: the store did not serve, nothing is published");
        volume.tell_last(story);
        self.upkeep.recheck();
    }

    pub(super) fn settle_behind(self: &Arc<Self>, volume: Arc<Volume>, mut ended: Ended) {
        let work = self.work();
        thread::spawn(move || {
            // Written later than it is taken away, it would stay.
            if let Some(marking) = ended.marking.take() {
                let _ = marking.join();
            }
            ended.heard.wait();
            if volume.keeps() {
                work.0.settle_kept(&volume, ended);
            } else {
                work.0.settle(&volume, ended);
            }
        });
    }

    /// [`Engine::replace`], for a lease that was settled but for that.
    pub(super) fn replace_behind(self: &Arc<Self>, volume: Arc<Volume>, lv: LvName, mark: Tag) {
        let work = self.work();
        thread::spawn(move || work.0.replace(&volume, &lv, None, &mark));
    }

    /// Settles a lease of a volume that starts afresh at each use.
    fn settle(&self, volume: &Arc<Volume>, ended: Ended) {
        let mut story = Story::of(&ended);
        let heard = ended.heard.clone();
        let lv = ended.lv.clone();
        let device = ended.device.clone();
        let mark = ended.mark.clone();
        let cut_short = ended.cut_short;
        let stopped = || {
            info!(volume = %volume.name, %lv, "the daemon stops before this lease is settled: its next start does that");
        };
        let Some((mut end, bytes)) = self.close(&volume.spec, ended) else {
            return stopped();
        };
        // A container that held on to it may have ended only now.
        end.verdict = heard.verdict();
        story.verdict = end.verdict;
        reach("publish", 2);
        let spec = &volume.spec;
        let published = self.until_it_serves(&lv, || {
            let _turn = self.turn_to_publish(spec);
            self.publish_unless(spec, refusal(spec, end), || {
                self.publish(spec, &lv, &story.source)
            })
        });
        let Some(published) = published else {
            return stopped();
        };
        reach("publish", 3);
        // Damage that only shows in use would meet every job after this one, too.
        if !end.clean
            && !cut_short
            && !end.cut_off
            && let Some(entry) = &story.source.lv
        {
            self.give_up_if_damaged(entry);
        }
        story.tell(volume, published, bytes, &self.tally);
        self.replace(volume, &lv, device, &mark);
        lock(&volume.now)
            .settling
            .retain(|settling| *settling != lv);
        reach("publish", 4);
        self.upkeep.recheck();
    }

    /// Gives a volume its next copy, then gives up the LV of its last lease: one
    /// of the two carries the volume's name at any time.
    fn replace(&self, volume: &Arc<Volume>, lv: &LvName, device: Option<PathBuf>, mark: &Tag) {
        self.pending.forget(lv);
        let _op = lock(&volume.op);
        let wants_copy = {
            let mut now = lock(&volume.now);
            if matches!(now.phase(), Phase::Stale(Some(kept)) if kept == lv) {
                return;
            }
            // One that is in use again is shown so meanwhile.
            matches!(now.phase(), Phase::Stale(None)) && now.begin(&REPLACE).is_some()
        };
        let copied = wants_copy.then(|| self.next_copy(volume, device));
        if let Some(Err(error)) = &copied {
            warn!(volume = %volume.name, %error, "no next copy yet: the next use makes one");
            let marks = [mark.clone(), tag(FAILED)];
            if let Err(error) = self.store.change_tags(lv, &[], &marks) {
                warn!(%lv, %error, "a settled lease could not be unmarked");
            }
            lock(&volume.now).set(&WAIT, Phase::Stale(Some(lv.clone())));
            return;
        }
        if let Err(error) = self.doom(lv) {
            warn!(%lv, %error, "the LV of a settled lease could not be given up yet");
        }
        if let Some(Ok(phase)) = copied {
            lock(&volume.now).set(&WAIT, phase);
        }
    }

    fn next_copy(&self, volume: &Volume, used: Option<PathBuf>) -> Result<Phase, EngineError> {
        let first = self.prepare(volume, "refresh");
        match (first, used) {
            (Ok(copy), _) => Ok(Phase::Ready(copy)),
            (Err(EngineError::Miss(_)), _) => Ok(Phase::Stale(Some(self.placeholder(volume)?))),
            // What it wrote may be published once the daemon has started again.
            (Err(error @ EngineError::Store(StoreError::ShutOut { .. })), _)
            | (Err(error), None) => Err(error),
            // What filled the pool may be this very lease: nobody needs its data any more.
            (Err(error), Some(device)) => {
                info!(volume = %volume.name, %error, "no next copy: tried again without the data of the last lease");
                crate::fs::discard_all(&device).map_err(|e| io_error("discarding", &device, e))?;
                self.with_room(&volume.spec, PUBLISH_PATIENCE, || {
                    self.prepare(volume, "refresh")
                })
                .map(Phase::Ready)
            }
        }
    }

    /// Waits until nobody has a lease's file system mounted, and finds how it ended.
    /// `None`: the daemon stops first.
    fn close(&self, spec: &Spec, ended: Ended) -> Option<(End, Option<u64>)> {
        reach("publish", 1);
        let (mut end, bytes) = ended.flush(spec);
        drop(ended.open);
        if !end.clean && ended.cut_short {
            return Some((end, bytes));
        }
        let device = match ended.device {
            Some(device) => Ok(device),
            None => self.until_it_serves(&ended.lv, || Ok(self.store.activate(&ended.lv)?))?,
        };
        let whole = (|| {
            let device = device?;
            self.wait_unmounted(&ended.lv, &device)?;
            let fs = match crate::fs::probe(&device) {
                Ok(Content::Fs(fs)) => fs,
                Ok(_) => return Ok(false),
                Err(e) => return Err(io_error("reading", &device, e).into()),
            };
            crate::fs::is_clean(&device, fs).map_err(|e| io_error("checking", &device, e).into())
        })();
        match whole {
            Ok(whole) => end.clean &= whole,
            Err(Close::Stopping) => return None,
            Err(Close::Failed(error)) => {
                warn!(lv = %ended.lv, %error, "how its lease ended is not known");
                end.clean = false;
            }
        }
        Some((end, bytes))
    }

    pub(super) fn wait_unmounted(&self, lv: &LvName, device: &Path) -> Result<(), Close> {
        let began = Instant::now();
        let mut pause = Duration::from_millis(2);
        let mut told = false;
        while mount::in_use(device).map_err(|e| io_error("opening", device, e))? {
            if began.elapsed() > STILL_MOUNTED && !told {
                warn!(%lv, "still mounted {} s after its lease: a container or a mount namespace holds on to it", STILL_MOUNTED.as_secs());
                told = true;
            }
            if !self.rest(pause) {
                return Err(Close::Stopping);
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        Ok(())
    }

    /// Does what a lease's end needs of the store, as often as that takes while the store is locked, away, or fails: until
    /// then the lease's data is nowhere else. `None`: the daemon stops first.
    fn until_it_serves<T>(
        &self,
        lv: &LvName,
        mut act: impl FnMut() -> Result<T, EngineError>,
    ) -> Option<Result<T, EngineError>> {
        let mut pause = AGAIN.0;
        loop {
            let error = match act() {
                Err(EngineError::Store(error)) if passes(&error) => error,
                Err(EngineError::Stopping) => return None,
                done => return Some(done),
            };
            if pause == AGAIN.0 {
                warn!(%lv, %error, "the end of a lease waits for the store: its data is kept until then");
            } else {
                debug!(%lv, %error, "again");
            }
            if !self.rest(pause) {
                return None;
            }
            pause = (pause * 2).min(AGAIN.1);
        }
    }

    /// Settles a lease of a volume that keeps its content: it may be in use again
    /// already, so what is published is a snapshot of a mounted file system. Of one that was removed meanwhile, it is settled
    /// as of any other.
    fn settle_kept(&self, volume: &Arc<Volume>, mut ended: Ended) {
        // What it holds is not what it was made from any more.
        ended.source.saved = false;
        let spec = &volume.spec;
        let story = Story::of(&ended);
        let lv = &ended.lv;
        let (end, bytes) = ended.flush(spec);
        let published = self.until_it_serves(lv, || {
            let _turn = self.turn_to_publish(spec);
            let _op = lock(&volume.op);
            // What another lease wrote since is that one's to publish, or not to.
            let (idle, removed) = {
                let now = lock(&volume.now);
                let last = now.leases == ended.nth;
                let idle = last && matches!(now.phase(), Phase::Ready(_));
                (idle, last && may_publish(spec) && now.is_removed())
            };
            if removed {
                return Ok(None);
            }
            let refused = refusal(spec, end)
                .or_else(|| (!idle).then_some("the volume is in use again, or removed"));
            let published = self.publish_unless(spec, refused, || {
                let tags = entry_tags(&spec.save, &spec.scope, story.source.lv.as_ref());
                self.publish_mounted(spec, lv, &tags, || match &ended.open {
                    Some(open) => (open.mounted.sync())
                        .map_err(|e| io_error("writing to", Path::new(lv.as_str()), e)),
                    None => Ok(()),
                })
            });
            if matches!(&published, Err(EngineError::Store(error)) if passes(error))
                || matches!(&published, Err(EngineError::Stopping))
            {
                return published.map(Some);
            }
            // In use again, the mark is the next lease's.
            if may_publish(spec) && idle {
                self.pending.forget(lv);
                let marks = [ended.mark.clone(), tag(FAILED)];
                if let Err(error) = self.store.change_tags(lv, &[], &marks) {
                    warn!(%lv, %error, "a settled lease could not be unmarked");
                }
            }
            let settling = &mut lock(&volume.now).settling;
            // Of this lease alone: another one of the same LV may have ended, too.
            if let Some(at) = settling.iter().position(|settling| settling == lv) {
                settling.swap_remove(at);
            }
            published.map(Some)
        });
        let Some(published) = published else {
            return;
        };
        let Some(published) = published.transpose() else {
            return self.settle(volume, ended);
        };
        story.tell(volume, published, bytes, &self.tally);
        self.upkeep.recheck();
    }
}

/// What the next use of a volume that keeps its content starts from: the same LV.
fn kept(copy: Prepared, premounted: Option<Premounted>) -> Prepared {
    Prepared {
        source: Source {
            how: Restored::Kept,
            ..copy.source
        },
        premounted,
        ..copy
    }
}

pub(super) enum Close {
    Stopping,
    Failed(EngineError),
}

impl From<Close> for EngineError {
    fn from(close: Close) -> Self {
        match close {
            Close::Stopping => Self::Stopping,
            Close::Failed(error) => error,
        }
    }
}

impl From<EngineError> for Close {
    fn from(error: EngineError) -> Self {
        Self::Failed(error)
    }
}

impl From<StoreError> for Close {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

/// Whether a store that failed so may do next time what it was asked for.
const fn passes(error: &StoreError) -> bool {
    match error {
        StoreError::Timeout { .. }
        | StoreError::OutOfService { .. }
        | StoreError::Unusable(_)
        | StoreError::Failed(_)
        | StoreError::Busy(_)
        | StoreError::Unfreezable { .. }
        | StoreError::Exec(_)
        | StoreError::Io { .. } => true,
        // What it held is gone.
        StoreError::ShutOut { .. } => false,
        StoreError::NotFound(_) | StoreError::Exists(_) | StoreError::Full { .. } => false,
    }
}

/// Counts how a lease ended, and gives the entry that it became, or why it became none.
fn count(
    volume: &Volume,
    published: Result<Outcome, EngineError>,
    tally: &Tally,
) -> (Option<LvName>, Option<String>) {
    match published {
        Ok(Ok(lv)) => {
            tally.published();
            (Some(lv), None)
        }
        Ok(Err(why)) => {
            tally.not_published(why);
            (None, Some(why.to_owned()))
        }
        Err(error) => {
            let why = error.to_string();
            tally.publish_failed(format!("{}: {why}", volume.name));
            (None, Some(why))
        }
    }
}

/// What the one log line of a lease says, apart from its end.
struct Story {
    lv: LvName,
    source: Source,
    verdict: Verdict,
    mount: Duration,
    lasted: Duration,
}

impl Story {
    fn of(ended: &Ended) -> Self {
        Self {
            lv: ended.lv.clone(),
            source: ended.source.clone(),
            verdict: ended.heard.verdict(),
            mount: ended.mount,
            lasted: ended.lasted,
        }
    }

    fn tell(
        self,
        volume: &Volume,
        published: Result<Outcome, EngineError>,
        bytes: Option<u64>,
        tally: &Tally,
    ) {
        tally.settled(self.lasted, bytes);
        let (published, why) = count(volume, published, tally);
        let source = &self.source;
        let age = source.created.map(|t| unix_now().saturating_sub(t));
        let save: Vec<_> = volume.spec.save.iter().map(|tag| tag.as_str()).collect();
        info!(
            volume = %volume.name,
            path = volume.late.as_ref().map(|(_, path)| tracing::field::display(path)),
            lv = %self.lv,
            from = source.lv.as_ref().map(tracing::field::display),
            criterion = source.criterion,
            restored = source.how.as_str(),
            age_s = age,
            mount_ms = millis(self.mount),
            lasted_ms = millis(self.lasted),
            bytes_written = bytes,
            verdict = %self.verdict,
            published = published.as_ref().map(tracing::field::display),
            tags = published.as_ref().map(|_| tracing::field::display(save.join(" "))),
            not_published = why,
            "lease ended"
        );
        volume.tell_last(json!({
            "lv": self.lv.as_str(),
            "restored": source.how.as_str(),
            "from": source.lv.as_ref().map(LvName::as_str),
            "criterion": source.criterion,
            "mount_ms": millis(self.mount),
            "lasted_ms": millis(self.lasted),
            "bytes_written": bytes,
            "verdict": self.verdict.to_string(),
            "published": published.as_ref().map(LvName::as_str),
            "why": why,
        }));
    }
}
