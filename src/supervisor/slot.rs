// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A slot: a place for one runner at a time. What is done next is decided here, without I/O
//! and without a clock, from what Podman has and what is known of GitHub.
//!
//! A runner's life: registered (its JIT configuration is in hand, in memory alone), prepared
//! (its volumes are there), created, started, ended, judged, removed; at last its registration is gone.
//! Whatever a crash leaves of it is found by its labels and its name, and goes the rest of that
//! way: what runs is adopted, what has ended is judged, what has not begun is removed.

use std::collections::{BTreeMap, BTreeSet};

use crate::cache::verdict::Verdict;

/// Seconds for which a registration that was read is believed.
const FRESH: u64 = 10;

/// Seconds between two readings of a registration that nothing else tells of, at least.
pub const LOOK: u64 = 60;

/// Seconds after which a runner without a registration has had the time to end.
const GONE: u64 = 30;

/// Seconds from SIGINT, upon which a runner has its job end and tells GitHub (for which it needs 30), to SIGKILL.
pub const GENTLE: u64 = 60;

/// Seconds that a scale set has to say how a job ended whose container has: its messages can be late.
pub const RESULT: u64 = 120;

/// The same, where everything ends.
const RESULT_AT_END: u64 = 15;

/// What the supervisor wants of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// A runner.
    Start,
    /// No new runner; one that is there may stay.
    Keep,
    /// No new job: a runner without one goes.
    Drain,
    /// No runner, and no job either.
    Stop,
}

/// A container of the slot, as Podman has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Podman's id.
    pub id: String,
    /// The runner that it was made for.
    pub runner: String,
    /// Its state.
    pub state: State,
    /// The id of the image that it was made of.
    pub image: String,
}

/// A container's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Never started.
    Created,
    /// Running, since then (seconds since 1970).
    Running(u64),
    /// Ended with that code, at that time.
    Exited(i32, u64),
    /// Being changed by somebody: nothing can be done now.
    Changing,
}

/// What Podman has of a slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its containers.
    pub containers: Vec<Container>,
    /// Runners of which there is a volume.
    pub leftovers: BTreeSet<String>,
}

/// A registration at GitHub, as it was last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Presence {
    /// Not read yet.
    #[default]
    Unread,
    /// There.
    There {
        /// GitHub's number for it.
        id: u64,
        /// The runner is connected.
        online: bool,
        /// It runs a job.
        busy: bool,
    },
    /// Not there.
    Gone,
}

/// A registration and when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registration {
    /// What was read.
    pub presence: Presence,
    /// When; seconds since 1970.
    pub read: u64,
    /// When it is to be read again at the earliest.
    pub again: u64,
}

impl Registration {
    fn fresh(&self, now: u64) -> bool {
        self.presence != Presence::Unread && now.saturating_sub(self.read) < FRESH
    }
}

/// What is known of a runner's job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Job {
    /// None that is known of.
    #[default]
    None,
    /// Running, since then.
    Running(u64),
    /// Ended so, at that time, as the scale set said.
    Done(Verdict, u64),
}

/// The runner that a slot has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runner {
    /// Its name, at GitHub and in Podman.
    pub name: String,
    /// When it was registered, or adopted.
    pub since: u64,
    /// Its volumes are there.
    pub prepared: bool,
    /// Its container is there, or was.
    pub created: bool,
    /// When it was told to end.
    pub interrupted: Option<u64>,
    /// It was ended by us.
    pub killed: bool,
    /// Its registration was removed by us.
    pub withdrawn: bool,
    /// The daemon refused the scopes of its job.
    pub refused: bool,
    /// Its registration.
    pub registration: Registration,
    /// It was connected once.
    pub met: bool,
    /// Its job.
    pub job: Job,
}

/// How long things may take, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// From a container's start to its runner's connection.
    pub registration: u64,
    /// A job.
    pub job: u64,
    /// Between two readings of a registration.
    pub look: u64,
    /// That a runner waits for a job, before another takes its place.
    pub idle: u64,
}

/// What is known of a slot beside what Podman has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// What is wanted.
    pub mode: Mode,
    /// Bounds.
    pub bounds: Bounds,
    /// A scale set's messages tell of jobs: nothing has to be asked for.
    pub told: bool,
    /// The runner that it has.
    pub runner: Option<Runner>,
    /// Registrations of earlier runners that may be there still.
    pub stale: BTreeMap<String, Registration>,
    /// The containers whose verdict was given.
    pub judged: BTreeSet<String>,
    /// GitHub is not to be asked before then; what needs nothing of it goes on.
    pub ask_again: u64,
}

