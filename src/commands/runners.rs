// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `supervise` and `runners`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Failure, failed, print};
use crate::api::runners::Row;
use crate::cli::{self, RunnersCommand};
use crate::config::Settings;
use crate::http::client::{self, ClientError};
use crate::logging;
use crate::supervisor::config::Supervise;
use crate::supervisor::run;
use crate::text::{printable_lines, roughly};

/// For the supervisor's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// `supervise`.
///
/// # Errors
/// When the configuration is refused, or the supervisor cannot be brought up.
pub fn supervise(config: &Path, args: &cli::Supervise) -> Result<(), Failure> {
    let settings = Settings::load(config)?;
    let supervise = Supervise::load(config)?;
    run::keep_out_of_dumps().map_err(failed("keeping secrets out of core dumps"))?;
    if args.check {
        return run::check(&settings, &supervise).map_err(|e| Failure::Failed(e.to_string()));
    }
    logging::start(args.log_level.unwrap_or(settings.log_level)).map_err(Failure::Usage)?;
    run::run(&settings, &supervise).map_err(|error| Failure::Failed(error.to_string()))
}

/// `runners`.
///
/// # Errors
/// When no supervisor answers, or it refuses.
pub fn runners(config: &Path, args: &cli::Runners) -> Result<(), Failure> {
    let socket = Supervise::load(config)?.control_socket;
    let ask = |endpoint: &str, body: Value| {
        client::call(&socket, endpoint, &body, ANSWER_TIMEOUT).map_err(|error| match error {
            ClientError::Refused {
                status: 404,
                message,
            } => Failure::NotFound(message),
            ClientError::NotRunning => {
                Failure::Failed(format!("no supervisor answers on {}", socket.display()))
            }
            error => Failure::Failed(error.to_string()),
        })
    };
    match &args.command {
        RunnersCommand::List { pool, json } => {
            let answer = ask("Runners.List", json!({"pool": pool}))?;
            if *json {
                return print(&format!("{answer}\n"));
            }
            let rows: Vec<Row> =
                serde_json::from_value(answer).map_err(|e| Failure::Failed(e.to_string()))?;
            print(&printable_lines(&table(&rows)))
        }
        RunnersCommand::Pause { pool } => ask("Runners.Pause", json!({"pool": pool})).map(drop),
        RunnersCommand::Resume { pool } => ask("Runners.Resume", json!({"pool": pool})).map(drop),
        RunnersCommand::Drain { now } => ask("Runners.Drain", json!({"now": now})).map(drop),
        RunnersCommand::Logs { runner, lines } => {
            let answer = ask("Runners.Logs", json!({"runner": runner, "lines": lines}))?;
            // What a job has printed.
            print(&printable_lines(answer.as_str().unwrap_or_default()))
        }
    }
}

fn table(rows: &[Row]) -> String {
    let width =
        |of: fn(&Row) -> usize, least: usize| rows.iter().map(of).max().unwrap_or(0).max(least);
    let slot = width(|row| row.slot.len(), 4);
    let runner = width(|row| row.runner.len(), 6);
    let mut text = format!(
        "{:slot$}  {:8}  {:runner$}  {:>8}  {:>6}  {:7}  JOB\n",
        "SLOT", "STATE", "RUNNER", "AGE", "CACHES", "LAST"
    );
    for row in rows {
        let caches = format!("{}/{}", row.hits, row.caches);
        let last = row.last.as_deref().unwrap_or("-");
        let age = roughly(row.age);
        let _ = writeln!(
            text,
            "{:slot$}  {:8}  {:runner$}  {age:>8}  {caches:>6}  {last:7}  {}",
            row.slot, row.state, row.runner, row.job
        );
    }
    for row in rows {
        if let Some(url) = &row.url {
            let _ = writeln!(text, "{}: {url}", row.slot);
        }
    }
    // Slots of a pool have the same as a rule.
    let mut last = None;
    for row in rows {
        if let Some(problem) = &row.problem
            && last != Some(problem)
        {
            let _ = writeln!(text, "{}: {problem}", row.slot);
            last = Some(problem);
        }
    }
    text
}
