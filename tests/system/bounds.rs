// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bounds: which entries go, when, and what a job in another volume notices of it: nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Group, Test, Tier, test};
use crate::jobs::ask_here;
use crate::support::census::{Census, Known};
use crate::support::command::{outcome, run, sh};
use crate::support::content::{self, Content};
use crate::support::daemon::{Daemon, Plugin};
use crate::support::disks::statvfs;
use crate::support::lvm::{DISK, TestVg};
use crate::support::site::{Kind, Site, with_each_local_store, with_each_store};
use crate::support::wait_until;

#[allow(dead_code, reason = "the benches use more of it")]
#[path = "../../benches/ratios/dm.rs"]
mod dm;

const MIB: usize = 1 << 20;

pub fn tests() -> Vec<Test> {
    let mut tests = with_each_store("bounds", &[("never_shrunk", never_shrunk)]);
    // On Ceph how full the pool is comes from its manager, seconds late: it is not told to the MiB that these tests look at.
    tests.extend(with_each_local_store(
        "bounds",
        &[
            ("of_data", of_data),
            ("who_fills_the_store_is_cut_off", cut_off),
        ],
    ));
    tests.extend([
        test(Tier::Reflink, "bounds::by_number", by_number),
        test(Tier::Reflink, "bounds::trimmed", trimmed),
        test(Tier::Guest(Group::Lvm), "bounds::of_metadata", of_metadata),
        test(
            Tier::Guest(Group::Lvm),
            "bounds::of_the_group",
            of_the_group,
        ),
    ]);
    tests
}

/// A job that goes on writing and reading in a volume of its own, and notices nothing.
struct Bystander {
    stop: Arc<AtomicBool>,
    job: JoinHandle<u64>,
}

impl Bystander {
    fn start(plugin: &Plugin) -> Self {
        plugin.create("bystander", &json!({}));
        let at = plugin.mount("bystander", "x");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let job = thread::spawn(move || {
            let mut number = 0;
            while !stopped.load(Ordering::Relaxed) {
                number += 1;
                content::write(&at, number);
                run("sync", ["--file-system".as_ref(), at.as_os_str()]);
                assert_eq!(content::read(&at), Content::Whole(number));
                // Not all that a guest's one processor can do.
                thread::sleep(Duration::from_millis(500));
            }
            number
        });
        Self { stop, job }
    }

    fn end(self, plugin: &Plugin) {
        self.stop.store(true, Ordering::Relaxed);
        let rounds = self.job.join().expect("it notices nothing");
        println!("the job beside it: {rounds} rounds");
        assert!(rounds > 1);
        plugin.unmount("bystander", "x");
    }
}

/// Publishes an entry with one tag and returns its LV.
fn publish(site: &Site, plugin: &Plugin, tag: &str, work: impl FnOnce(&Path)) -> String {
    let before = site.census().entries();
    plugin.create(tag, &json!({"save": tag, "restore": tag}));
    let at = plugin.mount(tag, "x");
    work(&at);
    plugin.unmount(tag, "x");
    let mut made = BTreeSet::new();
    wait_until(|| {
        made = site
            .census()
            .entries()
            .difference(&before)
            .cloned()
            .collect();
        !made.is_empty()
    });
    plugin.remove(tag);
    assert_eq!(made.len(), 1);
    made.pop_first().unwrap()
}

fn entries_are(site: &Site, want: &[&String]) {
    let want: BTreeSet<String> = want.iter().map(ToString::to_string).collect();
    wait_until(|| site.census().entries() == want);
}

/// The names that `gc` says, and a reason.
fn gc(site: &Site, options: &[&str]) -> Vec<String> {
    let text = site.done(&[&["gc", "--json"], options].concat());
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    rows.iter()
        .map(|row| {
            assert!(row["last_use"].is_string() && !row["tags"].as_array().unwrap().is_empty());
            format!(
                "{}: {}",
                row["name"].as_str().unwrap(),
                row["reason"].as_str().unwrap()
            )
        })
        .collect()
}

fn used(census: &Census, entry: &str) -> usize {
    let tags = &census.lvs[entry];
    tags.iter()
        .filter(|tag| tag.starts_with("friend:used:"))
        .count()
}

