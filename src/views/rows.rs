// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the store holds, as people and scripts are shown it.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::cache::names::{LvName, Tag};
use crate::cache::record::{Role, place};
use crate::mount::MountPoint;
use crate::storage::hosts::Fleet;
use crate::storage::{Listing, Lv, Usage};
use crate::text::rfc3339;

/// What a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Base,
    Entry,
    Volume,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Entry => "entry",
            Self::Volume => "volume",
        }
    }
}

/// One object of `list --json`. Scripts rely on each of these names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    pub kind: Kind,
    /// The logical volume.
    pub name: String,
    /// The volume's name; none of an entry, nor of a volume that was removed while
    /// its last lease was being settled.
    pub volume: Option<String>,
    /// Of a fleet: the id of the host that has the volume, or published the entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// As the store has them.
    pub tags: Vec<String>,
    pub scope: Option<String>,
    /// RFC 3339.
    pub created: Option<String>,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes that it maps, shared ones included; none where the store could not
    /// tell.
    pub used: Option<u64>,
    /// Bytes that only it maps: what removing it gives back.
    pub exclusive: Option<u64>,
    /// What it is a snapshot of, while that is there.
    pub origin: Option<String>,
    /// What it was made from, whether or not that is still there.
    pub from: Option<String>,
    /// An entry that is never evicted.
    pub pinned: bool,
    /// RFC 3339, to the hour: when a lease last came from an entry. None: never yet.
    pub last_use: Option<String>,
    pub mounted: bool,
    /// Where, while it is.
    pub mountpoint: Option<PathBuf>,
    #[serde(skip)]
    pub seq: u64,
    #[serde(skip)]
    pub created_seconds: u64,
    /// Without their prefix.
    #[serde(skip)]
    pub cache_tags: Vec<Tag>,
}

/// How much of a host's id tables have.
const SHORT_HOST: usize = 12;

/// A host's id in a table.
pub fn short_host(id: &str) -> &str {
    id.get(..SHORT_HOST).unwrap_or(id)
}

/// A whole store.
#[derive(Debug, Default)]
pub struct Rows {
    /// The base, then entries, newest first, then volumes.
    pub rows: Vec<Row>,
    /// How many wait for their removal.
    pub doomed: usize,
    /// How many imports are under way, or were cut short.
    pub making: usize,
    /// How many of ours have no tag that gives them a use.
    pub plain: usize,
    /// What is half ours, and why it is left alone.
    pub unclear: Vec<(LvName, String)>,
}

impl Rows {
    /// Sorts out `listing`.
    pub fn new(
        listing: &Listing,
        usage: Option<&HashMap<LvName, Usage>>,
        mounts: &[MountPoint],
    ) -> Self {
        let mut all = Self::default();
        for lv in &listing.lvs {
            match Role::from_tags(&lv.tags) {
                Role::Foreign => {}
                Role::Unclear(reason) => all.unclear.push((lv.name.clone(), reason)),
                Role::Doomed => all.doomed += 1,
                Role::Making => all.making += 1,
                Role::Plain => all.plain += 1,
                role => all.rows.push(row(lv, role, usage, mounts)),
            }
        }
        all.rows.sort_by(|a, b| {
            a.kind
                .cmp(&b.kind)
                .then_with(|| a.volume.cmp(&b.volume))
                .then_with(|| b.seq.cmp(&a.seq))
        });
        all
    }

    /// Says of each row which host has it.
    pub fn tell_hosts(&mut self, fleet: &Fleet) {
        let hosts: HashMap<&str, &String> = (fleet.lvs.iter())
            .filter_map(|of| Some((of.lv.name.as_str(), of.host.as_ref()?)))
            .collect();
        for row in &mut self.rows {
            row.host = hosts.get(row.name.as_str()).map(|host| (*host).clone());
        }
    }

    /// What is not among the rows, a line each.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks: Vec<_> = self
            .unclear
            .iter()
            .map(|(name, reason)| format!("{name}: left alone: {reason}"))
            .collect();
        for (count, what) in [
            (self.doomed, "marked for removal"),
            (self.making, "being imported, or left over from an import"),
            (self.plain, "snapshots without cache tags"),
        ] {
            if count > 0 {
                remarks.push(format!("not listed: {count} {what}"));
            }
        }
        remarks
    }
}

