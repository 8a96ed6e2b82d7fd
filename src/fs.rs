//! File systems on block devices: which one, making, growing, whether it is clean.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::cache::spec::{FsType, Owner};
use crate::exec::ExecError;

/// What a block device holds, told by its first 68 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Only zeros.
    Blank,
    /// A file system that we mount.
    Fs(FsType),
    /// Anything else.
    Unknown,
}

/// What `device` holds.
///
/// # Errors
/// What reading it says.
pub fn probe(device: &Path) -> io::Result<Content> {
    let _ = device;
    todo!("mount helper")
}

/// Makes an empty file system on `device`, whatever it held.
///
/// # Errors
/// When mkfs fails.
pub fn make(device: &Path, fs: FsType) -> Result<(), ExecError> {
    let _ = (device, fs);
    todo!("mount helper")
}

/// Grows the mounted file system whose root is `root` to its device's size;
/// does nothing where it has it.
///
/// # Errors
/// What the kernel says.
pub fn grow(root: BorrowedFd<'_>, fs: FsType) -> io::Result<()> {
    let _ = (root, fs);
    todo!("mount helper")
}

/// Sets owner and mode of the root directory and takes an empty `lost+found`
/// out of it; nothing is written where all is so already.
///
/// # Errors
/// What the kernel says.
pub fn dress(root: BorrowedFd<'_>, owner: Option<Owner>, mode: Option<u32>) -> io::Result<()> {
    let _ = (root, owner, mode);
    todo!("mount helper")
}

/// Whether the file system on the unmounted `device` was unmounted cleanly and
/// has no recorded error: its log needs no recovery.
///
/// # Errors
/// When it cannot be read.
pub fn is_clean(device: &Path, fs: FsType) -> io::Result<bool> {
    let _ = (device, fs);
    todo!("mount helper")
}

/// Sectors (512 bytes) written to a block device since it appeared.
///
/// # Errors
/// What reading /sys/dev/block/MAJ:MIN/stat says.
pub fn sectors_written(device: (u32, u32)) -> io::Result<u64> {
    let _ = device;
    todo!("mount helper")
}

/// Gives all the space that a block device has mapped back to its pool: what it
/// held is lost.
///
/// # Errors
/// What the kernel says.
pub fn discard_all(device: &Path) -> io::Result<()> {
    // BLKDISCARD takes a pointer to two u64: offset and length, in bytes.
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);

    let mut file = std::fs::OpenOptions::new().write(true).open(device)?;
    let size = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    // SAFETY: the descriptor is open, and the range a valid pointer to two u64.
    unsafe { blkdiscard(std::os::fd::AsRawFd::as_raw_fd(&file), &[0, size]) }?;
    Ok(())
}
