// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runner groups.

use serde::Deserialize;

/// A runner group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "GroupText")]
pub enum Group {
    /// By its number.
    Number(u64),
    /// By its name.
    Name(String),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a runner group: write its name or its number")]
enum GroupText {
    Number(u64),
    Name(String),
}

impl Default for Group {
    /// GitHub's own, which each owner has.
    fn default() -> Self {
        Self::Number(1)
    }
}

impl TryFrom<GroupText> for Group {
    type Error = String;

    fn try_from(text: GroupText) -> Result<Self, String> {
        match text {
            GroupText::Number(0) => Err("group 0: numbers begin with 1".into()),
            GroupText::Number(number) => Ok(Self::Number(number)),
            GroupText::Name(name) if name.trim().is_empty() => {
                Err("group: a name or a number is needed".into())
            }
            GroupText::Name(name) => Ok(Self::Name(name)),
        }
    }
}
