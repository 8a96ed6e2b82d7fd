// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whose files are, in one user namespace and the next.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

use super::hooks::Hooks;
use super::{Body, Host, ended_after};
use crate::support::command::{outcome_of, succeed};
use crate::support::podman::create;
use crate::support::site::Kind;

pub const BODIES: &[Body] = &[("users", users), ("users_rootless", rootless)];

/// The user that has rootless Podman, and the group that may use the plugin's socket.
const USER: u32 = 4242;
const GROUP: u32 = 2000;

/// What every job finds, whoever it is outside; then it says who that is. Its own file is there from the second job on,
/// and only root's cannot be written.
const SCRIPT: &str = r#"
    look() {
        [ ! -e $1/mine ] || stat -c '%u:%g %a' $1/mine
        date +%N > $1/mine; date +%N > $1/dir/mine 2>/dev/null || mkdir $1/dir
        stat -c '%u:%g' $1 $1/mine $1/dir
        grep " $1 " /proc/self/mountinfo | tail -1 | cut -d' ' -f6
    }
    umask 022
    look /cache
    cd /run/lvm-cache-friend
    mkdir own; stat -c '%u:%g' own; rmdir own
    bin/lvm-cache-friend restore late --key users | tail -1
    look /run/lvm-cache-friend/late
    cat /proc/self/uid_map
"#;

/// One job as the user 1000 inside, and what it says: of the volume, of the late mount, and its ids.
fn job(run: impl Fn(&[&str]) -> String, image: &str, options: &[&str]) -> (String, String) {
    let volumes = [
        "-v",
        "cache:/cache",
        "-v",
        "job:/run/lvm-cache-friend:rslave",
    ];
    let head = ["run", "--rm", "--user", "1000:1000"];
    let tail = [image, "/bin/sh", "-ec", SCRIPT];
    let said = run(&[&head[..], &volumes, options, &tail].concat());
    let lines: Vec<_> = said.lines().collect();
    let ids = lines
        .iter()
        .position(|line| line.starts_with(' '))
        .expect("a table of ids");
    let (told, ids) = lines.split_at(ids);
    (told.join("\n"), ids.join("\n"))
}

/// What a job must say, the first or a later one.
fn check(told: &str, first: bool, mapped: bool, what: &str) {
    let seen = if first { "" } else { "1000:1000 644\n" };
    let idmapped = if mapped { ",idmapped" } else { "" };
    let own = format!("{seen}1000:1000\n1000:1000\n1000:1000\nrw,nosuid,nodev,noatime{idmapped}\n");
    let rest = told
        .strip_prefix(&format!("{own}1000:1000\n"))
        .unwrap_or_else(|| panic!("{what}: {told}"));
    let (answer, late) = rest.split_once('\n').expect("an answer");
    assert!(answer.starts_with("ok restored="), "{what}: {told}");
    assert_eq!(format!("{late}\n"), own, "{what}: {told}");
}

impl Host {
    fn last(&self, volume: &str) -> Value {
        self.status(volume)["last_lease"].clone()
    }

    fn published_after(&self, volume: &str, before: &Value) {
        let ended = ended_after(before, || self.last(volume));
        assert!(ended["published"].is_string(), "{ended}");
    }
}

const OPTIONS: [&str; 3] = ["restore=users", "save=users", "owner=1000:1000"];

fn users(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    let podman = &host.podman;
    podman.create("cache", &OPTIONS);
    podman.create("job", &["type=job", "owner=1000:1000"]);
    let run = |arguments: &[&str]| podman.done(arguments);
    let mut before = Vec::new();
    for (i, options) in [
        &["--userns=auto:size=2000"][..],
        // Another range: the first one is taken.
        &["--userns=auto:size=3000"],
        &[],
        &["--uidmap=0:700000:5000", "--gidmap=0:800000:5000"],
        &["--userns=auto:size=2000"],
    ]
    .into_iter()
    .enumerate()
    {
        let before_it = host.last("cache");
        let (told, ids) = job(run, &podman.image, options);
        check(&told, i == 0, !options.is_empty(), &format!("{options:?}"));
        assert!(!before.contains(&ids) || i == 4, "{ids}");
        before.push(ids);
        host.published_after("cache", &before_it);
        if i == 0 {
            podman.done(&[
                "run",
                "--detach",
                "--name",
                "taken",
                "--userns=auto:size=2000",
                &podman.image,
                "sleep",
                "3600",
            ]);
        } else if i == 3 {
            podman.end(&["taken"]);
        }
    }
    // Two at once with ranges of their own see one lease, each with its own ids.
    podman.create("both", &["owner=1000:1000"]);
    let with = [
        "-v",
        "both:/both",
        "--user",
        "1000:1000",
        "--userns=auto:size=2000",
    ];
    let head = ["run", "--detach", "--name"];
    let sleep = [podman.image.as_str(), "sleep", "3600"];
    for name in ["one", "two"] {
        podman.done(&[&head[..], &[name], &with, &sleep].concat());
    }
    for (name, other) in [("one", "two"), ("two", "one")] {
        podman.exec(name, &format!("touch /both/{name}"));
        let said = podman.exec(
            other,
            &format!("echo >> /both/{name}; stat -c %u:%g /both/{name}; cat /proc/self/uid_map"),
        );
        assert!(said.starts_with("1000:1000\n"), "{said}");
    }
    podman.end(&["one", "two"]);
}

