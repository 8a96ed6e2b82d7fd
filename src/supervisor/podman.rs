// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Podman's REST API (libpod, `podman system service`) over its unix socket.
//!
//! A runner's configuration, which is secret, goes to Podman in a request's body, if at all, and is in no argument and no label.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use hyperlocal::UnixConnector;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::slot::{Container, State};
use crate::text::printable;

/// The API's version: that of Podman 4.0, which later ones speak too.
const VERSION: &str = "v4.0.0";

/// For an answer. Starting a container may wait for its volumes.
const TIMEOUT: Duration = Duration::from_secs(60);

/// For an image to be pulled.
const PULL_TIMEOUT: Duration = Duration::from_secs(3600);

/// Longest answer, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// The label with the slot's name of what is ours.
pub const SLOT: &str = "lvm-cache-friend.slot";

/// And the one with the runner's.
pub const RUNNER: &str = "lvm-cache-friend.runner";

/// A request that Podman did not grant.
#[derive(Debug, thiserror::Error)]
pub enum PodmanError {
    /// Nobody answered.
    #[error("Podman does not answer on {}: {problem}", .socket.display())]
    Away {
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        problem: String,
    },
    /// It was begun, and failed.
    #[error("Podman: {what}: {message}")]
    Failed {
        /// What was asked for.
        what: &'static str,
        /// What Podman said.
        message: String,
    },
    /// It was refused.
    #[error("Podman: {what}: {status}: {message}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// The status.
        status: StatusCode,
        /// What Podman said.
        message: String,
    },
}

/// A client.
pub struct Podman {
    socket: PathBuf,
    client: Client<UnixConnector, Full<Bytes>>,
}

impl fmt::Debug for Podman {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Podman").field(&self.socket).finish()
    }
}

struct Answer {
    what: &'static str,
    status: StatusCode,
    body: Bytes,
}

impl Answer {
    fn expect(&self, wanted: &[u16]) -> Result<(), PodmanError> {
        if wanted.contains(&self.status.as_u16()) {
            return Ok(());
        }
        #[derive(Deserialize)]
        struct Message {
            message: String,
        }
        let message = serde_json::from_slice::<Message>(&self.body).map_or_else(
            |_| String::from_utf8_lossy(&self.body).into_owned(),
            |m| m.message,
        );
        Err(self.refused(&message))
    }

    fn refused(&self, message: &str) -> PodmanError {
        PodmanError::Refused {
            what: self.what,
            status: self.status,
            message: printable(message.trim()),
        }
    }

    fn json<T: DeserializeOwned>(&self) -> Result<T, PodmanError> {
        self.expect(&[200, 201])?;
        // Podman says null for an empty list.
        let text: &[u8] = if self.body.trim_ascii() == b"null" {
            b"[]"
        } else {
            &self.body
        };
        serde_json::from_slice(text).map_err(|e| self.refused(&format!("its answer: {e}")))
    }
}

