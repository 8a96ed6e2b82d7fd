// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tags that we give to logical volumes.

/// Marks the one base.
pub const DEFAULT: &str = "friend:default";
/// On everything that we make.
pub const SNAPSHOT: &str = "friend:snapshot";
/// Prefix of the tags that criteria match.
pub const CACHE: &str = "friend:cache:";
/// Prefix of a term to restore by: number of the criterion, `:`, the term escaped.
pub const RESTORE: &str = "friend:restore:";
/// Prefix of a tag to publish with.
pub const SAVE: &str = "friend:save:";
/// Prefix of another option of a volume: `KEY=VALUE`, the latter escaped.
pub const OPT: &str = "friend:opt:";
/// Prefix of the scope.
pub const SCOPE: &str = "friend:scope:";
/// Prefix of a volume's name.
pub const VOLUME: &str = "friend:volume:";
/// Prefix of the name of what it was made a snapshot of.
pub const FROM: &str = "friend:from:";
/// Never evicted.
pub const PIN: &str = "friend:pin";
/// Prefix of the time (`2026-11-25T12:30:00Z`) at which a lease last came from an entry; written at most once in
/// [`USED_GRAIN`] seconds.
pub const USED: &str = "friend:used:";
/// How often a use is noted, in seconds: each time is a commit, as many a lease takes anyhow.
pub const USED_GRAIN: u64 = 60 * 60;
/// To be removed; never matched, never mounted.
pub const DOOMED: &str = "friend:doomed";
/// Content not ready yet: being imported, or a kept volume before its first use.
pub const MAKING: &str = "friend:making";
/// Prefix of the kernel's boot id (its first 8 hexadecimal digits): in use, or
/// used and not settled yet, since that boot. A lease that another boot began
/// did not end cleanly.
pub const LEASE: &str = "friend:lease:";
/// The work in the lease that is not settled failed.
pub const FAILED: &str = "friend:failed";
/// Prefix of what may be passed over: remarks of people, and of versions to come.
/// Any other tag that begins with `friend:` and is not known makes its LV
/// [`super::record::Role::Unclear`], since it may well say what must not be passed over.
pub const NOTE: &str = "friend:note:";
/// On an entry that was published while its job went on: of the same lease there may be another, of its end. Earlier
/// versions may pass over it.
pub const CHECKPOINT: &str = "friend:note:checkpoint";
/// Prefix of the highest number of a volume ([`crate::storage::Lv::seq`]) that there was when an entry was published, on
/// one whose volume was made before: it is newer than that one. Earlier versions may pass over it.
pub const AFTER: &str = "friend:note:after:";

/// All of these, as docs/lvm-tags.md has them.
#[cfg(test)]
pub(crate) const TAGS: [&str; 18] = [
    DEFAULT, SNAPSHOT, CACHE, RESTORE, SAVE, OPT, SCOPE, VOLUME, FROM, PIN, USED, DOOMED, MAKING,
    LEASE, FAILED, NOTE, CHECKPOINT, AFTER,
];

/// What all tags of ours begin with. Others' tags are never looked at.
pub(super) const OURS: &str = "friend:";
