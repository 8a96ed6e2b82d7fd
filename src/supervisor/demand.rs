// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many jobs of a scale set there are to have runners for, by what its messages tell. Decided without I/O and
//! without a clock.
//!
//! Statistics can be late or stuck, both ways: 0 beside a job that was just assigned (actions-runner-controller, issues
//! 3204 and 3420), or too high for ever (4397). So the events of jobs are counted, too, and the higher number is believed:
//! a runner too many is idle, and one too few is a job that waits. What is believed and not there is found out by runners,
//! which get a job within seconds where there is one. One that waited for ten minutes while jobs were said to wait may hang
//! itself (actions/runner, issue 4076), and is replaced; where the next one waits as long, there are no such jobs, until there is news.

use std::collections::BTreeMap;

/// Seconds that a runner is connected, and a job said to wait for one, before one of them is doubted.
const IN_VAIN: u64 = 600;

/// Seconds after which what was found to be wrong is believed again, once: GitHub may have been away.
const AGAIN: u64 = 3600;

/// Seconds for which GitHub has a job wait for a runner; after that it fails.
const LONGEST_WAIT: u64 = 86_400;

/// What is known of a scale set's jobs.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    /// Assigned jobs by the last statistics, those that run among them.
    counted: usize,
    /// Jobs that were assigned and have not begun, by their ids, and since when.
    waiting: BTreeMap<String, u64>,
    /// How many were last taken to wait.
    believed: usize,
    /// When that last was news, seconds since 1970.
    news: u64,
    /// When the runners that waited in vain were given up.
    doubted: Option<u64>,
    /// When those after them had waited in vain, too.
    refuted: Option<u64>,
}

impl Demand {
    /// Statistics say that so many jobs are assigned, those that run among them.
    pub fn counted(&mut self, jobs: u32) {
        self.counted = usize::try_from(jobs).unwrap_or(usize::MAX);
    }

    /// A job was assigned. It may have been before, and cancelled since.
    pub fn assigned(&mut self, job: &str, now: u64) {
        self.waiting
            .retain(|_, since| now < since.saturating_add(LONGEST_WAIT));
        self.waiting.insert(job.to_owned(), now);
        self.is_news(now);
    }

    /// A runner has a job. When that had been assigned, if it is known.
    pub fn began(&mut self, job: &str, now: u64) -> Option<u64> {
        self.is_news(now);
        self.waiting.remove(job)
    }

    /// A job has ended, or was cancelled before any runner had it.
    pub fn ended(&mut self, job: &str) {
        self.waiting.remove(job);
    }

    /// How many jobs are assigned and have not begun, where `running` have: as GitHub says it.
    #[must_use]
    pub fn waiting(&self, running: usize) -> usize {
        self.counted.saturating_sub(running).max(self.waiting.len())
    }

    /// How many of those that wait there are to have runners for, where `running` jobs have one. `idle`: since when each
    /// runner that is connected has had none.
    pub fn open(&mut self, running: usize, idle: impl Iterator<Item = u64>, now: u64) -> usize {
        let waiting = self.waiting(running);
        if waiting > self.believed || self.refuted.is_some_and(|at| now >= at + AGAIN) {
            self.is_news(now);
        }
        self.believed = waiting;
        let doubted = self.doubted.unwrap_or(0);
        let (news, mut idle) = (self.news.max(doubted), idle);
        let in_vain = |since: u64| since >= doubted && now >= since.max(news) + IN_VAIN;
        if waiting > 0 && self.refuted.is_none() && idle.any(in_vain) {
            match self.doubted {
                None => self.doubted = Some(now),
                Some(_) => self.refuted = Some(now),
            }
        }
        if self.refuted.is_some() { 0 } else { waiting }
    }

    /// Whether a runner that has been connected since then, and had no job, is to be replaced.
    #[must_use]
    pub fn doubts(&self, since: u64) -> bool {
        self.doubted.is_some_and(|at| at >= since + IN_VAIN)
    }

