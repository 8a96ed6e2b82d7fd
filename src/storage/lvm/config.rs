// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A configuration directory of our own for LVM (`LVM_SYSTEM_DIR`).
//!
//! It differs from the host's in what makes commands slow and in how they
//! report, never in what they see or lock:
//!
//! - `global/use_aio=0`: taking down its AIO context costs each command tens of
//!   milliseconds, and the setting is not honoured on a command line.
//! - `backup/archive=0`: otherwise each commit leaves a file in the archive for
//!   a month, and a cache makes thousands.
//! - `activation/thin_pool_autoextend_threshold`: LVM makes no volume in a pool
//!   that is fuller, so that a job is refused before its writes fail. Enlarging
//!   pools is dmeventd's work, with the host's own configuration.
//! - JSON, with a command log and times in seconds; there is no option for the log. And whatever else reading the
//!   answers depends on (`PLAIN`).
//!
//! LVM reads `lvm.conf`, then `lvmlocal.conf`, then a file for each host tag; what
//! it reads last wins, but `log/prefix` is that of the first file. The directory holds
//! copies of them with our lines behind the host's, made anew, for a new shell, when the
//! host's change. Devices file, profiles, backups and caches are found
//! relative to the directory where nothing else is configured (lib/config/config.c
//! and lib/device/dev-cache.c in lvm2), so those are links to the host's too;
//! the locking directory does not depend on it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::super::{StoreError, private_dir};
use super::command::VgName;
use super::{io_error, process};
use crate::exec;

/// Where LVM looks without `LVM_SYSTEM_DIR`.
const SYSTEM_DIR: &str = "/etc/lvm";

/// What LVM looks for relative to its configuration directory.
const LINKS: [&str; 5] = ["devices", "profile", "backup", "cache", "archive"];

/// What LVM reads beside a file for each host tag.
const FILES: [&str; 2] = ["lvm.conf", "lvmlocal.conf"];

/// Ours, behind the host's; where a setting is there twice LVM takes
/// the later one.
const OVERRIDES: &str = r#"
global/use_aio=0
backup/archive=0
activation/thin_pool_autoextend_threshold=95
log/report_command_log=1
log/command_log_selection="log_context=shell || log_type=error || log_type=warn"
report/output_format="json"
report/time_format="%s"
"#;

/// How LVM reports, as `report` reads it: its own defaults, which a host may have changed.
const PLAIN: &str = r#"
log/command_log_cols="log_seq_num,log_type,log_context,log_object_type,log_object_name,log_object_id,log_object_group,log_object_group_id,log_message,log_errno,log_ret_code"
log/command_log_sort="log_seq_num"
log/command_names=0
log/prefix="  "
report/prefixes=0
report/compact_output=0
report/compact_output_cols=""
report/list_item_separator=","
metadata/record_lvs_history=0
global/notify_dbus=0
"#;

/// What we need to know of the host's configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HostConfig {
    /// Where LVM writes a group's description at each commit.
    pub(super) backup_dir: PathBuf,
    /// Whether it does.
    pub(super) backup: bool,
    /// Where LVM's lock files are.
    pub(super) locking_dir: PathBuf,
}

/// The host's configuration directory: what every LVM tool started like us uses.
pub(super) fn host_system_dir() -> PathBuf {
    std::env::var_os("LVM_SYSTEM_DIR").map_or_else(|| SYSTEM_DIR.into(), PathBuf::from)
}

