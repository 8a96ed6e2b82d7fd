// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Trust: which scopes a job's caches are read from and written to, from what GitHub says of it.
//!
//! A job says nothing of itself here. The run that it belongs to is read from GitHub, which knows the
//! repository that its commit came from. Names are for people: a repository's can be another one's
//! tomorrow, and a tag can be called as a branch is. So a scope has the repository's number, and a
//! run is the default branch's only where GitHub says so of the reference itself.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::cache::names::escape;

/// Longest reference that becomes a part of a scope or a tag, in bytes as they have it.
const MAX_REF: usize = 300;

/// What a run's `head_branch` is the name of. It is a name only, and branches and tags have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// A branch.
    Branch,
    /// A tag.
    Tag,
    /// One of them, or what was removed meanwhile.
    Unknown,
}

impl Head {
    /// By the event, where that is always of a branch.
    #[must_use]
    pub fn of_event(event: &str) -> Option<Self> {
        let of_branch = event == "schedule" || event == "merge_group" || of_pull_request(event);
        of_branch.then_some(Self::Branch)
    }

    /// By the reference of the workflow that a job stands in, `OWNER/NAME/PATH@REF`. That is the run's
    /// own where the job's workflow is the run's, `path`, in `repository`, and none was called
    /// (`referenced`; not known, on some servers): a reusable workflow has a reference of its own, which
    /// its caller chooses.
    #[must_use]
    pub fn of_workflow(
        workflow_ref: &str,
        repository: &str,
        path: &str,
        referenced: Option<usize>,
        name: &str,
    ) -> Option<Self> {
        let (of, reference) = workflow_ref.split_once('@')?;
        let own = format!(
            "{repository}/{}",
            path.split('@').next().unwrap_or_default()
        );
        if referenced != Some(0) || !of.eq_ignore_ascii_case(&own) {
            return None;
        }
        [("refs/heads/", Self::Branch), ("refs/tags/", Self::Tag)]
            .into_iter()
            .find(|(kind, _)| reference.strip_prefix(kind) == Some(name))
            .map(|(_, head)| head)
    }
}

/// What runs is a pull request's merge, or its base: `head_branch` is neither.
fn of_pull_request(event: &str) -> bool {
    event.starts_with("pull_request")
}

/// What GitHub says of the run that a job belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The host of GitHub's API: numbers are of it.
    pub host: String,
    /// The repository whose workflow it is: its number.
    pub repository_id: u64,
    /// And for people: `owner/name`.
    pub repository: String,
    /// Where its commit is from; `None` where that repository is gone.
    pub head_repository: Option<u64>,
    /// The branch or tag there.
    pub head_branch: Option<String>,
    /// Which of them.
    pub head: Head,
    /// Its commit.
    pub commit: String,
    /// `push`, `pull_request` …
    pub event: String,
    /// The repository's default branch.
    pub default_branch: String,
    /// The run's number, for which nobody else can claim it.
    pub id: u64,
}

impl Run {
    /// Its commit is from another repository, or from one that is gone.
    #[must_use]
    pub fn is_fork(&self) -> bool {
        self.head_repository != Some(self.repository_id)
    }

    /// It is of the default branch itself.
    #[must_use]
    pub fn is_default(&self) -> bool {
        !self.is_fork()
            && !of_pull_request(&self.event)
            && self.head == Head::Branch
            && self.head_branch.as_deref() == Some(&self.default_branch)
    }

