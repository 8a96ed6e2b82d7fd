// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Podman as a client of plugins: its own tests of them (test/e2e/volume_plugin_test.go), and what it does beside those.

use std::fs;

use serde_json::json;

use super::{Body, Host, mountpoint};
use crate::support::daemon::SOCKET;
use crate::support::podman::{CLIENT, DRIVER, DropIn, create};
use crate::support::site::{Kind, Stuck};
use crate::support::wait_until;

pub const BODIES: &[Body] = &[
    ("plugin_names_and_sockets", names_and_sockets),
    ("reload", reload),
    ("removed_while_the_daemon_is_away", removed_while_away),
    ("ended_while_the_daemon_is_away", ended_while_away),
    ("counts", counts),
    ("a_mount_that_takes_too_long", slow_mount),
    ("copy_up_and_ids", copy_up_and_ids),
    ("cp_prune_reset", cp_prune_reset),
];

/// Podman's cases a to d, f and h.
fn names_and_sockets(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    let names = format!(
        "[engine.volume_plugins]
        testvol0 = \"/run/nobody.sock\"
        testvol1 = \"{SOCKET}\"
        testvol2 = \"{SOCKET}\"
        image = \"{SOCKET}\"\n"
    );
    let _names = DropIn::new("60-test", &names);
    podman.fails(
        &create("notexist", "v1", &[]),
        125,
        &["no volume plugin with name notexist available: required plugin missing"],
    );
    podman.fails(
        &create("testvol0", "v1", &[]),
        125,
        &[
            "cannot access plugin testvol0 socket",
            "no such file or directory",
        ],
    );

    // A plugin goes before Podman's own driver of that name.
    podman.done(&create("image", "v1", &[]));
    assert_eq!(podman.volumes(), ["v1"]);
    assert_eq!(
        podman.done(&["volume", "inspect", "--format", "{{.StorageID}}", "v1"]),
        "\n"
    );
    podman.done(&["volume", "rm", "v1"]);
    assert!(podman.volumes().is_empty());

    podman.done(&create("testvol1", "v1", &[]));
    podman.done(&create("testvol2", "v2", &["o=timeout=20"]));
    // 60 s is what the drop-in says.
    for (inspected, (driver, timeout)) in podman
        .inspect(&["v1", "v2"])
        .into_iter()
        .zip([("testvol1", 60), ("testvol2", 20)])
    {
        assert_eq!(inspected["Driver"], driver, "{inspected}");
        assert_eq!(inspected["Timeout"], timeout, "{inspected}");
    }
    podman.done(&[
        "run",
        "--name",
        "ctr1",
        "-v",
        "v1:/test",
        &podman.image,
        "sh",
        "-c",
        "echo helloworld > /test/testfile",
    ]);
    // The first is there still, ended.
    let read = podman.sh_with(&["--name", "ctr2", "-v", "v1:/test"], "cat /test/testfile");
    assert_eq!(read, "helloworld\n");
}

/// Podman's case g.
fn reload(kind: Kind) {
    let host = Host::new(kind);
    let (podman, plugin) = (&host.podman, host.daemon().plugin());
    podman.done(&["volume", "create", "local"]);
    podman.create("v1", &[]);
    plugin.create("v2", &json!({}));
    assert_eq!(podman.volumes(), ["local", "v1"]);
    plugin.remove("v1");
    let reloaded = podman.outcome(&["volume", "reload"]);
    assert_eq!(
        (
            reloaded.status,
            reloaded.stdout.as_str(),
            reloaded.stderr.as_str()
        ),
        (0, "Added:\nv2\nRemoved:\nv1\n", "")
    );
    assert_eq!(podman.volumes(), ["local", "v2"]);
    assert_eq!(
        podman.sh(&["v2"], "echo usable > /v2/file; cat /v2/file"),
        "usable\n"
    );
}

