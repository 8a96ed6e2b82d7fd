// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hosts of a fleet: which are there, which are lost, and what becomes of what those had. Pure.
//!
//! ```text
//! host/ID     a host's daemon: which process of the host's, and a count that it makes one more every so often
//! evictor     the host that plans evictions, and its term
//! ```
//! These are keys of the index, beside those of [`super::index`]. A count that goes on changes no generation, so no host reads
//! the index anew for it.
//!
//! - Every change that a host makes compares its own `host/ID` too. A host that declares another one lost changes that key, in the
//!   same operation that takes over what it had. So either the host's change comes first, or it is refused: whatever was on its way
//!   for however long, nothing of a host that was declared lost is done any more, and no clock is asked for that.
//! - A host is lost once another has looked many times in a row and seen the same count. Looks are counted, not time: a look that
//!   failed, or that came late, begins anew, so that hosts that were cut off together do not take one another for lost.
//! - A host sees what is its own, and entries and the base, which are of all hosts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ceph::{Omap, OmapWrite};
use super::index::{Change, Index, Volume};
use crate::cache::names::LvName;
use crate::cache::record::Role;
use crate::cache::tags::DOOMED;

/// What the hosts' keys begin with.
pub const HOST: &str = "host/";
const EVICTOR: &str = "evictor";

/// How often a host counts on, and looks at the others.
pub const BEAT: Duration = Duration::from_secs(10);
/// A look later than this after the last one begins anew.
const LATE: Duration = Duration::from_secs(25);
/// After how many looks in a row at the same count a host is lost: five minutes.
pub const LOST: u32 = 30;
/// After how many the next host plans evictions: a minute.
pub const IDLE: u32 = 6;

/// A host's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// Which of the host's processes, ever.
    pub process: String,
    /// Grows as long as that lives.
    pub count: u64,
    /// It was declared lost; until a process of the host's joins again.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub lost: bool,
}

/// The host that plans evictions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evictor {
    /// Its id.
    pub host: String,
    /// Grows with each host that takes over.
    pub term: u64,
}

/// A host's key.
#[must_use]
pub fn key(host: &str) -> String {
    format!("{HOST}{host}")
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("numbers and strings")
}

/// The hosts, of the keys of the index.
#[must_use]
pub fn hosts(keys: &Omap) -> BTreeMap<String, Beat> {
    keys.iter()
        .filter_map(|(key, value)| {
            let host = key.strip_prefix(HOST)?;
            Some((host.to_owned(), serde_json::from_slice(value).ok()?))
        })
        .collect()
}

/// Who plans evictions, of the keys of the index.
#[must_use]
pub fn evictor(keys: &Omap) -> Option<Evictor> {
    serde_json::from_slice(keys.get(EVICTOR)?).ok()
}

/// Sets a host's key, where it is what it was.
#[must_use]
pub fn beat(host: &str, was: Option<&Beat>, now: &Beat) -> OmapWrite {
    OmapWrite {
        create: false,
        compare: Omap::from([(key(host), was.map(json).unwrap_or_default())]),
        set: Omap::from([(key(host), json(now))]),
        remove: Vec::new(),
    }
}

/// Has a change made only as long as `host` was not declared lost since it was `mine`.
pub fn guard(write: &mut OmapWrite, host: &str, mine: &Beat) {
    write.compare.insert(key(host), json(mine));
}

/// Has a change made only as long as `held` plans evictions.
pub fn guard_eviction(write: &mut OmapWrite, held: &Evictor) {
    write.compare.insert(EVICTOR.to_owned(), json(held));
}

/// Makes `host` the one that plans evictions, where that is `was` still.
#[must_use]
pub fn take_over(was: Option<&Evictor>, host: &str) -> (OmapWrite, Evictor) {
    let now = Evictor {
        host: host.to_owned(),
        term: was.map_or(1, |was| was.term + 1),
    };
    let write = OmapWrite {
        create: false,
        compare: Omap::from([(EVICTOR.to_owned(), was.map(json).unwrap_or_default())]),
        set: Omap::from([(EVICTOR.to_owned(), json(&now))]),
        remove: Vec::new(),
    };
    (write, now)
}

