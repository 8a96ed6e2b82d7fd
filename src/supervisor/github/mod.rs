// SPDX-License-Identifier: Apache-2.0 OR MIT
//! GitHub, as far as a supervisor of runners needs it.
//!
//! octocrab has the authentication: a token, or an App's installation tokens, which it renews before
//! they end. Its typed calls throw the headers of refusals away, Retry-After among them, and it has none
//! for enterprises and scale sets; so answers are read here.
//!
//! - this module: requests, answers, and how long to keep still after a refusal
//! - `connect`: connections, TLS, and proxies
//! - [`rest`]: registrations and runs
//! - [`scaleset`]: scale sets; [`message`]: what their queues tell
//!
//! Sources: the REST API's documentation, version 2022-11-28 ("REST API endpoints for self-hosted
//! runners", "Rate limits for the REST API", "Best practices for using the REST API"), and the
//! official client of scale sets, github.com/actions/scaleset.

mod connect;
pub mod message;
pub mod rest;
pub mod scaleset;

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use octocrab::auth::AppAuth;
use octocrab::models::{AppId, InstallationId};
use octocrab::{AuthState, EncodingKey, Octocrab};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::warn;

use self::connect::Connector;
use super::secret::{SecretError, Source};
use crate::plugin::wire::printable;

/// For a whole answer. A long poll has its own.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer, in bytes. A page of 100 runners has some 60 KiB.
const MAX_ANSWER: usize = 8 << 20;

/// How long to keep still after a rate limit that does not say how long: "at least one minute".
const KEEP_STILL: Duration = Duration::from_secs(60);

/// Readings at once that jobs wait for. One after the other, a slow answer would hold up all jobs behind it; GitHub allows 100.
const FIRST: usize = 4;

/// Longest time that a refusal is believed to ask for.
const LONGEST: Duration = Duration::from_secs(3600);

/// So often what is read is looked for where it is now.
const REDIRECTS: usize = 3;

/// A time window's end that is said to be so many seconds from another is the same.
const SAME_WINDOW: u64 = 60;

/// Whose runners they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A repository's: owner and name.
    Repository(String, String),
    /// An organization's.
    Organization(String),
    /// An enterprise's.
    Enterprise(String),
}

impl Owner {
    /// Where its runners are, in the REST API.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Self::Repository(owner, name) => format!("/repos/{owner}/{name}"),
            Self::Organization(name) => format!("/orgs/{name}"),
            Self::Enterprise(name) => format!("/enterprises/{name}"),
        }
    }

    /// `owner/name`, of a repository.
    #[must_use]
    pub fn repository(&self) -> Option<String> {
        match self {
            Self::Repository(owner, name) => Some(format!("{owner}/{name}")),
            _ => None,
        }
    }
}

/// The address of a repository, an organization or an enterprise, as a browser has it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Url {
    text: String,
    host: String,
    scheme: String,
    /// Whose runners they are.
    pub owner: Owner,
}

impl TryFrom<String> for Url {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let problem = || {
            format!(
                "{text:?} is not the address of a repository (https://github.com/OWNER/NAME), of an organization \
                 (https://github.com/NAME) or of an enterprise (https://github.com/enterprises/NAME)"
            )
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(problem)?;
        let (host, path) = rest.split_once('/').ok_or_else(problem)?;
        let names: Vec<_> = path.trim_end_matches('/').split('/').collect();
        let name = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty() && name.chars().all(plain) && !name.starts_with('.')
        };
        if !matches!(scheme, "https" | "http")
            || host.is_empty()
            || host.contains('@')
            || !names.iter().all(|n| name(n))
        {
            return Err(problem());
        }
        check_scheme(scheme, host)?;
        let owner = match names[..] {
            ["enterprises", name] => Owner::Enterprise(name.to_owned()),
            [owner, name] => Owner::Repository(owner.to_owned(), name.to_owned()),
            [name] => Owner::Organization(name.to_owned()),
            _ => return Err(problem()),
        };
        Ok(Self {
            host: host.to_owned(),
            scheme: scheme.to_owned(),
            owner,
            text,
        })
    }
}

/// Whether a host, with or without a port, is this machine by its name.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    let name = name.unwrap_or_default();
    let address = name.parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Refuses to say anything to a host where others may listen.
fn check_scheme(scheme: &str, host: &str) -> Result<(), String> {
    if scheme == "http" && !is_loopback(host) {
        return Err(format!(
            "http://{host}: tokens are sent there, where anybody on the way could read them: write https://"
        ));
    }
    Ok(())
}

