// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the store and the mount table say: what each LV is to us, and what a restart makes of that. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use super::catalog::Base;
use super::volume::{Phase, Prepared, Restored, Source, Volume};
use super::{Verdict, tag};
use crate::cache::names::{LvName, Tag, VolumeName};
use crate::cache::record::{Role, place};
use crate::cache::select::Entry;
use crate::cache::spec::{FsType, Kind, Reuse, Spec};
use crate::cache::tags::{CHECKPOINT, LEASE};
use crate::mount::MountPoint;
use crate::storage::{Listing, Lv};

/// What the mount table shows for a directory in memory of ours.
pub(super) const SCRATCH_SOURCE: &str = "lvm-cache-friend";

/// What it shows for a job volume's directory.
pub(super) const JOB_SOURCE: &str = "lvm-cache-friend-job";

/// A listing, sorted by what each LV is to us. Pure.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub entries: Vec<Entry>,
    pub base: Option<Base>,
    pub volumes: Vec<SeenVolume>,
    pub ended: Vec<SeenLease>,
    /// Belong to no volume, and are mounted in a job volume.
    pub lates: Vec<SeenLate>,
    /// Carry `friend:doomed`.
    pub doomed: Vec<LvName>,
    /// Half-made or replaced copies: to be given up. Not valid while the daemon runs.
    pub leftover: Vec<LvName>,
    pub unclear: Vec<(LvName, String)>,
}

/// A volume, as its LVs tell of it.
#[derive(Debug)]
pub(super) struct SeenVolume {
    pub name: VolumeName,
    pub spec: Spec,
    pub created: u64,
    pub current: Option<Current>,
}

/// The LV that a volume goes on with.
#[derive(Debug)]
pub(super) struct Current {
    pub lv: LvName,
    pub from: Option<LvName>,
    pub making: bool,
    pub leased: bool,
    /// A container that used it has failed.
    pub failed: bool,
}

/// A lease that no settlement was committed for.
#[derive(Debug)]
pub(super) struct SeenLease {
    pub lv: LvName,
    pub volume: Option<VolumeName>,
    pub spec: Spec,
    pub from: Option<LvName>,
    /// It began before the present boot of the kernel.
    pub cut_short: bool,
    /// The tag that says so.
    pub mark: Tag,
    /// An entry was made of it already, at its end.
    pub published: bool,
    pub verdict: Verdict,
    /// When the LV was made, seconds since 1970: before the lease began.
    pub made: u64,
}

/// A cache in a job volume.
#[derive(Debug)]
pub(super) struct SeenLate {
    pub lv: LvName,
    pub device: (u32, u32),
    pub spec: Spec,
    pub from: Option<LvName>,
    pub failed: bool,
    pub making: bool,
}

/// What a restart is to do.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What the store holds. `lates` are those of jobs that go on, too: each takes its own.
    pub seen: Seen,
    /// Leases that go on: their mounts are in place.
    pub goes_on: BTreeMap<VolumeName, GoesOn>,
    /// Directories in memory of volumes that the store does not know: it did not serve when they were made.
    pub scratch: Vec<(VolumeName, MountPoint)>,
    /// Mounts that belong to no lease: to be unmounted.
    pub strays: Vec<MountPoint>,
}

/// A lease that goes on after a restart, with the mount that it has.
#[derive(Debug)]
pub(super) enum GoesOn {
    /// Of the volume's current LV.
    Lv(MountPoint),
    /// Of a directory in memory in place of one.
    Scratch(MountPoint),
    /// Of a job volume, with all mounts that are in it.
    Job {
        at: MountPoint,
        inside: Vec<MountPoint>,
    },
}

impl Plan {
    /// From a listing and the mount table, where volumes are mounted in `dir`. `boot` is the kernel's boot id.
    pub fn of(listing: &Listing, table: Vec<MountPoint>, dir: &Path, boot: &str) -> Self {
        let (mut mounts, inside) = own_mounts(table, dir);
        let devices = mounts
            .iter()
            .filter(|(_, m)| m.fs != "tmpfs")
            .map(|(name, m)| (name.clone(), m.device))
            .collect();
        let lates = inside.iter().map(|m| m.device).collect();
        let mut plan = Self {
            seen: Seen::with_mounts(listing, boot, &devices, &lates),
            ..Self::default()
        };
        for volume in &plan.seen.volumes {
            let Some(m) = mounts.remove(&volume.name) else {
                continue;
            };
            match volume.goes_on(&m, &inside) {
                Some(goes_on) => drop(plan.goes_on.insert(volume.name.clone(), goes_on)),
                None => plan.strays.push(m),
            }
        }
        for (name, m) in mounts {
            if is_scratch(&m) {
                plan.scratch.push((name, m));
            } else {
                plan.strays.push(m);
            }
        }
        plan
    }
}

