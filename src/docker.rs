// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How Docker's containers ended. dockerd runs no OCI hooks; its API tells.
//!
//! [`listen`] follows `GET /events` from the first time that a client mounts a volume whose id can be dockerd's, and
//! tells the engine. What was missed it asks for: `GET /containers/json`, `GET /containers/ID/json`. What happens to a
//! container comes in this order (dockerd 26.1): `mount` of each volume, `start`, our Unmount, `unmount` of each, `die`; with
//! `--rm` then `destroy`, after which nobody knows it any more. One that cannot be started has neither `start` nor `die`.
//!
//! A container's own word is never taken. Its labels, which the image's author sets, are
//! among its events' attributes, in place of dockerd's own of the same name (moby, daemon/events.go): of one with a label
//! `exitCode`, `die` says whatever that says.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::Request;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use hyperlocal::UnixConnector;
use jiff::Timestamp;
use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer};
use serde_json::json;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::cache::names::VolumeName;
use crate::engine::{DockerAsk, Engine, Happened, Verdict, now_ns};
use crate::plugin::wire::printable;

/// Where its socket is if nothing else is configured.
pub const SOCKET: &str = "/run/docker.sock";

/// Our volumes' driver, as dockerd names it: the spec file's name.
const DRIVER: &str = "lvm-cache-friend";

/// For an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer and longest event that are read, in bytes. Labels are in both, and nothing bounds them: of a container
/// with more than that, the end is unknown.
const MAX_ANSWER: usize = 16 << 20;

/// How long after the end of a lease Docker is asked, where its events have not told by then.
const ASK_AFTER: Duration = Duration::from_secs(1);

/// How often a Docker that went away is looked for, at first and at last; a question has it looked for at once.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How many containers are remembered, and how many of one volume are asked about. More than a host runs at once.
const MAX_CONTAINERS: usize = 4096;
/// See [`MAX_CONTAINERS`].
const MAX_OF_VOLUME: usize = 64;

/// Docker did not tell.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// Nobody listens on its socket.
    #[error("nobody listens on {}", .0.display())]
    Away(PathBuf),
    /// It is Podman that listens there, whose hooks tell.
    #[error("{} is Podman's", .0.display())]
    Podman(PathBuf),
    /// It does not answer as it should.
    #[error("{what}: {problem}")]
    Odd {
        /// What was asked for.
        what: &'static str,
        /// What went wrong.
        problem: String,
    },
}

/// A client of its API.
pub struct Docker {
    socket: PathBuf,
    client: Client<UnixConnector, Full<Bytes>>,
}

impl std::fmt::Debug for Docker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Docker").field(&self.socket).finish()
    }
}

/// A container, as it is asked for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    state: State,
    mounts: Vec<MountPoint>,
    config: Config,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    status: String,
    exit_code: i64,
    #[serde(rename = "OOMKilled", default)]
    oom_killed: bool,
    /// Nanoseconds since 1970; 0: never.
    #[serde(deserialize_with = "nanos")]
    started_at: u64,
    #[serde(deserialize_with = "nanos")]
    finished_at: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MountPoint {
    r#type: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    driver: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    labels: Option<HashMap<String, String>>,
}

impl State {
    /// How it ended; `None` while it runs, or before it was started.
    fn verdict(&self) -> Option<Verdict> {
        match self.status.as_str() {
            "exited" | "dead" | "removing" => Some(verdict(self.exit_code, self.oom_killed)),
            // Its start has failed.
            "created" if self.exit_code != 0 => Some(Verdict::Failure),
            _ => None,
        }
    }

    fn runs(&self) -> bool {
        matches!(self.status.as_str(), "running" | "paused" | "restarting")
    }
}

/// A kill is a failure too, for want of memory also where the first process was spared and says 0.
fn verdict(code: i64, oom_killed: bool) -> Verdict {
    if code == 0 && !oom_killed {
        Verdict::Success
    } else {
        Verdict::Failure
    }
}

/// In nanoseconds since 1970; what was never is in the year 1.
fn nanos<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let at = String::deserialize(deserializer)?.parse::<Timestamp>();
    Ok(u64::try_from(at.map_err(de::Error::custom)?.as_nanosecond()).unwrap_or(0))
}

/// An event, as far as we look at it.
#[derive(Debug, Deserialize)]
struct Event {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "Action")]
    action: String,
    #[serde(rename = "Actor")]
    actor: Actor,
    /// Nanoseconds since 1970.
    #[serde(rename = "timeNano")]
    at: u64,
}

