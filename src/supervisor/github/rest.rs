// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registrations, and the runs that jobs belong to, by the REST API.

use std::fmt::Write as _;

use axum::http::{Method, StatusCode};
use secrecy::SecretString;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{GitHub, GitHubError};
use crate::supervisor::scope::{Head, Run};
use crate::supervisor::slot::Presence;

/// Most pages that are read, of 100 runners each.
const MAX_PAGES: u32 = 100;

/// What a new runner is to be.
#[derive(Debug, Serialize)]
pub struct NewRunner<'a> {
    /// Its name, of at most 64 characters.
    pub name: &'a str,
    /// Its group. There is no default: a request without it is refused.
    pub runner_group_id: u64,
    /// Its labels, 1 to 100.
    pub labels: &'a [String],
    /// Where it works, below its own directory.
    pub work_folder: &'a str,
}

/// A registration: what is needed of it. Much else may be null, or not there.
#[derive(Deserialize)]
struct Registered {
    id: u64,
    name: String,
    status: Option<String>,
    busy: Option<bool>,
}

/// What became of a request to remove a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// It is gone, or was.
    Gone,
    /// It runs a job, and stays.
    Busy,
}

const NO_BODY: Option<&()> = None;

impl GitHub {
    /// `POST …/actions/runners/generate-jitconfig`: registers a runner for one job and gives what it
    /// starts with. 201, else 403 or 404 (the group), 409 (the name is taken), 422.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn generate_jit(&self, new: &NewRunner<'_>) -> Result<SecretString, GitHubError> {
        let path = format!(
            "{}/actions/runners/generate-jitconfig",
            self.url.owner.path()
        );
        let answer = self.ask(Method::POST, &path, Some(new)).await?;
        #[derive(Deserialize)]
        struct Config {
            encoded_jit_config: SecretString,
        }
        Ok(answer
            .json::<Config>(StatusCode::CREATED)?
            .encoded_jit_config)
    }

    /// Reads the registration of a name: `GET …/actions/runners?name=NAME`.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn presence(&self, name: &str) -> Result<Presence, GitHubError> {
        let runners = self.page(&format!("name={name}&per_page=100")).await?;
        Ok(runners
            .iter()
            .find(|runner| runner.name == name)
            .map_or(Presence::Gone, |runner| Presence::There {
                id: runner.id,
                online: runner.status.as_deref() == Some("online"),
                // One that is busy is not removed, whatever is read here.
                busy: runner.busy == Some(true),
            }))
    }

    /// The names of all registrations.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn names(&self) -> Result<Vec<String>, GitHubError> {
        let mut names = Vec::new();
        for page in 1..=MAX_PAGES {
            let runners = self.page(&format!("per_page=100&page={page}")).await?;
            let last = runners.len() < 100;
            names.extend(runners.into_iter().map(|runner| runner.name));
            if last {
                break;
            }
        }
        Ok(names)
    }

    async fn page(&self, query: &str) -> Result<Vec<Registered>, GitHubError> {
        #[derive(Deserialize)]
        struct Page {
            runners: Vec<Registered>,
        }
        let path = format!("{}/actions/runners?{query}", self.url.owner.path());
        let answer = self.ask(Method::GET, &path, NO_BODY).await?;
        Ok(answer.json::<Page>(StatusCode::OK)?.runners)
    }

    /// Removes a registration: `DELETE …/actions/runners/ID`. 204; 404 where there is none; 422 while it
    /// runs a job.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn remove(&self, id: u64) -> Result<Removed, GitHubError> {
        let path = format!("{}/actions/runners/{id}", self.url.owner.path());
        let answer = self.ask(Method::DELETE, &path, NO_BODY).await?;
        let expected = [
            StatusCode::NO_CONTENT,
            StatusCode::NOT_FOUND,
            StatusCode::UNPROCESSABLE_ENTITY,
        ];
        Ok(match answer.expect(&expected)? {
            StatusCode::UNPROCESSABLE_ENTITY => Removed::Busy,
            _ => Removed::Gone,
        })
    }

    /// Reads the run that a job belongs to, and its repository's default branch:
    /// `GET /repos/OWNER/NAME/actions/runs/ID`, `GET /repos/OWNER/NAME`; and where these do not say whether
    /// it is of a branch or of a tag, the repository's references.
    ///
    /// # Errors
    /// See [`GitHubError`].
    pub async fn run(
        &self,
        owner: &str,
        name: &str,
        id: u64,
        workflow_ref: &str,
    ) -> Result<Run, GitHubError> {
        #[derive(Deserialize)]
        struct Repository {
            id: u64,
            full_name: String,
        }
        #[derive(Deserialize)]
        struct HeadRepository {
            id: u64,
        }
        #[derive(Deserialize)]
        struct OfRun {
            event: String,
            path: Option<String>,
            head_branch: Option<String>,
            head_sha: String,
            repository: Repository,
            head_repository: Option<HeadRepository>,
            referenced_workflows: Option<Vec<serde::de::IgnoredAny>>,
        }
        #[derive(Deserialize)]
        struct Defaults {
            id: u64,
            default_branch: String,
        }
        let path = format!("/repos/{owner}/{name}");
        let answer = self.ask_first(&path).await?;
        let defaults: Defaults = answer.json(StatusCode::OK)?;
        let answer = self.ask_first(&format!("{path}/actions/runs/{id}")).await?;
        let run: OfRun = answer.json(StatusCode::OK)?;
        if defaults.id != run.repository.id {
            return Err(GitHubError::Odd {
                what: answer.what,
                problem: "its repository is another, of the same name".to_owned(),
            });
        }
        let own = run.head_repository.as_ref().map(|head| head.id) == Some(run.repository.id);
        let head = match (&run.head_branch, Head::of_event(&run.event)) {
            (_, Some(head)) => head,
            // A fork's scope has its number, and no kind of reference.
            (Some(_), None) if !own => Head::Unknown,
            (None, None) => Head::Unknown,
            (Some(branch), None) => {
                let of_workflow = Head::of_workflow(
                    workflow_ref,
                    &run.repository.full_name,
                    run.path.as_deref().unwrap_or_default(),
                    run.referenced_workflows.as_ref().map(Vec::len),
                    branch,
                );
                match of_workflow {
                    Some(head) => head,
                    None => self.head(&path, branch, &run.head_sha).await?,
                }
            }
        };
        Ok(Run {
            host: self.host(),
            repository_id: run.repository.id,
            repository: run.repository.full_name,
            head_repository: run.head_repository.map(|head| head.id),
            head_branch: run.head_branch,
            head,
            commit: run.head_sha,
            event: run.event,
            default_branch: defaults.default_branch,
            id,
        })
    }

    /// Whether a name is a branch's and no tag's, and a commit is in that branch: a tag may have been
    /// called so when the run began, and be gone.
    async fn head(&self, path: &str, name: &str, commit: &str) -> Result<Head, GitHubError> {
        #[derive(Deserialize)]
        struct Reference {
            object: Object,
        }
        #[derive(Deserialize)]
        struct Object {
            sha: String,
        }
        #[derive(Deserialize)]
        struct Comparison {
            status: String,
        }
        let reference = |kind: &str| format!("{path}/git/ref/{kind}/{}", in_path(name));
        // Refused, it is as unknown as what is not there.
        let none = [StatusCode::NOT_FOUND, StatusCode::FORBIDDEN];
        let heads = reference("heads");
        let Some(branch) = self.found::<Reference>(&heads, &none).await? else {
            return Ok(Head::Unknown);
        };
        let none = [StatusCode::NOT_FOUND];
        let tags = reference("tags");
        if self.found::<Reference>(&tags, &none).await?.is_some() {
            return Ok(Head::Unknown);
        }
        let tip = branch.object.sha;
        if tip == commit {
            return Ok(Head::Branch);
        }
        // By commits, which are no names. The second page has no list of files, which may be long.
        let compared = format!("{path}/compare/{tip}...{commit}?per_page=1&page=2");
        let compared = self.found::<Comparison>(&compared, &none).await?;
        let within = compared.is_some_and(|c| matches!(c.status.as_str(), "behind" | "identical"));
        Ok(if within { Head::Branch } else { Head::Unknown })
    }

    /// What is at a path, `None` where a refusal of one of these statuses says that nothing is.
    async fn found<T: DeserializeOwned>(
        &self,
        path: &str,
        none: &[StatusCode],
    ) -> Result<Option<T>, GitHubError> {
        let answer = self.ask_first(path).await?;
        match answer.json(StatusCode::OK) {
            Err(error)
                if error.status().is_some_and(|status| none.contains(&status))
                    && error.retry().is_none() =>
            {
                Ok(None)
            }
            found => found.map(Some),
        }
    }
}

/// A name as a part of a path, in which `/` is as it is.
pub(super) fn in_path(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::in_path;

    #[test]
    fn names_in_paths() {
        for (name, path) in [
            ("feature/a-b_c.1~", "feature/a-b_c.1~"),
            ("a b?c#d%e", "a%20b%3Fc%23d%25e"),
            ("\u{e9}", "%C3%A9"),
        ] {
            assert_eq!(in_path(name), path);
        }
    }
}
