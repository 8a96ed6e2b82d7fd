// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What takes minutes, of `make torture`: in other modules, the power is cut a hundred times and at every moment that there is
//! (`powercut`); here, one lease's disk is slow or fails under it, others lock the group for minutes, and the daemon is killed over and
//! over. Each prints what it did, and looks for what is left over at its end.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::crash::{lock_store, under_load};
use crate::harness::{Group, Test, Tier, test};
use crate::podman::locked_by_others;
use crate::powercut::job;
use crate::support::command::run;
use crate::support::content::{self, Content, Random};
use crate::support::daemon::Daemon;
use crate::support::disks;
use crate::support::site::{Kind, Site};
use crate::support::wait_until;

/// How often the daemon is killed, with each kind of store.
const KILLS: u32 = 60;

pub fn tests() -> Vec<Test> {
    let lvm = Tier::Guest(Group::Lvm);
    vec![
        test(lvm, "torture::one_disk_is_slow", one_disk_is_slow),
        test(lvm, "torture::one_disk_fails", one_disk_fails),
        test(lvm, "torture::daemon_is_killed", || {
            under_load(Kind::Lvm, KILLS);
        })
        .timeout(1800),
        test(Tier::Reflink, "torture::daemon_is_killed", || {
            under_load(Kind::Reflink, 10 * KILLS);
        }),
        test(
            Tier::Guest(Group::Podman),
            "torture::group_is_locked_by_others",
            locked_by_others,
        )
        .timeout(1800),
    ]
}

/// A store with a volume of its own for one lease, and jobs of others.
struct Neighbours {
    daemon: Daemon,
    site: Site,
    next: AtomicU64,
}

/// A lease's device, with another one between it and the pool.
struct Under {
    name: String,
    table: String,
}

const VICTIM: &str = "victim";

/// What the lease writes, beyond all numbers of the others' jobs.
const OWN: u64 = 1 << 32;

impl Neighbours {
    fn new() -> Self {
        let site = Site::new(Kind::Lvm);
        Self {
            daemon: site.serve(),
            site,
            next: AtomicU64::new(1),
        }
    }

    /// The lease begins, and something is put under it: a table, given the device's length in sectors and what is below it.
    fn begin(&self, table: impl Fn(&str, &str) -> String) -> (std::path::PathBuf, Under) {
        let plugin = self.daemon.plugin();
        plugin.create(VICTIM, &json!({"save": "victim"}));
        let at = plugin.mount(VICTIM, "x");
        let lv = plugin.status(VICTIM)["lv"].as_str().unwrap().to_owned();
        let name = format!("{}-{}", self.site.store(), lv.replace('-', "--"));
        (at, Under::new(name, table))
    }

    /// Others work, each to its end, and are published.
    fn others(&self) -> BTreeSet<u64> {
        let plugin = self.daemon.plugin();
        let jobs: BTreeSet<u64> = (0..6)
            .map(|_| self.next.fetch_add(1, Ordering::SeqCst))
            .collect();
        thread::scope(|scope| {
            for worker in 0..2 {
                let jobs = &jobs;
                scope.spawn(move || {
                    for number in jobs.iter().filter(|job| **job % 2 == worker) {
                        job(plugin, |_| {}, &format!("w{worker}"), *number);
                    }
                });
            }
        });
        jobs
    }

    /// What became of the lease, once that is known.
    fn last(&self) -> Value {
        self.daemon.plugin().status(VICTIM)["last_lease"].clone()
    }

    /// Each of the others' jobs is an entry, and so is the lease if it is to be; nothing else is there.
    fn all_whole(self, others: &BTreeSet<u64>, own: bool) {
        let plugin = self.daemon.plugin();
        for name in plugin.names() {
            plugin.remove(&name);
        }
        let census = self.site.settled(&[]);
        let found: BTreeSet<_> = census
            .entries()
            .iter()
            .map(|entry| match census.content(entry) {
                Ok(Content::Whole(number)) => number,
                other => panic!("{entry}: {other:?}"),
            })
            .collect();
        let mut expected = others.clone();
        expected.extend(own.then_some(OWN));
        assert_eq!(found, expected);
        self.site.no_lost_ids();
        self.daemon.stop();
    }
}

impl Under {
    const NAME: &str = "under";

    fn new(name: String, table: impl Fn(&str, &str) -> String) -> Self {
        let own = run("dmsetup", ["table", &name]).trim().to_owned();
        run("dmsetup", ["create", Self::NAME, "--table", &own]);
        let sectors = own.split(' ').nth(1).unwrap();
        let under = Self {
            table: own.clone(),
            name,
        };
        under.load(&table(sectors, &format!("/dev/mapper/{}", Self::NAME)));
        under
    }

    fn load(&self, table: &str) {
        disks::load(&self.name, table);
    }

    /// The disk is as good as the others' again.
    fn mend(self) {
        self.load(&self.table);
        wait_until(|| {
            crate::support::command::outcome("dmsetup", ["remove", Self::NAME]).status == 0
        });
    }
}

/// What is written to it takes seconds to get there.
fn one_disk_is_slow() {
    run("modprobe", ["dm-delay"]);
    let neighbours = Neighbours::new();
    let (at, under) =
        neighbours.begin(|sectors, below| format!("0 {sectors} delay {below} 0 0 {below} 0 10000"));
    content::write(&at, OWN);
    neighbours.daemon.plugin().unmount(VICTIM, "x");
    let others = neighbours.others();
    assert_eq!(neighbours.last(), Value::Null, "it waits for its disk");
    under.mend();
    wait_until(|| neighbours.last()["published"].is_string());
    println!(
        "{} jobs were done while one lease's end waited for its disk",
        others.len()
    );
    neighbours.all_whole(&others, true);
}

/// What is written to it gets lost, and it says so.
fn one_disk_fails() {
    run("modprobe", ["dm-flakey"]);
    let neighbours = Neighbours::new();
    let (at, under) =
        neighbours.begin(|sectors, below| format!("0 {sectors} flakey {below} 0 0 1"));
    // All of it is in memory yet, or the job is told.
    let _ = content::try_write(&at, OWN);
    let mut others = neighbours.others();
    neighbours.daemon.plugin().unmount(VICTIM, "x");
    others.extend(neighbours.others());
    wait_until(|| neighbours.last()["lv"].is_string());
    let last = neighbours.last();
    assert_eq!(last["published"], Value::Null, "{last}");
    under.mend();
    println!(
        "{} jobs were done while one lease's disk failed; that was: {last}",
        others.len()
    );
    neighbours.all_whole(&others, false);
}

/// Others lock the group at random until `over`: for how long at a time, and how often.
pub fn lock_at_random(site: &Site, over: &AtomicBool) -> (Duration, u32) {
    let mut random = Random::from_clock();
    let (mut locked, mut times) = (Duration::ZERO, 0);
    while !over.load(Ordering::SeqCst) {
        let lock = lock_store(site);
        let since = Instant::now();
        thread::sleep(Duration::from_millis(random.below(4000)));
        locked += since.elapsed();
        drop(lock);
        times += 1;
        thread::sleep(Duration::from_millis(random.below(3000)));
    }
    (locked, times)
}
