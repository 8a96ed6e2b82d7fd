// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thin pool store where it differs from others: LVM's processes, locks, limits, and what is not ours.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lvm_cache_friend::cache::names::{LvName, Tag};
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::storage::lvm::{self, Bounds, LvmStore};
use lvm_cache_friend::storage::{Lv, NewLv, Store, StoreError, Usage};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::harness::{Group, Test, Tier, test, this_binary};
use crate::store::{self, Ground, fill, holds};
use crate::support::command::{outcome, run, sh};
use crate::support::disks::load;
use crate::support::lvm::{DISK, TestVg};
use crate::support::{temp_dir, wait_until};

pub fn tests() -> Vec<Test> {
    let lvm = |name: &str, body: fn()| test(Tier::Guest(Group::Lvm), format!("lvm::{name}"), body);
    let mut tests = store::tests(Tier::Guest(Group::Lvm), "lvm", || Box::new(Fixture::new()));
    tests.extend([
        lvm("nothing_comes_up_at_boot", nothing_comes_up_at_boot),
        lvm(
            "only_the_pool_is_seen_and_touched",
            only_the_pool_is_seen_and_touched,
        ),
        lvm("every_tag_there_can_be", every_tag_there_can_be),
        lvm("usage_of_inactive_volumes", usage_of_inactive_volumes),
        lvm(
            "thin_devices_that_lvm_does_not_know",
            thin_devices_that_lvm_does_not_know,
        ),
        lvm("out_of_service", out_of_service),
        lvm("leaked_blocks", leaked_blocks),
        lvm("zeroing", zeroing),
        lvm("what_was_deleted_is_not_read", what_was_deleted_is_not_read),
        lvm("tags_outlast_a_power_cut", tags_outlast_a_power_cut),
        lvm(
            "changes_by_hand_show_in_the_watch",
            changes_by_hand_show_in_the_watch,
        ),
        lvm("lvm_inherits_nothing", lvm_inherits_nothing),
        lvm("an_idle_store_does_nothing", an_idle_store_does_nothing),
        lvm("warnings_are_no_answers", warnings_are_no_answers),
        lvm("whatever_lvm_conf_says", whatever_lvm_conf_says),
        lvm("without_a_shell", || {
            shell_is_useless("exit 3");
        }),
        lvm("a_shell_that_refuses_every_line", || {
            shell_is_useless(
                r#"while read -r line; do
                    echo '{"log": [{"log_type":"status", "log_context":"shell", "log_message":"failure", "log_ret_code":"3"}]}' >&"$LVM_REPORT_FD"
                done"#,
            );
        }),
        lvm("a_shell_that_refuses_what_is_asked", || {
            shell_is_useless(
                r#"read -r line
                echo '{"log": [{"log_type":"status", "log_context":"shell", "log_message":"success", "log_ret_code":"1"}]}' >&"$LVM_REPORT_FD"
                while read -r line; do
                    echo '{"log": [{"log_type":"status", "log_context":"shell", "log_message":"failure", "log_ret_code":"3"}]}' >&"$LVM_REPORT_FD"
                done"#,
            );
        }),
        lvm("a_shell_that_says_nothing", || {
            shell_is_useless("while read -r line; do echo \"not $line\" >&2; done");
        }),
        lvm("a_shell_that_reports_prose", || {
            shell_is_useless(
                r#"while read -r line; do echo "not $line }" >&"$LVM_REPORT_FD"; done"#,
            );
        }),
        lvm("lvm_killed_between_commands", lvm_killed_between_commands),
        lvm("lvm_killed_in_commands", lvm_killed_in_commands).timeout(1200),
        lvm("lvm_killed_before_the_device", lvm_killed_before_the_device),
        lvm("lvm_killed_at_each_step", lvm_killed_at_each_step).timeout(1200),
        lvm("lvm_killed_over_a_repair", lvm_killed_over_a_repair).timeout(1200),
        lvm("lvm_that_hangs", lvm_that_hangs),
        lvm("a_foreign_lock", a_foreign_lock),
        lvm("a_suspended_pool", a_suspended_pool),
        lvm("a_group_that_vanished", a_group_that_vanished),
        lvm("a_killed_process", a_killed_process).timeout(1200),
        lvm("full_of_data", full_of_data),
        lvm("full_group", full_group),
        lvm("opening_what_is_not_there", opening_what_is_not_there),
        lvm("init_in_a_group", init_in_a_group),
        lvm("init_finishes_what_was_begun", init_finishes_what_was_begun),
        lvm(
            "init_leaves_alone_what_it_did_not_make",
            init_leaves_alone_what_it_did_not_make,
        ),
        lvm("init_in_a_file", init_in_a_file),
        test(Tier::Guest(Group::Systemd), "lvm::with_udev", with_udev),
        test(
            Tier::Part,
            "lvm::snapshots_without_end",
            snapshots_without_end,
        ),
    ]);
    tests
}

const POOL: &str = "pool";

/// A group on the guest's disk with a thin pool, and a directory for what the store keeps.
struct Fixture {
    _vg: TestVg,
    runtime: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::with_pool("--size 576M --poolmetadatasize 16M")
    }

    fn with_pool(options: &str) -> Self {
        let vg = TestVg::fresh();
        // For the reader of a failed test's output.
        let _ = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .try_init();
        sh(&format!(
            "lvcreate --quiet --yes --type thin-pool {options} --name {POOL} testvg && lvchange --quiet --errorwhenfull y testvg/{POOL}"
        ));
        Self {
            _vg: vg,
            runtime: temp_dir(),
        }
    }

    fn open(&self) -> LvmStore {
        LvmStore::open(TestVg::NAME, POOL, self.runtime.path()).unwrap()
    }

    /// Gives up after some seconds where it would after half a minute.
    fn open_impatient(&self) -> LvmStore {
        let short = Duration::from_secs(5);
        let bounds = Bounds {
            turn: short,
            run: short,
            removal: short,
        };
        LvmStore::open_with(TestVg::NAME, POOL, self.runtime.path(), bounds).unwrap()
    }
}

impl Ground for Fixture {
    fn open(&self) -> Arc<dyn Store> {
        Arc::new(Fixture::open(self))
    }

    fn others(&self) -> Box<dyn Fn() -> String + '_> {
        sh(
            "lvcreate -q -y -L 16M -n friend-foreign --addtag friend:snapshot testvg
            lvcreate -q -y --type thin-pool -L 64M -n pool2 testvg
            lvcreate -q -y -V 16M --thinpool pool2 -n friend-thin --addtag friend:snapshot testvg
            lvchange -q -an testvg/friend-foreign",
        );
        Box::new(|| {
            sh(
                "lvs --noheadings -o lv_uuid,lv_name,lv_tags,lv_size,lv_attr,lv_active \
                testvg/friend-foreign testvg/friend-thin testvg/pool2",
            )
        })
    }
}

fn name(text: &str) -> LvName {
    text.parse().unwrap()
}

fn tags(texts: &[&str]) -> Vec<Tag> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn new(text: &str, of: &[&str], active: bool) -> NewLv {
    NewLv {
        name: name(text),
        tags: tags(of),
        active,
    }
}

fn listed(store: &LvmStore, text: &str) -> Option<Lv> {
    store
        .list()
        .unwrap()
        .lvs
        .into_iter()
        .find(|lv| lv.name.as_str() == text)
}

fn names(store: &LvmStore) -> Vec<LvName> {
    let lvs = store.list().unwrap().lvs;
    lvs.into_iter().map(|lv| lv.name).collect()
}

fn sorted(mut tags: Vec<Tag>) -> Vec<Tag> {
    tags.sort();
    tags
}

