// SPDX-License-Identifier: Apache-2.0 OR MIT
use proptest::prelude::*;

use super::*;
use crate::supervisor::backoff::Backoff;

const BOUNDS: Bounds = Bounds {
    registration: 300,
    job: 3600,
    look: LOOK,
    idle: 43_200,
};
const NOW: u64 = 1_000_000;

fn container(runner: &str, state: State) -> Container {
    Container {
        id: format!("c-{runner}"),
        runner: runner.into(),
        state,
        image: String::new(),
    }
}

fn seen(containers: &[Container], leftovers: &[&str]) -> Seen {
    Seen {
        containers: containers.to_vec(),
        leftovers: leftovers.iter().map(|&name| name.into()).collect(),
    }
}

fn there(online: bool, busy: bool) -> Presence {
    Presence::There {
        id: 7,
        online,
        busy,
    }
}

/// A slot whose runner `a` was created, and then what `change` makes of it.
fn slot(mode: Mode, change: impl FnOnce(&mut Slot)) -> Slot {
    let mut slot = Slot::new(BOUNDS, false);
    slot.mode = mode;
    slot.registered("a", NOW - 100);
    let runner = slot.runner.as_mut().unwrap();
    (runner.prepared, runner.created) = (true, true);
    change(&mut slot);
    slot
}

fn empty(mode: Mode) -> Slot {
    Slot {
        mode,
        ..Slot::new(BOUNDS, false)
    }
}

fn is(job: Job) -> impl Fn(&mut Slot) {
    move |slot| slot.runner.as_mut().unwrap().job = job
}

fn interrupted(ago: u64) -> impl Fn(&mut Slot) {
    move |slot| slot.runner.as_mut().unwrap().interrupted = Some(NOW - ago)
}

fn read(presence: Presence, ago: u64) -> impl Fn(&mut Slot) {
    move |slot| slot.looked("a", presence, NOW - ago)
}

