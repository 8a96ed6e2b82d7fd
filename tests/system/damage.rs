// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries whose file systems are damaged: given up, and the next best one used.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::Test;
use crate::support::ceph;
use crate::support::command::run;
use crate::support::content::{self, Content};
use crate::support::daemon::Daemon;
use crate::support::site::{Kind, Site, with_each_local_store};

/// Where, in bytes, and how much.
type Hits = Vec<(u64, u64)>;

pub fn tests() -> Vec<Test> {
    // On Ceph an entry is a snapshot, which no client can write to: nothing can damage it but the cluster itself.
    with_each_local_store(
        "damage",
        &[
            ("of_an_xfs", of_an_xfs),
            ("of_an_ext4", of_an_ext4),
            ("that_shows_in_use", in_use),
        ],
    )
}

fn of_an_xfs(kind: Kind) {
    let drill = Drill::new(kind, "xfs");
    for (what, part) in [
        ("its beginning", Part::Start),
        ("the free space's header", Part::Agf),
        ("the inodes' header", Part::Agi),
        ("the log", Part::Log),
        ("the root directory's inode", Part::Root),
    ] {
        println!("{what}");
        let bad = drill.publish_damaged(|device| Xfs::read(device).part(part));
        drill.next_best(&bad);
    }
}

fn of_an_ext4(kind: Kind) {
    let drill = Drill::new(kind, "ext4");
    let journal = |device: &Path| {
        let blocks = run(
            "debugfs",
            ["-R".as_ref(), "blocks <8>".as_ref(), device.as_os_str()],
        );
        let first: u64 = blocks.split_whitespace().next().unwrap().parse().unwrap();
        vec![(first * 4096, 4096)]
    };
    for (what, hits) in [
        (
            "its beginning",
            &(|_: &Path| -> Hits { vec![(0, 1 << 20)] }) as &dyn Fn(&Path) -> Hits,
        ),
        ("the groups' descriptors", &|_| vec![(4096, 4096)]),
        ("the journal", &journal),
    ] {
        println!("{what}");
        let bad = drill.publish_damaged(hits);
        drill.next_best(&bad);
    }
}

/// It mounts, and fails who writes to it.
fn in_use(kind: Kind) {
    let drill = Drill::new(kind, "xfs");
    let bad = drill.publish_damaged(|device| Xfs::read(device).part(Part::Agfl));
    let plugin = drill.daemon.plugin();
    plugin.create("v", &drill.reader());
    let at = plugin.mount("v", "x");
    let written = content::try_write(&at, 3).and_then(|()| File::open(&at)?.sync_all());
    assert!(written.is_err(), "this damage does not show");
    plugin.unmount("v", "x");
    plugin.remove("v");
    drill.gave_up(&bad);
    drill.next_best(&bad);
}

/// A store with two entries at most: a good one that holds 1, and a newer one.
struct Drill {
    // Ended first: it would bring the pool up again under who takes it down.
    daemon: Daemon,
    site: Site,
    fs: &'static str,
    good: BTreeSet<String>,
}

impl Drill {
    fn new(kind: Kind, fs: &'static str) -> Self {
        let site = Site::new(kind);
        let daemon = site.serve();
        let mut drill = Self {
            daemon,
            site,
            fs,
            good: BTreeSet::new(),
        };
        drill.good = drill.publish(1);
        drill
    }

    fn reader(&self) -> Value {
        json!({"restore": "a", "fs": self.fs})
    }

    /// The entries that there are after one more.
    fn publish(&self, number: u64) -> BTreeSet<String> {
        let plugin = self.daemon.plugin();
        plugin.create("w", &json!({"restore": "a", "save": "a", "fs": self.fs}));
        let at = plugin.mount("w", "x");
        content::write(&at, number);
        plugin.unmount("w", "x");
        plugin.remove("w");
        self.site.settled(&[]).entries()
    }

    /// A new entry, parts of which are gone.
    fn publish_damaged(&self, hits: impl Fn(&Path) -> Hits) -> String {
        let entries = self.publish(2);
        let [bad] = &entries.difference(&self.good).collect::<Vec<_>>()[..] else {
            panic!("{entries:?}");
        };
        let device = Written::new(&self.site, bad);
        for (at, length) in hits(&device.path) {
            device.hit(at, length);
        }
        (*bad).clone()
    }

