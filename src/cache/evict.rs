// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which entries are evicted, in which order, and why. When that is asked, and what is in use then: `engine::bounds`.
//!
//! Least recently used first. What is pinned, or in use, is never evicted; the newest of
//! the entries that were published into one scope under the same tags is evicted after all
//! others, since it is what the next job would take. For want of room, and by number, those of scopes of lesser trust
//! are evicted before all of those ([`Trust`]): a stranger's pull request, which makes scopes at will, does not have the default
//! branch's caches evicted.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::names::{LvName, Tag};
use super::spec::Scope;
use super::units::Bytes;
use crate::text::{shortened, span};

/// Seconds of a day.
const DAY: u64 = 24 * 60 * 60;

/// An entry, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its LV.
    pub lv: LvName,
    /// Its place in the order of publishing.
    pub seq: u64,
    /// When it was published, seconds since 1970.
    pub created: u64,
    /// When something was last restored from it, seconds since 1970; 0: never yet.
    pub used: u64,
    /// Never goes, and counts in no limit.
    pub pinned: bool,
    /// A lease came from it that goes on, or that began a moment ago.
    pub in_use: bool,
    /// Its scope.
    pub scope: Scope,
    /// Its tags.
    pub tags: Vec<Tag>,
}

/// How far a scope is trusted, told by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trust {
    /// Other code than the default branch's writes it: the supervisor calls it `HOST:ID:EVENT:…`, the repository's default scope,
    /// an event, and what it was of, or `HOST/runner/RUNNER` where the job's run is unknown ([`crate::supervisor::scope`]).
    Lesser,
    /// All others: default scopes, those that an administrator has named, and none.
    Full,
}

impl Trust {
    /// That of a scope.
    #[must_use]
    pub fn of(scope: &Scope) -> Self {
        let Some(scope) = scope else {
            return Self::Full;
        };
        let mut of_runner = scope.as_str().split('/').skip(1);
        if of_runner.next() == Some("runner") && of_runner.count() == 1 {
            return Self::Lesser;
        }
        let parts: Vec<&str> = scope.as_str().split(':').collect();
        let is_number =
            |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let is_event = |part: &str| part.starts_with(|first: char| first.is_ascii_alphabetic());
        // A host may have a port.
        let below = parts
            .iter()
            .skip(1)
            .zip(parts.iter().skip(2))
            .any(|(id, event)| is_number(id) && is_event(event));
        if below { Self::Lesser } else { Self::Full }
    }
}

/// How many entries there may be, and how old.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Most entries.
    pub max_entries: Option<usize>,
    /// Longest time since it was published.
    pub max_age: Option<Duration>,
    /// Longest time since something was restored from it, or else since it was published.
    pub max_unused: Option<Duration>,
}

/// How much must be free.
///
/// Parses `10%` and sizes as [`Bytes`] does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Floor {
    /// A share of the whole, 0 to 90.
    Percent(f64),
    /// So much, whatever the whole.
    Bytes(Bytes),
}

/// What a floor may look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a floor: expected a share from 0% to 90%, such as 10%, or a size, such as 20G"
)]
pub struct BadFloor(String);

impl FromStr for Floor {
    type Err = BadFloor;

    fn from_str(text: &str) -> Result<Self, BadFloor> {
        let floor = match text.strip_suffix('%') {
            Some(share) => share
                .trim_end()
                .parse()
                .ok()
                .filter(|share| (0.0..=90.0).contains(share))
                .map(Self::Percent),
            None => text.parse().ok().map(Self::Bytes),
        };
        floor.ok_or_else(|| BadFloor(shortened(text)))
    }
}

/// The bounds of a store.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Of all entries together.
    pub all: Limits,
    /// Of the entries of each scope that is not named in `scopes`.
    pub each_scope: Limits,
    /// Of those of one scope.
    pub scopes: BTreeMap<Scope, Limits>,
    /// What must be free for data.
    pub data: Floor,
    /// What must be free for the pool's metadata.
    pub metadata: Floor,
    /// What must be free for the description of all volumes.
    pub group: Floor,
    /// What must be free for data lest a lease is cut off.
    pub cut_off: Floor,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            all: Limits::default(),
            each_scope: Limits::default(),
            scopes: BTreeMap::new(),
            data: Floor::Percent(10.0),
            metadata: Floor::Percent(10.0),
            group: Floor::Percent(10.0),
            cut_off: Floor::Percent(3.0),
        }
    }
}

/// One of the things that a store can run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bound {
    /// Room for data.
    Data,
    /// Room in a thin pool's metadata.
    Metadata,
    /// Room in a volume group's metadata area.
    Group,
}

impl Bound {
    /// A word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
            Self::Group => "group",
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Metadata => "the pool's metadata",
            Self::Group => "the volume group's metadata",
        })
    }
}