/// What is mounted in `dir`, by volume: the topmost where several are; and what is mounted in those.
fn own_mounts(
    table: Vec<MountPoint>,
    dir: &Path,
) -> (BTreeMap<VolumeName, MountPoint>, Vec<MountPoint>) {
    let mut own = BTreeMap::new();
    let mut inside = Vec::new();
    for m in table {
        let Ok(below) = m.at.strip_prefix(dir) else {
            continue;
        };
        match below.to_str().and_then(|name| name.parse().ok()) {
            Some(name) => drop(own.insert(name, m)),
            None => inside.push(m),
        }
    }
    (own, inside)
}

/// Whether a mount is a directory in memory that stands in for a cache.
pub(super) fn is_scratch(m: &MountPoint) -> bool {
    m.fs == "tmpfs" && m.source == SCRATCH_SOURCE
}

impl SeenLate {
    fn ended(self, mark: &Tag) -> SeenLease {
        SeenLease {
            lv: self.lv,
            volume: None,
            spec: self.spec,
            from: self.from,
            cut_short: false,
            mark: mark.clone(),
            published: false,
            // A job may write to it still, and how that ends nobody will tell.
            verdict: Verdict::Failure,
            made: 0,
        }
    }

    pub fn copy(&self) -> Prepared {
        Current {
            lv: self.lv.clone(),
            from: self.from.clone(),
            making: false,
            leased: true,
            failed: self.failed,
        }
        .copy(Restored::Earlier)
    }
}

impl Seen {
    /// Sorts a listing, with nothing mounted.
    pub fn of(listing: &Listing, boot: &str) -> Self {
        Self::with_mounts(listing, boot, &BTreeMap::new(), &BTreeSet::new())
    }

    /// Sorts a listing. `mounts` says which device is mounted for which volume, and `lates` which
    /// are mounted in job volumes.
    pub fn with_mounts(
        listing: &Listing,
        boot: &str,
        mounts: &BTreeMap<VolumeName, (u32, u32)>,
        lates: &BTreeSet<(u32, u32)>,
    ) -> Self {
        let mut seen = Self::default();
        let mut lvs: Vec<&Lv> = listing.lvs.iter().collect();
        lvs.sort_by_key(|lv| std::cmp::Reverse(lv.seq));
        let mut unsorted = Unsorted::default();
        for lv in lvs {
            seen.add(lv, boot, lates, &mut unsorted);
        }
        for (name, lvs) in unsorted.of_volumes {
            let mounted = mounts.get(&name).copied();
            seen.add_volume(&name, lvs, boot, mounted);
        }
        for lease in &mut seen.ended {
            lease.published = unsorted.origins.contains(&lease.lv);
        }
        seen
    }

