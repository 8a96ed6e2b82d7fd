// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One child process, read up to a deadline and never waited for without one.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{getpid, pipe2};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How much of a child's standard error is kept, in bytes.
const ERRORS_CAP: usize = 8192;

/// How long a child may take to go once it was sent SIGKILL. One that takes
/// longer is in the kernel, behind a device that does not answer.
const KILL_TIME: Duration = Duration::from_secs(2);

/// Where a child writes its result.
#[derive(Debug, Clone, Copy)]
pub(super) enum Channel {
    /// To its standard output.
    Stdout,
    /// To a descriptor whose number it finds in this variable. Its standard
    /// output, prompts and chatter, is thrown away.
    Variable(&'static str),
}

/// Why [`Process::read`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// The result is complete.
    Complete,
    /// The child is dead; what it had written is read.
    Dead,
    /// The deadline came first.
    Late,
}

/// A running child.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// Tells its death. The end of its pipes does not: they are inherited by
    /// whatever LVM starts (thin_check, dmeventd), and may outlive it.
    pidfd: OwnedFd,
    input: Option<ChildStdin>,
    result: Option<File>,
    errors: Option<ChildStderr>,
    /// What it wrote to its [`Channel`] and nobody took yet.
    pub(super) output: Vec<u8>,
    /// The beginning of what it wrote to standard error and nobody took yet.
    pub(super) complaints: Vec<u8>,
}

impl Process {
    /// Starts `program` with exactly `env`, in a process group of its own: a
    /// Ctrl-C that ends the daemon must not end LVM in the middle of a command.
    ///
    /// It is sent SIGTERM when the calling *thread* ends, so it is to be
    /// called by the thread that goes on owning the child.
    pub(super) fn spawn(
        program: &Path,
        args: &[impl AsRef<OsStr>],
        env: &[(&str, &OsStr)],
        channel: Channel,
        input: bool,
    ) -> io::Result<Self> {
        let (result, far_end) = pipe2(OFlag::O_CLOEXEC)?;
        let far = far_end.as_raw_fd();
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(env.iter().copied())
            .stdin(if input { Stdio::piped() } else { Stdio::null() })
            .stderr(Stdio::piped())
            .process_group(0);
        let inherited = match channel {
            Channel::Stdout => {
                command.stdout(Stdio::from(far_end.try_clone()?));
                None
            }
            Channel::Variable(name) => {
                command.stdout(Stdio::null()).env(name, far.to_string());
                Some(far)
            }
        };
        let parent = getpid();
        // SAFETY: the closure runs in the forked child before exec and makes
        // only system calls; it touches no memory that a lock may guard.
        unsafe {
            command.pre_exec(move || in_child(parent, inherited));
        }
        let child = command.spawn()?;
        drop(far_end);
        let mut process = Self {
            pidfd: pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?,
            child,
            input: None,
            result: Some(File::from(result)),
            errors: None,
            output: Vec::new(),
            complaints: Vec::new(),
        };
        process.input = process.child.stdin.take();
        process.errors = process.child.stderr.take();
        if let Some(result) = &process.result {
            set_nonblocking(result)?;
        }
        if let Some(errors) = &process.errors {
            set_nonblocking(errors)?;
        }
        Ok(process)
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input. `text` has to fit into an empty pipe.
    pub(super) fn write(&mut self, text: &[u8]) -> io::Result<()> {
        match &mut self.input {
            Some(input) => input.write_all(text),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Reads until `complete` says so of the output, the child is dead, or it is
    /// `deadline`. `complete` is asked after each piece.
    pub(super) fn read(
        &mut self,
        deadline: Instant,
        mut complete: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<Progress> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: otherwise the last millisecond is spent polling with 0.
            let timeout = PollTimeout::try_from(left.as_millis() + u128::from(!left.is_zero()))
                .unwrap_or(PollTimeout::MAX);
            let ready = self.poll(timeout)?;
            if ready.result
                && drain(&mut self.result, &mut self.output, usize::MAX)?
                && complete(&self.output)
            {
                drain(&mut self.errors, &mut self.complaints, ERRORS_CAP)?;
                return Ok(Progress::Complete);
            }
            if ready.errors {
                drain(&mut self.errors, &mut self.complaints, ERRORS_CAP)?;
            }
            if ready.dead {
                drain(&mut self.result, &mut self.output, usize::MAX)?;
                drain(&mut self.errors, &mut self.complaints, ERRORS_CAP)?;
                return Ok(Progress::Dead);
            }
            if left.is_zero() {
                return Ok(Progress::Late);
            }
        }
    }

    /// Asks it to end. LVM gives up waiting for a lock then; while it holds one it
    /// blocks the signal (lvm2's lib/misc/lvm-signal.c), so that nothing is cut
    /// in the middle.
    pub(super) fn terminate(&self) {
        self.signal(Signal::TERM);
        // To one that somebody stopped.
        self.signal(Signal::CONT);
    }

    /// Whether it blocks SIGTERM.
    pub(super) fn blocks_termination(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()));
        status.is_ok_and(|status| blocks(&status, Signal::TERM))
    }

