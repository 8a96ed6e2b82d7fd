// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Inside a guest: runs the tests that the host asks for, each as a process and a cgroup of its
//! own.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::guest::{Outcome, POLL, Request, write_whole};
use super::this_binary;

/// A guest that nobody asks for anything ends, and gives its memory back.
const IDLE: Duration = Duration::from_secs(60);

/// Serves requests until none has come for [`IDLE`].
pub fn serve(share: &Path) {
    let mut last = Instant::now();
    while last.elapsed() < IDLE {
        let path = share.join("request");
        if let Ok(text) = fs::read_to_string(&path) {
            fs::remove_file(&path).expect("the request is taken");
            let request: Request = serde_json::from_str(&text).expect("a request");
            let outcome = run(share, &request);
            write_whole(&share.join("outcome"), &outcome);
            last = Instant::now();
        }
        sleep(POLL);
    }
}

fn run(share: &Path, request: &Request) -> Outcome {
    let output = File::create(share.join("output")).expect("a file for the output");
    let cgroup = Cgroup::new();
    // The shell moves itself, so that nothing the test starts can be outside.
    let mut child = Command::new("/bin/sh")
        .args(["-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#])
        .arg(&cgroup.dir)
        .arg(this_binary())
        .args(["guest-one", &request.test])
        .env("RUST_BACKTRACE", "1")
        .stdout(output.try_clone().expect("a second descriptor"))
        .stderr(output.try_clone().expect("a third one"))
        .spawn()
        .expect("the test starts");
    let begin = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait().expect("the test is ours to wait for") {
            break Some(status);
        }
        if begin.elapsed() > Duration::from_secs(request.timeout) {
            // What it waits for, or what computes without an end, is among these.
            let _ = Command::new("ps")
                .args([
                    "-ww",
                    "-e",
                    "--forest",
                    "-o",
                    "pid,stat,etime,time,wchan:24,args",
                ])
                .stdout(output.try_clone().expect("a second descriptor"))
                .status();
            break None;
        }
        sleep(POLL);
    };
    cgroup.kill();
    let failure = match ended {
        Some(status) if status.success() => None,
        Some(status) => Some(describe(status)),
        None => {
            let _ = child.wait();
            Some(format!("was ended after {} s", request.timeout))
        }
    };
    if failure.is_some() {
        // The disk image is part of the wreck.
        nix::unistd::sync();
    }
    Outcome { failure }
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("died of signal {signal}"),
        None => format!("failed (exit status {})", status.code().unwrap_or_default()),
    }
}

/// All that one test started and left running.
struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    fn new() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").expect("cgroup2 in the guest");
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .expect("a cgroup2");
        let dir = Path::new("/sys/fs/cgroup").join(own).join("test");
        fs::create_dir_all(&dir).expect("a cgroup for the test");
        Self { dir }
    }

    fn kill(&self) {
        fs::write(self.dir.join("cgroup.kill"), "1").expect("the test's processes are killed");
        let events = self.dir.join("cgroup.events");
        while fs::read_to_string(&events).is_ok_and(|text| text.contains("populated 1")) {
            sleep(POLL);
        }
        // The next test's is a new one: what is started straight into another cgroup (clone3, as crun does it) out of one that was
        // ever killed is killed too, seen with Linux 7.2.
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Ends the guest's kernel without warning, as a part for the harness's own test.
pub fn crash() {
    println!("about to crash");
    fs::write("/proc/sysrq-trigger", "c").expect("sysrq");
}
