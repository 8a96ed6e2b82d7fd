// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a request fails.

use std::io;
use std::path::{Path, PathBuf};

use super::volume::Phase;
use crate::cache::names::VolumeName;
use crate::cache::spec::BadOption;
use crate::storage::StoreError;

/// A request that was refused or did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no such volume. The wording is the one that plugin clients expect.
    #[error("no volume with name {0} found")]
    NoSuchVolume(VolumeName),
    /// A volume of that name is there, with other options.
    #[error("volume {0} exists with other options")]
    Exists(VolumeName),
    /// A volume is in use.
    #[error(
        "volume {name} is in use by {users}, mounted at {}: stop that first; or have it taken away by `lvm-cache-friend remove --force {name}`",
        at.display()
    )]
    InUse {
        /// Which.
        name: VolumeName,
        /// Who uses it.
        users: String,
        /// Where it is mounted.
        at: PathBuf,
    },
    /// An option is refused.
    #[error(transparent)]
    Option(#[from] BadOption),
    /// No criterion matches and the volume says `on-miss=fail`.
    #[error("no entry matches the restore keys of volume {0}, and its on-miss is fail")]
    Miss(VolumeName),
    /// What a volume starts from has more than the size that it asks for.
    #[error("{0}")]
    TooLarge(String),
    /// The engine is stopping and takes no new requests.
    #[error("the daemon is stopping")]
    Stopping,
    /// What a volume starts from is damaged.
    #[error("{0}")]
    Damaged(String),
    /// A job asked for what it cannot have.
    #[error("{0}")]
    Job(String),
    /// The store did not serve.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something else failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to what.
        what: String,
        /// What the operating system said.
        source: io::Error,
    },
}

/// A Mount that did not succeed, and what the volume goes on from.
pub(super) struct Refusal {
    pub phase: Phase,
    pub error: EngineError,
}

pub(super) type Refused = Box<Refusal>;

pub(super) fn refuse(phase: Phase, error: EngineError) -> Refused {
    Box::new(Refusal { phase, error })
}

pub(super) fn io_error(doing: &str, to: &Path, source: io::Error) -> EngineError {
    EngineError::Io {
        what: format!("{doing} {}", to.display()),
        source,
    }
}
