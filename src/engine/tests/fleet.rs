// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two engines, each of a host of its own, on one store.

use serde_json::Value;

use super::*;
use crate::cache::evict::{Limits, Trust};

/// Hosts `a` and `b`, where no more than so many entries are kept.
fn hosts(max_entries: Option<usize>) -> [Bench; 2] {
    let all = Memory::new(Bytes::mib(64)).unwrap();
    ["a", "b"].map(|id| started(&all.of_host(id), max_entries))
}

fn started(store: &Memory, max_entries: Option<usize>) -> Bench {
    store.join();
    let policy = Policy {
        all: Limits {
            max_entries,
            ..Limits::default()
        },
        ..Policy::default()
    };
    Bench::with(store.clone(), policy)
}

fn status(bench: &Bench, volume: &str) -> Value {
    let view = bench.engine.get(&volume.parse().unwrap()).unwrap();
    Value::Object(view.status)
}

/// An entry that `bench` publishes.
fn published(bench: &Bench, volume: &str) -> LvName {
    bench.create(volume, RESTORES).unwrap();
    bench.end(bench.lease(volume));
    bench.wait_until_quiet();
    bench.entries()[0].clone()
}

fn evict(bench: &Bench, refused: Option<Trust>) -> Option<Vec<String>> {
    let evicted = bench.engine.evict_once(refused).unwrap()?;
    Some(evicted.into_iter().map(|evicted| evicted.lv).collect())
}

