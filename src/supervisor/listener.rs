// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A scale set's messages: how many runners it wants, whose job a runner got, and how that ended.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::{debug, error, info, warn};

use super::config::ScaleSet;
use super::github::GitHubError;
use super::github::scaleset::{Event, Job, Message, ScaleSets, Session};
use super::pool::{JobView, Orders, StepError, Trouble, Worker, unix_now};
use super::scope::{self, Run, Scopes};
use super::slot;
use crate::plugin::wire::printable;

/// How long GitHub is asked whose job it is. Jobs wait two minutes for that.
const ASK_WHOSE: Duration = Duration::from_secs(60);

/// Seconds for which the end of a job is kept for its slot.
const KEEP: u64 = 600;

/// After so many failures one after another, another session is tried.
const FAILURES: u32 = 3;

/// Listens for ever; the session ends with the orders to end, once nothing is left of any slot. Until then its id is in the
/// file `kept`.
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
            Ok(()) => trouble.over(),
            Err(error) => tokio::time::sleep(trouble.with(&error)).await,
        }
        if worker.ends() && worker.is_empty() {
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
        // What is told meanwhile is told again: it was not acknowledged.
        let polled = tokio::select! {
            polled = self.sets.poll(&session, self.last, capacity) => polled,
            _ = orders.changed() => {
                self.session = Some(session);
                return Ok(());
            }
            // The end does not wait for a message.
            () = self.worker.emptied(), if self.worker.ends() => {
                self.session = Some(session);
                return Ok(());
            }
        };
        let done = match polled {
            Ok(None) => Ok(()),
            Ok(Some(message)) => {
                let available = self.handle(&message).await;
                self.settle(id, &mut session, &message, &available).await
            }
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
                // Somebody removed the set.
                self.id = None;
            }
        })?;
        let kept = Kept {
            url,
            set: id,
            session: session.id().to_owned(),
        };
        if let Err(error) = kept.write(&self.kept) {
            warn!(file = %self.kept.display(), %error, "the session's id is not kept: after a kill, GitHub lets the next one wait for minutes");
        }
        // What the last session was told and did not acknowledge is told to this one.
        (self.last, self.failures, self.renewed) = (0, 0, false);
        if let Some(statistics) = session.statistics {
            self.worker.demand(statistics.total_assigned_jobs);
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
                    warn!(set = self.set.name, %error, "jobs that could be had were not got");
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
            info!(set = self.set.name, "another session is tried");
        } else {
            self.session = Some(session);
        }
        Err(error.into())
    }

    /// Does what a message asks for, but for taking the jobs that can be had: gives their numbers.
    async fn handle(&mut self, message: &Message) -> Vec<i64> {
        let mut available = Vec::new();
        for event in &message.events {
            match event {
                Event::JobAvailable(job) => available.push(job.runner_request_id),
                Event::JobStarted(job) => started(self.worker, job).await,
                Event::JobCompleted(job) => completed(self.worker, job),
                Event::JobAssigned(_) => {}
            }
        }
        if let Some(statistics) = message.statistics {
            self.worker.demand(statistics.total_assigned_jobs);
        }
        available
    }

    async fn close(&mut self) {
        let (Some(id), Some(session)) = (self.id, &self.session) else {
            return;
        };
        match self.sets.close(id, session.id()).await {
            Ok(()) => drop(fs::remove_file(&self.kept)),
            Err(error) => {
                warn!(set = self.set.name, %error, "the session was not closed: the next start does it");
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

    fn write(&self, file: &Path) -> io::Result<()> {
        let dir = file.parent().unwrap_or(file);
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let new = file.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, file)
    }
}

fn note(worker: &Worker, job: &Job, state: slot::Job) {
    let what = printable(&format!(
        "{}/{} {}",
        job.owner_name, job.repository_name, job.job_display_name
    ));
    let now = unix_now();
    let jobs = &mut worker.board().jobs;
    // What was told of a runner after its end is nobody's.
    jobs.retain(|_, job| !matches!(job.state, slot::Job::Done(_, at) if at + KEEP < now));
    jobs.insert(job.runner_name.clone(), JobView { state, what });
    worker.poke();
}

fn completed(worker: &Worker, job: &Job) {
    if job.runner_name.is_empty() {
        // Cancelled before a runner had it.
        return;
    }
    note(worker, job, slot::Job::Done(job.verdict(), unix_now()));
}

/// A runner has a job: says to the daemon whose it is, so that its requests for caches are served.
async fn started(worker: &Worker, job: &Job) {
    note(worker, job, slot::Job::Running(unix_now()));
    let slot = job
        .runner_name
        .rsplit_once('-')
        .map_or("", |(slot, _)| slot);
    let of = whose(worker, job).await;
    let scopes = of
        .as_ref()
        .and_then(|run| scope::scopes(&worker.pool.rules, run, slot));
    let scopes = scopes.unwrap_or_else(|| Scopes::unknown(&worker.github.host(), &job.runner_name));
    let (repository, reference) = match &of {
        Some(run) => (run.repository.clone(), run.reference()),
        None => (
            format!("{}/{}", job.owner_name, job.repository_name),
            format!("run/{}", job.workflow_run_id),
        ),
    };
    info!(
        runner = job.runner_name,
        job = job.job_display_name,
        repository,
        reference,
        scope = scopes.write,
        "has a job"
    );
    for volume in worker
        .pool
        .volumes
        .iter()
        .filter(|volume| worker.pool.is_job(volume))
    {
        let mut options = worker.pool.late_options(volume, &repository, &reference);
        options.insert("scope".into(), scopes.write.clone());
        options.insert("read-scopes".into(), scopes.read.join(" "));
        let name = format!("{}-{}", job.runner_name, volume.name);
        let admitted = admit(worker, &json!({"Name": name, "Opts": options})).await;
        if !admitted {
            worker.board().refused.insert(job.runner_name.clone());
            worker.poke();
        }
    }
}

/// Says to the daemon whose a volume's job is; `false` where that is refused: then the job may have
/// scopes that are not its own, and must not go on.
async fn admit(worker: &Worker, body: &serde_json::Value) -> bool {
    let mut trouble = Trouble::new(format!("volume {}", body["Name"]));
    for _ in 0..10 {
        match worker.friend("Friend.Admit", body.clone()).await {
            Ok(_) => return true,
            Err(crate::plugin::client::ClientError::Refused { status, message })
                if status < 500 =>
            {
                error!(volume = %body["Name"], message, "its job is ended: the daemon refused its scopes");
                return false;
            }
            Err(error) => tokio::time::sleep(trouble.with(&error.into())).await,
        }
    }
    // As long as nobody has said whose it is, the daemon gives it nothing.
    true
}

/// The run that a job belongs to; `None` where GitHub does not say: such a job shares nothing.
async fn whose(worker: &Worker, job: &Job) -> Option<Run> {
    // No run has that number: the message did not say.
    if job.workflow_run_id == 0 {
        return None;
    }
    let mut trouble = Trouble::new(format!("job {}", job.runner_request_id));
    let ask = async {
        loop {
            let of = (
                &job.owner_name,
                &job.repository_name,
                job.workflow_run_id,
                &job.job_workflow_ref,
            );
            match worker.github.run(of.0, of.1, of.2, of.3).await {
                Ok(run) => return Some(run),
                Err(error)
                    if matches!(error.status().map(|s| s.as_u16()), Some(403 | 404))
                        && error.retry().is_none() =>
                {
                    warn!(job = job.runner_request_id, %error, "whose job it is cannot be read: it shares no caches; the token needs to read actions and metadata");
                    return None;
                }
                Err(error) => tokio::time::sleep(trouble.with(&error.into())).await,
            }
        }
    };
    tokio::time::timeout(ASK_WHOSE, ask)
        .await
        .unwrap_or_default()
}
