// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor with real Podman, a stand-in for GitHub (`crate::github::fake`), and one for its
//! runner (`tests/vm/runner-image`).

mod containers;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use lvm_cache_friend::config::RUN_DIR;
use lvm_cache_friend::supervisor::handover::settled;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use super::hooks::Hooks;
use super::registry::Registry;
use super::{Body, Host, story};
use crate::docs::block;
use crate::github::fake::{
    APP, FORK, Fake, FaultKind, MAIN, REPOSITORY, Stage, TARGET, TOKEN, id_of,
};
use crate::support::command::{run, sh};
use crate::support::podman::Service;
use crate::support::site::{Kind, MOUNT_DIR};
use crate::support::{image, wait_until};
use crate::views;

/// On this machine's kernel.
pub const BODIES: &[Body] = &[
    ("supervised_jobs", jobs),
    ("supervised_scale_set", scale_set),
    ("supervised_strangers", strangers),
    ("supervised_job_of_refused_scopes", refused_scopes),
    ("supervisor_over_kills", kills),
    ("supervisor_killed_at_each_step", each_step),
    ("supervisor_starts_again", starts_again),
    ("supervised_hostile_jobs", hostile),
    ("many_supervised_jobs", many),
    ("supervisor_meets_faults", faults),
    ("supervised_scale_set_meets_faults", set_faults),
    ("supervisor_drains", drains),
    ("supervisor_ends_without_podman", ends_without_podman),
    ("supervised_runners_without_jobs", without_jobs),
    ("supervised_image_of_github", github_image),
    ("supervised_image_is_pulled", pulled),
    ("supervised_containers", containers::containers),
];

/// In a guest: what needs cgroups, and what is done by each version of Podman in its own way.
pub const GUEST: &[Body] = &[
    ("supervised_hostile_jobs", hostile),
    ("supervised_containers", containers::containers),
];

/// Longer than anything here takes: a test that waits longer shows the log.
const PATIENCE: Duration = Duration::from_secs(150);

/// A host with a supervisor. Parts are taken down in this order.
pub struct Place {
    pub supervisor: Option<Supervisor>,
    service: Option<Service>,
    _hooks: Hooks,
    pub fake: Fake,
    pub host: Host,
}

/// A running supervisor; killed when dropped, and its log is shown where the test failed.
pub struct Supervisor {
    child: Child,
    log: PathBuf,
}

impl Supervisor {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
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
pub const SET: &str = "scale-set = { name = 'linux', max = 2 }\n";
pub const JOB: &str = "[[supervise.pool.volume]]\nname = 'job'\ntarget = '/run/lvm-cache-friend'\n\
                   options = { type = 'job', save = 'of={ref}' }\n";

impl Place {
    /// A pool `linux`, which `settings` describes, and its volumes.
    pub fn new(kind: Kind, auth: &str, settings: &str, volumes: &str) -> Self {
        Self::with(kind, auth, settings, volumes, "")
    }

