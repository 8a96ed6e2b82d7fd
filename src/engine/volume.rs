// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A volume in memory, and the phases that its copies of entries go through.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::watch;

use super::job::Job;
use super::told::{self, Told};
use super::{Verdict, lock};
use crate::cache::names::{LvName, Tag, VolumeName};
use crate::cache::request::LatePath;
use crate::cache::spec::{Admit, FsType, Publish, Reuse, Spec};
use crate::mount::Mounted;
use crate::userns::Ids;

/// A volume: a name, a specification, and what became of its logical volumes.
#[derive(Debug)]
pub(super) struct Volume {
    pub name: VolumeName,
    pub spec: Spec,
    /// With `admit=later`: what it says since its job is known.
    pub admitted: watch::Sender<Option<Spec>>,
    /// Seconds since 1970.
    pub created: u64,
    /// The job volume that this is mounted in, and where.
    pub late: Option<(Weak<Volume>, LatePath)>,
    /// Held by whoever changes the volume, over all the I/O that it takes.
    pub op: Mutex<()>,
    /// Held for moments only: Get and List read it.
    pub now: Mutex<Now>,
}

#[derive(Debug)]
pub(super) struct Now {
    pub phase: Phase,
    /// Somebody waited for `op` while the volume was removed, or its Create failed.
    pub removed: bool,
    /// How many leases have begun, in this life of the daemon.
    pub leases: u64,
    /// Clients whose Unmount waits for its turn.
    pub leaving: BTreeSet<String>,
    /// LVs of ended leases that still bear the volume's name.
    pub settling: Vec<LvName>,
    /// What became of the last lease, for people.
    pub last: Option<serde_json::Value>,
}

/// What a volume's next use starts from.
#[derive(Debug)]
pub(super) enum Phase {
    /// Create is under way: the volume is not shown yet.
    Making,
    /// A change is under way; the holder of `op` has what was here.
    Changing,
    /// A new copy is needed. The LV, if any, only carries the volume's name and
    /// specification until then.
    Stale(Option<LvName>),
    /// A copy waits for its use.
    Ready(Prepared),
    /// In use.
    Leased(Lease),
}

/// A copy of an entry (or of the base, or a new file system) for one volume.
#[derive(Debug)]
pub(super) struct Prepared {
    pub lv: LvName,
    /// `None`: not activated in this life of the daemon.
    pub device: Option<PathBuf>,
    /// Mounted already, visible nowhere.
    pub premounted: Option<Premounted>,
    /// It carries `friend:making`.
    pub making: bool,
    pub source: Source,
    /// The index's generation at which `source` was last seen to be the best.
    pub generation: AtomicU64,
    pub took: Duration,
}

/// A detached mount, and its place among those that the settings allow.
#[derive(Debug)]
pub(super) struct Premounted {
    pub fs: OpenFs,
    pub _slot: Slot,
}

/// A mounted file system and its type.
#[derive(Debug)]
pub(super) struct OpenFs {
    pub mounted: Mounted,
    pub fs: FsType,
}

/// One of the pre-mounted places, given back when dropped.
#[derive(Debug)]
pub(super) struct Slot(Arc<AtomicUsize>);

impl Slot {
    /// A place, where `used` is below `limit`.
    pub fn take(used: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
            (n < limit).then_some(n + 1)
        })
        .ok()
        .map(|_| Self(Arc::clone(used)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How a copy came to its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Restored {
    Exact,
    Fallback,
    Base,
    Empty,
    /// It held it before (`reuse=keep`).
    Kept,
    /// A directory in memory, as the store did not serve.
    Scratch,
    /// An earlier life of the daemon made it.
    Earlier,
}

impl Restored {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fallback => "fallback",
            Self::Base => "base",
            Self::Empty => "empty",
            Self::Kept => "kept",
            Self::Scratch => "scratch",
            Self::Earlier => "earlier",
        }
    }
}

/// What a copy was made from.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub how: Restored,
    /// The entry or the base; `None` where there was none.
    pub lv: Option<LvName>,
    /// When that was published, seconds since 1970.
    pub created: Option<u64>,
    /// The entry's tags.
    pub tags: Vec<Tag>,
    /// The criterion that matched, as it was written.
    pub criterion: Option<String>,
    /// Unchanged, it would be published in vain: it is an entry with all the save tags, in the
    /// scope, or there is nothing in it, and published later than what a job beside it wrote it
    /// would be taken instead.
    pub saved: bool,
}

impl Source {
    pub const fn of(how: Restored) -> Self {
        Self {
            how,
            lv: None,
            created: None,
            tags: Vec::new(),
            criterion: None,
            saved: matches!(how, Restored::Base | Restored::Empty),
        }
    }
}