#[derive(Debug, Deserialize)]
struct Actor {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Attributes", default)]
    attributes: Attributes,
}

#[derive(Debug, Default, Deserialize)]
struct Attributes {
    driver: Option<String>,
    container: Option<String>,
    #[serde(rename = "exitCode")]
    exit_code: Option<String>,
}

impl Docker {
    /// A client of who listens on this socket; nothing is asked yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            // A connection for each request: of an idle one it would only show in use that dockerd was started anew.
            client: Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(0)
                .build(UnixConnector),
        }
    }

    /// Its answer's body, which may go on for ever.
    async fn get(&self, what: &'static str, path: &str) -> Result<Option<Incoming>, DockerError> {
        let odd = |problem: String| DockerError::Odd {
            what,
            problem: printable(&problem),
        };
        let uri: axum::http::Uri = hyperlocal::Uri::new(&self.socket, path).into();
        let request = Request::get(uri).body(Full::default());
        let request = request.map_err(|e| odd(e.to_string()))?;
        let answer = timeout(TIMEOUT, self.client.request(request)).await;
        let Ok(answer) = answer else {
            return Err(odd(format!("no answer within {} s", TIMEOUT.as_secs())));
        };
        let answer = answer.map_err(|error| {
            let mut cause: &dyn std::error::Error = &error;
            while let Some(deeper) = cause.source() {
                cause = deeper;
            }
            match cause.downcast_ref().map(io::Error::kind) {
                Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    DockerError::Away(self.socket.clone())
                }
                _ => odd(cause.to_string()),
            }
        })?;
        match answer.status().as_u16() {
            200 => Ok(Some(answer.into_body())),
            404 => Ok(None),
            status => Err(odd(format!("status {status}"))),
        }
    }

    /// Its answer; `None` where it does not know what is asked for.
    async fn ask<T: DeserializeOwned>(
        &self,
        what: &'static str,
        path: &str,
    ) -> Result<Option<T>, DockerError> {
        let odd = |problem: String| DockerError::Odd {
            what,
            problem: printable(&problem),
        };
        let Some(body) = self.get(what, path).await? else {
            return Ok(None);
        };
        let body = timeout(TIMEOUT, Limited::new(body, MAX_ANSWER).collect()).await;
        let body = body.map_err(|_| odd("its answer does not end".into()))?;
        let body = body.map_err(|e| odd(e.to_string()))?.to_bytes();
        serde_json::from_slice(&body)
            .map(Some)
            .map_err(|e| odd(e.to_string()))
    }

    /// Its version, if it is Docker that answers.
    ///
    /// # Errors
    /// See [`DockerError`].
    pub async fn version(&self) -> Result<String, DockerError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Version {
            version: String,
            #[serde(default)]
            components: Vec<Component>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Component {
            name: String,
        }
        let version: Option<Version> = self.ask("its version", "/version").await?;
        let version = version.ok_or(DockerError::Odd {
            what: "its version",
            problem: "it has none".into(),
        })?;
        // Podman serves Docker's API too, and may be asked to on this very socket.
        if version.components.iter().any(|c| c.name.contains("Podman")) {
            return Err(DockerError::Podman(self.socket.clone()));
        }
        Ok(printable(&version.version))
    }

    /// What happens to containers and volumes from a moment on, in nanoseconds since 1970; of what was before now it
    /// remembers 256 events, and none from before it was started.
    async fn events(&self, since: u64) -> Result<Events, DockerError> {
        let filters = query(&json!({
            "type": ["container", "volume"],
            "event": ["mount", "unmount", "start", "oom", "die", "destroy"],
        }));
        let (seconds, nanos) = (since / 1_000_000_000, since % 1_000_000_000);
        let path = format!("/events?since={seconds}.{nanos:09}&filters={filters}");
        let body = self.get("its events", &path).await?;
        Ok(Events {
            body: body.ok_or(DockerError::Odd {
                what: "its events",
                problem: "it has none".into(),
            })?,
            buffer: Vec::new(),
            searched: 0,
            skips: false,
        })
    }

    /// The ids of the containers with a volume, or something else of its name, the newest first.
    async fn containers_of(&self, volume: &VolumeName) -> Result<Vec<String>, DockerError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Listed {
            id: String,
        }
        let filters = query(&json!({"volume": [volume.as_str()]}));
        let path = format!("/containers/json?all=1&filters={filters}");
        let listed: Option<Vec<Listed>> = self.ask("the containers of a volume", &path).await?;
        let ids = listed.into_iter().flatten().map(|container| container.id);
        Ok(ids.filter(|id| is_id(id)).take(MAX_OF_VOLUME).collect())
    }

    /// `None`: there is no such container any more.
    async fn inspect(&self, container: &str) -> Result<Option<Inspected>, DockerError> {
        self.ask("a container", &format!("/containers/{container}/json"))
            .await
    }
}

