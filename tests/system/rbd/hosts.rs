// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a host of a fleet does while others live, evict, and take it for lost: over the real index, images and devices.

use std::path::Path;
use std::thread;

use lvm_cache_friend::cache::names::LvName;
use lvm_cache_friend::cache::record::Role;
use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::fs::Content;
use lvm_cache_friend::storage::rbd::ceph::Cluster;
use lvm_cache_friend::storage::rbd::index::{Change, Index};
use lvm_cache_friend::storage::rbd::{RbdStore, fleet};
use lvm_cache_friend::storage::{Store, StoreError};

use super::{Namespace, another_host, lv, names, new, open};
use crate::support::ceph::{self, HOSTS, USER};
use crate::support::wait_until;

pub const TESTS: [(&str, fn()); 3] = [
    ("one_host_evicts", one_host_evicts),
    ("removed_as_it_is_cloned", removed_as_it_is_cloned),
    ("lost_and_back", lost_and_back),
];

const ENTRY: &[&str] = &["friend:snapshot", "friend:cache:a"];

fn entry(store: &RbdStore, name: &str) -> LvName {
    let lvs = store.list().unwrap().lvs;
    let base = lvs
        .iter()
        .find(|lv| Role::from_tags(&lv.tags) == Role::Base);
    let made = new(name, ENTRY, false);
    store.snapshot(&base.unwrap().name, &made).unwrap();
    lv(name)
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
    let cluster = Cluster::connect(USER, None).unwrap();
    let pool = cluster.pool("rbd", "caches").unwrap();
    let was = fleet::evictor(&ceph::keys());
    let (taken, _) = fleet::take_turn(was.as_ref(), HOSTS[0]);
    assert!(pool.write(ceph::INDEX, &taken).unwrap());
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
    // As `two` does it after five minutes.
    let cluster = Cluster::connect(USER, None).unwrap();
    let pool = cluster.pool("rbd", "caches").unwrap();
    wait_until(|| {
        let keys = ceph::keys();
        let index = Index::parse(&keys).unwrap();
        let beat = fleet::hosts(&keys).remove(HOSTS[0]).unwrap();
        let write = fleet::declare_lost(&index, HOSTS[0], &beat, HOSTS[1]);
        pool.write(ceph::INDEX, &write).unwrap()
    });
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
        pool.write(ceph::INDEX, &change.write(&index)).unwrap()
    });
    let not_yet = two.clear_away().unwrap_err();
    println!("{not_yet}");
    let is_lease = |image: &String| image.starts_with("lease");
    assert!(ceph::listed("image").keys().any(is_lease));

    drop(one);
    let one = open();
    assert!(one.join().unwrap());
    let [lost] = &one.take_lost().unwrap()[..] else {
        panic!("one volume was lost");
    };
    assert_eq!(lost.lv, lv("lease"));
    assert_eq!(lost.tags.len(), tags.len());
    assert!(one.take_lost().unwrap().is_empty());
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
