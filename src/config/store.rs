// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which store there is, and where: opened, and kept for one daemon.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::RUN_DIR;
use super::values::{absolute, absolute_if_any, parsed};
use crate::cache::names::LvName;
use crate::http::socket::{Lock, SocketError};
use crate::storage::lvm::{self, LvmStore};
use crate::storage::reflink::ReflinkStore;
use crate::storage::{Store, StoreError};

/// Which store, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// A thin pool.
    Lvm(Lvm),
    /// Image files.
    Reflink(Reflink),
}

/// A thin pool in a volume group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Lvm {
    /// The volume group.
    #[serde(deserialize_with = "parsed")]
    pub vg: LvName,
    /// The thin pool in it.
    #[serde(deserialize_with = "parsed")]
    pub pool: LvName,
    /// The file whose loop device is the group's only disk, when `init --loop`
    /// made it.
    #[serde(default, deserialize_with = "absolute_if_any")]
    pub loop_file: Option<PathBuf>,
}

/// Image files in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Reflink {
    /// The directory, on XFS with reflinks or btrfs.
    #[serde(deserialize_with = "absolute")]
    pub dir: PathBuf,
}

impl StoreConfig {
    /// Keeps every other daemon, and commands that change a volume, off a store.
    ///
    /// # Errors
    /// `SocketError::Locked` while a daemon has it.
    pub fn lock(&self) -> Result<Lock, SocketError> {
        match self {
            Self::Lvm(lvm) => {
                // Both names are of LVM's alphabet: safe in a file's name.
                let file = format!("{}-{}.lock", lvm.vg, lvm.pool);
                Lock::file(&Path::new(RUN_DIR).join(file))
            }
            // A name that no image can have, as the store's own files beside it.
            Self::Reflink(reflink) => Lock::file(&reflink.dir.join("~daemon")),
        }
    }

    /// Opens the store.
    ///
    /// # Errors
    /// When it is not there, or its tools are not.
    pub fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Lvm(lvm) => {
                if let Some(file) = &lvm.loop_file {
                    lvm::ensure_loop(file)?;
                }
                let (vg, pool) = (lvm.vg.as_str(), lvm.pool.as_str());
                Arc::new(LvmStore::open(vg, pool, Path::new(RUN_DIR))?)
            }
            Self::Reflink(reflink) => Arc::new(ReflinkStore::open(&reflink.dir)?),
        })
    }
}

impl std::fmt::Display for StoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lvm(Lvm {
                vg,
                pool,
                loop_file: None,
            }) => write!(f, "thin pool {vg}/{pool}"),
            Self::Lvm(Lvm {
                vg,
                pool,
                loop_file: Some(file),
            }) => write!(f, "thin pool {vg}/{pool} in the file {}", file.display()),
            Self::Reflink(Reflink { dir }) => write!(f, "image files in {}", dir.display()),
        }
    }
}
