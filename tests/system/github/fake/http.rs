// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests and answers, and the faults that are between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::State as Shared;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::Response;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Asked, FaultKind, State};

/// How long a poll of the queue waits; the real one waits some 50 s.
const POLL: Duration = Duration::from_millis(500);

pub(super) type Said = Result<(StatusCode, Value), Refused>;

/// A refusal, as GitHub words it; a violation where the request could never be right.
pub(super) struct Refused {
    pub status: StatusCode,
    pub message: String,
    pub violation: bool,
    /// Its type, as the Actions service says it.
    pub kind: Option<&'static str>,
    /// Where it is instead.
    pub location: Option<String>,
}

pub(super) fn refused(status: u16, message: impl Into<String>) -> Refused {
    Refused {
        status: StatusCode::from_u16(status).unwrap(),
        message: message.into(),
        violation: false,
        kind: None,
        location: None,
    }
}

pub(super) fn violation(message: impl Into<String>) -> Refused {
    Refused {
        violation: true,
        ..refused(400, message)
    }
}

pub(super) async fn answer(
    Shared(state): Shared<Arc<Mutex<State>>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().to_owned();
    let standin = path.starts_with("/standin/");
    let fault = (!standin)
        .then(|| {
            state
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .fault(&format!("{method} {path}"))
        })
        .flatten();
    let mut dropped = false;
    let mut extra = Vec::new();
    let said = match fault {
        Some(FaultKind::Status(status, headers, message)) => {
            extra = headers;
            Err(refused(status, message))
        }
        Some(FaultKind::Empty) => Ok((StatusCode::OK, Value::Null)),
        Some(FaultKind::Dropped) => {
            dropped = true;
            Ok((StatusCode::OK, Value::Null))
        }
        other => {
            if let Some(FaultKind::Slow(by)) = other {
                tokio::time::sleep(by).await;
            }
            dropped = matches!(other, Some(FaultKind::DroppedAfter));
            poll(&state, &method, &uri, &headers, &body).await
        }
    };
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let (status, value) = match said {
        Ok(said) => said,
        Err(refused) => {
            if refused.violation {
                let text = format!("{method} {uri}: {}", refused.message);
                state.violations.push(text);
            }
            extra.extend(refused.location.map(|to| ("location", to)));
            let mut body = json!({"message": refused.message, "documentation_url": "https://docs.github.com/rest"});
            if let Some(kind) = refused.kind {
                body["typeName"] = kind.into();
            }
            (refused.status, body)
        }
    };
    if path.starts_with("/repos") || path.starts_with("/orgs/") {
        let reset = state.now().next_multiple_of(3600);
        extra.extend([
            ("x-ratelimit-limit", "5000".to_owned()),
            ("x-ratelimit-remaining", state.remaining.to_string()),
            ("x-ratelimit-reset", reset.to_string()),
        ]);
    }
    if !standin {
        state.asked.push(Asked {
            path,
            at: Instant::now(),
        });
    }
    let now = state.now();
    drop(state);
    let date = jiff::Timestamp::from_second(now as i64).unwrap();
    let date = jiff::fmt::rfc2822::DateTimePrinter::new()
        .timestamp_to_rfc9110_string(&date)
        .unwrap();
    let mut response = Response::builder()
        .status(status)
        .header(header::DATE, date)
        .header(header::CONTENT_TYPE, "application/json; charset=utf-8");
    for (name, value) in extra {
        response = response.header(name, value);
    }
    if dropped {
        let body = axum::body::Body::new(Broken);
        return response
            .header(header::CONTENT_LENGTH, 1000)
            .body(body)
            .unwrap();
    }
    let text = match (status, value) {
        (StatusCode::NO_CONTENT | StatusCode::ACCEPTED, _) | (_, Value::Null) => String::new(),
        (_, Value::String(text)) => text,
        (_, value) => value.to_string(),
    };
    response.body(Body::from(text)).unwrap()
}

/// A body that ends with an error.
struct Broken;

impl hyper::body::Body for Broken {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, std::io::Error>>> {
        std::task::Poll::Ready(Some(Err(std::io::ErrorKind::ConnectionReset.into())))
    }
}

/// Answers; what polls waits for a moment.
async fn poll(
    state: &Mutex<State>,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: &[u8],
) -> Said {
    let until = Instant::now() + POLL;
    loop {
        {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let said = state.say(method, uri, headers, body);
            if !matches!(said, Ok((StatusCode::ACCEPTED, _))) {
                return said;
            }
            if Instant::now() >= until {
                // Both mean that there is nothing.
                state.empties = !state.empties && uri.path().starts_with("/queue/");
                return match state.empties {
                    true => Ok((StatusCode::OK, Value::Null)),
                    false => said,
                };
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A body of exactly this shape.
pub(super) fn exact<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|e| violation(format!("body: {e}")))
}

pub(super) fn empty(body: &[u8]) -> Result<(), Refused> {
    match body {
        b"" | b"{}" => Ok(()),
        _ => Err(violation("a body where none is documented")),
    }
}

pub(super) fn query(uri: &Uri, known: &[&str]) -> Result<BTreeMap<String, String>, Refused> {
    let pairs = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if known.contains(&key) {
                Ok((key.to_owned(), value.replace("%20", " ")))
            } else {
                Err(violation(format!("query {key}")))
            }
        })
        .collect()
}

pub(super) fn get(headers: &HeaderMap, name: &str) -> String {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}
