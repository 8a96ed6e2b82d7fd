// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests to device-mapper, which take a process each by dmsetup. `struct dm_ioctl`, `dm_target_spec` and
//! `dm_target_msg` are those of Linux' include/uapi/linux/dm-ioctl.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;

const HEAD: usize = 312;
const SPEC: usize = 40;
const NAME: usize = 48;
/// Its last byte stays 0.
const NAME_LENGTH: usize = 127;

const SUSPEND: u8 = 6;
const TABLE_STATUS: u8 = 12;
const MESSAGE: u8 = 14;

const TO_SUSPEND: u32 = 1 << 1;
const TABLE: u32 = 1 << 4;
const SKIP_LOCKFS: u32 = 1 << 10;
const NO_FLUSH: u32 = 1 << 11;

/// The longest status is a pool's, of some 150 bytes.
const ROOM: usize = 1024;

/// A request that is ready to be made.
#[derive(Debug)]
pub(super) struct Request {
    code: libc::Ioctl,
    buffer: Vec<u8>,
}

impl Request {
    fn new(command: u8, name: &str, flags: u32, data: &[u8]) -> io::Result<Self> {
        if name.len() > NAME_LENGTH {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        let mut buffer = vec![0; HEAD + data.len()];
        for (at, value) in [
            (0, 4),
            (12, buffer.len() as u32),
            (16, HEAD as u32),
            (28, flags),
        ] {
            buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        buffer[NAME..NAME + name.len()].copy_from_slice(name.as_bytes());
        buffer[HEAD..].copy_from_slice(data);
        Ok(Self {
            code: nix::request_code_readwrite!(0xfd, command, HEAD),
            buffer,
        })
    }

    /// Lets no more writes through to the device `name`, once those that are on their way have arrived. The file system on it
    /// is not frozen.
    pub(super) fn suspend(name: &str) -> io::Result<Self> {
        Self::new(SUSPEND, name, TO_SUSPEND | SKIP_LOCKFS, &[])
    }

    pub(super) fn resume(name: &str) -> io::Result<Self> {
        Self::new(SUSPEND, name, 0, &[])
    }

    /// Sends `text` to the target of the device `name`.
    pub(super) fn message(name: &str, text: &str) -> io::Result<Self> {
        let mut data = 0_u64.to_ne_bytes().to_vec();
        data.extend_from_slice(text.as_bytes());
        data.push(0);
        Self::new(MESSAGE, name, 0, &data)
    }

    /// Makes the request by [`control`]. Takes no memory and no lock: a process that was just forked may call it.
    pub(super) fn make(&mut self, control: BorrowedFd<'_>) -> Result<(), Errno> {
        // SAFETY: the buffer is as long as its `data_size` says, and lives over the call.
        let result =
            unsafe { libc::ioctl(control.as_raw_fd(), self.code, self.buffer.as_mut_ptr()) };
        Errno::result(result).map(drop)
    }
}

/// What requests are made by.
pub(super) fn control() -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/mapper/control")
}

/// The status of a device's one target, its parameters only: what `dmsetup status --noflush` shows.
pub(super) fn status(name: &str) -> io::Result<String> {
    Ok(target(name, NO_FLUSH)?.1)
}

/// How many sectors a device's one target has, and its parameters in the table: what `dmsetup table` shows.
pub(super) fn table(name: &str) -> io::Result<(u64, String)> {
    target(name, TABLE)
}

fn target(name: &str, flags: u32) -> io::Result<(u64, String)> {
    let mut request = Request::new(TABLE_STATUS, name, flags, &[0; ROOM])?;
    let control = control()?;
    request.make(std::os::fd::AsFd::as_fd(&control))?;
    let (spec, text) = request.buffer[HEAD..].split_at(SPEC);
    let sectors = u64::from_ne_bytes(spec[8..16].try_into().expect("8 bytes"));
    let end = text.iter().position(|byte| *byte == 0);
    let text = &text[..end.unwrap_or(text.len())];
    Ok((sectors, String::from_utf8_lossy(text).into_owned()))
}
