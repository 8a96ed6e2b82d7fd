// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The store on Ceph: one monitor, one OSD and a kernel's client in a guest, with cephx and a user who may use one namespace.

mod daemon;
mod hosts;
mod power;
mod shut_out;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use lvm_cache_friend::cache::names::LvName;
use lvm_cache_friend::cache::record::Role;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::storage::rbd::{self, Place, RbdStore};
use lvm_cache_friend::storage::{NewLv, Store, StoreError};
use serde_json::json;

use crate::harness::{Group, Test, Tier, test};
use crate::store::{self, Ground};
use crate::support::ceph::{self, HOSTS, RUN, place};
use crate::support::command::{outcome, run};
use crate::support::wait_until;

/// All of them.
pub fn tests() -> Vec<Test> {
    let tier = Tier::Guest(Group::Ceph);
    let mut tests = store::tests(tier, "rbd", || Box::new(Namespace::fresh()));
    let own: [(&str, fn()); 9] = [
        ("prepared_once", prepared_once),
        ("pinned_meanwhile", pinned_meanwhile),
        ("refusals", refusals),
        ("two_hosts", two_hosts),
        ("one_id_twice", one_id_twice),
        ("nothing_is_left", nothing_is_left),
        ("half_made", half_made),
        ("deep", deep),
        ("many_snapshots_of_one_image", many_snapshots),
    ];
    let all = (own.into_iter().chain(hosts::TESTS))
        .chain(daemon::TESTS)
        .chain(shut_out::TESTS);
    tests.extend(all.map(|(name, body)| test(tier, format!("rbd::{name}"), body)));
    tests.extend(power::tests());
    tests
}

const HOST: &str = HOSTS[0];

/// The size of the base.
const BASE: Bytes = Bytes::mib(320);

/// The namespace that the user has, with a base and nothing else.
struct Namespace;

impl Namespace {
    fn fresh() -> Self {
        ceph::clear(Some(BASE));
        rbd::init(&place(), HOST, Path::new(RUN), BASE, &mut |_| {}).unwrap();
        Self
    }
}

impl Ground for Namespace {
    fn open(&self) -> Arc<dyn Store> {
        Arc::new(RbdStore::open(&place(), HOST, Path::new(RUN)).unwrap())
    }

    /// What a test fills it with is written by an emulated OSD, at some 10 MB/s. A tenth must do for what is written until Ceph has
    /// counted it, seconds later.
    fn open_small(&self) -> Arc<dyn Store> {
        ceph::set_quota(Bytes::mib(1024));
        self.open()
    }

    /// Images of the administrator's in the same namespace, one with a name like ours.
    fn others(&self) -> Box<dyn Fn() -> String + '_> {
        let rbd = |arguments: &[&str]| run("rbd", arguments);
        for image in ["rbd/caches/foreign", "rbd/caches/friend-foreign~1"] {
            if !run("rbd", ["ls", "rbd/caches"]).contains(image.rsplit('/').next().unwrap()) {
                rbd(&["create", "--size", "16M", image]);
                rbd(&["snap", "create", &format!("{image}@s")]);
            }
        }
        Box::new(move || {
            ["rbd/caches/foreign", "rbd/caches/friend-foreign~1"]
                .map(|image| rbd(&["info", image]) + &rbd(&["snap", "ls", image]))
                .concat()
        })
    }
}

/// Another host of the fleet: a store with an identity and runtime files of its own.
fn another_host() -> RbdStore {
    RbdStore::open(&place(), HOSTS[1], Path::new("/run/of-another-host")).unwrap()
}

fn open() -> RbdStore {
    RbdStore::open(&place(), HOST, Path::new(RUN)).unwrap()
}

fn lv(name: &str) -> LvName {
    name.parse().unwrap()
}

fn new(name: &str, tags: &[&str], active: bool) -> NewLv {
    NewLv {
        name: lv(name),
        tags: tags.iter().map(|tag| tag.parse().unwrap()).collect(),
        active,
    }
}

/// The tags of an entry.
const ENTRY: &[&str] = &["friend:snapshot", "friend:cache:a"];

/// Writes a block of this byte, at a place of its own.
fn write(device: &Path, byte: u8) -> io::Result<()> {
    let device = File::options().write(true).open(device)?;
    device.write_all_at(&[byte; 4096], u64::from(byte) << 12)?;
    device.sync_all()
}