/// What a host has seen of the others.
#[derive(Debug, Default, Clone)]
pub struct Observer {
    /// Each host's key, and how many looks in a row found it so.
    seen: BTreeMap<String, (Beat, u32)>,
    /// When the last look was.
    last: Option<Duration>,
}

impl Observer {
    /// Takes in what a look found, at `now`, by a clock that only this host has and that is never set.
    pub fn look(&mut self, now: Duration, hosts: &BTreeMap<String, Beat>) {
        if self.last.is_none_or(|last| now.saturating_sub(last) > LATE) {
            self.seen.clear();
        }
        self.last = Some(now);
        let seen = std::mem::take(&mut self.seen);
        self.seen = hosts
            .iter()
            .map(|(host, beat)| {
                let before = seen.get(host).filter(|(was, _)| was == beat);
                (
                    host.clone(),
                    (beat.clone(), before.map_or(1, |(_, looks)| looks + 1)),
                )
            })
            .collect();
    }

    /// A look failed: what was counted counts no more.
    pub fn interrupted(&mut self) {
        self.seen.clear();
    }

    /// Hosts that were not declared lost and have not counted on for so many looks, with their keys.
    pub fn silent(&self, looks: u32) -> impl Iterator<Item = (&str, &Beat)> {
        self.seen
            .iter()
            .filter(move |(_, (beat, seen))| !beat.lost && *seen > looks)
            .map(|(host, (beat, _))| (host.as_str(), beat))
    }

    /// Whether `host`, that plans evictions, has done so no more for so many looks: [`IDLE`].
    #[must_use]
    pub fn is_idle(&self, host: &str, looks: u32) -> bool {
        self.seen
            .get(host)
            .is_none_or(|(beat, seen)| beat.lost || *seen > looks)
    }
}

/// Whether a host sees a volume: the base, an entry, or one of its own.
#[must_use]
pub fn is_seen_by(volume: &Volume, host: &str) -> bool {
    volume.host.as_deref().is_none_or(|owner| owner == host) || is_shared(volume)
}

fn is_shared(volume: &Volume) -> bool {
    let tags: Vec<_> = volume
        .tags
        .iter()
        .filter_map(|tag| tag.parse().ok())
        .collect();
    matches!(Role::from_tags(&tags), Role::Entry { .. } | Role::Base)
}

/// Declares `lost` lost, where its key is still `beat`: all that it alone saw is `me`'s, to be removed.
#[must_use]
pub fn declare_lost(index: &Index, lost: &str, beat: &Beat, me: &str) -> OmapWrite {
    let mut change = Change::default();
    for (name, volume) in &index.volumes {
        if volume.host.as_deref() == Some(lost) && !is_shared(volume) {
            change
                .volumes
                .insert(name.clone(), Some(orphan(volume, me)));
        }
    }
    let mut write = change.write(index);
    write.compare.insert(key(lost), json(beat));
    write.set.insert(
        key(lost),
        json(&Beat {
            lost: true,
            ..beat.clone()
        }),
    );
    write
}

fn orphan(volume: &Volume, me: &str) -> Volume {
    let mut volume = volume.clone();
    volume.host = Some(me.to_owned());
    if !volume.tags.iter().any(|tag| tag == DOOMED) {
        volume.tags.push(DOOMED.to_owned());
    }
    volume
}

