// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a volume: empty, as LVM's snapshot, or as one of what is mounted; why that failed, and what may be in its
//! way: thin devices that LVM does not know.

use std::path::PathBuf;
use std::sync::PoisonError;

use super::super::freeze::Frozen;
use super::super::{NewLv, Store as _, StoreError, Trouble};
use super::command::Command;
use super::dm::Health;
use super::owner::Urgency;
use super::repair::Strays;
use super::report::PoolUse;
use super::runner::Look;
use super::shell::Answer;
use super::{LvmStore, State, io_error};
use crate::cache::names::{LvName, Tag};
use crate::cache::tags::{DOOMED, MAKING, SNAPSHOT};
use crate::cache::units::Bytes;
use crate::mount::Mounted;
use crate::text::unix_now;

/// What LVM adds to a group's description for a thin volume, beside its name and
/// tags, in bytes; measured (about 450), and some to spare.
const LV_TEXT: usize = 700;

impl LvmStore {
    /// Makes a volume by `command`, and says what was wrong where that failed.
    pub(super) fn make(
        &self,
        command: Command,
        new: &NewLv,
        origin: Option<&LvName>,
    ) -> Result<Option<PathBuf>, StoreError> {
        let command = command
            .name("--name", &new.name)
            .tags("--addtag", &new.tags)
            // The flag keeps it from coming up at boot; to activate it once it
            // has to be ignored.
            .word("--setactivationskip=y");
        let command = if new.active {
            command.word("--ignoreactivationskip").word("--activate=y")
        } else {
            command.word("--activate=n")
        };
        let command = match origin {
            Some(origin) => command.word("--snapshot").lv(&self.vg, origin),
            None => command.name("--thinpool", &self.pool).vg(&self.vg),
        };
        let mut answer = self.run(command.clone(), Urgency::Request)?;
        let mut made = self.outcome(new, origin, &answer);
        if matches!(made, Err(StoreError::Failed(_))) {
            // A thin device that LVM does not know may have been in the way (`repair`).
            self.try_to_delete_strays();
            answer = self.run(command.clone(), Urgency::Request)?;
            made = self.outcome(new, origin, &answer);
            if matches!(made, Err(StoreError::Failed(_))) && origin.is_some() && self.displace()? {
                answer = self.run(command, Urgency::Request)?;
                made = self.outcome(new, origin, &answer);
            }
            self.try_to_delete_strays();
        }
        made?;
        if new.active && !answer.success {
            return self.activate(&new.name).map(Some);
        }
        self.known().insert(new.name.clone());
        Ok(new.active.then(|| self.device(&new.name)))
    }

    /// Makes `new` a snapshot of a volume that is mounted, without LVM's part in it: [`super`] says how.
    pub(super) fn snapshot_of_mounted(
        &self,
        origin: &LvName,
        mounted: &Mounted,
        new: &NewLv,
    ) -> Result<Option<PathBuf>, StoreError> {
        // Little is written while it is frozen.
        mounted
            .sync()
            .map_err(|e| io_error(format!("writing to {origin}"), e))?;
        let devices = self.devices();
        let (origin_id, size) = devices.thin(origin)?;
        let making = MAKING.parse::<Tag>().expect("is a tag");
        let only_now = !new.tags.contains(&making);
        let mut unfinished = NewLv {
            active: false,
            ..new.clone()
        };
        unfinished.tags.extend(only_now.then(|| making.clone()));
        self.create(&unfinished, size)?;
        let made = (|| {
            let below = devices.snapshot(self.thin_id(&new.name)?, origin, origin_id)?;
            Frozen::new(mounted, origin, Some(below))?
                .copy()
                .map_err(|e| io_error(format!("copying {origin}"), e))?;
            if only_now {
                self.change_tags(&new.name, &[], &[making])?;
            }
            new.active.then(|| self.activate(&new.name)).transpose()
        })();
        if made.is_err()
            && let Err(error) = self.remove(&new.name)
        {
            tracing::debug!(lv = %new.name, %error, "not removed yet");
        }
        made
    }

    /// The thin device id of a volume, active or not.
    fn thin_id(&self, lv: &LvName) -> Result<u64, StoreError> {
        let query = Command::query("lvs", "thin_id").lv(&self.vg, lv);
        let answer = self.run(query, Urgency::Request)?;
        let id = answer.document.lvs().next();
        id.and_then(|row| row.thin_id.parse().ok())
            .ok_or_else(|| self.failed_on(lv, &answer, false))
    }

