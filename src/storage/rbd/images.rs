// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The images that volumes are in: announced before they are made, made free of their parents in time, and removed when nothing
//! needs them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tracing::{debug, warn};

use super::ceph::CephError;
use super::index::{self, Change, Garbage, Index, Maker, SnapshotOf};
use super::{DEEP, Shared, TOO_DEEP, process_file};
use crate::cache::names::LvName;
use crate::storage::StoreError;

impl Shared {
    /// Whether a process may still finish what it makes. Of other hosts' the answer is yes: what a host that is declared lost was
    /// making has no maker any more.
    pub(super) fn may_finish(&self, maker: &Maker) -> bool {
        if maker.host != self.me.host || maker.process == self.me.process {
            return true;
        }
        match File::open(process_file(&self.run, &maker.process)) {
            Ok(file) => {
                let held = Flock::lock(file, FlockArg::LockSharedNonblock);
                matches!(held, Err((_, Errno::EWOULDBLOCK)))
            }
            // Where this process may open no more files, nothing is known.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// Removes what nothing needs. What cannot be removed now is tried again at the next removal.
    pub(super) fn collect(&self) -> Result<(), StoreError> {
        let _turn = self
            .collecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut first = Ok(());
        let mut in_vain = Vec::new();
        loop {
            let index = self.view()?;
            let garbage = index.garbage(|maker| self.may_finish(maker));
            let Some(next) = garbage.into_iter().find(|next| !in_vain.contains(next)) else {
                return first;
            };
            if let Err(error) = self.remove_garbage(&index, &next) {
                debug!(?next, %error, "not removed yet");
                first = first.and(Err(error));
                in_vain.push(next);
            }
        }
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
                let removed = self
                    .pool
                    .image(image)
                    .and_then(|image| image.remove_snapshot(snapshot));
                gone(removed)?;
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

    /// After a failure: what this process was to make is made no more.
    pub(super) fn give_up(&self, image: &str, snapshot: Option<&str>) {
        let given_up = self.change_image(image, |image| match snapshot {
            None => image.maker = None,
            Some(snapshot) => {
                if let Some(snapshot) = image.snapshots.get_mut(snapshot) {
                    snapshot.maker = None;
                }
            }
        });
        // Where garbage is collected already, a request does not wait for that.
        let is_free = self.collecting.try_lock().is_ok();
        let collected = given_up.and_then(|()| if is_free { self.collect() } else { Ok(()) });
        if let Err(error) = collected {
            warn!(image, %error, "what was half made is left until this process ends");
        }
    }

    /// Announces an image for `volume`, a clone of `parent` or an empty one, and makes it.
    pub(super) fn make_image(
        &self,
        volume: &LvName,
        parent: Option<&SnapshotOf>,
        size: u64,
    ) -> Result<String, StoreError> {
        let name = self.change(|index| {
            if !parent.is_none_or(|parent| index.keeps(parent, &self.me)) {
                return Err(StoreError::NotFound(volume.clone()));
            }
            let name = index.fresh_name(volume);
            let image = index::Image {
                maker: Some(self.me.clone()),
                parent: parent.cloned(),
                snapshots: BTreeMap::new(),
            };
            let mut change = Change::default();
            change.images.insert(name.clone(), Some(image));
            Ok((change, name))
        })?;
        let made = match parent {
            Some(parent) => self
                .pool
                .clone_image(&parent.image, &parent.snapshot, &name),
            None => self.pool.create_image(&name, size),
        };
        if let Err(error) = made {
            self.give_up(&name, None);
            return Err(self.failed(&error));
        }
        Ok(name)
    }

    /// Has an image have all that it holds itself, in the background where it is not too deep to be cloned once more.
    pub(super) fn keep_shallow(
        self: &Arc<Self>,
        index: &Index,
        image: &str,
    ) -> Result<(), StoreError> {
        let depth = index.depth(image);
        if depth < DEEP {
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

    /// Copies to an image what it has from its parents, also for its snapshots.
    pub(super) fn flatten(&self, image: &str) -> Result<(), StoreError> {
        match self.pool.image(image).and_then(|image| image.flatten()) {
            Ok(()) => {}
            // Another host was quicker; or it is gone.
            Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(self.failed(&error)),
        }
        self.change_image(image, |image| image.parent = None)?;
        // What only it needed.
        self.collect()
    }
}
