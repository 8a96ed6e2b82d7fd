// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon is asked of volumes, and its answers: the volume-plugin protocol's JSON, version 1.2, and
//! what hooks and the supervisor report of containers.
//!
//! Read leniently, for Podman and dockerd differ: Podman leaves `Opts` out when it
//! is empty and sends no body at all to List; dockerd sends `"Opts":null`, and
//! no Content-Type. Written strictly: Podman takes any status but 200 for an error and
//! *ignores* `Err` in a 200 (libpod/plugin/volume_api.go), while an empty `Err`
//! becomes "empty error from plugin": so each refusal has a status of 4xx or 5xx
//! and a text.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cache::names::{BadName, VolumeName};
use crate::cache::verdict::Verdict;
use crate::http::answer::Refusal;
use crate::userns::{IdMap, Ids};

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
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Use {
    /// The container's id.
    pub container: String,
    /// Those of our volumes that it has.
    pub volumes: Vec<String>,
    /// How it ended, once it has, where that is known.
    #[serde(default)]
    pub exit_code: Option<i32>,
    /// Its first process, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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

impl From<BadName> for Refusal {
    fn from(error: BadName) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error.to_string())
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

/// The answer to Mount and Path.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Mountpoint {
    /// Where the volume is mounted; empty (Path only) where it is not.
    pub mountpoint: String,
}

/// The answer to Get.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct One {
    /// The volume.
    pub volume: Volume,
}

/// The answer to List.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Many {
    /// The volumes.
    pub volumes: Vec<Volume>,
}

/// A volume, as Get and List show it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Volume {
    /// Its name.
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mountpoint: Option<String>,
    // dockerd decodes a time.Time: RFC 3339 or absent, anything else breaks its List.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) created_at: Option<String>,
    /// What became of it: see docs/.
    pub status: serde_json::Map<String, serde_json::Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
