// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What LVM leaves behind when it is killed in the middle of a command, or the
//! power goes, and does not clean up by itself.
//!
//! A thin snapshot is: a commit with the new volume and a message for the pool; the
//! origin suspended; two messages to device-mapper, `create_snap` and
//! `set_transaction_id`; the origin resumed; a commit without the message. In
//! LVM 2.03.16, killed at each step of it:
//!
//! - With the origin suspended, all I/O on it waits for ever; and the next
//!   `lvcreate` takes the message for sent, so that LVM's transaction id and
//!   the pool's differ from then on and LVM refuses to make anything. Resuming it
//!   before any other command avoids both.
//! - Between the messages, LVM sends `create_snap` again, which fails because the
//!   volume is there, and refuses all further work ("manual intervention may
//!   be required"). Deleting the volume from the pool, where nobody can have
//!   used it yet, lets LVM go on.
//! - Whenever LVM sends `create_snap` late, it does so without suspending the
//!   origin, which may be in use by then: what comes of that is no copy of
//!   anything. So a volume of ours whose message is still due is removed:
//!   nobody was told that it was made.
//!
//! # Thin devices that LVM does not know
//! LVM gives a new volume the highest id that it knows plus one (`get_free_thin_pool_device_id` in lvm2's
//! lib/metadata/thin_manip.c), and no option chooses another. Where the pool has a device of that id, the message fails with
//! "File exists". LVM takes its volume back by a message that deletes the id (`detach_pool_lv`), sent before the next one is
//! made: so every second command fails, and what was in the way is gone. Not for a snapshot of an active volume, which
//! fails each time (seen with 2.03.16). Such devices come of power cuts, of `vgcfgrestore`, of tools that speak to the pool past
//! LVM. LVM commits a volume before it tells the pool, and holds the group's lock over both: with that lock held and
//! no message due, what LVM does not list is no part of any command's work.
//!
//! After a power cut between the commit of a removal and the message, it is due until LVM changes the pool again: activating
//! or refreshing it does not send it (2.03.16). An empty volume, made and removed, does.
//!
//! One that was activating a volume leaves it without device files where there is no
//! udev. They are made when the volume is activated again (`LvmStore::activate`).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::command::Command;
use super::dm::PoolDevices;
use super::report::{LV_COLUMNS, LvRow, POOL};
use super::shell::{Answer, Failure, Shell};
use crate::cache::names::LvName;
use crate::storage::StoreError;

/// The beginning of all tags of ours.
const OURS: &str = "friend:";

/// What is asked to find thin devices that LVM does not know. With internal volumes: the one below a cache is thin, too.
const ID_COLUMNS: &str = "lv_name,pool_lv,thin_id,transaction_id,lv_tags";

/// How often a lock that another command holds is tried. Only here: LVM's own
/// waiting is flock(2)'s.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// The pool that a [`super::runner::Runner`] works on, and where LVM locks its group.
#[derive(Debug)]
pub(super) struct Pool {
    vg: LvName,
    pool: LvName,
    devices: PoolDevices,
    lock_file: PathBuf,
}

impl Pool {
    pub(super) fn new(vg: LvName, pool: LvName, locking_dir: &Path) -> Self {
        Self {
            devices: PoolDevices::new(&vg, &pool),
            // _file_lock_resource in lvm2's lib/locking/file_locking.c.
            lock_file: locking_dir.join(format!("V_{vg}")),
            vg,
            pool,
        }
    }

    /// Looks for what a killed command left, and puts it right. `false`: LVM cannot list the group now, or the pool is not active, so
    /// not all is known; or it does not remove what is half made.
    pub(super) fn repair(&self, shell: &mut Shell, deadline: Instant) -> Result<bool, Failure> {
        let Some(listed) = self.list(shell, false, deadline)? else {
            return Ok(false);
        };
        // As long as it is not active, which it need not be after a power cut, the pool does not tell how far the command came.
        let pool_tells = self.devices.transaction_id().map_err(broken)?.is_some();
        if self.left(&listed)?.is_none() {
            return Ok(pool_tells);
        }
        // It may be the work of a command that is still running: with its lock in
        // our hands there is none.
        let lock = self.lock(deadline)?;
        let Some(listed) = self.list(shell, true, deadline)? else {
            return Ok(false);
        };
        let Some(left) = self.left(&listed)? else {
            return Ok(true);
        };
        for device in &left.suspended {
            tracing::warn!(
                device,
                "left suspended by a command that was killed: resumed"
            );
            self.devices.resume(device).map_err(broken)?;
        }
        let Some(unfinished) = left.unfinished else {
            return Ok(true);
        };
        let lv = &unfinished.lv_name;
        let ours = unfinished
            .lv_tags
            .split(',')
            .any(|tag| tag.starts_with(OURS));
        if !ours {
            tracing::warn!(
                lv,
                "half made by a command of others that was killed: the pool takes no change until `lvremove {}/{lv}`",
                self.vg
            );
            return Ok(true);
        }
        tracing::warn!(lv, "half made by a command that was killed");
        if let Err(failure) = self.devices.delete(&unfinished.thin_id) {
            // Mostly it is not there: the command did not come so far.
            tracing::debug!(?failure, lv, "not deleted from the pool");
        }
        drop(lock);
        let Ok(name) = lv.parse() else {
            return Ok(true);
        };
        let remove = Command::new("lvremove").lv(&self.vg, &name);
        match shell.run_for_repair(&remove, true, deadline) {
            Ok(answer) => {
                let (success, reason) = (answer.success, answer.reason());
                tracing::warn!(lv, success, reason, "removed");
                Ok(success)
            }
            Err(failure) => {
                tracing::warn!(?failure, lv, "not removed yet");
                Ok(false)
            }
        }
    }

