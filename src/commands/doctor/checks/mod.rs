// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The judgements: each a function of what was found, and of nothing else. Their files are named for what they
//! look at; here are their list and their words.

mod containers;
mod host;
mod mounts;
mod services;
mod store;
#[cfg(test)]
mod tests;

use super::facts::{Config, Facts};
use super::{Finding, State};
use crate::config::Settings;

/// What a bare judgement is before it bears its check's name.
type Judged = (State, String, Option<String>);

/// A check's name, and what judges.
type Check = (&'static str, fn(&Facts) -> Vec<Judged>);

const CHECKS: [Check; 21] = [
    ("configuration", host::configuration),
    ("permissions", host::permissions),
    ("tools", host::tools),
    ("kernel", host::kernel),
    ("store", store::store),
    ("pool", store::pool),
    ("ceph", store::ceph),
    ("leftovers", store::leftovers),
    ("units", services::units),
    ("socket", services::socket),
    ("daemon", services::daemon),
    ("namespace", mounts::namespace),
    ("propagation", mounts::propagation),
    ("selinux", mounts::selinux),
    ("podman", containers::podman),
    ("hooks", containers::hooks),
    ("local-volumes", containers::local_volumes),
    ("docker", containers::docker),
    ("verdicts", containers::verdicts),
    ("supervisor", services::supervisor),
    ("clock", host::clock),
];

/// All findings, in the order of the checks.
pub fn all(facts: &Facts) -> Vec<Finding> {
    let judge = |(check, judge): &Check| {
        let finding = |(state, finding, fix)| Finding {
            check,
            state,
            finding,
            fix,
        };
        judge(facts).into_iter().map(finding).collect::<Vec<_>>()
    };
    CHECKS.iter().flat_map(judge).collect()
}

fn ok(finding: impl Into<String>) -> Judged {
    (State::Ok, finding.into(), None)
}

fn skipped(why: impl Into<String>) -> Judged {
    (State::Skipped, why.into(), None)
}

fn note(finding: impl Into<String>, fix: impl Into<String>) -> Judged {
    (State::Note, finding.into(), Some(fix.into()))
}

fn wrong(finding: impl Into<String>, fix: impl Into<String>) -> Judged {
    (State::Wrong, finding.into(), Some(fix.into()))
}

/// What was found to be wrong or worth a note; where that is nothing, that all is well.
fn or_ok(found: Vec<Judged>, well: impl Into<String>) -> Vec<Judged> {
    if found.is_empty() {
        vec![ok(well)]
    } else {
        found
    }
}

fn settings(facts: &Facts) -> Option<&Settings> {
    match &facts.config {
        Config::Read(settings) => Some(settings),
        Config::Missing | Config::Bad(_) => None,
    }
}

fn unconfigured() -> Vec<Judged> {
    vec![skipped("there is no configuration")]
}
