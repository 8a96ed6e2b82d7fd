// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one host of a fleet tells the others and sees of them: its count, changes of the index, and hosts that are lost.

use std::fs;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::fleet::{self, Beat, Observer};
use super::{INDEX, LOOK, PAGE, SEEN, Shared};
use crate::storage::StoreError;

/// Tells those who watch when the index changes, for as long as the store is open.
fn look_for_changes(store: &Weak<Shared>) {
    let mut seen = None;
    let mut away = false;
    let mut observer = Observer::default();
    let begun = Instant::now();
    let mut next_beat = Duration::ZERO;
    while let Some(store) = store.upgrade() {
        if begun.elapsed() >= next_beat {
            next_beat = begun.elapsed() + fleet::BEAT;
            if let Err(error) = store.look_at_hosts(&mut observer, begun.elapsed()) {
                observer.interrupted();
                debug!(%error, "the other hosts are not seen");
            }
        }
        match store.generation() {
            Ok(now) => {
                away = false;
                if seen.is_some_and(|seen| seen != now) {
                    store.tell(now);
                }
                seen = Some(now);
            }
            Err(error) if !away => {
                away = true;
                warn!(%error, "changes by other hosts are not seen");
            }
            Err(_) => {}
        }
        drop(store);
        thread::sleep(LOOK);
    }
}

impl Shared {
    /// Begins to look for changes by others.
    pub(super) fn start(self: &Arc<Self>) {
        self.tell(0);
        let store = Arc::downgrade(self);
        thread::spawn(move || look_for_changes(&store));
    }

    pub(super) fn tell(&self, generation: u64) {
        let file = self.run.join(SEEN);
        if let Err(error) = fs::write(&file, format!("{generation}\n")) {
            debug!(%error, "a change is not told");
        }
    }

    pub(super) fn beat(&self) -> MutexGuard<'_, Option<Beat>> {
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts on, where this process has joined, and declares lost which hosts do so no more.
    pub(super) fn look_at_hosts(
        &self,
        observer: &mut Observer,
        now: Duration,
    ) -> Result<(), StoreError> {
        let mine = {
            let mut beat = self.beat();
            let Some(was) = beat.clone().filter(|was| !was.lost) else {
                return Ok(());
            };
            let next = Beat {
                count: was.count + 1,
                ..was.clone()
            };
            let write = fleet::beat(&self.me.host, Some(&was), &next);
            if self
                .pool
                .write(INDEX, &write)
                .map_err(|error| self.failed(&error))?
            {
                *beat = Some(next.clone());
                next
            } else {
                self.is_here(&mut beat)?
            }
        };
        let (keys, _) = self
            .pool
            .page(INDEX, fleet::HOST, "", PAGE)
            .map_err(|error| self.failed(&error))?;
        observer.look(now, &fleet::hosts(&keys));
        let silent: Vec<(String, Beat)> = observer
            .silent(fleet::LOST)
            .filter(|(host, _)| *host != self.me.host)
            .map(|(host, beat)| (host.to_owned(), beat.clone()))
            .collect();
        for (host, beat) in silent {
            let index = self.view()?;
            let mut write = fleet::declare_lost(&index, &host, &beat, &self.me.host);
            fleet::guard(&mut write, &self.me.host, &mine);
            // Where another change came first, at the next look.
            if self
                .pool
                .write(INDEX, &write)
                .map_err(|error| self.failed(&error))?
            {
                warn!(host, "a host is lost: what it had is removed");
            }
        }
        Ok(())
    }

    /// This host's key as it is in the index: a write of it that was in doubt may have been made.
    ///
    /// # Errors
    /// Where it was declared lost, or another process of the host's has joined.
    pub(super) fn is_here(&self, beat: &mut Option<Beat>) -> Result<Beat, StoreError> {
        let key = fleet::key(&self.me.host);
        let keys = self
            .pool
            .keys(INDEX, &[&key])
            .map_err(|error| self.failed(&error))?;
        match fleet::hosts(&keys).remove(&self.me.host) {
            Some(found) if found.process == self.me.process && !found.lost => {
                *beat = Some(found.clone());
                Ok(found)
            }
            found => {
                if let Some(beat) = beat {
                    beat.lost = true;
                }
                Err(self.shut_out(found.is_some_and(|found| found.lost)))
            }
        }
    }

    pub(super) fn shut_out(&self, lost: bool) -> StoreError {
        let why = if lost {
            "this host was away for so long that another one took it for lost, and what its volumes held is gone"
        } else {
            "another daemon has joined with this host's id: are there two hosts with one /etc/machine-id?"
        };
        StoreError::OutOfService {
            store: self.name.clone(),
            detail: format!("{why}; to begin anew: systemctl restart lvm-cache-friend"),
        }
    }
}
