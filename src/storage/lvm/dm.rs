// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pool's device-mapper devices: what LVM has no command for.
//!
//! What each thin volume takes, active or not, is in the pool's own metadata.
//! device-mapper keeps a copy-on-write copy of a pool's metadata on request, for
//! programs to read while the pool works on (Documentation/admin-guide/
//! device-mapper/thin-provisioning.rst in Linux); thin_ls and thin_dump of
//! thin-provisioning-tools read it. There is one such copy a pool, and as long
//! as it is held the pool's metadata grows with each change. A copy that another
//! program holds is never released: it may be reading it.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::super::freeze::Below;
use super::super::{StoreError, Trouble, Usage, devmapper};
use super::process::{Channel, Process, Progress};
use super::{io_error, process, tool};
use crate::cache::names::LvName;
use crate::cache::units::Bytes;

/// How long thin_ls may read. It visits each mapping of each volume: some
/// seconds for a pool of some hundred gigabytes in use.
const READING: Duration = Duration::from_secs(120);

/// How long thin_dump may read what volumes there are, without their mappings.
const READING_IDS: Duration = Duration::from_secs(10);

/// What the lock's file holds as long as a copy of the metadata is ours.
const OURS: &[u8] = b"reserved\n";

/// How long device-mapper may take for a message.
const MESSAGE: Duration = Duration::from_secs(15);

/// The device-mapper devices of a thin pool.
#[derive(Debug)]
pub(super) struct PoolDevices {
    /// The group's part of each name.
    vg: String,
    /// The pool's name, before LVM's suffixes.
    name: String,
    /// Holds the pool's metadata.
    metadata: PathBuf,
}

impl PoolDevices {
    pub(super) fn new(vg: &LvName, pool: &LvName) -> Self {
        let vg = doubled(vg.as_str());
        let name = format!("{vg}-{}", doubled(pool.as_str()));
        Self {
            metadata: PathBuf::from(format!("/dev/mapper/{name}_tmeta")),
            vg,
            name,
        }
    }

    /// The pool's devices, the lower first. LVM gives it one below its own as soon
    /// as a volume of it is active; the lowest takes messages.
    pub(super) fn names(&self) -> [String; 2] {
        [format!("{}-tpool", self.name), self.name.clone()]
    }

    /// The pool's own device; what is below it has suffixes.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The device of a volume.
    pub(super) fn of(&self, lv: &str) -> String {
        format!("{}-{}", self.vg, doubled(lv))
    }

    /// The device that takes messages; `None`: the pool is not active.
    fn lowest(&self) -> Option<String> {
        let there = |name: &String| Path::new("/dev/mapper").join(name).exists();
        self.names().into_iter().find(there)
    }

    /// The pool's transaction id as the kernel has it; `None`: it is not active.
    pub(super) fn transaction_id(&self) -> Result<Option<u64>, StoreError> {
        let field = |status: &str| status.split_ascii_whitespace().next()?.parse().ok();
        Ok(self.status()?.as_deref().and_then(field))
    }

    /// Lets a suspended device go on.
    pub(super) fn resume(&self, name: &str) -> Result<(), StoreError> {
        run("dmsetup", &["resume", name], MESSAGE).map(drop)
    }

    /// Deletes a volume from the pool, but not from LVM's view of it.
    pub(super) fn delete(&self, thin_id: &str) -> Result<(), StoreError> {
        self.message(&format!("delete {thin_id}"))
    }

    /// What makes the volume of the thin device id `thin_id`, new and empty so far, a snapshot of the active volume
    /// `origin`, whose id is `of`.
    pub(super) fn snapshot(
        &self,
        thin_id: u64,
        origin: &LvName,
        of: u64,
    ) -> Result<Below, StoreError> {
        let messages = [
            format!("delete {thin_id}"),
            format!("create_snap {thin_id} {of}"),
        ];
        Below::new(&self.of(origin.as_str()), &self.active()?, &messages)
            .map_err(|error| io_error("asking device-mapper".to_owned(), error))
    }

