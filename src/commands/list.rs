//! `list`: the base, the entries, the volumes.

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use terminal_size::terminal_size;

use super::rows::{Row, Rows, age};
use super::{Failure, failed, open, print};
use crate::cache::units::Bytes;
use crate::cli;
use crate::mount;
use crate::storage::{Capacity, Listing, Store};

/// `list`.
///
/// # Errors
/// When the store cannot be read.
pub fn run(config: &Path, args: &cli::List) -> Result<(), Failure> {
    let (_, store) = open(config)?;
    let listing = store.list()?;
    let all = rows(&*store, &listing)?;
    for remark in all.remarks() {
        eprintln!("{remark}");
    }
    if args.json {
        let json = serde_json::to_string_pretty(&all.rows).expect("plain data");
        return print(&format!("{json}\n"));
    }
    let width = io::stdout()
        .is_terminal()
        .then(terminal_size)
        .flatten()
        .map(|(width, _)| usize::from(width.0));
    let mut text = table(&all.rows, now(), width);
    text.push_str(&fill(store.name(), listing.capacity));
    print(&text)
}

/// All rows, with what usage the store can tell.
pub(super) fn rows(store: &dyn Store, listing: &Listing) -> Result<Rows, Failure> {
    let usage = store
        .usage()
        .inspect_err(|error| eprintln!("space used is not known: {error}"))
        .ok();
    let mounts = mount::table().map_err(failed("the mount table"))?;
    Ok(Rows::new(listing, usage.as_ref(), &mounts))
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
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

/// The rows as a table. With a width, the last column is cut to it.
fn table(rows: &[Row], now: u64, width: Option<usize>) -> String {
    let heads = ["KIND", "LV", "AGE", "SIZE", "USED", "SCOPE", "WHAT"].map(String::from);
    let lines: Vec<_> = std::iter::once(heads)
        .chain(rows.iter().map(|row| {
            [
                row.kind.as_str().to_owned(),
                row.name.clone(),
                age(now, row.created_seconds),
                Bytes(row.size).to_string(),
                row.used
                    .map_or_else(|| "?".into(), |used| Bytes(used).to_string()),
                row.scope.clone().unwrap_or_else(|| "-".into()),
                what(row),
            ]
        }))
        .collect();
    let mut widths = [0; 6];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let mut out = String::new();
        for (cell, width) in line.iter().zip(widths) {
            out.push_str(&format!("{cell:width$}  "));
        }
        out.push_str(&line[6]);
        if let Some(width) = width
            && out.chars().count() > width
        {
            out = out.chars().take(width.saturating_sub(1)).collect();
            out.push('…');
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

fn what(row: &Row) -> String {
    let mut words: Vec<String> = row.cache_tags.iter().map(ToString::to_string).collect();
    if let Some(volume) = &row.volume {
        words.push(volume.clone());
    }
    if let Some(from) = &row.from
        && row.kind == super::rows::Kind::Volume
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
    use super::super::rows::Kind;
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
            exclusive: None,
            origin: None,
            from: None,
            mounted: false,
            mountpoint: None,
            seq: 0,
            created_seconds: 940,
            cache_tags: Vec::new(),
        }
    }

    #[test]
    fn columns_line_up_and_are_cut() {
        let mut entry = row(Kind::Entry, "friend-1");
        entry.cache_tags = ["linux", "main"].map(|t| t.parse().expect("a tag")).into();
        let rows = [row(Kind::Base, "friend-base"), entry];
        let want = "\
KIND   LV           AGE  SIZE   USED   SCOPE  WHAT
base   friend-base  1m   1 GiB  5 MiB  -
entry  friend-1     1m   1 GiB  5 MiB  -      linux main
";
        assert_eq!(table(&rows, 1000, None), want);
        let narrow = table(&rows, 1000, Some(50));
        assert!(narrow.ends_with("-      lin…\n"), "{narrow}");
        assert!(narrow.lines().all(|line| line.chars().count() <= 50));
    }
}
