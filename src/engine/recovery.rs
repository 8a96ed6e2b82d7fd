// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recovery, which is start-up: what a restart finds is computed by [`Plan::of`], and acted upon here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, mem};

use serde_json::json;
use tracing::{info, warn};

use super::settle::Ended;
use super::survey::{Current, GoesOn, Plan, SeenLate, SeenLease, SeenVolume, fs_of};
use super::told::Told;
use super::volume::{
    Backing, Heard, Lease, OpenFs, Phase, RESUME, Restored, Source, Volume, may_publish,
};
use super::{Engine, EngineError, Happened, Verdict, lock, unix_now};
use crate::cache::names::VolumeName;
use crate::cache::record::Role;
use crate::cache::spec::{Reuse, Spec};
use crate::mount::{self, MountPoint, Mounted};
use crate::storage::hosts::Lost;

/// Why a lease was not published that this host had then.
const LOST: &str = "another host took this one for lost";

/// What an earlier life of ours knew of a lease.
const FAILED_BEFORE: Happened = Happened::Ended(Verdict::Failure);

impl Engine {
    /// Takes up what an earlier life left: leases that go on, leases that ended,
    /// copies that were not finished.
    pub(super) fn take_up(self: &Arc<Self>) -> Result<(), EngineError> {
        let lost = self.store.lost()?;
        let table = mount::table().map_err(|source| EngineError::Io {
            what: "reading the mount table".into(),
            source,
        })?;
        let asked = Instant::now();
        let mut listing = self.store.list()?;
        self.pending.apply(&mut listing);
        if self.hold_back(&mut listing) {
            self.upkeep.list();
        }
        let plan = Plan::of(&listing, table, &self.settings.mount_dir, &self.boot);
        self.carry_out(plan, asked, lost)
    }

    /// `asked`: when the listing was asked for that the plan was made from; `lost`: what the store says this host has lost.
    fn carry_out(
        self: &Arc<Self>,
        plan: Plan,
        asked: Instant,
        lost: Vec<Lost>,
    ) -> Result<(), EngineError> {
        let Plan {
            mut seen,
            mut goes_on,
            scratch,
            strays,
        } = plan;
        self.report_unclear(&seen.unclear);
        let entries = mem::take(&mut seen.entries);
        let base = seen.base.take();
        lock(&self.state).catalog.take_over(entries, base, asked);
        for m in &strays {
            self.clear(m);
        }
        let mut volumes: BTreeMap<VolumeName, Arc<Volume>> = BTreeMap::new();
        for found in mem::take(&mut seen.volumes) {
            let goes_on = goes_on.remove(&found.name);
            let volume = self.take_up_volume(&found, goes_on, &mut seen.lates);
            volumes.insert(found.name, volume);
        }
        for (name, m) in scratch {
            let volume = self.take_up_scratch(&name, &m)?;
            volumes.insert(name, Arc::new(volume));
        }
        lock(&self.state).has_lost = !lost.is_empty();
        for lost in lost {
            if let Some(volume) = take_up_lost(&lost) {
                let name = volume.name.clone();
                volumes.entry(name).or_insert_with(|| Arc::new(volume));
            }
        }
        seen.end_lates(&self.lease_tag());
        for lease in seen.ended {
            self.take_up_lease(lease, &volumes);
        }
        for lv in seen.leftover {
            info!(%lv, "left half-made: it is removed");
            self.upkeep.remove(lv, false);
        }
        for lv in seen.doomed {
            self.upkeep.remove(lv, true);
        }
        lock(&self.state).volumes.extend(volumes);
        self.sweep_mountpoints();
        self.upkeep.recheck();
        Ok(())
    }

