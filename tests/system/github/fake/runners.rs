// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The runners: their registrations, and what the stand-in for the runner asks.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::http::{Refused, Said, refused, violation};
use super::{REPOSITORY, Stage, State};

#[derive(Debug, Clone)]
pub struct Runner {
    pub id: u64,
    pub name: String,
    pub labels: Vec<String>,
    /// Of a scale set.
    pub set: Option<u64>,
    secret: String,
    pub(super) seen: Option<Instant>,
    pub job: Option<u64>,
}

impl Runner {
    pub(super) fn online(&self, silent: Duration) -> bool {
        self.seen.is_some_and(|seen| seen.elapsed() < silent)
    }

    pub(super) fn json(&self, silent: Duration) -> Value {
        // Of a label its name is all that is always there.
        let labels = self.labels.iter().enumerate();
        let labels: Vec<_> = labels
            .map(|(n, name)| match n % 2 {
                0 => json!({"name": name}),
                _ => json!({"id": n, "name": name, "type": "custom"}),
            })
            .collect();
        json!({
            "id": self.id, "name": self.name, "os": Value::Null,
            "status": if self.online(silent) { "online" } else { "offline" },
            "busy": self.job.is_some(), "labels": labels, "ephemeral": true,
        })
    }
}

impl State {
    pub(super) fn register(
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

    /// What the stand-in for the runner asks: `next`, `alive`, and `done/RESULT` with the job's log.
    pub(super) fn standin(&mut self, rest: &[&str], authorization: &str, body: &[u8]) -> Said {
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
                let mut jobs = self.jobs.values_mut();
                let job = jobs.find(|job| job.stage == wanted && !job.runnerless);
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
    pub(super) fn settle(&mut self) {
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
