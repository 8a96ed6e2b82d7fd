// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is known of the jobs that a pool's runners have.
//!
//! A scale set tells each of it once: a message that was acknowledged does not come again. So all of it is written down
//! before, below /run, a file for each runner, which is there until its container is gone. Podman's containers outlive the
//! supervisor, and nothing outlives the machine's end, as nothing below /run does. What was decided for a job's caches is written down
//! before the daemon is told, so that another life of ours says the same again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use super::github::scaleset as message;
use super::slot;
use crate::cache::verdict::Verdict;
use crate::text::printable;

/// A runner's job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its repository's owner.
    pub owner: String,
    /// And name.
    pub repository: String,
    /// For people.
    pub name: String,
    /// The run that it belongs to; 0: it is not known.
    pub run: u64,
    /// See [`super::github::scaleset::Job::job_workflow_ref`].
    pub workflow_ref: String,
    /// When the runner got it, seconds since 1970; `None` where only its end was told.
    pub began: Option<u64>,
    /// How it ended, and when that was told.
    pub ended: Option<(Verdict, u64)>,
    /// How far its caches are.
    pub admission: Admission,
}

/// How far a job's requests for caches are from being served.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Admission {
    /// It is to be asked whose job it is.
    #[default]
    Unknown,
    /// What the daemon is to be told, for each volume.
    Decided(Vec<Value>),
    /// The daemon was told.
    Done,
    /// The daemon refused that.
    Refused,
}

impl Job {
    /// A scale set says that the runner has begun a job, at `now` in seconds since 1970. One whose job was gone before it had
    /// begun waits for another, and what was decided for the first one's caches is not that one's: it is decided anew, and
    /// where that is something else the daemon refuses it.
    pub fn begin(&mut self, of: &message::Job, now: u64) {
        // Of one that has not begun, only the end was told so far.
        if self.began.is_some() && self.run != of.workflow_run_id {
            (self.began, self.ended) = (None, None);
            // One that was refused is about to be ended.
            if self.admission != Admission::Refused {
                self.admission = Admission::Unknown;
            }
        }
        self.owner.clone_from(&of.owner_name);
        self.repository.clone_from(&of.repository_name);
        self.name.clone_from(&of.job_display_name);
        self.run = of.workflow_run_id;
        self.workflow_ref.clone_from(&of.job_workflow_ref);
        // Told again, it has begun when it had.
        self.began.get_or_insert(now);
    }

    /// Its state, as far as it was told.
    #[must_use]
    pub const fn state(&self) -> slot::Job {
        match (self.ended, self.began) {
            (Some((verdict, at)), _) => slot::Job::Done(verdict, at),
            (None, Some(at)) => slot::Job::Running(at),
            (None, None) => slot::Job::None,
        }
    }

    /// Repository and name, for people.
    #[must_use]
    pub fn what(&self) -> String {
        printable(&format!("{}/{} {}", self.owner, self.repository, self.name))
    }

    /// The path of its run's page; empty where it is not known.
    #[must_use]
    pub fn path(&self) -> String {
        match self.run {
            0 => String::new(),
            run => printable(&format!(
                "/{}/{}/actions/runs/{run}",
                self.owner, self.repository
            )),
        }
    }
}

/// The jobs of a pool's runners, by runner.
#[derive(Debug, Default)]
pub struct Jobs {
    dir: PathBuf,
    all: BTreeMap<String, Job>,
}

