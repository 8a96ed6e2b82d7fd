// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine over a store in memory, which is locked, full or in doubt when a test has it so.
//!
//! Nothing is mounted, and the engine's own threads do not run: a test lists the store and tries removals itself, so it
//! chooses what happens between the two.

mod fleet;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::settle::Ended;
use super::told::{self, Told};
use super::volume::{Heard, MOUNT, Phase, Prepared, Volume, WAIT};
use super::{Engine, EngineError, Settings, Verdict, lock};
use crate::cache::evict::Policy;
use crate::cache::names::LvName;
use crate::cache::record::Role;
use crate::cache::spec::FsType;
use crate::cache::tags::{DOOMED, MAKING};
use crate::cache::units::Bytes;
use crate::fs::{Content, is_clean, probe};
use crate::storage::memory::Fate::{self, Done, Late, Refused, Unanswered};
use crate::storage::memory::Memory;
use crate::storage::{NewLv, Store, StoreError};

/// Ways in which a change ends in doubt.
const IN_DOUBT: [Fate; 3] = [Refused, Late, Unanswered];

/// An engine, and its store.
struct Bench {
    store: Memory,
    engine: Arc<Engine>,
    _dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::over(Memory::new(Bytes::mib(64)).unwrap())
    }

    /// An engine that starts over what another has left.
    fn over(store: Memory) -> Self {
        Self::with(store, Policy::default())
    }

    fn with(store: Memory, policy: Policy) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (jobs, _) = mpsc::unbounded_channel();
        let settings = Settings {
            mount_dir: dir.path().to_owned(),
            premounted: 0,
            scratch_size: Bytes::mib(1),
            empty_size: Bytes::mib(8),
            policy,
            keep_used: Duration::ZERO,
            jobs,
            docker: None,
        };
        let engine = Engine::new(Arc::new(store.clone()), settings).unwrap();
        engine.take_up().unwrap();
        Self {
            store,
            engine,
            _dir: dir,
        }
    }

    fn create(&self, name: &str, options: &[(&str, &str)]) -> Result<(), EngineError> {
        let options: BTreeMap<_, _> = options
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        self.engine.create(&name.parse().unwrap(), &options)
    }

    fn has_volume(&self, name: &str) -> bool {
        self.engine.get(&name.parse().unwrap()).is_some()
    }

    /// What is in the store, in a word for each LV.
    fn stored(&self) -> Vec<String> {
        let mut stored: Vec<_> = self
            .store
            .list()
            .unwrap()
            .lvs
            .iter()
            .map(|lv| match Role::from_tags(&lv.tags) {
                Role::Entry { .. } => "entry".to_owned(),
                Role::Volume {
                    volume: Some(volume),
                    ..
                } => volume.to_string(),
                other => format!("{other:?}"),
            })
            .collect();
        stored.sort_unstable();
        stored
    }

    /// The entries that can be restored from.
    fn entries(&self) -> Vec<LvName> {
        let index = Arc::clone(lock(&self.engine.state).catalog.index());
        index
            .entries()
            .iter()
            .map(|entry| entry.lv.clone())
            .collect()
    }

    /// An entry in the store that the engine knows of.
    fn entry(&self, name: &str) -> LvName {
        let new = new_lv(name, &["friend:snapshot", "friend:cache:a"]);
        self.store.create(&new, Bytes::mib(8)).unwrap();
        self.engine.relist();
        new.name
    }

    /// Does something between the moment that a listing is read and the one at which it is taken over.
    fn while_listing(&self, act: impl FnOnce()) {
        let held = self.store.hold_listing();
        thread::scope(|scope| {
            scope.spawn(|| self.engine.relist());
            held.wait_until_read();
            act();
            drop(held);
        });
    }

    /// Lists the store, and removes what is to be removed.
    fn settle(&self) {
        self.engine.relist();
        self.engine.try_removals();
    }

    /// A lease of a volume that waits for its use: a clean file system is written to it.
    fn lease(&self, name: &str) -> (Arc<Volume>, Prepared) {
        let volume = self.engine.volume(&name.parse().unwrap()).unwrap();
        let phase = lock(&volume.now).begin(&MOUNT);
        let Some(Phase::Ready(copy)) = phase else {
            panic!("{phase:?}");
        };
        lock(&volume.now).set(&WAIT, Phase::Stale(None));
        write_file_system(copy.device.as_ref().unwrap());
        let mark = [self.engine.lease_tag()];
        self.store.change_tags(&copy.lv, &mark, &[]).unwrap();
        lock(&volume.now).settling.push(copy.lv.clone());
        (volume, copy)
    }

    /// Ends a lease. Gives its LV.
    fn end(&self, (volume, copy): (Arc<Volume>, Prepared)) -> LvName {
        let lv = copy.lv.clone();
        let ended = Ended {
            lv: copy.lv,
            device: copy.device,
            source: copy.source,
            open: None,
            baseline: None,
            heard: Heard {
                by_job: Verdict::Success,
                told: Arc::new(Told::since(told::now())),
            },
            discarded: false,
            lost: false,
            cut_short: false,
            mark: self.engine.lease_tag(),
            marking: None,
            stuck: false,
            cut_off: false,
            mount: Duration::ZERO,
            lasted: Duration::ZERO,
            nth: 1,
        };
        self.engine.settle_behind(volume, ended);
        lv
    }

    fn wait_until_quiet(&self) {
        let state = lock(&self.engine.state);
        let waited = self
            .engine
            .quiet
            .wait_while(state, |state| state.under_way > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn is_there(&self, lv: &LvName) -> bool {
        self.store
            .list()
            .unwrap()
            .lvs
            .iter()
            .any(|there| there.name == *lv)
    }

    /// What there is once a lease of `v` has ended: one entry with what it wrote, and the volume's next copy.
    fn assert_published_once(&self, case: &str) {
        self.wait_until_quiet();
        let known = self.entries();
        assert_eq!(known.len(), 1, "{case}");
        self.settle();
        self.settle();
        assert_eq!(self.entries(), known, "{case}");
        assert_eq!(self.stored(), ["entry", "v"], "{case}");
        let device = self.store.activate(&known[0]).unwrap();
        assert_eq!(probe(&device).unwrap(), Content::Fs(FsType::Ext4), "{case}");
    }
}

/// The superblock of a clean ext4: all that is looked at of a file system that is not mounted.
fn write_file_system(device: &Path) {
    let mut superblock = [0; 1024];
    // s_magic and s_state.
    superblock[0x38..0x3c].copy_from_slice(&[0x53, 0xef, 1, 0]);
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(&superblock, 1024).unwrap();
    assert!(is_clean(device, FsType::Ext4).unwrap());
}

fn new_lv(name: &str, tags: &[&str]) -> NewLv {
    NewLv {
        name: name.parse().unwrap(),
        tags: tags.iter().map(|tag| tag.parse().unwrap()).collect(),
        active: false,
    }
}

const RESTORES: &[(&str, &str)] = &[("restore", "a"), ("save", "a")];
const NEEDS_ENTRY: &[(&str, &str)] = &[("restore", "a"), ("on-miss", "fail")];

#[test]
fn a_create_in_doubt_leaves_nothing() {
    for (options, fate) in [RESTORES, NEEDS_ENTRY]
        .into_iter()
        .flat_map(|o| IN_DOUBT.map(|f| (o, f)))
    {
        let bench = Bench::new();
        bench.store.next([fate]);
        let refused = bench.create("v", options);
        assert!(
            matches!(refused, Err(EngineError::Store(StoreError::Timeout { .. }))),
            "{refused:?}"
        );
        assert!(!bench.has_volume("v"));
        bench.settle();
        assert!(!bench.has_volume("v"), "{fate:?}");
        assert_eq!(bench.stored(), [""; 0], "{fate:?}");
        // It can be made again.
        bench.create("v", options).unwrap();
        bench.settle();
        assert!(bench.has_volume("v"));
        assert_eq!(bench.stored(), ["v"]);
    }
}

#[test]
fn a_listing_from_before_settles_no_doubt() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        bench.while_listing(|| {
            bench.store.next([fate]);
            bench.create("v", RESTORES).unwrap_err();
        });
        bench.engine.try_removals();
        assert!(!bench.has_volume("v"), "{fate:?}");
        bench.settle();
        assert!(!bench.has_volume("v"), "{fate:?}");
        assert_eq!(bench.stored(), [""; 0], "{fate:?}");
    }
}

