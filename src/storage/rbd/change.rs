// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The index as this process knows it: how it is read, and how it is changed while other hosts change it too.

use std::fmt::Display;
use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::ceph::{CephError, Omap, OmapWrite, PATIENCE};
use super::fleet::{self, Evictor};
use super::index::{self, Change, GENERATION, Index, Volume};
use super::{INDEX, PAGE, Shared, TURN};
use crate::cache::names::LvName;
use crate::storage::StoreError;

impl Shared {
    /// The number of the last change.
    ///
    /// # Errors
    /// [`StoreError::ShutOut`] where this process has joined, and its host was declared lost since.
    pub(super) fn generation(&self) -> Result<u64, StoreError> {
        let joined = self.beat().is_some();
        let host = fleet::key(&self.me.host);
        let wanted = [GENERATION, &host];
        let keys = self.keys(if joined { &wanted } else { &wanted[..1] })?;
        if joined {
            let found = fleet::hosts(&keys).remove(&self.me.host);
            self.check_beat(found)?;
        }
        let value = keys.get(GENERATION);
        Ok(value
            .and_then(|value| index::generation(value))
            .unwrap_or(0))
    }

    /// These keys of the index, as far as they are there.
    pub(super) fn keys(&self, wanted: &[&str]) -> Result<Omap, StoreError> {
        self.pool
            .keys(INDEX, wanted)
            .map_err(|error| self.failed(&error))
    }

    /// All keys of the index that begin so. What changes meanwhile may be in it or not.
    pub(super) fn pages(&self, prefix: &str) -> Result<Omap, StoreError> {
        let (mut keys, mut after) = (Omap::new(), String::new());
        loop {
            let (page, more) = self
                .pool
                .page(INDEX, prefix, &after, PAGE)
                .map_err(|error| self.failed(&error))?;
            if !more {
                keys.extend(page);
                return Ok(keys);
            }
            // Keys of ours are all ASCII: what else is there cannot be read behind.
            let Some((last, _)) = page.last_key_value().filter(|(last, _)| last.is_ascii()) else {
                return Err(StoreError::Unusable(format!(
                    "{}: the index of the store has keys that are none of its own",
                    self.name
                )));
            };
            after.clone_from(last);
            keys.extend(page);
        }
    }

