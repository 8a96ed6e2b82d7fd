//! What the commands do. Each reads the store itself: none but `remove` of a
//! volume and `hook` needs the daemon, or cares whether one runs.

pub mod hook;
pub mod import;
pub mod init;
pub mod list;
pub mod remove;
mod rows;
pub mod runners;
pub mod show;

use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::cli;
use crate::config::{ConfigError, Settings};
use crate::logging::LogLevel;
use crate::storage::{Store, StoreError};
use crate::{logging, serve};

/// How long a command waits for the daemon's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A command did not do what it was asked to; each kind has an exit code.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Exit code 3.
    #[error("{0}")]
    NotFound(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.to_string())
    }
}

fn failed(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::Failed(format!("{what}: {error}"))
}

/// `serve`.
///
/// # Errors
/// When the daemon cannot be brought up.
pub fn serve(config: &Path, args: &cli::Serve) -> Result<(), Failure> {
    let settings = Settings::load(config)?;
    logging::start(args.log_level.unwrap_or(settings.log_level)).map_err(Failure::Usage)?;
    serve::run(&settings).map_err(|error| Failure::Failed(error.to_string()))
}

/// The configuration, and the store that it names.
fn open(config: &Path) -> Result<(Settings, Arc<dyn Store>), Failure> {
    logging::start(LogLevel::Warn).map_err(Failure::Usage)?;
    let settings = Settings::load(config)?;
    let store = settings.store.open()?;
    Ok((settings, store))
}

/// Writes to standard output. A reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(failed("standard output")(error))
        }
        _ => Ok(()),
    }
}
