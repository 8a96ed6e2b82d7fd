// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one host of a fleet tells the others and sees of them: its count, changes of the index, and hosts that are lost.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ring::hmac;
use tracing::{debug, error, info, warn};

use super::ceph::Omap;
use super::fleet::{self, Beat, Observer};
use super::images::look_for_garbage;
use super::index::{Content, Index};
use super::{LOOK, RbdStore, SEEN, Shared, io_failed};
use crate::storage::StoreError;

/// Where a machine has its id: machine-id(5).
const MACHINE_ID: &str = "/etc/machine-id";

/// What machine ids are hashed with, as sd_id128_get_machine_app_specific(3) does it, for others are not to know them:
/// `systemd-id128 machine-id --app-specific=…` with this gives the same.
const APPLICATION: [u8; 16] = [
    0x5b, 0x1e, 0x0a, 0x3c, 0x7d, 0x92, 0x4f, 0x64, 0x9a, 0x0b, 0xc1, 0x36, 0x2f, 0x58, 0xd7, 0xe0,
];

/// How long a count that does not go on is no sign of life.
const SIGN_OF_LIFE: Duration = fleet::BEAT.saturating_mul(2);

/// This machine's id as a host of a fleet.
///
/// # Errors
/// [`StoreError::Unusable`] where it has none: /etc/machine-id is missing, or not set yet.
pub fn machine_id() -> Result<String, StoreError> {
    let text =
        fs::read_to_string(MACHINE_ID).map_err(io_failed("reading", Path::new(MACHINE_ID)))?;
    hashed(text.trim()).ok_or_else(|| {
        StoreError::Unusable(format!(
            "{MACHINE_ID} has no id (systemd-machine-id-setup makes one): a host of a fleet needs one, or `host` in [rbd] of the configuration"
        ))
    })
}

fn hashed(machine_id: &str) -> Option<String> {
    let id: Vec<u8> = (0..16)
        .map(|at| u8::from_str_radix(machine_id.get(2 * at..2 * at + 2)?, 16).ok())
        .collect::<Option<_>>()?;
    let hash = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &id), &APPLICATION);
    let mut id: [u8; 16] = hash.as_ref()[..16].try_into().expect("32 bytes");
    // As in a random UUID.
    id[6] = (id[6] & 0x0f) | 0x40;
    id[8] = (id[8] & 0x3f) | 0x80;
    Some(id.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

impl RbdStore {
    /// Has this process be the host's daemon: from now on it counts on, other hosts see whether it does, and it sees whether
    /// they do. What a host had that is lost becomes its own, to be removed. What is mapped here and cannot be read is unmapped.
    /// `true`: this host itself was declared lost since its last daemon joined, and what that had is gone.
    ///
    /// Where the last daemon of this host's id is none that this machine has had since it booted, that is looked at for 20 s
    /// first: it may live on another machine.
    ///
    /// # Errors
    /// [`StoreError::ShutOut`] where another machine's daemon has this host's id, and lives; or when the cluster cannot be
    /// reached.
    pub fn join(&self) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let mut beat = shared.beat();
        loop {
            let was = shared.own_key()?;
            if let Some(was) = was.as_ref().filter(|was| !shared.was_ours(was)) {
                shared.await_silence(was)?;
            }
            let now = Beat {
                process: shared.me.process.clone(),
                count: 1,
                lost: false,
            };
            let write = fleet::beat(&shared.me.host, was.as_ref(), &now);
            if shared.write(&write)? {
                let joined = shared.joined();
                fs::write(&joined, &shared.me.process).map_err(io_failed("writing", &joined))?;
                *beat = Some(now);
                drop(beat);
                if let Err(error) = shared.unmap_dead() {
                    warn!(%error, "whether what is mapped can be read is not known");
                }
                return Ok(was.is_some_and(|was| was.lost));
            }
        }
    }
}