    /// Writes to the index. `false`: something in it was not as the write demands.
    pub(super) fn write(&self, write: &OmapWrite) -> Result<bool, StoreError> {
        self.pool
            .write(INDEX, write)
            .map_err(|error| self.failed(&error))
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Arc<Index>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index as it is now.
    pub(super) fn view(&self) -> Result<Arc<Index>, StoreError> {
        let generation = self.generation()?;
        let known = Arc::clone(&self.known());
        if known.generation == generation {
            return Ok(known);
        }
        let read = Arc::new(self.load()?);
        let mut known = self.known();
        if known.generation < read.generation {
            *known = Arc::clone(&read);
        }
        Ok(read)
    }

    /// Reads all of the index, as it was at one moment.
    pub(super) fn load(&self) -> Result<Index, StoreError> {
        let deadline = Instant::now() + TURN;
        loop {
            let before = self.generation()?;
            let keys = self.pages("")?;
            let index = Index::parse(&keys).map_err(StoreError::Unusable)?;
            // In one page it is of one moment anyway.
            if index.generation == before && self.generation()? == before {
                return Ok(index);
            }
            if Instant::now() >= deadline {
                return Err(self.late(TURN));
            }
        }
    }

    /// Makes the change that `work` works out from the index, and gives what else it gives. It is worked out again where
    /// another host's or thread's change came first, and where `work` refuses what is not the newest.
    pub(super) fn change<T>(
        &self,
        work: impl Fn(&Index) -> Result<(Change, T), StoreError>,
    ) -> Result<T, StoreError> {
        self.change_in_turn(None, work)
    }

    /// The same, as long as a turn to evict lasts.
    pub(super) fn change_in_turn<T>(
        &self,
        turn: Option<&Evictor>,
        work: impl Fn(&Index) -> Result<(Change, T), StoreError>,
    ) -> Result<T, StoreError> {
        if self.beat().is_none() {
            self.check_id()?;
        }
        let deadline = Instant::now() + TURN;
        let mut newest = false;
        loop {
            let index = if newest {
                self.view()?
            } else {
                Arc::clone(&self.known())
            };
            let (change, result) = match work(&index) {
                Ok((change, result)) if !change.is_empty() => (change, result),
                Ok((_, result)) if newest => return Ok(result),
                Err(error) if newest => return Err(error),
                _ => {
                    newest = true;
                    continue;
                }
            };
            let mut write = change.write(&index);
            let mut mine = self.beat().clone();
            if mine.as_ref().is_some_and(|mine| mine.lost) {
                mine = Some(self.is_here()?);
            }
            if let Some(mine) = &mine {
                fleet::guard(&mut write, &self.me.host, mine);
            }
            if let Some(turn) = turn {
                fleet::guard_eviction(&mut write, turn);
            }
            if self.write(&write)? {
                let mut known = self.known();
                if known.generation == index.generation {
                    drop(index);
                    Arc::make_mut(&mut known).apply(&change);
                }
                return Ok(result);
            }
            if mine.is_some() {
                self.is_here()?;
            }
            if let Some(turn) = turn {
                self.check_turn(turn)?;
            }
            newest = true;
            if Instant::now() >= deadline {
                return Err(self.late(TURN));
            }
            // Of several who met, not all try again at once.
            let wait = getrandom::u32().unwrap_or_default() % 8;
            thread::sleep(Duration::from_millis(wait.into()));
        }
    }

    pub(super) fn late(&self, waited: Duration) -> StoreError {
        StoreError::Timeout {
            store: self.name.clone(),
            seconds: waited.as_secs(),
        }
    }

    /// What a failure of Ceph's is to the engine.
    pub(super) fn failed(&self, error: &CephError) -> StoreError {
        match error.errno {
            Errno::ETIMEDOUT => self.late(PATIENCE),
            Errno::ENOSPC | Errno::EDQUOT => StoreError::Full {
                store: self.name.clone(),
                detail: format!("{error}: `ceph df` and `ceph health detail` say more"),
            },
            // EBLOCKLISTED (include/rados.h).
            Errno::ESHUTDOWN => self.blocklisted(error),
            // What is needed of the OSDs is in their class `rbd`, which is a file that each has to have.
            Errno::EOPNOTSUPP => StoreError::Unusable(format!(
                "{}: {error}: the OSDs do not know what images need (exclusive-lock, object-map, clone v2); is the class `rbd` loaded? `ceph config get osd osd_class_dir` and `osd_class_load_list` say which are",
                self.name
            )),
            _ => StoreError::Failed(format!("{}: {error}", self.name)),
        }
    }

    fn blocklisted(&self, error: &dyn Display) -> StoreError {
        StoreError::ShutOut {
            store: self.name.clone(),
            detail: format!(
                "{error}: the cluster has shut this host out (`ceph osd blocklist ls`), mostly since it was taken for lost; restart the daemon"
            ),
        }
    }

    pub(super) fn io(&self, what: &str, image: &str, error: io::Error) -> StoreError {
        match error.raw_os_error() {
            Some(libc::ETIMEDOUT) => return self.late(PATIENCE),
            // The kernel's client is on the cluster's blocklist.
            Some(libc::ESHUTDOWN) => return self.blocklisted(&error),
            _ => {}
        }
        StoreError::Io {
            what: format!("{what} {}/{image}", self.name),
            source: error,
        }
    }

    /// A volume that this host sees.
    pub(super) fn get<'a>(&self, index: &'a Index, lv: &LvName) -> Result<&'a Volume, StoreError> {
        index
            .volumes
            .get(lv)
            .filter(|volume| fleet::is_seen_by(volume, &self.me.host))
            .ok_or_else(|| StoreError::NotFound(lv.clone()))
    }

    pub(super) fn volume(&self, lv: &LvName) -> Result<Volume, StoreError> {
        self.get(&*self.view()?, lv).cloned()
    }
}
