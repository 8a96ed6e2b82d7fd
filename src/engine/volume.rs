// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A volume in memory, the phases that its copies of entries go through, and what a lease of it has.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::watch;

use super::budget::Budget;
use super::told::{self, Told};
use super::{Verdict, lock};
use crate::cache::late_path::LatePath;
use crate::cache::names::{LvName, Tag, VolumeName};
use crate::cache::spec::{Admit, FsType, Publish, Reuse, Spec};
use crate::container::Container;
use crate::mount::Mounted;
use crate::userns::Ids;

/// Why what was cut off is not published.
pub(super) const CUT_OFF: &str = "it was cut off: it filled the store";

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
    /// Held while the volume is changed, over all the I/O that this takes.
    pub op: Mutex<()>,
    /// Held for moments only: Get and List read it.
    pub now: Mutex<Now>,
}

/// What a volume is at the moment. Its phase changes by a [`Transition`] alone.
#[derive(Debug)]
pub(super) struct Now {
    phase: Phase,
    /// How many leases have begun, in this life of the daemon.
    pub leases: u64,
    /// Clients whose Unmount waits for its turn.
    pub leaving: BTreeSet<String>,
    /// LVs of ended leases that still bear the volume's name.
    pub settling: Vec<LvName>,
    /// What became of the last lease, for people.
    pub last: Option<serde_json::Value>,
}

/// The phase that a volume is in, and what it has in that.
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
    /// It is no more, or never was: its Create failed. A thread that waited for `op` meanwhile finds it so.
    Removed,
}

/// A phase, without what a volume has in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Making,
    Changing,
    Stale,
    Ready,
    Leased,
    Removed,
}

impl Phase {
    const fn name(&self) -> Name {
        match self {
            Self::Making => Name::Making,
            Self::Changing => Name::Changing,
            Self::Stale(_) => Name::Stale,
            Self::Ready(_) => Name::Ready,
            Self::Leased(_) => Name::Leased,
            Self::Removed => Name::Removed,
        }
    }
}

/// A change of a volume's phase.
#[derive(Debug)]
pub(super) struct Transition {
    name: &'static str,
    /// The phases that it may start from.
    from: &'static [Name],
    /// The phases that it may lead to.
    to: &'static [Name],
    /// What brings it about.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is drawn"))]
    by: &'static str,
}

/// All phases of a volume that is there. `Making` and `Changing` are left behind only by a thread that panicked: what the
/// volume had then is lost, and the next change starts without it.
const THERE: &[Name] = &[
    Name::Making,
    Name::Changing,
    Name::Stale,
    Name::Ready,
    Name::Leased,
];

const IDLE: &[Name] = &[Name::Stale, Name::Ready];

pub(super) const MADE: Transition = Transition {
    name: "made",
    from: &[Name::Making],
    to: IDLE,
    by: "Create has made the first copy, or a placeholder for it",
};

pub(super) const FAILED: Transition = Transition {
    name: "failed",
    from: &[Name::Making],
    to: &[Name::Removed],
    by: "Create could not",
};

pub(super) const RESUME: Transition = Transition {
    name: "resume",
    from: IDLE,
    to: &[Name::Leased],
    by: "a restart of the daemon finds the volume mounted",
};

pub(super) const MOUNT: Transition = Transition {
    name: "mount",
    from: THERE,
    to: &[Name::Changing],
    by: "Mount, but for a lease whose mount is in its place: that goes on",
};

pub(super) const LEASE: Transition = Transition {
    name: "lease",
    from: &[Name::Changing],
    to: &[Name::Leased],
    by: "Mount has moved the mount into its place",
};

pub(super) const UNMOUNT: Transition = Transition {
    name: "unmount",
    from: &[Name::Leased],
    to: &[Name::Changing],
    by: "the Unmount of the last client",
};

pub(super) const REPLACE: Transition = Transition {
    name: "replace",
    from: &[Name::Stale],
    to: &[Name::Changing],
    by: "the last lease is settled, and the next copy is made",
};

