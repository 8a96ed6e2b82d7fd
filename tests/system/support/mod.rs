// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What tests share: commands, file systems, guests, and the daemon with a client for it.
//!
//! A fixture undoes itself when dropped, a failed test's too.

#![allow(dead_code)]

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

pub mod background;
pub mod census;
pub mod ceph;
pub mod command;
pub mod content;
pub mod daemon;
pub mod disks;
pub mod lvm;
pub mod podman;
pub mod reflink;
pub mod site;
pub mod vm;
pub mod writes;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lvm-cache-friend");

/// A directory of the test's own on this machine's (or the guest's) own file system.
pub fn temp_dir() -> tempfile::TempDir {
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).expect("Cargo's directory for tests");
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for the test")
}

/// By when what a test waits for must be so, on this machine and in an emulated guest. Far beyond what it takes, and below the
/// time that a test has: what fails then is the test, with its place and the daemon's log.
const PATIENCE: [Duration; 2] = [Duration::from_secs(120), Duration::from_secs(300)];

/// Waits until something is so.
#[track_caller]
pub fn wait_until(mut so: impl FnMut() -> bool) {
    // What tests/vm/run puts there is only in guests.
    let in_guest = Path::new("/run/vm/command").exists();
    let patience = PATIENCE[usize::from(in_guest)];
    let since = Instant::now();
    loop {
        let looked = Instant::now();
        if so() {
            return;
        }
        // A look may run commands, which take from what is waited for where there is one processor.
        let pause = looked.elapsed() * 2;
        assert!(
            since.elapsed() < patience,
            "what is waited for here is not so after {} s",
            patience.as_secs()
        );
        thread::sleep(pause.max(Duration::from_millis(20)));
    }
}

/// Loads the busybox image where it is not there yet, from no registry, and returns its name.
pub fn busybox_image() -> String {
    image("busybox-image")
}

/// The same with the image that a script of `tests/vm` makes, which may have an argument.
pub fn image(script: &str) -> String {
    let mut words = script.split_whitespace();
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/vm")
        .join(words.next().expect("its name"));
    command::run(script, words).trim().to_owned()
}
