// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of limits: which entries are kept, and what one job may do.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::values::{duration, duration_if_any, parsed};
use crate::cache::evict::{Floor, Limits, Policy};
use crate::cache::spec;
use crate::cache::units::Bytes;

/// Stands for each scope that has no limits of its own: no tag has a `*`.
const EACH_SCOPE: &str = "*";

/// The bounds of the store, as they stand in the file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct PolicyTable {
    max_entries: Option<usize>,
    #[serde(deserialize_with = "duration_if_any")]
    max_age: Option<Duration>,
    #[serde(deserialize_with = "duration_if_any")]
    max_unused: Option<Duration>,
    #[serde(deserialize_with = "parsed")]
    data_floor: Floor,
    #[serde(deserialize_with = "parsed")]
    metadata_floor: Floor,
    #[serde(deserialize_with = "parsed")]
    group_floor: Floor,
    #[serde(deserialize_with = "parsed")]
    cut_off: Floor,
    #[serde(deserialize_with = "duration")]
    pub(super) keep_used: Duration,
    scope: BTreeMap<String, LimitsTable>,
}

/// Limits of one scope.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct LimitsTable {
    max_entries: Option<usize>,
    #[serde(deserialize_with = "duration_if_any")]
    max_age: Option<Duration>,
    #[serde(deserialize_with = "duration_if_any")]
    max_unused: Option<Duration>,
}

impl Default for PolicyTable {
    fn default() -> Self {
        let Policy {
            all,
            data,
            metadata,
            group,
            cut_off,
            ..
        } = Policy::default();
        Self {
            max_entries: all.max_entries,
            max_age: all.max_age,
            max_unused: all.max_unused,
            data_floor: data,
            metadata_floor: metadata,
            group_floor: group,
            cut_off,
            keep_used: Duration::from_secs(600),
            scope: BTreeMap::new(),
        }
    }
}

impl PolicyTable {
    pub(super) fn policy(self) -> Result<Policy, String> {
        let mut policy = Policy {
            all: Limits {
                max_entries: self.max_entries,
                max_age: self.max_age,
                max_unused: self.max_unused,
            },
            data: self.data_floor,
            metadata: self.metadata_floor,
            group: self.group_floor,
            cut_off: self.cut_off,
            ..Policy::default()
        };
        for (name, table) in self.scope {
            let limits = Limits {
                max_entries: table.max_entries,
                max_age: table.max_age,
                max_unused: table.max_unused,
            };
            if name == EACH_SCOPE {
                policy.each_scope = limits;
            } else {
                let scope = spec::scope(&name).map_err(|why| {
                    format!(
                        "policy.scope.{name:?}: {why}; or \"*\" for each scope that is not named"
                    )
                })?;
                policy.scopes.insert(scope, limits);
            }
        }
        Ok(policy)
    }
}

/// What one job may do at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct JobLimits {
    /// Bytes of a line.
    pub line: usize,
    /// Criteria of a request.
    pub criteria: usize,
    /// Terms and tags of a request.
    pub terms: usize,
    /// Caches mounted at once.
    pub mounts: usize,
    /// Checkpoints in one use of the job volume (after a restart of the daemon, from then on). At
    /// its end each mount may be published once more.
    pub saves: usize,
    /// Changes to the store a minute: a mount and a checkpoint are three each.
    pub changes: u32,
    /// Bytes of tags in one use of the job volume, of all that it mounts and saves.
    #[serde(deserialize_with = "parsed")]
    pub tags: Bytes,
    /// Connections at once.
    pub connections: usize,
    /// From a request's first byte to its last.
    #[serde(deserialize_with = "duration")]
    pub request_time: Duration,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            line: 4096,
            // The action's: a key, the same as a beginning, and 10 restore keys.
            criteria: 12,
            terms: 64,
            mounts: 32,
            saves: 16,
            changes: 60,
            // The action's key and version, of 600 bytes, for each mount and each checkpoint.
            tags: Bytes(32 << 10),
            connections: 64,
            request_time: Duration::from_secs(30),
        }
    }
}
