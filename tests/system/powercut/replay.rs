// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The power is cut at every moment there is: all writes to a store's disk are logged while entries are published, imported, tagged and
//! removed, and the store is brought up from what the disk held at each flush, without what was written and not flushed by then, and
//! with some of it.

use std::fs::{self, File};
use std::path::Path;
use std::time::Instant;

use super::{Told, keep, look_at, make, remove, tag};
use crate::harness::{Group, Test, Tier, test};
use crate::support::census::{Census, Known, mounts, no_lost_ids, settled};
use crate::support::command::{outcome, run, sh};
use crate::support::content::{self, Content, Random};
use crate::support::daemon::{Daemon, friend};
use crate::support::lvm::{TestVg, clear};
use crate::support::site::Kind;
use crate::support::wait_until;
use crate::support::writes::{Entry, Log, What};

/// At how many moments, in `make test`.
const SOME: usize = 5;

/// Parts of the guest's disk: a name, and a size in MiB. There is room for all of them.
const PARTS: [(&str, u64); 4] = [
    ("written", SIZE),
    ("log", 1536),
    ("replayed", SIZE),
    ("since", 1024),
];
const SIZE: u64 = 2560;

/// The disk that a store is on: one whose writes are logged, and later what it held at some moment.
const DISK: &str = "disk";
const DEVICE: &str = "/dev/mapper/disk";

const CONFIG: &str = "/tmp/config.toml";
const MOUNTED: &str = "/tmp/store";

/// What LVM keeps its description of the group in, in bytes from the disk's beginning: `pe_start`.
const DESCRIPTION: u64 = 1 << 20;

/// With what the store is made, all of it is flushed.
const READY: &str = "ready";

pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (name, kind) in [("lvm", Kind::Lvm), ("reflink", Kind::Reflink)] {
        let mut add = |part: &str, at_most, seconds| {
            let body = move || replay(kind, at_most);
            let name = format!("{part}::replay_{name}");
            tests.push(test(Tier::Guest(Group::Lvm), name, body).timeout(seconds));
        };
        add("powercut", SOME, 600);
        add("torture", usize::MAX, 3600);
    }
    tests
}

fn replay(kind: Kind, at_most: usize) {
    let mut random = Random::from_clock();
    let disk = Disk::new(kind);
    disk.record();
    let log = Log::read(Path::new("/dev/mapper/log")).unwrap();
    let ready = log.entries.iter().position(|entry| entry.is_mark(READY));
    let ready = ready.expect("it is marked") + 1;
    let chosen = choose(&log, ready, at_most, &mut random);
    let (mut done, mut partly) = (0, 0);
    let began = Instant::now();
    let replayed = File::options()
        .write(true)
        .open("/dev/mapper/replayed")
        .unwrap();
    for &point in &chosen {
        log.apply(&log.entries[done..point], &replayed).unwrap();
        done = point;
        // What a client was told after this flush and before the next one rests on this one.
        let next = (point..log.entries.len()).find(|at| log.entries[*at].lasts());
        let group = &log.entries[point..next.unwrap_or(log.entries.len())];
        let told = log.entries[..point].iter().chain(group).filter_map(mark);
        let told = Told::of(told);
        disk.cut(&mut random);
        if random.below(3) == 0 {
            partly += 1;
            let landed = some_of(kind, group, &mut random);
            let device = File::options().write(true).open(DEVICE).unwrap();
            log.apply(landed, &device).unwrap();
        }
        println!("after entry {point}: {told:?}");
        disk.look(&told, &mut random);
    }
    println!(
        "{kind:?}: brought up from {} of {} moments in {:.0?}, {partly} times with some of what was written after the flush",
        chosen.len(),
        moments(&log, ready).len(),
        began.elapsed(),
    );
}

/// The moments at which the disk for certain holds something else than at the one before.
fn moments(log: &Log, from: usize) -> Vec<usize> {
    let mut changed = false;
    let mut moments = Vec::new();
    for (at, entry) in log.entries.iter().enumerate().skip(from) {
        changed |= match &entry.what {
            What::Write(place, _) => !place.is_empty(),
            What::Discard(_) => true,
            // What was promised is another thing.
            What::Mark(_) => true,
        };
        if entry.lasts() && changed {
            moments.push(at + 1);
            changed = false;
        }
    }
    moments
}

