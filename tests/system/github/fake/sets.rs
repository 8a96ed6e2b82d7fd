// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Actions service: scale sets, their sessions, and the queue of each.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, Method, StatusCode, Uri};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::{Refused, Said, empty, exact, get, query, refused, violation};
use super::{Job, Stage, State};

/// Most events of one message.
const EVENTS: usize = 50;

#[derive(Debug)]
struct Session {
    id: String,
    token: String,
    owner: String,
    token_until: Instant,
    polled: Instant,
    capacity: u32,
    expired: bool,
}

/// A scale set.
#[derive(Debug, Default)]
pub struct Set {
    pub name: String,
    pub group: u64,
    pub labels: Vec<String>,
    pub disable_update: bool,
    session: Option<Session>,
    /// What is told next.
    pending: VecDeque<Value>,
    /// What was told, and not deleted: type and body.
    messages: BTreeMap<u64, (String, String)>,
    last: u64,
}

impl Set {
    pub fn new(name: &str, group: u64, labels: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            group,
            labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            ..Self::default()
        }
    }

    fn json(&self, id: u64) -> Value {
        let labels = self.labels.iter();
        let labels: Vec<_> = labels
            .map(|name| json!({"id": 1, "name": name, "type": "System"}))
            .collect();
        json!({
            "id": id, "name": self.name, "runnerGroupId": self.group, "runnerGroupName": "Default",
            "labels": labels, "runnerSetting": {"disableUpdate": self.disable_update, "ephemeral": true},
            "statistics": Value::Null,
        })
    }

    /// Ends its session, as GitHub does with one that it has lost.
    pub(super) fn forget(&mut self) {
        self.session = None;
    }

    /// The session has expired: its polls, and its token's renewal, are refused.
    pub(super) fn expire(&mut self) {
        if let Some(session) = &mut self.session {
            session.expired = true;
        }
    }

    /// What is told next, and nothing with it.
    pub(super) fn message(&mut self, kind: &str, body: &str) {
        self.last += 1;
        self.messages
            .insert(self.last, (kind.to_owned(), body.to_owned()));
    }

    pub fn event(&mut self, event: Value) {
        self.pending.push_back(event);
    }

    /// How many messages were not deleted yet, or not told.
    pub fn left(&self) -> usize {
        self.messages.len() + usize::from(!self.pending.is_empty())
    }

    /// The id of its session.
    pub fn session(&self) -> Option<&str> {
        self.session.as_ref().map(|session| session.id.as_str())
    }
}