    /// Reaps a dead child.
    pub(super) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Closes its standard input: a shell ends then, when its command has.
    pub(super) fn close_input(&mut self) {
        self.input = None;
    }

    /// Closes its standard input, gives it until `deadline` to end, then kills it.
    /// Gives it back if even that did not help.
    pub(super) fn end(mut self, deadline: Instant) -> Option<Self> {
        self.close_input();
        match self.read(deadline, |_| false) {
            Ok(Progress::Dead) => {
                // It is dead: this cannot wait.
                let _ = self.child.wait();
                None
            }
            _ => self.kill(),
        }
    }

    /// Kills it. Gives it back if it did not die.
    pub(super) fn kill(self) -> Option<Self> {
        self.signal(Signal::KILL);
        let mut process = self;
        let deadline = Instant::now() + KILL_TIME;
        match process.read(deadline, |_| false) {
            Ok(Progress::Dead) => {
                let _ = process.child.wait();
                None
            }
            _ => Some(process),
        }
    }

    /// Whether it is dead.
    pub(super) fn is_dead(&self) -> bool {
        self.poll(PollTimeout::ZERO).is_ok_and(|ready| ready.dead)
    }

    fn signal(&self, signal: Signal) {
        // It was not waited for, so the id is still its own; that it may be
        // dead already is no error.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    fn poll(&self, timeout: PollTimeout) -> io::Result<Ready> {
        let mut fds = vec![PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        if let Some(result) = &self.result {
            fds.push(PollFd::new(result.as_fd(), PollFlags::POLLIN));
        }
        if let Some(errors) = &self.errors {
            fds.push(PollFd::new(errors.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        Ok(Ready {
            dead: ready.next() == Some(true),
            result: self.result.is_some() && ready.next() == Some(true),
            errors: self.errors.is_some() && ready.next() == Some(true),
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Ready {
    dead: bool,
    result: bool,
    errors: bool,
}

/// What happens between fork and exec.
fn in_child(parent: nix::unistd::Pid, inherited: Option<RawFd>) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::SIGTERM)?;
    if nix::unistd::getppid() != parent {
        // The daemon died before the line above: nobody would send the signal.
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    // Everything of ours is close-on-exec, but not what systemd handed over. A
    // descriptor of a detached mount in LVM's hands would keep it mounted.
    // A kernel without this (before 5.11) is no reason to fail.
    let range = |first: RawFd, last: RawFd| {
        if first <= last {
            // SAFETY: takes numbers only, and marks descriptors of this process.
            unsafe {
                libc::syscall(
                    libc::SYS_close_range,
                    first as libc::c_uint,
                    last as libc::c_uint,
                    libc::CLOSE_RANGE_CLOEXEC,
                );
            }
        }
    };
    match inherited {
        Some(fd) => {
            range(3, fd - 1);
            range(fd + 1, RawFd::MAX);
            // SAFETY: `fd` is open: it was made before the fork.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        None => range(3, RawFd::MAX),
    }
    Ok(())
}

/// Whether a process with this /proc/PID/status blocks `signal` (proc(5), SigBlk).
fn blocks(status: &str, signal: Signal) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigBlk:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 << (signal.as_raw() - 1) != 0)
}

fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Reads what is there; at its end the pipe is closed. Whether anything was read.
fn drain(pipe: &mut Option<impl Read>, into: &mut Vec<u8>, cap: usize) -> io::Result<bool> {
    let mut chunk = [0; 16 << 10];
    let mut any = false;
    while let Some(reader) = pipe {
        match reader.read(&mut chunk) {
            Ok(0) => *pipe = None,
            Ok(n) => {
                any = true;
                let kept = n.min(cap.saturating_sub(into.len()));
                into.extend_from_slice(&chunk[..kept]);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(any)
}

/// All that LVM gets from our environment.
pub(super) fn environment(system_dir: &Path) -> Vec<(&'static str, &OsStr)> {
    let mut env: Vec<(&'static str, &OsStr)> = vec![
        ("LC_ALL", OsStr::new("C")),
        ("PATH", OsStr::new("/usr/sbin:/usr/bin:/sbin:/bin")),
        // The shell keeps a history in $HOME after each command.
        ("HOME", OsStr::new("/dev/null")),
        ("LVM_SYSTEM_DIR", system_dir.as_os_str()),
        // It would complain about the descriptor for its report.
        ("LVM_SUPPRESS_FD_WARNINGS", OsStr::new("1")),
    ];
    if std::env::var_os("DM_DISABLE_UDEV").is_some() {
        // Where no udev runs, device nodes are LVM's to make.
        env.push(("DM_DISABLE_UDEV", OsStr::new("1")));
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_signals() {
        let of = |mask: &str| format!("Name:\tlvm\nSigPnd:\t0\nSigBlk:\t{mask}\nSigIgn:\t0\n");
        for (mask, blocked) in [
            ("0000000000000000", false),
            ("0000000000004000", true),
            ("fffffffe7ffbbeff", false),
            ("fffffffe7ffbfeff", true),
        ] {
            assert_eq!(blocks(&of(mask), Signal::TERM), blocked, "{mask}");
        }
        assert!(!blocks("", Signal::TERM));
    }
}
