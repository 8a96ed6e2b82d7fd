// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scale sets: GitHub tells by a long poll how many runners it wants, which job each got, and how that
//! ended.
//!
//! As the official client does it (github.com/actions/scaleset; client.go, session_client.go,
//! types.go): a registration token buys the address of the Actions service and a token for it, a
//! session there has a queue of messages, and a message that was worked on is deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderName, Method, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::group::Group;
pub use super::message::{Event, Job, Message, Statistics};
use super::message::{if_right, or_default};
use super::{Answer, GitHub, GitHubError, Side, TIMEOUT};
use crate::text::printable;

/// A poll is answered after some 50 seconds at the latest, with 202.
const POLL: Duration = Duration::from_secs(90);

const SETS: &str = "_apis/runtime/runnerscalesets";

const GROUPS: &str = "_apis/runtime/runnergroups/";

/// What a message of events is.
const JOB_MESSAGES: &str = "RunnerScaleSetJobMessages";

/// So many kinds of what cannot be read are said.
const MAX_ODD: usize = 100;

/// How long a registration token that was just made is refused for at most: so often it is tried again, after pauses that double,
/// the first of this length. Not all of GitHub's servers know it at once; the official client waits for 15 s in all.
const NEW_TOKEN: (u32, Duration) = (6, Duration::from_millis(250));

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
    /// The numbers of runner groups.
    groups: BTreeMap<String, u64>,
    /// The kinds of events and messages that were passed over.
    odd: Mutex<BTreeSet<String>>,
}

/// A session: the queue of one scale set's messages.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    session_id: String,
    message_queue_url: String,
    message_queue_access_token: SecretString,
    /// How many jobs there are.
    #[serde(default, deserialize_with = "if_right")]
    pub statistics: Option<Statistics>,
}

impl Session {
    /// Its id, a UUID: no secret.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.session_id
    }
}

impl ScaleSets {
    /// A client; nothing is asked yet.
    #[must_use]
    pub const fn new(github: Arc<GitHub>) -> Self {
        Self {
            github,
            service: None,
            groups: BTreeMap::new(),
            odd: Mutex::new(BTreeSet::new()),
        }
    }

    /// The number of a runner group.
    ///
    /// # Errors
    /// [`GitHubError::NoGroup`] where there is none of that name; else see [`GitHubError`].
    pub async fn group(&mut self, group: &Group) -> Result<u64, GitHubError> {
        #[derive(Deserialize)]
        struct OfGroup {
            id: u64,
            name: String,
        }
        let name = match group {
            Group::Number(number) => return Ok(*number),
            Group::Name(name) => name,
        };
        if let Some(number) = self.groups.get(name) {
            return Ok(*number);
        }
        let query = format!("{GROUPS}?groupName={}", in_query(name));
        let answer = self.ask(Method::GET, &query, NO_BODY).await?;
        let groups = answer.json::<List<OfGroup>>(StatusCode::OK)?;
        let mut groups = groups.value.unwrap_or_default().into_iter();
        let found = groups.find(|group| group.name == *name);
        let found = found.ok_or_else(|| GitHubError::NoGroup(name.clone()))?;
        self.groups.insert(name.clone(), found.id);
        Ok(found.id)
    }

