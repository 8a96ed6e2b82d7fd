// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Eviction: when, with what is in use then. Which entries, [`crate::cache::evict`] decides.
//!
//! After a publish, at the daemon's start, by `gc`, when a lease fills the
//! store, and before a volume is refused for want of room. All of it happens on the thread that
//! removes: room that is about to be given back is no reason to evict. Of several hosts that share a store one at a time
//! evicts, by what all of them use: [`Store::begin_evicting`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::catalog::Use;
use super::volume::{Restored, Source};
use super::{Engine, EngineError, lock, unix_now};
use crate::cache::evict::{self, Entry, Policy, Trust};
use crate::cache::names::LvName;
use crate::cache::record::{Role, place, used_tag};
use crate::cache::spec::Spec;
use crate::cache::tags::{USED, USED_GRAIN};
use crate::cache::units::Bytes;
use crate::mount::{self, MountPoint};
use crate::storage::hosts::Fleet;
use crate::storage::{Capacity, Listing, Store, StoreError, Usage};

/// How long a request waits for room to be made for it: Podman gives up after 5 s.
pub(super) const REQUEST_PATIENCE: Duration = Duration::from_secs(3);

/// How long a publish waits, for which no client waits.
pub(super) const PUBLISH_PATIENCE: Duration = Duration::from_secs(60);

/// How long a store that lacks room, and has nothing to evict, is left alone, unless something is
/// published or asked for.
const FRUITLESS: Duration = Duration::from_secs(60);

/// How long another host's turn to evict is left to it before it is looked at again.
pub const OTHERS_TURN: Duration = if cfg!(test) {
    Duration::from_millis(1)
} else {
    Duration::from_secs(1)
};

/// An entry that went, or would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    /// Its LV.
    pub lv: String,
    /// Why.
    pub reason: String,
    /// Its scope.
    pub scope: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// When it was published, seconds since 1970.
    pub created: u64,
    /// When it was last of use, seconds since 1970; in the store to the hour.
    pub used: u64,
    /// Bytes that only it takes, where that was asked for and is known: its removal gives back
    /// as many at least.
    pub exclusive: Option<u64>,
}

/// The entries of a store as [`evict::plan`] takes them. In use is what a lease came from that is not settled, of any host of
/// `fleet`, or whose volume is mounted here now; and what `used` says was used within the time of `keep`.
#[must_use]
pub fn entries(
    listing: &Listing,
    fleet: Option<&Fleet>,
    mounts: &[MountPoint],
    used: &HashMap<LvName, Use>,
    keep: Duration,
) -> Vec<Entry> {
    let mut found = Vec::new();
    let mut in_use: HashSet<LvName> = fleet
        .into_iter()
        .flat_map(|fleet| &fleet.lvs)
        .filter_map(|of| match Role::from_tags(&of.lv.tags) {
            Role::Volume {
                from: Some(from),
                lease: Some(_),
                ..
            } => Some(from),
            _ => None,
        })
        .collect();
    let now = Instant::now();
    for lv in &listing.lvs {
        match Role::from_tags(&lv.tags) {
            Role::Entry {
                scope,
                tags,
                pinned,
                used: noted,
                ..
            } => found.push(Entry {
                lv: lv.name.clone(),
                seq: place(lv.seq, &lv.tags),
                created: lv.created,
                used: used.get(&lv.name).map_or(noted, |used| noted.max(used.at)),
                pinned,
                in_use: used
                    .get(&lv.name)
                    .is_some_and(|used| used.is_within(keep, now)),
                scope,
                tags,
            }),
            Role::Volume {
                from: Some(from),
                lease,
                ..
            } => {
                let mounted = || mounts.iter().any(|m| Some(m.device) == lv.device);
                if lease.is_some() || lv.device.is_some() && mounted() {
                    in_use.insert(from);
                }
            }
            _ => {}
        }
    }
    for entry in &mut found {
        entry.in_use |= in_use.contains(&entry.lv);
    }
    found
}

/// Seconds since the machine started, also those that it slept.
fn uptime() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    text.split('.').next()?.parse().ok()
}