    /// The thin device id of an active volume, and its virtual size.
    pub(super) fn thin(&self, lv: &LvName) -> Result<(u64, Bytes), StoreError> {
        let name = self.of(lv.as_str());
        let (sectors, parameters) = devmapper::table(&name)
            .map_err(|error| io_error(format!("the table of {name}"), error))?;
        // `POOL ID`, and what else it reads from.
        let id = parameters.split_ascii_whitespace().nth(1);
        let id = id
            .and_then(|id| id.parse().ok())
            .ok_or_else(|| StoreError::Failed(format!("the table of {name} is {parameters:?}")))?;
        Ok((id, Bytes(sectors * 512)))
    }

    /// What each volume takes, by its thin device id.
    pub(super) fn usage(&self, system_dir: &Path) -> Result<HashMap<u64, Usage>, StoreError> {
        let mut lock = lock(system_dir, FlockArg::LockExclusive)?;
        self.with_copy(&mut lock, || self.thin_ls())
    }

    /// The thin device ids of all that is in the pool, whether LVM knows it or not. Not while another process of this
    /// program reads the metadata.
    pub(super) fn ids(&self, system_dir: &Path) -> Result<BTreeSet<u64>, StoreError> {
        let mut lock = lock(system_dir, FlockArg::LockExclusiveNonblock)?;
        self.with_copy(&mut lock, || self.thin_dump())
    }

    fn with_copy<T>(
        &self,
        lock: &mut File,
        read: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.release(lock)?;
        if self.is_copied()? {
            return Err(StoreError::Failed(format!(
                "another program holds a snapshot of the metadata of {}, of which there is one at a time",
                self.name
            )));
        }
        // Before it is: killed between the two, the next one knows it for ours.
        mark(lock, OURS)?;
        self.message("reserve_metadata_snap")?;
        let found = read();
        self.release(lock)?;
        found
    }

    /// Releases a copy of the metadata that a killed process of this program left reserved.
    pub(super) fn release_leftover(&self, system_dir: &Path) -> Result<(), StoreError> {
        match lock(system_dir, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => self.release(&mut lock),
            // Not left over: another process is reading it.
            Err(_) => Ok(()),
        }
    }

    /// Releases a copy of the metadata that a pool had before it was activated: a power cut left it there, and no program can be
    /// reading it.
    pub(super) fn release_of_inactive(&self, system_dir: &Path) -> Result<(), StoreError> {
        let mut lock = lock(system_dir, FlockArg::LockExclusive)?;
        mark(&mut lock, OURS)?;
        self.release(&mut lock)
    }

    /// The command that releases a copy of the metadata which is none of ours; `None`: there is none.
    pub(super) fn foreign_copy(&self, system_dir: &Path) -> Result<Option<String>, StoreError> {
        let Ok(mut lock) = lock(system_dir, FlockArg::LockExclusiveNonblock) else {
            return Ok(None);
        };
        if is_marked(&mut lock)? || !self.is_copied()? {
            return Ok(None);
        }
        Ok(self
            .lowest()
            .map(|name| format!("dmsetup message {name} 0 release_metadata_snap")))
    }

    /// Releases the copy of the metadata, if it is ours.
    fn release(&self, lock: &mut File) -> Result<(), StoreError> {
        if !is_marked(lock)? {
            return Ok(());
        }
        if self.is_copied()? {
            self.message("release_metadata_snap")?;
        }
        mark(lock, b"")
    }

    fn is_copied(&self) -> Result<bool, StoreError> {
        Ok(self.status()?.as_deref().is_some_and(holds_metadata))
    }

    /// How the pool is; `None`: it is not active.
    pub(super) fn health(&self) -> Result<Option<Health>, StoreError> {
        Ok(self.status()?.as_deref().map(Health::of))
    }

