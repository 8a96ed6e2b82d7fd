// SPDX-License-Identifier: Apache-2.0 OR MIT
//! No room: a job that fills the pool is told so, and nobody else pays for it.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use serde_json::json;

use crate::harness::{Test, Tier, test};
use crate::jobs::ask_here;
use crate::support::census::{Held, Known};
use crate::support::command::{outcome, run};
use crate::support::content::{self, Content};
use crate::support::site::{Kind, Site, with_each_local_store};
use crate::support::wait_until;

const MIB: usize = 1 << 20;

/// What there is room for, in MiB.
const ROOM: usize = 300;

pub fn tests() -> Vec<Test> {
    // On Ceph how full the pool is comes from its manager, seconds late: it is not told to the MiB that these tests look at.
    let mut tests = with_each_local_store(
        "full",
        &[
            ("of_one_job", of_one_job),
            ("by_a_job_volume", by_a_job_volume),
        ],
    );
    let lost = || writes_are_lost(Kind::Reflink, false);
    tests.push(test(Tier::Reflink, "full::writes_are_lost", lost));
    let forgotten = || writes_are_lost(Kind::Reflink, true);
    let name = "full::writes_that_are_lost_are_not_forgotten";
    tests.push(test(Tier::Reflink, name, forgotten));
    tests
}

/// What a job wrote could not be stored, and the kernel says so once: no checkpoint holds that, nor does the end, in whichever
/// life of the daemon.
fn writes_are_lost(kind: Kind, restarts: bool) {
    let site = small(kind);
    let mut daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("job", &json!({"type": "job", "save": "linux"}));
    let job = plugin.mount("job", "x");
    let answer = ask_here(&job, "mount x\n");
    assert!(answer.contains("\nok "), "{answer}");
    let big = job.join("x/big");
    // Neither of them looks at what became of it.
    let of = format!("of={}", big.display());
    outcome(
        "dd",
        ["if=/dev/zero", "bs=1M", &format!("count={}", 4 * ROOM), &of],
    );
    outcome("sync", ["--file-system".as_ref(), big.as_os_str()]);
    let ballast = Path::new(&site.store()).parent().unwrap().join("ballast");
    std::fs::remove_file(ballast).unwrap();
    for _ in 0..2 {
        let answer = ask_here(&job, "save x more\n");
        assert!(answer.starts_with("error "), "{answer}");
    }
    let mut why = "it did not end cleanly";
    if restarts {
        daemon.kill();
        daemon = site.serve();
        why = "no save tags";
    }
    let plugin = daemon.plugin();
    plugin.unmount("job", "x");
    let last = || plugin.status("job")["last_lease"]["x"].clone();
    wait_until(|| last().is_object());
    assert_eq!(last()["why"], why, "{}", last());
    daemon.stop();
}

/// A store with little room, in which no job is cut off for filling it (`bounds::who_fills_the_store_is_cut_off`).
fn small(kind: Kind) -> Site {
    let site = Site::bare(kind);
    let store = site.store();
    match kind {
        Kind::Lvm => {
            let size = format!("{ROOM}M");
            site.done(&["init", "--vg", &store, "--size", &size, "--base-size", "1G"]);
        }
        Kind::Reflink => {
            site.init();
            let fs = Path::new(&store).parent().unwrap();
            let stat = nix::sys::statvfs::statvfs(fs).unwrap();
            let (size, free) = (stat.blocks(), stat.blocks_available());
            // Below a twentieth that is free nothing is made.
            let keep = size / 20 + ((ROOM * MIB) as u64 / stat.fragment_size());
            let ballast = ((free - keep) * stat.fragment_size()).to_string();
            let file = fs.join("ballast");
            run(
                "fallocate",
                ["-l".as_ref(), ballast.as_ref(), file.as_os_str()],
            );
        }
        Kind::Rbd => unreachable!("see `tests`"),
    }
    site.configure("policy.cut-off = \"0%\"\n");
    site
}

