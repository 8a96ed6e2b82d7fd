// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What hooks, the supervisor and Docker report of containers that use volumes.

use std::sync::Arc;
use std::thread;

use tracing::warn;

use super::told::Told;
use super::volume::{Backing, Phase, Volume, may_publish};
use super::{Engine, Happened, Verdict, lock};
use crate::cache::names::VolumeName;

impl Engine {
    /// Takes what is said of a container that uses a volume's present lease, at once, whatever the store or the volume is
    /// busy with. Nothing happens where there is no such lease. `true`: it is to be written down for another life of the
    /// daemon, by [`Engine::write_verdict`].
    pub fn container(&self, name: &VolumeName, container: &str, happened: &Happened) -> bool {
        let Ok(volume) = self.volume(name) else {
            return false;
        };
        let now = lock(&volume.now);
        match now.phase() {
            Phase::Leased(lease) => {
                if let Backing::Job { job, .. } = &lease.backing {
                    job.note_container(container, happened);
                }
                let failed = || lease.heard().verdict() == Verdict::Failure;
                let before = failed();
                lease.told.hear(container, happened);
                before != failed()
            }
            // Its end is under way, and its settlement looks at this.
            Phase::Changing => {
                if let Some(told) = self.telling.newest(name) {
                    told.hear(container, happened);
                }
                false
            }
            Phase::Making | Phase::Stale(_) | Phase::Ready(_) | Phase::Removed => false,
        }
    }

    /// Has the store know whether the work in a volume's present lease has failed, so that another life of the daemon does.
    pub fn write_verdict(self: &Arc<Self>, name: &VolumeName) {
        let Ok(volume) = self.volume(name) else {
            return;
        };
        let _work = self.work();
        let _op = lock(&volume.op);
        let told = match lock(&volume.now).lease() {
            Some(lease) => Arc::clone(&lease.told),
            None => return,
        };
        self.note_verdict(&volume, &told);
    }

    /// Takes what Docker says of a container that uses a volume, or used it, which happened `at`, in nanoseconds since
    /// 1970. At once: what is to be written of it is written behind the caller.
    pub fn docker_container(
        self: &Arc<Self>,
        name: &VolumeName,
        container: &str,
        happened: &Happened,
        at: u64,
    ) {
        let Some(told) = self.telling.take(name, container, happened, at) else {
            return;
        };
        if let Ok(volume) = self.volume(name) {
            let work = self.work();
            thread::spawn(move || {
                let _op = lock(&volume.op);
                work.0.note_verdict(&volume, &told);
            });
        }
    }

    /// Takes Docker's word that a container of a volume does not run, when it was last started and ended, in
    /// nanoseconds since 1970, and how.
    pub fn docker_container_is_done(
        &self,
        name: &VolumeName,
        container: &str,
        times: (u64, u64),
        verdict: Verdict,
    ) {
        self.telling.does_not_run(name, container, times, verdict);
    }

    /// Docker has told of each container that used the volume until `at`, in nanoseconds since 1970.
    pub fn docker_named_all(&self, name: &VolumeName, at: u64) {
        self.telling.all_named(name, at);
    }

    /// Docker will tell no more of leases that have ended: of those of this volume that had by then, in nanoseconds since
    /// 1970; or of any.
    pub fn docker_tells_no_more(&self, of: Option<(&VolumeName, u64)>) {
        self.telling.give_up(of);
    }

    /// The volumes whose leases are not settled: of those Docker may have something to tell.
    #[must_use]
    pub fn volumes_in_use(&self) -> Vec<VolumeName> {
        self.telling.volumes()
    }

    /// Whether a lease of the volume has ended, and how its containers did is still to be told by Docker.
    #[must_use]
    pub fn awaits_docker(&self, name: &VolumeName) -> bool {
        self.telling.is_awaited(name)
    }

    /// Notes in the store whether the work of a volume's present lease has failed, so that no other life of ours
    /// publishes what did. Its `op` the caller holds.
    fn note_verdict(&self, volume: &Volume, told: &Arc<Told>) {
        let (lvs, job, failed) = {
            let now = lock(&volume.now);
            let Some(lease) = now.lease() else {
                return;
            };
            if !Arc::ptr_eq(&lease.told, told) {
                return;
            }
            let lvs = match &lease.backing {
                Backing::Lv { copy, .. } if may_publish(&volume.spec) => vec![copy.lv.clone()],
                Backing::Job { .. } | Backing::Lv { .. } | Backing::Scratch(_) => Vec::new(),
            };
            let job = match &lease.backing {
                Backing::Job { job, .. } => Some(Arc::clone(job)),
                Backing::Lv { .. } | Backing::Scratch(_) => None,
            };
            (lvs, job, lease.heard().verdict() == Verdict::Failure)
        };
        let noted = job.map_or(Ok(()), |job| self.note_job(&job, failed));
        if let Err(error) = noted {
            warn!(volume = %volume.name, %error, "how its work ended could not be noted: it is not known if the daemon dies now");
        }
        for lv in lvs {
            if let Err(error) = self.note_failure(&lv, failed) {
                warn!(volume = %volume.name, %error, "how its work ended could not be noted: it is not known if the daemon dies now");
            }
        }
    }
}