    /// Whether a volume was made, and why it was not.
    fn outcome(
        &self,
        new: &NewLv,
        origin: Option<&LvName>,
        answer: &Answer,
    ) -> Result<(), StoreError> {
        if answer.success {
            return Ok(());
        }
        let state = self.state()?;
        match state.find(&new.name) {
            // The first of two attempts made it: names are never used twice. Or it made half of it, which is removed later.
            Some(lv) if answer.again && same_tags(&lv.tags, &new.tags) => {
                if answer.doubtful {
                    Err(self.refused(&state, &new.tags, answer))
                } else {
                    Ok(())
                }
            }
            Some(_) => Err(StoreError::Exists(new.name.clone())),
            None => match origin.filter(|origin| state.find(origin).is_none()) {
                Some(origin) => Err(StoreError::NotFound(origin.clone())),
                None => Err(self.refused(&state, &new.tags, answer)),
            },
        }
    }

    /// Why LVM refused to make or grow something whose tags are `tags`.
    pub(super) fn refused(&self, state: &State, tags: &[Tag], answer: &Answer) -> StoreError {
        match self.in_service() {
            Err(error) => error,
            Ok(health) => self
                .no_room(&state.pool, health, tags)
                .unwrap_or_else(|| StoreError::Failed(answer.reason())),
        }
    }

    /// Why no volume with `tags` is made, where that is for want of room.
    pub(super) fn no_room(
        &self,
        now: &PoolUse,
        health: Option<Health>,
        tags: &[Tag],
    ) -> Option<StoreError> {
        let text = LV_TEXT + tags.iter().map(|tag| tag.as_str().len() + 4).sum::<usize>();
        let detail = now.exhausted(&self.vg, &self.pool, text).or_else(|| {
            // Enlarged since, say, and not noticed yet.
            let illness = health?.illness?;
            let Trouble { finding, fix } = illness.told(&self.vg, &self.pool);
            Some(format!("{finding}; remove entries, or {fix}"))
        })?;
        Some(StoreError::Full {
            store: self.vg.to_string(),
            detail,
        })
    }

    /// The thin devices that LVM does not know, as far as that can be told now; `delete`: those that are left once ours
    /// are deleted.
    pub(super) fn strays(&self, delete: bool) -> Result<Strays, StoreError> {
        let _looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        let look = || self.look.lock().unwrap_or_else(PoisonError::into_inner);
        *look() = Look::Wanted { delete };
        // It is looked before any command.
        let query = Command::query("vgs", "vg_name").vg(&self.vg);
        let asked = self.run(query, Urgency::Request);
        let found = std::mem::take(&mut *look());
        asked?;
        Ok(match found {
            Look::Found(strays) => strays,
            Look::Idle | Look::Wanted { .. } => Strays::default(),
        })
    }

    fn try_to_delete_strays(&self) {
        if let Err(error) = self.strays(true) {
            tracing::debug!(%error, "thin devices that LVM does not know are not looked for");
        }
    }

    /// Has LVM take away a thin device that it does not know from where the next volume is to be: for a volume that is
    /// empty it does, for a snapshot of one that is active it does not. `false`: there is none.
    fn displace(&self) -> Result<bool, StoreError> {
        if self.strays(false)?.ids.is_empty() {
            return Ok(false);
        }
        self.change_pool()?;
        Ok(true)
    }

    /// Makes an empty volume and removes it: changes of the pool, to which LVM adds whatever it has to tell it.
    pub(super) fn change_pool(&self) -> Result<(), StoreError> {
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| StoreError::Failed(error.to_string()))?;
        let empty = NewLv {
            name: LvName::fresh(unix_now(), random),
            tags: [SNAPSHOT, DOOMED]
                .map(|tag| tag.parse().expect("is a tag"))
                .into(),
            active: false,
        };
        self.create(&empty, Bytes::mib(4))?;
        self.remove(&empty.name)
    }
}

fn same_tags(one: &[Tag], other: &[Tag]) -> bool {
    let sorted = |tags: &[Tag]| {
        let mut tags = tags.to_vec();
        tags.sort();
        tags.dedup();
        tags
    };
    sorted(one) == sorted(other)
}
