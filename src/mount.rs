// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounts: detached ones, moving them into place, and the kernel's mount table.
//!
//! A file system is mounted through the descriptor-based calls (`fsopen`,
//! `fsmount`, `move_mount`, Linux 5.2), because only those make a mount that is
//! attached nowhere: it can be made ahead of its use, costs one call to move
//! into place, and goes by itself when the process that holds it dies.
//!
//! No mount option asks for online discard. With it, each deleted extent is
//! discarded by itself, and a thin pool drops what does not cover a whole chunk
//! (64 KiB and more). [`fs::trim`] finds whole free ranges, once, off everyone's
//! path: of 2,409 chunks' worth of deleted files of 0.5 to 200 KB, it gave back
//! all, online discard 66 % (XFS on a thin volume, Linux 6.1, one run).
//!
//! Under SELinux every file system is mounted with one label for all that is in it:
//! `selinux`. A file system that is mounted already keeps the label that it has, and the
//! kernel refuses one more mount of it that says another.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::cache::spec::FsType;
use crate::cache::units::Bytes;
use crate::fs::{self, Content};
use crate::selinux;
use crate::userns::Ids;

/// What every mount gets. `noatime`, because reading a cache must not write to
/// it: a lease that only read is told by its device's written sectors.
const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOATIME);

/// The flag of mount_setattr(2) for an idmapped mount, and its argument: struct mount_attr of <linux/mount.h>.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// A file system could not be mounted.
#[derive(Debug, thiserror::Error)]
#[error("{what} cannot be mounted: {source}{}", said(messages))]
pub struct MountError {
    /// The device, and as which file system.
    what: String,
    /// What the system call said: its raw OS error is the kernel's.
    pub source: io::Error,
    /// The kernel's explanations, where it gave any: the log of the fs context.
    pub messages: Vec<String>,
    /// It is the content that is damaged, on a device that can be read: another
    /// volume of the same store may well mount. Unset for I/O errors, a lack of
    /// memory, a device in use, a feature that this kernel does not know.
    pub damaged: bool,
}

impl From<MountError> for io::Error {
    fn from(error: MountError) -> Self {
        Self::new(error.source.kind(), error)
    }
}

