//! The supervisor with real Podman, a stand-in for GitHub (`crate::github::fake`), and one for its
//! runner (`tests/vm/runner-image`).

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::hooks::Hooks;
use super::{Body, Host, story};
use crate::github::fake::{APP, FORK, Fake, FaultKind, MAIN, REPOSITORY, Stage, TOKEN};
use crate::support::command::run;
use crate::support::image;
use crate::support::podman::Service;
use crate::support::site::Kind;

pub const BODIES: &[Body] = &[
    ("supervised_jobs", jobs),
    ("supervised_scale_set", scale_set),
    ("supervisor_over_kills", kills),
    ("supervisor_killed_at_each_step", each_step),
    ("hostile_jobs", hostile),
    ("many_supervised_jobs", many),
    ("supervisor_meets_faults", faults),
    ("supervisor_drains", drains),
];

/// Longer than anything here takes: a test that waits longer shows the log.
const PATIENCE: Duration = Duration::from_secs(150);

/// A host with a supervisor. Parts are taken down in this order.
struct Place {
    supervisor: Option<Supervisor>,
    service: Option<Service>,
    _hooks: Hooks,
    fake: Fake,
    host: Host,
}

/// A running supervisor; killed when dropped, and its log is shown where the test failed.
struct Supervisor {
    child: Child,
    log: PathBuf,
}

impl Supervisor {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("--- the supervisor's log:\n{}", self.log());
        }
    }
}

const FIXED: &str = "count = 2\n";
const CACHE: &str = "[[supervise.pool.volume]]\nname = 'cache'\ntarget = '/cache'\n\
                     options = { restore = 'layers', save = 'layers {slot}' }\n";
const SET: &str = "scale-set = { name = 'linux', max = 2 }\n";
const JOB: &str = "[[supervise.pool.volume]]\nname = 'job'\ntarget = '/run/lvm-cache-friend'\n\
                   options = { type = 'job', save = 'of={ref}' }\n";

impl Place {
    /// A pool `linux`, which `settings` describes, and its volumes.
    fn new(kind: Kind, auth: &str, settings: &str, volumes: &str) -> Self {
        Self::with(kind, auth, settings, volumes, "")
    }

    /// And containers with further settings.
    fn with(kind: Kind, auth: &str, settings: &str, volumes: &str, container: &str) -> Self {
        Self::configured(kind, |fake| {
            let image = image("runner-image");
            let auth = match auth {
                "app" => format!(
                    "app = {{ id = {}, installation = {}, key = {:?} }}",
                    APP.0,
                    APP.1,
                    fake.file("app.pem")
                ),
                _ => format!("token = {:?}", fake.file("token")),
            };
            format!(
                "[[supervise.pool]]\nname = 'linux'\nurl = '{0}/{REPOSITORY}'\napi-url = '{0}'\n{auth}\n\
                 labels = ['linux']\nregistration-timeout = '40s'\n{settings}\n\
                 container = {{ {container}image = '{image}', network = 'host' }}\n{volumes}",
                fake.url
            )
        })
    }

    /// With these pools.
    fn configured(kind: Kind, pools: impl FnOnce(&Fake) -> String) -> Self {
        let host = Host::new(kind);
        let fake = Fake::start();
        let hooks = Hooks::new(&host);
        let mut text = fs::read_to_string(&host.site.config).unwrap();
        write!(
            text,
            "\n[supervise]\npodman-socket = '/run/podman-service.sock'\ndrain-timeout = '120s'\n{}",
            pools(&fake)
        )
        .unwrap();
        fs::write(&host.site.config, text).unwrap();
        let mut place = Self {
            supervisor: None,
            service: Some(Service::start()),
            _hooks: hooks,
            fake,
            host,
        };
        place.start(&[]);
        place
    }

