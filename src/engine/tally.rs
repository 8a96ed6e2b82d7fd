// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What has happened since the daemon started, for people and for Prometheus.
//!
//! In memory alone: the store's tags are the only database, and nothing is decided by these
//! numbers. What is kept is bounded, whatever jobs ask for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;
use serde::{Deserialize, Serialize};

use super::volume::{CUT_OFF, Restored};
use super::{EngineError, lock, unix_now};
use crate::cache::names::LvName;
use crate::cache::spec::Spec;
use crate::storage::StoreError;

/// How many of the last Mounts percentiles are of.
const MOUNTS: usize = 1024;

/// How many tags are told apart. A pipeline that puts each commit's hash into its criteria would
/// fill any memory; the half that was asked for longest ago is forgotten.
const TAGS: usize = 1000;

/// How many of the last failures are kept.
const FAILURES: usize = 20;

/// Upper bounds of a Mount's buckets, in seconds: 0.5 ms where the copy waits, some hundred where it
/// is made first.
const MOUNT_BUCKETS: [f64; 12] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// Upper bounds of a lease's buckets, in seconds.
const LEASE_BUCKETS: [f64; 9] = [
    1.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0,
];

/// What may be restored: the words that Mounts are counted by.
pub const RESTORED: [&str; 7] = [
    Restored::Exact.as_str(),
    Restored::Fallback.as_str(),
    Restored::Base.as_str(),
    Restored::Empty.as_str(),
    Restored::Kept.as_str(),
    Restored::Scratch.as_str(),
    Restored::Earlier.as_str(),
];

/// Why no entry is made where one could not be, whatever was in the way.
const FAILED: &str = "it failed";

/// Why no entry is made of a lease: what is counted.
pub const UNPUBLISHED: [&str; 11] = [
    "no save tags",
    "the job discarded it",
    "publish=never",
    "the work failed",
    "no success verdict",
    "it did not end cleanly",
    "nothing changed",
    "an entry has its tags already",
    "the volume is in use again, or removed",
    CUT_OFF,
    FAILED,
];

/// Why a request is refused: a word for each kind, few, as each is a time series.
pub const REFUSED: [&str; 13] = [
    "no such volume",
    "volume exists",
    "in use",
    "option",
    "no match",
    "too large",
    "stopping",
    "damaged",
    "job request",
    "store full",
    "store timeout",
    "store",
    "system",
];

/// What was counted.
#[derive(Debug)]
pub struct Tally {
    /// How long Mounts took.
    pub mount_time: Histogram,
    /// How long leases lasted.
    pub lease_time: Histogram,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Whole but for `tags` and what follows from `mounts`.
    stats: Stats,
    /// How long the last ones took, in microseconds.
    mounts: VecDeque<u64>,
    /// By tag, with the Mount that asked for it last.
    tags: HashMap<String, (u64, Hits)>,
    /// Counts Mounts with criteria.
    turn: u64,
}

/// How often what was asked for was there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hits {
    /// The first criterion matched.
    pub exact: u64,
    /// A later one did.
    pub fallback: u64,
    /// None did.
    pub miss: u64,
}

impl Hits {
    /// How often something was asked for.
    #[must_use]
    pub fn total(self) -> u64 {
        self.exact + self.fallback + self.miss
    }

    fn add(&mut self, how: Restored) {
        match how {
            Restored::Exact => self.exact += 1,
            Restored::Fallback => self.fallback += 1,
            _ => self.miss += 1,
        }
    }
}

/// Something that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// When, seconds since 1970.
    pub at: u64,
    /// What kind of thing.
    pub reason: String,
    /// What was said of it.
    pub message: String,
}

/// All of it at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// When counting began, seconds since 1970.
    pub since: u64,
    /// Of a fleet: the id of this host, of which all that follows is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub host: Option<String>,
    /// Volumes that there are.
    pub volumes: usize,
    /// Volumes in use.
    pub leases: usize,
    /// Mounts by what was restored: `exact`, `fallback`, `base`, `empty`, `kept`, `scratch`, or `job`.
    pub mounts: BTreeMap<String, u64>,
    /// Mounts of volumes with criteria.
    pub hits: Hits,
    /// The same by each tag (or `prefix*`) in their criteria.
    pub tags: BTreeMap<String, Hits>,
    /// How many of the last Mounts the next two are of.
    pub mounts_timed: usize,
    /// What half of them took at most, in milliseconds.
    pub mount_p50_ms: Option<f64>,
    /// What 99 of 100 took at most, in milliseconds.
    pub mount_p99_ms: Option<f64>,
    /// What was in restored caches when jobs got them, in bytes: what need not be fetched or made again.
    pub restored_bytes: u64,
    /// What leases wrote to their devices, in bytes.
    pub written_bytes: u64,
    /// Entries that were made of leases.
    pub published: u64,
    /// Leases that none was made of, by reason.
    pub unpublished: BTreeMap<String, u64>,
    /// Requests that were refused or failed, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Damaged entries that were given up.
    pub damaged: u64,
    /// Entries that were evicted.
    pub evicted: u64,
    /// How often each entry that is still there was restored from.
    pub entries: BTreeMap<String, u64>,
    /// The last failures, newest first.
    pub failures: VecDeque<Failed>,
}