    /// The number of the scale set of that name in a runner group. It is made where there is none, and changed where it
    /// is not as it should be. Names are unique within a group: one of another group may be another team's.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn find_or_create(
        &mut self,
        name: &str,
        group: u64,
        labels: &[String],
    ) -> Result<u64, GitHubError> {
        let query = format!("{SETS}?runnerGroupId={group}&name={}", in_query(name));
        let answer = self.ask(Method::GET, &query, NO_BODY).await?;
        let sets = answer.json::<List<Set>>(StatusCode::OK)?.value;
        let mut sets = sets.unwrap_or_default().into_iter();
        let found = sets.find(|set| set.name == name);
        let wanted = json!({
            "name": name,
            "runnerGroupId": group,
            "labels": labels.iter().map(|label| json!({"name": label, "type": "System"})).collect::<Vec<_>>(),
            "RunnerSetting": {"disableUpdate": true},
        });
        let set = match found {
            None => {
                let answer = self.ask(Method::POST, SETS, Some(&wanted)).await?;
                answer.json::<Set>(StatusCode::OK)?
            }
            Some(set) if set.is(group, labels) => set,
            Some(set) => {
                let path = format!("{SETS}/{}", set.id);
                let answer = self.ask(Method::PATCH, &path, Some(&wanted)).await?;
                match answer.json::<Set>(StatusCode::OK) {
                    Ok(changed) => {
                        info!(
                            set = name,
                            "changed the labels, runner group or settings of the scale set to the configured ones"
                        );
                        changed
                    }
                    // It is as it was, and may do.
                    Err(error) if error.status().is_some() && error.retry().is_none() => {
                        warn!(set = name, %error, "the scale set is not as configured");
                        return Ok(set.id);
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        if let Some(kept) = set.names()
            && !same(&kept, labels)
        {
            let kept = printable(&kept.join(" "));
            warn!(
                set = name,
                kept,
                "GitHub has not stored all labels: an Enterprise Server before 3.21 keeps one for each scale set"
            );
        }
        Ok(set.id)
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

    /// Ends a session, by its id.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn close(&mut self, set: u64, session: &str) -> Result<(), GitHubError> {
        let path = format!("{SETS}/{set}/sessions/{}", in_query(session));
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
            .ask_with(Side::Actions, Method::GET, &url, &headers, NO_BODY, POLL)
            .await?;
        self.message(&answer)
    }

    /// Reads what the queue had. What is in it is read one by one: what cannot be read, and what later versions may tell, is
    /// passed over, as a message that is never done with would hold up all after it.
    fn message(&self, answer: &Answer) -> Result<Option<Message>, GitHubError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            message_id: u64,
            #[serde(default, deserialize_with = "if_right")]
            message_type: Option<String>,
            /// JSON in JSON.
            #[serde(default)]
            body: Value,
            #[serde(default, deserialize_with = "if_right")]
            statistics: Option<Statistics>,
        }
        // An empty 200 means the same (actions-runner-controller, issues 4285 and 4470).
        let nothing = answer.status == StatusCode::OK && answer.is_empty();
        if answer.status == StatusCode::ACCEPTED || nothing {
            return Ok(None);
        }
        let raw: Raw = answer.json(StatusCode::OK)?;
        let kind = raw.message_type.unwrap_or_default();
        let body = match raw.body {
            Value::String(text) if text.is_empty() => Value::Null,
            Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
            body => body,
        };
        let events = match body {
            _ if kind != JOB_MESSAGES => {
                self.pass_over(&kind, "a message of an unknown type");
                Vec::new()
            }
            Value::Null => Vec::new(),
            Value::Array(events) => events.into_iter().filter_map(|e| self.event(e)).collect(),
            _ => {
                self.pass_over("", "a message whose body is not a list");
                Vec::new()
            }
        };
        Ok(Some(Message {
            id: raw.message_id,
            statistics: raw.statistics,
            events,
        }))
    }

    fn event(&self, event: Value) -> Option<Event> {
        let kind = event["messageType"].as_str().unwrap_or_default().to_owned();
        match Event::of(&kind, event) {
            Some(Ok(event)) => Some(event),
            Some(Err(error)) => {
                self.pass_over(&kind, &format!("an event that cannot be read ({error})"));
                None
            }
            None => {
                self.pass_over(&kind, "an event of an unknown type");
                None
            }
        }
    }

    /// Says once of each kind that it is passed over.
    fn pass_over(&self, kind: &str, what: &str) {
        let short = |text: &str| printable(&text.chars().take(200).collect::<String>());
        let (kind, what) = (short(kind), short(what));
        // What it has otherwise may differ each time.
        let of = format!("{}{kind}", what.split('(').next().unwrap_or_default());
        let mut odd = self.odd.lock().expect("never held over a panic");
        if odd.len() < MAX_ODD && odd.insert(of) {
            warn!(kind, "GitHub sent {what}: skipped (logged once)");
        }
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
            .ask_with(
                Side::Actions,
                Method::DELETE,
                &url,
                &headers,
                NO_BODY,
                TIMEOUT,
            )
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
            #[serde(default, deserialize_with = "or_default")]
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
            .ask_with(
                Side::Actions,
                Method::POST,
                &url,
                &headers,
                Some(&jobs),
                TIMEOUT,
            )
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
                .ask_with(Side::Actions, method.clone(), &url, &headers, body, TIMEOUT)
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
    let (mut again, mut pause) = NEW_TOKEN;
    let answer = loop {
        let answer = github
            .ask_with(
                Side::Rest,
                Method::POST,
                &url,
                &headers,
                Some(&body),
                TIMEOUT,
            )
            .await?;
        // The same one: another would be as new.
        let unknown = matches!(answer.status.as_u16(), 401 | 403);
        let limited = answer.expect(&[]).is_err_and(|e| e.retry().is_some());
        if !unknown || limited || again == 0 {
            break answer;
        }
        tokio::time::sleep(pause).await;
        (again, pause) = (again - 1, pause * 2);
    };
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

#[derive(Deserialize)]
struct List<T> {
    value: Option<Vec<T>>,
}

/// A scale set. What is null or not there is not known.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Set {
    id: u64,
    #[serde(default, deserialize_with = "or_default")]
    name: String,
    runner_group_id: Option<u64>,
    labels: Option<Vec<Label>>,
    #[serde(alias = "RunnerSetting")]
    runner_setting: Option<Setting>,
}

#[derive(Debug, Deserialize)]
struct Label {
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Setting {
    disable_update: Option<bool>,
}

impl Set {
    fn names(&self) -> Option<Vec<String>> {
        let labels = self.labels.as_ref()?.iter();
        Some(labels.map(|label| label.name.clone()).collect())
    }

    fn is(&self, group: u64, labels: &[String]) -> bool {
        let settings = self.runner_setting.as_ref();
        self.runner_group_id.is_none_or(|own| own == group)
            && self.names().is_none_or(|own| same(&own, labels))
            && settings.is_none_or(|settings| settings.disable_update == Some(true))
    }
}

/// Whether labels are the same: in any order and any case, as GitHub takes them.
fn same(some: &[String], others: &[String]) -> bool {
    let set = |labels: &[String]| -> BTreeSet<_> {
        labels
            .iter()
            .map(|label| label.to_ascii_lowercase())
            .collect()
    };
    set(some) == set(others)
}

/// A text as a value in a query, or as a part of a path.
fn in_query(text: &str) -> String {
    super::rest::in_path(text).replace('/', "%2F")
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
}
