// SPDX-License-Identifier: Apache-2.0 OR MIT
//! dockerd itself, on Debian 13's root, without a network: what documents say of it, how its containers end, and what becomes
//! of leases when it or the daemon is killed. All in one test, as each command of Docker's takes seconds in a guest.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{judge, make_volumes, names};
use crate::docs::{REPOSITORY, block, type_in};
use crate::harness::{Group, System, Test, Tier, test};
use crate::podman::doctor::findings;
use crate::support::command::{outcome, run};
use crate::support::daemon::Daemon;
use crate::support::podman::DRIVER;
use crate::support::site::{Kind, Site};
use crate::support::{image, wait_until};

pub fn tests() -> Vec<Test> {
    let body = || {
        let mut host = Host::new();
        documented(&host);
        make_volumes(host.daemon().plugin());
        verdicts(&host);
        unknown(&mut host);
        killed(&mut host);
    };
    let dockerd = test(Tier::Guest(Group::Podman), "docker::dockerd", body);
    vec![dockerd.only_on(System::Tree("trixie"))]
}

/// dockerd, with nothing in it but an image. Dropping it ends it with all that it runs.
struct Dockerd {
    child: Child,
    log: tempfile::NamedTempFile,
}

/// Where it and its containerd keep what they have.
const DIRS: [&str; 2] = ["/var/lib/docker", "/run/docker"];

impl Dockerd {
    /// Starts it, told of the plugin as the document says.
    fn new() -> Self {
        // What the package installs.
        let spec = "usr/share/lvm-cache-friend/lvm-cache-friend.spec";
        run(
            "install",
            [
                "-D",
                &format!("{REPOSITORY}/plugin/{spec}"),
                &format!("/{spec}"),
            ],
        );
        type_in(&block("docker-spec"));
        // The guest's root is an overlay, which cannot be one's upper directory.
        fs::create_dir_all(DIRS[0]).unwrap();
        run("mount", ["-t", "tmpfs", "docker", DIRS[0]]);
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut dockerd = Self {
            child: Self::spawn(log.as_file()),
            log,
        };
        dockerd.answers(1);
        image("busybox-image docker.io/library/busybox docker");
        dockerd
    }

    fn spawn(log: &File) -> Child {
        Command::new("dockerd")
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none"])
            .args(["--storage-driver=overlay2"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log.try_clone().unwrap())
            .spawn()
            .unwrap()
    }

    /// Waits for its API, and that costs no processor.
    fn answers(&mut self, times: usize) {
        wait_until(|| {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("dockerd ended: {status}");
            }
            let log = fs::read_to_string(self.log.path()).unwrap();
            log.matches("API listen on").count() == times
        });
    }

    /// `kill -9`: its containers go on.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.child = Self::spawn(self.log.as_file());
        self.answers(2);
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "--- dockerd's log:\n{}",
                fs::read_to_string(self.log.path()).unwrap()
            );
        }
        let all = "docker rm --force $(docker ps --all --quiet)";
        outcome("/bin/sh", ["-c", all]);
        self.kill();
        outcome("umount", ["--recursive", "--lazy", DIRS[0]]);
        let _ = fs::remove_dir_all(DIRS[1]);
        let _ = fs::remove_dir_all("/etc/docker/plugins");
    }
}

/// A host with dockerd. Parts are taken down in this order.
struct Host {
    dockerd: Dockerd,
    daemon: Option<Daemon>,
    site: Site,
}

impl Host {
    fn new() -> Self {
        let site = Site::new(Kind::Lvm);
        Self {
            daemon: Some(site.serve()),
            dockerd: Dockerd::new(),
            site,
        }
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it is away only in restart")
    }

    /// The daemon is killed and started again, with further settings.
    fn restart(&mut self, settings: &str) {
        self.daemon.take().expect("it runs").kill();
        self.site.configure(settings);
        self.daemon = Some(self.site.serve());
    }

    fn lasts(&self) -> Vec<Value> {
        let last = |name| self.daemon().plugin().status(name)["last_lease"].clone();
        names().map(last).into()
    }

    /// What became of the leases of all volumes, once other ones than these have ended.
    #[track_caller]
    fn ended(&self, before: &[Value]) -> Vec<Value> {
        let mut lasts = Vec::new();
        wait_until(|| {
            lasts = self.lasts();
            let mut pairs = lasts.iter().zip(before);
            pairs.all(|(last, before)| last["lv"].is_string() && last["lv"] != before["lv"])
        });
        lasts
    }