/// As the Actions service words refusals of a kind.
fn of_kind(status: u16, kind: &'static str, message: impl Into<String>) -> Refused {
    Refused {
        kind: Some(kind),
        ..refused(status, message)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Asked {
    name: String,
    runner_group_id: u64,
    labels: Vec<BTreeMap<String, String>>,
    #[serde(rename = "RunnerSetting")]
    setting: BTreeMap<String, bool>,
}

impl State {
    fn asked_set(&self, body: &[u8]) -> Result<Set, Refused> {
        let asked: Asked = exact(body)?;
        let labels = asked.labels.iter();
        if labels.len() == 0
            || labels
                .clone()
                .any(|label| label["type"] != "System" || label["name"].is_empty())
        {
            return Err(violation("labels"));
        }
        if !self.groups.contains_key(&asked.runner_group_id) {
            return Err(refused(404, "no such runner group"));
        }
        // Enterprise Server below 3.21 knows one label, and does not say so.
        let most = if self.drops_labels { 1 } else { 100 };
        Ok(Set {
            name: asked.name.clone(),
            group: asked.runner_group_id,
            labels: labels
                .map(|label| label["name"].clone())
                .take(most)
                .collect(),
            disable_update: asked.setting["disableUpdate"],
            ..Set::default()
        })
    }

    pub(super) fn service(
        &mut self,
        method: &Method,
        rest: &[&str],
        uri: &Uri,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Said {
        let authorization = get(headers, "authorization");
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
        let known = ["api-version", "runnerGroupId", "name", "groupName"];
        let query = query(uri, &known)?;
        if query.get("api-version").map(String::as_str) != Some("6.0-preview") {
            return Err(violation("no api-version"));
        }
        let asked = query.get("name").cloned().unwrap_or_default();
        let rest = match rest {
            ["123", "_apis", "runtime", "runnergroups"] => {
                let asked = query.get("groupName").cloned().unwrap_or_default();
                let groups: Vec<_> = self
                    .groups
                    .iter()
                    .filter(|(_, name)| **name == asked)
                    .map(|(id, name)| json!({"id": id, "name": name, "isDefaultGroup": *id == 1}))
                    .collect();
                let body = json!({"count": groups.len(), "value": groups});
                return Ok((StatusCode::OK, body));
            }
            ["123", "_apis", "runtime", "runnerscalesets", rest @ ..] => rest,
            _ => return Err(violation("no such endpoint")),
        };
        let set_of = |id: &str| {
            id.parse::<u64>()
                .map_err(|_| violation("a scale set's number"))
        };
        match (method.as_str(), rest) {
            ("GET", []) => {
                let group = query.get("runnerGroupId").and_then(|n| n.parse().ok());
                let group: u64 = group.ok_or_else(|| violation("runnerGroupId"))?;
                // Those whose names have the asked one in them, too.
                let sets = self.sets.iter();
                let sets: Vec<_> = sets
                    .filter(|(_, set)| set.name.contains(&asked) && set.group == group)
                    .map(|(id, set)| set.json(*id))
                    .collect();
                Ok((StatusCode::OK, json!({"count": sets.len(), "value": sets})))
            }
            ("POST", []) => {
                let new = self.asked_set(body)?;
                self.serial += 1;
                let said = new.json(self.serial);
                self.sets.insert(self.serial, new);
                Ok((StatusCode::OK, said))
            }
            ("PATCH", [id]) => {
                let (new, id) = (self.asked_set(body)?, set_of(id)?);
                let set = self.sets.get_mut(&id);
                let set = set.ok_or_else(|| refused(404, "no such scale set"))?;
                (set.name, set.group) = (new.name, new.group);
                (set.labels, set.disable_update) = (new.labels, new.disable_update);
                Ok((StatusCode::OK, set.json(id)))
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
                // For minutes after its owner has died, and for the same owner too.
                if let Some(session) = &set.session
                    && !session.expired
                    && session.polled.elapsed() < self.held
                {
                    let text = format!(
                        "The actions runner scale set {} already has an active session for owner {}.",
                        set.name, session.owner
                    );
                    return Err(of_kind(409, "RunnerScaleSetSessionConflictException", text));
                }
                self.serial += 1;
                let session = format!("00000000-0000-4000-8000-{:012x}", self.serial);
                self.open(id, &session, &new.owner_name)
            }
            ("PATCH", [id, "sessions", session]) => {
                empty(body)?;
                let id = set_of(id)?;
                let owner = match self.sets.get(&id).and_then(|set| set.session.as_ref()) {
                    Some(own) if own.id == *session && !own.expired => own.owner.clone(),
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
                if !self.ghes {
                    return Err(refused(404, "Not Found"));
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
            expired: false,
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
            "totalAssignedJobs": self.counted.map_or_else(|| jobs().filter(assigned).count(), |n| n as usize),
            "totalRunningJobs": jobs().filter(running).count(),
            "totalRegisteredRunners": self.runners.len(),
            "totalBusyRunners": self.runners.values().filter(|r| r.job.is_some()).count(),
            "totalIdleRunners": self.runners.values().filter(|r| r.job.is_none() && r.online(self.silent)).count(),
        })
    }

    /// Puts an event into a set's queue: what it does not have is null, or left out.
    pub(super) fn tell(&mut self, set: u64, kind: &str, job: u64, runner: &str, result: &str) {
        let of = &self.jobs[&job];
        let (owner, name) = of.origin.repository.split_once('/').unwrap();
        let time = "2026-01-02T03:04:05.6Z";
        let mut event = json!({
            "messageType": kind, "runnerRequestId": if self.ghes { job } else { 0 },
            "repositoryName": name, "ownerName": owner,
            "jobId": format!("{job:08x}-0000-4000-8000-000000000000"), "jobWorkflowRef": of.origin.workflow_ref,
            "jobDisplayName": format!("job {job}"), "workflowRunId": job * 10,
            "eventName": of.origin.event, "requestLabels": ["linux"], "queueTime": time,
        });
        let some = |text: &str| (!text.is_empty()).then(|| Value::from(text));
        for (key, value) in [
            (
                "acquireJobUrl",
                (kind == "JobAvailable").then(|| "https://example.invalid/".into()),
            ),
            ("runnerName", some(runner)),
            ("runnerId", some(runner).map(|_| 1.into())),
            ("result", some(result)),
            (
                "scaleSetAssignTime",
                (kind != "JobAvailable").then(|| time.into()),
            ),
            ("runnerAssignTime", some(runner).map(|_| time.into())),
            ("finishTime", some(result).map(|_| time.into())),
        ] {
            match value {
                Some(value) => event[key] = value,
                None if job.is_multiple_of(2) => event[key] = Value::Null,
                None => {}
            }
        }
        self.sets.get_mut(&set).unwrap().event(event);
    }

    pub(super) fn queue(
        &mut self,
        method: &Method,
        rest: &[&str],
        uri: &Uri,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Said {
        empty(body)?;
        let query = query(uri, &["lastMessageId"])?;
        let id: u64 = rest[0].parse().map_err(|_| violation("a queue"))?;
        let set = self
            .sets
            .get_mut(&id)
            .ok_or_else(|| refused(404, "no such queue"))?;
        let bearer = get(headers, "authorization");
        let session = set
            .session
            .as_mut()
            .ok_or_else(|| refused(404, "no such session"))?;
        if session.expired {
            let kind = "GitHub.Actions.Runtime.WebApi.RunnerScaleSetSessionExpiredException";
            return Err(of_kind(400, kind, "The session has expired."));
        }
        if bearer.strip_prefix("Bearer ") != Some(&session.token)
            || session.token_until <= Instant::now()
        {
            return Err(refused(401, "the message queue token has expired"));
        }
        match (method.as_str(), &rest[1..]) {
            ("GET", []) => {
                let accept = get(headers, "accept");
                if accept != "application/json; api-version=6.0-preview" {
                    return Err(violation(format!("Accept: {accept}")));
                }
                let capacity = get(headers, "x-scalesetmaxcapacity").parse();
                session.capacity = capacity.map_err(|_| violation("no X-ScaleSetMaxCapacity"))?;
                session.polled = Instant::now();
                let last = query
                    .get("lastMessageId")
                    .map_or(Ok(0), |n| n.parse())
                    .map_err(|_| violation("lastMessageId"))?;
                if set.messages.range(last + 1..).next().is_none() && !set.pending.is_empty() {
                    let many = EVENTS.min(set.pending.len());
                    let events: Value = set.pending.drain(..many).collect();
                    set.message("RunnerScaleSetJobMessages", &events.to_string());
                }
                let message = set.messages.range(last + 1..).next();
                match message.map(|(id, message)| (*id, message.clone())) {
                    None => {
                        self.offer(id);
                        Ok((StatusCode::ACCEPTED, Value::Null))
                    }
                    Some((number, (kind, body))) => Ok((
                        StatusCode::OK,
                        json!({
                            "messageId": number, "messageType": kind,
                            "body": (body != "null").then_some(body), "statistics": self.statistics(),
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
                    .ok_or_else(|| refused(404, "no such message"))?;
                Ok((StatusCode::NO_CONTENT, Value::Null))
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    /// Gives queued jobs to a set, as many as it says it has room for: github.com assigns them, an Enterprise Server offers them.
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
            let of = self.jobs.get_mut(&job).unwrap();
            of.offered = true;
            if self.ghes {
                self.tell(set, "JobAvailable", job, "", "");
            } else {
                of.stage = Stage::Assigned;
                self.tell(set, "JobAssigned", job, "", "");
            }
        }
    }
}
