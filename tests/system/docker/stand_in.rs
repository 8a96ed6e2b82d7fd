// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A STAND-IN for dockerd: no Docker, only what it says on its API's socket and asks of a volume plugin, in its order, as
//! dockerd 26.1 was seen to. It is as unkind as the real one can be: events come in pieces, connections break, containers
//! are gone at once, labels hide what dockerd says.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::daemon::Plugin;
use crate::support::podman::DRIVER;

/// How it answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mood {
    Kind,
    /// It takes connections and says nothing.
    Silent,
    /// What it says is no JSON, or other JSON than it should be, and far too much.
    Mad,
    /// It is Podman, which serves Docker's API too.
    Podman,
}

#[derive(Default)]
struct State {
    mood: Option<Mood>,
    events: Vec<Value>,
    listeners: Vec<UnixStream>,
    containers: BTreeMap<String, Value>,
    /// Connections that are kept and not answered.
    held: Vec<UnixStream>,
    asked: Vec<String>,
    closed: bool,
    /// How far its clock was set back, in nanoseconds.
    behind: u64,
}

pub struct Docker {
    socket: PathBuf,
    state: Arc<Mutex<State>>,
}

/// A container with volumes of ours.
pub struct Container {
    pub id: String,
    /// A mount's id, and its volume.
    mounts: Vec<(String, String)>,
    labels: Value,
    removed: bool,
}

fn time(at: u64) -> String {
    let at = jiff::Timestamp::from_nanosecond(at.into()).unwrap();
    if at == jiff::Timestamp::UNIX_EPOCH {
        "0001-01-01T00:00:00Z".into()
    } else {
        at.to_string()
    }
}

/// An id as dockerd makes them.
pub fn id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!(
        "{:064x}",
        NEXT.fetch_add(1, Ordering::Relaxed) + 0xd0cc_e000_0000
    )
}