    /// What `{ref}` stands for: whose commit it is. No two kinds begin alike.
    #[must_use]
    pub fn reference(&self) -> String {
        let known = match (self.head_repository, &self.head_branch, self.head) {
            (Some(head), Some(branch), _) if self.is_fork() => format!("fork/{head}/{branch}"),
            (Some(_), Some(branch), Head::Branch) => format!("branch/{branch}"),
            (Some(_), Some(tag), Head::Tag) => format!("tag/{tag}"),
            _ => String::new(),
        };
        if known.is_empty() || escape(&known).len() > MAX_REF {
            format!("run/{}", self.id)
        } else {
            known
        }
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
    #[serde(deserialize_with = "written")]
    pub write: Template,
    /// The scopes that are read after it.
    #[serde(default)]
    pub read: Vec<Template>,
}

fn written<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Template, D::Error> {
    let template = Template::deserialize(deserializer)?;
    if template.has("repository") {
        return Err(D::Error::custom(
            "{repository} is a name, which another repository can have later: write {repository-id}",
        ));
    }
    Ok(template)
}

impl Rule {
    fn is_for(&self, run: &Run) -> bool {
        let events = self.events.as_ref();
        events.is_none_or(|events| events.contains(&run.event))
            && self.default_branch.is_none_or(|d| d == run.is_default())
            && self.fork.is_none_or(|fork| fork == run.is_fork())
    }
}

/// The mapping if the configuration says none. What those who may write to the repository pushed to its
/// default branch, or started there, writes the default scope, which all read. What else they do, and
/// what a pull request's code does, has a scope by event and reference. Any other event may be caused by
/// strangers and have secrets at hand: nothing but its own run reads what it leaves.
///
/// What is in a merge queue writes for its commit: the push that merges it is of the same one.
#[must_use]
pub fn default_rules() -> Vec<Rule> {
    const DEFAULT: &str = "{repository-id}";
    const MERGE: &str = "{repository-id}:merge_group:commit/{commit}";
    const REFERENCE: &str = "{repository-id}:{event}:{ref}";
    const RUN: &str = "{repository-id}:{event}:run/{run}";
    // What the default scope was called by before it had a number: read, and never written.
    const FORMER: &str = "{repository}";
    let template = |text: &&str| Template((*text).to_owned());
    let rule = |events: &[&str], default_branch, fork, write: &str, read: &[&str]| Rule {
        events: (!events.is_empty()).then(|| events.iter().map(|&e| e.to_owned()).collect()),
        default_branch,
        fork,
        write: template(&write),
        read: read.iter().map(template).collect(),
    };
    let trusted = ["push", "schedule", "workflow_dispatch"];
    let own = Some(false);
    vec![
        rule(&trusted, Some(true), own, DEFAULT, &[MERGE, FORMER]),
        rule(&trusted, None, own, REFERENCE, &[DEFAULT, MERGE, FORMER]),
        rule(&["pull_request"], None, None, REFERENCE, &[DEFAULT, FORMER]),
        rule(&["merge_group"], None, own, MERGE, &[DEFAULT, FORMER]),
        rule(&[], None, None, RUN, &[DEFAULT, FORMER]),
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

impl Scopes {
    /// Of a job of which nothing is known but its runner, whose name no other has: it shares nothing.
    #[must_use]
    pub fn unknown(host: &str, runner: &str) -> Self {
        Self {
            write: escape(&format!("{host}/runner/{runner}")),
            read: Vec::new(),
        }
    }
}

/// The scopes of a job, by the first rule that is for its run; `None` where none is.
#[must_use]
pub fn scopes(rules: &[Rule], run: &Run, slot: &str) -> Option<Scopes> {
    let rule = rules.iter().find(|rule| rule.is_for(run))?;
    let values = Values::from([
        ("slot", slot.to_owned()),
        ("repository", run.repository.clone()),
        (
            "repository-id",
            // With what no name has: nobody's repository is called as another's scope is.
            format!("{}:{}", run.host, run.repository_id),
        ),
        ("event", run.event.clone()),
        ("ref", run.reference()),
        ("commit", run.commit.clone()),
        ("run", run.id.to_string()),
    ]);
    let filled = |template: &Template| escape(&template.fill(&values));
    Some(Scopes {
        write: filled(&rule.write),
        read: rule.read.iter().map(filled).collect(),
    })
}

/// What placeholders stand for, by their names.
pub type Values = BTreeMap<&'static str, String>;

/// The placeholders that there are.
const PLACEHOLDERS: [&str; 7] = [
    "slot",
    "repository",
    "repository-id",
    "event",
    "ref",
    "commit",
    "run",
];

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
            let inside = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
            let Some((_, tail)) = inside.filter(|(name, _)| PLACEHOLDERS.contains(name)) else {
                let shown: String = rest.chars().take(20).collect();
                let known = PLACEHOLDERS.map(|name| format!("{{{name}}}")).join(", ");
                return Err(format!(
                    "{shown:?} in {text:?} is no placeholder: there are {known}"
                ));
            };
            rest = tail;
        }
        Ok(Self(text))
    }
}

