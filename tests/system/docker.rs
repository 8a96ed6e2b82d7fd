// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Docker: how its containers end, told by a stand-in of its API on this machine, and by dockerd itself in a guest.

mod real;
mod stand_in;

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Test, Tier, test};
use crate::support::daemon::{Daemon, Plugin};
use crate::support::podman::CLIENT;
use crate::support::site::{Kind, Site};
use crate::support::wait_until;
use stand_in::{Container, Docker, Mood};

/// Where the daemon looks for it.
const SOCKET: &str = "/run/docker.sock";

pub fn tests() -> Vec<Test> {
    let tests: [(&str, fn()); 4] = [
        ("docker::verdicts", verdicts),
        ("docker::what_is_told_late", late),
        ("docker::several_containers", several),
        ("docker::what_tells_nothing", nothing),
    ];
    let mut tests: Vec<_> = tests
        .map(|(name, body)| test(Tier::Reflink, name, body))
        .into();
    tests.extend(real::tests());
    tests
}

/// A volume for each `publish`.
const VOLUMES: [(&str, &str); 4] = [
    ("quiet", "unless-failed"),
    ("strict", "on-success"),
    ("all", "always"),
    ("none", "never"),
];

fn names() -> [&'static str; 4] {
    VOLUMES.map(|(name, _)| name)
}

/// A daemon, its volumes, and the stand-in.
struct Host {
    docker: Docker,
    daemon: Option<Daemon>,
    site: Site,
}

impl Host {
    fn new(settings: &str) -> Self {
        let site = Site::new(Kind::Reflink);
        site.configure(settings);
        let host = Self {
            docker: Docker::start(Path::new(SOCKET)),
            daemon: Some(site.serve()),
            site,
        };
        make_volumes(host.daemon().plugin());
        host
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it is away only in restart")
    }

    /// A container with all volumes, which has written to each.
    #[track_caller]
    fn container(&self, labels: Value, removed: bool) -> (Container, Vec<Value>) {
        let plugin = self.daemon().plugin();
        let container = self.docker.create(plugin, &names(), labels, removed);
        (container, self.write())
    }

    /// Writes to each volume, and gives the LVs.
    fn write(&self) -> Vec<Value> {
        let plugin = self.daemon().plugin();
        let write = |name| {
            let at = Path::new(crate::support::site::MOUNT_DIR).join(name);
            fs::write(at.join("x"), stand_in::id()).unwrap();
            plugin.status(name)["lv"].clone()
        };
        names().map(write).into()
    }

    /// The ends of the leases with these LVs are as they should be after `verdict`.
    #[track_caller]
    fn expect(&self, case: &str, lvs: &[Value], verdict: &str) {
        let mut lasts = Vec::new();
        for (name, lv) in names().iter().zip(lvs) {
            let mut last = Value::Null;
            wait_until(|| {
                last = self.daemon().plugin().status(name)["last_lease"].clone();
                last["lv"] == *lv
            });
            lasts.push(last);
        }
        judge(case, &lasts, verdict);
    }
}

/// What became of leases of [`VOLUMES`], each, is what should after `verdict`.
#[track_caller]
fn judge(case: &str, lasts: &[Value], verdict: &str) {
    for ((_, publish), last) in VOLUMES.iter().zip(lasts) {
        assert_eq!(last["verdict"], verdict, "{case}, {publish}: {last}");
        let published = match *publish {
            "unless-failed" => verdict != "failure",
            "on-success" => verdict == "success",
            "always" => true,
            _ => false,
        };
        assert_eq!(
            last["published"].is_string(),
            published,
            "{case}, {publish}: {last}"
        );
    }
}

/// Makes [`VOLUMES`].
fn make_volumes(plugin: &Plugin) {
    for (name, publish) in VOLUMES {
        let options = json!({"save": name, "restore": name, "publish": publish});
        plugin.create(name, &options);
    }
}

