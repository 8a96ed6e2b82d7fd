// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a host of a fleet does while others live, evict, and take it for lost: over the real index, images and devices.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use lvm_cache_friend::cache::names::LvName;
use lvm_cache_friend::cache::record::Role;
use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::fs::Content;
use lvm_cache_friend::storage::rbd::ceph::{Cluster, Pool};
use lvm_cache_friend::storage::rbd::index::{Change, Index};
use lvm_cache_friend::storage::rbd::{self, RbdStore, fleet};
use lvm_cache_friend::storage::{Store, StoreError};
use serde_json::{Value, json};

use super::{ENTRY, Namespace, another_host, lv, names, new, open};
use crate::support::ceph::{self, HOSTS, USER};
use crate::support::command::run;
use crate::support::daemon::{Daemon, Plugin, SOCKET};
use crate::support::site::{Kind, Site};
use crate::support::wait_until;

pub const TESTS: [(&str, fn()); 4] = [
    ("one_host_evicts", one_host_evicts),
    ("removed_as_it_is_cloned", removed_as_it_is_cloned),
    ("lost_and_back", lost_and_back),
    ("two_daemons", two_daemons),
];

fn entry(store: &RbdStore, name: &str) -> LvName {
    let lvs = store.list().unwrap().lvs;
    let base = lvs
        .iter()
        .find(|lv| Role::from_tags(&lv.tags) == Role::Base);
    let made = new(name, ENTRY, false);
    store.snapshot(&base.unwrap().name, &made).unwrap();
    lv(name)
}

fn pool() -> Pool {
    let cluster = Cluster::connect(USER, None).unwrap();
    cluster.pool("rbd", "caches").unwrap()
}

/// What `me` does once it has not heard of `lost` for five minutes.
fn declare_lost(lost: &str, me: &str) {
    let pool = pool();
    wait_until(|| {
        let keys = ceph::keys();
        let index = Index::parse(&keys).unwrap();
        let beat = fleet::hosts(&keys).remove(lost).unwrap();
        let write = fleet::declare_lost(&index, lost, &beat, me);
        pool.write(ceph::INDEX, &write).unwrap()
    });
}

