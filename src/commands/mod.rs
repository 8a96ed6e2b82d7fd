// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the commands do. Those that show or change entries read the store itself, whether or not a daemon runs. Through the
//! daemon alone: `stats` and `hook`; through it where one runs, for it knows what is in use: `gc` and `remove` of a volume.
//! `runners` asks the supervisor.

pub mod doctor;
pub mod gc;
pub mod generate;
pub mod hook;
pub mod import;
pub mod init;
pub mod list;
pub mod pin;
pub mod remove;
pub mod runners;
pub mod show;
pub mod stats;
pub mod tree;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::cli;
use crate::config::{ConfigError, Settings};
use crate::logging;
use crate::logging::LogLevel;
use crate::storage::{Store, StoreError};

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

/// The configuration, and the store that it names.
fn open(config: &Path) -> Result<(Settings, Arc<dyn Store>), Failure> {
    logging::start(LogLevel::Warn).map_err(Failure::Usage)?;
    let settings = Settings::load(config)?;
    let store = settings.store.open()?;
    Ok((settings, store))
}

/// Writes to standard output. A reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), Failure> {
    written(text).map(|_| ())
}

/// Prints what `view` gives: once, or again every so many seconds, as long as somebody reads.
fn watched(
    watch: &cli::Watch,
    mut view: impl FnMut() -> Result<String, Failure>,
) -> Result<(), Failure> {
    loop {
        let text = view()?;
        if watch.seconds.is_some() && io::stdout().is_terminal() {
            // Cleared, with the cursor at the top; not a style, so NO_COLOR has no say in it.
            let _ = io::stdout().write_all(b"\x1b[2J\x1b[H");
        }
        let (true, Some(seconds)) = (written(&text)?, watch.seconds) else {
            return Ok(());
        };
        thread::sleep(Duration::from_secs(seconds));
    }
}

/// Writes to standard output; `false`: nobody reads any more.
fn written(text: &str) -> Result<bool, Failure> {
    // Styles are for terminals, and not for those who set NO_COLOR.
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(failed("standard output")(error)),
    }
}

/// `value` as JSON, with a line's end.
fn json(value: &impl serde::Serialize) -> String {
    let json = serde_json::to_string_pretty(value).expect("plain data");
    format!("{json}\n")
}
