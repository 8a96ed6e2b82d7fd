// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A volume's specification: its options, parsed once at Create, kept as tags.

pub mod options;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::criteria::{Criteria, Criterion, MAX_TERM};
use super::names::{Tag, escape, unescape};
use super::tags::{OPT, RESTORE, SAVE, SCOPE};
use super::units::Bytes;
use crate::text::shortened;

/// Longest value of an option, in bytes: all of it becomes tags.
pub const MAX_VALUE: usize = 4096;

/// Most save tags of one volume.
pub const MAX_SAVE: usize = 32;

/// Most scopes read after a volume's own.
pub const MAX_READ_SCOPES: usize = 16;

/// Smallest size that is accepted: what is below is a unit forgotten.
pub const MIN_SIZE: Bytes = Bytes::mib(16);

/// Largest size that is accepted, 256 TiB: far beyond any pool, well within what
/// LVM and both file systems can address.
pub const MAX_SIZE: Bytes = Bytes::mib(256 << 20);

/// A type whose values are words in options and tags.
pub(super) trait Word: Copy + PartialEq + 'static {
    /// Each word and what it stands for.
    const WORDS: &'static [(&'static str, Self)];

    fn parse(text: &str) -> Result<Self, String> {
        match Self::WORDS.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => Ok(*value),
            None => {
                let words: Vec<_> = Self::WORDS.iter().map(|(word, _)| *word).collect();
                Err(refused(text, &format!("one of {}", words.join(", "))))
            }
        }
    }
}

macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal,)* }) => {
        impl Word for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),*];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self {
                    $(Self::$variant => $word,)*
                })
            }
        }
    };
}

/// Who may read an entry. `None` stands for entries without a scope: those the
/// original script made, and those of volumes created without `scope`. A volume
/// with a scope reads them only where `read-scopes` names them, as `-`; a scope's
/// name never begins with `-`.
pub type Scope = Option<Tag>;

/// When the end of a lease publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Publish {
    /// Not after a failure verdict, nor after an unclean end.
    #[default]
    UnlessFailed,
    /// Only after a success verdict.
    OnSuccess,
    /// Whatever the verdict, if the file system is whole.
    Always,
    /// As [`Publish::UnlessFailed`], and only while nothing that the volume reads has all of its save tags.
    IfMissing,
    /// Never.
    Never,
}

words! {
    Publish {
        UnlessFailed = "unless-failed",
        OnSuccess = "on-success",
        Always = "always",
        IfMissing = "if-missing",
        Never = "never",
    }
}

/// The file system of volumes that are made empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FsType {
    /// XFS.
    #[default]
    Xfs,
    /// ext4.
    Ext4,
}

words! {
    FsType {
        Xfs = "xfs",
        Ext4 = "ext4",
    }
}

impl FsType {
    /// The smallest volume that this file system is made on: mkfs.xfs (6.1) refuses
    /// less than 300 MiB, and ext4 is of no use far below ours.
    #[must_use]
    pub const fn min_size(self) -> Bytes {
        match self {
            Self::Xfs => Bytes::mib(300),
            Self::Ext4 => MIN_SIZE,
        }
    }
}

/// What a volume starts from when no entry matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnMiss {
    /// A snapshot of the base.
    #[default]
    Base,
    /// A new, empty file system.
    Empty,
    /// Nothing: Mount is refused.
    Fail,
}

words! {
    OnMiss {
        Base = "base",
        Empty = "empty",
        Fail = "fail",
    }
}

/// What becomes of a Mount that the store cannot serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// It fails.
    #[default]
    Fail,
    /// It gets an empty directory of bounded size, in memory.
    Scratch,
}

words! {
    OnError {
        Fail = "fail",
        Scratch = "scratch",
    }
}

/// What a volume holds at its next use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reuse {
    /// The best entry, again.
    Fresh,
    /// What it held before.
    #[default]
    Keep,
}

words! {
    Reuse {
        Fresh = "fresh",
        Keep = "keep",
    }
}

/// What a volume is mounted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// One cache.
    #[default]
    Cache,
    /// A directory in which a job has caches mounted while it runs.
    Job,
}

words! {
    Kind {
        Cache = "cache",
        Job = "job",
    }
}

/// When the requests that a job makes in a job volume are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Admit {
    /// As they come.
    #[default]
    AtOnce,
    /// Once somebody on the host has said whose job it is ([`Spec::admitted`]).
    Later,
}

