// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one way to run an external command.
//!
//! Tools are looked up once in a fixed list of system directories, never in
//! `PATH`: a root daemon must not run what a caller's environment points at.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};

/// Where tools are looked for, in order.
const TOOL_DIRS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// How much of a failed command's standard error is kept, in bytes.
const STDERR_CAP: usize = 4096;

/// An external command could not be run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The tool is not installed.
    #[error("{tool} is not installed (looked in {})", TOOL_DIRS.join(", "))]
    Missing {
        /// The tool's bare name.
        tool: String,
    },
    /// The tool is there but could not be started.
    #[error("{program}: cannot be started: {source}")]
    Start {
        /// The tool's absolute path.
        program: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The tool ran and did not succeed.
    #[error("{program} {}: {status}: {}", args.join(" "), stderr.trim())]
    Failed {
        /// The tool's absolute path.
        program: String,
        /// Its arguments.
        args: Vec<String>,
        /// How it ended.
        status: ExitStatus,
        /// The beginning of what it wrote to standard error.
        stderr: String,
    },
}

/// The absolute path of a tool.
///
/// # Errors
/// [`ExecError::Missing`] when none of the system directories holds it.
pub fn find_tool(tool: &str) -> Result<PathBuf, ExecError> {
    TOOL_DIRS
        .iter()
        .map(|dir| Path::new(dir).join(tool))
        .find(|path| path.is_file())
        .ok_or_else(|| ExecError::Missing { tool: tool.into() })
}

/// Runs a tool to its end, with no standard input, and returns what it wrote
/// to standard output.
///
/// # Errors
/// When the tool is missing, cannot be started, or does not exit with 0.
pub fn run<I, S>(tool: &str, args: I) -> Result<Vec<u8>, ExecError>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    run_with_env(tool, args, &[])
}

/// What a tool writes, to standard output and then to standard error, however it ends: some say
/// their version here, some there.
///
/// # Errors
/// When the tool is missing or cannot be started.
pub fn says(tool: &str, args: &[&str]) -> Result<String, ExecError> {
    let output = output(&find_tool(tool)?, args, &[])?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// [`run`], with variables added to the child's environment.
///
/// # Errors
/// As [`run`].
pub fn run_with_env<I, S>(tool: &str, args: I, env: &[(&str, &OsStr)]) -> Result<Vec<u8>, ExecError>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let program = find_tool(tool)?;
    let args: Vec<OsString> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let output = output(&program, &args, env)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let kept = output.stderr.len().min(STDERR_CAP);
    Err(ExecError::Failed {
        program: program.display().to_string(),
        args: args
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect(),
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr[..kept]).into_owned(),
    })
}

fn output<S: AsRef<OsStr>>(
    program: &Path,
    args: &[S],
    env: &[(&str, &OsStr)],
) -> Result<Output, ExecError> {
    Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ExecError::Start {
            program: program.display().to_string(),
            source,
        })
}