    fn is_news(&mut self, now: u64) {
        (self.news, self.doubted, self.refuted) = (now, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    fn none() -> std::iter::Empty<u64> {
        std::iter::empty()
    }

    #[test]
    fn the_higher_number_is_believed() {
        let mut demand = Demand::default();
        assert_eq!(demand.open(0, none(), NOW), 0);
        // Statistics that are late.
        demand.assigned("a", NOW);
        demand.counted(0);
        assert_eq!(demand.open(0, none(), NOW), 1);
        // One runs that nobody counts, and one waits.
        assert_eq!(demand.began("a", NOW + 7), Some(NOW));
        demand.assigned("b", NOW);
        assert_eq!(demand.open(1, none(), NOW), 1);
        // Jobs of another life of ours have had their events.
        demand.counted(5);
        assert_eq!(demand.open(1, none(), NOW), 4);
        assert_eq!(demand.waiting(1), 4);
        demand.counted(0);
        demand.ended("b");
        assert_eq!(demand.open(1, none(), NOW), 0);
        assert_eq!(demand.open(0, none(), NOW), 0);
    }

    #[test]
    fn assigned_and_cancelled_three_times() {
        let mut demand = Demand::default();
        for _ in 0..3 {
            demand.assigned("a", NOW);
            assert_eq!(demand.open(0, none(), NOW), 1);
            demand.ended("a");
            assert_eq!(demand.open(0, none(), NOW), 0);
        }
        // The same again, as a message that was not acknowledged comes again.
        demand.assigned("a", NOW);
        demand.assigned("a", NOW);
        assert_eq!(demand.open(0, none(), NOW), 1);
        assert_eq!(demand.began("a", NOW + 1), Some(NOW));
        assert_eq!(demand.began("a", NOW + 1), None);
    }

    #[test]
    fn what_is_too_high_holds_runners_for_a_while() {
        let mut demand = Demand::default();
        demand.counted(3);
        let idle = |since: u64| [since; 3].into_iter();
        let mut jobs = |idle_since: u64, now: u64| {
            let jobs = demand.open(0, idle(idle_since), now);
            (jobs, demand.doubts(idle_since))
        };
        assert_eq!(jobs(NOW, NOW), (3, false));
        assert_eq!(jobs(NOW + 5, NOW + IN_VAIN + 4), (3, false));
        // The runners may hang: others are to be had.
        let doubted = NOW + IN_VAIN + 5;
        assert_eq!(jobs(NOW + 5, doubted), (3, true));
        assert_eq!(jobs(NOW + 5, doubted + IN_VAIN), (3, true));
        let fresh = doubted + 20;
        assert_eq!(jobs(fresh, fresh + IN_VAIN - 1), (3, false));
        let refuted = fresh + IN_VAIN;
        assert_eq!(jobs(fresh, refuted), (0, false));
        assert_eq!(jobs(fresh, refuted + AGAIN - 1), (0, false));
        assert_eq!(jobs(refuted + AGAIN, refuted + AGAIN), (3, false));
    }

    #[test]
    fn news_is_believed() {
        let refuted = || {
            let mut demand = Demand::default();
            demand.counted(2);
            let mut now = NOW;
            for _ in 0..2 {
                demand.open(0, [now].into_iter(), now);
                now += IN_VAIN;
                demand.open(0, [now - IN_VAIN].into_iter(), now);
            }
            assert_eq!(demand.open(0, none(), now), 0);
            (demand, now)
        };
        let (mut demand, now) = refuted();
        demand.assigned("a", now);
        assert_eq!(demand.open(0, none(), now), 2);
        let (mut demand, now) = refuted();
        demand.counted(3);
        assert_eq!(demand.open(0, none(), now), 3);
        // One that begins shows that there are some.
        let (mut demand, now) = refuted();
        demand.began("b", now);
        assert_eq!(demand.open(1, none(), now), 1);
        // Fewer are none.
        let (mut demand, now) = refuted();
        demand.counted(1);
        assert_eq!(demand.open(0, none(), now), 0);
    }

    #[test]
    fn while_all_are_busy_nothing_is_doubted() {
        let mut demand = Demand::default();
        demand.counted(9);
        for later in 0..100 {
            assert_eq!(demand.open(4, none(), NOW + later * IN_VAIN), 5);
        }
    }
}
