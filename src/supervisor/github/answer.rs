// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What GitHub answers, and for how long a refusal asks to be left alone.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;

use crate::supervisor::secret::SecretError;
use crate::text::printable;

/// How long to keep still after a rate limit that does not say how long: "at least one minute".
const KEEP_STILL: Duration = Duration::from_secs(60);

/// Longest time that a refusal is believed to ask for.
const LONGEST: Duration = Duration::from_secs(3600);

/// A request that was not granted.
#[derive(Debug, thiserror::Error)]
pub enum GitHubError {
    /// We cannot say who we are.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The client cannot be made.
    #[error("{0}")]
    Setup(String),
    /// Nobody answered, or not to the end.
    #[error("{what}: {problem}")]
    Away {
        /// Method and path.
        what: String,
        /// What went wrong.
        problem: String,
    },
    /// It was refused.
    #[error("{what}: {status}: {message}")]
    Refused {
        /// Method and path.
        what: String,
        /// The status.
        status: StatusCode,
        /// What GitHub said.
        message: String,
        /// When it may be asked again.
        retry: Option<Duration>,
    },
    /// The answer is not of the documented shape.
    #[error("{what}: unexpected answer: {problem}")]
    Odd {
        /// Method and path.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no runner group of that name.
    #[error("there is no runner group {0:?}, or the credential cannot read it")]
    NoGroup(String),
    /// It was not asked, as it said to be left alone until then.
    #[error("GitHub asked to wait for another {} s", .0.as_secs())]
    Still(Duration),
}

impl GitHubError {
    /// The status of a refusal.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// For how long GitHub wants to be left alone.
    #[must_use]
    pub fn retry(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry, .. } => *retry,
            Self::Still(rest) => Some(*rest),
            _ => None,
        }
    }
}

/// An answer of any status.
pub(super) struct Answer {
    pub(super) what: String,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Answer {
    /// Its body, where its status is that.
    pub fn json<T: DeserializeOwned>(&self, status: StatusCode) -> Result<T, GitHubError> {
        self.expect(&[status])?;
        // The Actions service begins some bodies with a byte order mark.
        let body = self.body.strip_prefix(b"\xef\xbb\xbf");
        serde_json::from_slice(body.unwrap_or(&self.body)).map_err(|e| GitHubError::Odd {
            what: self.what.clone(),
            // serde_json's message may quote a value: secrets are among them.
            problem: format!("line {} column {}", e.line(), e.column()),
        })
    }

    /// Whether it has no body.
    pub fn is_empty(&self) -> bool {
        let body = self.body.strip_prefix(b"\xef\xbb\xbf");
        body.unwrap_or(&self.body).trim_ascii().is_empty()
    }

    pub fn expect(&self, wanted: &[StatusCode]) -> Result<StatusCode, GitHubError> {
        if wanted.contains(&self.status) {
            return Ok(self.status);
        }
        #[derive(serde::Deserialize)]
        struct Message {
            message: String,
            #[serde(rename = "typeName", default)]
            kind: String,
        }
        if self.status.is_redirection() {
            return Err(GitHubError::Refused {
                what: self.what.clone(),
                status: self.status,
                retry: None,
                message:
                    "it is elsewhere now; a repository that was renamed needs its new name in url"
                        .into(),
            });
        }
        let message = serde_json::from_slice::<Message>(&self.body)
            .map(|m| format!("{} {}", m.message, m.kind))
            .unwrap_or_else(|_| String::from_utf8_lossy(&self.body).into_owned());
        Err(GitHubError::Refused {
            what: self.what.clone(),
            status: self.status,
            retry: keep_still(self.status, &self.headers, &message, SystemTime::now()),
            message: printable(message.trim()),
        })
    }
}

/// How long a refusal asks to be left alone. "If the retry-after response header is present, you
/// should not retry your request until after that many seconds has elapsed. If the
/// x-ratelimit-remaining header is 0, [not] until after the time specified by the x-ratelimit-reset
/// header. Otherwise, wait for at least one minute."
fn keep_still(
    status: StatusCode,
    headers: &HeaderMap,
    message: &str,
    now: SystemTime,
) -> Option<Duration> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let number = |name: &str| header(name).and_then(|text| text.trim().parse::<u64>().ok());
    let seconds = number("retry-after").or_else(|| {
        let exhausted = number("x-ratelimit-remaining") == Some(0);
        let reset = number("x-ratelimit-reset").filter(|_| exhausted)?;
        Some(reset.saturating_sub(date(headers, now)).saturating_add(1))
    });
    let limited = status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::FORBIDDEN && message.to_lowercase().contains("rate limit");
    let asked = status == StatusCode::FORBIDDEN || status.is_server_error() || limited;
    seconds
        .filter(|_| asked)
        .map(Duration::from_secs)
        .or(limited.then_some(KEEP_STILL))
        .map(|rest| rest.min(LONGEST))
}

/// When it was answered, seconds since 1970 by GitHub's own clock, where it says so: ours, `now`, may be off.
pub(super) fn date(headers: &HeaderMap, now: SystemTime) -> u64 {
    let theirs = headers.get(header::DATE);
    let theirs = theirs.and_then(|date| http_date(date.to_str().ok()?));
    theirs.unwrap_or_else(|| now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Seconds since 1970 of an HTTP date.
fn http_date(text: &str) -> Option<u64> {
    let time = jiff::fmt::rfc2822::parse(text).ok()?;
    time.timestamp().as_second().try_into().ok()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn when_to_ask_again() {
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        for (status, headers, message, want) in [
            (429, &[("retry-after", "7")][..], "", Some(7)),
            (429, &[], "", Some(60)),
            (403, &[("retry-after", "7")], "", Some(7)),
            (
                403,
                &[],
                "You have exceeded a secondary rate limit.",
                Some(60),
            ),
            (403, &[], "Resource not accessible by integration", None),
            (
                403,
                &[
                    ("x-ratelimit-remaining", "5"),
                    ("x-ratelimit-reset", "1700000030"),
                ],
                "",
                None,
            ),
            (
                403,
                &[
                    ("x-ratelimit-remaining", "0"),
                    ("x-ratelimit-reset", "1700000030"),
                ],
                "",
                Some(31),
            ),
            // An hour ahead of us.
            (
                403,
                &[
                    ("x-ratelimit-remaining", "0"),
                    ("x-ratelimit-reset", "1700003630"),
                    ("date", "Tue, 14 Nov 2023 23:13:20 GMT"),
                ],
                "",
                Some(31),
            ),
            (
                403,
                &[
                    ("x-ratelimit-remaining", "0"),
                    ("x-ratelimit-reset", "18446744073709551615"),
                    ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
                ],
                "",
                Some(3600),
            ),
            (503, &[("retry-after", "3")], "", Some(3)),
            (503, &[], "", None),
            (429, &[("retry-after", "999999999")], "", Some(3600)),
            (404, &[("retry-after", "3")], "", None),
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.insert(*name, HeaderValue::from_static(value));
            }
            let status = StatusCode::from_u16(status).unwrap();
            let rest = keep_still(status, &map, message, now);
            assert_eq!(
                rest.map(|rest| rest.as_secs()),
                want,
                "{status} {headers:?} {message}"
            );
        }
    }
}