/// How full one of them is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Space {
    /// The whole; 0 where the store has no such bound.
    pub size: Bytes,
    /// Share in use, 0 to 100.
    pub percent: f64,
    /// Share in use from which on the store makes no more volumes.
    pub limit: f64,
}

impl Space {
    /// Bytes that are missing for `floor`, and for volumes to be made: what has to be
    /// given back. 0: none are.
    #[must_use]
    pub fn missing(&self, floor: Floor) -> u64 {
        if self.size.0 == 0 {
            return 0;
        }
        let size = self.size.0 as f64;
        let wanted = self.floor(floor).max(size * (100.0 - self.limit) / 100.0);
        let missing = wanted - self.free();
        // At the limit itself nothing is missing, and yet nothing is made.
        if missing > 0.0 || self.percent >= self.limit {
            (missing as u64).max(1)
        } else {
            0
        }
    }

    /// Share in use, 0 to 100, above which something is missing for `floor`.
    #[must_use]
    pub fn mark(&self, floor: Floor) -> f64 {
        let share = self.floor(floor) * 100.0 / self.size.0.max(1) as f64;
        (100.0 - share).clamp(0.0, self.limit)
    }

    /// Less than that is free.
    #[must_use]
    pub fn is_below(&self, floor: Floor) -> bool {
        self.size.0 > 0 && self.free() < self.floor(floor)
    }

    /// Share in use, 0 to 100, at which just that is free.
    #[must_use]
    pub fn share(&self, floor: Floor) -> f64 {
        100.0 - self.floor(floor) * 100.0 / self.size.0.max(1) as f64
    }

    /// No more volumes are made.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.size.0 > 0 && self.percent >= self.limit
    }

    fn floor(&self, floor: Floor) -> f64 {
        match floor {
            Floor::Percent(share) => self.size.0 as f64 * share / 100.0,
            Floor::Bytes(bytes) => bytes.0 as f64,
        }
    }

    fn free(&self) -> f64 {
        self.size.0 as f64 * (100.0 - self.percent) / 100.0
    }
}

/// How full a store is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Fill {
    /// Of data.
    pub data: Space,
    /// Of the pool's metadata.
    pub metadata: Space,
    /// Of the description of all volumes.
    pub group: Space,
}

impl Fill {
    /// Those that this store has, and what the policy wants free of each.
    #[must_use]
    pub fn bounds(&self, policy: &Policy) -> Vec<(Bound, Space, Floor)> {
        let mut all = vec![
            (Bound::Data, self.data, policy.data),
            (Bound::Metadata, self.metadata, policy.metadata),
            (Bound::Group, self.group, policy.group),
        ];
        all.retain(|(_, space, _)| space.size.0 > 0);
        all
    }
}

/// Why an entry goes.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// It was published too long ago.
    Age(Duration),
    /// It was not used for too long.
    Unused(Duration),
    /// There are more than so many.
    Entries(usize),
    /// There are more than so many in its scope.
    ScopeEntries(usize, Scope),
    /// Too little is free of something.
    Floor(Bound, Space),
    /// A volume was to be made, and there was no room for it.
    Refused,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Age(limit) => write!(f, "published more than {} ago", span(*limit)),
            Self::Unused(limit) => write!(f, "not used for more than {}", span(*limit)),
            Self::Entries(limit) => write!(f, "more entries than {limit}"),
            Self::ScopeEntries(limit, Some(scope)) => {
                write!(f, "more entries in scope {scope} than {limit}")
            }
            Self::ScopeEntries(limit, None) => {
                write!(f, "more entries without scope than {limit}")
            }
            Self::Floor(bound, space) => write!(
                f,
                "{:.1} % of {} for {bound} are in use",
                space.percent, space.size
            ),
            Self::Refused => f.write_str("no room for a new volume"),
        }
    }
}

/// An entry that is to go.
#[derive(Debug, Clone, PartialEq)]
pub struct Victim<'a> {
    /// It.
    pub entry: &'a Entry,
    /// Why.
    pub reason: Reason,
}

/// When something last happened in a store, as far as its entries say and `now` is not before it, in seconds since 1970.
#[must_use]
pub fn last_event(entries: &[Entry], now: u64) -> Option<u64> {
    let times = entries.iter().flat_map(|entry| [entry.created, entry.used]);
    times.filter(|time| *time <= now).max()
}

/// No clock that is right shows an earlier time, in seconds since 1970: 2026-01-01.
const NOT_BEFORE: u64 = 1_767_225_600;

/// How far a clock may be behind what it showed before, in seconds, and be right.
const SLACK: u64 = 5 * 60;

