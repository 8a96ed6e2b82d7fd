// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A stand-in for GitHub: the REST API's endpoints for runners, and the Actions service of scale sets.
//!
//! Shapes and statuses are those of the REST API's documentation (version 2022-11-28: "self-hosted
//! runners", "apps", "workflow runs", "rate limits"), and of what the official client of scale sets
//! sends and reads (github.com/actions/scaleset). A request with an unknown field, a missing one or
//! a missing header is refused, kept in [`State::violations`], and fails the test that made it.
//!
//! Below `/standin/` it speaks to the stand-in for the runner (`tests/vm/runner-image`), whose protocol
//! is nobody else's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State as Shared;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use octocrab::jsonwebtoken::{self, Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::support::command::run;

/// The repository whose runners they are.
pub const REPOSITORY: &str = "octo/project";

/// A token that is always good.
pub const TOKEN: &str = "github_pat_stand-in";

/// The App and its installation.
pub const APP: (u64, u64) = (12345, 678);

/// How long a poll of the queue waits; the real one waits some 50 s.
const POLL: Duration = Duration::from_millis(500);

/// A fault that requests meet.
#[derive(Debug, Clone)]
pub struct Fault {
    /// In whose path this is.
    pub path: &'static str,
    pub kind: FaultKind,
    /// How often; it is gone then.
    pub times: usize,
}

#[derive(Debug, Clone)]
pub enum FaultKind {
    /// An answer with this status, these headers, and this message.
    Status(u16, Vec<(&'static str, String)>, &'static str),
    /// What is asked for, so much later.
    Slow(Duration),
    /// The connection ends in the middle of an answer.
    Dropped,
    /// What is asked for is done, and then the connection ends.
    DroppedAfter,
}

/// A request, as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub path: String,
    pub at: Instant,
}

#[derive(Debug, Clone)]
pub struct Runner {
    pub id: u64,
    pub name: String,
    pub labels: Vec<String>,
    /// Of a scale set.
    pub set: Option<u64>,
    secret: String,
    seen: Option<Instant>,
    pub job: Option<u64>,
}

impl Runner {
    fn online(&self, silent: Duration) -> bool {
        self.seen.is_some_and(|seen| seen.elapsed() < silent)
    }

    fn json(&self, silent: Duration) -> Value {
        let labels = self.labels.iter().enumerate();
        let labels: Vec<_> = labels
            .map(|(n, name)| json!({"id": n, "name": name, "type": "custom"}))
            .collect();
        json!({
            "id": self.id, "runner_group_id": 1, "name": self.name, "os": "linux",
            "status": if self.online(silent) { "online" } else { "offline" },
            "busy": self.job.is_some(), "labels": labels, "ephemeral": true,
        })
    }
}

/// Where a job comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    pub event: &'static str,
    /// Empty: it is gone.
    pub head_repository: &'static str,
    pub head_branch: &'static str,
    pub workflow_ref: &'static str,
    pub commit: &'static str,
    /// How many reusable workflows its run calls; `None`: a server that does not say.
    pub referenced: Option<usize>,
}

/// The commit that the default branch is at.
pub const TIP: &str = "7fd1a60b01f91b314f59955a4e4d4e80d8edf11d";

/// A repository's number.
pub fn id_of(repository: &str) -> u64 {
    match repository {
        REPOSITORY => 1_296_269,
        _ => 2_000_000 + repository.bytes().map(u64::from).sum::<u64>(),
    }
}

/// A push to the default branch.
pub const MAIN: Origin = Origin {
    event: "push",
    head_repository: REPOSITORY,
    head_branch: "main",
    workflow_ref: "octo/project/.github/workflows/ci.yml@refs/heads/main",
    commit: TIP,
    referenced: Some(0),
};

/// A pull request from a fork, from a branch that is called as the default branch is.
pub const FORK: Origin = Origin {
    event: "pull_request",
    head_repository: "mallory/project",
    head_branch: "main",
    workflow_ref: "octo/project/.github/workflows/ci.yml@refs/pull/7/merge",
    commit: "bad0bad0bad0bad0bad0bad0bad0bad0bad0bad0",
    referenced: Some(0),
};

