// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `gc`: through the daemon where one runs, which knows best what is in use; else here.

use std::collections::HashMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Failure, failed, json as to_json, open, print};
use crate::cache::names::LvName;
use crate::cache::units::Bytes;
use crate::cli;
use crate::config::Settings;
use crate::engine::bounds::{self, Evicted};
use crate::http::client;
use crate::http::socket::{Lock, SocketError};
use crate::mount;
use crate::plugin::wire::Evictions;
use crate::storage::{Store, StoreError, Usage};
use crate::text::{age, rfc3339, unix_now};
use crate::views::table::{self, table};

/// How long the daemon may take: it removes one entry after the other.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3600);

/// `gc`.
///
/// # Errors
/// When the store cannot be read, or takes no change.
pub fn run(config: &Path, args: &cli::Gc) -> Result<(), Failure> {
    let (settings, store) = open(config)?;
    let daemon_runs = lock(&settings)?.is_none();
    let evicted = if daemon_runs {
        through_daemon(&settings, args.dry_run)?
    } else {
        evict(&settings, &*store, args.dry_run)?
    };
    if args.json {
        let rows: Vec<_> = evicted.iter().map(row).collect();
        return print(&to_json(&rows));
    }
    print(&lines(&evicted, unix_now(), table::width()))
}

/// Keeps daemons off the store; `None`: one has it.
fn lock(settings: &Settings) -> Result<Option<Lock>, Failure> {
    match settings.store.lock() {
        Ok(lock) => Ok(Some(lock)),
        Err(SocketError::Locked(_)) => Ok(None),
        Err(error) => Err(Failure::Failed(error.to_string())),
    }
}

fn through_daemon(settings: &Settings, dry_run: bool) -> Result<Vec<Evicted>, Failure> {
    let body = json!({ "DryRun": dry_run });
    let answer = client::call(&settings.socket, "Friend.Gc", &body, ANSWER_TIMEOUT)
        .map_err(|error| Failure::Failed(error.to_string()))?;
    let evictions: Evictions = serde_json::from_value(answer)
        .map_err(|error| Failure::Failed(format!("the daemon's answer: {error}")))?;
    Ok(evictions.evicted)
}

fn evict(settings: &Settings, store: &dyn Store, dry_run: bool) -> Result<Vec<Evicted>, Failure> {
    let usage = dry_run.then(|| store.usage().ok()).flatten();
    let mut gone = Vec::new();
    let mut waits = false;
    loop {
        if !dry_run && !store.begin_evicting()? {
            if !waits {
                eprintln!("another host evicts now: waiting for its end");
                waits = true;
            }
            thread::sleep(bounds::OTHERS_TURN);
            continue;
        }
        let round = evict_once(settings, store, usage.as_ref(), dry_run, &mut gone);
        if !dry_run {
            store.end_evicting();
        }
        if round? == Round::Last {
            return Ok(gone);
        }
        // How much that gave back shows only then.
        thread::sleep(store.lag());
    }
}

/// Whether another round of eviction may find more.
#[derive(PartialEq, Eq)]
enum Round {
    Last,
    More,
}

fn evict_once(
    settings: &Settings,
    store: &dyn Store,
    usage: Option<&HashMap<LvName, Usage>>,
    dry_run: bool,
    gone: &mut Vec<Evicted>,
) -> Result<Round, Failure> {
    let listing = store.list()?;
    let fleet = store.fleet()?;
    let mounts = mount::table().map_err(failed("the mount table"))?;
    // A daemon that does not run has no leases, and knows no better how the clock went.
    let (unused, none) = (HashMap::new(), Duration::ZERO);
    let entries = bounds::entries(&listing, fleet.as_ref(), &mounts, &unused, none);
    let capacity = &listing.capacity;
    let plan = bounds::plan(entries, capacity, &settings.policy, unix_now(), usage, None);
    let last = dry_run || plan.is_empty();
    for (lv, evicted) in plan {
        if !dry_run {
            // For one commit, and not to the end: a daemon that starts meanwhile finds what is marked, and goes on by
            // itself, as it does at each start.
            let Some(held) = lock(settings)? else {
                return Ok(Round::Last);
            };
            let marked = bounds::mark(store, &lv, &evicted)?;
            drop(held);
            let Some(marked) = marked else {
                continue;
            };
            remove(store, &lv, marked)?;
        }
        gone.push(evicted);
    }
    Ok(if last { Round::Last } else { Round::More })
}

fn remove(store: &dyn Store, lv: &LvName, marked: bool) -> Result<(), Failure> {
    match store.remove(lv) {
        // It is removed once it is free.
        Err(StoreError::Busy(_)) if marked => Ok(()),
        other => Ok(other?),
    }
}

fn row(evicted: &Evicted) -> Value {
    json!({
        "name": evicted.lv,
        "reason": evicted.reason,
        "scope": evicted.scope,
        "tags": evicted.tags,
        "created": rfc3339(evicted.created),
        "last_use": rfc3339(evicted.used),
        "exclusive": evicted.exclusive,
    })
}

fn lines(evicted: &[Evicted], now: u64, width: Option<usize>) -> String {
    if evicted.is_empty() {
        return "nothing to evict\n".to_owned();
    }
    let lines = evicted.iter().map(|evicted| {
        [
            evicted.lv.clone(),
            age(now, evicted.used),
            evicted
                .exclusive
                .map_or_else(|| "?".into(), |bytes| Bytes(bytes).to_string()),
            evicted.scope.clone().unwrap_or_else(|| "-".into()),
            evicted.tags.join(" "),
            evicted.reason.clone(),
        ]
    });
    let heads = ["LV", "LAST USE", "OWN", "SCOPE", "TAGS", "WHY"];
    table(heads, lines, width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_is_a_table() {
        assert_eq!(lines(&[], 0, None), "nothing to evict\n");
        let evicted = Evicted {
            lv: "friend-1".into(),
            reason: "more entries than 1".into(),
            scope: None,
            tags: vec!["linux".into(), "main".into()],
            created: 0,
            used: 3600,
            exclusive: Some(4096),
        };
        let want = "\
LV        LAST USE  OWN    SCOPE  TAGS        WHY
friend-1  2h        4 KiB  -      linux main  more entries than 1
";
        let text = lines(std::slice::from_ref(&evicted), 3 * 3600, None);
        assert_eq!(anstream::adapter::strip_str(&text).to_string(), want);
        let row = row(&evicted);
        assert_eq!(row["last_use"], "1970-01-01T01:00:00Z");
        assert_eq!(row["exclusive"], 4096);
    }
}