fn said(messages: &[String]) -> String {
    if messages.is_empty() {
        String::new()
    } else {
        format!(" ({})", messages.join("; "))
    }
}

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
    /// Mounts `device`, attached nowhere: `nosuid,nodev,noatime`, `nouuid` for
    /// XFS (two snapshots of one origin share a UUID), `noinit_itable` for ext4
    /// (else each snapshot of a young file system zeroes all its inode tables
    /// again, behind everyone's back). A device that is mounted already gives
    /// one more mount of the same file system.
    ///
    /// # Errors
    /// What the kernel says, with the messages of the fs context.
    pub fn device(device: &Path, fs: FsType) -> Result<Self, MountError> {
        let (name, flag) = match fs {
            FsType::Xfs => ("xfs", "nouuid"),
            FsType::Ext4 => ("ext4", "noinit_itable"),
        };
        let attempt = |label: Option<&str>| {
            let mut options = vec![(flag, None)];
            options.extend(label.map(|label| ("context", Some(label))));
            Context::open(name)
                .and_then(|context| context.mount(&device.to_string_lossy(), &options))
        };
        let label = selinux::mount_label().map(selinux::Label::as_str);
        attempt(label)
            .or_else(|refusal| {
                // Mounted by an earlier version, or when the configuration said another label.
                let theirs = (refusal.0.raw_os_error() == Some(libc::EINVAL))
                    .then(|| shown_label(device))
                    .flatten()
                    .filter(|theirs| theirs.as_deref() != label);
                match theirs {
                    Some(theirs) => attempt(theirs.as_deref()),
                    None => Err(refusal),
                }
            })
            .map_err(|(source, messages)| MountError {
                damaged: damaged(&source, device, fs),
                what: format!("{} as {name}", device.display()),
                source,
                messages,
            })
    }

    /// An empty directory in memory, of at most `size` bytes; `source` is the
    /// name shown in the mount table.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn scratch(size: Bytes, source: &str) -> io::Result<Self> {
        // A file takes a page at least, so this bounds only empty ones.
        let inodes = (size.0 / 4096 + 64).to_string();
        let size = size.0.to_string();
        let mut options = vec![
            ("size", Some(size.as_str())),
            ("nr_inodes", Some(inodes.as_str())),
            ("mode", Some("0755")),
        ];
        options.extend(selinux::mount_label().map(|label| ("context", Some(label.as_str()))));
        Context::open("tmpfs")
            .and_then(|context| context.mount(source, &options))
            .map_err(|(source, _messages)| source)
    }

    /// Shows files as if a process with `ids` had made them: what is on the device belongs
    /// to users of that namespace. Once, before the mount is attached anywhere.
    ///
    /// # Errors
    /// EINVAL where the kernel cannot do it for this file system, or what else it says.
    pub fn map_ids(&self, ids: &Ids) -> io::Result<()> {
        let namespace = ids.namespace()?;
        let attributes = MountAttributes {
            set: MOUNT_ATTR_IDMAP,
            userns: u64::try_from(namespace.as_raw_fd()).expect("a descriptor"),
            ..MountAttributes::default()
        };
        self.set_attributes(&attributes)
    }

    /// Lets nothing be written through this mount, and what is mounted in others of the same
    /// directory not show in it. Before the mount is attached anywhere.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn make_read_only(&self) -> io::Result<()> {
        self.set_attributes(&MountAttributes {
            set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()),
            propagation: u64::from(MountPropagationFlags::PRIVATE.bits()),
            ..MountAttributes::default()
        })
    }

    /// Has what is mounted below it later show in containers that follow it, whatever it is attached below: a program of root's
    /// may have made all of this host's mounts private, as mmdebstrap 1.5 does. Before it is attached anywhere.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn make_shared(&self) -> io::Result<()> {
        self.set_attributes(&MountAttributes {
            propagation: u64::from(MountPropagationFlags::SHARED.bits()),
            ..MountAttributes::default()
        })
    }

    fn set_attributes(&self, attributes: &MountAttributes) -> io::Result<()> {
        // SAFETY: the path is an empty C string, and the structure as long as is said.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                std::ptr::from_ref(attributes),
                size_of::<MountAttributes>(),
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Holds on to a mount that is attached at `at` already: after a restart.
    ///
    /// # Errors
    /// EINVAL when `at` is no mount point, or what else the kernel says.
    pub fn attached(at: &Path) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
        let place = rustix::mount::open_tree(CWD, at, flags)?;
        // The clone of a plain directory would be one of the mount it lies on.
        let stat = rustix::fs::statx(&place, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
        if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(Errno::INVAL.into());
        }
        Self::clone_of(place.as_fd())
    }

    /// Holds on to a mount that is attached at `at`, so that what is mounted below its
    /// root shows there: no copy, unlike [`Mounted::attached`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn in_place(at: &Path) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
        Ok(Self::hold(rustix::mount::open_tree(CWD, at, flags)?)?)
    }

    /// Holds on to the mount whose root `place` is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clone_of(place: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::AT_EMPTY_PATH;
        Ok(Self::hold(rustix::mount::open_tree(place, "", flags)?)?)
    }

    /// The mount itself, to be taken away by once it is attached.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn mount_fd(&self) -> io::Result<OwnedFd> {
        self.mount.try_clone()
    }

    fn hold(mount: OwnedFd) -> rustix::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&mount, ".", flags, Mode::empty())?;
        Ok(Self { mount, root })
    }

    /// Moves the mount to `at`, an existing directory: one move_mount(2). A
    /// symbolic link there is not followed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&self, at: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(&self.mount, "", CWD, at, flags)?)
    }

    /// Moves the mount onto the directory that `place` has open.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach_upon(&self, place: BorrowedFd<'_>) -> io::Result<()> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(rustix::mount::move_mount(
            &self.mount,
            "",
            place,
            "",
            flags,
        )?)
    }

    /// Writes everything to the device.
    ///
    /// # Errors
    /// A write-back error since this mount was taken hold of, or before that if
    /// nobody was told of it, and EIO once the file system has shut down: XFS
    /// says so from Linux 5.17 on (`xfs_fs_sync_fs`), ext4 only in newer ones
    /// (not yet in 6.1; there [`fs::is_clean`] after the unmount tells).
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.root)?)
    }

    /// How much of the file system is in use, its own structures included.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn used(&self) -> io::Result<Bytes> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(Bytes((stat.f_blocks - stat.f_bfree) * stat.f_frsize))
    }

    /// Its root directory.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The device number `(major, minor)` of the file system.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn device_number(&self) -> io::Result<(u32, u32)> {
        let device = rustix::fs::fstat(&self.root)?.st_dev;
        Ok((rustix::fs::major(device), rustix::fs::minor(device)))
    }
}

