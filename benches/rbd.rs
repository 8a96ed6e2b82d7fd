// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Create on Ceph by the tool `rbd`, a process for each step, and by Ceph's library, in one run.
//!
//! For a machine with a cluster, as `tests/vm/ceph` brings it up in a guest:
//! `tests/vm/run --tree trixie-ceph --mem 4096 -- sh -c 'tests/vm/ceph /srv/ceph && target/release/deps/rbd-…'` with what
//! `cargo bench --no-run --bench rbd` names. Each figure is the median of some rounds, in milliseconds.

use std::process::Command;
use std::time::Instant;

use lvm_cache_friend::cache::names::LvName;
use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::mount::Mounted;
use lvm_cache_friend::storage::rbd::{self, Place, RbdStore};
use lvm_cache_friend::storage::{NewLv, Store as _};

const ROUNDS: usize = 7;

fn main() {
    if Command::new("rbd").arg("--version").output().is_err() {
        println!("no Ceph here: see the head of this file");
        return;
    }
    let place = Place {
        pool: "rbd".into(),
        namespace: "caches".into(),
        user: "cache".into(),
        conf: None,
    };
    let run_dir = std::path::Path::new("/run/lvm-cache-friend");
    let opened = Instant::now();
    let store = rbd::init(&place, "bench", run_dir, Bytes::mib(512)).expect("a store on Ceph");
    println!(
        "init, with connection and base: {} ms",
        opened.elapsed().as_millis()
    );
    let opened = Instant::now();
    drop(RbdStore::open(&place, "bench", run_dir).expect("a store"));
    println!("open once more: {} ms", opened.elapsed().as_millis());
    println!("memory: {}", resident());

    let base = store.list().expect("a listing").lvs[0].name.clone();
    // The first takes the base's snapshot, and has the kernel connect.
    create(&store, &base, "first");
    let mut rows = Vec::new();
    for round in 0..ROUNDS {
        rows.push(create(&store, &base, &format!("by-library{round}")));
    }
    print_rows(
        "by library",
        &["snapshot: clone, tags, map", "mount"],
        &rows,
    );

    let parent = "rbd/caches/parent";
    let rbd = |arguments: &[&str]| {
        let begun = Instant::now();
        let done = Command::new("rbd")
            .args(["--id", "cache"])
            .args(arguments)
            .output()
            .expect("rbd");
        assert!(
            done.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        begun.elapsed().as_secs_f64() * 1000.0
    };
    rbd(&["create", "--size", "512M", parent]);
    let device = || {
        let list = Command::new("rbd")
            .args(["--id", "cache", "device", "list", "--format", "json"])
            .output()
            .expect("rbd");
        let list: serde_json::Value = serde_json::from_slice(&list.stdout).expect("JSON");
        let found = list.as_array().expect("a list").iter().find(|device| {
            device["name"]
                .as_str()
                .is_some_and(|name| name == "parent" || name.starts_with("by-tool"))
        });
        found.expect("a device")["device"]
            .as_str()
            .expect("its path")
            .to_owned()
    };
    rbd(&["device", "map", "-o", "noudev", parent]);
    lvm_cache_friend::fs::make(device().as_ref(), FsType::Xfs).expect("mkfs");
    rbd(&["device", "unmap", "-o", "noudev", parent]);
    rbd(&["snap", "create", "rbd/caches/parent@s"]);
    let mut rows = Vec::new();
    for round in 0..ROUNDS {
        let image = format!("rbd/caches/by-tool{round}");
        let clone = rbd(&[
            "clone",
            "--rbd-default-clone-format",
            "2",
            "rbd/caches/parent@s",
            &image,
        ]);
        let tags = rbd(&["image-meta", "set", &image, "friend:tags", "a b c"]);
        let map = rbd(&["device", "map", "-o", "noudev", &image]);
        let begun = Instant::now();
        let mounted = Mounted::device(device().as_ref(), FsType::Xfs);
        let _ = begun;
        drop(mounted);
        let unmap = rbd(&["device", "unmap", "-o", "noudev", &image]);
        rows.push(vec![clone, tags, map, unmap]);
    }
    print_rows("by rbd", &["clone", "one tag", "map", "unmap"], &rows);

    // Publishing: a snapshot of what is written, whatever its size.
    let mut rows = Vec::new();
    let path = store
        .snapshot(&base, &new("lease", true))
        .expect("a copy")
        .expect("its device");
    let mounted = Mounted::device(&path, FsType::Xfs).expect("a mount");
    for round in 0..ROUNDS {
        let begun = Instant::now();
        store
            .snapshot(&lv("lease"), &new(&format!("entry{round}"), false))
            .expect("an entry");
        let published = begun.elapsed().as_secs_f64() * 1000.0;
        let begun = Instant::now();
        store
            .change_tags(
                &lv("lease"),
                &[format!("friend:note:{round}").parse().unwrap()],
                &[],
            )
            .expect("a tag");
        let tagged = begun.elapsed().as_secs_f64() * 1000.0;
        let begun = Instant::now();
        store.list().expect("a listing");
        rows.push(vec![
            published,
            tagged,
            begun.elapsed().as_secs_f64() * 1000.0,
        ]);
    }
    drop(mounted);
    print_rows(
        "by library",
        &["publish, mounted", "change tags", "list"],
        &rows,
    );
    println!("memory: {}", resident());
}

fn create(store: &RbdStore, base: &LvName, name: &str) -> Vec<f64> {
    let begun = Instant::now();
    let path = store
        .snapshot(base, &new(name, true))
        .expect("a copy")
        .expect("its device");
    let made = begun.elapsed().as_secs_f64() * 1000.0;
    let begun = Instant::now();
    drop(Mounted::device(&path, FsType::Xfs).expect("a mount"));
    vec![made, begun.elapsed().as_secs_f64() * 1000.0]
}

fn lv(name: &str) -> LvName {
    name.parse().expect("a name")
}

fn new(name: &str, active: bool) -> NewLv {
    NewLv {
        name: lv(name),
        tags: ["friend:snapshot", "friend:cache:linux"]
            .map(|tag| tag.parse().expect("a tag"))
            .into(),
        active,
    }
}

fn print_rows(how: &str, names: &[&str], rows: &[Vec<f64>]) {
    for (column, name) in names.iter().enumerate() {
        let mut figures: Vec<f64> = rows.iter().map(|row| row[column]).collect();
        figures.sort_by(f64::total_cmp);
        println!(
            "{how}: {name}: {:.0} ms ({:.0} to {:.0})",
            figures[figures.len() / 2],
            figures[0],
            figures[figures.len() - 1]
        );
    }
}

/// What this process has in memory.
fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.unwrap_or("unknown").to_owned()
}
