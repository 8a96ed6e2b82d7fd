// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thin pool in a volume group, spoken to through LVM's own tools.
//!
//! [`LvmStore`] turns each call into one LVM command, which one thread (`owner`)
//! runs (`runner`) in one long-lived `lvm` shell (`shell`, `process`) with a configuration
//! directory of our own (`config`); `command` writes its lines. What LVM says to people is passed on, never
//! read: success is a return code, and what a failure was is told by a fresh
//! listing (`report`). Making a volume takes more than that (`make`).
//!
//! `init` prepares a pool; `dm` asks device-mapper what LVM has no command for; `persist` has the disk keep what LVM wrote.
//!
//! What never happens: a command that names no group; one that acts on a volume
//! outside the pool; an entry that comes up at boot (every volume keeps LVM's
//! activation-skip flag).
//!
//! # Over a crash
//! Each call that changes something is one LVM command, and one commit of
//! LVM's metadata, text that is written beside the old one and then switched to:
//! a volume is there with all its tags or not at all. A thin volume takes a
//! second commit: the first holds it and a message for the pool, the second, when
//! the pool was told, only clears the message. A crash between the two leaves a
//! volume that is listed, with its tags, but that the pool does not have; LVM
//! sends the message late, and not always. `repair` finds such a volume when a
//! store is opened and after `lvm` died over a command, and removes it.
//!
//! # A snapshot of what is in use
//! LVM suspends the origin while it holds the group's lock, and device-mapper freezes its file system for that, which takes as
//! long as a job likes (`freeze`). So LVM only makes an empty volume. Then the file system is frozen, which no lock
//! waits for, and two messages to the pool make the volume a snapshot: what LVM does is the same, in another
//! order. A file system that is frozen already would do for LVM on newer kernels alone: on Linux 6.1
//! device-mapper's own freeze of it fails with EBUSY. Until it is a snapshot the volume is tagged as one that
//! is being made. Killed between the messages, LVM can still remove it (2.03.16 and 2.03.31).
//!
//! `kill -9` of the daemon does not even interrupt LVM: it is sent SIGTERM, which
//! it blocks while it holds the group's lock, and it ends after its command. Nor does
//! systemd, which leaves it alone (`KillMode=process` in the unit): a daemon that stops closes
//! its store, and waits for the command that is under way ([`Store::close`]).

mod command;
mod config;
mod dm;
mod init;
mod make;
mod owner;
mod persist;
mod process;
mod repair;
mod report;
mod runner;
mod shell;

use std::collections::{HashMap, HashSet};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

pub use config::plain_report;
pub use init::{Say, ensure_loop, init, init_loop};
pub use owner::Bounds;

use self::command::{Command, VgName};
use self::config::{HostConfig, SystemDir};
use self::dm::{Health, Illness, PoolDevices};
use self::owner::{Owner, Urgency};
use self::persist::Disks;
use self::repair::{Pool, Strays};
use self::report::{LV_COLUMNS, PoolUse};
use self::runner::{Look, Runner};
use self::shell::{Answer, Failure, Shell};
use super::freeze;
use super::{Capacity, Listing, Lv, NewLv, Store, StoreError, Trouble, Usage, Watch};
use crate::cache::names::{LvName, Tag};
use crate::cache::units::Bytes;
use crate::exec::{self, ExecError};
use crate::mount::{self, Mounted};

/// A thin pool, opened.
#[derive(Debug)]
pub struct LvmStore {
    vg: VgName,
    pool: LvName,
    host: HostConfig,
    system_dir: PathBuf,
    owner: Owner,
    /// Why LVM's shell cannot be used, where it cannot.
    shell_is_useless: Arc<OnceLock<String>>,
    /// The pool's volumes, as last listed and since made: see [`LvmStore::is_ours`].
    known: Mutex<HashSet<LvName>>,
    /// How full the pool was when last listed.
    pool_use: Mutex<PoolUse>,
    look: Arc<Mutex<Look>>,
    /// Held by who has it looked for thin devices that LVM does not know.
    looking: Mutex<()>,
    disks: Disks,
}

impl LvmStore {
    /// Opens the thin pool `pool` of the group `vg`, and activates the pool where
    /// nobody did yet. `runtime_dir` is where LVM's configuration for us is kept.
    ///
    /// # Errors
    /// [`StoreError::Unusable`], with what to do about it.
    pub fn open(vg: &str, pool: &str, runtime_dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(vg, pool, runtime_dir, Bounds::default())
    }