/// What `host` sees, by name.
pub fn seen_by<'a>(
    index: &'a Index,
    host: &'a str,
) -> impl Iterator<Item = (&'a LvName, &'a Volume)> {
    index
        .volumes
        .iter()
        .filter(move |(_, volume)| is_seen_by(volume, host))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestError, TestRunner};

    use super::super::index::{Content, GENERATION};
    use super::*;

    /// An error that is planted, to see that the model finds it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Flaw {
        None,
        /// A host's changes do not compare its key.
        Unguarded,
        /// Nor the generation.
        Blind,
        /// A host is declared lost after one look.
        Hasty,
        /// A look that failed, or came late, is passed over.
        Forgetful,
        /// A host that was declared lost is not looked at once more as it is declared.
        Unlooked,
        /// A host that joins again takes up what it had.
        Returning,
        /// Evictions do not compare the evictor.
        Usurped,
        /// An entry is tagged before its content is whole.
        Early,
    }

    const FLAWS: [Flaw; 8] = [
        Flaw::Unguarded,
        Flaw::Blind,
        Flaw::Hasty,
        Flaw::Forgetful,
        Flaw::Unlooked,
        Flaw::Returning,
        Flaw::Usurped,
        Flaw::Early,
    ];

    /// As many looks as the model needs.
    const FEW: u32 = 3;
    const HOSTS: usize = 3;

    /// What happens next, to a host.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// It counts on.
        Beat(usize),
        /// It looks at the others, and declares lost who is.
        Look(usize),
        /// It works that out now, and it arrives later.
        Declare(usize),
        /// A lease begins.
        Lease(usize),
        /// A lease's content is whole, and it is to be published: worked out, and on its way.
        Publish(usize),
        /// It tags an entry: worked out, and on its way.
        Tag(usize),
        /// What is on its way from it arrives.
        Arrive(usize),
        /// It becomes the evictor, where that is idle.
        TakeOver(usize),
        /// It evicts the oldest entry: worked out, and on its way.
        Evict(usize),
        /// Nothing comes through from or to it.
        Cut(usize),
        /// All does.
        Heal(usize),
        /// Its daemon dies.
        Kill(usize),
        /// Another one starts.
        Start(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let host = 0..HOSTS;
        prop_oneof![
            4 => host.clone().prop_map(Step::Beat),
            10 => host.clone().prop_map(Step::Look),
            2 => host.clone().prop_map(Step::Declare),
            3 => host.clone().prop_map(Step::Lease),
            4 => host.clone().prop_map(Step::Publish),
            3 => host.clone().prop_map(Step::Tag),
            5 => host.clone().prop_map(Step::Arrive),
            2 => host.clone().prop_map(Step::TakeOver),
            2 => host.clone().prop_map(Step::Evict),
            1 => host.clone().prop_map(Step::Cut),
            2 => host.clone().prop_map(Step::Heal),
            1 => host.clone().prop_map(Step::Kill),
            2 => host.prop_map(Step::Start),
        ]
    }

    /// What a write on its way is for.
    #[derive(Debug, Clone)]
    enum Purpose {
        Publish(LvName),
        Tag(LvName, String),
        /// Whom, after how many looks, and how often that had counted on by then.
        Declare(usize, u32, u64),
        Evict(LvName, u64),
    }

    #[derive(Default, Clone)]
    struct Host {
        lives: bool,
        cut: bool,
        mine: Option<Beat>,
        observer: Observer,
        /// What it read last.
        known: Index,
        term: Option<Evictor>,
        /// Leases that it takes for its own.
        leases: BTreeSet<LvName>,
        under_way: Vec<(OmapWrite, Purpose)>,
        /// Its own, in seconds.
        clock: u64,
    }

    struct Model {
        flaw: Flaw,
        keys: Omap,
        /// What these hold.
        parsed: Index,
        hosts: Vec<Host>,
        next: u64,
        /// Entries that a host was told are published.
        published: BTreeSet<LvName>,
        /// Those that the evictor of its time evicted.
        evicted: BTreeSet<LvName>,
        whole: BTreeSet<LvName>,
        /// Tags that a host was told are set.
        tagged: BTreeSet<(LvName, String)>,
        /// Per observer and host: looks in a row that came through since that host last counted on.
        looks: [[u32; HOSTS]; HOSTS],
        /// How often each host counted on.
        beats: [u64; HOSTS],
    }

    fn id(host: usize) -> String {
        format!("h{host}")
    }

    impl Model {
        fn new(flaw: Flaw) -> Self {
            let mut this = Self {
                flaw,
                keys: Omap::new(),
                parsed: Index::default(),
                hosts: vec![Host::default(); HOSTS],
                next: 0,
                published: BTreeSet::new(),
                evicted: BTreeSet::new(),
                whole: BTreeSet::new(),
                tagged: BTreeSet::new(),
                looks: [[0; HOSTS]; HOSTS],
                beats: [0; HOSTS],
            };
            this.write(&Change::default().write(&Index::default()));
            this
        }

        /// What an OSD does.
        fn write(&mut self, write: &OmapWrite) -> bool {
            if write.create && !self.keys.is_empty() {
                return false;
            }
            let same = |(key, value): (&String, &Vec<u8>)| {
                self.keys
                    .get(key)
                    .map_or(value.is_empty(), |is| is == value)
            };
            if !write.compare.iter().all(same) {
                return false;
            }
            self.keys.extend(write.set.clone());
            for key in &write.remove {
                self.keys.remove(key);
            }
            if write
                .set
                .keys()
                .any(|key| !key.starts_with(HOST) && key != EVICTOR)
            {
                self.parsed = Index::parse(&self.keys).unwrap();
            }
            true
        }

        fn index(&self) -> &Index {
            &self.parsed
        }

        /// A change of a host's, as it leaves it.
        fn sent(&self, host: usize, change: &Change) -> Option<OmapWrite> {
            let mine = self.hosts[host].mine.clone()?;
            let mut write = change.write(&self.hosts[host].known);
            if self.flaw != Flaw::Unguarded {
                guard(&mut write, &id(host), &mine);
            }
            if self.flaw == Flaw::Blind {
                write.compare.remove(GENERATION);
                write.set.remove(GENERATION);
            }
            Some(write)
        }

        fn is_lost(&self, host: usize) -> bool {
            hosts(&self.keys)
                .get(&id(host))
                .is_some_and(|beat| beat.lost)
        }

        fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
            match step {
                Step::Start(host) => self.start(host),
                Step::Kill(host) => {
                    // What it has sent is on its way all the same.
                    let killed = &mut self.hosts[host];
                    killed.lives = false;
                    killed.leases.clear();
                    killed.term = None;
                }
                Step::Cut(host) => self.hosts[host].cut = true,
                Step::Heal(host) => self.hosts[host].cut = false,
                Step::Arrive(host) => return self.arrive(host),
                Step::Beat(host)
                | Step::Look(host)
                | Step::Declare(host)
                | Step::Lease(host)
                | Step::Publish(host)
                | Step::Tag(host)
                | Step::TakeOver(host)
                | Step::Evict(host) => {
                    self.hosts[host].clock += 10;
                    if !self.hosts[host].lives {
                        return Ok(());
                    }
                    if self.hosts[host].cut {
                        if let Step::Look(_) = step {
                            if self.flaw != Flaw::Forgetful {
                                self.hosts[host].observer.interrupted();
                            }
                            self.looks[host] = [0; HOSTS];
                        }
                        return Ok(());
                    }
                    return self.reach(host, step);
                }
            }
            Ok(())
        }

        fn start(&mut self, host: usize) {
            if self.hosts[host].lives || self.hosts[host].cut {
                return;
            }
            self.next += 1;
            let was = hosts(&self.keys).remove(&id(host));
            let now = Beat {
                process: self.next.to_string(),
                count: 1,
                lost: false,
            };
            assert!(self.write(&beat(&id(host), was.as_ref(), &now)));
            self.beaten(host);
            let index = self.index().clone();
            let name = id(host);
            let mine = seen_by(&index, &name).filter(|(_, volume)| {
                !is_shared(volume) && !volume.tags.iter().any(|tag| tag == DOOMED)
            });
            let mut leases: BTreeSet<LvName> = mine.map(|(name, _)| name.clone()).collect();
            if self.flaw == Flaw::Returning {
                leases.extend(
                    index
                        .volumes
                        .keys()
                        .filter(|name| name.as_str().starts_with(&id(host)))
                        .cloned(),
                );
            }
            let under_way = std::mem::take(&mut self.hosts[host].under_way);
            let clock = self.hosts[host].clock;
            self.hosts[host] = Host {
                lives: true,
                mine: Some(now),
                known: index,
                leases,
                under_way,
                clock,
                ..Host::default()
            };
        }

        /// It has counted on.
        fn beaten(&mut self, host: usize) {
            self.beats[host] += 1;
            for observer in &mut self.looks {
                observer[host] = 0;
            }
        }

        /// What a host does that the cluster answers.
        fn reach(&mut self, host: usize, step: Step) -> Result<(), TestCaseError> {
            self.hosts[host].known = self.index().clone();
            match step {
                Step::Beat(_) => {
                    let Some(was) = self.hosts[host].mine.clone() else {
                        return Ok(());
                    };
                    let now = Beat {
                        count: was.count + 1,
                        ..was.clone()
                    };
                    if self.write(&beat(&id(host), Some(&was), &now)) {
                        self.hosts[host].mine = Some(now);
                        self.beaten(host);
                    } else {
                        // It was declared lost: its leases are.
                        let lost = &mut self.hosts[host];
                        lost.lives = false;
                        lost.leases.clear();
                        lost.term = None;
                    }
                }
                Step::Look(_) => {
                    self.look(host);
                    for write in self.declarations(host) {
                        self.send(host, write, true)?;
                    }
                }
                Step::Declare(_) => {
                    for write in self.declarations(host) {
                        self.send(host, write, false)?;
                    }
                }
                Step::Lease(_) => {
                    self.next += 1;
                    let name: LvName = format!("{}-{}", id(host), self.next).parse().unwrap();
                    let mut change = Change::default();
                    change.volumes.insert(
                        name.clone(),
                        Some(volume(host, &["friend:snapshot", "friend:lease:0123abcd"])),
                    );
                    if let Some(write) = self.sent(host, &change)
                        && self.write(&write)
                    {
                        self.hosts[host].leases.insert(name);
                    }
                }
                Step::Publish(_) => {
                    let Some(lease) = self.hosts[host].leases.first().cloned() else {
                        return Ok(());
                    };
                    self.next += 1;
                    let name: LvName = format!("e{:04}-of-{lease}", self.next).parse().unwrap();
                    if self.flaw != Flaw::Early {
                        self.whole.insert(name.clone());
                    }
                    let mut change = Change::default();
                    change.volumes.insert(
                        name.clone(),
                        Some(volume(host, &["friend:snapshot", "friend:cache:a"])),
                    );
                    if let Some(write) = self.sent(host, &change) {
                        self.send(host, (write, Purpose::Publish(name)), false)?;
                    }
                }
                Step::Tag(_) => {
                    let known = &self.hosts[host].known.volumes;
                    let Some((name, entry)) = known.iter().find(|(_, volume)| is_shared(volume))
                    else {
                        return Ok(());
                    };
                    self.next += 1;
                    let (name, mut entry) = (name.clone(), entry.clone());
                    let tag = format!("friend:note:{}", self.next);
                    entry.tags.push(tag.clone());
                    let mut change = Change::default();
                    change.volumes.insert(name.clone(), Some(entry));
                    if let Some(write) = self.sent(host, &change) {
                        self.send(host, (write, Purpose::Tag(name, tag)), false)?;
                    }
                }
                Step::TakeOver(_) => {
                    let was = evictor(&self.keys);
                    let idle = was.as_ref().is_none_or(|was| {
                        was.host == id(host) || self.hosts[host].observer.is_idle(&was.host, FEW)
                    });
                    if idle {
                        let (write, now) = take_over(was.as_ref(), &id(host));
                        if self.write(&write) {
                            self.hosts[host].term = Some(now);
                        }
                    }
                }
                Step::Evict(_) => {
                    let (Some(term), Some(entry)) = (
                        self.hosts[host].term.clone(),
                        self.hosts[host]
                            .known
                            .volumes
                            .iter()
                            .find(|(_, volume)| is_shared(volume))
                            .map(|(name, _)| name.clone()),
                    ) else {
                        return Ok(());
                    };
                    let mut change = Change::default();
                    let doomed = orphan(&self.hosts[host].known.volumes[&entry], &id(host));
                    change.volumes.insert(entry.clone(), Some(doomed));
                    if let Some(mut write) = self.sent(host, &change) {
                        if self.flaw != Flaw::Usurped {
                            guard_eviction(&mut write, &term);
                        }
                        self.send(host, (write, Purpose::Evict(entry, term.term)), false)?;
                    }
                }
                _ => {}
            }
            Ok(())
        }

        fn look(&mut self, host: usize) {
            let found = hosts(&self.keys);
            let clock = self.hosts[host].clock;
            let last = self.hosts[host].observer.last;
            let now = Duration::from_secs(clock);
            if last.is_none_or(|last| now.saturating_sub(last) > LATE) {
                self.looks[host] = [0; HOSTS];
            }
            if self.flaw == Flaw::Forgetful {
                self.hosts[host].observer.last = Some(now);
            }
            self.hosts[host].observer.look(now, &found);
            for looks in &mut self.looks[host] {
                *looks += 1;
            }
        }

        fn declarations(&self, host: usize) -> Vec<(OmapWrite, Purpose)> {
            let looks = if self.flaw == Flaw::Hasty { 0 } else { FEW };
            let this = &self.hosts[host];
            let Some(mine) = &this.mine else {
                return Vec::new();
            };
            let silent = this
                .observer
                .silent(looks)
                .filter(|(lost, _)| *lost != id(host));
            silent
                .map(|(lost, beat)| {
                    let mut write = declare_lost(&this.known, lost, beat, &id(host));
                    guard(&mut write, &id(host), mine);
                    if self.flaw == Flaw::Unlooked {
                        write.compare.remove(&key(lost));
                    }
                    let lost: usize = lost[1..].parse().unwrap();
                    let looks = self.looks[host][lost];
                    (write, Purpose::Declare(lost, looks, self.beats[lost]))
                })
                .collect()
        }

        fn send(
            &mut self,
            host: usize,
            write: (OmapWrite, Purpose),
            now: bool,
        ) -> Result<(), TestCaseError> {
            self.hosts[host].under_way.push(write);
            if now { self.arrive(host) } else { Ok(()) }
        }

        /// What a host sent is done, or refused, however long ago that was.
        fn arrive(&mut self, host: usize) -> Result<(), TestCaseError> {
            let Some((write, purpose)) = self.hosts[host].under_way.pop() else {
                return Ok(());
            };
            let was_lost = self.is_lost(host);
            let before = self.index().clone();
            if !self.write(&write) {
                return Ok(());
            }
            prop_assert!(
                !was_lost,
                "a host that was declared lost changed something: {:?}",
                purpose
            );
            match purpose {
                Purpose::Publish(name) => {
                    prop_assert!(self.index().volumes.contains_key(&name));
                    _ = self.published.insert(name);
                }
                Purpose::Tag(name, tag) => _ = self.tagged.insert((name, tag)),
                Purpose::Declare(lost, looks, beats) => {
                    prop_assert!(
                        looks > FEW,
                        "{} declared {} lost after {} looks",
                        host,
                        lost,
                        looks
                    );
                    prop_assert_eq!(
                        beats,
                        self.beats[lost],
                        "{} declared {} lost, which had counted on",
                        host,
                        lost
                    );
                }
                Purpose::Evict(name, term) => {
                    let now = evictor(&self.keys).map(|now| now.term);
                    prop_assert_eq!(now, Some(term), "an evictor of the past evicted {}", name);
                    _ = self.evicted.insert(name);
                }
            }
            // What is there does not go but as a volume's owner, its collector or the evictor has it go.
            for name in before.volumes.keys() {
                prop_assert!(self.index().volumes.contains_key(name), "{} is gone", name);
            }
            Ok(())
        }

        fn hold(&self) -> Result<(), TestCaseError> {
            let index = self.index();
            for name in &self.published {
                let volume = index.volumes.get(name);
                prop_assert!(volume.is_some(), "{} is lost", name);
                let served = volume.is_some_and(is_shared);
                prop_assert!(
                    served || self.evicted.contains(name),
                    "{} is served no more",
                    name
                );
            }
            for (name, tag) in &self.tagged {
                let volume = index.volumes.get(name);
                let kept = volume.is_some_and(|volume| volume.tags.contains(tag));
                prop_assert!(kept, "{} lost {}", name, tag);
            }
            for (name, volume) in &index.volumes {
                prop_assert!(
                    !is_shared(volume) || self.whole.contains(name),
                    "{} is half written",
                    name
                );
            }
            for (number, host) in self.hosts.iter().enumerate() {
                // What it takes for its own is its own, as long as it was not declared lost.
                for lease in host.leases.iter().filter(|_| !self.is_lost(number)) {
                    let volume = index.volumes.get(lease);
                    let is_its = volume.is_some_and(|volume| {
                        volume.host.as_deref() == Some(&id(number))
                            && !volume.tags.iter().any(|tag| tag == DOOMED)
                    });
                    prop_assert!(is_its, "{}: the live lease {} was collected", number, lease);
                }
            }
            Ok(())
        }
    }

    fn volume(host: usize, tags: &[&str]) -> Volume {
        Volume {
            seq: 0,
            created: 0,
            size: 0,
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            origin: None,
            host: Some(id(host)),
            content: Content::Own {
                image: "i".to_owned(),
                same: None,
                active: 0,
                live: false,
            },
        }
    }

    fn holds(flaw: Flaw, steps: &[Step]) -> Result<(), TestCaseError> {
        let mut model = Model::new(flaw);
        for host in 0..HOSTS {
            model.step(Step::Start(host))?;
        }
        for step in steps {
            model.step(*step)?;
            model.hold()?;
        }
        Ok(())
    }

    fn tried(flaw: Flaw, cases: u32) -> Result<(), TestError<Vec<Step>>> {
        let config = Config {
            cases,
            failure_persistence: None,
            max_shrink_iters: 0,
            ..Config::default()
        };
        let steps = prop::collection::vec(step(), 0..120);
        TestRunner::new_with_rng(
            config,
            proptest::test_runner::TestRng::deterministic_rng(
                proptest::test_runner::RngAlgorithm::ChaCha,
            ),
        )
        .run(&steps, |steps| holds(flaw, &steps))
    }

    #[test]
    fn a_fleet_holds_what_it_promises() {
        if let Err(error) = tried(Flaw::None, 300) {
            panic!("{error}");
        }
    }

    #[test]
    fn planted_errors_are_found() {
        let missed: Vec<Flaw> = FLAWS
            .into_iter()
            .filter(|flaw| tried(*flaw, 1000).is_ok())
            .collect();
        assert!(missed.is_empty(), "not found: {missed:?}");
    }

    #[test]
    fn who_sees_what() {
        for (tags, seen) in [
            (vec!["friend:snapshot", "friend:cache:a"], true),
            (vec!["friend:default", "friend:snapshot"], true),
            (vec!["friend:snapshot", "friend:volume:v"], false),
            (vec!["friend:snapshot", "friend:making"], false),
            (
                vec!["friend:snapshot", "friend:cache:a", "friend:doomed"],
                false,
            ),
            (vec!["other"], false),
        ] {
            let of_one = volume(1, &tags);
            assert!(is_seen_by(&of_one, "h1"), "{tags:?}");
            assert_eq!(is_seen_by(&of_one, "h2"), seen, "{tags:?}");
            let mut of_none = of_one;
            of_none.host = None;
            assert!(is_seen_by(&of_none, "h2"), "{tags:?}");
        }
    }
}
