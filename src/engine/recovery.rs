// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Acts on what a restart finds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use tracing::{info, warn};

use super::settle::Ended;
use super::survey::{Current, SCRATCH_SOURCE, Seen, SeenLease, fs_of};
use super::told::Told;
use super::volume::{
    Backing, Heard, Lease, OpenFs, Phase, RESUME, Restored, Source, Volume, may_publish,
};
use super::{Engine, EngineError, Happened, Verdict, job, lock, unix_now};
use crate::cache::names::VolumeName;
use crate::cache::spec::{Kind, Spec};
use crate::mount::{self, MountPoint, Mounted};

/// What an earlier life of ours knew of a lease.
const FAILED_BEFORE: Happened = Happened::Ended(Verdict::Failure);

impl Engine {
    /// Takes up what an earlier life left: leases that go on, leases that ended,
    /// copies that were not finished.
    pub(super) fn take_up(self: &Arc<Self>) -> Result<(), EngineError> {
        let (mut mounts, lates) = self.own_mounts()?;
        let asked = Instant::now();
        let mut listing = self.store.list()?;
        self.pending.apply(&mut listing);
        if self.hold_back(&mut listing) {
            self.upkeep.list();
        }
        let by_device = |m: &MountPoint| (m.fs != "tmpfs").then_some(m.device);
        let devices = mounts
            .iter()
            .filter_map(|(name, m)| Some((name.clone(), by_device(m)?)))
            .collect();
        let late_devices = lates.iter().map(|m| m.device).collect();
        let mut seen = Seen::with_mounts(&listing, &self.boot, &devices, &late_devices);
        self.report_unclear(&seen.unclear);
        lock(&self.state)
            .catalog
            .take_over(seen.entries, seen.base, asked);
        let mut volumes: BTreeMap<VolumeName, Arc<Volume>> = BTreeMap::new();
        for plan in seen.volumes {
            let volume = Arc::new(plan.volume());
            let mount = mounts.remove(&plan.name);
            let lease = match (&plan.current, mount) {
                (Some(current), Some(m)) if current.leased => self.go_on(&volume, current, &m),
                (_, Some(m)) if m.source == job::SOURCE && plan.spec.kind == Kind::Job => {
                    self.go_on_job(&volume, &m, &lates, &mut seen.lates)
                        .and_then(|job| {
                            self.serve_job(&job).map_err(io::Error::other)?;
                            let lv = plan.current.as_ref().map(|current| current.lv.clone());
                            Ok(Lease::new(Backing::Job { lv, job }))
                        })
                        .inspect_err(|error| {
                            warn!(volume = %volume.name, %error, "its directory cannot be taken hold of");
                        })
                        .ok()
                }
                (_, Some(m)) if m.fs == "tmpfs" && m.source == SCRATCH_SOURCE => {
                    self.go_on_scratch(&m)
                }
                (_, Some(m)) => {
                    self.clear(&m);
                    None
                }
                (_, None) => None,
            };
            if let Some(lease) = lease {
                info!(volume = %volume.name, "its lease goes on");
                let lease = self.listen_to(&volume, lease, plan.created);
                lock(&volume.now).set(&RESUME, Phase::Leased(lease));
            }
            volumes.insert(plan.name, volume);
        }
        for (name, m) in mounts {
            if m.fs == "tmpfs" && m.source == SCRATCH_SOURCE {
                // Its specification was never in the store, which did not serve.
                warn!(volume = %name, "scratch space of a volume that the store does not know: its options are lost");
                let spec = Spec::parse(&BTreeMap::new())?;
                let phase = Phase::Stale(None);
                let volume = Volume::new(name.clone(), spec, unix_now(), phase);
                if let Some(lease) = self.go_on_scratch(&m) {
                    self.telling.add(&name, &lease.told);
                    lock(&volume.now).set(&RESUME, Phase::Leased(lease));
                }
                volumes.insert(name, Arc::new(volume));
            } else {
                self.clear(&m);
            }
        }
        // Mounted where no job goes on, or where they could not be taken hold of: that ends them.
        for late in seen.lates {
            if late.making {
                seen.leftover.push(late.lv);
            } else {
                seen.ended.push(late.ended(&self.lease_tag()));
            }
        }
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

    /// What is mounted below our directory, by volume: the topmost where several are; and what
    /// is mounted in those.
    fn own_mounts(
        &self,
    ) -> Result<(BTreeMap<VolumeName, MountPoint>, Vec<MountPoint>), EngineError> {
        let table = mount::table().map_err(|e| EngineError::Io {
            what: "reading the mount table".into(),
            source: e,
        })?;
        let name = |m: &MountPoint| -> Option<VolumeName> {
            let below = m.at.strip_prefix(&self.settings.mount_dir).ok()?;
            below.to_str()?.parse().ok()
        };
        let mut own = BTreeMap::new();
        let mut lates = Vec::new();
        for m in table {
            match name(&m) {
                Some(name) => {
                    own.insert(name, m);
                }
                None if m.at.starts_with(&self.settings.mount_dir) => lates.push(m),
                None => {}
            }
        }
        Ok((own, lates))
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
            // Which container that was, nobody knows any more.
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
        if !volume.keeps() {
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