    /// Sorts one LV, or puts it off.
    fn add<'a>(
        &mut self,
        lv: &'a Lv,
        boot: &str,
        lates: &BTreeSet<(u32, u32)>,
        unsorted: &mut Unsorted<'a>,
    ) {
        let name = || lv.name.clone();
        match Role::from_tags(&lv.tags) {
            Role::Foreign | Role::Plain => {}
            Role::Unclear(why) => self.unclear.push((name(), why)),
            Role::Base => self.add_base(lv),
            Role::Entry { scope, tags, .. } => {
                // What a job went on writing to has more than its checkpoint.
                if lv.tags.iter().all(|tag| tag.as_str() != CHECKPOINT) {
                    unsorted.origins.extend(lv.origin.clone());
                }
                self.entries.push(entry(lv, scope, tags));
            }
            // An import holds the device open until it is done.
            Role::Making if lv.open => {}
            Role::Making => self.leftover.push(name()),
            Role::Doomed => self.doomed.push(name()),
            Role::Volume {
                volume,
                spec,
                from,
                lease,
                failed,
                making,
            } => {
                let of = VolumeLv {
                    lv,
                    spec: *spec,
                    from,
                    lease,
                    failed,
                    making,
                };
                match volume {
                    Some(volume) => unsorted.of_volumes.entry(volume).or_default().push(of),
                    None => self.add_nameless(of, boot, lates),
                }
            }
        }
    }

    /// What is left of `lates` is mounted where no job goes on, or where it could not be taken hold of: that ends it.
    pub fn end_lates(&mut self, mark: &Tag) {
        for late in std::mem::take(&mut self.lates) {
            if late.making {
                self.leftover.push(late.lv);
            } else {
                self.ended.push(late.ended(mark));
            }
        }
    }

    /// The newest base counts.
    fn add_base(&mut self, lv: &Lv) {
        if let Some(newer) = &self.base {
            let why = format!("friend:default is on {} too, which is newer", newer.lv);
            self.unclear.push((lv.name.clone(), why));
            return;
        }
        self.base = Some(Base {
            lv: lv.name.clone(),
            created: lv.created,
            size: lv.size,
        });
    }

    /// An LV of no volume: of a cache in a job volume, or of a volume that was removed.
    fn add_nameless(&mut self, of: VolumeLv<'_>, boot: &str, lates: &BTreeSet<(u32, u32)>) {
        let lv = of.lv.name.clone();
        if let Some(device) = of.lv.device.filter(|device| lates.contains(device)) {
            self.lates.push(SeenLate {
                lv,
                device,
                spec: of.spec,
                from: of.from,
                failed: of.failed,
                making: of.making,
            });
        } else if let Some(ended) = of.ended(None, boot) {
            self.ended.push(ended);
        } else {
            self.leftover.push(lv);
        }
    }

    /// `lvs` newest first.
    fn add_volume(
        &mut self,
        name: &VolumeName,
        lvs: Vec<VolumeLv<'_>>,
        boot: &str,
        mounted: Option<(u32, u32)>,
    ) {
        let is_mounted = |l: &VolumeLv<'_>| mounted.is_some() && l.lv.device == mounted;
        let keeps = |l: &VolumeLv<'_>| l.spec.reuse == Reuse::Keep;
        // A copy that is not finished never replaces what is finished; a lease
        // that ended is settled, it does not go on.
        let current = lvs
            .iter()
            .position(is_mounted)
            .or_else(|| {
                lvs.iter()
                    .position(|l| !l.making && (keeps(l) || l.lease.is_none()))
            })
            .or_else(|| lvs.iter().position(|l| l.lease.is_none()));
        let told = &lvs[current.unwrap_or(0)];
        let (spec, created) = (told.spec.clone(), told.lv.created);
        let mut volume = SeenVolume {
            name: name.clone(),
            spec,
            created,
            current: None,
        };
        for (i, l) in lvs.into_iter().enumerate() {
            let (leased, is_current) = (is_mounted(&l), Some(i) == current);
            let ended = l.ended(Some(name), boot).filter(|_| !leased);
            if ended.is_none() && !is_current {
                self.leftover.push(l.lv.name.clone());
            }
            self.ended.extend(ended);
            if is_current {
                volume.current = Some(Current {
                    lv: l.lv.name.clone(),
                    from: l.from,
                    making: l.making,
                    leased,
                    failed: l.failed,
                });
            }
        }
        self.volumes.push(volume);
    }
}

/// What is known of a listing's LVs until all were seen.
#[derive(Default)]
struct Unsorted<'a> {
    /// Newest first.
    of_volumes: BTreeMap<VolumeName, Vec<VolumeLv<'a>>>,
    /// What entries were made of at the end of a lease.
    origins: Vec<LvName>,
}

struct VolumeLv<'a> {
    lv: &'a Lv,
    spec: Spec,
    from: Option<LvName>,
    lease: Option<String>,
    failed: bool,
    making: bool,
}

impl VolumeLv<'_> {
    /// The lease whose mark it carries.
    fn ended(&self, volume: Option<&VolumeName>, boot: &str) -> Option<SeenLease> {
        let lease = self.lease.as_deref()?;
        Some(SeenLease {
            lv: self.lv.name.clone(),
            volume: volume.cloned(),
            spec: self.spec.clone(),
            from: self.from.clone(),
            cut_short: lease != boot,
            mark: tag(&format!("{LEASE}{lease}")),
            published: false,
            verdict: verdict(self.failed),
            made: self.lv.created,
        })
    }
}

fn entry(lv: &Lv, scope: Option<Tag>, tags: Vec<Tag>) -> Entry {
    Entry {
        lv: lv.name.clone(),
        seq: place(lv.seq, &lv.tags),
        created: lv.created,
        scope,
        tags,
    }
}

