// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A scale set's messages: how many runners it wants, whose job a runner got, and how that ended.
//!
//! All that a message tells is noted at once, and written down ([`super::jobs`]); then it can be acknowledged. What takes time is done
//! behind that, for several jobs at once: the queue is read meanwhile, and no job waits for another's.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::github::scaleset::{Event, Job, Message};
use super::jobs::{self, Admission};
use super::pool::{Board, Worker};
use super::scope::{self, Run, Scopes};
use super::trouble::{StepError, Trouble};
use crate::failpoint::reach;
use crate::http::client::ClientError;
use crate::text::unix_now;

/// How long GitHub is asked whose job it is. Jobs wait two minutes for that.
const ASK_WHOSE: Duration = Duration::from_secs(60);

/// Jobs whose caches are seen to at once. Most of the time each of them waits for GitHub.
const AT_ONCE: usize = 8;

/// Notes what a message tells, and gives the numbers of the jobs in it that can be had. Once this is done, the
/// message may be acknowledged: nothing of it is lost with this process.
///
/// # Errors
/// When something could not be written down. The same message again then changes nothing that was.
pub(super) fn take(worker: &Worker, message: &Message) -> Result<Vec<i64>, StepError> {
    let now = unix_now();
    let mut available = Vec::new();
    let mut board = worker.board();
    for event in &message.events {
        match event {
            Event::JobAvailable(job) => available.push(job.runner_request_id),
            Event::JobAssigned(job) => board.demand.assigned(&id(job), now),
            Event::JobStarted(job) => began(worker, &mut board, job, now)?,
            Event::JobCompleted(job) => ended(worker, &mut board, job, now)?,
        }
    }
    if let Some(statistics) = message.statistics {
        board.demand.counted(statistics.total_assigned_jobs);
    }
    drop(board);
    worker.poke();
    worker.told.notify_one();
    if message
        .events
        .iter()
        .any(|event| matches!(event, Event::JobStarted(_)))
    {
        reach("told", 1);
    }
    Ok(available)
}

/// What a job is told apart by.
fn id(job: &Job) -> String {
    let Job {
        job_id,
        workflow_run_id,
        runner_request_id,
        job_display_name,
        ..
    } = job;
    if job_id.is_empty() {
        format!("{runner_request_id} {workflow_run_id} {job_display_name}")
    } else {
        job_id.clone()
    }
}

fn began(worker: &Worker, board: &mut Board, job: &Job, now: u64) -> Result<(), StepError> {
    let noted = board.demand.began(&id(job), now);
    let runner = &job.runner_name;
    if worker.slot_of(runner).is_none() {
        warn!(
            runner,
            job = job.job_display_name,
            "has a job, but does not belong to this pool"
        );
        return Ok(());
    }
    let is_known = board
        .jobs
        .get(runner)
        .is_some_and(|job| job.began.is_some());
    board.jobs.tell(runner, |known| known.begin(job, now))?;
    if !is_known {
        let seconds = |time: &Option<String>| -> Option<f64> {
            let time: jiff::Timestamp = time.as_deref()?.parse().ok()?;
            Some(time.as_duration().as_secs_f64())
        };
        let told = seconds(&job.scale_set_assign_time).zip(seconds(&job.runner_assign_time));
        // Where GitHub does not say, by our own clock.
        let took = told.map(|(from, to)| to - from);
        let took = took.or_else(|| noted.map(|at| now.saturating_sub(at) as f64));
        if let Some(took) = took {
            board.waits.observe(took.max(0.0));
        }
    }
    Ok(())
}

fn ended(worker: &Worker, board: &mut Board, job: &Job, now: u64) -> Result<(), StepError> {
    board.demand.ended(&id(job));
    // Without a runner's name, it was cancelled before any had it.
    if worker.slot_of(&job.runner_name).is_some() {
        board.jobs.tell(&job.runner_name, |known| {
            known.ended = Some((job.verdict(), now));
        })?;
    }
    Ok(())
}

impl Worker {
    /// Says to the daemon whose the jobs are that runners have, so that their requests for caches are served: for
    /// ever, several at once.
    pub(super) async fn admit_jobs(self: Arc<Self>) {
        let mut under_way = BTreeSet::new();
        let mut tasks = JoinSet::new();
        loop {
            while tasks.len() < AT_ONCE {
                let Some(runner) = self.board().jobs.next(&under_way) else {
                    break;
                };
                under_way.insert(runner.clone());
                let worker = Arc::clone(&self);
                tasks.spawn(async move {
                    worker.admit_job(&runner).await;
                    runner
                });
            }
            tokio::select! {
                () = self.told.notified() => {}
                Some(done) = tasks.join_next() => match done {
                    Ok(runner) => drop(under_way.remove(&runner)),
                    Err(error) => error!(%error, "a job gets no caches"),
                },
            }
        }
    }

