// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Running commands: in tests they succeed, or say all that there is to say.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status, or 128 and the number of the signal that ended it, as in a shell.
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program to success and returns what it wrote.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    succeed(&mut command)
}

/// Runs a shell script, `set -e`, to success and returns what it wrote.
#[track_caller]
pub fn sh(script: &str) -> String {
    run("/bin/sh", ["-ec", script])
}

/// Runs a program, however it ends.
#[track_caller]
pub fn outcome<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> Outcome {
    let mut command = Command::new(program);
    command.args(arguments);
    outcome_of(&mut command)
}

/// The same for a command that needs more than arguments.
#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let outcome = outcome_of(command);
    assert!(
        outcome.status == 0,
        "{command:?}: exit status {}\n--- stdout:\n{}--- stderr:\n{}",
        outcome.status,
        outcome.stdout,
        outcome.stderr
    );
    outcome.stdout
}

/// The same, however it ends.
#[track_caller]
pub fn outcome_of(command: &mut Command) -> Outcome {
    use std::os::unix::process::ExitStatusExt as _;
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?}: {error}"),
    };
    Outcome {
        status: output
            .status
            .code()
            .unwrap_or_else(|| 128 + output.status.signal().unwrap_or_default()),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
