// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scale sets: GitHub tells by a long poll how many runners it wants, which job each got, and how that
//! ended.
//!
//! As the official client does it (github.com/actions/scaleset; client.go, session_client.go,
//! types.go): a registration token buys the address of the Actions service and a token for it, a
//! session there has a queue of messages, and a message that was worked on is deleted.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderName, Method, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::{Answer, GitHub, GitHubError, TIMEOUT};
use crate::engine::Verdict;

/// A poll is answered after some 50 seconds at the latest, with 202.
const POLL: Duration = Duration::from_secs(90);

const SETS: &str = "_apis/runtime/runnerscalesets";

const MAX_CAPACITY: HeaderName = HeaderName::from_static("x-scalesetmaxcapacity");

const NO_BODY: Option<&()> = None;

/// The Actions service of one owner.
#[derive(Debug)]
struct Service {
    url: String,
    authorization: SecretString,
    /// Seconds since 1970.
    expires: u64,
}

/// A client of one owner's scale sets.
#[derive(Debug)]
pub struct ScaleSets {
    github: Arc<GitHub>,
    service: Option<Service>,
}

/// A session: the queue of one scale set's messages.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    session_id: String,
    message_queue_url: String,
    message_queue_access_token: SecretString,
    /// How many jobs there are.
    #[serde(default)]
    pub statistics: Option<Statistics>,
}

/// How many jobs and runners a scale set has, as GitHub counts them: it may be late, and it may be wrong for long. What it
/// does not say is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Statistics {
    /// Jobs that could be had.
    #[serde(deserialize_with = "or_default")]
    pub total_available_jobs: u32,
    /// Jobs that were taken, and are not assigned yet.
    #[serde(deserialize_with = "or_default")]
    pub total_acquired_jobs: u32,
    /// Jobs that are assigned to it, those that run among them: as many runners are wanted.
    #[serde(deserialize_with = "or_default")]
    pub total_assigned_jobs: u32,
    /// Jobs that run.
    #[serde(deserialize_with = "or_default")]
    pub total_running_jobs: u32,
    /// Its runners.
    #[serde(deserialize_with = "or_default")]
    pub total_registered_runners: u32,
    /// Those that have a job.
    #[serde(deserialize_with = "or_default")]
    pub total_busy_runners: u32,
    /// Those that wait for one.
    #[serde(deserialize_with = "or_default")]
    pub total_idle_runners: u32,
}

/// What the queue had.
#[derive(Debug)]
pub struct Message {
    /// Its number.
    pub id: u64,
    /// How many jobs there are now.
    pub statistics: Option<Statistics>,
    /// What happened to jobs.
    pub events: Vec<Event>,
}

/// What happened to a job.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "messageType")]
pub enum Event {
    /// It can be had.
    JobAvailable(Job),
    /// It is the set's.
    JobAssigned(Job),
    /// A runner has it.
    JobStarted(Job),
    /// It has ended.
    JobCompleted(Job),
}

/// A job, as far as GitHub says: what it leaves out, or has as null, is empty or 0 (the official client reads it so too).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Job {
    /// Its number in the queue; 0 at github.com, where jobs are assigned without being asked for.
    #[serde(deserialize_with = "or_default")]
    pub runner_request_id: i64,
    /// A UUID, by which jobs are told apart.
    #[serde(deserialize_with = "or_default")]
    pub job_id: String,
    /// Its repository's name.
    #[serde(deserialize_with = "or_default")]
    pub repository_name: String,
    /// And owner.
    #[serde(deserialize_with = "or_default")]
    pub owner_name: String,
    /// For people.
    #[serde(deserialize_with = "or_default")]
    pub job_display_name: String,
    /// `OWNER/NAME/PATH@REF` of the workflow that it stands in. A reusable workflow's is that one's.
    #[serde(deserialize_with = "or_default")]
    pub job_workflow_ref: String,
    /// The run that it belongs to; 0: it is not known.
    #[serde(deserialize_with = "or_default")]
    pub workflow_run_id: u64,
    /// The event that its run was begun by.
    #[serde(deserialize_with = "or_default")]
    pub event_name: String,
    /// The labels that it wants.
    #[serde(deserialize_with = "or_default")]
    pub request_labels: Vec<String>,
    /// The runner that has it.
    #[serde(deserialize_with = "or_default")]
    pub runner_name: String,
    /// How it ended.
    #[serde(deserialize_with = "or_default")]
    pub result: String,
    /// When it was queued, RFC 3339.
    #[serde(deserialize_with = "time")]
    pub queue_time: Option<String>,
    /// When it became the set's.
    #[serde(deserialize_with = "time")]
    pub scale_set_assign_time: Option<String>,
    /// When a runner got it.
    #[serde(deserialize_with = "time")]
    pub runner_assign_time: Option<String>,
}

