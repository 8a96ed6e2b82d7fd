// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a scale set tells of jobs, in time and late, rightly and wrongly, and a supervisor that dies in between.

use std::fs;
use std::time::Instant;

use serde_json::json;

use super::Body;
use super::supervisor::{JOB, Place, SET, given};
use crate::github::fake::{FORK, FaultKind, MAIN, Stage};
use crate::support::site::Kind;

pub const BODIES: &[Body] = &[
    ("supervised_jobs_wait_for_no_other", slow_job),
    ("supervisor_killed_when_it_was_told", told),
    ("supervised_counts_are_wrong", counts),
    ("supervised_runners_idle_for_long", idle),
];

/// Restores a cache, which a job gets once it is known whose it is, and writes something into it.
const CACHED: &str =
    "cd /run/lvm-cache-friend; bin/lvm-cache-friend restore x --key linux; date +%N >x/n";

/// GitHub, when it is not there.
const AWAY: FaultKind = FaultKind::Status(502, Vec::new(), "<html>");

/// Waits until a job runs and all that was told of it is acknowledged; its runner.
fn acknowledged(place: &mut Place, job: u64) -> String {
    let mut runner = String::new();
    place.until("all is acknowledged", |place| {
        let stage = place.fake.state().jobs[&job].stage.clone();
        if let Stage::Running(name) = stage {
            runner = name;
        }
        !runner.is_empty() && place.fake.unacknowledged() == 0
    });
    runner
}

/// A job of which GitHub does not say whose it is keeps no other from its caches, and the queue is read on.
fn slow_job(kind: Kind) {
    let mut place = Place::new(kind, "token", SET, JOB);
    let begin = Instant::now();
    let slow = place.fake.queue(&MAIN, CACHED);
    let path = format!("/actions/runs/{}", slow * 10).leak();
    place.fake.inject(path, AWAY, 1000);
    place.until("it waits", |place| place.fake.count(path, begin) > 0);
    assert_eq!(place.job(CACHED), "succeeded");
    place.published(1);
    assert_eq!(place.fake.result(slow), None);
    assert_eq!(place.fake.unacknowledged(), 0);
    place.fake.state().faults_end();
    assert_eq!(place.ended(slow), "succeeded");
    place.published(2);
    place.finish();
}

/// What was acknowledged is not told again: wherever it is killed behind that, a job gets its caches, of its own scopes; and one
/// that was refused its scopes is ended.
fn told(kind: Kind) {
    let mut place = Place::new(kind, "token", SET, JOB);
    let mut good = 0;
    for point in lvm_cache_friend::failpoint::SCALE_SET {
        println!("{point}");
        place.supervisor = None;
        place.start(&[("LVM_CACHE_FRIEND_FAILPOINT", point)]);
        let is_behind = !["told.1", "admit.1"].contains(&point);
        if is_behind {
            place.fake.inject("/actions/runs/", AWAY, 1000);
        }
        let job = place.fake.queue(&MAIN, CACHED);
        if is_behind {
            acknowledged(&mut place, job);
            place.fake.state().faults_end();
        }
        place.dies(point);
        place.start(&[]);
        assert_eq!(place.ended(job), "succeeded", "{point}");
        good += 1;
        place.published(good);
    }
    let own = place.fake.scope();
    assert!(
        place
            .entries()
            .iter()
            .all(|row| row["scope"] == own.as_str())
    );

    // Somebody said other scopes before; and it dies when it knows that they are refused, before it has ended the job.
    place.supervisor = None;
    place.start(&[("LVM_CACHE_FRIEND_FAILPOINT", "admit.5")]);
    place.fake.inject("/actions/runs/", AWAY, 1000);
    let job = place
        .fake
        .queue(&FORK, &format!("{CACHED}; exec sleep 3600"));
    let runner = acknowledged(&mut place, job);
    let body = json!({"Name": format!("{runner}-job"), "Opts": {"scope": "wider"}});
    let plugin = place.host.daemon.as_ref().unwrap().plugin();
    assert_eq!(plugin.call("Friend.Admit", &body).0, 200);
    place.fake.state().faults_end();
    place.dies("admit.5");
    assert!(
        place
            .fake
            .state()
            .runners
            .values()
            .any(|r| r.name == runner)
    );
    place.start(&[]);
    place.until("it is ended", |place| place.fake.result(job).is_some());
    assert_ne!(place.fake.result(job), Some("succeeded"));
    place.until("its slot is free", |place| {
        place
            .rows()
            .iter()
            .all(|row| row["runner"] != runner.as_str())
    });
    assert_eq!(place.entries().len(), good);
    let left = "/run/lvm-cache-friend/runners.jobs";
    place.until("nothing is written down any more", |_| {
        fs::read_dir(left).unwrap().count() == 0
    });
    place.finish();
}