    /// What an active volume has mapped: `SECTORS HIGHEST`.
    pub(super) fn mapped(&self, lv: &str) -> Result<Bytes, StoreError> {
        let name = self.of(lv);
        let said = devmapper::status(&name)
            .map_err(|error| io_error(format!("the status of {name}"), error))?;
        let sectors = said.split_ascii_whitespace().next();
        let sectors = sectors.and_then(|sectors| sectors.parse::<u64>().ok());
        sectors
            .map(|sectors| Bytes(sectors * 512))
            .ok_or_else(|| StoreError::Failed(format!("the status of {name} is {said:?}")))
    }

    /// `TRANSACTION METADATA DATA HELD-ROOT …`.
    fn status(&self) -> Result<Option<String>, StoreError> {
        self.lowest()
            .map(|name| {
                devmapper::status(&name)
                    .map_err(|error| io_error(format!("the status of {name}"), error))
            })
            .transpose()
    }

    /// [`PoolDevices::lowest`] of a pool that has to be active.
    fn active(&self) -> Result<String, StoreError> {
        let name = &self.name;
        self.lowest()
            .ok_or_else(|| StoreError::Failed(format!("{name}: the pool is not active")))
    }

    fn message(&self, message: &str) -> Result<(), StoreError> {
        let pool = self.active()?;
        run("dmsetup", &["message", &pool, "0", message], MESSAGE).map(drop)
    }

    fn thin_ls(&self) -> Result<HashMap<u64, Usage>, StoreError> {
        let metadata = self.metadata.to_string_lossy();
        let args = [
            "--metadata-snap",
            "--no-headers",
            "--format",
            "DEV,MAPPED_BYTES,EXCLUSIVE_BYTES",
            &metadata,
        ];
        let text = run("thin_ls", &args, READING)?;
        parse(&text).ok_or_else(|| {
            StoreError::Failed(format!("thin_ls printed what it does not document: {text}"))
        })
    }

    fn thin_dump(&self) -> Result<BTreeSet<u64>, StoreError> {
        let metadata = self.metadata.to_string_lossy();
        let args = ["--metadata-snap", "--skip-mappings", &metadata];
        let text = run("thin_dump", &args, READING_IDS)?;
        ids(&text).ok_or_else(|| {
            StoreError::Failed(format!(
                "thin_dump printed what it does not document: {text}"
            ))
        })
    }
}

/// How a pool says that it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Health {
    /// Which shares in percent are in use of data and of metadata, where it says so.
    pub(super) used: Option<(f64, f64)>,
    /// Why it takes no writes.
    pub(super) illness: Option<Illness>,
}

/// Why a pool takes no writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Illness {
    /// Its metadata could not be written, or not be read.
    Failed,
    /// It needs a check before it takes changes again.
    NeedsCheck,
    /// Its metadata takes no changes.
    ReadOnly,
    /// There was no room for data that was written. It goes on once it is enlarged.
    OutOfData,
}

impl Health {
    /// Reads the parameters of a status line, as `pool_status` in Linux' drivers/md/dm-thin.c writes them.
    fn of(status: &str) -> Self {
        let mut words = status.split_ascii_whitespace();
        let illness = match (words.clone().next(), words.clone().nth(4)) {
            (Some("Fail" | "Error"), _) => Some(Illness::Failed),
            _ if words.any(|word| word == "needs_check") => Some(Illness::NeedsCheck),
            (_, Some("ro")) => Some(Illness::ReadOnly),
            (_, Some("out_of_data_space")) => Some(Illness::OutOfData),
            _ => None,
        };
        Self {
            used: percent_used(status),
            illness,
        }
    }
}

