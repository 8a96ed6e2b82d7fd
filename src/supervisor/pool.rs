// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pool at work: a task for each slot that does what [`super::slot`] decides, and what they share.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::config::{Pool, Pull, Size, Userns};
use super::github::rest::{NewRunner, Removed};
use super::github::scaleset::ScaleSets;
use super::github::{GitHub, GitHubError};
use super::handover::{Handover, settled};
use super::podman::{Podman, PodmanError, RUNNER, SLOT};
use super::slot::{
    Action, Container, Job, Mode, Presence, Runner, Seen, Slot, State, decide, is_result,
};
use crate::engine::Verdict;
use crate::failpoint::reach;
use crate::plugin::client::{self, ClientError};

/// An image's label that says at which path its first process reads the runner's configuration, a line.
const HANDED_AT: &str = "lvm-cache-friend.jit-config";

/// What the runner itself reads its configuration from, and takes out of its environment (actions/runner,
/// CommandSettings.cs): where the image has no such label.
const JIT: &str = "ACTIONS_RUNNER_INPUT_JITCONFIG";

/// Has the runner take one job and end with that job's result, end with [`TOO_OLD`] where it is, and show its log (actions/runner,
/// Runner.cs, Program.cs, HostContext.cs). What the configuration says otherwise counts.
const VARIABLES: [(&str, &str); 3] = [
    ("ACTIONS_RUNNER_RETURN_JOB_RESULT_FOR_HOSTED", "true"),
    ("ACTIONS_RUNNER_RETURN_VERSION_DEPRECATED_EXIT_CODE", "1"),
    ("ACTIONS_RUNNER_PRINT_LOG_TO_STDOUT", "1"),
];

/// The exit code of a runner whose version gets no jobs any more.
const TOO_OLD: i32 = 7;

/// Lines of a runner's log that are shown where it ended without having had a job.
const LAST_LINES: u32 = 5;

/// Where jobs work, below the runner's own directory.
const WORK_FOLDER: &str = "_work";

/// The id by which the supervisor uses a volume beside the container, so that the lease ends with its
/// verdict and not before.
const HOLDER: &str = "supervisor";

/// Longest log of a container, in bytes. A job's own goes to GitHub.
const MAX_LOG: u64 = 8 << 20;

/// For the daemon's answer.
const FRIEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Between two looks whether all is done.
const LOOK_FOR_END: Duration = Duration::from_millis(200);

/// Between two looks at the image.
const LOOK_AT_IMAGE: Duration = Duration::from_secs(20);

/// Between two questions to its registry.
const PULL_AGAIN: Duration = Duration::from_secs(900);

/// Between two looks at a slot at most: somebody may have removed its container by hand.
const LOOK_AGAIN: u64 = 30;

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
    /// The scale set is not known yet.
    #[error("the scale set is not known yet")]
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

/// What is known of a job, for people.
#[derive(Debug, Clone)]
pub struct JobView {
    /// Its state.
    pub state: Job,
    /// Repository and name.
    pub what: String,
}

/// A slot, for people.
#[derive(Debug, Clone, Default)]
pub struct SlotView {
    /// `idle`, `busy` …
    pub state: &'static str,
    /// The runner's name.
    pub runner: String,
    /// The container's id.
    pub container: String,
    /// Its job.
    pub job: String,
    /// When that state began, seconds since 1970.
    pub since: u64,
    /// The runner's volumes.
    pub volumes: Vec<String>,
    /// How the last job ended.
    pub last: Option<Verdict>,
    /// Why it has no runner, or what keeps it from going on.
    pub problem: Option<String>,
}

/// What a pool is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Orders {
    /// Work.
    Run,
    /// No new jobs until further notice.
    Pause,
    /// No new jobs, and then the end.
    Drain,
    /// The end.
    Stop,
}

