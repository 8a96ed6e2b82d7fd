// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doctor`, on a host that is broken in one way after the other.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;

use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::config::Settings;
use lvm_cache_friend::storage::NewLv;
use serde_json::{Value, json};

use super::Host;
use super::hooks::Hooks;
use crate::harness::{Group, Test, Tier, test};
use crate::support::PROGRAM;
use crate::support::command::{outcome_of, run};
use crate::support::daemon::{Daemon, SOCKET};
use crate::support::lvm::TestVg;
use crate::support::podman::DropIn;
use crate::support::site::{Kind, MOUNT_DIR, Site};
use crate::support::wait_until;

/// Each fault that this machine's own kernel lets one make, and the rest in guests: those of units are in the quick
/// start's ([`crate::quickstart`]).
pub fn tests() -> Vec<Test> {
    vec![
        test(Tier::Reflink, "podman::doctor", doctor).timeout(900),
        test(Tier::Reflink, "podman::doctor_without_anything", bare),
        test(Tier::Guest(Group::Lvm), "podman::doctor_of_a_pool", pool),
    ]
}

/// What `doctor --json` finds with a configuration. Its exit status says whether something is wrong.
pub fn findings(config: &Path) -> Vec<Value> {
    let mut command = Command::new(PROGRAM);
    command
        .arg("--config")
        .arg(config)
        .args(["doctor", "--json"]);
    let outcome = outcome_of(&mut command);
    let report: Value = serde_json::from_str(&outcome.stdout)
        .unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
    let findings = report["findings"].as_array().unwrap().clone();
    let wrong = findings.iter().filter(|f| f["state"] == "wrong").count();
    assert_eq!(report["wrong"], wrong);
    assert_eq!(outcome.status, i32::from(wrong > 0), "{outcome:?}");
    findings
}

/// Sees that nothing is wrong.
#[track_caller]
fn well(config: &Path) {
    for found in findings(config) {
        assert!(found["state"] != "wrong", "{found}");
    }
}

/// Sees that a check finds something, wrong or worth a note, that says `words`, and nothing else is wrong but what
/// `follows` from it.
#[track_caller]
fn finds(config: &Path, check: &str, state: &str, words: &str, follows: &[&str]) {
    finds_all(config, &[(check, state, words)], follows);
}

/// The same for several things at once: each a check, a state and words.
#[track_caller]
pub fn finds_all(config: &Path, things: &[(&str, &str, &str)], follows: &[&str]) {
    let findings = findings(config);
    for (check, state, words) in things {
        let says = |found: &&Value| {
            found["check"] == *check
                && found["state"] == *state
                && found.to_string().contains(words)
        };
        assert!(
            findings.iter().any(|found| says(&found)),
            "{check} does not say {words:?}: {findings:#?}"
        );
    }
    let checks = things.iter().map(|(check, ..)| check);
    for found in &findings {
        let expected = checks
            .clone()
            .chain(follows)
            .any(|name| found["check"] == *name);
        assert!(found["state"] != "wrong" || expected, "{found}");
    }
}

/// A file in another's place, until this is dropped.
struct Instead<'a>(&'a str);

impl<'a> Instead<'a> {
    fn text(place: &'a str, text: &str) -> Self {
        let file = tempfile::NamedTempFile::new_in("/run").unwrap();
        fs::write(file.path(), text).unwrap();
        let (_, path) = file.keep().unwrap();
        Self::file(place, path.to_str().unwrap())
    }

    fn file(place: &'a str, file: &str) -> Self {
        run("mount", ["--bind", file, place]);
        Self(place)
    }

    /// `None`: nothing is there anyway.
    fn nothing(place: &'a str) -> Option<Self> {
        Path::new(place).exists().then(|| {
            run("mount", ["-t", "tmpfs", "none", place]);
            Self(place)
        })
    }
}

impl Drop for Instead<'_> {
    fn drop(&mut self) {
        run("umount", ["--lazy", self.0]);
    }
}

fn bare() {
    let config = Path::new("/run/none/config.toml");
    let text = outcome_of(
        Command::new(PROGRAM)
            .arg("--config")
            .arg(config)
            .arg("doctor"),
    );
    assert_eq!(text.status, 1, "{text:?}");
    for words in ["WRONG  configuration", "fix: lvm-cache-friend init"] {
        assert!(text.stdout.contains(words), "{text:?}");
    }
    // Not a terminal: no colours.
    assert!(!text.stdout.contains('\u{1b}'), "{text:?}");
    assert!(text.stderr.contains("problems found"), "{text:?}");
    assert!(findings(config).len() > 10, "each check says something");
}

