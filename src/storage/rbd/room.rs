// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much room there is in the pool, and what a volume takes of it.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ceph::{CephError, Image};
use super::index::{Content, Index, Volume};
use super::{LIMIT, Shared};
use crate::cache::units::Bytes;
use crate::storage::{Capacity, StoreError, Usage};

/// How long an answer of `ceph df` is good for: it is some seconds old as it comes ([`super::LAG`]).
const FRESH: Duration = Duration::from_secs(2);

impl Shared {
    /// How full the pool is, or was two seconds ago.
    pub(super) fn capacity(&self) -> Result<Capacity, StoreError> {
        let known = || self.capacity.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = Instant::now();
        if let Some((since, capacity)) = &*known()
            && asked.duration_since(*since) < FRESH
        {
            return Ok(*capacity);
        }
        let capacity = self.ask_capacity()?;
        *known() = Some((asked, capacity));
        Ok(capacity)
    }

    fn ask_capacity(&self) -> Result<Capacity, StoreError> {
        let answer = self
            .pool
            .cluster()
            .ask(&json!({"prefix": "df", "detail": "detail", "format": "json"}))
            .map_err(|error| self.failed(&error))?;
        capacity(&answer, &self.place.pool).ok_or_else(|| {
            StoreError::Failed(format!(
                "{}: `ceph df` says nothing of pool {}",
                self.name, self.place.pool
            ))
        })
    }

    pub(super) fn check_room(&self) -> Result<Capacity, StoreError> {
        let capacity = self.capacity()?;
        if capacity.data_size.0 == 0 {
            return Err(StoreError::OutOfService {
                store: self.name.clone(),
                detail:
                    "the cluster does not say how full the pool is: does a manager run (`ceph -s`)?"
                        .to_owned(),
            });
        }
        if capacity.data_percent < capacity.data_limit {
            return Ok(capacity);
        }
        Err(StoreError::Full {
            store: self.name.clone(),
            detail: format!(
                "pool {} is {:.0} % full of {}, and nothing is made from {:.0} % on: remove entries, or give it room (`ceph df detail`)",
                self.place.pool, capacity.data_percent, capacity.data_size, capacity.data_limit
            ),
        })
    }

    /// What a volume takes, counted in whole objects of its image.
    pub(super) fn usage(&self, index: &Index, volume: &Volume) -> Result<Usage, CephError> {
        let at = match &volume.content {
            Content::Own { .. } => None,
            Content::At(at) => Some(at.snapshot.as_str()),
        };
        let name = volume.content.image();
        let image = index.images.get(name);
        let mut snapshots: Vec<(u64, &str)> = image
            .into_iter()
            .flat_map(|image| &image.snapshots)
            .map(|(name, snapshot)| (snapshot.at, name.as_str()))
            .collect();
        snapshots.sort_unstable();
        let opened = self.pool.look_at(name, at)?;
        let mapped = opened.differs(None, true)?.0;
        let exclusive = match at {
            // Nothing is shared but with its own snapshots, of which the last has the most.
            None => {
                opened
                    .differs(snapshots.last().map(|(_, name)| *name), false)?
                    .0
            }
            Some(at) => {
                let this = volume.content.snapshot();
                let shared = index
                    .volumes
                    .values()
                    .filter(|other| other.content.snapshot() == this)
                    .count()
                    > 1
                    || index.images.values().any(|image| image.parent == this);
                let place = snapshots.iter().position(|(_, name)| *name == at);
                match place {
                    Some(place) if !shared => self.only_at(name, &opened, &snapshots, place)?,
                    _ => 0,
                }
            }
        };
        Ok(Usage {
            mapped: Bytes(mapped),
            exclusive: Bytes(exclusive),
        })
    }

    /// What is in the snapshot at `place` and in no later one, nor in the head, nor in the one before.
    pub(super) fn only_at(
        &self,
        name: &str,
        opened: &Image<'_>,
        snapshots: &[(u64, &str)],
        place: usize,
    ) -> Result<u64, CephError> {
        let before = place.checked_sub(1).map(|place| snapshots[place].1);
        let own = opened.differs(before, false)?.0;
        let next = snapshots.get(place + 1).map(|(_, name)| *name);
        let next = self.pool.look_at(name, next)?;
        let (changed, gone) = next.differs(Some(snapshots[place].1), false)?;
        Ok(own.min(changed + gone))
    }
}

/// How full a pool is, from what `ceph df detail` says.
fn capacity(answer: &[u8], pool: &str) -> Option<Capacity> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let pools = answer["pools"].as_array()?;
    let stats = &pools.iter().find(|found| found["name"] == pool)?["stats"];
    let stored = stats["stored"].as_u64()?;
    let room = stored + stats["max_avail"].as_u64()?;
    let size = match stats["quota_bytes"].as_u64() {
        Some(quota) if quota > 0 => room.min(quota),
        _ => room,
    };
    let percent = if size == 0 {
        0.0
    } else {
        (stored as f64 * 100.0 / size as f64).min(100.0)
    };
    Some(Capacity {
        data_size: Bytes(size),
        data_percent: percent,
        data_limit: LIMIT,
        ..Capacity::default()
    })
}