/// The `lvm` shells that this process has started and that still run.
fn children() -> Vec<Pid> {
    let mut found = Vec::new();
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in text.split_whitespace() {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if command.trim() == "lvm" {
                found.push(Pid::from_raw(pid.parse().unwrap()));
            }
        }
    }
    found
}

fn only_child() -> Pid {
    let children = children();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

fn nothing_comes_up_at_boot() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("one", &["a"], true), Bytes::mib(64))
        .unwrap();
    store
        .snapshot(&name("one"), &new("two", &["a"], true))
        .unwrap();
    store
        .snapshot(&name("one"), &new("three", &["a"], false))
        .unwrap();
    sh("vgchange -an testvg && vgchange -ay testvg && vgchange -aay testvg");
    let listing = store.list().unwrap();
    assert_eq!(listing.lvs.len(), 3);
    assert!(
        listing.lvs.iter().all(|lv| lv.device.is_none()),
        "{listing:?}"
    );
    let device = store.activate(&name("two")).unwrap();
    assert!(File::open(device).is_ok());
}

fn only_the_pool_is_seen_and_touched() {
    let fixture = Fixture::new();
    let looks = fixture.others();
    let before = looks();
    let store = fixture.open();
    store
        .create(&new("ours", &["a"], false), Bytes::mib(16))
        .unwrap();
    assert_eq!(names(&store), [name("ours")]);

    for foreign in ["friend-foreign", "friend-thin", "pool", "pool2"] {
        let foreign = name(foreign);
        // Whatever is answered: nothing is to happen.
        let _ = store.remove(&foreign);
        let _ = store.change_tags(&foreign, &tags(&["x"]), &tags(&["friend:snapshot"]));
        let _ = store.activate(&foreign);
        let _ = store.deactivate(&foreign);
        let _ = store.grow(&foreign, Bytes::mib(128));
        let _ = store.snapshot(&foreign, &new("copy", &["a"], false));
        assert!(listed(&store, "copy").is_none(), "{foreign}");
    }
    assert_eq!(looks(), before);
}

fn every_tag_there_can_be() {
    let fixture = Fixture::new();
    let store = fixture.open();
    // Beginnings that mean something to shells, to LVM, to option parsers.
    let mut odd = tags(&[
        "#a",
        "#",
        "=x",
        "!a!!b",
        "&c;".trim_end_matches(';'),
        "a/b:c",
        "+",
        ".",
        "a--b",
        "x=--deltag=a",
        "A-Za-z0-9_+.-/=!:&#",
    ]);
    store
        .create(&new("one", &[], true), Bytes::mib(16))
        .unwrap();
    store.change_tags(&name("one"), &odd, &[]).unwrap();
    assert_eq!(
        sorted(listed(&store, "one").unwrap().tags),
        sorted(odd.clone())
    );
    let gone = odd.split_off(6);
    store
        .change_tags(&name("one"), &tags(&["new"]), &gone)
        .unwrap();
    odd.extend(tags(&["new"]));
    assert_eq!(sorted(listed(&store, "one").unwrap().tags), sorted(odd));

    // More than the `lvm` shell takes in one line, and more than a page each.
    let many: Vec<Tag> = (0..64)
        .map(|n| format!("friend:opt:{n}=").parse().unwrap())
        .collect();
    let long: Vec<Tag> = (0..20)
        .map(|n| format!("{n}:{}", "x".repeat(1000)).parse().unwrap())
        .collect();
    for (to, all) in [("many", many), ("long", long)] {
        store
            .snapshot(
                &name("one"),
                &NewLv {
                    name: name(to),
                    tags: all.clone(),
                    active: true,
                },
            )
            .unwrap();
        let lv = listed(&store, to).unwrap();
        assert_eq!(sorted(lv.tags), sorted(all.clone()));
        assert!(lv.device.is_some());
        store.change_tags(&name(to), &[], &all).unwrap();
        assert_eq!(listed(&store, to).unwrap().tags, []);
    }
    store.change_tags(&name("one"), &[], &[]).unwrap();
}

fn usage_of_inactive_volumes() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("one", &[], true), Bytes::mib(64))
        .unwrap();
    let usage = || store.usage().unwrap();
    let of = |mapped: u64, exclusive: u64| Usage {
        mapped: Bytes::mib(mapped),
        exclusive: Bytes::mib(exclusive),
    };
    assert_eq!(usage()[&name("one")], of(0, 0));
    sh("dd if=/dev/zero of=/dev/testvg/one bs=1M count=8 conv=fsync 2>/dev/null");
    store
        .snapshot(&name("one"), &new("two", &[], true))
        .unwrap();
    sh("dd if=/dev/zero of=/dev/testvg/two bs=1M count=2 conv=fsync 2>/dev/null");
    store.deactivate(&name("one")).unwrap();
    store.deactivate(&name("two")).unwrap();
    assert_eq!(usage()[&name("one")], of(8, 2));
    assert_eq!(usage()[&name("two")], of(8, 2));

    // Left reserved by a process of ours that died over it.
    let held = || {
        sh("dmsetup status --noflush testvg-pool-tpool")
            .split(' ')
            .nth(6)
            .unwrap()
            != "-"
    };
    let mark = fixture.runtime.path().join("lvm/usage.lock");
    let left_by_us = || {
        fs::write(&mark, "reserved\n").unwrap();
        sh("dmsetup message testvg-pool-tpool 0 reserve_metadata_snap");
        assert!(held());
    };
    left_by_us();
    assert_eq!(usage()[&name("two")], of(8, 2));
    assert!(!held());
    left_by_us();
    drop(fixture.open());
    assert!(!held());

    // By another program, which may be reading it.
    sh("dmsetup message testvg-pool-tpool 0 reserve_metadata_snap");
    drop(fixture.open());
    assert!(store.usage().is_err() && held());
    let told = troubles(&store);
    assert!(
        told.contains("dmsetup message testvg-pool-tpool 0 release_metadata_snap"),
        "{told}"
    );
    sh("dmsetup message testvg-pool-tpool 0 release_metadata_snap");
    assert_eq!(usage()[&name("two")], of(8, 2));
    assert_eq!(troubles(&store), "");
}

/// What is wrong with it, and what helps.
fn troubles(store: &LvmStore) -> String {
    let troubles = store.troubles().unwrap();
    let lines = troubles
        .iter()
        .map(|it| format!("{}: {}\n", it.finding, it.fix));
    lines.collect()
}