/// Counts on, and tells those who watch when the index changes, for as long as the store is open.
fn look_for_changes(store: &Weak<Shared>) {
    let mut seen = None;
    let mut away = false;
    let begun = Instant::now();
    let mut next_beat = Duration::ZERO;
    while let Some(store) = store.upgrade() {
        if begun.elapsed() >= next_beat {
            next_beat = begun.elapsed() + fleet::BEAT;
            if let Err(error) = store.count_on() {
                debug!(%error, "this host could not count on");
            }
        }
        match store.generation() {
            Ok(now) => {
                away = false;
                if seen.is_some_and(|seen| seen != now) {
                    store.tell(now);
                    store.wake_collector();
                }
                seen = Some(now);
            }
            // That is said already.
            Err(_) if store.beat().as_ref().is_some_and(|mine| mine.lost) => {}
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

/// Looks at the other hosts, for as long as the store is open. By itself, since it may take minutes to remove what they left, and
/// this host is to count on meanwhile.
fn look_at_hosts(store: &Weak<Shared>) {
    let begun = Instant::now();
    while let Some(store) = store.upgrade() {
        if let Err(error) = store.look_at_hosts(begun.elapsed()) {
            store.observer().interrupted();
            debug!(%error, "the other hosts are not seen");
        }
        drop(store);
        thread::sleep(fleet::BEAT);
    }
}

impl Shared {
    /// Begins to count on, and to look at the index, at other hosts and for garbage.
    pub(super) fn start(self: &Arc<Self>) {
        self.tell(0);
        for work in [look_for_changes, look_at_hosts] {
            let store = Arc::downgrade(self);
            thread::spawn(move || work(&store));
        }
        let store = Arc::downgrade(self);
        let collector = thread::spawn(move || look_for_garbage(&store));
        let _ = self.collector.set(collector.thread().clone());
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

    pub(super) fn observer(&self) -> MutexGuard<'_, Observer> {
        self.observer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Declares lost which hosts count on no more, where this process has joined; and sees whose turn it is to evict.
    fn look_at_hosts(&self, now: Duration) -> Result<(), StoreError> {
        let hosts = fleet::hosts(&self.host_keys()?);
        let turn = self.turn()?;
        let silent: Vec<(String, Beat)> = {
            let mut observer = self.observer();
            observer.look(now, &hosts, turn.as_ref());
            observer
                .silent(fleet::LOST)
                .filter(|(host, _)| *host != self.me.host)
                .map(|(host, beat)| (host.to_owned(), beat.clone()))
                .collect()
        };
        let mine = || self.beat().clone().filter(|mine| !mine.lost);
        if mine().is_none() {
            return Ok(());
        }
        if self.strays.load(Ordering::Relaxed) {
            self.strays.store(self.unmap_strays()?, Ordering::Relaxed);
        }
        for (host, beat) in silent {
            let index = self.view()?;
            let watching = self.is_watching(&index, &host);
            if !matches!(watching, Ok(false)) {
                debug!(host, ?watching, "its daemon does not count on");
                // A watch ends after half a minute without its host (`osd_client_watch_timeout`): that much is no loss.
                self.observer().lives(&host);
                continue;
            }
            let mut write = fleet::declare_lost(&index, &host, &beat, &self.me.host);
            let Some(mine) = mine() else {
                return Ok(());
            };
            fleet::guard(&mut write, &self.me.host, &mine);
            // Where another change came first, at the next look.
            if self.write(&write)? {
                warn!(host, "a host is lost: what it had is removed");
            }
        }
        Ok(())
    }

    /// Whether a host has an image mapped: its daemon may be stopped, and its containers go on.
    fn is_watching(&self, index: &Index, host: &str) -> Result<bool, StoreError> {
        for volume in index.volumes.values() {
            let Content::Own {
                image, live: true, ..
            } = &volume.content
            else {
                continue;
            };
            if volume.host.as_deref() != Some(host) {
                continue;
            }
            match (self.pool.look_at(image, None)).and_then(|image| image.watchers()) {
                Ok(watchers) if watchers.is_empty() => {}
                Ok(_) => return Ok(true),
                Err(error) if error.errno == Errno::ENOENT => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
        Ok(false)
    }

    /// Shows other hosts that this one lives, where this process has joined and the host was not declared lost.
    fn count_on(&self) -> Result<(), StoreError> {
        let Some(was) = self.beat().clone().filter(|was| !was.lost) else {
            return Ok(());
        };
        let next = Beat {
            count: was.count + 1,
            ..was.clone()
        };
        let write = fleet::beat(&self.me.host, Some(&was), &next);
        if self.write(&write)? {
            self.check_beat(Some(next))?;
        } else {
            self.is_here()?;
        }
        Ok(())
    }

    pub(super) fn host_keys(&self) -> Result<Omap, StoreError> {
        self.pages(fleet::HOST)
    }

    /// Forgets what this host had when it was declared lost.
    pub(super) fn forget_lost(&self) -> Result<(), StoreError> {
        let key = fleet::left_key(&self.me.host);
        loop {
            let keys = self.keys(&[&key])?;
            if !keys.contains_key(&key) || self.write(&fleet::forget_left(&keys, &self.me.host))? {
                return Ok(());
            }
        }
    }

    /// The file that says which process of this host's joined last, since the host booted.
    fn joined(&self) -> PathBuf {
        self.run.join(format!("joined.{}", self.me.host))
    }

    /// Whether the process that a key of this host's tells of was one of this machine's, or is known to have ended.
    fn was_ours(&self, key: &Beat) -> bool {
        key.lost || fs::read_to_string(self.joined()).is_ok_and(|process| process == key.process)
    }

    /// Sees that a process that has not joined is one of the host whose id it has.
    ///
    /// # Errors
    /// [`StoreError::ShutOut`] where the last daemon that joined with that is none of this machine's since it booted.
    pub(super) fn check_id(&self) -> Result<(), StoreError> {
        if self.is_ours.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.own_key()?.is_some_and(|key| !self.was_ours(&key)) {
            return Err(StoreError::ShutOut {
                store: self.name.clone(),
                detail: "the last daemon with this host's id is none that this machine has had since it booted, and nothing is changed until one has found out whether it lives on another machine: systemctl start lvm-cache-friend".to_owned(),
            });
        }
        self.is_ours.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// This host's key, as it is in the index.
    fn own_key(&self) -> Result<Option<Beat>, StoreError> {
        let keys = self.keys(&[&fleet::key(&self.me.host)])?;
        Ok(fleet::hosts(&keys).remove(&self.me.host))
    }

    /// Waits until it is clear that a daemon that had this host's id counts on no more.
    fn await_silence(&self, was: &Beat) -> Result<(), StoreError> {
        info!(
            seconds = SIGN_OF_LIFE.as_secs(),
            "a daemon had this host's id that did not leave: looking whether it lives on another machine"
        );
        let since = Instant::now();
        while since.elapsed() < SIGN_OF_LIFE {
            thread::sleep(LOOK);
            match self.own_key()? {
                Some(found) if found == *was => {}
                // Declared lost, by a host that has looked for longer.
                Some(found) if found.lost => return Ok(()),
                _ => return Err(self.shut_out(false)),
            }
        }
        Ok(())
    }

    /// This host's key as it is in the index: a write of it that was in doubt may have been made.
    ///
    /// # Errors
    /// Where it was declared lost, or another process of the host's has joined.
    pub(super) fn is_here(&self) -> Result<Beat, StoreError> {
        self.check_beat(self.own_key()?)
    }

    /// Takes what was read or written of this host's key.
    ///
    /// # Errors
    /// As [`Shared::is_here`]; this host is lost from then on, and that is said once.
    pub(super) fn check_beat(&self, found: Option<Beat>) -> Result<Beat, StoreError> {
        let mut beat = self.beat();
        match found {
            Some(found) if found.process == self.me.process && !found.lost => {
                // What was read may be older than what another thread has written since.
                if let Some(known) = beat.as_mut().filter(|known| known.count < found.count) {
                    known.count = found.count;
                }
                Ok(found)
            }
            found => {
                // One that had nothing has no key any more.
                let error = self.shut_out(found.is_none_or(|found| found.lost));
                if let Some(beat) = &mut *beat
                    && !std::mem::replace(&mut beat.lost, true)
                {
                    error!(%error, "nothing is made or published here until the daemon is restarted");
                }
                Err(error)
            }
        }
    }

    pub(super) fn shut_out(&self, lost: bool) -> StoreError {
        let why = if lost {
            "this host was away for so long that another one took it for lost, and what its volumes held is gone"
        } else {
            "another daemon has joined with this host's id: of machines with one /etc/machine-id, each needs a `host` of its own in [rbd] of its configuration"
        };
        StoreError::ShutOut {
            store: self.name.clone(),
            detail: format!("{why}; to begin anew: systemctl restart lvm-cache-friend"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_ids_are_hashed_as_systemd_does() {
        // By Python's hmac, which for a machine's own id gives what systemd-id128 of systemd 252 gives.
        let hash = hashed("0123456789abcdef0123456789abcdef").expect("an id");
        assert_eq!(hash, "e2455b46e2e4486ca0ef4ef7b28e6c19");
        for none in ["", "uninitialized", "0123456789abcdef0123456789abcde"] {
            assert_eq!(hashed(none), None, "{none:?}");
        }
    }
}
