// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What clients send and get: the volume-plugin protocol's JSON, version 1.2.
//!
//! Read leniently, for Podman and dockerd differ: Podman leaves `Opts` out when it
//! is empty and sends no body at all to List; dockerd sends `"Opts":null`, and
//! no Content-Type. Written strictly: Podman takes any status but 200 for an error and
//! *ignores* `Err` in a 200 (libpod/plugin/volume_api.go), while an empty `Err`
//! becomes "empty error from plugin": so each refusal has a status of 4xx or 5xx
//! and a text.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cache::names::{BadName, VolumeName};
use crate::cache::verdict::Verdict;
use crate::engine::bounds::Evicted;
use crate::engine::{self, EngineError, VolumeView};
use crate::storage::StoreError;
use crate::text::{printable, rfc3339};
use crate::userns::{IdMap, Ids};

/// The protocol's media type. Podman and dockerd look at the body alone; others
/// that speak to plugins expect it.
pub const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// Longest id of a client, in bytes. Podman's and dockerd's have 64.
const MAX_ID: usize = 256;

/// The body of any request.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Request {
    #[serde(rename = "Name")]
    name: Option<String>,
    #[serde(rename = "ID")]
    id: Option<String>,
    #[serde(rename = "Opts")]
    opts: Option<BTreeMap<String, String>>,
}

impl Request {
    /// Reads a body; an empty one says nothing.
    ///
    /// # Errors
    /// When it is no JSON object, or a member has the wrong type.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let bad = |problem: &dyn std::fmt::Display| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                format!(
                    "the request's body is not what the protocol asks for \
                     ({{\"Name\":TEXT,\"ID\":TEXT,\"Opts\":{{TEXT:TEXT}}}}): {problem}"
                ),
            )
        };
        match body.trim_ascii_start().first() {
            None => Ok(Self::default()),
            // serde would take an array for an object's members in order.
            Some(b'{') => serde_json::from_slice(body).map_err(|e| bad(&e)),
            Some(_) => Err(bad(&"it is not a JSON object")),
        }
    }

    /// The volume's name.
    ///
    /// # Errors
    /// When it is missing or cannot be one.
    pub fn name(&self) -> Result<VolumeName, Refusal> {
        match &self.name {
            Some(name) => Ok(name.parse()?),
            None => Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "the request's body has no Name",
            )),
        }
    }

    /// The client's id; empty where it gave none.
    ///
    /// # Errors
    /// When it is too long to be kept.
    pub fn id(&self) -> Result<String, Refusal> {
        let id = self.id.clone().unwrap_or_default();
        if id.len() > MAX_ID {
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                format!("ID has {} bytes: at most {MAX_ID} are accepted", id.len()),
            ));
        }
        Ok(id)
    }

    /// The volume's options.
    #[must_use]
    pub fn into_options(self) -> BTreeMap<String, String> {
        self.opts.unwrap_or_default()
    }
}

/// What a hook says of a container: that it starts, or how it ended.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Use {
    /// The container's id.
    pub container: String,
    volumes: Vec<String>,
    #[serde(default)]
    exit_code: Option<i32>,
    /// Its first process, once it has one.
    #[serde(default)]
    pub pid: Option<i32>,
}

impl Use {
    /// Reads a body.
    ///
    /// # Errors
    /// When it is not of this shape, or the container's id is too long to be kept.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let of: Self = parse(body)?;
        if of.container.is_empty() || of.container.len() > MAX_ID {
            let problem = format!("Container has 1 to {MAX_ID} bytes");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, problem));
        }
        Ok(of)
    }

    /// The volumes' names.
    ///
    /// # Errors
    /// When one cannot be a name.
    pub fn names(&self) -> Result<Vec<VolumeName>, Refusal> {
        names(&self.volumes)
    }

    /// How it ended. A signal is a failure too, the one that the kernel sends for want of
    /// memory among them: its exit code is 128 and more.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.exit_code {
            Some(0) => Verdict::Success,
            Some(_) => Verdict::Failure,
            None => Verdict::Unknown,
        }
    }
}

/// That entries are to be evicted.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Gc {
    /// Only to say which.
    pub dry_run: bool,
}

impl Gc {
    /// Reads a body.
    ///
    /// # Errors
    /// When it is not of this shape.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        parse(body)
    }
}

/// The answer to that.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Evictions {
    /// What went, or would.
    pub evicted: Vec<Evicted>,
}

/// What a hook says of a container that is about to start.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Start {
    volumes: Vec<String>,
    #[serde(default)]
    uid_mappings: IdMap,
    #[serde(default)]
    gid_mappings: IdMap,
}