    fn start(&mut self, environment: &[(&str, &str)]) {
        let log = self.host.site.dir.path().join("supervisor.log");
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        let mut command = self
            .host
            .site
            .command(&["supervise", "--log-level", "debug"]);
        command
            .stdout(Stdio::null())
            .stderr(file)
            .envs(environment.iter().copied());
        let child = command.spawn().unwrap();
        self.supervisor = Some(Supervisor { child, log });
    }

    fn supervisor(&mut self) -> &mut Supervisor {
        self.supervisor.as_mut().unwrap()
    }

    /// Waits until something is so.
    #[track_caller]
    fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
        let since = Instant::now();
        while !so(self) {
            assert!(since.elapsed() < PATIENCE, "it never came to that: {what}");
            let supervisor = self.supervisor();
            if let Some(status) = supervisor.child.try_wait().unwrap() {
                panic!("the supervisor ended ({status}) before: {what}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Queues a job and waits for its result.
    #[track_caller]
    fn job(&mut self, script: &str) -> &'static str {
        let job = self.fake.queue(&MAIN, script);
        self.ended(job)
    }

    #[track_caller]
    fn ended(&mut self, job: u64) -> &'static str {
        let mut result = None;
        self.until("a job ends", |place| {
            result = place.fake.result(job);
            result.is_some()
        });
        let runs = self.fake.state().jobs[&job].runs;
        assert_eq!(runs, 1, "a job runs once");
        result.unwrap()
    }

    /// What `runners list --json` says.
    fn rows(&self) -> Vec<Value> {
        let said = self.host.site.outcome(&["runners", "list", "--json"]);
        serde_json::from_str(&said.stdout).unwrap_or_default()
    }

    /// Ends it as systemd does; all is gone then.
    fn finish(&mut self) {
        self.supervisor().signal(Signal::SIGTERM);
        self.gone();
    }

    fn gone(&mut self) {
        let since = Instant::now();
        let status = loop {
            if let Some(status) = self.supervisor().child.try_wait().unwrap() {
                break status;
            }
            assert!(since.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(100));
        };
        assert!(status.success(), "{status}");
        let podman = &self.host.podman;
        assert_eq!(podman.done(&["ps", "--all", "--quiet"]), "");
        assert_eq!(podman.volumes(), [""; 0]);
        assert_eq!(podman.done(&["secret", "ls", "--quiet"]), "");
        let runners: Vec<_> = self.fake.state().runners.values().cloned().collect();
        assert!(runners.is_empty(), "{runners:?}");
    }

    /// How many entries there are.
    fn entries(&self) -> Vec<Value> {
        let mut rows = self.host.site.list();
        rows.retain(|row| row["kind"] == "entry");
        rows
    }

    /// Waits until so many entries are there.
    #[track_caller]
    fn published(&mut self, count: usize) {
        self.until(&format!("{count} entries"), |place| {
            place.entries().len() == count
        });
    }
}

/// Fails where any secret of GitHub's is in a text, or what is one in base64.
#[track_caller]
fn without_secrets(place: &Place, what: &str, text: &str) {
    let configurations = place.fake.state().configurations.clone();
    without_tokens(place, what, text);
    for secret in configurations {
        assert!(
            !text.contains(&secret),
            "{what} has a runner's configuration"
        );
    }
}

#[track_caller]
fn without_tokens(place: &Place, what: &str, text: &str) {
    let secrets = place.fake.state().secrets.clone();
    let key = fs::read_to_string(place.fake.file("app.pem")).unwrap();
    let line = key.lines().nth(3).unwrap();
    let secrets = secrets.iter().map(String::as_str);
    // A runner has its own credentials, good for its one job: it must.
    let secrets = secrets.filter(|secret| !secret.starts_with("runner_"));
    for secret in secrets.chain([TOKEN, line]) {
        assert!(!text.contains(secret), "{what} has a secret: {secret}");
    }
}

fn jobs(kind: Kind) {
    let mut place = Place::new(kind, "app", FIXED, CACHE);
    // From the second on a job has what the one before it left.
    assert_eq!(
        place.job("[ ! -e /cache/n ]; echo 1 > /cache/n"),
        "succeeded"
    );
    place.published(1);
    place.until("a runner with the new entry", |place| {
        let rows = place.rows();
        rows.iter().filter(|row| row["state"] == "idle").count() == 2
    });
    // One that fails publishes nothing.
    assert_eq!(place.job("echo broken > /cache/n; exit 1"), "failed");
    // What a job can see of its own: all processes' environments and arguments, its files, its mounts.
    let look = "for p in /proc/[0-9]*; do cat $p/environ $p/cmdline 2>/dev/null | tr '\\0' '\\n'; done\n\
                env; cat /proc/self/mountinfo; find / -xdev -type f -size -64k ! -path '/proc/*' ! -path '/run/runner/.c*' ! -path /run/runner/log -exec cat {} + 2>/dev/null || true\n\
                echo seen; until [ -e /run/runner/go ]; do sleep 0.2; done";
    let job = place.fake.queue(&MAIN, look);
    let mut logs = String::new();
    place.until("the job has looked", |place| {
        for row in place.rows() {
            let runner = row["runner"].as_str().unwrap_or_default().to_owned();
            let said = place
                .host
                .site
                .outcome(&["runners", "logs", &runner, "--lines", "100000"]);
            if said.stdout.contains("\nseen\n") {
                logs = said.stdout;
                let inspected = place.host.podman.done(&["inspect", &runner]);
                // With Podman 4.3 it shows the environment that a running container began with, its secrets too.
                without_tokens(place, "podman inspect", &inspected);
                without_secrets(
                    place,
                    "podman secret",
                    &place.host.podman.done(&["secret", "ls", "--quiet"]),
                );
                let processes = run(
                    "sh",
                    [
                        "-c",
                        "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
                    ],
                );
                without_secrets(place, "an argument", &processes);
                place
                    .host
                    .podman
                    .done(&["exec", &runner, "touch", "/run/runner/go"]);
            }
        }
        !logs.is_empty()
    });
    assert!(
        logs.contains("ACTIONS_RUNNER_RETURN_JOB_RESULT_FOR_HOSTED=true"),
        "it saw its environment"
    );
    without_secrets(&place, "what a job sees", &logs);
    assert_eq!(place.ended(job), "succeeded");
    let rows = place.rows();
    assert_eq!(rows.len(), 2, "{rows:?}");
    let log = place.supervisor().log();
    assert!(
        log.contains("ended") && log.contains("verdict=failure"),
        "{log}"
    );
    without_secrets(&place, "the log", &log);
    assert_eq!(place.entries().len(), 1, "{:?}", place.entries());
    place.finish();
}

fn scale_set(kind: Kind) {
    let mut place = Place::new(kind, "token", SET, JOB);
    let ask = "/run/lvm-cache-friend/bin/lvm-cache-friend restore x --key linux; cd /run/lvm-cache-friend/x\n";
    let main = |script: &str| (&MAIN, format!("{ask}{script}"), "octo/project");
    let fork = |script: &str| {
        (
            &FORK,
            format!("{ask}{script}"),
            "octo/project:fork/mallory/project/main",
        )
    };
    // Each sees what the ones before it may have left for it.
    let mut expected = 0;
    for ((origin, script, scope), result) in [
        (main("[ ! -e who ]; echo main > who"), "succeeded"),
        (fork("[ $(cat who) = main ]; echo evil > who"), "succeeded"),
        (
            main("[ $(cat who) = main ]; echo broken > who; exit 1"),
            "failed",
        ),
        (fork("[ $(cat who) = evil ]"), "succeeded"),
        (main("[ $(cat who) = main ]; echo new > who"), "succeeded"),
    ] {
        let job = place.fake.queue(origin, &script);
        assert_eq!(place.ended(job), result, "{script}");
        if result == "succeeded" && script.contains("echo") {
            expected += 1;
            place.published(expected);
            let rows = place.entries();
            assert!(rows.iter().any(|row| row["scope"] == scope), "{rows:?}");
        }
    }
    // None waits where none is wanted.
    place.until("no runner", |place| {
        place.rows().iter().all(|row| row["state"] == "empty")
    });
    place.finish();
}

/// Runners of the image that `runner/Containerfile` makes, configured as README says.
pub fn builds() {
    let mut place = Place::configured(Kind::Reflink, |fake| {
        image("runner-debian");
        let file = format!("{:?}", fake.file("token"));
        let pool = story::at(fake, "localhost/runner", story::pool());
        story::replaced(&pool, &[("\"/etc/lvm-cache-friend/github-token\"", &file)])
    });
    story::tell(&place.fake, &|| place.entries());
    place.finish();
}

/// Whatever is killed, and when: no job is lost, none runs twice, nothing is left.
fn kills(kind: Kind) {
    let mut place = Place::new(kind, "token", FIXED, CACHE);
    let mut jobs = Vec::new();
    for round in 0..24 {
        if round % 2 == 0 {
            jobs.push(place.fake.queue(&MAIN, "sleep 1; date +%N > /cache/n"));
        }
        // Steps take some hundred milliseconds each: rounds end in different ones.
        std::thread::sleep(Duration::from_millis(150 + 170 * (round % 8)));
        match round % 6 {
            3 => place.host.restart(true, |_| {}),
            5 => {
                place.service = None;
                place.service = Some(Service::start());
            }
            _ => {
                place.supervisor = None;
                place.start(&[]);
            }
        }
    }
    for job in jobs {
        assert_eq!(place.ended(job), "succeeded");
    }
    let busy = |place: &mut Place| place.fake.state().runners.values().any(|r| r.job.is_some());
    place.until("no runner is busy", |place| !busy(place));
    place.finish();
}

/// Killed at each step of a slot's life, it goes on in the next life.
fn each_step(kind: Kind) {
    let mut place = Place::new(kind, "token", "count = 1\n", CACHE);
    for point in lvm_cache_friend::failpoint::SUPERVISOR {
        println!("{point}");
        place.supervisor = None;
        place.start(&[("LVM_CACHE_FRIEND_FAILPOINT", point)]);
        let job = place.fake.queue(&MAIN, "date +%N > /cache/n");
        let since = Instant::now();
        while place.supervisor().child.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < PATIENCE, "{point} is not reached");
            std::thread::sleep(Duration::from_millis(50));
        }
        place.start(&[]);
        assert_eq!(place.ended(job), "succeeded", "{point}");
    }
    // No job was lost to those that came after it.
    place.finish();
}

