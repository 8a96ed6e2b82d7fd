// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How systemd ends the daemon, while much goes on in it: by a restart, a stop, a kill and what an upgrade does. LVM's commands
//! are never cut in the middle, and each job's work is published.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::json;

use crate::crash::fresh_jobs;
use crate::docs::REPOSITORY;
use crate::harness::{Group, Test, Tier, test};
use crate::support::command::{outcome_of, run, sh};
use crate::support::content::{self, Content, Random};
use crate::support::daemon::{Plugin, SOCKET};
use crate::support::{PROGRAM, wait_until};

const SERVICE: &str = "lvm-cache-friend.service";
const SOCKET_UNIT: &str = "lvm-cache-friend.socket";

pub fn tests() -> Vec<Test> {
    let ended = test(Tier::Guest(Group::Systemd), "stop::by_systemd", by_systemd);
    vec![ended.timeout(1500)]
}

fn by_systemd() {
    let _installed = Installed::new();
    run("vgcreate", ["--quiet", "VG", "/dev/vda"]);
    run(
        PROGRAM,
        ["init", "--vg", "VG", "--size", "3G", "--base-size", "1G"],
    );
    run("systemctl", ["start", SOCKET_UNIT, SERVICE]);

    let jobs = under_load(&[
        &|| drop(run("systemctl", ["restart", SERVICE])),
        &|| {
            // All that it had begun has ended, or does so by itself: nothing is suspended then.
            run("systemctl", ["stop", SOCKET_UNIT, SERVICE]);
            wait_until(no_process_is_left);
            assert_eq!(suspended(), "");
            run("systemctl", ["start", SOCKET_UNIT, SERVICE]);
        },
        &|| drop(run("systemctl", ["kill", "--signal", "KILL", SERVICE])),
        // As the package's postinst does.
        &|| sh_quietly("systemctl daemon-reload; systemctl try-restart lvm-cache-friend.service"),
    ]);

    let plugin = Plugin::new(Path::new(SOCKET));
    println!("{} jobs", jobs.len());
    let number_of_entries = || {
        let listed = run("lvs", ["--noheadings", "--options", "lv_tags", "VG"]);
        let entries = listed
            .lines()
            .filter(|tags| tags.contains("friend:cache:job-"));
        entries
            .filter(|tags| !tags.contains("friend:doomed"))
            .count()
    };
    wait_until(|| number_of_entries() == jobs.len());
    for job in jobs {
        plugin.create(
            "reader",
            &json!({"restore": format!("job-{job}"), "on-miss": "fail"}),
        );
        let at = plugin.mount("reader", "x");
        assert_eq!(content::read(&at), Content::Whole(job));
        plugin.unmount("reader", "x");
        plugin.remove("reader");
    }
    assert_eq!(suspended(), "");
    assert_eq!(
        run(
            "systemctl",
            ["show", "--value", "--property", "Result", SERVICE]
        )
        .trim(),
        "success"
    );
    let peak = fs::read_to_string(format!("/sys/fs/cgroup/system.slice/{SERVICE}/memory.peak"));
    println!("most memory: {peak:?} bytes");
    sh(&format!("systemctl stop {SOCKET_UNIT} {SERVICE}"));
    wait_until(no_process_is_left);
    wait_until(|| plugin.try_call("VolumeDriver.List", b"{}").is_err());
    sh_quietly("vgremove --quiet --yes VG; pvremove --quiet --yes /dev/vda");
}

fn sh_quietly(script: &str) {
    drop(sh(script));
}

/// The program and its units, without a package: other tests have those.
struct Installed;

impl Installed {
    fn new() -> Self {
        sh_quietly(&format!(
            "cp {PROGRAM} /usr/bin/lvm-cache-friend
            cp {REPOSITORY}/plugin/usr/lib/systemd/system/lvm-cache-friend* /etc/systemd/system/
            systemd-sysusers {REPOSITORY}/plugin/usr/lib/sysusers.d/lvm-cache-friend.conf
            systemd-tmpfiles --create {REPOSITORY}/plugin/usr/lib/tmpfiles.d/lvm-cache-friend.conf
            systemctl daemon-reload"
        ));
        Self
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let units = format!("{SOCKET_UNIT} {SERVICE}");
        let _ = outcome_of(Command::new("sh").arg("-c").arg(format!(
            "systemctl stop {units}
            rm -rf /usr/bin/lvm-cache-friend /etc/systemd/system/lvm-cache-friend* /etc/lvm-cache-friend
            systemctl daemon-reload"
        )));
    }
}

/// Does each of these while two volumes are used one time after the other, each at a moment when something is under way. Gives
/// the numbers of the jobs.
fn under_load(ends: &[&dyn Fn()]) -> Vec<u64> {
    let (next, over) = (AtomicU64::new(1), AtomicBool::new(false));
    let mut random = Random::from_clock();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|worker| {
                let (next, over, random) = (&next, &over, Random::new(random.next()));
                scope.spawn(move || fresh_jobs(&format!("w{worker}"), random, next, over))
            })
            .collect();
        for end in ends {
            // Others have begun since the last one.
            let begun = next.load(Ordering::SeqCst);
            wait_until(|| next.load(Ordering::SeqCst) > begun + 1);
            end();
        }
        over.store(true, Ordering::SeqCst);
        let jobs = workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap());
        jobs.collect()
    })
}

/// Device-mapper devices that are suspended.
fn suspended() -> String {
    let listed = run(
        "dmsetup",
        [
            "info",
            "--columns",
            "--noheadings",
            "--separator",
            " ",
            "--options",
            "name,suspended",
        ],
    );
    let suspended = listed.lines().filter(|line| line.ends_with("Suspended"));
    suspended.collect::<Vec<_>>().join(", ")
}

fn no_process_is_left() -> bool {
    let processes = format!("/sys/fs/cgroup/system.slice/{SERVICE}/cgroup.procs");
    fs::read_to_string(processes).is_ok_and(|list| list.is_empty())
        || !Path::new("/sys/fs/cgroup/system.slice")
            .join(SERVICE)
            .exists()
}