impl Start {
    /// Reads a body.
    ///
    /// # Errors
    /// When it is not of this shape.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        parse(body)
    }

    /// The volumes' names.
    ///
    /// # Errors
    /// When one cannot be a name.
    pub fn names(&self) -> Result<Vec<VolumeName>, Refusal> {
        names(&self.volumes)
    }

    /// The ids that the container will have on this host, if somebody with the ids `outer` starts it.
    ///
    /// # Errors
    /// When no user namespace can have them.
    pub fn ids(&self, outer: &Ids) -> Result<Ids, Refusal> {
        let ids = Ids::made_in(outer, &self.uid_mappings, &self.gid_mappings);
        ids.map_err(|problem| Refusal::new(StatusCode::BAD_REQUEST, problem))
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|e| {
        let problem = format!("not a hook's report of a container: {e}");
        Refusal::new(StatusCode::BAD_REQUEST, problem)
    })
}

fn names(names: &[String]) -> Result<Vec<VolumeName>, Refusal> {
    let names = names.iter();
    Ok(names.map(|name| name.parse()).collect::<Result<_, _>>()?)
}

/// A request that is refused or failed: a status of 4xx or 5xx, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    /// A refusal; `message` is made printable, and cut where it is too long.
    #[must_use]
    pub fn new(status: StatusCode, message: impl AsRef<str>) -> Self {
        Self {
            status,
            message: printable(message.as_ref()),
        }
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Why; one printable line.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<BadName> for Refusal {
    fn from(error: BadName) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.to_string())
    }
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        let status = match &error {
            EngineError::NoSuchVolume(_) | EngineError::Miss(_) => StatusCode::NOT_FOUND,
            EngineError::Exists(_) | EngineError::InUse { .. } => StatusCode::CONFLICT,
            EngineError::Option(_) | EngineError::Job(_) | EngineError::TooLarge(_) => {
                StatusCode::BAD_REQUEST
            }
            EngineError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            EngineError::Store(StoreError::Full { .. }) => StatusCode::INSUFFICIENT_STORAGE,
            EngineError::Store(StoreError::Timeout { .. }) => StatusCode::GATEWAY_TIMEOUT,
            EngineError::Damaged(_) | EngineError::Store(_) | EngineError::Io { .. } => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Error<'a> {
            err: &'a str,
        }
        respond(self.status, &Error { err: &self.message })
    }
}

/// The answer to Create, Remove and Unmount.
#[derive(Debug, Serialize)]
pub struct Done {}

/// The answer to Plugin.Activate.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Activated {
    implements: [&'static str; 1],
}

impl Default for Activated {
    fn default() -> Self {
        Self {
            implements: ["VolumeDriver"],
        }
    }
}

/// The answer to Capabilities.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Capabilities {
    capabilities: CapabilitySet,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct CapabilitySet {
    scope: &'static str,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            capabilities: CapabilitySet { scope: "local" },
        }
    }
}

/// The answer to Friend.Stats.
#[derive(Debug, Serialize, Deserialize)]
pub struct Stats {
    /// The daemon's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// What it has counted.
    #[serde(flatten)]
    pub stats: engine::Stats,
}

/// The answer to Mount and Path.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Mountpoint {
    /// Where the volume is mounted; empty (Path only) where it is not.
    pub mountpoint: String,
}

/// The answer to Get.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct One {
    /// The volume.
    pub volume: Volume,
}

/// The answer to List.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Many {
    /// The volumes.
    pub volumes: Vec<Volume>,
}

/// A volume, as Get and List show it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Volume {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mountpoint: Option<String>,
    // dockerd decodes a time.Time: RFC 3339 or absent, anything else breaks its List.
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    status: serde_json::Map<String, serde_json::Value>,
}

impl From<VolumeView> for Volume {
    fn from(view: VolumeView) -> Self {
        Self {
            name: view.name.to_string(),
            mountpoint: view.mountpoint.map(|p| p.display().to_string()),
            created_at: rfc3339(view.created),
            status: view.status,
        }
    }
}

/// An answer of 200.
pub fn ok(body: &impl Serialize) -> Response {
    respond(StatusCode::OK, body)
}

