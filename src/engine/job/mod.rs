// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Job volumes: a directory in which a job has caches mounted while it runs.
//!
//! The volume's LV only carries its name and specification. In use, it is a small
//! directory in memory, on a shared mount, with the socket that the job asks on.
//! Each cache in it (a *late mount*) is a volume of its own to the rest of the
//! engine, one that is never used again after its lease: [`Volume::late_of`].
//!
//! Beside the socket is the client program, below a read-only mount.
//!
//! The job may write in the directory, so nothing in it is reached by its path alone:
//! a place is opened beneath the root, through no link and no other mount, and
//! what is mounted is taken away by the descriptor that it was mounted with.

mod dir;
mod mounts;
mod recovery;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, ResolveFlags};
use rustix::io::Errno;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::volume::{
    Backing, CUT_OFF, Job, Late, Lease, Prepared, Restored, Source, Volume, may_publish,
};
use super::{EngineError, Happened, Verdict, lock, millis, unix_now};
use crate::cache::late_path::LatePath;
use crate::cache::names::{LvName, Tag};
use crate::cache::spec::{Admit, Spec};
use crate::config::JobLimits;
use crate::userns::Ids;
use dir::open_beneath;

/// A job volume in use, as the server of its socket needs it.
#[derive(Debug)]
pub struct JobSocket {
    /// What requests are made of.
    pub job: Arc<Job>,
    /// The socket, non-blocking.
    pub listener: UnixListener,
}

/// What a job is told of a cache: of one that it got, or would get.
#[derive(Debug, Clone)]
pub struct LateView {
    /// What was restored from; the new LV where that is nothing.
    pub lv: Option<LvName>,
    /// `exact`, `fallback`, `base`, `empty` …
    pub restored: &'static str,
    /// The criterion that matched.
    pub criterion: Option<String>,
    /// The entry's tags.
    pub tags: Vec<Tag>,
    /// Seconds since it was published.
    pub age: Option<u64>,
    /// It filled the store, and all that uses it gets EIO.
    pub cut_off: bool,
    /// How long it took.
    pub took: Duration,
}

/// A checkpoint of a cache.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The new entry.
    pub lv: LvName,
    /// Its tags.
    pub tags: Vec<Tag>,
    /// How long it took.
    pub took: Duration,
}

fn refused(why: impl Into<String>) -> EngineError {
    EngineError::Job(why.into())
}

impl LateView {
    fn of(source: &Source, own: Option<&LvName>, took: Duration) -> Self {
        Self {
            lv: source.lv.as_ref().or(own).cloned(),
            restored: source.how.as_str(),
            criterion: source.criterion.clone(),
            tags: source.tags.clone(),
            age: source.created.map(|then| unix_now().saturating_sub(then)),
            cut_off: false,
            took,
        }
    }
}

impl Late {
    fn view(&self) -> LateView {
        let view = match &self.lease.backing {
            Backing::Lv { copy, .. } => LateView::of(&copy.source, Some(&copy.lv), self.lease.took),
            Backing::Scratch(_) | Backing::Job { .. } => {
                LateView::of(&Source::of(Restored::Scratch), None, self.lease.took)
            }
        };
        LateView {
            cut_off: self.lease.cut_off,
            ..view
        }
    }

    fn copy(&self) -> Option<&Prepared> {
        match &self.lease.backing {
            Backing::Lv { copy, .. } => Some(copy),
            Backing::Scratch(_) | Backing::Job { .. } => None,
        }
    }
}

