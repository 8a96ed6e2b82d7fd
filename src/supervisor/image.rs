// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pool's image: that it is there, and which one it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use super::config::Pull;
use super::podman::PodmanError;
use super::pool::Worker;
use super::trouble::{StepError, Trouble};

/// Between two looks at the image.
const LOOK_AT_IMAGE: Duration = Duration::from_secs(20);

/// Between two questions to its registry.
const PULL_AGAIN: Duration = Duration::from_secs(900);

impl Worker {
    /// Has the image be there, and notes which one it is, for ever: what another one was made of is replaced.
    pub(super) async fn watch_image(self: Arc<Self>) {
        let mut trouble = Trouble::new(format!("pool {}", self.pool.name));
        let image = &self.pool.container.image;
        let pull = self.pool.container.pull;
        let mut asked: Option<Instant> = None;
        loop {
            let look = async {
                let there = self.podman.image_id(image).await?;
                let due = asked.is_none_or(|asked| asked.elapsed() >= PULL_AGAIN);
                let policy = match pull {
                    Pull::Newer if due || there.is_none() => "newer",
                    Pull::Missing if there.is_none() => "missing",
                    _ => return Ok(there),
                };
                asked = Some(Instant::now());
                let pulled = self.podman.pull(image, policy).await;
                match self.podman.image_id(image).await? {
                    None => pulled.and(Ok(None)),
                    // The registry may be away, or know nothing of it.
                    there => {
                        if let Err(error) = pulled {
                            warn!("pool {}: {error}", self.pool.name);
                        }
                        Ok(there)
                    }
                }
            };
            let looked: Result<Option<String>, PodmanError> = look.await;
            let (problem, rest, changed) = match looked {
                Ok(there) => {
                    trouble.over();
                    let none = there.is_none();
                    let problem = none.then(|| format!("there is no image {image}"));
                    let there = there.unwrap_or_default();
                    let mut board = self.board();
                    let changed = board.image != there;
                    // With another one it may be another story.
                    if changed && !there.is_empty() {
                        board.backoff.forgive();
                    }
                    board.image = there;
                    (problem, LOOK_AT_IMAGE, changed)
                }
                Err(error) => {
                    let problem = error.to_string();
                    let rest = trouble.with(&StepError::Podman(error));
                    (Some(problem), rest, false)
                }
            };
            self.board().image_problem = problem;
            if changed {
                self.poke();
            }
            tokio::time::sleep(rest).await;
        }
    }
}