/// What is to go of `entries` at `now`, seconds since 1970. For its age nothing goes by a clock that cannot be right.
#[must_use]
pub fn plan(
    mut entries: Vec<Entry>,
    capacity: &Capacity,
    policy: &Policy,
    now: u64,
    usage: Option<&HashMap<LvName, Usage>>,
    refused: Option<Trust>,
) -> Vec<(LvName, Evicted)> {
    let exclusive = |lv: &LvName| Some(usage?.get(lv)?.exclusive);
    let ageless;
    let policy = if evict::is_plausible(now, &entries) {
        policy
    } else {
        debug!(
            now,
            "this clock cannot be right: nothing is evicted for its age"
        );
        ageless = policy.without_ages();
        &ageless
    };
    evict::correct_times(&mut entries, now);
    let victims = evict::plan(&entries, &capacity.fill(), policy, now, exclusive, refused);
    let told = victims.into_iter().map(|victim| {
        let entry = victim.entry;
        let evicted = Evicted {
            lv: entry.lv.to_string(),
            reason: victim.reason.to_string(),
            scope: entry.scope.as_ref().map(ToString::to_string),
            tags: entry.tags.iter().map(ToString::to_string).collect(),
            created: entry.created,
            used: entry.last_use(now),
            exclusive: exclusive(&entry.lv).map(|Bytes(bytes)| bytes),
        };
        (entry.lv.clone(), evicted)
    });
    told.collect()
}

/// Commits that an entry is to be removed, and says why: see [`Store::evict`]. `None`: another host has pinned it meanwhile.
///
/// # Errors
/// What the store says.
pub fn mark(store: &dyn Store, lv: &LvName, evicted: &Evicted) -> Result<Option<bool>, StoreError> {
    let (tags, scope) = (evicted.tags.join(" "), &evicted.scope);
    let marked = match store.evict(lv) {
        Err(StoreError::Busy(_)) => {
            info!(%lv, tags, scope, "not evicted: another host has pinned it meanwhile");
            return Ok(None);
        }
        marked => marked?,
    };
    info!(%lv, reason = evicted.reason, tags, scope, "entry evicted");
    Ok(Some(marked))
}

fn mounts() -> Result<Vec<MountPoint>, StoreError> {
    mount::table().map_err(|source| StoreError::Io {
        what: "reading the mount table".to_owned(),
        source,
    })
}

fn entry_of(source: &Source) -> Option<&LvName> {
    matches!(source.how, Restored::Exact | Restored::Fallback)
        .then_some(source.lv.as_ref())
        .flatten()
}

/// A request that waits for what an eviction comes to.
pub(super) struct Ask {
    /// That a volume may have room, of a scope that is trusted so far: one round is all that is waited for.
    room: Option<Trust>,
    so_far: Vec<Evicted>,
    answer: Sender<Answer>,
}

/// What a round of eviction came to: `None` where another host has the turn.
type Answer = Result<Option<Vec<Evicted>>, String>;

impl Engine {
    /// Evicts what has to go, and says what went; with `dry_run`, what would.
    ///
    /// # Errors
    /// When the store cannot be read, or takes no change.
    pub fn gc(&self, dry_run: bool) -> Result<Vec<Evicted>, EngineError> {
        if dry_run {
            let usage = self
                .store
                .usage()
                .inspect_err(|error| debug!(%error, "space used is not known"));
            let plan = self.plan(&self.store.list()?, usage.as_ref().ok(), None)?;
            return Ok(plan.into_iter().map(|(_, evicted)| evicted).collect());
        }
        let answer = self.ask(None);
        match answer.recv() {
            Ok(Ok(evicted)) => Ok(evicted.unwrap_or_default()),
            Ok(Err(error)) => Err(StoreError::Failed(error).into()),
            Err(_) => Err(EngineError::Stopping),
        }
    }

    fn ask(&self, room: Option<Trust>) -> mpsc::Receiver<Answer> {
        let (answer, answered) = mpsc::channel();
        self.upkeep.ask(Ask {
            room,
            so_far: Vec::new(),
            answer,
        });
        answered
    }

