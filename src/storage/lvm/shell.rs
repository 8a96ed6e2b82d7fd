// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LVM, spoken to in a long-lived `lvm` shell, or, where a line does not fit into it, by a process of its own.
//!
//! Why the shell: see `benches/lvm_shell.rs`, which measures both.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::command::Command;
use super::config::SystemDir;
use super::process::{Channel, Process, Progress, environment};
use super::report::{self, Document};

/// How long a command that was told to stop may take to say so. One that waits
/// for a lock answers at once; one that holds the lock goes on to its end.
const GRACE: Duration = Duration::from_secs(5);

/// How often the shell may die over its [`GREETING`]: then it is not chance, LVM was built without a shell.
const DEATHS: u32 = 3;

/// What a new shell is asked first. It locks nothing and needs no device, so it succeeds in any shell that can be used,
/// whatever LVM's version.
const GREETING: &str = "version\n";

/// How long the answer to [`GREETING`] may take; 0.1 s in an emulated guest.
pub(super) const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// All of a process's command log. With rows left out at its end LVM 2.03.16
/// writes a comma too many, and what it writes is no JSON; in the shell's log
/// (see `config`) the last row is never left out.
const WHOLE_LOG: &str = "log/command_log_selection=\"all\"";

/// What the shell writes its answers to, as lvm(8) documents it.
const REPORT_FD: &str = "LVM_REPORT_FD";

/// What LVM answered.
#[derive(Debug)]
pub(super) struct Answer {
    /// Whether it did what it was asked.
    pub(super) success: bool,
    /// Its report and messages.
    pub(super) document: Document,
    /// What it wrote to standard error beside.
    complaints: String,
    /// `lvm` died once before it answered. What it was asked may have been done
    /// by then, so that this answer may be "exists already".
    pub(super) again: bool,
    /// What a command that was killed left, maybe this one, may still be there.
    pub(super) doubtful: bool,
}

/// LVM gave no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// Not within the time; whether it was done is not known.
    Late(Duration),
    /// For another reason.
    Broken(String),
}

impl Answer {
    /// LVM's own words about what went wrong.
    pub(super) fn reason(&self) -> String {
        let errors = self.document.errors();
        match (errors.as_str(), self.complaints.trim()) {
            ("", "") => "no reason given".to_owned(),
            ("", complaints) => complaints.to_owned(),
            _ => errors,
        }
    }
}

/// Whether LVM's shell can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Talk {
    /// Not known yet: it died so often over its greeting.
    Untried(u32),
    /// It answered.
    Works,
    /// It cannot: each command is a process of its own.
    Useless,
}

/// Owns the child.
#[derive(Debug)]
pub(super) struct Shell {
    program: PathBuf,
    system_dir: SystemDir,
    /// A command may have been killed in the middle, this daemon's or one of an
    /// earlier life: see [`super::repair`].
    pub(super) doubtful: bool,
    child: Option<Process>,
    /// Whether there is a shell that answers as expected; until that is known, how often it died.
    talk: Talk,
    /// Why not, once that is known.
    useless: Arc<OnceLock<String>>,
    /// A child that did not stop when it was told to: it has begun to change
    /// something, and waits for a device that does not answer. It is not
    /// killed: what it would leave, a suspended pool above all, makes LVM's next
    /// command lose track of the pool for good. And nothing else is started until
    /// it is gone: the group is locked by it.
    stuck: Option<Process>,
}

impl Shell {
    /// How long ending a child takes at most.
    pub(super) const LONGEST_END: Duration = Duration::from_secs(10);

    /// Will run `program` (lvm) with `system_dir` for its configuration.
    pub(super) fn new(program: PathBuf, system_dir: SystemDir) -> Self {
        Self {
            program,
            system_dir,
            doubtful: true,
            child: None,
            talk: Talk::Untried(0),
            useless: Arc::default(),
            stuck: None,
        }
    }

    /// Where it says why LVM's shell cannot be used, once it has found that.
    pub(super) fn useless(&self) -> Arc<OnceLock<String>> {
        Arc::clone(&self.useless)
    }

    /// What is to be so before a command: LVM's configuration as the host has it, no child that is stuck, and the shell tried. That
    /// takes as long as it takes, at most [`GREETING_PATIENCE`] and what ending a child does.
    pub(super) fn prepare(&mut self) -> Result<(), Failure> {
        match self.system_dir.refresh() {
            Ok(false) => {}
            Ok(true) => {
                tracing::debug!("LVM's configuration has changed");
                self.close();
            }
            Err(error) => {
                tracing::warn!(%error, "LVM's configuration cannot be brought up to date");
            }
        }
        if self.stuck.is_none() {
            self.works(Instant::now() + GREETING_PATIENCE)?;
        }
        Ok(())
    }