    /// Runs a container with all volumes that writes to each and then runs a script, and looks at what becomes of the leases.
    #[track_caller]
    fn case(&self, case: &str, options: &[&str], script: &str, status: i32, verdict: &str) {
        let before = self.lasts();
        let done = outcome("docker", run_options(options, script));
        assert_eq!(done.status, status, "{case}: {done:?}");
        judge(case, &self.ended(&before), verdict);
    }
}

/// The arguments that run a container with all volumes.
fn run_options(options: &[&str], script: &str) -> Vec<String> {
    let mut arguments: Vec<String> = ["run", "--network", "none"].map(Into::into).into();
    for name in names() {
        arguments.extend(["--volume".into(), format!("{name}:/v/{name}")]);
    }
    arguments.extend(options.iter().map(|&option| option.into()));
    arguments.extend(["busybox", "sh", "-c"].map(Into::into));
    arguments.push(format!(
        "for v in /v/*; do cat /proc/sys/kernel/random/uuid >>$v/x; done; {script}"
    ));
    arguments
}

/// Goes on until it is killed.
const SLEEPS: &str = "exec sleep 3600";

/// Uses up more memory than there is.
const GREEDY: &str = "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done";

/// How containers end, for each `publish`.
fn verdicts(host: &Host) {
    host.case("exit 0", &["--rm"], "exit 0", 0, "success");
    host.case("exit 1", &[], "exit 1", 1, "failure");
    let labels = |code: &str| format!("--label=exitCode={code}");
    let (lie, others) = (labels("0"), "--label=container=x");
    host.case(
        "it lies, and is gone",
        &[&lie, others, "--rm"],
        "exit 1",
        1,
        "failure",
    );
    host.case(
        "it lies, to its harm",
        &[&labels("1")],
        "exit 0",
        0,
        "success",
    );
    let memory = ["--rm", "--memory", "20m"];
    host.case("out of memory", &memory, GREEDY, 137, "failure");
    let before = host.lasts();
    let no_such = outcome(
        "docker",
        run_options(&["--rm", "--entrypoint", "/no/such"], ""),
    );
    assert_eq!(no_such.status, 127, "{no_such:?}");
    for last in host.ended(&before) {
        assert_eq!(last["verdict"], "failure", "it cannot be started: {last}");
    }

    let before = host.lasts();
    run(
        "docker",
        run_options(&["--detach", "--name", "two"], SLEEPS),
    );
    run("docker", ["kill", "two"]);
    judge("docker kill", &host.ended(&before), "failure");

    // Two at once on the same volumes, one of which succeeds.
    let before = host.lasts();
    run("docker", ["start", "two"]);
    let other = run_options(&["--rm"], "exit 0");
    assert_eq!(outcome("docker", other).status, 0);
    assert_eq!(host.lasts(), before, "another still uses them");
    run("docker", ["rm", "--force", "two"]);
    judge("two at once", &host.ended(&before), "failure");
}

/// Docker is not to be asked; nobody listens where it is said to be.
fn unknown(host: &mut Host) {
    let says = |host: &Host, state: &str, words: &str| {
        let found = findings(&host.site.config);
        let says = |found: &&Value| {
            found["check"] == "verdicts"
                && found["state"] == state
                && found.to_string().contains(words)
        };
        assert!(
            found.iter().any(|found| says(&found)),
            "{words}: {found:#?}"
        );
    };
    says(host, "ok", "Docker 26");
    let text = fs::read_to_string(&host.site.config).unwrap();
    for (socket, why) in [("/run/nobody.sock", "nothing listens"), ("", "not used")] {
        host.restart(&format!("docker-socket = {socket:?}\n"));
        says(host, "note", why);
        host.case(why, &["--rm"], "exit 1", 1, "unknown");
        fs::write(&host.site.config, &text).unwrap();
    }
    host.restart("");
}