#[test]
fn a_create_in_doubt_is_remade_under_another_name() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        bench.store.next([fate]);
        bench.create("v", RESTORES).unwrap_err();
        // At once, before any listing says what became of the first.
        bench.create("v", RESTORES).unwrap();
        bench.settle();
        bench.settle();
        assert!(bench.has_volume("v"), "{fate:?}");
        assert_eq!(bench.stored(), ["v"], "{fate:?}");
    }
}

#[test]
fn a_volume_just_made_is_not_dropped_by_a_listing_from_before() {
    for options in [RESTORES, NEEDS_ENTRY] {
        let bench = Bench::new();
        bench.while_listing(|| bench.create("v", options).unwrap());
        assert!(bench.has_volume("v"), "{options:?}");
        bench.settle();
        assert!(bench.has_volume("v"), "{options:?}");
        // Another program's removal is noticed.
        let lv = bench.store.list().unwrap().lvs.remove(0).name;
        bench.store.remove(&lv).unwrap();
        bench.engine.relist();
        assert!(!bench.has_volume("v"), "{options:?}");
    }
}

#[test]
fn a_volume_just_removed_does_not_come_back_with_a_listing_from_before() {
    let bench = Bench::new();
    bench.create("v", RESTORES).unwrap();
    bench.while_listing(|| {
        bench.engine.remove(&"v".parse().unwrap()).unwrap();
        bench.engine.try_removals();
    });
    assert!(!bench.has_volume("v"));
    bench.settle();
    assert!(!bench.has_volume("v"));
    assert_eq!(bench.stored(), [""; 0]);
}

