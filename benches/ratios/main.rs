// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon's work costs, as ratios to what it stands on.
//!
//! `cargo bench --bench ratios` boots one guest (`tests/vm/run`) and measures in it, on real thin pools: the two sides of a
//! ratio in turns, so that whatever else this machine does falls on both. Times of a guest say nothing by themselves. Names
//! of measurements (`mount entries at-once podman tar idle`) after `--` choose some. `--other=PROGRAM` measures nothing but
//! this build beside another one.

mod dm;
mod entries;
mod report;
mod site;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, umount};
use serde_json::json;

use report::{Goal, Ratio};
use site::{POOL, Site, run};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Test runners start benches too, and only `cargo bench` means it.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    // What tests/vm/run puts there; a name would not do, a host may have any.
    if !Path::new("/run/vm/command").exists() {
        boot(&arguments);
    }
    if let Some(other) = arguments.iter().find_map(|a| a.strip_prefix("--other=")) {
        report::heading();
        beside(Path::new(other));
        return;
    }
    let chosen: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.contains(&name);

    let mut few = Site::new("few", "/dev/vda", "5G", "3G");
    few.start();
    report::heading();
    if wanted("mount") {
        mount(&mut few);
    }
    if wanted("at-once") {
        at_once(&few);
    }
    if wanted("podman") {
        podman(&few);
    }
    if wanted("tar") {
        tar(&few);
    }
    if wanted("idle") {
        idle(&few);
    }
    // Last: every command of LVM's reads what is on the second disk then.
    if wanted("entries") {
        many_entries(&few);
    }
    few.stop();
}

/// Runs this program again, in a guest.
fn boot(arguments: &[String]) -> ! {
    let scratch =
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for the second disk");
    let status = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/run"))
        .args(["--timeout", "7200", "--mem", "3072", "--disk2"])
        .arg(format!("{}:4G", scratch.path().join("disk2").display()))
        .arg("--")
        .arg(std::env::current_exe().expect("this program"))
        .args(arguments)
        .status()
        .expect("tests/vm/run");
    drop(scratch);
    std::process::exit(status.code().unwrap_or(1));
}

/// A content for entries of which only the number matters.
pub fn one_file(at: &Path) {
    fs::write(at.join("file"), [7; 1 << 20]).unwrap();
}

const DIR: &str = "/run/bench/at";

/// What mount(2) takes for a device that is there.
fn bare_mount(device: &Path) -> Duration {
    fs::create_dir_all(DIR).unwrap();
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    let begin = Instant::now();
    nix::mount::mount(Some(device), DIR, Some("xfs"), flags, Some("nouuid")).unwrap();
    begin.elapsed()
}

/// A warm Mount beside mount(2), and a cold one beside all that it cannot do without.
fn mount(site: &mut Site) {
    let entry = site.publish("warm", one_file);
    let origin = site.thin_id(&entry.name);
    let mut pool = dm::Pool::open(&site.vg, POOL).unwrap();
    site.create("warm", &json!({"restore": "warm"}));
    site.quiet();

    let mut warm = Ratio::new("warm Mount", "mount(2) of a ready snapshot");
    for _ in 0..30 {
        warm.one(site.mount("warm"));
        site.unmount("warm");
        site.quiet();
        let thin = pool.snapshot(origin, entry.size).unwrap();
        warm.other(bare_mount(&thin.device));
        umount(DIR).unwrap();
        pool.remove(&thin).unwrap();
    }
    warm.print(Goal::AtMost(0.1));

    // A daemon that has just started trusts no copy of an earlier life: the first Mount makes a new one.
    let mut cold = Ratio::new("cold Mount", "create_snap, create, mount(2)");
    for _ in 0..15 {
        site.stop();
        site.start();
        let before = site.status("warm")["lv"].clone();
        cold.one(site.mount("warm"));
        let status = site.status("warm");
        assert!(
            status["restored"] == "exact" && status["lv"] != before,
            "no refresh was due: {status}"
        );
        site.unmount("warm");
        site.quiet();
        let begin = Instant::now();
        let thin = pool.snapshot(origin, entry.size).unwrap();
        let mount = bare_mount(&thin.device);
        cold.other(begin.elapsed().max(mount));
        umount(DIR).unwrap();
        pool.remove(&thin).unwrap();
    }
    cold.print(Goal::AtMost(2.0));
    site.remove("warm");
    site.quiet();
}

