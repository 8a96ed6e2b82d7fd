// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the work that uses a cache ended: the values. What makes one verdict of all that is told: `engine::told`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How the work in a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It succeeded.
    Success,
    /// It failed.
    Failure,
    /// Nobody said.
    #[default]
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Unknown => "unknown",
        })
    }
}