    /// `locked`: the group's lock is ours, so LVM must not wait for it.
    fn list(
        &self,
        shell: &mut Shell,
        locked: bool,
        deadline: Instant,
    ) -> Result<Option<Answer>, Failure> {
        let query = Command::query("lvs", LV_COLUMNS).only_pool_and_volumes(&self.pool);
        let query = if locked {
            query.word("--nolocking")
        } else {
            query
        };
        let answer = shell.run_for_repair(&query.vg(&self.vg), locked, deadline)?;
        Ok(answer.success.then_some(answer))
    }

    /// Finds the thin devices that the pool has and LVM does not know, and deletes them where `delete` says so and the
    /// pool is one of our own; gives those that stay.
    pub(super) fn strays(
        &self,
        shell: &mut Shell,
        delete: bool,
        deadline: Instant,
    ) -> Result<Strays, Failure> {
        let in_pool = self.devices.ids(shell.system_dir()).map_err(broken)?;
        let query = Command::query("lvs", ID_COLUMNS).word("--all");
        let list = |shell: &mut Shell, locked: bool| {
            let query = query.clone();
            let query = if locked {
                query.word("--nolocking")
            } else {
                query
            };
            let answer = shell.run_for_repair(&query.vg(&self.vg), locked, deadline)?;
            if answer.success {
                Ok(answer)
            } else {
                Err(Failure::Broken(answer.reason()))
            }
        };
        let before = list(shell, false)?;
        if unknown(&in_pool, before.document.lvs(), &self.pool).is_empty() {
            return Ok(Strays::default());
        }
        // A command of others may have been at work.
        let lock = self.lock(deadline)?;
        let listed = list(shell, true)?;
        let mut rows = listed.document.lvs();
        let pool = rows.find(|row| row.lv_name == self.pool.as_str());
        let kernel = self.devices.transaction_id().map_err(broken)?;
        let Some(pool) = pool.filter(|pool| pool.transaction_id.parse().ok() == kernel) else {
            tracing::debug!("LVM has messages for the pool that are due: no thin device is judged");
            return Ok(Strays {
                removal_is_due: pool.zip(kernel).is_some_and(|(pool, kernel)| {
                    is_due(pool, kernel)
                        && unfinished(pool, listed.document.lvs(), kernel).is_none()
                }),
                ..Strays::default()
            });
        };
        let ours = pool.lv_tags.split(',').any(|tag| tag == POOL);
        let mut ids = unknown(&in_pool, listed.document.lvs(), &self.pool);
        if ours && delete {
            ids.retain(|id| match self.devices.delete(&id.to_string()) {
                Ok(()) => {
                    tracing::warn!(
                        id,
                        "thin device that LVM does not know: deleted from the pool"
                    );
                    false
                }
                Err(error) => {
                    // In use, say.
                    tracing::warn!(id, %error, "thin device that LVM does not know: not deleted");
                    true
                }
            });
        }
        drop(lock);
        Ok(Strays {
            ids,
            ours,
            removal_is_due: false,
        })
    }

    /// What a killed command left of what LVM listed.
    fn left(&self, answer: &Answer) -> Result<Option<Left>, Failure> {
        let rows: Vec<&LvRow> = answer.document.lvs().collect();
        let volumes = rows.iter().filter(|row| row.pool_lv == self.pool.as_str());
        let active = volumes.clone().filter(|row| row.device().is_some());
        // The pool first: what is above it cannot be resumed while it is suspended.
        let suspended: Vec<String> = self
            .devices
            .names()
            .into_iter()
            .chain(active.map(|row| self.devices.of(&row.lv_name)))
            .filter(|name| is_suspended(name))
            .collect();
        let pool = rows.iter().find(|row| row.lv_name == self.pool.as_str());
        let unfinished = match pool {
            Some(pool) => {
                let kernel = self.devices.transaction_id().map_err(broken)?;
                kernel.and_then(|kernel| unfinished(pool, volumes.copied(), kernel))
            }
            None => None,
        };
        if suspended.is_empty() && unfinished.is_none() {
            return Ok(None);
        }
        Ok(Some(Left {
            suspended,
            unfinished: unfinished.cloned(),
        }))
    }