/// What went wrong, and the kernel's explanations.
type Refusal = (io::Error, Vec<String>);

/// A file system being configured: fsopen(2).
struct Context(File);

impl Context {
    fn open(fs: &str) -> Result<Self, Refusal> {
        match rustix::mount::fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => Ok(Self(File::from(fd))),
            Err(Errno::NODEV) => {
                let message = format!("this kernel has no {fs}, nor a module for it");
                Err((Errno::NODEV.into(), vec![message]))
            }
            Err(error) => Err((error.into(), Vec::new())),
        }
    }

    fn mount(self, source: &str, options: &[(&str, Option<&str>)]) -> Result<Mounted, Refusal> {
        let attempt = || {
            rustix::mount::fsconfig_set_string(&self.0, "source", source)?;
            for &(key, value) in options {
                match value {
                    Some(value) => rustix::mount::fsconfig_set_string(&self.0, key, value)?,
                    None => rustix::mount::fsconfig_set_flag(&self.0, key)?,
                }
            }
            rustix::mount::fsconfig_create(&self.0)?;
            let flags = FsMountFlags::FSMOUNT_CLOEXEC;
            Mounted::hold(rustix::mount::fsmount(&self.0, flags, ATTRIBUTES)?)
        };
        attempt().map_err(|error| (error.into(), self.messages()))
    }

    /// Each read gives one message, led by its level (`e`, `w` or `i`) and a
    /// space; ENODATA says that there are no more.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = (&self.0).read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]);
            let text = text.split_once(' ').map_or(&*text, |(_level, rest)| rest);
            messages.push(text.trim_end().to_owned());
        }
        messages
    }
}

/// Whether a mount failed for what the device holds. EUCLEAN and EBADMSG are
/// XFS's and ext4's EFSCORRUPTED and EFSBADCRC. EINVAL is a lost magic number,
/// but also a feature that this kernel lacks.
fn damaged(error: &io::Error, device: &Path, fs: FsType) -> bool {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::UCLEAN | Errno::BADMSG) => true,
        Some(Errno::INVAL) => fs::probe(device).is_ok_and(|found| found != Content::Fs(fs)),
        _ => false,
    }
}

/// The label that the file system on `device` is mounted with where the mount table shows it; `None`: it
/// shows no mount of it.
fn shown_label(device: &Path) -> Option<Option<String>> {
    let number = rustix::fs::stat(device).ok()?.st_rdev;
    let number = (rustix::fs::major(number), rustix::fs::minor(number));
    let shown = table().ok()?.into_iter().find(|m| m.device == number)?;
    Some(shown.label)
}

/// Takes all mounts at `at` out of sight, from the topmost one down, in use or not.
///
/// # Errors
/// What the kernel says.
pub fn detach_all(at: &Path) -> io::Result<()> {
    while detach(at)? {}
    Ok(())
}

/// Takes the mounts at `at` out of sight that lie upon the lowest one.
///
/// # Errors
/// What the kernel says.
pub fn uncover(at: &Path) -> io::Result<()> {
    // The table and not a descriptor: umount(2) takes the topmost mount, whichever of them it is shown.
    let there = table()?.into_iter().filter(|m| m.at == at).count();
    for _ in 1..there {
        detach(at)?;
    }
    Ok(())
}

