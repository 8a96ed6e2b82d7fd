// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Follows what Docker says of containers that have volumes of ours, and tells the engine.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::api::{Actor, Docker, DockerError, Event, Events, MountPoint, is_id, verdict};
use crate::cache::names::VolumeName;
use crate::cache::verdict::Verdict;
use crate::engine::{DockerAsk, Engine, Happened, now_ns};
use crate::text::printable;

/// Our volumes' driver, as dockerd names it: the spec file's name.
const DRIVER: &str = "lvm-cache-friend";

/// How long after the end of a lease Docker is asked, where its events have not told by then.
const ASK_AFTER: Duration = Duration::from_secs(1);

/// How often it is asked, until it says how the containers ended. While dockerd unmounts the volumes of a container, one after
/// the other, it answers nothing about that; and no event tells of one whose start has failed (moby, daemon/start.go, monitor.go).
const ASKS: usize = 8;

/// How often a Docker that went away is looked for, at first and at last; a question has it looked for at once.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How many containers are remembered: more than a host runs at once.
const MAX_CONTAINERS: usize = 4096;

/// A container that has volumes of ours mounted.
#[derive(Debug, Default)]
struct Seen {
    volumes: BTreeSet<VolumeName>,
    /// When a volume was last mounted for it, or it was found, in nanoseconds since 1970.
    last: u64,
    /// It was seen to start since then.
    started: bool,
    ended: bool,
    oom_killed: bool,
    /// Its exit code is not to be had of events, where a label of its own is in place of it.
    lies: bool,
}

impl Seen {
    /// A volume was mounted for it `at`, in nanoseconds since 1970; `false` where that is told again after a connection
    /// that broke, or after Docker has answered that the container runs.
    fn mounts(&mut self, volume: &VolumeName, at: u64) -> bool {
        // An answer names one volume: the container's end is that of its others, too.
        self.volumes.insert(volume.clone());
        if self.last >= at {
            return false;
        }
        if self.ended {
            *self = Self {
                volumes: std::mem::take(&mut self.volumes),
                lies: self.lies,
                ..Self::default()
            };
        }
        self.last = at;
        true
    }
}

/// Follows what Docker says, for as long as `asks` is open.
pub async fn listen(engine: Arc<Engine>, socket: PathBuf, mut asks: UnboundedReceiver<DockerAsk>) {
    // Until it is a client of ours, nothing is asked of it: that might start it.
    let Some(first) = asks.recv().await else {
        return;
    };
    let listener = Arc::new(Listener {
        engine,
        docker: Docker::new(&socket),
        seen: Mutex::default(),
    });
    let mut wanted = Wanted {
        since: now_ns(),
        certain: false,
    };
    listener.take_ask(first, &mut wanted);
    let mut pause = RETRY.0;
    let mut told = false;
    loop {
        let connected = async {
            let version = listener.docker.version().await?;
            let events = listener.docker.events(wanted.since).await?;
            Ok::<_, DockerError>((version, events))
        };
        match connected.await {
            Ok((version, events)) => {
                info!(version, "Docker reports how containers end");
                (pause, told) = (RETRY.0, false);
                listener.follow(events, &mut asks, &mut wanted).await;
                info!("Docker's events have ended");
            }
            Err(error) => {
                if wanted.certain && !std::mem::replace(&mut told, true) {
                    let error = printable(&error.to_string());
                    warn!(
                        error,
                        "Docker does not report how containers end: until it does, their results are unknown (logged once)"
                    );
                }
                // One that only has not answered yet is waited for.
                if !matches!(error, DockerError::Odd { .. }) {
                    listener.engine.docker_tells_no_more(None);
                }
            }
        }
        let ask = async {
            if wanted.certain {
                timeout(pause, asks.recv()).await
            } else {
                Ok(asks.recv().await)
            }
        };
        match ask.await {
            Ok(Some(ask)) => listener.take_ask(ask, &mut wanted),
            Ok(None) => return,
            Err(_) => pause = (pause * 2).min(RETRY.1),
        }
    }
}

/// When an event happened, as far as it matters: after the one that came before it, whatever became of the clock since.
fn in_order(latest: &mut u64, at: u64) -> u64 {
    *latest = if at < *latest { *latest + 1 } else { at };
    *latest
}

/// What is wanted of Docker.
struct Wanted {
    /// What happened from then on, in nanoseconds since 1970.
    since: u64,
    /// It is known to be a client of ours. One that may not even be installed is neither missed nor looked for.
    certain: bool,
}

