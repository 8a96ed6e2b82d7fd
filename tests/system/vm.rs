// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The testbed itself: guests boot, have what tests need, and tell what became of them.

use std::fs;
use std::time::Duration;

use crate::docs::{block, type_in};
use crate::harness::{Group, Place, System, Test, Tier, agent, guest, test, vm_run};
use crate::support::command::{outcome_of, run, sh};
use crate::support::lvm::TestVg;
use crate::support::reflink::ReflinkFs;
use crate::support::vm::{VolatileDisk, boot, boot_part, start_part};
use crate::support::{busybox_image, temp_dir, wait_until};

pub fn tests() -> Vec<Test> {
    vec![
        test(Tier::Reflink, "vm::reflink_copy", reflink_copy),
        test(Tier::Guest(Group::Lvm), "vm::thin_snapshot", thin_snapshot),
        test(
            Tier::Guest(Group::Lvm),
            "vm::fresh_group_again",
            thin_snapshot,
        ),
        test(Tier::Guest(Group::Podman), "vm::container", container),
        test(Tier::Guest(Group::Systemd), "vm::udev_links", udev_links),
        test(Tier::Host, "vm::usage", usage),
        test(Tier::Driver, "vm::streams_and_status", streams_and_status),
        test(Tier::Driver, "vm::as_documented", as_documented),
        test(Tier::Driver, "vm::power_cut", power_cut),
        test(Tier::Driver, "vm::power_cut_on_a_line", power_cut_on_a_line),
        test(Tier::Driver, "vm::failures_are_told", failures_are_told),
        test(Tier::Part, "vm::write_and_wait", write_and_wait),
        test(Tier::Part, "vm::what_was_written", what_was_written),
        test(Tier::Part, "vm::crash", agent::crash),
        test(Tier::Part, "vm::panic", || panic!("as it must")),
        test(Tier::Part, "vm::hang", || {
            std::thread::sleep(Duration::from_secs(3600));
        }),
        test(Tier::Part, "vm::nothing", || println!("nothing to say")),
    ]
}

fn usage() {
    for wrong in [
        &["--disk"][..],
        &["--no-such-option", "1", "--", "true"],
        &["true"],
        &[],
    ] {
        let ended = outcome_of(vm_run().args(wrong));
        assert_eq!(ended.status, 2, "{wrong:?}: {ended:?}");
    }
}

fn reflink_copy() {
    let fs = ReflinkFs::new(512);
    let one = fs.path().join("one");
    fs::write(&one, vec![7; 1 << 20]).unwrap();
    run(
        "cp",
        [
            "--reflink=always".as_ref(),
            one.as_os_str(),
            fs.path().join("two").as_os_str(),
        ],
    );
    assert_eq!(fs::read(fs.path().join("two")).unwrap(), vec![7; 1 << 20]);
}

