// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs LVM's commands in a long-lived `lvm` shell, or, what does not fit into
//! it, as a process of their own.
//!
//! Why the shell: see `benches/lvm_shell.rs`, which measures both.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::command::Command;
use super::config::SystemDir;
use super::process::{Channel, Process, Progress, environment};
use super::repair::{Pool, Strays};
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
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// All of a process's command log. With rows left out at its end LVM 2.03.16
/// writes a comma too many, and what it writes is no JSON; in the shell's log
/// (see `config`) the last row is never left out.
const WHOLE_LOG: &str = "--config=log/command_log_selection=\"all\"";

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

/// Whether thin devices are to be looked for that LVM does not know, before the next command, and what was found.
#[derive(Debug, Clone, Default)]
pub(super) enum Look {
    /// Neither.
    #[default]
    Idle,
    /// They are; and deleted, where that is ours to do.
    Wanted {
        /// It is.
        delete: bool,
    },
    /// These are left.
    Found(Strays),
}

/// Owns the child.
#[derive(Debug)]
pub(super) struct Runner {
    program: PathBuf,
    system_dir: SystemDir,
    pool: Arc<Pool>,
    /// A command may have been killed in the middle, this daemon's or one of an
    /// earlier life: see [`super::repair`].
    doubtful: bool,
    shell: Option<Process>,
    /// Whether there is a shell that answers as expected; until that is known, how often it died.
    talk: Talk,
    /// Why not, once that is known.
    useless: Arc<OnceLock<String>>,
    look: Arc<Mutex<Look>>,
    /// A child that did not stop when it was told to: it has begun to change
    /// something, and waits for a device that does not answer. It is not
    /// killed: what it would leave, a suspended pool above all, makes LVM's next
    /// command lose track of the pool for good. And nothing else is started until
    /// it is gone: the group is locked by it.
    stuck: Option<Process>,
}

impl Runner {
    /// How long ending a child takes at most.
    pub(super) const LONGEST_END: Duration = Duration::from_secs(10);

    /// Will run `program` (lvm) with `system_dir` for its configuration.
    pub(super) fn new(program: PathBuf, system_dir: SystemDir, pool: Pool) -> Self {
        Self {
            program,
            system_dir,
            pool: Arc::new(pool),
            doubtful: true,
            shell: None,
            talk: Talk::Untried(0),
            useless: Arc::default(),
            look: Arc::default(),
            stuck: None,
        }
    }

    /// Where it says why LVM's shell cannot be used, once it has found that.
    pub(super) fn useless(&self) -> Arc<OnceLock<String>> {
        Arc::clone(&self.useless)
    }

    /// By what it is asked to look for thin devices that LVM does not know.
    pub(super) fn look(&self) -> Arc<Mutex<Look>> {
        Arc::clone(&self.look)
    }