impl Template {
    /// Whether it has this placeholder.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(&format!("{{{name}}}"))
    }

    /// The first placeholder that it has beside these.
    #[must_use]
    pub fn other_than(&self, names: &[&str]) -> Option<&'static str> {
        PLACEHOLDERS
            .into_iter()
            .find(|name| !names.contains(name) && self.has(name))
    }

    /// The text with its placeholders filled in; what is not known is nothing.
    #[must_use]
    pub fn fill(&self, values: &Values) -> String {
        let mut out = String::new();
        let mut rest = self.0.as_str();
        // In one pass: what is filled in is not looked into.
        while let Some((before, after)) = rest.split_once('{') {
            let (name, tail) = after.split_once('}').expect("made by parsing");
            let value = values.get(name).map_or("", String::as_str);
            let _ = write!(out, "{before}{value}");
            rest = tail;
        }
        out + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "api.github.com";
    const OWN: u64 = 1001;
    const FORK: u64 = 2002;

    /// What docs/supervisor.md prints.
    const DOCUMENTED: &str = include_str!("../../docs/supervisor.md");

    /// All events that start workflows (GitHub's documentation, "Events that trigger workflows"), those
    /// of which it speaks elsewhere, and one that it does not know yet.
    const EVENTS: [&str; 41] = [
        "branch_protection_rule",
        "check_run",
        "check_suite",
        "create",
        "delete",
        "deployment",
        "deployment_status",
        "discussion",
        "discussion_comment",
        "dynamic",
        "fork",
        "gollum",
        "image_version",
        "issue_comment",
        "issues",
        "label",
        "member",
        "merge_group",
        "milestone",
        "page_build",
        "project",
        "project_card",
        "project_column",
        "public",
        "pull_request",
        "pull_request_comment",
        "pull_request_review",
        "pull_request_review_comment",
        "pull_request_target",
        "push",
        "registry_package",
        "release",
        "repository_dispatch",
        "schedule",
        "status",
        "team_add",
        "unheard_of",
        "watch",
        "workflow_call",
        "workflow_dispatch",
        "workflow_run",
    ];

    const WHOSE: [&str; 3] = ["own", "a fork's", "a deleted fork's"];
    const ON: [&str; 3] = ["branch `topic`", "the default branch", "tag `main`"];

    fn run(event: &str, whose: &str, on: &str) -> Run {
        let tag = Head::of_event(event).unwrap_or(Head::Tag);
        let (name, head) = match on {
            "branch `topic`" => ("topic", Head::Branch),
            "the default branch" => ("main", Head::Branch),
            _ => ("main", tag),
        };
        Run {
            host: HOST.into(),
            repository_id: OWN,
            repository: "o/r".into(),
            head_repository: match whose {
                "own" => Some(OWN),
                "a fork's" => Some(FORK),
                _ => None,
            },
            head_branch: Some(name.into()),
            head,
            commit: "c0ffee".into(),
            event: event.into(),
            default_branch: "main".into(),
            id: 42,
        }
    }

    /// The documented table's rows, by cells.
    fn documented() -> Vec<[&'static str; 5]> {
        let table = DOCUMENTED.split("<!-- the table of trust -->\n").nth(1);
        let table = table.expect("docs/supervisor.md has the table");
        let rows = table.lines().skip(2).take_while(|line| !line.is_empty());
        rows.map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
            cells.try_into().expect("five cells")
        })
        .collect()
    }

    #[test]
    fn as_documented() {
        let rows = documented();
        let named = |event: &str| format!("`{event}`");
        let is_for = |row: &[&str; 5], event: &str, whose: &str, on: &str| {
            let listed =
                |cell: &str, what: &str| cell == "any" || cell.split(", ").any(|part| part == what);
            let event = if row[0] == "any other" {
                !rows.iter().any(|row| listed(row[0], &named(event)))
            } else {
                listed(row[0], &named(event))
            };
            event && listed(row[1], whose) && listed(row[2], on)
        };
        let mut used = vec![0; rows.len()];
        for event in EVENTS {
            for (whose, on) in WHOSE.iter().flat_map(|whose| ON.map(|on| (whose, on))) {
                // The table has no row for what cannot be.
                if on == "tag `main`" && Head::of_event(event).is_some() {
                    continue;
                }
                let fitting: Vec<_> = (0..rows.len())
                    .filter(|&n| is_for(&rows[n], event, whose, on))
                    .collect();
                let [row] = fitting[..] else {
                    panic!("{event}, {whose}, {on}: rows {fitting:?}")
                };
                used[row] += 1;
                let given = scopes(&default_rules(), &run(event, whose, on), "s-1").unwrap();
                let meant = |cell: &str| {
                    [
                        ("HOST:ID", format!("{HOST}:{OWN}")),
                        ("OWNER/NAME", "o/r".to_owned()),
                        ("EVENT", event.to_owned()),
                        ("FORK", FORK.to_string()),
                        ("COMMIT", "c0ffee".to_owned()),
                        ("RUN", "42".to_owned()),
                    ]
                    .iter()
                    .fold(cell.replace('`', ""), |cell, (word, value)| {
                        cell.replace(word, value)
                    })
                };
                assert_eq!(given.write, meant(rows[row][3]), "{event}, {whose}, {on}");
                let read = given.read.join(", ");
                assert_eq!(read, meant(rows[row][4]), "{event}, {whose}, {on}");
            }
        }
        assert!(used.iter().all(|&n| n > 0), "{used:?} {rows:?}");
    }

    /// No scope that a stranger's code can write is read first by a job that has secrets, whatever its
    /// branch is called; and what a fork's code wrote, no other reads at all.
    #[test]
    fn apart() {
        let forks = run("pull_request", "a fork's", "the default branch");
        let stranger = scopes(&default_rules(), &forks, "s-1").unwrap().write;
        let cases = EVENTS.iter().flat_map(|event| {
            WHOSE
                .iter()
                .flat_map(move |whose| ON.map(|on| run(event, whose, on)))
        });
        for other in cases {
            for name in [
                "fork/2002/main",
                "2002/main",
                "main:pull_request:fork/2002/main",
            ] {
                let other = Run {
                    id: 43,
                    head_branch: Some(name.into()),
                    ..other.clone()
                };
                let given = scopes(&default_rules(), &other, "s-1").unwrap();
                let same = (other.event == "pull_request" && other.head_repository == Some(FORK))
                    .then(|| format!("fork/{FORK}/main"));
                let same = same.is_some_and(|same| other.reference() == same);
                let reads = given.write == stranger || given.read.contains(&stranger);
                assert_eq!(reads, same, "{other:?}: {given:?}");
            }
        }
    }

    #[test]
    fn by_number_and_not_by_name() {
        let all = |run: &Run| scopes(&default_rules(), run, "s-1").unwrap();
        let own = run("push", "own", "the default branch");
        // Renamed, it is the same; and another that has the name is another.
        let renamed = Run {
            repository: "o/new".into(),
            ..own.clone()
        };
        assert_eq!(all(&own).write, all(&renamed).write);
        let another = Run {
            repository_id: 7,
            head_repository: Some(7),
            ..own.clone()
        };
        assert_ne!(all(&own).write, all(&another).write);
        let elsewhere = Run {
            host: "github.example:8443".into(),
            ..own.clone()
        };
        assert_eq!(all(&elsewhere).write, "github.example:8443:1001");
        // A host without a dot may be an owner's name, and a number a repository's.
        let odd = Run {
            host: "ghes".into(),
            ..own.clone()
        };
        let namesake = Run {
            repository: format!("ghes/{OWN}"),
            ..another.clone()
        };
        assert!(!all(&namesake).read.contains(&all(&odd).write));
        // What is in the merge queue is read by the push of the same commit.
        let queued = Run {
            event: "merge_group".into(),
            head_branch: Some("gh-readonly-queue/main/pr-7-abc".into()),
            ..own.clone()
        };
        assert!(all(&own).read.contains(&all(&queued).write));
        let other = Run {
            commit: "decaf".into(),
            ..own
        };
        assert!(!all(&other).read.contains(&all(&queued).write));
    }

    #[test]
    fn what_is_not_known_is_shared_with_nobody() {
        let push = run("push", "own", "the default branch");
        for unknown in [
            Run {
                head: Head::Unknown,
                ..push.clone()
            },
            Run {
                head_branch: None,
                ..push.clone()
            },
            // Too long for a tag, as it would have it.
            Run {
                head_branch: Some("\u{4e2d}".repeat(85)),
                ..push.clone()
            },
        ] {
            let given = scopes(&default_rules(), &unknown, "s-1").unwrap();
            assert_eq!(
                given.write, "api.github.com:1001:push:run/42",
                "{unknown:?}"
            );
        }
        let odd = Run {
            head_branch: Some("a{slot}b c,d".into()),
            ..push
        };
        let given = scopes(&default_rules(), &odd, "s-1").unwrap();
        assert_eq!(
            given.write,
            "api.github.com:1001:push:branch/a&7bslot&7db&20c&2cd"
        );
        let none = Scopes::unknown(HOST, "linux-0-1");
        assert_eq!(none.write, "api.github.com/runner/linux-0-1");
        assert!(none.read.is_empty());
    }

    #[test]
    fn references_by_workflow() {
        let own = |of: &str| format!("o/r/.github/workflows/ci.yml@{of}");
        let path = ".github/workflows/ci.yml";
        let (branch, tag) = (own("refs/heads/main"), own("refs/tags/main"));
        for (workflow, path, referenced, head) in [
            (branch.as_str(), path, Some(0), Some(Head::Branch)),
            (
                &branch
                    .to_uppercase()
                    .replace("REFS/HEADS/MAIN", "refs/heads/main"),
                path,
                Some(0),
                Some(Head::Branch),
            ),
            (&tag, path, Some(0), Some(Head::Tag)),
            (
                &tag,
                ".github/workflows/ci.yml@main",
                Some(0),
                Some(Head::Tag),
            ),
            // Called, it may be called from anywhere; and so where nobody says whether it was.
            (&branch, path, Some(1), None),
            (&branch, path, None, None),
            (&branch, ".github/workflows/caller.yml", Some(0), None),
            (
                "o/shared/.github/workflows/ci.yml@refs/heads/main",
                path,
                Some(0),
                None,
            ),
            (
                "o/r2/.github/workflows/ci.yml@refs/heads/main",
                path,
                Some(0),
                None,
            ),
            (&own("refs/heads/topic"), path, Some(0), None),
            (&own("refs/pull/3/merge"), path, Some(0), None),
            (&own("main"), path, Some(0), None),
            ("", path, Some(0), None),
        ] {
            let given = Head::of_workflow(workflow, "o/r", path, referenced, "main");
            assert_eq!(given, head, "{workflow} {path} {referenced:?}");
        }
    }

    #[test]
    fn rules_of_the_configuration() {
        let rules: Vec<Rule> = [
            "events = ['merge_group']\nwrite = 'queue-{slot}'",
            "fork = true\nwrite = 'forks'\nread = ['{repository}', 'common']",
            "default-branch = true\nwrite = '{repository-id}!'",
        ]
        .iter()
        .map(|text| toml::from_str(text).unwrap())
        .collect();
        let of = |event, whose, on| scopes(&rules, &run(event, whose, on), "linux-3");
        assert_eq!(
            of("merge_group", "own", ON[0]).unwrap().write,
            "queue-linux-3"
        );
        let forks = of("push", "a fork's", ON[0]).unwrap();
        assert_eq!((forks.write.as_str(), forks.read.len()), ("forks", 2));
        assert_eq!(of("push", "own", ON[0]), None);
        assert_eq!(of("push", "own", ON[2]), None);
        assert_eq!(
            of("push", "own", ON[1]).unwrap().write,
            "api.github.com:1001!"
        );
        // A pull request of the default branch runs what it is merged into as well.
        assert_eq!(of("pull_request", "own", ON[1]), None);
        assert_eq!(of("pull_request_target", "own", ON[1]), None);
        for (text, word) in [
            ("write = '{rev}'", "{repository-id}"),
            ("write = 'a{'", "placeholder"),
            ("write = '}'", "placeholder"),
            ("write = 'a'\nfoo = 1", "foo"),
            ("write = '{repository}'", "{repository-id}"),
        ] {
            let error = toml::from_str::<Rule>(text).expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