#[test]
fn steps() {
    use Action::*;
    use Mode::{Drain, Keep, Start as On, Stop};
    let id = || "c-a".to_owned();
    let name = || "a".to_owned();
    let none = || seen(&[], &[]);
    let with = |state| seen(&[container("a", state)], &["a"]);
    let running = || with(State::Running(NOW - 90));
    let idle = || with(State::Running(NOW - 43_200));
    let exited = |code, ago| with(State::Exited(code, NOW - ago));
    let told = |job| {
        move |slot: &mut Slot| {
            slot.told = true;
            is(job)(slot);
        }
    };
    #[rustfmt::skip]
    let table: Vec<(&str, Slot, Seen, Action)> = vec![
        ("nothing, wanted", empty(On), none(), Register),
        ("nothing, not wanted", empty(Keep), none(), Rest(None)),
        ("registered", slot(On, |s| s.registered("a", NOW)), none(), Prepare),
        ("registered, still kept", slot(Keep, |s| s.registered("a", NOW)), none(), Prepare),
        ("registered, drained", slot(Drain, |s| s.registered("a", NOW)), none(), Forget),
        ("registered too long ago", slot(On, |s| s.registered("a", NOW - 300)), none(), Forget),
        ("prepared", slot(On, |s| s.runner.as_mut().unwrap().created = false), seen(&[], &["a"]), Create),
        ("its container was removed by hand", slot(On, |_| {}), seen(&[], &["a"]), Forget),
        ("created", slot(On, |_| {}), with(State::Created), Start(id())),
        ("created, drained", slot(Drain, |_| {}), with(State::Created), Remove(id())),
        ("created before a crash", empty(On), with(State::Created), Remove(id())),
        ("what a crash left", empty(On), seen(&[], &["old"]), Clear("old".into())),
        ("somebody changes it", slot(On, |_| {}), with(State::Changing), Rest(Some(NOW + 1))),

        ("just started", slot(On, |s| s.registered("a", NOW)), running(), Rest(Some(NOW + FRESH))),
        ("started a while ago", slot(On, |_| {}), running(), Look(name())),
        ("connected, idle", slot(On, read(there(true, false), 5)), running(), Rest(Some(NOW + LOOK - 5))),
        ("connected, idle, read a while ago", slot(On, read(there(true, false), LOOK)), running(), Look(name())),
        ("a scale set tells", slot(On, |s| { s.told = true; read(there(true, false), LOOK)(s); }), running(), Rest(Some(NOW - 90 + 43_200))),
        ("idle for long, not read since", slot(On, |s| { s.told = true; read(there(true, false), 11)(s); }), idle(), Look(name())),
        ("idle for long", slot(On, |s| { s.told = true; read(there(true, false), 1)(s); }), idle(), Deregister(name(), 7)),
        ("idle for long, without a scale set", slot(On, read(there(true, false), 1)), idle(), Deregister(name(), 7)),
        ("idle for long, and kept", slot(Keep, read(there(true, false), 1)), idle(), Deregister(name(), 7)),
        ("idle for long, and it got a job", slot(On, |s| { s.told = true; read(there(true, true), 1)(s); }), idle(), Rest(Some(NOW - 1 + 3600))),
        ("idle for long, and gone", slot(On, |s| { read(there(true, false), 70)(s); read(Presence::Gone, 1)(s); }), idle(), Rest(Some(NOW - 1 + GONE))),
        ("idle for long, and gone for a while", slot(On, |s| { read(there(true, false), 70)(s); read(Presence::Gone, 31)(s); read(Presence::Gone, 1)(s); }), idle(), Interrupt(id())),
        ("idle for long, GitHub is left alone", slot(On, |s| { s.ask_again = NOW + 9; read(there(true, false), 1)(s); }), idle(), Rest(Some(NOW + 9))),
        ("not connected in time, not read since", slot(On, read(there(false, false), 11)), with(State::Running(NOW - 300)), Look(name())),
        ("not connected in time", slot(On, read(there(false, false), 1)), with(State::Running(NOW - 300)), Deregister(name(), 7)),
        ("not connected in time, withdrawn", slot(On, |s| s.deregistered("a")), with(State::Running(NOW - 300)), Interrupt(id())),
        ("never registered", slot(On, read(Presence::Gone, 1)), with(State::Running(NOW - 300)), Kill(id())),
        ("busy", slot(On, read(there(true, true), 1)), running(), Rest(Some(NOW - 1 + LOOK))),
        ("busy, read a while ago", slot(On, read(there(true, true), LOOK)), running(), Look(name())),
        ("busy, read a while ago, and a scale set tells", slot(On, |s| { s.told = true; read(there(true, true), LOOK)(s); }), running(), Rest(Some(NOW - LOOK + 3600))),
        ("its job is gone", slot(Drain, |s| { read(there(true, true), 99)(s); read(there(true, false), 31)(s); read(there(true, false), 1)(s); }), running(), Deregister(name(), 7)),
        ("its job may be gone", slot(Drain, |s| { read(there(true, true), 99)(s); read(there(true, false), 30)(s); read(there(true, false), 1)(s); }), running(), Rest(Some(NOW - 1 + LOOK))),
        ("busy too long", slot(On, is(Job::Running(NOW - 3600))), running(), Interrupt(id())),
        ("busy too long, told so", slot(On, |s| { is(Job::Running(NOW - 3600))(s); interrupted(1)(s); }), running(), Rest(Some(NOW - 1 + GENTLE))),
        ("busy too long, told in vain", slot(On, |s| { is(Job::Running(NOW - 3700))(s); interrupted(GENTLE)(s); }), running(), Kill(id())),
        ("its scopes were refused", slot(On, |s| { is(Job::Running(NOW))(s); s.runner.as_mut().unwrap().refused = true; }), running(), Kill(id())),
        ("done, and ends", slot(On, is(Job::Done(Verdict::Success, NOW - 1))), running(), Rest(Some(NOW - 1 + FRESH))),
        ("done, they say, and it runs", slot(On, is(Job::Done(Verdict::Success, NOW - FRESH))), running(), Look(name())),
        ("done, they say, and it runs; read before", slot(On, |s| { read(there(true, false), 11)(s); is(Job::Done(Verdict::Success, NOW - 11))(s); }), running(), Look(name())),
        ("done, and idle", slot(On, |s| { read(there(true, false), 1)(s); is(Job::Done(Verdict::Success, NOW - 11))(s); }), running(), Rest(Some(NOW - 11 + LOOK))),
        ("done, they say, and it is busy, which is not noted yet", slot(On, |s| { read(there(true, true), 1)(s); is(Job::Done(Verdict::Success, NOW - LOOK))(s); }), running(), Rest(Some(NOW - 1 + FRESH))),
        ("done, and hangs, nobody asked", slot(On, is(Job::Done(Verdict::Success, NOW - LOOK))), running(), Look(name())),
        ("done, and hangs", slot(On, |s| { read(there(true, false), 1)(s); is(Job::Done(Verdict::Success, NOW - LOOK))(s); }), running(), Kill(id())),
        ("done, they say, and it is busy", slot(On, |s| { is(Job::Done(Verdict::Success, NOW - LOOK))(s); read(there(true, true), 1)(s); }), running(), Rest(Some(NOW - 1 + LOOK))),
        ("two run", slot(On, read(there(true, true), 1)),
            seen(&[container("a", State::Running(NOW)), container("b", State::Running(NOW))], &["a", "b"]), Kill("c-b".into())),

        ("drain: idle, not read since", slot(Drain, read(there(true, false), 11)), running(), Look(name())),
        ("drain: idle", slot(Drain, read(there(true, false), 1)), running(), Deregister(name(), 7)),
        ("drain: withdrawn", slot(Drain, |s| s.deregistered("a")), running(), Interrupt(id())),
        ("drain: busy", slot(Drain, read(there(true, true), 1)), running(), Rest(Some(NOW - 1 + LOOK))),
        ("drain: busy, reads as offline", slot(Drain, |s| { read(there(true, true), 70)(s); read(there(false, false), 1)(s); }), running(), Rest(Some(NOW - 1 + FRESH))),
        ("stop: busy", slot(Stop, read(there(true, true), 1)), running(), Interrupt(id())),
        ("stop: told so", slot(Stop, |s| { read(there(true, true), 1)(s); interrupted(1)(s); }), running(), Rest(Some(NOW - 1 + GENTLE))),
        ("stop: told in vain", slot(Stop, |s| { read(there(true, true), 1)(s); interrupted(GENTLE)(s); }), running(), Kill(id())),
        ("stop: nobody has read whether it is busy", slot(Stop, |_| {}), running(), Interrupt(id())),
        ("stop: withdrawn", slot(Stop, |s| s.deregistered("a")), running(), Interrupt(id())),
        ("withdrawn, told in vain", slot(Drain, |s| { s.deregistered("a"); interrupted(GENTLE)(s); }), running(), Kill(id())),
        ("withdrawn a moment after its job", slot(Drain, |s| { s.deregistered("a"); interrupted(1)(s); }), exited(100, 0), Judge(id(), Verdict::Success)),

        ("succeeded", slot(On, |_| {}), exited(100, 0), Judge(id(), Verdict::Success)),
        ("failed", slot(On, |_| {}), exited(102, 0), Judge(id(), Verdict::Failure)),
        ("cancelled", slot(On, |_| {}), exited(103, 0), Judge(id(), Verdict::Failure)),
        ("killed from outside", slot(On, |_| {}), exited(137, 0), Judge(id(), Verdict::Unknown)),
        ("nobody knows", slot(On, |_| {}), exited(0, 0), Judge(id(), Verdict::Unknown)),
        ("to be tried again", slot(On, |_| {}), exited(2, 0), Judge(id(), Verdict::Unknown)),
        ("it crashed", slot(On, |_| {}), exited(134, 0), Judge(id(), Verdict::Unknown)),
        ("told to end", slot(On, interrupted(1)), exited(0, 0), Judge(id(), Verdict::Failure)),
        ("told to end just as it succeeded", slot(On, interrupted(1)), exited(100, 0), Judge(id(), Verdict::Success)),
        ("killed by us", slot(On, |s| s.runner.as_mut().unwrap().killed = true), exited(100, 0), Judge(id(), Verdict::Failure)),
        ("killed by us, when its result was known", slot(On, |s| { is(Job::Done(Verdict::Success, NOW - LOOK))(s); s.runner.as_mut().unwrap().killed = true; }), exited(137, 0), Judge(id(), Verdict::Success)),
        ("its scopes were refused, and it succeeded", slot(On, |s| { is(Job::Done(Verdict::Success, NOW))(s); s.runner.as_mut().unwrap().refused = true; }), exited(100, 0), Judge(id(), Verdict::Failure)),
        ("its scopes were refused, and nothing is told yet", slot(On, |s| { told(Job::Running(NOW))(s); s.runner.as_mut().unwrap().refused = true; }), exited(100, 0), Judge(id(), Verdict::Failure)),
        ("ended before a crash", empty(On), exited(100, 900), Judge(id(), Verdict::Success)),
        ("the scale set has not said yet", slot(On, told(Job::Running(NOW - 50))), exited(100, 1), Rest(Some(NOW - 1 + RESULT))),
        ("the scale set has not said for long", slot(On, told(Job::Running(NOW - 50))), exited(137, 119), Rest(Some(NOW + 1))),
        ("the scale set says nothing", slot(On, told(Job::Running(NOW - 50))), exited(102, 120), Judge(id(), Verdict::Failure)),
        ("the scale set has not even said that it began", slot(On, told(Job::None)), exited(100, 1), Rest(Some(NOW - 1 + RESULT))),
        ("the scale set says nothing of one that had none", slot(On, told(Job::None)), exited(2, 1), Judge(id(), Verdict::Unknown)),
        ("the scale set says success, and its runner that it failed", slot(On, told(Job::Done(Verdict::Success, NOW))), exited(102, 1), Judge(id(), Verdict::Failure)),
        ("the scale set says success, and its runner nothing", slot(On, told(Job::Done(Verdict::Success, NOW))), exited(0, 1), Judge(id(), Verdict::Success)),
        ("the scale set said", slot(On, told(Job::Done(Verdict::Failure, NOW))), exited(100, 1), Judge(id(), Verdict::Failure)),
        ("judged", slot(On, |s| { s.judged.insert("c-a".into()); }), exited(100, 1), Remove(id())),
        ("removed", empty(On), seen(&[], &["a"]), Clear(name())),

        ("an earlier registration", slot(On, |s| { s.runner = None; s.found("o"); }), none(), Look("o".into())),
        ("it is offline", slot(On, |s| { s.runner = None; s.found("o"); s.looked("o", there(false, false), NOW - 1); }), none(), Deregister("o".into(), 7)),
        ("it was offline a while ago", slot(On, |s| { s.runner = None; s.found("o"); s.looked("o", there(false, false), NOW - LOOK); }), none(), Look("o".into())),
        ("it is online", slot(Keep, |s| { s.runner = None; s.found("o"); s.looked("o", there(true, false), NOW - 1); }), none(), Rest(Some(NOW - 1 + LOOK))),
        ("it is offline and busy", slot(Keep, |s| { s.runner = None; s.found("o"); s.looked("o", there(false, true), NOW - 1); }), none(), Rest(Some(NOW - 1 + LOOK))),
        ("GitHub is left alone", slot(On, |s| { s.ask_again = NOW + 9; s.runner = None; s.found("o"); }), none(), Rest(Some(NOW + 9))),
        ("a job ends meanwhile", slot(On, |s| { s.ask_again = NOW + 9; s.found("o"); }), exited(100, 1), Judge(id(), Verdict::Success)),
        ("one is ended meanwhile", slot(Stop, |s| { s.ask_again = NOW + 9; read(there(true, true), 1)(s); }), running(), Interrupt(id())),
        ("one idles meanwhile", slot(Drain, |s| { s.ask_again = NOW + 9; read(there(true, false), 70)(s); }), running(), Rest(Some(NOW + 9))),
        ("one is prepared meanwhile", slot(On, |s| { s.ask_again = NOW + 9; s.found("o"); s.registered("a", NOW); }), none(), Prepare),
        ("it does not keep another from starting", slot(On, |s| { s.runner = None; s.found("o"); s.looked("o", there(true, true), NOW - 1); }), none(), Register),
    ];
    let wrong: Vec<_> = table
        .into_iter()
        .map(|(case, slot, seen, want)| (case, decide(&slot, &seen, NOW), want))
        .filter(|(_, is, want)| is != want)
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// GitHub's and Podman's sides, and the supervisor, which dies at times.
#[derive(Debug, Default)]
struct World {
    now: u64,
    serial: u64,
    containers: Vec<Container>,
    leftovers: BTreeSet<String>,
    /// Online, busy.
    runners: BTreeMap<String, (bool, bool)>,
    /// Containers whose runner has begun a job; it has at most one.
    jobs: BTreeMap<String, u32>,
    judged: BTreeMap<String, u32>,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Pass(u64),
    Connect,
    Begin,
    End,
    Die,
    VanishContainer,
    Crash,
    Fail,
    Mode(u8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..400u64).prop_map(Event::Pass),
        3 => Just(Event::Connect),
        3 => Just(Event::Begin),
        3 => Just(Event::End),
        1 => Just(Event::Die),
        1 => Just(Event::VanishContainer),
        2 => Just(Event::Crash),
        2 => Just(Event::Fail),
        2 => (0..4u8).prop_map(Event::Mode),
    ]
}