/// A value; null is what is left out.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A time. The service writes the first moment of the year 1 where there is none.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let time = Option::<String>::deserialize(deserializer)?;
    Ok(time.filter(|time| !time.is_empty() && !time.starts_with("0001-")))
}

impl Job {
    /// How it ended.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.result.to_ascii_lowercase().as_str() {
            "succeeded" | "succeededwithissues" => Verdict::Success,
            "" => Verdict::Unknown,
            _ => Verdict::Failure,
        }
    }
}

impl ScaleSets {
    /// A client; nothing is asked yet.
    #[must_use]
    pub const fn new(github: Arc<GitHub>) -> Self {
        Self {
            github,
            service: None,
        }
    }

    /// The number of the scale set of that name, which is made where there is none.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn find_or_create(
        &mut self,
        name: &str,
        group: u64,
        labels: &[String],
    ) -> Result<u64, GitHubError> {
        #[derive(Deserialize)]
        struct Set {
            id: u64,
        }
        #[derive(Deserialize)]
        struct Sets {
            value: Vec<Set>,
        }
        let query = format!("{SETS}?runnerGroupId={group}&name={name}");
        let answer = self.ask(Method::GET, &query, NO_BODY).await?;
        if let Some(set) = answer.json::<Sets>(StatusCode::OK)?.value.first() {
            return Ok(set.id);
        }
        let labels: Vec<_> = labels
            .iter()
            .map(|label| json!({"name": label, "type": "System"}))
            .collect();
        let new = json!({
            "name": name,
            "runnerGroupId": group,
            "labels": labels,
            "RunnerSetting": {"disableUpdate": true},
        });
        let answer = self.ask(Method::POST, SETS, Some(&new)).await?;
        Ok(answer.json::<Set>(StatusCode::OK)?.id)
    }

    /// Registers a runner of the set and gives what it starts with.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn generate_jit(
        &mut self,
        set: u64,
        name: &str,
        work_folder: &str,
    ) -> Result<SecretString, GitHubError> {
        #[derive(Deserialize)]
        struct Config {
            #[serde(rename = "encodedJITConfig")]
            encoded: SecretString,
        }
        let path = format!("{SETS}/{set}/generatejitconfig");
        let new = json!({"name": name, "workFolder": work_folder});
        let answer = self.ask(Method::POST, &path, Some(&new)).await?;
        Ok(answer.json::<Config>(StatusCode::OK)?.encoded)
    }

    /// Begins a session. 409 while there is another.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn open(&mut self, set: u64, owner: &str) -> Result<Session, GitHubError> {
        let path = format!("{SETS}/{set}/sessions");
        let new = json!({"ownerName": owner});
        let answer = self.ask(Method::POST, &path, Some(&new)).await?;
        answer.json(StatusCode::OK)
    }

    /// Gives a session a new token.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn refresh(&mut self, set: u64, session: &mut Session) -> Result<(), GitHubError> {
        let path = format!("{SETS}/{set}/sessions/{}", session.session_id);
        let answer = self.ask(Method::PATCH, &path, NO_BODY).await?;
        *session = answer.json(StatusCode::OK)?;
        Ok(())
    }

    /// Ends a session.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn close(&mut self, set: u64, session: &Session) -> Result<(), GitHubError> {
        let path = format!("{SETS}/{set}/sessions/{}", session.session_id);
        let answer = self.ask(Method::DELETE, &path, NO_BODY).await?;
        answer.expect(&[StatusCode::NO_CONTENT, StatusCode::NOT_FOUND])?;
        Ok(())
    }

    /// The next message after `last`, if one comes within a minute. `capacity`: how many runners there
    /// can be at most. 401 where the session's token has ended.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn poll(
        &self,
        session: &Session,
        last: u64,
        capacity: u32,
    ) -> Result<Option<Message>, GitHubError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            message_id: u64,
            message_type: String,
            /// JSON in JSON.
            body: String,
            statistics: Option<Statistics>,
        }
        let mut url = session.message_queue_url.clone();
        if last > 0 {
            let joint = if url.contains('?') { '&' } else { '?' };
            url += &format!("{joint}lastMessageId={last}");
        }
        let headers = [
            (
                header::ACCEPT,
                &"application/json; api-version=6.0-preview"
                    .to_owned()
                    .into(),
            ),
            (MAX_CAPACITY, &capacity.to_string().into()),
            (
                header::AUTHORIZATION,
                &bearer(&session.message_queue_access_token),
            ),
        ];
        let github = Arc::clone(&self.github);
        let answer = github
            .ask_with(Method::GET, &url, &headers, NO_BODY, POLL)
            .await?;
        if answer.status == StatusCode::ACCEPTED {
            return Ok(None);
        }
        let raw: Raw = answer.json(StatusCode::OK)?;
        let odd = |problem: &str| GitHubError::Odd {
            what: answer.what.clone(),
            problem: problem.to_owned(),
        };
        if raw.message_type != "RunnerScaleSetJobMessages" {
            return Err(odd("a message of another type"));
        }
        let events: Vec<Value> = match raw.body.as_str() {
            "" => Vec::new(),
            body => serde_json::from_str(body).map_err(|_| odd("its body is no list"))?,
        };
        // What later versions may tell, and what cannot be read, is passed over: a message that is never done with holds up all after it.
        let events = events
            .into_iter()
            .filter_map(|event| serde_json::from_value(event).ok())
            .collect();
        Ok(Some(Message {
            id: raw.message_id,
            statistics: raw.statistics,
            events,
        }))
    }

    /// Says that a message was worked on: it does not come again.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn acknowledge(&self, session: &Session, id: u64) -> Result<(), GitHubError> {
        let (path, query) = split(&session.message_queue_url);
        let url = format!("{path}/{id}{query}");
        let headers = [(
            header::AUTHORIZATION,
            &bearer(&session.message_queue_access_token),
        )];
        let answer = self
            .github
            .ask_with(Method::DELETE, &url, &headers, NO_BODY, TIMEOUT)
            .await?;
        answer.expect(&[StatusCode::NO_CONTENT])?;
        Ok(())
    }

    /// Takes jobs that can be had, by their numbers; gives those that were got.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn acquire(
        &mut self,
        set: u64,
        session: &Session,
        jobs: &[i64],
    ) -> Result<Vec<i64>, GitHubError> {
        #[derive(Deserialize)]
        struct Acquired {
            value: Vec<i64>,
        }
        let base = self.service().await?.url.clone();
        let url = url_of(&base, &format!("{SETS}/{set}/acquirejobs"));
        let headers = [(
            header::AUTHORIZATION,
            &bearer(&session.message_queue_access_token),
        )];
        let answer = self
            .github
            .ask_with(Method::POST, &url, &headers, Some(&jobs), TIMEOUT)
            .await?;
        Ok(answer.json::<Acquired>(StatusCode::OK)?.value)
    }

    /// Asks the Actions service; with a new token where it does not know the old one any more.
    async fn ask<B: Serialize>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Answer, GitHubError> {
        for again in [true, false] {
            let github = Arc::clone(&self.github);
            let service = self.service().await?;
            let url = url_of(&service.url, path);
            let headers = [(header::AUTHORIZATION, &service.authorization)];
            let answer = github
                .ask_with(method.clone(), &url, &headers, body, TIMEOUT)
                .await?;
            if answer.status != StatusCode::UNAUTHORIZED || !again {
                return Ok(answer);
            }
            self.service = None;
        }
        unreachable!("the second answer is given back")
    }

    async fn service(&mut self) -> Result<&Service, GitHubError> {
        let now = SystemTime::now();
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        // A minute before it ends, as the official client does.
        if self
            .service
            .as_ref()
            .is_none_or(|service| service.expires < now + 60)
        {
            self.service = Some(connect(&self.github).await?);
        }
        Ok(self.service.as_ref().expect("just made"))
    }
}