/// The ids of all thin devices in the pool.
fn thin_ids() -> Vec<u64> {
    let dump = sh("dmsetup message testvg-pool-tpool 0 reserve_metadata_snap
        thin_dump --metadata-snap --skip-mappings /dev/mapper/testvg-pool_tmeta
        dmsetup message testvg-pool-tpool 0 release_metadata_snap");
    let parts = dump.split("dev_id=\"").skip(1);
    parts
        .map(|part| part.split_once('"').unwrap().0.parse().unwrap())
        .collect()
}

/// Thin devices that LVM does not know block no Create, are deleted in a pool of our own, and nowhere else.
fn thin_devices_that_lvm_does_not_know() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("zero", &[], true), Bytes::mib(16))
        .unwrap();
    let known = thin_ids();
    let last = *known.iter().max().unwrap();
    let add = || {
        for id in last + 1..=last + 3 {
            sh(&format!(
                "dmsetup message testvg-pool-tpool 0 'create_thin {id}'"
            ));
        }
    };
    add();
    let strays = format!("{}, {}, {}", last + 1, last + 2, last + 3);
    let told = troubles(&store);
    assert!(
        told.contains(&strays) && told.contains("delete ID"),
        "{told}"
    );
    // Another's pool: left alone, but for what LVM itself deletes.
    store.clear_away().unwrap();
    assert_eq!(thin_ids().len(), known.len() + 3);
    store
        .create(&new("one", &["a"], true), Bytes::mib(16))
        .unwrap();
    for (text, of) in [("two", "zero"), ("three", "zero"), ("four", "two")] {
        store
            .snapshot(&name(of), &new(text, &["a"], text != "two"))
            .unwrap();
    }
    let made = ["one", "two", "three", "four"];
    assert_eq!(names(&store).len(), 1 + made.len());
    for text in made {
        assert!(listed(&store, text).is_some());
        store.remove(&name(text)).unwrap();
    }
    assert_eq!(thin_ids(), known);

    // One of our own.
    sh("lvchange -q --addtag friend:pool testvg/pool");
    add();
    let told = troubles(&store);
    assert!(
        told.contains(&strays) && told.contains("restart the daemon"),
        "{told}"
    );
    assert_eq!(thin_ids().len(), known.len() + 3);
    store
        .snapshot(&name("zero"), &new("one", &["a"], true))
        .unwrap();
    store.remove(&name("one")).unwrap();
    assert_eq!(thin_ids(), known);
    // Not one that is in use.
    add();
    let size = sh("blockdev --getsz /dev/testvg/zero");
    sh(&format!(
        "dmsetup create stray --table '0 {} thin /dev/mapper/testvg-pool-tpool {}'",
        size.trim(),
        last + 2
    ));
    store.clear_away().unwrap();
    assert_eq!(thin_ids().len(), known.len() + 1);
    sh("dmsetup remove stray");
    // Not while a command of others may be at work.
    let impatient = fixture.open_impatient();
    let lock = File::create("/run/lock/lvm/V_testvg").unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    assert!(impatient.clear_away().is_err());
    assert_eq!(thin_ids().len(), known.len() + 1);
    drop(lock);
    store.clear_away().unwrap();
    assert_eq!(thin_ids(), known);
    assert_eq!(troubles(&store), "");
    // One that LVM has removed, and was cut off before the pool was told: by LVM it stays until the next change.
    store
        .create(&new("gone", &["a"], false), Bytes::mib(16))
        .unwrap();
    outcome("lvremove", ["-y", "--driverloaded", "n", "testvg/gone"]);
    assert!(listed(&store, "gone").is_none());
    assert_eq!(thin_ids().len(), known.len() + 1);
    fixture.open().clear_away().unwrap();
    assert_eq!(thin_ids(), known);
    assert_eq!(names(&store).len(), 1);
}