/// Whether ages can be told by a clock that shows `now`: not before that of the entry published last.
#[must_use]
pub fn is_plausible(now: u64, entries: &[Entry]) -> bool {
    let last = entries.iter().max_by_key(|entry| entry.seq);
    now >= NOT_BEFORE && last.is_none_or(|last| last.created <= now + SLACK)
}

/// Puts right the times that a wrong clock gave to entries: before 2026, or after `now`. Such an entry counts
/// as published when the next one was of which that is known, or else now; it was published earlier. A use in the
/// future was one at some time until now.
pub fn correct_times(entries: &mut [Entry], now: u64) {
    let mut newest_first: Vec<&mut Entry> = entries.iter_mut().collect();
    newest_first.sort_unstable_by_key(|entry| Reverse(entry.seq));
    let mut next = now;
    for entry in newest_first {
        if (NOT_BEFORE..=now).contains(&entry.created) {
            next = entry.created;
        } else {
            entry.created = next;
        }
        entry.used = entry.used.min(now);
    }
}

/// The time by a clock that may be set while it is looked at.
///
/// What it shows beside what has passed since it was looked at before, by a clock that is never set, is believed once it
/// has been so for an hour; until then time only passes. So it is with what it shows at first, a day or more after
/// the last that happened in the store: it may be wrong since the machine started. Set back, it is believed at once: then
/// things are younger.
#[derive(Debug, Clone, Copy, Default)]
pub struct Steady {
    /// The time when the other clock began, in seconds since 1970, as far as it is believed.
    began: Option<u64>,
    /// What it would be, and since when, by the other clock, in seconds.
    claimed: Option<(u64, u64)>,
}

impl Steady {
    /// The time in seconds since 1970, where the clock shows `wall` at `passed` seconds of the other one. `last` is when
    /// something last happened in the store.
    pub fn now(&mut self, passed: u64, wall: u64, last: Option<u64>) -> u64 {
        const TRUSTED_AFTER: u64 = 60 * 60;
        let began = wall.saturating_sub(passed);
        let believed = *self.began.get_or_insert_with(|| match last {
            Some(last) if wall > last + DAY => last.saturating_sub(passed),
            _ => began,
        });
        if began <= believed + SLACK {
            self.claimed = None;
            // Small steps and drift, either way.
            self.began = Some(began);
        } else {
            match self.claimed {
                Some((claim, since)) if claim.abs_diff(began) <= SLACK => {
                    if passed.saturating_sub(since) >= TRUSTED_AFTER {
                        (self.began, self.claimed) = (Some(began), None);
                    }
                }
                _ => self.claimed = Some((began, passed)),
            }
        }
        self.began.unwrap_or(began) + passed
    }
}

/// What has to go now, first first.
///
/// `gives` says how many bytes of data the removal of one entry gives back, where that
/// is known; entries share blocks, so that the removal of two gives back that much or
/// more. What is not known is not guessed: then one entry is evicted for a floor, and the caller
/// looks again after its removal. `refused`: a volume could not be made for a scope of that trust, so one goes in any case,
/// if one can that is of no more trust.
#[must_use]
pub fn plan<'a>(
    entries: &'a [Entry],
    fill: &Fill,
    policy: &Policy,
    now: u64,
    gives: impl Fn(&LvName) -> Option<Bytes>,
    refused: Option<Trust>,
) -> Vec<Victim<'a>> {
    let order = in_order(entries, now);
    let mut going: Vec<Option<Reason>> = order
        .iter()
        .map(|entry| policy.outlived(entry, now))
        .collect();
    over_counts(entries, &order, &mut going, policy);
    for (bound, space, floor) in fill.bounds(policy) {
        let gives = |entry: &Entry| match bound {
            Bound::Data => gives(&entry.lv),
            Bound::Metadata | Bound::Group => None,
        };
        let reason = Reason::Floor(bound, space);
        below_floor(&order, &mut going, &reason, space.missing(floor), gives);
    }
    if let (Some(trust), Some(entry), true) =
        (refused, order.first(), going.iter().all(Option::is_none))
        && Trust::of(&entry.scope) <= trust
    {
        going[0] = Some(Reason::Refused);
    }
    let victims = order.into_iter().zip(going);
    victims
        .filter_map(|(entry, reason)| {
            Some(Victim {
                entry,
                reason: reason?,
            })
        })
        .collect()
}

