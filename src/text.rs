// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Text for people, which every room may use: what is safe on a terminal, times, and how long ago they were.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest text of [`printable`], in characters: it ends in a terminal.
const MAX_LINE: usize = 1000;

/// One day, in seconds.
const DAY: u64 = 86_400;

/// `text` as one printable line: what a terminal would obey is escaped, and
/// what is too long is cut.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(MAX_LINE));
    for (n, c) in text.chars().enumerate() {
        if n == MAX_LINE {
            out.push('…');
            break;
        }
        match c {
            '"' | '\'' | '\\' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

/// `text`, cut where it is too long for a message.
pub(crate) fn shortened(text: &str) -> String {
    let mut end = text.len().min(80);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    if end == text.len() {
        text.to_owned()
    } else {
        format!("{}…", &text[..end])
    }
}

/// `text` with its lines as they are, and all else escaped that a terminal would obey.
#[must_use]
pub fn printable_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' | '"' | '\'' | '\\' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

/// The present moment, in seconds since 1970.
#[must_use]
pub fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// Seconds since 1970 as RFC 3339, in UTC; `None` beyond the year 9999.
#[must_use]
pub fn rfc3339(unix_seconds: u64) -> Option<String> {
    let seconds = i64::try_from(unix_seconds).ok()?;
    Some(jiff::Timestamp::from_second(seconds).ok()?.to_string())
}

/// How long ago `then` is, both in seconds since 1970, as people say it.
#[must_use]
pub fn age(now: u64, then: u64) -> String {
    let seconds = now.saturating_sub(then);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..DAY => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / DAY),
    }
}

/// A length of time in a unit of which there are at least two.
#[must_use]
pub fn roughly(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        _ => format!("{}h", seconds / 3600),
    }
}

/// A length of time in its largest unit that divides it.
#[must_use]
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    for (unit, name) in [(DAY, "d"), (3600, "h"), (60, "m")] {
        if seconds >= unit && seconds.is_multiple_of(unit) {
            return format!("{}{name}", seconds / unit);
        }
    }
    format!("{seconds}s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_printable_and_bounded() {
        assert_eq!(
            printable("a\x1b[31m\n\u{202e}\"é\\"),
            "a\\u{1b}[31m\\n\\u{202e}\"é\\"
        );
        assert!(printable(&"\x1b".repeat(1 << 20)).len() <= 8 * MAX_LINE);
        assert_eq!(
            printable_lines("a\x1b[31m\r\n\tb\u{9b}\"é\\\n"),
            "a\\u{1b}[31m\\r\n\tb\\u{9b}\"é\\\n"
        );
    }

    #[test]
    fn ages() {
        for (then, want) in [(100, "0s"), (41, "59s"), (40, "1m"), (200, "0s")] {
            assert_eq!(age(100, then), want);
        }
        assert_eq!(age(90_000, 0), "1d");
        assert_eq!(age(7200, 0), "2h");
    }
}
