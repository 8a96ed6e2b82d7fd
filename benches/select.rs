// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a choice takes at 10,000 entries of 8 tags, and its index to build.
//!
//! `cargo bench --bench select` prints minimum, median and maximum of each case,
//! and how often it asked for memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lvm_cache_friend::cache::names::Tag;
use lvm_cache_friend::cache::select::{Entry, Index};
use lvm_cache_friend::cache::spec::Spec;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED: AtomicU64 = AtomicU64::new(0);

// SAFETY: all is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        ALLOCATED.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps `GlobalAlloc`'s rules.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps `GlobalAlloc`'s rules.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// `count` entries of 8 tags, `distinct` of them in no other entry.
fn entries(count: u64, distinct: u64, scopes: u64) -> Vec<Entry> {
    let tag = |text: String| text.parse::<Tag>().unwrap();
    (0..count)
        .map(|seq| {
            // Spread over the alphabet as hashes are.
            let mixed = |n: u64| (seq * 8 + n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let own = (0..distinct).map(|n| tag(format!("npm-feature-{:016x}", mixed(n))));
            let shared = (distinct..8).map(|n| match n {
                7 => tag("linux".to_owned()),
                6 => tag(format!("half-{}", seq % 2)),
                _ => tag(format!("branch-{}", mixed(n) % 500)),
            });
            Entry {
                lv: format!("friend-{seq:011}").parse().unwrap(),
                seq,
                created: seq,
                scope: (scopes > 0).then(|| tag(format!("scope-{}", seq % scopes))),
                tags: own.chain(shared).collect(),
            }
        })
        .collect()
}

fn spec(restore: &str, scopes: &str) -> Spec {
    let (scope, read) = scopes.split_once(' ').unwrap_or((scopes, ""));
    let options = [
        ("restore", restore),
        ("scope", scope),
        ("read-scopes", read),
    ];
    let options: BTreeMap<_, _> = options
        .into_iter()
        .map(|(option, value)| (option.to_owned(), value.to_owned()))
        .collect();
    Spec::parse(&options).unwrap()
}

/// Prints what `runs` runs of `work` took.
fn measure<T>(name: &str, runs: usize, mut work: impl FnMut() -> T) {
    let mut took = Vec::with_capacity(runs);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..runs {
        let start = Instant::now();
        let result = black_box(work());
        took.push(start.elapsed());
        drop(result);
    }
    let allocations = (ALLOCATIONS.load(Ordering::Relaxed) - before) / runs as u64;
    took.sort_unstable();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{name:56} {:9.1} {:9.1} {:9.1} {allocations:8}",
        us(took[0]),
        us(took[runs / 2]),
        us(took[runs - 1])
    );
}

fn main() {
    // Test runners start benches too, and only `cargo bench` means it.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    println!(
        "{:56} {:>9} {:>9} {:>9} {:>8}",
        "µs", "min", "median", "max", "allocs"
    );
    for (count, distinct, scopes, name) in [
        (100, 3, 0, "100 entries, 3 of 8 tags unique"),
        (10_000, 3, 0, "10,000 entries, 3 of 8 tags unique"),
        (10_000, 3, 5_000, "10,000 entries in 5,000 scopes"),
        (10_000, 8, 0, "10,000 entries, all tags unique"),
    ] {
        let mut made: Vec<_> = (0..15).map(|_| entries(count, distinct, scopes)).collect();
        measure(name, 15, || Index::new(made.pop().unwrap()));
        let before = ALLOCATED.load(Ordering::Relaxed);
        let index = Index::new(entries(count, distinct, scopes));
        let kib = (ALLOCATED.load(Ordering::Relaxed) - before) / 1024;
        println!("  index and entries: {kib} KiB");

        let repeat = |n, criterion: &dyn Fn(usize) -> String| {
            (0..n).map(criterion).collect::<Vec<_>>().join(";")
        };
        let oldest = index.entries().last().unwrap().tags[0].clone();
        let few = "scope-1 scope-2 scope-0 -";
        let many: Vec<_> = (0..16).map(|n| format!("scope-{n}")).collect();
        let many = format!("{} -", many.join(" "));
        for (name, restore, scopes) in [
            ("the newest of all", "linux".to_owned(), few),
            ("the oldest of all", format!("linux {oldest}"), few),
            (
                "none: 32 x an unknown tag",
                repeat(32, &|n| format!("linux none-{n}")),
                few,
            ),
            (
                "none: 32 x two halves",
                repeat(32, &|_| "half-0 half-1".to_owned()),
                few,
            ),
            (
                "none: 21 x a prefix of most tags and two halves",
                repeat(21, &|_| "npm-f* half-0 half-1".to_owned()),
                few,
            ),
            (
                "none: 21 x a prefix of some tags and two halves",
                repeat(21, &|n| format!("npm-feature-{}* half-0 half-1", n % 10)),
                few,
            ),
            (
                "none: 32 x prefixes of most and of no tags, 17 scopes",
                repeat(32, &|_| "npm-* z*".to_owned()),
                &many,
            ),
        ] {
            let spec = spec(&restore, scopes);
            measure(&format!("  {name}"), 301, || index.choose(&spec));
        }
    }
}