fn respond(status: StatusCode, body: &impl Serialize) -> Response {
    let json = serde_json::to_vec(body).expect("answers have text keys and no foreign types");
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;

    /// A body and what it says: name, id, options; or a word of its refusal.
    type Case<'a> = (&'a [u8], Result<(Option<&'a str>, &'a str, usize), &'a str>);

    #[test]
    fn bodies() {
        let cases: &[Case] = &[
            (b"", Ok((None, "", 0))),
            (b" \n", Ok((None, "", 0))),
            (b"{}", Ok((None, "", 0))),
            (b"{}\n", Ok((None, "", 0))),
            (br#"{"Name":"v1"}"#, Ok((Some("v1"), "", 0))),
            (br#"{"Name":"v1","Opts":null}"#, Ok((Some("v1"), "", 0))),
            (
                br#"{"Name":"v1","Opts":{"SIZE":"3G","nocopy":"","o":"size=3G"}}"#,
                Ok((Some("v1"), "", 3)),
            ),
            (br#"{"Name":"v1","ID":"ab"}"#, Ok((Some("v1"), "ab", 0))),
            (br#"{"Name":"v1","Later":[1,{}]}"#, Ok((Some("v1"), "", 0))),
            (br#"["v1","ab"]"#, Err("not a JSON object")),
            (br#""v1""#, Err("not a JSON object")),
            (b"7", Err("not a JSON object")),
            (b"null", Err("not a JSON object")),
            (br#"{"Name":5}"#, Err("integer `5`")),
            (br#"{"Name":["v1"]}"#, Err("invalid type")),
            (br#"{"Name":"v1","ID":{}}"#, Err("invalid type")),
            (br#"{"Name":"v1","Opts":{"size":3}}"#, Err("integer `3`")),
            (br#"{"Name":"v1","Opts":["a"]}"#, Err("invalid type")),
            (br#"{"Name":"v1""#, Err("EOF")),
            (br#"{"Name":"v1"} x"#, Err("trailing")),
            (b"{\"Name\":\"\xff\"}", Err("unicode")),
        ];
        for (body, want) in cases {
            let shown = String::from_utf8_lossy(body);
            match (Request::parse(body), want) {
                (Ok(got), Ok((name, id, options))) => {
                    assert_eq!(got.name.as_deref(), *name, "{shown}");
                    assert_eq!(got.id().as_deref(), Ok(*id), "{shown}");
                    assert_eq!(got.into_options().len(), *options, "{shown}");
                }
                (Err(got), Err(word)) => {
                    assert_eq!(got.status, StatusCode::BAD_REQUEST, "{shown}");
                    assert!(got.message.contains(word), "{shown}: {}", got.message);
                }
                (got, want) => panic!("{shown}: {got:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn names_and_ids_that_cannot_be() {
        let long = "a".repeat(5000);
        for name in ["", ".", "..", "a/b", "a\0b", "-a", "é", "a b", &long] {
            let request = Request {
                name: Some(name.into()),
                ..Request::default()
            };
            let refusal = request.name().expect_err("no name");
            assert_eq!(refusal.status, StatusCode::BAD_REQUEST, "{name:?}");
            assert!(refusal.message.len() < 400, "{}", refusal.message);
            assert!(!refusal.message.contains('\0'));
        }
        let request = Request {
            id: Some(long),
            ..Request::default()
        };
        assert_eq!(
            request.id().expect_err("too long").status,
            StatusCode::BAD_REQUEST
        );
    }

    #[test]
    fn each_failure_has_a_status_and_a_text() {
        let name: VolumeName = "v1".parse().expect("a name");
        let store = || "VG/pool".to_owned();
        for (error, status) in [
            (EngineError::NoSuchVolume(name.clone()), 404),
            (EngineError::Miss(name.clone()), 404),
            (EngineError::Exists(name), 409),
            (EngineError::Stopping, 503),
            (
                EngineError::Store(StoreError::Full {
                    store: store(),
                    detail: "data 100 %".into(),
                }),
                507,
            ),
            (
                EngineError::Store(StoreError::Timeout {
                    store: store(),
                    seconds: 4,
                }),
                504,
            ),
            (
                EngineError::Io {
                    what: "mounting".into(),
                    source: std::io::ErrorKind::NotFound.into(),
                },
                500,
            ),
        ] {
            let text = error.to_string();
            let refusal = Refusal::from(error);
            assert_eq!(refusal.status.as_u16(), status, "{text}");
            assert_eq!(refusal.message, text);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn answers_on_the_wire() {
        let view = |mountpoint: Option<&str>| VolumeView {
            name: "v1".parse().expect("a name"),
            created: 1_700_000_000,
            mountpoint: mountpoint.map(Into::into),
            status: serde_json::Map::new(),
        };
        let mounted = r#"{"Name":"v1","Mountpoint":"/run/m/v1","CreatedAt":"2023-11-14T22:13:20Z","Status":{}}"#;
        for (response, status, want) in [
            (ok(&Done {}), 200, "{}".to_owned()),
            (
                ok(&Activated::default()),
                200,
                r#"{"Implements":["VolumeDriver"]}"#.into(),
            ),
            (
                ok(&Capabilities::default()),
                200,
                r#"{"Capabilities":{"Scope":"local"}}"#.into(),
            ),
            (
                ok(&Many {
                    volumes: Vec::new(),
                }),
                200,
                r#"{"Volumes":[]}"#.into(),
            ),
            (
                ok(&Many {
                    volumes: vec![view(None).into()],
                }),
                200,
                r#"{"Volumes":[{"Name":"v1","CreatedAt":"2023-11-14T22:13:20Z","Status":{}}]}"#
                    .into(),
            ),
            (
                ok(&One {
                    volume: view(Some("/run/m/v1")).into(),
                }),
                200,
                format!(r#"{{"Volume":{mounted}}}"#),
            ),
            (
                Refusal::new(StatusCode::CONFLICT, "no").into_response(),
                409,
                r#"{"Err":"no"}"#.into(),
            ),
        ] {
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
            let body = response.into_body().collect().await.expect("a body");
            assert_eq!(String::from_utf8_lossy(&body.to_bytes()), want);
        }
    }
}
