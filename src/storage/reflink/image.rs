// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images: sparse files that share blocks.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use fiemap::{Fiemap, FiemapExtentFlags};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::{FlockOperation, IFlags, Mode, OFlags};

use super::super::{StoreError, Usage};
use super::dir::failed;
use crate::cache::units::Bytes;

/// Sizes are rounded up to this, in bytes.
const GRAIN: u64 = Bytes::MIB;

/// Makes an empty image.
pub fn make(path: &Path) -> Result<File, StoreError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("making", path))?;
    without_checksums(&file);
    Ok(file)
}

/// btrfs checks each block that it reads against a checksum, and direct I/O of
/// pages that change under way makes wrong ones; what the file system inside
/// writes is its own business to check. Other file systems have no such thing.
fn without_checksums(file: &File) {
    if let Ok(flags) = rustix::fs::ioctl_getflags(file)
        && rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == libc::BTRFS_SUPER_MAGIC)
    {
        let _ = rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW);
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed("opening", path))
}

/// Gives an image a size of at least `size`.
pub fn resize(image: &Path, size: Bytes) -> Result<(), StoreError> {
    let file = open(image)?;
    file.set_len(size.round_up(GRAIN).0)
        .and_then(|()| file.sync_all())
        .map_err(failed("growing", image))
}

/// Makes `image`, an empty file, share all blocks of `source`.
pub fn clone(source: &Path, image: &Path) -> Result<(), StoreError> {
    let from = open(source)?;
    let to = open(image)?;
    rustix::fs::ioctl_ficlone(&to, &from).map_err(|error| failed("cloning", source)(error.into()))
}

/// Tries whether two files in `dir` can share blocks.
pub fn can_clone(dir: &Path) -> Result<(), StoreError> {
    let unnamed = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map(File::from)
    };
    let tried = (|| {
        let (mut from, to) = (unnamed()?, unnamed()?);
        from.write_all(&[1; 4096])?;
        Ok::<_, io::Error>(rustix::fs::ioctl_ficlone(&to, &from)?)
    })();
    match tried {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS)
            ) =>
        {
            Err(StoreError::Unusable(format!(
                "{}: files there cannot share blocks ({error}): it must be on XFS (made with reflink=1, as mkfs.xfs does) or btrfs",
                dir.display()
            )))
        }
        other => other.map_err(failed("trying to share blocks in", dir)),
    }
}

pub fn usage(image: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    for extent in Fiemap::new_from_path(image)? {
        let extent = extent?;
        usage.mapped.0 += extent.fe_length;
        if !extent.fe_flags.contains(FiemapExtentFlags::SHARED) {
            usage.exclusive.0 += extent.fe_length;
        }
    }
    Ok(usage)
}

/// See [`Store::hold`](super::super::Store::hold).
pub fn hold(image: &Path) -> Result<File, StoreError> {
    let file = File::open(image).map_err(failed("opening", image))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)
        .map_err(|error| failed("locking", image)(error.into()))?;
    Ok(file)
}

/// Whether an image is held: see [`hold`]. How often a loop device is open the kernel does not tell.
pub fn is_held(image: &Path) -> bool {
    File::open(image).is_ok_and(|image| {
        // Shared, as others may be looking too.
        matches!(
            Flock::lock(image, FlockArg::LockSharedNonblock),
            Err((_, Errno::EWOULDBLOCK))
        )
    })
}