impl World {
    fn seen(&self) -> Seen {
        Seen {
            containers: self.containers.clone(),
            leftovers: self.leftovers.clone(),
        }
    }

    fn restart(&self, mode: Mode) -> Slot {
        let mut slot = empty(mode);
        slot.adopt(&self.seen(), self.now);
        for name in self.runners.keys() {
            slot.found(name);
        }
        slot
    }

    fn happen(&mut self, event: Event) {
        let running = self.containers.iter_mut();
        let running = running.filter(|c| matches!(c.state, State::Running(_)));
        let first = running.into_iter().next();
        match event {
            Event::Pass(seconds) => self.now += seconds,
            Event::Connect => {
                if let Some(c) = first
                    && let Some(runner) = self.runners.get_mut(&c.runner)
                {
                    runner.0 = true;
                }
            }
            Event::Begin => {
                if let Some(c) = first
                    && let Some(runner) = self.runners.get_mut(&c.runner)
                    && runner.0
                    && !runner.1
                {
                    runner.1 = true;
                    *self.jobs.entry(c.runner.clone()).or_default() += 1;
                }
            }
            Event::End | Event::Die => {
                if let Some(c) = first
                    && let Some(runner) = self.runners.get_mut(&c.runner)
                {
                    let ended = matches!(event, Event::End);
                    if ended && !runner.1 {
                        return;
                    }
                    c.state = State::Exited(if ended { 100 } else { 137 }, self.now);
                    if ended {
                        self.runners.remove(&c.runner.clone());
                    } else {
                        runner.0 = false;
                    }
                }
            }
            Event::VanishContainer => drop(self.containers.pop()),
            Event::Crash | Event::Fail | Event::Mode(_) => {}
        }
    }