fn verdicts() {
    let host = Host::new("");
    let (docker, plugin) = (&host.docker, host.daemon().plugin());
    let lie = || json!({"exitCode": "0"});
    for (case, labels, removed, code, verdict) in [
        ("exit 0", json!({}), false, 0, "success"),
        ("exit 1", json!({}), false, 1, "failure"),
        ("exit 0, --rm", json!({}), true, 0, "success"),
        ("exit 1, --rm", json!({}), true, 1, "failure"),
        ("killed", json!({}), true, 137, "failure"),
        (
            "out of memory, which its first process survives",
            json!({}),
            true,
            1000,
            "failure",
        ),
        ("out of memory", json!({}), true, 1137, "failure"),
        ("a label says that it succeeded", lie(), false, 1, "failure"),
        ("a label says so, and it is gone", lie(), true, 1, "failure"),
        ("a label says so, and it is so", lie(), false, 0, "success"),
        (
            "a label says that it failed",
            json!({"exitCode": "1"}),
            false,
            0,
            "success",
        ),
        (
            "labels of all kinds",
            json!({"container": "x", "driver": "x", "Type": "volume", "x": "\u{1b}[31m\"\n{", "long": "x".repeat(1 << 20)}),
            true,
            1,
            "failure",
        ),
        (
            "long labels",
            json!({"long": "x".repeat(5 << 20)}),
            false,
            1,
            "failure",
        ),
    ] {
        let (container, lvs) = host.container(labels, removed);
        docker.run(&container);
        docker.end(plugin, &container, code);
        host.expect(case, &lvs, verdict);
        docker.remove(&container);
    }
    for removed in [true, false] {
        let (container, lvs) = host.container(json!({}), removed);
        docker.fail_to_start(plugin, &container);
        host.expect("it cannot be started", &lvs, "failure");
    }
    // Started again, its last end counts, for the lease that it was in.
    let (container, lvs) = host.container(json!({}), false);
    docker.run(&container);
    docker.end(plugin, &container, 1);
    // Of two that end at once, either may be the last that is shown.
    host.expect("its first run", &lvs, "failure");
    docker.mount(plugin, &container);
    let second = host.write();
    docker.run(&container);
    docker.end(plugin, &container, 0);
    host.expect("its second run", &second, "success");
    assert_ne!(lvs, second);
    // docker cp: what is mounted for a container that does not run.
    docker.mount(plugin, &container);
    let copied = host.write();
    docker.unmount(plugin, &container);
    host.expect("docker cp", &copied, "unknown");
    // Of others it does not matter what they do.
    let (container, lvs) = host.container(json!({}), true);
    docker.run(&container);
    let other = stand_in::id();
    docker.volume_event("mount", "quiet", &other, "local");
    for action in ["start", "die", "destroy"] {
        docker.container_event(action, &other, &json!({}), &json!({"exitCode": "1"}));
        docker.container_event(
            "exec_die",
            &container.id,
            &json!({}),
            &json!({"exitCode": "1"}),
        );
    }
    docker.end(plugin, &container, 0);
    host.expect("beside others", &lvs, "success");
    let log = host.daemon().log();
    assert!(!log.contains('\u{1b}'), "{log:?}");
    // The clock is set back while it runs.
    let (container, lvs) = host.container(json!({}), true);
    docker.run(&container);
    docker.set_back(Duration::from_secs(3600));
    docker.end(plugin, &container, 1);
    host.expect("the clock was set back", &lvs, "failure");
}

/// Connections break, Docker and the daemon are started anew.
fn late() {
    let mut host = Host::new("");
    // While it is busy with a container it does not know yet how that ended; and no event will tell. It is asked about each volume
    // as it is first listened to, at most, and then because the leases have ended.
    let (container, lvs) = host.container(json!({}), false);
    let before = host.docker.asked().len();
    host.docker.unmount(host.daemon().plugin(), &container);
    wait_until(|| {
        let asked = host.docker.asked();
        let about = asked[before..]
            .iter()
            .filter(|path| path.contains(&container.id));
        about.count() >= 2 * lvs.len()
    });
    host.docker.has_failed_to_start(&container);
    host.expect("asked too early", &lvs, "failure");
    host.docker.remove(&container);
    // The connection breaks, and the container is gone before there is another.
    for (case, code, verdict) in [("exit 1", 1, "failure"), ("exit 0", 0, "success")] {
        let (container, lvs) = host.container(json!({}), true);
        host.docker.run(&container);
        wait_until(|| host.docker.is_followed());
        host.docker.cut();
        host.docker.end(host.daemon().plugin(), &container, code);
        host.expect(case, &lvs, verdict);
    }
    // Docker was started anew: of before it knows what there is, and no event.
    for (case, code, verdict) in [
        ("anew, exit 1", 1, "failure"),
        ("anew, exit 0", 0, "success"),
    ] {
        let (container, lvs) = host.container(json!({}), false);
        host.docker.run(&container);
        host.docker.forget_events();
        host.docker.end(host.daemon().plugin(), &container, code);
        host.docker.forget_events();
        host.expect(case, &lvs, verdict);
        host.docker.remove(&container);
    }
    // The daemon was; the container's label hides what events say.
    for (case, killed, labels, removed, code, verdict) in [
        ("restarted, exit 1", false, json!({}), true, 1, "failure"),
        ("killed, exit 1", true, json!({}), true, 1, "failure"),
        ("killed, exit 0", true, json!({}), true, 0, "success"),
        (
            "killed, and it lies",
            true,
            json!({"exitCode": "0"}),
            true,
            1,
            "failure",
        ),
    ] {
        let (container, lvs) = host.container(labels, removed);
        host.docker.run(&container);
        let daemon = host.daemon.take().unwrap();
        if killed {
            daemon.kill();
        } else {
            daemon.stop();
        }
        host.docker.forget_events();
        // Of one that is gone before the next life has asked for it nobody would know.
        let before = host.docker.asked().len();
        host.daemon = Some(host.site.serve());
        wait_until(|| {
            let asked = host.docker.asked();
            asked[before..]
                .iter()
                .any(|path| path.contains(&container.id))
        });
        host.docker.end(host.daemon().plugin(), &container, code);
        host.expect(case, &lvs, verdict);
    }
    // It dies behind Unmount's answer, with the end untold: the next one asks for it.
    let (container, lvs) = host.container(json!({}), false);
    host.docker.run(&container);
    host.docker.be(Mood::Silent);
    host.docker.end(host.daemon().plugin(), &container, 1);
    host.daemon.take().unwrap().kill();
    host.docker.forget_events();
    host.docker.be(Mood::Kind);
    host.daemon = Some(host.site.serve());
    // What is never published has no mark that the next life would find.
    host.expect("killed after the end", &lvs[..3], "failure");
}

