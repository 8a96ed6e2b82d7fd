// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The least that a snapshot of a thin volume takes: device-mapper's ioctls, with no LVM and no process.
//!
//! The structures are those of Linux' `include/uapi/linux/dm-ioctl.h`; the messages and tables, of
//! `Documentation/admin-guide/device-mapper/thin-provisioning.rst`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

const CREATE: u8 = 3;
const REMOVE: u8 = 4;
const SUSPEND: u8 = 6;
const STATUS: u8 = 7;
const LOAD: u8 = 9;
const MESSAGE: u8 = 14;

const NAME_LENGTH: usize = 128;
const HEAD: usize = 312;
const SPEC: usize = 40;

/// `/dev/mapper/control`, and a thin pool's device.
pub struct Pool {
    control: File,
    name: String,
    number: (u32, u32),
    next_id: u32,
}

/// An active snapshot.
pub struct Thin {
    name: String,
    id: u32,
    pub device: PathBuf,
}

impl Pool {
    /// The pool `vg/pool` of LVM's, which has an active volume.
    pub fn open(vg: &str, pool: &str) -> io::Result<Self> {
        let doubled = |name: &str| name.replace('-', "--");
        let mut opened = Self {
            control: File::options()
                .read(true)
                .write(true)
                .open("/dev/mapper/control")?,
            name: format!("{}-{}-tpool", doubled(vg), doubled(pool)),
            number: (0, 0),
            // Far from LVM's own, which grow from 1; 24 bits is all that a pool takes.
            next_id: 8_000_000,
        };
        let name = opened.name.clone();
        opened.number = opened.call(STATUS, &name, 0, &[])?;
        Ok(opened)
    }

    /// Snapshots the thin device `origin`, which must not be active, and does not activate the snapshot.
    pub fn create_snap(&mut self, origin: u64) -> io::Result<u32> {
        let id = self.next_id;
        self.next_id += 1;
        self.message(&format!("create_snap {id} {origin}"))?;
        Ok(id)
    }

    /// Snapshots `origin` and makes the snapshot, of so many bytes, a block device.
    pub fn snapshot(&mut self, origin: u64, bytes: u64) -> io::Result<Thin> {
        let id = self.create_snap(origin)?;
        let name = format!("bench-{id}");
        let (major, minor) = self.call(CREATE, &name, 0, &[])?;
        let table = table(
            bytes / 512,
            &format!("{}:{} {id}", self.number.0, self.number.1),
        );
        self.call(LOAD, &name, 1, &table)?;
        // Without its flag, suspend means resume: the table becomes the live one.
        self.call(SUSPEND, &name, 0, &[])?;
        let _ = major;
        Ok(Thin {
            name,
            id,
            device: PathBuf::from(format!("/dev/dm-{minor}")),
        })
    }

    /// Takes a snapshot away again.
    pub fn remove(&mut self, thin: &Thin) -> io::Result<()> {
        self.call(REMOVE, &thin.name, 0, &[])?;
        self.message(&format!("delete {}", thin.id))
    }

    /// Sends a message to the pool.
    pub fn message(&self, message: &str) -> io::Result<()> {
        // struct dm_target_msg: the sector that it is for, and the text.
        let mut data = 0_u64.to_ne_bytes().to_vec();
        data.extend_from_slice(message.as_bytes());
        data.push(0);
        self.call(MESSAGE, &self.name, 0, &data).map(drop)
    }

    /// One ioctl; the number of the device that it was about.
    fn call(&self, command: u8, name: &str, targets: u32, data: &[u8]) -> io::Result<(u32, u32)> {
        // struct dm_ioctl, then what the command needs, with room for an answer.
        let mut buffer = vec![0_u8; (HEAD + data.len()).next_multiple_of(8) + 1024];
        let size = u32::try_from(buffer.len()).map_err(io::Error::other)?;
        for (at, value) in [(0, 4), (12, size), (16, HEAD as u32), (20, targets)] {
            buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        if name.len() >= NAME_LENGTH {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        buffer[48..48 + name.len()].copy_from_slice(name.as_bytes());
        buffer[HEAD..HEAD + data.len()].copy_from_slice(data);
        let request = nix::request_code_readwrite!(0xfd, command, HEAD);
        // SAFETY: the buffer is as long as its `data_size` says, and lives over the call.
        let result = unsafe { libc::ioctl(self.control.as_raw_fd(), request, buffer.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let device = u64::from_ne_bytes(buffer[40..48].try_into().map_err(io::Error::other)?);
        Ok((
            nix::sys::stat::major(device) as u32,
            nix::sys::stat::minor(device) as u32,
        ))
    }
}

/// struct dm_target_spec and its parameters, for one target from the start to the end.
fn table(sectors: u64, parameters: &str) -> Vec<u8> {
    let mut spec = vec![0; SPEC];
    spec[8..16].copy_from_slice(&sectors.to_ne_bytes());
    spec[24..28].copy_from_slice(b"thin");
    spec.extend_from_slice(parameters.as_bytes());
    spec.resize((spec.len() + 1).next_multiple_of(8), 0);
    let length = u32::try_from(spec.len()).expect("short");
    spec[20..24].copy_from_slice(&length.to_ne_bytes());
    spec
}