words! {
    Admit {
        AtOnce = "at-once",
        Later = "later",
    }
}

/// Owner of the volume's root directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// All that a volume's options say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spec {
    /// What it is mounted as. What else a job volume's options say is of the caches in it.
    pub kind: Kind,
    /// When a job's requests are served, in a job volume.
    pub admit: Admit,
    /// What to restore from.
    pub restore: Criteria,
    /// Tags of what is published, in order, each once; none: nothing is.
    pub save: Vec<Tag>,
    /// When the end of a lease publishes.
    pub publish: Publish,
    /// The scope that entries are published into, and read from first.
    pub scope: Scope,
    /// Scopes read after it, in order, each once and without it.
    pub read_scopes: Vec<Scope>,
    /// Virtual size, at least; `None`: that of the origin.
    pub size: Option<Bytes>,
    /// File system asked for; `None`: that of the origin, XFS where one is made.
    pub fs: Option<FsType>,
    /// Owner of the root directory; `None`: as it is.
    pub owner: Option<Owner>,
    /// Mode of the root directory, from 0 to 0o3777 (setuid means nothing there); `None`: as it is.
    pub mode: Option<u32>,
    /// When no entry matches.
    pub on_miss: OnMiss,
    /// When the store cannot serve.
    pub on_error: OnError,
    /// What the next use starts from.
    pub reuse: Reuse,
}

/// An option that is refused, by name, with what is accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("option {option}: {problem}")]
pub struct BadOption {
    /// The option's name, as given, made printable.
    pub option: String,
    /// What is wrong and what is accepted.
    pub problem: String,
}

impl BadOption {
    fn new(option: &str, problem: impl Into<String>) -> Self {
        Self {
            option: shortened(option).escape_debug().to_string(),
            problem: problem.into(),
        }
    }
}

/// What is wrong with a value, and what is accepted.
fn refused(value: &str, accepted: &str) -> String {
    format!("invalid value {:?}: expected {accepted}", shortened(value))
}

impl Spec {
    /// The specification that a volume's options make.
    ///
    /// Names of options are taken in either case, since Podman hands down some of
    /// what `o=` (a comma-separated list of further options) holds a second time,
    /// as `SIZE`, `UID`, `GID` … Its own options are understood where they have a
    /// meaning here: `uid` and `gid` (Quadlet's `User=` and `Group=`) make the
    /// owner; `nocopy` and `noquota` change nothing that is ours; `device`, without
    /// which Quadlet passes no options on, may say that there is none.
    ///
    /// # Errors
    /// An option that is unknown, malformed, given twice differently, or senseless
    /// beside another.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Self, BadOption> {
        let given = gather(options)?;
        let mut spec = Self::default();
        let (mut uid, mut gid) = (None, None);
        for (option, &value) in &given {
            match option.as_str() {
                "uid" => id(value).map(|id| uid = Some(id)),
                "gid" => id(value).map(|id| gid = Some(id)),
                "device" => match value {
                    "none" | "lvm-cache-friend" => Ok(()),
                    _ => Err(refused(value, "none or lvm-cache-friend: no device is mounted")),
                },
                "nocopy" | "noquota" => match value {
                    "" | "true" => Ok(()),
                    _ => Err(refused(value, "no value, or true")),
                },
                "inodes" => Err("there is no bound on inodes here: leave it out".to_owned()),
                "timeout" => Err(
                    "Podman's own, which it takes only from `podman volume create -o o=timeout=SECONDS` \
                     or from volume_plugin_timeout in containers.conf"
                        .to_owned(),
                ),
                _ => options::set(&mut spec, option, value),
            }
            .map_err(|problem| BadOption::new(option, problem))?;
        }

