//! A volume's specification: its options, parsed once at Create, kept as tags.

use std::collections::BTreeMap;

use super::names::Tag;
use super::select::Criteria;
use super::units::Bytes;

/// Who may read an entry. `None` stands for entries without a scope: those the
/// original script made, and those of volumes created without `scope`.
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
    /// Never.
    Never,
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

/// What becomes of a Mount that the store cannot serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// It fails.
    #[default]
    Fail,
    /// It gets an empty directory of bounded size, in memory.
    Scratch,
}

/// What a volume holds at its next use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// The best entry, again.
    Fresh,
    /// What it held before.
    Keep,
}

/// Owner of the volume's root directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// All that a volume's options say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// What to restore from.
    pub restore: Criteria,
    /// Tags of what is published; none: nothing is.
    pub save: Vec<Tag>,
    /// When the end of a lease publishes.
    pub publish: Publish,
    /// The scope that entries are published into, and read from first.
    pub scope: Scope,
    /// Scopes read after it, in order.
    pub read_scopes: Vec<Scope>,
    /// Virtual size, at least; `None`: that of the origin.
    pub size: Option<Bytes>,
    /// File system asked for; `None`: that of the origin, XFS where one is made.
    pub fs: Option<FsType>,
    /// Owner of the root directory; `None`: as it is.
    pub owner: Option<Owner>,
    /// Mode of the root directory, permission bits only; `None`: as it is.
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

impl Spec {
    /// The specification that a volume's options make.
    ///
    /// Podman's own mirrored keys are understood: `o=` is a comma-separated list
    /// of further options, and `SIZE`, `UID`, `GID` … beside it repeat it.
    ///
    /// # Errors
    /// The first option that is unknown, malformed, or given twice differently.
    pub fn parse(options: &BTreeMap<String, String>) -> Result<Self, BadOption> {
        let _ = options;
        todo!("selection helper")
    }

    /// The tags that say all of it, on the volume's LV (`friend:restore:`,
    /// `friend:save:`, `friend:scope:`, `friend:opt:`; not the volume's name).
    #[must_use]
    pub fn to_tags(&self) -> Vec<Tag> {
        todo!("selection helper")
    }

    /// The specification that a volume's tags say; `None` where they do not
    /// parse. Tags that are not of a specification are passed over.
    #[must_use]
    pub fn from_tags<'a>(tags: impl IntoIterator<Item = &'a Tag>) -> Option<Self> {
        let _ = tags;
        todo!("selection helper")
    }

    /// The scopes to read, in order.
    pub fn scopes(&self) -> impl Iterator<Item = &Scope> {
        std::iter::once(&self.scope).chain(&self.read_scopes)
    }
}