    /// Does what needs room in the store for `spec`, and makes room as long as that is refused for want of it and
    /// there is something to evict. [`EngineError::Stopping`] where the daemon stops before that is known.
    pub(super) fn with_room<T>(
        &self,
        spec: &Spec,
        patience: Duration,
        mut act: impl FnMut() -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let until = Instant::now() + patience;
        loop {
            let full = match act() {
                Err(EngineError::Store(full @ StoreError::Full { .. })) => full,
                done => return done,
            };
            let left = until.saturating_duration_since(Instant::now());
            match self.ask(Some(Trust::of(&spec.scope))).recv_timeout(left) {
                Ok(Ok(Some(evicted))) if !evicted.is_empty() => {}
                // The host that has the turn makes room for all.
                Ok(Ok(None)) => _ = self.rest(OTHERS_TURN),
                // Whether there is anything to evict is not known: that is no "no".
                _ if self.is_stopping() => return Err(EngineError::Stopping),
                _ => return Err(full.into()),
            }
        }
    }

    /// One round of eviction, for those who asked among others; gives those who wait for more.
    pub(super) fn evict_round(&self, asks: Vec<Ask>) -> Vec<Ask> {
        let room = asks.iter().filter_map(|ask| ask.room).max();
        let round = self.evict_once(room);
        let more = match &round {
            Ok(Some(evicted)) => !evicted.is_empty(),
            Ok(None) => {
                self.upkeep.tidy_after(OTHERS_TURN);
                false
            }
            // It has said so itself.
            Err(StoreError::ShutOut { .. }) => false,
            Err(error) => {
                warn!(%error, "nothing could be evicted");
                false
            }
        };
        let mut waiting = Vec::new();
        for mut ask in asks {
            match &round {
                Ok(Some(evicted)) => {
                    ask.so_far.extend_from_slice(evicted);
                    if more && ask.room.is_none() {
                        waiting.push(ask);
                    } else {
                        let _ = ask.answer.send(Ok(Some(ask.so_far)));
                    }
                }
                Ok(None) if ask.room.is_none() => waiting.push(ask),
                Ok(None) => drop(ask.answer.send(Ok(None))),
                Err(error) => drop(ask.answer.send(Err(error.to_string()))),
            }
        }
        if more {
            // How much that gave back is known only then.
            self.upkeep.tidy_after(self.store.lag());
        }
        waiting
    }

    /// `None`: there is something to evict, and another host has the turn.
    pub(super) fn evict_once(
        &self,
        refused: Option<Trust>,
    ) -> Result<Option<Vec<Evicted>>, StoreError> {
        let listing = self.store.list()?;
        let plan = self.plan(&listing, None, refused)?;
        if plan.is_empty() {
            // One that the last round has kept.
            self.store.end_evicting();
            if self.is_short(&listing.capacity) {
                self.upkeep.fruitless();
            }
            return Ok(Some(Vec::new()));
        }
        if self.store.host().is_none() {
            return self.evict(plan).map(Some);
        }
        if !self.store.begin_evicting()? {
            return Ok(None);
        }
        // What the last turn of another host left.
        let evicted = (self.store.list())
            .and_then(|listing| self.plan(&listing, None, refused))
            .and_then(|plan| self.evict(plan));
        // How much was given back, another host would not see yet either: the turn is this host's until it finds nothing to evict.
        if !matches!(&evicted, Ok(gone) if !gone.is_empty()) {
            self.store.end_evicting();
        }
        evicted.map(Some)
    }

    fn evict(&self, plan: Vec<(LvName, Evicted)>) -> Result<Vec<Evicted>, StoreError> {
        let mut gone = Vec::with_capacity(plan.len());
        for (lv, evicted) in plan {
            if self.is_stopping() {
                break;
            }
            let Some(marked) = mark(&*self.store, &lv, &evicted)? else {
                continue;
            };
            match self.store.remove(&lv) {
                Ok(()) => {}
                Err(StoreError::Busy(_)) if marked => self.upkeep.remove(lv.clone(), true),
                // In use, and no room for the mark: another one makes it.
                Err(error @ StoreError::Busy(_)) => {
                    warn!(%lv, %error, "not evicted");
                    continue;
                }
                Err(error) => return Err(error),
            }
            self.tally.evicted();
            self.forget(&lv);
            gone.push(evicted);
        }
        Ok(gone)
    }

