// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `show`: all there is to know of one volume or logical volume.

use std::collections::HashMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::list::rows;
use super::{ANSWER_TIMEOUT, Failure, open, print};
use crate::cache::names::{Tag, unescape};
use crate::cache::record::Role;
use crate::cache::spec::Spec;
use crate::cache::tags::OPT;
use crate::cache::units::Bytes;
use crate::cli;
use crate::config::Settings;
use crate::http::client;
use crate::storage::{Listing, Lv};
use crate::text::{age, unix_now};
use crate::views::rows::Row;

/// How far lineage is followed.
const MAX_LINEAGE: usize = 64;

#[derive(Serialize)]
struct Story {
    #[serde(flatten)]
    row: Row,
    /// The volume's options.
    options: Option<Map<String, Value>>,
    /// A lease began and is not settled yet.
    leased: bool,
    /// What it was made from, and that from, newest first.
    lineage: Vec<Ancestor>,
    /// What was made from it and is still there.
    descendants: Vec<String>,
    /// What the daemon says of the volume's leases; none where none runs.
    status: Option<Value>,
}

#[derive(Serialize)]
struct Ancestor {
    name: String,
    /// Still in the store.
    present: bool,
}

/// `show`.
///
/// # Errors
/// [`Failure::NotFound`] when there is nothing of that name.
pub fn run(config: &Path, args: &cli::Show) -> Result<(), Failure> {
    let (settings, store) = open(config)?;
    let listing = store.list()?;
    let all = rows(&*store, &listing, store.fleet()?.as_ref())?;
    let named: Vec<_> = all
        .rows
        .into_iter()
        .filter(|row| row.volume.as_ref() == Some(&args.name) || row.name == args.name)
        .collect();
    if named.is_empty() {
        return Err(absent(&listing, &args.name, store.name()));
    }
    let stories: Vec<_> = named
        .into_iter()
        .map(|row| story(row, &listing, &settings))
        .collect();
    if args.json {
        // A volume has a second logical volume only while its last lease is settled.
        let json = serde_json::to_string_pretty(&stories[0]).expect("plain data");
        return print(&format!("{json}\n"));
    }
    let texts: Vec<_> = stories
        .iter()
        .map(|story| lines(story, unix_now()))
        .collect();
    print(&texts.join("\n"))
}

/// Why there is nothing to show or remove under `name`.
pub(super) fn absent(listing: &Listing, name: &str, store: &str) -> Failure {
    let lv = listing.lvs.iter().find(|lv| lv.name.as_str() == name);
    match lv.map(|lv| Role::from_tags(&lv.tags)) {
        Some(Role::Unclear(reason)) => Failure::Failed(format!(
            "{name}: left alone, as it is not clearly ours: {reason}"
        )),
        Some(Role::Foreign) => Failure::NotFound(format!("{name}: in {store}, but not ours")),
        Some(Role::Doomed) => Failure::NotFound(format!("{name}: being removed")),
        Some(Role::Making) => Failure::Failed(format!(
            "{name}: being imported, or left over from an import"
        )),
        Some(Role::Plain) => Failure::Failed(format!("{name}: a snapshot without cache tags")),
        _ => Failure::NotFound(format!(
            "{name}: no volume or logical volume of that name in {store}"
        )),
    }
}

fn story(row: Row, listing: &Listing, settings: &Settings) -> Story {
    let by_name: HashMap<&str, &Lv> = listing
        .lvs
        .iter()
        .map(|lv| (lv.name.as_str(), lv))
        .collect();
    let role = |name: &str| by_name.get(name).map(|lv| Role::from_tags(&lv.tags));
    let (options, leased) = match role(&row.name) {
        Some(Role::Volume { spec, lease, .. }) => (Some(options(&spec)), lease.is_some()),
        _ => (None, false),
    };
    let mut lineage = Vec::new();
    let mut next = row.from.clone();
    while let Some(name) = next.take()
        && lineage.len() < MAX_LINEAGE
    {
        next = role(&name).as_ref().and_then(from).map(str::to_owned);
        lineage.push(Ancestor {
            present: by_name.contains_key(name.as_str()),
            name,
        });
    }
    let descendants = listing
        .lvs
        .iter()
        .filter(|lv| from(&Role::from_tags(&lv.tags)) == Some(&row.name))
        .map(|lv| lv.name.to_string())
        .collect();
    let status = row.volume.as_ref().and_then(|name| {
        let answer = client::call(
            &settings.socket,
            "VolumeDriver.Get",
            &json!({ "Name": name }),
            ANSWER_TIMEOUT,
        );
        answer.ok()?.pointer("/Volume/Status").cloned()
    });
    Story {
        row,
        options,
        leased,
        lineage,
        descendants,
        status,
    }
}