/// A pool that takes no writes is no room, and what is said helps.
fn out_of_service() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("one", &[], true), Bytes::mib(16))
        .unwrap();
    let table = sh("dmsetup table testvg-pool-tpool");
    let table = table.trim();
    // START LENGTH thin-pool METADATA DATA BLOCK LOW-WATER FEATURES …
    let words: Vec<&str> = table.split(' ').collect();
    let features: Vec<&str> = words[8..].to_vec();
    let read_only = format!(
        "{} {} read_only {}",
        words[..7].join(" "),
        features.len() + 1,
        features.join(" ")
    );
    let pool = "testvg-pool-tpool";
    load(pool, &read_only);
    for failed in [
        store.room().map(drop),
        store
            .create(&new("two", &[], false), Bytes::mib(16))
            .map(drop),
    ] {
        match failed {
            Err(error @ StoreError::OutOfService { .. }) => {
                let text = error.to_string();
                assert!(text.contains("lvconvert --repair testvg/pool"), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(troubles(&store).contains("read-only"));
    load(pool, table);
    store.room().unwrap();
    assert_eq!(troubles(&store), "");
}

/// A power cut after the pool's metadata were written, while a block is copied that was given to a volume by then: it is in use, and no
/// volume's.
fn leaked_blocks() {
    const BLOCK: usize = 64 << 10;
    run("modprobe", ["dm-delay"]);
    let fixture = Fixture::new();
    let store = fixture.open();
    let size = Bytes::mib(16);
    let entry = store.create(&new("entry", &[], true), size).unwrap();
    fill(&entry.unwrap(), 0, BLOCK, 1);
    let lease = store.snapshot(&name("entry"), &new("lease", &[], true));
    let lease = lease.unwrap().unwrap();

    let table = |part: &str| sh(&format!("dmsetup table testvg-pool_{part}"));
    // START LENGTH linear DEVICE OFFSET
    let data = table("tdata");
    let words: Vec<&str> = data.split_whitespace().collect();
    let below = words[3..].join(" ");
    // Reads, writes and flushes: the pool flushes before it commits.
    let slow = format!("0 {} delay {below} 0 {below} 3000 {below} 0", words[1]);
    load("testvg-pool_tdata", &slow);
    thread::scope(|scope| {
        let copied = scope.spawn(|| fill(&lease, 0, BLOCK, 2));
        thread::sleep(Duration::from_millis(500));
        // After a message the pool commits: this one says what is so.
        sh("id=$(dmsetup status testvg-pool-tpool | cut -d ' ' -f 4)
            dmsetup message testvg-pool-tpool 0 set_transaction_id $id $id
            dd if=/dev/mapper/testvg-pool_tmeta of=/tmp/metadata bs=1M iflag=direct status=none");
        assert!(!copied.is_finished(), "the guest was too slow");
        copied.join().unwrap();
    });
    load("testvg-pool_tdata", data.trim());
    let metadata = table("tmeta");
    drop(store);
    sh(&format!(
        "vgchange --quiet --activate n testvg
        dmsetup create metadata --table '{}'
        dd if=/tmp/metadata of=/dev/mapper/metadata bs=1M oflag=direct conv=fsync status=none
        dmsetup remove metadata",
        metadata.trim()
    ));
    println!(
        "as LVM has it: {:?}",
        outcome("lvchange", ["--activate=y", "testvg/pool"])
    );
    sh("vgchange --quiet --activate n testvg");

    let store = fixture.open();
    assert_eq!(troubles(&store), "");
    assert_eq!(names(&store).len(), 2);
    for text in ["entry", "lease"] {
        let device = store.activate(&name(text)).unwrap();
        assert!(holds(&device, 0, BLOCK, 1), "{text}");
    }
    // All of it is well by then, for LVM too.
    drop(store);
    sh("vgchange --quiet --activate n testvg
        lvchange --quiet --activate y testvg/pool");
}

/// Pools zero new blocks, whatever lvm.conf says; one of others that does not is told of.
fn zeroing() {
    let off = || sh("lvs --noheadings -o zero testvg/friend-pool");
    let _vg = TestVg::fresh();
    let runtime = temp_dir();
    sh(
        "mkdir /run/lvm-zero && cp /etc/lvm/*.conf /run/lvm-zero/ && echo allocation/thin_pool_zero=0 >>/run/lvm-zero/lvm.conf",
    );
    sh("mount --bind /run/lvm-zero /etc/lvm");
    let said = std::panic::catch_unwind(|| prepare("friend-pool", runtime.path()).unwrap());
    sh("umount /etc/lvm && rm -r /run/lvm-zero");
    assert_eq!(said.unwrap().len(), 2);
    assert_eq!(off().trim(), "zero");

    let open = || LvmStore::open(TestVg::NAME, "friend-pool", runtime.path()).unwrap();
    sh("lvchange -q --zero n testvg/friend-pool");
    let told = troubles(&open());
    assert!(
        told.contains("lvchange --zero y testvg/friend-pool"),
        "{told}"
    );
    let said = prepare("friend-pool", runtime.path()).unwrap();
    assert_eq!((said.len(), off().trim()), (1, "zero"), "{said:?}");
    assert_eq!(troubles(&open()), "");
    sh("lvchange -q --zero n --deltag friend:pool testvg/friend-pool");
    let said = prepare("friend-pool", runtime.path()).unwrap();
    assert!(
        said[0].contains("lvchange --zero y") && off().trim() != "zero",
        "{said:?}"
    );
}

/// Of a block that a deleted volume had, the next one reads nothing.
fn what_was_deleted_is_not_read() {
    const SECRET: &[u8] = b"what a job has deleted\n";
    // A large part of the pool, so that both have the same blocks.
    const SIZE: usize = 40 << 20;
    const BLOCK: usize = 64 << 10;
    let fixture = Fixture::with_pool("--size 64M --poolmetadatasize 4M --chunksize 64K --zero y");
    let store = fixture.open();
    let volume = |volume: &str| {
        let device = store.create(&new(volume, &[], true), Bytes(SIZE as u64));
        let device = device.unwrap().unwrap();
        File::options().read(true).write(true).open(device).unwrap()
    };
    let found = || {
        let before = volume("before");
        let text: Vec<u8> = SECRET.iter().copied().cycle().take(1 << 20).collect();
        for at in (0..SIZE).step_by(text.len()) {
            before.write_all_at(&text, at as u64).unwrap();
        }
        before.sync_all().unwrap();
        drop(before);
        store.remove(&name("before")).unwrap();
        // The beginning of each block alone is written: the rest of it is the pool's to fill.
        let after = volume("after");
        for at in (0..SIZE).step_by(BLOCK) {
            after.write_all_at(&[1; 4096], at as u64).unwrap();
        }
        after.sync_all().unwrap();
        let mut raw = vec![0; SIZE];
        after.read_exact_at(&mut raw, 0).unwrap();
        drop(after);
        store.remove(&name("after")).unwrap();
        // Neither zero nor what was written.
        raw.iter().any(|byte| *byte > 1)
    };
    assert!(!found());
    // It is the pool that does that.
    sh("lvchange -q --zero n testvg/pool");
    assert!(found());
}

/// A change of tags alone is followed by a flush of the group's disk.
fn tags_outlast_a_power_cut() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("one", &[], false), Bytes::mib(16))
        .unwrap();
    // Documentation/block/stat.rst in Linux: the last but one is the number of flushes.
    let flushes = || -> u64 {
        let stat = fs::read_to_string("/sys/block/vda/stat").unwrap();
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    };
    let before = flushes();
    store.change_tags(&name("one"), &tags(&["a"]), &[]).unwrap();
    let between = flushes();
    let began = std::time::Instant::now();
    store.persist().unwrap();
    println!("the first takes {:?}", began.elapsed());
    let began = std::time::Instant::now();
    store.persist().unwrap();
    println!("the second takes {:?}", began.elapsed());
    println!("flushes: {before}, {between}, {}", flushes());
    assert!(flushes() >= between + 2);
}

fn changes_by_hand_show_in_the_watch() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let watch = store.watch();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    inotify
        .add_watch(
            &watch.dir,
            AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE,
        )
        .unwrap();
    let seen = || {
        // Blocks until something happens there.
        while !inotify.read_events().unwrap().iter().any(|event| {
            event
                .name
                .as_deref()
                .map(|name| name.to_string_lossy().into_owned())
                == watch.file
        }) {}
    };
    sh("lvcreate -q -y -V 16M --thinpool pool -n by-hand testvg");
    seen();
    assert!(listed(&store, "by-hand").is_some());
    store
        .create(&new("ours", &[], false), Bytes::mib(16))
        .unwrap();
    seen();
}

fn lvm_inherits_nothing() {
    let fixture = Fixture::new();
    // As systemd hands a socket over: not close-on-exec.
    let file = File::open("/proc/self/status").unwrap();
    let leaky = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD(100)).unwrap();
    let store = fixture.open();
    store.list().unwrap();
    let child = only_child();
    let open: Vec<String> = fs::read_dir(format!("/proc/{child}/fd"))
        .unwrap()
        .flatten()
        .filter(|fd| !["0", "1", "2"].contains(&fd.file_name().to_str().unwrap()))
        .map(|fd| fs::read_link(fd.path()).unwrap().display().to_string())
        .collect();
    // The pipe for its reports, and what LVM opens itself.
    let foreign =
        |name: &&String| !name.starts_with("/dev/mapper/control") && !name.starts_with("/dev/");
    assert_eq!(open.iter().filter(foreign).count(), 1, "{open:?}");
    let environment = fs::read_to_string(format!("/proc/{child}/environ")).unwrap();
    assert!(
        environment
            .split('\0')
            .any(|variable| variable == "LC_ALL=C"),
        "{environment}"
    );
    assert!(fs::read_link(format!("/proc/self/fd/{leaky}")).is_ok());
    assert_ne!(
        nix::unistd::getpgid(Some(child)),
        nix::unistd::getpgid(None),
        "Ctrl-C is not for it"
    );
    drop(file);
    drop(store);
    wait_until(|| children().is_empty());
}

fn an_idle_store_does_nothing() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store.list().unwrap();
    let child = only_child();
    let thread = fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .map(|task| task.path())
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm == "lvm\n"))
        .unwrap();
    let switches = |at: &Path| {
        let status = fs::read_to_string(at.join("status")).unwrap();
        let of = |key| {
            status
                .lines()
                .find(|line| line.starts_with(key))
                .unwrap()
                .to_owned()
        };
        (
            of("voluntary_ctxt_switches"),
            of("nonvoluntary_ctxt_switches"),
        )
    };
    let places = [thread, PathBuf::from(format!("/proc/{child}"))];
    // What it does behind its last answer, it may finish.
    thread::sleep(Duration::from_secs(1));
    let before = places.each_ref().map(|place| switches(place));
    thread::sleep(Duration::from_secs(3));
    assert_eq!(places.each_ref().map(|place| switches(place)), before);
}

fn warnings_are_no_answers() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let before = fs::read_to_string("/etc/lvm/lvm.conf").unwrap();
    // A new shell reads it, complains on standard error, and goes on; and it warns of volumes larger than their pool.
    fs::write(
        "/etc/lvm/lvm.conf",
        format!("{before}\nglobal {{ no_such_setting=1 }}\nbogus {{ a=1 }}\n"),
    )
    .unwrap();
    store.list().unwrap();
    let child = only_child();
    store
        .create(&new("large", &["a"], true), Bytes(1 << 40))
        .unwrap();
    assert_eq!(listed(&store, "large").unwrap().size, Bytes(1 << 40));
    assert_eq!(only_child(), child);
    fs::write("/etc/lvm/lvm.conf", before).unwrap();
    store.remove(&name("large")).unwrap();
}

/// A host's lvm.conf in place of the guest's, until it is dropped.
struct HostConf(String);

const LVM_CONF: &str = "/etc/lvm/lvm.conf";

impl HostConf {
    fn with(text: &str) -> Self {
        let before = fs::read_to_string(LVM_CONF).unwrap();
        fs::write(LVM_CONF, format!("{before}\n{text}")).unwrap();
        fs::write("/etc/lvm/lvm_hostile.conf", text).unwrap();
        Self(before)
    }
}

impl Drop for HostConf {
    fn drop(&mut self) {
        fs::write(LVM_CONF, &self.0).unwrap();
        fs::remove_file("/etc/lvm/lvm_hostile.conf").unwrap();
    }
}