struct Listener {
    engine: Arc<Engine>,
    docker: Docker,
    seen: Mutex<HashMap<String, Seen>>,
}

impl Listener {
    fn seen(&self) -> MutexGuard<'_, HashMap<String, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_ask(self: &Arc<Self>, ask: DockerAsk, wanted: &mut Wanted) {
        match ask {
            DockerAsk::Mounted(at) => {
                wanted.since = wanted.since.min(at);
                wanted.certain = true;
            }
            DockerAsk::Perhaps(at) => wanted.since = wanted.since.min(at),
            DockerAsk::Ended(volume) => self.ask_about(volume),
        }
    }

    /// Asks about a lease that has ended, as long as events have not told.
    fn ask_about(self: &Arc<Self>, volume: VolumeName) {
        let listener = Arc::clone(self);
        tokio::spawn(async move {
            for _ in 0..ASKS {
                sleep(ASK_AFTER).await;
                if !listener.engine.awaits_docker(&volume) {
                    return;
                }
                let asked_at = now_ns();
                match listener.look_at(&volume).await {
                    Ok(any) => {
                        listener.engine.docker_named_all(&volume, asked_at);
                        if !any {
                            // Of one that is gone, the last event may not have come through yet.
                            sleep(ASK_AFTER).await;
                            let of = Some((&volume, asked_at));
                            return listener.engine.docker_tells_no_more(of);
                        }
                    }
                    Err(error) => debug!(%volume, %error, "Docker was asked in vain"),
                }
            }
        });
    }

    async fn follow(
        self: &Arc<Self>,
        mut events: Events,
        asks: &mut UnboundedReceiver<DockerAsk>,
        wanted: &mut Wanted,
    ) {
        // What happened while nobody listened; events say it too as far as they go back.
        for volume in self.engine.volumes_in_use() {
            let listener = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = listener.look_at(&volume).await {
                    debug!(%volume, %error, "Docker was asked in vain");
                }
            });
        }
        let mut latest = wanted.since;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(mut event) => {
                        wanted.since = wanted.since.max(event.at);
                        event.at = in_order(&mut latest, event.at);
                        self.take(event);
                    }
                    None => return,
                },
                ask = asks.recv() => match ask {
                    Some(ask) => self.take_ask(ask, wanted),
                    None => return,
                },
            }
        }
    }

    fn take(self: &Arc<Self>, event: Event) {
        let Event {
            kind,
            action,
            actor,
            at,
            ..
        } = event;
        match (kind.as_str(), action.as_str()) {
            ("volume", "mount" | "unmount") => {
                let Actor { id, attributes } = actor;
                let (Ok(volume), Some(container)) =
                    (id.parse::<VolumeName>(), attributes.container)
                else {
                    return;
                };
                if attributes.driver.as_deref() != Some(DRIVER) || !is_id(&container) {
                    return;
                }
                debug!(%volume, container, action, "Docker");
                if action == "unmount" {
                    self.engine.docker_named_all(&volume, at);
                } else {
                    self.is_mounted(&volume, &container, at);
                }
            }
            ("container", action) if self.happened(&actor, action, at) => {
                debug!(container = actor.id, action, "Docker");
            }
            _ => {}
        }
    }

    fn is_mounted(&self, volume: &VolumeName, container: &str, at: u64) {
        {
            let mut all = self.seen();
            if all.len() >= MAX_CONTAINERS && !all.contains_key(container) {
                let oldest = all.iter().min_by_key(|(_, seen)| seen.last);
                if let Some(oldest) = oldest.map(|(id, _)| id.clone()) {
                    all.remove(&oldest);
                }
            }
            let seen = all.entry(container.to_owned()).or_default();
            if !seen.mounts(volume, at) {
                return;
            }
        }
        let started = Happened::Started(None);
        self.engine
            .docker_container(volume, container, &started, at);
    }

    /// Takes what happened to a container; `false` where it has no volume of ours.
    fn happened(self: &Arc<Self>, actor: &Actor, action: &str, at: u64) -> bool {
        let (container, code) = (&actor.id, &actor.attributes.exit_code);
        let mut all = self.seen();
        let Some(seen) = all.get_mut(container) else {
            return false;
        };
        let end = match action {
            "start" => {
                seen.started = true;
                // It has none yet: this is a label.
                seen.lies |= code.is_some();
                return true;
            }
            "oom" => {
                seen.oom_killed = true;
                // Mostly it is said first.
                seen.ended.then_some(Verdict::Failure)
            }
            "die" => {
                seen.ended = true;
                let code = code.as_ref().and_then(|code| code.parse().ok());
                match code {
                    Some(code) if seen.started && !seen.lies => {
                        Some(verdict(code, seen.oom_killed))
                    }
                    _ => {
                        let (volumes, lies) = (seen.volumes.clone(), seen.lies);
                        drop(all);
                        let (listener, container) = (Arc::clone(self), container.clone());
                        tokio::spawn(async move {
                            listener.ask_for_end(&container, &volumes, lies, at).await;
                        });
                        return true;
                    }
                }
            }
            "destroy" => match all.remove(container) {
                // It could not be started.
                Some(seen) if !seen.started && !seen.ended => {
                    drop(all);
                    self.ended(&seen.volumes, container, Verdict::Failure, at);
                    return true;
                }
                _ => None,
            },
            _ => None,
        };
        if let Some(end) = end {
            let volumes = all.get(container).map(|seen| seen.volumes.clone());
            drop(all);
            self.ended(&volumes.unwrap_or_default(), container, end, at);
        }
        true
    }

    fn ended(&self, volumes: &BTreeSet<VolumeName>, container: &str, verdict: Verdict, at: u64) {
        for volume in volumes {
            let ended = Happened::Ended(verdict);
            self.engine.docker_container(volume, container, &ended, at);
        }
    }

    /// Asks how a container ended whose event does not say it.
    async fn ask_for_end(
        &self,
        container: &str,
        volumes: &BTreeSet<VolumeName>,
        lies: bool,
        at: u64,
    ) {
        let asked = self.docker.inspect(container).await;
        let known = match asked {
            Ok(Some(found)) if found.state.started_at <= at => found.state.verdict(),
            _ => None,
        };
        let verdict = known.unwrap_or_else(|| {
            if lies {
                warn!(
                    container,
                    "its label exitCode hides its exit code, and it was removed already: it counts as failed"
                );
                Verdict::Failure
            } else {
                Verdict::Unknown
            }
        });
        self.ended(volumes, container, verdict, at);
    }

    /// Asks for the containers of a volume and how they ended; `false` where there is none. An error: not all of
    /// them are known.
    async fn look_at(&self, volume: &VolumeName) -> Result<bool, DockerError> {
        let ids = self.docker.containers_of(volume).await?;
        let (mut any, mut failed) = (false, None);
        for id in ids {
            let found = match self.docker.inspect(&id).await {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            let ours = |m: &MountPoint| {
                m.r#type == "volume" && m.driver == DRIVER && m.name == volume.as_str()
            };
            if !found.mounts.iter().any(ours) {
                continue;
            }
            any = true;
            let state = &found.state;
            let (started, finished) = (state.started_at, state.finished_at);
            if state.runs() {
                let mut all = self.seen();
                if all.len() < MAX_CONTAINERS || all.contains_key(&id) {
                    let seen = all.entry(id.clone()).or_default();
                    if seen.last < started {
                        seen.last = started;
                    }
                    seen.volumes.insert(volume.clone());
                    seen.started = true;
                    let labels = found.config.labels.as_ref();
                    seen.lies |= labels.is_some_and(|labels| labels.contains_key("exitCode"));
                    seen.oom_killed |= state.oom_killed;
                }
                drop(all);
                let happened = Happened::Started(None);
                self.engine
                    .docker_container(volume, &id, &happened, started);
            } else if let Some(verdict) = state.verdict() {
                let times = (started, finished);
                self.engine
                    .docker_container_is_done(volume, &id, times, verdict);
            }
        }
        failed.map_or(Ok(any), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_told_again_adds_its_volume_and_changes_nothing_else() {
        let [one, two] = ["one", "two"].map(|name| name.parse().expect("a name"));
        let mut seen = Seen::default();
        assert!(seen.mounts(&one, 1));
        // Docker answers, of that volume, that the container has been running since 3.
        (seen.last, seen.started) = (3, true);
        assert!(!seen.mounts(&two, 2));
        assert!(seen.started && seen.last == 3);
        assert_eq!(seen.volumes, [one.clone(), two.clone()].into());
        // Started again, nothing is known of how it ends.
        (seen.ended, seen.oom_killed, seen.lies) = (true, true, true);
        assert!(seen.mounts(&one, 4));
        assert!(seen.lies && !(seen.started || seen.ended || seen.oom_killed));
        assert_eq!(seen.volumes, [one, two].into());
    }
}