impl Illness {
    /// What it is, and what helps the pool `pool` of `vg`.
    pub(super) fn told(self, vg: &LvName, pool: &LvName) -> Trouble {
        let what = match self {
            Self::Failed => "has failed: its metadata could not be read or written",
            Self::NeedsCheck => "needs a check: its metadata was full, or could not be written",
            Self::ReadOnly => "is read-only",
            Self::OutOfData => "was full: what was written to it failed",
        };
        let fix = match self {
            Self::OutOfData => format!("lvextend --size +SIZE {vg}/{pool}"),
            Self::Failed | Self::NeedsCheck | Self::ReadOnly => format!(
                "see the kernel's log for the cause; then stop the daemon, vgchange --activate n {vg}, lvconvert --repair {vg}/{pool}"
            ),
        };
        Trouble {
            finding: format!("thin pool {vg}/{pool} {what}"),
            fix,
        }
    }
}

/// Only one process at a time reads the metadata; the lock goes with it. Its file says whether a copy of it is ours.
fn lock(system_dir: &Path, how: FlockArg) -> Result<Flock<File>, StoreError> {
    let path = system_dir.join("usage.lock");
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| io_error(path.display().to_string(), error))?;
    Flock::lock(file, how)
        .map_err(|(_, errno): (_, Errno)| io_error(path.display().to_string(), errno.into()))
}

fn is_marked(lock: &mut File) -> Result<bool, StoreError> {
    let mut text = Vec::new();
    lock.rewind()
        .and_then(|()| lock.read_to_end(&mut text))
        .map_err(|error| io_error("usage.lock".into(), error))?;
    Ok(text == OURS)
}

fn mark(lock: &mut File, text: &[u8]) -> Result<(), StoreError> {
    lock.set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| lock.write_all(text))
        .map_err(|error| io_error("usage.lock".into(), error))
}

fn run(name: &str, args: &[&str], bound: Duration) -> Result<String, StoreError> {
    let program = tool(name, "thin-provisioning-tools and dmsetup")?;
    let start = Instant::now();
    let shown = || format!("{} {}", program.display(), args.join(" "));
    let failed = |error| io_error(shown(), error);
    let mut process = Process::spawn(
        &program,
        args,
        &process::environment(Path::new("")),
        Channel::Stdout,
        false,
    )
    .map_err(failed)?;
    match process.read(start + bound, |_| false).map_err(failed)? {
        Progress::Dead | Progress::Complete => {}
        Progress::Late => {
            process.kill();
            return Err(StoreError::Timeout {
                store: shown(),
                seconds: bound.as_secs(),
            });
        }
    }
    let output = std::mem::take(&mut process.output);
    let complaints = std::mem::take(&mut process.complaints);
    let status = process.reap().map_err(failed)?;
    if status.success() {
        Ok(String::from_utf8_lossy(&output).into_owned())
    } else {
        let complaints = String::from_utf8_lossy(&complaints);
        Err(StoreError::Failed(format!(
            "{}: {status}: {}",
            shown(),
            complaints.trim()
        )))
    }
}

/// lvm2's dm_build_dm_name: parts are joined by -, and - in them is doubled.
fn doubled(name: &str) -> String {
    name.replace('-', "--")
}

/// `USED/TOTAL` blocks of metadata, then of data.
fn percent_used(status: &str) -> Option<(f64, f64)> {
    let mut fields = status.split_ascii_whitespace().skip(1);
    let mut percent = || {
        let (used, total) = fields.next()?.split_once('/')?;
        let total: f64 = total.parse().ok()?;
        let percent = used.parse::<f64>().ok()? * 100.0 / total.max(1.0);
        // As LVM shows it.
        Some((percent * 100.0).round() / 100.0)
    };
    let metadata = percent()?;
    Some((percent()?, metadata))
}

/// Whether a pool's status line names a held metadata root (`-`: none).
fn holds_metadata(status: &str) -> bool {
    status
        .split_ascii_whitespace()
        .nth(3)
        .is_some_and(|root| root.parse::<u64>().is_ok())
}

/// The ids of all devices in a dump; `None`: it is not a whole one.
fn ids(dump: &str) -> Option<BTreeSet<u64>> {
    if !dump.trim_end().ends_with("</superblock>") {
        return None;
    }
    let devices = dump.split("<device ").skip(1);
    devices
        .map(|device| {
            let (_, id) = device.split_once("dev_id=\"")?;
            id.split_once('"')?.0.parse().ok()
        })
        .collect()
}