    /// [`LvmStore::open`] with other bounds for how long things may take.
    ///
    /// # Errors
    /// As [`LvmStore::open`].
    pub fn open_with(
        vg: &str,
        pool: &str,
        runtime_dir: &Path,
        bounds: Bounds,
    ) -> Result<Self, StoreError> {
        let vg = parse_name("volume group", vg)?;
        let pool = parse_name("thin pool", pool)?;
        let lvm = tool("lvm", "lvm2")?;
        // LVM runs it before it activates a pool.
        tool("thin_check", "thin-provisioning-tools")?;
        let host_dir = config::host_system_dir();
        let host = HostConfig::read(&host_dir)?;
        if !host.backup {
            tracing::warn!(
                "backup/backup=0 in LVM's configuration: what is changed by hand with LVM's tools is not noticed"
            );
        }
        // LVM makes it with its first backup there; it is watched from the start on.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&host.backup_dir)
            .map_err(|e| io_error(format!("making {}", host.backup_dir.display()), e))?;
        let made = SystemDir::new(host_dir, runtime_dir.to_owned(), &vg)?;
        let system_dir = made.path().to_owned();
        let on = Pool::new(vg.clone(), pool.clone(), &host.locking_dir);
        let shell = Shell::new(lvm, made);
        let shell_is_useless = shell.useless();
        let runner = Runner::new(shell, on);
        let store = Self {
            shell_is_useless,
            look: runner.look(),
            looking: Mutex::default(),
            disks: Disks::default(),
            owner: Owner::start(runner, bounds).map_err(|e| io_error("a thread".into(), e))?,
            vg,
            pool,
            host,
            system_dir,
            known: Mutex::default(),
            pool_use: Mutex::default(),
        };
        // The pool is there, and active from now on.
        store.state()?;
        store.devices().release_leftover(&store.system_dir)?;
        Ok(store)
    }

    /// The block device of an active volume.
    fn device(&self, lv: &LvName) -> PathBuf {
        PathBuf::from(format!("/dev/{}/{lv}", self.vg))
    }

    fn run(&self, command: Command, urgency: Urgency) -> Result<Answer, StoreError> {
        let text = command.to_string();
        self.owner
            .run(command, urgency)
            .map_err(|failure| match failure {
                Failure::Late(after) => StoreError::Timeout {
                    store: self.to_string(),
                    seconds: after.as_secs(),
                },
                Failure::Broken(reason) => StoreError::Failed(format!("`{text}`: {reason}")),
            })
    }

    fn query(&self) -> Result<State, StoreError> {
        let query = Command::query("lvs", LV_COLUMNS)
            .only_pool_and_volumes(&self.pool)
            .vg(&self.vg);
        let answer = self.run(query, Urgency::Request)?;
        if !answer.success {
            return Err(self.unusable(&answer.reason()));
        }
        let mut state = State {
            lvs: Vec::new(),
            pool: PoolUse::default(),
        };
        let mut pool = None;
        for row in answer.document.lvs() {
            if row.pool_lv == self.pool.as_str() {
                match row.thin_volume() {
                    Some(lv) => state.lvs.push(lv),
                    None => tracing::debug!(?row, "not a volume that we know how to read"),
                }
            } else if row.lv_name == self.pool.as_str() {
                pool = Some(row);
            }
        }
        let pool = pool.ok_or_else(|| self.unusable("there is no such logical volume"))?;
        if !pool.is_thin_pool() {
            return Err(self.unusable("it is not a thin pool"));
        }
        state.pool = pool
            .pool_use()
            .ok_or_else(|| self.unusable("LVM shows no sizes of it"))?;
        *self.last_use() = state.pool;
        *self.known() = state.lvs.iter().map(|lv| lv.name.clone()).collect();
        Ok(state)
    }

