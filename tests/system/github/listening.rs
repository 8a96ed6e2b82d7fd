// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor as a program, as far as it listens to a scale set: no answer of GitHub's stops it. There is no Podman: no
//! runner is started.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::fake::{Fake, FaultKind, MAIN, REPOSITORY, Stage, TOKEN};
use crate::harness::{Test, Tier, test};
use crate::support::PROGRAM;
use crate::support::command::outcome_of;

pub fn tests() -> Vec<Test> {
    let rows: [(&str, fn()); 7] = [
        ("odd_events", odd_events),
        ("sessions_that_end", sessions_that_end),
        ("a_session_of_the_dead", session_of_the_dead),
        ("many_events", many_events),
        ("few_requests_left", few_requests_left),
        ("refused_acknowledgements", refused_acknowledgements),
        ("why_no_job_comes", why_no_job_comes),
    ];
    let row = |(name, body): (&str, fn())| test(Tier::Host, format!("github::{name}"), body);
    rows.into_iter().map(row).collect()
}

/// Longer than anything here takes, and far shorter than GitHub holds a session.
const PATIENCE: Duration = Duration::from_secs(60);

/// A supervisor with one scale set. Killed when dropped; its log is shown where the test failed.
pub struct Listening {
    pub fake: Fake,
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Listening {
    pub fn new() -> Self {
        let mut listening = Self::idle();
        listening.start(&[]);
        listening.until("it listens", |fake| {
            let state = fake.state();
            state.sets.values().any(|set| set.session().is_some())
        });
        listening
    }

    /// That is not started yet.
    pub fn idle() -> Self {
        let fake = Fake::start();
        let url = format!("url = '{0}/{REPOSITORY}'\napi-url = '{0}'\n", fake.url);
        Self::at(fake, &url)
    }

    /// At GitHub's address as the configuration says it.
    pub fn at(fake: Fake, url: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "reflink.dir = {0:?}\nsocket = '{1}/plugin.sock'\n[supervise]\npodman-socket = '{1}/podman.sock'\n\
             control-socket = '{1}/runners.sock'\n[[supervise.pool]]\nname = 'linux'\n{url}token = {2:?}\n\
             scale-set = {{ name = 'linux', max = 50 }}\ncontainer.image = 'i'\n",
            dir.path(),
            dir.path().display(),
            fake.file("token"),
        );
        fs::write(dir.path().join("config.toml"), text).unwrap();
        Self {
            fake,
            dir,
            child: None,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn start(&mut self, environment: &[(&str, &str)]) {
        let mut options = fs::OpenOptions::new();
        let log = options.create(true).append(true).open(self.file("log"));
        let mut command = Command::new(PROGRAM);
        command.arg("--config").arg(self.file("config.toml"));
        command.args(["supervise", "--log-level", "debug"]);
        command.envs(environment.iter().copied());
        command.stdout(Stdio::null()).stderr(log.unwrap());
        self.child = Some(command.spawn().unwrap());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    #[track_caller]
    pub fn until(&self, what: &str, so: impl Fn(&Fake) -> bool) {
        let since = Instant::now();
        while !so(&self.fake) {
            assert!(since.elapsed() < PATIENCE, "it never came to that: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until its log has a text.
    #[track_caller]
    pub fn until_log(&self, text: &str) {
        self.until(text, |_| self.log().contains(text));
    }

    /// Waits until all that was told is acknowledged.
    #[track_caller]
    fn drained(&self, what: &str) {
        self.until(what, |fake| fake.state().only_set().left() == 0);
    }

    /// Whether it goes on: a job is assigned, and that is acknowledged.
    #[track_caller]
    fn goes_on(&self, what: &str) {
        let job = self.fake.queue(&MAIN, "true");
        self.until(&format!("a job is assigned {what}"), |fake| {
            let state = fake.state();
            state.jobs[&job].stage == Stage::Assigned
        });
        self.drained(&format!("that is acknowledged {what}"));
    }

    fn session(&self) -> String {
        let mut state = self.fake.state();
        state.only_set().session().unwrap_or_default().to_owned()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
        if std::thread::panicking() {
            println!("--- the supervisor's log:\n{}", self.log());
        }
        let log = self.log();
        for secret in self
            .fake
            .state()
            .secrets
            .iter()
            .map(String::as_str)
            .chain([TOKEN])
        {
            assert!(!log.contains(secret), "the log has a secret: {secret}");
        }
    }
}

/// How many of the log's warnings have a text.
fn warnings(log: &str, text: &str) -> usize {
    let lines = log.lines();
    lines
        .filter(|line| line.contains(" WARN ") && line.contains(text))
        .count()
}

fn odd_events() {
    let listening = Listening::new();
    listening.goes_on("at first");
    for _ in 0..3 {
        for event in [
            json!({"messageType": "JobSomethingNew", "runnerRequestId": 7}),
            json!({"runnerRequestId": 7}),
            json!({"messageType": null}),
            json!({"messageType": "JobStarted", "runnerName": ["a", "list"], "workflowRunId": 5}),
            json!({"messageType": "JobCompleted", "runnerRequestId": "a text"}),
            Value::Null,
            json!("a text"),
            json!([]),
            // These are right.
            json!({"messageType": "JobCompleted", "runnerName": null, "result": null}),
            json!({"messageType": "JobAssigned"}),
        ] {
            listening.fake.event(event);
        }
        listening.drained("odd events are done with");
    }
    for (kind, body) in [
        ("SomethingNew", "[]"),
        ("RunnerScaleSetJobMessages", ""),
        ("RunnerScaleSetJobMessages", "null"),
        ("RunnerScaleSetJobMessages", "{}"),
        ("RunnerScaleSetJobMessages", "[{"),
    ] {
        listening.fake.message(kind, body);
        listening.drained(kind);
    }
    listening.goes_on("after all that");
    let log = listening.log();
    for (said, times) in [
        ("JobSomethingNew", 1),
        ("JobStarted", 1),
        ("JobCompleted", 1),
        ("\"SomethingNew\"", 1),
    ] {
        assert_eq!(warnings(&log, said), times, "{said}: {log}");
    }
}

/// It is said once in each hour.
fn few_requests_left() {
    let listening = Listening::new();
    for (left, times) in [(600, 0), (499, 1), (10, 1)] {
        listening.fake.state().remaining = left;
        let before = listening.session();
        let since = Instant::now();
        // A new token of the service is bought then.
        listening.fake.forget_sessions();
        listening.until("another session", |fake| {
            let now = listening.session();
            !now.is_empty() && now != before && fake.count("/registration-token", since) > 0
        });
        let log = listening.log();
        assert_eq!(warnings(&log, "few requests"), times, "{left}: {log}");
    }
}

/// An event may be one of fifty; what is more comes with the next message.
fn many_events() {
    let listening = Listening::new();
    {
        let mut state = listening.fake.state();
        for n in 0..120 {
            let name = format!("r-{n}");
            let event =
                json!({"messageType": "JobCompleted", "runnerName": name, "result": "succeeded"});
            state.only_set().event(event);
        }
    }
    let since = Instant::now();
    listening.drained("120 events");
    listening.goes_on("after that");
    // What was told and not acknowledged is told to a new session.
    let acknowledged = listening.fake.count("/queue/", since);
    assert!(acknowledged < 20, "{acknowledged} requests");
}

fn sessions_that_end() {
    let listening = Listening::new();
    let status = |status, message| FaultKind::Status(status, Vec::new(), message);
    let expire = |fake: &Fake| fake.expire_sessions();
    let lose = |fake: &Fake| fake.forget_sessions();
    let refuse = |code: u16| move |fake: &Fake| fake.inject("/queue/", status(code, "no"), 1);
    let fail = |fake: &Fake| fake.inject("/queue/", status(500, "no"), 3);
    // Its token has ended, and is not renewed.
    let stale = |fake: &Fake| {
        fake.inject("/queue/", status(401, "no"), 1);
        fake.inject("/sessions/", status(404, "no"), 1);
    };
    type Way<'a> = (&'a str, &'a dyn Fn(&Fake));
    let ways: [Way; 9] = [
        ("it has expired", &expire),
        ("it is lost", &lose),
        ("400", &refuse(400)),
        ("403", &refuse(403)),
        ("404", &refuse(404)),
        ("409", &refuse(409)),
        ("410", &refuse(410)),
        ("it fails again and again", &fail),
        ("its token is not renewed", &stale),
    ];
    for (what, way) in ways {
        let before = listening.session();
        way(&listening.fake);
        listening.until(&format!("a new session: {what}"), |_| {
            let now = listening.session();
            !now.is_empty() && now != before
        });
        listening.goes_on(what);
        assert_eq!(listening.fake.state().faults_left(), 0, "{what}");
    }
    // These are over by themselves, and the session stays; too much is not too bad.
    let wait = vec![("retry-after", "1".to_owned())];
    for (what, fault, times) in [
        ("once", status(500, "no"), 2),
        ("too many", FaultKind::Status(429, wait, "slow down"), 4),
        ("nothing", FaultKind::Empty, 5),
        ("a token that has ended", status(401, "no"), 1),
    ] {
        let before = listening.session();
        listening.fake.inject("/queue/", fault, times);
        listening.until(what, |fake| fake.state().faults_left() == 0);
        listening.goes_on(what);
        assert_eq!(listening.session(), before, "{what}");
    }
}

/// GitHub holds the session of one that was killed for minutes, against its own successor too.
fn session_of_the_dead() {
    let mut listening = Listening::new();
    for _ in 0..2 {
        let dead = listening.session();
        // One that is killed before it has the answer keeps nothing.
        listening.until("its id is kept", |_| {
            let kept = fs::read_to_string(listening.file("runners.sessions/linux"));
            kept.is_ok_and(|kept| kept.contains(&dead))
        });
        listening.kill();
        // Told, and acknowledged by nobody: it is told again.
        listening.fake.queue(&MAIN, "true");
        listening.start(&[]);
        listening.until("another session", |_| {
            let now = listening.session();
            !now.is_empty() && now != dead
        });
        listening.goes_on("in another life");
    }
    let log = listening.log();
    assert_eq!(warnings(&log, ": 409"), 0, "{log}");
    // One that says nothing that can be read is none.
    listening.kill();
    listening.fake.forget_sessions();
    let kept = listening.file("runners.sessions").join("linux");
    for left in ["", "{", "{\"set\": 1}"] {
        fs::write(&kept, left).unwrap();
        listening.start(&[]);
        listening.until("a session", |_| !listening.session().is_empty());
        listening.kill();
        listening.fake.forget_sessions();
    }
}

/// It is told again to another session only.
fn refused_acknowledgements() {
    let listening = Listening::new();
    listening.goes_on("at first");
    let path = "DELETE /queue/";
    let faults = [400, 404, 500, 503];
    for (n, status) in faults.into_iter().enumerate() {
        let fault = FaultKind::Status(status, Vec::new(), "no");
        listening.fake.inject(path, fault, 1);
        listening.fake.queue(&MAIN, "true");
        let left = |fake: &Fake, left| fake.state().only_set().left() == left;
        listening.until("it is refused", |fake| {
            fake.state().faults_left() == 0 && left(fake, n + 1)
        });
        listening.fake.queue(&MAIN, "true");
        listening.until("what comes then is not", |fake| {
            let state = fake.state();
            let assigned = |job: &super::fake::Job| job.stage == Stage::Assigned;
            state.jobs.values().filter(|job| assigned(job)).count() == 2 * n + 3
        });
        listening.until("only one is left", |fake| left(fake, n + 1));
    }
    // The token has ended: with the next it is acknowledged.
    let fault = FaultKind::Status(401, Vec::new(), "no");
    listening.fake.inject(path, fault, 1);
    listening.fake.event(json!({"messageType": "JobAssigned"}));
    listening.until("it is acknowledged", |fake| {
        fake.state().faults_left() == 0 && fake.state().only_set().left() == faults.len()
    });
    listening.fake.expire_sessions();
    listening.drained("all is told again");
}

/// `runners list` says what keeps a scale set's messages away, for as long as that is so.
fn why_no_job_comes() {
    let listening = Listening::new();
    let problem = || {
        let mut list = Command::new(PROGRAM);
        list.arg("--config").arg(listening.file("config.toml"));
        let listed = outcome_of(list.args(["runners", "list", "--json"])).stdout;
        let rows: Vec<Value> = serde_json::from_str(&listed).unwrap_or_default();
        let first = rows.first().map(|row| row["problem"].to_string());
        first.unwrap_or_default()
    };
    let fault = FaultKind::Status(403, Vec::new(), "blocked by policy");
    listening.fake.inject("/queue/", fault, usize::MAX);
    listening.until("it is shown", |_| problem().contains("blocked by policy"));
    listening.fake.state().faults_end();
    listening.goes_on("when it is over");
    let shown = problem();
    assert!(!shown.contains("blocked by policy"), "{shown}");
}