impl Jobs {
    /// What an earlier life wrote down in a directory of the runners that are `ours`.
    #[must_use]
    pub fn left(dir: PathBuf, ours: impl Fn(&str) -> bool) -> Self {
        let mut all = BTreeMap::new();
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !ours(&name) {
                continue;
            }
            let read = fs::read(entry.path()).map_err(|e| e.to_string());
            match read.and_then(|text| serde_json::from_slice(&text).map_err(|e| e.to_string())) {
                Ok(job) => drop(all.insert(name, job)),
                Err(error) => warn!(runner = name, error, "cannot read the record of its job"),
            }
        }
        Self { dir, all }
    }

    /// A runner's.
    #[must_use]
    pub fn get(&self, runner: &str) -> Option<&Job> {
        self.all.get(runner)
    }

    /// Whether a runner has a job that runs, as far as was told.
    #[must_use]
    pub fn runs(&self, runner: &str) -> bool {
        let job = self.get(runner);
        job.is_some_and(|job| matches!(job.state(), slot::Job::Running(_)))
    }

    /// How many run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.all.keys().filter(|runner| self.runs(runner)).count()
    }

    /// The runner whose job has waited longest for its caches, of those that are not `under_way`.
    #[must_use]
    pub fn next(&self, under_way: &BTreeSet<String>) -> Option<String> {
        let waiting = self.all.iter().filter(|(runner, job)| {
            let is_open = matches!(job.admission, Admission::Unknown | Admission::Decided(_));
            is_open && matches!(job.state(), slot::Job::Running(_)) && !under_way.contains(*runner)
        });
        let first = waiting.min_by_key(|(_, job)| job.began);
        first.map(|(runner, _)| runner.clone())
    }

    /// Changes what is known of a runner's job, once that is written down.
    ///
    /// # Errors
    /// What the operating system says: then nothing is changed.
    pub fn tell(&mut self, runner: &str, change: impl FnOnce(&mut Job)) -> io::Result<()> {
        let old = self.all.get(runner);
        let mut job = old.cloned().unwrap_or_default();
        change(&mut job);
        if old != Some(&job) {
            write_down(&self.dir.join(runner), &job)?;
            self.all.insert(runner.to_owned(), job);
        }
        Ok(())
    }

    /// Notes how far the caches of a runner's job are, which is of the run `run`, once that is written down. `false`: the runner
    /// has no such job any more.
    ///
    /// # Errors
    /// What the operating system says: then nothing is changed.
    pub fn admit(&mut self, runner: &str, run: u64, admission: Admission) -> io::Result<bool> {
        if self.get(runner).is_none_or(|job| job.run != run) {
            return Ok(false);
        }
        self.tell(runner, |job| job.admission = admission)?;
        Ok(true)
    }

    /// Forgets those of runners that are not to be kept.
    pub fn keep(&mut self, is_kept: impl Fn(&str) -> bool) {
        let dir = &self.dir;
        self.all.retain(|runner, _| {
            let keep = is_kept(runner);
            if !keep && let Err(error) = fs::remove_file(dir.join(runner)) {
                warn!(runner, %error, "cannot remove the record of its job");
            }
            keep
        });
    }
}