    /// Takes LVM's lock on the group, as LVM does (lib/misc/lvm-flock.c): the file
    /// may be removed by who held it, and then the lock is on nothing.
    fn lock(&self, deadline: Instant) -> Result<Flock<File>, Failure> {
        let failed =
            |error: io::Error| Failure::Broken(format!("{}: {error}", self.lock_file.display()));
        loop {
            let file = File::options()
                .create(true)
                .append(true)
                .open(&self.lock_file)
                .map_err(failed)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => {
                    let held = lock.metadata().map_err(failed)?;
                    if fs::metadata(&self.lock_file).is_ok_and(|there| there.ino() == held.ino()) {
                        return Ok(lock);
                    }
                }
                Err(_) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
                Err(_) => return Err(Failure::Late(Duration::ZERO)),
            }
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // For map_err.
fn broken(error: StoreError) -> Failure {
    Failure::Broken(error.to_string())
}

/// What a killed command left.
#[derive(Debug)]
struct Left {
    suspended: Vec<String>,
    unfinished: Option<LvRow>,
}

/// Thin devices that the pool has and LVM does not know.
#[derive(Debug, Clone, Default)]
pub(super) struct Strays {
    /// Their ids.
    pub(super) ids: BTreeSet<u64>,
    /// The pool is one that `init` made.
    pub(super) ours: bool,
    /// A volume was removed, and the pool was not told of it: LVM tells it with its next change, and till then no thin device is
    /// judged.
    pub(super) removal_is_due: bool,
}

/// Those of `in_pool` that no volume of `pool` has. A volume whose pool is not shown counts as one of it.
fn unknown<'a>(
    in_pool: &BTreeSet<u64>,
    rows: impl Iterator<Item = &'a LvRow>,
    pool: &LvName,
) -> BTreeSet<u64> {
    let of_pool = |row: &&LvRow| {
        let name = row.pool_lv.trim_matches(['[', ']']);
        name.is_empty() || name == pool.as_str()
    };
    let known: BTreeSet<u64> = rows
        .filter(of_pool)
        .filter_map(|row| row.thin_id.parse().ok())
        .collect();
    in_pool.difference(&known).copied().collect()
}

/// The volume that LVM has committed and the pool was not told of, or not wholly.
///
/// A new volume carries the pool's transaction id from before it; LVM's for the
/// pool is one more from then on, and so is the kernel's once it was told.
fn unfinished<'a>(
    pool: &LvRow,
    mut volumes: impl Iterator<Item = &'a LvRow>,
    kernel: u64,
) -> Option<&'a LvRow> {
    let newest = |row: &&LvRow| row.transaction_id.parse() == Ok(kernel);
    if is_due(pool, kernel) {
        volumes.find(newest)
    } else {
        None
    }
}

/// Whether LVM has committed a change that the pool, whose own transaction id is `kernel`, was not told of.
fn is_due(pool: &LvRow, kernel: u64) -> bool {
    pool.transaction_id.parse() == Ok(kernel + 1)
}

/// Whether the device-mapper device `name` is suspended; one that is not there is not.
fn is_suspended(name: &str) -> bool {
    let Ok(device) = fs::metadata(Path::new("/dev/mapper").join(name)) else {
        return false;
    };
    let (major, minor) = (
        nix::sys::stat::major(device.rdev()),
        nix::sys::stat::minor(device.rdev()),
    );
    fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/suspended"))
        .is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lvm_does_not_know() {
        let row = |pool: &str, id: &str| LvRow {
            pool_lv: pool.into(),
            thin_id: id.into(),
            ..LvRow::default()
        };
        let rows = [
            row("", ""),
            row("pool", "1"),
            row("[pool]", "2"),
            row("other", "3"),
            row("", "4"),
            row("pool", "5"),
        ];
        let pool = "pool".parse().unwrap();
        let found = unknown(&(1..=6).collect(), rows.iter(), &pool);
        assert_eq!(found, BTreeSet::from([3, 6]));
    }

    #[test]
    fn what_is_unfinished() {
        let row = |name: &str, transaction_id: u64| LvRow {
            lv_name: name.into(),
            transaction_id: transaction_id.to_string(),
            ..LvRow::default()
        };
        let volumes = [row("one", 0), row("two", 1), row("five", 5)];
        for (pool, kernel, found) in [
            (2, 1, Some("two")),
            // All was told.
            (2, 2, None),
            // A removal is due: LVM finishes that by itself.
            (3, 2, None),
            (6, 5, Some("five")),
            // Nobody knows.
            (7, 5, None),
            (5, 6, None),
        ] {
            let found_row = unfinished(&row("pool", pool), volumes.iter(), kernel);
            assert_eq!(found_row.map(|row| &*row.lv_name), found, "{pool} {kernel}");
        }
    }
}
