//! The hooks of hooks.d/, run by Podman: how containers ended, and the guard.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Body, Host};
use crate::support::PROGRAM;
use crate::support::daemon::{Daemon, SOCKET};
use crate::support::podman::{DropIn, create};
use crate::support::site::Kind;
use crate::support::wait_until;

pub const BODIES: &[Body] = &[
    ("verdicts", verdicts),
    ("verdict_over_a_restart", over_a_restart),
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

/// A container with the volumes `quiet` (`unless-failed`) and `strict` (`on-success`), the end that `ends` gives it, and
/// what became of both leases.
fn ended(host: &Host, options: &[&str], script: &str, ends: impl FnOnce()) -> [Value; 2] {
    let before = ["quiet", "strict"].map(|volume| host.status(volume)["last_lease"].clone());
    let volumes = ["-v", "quiet:/quiet", "-v", "strict:/strict"];
    let script = format!("date +%N > /quiet/x; date +%N > /strict/x\n{script}");
    let head = ["run", "--detach", "--name", "job"];
    let tail = [host.podman.image.as_str(), "sh", "-ec", &script];
    host.podman
        .done(&[&head[..], &volumes, options, &tail].concat());
    ends();
    let after = ["quiet", "strict"].map(|volume| {
        let mut last = Value::Null;
        wait_until(|| {
            last = host.status(volume)["last_lease"].clone();
            before.iter().all(|before| before["lv"] != last["lv"])
                && host.status(volume)["state"] == "ready"
        });
        last
    });
    host.podman.outcome(&["rm", "--force", "job"]);
    after
}

fn volumes(host: &Host) {
    host.podman.create("quiet", &["save=quiet"]);
    let options = ["save=strict", "publish=on-success"];
    host.podman.create("strict", &options);
}

fn verdicts(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    let podman = &host.podman;
    volumes(&host);
    let wait = || drop(podman.outcome(&["wait", "job"]));
    let kill = || drop(podman.done(&["kill", "job"]));
    let remove = || drop(podman.done(&["rm", "--force", "--time", "0", "job"]));
    let sleep = "exec sleep 3600";
    // Its first two runs fail.
    let third = "n=$(cat /quiet/n || echo 0); echo $((n + 1)) > /quiet/n; [ $n = 2 ]";
    let cases = [
        ("exit 0", &[][..], "exit 0", &wait as &dyn Fn(), "success"),
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
    ];
    for (case, options, script, ends, verdict) in cases {
        let after = ended(&host, options, script, ends);
        for last in after {
            assert_eq!(last["verdict"], verdict, "{case}: {last}");
            assert_eq!(
                last["published"].is_string(),
                verdict == "success",
                "{case}: {last}"
            );
        }
    }
    if kind == Kind::Lvm {
        let options = ["--memory=24m", "--memory-swap=24m"];
        let script = "exec dd if=/dev/zero of=/dev/null bs=64M count=1";
        for last in ended(&host, &options, script, wait) {
            assert_eq!(last["verdict"], "failure", "out of memory: {last}");
            assert_eq!(last["published"], Value::Null, "out of memory: {last}");
        }
    }
}

/// The daemon that is told of the end is not the one that was told of the start.
fn over_a_restart(kind: Kind) {
    let mut host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    volumes(&host);
    host.podman.start("job", "strict", "date +%N > /strict/x");
    let lv = host.status("strict")["lv"].clone();
    let id = host.podman.done(&["inspect", "--format", "{{.Id}}", "job"]);
    assert_eq!(host.status("strict")["containers"], json!([id.trim()]));
    host.podman.end(&["job"]);
    let last = host.settled("strict", &lv);
    assert_eq!(last["verdict"], "failure", "{last}");

    for (code, published) in [("0", true), ("1", false)] {
        let script = format!(
            "date +%N > /strict/x; until [ -e /strict/go ]; do sleep 0.1; done; exit {code}"
        );
        host.podman.done(&[
            "run",
            "--detach",
            "--name",
            "job",
            "-v",
            "strict:/strict",
            &host.podman.image,
            "sh",
            "-ec",
            &script,
        ]);
        let lv = host.status("strict")["lv"].clone();
        host.restart(true, |_| {});
        host.podman.done(&["exec", "job", "touch", "/strict/go"]);
        assert_eq!(host.podman.done(&["wait", "job"]).trim(), code);
        let last = host.settled("strict", &lv);
        assert_eq!(
            last["published"].is_string(),
            published,
            "exit {code}: {last}"
        );
        host.podman.done(&["rm", "job"]);
    }
}

/// The daemon dies between the end of a container and Podman's Unmount.
fn over_a_kill(kind: Kind) {
    let mut host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    for (code, verdict) in [("1", "failure"), ("0", "unknown")] {
        // Podman mounts a volume no more whose Unmount failed.
        let volume = format!("v{code}");
        host.podman.create(&volume, &["save=quiet"]);
        host.daemon = None;
        let point = [("LVM_CACHE_FRIEND_FAILPOINT", "unmount.1")];
        let daemon = Daemon::start_with(&host.site.config, Path::new(SOCKET), &point);
        let script = format!("date +%N > /cache/x; exit {code}");
        let mount = format!("{volume}:/cache");
        let options = ["run", "--name", "job", "-v", &mount];
        let tail = [host.podman.image.as_str(), "sh", "-ec", &script];
        host.podman.outcome(&[&options[..], &tail].concat());
        daemon.died();
        host.daemon = Some(host.site.serve());
        let id = crate::support::podman::CLIENT;
        host.daemon().plugin().unmount(&volume, id);
        let mut last = Value::Null;
        wait_until(|| {
            last = host.status(&volume)["last_lease"].clone();
            last.is_object()
        });
        assert_eq!(last["verdict"], verdict, "exit {code}: {last}");
        let published = host.entries_tagged(&["quiet"]).len();
        assert_eq!(published, usize::from(code == "0"), "exit {code}: {last}");
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
    // What Podman made of it is an ordinary volume.
    podman.done(&["volume", "rm", "--force", "silent"]);
    podman.done(&create(crate::support::podman::DRIVER, "silent", &[]));
    let started = run("silent:/cache", "silent:/cache");
    assert_eq!(started.status, 0, "{started:?}");
}