/// Buys the Actions service's address and token.
async fn connect(github: &GitHub) -> Result<Service, GitHubError> {
    #[derive(Deserialize)]
    struct Token {
        token: SecretString,
    }
    #[derive(Deserialize)]
    struct Connection {
        url: String,
        token: SecretString,
    }
    let path = format!(
        "{}/actions/runners/registration-token",
        github.url.owner.path()
    );
    let answer = github.ask(Method::POST, &path, NO_BODY).await?;
    let token: Token = answer.json(StatusCode::CREATED)?;
    let remote = format!("RemoteAuth {}", token.token.expose_secret()).into();
    let body = json!({"url": github.url.to_string(), "runner_event": "register"});
    let url = format!(
        "{}/actions/runner-registration",
        github.api.trim_end_matches('/')
    );
    let headers = [(header::AUTHORIZATION, &remote)];
    let answer = github
        .ask_with(Method::POST, &url, &headers, Some(&body), TIMEOUT)
        .await?;
    answer.expect(&[StatusCode::OK, StatusCode::CREATED])?;
    let connection: Connection = answer.json(answer.status)?;
    Ok(Service {
        expires: expiry(connection.token.expose_secret()).ok_or_else(|| GitHubError::Odd {
            what: answer.what.clone(),
            problem: "its token does not say when it ends".to_owned(),
        })?,
        authorization: bearer(&connection.token),
        url: connection.url,
    })
}