    /// And containers with further settings.
    pub fn with(kind: Kind, auth: &str, settings: &str, volumes: &str, container: &str) -> Self {
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
    pub fn configured(kind: Kind, pools: impl FnOnce(&Fake) -> String) -> Self {
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

    pub fn start(&mut self, environment: &[(&str, &str)]) {
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

    pub fn supervisor(&mut self) -> &mut Supervisor {
        self.supervisor.as_mut().unwrap()
    }

    /// Waits until something is so.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
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

    /// Ends what runs, and what the kernel and `/run` know of it, as a power cut does; then all but the supervisor
    /// is started. What is on the disk stays: whether that would be there, `powercut` tests.
    pub fn power_cut(&mut self) {
        let podman = &self.host.podman;
        for process in ["{{.State.ConmonPid}}", "{{.State.Pid}}"] {
            let all = podman.done(&["ps", "--all", "--quiet"]);
            for container in all.lines() {
                let pid = podman.done(&["inspect", "--format", process, container]);
                let pid: i32 = pid.trim().parse().unwrap();
                if pid > 0 {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
        }
        self.service = None;
        self.host.daemon.take().unwrap().kill();
        let gone = ["/var/lib/containers/storage", MOUNT_DIR];
        for mount in lvm_cache_friend::mount::table().unwrap().iter().rev() {
            if gone.iter().any(|place| mount.at.starts_with(place)) {
                let _ = umount2(&mount.at, MntFlags::MNT_DETACH);
            }
        }
        for place in ["/run/libpod", "/run/containers", "/run/crun", RUN_DIR] {
            let _ = fs::remove_dir_all(place);
        }
        let _ = fs::remove_file("/dev/shm/libpod_lock");
        self.host.daemon = Some(self.host.site.serve());
        self.service = Some(Service::start());
    }

    /// Queues a job and waits for its result.
    #[track_caller]
    pub fn job(&mut self, script: &str) -> &'static str {
        let job = self.fake.queue(&MAIN, script);
        self.ended(job)
    }

    #[track_caller]
    pub fn ended(&mut self, job: u64) -> &'static str {
        let mut result = None;
        self.until("a job ends", |place| {
            result = place.fake.result(job);
            result.is_some()
        });
        let runs = self.fake.state().jobs[&job].runs;
        assert_eq!(runs, 1, "a job runs once");
        result.unwrap()
    }

    pub fn log(&self, job: u64) -> String {
        self.fake.state().jobs[&job].log.clone()
    }

    /// Waits until the supervisor has died at a failpoint.
    #[track_caller]
    pub fn dies(&mut self, point: &str) {
        let since = Instant::now();
        while self.supervisor().child.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < PATIENCE, "{point} is not reached");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What `runners list --json` says.
    pub fn rows(&self) -> Vec<Value> {
        let said = self.host.site.outcome(&["runners", "list", "--json"]);
        serde_json::from_str(&said.stdout).unwrap_or_default()
    }

    /// Ends it as systemd does; all is gone then.
    pub fn finish(&mut self) {
        self.supervisor().signal(Signal::SIGTERM);
        self.gone();
    }

    pub fn gone(&mut self) {
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
        let runners: Vec<_> = self.fake.state().runners.values().cloned().collect();
        assert!(runners.is_empty(), "{runners:?}");
    }

    /// How many entries there are.
    pub fn entries(&self) -> Vec<Value> {
        let mut rows = self.host.site.list();
        rows.retain(|row| row["kind"] == "entry");
        rows
    }

    /// Waits until so many entries are there.
    #[track_caller]
    pub fn published(&mut self, count: usize) {
        self.until(&format!("{count} entries"), |place| {
            place.entries().len() == count
        });
    }
}

/// Fails where any secret of GitHub's is in a text, or what is one in base64.
#[track_caller]
fn without_secrets(place: &Place, what: &str, text: &str) {
    let key = fs::read_to_string(place.fake.file("app.pem")).unwrap();
    let line = key.lines().nth(3).unwrap();
    let state = place.fake.state();
    let secrets = state.secrets.iter().map(String::as_str);
    // A runner has its own credentials, good for its one job: it must.
    let secrets = secrets.filter(|secret| !secret.starts_with("runner_"));
    for secret in secrets.chain([TOKEN, line]) {
        assert!(!text.contains(secret), "{what} has a secret: {secret}");
    }
    for configuration in &state.configurations {
        let given = settled(configuration.clone().into());
        assert_ne!(configuration, given.expose_secret());
        for configuration in [configuration, given.expose_secret()] {
            assert!(
                !text.contains(configuration),
                "{what} has a runner's configuration"
            );
        }
    }
}

/// What the daemon's metrics say.
pub fn given(series: &str) -> Option<f64> {
    let text = views::get("/metrics");
    views::value(&text, &format!("lvm_cache_friend_{series}"))
}

fn jobs(kind: Kind) {
    let mut place = Place::new(kind, "app", FIXED, CACHE);
    // Secrets are in its memory. That is so before it asks GitHub for anything.
    place.until("a runner is registered", |place| {
        !place.fake.state().runners.is_empty()
    });
    let limits = format!("/proc/{}/limits", place.supervisor().child.id());
    let limits = fs::read_to_string(limits).unwrap();
    let core = limits.lines().find(|line| line.contains("core file size"));
    let core: Vec<_> = core.unwrap().split_whitespace().skip(4).collect();
    assert_eq!(core, ["0", "0", "bytes"]);
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
                env; cat /proc/self/mountinfo; find / -xdev -type f -size -64k ! -path '/proc/*' ! -path '/run/runner/.c*' ! -path '/opt/runner/_work/_temp/*' -exec cat {} + 2>/dev/null || true\n\
                timeout 2 cat /run/jit-config || true\n\
                echo has-look''ed; until [ -e /opt/runner/_work/go ]; do sleep 0.2; done";
    let job = place.fake.queue(&MAIN, look);
    let mut logs = String::new();
    place.until("the job has looked", |place| {
        for row in place.rows() {
            let runner = row["runner"].as_str().unwrap_or_default().to_owned();
            let said = place
                .host
                .site
                .outcome(&["runners", "logs", &runner, "--lines", "100000"]);
            println!(
                "{runner}: {} bytes of log, {} {}",
                said.stdout.len(),
                said.status,
                said.stderr
            );
            // On a line of its own as a rule: what comes in parts Podman 4.3 joins with its neighbours. The script
            // itself, which is among what it shows, has that word otherwise.
            if said.stdout.contains("has-looked") {
                logs = said.stdout;
                let inspected = place.host.podman.done(&["inspect", &runner]);
                without_secrets(place, "podman inspect", &inspected);
                let processes = run(
                    "sh",
                    [
                        "-c",
                        "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
                    ],
                );
                without_secrets(place, "an argument", &processes);
                without_secrets(place, "metrics", &views::get("/metrics"));
                without_secrets(place, "the status page", &views::get("/"));
                let layers = format!(
                    "podman save {} | tr -cd '[:print:]\\n'",
                    image("runner-image")
                );
                without_secrets(place, "the image", &sh(&layers));
                place
                    .host
                    .podman
                    .done(&["exec", &runner, "touch", "/opt/runner/_work/go"]);
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
    // The daemon's metrics have what the supervisor tells, until it is silent.
    place.until("a report", |_| {
        given("runner_jobs_total{verdict=\"success\"}") == Some(2.0)
            && given("slots{state=\"idle\"}") == Some(2.0)
    });
    assert_eq!(given("runner_jobs_total{verdict=\"failure\"}"), Some(1.0));
    assert_eq!(given("supervisor_up"), Some(1.0));
    place.finish();
    wait_until(|| given("supervisor_up") == Some(0.0));
    assert_eq!(given("slots{state=\"idle\"}"), None);
}

fn scale_set(kind: Kind) {
    // As docs/supervisor.md has it: nothing but these can be written to.
    let work = "[[supervise.pool.volume]]\nname = 'work'\ntarget = '/opt/runner/_work'\noptions = { publish = 'never' }\n";
    let volumes = format!("{JOB}{work}");
    let container = "read-only = true, tmpfs = ['/tmp', '/var/tmp', '/run/runner'], ";
    let mut place = Place::with(kind, "token", SET, &volumes, container);
    assert_eq!(
        place.job("! touch /opt/runner/x; touch ~/x /opt/runner/_work/_home/x"),
        "succeeded"
    );
    let ask = "/run/lvm-cache-friend/bin/lvm-cache-friend restore x --key linux; cd /run/lvm-cache-friend/x\n";
    let own = place.fake.scope();
    let forks = format!(
        "{own}:pull_request:fork/{}/main",
        id_of(FORK.head_repository)
    );
    let main = |script: &str| (&MAIN, format!("{ask}{script}"), &own);
    let fork = |script: &str| (&FORK, format!("{ask}{script}"), &forks);
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
            assert!(
                rows.iter().any(|row| row["scope"] == scope.as_str()),
                "{rows:?}"
            );
        }
    }
    // None waits where none is wanted.
    place.until("no runner", |place| {
        place.rows().iter().all(|row| row["state"] == "empty")
    });
    place.finish();
}

/// A pull request of a fork, and its `pull_request_target`, which has secrets: neither reaches what the other left, by its
/// name, tags or key, before or while it is there.
fn strangers(kind: Kind) {
    /// Takes all that can be had, by all that one could know of the other's; nothing of it may be `$1`'s.
    const TAKE: &str = r#"
PATH=$PATH:/run/lvm-cache-friend/bin; cd /run/lvm-cache-friend
own=$1 other=$2 round=0
take() {
    round=$((round + 1))
    lvm-cache-friend restore "$1-$round" --key "$2" --restore-keys "$3" --save ""
    if grep -q "^$own" "$1-$round/who"; then echo "own by $2"; fi
    if grep -q "^$other" "$1-$round/who"; then echo "REACHED $other by $*"; exit 1; fi
    lvm-cache-friend discard "$1-$round"
}
all() {
    take x linux 'linux;lin*'
    take x "of=$ref" 'of=*'
    take y 'key:cargo-1 path:0123456789ab' 'key:cargo* path:0123456789ab;key:*'
    take z "friend:scope:$scope" "scope=$scope;$scope;friend:*"
    take z "$secret" 'secret*'
}
leave() {
    lvm-cache-friend restore "left-$1" --key linux --save ""
    echo "$own $1" >"left-$1/who"
    lvm-cache-friend save "left-$1" linux "of=$ref" key:cargo-1 path:0123456789ab "friend:scope:$scope" "$secret"
}
"#;
    let mut place = Place::new(kind, "token", SET, JOB);
    let fork = id_of(FORK.head_repository);
    let own = place.fake.scope();
    let script = |who: &str, other: &str, aim: &str, rest: &str| {
        format!(
            "set {who} {other}; ref='fork/{fork}/main' scope='{aim}' secret='secret-{fork}'\n{TAKE}\n{rest}"
        )
    };
    let forks = format!("{own}:pull_request:fork/{fork}/main");
    let targets = |job: u64| format!("{own}:pull_request_target:run/{}", job * 10);

    let main = "/run/lvm-cache-friend/bin/lvm-cache-friend restore x --key linux; echo main >/run/lvm-cache-friend/x/who";
    assert_eq!(place.job(main), "succeeded");
    place.published(1);
    let left = |place: &Place, scope: &str| {
        let tag = "friend:cache:key:cargo-1";
        let rows = place.entries();
        let mut own = rows.iter().filter(|row| row["scope"] == scope);
        own.any(|row| row["tags"].to_string().contains(tag))
    };
    // One after the other, each with the other's before it.
    let mut last = 0;
    for turn in 0..2 {
        last = place.fake.queue(
            &TARGET,
            &script("target", "fork", &forks, "all; leave a; leave b"),
        );
        assert_eq!(place.ended(last), "succeeded", "{}", place.log(last));
        assert!(left(&place, &targets(last)), "{:?}", place.entries());
        let stranger = place.fake.queue(
            &FORK,
            &script("fork", "target", &targets(last), "all; leave a; leave b"),
        );
        assert_eq!(
            place.ended(stranger),
            "succeeded",
            "{}",
            place.log(stranger)
        );
        assert!(left(&place, &forks), "{:?}", place.entries());
        // What they try does find what the same one left before.
        let log = place.log(stranger);
        for by in ["linux", "of=", "key:", "friend:scope:", "secret-"] {
            assert_eq!(
                log.contains(&format!("own by {by}")),
                turn == 1,
                "{by}: {log}"
            );
        }
    }
    // At once; and what GitHub says of one of them comes late, when the other's is there.
    let fault = FaultKind::Status(502, Vec::new(), "<html>");
    place.fake.inject("/actions/runs/", fault, 3);
    let race = "for n in 1 2 3 4; do all; leave $n; done";
    let jobs = [
        place
            .fake
            .queue(&TARGET, &script("target", "fork", &forks, race)),
        place
            .fake
            .queue(&FORK, &script("fork", "target", &targets(last), race)),
    ];
    for job in jobs {
        assert_eq!(place.ended(job), "succeeded", "{}", place.log(job));
    }
    // Nothing of it is anywhere but where its table says, and the default branch's is as it was.
    let scopes: BTreeSet<_> = place
        .entries()
        .iter()
        .map(|row| row["scope"].as_str().unwrap().to_owned())
        .collect();
    let runs = scopes
        .iter()
        .filter(|scope| scope.contains(":pull_request_target:run/"));
    assert_eq!(runs.count(), 3, "{scopes:?}");
    assert_eq!(scopes.len(), 5, "{scopes:?}");
    assert!(
        scopes.contains(&own) && scopes.contains(&forks),
        "{scopes:?}"
    );
    let look = "/run/lvm-cache-friend/bin/lvm-cache-friend restore x --key linux --save ''; grep -qx main /run/lvm-cache-friend/x/who";
    assert_eq!(place.job(look), "succeeded");
    place.finish();
}

/// A job whose scopes the daemon refuses, as somebody said others before, does not go on with those.
fn refused_scopes(kind: Kind) {
    let set = SET.replace("max", "min = 1, max");
    let mut place = Place::new(kind, "token", &set, JOB);
    let mut runner = String::new();
    place.until("a runner waits", |place| {
        let rows = place.rows();
        let idle = rows.iter().find(|row| row["state"] == "idle");
        runner = idle.map_or(String::new(), |row| {
            row["runner"].as_str().unwrap().to_owned()
        });
        !runner.is_empty()
    });
    let body = json!({"Name": format!("{runner}-job"), "Opts": {"scope": "wider"}});
    let plugin = place.host.daemon.as_ref().unwrap().plugin();
    assert_eq!(plugin.call("Friend.Admit", &body).0, 200);
    let job = place.fake.queue(
        &FORK,
        "cd /run/lvm-cache-friend; bin/lvm-cache-friend restore x --key linux; echo evil >x/who; exec sleep 3600",
    );
    place.until("its runner is gone", |place| {
        let begun = place.fake.state().jobs[&job].stage != Stage::Queued;
        begun
            && !place
                .host
                .podman
                .done(&["ps", "--all", "--format", "{{.Names}}"])
                .contains(&runner)
    });
    assert!(place.supervisor().log().contains("refused its scopes"));
    assert_eq!(place.entries().len(), 0);
    place.until("its job has failed", |place| {
        place.fake.result(job).is_some()
    });
    assert_ne!(place.fake.result(job), Some("succeeded"));
    // Its slot goes on.
    let good =
        "cd /run/lvm-cache-friend; bin/lvm-cache-friend restore x --key linux; echo good >x/who";
    assert_eq!(place.job(good), "succeeded");
    place.published(1);
    place.finish();
}

/// Runners of the image that `runner/Containerfile` makes, configured as docs/supervisor.md says.
pub fn builds() {
    let mut place = Place::configured(Kind::Reflink, |fake| {
        image("runner-debian");
        containers::pool(fake, "localhost/runner")
    });
    story::tell(&place.fake, &|| place.entries());
    // What workflows take for granted; and Podman's data is in the cache, once there is one, as in the job there.
    let script = r#"
        for program in bzip2 curl file git gpg jq lsb_release rsync ssh unzip wget xz zip zstd; do
            command -v "$program"
        done
        [ "$(sudo -n id -u)" = 0 ]; [ "$ImageOS" = debian12 ]; [ -z "${XDG_DATA_HOME-}" ]
        [ ~ = /opt/runner/_work/_home ]; touch ~/x
        ! grep "$(stat -c %m ~) tmpfs" /proc/self/mounts
        podman images; [ -d ~/.local/share/containers/storage ]
        lvm-cache-friend restore containers --key other
        podman images; [ -d /run/lvm-cache-friend/containers/containers/storage ]
        # What networks of containers take is there.
        docker import ~/../../externals/base.tar base; docker network create net
        docker run -d --name web --network net -p 80 --health-cmd true --health-interval 1s base /bin/httpd -f -h /etc
        [ "$(docker run --rm --init --network net base /bin/wget -q -O - http://web/group)" = "$(docker exec web /bin/cat /etc/group)" ]
        curl --silent --fail "$(docker port web 80 | head -n 1)/group"
        until [ "$(docker inspect --format '{{.State.Health.Status}}' web)" = healthy ]; do sleep 1; done
        docker rm -f web; docker network rm net"#;
    let job = place.fake.queue(&MAIN, script);
    let result = place.ended(job);
    let log = place.fake.state().jobs[&job].log.clone();
    assert_eq!(result, "succeeded", "{log}");
    place.finish();
}

/// A job under SELinux: its runner is confined, had its configuration from the FIFO, and uses both kinds of volume.
pub fn confined() {
    let job = JOB.replace("of={ref}", "job");
    let mut place = Place::new(Kind::Lvm, "token", "count = 1\n", &format!("{CACHE}{job}"));
    let script = "grep :container_t:s0:c /proc/self/attr/current\n[ -p /run/jit-config ]\necho 1 > /cache/n\n\
                  cd /run/lvm-cache-friend; bin/lvm-cache-friend restore late --key late; echo 1 > late/n";
    assert_eq!(place.job(script), "succeeded");
    place.published(2);
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

/// Killed at each step of a slot's life, it goes on in the next life: the job runs once, and what it wrote is
/// published if, and only if, it succeeded.
fn each_step(kind: Kind) {
    let mut place = Place::new(kind, "token", "count = 1\n", CACHE);
    let mut good = 0;
    for point in lvm_cache_friend::failpoint::SUPERVISOR {
        let with_job = ["start", "judge", "end", "clear"];
        let stage = point.split('.').next().unwrap();
        let results = if with_job.contains(&stage) {
            &["succeeded", "failed"][..]
        } else {
            &["succeeded"]
        };
        for result in results {
            println!("{point}, a job that has {result}");
            place.supervisor = None;
            place.start(&[("LVM_CACHE_FRIEND_FAILPOINT", point)]);
            let exit = u8::from(*result == "failed");
            let job = place
                .fake
                .queue(&MAIN, &format!("date +%N > /cache/n; exit {exit}"));
            place.dies(point);
            place.start(&[]);
            assert_eq!(place.ended(job), *result, "{point}");
            if *result == "succeeded" {
                good += 1;
                place.published(good);
            }
        }
    }
    place.finish();
    assert_eq!(place.entries().len(), good);
}

/// Another life finds another world: a lower count, registrations of its own and of another host's, and a
/// machine that was switched off, as far as Podman, the daemon and the supervisor can tell.
fn starts_again(kind: Kind) {
    // A registration is read again every 15 s then.
    let settings = format!("{FIXED}job-timeout = '60s'\n");
    let mut place = Place::new(kind, "token", &settings, CACHE);
    let idle = |place: &mut Place, slots: &[&str]| {
        let rows = place.rows();
        let rows = rows.iter().filter(|row| row["state"] == "idle");
        let found: Vec<_> = rows.filter_map(|row| row["slot"].as_str()).collect();
        found == slots
    };
    place.until("both wait", |place| idle(place, &["linux-0", "linux-1"]));
    let names: Vec<_> = {
        let state = place.fake.state();
        state.runners.values().map(|r| r.name.clone()).collect()
    };
    let host = &names[0]["linux-0-".len()..][..4];
    let other = format!(
        "linux-0-{:04x}00000001",
        !u16::from_str_radix(host, 16).unwrap()
    );
    let left = ["linux-0", "linux-1", "linux-7"].map(|slot| format!("{slot}-{host}00000001"));
    // Another pool's, whose slots' names begin as ours do.
    let pool = format!("linux-1-0-{host}00000001");
    place.supervisor = None;
    for name in left.iter().chain([&other, &pool]) {
        place.fake.registered(name);
    }

    let config = place.host.site.config.clone();
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("count = 2", "count = 1");
    // With an image that differs from the runner's in one line.
    let with = |name: &str, line: &str| {
        let image = image("runner-image");
        let derived = format!("{image}-{name}");
        sh(&format!(
            "printf '%s\\n' 'FROM {image}' '{line}' | podman build --quiet --tag {derived} -"
        ));
        text.replace(&format!("'{image}'"), &format!("'{derived}'"))
    };
    fs::write(&config, &text).unwrap();
    place.start(&[]);
    let registered = |place: &Place| {
        let state = place.fake.state();
        let names = state.runners.values().map(|runner| runner.name.clone());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    place.until("the slot that is no more is empty", |place| {
        let there = registered(place);
        let kept = [&other, &pool].map(String::clone);
        // The one that waited goes on waiting.
        let own: Vec<_> = there.iter().filter(|name| !kept.contains(name)).collect();
        there.len() == 3 && own[0].starts_with("linux-0-") && names.contains(own[0])
    });
    place.until("one waits", |place| idle(place, &["linux-0"]));

    // Its first process knows the runner's variable and nothing else.
    let plain = with("plain", "LABEL lvm-cache-friend.jit-config=");
    fs::write(&config, plain).unwrap();
    place.supervisor = None;
    place.start(&[]);
    place.until("the one of another image is replaced", |place| {
        let there = registered(place);
        idle(place, &["linux-0"]) && there.len() == 3 && !names.iter().any(|n| there.contains(n))
    });

    // What a power cut leaves of Podman, the daemon and the supervisor: their files, but for those below /run.
    let job = place
        .fake
        .queue(&MAIN, "echo cut > /cache/n; exec sleep 3600");
    place.until("it runs", |place| {
        matches!(place.fake.state().jobs[&job].stage, Stage::Running(_))
    });
    place.supervisor = None;
    place.power_cut();
    place.start(&[]);
    assert_eq!(place.ended(job), "abandoned");
    assert_eq!(place.job("[ ! -e /cache/n ]"), "succeeded");
    place.until("one waits again", |place| idle(place, &["linux-0"]));
    let variable = "{{range .Config.Env}}{{println .}}{{end}}";
    let runner = &place.rows()[0]["runner"].as_str().unwrap().to_owned();
    let environment = (place.host.podman).done(&["inspect", "--format", variable, runner]);
    assert!(environment.contains("ACTIONS_RUNNER_INPUT_JITCONFIG="));

    // One that dies before its runner has read its configuration takes that with it: the job is another runner's.
    let late = r#"ENTRYPOINT ["sh", "-c", "sleep 2; exec /opt/runner/entrypoint"]"#;
    let late = with("late", late);
    fs::write(&config, late).unwrap();
    place.supervisor = None;
    place.start(&[("LVM_CACHE_FRIEND_FAILPOINT", "start.2")]);
    let job = place.fake.queue(&MAIN, "true");
    place.dies("start.2");
    place.start(&[]);
    assert_eq!(place.ended(job), "succeeded");
    place.until("another waits", |place| {
        let rows = place.rows();
        let mut rows = rows.iter();
        rows.any(|row| row["state"] == "idle")
    });
    let log = place.supervisor().log();
    let said = "a runner ended with exit code 1 and had no job. Its last lines: entrypoint: no configuration any more";
    assert!(log.contains(said), "{log}");
    assert_eq!(place.job("true"), "succeeded");
    for name in [&other, &pool] {
        assert!(registered(&place).contains(name), "{name} is another's");
        place.fake.deregistered(name);
    }
    place.finish();
}

/// An image whose runner dies at once, one whose runner is too old, one that works, and another one.
fn without_jobs(kind: Kind) {
    let make = |line: &str| {
        let base = image("runner-image");
        sh(&format!(
            "printf '%s\\n' 'FROM {base}' '{line}' | podman build --quiet --tag localhost/changing -"
        ));
    };
    let begin = Instant::now();
    let mut place = Place::configured(kind, |fake| {
        make(r#"ENTRYPOINT ["sh", "-c", "echo no such luck; exit 134"]"#);
        let token = fake.file("token");
        format!(
            "[[supervise.pool]]\nname = 'linux'\nurl = '{0}/{REPOSITORY}'\napi-url = '{0}'\ntoken = {token:?}\n\
             labels = ['linux']\ncount = 2\ncontainer = {{ image = 'localhost/changing', network = 'host', pull = 'never' }}\n",
            fake.url
        )
    });
    let problem = |place: &Place, words: &[&str]| {
        let said = place.host.site.outcome(&["runners", "list"]).stdout;
        words.iter().all(|word| said.contains(word))
    };
    let dies = ["exit code 134", "no such luck", "the next try is in"];
    place.until("it is said why", |place| problem(place, &dies));
    std::thread::sleep(Duration::from_secs(5));
    let asked = place.fake.count("", begin);
    assert!(asked <= 7, "{asked} requests");

    place.fake.state().too_old = true;
    make("LABEL n=1");
    let old = ["stopped: ", "exit code 7", "build the image anew"];
    place.until("it is too old", |place| problem(place, &old));
    place.until("no registration is left", |place| {
        place.fake.state().runners.is_empty()
    });
    let asked = place.fake.count("", begin);
    std::thread::sleep(Duration::from_secs(12));
    assert_eq!(place.fake.count("", begin), asked, "it is left alone");

    place.fake.state().too_old = false;
    make("LABEL n=2");
    assert_eq!(place.job("true"), "succeeded");
    let idle = |place: &Place| -> Vec<String> {
        let rows = place.rows();
        let rows = rows.iter().filter(|row| row["state"] == "idle");
        rows.map(|row| row["runner"].as_str().unwrap().to_owned())
            .collect()
    };
    place.until("both wait", |place| idle(place).len() == 2);
    assert!(!problem(&place, &["exit code"]));
    let before = idle(&place);
    make("LABEL n=3");
    place.until("they are replaced", |place| {
        let now = idle(place);
        now.len() == 2 && now.iter().all(|runner| !before.contains(runner))
    });
    // None of those that had no job is a job that failed.
    place.until("a report", |_| {
        given("runner_jobs_total{verdict=\"success\"}") == Some(1.0)
    });
    for verdict in ["failure", "unknown"] {
        let series = format!("runner_jobs_total{{verdict={verdict:?}}}");
        assert_eq!(given(&series).unwrap_or(0.0), 0.0);
    }
    place.finish();
}

/// An image of a registry's: pulled where it is not there, and, when asked for, where there is another.
fn pulled(kind: Kind) {
    let mut registry = None;
    let make = |registry: &Registry, n: u32| {
        let base = image("runner-image");
        sh(&format!(
            "printf '%s\\n' 'FROM {base}' 'ENV NUMBER={n}' | podman build --quiet --tag localhost/made -"
        ));
        registry.push("localhost/made");
        sh("podman rmi localhost/made");
    };
    let mut place = Place::configured(kind, |fake| {
        let registry = registry.insert(Registry::start());
        let (image, token) = (&registry.image, fake.file("token"));
        format!(
            "[[supervise.pool]]\nname = 'linux'\nurl = '{0}/{REPOSITORY}'\napi-url = '{0}'\ntoken = {token:?}\n\
             labels = ['linux']\ncount = 1\ncontainer = {{ image = '{image}', network = 'host', pull = 'never' }}\n",
            fake.url
        )
    });
    let registry = registry.unwrap();
    let said = |place: &Place, words: &str| {
        let list = place.host.site.outcome(&["runners", "list"]);
        list.stdout.contains(words)
    };
    let configured = |place: &mut Place, old: &str, new: &str| {
        place.supervisor = None;
        let config = place.host.site.config.clone();
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, story::replaced(&text, &[(old, new)])).unwrap();
        place.start(&[]);
    };
    place.until("it is not there", |place| {
        said(place, "there is no image 127.")
    });
    configured(&mut place, "'never'", "'missing'");
    place.until("nor at the registry", |place| {
        said(place, "pulling the image")
    });
    assert!(!said(&place, "200 OK"), "a refusal has no such status");
    // Nobody was asked for a runner that could not be started.
    assert!(place.fake.state().runners.is_empty());
    make(&registry, 1);
    assert_eq!(place.job("[ $NUMBER = 1 ]"), "succeeded");
    make(&registry, 2);
    assert_eq!(place.job("[ $NUMBER = 1 ]"), "succeeded");
    place.until("one waits", |place| {
        let rows = place.rows();
        rows.iter().any(|row| row["state"] == "idle")
    });
    let waits = place.rows()[0]["runner"].clone();
    configured(&mut place, "'missing'", "'newer'");
    place.until("it is replaced", |place| {
        let rows = place.rows();
        let mut rows = rows.iter();
        rows.any(|row| row["state"] == "idle" && row["runner"] != waits)
    });
    assert_eq!(place.job("[ $NUMBER = 2 ]"), "succeeded");
    place.finish();
}

/// An image of the shape of GitHub's own, with the lines that docs/supervisor.md gives for it.
fn github_image(kind: Kind) {
    let mut place = Place::configured(kind, |fake| {
        let own = image("runner-image github");
        let (own, token) = (format!("{own:?}"), fake.file("token"));
        let container = story::replaced(
            &block("github-image"),
            &[
                ("\"ghcr.io/actions/actions-runner:latest\"", &own),
                ("newer", "missing"),
            ],
        );
        format!(
            "[[supervise.pool]]\nname = 'linux'\nurl = '{0}/{REPOSITORY}'\napi-url = '{0}'\ntoken = {token:?}\n\
             labels = ['linux']\ncount = 1\njob-timeout = '12s'\n{container}network = 'host'\n",
            fake.url
        )
    });
    assert_eq!(place.job("touch /home/runner/_work/x"), "succeeded");
    assert_eq!(place.job("exit 1"), "failed");
    place.until("the report has them", |_| {
        given("runner_jobs_total{verdict=\"success\"}") == Some(1.0)
            && given("runner_jobs_total{verdict=\"failure\"}") == Some(1.0)
    });
    assert_eq!(place.job("sleep 3600"), "canceled");
    place.finish();
}

/// Jobs that take what they can get, all at once. Their slots are other jobs' soon after, and the slot beside them
/// never notices.
fn hostile(kind: Kind) {
    // What bounds memory and processes is a cgroup, of which the other tier has none.
    let (bounds, timeout) = match kind {
        Kind::Lvm | Kind::Rbd => ("memory = '64M', pids = 64, ", "40s"),
        Kind::Reflink => ("", "8s"),
    };
    let attacks = match kind {
        Kind::Lvm | Kind::Rbd => &[
            // One page after another, not in one request that could be refused.
            ("eats memory", "exec tail -c 500M /dev/zero"),
            ("forks without end", "f() { f | f & }; f; exec sleep 3600"),
        ][..],
        Kind::Reflink => &[
            ("never ends", "exec sleep 3600"),
            ("kills all that it can", "kill -9 -1; exec sleep 3600"),
            ("kills its runner", "kill -9 $PPID; exec sleep 3600"),
            (
                "fills its disk",
                "dd if=/dev/zero of=/cache/full bs=1M count=2000",
            ),
        ],
    };
    let count = attacks.len() + 1;
    let settings = format!("count = {count}\njob-timeout = '{timeout}'\n");
    let cache = CACHE.replace("save = ", "size = '1G', save = ");
    let mut place = Place::with(kind, "token", &settings, &cache, bounds);
    let waiting = |place: &mut Place| {
        let rows = place.rows();
        rows.iter().filter(|row| row["state"] == "idle").count()
    };
    place.until("all wait", |place| waiting(place) == count);
    let attackers: Vec<_> = attacks
        .iter()
        .map(|(attack, script)| (*attack, place.fake.queue(&MAIN, script)))
        .collect();
    place.until("all attack", |place| {
        let state = place.fake.state();
        attackers
            .iter()
            .all(|(_, job)| state.jobs[job].stage != Stage::Queued)
    });
    let since = Instant::now();
    let mut good = 0;
    while attackers
        .iter()
        .any(|(_, job)| place.fake.result(*job).is_none())
    {
        assert!(since.elapsed() < PATIENCE, "an attack is not over");
        assert_eq!(place.job("date +%N > /cache/n"), "succeeded");
        good += 1;
    }
    println!("{good} jobs meanwhile, in {:?}", since.elapsed());
    assert!(good > 0);
    for (attack, job) in attackers {
        assert_ne!(place.ended(job), "succeeded", "{attack}");
    }
    place.until("all wait again", |place| waiting(place) == count);
    println!("all slots were back after {:?}", since.elapsed());
    place.published(good);
    place.finish();
}

/// Many jobs, while one of twenty requests to GitHub meets a fault.
fn many(kind: Kind) {
    let count = match kind {
        Kind::Reflink => 200,
        Kind::Lvm | Kind::Rbd => 20,
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
        // A token that may not do that; and one that may nothing.
        (
            "generate-jitconfig",
            status(403, &[], "Resource not accessible by integration"),
            1,
        ),
        ("generate-jitconfig", status(401, &[], "Bad credentials"), 1),
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
    // GitHub's clock is an hour off: there is no token to be had, until it is right again.
    for clock in [3600, -3600] {
        let refused = |place: &mut Place| place.supervisor().log().matches("claim").count();
        let before = refused(&mut place);
        place.fake.state().clock = clock;
        place.fake.forget_tokens();
        // As many as wait, and one.
        let jobs = [(); 3].map(|()| place.fake.queue(&MAIN, "true"));
        place.until("it is refused", |place| refused(place) > before);
        place.fake.state().clock = 0;
        for job in jobs {
            assert_eq!(place.ended(job), "succeeded");
        }
    }
    place.until("the metrics have the faults", |_| {
        given("github_faults_total") >= Some(8.0)
    });
    let minutes = begin.elapsed().as_secs() / 60 + 1;
    let asked = place.fake.count("", begin) as u64;
    // Of the published limits the narrowest: 80 requests that make something, a minute.
    assert!(
        asked < 80 * minutes,
        "{asked} requests in {minutes} minutes"
    );
    let log = place.supervisor().log();
    for (said, times) in [
        ("Server Error", 1),
        ("Already exists", 1),
        ("Validation Failed", 1),
        ("claim", 2),
    ] {
        let lines = log
            .lines()
            .filter(|line| line.contains("WARN") && line.contains(said));
        // Each of the two slots may have met it.
        assert!((1..=2 * times).contains(&lines.count()), "{said}: {log}");
    }
    without_secrets(&place, "the log", &log);
    place.finish();
}

/// Each request that a scale set's job needs meets each fault; those that begin a session take turns.
fn set_faults(kind: Kind) {
    let mut place = Place::new(kind, "token", SET, JOB);
    let status = |status, message| FaultKind::Status(status, Vec::new(), message);
    let begin = Instant::now();
    let mut shared = 0;
    let faults = [
        status(409, "already has an active session"),
        status(500, "Server Error"),
        status(401, "unauthorized"),
        status(404, "Not Found"),
        FaultKind::Status(429, vec![("retry-after", "1".to_owned())], "slow down"),
        FaultKind::Dropped,
        FaultKind::DroppedAfter,
    ];
    for (turn, fault) in faults.into_iter().enumerate() {
        println!("{fault:?}");
        let warnings = |place: &mut Place| place.supervisor().log().matches(" WARN ").count();
        let before = warnings(&mut place);
        let begins = ["/sessions", "/registration-token", "/runner-registration"][turn % 3];
        // An Enterprise Server's jobs are acquired; github.com's are assigned.
        let ghes = turn % 2 == 1;
        place.fake.state().ghes = ghes;
        for path in [
            begins,
            "/queue/",
            "/acquirejobs",
            "/generatejitconfig",
            "/actions/runs/",
        ] {
            if ghes || path != "/acquirejobs" {
                place.fake.inject(path, fault.clone(), 1);
            }
        }
        place.fake.forget_sessions();
        let script = "/run/lvm-cache-friend/bin/lvm-cache-friend restore x --key linux; date +%N > /run/lvm-cache-friend/x/n";
        assert_eq!(place.job(script), "succeeded");
        // Where it cannot be read whose job it is, it shares no caches.
        shared += usize::from(!matches!(fault, FaultKind::Status(404, ..)));
        place.until("an entry for all", |place| {
            let entries = place.entries();
            let for_all = entries
                .iter()
                .filter(|row| row["scope"] == place.fake.scope());
            for_all.count() == shared
        });
        assert_eq!(place.fake.state().faults_left(), 0);
        let warned = warnings(&mut place) - before;
        assert!((1..=14).contains(&warned), "{warned} warnings");
    }
    let minutes = begin.elapsed().as_secs() / 60 + 1;
    // Of a token's 5,000 requests an hour.
    let asked = place.fake.count("/repos/", begin) as u64;
    assert!(
        asked < 83 * minutes,
        "{asked} requests in {minutes} minutes"
    );
    let log = place.supervisor().log();
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
    // It was told, and could tell GitHub.
    assert_eq!(place.fake.result(job), Some("canceled"));
    assert_eq!(place.host.podman.done(&["ps", "--all", "--quiet"]), "");
    let plugin = place.host.daemon().plugin();
    plugin.create("probe", &json!({"restore": "layers"}));
    let said = fs::read_to_string(plugin.mount("probe", "test").join("n"));
    assert_eq!(said.unwrap(), "done\n");
}

/// A host that is shut down: Podman's service is gone before the supervisor, whose runners wait for jobs, as its scale set does.
fn ends_without_podman(kind: Kind) {
    let set = SET.replace("max", "min = 2, max");
    let mut place = Place::new(kind, "token", &set, "");
    let idle = |place: &Place| {
        let rows = place.rows();
        rows.iter().filter(|row| row["state"] == "idle").count() == 2
    };
    place.until("both wait", |place| idle(place));
    place.service = None;
    place.supervisor().signal(Signal::SIGTERM);
    let since = Instant::now();
    let status = loop {
        if let Some(status) = place.supervisor().child.try_wait().unwrap() {
            break status;
        }
        // Long before what it gives jobs to end.
        assert!(
            since.elapsed() < Duration::from_secs(90),
            "it does not end without Podman"
        );
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(status.success(), "{status}");
    let log = fs::read_to_string(&place.supervisor().log).unwrap();
    assert!(log.contains("work left"), "{log}");
    assert!(place.fake.state().only_set().session().is_none(), "{log}");

    // They are as they were, and the next start has them.
    place.service = Some(Service::start());
    place.start(&[]);
    place.until("both are adopted", |place| idle(place));
    assert_eq!(place.job("true"), "succeeded");
    place.finish();
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
