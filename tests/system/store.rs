// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every store promises: one body of tests for all of them.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use lvm_cache_friend::cache::names::{LvName, Tag};
use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::fs::{is_clean, make};
use lvm_cache_friend::mount::Mounted;
#[cfg(feature = "failpoints")]
use lvm_cache_friend::storage::memory::Memory;
use lvm_cache_friend::storage::{Lv, NewLv, Store, StoreError};

use crate::harness::{Test, Tier, test};
use crate::support::wait_until;

/// What a store lies on: made for one test, gone when dropped.
pub trait Ground: Send + Sync {
    /// Opens the store: as often as asked.
    fn open(&self) -> Arc<dyn Store>;

    /// The same with less room, if it would take long to fill.
    fn open_small(&self) -> Arc<dyn Store> {
        self.open()
    }

    /// Puts things beside our volumes that are not ours, and gives what they look
    /// like: the same again as long as nobody touches them.
    fn others(&self) -> Box<dyn Fn() -> String + '_>;
}

/// A test's promise, on one store.
type Promise = fn(&dyn Ground);

/// All of them, for one kind of store whose devices are the kernel's: over what `ground` makes, which must have
/// room for 512 MiB of data.
pub fn tests(tier: Tier, store: &str, ground: fn() -> Box<dyn Ground>) -> Vec<Test> {
    let promises = [&of_any_store()[..], &of_block_devices()[..]].concat();
    held_to(&promises, tier, store, ground)
}

/// Those of the store in memory, which has no block devices; anywhere, in milliseconds.
#[cfg(feature = "failpoints")]
pub fn tests_in_memory() -> Vec<Test> {
    held_to(&of_any_store(), Tier::Host, "memory", || {
        Box::new(InMemory(Memory::new(Bytes::mib(64)).unwrap()))
    })
}

#[cfg(feature = "failpoints")]
struct InMemory(Memory);

#[cfg(feature = "failpoints")]
impl Ground for InMemory {
    fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    /// An LV that has no tag of ours: there is nothing else beside our volumes.
    fn others(&self) -> Box<dyn Fn() -> String + '_> {
        self.0.create(&new("foreign", &["other"]), SIZE).unwrap();
        Box::new(|| format!("{:?}", get(&self.0, "foreign")))
    }
}

fn held_to(
    promises: &[(&str, Promise)],
    tier: Tier,
    store: &str,
    ground: fn() -> Box<dyn Ground>,
) -> Vec<Test> {
    promises
        .iter()
        .map(|&(name, promise)| {
            let body = move || promise(&*ground());
            test(tier, format!("store::{store}::{name}"), body)
        })
        .collect()
}