/// The whole of what the daemon rests on: a thin snapshot of an XFS, mounted beside its origin.
fn thin_snapshot() {
    let _vg = TestVg::fresh();
    let said = sh("lvcreate -q --type thin-pool -L 1G -n pool testvg
        lvcreate -q -V 1G --thinpool pool -n base testvg
        mkfs.xfs -q /dev/testvg/base
        mkdir -p /tmp/base /tmp/copy
        mount /dev/testvg/base /tmp/base
        echo before > /tmp/base/file
        sync
        lvcreate -q -s -kn -n copy testvg/base >&2
        echo after > /tmp/base/file
        mount -o nouuid /dev/testvg/copy /tmp/copy
        cat /tmp/copy/file /tmp/base/file");
    assert!(said.ends_with("before\nafter\n"), "{said}");
}

fn container() {
    let image = busybox_image();
    let said = run(
        "podman",
        [
            "run",
            "--rm",
            "--network",
            "none",
            &image,
            "cat",
            "/proc/self/cgroup",
        ],
    );
    assert_eq!(said.trim(), "0::/", "in a cgroup2 namespace of its own");
}

fn udev_links() {
    assert_eq!(fs::read_to_string("/proc/1/comm").unwrap(), "systemd\n");
    let _vg = TestVg::fresh();
    run("lvcreate", ["-q", "-L", "64M", "-n", "plain", "testvg"]);
    // Made by udev's rules alone, and LVM waits for them.
    let info = run(
        "udevadm",
        ["info", "--query=property", "--name=/dev/testvg/plain"],
    );
    assert!(info.contains("DM_UDEV_RULES_VSN="), "{info}");
}

fn streams_and_status() {
    let here = temp_dir();
    let share = here.path().to_str().unwrap();
    let ended = boot(
        &["--share", share, "--env", "WORD=a  b"],
        &[
            "sh",
            "-c",
            "echo \"$WORD\"; echo complaint >&2; pwd; printf whole >/share/file; exit 7",
        ],
    );
    let cwd = std::env::current_dir().unwrap();
    assert_eq!(ended.status, 7);
    assert_eq!(ended.stdout, format!("a  b\n{}\n", cwd.display()));
    assert!(ended.stderr.starts_with("complaint\n"), "{ended:?}");
    assert!(ended.stderr.contains("console log: "), "{ended:?}");
    assert_eq!(
        fs::read_to_string(here.path().join("file")).unwrap(),
        "whole"
    );
}

fn as_documented() {
    let wreck = concat!(env!("CARGO_TARGET_TMPDIR"), "/wreck");
    let said = type_in(&block("look-around").replace("target/tmp/wreck", wreck));
    std::fs::remove_file(wreck).unwrap();
    assert!(said.contains("vda"), "{said}");
}

/// Where the guest writes to the disk itself, in bytes: what it flushes, and what it does not.
const FLUSHED: u64 = 8190 << 20;
const UNFLUSHED: u64 = 8191 << 20;

fn power_cut() {
    let here = temp_dir();
    let disk = VolatileDisk::new(here.path());
    let share = here.path().join("share");
    fs::create_dir(&share).unwrap();
    let options = || disk.options(&["--share", share.to_str().unwrap()]);
    let mut guest = start_part(here.path(), &options(), "vm::write_and_wait");
    wait_until(|| {
        assert!(guest.is_running(), "it waits for its end");
        share.join("written").exists()
    });
    guest.cut_power();
    let byte = || [FLUSHED, UNFLUSHED].map(|at| disk.byte(at));
    assert_eq!(byte(), [0, 0], "the image is as it was");
    assert!(disk.lose_what_was_not_flushed() > 0);
    assert_eq!(byte(), [b'x', 0]);
    let ended = boot_part(&options(), "vm::what_was_written");
    assert_eq!(ended.status, 0, "{ended:?}");
}

fn write_and_wait() {
    // Its journal would be flushed after five seconds.
    sh(
        "mkfs.ext4 -q /dev/vda && mount -o commit=300 /dev/vda /mnt && echo kept >/mnt/synced && sync && echo lost >/mnt/cached",
    );
    for (at, how) in [(FLUSHED, "fsync"), (UNFLUSHED, "notrunc")] {
        let at = at >> 12;
        sh(&format!(
            "head -c 4096 /dev/zero | tr '\\0' x | dd of=/dev/vda bs=4096 seek={at} count=1 iflag=fullblock oflag=direct conv={how}"
        ));
    }
    fs::write("/share/written", "").unwrap();
    std::thread::sleep(Duration::from_secs(3600));
}

fn what_was_written() {
    run("mount", ["/dev/vda", "/mnt"]);
    assert_eq!(fs::read_to_string("/mnt/synced").unwrap(), "kept\n");
    assert_ne!(
        fs::read_to_string("/mnt/cached").unwrap_or_default(),
        "lost\n",
        "a power cut loses what was in memory"
    );
}

fn power_cut_on_a_line() {
    let ended = boot(
        &["--kill-on", "^line 2"],
        &[
            "sh",
            "-c",
            "echo line 1; echo line 2; sleep 60; echo line 3",
        ],
    );
    assert_eq!(ended.status, 75, "{ended:?}");
    assert_eq!(ended.stdout, "line 1\nline 2\n");
}

/// What the harness says of tests that fail in a guest, and that the next one gets a good guest.
fn failures_are_told() {
    let here = temp_dir();
    let run = |name: &str, seconds| {
        guest::run(
            here.path(),
            Place {
                group: Group::Lvm,
                system: System::Own,
            },
            &format!("part::vm::{name}"),
            Duration::from_secs(seconds),
        )
    };
    let crash = run("crash", 60).unwrap_err();
    assert!(crash.contains("about to crash"), "its output: {crash}");
    assert!(crash.contains("sysrq"), "the console: {crash}");
    run("nothing", 60).unwrap();
    let panic = run("panic", 60).unwrap_err();
    assert!(
        panic.contains("as it must") && panic.contains("exit status 101"),
        "{panic}"
    );
    let wreck = panic.rsplit_once(": ").unwrap().1;
    assert!(fs::metadata(wreck).unwrap().is_dir() && fs::exists(format!("{wreck}/disk")).unwrap());
    let hang = run("hang", 1).unwrap_err();
    assert!(hang.contains("was ended after 1 s"), "{hang}");
}
