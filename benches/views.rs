// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is shown of a store with 2,000 entries, on this machine's own kernel, and the daemon's memory.
//!
//! `cargo bench --bench views`, as root: the store is image files on an XFS of its own.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use lvm_cache_friend::cache::names::LvName;
use lvm_cache_friend::storage::reflink::ReflinkStore;
use lvm_cache_friend::storage::{NewLv, Store as _};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lvm-cache-friend");
const SOCKET: &str = "/run/lvm-cache-friend/plugin.sock";
const ENTRIES: usize = 2000;
const ROUNDS: usize = 11;

fn main() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "needs root: it mounts file systems"
    );
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    isolate();
    let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
    fs::File::create(&image).unwrap().set_len(16 << 30).unwrap();
    fs::create_dir(&disk).unwrap();
    run(Command::new("mkfs.xfs").arg("-q").arg(&image));
    run(Command::new("mount")
        .args(["-o", "loop"])
        .arg(&image)
        .arg(&disk));
    let (config, store) = (dir.path().join("config.toml"), disk.join("caches"));
    run(friend(&config, &["init", "--base-size", "1G", "--reflink"]).arg(&store));

    println!(
        "the daemon's resident memory with no entry: {:.1} MiB",
        resident(&config)
    );
    fill(&store);
    println!("with {ENTRIES}: {:.1} MiB", resident(&config));

    let daemon = Daemon::start(&config);
    println!("median of {ROUNDS}, in milliseconds, with {ENTRIES} entries:");
    for arguments in [
        &["list"][..],
        &["list", "--json"],
        &["tree"],
        &["tree", "--json"],
        &["gc", "--dry-run"],
        &["stats"],
    ] {
        let command = || run(&mut friend(&config, arguments));
        println!("{:<14}{:>8.1}", arguments.join(" "), median(command));
    }
    for path in ["/", "/metrics"] {
        println!("{:<14}{:>8.1}", format!("GET {path}"), median(|| get(path)));
    }
    println!("and its memory after that: {:.1} MiB", daemon.resident());
    drop(daemon);
    run(Command::new("umount").arg("--lazy").arg(&disk));
}

/// Mounts of its own, and an empty `/run`.
fn isolate() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    for flag in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, "/", none, MsFlags::MS_REC | flag, none).unwrap();
    }
    mount(
        Some("run"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .unwrap();
}

/// Chains, branches and tags as a repository has them: each entry from one of the last before it.
fn fill(dir: &Path) {
    let store = ReflinkStore::open(dir).unwrap();
    let mut names: Vec<LvName> = vec![store.list().unwrap().lvs[0].name.clone()];
    for n in 0..ENTRIES {
        let from = names[names.len().saturating_sub(1 + n * n % 7)].clone();
        let tags = [
            "friend:snapshot".to_owned(),
            "friend:cache:linux".to_owned(),
            format!("friend:cache:branch-{}", n % 40),
            format!("friend:cache:commit-{n:08x}"),
            format!("friend:from:{from}"),
        ];
        let new = NewLv {
            name: LvName::fresh(1_700_000_000, u32::try_from(n).unwrap().to_be_bytes()),
            tags: tags.map(|tag| tag.parse().unwrap()).into(),
            active: false,
        };
        store.snapshot(&from, &new).unwrap();
        names.push(new.name);
    }
}

fn friend(config: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("--config").arg(config).args(arguments);
    command
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

fn get(path: &str) {
    let mut stream = UnixStream::connect(SOCKET).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: plugin\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 OK"), "{answer}");
}

fn median(mut act: impl FnMut()) -> f64 {
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            // The daemon has its pages of two requests apart.
            sleep(Duration::from_millis(150));
            let began = Instant::now();
            act();
            began.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

struct Daemon(Child);

impl Daemon {
    fn start(config: &Path) -> Self {
        let mut command = friend(config, &["serve", "--log-level", "error"]);
        let daemon = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let mut waited = 0;
        while UnixStream::connect(SOCKET).is_err() {
            waited += 1;
            assert!(waited < 1000, "the daemon does not come up");
            sleep(Duration::from_millis(20));
        }
        // It answers once it has read the store.
        get("/metrics");
        daemon
    }

    /// In MiB.
    fn resident(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<f64>()
            .unwrap()
            / 1024.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Of a daemon that has just started, in MiB.
fn resident(config: &Path) -> f64 {
    Daemon::start(config).resident()
}