fn choose(log: &Log, from: usize, at_most: usize, random: &mut Random) -> Vec<usize> {
    let mut moments = moments(log, from);
    while moments.len() > at_most {
        moments.remove(random.below(moments.len() as u64) as usize);
    }
    moments
}

/// Some of what was written and not flushed. LVM writes the group's new description and then, with no flush between the two, which
/// one is valid: a disk that may write the second and lose the first is more than LVM can stand, so those stay in order.
fn some_of<'a>(kind: Kind, group: &'a [Entry], random: &mut Random) -> Vec<&'a Entry> {
    let mut in_order = true;
    let is_description = |entry: &Entry| match &entry.what {
        What::Write(place, _) => kind == Kind::Lvm && place.start < DESCRIPTION,
        _ => false,
    };
    group
        .iter()
        .filter(|entry| {
            let lands = random.below(2) == 0;
            if is_description(entry) {
                in_order &= lands;
                in_order
            } else {
                lands
            }
        })
        .collect()
}

fn mark(entry: &Entry) -> Option<&str> {
    match &entry.what {
        What::Mark(text) => Some(text),
        _ => None,
    }
}

impl Entry {
    fn is_mark(&self, text: &str) -> bool {
        mark(self) == Some(text)
    }

    /// Whether the disk has something for certain by its answer to this.
    fn lasts(&self) -> bool {
        self.flush || self.fua
    }
}

/// A line among the writes: one word of a message, in which the kernel takes a blank behind a backslash for a part of it.
fn tell(line: &str) {
    let mark = line.replace(' ', "\\ ");
    run("dmsetup", ["message", DISK, "0", "mark", &mark]);
}

/// Device-mapper devices on the guest's disk, and its LVM, which sees one of them alone.
struct Disk {
    kind: Kind,
    lvm: String,
}

const LVM: &str = "/etc/lvm/lvmlocal.conf";
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

impl Disk {
    fn new(kind: Kind) -> Self {
        clear();
        sh("modprobe -a dm-log-writes dm-snapshot");
        let lvm = fs::read_to_string(LVM).unwrap();
        let one = format!("filter=[\"a|^{DEVICE}$|\",\"r|.*|\"]");
        let filter = lvm.find("filter=[").expect("as tests/vm/guest wrote it");
        let end = filter + lvm[filter..].find(']').unwrap() + 1;
        fs::write(LVM, format!("{}{one}{}", &lvm[..filter], &lvm[end..])).unwrap();
        let mut at = 1;
        for (name, mib) in PARTS {
            let table = format!("0 {} linear /dev/vda {}", mib << 11, at << 11);
            run("dmsetup", ["create", name, "--table", &table]);
            at += mib;
        }
        Self { kind, lvm }
    }

    fn store(&self) -> String {
        match self.kind {
            Kind::Lvm => TestVg::NAME.to_owned(),
            Kind::Reflink => format!("{MOUNTED}/caches"),
            Kind::Rbd => unreachable!("its disks are the cluster's"),
        }
    }

    /// Work, with all that is written to the disk in the log, and what clients were told.
    fn record(&self) {
        let table = format!(
            "0 {} log-writes /dev/mapper/written /dev/mapper/log",
            SIZE << 11
        );
        run("dmsetup", ["create", DISK, "--table", &table]);
        let store = self.store();
        let config = Path::new(CONFIG);
        // Another test of this guest may have failed over it.
        let _ = fs::remove_file(config);
        match self.kind {
            Kind::Lvm => {
                run("vgcreate", ["--quiet", &store, DEVICE]);
                let options = ["--vg", &store, "--size", "2G", "--base-size", "320M"];
                friend(config, &[&["init"][..], &options].concat());
            }
            Kind::Reflink => {
                run("mkfs.xfs", ["-q", DEVICE]);
                self.mount();
                let options = ["--reflink", &store, "--base-size", "320M"];
                friend(config, &[&["init"][..], &options].concat());
                run("sync", ["--file-system", MOUNTED]);
            }
            Kind::Rbd => unreachable!("its disks are the cluster's"),
        }
        File::open(DEVICE).unwrap().sync_all().unwrap();
        tell(READY);
        self.work(config);
        self.take_down();
    }