    /// A volume that the store knows, in use where its lease goes on. What is mounted in a job volume leaves `lates`.
    fn take_up_volume(
        self: &Arc<Self>,
        found: &SeenVolume,
        goes_on: Option<GoesOn>,
        lates: &mut Vec<SeenLate>,
    ) -> Arc<Volume> {
        let volume = Arc::new(found.volume());
        let current = found.current.as_ref();
        let lease = match goes_on {
            Some(GoesOn::Lv(m)) => current.and_then(|current| self.go_on(&volume, current, &m)),
            Some(GoesOn::Scratch(m)) => self.go_on_scratch(&m),
            Some(GoesOn::Job { at, inside }) => self
                .go_on_job(&volume, &at, &inside, lates)
                .map(|job| {
                    // The job may have spoilt its directory. What is mounted in it is settled at its end all the same.
                    if let Err(error) = self.serve_job(&job) {
                        warn!(volume = %volume.name, %error, "its lease goes on, but its job can ask for nothing more");
                    }
                    let lv = current.map(|current| current.lv.clone());
                    Lease::new(Backing::Job { lv, job })
                })
                .inspect_err(|error| {
                    warn!(volume = %volume.name, %error, "its directory cannot be taken hold of");
                })
                .ok(),
            None => None,
        };
        if let Some(lease) = lease {
            info!(volume = %volume.name, "its lease goes on");
            let lease = self.listen_to(&volume, lease, found.created);
            lock(&volume.now).set(&RESUME, Phase::Leased(lease));
        }
        volume
    }

    /// A volume with scratch space, whose specification was never in the store, which did not serve.
    fn take_up_scratch(&self, name: &VolumeName, m: &MountPoint) -> Result<Volume, EngineError> {
        warn!(volume = %name, "scratch space of a volume that the store does not know: its options are lost");
        let spec = Spec::parse(&BTreeMap::new())?;
        let volume = Volume::new(name.clone(), spec, unix_now(), Phase::Stale(None));
        if let Some(lease) = self.go_on_scratch(m) {
            self.telling.add(name, &lease.told);
            lock(&volume.now).set(&RESUME, Phase::Leased(lease));
        }
        Ok(volume)
    }

    fn go_on(
        self: &Arc<Self>,
        volume: &Volume,
        current: &Current,
        m: &MountPoint,
    ) -> Option<Lease> {
        let mounted = Mounted::attached(&m.at)
            .inspect_err(
                |error| warn!(volume = %volume.name, %error, "its mount cannot be taken hold of"),
            )
            .ok()?;
        let mark =
            may_publish(&volume.spec).then(|| self.mark_leased(current.lv.clone(), current.failed));
        let lease = Lease {
            mark,
            ..Lease::new(Backing::Lv {
                copy: current.copy(Restored::Earlier),
                open: OpenFs {
                    mounted,
                    fs: fs_of(m),
                },
                baseline: None,
            })
        };
        if current.failed {
            // Which container that was is not known any more.
            lease.told.take("", &FAILED_BEFORE, 0);
        }
        Some(lease)
    }

    fn go_on_scratch(&self, m: &MountPoint) -> Option<Lease> {
        let mounted = Mounted::attached(&m.at).ok()?;
        Some(Lease::new(Backing::Scratch(mounted)))
    }

    /// Has what is told of a lease that goes on taken down. `made`: when its LV was, in seconds since 1970, which of
    /// one that starts afresh at each use is before it and after all others.
    fn listen_to(&self, volume: &Volume, mut lease: Lease, made: u64) -> Lease {
        if !volume.keeps() {
            let told = Told::since(made.saturating_mul(1_000_000_000));
            if lease.told.verdict() == Verdict::Failure {
                told.take("", &FAILED_BEFORE, 0);
            }
            lease.told = Arc::new(told);
        }
        self.telling.add(&volume.name, &lease.told);
        self.telling.is_found();
        lease
    }