pub(super) const REFRESH: Transition = Transition {
    name: "refresh",
    from: IDLE,
    to: &[Name::Changing],
    by: "there is something better to restore from",
};

pub(super) const REMOVE: Transition = Transition {
    name: "remove",
    from: THERE,
    to: &[Name::Changing],
    by: "Remove",
};

pub(super) const WAIT: Transition = Transition {
    name: "wait",
    from: &[Name::Changing],
    to: IDLE,
    by: "the change is done, or failed",
};

pub(super) const REMOVED: Transition = Transition {
    name: "removed",
    from: &[Name::Changing],
    to: &[Name::Removed],
    by: "no LV has the volume's name any more",
};

pub(super) const LOST: Transition = Transition {
    name: "lost",
    from: IDLE,
    to: &[Name::Removed],
    by: "another program removed the LV",
};

pub(super) const LEAVE: Transition = Transition {
    name: "leave",
    from: &[Name::Stale],
    to: &[Name::Removed],
    by: "the lease of a cache in a job volume ends: it is never used again",
};

/// All changes of phase that there are; docs/architecture.md draws them.
#[cfg(test)]
const TRANSITIONS: [&Transition; 13] = [
    &MADE, &FAILED, &RESUME, &MOUNT, &LEASE, &UNMOUNT, &REPLACE, &REFRESH, &REMOVE, &WAIT,
    &REMOVED, &LOST, &LEAVE,
];

/// The transitions as a diagram and a table, for docs/.
#[cfg(test)]
pub(crate) fn drawn() -> String {
    use std::fmt::Write as _;

    let names = |names: &[Name]| {
        let names: Vec<_> = names.iter().map(|name| format!("{name:?}")).collect();
        names.join(", ")
    };
    let mut diagram = "```mermaid\nstateDiagram-v2\n".to_owned();
    diagram += "    [*] --> Making: create\n    [*] --> Stale: found\n    [*] --> Ready: found\n";
    let mut table = "| change | from | to | by |\n|---|---|---|---|\n".to_owned();
    for of in TRANSITIONS {
        let (name, by) = (of.name, of.by);
        let _ = writeln!(
            table,
            "| {name} | {} | {} | {by} |",
            names(of.from),
            names(of.to)
        );
        for (from, to) in of
            .from
            .iter()
            .flat_map(|from| of.to.iter().map(move |to| (from, to)))
        {
            // What a panic left behind would hide the rest.
            if !matches!((of.from.len(), from), (5, Name::Making | Name::Changing)) {
                let _ = writeln!(diagram, "    {from:?} --> {to:?}: {name}");
            }
        }
    }
    diagram += "    Removed --> [*]\n```\n";
    format!("{diagram}\n{table}")
}

impl Now {
    pub const fn phase(&self) -> &Phase {
        &self.phase
    }

    pub const fn is_removed(&self) -> bool {
        matches!(self.phase, Phase::Removed)
    }

    /// The present lease, if there is one.
    pub const fn lease(&self) -> Option<&Lease> {
        match &self.phase {
            Phase::Leased(lease) => Some(lease),
            _ => None,
        }
    }

    /// [`Self::lease`], to be changed.
    pub const fn lease_mut(&mut self) -> Option<&mut Lease> {
        match &mut self.phase {
            Phase::Leased(lease) => Some(lease),
            _ => None,
        }
    }

    /// Begins a change for the holder of `op`, which gets what the volume has: [`Phase::Stale`], [`Phase::Ready`] or
    /// [`Phase::Leased`]. `None`: the volume is in none of the phases that `change` starts from, and stays in its own.
    pub fn begin(&mut self, change: &Transition) -> Option<Phase> {
        debug_assert!(change.to == [Name::Changing], "{change:?}");
        if !change.from.contains(&self.phase.name()) {
            return None;
        }
        match mem::replace(&mut self.phase, Phase::Changing) {
            Phase::Making | Phase::Changing | Phase::Removed => Some(Phase::Stale(None)),
            before => Some(before),
        }
    }

