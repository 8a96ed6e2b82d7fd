// SPDX-License-Identifier: Apache-2.0 OR MIT
//! File systems on block devices: which one, making, growing, whether it is clean.
//!
//! On-disk formats: XFS Algorithms & Data Structures (kernel.org) and
//! fs/xfs/libxfs/xfs_format.h, xfs_log_format.h; fs/ext4/ext4.h.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, Uid};
use rustix::io::Errno;

use crate::cache::spec::{FsType, Owner};
use crate::cache::units::Bytes;
use crate::exec::{self, Bounds, ExecError};

/// How much of a device [`probe`] looks at, in bytes: the superblocks of all
/// common file systems are in it, btrfs's, at 64 KiB, last.
const HEAD: usize = 68 << 10;

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

/// What `device` holds. ext2 and ext3 count as ext4: its driver mounts them.
///
/// # Errors
/// What reading it says.
pub fn probe(device: &Path) -> io::Result<Content> {
    let mut head = Vec::with_capacity(HEAD);
    open_uncached(device)?
        .take(HEAD as u64)
        .read_to_end(&mut head)?;
    Ok(content(&head))
}

fn content(head: &[u8]) -> Content {
    if xfs::Superblock::parse(head).is_some() {
        Content::Fs(FsType::Xfs)
    } else if ext4::Superblock::parse(head).is_some_and(|superblock| superblock.mountable()) {
        Content::Fs(FsType::Ext4)
    } else if head.iter().all(|&byte| byte == 0) {
        Content::Blank
    } else {
        Content::Unknown
    }
}

/// The smallest device that mkfs makes a file system on: XFS refuses less than
/// 300 MiB (xfsprogs 5.19), ext4 has no journal below 8 MiB.
#[must_use]
pub const fn min_size(fs: FsType) -> Bytes {
    match fs {
        FsType::Xfs => Bytes::mib(300),
        FsType::Ext4 => Bytes::mib(8),
    }
}

/// Makes an empty file system on `device`, whatever it held.
///
/// Nothing is discarded first (a new volume has nothing mapped), and ext4's
/// inode tables and journal are not zeroed (30 GiB: 4 MiB are written instead
/// of 612), which is safe with the checksums that it has by default; our mounts
/// do not make up for it in the background either. No blocks are reserved
/// for root: a cache has no use for them.
///
/// # Errors
/// When mkfs fails.
pub fn make(device: &Path, fs: FsType) -> Result<(), ExecError> {
    let (tool, options): (_, &[&str]) = match fs {
        FsType::Xfs => ("mkfs.xfs", &["-f", "-q", "-K"]),
        FsType::Ext4 => (
            "mkfs.ext4",
            &[
                "-F",
                "-q",
                "-m0",
                "-Enodiscard,lazy_itable_init=1,lazy_journal_init=1",
            ],
        ),
    };
    let arguments = options
        .iter()
        .map(AsRef::as_ref)
        .chain([device.as_os_str()]);
    exec::run(tool, arguments).map(drop)
}

/// Grows the mounted file system whose root is `root` to its device's size;
/// does nothing where it has it.
///
/// # Errors
/// What the kernel says.
pub fn grow(root: BorrowedFd<'_>, fs: FsType) -> io::Result<()> {
    let device = rustix::fs::fstat(root)?.st_dev;
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    let sectors: u64 = number(&sys_block(device, "size")?)?;
    match fs {
        FsType::Xfs => xfs::grow(root, sectors * 512),
        FsType::Ext4 => ext4::grow(root, device, sectors * 512),
    }
}

