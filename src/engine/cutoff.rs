// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A lease that fills the store is cut off before the store is full: a write that finds no room is an I/O error to every job
//! that has written before, whichever of them took the room.
//!
//! Its file system is shut down, so that whatever uses it gets EIO, and it is never published. What it wrote
//! is given back to the store at once, but for a volume that keeps its content.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use tracing::{debug, warn};

use super::volume::{Backing, Lease, Volume};
use super::{Engine, lock};
use crate::cache::evict::Trust;
use crate::cache::names::LvName;
use crate::cache::units::Bytes;
use crate::fs;
use crate::storage::Capacity;

/// What has to be taken since the last lease was cut off for another to be, as a share of what is to be free.
const AGAIN: f64 = 0.1;

/// A lease that wrote less than the heaviest by this factor has no part in it, however little it is trusted.
const LITTLE: u64 = 10;

/// A lease that may be cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Writer {
    trust: Trust,
    /// Bytes that it can have taken from the store at most.
    taken: u64,
}

/// Which of them goes first: of those that wrote much the least trusted, and of these the one that wrote most.
fn first(writers: &[Writer]) -> Option<usize> {
    let heaviest = writers.iter().map(|writer| writer.taken).max()?;
    let much = |writer: &Writer| writer.taken > 0 && writer.taken >= heaviest / LITTLE;
    let order = |writer: &Writer| (writer.trust, std::cmp::Reverse(writer.taken));
    let writers = writers.iter().enumerate();
    let heavy = writers.filter(|(_, writer)| much(writer));
    heavy
        .min_by_key(|(_, writer)| order(writer))
        .map(|(at, _)| at)
}

/// What is needed of a lease to cut it off.
struct Found {
    volume: Arc<Volume>,
    lv: LvName,
    device: (u32, u32),
    root: OwnedFd,
    baseline: u64,
}

impl Found {
    /// A lease with an LV that is not cut off yet.
    fn of(volume: &Arc<Volume>, lease: &Lease) -> Option<Self> {
        match &lease.backing {
            Backing::Lv {
                copy,
                open,
                baseline,
            } if !lease.cut_off => Some(Self {
                volume: Arc::clone(volume),
                lv: copy.lv.clone(),
                device: open.mounted.device_number().ok()?,
                root: open.mounted.root().try_clone_to_owned().ok()?,
                baseline: baseline.unwrap_or(0),
            }),
            _ => None,
        }
    }
}

impl Engine {
    /// Cuts off one lease, where less is free than the policy wants for that, and less than when another was last cut off.
    pub(super) fn cut_off(self: &Arc<Self>, capacity: &Capacity) {
        let space = capacity.fill().data;
        let floor = self.settings.policy.cut_off;
        let last = &mut lock(&self.state).last_cut;
        if !space.is_below(floor) {
            *last = None;
            return;
        }
        let step = AGAIN * (100.0 - space.share(floor));
        if last.is_some_and(|last| space.percent < last + step) {
            return;
        }
        *last = Some(space.percent);
        let engine = Arc::clone(self);
        let percent = space.percent;
        thread::spawn(move || engine.cut_off_first(percent));
    }

    fn cut_off_first(self: &Arc<Self>, percent: f64) {
        let mut found = self.writers();
        let writers: Vec<_> = found.iter().map(|found| self.weigh(found)).collect();
        let Some(at) = first(&writers) else {
            debug!("the store is nearly full, and no lease has filled it");
            return;
        };
        let Found {
            volume,
            lv,
            device,
            root,
            ..
        } = found.swap_remove(at);
        let (volume_name, wrote) = (&volume.name, Bytes(writers[at].taken));
        warn!(volume = %volume_name, %lv, %wrote, "the store is full to {percent:.1} %: the lease that filled it is cut off, and is not published");
        self.with_lease(&volume, |lease| lease.cut_off = true);
        if let Err(error) = fs::shut_down(std::os::fd::AsFd::as_fd(&root)) {
            warn!(%lv, %error, "its file system could not be shut down");
            return;
        }
        if !volume.keeps()
            && let Err(error) = fs::device_node(device).and_then(|node| fs::discard_all(&node))
        {
            warn!(%lv, %error, "what it wrote is not given back before its end");
        }
    }

    /// All leases that have something to write to.
    fn writers(&self) -> Vec<Found> {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        let mut found = Vec::new();
        for volume in volumes {
            let job = match lock(&volume.now).lease() {
                Some(lease) => match &lease.backing {
                    Backing::Job { job, .. } => Arc::clone(job),
                    _ => {
                        found.extend(Found::of(&volume, lease));
                        continue;
                    }
                },
                None => continue,
            };
            job.each_lease(|late, lease| found.extend(Found::of(late, lease)));
        }
        found
    }

    /// What a lease can have taken: no more than it wrote, and no more than it maps.
    fn weigh(&self, found: &Found) -> Writer {
        let sectors = fs::sectors_written(found.device).unwrap_or(0);
        let written = sectors.saturating_sub(found.baseline) * 512;
        let mapped = (self.store.mapped(&found.lv))
            .inspect_err(|error| debug!(lv = %found.lv, %error, "what it maps is not known"));
        Writer {
            trust: Trust::of(&found.volume.spec.scope),
            taken: mapped.map_or(written, |mapped| written.min(mapped.0)),
        }
    }

    /// Changes the lease of a volume, a late mount's too, if it goes on.
    fn with_lease(&self, volume: &Arc<Volume>, mut change: impl FnMut(&mut Lease)) {
        let Some((of_job, _)) = &volume.late else {
            if let Some(lease) = lock(&volume.now).lease_mut() {
                change(lease);
            }
            return;
        };
        let job = of_job
            .upgrade()
            .and_then(|of_job| match lock(&of_job.now).lease() {
                Some(Lease {
                    backing: Backing::Job { job, .. },
                    ..
                }) => Some(Arc::clone(job)),
                _ => None,
            });
        if let Some(job) = job {
            job.each_lease(|late, lease| {
                if Arc::ptr_eq(late, volume) {
                    change(lease);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Trust::{Full, Lesser};

    #[test]
    fn the_heaviest_of_least_trust_goes_first() {
        for (writers, want) in [
            (&[][..], None),
            (&[(Full, 0)], None),
            (&[(Full, 5), (Full, 9), (Full, 7)], Some(1)),
            (&[(Full, 50), (Lesser, 9), (Lesser, 20)], Some(2)),
            // Who wrote little has not filled it.
            (&[(Full, 500), (Lesser, 9)], Some(0)),
            (&[(Full, 500), (Lesser, 50)], Some(1)),
        ] {
            let all: Vec<_> = writers
                .iter()
                .map(|&(trust, taken)| Writer { trust, taken })
                .collect();
            assert_eq!(first(&all), want, "{writers:?}");
        }
    }
}