/// JSON in a query.
fn query(json: &serde_json::Value) -> String {
    // Of volumes' names and JSON's own, these are what a query cannot have.
    let text = json.to_string().replace('"', "%22");
    text.replace('{', "%7B").replace('}', "%7D")
}

/// What may be in a path.
fn is_id(text: &str) -> bool {
    text.len() <= 128 && !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric())
}

/// A stream of events, a line each.
struct Events {
    body: Incoming,
    buffer: Vec<u8>,
    /// So much of that has no end of a line in it.
    searched: usize,
    /// The rest of a line is passed over.
    skips: bool,
}

impl Events {
    /// The next; `None`: there will be no more.
    async fn next(&mut self) -> Option<Event> {
        loop {
            let end = |from: &[u8]| from.iter().position(|&byte| byte == b'\n');
            while let Some(end) = end(&self.buffer[self.searched..]) {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                if !std::mem::take(&mut self.skips)
                    && let Ok(event) = serde_json::from_slice(&line)
                {
                    return Some(event);
                }
            }
            if self.buffer.len() > MAX_ANSWER {
                self.buffer.clear();
                if !std::mem::replace(&mut self.skips, true) {
                    warn!("an event of Docker's is too long: it is passed over");
                }
            }
            self.searched = self.buffer.len();
            let frame = self.body.frame().await?.ok()?;
            if let Some(data) = frame.data_ref() {
                self.buffer.extend_from_slice(data);
            }
        }
    }
}

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
                info!(version, "Docker tells how containers end");
                (pause, told) = (RETRY.0, false);
                listener.follow(events, &mut asks, &mut wanted).await;
                info!("Docker's events have ended");
            }
            Err(error) => {
                if wanted.certain && !std::mem::replace(&mut told, true) {
                    let error = printable(&error.to_string());
                    warn!(
                        error,
                        "Docker does not tell how containers end: until it does, that is unknown (said once)"
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

    /// Asks about a lease that has ended, if events do not tell first.
    fn ask_about(self: &Arc<Self>, volume: VolumeName) {
        let listener = Arc::clone(self);
        tokio::spawn(async move {
            sleep(ASK_AFTER).await;
            if !listener.engine.awaits_docker(&volume) {
                return;
            }
            let asked_at = now_ns();
            let any = listener.look_at(&volume).await;
            listener.engine.docker_named_all(&volume, asked_at);
            if !any {
                // Of one that is gone, the last event may not have come through yet.
                sleep(ASK_AFTER).await;
                listener.engine.docker_tells_no_more(Some(&volume));
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
                listener.look_at(&volume).await;
            });
        }
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => {
                        wanted.since = wanted.since.max(event.at);
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
            // Told again, after a connection that broke.
            if seen.last >= at {
                return;
            }
            if seen.ended {
                *seen = Seen {
                    volumes: std::mem::take(&mut seen.volumes),
                    lies: seen.lies,
                    ..Seen::default()
                };
            }
            seen.last = at;
            seen.volumes.insert(volume.clone());
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
                    "its label exitCode hides its exit code, and it is gone: it counts as failed"
                );
                Verdict::Failure
            } else {
                Verdict::Unknown
            }
        });
        self.ended(volumes, container, verdict, at);
    }

    /// Asks for the containers of a volume and how they ended; `false` where there is none.
    async fn look_at(&self, volume: &VolumeName) -> bool {
        let ids = match self.docker.containers_of(volume).await {
            Ok(ids) => ids,
            Err(error) => {
                debug!(%volume, %error, "Docker was asked in vain");
                return true;
            }
        };
        let mut any = false;
        for id in ids {
            let Ok(Some(found)) = self.docker.inspect(&id).await else {
                continue;
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
        any
    }
}