/// Gives a reason to those of `order` that are more than there may be, of a scope and of all.
fn over_counts(entries: &[Entry], order: &[&Entry], going: &mut [Option<Reason>], policy: &Policy) {
    let mut scopes: HashMap<&Scope, usize> = HashMap::new();
    let counted = |entry: &&Entry| !entry.pinned;
    for entry in entries.iter().filter(counted) {
        *scopes.entry(&entry.scope).or_default() += 1;
    }
    let mut all: usize = scopes.values().sum();
    for (entry, reason) in order.iter().zip(going.iter()) {
        if reason.is_some() {
            all -= 1;
            *scopes.get_mut(&entry.scope).expect("counted") -= 1;
        }
    }
    for (entry, reason) in order.iter().zip(going.iter_mut()) {
        let left = scopes.get_mut(&entry.scope).expect("counted");
        let most = policy.of(&entry.scope).max_entries;
        if reason.is_none()
            && let Some(most) = most.filter(|most| *left > *most)
        {
            *reason = Some(Reason::ScopeEntries(most, entry.scope.clone()));
            *left -= 1;
            all -= 1;
        }
    }
    if let Some(most) = policy.all.max_entries {
        for reason in going.iter_mut().filter(|reason| reason.is_none()) {
            if all <= most {
                break;
            }
            *reason = Some(Reason::Entries(most));
            all -= 1;
        }
    }
}

/// Gives `reason` to the first of `order` that have none, until `missing` bytes are given back.
fn below_floor(
    order: &[&Entry],
    going: &mut [Option<Reason>],
    reason: &Reason,
    missing: u64,
    gives: impl Fn(&Entry) -> Option<Bytes>,
) {
    let some = |missing: &u64| *missing > 0;
    let gone = |missing: Option<u64>, entry: &Entry| {
        Some(missing?.saturating_sub(gives(entry)?.0)).filter(some)
    };
    let mut missing = Some(missing).filter(some);
    // What goes anyhow first.
    for (entry, given) in order.iter().zip(going.iter()) {
        if given.is_some() {
            missing = gone(missing, entry);
        }
    }
    for (entry, given) in order.iter().zip(going) {
        if missing.is_some() && given.is_none() {
            *given = Some(reason.clone());
            missing = gone(missing, entry);
        }
    }
}

/// What may go, in the order in which it does.
fn in_order(entries: &[Entry], now: u64) -> Vec<&Entry> {
    let mut newest_first: Vec<&Entry> = entries.iter().collect();
    newest_first.sort_unstable_by_key(|entry| Reverse(entry.seq));
    let mut sets = HashSet::new();
    let mut order: Vec<(bool, &Entry)> = newest_first
        .into_iter()
        .map(|entry| {
            let mut tags: Vec<&Tag> = entry.tags.iter().collect();
            tags.sort_unstable();
            tags.dedup();
            (sets.insert((&entry.scope, tags)), entry)
        })
        .filter(|(_, entry)| !entry.pinned && !entry.in_use)
        .collect();
    order.sort_by_cached_key(|(newest, entry)| {
        let trust = Trust::of(&entry.scope);
        (trust, *newest, entry.last_use(now), entry.seq)
    });
    order.into_iter().map(|(_, entry)| entry).collect()
}

impl Entry {
    /// When it was last of use, seconds since 1970. A clock that was set back is no reason
    /// to take anything for used in the future.
    #[must_use]
    pub fn last_use(&self, now: u64) -> u64 {
        self.created.max(self.used).min(now)
    }
}

impl Policy {
    /// The same, but for ages.
    #[must_use]
    pub fn without_ages(&self) -> Self {
        let without = |limits: &Limits| Limits {
            max_entries: limits.max_entries,
            ..Limits::default()
        };
        let scopes = self.scopes.iter();
        Self {
            all: without(&self.all),
            each_scope: without(&self.each_scope),
            scopes: scopes
                .map(|(scope, limits)| (scope.clone(), without(limits)))
                .collect(),
            ..self.clone()
        }
    }

    fn of(&self, scope: &Scope) -> &Limits {
        self.scopes.get(scope).unwrap_or(&self.each_scope)
    }

