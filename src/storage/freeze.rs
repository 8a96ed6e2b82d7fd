// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file system that is in use, frozen for the moment in which it is copied.
//!
//! FIFREEZE waits until no process is inside a write, and cannot be interrupted meanwhile (`freeze_super` of Linux'
//! fs/super.c: `percpu_down_write`). A process in splice(2) from an empty pipe into a file is inside one for as long as it
//! likes, so a job decides how long a freeze takes. Hence a process of its own waits, which can be left behind: a thread
//! of the daemon's that hung there would keep the daemon from ending. And no store's turn or lock is held for it. A slow
//! device is another matter: as long as something gets there, it is waited for.
//!
//! What is left behind thaws as soon as it has frozen; and so does one whose daemon was killed: both read the end of the
//! same socket.
//!
//! It is a fork of the daemon and not a program: starting fsfreeze and dmsetup, each twice, took most of a checkpoint's time.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setpgid};
use tracing::warn;

use super::StoreError;
use super::devmapper::{self, Request};
use crate::cache::names::LvName;
use crate::fs::sectors_written;
use crate::mount::Mounted;

/// How long nothing may get to the device while a file system is to be frozen: from when on none can begin a write, the kernel
/// writes what is left in memory.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a file system may take to be frozen in all. Most of what was written is on the device before.
const FREEZING: Duration = Duration::from_secs(60);

/// How long device-mapper may take for the copy.
const COPYING: Duration = Duration::from_secs(15);

/// How long it may take to be thawed before it is left to itself, too.
const THAWING: Duration = Duration::from_secs(5);

/// What is copied by device-mapper while a file system is frozen. The device below that is suspended meanwhile: messages that
/// copy it are sent to the pool that it is in.
#[derive(Debug)]
pub(super) struct Below {
    control: File,
    suspend: Request,
    messages: Vec<Request>,
    resume: Request,
}

impl Below {
    /// # Errors
    /// When device-mapper is not there, or a name too long for it.
    pub(super) fn new(device: &str, pool: &str, messages: &[String]) -> io::Result<Self> {
        let message = |text: &String| Request::message(pool, text);
        Ok(Self {
            control: devmapper::control()?,
            suspend: Request::suspend(device)?,
            messages: messages.iter().map(message).collect::<Result<_, _>>()?,
            resume: Request::resume(device)?,
        })
    }
}

/// A frozen file system, thawed when dropped.
#[derive(Debug)]
pub(super) struct Frozen {
    helper: UnixStream,
    /// Disconnected once the helper has ended.
    ended: Receiver<()>,
}

impl Frozen {
    /// Freezes the file system of `mounted`, and what is `below` it. `lv` is for the message.
    ///
    /// # Errors
    /// [`StoreError::Unfreezable`] where it takes too long, or what else keeps it from being frozen.
    pub(super) fn new(
        mounted: &Mounted,
        lv: &LvName,
        below: Option<Below>,
    ) -> Result<Self, StoreError> {
        let refused = |why: String| StoreError::Unfreezable {
            lv: lv.clone(),
            why,
        };
        let (helper, ended) =
            start(mounted.root(), below).map_err(|error| refused(error.to_string()))?;
        match await_frozen(&helper, mounted) {
            Ok(()) => Ok(Self { helper, ended }),
            Err(why) => {
                // Left behind where it waits still.
                let _ = helper.shutdown(Shutdown::Both);
                Err(refused(why))
            }
        }
    }

    /// Has what is [`Below`] copied, and all go on.
    ///
    /// # Errors
    /// What device-mapper says.
    pub(super) fn copy(self) -> io::Result<()> {
        (&self.helper).write_all(&[0])?;
        hear(&self.helper, COPYING)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.helper.shutdown(Shutdown::Both);
        if self.ended.recv_timeout(THAWING) == Err(RecvTimeoutError::Timeout) {
            warn!("a file system takes long to be thawed");
        }
    }
}

/// Starts a helper, and a thread that waits for its end.
fn start(fs: BorrowedFd<'_>, mut below: Option<Below>) -> io::Result<(UnixStream, Receiver<()>)> {
    let (ours, its) = UnixStream::pair()?;
    // It ends by itself, and no signal but SIGKILL cuts that short.
    let signals = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the child does nothing but system calls, on memory that is there: of what other threads were at, it needs
    // nothing.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => help(fs.as_raw_fd(), its.as_raw_fd(), below.as_mut()),
        Ok(ForkResult::Parent { child }) => Ok(child),
        Err(error) => Err(error),
    };
    signals.thread_set_mask()?;
    let child = child?;
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || {
        let _ = waitpid(child, None);
        drop(sender);
    });
    Ok((ours, ended))
}

