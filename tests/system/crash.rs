// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kill -9` of the daemon, at each place that matters and at random ones: no entry is lost, nothing half-written is published, and
//! a restart finishes what was begun.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use lvm_cache_friend::failpoint;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Group, Test, Tier, test};
use crate::support::census::{Census, Held, Known, mounts};
use crate::support::content::{self, Content, Random};
use crate::support::daemon::{Daemon, Plugin, SOCKET};
use crate::support::site::{Kind, MOUNT_DIR, Site};
use crate::support::wait_until;

pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (tier, kind) in [
        (Tier::Reflink, Kind::Reflink),
        (Tier::Guest(Group::Lvm), Kind::Lvm),
    ] {
        let stages: BTreeSet<_> = failpoint::ALL.iter().map(|point| stage(point)).collect();
        for stage in stages {
            let body = move || at_failpoints(kind, stage);
            tests.push(test(tier, format!("crash::at_{stage}"), body).timeout(1200));
        }
        let mut add = |name: &str, body: fn(Kind)| {
            tests.push(test(tier, format!("crash::{name}"), move || body(kind)).timeout(1200));
        };
        add("on_the_way_up", on_the_way_up);
        add("of_a_removed_volume", of_a_removed_volume);
        add("under_load", |kind| match kind {
            Kind::Reflink => under_load(kind, 15),
            Kind::Lvm | Kind::Rbd => under_load(kind, 5),
        });
        add("told_to_stop", told_to_stop);
    }
    tests
}

