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

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use super::budget::{Budget, OF_MOUNT, OF_SAVE};
use super::start::{SCRATCH_SOURCE, SeenLate, fs_of};
use super::volume::{
    Backing, Heard, Lease, OpenFs, Phase, Prepared, Restored, Source, Volume, may_publish,
};
use super::{
    Engine, EngineError, Happened, Verdict, cutoff, io_error, lock, millis, own_scratch, tag,
    unix_now,
};
use crate::cache::names::{LvName, Tag};
use crate::cache::record::{CHECKPOINT, FAILED, SAVE, entry_tags};
use crate::cache::request::LatePath;
use crate::cache::select::Criterion;
use crate::cache::spec::{Admit, Publish, Spec};
use crate::cache::units::Bytes;
use crate::config::JobLimits;
use crate::container::Container;
use crate::mount::{self, MountPoint, Mounted};
use crate::selinux;
use crate::storage::StoreError;
use crate::userns::Ids;

/// What the mount table shows for a job volume's directory.
pub(super) const SOURCE: &str = "lvm-cache-friend-job";

/// How much a job can write in its job volume's own directory.
const DIR_SIZE: u64 = 1 << 20;

/// The socket's name in it.
const SOCKET: &str = "socket";

/// The client's directory in it.
const BIN: &str = "bin";

/// The client's name in that, and what it is: see build.rs.
const CLIENT: (&str, &[u8]) = (
    "lvm-cache-friend",
    include_bytes!(concat!(env!("OUT_DIR"), "/job-client")),
);

/// How much of a processor's time the kernel may take to attach a mount. It copies that to each mount of the job volume
/// that follows it, in all namespaces below the job's containers, with the lock on all mounts of the host held: 0.4 kB and
/// up to 14 µs for each (Linux 6.18; 10,000 binds of the job volume in a namespace: 0.14 s and 4 MB). A namespace takes 100,000 mounts
/// (`fs.mount-max`), beyond which attaching fails; how many namespaces there are, the job decides.
const ATTACHING: Duration = Duration::from_millis(100);

/// A job volume in use, for whoever serves its socket.
#[derive(Debug)]
pub struct JobSocket {
    /// What requests are made of.
    pub job: Arc<Job>,
    /// The socket, non-blocking.
    pub listener: UnixListener,
}

/// A job volume's lease: what is mounted in it.
#[derive(Debug)]
pub struct Job {
    volume: Arc<Volume>,
    /// Its directory, where it is attached.
    dir: Mounted,
    now: Mutex<Now>,
    /// Held from what the job says of how it ended until that is noted: the last word stands.
    judging: Mutex<()>,
    closed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Now {
    closed: bool,
    /// `None`: being made.
    mounts: BTreeMap<LatePath, Option<Late>>,
    /// Checkpoints that were made, or are being made.
    saves: usize,
    /// It has been mounted so often that attaching one more mount takes too long.
    multiplied: bool,
    /// What the job itself says of how it ended.
    verdict: Verdict,
    /// LVs that are tagged as ones whose work failed, or are about to be.
    failed: BTreeSet<LvName>,
    budget: Budget,
    /// The containers that have it and run, as far as hooks told.
    containers: BTreeMap<String, Container>,
}

/// A cache in a job volume.
#[derive(Debug)]
pub(super) struct Late {
    volume: Arc<Volume>,
    lease: Lease,
    /// The mount, where it is attached.
    place: OwnedFd,
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
    pub(super) fn dir(&self) -> &Mounted {
        &self.dir
    }

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
        known.ok_or_else(|| refused("nobody has said yet whose job this is"))
    }