/// The same pull request's other event, which has the base's code and secrets.
pub const TARGET: Origin = Origin {
    event: "pull_request_target",
    workflow_ref: "octo/project/.github/workflows/ci.yml@refs/heads/main",
    ..FORK
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    Queued,
    /// Acquired by a scale set.
    Assigned,
    Running(String),
    /// By that runner, with that result: the names of TaskResult.
    Done(String, &'static str),
}

#[derive(Debug, Clone)]
pub struct Job {
    pub id: u64,
    /// What the stand-in for the runner runs.
    pub script: String,
    pub origin: Origin,
    pub stage: Stage,
    /// How often it was given to a runner.
    pub runs: u32,
    /// What it wrote.
    pub log: String,
    offered: bool,
}

#[derive(Debug)]
struct Session {
    id: String,
    token: String,
    owner: String,
    token_until: Instant,
    polled: Instant,
    capacity: u32,
}

#[derive(Debug, Default)]
struct Set {
    name: String,
    session: Option<Session>,
    messages: BTreeMap<u64, Vec<Value>>,
    next: u64,
}

#[derive(Debug, Default)]
pub struct State {
    serial: u64,
    pub runners: BTreeMap<u64, Runner>,
    pub jobs: BTreeMap<u64, Job>,
    sets: BTreeMap<u64, Set>,
    /// Installation tokens, and when each ends.
    tokens: BTreeMap<String, u64>,
    registration_tokens: BTreeSet<String>,
    service_tokens: BTreeMap<String, u64>,
    faults: Vec<Fault>,
    /// Of so many requests one meets a fault, each time another; 0: none does.
    pub fault_every: u64,
    /// All that was asked, but for the stand-in runners' requests.
    pub asked: Vec<Asked>,
    /// Requests that were not of the documented shape.
    pub violations: Vec<String>,
    /// Every token, and what only a runner has.
    pub secrets: Vec<String>,
    /// Every runner's configuration.
    pub configurations: Vec<String>,
    /// A runner that was not heard of for so long is offline; after twice that, its job is lost.
    pub silent: Duration,
    /// Seconds that GitHub's clock is ahead of ours.
    pub clock: i64,
    /// Seconds that an installation token is good for; 3600 at the real one.
    pub token_life: u64,
    /// Seconds that a session's token is good for.
    pub session_life: u64,
    /// There is a release without which no runner gets a job.
    pub too_old: bool,
    public_key: Vec<u8>,
    /// The repository's branches and tags (`heads/main`), and the commit of each.
    pub refs: BTreeMap<String, String>,
    /// Commits that the default branch has had, but for its last.
    pub earlier: BTreeSet<String>,
    /// Its own address, as its runners see it.
    pub base: String,
}

/// The server. Dropping it fails the test where a request was not of the documented shape.
pub struct Fake {
    pub url: String,
    state: Arc<Mutex<State>>,
    dir: tempfile::TempDir,
}

impl Fake {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("app.pem");
        run(
            "openssl",
            [
                "genrsa".as_ref(),
                "-traditional".as_ref(),
                "-out".as_ref(),
                key.as_os_str(),
                "2048".as_ref(),
            ],
        );
        let public = Command::new("openssl")
            .args(["rsa", "-pubout", "-in"])
            .arg(&key)
            .output()
            .unwrap();
        let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            token_life: 3600,
            session_life: 3600,
            silent: Duration::from_secs(4),
            public_key: public.stdout,
            base: url.clone(),
            serial: 100,
            refs: BTreeMap::from([("heads/main".to_owned(), TIP.to_owned())]),
            ..State::default()
        }));
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&state));
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, router).await.unwrap();
            });
        });
        let fake = Self { url, state, dir };
        std::fs::write(fake.file("token"), TOKEN).unwrap();
        run(
            "chmod",
            ["-R".as_ref(), "go=".as_ref(), fake.dir.path().as_os_str()],
        );
        fake
    }

    /// A secret's file: `token` or `app.pem`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        // A panic of another thread says more than one of ours would.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a runner be online with a job, or without one.
    pub fn occupy(&self, runner: u64, job: Option<u64>) {
        let mut state = self.state();
        let runner = state.runners.get_mut(&runner).unwrap();
        (runner.job, runner.seen) = (job, Some(Instant::now()));
    }

    pub fn inject(&self, path: &'static str, kind: FaultKind, times: usize) {
        self.state().faults.push(Fault { path, kind, times });
    }

    /// Takes all installation tokens back.
    pub fn forget_tokens(&self) {
        self.state().tokens.clear();
    }

    /// What the scopes of the repository's jobs begin with: API host and number.
    pub fn scope(&self) -> String {
        let host = self.url.strip_prefix("http://").unwrap();
        format!("{host}:{}", id_of(REPOSITORY))
    }

    /// Ends all sessions and all tokens of the service of scale sets.
    pub fn forget_sessions(&self) {
        let mut state = self.state();
        state.service_tokens.clear();
        for set in state.sets.values_mut() {
            set.session = None;
        }
    }

    /// Registers a runner that nobody runs.
    pub fn registered(&self, name: &str) {
        let labels = vec!["linux".to_owned()];
        let registered = self.state().register(name, labels, None);
        assert!(registered.is_ok(), "{name} is registered");
    }

    /// Removes a registration.
    pub fn deregistered(&self, name: &str) {
        self.state().runners.retain(|_, runner| runner.name != name);
    }

    /// Queues a job and gives its number.
    pub fn queue(&self, origin: &Origin, script: &str) -> u64 {
        self.queue_with(origin, |_| script.to_owned())
    }

    /// The same with a script that knows its job's number.
    pub fn queue_with(&self, origin: &Origin, script: impl FnOnce(u64) -> String) -> u64 {
        let mut state = self.state();
        state.serial += 1;
        let id = state.serial;
        state.jobs.insert(
            id,
            Job {
                id,
                script: script(id),
                origin: origin.clone(),
                stage: Stage::Queued,
                runs: 0,
                log: String::new(),
                offered: false,
            },
        );
        id
    }

    /// The result of a job that has ended.
    pub fn result(&self, job: u64) -> Option<&'static str> {
        self.state().settle();
        match self.state().jobs[&job].stage {
            Stage::Done(_, result) => Some(result),
            _ => None,
        }
    }

    /// How many requests whose path has this came since then.
    pub fn count(&self, path: &str, since: Instant) -> usize {
        let state = self.state();
        let asked = state.asked.iter();
        asked
            .filter(|a| a.at >= since && a.path.contains(path))
            .count()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let violations = std::mem::take(&mut self.state().violations);
        if !violations.is_empty() && !thread::panicking() {
            panic!("requests that GitHub does not document: {violations:#?}");
        }
    }
}

