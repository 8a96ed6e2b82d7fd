// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runners that end without having had a job: the next ones of their pool are started ever more seldom, one at a
//! time, until one is connected. Decided without I/O and without a clock.

/// Seconds before the next runner is started, after the first that ended so, and at most.
const PAUSE: u64 = 10;
const LONGEST: u64 = 600;

/// So many are started before any of the pool's was connected.
const AT_ONCE: usize = 3;

/// When a pool's next runner may be started.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    /// How many ended so, one after another.
    ends: u32,
    /// When the last one did, seconds since 1970.
    last: u64,
    /// When the next may be started.
    again: u64,
    /// One that was registered since is connected, or had a job.
    proven: bool,
    /// What is known of the last end.
    said: String,
    /// None is to be started any more.
    refused: bool,
}

impl Backoff {
    /// A runner that was registered at `since` ended, and had no job.
    pub fn ended(&mut self, since: u64, now: u64, said: String) {
        // Those that were started together are one try; and one that lived for long says nothing of the next.
        if since >= self.last || self.ends == 0 {
            self.ends = if now >= since + LONGEST {
                1
            } else {
                self.ends + 1
            };
        }
        (self.last, self.proven, self.said) = (now, false, said);
        self.again = now + self.pause();
    }

    /// The same, and it will be so with the next.
    pub fn refuse(&mut self, now: u64, said: String) {
        self.ended(now, now, said);
        self.refused = true;
    }

    fn pause(&self) -> u64 {
        let steps = self.ends.saturating_sub(1).min(8);
        (PAUSE << (2 * steps)).min(LONGEST)
    }

    /// One that was registered at `since` is connected. `true` where that changes anything.
    pub fn connected(&mut self, since: u64) -> bool {
        let news = !self.proven && since >= self.last;
        self.proven |= news;
        news
    }

    /// A runner had a job.
    pub fn worked(&mut self) {
        *self = Self {
            proven: true,
            ..Self::default()
        };
    }

    /// It is to be tried again now: an administrator says so, or there is another image.
    pub fn forgive(&mut self) {
        *self = Self::default();
    }

    /// Whether a runner may be started beside `live` ones; it is taken for started then. Otherwise when to ask again; `None` where
    /// something else must happen first.
    ///
    /// # Errors
    /// When none may.
    pub fn start(&mut self, live: usize, now: u64) -> Result<(), Option<u64>> {
        if self.refused {
            Err(None)
        } else if self.proven {
            Ok(())
        } else if self.ends == 0 {
            if live < AT_ONCE { Ok(()) } else { Err(None) }
        } else if now >= self.again {
            self.again = now + self.pause();
            Ok(())
        } else {
            Err(Some(self.again))
        }
    }

    /// What is to be said of a pool that starts no runners now.
    #[must_use]
    pub fn problem(&self, now: u64) -> Option<String> {
        if self.refused {
            Some(format!("stopped: {}", self.said))
        } else if self.ends > 0 && !self.proven {
            let rest = self.again.saturating_sub(now);
            Some(format!("{}; the next try is in {rest} s", self.said))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    #[test]
    fn pauses_grow() {
        let mut backoff = Backoff::default();
        let mut now = NOW;
        let mut starts = Vec::new();
        while now < NOW + 3000 {
            match backoff.start(0, now) {
                Ok(()) => {
                    starts.push(now - NOW);
                    backoff.ended(now, now + 1, "no".into());
                    now += 1;
                }
                Err(at) => now = at.unwrap(),
            }
        }
        assert_eq!(starts, [0, 11, 52, 213, 814, 1415, 2016, 2617]);
        let said = backoff.problem(now - 7);
        assert_eq!(said.unwrap(), "no; the next try is in 7 s");
    }

    #[test]
    fn some_at_once_and_one_after_another_then() {
        let mut backoff = Backoff::default();
        let begun = (0..9).filter(|live| backoff.start(*live, NOW).is_ok());
        assert_eq!(begun.count(), AT_ONCE);
        for _ in 0..AT_ONCE {
            backoff.ended(NOW, NOW + 1, "no".into());
        }
        // One try, of several.
        assert_eq!(backoff.start(0, NOW + 2), Err(Some(NOW + 1 + PAUSE)));
        assert_eq!(backoff.start(0, NOW + 11), Ok(()));
        assert_eq!(backoff.start(1, NOW + 11), Err(Some(NOW + 11 + PAUSE)));
        // The one that is connected was there before; then one that was not.
        assert!(!backoff.connected(NOW));
        assert!(backoff.start(1, NOW + 12).is_err());
        assert!(backoff.connected(NOW + 11));
        assert!(backoff.problem(NOW + 12).is_none());
        assert_eq!(backoff.start(1, NOW + 12), Ok(()));
        // It still counts, until one had a job.
        backoff.ended(NOW + 11, NOW + 20, "no".into());
        assert_eq!(backoff.start(0, NOW + 20), Err(Some(NOW + 20 + 4 * PAUSE)));
        backoff.worked();
        assert_eq!(backoff.start(9, NOW + 20), Ok(()));
    }

    #[test]
    fn one_that_lived_long_is_no_sign() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.ended(NOW, NOW, "no".into());
        }
        backoff.ended(NOW, NOW + LONGEST, "no".into());
        assert_eq!(backoff.again, NOW + LONGEST + PAUSE);
    }

    #[test]
    fn none_with_an_image_that_is_too_old() {
        let mut backoff = Backoff::default();
        backoff.refuse(NOW, "too old".into());
        assert_eq!(backoff.start(0, NOW + 100_000), Err(None));
        assert_eq!(backoff.problem(NOW).unwrap(), "stopped: too old");
        backoff.forgive();
        assert_eq!(backoff.start(0, NOW), Ok(()));
    }
}
