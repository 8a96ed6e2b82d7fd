// SPDX-License-Identifier: Apache-2.0 OR MIT
//! README's quick start and the supervisor's, their own commands, in a guest with systemd: one installation, as that takes
//! its time there. In a volume group: see [`crate::package`].

use std::path::Path;
use std::process::Command;

use lvm_cache_friend::config::DEFAULT_FILE;
use serde_json::Value;

use crate::docs::{assert_shown, block, type_in};
use crate::github::fake::{Fake, TOKEN};
use crate::harness::{Group, System, Test, Tier, test};
use crate::package;
use crate::podman::doctor::finds_all;
use crate::podman::story;
use crate::support::command::{outcome_of, run, sh};
use crate::support::{image, wait_until};

pub fn tests() -> Vec<Test> {
    // Podman has Quadlet from 4.4 on, and Debian 12 has 4.3.
    let systems = [
        (System::Own, false),
        (System::Tree("trixie"), true),
        (System::Tree("forky"), true),
    ];
    let listed = systems.map(|(system, has_quadlet)| {
        let top_to_bottom = move || {
            let image = package::prepare();
            package::install();
            in_a_file(&image, has_quadlet);
            runners();
            type_in(&block("purge"));
            take_down(FILE);
        };
        let group = Tier::Guest(Group::Systemd);
        let listed = test(group, "quickstart::top_to_bottom", top_to_bottom);
        listed.only_on(system).timeout(1500).before(package::build)
    });
    listed.into()
}

/// Where README has a volume group in a file.
const FILE: &str = "/var/lib/lvm-cache-friend.img";

