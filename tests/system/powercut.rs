// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Power cuts: what was published stays, whole, and what was being written is never seen.

mod supervised;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Test, Tier, test};
use crate::support::census::{Census, Known, settled};
use crate::support::command::run;
use crate::support::content::{self, Content, Random};
use crate::support::daemon::{Daemon, Plugin, friend};
use crate::support::lvm::TestVg;
use crate::support::site::Kind;
use crate::support::vm::{boot_part, start_part};
use crate::support::{temp_dir, wait_until};

const CUTS: u32 = 10;

/// The longest that a guest works before its power is cut.
const LONGEST: Duration = Duration::from_secs(8);

/// Jobs at once.
const WORKERS: u64 = 2;

/// In the guest: what survives there is on its disk and in here.
const SHARE: &str = "/share";
const CONFIG: &str = "/tmp/config.toml";

pub fn tests() -> Vec<Test> {
    vec![
        test(Tier::Driver, "powercut::ten_times", ten_times),
        test(Tier::Part, "powercut::work", work),
        test(Tier::Part, "powercut::all_whole", all_whole),
        test(Tier::Driver, "powercut::supervised", supervised::over_cuts),
        test(Tier::Part, "powercut::supervise", supervised::supervise),
    ]
}

fn ten_times() {
    let here = temp_dir();
    let (disk, share) = (here.path().join("disk"), here.path().join("share"));
    fs::create_dir(&share).unwrap();
    let options = [
        "--disk",
        disk.to_str().unwrap(),
        "--share",
        share.to_str().unwrap(),
    ];
    let mut random = Random::from_clock();
    for cut in 1..=CUTS {
        let _ = fs::remove_file(share.join("working"));
        let mut guest = start_part(here.path(), &options, "powercut::work");
        wait_until(|| {
            assert!(guest.is_running(), "it works until its power is cut");
            share.join("working").exists()
        });
        let after = random.below(LONGEST.as_millis() as u64);
        thread::sleep(Duration::from_millis(after));
        assert!(guest.is_running(), "it works until its power is cut");
        guest.cut_power();
        println!("cut {cut}, after {after} ms of work");
    }
    let last = boot_part(&options, "powercut::all_whole");
    print!("{}{}", last.stdout, last.stderr);
    assert_eq!(last.status, 0);
}

/// What the host keeps of what clients were told.
struct Told {
    /// Volumes that there must be.
    volumes: BTreeSet<String>,
    /// Volumes that were being made or removed.
    maybe: BTreeSet<String>,
    /// Jobs whose work must be there.
    published: Vec<u64>,
    /// What the kept volume holds.
    kept: Content,
    /// The highest number given to any work.
    last: u64,
}

impl Told {
    fn read() -> Self {
        let mut told = Self {
            volumes: BTreeSet::new(),
            maybe: BTreeSet::new(),
            published: Vec::new(),
            kept: Content::Blank,
            last: 0,
        };
        let text = fs::read_to_string(Path::new(SHARE).join("told")).unwrap_or_default();
        for line in text.lines() {
            let (what, of) = line.split_once(' ').unwrap();
            let number = || of.parse().unwrap();
            match what {
                "making" | "removing" => {
                    told.volumes.remove(of);
                    told.maybe.insert(of.to_owned());
                }
                "made" => {
                    told.maybe.remove(of);
                    told.volumes.insert(of.to_owned());
                }
                "removed" => {
                    told.maybe.remove(of);
                }
                "working" => told.last = told.last.max(number()),
                "published" => told.published.push(number()),
                "kept" => told.kept = Content::Whole(number()),
                other => panic!("{other}"),
            }
        }
        told
    }
}

/// A line that outlives the guest.
fn tell(line: &str) {
    let path = Path::new(SHARE).join("told");
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
    file.sync_all().unwrap();
}

/// A group on the guest's disk that outlives the guest.
fn make_group() {
    std::mem::forget(TestVg::fresh());
}

/// Prepares it where that is not done, and the configuration.
fn init(config: &Path) {
    let options = ["--vg", TestVg::NAME, "--size", "5G", "--base-size", "1G"];
    friend(config, &[&["init"][..], &options].concat());
}

