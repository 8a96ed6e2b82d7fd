// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What no request waits for: removals, refreshes of waiting copies,
//! and changes that others made. Two threads, and one that listens to inotify;
//! none of them wakes up while there is nothing to do.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{io, mem, thread};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use tracing::{debug, info, warn};

use super::bounds::Ask;
use super::volume::{LOST, Phase, Premounted, Prepared, REFRESH, Volume, WAIT};
use super::{Engine, EngineError, lock, survey};
use crate::cache::names::LvName;
use crate::cache::record::Role;
use crate::cache::spec::Kind;
use crate::failpoint::reach;
use crate::fs::Content;
use crate::storage::{Listing, StoreError, Watch, doom};

/// Changes often come in bursts (LVM commits a snapshot twice), and a listing
/// costs a command: one a second at most.
const BETWEEN_LISTINGS: Duration = Duration::from_secs(1);

/// How often an entry is looked at that is blank yet: nothing tells when somebody has made a file
/// system on it.
const UNREADY: Duration = Duration::from_secs(2);

/// How often a volume without an LV, made or used while the store did not serve, is tried to be
/// given one: until then it is known to this daemon alone.
const HOMELESS: Duration = Duration::from_secs(10);

/// How often is looked how full leases have made the store: faster than a disk fills what is
/// kept free.
const FILLING: Duration = Duration::from_secs(5);

/// How often a directory is looked for that changes by others showed in and that was removed; until it is there again,
/// the store is read as often.
const UNWATCHED: Duration = Duration::from_secs(10);
/// And while room is short.
const SHORT: Duration = Duration::from_secs(1);

/// How long after a start the store is looked at as a whole: that takes it for a second or more, in which a job that waits
/// for the daemon would wait for that, too.
const SETTLED: Duration = Duration::from_secs(10);

/// The first and the longest pause before a removal is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(60));

/// The queues of the two threads.
#[derive(Default)]
pub(super) struct Upkeep {
    todo: Mutex<Todo>,
    more: Condvar,
    removals: Mutex<Removals>,
    more_removals: Condvar,
    /// Disconnected once both threads have ended.
    threads: Mutex<Option<Receiver<Infallible>>>,
}

#[derive(Default)]
struct Todo {
    /// The store may have changed.
    list: bool,
    /// The index changed: copies that wait may have become second best.
    recheck: bool,
    /// A lease has begun.
    leased: bool,
    /// Entries whose use is to be noted in the store.
    used: HashSet<LvName>,
    stop: bool,
}

impl Todo {
    fn is_empty(&self) -> bool {
        !(self.list || self.recheck || self.leased || self.stop)
    }
}

#[derive(Default)]
struct Removals {
    waiting: Vec<Removal>,
    /// When the store is to be looked at as a whole.
    look: Option<Instant>,
    /// Entries may have to go.
    tidy: bool,
    /// Not before then: another host evicts, or what the last eviction gave back does not show yet.
    not_before: Option<Instant>,
    /// Somebody waits for that.
    asks: Vec<Ask>,
    /// When entries had last to go, and none could.
    fruitless: Option<Instant>,
    stop: bool,
}

/// What the thread that removes does next.
enum Work {
    Remove(Removal),
    Evict(Vec<Ask>),
    Look,
}

struct Removal {
    lv: LvName,
    /// To be unmounted first.
    premounted: Option<Premounted>,
    /// It carries `friend:doomed` already.
    doomed: bool,
    due: Instant,
    pause: Duration,
}

impl Upkeep {
    /// Has an LV removed, however often that must be tried.
    pub fn remove(&self, lv: LvName, doomed: bool) {
        self.add(lv, None, doomed);
    }

    /// Has a copy removed that may be mounted.
    pub fn discard(&self, lv: LvName, premounted: Option<Premounted>) {
        self.add(lv, premounted, false);
    }