impl Podman {
    /// A client of the service on this socket; nothing is asked yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            // A connection for each request: Podman's service ends where it has nothing to do for 5 s, and one that was kept may
            // break just as it is used again.
            client: Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(0)
                .build(UnixConnector),
        }
    }

    async fn ask(
        &self,
        what: &'static str,
        method: Method,
        path: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<Answer, PodmanError> {
        let away = |problem: String| PodmanError::Away {
            socket: self.socket.clone(),
            problem,
        };
        let path = format!("/{VERSION}/libpod/{path}");
        let uri: axum::http::Uri = hyperlocal::Uri::new(&self.socket, &path).into();
        let mut request = Request::builder().method(method).uri(uri);
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                body.to_string().into()
            }
            None => Bytes::new(),
        };
        let request = request
            .body(Full::new(body))
            .map_err(|e| away(format!("{what}: {e}")))?;
        let whole = async {
            let response = self.client.request(request).await;
            let response = response.map_err(|e| {
                let cause = std::error::Error::source(&e).map(ToString::to_string);
                away(cause.unwrap_or_else(|| e.to_string()))
            })?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            Ok(Answer {
                what,
                status: parts.status,
                body: body.map_err(|e| away(e.to_string()))?.to_bytes(),
            })
        };
        tokio::time::timeout(timeout, whole)
            .await
            .unwrap_or_else(|_| {
                Err(away(format!(
                    "{what}: no answer within {} s",
                    timeout.as_secs()
                )))
            })
    }

    async fn get(&self, what: &'static str, path: &str) -> Result<Answer, PodmanError> {
        self.ask(what, Method::GET, path, None, TIMEOUT).await
    }

    async fn post(
        &self,
        what: &'static str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, PodmanError> {
        self.ask(what, Method::POST, path, body, TIMEOUT).await
    }

    async fn delete(&self, what: &'static str, path: &str) -> Result<(), PodmanError> {
        let answer = self.ask(what, Method::DELETE, path, None, TIMEOUT).await?;
        answer.expect(&[200, 204, 404])
    }

    /// The containers of a slot.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn containers(&self, slot: &str) -> Result<Vec<Container>, PodmanError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Listed {
            id: String,
            state: String,
            #[serde(default, rename = "ImageID")]
            image: String,
            #[serde(default)]
            exit_code: i32,
            #[serde(default)]
            started_at: i64,
            #[serde(default)]
            exited_at: i64,
            labels: BTreeMap<String, String>,
        }
        let path = format!("containers/json?all=true&filters={}", filter(&of(slot)));
        let listed: Vec<Listed> = self.get("listing containers", &path).await?.json()?;
        let time = |at: i64| u64::try_from(at).unwrap_or(0);
        Ok(listed
            .into_iter()
            .map(|c| Container {
                state: match c.state.as_str() {
                    "created" | "configured" | "initialized" => State::Created,
                    "running" | "paused" => State::Running(time(c.started_at)),
                    "exited" | "stopped" => State::Exited(c.exit_code, time(c.exited_at)),
                    _ => State::Changing,
                },
                runner: c.labels.get(RUNNER).cloned().unwrap_or_default(),
                image: c.image,
                id: c.id,
            })
            .collect())
    }

    /// The slots, of whatever pool, that have containers.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn slots(&self) -> Result<BTreeSet<String>, PodmanError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Listed {
            labels: BTreeMap<String, String>,
        }
        let path = format!("containers/json?all=true&filters={}", filter(SLOT));
        let listed: Vec<Listed> = self.get("listing containers", &path).await?.json()?;
        let slots = listed.into_iter();
        Ok(slots.filter_map(|mut c| c.labels.remove(SLOT)).collect())
    }

    /// Removes the volumes of a slot that no container has. One that Podman knows and its driver does not, as
    /// after a crash of either, goes too; as long as it is there, Podman lists no volumes to anybody.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn prune_volumes(&self, slot: &str) -> Result<(), PodmanError> {
        let path = format!("volumes/prune?filters={}", filter(&of(slot)));
        let answer = self.post("removing volumes", &path, None).await?;
        answer.expect(&[200])
    }

    /// Makes a volume of ours, where there is none of that name.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn create_volume(
        &self,
        name: &str,
        options: &BTreeMap<String, String>,
        labels: &BTreeMap<&str, String>,
    ) -> Result<(), PodmanError> {
        let there = self
            .get("looking for a volume", &format!("volumes/{name}/exists"))
            .await?;
        if there.status == StatusCode::NO_CONTENT {
            return Ok(());
        }
        let volume = json!({
            "Name": name,
            "Driver": "lvm-cache-friend",
            "Options": options,
            "Label": labels,
        });
        let answer = self
            .post("making a volume", "volumes/create", Some(&volume))
            .await?;
        answer.expect(&[200, 201])
    }

    /// Removes a volume, where it is there.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn remove_volume(&self, name: &str) -> Result<(), PodmanError> {
        self.delete("removing a volume", &format!("volumes/{name}"))
            .await
    }

    /// The id of an image; `None` where it is not there.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn image_id(&self, image: &str) -> Result<Option<String>, PodmanError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Image {
            id: String,
        }
        let path = format!("images/{image}/json");
        let answer = self.get("looking at the image", &path).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        Ok(Some(answer.json::<Image>()?.id))
    }

    /// Pulls an image by one of Podman's policies, such as `missing` or `newer`.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn pull(&self, image: &str, policy: &str) -> Result<(), PodmanError> {
        #[derive(Deserialize)]
        struct Told {
            error: Option<String>,
        }
        let path = format!("images/pull?reference={image}&policy={policy}&quiet=true");
        let what = "pulling the image";
        let answer = self.ask(what, Method::POST, &path, None, PULL_TIMEOUT);
        let answer = answer.await?;
        answer.expect(&[200])?;
        // One object after another; that it failed is said in one.
        let told = serde_json::Deserializer::from_slice(&answer.body).into_iter::<Told>();
        match told.flatten().find_map(|told| told.error) {
            Some(error) => Err(PodmanError::Failed {
                what,
                message: printable(error.trim()),
            }),
            None => Ok(()),
        }
    }

    /// What a label of an image says; `None` where it has none, or an empty one.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn image_label(
        &self,
        image: &str,
        label: &str,
    ) -> Result<Option<String>, PodmanError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Image {
            labels: Option<BTreeMap<String, String>>,
        }
        let path = format!("images/{image}/json");
        let image: Image = self.get("looking at the image", &path).await?.json()?;
        let label = image.labels.and_then(|mut labels| labels.remove(label));
        Ok(label.filter(|text| !text.is_empty()))
    }

    /// Creates a container and gives its id.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn create(&self, spec: &Value) -> Result<String, PodmanError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Created {
            id: String,
        }
        let answer = self
            .post("creating a container", "containers/create", Some(spec))
            .await?;
        Ok(answer.json::<Created>()?.id)
    }

    /// Starts a container; no error where it runs.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn start(&self, id: &str) -> Result<(), PodmanError> {
        let path = format!("containers/{id}/start");
        let answer = self.post("starting a container", &path, None).await?;
        answer.expect(&[204, 304])
    }

    /// Sends a container's first process a signal, `INT` or `KILL`; no error where it does not run.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn signal(&self, id: &str, signal: &str) -> Result<(), PodmanError> {
        let path = format!("containers/{id}/kill?signal={signal}");
        let answer = self.post("ending a container", &path, None).await?;
        answer.expect(&[204, 404, 409])
    }

    /// Returns when a container has ended.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn wait(&self, id: &str) -> Result<(), PodmanError> {
        let path = format!("containers/{id}/wait?condition=exited");
        let day = Duration::from_secs(86_400);
        let answer = self
            .ask("waiting for a container", Method::POST, &path, None, day)
            .await?;
        answer.expect(&[200, 404])
    }

    /// Removes a container that does not run.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn remove(&self, id: &str) -> Result<(), PodmanError> {
        self.delete("removing a container", &format!("containers/{id}?v=false"))
            .await
    }

    /// The last lines that a container wrote.
    ///
    /// # Errors
    /// See [`PodmanError`].
    pub async fn logs(&self, id: &str, lines: u32) -> Result<String, PodmanError> {
        let path = format!("containers/{id}/logs?stdout=true&stderr=true&tail={lines}");
        let answer = self.get("reading a container's log", &path).await?;
        answer.expect(&[200])?;
        Ok(demultiplexed(&answer.body))
    }
}

/// The label of what is a slot's.
fn of(slot: &str) -> String {
    format!("{SLOT}={slot}")
}

/// What has a label, in a query.
fn filter(label: &str) -> String {
    let text = json!({"label": [label]}).to_string();
    // Of a slot's name and JSON's own, these are what a query cannot have.
    text.replace('"', "%22")
        .replace('{', "%7B")
        .replace('}', "%7D")
}

/// The text in the API's stream of frames: 8 bytes, the last four of which say how long it is.
fn demultiplexed(mut stream: &[u8]) -> String {
    let mut text = Vec::new();
    while let Some((head, rest)) = stream.split_at_checked(8) {
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let length = usize::try_from(length)
            .unwrap_or(usize::MAX)
            .min(rest.len());
        text.extend_from_slice(&rest[..length]);
        stream = &rest[length..];
    }
    // It is shown on root's terminal, which is not to be a job's to command.
    let plain = |c: char| {
        if c.is_control() && !matches!(c, '\n' | '\t') {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    String::from_utf8_lossy(&text).chars().map(plain).collect()
}
