// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hooks of hooks.d/, run by Podman: how containers ended, and the guard.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use lvm_cache_friend::podman::Events;
use serde_json::{Value, json};

use super::{Body, Host, ended_after, mountpoint};
use crate::support::PROGRAM;
use crate::support::command::run;
use crate::support::daemon::{Daemon, SOCKET};
use crate::support::podman::{DropIn, create};
use crate::support::site::Kind;
use crate::support::wait_until;

pub const BODIES: &[Body] = &[
    ("verdicts", verdicts),
    ("containers_of_a_volume", containers),
    ("verdict_over_a_kill", over_a_kill),
    ("guard", guard),
];

/// The repository's hooks, with this build's program and this site's configuration.
pub struct Hooks {
    _dir: tempfile::TempDir,
    _conf: DropIn,
}

impl Hooks {
    pub fn new(host: &Host) -> Self {
        let dir = tempfile::tempdir_in("/run").unwrap();
        for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/hooks.d")).unwrap() {
            let file = file.unwrap();
            let mut hook: Value = serde_json::from_slice(&fs::read(file.path()).unwrap()).unwrap();
            let arguments = hook["hook"]["args"].as_array_mut().unwrap();
            arguments.splice(1..1, [json!("--config"), json!(host.site.config)]);
            hook["hook"]["path"] = PROGRAM.into();
            fs::write(dir.path().join(file.file_name()), hook.to_string()).unwrap();
        }
        let conf = format!("[engine]\nhooks_dir = [{:?}]\n", dir.path());
        Self {
            _conf: DropIn::new("60-hooks", &conf),
            _dir: dir,
        }
    }
}

/// What containers use here, and where: plain volumes and job volumes, with `publish=unless-failed` and with `on-success`.
const USED: [(&str, &str); 4] = [
    ("quiet", "quiet:/quiet"),
    ("strict", "strict:/strict"),
    ("late", "late:/late:rslave"),
    ("late-strict", "late-strict:/late-strict:rslave"),
];

/// Where each of them is written to, by what the shell function `begin` does first.
const BEGIN: &str = "begin() {
    for job in late late-strict; do
        # Started again, it has that already.
        /$job/bin/lvm-cache-friend restore x || :
        grep -q \" /$job/x \" /proc/self/mounts
    done
    for place in /quiet /strict /late/x /late-strict/x; do date +%N > $place/y; done
}
begin
";

/// A cache of its own in each job volume.
fn volumes(host: &Host) {
    for (volume, options) in [
        ("quiet", &["save=quiet"][..]),
        ("strict", &["save=strict", "publish=on-success"]),
        ("late", &["type=job", "save=late"]),
        (
            "late-strict",
            &["type=job", "save=late-strict", "publish=on-success"],
        ),
    ] {
        host.podman.create(volume, options);
    }
}

/// Starts the container `job` with all of [`USED`], and `script` in it after [`BEGIN`].
fn start(host: &Host, options: &[&str], script: &str) {
    let volumes = USED.iter().flat_map(|(_, mount)| ["-v", mount]);
    let volumes: Vec<_> = volumes.collect();
    let script = format!("{BEGIN}{script}");
    let head = ["run", "--detach", "--name", "job"];
    let tail = [host.podman.image.as_str(), "sh", "-ec", &script];
    host.podman
        .done(&[&head[..], &volumes, options, &tail].concat());
}

/// What became of the last cache that was used through a volume.
fn last(host: &Host, volume: &str) -> Value {
    let last = &host.status(volume)["last_lease"];
    if last["x"].is_object() {
        last["x"].clone()
    } else {
        last.clone()
    }
}

/// Runs a container to the end that `ends` gives it, and tells what became of each of [`USED`].
fn ended(
    host: &mut Host,
    options: &[&str],
    script: &str,
    ends: impl FnOnce(&mut Host),
) -> [Value; 4] {
    let before = USED.map(|(volume, _)| last(host, volume)["lv"].clone());
    start(host, options, script);
    ends(host);
    let after = USED.map(|(volume, _)| {
        let mut ended = Value::Null;
        wait_until(|| {
            ended = last(host, volume);
            let idle = ["ready", "stale"].map(Value::from);
            ended["lv"].is_string()
                && !before.contains(&ended["lv"])
                && idle.contains(&host.status(volume)["state"])
        });
        ended
    });
    host.podman.outcome(&["rm", "--force", "job"]);
    after
}