impl SeenVolume {
    /// The lease that `m`, at the volume's mountpoint, is of; `None`: it is of none.
    fn goes_on(&self, m: &MountPoint, inside: &[MountPoint]) -> Option<GoesOn> {
        let m = m.clone();
        if self.current.as_ref().is_some_and(|current| current.leased) {
            Some(GoesOn::Lv(m))
        } else if m.source == JOB_SOURCE && self.spec.kind == Kind::Job {
            let inside = inside.iter().filter(|mount| mount.at.starts_with(&m.at));
            Some(GoesOn::Job {
                inside: inside.cloned().collect(),
                at: m,
            })
        } else if is_scratch(&m) {
            Some(GoesOn::Scratch(m))
        } else {
            None
        }
    }

    /// The volume, not mounted.
    pub fn volume(&self) -> Volume {
        let phase = match &self.current {
            None => Phase::Stale(None),
            Some(current) if self.spec.reuse == Reuse::Keep && !current.making => {
                Phase::Ready(current.copy(Restored::Kept))
            }
            Some(current) => Phase::Stale(Some(current.lv.clone())),
        };
        Volume::new(self.name.clone(), self.spec.clone(), self.created, phase)
    }
}

impl Current {
    pub fn copy(&self, how: Restored) -> Prepared {
        Prepared {
            lv: self.lv.clone(),
            device: None,
            premounted: None,
            making: self.making,
            source: Source {
                lv: self.from.clone(),
                ..Source::of(how)
            },
            generation: 0.into(),
            took: Duration::ZERO,
        }
    }
}

/// The file system of a mount of ours.
pub(super) fn fs_of(m: &MountPoint) -> FsType {
    if m.fs == "ext4" {
        FsType::Ext4
    } else {
        FsType::Xfs
    }
}