/// Waits until the helper has frozen the file system of `mounted`, or says why it has not.
fn await_frozen(helper: &UnixStream, mounted: &Mounted) -> Result<(), String> {
    let written = || mounted.device_number().and_then(sectors_written).ok();
    let begun = Instant::now();
    let mut before = written();
    loop {
        match hear(helper, PATIENCE) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                return Err(error.to_string());
            }
            Err(_) => {}
        }
        let now = written();
        if now == before {
            return Err(format!(
                "a process was in the middle of a write to it for {} s, such as splice(2) from an empty pipe",
                PATIENCE.as_secs()
            ));
        }
        if begun.elapsed() > FREEZING {
            return Err(format!(
                "what was written to it took more than {} s to get to its device",
                FREEZING.as_secs()
            ));
        }
        before = now;
    }
}

/// All that the helper does. Its answers are error numbers, 0 for success.
fn help(fs: RawFd, socket: RawFd, mut below: Option<&mut Below>) -> ! {
    const FS: RawFd = 0;
    const SOCKET: RawFd = 1;
    const CONTROL: RawFd = 2;
    let control = below.as_ref().map_or(socket, |b| b.control.as_raw_fd());
    // SAFETY: system calls without memory. Of the daemon's descriptors, which would outlive it with a helper that hangs, three
    // are kept; none of them is one of the first three, which Rust's runtime opens where they are not.
    let control = unsafe {
        libc::dup2(fs, FS);
        libc::dup2(socket, SOCKET);
        libc::dup2(control, CONTROL);
        libc::close_range(3, libc::c_uint::MAX, 0);
        libc::prctl(libc::PR_SET_NAME, c"friend-freeze".as_ptr());
        BorrowedFd::borrow_raw(CONTROL)
    };
    let _ = setpgid(Pid::this(), Pid::this());
    let tell = |done: Result<(), Errno>| {
        let number = done.err().map_or(0, |errno| errno as i32).to_ne_bytes();
        // SAFETY: the buffer lives over the call.
        unsafe { libc::send(SOCKET, number.as_ptr().cast(), 4, libc::MSG_NOSIGNAL) };
    };
    let mut unused = 0;
    // SAFETY: FIFREEZE looks at no argument.
    let frozen = unsafe { ioctl::freeze(FS, &raw mut unused) }.map(drop);
    let ready = match &mut below {
        Some(below) => frozen.and_then(|()| below.suspend.make(control)),
        None => frozen,
    };
    tell(ready);
    if ready.is_ok() {
        let goes_on = is_told_to_go_on(SOCKET);
        if let Some(below) = below {
            if goes_on {
                let mut messages = below.messages.iter_mut();
                tell(messages.try_for_each(|message| message.make(control)));
            }
            let _ = below.resume.make(control);
        }
    }
    // SAFETY: FITHAW looks at no argument; and _exit(2) runs nothing of the daemon's.
    unsafe {
        if frozen.is_ok() {
            let _ = ioctl::thaw(FS, &raw mut unused);
        }
        libc::_exit(0)
    }
}

/// Waits for a byte; `false`: there comes none any more.
fn is_told_to_go_on(socket: RawFd) -> bool {
    let mut byte = 0_u8;
    loop {
        // SAFETY: the buffer lives over the call.
        let read = unsafe { libc::read(socket, (&raw mut byte).cast(), 1) };
        match Errno::result(read) {
            Err(Errno::EINTR) => {}
            read => return read == Ok(1),
        }
    }
}

/// The helper's next answer.
fn hear(mut helper: &UnixStream, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    let mut number = [0; 4];
    let mut heard = 0;
    while heard < number.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        helper.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match helper.read(&mut number[heard..]) {
            Ok(0) => return Err(io::Error::other("the process that freezes it was killed")),
            Ok(length) => heard += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    match i32::from_ne_bytes(number) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Thaws what a helper left frozen that was killed itself. What is not frozen stays as it is.
pub(super) fn thaw(mounted: &Mounted) {
    let mut unused = 0;
    // SAFETY: FITHAW looks at no argument.
    match unsafe { ioctl::thaw(mounted.root().as_raw_fd(), &raw mut unused) } {
        // EINVAL: it is not frozen.
        Ok(_) | Err(nix::Error::EINVAL) => {}
        Err(error) => warn!(%error, "a file system could not be thawed"),
    }
}

mod ioctl {
    nix::ioctl_readwrite!(freeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);
}
