// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Create: a volume and its first copy; and whose job a volume is for.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tracing::{error, info};

use super::bounds::REQUEST_PATIENCE;
use super::volume::{Backing, FAILED, Lease, MADE, Phase, Volume};
use super::{Engine, EngineError, lock, unix_now};
use crate::cache::names::{Tag, VolumeName};
use crate::cache::spec::{Kind, OnError, Spec};
use crate::failpoint::reach;

impl Engine {
    /// Makes a volume; no error where it is there with the same options.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn create(
        self: &Arc<Self>,
        name: &VolumeName,
        options: &BTreeMap<String, String>,
    ) -> Result<(), EngineError> {
        let spec = Spec::parse(options)?;
        let _work = self.begin()?;
        loop {
            let fresh = Arc::new(Volume::new(
                name.clone(),
                spec.clone(),
                unix_now(),
                Phase::Making,
            ));
            let _op = lock(&fresh.op);
            let there = lock(&self.state)
                .volumes
                .entry(name.clone())
                .or_insert_with(|| Arc::clone(&fresh))
                .clone();
            if Arc::ptr_eq(&there, &fresh) {
                return self.make(&fresh);
            }
            // Somebody makes it now, or made it before: once that is done it is
            // either the same volume, or gone again.
            let _op = lock(&there.op);
            if !lock(&there.now).is_removed() {
                return if there.spec == spec {
                    Ok(())
                } else {
                    Err(EngineError::Exists(name.clone()))
                };
            }
        }
    }

    /// The first copy of a new volume, whose `op` the caller holds.
    fn make(self: &Arc<Self>, volume: &Arc<Volume>) -> Result<(), EngineError> {
        reach("create", 1);
        let copy = match volume.spec.kind {
            Kind::Cache => self
                .with_room(&volume.spec, REQUEST_PATIENCE, || {
                    self.prepare(volume, "create")
                })
                .map(Phase::Ready),
            Kind::Job => Err(EngineError::Miss(volume.name.clone())),
        };
        let made = match copy {
            Err(EngineError::Miss(_)) => self
                .with_room(&volume.spec, REQUEST_PATIENCE, || self.placeholder(volume))
                .map(|lv| Phase::Stale(Some(lv))),
            other => other,
        };
        reach("create", 4);
        match made {
            Ok(phase) => {
                lock(&volume.now).set(&MADE, phase);
                Ok(())
            }
            Err(error)
                if volume.spec.on_error == OnError::Scratch
                    && !matches!(error, EngineError::TooLarge(_)) =>
            {
                error!(volume = %volume.name, %error, "no copy could be made: on-error=scratch, only this daemon knows the volume until the store serves");
                lock(&volume.now).set(&MADE, Phase::Stale(None));
                self.upkeep.recheck();
                Ok(())
            }
            Err(error) => {
                lock(&volume.now).set(&FAILED, Phase::Removed);
                self.drop_volume(volume);
                Err(error)
            }
        }
    }

    /// Says whose job it is that a job volume with `admit=later` is for: its requests are served from
    /// now on, with these scopes. Said once; the same again changes nothing.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn admit(
        &self,
        name: &VolumeName,
        options: &BTreeMap<String, String>,
    ) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let _op = lock(&volume.op);
        let spec = volume.spec.admitted(options)?;
        if let Some(known) = volume.for_requests() {
            return if known == spec {
                Ok(())
            } else {
                Err(EngineError::Exists(name.clone()))
            };
        }
        let lv = match lock(&volume.now).phase() {
            Phase::Leased(Lease {
                backing: Backing::Job { lv, .. },
                ..
            })
            | Phase::Stale(lv) => lv.clone(),
            _ => None,
        };
        // First where another life of ours reads it: what a job was given must not be asked for again.
        if let Some(lv) = lv {
            let (old, new) = (volume.spec.to_tags(), spec.to_tags());
            let without = |all: &[Tag], others: &[Tag]| -> Vec<Tag> {
                let others: HashSet<_> = others.iter().collect();
                all.iter()
                    .filter(|tag| !others.contains(tag))
                    .cloned()
                    .collect()
            };
            self.store
                .change_tags(&lv, &without(&new, &old), &without(&old, &new))?;
        }
        info!(volume = %name, scope = spec.scope.as_ref().map_or("-", Tag::as_str), "its job is known");
        volume.admitted.send_replace(Some(spec));
        Ok(())
    }
}
