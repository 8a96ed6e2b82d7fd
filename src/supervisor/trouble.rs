// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes wrong, and is tried again.

use std::time::Duration;

use tracing::{debug, info, warn};

use super::github::GitHubError;
use super::podman::PodmanError;
use crate::http::client::ClientError;

/// Something failed; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Podman.
    #[error(transparent)]
    Podman(#[from] PodmanError),
    /// GitHub.
    #[error(transparent)]
    GitHub(#[from] GitHubError),
    /// The daemon of the caches.
    #[error("the cache daemon: {0}")]
    Friend(#[from] ClientError),
    /// The FIFO for the runner's configuration.
    #[error("handing over the runner's configuration: {0}")]
    Handover(#[from] std::io::Error),
    /// What is to be known of a job after a crash could not be written down.
    #[error("recording a job: {0}")]
    Written(#[source] std::io::Error),
    /// The scale set is not known yet.
    #[error("the scale set is not ready yet")]
    NoSet,
}

impl StepError {
    /// For how long nothing is to be tried.
    pub(super) fn retry(&self) -> Option<Duration> {
        match self {
            Self::GitHub(error) => error.retry(),
            _ => None,
        }
    }
}

/// What goes wrong again and again is said once, and tried ever more seldom.
pub(super) struct Trouble {
    who: String,
    said: String,
    failures: u32,
}

impl Trouble {
    pub(super) const fn new(who: String) -> Self {
        Self {
            who,
            said: String::new(),
            failures: 0,
        }
    }

    /// How long to wait before the next try.
    pub(super) fn with(&mut self, error: &StepError) -> Duration {
        let text = error.to_string();
        let who = &self.who;
        // A refusal's text may have a number of its own each time.
        let kind = match error {
            StepError::GitHub(GitHubError::Refused { what, status, .. }) => {
                format!("{what}: {status}")
            }
            _ => text.clone(),
        };
        if matches!(
            error,
            StepError::GitHub(GitHubError::Still(_)) | StepError::NoSet
        ) || kind == self.said
        {
            debug!(who, error = text, "again");
        } else {
            warn!("{who}: {text}; trying again");
            self.said = kind;
        }
        self.failures += 1;
        let own = Duration::from_secs(1 << self.failures.saturating_sub(1).min(6))
            .min(Duration::from_secs(60));
        let mut random = [0; 2];
        getrandom::fill(&mut random).expect("the kernel has random numbers");
        let jitter = f64::from(u16::from_ne_bytes(random)) / 65_536.0;
        // Never before GitHub said, and not all at once then.
        match error.retry() {
            Some(rest) => rest + Duration::from_secs_f64(jitter * 3.0),
            None => own.mul_f64(0.5 + jitter / 2.0),
        }
    }

    pub(super) fn over(&mut self) {
        if !self.said.is_empty() {
            info!("{}: works again after {} failures", self.who, self.failures);
        }
        self.said.clear();
        self.failures = 0;
    }
}