/// What the slots of a pool share.
#[derive(Debug, Default)]
pub(super) struct Board {
    /// How many runners are wanted.
    target: usize,
    /// Slots that have one, or get one.
    live: BTreeSet<usize>,
    /// What a scale set's messages said, by runner.
    pub jobs: BTreeMap<String, JobView>,
    /// Runners of whose jobs the daemon refused the scopes.
    pub refused: BTreeSet<String>,
    /// Runners that are registered under this pool's names, read at the start.
    found: BTreeSet<String>,
    /// The scale set's number.
    pub set: Option<u64>,
    views: BTreeMap<usize, SlotView>,
    /// How many slots there are: those of the configuration, and those that an earlier one had.
    slots: usize,
    /// Slots of which nothing is left.
    empty: BTreeSet<usize>,
    /// Jobs that ended, by verdict.
    pub ended: BTreeMap<String, u64>,
    /// When runners may be started.
    pub backoff: Backoff,
    /// The image's id; empty where it is not there.
    image: String,
    /// Why it is not.
    image_problem: Option<String>,
}

/// A pool.
pub struct Worker {
    pub(super) pool: Pool,
    pub(super) github: Arc<GitHub>,
    sets: tokio::sync::Mutex<ScaleSets>,
    podman: Podman,
    /// The cache daemon's socket.
    friend: PathBuf,
    /// Where runners' configurations are handed over.
    handovers: PathBuf,
    board: Mutex<Board>,
    /// Something changed that slots may want to know.
    pub(super) changed: watch::Sender<u64>,
    pub(super) orders: watch::Sender<Orders>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("pool", &self.pool.name)
            .finish_non_exhaustive()
    }
}

pub(super) fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

impl Worker {
    /// A pool that nothing is done for yet.
    #[must_use]
    pub fn new(
        pool: Pool,
        github: GitHub,
        podman: Podman,
        friend: PathBuf,
        handovers: PathBuf,
    ) -> Self {
        let github = Arc::new(github);
        let slots = pool.slots();
        let target = match &pool.size {
            Size::Fixed(count) => *count,
            Size::ScaleSet(set) => set.min,
        };
        Self {
            sets: tokio::sync::Mutex::new(ScaleSets::new(Arc::clone(&github))),
            pool,
            github,
            podman,
            friend,
            handovers,
            board: Mutex::new(Board {
                target,
                slots,
                ..Board::default()
            }),
            changed: watch::Sender::new(0),
            orders: watch::Sender::new(Orders::Run),
        }
    }