/// Each setting that changes what LVM prints is another one than LVM's own.
fn whatever_lvm_conf_says() {
    const HOSTILE: &str = r#"
        # a comment with "quotes" and { braces
        tags { hosttags=1 hostile { } }
        global { suffix=0 units="h" si_unit_consistency=0 }
        report {
            output_format="basic" compact_output=1 compact_output_cols="all" list_item_separator=";" time_format="%Y"
            prefixes=1 quoted=0 columns_as_rows=1 headings=0 separator="|" aligned=0 buffered=0
            binary_values_as_numeric=0 two_word_unknown_device=1 mark_hidden_devices=0
        }
        log {
            prefix="\u001b[31m" command_names=1 report_command_log=1 command_log_cols="log_message"
            command_log_sort="-log_seq_num" command_log_selection="log_type=print"
        }
        metadata { record_lvs_history=1 }
    "#;
    let fixture = Fixture::new();
    let store = fixture.open();
    let of = ["friend:cache:a", "friend:cache:b"];
    store
        .create(&new("one", &of, false), Bytes::mib(16))
        .unwrap();
    store
        .snapshot(&name("one"), &new("two", &of, true))
        .unwrap();
    store
        .snapshot(&name("two"), &new("three", &of, false))
        .unwrap();
    store.remove(&name("two")).unwrap();
    let before = format!("{:?}", store.list().unwrap().lvs);
    let _conf = HostConf::with(HOSTILE);
    assert_eq!(
        format!("{:?}", store.list().unwrap().lvs),
        before,
        "what runs reads it again"
    );
    drop(store);
    let store = fixture.open();
    assert_eq!(format!("{:?}", store.list().unwrap().lvs), before);
    store
        .snapshot(&name("three"), &new("four", &of, true))
        .unwrap();
    assert_eq!(sorted(listed(&store, "four").unwrap().tags), tags(&of));
    assert!(fs::exists("/dev/testvg/four").unwrap(), "it came up");
    store.remove(&name("four")).unwrap();
    assert_eq!(format!("{:?}", store.list().unwrap().lvs), before);
    drop(store);
    // `init` speaks to LVM with the host's own configuration.
    prepare("friend-pool", fixture.runtime.path()).unwrap();
    assert_eq!(
        prepare("friend-pool", fixture.runtime.path()).unwrap(),
        Vec::<String>::new()
    );
}

/// What the store logs.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// In the place of `lvm`, as long as it lives, a script for bash, which has LVM's own in `$LVM`.
struct StandIn {
    program: PathBuf,
    dir: tempfile::TempDir,
}

impl StandIn {
    fn new(script: &str) -> Self {
        let program = fs::canonicalize(sh("command -v lvm").trim()).unwrap();
        let dir = temp_dir();
        let [real, stand_in] = ["lvm", "stand-in"].map(|name| dir.path().join(name));
        fs::copy(&program, &real).unwrap();
        let script = format!("#!/bin/bash\nLVM={}\n{script}\n", real.display());
        fs::write(&stand_in, script).unwrap();
        sh(&format!(
            "chmod 755 {0} && mount --bind {0} {1}",
            stand_in.display(),
            program.display()
        ));
        Self { program, dir }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // A shell of it may be about to end.
        run("umount", ["--lazy", self.program.to_str().unwrap()]);
    }
}

/// All of the store's work, with an `lvm` whose shell is `shell`, a script for bash; other commands are LVM's own. Once, it is
/// said that the shell cannot be used.
fn shell_is_useless(shell: &str) {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .init();
    let fixture = Fixture::new();
    let lvm = StandIn::new(&format!("[ $# = 0 ] || exec \"$LVM\" \"$@\"\n{shell}"));
    let store = fixture.open();
    store
        .create(&new("one", &["a"], true), Bytes::mib(16))
        .unwrap();
    store
        .change_tags(&name("one"), &tags(&["b"]), &tags(&["a"]))
        .unwrap();
    store
        .snapshot(&name("one"), &new("two", &["c"], false))
        .unwrap();
    assert_eq!(listed(&store, "one").unwrap().tags, tags(&["b"]));
    store.remove(&name("one")).unwrap();
    assert_eq!(names(&store), [name("two")]);
    let drawback = store.drawback().expect("something for doctor to say");
    assert!(drawback.contains("LVM's shell"), "{drawback}");
    drop(store);
    drop(lvm);
    let said = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let warnings: Vec<&str> = said
        .lines()
        .filter(|line| line.contains(" WARN "))
        .collect();
    assert_eq!(warnings.len(), 1, "{said}");
    assert!(warnings[0].contains("LVM's shell cannot be used"), "{said}");
}

fn lvm_killed_between_commands() {
    let fixture = Fixture::new();
    let store = fixture.open();
    for n in 0..5 {
        // What its death spoiled was run again without one.
        store.list().unwrap();
        kill(only_child(), Signal::SIGKILL).unwrap();
        store
            .create(&new(&format!("lv{n}"), &["a"], false), Bytes::mib(16))
            .unwrap();
    }
    assert_eq!(store.list().unwrap().lvs.len(), 5);
}

fn lvm_killed_in_commands() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("origin", &["o"], true), Bytes::mib(64))
        .unwrap();
    let stop = AtomicBool::new(false);
    let made = thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = 1_u64;
            while !stop.load(Ordering::Relaxed) {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                // Up to two seconds: a snapshot takes half a one in an emulated guest.
                thread::sleep(Duration::from_millis(random >> 53));
                for child in children() {
                    let _ = kill(child, Signal::SIGKILL);
                }
            }
        });
        let made: Vec<(String, bool)> = (0..16)
            .map(|n| {
                let to = format!("lv{n}");
                let active = n % 2 == 0;
                let ok = store
                    .snapshot(&name("origin"), &new(&to, &CRASH, active))
                    .is_ok();
                (to, ok)
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        made
    });
    whole(&store, &CRASH);
    for (to, ok) in &made {
        assert!(!ok || listed(&store, to).is_some(), "{to} was answered for");
    }
    eprintln!(
        "{} of {} were answered for",
        made.iter().filter(|(_, ok)| *ok).count(),
        made.len()
    );
    // And everything goes on.
    store
        .snapshot(&name("origin"), &new("after", &["a"], true))
        .unwrap();
    for lv in store.list().unwrap().lvs {
        read(&store, &lv.name);
        store.remove(&lv.name).unwrap();
    }
}

/// Where there is no udev, LVM makes the device's files itself, after the volume is active.
fn lvm_killed_before_the_device() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("lv", &["a"], true), Bytes::mib(64))
        .unwrap();
    let device = store.activate(&name("lv")).unwrap();
    fs::remove_file(fs::canonicalize(&device).unwrap()).unwrap();
    fs::remove_file(&device).unwrap();
    let again = store.activate(&name("lv")).unwrap();
    assert_eq!(again, device);
    File::open(device).unwrap();
}

/// What makes `made`, which is not active.
const MADE_INACTIVE: [&str; 8] = [
    "lvcreate",
    "-y",
    "-s",
    "-an",
    "--addtag=friend:a",
    "-n",
    "made",
    "testvg/origin",
];

/// Activates a volume and reads from it.
fn read(store: &LvmStore, lv: &LvName) {
    File::open(store.activate(lv).unwrap())
        .unwrap()
        .read_at(&mut [0; 512], 0)
        .unwrap();
}