type Said = Result<(StatusCode, Value), Refused>;

/// A refusal, as GitHub words it; a violation where the request could never be right.
struct Refused {
    status: StatusCode,
    message: String,
    violation: bool,
}

fn refused(status: u16, message: impl Into<String>) -> Refused {
    Refused {
        status: StatusCode::from_u16(status).unwrap(),
        message: message.into(),
        violation: false,
    }
}

fn violation(message: impl Into<String>) -> Refused {
    Refused {
        violation: true,
        ..refused(400, message)
    }
}

async fn answer(
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
                .fault(&path)
        })
        .flatten();
    let mut dropped = false;
    let mut extra = Vec::new();
    let said = match fault {
        Some(FaultKind::Status(status, headers, message)) => {
            extra = headers;
            Err(refused(status, message))
        }
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
            let body = json!({"message": refused.message, "documentation_url": "https://docs.github.com/rest"});
            (refused.status, body)
        }
    };
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
        (StatusCode::NO_CONTENT | StatusCode::ACCEPTED, _) => String::new(),
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
        let said = state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .say(method, uri, headers, body);
        match said {
            Ok((StatusCode::ACCEPTED, _)) if Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            said => return said,
        }
    }
}

/// A body of exactly this shape.
fn exact<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|e| violation(format!("body: {e}")))
}

fn empty(body: &[u8]) -> Result<(), Refused> {
    match body {
        b"" | b"{}" => Ok(()),
        _ => Err(violation("a body where none is documented")),
    }
}

fn query(uri: &Uri, known: &[&str]) -> Result<BTreeMap<String, String>, Refused> {
    let pairs = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if known.contains(&key) {
                Ok((key.to_owned(), value.to_owned()))
            } else {
                Err(violation(format!("query {key}")))
            }
        })
        .collect()
}

impl State {
    /// How many faults no request has met yet.
    pub fn faults_left(&self) -> usize {
        self.faults.iter().map(|fault| fault.times).sum()
    }

    fn now(&self) -> u64 {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        now.checked_add_signed(self.clock).unwrap()
    }

    fn fault(&mut self, path: &str) -> Option<FaultKind> {
        let asked = self.asked.len() as u64 + 1;
        if self.fault_every > 0 && asked.is_multiple_of(self.fault_every) {
            let status = |status, headers| FaultKind::Status(status, headers, "no");
            let retry = vec![("retry-after", "1".to_owned())];
            return Some(match asked / self.fault_every % 8 {
                0 => status(500, Vec::new()),
                1 => status(502, Vec::new()),
                2 => status(429, retry),
                3 => status(403, retry),
                4 => status(401, Vec::new()),
                5 => FaultKind::Dropped,
                6 => FaultKind::DroppedAfter,
                _ => FaultKind::Slow(Duration::from_secs(1)),
            });
        }
        let at = self
            .faults
            .iter()
            .position(|fault| path.contains(fault.path))?;
        let fault = &mut self.faults[at];
        fault.times -= 1;
        let kind = fault.kind.clone();
        if fault.times == 0 {
            self.faults.remove(at);
        }
        Some(kind)
    }

    fn secret(&mut self, kind: &str) -> String {
        self.serial += 1;
        let text = format!(
            "{kind}_{}{:x}",
            self.serial,
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .as_nanos()
        );
        self.secrets.push(text.clone());
        text
    }

    /// A JSON Web Token that only says when it ends: the client looks at nothing else.
    fn web_token(&mut self, life: u64) -> (String, u64) {
        let exp = self.now() + life;
        let claims = URL_SAFE_NO_PAD.encode(json!({"exp": exp}).to_string());
        let signature = self.secret("signature");
        let token = format!("e30.{claims}.{}", URL_SAFE_NO_PAD.encode(signature));
        self.secrets.push(token.clone());
        (token, exp)
    }

