// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The whole story: six jobs of GitHub's, each a `podman build` in a runner's container, on two slots.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::docs::block;
use crate::github::fake::{FORK, Fake, MAIN, Origin, REPOSITORY, Stage, id_of};
use crate::support::wait_until;

/// What the jobs run: the demo's.
const JOB: &str = include_str!("../../../demo/project/ci-job");

/// The pool in the supervisor's quick start (docs/supervisor.md).
pub fn pool() -> String {
    let commands = block("runners");
    let text = commands.split_once("<<'EOF'\n").unwrap().1;
    text.split_once("EOF\n").unwrap().0.to_owned()
}

/// With runners of this image, at the stand-in for GitHub.
pub fn at(fake: &Fake, image: &str, text: &str) -> String {
    let url = format!("url = '{0}/{REPOSITORY}'\napi-url = '{0}'\n", fake.url);
    // The stand-in listens on the host's own loopback device.
    let image = format!("image = '{image}'\nnetwork = 'host'\n");
    replaced(
        text,
        &[
            ("url = \"https://github.com/OWNER/NAME\"\n", &url),
            ("image = \"localhost/runner\"\n", &image),
        ],
    )
}

/// A text with others in place of what must be in it.
#[track_caller]
pub fn replaced(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "there is no {old}");
        text.replace(old, new)
    })
}

struct Told {
    version: &'static str,
    log: String,
    restored: Value,
}

impl Told {
    /// The number of the job whose cache it got.
    fn from(&self) -> Option<u64> {
        let mut tags = self.restored["tags"].as_array()?.iter();
        tags.find_map(|tag| tag.as_str()?.strip_prefix("job-")?.parse().ok())
    }

    fn has(&self, version: &str) -> bool {
        self.log.contains(&format!("image localhost/app:{version}"))
    }

    fn cached(&self) -> usize {
        self.log.matches("Using cache").count()
    }
}

/// Has the jobs run and looks at what they did; `entries` is what `list` has.
pub fn tell(fake: &Fake, entries: &dyn Fn() -> Vec<Value>) {
    // Builds on an emulated processor leave a runner that little of it.
    fake.state().silent = Duration::from_secs(60);
    // The demo's first build takes its time, to show how much is saved. Here it would only be lost.
    let script = replaced(JOB, &[("seq 500000", "seq 50")]);
    let queue = |origin: &Origin, version: &str| {
        fake.queue_with(origin, |job| {
            format!("job={job} version={version}\n{script}")
        })
    };
    let published = |job: u64| {
        let tag = format!("friend:cache:job-{job}");
        let mut entries = entries();
        entries.retain(|row| {
            row["tags"]
                .as_array()
                .unwrap()
                .contains(&tag.as_str().into())
        });
        assert!(entries.len() <= 1, "{entries:?}");
        entries.pop()
    };
    let begin = Instant::now();
    let done = |job: u64| {
        wait_until(|| fake.result(job).is_some());
        let result = fake.result(job).unwrap();
        println!("after {:?} job {job} {result}", begin.elapsed());
    };

    let first = queue(&MAIN, "one");
    done(first);
    let log = fake.state().jobs[&first].log.clone();
    assert_eq!(fake.result(first), Some("succeeded"), "{log}");
    wait_until(|| published(first).is_some());
    let rest = [
        (&FORK, "evil"),
        (&MAIN, "two"),
        (&MAIN, "broken"),
        (&MAIN, "one"),
        (&MAIN, "three"),
    ];
    let rest = rest.map(|(origin, version)| (queue(origin, version), version));
    for (job, _) in rest {
        done(job);
    }

    let mut told = BTreeMap::new();
    for (job, version) in [(first, "one")].into_iter().chain(rest) {
        let log = fake.state().jobs[&job].log.clone();
        let line = log.lines().find(|line| line.starts_with('{'));
        let restored = serde_json::from_str(line.unwrap_or_else(|| panic!("{log}"))).unwrap();
        told.insert(
            job,
            Told {
                version,
                log,
                restored,
            },
        );
    }
    let mut runners = Vec::new();
    println!("job  source  restored  from  ms  cached steps");
    for (number, job) in &told {
        let result = if job.version == "broken" {
            "failed"
        } else {
            "succeeded"
        };
        let state = fake.state().jobs[number].clone();
        let Stage::Done(runner, ended) = state.stage else {
            unreachable!("it is done")
        };
        assert_eq!((ended, state.runs), (result, 1), "{}", job.log);
        runners.push(runner);
        let restored = &job.restored;
        println!(
            "{number} {} {} {:?} {} {}",
            job.version,
            restored["restored"],
            job.from(),
            restored["ms"],
            job.cached()
        );

        let (expected, cached) = match (*number == first, job.version) {
            (true, _) => ("base", 0),
            // The same source as the first: nothing is done again.
            (false, "one") => ("exact", 3),
            _ => ("fallback", 2),
        };
        assert_eq!(job.restored["restored"], expected, "{}", job.log);
        assert_eq!(job.cached(), cached, "{}", job.log);
        let mut scope = fake.scope();
        if job.version == "evil" {
            scope += &format!(":pull_request:fork/{}/main", id_of(FORK.head_repository));
        }
        if job.version == "broken" {
            continue;
        }
        wait_until(|| published(*number).is_some());
        assert_eq!(published(*number).unwrap()["scope"], scope);
    }
    // A runner for each, and no runner for two.
    runners.sort();
    runners.dedup();
    assert_eq!(runners.len(), told.len());

    for job in told.values() {
        // What was restored is what was published, of this repository, and by jobs that did not fail.
        if job.restored["restored"] != "base" {
            let from = job.from().unwrap_or_else(|| panic!("{}", job.restored));
            assert!(
                !["evil", "broken"].contains(&told[&from].version),
                "{}",
                job.log
            );
            assert!(job.has(told[&from].version), "{}", job.log);
        }
        for bad in ["evil", "broken"] {
            assert_eq!(job.has(bad), job.version == bad, "{}", job.log);
        }
    }
    let (broken, _) = rest[2];
    assert_eq!(published(broken), None);
}