    fn gave_up(&self, bad: &str) {
        assert_eq!(self.site.settled(&[]).entries(), self.good);
        let log = self.daemon.log();
        let told = |line: &str| line.contains("damaged") && line.contains(bad);
        assert!(log.lines().any(told));
    }

    /// The next volume has the good one's content.
    fn next_best(&self, bad: &str) {
        let plugin = self.daemon.plugin();
        plugin.create("v", &self.reader());
        let at = plugin.mount("v", "x");
        assert_eq!(content::read(&at), Content::Whole(1));
        plugin.unmount("v", "x");
        plugin.remove("v");
        self.site.settled(&[]);
        self.gave_up(bad);
    }
}

/// Parts of an XFS.
#[derive(Clone, Copy)]
enum Part {
    Start,
    Agf,
    Agi,
    /// In all groups: a mount does not look at them.
    Agfl,
    Log,
    Root,
}

/// Where they are: `struct xfs_dsb`.
struct Xfs(Vec<u8>);

impl Xfs {
    fn read(device: &Path) -> Self {
        let mut head = vec![0; 512];
        File::open(device)
            .unwrap()
            .read_exact_at(&mut head, 0)
            .unwrap();
        assert!(head.starts_with(b"XFSB"));
        Self(head)
    }

    fn number(&self, at: usize, length: usize) -> u64 {
        self.0[at..at + length]
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The place in bytes of a block, whose address is a group's number and one in the group.
    fn place(&self, address: u64) -> u64 {
        let bits = self.number(124, 1);
        let (group, block) = (address >> bits, address & ((1 << bits) - 1));
        (group * self.number(84, 4) + block) * self.number(4, 4)
    }

    fn part(&self, part: Part) -> Hits {
        let (block, sector) = (self.number(4, 4), self.number(102, 2));
        let groups = self.number(88, 4);
        match part {
            Part::Start => vec![(0, 1 << 20)],
            Part::Agf => vec![(sector, sector)],
            Part::Agi => vec![(2 * sector, sector)],
            Part::Agfl => (0..groups)
                .map(|group| (group * self.number(84, 4) * block + 3 * sector, sector))
                .collect(),
            // All of it: what lies before its head is not looked at.
            Part::Log => vec![(self.place(self.number(48, 8)), self.number(96, 4) * block)],
            Part::Root => vec![(self.place(self.number(56, 8) >> self.number(123, 1)), block)],
        }
    }
}

/// An entry to be written to.
pub struct Written<'a> {
    site: &'a Site,
    pub path: PathBuf,
    _device: Option<ceph::Mapped>,
}

impl<'a> Written<'a> {
    pub fn new(site: &'a Site, entry: &str) -> Self {
        let mut device = None;
        let path = match site.kind {
            Kind::Lvm => {
                let lv = format!("{}/{entry}", site.store());
                run("lvchange", ["-q", "-K", "-ay", &lv]);
                Path::new("/dev").join(lv)
            }
            Kind::Reflink => Path::new(&site.store()).join(entry).join("image"),
            Kind::Rbd => {
                let volume = &ceph::listed("volume")[entry];
                let (image, snapshot) = ceph::image_of(volume);
                let mapped = ceph::Mapped::new(image, snapshot, &[]);
                device.insert(mapped).0.clone()
            }
        };
        Self {
            site,
            path,
            _device: device,
        }
    }

    /// No magic number, no checksum outlives this.
    pub fn hit(&self, at: u64, length: u64) {
        let file = File::options().write(true).open(&self.path).unwrap();
        file.write_all_at(&vec![0xa5; usize::try_from(length).unwrap()], at)
            .unwrap();
        file.sync_all().unwrap();
    }
}

impl Drop for Written<'_> {
    fn drop(&mut self) {
        if self.site.kind == Kind::Lvm {
            run(
                "lvchange",
                ["-q".as_ref(), "-an".as_ref(), self.path.as_os_str()],
            );
        }
    }
}