/// What a killed command leaves is put right, at once and after a reboot: nobody waits for a suspended
/// volume, a half-made volume is gone, and LVM goes on.
fn lvm_killed_at_each_step() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("origin", &["friend:o"], true), Bytes::mib(64))
        .unwrap();
    drop(store);
    let active = [
        "lvcreate",
        "-y",
        "-s",
        "-K",
        "-ay",
        "--addtag=friend:a",
        "-n",
        "made",
        "testvg/origin",
    ];
    let removal = ["lvremove", "-y", "testvg/made"];
    // After a reboot the pool is there, or is left for the store to activate.
    for (what, reboot) in [
        (&active[..], Some("vgchange -q -ay testvg")),
        (&MADE_INACTIVE[..], Some("true")),
        (&removal[..], None),
    ] {
        let mut step = 0;
        loop {
            step += 1;
            if what[0] == "lvremove" {
                sh("lvcreate -q -y -s -K -ay --addtag friend:a -n made testvg/origin");
            }
            if !killed_after(step, what) {
                break;
            }
            let left = suspended();
            eprintln!("{} after step {step}, suspended: {left:?}", what[0]);
            if let Some(up) = reboot.filter(|up| *up == "true" || step % 2 == 0) {
                for device in left {
                    run("dmsetup", ["resume", &device]);
                }
                sh("dmsetup remove_all; dmsetup remove_all");
                sh(up);
            }
            let store = fixture.open();
            assert_eq!(suspended(), [""; 0]);
            store
                .snapshot(&name("origin"), &new("next", &["friend:a"], true))
                .unwrap();
            for lv in store.list().unwrap().lvs {
                read(&store, &lv.name);
                if lv.name.as_str() != "origin" {
                    assert_eq!(lv.tags, tags(&["friend:a"]));
                    store.remove(&lv.name).unwrap();
                }
            }
        }
        // A removal only sends messages.
        let least = if what[0] == "lvremove" { 2 } else { 3 };
        assert!(step > least, "{what:?} has as many steps");
        outcome("lvremove", ["-q", "-y", "testvg/made"]);
    }
}

/// What is half made is not answered for, also where LVM is killed over its removal, too.
fn lvm_killed_over_a_repair() {
    let fixture = Fixture::new();
    let origin = name("origin");
    let made = new("made", &["friend:a"], false);
    let store = fixture.open();
    store
        .create(&new("origin", &["friend:o"], true), Bytes::mib(64))
        .unwrap();
    drop(store);
    for deaths in [1, 1000] {
        for step in 1.. {
            let store = fixture.open();
            if !killed_after(step, &MADE_INACTIVE) {
                assert!(step > 3, "as many steps");
                break;
            }
            // The shell dies over what it is to make, and a removal as often as is said.
            let lvm = StandIn::new(&format!(
                r#"case "$*" in
                    "") if [ ! -e "$LVM.died" ]; then
                            while read -r line; do
                                case $line in lvcreate*) : >"$LVM.died"; kill -KILL $$; exit ;; esac
                                echo "$line"
                            done | "$LVM"
                            exit
                        fi ;;
                    *lvremove*)
                        echo >>"$LVM.deaths"
                        [ "$(wc -l <"$LVM.deaths")" -gt {deaths} ] || kill -KILL $$ ;;
                esac
                exec "$LVM" "$@""#
            ));
            kill(only_child(), Signal::SIGKILL).unwrap();
            let answered = store.snapshot(&origin, &made);
            let died = fs::exists(lvm.dir.path().join("lvm.deaths")).unwrap();
            eprintln!("{deaths} deaths, step {step}, died: {died}: {answered:?}");
            assert!(answered.is_ok() || deaths > 1, "once is no harm");
            drop(store);
            drop(lvm);
            // What is still due is done by the next one.
            let store = fixture.open();
            let next = new("next", &["friend:a"], true);
            store.snapshot(&origin, &next).unwrap();
            assert_eq!(listed(&store, "made").is_some(), answered.is_ok());
            for lv in store.list().unwrap().lvs {
                read(&store, &lv.name);
                if lv.name != origin {
                    store.remove(&lv.name).unwrap();
                }
            }
        }
        run("lvremove", ["-q", "-y", "testvg/made"]);
    }
}

/// The device-mapper devices that are suspended.
fn suspended() -> Vec<String> {
    let devices = sh("dmsetup info -c --noheadings --separator ' ' -o name,suspended");
    let suspended = |line: &str| Some(line.strip_suffix(" Suspended")?.to_owned());
    devices.lines().filter_map(suspended).collect()
}

/// Runs `lvm` and kills it after the given one of its calls that suspend, resume or send a message to a
/// device-mapper device; `false`: it has fewer and is done.
fn killed_after(step: usize, arguments: &[&str]) -> bool {
    // linux/dm-ioctl.h: _IOWR(0xfd, 6 and 14, struct dm_ioctl).
    const CALLS: [u64; 2] = [0xc138_fd06, 0xc138_fd0e];
    let mut command = Command::new("lvm");
    command
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(ptrace::traceme()?));
    }
    // Waited for below, as its tracer does.
    #[allow(clippy::zombie_processes)]
    let mut child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    waitpid(pid, None).unwrap();
    ptrace::setoptions(
        pid,
        ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_EXITKILL,
    )
    .unwrap();
    let (mut entered, mut seen, mut signal) = (false, 0, None);
    loop {
        ptrace::syscall(pid, signal.take()).unwrap();
        match waitpid(pid, None).unwrap() {
            WaitStatus::PtraceSyscall(_) => {
                entered = !entered;
                let registers = ptrace::getregs(pid).unwrap();
                if !entered
                    && registers.orig_rax == libc::SYS_ioctl.cast_unsigned()
                    && CALLS.contains(&registers.rsi)
                {
                    seen += 1;
                    if seen == step {
                        child.kill().unwrap();
                        child.wait().unwrap();
                        return true;
                    }
                }
            }
            WaitStatus::Stopped(_, other) => signal = Some(other),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return false,
            _ => {}
        }
    }
}

/// Tags that say whose a half-made volume is.
const CRASH: [&str; 3] = ["friend:a", "friend:b", "friend:c"];

/// Every volume but the origin has all its tags.
fn whole(store: &LvmStore, of: &[&str]) {
    for lv in store.list().unwrap().lvs {
        if lv.name.as_str() != "origin" {
            assert_eq!(sorted(lv.tags), tags(of), "{}", lv.name);
        }
    }
}

fn lvm_that_hangs() {
    let fixture = Fixture::new();
    let store = fixture.open_impatient();
    store
        .create(&new("one", &["a"], false), Bytes::mib(16))
        .unwrap();
    let child = only_child();
    kill(child, Signal::SIGSTOP).unwrap();
    let refused = store.change_tags(&name("one"), &tags(&["b"]), &[]);
    assert!(
        matches!(refused, Err(StoreError::Timeout { .. })),
        "{refused:?}"
    );
    store.change_tags(&name("one"), &tags(&["c"]), &[]).unwrap();
    assert_ne!(only_child(), child);
}

fn a_foreign_lock() {
    let fixture = Fixture::new();
    let store = fixture.open_impatient();
    store
        .create(&new("one", &["a"], false), Bytes::mib(16))
        .unwrap();
    let child = only_child();
    let lock = File::options()
        .create(true)
        .append(true)
        .open("/run/lock/lvm/V_testvg")
        .unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .unwrap();
    thread::scope(|scope| {
        let store = &store;
        let late = |result: Result<(), StoreError>| {
            assert!(
                matches!(result, Err(StoreError::Timeout { .. })),
                "{result:?}"
            );
        };
        for n in 0..4 {
            scope.spawn(move || {
                late(
                    store
                        .create(&new(&format!("no{n}"), &["a"], false), Bytes::mib(16))
                        .map(drop),
                );
            });
        }
        scope.spawn(move || late(store.list().map(drop)));
        scope.spawn(move || late(store.remove(&name("one"))));
    });
    drop(lock);
    // What was refused does not happen later either.
    assert_eq!(names(&store), [name("one")]);
    assert_eq!(only_child(), child, "it gave up waiting, and lives");
}