/// What documents say of Docker, as it stands there.
fn documented(host: &Host) {
    let plugin = host.daemon().plugin();
    let entries = || {
        let rows = host.site.list();
        rows.iter().filter(|row| row["kind"] == "entry").count()
    };
    for count in 1..=2 {
        type_in(&block("compose"));
        wait_until(|| entries() == count);
    }
    let volume = plugin.names();
    let [volume] = &volume[..] else {
        panic!("one volume: {volume:?}");
    };
    let last = &plugin.status(volume)["last_lease"];
    assert_eq!(last["restored"], "exact", "{last}");
    assert_eq!(last["verdict"], "success", "{last}");
    let format = "{{.Driver}} {{json .Status}}";
    let said = run("docker", ["volume", "inspect", "--format", format, volume]);
    let (driver, status) = said.split_once(' ').unwrap();
    let status: Value = serde_json::from_str(status).unwrap();
    assert_eq!(driver, DRIVER);
    assert_eq!(status["last_lease"]["lv"], last["lv"], "{status}");

    // What is in use is not removed, even by force, nor is a volume of ours by what removes all that is unused.
    let mount = format!("{volume}:/cache");
    let user = [
        "--detach",
        "--network",
        "none",
        "--name",
        "user",
        "--volume",
        &mount,
        "busybox",
    ];
    run("docker", [&["run"], &user[..], &["sleep", "3600"]].concat());
    let refused = outcome("docker", ["volume", "rm", "--force", volume]);
    assert!(
        refused.status != 0 && refused.stderr.contains("in use"),
        "{refused:?}"
    );
    let dates = run("docker", ["exec", "user", "cat", "/cache/dates"]);
    assert_eq!(dates.lines().count(), 2, "{dates}");
    run("docker", ["rm", "--force", "user"]);
    wait_until(|| plugin.status(volume)["last_lease"]["verdict"] == "failure");
    run("docker", ["system", "prune", "--volumes", "--force"]);
    assert_eq!(plugin.names(), [volume.as_str()]);
    run("docker", ["volume", "rm", "--force", volume]);
    assert_eq!(plugin.names(), [""; 0]);
    assert_eq!(entries(), 2, "what is published stays");

    // Docker takes no propagation for a volume: what is mounted in it later, no container would see.
    let job = "job:/run/lvm-cache-friend:rslave";
    let refused = outcome("docker", ["create", "--volume", job, "busybox"]);
    assert!(refused.stderr.contains("BindOptions"), "{refused:?}");
}

/// dockerd and the daemon are killed under running containers.
fn killed(host: &mut Host) {
    let waits = "until [ -e /go ]; do sleep 0.1; done; exit";
    let start = |name: &str, options: &[&str], script: &str| {
        let options = [&["--detach", "--stop-signal=KILL", "--name", name], options].concat();
        run("docker", run_options(&options, script));
    };

    // Our daemon, and containers that end in its next life.
    for (code, verdict) in [("1", "failure"), ("0", "success")] {
        let before = host.lasts();
        start("outlives", &["--rm"], &format!("{waits} {code}"));
        host.restart("");
        wait_until(|| host.daemon().log().contains("Docker reports how"));
        run("docker", ["exec", "outlives", "touch", "/go"]);
        judge(
            &format!("the daemon killed, exit {code}"),
            &host.ended(&before),
            verdict,
        );
        // What another life of ours found unsettled, it would settle once more, and show that as the last.
        let tags = || run("lvs", ["--noheadings", "--options=lv_tags"]);
        wait_until(|| !tags().contains("friend:lease:"));
    }

    // dockerd's next life ends its containers, and starts what is always to be started; it does not unmount what the life
    // before it had mounted: the lease goes on in that container, and the volume of one that is not started again can be removed.
    let plugin = host.daemon().plugin();
    plugin.create("left", &json!({"save": "left"}));
    let left = [
        "--detach",
        "--stop-signal=KILL",
        "--network=none",
        "--name=once",
        "--volume=left:/left",
        "busybox",
    ];
    run("docker", [&["run"], &left[..], &["sleep", "3600"]].concat());
    let before = host.lasts();
    start("always", &["--restart=always"], SLEEPS);
    host.dockerd.kill();
    host.dockerd.start_again();
    let state = ["inspect", "--format", "{{.State.Status}}", "always"];
    wait_until(|| run("docker", state) == "running\n");
    assert_eq!(host.lasts(), before);
    run("docker", ["rm", "--force", "always", "once"]);
    judge("dockerd killed", &host.ended(&before), "failure");
    run("docker", ["volume", "rm", "left"]);
    host.case("after dockerd's restart", &["--rm"], "exit 0", 0, "success");
}