fn verdicts(kind: Kind) {
    let mut host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    volumes(&host);
    let wait = |host: &mut Host| drop(host.podman.outcome(&["wait", "job"]));
    let begun = || wait_until(|| mountpoint("late-strict").join("x/y").exists());
    let kill = |host: &mut Host| {
        begun();
        host.podman.done(&["kill", "job"]);
    };
    let remove = |host: &mut Host| {
        begun();
        host.podman.done(&["rm", "--force", "--time", "0", "job"]);
    };
    // The daemon that is told of the end is not the one that was told of the start.
    let restart = |host: &mut Host| {
        begun();
        host.restart(true, |_| {});
        fs::write(mountpoint("quiet").join("go"), "").unwrap();
        wait(host);
    };
    let sleep = "exec sleep 3600";
    let go = "until [ -e /quiet/go ]; do sleep 0.1; done; rm /quiet/go\n";
    // Its first two runs fail.
    let third = "n=$(cat /quiet/n || echo 0); echo $((n + 1)) > /quiet/n; [ $n = 2 ]";
    let cases = [
        (
            "exit 0",
            &[][..],
            "exit 0",
            &wait as &dyn Fn(&mut Host),
            "success",
        ),
        ("exit 1", &[][..], "exit 1", &wait, "failure"),
        ("podman kill", &[][..], sleep, &kill, "failure"),
        ("podman rm -f", &[][..], sleep, &remove, "failure"),
        (
            "restarted until it succeeds",
            &["--restart=on-failure:5"][..],
            third,
            &wait,
            "success",
        ),
        (
            "exit 0 after a restart of the daemon",
            &[][..],
            &format!("{go}exit 0"),
            &restart,
            "success",
        ),
        (
            "exit 1 after a restart of the daemon",
            &[][..],
            &format!("{go}exit 1"),
            &restart,
            "failure",
        ),
        (
            "out of memory",
            &["--memory=24m", "--memory-swap=24m"][..],
            "exec dd if=/dev/zero of=/dev/null bs=64M count=1",
            &wait,
            "failure",
        ),
    ];
    for (case, options, script, ends, verdict) in cases {
        // No cgroup2 on this machine.
        if case == "out of memory" && kind == Kind::Reflink {
            continue;
        }
        let after = ended(&mut host, options, script, ends);
        for ((volume, _), last) in USED.iter().zip(after) {
            assert_eq!(last["verdict"], verdict, "{case}, {volume}: {last}");
            assert_eq!(
                last["published"].is_string(),
                verdict == "success",
                "{case}, {volume}: {last}"
            );
        }
    }
}

/// How containers ended, where Podman's events are in the journal: the first runs of one that is restarted too.
pub fn in_the_journal() {
    let mut host = Host::new(Kind::Lvm);
    let _hooks = Hooks::new(&host);
    let _events = DropIn::new("65-events", "[engine]\nevents_logger = \"journald\"\n");
    volumes(&host);
    let wait = |host: &mut Host| drop(host.podman.outcome(&["wait", "job"]));
    let third = "n=$(cat /quiet/n || echo 0); echo $((n + 1)) > /quiet/n; [ $n = 2 ]";
    for (options, script, verdict) in [
        (&["--restart=on-failure:5"][..], third, "success"),
        (&[], "exit 1", "failure"),
    ] {
        for last in ended(&mut host, options, script, wait) {
            assert_eq!(last["verdict"], verdict, "{script}: {last}");
        }
    }
    // Entries that look like Podman's are believed of root alone, whose Podman it is here.
    for (user, code) in [(1234, None), (0, Some(0))] {
        let id = format!("{user:064}");
        let entry =
            format!("MESSAGE=forged\nPODMAN_ID={id}\nPODMAN_EVENT=died\nPODMAN_EXIT_CODE=0\n");
        let mut logger = Command::new("setpriv");
        logger.args([
            &format!("--reuid={user}"),
            "--clear-groups",
            "logger",
            "--journald",
        ]);
        assert_eq!(feed(&mut logger, &entry), 0);
        let seen = || {
            !run(
                "journalctl",
                ["--quiet", "--output=cat", &format!("PODMAN_ID={id}")],
            )
            .is_empty()
        };
        wait_until(seen);
        assert_eq!(
            Events::of_caller().exit_code(&id, Instant::now()),
            code,
            "{user}"
        );
    }
}

/// Has a program read a text, and gives its exit status.
fn feed(program: &mut Command, text: &str) -> i32 {
    let mut child = program.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    child.wait().unwrap().code().unwrap()
}

/// Which containers use a volume is told.
fn containers(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    host.podman
        .create("strict", &["save=strict", "publish=on-success"]);
    host.podman.start("job", "strict", "date +%N > /strict/x");
    let lv = host.status("strict")["lv"].clone();
    let id = host.podman.done(&["inspect", "--format", "{{.Id}}", "job"]);
    assert_eq!(host.status("strict")["containers"], json!([id.trim()]));
    host.podman.end(&["job"]);
    let last = host.settled("strict", &lv);
    assert_eq!(last["verdict"], "failure", "{last}");
}

