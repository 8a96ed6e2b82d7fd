//! What tests share: commands, file systems, guests, and the daemon with a client for it.
//!
//! A fixture undoes itself when dropped, a failed test's too.

#![allow(dead_code)]

pub mod census;
pub mod command;
pub mod content;
pub mod daemon;
pub mod disks;
pub mod lvm;
pub mod podman;
pub mod reflink;
pub mod site;
pub mod vm;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lvm-cache-friend");

/// A directory of the test's own on this machine's (or the guest's) own file system.
pub fn temp_dir() -> tempfile::TempDir {
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).expect("Cargo's directory for tests");
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for the test")
}

/// Waits until something is so; a test that waits for ever is ended by its timeout.
pub fn wait_until(mut so: impl FnMut() -> bool) {
    while !so() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Loads the busybox image where it is not there yet, from no registry, and returns its name.
pub fn busybox_image() -> String {
    command::run(
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/busybox-image"),
        [""; 0],
    )
    .trim()
    .to_owned()
}