/// Rootless Podman of a user in the plugin's group.
struct Rootless {
    home: PathBuf,
    binds: Vec<PathBuf>,
}

impl Rootless {
    fn new(host: &Host) -> Self {
        let home = PathBuf::from("/run/rootless");
        for dir in ["", "run", "tmp"] {
            let dir = home.join(dir);
            fs::create_dir_all(&dir).unwrap();
            chown(&dir, Some(USER), Some(USER)).unwrap();
        }
        // Hooks run as that user.
        fs::set_permissions(host.site.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let binds = ["passwd", "group", "subuid", "subgid"].map(|name| {
            let (own, file) = (home.join(name), PathBuf::from("/etc").join(name));
            let mut text = fs::read_to_string(&file).unwrap();
            text += &match name {
                "passwd" => format!("rootless:x:{USER}:{USER}::{}:/bin/sh\n", home.display()),
                "group" => format!("rootless:x:{USER}:\n"),
                _ => "rootless:200000:65536\n".to_owned(),
            };
            fs::write(&own, text).unwrap();
            mount(
                Some(&own),
                &file,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
            file
        });
        let all = Self {
            home,
            binds: binds.to_vec(),
        };
        // Of its own: what guests have for root, newer Podman takes for all users.
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\nrunroot = {:?}\ngraphroot = {:?}\n",
            all.home.join("run/containers"),
            all.home.join("storage")
        );
        fs::write(all.home.join("storage.conf"), storage).unwrap();
        let image = all.home.join("image.tar");
        let image = image.to_str().unwrap();
        host.podman
            .done(&["save", "--quiet", "--output", image, &host.podman.image]);
        fs::set_permissions(image, fs::Permissions::from_mode(0o644)).unwrap();
        all.done(&["load", "--quiet", "--input", image]);
        all
    }

    fn done(&self, arguments: &[&str]) -> String {
        succeed(&mut self.command(arguments))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &USER.to_string(), "--regid", &USER.to_string()])
            .args(["--groups", &GROUP.to_string(), "podman"])
            .args(arguments)
            .current_dir("/")
            .env("HOME", &self.home)
            .env("XDG_RUNTIME_DIR", self.home.join("run"))
            .env("TMPDIR", self.home.join("tmp"))
            .env("CONTAINERS_STORAGE_CONF", self.home.join("storage.conf"));
        command
    }
}

impl Drop for Rootless {
    fn drop(&mut self) {
        for arguments in [&["rm", "--force", "--all"][..], &["system", "migrate"]] {
            println!("{:?}", outcome_of(&mut self.command(arguments)));
        }
        for file in &self.binds {
            let _ = umount2(file, MntFlags::MNT_DETACH);
        }
    }
}

fn rootless(kind: Kind) {
    let host = Host::configured(kind, &format!("socket-group = \"{GROUP}\"\n"));
    let _hooks = Hooks::new(&host);
    let podman = Rootless::new(&host);
    let driver = crate::support::podman::DRIVER;
    podman.done(&create(driver, "cache", &OPTIONS));
    podman.done(&create(driver, "job", &["type=job", "owner=1000:1000"]));
    let run = |arguments: &[&str]| podman.done(arguments);
    for (i, options) in [
        &[][..],
        &["--userns=keep-id"],
        &["--userns=auto:size=2000"],
        &[],
    ]
    .into_iter()
    .enumerate()
    {
        let before_it = host.last("cache");
        let (told, ids) = job(run, &host.podman.image, options);
        check(&told, i == 0, true, &format!("{options:?}: {ids}"));
        host.published_after("cache", &before_it);
    }
    // How a container ended is in the user's own files.
    for (script, verdict) in [
        ("exit 0", "success"),
        ("exit 1", "failure"),
        ("exec sleep 3600", "failure"),
    ] {
        let before = host.last("cache");
        let head = ["run", "--detach", "--name", "ends", "-v", "cache:/cache"];
        let tail = [host.podman.image.as_str(), "sh", "-c", script];
        podman.done(&[&head[..], &tail].concat());
        if script.starts_with("exit") {
            podman.done(&["wait", "ends"]);
        }
        podman.done(&["rm", "--force", "--time", "0", "ends"]);
        let last = ended_after(&before, || host.last("cache"));
        assert_eq!(last["verdict"], verdict, "{script}: {last}");
    }
}
