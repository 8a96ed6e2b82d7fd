// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A runner's configuration on its way into its container, and nowhere else: through a FIFO (fifo(7))
//! that is mounted there.
//!
//! When the container begins, both ends are open here and the configuration is in between. The first process in the container
//! reads it, a line, and from then on there is nothing to be read: not in its environment, not in a file, not in what Podman keeps
//! and shows.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// A FIFO for a runner, with what it was told in it. It is gone when this is dropped.
#[derive(Debug)]
pub struct Handover {
    path: PathBuf,
    ends: File,
}

impl Handover {
    /// A FIFO for a runner, with its configuration.
    ///
    /// # Errors
    /// What the operating system says; [`io::ErrorKind::WouldBlock`] where it is too long: pipe(7) has 64 KiB.
    pub fn of(dir: &Path, runner: &str, configuration: &str) -> io::Result<Self> {
        if !dir.exists() {
            DirBuilder::new().mode(0o700).create(dir)?;
        }
        let path = dir.join(runner);
        // What a try left that failed halfway.
        let _ = fs::remove_file(&path);
        mkfifo(&path, Mode::empty())?;
        // For whomever the container's first process is to read: no other user gets through the directory.
        fs::set_permissions(&path, Permissions::from_mode(0o644))?;
        Self::holding(path, configuration)
    }

    /// Takes up what an earlier life left in `dir` of the runners that are `ours`: it told the container of `adopted`, or it
    /// died before that had read, and it waits. An empty line ends that.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn left(
        dir: &Path,
        ours: impl Fn(&str) -> bool,
        adopted: Option<&str>,
    ) -> io::Result<Option<Self>> {
        let mut found = None;
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            match entry.file_name().to_str() {
                // Where it cannot be written to, somebody in the container filled it, and so nobody waits there.
                Some(name) if adopted == Some(name) => {
                    found = Self::holding(entry.path(), "").ok();
                }
                Some(name) if ours(name) => fs::remove_file(entry.path())?,
                _ => {}
            }
        }
        Ok(found)
    }

    fn holding(path: PathBuf, line: &str) -> io::Result<Self> {
        let ends = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&path)?;
        let mut handover = Self { path, ends };
        handover.ends.write_all(format!("{line}\n").as_bytes())?;
        Ok(handover)
    }

    /// Where it is on the host.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use super::*;

    fn line(path: &Path) -> String {
        let mut line = String::new();
        BufReader::new(File::open(path).unwrap())
            .read_line(&mut line)
            .unwrap();
        line
    }

    #[test]
    fn is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("runners");
        let handover = Handover::of(&dir, "linux-0-1", "secret").unwrap();
        let path = handover.path().to_owned();
        assert_eq!(line(&path), "secret\n");
        let again = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&path);
        let left = io::read_to_string(again.unwrap()).unwrap_err();
        assert_eq!(left.kind(), io::ErrorKind::WouldBlock);
        drop(handover);
        assert!(!path.exists());
        let long = Handover::of(&dir, "linux-0-1", &"x".repeat(70_000)).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::WouldBlock);
        assert!(!path.exists());
    }

    #[test]
    fn what_an_earlier_life_left() {
        let dir = tempfile::tempdir().unwrap();
        let ours = |name: &str| name.starts_with("linux-0-");
        let missing = Handover::left(&dir.path().join("x"), ours, None);
        assert!(missing.unwrap().is_none());
        for runner in ["linux-0-1", "linux-0-2", "linux-1-1"] {
            mkfifo(&dir.path().join(runner), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        }
        // As its container does, it waits for somebody who writes.
        let path = dir.path().join("linux-0-1");
        let waiting = std::thread::spawn(move || line(&path));
        let handover = Handover::left(dir.path(), ours, Some("linux-0-1")).unwrap();
        assert_eq!(waiting.join().unwrap(), "\n");
        drop(handover);

        let full = Handover::of(dir.path(), "linux-0-1", &"x".repeat(65_535)).unwrap();
        let handover = Handover::left(dir.path(), ours, Some("linux-0-1"));
        assert!(handover.unwrap().is_none());
        drop(full);
        let left = fs::read_dir(dir.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["linux-1-1"]);
    }
}