fn bearer(token: &SecretString) -> SecretString {
    format!("Bearer {}", token.expose_secret()).into()
}

/// When a JSON Web Token ends, seconds since 1970.
fn expiry(token: &str) -> Option<u64> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = token.split('.').nth(1)?;
    let claims = URL_SAFE_NO_PAD.decode(claims.trim_end_matches('=')).ok()?;
    Some(serde_json::from_slice::<Claims>(&claims).ok()?.exp)
}

fn split(url: &str) -> (&str, String) {
    match url.split_once('?') {
        Some((path, query)) => (path, format!("?{query}")),
        None => (url, String::new()),
    }
}

/// An address of the Actions service, whose own may have a query.
fn url_of(service: &str, path: &str) -> String {
    let (base, mut query) = split(service);
    let (path, own) = split(path);
    for more in [own.as_str(), "?api-version=6.0-preview"] {
        if let Some(more) = more.strip_prefix('?') {
            query += if query.is_empty() { "?" } else { "&" };
            query += more;
        }
    }
    format!("{}/{path}{query}", base.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_service() {
        for (service, path, want) in [
            ("https://a/t/", "x", "https://a/t/x?api-version=6.0-preview"),
            (
                "https://a/t",
                "x?n=1",
                "https://a/t/x?n=1&api-version=6.0-preview",
            ),
            (
                "https://a/t?q=2",
                "x?n=1",
                "https://a/t/x?q=2&n=1&api-version=6.0-preview",
            ),
        ] {
            assert_eq!(url_of(service, path), want);
        }
    }

    #[test]
    fn tokens_say_when_they_end() {
        let claims = URL_SAFE_NO_PAD.encode(r#"{"exp":1700000000,"iss":"x"}"#);
        assert_eq!(expiry(&format!("e30.{claims}.c2ln")), Some(1_700_000_000));
        for token in ["", "a", "a.b", "a.!.c"] {
            assert_eq!(expiry(token), None);
        }
    }

    #[test]
    fn results() {
        for (result, verdict) in [
            ("succeeded", Verdict::Success),
            ("Succeeded", Verdict::Success),
            ("failed", Verdict::Failure),
            ("canceled", Verdict::Failure),
            ("abandoned", Verdict::Failure),
            ("", Verdict::Unknown),
        ] {
            let job: Job =
                serde_json::from_value(json!({"runnerRequestId": 1, "repositoryName": "r",
                "ownerName": "o", "result": result}))
                .unwrap();
            assert_eq!(job.verdict(), verdict, "{result}");
        }
    }
}