    fn add(&self, lv: LvName, premounted: Option<Premounted>, doomed: bool) {
        let mut removals = lock(&self.removals);
        if let Some(there) = removals.waiting.iter_mut().find(|r| r.lv == lv) {
            there.doomed |= doomed;
            there.premounted = there.premounted.take().or(premounted);
            return;
        }
        removals.waiting.push(Removal {
            lv,
            premounted,
            doomed,
            due: Instant::now(),
            pause: RETRY.0,
        });
        self.more_removals.notify_one();
    }

    /// Has the copies that wait compared with the index.
    pub fn recheck(&self) {
        lock(&self.todo).recheck = true;
        self.more.notify_one();
    }

    /// Has an eye kept on how full the store is, and the store know that an entry is used, where
    /// that is to be noted.
    pub fn lease_begins(&self, entry: Option<LvName>) {
        let mut todo = lock(&self.todo);
        todo.leased = true;
        todo.used.extend(entry);
        self.more.notify_one();
    }

    /// Has entries evicted that have to go.
    pub fn tidy(&self) {
        lock(&self.removals).tidy = true;
        self.more_removals.notify_one();
    }

    /// As [`Upkeep::tidy`], but not before so long from now, whatever is asked meanwhile.
    pub fn tidy_after(&self, pause: Duration) {
        let mut removals = lock(&self.removals);
        removals.tidy = true;
        removals.not_before = Some(Instant::now() + pause);
    }

    pub fn ask(&self, ask: Ask) {
        let mut removals = lock(&self.removals);
        // Once it has stopped, no answer comes: the caller sees that its question was dropped.
        if !removals.stop {
            removals.asks.push(ask);
            self.more_removals.notify_one();
        }
    }

    pub fn fruitless(&self) {
        lock(&self.removals).fruitless = Some(Instant::now());
    }

    /// Whether an eviction, asked for now, may find more than the last one.
    pub fn was_fruitful(&self, pause: Duration) -> bool {
        let removals = lock(&self.removals);
        removals
            .fruitless
            .is_none_or(|when| when.elapsed() >= pause)
    }

    pub fn list(&self) {
        lock(&self.todo).list = true;
        self.more.notify_one();
    }

    pub fn stop(&self) {
        lock(&self.todo).stop = true;
        self.more.notify_one();
        let mut removals = lock(&self.removals);
        removals.stop = true;
        removals.asks.clear();
        drop(removals);
        self.more_removals.notify_one();
    }

    /// Waits until the threads have ended what they were at when they were told to [`Upkeep::stop`]; `false`: it is
    /// `until`, and they have not.
    pub fn has_ended(&self, until: Instant) -> bool {
        let Some(threads) = lock(&self.threads).take() else {
            return true;
        };
        let left = until.saturating_duration_since(Instant::now());
        threads.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
    }