/// Keeps something in a file of root's, in a directory of root's that is made where it is missing: all of it, or what was there.
pub(super) fn write_down(file: &Path, what: &impl Serialize) -> io::Result<()> {
    let dir = file.parent().unwrap_or(file);
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // No runner and no pool is called so. Only a whole file has the name.
    let new = dir.join("new~");
    let mut open = OpenOptions::new();
    open.write(true).create(true).truncate(true).mode(0o600);
    open.open(&new)?.write_all(&serde_json::to_vec(what)?)?;
    fs::rename(new, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_life_knows_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("jobs");
        let ours = |name: &str| name.starts_with("linux-");
        let mut jobs = Jobs::left(dir.clone(), ours);
        assert_eq!(jobs.get("linux-0-1"), None);
        let began = |job: &mut Job| (job.owner, job.run, job.began) = ("o".into(), 7, Some(5));
        jobs.tell("linux-0-1", began).unwrap();
        jobs.tell("linux-0-2", |job| job.began = Some(4)).unwrap();
        jobs.tell("windows-0-1", |job| job.began = Some(3)).unwrap();
        let body = serde_json::json!({"Name": "linux-0-2-job"});
        let decided = Admission::Decided(vec![body]);
        jobs.tell("linux-0-2", |job| job.admission = decided.clone())
            .unwrap();
        jobs.tell("linux-0-2", |job| job.ended = Some((Verdict::Success, 9)))
            .unwrap();

        let mut jobs = Jobs::left(dir.clone(), ours);
        assert_eq!(jobs.get("windows-0-1"), None);
        assert_eq!(
            jobs.get("linux-0-1").unwrap().state(),
            slot::Job::Running(5)
        );
        let job = jobs.get("linux-0-2").unwrap();
        assert_eq!(job.state(), slot::Job::Done(Verdict::Success, 9));
        assert_eq!(job.admission, decided);
        assert_eq!(jobs.running(), 1);
        jobs.keep(|runner| runner == "linux-0-2");
        let left = fs::read_dir(&dir).unwrap();
        let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["linux-0-2", "windows-0-1"]);
        fs::write(dir.join("linux-0-2"), "{").unwrap();
        assert_eq!(Jobs::left(dir, ours).all.len(), 0);
    }

    #[test]
    fn what_was_decided_for_a_job_is_not_for_the_next_one_of_its_runner() {
        let dir = tempfile::tempdir().unwrap();
        let mut jobs = Jobs::left(dir.path().to_owned(), |_| true);
        let of = |run| message::Job {
            workflow_run_id: run,
            ..message::Job::default()
        };
        jobs.tell("a", |job| job.begin(&of(7), 1)).unwrap();
        assert!(jobs.admit("a", 7, Admission::Done).unwrap());
        // Told again.
        jobs.tell("a", |job| job.begin(&of(7), 2)).unwrap();
        assert_eq!(jobs.get("a").unwrap().admission, Admission::Done);
        jobs.tell("a", |job| job.ended = Some((Verdict::Failure, 3)))
            .unwrap();
        jobs.tell("a", |job| job.begin(&of(8), 4)).unwrap();
        assert_eq!(jobs.get("a").unwrap().admission, Admission::Unknown);
        assert_eq!(jobs.next(&BTreeSet::new()).unwrap(), "a");
        assert_eq!(jobs.get("a").unwrap().state(), slot::Job::Running(4));
        // What was being decided for the first one comes too late.
        let decided = Admission::Decided(Vec::new());
        assert!(!jobs.admit("a", 7, decided.clone()).unwrap());
        assert!(!jobs.admit("b", 7, decided).unwrap());
        assert_eq!(jobs.get("a").unwrap().admission, Admission::Unknown);
        // An end that is told before the beginning is of the same job.
        jobs.tell("c", |job| job.ended = Some((Verdict::Success, 5)))
            .unwrap();
        jobs.tell("c", |job| job.begin(&of(7), 6)).unwrap();
        let state = jobs.get("c").unwrap().state();
        assert_eq!(state, slot::Job::Done(Verdict::Success, 5));
        // What is refused stays so.
        assert!(jobs.admit("a", 8, Admission::Refused).unwrap());
        jobs.tell("a", |job| job.begin(&of(9), 5)).unwrap();
        assert_eq!(jobs.get("a").unwrap().admission, Admission::Refused);
    }

    #[test]
    fn those_that_wait_longest_are_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut jobs = Jobs::left(dir.path().to_owned(), |_| true);
        for (runner, began) in [("a", 3), ("b", 1), ("c", 2)] {
            jobs.tell(runner, |job| job.began = Some(began)).unwrap();
        }
        let mut under_way = BTreeSet::new();
        assert_eq!(jobs.next(&under_way).unwrap(), "b");
        under_way.insert("b".to_owned());
        jobs.tell("c", |job| job.admission = Admission::Refused)
            .unwrap();
        assert_eq!(jobs.next(&under_way).unwrap(), "a");
        jobs.tell("a", |job| job.ended = Some((Verdict::Failure, 9)))
            .unwrap();
        assert_eq!(jobs.next(&under_way), None);
    }

    #[test]
    fn nothing_is_known_that_is_not_written_down() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let mut jobs = Jobs::left(file, |_| true);
        assert!(jobs.tell("a", |job| job.began = Some(1)).is_err());
        assert_eq!(jobs.get("a"), None);
    }
}
