// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a logical volume's tags make of it.

use super::criteria::Criteria;
use super::names::{LvName, Tag, VolumeName};
use super::spec::{OnMiss, Reuse, Scope, Spec, scope_name};
use super::tags::{
    AFTER, CACHE, DEFAULT, DOOMED, FAILED, FROM, LEASE, MAKING, NOTE, OPT, OURS, PIN, RESTORE,
    SAVE, SCOPE, SNAPSHOT, USED, VOLUME,
};
use crate::text::shortened;

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
        /// When it was last used, as far as that is noted, seconds since 1970; 0: never yet.
        used: u64,
        /// Lineage.
        from: Option<LvName>,
    },
    /// A volume's, now or until its last lease is settled.
    Volume {
        /// Its name; `None` for what a job asked for in its job volume (the mount table says
        /// which), and once the volume was removed with a lease unsettled.
        volume: Option<VolumeName>,
        /// Its specification.
        spec: Box<Spec>,
        /// Lineage.
        from: Option<LvName>,
        /// The boot in which its unsettled lease began.
        lease: Option<String>,
        /// The work in that lease failed.
        failed: bool,
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
        // The mark was set on purpose, however unclear the rest of the tags is.
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
            // Being made, or made for a job that has not got it yet.
            if found.volume.is_none() && found.lease.is_none() && !found.making {
                return Err(format!(
                    "a volume's options but neither {VOLUME} nor {LEASE} nor {MAKING}"
                ));
            }
            let mut spec = Spec::from_tags(tags).ok_or("options that do not parse")?;
            if found.volume.is_none() {
                // Nothing uses it again, whatever is left of its options.
                spec.reuse = Reuse::Fresh;
            }
            return Ok(Self::Volume {
                volume: found.volume,
                spec: Box::new(spec),
                from: found.from,
                lease: found.lease,
                failed: found.failed,
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
                used: found.used,
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
    used: u64,
    making: bool,
    failed: bool,
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
            } else if let Some(rest) = text.strip_prefix(USED) {
                // Tagged twice, by hand: the later time counts.
                found.used = found.used.max(time(rest).ok_or_else(bad)?);
            } else if let Some(rest) = text.strip_prefix(VOLUME) {
                found.of_volume = true;
                once(&mut found.volume, VOLUME, rest.parse().map_err(|_| bad())?)?;
            } else if let Some(rest) = text.strip_prefix(LEASE) {
                found.of_volume = true;
                let valid = rest.len() == 8 && rest.bytes().all(|b| b.is_ascii_hexdigit());
                let boot = valid.then(|| rest.to_owned()).ok_or_else(bad)?;
                once(&mut found.lease, LEASE, boot)?;
            } else if text == FAILED {
                (found.of_volume, found.failed) = (true, true);
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

/// The tag of an entry that is used at `now`, seconds since 1970; `None` beyond the year 9999.
#[must_use]
pub fn used_tag(now: u64) -> Option<Tag> {
    let time = jiff::Timestamp::from_second(i64::try_from(now).ok()?).ok()?;
    Some(tag(USED, &time.to_string()))
}

/// A time as [`used_tag`] writes it.
fn time(text: &str) -> Option<u64> {
    let time: jiff::Timestamp = text.parse().ok()?;
    let seconds = u64::try_from(time.as_second()).ok()?;
    (time.to_string() == text).then_some(seconds)
}

/// The tag of an entry that is published when `highest` is the highest number of a volume.
#[must_use]
pub fn after_tag(highest: u64) -> Tag {
    tag(AFTER, &highest.to_string())
}

/// Where an entry is in the order of publishing, the later the higher: `seq` is the number of its volume, and `tags` may
/// say that it was published after others were made.
#[must_use]
pub fn place(seq: u64, tags: &[Tag]) -> u64 {
    let after = |tag: &Tag| tag.as_str().strip_prefix(AFTER)?.parse::<u64>().ok();
    // Between the volume of that number and the next one.
    let between = |number: u64, rest: u64| number.saturating_mul(1 << 32).saturating_add(rest);
    match tags.iter().filter_map(after).max() {
        Some(after) if after > seq => between(after, seq),
        _ => between(seq, 0),
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

/// All the tags of the LV of a cache that a job asked for, until the job has it. What it restores from
/// is chosen once, so its criteria are not kept.
#[must_use]
pub fn late_tags(spec: &Spec, from: Option<&LvName>) -> Vec<Tag> {
    let mut tags = vec![tag(SNAPSHOT, ""), tag(MAKING, "")];
    tags.extend(from.map(|from| tag(FROM, from.as_str())));
    let kept = Spec {
        restore: Criteria::default(),
        on_miss: OnMiss::default(),
        ..spec.clone()
    };
    tags.extend(kept.to_tags());
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cache::spec::tests::options;
    use proptest::prelude::*;

    fn tags(text: &str) -> Vec<Tag> {
        text.split_whitespace()
            .map(|tag| tag.parse().unwrap())
            .collect()
    }

    fn told(role: &Role) -> String {
        let list = |tags: &[Tag]| tags.iter().map(Tag::as_str).collect::<Vec<_>>().join(" ");
        match role {
            Role::Foreign => "foreign".to_owned(),
            Role::Unclear(reason) => format!("unclear: {reason}"),
            Role::Base => "base".to_owned(),
            Role::Making => "making".to_owned(),
            Role::Plain => "plain".to_owned(),
            Role::Doomed => "doomed".to_owned(),
            Role::Entry {
                scope,
                tags,
                pinned,
                used,
                from,
            } => {
                let mut text = format!("entry {}", list(tags));
                for (word, name) in [
                    ("scope", scope.as_ref().map(Tag::as_str)),
                    ("from", from.as_ref().map(LvName::as_str)),
                ] {
                    if let Some(name) = name {
                        text += &format!(", {word} {name}");
                    }
                }
                if *pinned {
                    text += ", pinned";
                }
                if *used > 0 {
                    text += &format!(", used {used}");
                }
                text
            }
            Role::Volume {
                volume,
                spec,
                from,
                lease,
                failed,
                making,
            } => {
                let mut text = match volume {
                    Some(volume) => format!("volume {volume}"),
                    None => "removed volume".to_owned(),
                };
                if !spec.restore.0.is_empty() {
                    text += &format!(", restore {}", spec.restore);
                }
                if !spec.save.is_empty() {
                    text += &format!(", save {}", list(&spec.save));
                }
                for (word, name) in [
                    ("scope", spec.scope.as_ref().map(Tag::as_str)),
                    ("from", from.as_ref().map(LvName::as_str)),
                    ("lease", lease.as_deref()),
                ] {
                    if let Some(name) = name {
                        text += &format!(", {word} {name}");
                    }
                }
                if *failed {
                    text += ", failed";
                }
                if *making {
                    text += ", making";
                }
                text
            }
        }
    }

    #[test]
    fn the_order_of_publishing() {
        let in_order = [
            (1, ""),
            (2, ""),
            (9, ""),
            // Made as the first and the third, published after the ninth.
            (1, "friend:note:after:9"),
            (3, "friend:note:after:9 friend:note:after:2"),
            (10, "friend:note:after:9"),
            (11, "friend:note:after:x"),
        ];
        let places = in_order.map(|(seq, given)| place(seq, &tags(given)));
        assert!(places.is_sorted_by(|a, b| a < b), "{places:?}");
        assert!(place(u64::MAX, &[]) > places[6]);
        let entry = "friend:snapshot friend:cache:a friend:note:after:9";
        assert_eq!(told(&Role::from_tags(&tags(entry))), "entry a");
        assert_eq!(after_tag(9).as_str(), "friend:note:after:9");
    }

    /// An LV's tags, and what it is. Any row may be added.
    #[test]
    fn roles() {
        for (given, want) in [
            // Others'.
            ("", "foreign"),
            ("someone:else backup", "foreign"),
            ("friend friends:cache:x not:friend:snapshot", "foreign"),
            // The article's own.
            ("friend:default", "base"),
            (
                "friend:cache:dc5e8c5be193 friend:cache:linux friend:snapshot",
                "entry dc5e8c5be193 linux",
            ),
            ("friend:cache:-odd friend:snapshot", "entry -odd"),
            ("friend:snapshot", "plain"),
            // Ours.
            ("friend:default friend:snapshot", "base"),
            ("friend:default friend:snapshot friend:from:x", "base"),
            (
                "friend:default friend:snapshot friend:cache:a friend:pin",
                "base",
            ),
            (
                "friend:snapshot friend:cache:a friend:scope:main friend:from:friend-x friend:pin",
                "entry a, scope main, from friend-x, pinned",
            ),
            (
                "friend:snapshot friend:cache:a friend:used:1970-01-02T00:00:01Z",
                "entry a, used 86401",
            ),
            (
                "friend:snapshot friend:cache:a friend:used:1970-01-02T00:00:01Z friend:used:1970-01-01T00:00:00Z",
                "entry a, used 86401",
            ),
            (
                "friend:snapshot friend:cache:a friend:used:1970-01-02",
                "unclear: friend:used:1970-01-02 does not parse",
            ),
            (
                "friend:snapshot friend:cache:a friend:used:1969-12-31T00:00:00Z",
                "unclear: friend:used:1969-12-31T00:00:00Z does not parse",
            ),
            ("friend:snapshot friend:cache:a friend:cache:a", "entry a"),
            ("friend:snapshot friend:cache:a someone:else", "entry a"),
            (
                "friend:snapshot friend:cache:a friend:note:by-bob",
                "entry a",
            ),
            ("friend:snapshot friend:from:x", "plain"),
            ("friend:snapshot friend:volume:v", "volume v"),
            (
                "friend:snapshot friend:volume:v friend:restore:0:a friend:restore:0:b friend:restore:1:c&2a \
                 friend:save:a friend:save:d friend:scope:main friend:from:x friend:lease:0123abcd",
                "volume v, restore a b; c*, save a d, scope main, from x, lease 0123abcd",
            ),
            (
                "friend:snapshot friend:volume:v friend:making",
                "volume v, making",
            ),
            ("friend:snapshot friend:volume:v friend:pin", "volume v"),
            (
                "friend:snapshot friend:lease:0123abcd friend:save:a",
                "removed volume, save a, lease 0123abcd",
            ),
            (
                "friend:snapshot friend:making friend:save:a friend:scope:s",
                "removed volume, save a, scope s, making",
            ),
            ("friend:snapshot friend:making", "making"),
            ("friend:snapshot friend:making friend:cache:a", "making"),
            ("friend:snapshot friend:making friend:default", "making"),
            ("friend:snapshot friend:doomed", "doomed"),
            (
                "friend:snapshot friend:doomed friend:volume:v friend:cache:a",
                "doomed",
            ),
            (
                "friend:snapshot friend:doomed friend:scope:a friend:scope:b",
                "doomed",
            ),
            // Neither.
            (
                "friend:cache:a",
                "unclear: tags of ours but not friend:snapshot",
            ),
            (
                "friend:volume:v",
                "unclear: tags of ours but not friend:snapshot",
            ),
            (
                "friend:doomed",
                "unclear: tags of ours but not friend:snapshot",
            ),
            (
                "friend:pin",
                "unclear: tags of ours but not friend:snapshot",
            ),
            (
                "friend:whatever",
                "unclear: tags of ours but not friend:snapshot",
            ),
            (
                "friend:default friend:making",
                "unclear: friend:making but not friend:snapshot",
            ),
            (
                "friend:default friend:snapshot friend:doomed",
                "unclear: both friend:default and friend:doomed",
            ),
            (
                "friend:default friend:snapshot friend:volume:v",
                "unclear: both a volume's tags and friend:default",
            ),
            (
                "friend:snapshot friend:cache:a friend:volume:v",
                "unclear: both a volume's tags and friend:cache:",
            ),
            (
                "friend:snapshot friend:cache:a friend:lease:0123abcd",
                "unclear: both a volume's tags and friend:cache:",
            ),
            (
                "friend:snapshot friend:cache:a friend:save:a",
                "unclear: both a volume's tags and friend:cache:",
            ),
            (
                "friend:snapshot friend:save:a",
                "unclear: a volume's options but neither friend:volume: nor friend:lease: nor friend:making",
            ),
            (
                "friend:snapshot friend:cache:",
                "unclear: friend:cache: does not parse",
            ),
            (
                "friend:snapshot friend:cache:a friend:scope:",
                "unclear: friend:scope: does not parse",
            ),
            (
                "friend:snapshot friend:cache:a friend:scope:-",
                "unclear: friend:scope:- does not parse",
            ),
            (
                "friend:snapshot friend:cache:a friend:scope:a friend:scope:b",
                "unclear: more than one friend:scope:",
            ),
            (
                "friend:snapshot friend:cache:a friend:from:a/b",
                "unclear: friend:from:a/b does not parse",
            ),
            (
                "friend:snapshot friend:volume:../v",
                "unclear: friend:volume:../v does not parse",
            ),
            (
                "friend:snapshot friend:volume:v friend:volume:w",
                "unclear: more than one friend:volume:",
            ),
            (
                "friend:snapshot friend:volume:v friend:lease:now",
                "unclear: friend:lease:now does not parse",
            ),
            (
                "friend:snapshot friend:volume:v friend:lease:01234567 friend:lease:89abcdef",
                "unclear: more than one friend:lease:",
            ),
            (
                "friend:snapshot friend:volume:v friend:restore:1:a",
                "unclear: options that do not parse",
            ),
            (
                "friend:snapshot friend:volume:v friend:opt:hue=red",
                "unclear: options that do not parse",
            ),
            (
                "friend:snapshot friend:cache:a friend:pinned",
                "unclear: friend:pinned is not a tag we know",
            ),
            (
                "friend:snapshot friend:",
                "unclear: friend: is not a tag we know",
            ),
        ] {
            assert_eq!(told(&Role::from_tags(&tags(given))), want, "{given:?}");
            if !given.contains(SNAPSHOT) {
                let role = Role::from_tags(&tags(given));
                let untouched = matches!(role, Role::Foreign | Role::Unclear(_) | Role::Base);
                assert!(untouched, "{given:?}");
            }
        }
    }

    #[test]
    fn times_of_use() {
        for (now, want) in [
            (0, Some("friend:used:1970-01-01T00:00:00Z")),
            (1_764_072_001, Some("friend:used:2025-11-25T12:00:01Z")),
            (u64::MAX, None),
        ] {
            let tag = used_tag(now);
            assert_eq!(tag.as_ref().map(Tag::as_str), want, "{now}");
        }
    }

    proptest! {
        #[test]
        fn volumes_come_back(
            options in options(),
            volume in "[a-zA-Z0-9][a-zA-Z0-9_.-]{0,20}",
            from in prop::option::of("[a-z][a-z.-]{0,8}"),
            lease in prop::option::of("[0-9a-f]{8}"),
            making in any::<bool>(),
        ) {
            let spec = Spec::parse(&options).unwrap();
            let volume: VolumeName = volume.parse().unwrap();
            let from: Option<LvName> = from.map(|from| from.parse().unwrap());
            let mut all = volume_tags(&volume, &spec, from.as_ref());
            all.extend(lease.iter().map(|boot| tag(LEASE, boot)));
            all.extend(making.then(|| tag(MAKING, "")));
            all.sort();
            prop_assert_eq!(
                Role::from_tags(&all),
                Role::Volume { volume: Some(volume), spec: Box::new(spec), from, lease, failed: false, making }
            );
        }

        #[test]
        fn entries_come_back(options in options(), from in prop::option::of("[a-z]{1,8}")) {
            let spec = Spec::parse(&options).unwrap();
            let from: Option<LvName> = from.map(|from| from.parse().unwrap());
            let mut all = entry_tags(&spec.save, &spec.scope, from.as_ref());
            all.sort();
            let want = if spec.save.is_empty() {
                Role::Plain
            } else {
                Role::Entry { scope: spec.scope, tags: spec.save, pinned: false, used: 0, from }
            };
            prop_assert_eq!(Role::from_tags(&all), want);
        }

        /// LVM keeps a set of tags, in an order of its own.
        #[test]
        fn order_says_nothing(
            (all, other) in prop::collection::vec(
                "friend:(default|snapshot|making|pin|(cache|scope|volume|save|from|restore:0|lease|opt):a|doomed)|x",
                0..6,
            ).prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))
        ) {
            let role = |all: &[String]| Role::from_tags(&tags(&all.join(" ")));
            match (role(&all), role(&other)) {
                (Role::Unclear(_), Role::Unclear(_)) => {}
                (one, two) => prop_assert_eq!(one, two),
            }
        }

        #[test]
        fn nothing_without_a_mark_of_ours_is_ours(
            all in prop::collection::vec("(friend:(making|pin|doomed|(cache|scope|volume|lease):a)|[a-z:&]{1,9})", 0..6)
        ) {
            let role = Role::from_tags(&tags(&all.join(" ")));
            prop_assert!(matches!(role, Role::Foreign | Role::Unclear(_)));
        }
    }

    #[test]
    fn a_volume_without_options_has_three_tags_at_most() {
        let spec = Spec::parse(&BTreeMap::new()).unwrap();
        let volume = "v".parse().unwrap();
        let from = "friend-x".parse().unwrap();
        assert_eq!(
            volume_tags(&volume, &spec, Some(&from)),
            tags("friend:snapshot friend:volume:v friend:from:friend-x")
        );
    }
}
