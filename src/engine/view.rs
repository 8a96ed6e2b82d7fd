// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is shown of volumes: from memory, without waiting for the store.

use std::path::PathBuf;
use std::sync::Arc;

use super::volume::{Backing, Phase, Prepared, Restored, Volume};
use super::{Engine, Stats, lock, millis, unix_now};
use crate::cache::names::{LvName, VolumeName};

/// A volume as Get and List show it.
#[derive(Debug, Clone)]
pub struct VolumeView {
    /// Its name.
    pub name: VolumeName,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// Where it is mounted, while it is.
    pub mountpoint: Option<PathBuf>,
    /// What was restored, from where, how old, how long it took, and what became
    /// of the last lease.
    pub status: serde_json::Map<String, serde_json::Value>,
}

impl Engine {
    /// What was counted since the start, and what there is now. From memory.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        let leased = |volume: &&Arc<Volume>| lock(&volume.now).lease().is_some();
        Stats {
            volumes: volumes.len(),
            leases: volumes.iter().filter(leased).count(),
            ..self.tally.stats()
        }
    }

    /// A volume, from memory: never waits for the store.
    #[must_use]
    pub fn get(&self, name: &VolumeName) -> Option<VolumeView> {
        self.view(&*self.volume(name).ok()?)
    }

    /// All volumes, from memory: never waits for the store.
    #[must_use]
    pub fn list(&self) -> Vec<VolumeView> {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        volumes
            .iter()
            .filter_map(|volume| self.view(volume))
            .collect()
    }

    fn view(&self, volume: &Volume) -> Option<VolumeView> {
        let now = lock(&volume.now);
        if matches!(now.phase(), Phase::Making | Phase::Removed) {
            return None;
        }
        let mut status = serde_json::Map::new();
        let mut say = |key: &str, value: serde_json::Value| {
            if !value.is_null() {
                status.insert(key.to_owned(), value);
            }
        };
        let mut say_copy = |copy: &Prepared| {
            say("lv", copy.lv.as_str().into());
            say("restored", copy.source.how.as_str().into());
            say("from", copy.source.lv.as_ref().map(LvName::as_str).into());
            say("criterion", copy.source.criterion.as_deref().into());
            let age = copy.source.created.map(|t| unix_now().saturating_sub(t));
            say("age_seconds", age.into());
            say("prepare_ms", millis(copy.took).into());
        };
        let mut mountpoint = None;
        let state = match now.phase() {
            Phase::Ready(copy) => {
                say_copy(copy);
                "ready"
            }
            Phase::Leased(lease) => {
                mountpoint = Some(self.mountpoint(&volume.name));
                match &lease.backing {
                    Backing::Lv {
                        copy,
                        open,
                        baseline,
                    } => {
                        say_copy(copy);
                        let device = open.mounted.device_number();
                        let written = device.and_then(crate::fs::sectors_written).ok();
                        if let (Some(written), Some(baseline)) = (written, baseline) {
                            say(
                                "bytes_written",
                                (written.saturating_sub(*baseline) * 512).into(),
                            );
                        }
                    }
                    Backing::Scratch(_) => say("restored", Restored::Scratch.as_str().into()),
                    Backing::Job { job, .. } => say("mounts", job.shown()),
                }
                say("mount_ms", millis(lease.took).into());
                let running = lease.told.running();
                if !running.is_empty() {
                    say("containers", running.into());
                }
                "mounted"
            }
            Phase::Making | Phase::Changing | Phase::Removed => "changing",
            Phase::Stale(_) => "stale",
        };
        say("state", state.into());
        say("last_lease", now.last.clone().into());
        Some(VolumeView {
            name: volume.name.clone(),
            created: volume.created,
            mountpoint,
            status,
        })
    }
}
