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

/// A client of a job volume's socket for `perl -e`, with the socket's path after it: says its standard input, and shows what
/// is answered. Debian always has perl-base. It has no single quote, so that a shell can quote it.
pub const JOB_CLIENT: &str = r#"use IO::Socket::UNIX; $SIG{PIPE} = "IGNORE";
    my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "connect: $!";
    local $/; print $s scalar <STDIN>; $s->flush; $s->shutdown(1); print scalar <$s>;"#;

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
