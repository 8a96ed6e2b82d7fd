//! No room: a job that fills the pool is told so, and nobody else pays for it.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use serde_json::json;

use crate::harness::{Group, Test, Tier, test};
use crate::support::census::{Held, Known};
use crate::support::command::run;
use crate::support::content::{self, Content};
use crate::support::site::{Kind, Site};

const MIB: usize = 1 << 20;

/// What there is room for, in MiB.
const ROOM: usize = 300;

pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (tier, kind) in [
        (Tier::Reflink, Kind::Reflink),
        (Tier::Guest(Group::Lvm), Kind::Lvm),
    ] {
        tests.push(test(tier, "full::of_one_job", move || of_one_job(kind)));
    }
    tests
}

/// A store with little room.
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
    }
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
    };
    for part in ["full", store, "remove"] {
        assert!(refusal.contains(part), "{part}: {refusal}");
    }
    assert!(refusal.contains(|c: char| c.is_ascii_digit()), "{refusal}");
}