    /// Does a step, as the shell does; `false` where there is none to do now.
    fn step(&mut self, slot: &mut Slot, fails: bool) -> bool {
        let seen = self.seen();
        let action = decide(slot, &seen, self.now);
        let now = self.now;
        assert!(!action.asks() || now >= slot.ask_again, "GitHub is asked");
        let find = |id: &String| {
            let at = seen.containers.iter().position(|c| c.id == *id);
            at.expect("the container is there")
        };
        if let Action::Create | Action::Register | Action::Prepare = action {
            assert!(seen.containers.is_empty(), "{action:?}: two for one slot");
        }
        if let Action::Start(_) = action {
            let runs = |c: &Container| matches!(c.state, State::Running(_));
            assert!(!seen.containers.iter().any(runs), "two run");
        }
        if let Action::Deregister(name, _) = &action {
            let own = slot.runner.as_ref().filter(|r| r.name == *name);
            let registration = own.map_or_else(|| slot.stale[name], |r| r.registration);
            assert!(matches!(
                registration.presence,
                Presence::There { busy: false, .. }
            ));
            assert!(registration.fresh(now), "not read again");
        }
        if let Action::Kill(id) = &action {
            let runner = &seen.containers[find(id)].runner;
            let busy = self.runners.get(runner).is_some_and(|r| r.1);
            let own = slot.runner.as_ref().filter(|r| r.name == *runner);
            let overdue = own.is_none_or(|r| matches!(r.job, Job::Running(at) if now >= at + 3600));
            assert!(
                !busy || overdue || slot.mode == Mode::Stop,
                "a job is killed: {slot:?}"
            );
            let told = |r: &Runner| r.interrupted.is_some_and(|at| now >= at + GENTLE);
            assert!(
                !busy || own.is_none_or(told),
                "a job is killed outright: {slot:?}"
            );
        }
        if fails {
            if action.asks() {
                slot.ask_again = now + 60;
            }
            return !matches!(action, Action::Rest(_));
        }
        match action {
            Action::Rest(at) => {
                assert!(
                    at.is_none_or(|at| at > now),
                    "it rests until {at:?}, now {now}"
                );
                return false;
            }
            Action::Register => {
                self.serial += 1;
                let name = format!("r{}", self.serial);
                self.runners.insert(name.clone(), (false, false));
                slot.registered(&name, now);
            }
            Action::Prepare => {
                let runner = slot.runner.as_mut().unwrap();
                self.leftovers.insert(runner.name.clone());
                runner.prepared = true;
            }
            Action::Create => {
                let runner = slot.runner.as_mut().unwrap();
                self.containers
                    .push(container(&runner.name, State::Created));
                runner.created = true;
            }
            Action::Start(id) => self.containers[find(&id)].state = State::Running(now),
            Action::Interrupt(_) => slot.runner.as_mut().unwrap().interrupted = Some(now),
            Action::Kill(id) => {
                let c = &mut self.containers[find(&id)];
                c.state = State::Exited(137, now);
                if let Some(runner) = self.runners.get_mut(&c.runner) {
                    runner.0 = false;
                }
                if let Some(runner) = slot.runner_mut(&c.runner.clone()) {
                    runner.killed = true;
                }
            }
            Action::Judge(id, _) => {
                *self.judged.entry(id.clone()).or_default() += 1;
                slot.judged.insert(id);
            }
            Action::Remove(id) => {
                let c = self.containers.remove(find(&id));
                slot.removed(&c, now);
            }
            Action::Clear(name) => drop(self.leftovers.remove(&name)),
            Action::Look(name) => {
                let presence = match self.runners.get(&name) {
                    Some(&(online, busy)) => there(online, busy),
                    None => Presence::Gone,
                };
                slot.looked(&name, presence, now);
            }
            Action::Deregister(name, _) => {
                if self.runners.get(&name).is_some_and(|runner| runner.1) {
                    slot.looked(&name, there(true, true), now);
                } else {
                    self.runners.remove(&name);
                    slot.deregistered(&name);
                }
            }
            Action::Forget => slot.forget(now),
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens(events in prop::collection::vec((event(), 0..6usize), 1..40)) {
        let mut world = World { now: NOW, ..World::default() };
        let mut slot = world.restart(Mode::Start);
        for (event, steps) in events {
            match event {
                Event::Crash => slot = world.restart(slot.mode),
                Event::Mode(n) => slot.mode = [Mode::Start, Mode::Keep, Mode::Drain, Mode::Stop][usize::from(n)],
                event => world.happen(event),
            }
            for _ in 0..steps {
                world.step(&mut slot, matches!(event, Event::Fail));
            }
        }
        // From any state it reaches a runner that waits for a job …
        slot.mode = Mode::Start;
        settle(&mut world, &mut slot);
        prop_assert_eq!(world.containers.len(), 1);
        let runner = world.containers[0].runner.clone();
        prop_assert_eq!(world.runners.get(&runner).map(|r| r.0), Some(true));
        prop_assert_eq!(world.leftovers.iter().collect::<Vec<_>>(), [&runner]);
        // … and, drained, nothing: no container, volume or registration is left.
        slot.mode = Mode::Drain;
        settle(&mut world, &mut slot);
        prop_assert!(world.containers.is_empty() && world.leftovers.is_empty(), "{:?}", world);
        prop_assert!(world.runners.is_empty(), "{:?}", world);
        prop_assert!(slot.is_empty(&world.seen()), "{:?}", slot);
        prop_assert!(world.jobs.values().all(|runs| *runs == 1));
    }
}

/// What an image costs GitHub whose runner dies at once: in ten minutes less than 20 requests, of any number of slots.
#[test]
fn dying_runners_are_cheap() {
    for slots in [1, 2, 3, 100] {
        let mut backoff = Backoff::default();
        let mut worlds: Vec<_> = (0..slots)
            .map(|_| (World::default(), empty(Mode::Keep)))
            .collect();
        let (mut asked, mut died) = (0, 0);
        for now in NOW..NOW + 600 {
            for n in 0..worlds.len() {
                let is_live = |(world, slot): &(World, Slot)| {
                    slot.runner.is_some() || !world.containers.is_empty()
                };
                let live = worlds.iter().filter(|place| is_live(place)).count();
                let is_own = is_live(&worlds[n]);
                let (world, slot) = &mut worlds[n];
                world.now = now;
                slot.mode = if is_own || backoff.start(live, now).is_ok() {
                    Mode::Start
                } else {
                    Mode::Keep
                };
                loop {
                    let action = decide(slot, &world.seen(), now);
                    asked += u32::from(action.asks());
                    if let Action::Judge(..) = action {
                        died += 1;
                        let since = slot.runner.as_ref().unwrap().since;
                        backoff.ended(since, now, String::new());
                        slot.mode = Mode::Keep;
                    }
                    if !world.step(slot, false) {
                        break;
                    }
                    world.happen(Event::Die);
                }
            }
        }
        assert!(died > 3, "{died}");
        assert!(asked < 20, "{slots} slots: {asked} requests");
    }
}

/// Time passes, runners connect, jobs end, and GitHub takes those that died for offline at last.
fn settle(world: &mut World, slot: &mut Slot) {
    for _ in 0..20 {
        let mut steps = 0;
        while world.step(slot, false) {
            steps += 1;
            assert!(steps < 100, "it never rests: {slot:?} {world:?}");
        }
        world.happen(Event::End);
        world.happen(Event::Connect);
        let containers = world.containers.clone();
        world.runners.retain(|name, (online, busy)| {
            let runs = containers
                .iter()
                .any(|c| c.runner == *name && matches!(c.state, State::Running(_)));
            if !runs {
                (*online, *busy) = (false, false);
            }
            true
        });
        world.now += LOOK;
    }
    // The last connection may be of this round.
    while world.step(slot, false) {}
}