/// The next step of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Nothing, until something changes, or then.
    Rest(Option<u64>),
    /// Ask GitHub for a registration.
    Register,
    /// Make the volumes.
    Prepare,
    /// Create the container.
    Create,
    /// Start this container.
    Start(String),
    /// Tell this container to end.
    Interrupt(String),
    /// End this container now.
    Kill(String),
    /// Tell the daemon how the work in this container ended.
    Judge(String, Verdict),
    /// Remove this container.
    Remove(String),
    /// Remove this runner's volumes.
    Clear(String),
    /// Read this runner's registration.
    Look(String),
    /// Remove this registration of a runner.
    Deregister(String, u64),
    /// Give the runner up: only its registration is left.
    Forget,
}

/// Whether the exit code of the runner's listener speaks of a job: 100 and its TaskResult, where
/// ACTIONS_RUNNER_RETURN_JOB_RESULT_FOR_HOSTED is set (actions/runner, TaskResultUtil.cs). Others speak of the runner.
#[must_use]
pub const fn is_result(code: i32) -> bool {
    matches!(code, 100..=105)
}

/// What it says of the job.
#[must_use]
pub const fn verdict_of(code: i32) -> Verdict {
    match code {
        100 | 101 => Verdict::Success,
        _ if is_result(code) => Verdict::Failure,
        _ => Verdict::Unknown,
    }
}

impl Action {
    /// Whether GitHub is asked.
    #[must_use]
    pub const fn asks(&self) -> bool {
        matches!(self, Self::Register | Self::Look(_) | Self::Deregister(..))
    }
}

/// The next step.
#[must_use]
pub fn decide(slot: &Slot, seen: &Seen, now: u64) -> Action {
    let mut rest = None;
    let mut later = |at: Option<u64>| {
        if let Some(at) = at {
            rest = Some(rest.map_or(at, |rest: u64| rest.min(at)));
        }
    };
    let may_ask = now >= slot.ask_again;
    for container in &seen.containers {
        match of_container(slot, container, now) {
            Action::Rest(at) => later(at),
            action if action.asks() && !may_ask => later(Some(slot.ask_again)),
            action => return action,
        }
    }
    let current = slot.runner.as_ref().map(|runner| &runner.name);
    let has_container = |name: &String| seen.containers.iter().any(|c| c.runner == *name);
    let left = seen.leftovers.iter();
    if let Some(name) = left
        .filter(|name| Some(*name) != current)
        .find(|name| !has_container(name))
    {
        return Action::Clear(name.clone());
    }
    for (name, registration) in &slot.stale {
        match of_stale(registration, has_container(name), now) {
            Stale::Later(at) => later(Some(at)),
            _ if !may_ask => later(Some(slot.ask_again)),
            Stale::Look => return Action::Look(name.clone()),
            Stale::Deregister(id) => return Action::Deregister(name.clone(), id),
        }
    }
    if !seen.containers.is_empty() {
        return Action::Rest(rest);
    }
    match &slot.runner {
        // Somebody removed its container; or it waited for one until its registration was no use.
        Some(runner) if runner.created || now >= runner.since + slot.bounds.registration => {
            Action::Forget
        }
        Some(_) if slot.mode >= Mode::Drain => Action::Forget,
        Some(runner) if !runner.prepared => Action::Prepare,
        Some(_) => Action::Create,
        None if slot.mode == Mode::Start && may_ask => Action::Register,
        None if slot.mode == Mode::Start => Action::Rest(Some(slot.ask_again)),
        None => Action::Rest(rest),
    }
}

fn of_container(slot: &Slot, container: &Container, now: u64) -> Action {
    let id = || container.id.clone();
    let runner = slot.runner.as_ref();
    let runner = runner.filter(|runner| runner.name == container.runner);
    match container.state {
        State::Changing => Action::Rest(Some(now + 1)),
        // Only the process that made it knows that all of it is there.
        State::Created => match runner {
            Some(_) if slot.mode < Mode::Drain => Action::Start(id()),
            _ => Action::Remove(id()),
        },
        State::Running(since) => match runner {
            Some(runner) => of_running(slot, runner, id(), since, now),
            // Two of one slot: the one that is not the slot's goes.
            None => Action::Kill(id()),
        },
        State::Exited(..) if slot.judged.contains(&container.id) => Action::Remove(id()),
        State::Exited(code, at) => match runner {
            Some(runner) => of_ended(slot, runner, id(), code, at, now),
            None => Action::Judge(id(), verdict_of(code)),
        },
    }
}

