// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LVM's commits, made to outlast a power cut.
//!
//! LVM writes its metadata past the page cache, but never has the disk write out its own
//! (lib/format_text in lvm2). dm-thin does, at each commit of its own, so that volumes that are made or written to need
//! nothing more: LVM's metadata is on the same disk. A change of tags alone is followed by nothing of the kind.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::StoreError;
use super::io_error;

/// How long it is taken for known which disks a group has.
const KNOWN: Duration = Duration::from_secs(60);

/// A group's physical volumes.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// How often it was asked for so far.
    asked: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When they were listed, and which they are.
    known: Option<(Instant, Vec<PathBuf>)>,
    /// Up to which request all is done.
    done: u64,
}

impl Disks {
    /// Has each write out its cache. One round serves all who asked before it began. `list` says which there are.
    pub(super) fn flush(
        &self,
        list: impl FnOnce() -> Result<Vec<PathBuf>, StoreError>,
    ) -> Result<(), StoreError> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.done >= number {
            return Ok(());
        }
        let upto = self.asked.load(Ordering::SeqCst);
        let fresh = state.known.take();
        let known = match fresh.filter(|(when, _)| when.elapsed() < KNOWN) {
            Some(known) => known,
            None => (Instant::now(), list()?),
        };
        for disk in &known.1 {
            File::open(disk)
                .and_then(|disk| disk.sync_all())
                .map_err(|error| io_error(format!("flushing {}", disk.display()), error))?;
        }
        state.known = Some(known);
        state.done = upto;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_listed_once_and_again_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let disks = Disks::default();
        let mut listed = 0;
        let mut flush = || {
            disks.flush(|| {
                listed += 1;
                Ok(vec![disk.clone()])
            })
        };
        assert!(flush().is_err());
        std::fs::write(&disk, "").unwrap();
        flush().unwrap();
        flush().unwrap();
        assert_eq!(listed, 2);
    }
}
