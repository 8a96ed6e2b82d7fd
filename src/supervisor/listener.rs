// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A scale set's session: its messages are read, worked on by [`messages`], and acknowledged.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::config::ScaleSet;
use super::github::GitHubError;
use super::github::scaleset::{Message, ScaleSets, Session};
use super::jobs::write_down;
use super::messages;
use super::pool::{Orders, Worker};
use super::trouble::{StepError, Trouble};

/// Between two polls that brought nothing, at least.
const BETWEEN_POLLS: Duration = Duration::from_secs(1);

/// After so many failures one after another, another session is tried.
const FAILURES: u32 = 3;

/// Listens for ever; the session ends with the orders to end, once nothing is left of any slot, or can be done about it. Until then
/// its id is in the file `kept`.
pub(super) async fn listen(worker: &Worker, set: &ScaleSet, kept: PathBuf) {
    let mut listener = Listener {
        worker,
        set,
        sets: ScaleSets::new(Arc::clone(&worker.github)),
        id: None,
        session: None,
        kept,
        last: 0,
        failures: 0,
        refused: 0,
        renewed: false,
    };
    let mut trouble = Trouble::new(format!("scale set {}", set.name));
    loop {
        match listener.next().await {
            Ok(()) => {
                trouble.over();
                worker.board().set_problem = None;
            }
            Err(error) => {
                worker.board().set_problem = Some(error.to_string());
                tokio::time::sleep(trouble.with(&error)).await;
            }
        }
        if worker.ends() && worker.is_done() {
            listener.close().await;
            return;
        }
    }
}

struct Listener<'a> {
    worker: &'a Worker,
    set: &'a ScaleSet,
    sets: ScaleSets,
    id: Option<u64>,
    session: Option<Session>,
    /// Where the session's id is kept.
    kept: PathBuf,
    /// The last message that was worked on.
    last: u64,
    /// How often the session failed, one after another.
    failures: u32,
    /// How often taking jobs was refused, one after another, whatever the session.
    refused: u32,
    /// Its token was renewed, and not accepted since.
    renewed: bool,
}