/// Statistics that are late or stuck, jobs that are cancelled before they begin, and the end of one that goes on.
fn counts(kind: Kind) {
    let mut place = Place::new(kind, "token", SET, JOB);
    // A job was assigned, and none is counted.
    place.fake.state().counted = Some(0);
    let server = place.fake.url.clone();
    let job = place.fake.queue(
        &MAIN,
        &format!("{CACHED}; until [ -e /opt/runner/_work/go ]; do sleep 0.2; done; exit 1"),
    );
    place.until("it runs", |place| {
        let url = format!("{server}/octo/project/actions/runs/{}", job * 10);
        place
            .rows()
            .iter()
            .any(|row| row["state"] == "busy" && row["url"] == url.as_str())
    });
    let shown = place.host.site.done(&["runners", "list"]);
    assert!(
        shown.contains(&format!("/octo/project/actions/runs/{}\n", job * 10)),
        "{shown}"
    );
    assert!(shown.contains(": no job waits for it\n"), "{shown}");
    place.until("the metrics have it", |_| {
        given("runner_jobs_running{pool=\"linux\"}") == Some(1.0)
            && given("runners_wanted{pool=\"linux\"}") == Some(1.0)
            && given("runner_job_wait_seconds_count") == Some(1.0)
    });
    // It is said to have succeeded, and goes on; and fails then.
    place.fake.tell_end(job, "succeeded");
    place.until("a report is ignored", |place| {
        place
            .supervisor()
            .log()
            .contains("still runs it: report ignored")
    });
    let rows = place.rows();
    let busy = rows.iter().find(|row| row["state"] == "busy");
    let runner = busy.unwrap()["runner"].as_str().unwrap().to_owned();
    place
        .host
        .podman
        .done(&["exec", &runner, "touch", "/opt/runner/_work/go"]);
    assert_eq!(place.ended(job), "failed");
    place.until("no runner is left", |place| {
        place.rows().iter().all(|row| row["state"] == "empty")
    });
    assert_eq!(place.entries().len(), 0);
    assert!(place.rows().iter().any(|row| row["last"] == "failure"));

    // Assigned and cancelled, three times; at last there is none, and the runner that it was to have goes.
    place.fake.state().counted = None;
    let job = place.fake.queue_for_nobody(&MAIN);
    for again in [true, true, false] {
        place.until("it is assigned", |place| {
            place.fake.unacknowledged() == 0
                && place.fake.state().jobs[&job].stage == Stage::Assigned
        });
        place.until("a runner waits", |place| {
            place.rows().iter().any(|row| row["state"] == "idle")
        });
        place.fake.cancel(job, again);
    }
    place.until("it goes", |place| {
        place.fake.state().runners.is_empty()
            && place.rows().iter().all(|row| row["state"] == "empty")
    });
    assert_eq!(place.job(CACHED), "succeeded");
    place.published(1);
    place.finish();
}

/// A runner that waits for long is replaced, and a job is not disturbed by that.
fn idle(kind: Kind) {
    let set = format!("{}max-idle = '15s'\n", SET.replace("max", "min = 1, max"));
    let mut place = Place::new(kind, "token", &set, JOB);
    let waits = |place: &Place| -> Option<String> {
        let rows = place.rows();
        let row = rows.iter().find(|row| row["state"] == "idle")?;
        Some(row["runner"].as_str().unwrap().to_owned())
    };
    let mut first = None;
    place.until("one waits", |place| {
        first = waits(place);
        first.is_some()
    });
    place.until("another one waits", |place| {
        let now = waits(place);
        now.is_some() && now != first
    });
    assert!(
        !place
            .fake
            .state()
            .runners
            .values()
            .any(|r| Some(&r.name) == first.as_ref())
    );
    assert_eq!(place.job(&format!("{CACHED}; sleep 20")), "succeeded");
    place.published(1);
    place.finish();
}
