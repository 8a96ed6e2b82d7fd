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

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;

/// A runner's configuration with what keeps it from downloading anything, and from writing to its own directory.
///
/// It does not update itself, which REST cannot say. And it does not take itself for ephemeral, so that it leaves its three files alone at the end: a read-only
/// root would make that fail, and the runner end with a code that hides its job's result. GitHub knows that it is ephemeral all the same, and
/// [`super::pool`] has it take one job by its environment. What is not understood is left as it is.
#[must_use]
pub fn settled(configuration: SecretString) -> SecretString {
    let changed = changed(configuration.expose_secret());
    changed.map_or(configuration, Into::into)
}

/// Each member of a JSON object in base64 is a file in base64 (actions/runner, Runner.cs); names in `.runner` are the same in any case.
fn changed(configuration: &str) -> Option<String> {
    let object = |text: &str| -> Option<serde_json::Map<String, Value>> {
        let text = STANDARD.decode(text.trim()).ok()?;
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
        serde_json::from_slice(text).ok()
    };
    let mut files = object(configuration)?;
    let mut settings = object(files.get(".runner")?.as_str()?)?;
    let set = [("DisableUpdate", true), ("Ephemeral", false)];
    settings.retain(|name, _| !set.iter().any(|(own, _)| name.eq_ignore_ascii_case(own)));
    settings.extend(set.map(|(name, value)| (name.to_owned(), value.into())));
    let settings = Value::Object(settings).to_string();
    files.insert(".runner".into(), STANDARD.encode(settings).into());
    Some(STANDARD.encode(Value::Object(files).to_string()))
}

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
    fn nothing_is_left_to_write_or_download() {
        let file = |text: &str| Value::from(STANDARD.encode(text));
        let given = serde_json::json!({
            ".runner": file("\u{feff}{\"AgentId\":\"7\",\"ephemeral\":\"True\",\"DisableUpdate\":\"False\"}"),
            ".credentials": file("\u{feff}{}"),
        });
        let given = STANDARD.encode(format!("\u{feff}{given}"));
        let text = settled(given.into());
        let text = STANDARD.decode(text.expose_secret()).unwrap();
        let files: Value = serde_json::from_slice(&text).unwrap();
        let read = |name: &str| STANDARD.decode(files[name].as_str().unwrap()).unwrap();
        let settings: Value = serde_json::from_slice(&read(".runner")).unwrap();
        let want = serde_json::json!({"AgentId": "7", "DisableUpdate": true, "Ephemeral": false});
        assert_eq!(settings, want);
        assert_eq!(read(".credentials"), "\u{feff}{}".as_bytes());
        for odd in ["", "e30=", "%", "bnVsbA=="] {
            assert_eq!(settled(odd.to_owned().into()).expose_secret(), odd);
        }
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