/// This build and another one: what a container waits for, and what an entry takes.
fn beside(other: &Path) {
    let mut sites = [
        Site::new("this", "/dev/vda", "3G", "300M"),
        Site::of(other, "other", "/dev/vdb", "3G", "300M"),
    ];
    for site in &mut sites {
        site.start();
        site.publish("entry", one_file);
        let both = json!({"restore": "entry", "save": "entry"});
        site.create("volume", &both);
        site.create(
            "job",
            &json!({"restore": "entry", "save": "job", "type": "job"}),
        );
        site.mount("job");
        site.quiet();
    }
    let [mut cold, mut warm, mut publish, mut late, mut save] =
        ["cold Mount", "warm Mount", "publish", "late mount", "save"]
            .map(|name| Ratio::new(name, "by the other build"));
    let both = [Ratio::one, Ratio::other];
    for round in 0..15 {
        for (site, side) in sites.iter_mut().zip(both) {
            site.stop();
            site.start();
            side(&mut cold, site.mount("volume"));
            one_file(&site.mountpoint("volume"));
            site.end("volume");
            site.quiet();
            side(&mut warm, site.mount("volume"));
            one_file(&site.mountpoint("volume"));
            side(&mut publish, site.end("volume").1);
            site.quiet();
            let place = format!("at-{round}");
            side(&mut late, site.ask("job", &format!("mount {place}\n")));
            one_file(&site.mountpoint("job").join(&place));
            side(&mut save, site.ask("job", &format!("save {place}\n")));
            site.quiet();
        }
    }
    for ratio in [cold, warm, publish, late, save] {
        ratio.print(Goal::None);
    }
    for site in &mut sites {
        site.stop();
    }
}

/// The same Mount in a pool of 10 entries and in one of 5,000.
fn many_entries(few: &Site) {
    let mut many = Site::new("many", "/dev/vdb", "3G", "300M");
    entries::fill(&mut many, 5_000);
    few.publish("entries", one_file);
    let sites = [&many, few];
    for site in sites {
        site.create("volume", &json!({"restore": "entries"}));
        site.quiet();
    }
    let mut mount = Ratio::new("warm Mount at 5,000 entries", "at 10");
    for _ in 0..11 {
        for (site, side) in sites.into_iter().zip([Ratio::one, Ratio::other]) {
            side(&mut mount, site.mount("volume"));
            site.unmount("volume");
            site.quiet();
        }
    }
    mount.print(Goal::AtMost(1.1));
    let mut create = Ratio::new("Create at 5,000 entries", "at 10");
    for _ in 0..3 {
        for (site, side) in sites.into_iter().zip([Ratio::one, Ratio::other]) {
            side(
                &mut create,
                site.create("another", &json!({"restore": "entries"})),
            );
            site.remove("another");
            site.quiet();
        }
    }
    create.print(Goal::None);
    let (daemon, lvm) = many.resident();
    report::memory("memory at 5,000 entries", daemon, lvm, Goal::None);
    few.remove("volume");
    few.quiet();
    many.stop();
}

/// Mounts of different volumes at the same moment.
fn at_once(site: &Site) {
    const VOLUMES: usize = 16;
    site.publish("at-once", one_file);
    let names: Vec<_> = (0..VOLUMES).map(|n| format!("at-once-{n}")).collect();
    for name in &names {
        site.create(name, &json!({"restore": "at-once"}));
    }
    site.quiet();
    let mut mounts = Ratio::new("16 Mounts at once", "one");
    for _ in 0..7 {
        mounts.other(site.mount(&names[0]));
        site.unmount(&names[0]);
        site.quiet();
        let barrier = Barrier::new(VOLUMES + 1);
        let took = thread::scope(|scope| {
            let threads: Vec<_> = names
                .iter()
                .map(|name| {
                    scope.spawn(|| {
                        barrier.wait();
                        site.mount(name);
                    })
                })
                .collect();
            barrier.wait();
            let begin = Instant::now();
            for thread in threads {
                thread.join().unwrap();
            }
            begin.elapsed()
        });
        mounts.one(took);
        for name in &names {
            site.unmount(name);
        }
        site.quiet();
    }
    mounts.print(Goal::AtMost(4.0));
    for name in &names {
        site.remove(name);
    }
    site.quiet();
}

/// A whole `podman run`, of a container that does nothing.
fn podman(site: &Site) {
    fs::create_dir_all("/etc/containers/containers.conf.d").unwrap();
    let plugin = format!(
        "[engine.volume_plugins]\nlvm-cache-friend = {:?}\n",
        site.socket()
    );
    fs::write("/etc/containers/containers.conf.d/50-bench.conf", plugin).unwrap();
    let image = run(
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/busybox-image"),
        &[],
    );
    site.publish("podman", one_file);
    let restore = ["-o", "restore=podman", "-o", "save=podman"];
    run(
        "podman",
        &[
            &["volume", "create", "--driver", "lvm-cache-friend"],
            &restore[..],
            &["ours"],
        ]
        .concat(),
    );
    run("podman", &["volume", "create", "local"]);
    let start = |volume: &str| {
        let volume = format!("{volume}:/cache");
        let begin = Instant::now();
        run(
            "podman",
            &[
                "run",
                "--rm",
                "--network",
                "none",
                "-v",
                &volume,
                image.trim(),
                "true",
            ],
        );
        begin.elapsed()
    };
    // What the first of all does once.
    start("local");
    site.quiet();
    let mut runs = Ratio::new("podman run with our volume", "with a local volume");
    for _ in 0..20 {
        runs.one(start("ours"));
        site.quiet();
        runs.other(start("local"));
    }
    runs.print(Goal::AtMost(1.02));
    run("podman", &["volume", "rm", "ours", "local"]);
    site.quiet();
}