fn verdict(failed: bool) -> Verdict {
    if failed {
        Verdict::Failure
    } else {
        Verdict::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::units::Bytes;
    use crate::storage::Capacity;

    /// Each line: name, seq, `dev=N` (active as 253:N), `open`, `origin=LV`, tags.
    fn listing(lines: &str) -> Listing {
        let lv = |line: &str| {
            let mut words = line.split_whitespace();
            let mut lv = Lv {
                name: words.next().unwrap().parse().unwrap(),
                seq: words.next().unwrap().parse().unwrap(),
                created: 1,
                size: Bytes::mib(64),
                tags: vec![],
                origin: None,
                device: None,
                open: false,
            };
            for word in words {
                match word.split_once('=') {
                    Some(("dev", minor)) => lv.device = Some((253, minor.parse().unwrap())),
                    Some(("origin", origin)) => lv.origin = Some(origin.parse().unwrap()),
                    _ if word == "open" => lv.open = true,
                    _ => lv.tags.push(word.parse().unwrap()),
                }
            }
            lv
        };
        Listing {
            lvs: lines
                .lines()
                .filter(|l| !l.trim().is_empty())
                .map(lv)
                .collect(),
            capacity: Capacity::default(),
        }
    }

    /// What is seen, a line for each finding, in order.
    fn seen(lines: &str, mounted: &[(&str, u32)]) -> Vec<String> {
        let mounts = mounted.iter();
        let mounts = mounts.map(|(name, minor)| (name.parse().unwrap(), (253, *minor)));
        let seen = Seen::with_mounts(
            &listing(lines),
            "b00710c5",
            &mounts.collect(),
            &BTreeSet::new(),
        );
        let mut found = Vec::new();
        found.extend(seen.entries.iter().map(|e| format!("entry {}", e.lv)));
        found.extend(seen.base.iter().map(|b| format!("base {}", b.lv)));
        for v in &seen.volumes {
            let current = v.current.as_ref().map_or("nothing".to_owned(), |c| {
                let leased = if c.leased { " leased" } else { "" };
                let making = if c.making { " making" } else { "" };
                format!("{}{leased}{making}", c.lv)
            });
            found.push(format!("volume {} with {current}", v.name));
        }
        for e in &seen.ended {
            let cut_short = if e.cut_short { " cut short" } else { "" };
            let published = if e.published { " published" } else { "" };
            found.push(format!("ended {}{cut_short}{published}", e.lv));
        }
        found.extend(seen.doomed.iter().map(|lv| format!("doomed {lv}")));
        found.extend(seen.leftover.iter().map(|lv| format!("leftover {lv}")));
        found.extend(seen.unclear.iter().map(|(lv, _)| format!("unclear {lv}")));
        found
    }

    #[test]
    fn what_a_restart_finds() {
        const V: &str = "friend:snapshot friend:volume:v";
        const FRESH: &str = "friend:restore:0:a friend:save:a";
        for (case, lines, mounted, want) in [
            ("an empty store", String::new(), vec![], vec![]),
            (
                "others' LVs are not seen",
                "friend-foreign 1\nroot 2 other:tag".to_owned(),
                vec![],
                vec![],
            ),
            (
                "entries newest first, the base, and what is doomed",
                "b 1 friend:default\ne1 2 friend:snapshot friend:cache:a\n\
                 e2 3 friend:snapshot friend:cache:a\nd 4 friend:snapshot friend:cache:a friend:doomed"
                    .to_owned(),
                vec![],
                vec!["entry e2", "entry e1", "base b", "doomed d"],
            ),
            (
                "two bases: the newer one counts",
                "b1 1 friend:default\nb2 2 friend:default".to_owned(),
                vec![],
                vec!["base b2", "unclear b1"],
            ),
            (
                "a volume that waits for its use",
                format!("l 5 dev=1 {V} {FRESH}"),
                vec![],
                vec!["volume v with l"],
            ),
            (
                "a lease that goes on",
                format!("l 5 dev=1 open {V} {FRESH} friend:lease:b00710c5"),
                vec![("v", 1)],
                vec!["volume v with l leased"],
            ),
            (
                "a lease whose mark was not written yet",
                format!("l 5 dev=1 open {V} {FRESH}"),
                vec![("v", 1)],
                vec!["volume v with l leased"],
            ),
            (
                "an ended lease, and the copy that followed it",
                format!("old 5 dev=1 {V} {FRESH} friend:lease:b00710c5\nnew 6 dev=2 {V} {FRESH}"),
                vec![],
                vec!["volume v with new", "ended old"],
            ),
            (
                "an ended lease, and the next one that goes on",
                format!("old 5 dev=1 {V} {FRESH} friend:lease:b00710c5\nnew 6 dev=2 {V} {FRESH} friend:lease:b00710c5"),
                vec![("v", 2)],
                vec!["volume v with new leased", "ended old"],
            ),
            (
                "an ended lease that no copy followed yet: the volume stays",
                format!("old 5 dev=1 {V} {FRESH} friend:lease:b00710c5"),
                vec![],
                vec!["volume v with nothing", "ended old"],
            ),
            (
                "an ended lease of which an entry was made already",
                format!("old 5 dev=1 {V} {FRESH} friend:lease:b00710c5\ne 6 origin=old friend:snapshot friend:cache:a"),
                vec![],
                vec!["entry e", "volume v with nothing", "ended old published"],
            ),
            (
                "an ended lease of which there is a checkpoint",
                format!("old 5 dev=1 {V} {FRESH} friend:lease:b00710c5\n\
                         e 6 origin=old friend:snapshot friend:cache:a friend:note:checkpoint"),
                vec![],
                vec!["entry e", "volume v with nothing", "ended old"],
            ),
            (
                "a lease that a reboot cut short",
                format!("old 5 {V} {FRESH} friend:lease:0000beef"),
                vec![],
                vec!["volume v with nothing", "ended old cut short"],
            ),
            (
                "a lease of a volume that was removed meanwhile",
                format!("old 5 dev=1 friend:snapshot {FRESH} friend:lease:b00710c5"),
                vec![],
                vec!["ended old"],
            ),
            (
                "a refresh that was cut short before the old copy was given up",
                format!("old 5 dev=1 {V} {FRESH}\nnew 6 dev=2 {V} {FRESH}"),
                vec![],
                vec!["volume v with new", "leftover old"],
            ),
            (
                "a kept volume keeps its content, whatever was begun after it",
                format!("old 5 dev=1 {V}\nnew 6 dev=2 {V} friend:making"),
                vec![],
                vec!["volume v with old", "leftover new"],
            ),
            (
                "a kept volume that was never finished",
                format!("l 5 dev=1 {V} friend:making"),
                vec![],
                vec!["volume v with l making"],
            ),
            (
                "a kept volume whose lease is to be published goes on all the same",
                format!("l 5 {V} friend:save:a friend:opt:reuse=keep friend:lease:b00710c5"),
                vec![],
                vec!["volume v with l", "ended l"],
            ),
            (
                "imports: under way, and cut short",
                "i 5 dev=1 open friend:snapshot friend:making\nj 6 friend:snapshot friend:making".to_owned(),
                vec![],
                vec!["leftover j"],
            ),
        ] {
            assert_eq!(seen(&lines, &mounted), want, "{case}");
        }
    }
    /// What a restart plans, a line for each mount. Each line of `table`: where, minor device number, file system, source.
    fn planned(lines: &str, table: &str) -> Vec<String> {
        let mount = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            MountPoint {
                id: 0,
                root: "/".into(),
                at: words[0].into(),
                device: (253, words[1].parse().unwrap()),
                fs: words[2].to_owned(),
                source: words[3].to_owned(),
                shared: true,
                follows: false,
                label: None,
            }
        };
        let table = table.lines().map(str::trim).filter(|l| !l.is_empty());
        let table = table.map(mount).collect();
        let plan = Plan::of(&listing(lines), table, Path::new("/m"), "b00710c5");
        let mut planned = Vec::new();
        for (name, goes_on) in &plan.goes_on {
            planned.push(match goes_on {
                GoesOn::Lv(m) => format!("{name} goes on, of {}", m.device.1),
                GoesOn::Scratch(_) => format!("{name} goes on, in memory"),
                GoesOn::Job { inside, .. } => {
                    let inside: Vec<_> = inside.iter().map(|m| m.device.1.to_string()).collect();
                    format!("job {name} goes on, with {}", inside.join(" "))
                }
            });
        }
        let seen = &plan.seen;
        planned.extend(
            seen.lates
                .iter()
                .map(|late| format!("in a job {}", late.lv)),
        );
        planned.extend(seen.ended.iter().map(|lease| format!("ended {}", lease.lv)));
        planned.extend(seen.leftover.iter().map(|lv| format!("leftover {lv}")));
        let scratch = plan.scratch.iter();
        planned.extend(scratch.map(|(name, _)| format!("scratch {name}")));
        let strays = plan.strays.iter();
        planned.extend(strays.map(|m| format!("stray {}", m.at.display())));
        planned
    }

    #[test]
    fn what_a_restart_plans() {
        const V: &str =
            "l 5 dev=1 open friend:snapshot friend:volume:v friend:restore:0:a friend:save:a";
        const J: &str = "l 5 friend:snapshot friend:volume:j friend:opt:type=job";
        const LATE: &str = "friend:snapshot friend:save:a friend:lease:b00710c5";
        for (case, lines, table, want) in [
            (
                "others' mounts are not seen",
                V.to_owned(),
                "/ 9 ext4 /dev/root\n/mnt/v 1 xfs /dev/l",
                vec![],
            ),
            (
                "a lease goes on",
                V.to_owned(),
                "/m/v 1 xfs /dev/l",
                vec!["v goes on, of 1"],
            ),
            (
                "the topmost mount counts",
                V.to_owned(),
                "/m/v 7 xfs /dev/x\n/m/v 1 xfs /dev/l",
                vec!["v goes on, of 1"],
            ),
            (
                "a mount of what is not the volume's",
                V.to_owned(),
                "/m/v 7 xfs /dev/x",
                vec!["stray /m/v"],
            ),
            (
                "the store did not serve: a volume that it knows, and one that it does not",
                V.to_owned(),
                "/m/v 8 tmpfs lvm-cache-friend\n/m/w 9 tmpfs lvm-cache-friend\n/m/x 3 tmpfs tmpfs",
                vec!["v goes on, in memory", "scratch w", "stray /m/x"],
            ),
            (
                "a job goes on with what is mounted in it, and with no more",
                format!("{J}\na 6 dev=2 open {LATE}\nb 7 dev=3 open {LATE}\nc 8 dev=4 {LATE}"),
                "/m/j 8 tmpfs lvm-cache-friend-job\n/m/j/x/y 2 xfs /dev/a\n/m/k/x 3 xfs /dev/b",
                vec![
                    "job j goes on, with 2",
                    "in a job b",
                    "in a job a",
                    "ended c",
                ],
            ),
            (
                "a job's directory upon a volume that is for no job",
                V.to_owned(),
                "/m/v 8 tmpfs lvm-cache-friend-job",
                vec!["stray /m/v"],
            ),
        ] {
            assert_eq!(planned(&lines, table), want, "{case}");
        }
    }
}