    /// The directory with LVM's configuration for us.
    pub(super) fn system_dir(&self) -> &Path {
        self.system_dir.path()
    }

    /// # Errors
    /// As long as a child is stuck.
    pub(super) fn is_free(&mut self) -> Result<(), Failure> {
        if let Some(mut stuck) = self.stuck.take() {
            if !stuck.is_dead() {
                let id = stuck.id();
                self.stuck = Some(stuck);
                return Err(Failure::Broken(format!(
                    "an earlier lvm command (process {id}) still waits for the pool's devices: look at the disks below them"
                )));
            }
            let _ = stuck.reap();
            self.doubtful = true;
        }
        Ok(())
    }

    /// Runs a command for [`super::repair`], and once more where `lvm` dies over it. `alone`: as a process of its own; in
    /// the shell `--nolocking` does not keep it from locking as the command before did.
    pub(super) fn run_for_repair(
        &mut self,
        command: &Command,
        alone: bool,
        deadline: Instant,
    ) -> Result<Answer, Failure> {
        let mut answer = self.attempt(command, alone, deadline)?;
        if answer.is_none() {
            answer = self.attempt(command, true, deadline)?;
        }
        answer.ok_or_else(|| Failure::Broken(format!("lvm died over `{command}`, twice")))
    }

    /// `alone`: not in the shell. `None`: `lvm` died before it answered.
    pub(super) fn attempt(
        &mut self,
        command: &Command,
        alone: bool,
        deadline: Instant,
    ) -> Result<Option<Answer>, Failure> {
        let start = Instant::now();
        let answer = match command.line() {
            Some(line) if !alone && self.works(deadline)? => {
                match self.ask(&line, deadline)? {
                    Some(answer) if answer.document.refused() => {
                        // Nothing was done. Where a process is not refused, it is the shell's fault.
                        let other = self.run_alone(command, deadline)?;
                        if other.as_ref().is_some_and(|other| other.success) {
                            self.give_up(&answer.reason());
                        }
                        other
                    }
                    answer => answer,
                }
            }
            _ => self.run_alone(command, deadline)?,
        };
        match &answer {
            Some(answer) => tracing::debug!(
                %command,
                ms = start.elapsed().as_millis(),
                success = answer.success,
                errors = answer.document.errors(),
                warnings = answer.document.warnings(),
                complaints = answer.complaints,
                "lvm"
            ),
            None => self.doubtful = true,
        }
        Ok(answer)
    }

    /// Ends the child.
    pub(super) fn close(&mut self) {
        if let Some(shell) = self.child.take() {
            // It reads the end of its input and goes.
            self.stuck = shell.end(Instant::now() + GRACE);
        }
    }

    /// Whether there is a shell to ask: the first one is greeted.
    fn works(&mut self, deadline: Instant) -> Result<bool, Failure> {
        let deaths = match self.talk {
            Talk::Works => return Ok(true),
            Talk::Useless => return Ok(false),
            Talk::Untried(deaths) => deaths,
        };
        let mut shell = self.spawn(&[] as &[&str], true)?;
        // One that does not take its input is dead, or will be.
        let _ = shell.write(GREETING.as_bytes());
        let patience = deadline.min(Instant::now() + GREETING_PATIENCE);
        match shell.read(patience, report::is_whole) {
            Ok(Progress::Complete)
                if Document::parse(&shell.output)
                    .is_ok_and(|document| document.succeeded() == Some(true)) =>
            {
                self.talk = Talk::Works;
                self.child = Some(shell);
                return Ok(true);
            }
            Ok(Progress::Dead) => {
                let status = shell.reap();
                tracing::debug!(?status, "the lvm shell died over its first line");
                self.talk = Talk::Untried(deaths + 1);
                if deaths + 1 == DEATHS {
                    self.give_up("it ends without an answer");
                }
            }
            _ => {
                let said = parse(&shell, Some(false)).map_or_else(
                    |_| String::from_utf8_lossy(&shell.complaints).into_owned(),
                    |answer| answer.reason(),
                );
                self.stuck = shell.end(Instant::now() + GRACE);
                self.give_up(&format!("it does not answer as documented: {said}"));
            }
        }
        Ok(false)
    }

    fn give_up(&mut self, reason: &str) {
        let reason = reason.trim_end_matches([':', ' ', '\n']);
        tracing::warn!(
            reason,
            "LVM's shell cannot be used: each command is a process of its own, which takes longer"
        );
        self.talk = Talk::Useless;
        let _ = self.useless.set(reason.to_owned());
        self.close();
    }

