// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volume groups in a guest.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
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

    /// What [`TestVg::keep`] kept, which `init` would take seconds in a guest to make again; and its configuration, at `config`.
    pub fn kept(config: &Path) -> Option<Self> {
        let pieces = fs::read_dir(KEPT).ok()?;
        clear();
        let disk = File::options().write(true).open(DISK).unwrap();
        for piece in pieces {
            let piece = piece.unwrap();
            let at = piece.file_name().to_str().unwrap().parse().unwrap();
            disk.write_all_at(&fs::read(piece.path()).unwrap(), at)
                .unwrap();
        }
        disk.sync_all().unwrap();
        fs::copy(KEPT_CONFIG, config).unwrap();
        Some(Self)
    }

    /// Keeps a group that `init` has just made a pool in, and its configuration, for the guest's other tests.
    pub fn keep(config: &Path) {
        let field = |name: &str, lv: &str| {
            let select = format!("lv_name={lv}");
            let options = ["--noheadings", "--all", "--options", name, "--select"];
            run("lvs", [&options[..], &[&select, Self::NAME]].concat())
        };
        // The beginnings of the disk and of the pool's data, and all of the pool's metadata: nothing else was written to.
        let percent: f64 = field("data_percent", "friend-pool").trim().parse().unwrap();
        assert!(percent < 1.5, "all that is written is in the beginning");
        let metadata = field("seg_pe_ranges", "friend-pool_tmeta");
        let (_, metadata) = metadata.trim().split_once(':').unwrap();
        let (first, last) = metadata.split_once('-').unwrap();
        let extent = |number: &str| 1 + 4 * number.parse::<u64>().unwrap();
        let parts = [0..128, extent(first)..extent(last) + 4];
        run("vgchange", ["--quiet", "--activate", "n", Self::NAME]);

        fs::create_dir(KEPT).unwrap();
        let disk = File::open(DISK).unwrap();
        let zeros = vec![0; 1 << 20];
        let mut piece = zeros.clone();
        for at in parts.into_iter().flatten().map(|mib| mib << 20) {
            disk.read_exact_at(&mut piece, at).unwrap();
            if piece != zeros {
                fs::write(format!("{KEPT}/{at}"), &piece).unwrap();
            }
        }
        fs::copy(config, KEPT_CONFIG).unwrap();
    }
}

/// A file for each MiB of the disk that is not all zeros: its name is where that begins, in bytes.
const KEPT: &str = "/run/prepared-disk";
const KEPT_CONFIG: &str = "/run/prepared-config.toml";

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