    pub(super) fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that slots should look again.
    pub(super) fn poke(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// A scale set wants so many runners, for jobs that it has.
    pub(super) fn demand(&self, jobs: u32) {
        if let Size::ScaleSet(set) = &self.pool.size {
            let jobs = usize::try_from(jobs).unwrap_or(usize::MAX);
            self.board().target = set.min.saturating_add(jobs).min(set.max);
            self.poke();
        }
    }

    /// Whether the end was ordered.
    pub(super) fn ends(&self) -> bool {
        *self.orders.borrow() >= Orders::Drain
    }

    /// Whether nothing is left of any slot.
    pub fn is_empty(&self) -> bool {
        let board = self.board();
        board.empty.len() == board.slots
    }

    /// Returns when nothing is left of any slot.
    pub async fn emptied(&self) {
        while !self.is_empty() {
            tokio::time::sleep(LOOK_FOR_END).await;
        }
    }

    /// Whether any slot has a job.
    pub fn is_busy(&self) -> bool {
        self.board().views.values().any(|view| view.state == "busy")
    }

    /// The slots, for people.
    pub fn views(&self) -> Vec<(usize, SlotView)> {
        let board = self.board();
        board
            .views
            .iter()
            .map(|(slot, view)| (*slot, view.clone()))
            .collect()
    }

    /// The last lines that a slot's container wrote.
    pub(super) async fn logs(&self, container: &str, lines: u32) -> Result<String, PodmanError> {
        self.podman.logs(container, lines).await
    }

    /// Asks the cache daemon. A request that has begun is done, whether or not it is waited for.
    pub(super) async fn friend(
        &self,
        endpoint: &'static str,
        body: Value,
    ) -> Result<Value, ClientError> {
        let socket = self.friend.clone();
        let asked = tokio::task::spawn_blocking(move || {
            client::call(&socket, endpoint, &body, FRIEND_TIMEOUT)
        });
        asked
            .await
            .unwrap_or_else(|panic| Err(std::io::Error::other(panic).into()))
    }

    /// Finds what an earlier life left: registrations under this pool's names, and slots that the
    /// configuration had then and has no more. Those are looked after until nothing is left of them.
    pub(super) async fn find(self: Arc<Self>) {
        let mut trouble = Trouble::new(format!("pool {}", self.pool.name));
        let (registered, slots) = loop {
            let found = async {
                let slots = self.podman.slots().await?;
                Ok::<_, StepError>((self.github.names().await?, slots))
            };
            match found.await {
                Ok(found) => break found,
                Err(error) => tokio::time::sleep(trouble.with(&error)).await,
            }
        };
        trouble.over();
        let mut numbers: BTreeSet<_> = slots.iter().filter_map(|slot| self.number(slot)).collect();
        let host = host();
        for name in registered {
            // Other hosts may have the same configuration: what is theirs is left to them.
            let Some((slot, random)) = name.rsplit_once('-') else {
                continue;
            };
            if let Some(number) = self.number(slot)
                && runner_in(slot, &name) == Some(&name)
                && random.starts_with(&host)
            {
                numbers.insert(number);
                self.board().found.insert(name);
            }
        }
        for number in numbers {
            if number >= self.pool.slots() {
                info!(
                    slot = self.pool.slot_name(number),
                    "is no more, and is emptied"
                );
                self.board().slots += 1;
                let worker = Arc::clone(&self);
                tokio::spawn(async move { worker.work(number).await });
            }
        }
        self.poke();
    }

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

    /// The number of a slot of this pool, by its name.
    fn number(&self, slot: &str) -> Option<usize> {
        let number = slot.strip_prefix(&self.pool.name)?.strip_prefix('-')?;
        let number = number.parse().ok()?;
        (self.pool.slot_name(number) == slot).then_some(number)
    }

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
            trouble: Trouble::new(format!("slot {name}")),
            name,
        };
        let mut changed = self.changed.subscribe();
        let mut orders = self.orders.subscribe();
        let mut trouble = Trouble::new(format!("slot {}", task.name));
        loop {
            changed.mark_unchanged();
            orders.mark_unchanged();
            let rest = match task.step().await {
                Ok(rest) => {
                    trouble.over();
                    rest
                }
                Err(error) => {
                    task.unsure = true;
                    task.complain(error.to_string());
                    let rest = trouble.with(&error);
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

/// The runner with whose name a text begins: `SLOT-` and twelve hexadecimal digits, the first four of
/// which are the host's; and then nothing more, or `-` and a volume.
fn runner_in<'n>(slot: &str, text: &'n str) -> Option<&'n str> {
    let rest = text.strip_prefix(slot)?.strip_prefix('-')?;
    let digits = rest.split('-').next()?;
    let is_ours = digits.len() == 12 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_ours.then(|| &text[..=slot.len() + digits.len()])
}

/// Four digits for this host, from what machine-id(5) says not to show to others.
fn host() -> String {
    let id = std::fs::read("/etc/machine-id").unwrap_or_default();
    let id = if id.is_empty() {
        nix::unistd::gethostname()
            .unwrap_or_default()
            .into_encoded_bytes()
    } else {
        id
    };
    // FNV-1a, folded.
    let hash = id.iter().fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    format!("{:04x}", (hash >> 16) ^ (hash & 0xffff))
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

struct Task<'a> {
    worker: &'a Worker,
    number: usize,
    name: String,
    slot: Slot,
    /// The runner's configuration, from its registration until its container is made.
    jit: Option<SecretString>,
    /// What its container reads it from, for as long as that is there.
    handover: Option<Handover>,
    /// Its runners' volumes, as the daemon had them at the last look.
    volumes: BTreeMap<String, BTreeSet<String>>,
    adopted: bool,
    /// Somebody may have died in the middle of something.
    unsure: bool,
    last: Option<Verdict>,
    /// With GitHub.
    trouble: Trouble,
}

impl Task<'_> {
    /// Looks, decides, and does one thing; `Some` where there is nothing to be done now.
    async fn step(&mut self) -> Result<Option<Rest>, StepError> {
        let seen = self.look().await?;
        let now = unix_now();
        if !self.adopted {
            self.slot.adopt(&seen, now);
            let runner = self.slot.runner.as_ref().map(|runner| &runner.name);
            let ours = |name: &str| runner_in(&self.name, name).is_some();
            self.handover =
                Handover::left(&self.worker.handovers, ours, runner.map(String::as_str))?;
            self.adopted = true;
            if let Some(runner) = runner {
                info!(slot = self.name, runner, "adopted");
            }
        }
        let again = self.share(&seen, now);
        let action = decide(&self.slot, &seen, now);
        debug!(slot = self.name, ?action, "next");
        if let Action::Rest(at) = action {
            let running = |c: &&Container| matches!(c.state, State::Running(_));
            let container = seen.containers.iter().find(running);
            if let Some(container) = container {
                self.hold(&container.runner).await?;
            }
            let at = at.into_iter().chain(again).min();
            let seconds = at.map_or(LOOK_AGAIN, |at| at.saturating_sub(now));
            return Ok(Some(Rest {
                time: Duration::from_secs(seconds.clamp(1, LOOK_AGAIN)),
                container: container.map(|c| c.id.clone()),
            }));
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
                self.complain(error.to_string());
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
            Action::Interrupt(id) => {
                let container = find(&id);
                warn!(
                    slot = self.name,
                    runner = container.runner,
                    "told to end, with its job"
                );
                self.worker.podman.signal(&id, "INT").await?;
                if let Some(runner) = self.slot.runner_mut(&container.runner) {
                    runner.interrupted = Some(unix_now());
                }
            }
            Action::Kill(id) => {
                let container = find(&id);
                // Before it is: what ends it otherwise meanwhile is no success either.
                if let Some(runner) = self.slot.runner_mut(&container.runner) {
                    runner.killed = true;
                }
                warn!(slot = self.name, runner = container.runner, "killed");
                self.worker.podman.signal(&id, "KILL").await?;
            }
            Action::Judge(id, verdict) => self.judge(&find(&id), verdict).await?,
            Action::Remove(id) => {
                let container = find(&id);
                self.worker.podman.remove(&id).await?;
                self.slot.removed(&container, now);
                let mut board = self.worker.board();
                board.jobs.remove(&container.runner);
                board.refused.remove(&container.runner);
            }
            Action::Clear(runner) => {
                let volumes = self.volumes.get(&runner).cloned().unwrap_or_default();
                for volume in volumes {
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
            }
            Action::Look(runner) => {
                let presence = self.worker.github.presence(&runner).await?;
                self.slot.looked(&runner, presence, unix_now());
            }
            Action::Deregister(runner, id) => match self.worker.github.remove(id).await? {
                Removed::Gone => {
                    debug!(slot = self.name, runner, "deregistered");
                    self.slot.deregistered(&runner);
                }
                Removed::Busy => {
                    let busy = Presence::There {
                        id,
                        online: true,
                        busy: true,
                    };
                    self.slot.looked(&runner, busy, unix_now());
                }
            },
            Action::Forget => self.slot.forget(now),
        }
        // Both are a runner's: without one, nobody is to be told anything.
        if self.slot.runner.is_none() {
            self.jit = None;
            self.handover = None;
        }
        Ok(())
    }

    async fn look(&mut self) -> Result<Seen, StepError> {
        let podman = &self.worker.podman;
        let containers = podman.containers(&self.name).await?;
        // The daemon has their names at hand, whatever Podman knows of them.
        let listed = self.worker.friend("VolumeDriver.List", json!({})).await?;
        let listed = listed["Volumes"].as_array().map_or(&[][..], Vec::as_slice);
        self.volumes.clear();
        for name in listed.iter().filter_map(|volume| volume["Name"].as_str()) {
            if let Some(runner) = runner_in(&self.name, name) {
                let runner = runner.to_owned();
                self.volumes
                    .entry(runner)
                    .or_default()
                    .insert(name.to_owned());
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

    /// Takes what the pool has for the slot, and gives what the slot has for the pool. When that is to be done again, if that is known.
    fn share(&mut self, seen: &Seen, now: u64) -> Option<u64> {
        let orders = *self.worker.orders.borrow();
        let mut board = self.worker.board();
        let board = &mut *board;
        let (own, slot) = (&self.name, &mut self.slot);
        board.found.retain(|name| {
            let is_own = runner_in(own, name).is_some();
            if is_own {
                slot.found(name);
            }
            !is_own
        });
        let job = match &mut self.slot.runner {
            Some(runner) => {
                runner.refused = board.refused.contains(&runner.name);
                let told = board.jobs.get(&runner.name);
                if let Some(told) = told {
                    runner.job = told.state;
                    runner.met = true;
                }
                told.map(|told| told.what.clone())
            }
            None => None,
        };
        if let Some(runner) = &self.slot.runner
            && runner.met
            && board.backoff.connected(runner.since)
        {
            self.worker.poke();
        }
        let mut again = None;
        let is_more = self.number >= self.worker.pool.slots();
        if self.slot.runner.is_none() && seen.containers.is_empty() {
            board.live.remove(&self.number);
        } else if !is_more {
            board.live.insert(self.number);
        }
        self.slot.mode = match orders {
            Orders::Stop => Mode::Stop,
            Orders::Drain | Orders::Pause => Mode::Drain,
            Orders::Run if is_more => Mode::Drain,
            // Of an image that is another one now.
            Orders::Run
                if !board.image.is_empty()
                    && seen.containers.iter().any(|c| c.image != board.image) =>
            {
                Mode::Drain
            }
            Orders::Run if board.live.contains(&self.number) => Mode::Start,
            Orders::Run if board.live.len() < board.target => {
                let may = if board.image.is_empty() {
                    Err(None)
                } else {
                    board.backoff.start(board.live.len(), now)
                };
                match may {
                    Ok(()) => {
                        board.live.insert(self.number);
                        Mode::Start
                    }
                    Err(at) => {
                        again = at;
                        Mode::Keep
                    }
                }
            }
            Orders::Run => Mode::Keep,
        };
        if self.slot.is_empty(seen) {
            board.empty.insert(self.number);
        } else {
            board.empty.remove(&self.number);
        }
        let mut view = self.view(seen, job, now);
        if view.state == "empty" {
            let problem = board.image_problem.clone();
            view.problem = problem.or_else(|| board.backoff.problem(now));
        }
        board.views.insert(self.number, view);
        again
    }

    fn view(&self, seen: &Seen, job: Option<String>, now: u64) -> SlotView {
        let container = seen.containers.first();
        let runner = self.slot.runner.as_ref();
        let (state, since) = match (runner, container.map(|c| c.state)) {
            (
                Some(Runner {
                    job: Job::Running(at),
                    ..
                }),
                Some(State::Running(_)),
            ) => ("busy", *at),
            (Some(Runner { met: true, .. }), Some(State::Running(at))) => ("idle", at),
            (_, Some(State::Running(at))) => ("starting", at),
            (_, Some(State::Exited(_, at))) => ("ending", at),
            (Some(runner), _) => ("starting", runner.since),
            (None, Some(_)) => ("ending", now),
            (None, None) => ("empty", now),
        };
        let name = container.map(|c| &c.runner).or(runner.map(|r| &r.name));
        SlotView {
            state,
            runner: name.cloned().unwrap_or_default(),
            container: container.map(|c| c.id.clone()).unwrap_or_default(),
            job: job.unwrap_or_default(),
            since,
            volumes: name
                .and_then(|name| self.volumes.get(name))
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
            last: self.last,
            problem: None,
        }
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
        let spec = container_spec(&self.worker.pool, &runner, &labels, &given);
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
        let code = match verdict {
            Verdict::Success => json!(0),
            Verdict::Failure => json!(1),
            Verdict::Unknown => Value::Null,
        };
        let body = json!({"Container": container.id, "Volumes": volumes, "ExitCode": code});
        self.worker.friend("Friend.Judged", body).await?;
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
            let job = job.map(|job| job.what.clone()).unwrap_or_default();
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

/// How a container gets its runner's configuration; docs/architecture.md says why.
enum Given<'a> {
    /// By a FIFO of the host's, at a path in the container.
    Fifo(&'a Path, String),
    /// In the variable that the runner reads.
    Environment(&'a SecretString),
}

/// The container, as Podman's SpecGenerator has it.
fn container_spec(
    pool: &Pool,
    runner: &str,
    labels: &BTreeMap<&'static str, String>,
    given: &Given<'_>,
) -> Value {
    let text = &pool.container;
    let mut env = text.env.clone();
    for (name, value) in VARIABLES {
        env.entry(name.into()).or_insert_with(|| value.into());
    }
    let tmpfs = text.tmpfs.iter();
    let mut mounts: Vec<_> = tmpfs
        .map(|at| json!({"destination": at, "type": "tmpfs", "source": "tmpfs"}))
        .collect();
    // Of a root that is read-only Podman 5 makes /dev/shm a part; before, it was writable as in any container. Podman's own options.
    if text.read_only && !text.tmpfs.iter().any(|at| at == "/dev/shm") {
        mounts.push(json!({
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "nodev", "noexec", "mode=1777", "size=65536k"],
        }));
    }
    match given {
        // Z: where the host has SELinux, the container may read it.
        Given::Fifo(source, target) => mounts.push(json!({
            "destination": target,
            "type": "bind",
            "source": source,
            "options": ["rbind", "ro", "Z"],
        })),
        Given::Environment(jit) => {
            env.insert(JIT.into(), jit.expose_secret().into());
        }
    }
    let volumes: Vec<_> = pool
        .volumes
        .iter()
        .map(|volume| {
            // What is mounted in a job volume later is seen in the container.
            let options: &[&str] = if pool.is_job(volume) { &["rslave"] } else { &[] };
            json!({"Name": format!("{runner}-{}", volume.name), "Dest": volume.target, "Options": options})
        })
        .collect();
    let guard: Vec<_> = pool
        .volumes
        .iter()
        .map(|volume| format!("{runner}-{}:{}", volume.name, volume.target))
        .collect();
    let mut spec = json!({
        "name": runner,
        "image": text.image,
        "labels": labels,
        "env": env,
        "mounts": mounts,
        "volumes": volumes,
        "annotations": {"lvm-cache-friend.volume": guard.join(" ")},
        "restart_policy": "no",
        // A job can write there without end.
        "log_configuration": {"driver": "k8s-file", "size": MAX_LOG},
    });
    let mut set = |name: &str, value: Value| spec[name] = value;
    if guard.is_empty() {
        set("annotations", json!({}));
    }
    if !text.command.is_empty() {
        set("command", json!(text.command));
    }
    if text.read_only {
        set("read_only_filesystem", json!(true));
    }
    if !text.devices.is_empty() {
        set(
            "devices",
            text.devices
                .iter()
                .map(|path| json!({"path": path}))
                .collect(),
        );
    }
    for (name, list) in [
        ("cap_add", &text.cap_add),
        ("unmask", &text.unmask),
        ("selinux_opts", &text.selinux),
    ] {
        if !list.is_empty() {
            set(name, json!(list));
        }
    }
    if let Some(network) = text.network {
        set("netns", json!({"nsmode": network}));
    }
    match text.userns {
        None => {}
        Some(Userns::Host) => set("userns", json!({"nsmode": "host"})),
        // What `podman run --userns=auto:size=N` makes of it.
        Some(Userns::Auto(size)) => {
            let value = if size == 0 {
                String::new()
            } else {
                format!("size={size}")
            };
            set("userns", json!({"nsmode": "auto", "value": value}));
            set(
                "idmappings",
                json!({"AutoUserNs": true, "AutoUserNsOpts": {"Size": size}, "HostUIDMapping": false, "HostGIDMapping": false}),
            );
        }
    }
    let mut limits = json!({});
    if let Some(memory) = text.memory {
        limits["memory"] = json!({"limit": memory.0, "swap": memory.0});
    }
    if let Some(cpus) = text.cpus {
        const PERIOD: u32 = 100_000;
        limits["cpu"] = json!({"period": PERIOD, "quota": (cpus * f64::from(PERIOD)) as i64});
    }
    if let Some(pids) = text.pids {
        limits["pids"] = json!({"limit": pids});
    }
    if limits.as_object().is_some_and(|limits| !limits.is_empty()) {
        spec["resource_limits"] = limits;
    }
    spec
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
            info!("{}: goes on after {} failures", self.who, self.failures);
        }
        self.said.clear();
        self.failures = 0;
    }
}