/// Jobs that take what they can get. The slot is another job's soon after, and the slot beside it never notices.
fn hostile(kind: Kind) {
    // What bounds memory and processes is a cgroup, of which the other tier has none.
    let bounds = match kind {
        Kind::Lvm => "memory = '64M', pids = 64, ",
        Kind::Reflink => "",
    };
    let settings = "count = 2\njob-timeout = '20s'\n";
    let cache = CACHE.replace("save = ", "size = '1G', save = ");
    let mut place = Place::with(kind, "token", settings, &cache, bounds);
    let mut attacks = vec![
        ("never ends", "exec sleep 3600"),
        ("kills all that it can", "kill -9 -1; exec sleep 3600"),
        ("kills its runner", "kill -9 $PPID; exec sleep 3600"),
        (
            "fills its disk",
            "dd if=/dev/zero of=/cache/full bs=1M count=2000",
        ),
    ];
    if kind == Kind::Lvm {
        attacks.push((
            "eats memory",
            "exec dd if=/dev/zero of=/dev/null bs=256M count=1",
        ));
        attacks.push(("forks without end", "f() { f | f & }; f; exec sleep 3600"));
    }
    for (attack, script) in attacks {
        println!("{attack}");
        let before = place.entries().len();
        let bad = place.fake.queue(&MAIN, script);
        place.until("it runs", |place| {
            place.fake.state().jobs[&bad].stage != Stage::Queued
        });
        let since = Instant::now();
        for _ in 0..2 {
            assert_eq!(place.job("true"), "succeeded", "{attack}");
        }
        assert_ne!(place.ended(bad), "succeeded", "{attack}");
        // Both slots wait for jobs again.
        place.until("both wait", |place| {
            let rows = place.rows();
            rows.iter().filter(|row| row["state"] == "idle").count() == 2
        });
        println!("{attack}: over after {:?}", since.elapsed());
        assert_eq!(place.entries().len(), before, "{attack}");
    }
    place.finish();
}

