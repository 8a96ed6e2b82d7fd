// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `list`: the base, the entries, the volumes.

use std::path::Path;

use super::{Failure, failed, json, open, watched};
use crate::cache::units::Bytes;
use crate::cli;
use crate::mount;
use crate::storage::{Capacity, Listing, Store};
use crate::text::{age, unix_now};
use crate::views::rows::{Kind, Row, Rows};
use crate::views::table::{self, table};

/// `list`.
///
/// # Errors
/// When the store cannot be read.
pub fn run(config: &Path, args: &cli::List) -> Result<(), Failure> {
    let (_, store) = open(config)?;
    watched(&args.watch, || {
        let listing = store.list()?;
        let all = rows(&*store, &listing)?;
        for remark in all.remarks() {
            eprintln!("{remark}");
        }
        if args.json {
            return Ok(json(&all.rows));
        }
        let mut text = lines(&all.rows, unix_now(), table::width());
        text.push_str(&fill(store.name(), listing.capacity));
        Ok(text)
    })
}

/// All rows, with what usage the store can tell.
pub(super) fn rows(store: &dyn Store, listing: &Listing) -> Result<Rows, Failure> {
    let usage = store
        .usage()
        .inspect_err(|error| eprintln!("used space is unknown: {error}"))
        .ok();
    let mounts = mount::table().map_err(failed("the mount table"))?;
    Ok(Rows::new(listing, usage.as_ref(), &mounts))
}

fn fill(store: &str, capacity: Capacity) -> String {
    let mut text = format!(
        "{store}: {:.1} % of {} used",
        capacity.data_percent, capacity.data_size
    );
    if capacity.metadata_percent > 0.0 {
        text.push_str(&format!(", metadata {:.1} %", capacity.metadata_percent));
    }
    text.push('\n');
    text
}

fn lines(rows: &[Row], now: u64, width: Option<usize>) -> String {
    let heads = ["KIND", "LV", "AGE", "SIZE", "USED", "OWN", "SCOPE", "WHAT"];
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "?".into(), |b| Bytes(b).to_string());
    let lines = rows.iter().map(|row| {
        [
            row.kind.as_str().to_owned(),
            row.name.clone(),
            age(now, row.created_seconds),
            Bytes(row.size).to_string(),
            bytes(row.used),
            bytes(row.exclusive),
            row.scope.clone().unwrap_or_else(|| "-".into()),
            what(row),
        ]
    });
    table(heads, lines, width)
}

fn what(row: &Row) -> String {
    let mut words: Vec<String> = row.cache_tags.iter().map(ToString::to_string).collect();
    if row.pinned {
        words.push("(pinned)".into());
    }
    if let Some(volume) = &row.volume {
        words.push(volume.clone());
    }
    if let Some(from) = &row.from
        && row.kind == Kind::Volume
    {
        words.push(format!("from {from}"));
    }
    if let Some(at) = &row.mountpoint {
        words.push(format!("at {}", at.display()));
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: Kind, name: &str) -> Row {
        Row {
            kind,
            name: name.into(),
            volume: None,
            tags: Vec::new(),
            scope: None,
            created: None,
            size: 1 << 30,
            used: Some(5 << 20),
            exclusive: Some(1 << 20),
            origin: None,
            from: None,
            pinned: kind == Kind::Entry,
            last_use: None,
            mounted: false,
            mountpoint: None,
            seq: 0,
            created_seconds: 940,
            cache_tags: Vec::new(),
        }
    }

    #[test]
    fn what_is_told_of_each() {
        let mut entry = row(Kind::Entry, "friend-1");
        entry.cache_tags = ["linux", "main"].map(|t| t.parse().expect("a tag")).into();
        let rows = [row(Kind::Base, "friend-base"), entry];
        let want = "\
KIND   LV           AGE  SIZE   USED   OWN    SCOPE  WHAT
base   friend-base  1m   1 GiB  5 MiB  1 MiB  -
entry  friend-1     1m   1 GiB  5 MiB  1 MiB  -      linux main (pinned)
";
        let text = lines(&rows, 1000, None);
        assert_eq!(anstream::adapter::strip_str(&text).to_string(), want);
    }
}