fn stage(point: &'static str) -> &'static str {
    point.split('.').next().expect("there is a first part")
}

/// A store with an entry, and what is known to be published in it.
struct Drill {
    site: Site,
    /// All entries so far.
    entries: BTreeSet<String>,
    /// What the newest of them holds.
    newest: u64,
}

impl Drill {
    fn new(kind: Kind) -> Self {
        let mut drill = Self {
            site: Site::new(kind),
            entries: BTreeSet::new(),
            newest: 0,
        };
        let daemon = drill.start();
        let plugin = daemon.plugin();
        plugin.create("first", &fresh());
        let at = plugin.mount("first", "x");
        assert_eq!(content::read(&at), Content::Blank);
        content::write(&at, 1);
        plugin.unmount("first", "x");
        drill.published(&[Known::idle("first")], 1);
        plugin.remove("first");
        drill.nothing_new(&[]);
        daemon.stop();
        drill
    }

    fn start(&self) -> Daemon {
        self.site.serve()
    }

    /// A daemon that dies at a failpoint.
    fn start_to_die(&self, point: &str) -> Daemon {
        Daemon::start_with(&self.site.config, Path::new(SOCKET), &to_die(point))
    }

    /// What a job finds, does and leaves.
    fn job(&mut self, at: &Path) {
        assert_eq!(content::read(at), Content::Whole(self.newest));
        content::write(at, self.newest + 1);
    }

    /// The only volume is used, and its work published, once, as the next number.
    fn use_up(&mut self, plugin: &Plugin, name: &str) {
        self.use_up_among(plugin, name, &[Known::idle(name)]);
    }

    fn use_up_among(&mut self, plugin: &Plugin, name: &str, volumes: &[Known<'_>]) {
        let at = plugin.mount(name, "x");
        self.job(&at);
        plugin.unmount(name, "x");
        self.published(volumes, self.newest + 1);
    }

    /// The daemon settles with one entry more, which is whole.
    #[track_caller]
    fn published(&mut self, volumes: &[Known<'_>], number: u64) {
        let census = self.site.settled(volumes);
        let new = self.new_entries(&census);
        assert_eq!(new.len(), 1, "entries made since the last one: {new:?}");
        let entry = new.into_iter().next().unwrap();
        assert_eq!(census.content(&entry), Ok(Content::Whole(number)));
        self.newest = number;
        self.entries.insert(entry);
    }

    #[track_caller]
    fn nothing_new(&self, volumes: &[Known<'_>]) {
        let census = self.site.settled(volumes);
        assert_eq!(self.new_entries(&census), BTreeSet::new());
    }

    #[track_caller]
    fn new_entries(&self, census: &Census) -> BTreeSet<String> {
        let now = census.entries();
        let lost: Vec<_> = self.entries.difference(&now).collect();
        assert!(lost.is_empty(), "entries that were lost: {lost:?}");
        now.difference(&self.entries).cloned().collect()
    }

    /// All entries are what they were when they were published, one after the other.
    fn all_whole(&self) {
        let mut numbers = BTreeSet::new();
        let census = self.site.census();
        for entry in &self.entries {
            match census.content(entry) {
                Ok(Content::Whole(number)) => assert!(numbers.insert(number), "{number} twice"),
                other => panic!("{entry}: {other:?}"),
            }
        }
        let expected: BTreeSet<_> = (1..=self.newest).collect();
        assert_eq!(numbers, expected);
    }
}

/// Options of a volume that starts from the best entry each time.
fn fresh() -> Value {
    json!({"restore": "a", "save": "a"})
}

/// Options of a volume that starts from the best entry, and then keeps what it has.
fn kept() -> Value {
    json!({"restore": "a", "save": "a", "reuse": "keep"})
}

fn to_die(point: &str) -> [(&str, &str); 2] {
    [("LVM_CACHE_FRIEND_FAILPOINT", point), ("RUST_LOG", "debug")]
}

/// Where a volume is mounted, for who looks at the mount table.
fn mounted(name: &str) -> Option<PathBuf> {
    let at = Path::new(MOUNT_DIR).join(name);
    mounts().contains(&at).then_some(at)
}

/// A call that the daemon may not live to answer; whether it did.
fn call(plugin: &Plugin, endpoint: &str, body: &Value) -> bool {
    match plugin.try_call(endpoint, body.to_string().as_bytes()) {
        Ok((200, _)) => true,
        Ok(refused) => panic!("{endpoint} {body}: {refused:?}"),
        Err(_) => false,
    }
}

/// The daemon dies at each failpoint of a stage, while it does what reaches it.
fn at_failpoints(kind: Kind, stage: &'static str) {
    let mut drill = Drill::new(kind);
    let points = failpoint::ALL.iter().filter(|p| self::stage(p) == stage);
    for (n, point) in points.enumerate() {
        let variants: &[Value] = match (stage, kind) {
            ("create", Kind::Reflink) => &[fresh(), kept()],
            // A round takes a guest ten seconds.
            ("create", Kind::Lvm | Kind::Rbd) if n % 2 == 1 => &[kept()],
            _ => &[fresh()],
        };
        for options in variants {
            println!("at {point} {options}");
            match stage {
                "create" => create(&mut drill, point, options),
                "mount" => mount(&mut drill, point, options),
                "fit" => fit(&mut drill, point, options),
                "unmount" => unmount(&mut drill, point, options),
                "publish" => publish(&mut drill, point, options),
                "refresh" => refresh(&mut drill, point, options),
                "remove" => remove(&mut drill, point, options),
                other => panic!("nothing here reaches the failpoints of {other}"),
            }
        }
    }
    drill.all_whole();
}

fn create(drill: &mut Drill, point: &str, options: &Value) {
    let body = json!({"Name": "v", "Opts": options});
    let daemon = drill.start_to_die(point);
    assert!(!call(daemon.plugin(), "VolumeDriver.Create", &body));
    daemon.died();

    let daemon = drill.start();
    let plugin = daemon.plugin();
    let there = !plugin.names().is_empty();
    if there {
        drill.nothing_new(&[Known::idle("v")]);
    } else {
        drill.nothing_new(&[]);
    }
    plugin.create("v", options);
    drill.use_up(plugin, "v");
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
}

fn mount(drill: &mut Drill, point: &str, options: &Value) {
    let daemon = drill.start_to_die(point);
    daemon.plugin().create("v", options);
    let body = json!({"Name": "v", "ID": "x"});
    let answered = call(daemon.plugin(), "VolumeDriver.Mount", &body);
    daemon.died();
    let seen = mounted("v");
    assert!(seen.is_some() || !answered);
    if let Some(at) = &seen {
        drill.job(at);
    }

    let daemon = drill.start();
    let plugin = daemon.plugin();
    let answer = plugin.ok("VolumeDriver.Get", &json!({"Name": "v"}));
    let told = answer["Volume"]["Mountpoint"].as_str().unwrap_or_default();
    assert_eq!(seen.is_some(), !told.is_empty(), "{answer}");
    let at = plugin.mount("v", "x");
    if seen.is_some() {
        assert_eq!(content::read(&at), Content::Whole(drill.newest + 1));
    } else {
        drill.job(&at);
    }
    drill.nothing_new(&[Known::mounted("v")]);
    plugin.unmount("v", "x");
    drill.published(&[Known::idle("v")], drill.newest + 1);
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
}

/// A volume is about to be shown to a container with ids of its own: to the first of its lease, or to a second with others.
fn fit(drill: &mut Drill, point: &str, options: &Value) {
    let starting = |outside: u64| {
        let range = json!([{"containerID": 0, "hostID": outside, "size": 65536}]);
        json!({"Volumes": ["v"], "UidMappings": range, "GidMappings": range})
    };
    for nth in [1, 2] {
        let daemon = drill.start_to_die(&format!("{point}:{nth}"));
        let plugin = daemon.plugin();
        plugin.create("v", options);
        let at = plugin.mount("v", "x");
        drill.job(&at);
        for before in 1..nth {
            plugin.ok("Friend.Starting", &starting(before << 16));
        }
        assert!(!call(plugin, "Friend.Starting", &starting(nth << 16)));
        daemon.died();
        // What a container would find that starts now, and what is below it.
        assert_eq!(mounted("v").as_ref(), Some(&at));
        assert_eq!(content::read(&at), Content::Whole(drill.newest + 1));
        assert_eq!(below(drill, "v"), [""; 0]);

        let daemon = drill.start();
        let plugin = daemon.plugin();
        for outside in [nth << 16, 7 << 16] {
            plugin.ok("Friend.Starting", &starting(outside));
            assert_eq!(content::read(&at), Content::Whole(drill.newest + 1));
        }
        let without = json!({"Volumes": ["v"], "UidMappings": [], "GidMappings": []});
        plugin.ok("Friend.Starting", &without);
        assert_eq!(content::read(&at), Content::Whole(drill.newest + 1));
        assert_eq!(below(drill, "v"), [""; 0]);
        drill.nothing_new(&[Known::mounted("v")]);
        plugin.unmount("v", "x");
        drill.published(&[Known::idle("v")], drill.newest + 1);
        plugin.remove("v");
        drill.nothing_new(&[]);
        daemon.stop();
    }
}

/// What the host's own directory holds that a volume is mounted at.
fn below(drill: &Drill, volume: &str) -> Vec<String> {
    // Without what is mounted in it.
    let dir = Held::new(&drill.site, Path::new(MOUNT_DIR));
    let names = fs::read_dir(dir.path().join(volume)).unwrap();
    names
        .map(|name| name.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn unmount(drill: &mut Drill, point: &str, options: &Value) {
    let daemon = drill.start_to_die(point);
    let plugin = daemon.plugin();
    plugin.create("v", options);
    let at = plugin.mount("v", "x");
    drill.job(&at);
    let body = json!({"Name": "v", "ID": "x"});
    assert!(!call(plugin, "VolumeDriver.Unmount", &body));
    daemon.died();

    let daemon = drill.start();
    let plugin = daemon.plugin();
    plugin.unmount("v", "x");
    drill.published(&[Known::idle("v")], drill.newest + 1);
    // Again, and nothing happens.
    plugin.unmount("v", "x");
    let at = plugin.mount("v", "x");
    assert_eq!(content::read(&at), Content::Whole(drill.newest));
    plugin.unmount("v", "x");
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
}

fn publish(drill: &mut Drill, point: &str, options: &Value) {
    let daemon = drill.start_to_die(point);
    let plugin = daemon.plugin();
    plugin.create("v", options);
    let at = plugin.mount("v", "x");
    drill.job(&at);
    call(
        plugin,
        "VolumeDriver.Unmount",
        &json!({"Name": "v", "ID": "x"}),
    );
    daemon.died();

    let daemon = drill.start();
    let plugin = daemon.plugin();
    plugin.ok("VolumeDriver.Get", &json!({"Name": "v"}));
    plugin.unmount("v", "x");
    drill.published(&[Known::idle("v")], drill.newest + 1);
    let at = plugin.mount("v", "x");
    assert_eq!(content::read(&at), Content::Whole(drill.newest));
    plugin.unmount("v", "x");
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
}

/// The copy that waits in `v` becomes second best, by what is published from `w`.
fn refresh(drill: &mut Drill, point: &str, options: &Value) {
    let daemon = drill.start_to_die(point);
    let plugin = daemon.plugin();
    plugin.create("v", options);
    plugin.create("w", options);
    let at = plugin.mount("w", "x");
    drill.job(&at);
    call(
        plugin,
        "VolumeDriver.Unmount",
        &json!({"Name": "w", "ID": "x"}),
    );
    daemon.died();

    let daemon = drill.start();
    let plugin = daemon.plugin();
    drill.published(&[Known::idle("v"), Known::idle("w")], drill.newest + 1);
    plugin.remove("w");
    drill.use_up(plugin, "v");
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
}

fn remove(drill: &mut Drill, point: &str, options: &Value) {
    let daemon = drill.start_to_die(point);
    let plugin = daemon.plugin();
    plugin.create("v", options);
    let name = json!({"Name": "v"});
    let answered = call(plugin, "VolumeDriver.Remove", &name);
    daemon.died();

    let daemon = drill.start();
    let plugin = daemon.plugin();
    if plugin.names().is_empty() {
        plugin.refused("VolumeDriver.Get", &name);
        plugin.refused("VolumeDriver.Remove", &name);
    } else {
        assert!(!answered);
        plugin.remove("v");
    }
    drill.nothing_new(&[]);
    plugin.create("v", options);
    drill.use_up(plugin, "v");
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
}

/// A daemon that finds a lease to settle dies at each step of that, one restart after the other.
fn on_the_way_up(kind: Kind) {
    let mut drill = Drill::new(kind);
    let daemon = drill.start_to_die("unmount.2");
    let plugin = daemon.plugin();
    plugin.create("v", &fresh());
    let at = plugin.mount("v", "x");
    drill.job(&at);
    let body = json!({"Name": "v", "ID": "x"});
    assert!(!call(plugin, "VolumeDriver.Unmount", &body));
    daemon.died();
    for point in [
        "publish.1",
        "publish.2",
        "publish.3",
        "refresh.2",
        "refresh.3",
        "remove.3",
    ] {
        println!("at {point}");
        let config = &drill.site.config;
        Daemon::spawn(config, Path::new(SOCKET), &to_die(point)).died();
    }
    let daemon = drill.start();
    let plugin = daemon.plugin();
    drill.published(&[Known::idle("v")], drill.newest + 1);
    drill.use_up(plugin, "v");
    plugin.remove("v");
    drill.nothing_new(&[]);
    daemon.stop();
    drill.all_whole();
}

/// The volume is removed while something still holds on to its last lease's mount: what was written is published all the same,
/// and by whoever is there when the mount goes.
fn of_a_removed_volume(kind: Kind) {
    let mut drill = Drill::new(kind);
    for point in ["remove.1", "remove.2", "publish.2"] {
        println!("at {point}");
        let daemon = drill.start_to_die(point);
        let plugin = daemon.plugin();
        plugin.create("v", &fresh());
        let at = plugin.mount("v", "x");
        drill.job(&at);
        let held = Held::new(&drill.site, &at);
        plugin.unmount("v", "x");
        let body = json!({"Name": "v"});
        let mut removed = call(plugin, "VolumeDriver.Remove", &body);
        assert_eq!(removed, point == "publish.2");
        if removed {
            drop(held);
            daemon.died();
        } else {
            daemon.died();
            let daemon = drill.start();
            let plugin = daemon.plugin();
            if plugin.names().is_empty() {
                removed = true;
            }
            assert_eq!(removed, point == "remove.2");
            if !removed {
                plugin.remove("v");
            }
            drop(held);
            daemon.kill();
        }
        let daemon = drill.start();
        assert_eq!(daemon.plugin().names(), [""; 0]);
        drill.published(&[], drill.newest + 1);
        daemon.stop();
    }
    drill.all_whole();
}

/// The daemon is killed at random moments while jobs go on: in the end each job's work is published, once.
pub fn under_load(kind: Kind, kills: u32) {
    let longest = match kind {
        Kind::Reflink => 800,
        Kind::Lvm | Kind::Rbd => 5000,
    };
    let site = Site::new(kind);
    let mut random = Random::from_clock();
    let (next, over) = (AtomicU64::new(1), AtomicBool::new(false));
    let jobs = thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|worker| {
                let (next, over, random) = (&next, &over, Random::new(random.next()));
                scope.spawn(move || fresh_jobs(&format!("w{worker}"), random, next, over))
            })
            .collect();
        let keeper = scope.spawn(|| kept_jobs(&over));
        let mut daemon = site.serve();
        for _ in 0..kills {
            thread::sleep(Duration::from_millis(random.below(longest)));
            daemon.kill();
            daemon = site.serve();
        }
        over.store(true, Ordering::SeqCst);
        let jobs: Vec<u64> = workers
            .into_iter()
            .flat_map(|w| w.join().unwrap())
            .collect();
        keeper.join().unwrap();
        let volumes = daemon.plugin().names();
        let volumes: Vec<_> = volumes.iter().map(|name| Known::idle(name)).collect();
        site.settled(&volumes);
        daemon.stop();
        jobs
    });
    println!("{} jobs, {kills} times killed", jobs.len());
    assert!(!jobs.is_empty());
    let census = site.census();
    let mut entries = census.entries();
    for job in jobs {
        let published = census.with_tag(&format!("friend:cache:job-{job}"));
        let [entry] = published[..] else {
            panic!("job {job} is published as {published:?}");
        };
        assert_eq!(census.content(entry), Ok(Content::Whole(job)));
        entries.remove(entry);
    }
    assert!(entries.is_empty(), "nobody's: {entries:?}");
    site.no_lost_ids();
}

/// Uses of one volume after the other, each from the best entry there is. Gives the numbers of what was written.
pub fn fresh_jobs(name: &str, mut random: Random, next: &AtomicU64, over: &AtomicBool) -> Vec<u64> {
    let mut jobs = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let job = next.fetch_add(1, Ordering::SeqCst);
        let options = json!({"restore": "job-*", "save": format!("job-{job}")});
        let at = insist(
            "VolumeDriver.Create",
            &json!({"Name": name, "Opts": options}),
            false,
        );
        drop(at);
        let use_ = json!({"Name": name, "ID": "x"});
        let at = insist("VolumeDriver.Mount", &use_, false);
        let at = PathBuf::from(at["Mountpoint"].as_str().unwrap());
        content::read(&at);
        content::write(&at, job);
        thread::sleep(Duration::from_millis(random.below(100)));
        assert_eq!(content::read(&at), Content::Whole(job));
        insist("VolumeDriver.Unmount", &use_, false);
        jobs.push(job);
        insist("VolumeDriver.Remove", &json!({"Name": name}), true);
    }
    jobs
}

/// Uses of a volume that keeps its content.
fn kept_jobs(over: &AtomicBool) {
    let create = json!({"Name": "kept"});
    let use_ = json!({"Name": "kept", "ID": "x"});
    let mut holds = Content::Blank;
    let mut number = 1 << 32;
    while !over.load(Ordering::SeqCst) {
        insist("VolumeDriver.Create", &create, false);
        let at = insist("VolumeDriver.Mount", &use_, false);
        let at = PathBuf::from(at["Mountpoint"].as_str().unwrap());
        assert_eq!(content::read(&at), holds);
        number += 1;
        content::write(&at, number);
        holds = Content::Whole(number);
        insist("VolumeDriver.Unmount", &use_, false);
    }
}

/// Calls until there is an answer. `done`: to be told that there is no such volume is one, if it was asked before.
pub fn insist(endpoint: &str, body: &Value, done: bool) -> Value {
    let plugin = Plugin::new(Path::new(SOCKET));
    let mut answer = None;
    let mut asked = false;
    wait_until(|| {
        answer = match plugin.try_call(endpoint, body.to_string().as_bytes()) {
            Ok((200, answer)) => Some(answer),
            Ok((404, _)) if done && asked => Some(Value::Null),
            // It stops.
            Ok((503, _)) => None,
            Ok(refused) => panic!("{endpoint} {body}: {refused:?}"),
            Err(_) => None,
        };
        asked = true;
        answer.is_some()
    });
    answer.expect("waited for")
}

/// SIGTERM with a lease that goes on, one that cannot be settled yet, and a Create that waits for the store.
fn told_to_stop(kind: Kind) {
    let mut drill = Drill::new(kind);
    drill.site.configure("stop-timeout = \"2s\"\n");
    let daemon = drill.start();
    let plugin = daemon.plugin().clone();
    for name in ["going", "held"] {
        plugin.create(name, &fresh());
        plugin.mount(name, "x");
    }
    let (going, held) = (mounted("going").unwrap(), mounted("held").unwrap());
    drill.job(&held);
    let held = Held::new(&drill.site, &held);
    plugin.unmount("held", "x");
    let create = json!({"Name": "late", "Opts": fresh()});
    let locked = lock_store(&drill.site);
    thread::scope(|scope| {
        let late =
            scope.spawn(|| plugin.try_call("VolumeDriver.Create", create.to_string().as_bytes()));
        // It is listed once it is made, and asked for until then.
        thread::sleep(Duration::from_millis(300));
        assert!(!late.is_finished());
        daemon.signal(Signal::SIGTERM);
        wait_until(|| plugin.try_call("VolumeDriver.List", b"{}").is_err());
        daemon.stop();
        assert!(!matches!(late.join().unwrap(), Ok((200, _))));
    });
    drop(locked);
    assert_eq!(mounts(), BTreeSet::from([going.clone()]));
    drop(held);

    let daemon = drill.start();
    let plugin = daemon.plugin();
    let mut known = vec![Known::mounted("going"), Known::idle("held")];
    if plugin.names().iter().any(|name| name == "late") {
        known.push(Known::idle("late"));
    }
    drill.published(&known, drill.newest + 1);
    plugin.create("late", &fresh());
    // It began before that entry was there.
    assert_eq!(content::read(&going), Content::Whole(drill.newest - 1));
    content::write(&going, drill.newest + 1);
    plugin.unmount("going", "x");
    let idle = ["going", "held", "late"].map(Known::idle);
    drill.published(&idle, drill.newest + 1);
    drill.use_up_among(plugin, "late", &idle);
    daemon.stop();
    drill.all_whole();
}

/// Keeps every change of the store waiting, as another command would.
pub fn lock_store(site: &Site) -> Flock<File> {
    let file = match site.kind {
        Kind::Reflink => File::open(Path::new(&site.store()).join("~lock")),
        Kind::Lvm => File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(format!("/run/lock/lvm/V_{}", site.store())),
        Kind::Rbd => unreachable!("changes wait for no lock"),
    };
    Flock::lock(file.unwrap(), FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .unwrap()
}
