// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers: JSON, with a status of 200 or a [`Refusal`].

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::text::printable;

/// The volume-plugin protocol's media type, which all answers have. Podman and dockerd look at the body alone; others
/// that speak to plugins expect it.
pub const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

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

/// A request that is refused or failed: a status of 4xx or 5xx, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its status.
    pub status: StatusCode,
    /// Why; one printable line.
    pub message: String,
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
