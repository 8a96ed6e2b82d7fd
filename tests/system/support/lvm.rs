// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volume groups in a guest.

use std::path::Path;

use super::command::{outcome, run, sh};

/// The guest's blank disk.
pub const DISK: &str = "/dev/vda";

/// A volume group named `testvg` on the guest's disk, from which everything else has been wiped.
pub struct TestVg;

impl TestVg {
    pub const NAME: &str = "testvg";

    /// Whatever an earlier test left there is taken down first.
    pub fn fresh() -> Self {
        clear();
        run("vgcreate", ["--quiet", Self::NAME, DISK]);
        Self
    }
}

impl Drop for TestVg {
    fn drop(&mut self) {
        // What a failed test left is for its reader.
        if !std::thread::panicking() {
            clear();
        }
    }
}

/// Unmounts, deactivates and wipes all that is on the guest's disk.
pub fn clear() {
    // A host may be called as the guest is; what tests/vm/run puts there is only in guests.
    assert!(
        Path::new("/run/vm/command").exists(),
        "only a guest's disk is ever wiped"
    );
    // Mounts may be stacked, and some are of namespaces that are about to go.
    sh(
        "while m=$(awk '$1 ~ \"^/dev/(mapper/|dm-|vda)\" { print $2; exit }' /proc/mounts) && [ -n \"$m\" ]; do umount -l \"$m\"; done",
    );
    super::wait_until(|| {
        outcome("dmsetup", ["remove_all"]);
        run("dmsetup", ["ls"]).starts_with("No devices")
    });
    // LVM makes these links itself where there is no udev, and takes what is left of them for a
    // foreign thing.
    let _ = std::fs::remove_dir_all(Path::new("/dev").join(TestVg::NAME));
    run("wipefs", ["--all", "--quiet", DISK]);
    // The pool's blocks too: a new thin pool would take the old one's metadata for its own.
    run("blkdiscard", ["--force", DISK]);
}
