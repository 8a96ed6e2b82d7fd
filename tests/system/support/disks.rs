// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block devices for tests: image files on loop devices, gone when dropped.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use lvm_cache_friend::cache::units::Bytes;
use tempfile::TempDir;

use super::command::run;

/// A loop device over an image file in a directory of its own.
pub struct LoopDevice {
    dir: TempDir,
    pub device: PathBuf,
}

impl LoopDevice {
    /// A new device, all zeros.
    pub fn new(size: Bytes) -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(size.0).unwrap();
        let device = run("losetup", ["--find", "--show", image.to_str().unwrap()]);
        let device = device.trim().into();
        Self { dir, device }
    }

    /// What is behind it.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// A device with what this one's image holds at this moment.
    pub fn copy(&self) -> Self {
        let copy = Self::new(Bytes::mib(1));
        run(
            "cp",
            [
                "--sparse=always",
                self.image().to_str().unwrap(),
                copy.image().to_str().unwrap(),
            ],
        );
        copy.refresh();
        copy
    }

    pub fn grow(&self, size: Bytes) {
        let image = File::options().write(true).open(self.image()).unwrap();
        image.set_len(size.0).unwrap();
        self.refresh();
    }

    fn refresh(&self) {
        run("losetup", ["-c", self.device.to_str().unwrap()]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.device)
            .status();
    }
}

/// Gives a device-mapper device another table.
pub fn load(device: &str, table: &str) {
    run("dmsetup", ["suspend", "--nolockfs", device]);
    run("dmsetup", ["load", device, "--table", table]);
    run("dmsetup", ["resume", device]);
}

/// What `statvfs` says of the place.
pub fn statvfs(at: &Path) -> io::Result<nix::sys::statvfs::Statvfs> {
    Ok(nix::sys::statvfs::statvfs(at)?)
}