    /// A fresh listing, of an active pool: an inactive one does not tell how full
    /// it is. It comes up at boot by itself, and goes with nobody's leave but an
    /// administrator's.
    fn state(&self) -> Result<State, StoreError> {
        let state = self.query()?;
        if state.pool.active {
            return Ok(state);
        }
        // One that has failed tells no numbers.
        self.in_service()?;
        let activate = || {
            let command = Command::new("lvchange").word("--activate=y");
            command.lv(&self.vg, &self.pool)
        };
        let mut answer = self.run(activate(), Urgency::Request)?;
        let mut state = self.query()?;
        if !state.pool.active {
            // A power cut between two commits of the pool's metadata leaves blocks in use that are no volume's. thin_check(8)
            // minds them from 1.0 on, unless it is to free them, and LVM takes that for damage (stratisd, issue 3963).
            let reason = answer.reason();
            answer = self.run(activate().repairing(), Urgency::Request)?;
            state = self.query()?;
            if state.pool.active {
                let (vg, pool) = (&self.vg, &self.pool);
                tracing::warn!(
                    reason,
                    "thin pool {vg}/{pool}: what its check found is repaired"
                );
            }
        }
        if state.pool.active {
            self.devices().release_of_inactive(&self.system_dir)?;
            Ok(state)
        } else {
            Err(self.unusable(&format!("it cannot be activated: {}", answer.reason())))
        }
    }

    /// One more mount of what is mounted from a volume's device. `None`: nothing is.
    fn mounted(&self, lv: &LvName) -> Result<Option<Mounted>, StoreError> {
        let device = self.device(lv);
        // Where there is no udev its node has LVM's name, and not the kernel's.
        let fs = || {
            let number = rustix::fs::stat(&device).ok()?.st_rdev;
            let number = (rustix::fs::major(number), rustix::fs::minor(number));
            mount::mounted_as(&crate::fs::kernel_name(number).ok()?)
        };
        let Some(as_fs) = fs() else {
            return Ok(None);
        };
        match Mounted::device(&device, as_fs) {
            Ok(mounted) => Ok(Some(mounted)),
            // Unmounted in the meantime.
            Err(_) if fs().is_none() => Ok(None),
            Err(error) => Err(io_error(
                format!("freezing {}", device.display()),
                error.into(),
            )),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashSet<LvName>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_use(&self) -> MutexGuard<'_, PoolUse> {
        self.pool_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees that `lv` is one of the pool's volumes before a command names it: a
    /// group holds others too, and LVM would do the same to them.
    fn is_ours(&self, lv: &LvName) -> Result<(), StoreError> {
        if self.known().contains(lv) || self.state()?.find(lv).is_some() {
            Ok(())
        } else {
            Err(StoreError::NotFound(lv.clone()))
        }
    }

    fn devices(&self) -> PoolDevices {
        PoolDevices::new(&self.vg, &self.pool)
    }

    /// Sees that the pool takes changes, and gives what it says of itself; `None`: it is not active.
    fn in_service(&self) -> Result<Option<Health>, StoreError> {
        let health = self.devices().health()?;
        match health.and_then(|health| health.illness) {
            None | Some(Illness::OutOfData) => Ok(health),
            Some(illness) => {
                let Trouble { finding, fix } = illness.told(&self.vg, &self.pool);
                Err(StoreError::OutOfService {
                    store: self.vg.to_string(),
                    detail: format!("{finding}; {fix}"),
                })
            }
        }
    }

    fn unusable(&self, reason: &str) -> StoreError {
        let (vg, pool) = (&self.vg, &self.pool);
        StoreError::Unusable(format!(
            "thin pool {vg}/{pool} cannot be used: {reason}. `lvm-cache-friend init --vg {vg} --pool {pool} --size SIZE` prepares it; `lvs {vg}` shows what is there"
        ))
    }

    /// What went wrong with a command on a volume that ought to be there.
    fn failed_on(&self, lv: &LvName, answer: &Answer, busy: bool) -> StoreError {
        match self.state() {
            Err(error) => error,
            Ok(state) => match state.find(lv) {
                None => StoreError::NotFound(lv.clone()),
                Some(lv) if busy && lv.open => StoreError::Busy(lv.name.clone()),
                Some(_) => StoreError::Failed(format!("{lv}: {}", answer.reason())),
            },
        }
    }
}

impl std::fmt::Display for LvmStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.vg, self.pool)
    }
}

impl Store for LvmStore {
    fn name(&self) -> &str {
        self.vg.as_str()
    }

    fn drawback(&self) -> Option<String> {
        let why = self.shell_is_useless.get()?;
        Some(format!(
            "LVM's shell cannot be used ({why}): each command is a process of its own, which takes longer"
        ))
    }

