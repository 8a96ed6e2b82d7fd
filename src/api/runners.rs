// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the supervisor says of its runners, to `runners` and to the daemon.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The states of a slot.
pub const STATES: [&str; 6] = ["empty", "starting", "idle", "busy", "ending", "paused"];

/// A slot, as `runners list --json` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// The pool's name, `-`, and the slot's number.
    pub slot: String,
    /// One of [`STATES`]; `paused` where it is empty and no job is taken.
    pub state: String,
    /// The runner's name.
    pub runner: String,
    /// Its job: repository and name, where a scale set says it.
    pub job: String,
    /// The page of its job's run, where a scale set says it.
    #[serde(default)]
    pub url: Option<String>,
    /// Seconds in that state.
    pub age: u64,
    /// Caches that were restored, exactly or by a later criterion.
    pub hits: usize,
    /// Caches that it has.
    pub caches: usize,
    /// How its last job ended.
    pub last: Option<String>,
    /// Why it has no runner, or what keeps it from going on.
    #[serde(default)]
    pub problem: Option<String>,
}

/// What the daemon is told for its metrics and its page, with `Friend.Slots`. Numbers are since the
/// supervisor's start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// The slots, without their caches, which the daemon knows.
    pub slots: Vec<Row>,
    /// Jobs that ended, by verdict.
    pub jobs: BTreeMap<String, u64>,
    /// Requests that GitHub did not answer, or refused.
    pub github_faults: u64,
    /// How many jobs and runners each pool has.
    #[serde(default)]
    pub pools: BTreeMap<String, PoolReport>,
    /// Seconds from a job's being assigned to its beginning.
    #[serde(default)]
    pub waits: Waits,
}

/// How many jobs and runners a pool has now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolReport {
    /// Jobs that a scale set has for it, those that run among them; else those that run.
    pub assigned: usize,
    /// Those that run.
    pub running: usize,
    /// Runners that wait for one.
    pub idle: usize,
    /// Runners that there should be.
    pub wanted: usize,
}

/// Upper bounds in seconds of how long jobs waited.
pub const WAITS: [f64; 12] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
];

/// How long jobs waited, counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    /// All together, in seconds.
    pub sum: f64,
    /// How many did, up to each of [`WAITS`] and above the one before it; and longer than all.
    pub counts: [u64; WAITS.len() + 1],
}

impl Waits {
    /// A job waited so many seconds.
    pub fn observe(&mut self, seconds: f64) {
        self.sum += seconds;
        let at = WAITS.iter().position(|bound| seconds <= *bound);
        self.counts[at.unwrap_or(WAITS.len())] += 1;
    }

    /// Adds what another pool counted.
    pub(crate) fn add(&mut self, other: &Self) {
        self.sum += other.sum;
        for (own, other) in self.counts.iter_mut().zip(other.counts) {
            *own += other;
        }
    }
}