        if uid.is_some() || gid.is_some() {
            let wanted = Owner {
                uid: uid.or(spec.owner.map(|owner| owner.uid)).unwrap_or(0),
                gid: gid
                    .or(spec.owner.map(|owner| owner.gid))
                    .or(uid)
                    .unwrap_or(0),
            };
            if spec.owner.is_some_and(|owner| owner != wanted) {
                return Err(BadOption::new(
                    "owner",
                    "contradicts uid or gid: set only one of them",
                ));
            }
            spec.owner = Some(wanted);
        }
        if given.contains_key("reuse") {
            if spec.kind == Kind::Job {
                let problem = "not for job volumes: each cache in one starts fresh";
                return Err(BadOption::new("reuse", problem));
            }
        } else if given.contains_key("restore") || given.contains_key("save") {
            spec.reuse = Reuse::Fresh;
        } else {
            spec.reuse = spec.default_reuse();
        }
        spec.settle_read_scopes();
        spec.check()?;
        Ok(spec)
    }

    /// Refuses what makes no sense together.
    fn check(&self) -> Result<(), BadOption> {
        if self.on_miss == OnMiss::Fail && self.restore.0.is_empty() && self.kind == Kind::Cache {
            return Err(BadOption::new(
                "on-miss",
                "fail needs restore: without criteria nothing ever matches",
            ));
        }
        if self.admit == Admit::Later {
            let problem = if self.kind != Kind::Job {
                "later is for job volumes: it needs type=job"
            } else if self.scope.is_some() || !self.read_scopes.is_empty() {
                "later excludes scope and read-scopes: the supervisor sets both when the job starts"
            } else {
                ""
            };
            if !problem.is_empty() {
                return Err(BadOption::new("admit", problem));
            }
        }
        let fs = self.fs.unwrap_or_default();
        if self.on_miss == OnMiss::Empty && self.size.is_some_and(|size| size < fs.min_size()) {
            return Err(BadOption::new(
                "size",
                format!("an empty {fs} file system needs at least {}", fs.min_size()),
            ));
        }
        Ok(())
    }

    /// Reading a scope a second time finds nothing new: a volume whose scope is
    /// among those that all volumes read is common, and no error.
    fn settle_read_scopes(&mut self) {
        let mut seen = BTreeSet::from([self.scope.clone()]);
        self.read_scopes.retain(|scope| seen.insert(scope.clone()));
    }

    /// `reuse` where it is not given.
    fn default_reuse(&self) -> Reuse {
        if self.kind == Kind::Cache && self.restore.0.is_empty() && self.save.is_empty() {
            Reuse::Keep
        } else {
            Reuse::Fresh
        }
    }

    /// The tags that say all of it, on the volume's LV (`friend:restore:`,
    /// `friend:save:`, `friend:scope:`, `friend:opt:`; not the volume's name).
    #[must_use]
    pub fn to_tags(&self) -> Vec<Tag> {
        let mut tags = Vec::new();
        let mut add = |text: String| {
            tags.push(text.parse().expect("escaped text after a prefix is a tag"));
        };
        for (n, criterion) in self.restore.0.iter().enumerate() {
            for term in criterion.terms() {
                add(format!("{RESTORE}{n}:{}", escape(&term.to_string())));
            }
        }
        for tag in &self.save {
            add(format!("{SAVE}{tag}"));
        }
        if let Some(scope) = &self.scope {
            add(format!("{SCOPE}{scope}"));
        }

        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                add(format!("{OPT}{name}={}", escape(&value)));
            }
        };
        let read_scopes: Vec<_> = self
            .read_scopes
            .iter()
            .map(|scope| scope.as_ref().map_or(UNSCOPED, Tag::as_str))
            .collect();
        option(
            "read-scopes",
            (!read_scopes.is_empty()).then(|| read_scopes.join(" ")),
        );
        option("type", unless(self.kind, Kind::default()));
        option("admit", unless(self.admit, Admit::default()));
        option("publish", unless(self.publish, Publish::default()));
        option("size", self.size.map(|size| size.0.to_string()));
        option("fs", self.fs.map(|fs| fs.to_string()));
        option("owner", self.owner.map(|owner| owner.to_string()));
        option("mode", self.mode.map(|mode| format!("{mode:04o}")));
        option("on-miss", unless(self.on_miss, OnMiss::default()));
        option("on-error", unless(self.on_error, OnError::default()));
        option("reuse", unless(self.reuse, self.default_reuse()));
        tags
    }

    /// The specification that a volume's tags say; `None` where they do not
    /// parse. Tags that are not of a specification are passed over.
    #[must_use]
    pub fn from_tags<'a>(tags: impl IntoIterator<Item = &'a Tag>) -> Option<Self> {
        let mut spec = Self::default();
        let mut restore: BTreeMap<usize, Vec<_>> = BTreeMap::new();
        let mut given = BTreeSet::new();
        for tag in tags.into_iter().map(Tag::as_str) {
            if let Some(rest) = tag.strip_prefix(RESTORE) {
                let (n, term) = rest.split_once(':')?;
                let terms = restore.entry(n.parse().ok()?).or_default();
                terms.push(unescape(term)?.parse().ok()?);
            } else if let Some(rest) = tag.strip_prefix(SAVE) {
                spec.save.push(rest.parse().ok()?);
            } else if let Some(rest) = tag.strip_prefix(SCOPE) {
                let scope = scope_name(rest)?;
                if spec.scope.replace(scope).is_some() {
                    return None;
                }
            } else if let Some(rest) = tag.strip_prefix(OPT) {
                let (option, value) = rest.split_once('=')?;
                let has_tags_of_its_own = matches!(option, "restore" | "save" | "scope");
                if has_tags_of_its_own || !given.insert(option) {
                    return None;
                }
                options::set(&mut spec, option, &unescape(value)?).ok()?;
            }
        }
        for (n, (place, terms)) in restore.into_iter().enumerate() {
            if place != n {
                return None;
            }
            spec.restore.0.push(Criterion::new(terms)?);
        }
        spec.save.sort_unstable();
        spec.save.dedup();
        spec.settle_read_scopes();
        if !given.contains("reuse") {
            spec.reuse = spec.default_reuse();
        }
        Some(spec)
    }

    /// The specification of a cache that a job asks for in its job volume, which has this one.
    /// A request refines what the volume says and never widens it: each of its criteria is joined with
    /// each of the volume's, and its save tags come on top of the volume's.
    ///
    /// # Errors
    /// When that makes too many save tags.
    pub fn of_request(&self, criteria: &[Criterion], save: &[Tag]) -> Result<Self, BadOption> {
        let save: BTreeSet<_> = self.save.iter().chain(save).cloned().collect();
        if save.len() > MAX_SAVE {
            let problem =
                format!("at most {MAX_SAVE} tags are accepted, the job volume's among them");
            return Err(BadOption::new("save", problem));
        }
        let joined = criteria.iter().flat_map(|wanted| {
            let own = self.restore.0.iter();
            own.map(|own| own.and(wanted))
        });
        let restore = match (criteria, &self.restore.0[..]) {
            ([], own) => own.to_vec(),
            (wanted, []) => wanted.to_vec(),
            _ => joined.collect(),
        };
        Ok(Self {
            kind: Kind::Cache,
            admit: Admit::AtOnce,
            reuse: Reuse::Fresh,
            restore: Criteria(restore),
            save: save.into_iter().collect(),
            ..self.clone()
        })
    }

    /// The specification of a job volume with `admit=later` whose job is known now: `options` say its
    /// scopes, and what else depends on the job.
    ///
    /// # Errors
    /// An option that is malformed, or no such one.
    pub fn admitted(&self, options: &BTreeMap<String, String>) -> Result<Self, BadOption> {
        let mut spec = Self {
            admit: Admit::AtOnce,
            ..self.clone()
        };
        for (option, value) in options {
            if !matches!(
                option.as_str(),
                "scope" | "read-scopes" | "restore" | "save"
            ) {
                let problem = "cannot be changed after the volume was created";
                return Err(BadOption::new(option, problem));
            }
            options::set(&mut spec, option, value)
                .map_err(|problem| BadOption::new(option, problem))?;
        }
        spec.settle_read_scopes();
        spec.check()?;
        Ok(spec)
    }

    /// The scopes to read, in order.
    pub fn scopes(&self) -> impl Iterator<Item = &Scope> {
        std::iter::once(&self.scope).chain(&self.read_scopes)
    }
}

