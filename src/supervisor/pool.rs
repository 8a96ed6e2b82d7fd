// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pool at work: what the tasks of its slots share (`task`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tracing::info;

use super::backoff::Backoff;
use super::config::{Pool, Size};
use super::demand::Demand;
use super::github::GitHub;
use super::github::scaleset::ScaleSets;
use super::jobs::Jobs;
use super::podman::{Podman, PodmanError};
use super::trouble::{StepError, Trouble};
use crate::api::runners::Waits;
use crate::cache::verdict::Verdict;
use crate::http::client::{self, ClientError};

/// For the daemon's answer.
const FRIEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Between two looks whether all is done.
const LOOK_FOR_END: Duration = Duration::from_millis(200);

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
    /// The page of its job's run.
    pub url: String,
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
    /// How many runners are wanted, by the last look.
    pub wanted: usize,
    /// Slots that have one that takes a job, or has one, or get one.
    pub live: BTreeSet<usize>,
    /// What a scale set's messages said of the jobs that runners have.
    pub jobs: Jobs,
    /// And of how many there are.
    pub demand: Demand,
    /// Seconds from a job's being assigned to its beginning.
    pub waits: Waits,
    /// Runners that are registered under this pool's names, read at the start.
    pub found: BTreeSet<String>,
    /// The scale set's number.
    pub set: Option<u64>,
    /// Why its messages cannot be read.
    pub set_problem: Option<String>,
    pub views: BTreeMap<usize, SlotView>,
    /// How many slots there are: those of the configuration, and those that an earlier one had.
    pub slots: usize,
    /// Slots of which nothing is left.
    pub empty: BTreeSet<usize>,
    /// Slots that are left as they are at the end, as Podman is away.
    pub left: BTreeSet<usize>,
    /// Jobs that ended, by verdict.
    pub ended: BTreeMap<String, u64>,
    /// When runners may be started.
    pub backoff: Backoff,
    /// The image's id; empty where it is not there.
    pub image: String,
    /// Why it is not.
    pub image_problem: Option<String>,
}

/// A pool.
pub struct Worker {
    pub(super) pool: Pool,
    pub(super) github: Arc<GitHub>,
    pub(super) sets: tokio::sync::Mutex<ScaleSets>,
    pub(super) podman: Podman,
    /// The cache daemon's socket.
    friend: PathBuf,
    /// Where runners' configurations are handed over.
    pub(super) handovers: PathBuf,
    /// A message told of a job.
    pub(super) told: Notify,
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

impl Worker {
    /// A pool that nothing is done for yet.
    ///
    /// `friend`: the cache daemon's socket. `handovers`, `jobs`: directories below /run, where runners' configurations are
    /// handed over, and where it is written down what is known of their jobs.
    #[must_use]
    pub fn new(
        pool: Pool,
        github: GitHub,
        podman: Podman,
        friend: PathBuf,
        handovers: PathBuf,
        jobs: PathBuf,
    ) -> Self {
        let github = Arc::new(github);
        let slots = pool.slots();
        let jobs = Jobs::left(jobs, |runner| slot_of(&pool, runner).is_some());
        Self {
            sets: tokio::sync::Mutex::new(ScaleSets::new(Arc::clone(&github))),
            pool,
            github,
            podman,
            friend,
            handovers,
            told: Notify::new(),
            board: Mutex::new(Board {
                slots,
                jobs,
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

    /// How many runners are wanted now.
    pub(super) fn wanted(&self, board: &mut Board, now: u64) -> usize {
        board.wanted = match &self.pool.size {
            Size::Fixed(count) => *count,
            Size::ScaleSet(set) => {
                let idle = board.views.values().filter(|view| view.state == "idle");
                let running = board.jobs.running();
                let waiting = (board.demand).open(running, idle.map(|view| view.since), now);
                // GitHub does not know yet that these have ended.
                let ending = board.views.values().filter(|view| view.state == "ending");
                let ending = ending.filter(|view| board.jobs.runs(&view.runner)).count();
                let jobs = waiting.saturating_add(running.saturating_sub(ending));
                set.min.saturating_add(jobs).min(set.max)
            }
        };
        board.wanted
    }

    /// The address of its GitHub, as a browser has it.
    pub(super) fn server(&self) -> String {
        let url = self.pool.url.to_string();
        let host = url.splitn(4, '/').take(3);
        host.collect::<Vec<_>>().join("/")
    }

    /// The number of the slot that a runner is of, where it is one of this pool's.
    pub(super) fn slot_of(&self, runner: &str) -> Option<usize> {
        slot_of(&self.pool, runner)
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

    /// Whether nothing is left of any slot, or can be done about it without Podman.
    pub(super) fn is_done(&self) -> bool {
        let board = self.board();
        board.empty.union(&board.left).count() == board.slots
    }

    /// Returns when that is so.
    pub async fn done(&self) {
        while !self.is_done() {
            tokio::time::sleep(LOOK_FOR_END).await;
        }
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
        let mut numbers: BTreeSet<_> = slots
            .iter()
            .filter_map(|slot| number(&self.pool, slot))
            .collect();
        let host = host();
        for name in registered {
            // Other hosts may have the same configuration: what is theirs is left to them.
            if let Some(number) = self.slot_of(&name)
                && let Some((_, random)) = name.rsplit_once('-')
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
                    "exists no more, and is emptied"
                );
                self.board().slots += 1;
                let worker = Arc::clone(&self);
                tokio::spawn(async move { worker.work(number).await });
            }
        }
        self.poke();
    }
}

/// The daemon's answer as the type that both ends have of it.
pub(super) fn read<T: DeserializeOwned>(answer: Value) -> Result<T, ClientError> {
    Ok(serde_json::from_value(answer).map_err(std::io::Error::from)?)
}

/// The number of a pool's slot, by its name.
fn number(pool: &Pool, slot: &str) -> Option<usize> {
    let number = slot.strip_prefix(&pool.name)?.strip_prefix('-')?;
    let number = number.parse().ok()?;
    (pool.slot_name(number) == slot).then_some(number)
}

/// The number of the slot that a runner is of.
fn slot_of(pool: &Pool, runner: &str) -> Option<usize> {
    let (slot, _) = runner.rsplit_once('-')?;
    let number = number(pool, slot)?;
    (runner_in(slot, runner) == Some(runner)).then_some(number)
}

/// The runner with whose name a text begins: `SLOT-` and twelve hexadecimal digits, the first four of
/// which are the host's; and then nothing more, or `-` and a volume.
pub(super) fn runner_in<'n>(slot: &str, text: &'n str) -> Option<&'n str> {
    let rest = text.strip_prefix(slot)?.strip_prefix('-')?;
    let digits = rest.split('-').next()?;
    let is_ours = digits.len() == 12 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_ours.then(|| &text[..=slot.len() + digits.len()])
}

/// Four digits for this host, from what machine-id(5) says not to show to others.
pub(super) fn host() -> String {
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
