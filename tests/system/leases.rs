// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a store that is busy, or fails, or shows damage must not lose of a lease.

use std::fs::{self, File};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use lvm_cache_friend::plugin::MAX_WORK;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use crate::damage::Written;
use crate::harness::{Test, Tier, test};
use crate::support::census::Held;
use crate::support::command::outcome;
use crate::support::content::{self, Content};
use crate::support::daemon::Plugin;
use crate::support::site::{Broken, Kind, MOUNT_DIR, Site, Stuck, with_each_store};
use crate::support::wait_until;

pub fn tests() -> Vec<Test> {
    let mut tests = with_each_store(
        "leases",
        &[
            ("published_once_the_store_serves", once_it_serves),
            ("none_is_published_for_another", for_another),
            ("kept_volumes_are_not_formatted_again", not_formatted),
            ("known_though_the_store_was_not_told", not_told),
            ("a_volume_in_use_is_not_removed", in_use),
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
            Kind::Reflink | Kind::Rbd => Self::Broken {
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

/// The store serves nothing from the Mount on, and the daemon dies before it has told it of two leases, the work in one of which
/// has failed.
fn not_told(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let names = ["good", "bad"];
    for name in names {
        plugin.create(name, &json!({"save": name}));
    }
    let broken = Unwilling::new(&site);
    for name in names {
        content::write(&plugin.mount(name, "x"), 1);
    }
    let ended = json!({"Container": "c", "Volumes": ["bad"], "ExitCode": 1});
    plugin.ok("Friend.Ended", &ended);
    let places = names.map(|name| Path::new(MOUNT_DIR).join(name));
    for name in names {
        plugin.unmount(name, "x");
    }
    wait_until(|| places.iter().all(|at| !at.exists()));
    daemon.kill();
    drop(broken);

    let daemon = site.serve();
    let entries = || {
        let rows = site.list();
        let entries = rows.iter().filter(|row| row["kind"] == "entry");
        entries
            .map(|row| row["tags"].to_string())
            .collect::<Vec<_>>()
    };
    wait_until(|| daemon.log().matches("lease ended").count() == 2);
    let entries = entries();
    assert!(
        entries.len() == 1 && entries[0].contains("good"),
        "{entries:?}"
    );
    restored(daemon.plugin(), "good", 1);
    let pending = format!("{MOUNT_DIR}.pending");
    wait_until(|| fs::read_dir(&pending).unwrap().count() == 0);
}

fn in_use(kind: Kind) {
    let site = Site::new(kind);
    let mut daemon = site.serve();
    let plugin = daemon.plugin();
    let refused = |plugin: &Plugin, name: &str, by: &str| {
        let said = plugin.refused("VolumeDriver.Remove", &json!({"Name": name}));
        assert!(said.contains("in use") && said.contains(by), "{by}: {said}");
    };
    plugin.create("v1", &json!({}));
    let at = plugin.mount("v1", "x");
    content::write(&at, 1);
    refused(plugin, "v1", "a client that has mounted it");
    // What a container is to the kernel: it has the mount somewhere else.
    let container = Held::new(&site, &at);
    refused(plugin, "v1", "process ");
    let of = json!({"Container": "c1", "Volumes": ["v1"], "Pid": std::process::id()});
    plugin.ok("Friend.Started", &of);
    refused(plugin, "v1", "container c1");
    let command = site.outcome(&["remove", "v1"]);
    assert!(
        command.status == 1 && command.stderr.contains("c1"),
        "{command:?}"
    );
    assert_eq!(content::read(&at), Content::Whole(1));
    // Killed with its client, so that neither its end nor an Unmount is reported.
    drop(container);
    plugin.remove("v1");
    assert!(!at.exists());

    // Of an earlier life's clients only the containers are known, by the kernel.
    plugin.create("v2", &json!({}));
    let at = plugin.mount("v2", "x");
    let container = Held::new(&site, &at);
    daemon.stop();
    daemon = site.serve();
    let plugin = daemon.plugin();
    refused(plugin, "v2", "process ");
    drop(container);
    plugin.remove("v2");

    // A job volume has a mount of itself in it, which is no container's use.
    plugin.create("job", &json!({"type": "job"}));
    let at = plugin.mount("job", "x");
    refused(plugin, "job", "a client that has mounted it");
    let container = Held::new(&site, &at);
    let of = json!({"Container": "c2", "Volumes": ["job"], "Pid": std::process::id()});
    plugin.ok("Friend.Started", &of);
    refused(plugin, "job", "container c2");
    drop(container);
    plugin.remove("job");

    // By force, for people; it is published as at any end.
    plugin.create("v3", &json!({"save": "forced"}));
    let at = plugin.mount("v3", "x");
    content::write(&at, 3);
    site.done(&["remove", "--force", "v3"]);
    assert!(!at.exists());
    wait_until(|| daemon.log().contains("tags=forced"));
    restored(plugin, "forced", 3);
}