#[test]
fn a_removal_in_doubt_is_asked_for_again() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        bench.create("v", RESTORES).unwrap();
        bench.store.next([fate]);
        let name = "v".parse().unwrap();
        bench.engine.remove(&name).unwrap_err();
        assert!(bench.has_volume("v"), "{fate:?}");
        bench.engine.remove(&name).unwrap();
        bench.settle();
        assert!(!bench.has_volume("v"), "{fate:?}");
        assert_eq!(bench.stored(), [""; 0], "{fate:?}");
    }
}

#[test]
fn a_publish_in_doubt_ends_in_one_entry() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        bench.create("v", RESTORES).unwrap();
        let lease = bench.lease("v");
        bench.store.next([fate]);
        bench.end(lease);
        bench.assert_published_once(&format!("{fate:?}"));
        // Twice in doubt, each in another way, with the next copy in doubt too.
        for other in IN_DOUBT {
            let bench = Bench::new();
            bench.create("v", RESTORES).unwrap();
            let lease = bench.lease("v");
            bench.store.next([fate, other, Done, fate]);
            bench.end(lease);
            bench.wait_until_quiet();
            bench.engine.refresh_waiting();
            bench.assert_published_once(&format!("{fate:?}, {other:?}"));
        }
    }
}

#[test]
fn a_publish_in_doubt_is_not_found_by_a_listing_either() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        bench.create("v", RESTORES).unwrap();
        let lease = bench.lease("v");
        bench.while_listing(|| {
            bench.store.next([fate]);
            bench.end(lease);
            bench.wait_until_quiet();
        });
        bench.assert_published_once(&format!("{fate:?}"));
    }
}

#[test]
fn a_publish_waits_while_the_store_is_locked() {
    let bench = Bench::new();
    bench.create("v", RESTORES).unwrap();
    let doomed = || {
        let lvs = bench.store.list().unwrap().lvs;
        lvs.iter()
            .any(|lv| lv.tags.iter().any(|tag| tag.as_str() == DOOMED))
    };
    let lease = bench.lease("v");
    bench.store.lock_for(8);
    let lv = bench.end(lease);
    bench.wait_until_quiet();
    // It was asked for until then, and its data were there at the end.
    assert!(!bench.store.is_locked());
    assert!(doomed() && bench.is_there(&lv));
    bench.assert_published_once("locked");
    assert!(!bench.is_there(&lv));
    assert!(!lock(&bench.engine.state).catalog.is_in_doubt());
}

#[test]
fn a_lease_has_its_turn_to_publish_before_its_volume_is_busy() {
    let bench = Bench::new();
    let keeps = [("save", "a"), ("publish", "if-missing"), ("reuse", "keep")];
    bench.create("v", &keeps).unwrap();
    let lease = bench.lease("v");
    let volume = Arc::clone(&lease.0);
    let busy = lock(&volume.op);
    bench.end(lease);
    let since = Instant::now();
    while bench.engine.missing.try_lock().is_ok() {
        assert!(since.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(1));
    }
    drop(busy);
    bench.wait_until_quiet();
}

#[test]
fn a_stop_leaves_a_publish_that_waits_to_the_next_start() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        bench.create("v", RESTORES).unwrap();
        let lease = bench.lease("v");
        // In doubt once, and refused from then on.
        let refused = std::iter::repeat_n(Refused, 100_000);
        bench.store.next(std::iter::once(fate).chain(refused));
        let lv = bench.end(lease);
        assert!(bench.engine.stop(Duration::from_secs(60)), "{fate:?}");
        bench.store.serve();
        assert!(bench.is_there(&lv), "{fate:?}");
        let next = Bench::over(bench.store.clone());
        next.assert_published_once(&format!("{fate:?}"));
        assert!(!next.is_there(&lv), "{fate:?}");
    }
}