/// Two jobs write; the one that is trusted less, and writes more, is cut off before the store is full.
fn cut_off(kind: Kind) {
    let site = Site::new(kind);
    let free = match kind {
        Kind::Reflink => {
            let stat = statvfs(Path::new(&site.store())).unwrap();
            stat.blocks_available() * stat.fragment_size()
        }
        // Of the pool.
        Kind::Lvm => 5 << 30,
        Kind::Rbd => unreachable!("see `tests`"),
    };
    // Far from what really fills it.
    site.configure(&format!("policy.cut-off = \"{}M\"\n", (free >> 20) - 400));
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let scope = "api.github.com:1";
    plugin.create("calm", &json!({"save": "calm", "scope": scope}));
    let stranger = format!("{scope}:pull_request:fork/2/x");
    plugin.create(
        "job",
        &json!({"type": "job", "save": "hog", "scope": stranger, "size": "2G"}),
    );
    let calm = plugin.mount("calm", "x");
    let at = plugin.mount("job", "x");
    assert!(ask_here(&at, "mount hog\n").contains("ok "));
    let file = File::create(at.join("hog/file")).unwrap();
    let block: Vec<u8> = (0..4 * MIB).map(|n| (n / 7) as u8).collect();
    let mut written = 0;
    let error = loop {
        // In place from 1 GiB on: there is always room in the file system itself.
        let put = file
            .write_all_at(&block, (written % (256 * block.len())) as u64)
            .and_then(|()| file.sync_data());
        written += block.len();
        match put {
            Ok(()) if written == 32 * block.len() => content::write(&calm, 1),
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    file.set_len(0).unwrap_err();
    content::write(&calm, 2);
    let status = ask_here(&at, "status\n");
    assert!(status.contains("cut-off=1"), "{status}");
    let refused = ask_here(&at, "save hog\n");
    assert!(refused.contains("filled the store"), "{refused}");
    drop(file);
    plugin.unmount("job", "x");
    plugin.unmount("calm", "x");
    let last = |name: &str| plugin.status(name)["last_lease"].clone();
    wait_until(|| last("calm")["published"].is_string());
    wait_until(|| last("job")["hog"]["why"].is_string());
    let why = last("job")["hog"]["why"].as_str().unwrap().to_owned();
    assert!(why.contains("filled the store"), "{why}");
    assert!(daemon.log().contains("is cut off"));
}

fn by_number() {
    let site = Site::new(Kind::Reflink);
    site.configure("policy.max-entries = 3\npolicy.keep-used = \"0s\"\n");
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let write = |number: u64| move |at: &Path| content::write(at, number);
    let a = publish(&site, plugin, "a", write(1));
    let b = publish(&site, plugin, "b", write(2));
    let c = publish(&site, plugin, "c", write(3));
    // Time has a grain of a second here.
    thread::sleep(Duration::from_millis(1100));
    plugin.create("user", &json!({"restore": "a"}));
    let at = plugin.mount("user", "x");
    assert_eq!(content::read(&at), Content::Whole(1));
    wait_until(|| used(&site.census(), &a) == 1);
    let d = publish(&site, plugin, "d", write(4));
    entries_are(&site, &[&a, &c, &d]);
    assert!(daemon.log().contains("more entries than 3"));
    plugin.unmount("user", "x");
    plugin.remove("user");
    daemon.stop();
    thread::sleep(Duration::from_millis(1100));

    // That it was used is known in another life, and without a daemon.
    let text = std::fs::read_to_string(&site.config).unwrap();
    std::fs::write(
        &site.config,
        text.replace("max-entries = 3", "max-entries = 1"),
    )
    .unwrap();
    let going = |name: &String| format!("{name}: more entries than 1");
    assert_eq!(gc(&site, &["--dry-run"]), [going(&c), going(&a)]);
    assert_eq!(site.done(&["pin", &c]), format!("{c} pinned\n"));
    site.done(&["pin", &c]);
    assert_eq!(gc(&site, &["--dry-run"]), [going(&a)]);
    let table = site.done(&["gc", "--dry-run"]);
    assert!(table.contains(&a) && table.contains("WHY"), "{table}");
    site.done(&["unpin", &c]);
    assert_eq!(site.outcome(&["pin", "no-such"]).status, 3);
    let base = site.list()[0]["name"].as_str().unwrap().to_owned();
    assert!(
        site.outcome(&["pin", &base])
            .stderr
            .contains("only entries")
    );
    entries_are(&site, &[&a, &c, &d]);
    assert_eq!(gc(&site, &[]), [going(&c), going(&a)]);
    entries_are(&site, &[&d]);
    assert_eq!(site.done(&["gc"]), "nothing to evict\n");

    // With a daemon it is the daemon that does it.
    let daemon = site.serve();
    let e = publish(&site, daemon.plugin(), "e", write(5));
    entries_are(&site, &[&e]);
    assert_eq!(site.done(&["gc"]), "nothing to evict\n");
    assert!(gc(&site, &["--dry-run"]).is_empty());
    let census = site.settled(&[]);
    assert_eq!(census.content(&e), Ok(Content::Whole(5)));
    assert!(!site.everything().contains(&b));
    daemon.stop();
}

/// What there is room for, in MiB.
const ROOM: usize = 300;

/// How much of it is to be kept free, in MiB: what `slowly` writes in some 9 s.
const FLOOR: usize = 90;

/// A pool of this size in the test's volume group.
fn init(site: &Site, size: &str) {
    site.done(&[
        "init",
        "--vg",
        TestVg::NAME,
        "--size",
        size,
        "--base-size",
        "1G",
    ]);
}

/// A store with room for some entries, and its policy.
fn small(kind: Kind) -> (Site, Daemon) {
    let site = Site::bare(kind);
    let mut taboo = 0;
    match kind {
        Kind::Lvm => {
            init(&site, &format!("{ROOM}M"));
        }
        Kind::Reflink => {
            site.init();
            let fs = filesystem(&site);
            let stat = nix::sys::statvfs::statvfs(&fs).unwrap();
            let (size, free) = (stat.blocks(), stat.blocks_available());
            // Below a twentieth that is free nothing is made.
            taboo = size / 20 * stat.fragment_size();
            let keep = (taboo + (ROOM * MIB) as u64) / stat.fragment_size();
            let ballast = ((free - keep) * stat.fragment_size()).to_string();
            let file = fs.join("ballast");
            run(
                "fallocate",
                ["-l".as_ref(), ballast.as_ref(), file.as_os_str()],
            );
        }
        Kind::Rbd => unreachable!("see `tests`"),
    }
    let floor = taboo + (FLOOR * MIB) as u64;
    site.configure(&format!(
        "policy.keep-used = \"0s\"\npolicy.data-floor = \"{floor}\"\n"
    ));
    let daemon = site.serve();
    (site, daemon)
}

fn filesystem(site: &Site) -> PathBuf {
    Path::new(&site.store()).parent().unwrap().to_owned()
}

/// Writes so many MiB that nothing else has, no faster than a slow disk.
fn slowly(path: &Path, mib: usize) {
    let mut file = File::create(path).unwrap();
    for n in 0..mib / 4 {
        file.write_all(&vec![n as u8 + 1; 4 * MIB]).unwrap();
        file.sync_data().unwrap();
        thread::sleep(Duration::from_millis(400));
    }
}

fn of_data(kind: Kind) {
    let (site, daemon) = small(kind);
    let plugin = daemon.plugin();
    let bystander = Bystander::start(plugin);
    let fill = |at: &Path| {
        let mut file = File::create(at.join("big")).unwrap();
        file.write_all(&vec![0x5a; 60 * MIB]).unwrap();
        file.sync_data().unwrap();
    };
    let a = publish(&site, plugin, "a", fill);
    let b = publish(&site, plugin, "b", fill);
    site.done(&["pin", &a]);
    entries_are(&site, &[&a, &b]);

    // What there was room for before goes as a job needs it: the least recently used that may.
    plugin.create("job", &json!({"save": "job", "restore": "job"}));
    let at = plugin.mount("job", "x");
    slowly(&at.join("big"), 40);
    let mut more = 0;
    wait_until(|| {
        let is_there = site.census().entries().contains(&b);
        if is_there && more < 25 {
            more += 1;
            slowly(&at.join(format!("more{more}")), 4);
        }
        !is_there
    });
    let log = daemon.log();
    assert!(log.contains("for data are in use"), "{log}");
    assert!(site.census().entries().contains(&a), "it is pinned");
    plugin.unmount("job", "x");
    bystander.end(plugin);
    let volumes = ["job", "bystander"].map(Known::idle);
    let census = site.settled(&volumes);
    assert!(census.entries().contains(&a) && !census.entries().contains(&b));
    assert_eq!(census.entries().len(), 2, "the job's is there");
    daemon.stop();
}

fn never_shrunk(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let create = |options: Value| json!({"Name": "v", "Opts": options});
    let refused = |options: Value| plugin.refused("VolumeDriver.Create", &create(options));
    // The base has 1 GiB.
    let said = refused(json!({"size": "512M"}));
    for part in [
        "size=536870912",
        "the base",
        "1 GiB",
        "never shrunk",
        "on-miss=empty",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(plugin.names(), [""; 0]);
    plugin.create("v", &json!({"size": "512M", "on-miss": "empty"}));
    plugin.remove("v");

    // Growing a mounted ext4 takes CAP_SYS_RESOURCE, which root has not everywhere.
    let fs = match kind {
        Kind::Reflink => "xfs",
        Kind::Lvm | Kind::Rbd => "ext4",
    };
    let size = |at: &Path| {
        let stat = nix::sys::statvfs::statvfs(at).unwrap();
        stat.blocks() * stat.fragment_size()
    };
    let made = json!({"size": "1G", "save": fs, "fs": fs});
    plugin.create("v", &made);
    let at = plugin.mount("v", "x");
    content::write(&at, 1);
    let small = size(&at);
    plugin.unmount("v", "x");
    site.settled(&[Known::idle("v")]);
    plugin.remove("v");
    plugin.create("v", &json!({"size": "2G", "restore": fs, "save": fs}));
    let at = plugin.mount("v", "x");
    assert_eq!(content::read(&at), Content::Whole(1));
    assert!(
        size(&at) > small + (900 << 20),
        "{fs}: {small}, now {}",
        size(&at)
    );
    content::write(&at, 2);
    plugin.unmount("v", "x");
    site.settled(&[Known::idle("v")]);
    plugin.remove("v");
    let said = refused(json!({"size": "1G", "restore": fs}));
    assert!(
        said.contains("the entry to restore") && said.contains("2 GiB"),
        "{said}"
    );
    site.settled(&[]);
    daemon.stop();
}

/// What a job wrote and removed again is not in the entry.
fn trimmed() {
    let site = Site::new(Kind::Reflink);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let entry = publish(&site, plugin, "a", |at| {
        content::write(at, 1);
        let big = at.join("big");
        std::fs::write(&big, vec![0x5a; 200 * MIB]).unwrap();
        run("sync", ["--file-system".as_ref(), at.as_os_str()]);
        std::fs::remove_file(&big).unwrap();
    });
    let row = site
        .list()
        .into_iter()
        .find(|row| row["name"] == entry.as_str())
        .unwrap();
    let used = row["used"].as_u64().unwrap();
    assert!(used < 100 << 20, "{used}");
    daemon.stop();
}

/// Makes an entry of the base as an administrator does, with LVM's own tools. `false`: LVM refuses.
fn entry_by_hand(name: &str, tags: &str) -> bool {
    let options = ["-q", "-s", "-an", "--addtag", "friend:snapshot", "-n", name];
    let tags = tags.split(' ').flat_map(|tag| ["--addtag", tag]);
    let origin = ["testvg/friend-default"];
    outcome("lvcreate", options.into_iter().chain(tags).chain(origin)).status == 0
}

fn of_the_group() {
    let site = Site::bare(Kind::Lvm);
    sh("vgremove -q testvg && pvremove -q /dev/vda");
    let area = ["--metadatasize", "64k", "--dataalignment", "64k"];
    run(
        "vgcreate",
        ["-q"].into_iter().chain(area).chain([TestVg::NAME, DISK]),
    );
    init(&site, "500M");
    site.configure("policy.keep-used = \"0s\"\n");
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let bystander = Bystander::start(plugin);
    // Long ones, then short ones, until nothing more goes into the area.
    let mut made: Vec<String> = Vec::new();
    for tags in [7, 1] {
        loop {
            let name = format!("by-hand-{}", made.len());
            let tag = |m: usize| format!("friend:cache:{name}.{m}.{}", "x".repeat(1000));
            let long: Vec<_> = (0..tags).map(tag).collect();
            if !entry_by_hand(&name, &format!("{} friend:pin", long.join(" "))) {
                break;
            }
            made.push(name);
        }
    }
    let tags: Vec<_> = (0..8).map(|n| format!("{n}{}", "y".repeat(500))).collect();
    let options = json!({"save": tags.join(" ")});
    let create = json!({"Name": "late", "Opts": options});
    let said = plugin.refused("VolumeDriver.Create", &create);
    println!("refused: {said}");
    for part in [
        "testvg is full",
        "% of the group's metadata area",
        "remove entries",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    site.done(&["unpin", &made[2]]);
    // A guest may take longer for it than the request waits.
    wait_until(|| plugin.call("VolumeDriver.Create", &create).0 == 200);
    assert!(!site.census().entries().contains(&made[2]));
    assert!(
        made.iter()
            .all(|name| *name == made[2] || site.census().entries().contains(name))
    );
    bystander.end(plugin);
    site.settled(&["late", "bystander"].map(Known::idle));
    daemon.stop();
}

fn of_metadata() {
    let site = Site::bare(Kind::Lvm);
    // As `init` makes it, but with the least metadata that there can be.
    sh(
        "lvcreate -q -y --type thin-pool -L 500M --poolmetadatasize 2M --addtag friend:pool -n friend-pool testvg",
    );
    init(&site, "500M");
    site.configure("policy.keep-used = \"0s\"\n");
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let bystander = Bystander::start(plugin);
    let scattered = |at: &Path| {
        let mut file = File::create(at.join("big")).unwrap();
        file.write_all(&vec![0x5a; 128 * MIB]).unwrap();
        file.sync_data().unwrap();
    };
    let a = publish(&site, plugin, "a", scattered);
    let b = publish(&site, plugin, "b", scattered);
    site.done(&["pin", &a]);
    site.done(&["pin", &b]);
    plugin.create("waiting", &json!({"restore": "b", "save": "c"}));

    // Others' volumes in the pool's metadata, which LVM does not know of: a block or more for each.
    let pool = dm::Pool::open(TestVg::NAME, "friend-pool").unwrap();
    let percent = || {
        let pool = format!("{}/friend-pool", TestVg::NAME);
        let used = run("lvs", ["--noheadings", "-o", "metadata_percent", &pool]);
        used.trim().parse::<f64>().unwrap()
    };
    let mut ids = 9_000_000..;
    loop {
        let step = match percent() {
            // From 75 on it is full. The bystander's volumes come and go, and the entry that is to go frees little more than a block
            // in a hundred.
            75.3.. => break,
            70.0.. => 1,
            _ => 20,
        };
        for id in ids.by_ref().take(step) {
            pool.message(&format!("create_thin {id}")).unwrap();
        }
    }
    println!("the pool's metadata: {} % in use", percent());
    let create = json!({"Name": "late", "Opts": {"restore": "a", "save": "c"}});
    let mount = json!({"Name": "waiting", "ID": "x"});
    for (endpoint, body) in [("Create", &create), ("Mount", &mount)] {
        let said = plugin.refused(&format!("VolumeDriver.{endpoint}"), body);
        println!("refused: {said}");
        for part in [
            "testvg is full",
            "for metadata of thin pool friend-pool",
            "remove entries",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
    // Half of what there is gives enough back, if it may.
    site.done(&["unpin", &a]);
    // A guest may take longer for it than the request waits.
    wait_until(|| plugin.call("VolumeDriver.Create", &create).0 == 200);
    assert!(!site.census().entries().contains(&a));
    assert!(
        daemon.log().contains("for the pool's metadata are in use"),
        "the reason"
    );
    let at = plugin.mount("waiting", "x");
    wait_until(|| used(&site.census(), &b) == 1);
    content::write(&at, 1);
    plugin.unmount("waiting", "x");
    bystander.end(plugin);
    let census = site.settled(&["late", "waiting", "bystander"].map(Known::idle));
    assert!(census.entries().contains(&b));
    daemon.stop();
}