fn of_ended(slot: &Slot, runner: &Runner, id: String, code: i32, at: u64, now: u64) -> Action {
    let told_by = if slot.mode == Mode::Stop {
        at + RESULT_AT_END
    } else {
        at + RESULT
    };
    let verdict = match runner.job {
        // Whatever it made of them, nobody knows which caches it was given.
        _ if runner.refused => Verdict::Failure,
        // It may have been told of while the job still ran; what the runner says of its failure is later.
        Job::Done(Verdict::Success, _) if verdict_of(code) == Verdict::Failure => Verdict::Failure,
        // A result that was there when we ended it is the job's.
        Job::Done(verdict, _) => verdict,
        _ if runner.killed => Verdict::Failure,
        Job::Running(_) if slot.told && now < told_by => return Action::Rest(Some(told_by)),
        Job::None if slot.told && is_result(code) && now < told_by => {
            return Action::Rest(Some(told_by));
        }
        _ if runner.interrupted.is_some() && !is_result(code) => Verdict::Failure,
        _ => verdict_of(code),
    };
    Action::Judge(id, verdict)
}

fn of_running(slot: &Slot, runner: &Runner, id: String, since: u64, now: u64) -> Action {
    let registration = &runner.registration;
    let look = || Action::Look(runner.name.clone());
    if runner.refused {
        return Action::Kill(id);
    }
    let gently = |id| match runner.interrupted {
        None => Action::Interrupt(id),
        Some(at) if now < at + GENTLE => Action::Rest(Some(at + GENTLE)),
        Some(_) => Action::Kill(id),
    };
    // One whose registration is gone may have had a job a moment ago: then its exit code says how that ended.
    if slot.mode == Mode::Stop || runner.withdrawn {
        return gently(id);
    }
    let idle = runner.job == Job::None;
    let end = match runner.job {
        Job::Running(since) => since + slot.bounds.job,
        Job::Done(_, at) => return of_done(runner, id, at, now),
        Job::None if runner.met => since + slot.bounds.idle,
        Job::None => since + slot.bounds.registration,
    };
    let overdue = now >= end;
    if overdue && !idle {
        return gently(id);
    }
    let leaves = overdue || slot.mode == Mode::Drain;
    if idle && leaves {
        if !registration.fresh(now) {
            return look();
        }
        let unwanted = slot.mode == Mode::Drain || runner.met;
        match registration.presence {
            Presence::There { busy: true, .. } => {}
            // GitHub refuses to remove one that has got a job since.
            Presence::There { id, online, .. } if !online || unwanted => {
                return Action::Deregister(runner.name.clone(), id);
            }
            // It has had its job, and is about to end; or it will never have one.
            Presence::Gone if overdue && !runner.met => return Action::Kill(id),
            _ => {}
        }
    }
    let unread = registration.presence == Presence::Unread;
    if idle && (unread || !slot.told || !runner.met || leaves) {
        if now >= registration.again {
            return look();
        }
        let end = if overdue { u64::MAX } else { end };
        return Action::Rest(Some(registration.again.min(end)));
    }
    // A job may be gone before it has begun, and its runner waits for the next.
    if !idle && !slot.told {
        if now >= registration.again {
            return look();
        }
        return Action::Rest(Some(registration.again.min(end)));
    }
    // Not to be asked what a scale set tells.
    Action::Rest(Some(end))
}

/// A runner whose job has ended, as the scale set said at `at`. It ends by itself; one that goes on is asked for, as its job may
/// go on, too (actions/runner, issue 4492), and what hangs is not waited for.
fn of_done(runner: &Runner, id: String, at: u64, now: u64) -> Action {
    let registration = &runner.registration;
    let ask = at + FRESH;
    if now < ask {
        Action::Rest(Some(ask))
    } else if registration.presence == Presence::Unread || registration.read < ask {
        Action::Look(runner.name.clone())
    } else if let Presence::There { busy: true, .. } = registration.presence {
        // Who took it for ended is told so, and may not know yet.
        match registration.read + FRESH {
            again if now < again => Action::Rest(Some(again)),
            _ => Action::Look(runner.name.clone()),
        }
    } else if now < at + LOOK {
        Action::Rest(Some(at + LOOK))
    } else {
        Action::Kill(id)
    }
}

enum Stale {
    Look,
    Deregister(u64),
    Later(u64),
}

fn of_stale(registration: &Registration, has_container: bool, now: u64) -> Stale {
    match registration.presence {
        Presence::There {
            id,
            online: false,
            busy: false,
        } if registration.fresh(now) && !has_container => Stale::Deregister(id),
        _ if now >= registration.again => Stale::Look,
        _ => Stale::Later(registration.again),
    }
}

impl Runner {
    /// It has had its job, or will have none.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.withdrawn || matches!(self.job, Job::Done(..))
    }
}

impl Slot {
    /// An empty slot.
    #[must_use]
    pub const fn new(bounds: Bounds, told: bool) -> Self {
        Self {
            mode: Mode::Keep,
            bounds,
            told,
            runner: None,
            stale: BTreeMap::new(),
            judged: BTreeSet::new(),
            ask_again: 0,
        }
    }