/// The options by their names in lower case, those within `o` among them.
fn gather(options: &BTreeMap<String, String>) -> Result<BTreeMap<String, &str>, BadOption> {
    let mut given = BTreeMap::new();
    let mut add = |option: &str, value| {
        let value = str::trim(value);
        let option = option.trim().to_ascii_lowercase();
        if value.len() > MAX_VALUE {
            let problem = format!("its value has more than {MAX_VALUE} bytes");
            return Err(BadOption::new(&option, problem));
        }
        match given.insert(option.clone(), value) {
            Some(other) if other != value => {
                let (value, other) = (shortened(value), shortened(other));
                let problem = format!("given twice, as {other:?} and as {value:?}");
                Err(BadOption::new(&option, problem))
            }
            _ => Ok(()),
        }
    };
    for (option, value) in options {
        if option.eq_ignore_ascii_case("o") {
            for part in value.split(',').filter(|part| !part.trim().is_empty()) {
                let (option, value) = part.split_once('=').unwrap_or((part, ""));
                add(option, value)?;
            }
        } else {
            add(option, value)?;
        }
    }
    Ok(given)
}

/// `value` as text, unless it is what is meant anyway.
fn unless<T: Copy + PartialEq + ToString>(value: T, default: T) -> Option<String> {
    (value != default).then(|| value.to_string())
}

