// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A scale set's messages: how many runners it wants, whose job a runner got, and how that ended.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tracing::{error, info, warn};

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

/// Listens for ever; the session ends with the orders to end, once nothing is left of any slot.
pub(super) async fn listen(worker: &Worker, set: &ScaleSet) {
    let mut listener = Listener {
        worker,
        set,
        sets: ScaleSets::new(Arc::clone(&worker.github)),
        id: None,
        session: None,
        last: 0,
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
    /// The last message that was worked on.
    last: u64,
}

impl Listener<'_> {
    async fn next(&mut self) -> Result<(), StepError> {
        let pool = &self.worker.pool;
        let id = match self.id {
            Some(id) => id,
            None => {
                self.sets
                    .find_or_create(&self.set.name, pool.group, &pool.labels)
                    .await?
            }
        };
        self.id = Some(id);
        self.worker.board().set = Some(id);
        let session = match self.session.take() {
            Some(session) => session,
            None => {
                let host = nix::unistd::gethostname().unwrap_or_default();
                let owner = format!("{} {}", host.to_string_lossy(), pool.name);
                let opened = self.sets.open(id, &owner).await;
                let session = opened.inspect_err(|error| {
                    if error.status().is_some_and(|status| status == 404) {
                        // Somebody removed the set.
                        self.id = None;
                    }
                })?;
                self.last = 0;
                let jobs = session.statistics.map_or(0, |s| s.total_assigned_jobs);
                self.worker.demand(jobs);
                self.worker.poke();
                info!(set = self.set.name, jobs, "listening");
                session
            }
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
            _ = orders.changed() => Ok(None),
            // The end does not wait for a message.
            () = self.worker.emptied(), if self.worker.ends() => Ok(None),
        };
        let message = match polled {
            Ok(message) => message,
            Err(error) => return self.recover(id, session, error).await,
        };
        if let Some(message) = message {
            let available = self.handle(&message).await;
            if let Err(error) = self.settle(id, &session, &message, &available).await {
                self.session = Some(session);
                return Err(error);
            }
        }
        self.session = Some(session);
        Ok(())
    }

    /// Takes the jobs that can be had, and says that a message was worked on: what is lost by a crash before comes again.
    async fn settle(
        &mut self,
        id: u64,
        session: &Session,
        message: &Message,
        available: &[i64],
    ) -> Result<(), StepError> {
        if !available.is_empty() {
            self.sets.acquire(id, session, available).await?;
        }
        self.sets.acknowledge(session, message.id).await?;
        self.last = message.id;
        Ok(())
    }

    /// A session whose token has ended gets a new one; one that is gone is begun anew.
    async fn recover(
        &mut self,
        id: u64,
        mut session: Session,
        error: GitHubError,
    ) -> Result<(), StepError> {
        match error.status().map(|status| status.as_u16()) {
            Some(401) => match self.sets.refresh(id, &mut session).await {
                Ok(()) => self.session = Some(session),
                // Somebody else's session, or none: the next round opens one.
                Err(error) if error.status().is_some_and(|s| s.is_client_error()) => {}
                Err(error) => {
                    self.session = Some(session);
                    return Err(error.into());
                }
            },
            Some(404 | 410) => {}
            _ => {
                self.session = Some(session);
                return Err(error.into());
            }
        }
        Ok(())
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
        if let (Some(id), Some(session)) = (self.id, &self.session)
            && let Err(error) = self.sets.close(id, session).await
        {
            warn!(set = self.set.name, %error, "the session was not closed: it ends by itself");
        }
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