fn parse(text: &str) -> Option<HashMap<u64, Usage>> {
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let mut fields = line
                .split_ascii_whitespace()
                .map(|field| field.parse().ok());
            let mut field = || fields.next().flatten();
            let usage = |mapped, exclusive| Usage {
                mapped: Bytes(mapped),
                exclusive: Bytes(exclusive),
            };
            Some((field()?, usage(field()?, field()?)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_thin_ls_prints() {
        let text = "1       0       0 \n4 7405568 65536 \n";
        let usage = |mapped, exclusive| Usage {
            mapped: Bytes(mapped),
            exclusive: Bytes(exclusive),
        };
        let want = HashMap::from([(1, usage(0, 0)), (4, usage(7_405_568, 65_536))]);
        assert_eq!(parse(text), Some(want));
        assert_eq!(parse(""), Some(HashMap::new()));
        assert_eq!(parse("no current metadata snap\n"), None);
    }

    #[test]
    fn a_held_copy_shows_in_the_status() {
        for (status, held) in [
            (
                "6 220/2048 113/16384 - rw discard_passdown error_if_no_space - 512 \n",
                false,
            ),
            (
                "6 218/2048 113/16384 77 rw discard_passdown error_if_no_space - 512 \n",
                true,
            ),
            ("Fail", false),
        ] {
            assert_eq!(holds_metadata(status), held, "{status}");
        }
    }

    #[test]
    fn how_a_pool_says_that_it_is() {
        for (status, want) in [
            (
                "6 1/8 2/8 - rw discard_passdown error_if_no_space - 512",
                None,
            ),
            ("Fail", Some(Illness::Failed)),
            ("Error", Some(Illness::Failed)),
            (
                "6 1/8 2/8 - ro discard_passdown error_if_no_space - 512",
                Some(Illness::ReadOnly),
            ),
            (
                "6 8/8 2/8 77 ro discard_passdown error_if_no_space needs_check 512",
                Some(Illness::NeedsCheck),
            ),
            (
                "6 1/8 8/8 - out_of_data_space discard_passdown queue_if_no_space - 512",
                Some(Illness::OutOfData),
            ),
        ] {
            assert_eq!(Health::of(status).illness, want, "{status}");
        }
    }

    #[test]
    fn what_thin_dump_prints() {
        let dump = "<superblock uuid=\"\" time=\"1\" transaction=\"2\" data_block_size=\"128\" nr_data_blocks=\"0\">\n  \
            <device dev_id=\"1\" mapped_blocks=\"0\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n  </device>\n  \
            <device dev_id=\"77\" mapped_blocks=\"3\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n  </device>\n\
            </superblock>\n";
        assert_eq!(ids(dump), Some(BTreeSet::from([1, 77])));
        assert_eq!(ids(&dump[..dump.len() - 20]), None);
        assert_eq!(ids(""), None);
        assert_eq!(ids(&dump.replace("\"77\"", "\"x\"")), None);
    }

    #[test]
    fn how_full_a_pool_says_that_it_is() {
        for (status, want) in [
            ("6 512/2048 4096/16384 - rw", Some((25.0, 25.0))),
            ("0 0/2048 0/0 - out_of_data_space", Some((0.0, 0.0))),
            ("Fail", None),
            ("", None),
        ] {
            assert_eq!(percent_used(status), want, "{status}");
        }
    }

    #[test]
    fn device_names() {
        let name = |text: &str| text.parse::<LvName>().unwrap();
        let devices = PoolDevices::new(&name("a-b"), &name("friend-pool"));
        assert_eq!(devices.name, "a--b-friend--pool");
        let metadata = Path::new("/dev/mapper/a--b-friend--pool_tmeta");
        assert_eq!(devices.metadata, metadata);
        assert_eq!(devices.of("friend-x"), "a--b-friend--x");
    }
}