/// Refuses an API's address that is none, or that tokens may not be sent to.
///
/// # Errors
/// When it is so; the text says what is right.
pub fn check_api(api: &str) -> Result<(), String> {
    let problem = || format!("{api:?} is no address: write https://HOST/api/v3");
    let uri: Uri = api.parse().map_err(|_| problem())?;
    match (uri.scheme_str(), uri.authority()) {
        (Some(scheme @ ("http" | "https")), Some(host)) => check_scheme(scheme, host.host()),
        _ => Err(problem()),
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Url {
    /// Where its REST API is, if the configuration does not say: beside GitHub's and GHE.com's hosts,
    /// below the host of an Enterprise Server (actions/scaleset, config.go).
    #[must_use]
    pub fn api(&self) -> String {
        let Self { scheme, host, .. } = self;
        match host.as_str() {
            "github.com" | "www.github.com" => "https://api.github.com".to_owned(),
            host if host.ends_with(".ghe.com") => format!("{scheme}://api.{host}"),
            host => format!("{scheme}://{host}/api/v3"),
        }
    }
}

/// How we say who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// A token.
    Token(Source),
    /// A GitHub App's installation.
    App {
        /// The App.
        id: u64,
        /// Its installation.
        installation: u64,
        /// Its private key, PEM.
        key: Source,
    },
}

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
    #[error("{what}: the answer is not what is documented: {problem}")]
    Odd {
        /// Method and path.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no runner group of that name.
    #[error("there is no runner group {0:?} here, or the credential does not see it")]
    NoGroup(String),
    /// It was not asked, as it said to be left alone until then.
    #[error("GitHub asked to be left alone for another {} s", .0.as_secs())]
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
    what: String,
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
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
        // By GitHub's own clock: ours may be off.
        let own = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let theirs = header("date").and_then(http_date).unwrap_or(own);
        Some(reset.saturating_sub(theirs) + 1)
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

/// Seconds since 1970 of an HTTP date.
fn http_date(text: &str) -> Option<u64> {
    let time = jiff::fmt::rfc2822::parse(text).ok()?;
    time.timestamp().as_second().try_into().ok()
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
    crab: Octocrab,
    /// Without authentication, for other hosts and other tokens.
    plain: Octocrab,
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
        let setup = |problem: &dyn fmt::Display| GitHubError::Setup(problem.to_string());
        let api = api.map_or_else(|| url.api(), str::to_owned);
        let connector = Connector::new(&api).map_err(|e| setup(&e))?;
        let client = |token, state| connector.client(&api, token, state).map_err(|e| setup(&e));
        let plain = client(None, AuthState::None)?;
        let crab = match auth {
            Auth::Token(source) => {
                let token = format!("Bearer {}", source.read()?.expose_secret());
                let mut token = HeaderValue::from_str(&token)
                    .map_err(|_| setup(&"the token has characters that no token has"))?;
                token.set_sensitive(true);
                client(Some(token), AuthState::None)?
            }
            Auth::App {
                id,
                installation,
                key,
            } => {
                let key = key.read()?;
                let key = EncodingKey::from_rsa_pem(key.expose_secret().as_bytes())
                    .map_err(|e| setup(&format!("the App's key is no RSA key in PEM: {e}")))?;
                let app_id = AppId(*id);
                client(None, AuthState::App(AppAuth { app_id, key }))?
                    .installation(InstallationId(*installation))
                    .map_err(|e| setup(&causes(&e)))?
            }
        };
        Ok(Self {
            crab,
            plain,
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

    /// Whose runners they are.
    #[must_use]
    pub fn url(&self) -> &Url {
        &self.url
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
            let request = Request::builder()
                .method(method.clone())
                .uri(&path)
                .header(header::ACCEPT, "application/vnd.github+json");
            let asked = async {
                let request = self.crab.build_request(request, body)?;
                self.crab.execute(request).await
            };
            let answer = read(what.clone(), asked, TIMEOUT).await;
            self.note(Side::Rest, &answer);
            let answer = answer?;
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
        let to = answer.headers.get(header::LOCATION)?.to_str().ok()?;
        let to: Uri = to.parse().ok()?;
        let api: Uri = self.api.parse().ok()?;
        let same = to.scheme() == api.scheme() && to.authority() == api.authority();
        if to.authority().is_some() && !same {
            return None;
        }
        if answer.status == StatusCode::MOVED_PERMANENTLY
            && !self.moved.swap(true, Ordering::Relaxed)
        {
            warn!(url = %self.url, "what is asked for has another name now: say the new one in the configuration, as only reading goes on with the old one");
        }
        Some(to.path_and_query()?.to_string())
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
        let asked = async {
            let request = self.plain.build_request(request, body)?;
            self.plain.execute(request).await
        };
        let answer = read(what, asked, timeout).await;
        self.note(side, &answer);
        answer
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
        let Ok(answer) = answer else { return };
        self.look_at_limit(&answer.headers);
        if !answer.status.is_client_error() && !answer.status.is_server_error() {
            return;
        }
        if let Some(rest) = answer.expect(&[]).err().and_then(|e| e.retry()) {
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

type Body = http_body_util::combinators::BoxBody<axum::body::Bytes, octocrab::Error>;

async fn read(
    what: String,
    asked: impl Future<Output = octocrab::Result<axum::http::Response<Body>>>,
    timeout: Duration,
) -> Result<Answer, GitHubError> {
    let away = |problem: String| GitHubError::Away {
        what: what.clone(),
        problem: printable(&problem),
    };
    let whole = async {
        let response = asked.await.map_err(|error| match error {
            // Of the request for an installation token.
            octocrab::Error::GitHub { source, .. } => GitHubError::Refused {
                what: "POST /app/installations/…/access_tokens".to_owned(),
                status: source.status_code,
                retry: (source.status_code == StatusCode::TOO_MANY_REQUESTS).then_some(KEEP_STILL),
                message: printable(&source.message),
            },
            error => away(causes(&error)),
        })?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let body = body.map_err(|e| away(causes(&*e)))?.to_bytes().to_vec();
        Ok(Answer {
            what: what.clone(),
            status: parts.status,
            headers: parts.headers,
            body,
        })
    };
    let answer = tokio::time::timeout(timeout, whole).await;
    answer.unwrap_or_else(|_| {
        Err(away(format!(
            "no whole answer within {} s",
            timeout.as_secs()
        )))
    })
}

/// An error and what it is due to, in one line; octocrab's own text has a backtrace after it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut texts = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default().to_owned();
        if !texts.contains(&line) {
            texts.push(line);
        }
        next = error.source();
    }
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, api, path) in [
            (
                "https://github.com/o/r",
                "https://api.github.com",
                "/repos/o/r",
            ),
            ("https://github.com/o/", "https://api.github.com", "/orgs/o"),
            (
                "https://github.com/enterprises/e",
                "https://api.github.com",
                "/enterprises/e",
            ),
            (
                "https://octo.ghe.com/o/r",
                "https://api.octo.ghe.com",
                "/repos/o/r",
            ),
            (
                "https://git.example/o",
                "https://git.example/api/v3",
                "/orgs/o",
            ),
            (
                "http://127.0.0.1:8080/o/r.x",
                "http://127.0.0.1:8080/api/v3",
                "/repos/o/r.x",
            ),
        ] {
            let url = Url::try_from(text.to_owned()).expect(text);
            assert_eq!((url.api().as_str(), url.owner.path().as_str()), (api, path));
        }
        for text in [
            "github.com/o",
            "https://github.com",
            "https://github.com/",
            "ftp://a/b",
            "https://github.com/a/b/c",
            "https://github.com/a b",
            "https://github.com/a/../b",
            "http:///o",
        ] {
            let problem = Url::try_from(text.to_owned()).expect_err(text);
            assert!(
                problem.contains("https://github.com/OWNER/NAME"),
                "{problem}"
            );
        }
    }

    #[test]
    fn without_tls_on_this_machine_only() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:80",
            "LOCALHOST:1",
            "[::1]:80",
            "127.9.9.9",
        ] {
            assert!(Url::try_from(format!("http://{host}/o")).is_ok(), "{host}");
            assert_eq!(check_api(&format!("http://{host}/api/v3")), Ok(()));
        }
        for host in [
            "git.example",
            "10.0.2.2:80",
            "127.0.0.1.example",
            "localhost.example:1",
            "[::2]:80",
        ] {
            let problem = Url::try_from(format!("http://{host}/o")).unwrap_err();
            assert!(problem.contains("https://"), "{problem}");
            check_api(&format!("http://{host}/api/v3")).unwrap_err();
            assert_eq!(check_api(&format!("https://{host}/api/v3")), Ok(()));
        }
        for text in ["api.github.com", "ftp://a", "https://", ""] {
            let problem = check_api(text).unwrap_err();
            assert!(problem.contains("https://HOST/api/v3"), "{text}: {problem}");
        }
    }

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