    /// How the work did in a lease that another life of ours saw end: Docker may still know.
    fn heard_before(&self, volume: &Volume, lease: &SeenLease) -> Heard {
        let asked = self.telling.asks()
            && lease.volume.is_some()
            && !lease.cut_short
            && !volume.keeps()
            && lease.verdict == Verdict::Unknown;
        let heard = Heard {
            by_job: lease.verdict,
            told: Arc::new(Told::since(lease.made.saturating_mul(1_000_000_000))),
        };
        if asked {
            heard.told.docker_uses_it();
            self.telling.add(&volume.name, &heard.told);
            self.telling.is_found();
            self.telling.ask(&volume.name, &heard.told);
        }
        heard
    }

    /// Takes away a mount that belongs to no volume.
    fn clear(&self, m: &MountPoint) {
        warn!(at = %m.at.display(), "a mount that belongs to no lease: it is taken away");
        if let Err(error) = mount::detach_all(&m.at) {
            warn!(at = %m.at.display(), %error, "it cannot be");
        }
    }

    fn take_up_lease(
        self: &Arc<Self>,
        lease: SeenLease,
        volumes: &BTreeMap<VolumeName, Arc<Volume>>,
    ) {
        let named = lease.volume.as_ref().and_then(|name| volumes.get(name));
        let volume = match named {
            Some(volume) => Arc::clone(volume),
            None => {
                // Its volume was removed meanwhile: only the publishing is left.
                let name = VolumeName::of_lv(&lease.lv);
                let gone = Volume::new(name, lease.spec.clone(), 0, Phase::Removed);
                Arc::new(gone)
            }
        };
        if lease.published && !volume.keeps() {
            info!(volume = %volume.name, lv = %lease.lv, "its lease was published already");
            self.replace_behind(volume, lease.lv, lease.mark);
            return;
        }
        if !volume.keeps() || may_publish(&volume.spec) {
            lock(&volume.now).settling.push(lease.lv.clone());
        }
        let heard = self.heard_before(&volume, &lease);
        self.settle_behind(
            volume,
            Ended {
                lv: lease.lv,
                device: None,
                source: Source {
                    lv: lease.from,
                    ..Source::of(Restored::Earlier)
                },
                open: None,
                baseline: None,
                heard,
                discarded: false,
                lost: false,
                stuck: false,
                cut_off: false,
                cut_short: lease.cut_short,
                mark: lease.mark,
                marking: None,
                mount: Duration::ZERO,
                lasted: Duration::ZERO,
                nth: 0,
            },
        );
    }

    /// Removes mountpoints that nothing is mounted on: a stale use of one must
    /// fail, not write to the host's disk.
    fn sweep_mountpoints(&self) {
        let Ok(dirs) = fs::read_dir(&self.settings.mount_dir) else {
            return;
        };
        for dir in dirs.flatten() {
            // Refused (EBUSY) where something is mounted, and where it is not empty.
            let path: PathBuf = dir.path();
            if fs::remove_dir(&path).is_ok() {
                info!(at = %path.display(), "an empty mountpoint was removed");
            }
        }
    }
}

/// A volume that this host had when another one took it for lost, and says so where that takes something away: a lease that was
/// not settled, or what a volume kept. The volume is there again, and gets a copy as a new one does.
fn take_up_lost(lost: &Lost) -> Option<Volume> {
    let Role::Volume {
        volume,
        spec,
        lease,
        making,
        ..
    } = Role::from_tags(&lost.tags)
    else {
        return None;
    };
    let keeps = spec.reuse == Reuse::Keep && !making;
    let held = lease.is_some() || keeps;
    let Some(name) = volume else {
        warn!(lv = %lost.lv, "{LOST}: what was written in this lease is gone");
        return None;
    };
    let volume = Volume::new(name, *spec, unix_now(), Phase::Stale(None));
    if held {
        let what = if keeps { "what it kept" } else { "its lease" };
        warn!(volume = %volume.name, lv = %lost.lv, "{LOST}: {what} is gone");
        volume.tell_last(json!({
            "lv": lost.lv.as_str(),
            "published": null,
            "why": LOST,
        }));
    }
    Some(volume)
}