/// Sees that this block is there.
#[track_caller]
fn reads(device: &Path, byte: u8) {
    let mut found = [0; 4096];
    let device = File::open(device).unwrap();
    device
        .read_exact_at(&mut found, u64::from(byte) << 12)
        .unwrap();
    assert_eq!(found, [byte; 4096]);
}

fn names(store: &RbdStore) -> Vec<String> {
    let lvs = store.list().unwrap().lvs;
    let named = lvs
        .iter()
        .filter(|lv| Role::from_tags(&lv.tags) != Role::Base);
    named.map(|lv| lv.name.to_string()).collect()
}

/// What one host has chosen to evict, another one pins.
fn pinned_meanwhile() {
    let _namespace = Namespace::fresh();
    let (store, other) = (open(), another_host());
    let entry = new("entry", ENTRY, false);
    store.create(&entry, Bytes::mib(16)).unwrap();
    assert!(store.begin_evicting().unwrap());
    let pin = ["friend:pin".parse().unwrap()];
    other.change_tags(&lv("entry"), &pin, &[]).unwrap();
    let refused = store.evict(&lv("entry"));
    assert!(matches!(refused, Err(StoreError::Busy(_))), "{refused:?}");
    other.change_tags(&lv("entry"), &[], &pin).unwrap();
    assert!(store.evict(&lv("entry")).unwrap());
    store.end_evicting();
}

/// The images and snapshots that are in the pool, as Ceph's tool says. It fails where one is removed as it lists them, which a host does
/// behind a test's back.
fn in_the_pool() -> String {
    let mut said = String::new();
    wait_until(|| {
        let listed = outcome("rbd", ["--id", "cache", "ls", "-l", "rbd/caches"]);
        said = listed.stdout;
        listed.status == 0
    });
    said
}

/// What one host publishes the other restores; what each has for itself the other does not see; and neither loses a tag of the other's.
fn two_hosts() {
    Namespace::fresh();
    let (one, two) = (open(), another_host());
    assert!(!one.join().unwrap());
    assert!(!two.join().unwrap());
    let base = one.list().unwrap().lvs[0].name.clone();
    let lease = ["friend:snapshot", "friend:volume:v"];
    let device = one
        .snapshot(&base, &new("lease", &lease, true))
        .unwrap()
        .unwrap();
    File::options()
        .write(true)
        .open(&device)
        .unwrap()
        .write_all_at(b"of one", 1 << 20)
        .unwrap();
    assert!(names(&two).is_empty());
    for outcome in [
        two.remove(&lv("lease")),
        two.change_tags(&lv("lease"), &["friend:doomed".parse().unwrap()], &[]),
    ] {
        assert!(
            matches!(outcome, Ok(()) | Err(StoreError::NotFound(_))),
            "{outcome:?}"
        );
    }
    assert_eq!(names(&one), ["lease"]);
    one.snapshot(&lv("lease"), &new("entry", ENTRY, false))
        .unwrap();
    assert_eq!(names(&two), ["entry"]);
    // The host that made it has its lease over, and both restore it and write apart.
    one.remove(&lv("lease")).unwrap();
    let read = |path: &Path| {
        let mut text = [0; 6];
        File::open(path)
            .unwrap()
            .read_exact_at(&mut text, 1 << 20)
            .unwrap();
        text
    };
    let on_two = two
        .snapshot(&lv("entry"), &new("copy", &lease, true))
        .unwrap()
        .unwrap();
    let on_one = one
        .snapshot(&lv("entry"), &new("other", &lease, true))
        .unwrap()
        .unwrap();
    File::options()
        .write(true)
        .open(&on_two)
        .unwrap()
        .write_all_at(b"of two", 1 << 20)
        .unwrap();
    assert_eq!((&read(&on_one), &read(&on_two)), (b"of one", b"of two"));
    two.snapshot(&lv("copy"), &new("newer", ENTRY, false))
        .unwrap();
    let of = |name: &str| {
        one.list()
            .unwrap()
            .lvs
            .into_iter()
            .find(|found| found.name.as_str() == name)
            .unwrap()
    };
    assert!(of("newer").seq > of("entry").seq);
    thread::scope(|scope| {
        for (store, name) in [(&one, "one"), (&two, "two")] {
            scope.spawn(move || {
                for number in 0..10 {
                    let tag = format!("friend:note:{name}-{number}").parse().unwrap();
                    store.change_tags(&lv("entry"), &[tag], &[]).unwrap();
                }
            });
        }
    });
    assert_eq!(of("entry").tags.len(), 2 + 20);
    // The host that dooms an entry removes it.
    two.change_tags(&lv("entry"), &["friend:doomed".parse().unwrap()], &[])
        .unwrap();
    assert_eq!(names(&one), ["newer", "other"]);
    two.remove(&lv("entry")).unwrap();
    for (store, name) in [(&two, "copy"), (&one, "other"), (&one, "newer")] {
        store.remove(&lv(name)).unwrap();
    }
    wait_until(|| in_the_pool().lines().count() == 2 + 1);
}

