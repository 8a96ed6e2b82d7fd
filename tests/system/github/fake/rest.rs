// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The REST API: installation tokens, registrations, runs, references.

use axum::http::{HeaderMap, Method, StatusCode, Uri};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::{Refused, Said, empty, exact, get, query, refused, violation};
use super::{APP, OTHER, REPOSITORY, Runner, State, TIP, TOKEN, id_of};

impl State {
    /// What is asked of the REST API with a credential.
    pub(super) fn rest(
        &mut self,
        method: &Method,
        parts: &[&str],
        uri: &Uri,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Said {
        let accept = get(headers, "accept");
        if accept != "application/vnd.github+json" {
            return Err(violation(format!("Accept: {accept}")));
        }
        if get(headers, "x-github-api-version") != "2022-11-28" {
            return Err(violation("no X-GitHub-Api-Version"));
        }
        let authorization = get(headers, "authorization");
        let token = authorization.strip_prefix("Bearer ").unwrap_or_default();
        let now = self.now();
        if token != TOKEN && self.tokens.get(token).is_none_or(|until| *until <= now) {
            return Err(refused(401, "Bad credentials"));
        }
        match parts {
            ["orgs", "octo", "actions", "runners", rest @ ..] => {
                self.registrations(method, rest, uri, body)
            }
            ["repos", owner, name, rest @ ..] => {
                let asked = format!("{owner}/{name}");
                let Some(repository) = [REPOSITORY, OTHER].into_iter().find(|own| *own == asked)
                else {
                    return Err(refused(404, "Not Found"));
                };
                if let Some(host) = &self.renamed {
                    // What is read may follow, and what is not a GET keeps its method.
                    let status = if method == Method::GET { 301 } else { 307 };
                    let query = uri
                        .query()
                        .map_or(String::new(), |query| format!("?{query}"));
                    let rest = rest
                        .iter()
                        .map(|part| format!("/{part}"))
                        .collect::<String>();
                    let to = format!("{host}/repositories/{}{rest}{query}", id_of(repository));
                    return Err(Refused {
                        location: Some(to),
                        ..refused(status, "Moved Permanently")
                    });
                }
                self.repository(method, repository, rest, uri, body)
            }
            ["repositories", id, rest @ ..] => {
                let mut known = [REPOSITORY, OTHER].into_iter();
                let repository = known.find(|own| id_of(own).to_string() == **id);
                let repository = repository.ok_or_else(|| refused(404, "Not Found"))?;
                self.repository(method, repository, rest, uri, body)
            }
            _ => Err(violation("no such endpoint")),
        }
    }

    fn repository(
        &mut self,
        method: &Method,
        repository: &str,
        rest: &[&str],
        uri: &Uri,
        body: &[u8],
    ) -> Said {
        match (method.as_str(), rest) {
            ("GET", []) => Ok((
                StatusCode::OK,
                json!({"id": id_of(repository), "full_name": repository, "default_branch": "main", "private": false}),
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
                    .filter(|job| job.origin.repository == repository)
                    .ok_or_else(|| refused(404, "Not Found"))?;
                let origin = &job.origin;
                Ok((
                    StatusCode::OK,
                    json!({"id": id, "event": origin.event, "head_branch": origin.head_branch,
                    "head_sha": origin.commit, "path": ".github/workflows/ci.yml",
                    "repository": {"id": id_of(repository), "full_name": repository},
                    "referenced_workflows": origin.referenced.map(|n| vec![json!({"path": "octo/project/.github/workflows/called.yml@main", "sha": TIP}); n]),
                    "head_repository": (!origin.head_repository.is_empty())
                        .then(|| json!({"id": id_of(origin.head_repository), "full_name": origin.head_repository}))}),
                ))
            }
            (_, ["actions", "runners", rest @ ..]) => self.registrations(method, rest, uri, body),
            _ => Err(violation("no such endpoint")),
        }
    }

    fn registrations(&mut self, method: &Method, rest: &[&str], uri: &Uri, body: &[u8]) -> Said {
        match (method.as_str(), rest) {
            ("POST", ["registration-token"]) => {
                empty(body)?;
                let token = self.secret("AREG");
                self.registration_tokens.insert(token.clone(), self.late);
                let until = jiff::Timestamp::from_second(self.now() as i64 + 3600)
                    .unwrap()
                    .to_string();
                Ok((
                    StatusCode::CREATED,
                    json!({"token": token, "expires_at": until}),
                ))
            }
            ("POST", ["generate-jitconfig"]) => self.new_runner(body),
            ("GET", []) => {
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
            ("DELETE", [id]) => {
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
        if !self.groups.contains_key(&new.runner_group_id) {
            return Err(refused(404, "Not Found"));
        }
        let (runner, encoded) = self.register(&new.name, new.labels, None)?;
        Ok((
            StatusCode::CREATED,
            json!({"runner": runner.json(self.silent), "encoded_jit_config": encoded}),
        ))
    }

    pub(super) fn installation_token(&mut self, id: &str, authorization: &str) -> Said {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Claims {
            iss: Value,
            iat: u64,
            exp: u64,
        }
        let token = authorization.strip_prefix("Bearer ").unwrap_or_default();
        let decoded = || {
            let (signed, signature) = token.rsplit_once('.')?;
            let (header, claims) = signed.split_once('.')?;
            let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &self.public_key);
            let signature = BASE64.decode(signature).ok()?;
            key.verify(signed.as_bytes(), &signature).ok()?;
            let header: Value = serde_json::from_slice(&BASE64.decode(header).ok()?).ok()?;
            let claims = serde_json::from_slice::<Claims>(&BASE64.decode(claims).ok()?).ok()?;
            (header == json!({"alg": "RS256", "typ": "JWT"})).then_some(claims)
        };
        let claims =
            decoded().ok_or_else(|| refused(401, "A JSON web token could not be decoded"))?;
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
}