fn of_one_job(kind: Kind) {
    let site = small(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let cached = json!({"restore": "a", "save": "a"});
    plugin.create("first", &cached);
    let at = plugin.mount("first", "x");
    content::write(&at, 1);
    plugin.unmount("first", "x");
    plugin.create("other", &json!({}));
    let other = plugin.mount("other", "x");
    content::write(&other, 10);
    run("sync", ["--file-system".as_ref(), other.as_os_str()]);
    plugin.create("hog", &cached);
    let volumes = [
        Known::idle("first"),
        Known::mounted("other"),
        Known::idle("hog"),
    ];
    let entries = site.settled(&volumes).entries();
    assert_eq!(entries.len(), 1);

    let hog = plugin.mount("hog", "x");
    let error = fill(&hog.join("big")).unwrap_err();
    println!("the job that fills it sees: {error}");
    assert!(
        matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EIO)),
        "{error:?}"
    );

    assert_eq!(plugin.names().len(), 3);
    assert_eq!(content::read(&other), Content::Whole(10));
    let late = json!({"Name": "late", "Opts": cached});
    told_of_no_room(kind, &plugin.refused("VolumeDriver.Create", &late));
    // Something holds on to what the job wrote, and its volume is wanted again.
    let held = Held::new(&site, &hog);
    plugin.unmount("hog", "x");
    let again = json!({"Name": "hog", "ID": "x"});
    told_of_no_room(kind, &plugin.refused("VolumeDriver.Mount", &again));
    let mut scratch = cached.clone();
    scratch["on-error"] = "scratch".into();
    scratch["size"] = "64M".into();
    plugin.create("scratch", &scratch);
    let at = plugin.mount("scratch", "x");
    content::write(&at, 20);
    assert_eq!(
        run("stat", ["-f".as_ref(), "-c%T".as_ref(), at.as_os_str()]),
        "tmpfs\n"
    );
    plugin.unmount("scratch", "x");
    plugin.remove("scratch");
    drop(held);

    // Its data is dropped, never published, and that makes room.
    assert_eq!(site.settled(&volumes).entries(), entries);
    assert!(
        daemon.log().contains("it did not end cleanly"),
        "its lease's line"
    );
    plugin.create("late", &cached);
    let at = plugin.mount("late", "x");
    assert_eq!(content::read(&at), Content::Whole(1));
    content::write(&at, 2);
    plugin.unmount("late", "x");
    assert_eq!(content::read(&other), Content::Whole(10));
    content::write(&other, 11);
    run("sync", ["--file-system".as_ref(), other.as_os_str()]);
    plugin.unmount("other", "x");
    let at = plugin.mount("other", "x");
    assert_eq!(content::read(&at), Content::Whole(11));
    plugin.unmount("other", "x");
    let census = site.settled(&["first", "other", "hog", "late"].map(Known::idle));
    let mut numbers: Vec<_> = census
        .entries()
        .iter()
        .map(|entry| census.content(entry).unwrap())
        .collect();
    numbers.sort_by_key(|content| format!("{content:?}"));
    assert_eq!(numbers, [Content::Whole(1), Content::Whole(2)]);
    daemon.stop();
}

/// What a job asks for on its socket is refused before any write of anybody's fails.
fn by_a_job_volume(kind: Kind) {
    let site = small(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let of_b = json!({"scope": "b", "restore": "linux", "save": "linux"});
    plugin.create("b", &of_b);
    let at = plugin.mount("b", "x");
    content::write(&at, 1);
    plugin.unmount("b", "x");
    let entries = site.settled(&[Known::idle("b")]).entries();
    let at = plugin.mount("b", "x");

    plugin.create(
        "job",
        &json!({"type": "job", "scope": "a", "save": "linux"}),
    );
    let job = plugin.mount("job", "x");
    let answer = ask_here(&job, "mount x\n");
    assert!(answer.contains("\nok "), "{answer}");
    let mut big = File::create(job.join("x/big")).unwrap();
    while has_room(&site) {
        big.write_all(&[0x5a; 4 * MIB]).unwrap();
        big.sync_data().unwrap();
    }
    drop(big);
    for request in ["save x more\n", "mount y\n"] {
        let answer = ask_here(&job, request);
        assert!(answer.starts_with("error "), "{answer}");
        told_of_no_room(kind, &answer);
    }
    let late = json!({"Name": "late", "Opts": of_b});
    told_of_no_room(kind, &plugin.refused("VolumeDriver.Create", &late));
    for (dir, number) in [(at.clone(), 2), (job.join("x"), 3)] {
        content::write(&dir, number);
        run("sync", ["--file-system".as_ref(), dir.as_os_str()]);
    }
    assert_eq!(site.census().entries(), entries, "nothing had to go for it");

    plugin.unmount("job", "x");
    let volumes = [Known::mounted("b"), Known::idle("job")];
    assert_eq!(site.settled(&volumes).entries(), entries);
    let last = plugin.status("job")["last_lease"]["x"]["why"].to_string();
    told_of_no_room(kind, &last);
    plugin.unmount("b", "x");
    let census = site.settled(&["b", "job"].map(Known::idle));
    let whole = census
        .entries()
        .into_iter()
        .map(|entry| census.content(&entry));
    let whole: Vec<_> = whole.map(Result::unwrap).collect();
    assert_eq!(whole.len(), 2);
    assert!(whole.contains(&Content::Whole(1)) && whole.contains(&Content::Whole(2)));
    daemon.stop();
}

/// Whether volumes are still made.
fn has_room(site: &Site) -> bool {
    match site.kind {
        Kind::Lvm => {
            let pool = format!("{}/friend-pool", site.store());
            let used = run("lvs", ["--noheadings", "-o", "data_percent", &pool]);
            used.trim().parse::<f64>().unwrap() < 96.0
        }
        Kind::Reflink => {
            let stat = nix::sys::statvfs::statvfs(Path::new(&site.store())).unwrap();
            stat.blocks_available() >= stat.blocks() / 20
        }
        Kind::Rbd => unreachable!("see `tests`"),
    }
}

/// Writes until that fails.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    for _ in 0..4 * ROOM {
        file.write_all(&[0x5a; MIB])?;
        file.sync_data()?;
    }
    Ok(())
}

/// Which bound, how full, and what to do.
fn told_of_no_room(kind: Kind, refusal: &str) {
    println!("refused: {refusal}");
    let store = match kind {
        Kind::Reflink => "free in",
        Kind::Lvm => "testvg/friend-pool",
        Kind::Rbd => "pool rbd",
    };
    for part in ["full", store, "remove"] {
        assert!(refusal.contains(part), "{part}: {refusal}");
    }
    assert!(refusal.contains(|c: char| c.is_ascii_digit()), "{refusal}");
}
