// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a store that is busy, or fails, or shows damage must not lose of a lease.

use std::fs::File;
use std::sync::mpsc;
use std::thread;

use lvm_cache_friend::plugin::MAX_WORK;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use crate::damage::Written;
use crate::harness::{Test, Tier, test};
use crate::support::command::outcome;
use crate::support::content::{self, Content};
use crate::support::daemon::Plugin;
use crate::support::site::{Broken, Kind, Site, Stuck, with_each_store};
use crate::support::wait_until;

pub fn tests() -> Vec<Test> {
    let mut tests = with_each_store(
        "leases",
        &[
            ("published_once_the_store_serves", once_it_serves),
            ("none_is_published_for_another", for_another),
            ("kept_volumes_are_not_formatted_again", not_formatted),
        ],
    );
    let told = || failure_is_told(Kind::Reflink);
    tests.push(test(
        Tier::Reflink,
        "leases::a_failure_is_told_at_once",
        told,
    ));
    tests
}

/// A store that serves nothing, until this is dropped.
enum Unwilling<'a> {
    /// It refuses, at once.
    Broken { _until: Broken<'a> },
    /// Its lock is somebody else's, for longer than a request waits.
    Locked { _until: Flock<File> },
}

impl<'a> Unwilling<'a> {
    fn new(site: &'a Site) -> Self {
        match site.kind {
            Kind::Reflink => Self::Broken {
                _until: site.broken(),
            },
            Kind::Lvm => {
                let path = format!("/run/lock/lvm/V_{}", site.store());
                let file = File::create(path).unwrap();
                let lock = Flock::lock(file, FlockArg::LockExclusive);
                Self::Locked {
                    _until: lock.map_err(|(_, error)| error).unwrap(),
                }
            }
        }
    }
}

/// What a new volume restores of these tags.
fn restored(plugin: &Plugin, tags: &str, number: u64) {
    plugin.create("reader", &json!({"restore": tags}));
    let at = plugin.mount("reader", "x");
    assert_eq!(content::read(&at), Content::Whole(number), "{tags}");
    plugin.unmount("reader", "x");
    plugin.remove("reader");
}

/// The end of a lease meets a store that refuses everything: in one life of the daemon, and over its end.
fn once_it_serves(kind: Kind) {
    let site = Site::new(kind);
    let mut daemon = site.serve();
    let entries = |count| {
        let is = |row: &&Value| row["kind"] == "entry";
        wait_until(|| site.list().iter().filter(is).count() == count);
    };
    let volumes = [("fresh", "fresh"), ("keep", "kept")];
    for (round, restarted) in [(1, false), (2, true)] {
        let number = round as u64;
        for (reuse, name) in volumes {
            let plugin = daemon.plugin();
            plugin.create(name, &json!({"save": name, "reuse": reuse}));
            content::write(&plugin.mount(name, "x"), number);
        }
        // That it is in use is noted behind Mount's answer; until then no other life of the daemon knows.
        let leased = |row: &&Value| row["tags"].to_string().contains("friend:lease");
        wait_until(|| site.list().iter().filter(leased).count() == 2);
        let broken = Unwilling::new(&site);
        for (_, name) in volumes {
            daemon.plugin().unmount(name, "x");
        }
        wait_until(|| daemon.log().matches("waits for the store").count() == 2 * round);
        if restarted {
            daemon.stop();
            drop(broken);
            daemon = site.serve();
        } else {
            drop(broken);
        }
        entries(2 * round);
        for (_, name) in volumes {
            restored(daemon.plugin(), name, number);
        }
    }
}

/// A kept volume is used again, by a job that fails, before its last lease could be published.
fn for_another(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("kept", &json!({"save": "a", "reuse": "keep"}));
    content::write(&plugin.mount("kept", "x"), 1);
    let broken = site.broken();
    plugin.unmount("kept", "x");
    wait_until(|| daemon.log().contains("waits for the store"));
    content::write(&plugin.mount("kept", "x"), 2);
    let ended = json!({"Container": "c", "Volumes": ["kept"], "ExitCode": 1});
    plugin.ok("Friend.Ended", &ended);
    plugin.unmount("kept", "x");
    drop(broken);
    wait_until(|| daemon.log().matches("lease ended").count() == 2);
    let rows = site.list();
    assert!(rows.iter().all(|row| row["kind"] != "entry"), "{rows:?}");
}

/// What a kept volume held is nowhere else: where its file system is not recognized, it is for people to rescue.
fn not_formatted(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("kept", &json!({"fs": "ext4", "reuse": "keep"}));
    content::write(&plugin.mount("kept", "x"), 1);
    plugin.unmount("kept", "x");
    daemon.stop();
    let rows = site.list();
    let kept = rows.iter().find(|row| row["kind"] == "volume");
    let lv = kept.unwrap()["name"].as_str().unwrap();
    Written::new(&site, lv).hit(0, 4096);

    let daemon = site.serve();
    let plugin = daemon.plugin();
    let said = plugin.refused("VolumeDriver.Mount", &json!({"Name": "kept", "ID": "x"}));
    assert!(said.contains(lv) && said.contains("e2fsck"), "{said}");
    daemon.stop();
    let written = Written::new(&site, lv);
    let device = written.path.to_str().unwrap();
    let mended = outcome("e2fsck", ["-f", "-y", "-b", "32768", "-B", "4096", device]);
    assert!(mended.status <= 1, "{mended:?}");
    drop(written);

    let daemon = site.serve();
    let at = daemon.plugin().mount("kept", "x");
    assert_eq!(content::read(&at), Content::Whole(1));
    daemon.plugin().unmount("kept", "x");
}

/// Whatever the store and all the places for requests are busy with.
fn failure_is_told(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("v", &json!({"save": "v"}));
    content::write(&plugin.mount("v", "x"), 1);
    let of = |more: Value| {
        let mut body = json!({"Container": "c", "Volumes": ["v"]});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    plugin.ok("Friend.Started", &of(json!({"Pid": std::process::id()})));
    let runs = || plugin.status("v")["containers"] == json!(["c"]);
    assert!(runs());
    thread::scope(|scope| {
        let stuck = Stuck::new(&site, &daemon);
        let (answered, answers) = mpsc::channel();
        for n in 0..=MAX_WORK {
            let answered = answered.clone();
            let body = json!({"Name": format!("w{n}")});
            scope.spawn(move || answered.send(plugin.call("VolumeDriver.Create", &body).0));
        }
        assert_eq!(answers.recv(), Ok(503), "all places are taken");
        scope.spawn(|| plugin.call("Friend.Ended", &of(json!({"ExitCode": 1}))));
        wait_until(|| !runs());
        drop(stuck);
    });
    plugin.unmount("v", "x");
    wait_until(|| plugin.status("v")["last_lease"]["why"] == "the work failed");
}