/// Brings up what the disk holds, and looks at all of it.
fn bring_up() -> (Daemon, Census, Told) {
    let told = Told::read();
    if told.last == 0 {
        make_group();
    }
    let config = Path::new(CONFIG);
    init(config);
    let daemon = Daemon::start(config);
    let plugin = daemon.plugin();
    let names: BTreeSet<_> = plugin.names().into_iter().collect();
    assert!(
        told.volumes.is_subset(&names),
        "{names:?} of {:?}",
        told.volumes
    );
    for name in &names {
        assert!(
            told.volumes.contains(name) || told.maybe.contains(name),
            "{name}"
        );
        plugin.ok("VolumeDriver.Get", &json!({"Name": name}));
    }
    let idle: Vec<_> = names.iter().map(|name| Known::idle(name)).collect();
    let census = settled(Kind::Lvm, TestVg::NAME, &idle);
    for job in &told.published {
        assert_eq!(census.with_tag(&tag(*job)).len(), 1, "job {job}");
    }
    (daemon, census, told)
}

fn tag(job: u64) -> String {
    format!("friend:cache:job-{job}")
}

/// Each entry that was not looked at yet is whole, and holds what its tag says.
fn look_at(census: &Census, seen: &BTreeSet<String>) {
    let jobs: BTreeMap<_, _> = census
        .entries()
        .into_iter()
        .filter(|entry| !seen.contains(entry))
        .map(|entry| {
            let job = census.lvs[&entry]
                .iter()
                .find_map(|tag| tag.strip_prefix("friend:cache:job-"));
            let job: u64 = job.expect("a job's").parse().unwrap();
            (entry, job)
        })
        .collect();
    for (entry, job) in jobs {
        assert_eq!(
            census.content(&entry),
            Ok(Content::Whole(job)),
            "{entry} of job {job}"
        );
    }
}

fn work() {
    let (daemon, census, told) = bring_up();
    let seen = Path::new(SHARE).join("seen");
    let before = fs::read_to_string(&seen).unwrap_or_default();
    look_at(&census, &before.lines().map(str::to_owned).collect());
    let now: Vec<_> = census.entries().into_iter().collect();
    fs::write(&seen, now.join("\n")).unwrap();

    let next = AtomicU64::new(told.last + 1);
    let number = &|| {
        let number = next.fetch_add(1, Ordering::SeqCst);
        tell(&format!("working {number}"));
        number
    };
    let plugin = daemon.plugin();
    make(plugin, "kept", &json!({}));
    let at = plugin.mount("kept", "x");
    assert_eq!(content::read(&at), told.kept);
    let kept = number();
    content::write(&at, kept);
    run("sync", ["--file-system".as_ref(), at.as_os_str()]);
    tell(&format!("kept {kept}"));
    plugin.unmount("kept", "x");
    fs::write(Path::new(SHARE).join("working"), "").unwrap();
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || {
                loop {
                    job(plugin, &format!("w{worker}"), number());
                }
            });
        }
    });
}

fn make(plugin: &Plugin, name: &str, options: &Value) {
    tell(&format!("making {name}"));
    plugin.create(name, options);
    tell(&format!("made {name}"));
}

fn remove(plugin: &Plugin, name: &str) {
    tell(&format!("removing {name}"));
    plugin.remove(name);
    tell(&format!("removed {name}"));
}

/// A job from the best entry there is to one of its own.
fn job(plugin: &Plugin, name: &str, number: u64) {
    if plugin.names().iter().any(|there| there == name) {
        remove(plugin, name);
    }
    let options = json!({"restore": "job-*", "save": format!("job-{number}")});
    make(plugin, name, &options);
    let at: PathBuf = plugin.mount(name, "x");
    content::read(&at);
    content::write(&at, number);
    plugin.unmount(name, "x");
    let published = || {
        let last = &plugin.status(name)["last_lease"];
        assert!(last["why"].is_null(), "{last}");
        last["published"].is_string()
    };
    wait_until(published);
    tell(&format!("published {number}"));
}

fn all_whole() {
    let (daemon, census, told) = bring_up();
    look_at(&census, &BTreeSet::new());
    println!(
        "{} pieces of work begun, {} published and told, {} entries, all whole",
        told.last,
        told.published.len(),
        census.entries().len()
    );
    assert!(!told.published.is_empty());
    let plugin = daemon.plugin();
    assert_eq!(content::read(&plugin.mount("kept", "x")), told.kept);
    plugin.unmount("kept", "x");
    job(plugin, "last", told.last + 1);
    daemon.stop();
}