    fn say(&mut self, method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> Said {
        self.settle();
        let path = uri.path().trim_matches('/').to_owned();
        let parts: Vec<&str> = path.split('/').collect();
        let get = |name: &str| {
            headers
                .get(name)
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        if parts[0] != "standin" && get("user-agent").is_empty() {
            // "Requests with no valid User-Agent header will be rejected."
            return Err(violation("no User-Agent"));
        }
        let authorization = get("authorization");
        match (method.as_str(), &parts[..]) {
            (_, ["standin", rest @ ..]) => self.standin(rest, &authorization, body),
            (_, ["tenant", rest @ ..]) => self.service(method, rest, uri, &authorization, body),
            (_, ["queue", rest @ ..]) => self.queue(method, rest, uri, &get, body),
            ("POST", ["app", "installations", id, "access_tokens"]) => {
                empty(body)?;
                self.installation_token(id, &authorization)
            }
            ("POST", ["actions", "runner-registration"]) => {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Asks {
                    url: String,
                    runner_event: String,
                }
                let asks: Asks = exact(body)?;
                let token = authorization
                    .strip_prefix("RemoteAuth ")
                    .unwrap_or_default();
                if !self.registration_tokens.contains(token) {
                    return Err(refused(401, "Bad credentials"));
                }
                if asks.runner_event != "register" || !asks.url.ends_with(REPOSITORY) {
                    return Err(violation(format!("{} {}", asks.runner_event, asks.url)));
                }
                let (token, exp) = self.web_token(self.session_life);
                self.service_tokens.insert(token.clone(), exp);
                let url = format!("{}/tenant/123/", self.base);
                Ok((StatusCode::OK, json!({"url": url, "token": token})))
            }
            (_, ["repos", owner, name, rest @ ..]) => {
                let accept = get("accept");
                if accept != "application/vnd.github+json" {
                    return Err(violation(format!("Accept: {accept}")));
                }
                if get("x-github-api-version") != "2022-11-28" {
                    return Err(violation("no X-GitHub-Api-Version"));
                }
                let token = authorization.strip_prefix("Bearer ").unwrap_or_default();
                let now = self.now();
                if token != TOKEN && self.tokens.get(token).is_none_or(|until| *until <= now) {
                    return Err(refused(401, "Bad credentials"));
                }
                if format!("{owner}/{name}") != REPOSITORY {
                    return Err(refused(404, "Not Found"));
                }
                self.repository(method, rest, uri, body)
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    fn installation_token(&mut self, id: &str, authorization: &str) -> Said {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Claims {
            iss: Value,
            iat: u64,
            exp: u64,
        }
        let token = authorization.strip_prefix("Bearer ").unwrap_or_default();
        let mut check = Validation::new(Algorithm::RS256);
        check.validate_exp = false;
        check.required_spec_claims.clear();
        let key = DecodingKey::from_rsa_pem(&self.public_key).unwrap();
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &check)
            .map_err(|_| refused(401, "A JSON web token could not be decoded"))?
            .claims;
        let now = self.now();
        if claims.iss != json!(APP.0) {
            return Err(refused(401, "Integration not found"));
        }
        // As GitHub words them.
        if claims.iat > now {
            let text = "'Issued at' claim ('iat') must be an Integer representing the time that the assertion was issued";
            return Err(refused(401, text));
        }
        if claims.exp > now + 600 {
            return Err(refused(
                401,
                "'Expiration time' claim ('exp') is too far in the future",
            ));
        }
        if claims.exp <= now {
            return Err(refused(
                401,
                "'Expiration time' claim ('exp') must be a numeric value representing the future time at which the assertion expires",
            ));
        }
        if id != APP.1.to_string() {
            return Err(refused(404, "Not Found"));
        }
        let token = self.secret("ghs");
        let until = now + self.token_life;
        self.tokens.insert(token.clone(), until);
        let until = jiff::Timestamp::from_second(until as i64)
            .unwrap()
            .to_string();
        let body = json!({"token": token, "expires_at": until, "permissions": {"administration": "write"},
            "repository_selection": "selected"});
        Ok((StatusCode::CREATED, body))
    }

    fn repository(&mut self, method: &Method, rest: &[&str], uri: &Uri, body: &[u8]) -> Said {
        match (method.as_str(), rest) {
            ("GET", []) => Ok((
                StatusCode::OK,
                json!({"id": id_of(REPOSITORY), "full_name": REPOSITORY, "default_branch": "main", "private": false}),
            )),
            ("GET", ["git", "ref", kind, name @ ..]) => {
                let name = format!("{kind}/{}", name.join("/"));
                let sha = self
                    .refs
                    .get(&name)
                    .ok_or_else(|| refused(404, "Not Found"))?;
                let body = json!({"ref": format!("refs/{name}"), "object": {"type": "commit", "sha": sha}});
                Ok((StatusCode::OK, body))
            }
            ("GET", ["compare", commits]) => {
                query(uri, &["per_page", "page"])?;
                let (base, head) = commits
                    .split_once("...")
                    .ok_or_else(|| violation("BASE...HEAD"))?;
                let status = match base == head {
                    true => "identical",
                    false if self.earlier.contains(head) => "behind",
                    false => "diverged",
                };
                Ok((StatusCode::OK, json!({"status": status, "commits": []})))
            }
            ("GET", ["actions", "runs", id]) => {
                let id: u64 = id.parse().map_err(|_| violation("a run's number"))?;
                let job = self
                    .jobs
                    .get(&(id / 10))
                    .ok_or_else(|| refused(404, "Not Found"))?;
                let origin = &job.origin;
                Ok((
                    StatusCode::OK,
                    json!({"id": id, "event": origin.event, "head_branch": origin.head_branch,
                    "head_sha": origin.commit, "path": ".github/workflows/ci.yml",
                    "repository": {"id": id_of(REPOSITORY), "full_name": REPOSITORY},
                    "referenced_workflows": origin.referenced.map(|n| vec![json!({"path": "octo/project/.github/workflows/called.yml@main", "sha": TIP}); n]),
                    "head_repository": (!origin.head_repository.is_empty())
                        .then(|| json!({"id": id_of(origin.head_repository), "full_name": origin.head_repository}))}),
                ))
            }
            ("POST", ["actions", "runners", "registration-token"]) => {
                empty(body)?;
                let token = self.secret("AREG");
                self.registration_tokens.insert(token.clone());
                let until = jiff::Timestamp::from_second(self.now() as i64 + 3600)
                    .unwrap()
                    .to_string();
                Ok((
                    StatusCode::CREATED,
                    json!({"token": token, "expires_at": until}),
                ))
            }
            ("POST", ["actions", "runners", "generate-jitconfig"]) => self.new_runner(body),
            ("GET", ["actions", "runners"]) => {
                let query = query(uri, &["name", "per_page", "page"])?;
                let number = |key: &str, default: usize| {
                    query
                        .get(key)
                        .map_or(Ok(default), |n| n.parse().map_err(|_| violation(key)))
                };
                let (per_page, page) = (number("per_page", 30)?, number("page", 1)?);
                if !(1..=100).contains(&per_page) || page == 0 {
                    return Err(violation("per_page is 1 to 100"));
                }
                let all: Vec<_> = self
                    .runners
                    .values()
                    .filter(|runner| query.get("name").is_none_or(|name| *name == runner.name))
                    .map(|runner| runner.json(self.silent))
                    .collect();
                let page: Vec<_> = all
                    .iter()
                    .skip((page - 1) * per_page)
                    .take(per_page)
                    .collect();
                Ok((
                    StatusCode::OK,
                    json!({"total_count": all.len(), "runners": page}),
                ))
            }
            ("DELETE", ["actions", "runners", id]) => {
                empty(body)?;
                let id: u64 = id.parse().map_err(|_| violation("a runner's number"))?;
                match self.runners.get(&id) {
                    None => Err(refused(404, "Not Found")),
                    Some(Runner {
                        job: Some(_), name, ..
                    }) => Err(refused(
                        422,
                        format!(
                            "Runner \"{name}\" is currently running a job and cannot be deleted."
                        ),
                    )),
                    Some(_) => {
                        self.runners.remove(&id);
                        Ok((StatusCode::NO_CONTENT, Value::Null))
                    }
                }
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    fn new_runner(&mut self, body: &[u8]) -> Said {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct New {
            name: String,
            runner_group_id: u64,
            labels: Vec<String>,
            #[serde(default)]
            work_folder: Option<String>,
        }
        let new: New = exact(body)?;
        if new.name.len() > 64
            || !(1..=100).contains(&new.labels.len())
            || new.work_folder.is_some_and(|w| w.is_empty())
        {
            return Err(violation(
                "a name has at most 64 characters, and there are 1 to 100 labels",
            ));
        }
        if new.runner_group_id != 1 {
            return Err(refused(404, "Not Found"));
        }
        let (runner, encoded) = self.register(&new.name, new.labels, None)?;
        Ok((
            StatusCode::CREATED,
            json!({"runner": runner.json(self.silent), "encoded_jit_config": encoded}),
        ))
    }

    fn register(
        &mut self,
        name: &str,
        labels: Vec<String>,
        set: Option<u64>,
    ) -> Result<(Runner, String), Refused> {
        if self.runners.values().any(|runner| runner.name == name) {
            let text = format!("Already exists - A runner with the name {name} already exists.");
            return Err(refused(409, text));
        }
        let secret = self.secret("runner");
        let id = self.serial;
        let runner = Runner {
            id,
            name: name.to_owned(),
            labels,
            set,
            secret: secret.clone(),
            seen: None,
            job: None,
        };
        self.runners.insert(id, runner.clone());
        // Of the real ones' names and sizes. What was registered over REST may update itself; a scale set says.
        let filler = |length: usize| STANDARD.encode("k".repeat(length));
        let settings = json!({
            "AgentId": id.to_string(), "AgentName": name, "PoolId": "1", "PoolName": "Default",
            "DisableUpdate": if set.is_some() { "True" } else { "False" }, "Ephemeral": "True", "UseV2Flow": "True",
            "ServerUrl": self.base, "ServerUrlV2": self.base, "GitHubUrl": format!("{}/{REPOSITORY}", self.base), "WorkFolder": "_work",
        });
        let credentials = json!({"Scheme": "OAuth", "Data": {
            "ClientId": filler(27), "AuthorizationUrl": format!("{}/_apis/oauth2/token/{}", self.base, filler(200)),
            "AuthorizationUrlV2": self.base, "RequireFipsCryptography": "True",
        }});
        let parameters = json!({
            "d": secret, "dp": filler(128), "dq": filler(128), "exponent": "AQAB", "inverseQ": filler(128),
            "modulus": filler(256), "p": filler(128), "q": filler(128),
        });
        let files = json!({
            ".runner": STANDARD.encode(format!("\u{feff}{settings}")),
            ".credentials": STANDARD.encode(format!("\u{feff}{credentials}")),
            ".credentials_rsaparams": STANDARD.encode(parameters.to_string()),
        });
        let encoded = STANDARD.encode(files.to_string());
        self.configurations.push(encoded.clone());
        Ok((runner, encoded))
    }

    fn service(
        &mut self,
        method: &Method,
        rest: &[&str],
        uri: &Uri,
        authorization: &str,
        body: &[u8],
    ) -> Said {
        let token = authorization
            .strip_prefix("Bearer ")
            .unwrap_or_default()
            .to_owned();
        let now = self.now();
        let acquires = matches!(rest, [.., "acquirejobs"]);
        if !acquires
            && self
                .service_tokens
                .get(&token)
                .is_none_or(|until| *until <= now)
        {
            return Err(refused(401, "unauthorized"));
        }
        let query = query(uri, &["api-version", "runnerGroupId", "name"])?;
        if query.get("api-version").map(String::as_str) != Some("6.0-preview") {
            return Err(violation("no api-version"));
        }
        let ["123", "_apis", "runtime", "runnerscalesets", rest @ ..] = rest else {
            return Err(violation("no such endpoint"));
        };
        let set_of = |id: &str| {
            id.parse::<u64>()
                .map_err(|_| violation("a scale set's number"))
        };
        match (method.as_str(), rest) {
            ("GET", []) => {
                let sets: Vec<_> = self
                    .sets
                    .iter()
                    .filter(|(_, set)| query.get("name").is_some_and(|name| *name == set.name))
                    .map(|(id, set)| json!({"id": id, "name": set.name, "runnerGroupId": 1}))
                    .collect();
                Ok((StatusCode::OK, json!({"count": sets.len(), "value": sets})))
            }
            ("POST", []) => {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields, rename_all = "camelCase")]
                #[allow(dead_code)]
                struct New {
                    name: String,
                    runner_group_id: u64,
                    labels: Vec<BTreeMap<String, String>>,
                    #[serde(rename = "RunnerSetting")]
                    setting: BTreeMap<String, bool>,
                }
                let new: New = exact(body)?;
                if new.labels.is_empty()
                    || new
                        .labels
                        .iter()
                        .any(|label| label["type"] != "System" || label["name"].is_empty())
                {
                    return Err(violation("labels"));
                }
                self.serial += 1;
                self.sets.insert(
                    self.serial,
                    Set {
                        name: new.name.clone(),
                        next: 1,
                        ..Set::default()
                    },
                );
                Ok((StatusCode::OK, json!({"id": self.serial, "name": new.name})))
            }
            ("POST", [id, "generatejitconfig"]) => {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields, rename_all = "camelCase")]
                struct New {
                    name: String,
                    #[serde(rename = "workFolder")]
                    _work_folder: String,
                }
                let (new, set): (New, u64) = (exact(body)?, set_of(id)?);
                let (runner, encoded) =
                    self.register(&new.name, vec!["set".to_owned()], Some(set))?;
                let reference =
                    json!({"id": runner.id, "name": runner.name, "runnerScaleSetId": set});
                Ok((
                    StatusCode::OK,
                    json!({"runner": reference, "encodedJITConfig": encoded}),
                ))
            }
            ("POST", [id, "sessions"]) => {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields, rename_all = "camelCase")]
                struct New {
                    owner_name: String,
                }
                let (new, id): (New, u64) = (exact(body)?, set_of(id)?);
                let set = self
                    .sets
                    .get(&id)
                    .ok_or_else(|| refused(404, "no such scale set"))?;
                if let Some(session) = &set.session
                    && session.polled.elapsed() < Duration::from_secs(2)
                {
                    return Err(refused(
                        409,
                        format!(
                            "The actions runner scale set already has an active session for owner {}.",
                            session.owner
                        ),
                    ));
                }
                let session = self.serial;
                self.serial += 1;
                self.open(id, &format!("session-{session}"), &new.owner_name)
            }
            ("PATCH", [id, "sessions", session]) => {
                empty(body)?;
                let id = set_of(id)?;
                let owner = match self.sets.get(&id).and_then(|set| set.session.as_ref()) {
                    Some(own) if own.id == *session => own.owner.clone(),
                    _ => return Err(refused(404, "no such session")),
                };
                self.open(id, session, &owner)
            }
            ("DELETE", [id, "sessions", session]) => {
                let set = self
                    .sets
                    .get_mut(&set_of(id)?)
                    .ok_or_else(|| refused(404, "no such scale set"))?;
                set.session
                    .take_if(|own| own.id == *session)
                    .ok_or_else(|| refused(404, "no such session"))?;
                Ok((StatusCode::NO_CONTENT, Value::Null))
            }
            ("POST", [id, "acquirejobs"]) => {
                let (wanted, id): (Vec<u64>, u64) = (exact(body)?, set_of(id)?);
                let session = self.sets[&id].session.as_ref();
                if session.is_none_or(|s| s.token != token || s.token_until <= Instant::now()) {
                    return Err(refused(401, "unauthorized"));
                }
                let mut got = Vec::new();
                for job in wanted {
                    if let Some(job) = self.jobs.get_mut(&job)
                        && job.stage == Stage::Queued
                    {
                        job.stage = Stage::Assigned;
                        got.push(job.id);
                    }
                }
                for job in &got {
                    self.tell(id, "JobAssigned", *job, "", "");
                }
                Ok((StatusCode::OK, json!({"count": got.len(), "value": got})))
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    fn open(&mut self, id: u64, session: &str, owner: &str) -> Said {
        let token = self.secret("queue");
        let statistics = self.statistics();
        let url = format!("{}/queue/{id}", self.base);
        let life = Duration::from_secs(self.session_life);
        let set = self.sets.get_mut(&id).unwrap();
        set.session = Some(Session {
            id: session.to_owned(),
            token: token.clone(),
            owner: owner.to_owned(),
            token_until: Instant::now() + life,
            polled: Instant::now(),
            capacity: 0,
        });
        Ok((
            StatusCode::OK,
            json!({"sessionId": session, "ownerName": owner, "runnerScaleSet": {"id": id, "name": set.name},
            "messageQueueUrl": url, "messageQueueAccessToken": token, "statistics": statistics}),
        ))
    }

    fn statistics(&self) -> Value {
        let assigned = |job: &&Job| matches!(job.stage, Stage::Assigned | Stage::Running(_));
        let running = |job: &&Job| matches!(job.stage, Stage::Running(_));
        let jobs = || self.jobs.values();
        json!({
            "totalAvailableJobs": jobs().filter(|job| job.stage == Stage::Queued).count(),
            "totalAcquiredJobs": 0,
            "totalAssignedJobs": jobs().filter(assigned).count(),
            "totalRunningJobs": jobs().filter(running).count(),
            "totalRegisteredRunners": self.runners.len(),
            "totalBusyRunners": self.runners.values().filter(|r| r.job.is_some()).count(),
            "totalIdleRunners": self.runners.values().filter(|r| r.job.is_none() && r.online(self.silent)).count(),
        })
    }

    /// Puts a message into a set's queue.
    fn tell(&mut self, set: u64, kind: &str, job: u64, runner: &str, result: &str) {
        let of = &self.jobs[&job];
        let (owner, name) = REPOSITORY.split_once('/').unwrap();
        let zero = "0001-01-01T00:00:00Z";
        let mut message = json!({
            "messageType": kind, "runnerRequestId": job, "repositoryName": name, "ownerName": owner,
            "jobId": format!("job-{job}"), "jobWorkflowRef": of.origin.workflow_ref,
            "jobDisplayName": format!("job {job}"), "workflowRunId": job * 10,
            "eventName": of.origin.event, "requestLabels": ["linux"], "queueTime": zero,
            "scaleSetAssignTime": zero, "runnerAssignTime": zero, "finishTime": zero,
        });
        if kind == "JobAvailable" {
            message["acquireJobUrl"] = "https://example.invalid/".into();
        }
        if !runner.is_empty() {
            message["runnerName"] = runner.into();
            message["runnerId"] = 1.into();
        }
        if !result.is_empty() {
            message["result"] = result.into();
        }
        let set = self.sets.get_mut(&set).unwrap();
        set.messages.insert(set.next, vec![message]);
        set.next += 1;
    }

    fn queue(
        &mut self,
        method: &Method,
        rest: &[&str],
        uri: &Uri,
        get: &impl Fn(&str) -> String,
        body: &[u8],
    ) -> Said {
        empty(body)?;
        let query = query(uri, &["lastMessageId"])?;
        let id: u64 = rest[0].parse().map_err(|_| violation("a queue"))?;
        let set = self
            .sets
            .get_mut(&id)
            .ok_or_else(|| refused(404, "no such queue"))?;
        let bearer = get("authorization");
        let session = set
            .session
            .as_mut()
            .ok_or_else(|| refused(404, "no such session"))?;
        if bearer.strip_prefix("Bearer ") != Some(&session.token)
            || session.token_until <= Instant::now()
        {
            return Err(refused(401, "the message queue token has expired"));
        }
        match (method.as_str(), &rest[1..]) {
            ("GET", []) => {
                if get("accept") != "application/json; api-version=6.0-preview" {
                    return Err(violation(format!("Accept: {}", get("accept"))));
                }
                let capacity = get("x-scalesetmaxcapacity").parse();
                session.capacity = capacity.map_err(|_| violation("no X-ScaleSetMaxCapacity"))?;
                session.polled = Instant::now();
                let last = query
                    .get("lastMessageId")
                    .map_or(Ok(0), |n| n.parse())
                    .map_err(|_| violation("lastMessageId"))?;
                let message = set.messages.range(last + 1..).next();
                match message.map(|(id, events)| (*id, events.clone())) {
                    None => {
                        self.offer(id);
                        Ok((StatusCode::ACCEPTED, Value::Null))
                    }
                    Some((number, events)) => Ok((
                        StatusCode::OK,
                        json!({
                            "messageId": number, "messageType": "RunnerScaleSetJobMessages",
                            "body": Value::Array(events).to_string(), "statistics": self.statistics(),
                        }),
                    )),
                }
            }
            ("DELETE", [number]) => {
                let number: u64 = number
                    .parse()
                    .map_err(|_| violation("a message's number"))?;
                set.messages
                    .remove(&number)
                    .ok_or_else(|| violation("no such message"))?;
                Ok((StatusCode::NO_CONTENT, Value::Null))
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    /// Offers queued jobs to a set, as many as it says it has room for.
    fn offer(&mut self, set: u64) {
        let capacity = self.sets[&set].session.as_ref().map_or(0, |s| s.capacity);
        let taken = |job: &&Job| job.offered && !matches!(job.stage, Stage::Done(..));
        let room = (capacity as usize).saturating_sub(self.jobs.values().filter(taken).count());
        let next: Vec<_> = self
            .jobs
            .values()
            .filter(|job| job.stage == Stage::Queued && !job.offered)
            .map(|job| job.id)
            .take(room)
            .collect();
        for job in next {
            self.jobs.get_mut(&job).unwrap().offered = true;
            self.tell(set, "JobAvailable", job, "", "");
        }
    }

    /// What the stand-in for the runner asks: `next`, `alive`, and `done/RESULT` with the job's log.
    fn standin(&mut self, rest: &[&str], authorization: &str, body: &[u8]) -> Said {
        let runner = self
            .runners
            .values_mut()
            .find(|r| r.secret == authorization);
        let Some(runner) = runner else {
            return Err(refused(404, "no such runner"));
        };
        runner.seen = Some(Instant::now());
        let (id, name, set) = (runner.id, runner.name.clone(), runner.set);
        match rest {
            ["alive"] => Ok((StatusCode::OK, Value::Null)),
            // It would be downloaded, and not installed.
            ["release"] => Err(violation(format!("{name} wants to update itself"))),
            ["next"] if self.too_old => Err(refused(403, "AccessDenied")),
            ["next"] => {
                if runner.job.is_some() {
                    return Err(refused(409, "it has a job"));
                }
                let wanted = if set.is_some() {
                    Stage::Assigned
                } else {
                    Stage::Queued
                };
                let job = self.jobs.values_mut().find(|job| job.stage == wanted);
                let Some(job) = job else {
                    return Ok((StatusCode::ACCEPTED, Value::Null));
                };
                job.stage = Stage::Running(name.clone());
                job.runs += 1;
                let (job, script) = (job.id, job.script.clone());
                self.runners.get_mut(&id).unwrap().job = Some(job);
                if let Some(set) = set {
                    self.tell(set, "JobStarted", job, &name, "");
                }
                Ok((StatusCode::OK, Value::String(script)))
            }
            ["done", code] => {
                if let Some(job) = runner.job.and_then(|job| self.jobs.get_mut(&job)) {
                    job.log = String::from_utf8_lossy(body).into_owned();
                }
                let result = match *code {
                    "0" => "succeeded",
                    "3" => "canceled",
                    _ => "failed",
                };
                self.finish(id, result);
                Ok((StatusCode::OK, Value::Null))
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    /// A runner's job ends, and the runner with it, as it is ephemeral.
    fn finish(&mut self, runner: u64, result: &'static str) {
        let Some(runner) = self.runners.remove(&runner) else {
            return;
        };
        let Some(job) = runner.job else { return };
        self.jobs.get_mut(&job).unwrap().stage = Stage::Done(runner.name.clone(), result);
        if let Some(set) = runner.set {
            self.tell(set, "JobCompleted", job, &runner.name, result);
        }
    }

    /// Jobs whose runner was not heard of for long are lost.
    fn settle(&mut self) {
        let lost: Vec<_> = self
            .runners
            .values()
            .filter(|r| {
                r.job.is_some() && r.seen.is_none_or(|seen| seen.elapsed() > self.silent * 2)
            })
            .map(|r| r.id)
            .collect();
        for id in lost {
            self.finish(id, "abandoned");
        }
    }
}
