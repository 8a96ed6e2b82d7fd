// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registrations, and the runs that jobs belong to, by the REST API.

use axum::http::{Method, StatusCode};
use octocrab::models::actions::{SelfHostedRunner, SelfHostedRunnerJitConfig};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use super::{GitHub, GitHubError};
use crate::supervisor::scope::Run;
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
        let config: SelfHostedRunnerJitConfig = answer.json(StatusCode::CREATED)?;
        Ok(config.encoded_jit_config.into())
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
                id: *runner.id,
                online: runner.status == "online",
                busy: runner.busy,
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

    async fn page(&self, query: &str) -> Result<Vec<SelfHostedRunner>, GitHubError> {
        #[derive(Deserialize)]
        struct Page {
            runners: Vec<SelfHostedRunner>,
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
    /// `GET /repos/OWNER/NAME/actions/runs/ID`, `GET /repos/OWNER/NAME`.
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
            full_name: String,
        }
        #[derive(Deserialize)]
        struct OfRun {
            event: String,
            head_branch: Option<String>,
            repository: Repository,
            head_repository: Option<Repository>,
        }
        #[derive(Deserialize)]
        struct Defaults {
            default_branch: String,
        }
        let path = format!("/repos/{owner}/{name}");
        let answer = self.ask(Method::GET, &path, NO_BODY).await?;
        let defaults: Defaults = answer.json(StatusCode::OK)?;
        let path = format!("{path}/actions/runs/{id}");
        let answer = self.ask(Method::GET, &path, NO_BODY).await?;
        let run: OfRun = answer.json(StatusCode::OK)?;
        Ok(Run {
            repository: run.repository.full_name,
            head_repository: run.head_repository.map(|head| head.full_name),
            head_branch: run.head_branch,
            event: run.event,
            default_branch: defaults.default_branch,
            id,
            workflow_ref: workflow_ref.to_owned(),
        })
    }
}
