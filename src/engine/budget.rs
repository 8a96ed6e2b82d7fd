// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one job may cost the store: changes to it, and bytes of tags. How often it may be mounted and saved its
//! limits say ([`crate::config::JobLimits`]). It is the first to feel its own excess.

use std::time::Instant;

/// How many minutes' worth of changes a job may make at once: all of its mounts at its beginning, and its checkpoints.
const BURST: f64 = 4.0;

/// What a mount changes in the store at most, over its life: it is made, its lease marked, and where that fails it is doomed and
/// removed.
pub(super) const OF_MOUNT: u32 = 3;

/// And a checkpoint.
pub(super) const OF_SAVE: u32 = 3;

/// What is left to a job. Failures cost as much as what succeeds.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// Changes made and not yet made up for by time, and when that was last looked at.
    spent: f64,
    since: Option<Instant>,
    /// Bytes of tags asked for so far.
    tags: u64,
}

impl Budget {
    /// Charges `changes` to the store, of which there may be `rate` a minute.
    pub fn changes(&mut self, changes: u32, rate: u32, now: Instant) -> Result<(), String> {
        let rate = f64::from(rate);
        let since = self.since.replace(now).unwrap_or(now);
        let minutes = now.saturating_duration_since(since).as_secs_f64() / 60.0;
        self.spent = (self.spent - minutes * rate).max(0.0);
        let spent = self.spent + f64::from(changes);
        if spent > rate * BURST {
            let seconds = ((spent - rate * BURST) * 60.0 / rate.max(f64::MIN_POSITIVE)).ceil();
            return Err(format!(
                "a job makes at most {rate} changes to the store a minute: try again in {seconds} s"
            ));
        }
        self.spent = spent;
        Ok(())
    }

    /// Charges `bytes` of tags, of which there may be `most`.
    pub fn tags(&mut self, bytes: u64, most: u64) -> Result<(), String> {
        if self.tags + bytes > most {
            return Err(format!(
                "the tags of what a job has published take at most {most} bytes, and these would be {}",
                self.tags + bytes
            ));
        }
        self.tags += bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_then_so_many_a_minute() {
        let began = Instant::now();
        let mut budget = Budget::default();
        let mut made = |seconds| {
            let now = began + Duration::from_secs(seconds);
            let each = std::iter::repeat_with(|| budget.changes(1, 60, now));
            each.take(1000).take_while(Result::is_ok).count()
        };
        for (second, count) in [(0, 240), (0, 0), (1, 1), (31, 30), (3600, 240)] {
            assert_eq!(made(second), count, "after {second} s");
        }
    }

    #[test]
    fn what_is_refused_says_when_it_is_not() {
        let now = Instant::now();
        let mut budget = Budget::default();
        budget.changes(240, 60, now).unwrap();
        let why = budget.changes(3, 60, now).unwrap_err();
        assert!(
            why.contains("60 changes") && why.contains("in 3 s"),
            "{why}"
        );
        budget.changes(3, 60, now + Duration::from_secs(3)).unwrap();
        // What is refused costs nothing, so that the wait is as long as it says.
        let why = Budget::default().changes(1, 0, now).unwrap_err();
        assert!(why.contains("at most 0"), "{why}");
    }

    #[test]
    fn bytes_of_tags_are_given_once() {
        let mut budget = Budget::default();
        budget.tags(60, 100).unwrap();
        let why = budget.tags(41, 100).unwrap_err();
        assert!(
            why.contains("at most 100 bytes") && why.contains("101"),
            "{why}"
        );
        budget.tags(40, 100).unwrap();
        budget.tags(1, 100).unwrap_err();
    }
}
