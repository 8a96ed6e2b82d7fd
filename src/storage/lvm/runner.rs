// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs LVM's commands, each after what an earlier one left half done was put right.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::command::Command;
use super::repair::{Pool, Strays};
use super::shell::{Answer, Failure, Shell};

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

/// LVM, and the pool that it works on.
#[derive(Debug)]
pub(super) struct Runner {
    shell: Shell,
    pool: Pool,
    look: Arc<Mutex<Look>>,
}

impl Runner {
    pub(super) fn new(shell: Shell, pool: Pool) -> Self {
        Self {
            shell,
            pool,
            look: Arc::default(),
        }
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
        // What it takes to find that there is no shell is not taken from the command's time.
        self.shell.prepare()?;
        let start = Instant::now();
        let deadline = start + bound;
        let mut again = false;
        loop {
            let answer = self
                .repair(deadline)
                .and_then(|()| self.shell.attempt(command, again, deadline));
            match answer {
                Ok(Some(mut answer)) => {
                    answer.again = again;
                    answer.doubtful = self.shell.doubtful;
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

    fn repair(&mut self, deadline: Instant) -> Result<(), Failure> {
        self.shell.is_free()?;
        if self.shell.doubtful {
            self.shell.doubtful = !self.pool.repair(&mut self.shell, deadline)?;
        }
        let wanted = {
            let look = self.look.lock().unwrap_or_else(PoisonError::into_inner);
            match *look {
                Look::Wanted { delete } => Some(delete),
                Look::Idle | Look::Found(_) => None,
            }
        };
        if let Some(delete) = wanted {
            let found = self.pool.strays(&mut self.shell, delete, deadline);
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

    /// Ends LVM.
    pub(super) fn close(&mut self) {
        self.shell.close();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::config::SystemDir;
    use super::super::shell::GREETING_PATIENCE;
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
        let shell = Shell::new(program, system_dir);
        let useless = shell.useless();
        let mut runner = Runner::new(shell, Pool::new(vg, pool, dir.path()));
        runner.shell.doubtful = false;
        let answer = runner.run(&Command::new("lvs"), GREETING_PATIENCE).unwrap();
        assert!(answer.success, "{answer:?}");
        let why = useless.get().cloned();
        assert_eq!(
            why.as_deref(),
            Some("it does not answer as documented: no reason given")
        );
    }
}