pub(super) fn tags(text: &str) -> Result<Vec<Tag>, String> {
    let mut tags = text
        .split_whitespace()
        .map(|word| {
            word.parse()
                .ok()
                .filter(|_| word.len() <= MAX_TERM)
                .ok_or_else(|| {
                    let accepted = format!(
                        "tags of letters, digits and _ + . - / = ! : & #, at most {MAX_TERM} bytes each, \
                         with spaces between them"
                    );
                    refused(word, &accepted)
                })
        })
        .collect::<Result<Vec<_>, _>>()?;
    tags.sort_unstable();
    tags.dedup();
    if tags.len() > MAX_SAVE {
        return Err(format!("at most {MAX_SAVE} tags are accepted"));
    }
    Ok(tags)
}

/// How `read-scopes` names the entries without a scope.
const UNSCOPED: &str = "-";

/// A scope's name, as a tag has it.
pub(super) fn scope_name(text: &str) -> Option<Tag> {
    let name = text.parse().ok()?;
    (text.len() <= MAX_TERM && !text.starts_with('-')).then_some(name)
}

/// The scope that a setting or an option names; `-`: none.
///
/// # Errors
/// What is accepted.
pub fn scope(text: &str) -> Result<Scope, String> {
    if text == UNSCOPED {
        return Ok(None);
    }
    scope_name(text).map(Some).ok_or_else(|| {
        let accepted = format!(
            "a name of letters, digits and _ + . - / = ! : & #, not beginning with -, at most {MAX_TERM} bytes, \
             or - alone for entries without a scope"
        );
        refused(text, &accepted)
    })
}

pub(super) fn size(text: &str) -> Result<Bytes, String> {
    let size: Bytes = text
        .parse()
        .map_err(|e: super::units::BadSize| e.to_string())?;
    if size < MIN_SIZE || size > MAX_SIZE {
        let accepted = format!("a size from {MIN_SIZE} to {MAX_SIZE}, such as 30G");
        return Err(refused(text, &accepted));
    }
    Ok(size)
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn id(text: &str) -> Result<u32, String> {
    // The last number is chown(2)'s "as it is".
    let valid = |id: &u32| digits(text) && *id != u32::MAX;
    text.parse()
        .ok()
        .filter(valid)
        .ok_or_else(|| refused(text, "a number from 0 to 4294967294"))
}

pub(super) fn owner(text: &str) -> Result<Owner, String> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    match (id(uid), id(gid)) {
        (Ok(uid), Ok(gid)) => Ok(Owner { uid, gid }),
        _ => Err(refused(
            text,
            "UID or UID:GID, as numbers, such as 1000:1000",
        )),
    }
}

