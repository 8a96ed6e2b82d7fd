//! README's quick start and its way to ephemeral runners, its own commands, in a guest with systemd.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::github::fake::{Fake, TOKEN};
use crate::harness::{Group, Test, Tier, test};
use crate::podman::story;
use crate::support::command::{run, sh, succeed};
use crate::support::lvm::TestVg;
use crate::support::podman::DropIn;
use crate::support::{PROGRAM, busybox_image, image, wait_until};

pub fn tests() -> Vec<Test> {
    let guest = Tier::Guest(Group::Systemd);
    vec![
        test(guest, "quickstart::in_a_group", in_a_group).timeout(900),
        test(guest, "quickstart::in_a_file", in_a_file).timeout(900),
        test(guest, "quickstart::runners", runners).timeout(1500),
    ]
}

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

fn in_a_group() {
    let _vg = TestVg::fresh();
    follow("--vg VG --size 100G", "--vg testvg --size 5G");
}

fn in_a_file() {
    follow("--loop", "--loop");
    remove_file();
}

/// Removes what is in the file, and the file.
fn remove_file() {
    let image = "/var/lib/lvm-cache-friend.img";
    let device = sh(&format!(
        "losetup --noheadings --output NAME --associated {image}"
    ));
    let device = device.trim();
    let group = run("pvs", ["--noheadings", "--options", "vg_name", device]);
    run("vgremove", ["--force", "--yes", group.trim()]);
    run("losetup", ["--detach", device]);
    std::fs::remove_file(image).unwrap();
}

/// Follows the quick start with the way to prepare storage that has `wanted` in it, and `instead` in its place; then looks
/// whether what it makes does what the README promises.
fn follow(wanted: &str, instead: &str) {
    let image = busybox_image();
    // The guest has no network to join.
    let _network = DropIn::new("60-test", "[containers]\nnetns = \"none\"\n");
    let blocks = commands("## Quick start");
    let (install, prepare, start) = (
        &blocks[0],
        &blocks[1..blocks.len() - 1],
        &blocks[blocks.len() - 1],
    );
    let prepare = prepare
        .iter()
        .find(|block| block.contains(wanted))
        .expect("a way to prepare storage");

    type_in(
        &install
            .replace("cargo build --release\n", "")
            .replace("target/release/lvm-cache-friend", PROGRAM),
    );
    type_in(&prepare.replace(wanted, instead));
    let again = type_in(&prepare.replace(wanted, instead));
    assert!(again.contains("nothing to do"), "init again: {again}");
    let said = type_in(&start.replace("docker.io/library/busybox", &image));
    assert!(said.contains("KIND"), "the table at its end: {said}");

    let entries = |count: usize| wait_until(|| count_entries() == count);
    entries(1);
    let container = |script: &str| {
        run(
            "podman",
            [
                "run",
                "--rm",
                "-v",
                "try:/cache",
                &image,
                "sh",
                "-c",
                script,
            ],
        )
    };
    let dates = container("date >> /cache/dates; cat /cache/dates");
    assert_eq!(dates.lines().count(), 2, "restored, and one more: {dates}");
    entries(2);

    // The daemon is restarted under a container: that writes on, and its lease is published at its end.
    let waits = "until [ -e /cache/go ]; do sleep 0.1; done; date >> /cache/dates";
    run(
        "podman",
        [
            "run",
            "-d",
            "--name",
            "long",
            "-v",
            "try:/cache",
            &image,
            "sh",
            "-c",
            waits,
        ],
    );
    run("systemctl", ["restart", "lvm-cache-friend.service"]);
    run("podman", ["exec", "long", "touch", "/cache/go"]);
    assert_eq!(run("podman", ["wait", "long"]).trim(), "0");
    run("podman", ["rm", "long"]);
    entries(3);
    let inspect = [
        "volume",
        "inspect",
        "--format",
        "{{.Status.last_lease}}",
        "try",
    ];
    let last = run("podman", inspect);
    assert!(
        last.contains("verdict:success"),
        "by way of the journal: {last}"
    );
    let dates = container("cat /cache/dates");
    assert_eq!(
        dates.lines().count(),
        3,
        "what was written over the restart is there: {dates}"
    );

    for unit in ["lvm-cache-friend.socket", "lvm-cache-friend.service"] {
        assert_eq!(run("systemctl", ["is-active", unit]).trim(), "active");
        assert_eq!(run("systemctl", ["is-enabled", unit]).trim(), "enabled");
    }
    let warnings = run(
        "journalctl",
        [
            "--quiet",
            "--unit",
            "lvm-cache-friend.service",
            "--priority",
            "warning",
            "--output",
            "cat",
        ],
    );
    assert_eq!(warnings, "", "the daemon has nothing to complain of");

    run("podman", ["volume", "rm", "try"]);
    uninstall();
}