/// Takes the mount at `at` out of sight, also while it is in use (the topmost one,
/// where several are stacked). `false`: nothing was mounted there.
///
/// # Errors
/// What the kernel says.
pub fn detach(at: &Path) -> io::Result<bool> {
    match rustix::mount::unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// [`detach`] for a path that is a link to a descriptor (below /proc/self/fd): the very mount that it
/// was opened in, wherever that is by now.
///
/// # Errors
/// What the kernel says.
pub fn detach_following(link: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(link, UnmountFlags::DETACH)?)
}

/// The number, in the mount table, of the mount that `fd` was opened in.
///
/// # Errors
/// What the kernel says.
pub fn id_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// As which file system the block device `name` (`loop7`, `dm-3`) is mounted, in whatever namespace, attached
/// there or not. Unlike an exclusive open, looking disturbs no one.
#[must_use]
pub fn mounted_as(name: &str) -> Option<FsType> {
    let mounted = |fs: &str| Path::new("/sys/fs").join(fs).join(name).exists();
    if mounted("xfs") {
        Some(FsType::Xfs)
    } else if mounted("ext4") {
        Some(FsType::Ext4)
    } else {
        None
    }
}

/// Whether a file system on `device` is still mounted, in any namespace, or
/// somebody else has it for themselves.
///
/// It is told by taking the device for oneself for a moment: a mount of it that
/// is attempted in that moment fails with EBUSY. After the last close it can stay
/// in use for a moment still: a child that another thread is just starting has
/// copies of all descriptors until its exec.
///
/// # Errors
/// What opening the device says.
pub fn in_use(device: &Path) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::open(device, flags, Mode::empty()) {
        Ok(_) => Ok(false),
        Err(Errno::BUSY) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// How much is read of a mount table that is looked through for a device, in bytes: some thousand mounts. What is beyond it a
/// process has put there for itself.
const TABLE_CAP: u64 = 1 << 20;

/// Processes that have the device `(major, minor)` mounted in another place than `at` or below it, one of each mount namespace:
/// those of containers that were given what is mounted at `at`. There itself it shows in any namespace that follows the host's.
///
/// # Errors
/// What listing /proc says.
pub fn users(device: (u32, u32), at: &Path) -> io::Result<Vec<u32>> {
    let mut seen = HashSet::new();
    let mut users = Vec::new();
    let root_of = |process: &Path| {
        let root = rustix::fs::stat(process.join("root")).ok()?;
        Some((root.st_dev, root.st_ino))
    };
    let own_root = root_of(Path::new("/proc/self"));
    for process in std::fs::read_dir("/proc")? {
        let process = process?;
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // One that has just ended is no user.
        let Ok(namespace) = std::fs::read_link(process.path().join("ns/mnt")) else {
            continue;
        };
        if !seen.insert(namespace) {
            continue;
        }
        let Ok(table) = table_in(&process.path().join("mountinfo"), TABLE_CAP) else {
            continue;
        };
        let mut mounts = table.iter().filter(|m| m.device == device);
        // A path in a container is another place, whatever it is.
        if mounts.any(|m| !m.at.starts_with(at) || root_of(&process.path()) != own_root) {
            users.push(pid);
        }
    }
    Ok(users)
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// The mount's number in this boot; numbers are used again.
    pub id: u64,
    /// Which part of the file system, as a path in it.
    pub root: PathBuf,
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
    /// Whether mounts below it come from another namespace (`master:`).
    pub follows: bool,
    /// SELinux's one label for all that is in it (`context=`).
    pub label: Option<String>,
}

/// This thread's mount table, in the order in which the kernel lists it: of
/// several mounts at one place the last is the visible one.
///
/// # Errors
/// What reading /proc/thread-self/mountinfo says.
pub fn table() -> io::Result<Vec<MountPoint>> {
    table_in(Path::new("/proc/thread-self/mountinfo"), u64::MAX)
}

/// The mount table in `file`, another process's, as far as its first `most` bytes go: a process that may mount can make it as
/// long as it likes.
///
/// # Errors
/// What reading it says.
pub fn table_in(file: &Path, most: u64) -> io::Result<Vec<MountPoint>> {
    let mut text = Vec::new();
    File::open(file)?.take(most).read_to_end(&mut text)?;
    // The last line may be half of one.
    let whole = text.iter().rposition(|&byte| byte == b'\n');
    text.truncate(whole.map_or(0, |end| end + 1));
    // Paths need not be UTF-8. Ours are; others only must not be an error.
    parse_table(&String::from_utf8_lossy(&text)).ok_or_else(|| {
        let problem = format!("{}: a line that cannot be read", file.display());
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })
}

/// Parses a mount table: see proc_pid_mountinfo(5).
fn parse_table(text: &str) -> Option<Vec<MountPoint>> {
    text.lines().map(parse_mount_point).collect()
}

fn parse_mount_point(line: &str) -> Option<MountPoint> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let (_parent, device) = (fields.next()?, fields.next()?);
    let root = unescape(fields.next()?);
    let (major, minor) = device.split_once(':')?;
    let at = unescape(fields.next()?);
    let _options = fields.next()?;
    let (mut shared, mut follows) = (false, false);
    // Any number of optional fields, up to a lone hyphen.
    loop {
        match fields.next()? {
            "-" => break,
            field => {
                shared |= field.starts_with("shared:");
                follows |= field.starts_with("master:");
            }
        }
    }
    Some(MountPoint {
        id,
        root: root.into(),
        at: at.into(),
        device: (major.parse().ok()?, minor.parse().ok()?),
        fs: unescape(fields.next()?).to_string_lossy().into_owned(),
        source: unescape(fields.next()?).to_string_lossy().into_owned(),
        shared,
        follows,
        label: fields.next().and_then(label_in),
    })
}