fn a_suspended_pool() {
    let fixture = Fixture::new();
    let store = fixture.open_impatient();
    store
        .create(&new("one", &["a"], true), Bytes::mib(16))
        .unwrap();
    sh("dmsetup suspend --noflush --nolockfs testvg-pool-tpool");
    for n in 0..3 {
        let refused = store.snapshot(&name("one"), &new(&format!("no{n}"), &["a"], true));
        assert!(refused.is_err(), "{refused:?}");
    }
    sh("dmsetup resume testvg-pool-tpool");
    wait_until(|| store.list().is_ok());
    whole(&store, &["a"]);
    store
        .snapshot(&name("one"), &new("two", &["a"], true))
        .unwrap();
}

fn a_group_that_vanished() {
    let fixture = Fixture::new();
    let store = fixture.open_impatient();
    store
        .create(&new("one", &["a"], true), Bytes::mib(16))
        .unwrap();
    sh("vgremove -q -f -y testvg");
    let gone = [
        store.list().map(drop),
        store.usage().map(drop),
        store
            .snapshot(&name("one"), &new("two", &["a"], true))
            .map(drop),
        store
            .create(&new("two", &["a"], true), Bytes::mib(16))
            .map(drop),
        store.change_tags(&name("one"), &tags(&["b"]), &[]),
        store.grow(&name("one"), Bytes::mib(32)),
        store.activate(&name("one")).map(drop),
        store.deactivate(&name("one")),
        store.remove(&name("one")),
    ];
    for (n, result) in gone.into_iter().enumerate() {
        assert!(result.is_err(), "{n}");
    }
}

fn a_killed_process() {
    let fixture = Fixture::new();
    let store = fixture.open();
    store
        .create(&new("origin", &["o"], true), Bytes::mib(64))
        .unwrap();
    drop(store);
    for round in 0..6_u64 {
        let runtime = fixture.runtime.path();
        let mut process = Command::new(this_binary())
            .args(["guest-one", "part::lvm::snapshots_without_end"])
            .env("RUNTIME", runtime)
            .env("ROUND", round.to_string())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let begun = runtime.join("begun");
        wait_until(|| begun.exists());
        fs::remove_file(&begun).unwrap();
        thread::sleep(Duration::from_millis(300 + 170 * round));
        process.kill().unwrap();
        process.wait().unwrap();
        // Nobody of ours goes on.
        wait_until(|| outcome("pgrep", ["-x", "lvm"]).status == 1);
        whole(&fixture.open(), &CRASH);
    }
    let store = fixture.open();
    let listing = store.list().unwrap();
    assert!(listing.lvs.len() > 6, "{listing:?}");
    let ids: HashSet<u64> = listing.lvs.iter().map(|lv| lv.seq).collect();
    assert_eq!(ids.len(), listing.lvs.len());
    store
        .snapshot(&name("origin"), &new("after", &["a"], true))
        .unwrap();
}

fn snapshots_without_end() {
    let runtime = PathBuf::from(std::env::var_os("RUNTIME").unwrap());
    let round = std::env::var("ROUND").unwrap();
    let store = LvmStore::open(TestVg::NAME, POOL, &runtime).unwrap();
    fs::write(runtime.join("begun"), "").unwrap();
    for n in 0.. {
        store
            .snapshot(
                &name("origin"),
                &new(&format!("lv{round}-{n}"), &CRASH, n % 2 == 0),
            )
            .unwrap();
    }
}

fn full_of_data() {
    let fixture = Fixture::with_pool("--size 100M --poolmetadatasize 8M");
    let store = fixture.open();
    store
        .create(&new("one", &["a"], true), Bytes::mib(200))
        .unwrap();
    outcome(
        "dd",
        [
            "if=/dev/zero",
            "of=/dev/testvg/one",
            "bs=1M",
            "oflag=direct",
        ],
    );
    assert_full(
        store.snapshot(&name("one"), &new("two", &["a"], true)),
        &["100 % of the 100 MiB", "lvextend --size +SIZE testvg/pool"],
    );
    assert!(store.list().unwrap().capacity.data_percent > 99.9);
    store.remove(&name("one")).unwrap();
    store
        .create(&new("two", &["a"], true), Bytes::mib(200))
        .unwrap();
}

fn full_group() {
    drop(TestVg::fresh());
    sh(&format!(
        "vgcreate -q --metadatasize 64k --dataalignment 64k testvg {DISK}
        lvcreate -q -y --type thin-pool -L 1G -n pool testvg"
    ));
    let runtime = temp_dir();
    let store = LvmStore::open("testvg", POOL, runtime.path()).unwrap();
    let long: Vec<Tag> = (0..8)
        .map(|n| format!("{n}{}", "x".repeat(1000)).parse().unwrap())
        .collect();
    let mut refused = None;
    for n in 0..20 {
        let new = NewLv {
            name: name(&format!("lv{n}")),
            tags: long.clone(),
            active: false,
        };
        let result = store.create(&new, Bytes::mib(16));
        if result.is_err() {
            refused = Some(result);
            break;
        }
    }
    assert_full(refused.unwrap(), &["group's metadata area"]);
    let listing = store.list().unwrap();
    assert!(listing.capacity.group_percent > 50.0, "{listing:?}");
    assert!(listing.lvs.iter().all(|lv| lv.tags.len() == 8));
}

fn assert_full(result: Result<Option<PathBuf>, StoreError>, said: &[&str]) {
    match result {
        Err(StoreError::Full { store, detail }) => {
            assert_eq!(store, TestVg::NAME);
            assert!(said.iter().all(|words| detail.contains(words)), "{detail}");
        }
        other => panic!("{other:?}"),
    }
}

fn opening_what_is_not_there() {
    let fixture = Fixture::new();
    sh("lvcreate -q -y -L 16M -n plain testvg");
    for (vg, pool, said) in [
        ("no-such-group", "pool", "init --vg no-such-group"),
        ("testvg", "no-such-pool", "no such logical volume"),
        ("testvg", "plain", "not a thin pool"),
        ("a b", "pool", "name of a volume group"),
        ("testvg", "", "name of a thin pool"),
    ] {
        let refused = LvmStore::open(vg, pool, fixture.runtime.path());
        match refused {
            Err(StoreError::Unusable(text)) => assert!(text.contains(said), "{text}"),
            other => panic!("{vg}/{pool}: {other:?}"),
        }
    }
    // An administrator had taken it down.
    sh("lvchange -q -an testvg/pool");
    fixture
        .open()
        .create(&new("one", &[], true), Bytes::mib(16))
        .unwrap();
}

fn prepare(pool: &str, runtime: &Path) -> Result<Vec<String>, StoreError> {
    let mut said = Vec::new();
    lvm::init(
        &name(TestVg::NAME),
        &name(pool),
        Bytes::mib(500),
        Bytes::mib(320),
        runtime,
        &mut |line| said.push(line),
    )?;
    Ok(said)
}

/// Grows with each change to the group.
fn commits() -> String {
    sh("vgs --noheadings -o vg_seqno testvg")
}

