//! The life of a lease: volumes are made, mounted, written to, and published.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::names::VolumeName;
use crate::cache::spec::BadOption;
use crate::cache::units::Bytes;
use crate::storage::{Store, StoreError};

/// What the engine is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where volumes are mounted: `DIR/NAME`.
    pub mount_dir: PathBuf,
    /// How many volumes are kept mounted, detached, while no container uses
    /// them. Each costs the kernel about 0.8 MB; beyond it a volume is only a
    /// snapshot, and its next Mount takes a mount(2) longer.
    pub premounted: usize,
    /// Size of the directory in memory that `on-error=scratch` gives where the
    /// volume names none.
    pub scratch_size: Bytes,
}

/// How the work in a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verdict {
    /// It succeeded.
    Success,
    /// It failed.
    Failure,
    /// Nobody said.
    #[default]
    Unknown,
}

/// A volume as Get and List show it.
#[derive(Debug, Clone)]
pub struct VolumeView {
    /// Its name.
    pub name: VolumeName,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// Where it is mounted, while it is.
    pub mountpoint: Option<PathBuf>,
    /// What was restored, from where, how old, how long it took, and what became
    /// of the last lease.
    pub status: serde_json::Map<String, serde_json::Value>,
}

/// A request that was refused or did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no such volume. The wording is the one that plugin clients expect.
    #[error("no volume with name {0} found")]
    NoSuchVolume(VolumeName),
    /// A volume of that name is there, with other options.
    #[error("volume {0} exists with other options")]
    Exists(VolumeName),
    /// An option is refused.
    #[error(transparent)]
    Option(#[from] BadOption),
    /// No criterion matches and the volume says `on-miss=fail`.
    #[error("no entry matches the criteria of volume {0}, and its on-miss is fail")]
    Miss(VolumeName),
    /// The engine is stopping and takes no new requests.
    #[error("the daemon is stopping")]
    Stopping,
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something else failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to what.
        what: String,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// The engine. Its calls block, and may be made from any thread; work that was
/// begun goes on when a caller loses interest.
#[derive(Debug)]
pub struct Engine {}

impl Engine {
    /// Reads the store and the mount table, takes up the leases that go on, and
    /// sets about what an earlier life left undone.
    ///
    /// # Errors
    /// When the store cannot be read or the mount directory cannot be made.
    pub fn start(store: Arc<dyn Store>, settings: Settings) -> Result<Arc<Self>, EngineError> {
        let _ = (store, settings);
        todo!("engine")
    }

    /// Makes a volume; no error where it is there with the same options.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn create(
        &self,
        name: &VolumeName,
        options: &BTreeMap<String, String>,
    ) -> Result<(), EngineError> {
        let _ = (name, options);
        todo!("engine")
    }

    /// Mounts a volume for the client `id` and gives the mountpoint.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn mount(&self, name: &VolumeName, id: &str) -> Result<PathBuf, EngineError> {
        let _ = (name, id);
        todo!("engine")
    }

    /// Ends the use of a volume by the client `id`; with the last one, the lease.
    /// Never fails, and returns within 4 seconds: what takes longer goes on behind it.
    pub fn unmount(&self, name: &VolumeName, id: &str) {
        let _ = (name, id);
        todo!("engine")
    }

    /// Removes a volume; a lease that goes on ends.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn remove(&self, name: &VolumeName) -> Result<(), EngineError> {
        let _ = name;
        todo!("engine")
    }

    /// A volume, from memory: never waits for the store.
    #[must_use]
    pub fn get(&self, name: &VolumeName) -> Option<VolumeView> {
        let _ = name;
        todo!("engine")
    }

    /// All volumes, from memory: never waits for the store.
    #[must_use]
    pub fn list(&self) -> Vec<VolumeView> {
        todo!("engine")
    }

    /// Takes no more requests, finishes what is under way within `bound`, and
    /// leaves visible mounts alone. `false`: something was left undone, and the
    /// next start takes it up.
    pub fn stop(&self, bound: Duration) -> bool {
        let _ = bound;
        todo!("engine")
    }
}