/// The label in the options of a file system: in quotes where it has a comma (`show_sid` of
/// security/selinux/hooks.c).
fn label_in(options: &str) -> Option<String> {
    let options = unescape(options).into_string().ok()?;
    let mut rest = options.as_str();
    loop {
        let value = rest.strip_prefix("context=");
        let quoted = value.and_then(|value| value.strip_prefix('"'));
        if let Some(quoted) = quoted {
            return Some(quoted.split_once('"')?.0.to_owned());
        } else if let Some(value) = value {
            return Some(value.split(',').next()?.to_owned());
        }
        rest = rest.split_once(',')?.1;
    }
}

/// Undoes the kernel's escapes: a backslash and three octal digits.
fn unescape(field: &str) -> OsString {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| field.get(at + 1..at + 4))
            .flatten()
            .filter(|digits| digits.bytes().all(|b| matches!(b, b'0'..=b'7')))
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    OsString::from_vec(out)
}

/// Makes `dir` (mode 0755, with its parents) and sees that it lies on a shared
/// mount, which it becomes itself (bound onto itself) where it does not.
///
/// # Errors
/// What the kernel says.
pub fn ensure_shared(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)?;
    let stat = rustix::fs::statx(CWD, dir, AtFlags::empty(), StatxFlags::MNT_ID)?;
    let mounts = table()?;
    if mounts
        .iter()
        .any(|mount| mount.id == stat.stx_mnt_id && mount.shared)
    {
        return Ok(());
    }
    // Killed between the two calls, it is a mount point the next time.
    if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        rustix::mount::mount_bind_recursive(dir, dir)?;
    }
    Ok(rustix::mount::mount_change(
        dir,
        MountPropagationFlags::SHARED,
    )?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mount_point(id: u64, at: &str, device: (u32, u32), fs: &str, source: &str) -> MountPoint {
        MountPoint {
            id,
            root: "/".into(),
            at: at.into(),
            device,
            fs: fs.into(),
            source: source.into(),
            shared: false,
            follows: false,
            label: None,
        }
    }

    #[test]
    fn mount_table() {
        let shared = |mount| MountPoint {
            shared: true,
            ..mount
        };
        for (line, want) in [
            (
                "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
                Some(MountPoint {
                    root: "/mnt1".into(),
                    follows: true,
                    ..mount_point(36, "/mnt2", (98, 0), "ext3", "/dev/root")
                }),
            ),
            (
                "22 1 254:0 / / rw - ext4 /dev/vda rw",
                Some(mount_point(22, "/", (254, 0), "ext4", "/dev/vda")),
            ),
            (
                "41 22 0:31 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=1024k",
                Some(shared(mount_point(41, "/run", (0, 31), "tmpfs", "tmpfs"))),
            ),
            (
                "41 22 0:31 / /run rw master:3 propagate_from:2 shared:5 unbindable new:7 - tmpfs t rw",
                Some(MountPoint {
                    follows: true,
                    ..shared(mount_point(41, "/run", (0, 31), "tmpfs", "t"))
                }),
            ),
            (
                r"7 1 7:3 / /a\040b\134c\011d\012e rw - fuse.x\043y /dev/with\040space rw",
                Some(mount_point(
                    7,
                    "/a b\\c\td\ne",
                    (7, 3),
                    "fuse.x#y",
                    "/dev/with space",
                )),
            ),
            // No escape of the kernel's: left as it is.
            (
                r"7 1 7:3 / /a\9 rw - x s rw",
                Some(mount_point(7, r"/a\9", (7, 3), "x", "s")),
            ),
            (
                r"7 1 7:3 / /a\777 rw - x s rw",
                Some(mount_point(7, r"/a\777", (7, 3), "x", "s")),
            ),
            (
                r"7 1 7:3 / /a\é rw - x s rw",
                Some(mount_point(7, r"/a\é", (7, 3), "x", "s")),
            ),
            (
                "7 1 0:3 / /x rw - tmpfs t rw,context=u:r:t:s0,size=4k",
                Some(MountPoint {
                    label: Some("u:r:t:s0".into()),
                    ..mount_point(7, "/x", (0, 3), "tmpfs", "t")
                }),
            ),
            (
                "7 1 0:3 / /x rw - tmpfs t rw,fscontext=a:b:c,context=\"u:r:t:s0:c1,c2\",size=4k",
                Some(MountPoint {
                    label: Some("u:r:t:s0:c1,c2".into()),
                    ..mount_point(7, "/x", (0, 3), "tmpfs", "t")
                }),
            ),
            // A source may be empty.
            (
                "7 1 0:3 / /x rw - tmpfs  rw",
                Some(mount_point(7, "/x", (0, 3), "tmpfs", "")),
            ),
            ("", None),
            ("7 1 0:3 / /x rw shared:1", None),
            ("7 1 03 / /x rw - tmpfs t rw", None),
            ("x 1 0:3 / /x rw - tmpfs t rw", None),
        ] {
            assert_eq!(parse_mount_point(line), want, "{line:?}");
        }
    }

    #[test]
    fn own_mount_table() {
        let mounts = table().unwrap();
        let root = rustix::fs::statx(CWD, "/", AtFlags::empty(), StatxFlags::MNT_ID).unwrap();
        let line = mounts.iter().find(|mount| mount.id == root.stx_mnt_id);
        assert_eq!(line.unwrap().at, Path::new("/"));
    }

    proptest! {
        #[test]
        fn any_line_is_read_or_refused(line in ".{0,80}") {
            let _ = parse_mount_point(&line);
        }

        #[test]
        fn places_come_back(at in "/[ \t\n\\\\#a-zé]{0,40}") {
            let escaped: String = at
                .chars()
                .map(|c| match c {
                    ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", c as u32),
                    c => c.to_string(),
                })
                .collect();
            let line = format!("7 1 0:3 / {escaped} rw - tmpfs t rw");
            prop_assert_eq!(parse_mount_point(&line), Some(mount_point(7, &at, (0, 3), "tmpfs", "t")));
        }
    }
}