/// The quick start, and the documented examples that Podman runs.
fn in_a_file(image: &str, has_quadlet: bool) {
    // The other place that is no volume group, as far as init goes.
    sh("mkdir /var/lib/lvm-cache-friend
        truncate -s 2G /tmp/xfs
        mkfs.xfs -q /tmp/xfs
        mount -o loop /tmp/xfs /var/lib/lvm-cache-friend");
    let elsewhere = "lvm-cache-friend --config /tmp/reflink.toml ";
    type_in(&block("init-reflink").replace("lvm-cache-friend init", &format!("{elsewhere}init")));
    let listed = type_in(&format!("{elsewhere}list"));
    assert!(listed.contains("base"), "{listed}");
    sh("mkdir -p /tmp/home/.cargo/registry
        echo crate > /tmp/home/.cargo/registry/crate");
    type_in(&format!(
        "export HOME=/tmp/home\n{}",
        block("import").replace("lvm-cache-friend ", elsewhere)
    ));
    sh("umount /var/lib/lvm-cache-friend
        rmdir /var/lib/lvm-cache-friend");

    // The pool of the article's script, with an entry of its own.
    sh("vgcreate --quiet banana /dev/vda
        lvcreate --quiet --type thin-pool --size 3G banana/friend-pool
        lvcreate --quiet --thinpool banana/friend-pool --virtualsize 3G --name friend-default --addtag friend:default
        mkfs.xfs -q /dev/banana/friend-default
        lvcreate --quiet --snapshot --name friend-Y_v7HD25 --addtag friend:snapshot --addtag friend:cache:linux banana/friend-default");
    let article = "lvm-cache-friend --config /tmp/article.toml ";
    let listed = type_in(&block("migrate").replace("lvm-cache-friend ", article));
    assert!(listed.contains("friend-Y_v7HD25"), "{listed}");
    sh("vgremove --quiet --yes banana
        pvremove --quiet /dev/vda");

    // The guest's root is in its memory, and LVM fills a pool's metadata with zeros: 800 MiB of 100 GiB.
    let init = block("init-loop").replace("100G", "5G");
    type_in(&init);
    let again = type_in(&init);
    assert!(again.contains("nothing to do"), "init again: {again}");
    let said = type_in(&block("start"));
    assert!(said.contains("KIND"), "the table at its end: {said}");
    entries(1);
    let container = |script: &str| package::container("try", image, script);
    let dates = container("date >> /cache/dates; cat /cache/dates");
    assert_eq!(dates.lines().count(), 2, "restored, and one more: {dates}");
    entries(2);

    // The daemon is restarted under a container: that writes on, and its lease is published at its end.
    package::start_container("long", "try", image);
    run("systemctl", ["restart", "lvm-cache-friend.service"]);
    package::end_container("long");
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

    // A pod; here is no network for it to join.
    type_in(&block("kube").replace("kube play", "kube play --network none"));
    assert_eq!(run("podman", ["wait", "kube-job-job"]).trim(), "0");
    entries(4);
    run("podman", ["pod", "rm", "--force", "kube-job"]);
    run("podman", ["volume", "rm", "kube-cache"]);
    if has_quadlet {
        quadlet();
        doctor();
    }

    for unit in ["lvm-cache-friend.socket", "lvm-cache-friend.service"] {
        assert_eq!(run("systemctl", ["is-active", unit]).trim(), "active");
        assert_eq!(run("systemctl", ["is-enabled", unit]).trim(), "enabled");
    }
    assert_eq!(
        package::warnings("lvm-cache-friend.service"),
        "",
        "the daemon has nothing to complain of"
    );

    run("podman", ["volume", "rm", "try"]);
}

/// Two jobs in a row, of which the second starts from what the first left.
fn quadlet() {
    let dir = "/etc/containers/systemd";
    // The guest has systemd's generators switched off (tests/vm/init).
    let generator = Path::new("/run/systemd/system-generators/podman-system-generator");
    std::fs::remove_file(generator).unwrap();
    type_in(&block("quadlet"));
    entries(5);
    run("systemctl", ["start", "job.service"]);
    entries(6);
    let inspect = [
        "volume",
        "inspect",
        "--format",
        "{{.Status.last_lease}}",
        "cache",
    ];
    let last = run("podman", inspect);
    assert!(
        last.contains("restored:exact") && last.contains("verdict:success"),
        "{last}"
    );
    sh(&format!(
        "rm {dir}/cache.volume {dir}/job.container
        systemctl stop cache-volume.service
        systemctl daemon-reload
        podman volume rm cache
        ln -s /dev/null {}",
        generator.display()
    ));
}

/// The supervisor's quick start to a first job on ephemeral runners, and then six jobs. GitHub and its runner are stand-ins.
fn runners() {
    let fake = Fake::start();
    let image = image("runner-image podman");
    let commands = block("runners");
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
        &commands,
        &[
            ("make deb\n", ""),
            (build, ""),
            ("100G", "5G"),
            ("/dev/stdin", token.to_str().unwrap()),
        ],
    );
    type_in(&story::at(&fake, &image, &commands));
    let checked = type_in(&block("evening-host"));
    let wrong = checked.lines().any(|line| line.contains("WRONG"));
    assert!(!wrong && checked.contains("supervisor"), "{checked}");
    let mut said = String::new();
    wait_until(|| {
        let mut list = Command::new("sh");
        let shown = outcome_of(list.args(["-c", &block("evening-listening")]));
        said = shown.stdout;
        said.contains("listening")
    });
    assert_shown("evening-listening", &said);

    let list = |command: &[&str]| -> Vec<Value> {
        serde_json::from_str(&run("lvm-cache-friend", command)).unwrap()
    };
    story::tell(&fake, &|| list(&["list", "--json"]));

    assert!(type_in(&block("evening-published")).contains("podman"));
    // Nothing is left of any of them.
    wait_until(|| {
        list(&["runners", "list", "--json"])
            .iter()
            .all(|row| row["state"] == "empty")
    });
    for what in [
        &["ps", "--all", "--quiet"][..],
        &["volume", "ls", "--quiet"],
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
        "lvm-cache-friend-supervise.service",
    ] {
        assert_eq!(package::warnings(unit), "", "{unit} complains");
    }

    let units = [
        "lvm-cache-friend-supervise.service",
        "podman.socket",
        "podman.service",
    ];
    run("systemctl", [&["disable", "--now"][..], &units].concat());
    sh("sed -i /^containers:1000000:/d /etc/subuid /etc/subgid");
}

/// What is installed is well, and what is broken about its units is found. Not with Podman 4.3, which says what it is only after
/// it has had dpkg read all that it knows, thrice.
fn doctor() {
    let config = Path::new(DEFAULT_FILE);
    type_in(&block("doctor"));
    let (unit, socket) = ("lvm-cache-friend.service", "lvm-cache-friend.socket");
    let dir = "/run/systemd/system/lvm-cache-friend.service.d";
    sh(&format!(
        "mkdir -p {dir}; printf '[Service]\\nPrivateTmp=yes\\n' > {dir}/test.conf"
    ));
    // Which reads the units anew.
    run("systemctl", ["disable", unit]);
    let things = [
        ("units", "wrong", "systemctl enable"),
        ("namespace", "wrong", "PrivateTmp=yes"),
    ];
    finds_all(config, &things, &[]);

    sh(&format!("rm -r {dir}"));
    run("systemctl", ["stop", socket, unit]);
    run("systemctl", ["mask", "--runtime", unit]);
    let things = [
        ("units", "wrong", "does not run"),
        ("units", "wrong", "unmask"),
    ];
    finds_all(config, &things, &["daemon", "socket"]);
    // What the timer starts acts by itself where the daemon is away.
    run("systemctl", ["start", "lvm-cache-friend-gc.service"]);
    run("systemctl", ["unmask", "--runtime", unit]);
    run("systemctl", ["enable", unit]);
    run("systemctl", ["start", socket, unit]);
}

/// Waits until there are so many entries.
pub fn entries(count: usize) {
    wait_until(|| {
        let rows: Vec<Value> =
            serde_json::from_str(&run("lvm-cache-friend", ["list", "--json"])).unwrap();
        rows.iter().filter(|row| row["kind"] == "entry").count() == count
    });
}

/// Removes a volume group in a file, and what the daemon left for containers that might still run.
fn take_down(image: &str) {
    let device = sh(&format!(
        "losetup --noheadings --output NAME --associated {image}"
    ));
    let device = device.trim();
    let group = run("pvs", ["--noheadings", "--options", "vg_name", device]);
    run("vgremove", ["--force", "--yes", group.trim()]);
    run("losetup", ["--detach", device]);
    sh(&format!(
        "rm {image}
        ! mountpoint --quiet /run/lvm-cache-friend/mnt || umount --lazy /run/lvm-cache-friend/mnt
        rm -rf /run/lvm-cache-friend
        journalctl --quiet --rotate --vacuum-time 1s"
    ));
}