fn several() {
    let host = Host::new("");
    let (docker, plugin) = (&host.docker, host.daemon().plugin());
    for (case, codes, verdict) in [
        ("both succeed", [0, 0], "success"),
        ("the first fails", [1, 0], "failure"),
        ("the last fails", [0, 1], "failure"),
    ] {
        let (first, _) = host.container(json!({}), true);
        docker.run(&first);
        let (second, lvs) = host.container(json!({}), true);
        docker.run(&second);
        docker.end(plugin, &first, codes[0]);
        docker.end(plugin, &second, codes[1]);
        host.expect(case, &lvs, verdict);
    }
    // The volumes are removed before the end is told.
    let (container, _) = host.container(json!({}), true);
    docker.run(&container);
    let before = host.site.list().len();
    docker.be(Mood::Silent);
    docker.unmount(plugin, &container);
    for name in names() {
        plugin.remove(name);
    }
    docker.be(Mood::Kind);
    docker.container_event("die", &container.id, &json!({}), &json!({"exitCode": "1"}));
    docker.remove(&container);
    // What was used and `publish=always` is published, under no volume's name.
    wait_until(|| host.site.list().len() == before - names().len() + 1);
}

/// What tells nothing: the end is unknown, and nothing waits for it but the lease.
fn nothing() {
    let host = Host::new("");
    let plugin = host.daemon().plugin();
    for mood in [Mood::Silent, Mood::Mad, Mood::Podman] {
        host.docker.be(mood);
        let (container, lvs) = host.container(json!({}), true);
        host.docker.run(&container);
        host.docker.end(plugin, &container, 1);
        host.expect(
            &format!("{mood:?}"),
            &lvs,
            if mood == Mood::Mad {
                "failure"
            } else {
                "unknown"
            },
        );
    }
    // Podman's client is not one of Docker's, and is not asked about.
    host.docker.be(Mood::Kind);
    let mount = |id: &str| {
        let lvs = names().map(|name| {
            plugin.mount(name, id);
            fs::write(
                Path::new(crate::support::site::MOUNT_DIR)
                    .join(name)
                    .join("x"),
                id,
            )
            .unwrap();
            plugin.status(name)["lv"].clone()
        });
        for name in names() {
            plugin.unmount(name, id);
        }
        lvs
    };
    let log = |host: &Host| {
        host.daemon()
            .log()
            .matches("Docker does not report")
            .count()
    };
    let said = log(&host);
    assert!(said > 0, "{}", host.daemon().log());
    let lvs = mount(CLIENT);
    host.expect("Podman's", &lvs, "unknown");
    drop(host);

    // Nobody there, and not to be asked.
    for settings in ["", "docker-socket = \"\"\n"] {
        let mut host = Host::new(settings);
        if settings.is_empty() {
            fs::remove_file(SOCKET).unwrap();
        }
        let (container, lvs) = host.container(json!({}), true);
        host.docker.run(&container);
        host.docker.end(host.daemon().plugin(), &container, 1);
        host.expect(settings, &lvs, "unknown");
        assert_eq!(host.docker.asked(), [""; 0]);

        // Nor is it missed by a daemon that finds a lease, which may be Podman's.
        let plugin = host.daemon().plugin().clone();
        for name in names() {
            plugin.mount(name, CLIENT);
        }
        let lvs = host.write();
        host.daemon.take().unwrap().kill();
        host.daemon = Some(host.site.serve());
        for name in names() {
            plugin.unmount(name, CLIENT);
        }
        host.expect(settings, &lvs, "unknown");
        assert_eq!(log(&host), 0, "{}", host.daemon().log());
    }
}
