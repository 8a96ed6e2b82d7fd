// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `stats`: what the daemon has counted since it started.

use std::path::Path;

use serde_json::json as value;

use super::{ANSWER_TIMEOUT, Failure, json, watched};
use crate::cache::units::Bytes;
use crate::cli;
use crate::config::Settings;
use crate::engine::Hits;
use crate::http::client::{self, ClientError};
use crate::logging::{self, LogLevel};
use crate::plugin::wire::Stats;
use crate::text::{age, printable, rfc3339, unix_now};
use crate::views::table::{self, table};

/// `stats`.
///
/// # Errors
/// When no daemon runs: the numbers are in its memory.
pub fn run(config: &Path, args: &cli::Stats) -> Result<(), Failure> {
    logging::start(LogLevel::Warn).map_err(Failure::Usage)?;
    let settings = Settings::load(config)?;
    watched(&args.watch, || {
        let socket = &settings.socket;
        let said = client::call(socket, "Friend.Stats", &value!({}), ANSWER_TIMEOUT);
        let said = said.map_err(|error| {
            let help = match error {
                ClientError::NotRunning => {
                    ", and what is counted is in its memory; `lvm-cache-friend doctor` says why none runs"
                }
                _ => "",
            };
            Failure::Failed(format!("{}: {error}{help}", socket.display()))
        })?;
        let stats: Stats = serde_json::from_value(said)
            .map_err(|error| Failure::Failed(format!("the daemon's answer: {error}")))?;
        Ok(if args.json {
            json(&stats)
        } else {
            text(&stats, unix_now(), table::width())
        })
    })
}

fn text(answer: &Stats, now: u64, width: Option<usize>) -> String {
    let stats = &answer.stats;
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        text.push_str(&format!("{label:<11}{value}\n"));
    };
    let since = rfc3339(stats.since).unwrap_or_default();
    line(
        "daemon",
        format!(
            "{}, counts since {since} ({})",
            answer.version,
            age(now, stats.since)
        ),
    );
    if let Some(host) = &stats.host {
        line("host", printable(host).to_string());
    }
    line(
        "volumes",
        format!("{}, {} in use", stats.volumes, stats.leases),
    );
    line(
        "mounts",
        listed(stats.mounts.iter().map(|(how, n)| (how.as_str(), *n))),
    );
    line("hits", rates(stats.hits));
    if let (Some(p50), Some(p99)) = (stats.mount_p50_ms, stats.mount_p99_ms) {
        line(
            "mount time",
            format!(
                "p50 {p50} ms, p99 {p99} ms, of the last {}",
                stats.mounts_timed
            ),
        );
    }
    line(
        "restored",
        format!(
            "{} that jobs did not have to fetch or build",
            Bytes(stats.restored_bytes)
        ),
    );
    line("written", Bytes(stats.written_bytes).to_string());
    line("published", stats.published.to_string());
    for (label, counts) in [("not", &stats.unpublished), ("refused", &stats.refused)] {
        if !counts.is_empty() {
            line(
                label,
                listed(counts.iter().map(|(why, n)| (why.as_str(), *n))),
            );
        }
    }
    if stats.evicted > 0 {
        line("evicted", format!("{} entries", stats.evicted));
    }
    if stats.damaged > 0 {
        line("damaged", format!("{} entries given up", stats.damaged));
    }
    for failed in &stats.failures {
        line(
            "failed",
            format!(
                "{} ago: {}",
                age(now, failed.at),
                printable(&failed.message)
            ),
        );
    }
    if !stats.tags.is_empty() {
        let mut tags: Vec<_> = stats.tags.iter().collect();
        tags.sort_by_key(|(tag, hits)| (std::cmp::Reverse(hits.total()), *tag));
        let lines = tags.into_iter().map(|(tag, hits)| {
            let share = |n: u64| format!("{n} ({} %)", percent(n, hits.total()));
            [
                hits.total().to_string(),
                share(hits.exact),
                share(hits.fallback),
                share(hits.miss),
                tag.clone(),
            ]
        });
        text.push('\n');
        text.push_str(&table(
            ["MOUNTS", "EXACT", "FALLBACK", "MISS", "ASKED FOR"],
            lines,
            width,
        ));
    }
    text
}

fn listed<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> String {
    let words: Vec<_> = counts.map(|(what, n)| format!("{what} {n}")).collect();
    if words.is_empty() {
        "none".into()
    } else {
        words.join(", ")
    }
}

fn rates(hits: Hits) -> String {
    let total = hits.total();
    if total == 0 {
        return "no requests yet".into();
    }
    let share = |what, n| format!("{what} {n} ({} %)", percent(n, total));
    [
        share("exact", hits.exact),
        share("fallback", hits.fallback),
        share("miss", hits.miss),
    ]
    .join(", ")
}

/// Rounded.
fn percent(part: u64, whole: u64) -> u64 {
    (part * 100 + whole / 2) / whole.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine;

    #[test]
    fn what_people_read() {
        let hits = Hits {
            exact: 2,
            fallback: 0,
            miss: 1,
        };
        let stats = engine::Stats {
            since: 1_700_000_000,
            volumes: 3,
            leases: 1,
            mounts: [("exact".to_owned(), 2), ("base".to_owned(), 1)].into(),
            hits,
            tags: [
                ("abc".to_owned(), Hits { miss: 0, ..hits }),
                ("linux".to_owned(), hits),
            ]
            .into(),
            mounts_timed: 3,
            mount_p50_ms: Some(0.5),
            mount_p99_ms: Some(12.25),
            restored_bytes: 3 << 30,
            published: 1,
            evicted: 2,
            unpublished: [("the work failed".to_owned(), 1)].into(),
            ..engine::Stats::default()
        };
        let answer = Stats {
            version: "1.2.3".into(),
            pid: 7,
            stats,
        };
        let text = text(&answer, 1_700_003_600, None);
        let want = "\
daemon     1.2.3, counts since 2023-11-14T22:13:20Z (1h)
volumes    3, 1 in use
mounts     base 1, exact 2
hits       exact 2 (67 %), fallback 0 (0 %), miss 1 (33 %)
mount time p50 0.5 ms, p99 12.25 ms, of the last 3
restored   3 GiB that jobs did not have to fetch or build
written    0 B
published  1
not        the work failed 1
evicted    2 entries

MOUNTS  EXACT      FALLBACK  MISS      ASKED FOR
3       2 (67 %)   0 (0 %)   1 (33 %)  linux
2       2 (100 %)  0 (0 %)   0 (0 %)   abc
";
        assert_eq!(anstream::adapter::strip_str(&text).to_string(), want);
    }
}