impl Job {
    /// For messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.volume.name.as_str()
    }

    /// Turns true when the lease ends.
    #[must_use]
    pub fn closed(&self) -> watch::Receiver<bool> {
        self.closed.subscribe()
    }

    /// Returns once it is known whose job it is.
    pub async fn admitted(&self) {
        if self.volume.spec.admit == Admit::Later {
            let mut admitted = self.volume.admitted.subscribe();
            let _ = admitted.wait_for(Option::is_some).await;
        }
    }

    /// What requests start from.
    fn spec(&self) -> Result<Spec, EngineError> {
        let known = self.volume.for_requests();
        known.ok_or_else(|| refused("it is not known yet whose job this is"))
    }

    /// The device number of its directory: by it the job's own mount table tells where that is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn device_number(&self) -> io::Result<(u32, u32)> {
        self.dir.device_number()
    }

    /// Has a look at, or changes, each lease in it.
    pub(super) fn each_lease(&self, mut with: impl FnMut(&Arc<Volume>, &mut Lease)) {
        for late in lock(&self.now).mounts.values_mut().flatten() {
            with(&late.volume, &mut late.lease);
        }
    }

    /// What is mounted, and the job's own verdict.
    #[must_use]
    pub fn status(&self) -> (Vec<(LatePath, LateView)>, Verdict) {
        let now = lock(&self.now);
        let mounts = now.mounts.iter();
        let views = mounts.filter_map(|(path, late)| Some((path.clone(), late.as_ref()?.view())));
        (views.collect(), now.verdict)
    }

    /// For `inspect`.
    pub(super) fn shown(&self) -> Value {
        let (mounts, _) = self.status();
        let shown = mounts.into_iter().map(|(path, late)| {
            let shown = json!({
                "restored": late.restored,
                "from": late.lv.as_ref().map(LvName::as_str),
                "criterion": late.criterion,
                "age_seconds": late.age,
                "mount_ms": millis(late.took),
            });
            (path.to_string(), shown)
        });
        Value::Object(shown.collect())
    }

    /// The LVs in use that the verdict matters for.
    pub(super) fn lvs(&self) -> Vec<LvName> {
        let now = lock(&self.now);
        let mounts = now.mounts.values().flatten();
        mounts
            .filter(|late| may_publish(&late.volume.spec))
            .filter_map(|late| Some(late.copy()?.lv.clone()))
            .collect()
    }

    /// Keeps a place for a mount, which is free again when what this gives is dropped.
    fn reserve(&self, path: &LatePath, most: usize) -> Result<Reserved<'_>, EngineError> {
        let mut now = lock(&self.now);
        if now.closed {
            return Err(ended());
        }
        if let Some(there) = now.mounts.keys().find(|there| there.overlaps(path)) {
            return Err(refused(format!(
                "{path}: {there} is mounted already, and nothing is mounted upon or around a mount"
            )));
        }
        if now.multiplied {
            return Err(refused(
                "the job volume is mounted in so many places that nothing more is mounted in it",
            ));
        }
        if now.mounts.len() >= most {
            return Err(refused(format!("a job has at most {most} mounts")));
        }
        now.mounts.insert(path.clone(), None);
        Ok(Reserved {
            job: self,
            path: path.clone(),
        })
    }

    /// Counts one more checkpoint, if `make` makes one: each takes room that nobody gets back while
    /// it is an entry.
    fn count_save<T>(
        &self,
        most: usize,
        make: impl FnOnce() -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        {
            let mut now = lock(&self.now);
            if now.saves >= most {
                return Err(refused(format!("a job has at most {most} checkpoints")));
            }
            now.saves += 1;
        }
        make().inspect_err(|_| lock(&self.now).saves -= 1)
    }

    /// Charges what is asked for to the job's budget.
    fn charge(&self, changes: u32, tags: &[Tag], limits: &JobLimits) -> Result<(), EngineError> {
        let budget = &mut lock(&self.now).budget;
        let bytes = tags.iter().map(|tag| tag.as_str().len() as u64).sum();
        budget.tags(bytes, limits.tags.0).map_err(refused)?;
        budget
            .changes(changes, limits.changes, Instant::now())
            .map_err(refused)
    }

    /// The directory that is mounted upon, which is made where it is missing. Beneath the root,
    /// through no link, and on no other mount, whatever the job does meanwhile.
    fn place(&self, path: &LatePath) -> io::Result<OwnedFd> {
        let mut here = open_beneath(self.dir.root(), ".", ResolveFlags::NO_XDEV)?;
        for name in path.as_str().split('/') {
            match rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            here = open_beneath(here.as_fd(), name, ResolveFlags::NO_XDEV)?;
        }
        Ok(here)
    }

    /// Takes note of a container that has the job volume.
    pub(super) fn note_container(&self, id: &str, happened: &Happened) {
        let mut now = lock(&self.now);
        match happened {
            Happened::Started(Some(container)) => {
                now.containers.insert(id.to_owned(), container.clone());
            }
            Happened::Started(None) | Happened::Judged(_) => {}
            // Its namespaces' numbers can be others' from now on.
            Happened::Ended(_) => {
                now.containers.remove(id);
            }
        }
    }

    /// Whether a process is in one of the containers that have the job volume; `None` where none of these is known: there
    /// are no hooks, or the daemon was started after them.
    #[must_use]
    pub fn is_in_container(&self, pid: i32) -> Option<bool> {
        let containers: Vec<_> = lock(&self.now).containers.values().cloned().collect();
        (!containers.is_empty()).then(|| containers.iter().any(|container| container.holds(pid)))
    }

    /// The ids of the container that a client with the ids `peer` is in: it may live in a namespace
    /// of its own there, as rootless Podman does. Its own, where no container of these is known.
    fn ids_for(&self, peer: &Ids) -> Ids {
        let now = lock(&self.now);
        let all = now.containers.values().map(|container| &container.ids);
        let around = all.filter(|ids| peer.are_part_of(ids));
        around.min_by_key(|ids| ids.count()).unwrap_or(peer).clone()
    }

    /// Lets nothing be mounted any more, and gives what is.
    fn close(&self) -> Vec<Late> {
        let mut now = lock(&self.now);
        now.closed = true;
        let mounts = std::mem::take(&mut now.mounts);
        self.closed.send_replace(true);
        mounts.into_values().flatten().collect()
    }

    /// Has all that a late mount holds written, by a descriptor of its root; refuses it for good where that failed once.
    fn write_out(&self, path: &LatePath, root: &OwnedFd) -> Result<(), EngineError> {
        let written = rustix::fs::syncfs(root);
        self.with_mount(path, |late| {
            if late.lease.cut_off {
                return Err(refused(format!("save {path}: {CUT_OFF}")));
            }
            late.lease.lost |= written.is_err();
            if late.lease.lost {
                return Err(refused(format!(
                    "save {path}: not everything that was written to it could be stored"
                )));
            }
            Ok(())
        })
    }

    /// Finds a mount with an LV, and gives what `with` makes of it.
    fn with_mount<T>(
        &self,
        path: &LatePath,
        with: impl FnOnce(&mut Late) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        match lock(&self.now).mounts.get_mut(path) {
            Some(Some(late)) if late.copy().is_some() => with(late),
            Some(Some(_)) => Err(refused(format!(
                "{path} is scratch space: the store did not serve when it was mounted"
            ))),
            Some(None) => Err(refused(format!("{path} is not mounted yet"))),
            None => Err(refused(format!("nothing is mounted at {path}"))),
        }
    }
}

fn ended() -> EngineError {
    refused("the job has ended")
}

struct Reserved<'a> {
    job: &'a Job,
    path: LatePath,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut now = lock(&self.job.now);
        if let Some(None) = now.mounts.get(&self.path) {
            now.mounts.remove(&self.path);
        }
    }
}