    fn troubles(&self) -> Result<Vec<Trouble>, StoreError> {
        let (vg, pool) = (&self.vg, &self.pool);
        let state = self.state()?;
        let mut found = Vec::new();
        if !state.pool.zeroes {
            found.push(Trouble {
                finding: format!(
                    "thin pool {vg}/{pool} does not zero new blocks: a volume's device may hold what others deleted"
                ),
                fix: format!("lvchange --zero y {vg}/{pool}"),
            });
        }
        let health = self.devices().health()?;
        if let Some(illness) = health.and_then(|health| health.illness) {
            found.push(illness.told(vg, pool));
            return Ok(found);
        }
        if let Some(fix) = self.devices().foreign_copy(&self.system_dir)? {
            found.push(Trouble {
                finding: format!(
                    "another program holds a snapshot of the metadata of {vg}/{pool}: until it is released that grows, and what each volume takes cannot be told"
                ),
                fix: format!("if no such program runs: {fix}"),
            });
            return Ok(found);
        }
        let Strays { ids, ours, .. } = self.strays(false)?;
        if !ids.is_empty() {
            let ids: Vec<_> = ids.iter().map(u64::to_string).collect();
            found.push(Trouble {
                finding: format!(
                    "{vg}/{pool} has thin devices that LVM does not know, which take room, and which LVM deletes when their turn comes: {}",
                    ids.join(", ")
                ),
                fix: if ours {
                    "restart the daemon, which deletes those that are not in use".to_owned()
                } else {
                    format!("see whose they are; unused ones: dmsetup message {}-tpool 0 \"delete ID\"", self.devices().name())
                },
            });
        }
        Ok(found)
    }

    fn clear_away(&self) -> Result<(), StoreError> {
        let mut strays = self.strays(true)?;
        if strays.removal_is_due {
            self.change_pool()?;
            strays = self.strays(true)?;
        }
        let Strays { ids, ours, .. } = strays;
        if !ids.is_empty() {
            tracing::warn!(
                ?ids,
                ours,
                "thin devices that LVM does not know are left in the pool: see `lvm-cache-friend doctor`"
            );
        }
        Ok(())
    }

    fn persist(&self) -> Result<(), StoreError> {
        self.disks.flush(|| {
            let query = Command::query("vgs", "vg_name,pv_name").vg(&self.vg);
            let answer = self.run(query, Urgency::Request)?;
            if !answer.success {
                return Err(self.unusable(&answer.reason()));
            }
            let disks = answer.document.groups().map(|row| row.pv_name.clone());
            // A missing one has no path.
            let disks = disks.filter(|name| name.starts_with('/'));
            Ok(disks.map(PathBuf::from).collect())
        })
    }

    fn thaw(&self) -> Result<(), StoreError> {
        for lv in self.state()?.lvs.iter().filter(|lv| lv.open) {
            // One that has shut down, say, is no reason to keep the others waiting.
            if let Ok(Some(mounted)) = self.mounted(&lv.name) {
                freeze::thaw(&mounted);
            }
        }
        Ok(())
    }

    fn list(&self) -> Result<Listing, StoreError> {
        let state = self.state()?;
        Ok(Listing {
            lvs: state.lvs,
            capacity: state.pool.capacity,
        })
    }

    fn room(&self) -> Result<Capacity, StoreError> {
        let mut now = *self.last_use();
        let health = self.in_service()?;
        // What writes change, the kernel says; the group's description is as last listed.
        if let Some((data, metadata)) = health.and_then(|health| health.used) {
            now.capacity.data_percent = data;
            now.capacity.metadata_percent = metadata;
        }
        match self.no_room(&now, health, &[]) {
            Some(full) => Err(full),
            None => Ok(now.capacity),
        }
    }

    fn usage(&self) -> Result<HashMap<LvName, Usage>, StoreError> {
        let of_id = self.devices().usage(&self.system_dir)?;
        let listing = self.list()?;
        Ok(listing
            .lvs
            .into_iter()
            .filter_map(|lv| Some((lv.name, *of_id.get(&lv.seq)?)))
            .collect())
    }

    fn mapped(&self, lv: &LvName) -> Result<Bytes, StoreError> {
        PoolDevices::new(&self.vg, &self.pool).mapped(lv.as_str())
    }

    fn snapshot(&self, origin: &LvName, new: &NewLv) -> Result<Option<PathBuf>, StoreError> {
        self.is_ours(origin)?;
        match self.mounted(origin)? {
            Some(mounted) => self.snapshot_of_mounted(origin, &mounted, new),
            None => self.make(Command::new("lvcreate"), new, Some(origin)),
        }
    }