/// What a store promises of its devices, which are block devices that file systems can be mounted from.
fn of_block_devices() -> [(&'static str, Promise); 5] {
    [
        ("block_devices", block_devices),
        ("busy_while_mounted", busy_while_mounted),
        ("grown_while_mounted", grown_while_mounted),
        ("mounted_beside_its_origin", mounted_beside_its_origin),
        ("snapshot_of_what_is_written", snapshot_of_what_is_written),
    ]
}

fn of_any_store() -> [(&'static str, Promise); 18] {
    [
        ("created", created),
        ("snapshot", snapshot),
        ("isolated", isolated),
        ("activated", activated),
        ("inactive_unless_asked", inactive_unless_asked),
        ("tags", tags),
        ("many_tags", many_tags),
        ("exists", exists),
        ("not_found", not_found),
        ("busy_while_open", busy_while_open),
        ("shown_while_held", shown_while_held),
        ("grown", grown),
        ("numbers_grow", numbers_grow),
        ("all_at_once", all_at_once),
        ("used", used),
        ("full", full),
        ("evicted", evicted),
        ("others_untouched", others_untouched),
    ]
}

const SIZE: Bytes = Bytes::mib(64);
/// Room for XFS.
const XFS_SIZE: Bytes = Bytes::mib(304);

fn lv(name: &str) -> LvName {
    name.parse().unwrap()
}

fn list_of_tags(tags: &[&str]) -> Vec<Tag> {
    tags.iter().map(|tag| tag.parse().unwrap()).collect()
}

fn new(name: &str, tags: &[&str]) -> NewLv {
    NewLv {
        name: lv(name),
        tags: list_of_tags(tags),
        active: false,
    }
}

fn active(name: &str) -> NewLv {
    NewLv {
        active: true,
        ..new(name, &["friend:snapshot"])
    }
}

fn find(store: &dyn Store, name: &str) -> Option<Lv> {
    let mut found = store.list().unwrap().lvs;
    found.retain(|lv| lv.name.as_str() == name);
    assert!(found.len() <= 1, "{found:?}");
    found.pop()
}

fn get(store: &dyn Store, name: &str) -> Lv {
    find(store, name).unwrap_or_else(|| panic!("{name} is not there"))
}

/// Tags have no order.
fn tag_set(lv: &Lv) -> BTreeSet<&str> {
    let set: BTreeSet<_> = lv.tags.iter().map(Tag::as_str).collect();
    assert_eq!(set.len(), lv.tags.len(), "twice: {:?}", lv.tags);
    set
}

fn tags_of(store: &dyn Store, name: &str) -> BTreeSet<String> {
    let lv = get(store, name);
    tag_set(&lv).into_iter().map(str::to_owned).collect()
}

/// Fills `length` bytes of a device from `offset` on.
pub fn fill(device: &Path, offset: u64, length: usize, byte: u8) {
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(&vec![byte; length], offset).unwrap();
    file.sync_all().unwrap();
}

/// Whether `length` bytes of a device from `offset` on are all this one.
pub fn holds(device: &Path, offset: u64, length: usize, byte: u8) -> bool {
    let file = File::open(device).unwrap();
    let mut buffer = vec![0; length];
    file.read_exact_at(&mut buffer, offset).unwrap();
    buffer.iter().all(|&b| b == byte)
}

fn device_size(device: &Path) -> u64 {
    use std::io::{Seek as _, SeekFrom};
    File::open(device).unwrap().seek(SeekFrom::End(0)).unwrap()
}

pub fn inside(mounted: &Mounted, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", mounted.root().as_raw_fd()).into()
}

/// A volume with a mounted XFS.
fn mounted_xfs(store: &dyn Store, name: &str) -> (PathBuf, Mounted) {
    let device = store.create(&active(name), XFS_SIZE).unwrap().unwrap();
    make(&device, FsType::Xfs).unwrap();
    let mounted = Mounted::device(&device, FsType::Xfs).unwrap();
    (device, mounted)
}

fn unmount(mounted: Mounted, device: &Path) {
    drop(mounted);
    // A child that another thread is starting has the descriptor until its exec.
    while lvm_cache_friend::mount::in_use(device).unwrap() {
        thread::sleep(Duration::from_millis(1));
    }
}

macro_rules! assert_fails {
    ($result:expr, $pattern:pat) => {
        match $result {
            Err($pattern) => {}
            other => panic!(
                "{}: {other:?}, not {}",
                stringify!($result),
                stringify!($pattern)
            ),
        }
    };
}

fn created(ground: &dyn Ground) {
    let store = ground.open();
    assert!(!store.name().contains(char::is_whitespace));
    let asked = new("one", &["friend:snapshot", "friend:cache:a/b=c"]);
    assert_eq!(store.create(&asked, Bytes(SIZE.0 - 1)).unwrap(), None);
    let made = get(&*store, "one");
    assert!(made.size >= Bytes(SIZE.0 - 1) && made.size.0 < SIZE.0 + (64 << 20));
    assert_eq!(
        tag_set(&made),
        BTreeSet::from(["friend:cache:a/b=c", "friend:snapshot"])
    );
    assert_eq!((made.origin, made.device, made.open), (None, None, false));
    let this_year = 1_700_000_000..4_000_000_000;
    assert!(this_year.contains(&made.created), "{}", made.created);
    let capacity = store.list().unwrap().capacity;
    assert!(capacity.data_size.0 > 0);
    assert!((0.0..=100.0).contains(&capacity.data_percent));
    assert!((0.0..=100.0).contains(&capacity.metadata_percent));
    // Without a tag, and again from the beginning.
    store.create(&new("two", &[]), SIZE).unwrap();
    assert!(get(&*store, "two").tags.is_empty());
    assert_eq!(find(&*ground.open(), "one"), find(&*store, "one"));
    let device = store.activate(&lv("one")).unwrap();
    assert!(holds(&device, 0, 1 << 20, 0));
}

fn snapshot(ground: &dyn Ground) {
    let store = ground.open();
    store.create(&new("origin", &["a", "b"]), SIZE).unwrap();
    assert_eq!(
        store.snapshot(&lv("origin"), &new("copy", &["c"])).unwrap(),
        None
    );
    let (origin, copy) = (get(&*store, "origin"), get(&*store, "copy"));
    assert_eq!(copy.size, origin.size);
    assert_eq!(copy.origin, Some(lv("origin")));
    // The origin's tags are the origin's.
    assert_eq!(tag_set(&copy), BTreeSet::from(["c"]));
    assert_eq!(tag_set(&origin), BTreeSet::from(["a", "b"]));
    assert_eq!(copy.device, None);
    // A snapshot of a snapshot, and one that outlives its origin.
    store
        .snapshot(&lv("copy"), &new("copy.of_copy+1", &[]))
        .unwrap();
    assert_eq!(get(&*store, "copy.of_copy+1").origin, Some(lv("copy")));
    store.remove(&lv("copy")).unwrap();
    assert_eq!(get(&*store, "copy.of_copy+1").origin, None);
    // The name alone makes no origin.
    store.create(&new("copy", &[]), SIZE).unwrap();
    assert_eq!(get(&*store, "copy.of_copy+1").origin, None);
}

fn isolated(ground: &dyn Ground) {
    let store = ground.open();
    let origin = store.create(&active("origin"), SIZE).unwrap().unwrap();
    fill(&origin, 0, 4 << 20, 1);
    let copy = store
        .snapshot(&lv("origin"), &active("copy"))
        .unwrap()
        .unwrap();
    assert!(holds(&copy, 0, 4 << 20, 1));
    fill(&copy, 1 << 20, 1 << 20, 2);
    fill(&origin, 2 << 20, 1 << 20, 3);
    assert!(holds(&origin, 0, 2 << 20, 1));
    assert!(holds(&origin, 2 << 20, 1 << 20, 3));
    assert!(holds(&copy, 0, 1 << 20, 1));
    assert!(holds(&copy, 1 << 20, 1 << 20, 2));
    assert!(holds(&copy, 2 << 20, 2 << 20, 1));
    // What the devices said is what is kept.
    for name in ["origin", "copy"] {
        store.deactivate(&lv(name)).unwrap();
    }
    let store = ground.open();
    let copy = store.activate(&lv("copy")).unwrap();
    let origin = store.activate(&lv("origin")).unwrap();
    assert!(holds(&copy, 1 << 20, 1 << 20, 2));
    assert!(holds(&origin, 2 << 20, 1 << 20, 3));
    // An origin's end is not the snapshot's.
    store.remove(&lv("origin")).unwrap();
    assert!(holds(&copy, 2 << 20, 2 << 20, 1));
}

fn block_devices(ground: &dyn Ground) {
    let store = ground.open();
    let device = store.create(&active("one"), SIZE).unwrap().unwrap();
    let stat = fs::metadata(&device).unwrap();
    assert!(stat.file_type().is_block_device());
    let number = stat.rdev();
    let number = (libc::major(number), libc::minor(number));
    assert_eq!(get(&*store, "one").device, Some(number));
}

fn activated(ground: &dyn Ground) {
    /// No other test's.
    const CONTENT: u8 = 0xa7;
    let store = ground.open();
    let device = store.create(&active("one"), SIZE).unwrap().unwrap();
    let number = get(&*store, "one").device;
    assert!(number.is_some());
    assert_eq!(device_size(&device), get(&*store, "one").size.0);
    assert_eq!(store.activate(&lv("one")).unwrap(), device);
    fill(&device, 0, 1 << 20, CONTENT);
    // The kernel, not the store's handle, holds it.
    let again = ground.open();
    assert_eq!(get(&*again, "one").device, number);
    assert_eq!(again.activate(&lv("one")).unwrap(), device);
    again.deactivate(&lv("one")).unwrap();
    assert_eq!(get(&*store, "one").device, None);
    again.deactivate(&lv("one")).unwrap();
    let device = store.activate(&lv("one")).unwrap();
    assert!(holds(&device, 0, 1 << 20, CONTENT));
    // Removing takes the device along. What is called so may be another test's by now.
    store.remove(&lv("one")).unwrap();
    let mut read = [0; 4096];
    let is_read = File::open(&device).is_ok_and(|file| file.read_exact_at(&mut read, 0).is_ok());
    assert!(!is_read || read != [CONTENT; 4096]);
}

fn inactive_unless_asked(ground: &dyn Ground) {
    let store = ground.open();
    store.create(&new("one", &["x"]), SIZE).unwrap();
    store.snapshot(&lv("one"), &new("two", &["x"])).unwrap();
    store
        .change_tags(&lv("two"), &list_of_tags(&["y"]), &[])
        .unwrap();
    store.grow(&lv("two"), Bytes(SIZE.0 * 2)).unwrap();
    store.usage().unwrap();
    for store in [store, ground.open()] {
        for lv in store.list().unwrap().lvs {
            assert_eq!((lv.device, lv.open), (None, false), "{}", lv.name);
        }
    }
}

fn tags(ground: &dyn Ground) {
    let store = ground.open();
    store
        .create(&new("one", &["friend:snapshot", "a"]), SIZE)
        .unwrap();
    for (add, del, want) in [
        (vec!["b"], vec![], vec!["a", "b", "friend:snapshot"]),
        (
            vec!["c", "b"],
            vec!["a", "none"],
            vec!["b", "c", "friend:snapshot"],
        ),
        (vec!["b"], vec!["none"], vec!["b", "c", "friend:snapshot"]),
        (vec![], vec![], vec!["b", "c", "friend:snapshot"]),
        (
            vec!["friend:cache:Az09_+.-/=!:&#"],
            vec!["b", "c"],
            vec!["friend:cache:Az09_+.-/=!:&#", "friend:snapshot"],
        ),
        (
            vec![],
            vec!["friend:snapshot", "friend:cache:Az09_+.-/=!:&#"],
            vec![],
        ),
    ] {
        let (add, del) = (list_of_tags(&add), list_of_tags(&del));
        store.change_tags(&lv("one"), &add, &del).unwrap();
        let want: BTreeSet<_> = want.into_iter().map(str::to_owned).collect();
        assert_eq!(tags_of(&*store, "one"), want);
        assert_eq!(tags_of(&*ground.open(), "one"), want);
    }
}

fn many_tags(ground: &dyn Ground) {
    let store = ground.open();
    let many: Vec<_> = (0..150)
        .map(|n| format!("friend:cache:{n}-{}", "x".repeat(100)))
        .collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let longest = format!("friend:{}", "y".repeat(1017));
    store.create(&new("one", &many), SIZE).unwrap();
    store.snapshot(&lv("one"), &new("two", &many)).unwrap();
    let want: BTreeSet<_> = many.iter().map(|tag| (*tag).to_owned()).collect();
    assert_eq!(tags_of(&*store, "one"), want);
    assert_eq!(tags_of(&*store, "two"), want);
    store
        .change_tags(
            &lv("two"),
            &list_of_tags(&[&longest]),
            &list_of_tags(&many[1..]),
        )
        .unwrap();
    assert_eq!(
        tags_of(&*ground.open(), "two"),
        BTreeSet::from([many[0].to_owned(), longest])
    );
}

fn exists(ground: &dyn Ground) {
    let store = ground.open();
    store.create(&new("one", &["a"]), SIZE).unwrap();
    store.create(&new("two", &["b"]), SIZE).unwrap();
    let before = get(&*store, "one");
    assert_fails!(
        store.create(&new("one", &["c"]), SIZE),
        StoreError::Exists(_)
    );
    assert_fails!(
        store.snapshot(&lv("two"), &new("one", &["c"])),
        StoreError::Exists(_)
    );
    assert_fails!(
        store.snapshot(&lv("one"), &active("one")),
        StoreError::Exists(_)
    );
    assert_eq!(get(&*store, "one"), before);
}

fn not_found(ground: &dyn Ground) {
    let store = ground.open();
    let none = lv("none");
    assert_fails!(
        store.snapshot(&none, &new("one", &[])),
        StoreError::NotFound(_)
    );
    assert!(find(&*store, "one").is_none());
    assert_fails!(
        store.change_tags(&none, &list_of_tags(&["a"]), &[]),
        StoreError::NotFound(_)
    );
    assert_fails!(store.grow(&none, SIZE), StoreError::NotFound(_));
    assert_fails!(store.activate(&none), StoreError::NotFound(_));
    store.remove(&none).unwrap();
    store.create(&active("one"), SIZE).unwrap();
    store.remove(&lv("one")).unwrap();
    store.remove(&lv("one")).unwrap();
    assert!(find(&*store, "one").is_none());
    assert_fails!(store.activate(&lv("one")), StoreError::NotFound(_));
    // The name is free again.
    store.create(&new("one", &["again"]), SIZE).unwrap();
    assert_eq!(
        tags_of(&*store, "one"),
        BTreeSet::from(["again".to_owned()])
    );
}

fn busy_while_mounted(ground: &dyn Ground) {
    let store = ground.open();
    let (device, mounted) = mounted_xfs(&*store, "one");
    assert!(get(&*store, "one").open);
    assert_fails!(store.remove(&lv("one")), StoreError::Busy(_));
    assert_fails!(store.deactivate(&lv("one")), StoreError::Busy(_));
    // Nothing happened to it.
    assert_eq!(store.activate(&lv("one")).unwrap(), device);
    fs::write(inside(&mounted, "file"), "text").unwrap();
    mounted.sync().unwrap();
    store
        .change_tags(&lv("one"), &list_of_tags(&["in-use"]), &[])
        .unwrap();
    assert_eq!(store.activate(&lv("one")).unwrap(), device);
    unmount(mounted, &device);
    assert!(!get(&*store, "one").open);
    store.deactivate(&lv("one")).unwrap();
    store.remove(&lv("one")).unwrap();
    assert!(find(&*store, "one").is_none());
}

/// By a program that makes an entry, before there is a file system to mount: a daemon that starts then leaves it alone.
fn shown_while_held(ground: &dyn Ground) {
    let store = ground.open();
    store.create(&active("one"), SIZE).unwrap();
    assert!(!get(&*store, "one").open);
    let held = store.hold(&lv("one")).unwrap();
    assert!(get(&*store, "one").open);
    assert!(get(&*ground.open(), "one").open);
    drop(held);
    assert!(!get(&*store, "one").open);
}

fn busy_while_open(ground: &dyn Ground) {
    let store = ground.open();
    let device = store.create(&active("one"), SIZE).unwrap().unwrap();
    let held = File::open(&device).unwrap();
    assert_fails!(store.remove(&lv("one")), StoreError::Busy(_));
    assert!(find(&*store, "one").is_some());
    assert!(held.read_exact_at(&mut [0; 512], 0).is_ok());
    drop(held);
    store.remove(&lv("one")).unwrap();
    assert!(find(&*store, "one").is_none());
}

fn grown(ground: &dyn Ground) {
    let store = ground.open();
    let device = store.create(&active("one"), SIZE).unwrap().unwrap();
    let end = device_size(&device) - (1 << 20);
    fill(&device, end, 1 << 20, 7);
    let size = || get(&*store, "one").size;
    let before = size();
    store.grow(&lv("one"), Bytes(SIZE.0 / 2)).unwrap();
    store.grow(&lv("one"), before).unwrap();
    assert_eq!(size(), before);
    let wanted = Bytes(before.0 + (100 << 20) + 1);
    store.grow(&lv("one"), wanted).unwrap();
    assert!(size() >= wanted && size().0 < wanted.0 + (64 << 20));
    assert_eq!(device_size(&device), size().0);
    assert!(holds(&device, end, 1 << 20, 7));
    assert!(holds(&device, end + (1 << 20), 1 << 20, 0));
    store.deactivate(&lv("one")).unwrap();
    let wanted = Bytes(wanted.0 * 2);
    store.grow(&lv("one"), wanted).unwrap();
    assert!(size() >= wanted);
    assert_eq!(get(&*store, "one").device, None);
    // Snapshots have the size that their origin has by then.
    let copy = store
        .snapshot(&lv("one"), &active("copy"))
        .unwrap()
        .unwrap();
    assert_eq!(device_size(&copy), size().0);
    assert!(holds(&copy, end, 1 << 20, 7));
}

fn grown_while_mounted(ground: &dyn Ground) {
    let store = ground.open();
    let (device, mounted) = mounted_xfs(&*store, "used");
    store.grow(&lv("used"), Bytes(XFS_SIZE.0 * 2)).unwrap();
    assert_eq!(device_size(&device), XFS_SIZE.0 * 2);
    lvm_cache_friend::fs::grow(mounted.root(), FsType::Xfs).unwrap();
    let stat = nix::sys::statvfs::fstatvfs(mounted.root()).unwrap();
    assert!(stat.blocks() * stat.fragment_size() > XFS_SIZE.0);
    unmount(mounted, &device);
}

fn mounted_beside_its_origin(ground: &dyn Ground) {
    let store = ground.open();
    let (device, mounted) = mounted_xfs(&*store, "origin");
    fs::write(inside(&mounted, "file"), "origin's").unwrap();
    unmount(mounted, &device);
    let copies: Vec<_> = ["one", "two"]
        .into_iter()
        .map(|name| {
            store
                .snapshot(&lv("origin"), &active(name))
                .unwrap()
                .unwrap()
        })
        .collect();
    assert!(is_clean(&copies[0], FsType::Xfs).unwrap());
    let mounts: Vec<_> = [&device, &copies[0], &copies[1]]
        .into_iter()
        .map(|device| Mounted::device(device, FsType::Xfs).unwrap())
        .collect();
    fs::write(inside(&mounts[1], "file"), "one's").unwrap();
    fs::remove_file(inside(&mounts[2], "file")).unwrap();
    for mounted in &mounts {
        mounted.sync().unwrap();
    }
    let text = |number: usize| fs::read_to_string(inside(&mounts[number], "file")).ok();
    assert_eq!(text(0).as_deref(), Some("origin's"));
    assert_eq!(text(1).as_deref(), Some("one's"));
    assert_eq!(text(2), None);
    for (mounted, device) in mounts.into_iter().zip([&device, &copies[0], &copies[1]]) {
        unmount(mounted, device);
    }
}

fn snapshot_of_what_is_written(ground: &dyn Ground) {
    let store = ground.open();
    let (device, mounted) = mounted_xfs(&*store, "origin");
    // Everything that was written by then is in it, whatever comes after, and
    // nothing of it was synced by anybody.
    let written = AtomicU32::new(0);
    thread::scope(|scope| {
        // Dropped where this fails, too: the writer ends then.
        let (allow, allowed) = mpsc::channel();
        let (origin, written) = (&mounted, &written);
        let writer = scope.spawn(move || {
            for until in allowed {
                for number in written.load(Ordering::Acquire)..until {
                    let text = number.to_string();
                    fs::write(inside(origin, &text), &text).unwrap();
                    written.store(number + 1, Ordering::Release);
                }
            }
        });
        let wait_for = |number| {
            while written.load(Ordering::Acquire) < number {
                assert!(!writer.is_finished(), "the writer failed");
                thread::sleep(Duration::from_millis(1));
            }
        };
        for round in 1..=3 {
            allow.send(round * 1000).unwrap();
            wait_for(round * 1000 - 950);
            let by_then = written.load(Ordering::Acquire);
            let name = format!("copy{round}");
            let copy = store
                .snapshot(&lv("origin"), &active(&name))
                .unwrap()
                .unwrap();
            // Its log needs one recovery.
            assert!(!is_clean(&copy, FsType::Xfs).unwrap());
            let mounted = Mounted::device(&copy, FsType::Xfs).unwrap();
            let mut last = None;
            for number in 0.. {
                match fs::read_to_string(inside(&mounted, &number.to_string())) {
                    Ok(text) if text == number.to_string() => last = Some(number),
                    // The one that was being written.
                    Ok(text) => assert!(text.is_empty(), "{number} holds {text}"),
                    Err(_) => break,
                }
            }
            assert!(last >= Some(by_then - 1), "{last:?} of {by_then}");
            unmount(mounted, &copy);
            assert!(is_clean(&copy, FsType::Xfs).unwrap());
        }
        // And the origin's writer goes on.
        allow.send(4000).unwrap();
        drop(allow);
        writer.join().unwrap();
    });
    unmount(mounted, &device);
    assert!(is_clean(&device, FsType::Xfs).unwrap());
}

fn numbers_grow(ground: &dyn Ground) {
    let store = ground.open();
    let mut order = vec!["first".to_owned()];
    store.create(&new("first", &[]), SIZE).unwrap();
    let others = ground.open();
    for number in 0..8 {
        // From two handles, of two kinds, with the newest removed in between.
        let store = if number % 2 == 0 { &store } else { &others };
        let name = format!("lv{number}");
        if number % 3 == 0 {
            store.create(&new(&name, &[]), SIZE).unwrap();
        } else {
            store.snapshot(&lv(&order[0]), &new(&name, &[])).unwrap();
        }
        order.push(name);
        if number == 4 {
            store.remove(&lv(&order.pop().unwrap())).unwrap();
        }
    }
    let store = ground.open();
    let name = lv("last");
    store
        .snapshot(
            &lv(&order[2]),
            &NewLv {
                name,
                ..new("x", &[])
            },
        )
        .unwrap();
    order.push("last".to_owned());
    let numbers: Vec<_> = order.iter().map(|name| get(&*store, name).seq).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}

fn all_at_once(ground: &dyn Ground) {
    const THREADS: usize = 8;
    const EACH: usize = 4;
    let stores = [ground.open(), ground.open()];
    stores[0].create(&new("origin", &[]), SIZE).unwrap();
    thread::scope(|scope| {
        for number in 0..THREADS {
            let store = &stores[number % 2];
            scope.spawn(move || {
                for round in 0..EACH {
                    let name = format!("lv{number}-{round}");
                    let made = store
                        .snapshot(&lv("origin"), &new(&name, &["friend:snapshot", "made"]))
                        .unwrap();
                    assert_eq!(made, None);
                    let own = format!("own:{number}:{round}");
                    store
                        .change_tags(&lv(&name), &list_of_tags(&[&own]), &list_of_tags(&["made"]))
                        .unwrap();
                    // All tag one volume, and none is lost.
                    store
                        .change_tags(&lv("origin"), &list_of_tags(&[&own]), &[])
                        .unwrap();
                    // At any moment a volume has all of its tags or is not there.
                    for lv in store.list().unwrap().lvs {
                        if lv.name.as_str().starts_with("lv") {
                            assert_eq!(lv.tags.len(), 2, "{lv:?}");
                        }
                    }
                    if round % 2 == 0 {
                        store.remove(&lv(&name)).unwrap();
                    }
                }
            });
        }
    });
    let left = stores[0].list().unwrap().lvs;
    let ours: Vec<_> = left
        .iter()
        .filter(|lv| lv.name.as_str().starts_with("lv"))
        .collect();
    assert_eq!(ours.len(), THREADS * EACH / 2);
    for lv in &ours {
        let own = lv.name.as_str().replace("lv", "own:").replace('-', ":");
        assert_eq!(
            tag_set(lv),
            BTreeSet::from(["friend:snapshot", own.as_str()])
        );
    }
    let numbers: HashSet<_> = left.iter().map(|lv| lv.seq).collect();
    assert_eq!(numbers.len(), left.len());
    assert_eq!(get(&*stores[1], "origin").tags.len(), THREADS * EACH);
}

fn used(ground: &dyn Ground) {
    const WRITTEN: u64 = 16 << 20;
    /// What stores may take beside data.
    const SLACK: u64 = 4 << 20;
    let store = ground.open();
    let device = store.create(&active("one"), SIZE).unwrap().unwrap();
    let usage = |name: &str| store.usage().unwrap()[&lv(name)];
    assert!(usage("one").mapped.0 <= SLACK);
    fill(&device, 0, WRITTEN as usize, 1);
    let near = |bytes: Bytes, want: u64| bytes.0.abs_diff(want) <= SLACK;
    let alone = usage("one");
    assert!(
        near(alone.mapped, WRITTEN) && near(alone.exclusive, WRITTEN),
        "{alone:?}"
    );
    store.snapshot(&lv("one"), &new("two", &[])).unwrap();
    for name in ["one", "two"] {
        let shared = usage(name);
        assert!(
            near(shared.mapped, WRITTEN) && near(shared.exclusive, 0),
            "{shared:?}"
        );
    }
    fill(&device, 0, 8 << 20, 2);
    let both = (usage("one"), usage("two"));
    assert!(near(both.0.exclusive, 8 << 20), "{both:?}");
    assert!(near(both.1.exclusive, 8 << 20), "{both:?}");
    store.remove(&lv("two")).unwrap();
    assert!(!store.usage().unwrap().contains_key(&lv("two")));
    // Freed behind the scenes.
    wait_until(|| near(usage("one").exclusive, WRITTEN));
}

fn full(ground: &dyn Ground) {
    const CHUNK: u64 = 16 << 20;
    let store = ground.open_small();
    store
        .create(&new("entry", &["friend:cache:x"]), SIZE)
        .unwrap();
    let room = store.list().unwrap().capacity.data_size;
    let device = store.create(&active("big"), room).unwrap().unwrap();
    // Up to where it may be refused.
    let half = room.0 / CHUNK / 2;
    for number in 0..half {
        fill(&device, number * CHUNK, CHUNK as usize, 1);
    }
    let refused = (half..room.0 / CHUNK).find_map(|number| {
        // Before any write fails.
        fill(&device, number * CHUNK, CHUNK as usize, 1);
        store
            .snapshot(&lv("entry"), &new(&format!("lv{number}"), &[]))
            .err()
    });
    match refused {
        Some(StoreError::Full {
            store: name,
            detail,
        }) => {
            assert_eq!(name, store.name());
            assert!(!detail.is_empty());
        }
        other => panic!("{other:?}, not full"),
    }
    assert_fails!(
        store.create(&new("another", &[]), SIZE),
        StoreError::Full { .. }
    );
    assert!(find(&*store, "another").is_none());
    // What is there can be used, and removing makes room.
    store
        .change_tags(&lv("entry"), &list_of_tags(&["y"]), &[])
        .unwrap();
    store.activate(&lv("entry")).unwrap();
    store.remove(&lv("big")).unwrap();
    wait_until(|| match store.snapshot(&lv("entry"), &new("again", &[])) {
        Ok(_) => true,
        // Freed behind the scenes.
        Err(StoreError::Full { .. }) => false,
        Err(error) => panic!("{error}"),
    });
}

/// Whatever hosts there are, one that has the turn marks an entry, which it is to remove then; and a store that is of one host
/// alone says so.
fn evicted(ground: &dyn Ground) {
    let store = ground.open();
    for name in ["one", "two"] {
        let entry = new(name, &["friend:snapshot", "friend:cache:a"]);
        store.create(&entry, SIZE).unwrap();
    }
    assert!(store.begin_evicting().unwrap());
    assert!(store.evict(&lv("one")).unwrap());
    store.end_evicting();
    assert!(tags_of(&*store, "one").contains("friend:doomed"));
    assert!(!tags_of(&*store, "two").contains("friend:doomed"));
    store.remove(&lv("one")).unwrap();
    // Again, and what is gone already.
    assert!(store.begin_evicting().unwrap());
    assert!(store.evict(&lv("one")).unwrap());
    store.end_evicting();
    assert!(find(&*store, "one").is_none() && find(&*store, "two").is_some());

    assert!(store.lost().unwrap().is_empty());
    store.forget_lost().unwrap();
    let fleet = store.fleet().unwrap();
    assert_eq!(fleet.as_ref().map(|fleet| &*fleet.me), store.host());
    if let Some(fleet) = &fleet {
        let mut all = fleet.lvs.iter();
        let of = all.find(|of| of.lv.name.as_str() == "two").unwrap();
        assert_eq!(of.host.as_deref(), store.host());
    }
}

fn others_untouched(ground: &dyn Ground) {
    let store = ground.open();
    let looks = ground.others();
    let before = looks();
    created(ground);
    all_at_once(ground);
    store.remove(&lv("one")).unwrap();
    ground.open();
    assert_eq!(looks(), before);
}
