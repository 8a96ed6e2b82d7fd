// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the work in a lease ended, as far as that was told: by hooks, by Docker, by a supervisor; and the verdict that
//! comes of it. What a job says itself on its job volume's socket is added by [`Heard`](super::volume::Heard).
//!
//! Taken down in memory at once, whatever the volume is busy with. Docker may tell of a container's end only after
//! the lease's: what settles the lease waits for that, bounded, behind Unmount's answer.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc::UnboundedSender;

use super::{Happened, Verdict, lock};
use crate::cache::names::VolumeName;

/// How long a lease that Docker used waits for its containers' ends, after its own. A dockerd that has just been
/// started unmounts first and answers later.
const PATIENCE: Duration = Duration::from_secs(8);

/// The id that Podman mounts with, whatever the container (libpod/volume_internal_common.go).
const PODMAN: &str = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2";

/// What the listener to Docker is told of leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DockerAsk {
    /// From this moment on, in nanoseconds since 1970, what Docker does may matter: a volume is mounted for it.
    Mounted(u64),
    /// From this moment on it may: a lease goes on, or has ended, that may be Docker's.
    Perhaps(u64),
    /// A lease of this volume has ended, and waits to be told how its containers did.
    Ended(VolumeName),
}

/// Whether a client's id can be dockerd's: a random one of 64 hexadecimal digits for each mount
/// (moby, volume/mounts/mounts.go).
pub(super) fn may_be_docker(id: &str) -> bool {
    let hex = |c| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    id.len() == 64 && id != PODMAN && id.bytes().all(hex)
}

/// The present moment, in nanoseconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// What was told of one lease.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// When it began, in nanoseconds since 1970.
    began: u64,
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Now {
    /// When each container that used it was last heard of, and how it ended; `None` as long as it runs. Restarted,
    /// its last end counts.
    ends: BTreeMap<String, (u64, Option<Verdict>)>,
    /// How the work in it ended, as the supervisor says.
    judged: Option<Verdict>,
    /// Docker is a client of it.
    by_docker: bool,
    /// When it ended.
    ended: Option<u64>,
    /// Docker has named all containers that used it.
    all_named: bool,
    /// Docker tells no more of it.
    given_up: bool,
}

impl Now {
    fn verdict(&self) -> Verdict {
        if let Some(judged) = self.judged {
            return judged;
        }
        let mut ends = self.ends.values().map(|(_, end)| *end);
        if ends.clone().any(|end| end == Some(Verdict::Failure)) {
            Verdict::Failure
        } else if !self.ends.is_empty()
            && (self.all_named || !self.by_docker)
            && ends.all(|end| end == Some(Verdict::Success))
        {
            Verdict::Success
        } else {
            Verdict::Unknown
        }
    }

    /// Nothing that may still be told changes the verdict, or nothing is.
    fn is_final(&self) -> bool {
        let named = self.all_named && !self.ends.is_empty();
        !self.by_docker
            || self.given_up
            || self.verdict() != Verdict::Unknown
            || (named && self.ends.values().all(|(_, end)| end.is_some()))
    }
}

impl Told {
    /// Of a lease that began at `began`, in nanoseconds since 1970.
    pub fn since(began: u64) -> Self {
        Self {
            began,
            ..Self::default()
        }
    }

    /// Docker is a client of it.
    pub fn docker_uses_it(&self) {
        lock(&self.now).by_docker = true;
    }

    /// It has ended.
    pub fn end(&self) {
        lock(&self.now).ended.get_or_insert_with(now);
    }

    /// Takes what is said of a container, which happened `at`, in nanoseconds since 1970: what happened before what
    /// is known already changes nothing.
    pub fn take(&self, container: &str, happened: &Happened, at: u64) {
        let mut now = lock(&self.now);
        let end = match happened {
            Happened::Started(_) => None,
            Happened::Ended(verdict) => Some(*verdict),
            // The container's end may be told later still.
            Happened::Judged(verdict) => {
                now.judged = Some(*verdict);
                return;
            }
        };
        match now.ends.get_mut(container) {
            Some((last, _)) if *last > at => {}
            Some(known) => *known = (at, end),
            None => {
                now.ends.insert(container.to_owned(), (at, end));
            }
        }
        self.changed.notify_all();
    }

    /// [`Told::take`] of what is said as it happens: it is newer than all that is known, also where the clock was set back.
    pub fn hear(&self, container: &str, happened: &Happened) {
        let last = lock(&self.now).ends.get(container).map(|(at, _)| *at);
        self.take(container, happened, now().max(last.unwrap_or(0)));
    }

    /// How its work ended, as the supervisor says.
    pub fn judged(&self) -> Option<Verdict> {
        lock(&self.now).judged
    }

