// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hosts of a fleet: which are there, which are lost, and what becomes of what those had. Pure.
//!
//! ```text
//! host/ID     a host's daemon: which process of the host's, and a count that it makes one more every so often
//! left/ID     of a host that was declared lost: the volumes that it had
//! evictor     the host that has, or had last, the turn to evict, and its term
//! ```
//! These are keys of the index, beside those of [`super::index`]. A count that goes on changes no generation, so no host reads
//! the index anew for it.
//!
//! - Every change that a host makes compares its own `host/ID` too. A host that declares another one lost changes that key, in the
//!   same operation that takes over what it had. So either the host's change comes first, or it is refused: whatever was on its way
//!   for however long, nothing of a host that was declared lost is done any more, and no clock is asked for that.
//! - A host is lost once another has looked many times in a row and seen the same count. Looks are counted, not time: a look that
//!   failed, or that came late, begins anew, so that hosts that were cut off together do not take one another for lost.
//! - Each eviction of an entry compares `evictor`, so of two hosts that evict at once one is refused. A turn that is not ended is taken over
//!   once it was seen the same for many looks in a row.
//! - A host sees what is its own, and entries and the base, which are of all hosts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ceph::{Omap, OmapWrite};
use super::index::{Change, Content, Index, Volume};
use crate::cache::names::LvName;
use crate::cache::tags::DOOMED;
use crate::storage::hosts::{self, Lost};

/// What the hosts' keys begin with.
pub const HOST: &str = "host/";
const LEFT: &str = "left/";
/// The key of the host that evicts.
pub const EVICTOR: &str = "evictor";

/// How often a host counts on, and looks at the others.
pub const BEAT: Duration = Duration::from_secs(10);
/// A look later than this after the last one begins anew.
const LATE: Duration = Duration::from_secs(25);
/// After how many looks in a row at the same count a host is lost: five minutes.
pub const LOST: u32 = 30;
/// After how many at the same turn to evict another host takes it over: a minute.
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

/// The host that has the turn to evict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evictor {
    /// Its id.
    pub host: String,
    /// Grows with each turn.
    pub term: u64,
    /// The turn is over.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub done: bool,
}

/// A volume of a host that was declared lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Left {
    lv: String,
    tags: Vec<String>,
}

/// A host's key.
#[must_use]
pub fn key(host: &str) -> String {
    format!("{HOST}{host}")
}

/// The key of what a host had that was declared lost.
#[must_use]
pub fn left_key(host: &str) -> String {
    format!("{LEFT}{host}")
}

/// What `host` had when it was declared lost, of the keys of the index.
#[must_use]
pub fn left(keys: &Omap, host: &str) -> Vec<Lost> {
    let left: Vec<Left> = keys
        .get(&left_key(host))
        .and_then(|left| serde_json::from_slice(left).ok())
        .unwrap_or_default();
    left.into_iter()
        .filter_map(|left| {
            let tags = left.tags.iter().filter_map(|tag| tag.parse().ok());
            Some(Lost {
                lv: left.lv.parse().ok()?,
                tags: tags.collect(),
            })
        })
        .collect()
}

