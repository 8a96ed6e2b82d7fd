// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Access control lists: single users who may pass through a directory that is closed to others.
//!
//! The kernel has a list as an extended attribute: a version, then entries of a tag, permissions and an id, all little-endian
//! (linux/posix_acl_xattr.h).

use std::io;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;

const NAME: &str = "system.posix_acl_access";
const VERSION: u32 = 2;
const ENTRY: usize = 8;

/// Tags of entries (linux/posix_acl.h).
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

const EXECUTE: u16 = 1;
const UNDEFINED: u32 = u32::MAX;

/// Tag, permissions and id.
type Entry = (u16, u16, u32);

/// Lets a user pass through a directory, whose mode's group may pass: to what is in it by name, not to see the names.
///
/// # Errors
/// What the kernel says: EOPNOTSUPP where the file system has no such lists.
pub fn let_pass(dir: &Path, uid: u32) -> io::Result<()> {
    let mut buffer = [0; 64 << 10];
    let mut entries = match getxattr(dir, NAME, &mut buffer) {
        Ok(length) => parse(&buffer[..length]).ok_or(io::ErrorKind::InvalidData)?,
        // The mode says it all.
        Err(Errno::NODATA) => of_mode(rustix::fs::stat(dir)?.st_mode),
        Err(error) => return Err(error.into()),
    };
    if entries.iter().any(|&(tag, _, id)| tag == USER && id == uid) {
        return Ok(());
    }
    entries.push((USER, EXECUTE, uid));
    // The kernel wants them in the order of tags, then of ids.
    entries.sort_by_key(|&(tag, _, id)| (tag, id));
    Ok(setxattr(dir, NAME, &bytes(&entries), XattrFlags::empty())?)
}

fn of_mode(mode: u32) -> Vec<Entry> {
    let class = |shift: u32| u16::try_from(mode >> shift & 7).expect("three bits");
    [
        (USER_OBJ, class(6)),
        (GROUP_OBJ, class(3)),
        (MASK, class(3)),
        (OTHER, class(0)),
    ]
    .map(|(tag, may)| (tag, may, UNDEFINED))
    .into()
}

fn parse(bytes: &[u8]) -> Option<Vec<Entry>> {
    let (version, rest) = bytes.split_first_chunk()?;
    if u32::from_le_bytes(*version) != VERSION || rest.len() % ENTRY != 0 {
        return None;
    }
    let entry = |entry: &[u8]| {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let may = u16::from_le_bytes([entry[2], entry[3]]);
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        (tag, may, id)
    };
    Some(rest.chunks_exact(ENTRY).map(entry).collect())
}

fn bytes(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, may, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(may.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        let entries = of_mode(0o40750);
        let want = [(USER_OBJ, 7), (GROUP_OBJ, 5), (MASK, 5), (OTHER, 0)];
        assert_eq!(entries, want.map(|(tag, may)| (tag, may, UNDEFINED)));
        assert_eq!(parse(&bytes(&entries)), Some(entries));
        for bad in [&[][..], &[1, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
