// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one owner of the disk: a thread that runs LVM's commands one at a time.
//!
//! LVM locks the whole group for each command anyway, so more than one at once
//! would only wait in the kernel, where no order can be kept and nothing can be
//! called off.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::command::Command;
use super::runner::Runner;
use super::shell::{Answer, Failure, Shell};

/// How many calls may wait for their turn. Each is a thread of the daemon's, so
/// it is their number that bounds it; this only keeps a fault of ours, threads
/// without end, from becoming memory without end. A caller beyond it is
/// refused at once.
const QUEUE: usize = 256;

/// How long a removal lets requests pass before it goes first: under a steady
/// load of requests the pool would otherwise fill with what is to be removed.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(5);

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Until a command's turn comes; then it is called off, never begun. This is
    /// what a request pays at most for what others do: one removal, or a
    /// foreign command that holds the lock while the command before waits for it.
    pub turn: Duration,
    /// For a command, once begun, waiting for a foreign command's lock included.
    /// A snapshot takes 20 ms on a plain machine and half a second in an emulated
    /// one; with 10,000 volumes some seconds.
    pub run: Duration,
    /// For a removal, once begun: giving back what a large volume mapped takes
    /// long, and stopping in the middle helps nobody.
    pub removal: Duration,
}

impl Default for Bounds {
    /// 15 s for its turn and 15 s to run: an answer within 30 s; and 2 minutes
    /// for a removal.
    fn default() -> Self {
        Self {
            turn: Duration::from_secs(15),
            run: Duration::from_secs(15),
            removal: Duration::from_secs(120),
        }
    }
}

/// Which queue a command waits in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Somebody waits for it.
    Request,
    /// It can wait, but not for ever: see [`REMOVAL_PATIENCE`].
    Removal,
}

/// A handle on the owner; dropping it ends the thread and its child.
#[derive(Debug)]
pub(super) struct Owner {
    shared: Arc<Shared>,
    bounds: Bounds,
    thread: Option<JoinHandle<()>>,
    /// Disconnected once the thread has ended.
    running: Mutex<mpsc::Receiver<Infallible>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    requests: VecDeque<Job>,
    removals: VecDeque<Job>,
    next_id: u64,
    closed: bool,
    /// The last command that was taken was a removal.
    after_removal: bool,
}

#[derive(Debug)]
struct Job {
    id: u64,
    since: Instant,
    bound: Duration,
    command: Command,
    answer: mpsc::SyncSender<Result<Answer, Failure>>,
}