/// Sets owner and mode of the root directory and takes an empty `lost+found`
/// out of it; nothing is written where all is so already. (e2fsck makes a
/// `lost+found` when it needs one.)
///
/// # Errors
/// What the kernel says.
pub fn dress(root: BorrowedFd<'_>, owner: Option<Owner>, mode: Option<u32>) -> io::Result<()> {
    match rustix::fs::unlinkat(root, "lost+found", AtFlags::REMOVEDIR) {
        // In use as one, or a file of the cache's own.
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::NOTDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let stat = rustix::fs::fstat(root)?;
    if let Some(Owner { uid, gid }) = owner
        && (uid, gid) != (stat.st_uid, stat.st_gid)
    {
        rustix::fs::fchown(root, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    if let Some(mode) = mode
        && mode != stat.st_mode & 0o7777
    {
        rustix::fs::fchmod(root, Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// Gives all free space of the mounted file system whose root is `root` back to
/// its device: what was deleted since the volume was made, too. XFS frees what a removed file had
/// behind the scenes, and allocates beyond the end of files that grow: that is made up for first.
///
/// # Errors
/// What the kernel says, EOPNOTSUPP where the device takes no discards.
pub fn trim(root: BorrowedFd<'_>) -> io::Result<()> {
    let eofblocks = xfs::FreeEofblocks::sync();
    // SAFETY: XFS reads one struct xfs_fs_eofblocks, which `eofblocks` is. Any other file system refuses.
    let _ = unsafe { ioctl::xfs_free_eofblocks(root.as_raw_fd(), &raw const eofblocks) };
    let mut range = FstrimRange {
        start: 0,
        len: u64::MAX,
        minlen: 0,
    };
    // SAFETY: FITRIM reads and writes one fstrim_range, which `range` is.
    unsafe { ioctl::fitrim(root.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

/// Gives all the space that a block device has mapped back to its pool: what it
/// held is lost.
///
/// # Errors
/// What the kernel says.
pub fn discard_all(device: &Path) -> io::Result<()> {
    let mut file = File::options().write(true).open(device)?;
    let range = [0, file.seek(SeekFrom::End(0))?];
    // SAFETY: BLKDISCARD reads two u64, an offset and a length in bytes.
    unsafe { ioctl::discard(file.as_raw_fd(), &raw const range) }?;
    Ok(())
}

/// Shuts the mounted file system down whose root is `root`: nothing is written to its device any more, not its log either, and
/// all that uses it gets EIO.
///
/// # Errors
/// What the kernel says.
pub fn shut_down(root: BorrowedFd<'_>) -> io::Result<()> {
    // XFS_FSOP_GOING_FLAGS_NOLOGFLUSH and EXT4_GOING_FLAGS_NOLOGFLUSH: what is flushed may need room.
    let no_log_flush = 2_u32;
    // SAFETY: both file systems read one u32.
    unsafe { ioctl::shut_down(root.as_raw_fd(), &raw const no_log_flush) }?;
    Ok(())
}

/// Whether the file system on the unmounted `device` was unmounted cleanly and
/// has no recorded error: its log needs no recovery. In doubt it is not clean.
///
/// # Errors
/// When it cannot be read, or holds no file system of this type.
pub fn is_clean(device: &Path, fs: FsType) -> io::Result<bool> {
    let file = open_uncached(device)?;
    let mut head = [0; 4096];
    file.read_exact_at(&mut head, 0)?;
    let foreign = || {
        let message = format!("{} holds no {fs:?}", device.display());
        io::Error::new(io::ErrorKind::InvalidData, message)
    };
    match fs {
        FsType::Xfs => xfs::Superblock::parse(&head)
            .ok_or_else(foreign)?
            .is_clean(&file),
        FsType::Ext4 => Ok(ext4::Superblock::parse(&head)
            .ok_or_else(foreign)?
            .is_clean()),
    }
}

/// What a checker may take. What it reads, a job may have written: by that it could make it take all memory, or for ever.
const CHECK: Bounds = Bounds {
    memory: 2 << 30,
    time: Duration::from_secs(600),
};

/// What `xfs_repair -n` says last, if it came to its end (repair/xfs_repair.c): it ends with 1 where it finds corruption,
/// but also where it lacks memory, or a thread.
const XFS_CHECKED: &str = "No modify flag set, skipping filesystem flush and exiting.";

/// Whether the file system on the unmounted `device` is whole, as its own checker
/// says. That reads all of its metadata, and writes nothing.
///
/// # Errors
/// When the checker is missing or could not do its work, as it would have taken too much memory or time, too.
pub fn is_whole(device: &Path, fs: FsType) -> Result<bool, ExecError> {
    check(device, fs, CHECK)
}

fn check(device: &Path, fs: FsType, bounds: Bounds) -> Result<bool, ExecError> {
    let (tool, options): (_, &[&str]) = match fs {
        FsType::Xfs => ("xfs_repair", &["-n"]),
        FsType::Ext4 => ("e2fsck", &["-f", "-n"]),
    };
    let arguments: Vec<_> = options
        .iter()
        .map(AsRef::as_ref)
        .chain([device.as_os_str()])
        .collect();
    let (status, stderr) = exec::run_bounded(tool, &arguments, bounds)?;
    let damaged = match (fs, status.code()) {
        (_, Some(0)) => return Ok(true),
        (FsType::Xfs, Some(1)) => stderr.contains(XFS_CHECKED),
        // e2fsck(8): 4 says that errors were left as they are, and may come with other bits. For want of memory it ends with 8
        // alone (e2fsck/util.c, fatal_error).
        (FsType::Ext4, Some(code)) => code & 4 != 0,
        _ => false,
    };
    if damaged {
        return Ok(false);
    }
    Err(ExecError::Failed {
        program: tool.to_owned(),
        args: arguments
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect(),
        status,
        stderr,
    })
}

/// Sectors (512 bytes) written to a block device since it appeared.
///
/// # Errors
/// What reading /sys/dev/block/MAJ:MIN/stat says.
pub fn sectors_written(device: (u32, u32)) -> io::Result<u64> {
    // Reads, merged reads, sectors read, ms; writes, merged writes, sectors
    // written, ms; …: Documentation/block/stat.rst.
    let stat = sys_block(device, "stat")?;
    number(stat.split_whitespace().nth(6).unwrap_or_default())
}

/// The path of a block device's node: devtmpfs has one of the kernel's own name for each.
///
/// # Errors
/// When there is no such device.
pub fn device_node(device: (u32, u32)) -> io::Result<PathBuf> {
    sys_block(device, "uevent")?
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .map(|name| Path::new("/dev").join(name))
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The kernel's own name of a block device: `dm-3`.
///
/// # Errors
/// When there is no such device.
pub fn kernel_name((major, minor): (u32, u32)) -> io::Result<String> {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"))?;
    let name = link.file_name().unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

fn sys_block((major, minor): (u32, u32), attribute: &str) -> io::Result<String> {
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{attribute}"))
}

fn number(text: &str) -> io::Result<u64> {
    text.trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Opens a device for reading, without what its page cache may still hold from
/// before it was mounted: XFS writes past that cache.
fn open_uncached(device: &Path) -> io::Result<File> {
    let file = File::open(device)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(file)
}

/// `struct fstrim_range`, linux/fs.h; all in bytes.
#[repr(C)]
struct FstrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
    // XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN, declared as ones that read.
    nix::ioctl_write_ptr_bad!(
        shut_down,
        nix::request_code_read!(b'X', 125, size_of::<u32>()),
        u32
    );
    nix::ioctl_readwrite!(fitrim, b'X', 121, super::FstrimRange);
    nix::ioctl_write_ptr!(ext4_resize_fs, b'f', 16, u64);
    nix::ioctl_write_ptr!(xfs_growfs_data, b'X', 110, super::xfs::GrowfsData);
    nix::ioctl_read!(xfs_fsgeometry_v1, b'X', 100, super::xfs::GeometryV1);
    nix::ioctl_write_ptr_bad!(
        xfs_free_eofblocks,
        // Declared as one that reads.
        nix::request_code_read!(b'X', 58, size_of::<super::xfs::FreeEofblocks>()),
        super::xfs::FreeEofblocks
    );
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

mod xfs {
    use super::*;

    /// Basic block: the unit of the log, in bytes.
    const BB: u64 = 512;
    /// Leads the header of a log record (`XLOG_HEADER_MAGIC_NUM`).
    const RECORD: u32 = 0xFEED_BABE;
    /// The flag of the operation that a clean unmount logs (`XLOG_UNMOUNT_TRANS`).
    const UNMOUNT: u8 = 0x20;
    /// Most bytes whose cycle numbers one block of a record's header holds.
    const HEADER_REACH: u32 = 32 << 10;
    /// Most blocks that an unmount record takes: a log stripe unit is at most
    /// 256 KiB, and so is what the header describes.
    const LONGEST: u64 = (256 << 10) / BB + 8;
    /// `XFS_SB_FEAT_INCOMPAT_NEEDSREPAIR`.
    const NEEDS_REPAIR: u32 = 1 << 4;

    /// `struct xfs_fs_eofblocks` of xfs_fs.h, for XFS_IOC_FREE_EOFBLOCKS: which ends with the inactivation
    /// of all removed files (`xfs_blockgc_free_space` in fs/xfs/xfs_icache.c).
    #[repr(C)]
    pub struct FreeEofblocks {
        version: u32,
        flags: u32,
        /// User, group and project that it is only for, and padding.
        unused: [u32; 4],
        min_file_size: u64,
        pad: [u64; 12],
    }

    impl FreeEofblocks {
        /// Of all files, and waited for (`XFS_EOF_FLAGS_SYNC`).
        pub const fn sync() -> Self {
            Self {
                version: 1,
                flags: 1,
                unused: [0; 4],
                min_file_size: 0,
                pad: [0; 12],
            }
        }
    }

    /// What is needed of `struct xfs_dsb`.
    pub struct Superblock {
        unfinished: bool,
        needs_repair: bool,
        /// Where the log begins on the device, in bytes; `None`: it is on another.
        log_start: Option<u64>,
        /// Length of the log, in basic blocks.
        log_blocks: u64,
    }

    impl Superblock {
        pub fn parse(head: &[u8]) -> Option<Self> {
            if head.len() < 512 || !head.starts_with(b"XFSB") {
                return None;
            }
            let block = u64::from(be32(head, 4));
            let log_start = be64(head, 48);
            // A block's address: the number of its allocation group, and its
            // number there in as many bits as the largest group needs.
            let ag_bits = head[124].min(63);
            let (ag, in_ag) = (log_start >> ag_bits, log_start & ((1 << ag_bits) - 1));
            let first = ag
                .checked_mul(u64::from(be32(head, 84)))?
                .checked_add(in_ag)?
                .checked_mul(block)?;
            let version5 = be16(head, 100) & 0xf == 5;
            Some(Self {
                unfinished: head[126] != 0,
                needs_repair: version5 && be32(head, 216) & NEEDS_REPAIR != 0,
                log_start: (log_start != 0).then_some(first),
                log_blocks: u64::from(be32(head, 96)) * block / BB,
            })
        }

        /// Whether the log ends in an unmount record: what the kernel's
        /// `xlog_find_tail` looks for. Each block of the log carries the number
        /// of the round it was written in, so the end is where it drops. After
        /// torn writes the kernel looks harder, but then never for an unmount.
        pub fn is_clean(&self, device: &File) -> io::Result<bool> {
            let Some(log_start) = self.log_start else {
                return Ok(false);
            };
            if self.unfinished || self.needs_repair || self.log_blocks < 2 {
                return Ok(false);
            }
            let blocks = self.log_blocks;
            let read = |number: u64| {
                let mut block = [0; BB as usize];
                device.read_exact_at(&mut block, log_start.saturating_add(number % blocks * BB))?;
                Ok::<_, io::Error>(block)
            };
            let cycle = |number| {
                let block = read(number)?;
                let header = be32(&block, 0) == RECORD;
                Ok::<_, io::Error>(be32(&block, if header { 4 } else { 0 }))
            };
            // Zero is the part that was never written yet.
            let (newest, oldest) = (cycle(0)?, cycle(blocks - 1)?);
            if newest == 0 {
                return Ok(false);
            }
            let mut head = blocks;
            if newest != oldest {
                let mut last_newer = 0;
                head = blocks - 1;
                while head - last_newer > 1 {
                    let middle = last_newer.midpoint(head);
                    if cycle(middle)? == oldest {
                        head = middle;
                    } else {
                        last_newer = middle;
                    }
                }
            }
            for length in 2..=LONGEST.min(blocks) {
                let start = head + blocks - length;
                let record = read(start)?;
                if be32(&record, 0) == RECORD {
                    let version = be32(&record, 8);
                    let size = be32(&record, 320);
                    let header_blocks = if version & 2 != 0 && size > HEADER_REACH {
                        u64::from(size.div_ceil(HEADER_REACH))
                    } else {
                        1
                    };
                    let data_blocks = u64::from(be32(&record, 12)).div_ceil(BB);
                    let operations = be32(&record, 40);
                    return Ok(header_blocks + data_blocks == length
                        && operations == 1
                        && read(start + header_blocks)?[9] & UNMOUNT != 0);
                }
            }
            Ok(false)
        }
    }

    pub fn grow(root: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
        let mut geometry = GeometryV1::default();
        // SAFETY: XFS_IOC_FSGEOMETRY_V1 writes one xfs_fsop_geom_v1.
        unsafe { ioctl::xfs_fsgeometry_v1(root.as_raw_fd(), &raw mut geometry) }?;
        let wanted = GrowfsData {
            newblocks: bytes / u64::from(geometry.blocksize),
            imaxpct: geometry.imaxpct,
        };
        if wanted.newblocks > geometry.datablocks {
            // SAFETY: XFS_IOC_FSGROWFSDATA reads one xfs_growfs_data.
            unsafe { ioctl::xfs_growfs_data(root.as_raw_fd(), &raw const wanted) }?;
        }
        Ok(())
    }

    /// `struct xfs_growfs_data`.
    #[repr(C)]
    pub struct GrowfsData {
        /// In file system blocks.
        newblocks: u64,
        imaxpct: u32,
    }

    /// `struct xfs_fsop_geom_v1`.
    #[repr(C)]
    #[derive(Default)]
    pub struct GeometryV1 {
        blocksize: u32,
        unused1: [u32; 6],
        imaxpct: u32,
        /// In file system blocks.
        datablocks: u64,
        unused2: [u64; 5],
        unused3: [u32; 7],
    }
}

mod ext4 {
    use super::*;

    /// Where the superblock begins on the device, in bytes.
    const AT: usize = 1024;
    const MAGIC: u16 = 0xEF53;
    /// `EXT4_VALID_FS`, `EXT4_ERROR_FS` and `EXT4_ORPHAN_FS` of `s_state`.
    const VALID: u16 = 1;
    const ERROR: u16 = 2;
    const ORPHANS: u16 = 4;
    /// `EXT4_FEATURE_INCOMPAT_RECOVER`: the journal holds what is not in place.
    const RECOVER: u32 = 4;
    /// `EXT4_FEATURE_INCOMPAT_JOURNAL_DEV`: no file system, a journal of one.
    const JOURNAL_DEVICE: u32 = 8;
    /// `EXT4_FEATURE_RO_COMPAT_ORPHAN_PRESENT`.
    const ORPHAN_PRESENT: u32 = 0x10000;

    /// What is needed of `struct ext4_super_block`.
    pub struct Superblock {
        state: u16,
        incompatible: u32,
        read_only_compatible: u32,
        last_orphan: u32,
        /// Size of a block, in bytes.
        block: u64,
        /// Size of the file system, in blocks.
        blocks: u64,
    }

    impl Superblock {
        pub fn parse(head: &[u8]) -> Option<Self> {
            let superblock = head.get(AT..AT + 1024)?;
            let le16 = |at: usize| u16::from_le_bytes([superblock[at], superblock[at + 1]]);
            let le32 = |at: usize| u32::from(le16(at)) | u32::from(le16(at + 2)) << 16;
            (le16(0x38) == MAGIC).then(|| Self {
                state: le16(0x3a),
                incompatible: le32(0x60),
                read_only_compatible: le32(0x64),
                last_orphan: le32(0xe8),
                block: 1024 << le32(0x18).min(6),
                blocks: u64::from(le32(0x150)) << 32 | u64::from(le32(0x04)),
            })
        }

        pub fn mountable(&self) -> bool {
            self.incompatible & JOURNAL_DEVICE == 0
        }

        pub fn is_clean(&self) -> bool {
            self.state & (VALID | ERROR | ORPHANS) == VALID
                && self.incompatible & RECOVER == 0
                && self.read_only_compatible & ORPHAN_PRESENT == 0
                && self.last_orphan == 0
        }
    }

    /// The ioctl flushes the journal even where there is nothing to do, so what
    /// the file system has is looked up first. The kernel keeps its superblock
    /// in the device's page cache, where reading the device finds it.
    pub fn grow(root: BorrowedFd<'_>, device: (u32, u32), bytes: u64) -> io::Result<()> {
        let mut head = [0; 4096];
        File::open(device_node(device)?)?.read_exact_at(&mut head, 0)?;
        let superblock = Superblock::parse(&head).ok_or(Errno::UCLEAN)?;
        let wanted = bytes / superblock.block;
        if wanted > superblock.blocks {
            // SAFETY: EXT4_IOC_RESIZE_FS reads one 64-bit number of blocks.
            unsafe { ioctl::ext4_resize_fs(root.as_raw_fd(), &raw const wanted) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_lacks_what_it_takes_finds_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str| {
            let path = dir.path().join(name);
            File::create(&path).unwrap().set_len(400 << 20).unwrap();
            path
        };
        let scarce = Bounds {
            memory: 20 << 20,
            // Without a thread that it could not make, xfs_repair may wait for ever.
            time: Duration::from_secs(1),
        };
        for fs in [FsType::Xfs, FsType::Ext4] {
            let path = image("image");
            make(&path, fs).unwrap();
            assert!(is_whole(&path, fs).unwrap(), "{fs:?}");
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[0x5a; 64 << 10], 32 << 10).unwrap();
            assert!(!is_whole(&path, fs).unwrap(), "{fs:?}");
            if fs == FsType::Xfs {
                let checked = check(&path, fs, scarce);
                assert!(checked.is_err(), "{checked:?}");
            }
        }
    }
}
