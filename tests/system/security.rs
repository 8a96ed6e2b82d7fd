// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What docs/security.md says of the socket's group, of other users of the host, and of the units.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::docs::REPOSITORY;
use crate::harness::{Test, Tier, test};
use crate::support::command::{Outcome, outcome_of, run};
use crate::support::daemon::SOCKET;
use crate::support::site::{Kind, MOUNT_DIR, Site};
use crate::support::wait_until;

pub fn tests() -> Vec<Test> {
    let reflink = |name: &str, body: fn()| test(Tier::Reflink, format!("security::{name}"), body);
    let host = |name: &str, body: fn()| test(Tier::Host, format!("security::{name}"), body);
    vec![
        reflink("only_root_takes_what_is_in_use", in_use),
        reflink("a_user_may_pass_until_the_next_boot", may_pass),
        host("the_units_are_as_documented", units),
    ]
}

/// The group that may use the plugin's socket.
const GROUP: u32 = 2000;

const SETTING: &str = "socket-group = \"2000\"\n";

/// A command as a user of the host, in the socket's group or in none.
fn by(user: u32, member: bool, words: &[&str]) -> Outcome {
    let groups = if member {
        format!("--groups={GROUP}")
    } else {
        "--clear-groups".to_owned()
    };
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={user}"), groups]);
    outcome_of(command.args(words))
}

/// A call of the plugin's by a member of the socket's group; the HTTP status and what the body says.
#[track_caller]
fn call_by_member(user: u32, endpoint: &str, body: &Value) -> (u16, Value) {
    let (url, body) = (format!("http://plugin/{endpoint}"), body.to_string());
    let head = ["curl", "--silent", "--unix-socket", SOCKET];
    let tail = ["--data", &body, "--write-out", "\n%{http_code}", &url];
    let said = by(user, true, &[&head[..], &tail].concat());
    assert_eq!(said.status, 0, "{said:?}");
    let (answer, status) = said.stdout.rsplit_once('\n').unwrap();
    let answer = serde_json::from_str(answer).unwrap();
    (status.parse().unwrap(), answer)
}

/// Members of the socket's group take no volume away from under a container; others do not get to the socket.
fn in_use() {
    let site = Site::new(Kind::Reflink);
    site.configure(SETTING);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    for name in ["used", "idle"] {
        plugin.create(name, &json!({}));
    }
    let at = plugin.mount("used", "test");
    fs::write(at.join("file"), "x").unwrap();
    for endpoint in ["Friend.Remove", "Friend.Release"] {
        for name in ["used", "idle", "unknown"] {
            let (status, answer) = call_by_member(1234, endpoint, &json!({"Name": name}));
            assert_eq!(status, 403, "{endpoint} {name}: {answer}");
            assert!(
                answer["Err"].as_str().unwrap().contains("only root"),
                "{answer}"
            );
        }
    }
    let remove = |name: &str| call_by_member(1234, "VolumeDriver.Remove", &json!({"Name": name}));
    let (status, answer) = remove("used");
    assert_eq!(status, 409, "{answer}");
    assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "x");
    assert_eq!(remove("idle").0, 200);
    assert_eq!(plugin.names(), ["used"]);
    let words = [
        "curl",
        "--silent",
        "--unix-socket",
        SOCKET,
        "http://plugin/",
    ];
    let stranger = by(1234, false, &words);
    // "Failed to connect to host."
    assert_eq!(stranger.status, 7, "{stranger:?}");

    plugin.ok("Friend.Release", &json!({"Name": "used"}));
    wait_until(|| !at.exists());
    plugin.mount("used", "test");
    plugin.ok("Friend.Remove", &json!({"Name": "used"}));
    assert_eq!(plugin.names(), [""; 0]);
}