    fn plan(
        &self,
        listing: &Listing,
        usage: Option<&HashMap<LvName, Usage>>,
        refused: Option<Trust>,
    ) -> Result<Vec<(LvName, Evicted)>, StoreError> {
        let wall = unix_now();
        let keep = self.settings.keep_used;
        let mounts = mounts()?;
        let fleet = self.store.fleet()?;
        let entries = {
            let mut state = lock(&self.state);
            let uses = state.catalog.uses();
            let entries = entries(listing, fleet.as_ref(), &mounts, uses, keep);
            let there: HashSet<_> = entries.iter().map(|entry| &entry.lv).collect();
            state.catalog.forget_uses(keep, Instant::now(), &there);
            entries
        };
        let last = evict::last_event(&entries, wall);
        let now = uptime().map_or(wall, |passed| lock(&self.clock).now(passed, wall, last));
        let policy = &self.settings.policy;
        Ok(plan(
            entries,
            &listing.capacity,
            policy,
            now,
            usage,
            refused,
        ))
    }

    /// Has entries evicted where a lease that goes on leaves less free than there should be, and a lease cut off where that does
    /// not help. Gives whether room is short.
    pub(super) fn check_room(self: &Arc<Self>) -> bool {
        let capacity = match self.store.room() {
            // It says nothing of how full it is then.
            Err(StoreError::Full { .. }) => self.store.list().map(|listing| listing.capacity),
            known => known,
        };
        let short = match capacity {
            Ok(capacity) => {
                self.cut_off(&capacity);
                self.is_short(&capacity)
            }
            Err(error @ StoreError::OutOfService { .. }) => {
                warn!(%error, "leases go on in a store that takes no writes");
                false
            }
            Err(error) => {
                debug!(%error, "how full the store is cannot be told");
                false
            }
        };
        if short && self.upkeep.was_fruitful(FRUITLESS) {
            self.upkeep.tidy();
        }
        short
    }

    fn is_short(&self, capacity: &Capacity) -> bool {
        let bounds = capacity.fill().bounds(&self.settings.policy);
        bounds
            .iter()
            .any(|(_, space, floor)| space.missing(*floor) > 0)
    }

    /// Refuses a lease that would begin in a store without room or out of service, for its first writes would fail; and where
    /// this host is shut out, for none of it would be kept.
    pub(super) fn room_for_lease(&self) -> Result<(), EngineError> {
        match self.store.room() {
            Err(
                why @ (StoreError::Full { .. }
                | StoreError::OutOfService { .. }
                | StoreError::ShutOut { .. }),
            ) => Err(why.into()),
            Err(error) => {
                debug!(%error, "how full the store is cannot be told");
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }

    /// Takes note that something is restored from an entry.
    pub(super) fn note_copy(&self, source: &Source) {
        if let Some(entry) = entry_of(source) {
            lock(&self.state).catalog.restore_from(entry, Use::now());
        }
    }

    /// Takes note that a lease begins with what was restored from `source`.
    pub(super) fn note_lease(&self, source: &Source) {
        let mut state = lock(&self.state);
        let due = entry_of(source).filter(|entry| state.catalog.lease_from(entry, Use::now()));
        drop(state);
        self.upkeep.lease_begins(due.cloned());
    }

    /// Writes to entries that they are used now, off everybody's path.
    pub(super) fn write_use(&self, used: &HashSet<LvName>) {
        let now = unix_now();
        let Some(used_now) = used_tag(now) else {
            return;
        };
        let listing = match self.store.list() {
            Ok(listing) => listing,
            Err(error) => {
                debug!(%error, "uses are not noted");
                return;
            }
        };
        for lv in listing.lvs.iter().filter(|lv| used.contains(&lv.name)) {
            match Role::from_tags(&lv.tags) {
                Role::Entry { used, .. } if now.abs_diff(used) >= USED_GRAIN => {}
                _ => continue,
            }
            if self.is_stopping() {
                return;
            }
            let before = lv.tags.iter().filter(|tag| tag.as_str().starts_with(USED));
            let before: Vec<_> = before.cloned().collect();
            let written =
                self.store
                    .change_tags(&lv.name, std::slice::from_ref(&used_now), &before);
            if let Err(error) = written {
                debug!(lv = %lv.name, %error, "its use is not noted");
            }
        }
    }

    /// Whether a lease goes on.
    pub(super) fn has_leases(&self) -> bool {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        volumes
            .iter()
            .any(|volume| lock(&volume.now).lease().is_some())
    }
}