/// What needs LVM.
fn pool() {
    let site = Site::new(Kind::Lvm);
    let finds = |check: &str, words: &str| {
        // No daemon runs, and Podman knows nothing of it.
        let follows = ["daemon", "socket", "podman", "hooks"];
        finds(&site.config, check, "wrong", words, &follows);
    };
    {
        let _loadable = Instead::nothing("/lib/modules");
        let _loaded = Instead::nothing("/sys/module");
        finds("kernel", "no dm-thin-pool");
    }
    let pool = format!("{}/friend-pool", TestVg::NAME);
    run("lvchange", ["--errorwhenfull", "n", &pool]);
    finds("pool", &format!("--errorwhenfull y {pool}"));
    let _renamed = site.broken();
    finds("store", "vgs testvg");
}

/// One that is configured.
fn supervisor(host: &Host, config: &Path) {
    let finds = |words: &str| finds(config, "supervisor", "wrong", words, &[]);
    let settings = fs::read_to_string(config).unwrap();
    let place = |name: &str| host.site.dir.path().join(name);
    let (token, podman) = (place("token"), place("podman.sock"));
    let with = |more: &str| {
        let text = format!(
            "{settings}\n[supervise]\npodman-socket = {podman:?}\n{more}\n[[supervise.pool]]\nname = 'linux'\n\
             url = 'https://github.com/octo/project'\napi-url = 'http://127.0.0.1:9'\ntoken = {token:?}\n\
             count = 2\nlabels = ['linux']\ncontainer.image = 'none'\n"
        );
        fs::write(config, text).unwrap();
    };
    with("colour = 3");
    finds("colour");
    with("");
    finds("No such file");
    fs::write(&token, "token").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    finds("chmod 0600");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    finds("podman.socket");
    let _podman = UnixListener::bind(&podman).unwrap();
    finds("does not answer on /run/lvm-cache-friend/runners.sock");
    // GitHub and Podman are away; it says so itself.
    let mut supervise = host.site.command(&["supervise"]).spawn().unwrap();
    let socket = Path::new("/run/lvm-cache-friend/runners.sock");
    wait_until(|| UnixStream::connect(socket).is_ok());
    well(config);
    supervise.kill().unwrap();
    supervise.wait().unwrap();
    fs::remove_file(socket).unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    let stranger = thread::spawn(move || drop(listener.accept().unwrap()));
    finds("unexpected reply on");
    stranger.join().unwrap();
    // Its unit alone has that.
    let text = fs::read_to_string(config).unwrap();
    let credential = text.replace(&format!("{token:?}"), "'credential:token'");
    fs::write(config, credential).unwrap();
    finds("does not answer on");
    let mut found = findings(config);
    found.retain(|found| found["check"] == "supervisor");
    assert_eq!(found.len(), 1, "{found:?}");
}