/// A restore of 1 GiB in 20,000 files.
fn tar(site: &Site) {
    // Beside the pool, on an XFS of its own, as whoever unpacks archives would have it.
    run(
        "lvcreate",
        &["--quiet", "-y", "-n", "plain", "-l", "100%FREE", &site.vg],
    );
    let device = format!("/dev/{}/plain", site.vg);
    run("mkfs.xfs", &["-q", &device]);
    let plain = Path::new("/run/bench/plain");
    fs::create_dir_all(plain).unwrap();
    run("mount", &[&device, plain.to_str().unwrap()]);
    let archive = plain.join("cache.tar.zst");
    let archive = archive.to_str().unwrap();
    site.publish("tar", |at| {
        fill(at);
        run(
            "tar",
            &["--zstd", "-C", at.to_str().unwrap(), "-cf", archive, "."],
        );
    });
    let unpacked = plain.join("cache");
    let unpack = || {
        fs::create_dir(&unpacked).unwrap();
        let begin = Instant::now();
        run(
            "tar",
            &["--zstd", "-C", unpacked.to_str().unwrap(), "-xf", archive],
        );
        let took = begin.elapsed();
        assert_eq!(count(&unpacked), FILES);
        fs::remove_dir_all(&unpacked).unwrap();
        run("sync", &[]);
        took
    };
    let mut whole = Ratio::new("tar --zstd, 1 GiB in 20,000 files", "our Create and Mount");
    let mut waited = Ratio::new(
        "tar --zstd, 1 GiB in 20,000 files",
        "our Mount: what the job waits for",
    );
    for round in 0..9 {
        if round % 3 == 0 {
            let took = unpack();
            whole.one(took);
            waited.one(took);
        }
        let create = site.create("restored", &json!({"restore": "tar"}));
        let mount = site.mount("restored");
        whole.other(create + mount);
        waited.other(mount);
        if round == 0 {
            assert_eq!(count(&site.mountpoint("restored")), FILES);
        }
        site.unmount("restored");
        site.remove("restored");
        site.quiet();
    }
    whole.print(Goal::AtLeast(100.0));
    waited.print(Goal::None);
    run("umount", &[plain.to_str().unwrap()]);
}

const FILES: usize = 20_000;

/// 1 GiB of what compresses about as source and object code do, to a third.
fn fill(at: &Path) {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut file = Vec::with_capacity((1 << 30) / FILES);
    for n in 0..FILES {
        file.clear();
        while file.len() < (1 << 30) / FILES {
            // xorshift64
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            file.extend_from_slice(&random.to_ne_bytes());
            file.extend_from_slice(b"and what is the same    ");
        }
        let dir = at.join(format!("{:03}", n / 100));
        if n % 100 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        fs::write(dir.join(n.to_string()), &file).unwrap();
    }
}

fn count(below: &Path) -> usize {
    let entries = fs::read_dir(below).unwrap().flatten();
    entries
        .map(|entry| {
            if entry.file_type().unwrap().is_dir() {
                count(&entry.path())
            } else {
                1
            }
        })
        .sum()
}

/// What the daemon takes while nobody asks it for anything, with volumes that wait.
fn idle(site: &Site) {
    const SECONDS: u64 = 10;
    for n in 0..8 {
        site.create(&format!("idle-{n}"), &json!({"restore": "none"}));
    }
    site.quiet();
    // Tokio's threads for what blocks end 10 s after their last work.
    thread::sleep(Duration::from_secs(15));
    let wake_ups = site.wake_ups(Duration::from_secs(SECONDS));
    let (daemon, lvm) = site.resident();
    report::memory(
        "memory with 8 volumes ready",
        daemon,
        lvm,
        Goal::AtMost(15.0),
    );
    report::count(
        &format!("wake-ups of the daemon in {SECONDS} idle seconds"),
        wake_ups,
        Goal::AtMost(0.0),
    );
    for n in 0..8 {
        site.remove(&format!("idle-{n}"));
    }
    site.quiet();
}
