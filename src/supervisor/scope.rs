// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Trust: which scopes a job's caches are read from and written to, from what GitHub says of it.
//!
//! A job says nothing of itself here. Not even a scale set's `jobWorkflowRef` is asked where its
//! branch is: in a reusable workflow it names the branch of that one, which the job's author
//! chooses. The run that the job belongs to is read from GitHub instead, which knows the repository
//! that its commit came from.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Deserialize;

use crate::cache::names::escape;

/// What GitHub says of the run that a job belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The repository whose workflow it is: `owner/name`.
    pub repository: String,
    /// Where its commit is from; `None` where that repository is gone.
    pub head_repository: Option<String>,
    /// The branch or tag there.
    pub head_branch: Option<String>,
    /// `push`, `pull_request` …
    pub event: String,
    /// The repository's default branch.
    pub default_branch: String,
    /// The run's number, for which nobody else can claim it.
    pub id: u64,
    /// The workflow's reference, as the scale set has it: `owner/name/PATH@refs/heads/main`.
    pub workflow_ref: String,
}

impl Run {
    /// Its commit is from another repository, or from one that is gone.
    #[must_use]
    pub fn is_fork(&self) -> bool {
        let own = |head: &String| head.eq_ignore_ascii_case(&self.repository);
        !self.head_repository.as_ref().is_some_and(own)
    }

    /// It is of the default branch itself.
    #[must_use]
    pub fn is_default(&self) -> bool {
        !self.is_fork()
            && self.head_branch.as_deref() == Some(&self.default_branch)
            // Where the workflow is the repository's own, a tag of that name can be told from the branch.
            && self.own_ref().is_none_or(|of| {
                of.strip_prefix("refs/heads/") == Some(&self.default_branch)
            })
    }

    fn own_ref(&self) -> Option<&str> {
        let (path, of) = self.workflow_ref.split_once('@')?;
        let own = path.get(..self.repository.len())?;
        let below = path[self.repository.len()..].starts_with('/');
        (below && own.eq_ignore_ascii_case(&self.repository)).then_some(of)
    }

    /// What `{ref}` stands for: whose commit it is. No two kinds begin alike.
    #[must_use]
    pub fn reference(&self) -> String {
        match (&self.head_repository, &self.head_branch) {
            (Some(head), Some(branch)) if self.is_fork() => format!("fork/{head}/{branch}"),
            (Some(_), Some(branch)) if self.event == "push" && !self.names_branch() => {
                format!("tag/{branch}")
            }
            (Some(_), Some(branch)) => format!("branch/{branch}"),
            _ => format!("run/{}", self.id),
        }
    }

    fn names_branch(&self) -> bool {
        self.own_ref()
            .is_none_or(|of| !of.starts_with("refs/tags/"))
    }
}

/// Which runs a rule is for. What it does not say, it does not ask.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rule {
    /// Of these events only.
    pub events: Option<Vec<String>>,
    /// Of the default branch, or of none but it.
    pub default_branch: Option<bool>,
    /// From forks, or not from them.
    pub fork: Option<bool>,
    /// The scope that is written, and read first.
    pub write: Template,
    /// The scopes that are read after it.
    #[serde(default)]
    pub read: Vec<Template>,
}

impl Rule {
    fn is_for(&self, run: &Run) -> bool {
        let events = self.events.as_ref();
        events.is_none_or(|events| events.contains(&run.event))
            && self.default_branch.is_none_or(|d| d == run.is_default())
            && self.fork.is_none_or(|fork| fork == run.is_fork())
    }
}

/// The mapping if the configuration says none: what was pushed to the default branch, and what was
/// started there by those who may, writes the default scope, which all read; everything else writes
/// its own.
#[must_use]
pub fn default_rules() -> Vec<Rule> {
    let template = |text: &str| Template(text.to_owned());
    let trusted = ["push", "schedule", "workflow_dispatch"];
    vec![
        Rule {
            events: Some(trusted.map(str::to_owned).to_vec()),
            default_branch: Some(true),
            fork: Some(false),
            write: template("{repository}"),
            read: Vec::new(),
        },
        Rule {
            events: None,
            default_branch: None,
            fork: None,
            write: template("{repository}:{ref}"),
            read: vec![template("{repository}")],
        },
    ]
}

/// The scopes of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scopes {
    /// Written, and read first.
    pub write: String,
    /// Read after it, in order.
    pub read: Vec<String>,
}

/// The scopes of a job, by the first rule that is for its run; `None` where none is.
#[must_use]
pub fn scopes(rules: &[Rule], run: &Run, slot: &str) -> Option<Scopes> {
    let rule = rules.iter().find(|rule| rule.is_for(run))?;
    let values = Values {
        slot,
        repository: Some(&run.repository),
        reference: Some(&run.reference()),
    };
    let filled = |template: &Template| escape(&template.fill(&values));
    Some(Scopes {
        write: filled(&rule.write),
        read: rule.read.iter().map(filled).collect(),
    })
}

/// What placeholders stand for.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a> {
    /// `{slot}`: the pool's name, `-` and the slot's number.
    pub slot: &'a str,
    /// `{repository}`, where it is known.
    pub repository: Option<&'a str>,
    /// `{ref}`, where it is known.
    pub reference: Option<&'a str>,
}

/// Text with placeholders, all of which are known ones.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Template(String);

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut rest = text.as_str();
        while let Some(at) = rest.find(['{', '}']) {
            rest = &rest[at..];
            let known = ["{slot}", "{repository}", "{ref}"];
            let Some(name) = known.iter().find(|name| rest.starts_with(**name)) else {
                let shown: String = rest.chars().take(20).collect();
                return Err(format!(
                    "{shown:?} in {text:?} is no placeholder: there are {{slot}}, {{repository}} and {{ref}}"
                ));
            };
            rest = &rest[name.len()..];
        }
        Ok(Self(text))
    }
}