pub(super) fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| digits(text) && (3..=5).contains(&text.len()) && *mode <= 0o3777)
        .ok_or_else(|| refused(text, "an octal number from 0000 to 3777, such as 0755"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[(&str, &str)]) -> Result<Spec, BadOption> {
        let options = options
            .iter()
            .map(|(option, value)| ((*option).to_owned(), (*value).to_owned()))
            .collect();
        Spec::parse(&options)
    }

    /// `-o` arguments as the command line has them, one a line.
    fn parse_lines(lines: &str) -> Result<Spec, BadOption> {
        let options: Vec<_> = lines
            .lines()
            .map(|line| line.split_once('=').unwrap_or((line, "")))
            .collect();
        parse(&options)
    }

    /// A volume's options, and the specification's tags; what they have in common
    /// with the defaults has none.
    #[test]
    fn accepted() {
        let cases = [
            ("", ""),
            ("o=", ""),
            (
                "restore=linux dc5e8c; linux main; linux; npm-feature-*",
                "restore:0:dc5e8c restore:0:linux restore:1:linux restore:1:main restore:2:linux \
                 restore:3:npm-feature-&2a",
            ),
            (
                "restore=\ta\t b  a;; ;c;",
                "restore:0:a restore:0:b restore:1:c",
            ),
            ("restore=", "opt:reuse=fresh"),
            ("save=linux main linux", "save:linux save:main"),
            ("save=a&b -x", "save:-x save:a&b"),
            ("save=", "opt:reuse=fresh"),
            ("type=cache", ""),
            (
                "type=job\nsave=a\non-miss=fail",
                "save:a opt:type=job opt:on-miss=fail",
            ),
            ("publish=unless-failed", ""),
            ("publish=on-success", "opt:publish=on-success"),
            ("publish=always", "opt:publish=always"),
            ("publish=never", "opt:publish=never"),
            ("scope=main", "scope:main"),
            ("scope=-", ""),
            (
                "scope=me\nread-scopes=main - me main",
                "scope:me opt:read-scopes=main&20-",
            ),
            ("read-scopes=a,b, c", "opt:read-scopes=a&20b&20c"),
            ("read-scopes=-", ""),
            ("size=3G", "opt:size=3221225472"),
            ("size=16M", "opt:size=16777216"),
            ("fs=xfs", "opt:fs=xfs"),
            ("fs=ext4", "opt:fs=ext4"),
            ("owner=1000", "opt:owner=1000:1000"),
            ("owner=1000:100", "opt:owner=1000:100"),
            ("owner=0:4294967294", "opt:owner=0:4294967294"),
            ("mode=700", "opt:mode=0700"),
            ("mode=0755", "opt:mode=0755"),
            ("mode=01777", "opt:mode=1777"),
            ("on-miss=base", ""),
            ("on-miss=empty", "opt:on-miss=empty"),
            ("on-miss=fail\nrestore=a", "restore:0:a opt:on-miss=fail"),
            (
                "on-miss=empty\nsize=300M",
                "opt:size=314572800 opt:on-miss=empty",
            ),
            (
                "on-miss=empty\nfs=ext4\nsize=16M",
                "opt:size=16777216 opt:fs=ext4 opt:on-miss=empty",
            ),
            ("on-error=scratch", "opt:on-error=scratch"),
            ("on-error=fail", ""),
            ("reuse=keep", ""),
            ("reuse=fresh", "opt:reuse=fresh"),
            ("reuse=keep\nrestore=a", "restore:0:a opt:reuse=keep"),
            ("reuse=fresh\nsave=a", "save:a"),
            ("type=cache", ""),
            // What Podman makes of `-o o=…`, of Quadlet's keys, and of `-o nocopy`.
            (
                "o=size=3G,uid=5,gid=6,restore=a b;c\nSIZE=3G\nUID=5\nGID=6",
                "restore:0:a restore:0:b restore:1:c opt:size=3221225472 opt:owner=5:6",
            ),
            ("o=uid=5\nUID=5", "opt:owner=5:5"),
            ("GID=5", "opt:owner=0:5"),
            ("owner=1:2\nuid=1\ngid=2", "opt:owner=1:2"),
            ("NOQUOTA=true", ""),
            ("nocopy", ""),
            ("o=nocopy,save=a,", "save:a"),
            (
                "device=none\no= Save = a , mode=700",
                "save:a opt:mode=0700",
            ),
            ("device=lvm-cache-friend", ""),
        ];
        for (options, want) in cases {
            let spec = parse_lines(options).unwrap_or_else(|e| panic!("{options:?}: {e}"));
            let tags = spec.to_tags();
            let text: Vec<_> = tags
                .iter()
                .map(|tag| tag.as_str().strip_prefix("friend:").unwrap())
                .collect();
            assert_eq!(text.join(" "), want, "{options:?}");
            assert_eq!(Spec::from_tags(&tags), Some(spec), "{options:?}");
        }
    }

    /// Options, the one that the error must name, and a part of what it must say.
    #[test]
    fn refused() {
        let long = "a".repeat(MAX_TERM + 1);
        let many = |word: &str, n| vec![word; n].join(" ");
        let distinct: Vec<_> = (0..=MAX_SAVE).map(|n| n.to_string()).collect();
        let cases = [
            ("colour=red".to_owned(), "colour", "restore, save, publish"),
            ("o=restore=a,colour".to_owned(), "colour", "restore, save"),
            ("=x".to_owned(), "", "restore, save"),
            ("\u{1b}[31m=x".to_owned(), "\\u{1b}[31m", "unknown option"),
            (
                "restore=*".to_owned(),
                "restore",
                "\"*\" is not a tag or tag prefix",
            ),
            ("restore=a b*c".to_owned(), "restore", "\"b*c\""),
            ("restore=a**".to_owned(), "restore", "\"a**\""),
            ("restore=a,b".to_owned(), "restore", "\"a,b\""),
            ("restore=caf\u{e9}".to_owned(), "restore", "letters, digits"),
            ("restore=a\0b".to_owned(), "restore", "\"a\\0b\""),
            (format!("restore={long}"), "restore", "at most 512 bytes"),
            (
                format!("restore={}", many("a;", 33)),
                "restore",
                "at most 32",
            ),
            (format!("restore={}", many("a", 65)), "restore", "64 tags"),
            ("save=a*".to_owned(), "save", "invalid value \"a*\""),
            (format!("save={long}"), "save", "at most 512 bytes"),
            (format!("save={}", distinct.join(" ")), "save", "at most 32"),
            (format!("save={}", "a ".repeat(3000)), "save", "4096 bytes"),
            (
                "publish=yes".to_owned(),
                "publish",
                "unless-failed, on-success, always, if-missing, never",
            ),
            ("publish=".to_owned(), "publish", "\"\""),
            ("publish=Never".to_owned(), "publish", "\"Never\""),
            ("scope=a b".to_owned(), "scope", "\"a b\""),
            ("scope=-x".to_owned(), "scope", "not beginning with -"),
            ("scope=".to_owned(), "scope", "\"\""),
            (
                format!("read-scopes={}", distinct.join(" ")),
                "read-scopes",
                "at most 16",
            ),
            ("read-scopes=a;b".to_owned(), "read-scopes", "\"a;b\""),
            ("size=big".to_owned(), "size", "\"big\" is not a size"),
            ("size=30".to_owned(), "size", "from 16 MiB to 256 TiB"),
            ("size=257T".to_owned(), "size", "from 16 MiB to 256 TiB"),
            ("size=-1G".to_owned(), "size", "not a size"),
            (
                "size=299M\non-miss=empty".to_owned(),
                "size",
                "at least 300 MiB",
            ),
            ("fs=btrfs".to_owned(), "fs", "xfs, ext4"),
            ("owner=root".to_owned(), "owner", "UID or UID:GID"),
            ("owner=1:".to_owned(), "owner", "UID or UID:GID"),
            ("owner=1:2:3".to_owned(), "owner", "UID or UID:GID"),
            ("owner=+1".to_owned(), "owner", "UID or UID:GID"),
            ("owner=4294967295".to_owned(), "owner", "UID or UID:GID"),
            ("owner=1\nuid=2".to_owned(), "owner", "contradicts"),
            ("owner=1\ngid=2".to_owned(), "owner", "contradicts"),
            ("uid=-1".to_owned(), "uid", "4294967294"),
            ("gid=users".to_owned(), "gid", "4294967294"),
            ("mode=rwx".to_owned(), "mode", "octal"),
            ("mode=7".to_owned(), "mode", "octal"),
            ("mode=0888".to_owned(), "mode", "octal"),
            ("mode=4755".to_owned(), "mode", "to 3777"),
            ("mode=+755".to_owned(), "mode", "octal"),
            ("on-miss=fail".to_owned(), "on-miss", "needs restore"),
            ("on-miss=none".to_owned(), "on-miss", "base, empty, fail"),
            ("on-error=ignore".to_owned(), "on-error", "fail, scratch"),
            ("reuse=no".to_owned(), "reuse", "fresh, keep"),
            (
                "type=job\nreuse=fresh".to_owned(),
                "reuse",
                "not for job volumes",
            ),
            ("type=tmpfs".to_owned(), "type", "cache, job"),
            (
                "device=/dev/sda".to_owned(),
                "device",
                "none or lvm-cache-friend",
            ),
            ("nocopy=no".to_owned(), "nocopy", "no value"),
            ("INODES=5".to_owned(), "inodes", "leave it out"),
            ("timeout=20".to_owned(), "timeout", "o=timeout=SECONDS"),
            (
                "save=a\no=save=b".to_owned(),
                "save",
                "given twice, as \"b\" and as \"a\"",
            ),
            (
                "o=size=3G,size=4G\nSIZE=4G".to_owned(),
                "size",
                "given twice",
            ),
        ];
        for (options, option, problem) in cases {
            let error = parse_lines(&options).expect_err(&options);
            assert_eq!(error.option, option, "{options:?}: {error}");
            assert!(error.problem.contains(problem), "{options:?}: {error}");
            assert!(error.to_string().len() < 600, "{error}");
        }
    }

    #[test]
    fn tags_that_are_no_specification() {
        for tags in [
            "friend:restore:0",
            "friend:restore::a",
            "friend:restore:x:a",
            "friend:restore:1:a",
            "friend:restore:0:a friend:restore:2:b",
            "friend:restore:0:&2a",
            "friend:restore:0:a&2A",
            "friend:restore:0:",
            "friend:save:",
            "friend:scope:",
            "friend:scope:-",
            "friend:scope:a friend:scope:b",
            "friend:opt:size",
            "friend:opt:size=1",
            "friend:opt:size=3G friend:opt:size=4G",
            "friend:opt:colour=red",
            "friend:opt:restore=a",
            "friend:opt:save=a",
            "friend:opt:scope=a",
            "friend:opt:uid=1",
            "friend:opt:publish=perhaps",
        ] {
            let tags: Vec<Tag> = tags.split(' ').map(|tag| tag.parse().unwrap()).collect();
            assert_eq!(Spec::from_tags(&tags), None, "{tags:?}");
        }
    }

    fn words(
        word: &'static str,
        most: usize,
        between: &'static str,
    ) -> impl Strategy<Value = String> {
        prop::collection::vec(word, 0..=most).prop_map(move |words| words.join(between))
    }

    /// Options that are all accepted.
    pub(in crate::cache) fn options() -> impl Strategy<Value = BTreeMap<String, String>> {
        let term = "[-a-z0-9_+./=!:&#]{1,12}\\*?";
        let choice = |words: &'static [&'static str]| {
            prop::sample::select(words).prop_map(str::to_owned).boxed()
        };
        let values = vec![
            ("restore", words(term, 6, " ; ").boxed()),
            ("save", words("[-a-z0-9_+./=!:&#]{1,12}", 6, " ").boxed()),
            (
                "publish",
                choice(&["unless-failed", "on-success", "always", "never"]),
            ),
            ("scope", "[a-z#&][-a-z:/]{0,5}".boxed()),
            ("read-scopes", words("-|[a-c:&]{1,3}", 5, " ").boxed()),
            (
                "size",
                (300_u64..1 << 28).prop_map(|mib| format!("{mib}M")).boxed(),
            ),
            ("fs", choice(&["xfs", "ext4"])),
            ("owner", "[0-9]{1,9}(:[0-9]{1,9})?".boxed()),
            ("mode", "0?[0-3][0-7]{3}".boxed()),
            ("on-miss", choice(&["base", "empty"])),
            ("on-error", choice(&["fail", "scratch"])),
            ("reuse", choice(&["fresh", "keep"])),
        ];
        let options: Vec<_> = values
            .into_iter()
            .map(|(option, values)| {
                prop::option::of(values).prop_map(move |value| Some((option.to_owned(), value?)))
            })
            .collect();
        options.prop_map(|options| options.into_iter().flatten().collect())
    }

    proptest! {
        #[test]
        fn specifications_come_back_from_tags_in_any_order(
            (options, seed) in (options(), any::<usize>())
        ) {
            let spec = Spec::parse(&options).unwrap();
            let mut tags = spec.to_tags();
            tags.sort();
            if !tags.is_empty() {
                let n = seed % tags.len();
                tags.rotate_left(n);
            }
            prop_assert_eq!(Spec::from_tags(&tags), Some(spec));
        }

        #[test]
        fn options_within_o_are_as_by_themselves(options in options()) {
            let all: Vec<_> = options.iter().map(|(option, value)| format!("{option}={value}")).collect();
            let within = BTreeMap::from([("o".to_owned(), all.join(","))]);
            prop_assert_eq!(Spec::parse(&within), Spec::parse(&options));
        }

        #[test]
        fn no_option_panics(
            options in prop::collection::btree_map(
                "o|restore|save|scope|read-scopes|size|owner|mode|uid|gid|.{0,10}",
                "[-a-z0-9 ;,*=:.]{0,30}|.{0,30}",
                0..4,
            )
        ) {
            if let Ok(spec) = Spec::parse(&options) {
                prop_assert_eq!(Spec::from_tags(&spec.to_tags()), Some(spec));
            }
        }
    }
}
