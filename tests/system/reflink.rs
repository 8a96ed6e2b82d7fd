// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reflink store, on XFS and on btrfs, on this machine's own kernel.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lvm_cache_friend::cache::names::{LvName, Tag};
use lvm_cache_friend::cache::record::Role;
use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::engine::bounds::{self, Evicted};
use lvm_cache_friend::fs::{Content, is_clean, make, probe};
use lvm_cache_friend::mount::Mounted;
use lvm_cache_friend::storage::reflink::{self, ReflinkStore};
use lvm_cache_friend::storage::{NewLv, Store, StoreError};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::harness::{Group, Test, Tier, test, this_binary};
use crate::mounts::shut_down_now;
use crate::store::{self, Ground};
use crate::support::command::{run, sh};
use crate::support::disks::load;
use crate::support::lvm::DISK;
use crate::support::reflink::ReflinkFs;
use crate::support::wait_until;

/// All of them.
pub fn tests() -> Vec<Test> {
    let mut tests = store::tests(Tier::Reflink, "reflink_xfs", || Box::new(Disk::new("xfs")));
    tests.extend(store::tests(Tier::Reflink, "reflink_btrfs", || {
        Box::new(Disk::new("btrfs"))
    }));
    let own: [(&str, fn()); 8] = [
        ("prepared_once", prepared_once),
        ("not_everywhere", not_everywhere),
        ("left_over", left_over),
        ("not_one_free_block", not_one_free_block),
        ("freed_in_the_end", freed_in_the_end),
        ("frozen", frozen),
        ("killed", killed),
        ("names_of_files", names_of_files),
    ];
    tests.extend(own.map(|(name, body)| test(Tier::Reflink, format!("reflink::{name}"), body)));
    let guest = Tier::Guest(Group::Lvm);
    tests.push(test(guest, "reflink::on_a_slow_disk", on_a_slow_disk));
    tests.push(test(Tier::Part, "reflink::churn", churn));
    tests
}

/// A prepared directory on a file system of its own.
struct Disk(ReflinkFs);

impl Disk {
    fn new(fs: &str) -> Self {
        let disk = Self(ReflinkFs::of(fs, 1024));
        reflink::init(&disk.dir(), BASE).unwrap();
        disk
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("store")
    }

    fn open(&self) -> ReflinkStore {
        ReflinkStore::open(&self.dir()).unwrap()
    }
}

const BASE: Bytes = Bytes::mib(320);

impl Ground for Disk {
    fn open(&self) -> Arc<dyn Store> {
        Arc::new(Disk::open(self))
    }