    /// Whether an entry is too old, or was not used for too long.
    fn outlived(&self, entry: &Entry, now: u64) -> Option<Reason> {
        let over = |since: u64, limits: [Option<Duration>; 2]| {
            let limit = limits.into_iter().flatten().min()?;
            (now.saturating_sub(since) > limit.as_secs()).then_some(limit)
        };
        let (all, own) = (&self.all, self.of(&entry.scope));
        over(entry.created, [all.max_age, own.max_age])
            .map(Reason::Age)
            .or_else(|| {
                over(entry.last_use(now), [all.max_unused, own.max_unused]).map(Reason::Unused)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 100 * DAY;

    /// `NAME TAGS… created=DAYS-AGO used=DAYS-AGO scope=S pin use`, oldest first.
    fn entries(text: &str) -> Vec<Entry> {
        let lines = text
            .split(';')
            .map(str::trim)
            .filter(|line| !line.is_empty());
        (1..)
            .zip(lines)
            .map(|(seq, line)| {
                let mut words = line.split(' ');
                let mut entry = Entry {
                    lv: words.next().unwrap().parse().unwrap(),
                    seq,
                    created: NOW,
                    used: 0,
                    pinned: false,
                    in_use: false,
                    scope: None,
                    tags: Vec::new(),
                };
                for word in words {
                    let ago = |days: &str| NOW - days.parse::<u64>().unwrap() * DAY;
                    match word.split_once('=') {
                        Some(("created", days)) => entry.created = ago(days),
                        Some(("used", days)) => entry.used = ago(days),
                        Some(("scope", scope)) => entry.scope = Some(scope.parse().unwrap()),
                        _ if word == "pin" => entry.pinned = true,
                        _ if word == "use" => entry.in_use = true,
                        _ => entry.tags.push(word.parse().unwrap()),
                    }
                }
                entry
            })
            .collect()
    }

    fn limits(entries: usize, age: u64, unused: u64) -> Limits {
        let days = |n: u64| (n > 0).then(|| Duration::from_secs(n * DAY));
        Limits {
            max_entries: (entries > 0).then_some(entries),
            max_age: days(age),
            max_unused: days(unused),
        }
    }

    fn all(all: Limits) -> Policy {
        Policy {
            all,
            ..Policy::default()
        }
    }

    fn scopes(each_scope: Limits, named: &[(&str, Limits)]) -> Policy {
        let named = named.iter().map(|(scope, limits)| {
            let scope = (*scope != "-").then(|| scope.parse().unwrap());
            (scope, *limits)
        });
        Policy {
            each_scope,
            scopes: named.collect(),
            ..Policy::default()
        }
    }

    fn told(victims: &[Victim<'_>]) -> String {
        let told = victims
            .iter()
            .map(|victim| format!("{}: {}", victim.entry.lv, victim.reason));
        told.collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn a_clock_that_is_wrong() {
        const NOW: u64 = NOT_BEFORE + 100 * DAY;
        let entries = |times: &[(u64, u64)]| {
            let mut all = super::tests::entries(&"e x; ".repeat(times.len()));
            for (entry, (created, used)) in all.iter_mut().zip(times) {
                (entry.created, entry.used) = (*created, *used);
            }
            all
        };
        let good = entries(&[(NOW - DAY, 0), (NOW - 60, 0)]);
        for (now, want) in [
            (0, false),
            (NOT_BEFORE - 1, false),
            (NOW - DAY, false),
            (NOW - 120, true),
            (NOW, true),
        ] {
            assert_eq!(is_plausible(now, &good), want, "{now}");
        }
        assert!(is_plausible(NOW, &[]) && !is_plausible(1000, &[]));
        // One from the future is believed only as long as it is the last.
        assert!(!is_plausible(NOW, &entries(&[(NOW, 0), (NOW + DAY, 0)])));
        assert!(is_plausible(NOW, &entries(&[(NOW + DAY, 0), (NOW, 0)])));

        let day = |n: u64| NOT_BEFORE + n * DAY;
        for (given, want) in [
            (vec![], vec![]),
            (
                vec![(day(1), 0), (day(2), day(3))],
                vec![(day(1), 0), (day(2), day(3))],
            ),
            // Published in 1970, and in the future.
            (vec![(7, 0), (day(9), 0)], vec![(day(9), 0), (day(9), 0)]),
            (vec![(7, 7)], vec![(NOW, 7)]),
            (
                vec![
                    (day(1), NOW + DAY),
                    (NOW + DAY, 0),
                    (day(2), 0),
                    (NOW + 1, 0),
                ],
                vec![(day(1), NOW), (day(2), 0), (day(2), 0), (NOW, 0)],
            ),
        ] {
            let mut corrected = entries(&given);
            correct_times(&mut corrected, NOW);
            let times: Vec<_> = corrected.iter().map(|e| (e.created, e.used)).collect();
            assert_eq!(times, want, "{given:?}");
        }

        let policy = Policy {
            all: limits(3, 7, 7),
            each_scope: limits(4, 0, 7),
            scopes: [(None, limits(0, 7, 0))].into(),
            ..Policy::default()
        };
        let left = Policy {
            all: limits(3, 0, 0),
            each_scope: limits(4, 0, 0),
            scopes: [(None, limits(0, 0, 0))].into(),
            ..Policy::default()
        };
        assert_eq!(policy.without_ages(), left);
    }

    #[test]
    fn a_clock_that_jumps() {
        const HOUR: u64 = 3600;
        const START: u64 = NOT_BEFORE;
        // What has passed; what the clock shows beyond that; what is believed beyond that.
        let mut clock = Steady::default();
        for (passed, ahead, want) in [
            (0, 0, 0),
            (HOUR, 2, 2),
            (2 * HOUR, 0, 0),
            // A year ahead, and back again.
            (3 * HOUR, 365 * DAY, 0),
            (3 * HOUR + 600, 365 * DAY, 0),
            (3 * HOUR + 700, 0, 0),
            // Ahead for good.
            (4 * HOUR, 365 * DAY, 0),
            (5 * HOUR - 1, 365 * DAY + 1, 0),
            (5 * HOUR, 365 * DAY, 365 * DAY),
            // Set back.
            (6 * HOUR, 9, 9),
        ] {
            let now = clock.now(passed, START + passed + ahead, Some(START - HOUR));
            assert_eq!(now, START + passed + want, "{passed} {ahead}");
        }
        // Started before the time was known.
        let mut clock = Steady::default();
        assert_eq!(clock.now(10, 10, None), 10);
        assert_eq!(clock.now(20, START, None), 20);
        assert_eq!(clock.now(20 + HOUR, START + HOUR, None), START + HOUR);
        // Off for a week, or started with a clock that is wrong.
        let mut clock = Steady::default();
        let last = Some(START - 7 * DAY);
        assert_eq!(clock.now(10, START, last), START - 7 * DAY);
        assert_eq!(clock.now(70, START + 60, last), START - 7 * DAY + 60);
        assert_eq!(clock.now(10 + HOUR, START + HOUR, last), START + HOUR);
    }

    #[test]
    fn limits_of_number_and_age() {
        for (given, policy, want) in [
            ("a x; b x", all(limits(0, 0, 0)), ""),
            ("a x; b x", all(limits(2, 0, 0)), ""),
            (
                "a x; b x; c x",
                all(limits(2, 0, 0)),
                "a: more entries than 2",
            ),
            // Used counts, not published; but the newest of a tag set goes last.
            (
                "a x created=9 used=1; b x created=8; c x created=7",
                all(limits(2, 0, 0)),
                "b: more entries than 2",
            ),
            (
                "a x created=9; b y created=2; c y created=1",
                all(limits(1, 0, 0)),
                "b: more entries than 1; a: more entries than 1",
            ),
            // Tags are a set, and belong to a scope.
            (
                "a x y created=9 scope=s; b y x created=2 scope=s; c x y created=1",
                all(limits(1, 0, 0)),
                "a: more entries than 1; b: more entries than 1",
            ),
            // What stays whatever happens; pinned entries do not count.
            ("a x pin; b x use; c y", all(limits(2, 0, 0)), ""),
            (
                "a x pin; b x use; c y",
                all(limits(1, 0, 0)),
                "c: more entries than 1",
            ),
            (
                "a x created=9 use; b x created=8 pin; c x created=8",
                all(limits(0, 7, 0)),
                "c: published more than 7d ago",
            ),
            (
                "a x created=9 used=9; b x created=9 used=3; c x created=1",
                all(limits(0, 0, 7)),
                "a: not used for more than 7d",
            ),
            (
                "a x created=7; b x created=7 used=7",
                all(limits(0, 7, 7)),
                "",
            ),
            // Each its own scope's, or what every scope has; the stricter of scope and all.
            (
                "a x scope=s; b y scope=s; c x; d y; e x scope=big; f y scope=big",
                scopes(
                    limits(1, 0, 0),
                    &[("big", limits(2, 0, 0)), ("-", limits(0, 0, 0))],
                ),
                "a: more entries in scope s than 1",
            ),
            (
                "a x; b y",
                scopes(limits(0, 0, 0), &[("-", limits(1, 0, 0))]),
                "a: more entries without scope than 1",
            ),
            (
                "a x created=5 scope=s; b x created=5 scope=t",
                Policy {
                    all: limits(0, 9, 0),
                    ..scopes(limits(0, 0, 0), &[("s", limits(0, 4, 0))])
                },
                "a: published more than 4d ago",
            ),
            // What goes for its age counts no more.
            (
                "a x created=9; b x; c x",
                all(limits(2, 7, 0)),
                "a: published more than 7d ago",
            ),
        ] {
            let entries = entries(given);
            let plan = plan(&entries, &Fill::default(), &policy, NOW, |_| None, None);
            assert_eq!(told(&plan), want, "{given}");
        }
    }

    fn space(percent: f64) -> Space {
        Space {
            size: Bytes(1000),
            percent,
            limit: 95.0,
        }
    }

    #[test]
    fn floors() {
        const ENTRIES: &str = "a x created=4; b x created=3; c x created=2; d x created=1";
        let data = |percent| Fill {
            data: space(percent),
            ..Fill::default()
        };
        let fill = |metadata, group| Fill {
            data: space(0.0),
            metadata: space(metadata),
            group: space(group),
        };
        // What is free in percent; how much each entry gives back.
        for (fill, gives, want) in [
            (data(90.0), Some(10), ""),
            (data(90.1), Some(10), "a"),
            (data(92.0), Some(10), "a b"),
            (data(92.0), Some(0), "a b c d"),
            (data(92.0), None, "a"),
            (fill(91.0, 0.0), Some(10), "a"),
            (fill(0.0, 91.0), Some(10), "a"),
            (fill(91.0, 91.0), None, "a"),
            (Fill::default(), None, ""),
        ] {
            let entries = entries(ENTRIES);
            let gives = |_: &LvName| gives.map(Bytes);
            let plan = plan(&entries, &fill, &Policy::default(), NOW, gives, None);
            let names: Vec<_> = plan.iter().map(|victim| victim.entry.lv.as_str()).collect();
            assert_eq!(names.join(" "), want, "{fill:?}");
        }
        let entries = entries(ENTRIES);
        let with = |data: Floor, percent: f64, limit: f64| {
            let policy = Policy {
                data,
                ..Policy::default()
            };
            let fill = Fill {
                data: Space {
                    limit,
                    ..space(percent)
                },
                ..Fill::default()
            };
            told(&plan(&entries, &fill, &policy, NOW, |_| None, None))
        };
        let why = |percent: f64| format!("a: {percent:.1} % of 1000 B for data are in use");
        assert_eq!(with(Floor::Bytes(Bytes(200)), 80.0, 95.0), "");
        assert_eq!(with(Floor::Bytes(Bytes(200)), 80.1, 95.0), why(80.1));
        // Whatever the floor, volumes can be made.
        assert_eq!(with(Floor::Percent(0.0), 94.9, 95.0), "");
        assert_eq!(with(Floor::Percent(0.0), 95.0, 95.0), why(95.0));
        assert_eq!(with(Floor::Percent(10.0), 75.0, 75.0), why(75.0));
    }

    #[test]
    fn one_goes_for_a_volume_that_was_refused() {
        for (given, policy, want) in [
            ("", Policy::default(), ""),
            ("a x pin; b x use", Policy::default(), ""),
            ("a x; b x", Policy::default(), "a: no room for a new volume"),
            ("a x; b x", all(limits(1, 0, 0)), "a: more entries than 1"),
        ] {
            let entries = entries(given);
            let plan = plan(
                &entries,
                &Fill::default(),
                &policy,
                NOW,
                |_| None,
                Some(Trust::Full),
            );
            assert_eq!(told(&plan), want, "{given}");
        }
    }

    #[test]
    fn trust_is_told_by_the_name() {
        for (scope, trust) in [
            ("-", Trust::Full),
            ("linux", Trust::Full),
            ("o/r", Trust::Full),
            ("api.github.com:1296269", Trust::Full),
            ("ghe.example:8443:12", Trust::Full),
            ("api.github.com:12:pull_request:fork/9/main", Trust::Lesser),
            ("api.github.com:12:pull_request_target:run/7", Trust::Lesser),
            ("api.github.com:12:merge_group:commit/abc", Trust::Lesser),
            ("ghe.example:8443:12:push:branch/x", Trust::Lesser),
            ("api.github.com/runner/linux-0-1", Trust::Lesser),
            ("o/runner", Trust::Full),
            ("o/r/runner/x", Trust::Full),
        ] {
            let named = (scope != "-").then(|| scope.parse().unwrap());
            assert_eq!(Trust::of(&named), trust, "{scope}");
        }
    }

    #[test]
    fn scopes_of_lesser_trust_make_room_first_and_for_no_other() {
        let names = |given: &str, policy: &Policy, percent: f64, refused: Option<Trust>| {
            let entries = entries(given);
            let fill = Fill {
                group: space(percent),
                ..Fill::default()
            };
            let gives = |_: &LvName| Some(Bytes(10));
            let plan = plan(&entries, &fill, policy, NOW, gives, refused);
            let names = plan.iter().map(|victim| victim.entry.lv.to_string());
            names.collect::<Vec<_>>().join(" ")
        };
        const BOTH: &str = "old x created=9 scope=h:1; own x created=8 scope=h:1; fork x scope=h:1:pull_request:fork/2/x";
        const ONE: &str = "old x created=9 scope=h:1; own x created=8 scope=h:1";
        let (any, two) = (Policy::default(), all(limits(2, 0, 0)));
        assert_eq!(names(BOTH, &any, 91.0, None), "fork");
        assert_eq!(names(BOTH, &two, 0.0, None), "fork");
        assert_eq!(names(BOTH, &any, 0.0, Some(Trust::Full)), "fork");
        assert_eq!(names(BOTH, &any, 0.0, Some(Trust::Lesser)), "fork");
        assert_eq!(names(ONE, &any, 0.0, Some(Trust::Full)), "old");
        assert_eq!(names(ONE, &any, 0.0, Some(Trust::Lesser)), "");
        // Age is no matter of trust.
        let fresh = all(limits(0, 7, 0));
        assert_eq!(names(BOTH, &fresh, 0.0, None), "old own");
    }

    #[test]
    fn floors_are_parsed() {
        for (text, want) in [
            ("10%", Some(Floor::Percent(10.0))),
            ("0 %", Some(Floor::Percent(0.0))),
            ("2.5%", Some(Floor::Percent(2.5))),
            ("20G", Some(Floor::Bytes(Bytes(20 << 30)))),
            ("90%", Some(Floor::Percent(90.0))),
            ("91%", None),
            ("-1%", None),
            ("NaN%", None),
            ("%", None),
            ("", None),
            ("much", None),
            ("0", None),
        ] {
            assert_eq!(text.parse::<Floor>().ok(), want, "{text:?}");
        }
    }

    fn any_entries() -> impl Strategy<Value = Vec<Entry>> {
        let entry = (
            0..200_u64,
            0..200_u64,
            any::<[bool; 2]>(),
            0..3_usize,
            proptest::collection::vec(0..3_usize, 1..3),
        );
        proptest::collection::vec(entry, 0..30).prop_map(|entries| {
            let named = |n: usize| {
                ["x", "h:1", "h:1:pull_request:fork/2/x"][n]
                    .parse::<Tag>()
                    .unwrap()
            };
            (1..)
                .zip(entries)
                .map(
                    |(seq, (created, used, [pinned, in_use], scope, tags))| Entry {
                        lv: format!("e{seq}").parse().unwrap(),
                        seq,
                        created: created * DAY,
                        used: used * DAY,
                        pinned,
                        in_use,
                        scope: (scope > 0).then(|| named(scope)),
                        tags: tags.into_iter().map(named).collect(),
                    },
                )
                .collect()
        })
    }

    fn any_policy() -> impl Strategy<Value = Policy> {
        let any_limits = || {
            (0..8_usize, 0..150_u64, 0..150_u64).prop_map(|(n, age, unused)| limits(n, age, unused))
        };
        (any_limits(), any_limits(), any_limits()).prop_map(|(all, each_scope, named)| Policy {
            all,
            each_scope,
            scopes: [(None, named)].into(),
            ..Policy::default()
        })
    }

    proptest! {
        #[test]
        fn what_holds_for_any(
            entries in any_entries(),
            policy in any_policy(),
            percent in 0.0..100.0_f64,
            gives in proptest::option::of(0..100_u64),
            refused in proptest::option::of(proptest::sample::select(vec![Trust::Lesser, Trust::Full])),
        ) {
            let fill = Fill { data: space(percent), ..Fill::default() };
            let gives = |_: &LvName| gives.map(Bytes);
            let victims = plan(&entries, &fill, &policy, NOW, gives, refused);
            let names: Vec<_> = victims.iter().map(|victim| &victim.entry.lv).collect();
            let distinct: HashSet<_> = names.iter().collect();
            prop_assert_eq!(distinct.len(), names.len());
            prop_assert!(victims.iter().all(|v| !v.entry.pinned && !v.entry.in_use));

            // Order: by trust, then the newest of a tag set last; else least recently used first.
            let newest = |entry: &Entry| {
                let set = |entry: &Entry| {
                    let tags: std::collections::BTreeSet<_> = entry.tags.iter().cloned().collect();
                    (entry.scope.clone(), tags)
                };
                entries.iter().all(|other| set(other) != set(entry) || other.seq <= entry.seq)
            };
            let place = |entry: &Entry| (Trust::of(&entry.scope), newest(entry), entry.last_use(NOW), entry.seq);
            for pair in victims.windows(2) {
                prop_assert!(place(pair[0].entry) < place(pair[1].entry));
            }
            // What stays, though it might have gone for room, would have gone after what did.
            let room = |victim: &&Victim<'_>| matches!(victim.reason, Reason::Floor(..) | Reason::Refused);
            for victim in victims.iter().filter(room) {
                for kept in entries.iter().filter(|e| !e.pinned && !e.in_use && !names.contains(&&e.lv)) {
                    prop_assert!(place(victim.entry) < place(kept));
                }
            }

            // Once they are gone, the limits are kept as far as they can be.
            let left: Vec<_> = entries.iter().filter(|e| !names.contains(&&e.lv)).cloned().collect();
            let again = plan(&left, &Fill::default(), &policy, NOW, gives, None);
            prop_assert_eq!(again, Vec::new());
            // The order in which entries are listed says nothing.
            let reversed: Vec<_> = entries.iter().rev().cloned().collect();
            let same = plan(&reversed, &fill, &policy, NOW, gives, refused);
            prop_assert_eq!(same, victims);
        }
    }
}
