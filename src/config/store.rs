// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which store there is, and where: opened, and kept for one daemon.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;

use super::RUN_DIR;
use super::values::{absolute, absolute_if_any, parsed, parsed_if_any};
use crate::cache::names::LvName;
use crate::cache::units::Bytes;
use crate::http::socket::{Lock, SocketError};
use crate::storage::lvm::{self, LvmStore};
use crate::storage::rbd::{self, RbdStore};
use crate::storage::reflink::ReflinkStore;
use crate::storage::{Store, StoreError};

/// Which store, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// A thin pool.
    Lvm(Lvm),
    /// Image files.
    Reflink(Reflink),
    /// Images in a Ceph pool.
    Rbd(Rbd),
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

/// Images in a Ceph pool, for the hosts of a fleet.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rbd {
    /// The pool, and the namespace in it.
    #[serde(deserialize_with = "parsed")]
    pub pool: PoolSpec,
    /// The cluster's user, without `client.`.
    #[serde(default = "default_user", deserialize_with = "parsed")]
    pub user: CephName,
    /// The client's configuration; `None`: where Ceph's tools look for it.
    #[serde(default, deserialize_with = "absolute_if_any")]
    pub conf: Option<PathBuf>,
    /// This host's id; `None`: what its machine-id(5) gives.
    #[serde(default, deserialize_with = "parsed_if_any")]
    pub host: Option<CephName>,
}

impl Rbd {
    /// A pool or a namespace in one, and for all else what Ceph's own tools take.
    #[must_use]
    pub fn new(pool: PoolSpec) -> Self {
        Self {
            pool,
            user: default_user(),
            conf: None,
            host: None,
        }
    }

    fn place(&self) -> rbd::Place {
        rbd::Place {
            pool: self.pool.pool.to_string(),
            namespace: self
                .pool
                .namespace
                .as_ref()
                .map(CephName::to_string)
                .unwrap_or_default(),
            user: self.user.to_string(),
            conf: self.conf.clone(),
        }
    }

    fn host(&self) -> Result<String, StoreError> {
        match &self.host {
            Some(host) => Ok(host.to_string()),
            None => rbd::machine_id(),
        }
    }

    /// Opens the store.
    ///
    /// # Errors
    /// When it is not there, or cannot be used.
    pub fn open(&self) -> Result<RbdStore, StoreError> {
        RbdStore::open(&self.place(), &self.host()?, Path::new(RUN_DIR))
    }

    /// Prepares the store, where it is not, and says what it makes: see [`rbd::init`].
    ///
    /// # Errors
    /// Where something is missing that has to be there, by name.
    pub fn init(&self, base_size: Bytes, say: &mut dyn FnMut(String)) -> Result<(), StoreError> {
        let (host, run_dir) = (self.host()?, Path::new(RUN_DIR));
        rbd::init(&self.place(), &host, run_dir, base_size, say).map(|_| ())
    }
}

/// The user that Ceph's own tools take where none is named.
fn default_user() -> CephName {
    CephName("admin".to_owned())
}

/// A name in a Ceph cluster, or of a host: as far as the kernel's list of options, a file's name and a shell take it as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CephName(String);

/// Longest name: three of them are in a file's.
const MAX_NAME: usize = 64;

impl FromStr for CephName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if text.is_empty() || text.len() > MAX_NAME || !text.bytes().all(plain) {
            return Err(format!(
                "{text:?} is no name: expected 1 to {MAX_NAME} letters, digits, _, . and -"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for CephName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `POOL` or `POOL/NAMESPACE`, as rbd(8) has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// The pool.
    pub pool: CephName,
    /// The namespace in it; `None`: the pool's own.
    pub namespace: Option<CephName>,
}

impl FromStr for PoolSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pool, namespace) = match text.split_once('/') {
            None => (text, None),
            Some((pool, namespace)) => (pool, Some(namespace)),
        };
        Ok(Self {
            pool: pool.parse()?,
            namespace: namespace.map(str::parse).transpose()?,
        })
    }
}

impl fmt::Display for PoolSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            None => write!(f, "{}", self.pool),
            Some(namespace) => write!(f, "{}/{namespace}", self.pool),
        }
    }
}

impl StoreConfig {
    /// Keeps every other daemon, and commands that change a volume, off a store.
    ///
    /// Of a fleet's store it keeps off this host's alone: the others' changes and its own do not harm one another.
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
            Self::Rbd(rbd) => {
                let name = |name: &Option<CephName>| {
                    name.as_ref().map(CephName::to_string).unwrap_or_default()
                };
                // None of the names has an @.
                let file = format!(
                    "rbd-{}@{}@{}.lock",
                    rbd.pool.pool,
                    name(&rbd.pool.namespace),
                    name(&rbd.host)
                );
                Lock::file(&Path::new(RUN_DIR).join(file))
            }
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
            Self::Rbd(rbd) => Arc::new(rbd.open()?),
        })
    }

    /// The same for the daemon, which thaws what an earlier one left frozen; of a fleet, it is this host's from now on
    /// ([`RbdStore::join`]).
    ///
    /// # Errors
    /// As [`StoreConfig::open`]; or another machine's daemon has this host's id.
    pub fn serve(&self) -> Result<Arc<dyn Store>, StoreError> {
        let store: Arc<dyn Store> = if let Self::Rbd(rbd) = self {
            let store = rbd.open()?;
            if store.join()? {
                tracing::warn!(
                    "this host was away for so long that another one took it for lost: what its volumes held is gone"
                );
            }
            Arc::new(store)
        } else {
            self.open()?
        };
        store.thaw()?;
        Ok(store)
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
            Self::Rbd(Rbd { pool, .. }) => write!(f, "Ceph pool {pool}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_and_namespaces() {
        for good in ["rbd", "rbd/caches", ".mgr", "a-b_c.d/e"] {
            let spec = good.parse::<PoolSpec>().expect(good);
            assert_eq!(spec.to_string(), good);
        }
        let long = "p".repeat(MAX_NAME + 1);
        for bad in [
            "", "/", "rbd/", "/n", "rbd/a/b", "rbd a", "rbd/a,b", "rbd@s", &long,
        ] {
            assert!(bad.parse::<PoolSpec>().is_err(), "{bad:?}");
        }
    }
}