    /// The device number of its directory: by it the job's own mount table tells where that is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn device_number(&self) -> io::Result<(u32, u32)> {
        self.dir.device_number()
    }

    /// What the job says of how it ended.
    pub(super) fn verdict(&self) -> Verdict {
        lock(&self.now).verdict
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
                return Err(refused(format!("save {path}: {}", cutoff::WHY)));
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

/// A directory beneath `dir`, reached through no link.
fn open_beneath(dir: BorrowedFd<'_>, path: &str, more: ResolveFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let resolve = ResolveFlags::BENEATH | links | more;
    Ok(rustix::fs::openat2(
        dir,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
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

impl Engine {
    /// Begins the lease of a job volume: its directory with the socket, out of sight yet.
    pub(super) fn open_job(&self, volume: &Arc<Volume>) -> Result<Arc<Job>, EngineError> {
        let failed = |e| {
            io_error(
                "making the directory of",
                Path::new(volume.name.as_str()),
                e,
            )
        };
        let size = Bytes(DIR_SIZE + CLIENT.1.len() as u64);
        let dir = Mounted::scratch(size, SOURCE).map_err(failed)?;
        put_client(&dir).map_err(failed)?;
        own_scratch(&dir, &volume.spec, &Ids::host()).map_err(failed)?;
        Ok(self.job(volume, dir))
    }

    fn job(&self, volume: &Arc<Volume>, dir: Mounted) -> Arc<Job> {
        Arc::new(Job {
            volume: Arc::clone(volume),
            dir,
            now: Mutex::default(),
            judging: Mutex::default(),
            closed: watch::Sender::new(false),
        })
    }

    /// Makes the socket in a job volume's directory, beside the client, and has it served.
    pub(super) fn serve_job(&self, job: &Arc<Job>) -> Result<(), EngineError> {
        let failed = |making| move |e| io_error(making, Path::new(job.name()), e);
        cover_client(&job.dir).map_err(failed("mounting the client program of"))?;
        let listener = listen(&job.dir).map_err(failed("making the socket of"))?;
        let _ = self.settings.jobs.send(JobSocket {
            job: Arc::clone(job),
            listener,
        });
        Ok(())
    }

    /// Takes a job volume's lease up again after a restart, with those of `mounts` that are in it.
    /// What goes on leaves `seen`.
    pub(super) fn go_on_job(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        at: &MountPoint,
        mounts: &[MountPoint],
        seen: &mut Vec<SeenLate>,
    ) -> io::Result<Arc<Job>> {
        let dir = Mounted::in_place(&at.at)?;
        if dir.device_number()? != at.device {
            return Err(Errno::STALE.into());
        }
        let job = self.job(volume, dir);
        for m in mounts {
            let Ok(inside) = m.at.strip_prefix(&at.at) else {
                continue;
            };
            let found = seen.iter().position(|seen| seen.device == m.device);
            let is_scratch = m.fs == "tmpfs" && m.source == SCRATCH_SOURCE;
            if found.is_none() && !is_scratch {
                continue;
            }
            let path = inside.to_str().ok_or_else(|| "not UTF-8".to_owned());
            let went_on = path
                .and_then(|path| LatePath::parse(path, &[]))
                .and_then(|path| {
                    let late = self.go_on_late(&job, &path, m, found.map(|at| &seen[at]));
                    Ok((path, late.map_err(|e| e.to_string())?))
                });
            match went_on {
                Ok((path, late)) => {
                    info!(volume = job.name(), %path, "its mount goes on");
                    lock(&job.now).mounts.insert(path, Some(late));
                    found.map(|at| seen.swap_remove(at));
                }
                Err(error) => {
                    warn!(volume = job.name(), at = %m.at.display(), error, "its mount cannot be taken hold of: it is not published");
                }
            }
        }
        Ok(job)
    }

    fn go_on_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        m: &MountPoint,
        seen: Option<&SeenLate>,
    ) -> io::Result<Late> {
        // The job may have moved what is around the mount since the table was read.
        let place = open_beneath(job.dir.root(), path.as_str(), ResolveFlags::empty())?;
        if mount::id_of(place.as_fd())? != m.id {
            return Err(Errno::STALE.into());
        }
        let mounted = Mounted::clone_of(place.as_fd())?;
        let (spec, backing, mark) = match seen {
            Some(seen) => {
                let mark = (may_publish(&seen.spec) && seen.making)
                    .then(|| self.mark_leased(seen.lv.clone(), seen.failed));
                let backing = Backing::Lv {
                    copy: seen.copy(),
                    open: OpenFs {
                        mounted,
                        fs: fs_of(m),
                    },
                    baseline: None,
                };
                if seen.failed {
                    let mut now = lock(&job.now);
                    now.verdict = Verdict::Failure;
                    now.failed.insert(seen.lv.clone());
                }
                (seen.spec.clone(), backing, mark)
            }
            None => {
                let spec = job.volume.spec.of_request(&[], &[]).unwrap_or_default();
                (spec, Backing::Scratch(mounted), None)
            }
        };
        Ok(Late {
            volume: Arc::new(Volume::late_of(&job.volume, path, spec)),
            lease: Lease {
                mark,
                ..Lease::new(backing)
            },
            place,
        })
    }

    /// Mounts the best entry for a job, or what its job volume says that stands in. `peer`: the ids of
    /// whoever asks.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn mount_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        criteria: &[Criterion],
        save: &[Tag],
        limits: &JobLimits,
        peer: &Ids,
    ) -> Result<LateView, EngineError> {
        let began = Instant::now();
        let _work = self.begin()?;
        let spec = job.spec()?.of_request(criteria, save)?;
        let _reserved = job.reserve(path, limits.mounts)?;
        job.charge(OF_MOUNT, save, limits)?;
        let failed = |e: io::Error| {
            refused(format!(
                "{path}: {}",
                match Errno::from_io_error(&e) {
                    Some(Errno::LOOP | Errno::NOTDIR) =>
                        "there is something else than a directory in this place".to_owned(),
                    Some(Errno::XDEV) => "nothing is mounted upon a mount".to_owned(),
                    _ => e.to_string(),
                }
            ))
        };
        let place = job.place(path).map_err(failed)?;
        let volume = Arc::new(Volume::late_of(&job.volume, path, spec));
        let backing = self
            .backing(&volume, Phase::Stale(None))
            .map_err(|refused| refused.error)?;
        let mut lease = Lease {
            took: began.elapsed(),
            ..Lease::new(backing)
        };
        self.count(&volume, &lease);
        let ids = job.ids_for(peer);
        match &lease.backing {
            Backing::Lv { open, .. } => self.map_ids(&open.mounted, &ids),
            _ => own_scratch(lease.mounted(), &volume.spec, &ids).map_err(failed)?,
        }
        let own = lease.mounted().mount_fd();
        let mut now = lock(&job.now);
        let before = processor_time();
        let attached = if now.closed {
            Err(ended())
        } else {
            own.and_then(|own| lease.mounted().attach_upon(place.as_fd()).map(|()| own))
                .map_err(failed)
        };
        let took = processor_time().saturating_sub(before);
        if took > ATTACHING {
            warn!(
                volume = job.name(),
                took_ms = millis(took),
                "mounted in very many places: the job gets no more mounts"
            );
            now.multiplied = true;
        }
        let place = match attached {
            Ok(place) => place,
            Err(error) => {
                drop(now);
                if let Backing::Lv { copy, open, .. } = lease.backing {
                    drop(open);
                    self.discard(copy.lv, None);
                }
                return Err(error);
            }
        };
        if let Backing::Lv { copy, .. } = &lease.backing {
            self.note_lease(&copy.source);
        }
        if let Backing::Lv { copy, .. } = &lease.backing
            && may_publish(&volume.spec)
        {
            let failed = now.verdict == Verdict::Failure;
            if failed {
                now.failed.insert(copy.lv.clone());
            }
            lease.mark = Some(self.mark_leased(copy.lv.clone(), failed));
        }
        let late = Late {
            volume,
            lease,
            place,
        };
        let view = late.view();
        now.mounts.insert(path.clone(), Some(late));
        Ok(view)
    }

    /// What [`Engine::mount_late`] would restore now. Nothing, where nothing matches and that would refuse it (`on-miss=fail`).
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn lookup(&self, job: &Job, criteria: &[Criterion]) -> Result<LateView, EngineError> {
        let began = Instant::now();
        let spec = job.spec()?.of_request(criteria, &[])?;
        let (_, source) = self.choose(&spec);
        let source = source.unwrap_or(Source::of(Restored::Empty));
        Ok(LateView::of(&source, None, began.elapsed()))
    }

    /// Publishes what a late mount holds now, while the job goes on writing.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn save_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        tags: &[Tag],
        limits: &JobLimits,
    ) -> Result<Saved, EngineError> {
        let began = Instant::now();
        let _work = self.begin()?;
        let (volume, lv, source, device, root) = job.with_mount(path, |late| {
            let copy = late.copy().expect("it has an LV");
            let mounted = late.lease.mounted();
            let root = mounted.root().try_clone_to_owned();
            Ok((
                Arc::clone(&late.volume),
                copy.lv.clone(),
                copy.source.clone(),
                mounted.device_number(),
                root.map_err(|e| io_error("holding", Path::new(path.as_str()), e))?,
            ))
        })?;
        let mut spec = volume.spec.clone();
        if !tags.is_empty() {
            spec.save = job.spec()?.of_request(&[], tags)?.save;
        }
        if spec.save.is_empty() {
            return Err(refused(format!(
                "save {path}: it has no tags: write them after its name"
            )));
        }
        if spec.publish == Publish::Never {
            return Err(refused("the job volume says publish=never"));
        }
        if spec.publish != Publish::Always && job.verdict() == Verdict::Failure {
            return Err(refused(format!(
                "save {path}: the job said that it failed, and what a failed job leaves is not published"
            )));
        }
        // One checkpoint of a mount at a time; its end waits for it.
        let _op = lock(&volume.op);
        if let Some(there) = self.there(&spec) {
            return Ok(Saved {
                lv: there,
                tags: spec.save,
                took: began.elapsed(),
            });
        }
        // Before the store is asked for anything: it waits for whatever is not written yet.
        job.write_out(path, &root)?;
        let written = device.and_then(crate::fs::sectors_written).ok();
        let mut of_entry = entry_tags(&spec.save, &spec.scope, source.lv.as_ref());
        of_entry.push(tag(CHECKPOINT));
        let entry = job.count_save(limits.saves, || {
            job.charge(OF_SAVE, tags, limits)?;
            self.publish_mounted(&spec, &lv, &of_entry, || job.write_out(path, &root))
                .inspect_err(|error| {
                    if let EngineError::Store(StoreError::Unfreezable { .. }) = error {
                        let _ = job.with_mount(path, |late| {
                            late.lease.stuck = true;
                            Ok(())
                        });
                    }
                })
        })?;
        let covers = volume.spec.save.iter().all(|tag| spec.save.contains(tag));
        let _ = job.with_mount(path, |late| {
            if let Backing::Lv { copy, baseline, .. } = &mut late.lease.backing
                && covers
            {
                // Unchanged from here on, its end has nothing new to publish.
                *baseline = written;
                copy.source.saved = true;
            }
            Ok(())
        });
        Ok(Saved {
            lv: entry,
            tags: spec.save,
            took: began.elapsed(),
        })
    }

    /// Has the end of a late mount not published.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn discard_late(&self, job: &Job, path: &LatePath) -> Result<(), EngineError> {
        let (lv, save, already) = job.with_mount(path, |late| {
            let already = std::mem::replace(&mut late.lease.discarded, true);
            let lv = late.copy().expect("it has an LV").lv.clone();
            Ok((lv, late.volume.spec.save.clone(), already))
        })?;
        if already {
            return Ok(());
        }
        // So that no other life of ours publishes it either.
        let save: Vec<_> = save
            .iter()
            .map(|saved| tag(&format!("{SAVE}{saved}")))
            .collect();
        if !save.is_empty() {
            self.store.change_tags(&lv, &[], &save)?;
        }
        Ok(())
    }

    /// Takes what a job says of how it ended: that goes before how its containers end.
    ///
    /// # Errors
    /// When it could not be noted for another life of the daemon. One that takes back a failure is refused where it costs
    /// more changes than are left to the job; a failure never is.
    pub fn judge(&self, job: &Job, success: bool, limits: &JobLimits) -> Result<(), EngineError> {
        let _turn = lock(&job.judging);
        if success {
            let failed = lock(&job.now).failed.len();
            job.charge(u32::try_from(failed).unwrap_or(u32::MAX), &[], limits)?;
        }
        lock(&job.now).verdict = if success {
            Verdict::Success
        } else {
            Verdict::Failure
        };
        self.note_job(job, !success)
    }

    /// Tags or untags the LVs of a job that are not so already, as ones whose work failed.
    pub(super) fn note_job(&self, job: &Job, failed: bool) -> Result<(), EngineError> {
        for lv in job.lvs() {
            let changed = {
                let noted = &mut lock(&job.now).failed;
                if failed {
                    noted.insert(lv.clone())
                } else {
                    noted.remove(&lv)
                }
            };
            if changed && let Err(error) = self.note_failure(&lv, failed) {
                // Which it is is not known: it is noted again next time.
                let noted = &mut lock(&job.now).failed;
                if failed {
                    noted.remove(&lv);
                } else {
                    noted.insert(lv);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Tags or untags an LV as one whose work failed.
    pub(super) fn note_failure(&self, lv: &LvName, failed: bool) -> Result<(), EngineError> {
        let mark = [tag(FAILED)];
        let (add, delete): (&[Tag], &[Tag]) = if failed { (&mark, &[]) } else { (&[], &mark) };
        if failed {
            self.pending.add(lv, tag(FAILED));
        }
        self.store.change_tags(lv, add, delete)?;
        self.pending.settle(lv, &tag(FAILED));
        Ok(())
    }

    /// Ends all that is mounted in a job volume.
    pub(super) fn end_lates(self: &Arc<Self>, job: &Job, heard: &Heard) {
        let lates = job.close();
        // All of it out of sight first: what follows waits for the store.
        for late in &lates {
            let place = format!("/proc/self/fd/{}", late.place.as_raw_fd());
            if let Err(error) = mount::detach_following(Path::new(&place)) {
                warn!(volume = job.name(), %error, "unmounting failed");
            }
        }
        for late in lates {
            drop(late.place);
            lock(&late.volume.now).removed = true;
            self.settle_lease(&late.volume, late.lease, heard.clone(), None);
        }
    }
}

/// What this thread has had of a processor: unlike a clock's, waiting for others is no part of it.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// Puts the client program into a directory that nobody else sees yet.
fn put_client(dir: &Mounted) -> io::Result<()> {
    let (name, program) = CLIENT;
    rustix::fs::mkdirat(dir.root(), BIN, Mode::from_raw_mode(0o755))?;
    let bin = open_beneath(dir.root(), BIN, ResolveFlags::empty())?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(bin, name, flags, Mode::empty())?);
    file.write_all(program)?;
    Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(0o555))?)
}

/// Covers the client's directory with a read-only mount of itself, unless that is done.
fn cover_client(dir: &Mounted) -> io::Result<()> {
    let bin = match open_beneath(dir.root(), BIN, ResolveFlags::NO_XDEV) {
        Ok(bin) => bin,
        Err(error) => match Errno::from_io_error(&error) {
            // The mount is there.
            Some(Errno::XDEV) => return Ok(()),
            // An earlier version made none, or the job has moved it away.
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(()),
            _ => return Err(error),
        },
    };
    let cover = Mounted::clone_of(bin.as_fd())?;
    cover.make_read_only()?;
    cover.attach_upon(bin.as_fd())
}

/// A socket that everybody in a container may connect to, in a directory that its job may write in.
fn listen(dir: &Mounted) -> io::Result<UnixListener> {
    let root = dir.root();
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
    // Bound under a name that nobody guesses, then moved over whatever is in its place.
    let unready = format!(".{SOCKET}.{:016x}", u64::from_ne_bytes(random));
    // Short, whatever the volume's name: a socket's path has 107 bytes at most.
    let path = format!("/proc/self/fd/{}/{unready}", root.as_raw_fd());
    let listener = selinux::with_socket_label(|| UnixListener::bind(&path))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let ready = rustix::fs::openat(root, &*unready, flags, Mode::empty()).and_then(|inode| {
        // chmod(2) of a path could be led to another file; of a descriptor, it cannot.
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&inode)?.st_mode);
        if kind != rustix::fs::FileType::Socket {
            return Err(Errno::STALE);
        }
        let inode = format!("/proc/self/fd/{}", inode.as_raw_fd());
        rustix::fs::chmod(&*inode, Mode::from_raw_mode(0o666))?;
        rustix::fs::renameat(root, &*unready, root, SOCKET)
    });
    if let Err(error) = ready {
        let _ = rustix::fs::unlinkat(root, &*unready, AtFlags::empty());
        return Err(error.into());
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}
