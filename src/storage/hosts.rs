// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hosts that share a store: a fleet.
//!
//! Each host sees its own volumes in [`Store::list`](super::Store::list), and entries and the base, which are of all hosts. So
//! what settles, refreshes and removes volumes need not know of others: it does not see theirs. What does, asks here: views, and
//! the eviction of entries. A store that is one host's alone has no fleet.

use super::Lv;
use crate::cache::names::{LvName, Tag};
use crate::cache::record::Role;

/// A host of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Its id.
    pub id: String,
    /// Another host took it for lost, and its daemon was not started since.
    pub lost: bool,
}

/// The hosts that share a store, and what each of them has, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Fleet {
    /// The id of the host that asks.
    pub me: String,
    /// All hosts whose daemon was ever started, by id.
    pub hosts: Vec<Host>,
    /// Every volume of the store, entries and the base too.
    pub lvs: Vec<HostLv>,
}

/// A volume of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLv {
    /// The id of the host that made it, or took it over: it published the entry, or has the volume. `None`: not known.
    pub host: Option<String>,
    /// The volume. What another host has active counts as open, and has no device here.
    pub lv: Lv,
}

/// A volume that this host had when another one took it for lost. What it held is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Its name, which nothing has any more.
    pub lv: LvName,
    /// Its tags.
    pub tags: Vec<Tag>,
}

/// Whether all hosts see a volume with these tags; if not, only the host does that has it.
#[must_use]
pub fn is_shared(tags: &[Tag]) -> bool {
    matches!(Role::from_tags(tags), Role::Entry { .. } | Role::Base)
}
