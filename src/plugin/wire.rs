// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine's results as answers: what of it becomes JSON, and with which status an error is refused.

use serde::{Deserialize, Serialize};

use axum::http::StatusCode;

use crate::api::volumes::Volume;
use crate::engine::bounds::Evicted;
use crate::engine::{self, EngineError, VolumeView};
use crate::http::answer::Refusal;
use crate::storage::StoreError;
use crate::text::rfc3339;

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

/// The answer to Friend.Gc.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Evictions {
    /// What went, or would.
    pub evicted: Vec<Evicted>,
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

#[cfg(test)]
mod tests {
    use axum::http::header;
    use axum::response::IntoResponse as _;
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::api::volumes::{Activated, Capabilities, Done, Many, One};
    use crate::cache::names::VolumeName;
    use crate::http::answer::{MEDIA_TYPE, ok};

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
