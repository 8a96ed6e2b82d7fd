// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A stand-in for GitHub: the REST API's endpoints for runners, and the Actions service of scale sets.
//!
//! Shapes and statuses are those of the REST API's documentation (version 2022-11-28: "self-hosted
//! runners", "apps", "workflow runs", "rate limits"), and of what the official client of scale sets
//! sends and reads (github.com/actions/scaleset). A request with an unknown field, a missing one or
//! a missing header is refused, kept in [`State::violations`], and fails the test that made it.
//!
//! It is as unkind as they are known to be: nulls and what is left out, answers without a body, sessions that outlive their
//! owners, tokens that are refused for a moment after they were made.
//!
//! Below `/standin/` it speaks to the stand-in for the runner (`tests/vm/runner-image`), whose protocol
//! is nobody else's.

mod http;
mod rest;
mod runners;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::{Value, json};

use http::{Said, answer, empty, exact, get, refused, violation};
pub use runners::Runner;
pub use sets::Set;

use crate::support::background;
use crate::support::command::run;

/// The repository whose runners they are.
pub const REPOSITORY: &str = "octo/project";

/// Another one of the same organization, `octo`.
pub const OTHER: &str = "octo/other";

/// A token that is always good.
pub const TOKEN: &str = "github_pat_stand-in";

/// The App and its installation.
pub const APP: (u64, u64) = (12345, 678);

/// A fault that requests meet.
#[derive(Debug, Clone)]
pub struct Fault {
    /// In whose method and path this is: `DELETE /queue/1/2`.
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
    /// An answer without a body.
    Empty,
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

/// Where a job comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    pub repository: &'static str,
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
    repository: REPOSITORY,
    event: "push",
    head_repository: REPOSITORY,
    head_branch: "main",
    workflow_ref: "octo/project/.github/workflows/ci.yml@refs/heads/main",
    commit: TIP,
    referenced: Some(0),
};

/// A pull request from a fork, from a branch that is called as the default branch is.
pub const FORK: Origin = Origin {
    repository: REPOSITORY,
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
    /// No runner gets it.
    runnerless: bool,
    offered: bool,
}