/// Another machine's daemon does not join with an id that a daemon uses; once that is silent, it does.
fn one_id_twice() {
    Namespace::fresh();
    let one = open();
    one.join().unwrap();
    let clone = RbdStore::open(&place(), HOST, Path::new("/run/of-a-clone")).unwrap();
    match clone.join() {
        Err(StoreError::ShutOut { detail, .. }) => {
            assert!(detail.contains("/etc/machine-id"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
    one.create(&new("one", &["friend:snapshot"], false), Bytes::mib(16))
        .unwrap();
    drop(one);
    assert!(!clone.join().unwrap());
    clone.remove(&lv("one")).unwrap();
}

/// Images that outlive their volumes go with the last that needs them.
fn nothing_is_left() {
    Namespace::fresh();
    let store = open();
    let base = store.list().unwrap().lvs[0].name.clone();
    store
        .snapshot(&base, &new("v0", &["friend:snapshot"], true))
        .unwrap();
    for number in 0..3 {
        let (lease, entry) = (format!("v{number}"), format!("e{number}"));
        store
            .snapshot(&lv(&lease), &new(&entry, ENTRY, false))
            .unwrap();
        let next = new(&format!("v{}", number + 1), &["friend:snapshot"], true);
        store.snapshot(&lv(&entry), &next).unwrap();
        store.remove(&lv(&lease)).unwrap();
    }
    for name in ["e1", "e0", "v3"] {
        store.remove(&lv(name)).unwrap();
    }
    // All that is left is one entry, on images that no volume has.
    assert_eq!(names(&store), ["e2"]);
    let has = |image: &str| in_the_pool().lines().any(|line| line.starts_with(image));
    assert!(has("v0~") && !has("v3~"), "{}", in_the_pool());
    store.remove(&lv("e2")).unwrap();
    assert!(!has("v"), "{}", in_the_pool());
}

/// What a process that was killed left half made goes once another clears away; what a living one makes stays.
fn half_made() {
    Namespace::fresh();
    let store = open();
    let maker = |process: &str| json!({"host": HOST, "process": process});
    let dead = maker("0123456789abcdef");
    for (name, image) in [
        ("dead~1", json!({"maker": dead})),
        ("never-made~2", json!({"maker": dead})),
        (
            "others~3",
            json!({"maker": {"host": "two", "process": "0123456789abcdef"}}),
        ),
    ] {
        if !name.starts_with("never") {
            ceph::rbd(&["create", "--size", "16M", &format!("rbd/caches/{name}")]);
        }
        let (key, value) = (format!("image/{name}"), image.to_string());
        ceph::rados(&["setomapval", ceph::INDEX, &key, &value]);
    }
    // As any change does.
    store
        .create(&new("one", &["friend:snapshot"], false), Bytes::mib(16))
        .unwrap();
    open().clear_away().unwrap();
    let left = in_the_pool();
    assert!(
        !left.contains("dead~1") && left.contains("others~3") && left.contains("one~"),
        "{left}"
    );
    let keys = ceph::rados(&["listomapkeys", ceph::INDEX]);
    assert!(
        !keys.contains("never-made~2") && keys.contains("others~3"),
        "{keys}"
    );
    ceph::rbd(&["rm", "--no-progress", "rbd/caches/others~3"]);
    ceph::rados(&["rmomapkey", ceph::INDEX, "image/others~3"]);
}

/// A chain of entries, each of a job that restored the one before, longer than the kernel follows.
fn deep() {
    Namespace::fresh();
    let store = open();
    let base = store.list().unwrap().lvs[0].name.clone();
    let mut last = base;
    for number in 0..20 {
        let lease = format!("v{number}");
        let device = store
            .snapshot(&last, &new(&lease, &["friend:snapshot"], true))
            .unwrap()
            .unwrap();
        write(&device, number + 1).unwrap();
        store
            .snapshot(&lv(&lease), &new(&format!("e{number}"), ENTRY, false))
            .unwrap();
        store.remove(&lv(&lease)).unwrap();
        last = lv(&format!("e{number}"));
    }
    let device = store
        .snapshot(&last, &new("copy", &["friend:snapshot"], true))
        .unwrap()
        .unwrap();
    for number in 0..20 {
        reads(&device, number + 1);
    }
}

/// The kernel maps no image with more than 510 snapshots: a volume has a new one long before, with all that it held, and no snapshot
/// is taken that would be one too many.
fn many_snapshots() {
    Namespace::fresh();
    let store = open();
    let kept = lv("kept");
    let entry = |name: &str| {
        let entry = new(name, ENTRY, false);
        store.snapshot(&kept, &entry)
    };
    let image = || ceph::image_of(&ceph::listed("volume")["kept"]).0.to_owned();
    // As far as the index goes. Of another host's, so that they are not collected.
    let has_more = |image: &str, count: usize| {
        let mut changed = ceph::listed("image")[image].clone();
        let snapshots = changed["snapshots"].as_object_mut().unwrap();
        snapshots.retain(|name, _| !name.starts_with("none~"));
        for number in 0..count {
            let maker = json!({"host": "two", "process": "0123456789abcdef"});
            let snapshot = json!({"at": 1, "maker": maker});
            snapshots.insert(format!("none~{number}"), snapshot);
        }
        ceph::set_key(&format!("image/{image}"), &changed.to_string());
    };

    let device = store
        .create(&new("kept", &["friend:snapshot"], true), Bytes::mib(16))
        .unwrap()
        .unwrap();
    write(&device, 1).unwrap();
    entry("one").unwrap();
    let (first, held) = (image(), store.hold(&kept).unwrap());
    has_more(&first, 249);
    store.activate(&kept).unwrap();
    assert_eq!(image(), first, "it is in use");
    drop(held);
    let device = store.activate(&kept).unwrap();
    let second = image();
    assert_ne!(second, first);
    reads(&device, 1);
    write(&device, 2).unwrap();
    entry("two").unwrap();
    has_more(&second, 509);
    match entry("three") {
        Err(StoreError::Failed(text)) => assert!(text.contains("more than 510"), "{text}"),
        other => panic!("{other:?}"),
    }
    for image in [&first, &second] {
        has_more(image, 0);
    }
    for (name, byte) in [("one", 1), ("two", 2)] {
        reads(&store.activate(&lv(name)).unwrap(), byte);
    }
}

fn prepared_once() {
    Namespace::fresh();
    let open = || rbd::init(&place(), HOST, Path::new(RUN), Bytes::mib(640), &mut |_| {}).unwrap();
    let first = open().list().unwrap().lvs;
    let [base] = &first[..] else {
        panic!("{first:?}");
    };
    assert_eq!((Role::from_tags(&base.tags), base.size), (Role::Base, BASE));
    assert_eq!((base.device, base.open), (None, false));
    assert_eq!(open().list().unwrap().lvs, first);
}

/// What is not there, or not allowed, is refused by name, with the command that helps.
fn refusals() {
    Namespace::fresh();
    for (changed, want) in [
        (
            Place {
                pool: "none".into(),
                ..place()
            },
            "ceph osd pool create none",
        ),
        (
            Place {
                namespace: "others".into(),
                ..place()
            },
            "client.cache",
        ),
        (
            Place {
                user: "nobody".into(),
                ..place()
            },
            "rbd --id nobody ls rbd/caches",
        ),
        (
            Place {
                conf: Some("/none/ceph.conf".into()),
                ..place()
            },
            "/none/ceph.conf",
        ),
    ] {
        match RbdStore::open(&changed, HOST, Path::new(RUN)) {
            Err(StoreError::Unusable(text)) => assert!(text.contains(want), "{text}"),
            other => panic!("{changed:?}: {:?}", other.map(|_| "opened")),
        }
    }
}
