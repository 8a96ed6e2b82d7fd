// SPDX-License-Identifier: Apache-2.0 OR MIT
//! GitHub, as far as a supervisor of runners needs it.
//!
//! - this module: requests, and when none may be made
//! - `url`: whose runners they are, and where its API is; `auth`: as whom it is asked
//! - `connect`: connections, TLS, and proxies; `answer`: what comes back, and how long to keep still after a refusal
//! - [`rest`]: registrations and runs
//! - [`scaleset`]: scale sets; [`message`]: what their queues tell
//!
//! Sources: the REST API's documentation, version 2022-11-28 ("REST API endpoints for self-hosted
//! runners", "Rate limits for the REST API", "Best practices for using the REST API"), and the
//! official client of scale sets, github.com/actions/scaleset.

mod answer;
mod auth;
mod connect;
pub mod group;
pub mod message;
pub mod rest;
pub mod scaleset;
mod url;

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header, request};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use tracing::warn;

use self::answer::Answer;
pub use self::answer::GitHubError;
pub use self::auth::Auth;
use self::auth::Credential;
use self::connect::{Client, Connector};
pub use self::url::{Owner, Url, check_api};

/// For a whole answer. A long poll has its own.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Readings at once that jobs wait for. One after the other, a slow answer would hold up all jobs behind it; GitHub allows 100.
const FIRST: usize = 4;

/// So often what is read is looked for where it is now.
const REDIRECTS: usize = 3;

/// A time window's end that is said to be so many seconds from another is the same.
const SAME_WINDOW: u64 = 60;

/// A request to the REST API: what it answers with, and in which of its versions.
fn rest_request(method: Method, uri: String) -> request::Builder {
    Request::builder()
        .method(method)
        .uri(uri)
        .header(header::ACCEPT, "application/vnd.github+json")
        .header("x-github-api-version", "2022-11-28")
}

/// What has limits of its own: the queue's answers say nothing of the REST API's, and the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// The REST API.
    Rest,
    /// The Actions service and its queues.
    Actions,
}

/// A client of one GitHub, for one owner's runners.
pub struct GitHub {
    client: Client,
    credential: Credential,
    api: String,
    /// Whose runners they are.
    url: Url,
    /// One request at a time, as GitHub asks of its clients, but for those below.
    still: tokio::sync::Mutex<()>,
    /// Those that a job waits for wait for none of these.
    first: tokio::sync::Semaphore,
    /// When each side may be asked again.
    until: Mutex<[Option<Instant>; 2]>,
    faults: AtomicU64,
    /// The end of the time window, seconds since 1970 by GitHub's clock, in which it was said that few requests are left.
    low: AtomicU64,
    /// It was said that the repository has another name.
    moved: AtomicBool,
}