/// One host at a time has the turn, evicts within it, and nothing after it.
fn one_host_evicts() {
    Namespace::fresh();
    let (one, two) = (open(), another_host());
    one.join().unwrap();
    two.join().unwrap();
    let (first, second) = (entry(&one, "first"), entry(&one, "second"));
    assert!(one.begin_evicting().unwrap());
    assert!(!two.begin_evicting().unwrap());
    assert!(one.evict(&first).unwrap());
    two.evict(&second).unwrap_err();
    one.end_evicting();
    assert!(two.begin_evicting().unwrap());
    one.evict(&second).unwrap_err();
    assert_eq!(names(&one), ["first", "second"], "marked, and not");
    one.remove(&first).unwrap();
    // As a host that was stopped in the middle of its turn would: another one has taken it over.
    let was = fleet::evictor(&ceph::keys());
    let (taken, _) = fleet::take_turn(was.as_ref(), HOSTS[0]);
    assert!(pool().write(ceph::INDEX, &taken).unwrap());
    match two.evict(&second) {
        Err(StoreError::Failed(text)) => assert!(text.contains("another host"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(names(&one), ["second"]);
    let fleet = two.fleet().unwrap().unwrap();
    assert_eq!(fleet.me, HOSTS[1]);
    let hosts: Vec<_> = fleet.hosts.iter().map(|h| (&*h.id, h.lost)).collect();
    assert_eq!(hosts, HOSTS.map(|id| (id, false)));
}

/// An entry that one host removes while another one clones it: either the copy is whole, or the entry was not there.
fn removed_as_it_is_cloned() {
    Namespace::fresh();
    let (one, two) = (open(), another_host());
    one.join().unwrap();
    two.join().unwrap();
    let mut copied = 0;
    for number in 0..12 {
        let of = entry(&one, &format!("e{number}"));
        let copy = new(&format!("c{number}"), ENTRY, number % 2 == 0);
        assert_eq!(names(&two), [of.as_str()]);
        let made = thread::scope(|scope| {
            let made = scope.spawn(|| two.snapshot(&of, &copy));
            one.remove(&of).unwrap();
            made.join().unwrap()
        });
        match made {
            Ok(_) => {
                copied += 1;
                let device = two.activate(&copy.name).unwrap();
                let held = lvm_cache_friend::fs::probe(&device).unwrap();
                assert_eq!(held, Content::Fs(FsType::Xfs), "{number}");
                two.remove(&copy.name).unwrap();
            }
            Err(StoreError::NotFound(name)) => assert_eq!(name, of),
            Err(error) => panic!("{number}: {error}"),
        }
        assert!(names(&two).is_empty());
    }
    println!("{copied} of 12 were cloned in time");
    two.clear_away().unwrap();
    assert_eq!(ceph::listed("image").len(), 1, "only the base's is left");
}

/// A host that was taken for lost changes nothing, and its next daemon knows what is gone; what it had mapped goes once nothing
/// uses it.
fn lost_and_back() {
    Namespace::fresh();
    let (one, two) = (open(), another_host());
    one.join().unwrap();
    two.join().unwrap();
    let kept = entry(&one, "kept");
    let tags = [
        "friend:snapshot",
        "friend:volume:v",
        "friend:lease:0123abcd",
    ];
    one.snapshot(&kept, &new("lease", &tags, true)).unwrap();
    let held = one.hold(&lv("lease")).unwrap();
    declare_lost(HOSTS[0], HOSTS[1]);
    let shut_out = |done: Result<(), StoreError>| match done {
        Err(StoreError::ShutOut { detail, .. }) => assert!(detail.contains("lost"), "{detail}"),
        other => panic!("{other:?}"),
    };
    shut_out(one.list().map(drop));
    shut_out(one.room().map(drop));
    shut_out(
        one.create(&new("x", ENTRY, false), Bytes::mib(16))
            .map(drop),
    );
    shut_out(
        one.snapshot(&lv("lease"), &new("x", ENTRY, false))
            .map(drop),
    );
    shut_out(one.change_tags(&kept, &["friend:pin".parse().unwrap()], &[]));
    shut_out(
        one.begin_evicting()
            .and_then(|_| one.evict(&kept))
            .map(drop),
    );
    one.end_evicting();
    // The other host has it to remove; the image stays as long as it is mapped.
    assert_eq!(names(&two), ["kept", "lease"]);
    // It does so on a machine where nothing is mapped.
    wait_until(|| {
        let index = Index::parse(&ceph::keys()).unwrap();
        let mut change = Change::default();
        change.volumes.insert(lv("lease"), None);
        pool().write(ceph::INDEX, &change.write(&index)).unwrap()
    });
    let not_yet = two.clear_away().unwrap_err();
    println!("{not_yet}");
    let is_lease = |image: &String| image.starts_with("lease");
    assert!(ceph::listed("image").keys().any(is_lease));

    drop(one);
    let one = open();
    assert!(one.join().unwrap());
    let [lost] = &one.lost().unwrap()[..] else {
        panic!("one volume was lost");
    };
    assert_eq!(lost.lv, lv("lease"));
    assert_eq!(lost.tags.len(), tags.len());
    one.forget_lost().unwrap();
    assert!(one.lost().unwrap().is_empty());
    assert_eq!(names(&one), ["kept"]);
    // In use, as by a container that goes on.
    assert!(ceph::mapped().iter().any(is_lease));
    drop(held);
    wait_until(|| !ceph::mapped().iter().any(is_lease));
    wait_until(|| !ceph::listed("image").keys().any(is_lease));
    one.snapshot(&kept, &new("next", &["friend:snapshot"], true))
        .unwrap();
    assert!(Path::new(&one.activate(&lv("next")).unwrap()).exists());
}

/// Two daemons, each a host's: what one publishes the other restores, views tell them apart, and one that was killed and taken for
/// lost has its volumes again, and says what is gone.
fn two_daemons() {
    let site = Site::new(Kind::Rbd);
    let one = site.serve();
    let me = rbd::machine_id().unwrap();
    let (config, socket) = ["two.toml", "two.sock"]
        .map(|name| site.dir.path().join(name))
        .into();
    let text = fs::read_to_string(&site.config).unwrap();
    let text = ceph::config_of("two", &text);
    let mounts = site.dir.path().join("two");
    let settings = format!("socket = {socket:?}\nmount-dir = {mounts:?}\n");
    fs::write(&config, settings + &text).unwrap();
    let serve = || Daemon::start_with(&config, &socket, &[("RUST_LOG", "debug")]);
    let two = serve();

    let published = |plugin: &Plugin, text: &str| {
        plugin.create("job", &json!({"restore": "linux", "save": "linux"}));
        let at = plugin.mount("job", "test");
        fs::write(at.join("text"), text).unwrap();
        plugin.unmount("job", "test");
        let mut entry = Value::Null;
        wait_until(|| {
            entry = plugin.status("job")["last_lease"]["published"].clone();
            entry.is_string()
        });
        entry.as_str().unwrap().to_owned()
    };
    let entry = published(one.plugin(), "of one");
    // The other one hears of it by itself.
    two.plugin()
        .create("work", &json!({"restore": "linux", "save": "linux"}));
    let mut at = PathBuf::new();
    wait_until(|| {
        at = two.plugin().mount("work", "test");
        let is_so = two.plugin().status("work")["from"] == entry.as_str();
        if !is_so {
            two.plugin().unmount("work", "test");
        }
        is_so
    });
    assert_eq!(fs::read_to_string(at.join("text")).unwrap(), "of one");
    fs::write(at.join("text"), "of two").unwrap();

    let list = |arguments: &[&str]| -> Vec<Value> {
        let all = [&["list", "--json"], arguments].concat();
        serde_json::from_str(&site.done(&all)).unwrap()
    };
    let volumes = |rows: &[Value]| -> Vec<(String, String)> {
        let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
        let of = rows.iter().filter(|row| row["kind"] == "volume");
        of.map(|row| (text(row, "volume"), text(row, "host")))
            .collect()
    };
    let (on_one, on_two) = (("job".into(), me.clone()), ("work".into(), "two".into()));
    assert_eq!(volumes(&list(&[])), std::slice::from_ref(&on_one));
    assert_eq!(volumes(&list(&["--all-hosts"])), [on_one, on_two.clone()]);
    let of_two = list(&["--host", "tw"]);
    assert_eq!(volumes(&of_two), [on_two]);
    assert_eq!(of_two.len(), 1, "{of_two:?}");
    assert!(
        list(&["--host", &me])
            .iter()
            .any(|row| row["name"] == entry.as_str())
    );
    assert_eq!(site.outcome(&["list", "--host", "none"]).status, 3);
    let stats: Value = serde_json::from_str(&site.done(&["stats", "--json"])).unwrap();
    assert_eq!(stats["host"], me.as_str());
    let shown = |path: &str| {
        let url = format!("http://plugin{path}");
        run("curl", ["-s", "--unix-socket", SOCKET, &url])
    };
    let metrics = shown("/metrics");
    assert!(metrics.contains("hosts{state=\"joined\"} 2"), "{metrics}");
    let page = shown("/");
    assert!(page.contains("2 hosts share the store"), "{page}");

    two.kill();
    declare_lost("two", &me);
    // It removes what it has now, as far as this is not in use: here that is one machine.
    let two = serve();
    assert!(
        two.log().contains("another host took this one for lost"),
        "{}",
        two.log()
    );
    let last = &two.plugin().status("work")["last_lease"];
    assert!(last["why"].as_str().unwrap().contains("lost"), "{last}");
    assert_eq!(last["published"], Value::Null);
    // As the client does that had it.
    two.plugin().unmount("work", "test");
    let at = two.plugin().mount("work", "test");
    assert_eq!(fs::read_to_string(at.join("text")).unwrap(), "of one");
    two.plugin().unmount("work", "test");
    wait_until(|| two.plugin().status("work")["last_lease"]["restored"] == "exact");
    for (daemon, volume) in [(&one, "job"), (&two, "work")] {
        daemon.plugin().remove(volume);
    }
    wait_until(|| {
        let left = ceph::listed("volume");
        let doomed = |volume: &Value| volume["tags"].to_string().contains("doomed");
        !left.values().any(doomed)
    });
    assert!(volumes(&list(&["--all-hosts"])).is_empty());
    for daemon in [one, two] {
        daemon.stop();
    }
}