impl Listener<'_> {
    async fn next(&mut self) -> Result<(), StepError> {
        let id = match self.id {
            Some(id) => id,
            None => self.find().await?,
        };
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.open(id).await?,
        };
        let mut orders = self.worker.orders.subscribe();
        let capacity = if *orders.borrow_and_update() == Orders::Run {
            self.set.max
        } else {
            0
        };
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        let asked = Instant::now();
        // What is told meanwhile is told again: it was not acknowledged.
        let polled = tokio::select! {
            polled = self.sets.poll(&session, self.last, capacity) => polled,
            _ = orders.changed() => {
                self.session = Some(session);
                return Ok(());
            }
            // The end does not wait for a message.
            () = self.worker.done(), if self.worker.ends() => {
                self.session = Some(session);
                return Ok(());
            }
        };
        let done = match polled {
            Ok(None) => {
                // It waits some 50 s for a message, but for answers of nothing at once.
                tokio::time::sleep_until(asked + BETWEEN_POLLS).await;
                Ok(())
            }
            Ok(Some(message)) => match messages::take(self.worker, &message) {
                Ok(available) => self.settle(id, &mut session, &message, &available).await,
                // It is told again: what is not written down is not acknowledged.
                Err(error) => {
                    self.session = Some(session);
                    return Err(error);
                }
            },
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => {
                (self.failures, self.renewed) = (0, false);
                self.session = Some(session);
                Ok(())
            }
            Err(error) => self.recover(id, session, error).await,
        }
    }

    /// The scale set's number.
    async fn find(&mut self) -> Result<u64, StepError> {
        let pool = &self.worker.pool;
        let group = self.sets.group(&pool.group).await?;
        let id = self
            .sets
            .find_or_create(&self.set.name, group, &pool.labels)
            .await?;
        self.id = Some(id);
        self.worker.board().set = Some(id);
        Ok(id)
    }

    /// Begins a session. GitHub holds one that nobody ended for minutes, in its own successor's way too: it is ended first.
    async fn open(&mut self, id: u64) -> Result<Session, StepError> {
        let pool = &self.worker.pool;
        let url = pool.url.to_string();
        if let Some(left) = Kept::read(&self.kept).filter(|left| left.url == url && left.set == id)
            && let Err(error) = self.sets.close(id, &left.session).await
        {
            debug!(set = self.set.name, %error, "the last session was not ended");
        }
        let host = nix::unistd::gethostname().unwrap_or_default();
        let owner = format!("{} {}", host.to_string_lossy(), pool.name);
        let opened = self.sets.open(id, &owner).await;
        let session = opened.inspect_err(|error| {
            if error.status().is_some_and(|status| status == 404) {
                // The set was removed.
                self.id = None;
            }
        })?;
        let kept = Kept {
            url,
            set: id,
            session: session.id().to_owned(),
        };
        if let Err(error) = write_down(&self.kept, &kept) {
            warn!(file = %self.kept.display(), %error, "cannot store the session's ID: after a kill, GitHub makes the next session wait for minutes");
        }
        // What the last session was told and did not acknowledge is told to this one.
        (self.last, self.failures, self.renewed) = (0, 0, false);
        if let Some(statistics) = session.statistics {
            self.worker
                .board()
                .demand
                .counted(statistics.total_assigned_jobs);
        }
        self.worker.poke();
        let jobs = session.statistics.map_or(0, |s| s.total_assigned_jobs);
        info!(set = self.set.name, jobs, "listening");
        Ok(session)
    }

    /// Takes the jobs that can be had, and says that a message was worked on: what is lost by a crash before comes again, and
    /// so does what failed for a while. What is refused again and again is passed over.
    async fn settle(
        &mut self,
        id: u64,
        session: &mut Session,
        message: &Message,
        available: &[i64],
    ) -> Result<(), GitHubError> {
        if !available.is_empty() {
            match self.sets.acquire(id, session, available).await {
                Ok(_) => self.refused = 0,
                Err(error) if is_final(&error) && self.refused >= FAILURES => {
                    warn!(set = self.set.name, %error, "cannot acquire available jobs");
                }
                // Nobody offers them again: the message must not be lost for one refusal.
                Err(error) => {
                    self.refused += u32::from(is_final(&error));
                    return Err(error);
                }
            }
        }
        self.last = message.id;
        let mut acknowledged = self.sets.acknowledge(session, message.id).await;
        if has_ended(&acknowledged) && self.sets.refresh(id, session).await.is_ok() {
            acknowledged = self.sets.acknowledge(session, message.id).await;
        }
        if let Err(error) = acknowledged {
            // This session does not ask for it again.
            debug!(set = self.set.name, message = message.id, %error, "a message was not acknowledged");
        }
        Ok(())
    }

    /// A session whose token has ended gets a new one; one that is refused, or fails again and again, is given up.
    async fn recover(
        &mut self,
        id: u64,
        mut session: Session,
        error: GitHubError,
    ) -> Result<(), StepError> {
        let mut error = error;
        if error.status().is_some_and(|status| status == 401) && !self.renewed {
            match self.sets.refresh(id, &mut session).await {
                Ok(()) => {
                    self.renewed = true;
                    self.session = Some(session);
                    return Ok(());
                }
                Err(refused) => error = refused,
            }
        }
        let limited = error.retry().is_some();
        self.failures += u32::from(!limited);
        let lost = !limited
            && error
                .status()
                .is_some_and(|status| status.is_client_error());
        if lost || self.failures >= FAILURES {
            info!(set = self.set.name, "trying another session");
        } else {
            self.session = Some(session);
        }
        Err(error.into())
    }

    async fn close(&mut self) {
        let (Some(id), Some(session)) = (self.id, &self.session) else {
            return;
        };
        match self.sets.close(id, session.id()).await {
            Ok(()) => drop(fs::remove_file(&self.kept)),
            Err(error) => {
                warn!(set = self.set.name, %error, "cannot close the session: the next start will");
            }
        }
    }
}

/// Whether a refusal will be the same the next time.
fn is_final(error: &GitHubError) -> bool {
    let status = error.status().filter(|status| status.is_client_error());
    error.retry().is_none() && status.is_some_and(|status| status != 401)
}

/// Whether the session's token has ended.
fn has_ended(answer: &Result<(), GitHubError>) -> bool {
    let refused = answer.as_ref().err().and_then(GitHubError::status);
    refused.is_some_and(|status| status == 401)
}

/// What is kept of a session for another life: its id is no secret.
#[derive(Debug, Deserialize, Serialize)]
struct Kept {
    /// Whose scale set it is of.
    url: String,
    set: u64,
    session: String,
}

impl Kept {
    /// What can be read; a file that was not written to its end never was that file.
    fn read(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }
}