fn doctor() {
    let mut host = Host::new(Kind::Reflink);
    let hooks = Hooks::new(&host);
    let config = host.site.config.clone();
    let finds = |check: &str, state: &str, words: &str, follows: &[&str]| {
        finds(&config, check, state, words, follows);
    };
    well(&config);

    let settings = fs::read(&config).unwrap();
    fs::write(&config, "colour = 3\n").unwrap();
    finds("configuration", "wrong", "colour", &[]);
    fs::write(&config, &settings).unwrap();

    let mode =
        |file: &Path, mode| fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    mode(&config, 0o666);
    finds("permissions", "wrong", "chmod go-w", &[]);
    mode(&config, 0o644);
    let dir = host.site.dir.path().join("lvm-cache-friend");
    fs::create_dir(&dir).unwrap();
    symlink(&config, dir.join("config.toml")).unwrap();
    fs::write(dir.join("app-key.pem"), "a key").unwrap();
    mode(&dir.join("app-key.pem"), 0o640);
    super::doctor::finds(
        &dir.join("config.toml"),
        "permissions",
        "wrong",
        "0600",
        &[],
    );

    {
        let _gone = Instead::file("/usr/sbin/e2fsck", "/dev/null");
        finds("tools", "wrong", "apt install e2fsprogs", &[]);
    }
    {
        let _older = Instead::text("/proc/sys/kernel/osrelease", "5.15.0-1-amd64\n");
        finds("kernel", "note", "idmapped", &[]);
    }
    {
        let _known = Instead::text("/proc/filesystems", "nodev\ttmpfs\n\text4\n");
        let _loadable = Instead::nothing("/lib/modules");
        finds("kernel", "wrong", "no XFS", &[]);
    }

    let store = Settings::load(&config).unwrap().store.open().unwrap();
    let odd = NewLv {
        name: "friend-odd".parse().unwrap(),
        tags: vec!["friend:cache:linux".parse().unwrap()],
        active: false,
    };
    store.create(&odd, Bytes::mib(4)).unwrap();
    finds("leftovers", "wrong", "friend-odd", &[]);
    // As a clock leaves it that was ahead.
    let tags = Path::new(&host.site.store()).join("friend-odd/tags.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&tags).unwrap()).unwrap();
    record["created"] = json!(record["created"].as_u64().unwrap() + 86_400);
    fs::write(&tags, record.to_string()).unwrap();
    finds("clock", "wrong", "set-ntp", &["leftovers"]);
    store.remove(&odd.name).unwrap();
    well(&config);

    let filler = Path::new(&host.site.store()).with_file_name("filler");
    let free = run("df", ["--output=avail", "-k", &host.site.store()]);
    let free: u64 = free.lines().nth(1).unwrap().trim().parse().unwrap();
    run(
        "fallocate",
        [
            "--length",
            &format!("{}K", free - free / 30),
            filler.to_str().unwrap(),
        ],
    );
    finds("pool", "wrong", "remove entries", &[]);
    fs::remove_file(filler).unwrap();
    // XFS gives the space back a moment later.
    let has_room = || {
        findings(&config)
            .iter()
            .any(|f| f["check"] == "pool" && f["state"] == "ok")
    };
    wait_until(has_room);

    // Podman's trap: the daemon's volume, and a local one of that name in Podman.
    host.daemon()
        .plugin()
        .create("cargo", &json!({"save": "linux"}));
    host.podman.done(&["volume", "create", "cargo"]);
    finds("local-volumes", "wrong", "podman volume rm cargo", &[]);
    host.podman.done(&["volume", "rm", "cargo"]);
    host.daemon().plugin().remove("cargo");

    let drop_in = "/etc/containers/containers.conf.d/50-lvm-cache-friend.conf";
    let text = fs::read(drop_in).unwrap();
    fs::remove_file(drop_in).unwrap();
    finds("podman", "wrong", "50-lvm-cache-friend.conf", &[]);
    fs::write(drop_in, text).unwrap();
    {
        let _other = DropIn::new(
            "70-other",
            "[engine.volume_plugins]\nlvm-cache-friend = \"/run/other.sock\"\n",
        );
        finds("podman", "wrong", "/run/other.sock", &[]);
    }
    {
        let dir = tempfile::tempdir_in("/run").unwrap();
        fs::write(dir.path().join("other.json"), "{").unwrap();
        let text = format!("[engine]\nhooks_dir = [{:?}]\n", dir.path());
        let _other = DropIn::new("70-other", &text);
        finds("hooks", "wrong", "no hook for precreate", &[]);
        finds("hooks", "wrong", "no container at all starts", &[]);
    }
    well(&config);

    supervisor(&host, &config);
    fs::write(&config, &settings).unwrap();
    well(&config);

    mode(Path::new(SOCKET), 0o666);
    finds("socket", "wrong", "chmod 0660", &[]);
    mode(Path::new(SOCKET), 0o660);
    mode(Path::new(MOUNT_DIR), 0o755);
    finds("permissions", "wrong", "chmod 0750", &[]);
    mode(Path::new(MOUNT_DIR), 0o750);
    run("mount", ["--make-private", "/run"]);
    finds("propagation", "wrong", "--make-shared /run", &[]);
    run("mount", ["--make-shared", "/run"]);
    // As dockerd leaves it, whether or not it runs now.
    fs::write("/run/docker.sock", "").unwrap();
    finds("docker", "note", "no spec file", &[]);
    fs::remove_file("/run/docker.sock").unwrap();
    well(&config);

    host.daemon.take().expect("it runs").stop();
    finds("daemon", "wrong", "does not run", &["socket"]);
    finds("socket", "wrong", "does not exist", &["daemon"]);
    // Marked by a daemon that ended before it could remove it.
    let doomed = NewLv {
        name: "friend-gone".parse().unwrap(),
        tags: ["friend:snapshot", "friend:doomed"]
            .map(|tag| tag.parse().unwrap())
            .into(),
        active: false,
    };
    store.create(&doomed, Bytes::mib(4)).unwrap();
    finds(
        "leftovers",
        "note",
        "start the daemon",
        &["daemon", "socket"],
    );
    store.remove(&doomed.name).unwrap();
    drop(store);
    let dir = host.site.store();
    fs::rename(&dir, format!("{dir}-away")).unwrap();
    finds("store", "wrong", "is mounted", &["daemon", "socket"]);
    fs::rename(format!("{dir}-away"), dir).unwrap();

    let mut unshared = Command::new("unshare");
    unshared
        .args(["--mount", "--propagation", "slave", PROGRAM, "--config"])
        .arg(&config)
        .arg("serve");
    let private = Daemon::start_as(unshared);
    finds("namespace", "wrong", "not this one", &[]);
    private.stop();
    drop(hooks);
}
