//! The choice of what to restore from: criteria, an index of entries, newest first.

use super::names::{LvName, Tag};
use super::spec::{Scope, Spec};

/// One term of a criterion.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Term {
    /// A tag, matched exactly.
    Exact(Tag),
    /// `prefix*`: any tag that begins so. Not empty.
    Prefix(Tag),
}

/// A set of terms, all required, in any order. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criterion(pub Vec<Term>);

/// Criteria in order of preference; empty: nothing is restored but the base.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Criteria(pub Vec<Criterion>);

/// An entry as the index keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its LV.
    pub lv: LvName,
    /// Its place in the order of publishing ([`crate::storage::Lv::seq`]).
    pub seq: u64,
    /// When it was published, seconds since 1970; for people, never for order:
    /// clocks are set back.
    pub created: u64,
    /// Who may read it.
    pub scope: Scope,
    /// Its tags, without the `friend:cache:` before them.
    pub tags: Vec<Tag>,
}

/// What was chosen, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice<'a> {
    /// The entry.
    pub entry: &'a Entry,
    /// Which scope it was found in: 0 is the volume's own.
    pub scope: usize,
    /// Which criterion matched: 0 is the first.
    pub criterion: usize,
    /// The first criterion matched, and each of its terms is a whole tag.
    pub exact: bool,
}

/// The entries that can be chosen from, arranged for choosing.
#[derive(Debug, Clone, Default)]
pub struct Index {
    entries: Vec<Entry>,
}

impl Index {
    /// An index of `entries`, in any order.
    #[must_use]
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { entries }
    }

    /// Its entries, newest first.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry that `spec` restores from; `None` where no criterion matches.
    ///
    /// Scopes are asked in order, the volume's own first; in a scope the first
    /// criterion that matches any entry wins; in it the newest entry.
    #[must_use]
    pub fn choose(&self, spec: &Spec) -> Option<Choice<'_>> {
        let _ = spec;
        todo!("selection helper")
    }
}
