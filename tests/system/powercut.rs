// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Power cuts: what was published stays, whole, and what was being written is never seen.

mod replay;
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
use crate::support::vm::{VolatileDisk, boot_part, start_part};
use crate::support::{temp_dir, wait_until};

/// The longest that a guest works before its power is cut.
const LONGEST: Duration = Duration::from_secs(6);

/// Jobs at once.
const WORKERS: u64 = 2;

/// In the guest: what survives there is on its disk and in here.
const SHARE: &str = "/share";
const CONFIG: &str = "/share/config.toml";

pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        test(Tier::Driver, "powercut::three_times", || cuts(3)),
        test(Tier::Driver, "torture::power_is_cut", || cuts(100)),
        test(Tier::Part, "powercut::work", work),
        test(Tier::Part, "powercut::all_whole", all_whole),
        test(Tier::Driver, "powercut::supervised", supervised::over_cuts),
        test(Tier::Part, "powercut::supervise", supervised::supervise),
    ];
    tests.extend(replay::tests());
    tests
}

/// Cuts the power so many times, at random moments.
fn cuts(times: u32) {
    let here = temp_dir();
    let share = here.path().join("share");
    fs::create_dir(&share).unwrap();
    let disk = VolatileDisk::new(here.path());
    let options = || disk.options(&["--share", share.to_str().unwrap()]);
    let mut random = Random::from_clock();
    let mut lost = 0;
    for cut in 1..=times {
        let _ = fs::remove_file(share.join("working"));
        let mut guest = start_part(here.path(), &options(), "powercut::work");
        // So that there is something to lose: by the last cut at the latest.
        wait_until(|| {
            assert!(guest.is_running(), "it works until its power is cut");
            share.join("working").exists() && (cut < times || !published(&share).is_empty())
        });
        let after = random.below(LONGEST.as_millis() as u64);
        thread::sleep(Duration::from_millis(after));
        assert!(guest.is_running(), "it works until its power is cut");
        guest.cut_power();
        let writes = disk.lose_what_was_not_flushed();
        lost += writes;
        println!("cut {cut}, after {after} ms of work: {writes} writes are lost");
    }
    assert!(lost > 0, "the disk flushed by itself");
    let last = boot_part(&options(), "powercut::all_whole");
    print!("{}{}", last.stdout, last.stderr);
    assert_eq!(last.status, 0);
}

/// What clients were told, or asked for.
#[derive(Debug, Default)]
struct Told {
    /// Volumes that there must be.
    volumes: BTreeSet<String>,
    /// Volumes that were being made or removed.
    maybe: BTreeSet<String>,
    /// Jobs whose work must be there.
    published: BTreeSet<u64>,
    /// Jobs whose work must be gone.
    gone: BTreeSet<u64>,
    /// Jobs whose entries must be pinned, and such that must not.
    pinned: BTreeMap<u64, bool>,
    /// What the kept volume holds, if it is not being changed.
    kept: Option<Content>,
    /// The highest number given to any work.
    last: u64,
}

impl Told {
    fn of<'a>(lines: impl Iterator<Item = &'a str>) -> Self {
        let mut told = Self {
            kept: Some(Content::Blank),
            ..Self::default()
        };
        for line in lines {
            // What is no more than a place in the log is one word.
            let Some((what, of)) = line.split_once(' ') else {
                continue;
            };
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
                "imported" => drop(told.published.insert(number())),
                "pinned" => drop(told.pinned.insert(number(), true)),
                "unpinned" => drop(told.pinned.insert(number(), false)),
                "working" => told.last = told.last.max(number()),
                "published" => drop(told.published.insert(number())),
                "unpublishing" => drop(told.published.remove(&number())),
                "unpublished" => drop(told.gone.insert(number())),
                "pinning" | "unpinning" => drop(told.pinned.remove(&number())),
                "keeping" => told.kept = None,
                "kept" => told.kept = Some(Content::Whole(number())),
                other => panic!("{other}"),
            }
        }
        told
    }

    /// What outlived the guest.
    fn read() -> Self {
        let text = fs::read_to_string(Path::new(SHARE).join("told")).unwrap_or_default();
        Self::of(text.lines())
    }

    /// All of it is so in a store that was just brought up, and there is nothing else but entries of jobs of which nothing was told.
    fn holds(&self, kind: Kind, store: &str, plugin: &Plugin) -> Census {
        let names: BTreeSet<_> = plugin.names().into_iter().collect();
        assert!(
            self.volumes.is_subset(&names),
            "{names:?} of {:?}",
            self.volumes
        );
        for name in &names {
            assert!(
                self.volumes.contains(name) || self.maybe.contains(name),
                "{name}"
            );
            plugin.ok("VolumeDriver.Get", &json!({"Name": name}));
        }
        let idle: Vec<_> = names.iter().map(|name| Known::idle(name)).collect();
        let census = settled(kind, store, &idle);
        for job in &self.published {
            assert_eq!(census.with_tag(&tag(*job)).len(), 1, "job {job}");
        }
        for job in &self.gone {
            assert_eq!(census.with_tag(&tag(*job)), [""; 0], "job {job}");
        }
        for (job, pinned) in &self.pinned {
            let entry = census.with_tag(&tag(*job))[0];
            assert_eq!(
                census.lvs[entry].contains("friend:pin"),
                *pinned,
                "{entry} of job {job}"
            );
        }
        census
    }
}