    /// Makes a change to a phase in which the volume stays. Gives the one before, whose copy takes longer to drop than
    /// [`Volume::now`] may be held.
    pub fn set(&mut self, change: &Transition, to: Phase) -> Phase {
        debug_assert!(
            change.from.contains(&self.phase.name()) && change.to.contains(&to.name()),
            "{}: {:?} -> {to:?}",
            change.name,
            self.phase
        );
        mem::replace(&mut self.phase, to)
    }
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
    /// The store has it that its end is not published.
    pub withheld: bool,
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

/// A job volume's lease: what is mounted in it.
#[derive(Debug)]
pub struct Job {
    pub(super) volume: Arc<Volume>,
    /// Its directory, where it is attached.
    pub(super) dir: Mounted,
    pub(super) now: Mutex<JobNow>,
    /// Held from what the job says of how it ended until that is noted: the last word stands.
    pub(super) judging: Mutex<()>,
    pub(super) closed: watch::Sender<bool>,
}

/// What a job volume's lease is at the moment.
#[derive(Debug, Default)]
pub(super) struct JobNow {
    pub closed: bool,
    /// `None`: being made.
    pub mounts: BTreeMap<LatePath, Option<Late>>,
    /// Checkpoints that were made, or are being made.
    pub saves: usize,
    /// It has been mounted so often that attaching one more mount takes too long.
    pub multiplied: bool,
    /// What the job itself says of how it ended.
    pub verdict: Verdict,
    /// LVs that are tagged as ones whose work failed, or are about to be.
    pub failed: BTreeSet<LvName>,
    pub budget: Budget,
    /// The containers that have it and run, as far as hooks told.
    pub containers: BTreeMap<String, Container>,
}

/// A cache in a job volume.
#[derive(Debug)]
pub(super) struct Late {
    pub volume: Arc<Volume>,
    pub lease: Lease,
    /// The mount, where it is attached.
    pub place: OwnedFd,
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
            withheld: false,
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
            Backing::Job { job, .. } => &job.dir,
        }
    }

    /// How the work in it ended.
    pub fn heard(&self) -> Heard {
        Heard {
            by_job: match &self.backing {
                Backing::Job { job, .. } => lock(&job.now).verdict,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn copy() -> Prepared {
        Prepared {
            lv: "friend-1".parse().unwrap(),
            device: None,
            premounted: None,
            making: false,
            source: Source::of(Restored::Empty),
            generation: 0.into(),
            took: Duration::ZERO,
        }
    }

    #[test]
    fn a_change_begins_from_its_phases_alone() {
        for change in TRANSITIONS {
            if change.to != [Name::Changing] {
                continue;
            }
            for phase in [
                Phase::Making,
                Phase::Changing,
                Phase::Stale(None),
                Phase::Ready(copy()),
                Phase::Removed,
            ] {
                let before = phase.name();
                let spec = Spec::default();
                let volume = Volume::new("v".parse().unwrap(), spec, 0, phase);
                let mut now = lock(&volume.now);
                let has = now.begin(change).map(|phase| phase.name());
                let case = format!("{} from {before:?}", change.name);
                if change.from.contains(&before) {
                    let idle = if before == Name::Ready {
                        Name::Ready
                    } else {
                        Name::Stale
                    };
                    assert_eq!(has, Some(idle), "{case}");
                    assert_eq!(now.phase().name(), Name::Changing, "{case}");
                } else {
                    assert_eq!(has, None, "{case}");
                    assert_eq!(now.phase().name(), before, "{case}");
                }
            }
        }
    }

    #[test]
    fn a_removed_volume_stays_so() {
        for change in TRANSITIONS {
            assert!(!change.from.contains(&Name::Removed), "{}", change.name);
        }
    }
}
