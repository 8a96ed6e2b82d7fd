// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where in a job volume something is mounted.

use std::fmt;

use crate::text::shortened;

/// Longest path of a mount, in bytes, and most names in it.
const MAX_PATH: (usize, usize) = (1024, 8);

/// Where in a job volume something is mounted: names with `/` between them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LatePath(String);

impl LatePath {
    /// The path that a job means by `text`, which is relative to its job volume, or absolute below
    /// where that is mounted for it: at one of `targets`.
    ///
    /// # Errors
    /// Why not, with the place that is allowed.
    pub fn parse(text: &str, targets: &[String]) -> Result<Self, String> {
        let place = targets.first().map_or("the job volume", String::as_str);
        let refused = |why: &str| {
            format!(
                "{:?} {why}: what is mounted is mounted below {place}, as with \"mount cargo\" or \"mount {place}/cargo\"",
                shortened(text)
            )
        };
        let below = if text.starts_with('/') {
            let below = targets.iter().find_map(|target| {
                let rest = text.strip_prefix(target.trim_end_matches('/'))?;
                rest.strip_prefix('/')
            });
            below.ok_or_else(|| refused("is somewhere else"))?
        } else {
            text
        };
        let names: Vec<_> = below
            .split('/')
            .filter(|name| !name.is_empty() && *name != ".")
            .collect();
        let (bytes, depth) = MAX_PATH;
        if names.is_empty() {
            return Err(refused("is the job volume itself"));
        }
        if names.contains(&"..") {
            return Err(refused("leads out of it"));
        }
        if ["socket", "bin"].contains(&names[0]) {
            return Err(refused("is the job volume's own"));
        }
        if below.len() > bytes || names.len() > depth || names.iter().any(|n| n.len() > 255) {
            return Err(refused("is too long"));
        }
        if below.chars().any(|c| c.is_control() || c == '\u{fffd}') {
            return Err(refused("has characters that no name may have"));
        }
        Ok(Self(names.join("/")))
    }

    /// The path, relative.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether one of the two is below the other, or they are the same.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let below = |one: &str, other: &str| {
            one.strip_prefix(other)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        below(&self.0, &other.0) || below(&other.0, &self.0)
    }
}

impl fmt::Display for LatePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let targets = ["/run/friend".to_owned(), "/other/".to_owned()];
        let deep = "a/".repeat(9);
        let long = "a".repeat(256);
        for (text, want) in [
            ("cargo", Ok("cargo")),
            ("cargo/registry//x/", Ok("cargo/registry/x")),
            ("./cargo", Ok("cargo")),
            ("/run/friend/cargo", Ok("cargo")),
            ("/other/a b", Ok("a b")),
            ("bins/bin", Ok("bins/bin")),
            ("..cargo", Ok("..cargo")),
            ("", Err("itself")),
            (".", Err("itself")),
            ("/run/friend", Err("somewhere else")),
            ("/run/friend/", Err("itself")),
            ("/run/friendly/x", Err("somewhere else")),
            ("/etc", Err("somewhere else")),
            ("..", Err("leads out")),
            ("a/../../b", Err("leads out")),
            ("/run/friend/../x", Err("leads out")),
            ("socket", Err("own")),
            ("bin/x", Err("own")),
            ("a\u{7}", Err("characters")),
            (&deep, Err("too long")),
            (&long, Err("too long")),
        ] {
            match (LatePath::parse(text, &targets), want) {
                (Ok(path), Ok(want)) => assert_eq!(path.as_str(), want, "{text:?}"),
                (Err(why), Err(word)) => {
                    assert!(
                        why.contains(word) && why.contains("below /run/friend"),
                        "{text:?}: {why}"
                    );
                }
                (got, want) => panic!("{text:?}: {got:?}, not {want:?}"),
            }
        }
        let path = |text| LatePath::parse(text, &[]).unwrap();
        for (one, other, overlaps) in [
            ("a", "a", true),
            ("a", "a/b", true),
            ("a/b", "a", true),
            ("a", "ab", false),
            ("a/b", "a/c", false),
        ] {
            assert_eq!(path(one).overlaps(&path(other)), overlaps, "{one} {other}");
        }
    }
}
