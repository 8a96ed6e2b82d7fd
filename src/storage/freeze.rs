// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file system that is in use, frozen for the moment in which it is copied.
//!
//! FIFREEZE waits until no process is inside a write, and cannot be interrupted meanwhile (`freeze_super` of Linux'
//! fs/super.c: `percpu_down_write`). A process in splice(2) from an empty pipe into a file is inside one for as long as it
//! likes, so a job decides how long a freeze takes. Hence a process of its own waits, which can be left behind: a thread
//! of the daemon's that hung there would keep the daemon from ending. And no store's turn or lock is held for it.
//!
//! What is left behind thaws as soon as it has frozen; and so does one whose daemon was killed: both read the end of the
//! same socket.

use std::io::{self, Read as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

use super::StoreError;
use crate::cache::names::LvName;
use crate::exec;
use crate::mount::Mounted;

/// How long a file system may take to be frozen. What was written before is on the device by then.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it may take to be thawed before it is left to itself, too.
const THAWING: Duration = Duration::from_secs(5);

/// Standard input is a directory of the file system, `$1` fsfreeze of util-linux. Where there is a `$3`, it is a
/// device-mapper device, and `$2` dmsetup: the device is suspended meanwhile, without freezing what is frozen already.
const HELPER: &str = r#"
trap '' HUP INT TERM PIPE
"$1" --freeze /proc/self/fd/0 || exit
if [ -z "$3" ] || "$2" suspend --nolockfs "$3"; then
    echo frozen
    read -r end <&1
    [ -z "$3" ] || "$2" resume --noudevsync "$3"
fi
"$1" --unfreeze /proc/self/fd/0
"#;

const FROZEN: &str = "frozen\n";

/// A frozen file system, thawed when dropped.
#[derive(Debug)]
pub(super) struct Frozen {
    helper: UnixStream,
    /// Disconnected once the helper has ended.
    ended: Receiver<()>,
}

impl Frozen {
    /// Freezes the file system of `mounted`, and suspends the device-mapper device `device` below it, where there is one. `lv`
    /// is for the message.
    ///
    /// # Errors
    /// [`StoreError::Unfreezable`] where it takes too long, or what else keeps it from being frozen.
    pub(super) fn new(
        mounted: &Mounted,
        lv: &LvName,
        device: Option<&str>,
    ) -> Result<Self, StoreError> {
        let fsfreeze = exec::find_tool("fsfreeze")?;
        let dmsetup = device.map(|_| exec::find_tool("dmsetup")).transpose()?;
        let mut command = Command::new(exec::find_tool("sh")?);
        command
            .args(["-c", HELPER, "freeze"])
            .args([fsfreeze, dmsetup.unwrap_or_default()])
            .arg(device.unwrap_or_default());
        let refused = |why: String| StoreError::Unfreezable {
            lv: lv.clone(),
            why,
        };
        let (helper, ended) = start(command, mounted).map_err(|e| refused(e.to_string()))?;
        let why = match hear(&helper) {
            Ok(said) if said == FROZEN => return Ok(Self { helper, ended }),
            Ok(said) => said.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => format!(
                "a process was in the middle of a write to it for {} s, such as splice(2) from an empty pipe",
                PATIENCE.as_secs()
            ),
            Err(error) => error.to_string(),
        };
        // Left behind where it waits still.
        let _ = helper.shutdown(Shutdown::Both);
        Err(refused(why))
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
fn start(mut command: Command, mounted: &Mounted) -> io::Result<(UnixStream, Receiver<()>)> {
    let (ours, its) = UnixStream::pair()?;
    let its = OwnedFd::from(its);
    let mut child = command
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(mounted.root().try_clone_to_owned()?)
        .stdout(its.try_clone()?)
        .stderr(its)
        // What a terminal sends to the daemon is not for it.
        .process_group(0)
        .spawn()?;
    drop(command);
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || {
        let _ = child.wait();
        drop(sender);
    });
    Ok((ours, ended))
}

/// The helper's first line, or what it said before it ended.
fn hear(mut helper: &UnixStream) -> io::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut said = Vec::new();
    let mut buffer = [0; 512];
    while !said.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        helper.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match helper.read(&mut buffer)? {
            0 => break,
            length => said.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
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
    nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);
}