fn from(role: &Role) -> Option<&str> {
    match role {
        Role::Entry { from, .. } | Role::Volume { from, .. } => from.as_ref().map(|f| f.as_str()),
        _ => None,
    }
}

/// The options that make `spec`, as `podman volume create -o` takes them; those
/// that are at their defaults are left out.
fn options(spec: &Spec) -> Map<String, Value> {
    let mut options = Map::new();
    let mut add = |name: &str, value: String| {
        if !value.is_empty() {
            options.insert(name.to_owned(), Value::String(value));
        }
    };
    add("restore", spec.restore.to_string());
    let save: Vec<_> = spec.save.iter().map(Tag::as_str).collect();
    add("save", save.join(" "));
    add(
        "scope",
        spec.scope.as_ref().map_or_else(String::new, Tag::to_string),
    );
    for tag in spec.to_tags() {
        if let Some((name, value)) = tag
            .as_str()
            .strip_prefix(OPT)
            .and_then(|rest| rest.split_once('='))
        {
            add(name, unescape(value).unwrap_or_default());
        }
    }
    options
}

fn lines(story: &Story, now: u64) -> String {
    let row = &story.row;
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        text.push_str(&format!("{label:<12} {value}\n"));
    };
    line("kind", row.kind.as_str());
    if let Some(volume) = &row.volume {
        line("volume", volume);
    }
    line("LV", &row.name);
    if let Some(host) = &row.host {
        line("host", host);
    }
    if let Some(created) = &row.created {
        line(
            "created",
            &format!("{created} ({} ago)", age(now, row.created_seconds)),
        );
    }
    line("size", &Bytes(row.size).to_string());
    if let (Some(used), Some(exclusive)) = (row.used, row.exclusive) {
        line(
            "used",
            &format!("{}, of which exclusive {}", Bytes(used), Bytes(exclusive)),
        );
    }
    if let Some(scope) = &row.scope {
        line("scope", scope);
    }
    if row.pinned {
        line("pinned", "yes: never evicted");
    }
    if let Some(last_use) = &row.last_use {
        line("last used", &format!("{last_use}, or up to an hour later"));
    }
    if !row.cache_tags.is_empty() {
        let tags: Vec<_> = row.cache_tags.iter().map(Tag::as_str).collect();
        line("matched by", &tags.join(" "));
    }
    for (name, value) in story.options.iter().flatten() {
        line("option", &format!("{name}={}", plain(value)));
    }
    if let Some(at) = &row.mountpoint {
        line("mounted at", &at.display().to_string());
    }
    if story.leased && !row.mounted {
        line("lease", "open, or not settled yet");
    }
    for ancestor in &story.lineage {
        let gone = if ancestor.present { "" } else { " (gone)" };
        line("from", &format!("{}{gone}", ancestor.name));
    }
    for descendant in &story.descendants {
        line("made from it", descendant);
    }
    if let Some(Value::Object(status)) = &story.status {
        for (name, value) in status {
            line("status", &format!("{name}: {}", plain(value)));
        }
    }
    for tag in &row.tags {
        line("tag", tag);
    }
    text
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn options_are_those_that_were_given() {
        let given: BTreeMap<String, String> = [
            ("restore", "linux main; linux; npm-*"),
            ("save", "linux main"),
            ("scope", "acme/app"),
            ("on-miss", "empty"),
            ("owner", "1000:1000"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let spec = Spec::parse(&given).expect("valid");
        let shown = options(&spec);
        let again: BTreeMap<String, String> = shown
            .iter()
            .map(|(name, value)| (name.clone(), plain(value)))
            .collect();
        assert_eq!(Spec::parse(&again).expect("valid"), spec);
        assert_eq!(
            again.keys().collect::<Vec<_>>(),
            given.keys().collect::<Vec<_>>()
        );
    }
}
