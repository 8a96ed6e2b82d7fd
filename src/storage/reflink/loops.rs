// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loop devices over image files, with direct I/O: what is written to the device
//! is in the file, and held in memory once.
//!
//! Which device an image has is never noted anywhere: the kernel knows, and
//! tells it as the file's device and inode number, whatever the file is called
//! in whose mount namespace.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::cache::spec::FsType;
use crate::mount;

/// Logical block size of the devices, in bytes. The kernel's own choice follows
/// the alignment that direct I/O on the file needs, and that changes from 512 to
/// the block size of the file system once the file shares blocks (XFS, Linux
/// 6.16 on): a file system made for the one does not mount on the other.
const BLOCK: u32 = 4096;

/// How often an idle loop device is tried to be had, when others take them too.
const TRIES: u32 = 100;

/// A loop device that is set up.
#[derive(Debug, Clone)]
pub struct Loop {
    /// Its name in /sys/block, `loop7`.
    name: String,
    /// Its number `(major, minor)`.
    pub number: (u32, u32),
    /// Device and inode number of the file behind it.
    file: (u64, u64),
}

/// All loop devices over files called `file_name`.
///
/// # Errors
/// What reading /sys or asking a device says.
pub fn all(file_name: &str) -> io::Result<Vec<Loop>> {
    let mut loops = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if !name.starts_with("loop") {
            continue;
        }
        // Only a first sieve: opening devices of others could disturb them.
        let Ok(backing) = fs::read(entry.path().join("loop/backing_file")) else {
            continue;
        };
        let backing = String::from_utf8_lossy(&backing);
        if Path::new(backing.trim_end()).file_name() != Some(file_name.as_ref()) {
            continue;
        }
        match Loop::ask(name) {
            Ok(found) => loops.push(found),
            // Gone in the meantime.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(loops)
}

/// The loop device over `image`, if there is one.
///
/// # Errors
/// As [`all`]; ENOENT when there is no such file.
pub fn of(image: &Path) -> io::Result<Option<Loop>> {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let image = fs::metadata(image)?;
    Ok(all(&name)?.into_iter().find(|found| found.backs(&image)))
}

/// Sets up a loop device over `image`.
///
/// # Errors
/// What the kernel says.
pub fn attach(image: &Path) -> io::Result<Loop> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_NOFOLLOW)
        .open(image)?;
    let control = File::options()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    for _ in 0..TRIES {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let number = unsafe { ioctl::get_free(control.as_raw_fd()) }?;
        let name = format!("loop{number}");
        let device = File::options()
            .read(true)
            .write(true)
            .open(Path::new("/dev").join(&name))?;
        let config = Config {
            fd: file.as_raw_fd(),
            block_size: BLOCK,
            info: Info {
                flags: LO_FLAGS_DIRECT_IO,
                ..Info::default()
            },
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE reads one loop_config.
        match unsafe { ioctl::configure(device.as_raw_fd(), &raw const config) } {
            Ok(_) => return Loop::ask(name),
            // Somebody else was quicker.
            Err(nix::Error::EBUSY) => thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

impl Loop {
    fn ask(name: String) -> io::Result<Self> {
        let device = File::open(Path::new("/dev").join(&name))?;
        let mut info = Info::default();
        // SAFETY: LOOP_GET_STATUS64 writes one loop_info64.
        unsafe { ioctl::get_status(device.as_raw_fd(), &raw mut info) }?;
        let number = device.metadata()?.rdev();
        Ok(Self {
            name,
            number: (libc::major(number), libc::minor(number)),
            file: (info.device, info.inode),
        })
    }

    /// Whether this is the file behind it.
    pub fn backs(&self, image: &fs::Metadata) -> bool {
        self.file == (image.dev(), image.ino())
    }

    /// Its device node.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// As which file system it is mounted.
    pub fn mounted(&self) -> Option<FsType> {
        mount::mounted_as(&self.name)
    }

    /// Writes what the device's page cache holds.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn flush(&self) -> io::Result<()> {
        File::open(self.path())?.sync_all()
    }

    /// Takes over the new size of the file.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resize(&self) -> io::Result<()> {
        let device = File::open(self.path())?;
        // SAFETY: LOOP_SET_CAPACITY takes no argument.
        unsafe { ioctl::set_capacity(device.as_raw_fd()) }?;
        Ok(())
    }

    /// Takes the device down. `true`: it is still there, mounted or held open.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn detach(&self) -> io::Result<bool> {
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(self.path());
        let device = match opened {
            Ok(device) => device,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(true),
            Err(error) => return Err(error),
        };
        match Self::ask(self.name.clone()) {
            Ok(now) if now.file == self.file => {}
            _ => return Ok(false),
        }
        // SAFETY: LOOP_CLR_FD takes no argument.
        unsafe { ioctl::clear(device.as_raw_fd()) }?;
        drop(device);
        // Where somebody else has it open, the kernel only marks it, and takes
        // it down at the last close.
        Ok(Self::ask(self.name.clone()).is_ok_and(|now| now.file == self.file))
    }
}

const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64`, linux/loop.h.
#[repr(C)]
#[derive(Default)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u64; 8],
    crypt_name: [u64; 8],
    encrypt_key: [u64; 4],
    init: [u64; 2],
}

/// `struct loop_config`, linux/loop.h.
#[repr(C)]
struct Config {
    fd: RawFd,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

mod ioctl {
    use nix::{ioctl_none_bad, ioctl_read_bad, ioctl_write_ptr_bad};

    ioctl_none_bad!(clear, 0x4c01);
    ioctl_read_bad!(get_status, 0x4c05, super::Info);
    ioctl_none_bad!(set_capacity, 0x4c07);
    ioctl_write_ptr_bad!(configure, 0x4c0a, super::Config);
    ioctl_none_bad!(get_free, 0x4c82);
}