impl fmt::Debug for GitHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GitHub")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl GitHub {
    /// A client; nothing is asked yet. To be made within a Tokio runtime.
    ///
    /// # Errors
    /// When the secret cannot be had, or is none.
    pub fn new(url: &Url, api: Option<&str>, auth: &Auth) -> Result<Self, GitHubError> {
        let api = api.map_or_else(|| url.api(), str::to_owned);
        let connector = Connector::new(&api).map_err(GitHubError::Setup)?;
        Ok(Self {
            client: connector.client(),
            credential: Credential::read(auth)?,
            api,
            url: url.clone(),
            still: tokio::sync::Mutex::new(()),
            first: tokio::sync::Semaphore::new(FIRST),
            until: Mutex::new([None; 2]),
            faults: AtomicU64::new(0),
            low: AtomicU64::new(0),
            moved: AtomicBool::new(false),
        })
    }

    /// The host of its API, which its numbers are of.
    #[must_use]
    pub fn host(&self) -> String {
        let (_, rest) = self.api.split_once("://").unwrap_or(("", &self.api));
        let host = rest.split('/').next().unwrap_or_default();
        host.to_ascii_lowercase()
    }

    /// How many requests were not answered, failed there, or were refused because of who asks or how often.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Asks the REST API.
    async fn ask<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Answer, GitHubError> {
        let _turn = self.still.lock().await;
        self.ask_now(method, path, body).await
    }

    /// Asks the REST API for what decides about a job that waits: behind a few others of that kind, and nothing else.
    async fn ask_first(&self, path: &str) -> Result<Answer, GitHubError> {
        let _turn = self.first.acquire().await.expect("never closed");
        self.ask_now(Method::GET, path, None::<&()>).await
    }

    /// What is read is followed to where it is now.
    async fn ask_now<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Answer, GitHubError> {
        let what = format!("{method} {}", path.split('?').next().unwrap_or_default());
        let mut path = path.to_owned();
        for _ in 0..=REDIRECTS {
            self.may_ask(Side::Rest)?;
            let request = rest_request(method.clone(), format!("{}{path}", self.api));
            let asked = async {
                let authorization = self.credential.header(&self.client, &self.api).await?;
                let request = request.header(header::AUTHORIZATION, authorization);
                self.send(what.clone(), request, body, TIMEOUT).await
            };
            let answer = asked.await;
            self.note(Side::Rest, &answer);
            let answer = answer?;
            if answer.status == StatusCode::UNAUTHORIZED {
                self.credential.refused().await;
            }
            match self.elsewhere(&answer) {
                Some(to) if method == Method::GET => path = to,
                _ => return Ok(answer),
            }
        }
        Err(GitHubError::Odd {
            what,
            problem: "it is always elsewhere".to_owned(),
        })
    }

    /// Where the REST API says that what was asked for is now: at the same host, as it is told who we are.
    fn elsewhere(&self, answer: &Answer) -> Option<String> {
        if !matches!(answer.status.as_u16(), 301 | 307 | 308) {
            return None;
        }
        let to = moved(
            &self.api,
            answer.headers.get(header::LOCATION)?.to_str().ok()?,
        )?;
        if answer.status == StatusCode::MOVED_PERMANENTLY
            && !self.moved.swap(true, Ordering::Relaxed)
        {
            warn!(url = %self.url, "it was renamed: set the new name in the configuration, as only reading works with the old one");
        }
        Some(to)
    }

    /// Asks another host, or with another token.
    async fn ask_with<B: Serialize>(
        &self,
        side: Side,
        method: Method,
        uri: &str,
        headers: &[(header::HeaderName, &SecretString)],
        body: Option<&B>,
        timeout: Duration,
    ) -> Result<Answer, GitHubError> {
        let path = uri.split('?').next().unwrap_or_default();
        let what = format!("{method} {path}");
        check_api(path).map_err(|problem| GitHubError::Odd {
            what: what.clone(),
            problem,
        })?;
        self.may_ask(side)?;
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            let mut value =
                HeaderValue::from_str(value.expose_secret()).map_err(|_| GitHubError::Odd {
                    what: what.clone(),
                    problem: "a token that is none".to_owned(),
                })?;
            value.set_sensitive(true);
            request = request.header(name, value);
        }
        let answer = self.send(what, request, body, timeout).await;
        self.note(side, &answer);
        answer
    }

    async fn send<B: Serialize>(
        &self,
        what: String,
        mut request: request::Builder,
        body: Option<&B>,
        timeout: Duration,
    ) -> Result<Answer, GitHubError> {
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body).expect("it has no maps of other keys than text")
            }
            None => Vec::new(),
        };
        self.client.send(what, request, body, timeout).await
    }

    fn may_ask(&self, side: Side) -> Result<(), GitHubError> {
        let until = self.until.lock().expect("never held over a panic")[side as usize];
        match until.and_then(|until| until.checked_duration_since(Instant::now())) {
            Some(rest) if !rest.is_zero() => Err(GitHubError::Still(rest)),
            _ => Ok(()),
        }
    }

    /// A limit is of the credential: that side is not asked by any other request meanwhile.
    fn note(&self, side: Side, answer: &Result<Answer, GitHubError>) {
        // Other refusals are answers like any other: that there is no such runner.
        let is_fault = answer.as_ref().map_or(true, |answer| {
            answer.status.is_server_error() || matches!(answer.status.as_u16(), 401 | 403 | 429)
        });
        self.faults
            .fetch_add(u64::from(is_fault), Ordering::Relaxed);
        let rest = match answer {
            Ok(answer) => {
                self.look_at_limit(&answer.headers);
                let is_error = answer.status.is_client_error() || answer.status.is_server_error();
                answer
                    .expect(&[])
                    .err()
                    .filter(|_| is_error)
                    .and_then(|e| e.retry())
            }
            // Of the request for an installation token.
            Err(error) => error.retry(),
        };
        if let Some(rest) = rest {
            let mut until = self.until.lock().expect("never held over a panic");
            until[side as usize] = Some(Instant::now() + rest);
        }
    }

    /// Says once in each time window that less than a tenth of its requests is left.
    fn look_at_limit(&self, headers: &HeaderMap) {
        let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
        let (Some(limit), Some(left), Some(reset)) = (
            number("x-ratelimit-limit"),
            number("x-ratelimit-remaining"),
            number("x-ratelimit-reset"),
        ) else {
            return;
        };
        let said = self.low.load(Ordering::Relaxed);
        if left < limit / 10 && reset.abs_diff(said) > SAME_WINDOW {
            self.low.store(reset, Ordering::Relaxed);
            let at = i64::try_from(reset).ok();
            let at = at.and_then(|at| jiff::Timestamp::from_second(at).ok());
            let until = at.map_or(String::new(), |at| at.to_string());
            warn!(url = %self.url, left, limit, until, "few requests to GitHub's REST API are left");
        }
    }
}

/// The path below an API's address that a redirect leads to; `None` where that is another host's. An Enterprise Server's
/// address has a path of its own.
fn moved(api: &str, location: &str) -> Option<String> {
    let (api, to): (Uri, Uri) = (api.parse().ok()?, location.parse().ok()?);
    let same = to.scheme() == api.scheme() && to.authority() == api.authority();
    if to.authority().is_some() && !same {
        return None;
    }
    let path = to.path_and_query()?.as_str();
    let own = api.path().trim_end_matches('/');
    let below = path.strip_prefix(own).filter(|rest| rest.starts_with('/'));
    Some(below.unwrap_or(path).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_redirects_lead() {
        let (github, server) = ("https://api.github.com", "https://ghes.example:8443/api/v3");
        for (api, location, want) in [
            (
                github,
                "https://api.github.com/repositories/7?page=2",
                Some("/repositories/7?page=2"),
            ),
            (github, "/repositories/7", Some("/repositories/7")),
            (github, "https://elsewhere.example/repositories/7", None),
            (github, "http://api.github.com/repositories/7", None),
            (
                server,
                "https://ghes.example:8443/api/v3/repositories/7",
                Some("/repositories/7"),
            ),
            (server, "/api/v3/repositories/7", Some("/repositories/7")),
            (server, "/repositories/7", Some("/repositories/7")),
            (server, "https://ghes.example/api/v3/repositories/7", None),
            (github, "@elsewhere.example", None),
        ] {
            assert_eq!(moved(api, location).as_deref(), want, "{api} {location}");
        }
    }
}
