// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The images that volumes are in: announced before they are made, made free of their parents in time, and removed when nothing
//! needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tracing::{debug, warn};

use super::ceph::{CephError, Image, PATIENCE};
use super::fleet::{self, BEAT};
use super::index::{self, Change, Content, Garbage, Index, Maker, SnapshotOf};
use super::{DEEP, Shared, TOO_DEEP, process_file};
use crate::cache::names::LvName;
use crate::storage::StoreError;

/// How long what others could not remove, or have begun to, is left to them; and what could not be removed is left.
const PAUSE: Duration = Duration::from_secs(30);

/// An operation that makes images or snapshots: what it has announced and no volume needs is garbage once this is gone.
pub(super) struct Making<'a> {
    shared: &'a Shared,
    pub(super) me: Maker,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.shared.making().remove(&self.me.process);
    }
}

/// Removes, for as long as the store is open, what this process has given up, what is left of this host's own images, and what
/// others have left for long. Wakes where that is asked for, or the index has changed.
pub(super) fn look_for_garbage(store: &Weak<Shared>) {
    let mut due = BTreeMap::new();
    loop {
        thread::park_timeout(BEAT);
        let Some(store) = store.upgrade() else {
            return;
        };
        let done = if store.gave_up.swap(false, Ordering::Relaxed) {
            store.collect()
        } else if store.beat().as_ref().is_some_and(|mine| !mine.lost) {
            store.collect_left(&mut due)
        } else {
            Ok(())
        };
        if let Err(error) = done {
            debug!(%error, "what nothing needs is not removed yet");
        }
    }
}

impl Shared {
    /// Makes something. Where that fails, what is half made of it is removed, behind the answer.
    pub(super) fn make<T>(
        &self,
        work: impl FnOnce(&Making<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let making = self.begin();
        let made = work(&making);
        drop(making);
        if made.is_err() {
            self.collect_soon();
        }
        made
    }

    fn begin(&self) -> Making<'_> {
        let number = self.operations.fetch_add(1, Ordering::Relaxed);
        let me = Maker {
            host: self.me.host.clone(),
            process: format!("{}.{number}", self.me.process),
        };
        self.making().insert(me.process.clone());
        Making { shared: self, me }
    }