    /// Runs a command to its end, but not longer than `bound`.
    ///
    /// When `lvm` dies over it, it is run once more: a query harms nobody, what
    /// sets a state sets it twice, and of what makes something [`Answer::again`] tells.
    pub(super) fn run(&mut self, command: &Command, bound: Duration) -> Result<Answer, Failure> {
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
            // What it takes to find that there is no shell is not taken from the command's time.
            self.shell_works(Instant::now() + GREETING_PATIENCE)?;
        }
        let start = Instant::now();
        let deadline = start + bound;
        let mut again = false;
        loop {
            let answer = self
                .repair(deadline)
                .and_then(|()| self.attempt(command, again, deadline));
            match answer {
                Ok(Some(mut answer)) => {
                    answer.again = again;
                    return Ok(answer);
                }
                Ok(None) if again => {
                    return Err(Failure::Broken(format!("lvm died over `{command}`, twice")));
                }
                Ok(None) => {
                    tracing::warn!(%command, "lvm died over a command, which is run again");
                    again = true;
                }
                Err(Failure::Late(_)) => {
                    tracing::warn!(%command, "lvm did not answer in time");
                    return Err(Failure::Late(start.elapsed()));
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Runs a command for [`super::repair`]. `alone`: as a process of its own; in the
    /// shell `--nolocking` does not keep it from locking as the command before did.
    pub(super) fn run_once(
        &mut self,
        command: &Command,
        alone: bool,
        deadline: Instant,
    ) -> Result<Answer, Failure> {
        let mut answer = self.attempt(command, alone, deadline)?;
        if answer.is_none() && !alone {
            answer = self.attempt(command, true, deadline)?;
        }
        answer.ok_or_else(|| Failure::Broken(format!("lvm died over `{command}`")))
    }

    fn repair(&mut self, deadline: Instant) -> Result<(), Failure> {
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
        if self.doubtful {
            let pool = Arc::clone(&self.pool);
            self.doubtful = !pool.repair(self, deadline)?;
        }
        let wanted = {
            let look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
            match *look {
                Look::Wanted { delete } => Some(delete),
                Look::Idle | Look::Found(_) => None,
            }
        };
        if let Some(delete) = wanted {
            let pool = Arc::clone(&self.pool);
            let dir = self.system_dir.path().to_owned();
            let found = pool.strays(self, &dir, delete, deadline);
            *self.look.lock().unwrap_or_else(PoisonError::into_inner) = match found {
                Ok(strays) => Look::Found(strays),
                Err(failure) => {
                    tracing::debug!(?failure, "which thin devices the pool has is not known");
                    Look::Idle
                }
            };
        }
        Ok(())
    }

    /// `alone`: not in the shell. `None`: `lvm` died before it answered.
    fn attempt(
        &mut self,
        command: &Command,
        alone: bool,
        deadline: Instant,
    ) -> Result<Option<Answer>, Failure> {
        let start = Instant::now();
        let answer = match command.line() {
            Some(line) if !alone && self.shell_works(deadline)? => {
                match self.ask_shell(&line, deadline)? {
                    Some(answer) if answer.document.refused() => {
                        // Nothing was done. Where a process is not refused, it is the shell's fault.
                        let other = self.run_alone(command, deadline)?;
                        if other.as_ref().is_some_and(|other| other.success) {
                            self.give_up_shell(&answer.reason());
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
        if let Some(shell) = self.shell.take() {
            // It reads the end of its input and goes.
            self.stuck = shell.end(Instant::now() + GRACE);
        }
    }

    /// Whether there is a shell to ask: the first one is greeted.
    fn shell_works(&mut self, deadline: Instant) -> Result<bool, Failure> {
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
                self.shell = Some(shell);
                return Ok(true);
            }
            Ok(Progress::Dead) => {
                let status = shell.reap();
                tracing::debug!(?status, "the lvm shell died over its first line");
                self.talk = Talk::Untried(deaths + 1);
                if deaths + 1 == DEATHS {
                    self.give_up_shell("it ends without an answer");
                }
            }
            _ => {
                let said = parse(&shell, Some(false)).map_or_else(
                    |_| String::from_utf8_lossy(&shell.complaints).into_owned(),
                    |answer| answer.reason(),
                );
                self.stuck = shell.end(Instant::now() + GRACE);
                self.give_up_shell(&format!("it does not answer as documented: {said}"));
            }
        }
        Ok(false)
    }

    fn give_up_shell(&mut self, reason: &str) {
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
    fn ask_shell(&mut self, line: &str, deadline: Instant) -> Result<Option<Answer>, Failure> {
        let mut shell = match self.shell.take() {
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
                    Ok(_) => self.shell = Some(shell),
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
        words.push(WHOLE_LOG.to_owned());
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
                self.shell = Some(process);
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
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A command has all of its time once it is clear that the shell does not answer.
    #[test]
    fn a_shell_that_says_nothing_takes_no_commands_time() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("stand-in");
        let stand_in = "#!/bin/bash\n[ $# = 0 ] || { echo '{}' >&\"$LVM_REPORT_FD\"; exit; }\nwhile read -r line; do :; done\n";
        fs::write(&program, stand_in).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let [vg, pool] = ["vg", "pool"].map(|name| name.parse().unwrap());
        let host = dir.path().join("host");
        fs::create_dir(&host).unwrap();
        let system_dir = SystemDir::new(host, dir.path().to_owned(), &vg).unwrap();
        let mut runner = Runner::new(program, system_dir, Pool::new(vg, pool, dir.path()));
        runner.doubtful = false;
        let answer = runner.run(&Command::new("lvs"), GREETING_PATIENCE).unwrap();
        assert!(answer.success, "{answer:?}");
        assert_eq!(runner.talk, Talk::Useless);
        let why = runner.useless().get().cloned();
        assert_eq!(
            why.as_deref(),
            Some("it does not answer as documented: no reason given")
        );
    }
}