    fn others(&self) -> Box<dyn Fn() -> String + '_> {
        let dir = self.dir();
        for (file, text) in [
            ("image", "a file"),
            (
                "friend-foreign/image",
                "a directory like ours, without tags",
            ),
            ("friend-half/image", "one whose tags are not ours"),
            ("friend-half/tags.json", "{\"tags\": 7}"),
            (".hidden/file", ""),
            ("lost~new/image", ""),
            ("empty/sub/file", ""),
        ] {
            let path = dir.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        std::os::unix::fs::symlink("/etc", dir.join("friend-link")).unwrap();
        Box::new(move || {
            let script = r#"cd "$1" && find image friend-foreign friend-half friend-link .hidden lost~new empty \
                -printf '%p %y %m %u %s %l %T@ %C@\n' | sort && cat image friend-foreign/* friend-half/*"#;
            run("/bin/sh", ["-ec", script, "sh", dir.to_str().unwrap()])
        })
    }
}

fn new(name: &str, tags: &[&str]) -> NewLv {
    NewLv {
        name: name.parse().unwrap(),
        tags: tags.iter().map(|tag| tag.parse().unwrap()).collect(),
        active: false,
    }
}

fn active(name: &str) -> NewLv {
    NewLv {
        active: true,
        ..new(name, &[])
    }
}

fn lv(name: &str) -> LvName {
    name.parse().unwrap()
}

fn prepared_once() {
    for fs in ["xfs", "btrfs"] {
        let disk = Disk::new(fs);
        let store = disk.open();
        let listing = store.list().unwrap();
        let [base] = &listing.lvs[..] else {
            panic!("{listing:?}");
        };
        assert_eq!(Role::from_tags(&base.tags), Role::Base);
        assert_eq!((base.size, base.device), (BASE, None));
        for private in [
            disk.dir(),
            disk.dir().join(base.name.as_str()),
            disk.dir().join(base.name.as_str()).join("image"),
            disk.dir().join(base.name.as_str()).join("tags.json"),
        ] {
            let stat = fs::metadata(&private).unwrap();
            assert_eq!((stat.uid(), stat.permissions().mode() & 0o77), (0, 0));
        }
        // Of 300 MiB and more, none is taken but what the file system wrote.
        let usage = store.usage().unwrap()[&base.name];
        assert!(usage.mapped.0 < 80 << 20, "{usage:?}");

        let again = reflink::init(&disk.dir(), Bytes(Bytes::GIB)).unwrap();
        assert_eq!(again.list().unwrap().lvs, listing.lvs);

        let device = store.activate(&base.name).unwrap();
        assert_eq!(probe(&device).unwrap(), Content::Fs(FsType::Xfs));
        assert!(is_clean(&device, FsType::Xfs).unwrap());
        drop(Mounted::device(&device, FsType::Xfs).unwrap());
        let direct = format!(
            "/sys/block/{}/loop/dio",
            device.file_name().unwrap().to_str().unwrap()
        );
        assert_eq!(fs::read_to_string(direct).unwrap().trim(), "1");
    }
}

fn not_everywhere() {
    let unusable = |result: Result<ReflinkStore, StoreError>, says: &str| match result {
        Err(StoreError::Unusable(text)) => assert!(text.contains(says), "{text}"),
        other => panic!("{other:?}, not unusable"),
    };
    let ext4 = ReflinkFs::of("ext4", 512);
    unusable(reflink::init(&ext4.path().join("store"), BASE), "XFS");
    let xfs = ReflinkFs::new(512);
    unusable(
        ReflinkStore::open(&xfs.path().join("none")),
        "init --reflink",
    );
    unusable(ReflinkStore::open(&xfs.path()), "init --reflink");
    for (mode, owner) in [(0o777, 0), (0o770, 0), (0o700, 1000)] {
        let dir = xfs.path().join(format!("{mode}-{owner}"));
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&dir, Some(owner), None).unwrap();
        unusable(reflink::init(&dir, BASE), "others");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }
    // Too small a base leaves nothing of one.
    let dir = xfs.path().join("store");
    assert!(reflink::init(&dir, Bytes::mib(1)).is_err());
    let left: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["~lock"]);
    unusable(ReflinkStore::open(&dir), "init --reflink");
}

fn left_over() {
    let disk = Disk::new("xfs");
    let (dir, store) = (disk.dir(), disk.open());
    store.create(&new("one", &["a"]), BASE).unwrap();
    store.create(&new("two", &["a"]), BASE).unwrap();
    let highest = store.list().unwrap().lvs.iter().map(|lv| lv.seq).max();
    // As crashes leave them.
    for place in ["~new", "~old.7"] {
        fs::create_dir(dir.join(place)).unwrap();
        fs::write(dir.join(place).join("image"), "half").unwrap();
    }
    let unmade = dir.join("one/tags.json~");
    for spoilt in ["", "x", "0"] {
        fs::write(&unmade, "{\"seq\": 1, ").unwrap();
        fs::write(dir.join("~seq"), spoilt).unwrap();
        let before = store.list().unwrap();
        let store = disk.open();
        assert_eq!(store.list().unwrap().lvs, before.lvs);
        assert!(!dir.join("~new").exists() && !dir.join("~old.7").exists());
        assert!(!unmade.exists());
        store
            .change_tags(&lv("one"), &new("x", &["b"]).tags, &[])
            .unwrap();
        store.create(&new("three", &[]), BASE).unwrap();
        let made = store.list().unwrap().lvs;
        let made = made.iter().find(|lv| lv.name.as_str() == "three").unwrap();
        assert!(Some(made.seq) > highest);
        store.remove(&lv("three")).unwrap();
    }
    // Also while the store is open.
    fs::remove_file(dir.join("~seq")).unwrap();
    store.create(&new("four", &[]), BASE).unwrap();
    let made = store.list().unwrap().lvs;
    assert!(made.iter().map(|lv| lv.seq).max() > highest);
    // What is not ours by its first letters is not ours.
    assert_eq!(
        fs::read_dir(&dir).unwrap().count(),
        6,
        "base, one, two, four, ~seq, ~lock"
    );
}

/// An entry is evicted where nothing at all can be written, and those who watch see it.
fn not_one_free_block() {
    for fs in ["xfs", "btrfs"] {
        let disk = Disk::new(fs);
        let (dir, store) = (disk.dir(), disk.open());
        for name in ["one", "two"] {
            let entry = new(name, &["friend:snapshot", "friend:cache:a"]);
            store.create(&entry, BASE).unwrap();
        }
        let image = File::options().write(true).open(dir.join("one/image"));
        image.unwrap().write_all_at(&vec![1; 8 << 20], 0).unwrap();
        run("sync", ["--file-system".as_ref(), dir.as_os_str()]);
        let highest = store.list().unwrap().lvs.iter().map(|lv| lv.seq).max();

        let ballast = disk.0.path().join("ballast");
        let mut file = File::create(&ballast).unwrap();
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![1; size]).is_ok() && file.sync_data().is_ok() {}
        }
        // What is left in half-used blocks, too.
        for number in 0.. {
            if fs::write(disk.0.path().join(format!("small{number}")), [1; 4096]).is_err() {
                break;
            }
        }
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        watch
            .add_watch(&dir, AddWatchFlags::IN_CLOSE_WRITE)
            .unwrap();

        let evicted = Evicted {
            lv: "one".into(),
            reason: "full".into(),
            scope: None,
            tags: vec!["a".into()],
            created: 0,
            used: 0,
            exclusive: None,
        };
        // Marked or not: there may be no room for that.
        bounds::mark(&store, &lv("one"), &evicted).unwrap();
        store.remove(&lv("one")).unwrap();
        let told = watch.read_events().unwrap();
        assert!(told.iter().any(|event| event.name == Some("~seq".into())));
        let left: BTreeSet<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(
            !left
                .iter()
                .any(|name| name == "one" || name.starts_with("~old"))
        );
        assert!(left.contains("two"));

        drop(file);
        fs::remove_file(&ballast).unwrap();
        wait_until(|| match store.create(&new("three", &[]), BASE) {
            Ok(_) => true,
            // Freed behind the scenes.
            Err(StoreError::Full { .. }) => false,
            Err(error) => panic!("{error}"),
        });
        let made = store.list().unwrap().lvs;
        let made = made.iter().find(|lv| lv.name.as_str() == "three").unwrap();
        assert!(Some(made.seq) > highest);
    }
}

/// What a removal cannot free is freed by the next try, and its number is not given again.
fn freed_in_the_end() {
    let disk = Disk::new("xfs");
    let (dir, store) = (disk.dir(), disk.open());
    for name in ["one", "two"] {
        store.create(&new(name, &[]), BASE).unwrap();
    }
    let olds = || {
        let names = fs::read_dir(&dir).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("~old")).count()
    };
    let image = dir.join("one/image");
    run("chattr", ["+i".as_ref(), image.as_os_str()]);
    assert!(store.remove(&lv("one")).is_err());
    assert_eq!((store.list().unwrap().lvs.len(), olds()), (2, 1));
    // The number that this one's removal was given is lost.
    fs::write(dir.join("~seq"), "").unwrap();
    assert!(store.remove(&lv("two")).is_err());
    assert_eq!(store.list().unwrap().lvs.len(), 1);
    disk.open();
    let old = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let stuck = old
        .map(|old| old.join("image"))
        .find(|image| File::options().append(true).open(image).is_err() && image.exists());
    run("chattr", ["-i".as_ref(), stuck.unwrap().as_os_str()]);
    store.remove(&lv("one")).unwrap();
    assert_eq!(olds(), 0);
}

mod ioctl {
    nix::ioctl_readwrite!(freeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);
}

fn frozen() {
    let disk = Disk::new("xfs");
    let store = disk.open();
    for fs in [FsType::Xfs, FsType::Ext4] {
        let device = store.create(&active("one"), BASE).unwrap().unwrap();
        make(&device, fs).unwrap();
        let mounted = Mounted::device(&device, fs).unwrap();
        let fd = mounted.root().as_raw_fd();
        let freeze = || {
            // SAFETY: FIFREEZE looks at no argument.
            unsafe { ioctl::freeze(fd, &mut 0) }.unwrap();
        };
        let thaw = || {
            // SAFETY: FITHAW looks at no argument.
            unsafe { ioctl::thaw(fd, &mut 0) }
        };
        let not_frozen = Err(nix::Error::EINVAL);
        assert_eq!(thaw(), not_frozen);
        freeze();
        assert_eq!(thaw(), Ok(0));

        freeze();
        let other = disk.open();
        other.list().unwrap();
        assert_eq!(thaw(), Ok(0), "a command thaws nothing");
        freeze();
        other.thaw().unwrap();
        assert_eq!(thaw(), not_frozen, "a daemon that starts does");
        freeze();
        // Whether it is frozen, or another freeze waits still for a process that is inside a write, cannot be told.
        let refused = store.snapshot(&lv("one"), &new("two", &[]));
        assert!(matches!(refused, Err(StoreError::Unfreezable { .. })));
        assert_eq!(thaw(), Ok(0), "what others froze stays frozen");
        store.snapshot(&lv("one"), &new("two", &[])).unwrap();
        assert_eq!(thaw(), not_frozen, "a snapshot thaws");
        store.snapshot(&lv("one"), &new("three", &[])).unwrap();
        assert_eq!(thaw(), not_frozen);
        assert!(store.snapshot(&lv("one"), &new("two", &[])).is_err());
        assert_eq!(thaw(), not_frozen, "and so does a failed one");

        // One that has shut down keeps nobody from the others.
        shut_down_now(&mounted);
        store.snapshot(&lv("two"), &new("four", &[])).unwrap();
        assert!(store.snapshot(&lv("one"), &new("five", &[])).is_err());
        assert_eq!(disk.open().list().unwrap().lvs.len(), 5);
        drop(mounted);
        for name in ["one", "two", "three", "four"] {
            wait_until(|| !matches!(store.remove(&lv(name)), Err(StoreError::Busy(_))));
        }
        assert_eq!(store.list().unwrap().lvs.len(), 1);
    }
}

/// What is written takes a second to get to the disk, and a file system is frozen when one write after the other is there.
fn on_a_slow_disk() {
    const DEVICE: &str = "slow";
    const AT: &str = "/mnt/slow";
    run("modprobe", ["dm-delay"]);
    let sectors = run("blockdev", ["--getsz", DISK]);
    let sectors = sectors.trim();
    let quick = format!("0 {sectors} linear {DISK} 0");
    run("dmsetup", ["create", DEVICE, "--table", &quick]);
    sh(&format!(
        "mkfs.xfs -q -f /dev/mapper/{DEVICE}; mkdir {AT}; mount /dev/mapper/{DEVICE} {AT}"
    ));
    let dir = Path::new(AT).join("store");
    reflink::init(&dir, BASE).unwrap();
    let store = ReflinkStore::open(&dir).unwrap();
    let device = store.create(&active("one"), BASE).unwrap().unwrap();
    make(&device, FsType::Xfs).unwrap();
    let mounted = Mounted::device(&device, FsType::Xfs).unwrap();

    load(
        DEVICE,
        &format!("0 {sectors} delay {DISK} 0 0 {DISK} 0 1000"),
    );
    let over = AtomicBool::new(false);
    let made = thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let name = format!("file{}", number % 1000);
                fs::write(store::inside(&mounted, &name), vec![1; 1 << 16]).unwrap();
                thread::sleep(Duration::from_millis(10));
            }
        });
        let made = store.snapshot(&lv("one"), &new("two", &[]));
        over.store(true, Ordering::Relaxed);
        made
    });
    load(DEVICE, &quick);
    made.unwrap();
    drop(mounted);
    drop(store);
    sh(&format!(
        "losetup --detach {}; umount {AT}; dmsetup remove {DEVICE}; wipefs --quiet --all {DISK}",
        device.display()
    ));
}

/// What [`killed`] kills: makes, tags and removes, for ever.
fn churn() {
    let store = ReflinkStore::open(Path::new(&std::env::var_os("STORE").unwrap())).unwrap();
    let mut number = 0;
    loop {
        number += 1;
        let name = format!("churn-{}-{number}", std::process::id());
        let made = NewLv {
            active: number % 3 == 0,
            ..new(&name, &FIRST)
        };
        store.snapshot(&lv("origin"), &made).unwrap();
        let (add, del) = (new("x", &SECOND).tags, new("x", &FIRST).tags);
        store.change_tags(&lv(&name), &add, &del).unwrap();
        if number % 2 == 0 {
            store.remove(&lv(&name)).unwrap();
        }
    }
}

const FIRST: [&str; 4] = ["friend:snapshot", "friend:making", "a", "b"];
const SECOND: [&str; 3] = ["friend:cache:x", "friend:cache:y", "c"];

fn killed() {
    let disk = Disk::new("xfs");
    let store = disk.open();
    let base = store.list().unwrap().lvs[0].name.clone();
    let device = store.snapshot(&base, &active("origin")).unwrap().unwrap();
    let mounted = Mounted::device(&device, FsType::Xfs).unwrap();
    let inside = format!("/proc/self/fd/{}/file", mounted.root().as_raw_fd());
    let mut seen = 0;
    let mut last = 0;
    for round in 0..40_u64 {
        let mut child = Command::new(this_binary())
            .args(["guest-one", "part::reflink::churn"])
            .env("STORE", disk.dir())
            .spawn()
            .unwrap();
        // Once it is at work, each time elsewhere.
        let at_work = format!("churn-{}-1", child.id());
        wait_until(|| disk.dir().join(&at_work).exists());
        std::thread::sleep(Duration::from_micros(round * 7_919 % 60_000));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));

        let store = disk.open();
        // Would wait for ever if it were still frozen.
        fs::write(&inside, round.to_string()).unwrap();
        let names = fs::read_dir(disk.dir()).unwrap();
        for name in names {
            let name = name.unwrap().file_name();
            assert!(
                name != "~new" && !name.to_string_lossy().starts_with("~old"),
                "{name:?}"
            );
        }
        let lvs = store.list().unwrap().lvs;
        let numbers: BTreeSet<_> = lvs.iter().map(|lv| lv.seq).collect();
        assert_eq!(numbers.len(), lvs.len());
        for lv in lvs {
            if !lv.name.as_str().starts_with("churn") {
                continue;
            }
            seen += 1;
            assert!(lv.seq > last, "{lv:?}, after {last}");
            let mut tags: Vec<_> = lv.tags.iter().map(Tag::as_str).collect();
            tags.sort_unstable();
            let whole = [&FIRST[..], &SECOND].map(|tags| {
                let mut tags = tags.to_vec();
                tags.sort_unstable();
                tags
            });
            assert!(whole.contains(&tags), "{lv:?}");
            assert_eq!((lv.size, lv.origin), (BASE, Some(self::lv("origin"))));
            let device = store.activate(&lv.name).unwrap();
            drop(Mounted::device(&device, FsType::Xfs).unwrap());
            store.remove(&lv.name).unwrap();
        }
        last = numbers.last().copied().unwrap();
    }
    assert!(seen >= 40, "only {seen} volumes were seen");
}

fn names_of_files() {
    let disk = Disk::new("xfs");
    let store = disk.open();
    let names = [
        "image",
        "tags.json",
        "...",
        ".x",
        "new",
        "seq",
        "lost+found",
        "_-+.",
        "0",
    ];
    for name in names {
        store.create(&new(name, &[name]), BASE).unwrap();
    }
    let listed = disk.open().list().unwrap().lvs;
    for name in names {
        let found = listed.iter().find(|lv| lv.name.as_str() == name).unwrap();
        assert_eq!(found.tags, new(name, &[name]).tags);
        store.remove(&lv(name)).unwrap();
    }
    assert_eq!(store.list().unwrap().lvs.len(), 1);
}