    /// How its work ended, as far as is known now: a failure of one container is a failure of all.
    pub fn verdict(&self) -> Verdict {
        lock(&self.now).verdict()
    }

    /// Returns once all is known that Docker will tell, or at the end of its patience.
    pub fn wait(&self) {
        let since = Instant::now();
        let mut now = lock(&self.now);
        while !now.is_final() {
            let Some(left) = PATIENCE.checked_sub(since.elapsed()) else {
                break;
            };
            let woken = self.changed.wait_timeout(now, left);
            now = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether any container is known to have used it, in this life of the daemon.
    pub fn has_containers(&self) -> bool {
        lock(&self.now).ends.keys().any(|id| !id.is_empty())
    }

    /// The containers that use it and have not ended.
    pub fn running(&self) -> Vec<String> {
        let now = lock(&self.now);
        let running = now.ends.iter().filter(|(_, (_, end))| end.is_none());
        running
            .map(|(id, _)| id.clone())
            // Of one that failed in an earlier life of the daemon only that is known.
            .filter(|id| !id.is_empty())
            .collect()
    }

    /// It has ended, and how this container of it did is not known.
    fn awaits(&self, container: &str) -> bool {
        let now = lock(&self.now);
        now.ended.is_some() && matches!(now.ends.get(container), Some((_, None)))
    }

    fn is_over(&self) -> bool {
        lock(&self.now).ended.is_some()
    }
}

/// What is told of all leases that are not settled yet.
#[derive(Debug)]
pub(super) struct Telling {
    leases: Mutex<HashMap<VolumeName, Vec<Weak<Told>>>>,
    /// `None`: Docker is not asked.
    docker: Option<UnboundedSender<DockerAsk>>,
}

impl Telling {
    pub fn new(docker: Option<UnboundedSender<DockerAsk>>) -> Self {
        Self {
            leases: Mutex::default(),
            docker,
        }
    }

    /// A lease of this volume begins, or goes on.
    pub fn add(&self, volume: &VolumeName, told: &Arc<Told>) {
        let mut leases = lock(&self.leases);
        leases.retain(|_, of| {
            of.retain(|told| told.strong_count() > 0);
            !of.is_empty()
        });
        // After a restart they are not found in the order in which they began.
        let of = leases.entry(volume.clone()).or_default();
        let began = |told: &Weak<Told>| told.upgrade().map(|told| told.began);
        let at = of.partition_point(|other| began(other) < Some(told.began));
        of.insert(at, Arc::downgrade(told));
    }

    /// A client with this id is about to mount a volume.
    pub fn is_mounted_by(&self, id: &str) {
        if may_be_docker(id) {
            self.say(DockerAsk::Mounted(now()));
        }
    }

    /// Has Docker listened to from now on, if it is there: a lease is found that may be its.
    pub fn is_found(&self) {
        self.say(DockerAsk::Perhaps(now()));
    }

    fn say(&self, ask: DockerAsk) {
        if let Some(docker) = &self.docker {
            let _ = docker.send(ask);
        }
    }

    /// Whether a lease that this client uses is to be asked about.
    pub fn asks_about(&self, id: &str) -> bool {
        self.docker.is_some() && may_be_docker(id)
    }

    /// Whether anything is asked of Docker.
    pub fn asks(&self) -> bool {
        self.docker.is_some()
    }

    /// Has Docker asked how the containers of a lease ended that has ended.
    pub fn ask(&self, volume: &VolumeName, told: &Told) {
        told.end();
        let mut now = lock(&told.now);
        if !now.by_docker {
            return;
        }
        let sent = self
            .docker
            .as_ref()
            .map(|docker| docker.send(DockerAsk::Ended(volume.clone())));
        now.given_up |= !matches!(sent, Some(Ok(())));
    }

    /// The unsettled leases of a volume, the oldest first.
    fn of(&self, volume: &VolumeName) -> Vec<Arc<Told>> {
        let leases = lock(&self.leases);
        let of = leases.get(volume).into_iter().flatten();
        of.filter_map(Weak::upgrade).collect()
    }

    /// What is told of the newest unsettled lease of a volume.
    pub fn newest(&self, volume: &VolumeName) -> Option<Arc<Told>> {
        self.of(volume).pop()
    }

    /// Takes what Docker says of a container of a volume, and gives the lease whose work has failed by that, or has not
    /// any more.
    pub fn take(
        &self,
        volume: &VolumeName,
        container: &str,
        happened: &Happened,
        at: u64,
    ) -> Option<Arc<Told>> {
        let of = self.of(volume);
        let began = || of.iter().rev().find(|told| told.began <= at);
        let told = match happened {
            // The clock may have been set back, and of a lease that went on over a restart nobody knows when it began.
            Happened::Started(_) => began().or_else(|| of.last().filter(|told| !told.is_over())),
            _ => of.iter().find(|told| told.awaits(container)).or_else(began),
        }?;
        let failed = || told.verdict() == Verdict::Failure;
        let before = failed();
        told.docker_uses_it();
        told.take(container, happened, at);
        (failed() != before).then(|| Arc::clone(told))
    }

    /// Docker says that a container of a volume does not run, when it was last started (0: never, as that failed) and
    /// ended, and how: so it did in the lease that it was started in; in one that it only had mounted nobody knows.
    pub fn does_not_run(
        &self,
        volume: &VolumeName,
        container: &str,
        (started, ended): (u64, u64),
        verdict: Verdict,
    ) {
        let of = self.of(volume);
        let ran_in = of.iter().rev().find(|told| told.began <= started);
        if let Some(told) = ran_in {
            told.docker_uses_it();
            told.take(container, &Happened::Ended(verdict), ended);
        }
        for told in of
            .iter()
            .filter(|told| told.began > started && told.awaits(container))
        {
            let verdict = if started == 0 {
                verdict
            } else {
                Verdict::Unknown
            };
            told.take(container, &Happened::Ended(verdict), now());
        }
    }

    /// Docker has named all containers that used the volume until `at`.
    pub fn all_named(&self, volume: &VolumeName, at: u64) {
        for told in self.of(volume) {
            let mut now = lock(&told.now);
            if now.ended.is_some_and(|ended| ended <= at) {
                now.all_named = true;
                told.changed.notify_all();
            }
        }
    }

    /// Docker tells no more of leases that have ended: of those of one volume that had by a moment, in nanoseconds since
    /// 1970; or of all. It may still be about to tell of one that ended after it was asked.
    pub fn give_up(&self, of: Option<(&VolumeName, u64)>) {
        let (all, by): (Vec<Arc<Told>>, u64) = match of {
            Some((volume, by)) => (self.of(volume), by),
            None => {
                let leases = lock(&self.leases);
                let all = leases.values().flatten().filter_map(Weak::upgrade);
                (all.collect(), u64::MAX)
            }
        };
        for told in all {
            let mut now = lock(&told.now);
            if now.ended.is_some_and(|ended| ended <= by) {
                now.given_up = true;
                told.changed.notify_all();
            }
        }
    }

    /// The volumes with leases that are not settled.
    pub fn volumes(&self) -> Vec<VolumeName> {
        let leases = lock(&self.leases);
        let live = leases
            .iter()
            .filter(|(_, of)| of.iter().any(|told| told.strong_count() > 0));
        live.map(|(name, _)| name.clone()).collect()
    }

    /// Whether a lease of this volume has ended and waits to be told how its containers did.
    pub fn is_awaited(&self, volume: &VolumeName) -> bool {
        let mut of = self.of(volume).into_iter();
        of.any(|told| {
            let now = lock(&told.now);
            now.ended.is_some() && !now.is_final()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Failure, Success, Unknown};

    fn volume() -> VolumeName {
        "v1".parse().expect("a name")
    }

    #[test]
    fn whose_ids() {
        for (id, docker) in [
            (PODMAN, false),
            (&*"a".repeat(64), true),
            (&"0".repeat(64), true),
            (&"A".repeat(64), false),
            (&"a".repeat(63), false),
            ("test", false),
            ("", false),
        ] {
            assert_eq!(may_be_docker(id), docker, "{id}");
        }
    }

    #[test]
    fn verdicts() {
        let ended = |verdict| Happened::Ended(verdict);
        let started = Happened::Started(None);
        for (said, by_docker, named, want) in [
            (vec![], false, false, Unknown),
            (vec![("a", &started, 1)], false, false, Unknown),
            (vec![("a", &ended(Success), 1)], false, false, Success),
            // As long as a container may have used it that was not named.
            (vec![("a", &ended(Success), 1)], true, false, Unknown),
            (vec![("a", &ended(Success), 1)], true, true, Success),
            (vec![("a", &ended(Failure), 1)], true, false, Failure),
            (
                vec![("a", &ended(Success), 1), ("b", &started, 1)],
                true,
                true,
                Unknown,
            ),
            (
                vec![("a", &ended(Failure), 1), ("a", &ended(Success), 2)],
                true,
                true,
                Success,
            ),
            // Told late, and late again.
            (
                vec![("a", &ended(Failure), 2), ("a", &started, 1)],
                true,
                true,
                Failure,
            ),
            (
                vec![("a", &ended(Unknown), 1), ("b", &ended(Success), 1)],
                true,
                true,
                Unknown,
            ),
            (
                vec![
                    ("a", &ended(Failure), 1),
                    ("", &Happened::Judged(Success), 1),
                ],
                false,
                false,
                Success,
            ),
        ] {
            let told = Told::since(0);
            lock(&told.now).by_docker = by_docker;
            lock(&told.now).all_named = named;
            for (container, happened, at) in &said {
                told.take(container, happened, *at);
            }
            assert_eq!(told.verdict(), want, "{said:?} {by_docker} {named}");
        }
    }

    #[test]
    fn an_end_is_heard_after_the_clock_was_set_back() {
        let told = Told::since(0);
        let tomorrow = now() + 86_400_000_000_000;
        told.take("a", &Happened::Started(None), tomorrow);
        // By the clock alone, it would be older than the start.
        told.take("a", &Happened::Ended(Failure), now());
        assert_eq!(told.verdict(), Unknown);
        told.hear("a", &Happened::Ended(Failure));
        assert_eq!(told.verdict(), Failure);
        told.hear("a", &Happened::Started(None));
        assert_eq!(
            (told.verdict(), told.running()),
            (Unknown, vec!["a".to_owned()])
        );
        told.hear("a", &Happened::Ended(Success));
        assert_eq!(told.verdict(), Success);
    }

    #[test]
    fn what_happened_belongs_to_the_lease_of_its_time() {
        let telling = Telling::new(None);
        let (first, second) = (Arc::new(Told::since(10)), Arc::new(Told::since(20)));
        telling.add(&volume(), &first);
        let say = |container: &str, happened: Happened, at| {
            telling.take(&volume(), container, &happened, at);
        };
        say("a", Happened::Started(None), 11);
        first.end();
        telling.add(&volume(), &second);
        // Told late: of the first, as it happened before the second began.
        say("b", Happened::Started(None), 12);
        // Of the first, whose end it is, though it happened after the second began.
        say("a", Happened::Ended(Success), 21);
        say("b", Happened::Ended(Failure), 22);
        assert_eq!((first.verdict(), second.verdict()), (Failure, Unknown));
        // It runs again.
        say("a", Happened::Started(None), 23);
        say("a", Happened::Ended(Success), 24);
        lock(&second.now).ended = Some(25);
        telling.all_named(&volume(), 24);
        assert_eq!(second.verdict(), Unknown);
        telling.all_named(&volume(), 25);
        assert_eq!((first.verdict(), second.verdict()), (Failure, Success));
        assert_eq!(second.running(), [""; 0]);
        // Before any of them.
        say("c", Happened::Ended(Failure), 5);
        assert_eq!(second.verdict(), Success);
        drop((first, second));
        assert_eq!(telling.volumes(), []);
    }

    #[test]
    fn a_lease_that_goes_on_is_after_one_that_has_ended() {
        let telling = Telling::new(None);
        let (goes_on, ended) = (Arc::new(Told::since(20)), Arc::new(Told::since(10)));
        telling.add(&volume(), &goes_on);
        telling.add(&volume(), &ended);
        ended.end();
        for happened in [Happened::Started(None), Happened::Ended(Failure)] {
            telling.take(&volume(), "a", &happened, 21);
        }
        assert_eq!((ended.verdict(), goes_on.verdict()), (Unknown, Failure));
        telling.does_not_run(&volume(), "b", (15, 16), Failure);
        assert_eq!(ended.verdict(), Failure);
    }

    #[test]
    fn a_lease_that_ended_after_docker_was_asked_is_not_given_up() {
        let telling = Telling::new(None);
        let [before, after, other] = [10, 20, 10].map(|began| Arc::new(Told::since(began)));
        let another: VolumeName = "v2".parse().expect("a name");
        for (volume, told, ended) in [
            (&volume(), &before, 15),
            (&volume(), &after, 25),
            (&another, &other, 15),
        ] {
            telling.add(volume, told);
            told.docker_uses_it();
            lock(&told.now).ended = Some(ended);
        }
        let is_awaited = || [&before, &after, &other].map(|told| !lock(&told.now).is_final());
        telling.give_up(Some((&volume(), 20)));
        assert_eq!(is_awaited(), [false, true, true]);
        telling.give_up(None);
        assert_eq!(is_awaited(), [false; 3]);
    }

    #[test]
    fn nobody_is_waited_for_who_tells_nothing() {
        let began = Instant::now();
        let told = Told::since(0);
        // No lease of Docker's.
        told.wait();
        told.docker_uses_it();
        let telling = Telling::new(None);
        telling.ask(&volume(), &told);
        told.wait();
        assert!(began.elapsed() < PATIENCE);
    }
}
