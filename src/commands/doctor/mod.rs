// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doctor`: what a support thread would ask, asked of the host itself.
//!
//! `facts` gathers, and judges nothing; `checks` judges, and asks nobody. So each check is
//! a function of what was found, and all of it works with the daemon away, with Podman away
//! and with nothing prepared: what could not be found out is a fact like any other.

mod checks;
mod facts;

use std::path::Path;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::{Failure, json, print};
use crate::cli;
use crate::logging::{self, LogLevel};
use facts::Facts;

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Does not apply here, or could not be told.
    Skipped,
    /// Works, and should be known.
    Note,
    /// Something does not work, or will not.
    Wrong,
}

/// One thing that a check found. Scripts rely on these names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    finding: String,
    /// What to do about it.
    fix: Option<String>,
}

#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    wrong: usize,
    findings: &'a [Finding],
}

/// `doctor`.
///
/// # Errors
/// [`Failure::Failed`] when something is wrong, after all of it was said.
pub fn run(config: &Path, args: &cli::Doctor) -> Result<(), Failure> {
    logging::start(LogLevel::Error).map_err(Failure::Usage)?;
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::Failed("doctor needs to run as root".into()));
    }
    let findings = checks::all(&Facts::gather(config));
    let wrong = findings.iter().filter(|f| f.state == State::Wrong).count();
    if args.json {
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            wrong,
            findings: &findings,
        };
        print(&json(&report))?;
    } else {
        print(&text(&findings))?;
    }
    match wrong {
        0 => Ok(()),
        1 => Err(Failure::Failed("1 problem found".into())),
        wrong => Err(Failure::Failed(format!("{wrong} problems found"))),
    }
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for found in findings {
        let (word, style) = match found.state {
            State::Ok => ("ok", AnsiColor::Green.on_default()),
            State::Skipped => ("-", Style::new().dimmed()),
            State::Note => ("note", AnsiColor::Yellow.on_default()),
            State::Wrong => ("WRONG", AnsiColor::Red.on_default().bold()),
        };
        text.push_str(&format!(
            "{style}{word:<5}{style:#}  {:<13}  {}\n",
            found.check, found.finding
        ));
        if let Some(fix) = &found.fix {
            text.push_str(&format!("{:22}fix: {fix}\n", ""));
        }
    }
    text
}