/// Podman's case e, and what else a daemon that is away does to its users.
fn removed_while_away(kind: Kind) {
    let mut host = Host::new(kind);
    host.podman.create("v1", &[]);
    host.podman.create("v2", &[]);
    host.restart(false, |podman| {
        podman.fails(
            &["volume", "rm", "v1"],
            125,
            &["cannot remove volume v1 from plugin lvm-cache-friend, but it has been removed from Podman"],
        );
        podman.fails(&create(DRIVER, "v3", &[]), 125, &["cannot access plugin lvm-cache-friend"]);
        podman.fails(&podman.run_sh(&["-v", "v2:/c"], "echo never"), 126, &["cannot access plugin lvm-cache-friend"]);
    });
    // All is as it was, but that Podman does not know v1 any more. It takes it up again when told to make it.
    let podman = &host.podman;
    assert_eq!(podman.volumes(), ["v2"]);
    podman.create("v1", &[]);
    assert_eq!(podman.sh(&["v1", "v2"], "ls -d /v1 /v2"), "/v1\n/v2\n");
    podman.done(&["volume", "rm", "v1", "v2"]);
    assert!(podman.volumes().is_empty() && host.daemon().plugin().names().is_empty());
}

/// Containers that go on over a restart of the daemon, and one that ends meanwhile: Podman never unmounts that one's volume,
/// until it is removed.
fn ended_while_away(kind: Kind) {
    let mut host = Host::new(kind);
    host.podman.create("v1", &["restore=linux", "save=linux"]);
    host.podman.start("c1", "v1", "echo before > /v1/before");
    let lv = host.status("v1")["lv"].clone();
    host.restart(true, |podman| {
        podman.exec("c1", "echo away > /v1/away");
    });
    let podman = &host.podman;
    assert_eq!(host.status("v1")["lv"], lv, "its lease goes on");
    podman.exec("c1", "echo after > /v1/after");
    podman.end(&["c1"]);
    let last = host.settled("v1", &lv);
    assert!(last["published"].is_string(), "{last}");

    host.podman.start(
        "c1",
        "v1",
        "cat /v1/before /v1/away /v1/after; echo more > /v1/more",
    );
    let lv = host.status("v1")["lv"].clone();
    host.restart(false, |podman| {
        podman.outcome(&["rm", "--force", "c1"]);
    });
    // Podman's count is stuck: it does not mount again. But the lease goes on: no write goes astray, and none is lost.
    let podman = &host.podman;
    assert_eq!(host.status("v1")["lv"], lv);
    assert_eq!(
        podman.sh(&["v1"], "cat /v1/more; echo most > /v1/most"),
        "more\n"
    );
    assert_eq!(host.status("v1")["lv"], lv);
    podman.done(&["volume", "rm", "v1"]);
    assert!(!mountpoint("v1").exists());
    wait_until(|| host.entries_tagged(&["linux"]).len() == 2);
    podman.create("v2", &["restore=linux"]);
    assert_eq!(podman.sh(&["v2"], "cat /v2/most"), "most\n");
}

/// Mounts and Unmounts that come more often than Podman means to send them, and too seldom.
fn counts(kind: Kind) {
    let host = Host::new(kind);
    let (podman, plugin) = (&host.podman, host.daemon().plugin());
    podman.create("v1", &["restore=linux", "save=linux"]);

    // Two containers at once are one lease of one client. What Podman repeats, after a timeout, changes nothing.
    podman.start("c1", "v1", "echo one > /v1/one");
    let lv = host.status("v1")["lv"].clone();
    assert_eq!(plugin.mount("v1", CLIENT), mountpoint("v1"));
    assert_eq!(
        podman.sh(&["v1"], "cat /v1/one; echo two > /v1/two"),
        "one\n"
    );
    assert_eq!(host.status("v1")["lv"], lv, "still in use by the first");
    podman.exec("c1", "cat /v1/two");
    podman.end(&["c1"]);
    let last = host.settled("v1", &lv);
    assert!(last["published"].is_string(), "{last}");
    for _ in 0..2 {
        plugin.unmount("v1", CLIENT);
    }
    assert_eq!(host.status("v1")["state"], "ready");

    // An Unmount that Podman does not know of: its next container fails instead of writing to the host's disk.
    podman.start("c1", "v1", "cat /v1/one /v1/two");
    plugin.unmount("v1", CLIENT);
    podman.exec("c1", "cat /v1/one");
    podman.fails(
        &podman.run_sh(&["-v", "v1:/c"], "echo astray > /c/astray"),
        126,
        &[mountpoint("v1").to_str().unwrap()],
    );
    podman.end(&["c1"]);
    assert!(!mountpoint("v1").exists());
    // With the last container its count is right again.
    assert_eq!(podman.sh(&["v1"], "ls /v1"), "one\ntwo\n");
}