    /// The same for one, until it is done or its runner is gone.
    async fn admit_job(&self, runner: &str) {
        let mut trouble = Trouble::new(format!("runner {runner}"));
        loop {
            let job = self.board().jobs.get(runner).cloned();
            let Some(job) = job else { return };
            reach("admit", 1);
            let run = job.run;
            let bodies = match &job.admission {
                Admission::Decided(bodies) => bodies.clone(),
                Admission::Unknown => {
                    let bodies = self.decide(runner, &job).await;
                    reach("admit", 2);
                    let decided = Admission::Decided(bodies.clone());
                    if !self.note(runner, run, decided, &mut trouble).await {
                        continue;
                    }
                    reach("admit", 3);
                    bodies
                }
                Admission::Done | Admission::Refused => return,
            };
            match self.admit(&bodies).await {
                Ok(admission) => {
                    reach("admit", 4);
                    self.note(runner, run, admission, &mut trouble).await;
                    self.poke();
                    reach("admit", 5);
                }
                Err(error) => tokio::time::sleep(trouble.with(&error)).await,
            }
        }
    }

    /// Writes down how far a job of the run `run` is; `false` where that failed, after a while, or the runner has no such job
    /// any more.
    async fn note(
        &self,
        runner: &str,
        run: u64,
        admission: Admission,
        trouble: &mut Trouble,
    ) -> bool {
        let written = self.board().jobs.admit(runner, run, admission);
        match written {
            Ok(written) => written,
            Err(error) => {
                tokio::time::sleep(trouble.with(&StepError::Written(error))).await;
                false
            }
        }
    }

    /// Reads whose a runner's job is, and gives what the daemon is to be told of each of its volumes.
    async fn decide(&self, runner: &str, job: &jobs::Job) -> Vec<Value> {
        let pool = &self.pool;
        let of = whose(self, job).await;
        let slot = self.slot_of(runner).map(|slot| pool.slot_name(slot));
        let slot = slot.unwrap_or_default();
        let scopes = of
            .as_ref()
            .and_then(|run| scope::scopes(&pool.rules, run, &slot));
        let scopes = scopes.unwrap_or_else(|| Scopes::unknown(&self.github.host(), runner));
        let (repository, reference) = match &of {
            Some(run) => (run.repository.clone(), run.reference()),
            None => (
                format!("{}/{}", job.owner, job.repository),
                format!("run/{}", job.run),
            ),
        };
        info!(
            runner,
            job = job.name,
            repository,
            reference,
            scope = scopes.write,
            "has a job"
        );
        let volumes = pool.volumes.iter().filter(|volume| pool.is_job(volume));
        let bodies = volumes.map(|volume| {
            let mut options = pool.late_options(volume, &repository, &reference);
            options.insert("scope".into(), scopes.write.clone());
            options.insert("read-scopes".into(), scopes.read.join(" "));
            json!({"Name": format!("{runner}-{}", volume.name), "Opts": options})
        });
        bodies.collect()
    }

    /// Says to the daemon whose the job of these volumes is. If that is refused, the job may have scopes that are not its
    /// own, and must not go on.
    async fn admit(&self, bodies: &[Value]) -> Result<Admission, StepError> {
        for body in bodies {
            match self.friend("Friend.Admit", body.clone()).await {
                Ok(_) => {}
                // A volume that the daemon has not is not served, either.
                Err(ClientError::Refused { status, message }) if status < 500 && status != 404 => {
                    error!(volume = %body["Name"], message, "ending its job: the daemon refused its scopes");
                    return Ok(Admission::Refused);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Admission::Done)
    }
}

/// The run that a job belongs to; `None` where GitHub does not say: such a job shares nothing.
async fn whose(worker: &Worker, job: &jobs::Job) -> Option<Run> {
    // No run has that number: the message did not say.
    if job.run == 0 {
        return None;
    }
    let mut trouble = Trouble::new(format!("run {}", job.run));
    let ask = async {
        loop {
            let asked = worker
                .github
                .run(&job.owner, &job.repository, job.run, &job.workflow_ref);
            match asked.await {
                Ok(run) => return Some(run),
                Err(error)
                    if matches!(error.status().map(|s| s.as_u16()), Some(403 | 404))
                        && error.retry().is_none() =>
                {
                    warn!(job = job.name, %error, "cannot read which run the job belongs to: it shares no caches; the token must allow reading actions and metadata");
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