    /// Whether its runner takes no job any more, and has none.
    #[must_use]
    pub fn ends(&self, seen: &Seen) -> bool {
        let Some(runner) = &self.runner else {
            return false;
        };
        let had_one = seen.containers.iter().any(|c| match c.state {
            State::Exited(code, _) => {
                c.runner == runner.name && (runner.job != Job::None || is_result(code))
            }
            _ => false,
        });
        runner.is_over() || had_one
    }

    /// The runner of that name, if it is the slot's.
    pub fn runner_mut(&mut self, name: &str) -> Option<&mut Runner> {
        self.runner.as_mut().filter(|runner| runner.name == name)
    }

    /// GitHub gave a registration.
    pub fn registered(&mut self, name: &str, now: u64) {
        self.runner = Some(Runner {
            name: name.to_owned(),
            since: now,
            prepared: false,
            created: false,
            interrupted: None,
            killed: false,
            withdrawn: false,
            refused: false,
            registration: Registration {
                again: now + FRESH,
                ..Registration::default()
            },
            met: false,
            job: Job::None,
        });
    }

    /// Takes up what Podman has after a start: a runner that runs or has ended is the slot's, the first
    /// of several.
    pub fn adopt(&mut self, seen: &Seen, now: u64) {
        let begun = |c: &&Container| matches!(c.state, State::Running(_) | State::Exited(..));
        if let Some(container) = seen.containers.iter().find(begun) {
            self.registered(&container.runner, now);
            let runner = self.runner.as_mut().expect("just made");
            (runner.prepared, runner.created) = (true, true);
            runner.registration.again = now;
        }
        let names = seen.containers.iter().map(|c| &c.runner);
        for name in names.chain(&seen.leftovers) {
            if self.runner.as_ref().is_none_or(|own| own.name != *name) {
                self.stale.entry(name.clone()).or_default();
            }
        }
    }

    /// A registration that bears the slot's name was found at GitHub.
    pub fn found(&mut self, name: &str) {
        if self.runner.as_ref().is_none_or(|own| own.name != name) {
            self.stale.entry(name.to_owned()).or_default();
        }
    }

    /// A registration was read.
    pub fn looked(&mut self, name: &str, presence: Presence, now: u64) {
        let (look, told) = (self.bounds.look, self.told);
        if let Some(runner) = self.runner_mut(name) {
            let gone = presence == Presence::Gone;
            // Twice, a while apart: its runner would have ended by now.
            runner.withdrawn |= gone
                && runner.registration.presence == Presence::Gone
                && now >= runner.registration.read + GONE;
            let waits = |presence| {
                matches!(
                    presence,
                    Presence::There {
                        online: true,
                        busy: false,
                        ..
                    }
                )
            };
            let last = runner.registration;
            if waits(presence) && waits(last.presence) && now >= last.read + GONE && !told {
                runner.job = Job::None;
            }
            runner.registration = Registration {
                presence,
                read: now,
                again: now + if gone { GONE } else { look },
            };
            if let Presence::There { online, busy, .. } = presence {
                runner.met |= online || busy;
                if !online && !busy {
                    // Not connected yet: it takes some seconds.
                    runner.registration.again = now + FRESH;
                }
                // One that had ended, as was told, goes on.
                if busy && !matches!(runner.job, Job::Running(_)) {
                    runner.job = Job::Running(now);
                }
            }
        } else if presence == Presence::Gone {
            self.stale.remove(name);
        } else if let Some(stale) = self.stale.get_mut(name) {
            *stale = Registration {
                presence,
                read: now,
                again: now + look,
            };
        }
    }

    /// A registration was removed, or was not there.
    pub fn deregistered(&mut self, name: &str) {
        self.stale.remove(name);
        if let Some(runner) = self.runner_mut(name) {
            runner.withdrawn = true;
            runner.registration.presence = Presence::Gone;
        }
    }

    /// A container was removed: its runner is no more.
    pub fn removed(&mut self, container: &Container, now: u64) {
        self.judged.remove(&container.id);
        if self.runner_mut(&container.runner).is_some() {
            self.forget(now);
        }
    }

    /// Gives the runner up. Its registration is looked after.
    pub fn forget(&mut self, now: u64) {
        if let Some(runner) = self.runner.take()
            && !runner.withdrawn
        {
            // GitHub removes it by itself once its job is done, in a moment.
            let registration = Registration {
                again: now + if runner.met { FRESH } else { 0 },
                ..Registration::default()
            };
            self.stale.insert(runner.name, registration);
        }
    }

    /// Nothing is left of it anywhere.
    #[must_use]
    pub fn is_empty(&self, seen: &Seen) -> bool {
        self.runner.is_none()
            && self.stale.is_empty()
            && seen.containers.is_empty()
            && seen.leftovers.is_empty()
    }
}

#[cfg(test)]
mod tests;
