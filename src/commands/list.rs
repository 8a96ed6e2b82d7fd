// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `list`: the base, the entries, the volumes.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Failure, failed, json, open, watched};
use crate::cache::units::Bytes;
use crate::cli;
use crate::mount;
use crate::storage::hosts::Fleet;
use crate::storage::{Capacity, Listing, Store};
use crate::text::{age, unix_now};
use crate::views::rows::{Kind, Row, Rows, short_host};
use crate::views::table::{self, table};

/// `list`.
///
/// # Errors
/// When the store cannot be read.
pub fn run(config: &Path, args: &cli::List) -> Result<(), Failure> {
    let (_, store) = open(config)?;
    watched(&args.watch, || {
        let mut listing = store.list()?;
        let fleet = store.fleet()?;
        let host = match (&fleet, &args.host) {
            (Some(fleet), Some(wanted)) => Some(find_host(fleet, wanted)?),
            (None, Some(_)) => {
                let alone = format!("{} is this host's alone: see docs/fleet.md", store.name());
                return Err(Failure::Usage(alone));
            }
            _ => None,
        };
        if let Some(fleet) = &fleet
            && (args.all_hosts || host.is_some())
        {
            listing.lvs = fleet.lvs.iter().map(|of| of.lv.clone()).collect();
        }
        let mut all = rows(&*store, &listing, fleet.as_ref())?;
        if host.is_some() {
            all.rows.retain(|row| row.host == host);
        }
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

/// The id of the host that is meant by its beginning.
fn find_host(fleet: &Fleet, wanted: &str) -> Result<String, Failure> {
    let all: BTreeSet<&str> = (fleet.hosts.iter().map(|host| host.id.as_str()))
        .chain(fleet.lvs.iter().filter_map(|of| of.host.as_deref()))
        .chain([fleet.me.as_str()])
        .collect();
    let mut meant = all.iter().filter(|host| host.starts_with(wanted));
    if all.contains(wanted) {
        return Ok(wanted.to_owned());
    }
    match (meant.next(), meant.next()) {
        (Some(host), None) => Ok((*host).to_owned()),
        (Some(_), Some(_)) => Err(Failure::Usage(format!(
            "{wanted}: several hosts' ids begin so: {}",
            listed(&all)
        ))),
        (None, _) => Err(Failure::NotFound(format!(
            "{wanted}: no host of that id; there are: {}",
            listed(&all)
        ))),
    }
}

fn listed(hosts: &BTreeSet<&str>) -> String {
    hosts.iter().copied().collect::<Vec<_>>().join(", ")
}

/// All rows, with what usage the store can tell.
pub(super) fn rows(
    store: &dyn Store,
    listing: &Listing,
    fleet: Option<&Fleet>,
) -> Result<Rows, Failure> {
    let usage = store
        .usage()
        .inspect_err(|error| eprintln!("used space is unknown: {error}"))
        .ok();
    let mounts = mount::table().map_err(failed("the mount table"))?;
    let mut rows = Rows::new(listing, usage.as_ref(), &mounts);
    if let Some(fleet) = fleet {
        rows.tell_hosts(fleet);
    }
    Ok(rows)
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
    let hosts = rows.iter().any(|row| row.host.is_some());
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
    if !hosts {
        return table(heads, lines, width);
    }
    let lines = lines.zip(rows).map(|(line, row)| {
        let host = row.host.as_deref().map_or("-", short_host);
        with_host(line, host.to_owned())
    });
    table(with_host(heads, "HOST"), lines, width)
}

/// A line of a fleet's table: the host stands third.
fn with_host<T>(line: [T; 8], host: T) -> [T; 9] {
    let [kind, lv, age, size, used, own, scope, what] = line;
    [kind, lv, host, age, size, used, own, scope, what]
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
    use crate::storage::hosts::Host;

    fn row(kind: Kind, name: &str) -> Row {
        Row {
            kind,
            name: name.into(),
            volume: None,
            host: None,
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

    #[test]
    fn what_is_told_of_hosts() {
        let mut entry = row(Kind::Entry, "friend-1");
        entry.host = Some("0123456789abcdef0123456789abcdef".to_owned());
        let rows = [row(Kind::Base, "friend-base"), entry];
        let want = "\
KIND   LV           HOST          AGE  SIZE   USED   OWN    SCOPE  WHAT
base   friend-base  -             1m   1 GiB  5 MiB  1 MiB  -
entry  friend-1     0123456789ab  1m   1 GiB  5 MiB  1 MiB  -      (pinned)
";
        let text = lines(&rows, 1000, None);
        assert_eq!(anstream::adapter::strip_str(&text).to_string(), want);
        let json = serde_json::to_value(&rows).expect("plain data");
        assert_eq!(json[1]["host"], "0123456789abcdef0123456789abcdef");
        assert!(json[0].get("host").is_none());
    }

    #[test]
    fn hosts_by_how_they_begin() {
        let host = |id: &str| Host {
            id: id.to_owned(),
            lost: false,
        };
        let fleet = Fleet {
            me: "me".to_owned(),
            hosts: vec![host("ab"), host("abc"), host("b1"), host("b2")],
            lvs: Vec::new(),
        };
        let found = |wanted| find_host(&fleet, wanted).ok();
        for (wanted, host) in [("ab", "ab"), ("abc", "abc"), ("m", "me"), ("b2", "b2")] {
            assert_eq!(found(wanted).as_deref(), Some(host));
        }
        assert!(matches!(find_host(&fleet, "b"), Err(Failure::Usage(_))));
        assert!(matches!(find_host(&fleet, "x"), Err(Failure::NotFound(_))));
    }
}
