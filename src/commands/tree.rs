// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tree`: what was made from what.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::json as value;

use super::list::rows;
use super::{ANSWER_TIMEOUT, Failure, json, open, watched};
use crate::cache::lineage::{Line, What, draw};
use crate::cache::units::Bytes;
use crate::cli;
use crate::http::client::{self, ClientError};
use crate::plugin::wire::Stats;
use crate::text::{age, unix_now};
use crate::views::rows::{Kind, Row, short_host};
use crate::views::table::{self, table};

/// One object of `tree --json`, each before what was made from it.
#[derive(Serialize)]
struct Node<'a> {
    #[serde(flatten)]
    row: &'a Row,
    /// How often it was restored from since the daemon started; none where none runs.
    hits: Option<u64>,
    /// The column that it is drawn in.
    column: usize,
}

/// `tree`.
///
/// # Errors
/// When the store cannot be read.
pub fn run(config: &Path, args: &cli::Tree) -> Result<(), Failure> {
    let (settings, store) = open(config)?;
    watched(&args.watch, || {
        let fleet = store.fleet()?;
        let mut rows = rows(&*store, &store.list()?, fleet.as_ref())?.rows;
        rows.retain(|row| row.kind != Kind::Volume);
        rows.sort_by_key(|row| row.seq);
        let hits = hits(&settings.socket)?;
        let pairs: Vec<_> = rows
            .iter()
            .map(|row| (row.name.as_str(), row.from.as_deref()))
            .collect();
        let lines = draw(&pairs);
        Ok(if args.json {
            let nodes = lines.iter().filter_map(|line| match line.what {
                What::One(at) => Some(Node {
                    row: &rows[at],
                    hits: of(hits.as_ref(), &rows[at]),
                    column: line.column,
                }),
                What::Gone(_) => None,
            });
            json(&nodes.collect::<Vec<_>>())
        } else {
            text(&lines, &rows, hits.as_ref(), unix_now())
        })
    })
}

type Counts = BTreeMap<String, u64>;

/// What the daemon counted; `None` where none runs.
fn hits(socket: &Path) -> Result<Option<Counts>, Failure> {
    match client::call(socket, "Friend.Stats", &value!({}), ANSWER_TIMEOUT) {
        Ok(said) => Ok(serde_json::from_value::<Stats>(said)
            .ok()
            .map(|said| said.stats.entries)),
        Err(ClientError::NotRunning) => Ok(None),
        Err(error) => Err(Failure::Failed(error.to_string())),
    }
}

fn of(hits: Option<&Counts>, row: &Row) -> Option<u64> {
    Some(hits?.get(&row.name).copied().unwrap_or(0))
}

fn text(lines: &[Line<'_>], rows: &[Row], hits: Option<&Counts>, now: u64) -> String {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "?".into(), |b| Bytes(b).to_string());
    let lines = lines.iter().map(|line| match line.what {
        What::Gone(name) => {
            let empty = [const { String::new() }; 4];
            let [hits, used, own, age] = empty;
            [
                hits,
                used,
                own,
                age,
                format!("{} {name} (gone)", line.prefix()),
            ]
        }
        What::One(at) => {
            let row = &rows[at];
            let mut words = vec![line.prefix(), row.name.clone()];
            if row.kind == Kind::Base {
                words.push("base".into());
            }
            words.extend(row.cache_tags.iter().map(ToString::to_string));
            words.extend(row.scope.as_ref().map(|scope| format!("({scope})")));
            words.extend(row.pinned.then(|| "(pinned)".to_owned()));
            let by = row.host.as_deref().filter(|_| row.kind == Kind::Entry);
            words.extend(by.map(|host| format!("by {}", short_host(host))));
            [
                of(hits, row).map_or_else(|| "-".into(), |hits| hits.to_string()),
                bytes(row.used),
                bytes(row.exclusive),
                age(now, row.created_seconds),
                words.join(" "),
            ]
        }
    });
    table(
        ["HITS", "USED", "OWN", "AGE", "LINEAGE"],
        lines,
        table::width(),
    )
}