#[test]
fn a_lease_of_a_removed_volume_is_published_whatever_its_lv_is_called() {
    for name in ["friend-x", "a+b", "_a", "+"] {
        let bench = Bench::new();
        let mark = bench.engine.lease_tag();
        let tags = ["friend:snapshot", "friend:save:a", mark.as_str()];
        let new = NewLv {
            active: true,
            ..new_lv(name, &tags)
        };
        let device = bench.store.create(&new, Bytes::mib(8)).unwrap().unwrap();
        write_file_system(&device);
        let next = Bench::over(bench.store.clone());
        next.wait_until_quiet();
        next.settle();
        assert_eq!(next.stored(), ["entry"], "{name}");
        assert!(!next.is_there(&new.name), "{name}");
    }
}

#[test]
fn a_lease_of_a_kept_volume_is_published_though_the_volume_is_removed() {
    let bench = Bench::new();
    bench
        .create("v", &[("reuse", "keep"), ("save", "a")])
        .unwrap();
    let (volume, copy) = bench.lease("v");
    let making = [MAKING.parse().unwrap()];
    bench.store.change_tags(&copy.lv, &[], &making).unwrap();
    let lease = Prepared {
        lv: copy.lv.clone(),
        device: copy.device.clone(),
        premounted: None,
        making: false,
        source: copy.source.clone(),
        generation: 0.into(),
        took: Duration::ZERO,
    };
    {
        let mut now = lock(&volume.now);
        now.leases = 1;
        now.begin(&MOUNT).unwrap();
        now.set(&WAIT, Phase::Ready(copy));
    }
    // Before the lease's end has its turn.
    bench.engine.remove(&volume.name).unwrap();
    let lv = bench.end((volume, lease));
    bench.wait_until_quiet();
    bench.settle();
    assert_eq!(bench.stored(), ["entry"]);
    assert!(!bench.is_there(&lv) && !bench.has_volume("v"));
}

#[test]
fn entries_follow_the_store_whatever_a_listing_from_before_says() {
    let bench = Bench::new();
    let entry = bench.entry("one");
    assert_eq!(bench.entries(), std::slice::from_ref(&entry));
    bench.while_listing(|| bench.engine.doom(&entry).unwrap());
    assert!(bench.entries().is_empty());
    bench.create("v", RESTORES).unwrap();
    let lease = bench.lease("v");
    bench.while_listing(|| {
        bench.end(lease);
        bench.wait_until_quiet();
    });
    let known: HashSet<_> = bench.entries().into_iter().collect();
    assert_eq!(known.len(), 1);
    bench.settle();
    assert_eq!(bench.entries().into_iter().collect::<HashSet<_>>(), known);
}

#[test]
fn an_entry_that_could_not_be_marked_does_not_come_back_until_it_is_removed() {
    for fate in IN_DOUBT {
        let bench = Bench::new();
        let entry = bench.entry("one");
        bench.store.next([fate]);
        bench.engine.doom(&entry).unwrap_err();
        for _ in 0..2 {
            bench.engine.relist();
            assert!(bench.entries().is_empty(), "{fate:?}");
        }
        bench.while_listing(|| bench.engine.try_removals());
        assert!(bench.entries().is_empty(), "{fate:?}");
        bench.engine.relist();
        assert_eq!(bench.stored(), [""; 0], "{fate:?}");
    }
}

#[test]
fn what_is_known_stays_while_the_store_cannot_be_read() {
    let bench = Bench::new();
    let entry = bench.entry("one");
    bench.create("v", RESTORES).unwrap();
    bench.store.lock_for(1);
    bench.engine.relist();
    assert!(!bench.store.is_locked());
    assert_eq!(bench.entries(), [entry]);
    assert!(bench.has_volume("v"));
}

#[test]
fn a_full_store_refuses_a_volume_and_keeps_nothing_of_it() {
    let bench = Bench::new();
    bench.store.fill();
    // No eviction runs here, and the caller is told.
    bench.engine.upkeep.stop();
    let refused = bench.create("v", RESTORES);
    assert!(
        matches!(refused, Err(EngineError::Store(StoreError::Full { .. }))),
        "{refused:?}"
    );
    assert!(!bench.has_volume("v"));
    assert!(!lock(&bench.engine.state).catalog.is_in_doubt());
    bench.store.serve();
    bench.create("v", RESTORES).unwrap();
}
