// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A job volume's directory: the client below a read-only mount, and the socket.
//!
//! The job may write in it, so nothing is opened in it but beneath its root and through no link.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::sync::watch;

use super::JobSocket;
use crate::cache::units::Bytes;
use crate::engine::error::io_error;
use crate::engine::owners::own_scratch;
use crate::engine::survey::JOB_SOURCE;
use crate::engine::volume::{Job, Volume};
use crate::engine::{Engine, EngineError};
use crate::mount::Mounted;
use crate::selinux;
use crate::userns::Ids;

/// How much a job can write in its job volume's own directory.
const DIR_SIZE: u64 = 1 << 20;

/// The socket's name in it.
const SOCKET: &str = "socket";

/// The client's directory in it.
const BIN: &str = "bin";

/// The client's name in that, and what it is: see build.rs.
const CLIENT: (&str, &[u8]) = (
    "lvm-cache-friend",
    include_bytes!(concat!(env!("OUT_DIR"), "/job-client")),
);

impl Engine {
    /// Begins the lease of a job volume: its directory with the socket, out of sight yet.
    pub(in crate::engine) fn open_job(
        &self,
        volume: &Arc<Volume>,
    ) -> Result<Arc<Job>, EngineError> {
        let failed = |e| {
            io_error(
                "making the directory of",
                Path::new(volume.name.as_str()),
                e,
            )
        };
        let size = Bytes(DIR_SIZE + CLIENT.1.len() as u64);
        let dir = Mounted::scratch(size, JOB_SOURCE).map_err(failed)?;
        dir.make_shared().map_err(failed)?;
        put_client(&dir).map_err(failed)?;
        own_scratch(&dir, &volume.spec, &Ids::host()).map_err(failed)?;
        Ok(self.job(volume, dir))
    }

    pub(super) fn job(&self, volume: &Arc<Volume>, dir: Mounted) -> Arc<Job> {
        Arc::new(Job {
            volume: Arc::clone(volume),
            dir,
            now: Mutex::default(),
            judging: Mutex::default(),
            closed: watch::Sender::new(false),
        })
    }

    /// Makes the socket in a job volume's directory, beside the client, and has it served.
    pub(in crate::engine) fn serve_job(&self, job: &Arc<Job>) -> Result<(), EngineError> {
        let failed = |making| move |e| io_error(making, Path::new(job.name()), e);
        cover_client(&job.dir).map_err(failed("mounting the client program of"))?;
        let listener = listen(&job.dir).map_err(failed("making the socket of"))?;
        let _ = self.settings.jobs.send(JobSocket {
            job: Arc::clone(job),
            listener,
        });
        Ok(())
    }
}

/// A directory beneath `dir`, reached through no link.
pub(super) fn open_beneath(
    dir: BorrowedFd<'_>,
    path: &str,
    more: ResolveFlags,
) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let resolve = ResolveFlags::BENEATH | links | more;
    Ok(rustix::fs::openat2(
        dir,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

/// Puts the client program into a directory that is not shown to any container yet.
fn put_client(dir: &Mounted) -> io::Result<()> {
    let (name, program) = CLIENT;
    rustix::fs::mkdirat(dir.root(), BIN, Mode::from_raw_mode(0o755))?;
    let bin = open_beneath(dir.root(), BIN, ResolveFlags::empty())?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(bin, name, flags, Mode::empty())?);
    file.write_all(program)?;
    Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(0o555))?)
}

/// Covers the client's directory with a read-only mount of itself, unless that is done.
fn cover_client(dir: &Mounted) -> io::Result<()> {
    let bin = match open_beneath(dir.root(), BIN, ResolveFlags::NO_XDEV) {
        Ok(bin) => bin,
        Err(error) => match Errno::from_io_error(&error) {
            // The mount is there.
            Some(Errno::XDEV) => return Ok(()),
            // An earlier version made none, or the job has moved it away.
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(()),
            _ => return Err(error),
        },
    };
    let cover = Mounted::clone_of(bin.as_fd())?;
    cover.make_read_only()?;
    cover.attach_upon(bin.as_fd())
}

/// A socket that everybody in a container may connect to, in a directory that its job may write in.
fn listen(dir: &Mounted) -> io::Result<UnixListener> {
    let root = dir.root();
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
    // Bound under an unguessable name, then moved over whatever is in its place.
    let unready = format!(".{SOCKET}.{:016x}", u64::from_ne_bytes(random));
    // Short, whatever the volume's name: a socket's path has 107 bytes at most.
    let path = format!("/proc/self/fd/{}/{unready}", root.as_raw_fd());
    let listener = selinux::with_socket_label(|| UnixListener::bind(&path))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let ready = rustix::fs::openat(root, &*unready, flags, Mode::empty()).and_then(|inode| {
        // chmod(2) of a path could be led to another file; of a descriptor, it cannot.
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&inode)?.st_mode);
        if kind != rustix::fs::FileType::Socket {
            return Err(Errno::STALE);
        }
        let inode = format!("/proc/self/fd/{}", inode.as_raw_fd());
        rustix::fs::chmod(&*inode, Mode::from_raw_mode(0o666))?;
        rustix::fs::renameat(root, &*unready, root, SOCKET)
    });
    if let Err(error) = ready {
        let _ = rustix::fs::unlinkat(root, &*unready, AtFlags::empty());
        return Err(error.into());
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}