/// Many jobs, while one of twenty requests to GitHub meets a fault.
fn many(kind: Kind) {
    let count = match kind {
        Kind::Reflink => 200,
        Kind::Lvm => 20,
    };
    let mut place = Place::new(kind, "app", "count = 4\n", CACHE);
    place.fake.state().fault_every = 20;
    let jobs: Vec<_> = (0..count)
        .map(|_| place.fake.queue(&MAIN, "true"))
        .collect();
    let pid = place.supervisor().child.id();
    let used = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        (
            kib,
            fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        )
    };
    for job in &jobs[..count / 4] {
        place.ended(*job);
    }
    let (memory, descriptors) = used();
    for job in jobs {
        assert_eq!(place.ended(job), "succeeded");
    }
    let (memory_after, descriptors_after) = used();
    println!(
        "{memory} KiB, then {memory_after} KiB; {descriptors} descriptors, then {descriptors_after}"
    );
    assert!(
        memory_after < memory + memory / 5,
        "{memory} KiB, then {memory_after} KiB"
    );
    assert!(
        descriptors_after <= descriptors + 8,
        "{descriptors}, then {descriptors_after}"
    );
    place.fake.state().fault_every = 0;
    place.finish();
}

fn faults(kind: Kind) {
    let mut place = Place::new(kind, "app", FIXED, CACHE);
    let status = |status, headers: &[(&'static str, &str)], message| {
        let headers = headers
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()));
        FaultKind::Status(status, headers.collect(), message)
    };
    let begin = Instant::now();
    for (path, kind, times) in [
        ("generate-jitconfig", status(500, &[], "Server Error"), 2),
        ("generate-jitconfig", status(409, &[], "Already exists"), 1),
        (
            "generate-jitconfig",
            status(422, &[], "Validation Failed"),
            1,
        ),
        ("generate-jitconfig", status(404, &[], "Not Found"), 1),
        ("generate-jitconfig", FaultKind::Dropped, 1),
        ("generate-jitconfig", FaultKind::DroppedAfter, 1),
        (
            "/actions/runners",
            status(429, &[("retry-after", "2")], "slow down"),
            1,
        ),
        (
            "/actions/runners",
            status(403, &[("retry-after", "2")], "secondary rate limit"),
            1,
        ),
        ("access_tokens", status(401, &[], "Bad credentials"), 1),
        (
            "/actions/runners",
            FaultKind::Slow(Duration::from_secs(2)),
            1,
        ),
    ] {
        println!("{path} {kind:?}");
        place.fake.inject(path, kind, times);
        if path == "access_tokens" {
            // The token that it has is taken back.
            place.fake.forget_tokens();
        }
        assert_eq!(place.job("true"), "succeeded");
    }
    let minutes = begin.elapsed().as_secs() / 60 + 1;
    let asked = place.fake.count("", begin) as u64;
    // Of the published limits the narrowest: 80 requests that make something, a minute.
    assert!(
        asked < 80 * minutes,
        "{asked} requests in {minutes} minutes"
    );
    let log = place.supervisor().log();
    for once in ["Server Error", "Already exists", "Validation Failed"] {
        let lines = log
            .lines()
            .filter(|line| line.contains("WARN") && line.contains(once));
        // Each of the two slots may have met it.
        assert!((1..=2).contains(&lines.count()), "{once}: {log}");
    }
    without_secrets(&place, "the log", &log);
    place.finish();
}

