//! Mounts: detached ones, moving them into place, and the kernel's mount table.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::cache::spec::FsType;
use crate::cache::units::Bytes;

/// A mounted file system, held by descriptors. While it was never attached it is
/// visible nowhere, and gone by itself when its holder dies.
#[derive(Debug)]
pub struct Mounted {
    /// The mount, as fsmount(2) or open_tree(2) gave it.
    mount: OwnedFd,
    /// Its root directory, opened for reading: keeps the file system mounted,
    /// and carries write-back errors to [`Mounted::sync`].
    root: OwnedFd,
}

impl Mounted {
    /// Mounts `device`, attached nowhere: `nosuid,nodev,noatime`, and `nouuid`
    /// for XFS (two snapshots of one origin share a UUID).
    ///
    /// # Errors
    /// What the kernel says; with the messages of the fs context in it.
    pub fn device(device: &Path, fs: FsType) -> io::Result<Self> {
        let _ = (device, fs);
        todo!("mount helper")
    }

    /// An empty directory in memory, of at most `size` bytes; `source` is the
    /// name shown in the mount table.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn scratch(size: Bytes, source: &str) -> io::Result<Self> {
        let _ = (size, source);
        todo!("mount helper")
    }

    /// Holds on to a mount that is attached at `at` already: after a restart.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attached(at: &Path) -> io::Result<Self> {
        let _ = at;
        todo!("mount helper")
    }

    /// Moves the mount to `at`, an existing directory: one move_mount(2).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&self, at: &Path) -> io::Result<()> {
        let _ = at;
        todo!("mount helper")
    }

    /// Writes everything to the device.
    ///
    /// # Errors
    /// Any write-back error since this mount was taken hold of, and EIO once
    /// the file system has shut down.
    pub fn sync(&self) -> io::Result<()> {
        todo!("mount helper")
    }

    /// Its root directory.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        todo!("mount helper")
    }

    /// The device number `(major, minor)` of the file system.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn device_number(&self) -> io::Result<(u32, u32)> {
        todo!("mount helper")
    }
}

/// Takes the mount at `at` out of sight, whoever still uses it. `false`: nothing
/// was mounted there.
///
/// # Errors
/// What the kernel says.
pub fn detach(at: &Path) -> io::Result<bool> {
    let _ = at;
    todo!("mount helper")
}

/// Whether a file system on `device` is still mounted, in any namespace.
///
/// # Errors
/// What opening the device says.
pub fn in_use(device: &Path) -> io::Result<bool> {
    let _ = device;
    todo!("mount helper")
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Where.
    pub at: PathBuf,
    /// The device number `(major, minor)`.
    pub device: (u32, u32),
    /// The file system's type.
    pub fs: String,
    /// What is mounted, as the kernel names it.
    pub source: String,
    /// Whether mounts below it reach other namespaces (`shared:`).
    pub shared: bool,
}

/// This process's mount table.
///
/// # Errors
/// What reading /proc/self/mountinfo says.
pub fn table() -> io::Result<Vec<MountPoint>> {
    todo!("mount helper")
}

/// Makes `dir` and sees that it lies on a shared mount, which it becomes itself
/// (bound onto itself) where it does not.
///
/// # Errors
/// What the kernel says.
pub fn ensure_shared(dir: &Path) -> io::Result<()> {
    let _ = dir;
    todo!("mount helper")
}