fn row(lv: &Lv, role: Role, usage: Option<&HashMap<LvName, Usage>>, mounts: &[MountPoint]) -> Row {
    let (mut pinned, mut last_use) = (false, None);
    let (kind, volume, scope, from, cache_tags) = match role {
        Role::Entry {
            scope,
            tags,
            from,
            pinned: is_pinned,
            used,
        } => {
            pinned = is_pinned;
            last_use = (used > 0).then(|| rfc3339(used)).flatten();
            (Kind::Entry, None, scope, from, tags)
        }
        Role::Volume {
            volume, spec, from, ..
        } => (Kind::Volume, volume, spec.scope, from, Vec::new()),
        _ => (Kind::Base, None, None, None, Vec::new()),
    };
    let usage = usage.map(|usage| usage.get(&lv.name).copied().unwrap_or_default());
    let mountpoint = lv.device.and_then(|device| {
        let mount = mounts.iter().find(|mount| mount.device == device)?;
        Some(mount.at.clone())
    });
    Row {
        kind,
        name: lv.name.to_string(),
        volume: volume.map(|v| v.to_string()),
        host: None,
        tags: lv.tags.iter().map(Tag::to_string).collect(),
        scope: scope.map(|s| s.to_string()),
        created: rfc3339(lv.created),
        size: lv.size.0,
        used: usage.map(|u| u.mapped.0),
        exclusive: usage.map(|u| u.exclusive.0),
        origin: lv.origin.as_ref().map(LvName::to_string),
        from: from.map(|f| f.to_string()),
        pinned,
        last_use,
        mounted: mountpoint.is_some(),
        mountpoint,
        seq: place(lv.seq, &lv.tags),
        created_seconds: lv.created,
        cache_tags,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::units::Bytes;

    fn lv(name: &str, seq: u64, tags: &str) -> Lv {
        Lv {
            name: name.parse().expect("a name"),
            seq,
            created: 1_700_000_000,
            size: Bytes(1 << 30),
            tags: tags
                .split_whitespace()
                .map(|t| t.parse().expect("a tag"))
                .collect(),
            origin: None,
            device: None,
            open: false,
        }
    }

    #[test]
    fn each_role_in_its_place() {
        let mut mounted = lv("v", 5, "friend:snapshot friend:volume:cargo friend:from:e1");
        mounted.device = Some((253, 7));
        mounted.origin = Some("e1".parse().expect("a name"));
        let listing = Listing {
            lvs: vec![
                mounted,
                lv(
                    "e1",
                    2,
                    "friend:snapshot friend:cache:linux friend:scope:s friend:pin",
                ),
                lv("e2", 3, "friend:snapshot friend:cache:linux other"),
                lv("base", 1, "friend:default"),
                lv("gone", 4, "friend:snapshot friend:cache:x friend:doomed"),
                lv("half", 6, "friend:snapshot friend:making"),
                lv("bare", 7, "friend:snapshot"),
                lv("odd", 8, "friend:cache:x"),
                lv("friend-foreign", 9, "backup"),
            ],
            ..Listing::default()
        };
        let usage = HashMap::from([(
            "e1".parse().expect("a name"),
            Usage {
                mapped: Bytes(4096),
                exclusive: Bytes(1024),
            },
        )]);
        let mounts = [MountPoint {
            id: 30,
            root: "/".into(),
            at: "/run/m/cargo".into(),
            device: (253, 7),
            fs: "xfs".into(),
            source: "x".into(),
            shared: true,
            follows: false,
            label: None,
        }];
        let all = Rows::new(&listing, Some(&usage), &mounts);
        let names: Vec<_> = all.rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["base", "e2", "e1", "v"]);
        assert_eq!((all.doomed, all.making, all.plain), (1, 1, 1));
        assert_eq!(all.unclear.len(), 1);
        assert_eq!(all.unclear[0].0.as_str(), "odd");
        assert_eq!(all.remarks().len(), 4);

        let json = serde_json::to_value(&all.rows).expect("plain data");
        assert_eq!(
            json[2],
            serde_json::json!({
                "kind": "entry", "name": "e1", "volume": null, "scope": "s",
                "tags": ["friend:snapshot", "friend:cache:linux", "friend:scope:s", "friend:pin"],
                "created": "2023-11-14T22:13:20Z", "size": 1 << 30, "used": 4096,
                "exclusive": 1024, "origin": null, "from": null, "pinned": true, "last_use": null,
                "mounted": false, "mountpoint": null,
            })
        );
        assert_eq!(json[3]["volume"], "cargo");
        assert_eq!(json[3]["origin"], "e1");
        assert_eq!(json[3]["mounted"], true);
        assert_eq!(json[3]["mountpoint"], "/run/m/cargo");
    }
}
