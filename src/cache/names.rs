// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The names that cross our edges, each made only by parsing.
//!
//! LVM's rules for names and tags are those of lvm2's `validate_name` and
//! `validate_tag` (lib/misc/lvm-string.c). A [`Tag`] or [`LvName`] is whatever
//! LVM may hold, others' included, so that any listing can be read; what we take
//! from users is bounded where it is parsed ([`super::criteria`], [`super::spec`]).

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::text::shortened;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Longest volume name, in bytes: it becomes a directory's name.
pub const MAX_VOLUME_NAME: usize = 255;

/// A name or tag that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Not a tag.
    #[error("{0:?} is not a tag: expected letters, digits and _ + . - / = ! : & #")]
    Tag(String),
    /// Not a logical volume's name.
    #[error(
        "{0:?} is not a logical volume's name: expected letters, digits and . _ + -, not starting with -, at most 127 bytes"
    )]
    Lv(String),
    /// Not a volume's name.
    #[error(
        "{0:?} is not a volume name: expected letters, digits and _ . -, starting with a letter or digit, at most {MAX_VOLUME_NAME} bytes"
    )]
    Volume(String),
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $error:ident, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text, as LVM has it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;

            fn from_str(text: &str) -> Result<Self, BadName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(BadName::$error(shortened(text)))
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

const fn tag_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric()
        || matches!(
            b,
            b'_' | b'+' | b'.' | b'-' | b'/' | b'=' | b'!' | b':' | b'&' | b'#'
        )
}

name_type!(
    /// A tag as LVM allows it: `[A-Za-z0-9_+.-/=!:&#]`, of any length. A leading
    /// `-`, which lvm(8) denies, is taken by lvm2 2.03.16, and the original script
    /// made some: it wrote `-` for what LVM's alphabet lacks.
    Tag, Tag, |text| !text.is_empty() && text.bytes().all(tag_byte)
);

name_type!(
    /// The name of a logical volume (or of an image, in the reflink store).
    LvName, Lv, |text| !text.is_empty()
        && text.len() <= 127
        && !text.starts_with('-')
        && text != "." && text != ".."
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'+' | b'-'))
);

name_type!(
    /// The name of a volume, as Podman and Docker allow it:
    /// `[a-zA-Z0-9][a-zA-Z0-9_.-]*`. It is safe as a file's name.
    VolumeName, Volume, |text| text.len() <= MAX_VOLUME_NAME
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
);

impl Tag {
    /// What a job means by `text`, as a tag: what LVM's alphabet lacks becomes `-`.
    pub(super) fn of_job(text: &str) -> String {
        let byte = |c: char| u8::try_from(c).is_ok_and(tag_byte);
        text.chars()
            .map(|c| if byte(c) { c } else { '-' })
            .collect()
    }
}

impl VolumeName {
    /// What a volume is called of which only that LV is left: as that, where a volume can be.
    #[must_use]
    pub fn of_lv(lv: &LvName) -> Self {
        lv.as_str()
            .parse()
            .unwrap_or_else(|_| Self(format!("lv{}", lv.as_str().replace('+', "-")).into()))
    }
}

impl LvName {
    /// A new name of ours: `friend-` and the base64url of the time and four
    /// random bytes, as the original script made them (it had no random part).
    /// The prefix is for people: what is ours is told by tags alone.
    #[must_use]
    pub fn fresh(unix_seconds: u64, random: [u8; 4]) -> Self {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&(unix_seconds as u32).to_be_bytes());
        bytes[4..].copy_from_slice(&random);
        Self(format!("friend-{}", URL_SAFE_NO_PAD.encode(bytes)).into())
    }
}

/// Text as part of a tag: what LVM's alphabet lacks, and `&` itself, becomes
/// `&` and two hexadecimal digits a byte.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        if tag_byte(b) && b != b'&' {
            out.push(b as char);
        } else {
            out.push_str(&format!("&{b:02x}"));
        }
    }
    out
}

/// The reverse of [`escape`]; `None` where `text` is not what it makes.
#[must_use]
pub fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'&' {
            let (high, low) = (bytes.next()?, bytes.next()?);
            let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
            out.push(digit(high)? << 4 | digit(low)?);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out)
        .ok()
        .filter(|plain| escape(plain) == text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_lv_can_name_a_volume() {
        for (lv, volume) in [
            ("friend-x", "friend-x"),
            ("a+b", "lva-b"),
            ("_a", "lv_a"),
            ("+", "lv-"),
        ] {
            let named = VolumeName::of_lv(&lv.parse().unwrap());
            assert_eq!(named, volume.parse().unwrap());
        }
    }

    #[test]
    fn names() {
        let long = "a".repeat(5000);
        for (text, tag, lv, volume) in [
            ("linux", true, true, true),
            ("a/b", true, false, false),
            ("..", true, false, false),
            (".", true, false, false),
            ("", false, false, false),
            ("-x", true, false, false),
            ("a b", false, false, false),
            ("a*", false, false, false),
            ("a\0b", false, false, false),
            ("é", false, false, false),
            ("A-b_c.d", true, true, true),
            ("friend:cache:x", true, false, false),
            (&long, true, false, false),
        ] {
            assert_eq!(text.parse::<Tag>().is_ok(), tag, "tag {text:?}");
            assert_eq!(text.parse::<LvName>().is_ok(), lv, "lv {text:?}");
            assert_eq!(
                text.parse::<VolumeName>().is_ok(),
                volume,
                "volume {text:?}"
            );
        }
    }

    #[test]
    fn fresh_names_are_valid() {
        for random in [[0; 4], [255; 4], [0xfb, 0xef, 0xbe, 0xff]] {
            let name = LvName::fresh(1_700_000_000, random);
            assert_eq!(name.as_str().parse(), Ok(name.clone()));
        }
    }

    #[test]
    fn only_what_escape_makes_is_unescaped() {
        for (text, want) in [
            ("a&20b", Some("a b")),
            ("&26", Some("&")),
            ("&", None),
            ("&2", None),
            ("&zz", None),
            ("&2A", None), // escape writes &2a
            ("&41", None), // escape leaves A as it is
            ("&ff", None), // not UTF-8
            ("a b", None),
        ] {
            assert_eq!(unescape(text).as_deref(), want, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn escaped_text_is_a_tag_and_comes_back(text in ".{1,60}") {
            let tag = format!("friend:opt:x={}", escape(&text));
            prop_assert!(tag.parse::<Tag>().is_ok());
            prop_assert_eq!(unescape(&escape(&text)), Some(text));
        }
    }
}
