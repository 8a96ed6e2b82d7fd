//! What a logical volume's tags make of it.

use super::names::{LvName, Tag, VolumeName};
use super::spec::{Scope, Spec};

/// Marks the one base.
pub const DEFAULT: &str = "friend:default";
/// On everything that we make.
pub const SNAPSHOT: &str = "friend:snapshot";
/// Prefix of the tags that criteria match.
pub const CACHE: &str = "friend:cache:";
/// Prefix of the scope.
pub const SCOPE: &str = "friend:scope:";
/// Prefix of a volume's name.
pub const VOLUME: &str = "friend:volume:";
/// Prefix of the name of what it was made a snapshot of.
pub const FROM: &str = "friend:from:";
/// Never evicted.
pub const PIN: &str = "friend:pin";
/// To be removed; never matched, never mounted.
pub const DOOMED: &str = "friend:doomed";
/// Content not ready yet: being imported, or a kept volume before its first use.
pub const MAKING: &str = "friend:making";
/// Prefix of the kernel's boot id (its first 8 hexadecimal digits): in use, or
/// used and not settled yet, since that boot. A lease that another boot began
/// did not end cleanly.
pub const LEASE: &str = "friend:lease:";

/// What a logical volume is to us, told by its tags alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// No tag of ours: never looked at again.
    Foreign,
    /// It has tags of ours that contradict one another or do not parse. It is
    /// left alone, and reported with this reason.
    Unclear(String),
    /// What volumes start from when nothing matches.
    Base,
    /// Can be restored from: at least one cache tag.
    Entry {
        /// Who may read it.
        scope: Scope,
        /// The tags that criteria match, without their prefix.
        tags: Vec<Tag>,
        /// Never evicted.
        pinned: bool,
        /// Lineage.
        from: Option<LvName>,
    },
    /// A volume's, now or until its last lease is settled.
    Volume {
        /// Its name; `None` once the volume was removed with a lease unsettled.
        volume: Option<VolumeName>,
        /// Its specification.
        spec: Box<Spec>,
        /// Lineage.
        from: Option<LvName>,
        /// The boot in which its unsettled lease began.
        lease: Option<String>,
        /// Its content is not ready.
        making: bool,
    },
    /// An import under way or cut short: ours, not matched yet, no volume's.
    Making,
    /// `friend:snapshot` and nothing that gives it a use: the original script's
    /// snapshots without save tags. Never matched, left alone.
    Plain,
    /// To be removed (ours: it has `friend:snapshot` too).
    Doomed,
}

impl Role {
    /// The role that `tags` give.
    #[must_use]
    pub fn from_tags(tags: &[Tag]) -> Self {
        let _ = tags;
        todo!("selection helper")
    }
}

/// All the tags of a new volume's LV, but for lease and making.
#[must_use]
pub fn volume_tags(volume: &VolumeName, spec: &Spec, from: Option<&LvName>) -> Vec<Tag> {
    let _ = (volume, spec, from);
    todo!("selection helper")
}

/// All the tags of a new entry: what `spec` saves, into its scope.
#[must_use]
pub fn entry_tags(save: &[Tag], scope: &Scope, from: Option<&LvName>) -> Vec<Tag> {
    let _ = (save, scope, from);
    todo!("selection helper")
}