/// The access list of the directory that volumes are mounted in.
fn may_pass() {
    let site = Site::new(Kind::Reflink);
    site.configure(SETTING);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let of_users = || {
        let list = run("getfacl", ["--numeric", "--absolute-names", MOUNT_DIR]);
        let of_users = list.lines().filter(|line| line.starts_with("user:"));
        of_users
            .filter(|line| !line.starts_with("user::"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let closed = || {
        let meta = fs::metadata(MOUNT_DIR).unwrap();
        let mode = meta.permissions().mode() & 0o7777;
        assert_eq!((mode, meta.uid(), meta.gid()), (0o750, 0, GROUP));
    };
    let file = format!("{MOUNT_DIR}/v1/file");
    let reads = |user: u32| by(user, false, &["cat", &file]).status == 0;

    plugin.create("v1", &json!({}));
    let at = plugin.mount("v1", "root");
    fs::write(at.join("file"), "x").unwrap();
    closed();
    assert_eq!(of_users(), [""; 0]);
    assert!(!reads(1234));
    let mount_by = |user| {
        let body = json!({"Name": "v1", "ID": "theirs"});
        let (status, answer) = call_by_member(user, "VolumeDriver.Mount", &body);
        assert_eq!(status, 200, "{answer}");
    };
    for user in [1235, 1234, 1235] {
        mount_by(user);
    }
    let lasting = ["user:1234:--x", "user:1235:--x"];
    // Those users without the group, as an OCI runtime has them, and no other; what is there they do not see.
    let passes = || {
        closed();
        assert_eq!(of_users(), lasting);
        assert!(reads(1234) && reads(1235) && !reads(1236));
        assert_ne!(by(1234, false, &["ls", MOUNT_DIR]).status, 0);
    };
    passes();
    // It outlasts the use, and the daemon.
    for id in ["root", "theirs"] {
        plugin.unmount("v1", id);
    }
    assert_eq!(plugin.mount("v1", "root"), at);
    passes();
    plugin.unmount("v1", "root");
    daemon.stop();
    let daemon = site.serve();
    let plugin = daemon.plugin();
    assert_eq!(plugin.mount("v1", "root"), at);
    passes();
    plugin.unmount("v1", "root");
    daemon.stop();

    // A boot: of /run nothing is left.
    let (run, options) = (Some("run"), Some("mode=755"));
    mount(run, "/run", Some("tmpfs"), MsFlags::empty(), options).unwrap();
    let daemon = site.serve();
    assert_eq!(daemon.plugin().mount("v1", "root"), at);
    closed();
    assert_eq!(of_users(), [""; 0]);
    assert!(!reads(1234));
    daemon.plugin().unmount("v1", "root");
}

/// The values of a setting in a unit, in the order of its lines.
fn values<'a>(unit: &'a str, setting: &str) -> Vec<&'a str> {
    let value = |line: &'a str| line.strip_prefix(setting)?.strip_prefix('=');
    unit.lines().filter_map(value).collect()
}

fn units() {
    let page = fs::read_to_string(format!("{REPOSITORY}/docs/security.md")).unwrap();
    let page = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let section = |title: &str| {
        let (_, rest) = page.split_once(&format!("## {title} ")).unwrap();
        rest.split_once(" ## ").unwrap().0.to_owned()
    };
    let says = |text: &str, words: &str| assert!(text.contains(words), "{words} is not in {text}");
    let file = |unit: &str| format!("{REPOSITORY}/plugin/usr/lib/systemd/system/{unit}.service");
    let supervisor = fs::read_to_string(file("lvm-cache-friend-supervise")).unwrap();
    let file = file("lvm-cache-friend");
    let unit = fs::read_to_string(&file).unwrap();
    let shown = section("The units");

    let capabilities = values(&unit, "CapabilityBoundingSet").join(" ");
    let capabilities = capabilities.split(' ').count();
    says(&shown, &format!("{capabilities} capabilities"));
    for (words, setting, value) in [
        ("no new privileges", "NoNewPrivileges", "yes"),
        (
            "a system call filter",
            "SystemCallFilter",
            "@system-service @mount",
        ),
        ("no network but loopback", "IPAddressAllow", "localhost"),
        ("no network but loopback", "IPAddressDeny", "any"),
        ("no devices but block devices", "DevicePolicy", "closed"),
    ] {
        says(&shown, words);
        assert_eq!(values(&unit, setting), [value], "{setting}");
    }
    let mut devices = values(&unit, "DeviceAllow");
    devices.retain(|device| *device != "block-* rwm");
    let shown_devices = shown.split('`').filter(|word| word.starts_with("/dev/"));
    let shown_devices: Vec<_> = shown_devices.map(|device| format!("{device} rw")).collect();
    assert_eq!(devices, shown_devices);

    // All that systemd knows and the unit has not is in its comments.
    let options = ["security", "--offline=true", "--json=short", "--no-pager"];
    let checks = run("systemd-analyze", [&options[..], &[&file]].concat());
    let checks: Vec<Value> = serde_json::from_str(&checks).unwrap();
    assert!(checks.len() > 50, "{checks:?}");
    for check in checks.iter().filter(|check| check["set"] == false) {
        let name = check["name"].as_str().unwrap();
        let mut settings = name.split('/').filter_map(|name| name.split_once('='));
        assert!(
            settings.any(|(setting, _)| unit.contains(&format!("{setting}="))),
            "the unit says nothing of {check}"
        );
    }

    says(&section("Secrets"), "The supervisor leaves no core dump");
    assert_eq!(values(&supervisor, "LimitCORE"), ["0"]);
}
