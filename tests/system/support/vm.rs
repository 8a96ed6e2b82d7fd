// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests that a test drives by itself: power cuts, restarts, disks that survive.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use super::command::{Outcome, outcome_of, run};
use super::writes::Log;
use crate::harness::{this_binary, vm_run};

/// Runs a command in a guest of its own, with options for `tests/vm/run`, to its end.
pub fn boot(options: &[&str], command: &[&str]) -> Outcome {
    outcome_of(vm_run().args(options).arg("--").args(command))
}

/// Runs a [`part`](crate::harness::Tier::Part) by its name in a guest of its own.
pub fn boot_part(options: &[impl AsRef<OsStr>], name: &str) -> Outcome {
    outcome_of(part_command(options, name).stdin(Stdio::null()))
}

/// Starts a part in a guest of its own: see [`Guest`].
pub fn start_part(dir: &Path, options: &[impl AsRef<OsStr>], name: &str) -> Guest {
    let pidfile = dir.join("pid");
    let _ = std::fs::remove_file(&pidfile);
    let mut options: Vec<_> = options.iter().map(AsRef::as_ref).collect();
    options.extend(["--pidfile".as_ref(), pidfile.as_os_str()]);
    let child = part_command(&options, name)
        .stdin(Stdio::null())
        .spawn()
        .expect("a guest");
    Guest { child, pidfile }
}

fn part_command(options: &[impl AsRef<OsStr>], name: &str) -> Command {
    let mut command = vm_run();
    command
        .args(["--cpus", "1"])
        .args(options)
        .arg("--")
        .arg(this_binary())
        .args(["guest-one", &format!("part::{name}")]);
    command
}

/// A guest that is running. It is ended when dropped.
pub struct Guest {
    child: Child,
    pidfile: std::path::PathBuf,
}

impl Guest {
    /// Cuts its power. What it wrote to its disks is there, and nothing else of it.
    pub fn cut_power(&mut self) {
        let pid = std::fs::read_to_string(&self.pidfile)
            .expect("QEMU's process id")
            .trim()
            .parse()
            .unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL)
            .expect("QEMU runs");
        self.child.wait().expect("tests/vm/run ends");
    }

    /// Waits for its command's end.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("tests/vm/run ends")
    }

    /// Whether its command is still running.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("tests/vm/run is ours to wait for")
            .is_none()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        if self.is_running() {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// A disk of guests, one after the other, that keeps nothing over a power cut but what was flushed to it.
pub struct VolatileDisk {
    /// What it keeps.
    image: PathBuf,
    /// What the guest has, and all its writes.
    cached: PathBuf,
    log: PathBuf,
}

impl VolatileDisk {
    /// A blank one.
    pub fn new(dir: &Path) -> Self {
        let [image, cached, log] = ["disk", "cached", "log"].map(|name| dir.join(name));
        File::create(&image).unwrap().set_len(8 << 30).unwrap();
        Self { image, cached, log }
    }

    /// Options for the next guest's `tests/vm/run`, and others.
    pub fn options(&self, others: &[&str]) -> Vec<String> {
        let options = ["--sparse=always", "--reflink=auto"].map(AsRef::as_ref);
        let files = [self.image.as_os_str(), self.cached.as_os_str()];
        run("cp", options.into_iter().chain(files));
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let disk = [
            "--disk".into(),
            path(&self.cached),
            "--log".into(),
            path(&self.log),
        ];
        disk.into_iter()
            .chain(others.iter().map(|word| (*word).to_owned()))
            .collect()
    }

    /// What it keeps at a place.
    pub fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        File::open(&self.image)
            .unwrap()
            .read_exact_at(&mut byte, at)
            .unwrap();
        byte[0]
    }

    /// Once the guest's power was cut. How many writes are lost.
    pub fn lose_what_was_not_flushed(&self) -> usize {
        let log = Log::read(&self.log).unwrap();
        let image = File::options().write(true).open(&self.image).unwrap();
        let flushed = log.flushed();
        log.apply(&log.entries[..flushed], &image).unwrap();
        log.entries.len() - flushed
    }
}
