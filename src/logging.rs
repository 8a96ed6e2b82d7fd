// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log: to the journal in its own format when it is what standard error
//! goes to, else lines on standard error.

use clap::ValueEnum;
use nix::sys::stat::fstat;
use serde::Deserialize;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And problems that were worked around.
    Warn,
    /// And one line for each lease.
    #[default]
    Info,
    /// And each step.
    Debug,
    /// And everything.
    Trace,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

/// Starts logging at `level`; RUST_LOG (`info`, or `warn,lvm_cache_friend=trace`)
/// goes before it.
///
/// # Errors
/// When RUST_LOG does not parse.
pub fn start(level: LogLevel) -> Result<(), String> {
    start_to(stderr_is_journal(), level)
}

/// The same for a hook, whose standard error its caller throws away: to the journal
/// wherever there is one.
///
/// # Errors
/// As [`start`].
pub fn start_in_hook(level: LogLevel) -> Result<(), String> {
    start_to(true, level)
}

fn start_to(to_journal: bool, level: LogLevel) -> Result<(), String> {
    let level = LevelFilter::from(level);
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => text
            .parse()
            .map_err(|e| format!("RUST_LOG={text:?}: {e}"))?,
        // What the libraries say beyond warnings is for those who develop them.
        _ => Targets::new()
            .with_target("lvm_cache_friend", level)
            .with_default(level.min(LevelFilter::WARN)),
    };
    let registry = tracing_subscriber::registry().with(filter);
    if to_journal && let Ok(journal) = tracing_journald::layer() {
        registry
            .with(
                journal
                    .with_syslog_identifier("lvm-cache-friend".into())
                    // As everybody else's levels are named; its own are one higher.
                    .with_priority_mappings(PriorityMappings {
                        info: Priority::Informational,
                        debug: Priority::Debug,
                        ..PriorityMappings::new()
                    }),
            )
            .init();
    } else {
        let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
        registry
            .with(
                tracing_subscriber::fmt::layer()
                    .with_writer(std::io::stderr)
                    .with_target(false)
                    .with_ansi(ansi),
            )
            .init();
    }
    Ok(())
}

/// systemd.exec(5): `$JOURNAL_STREAM` has device and inode of the stream that
/// systemd connected; standard error may have been redirected since.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(std::io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}