#[derive(Debug, Default)]
pub struct State {
    serial: u64,
    pub runners: BTreeMap<u64, Runner>,
    pub jobs: BTreeMap<u64, Job>,
    pub sets: BTreeMap<u64, Set>,
    /// Installation tokens, and when each ends.
    tokens: BTreeMap<String, u64>,
    /// And how often each is refused yet.
    registration_tokens: BTreeMap<String, u32>,
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
    /// So many jobs are assigned, by the statistics: they are late, or stuck.
    pub counted: Option<u32>,
    /// There is a release without which no runner gets a job.
    pub too_old: bool,
    /// It is an Enterprise Server, which offers jobs that are to be acquired; github.com assigns them.
    pub ghes: bool,
    /// And one that knows a scale set's first label only.
    pub drops_labels: bool,
    /// How long a session is there that nobody asks with any more.
    pub held: Duration,
    /// How often a registration token is refused after it was made.
    pub late: u32,
    /// Runner groups.
    pub groups: BTreeMap<u64, String>,
    /// The repositories have other names now; where these are told.
    pub renamed: Option<String>,
    /// Of 5,000 requests an hour to the REST API, how many are left.
    pub remaining: u64,
    /// A poll that had nothing was answered with an empty 200 last.
    empties: bool,
    /// The App's, in DER as PKCS #1 has it.
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
            .args(["rsa", "-RSAPublicKey_out", "-outform", "DER", "-in"])
            .arg(&key)
            .output()
            .unwrap();
        let (listener, address) = background::listener();
        let url = format!("http://{address}");
        let state = Arc::new(Mutex::new(State {
            token_life: 3600,
            session_life: 3600,
            silent: Duration::from_secs(4),
            held: Duration::from_secs(300),
            late: 1,
            groups: BTreeMap::from([(1, "Default".to_owned())]),
            remaining: 4_999,
            public_key: public.stdout,
            base: url.clone(),
            serial: 100,
            refs: BTreeMap::from([("heads/main".to_owned(), TIP.to_owned())]),
            ..State::default()
        }));
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&state));
        background::serve(listener, router);
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
            set.forget();
        }
    }

    /// All sessions have expired.
    pub fn expire_sessions(&self) {
        self.state().sets.values_mut().for_each(Set::expire);
    }

    /// Puts an event as it is into the only set's queue.
    pub fn event(&self, event: Value) {
        self.state().only_set().event(event);
    }

    /// Puts a message as it is into the only set's queue.
    pub fn message(&self, kind: &str, body: &str) {
        self.state().only_set().message(kind, body);
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
                runnerless: false,
                offered: false,
            },
        );
        id
    }

    /// Queues a job that no runner gets.
    pub fn queue_for_nobody(&self, origin: &Origin) -> u64 {
        let job = self.queue(origin, "");
        self.state().jobs.get_mut(&job).unwrap().runnerless = true;
        job
    }

    /// Tells a job's scale set that it has ended, while it goes on.
    pub fn tell_end(&self, job: u64, result: &str) {
        let mut state = self.state();
        let Stage::Running(runner) = state.jobs[&job].stage.clone() else {
            panic!("it does not run")
        };
        let set = state.runners.values().find(|r| r.name == runner);
        let set = set.and_then(|runner| runner.set).unwrap();
        state.tell(set, "JobCompleted", job, &runner, result);
    }

    /// Cancels a job that was assigned, before any runner has it, and assigns it again, or not.
    pub fn cancel(&self, job: u64, again: bool) {
        let mut state = self.state();
        assert_eq!(state.jobs[&job].stage, Stage::Assigned);
        let set = *state.sets.keys().next().unwrap();
        state.tell(set, "JobCompleted", job, "", "canceled");
        if again {
            state.tell(set, "JobAssigned", job, "", "");
        } else {
            let job = state.jobs.get_mut(&job).unwrap();
            job.stage = Stage::Done(String::new(), "canceled");
        }
    }

    /// How many messages were not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        let state = self.state();
        state.sets.values().map(|set| set.left()).sum()
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

impl State {
    /// The scale set that there is.
    pub fn only_set(&mut self) -> &mut Set {
        self.sets.values_mut().next().unwrap()
    }

    /// Ends the faults that were injected.
    pub fn faults_end(&mut self) {
        self.faults.clear();
    }

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

    fn fault(&mut self, request: &str) -> Option<FaultKind> {
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
            .position(|fault| request.contains(fault.path))?;
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
        if parts[0] != "standin" && get(headers, "user-agent").is_empty() {
            // "Requests with no valid User-Agent header will be rejected."
            return Err(violation("no User-Agent"));
        }
        let authorization = get(headers, "authorization");
        match (method.as_str(), &parts[..]) {
            (_, ["standin", rest @ ..]) => self.standin(rest, &authorization, body),
            (_, ["tenant", rest @ ..]) => self.service(method, rest, uri, headers, body),
            (_, ["queue", rest @ ..]) => self.queue(method, rest, uri, headers, body),
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
                match self.registration_tokens.get_mut(token) {
                    None => return Err(refused(401, "Bad credentials")),
                    // It is not known everywhere yet.
                    Some(late) if *late > 0 => {
                        *late -= 1;
                        let status = if late.is_multiple_of(2) { 401 } else { 403 };
                        return Err(refused(status, "Bad credentials"));
                    }
                    Some(_) => {}
                }
                let known = asks.url.ends_with(REPOSITORY) || asks.url.ends_with("/octo");
                if asks.runner_event != "register" || !known {
                    return Err(violation(format!("{} {}", asks.runner_event, asks.url)));
                }
                let (token, exp) = self.web_token(self.session_life);
                self.service_tokens.insert(token.clone(), exp);
                let url = format!("{}/tenant/123/", self.base);
                Ok((StatusCode::OK, json!({"url": url, "token": token})))
            }
            (_, ["repos" | "repositories" | "orgs", ..]) => {
                self.rest(method, &parts, uri, headers, body)
            }
            _ => Err(violation("no such endpoint")),
        }
    }
}
