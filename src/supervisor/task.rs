// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A slot's task: it looks what there is, and does what [`super::slot`] decides, one step after another.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use tracing::{debug, info, warn};

use super::config::Size;
use super::container::{self, Given, HANDED_AT};
use super::github::GitHubError;
use super::github::rest::{NewRunner, Removed};
use super::handover::{Handover, settled};
use super::podman::{PodmanError, RUNNER, SLOT};
use super::pool::{Worker, host, read, runner_in};
use super::slot::{Action, Container, Job, Presence, Seen, Slot, State, decide, is_result};
use super::trouble::{StepError, Trouble};
use crate::api::volumes::{Many, Use};
use crate::cache::verdict::Verdict;
use crate::failpoint::reach;
use crate::http::client::ClientError;
use crate::text::unix_now;

/// The exit code of a runner whose version gets no jobs any more.
const TOO_OLD: i32 = 7;

/// Lines of a runner's log that are shown where it ended without having had a job.
const LAST_LINES: u32 = 5;

/// Where jobs work, below the runner's own directory.
const WORK_FOLDER: &str = "_work";

/// The id by which the supervisor uses a volume beside the container, so that the lease ends with its
/// verdict and not before.
const HOLDER: &str = "supervisor";

/// How long Podman may not answer before a slot is left as it is at the end. When a host is shut down, its service has been stopped, and
/// its socket takes no connections any more (systemd: `socket_enter_running`).
const AWAY: Duration = Duration::from_secs(30);

/// Between two tries at the end at most.
const AT_THE_END: Duration = Duration::from_secs(5);

/// Between two looks at a slot at most: somebody may have removed its container by hand.
const LOOK_AGAIN: u64 = 30;