impl Owner {
    /// Starts the thread. It starts `lvm` when the first command comes.
    pub(super) fn start(mut runner: Runner, bounds: Bounds) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let (of_run, running) = mpsc::channel();
        let thread = thread::Builder::new().name("lvm".into()).spawn(move || {
            while let Some(job) = of_thread.next() {
                let answer = runner.run(&job.command, job.bound);
                // The caller may have given up; the work is done all the same.
                let _ = job.answer.send(answer);
            }
            runner.close();
            drop(of_run);
        })?;
        Ok(Self {
            shared,
            bounds,
            thread: Some(thread),
            running: Mutex::new(running),
        })
    }

    /// Begins no more commands, and waits until `until` for the present one, and for `lvm` itself, to end. `false`: it
    /// goes on.
    pub(super) fn close(&self, until: Instant) -> bool {
        self.shared.close();
        let left = until.saturating_duration_since(Instant::now());
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
    }

    /// Runs a command when its turn has come.
    pub(super) fn run(&self, command: Command, urgency: Urgency) -> Result<Answer, Failure> {
        let bound = match urgency {
            Urgency::Request => self.bounds.run,
            Urgency::Removal => self.bounds.removal,
        };
        let (sender, answer) = mpsc::sync_channel(1);
        let since = Instant::now();
        let late = || Failure::Late(since.elapsed());
        let closed =
            || Failure::Broken("no more commands are run: this process is about to end".into());
        let id = {
            let mut queue = self.shared.lock();
            if queue.closed {
                return Err(closed());
            }
            if queue.requests.len() + queue.removals.len() >= QUEUE {
                return Err(late());
            }
            let id = queue.next_id;
            queue.next_id += 1;
            queue.of(urgency).push_back(Job {
                id,
                since,
                bound,
                command,
                answer: sender,
            });
            id
        };
        self.shared.arrived.notify_one();
        let patience = match urgency {
            Urgency::Request => self.bounds.turn,
            // A removal's caller does nothing but remove.
            Urgency::Removal => self.bounds.turn + self.bounds.removal,
        };
        match answer.recv_timeout(patience) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Disconnected) => return Err(closed()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        {
            let mut queue = self.shared.lock();
            let waiting = queue.of(urgency);
            if let Some(at) = waiting.iter().position(|job| job.id == id) {
                waiting.remove(at);
                return Err(late());
            }
        }
        // It has begun, and the runner keeps to its bound, give or take how
        // long a child takes to die.
        match answer.recv_timeout(bound + Shell::LONGEST_END) {
            Ok(answer) => answer,
            Err(_) => Err(late()),
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code that can panic runs under it, and the queue is whole anyway.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread end after its present command, and those who wait for another one see so.
    fn close(&self) {
        let left = {
            let mut queue = self.lock();
            queue.closed = true;
            (
                std::mem::take(&mut queue.requests),
                std::mem::take(&mut queue.removals),
            )
        };
        drop(left);
        self.arrived.notify_one();
    }

    /// Waits for the next command to run; `None` when there will be none.
    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.take() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self
                .arrived
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Queue {
    fn of(&mut self, urgency: Urgency) -> &mut VecDeque<Job> {
        match urgency {
            Urgency::Request => &mut self.requests,
            Urgency::Removal => &mut self.removals,
        }
    }

    /// Requests first; but an overdue removal goes before them, unless one just
    /// went: no request waits for two.
    fn take(&mut self) -> Option<Job> {
        let overdue = |job: &Job| job.since.elapsed() >= REMOVAL_PATIENCE;
        let removal_first = self.requests.is_empty()
            || !self.after_removal && self.removals.front().is_some_and(overdue);
        let job = if removal_first {
            self.removals.pop_front()
        } else {
            self.requests.pop_front()
        };
        self.after_removal = removal_first;
        job
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order in which requests (`r`) and removals (`d`; `D`: overdue) are taken.
    fn order(waiting: &str) -> String {
        let long_ago = Instant::now()
            .checked_sub(REMOVAL_PATIENCE)
            .expect("the machine is up longer than that");
        let mut queue = Queue::default();
        for (id, kind) in (0..).zip(waiting.chars()) {
            let (answer, _) = mpsc::sync_channel(1);
            let (urgency, since) = match kind {
                'r' => (Urgency::Request, Instant::now()),
                'd' => (Urgency::Removal, Instant::now()),
                _ => (Urgency::Removal, long_ago),
            };
            queue.of(urgency).push_back(Job {
                id,
                since,
                bound: Duration::ZERO,
                command: Command::new("lvs"),
                answer,
            });
        }
        let taken = std::iter::from_fn(|| queue.take());
        let kinds: Vec<char> = waiting.chars().collect();
        taken.map(|job| kinds[job.id as usize]).collect()
    }

    #[test]
    fn no_request_waits_for_two_removals_and_no_removal_for_ever() {
        for (waiting, taken) in [
            ("", ""),
            ("rrr", "rrr"),
            ("ddd", "ddd"),
            ("ddrr", "rrdd"),
            ("DDDrrr", "DrDrDr"),
            ("DDDDr", "DrDDD"),
            ("rrD", "Drr"),
            ("Ddrr", "Drrd"),
        ] {
            assert_eq!(order(waiting), taken, "{waiting}");
        }
    }
}
