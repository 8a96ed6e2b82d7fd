// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client of Docker's API, as far as containers' ends need it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
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
use tokio::time::timeout;
use tracing::warn;

use crate::cache::names::VolumeName;
use crate::cache::verdict::Verdict;
use crate::text::printable;

/// For an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer and longest event that are read, in bytes. Labels are in both, and nothing bounds them: of a container
/// with more than that, the end is unknown.
const MAX_ANSWER: usize = 16 << 20;

/// How many containers of one volume are asked about: more than a host runs at once.
const MAX_OF_VOLUME: usize = 64;

/// Docker did not tell.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// Nobody listens on its socket.
    #[error("nothing listens on {}", .0.display())]
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
pub(super) struct Inspected {
    pub(super) state: State,
    pub(super) mounts: Vec<MountPoint>,
    pub(super) config: Config,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct State {
    pub(super) status: String,
    pub(super) exit_code: i64,
    #[serde(rename = "OOMKilled", default)]
    pub(super) oom_killed: bool,
    /// Nanoseconds since 1970; 0: never.
    #[serde(deserialize_with = "nanos")]
    pub(super) started_at: u64,
    #[serde(deserialize_with = "nanos")]
    pub(super) finished_at: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct MountPoint {
    pub(super) r#type: String,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) driver: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Config {
    pub(super) labels: Option<HashMap<String, String>>,
}

impl State {
    /// How it ended; `None` while it runs, or before it was started.
    pub(super) fn verdict(&self) -> Option<Verdict> {
        match self.status.as_str() {
            "exited" | "dead" | "removing" => Some(verdict(self.exit_code, self.oom_killed)),
            // Its start has failed.
            "created" if self.exit_code != 0 => Some(Verdict::Failure),
            _ => None,
        }
    }

    pub(super) fn runs(&self) -> bool {
        matches!(self.status.as_str(), "running" | "paused" | "restarting")
    }
}

/// A kill is a failure too, for want of memory also where the first process was spared and says 0.
pub(super) fn verdict(code: i64, oom_killed: bool) -> Verdict {
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
pub(super) struct Event {
    #[serde(rename = "Type")]
    pub(super) kind: String,
    #[serde(rename = "Action")]
    pub(super) action: String,
    #[serde(rename = "Actor")]
    pub(super) actor: Actor,
    /// Nanoseconds since 1970.
    #[serde(rename = "timeNano")]
    pub(super) at: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Actor {
    #[serde(rename = "ID")]
    pub(super) id: String,
    #[serde(rename = "Attributes", default)]
    pub(super) attributes: Attributes,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Attributes {
    pub(super) driver: Option<String>,
    pub(super) container: Option<String>,
    #[serde(rename = "exitCode")]
    pub(super) exit_code: Option<String>,
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
    pub(super) async fn events(&self, since: u64) -> Result<Events, DockerError> {
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
    pub(super) async fn containers_of(
        &self,
        volume: &VolumeName,
    ) -> Result<Vec<String>, DockerError> {
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
    pub(super) async fn inspect(&self, container: &str) -> Result<Option<Inspected>, DockerError> {
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
pub(super) fn is_id(text: &str) -> bool {
    text.len() <= 128 && !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric())
}

/// A stream of events, a line each.
pub(super) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
    /// So much of that has no end of a line in it.
    searched: usize,
    /// The rest of a line is passed over.
    skips: bool,
}

impl Events {
    /// The next; `None`: there will be no more.
    pub(super) async fn next(&mut self) -> Option<Event> {
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
                    warn!("an event from Docker is too long: skipped");
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