impl Worker {
    /// Works on a slot for ever.
    pub(super) async fn work(&self, number: usize) {
        let set = matches!(self.pool.size, Size::ScaleSet(_));
        let name = self.pool.slot_name(number);
        let mut task = Task {
            worker: self,
            number,
            slot: Slot::new(self.pool.bounds, set),
            jit: None,
            handover: None,
            volumes: BTreeMap::new(),
            adopted: false,
            unsure: true,
            last: None,
            spare: None,
            problem: None,
            trouble: Trouble::new(format!("slot {name}")),
            name,
        };
        let mut changed = self.changed.subscribe();
        let mut orders = self.orders.subscribe();
        let mut trouble = Trouble::new(format!("slot {}", task.name));
        // Since when Podman does not answer.
        let mut away = None;
        loop {
            changed.mark_unchanged();
            orders.mark_unchanged();
            let rest = match task.step().await {
                Ok(rest) => {
                    trouble.over();
                    away = None;
                    rest
                }
                Err(error) => {
                    task.unsure = true;
                    task.complain(error.to_string());
                    let mut rest = trouble.with(&error);
                    let is_away = matches!(error, StepError::Podman(PodmanError::Away { .. }));
                    away = is_away.then(|| away.unwrap_or_else(Instant::now));
                    if self.ends() {
                        if away.is_some_and(|since| since.elapsed() >= AWAY) {
                            self.board().left.insert(number);
                        }
                        rest = rest.min(AT_THE_END);
                    }
                    // Of what changes meanwhile, only the end cannot wait.
                    tokio::select! {
                        () = tokio::time::sleep(rest) => {}
                        _ = orders.changed() => {}
                    }
                    continue;
                }
            };
            let Some(rest) = rest else { continue };
            let ended = async {
                match &rest.container {
                    Some(id) => self.podman.wait(id).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep(rest.time) => {}
                ended = ended => {
                    // Podman that goes away is found out at the next look.
                    if ended.is_err() {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
        }
    }
}

/// What a failpoint calls an action.
const fn stage(action: &Action) -> Option<&'static str> {
    match action {
        Action::Register => Some("register"),
        Action::Prepare => Some("ready"),
        Action::Create => Some("container"),
        Action::Start(_) => Some("start"),
        Action::Judge(..) => Some("judge"),
        Action::Remove(_) => Some("end"),
        Action::Clear(_) => Some("clear"),
        Action::Look(_) => Some("look"),
        Action::Rest(_)
        | Action::Interrupt(_)
        | Action::Kill(_)
        | Action::Deregister(..)
        | Action::Forget => None,
    }
}

/// Until when, or until which container's end, a slot rests.
struct Rest {
    time: Duration,
    container: Option<String>,
}

pub(super) struct Task<'a> {
    pub(super) worker: &'a Worker,
    pub(super) number: usize,
    pub(super) name: String,
    pub(super) slot: Slot,
    /// The runner's configuration, from its registration until its container is made.
    jit: Option<SecretString>,
    /// What its container reads it from, for as long as that is there.
    handover: Option<Handover>,
    /// Its runners' volumes, as the daemon had them at the last look.
    pub(super) volumes: BTreeMap<String, BTreeSet<String>>,
    adopted: bool,
    /// Podman, the daemon or an earlier life of ours may have died in the middle of a step.
    unsure: bool,
    pub(super) last: Option<Verdict>,
    /// Since when its runner has been idle and more than wanted.
    pub(super) spare: Option<u64>,
    /// With GitHub.
    trouble: Trouble,
    /// What GitHub said last, or why it was not asked.
    pub(super) problem: Option<String>,
}

impl Task<'_> {
    /// Looks, decides, and does one thing; `Some` where there is nothing to be done now.
    async fn step(&mut self) -> Result<Option<Rest>, StepError> {
        let seen = self.look().await?;
        let now = unix_now();
        if !self.adopted {
            self.adopt(&seen, now)?;
        }
        let again = self.share(&seen, now);
        let action = decide(&self.slot, &seen, now);
        debug!(slot = self.name, ?action, "next");
        if let Action::Rest(at) = action {
            let at = at.into_iter().chain(again).min();
            return self.rest(&seen, at, now).await.map(Some);
        }
        let stage = stage(&action);
        if let Some(stage) = stage {
            reach(stage, 1);
        }
        let asks = action.asks();
        match self.act(action, &seen, now).await {
            Ok(()) if asks => self.trouble.over(),
            Ok(()) => {}
            Err(error @ (StepError::GitHub(_) | StepError::NoSet)) => {
                self.problem = Some(error.to_string());
                let rest = self.trouble.with(&error);
                self.slot.ask_again = unix_now() + rest.as_secs() + 1;
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        if let Some(stage) = stage {
            reach(stage, 2);
        }
        Ok(None)
    }

    /// Takes over what an earlier life of the supervisor left.
    fn adopt(&mut self, seen: &Seen, now: u64) -> Result<(), StepError> {
        self.slot.adopt(seen, now);
        let runner = self.slot.runner.as_ref().map(|runner| &runner.name);
        let ours = |name: &str| runner_in(&self.name, name).is_some();
        self.handover = Handover::left(&self.worker.handovers, ours, runner.map(String::as_str))?;
        self.adopted = true;
        if let Some(runner) = runner {
            info!(slot = self.name, runner, "adopted");
        }
        Ok(())
    }

    /// There is nothing to do until `at`, in seconds since 1970, or until the container that runs ends.
    async fn rest(&mut self, seen: &Seen, at: Option<u64>, now: u64) -> Result<Rest, StepError> {
        let running = |c: &&Container| matches!(c.state, State::Running(_));
        let container = seen.containers.iter().find(running);
        if let Some(container) = container {
            self.hold(&container.runner).await?;
        }
        let seconds = at.map_or(LOOK_AGAIN, |at| at.saturating_sub(now));
        Ok(Rest {
            time: Duration::from_secs(seconds.clamp(1, LOOK_AGAIN)),
            container: container.map(|c| c.id.clone()),
        })
    }

    /// Does what was decided.
    async fn act(&mut self, action: Action, seen: &Seen, now: u64) -> Result<(), StepError> {
        let find = |id: &String| {
            let found = seen.containers.iter().find(|c| c.id == *id);
            found.cloned().expect("decided by what was seen")
        };
        match action {
            Action::Rest(_) => {}
            Action::Register => self.register().await?,
            Action::Prepare => self.prepare().await?,
            Action::Create => self.create().await?,
            Action::Start(id) => self.start(&find(&id)).await?,
            Action::Interrupt(id) => self.interrupt(&find(&id)).await?,
            Action::Kill(id) => self.kill(&find(&id)).await?,
            Action::Judge(id, verdict) => self.judge(&find(&id), verdict).await?,
            Action::Remove(id) => {
                let container = find(&id);
                self.worker.podman.remove(&id).await?;
                self.slot.removed(&container, now);
            }
            Action::Clear(runner) => self.clear(&runner).await?,
            Action::Look(runner) => self.ask_for(&runner).await?,
            Action::Deregister(runner, id) => self.deregister(&runner, id).await?,
            Action::Forget => self.slot.forget(now),
        }
        // Both are a runner's: without one, nobody is to be told anything.
        if self.slot.runner.is_none() {
            self.jit = None;
            self.handover = None;
        }
        Ok(())
    }

    async fn interrupt(&mut self, container: &Container) -> Result<(), StepError> {
        warn!(
            slot = self.name,
            runner = container.runner,
            "interrupted, with its job"
        );
        self.worker.podman.signal(&container.id, "INT").await?;
        if let Some(runner) = self.slot.runner_mut(&container.runner) {
            runner.interrupted = Some(unix_now());
        }
        Ok(())
    }

    async fn kill(&mut self, container: &Container) -> Result<(), StepError> {
        // Before it is: what ends it otherwise meanwhile is no success either.
        if let Some(runner) = self.slot.runner_mut(&container.runner) {
            runner.killed = true;
        }
        warn!(slot = self.name, runner = container.runner, "killed");
        Ok(self.worker.podman.signal(&container.id, "KILL").await?)
    }

    /// Removes a runner's volumes.
    async fn clear(&mut self, runner: &str) -> Result<(), StepError> {
        let volumes = self.volumes.get(runner).cloned().unwrap_or_default();
        for volume in volumes {
            // One that is still used would not be removed.
            self.release(&volume).await?;
            self.worker.podman.remove_volume(&volume).await?;
            reach("clear", 3);
            // Where Podman died before it knew of it.
            match self
                .worker
                .friend("VolumeDriver.Remove", json!({"Name": volume}))
                .await
            {
                Ok(_) | Err(ClientError::Refused { status: 404, .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Asks GitHub for a runner. Whether it has a job, GitHub knows better than a message said.
    async fn ask_for(&mut self, runner: &str) -> Result<(), StepError> {
        let presence = self.worker.github.presence(runner).await?;
        let now = unix_now();
        let was = self.slot.runner.as_ref().map(|runner| runner.job);
        self.slot.looked(runner, presence, now);
        let is = self.slot.runner.as_ref().map(|runner| runner.job);
        if let (Some(Job::Done(verdict, _)), Some(Job::Running(_))) = (was, is) {
            warn!(slot = self.name, runner, %verdict, "was reported to have ended its job, but still runs it: report ignored");
            let told = self.worker.board().jobs.tell(runner, |job| {
                job.ended = None;
                job.began.get_or_insert(now);
            });
            told.map_err(StepError::Written)?;
        }
        Ok(())
    }

    async fn deregister(&mut self, runner: &str, id: u64) -> Result<(), StepError> {
        match self.worker.github.remove(id).await? {
            Removed::Gone => {
                debug!(slot = self.name, runner, "deregistered");
                self.slot.deregistered(runner);
            }
            Removed::Busy => {
                let busy = Presence::There {
                    id,
                    online: true,
                    busy: true,
                };
                self.slot.looked(runner, busy, unix_now());
            }
        }
        Ok(())
    }

    async fn look(&mut self) -> Result<Seen, StepError> {
        let podman = &self.worker.podman;
        let containers = podman.containers(&self.name).await?;
        // The daemon has their names at hand, whatever Podman knows of them.
        let listed: Many = read(self.worker.friend("VolumeDriver.List", json!({})).await?)?;
        self.volumes.clear();
        for volume in listed.volumes {
            if let Some(runner) = runner_in(&self.name, &volume.name) {
                let runner = runner.to_owned();
                self.volumes.entry(runner).or_default().insert(volume.name);
            }
        }
        // What the daemon knows is cleared, one step after another: this is for what Podman alone knows.
        let nothing_else = containers.is_empty() && self.volumes.is_empty();
        if self.unsure && nothing_else && self.slot.runner.is_none() {
            podman.prune_volumes(&self.name).await?;
            self.unsure = false;
        }
        Ok(Seen {
            leftovers: self.volumes.keys().cloned().collect(),
            containers,
        })
    }

    /// Shows what keeps the slot from going on, until the next look.
    fn complain(&self, problem: String) {
        let mut board = self.worker.board();
        board.views.entry(self.number).or_default().problem = Some(problem);
    }

    async fn register(&mut self) -> Result<(), StepError> {
        let mut random = [0; 4];
        getrandom::fill(&mut random).expect("the kernel has random numbers");
        let random = u32::from_ne_bytes(random);
        let name = format!("{}-{}{random:08x}", self.name, host());
        let worker = self.worker;
        let asked = match &worker.pool.size {
            Size::Fixed(_) => {
                let group = worker.sets.lock().await.group(&worker.pool.group).await?;
                let new = NewRunner {
                    name: &name,
                    runner_group_id: group,
                    labels: &worker.pool.labels,
                    work_folder: WORK_FOLDER,
                };
                worker.github.generate_jit(&new).await
            }
            Size::ScaleSet(_) => {
                let set = worker.board().set.ok_or(StepError::NoSet)?;
                let mut sets = worker.sets.lock().await;
                sets.generate_jit(set, &name, WORK_FOLDER).await
            }
        };
        match asked {
            Ok(jit) => {
                self.jit = Some(settled(jit));
                self.slot.registered(&name, unix_now());
                Ok(())
            }
            Err(error) => {
                // It may have been registered, and the answer lost, but where GitHub says that it was not.
                let refused = error
                    .status()
                    .is_some_and(|status| status.is_client_error());
                if !refused && !matches!(error, GitHubError::Still(_)) {
                    self.slot.found(&name);
                }
                Err(error.into())
            }
        }
    }

    fn labels(&self, runner: &str) -> BTreeMap<&'static str, String> {
        BTreeMap::from([(SLOT, self.name.clone()), (RUNNER, runner.to_owned())])
    }

    fn runner_name(&self) -> String {
        self.slot
            .runner
            .as_ref()
            .map(|runner| runner.name.clone())
            .unwrap_or_default()
    }

    async fn prepare(&mut self) -> Result<(), StepError> {
        let runner = self.runner_name();
        let pool = &self.worker.pool;
        for volume in &pool.volumes {
            let name = format!("{runner}-{}", volume.name);
            let options = pool.options(volume, self.number);
            let labels = self.labels(&runner);
            self.worker
                .podman
                .create_volume(&name, &options, &labels)
                .await?;
            self.volumes.entry(runner.clone()).or_default().insert(name);
        }
        reach("ready", 3);
        self.hold(&runner).await?;
        if let Some(own) = self.slot.runner_mut(&runner) {
            own.prepared = true;
        }
        Ok(())
    }

    /// Uses a runner's volumes beside its container. Said again and again, for a daemon that was
    /// started anew has forgotten it.
    async fn hold(&self, runner: &str) -> Result<(), StepError> {
        for volume in self.volumes.get(runner).into_iter().flatten() {
            let body = json!({"Name": volume, "ID": HOLDER});
            self.worker.friend("VolumeDriver.Mount", body).await?;
        }
        Ok(())
    }

    /// Has a volume be used no more whose containers are gone: of those that Podman was killed over, something may be left.
    async fn release(&self, volume: &str) -> Result<(), StepError> {
        let body = json!({"Name": volume});
        match self.worker.friend("Friend.Release", body).await {
            Ok(_) | Err(ClientError::Refused { status: 404, .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn create(&mut self) -> Result<(), StepError> {
        let runner = self.runner_name();
        let Some(jit) = &self.jit else {
            // Only the process that registered it has it.
            self.slot.forget(unix_now());
            return Ok(());
        };
        let labels = self.labels(&runner);
        let podman = &self.worker.podman;
        let image = &self.worker.pool.container.image;
        let given = match podman.image_label(image, HANDED_AT).await? {
            Some(target) => {
                // Of a try that Podman refused: it has the same path, and removes it.
                self.handover = None;
                let made = Handover::of(&self.worker.handovers, &runner, jit.expose_secret())?;
                let handover = self.handover.insert(made);
                Given::Fifo(handover.path(), target)
            }
            None => Given::Environment(jit),
        };
        let spec = container::spec(&self.worker.pool, &runner, &labels, &given);
        podman.create(&spec).await?;
        self.jit = None;
        if let Some(own) = self.slot.runner_mut(&runner) {
            own.created = true;
        }
        Ok(())
    }

    async fn start(&mut self, container: &Container) -> Result<(), StepError> {
        self.worker.podman.start(&container.id).await?;
        if let Some(runner) = self.slot.runner_mut(&container.runner) {
            runner.created = true;
        }
        info!(slot = self.name, runner = container.runner, "started");
        Ok(())
    }

    async fn judge(&mut self, container: &Container, verdict: Verdict) -> Result<(), StepError> {
        let volumes: Vec<_> = self
            .volumes
            .get(&container.runner)
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        let judged = Use {
            container: container.id.clone(),
            volumes: volumes.clone(),
            exit_code: match verdict {
                Verdict::Success => Some(0),
                Verdict::Failure => Some(1),
                Verdict::Unknown => None,
            },
            pid: None,
        };
        self.worker.friend("Friend.Judged", json!(judged)).await?;
        reach("judge", 3);
        for volume in volumes {
            let body = json!({"Name": volume, "ID": HOLDER});
            self.worker.friend("VolumeDriver.Unmount", body).await?;
        }
        let code = match container.state {
            State::Exited(code, _) => code,
            _ => unreachable!("what has ended is judged"),
        };
        let runner = self.slot.runner_mut(&container.runner).cloned();
        if is_result(code)
            || runner
                .as_ref()
                .is_some_and(|runner| runner.job != Job::None)
        {
            self.last = Some(verdict);
            let mut board = self.worker.board();
            board.backoff.worked();
            *board.ended.entry(verdict.to_string()).or_default() += 1;
            let job = board.jobs.get(&container.runner);
            let job = job.map(|job| job.what()).unwrap_or_default();
            info!(slot = self.name, runner = container.runner, job, %verdict, code, "ended");
        } else if let Some(runner) = runner
            && !(runner.killed || runner.withdrawn || runner.interrupted.is_some())
        {
            self.had_none(container, code, runner.since).await;
        } else {
            info!(
                slot = self.name,
                runner = container.runner,
                "ended, without a job"
            );
        }
        self.slot.judged.insert(container.id.clone());
        Ok(())
    }

    /// A runner ended by itself and had no job: nothing is known of any, and it may be so with the next.
    async fn had_none(&self, container: &Container, code: i32, since: u64) {
        let lines = self.worker.podman.logs(&container.id, LAST_LINES).await;
        let lines = lines.unwrap_or_else(|error| error.to_string());
        let means = match code {
            TOO_OLD => ", as its version gets no jobs any more: build the image anew, or pull it",
            _ => "",
        };
        let said = format!(
            "a runner ended with exit code {code} and had no job{means}. Its last lines: {}",
            lines.trim()
        );
        warn!(slot = self.name, runner = container.runner, "{said}");
        let mut board = self.worker.board();
        let now = unix_now();
        if code == TOO_OLD {
            board.backoff.refuse(now, said);
        } else {
            board.backoff.ended(since, now, said);
        }
    }
}
