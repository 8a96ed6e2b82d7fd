// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The store's directory: what is in it under which names, the records beside the images, and how much room
//! its file system has. What is here knows nothing of devices.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{Statvfs, statvfs};
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::super::{Capacity, StoreError};
use crate::cache::names::LvName;
use crate::cache::units::Bytes;

/// What the store is called in messages and in the job protocol.
pub const NAME: &str = "reflink";

// Names in the store's directory that no volume can have: `~` is not in LVM's
// alphabet.
pub const NEW: &str = "~new";
pub const OLD: &str = "~old.";
pub const SEQ: &str = "~seq";
pub const LOCK: &str = "~lock";

// In a volume's directory.
pub const IMAGE: &str = "image";
pub const TAGS: &str = "tags.json";
pub const NEW_TAGS: &str = "tags.json~";

/// The directory, of which it is known that only root can write to it.
#[derive(Debug)]
pub struct Dir(PathBuf);

/// What is kept beside an image.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    pub seq: u64,
    /// Seconds since 1970.
    pub created: u64,
    pub origin: Option<Origin>,
    pub tags: Vec<String>,
}

/// What an image was cloned from: the name may have been given again since.
#[derive(Debug, Serialize, Deserialize)]
pub struct Origin {
    pub name: String,
    pub seq: u64,
}

impl Dir {
    /// # Errors
    /// [`StoreError::Unusable`] when it is not there, or others could write to it.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let dir = dir.canonicalize().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => not_prepared(dir),
            _ => failed("looking for", dir)(error),
        })?;
        let stat = fs::metadata(&dir).map_err(failed("looking at", &dir))?;
        if stat.uid() != nix::unistd::geteuid().as_raw() || stat.mode() & 0o022 != 0 {
            return Err(StoreError::Unusable(format!(
                "{}: others than root can write to it",
                dir.display()
            )));
        }
        Ok(Self(dir))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where something of that name is.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The directory of a volume.
    pub fn lv(&self, lv: &LvName) -> PathBuf {
        self.0.join(lv.as_str())
    }

    pub fn image(&self, lv: &LvName) -> PathBuf {
        self.lv(lv).join(IMAGE)
    }

    /// All volumes that are ours, with what is kept beside them.
    pub fn records(&self) -> Result<Vec<(LvName, Record)>, StoreError> {
        let what = failed("reading", &self.0);
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(&what)? {
            let name = entry.map_err(&what)?.file_name();
            let Some(lv) = name.to_str().and_then(|name| name.parse::<LvName>().ok()) else {
                continue;
            };
            if let Some(record) = self.record(&lv)? {
                records.push((lv, record));
            }
        }
        Ok(records)
    }

    /// What is kept beside an image; `None` where there is no such volume, or
    /// something else of that name.
    pub fn record(&self, lv: &LvName) -> Result<Option<Record>, StoreError> {
        let path = self.lv(lv).join(TAGS);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(failed("reading", &path)(error)),
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                debug!(path = %path.display(), %error, "not a record of ours");
                Ok(None)
            }
        }
    }

    pub fn known(&self, lv: &LvName) -> Result<Record, StoreError> {
        self.record(lv)?
            .ok_or_else(|| StoreError::NotFound(lv.clone()))
    }

    /// Frees what removed volumes held, also those that an earlier removal could not free. Another thread or process
    /// may be at the same.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let what = failed("clearing away in", &self.0);
        let mut first = Ok(());
        for entry in fs::read_dir(&self.0).map_err(&what)? {
            let entry = entry.map_err(&what)?;
            if is_old(&entry.file_name()) {
                first = first.and(remove_tree(&entry.path()));
            }
        }
        first
    }

    pub fn capacity(&self) -> Result<Capacity, StoreError> {
        let stat = self.space()?;
        let (blocks, block) = (stat.blocks().max(1), stat.fragment_size());
        let used = blocks - stat.blocks_available();
        Ok(Capacity {
            data_size: Bytes(blocks * block),
            data_percent: used as f64 * 100.0 / blocks as f64,
            data_limit: 100.0 - floor(blocks * block) as f64 * 100.0 / (blocks * block) as f64,
            ..Capacity::default()
        })
    }

    /// How full it is; an error where so little is free that nothing is made.
    pub fn room(&self) -> Result<Capacity, StoreError> {
        let stat = self.space()?;
        let block = stat.fragment_size();
        let (size, free) = (stat.blocks() * block, stat.blocks_available() * block);
        let floor = floor(size);
        if free >= floor {
            return self.capacity();
        }
        Err(StoreError::Full {
            store: NAME.to_owned(),
            detail: format!(
                "{} of {} are free in {}, and nothing is made below {}: remove entries, or make room there",
                Bytes(free),
                Bytes(size),
                self.0.display(),
                Bytes(floor)
            ),
        })
    }

    fn space(&self) -> Result<Statvfs, StoreError> {
        statvfs(&self.0).map_err(|error| failed("looking at", &self.0)(error.into()))
    }
}

pub fn not_prepared(dir: &Path) -> StoreError {
    StoreError::Unusable(format!(
        "{} is not prepared as a store: is its disk mounted? Otherwise run: lvm-cache-friend init --reflink {0}",
        dir.display()
    ))
}

/// How much of `size` bytes must be free for volumes to be made. btrfs counts as free what it
/// will yet take for metadata: 60 MiB of 2 GiB.
fn floor(size: u64) -> u64 {
    (size / 20).min(Bytes::GIB)
}

pub fn write_record(path: &Path, record: &Record) -> Result<(), StoreError> {
    let text = serde_json::to_vec(record).expect("numbers and strings");
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        })
        .map_err(failed("writing", path))
}

pub fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("writing", path))
}

/// Whether a name in the store's directory is that of a volume that was taken away.
pub fn is_old(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(OLD)
}

pub fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if !is_absent(&error) => Err(failed("removing", path)(error)),
        _ => Ok(()),
    }
}

pub fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// The error that doing something to a path gave.
pub fn failed(doing: &str, to: impl AsRef<Path>) -> impl Fn(io::Error) -> StoreError {
    let what = format!("{doing} {}", to.as_ref().display());
    move |source| match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StoreError::Full {
            store: NAME.to_owned(),
            detail: format!("{what}: {source}"),
        },
        _ => StoreError::Io {
            what: what.clone(),
            source,
        },
    }
}
