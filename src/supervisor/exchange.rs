// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a slot's task and its pool tell each other: whether the slot is to have a runner, and how it is.

use super::config::Size;
use super::jobs::{Admission, Jobs};
use super::pool::{Board, Orders, SlotView, runner_in};
use super::slot::{Job, Mode, Runner, Seen, State};
use super::task::Task;

/// Seconds for which a runner has no job and is more than wanted, before it goes.
const SPARE: u64 = 60;

impl Task<'_> {
    /// Why an empty slot has no runner.
    fn reason(&self, board: &Board, orders: Orders, now: u64) -> String {
        let set = matches!(self.worker.pool.size, Size::ScaleSet(_));
        let reason = match orders {
            Orders::Drain | Orders::Stop => "the supervisor ends",
            Orders::Pause => "no new jobs are taken: `runners resume` ends that",
            Orders::Run if self.number >= self.worker.pool.slots() => {
                "the configuration has no such slot any more"
            }
            Orders::Run => {
                let problem = board.image_problem.clone();
                if let Some(problem) = problem.or_else(|| board.backoff.problem(now)) {
                    return problem;
                }
                match board.set {
                    None if set => "the scale set is not ready yet",
                    _ if board.live.len() >= board.wanted => "no job waits for it",
                    _ if board.image.is_empty() => "the image is looked for",
                    _ => "it waits until another one is connected",
                }
            }
        };
        reason.to_owned()
    }

    /// Takes what the pool has for the slot, and gives what the slot has for the pool. When that is to be done again, if that is known.
    pub(super) fn share(&mut self, seen: &Seen, now: u64) -> Option<u64> {
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
        let current = slot.runner.as_ref().map(|runner| runner.name.clone());
        let has = |name: &str| {
            seen.containers.iter().any(|c| c.runner == name) || current.as_deref() == Some(name)
        };
        (board.jobs).keep(|name| runner_in(own, name).is_none() || has(name));
        if let Some(runner) = &mut self.slot.runner
            && let Some(told) = board.jobs.get(&runner.name)
        {
            runner.job = told.state();
            runner.met = true;
            runner.refused = told.admission == Admission::Refused;
        }
        if let Some(runner) = &self.slot.runner
            && runner.met
            && board.backoff.connected(runner.since)
        {
            self.worker.poke();
        }
        let is_more = self.number >= self.worker.pool.slots();
        let ends = self.slot.ends(seen);
        if self.slot.runner.is_none() && seen.containers.is_empty() || ends {
            board.live.remove(&self.number);
        } else if !is_more {
            board.live.insert(self.number);
        }
        board
            .views
            .insert(self.number, self.view(seen, &board.jobs, now));
        let wanted = self.worker.wanted(board, now);
        let is_spare = self.is_spare(board, wanted);
        self.spare = is_spare.then(|| self.spare.unwrap_or(now));
        let mut again = self.spare.map(|since| since + SPARE);
        let is_old =
            |image: &str| !image.is_empty() && seen.containers.iter().any(|c| c.image != image);
        self.slot.mode = match orders {
            Orders::Stop => Mode::Stop,
            Orders::Drain | Orders::Pause => Mode::Drain,
            Orders::Run if is_more => Mode::Drain,
            // Of an image that is another one now.
            Orders::Run if is_old(&board.image) => Mode::Drain,
            Orders::Run if again.is_some_and(|at| now >= at) => Mode::Drain,
            Orders::Run if self.is_doubted(board) => Mode::Drain,
            Orders::Run if ends => Mode::Keep,
            Orders::Run if board.live.contains(&self.number) => Mode::Start,
            Orders::Run if board.live.len() < wanted => {
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
        board.left.remove(&self.number);
        if self.slot.is_empty(seen) {
            board.empty.insert(self.number);
        } else {
            board.empty.remove(&self.number);
        }
        let asks = now < self.slot.ask_again;
        let problem = self.problem.clone().filter(|_| asks);
        let is_empty = board.views[&self.number].state == "empty";
        let is_off = is_empty && !board.live.contains(&self.number);
        let problem = problem.or_else(|| is_off.then(|| self.reason(board, orders, now)));
        let view = board.views.get_mut(&self.number).expect("just shown");
        view.problem = problem;
        again
    }

    /// Whether the slot's runner has no job, and is one of those that are more than wanted: the last slots' are.
    fn is_spare(&self, board: &Board, wanted: usize) -> bool {
        let idle = |number: &usize| {
            let view = board.views.get(number);
            view.is_some_and(|view| view.state == "idle") && board.live.contains(number)
        };
        let more = board.live.len().saturating_sub(wanted);
        let later = board.live.range(self.number + 1..);
        idle(&self.number) && later.filter(|number| idle(number)).count() < more
    }

    /// Whether the slot's runner waited in vain for a job that was said to wait.
    fn is_doubted(&self, board: &Board) -> bool {
        let view = &board.views[&self.number];
        let set = matches!(self.worker.pool.size, Size::ScaleSet(_));
        set && view.state == "idle" && board.demand.doubts(view.since)
    }

    fn view(&self, seen: &Seen, jobs: &Jobs, now: u64) -> SlotView {
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
            // It ends, by itself or by us.
            (Some(runner), Some(State::Running(_))) if runner.is_over() => ("ending", now),
            (Some(Runner { met: true, .. }), Some(State::Running(at))) => ("idle", at),
            (_, Some(State::Running(at))) => ("starting", at),
            (_, Some(State::Exited(_, at))) => ("ending", at),
            (Some(runner), _) => ("starting", runner.since),
            (None, Some(_)) => ("ending", now),
            (None, None) => ("empty", now),
        };
        let name = container.map(|c| &c.runner).or(runner.map(|r| &r.name));
        let job = name.and_then(|name| jobs.get(name));
        let path = job.map(|job| job.path()).unwrap_or_default();
        SlotView {
            state,
            runner: name.cloned().unwrap_or_default(),
            container: container.map(|c| c.id.clone()).unwrap_or_default(),
            job: job.map(|job| job.what()).unwrap_or_default(),
            url: if path.is_empty() {
                path
            } else {
                format!("{}{path}", self.worker.server())
            },
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
}
