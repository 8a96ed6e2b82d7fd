// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Create on Ceph by the tool `rbd`, a process for each step, and by Ceph's library, in one run; what each step takes on Ceph and
//! on LVM; when another host sees an entry; and whether a Create takes as long of a deep chain, and among a thousand entries.
//!
//! For a machine with a cluster, as `tests/vm/ceph` brings it up in a guest:
//! `tests/vm/run --tree trixie-ceph --mem 4096 -- sh -c 'tests/vm/ceph /srv/ceph && target/release/deps/rbd-…'` with what
//! `cargo bench --no-run --bench rbd` names. Each figure is the median of some rounds, in milliseconds.

use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use lvm_cache_friend::cache::names::LvName;
use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::mount::Mounted;
use lvm_cache_friend::storage::lvm::{self, LvmStore};
use lvm_cache_friend::storage::rbd::ceph::Cluster;
use lvm_cache_friend::storage::rbd::{self, Place, RbdStore};
use lvm_cache_friend::storage::{Lv, NewLv, Store};

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
    let store =
        rbd::init(&place, "bench", run_dir, Bytes::mib(512), &mut |_| {}).expect("a store on Ceph");
    println!(
        "init, with connection and base: {} ms",
        opened.elapsed().as_millis()
    );
    let opened = Instant::now();
    drop(RbdStore::open(&place, "bench", run_dir).expect("a store"));
    println!("open once more: {} ms", opened.elapsed().as_millis());
    println!("memory: {}", resident());

    let base = base_of(&store);
    // Of a run before, what it made may be there still.
    let run = std::process::id();
    let parent = format!("rbd/caches/parent{run}");
    let parent = parent.as_str();
    let rbd = |arguments: &[&str]| {
        let begun = Instant::now();
        let done = Command::new("rbd")
            .args(["--id", "cache"])
            .args(arguments)
            .output()
            .expect("rbd");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {said}");
        (
            since(begun),
            String::from_utf8_lossy(&done.stdout).into_owned(),
        )
    };
    rbd(&["create", "--size", "512M", parent]);
    let device = rbd(&["device", "map", "-o", "noudev", parent]).1;
    lvm_cache_friend::fs::make(device.trim().as_ref(), FsType::Xfs).expect("mkfs");
    rbd(&["device", "unmap", "-o", "noudev", parent]);
    let snapshot = format!("{parent}@s");
    rbd(&["snap", "create", &snapshot]);
    let cluster = Cluster::connect(&place.user, None).expect("a cluster");
    let pool = cluster.pool(&place.pool, &place.namespace).expect("a pool");

    // The first takes the base's snapshot, and has the kernel connect.
    create(&store, &base, &format!("first{run}"));
    let (mut by_library, mut by_tool) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut row = create(&store, &base, &format!("by-library{run}-{round}"));
        let begun = Instant::now();
        let clone = format!("clone{run}-{round}");
        pool.clone_image(&format!("parent{run}"), "s", &clone)
            .expect("a clone");
        row.push(since(begun));
        by_library.push(row);

        let image = format!("rbd/caches/by-tool{run}-{round}");
        let clone = rbd(&[
            "clone",
            "--rbd-default-clone-format",
            "2",
            &snapshot,
            &image,
        ]);
        let tags = rbd(&["image-meta", "set", &image, "friend:tags", "a b c"]);
        let map = rbd(&["device", "map", "-o", "noudev", &image]);
        let begun = Instant::now();
        drop(Mounted::device(map.1.trim().as_ref(), FsType::Xfs).expect("a mount"));
        by_tool.push(vec![
            clone.0 + tags.0 + map.0,
            since(begun),
            clone.0,
            tags.0,
            map.0,
        ]);
    }
    let names = ["clone, tags and map", "mount", "of that, clone"];
    print_rows("by library", &names, &by_library);
    let names = [
        "clone, tags and map",
        "mount",
        "of that, clone",
        "one tag",
        "map",
    ];
    print_rows("by rbd", &names, &by_tool);

    let local = lvm(&lv("friend-pool"), run_dir);
    let local_base = base_of(&local);
    let (mut on_ceph, mut on_lvm) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let name = format!("{run}-{round}");
        on_ceph.push(life(&store, &base, &name));
        on_lvm.push(life(&local, &local_base, &name));
    }
    print_rows("on Ceph", &LIFE, &on_ceph);
    print_rows("on LVM", &LIFE, &on_lvm);
    seen(&store, &base, &place, run);
    flat(&store, &base, run);
    println!("memory: {}", resident());
}

/// A pool in a file, as `init --loop` makes it.
fn lvm(pool: &LvName, run_dir: &Path) -> LvmStore {
    let file = Path::new("/var/tmp/friend-bench.img");
    let (size, base) = (Bytes::mib(3072), Bytes::mib(512));
    let made = lvm::init_loop(file, size, pool, base, run_dir, &mut |_| {}).expect("a pool");
    LvmStore::open(made.as_str(), pool.as_str(), run_dir).expect("a store")
}

fn base_of(store: &dyn Store) -> LvName {
    let is_base = |lv: &Lv| lv.tags.iter().any(|tag| tag.as_str() == "friend:default");
    let listed = store.list().expect("a listing").lvs;
    listed.into_iter().find(is_base).expect("a base").name
}