    /// The next thing to do, or `None` when that is to stop. After `patience` there is nothing.
    fn next(&self, patience: Option<Duration>) -> Option<Todo> {
        let todo = lock(&self.todo);
        let idle = |todo: &mut Todo| todo.is_empty();
        let mut todo = match patience {
            None => self.more.wait_while(todo, idle),
            Some(patience) => self
                .more
                .wait_timeout_while(todo, patience, idle)
                .map(|(todo, _)| todo)
                .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0)),
        }
        .unwrap_or_else(PoisonError::into_inner);
        if todo.stop {
            return None;
        }
        Some(mem::take(&mut *todo))
    }

    /// The next removal that is due, or an eviction where none is; `None` when it is time to stop.
    fn next_removal(&self) -> Option<Work> {
        let mut removals = lock(&self.removals);
        loop {
            if removals.stop {
                return None;
            }
            let now = Instant::now();
            let soonest = (0..removals.waiting.len()).min_by_key(|&i| removals.waiting[i].due);
            let due = soonest.map(|i| removals.waiting[i].due);
            if let Some(i) = soonest.filter(|_| due <= Some(now)) {
                return Some(Work::Remove(removals.waiting.swap_remove(i)));
            }
            let evicts = removals.tidy || !removals.asks.is_empty();
            let turn = removals.not_before.filter(|_| evicts);
            if evicts && turn.is_none_or(|turn| turn <= now) {
                (removals.tidy, removals.not_before) = (false, None);
                return Some(Work::Evict(mem::take(&mut removals.asks)));
            }
            if removals.look.take_if(|look| *look <= now).is_some() {
                return Some(Work::Look);
            }
            removals = match due.into_iter().chain(turn).chain(removals.look).min() {
                Some(due) => {
                    let waited = self.more_removals.wait_timeout(removals, due - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.more_removals.wait(removals);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    fn retry(&self, mut removal: Removal) {
        removal.due = Instant::now() + removal.pause;
        removal.pause = (removal.pause * 2).min(RETRY.1);
        lock(&self.removals).waiting.push(removal);
    }
}

impl Engine {
    /// Starts the threads. What they do is safe to cut short; but [`Engine::stop`] waits for what they are at.
    pub(super) fn start_upkeep(self: &Arc<Self>) -> Result<(), EngineError> {
        let watch = self.store.watch();
        let inotify = watch_dir(&watch).map_err(|source| EngineError::Io {
            what: format!("watching {}", watch.dir.display()),
            source,
        })?;
        let (running, threads) = mpsc::channel();
        *lock(&self.upkeep.threads) = Some(threads);
        let spawn = |name: &str, work: fn(&Arc<Self>)| {
            let (engine, running) = (Arc::clone(self), running.clone());
            thread::Builder::new().name(name.to_owned()).spawn(move || {
                work(&engine);
                drop(running);
            })
        };
        let started = spawn("upkeep", Self::upkeep_thread)
            .and_then(|_| spawn("removals", Self::removals_thread))
            .and_then(|_| {
                let engine = Arc::clone(self);
                thread::Builder::new()
                    .name("watch".to_owned())
                    .spawn(move || engine.watch_thread(&inotify, &watch))
            });
        started.map(|_| ()).map_err(|source| EngineError::Io {
            what: "starting a thread".to_owned(),
            source,
        })
    }

    fn watch_thread(&self, inotify: &Inotify, watch: &Watch) {
        loop {
            match inotify.read_events() {
                Ok(events) => {
                    if events.iter().any(|event| may_be_a_change(watch, event)) {
                        self.upkeep.list();
                    }
                    // Its directory was removed, or its file system unmounted.
                    let ended =
                        |event: &InotifyEvent| event.mask.contains(AddWatchFlags::IN_IGNORED);
                    if events.iter().any(ended) {
                        warn!(dir = %watch.dir.display(), "what shows changes by others was removed");
                        while let Err(error) = add_watch(inotify, watch) {
                            debug!(dir = %watch.dir.display(), %error, "changes by others are not noticed");
                            thread::sleep(UNWATCHED);
                            self.upkeep.list();
                        }
                        self.upkeep.list();
                    }
                }
                Err(nix::Error::EINTR) => {}
                Err(error) => {
                    warn!(dir = %watch.dir.display(), %error, "changes by others are not noticed any more");
                    return;
                }
            }
        }
    }

    fn upkeep_thread(self: &Arc<Self>) {
        let mut unready = false;
        let mut filling = FILLING;
        loop {
            let again = if unready {
                Some(UNREADY)
            } else {
                self.has_homeless().then_some(HOMELESS)
            };
            let patience = again.or_else(|| self.has_leases().then_some(filling));
            let Some(mut todo) = self.upkeep.next(patience) else {
                return;
            };
            todo.list |= todo.is_empty() && again.is_some();
            if todo.list {
                unready = self.relist();
            }
            if todo.list || todo.recheck {
                self.refresh_waiting();
                self.forget_lost();
            }
            if !todo.used.is_empty() {
                self.write_use(&todo.used);
            }
            if self.has_leases() {
                filling = if self.check_room() { SHORT } else { FILLING };
            }
            if todo.list {
                self.rest(BETWEEN_LISTINGS);
            }
        }
    }

    /// Whether there is a volume without an LV that nobody is about to give one.
    fn has_homeless(&self) -> bool {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        volumes.iter().any(|volume| {
            let now = lock(&volume.now);
            matches!(now.phase(), Phase::Stale(None)) && now.settling.is_empty()
        })
    }

    /// Once all that this host has lost is in the store again, where a later life finds it, or removed.
    pub(super) fn forget_lost(&self) {
        if !lock(&self.state).has_lost || self.has_homeless() {
            return;
        }
        match self.store.forget_lost() {
            Ok(()) => lock(&self.state).has_lost = false,
            Err(error) => debug!(%error, "what was lost is told again at the next start"),
        }
    }

    fn removals_thread(self: &Arc<Self>) {
        lock(&self.upkeep.removals).look = Some(Instant::now() + SETTLED);
        let mut waiting: Vec<Ask> = Vec::new();
        while let Some(work) = self.upkeep.next_removal() {
            match work {
                Work::Remove(removal) => self.try_removal(removal),
                Work::Evict(asks) => {
                    waiting.extend(asks);
                    waiting = self.evict_round(waiting);
                }
                Work::Look => self.look_at_store(),
            }
        }
    }

    fn try_removal(&self, mut removal: Removal) {
        match self.remove_lv(&mut removal) {
            Ok(()) | Err(StoreError::NotFound(_)) => {
                let now = Instant::now();
                lock(&self.state).catalog.remove(&removal.lv, now);
                debug!(lv = %removal.lv, "LV removed");
            }
            Err(error) => {
                debug!(lv = %removal.lv, %error, "removal put off");
                self.upkeep.retry(removal);
            }
        }
    }

    /// Tries each removal that waits once, due or not.
    #[cfg(test)]
    pub(super) fn try_removals(&self) {
        for removal in mem::take(&mut lock(&self.upkeep.removals).waiting) {
            self.try_removal(removal);
        }
    }

    /// Clears away what an earlier life left that no listing shows, and says what is wrong with the store beside.
    fn look_at_store(&self) {
        if let Err(error) = self.store.clear_away() {
            warn!(%error, "what killed commands left is not cleared away");
        }
        match self.store.troubles() {
            Ok(troubles) => {
                for trouble in troubles {
                    warn!(
                        finding = trouble.finding,
                        fix = trouble.fix,
                        "something is wrong with the store"
                    );
                }
            }
            Err(error) => debug!(%error, "what is wrong with the store is not known"),
        }
    }

    fn remove_lv(&self, removal: &mut Removal) -> Result<(), StoreError> {
        removal.premounted = None;
        if !removal.doomed {
            removal.doomed = doom(&*self.store, &removal.lv)?;
        }
        self.store.remove(&removal.lv)?;
        reach("remove", 3);
        Ok(())
    }

    /// Replaces the copies that wait by better ones.
    pub(super) fn refresh_waiting(self: &Arc<Self>) {
        let volumes: Vec<_> = lock(&self.state).volumes.values().cloned().collect();
        for volume in volumes {
            if self.is_stopping() {
                return;
            }
            if !self.may_want_refresh(&volume) {
                continue;
            }
            if let Err(error) = self.refresh(&volume) {
                // Once more at the next change, and at Mount in any case.
                debug!(volume = %volume.name, %error, "no better copy yet");
            }
        }
    }

    /// Cheap, and without `op`, which Mount wants.
    fn may_want_refresh(&self, volume: &Volume) -> bool {
        let now = lock(&volume.now);
        match now.phase() {
            Phase::Ready(copy) => {
                !volume.keeps()
                    && copy.generation.load(Ordering::Relaxed)
                        != lock(&self.state).catalog.generation()
            }
            // The settlement of its last lease makes the next copy itself.
            Phase::Stale(lv) => {
                let waits = volume.keeps() || volume.spec.kind == Kind::Job;
                now.settling.is_empty() && !(waits && lv.is_some())
            }
            _ => false,
        }
    }

    fn refresh(self: &Arc<Self>, volume: &Arc<Volume>) -> Result<(), EngineError> {
        let _op = lock(&volume.op);
        let old = {
            let mut now = lock(&volume.now);
            if let Phase::Ready(copy) = now.phase()
                && self.is_best(volume, copy)
            {
                return Ok(());
            }
            match now.begin(&REFRESH) {
                Some(old) => old,
                None => return Ok(()),
            }
        };
        reach("refresh", 1);
        let made = match volume.spec.kind {
            Kind::Cache => self.prepare(volume, "refresh").map(Phase::Ready),
            Kind::Job => self.placeholder(volume).map(|lv| Phase::Stale(Some(lv))),
        };
        match made {
            Ok(phase) => {
                lock(&volume.now).set(&WAIT, phase);
                reach("refresh", 4);
                match old {
                    Phase::Ready(copy) => self.discard(copy.lv, copy.premounted),
                    Phase::Stale(Some(lv)) => self.discard(lv, None),
                    _ => {}
                }
                Ok(())
            }
            Err(error) => {
                lock(&volume.now).set(&WAIT, old);
                Err(error)
            }
        }
    }

    /// Reads the store and takes over what others changed. Gives whether that is to be done again
    /// soon, whatever happens.
    pub(super) fn relist(self: &Arc<Self>) -> bool {
        let asked = Instant::now();
        match self.store.list() {
            Ok(mut listing) => {
                let unready = self.hold_back(&mut listing);
                self.remove_doubtful(&mut listing, asked);
                self.take_over(&listing, asked);
                unready
            }
            // It has said so itself.
            Err(error @ StoreError::ShutOut { .. }) => {
                debug!(%error, "what is known stays");
                false
            }
            Err(error) => {
                warn!(%error, "the store cannot be read: what is known stays");
                false
            }
        }
    }

    /// Takes entries out of a listing that somebody is still making, with tools of his own: active,
    /// as entries of ours never are, and blank, or seen to be damaged. Gives whether one is blank.
    pub(super) fn hold_back(&self, listing: &mut Listing) -> bool {
        let damaged = lock(&self.state).catalog.held_back().clone();
        let mut active = HashSet::new();
        let mut blank = HashSet::new();
        listing.lvs.retain(|lv| {
            let Some(device) = lv.device else {
                return true;
            };
            if !matches!(Role::from_tags(&lv.tags), Role::Entry { .. }) {
                return true;
            }
            active.insert(lv.name.clone());
            let is_blank = crate::fs::device_node(device)
                .and_then(|node| crate::fs::probe(&node))
                .is_ok_and(|content| content == Content::Blank);
            if is_blank {
                debug!(lv = %lv.name, "an entry that somebody has active is blank yet");
                blank.insert(lv.name.clone());
            }
            !is_blank && !damaged.contains(&lv.name)
        });
        // What is blank has not been begun: it is judged anew once there is something on it.
        let settled = |lv: &&LvName| !active.contains(*lv) || blank.contains(*lv);
        let settled = damaged.iter().filter(settled).cloned().collect();
        lock(&self.state).catalog.release(&settled);
        !blank.is_empty()
    }

    /// Takes out of a listing what the store did not say it made, and has it removed.
    fn remove_doubtful(&self, listing: &mut Listing, asked: Instant) {
        let made = lock(&self.state).catalog.settle_doubts(listing, asked);
        for lv in made {
            info!(%lv, "made after all, though the store did not say so: it is removed");
            self.upkeep.remove(lv, false);
        }
    }

    fn take_over(self: &Arc<Self>, listing: &Listing, asked: Instant) {
        let seen = survey::Seen::of(listing, &self.boot);
        self.report_unclear(&seen.unclear);
        let mut state = lock(&self.state);
        state.catalog.take_over(seen.entries, seen.base, asked);
        state.dropped.retain(|_, when| *when >= asked);
        // Volumes that somebody made with LVM's own tools.
        for plan in &seen.volumes {
            let known = state.volumes.contains_key(&plan.name);
            if !known && !state.dropped.contains_key(&plan.name) {
                info!(volume = %plan.name, "a volume of an LV that somebody tagged");
                let volume = plan.volume();
                state.volumes.insert(plan.name.clone(), Arc::new(volume));
            }
        }
        let volumes: Vec<_> = state.volumes.values().cloned().collect();
        drop(state);
        let there: HashMap<_, _> = listing.lvs.iter().map(|lv| (&lv.name, ())).collect();
        for volume in volumes {
            self.drop_if_lost(&volume, |lv| there.contains_key(lv));
        }
        for lv in seen.doomed {
            self.upkeep.remove(lv, true);
        }
    }

    /// Reports LVs that are not clearly ours.
    pub(super) fn report_unclear(&self, unclear: &[(LvName, String)]) {
        for (lv, why) in unclear {
            if lock(&self.state).catalog.report(lv, why) {
                warn!(%lv, why, "this LV has tags of ours that make no sense: it is left alone");
            }
        }
    }

    /// Forgets a volume whose LV somebody removed.
    fn drop_if_lost(&self, volume: &Arc<Volume>, there: impl Fn(&LvName) -> bool) {
        // The operation that holds it knows better.
        let Ok(_op) = volume.op.try_lock() else {
            return;
        };
        let mut now = lock(&volume.now);
        let (Phase::Ready(Prepared { lv, .. }) | Phase::Stale(Some(lv))) = now.phase() else {
            return;
        };
        if !there(lv) && !lock(&self.state).catalog.is_newer(lv) {
            warn!(volume = %volume.name, "its LV was removed by somebody else: the volume is gone");
            let copy = now.set(&LOST, Phase::Removed);
            drop(now);
            drop(copy);
            self.drop_volume(volume);
        }
    }
}

/// Whether an event may mean that others changed the store: one that says that others were lost may.
fn may_be_a_change(watch: &Watch, event: &InotifyEvent) -> bool {
    let lost = AddWatchFlags::IN_Q_OVERFLOW | AddWatchFlags::IN_IGNORED;
    event.mask.intersects(lost)
        || match &watch.file {
            None => true,
            Some(file) => event
                .name
                .as_ref()
                .is_some_and(|name| name == file.as_str()),
        }
}

fn watch_dir(watch: &Watch) -> io::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    add_watch(&inotify, watch)?;
    Ok(inotify)
}

fn add_watch(inotify: &Inotify, watch: &Watch) -> nix::Result<()> {
    inotify.add_watch(
        &watch.dir,
        AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    #[test]
    fn what_may_be_a_change() {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let wd = inotify
            .add_watch(dir.path(), AddWatchFlags::IN_CREATE)
            .unwrap();
        let watch = |file: Option<&str>| Watch {
            dir: dir.path().into(),
            file: file.map(str::to_owned),
        };
        for (mask, name, want) in [
            (AddWatchFlags::IN_MOVED_TO, Some("vg"), true),
            (AddWatchFlags::IN_MOVED_TO, Some("other"), false),
            (AddWatchFlags::IN_Q_OVERFLOW, None, true),
            (AddWatchFlags::IN_IGNORED, None, true),
        ] {
            let event = InotifyEvent {
                wd,
                mask,
                cookie: 0,
                name: name.map(OsString::from),
            };
            assert_eq!(
                may_be_a_change(&watch(Some("vg")), &event),
                want,
                "{event:?}"
            );
            assert!(may_be_a_change(&watch(None), &event));
        }
    }
}
