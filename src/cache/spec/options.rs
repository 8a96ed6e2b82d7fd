// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of a volume's options: what each means, its default, and how its value is read.
//! docs/volume-options.md shows it.

use super::super::criteria::BadCriteria;
use super::{MAX_READ_SCOPES, Spec, Word, mode, owner, scope, size, tags};

/// One option of a volume.
pub struct VolumeOption {
    /// Its name.
    pub name: &'static str,
    /// What it does, as Markdown.
    pub meaning: &'static str,
    /// What holds where it is not given, as Markdown.
    pub default: &'static str,
    /// Reads a value; the error says what is accepted.
    set: fn(&mut Spec, &str) -> Result<(), String>,
}

/// All of them.
pub const OPTIONS: &[VolumeOption] = &[
    VolumeOption {
        name: "restore",
        meaning: "Restore keys, separated by `;`. Each is a list of tags or tag prefixes (`npm-*`), \
                  separated by spaces; an entry matches if it has all of them, in any order",
        default: "none",
        set: |spec, value| {
            spec.restore = value.parse().map_err(|e: BadCriteria| e.to_string())?;
            Ok(())
        },
    },
    VolumeOption {
        name: "save",
        meaning: "Tags of the entry that is published, separated by spaces",
        default: "none: nothing is published",
        set: |spec, value| {
            spec.save = tags(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "publish",
        meaning: "When the end of a use publishes: `unless-failed`, `on-success`, `always`, \
                  `if-missing` or `never` ([below](#publish))",
        default: "`unless-failed`",
        set: |spec, value| {
            spec.publish = Word::parse(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "scope",
        meaning: "The scope that entries are published into, and read from first; `-`: none",
        default: "none",
        set: |spec, value| {
            spec.scope = scope(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "read-scopes",
        meaning: "Further scopes to read, in order, separated by spaces or commas; `-` stands for \
                  entries without a scope",
        default: "none",
        set: |spec, value| {
            spec.read_scopes = value
                .split(|c: char| c.is_whitespace() || c == ',')
                .filter(|name| !name.is_empty())
                .map(scope)
                .collect::<Result<_, _>>()?;
            if spec.read_scopes.len() > MAX_READ_SCOPES {
                return Err(format!("at most {MAX_READ_SCOPES} scopes are accepted"));
            }
            Ok(())
        },
    },
    VolumeOption {
        name: "size",
        meaning: "Size of the file system, such as `30G` ([below](#size))",
        default: "that of the entry, or of the base (10 GiB unless `init --base-size` says otherwise)",
        set: |spec, value| {
            spec.size = Some(size(value)?);
            Ok(())
        },
    },
    VolumeOption {
        name: "fs",
        meaning: "`xfs` or `ext4`, for a volume that starts empty. An entry keeps the file system \
                  that it has",
        default: "that of the base",
        set: |spec, value| {
            spec.fs = Some(Word::parse(value)?);
            Ok(())
        },
    },
    VolumeOption {
        name: "owner",
        meaning: "`UID` or `UID:GID` of the root directory, as the container sees it. Never recursive",
        default: "unchanged",
        set: |spec, value| {
            spec.owner = Some(owner(value)?);
            Ok(())
        },
    },
    VolumeOption {
        name: "mode",
        meaning: "Mode of the root directory, such as `0755`",
        default: "unchanged",
        set: |spec, value| {
            spec.mode = Some(mode(value)?);
            Ok(())
        },
    },
    VolumeOption {
        name: "on-miss",
        meaning: "What to start from when no entry matches: `base`, `empty`, or `fail` (the container \
                  does not start)",
        default: "`base`",
        set: |spec, value| {
            spec.on_miss = Word::parse(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "on-error",
        meaning: "What to do when the store cannot serve: `fail`, or `scratch`, which mounts an empty \
                  directory in memory of bounded size, so that the job runs without a cache",
        default: "`fail`",
        set: |spec, value| {
            spec.on_error = Word::parse(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "reuse",
        meaning: "What the next use of the volume starts from: `fresh`, the best entry again; or `keep`, \
                  what the last use left (an ordinary persistent volume)",
        default: "`fresh` with `restore` or `save`, else `keep`",
        set: |spec, value| {
            spec.reuse = Word::parse(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "type",
        meaning: "`cache`; or `job`, a directory in which the job itself mounts caches while it runs \
                  ([job volumes](job-volumes.md))",
        default: "`cache`",
        set: |spec, value| {
            spec.kind = Word::parse(value)?;
            Ok(())
        },
    },
    VolumeOption {
        name: "admit",
        meaning: "With `type=job`: when the job's requests are served: `at-once`, or `later`, once the \
                  [supervisor](supervisor.md) has set the job's scopes",
        default: "`at-once`",
        set: |spec, value| {
            spec.admit = Word::parse(value)?;
            Ok(())
        },
    },
];

/// Sets one option.
///
/// # Errors
/// What is accepted in place of an unknown option or a malformed value.
pub(super) fn set(spec: &mut Spec, name: &str, value: &str) -> Result<(), String> {
    match OPTIONS.iter().find(|option| option.name == name) {
        Some(option) => (option.set)(spec, value),
        None => {
            let names: Vec<_> = OPTIONS.iter().map(|option| option.name).collect();
            Err(format!(
                "unknown option; valid options: {}",
                names.join(", ")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each value that an option accepts is explained.
    #[test]
    fn words() {
        let meant = |name: &str| {
            let option = OPTIONS.iter().find(|option| option.name == name);
            option.map_or("", |option| option.meaning)
        };
        for option in OPTIONS {
            let Err(refused) = set(&mut Spec::default(), option.name, "\u{7f}") else {
                panic!("{} accepts anything", option.name)
            };
            let Some((_, words)) = refused.split_once("one of ") else {
                continue;
            };
            for word in words.split(", ") {
                assert!(
                    meant(option.name).contains(&format!("`{word}`")),
                    "{}: {word} is not explained",
                    option.name
                );
            }
        }
    }
}