/// The daemon dies between the end of a container and Podman's Unmount.
fn over_a_kill(kind: Kind) {
    let mut host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    for (volume, code, options, mount, verdict) in [
        ("plain1", "1", &["save=plain"][..], "/quiet", "failure"),
        ("plain0", "0", &["save=plain"], "/quiet", "unknown"),
        (
            "job1",
            "1",
            &["save=job", "type=job"],
            "/late:rslave",
            "failure",
        ),
        (
            "job0",
            "0",
            &["save=job", "type=job"],
            "/late:rslave",
            "unknown",
        ),
    ] {
        // Podman mounts a volume no more whose Unmount failed: each is of its own.
        host.podman.create(volume, options);
        host.daemon = None;
        let point = [("LVM_CACHE_FRIEND_FAILPOINT", "unmount.1")];
        let daemon = Daemon::start_with(&host.site.config, Path::new(SOCKET), &point);
        let script = format!(
            "if [ -d /late ]; then /late/bin/lvm-cache-friend restore x; date +%N > /late/x/y; else date +%N > /quiet/y; fi\nexit {code}"
        );
        let mount = format!("{volume}:{mount}");
        let head = ["run", "--name", "job", "-v", &mount];
        let tail = [host.podman.image.as_str(), "sh", "-ec", &script];
        host.podman.outcome(&[&head[..], &tail].concat());
        daemon.died();
        host.daemon = Some(host.site.serve());
        let id = crate::support::podman::CLIENT;
        host.daemon().plugin().unmount(volume, id);
        let ended = ended_after(&Value::Null, || last(&host, volume));
        assert_eq!(ended["verdict"], verdict, "{volume}: {ended}");
        let tag = volume.trim_end_matches(|digit: char| digit.is_ascii_digit());
        let published = host.entries_tagged(&[tag]).len();
        assert_eq!(published, usize::from(code == "0"), "{volume}: {ended}");
        host.podman.outcome(&["rm", "--force", "job"]);
    }
}

fn guard(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    let podman = &host.podman;
    podman.create("real", &[]);
    let run = |annotation: &str, volume: &str| {
        let annotation = format!("lvm-cache-friend.volume={annotation}");
        let options = ["--annotation", &annotation, "-v", volume];
        let arguments = podman.run_sh(&options, "echo started");
        podman.outcome(&arguments)
    };
    let started = run("real:/cache", "real:/cache");
    assert_eq!(
        (started.status, started.stdout.as_str()),
        (0, "started\n"),
        "{started:?}"
    );
    for (annotation, volume, words) in [
        (
            "silent:/cache",
            "silent:/cache",
            "not the cache volume silent",
        ),
        ("real:/cache", "silent:/cache", "not the cache volume real"),
        (
            "real:/cache",
            "real:/elsewhere",
            "no volume is mounted at /cache",
        ),
        (
            "real:/cache other:/more",
            "real:/cache",
            "no volume is mounted at /more",
        ),
        ("real", "real:/cache", "is not NAME:TARGET"),
    ] {
        let refused = run(annotation, volume);
        assert_ne!(refused.status, 0, "{annotation} {volume}");
        assert!(refused.stderr.contains(words), "{refused:?}");
        assert!(!refused.stdout.contains("started"), "{refused:?}");
    }
    // Podman's standard error may be a file, where Podman writes on behind the reason, or a socket, as the journal's.
    let told = |stderr: Stdio| {
        let options = [
            "--annotation",
            "lvm-cache-friend.volume=silent:/cache",
            "-v",
            "silent:/cache",
        ];
        let arguments = podman.run_sh(&options, "echo started");
        let status = Command::new("podman")
            .args(arguments)
            .stderr(stderr)
            .status();
        assert!(!status.unwrap().success());
    };
    let dir = crate::support::temp_dir();
    let file = dir.path().join("stderr");
    told(fs::File::create(&file).unwrap().into());
    let mut socket = String::new();
    let (mut ours, podmans) = UnixStream::pair().unwrap();
    told(OwnedFd::from(podmans).into());
    ours.read_to_string(&mut socket).unwrap();
    for text in [fs::read_to_string(&file).unwrap(), socket] {
        let reason = text.lines().any(|line| {
            line.starts_with("lvm-cache-friend: ") && line.contains("not the cache volume silent")
        });
        assert!(reason, "{text}");
    }
    // What Podman made of it is an ordinary volume.
    podman.done(&["volume", "rm", "--force", "silent"]);
    podman.done(&create(crate::support::podman::DRIVER, "silent", &[]));
    let started = run("silent:/cache", "silent:/cache");
    assert_eq!(started.status, 0, "{started:?}");
}