    /// `None`: the shell died before it answered.
    fn ask(&mut self, line: &str, deadline: Instant) -> Result<Option<Answer>, Failure> {
        let mut shell = match self.child.take() {
            Some(shell) if !shell.is_dead() => shell,
            other => {
                if let Some(mut dead) = other {
                    // Between two commands: no fault of theirs.
                    tracing::debug!(status = ?dead.reap(), "the lvm shell had ended");
                }
                self.spawn(&[] as &[&str], true)?
            }
        };
        shell.complaints.clear();
        shell.output.clear();
        if shell.write(line.as_bytes()).is_err() {
            Self::bury(shell);
            return Ok(None);
        }
        match self.wait(shell, deadline, report::is_whole)? {
            Ended::Complete(shell) => {
                let answer = parse(&shell, None);
                match answer {
                    Ok(_) => self.child = Some(shell),
                    // What comes next from it cannot be told from what came late.
                    Err(_) => self.stuck = shell.end(Instant::now() + GRACE),
                }
                answer.map(Some)
            }
            Ended::Dead(shell) => {
                Self::bury(shell);
                Ok(None)
            }
        }
    }

    /// `None`: it was killed before it answered.
    fn run_alone(
        &mut self,
        command: &Command,
        deadline: Instant,
    ) -> Result<Option<Answer>, Failure> {
        let mut words = command.words().to_vec();
        let own = command.settings.unwrap_or_default();
        words.push(format!("--config={WHOLE_LOG} {own}"));
        let process = self.spawn(&words, false)?;
        let mut process = match self.wait(process, deadline, |_| false)? {
            Ended::Complete(process) | Ended::Dead(process) => process,
        };
        let status = process
            .reap()
            .map_err(|error| Failure::Broken(format!("lvm cannot be waited for: {error}")))?;
        match status.code() {
            None => Ok(None),
            Some(code) => parse(&process, Some(code == 0)).map(Some),
        }
    }

    /// Waits for an answer or the child's end. A child that is late is told to
    /// stop. One that answers "failed" only then is late too; one that does not
    /// even stop is killed, unless it has begun to change something.
    fn wait(
        &mut self,
        mut process: Process,
        deadline: Instant,
        complete: fn(&[u8]) -> bool,
    ) -> Result<Ended, Failure> {
        let late = || Err(Failure::Late(Duration::ZERO));
        let broken = |error| Failure::Broken(format!("lvm cannot be read from: {error}"));
        match process.read(deadline, complete).map_err(broken)? {
            Progress::Complete => return Ok(Ended::Complete(process)),
            Progress::Dead => return Ok(Ended::Dead(process)),
            Progress::Late => process.terminate(),
        }
        match process
            .read(Instant::now() + GRACE, complete)
            .map_err(broken)?
        {
            Progress::Complete => {
                let done = Document::parse(&process.output)
                    .is_ok_and(|document| document.succeeded() == Some(true));
                if done {
                    return Ok(Ended::Complete(process));
                }
                self.child = Some(process);
                late()
            }
            Progress::Dead => {
                let _ = process.reap();
                late()
            }
            Progress::Late if process.blocks_termination() => {
                process.close_input();
                self.stuck = Some(process);
                late()
            }
            Progress::Late => {
                self.stuck = process.kill();
                self.doubtful = true;
                late()
            }
        }
    }

    fn spawn(&self, args: &[impl AsRef<OsStr>], input: bool) -> Result<Process, Failure> {
        Process::spawn(
            &self.program,
            args,
            &environment(self.system_dir.path()),
            Channel::Variable(REPORT_FD),
            input,
        )
        .map_err(|error| Failure::Broken(format!("{}: {error}", self.program.display())))
    }

    fn bury(mut shell: Process) {
        let complaints = String::from_utf8_lossy(&shell.complaints).into_owned();
        let status = shell.reap();
        tracing::warn!(?status, complaints, "the lvm shell died");
    }
}

/// How a wait ended, other than late.
enum Ended {
    Complete(Process),
    Dead(Process),
}

/// Takes what a child wrote; `success` is what its exit status says.
fn parse(process: &Process, success: Option<bool>) -> Result<Answer, Failure> {
    let complaints = String::from_utf8_lossy(&process.complaints).into_owned();
    let nonsense = |what: &str| {
        Failure::Broken(format!(
            "lvm's answer is not what it documents ({what}): {}",
            complaints.trim()
        ))
    };
    let document =
        Document::parse(&process.output).map_err(|error| nonsense(&error.to_string()))?;
    let success = success
        .or_else(|| document.succeeded())
        .ok_or_else(|| nonsense("no return code in its log"))?;
    Ok(Answer {
        success,
        document,
        complaints,
        again: false,
        doubtful: false,
    })
}