fn byte_at(device: &Path, at: u64) -> u8 {
    let mut byte = [0];
    let file = File::open(device).unwrap();
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

#[test]
fn what_one_host_publishes_another_restores() {
    let [a, b] = hosts(None);
    let entry = published(&a, "v");
    b.engine.relist();
    assert_eq!(b.entries(), std::slice::from_ref(&entry));
    // Under a name that the other host has, too.
    b.create("v", RESTORES).unwrap();
    assert_eq!(status(&b, "v")["restored"], "exact");
    assert_eq!(status(&b, "v")["from"], entry.as_str());
    a.settle();
    for bench in [&a, &b] {
        assert_eq!(bench.stored(), ["entry", "v"]);
    }
    // Both at once, and each writes its own.
    let copies = [&a, &b].map(|bench| bench.lease("v"));
    for (mark, (_, copy)) in (1..).zip(&copies) {
        let device = copy.device.as_ref().unwrap();
        let file = File::options().write(true).open(device).unwrap();
        file.write_all_at(&[mark], 1 << 20).unwrap();
    }
    for (mark, (_, copy)) in (1..).zip(&copies) {
        assert_eq!(byte_at(copy.device.as_ref().unwrap(), 1 << 20), mark);
    }
    let [of_a, of_b] = copies;
    a.end(of_a);
    a.wait_until_quiet();
    b.end(of_b);
    b.wait_until_quiet();
    a.settle();
    assert_eq!(a.entries().len(), 3);
    // The newest, whichever host it is of.
    let newest = a.entries()[0].clone();
    let device = a.store.activate(&newest).unwrap();
    assert_eq!(byte_at(&device, 1 << 20), 2);
}

#[test]
fn a_host_leaves_anothers_volumes_alone() {
    let [a, b] = hosts(None);
    a.create("waits", RESTORES).unwrap();
    a.create("used", RESTORES).unwrap();
    let lease = a.lease("used");
    let before = a.stored();
    b.settle();
    // Nor when it starts.
    let b = started(&b.store, None);
    b.wait_until_quiet();
    b.settle();
    assert_eq!(b.stored(), [""; 0]);
    assert!(b.engine.list().is_empty());
    assert_eq!(a.stored(), before);
    a.end(lease);
    a.wait_until_quiet();
    a.settle();
    assert_eq!(a.stored(), ["entry", "used", "waits"]);
}

#[test]
fn one_host_evicts_at_a_time() {
    let [a, b] = hosts(Some(1));
    let old = a.entry("old");
    let new = a.entry("new");
    assert!(a.store.begin_evicting().unwrap());
    assert_eq!(evict(&b, None), None);
    assert!(b.is_there(&old));
    // Without the turn nothing goes.
    b.store.evict(&old).unwrap_err();
    a.store.end_evicting();
    assert_eq!(evict(&b, None).unwrap(), ["old"]);
    // Until it finds nothing more.
    assert!(!a.store.begin_evicting().unwrap());
    assert_eq!(evict(&b, None).unwrap(), [""; 0]);
    assert_eq!(evict(&a, None).unwrap(), [""; 0]);
    a.engine.relist();
    assert_eq!(a.entries(), [new]);
    // It has given the turn back.
    assert!(a.store.begin_evicting().unwrap());
    // Who waits for room is told that another host makes it.
    assert_eq!(evict(&b, Some(Trust::Full)), None);
}

#[test]
fn what_another_host_has_evicted_meanwhile_counts() {
    let [a, b] = hosts(Some(1));
    let _old = a.entry("old");
    let new = a.entry("new");
    b.engine.relist();
    // It has read that there is one too many; before it has its turn the other host evicts that.
    let held = b.store.hold_listing();
    thread::scope(|scope| {
        let late = scope.spawn(|| evict(&b, None));
        held.wait_until_read();
        assert_eq!(evict(&a, None).unwrap(), ["old"]);
        assert_eq!(evict(&a, None).unwrap(), [""; 0]);
        drop(held);
        assert_eq!(late.join().unwrap().unwrap(), [""; 0]);
    });
    b.engine.relist();
    assert_eq!(b.entries(), [new]);
}

#[test]
fn what_a_lease_of_another_host_came_from_is_not_evicted() {
    for leased in [true, false] {
        let [a, b] = hosts(Some(1));
        let used = a.entry("used");
        a.create("v", RESTORES).unwrap();
        let lease = leased.then(|| a.lease("v"));
        let other = a.entry("other");
        b.engine.relist();
        let gone = evict(&b, None).unwrap();
        let want = if leased { &other } else { &used };
        assert_eq!(gone, [want.to_string()], "{leased}");
        if let Some(lease) = lease {
            a.end(lease);
            a.wait_until_quiet();
        }
    }
}

#[test]
fn an_entry_that_another_host_removes_as_it_is_chosen_is_replaced_by_the_next_best() {
    let [a, b] = hosts(None);
    let old = a.entry("old");
    let new = a.entry("new");
    b.engine.relist();
    a.engine.doom(&new).unwrap();
    a.settle();
    assert_eq!(b.entries()[0], new, "it has not heard of that yet");
    b.create("v", RESTORES).unwrap();
    assert_eq!(status(&b, "v")["from"], old.as_str());
}

#[test]
fn a_host_that_is_lost_answers_and_publishes_nothing() {
    let [a, b] = hosts(None);
    for (name, options) in [
        ("used", RESTORES),
        ("waits", RESTORES),
        ("keeps", &[("reuse", "keep")]),
    ] {
        a.create(name, options).unwrap();
    }
    let lease = a.lease("used");
    let kept = status(&a, "keeps")["lv"].as_str().unwrap().parse().unwrap();
    let making = [MAKING.parse().unwrap()];
    a.store.change_tags(&kept, &[], &making).unwrap();
    b.store.declare_lost("a");
    a.engine.relist();
    a.engine.refresh_waiting();
    let shut_out = |error| {
        let is = matches!(error, EngineError::Store(StoreError::ShutOut { .. }));
        assert!(is, "{error}");
    };
    shut_out(a.create("another", RESTORES).unwrap_err());
    shut_out(a.engine.room_for_lease().unwrap_err());
    a.create("scratch", &[("on-error", "scratch")]).unwrap();
    a.end(lease);
    a.wait_until_quiet();
    for name in ["used", "waits", "keeps", "scratch"] {
        assert!(a.has_volume(name), "{name}");
    }
    let last = &status(&a, "used")["last_lease"];
    assert_eq!(last["published"], Value::Null);
    assert!(last["why"].as_str().unwrap().contains("lost"), "{last}");
    // The other host removes what it had, and has nothing of it.
    b.settle();
    b.settle();
    assert_eq!(b.stored(), [""; 0]);
    assert!(b.engine.list().is_empty());

    // Its next life has the volumes again, and says what is gone.
    let next = started(&a.store, None);
    for (name, lost) in [("used", true), ("waits", false), ("keeps", true)] {
        let status = status(&next, name);
        let why = status.pointer("/last_lease/why").map(ToString::to_string);
        assert_eq!(why.is_some_and(|why| why.contains("lost")), lost, "{name}");
    }
    assert!(!next.has_volume("scratch"));
    // And so has one after that, where it came to nothing.
    drop(next);
    let next = started(&a.store, None);
    for name in ["used", "waits", "keeps"] {
        assert!(next.has_volume(name), "{name}");
    }
    next.engine.forget_lost();
    assert!(
        !next.store.lost().unwrap().is_empty(),
        "they have no copies yet"
    );
    next.engine.refresh_waiting();
    next.engine.forget_lost();
    assert!(next.store.lost().unwrap().is_empty());
    next.settle();
    assert_eq!(next.stored(), ["keeps", "used", "waits"]);
    // That is told no more then.
    let third = started(&next.store, None);
    assert_eq!(status(&third, "used").get("last_lease"), None);
}

#[test]
fn a_host_that_is_lost_in_the_middle_of_a_publish_publishes_nothing() {
    for fate in IN_DOUBT {
        let [a, b] = hosts(None);
        a.create("v", RESTORES).unwrap();
        let lease = a.lease("v");
        // The first attempt is in doubt, and the store is away from then on.
        a.store.next_then_lock([fate]);
        a.end(lease);
        while !a.store.is_locked() {
            thread::yield_now();
        }
        b.store.declare_lost("a");
        a.store.serve();
        a.wait_until_quiet();
        b.settle();
        b.settle();
        // What had been done by then is whole, and stays.
        let done = if fate == Unanswered {
            &["entry"][..]
        } else {
            &[]
        };
        assert_eq!(b.stored(), done, "{fate:?}");
        for entry in b.entries() {
            let device = b.store.activate(&entry).unwrap();
            assert_eq!(probe(&device).unwrap(), Content::Fs(FsType::Ext4));
        }
        let why = &status(&a, "v")["last_lease"]["why"];
        assert!(why.as_str().unwrap().contains("lost"), "{fate:?}: {why}");
    }
}

#[test]
fn what_a_host_has_published_outlives_it() {
    let [a, b] = hosts(None);
    let entry = published(&a, "v");
    b.store.declare_lost("a");
    b.settle();
    b.settle();
    assert_eq!(b.entries(), std::slice::from_ref(&entry));
    assert_eq!(b.stored(), ["entry"]);
    let fleet = b.store.fleet().unwrap().unwrap();
    assert_eq!(fleet.me, "b");
    let lost: Vec<_> = fleet.hosts.iter().map(|h| (&*h.id, h.lost)).collect();
    assert_eq!(lost, [("a", true), ("b", false)]);
    assert_eq!(fleet.lvs[0].host.as_deref(), Some("a"));
}

/// Both hosts publish, restore and evict at once: no more goes than has to, and what is there can be restored.
#[test]
fn two_hosts_at_once() {
    const EACH: usize = 8;
    let benches = hosts(Some(EACH));
    thread::scope(|scope| {
        for (bench, host) in benches.iter().zip(["a", "b"]) {
            scope.spawn(move || {
                for number in 0..EACH {
                    published(bench, &format!("{host}{number}"));
                    while evict(bench, None).is_none_or(|gone| !gone.is_empty()) {
                        thread::yield_now();
                    }
                    bench.settle();
                }
            });
        }
    });
    for bench in &benches {
        bench.settle();
        assert_eq!(bench.entries().len(), EACH);
        bench.create("last", RESTORES).unwrap();
        assert_eq!(status(bench, "last")["from"], bench.entries()[0].as_str());
    }
    assert_eq!(benches[0].entries(), benches[1].entries());
}