impl Default for Tally {
    fn default() -> Self {
        let mut counts = Counts::default();
        counts.stats.since = unix_now();
        Self {
            mount_time: Histogram::new(MOUNT_BUCKETS),
            lease_time: Histogram::new(LEASE_BUCKETS),
            counts: Mutex::new(counts),
        }
    }
}

impl Tally {
    /// A lease has begun after `took`. `held`: what was in its file system, in bytes.
    pub(super) fn mounted(
        &self,
        spec: &Spec,
        how: Restored,
        entry: Option<&LvName>,
        held: u64,
        took: Duration,
    ) {
        self.mount_time.observe(took.as_secs_f64());
        let counts = &mut *lock(&self.counts);
        count(&mut counts.stats.mounts, how.as_str());
        if counts.mounts.len() == MOUNTS {
            counts.mounts.pop_front();
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        counts.mounts.push_back(micros);
        if let (Restored::Exact | Restored::Fallback, Some(entry)) = (how, entry) {
            counts.stats.restored_bytes += held;
            count(&mut counts.stats.entries, entry.as_str());
        }
        if how == Restored::Kept || spec.restore.0.is_empty() {
            return;
        }
        counts.stats.hits.add(how);
        counts.turn += 1;
        for term in spec.restore.0.iter().flat_map(|c| c.terms()) {
            let (last, hits) = counts.tags.entry(term.to_string()).or_default();
            // Once a Mount, in however many criteria it is.
            if *last != counts.turn {
                *last = counts.turn;
                hits.add(how);
            }
        }
        if counts.tags.len() > TAGS {
            let mut turns: Vec<_> = counts.tags.values().map(|(turn, _)| *turn).collect();
            let (_, middle, _) = turns.select_nth_unstable(TAGS / 2);
            let middle = *middle;
            counts.tags.retain(|_, (turn, _)| *turn > middle);
        }
    }

    /// A lease was settled that had lasted so long and written so many bytes.
    pub(super) fn settled(&self, lasted: Duration, written: Option<u64>) {
        self.lease_time.observe(lasted.as_secs_f64());
        lock(&self.counts).stats.written_bytes += written.unwrap_or(0);
    }

    /// An entry was made of a lease.
    pub(super) fn published(&self) {
        lock(&self.counts).stats.published += 1;
    }

    /// None was made, as `reason` has it.
    pub(super) fn not_published(&self, reason: &str) {
        debug_assert!(UNPUBLISHED.contains(&reason), "{reason}");
        count(&mut lock(&self.counts).stats.unpublished, reason);
    }

    /// None could be made.
    pub(super) fn publish_failed(&self, message: String) {
        self.not_published(FAILED);
        self.failed("publish", message);
    }

    /// An entry was found damaged.
    pub(super) fn damaged(&self, message: String) {
        lock(&self.counts).stats.damaged += 1;
        self.failed("damaged", message);
    }

    /// An entry was evicted.
    pub(super) fn evicted(&self) {
        lock(&self.counts).stats.evicted += 1;
    }

    /// A request was refused, or did not succeed.
    pub fn refused(&self, error: &EngineError) {
        let reason = reason(error);
        debug_assert!(REFUSED.contains(&reason), "{reason}");
        count(&mut lock(&self.counts).stats.refused, reason);
        self.failed(reason, error.to_string());
    }

    /// Something did not succeed.
    pub(super) fn failed(&self, reason: &str, message: String) {
        let failures = &mut lock(&self.counts).stats.failures;
        failures.truncate(FAILURES - 1);
        failures.push_front(Failed {
            at: unix_now(),
            reason: reason.to_owned(),
            message,
        });
    }

    /// An entry is gone.
    pub(super) fn forget(&self, lv: &LvName) {
        lock(&self.counts).stats.entries.remove(lv.as_str());
    }

    /// What was counted; how many volumes there are it does not know.
    pub(super) fn stats(&self) -> Stats {
        let counts = lock(&self.counts);
        let mut times: Vec<_> = counts.mounts.iter().copied().collect();
        times.sort_unstable();
        let tags = counts.tags.iter();
        Stats {
            tags: tags.map(|(tag, (_, hits))| (tag.clone(), *hits)).collect(),
            mounts_timed: times.len(),
            mount_p50_ms: percentile(&times, 50),
            mount_p99_ms: percentile(&times, 99),
            ..counts.stats.clone()
        }
    }
}

fn count(counts: &mut BTreeMap<String, u64>, what: &str) {
    match counts.get_mut(what) {
        Some(count) => *count += 1,
        None => {
            counts.insert(what.to_owned(), 1);
        }
    }
}

/// What so many percent of sorted `micros` are at most, in milliseconds: the nearest rank.
fn percentile(micros: &[u64], percent: usize) -> Option<f64> {
    let rank = (micros.len() * percent).div_ceil(100).max(1);
    Some(*micros.get(rank - 1)? as f64 / 1000.0)
}

/// One of [`REFUSED`].
fn reason(error: &EngineError) -> &'static str {
    match error {
        EngineError::NoSuchVolume(_) => "no such volume",
        EngineError::Exists(_) => "volume exists",
        EngineError::InUse { .. } => "in use",
        EngineError::Option(_) => "option",
        EngineError::Miss(_) => "no match",
        EngineError::TooLarge(_) => "too large",
        EngineError::Stopping => "stopping",
        EngineError::Damaged(_) => "damaged",
        EngineError::Job(_) => "job request",
        EngineError::Store(StoreError::Full { .. }) => "store full",
        EngineError::Store(StoreError::Timeout { .. }) => "store timeout",
        EngineError::Store(_) => "store",
        EngineError::Io { .. } => "system",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(restore: &str) -> Spec {
        let options = [("restore".to_owned(), restore.to_owned())];
        Spec::parse(&options.into_iter().filter(|(_, v)| !v.is_empty()).collect()).expect("valid")
    }

    #[test]
    fn hits_by_tag() {
        let tally = Tally::default();
        let lv: LvName = "friend-1".parse().expect("a name");
        let ms = Duration::from_millis;
        let wanted = spec("linux abc; linux; npm-*");
        tally.mounted(&wanted, Restored::Exact, Some(&lv), 100, ms(1));
        tally.mounted(&wanted, Restored::Fallback, Some(&lv), 50, ms(2));
        tally.mounted(&spec("linux"), Restored::Base, Some(&lv), 10, ms(3));
        tally.mounted(&spec(""), Restored::Empty, None, 10, ms(4));
        let stats = tally.stats();
        let hits = |exact, fallback, miss| Hits {
            exact,
            fallback,
            miss,
        };
        assert_eq!(stats.hits, hits(1, 1, 1));
        let tags: Vec<_> = stats.tags.iter().map(|(t, h)| (t.as_str(), *h)).collect();
        let want = [
            ("abc", hits(1, 1, 0)),
            ("linux", hits(1, 1, 1)),
            ("npm-*", hits(1, 1, 0)),
        ];
        assert_eq!(tags, want);
        assert_eq!((stats.restored_bytes, stats.entries["friend-1"]), (150, 2));
        assert_eq!((stats.mounts["exact"], stats.mounts["empty"]), (1, 1));
        assert_eq!(
            (stats.mount_p50_ms, stats.mount_p99_ms),
            (Some(2.0), Some(4.0))
        );
        tally.forget(&lv);
        assert!(tally.stats().entries.is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let tally = Tally::default();
        for n in 0..3000 {
            let wanted = spec(&format!("linux commit-{n}"));
            tally.mounted(&wanted, Restored::Base, None, 0, Duration::ZERO);
            tally.failed("store", n.to_string());
        }
        let stats = tally.stats();
        assert!(stats.tags.len() <= TAGS && stats.tags.contains_key("commit-2999"));
        assert_eq!(stats.tags["linux"].miss, 3000, "asked for last");
        assert_eq!((stats.mounts_timed, stats.hits.miss), (MOUNTS, 3000));
        assert_eq!(stats.failures.len(), FAILURES);
        assert_eq!(stats.failures[0].message, "2999");
    }

    #[test]
    fn percentiles() {
        let hundred: Vec<_> = (1..=100).map(|n| n * 1000).collect();
        assert_eq!(percentile(&hundred, 50), Some(50.0));
        assert_eq!(percentile(&hundred, 99), Some(99.0));
        assert_eq!(percentile(&[7000], 99), Some(7.0));
        assert_eq!(percentile(&[], 50), None);
    }
}
