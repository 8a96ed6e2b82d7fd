// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LVM commands, safe by construction in the `lvm` shell.
//!
//! The shell splits a line at white space, knows two kinds of quotes and takes a
//! word that begins with `#` for a comment (`lvm_split` in lvm2's
//! tools/lvmcmdline.c). A word here is either one of our own or an option of
//! ours and a value whose type has none of that in its alphabet; a tag may
//! begin with `#`, so values follow their option in the same word.

use std::fmt::{self, Display};

use crate::cache::names::{LvName, Tag};
use crate::cache::units::Bytes;

/// How many words the shell takes: MAX_ARGS in lvm2's tools/tools.h is 64, and a
/// line with that many is dropped with no answer at all in 2.03.16.
const SHELL_WORDS: usize = 60;

/// How long a line may be for the shell: well below what an empty pipe holds, so
/// that writing it never waits for a child that does not read.
const SHELL_BYTES: usize = 16 << 10;

/// LVM's setting for [`Command::repairing`]. thin_check(8) has known its option since 0.9.
const REPAIRING: &str = r#"global/thin_check_options=["-q","--auto-repair"]"#;

/// A volume group's name: LVM's alphabet for it is that of volumes.
pub(super) type VgName = LvName;

/// One command of LVM's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    words: Vec<String>,
    /// LVM's settings for it alone, which the shell is not to take over.
    pub(super) settings: Option<&'static str>,
}

impl Command {
    /// `lvs`, `lvchange` and so on, that never asks back: a question would take
    /// the next command for its answer.
    pub(super) fn new(name: &'static str) -> Self {
        Self {
            words: vec![name.to_owned(), "--yes".to_owned()],
            settings: None,
        }
    }

    /// A query: a command with a report of these columns, sizes in bytes. That it is JSON, the
    /// configuration says (`config`): LVM's shell refuses `--reportformat` since 2.03.17.
    pub(super) fn query(name: &'static str, columns: &'static str) -> Self {
        Self::new(name)
            .word("--binary")
            .word("--units=b")
            .word("--nosuffix")
            .option("--options", columns)
    }

    /// Adds a word of our own.
    pub(super) fn word(mut self, word: &'static str) -> Self {
        self.words.push(word.to_owned());
        self
    }

    fn option(mut self, option: &'static str, value: impl Display) -> Self {
        self.words.push(format!("{option}={value}"));
        self
    }

    /// Adds an option with a name for its value.
    pub(super) fn name(self, option: &'static str, name: &LvName) -> Self {
        self.option(option, name)
    }

    /// Adds an option with a size, rounded up to what LVM accepts: sectors.
    pub(super) fn bytes(self, option: &'static str, bytes: Bytes) -> Self {
        self.option(option, format_args!("{}b", bytes.round_up(512).0))
    }

    /// Adds an option with a tag, for each of them.
    pub(super) fn tags(self, option: &'static str, tags: &[Tag]) -> Self {
        tags.iter().fold(self, |it, tag| it.option(option, tag))
    }

    /// Only shows `pool` and its thin volumes. For queries alone: over a selection, `lvremove` loses its log (2.03.31, in the
    /// shell) or dies (2.03.16, as a process), once it has removed.
    pub(super) fn only_pool_and_volumes(self, pool: &LvName) -> Self {
        self.option(
            "--select",
            format_args!("pool_lv=\"{pool}\"||lv_name=\"{pool}\""),
        )
    }

    /// Adds the group it works in.
    pub(super) fn vg(mut self, vg: &VgName) -> Self {
        self.words.push(vg.to_string());
        self
    }

    /// Adds the volume it works on.
    pub(super) fn lv(mut self, vg: &VgName, lv: &LvName) -> Self {
        self.words.push(format!("{vg}/{lv}"));
        self
    }

    /// Its words.
    pub(super) fn words(&self) -> &[String] {
        &self.words
    }

    /// Has LVM's check of a pool put right what is harmless, instead of refusing the pool.
    pub(super) fn repairing(mut self) -> Self {
        self.settings = Some(REPAIRING);
        self
    }

    /// The line for the shell; `None` where it is more than the shell takes, or has settings of its own.
    pub(super) fn line(&self) -> Option<String> {
        debug_assert!(self.words.iter().all(|word| is_one_word(word)), "{self}");
        let line = self.words.join(" ") + "\n";
        let fits = self.words.len() <= SHELL_WORDS && line.len() <= SHELL_BYTES;
        (fits && self.settings.is_none()).then_some(line)
    }
}

impl Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words.join(" "))?;
        match self.settings {
            Some(settings) => write!(f, " --config={settings}"),
            None => Ok(()),
        }
    }
}

fn is_one_word(word: &str) -> bool {
    !word.is_empty()
        && !word.starts_with(['#', '"', '\''])
        && word.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `lvm_split`, as lvm2 has it.
    fn split(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        let mut rest = line.trim_start();
        while !rest.is_empty() && !rest.starts_with('#') {
            let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''));
            if quote.is_some() {
                rest = &rest[1..];
            }
            let end = rest
                .find(|c: char| quote.map_or(c.is_ascii_whitespace(), |quote| c == quote))
                .unwrap_or(rest.len());
            words.push(rest[..end].to_owned());
            rest = rest.get(end + 1..).unwrap_or("").trim_start();
        }
        words
    }

    proptest! {
        #[test]
        fn the_shell_reads_what_was_meant(
            tags in prop::collection::vec("[A-Za-z0-9_+./=!:&#][A-Za-z0-9_+./=!:&#-]{0,40}", 0..40),
            name in "[A-Za-z0-9_+.][A-Za-z0-9._+-]{0,40}",
        ) {
            let (Ok(tags), Ok(name)) = (
                tags.iter().map(|tag| tag.parse::<Tag>()).collect::<Result<Vec<_>, _>>(),
                name.parse::<LvName>(),
            ) else {
                return Ok(());
            };
            let command = Command::new("lvcreate")
                .name("--name", &name)
                .tags("--addtag", &tags)
                .bytes("--virtualsize", Bytes(4096))
                .lv(&name, &name);
            prop_assert_eq!(split(&command.line().unwrap()), command.words());
        }
    }

    #[test]
    fn too_much_for_the_shell() {
        let tags = |n: usize, len: usize| -> Vec<Tag> {
            (0..n).map(|_| "x".repeat(len).parse().unwrap()).collect()
        };
        for (count, len, fits) in [
            (1, 1, true),
            (58, 1, true),
            (59, 1, false),
            (20, 1000, false),
        ] {
            let command = Command::new("lvchange").tags("--addtag", &tags(count, len));
            assert_eq!(command.line().is_some(), fits, "{count} tags of {len}");
        }
    }
}