    fn making(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what a maker makes may still be finished. Of other hosts' the answer is yes: what a host that is declared lost was
    /// making has no maker any more.
    fn may_finish(&self, maker: &Maker) -> bool {
        if maker.host != self.me.host {
            return true;
        }
        let process = maker.process.split('.').next().unwrap_or_default();
        if process == self.me.process {
            return self.making().contains(&maker.process);
        }
        match File::open(process_file(&self.run, process)) {
            Ok(file) => {
                let held = Flock::lock(file, FlockArg::LockSharedNonblock);
                matches!(held, Err((_, Errno::EWOULDBLOCK)))
            }
            // Where this process may open no more files, nothing is known.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// Has what nothing needs removed, by a thread of its own.
    pub(super) fn collect_soon(&self) {
        self.gave_up.store(true, Ordering::Relaxed);
        self.wake_collector();
    }

    pub(super) fn wake_collector(&self) {
        if let Some(collector) = self.collector.get() {
            collector.unpark();
        }
    }

    /// Removes what nothing needs. What cannot be removed now is tried again later.
    pub(super) fn collect(&self) -> Result<(), StoreError> {
        self.collect_those(|_| true)
    }

    /// The same of what is due: of this host's own images at once, of others in a while, and what could not be removed in a while again.
    fn collect_left(&self, due: &mut BTreeMap<Garbage, Instant>) -> Result<(), StoreError> {
        let index = self.view()?;
        let rested = self.rest_entries(&index);
        let garbage: BTreeSet<Garbage> = index.garbage().into_iter().collect();
        due.retain(|before, _| garbage.contains(before));
        let writers = index.writers();
        let now = Instant::now();
        for new in garbage {
            let is_own = writers.get(new.image()) == Some(&&*self.me.host);
            due.entry(new)
                .or_insert(if is_own { now } else { now + PAUSE });
        }
        let given_up = index.given_up(|maker| self.may_finish(maker));
        if given_up.is_empty() && due.values().all(|due| *due > now) {
            return rested;
        }
        let collected =
            self.collect_those(|garbage| due.get(garbage).is_some_and(|due| *due <= now));
        if collected.is_err() {
            // Of several hosts, not all at once.
            let jitter = Duration::from_millis(u64::from(getrandom::u32().unwrap_or(0) % 10_000));
            for due in due.values_mut().filter(|due| **due <= now) {
                *due = Instant::now() + PAUSE + jitter;
            }
        }
        rested.and(collected)
    }

    /// Has the devices of this host's entries go that a killed process left, so that other hosts change them like any other.
    fn rest_entries(&self, index: &Index) -> Result<(), StoreError> {
        let left = index.volumes.iter().filter(|(_, volume)| {
            matches!(volume.content, Content::Own { live: true, .. })
                && volume.host.as_ref() == Some(&self.me.host)
                && fleet::is_shared(volume)
        });
        for (lv, _) in left {
            match self.rest(lv) {
                // It is looked at, or made.
                Err(StoreError::Busy(_)) => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Removes of what nothing needs what `which` says. Nothing is removed of an image that another host may be writing to: its lock
    /// would be needed, and where that host has not answered for half a minute, librbd takes the lock and has the cluster shut it
    /// out. That host removes it itself.
    fn collect_those(&self, which: impl Fn(&Garbage) -> bool) -> Result<(), StoreError> {
        let _turn = self
            .collecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.give_up_the_dead()?;
        let mut first = Ok(());
        let mut in_vain = Vec::new();
        loop {
            let index = self.view()?;
            let writers = index.writers();
            let next = index.garbage().into_iter().find(|next| {
                let image = next.image();
                let writer = writers.get(image);
                writer.is_none_or(|host| *host == self.me.host)
                    && !in_vain.iter().any(|tried| tried == image)
                    && which(next)
            });
            let Some(next) = next else {
                return first;
            };
            if let Err(error) = self.remove_garbage(&index, &next) {
                debug!(?next, %error, "not removed yet");
                first = first.and(Err(error));
                in_vain.push(next.image().to_owned());
            }
        }
    }

    /// Gives up what this host's operations were making that have ended.
    fn give_up_the_dead(&self) -> Result<(), StoreError> {
        self.change(|index| Ok((index.given_up(|maker| self.may_finish(maker)), ())))
    }

    pub(super) fn remove_garbage(
        &self,
        index: &Index,
        garbage: &Garbage,
    ) -> Result<(), StoreError> {
        let gone = |done: Result<(), CephError>| match done {
            Err(error) if error.errno == Errno::ENOENT => Ok(()),
            done => done.map_err(|error| self.failed(&error)),
        };
        match garbage {
            Garbage::Snapshot(SnapshotOf { image, snapshot }) => {
                let opened = self.open_watched(image);
                gone(opened.and_then(|image| image.remove_snapshot(snapshot)))?;
                self.change_image(image, |image| _ = image.snapshots.remove(snapshot))
            }
            Garbage::Image(image) => {
                let snapshots = index.images.get(image).map(|image| &image.snapshots);
                if snapshots.is_some_and(|snapshots| !snapshots.is_empty()) {
                    // They are garbage too, and come first.
                    return Err(StoreError::Failed(format!("{image} has snapshots still")));
                }
                gone(self.pool.remove_image(image))?;
                self.change(|index| {
                    let mut change = Change::default();
                    if index.images.contains_key(image) {
                        change.images.insert(image.clone(), None);
                    }
                    Ok((change, ()))
                })
            }
        }
    }

    /// Changes what the index says of an image, where there is one and that is something else.
    fn change_image(
        &self,
        image: &str,
        change: impl Fn(&mut index::Image),
    ) -> Result<(), StoreError> {
        self.change(|index| {
            let mut changed = Change::default();
            if let Some(before) = index.images.get(image) {
                let mut after = before.clone();
                change(&mut after);
                if after != *before {
                    changed.images.insert(image.to_owned(), Some(after));
                }
            }
            Ok((changed, ()))
        })
    }

    /// Announces an image for `volume`, a clone of `parent` or an empty one, and makes it.
    pub(super) fn make_image(
        &self,
        volume: &LvName,
        parent: Option<&SnapshotOf>,
        size: u64,
        making: &Making<'_>,
    ) -> Result<String, StoreError> {
        let (name, depth) = self.change(|index| {
            if !parent.is_none_or(|parent| index.keeps(parent, &making.me)) {
                return Err(StoreError::NotFound(volume.clone()));
            }
            let name = index.fresh_name(volume);
            let image = index::Image {
                maker: Some(making.me.clone()),
                parent: parent.cloned(),
                snapshots: BTreeMap::new(),
            };
            let mut change = Change::default();
            change.images.insert(name.clone(), Some(image));
            let depth = parent.map_or(0, |parent| index.depth(&parent.image) + 1);
            Ok((change, (name, depth)))
        })?;
        let made = match parent {
            Some(parent) => self
                .pool
                .clone_image(&parent.image, &parent.snapshot, &name),
            None => self.pool.create_image(&name, size),
        };
        made.map_err(|error| self.failed(&error))?;
        if depth > TOO_DEEP {
            // Its parent could not be made shallow: another host is writing to that.
            self.flatten(&name)?;
        }
        Ok(name)
    }

    /// Has an image have all that it holds itself, in the background where it is not too deep to be cloned once more. Not one that
    /// another host may be writing to, for the reason that is told at [`Shared::collect_those`].
    pub(super) fn keep_shallow(
        self: &Arc<Self>,
        index: &Index,
        image: &str,
    ) -> Result<(), StoreError> {
        let depth = index.depth(image);
        if depth < DEEP || self.is_anothers(index, image) {
            return Ok(());
        }
        // One at a time: it is the cluster's bandwidth.
        let mut flattening = self
            .flattening
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if depth < TOO_DEEP && !flattening.is_empty() {
            return Ok(());
        }
        if !flattening.insert(image.to_owned()) {
            return Ok(());
        }
        drop(flattening);
        let (store, image) = (Arc::clone(self), image.to_owned());
        let flatten = move || {
            let done = store.flatten(&image);
            let mut flattening = store
                .flattening
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            flattening.remove(&image);
            done
        };
        if depth >= TOO_DEEP {
            return flatten();
        }
        thread::spawn(move || {
            if let Err(error) = flatten() {
                warn!(%error, "an image could not be made free of its parents, and is tried again at its next use");
            }
        });
        Ok(())
    }

    /// Whether another host may be writing to an image.
    fn is_anothers(&self, index: &Index, image: &str) -> bool {
        let writers = index.writers();
        writers.get(image).is_some_and(|host| *host != self.me.host)
    }

    /// Copies to an image what it has from its parents, also for its snapshots.
    pub(super) fn flatten(&self, image: &str) -> Result<(), StoreError> {
        match self.open_watched(image).and_then(|image| image.flatten()) {
            Ok(()) => {}
            // Another host was quicker; or it is gone.
            Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(self.failed(&error)),
        }
        self.change_image(image, |image| image.parent = None)?;
        // What only it needed.
        self.collect_soon();
        Ok(())
    }

    /// An image, to change it, once that is safe.
    ///
    /// # Errors
    /// As [`Shared::await_kernel`].
    pub(super) fn open_watched(&self, image: &str) -> Result<Image<'_>, CephError> {
        let opened = self.pool.image(image)?;
        self.await_kernel(&opened, image)?;
        Ok(opened)
    }

    /// Waits until the kernel's client has a connection to the cluster and watches an image, where it is mapped here. A client that is
    /// gone counts as watching for half a minute, and one that is back after that watches only a moment later: in between librbd would
    /// take it for dead and have it shut out.
    ///
    /// # Errors
    /// ETIMEDOUT where it does not for too long; or what is answered.
    fn await_kernel(&self, opened: &Image<'_>, image: &str) -> Result<(), CephError> {
        let mapped = || {
            let device = self.kernel.device(image).ok().flatten()?;
            let client = device.client()?;
            Some((device, client))
        };
        let deadline = Instant::now() + PATIENCE;
        let mut was_away = false;
        while let Some((device, client)) = mapped() {
            let answered = device.refresh(deadline.saturating_duration_since(Instant::now()));
            if answered.is_ok() && opened.watchers()?.contains(&client) {
                break;
            }
            was_away = true;
            if Instant::now() >= deadline {
                return Err(CephError {
                    what: format!("{image}: its device has no connection to the cluster"),
                    errno: Errno::ETIMEDOUT,
                });
            }
            thread::sleep(Duration::from_millis(100));
        }
        if was_away {
            // It takes its lock for the new watch a moment later.
            thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }
}