impl Template {
    /// Whether it has this placeholder: `slot`, `repository` or `ref`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(&format!("{{{name}}}"))
    }

    /// The text with its placeholders filled in; what is not known is nothing.
    #[must_use]
    pub fn fill(&self, values: &Values) -> String {
        let names = BTreeMap::from([
            ("slot", values.slot),
            ("repository", values.repository.unwrap_or_default()),
            ("ref", values.reference.unwrap_or_default()),
        ]);
        let mut out = String::new();
        let mut rest = self.0.as_str();
        // In one pass: what is filled in is not looked into.
        while let Some((before, after)) = rest.split_once('{') {
            let (name, tail) = after.split_once('}').expect("made by parsing");
            let _ = write!(out, "{before}{}", names[name]);
            rest = tail;
        }
        out + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(event: &str, head: &str, branch: &str, workflow_ref: &str) -> Run {
        Run {
            repository: "o/r".into(),
            head_repository: (!head.is_empty()).then(|| head.to_owned()),
            head_branch: (!branch.is_empty()).then(|| branch.to_owned()),
            event: event.into(),
            default_branch: "main".into(),
            id: 42,
            workflow_ref: workflow_ref.into(),
        }
    }

    #[test]
    fn default_mapping() {
        let own = |of: &str| format!("o/r/.github/workflows/ci.yml@{of}");
        let shared = "o/shared/.github/workflows/ci.yml@refs/heads/main";
        for (event, head, branch, workflow, write) in [
            (
                "push",
                "o/r",
                "main",
                own("refs/heads/main").as_str(),
                "o/r",
            ),
            ("push", "O/R", "main", &own("refs/heads/main"), "o/r"),
            ("schedule", "o/r", "main", &own("refs/heads/main"), "o/r"),
            (
                "workflow_dispatch",
                "o/r",
                "main",
                &own("refs/heads/main"),
                "o/r",
            ),
            ("push", "o/r", "main", shared, "o/r"),
            (
                "push",
                "o/r",
                "topic",
                &own("refs/heads/topic"),
                "o/r:branch/topic",
            ),
            // Whose reusable workflow is of main is not of main for that.
            ("push", "o/r", "topic", shared, "o/r:branch/topic"),
            (
                "pull_request",
                "o/r",
                "topic",
                &own("refs/pull/3/merge"),
                "o/r:branch/topic",
            ),
            (
                "pull_request",
                "o/r",
                "main",
                &own("refs/pull/3/merge"),
                "o/r:branch/main",
            ),
            // A tag that is called as the branch is.
            (
                "push",
                "o/r",
                "main",
                &own("refs/tags/main"),
                "o/r:tag/main",
            ),
            ("push", "o/r", "v1", &own("refs/tags/v1"), "o/r:tag/v1"),
            // A fork's branch that is called as the default branch is.
            (
                "pull_request",
                "evil/r",
                "main",
                &own("refs/pull/4/merge"),
                "o/r:fork/evil/r/main",
            ),
            (
                "pull_request",
                "evil/r",
                "main",
                shared,
                "o/r:fork/evil/r/main",
            ),
            (
                "pull_request_target",
                "evil/r",
                "main",
                &own("refs/heads/main"),
                "o/r:fork/evil/r/main",
            ),
            // Events that anybody can cause, on the default branch.
            (
                "pull_request_target",
                "o/r",
                "main",
                &own("refs/heads/main"),
                "o/r:branch/main",
            ),
            (
                "issue_comment",
                "o/r",
                "main",
                &own("refs/heads/main"),
                "o/r:branch/main",
            ),
            (
                "workflow_run",
                "o/r",
                "main",
                &own("refs/heads/main"),
                "o/r:branch/main",
            ),
            // A fork that was removed meanwhile.
            (
                "pull_request",
                "",
                "main",
                &own("refs/pull/5/merge"),
                "o/r:run/42",
            ),
            ("push", "o/r", "", &own("refs/heads/main"), "o/r:run/42"),
            (
                "push",
                "o/r",
                "a{slot}b c,d",
                "",
                "o/r:branch/a&7bslot&7db&20c&2cd",
            ),
        ] {
            let run = run(event, head, branch, workflow);
            let scopes = scopes(&default_rules(), &run, "s-1").expect("the last rule is for all");
            assert_eq!(
                scopes.write.to_lowercase(),
                write,
                "{event} {head} {branch} {workflow}"
            );
            let read: &[&str] = if write == "o/r" { &[] } else { &["o/r"] };
            assert_eq!(scopes.read, read, "{event} {head} {branch}");
        }
    }

    #[test]
    fn rules_of_the_configuration() {
        let rules: Vec<Rule> = [
            "events = ['merge_group']\nwrite = 'queue-{slot}'",
            "fork = true\nwrite = 'forks'\nread = ['{repository}', 'common']",
        ]
        .iter()
        .map(|text| toml::from_str(text).unwrap())
        .collect();
        let of = |event, head| scopes(&rules, &run(event, head, "x", ""), "linux-3");
        assert_eq!(of("merge_group", "o/r").unwrap().write, "queue-linux-3");
        let forks = of("push", "a/b").unwrap();
        assert_eq!((forks.write.as_str(), forks.read.len()), ("forks", 2));
        assert_eq!(of("push", "o/r"), None);
        for text in [
            "write = '{rev}'",
            "write = 'a{'",
            "write = '}'",
            "write = 'a'\nfoo = 1",
        ] {
            toml::from_str::<Rule>(text).expect_err(text);
        }
    }
}