    fn work(&self, config: &Path) {
        let daemon = Daemon::start(config);
        let plugin = daemon.plugin();
        let store = self.store();
        super::job(plugin, tell, "a", 1);
        make(plugin, tell, "kept", &serde_json::json!({}));
        keep(plugin, tell, 2);
        let dir = tempfile::tempdir().unwrap();
        content::write(dir.path(), 3);
        let from = dir.path().to_str().unwrap();
        friend(config, &["import", from, "--tags", "job-3"]);
        tell("imported 3");
        super::job(plugin, tell, "a", 4);
        let census = Census::of(self.kind, &store);
        let entry = |job| census.with_tag(&tag(job))[0].to_owned();
        for (command, before, after) in [
            ("pin", "pinning", "pinned"),
            ("unpin", "unpinning", "unpinned"),
            ("pin", "pinning", "pinned"),
        ] {
            tell(&format!("{before} 1"));
            friend(config, &[command, &entry(1)]);
            tell(&format!("{after} 1"));
        }
        tell("unpublishing 3");
        friend(config, &["remove", &entry(3)]);
        tell("unpublished 3");
        remove(plugin, tell, "kept");
        settled(self.kind, &store, &[Known::idle("a")]);
        daemon.stop();
    }

    fn mount(&self) {
        fs::create_dir_all(MOUNTED).unwrap();
        run("mount", ["-o", "discard", DEVICE, MOUNTED]);
    }

    /// What the replayed disk holds, to be written to and then forgotten; and a machine that was just booted.
    fn cut(&self, random: &mut Random) {
        let table = format!(
            "0 {} snapshot /dev/mapper/replayed /dev/mapper/since N 8",
            SIZE << 11
        );
        run("dmsetup", ["create", DISK, "--table", &table]);
        for left in [
            "/run/lvm-cache-friend",
            "/run/lvm",
            "/etc/lvm/backup",
            "/etc/lvm/archive",
        ] {
            let _ = fs::remove_dir_all(left);
        }
        outcome("umount", [BOOT]);
        let mut id = fs::read_to_string(BOOT).unwrap();
        id.replace_range(..8, &format!("{:08x}", random.next() as u32));
        fs::write("/tmp/boot-id", id).unwrap();
        run("mount", ["--bind", "/tmp/boot-id", BOOT]);
    }

    /// Brings the store up as after a boot, looks at all of it, and takes it down.
    fn look(&self, told: &Told, random: &mut Random) {
        if self.kind == Kind::Reflink {
            self.mount();
        }
        let store = self.store();
        let daemon = Daemon::start(Path::new(CONFIG));
        let census = told.holds(self.kind, &store, daemon.plugin());
        look_at(&census, &Default::default());
        no_lost_ids(self.kind, &store);
        // What a volume gives is an entry's, or nothing; a kept one's is its own.
        let plugin = daemon.plugin();
        let names = plugin.names();
        if !names.is_empty() {
            let name = &names[random.below(names.len() as u64) as usize];
            let found = content::try_read(&plugin.mount(name, "x"));
            if name == "kept" {
                if let Some(kept) = told.kept {
                    assert_eq!(found, Ok(kept));
                }
            } else {
                match found {
                    Ok(Content::Blank) => {}
                    Ok(Content::Whole(job)) => assert!(
                        !census.with_tag(&tag(job)).is_empty(),
                        "{job} is no entry's"
                    ),
                    Err(wrong) => panic!("{name}: {wrong}"),
                }
            }
        }
        daemon.kill();
        self.take_down();
    }

    /// Nothing is mounted then, and there is no disk.
    fn take_down(&self) {
        for at in mounts() {
            outcome("umount", [at]);
        }
        outcome("umount", ["--recursive", "/run/lvm-cache-friend/mnt"]);
        wait_until(|| {
            let down = match self.kind {
                Kind::Lvm => outcome("vgchange", ["--quiet", "--activate", "n", TestVg::NAME]),
                Kind::Reflink => {
                    outcome("losetup", ["--detach-all"]);
                    outcome("umount", [MOUNTED])
                }
                Kind::Rbd => unreachable!("its disks are the cluster's"),
            };
            down.status == 0
        });
        wait_until(|| outcome("dmsetup", ["remove", DISK]).status == 0);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            outcome("umount", [BOOT]);
            fs::write(LVM, &self.lvm).unwrap();
            clear();
        }
    }
}