/// The jobs that were published so far, as [`tell`] notes it in this directory, which a guest shares.
pub fn published(share: &Path) -> Vec<u64> {
    let told = fs::read_to_string(share.join("told")).unwrap_or_default();
    // Without a last line that is half there.
    let whole = told.rfind('\n').map_or("", |end| &told[..end]);
    let numbers = whole
        .lines()
        .filter_map(|line| line.strip_prefix("published "));
    numbers.map(|number| number.parse().unwrap()).collect()
}

/// A line that outlives the guest.
pub fn tell(line: &str) {
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

/// Prepares it, and the configuration.
fn init(config: &Path) {
    let options = ["--vg", TestVg::NAME, "--size", "5G", "--base-size", "1G"];
    friend(config, &[&["init"][..], &options].concat());
}

/// Brings up what the disk holds, and looks at all of it.
fn bring_up() -> (Daemon, Census, Told) {
    let told = Told::read();
    let config = Path::new(CONFIG);
    if told.last == 0 {
        make_group();
        init(config);
    }
    let daemon = Daemon::start(config);
    let census = told.holds(Kind::Lvm, TestVg::NAME, daemon.plugin());
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
    make(plugin, tell, "kept", &json!({}));
    let at = plugin.mount("kept", "x");
    assert_eq!(Some(content::read(&at)), told.kept);
    plugin.unmount("kept", "x");
    keep(plugin, tell, number());
    fs::write(Path::new(SHARE).join("working"), "").unwrap();
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || {
                loop {
                    job(plugin, tell, &format!("w{worker}"), number());
                }
            });
        }
    });
}

/// How a client's answer is written down where the power cut does not reach.
pub type Tell = fn(&str);

fn make(plugin: &Plugin, tell: Tell, name: &str, options: &Value) {
    tell(&format!("making {name}"));
    plugin.create(name, options);
    tell(&format!("made {name}"));
}

fn remove(plugin: &Plugin, tell: Tell, name: &str) {
    tell(&format!("removing {name}"));
    plugin.remove(name);
    tell(&format!("removed {name}"));
}

/// The kept volume holds something else, and its job has flushed that.
fn keep(plugin: &Plugin, tell: Tell, number: u64) {
    let at = plugin.mount("kept", "x");
    tell(&format!("keeping {number}"));
    content::write(&at, number);
    run("sync", ["--file-system".as_ref(), at.as_os_str()]);
    tell(&format!("kept {number}"));
    plugin.unmount("kept", "x");
}

/// A job from the best entry there is to one of its own.
pub fn job(plugin: &Plugin, tell: Tell, name: &str, number: u64) {
    if plugin.names().iter().any(|there| there == name) {
        remove(plugin, tell, name);
    }
    let options = json!({"restore": "job-*", "save": format!("job-{number}")});
    make(plugin, tell, name, &options);
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
    assert_eq!(Some(content::read(&plugin.mount("kept", "x"))), told.kept);
    plugin.unmount("kept", "x");
    job(plugin, tell, "last", told.last + 1);
    daemon.stop();
}