/// A use of a volume: from Mount to the last Unmount.
#[derive(Debug)]
pub(super) struct Lease {
    pub backing: Backing,
    /// Who uses it. Podman sends one constant, Docker one a container. Empty after
    /// a restart: the first Unmount ends it then.
    pub ids: BTreeSet<String>,
    pub began: Instant,
    /// How long Mount took.
    pub took: Duration,
    /// How its containers ended, and what others say of the work in it.
    pub told: Arc<Told>,
    /// Writes the lease's mark, behind Mount's answer.
    pub mark: Option<JoinHandle<()>>,
    /// Its end is not published: the job said so.
    pub discarded: bool,
    /// Something that was written in it could not be stored. The kernel tells of that once.
    pub lost: bool,
    /// A freeze of its file system was left behind, which ends when the write in it does that it waits for: until then
    /// all that changes it waits, too.
    pub stuck: bool,
    /// It filled the store: its file system was shut down.
    pub cut_off: bool,
    /// Whose ids its mount shows; `None` after a restart, where that is not known.
    pub shown: Option<Ids>,
    /// The lowest mount at the mountpoint is known to show this host's ids.
    pub plain_below: bool,
}

#[derive(Debug)]
pub(super) enum Backing {
    Lv {
        copy: Prepared,
        open: OpenFs,
        /// Sectors written when the use began; `None` after a restart.
        baseline: Option<u64>,
    },
    Scratch(Mounted),
    Job {
        /// The LV with the job volume's name and specification.
        lv: Option<LvName>,
        job: Arc<Job>,
    },
}

impl Lease {
    /// A use of `backing` that begins now.
    pub fn new(backing: Backing) -> Self {
        Self {
            backing,
            ids: BTreeSet::new(),
            began: Instant::now(),
            took: Duration::ZERO,
            told: Arc::new(Told::since(told::now())),
            mark: None,
            discarded: false,
            lost: false,
            stuck: false,
            cut_off: false,
            shown: None,
            plain_below: false,
        }
    }

    /// What is mounted.
    pub fn mounted(&self) -> &Mounted {
        match &self.backing {
            Backing::Lv { open, .. } => &open.mounted,
            Backing::Scratch(mounted) => mounted,
            Backing::Job { job, .. } => job.dir(),
        }
    }

    /// How the work in it ended.
    pub fn heard(&self) -> Heard {
        Heard {
            by_job: match &self.backing {
                Backing::Job { job, .. } => job.verdict(),
                Backing::Lv { .. } | Backing::Scratch(_) => Verdict::Unknown,
            },
            told: Arc::clone(&self.told),
        }
    }
}

/// How the work in a lease ended: what the job says of it, and what is told by others.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    pub by_job: Verdict,
    pub told: Arc<Told>,
}

impl Heard {
    /// The verdict, as far as it is known now: as the job says, but that the supervisor knows better of a
    /// success; else as its containers ended.
    pub fn verdict(&self) -> Verdict {
        match (self.by_job, self.told.judged()) {
            (Verdict::Failure, _) => Verdict::Failure,
            (_, Some(judged)) => judged,
            (Verdict::Success, None) => Verdict::Success,
            (Verdict::Unknown, None) => self.told.verdict(),
        }
    }

    /// Returns once all is known that will be told. Takes seconds where Docker does not answer.
    pub fn wait(&self) {
        if self.by_job == Verdict::Unknown {
            self.told.wait();
        }
    }
}

impl Volume {
    /// What the engine takes a cache in a job volume for.
    pub fn late_of(job: &Arc<Self>, path: &LatePath, spec: Spec) -> Self {
        Self {
            late: Some((Arc::downgrade(job), path.clone())),
            ..Self::new(job.name.clone(), spec, 0, Phase::Stale(None))
        }
    }

    /// Keeps what became of a lease, for people.
    pub fn tell_last(&self, story: Value) {
        match &self.late {
            None => lock(&self.now).last = Some(story),
            Some((job, path)) => {
                let Some(job) = job.upgrade() else {
                    return;
                };
                let mut now = lock(&job.now);
                let last = now
                    .last
                    .get_or_insert_with(|| Value::Object(Default::default()));
                last[path.as_str()] = story;
            }
        }
    }

    pub fn new(name: VolumeName, spec: Spec, created: u64, phase: Phase) -> Self {
        Self {
            name,
            spec,
            admitted: watch::Sender::new(None),
            created,
            late: None,
            op: Mutex::new(()),
            now: Mutex::new(Now {
                phase,
                removed: false,
                leases: 0,
                leaving: BTreeSet::new(),
                settling: Vec::new(),
                last: None,
            }),
        }
    }

    /// What a job's requests start from; `None` as long as nobody said whose job it is.
    pub fn for_requests(&self) -> Option<Spec> {
        match self.spec.admit {
            Admit::AtOnce => Some(self.spec.clone()),
            Admit::Later => self.admitted.borrow().clone(),
        }
    }

    pub fn keeps(&self) -> bool {
        self.spec.reuse == Reuse::Keep
    }
}

/// Whether the end of a lease may publish at all.
pub(super) fn may_publish(spec: &Spec) -> bool {
    !spec.save.is_empty() && spec.publish != Publish::Never
}
