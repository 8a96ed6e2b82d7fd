// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Containers while others lock the group: every lease that ended well is an entry, and none that failed is.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Host;
use super::hooks::Hooks;
use crate::support::site::Kind;
use crate::support::wait_until;
use crate::torture::lock_at_random;

/// At least so many containers, for at least so long.
const CONTAINERS: u64 = 50;
const LASTS: Duration = Duration::from_secs(180);

/// At once.
const WORKERS: usize = 3;

/// How a container ends whose job failed.
const FAILED: i32 = 7;

/// How containers ended, by their numbers.
#[derive(Debug, Default)]
struct Ended {
    well: BTreeSet<u64>,
    badly: BTreeSet<u64>,
    /// Podman did not start them: Create or Mount was refused.
    never_began: BTreeSet<u64>,
}

pub fn locked_by_others() {
    let host = &Host::new(Kind::Lvm);
    let _hooks = Hooks::new(host);
    // What is opened once only is open by then.
    run(host, 0, &Mutex::default());
    host.site.settled(&[]);
    let before = host.daemon().descriptors();

    let over = &AtomicBool::new(false);
    let (next, ended) = (&AtomicU64::new(1), &Mutex::new(Ended::default()));
    let since = Instant::now();
    let (locked, times) = thread::scope(|scope| {
        let others = scope.spawn(|| lock_at_random(&host.site, over));
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| {
                scope.spawn(move || {
                    while next.load(Ordering::SeqCst) <= CONTAINERS || since.elapsed() < LASTS {
                        run(host, next.fetch_add(1, Ordering::SeqCst), ended);
                    }
                })
            })
            .collect();
        let worked: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        over.store(true, Ordering::SeqCst);
        assert!(worked.iter().all(Result::is_ok));
        others.join().unwrap()
    });
    let took = since.elapsed();
    let census = host.site.settled(&[]);
    let ended = ended.lock().unwrap();
    let mut published: BTreeSet<_> = census
        .entries()
        .iter()
        .map(|entry| {
            let job = census.read(entry, |at| fs::read_to_string(at.join("job")).unwrap());
            job.unwrap().trim().parse::<u64>().unwrap()
        })
        .collect();
    println!(
        "{} containers in {took:.0?}: {} ended well, {} failed, {} were refused; the group was locked by others {times} times, {locked:.0?} in all; {} entries",
        next.load(Ordering::SeqCst) - 1,
        ended.well.len(),
        ended.badly.len(),
        ended.never_began.len(),
        published.len(),
    );
    published.remove(&0);
    assert_eq!(published, ended.well);
    assert!(ended.well.len() as u64 > CONTAINERS / 4);
    host.site.no_lost_ids();
    wait_until(|| host.daemon().descriptors().len() <= before.len());
    assert_eq!(host.podman.done(&["ps", "--all", "--quiet"]), "");
}

/// A container with a volume of its own.
fn run(host: &Host, number: u64, ended: &Mutex<Ended>) {
    let podman = &host.podman;
    let volume = format!("v{number}");
    let save = format!("save=job-{number}");
    let driver = ["--driver", crate::support::podman::DRIVER];
    let options = ["-o", &save, "-o", "publish=on-success", &volume];
    let create = [&["volume", "create"][..], &driver, &options].concat();
    if podman.outcome(&create).status != 0 {
        ended.lock().unwrap().never_began.insert(number);
    } else {
        let fails = number % 3 == 2;
        let code = if fails { FAILED } else { 0 };
        let script = format!("echo {number} >/cache/job; exit {code}");
        let mount = format!("{volume}:/cache");
        let run = podman.outcome(&[
            "run",
            "--rm",
            "-v",
            &mount,
            &podman.image,
            "sh",
            "-ec",
            &script,
        ]);
        let mut ended = ended.lock().unwrap();
        let how = match run.status {
            0 => &mut ended.well,
            FAILED => &mut ended.badly,
            _ => &mut ended.never_began,
        };
        how.insert(number);
        drop(ended);
    }
    // A volume that Podman does not know need not be removed; the daemon may be waited for.
    wait_until(|| {
        podman.outcome(&["volume", "rm", &volume]);
        podman.outcome(&["volume", "exists", &volume]).status != 0
    });
}
