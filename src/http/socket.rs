// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket: made with its permissions from the first moment, or handed over
//! by systemd; and the locks that keep a second daemon away.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, SockaddrLike as _, UnixAddr, getsockname, getsockopt, sockopt,
};

/// A socket or lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers on the socket.
    #[error("{}: another daemon answers on this socket", .0.display())]
    Taken(PathBuf),
    /// Something that is no socket is in the socket's place.
    #[error("{}: exists, and is not a socket; left alone", .0.display())]
    NotASocket(PathBuf),
    /// Another daemon holds the lock.
    #[error("{}: in use by another lvm-cache-friend daemon", .0.display())]
    Locked(PathBuf),
    /// systemd handed over what cannot be served on.
    #[error("systemd handed over {0}: exactly one listening unix stream socket is expected")]
    Handed(String),
    /// The operating system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A listening socket.
#[derive(Debug)]
pub struct Listening {
    /// It, non-blocking.
    pub listener: UnixListener,
    /// Its path where it is ours to remove; `None` when systemd keeps it.
    path: Option<PathBuf>,
}

impl Listening {
    /// The socket that systemd handed over, if it did; else a new one at `path`,
    /// with mode 0660, owned by root and `gid`. A stale socket is replaced.
    ///
    /// # Errors
    /// [`SocketError::Taken`] when somebody answers there, and what else the
    /// operating system says.
    pub fn open(path: &Path, gid: u32) -> Result<Self, SocketError> {
        let listening = match handed_over()? {
            Some(listener) => Self {
                listener,
                path: None,
            },
            None => Self {
                listener: bind(path, gid)?,
                path: Some(path.to_owned()),
            },
        };
        listening.listener.set_nonblocking(true).map_err(at(path))?;
        Ok(listening)
    }

    /// Splits off what [`Path`] is to be removed at the end.
    #[must_use]
    pub fn into_parts(self) -> (UnixListener, Option<PathBuf>) {
        (self.listener, self.path)
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> SocketError + '_ {
    |source| SocketError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Makes a directory and those above it, with mode 0755.
///
/// # Errors
/// What the operating system says.
pub fn make_dir(dir: &Path) -> Result<(), SocketError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(at(dir))
}

fn bind(path: &Path, gid: u32) -> Result<UnixListener, SocketError> {
    if let Some(dir) = path.parent() {
        make_dir(dir)?;
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(path)(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            // Answered, or too busy to be (EAGAIN): alive.
            _ => return Err(SocketError::Taken(path.to_owned())),
        },
    }
    // Under another name until owner and mode are right; the rename then also
    // replaces a stale one with no moment in between.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push("~");
    let unready = path.with_file_name(name);
    if let Err(error) = fs::remove_file(&unready)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(at(&unready)(error));
    }
    let listener = UnixListener::bind(&unready).map_err(at(&unready))?;
    chown(&unready, None, Some(gid))
        .and_then(|()| fs::set_permissions(&unready, Permissions::from_mode(0o660)))
        .and_then(|()| fs::rename(&unready, path))
        .map_err(at(path))?;
    Ok(listener)
}

fn handed_over() -> Result<Option<UnixListener>, SocketError> {
    let handed = |what: &dyn std::fmt::Display| SocketError::Handed(what.to_string());
    let fds: Vec<_> = sd_notify::listen_fds().map_err(|e| handed(&e))?.collect();
    let fd = match fds[..] {
        [] => return Ok(None),
        [fd] => fd,
        _ => return Err(handed(&format_args!("{} descriptors", fds.len()))),
    };
    // SAFETY: systemd passes descriptors from 3 on to this process, LISTEN_PID
    // names it, and `listen_fds` has just removed the variables: nobody else
    // takes this one.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let unix = getsockname::<UnixAddr>(fd.as_raw_fd())
        .is_ok_and(|address| address.family() == Some(AddressFamily::Unix));
    let listening = getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false);
    let stream = matches!(
        getsockopt(&fd, sockopt::SockType),
        Ok(nix::sys::socket::SockType::Stream)
    );
    if unix && listening && stream {
        Ok(Some(UnixListener::from(fd)))
    } else {
        Err(handed(&"a descriptor that is none"))
    }
}

/// A lock on a file or directory, held until it is dropped or the process ends:
/// nothing to clean up after `kill -9`.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Locks the existing directory or file at `path`.
    ///
    /// # Errors
    /// [`SocketError::Locked`] while somebody else holds it.
    pub fn existing(path: &Path) -> Result<Self, SocketError> {
        Self::take(path, File::open(path).map_err(at(path))?)
    }

    /// Locks the file at `path`, which is made where it is missing and never removed.
    ///
    /// # Errors
    /// As [`Lock::existing`].
    pub fn file(path: &Path) -> Result<Self, SocketError> {
        if let Some(dir) = path.parent() {
            make_dir(dir)?;
        }
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(at(path))?;
        Self::take(path, file)
    }

    fn take(path: &Path, file: File) -> Result<Self, SocketError> {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Self { _file: file }),
            Err((_, Errno::EWOULDBLOCK)) => Err(SocketError::Locked(path.to_owned())),
            Err((_, errno)) => Err(at(path)(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("missing/plugin.sock");
        let gid = nix::unistd::getgid().as_raw();

        let first = bind(&path, gid).expect("a new one, in a new directory");
        let mode = fs::metadata(&path)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o660);
        assert!(matches!(bind(&path, gid), Err(SocketError::Taken(_))));

        drop(first);
        let second = bind(&path, gid).expect("the first is stale");
        UnixStream::connect(&path).expect("the second listens");
        drop(second);

        fs::remove_file(&path).expect("it is there");
        fs::write(&path, "mine").expect("written");
        assert!(matches!(bind(&path, gid), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).expect("it is there"), b"mine");
    }

    #[test]
    fn one_lock_at_a_time() {
        let dir = tempfile::tempdir().expect("a directory");
        for take in [Lock::existing, |path: &Path| {
            Lock::file(&path.join("sub/lock"))
        }] {
            let held = take(dir.path()).expect("nobody holds it");
            assert!(matches!(take(dir.path()), Err(SocketError::Locked(_))));
            drop(held);
            take(dir.path()).expect("nobody holds it any more");
        }
    }
}
