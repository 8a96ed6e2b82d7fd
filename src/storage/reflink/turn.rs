// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Taking turns at changes, threads and processes alike, and the number that each change announces.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use rustix::fs::{Mode, OFlags};
use tracing::debug;

use super::super::{LOCK_RETRY, StoreError, lock_until};
use super::dir::{Dir, LOCK, NAME, SEQ, failed, sync_dir};

/// How long the lock is waited for, in seconds. What holds it is
/// one clone, or one mkfs of the base.
const LOCK_SECONDS: u64 = 60;

/// The right to change things, until it is dropped.
pub struct Turn<'a> {
    dir: &'a Dir,
    _thread: MutexGuard<'a, ()>,
    _process: Flock<File>,
}

impl<'a> Turn<'a> {
    /// Waits for it; `turns` is whose turn it is among this process's threads.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] when it takes too long.
    pub fn take(dir: &'a Dir, turns: &'a Mutex<()>) -> Result<Self, StoreError> {
        let deadline = Instant::now() + Duration::from_secs(LOCK_SECONDS);
        let late = || StoreError::Timeout {
            store: NAME.to_owned(),
            seconds: LOCK_SECONDS,
        };
        let thread = loop {
            match turns.try_lock() {
                Ok(turn) => break turn,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Err(late()),
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
            }
        };
        let path = dir.join(LOCK);
        // Never written to, so that those who watch see only changes.
        let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|error| failed("opening", &path)(error.into()))?;
        let process = lock_until(file, deadline).map_err(failed("locking", &path))?;
        Ok(Self {
            dir,
            _thread: thread,
            _process: process.ok_or_else(late)?,
        })
    }

    /// The highest number given so far, as it was noted; 0: that is lost.
    pub fn noted_seq(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join(SEQ)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// The number of the next volume or removal.
    pub fn next_seq(&self) -> Result<u64, StoreError> {
        let last = match self.noted_seq() {
            // Lost: what is there tells as well.
            0 => {
                let records = self.dir.records()?;
                records
                    .iter()
                    .map(|(_, record)| record.seq)
                    .max()
                    .unwrap_or(0)
            }
            last => last,
        };
        Ok(last + 1)
    }

    /// Makes the renames so far last, and tells those who watch. That the number itself lasts is not needed: opening
    /// the store looks for the highest.
    pub fn commit(&self, seq: u64) -> Result<(), StoreError> {
        sync_dir(self.dir.path())?;
        if let Err(error) = self.note_seq(seq) {
            // The change is made, and closing the file has told of it.
            debug!(%error, "the highest number is not noted");
        }
        Ok(())
    }

    /// Writes the highest number given so far.
    fn note_seq(&self, seq: u64) -> io::Result<()> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.dir.join(SEQ))?;
        // In place and always as long, which takes no block on a full file system.
        let written = file.write_all_at(format!("{seq:020}\n").as_bytes(), 0);
        // Rather none than an old one: then the volumes tell which is the highest.
        written.inspect_err(|_| drop(file.set_len(0)))
    }
}
