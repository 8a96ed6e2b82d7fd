// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bodies of requests: read whole, within bounds.

use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequest;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt as _;

use super::answer::Refusal;

/// Longest body that is read into memory, in bytes. The longest that makes sense,
/// a Create with criteria of many tags, has some tens of KiB.
const MAX_BODY: usize = 1 << 20;

/// How much more of a body is read, and thrown away, before it is refused: a
/// client that is still writing would see a broken pipe instead of the answer.
const MAX_DRAIN: usize = 64 << 20;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A request's body, read whole, whatever its Content-Type.
pub(crate) struct Payload(pub(crate) Vec<u8>);

impl<S: Sync> FromRequest<S> for Payload {
    type Rejection = Refusal;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, Refusal> {
        tokio::time::timeout(BODY_TIMEOUT, read(request.into_body()))
            .await
            .unwrap_or_else(|_| {
                Err(Refusal::new(
                    StatusCode::REQUEST_TIMEOUT,
                    format!(
                        "the request's body did not arrive within {} s",
                        BODY_TIMEOUT.as_secs()
                    ),
                ))
            })
            .map(Self)
    }
}

async fn read(mut body: Body) -> Result<Vec<u8>, Refusal> {
    let mut kept = Vec::new();
    let mut seen = 0;
    while seen <= MAX_DRAIN
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|e| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                format!("the request's body cannot be read: {e}"),
            )
        })?;
        if let Some(data) = frame.data_ref() {
            seen += data.len();
            if seen <= MAX_BODY {
                kept.extend_from_slice(data);
            }
        }
    }
    if seen > MAX_BODY {
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request's body has more than {MAX_BODY} bytes"),
        ));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn bodies_are_bounded() {
        for (size, fits) in [(0, true), (MAX_BODY, true), (MAX_BODY + 1, false)] {
            match read(Body::from(vec![b' '; size])).await {
                Ok(kept) => assert!(fits && kept.len() == size, "{size}"),
                Err(refusal) => {
                    assert!(!fits, "{size}");
                    assert_eq!(refusal.status, StatusCode::PAYLOAD_TOO_LARGE);
                }
            }
        }
    }
}