/// A Mount that Podman gives up on, while everything that only reads is answered.
fn slow_mount(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    podman.create("v1", &["restore=linux", "save=linux"]);
    podman.start("c1", "v1", "echo one > /v1/one");
    {
        let _stuck = Stuck::new(&host.site, host.daemon());
        // Unmount is answered all the same; the next copy, and so the next Mount, wait for the store.
        podman.end(&["c1"]);
        let _impatient = DropIn::new("60-test", "[engine]\nvolume_plugin_timeout = 5\n");
        podman.fails(
            &podman.run_sh(&["-v", "v1:/c"], "echo never"),
            126,
            &["VolumeDriver.Mount", "v1", "deadline exceeded"],
        );
        assert_eq!(podman.volumes(), ["v1"]);
        assert_eq!(podman.inspect(&["v1"])[0]["Driver"], DRIVER);
    }
    // Podman mounts with the same id again: it is the same lease, and one Unmount ends it.
    wait_until(|| host.status("v1")["state"] == "mounted");
    let lv = host.status("v1")["lv"].clone();
    podman.sh(&["v1"], "echo two > /v1/two");
    let last = host.settled("v1", &lv);
    assert!(last["published"].is_string(), "{last}");
    assert!(!mountpoint("v1").exists());
}

/// Whose the files are.
fn copy_up_and_ids(kind: Kind) {
    let host = Host::new(kind);
    let (podman, plugin) = (&host.podman, host.daemon().plugin());

    // What the image has there is copied into an empty volume (a lost+found would keep it from that).
    podman.create("v1", &["fs=ext4"]);
    podman.create("v2", &[]);
    let script = "ls /etc/passwd 2>/dev/null || echo nothing";
    assert_eq!(podman.sh_with(&["-v", "v1:/etc"], script), "/etc/passwd\n");
    assert_eq!(
        podman.sh_with(&["-v", "v2:/etc:nocopy"], script),
        "nothing\n"
    );

    // :U gives all of it to the container's user.
    fs::write(plugin.mount("v2", "test").join("file"), "root's").unwrap();
    plugin.unmount("v2", "test");
    let script = "echo >> /c/file; stat -c %u:%g /c /c/file";
    let said = podman.sh_with(&["-v", "v2:/c:U", "--user", "1000:1000"], script);
    assert_eq!(said, "1000:1000\n1000:1000\n");

    // :idmap, so that files are the same users' whatever range of ids a container has.
    podman.create("v3", &["owner=1000:1000", "mode=0750"]);
    let userns = [
        "-v",
        "v3:/c:idmap",
        "--userns=auto:size=2000",
        "--user",
        "1000:1000",
    ];
    let script = "touch /c/file; stat -c '%u:%g %a' /c /c/file; cat /proc/self/uid_map; grep ' /c ' /proc/self/mountinfo";
    let said = podman.sh_with(&userns, script);
    assert!(said.starts_with("1000:1000 750\n1000:1000 644\n"), "{said}");
    assert!(!said.contains(" 4294967295\n"), "a user namespace: {said}");
    assert!(said.contains("nosuid,nodev"), "{said}");
    let file = plugin.mount("v3", "test").join("file");
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(fs::metadata(file).unwrap().uid(), 1000);
    plugin.unmount("v3", "test");
}

fn cp_prune_reset(kind: Kind) {
    let host = Host::new(kind);
    let (podman, plugin) = (&host.podman, host.daemon().plugin());
    podman.create("v1", &[]);
    podman.create("v2", &[]);
    podman.start("c1", "v1", "echo inside > /v1/file");
    let copy = host.site.dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    podman.done(&["cp", "c1:/v1/file", copy]);
    assert_eq!(fs::read_to_string(copy).unwrap(), "inside\n");
    podman.done(&["stop", "c1"]);
    // Podman refuses this, or mounts the volume for it: 4.3 and 5.4.2 refuse.
    let copied = podman.outcome(&["cp", copy, "c1:/v1/copy"]);
    assert!(
        copied.status == 0 || copied.status == 125 && copied.stderr.contains("not mounted"),
        "{copied:?}"
    );
    wait_until(|| !mountpoint("v1").exists());

    // Prune takes what no container has, reset takes everything.
    podman.done(&["volume", "prune", "--force"]);
    assert_eq!(plugin.names(), ["v1"]);
    podman.done(&["system", "prune", "--force", "--volumes"]);
    assert!(podman.volumes().is_empty() && plugin.names().is_empty());
    podman.create("v3", &["restore=linux", "save=linux"]);
    podman.done(&["system", "reset", "--force"]);
    assert!(plugin.names().is_empty());
}
