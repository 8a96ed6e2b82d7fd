// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file system with reflinks on this machine's own kernel.

use std::path::{Path, PathBuf};

use super::command::{outcome, run};

/// A blank XFS, or another file system, on a loop device, mounted below a directory of its own.
pub struct ReflinkFs {
    dir: tempfile::TempDir,
}

impl ReflinkFs {
    /// An XFS of so many MiB (300 at least, says mkfs.xfs); the image is sparse.
    pub fn new(mib: u64) -> Self {
        Self::of("xfs", mib)
    }

    /// One that `mkfs.TYPE` makes as it pleases.
    pub fn of(fs_type: &str, mib: u64) -> Self {
        let dir = super::temp_dir();
        let image = dir.path().join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        let fs = Self { dir };
        std::fs::create_dir(fs.path()).unwrap();
        run(format!("mkfs.{fs_type}"), [Path::new("-q"), &image]);
        // mount(8) has the kernel free the loop device with its last use.
        run(
            "mount",
            [Path::new("-o"), "loop,discard".as_ref(), &image, &fs.path()],
        );
        fs
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("fs")
    }
}

impl Drop for ReflinkFs {
    fn drop(&mut self) {
        // Loop devices on files in it would hold it.
        let path = self.path();
        for line in outcome(
            "losetup",
            ["--list", "--noheadings", "--output", "NAME,BACK-FILE"],
        )
        .stdout
        .lines()
        {
            if let Some((device, file)) = line.trim().split_once(char::is_whitespace)
                && Path::new(file.trim()).starts_with(&path)
            {
                outcome("losetup", ["--detach", device]);
            }
        }
        outcome("umount", ["--lazy".as_ref(), path.as_os_str()]);
    }
}
