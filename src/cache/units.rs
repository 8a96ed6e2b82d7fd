// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sizes with their unit in the type.

use std::fmt;
use std::str::FromStr;

use crate::text::shortened;

/// A number of bytes.
///
/// Parses `4096`, `512K`, `30G`, `1.5GiB`: the suffixes K, M, G and T, with or
/// without `iB` or `B`, in either case, are powers of 1024, as LVM's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

/// What a size may look like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a size: expected a number of bytes above 0, or one with a suffix K, M, G or T (powers of 1024), such as 30G"
)]
pub struct BadSize(pub String);

impl Bytes {
    /// One kibibyte, 1024 bytes.
    pub const KIB: u64 = 1 << 10;
    /// One mebibyte, 1024 KiB.
    pub const MIB: u64 = 1 << 20;
    /// One gibibyte, 1024 MiB.
    pub const GIB: u64 = 1 << 30;

    /// `n` mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n * Self::MIB)
    }

    /// Rounded up to a multiple of `unit` bytes; `unit` is a power of two.
    #[must_use]
    pub const fn round_up(self, unit: u64) -> Self {
        Self(self.0.div_ceil(unit).saturating_mul(unit))
    }
}

impl FromStr for Bytes {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let bad = || BadSize(shortened(text));
        let lower = text.to_ascii_lowercase();
        let number_end = lower
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(lower.len());
        let (number, suffix) = lower.split_at(number_end);
        let unit = match suffix {
            "" | "b" => 1,
            "k" | "kb" | "kib" => Self::KIB,
            "m" | "mb" | "mib" => Self::MIB,
            "g" | "gb" | "gib" => Self::GIB,
            "t" | "tb" | "tib" => 1 << 40,
            _ => return Err(bad()),
        };
        let bytes = if number.contains('.') {
            let value: f64 = number.parse().map_err(|_| bad())?;
            let bytes = value * unit as f64;
            if bytes >= (1_u64 << 62) as f64 {
                return Err(bad());
            }
            bytes as u64
        } else {
            let value: u64 = number.parse().map_err(|_| bad())?;
            value.checked_mul(unit).ok_or_else(bad)?
        };
        if bytes == 0 || bytes >= 1 << 62 {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        // What would be rounded to 1024 is one of the next unit.
        while value >= 1023.5 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let whole = value >= 99.95 || (value * 10.0).round() % 10.0 == 0.0;
        let text = format!("{value:.*} {}", usize::from(!whole), UNITS[unit]);
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, want) in [
            ("1", Some(1)),
            ("512b", Some(512)),
            ("64K", Some(64 << 10)),
            ("300MiB", Some(300 << 20)),
            ("30G", Some(30 << 30)),
            ("1.5g", Some(3 << 29)),
            (".5G", Some(1 << 29)),
            (".", None),
            ("0.1", None),
            ("2tb", Some(2 << 40)),
            ("0", None),
            ("", None),
            ("G", None),
            ("-1G", None),
            ("1 G", None),
            ("1e3", None),
            ("1.2.3K", None),
            ("99999999999G", None),
            ("18446744073709551615", None),
        ] {
            assert_eq!(text.parse::<Bytes>().ok().map(|b| b.0), want, "{text:?}");
        }
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (300 << 20, "300 MiB"),
            ((1 << 30) - 1, "1 GiB"),
            ((2 << 30) - 1, "2 GiB"),
            (99 << 30, "99 GiB"),
            ((100 << 30) - (1 << 29), "99.5 GiB"),
            (5 << 50, "5120 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), want, "{bytes}");
        }
    }
}