impl HostConfig {
    /// Asks LVM.
    pub(super) fn read(host: &Path) -> Result<Self, StoreError> {
        let args = [
            "lvmconfig",
            &plain_report(),
            "--typeconfig=full",
            "backup/backup_dir",
            "backup/backup",
            "global/locking_dir",
        ];
        let output = exec::run_with_env("lvm", args, &process::environment(host))?;
        let text = String::from_utf8_lossy(&output);
        Self::parse(&text).ok_or_else(|| {
            StoreError::Failed(format!(
                "lvmconfig printed what it does not document: {text}"
            ))
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='))
        };
        Some(Self {
            backup_dir: value("backup_dir")?.trim_matches('"').into(),
            backup: value("backup")? != "0",
            locking_dir: value("locking_dir")?.trim_matches('"').into(),
        })
    }
}

/// An option for a process that reads the host's configuration, so that its report is JSON as `report` reads it, without
/// a log.
pub fn plain_report() -> String {
    plain_report_and("")
}

/// [`plain_report`] with more settings.
pub(super) fn plain_report_and(more: &str) -> String {
    format!("--config={PLAIN} log/report_command_log=0 {more}")
}

/// What lets the volumes of `vg` come up, where the host's configuration says nothing of it: on a host with tags of
/// its own (`tags/hosttags`), LVM activates no volume that has tags but none of the host's (lvm.conf(5), `volume_list`).
pub(super) fn may_activate(vg: &VgName, host: &Path) -> String {
    let asked = exec::run_with_env(
        "lvm",
        ["lvmconfig", "activation/volume_list"],
        &process::environment(host),
    );
    match asked {
        Ok(_) => String::new(),
        // It fails where nothing is set.
        Err(_) => format!("activation/volume_list=[\"{vg}\"]\n"),
    }
}

/// The directory, kept up to date with the host's.
#[derive(Debug)]
pub(super) struct SystemDir {
    host: PathBuf,
    runtime_dir: PathBuf,
    dir: PathBuf,
    /// What is said for the group.
    more: String,
    /// The host's files that it was made of.
    made_of: BTreeMap<OsString, Option<Stamp>>,
}

/// Differs once a file was written to or replaced: inode, size, and the change time's seconds and nanoseconds.
type Stamp = (u64, u64, i64, i64);

impl SystemDir {
    /// Makes it below `runtime_dir`, of the host's at `host`, for work on `vg`.
    pub(super) fn new(
        host: PathBuf,
        runtime_dir: PathBuf,
        vg: &VgName,
    ) -> Result<Self, StoreError> {
        let made_of = stamps(&host);
        let more = may_activate(vg, &host);
        Ok(Self {
            dir: prepare(&host, &runtime_dir, &more)?,
            more,
            host,
            runtime_dir,
            made_of,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes it anew if the host's has changed, and says whether it had.
    pub(super) fn refresh(&mut self) -> Result<bool, StoreError> {
        let now = stamps(&self.host);
        if now == self.made_of {
            return Ok(false);
        }
        prepare(&self.host, &self.runtime_dir, &self.more)?;
        self.made_of = now;
        Ok(true)
    }
}

fn stamps(host: &Path) -> BTreeMap<OsString, Option<Stamp>> {
    tag_files(host)
        .into_iter()
        .chain(FILES.map(Into::into))
        .map(|name| {
            let meta = fs::metadata(host.join(&name));
            let stamp =
                |meta: fs::Metadata| (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
            (name, meta.ok().map(stamp))
        })
        .collect()
}

/// Makes the directory, or brings it up to date, below `runtime_dir`, with `more` behind our lines.
///
/// A daemon that is starting and a command that lists may do so at once.
fn prepare(host: &Path, runtime_dir: &Path, more: &str) -> Result<PathBuf, StoreError> {
    let context = |what: &Path| {
        let what = what.display().to_string();
        move |error| io_error(what, error)
    };
    let dir = private_dir(runtime_dir, "lvm").map_err(context(runtime_dir))?;
    for name in LINKS {
        let link = dir.join(name);
        ensure_link(&host.join(name), &link).map_err(context(&link))?;
    }
    // What the host has no more is among ours still, and loses what it said.
    let tag_files: BTreeSet<OsString> = [host, &dir].into_iter().flat_map(tag_files).collect();
    for name in tag_files.into_iter().chain(FILES.map(Into::into)) {
        let (theirs, ours) = (host.join(&name), dir.join(&name));
        let mut text = match fs::read(&theirs) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(context(&theirs))?,
        };
        text.extend_from_slice(OVERRIDES.as_bytes());
        text.extend_from_slice(PLAIN.as_bytes());
        text.extend_from_slice(more.as_bytes());
        ensure_content(&ours, &text).map_err(context(&ours))?;
    }
    Ok(dir)
}

fn tag_files(dir: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("lvm_") && name.ends_with(".conf")
        })
        .collect()
}

fn ensure_link(target: &Path, link: &Path) -> io::Result<()> {
    if fs::read_link(link).is_ok_and(|is| is == target) {
        return Ok(());
    }
    let new = beside(link);
    symlink(target, &new)?;
    fs::rename(&new, link)
}

/// Leaves a file alone that has the content already: a running shell, another
/// process's perhaps, reads its configuration again when the file's times change.
fn ensure_content(path: &Path, content: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|is| is == content) {
        return Ok(());
    }
    let new = beside(path);
    fs::File::create(&new)?.write_all(content)?;
    fs::rename(&new, path)
}

/// A name that nobody else uses, in the same directory.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or(OsStr::new("")).to_string_lossy();
    let number = getrandom::u64().unwrap_or_else(|_| std::process::id().into());
    path.with_file_name(format!(".{name}.{number:x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_configuration() {
        let text = "backup_dir=\"/etc/lvm/backup\"\nbackup=1\nlocking_dir=\"/run/lock/lvm\"\n";
        let want = HostConfig {
            backup_dir: "/etc/lvm/backup".into(),
            backup: true,
            locking_dir: "/run/lock/lvm".into(),
        };
        assert_eq!(HostConfig::parse(text), Some(want));
        assert_eq!(HostConfig::parse("backup=1\n"), None);
    }

    #[test]
    fn our_lines_behind_the_hosts() {
        let temporary = tempfile::tempdir().unwrap();
        let (host, runtime) = (temporary.path().join("etc"), temporary.path().join("run"));
        fs::create_dir(&host).unwrap();
        fs::write(host.join("lvmlocal.conf"), "local { }\n").unwrap();
        fs::write(host.join("lvm_tag.conf"), "tag { }\n").unwrap();
        let dir = prepare(&host, &runtime, "").unwrap();
        let local = || fs::read_to_string(dir.join("lvmlocal.conf")).unwrap();
        assert_eq!(local(), format!("local {{ }}\n{OVERRIDES}{PLAIN}"));
        assert_eq!(
            fs::read_to_string(dir.join("lvm_tag.conf")).unwrap(),
            format!("tag {{ }}\n{OVERRIDES}{PLAIN}")
        );
        for name in ["backup", "devices"] {
            assert_eq!(fs::read_link(dir.join(name)).unwrap(), host.join(name));
        }

        let mut kept = SystemDir {
            host: host.clone(),
            runtime_dir: runtime.clone(),
            dir: dir.clone(),
            more: String::new(),
            made_of: stamps(&host),
        };
        assert!(!kept.refresh().unwrap());
        let written = || fs::metadata(dir.join("lvmlocal.conf")).unwrap().modified();
        let before = written().unwrap();
        assert_eq!(prepare(&host, &runtime, "").unwrap(), dir);
        assert_eq!(written().unwrap(), before);
        fs::write(host.join("lvmlocal.conf"), "").unwrap();
        prepare(&host, &runtime, "").unwrap();
        assert_eq!(local(), format!("{OVERRIDES}{PLAIN}"));
        fs::remove_file(host.join("lvm_tag.conf")).unwrap();
        fs::write(host.join("lvm.conf"), "first { }\n").unwrap();
        assert!(kept.refresh().unwrap() && !kept.refresh().unwrap());
        assert_eq!(
            fs::read_to_string(dir.join("lvm.conf")).unwrap(),
            format!("first {{ }}\n{OVERRIDES}{PLAIN}")
        );
        assert_eq!(
            fs::read_to_string(dir.join("lvm_tag.conf")).unwrap(),
            local()
        );
    }
}