const LIFE: [&str; 6] = ["copy", "mount", "publish", "change tags", "list", "remove"];

/// What becomes of a volume, step by step: a copy, a job that writes 1 MiB, an entry of it.
fn life(store: &dyn Store, from: &LvName, name: &str) -> Vec<f64> {
    let copy = lv(&format!("copy{name}"));
    let mut row = Vec::new();
    let mut step = |begun: Instant| row.push(since(begun));
    let begun = Instant::now();
    let path = store.snapshot(from, &new(copy.as_str(), true));
    let path = path.expect("a copy").expect("its device");
    step(begun);
    let begun = Instant::now();
    let mounted = Mounted::device(&path, FsType::Xfs).expect("a mount");
    step(begun);
    write(&mounted, 1);
    drop(mounted);
    let begun = Instant::now();
    let entry = new(&format!("entry{name}"), false);
    store.snapshot(&copy, &entry).expect("an entry");
    step(begun);
    let begun = Instant::now();
    let note = "friend:note:bench".parse().expect("a tag");
    store.change_tags(&copy, &[note], &[]).expect("a tag");
    step(begun);
    let begun = Instant::now();
    store.list().expect("a listing");
    step(begun);
    let begun = Instant::now();
    store.remove(&copy).expect("removed");
    step(begun);
    row
}

/// Writes so many MiB to a file of its own.
fn write(mounted: &Mounted, mib: usize) {
    let path = format!("/proc/self/fd/{}/bench", mounted.root().as_raw_fd());
    std::fs::write(path, vec![7; mib << 20]).expect("written");
    mounted.sync().expect("written");
}

/// When another host sees an entry: at its next choice, and by itself.
fn seen(store: &RbdStore, base: &LvName, place: &Place, run: u32) {
    let run_dir = Path::new("/run/lvm-cache-friend-other");
    let other = RbdStore::open(place, "other", run_dir).expect("a store");
    let told = run_dir.join("rbd/generation");
    let of = || std::fs::read_to_string(&told).unwrap_or_default();
    let mut rows = Vec::new();
    for round in 0..ROUNDS {
        other.list().expect("a listing");
        // So that nothing is told of what came before.
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let before = of();
        let entry = lv(&format!("seen{run}-{round}"));
        store
            .snapshot(base, &new(entry.as_str(), false))
            .expect("an entry");
        let begun = Instant::now();
        let listed = other.list().expect("a listing").lvs;
        assert!(listed.iter().any(|found| found.name == entry), "not seen");
        let mut row = vec![since(begun)];
        while of() == before {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        row.push(since(begun));
        rows.push(row);
    }
    print_rows(
        "another host",
        &["its listing, with the entry", "is told by itself"],
        &rows,
    );
}

/// What a copy takes of an entry and of its descendant of the twelfth generation, among a few entries and among a thousand. Of
/// each generation first, as its chain is then: from some depth on the store makes an image free of its parents beside that.
fn flat(store: &RbdStore, base: &LvName, run: u32) {
    const DEPTH: usize = 12;
    const MANY: usize = 1000;
    let mut from = base.clone();
    let mut first = None;
    for generation in 1..=DEPTH {
        let name = format!("{run}-line{generation}");
        let took = life(store, &from, &name)[0];
        let deepest = store.report().expect("what the cluster says").deepest;
        println!("generation {generation}: {took:.0} ms, of at most {deepest} parents");
        from = lv(&format!("entry{name}"));
        first.get_or_insert(from.clone());
    }
    let first = first.expect("an entry");
    let few = store.list().expect("a listing").lvs.len();
    let depth = [("first", &first), ("twelfth", &from)];
    let copies = |among: &str| {
        let mut rows = Vec::new();
        for round in 0..2 * ROUNDS {
            let row = depth.map(|(which, entry)| {
                let name = format!("copy{run}-{among}-{which}-{round}");
                let took = create(store, entry, &name)[0];
                store.remove(&lv(&name)).expect("removed");
                took
            });
            rows.push(row.to_vec());
        }
        rows
    };
    print_rows(
        &format!("a copy, among {few}"),
        &["of the first", "of the twelfth"],
        &copies("few"),
    );
    let lease = format!("many{run}");
    store.snapshot(base, &new(&lease, false)).expect("a copy");
    for number in few..MANY {
        let entry = new(&format!("many{run}-{number}"), false);
        store.snapshot(&lv(&lease), &entry).expect("an entry");
    }
    let many = store.list().expect("a listing").lvs.len();
    print_rows(
        &format!("a copy, among {many}"),
        &["of the first", "of the twelfth"],
        &copies("many"),
    );
}

fn create(store: &RbdStore, base: &LvName, name: &str) -> Vec<f64> {
    let begun = Instant::now();
    let path = store
        .snapshot(base, &new(name, true))
        .expect("a copy")
        .expect("its device");
    let made = since(begun);
    let begun = Instant::now();
    drop(Mounted::device(&path, FsType::Xfs).expect("a mount"));
    vec![made, since(begun)]
}

/// Milliseconds.
fn since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
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