/// Forgets what `host` had when it was declared lost, where that is what `keys` have.
#[must_use]
pub fn forget_left(keys: &Omap, host: &str) -> OmapWrite {
    let key = left_key(host);
    let was = keys.get(&key).cloned().unwrap_or_default();
    OmapWrite {
        create: false,
        compare: Omap::from([(key.clone(), was)]),
        set: Omap::new(),
        remove: vec![key],
    }
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

/// The turn to evict, of the keys of the index.
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

/// Has a change made only as long as that turn lasts.
pub fn guard_eviction(write: &mut OmapWrite, held: &Evictor) {
    write.compare.insert(EVICTOR.to_owned(), json(held));
}

/// Takes the turn to evict for `host`, where that is `was` still.
#[must_use]
pub fn take_turn(was: Option<&Evictor>, host: &str) -> (OmapWrite, Evictor) {
    let now = Evictor {
        host: host.to_owned(),
        term: was.map_or(1, |was| was.term + 1),
        done: false,
    };
    (evicting(was, &now), now)
}

/// Ends a turn, where it lasts still.
#[must_use]
pub fn end_turn(held: &Evictor) -> OmapWrite {
    let now = Evictor {
        done: true,
        ..held.clone()
    };
    evicting(Some(held), &now)
}

fn evicting(was: Option<&Evictor>, now: &Evictor) -> OmapWrite {
    OmapWrite {
        create: false,
        compare: Omap::from([(EVICTOR.to_owned(), was.map(json).unwrap_or_default())]),
        set: Omap::from([(EVICTOR.to_owned(), json(now))]),
        remove: Vec::new(),
    }
}

/// What a host has seen of the others.
#[derive(Debug, Default, Clone)]
pub struct Observer {
    /// Each host's key, and how many looks in a row found it so.
    seen: BTreeMap<String, (Beat, u32)>,
    /// The turn to evict, and the same of it.
    turn: Option<(Evictor, u32)>,
    /// When the last look was.
    last: Option<Duration>,
}

impl Observer {
    /// Takes in what a look found, at `now`, by a clock that only this host has and that is never set.
    pub fn look(&mut self, now: Duration, hosts: &BTreeMap<String, Beat>, turn: Option<&Evictor>) {
        if self.last.is_none_or(|last| now.saturating_sub(last) > LATE) {
            self.interrupted();
        }
        self.last = Some(now);
        let before = self.turn.take().filter(|(was, _)| Some(was) == turn);
        self.turn = turn.map(|turn| (turn.clone(), before.map_or(1, |(_, looks)| looks + 1)));
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
        self.turn = None;
    }

    /// A host shows otherwise that it lives: its looks are counted anew.
    pub fn lives(&mut self, host: &str) {
        if let Some((_, looks)) = self.seen.get_mut(host) {
            *looks = 0;
        }
    }

    /// Hosts that were not declared lost and have not counted on for so many looks, with their keys.
    pub fn silent(&self, looks: u32) -> impl Iterator<Item = (&str, &Beat)> {
        self.seen
            .iter()
            .filter(move |(_, (beat, seen))| !beat.lost && *seen > looks)
            .map(|(host, (beat, _))| (host.as_str(), beat))
    }

    /// Whether another host may take over the turn to evict that is `turn` now: it is over, or was seen so for so many looks,
    /// [`IDLE`].
    #[must_use]
    pub fn is_idle(&self, turn: &Evictor, looks: u32) -> bool {
        let seen = self.turn.as_ref().filter(|(was, _)| was == turn);
        turn.done || seen.is_some_and(|(_, seen)| *seen > looks)
    }
}

/// Whether a host sees a volume: the base, an entry, or one of its own.
#[must_use]
pub fn is_seen_by(volume: &Volume, host: &str) -> bool {
    volume.host.as_deref().is_none_or(|owner| owner == host) || is_shared(volume)
}

/// Whether all hosts see a volume.
pub(super) fn is_shared(volume: &Volume) -> bool {
    let tags: Vec<_> = volume
        .tags
        .iter()
        .filter_map(|tag| tag.parse().ok())
        .collect();
    hosts::is_shared(&tags)
}

/// Declares `lost` lost, where its key is still `beat`: all that it alone saw is `me`'s, to be removed. What that was is kept
/// for it to read when it joins again; of a host that had nothing, nothing is.
#[must_use]
pub fn declare_lost(index: &Index, lost: &str, beat: &Beat, me: &str) -> OmapWrite {
    let mut change = Change::default();
    let mut left = Vec::new();
    for (name, volume) in &index.volumes {
        if volume.host.as_deref() != Some(lost) {
            continue;
        }
        if is_shared(volume) {
            let mut volume = volume.clone();
            if let Content::Own { live, .. } = &mut volume.content
                && std::mem::take(live)
            {
                change.volumes.insert(name.clone(), Some(volume));
            }
        } else {
            left.push(Left {
                lv: name.to_string(),
                tags: volume.tags.clone(),
            });
            change
                .volumes
                .insert(name.clone(), Some(orphan(volume, me)));
        }
    }
    // What it was making nobody makes: it may be garbage from this moment on, and what the host makes once it has joined again is not.
    change.images = index.given_up(|maker| maker.host != lost).images;
    let mut write = change.write(index);
    write.compare.insert(key(lost), json(beat));
    if left.is_empty() {
        // Hosts that come and go for good leave nothing.
        write.remove.push(key(lost));
        return write;
    }
    let was = Beat {
        lost: true,
        ..beat.clone()
    };
    write.set.insert(left_key(lost), json(&left));
    write.set.insert(key(lost), json(&was));
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
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

    use super::super::index::GENERATION;
    use super::*;

    /// An error that is planted, to see that the model finds it: [`FLAWS`] has what it then says.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Flaw {
        None,
        /// A host's changes do not compare its key.
        Unguarded,
        /// Nor the generation.
        Blind,
        /// To declare a host lost does not compare the generation.
        Stale,
        /// Nor the key of the host that does it: two that are cut off declare each other lost.
        Mutual,
        /// A host is declared lost after one look.
        Hasty,
        /// A look that failed, or came late, is passed over.
        Forgetful,
        /// A host that was declared lost is not looked at once more as it is declared.
        Unlooked,
        /// A host that joins again takes up what it had.
        Returning,
        /// Evictions do not compare whose turn it is.
        Usurped,
        /// A turn to evict is taken over as soon as it is seen.
        Impatient,
        /// An entry is tagged before its content is whole.
        Early,
    }

    /// The errors that are planted, and what the model says of each: of a lost entry, a half-written one that is served, a
    /// live lease that is collected, hosts that declare each other lost, and an eviction by two.
    const FLAWS: [(Flaw, &str); 11] = [
        (
            Flaw::Unguarded,
            "was declared lost changed something: Publish",
        ),
        (Flaw::Blind, " lost friend:note:"),
        (Flaw::Stale, " is served no more"),
        (Flaw::Mutual, "was declared lost changed something: Declare"),
        (Flaw::Hasty, " lost after "),
        (Flaw::Forgetful, " lost after "),
        (Flaw::Unlooked, ", which had counted on"),
        (Flaw::Returning, " was collected"),
        (Flaw::Usurped, "out of turn"),
        (Flaw::Impatient, "took the turn from"),
        (Flaw::Early, " is half written"),
    ];

    /// As many looks as the model needs.
    const FEW: u32 = 3;
    const HOSTS: usize = 3;

    /// What happens next, to a host.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// It counts on.
        Beat(usize),
        /// It looks at the others.
        Look(usize),
        /// It declares lost who is: worked out, and on its way.
        Declare(usize),
        /// A lease begins.
        Lease(usize),
        /// A lease's content is whole, and it is to be published: worked out, and on its way.
        Publish(usize),
        /// It tags an entry: worked out, and on its way.
        Tag(usize),
        /// What is on its way from it arrives.
        Arrive(usize),
        /// A volume is made that is to be an entry.
        Make(usize),
        /// It takes the turn to evict, where it may.
        TakeTurn(usize),
        /// It ends that.
        EndTurn(usize),
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
            5 => host.clone().prop_map(Step::Declare),
            3 => host.clone().prop_map(Step::Lease),
            4 => host.clone().prop_map(Step::Publish),
            3 => host.clone().prop_map(Step::Tag),
            8 => host.clone().prop_map(Step::Arrive),
            2 => host.clone().prop_map(Step::Make),
            3 => host.clone().prop_map(Step::TakeTurn),
            1 => host.clone().prop_map(Step::EndTurn),
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
        /// What it makes to be entries.
        making: BTreeSet<LvName>,
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
        /// Per host: looks in a row that came through and saw the turn to evict as it is.
        turns: [u32; HOSTS],
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
                turns: [0; HOSTS],
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
            if write.set.contains_key(EVICTOR) {
                self.turns = [0; HOSTS];
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
            // One that had nothing has no key any more.
            hosts(&self.keys)
                .get(&id(host))
                .map_or(self.hosts[host].mine.is_some(), |beat| beat.lost)
        }

        fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
            match step {
                Step::Start(host) => self.start(host),
                Step::Kill(host) => {
                    // What it has sent is on its way all the same.
                    let killed = &mut self.hosts[host];
                    killed.lives = false;
                    killed.leases.clear();
                    killed.making.clear();
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
                | Step::Make(host)
                | Step::TakeTurn(host)
                | Step::EndTurn(host)
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
                            self.turns[host] = 0;
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
                let out = [DOOMED, "friend:making"];
                !is_shared(volume) && !volume.tags.iter().any(|tag| out.contains(&tag.as_str()))
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
                        lost.making.clear();
                        lost.term = None;
                    }
                }
                Step::Look(_) => {
                    self.look(host);
                }
                Step::Declare(_) => {
                    let declarations = self.declarations(host);
                    self.hosts[host].under_way.extend(declarations);
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
                Step::Make(_) => {
                    self.next += 1;
                    let name: LvName = format!("e{:04}-made", self.next).parse().unwrap();
                    let mut change = Change::default();
                    let making = volume(host, &["friend:snapshot", "friend:making"]);
                    change.volumes.insert(name.clone(), Some(making));
                    if let Some(write) = self.sent(host, &change)
                        && self.write(&write)
                    {
                        self.hosts[host].making.insert(name);
                    }
                }
                Step::Publish(_) => {
                    let made = self.hosts[host].making.pop_first();
                    let lease = self.hosts[host].leases.first();
                    self.next += 1;
                    let name = match (made, lease) {
                        (Some(made), _) => made,
                        (None, Some(lease)) => {
                            format!("e{:04}-of-{lease}", self.next).parse().unwrap()
                        }
                        (None, None) => return Ok(()),
                    };
                    if self.flaw != Flaw::Early {
                        self.whole.insert(name.clone());
                    }
                    let mut change = Change::default();
                    change.volumes.insert(
                        name.clone(),
                        Some(volume(host, &["friend:snapshot", "friend:cache:a"])),
                    );
                    if let Some(write) = self.sent(host, &change) {
                        self.hosts[host]
                            .under_way
                            .push((write, Purpose::Publish(name)));
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
                        self.hosts[host]
                            .under_way
                            .push((write, Purpose::Tag(name, tag)));
                    }
                }
                Step::TakeTurn(_) => {
                    let was = evictor(&self.keys);
                    let looks = if self.flaw == Flaw::Impatient { 0 } else { FEW };
                    let observer = &self.hosts[host].observer;
                    let free = was
                        .as_ref()
                        .is_none_or(|was| was.host == id(host) || observer.is_idle(was, looks));
                    if !free {
                        return Ok(());
                    }
                    let (write, now) = take_turn(was.as_ref(), &id(host));
                    let looked = self.turns[host];
                    prop_assert!(self.write(&write));
                    if let Some(was) = was.filter(|was| !was.done && was.host != id(host)) {
                        prop_assert!(
                            looked > FEW,
                            "{} took the turn from {} after {} looks",
                            host,
                            was.host,
                            looked
                        );
                    }
                    self.hosts[host].term = Some(now);
                }
                Step::EndTurn(_) => {
                    if let Some(held) = self.hosts[host].term.take() {
                        self.write(&end_turn(&held));
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
                        self.hosts[host]
                            .under_way
                            .push((write, Purpose::Evict(entry, term.term)));
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
                self.turns[host] = 0;
            }
            if self.flaw == Flaw::Forgetful {
                self.hosts[host].observer.last = Some(now);
            }
            let turn = evictor(&self.keys);
            (self.hosts[host].observer).look(now, &found, turn.as_ref());
            self.turns[host] += 1;
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
                    let unguarded = match self.flaw {
                        Flaw::Unlooked => key(lost),
                        Flaw::Mutual => key(&id(host)),
                        Flaw::Stale => GENERATION.to_owned(),
                        _ => String::new(),
                    };
                    write.compare.remove(&unguarded);
                    let lost: usize = lost[1..].parse().unwrap();
                    let looks = self.looks[host][lost];
                    (write, Purpose::Declare(lost, looks, self.beats[lost]))
                })
                .collect()
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
                    let turn = evictor(&self.keys).filter(|turn| !turn.done);
                    let turn = turn.map(|turn| turn.term);
                    prop_assert_eq!(turn, Some(term), "{} was evicted out of turn", name);
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

    /// Orders of events that chance hardly finds. A host that declares two lost at once sends that one by one.
    fn rare() -> Vec<Vec<Step>> {
        use Step::{Arrive, Declare, Look, Make, Publish};
        let looks = [Look(0), Look(1)].repeat(5);
        let then = |rest: &[Step]| [&[Make(0)], &looks[..], rest].concat();
        vec![
            // A host that is being declared lost publishes, and that arrives before the declaration; and after it.
            then(&[Declare(1), Publish(0), Arrive(0), Arrive(1), Arrive(1)]),
            then(&[Publish(0), Declare(1), Arrive(1), Arrive(1), Arrive(0)]),
            // Two declare each other lost; the third one first.
            then(
                &[
                    &[Declare(0), Arrive(0), Arrive(0)].repeat(2)[..],
                    &[Declare(1), Arrive(1), Arrive(1)],
                ]
                .concat(),
            ),
        ]
    }

    /// What the model says of rare orders and of so many random ones, of each that it finds fault with.
    fn findings(flaw: Flaw, runs: u32) -> impl Iterator<Item = (String, Vec<Step>)> {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
        let steps = prop::collection::vec(step(), 0..120);
        let random = (0..runs).map(move |_| steps.new_tree(&mut runner).unwrap().current());
        rare().into_iter().chain(random).filter_map(move |steps| {
            let found = holds(flaw, &steps).err()?;
            Some((found.to_string(), steps))
        })
    }

    #[test]
    fn a_fleet_holds_what_it_promises() {
        if let Some((found, steps)) = findings(Flaw::None, 300).next() {
            panic!("{found}: {steps:?}");
        }
    }

    /// Each is found for what it is.
    #[test]
    fn planted_errors_are_found() {
        let missed: Vec<Flaw> = FLAWS
            .into_iter()
            .filter(|(flaw, want)| !findings(*flaw, 1000).any(|(found, _)| found.contains(want)))
            .map(|(flaw, _)| flaw)
            .collect();
        assert!(missed.is_empty(), "not found: {missed:?}");
    }

    /// A host whose daemon is stopped is silent for long; what it has mapped shows that it lives, but for half a minute at times.
    #[test]
    fn a_look_without_a_watcher_is_one_of_many() {
        let beat = Beat {
            process: "p".to_owned(),
            count: 1,
            lost: false,
        };
        let hosts = BTreeMap::from([("a".to_owned(), beat)]);
        let mut observer = Observer::default();
        let mut times = (0..).map(|number| BEAT * number);
        let mut looks = |observer: &mut Observer, count: usize| {
            for now in times.by_ref().take(count) {
                observer.look(now, &hosts, None);
            }
            observer.silent(3).count()
        };
        assert_eq!(looks(&mut observer, 4), 1);
        observer.lives("a");
        assert_eq!(looks(&mut observer, 3), 0);
        assert_eq!(looks(&mut observer, 1), 1);
    }

    /// Of an entry that its host had mapped when it was lost, others may remove snapshots.
    #[test]
    fn what_a_lost_host_had_mapped_it_writes_to_no_more() {
        let mut index = Index::default();
        let mut entry = volume(1, &["friend:snapshot", "friend:cache:a"]);
        if let Content::Own { live, .. } = &mut entry.content {
            *live = true;
        }
        index.volumes.insert("e".parse().unwrap(), entry);
        assert_eq!(index.writers(), BTreeMap::from([("i", "h1")]));
        let beat = Beat {
            process: "p".to_owned(),
            count: 1,
            lost: false,
        };
        let declared = Index::parse(&declare_lost(&index, "h1", &beat, "h2").set).unwrap();
        assert!(declared.volumes.contains_key("e"));
        assert!(declared.writers().is_empty());
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
