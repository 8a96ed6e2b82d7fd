// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an administrator does with a store on Ceph, and a daemon whose cluster is lost for a while.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::support::census::Known;
use crate::support::ceph::{self, Away, Part, USER};
use crate::support::command::run;
use crate::support::content::{self, Content};
use crate::support::daemon::friend_outcome;
use crate::support::site::{Kind, Site};
use crate::support::wait_until;

pub const TESTS: [(&str, fn()); 5] = [
    ("commands", commands),
    ("rights", rights),
    ("without_the_osd", || without(Loss::Osd)),
    ("without_the_monitor", || without(Loss::Monitor)),
    ("cut_off_from_the_cluster", || without(Loss::Everything)),
];

/// `init --rbd` makes what is missing and says so, once; and refuses what will not do by name.
fn commands() {
    let site = Site::bare(Kind::Rbd);
    let said = site.init();
    assert!(
        said.contains("made the base rbd/caches/friend-") && said.contains("wrote "),
        "{said}"
    );
    let config = fs::read_to_string(&site.config).unwrap();
    assert!(
        config.contains("[rbd]\npool = \"rbd/caches\"\nuser = \"cache\"\n"),
        "{config}"
    );
    let keyring = format!("/etc/ceph/ceph.client.{USER}.keyring");
    let name = format!("client.{USER}");
    let key = run("ceph-authtool", ["--print-key", "--name", &name, &keyring]);
    assert!(!config.contains(key.trim()));
    let before = ceph::keys();
    let said = site.init();
    assert_eq!(said, "nothing to do: Ceph pool rbd/caches is ready\n");
    assert_eq!(ceph::keys(), before);
    let [base] = &site.list()[..] else {
        panic!("{:?}", site.list());
    };
    assert_eq!(base["kind"], "base");

    let other = site.dir.path().join("other.toml");
    let init = |arguments: &[&str]| {
        let sized = ["init", "--base-size", "320M", "--rbd"];
        friend_outcome(&other, &[&sized[..], arguments].concat())
    };
    for (arguments, words) in [
        (
            &["none", "--ceph-user", "admin"][..],
            "ceph osd pool create none",
        ),
        (
            &["rbd/others", "--ceph-user", USER],
            "ceph auth caps client.cache mon 'profile rbd' osd 'profile rbd pool=rbd namespace=others'",
        ),
        (&["rbd", "--ceph-user", "nobody"], "rbd --id nobody ls rbd"),
        (&["rbd", "--ceph-conf", "/none.conf"], "/none.conf"),
    ] {
        let ended = init(arguments);
        assert!(
            ended.status == 1 && ended.stderr.contains(words),
            "{arguments:?}: {ended:?}"
        );
        assert!(!other.exists(), "{arguments:?}");
    }
    // The administrator may make a namespace.
    let ended = init(&["rbd/made"]);
    assert!(
        ended.status == 0 && ended.stdout.contains("made namespace rbd/made\n"),
        "{ended:?}"
    );
    assert!(run("rbd", ["namespace", "ls", "rbd"]).contains("made"));
    assert!(
        checked(&site)["finding"]
            .to_string()
            .contains("client.cache")
    );
}

/// What `doctor` says of the cluster.
fn checked(site: &Site) -> Value {
    let said: Value = serde_json::from_str(&site.outcome(&["doctor", "--json"]).stdout).unwrap();
    let findings = said["findings"].as_array().unwrap();
    let store = findings.iter().find(|found| found["check"] == "store");
    assert_eq!(store.unwrap()["state"], "ok", "{said}");
    let ceph = findings.iter().find(|found| found["check"] == "ceph");
    ceph.unwrap_or_else(|| panic!("{said}")).clone()
}

/// A user who may only read is told so, with the command that helps.
fn rights() {
    let site = Site::new(Kind::Rbd);
    assert_eq!(checked(&site)["state"], "ok");
    let caps = |osd: &str| {
        let user = format!("client.{USER}");
        let osd = format!("{osd} pool=rbd namespace=caches");
        run(
            "ceph",
            ["auth", "caps", &user, "mon", "profile rbd", "osd", &osd],
        );
    };
    caps("profile rbd-read-only");
    let found = checked(&site);
    caps("profile rbd");
    assert_eq!(found["state"], "wrong", "{found}");
    let fix = found["fix"].as_str().unwrap();
    assert!(fix.contains("ceph auth caps client.cache"), "{found}");
    assert_eq!(checked(&site)["state"], "ok");
}

