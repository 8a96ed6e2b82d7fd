// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is shown of volumes: from memory, without waiting for the store.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::volume::{Backing, Lease, Phase, Prepared, Restored, Volume};
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
            host: self.store.host().map(str::to_owned),
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
        let mut status = Status::default();
        let state = match now.phase() {
            Phase::Making | Phase::Removed => return None,
            Phase::Changing => "changing",
            Phase::Stale(_) => "stale",
            Phase::Ready(copy) => {
                status.say_copy(copy);
                "ready"
            }
            Phase::Leased(lease) => {
                status.say_lease(lease);
                "mounted"
            }
        };
        status.say("state", state);
        status.say("last_lease", now.last.clone());
        Some(VolumeView {
            name: volume.name.clone(),
            created: volume.created,
            mountpoint: now.lease().map(|_| self.mountpoint(&volume.name)),
            status: status.0,
        })
    }
}

/// What is shown of a volume beside its name: what is not known is left out.
#[derive(Default)]
struct Status(Map<String, Value>);

impl Status {
    fn say(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        if !value.is_null() {
            self.0.insert(key.to_owned(), value);
        }
    }

    fn say_copy(&mut self, copy: &Prepared) {
        let source = &copy.source;
        self.say("lv", copy.lv.as_str());
        self.say("restored", source.how.as_str());
        self.say("from", source.lv.as_ref().map(LvName::as_str));
        self.say("criterion", source.criterion.as_deref());
        let age = source.created.map(|t| unix_now().saturating_sub(t));
        self.say("age_seconds", age);
        self.say("prepare_ms", millis(copy.took));
    }

    fn say_lease(&mut self, lease: &Lease) {
        match &lease.backing {
            Backing::Lv {
                copy,
                open,
                baseline,
            } => {
                self.say_copy(copy);
                let device = open.mounted.device_number();
                let written = device.and_then(crate::fs::sectors_written).ok();
                if let (Some(written), Some(baseline)) = (written, baseline) {
                    let bytes = written.saturating_sub(*baseline) * 512;
                    self.say("bytes_written", bytes);
                }
            }
            Backing::Scratch(_) => self.say("restored", Restored::Scratch.as_str()),
            Backing::Job { job, .. } => self.say("mounts", job.shown()),
        }
        self.say("mount_ms", millis(lease.took));
        let running = lease.told.running();
        if !running.is_empty() {
            self.say("containers", running);
        }
    }
}
