// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Metrics in Prometheus' text format.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

pub use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::{Contents, Supervisor};
use crate::api::runners::{PoolReport, STATES, WAITS, Waits};
use crate::cache::evict::{Floor, Policy, Space};
use crate::cache::verdict::Verdict;
use crate::engine::{Engine, REFUSED, RESTORED, UNPUBLISHED};
use crate::storage::Listing;
use crate::storage::hosts::Fleet;
use crate::views::rows::{Kind, Rows};

type Labels = Vec<(&'static str, String)>;

/// All metrics. Without a listing those of the store are left out: a value of another time would
/// be taken for the present one. So are the supervisor's while it is away.
pub(super) fn text(
    engine: &Engine,
    contents: Result<Contents, String>,
    supervisor: &Supervisor,
) -> String {
    let stats = engine.stats();
    let tally = engine.tally();
    let mut all = Registry::with_prefix("lvm_cache_friend");

    let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    all.register("build", "The daemon's version", version);
    gauge(
        &mut all,
        "start_time",
        "When the daemon started, since 1970",
        Some(Unit::Seconds),
        stats.since as f64,
    );
    gauge(
        &mut all,
        "volumes",
        "Volumes that there are",
        None,
        stats.volumes as f64,
    );
    gauge(
        &mut all,
        "leases",
        "Volumes in use",
        None,
        stats.leases as f64,
    );

    counters(
        &mut all,
        "mounts",
        "Mounts of caches, by what was restored",
        ("restored", &RESTORED),
        &stats.mounts,
    );
    let hits = [
        ("exact", stats.hits.exact),
        ("fallback", stats.hits.fallback),
        ("miss", stats.hits.miss),
    ];
    let hits = hits.map(|(result, n)| (result.to_owned(), n)).into();
    counters(
        &mut all,
        "lookups",
        "Mounts of volumes with criteria, by whether the first of them matched, a later one, or none",
        ("result", &[]),
        &hits,
    );
    all.register_with_unit(
        "mount",
        "How long Mounts of caches took",
        Unit::Seconds,
        tally.mount_time.clone(),
    );
    all.register_with_unit(
        "lease",
        "How long leases lasted",
        Unit::Seconds,
        tally.lease_time.clone(),
    );
    counter(
        &mut all,
        "restored",
        "What was in restored caches when jobs got them",
        Some(Unit::Bytes),
        stats.restored_bytes,
    );
    counter(
        &mut all,
        "written",
        "What leases wrote to their devices",
        Some(Unit::Bytes),
        stats.written_bytes,
    );
    counter(
        &mut all,
        "published",
        "Entries that were made of leases",
        None,
        stats.published,
    );
    counters(
        &mut all,
        "unpublished",
        "Leases that no entry was made of",
        ("reason", &UNPUBLISHED),
        &stats.unpublished,
    );
    counters(
        &mut all,
        "refusals",
        "Requests that were refused or failed",
        ("reason", &REFUSED),
        &stats.refused,
    );
    counter(
        &mut all,
        "damaged_entries",
        "Entries that were found damaged and given up",
        None,
        stats.damaged,
    );

    counter(
        &mut all,
        "evicted_entries",
        "Entries that were evicted",
        None,
        stats.evicted,
    );

    gauge(
        &mut all,
        "store_up",
        "Whether the store answers",
        None,
        f64::from(contents.is_ok()),
    );
    if let Ok(contents) = contents {
        store(&mut all, &contents.listing, engine.policy());
        if let Some(fleet) = &contents.fleet {
            hosts(&mut all, fleet);
        }
    }
    supervised(&mut all, supervisor);
    let mut text = String::new();
    encode(&mut text, &all).expect("a String takes all");
    text
}

fn store(all: &mut Registry, listing: &Listing, policy: &Policy) {
    let full = listing.capacity;
    gauge(
        all,
        "pool_size",
        "What data can take, in all",
        Some(Unit::Bytes),
        full.data_size.0 as f64,
    );
    let bounds = full.fill().bounds(policy);
    let share: fn(Space, Floor) -> f64 = |space, _| space.percent;
    let mark: fn(Space, Floor) -> f64 = |space, floor| space.mark(floor);
    let limit: fn(Space, Floor) -> f64 = |space, _| space.limit;
    for (name, help, percent) in [
        (
            "pool_used",
            "How full the pool is: its data, its metadata, and the group's metadata",
            share,
        ),
        (
            "pool_evict",
            "How full it is when entries are evicted",
            mark,
        ),
        (
            "pool_limit",
            "How full it is when no more volumes are made",
            limit,
        ),
    ] {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (bound, space, floor) in &bounds {
            let labels = vec![("part", bound.word().to_owned())];
            let ratio = percent(*space, *floor) / 100.0;
            family.get_or_create(&labels).set(ratio);
        }
        all.register_with_unit(name, help, Unit::Other("ratio".into()), family);
    }
    let rows = Rows::new(listing, None, &[]);
    let entries = rows.rows.iter().filter(|row| row.kind == Kind::Entry);
    gauge(
        all,
        "entries",
        "Entries that can be restored from",
        None,
        entries.count() as f64,
    );
    gauge(
        all,
        "removals_waiting",
        "Logical volumes that are marked for removal",
        None,
        rows.doomed as f64,
    );
    gauge(
        all,
        "unclear_volumes",
        "Logical volumes that are left alone, as their tags make no sense",
        None,
        rows.unclear.len() as f64,
    );
}

fn hosts(all: &mut Registry, fleet: &Fleet) {
    let family = Family::<Labels, Gauge>::default();
    for (state, lost) in [("joined", false), ("lost", true)] {
        let of = fleet.hosts.iter().filter(|host| host.lost == lost);
        let labels = vec![("state", state.to_owned())];
        family.get_or_create(&labels).set(of.count() as i64);
    }
    let help = "Hosts that share the store: whose daemon was started, and that other hosts took for lost since";
    all.register("hosts", help, family);
}

fn supervised(all: &mut Registry, supervisor: &Supervisor) {
    let report = match supervisor {
        Supervisor::None => return,
        Supervisor::Away => None,
        Supervisor::Says(report) => Some(report),
    };
    gauge(
        all,
        "supervisor_up",
        "Whether the supervisor of runners was heard of lately",
        None,
        f64::from(report.is_some()),
    );
    let Some(report) = report else { return };
    // No series for whatever words it may say.
    let slots = Family::<Labels, Gauge>::default();
    for state in STATES {
        let of = report.slots.iter().filter(|row| row.state == state);
        let labels = vec![("state", state.to_owned())];
        slots.get_or_create(&labels).set(of.count() as i64);
    }
    all.register("slots", "Places for runners, by what they do", slots);
    let verdicts = [Verdict::Success, Verdict::Failure, Verdict::Unknown].map(|verdict| {
        let verdict = verdict.to_string();
        let n = report.jobs.get(&verdict).copied().unwrap_or(0);
        (verdict, n)
    });
    counters(
        all,
        "runner_jobs",
        "Jobs of runners that ended, by verdict",
        ("verdict", &[]),
        &verdicts.into(),
    );
    for (name, help, of) in [
        (
            "runner_jobs_assigned",
            "Jobs that a pool has, those that run among them",
            (|pool| pool.assigned) as fn(&PoolReport) -> usize,
        ),
        ("runner_jobs_running", "Jobs of a pool that run", |pool| {
            pool.running
        }),
        (
            "runners_idle",
            "Runners of a pool that wait for a job",
            |pool| pool.idle,
        ),
        (
            "runners_wanted",
            "Runners that a pool should have",
            |pool| pool.wanted,
        ),
    ] {
        let family = Family::<Labels, Gauge>::default();
        for (pool, report) in &report.pools {
            let labels = vec![("pool", pool.clone())];
            family.get_or_create(&labels).set(of(report) as i64);
        }
        all.register(name, help, family);
    }
    all.register_with_unit(
        "runner_job_wait",
        "How long jobs waited for a runner to begin, from their being assigned to their pool",
        Unit::Seconds,
        report.waits.clone(),
    );
    counter(
        all,
        "github_faults",
        "Requests that GitHub did not answer, or refused",
        None,
        report.github_faults,
    );
}

/// A histogram that the supervisor has counted.
impl EncodeMetric for Waits {
    fn encode(&self, mut encoder: MetricEncoder) -> std::fmt::Result {
        let bounds = WAITS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(self.counts).collect();
        let count = self.counts.iter().sum();
        encoder.encode_histogram::<NoLabelSet>(self.sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn gauge(all: &mut Registry, name: &str, help: &str, unit: Option<Unit>, value: f64) {
    let gauge = Gauge::<f64, AtomicU64>::default();
    gauge.set(value);
    match unit {
        Some(unit) => all.register_with_unit(name, help, unit, gauge),
        None => all.register(name, help, gauge),
    }
}

fn counter(all: &mut Registry, name: &str, help: &str, unit: Option<Unit>, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    match unit {
        Some(unit) => all.register_with_unit(name, help, unit, counter),
        None => all.register(name, help, counter),
    }
}

/// A counter for each value of a label. Those that are `known` are given from the start on, so that a
/// first one is a change.
fn counters(
    all: &mut Registry,
    name: &str,
    help: &str,
    (label, known): (&'static str, &[&str]),
    counts: &BTreeMap<String, u64>,
) {
    let family = Family::<Labels, Counter>::default();
    for value in known {
        drop(family.get_or_create(&vec![(label, (*value).to_owned())]));
    }
    for (value, count) in counts {
        let labels = vec![(label, value.clone())];
        family.get_or_create(&labels).inc_by(*count);
    }
    all.register(name, help, family);
}