/// What is lost for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// `kill -9` of the OSD.
    Osd,
    /// `kill -9` of the monitor.
    Monitor,
    /// Nothing of the cluster answers any more.
    Everything,
}

/// A job that writes and reads on, and waits as long as its disk does.
struct Writer<'a> {
    at: &'a Path,
    rounds: AtomicU64,
    stop: AtomicBool,
}

impl Writer<'_> {
    fn work(&self) -> io::Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let round = self.rounds.load(Ordering::Relaxed) + 1;
            let mut file = File::create(self.at.join("round"))?;
            file.write_all(format!("{round}\n").repeat(1000).as_bytes())?;
            file.sync_all()?;
            self.rounds.store(round, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Ends with its next round.
    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn has_gone_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_until(|| self.rounds.load(Ordering::Relaxed) > before + 1);
    }
}

/// A part of the cluster that is away, until this is dropped.
enum Lost {
    Killed(Part),
    Silent { _until: Away },
}

impl Lost {
    fn new(loss: Loss) -> Self {
        let part = match loss {
            Loss::Osd => Part::Osd,
            Loss::Monitor => Part::Monitor,
            Loss::Everything => {
                return Self::Silent {
                    _until: Away::new(),
                };
            }
        };
        part.kill();
        Self::Killed(part)
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        if let Self::Killed(part) = self {
            part.start();
        }
    }
}

/// Stops a writer, also where the test has failed.
struct Stopped<'a>(&'a Writer<'a>);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Containers wait, and go on; nothing that is asked of the daemon waits without an end, nothing is lost.
fn without(loss: Loss) {
    let site = Site::new(Kind::Rbd);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    for (name, number) in [("busy", 1), ("ends", 2)] {
        plugin.create(name, &json!({"save": name}));
        content::write(&plugin.mount(name, "x"), number);
    }
    plugin.create("idle", &json!({}));
    let at = plugin.mount("busy", "y");
    let writer = Writer {
        at: &at,
        rounds: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        let job = scope.spawn(|| writer.work());
        let stopped = Stopped(&writer);
        writer.has_gone_on();
        let lost = Lost::new(loss);
        let answers = || {
            let mut names = plugin.names();
            names.sort();
            assert_eq!(names[..3], ["busy", "ends", "idle"]);
            assert_eq!(plugin.status("busy")["state"], "mounted");
        };
        answers();
        plugin.unmount("ends", "x");
        // Refused, in time for a client to read it.
        let create = json!({"Name": "late", "Opts": {"restore": "linux"}});
        let said = plugin.refused("VolumeDriver.Create", &create);
        println!("{loss:?}: {said}");
        assert!(said.contains("rbd/caches"), "{said}");
        let scratch = json!({"on-error": "scratch", "size": "64M"});
        plugin.create("scratch", &scratch);
        let at = plugin.mount("scratch", "x");
        let kind = run("stat", ["-f".as_ref(), "-c%T".as_ref(), at.as_os_str()]);
        assert_eq!(kind, "tmpfs\n");
        plugin.unmount("scratch", "x");
        answers();
        if loss == Loss::Monitor {
            writer.has_gone_on();
        }
        drop(lost);
        writer.has_gone_on();
        drop(stopped);
        job.join().unwrap().unwrap();
    });
    for id in ["x", "y"] {
        plugin.unmount("busy", id);
    }
    plugin.create("late", &json!({"restore": "ends"}));
    for name in ["late", "scratch"] {
        plugin.remove(name);
    }
    let census = site.settled(&["busy", "ends", "idle"].map(Known::idle));
    let mut found: Vec<_> = census
        .entries()
        .iter()
        .map(|entry| {
            let read = |at: &Path| {
                // What the writer wrote beside it, whole.
                let rounds = fs::read_to_string(at.join("round")).unwrap_or_default();
                let last = writer.rounds.load(Ordering::Relaxed).to_string();
                assert!(rounds.lines().all(|round| round == last), "{last}");
                content::try_read(at)
            };
            census.read(entry, read).unwrap().unwrap()
        })
        .collect();
    found.sort_by_key(|content| format!("{content:?}"));
    assert_eq!(found, [Content::Whole(1), Content::Whole(2)]);
    daemon.stop();
}