fn assert_prepared(runtime: &Path) {
    let store = LvmStore::open(TestVg::NAME, "friend-pool", runtime).unwrap();
    let listing = store.list().unwrap();
    assert_eq!(listing.lvs.len(), 1);
    let base = &listing.lvs[0];
    assert_eq!(
        (base.name.as_str(), &base.tags, base.device),
        ("friend-default", &tags(&["friend:default"]), None)
    );
    let device = store.activate(&base.name).unwrap();
    sh(&format!(
        "xfs_repair -n {} >/dev/null 2>&1",
        device.display()
    ));
    store.deactivate(&base.name).unwrap();
    assert_eq!(
        sh("lvs --noheadings -o lv_when_full testvg/friend-pool").trim(),
        "error"
    );
}

fn init_in_a_group() {
    let _vg = TestVg::fresh();
    let runtime = temp_dir();
    sh("lvcreate -q -y -L 16M -n other testvg");
    let said = prepare("friend-pool", runtime.path()).unwrap();
    assert_eq!(said.len(), 2, "{said:?}");
    assert_prepared(runtime.path());
    let before = commits();
    assert_eq!(prepare("friend-pool", runtime.path()).unwrap(), [""; 0]);
    assert_eq!(commits(), before);

    let large = lvm::init(
        &name(TestVg::NAME),
        &name("larger"),
        Bytes(1 << 40),
        Bytes::mib(320),
        runtime.path(),
        &mut |_| {},
    );
    assert!(matches!(large, Err(StoreError::Full { .. })), "{large:?}");
    let nowhere = lvm::init(
        &name("nowhere"),
        &name("pool"),
        Bytes::mib(320),
        Bytes::mib(320),
        runtime.path(),
        &mut |_| {},
    );
    assert!(
        matches!(nowhere, Err(StoreError::Unusable(_))),
        "{nowhere:?}"
    );
    assert_eq!(commits(), before);
}

fn init_finishes_what_was_begun() {
    let runtime = temp_dir();
    let pool = "lvcreate -q -y --type thin-pool -L 500M --addtag friend:pool -n friend-pool testvg";
    let base = "lvcreate -q -y -V 320M --thinpool friend-pool -n friend-default --addtag friend:making testvg";
    for begun in [
        pool.to_owned(),
        format!("{pool} && {base} -ky"),
        format!("{pool} && {base} -ky && lvchange -q -an testvg/friend-default"),
        format!(
            "{pool} && {base} -ky && lvchange -q -ay -K testvg/friend-default && dd if=/dev/urandom of=/dev/testvg/friend-default bs=1M count=4"
        ),
    ] {
        let _vg = TestVg::fresh();
        sh(&begun);
        prepare("friend-pool", runtime.path()).unwrap();
        assert_prepared(runtime.path());
    }
}

fn init_leaves_alone_what_it_did_not_make() {
    let runtime = temp_dir();
    let foreign_pool = "lvcreate -q -y --type thin-pool -L 500M -n friend-pool testvg";
    for (made, works) in [
        (
            "lvcreate -q -y -L 16M -n friend-pool testvg".to_owned(),
            false,
        ),
        (
            format!(
                "{foreign_pool} && lvcreate -q -y -V 320M --thinpool friend-pool -n friend-default testvg"
            ),
            false,
        ),
        (
            format!(
                "{foreign_pool} && lvcreate -q -y -V 320M --thinpool friend-pool -n other --addtag friend:default testvg"
            ),
            true,
        ),
        (
            format!(
                "{foreign_pool} && lvcreate -q -y -V 320M --thinpool friend-pool -n friend-default --addtag friend:making --addtag mine testvg"
            ),
            false,
        ),
    ] {
        let _vg = TestVg::fresh();
        sh(&made);
        let before = commits();
        let result = prepare("friend-pool", runtime.path());
        assert_eq!(result.is_ok(), works, "{made}: {result:?}");
        assert_eq!(commits(), before, "{made}");
    }
}

fn init_in_a_file() {
    drop(TestVg::fresh());
    let (dir, runtime) = (temp_dir(), temp_dir());
    let file = dir.path().join("caches.img");
    let prepare = || {
        let mut said = Vec::new();
        lvm::init_loop(
            &file,
            Bytes::mib(800),
            &name("friend-pool"),
            Bytes::mib(320),
            runtime.path(),
            &mut |line| said.push(line),
        )
        .map(|vg| (vg, said))
    };
    let (vg, said) = prepare().unwrap();
    assert_eq!(vg.as_str(), "friend-caches");
    assert_eq!(said.len(), 4, "{said:?}");
    let loops = || sh(&format!("losetup -n -O NAME -j {}", file.display()));
    let seqno = || sh("vgs --noheadings -o vg_seqno friend-caches");
    let (device, before) = (loops(), seqno());
    assert_eq!(prepare().unwrap(), (vg, vec![]));
    assert_eq!((loops(), seqno()), (device, before));
    // What was asked for, and what LVM makes of it to align the data behind it.
    let metadata = sh("vgs --noheadings --units m --nosuffix -o vg_mda_size friend-caches");
    let metadata: f64 = metadata.trim().parse().unwrap();
    assert!((16.0..18.0).contains(&metadata), "{metadata}");
    // Sparse, and nobody else's business.
    assert!(
        Command::new("test")
            .arg("-O")
            .arg(&file)
            .status()
            .unwrap()
            .success()
    );

    // A reboot takes the loop device.
    sh("vgchange -q -an friend-caches");
    sh("losetup -D");
    assert_eq!(loops(), "");
    lvm::ensure_loop(&file).unwrap();
    let store = LvmStore::open("friend-caches", "friend-pool", runtime.path()).unwrap();
    store
        .snapshot(&name("friend-default"), &new("one", &["a"], true))
        .unwrap();
    drop(store);

    // Cut short before the group was made: only the file, with our label.
    sh("vgremove -q -f -y friend-caches");
    sh(&format!("pvremove -q -y {}", loops().trim()));
    assert_eq!(prepare().unwrap().0.as_str(), "friend-caches");
    sh("vgremove -q -f -y friend-caches");
    assert_eq!(prepare().unwrap().0.as_str(), "friend-caches");
    sh("vgremove -q -f -y friend-caches; losetup -D");

    fs::write(&file, "not ours").unwrap();
    let refused = prepare();
    assert!(
        matches!(refused, Err(StoreError::Unusable(_))),
        "{refused:?}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "not ours");
    assert!(matches!(
        lvm::ensure_loop(&dir.path().join("none")),
        Err(StoreError::Io { .. })
    ));
    assert_eq!(loops(), "");
}

/// The same with udev, which makes device nodes and which LVM waits for.
fn with_udev() {
    let fixture = Fixture::new();
    let store = fixture.open();
    let device = store
        .create(&new("one", &["a"], true), Bytes::mib(320))
        .unwrap()
        .unwrap();
    run("mkfs.xfs", ["-q".as_ref(), device.as_os_str()]);
    let copy = store
        .snapshot(&name("one"), &new("two", &["a"], true))
        .unwrap()
        .unwrap();
    fs::create_dir_all("/tmp/copy").unwrap();
    run(
        "mount",
        [
            "-o".as_ref(),
            "nouuid".as_ref(),
            copy.as_os_str(),
            "/tmp/copy".as_ref(),
        ],
    );
    let busy = [store.remove(&name("two")), store.deactivate(&name("two"))];
    run("umount", ["/tmp/copy"]);
    for result in busy {
        assert!(matches!(result, Err(StoreError::Busy(_))), "{result:?}");
    }
    for lv in ["one", "two"] {
        store.deactivate(&name(lv)).unwrap();
        assert!(!Path::new("/dev/testvg").join(lv).exists(), "{lv}");
        store.remove(&name(lv)).unwrap();
    }
    assert_eq!(store.usage().unwrap().len(), 0);
}