/// README's way to a first job on ephemeral runners, and then six jobs. GitHub and its runner are stand-ins.
fn runners() {
    let fake = Fake::start();
    let image = image("runner-image podman");
    let commands = story::commands();
    let typed = commands
        .split_once("EOF'\n")
        .and_then(|(before, rest)| Some((before, rest.split_once("EOF\n")?.1)));
    let (before, after) = typed.expect("a here-document");
    let count = before.lines().count() + after.lines().count();
    assert!(count <= 10, "{count} commands");

    let build = commands
        .lines()
        .find(|line| line.starts_with("podman build"))
        .expect("a command that makes the image");
    let token = fake.file("token");
    let commands = story::replaced(
        commands,
        &[
            ("cargo build --release\n", ""),
            ("target/release/lvm-cache-friend", PROGRAM),
            (build, ""),
            ("/dev/stdin", token.to_str().unwrap()),
        ],
    );
    type_in(&story::at(&fake, &image, &commands));
    let said = run("lvm-cache-friend", ["supervise", "--check"]);
    println!("{said}");

    let list = |command: &[&str]| -> Vec<Value> {
        serde_json::from_str(&run("lvm-cache-friend", command)).unwrap()
    };
    story::tell(&fake, &|| list(&["list", "--json"]));

    // Nothing is left of any of them.
    wait_until(|| {
        list(&["runners", "list", "--json"])
            .iter()
            .all(|row| row["state"] == "empty")
    });
    for what in [
        &["ps", "--all", "--quiet"][..],
        &["volume", "ls", "--quiet"],
        &["secret", "ls", "--quiet"],
    ] {
        assert_eq!(run("podman", what), "", "{what:?}");
    }
    assert!(fake.state().runners.is_empty());
    assert!(
        list(&["list", "--json"])
            .iter()
            .all(|row| row["kind"] != "volume")
    );
    let journal = run("journalctl", ["--quiet", "--output", "cat", "--all"]);
    let secrets = fake.state().secrets.clone();
    for secret in secrets.iter().chain(&fake.state().configurations.clone()) {
        assert!(!journal.contains(secret), "a secret is in the journal");
    }
    assert!(!journal.contains(TOKEN), "the token is in the journal");
    for unit in [
        "lvm-cache-friend.service",
        "lvm-cache-friend-supervisor.service",
    ] {
        let warnings = [
            "--quiet",
            "--unit",
            unit,
            "--priority",
            "warning",
            "--output",
            "cat",
        ];
        assert_eq!(run("journalctl", warnings), "", "{unit} complains");
    }

    run(
        "systemctl",
        [
            "disable",
            "--now",
            "lvm-cache-friend-supervisor.service",
            "podman.socket",
            "podman.service",
        ],
    );
    uninstall();
    remove_file();
    sh("sed -i /^containers:1000000:/d /etc/subuid /etc/subgid");
}

/// Takes away what README's commands put into the system.
fn uninstall() {
    // With the socket: otherwise the next connection would start the service again.
    run(
        "systemctl",
        [
            "disable",
            "--now",
            "lvm-cache-friend.socket",
            "lvm-cache-friend.service",
        ],
    );
    run("journalctl", ["--quiet", "--rotate", "--vacuum-time", "1s"]);
    sh(
        "rm -r /etc/lvm-cache-friend /usr/share/containers/oci/hooks.d/50-lvm-cache-friend-* /etc/containers/containers.conf.d/50-lvm-cache-friend.conf
        ! mountpoint --quiet /run/lvm-cache-friend/mnt || umount --lazy /run/lvm-cache-friend/mnt
        rm -rf /run/lvm-cache-friend",
    );
}

fn count_entries() -> usize {
    let rows: Vec<Value> =
        serde_json::from_str(&run("lvm-cache-friend", ["list", "--json"])).unwrap();
    rows.iter().filter(|row| row["kind"] == "entry").count()
}

/// The commands in a section of the README, block by block.
fn commands(heading: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(Path::new(REPOSITORY).join("README.md")).unwrap();
    let section = readme
        .split_once(&format!("\n{heading}\n"))
        .expect("the section")
        .1;
    let section = section
        .split_once("\n## ")
        .map_or(section, |(section, _)| section);
    let blocks = section.split("```sh\n").skip(1);
    blocks
        .map(|block| {
            block
                .split_once("```")
                .expect("the block's end")
                .0
                .to_owned()
        })
        .collect()
}

/// Runs commands as somebody in a checkout does who stops at the first that fails.
fn type_in(commands: &str) -> String {
    succeed(
        Command::new("/bin/sh")
            .args(["-ec", commands])
            .current_dir(REPOSITORY),
    )
}