    fn create(&self, new: &NewLv, size: Bytes) -> Result<Option<PathBuf>, StoreError> {
        let command = Command::new("lvcreate").bytes("--virtualsize", size);
        self.make(command, new, None)
    }

    fn change_tags(&self, lv: &LvName, add: &[Tag], del: &[Tag]) -> Result<(), StoreError> {
        if add.is_empty() && del.is_empty() {
            return Ok(());
        }
        self.is_ours(lv)?;
        let command = Command::new("lvchange")
            .tags("--addtag", add)
            .tags("--deltag", del)
            .lv(&self.vg, lv);
        let answer = self.run(command, Urgency::Request)?;
        if answer.success {
            return Ok(());
        }
        match self.failed_on(lv, &answer, false) {
            // The group's description may have no room for the tags.
            StoreError::Failed(_) if !add.is_empty() => {
                Err(self.refused(&self.state()?, add, &answer))
            }
            error => Err(error),
        }
    }

    fn remove(&self, lv: &LvName) -> Result<(), StoreError> {
        // What was known before is not enough here: the name may be that of another's by now.
        if self.state()?.find(lv).is_none() {
            return Ok(());
        }
        let command = Command::new("lvremove").lv(&self.vg, lv);
        let answer = self.run(command, Urgency::Removal)?;
        if answer.success {
            self.known().remove(lv);
            return Ok(());
        }
        match self.failed_on(lv, &answer, true) {
            StoreError::NotFound(_) => Ok(()),
            error => Err(error),
        }
    }

    fn grow(&self, lv: &LvName, size: Bytes) -> Result<(), StoreError> {
        self.is_ours(lv)?;
        let command = Command::new("lvextend")
            .bytes("--size", size)
            .lv(&self.vg, lv);
        let answer = self.run(command, Urgency::Request)?;
        if answer.success {
            return Ok(());
        }
        let state = self.state()?;
        match state.find(lv) {
            None => Err(StoreError::NotFound(lv.clone())),
            // LVM takes it for an error that there is nothing to do.
            Some(lv) if lv.size >= size => Ok(()),
            Some(_) => Err(self.refused(&state, &[], &answer)),
        }
    }

    fn activate(&self, lv: &LvName) -> Result<PathBuf, StoreError> {
        self.is_ours(lv)?;
        let command = Command::new("lvchange")
            .word("--activate=y")
            .word("--ignoreactivationskip")
            .lv(&self.vg, lv);
        let mut answer = self.run(command, Urgency::Request)?;
        let device = self.device(lv);
        if answer.success && !device.exists() {
            // Where there is no udev, LVM makes it: one that was killed before that left an active volume without.
            let command = Command::new("vgmknodes").lv(&self.vg, lv);
            answer = self.run(command, Urgency::Request)?;
        }
        if answer.success && device.exists() {
            Ok(device)
        } else {
            Err(self.failed_on(lv, &answer, false))
        }
    }

    fn deactivate(&self, lv: &LvName) -> Result<(), StoreError> {
        self.is_ours(lv)?;
        let command = Command::new("lvchange")
            .word("--activate=n")
            .lv(&self.vg, lv);
        let answer = self.run(command, Urgency::Request)?;
        if answer.success {
            Ok(())
        } else {
            Err(self.failed_on(lv, &answer, true))
        }
    }

    fn watch(&self) -> Watch {
        Watch {
            dir: self.host.backup_dir.clone(),
            file: Some(self.vg.to_string()),
        }
    }

    fn close(&self, until: Instant) -> bool {
        self.owner.close(until)
    }
}

/// A listing, with more about the pool.
#[derive(Debug)]
struct State {
    lvs: Vec<Lv>,
    pool: PoolUse,
}

impl State {
    fn find(&self, name: &LvName) -> Option<&Lv> {
        self.lvs.iter().find(|lv| lv.name == *name)
    }
}

fn parse_name(what: &str, text: &str) -> Result<LvName, StoreError> {
    text.parse()
        .map_err(|_| StoreError::Unusable(format!("{text:?} cannot be the name of a {what}: use letters, digits and . _ + -, not starting with -, at most 127 bytes")))
}

/// Where a tool is, or what to install.
fn tool(name: &str, package: &str) -> Result<PathBuf, StoreError> {
    exec::find_tool(name).map_err(|error: ExecError| {
        StoreError::Unusable(format!("{error}; install the package {package}"))
    })
}

fn io_error(what: String, source: io::Error) -> StoreError {
    StoreError::Io { what, source }
}
