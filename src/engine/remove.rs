// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Remove: a volume is no more once no LV bears its name.

use std::sync::Arc;

use tracing::{info, warn};

use super::volume::{Phase, REMOVE, REMOVED, Volume, WAIT, may_publish};
use super::{Engine, EngineError, lock, tag};
use crate::cache::names::{LvName, VolumeName};
use crate::cache::record::Role;
use crate::cache::tags::VOLUME;
use crate::failpoint::reach;
use crate::storage::StoreError;

impl Engine {
    /// Removes a volume that is not in use; a lease whose users are gone without an Unmount ends.
    ///
    /// # Errors
    /// [`EngineError::InUse`], and see [`EngineError`].
    pub fn remove(self: &Arc<Self>, name: &VolumeName) -> Result<(), EngineError> {
        self.remove_unless(name, |volume| {
            self.users_of(volume).map(|users| EngineError::InUse {
                name: name.clone(),
                users,
                at: self.mountpoint(name),
            })
        })
    }

    /// Removes a volume, in use or not; a lease that goes on ends.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn remove_by_force(self: &Arc<Self>, name: &VolumeName) -> Result<(), EngineError> {
        self.remove_unless(name, |volume| {
            if let Some(users) = self.users_of(volume) {
                warn!(volume = %name, users, "removed by force while it is in use");
            }
            None
        })
    }

    fn remove_unless(
        self: &Arc<Self>,
        name: &VolumeName,
        refusal: impl FnOnce(&Volume) -> Option<EngineError>,
    ) -> Result<(), EngineError> {
        let _work = self.begin()?;
        let volume = self.volume(name)?;
        let _op = lock(&volume.op);
        if let Some(refused) = refusal(&volume) {
            return Err(refused);
        }
        let phase = {
            let mut now = lock(&volume.now);
            now.begin(&REMOVE)
                .ok_or_else(|| EngineError::NoSuchVolume(name.clone()))?
        };
        let phase = match phase {
            Phase::Leased(lease) => self.end(&volume, lease),
            other => other,
        };
        let current = match &phase {
            Phase::Ready(copy) => Some(&copy.lv),
            Phase::Stale(lv) => lv.as_ref(),
            Phase::Making | Phase::Changing | Phase::Leased(_) | Phase::Removed => None,
        };
        match self.remove_lvs(&volume, current) {
            Ok(()) => {
                self.persist();
                lock(&volume.now).set(&REMOVED, Phase::Removed);
                self.drop_volume(&volume);
                info!(volume = %name, "removed");
                Ok(())
            }
            Err(error) => {
                lock(&volume.now).set(&WAIT, phase);
                Err(error)
            }
        }
    }

    /// Commits that a volume is no more, before anybody is told so: no LV bears its
    /// name any longer. The store says which do, copies that were replaced and wait
    /// for their removal among them; the current one goes last.
    fn remove_lvs(&self, volume: &Volume, current: Option<&LvName>) -> Result<(), EngineError> {
        reach("remove", 1);
        let settling = lock(&volume.now).settling.clone();
        let mut lvs = self.store.list()?.lvs;
        // What only looks half ours may bear the name too.
        lvs.retain(|lv| match Role::from_tags(&lv.tags) {
            Role::Volume { volume: of, .. } => of.as_ref() == Some(&volume.name),
            _ => false,
        });
        lvs.sort_by_key(|lv| Some(&lv.name) == current);
        let name = tag(&format!("{VOLUME}{}", volume.name));
        for lv in lvs {
            if !settling.contains(&lv.name) || !may_publish(&volume.spec) {
                self.mark_doomed(&lv.name)?;
                continue;
            }
            // What the lease wrote is still to be published, under no volume's name.
            match self
                .store
                .change_tags(&lv.name, &[self.lease_tag()], std::slice::from_ref(&name))
            {
                Err(StoreError::NotFound(_)) => {}
                other => other?,
            }
        }
        reach("remove", 2);
        Ok(())
    }
}