impl Docker {
    pub fn start(socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                if lock(&shared).closed {
                    return;
                }
                thread::spawn(move || answer(stream.unwrap(), &shared));
            }
        });
        Self {
            socket: socket.to_owned(),
            state,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub fn be(&self, mood: Mood) {
        self.state().mood = Some(mood);
        self.cut();
    }

    /// Breaks all connections.
    pub fn cut(&self) {
        let mut state = self.state();
        state.listeners.clear();
        state.held.clear();
    }

    /// Sets its clock back.
    pub fn set_back(&self, by: Duration) {
        self.state().behind = u64::try_from(by.as_nanos()).unwrap();
    }

    fn now(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::try_from(now.as_nanos()).unwrap() - self.state().behind
    }

    /// Whether somebody follows its events.
    pub fn is_followed(&self) -> bool {
        !self.state().listeners.is_empty()
    }

    /// The paths that it was asked for.
    pub fn asked(&self) -> Vec<String> {
        self.state().asked.clone()
    }

    fn say(&self, event: Value) {
        let mut state = self.state();
        let text = format!("{event}\n");
        state.events.push(event);
        // In pieces, as a stream may come.
        state.listeners.retain_mut(|stream| {
            let (first, rest) = text.as_bytes().split_at(text.len() / 3);
            let sent = [first, rest].map(|piece| chunk(stream, piece));
            sent.iter().all(Result::is_ok)
        });
    }

    pub fn volume_event(&self, action: &str, volume: &str, container: &str, driver: &str) {
        self.say(json!({
            "Type": "volume", "Action": action, "scope": "local", "timeNano": self.now(),
            "Actor": {"ID": volume, "Attributes": {
                "container": container, "destination": "/c", "driver": driver, "propagation": "", "read/write": "true",
            }},
        }));
    }

    /// What it says of a container, over which the container's labels go.
    pub fn container_event(&self, action: &str, container: &str, labels: &Value, own: &Value) {
        let mut attributes = json!({"image": "busybox", "name": "quirky_turing"});
        for more in [own, labels] {
            for (key, value) in more.as_object().into_iter().flatten() {
                attributes[key] = value.clone();
            }
        }
        self.say(json!({
            "Type": "container", "Action": action, "status": action, "id": container, "from": "busybox",
            "scope": "local", "timeNano": self.now(), "Actor": {"ID": container, "Attributes": attributes},
        }));
    }

    /// Mounts volumes for a new container.
    #[track_caller]
    pub fn create(
        &self,
        plugin: &Plugin,
        volumes: &[&str],
        labels: Value,
        removed: bool,
    ) -> Container {
        let mounts = volumes.iter().map(|volume| (id(), (*volume).to_owned()));
        let container = Container {
            id: id(),
            mounts: mounts.collect(),
            labels,
            removed,
        };
        self.state().containers.insert(
            container.id.clone(),
            json!({
                "Id": container.id,
                "Config": {"Labels": container.labels},
                "Mounts": volumes.iter().map(|volume| json!({
                    "Type": "volume", "Name": volume, "Driver": DRIVER, "Destination": "/c", "Source": "/elsewhere",
                })).collect::<Vec<_>>(),
            }),
        );
        self.be_in(&container.id, "created", 0, false, (0, 0));
        self.mount(plugin, &container);
        container
    }

    #[track_caller]
    pub fn mount(&self, plugin: &Plugin, container: &Container) {
        for (mount, volume) in &container.mounts {
            plugin.mount(volume, mount);
            self.volume_event("mount", volume, &container.id, DRIVER);
        }
    }

    pub fn unmount(&self, plugin: &Plugin, container: &Container) {
        for (mount, volume) in &container.mounts {
            plugin.unmount(volume, mount);
            self.volume_event("unmount", volume, &container.id, DRIVER);
        }
    }

    fn be_in(&self, container: &str, status: &str, code: i64, oom: bool, times: (u64, u64)) {
        let mut state = self.state();
        if let Some(container) = state.containers.get_mut(container) {
            container["State"] = json!({
                "Status": status, "Running": status == "running", "OOMKilled": oom, "ExitCode": code,
                "StartedAt": time(times.0), "FinishedAt": time(times.1),
            });
        }
    }

    fn started_at(&self, container: &str) -> u64 {
        let state = self.state();
        let text = state.containers[container]["State"]["StartedAt"]
            .as_str()
            .unwrap();
        let at: jiff::Timestamp = text.parse().unwrap();
        u64::try_from(at.as_nanosecond()).unwrap_or(0)
    }

    /// A container's first process runs.
    pub fn run(&self, container: &Container) {
        self.be_in(&container.id, "running", 0, false, (self.now(), 0));
        self.container_event("start", &container.id, &container.labels, &json!({}));
    }

    /// The end of a container's first process, and what dockerd does of it then.
    pub fn end(&self, plugin: &Plugin, container: &Container, code: i64) {
        let killed = code > 1000;
        let code = if killed { code - 1000 } else { code };
        if killed {
            self.container_event("oom", &container.id, &container.labels, &json!({}));
        }
        let times = (self.started_at(&container.id), self.now());
        self.be_in(&container.id, "exited", code, killed, times);
        self.unmount(plugin, container);
        let own = json!({"execDuration": "0", "exitCode": code.to_string()});
        self.container_event("die", &container.id, &container.labels, &own);
        if container.removed {
            self.remove(container);
        }
    }

    /// A container that cannot be started: dockerd has its code before it unmounts (moby, daemon/start.go).
    pub fn fail_to_start(&self, plugin: &Plugin, container: &Container) {
        self.has_failed_to_start(container);
        self.unmount(plugin, container);
        if container.removed {
            self.remove(container);
        }
    }

    /// From now on it is answered that a container could not be started.
    pub fn has_failed_to_start(&self, container: &Container) {
        self.be_in(&container.id, "created", 127, false, (0, 0));
    }

    pub fn remove(&self, container: &Container) {
        self.state().containers.remove(&container.id);
        self.container_event("destroy", &container.id, &container.labels, &json!({}));
    }

    /// As after `kill -9` and a start: what happened before it does not know.
    pub fn forget_events(&self) {
        self.state().events.clear();
        self.cut();
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.state().closed = true;
        self.cut();
        let _ = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn chunk(stream: &mut UnixStream, data: &[u8]) -> std::io::Result<()> {
    write!(stream, "{:x}\r\n", data.len())?;
    stream.write_all(data)?;
    stream.write_all(b"\r\n")
}

fn answer(mut stream: UnixStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request)) = lines.next() else {
        return;
    };
    let mut words = request.split(' ');
    let (Some("GET"), Some(path)) = (words.next(), words.next()) else {
        panic!("not what is asked of Docker: {request}");
    };
    while lines
        .next()
        .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
    {}
    let mut state = lock(state);
    state.asked.push(path.to_owned());
    let mood = state.mood.unwrap_or(Mood::Kind);
    let (place, query) = path.split_once('?').unwrap_or((path, ""));
    let query = query
        .replace("%22", "\"")
        .replace("%7B", "{")
        .replace("%7D", "}");
    if mood == Mood::Silent {
        state.held.push(stream);
        return;
    }
    let (status, body) = match place {
        "/version" if mood == Mood::Podman => (
            200,
            json!({"Version": "5.4.2", "Components": [{"Name": "Podman Engine"}]}),
        ),
        "/version" => (
            200,
            json!({"Version": "26.1.5", "Components": [{"Name": "Engine"}, {"Name": "runc"}]}),
        ),
        "/events" => {
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            );
            let since = query
                .strip_prefix("since=")
                .unwrap()
                .split('&')
                .next()
                .unwrap();
            let (seconds, nanos) = since.split_once('.').unwrap();
            let since =
                seconds.parse::<u64>().unwrap() * 1_000_000_000 + nanos.parse::<u64>().unwrap();
            if mood == Mood::Mad {
                let _ = chunk(
                    &mut stream,
                    b"{\"Type\":\n[]\n\"die\"\n\xff\xfe\n{\"Type\":7,\"Action\":null}\n",
                );
                let _ = chunk(
                    &mut stream,
                    format!("{{\"Type\":\"{}", "x".repeat(1 << 20))
                        .repeat(6)
                        .as_bytes(),
                );
                let _ = chunk(&mut stream, b"\n");
            }
            for event in state
                .events
                .iter()
                .filter(|event| event["timeNano"].as_u64().unwrap() >= since)
            {
                let _ = chunk(&mut stream, format!("{event}\n").as_bytes());
            }
            state.listeners.push(stream);
            return;
        }
        _ if mood == Mood::Mad => (200, json!({"Id": 7, "State": []})),
        "/containers/json" => {
            let (_, filters) = query.split_once("filters=").unwrap();
            let filters: Value = serde_json::from_str(filters).unwrap();
            let wanted = &filters["volume"][0];
            let has = |container: &&Value| {
                let mounts = container["Mounts"].as_array().unwrap();
                mounts.iter().any(|mount| mount["Name"] == *wanted)
            };
            let found: Vec<_> = state
                .containers
                .values()
                .filter(has)
                .map(|c| json!({"Id": c["Id"]}))
                .collect();
            (200, found.into())
        }
        _ => {
            let id = place
                .strip_prefix("/containers/")
                .and_then(|rest| rest.strip_suffix("/json"));
            match id.and_then(|id| state.containers.get(id)) {
                Some(container) => (200, container.clone()),
                None => (404, json!({"message": "No such container"})),
            }
        }
    };
    // What is long takes a while: others are answered, and told of events, meanwhile.
    drop(state);
    let body = body.to_string();
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
}