fn drains(kind: Kind) {
    let mut place = Place::new(kind, "token", FIXED, CACHE);
    // Paused, it takes no job; resumed, it does.
    place.until("both wait", |place| {
        place
            .rows()
            .iter()
            .filter(|row| row["state"] == "idle")
            .count()
            == 2
    });
    place.host.site.done(&["runners", "pause"]);
    place.until("none waits", |place| {
        place.rows().iter().all(|row| row["state"] == "paused")
    });
    let job = place.fake.queue(&MAIN, "true");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(place.fake.state().jobs[&job].stage, Stage::Queued);
    place.host.site.done(&["runners", "resume", "linux"]);
    assert_eq!(place.ended(job), "succeeded");
    let unknown = place.host.site.outcome(&["runners", "pause", "nowhere"]);
    assert_eq!(unknown.status, 3, "{unknown:?}");
    // Told to end, it lets the job that runs end, and takes no other.
    let job = place.fake.queue(&MAIN, "sleep 4; echo done > /cache/n");
    place.until("it runs", |place| {
        matches!(place.fake.state().jobs[&job].stage, Stage::Running(_))
    });
    let other = place.fake.queue(&MAIN, "true");
    place.until("it is taken", |place| {
        place.fake.state().jobs[&other].stage != Stage::Queued
    });
    place.supervisor().signal(Signal::SIGTERM);
    let last = place.fake.queue(&MAIN, "true");
    place.ended_without(job, "succeeded");
    place.gone();
    // The one that was queued just then may have been taken by a runner that was still there.
    let stage = place.fake.state().jobs[&last].stage.clone();
    assert!(
        matches!(stage, Stage::Queued | Stage::Done(_, "succeeded")),
        "{stage:?}"
    );

    // A second signal ends it at once, and nothing of the job is published.
    place.start(&[]);
    if stage == Stage::Queued {
        place.ended(last);
    }
    let job = place
        .fake
        .queue(&MAIN, "echo killed > /cache/n; sleep 3600");
    place.until("it runs", |place| {
        matches!(place.fake.state().jobs[&job].stage, Stage::Running(_))
    });
    place.supervisor().signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(500));
    place.supervisor().signal(Signal::SIGTERM);
    let since = Instant::now();
    while place.supervisor().child.try_wait().unwrap().is_none() {
        assert!(
            since.elapsed() < Duration::from_secs(70),
            "it does not end at once"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(place.host.podman.done(&["ps", "--all", "--quiet"]), "");
    let plugin = place.host.daemon().plugin();
    plugin.create("probe", &json!({"restore": "layers"}));
    let said = fs::read_to_string(plugin.mount("probe", "test").join("n"));
    assert_eq!(said.unwrap(), "done\n");

    for (text, words) in [
        ("count = 2", "count = 0"),
        ("network = 'host'", "network = 'moon'"),
    ] {
        let config = fs::read_to_string(&place.host.site.config).unwrap();
        let bad = place.host.site.dir.path().join("bad.toml");
        fs::write(&bad, config.replace(text, words)).unwrap();
        let said = crate::support::daemon::friend_outcome(&bad, &["supervise", "--check"]);
        assert_eq!(said.status, 1, "{said:?}");
        assert!(
            said.stderr.contains("line ") && said.stderr.contains("bad.toml"),
            "{said:?}"
        );
    }
    place.host.site.done(&["supervise", "--check"]);
}

impl Place {
    /// As [`Place::ended`], while the supervisor may end.
    #[track_caller]
    fn ended_without(&mut self, job: u64, result: &str) {
        let since = Instant::now();
        while self.fake.result(job).is_none() {
            assert!(since.elapsed() < PATIENCE, "a job does not end");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(self.fake.result(job), Some(result));
    }
}
