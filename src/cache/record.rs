//! What a logical volume's tags make of it.

use super::names::{LvName, Tag, VolumeName, shortened};
use super::spec::{Scope, Spec, scope_name};

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
/// To be removed; never matched, never mounted.
pub const DOOMED: &str = "friend:doomed";
/// Content not ready yet: being imported, or a kept volume before its first use.
pub const MAKING: &str = "friend:making";
/// Prefix of the kernel's boot id (its first 8 hexadecimal digits): in use, or
/// used and not settled yet, since that boot. A lease that another boot began
/// did not end cleanly.
pub const LEASE: &str = "friend:lease:";
/// Prefix of what may be passed over: remarks of people, and of versions to come.
/// Any other tag that begins with `friend:` and is not known makes its LV
/// [`Role::Unclear`], since it may well say what must not be passed over.
pub const NOTE: &str = "friend:note:";

/// What all tags of ours begin with. Others' tags are never looked at.
const OURS: &str = "friend:";

/// What a logical volume is to us, told by its tags alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// No tag of ours: never looked at again.
    Foreign,
    /// It has tags of ours that contradict one another or do not parse. It is
    /// left alone, and reported with this reason.
    Unclear(String),
    /// What volumes start from when nothing matches. Cache tags on it are passed
    /// over: an entry that is made the base by hand stops being an entry.
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
        if !tags.iter().any(|tag| tag.as_str().starts_with(OURS)) {
            return Self::Foreign;
        }
        Self::of_ours(tags).unwrap_or_else(Self::Unclear)
    }

    fn of_ours(tags: &[Tag]) -> Result<Self, String> {
        let has = |wanted: &str| tags.iter().any(|tag| tag.as_str() == wanted);
        let (base, snapshot, doomed) = (has(DEFAULT), has(SNAPSHOT), has(DOOMED));
        if base && doomed {
            return Err(format!("both {DEFAULT} and {DOOMED}"));
        }
        if !base && !snapshot {
            return Err(format!("tags of ours but not {SNAPSHOT}"));
        }
        // Whoever dooms what the rest of the tags would make unclear means it.
        if doomed {
            return Ok(Self::Doomed);
        }

        let found = Found::in_tags(tags)?;
        if found.of_volume && (base || !found.cache.is_empty()) {
            let other = if base { DEFAULT } else { CACHE };
            return Err(format!("both a volume's tags and {other}"));
        }
        if found.making && !snapshot {
            return Err(format!("{MAKING} but not {SNAPSHOT}"));
        }
        if found.of_volume {
            if found.volume.is_none() && found.lease.is_none() {
                return Err(format!(
                    "a volume's options but neither {VOLUME} nor {LEASE}"
                ));
            }
            let spec = Spec::from_tags(tags).ok_or("options that do not parse")?;
            return Ok(Self::Volume {
                volume: found.volume,
                spec: Box::new(spec),
                from: found.from,
                lease: found.lease,
                making: found.making,
            });
        }
        Ok(if found.making {
            Self::Making
        } else if base {
            Self::Base
        } else if found.cache.is_empty() {
            Self::Plain
        } else {
            Self::Entry {
                scope: found.scope,
                tags: found.cache,
                pinned: found.pinned,
                from: found.from,
            }
        })
    }
}

/// What the tags say, each by itself.
#[derive(Default)]
struct Found {
    cache: Vec<Tag>,
    scope: Scope,
    from: Option<LvName>,
    pinned: bool,
    making: bool,
    /// There is a tag that only volumes have.
    of_volume: bool,
    volume: Option<VolumeName>,
    lease: Option<String>,
}

impl Found {
    fn in_tags(tags: &[Tag]) -> Result<Self, String> {
        let mut found = Self::default();
        for tag in tags {
            let text = tag.as_str();
            let bad = || format!("{} does not parse", shortened(text));
            if !text.starts_with(OURS) || text.starts_with(NOTE) {
                continue;
            }
            if let Some(rest) = text.strip_prefix(CACHE) {
                found.cache.push(rest.parse().map_err(|_| bad())?);
            } else if let Some(rest) = text.strip_prefix(SCOPE) {
                once(&mut found.scope, SCOPE, scope_name(rest).ok_or_else(bad)?)?;
            } else if let Some(rest) = text.strip_prefix(FROM) {
                once(&mut found.from, FROM, rest.parse().map_err(|_| bad())?)?;
            } else if let Some(rest) = text.strip_prefix(VOLUME) {
                found.of_volume = true;
                once(&mut found.volume, VOLUME, rest.parse().map_err(|_| bad())?)?;
            } else if let Some(rest) = text.strip_prefix(LEASE) {
                found.of_volume = true;
                let valid = rest.len() == 8 && rest.bytes().all(|b| b.is_ascii_hexdigit());
                let boot = valid.then(|| rest.to_owned()).ok_or_else(bad)?;
                once(&mut found.lease, LEASE, boot)?;
            } else if [RESTORE, SAVE, OPT].iter().any(|p| text.starts_with(p)) {
                found.of_volume = true;
            } else {
                match text {
                    PIN => found.pinned = true,
                    MAKING => found.making = true,
                    DEFAULT | SNAPSHOT => {}
                    _ => return Err(format!("{} is not a tag we know", shortened(text))),
                }
            }
        }
        found.cache.sort_unstable();
        found.cache.dedup();
        Ok(found)
    }
}

/// Fills `slot` with what only one tag may say.
fn once<T: PartialEq>(slot: &mut Option<T>, prefix: &str, value: T) -> Result<(), String> {
    match slot {
        Some(known) if *known != value => Err(format!("more than one {prefix}")),
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

/// All the tags of a new volume's LV, but for lease and making.
#[must_use]
pub fn volume_tags(volume: &VolumeName, spec: &Spec, from: Option<&LvName>) -> Vec<Tag> {
    let mut tags = vec![tag(SNAPSHOT, ""), tag(VOLUME, volume.as_str())];
    tags.extend(from.map(|from| tag(FROM, from.as_str())));
    tags.extend(spec.to_tags());
    tags
}

/// All the tags of a new entry: what `spec` saves, into its scope.
#[must_use]
pub fn entry_tags(save: &[Tag], scope: &Scope, from: Option<&LvName>) -> Vec<Tag> {
    let mut tags = vec![tag(SNAPSHOT, "")];
    tags.extend(save.iter().map(|saved| tag(CACHE, saved.as_str())));
    tags.extend(scope.iter().map(|scope| tag(SCOPE, scope.as_str())));
    tags.extend(from.map(|from| tag(FROM, from.as_str())));
    tags
}

/// The tag of a prefix and a name: all our names' letters are a tag's too.
fn tag(prefix: &str, name: &str) -> Tag {
    format!("{prefix}{name}")
        .parse()
        .expect("a name after a prefix is a tag")
}
