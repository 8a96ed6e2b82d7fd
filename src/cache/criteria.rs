// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an entry must have to be restored: terms, criteria, and their bounds.

use std::fmt;
use std::str::FromStr;

use super::names::Tag;
use crate::text::shortened;

/// Longest term, save tag or scope that is taken from a user, in bytes: as long
/// as a key of GitHub's cache action may be. LVM's metadata is text that is
/// rewritten whole at each commit, so long tags cost every command.
pub const MAX_TERM: usize = 512;

/// Most criteria of one volume.
pub const MAX_CRITERIA: usize = 32;

/// Most terms in all criteria of one volume together.
pub const MAX_TERMS: usize = 64;

/// Criteria that are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCriteria {
    /// Not a term.
    #[error(
        "{0:?} is not a tag or tag prefix: expected letters, digits and _ + . - / = ! : & #, at most {MAX_TERM} bytes, with * at the end of a prefix"
    )]
    Term(String),
    /// Over a bound.
    #[error(
        "too many: at most {MAX_CRITERIA} restore keys with {MAX_TERMS} tags in all are accepted"
    )]
    TooMany,
}

/// One term of a criterion.
///
/// Parses `tag` and `prefix*`; `*` alone, which would match anything, is refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Term {
    /// A tag, matched exactly.
    Exact(Tag),
    /// `prefix*`: any tag that begins so, the prefix itself included. Not empty.
    Prefix(Tag),
}

impl FromStr for Term {
    type Err = BadCriteria;

    fn from_str(text: &str) -> Result<Self, BadCriteria> {
        let tag = |text: &str| text.parse().ok().filter(|_| text.len() <= MAX_TERM);
        match text.strip_suffix('*') {
            Some(prefix) => tag(prefix).map(Self::Prefix),
            None => tag(text).map(Self::Exact),
        }
        .ok_or_else(|| BadCriteria::Term(shortened(text)))
    }
}

impl Term {
    /// The term that a job means by `text`: what LVM's tag alphabet lacks becomes `-`, as in the
    /// original script's protocol, but for a `*` at the end.
    ///
    /// # Errors
    /// When nothing is left before the `*`, or it is too long.
    pub fn of_job(text: &str) -> Result<Self, BadCriteria> {
        match text.strip_suffix('*') {
            Some(prefix) => format!("{}*", Tag::of_job(prefix)).parse(),
            None => Tag::of_job(text).parse(),
        }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(tag) => write!(f, "{tag}"),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// A set of terms, all required. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criterion(Vec<Term>);

impl Criterion {
    /// The criterion that requires each of `terms`; `None` where there are none.
    #[must_use]
    pub fn new(mut terms: Vec<Term>) -> Option<Self> {
        terms.sort_unstable();
        terms.dedup();
        (!terms.is_empty()).then_some(Self(terms))
    }

    /// The criterion that requires the terms of both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let terms = self.0.iter().chain(&other.0).cloned().collect();
        Self::new(terms).expect("both have terms")
    }

    /// Its terms, in an order of their own: they are a set.
    #[must_use]
    pub fn terms(&self) -> &[Term] {
        &self.0
    }
}

impl fmt::Display for Criterion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, term) in self.0.iter().enumerate() {
            write!(f, "{}{term}", if n == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// Criteria in order of preference; empty: nothing is restored but the base.
///
/// Parses `linux dc5e8c; linux main; linux; npm-feature-*`: terms by white space,
/// criteria by `;`. A criterion without terms is passed over, since it comes
/// from a variable that was empty, and must not come to match everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Criteria(pub Vec<Criterion>);

impl FromStr for Criteria {
    type Err = BadCriteria;

    fn from_str(text: &str) -> Result<Self, BadCriteria> {
        let mut criteria = Vec::new();
        let mut terms = 0;
        for criterion in text.split(';') {
            let parsed = criterion
                .split_whitespace()
                .map(str::parse)
                .collect::<Result<Vec<_>, _>>()?;
            terms += parsed.len();
            criteria.extend(Criterion::new(parsed));
            if criteria.len() > MAX_CRITERIA || terms > MAX_TERMS {
                return Err(BadCriteria::TooMany);
            }
        }
        Ok(Self(criteria))
    }
}

impl fmt::Display for Criteria {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, criterion) in self.0.iter().enumerate() {
            write!(f, "{}{criterion}", if n == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}
