// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one way to run an external command.
//!
//! Tools are looked up once in a fixed list of system directories, never in
//! `PATH`: a root daemon must not run what a caller's environment points at.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};

/// Where tools are looked for, in order.
const TOOL_DIRS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// How much sooner than others a process is killed where memory runs out: -1000 to 1000 (proc_pid_oom_score_adj(5)).
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

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
    /// The tool had not ended in its time, and was killed.
    #[error("{program}: it was not done within {} s", time.as_secs())]
    Late {
        /// The tool's absolute path.
        program: String,
        /// How long it was given.
        time: Duration,
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

/// What a tool may take that works on what others have written.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Of address space, in bytes.
    pub memory: u64,
    /// From its start to its end.
    pub time: Duration,
}

/// Runs a tool within bounds, with no standard input and output, and gives how it ended and the end of what it wrote to
/// standard error. Where memory runs out, the kernel ends it before any other.
///
/// # Errors
/// When the tool is missing, cannot be started, or takes too long.
pub fn run_bounded<S: AsRef<OsStr>>(
    tool: &str,
    args: &[S],
    bounds: Bounds,
) -> Result<(ExitStatus, String), ExecError> {
    let path = find_tool(tool)?;
    let program = path.display().to_string();
    let failed = |source| ExecError::Start {
        program: program.clone(),
        source,
    };
    let mut command = Command::new(&path);
    command
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let limit = move || {
        setrlimit(Resource::RLIMIT_AS, bounds.memory, bounds.memory)?;
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        // The daemon's own is low, and children have their parent's.
        let mut score = File::options().write(true).open(OOM_SCORE)?;
        score.write_all(b"1000")
    };
    // SAFETY: between fork and exec it makes system calls alone: a short path is turned into a C string on the stack.
    unsafe { command.pre_exec(limit) };
    let mut child = command.spawn().map_err(failed)?;
    // Read aside, as it could write more than a pipe holds.
    let stderr = child.stderr.take().expect("it is piped");
    let reader = thread::spawn(move || last_of(stderr));
    let ended = wait_for(&child, bounds.time).map_err(failed);
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    let stderr = reader.join().unwrap_or_default();
    if ended? {
        Ok((status, String::from_utf8_lossy(&stderr).into_owned()))
    } else {
        let time = bounds.time;
        Err(ExecError::Late { program, time })
    }
}

/// Whether a child ends within a time.
fn wait_for(child: &Child, time: Duration) -> io::Result<bool> {
    let pid = rustix::process::Pid::from_child(child);
    let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The last [`STDERR_CAP`] bytes of what is read.
fn last_of(mut from: impl Read) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; STDERR_CAP]);
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..read]);
        kept.drain(..kept.len().saturating_sub(STDERR_CAP));
    }
    kept
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

#[cfg(test)]
mod tests {
    use super::*;

    const GENEROUS: Bounds = Bounds {
        memory: 1 << 30,
        time: Duration::from_secs(60),
    };

    #[test]
    fn bounds_of_a_tool() {
        let sh = |script: &str, bounds| run_bounded("sh", &["-c", script], bounds);
        let look = "cat /proc/self/oom_score_adj >&2; ulimit -v >&2; ulimit -c >&2; exit 3";
        let (status, said) = sh(look, GENEROUS).unwrap();
        assert_eq!(said, format!("1000\n{}\n0\n", 1 << 20));
        assert_eq!(status.code(), Some(3));
        // More than a pipe holds: its end is kept.
        let much = "head -c 1000000 /dev/zero >&2; echo end >&2";
        let (_, said) = sh(much, GENEROUS).unwrap();
        assert!(said.len() == STDERR_CAP && said.ends_with("\0end\n"));
        let short = Bounds {
            time: Duration::from_millis(1),
            ..GENEROUS
        };
        let late = sh("exec sleep 3600", short);
        assert!(matches!(late, Err(ExecError::Late { .. })), "{late:?}");
    }
}
