// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounts and file systems, on loop devices of this machine's own kernel.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lvm_cache_friend::cache::spec::{FsType, Owner};
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::fs::{
    Content, discard_all, dress, grow, is_clean, make, probe, sectors_written, trim,
};
use lvm_cache_friend::mount::{MountPoint, Mounted, detach, ensure_shared, in_use, table};
use tempfile::TempDir;

use crate::harness::{Group, Test, Tier, test};
use crate::support::command::run;
use crate::support::disks::{LoopDevice, statvfs};

/// All of them.
pub fn tests() -> Vec<Test> {
    type Body = (&'static str, fn(FsType));
    let both: [Body; 12] = [
        ("detached", detached),
        ("attached_and_detached", attached_and_detached),
        ("taken_hold_of_again", taken_hold_of_again),
        ("dies_with_its_holder", dies_with_its_holder),
        ("shut_down", shut_down),
        ("refused", refused),
        ("two_of_one_origin", two_of_one_origin),
        ("one_device_twice", one_device_twice),
        ("grows", grows),
        ("dressed", dressed),
        ("clean_or_not", clean_or_not),
        ("trimmed", trimmed),
    ];
    let mut tests: Vec<_> = both
        .into_iter()
        .flat_map(|(name, body)| [(name, body, FsType::Xfs), (name, body, FsType::Ext4)])
        .map(|(name, body, fs)| {
            let tier = match (name, fs) {
                // Growing a mounted ext4 takes CAP_SYS_RESOURCE, which root has not everywhere.
                ("grows", FsType::Ext4) => Tier::Guest(Group::Lvm),
                _ => Tier::Reflink,
            };
            test(tier, format!("mounts::{name}::{fs:?}"), move || body(fs))
        })
        .collect();
    let single: [(&str, fn()); 5] = [
        ("contents", contents),
        ("discarded", discarded),
        ("scratch", scratch),
        ("shared", shared),
        ("clean_as_xfs_logprint_says", clean_as_xfs_logprint_says),
    ];
    tests.extend(single.map(|(name, body)| test(Tier::Reflink, format!("mounts::{name}"), body)));
    tests
}

fn formatted(fs: FsType) -> LoopDevice {
    let disk = LoopDevice::new(Bytes::mib(320));
    make(&disk.device, fs).unwrap();
    disk
}

/// Waits until nothing has the device: a child that another thread of this
/// program is just starting holds copies of all descriptors until its exec.
fn unused(disk: &LoopDevice) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while in_use(&disk.device).unwrap() {
        assert!(Instant::now() < deadline, "still in use after 30 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A path to what a mount shows, whether it is attached or not.
fn inside(mounted: &Mounted, name: &str) -> std::path::PathBuf {
    format!("/proc/self/fd/{}/{name}", mounted.root().as_raw_fd()).into()
}

fn visible_at(at: &Path) -> Option<MountPoint> {
    table().unwrap().into_iter().rfind(|mount| mount.at == at)
}

fn detached(fs: FsType) {
    let disk = formatted(fs);
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    assert!(in_use(&disk.device).unwrap());
    let device = mounted.device_number().unwrap();
    assert!(table().unwrap().iter().all(|mount| mount.device != device));
    let before = sectors_written(device).unwrap();
    fs::write(inside(&mounted, "file"), vec![7; 1 << 20]).unwrap();
    mounted.sync().unwrap();
    let written = sectors_written(device).unwrap() - before;
    assert!(written >= 2048, "{written} sectors for 1 MiB");
    drop(mounted);
    unused(&disk);
    assert!(is_clean(&disk.device, fs).unwrap());
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    assert_eq!(
        fs::read(inside(&mounted, "file")).unwrap(),
        vec![7; 1 << 20]
    );
}

fn attached_and_detached(fs: FsType) {
    let disk = formatted(fs);
    let at = TempDir::new().unwrap();
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    mounted.attach(at.path()).unwrap();
    fs::write(at.path().join("file"), "text").unwrap();
    let seen = visible_at(at.path()).unwrap();
    assert_eq!(seen.device, mounted.device_number().unwrap());
    assert_eq!(seen.source, disk.device.to_str().unwrap());
    assert_eq!(seen.fs, format!("{fs:?}").to_lowercase());
    use nix::sys::statvfs::FsFlags;
    let wanted = FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOATIME;
    let flags = statvfs(at.path()).unwrap().flags();
    assert!(flags.contains(wanted), "{flags:?}");
    assert!(!flags.contains(FsFlags::ST_RDONLY));

    assert!(detach(at.path()).unwrap());
    assert!(visible_at(at.path()).is_none());
    assert!(!at.path().join("file").exists());
    assert!(!detach(at.path()).unwrap());
    assert!(!detach(&at.path().join("none")).unwrap());
    // Held, so still mounted, and everything in it can be reached.
    assert!(in_use(&disk.device).unwrap());
    assert_eq!(fs::read(inside(&mounted, "file")).unwrap(), b"text");
    mounted.sync().unwrap();
    drop(mounted);
    unused(&disk);
    assert!(is_clean(&disk.device, fs).unwrap());
}

fn taken_hold_of_again(fs: FsType) {
    let disk = formatted(fs);
    let at = TempDir::new().unwrap();
    let error = Mounted::attached(at.path()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    mounted.attach(at.path()).unwrap();
    drop(mounted);
    assert!(visible_at(at.path()).is_some());
    let again = Mounted::attached(at.path()).unwrap();
    fs::write(at.path().join("file"), "text").unwrap();
    assert!(detach(at.path()).unwrap());
    again.sync().unwrap();
    assert!(in_use(&disk.device).unwrap());
    assert_eq!(fs::read(inside(&again, "file")).unwrap(), b"text");
    drop(again);
    unused(&disk);
}

fn dies_with_its_holder(fs: FsType) {
    let disk = formatted(fs);
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    let mut holder = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::from(mounted.root().try_clone_to_owned().unwrap()))
        .spawn()
        .unwrap();
    drop(mounted);
    assert!(in_use(&disk.device).unwrap());
    holder.kill().unwrap();
    holder.wait().unwrap();
    unused(&disk);
}

mod ioctl {
    // XFS_IOC_GOINGDOWN, which ext4 has as EXT4_IOC_SHUTDOWN.
    nix::ioctl_read!(going_down, b'X', 125, u32);
}

/// Makes the file system stop at once, as an I/O error in its log does.
pub fn shut_down_now(mounted: &Mounted) {
    let mut without_flushing_the_log = 2;
    // SAFETY: the ioctl reads one 32-bit flag.
    unsafe {
        ioctl::going_down(
            mounted.root().as_raw_fd(),
            &raw mut without_flushing_the_log,
        )
    }
    .unwrap();
}

fn shut_down(fs: FsType) {
    let disk = formatted(fs);
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    fs::write(inside(&mounted, "file"), "text").unwrap();
    mounted.sync().unwrap();
    fs::write(inside(&mounted, "lost"), "text").unwrap();
    shut_down_now(&mounted);
    if fs == FsType::Xfs {
        let error = mounted.sync().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    drop(mounted);
    unused(&disk);
    assert!(!is_clean(&disk.device, fs).unwrap());
    // The next mount recovers it.
    drop(Mounted::device(&disk.device, fs).unwrap());
    unused(&disk);
    assert!(is_clean(&disk.device, fs).unwrap());
}

fn refused(fs: FsType) {
    let error = Mounted::device(Path::new("/dev/does-not-exist"), fs).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::ENOENT));
    assert!(!error.damaged);
    let text = error.to_string();
    assert!(text.contains("/dev/does-not-exist"), "{text}");

    let disk = LoopDevice::new(Bytes::mib(320));
    let error = Mounted::device(&disk.device, fs).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EINVAL));
    assert!(error.damaged);
    assert!(is_clean(&disk.device, fs).is_err());

    // One byte of the superblock that its checksum covers, and nothing else.
    make(&disk.device, fs).unwrap();
    let at = if fs == FsType::Xfs { 300 } else { 1024 + 0x200 };
    let raw = fs::File::options().write(true).open(&disk.device).unwrap();
    raw.write_all_at(&[0x55], at).unwrap();
    raw.sync_all().unwrap();
    drop(raw);
    let error = Mounted::device(&disk.device, fs).unwrap_err();
    assert!(error.damaged, "{error}");

    // A device that is somebody else's is not damaged.
    let disk = formatted(fs);
    let _mine = nix::fcntl::open(
        &disk.device,
        nix::fcntl::OFlag::O_EXCL | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .unwrap();
    let error = Mounted::device(&disk.device, fs).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EBUSY));
    assert!(!error.damaged);
    assert!(!error.messages.is_empty(), "{error}");
}

fn two_of_one_origin(fs: FsType) {
    let disk = formatted(fs);
    let copy = disk.copy();
    let one = Mounted::device(&disk.device, fs).unwrap();
    let two = Mounted::device(&copy.device, fs).unwrap();
    fs::write(inside(&one, "one"), "1").unwrap();
    assert!(!inside(&two, "one").exists());
}

fn one_device_twice(fs: FsType) {
    let disk = formatted(fs);
    let one = Mounted::device(&disk.device, fs).unwrap();
    let two = Mounted::device(&disk.device, fs).unwrap();
    fs::write(inside(&one, "one"), "1").unwrap();
    assert!(inside(&two, "one").exists());
    drop(one);
    assert!(in_use(&disk.device).unwrap());
    drop(two);
    unused(&disk);
}

fn grows(fs: FsType) {
    let disk = formatted(fs);
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    let device = mounted.device_number().unwrap();
    let size = || {
        let stat = nix::sys::statvfs::fstatvfs(mounted.root()).unwrap();
        stat.blocks() * stat.fragment_size()
    };
    let before = size();
    disk.grow(Bytes::mib(640));
    assert_eq!(size(), before);
    grow(mounted.root(), fs).unwrap();
    let after = size();
    assert!(
        after > before + Bytes::mib(290).0,
        "{before} bytes, now {after}"
    );
    mounted.sync().unwrap();
    let written = sectors_written(device).unwrap();
    grow(mounted.root(), fs).unwrap();
    mounted.sync().unwrap();
    assert_eq!(size(), after);
    assert_eq!(sectors_written(device).unwrap(), written);
}

fn dressed(fs: FsType) {
    let disk = formatted(fs);
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    let device = mounted.device_number().unwrap();
    let names = || -> Vec<_> {
        let dir = fs::read_dir(inside(&mounted, "")).unwrap();
        dir.map(|entry| entry.unwrap().file_name()).collect()
    };
    let owner = Some(Owner {
        uid: 1000,
        gid: 2000,
    });
    dress(mounted.root(), owner, Some(0o2750)).unwrap();
    let root = fs::metadata(inside(&mounted, "")).unwrap();
    assert_eq!((root.uid(), root.gid()), (1000, 2000));
    assert_eq!(root.permissions().mode() & 0o7777, 0o2750);
    assert!(names().is_empty(), "{:?}", names());

    mounted.sync().unwrap();
    let written = sectors_written(device).unwrap();
    dress(mounted.root(), owner, Some(0o2750)).unwrap();
    dress(mounted.root(), None, None).unwrap();
    mounted.sync().unwrap();
    assert_eq!(sectors_written(device).unwrap(), written);

    // What is somebody's stays.
    fs::create_dir(inside(&mounted, "lost+found")).unwrap();
    fs::write(inside(&mounted, "lost+found/file"), "text").unwrap();
    dress(mounted.root(), None, Some(0o700)).unwrap();
    assert!(inside(&mounted, "lost+found/file").exists());
    let root = fs::metadata(inside(&mounted, "")).unwrap();
    assert_eq!((root.uid(), root.gid()), (1000, 2000));
    assert_eq!(root.permissions().mode() & 0o7777, 0o700);
}

fn clean_or_not(fs: FsType) {
    let disk = formatted(fs);
    assert!(is_clean(&disk.device, fs).unwrap());
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    for number in 0..100 {
        fs::write(inside(&mounted, &format!("file{number}")), "text").unwrap();
    }
    mounted.sync().unwrap();
    let live = disk.copy();
    assert!(!is_clean(&live.device, fs).unwrap());
    drop(mounted);
    unused(&disk);
    assert!(is_clean(&disk.device, fs).unwrap());
    // One mount recovers the copy, and nothing that was synced is lost.
    let recovered = Mounted::device(&live.device, fs).unwrap();
    assert_eq!(fs::read(inside(&recovered, "file99")).unwrap(), b"text");
    drop(recovered);
    unused(&live);
    assert!(is_clean(&live.device, fs).unwrap());
}

fn trimmed(fs: FsType) {
    let disk = formatted(fs);
    let mounted = Mounted::device(&disk.device, fs).unwrap();
    let mapped = || fs::metadata(disk.image()).unwrap().blocks() * 512;
    let mut file = fs::File::create(inside(&mounted, "file")).unwrap();
    for _ in 0..64 {
        file.write_all(&vec![7; 1 << 20]).unwrap();
    }
    drop(file);
    mounted.sync().unwrap();
    let full = mapped();
    fs::remove_file(inside(&mounted, "file")).unwrap();
    mounted.sync().unwrap();
    trim(mounted.root()).unwrap();
    assert!(mapped() + (60 << 20) < full, "{} of {full}", mapped());
}

fn contents() {
    let disk = LoopDevice::new(Bytes::mib(320));
    assert_eq!(probe(&disk.device).unwrap(), Content::Blank);
    for fs in [FsType::Xfs, FsType::Ext4] {
        make(&disk.device, fs).unwrap();
        assert_eq!(probe(&disk.device).unwrap(), Content::Fs(fs));
    }
    for (tool, arguments, want) in [
        ("mkfs.ext2", vec!["-F", "-q"], Content::Fs(FsType::Ext4)),
        ("mkfs.ext3", vec!["-F", "-q"], Content::Fs(FsType::Ext4)),
        (
            "mke2fs",
            vec!["-F", "-q", "-O", "journal_dev"],
            Content::Unknown,
        ),
        ("mkfs.btrfs", vec!["-f", "-q"], Content::Unknown),
        ("mkswap", vec!["-f"], Content::Unknown),
    ] {
        let disk = LoopDevice::new(Bytes::mib(320));
        let device = disk.device.to_str().unwrap();
        run(tool, [arguments, vec![device]].concat());
        assert_eq!(probe(&disk.device).unwrap(), want, "{tool}");
    }
    let short = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(probe(short.path()).unwrap(), Content::Blank);
    fs::write(short.path(), "XFSB").unwrap();
    assert_eq!(probe(short.path()).unwrap(), Content::Unknown);
}

fn discarded() {
    let disk = LoopDevice::new(Bytes::mib(320));
    make(&disk.device, FsType::Xfs).unwrap();
    assert!(fs::metadata(disk.image()).unwrap().blocks() > 0);
    discard_all(&disk.device).unwrap();
    assert_eq!(fs::metadata(disk.image()).unwrap().blocks(), 0);
    assert_eq!(probe(&disk.device).unwrap(), Content::Blank);
}

fn scratch() {
    let at = TempDir::new().unwrap();
    let mounted = Mounted::scratch(Bytes::mib(1), "a name").unwrap();
    mounted.attach(at.path()).unwrap();
    let seen = visible_at(at.path()).unwrap();
    assert_eq!(
        (seen.fs.as_str(), seen.source.as_str()),
        ("tmpfs", "a name")
    );
    let root = fs::metadata(at.path()).unwrap();
    assert_eq!(root.permissions().mode() & 0o7777, 0o755);
    fs::write(at.path().join("fits"), vec![0; 512 << 10]).unwrap();
    let error = fs::write(at.path().join("too much"), vec![0; 2 << 20]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let refused = (0..2000).find_map(|n| fs::write(at.path().join(n.to_string()), "").err());
    assert_eq!(refused.unwrap().raw_os_error(), Some(libc::ENOSPC));
    assert!(detach(at.path()).unwrap());
}

fn shared() {
    use nix::mount::{MsFlags, mount};
    // In a mount namespace of this thread's own.
    let checked = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let change = |at: &Path, flags| mount(none, at, none, flags, none).unwrap();
        change(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        let dir = TempDir::new().unwrap();
        let ours = dir.path().join("a/b");
        let mounts = || {
            let mounts = table().unwrap();
            mounts
                .into_iter()
                .filter(|mount| mount.at.starts_with(dir.path()))
                .map(|mount| (mount.at, mount.shared))
                .collect::<Vec<_>>()
        };
        ensure_shared(&ours).unwrap();
        assert_eq!(mounts(), [(ours.clone(), true)]);
        ensure_shared(&ours).unwrap();
        // On a shared mount already.
        ensure_shared(&ours.join("c")).unwrap();
        assert_eq!(mounts(), [(ours.clone(), true)]);
        // As a kill between its two calls leaves it.
        change(&ours, MsFlags::MS_PRIVATE);
        assert_eq!(mounts(), [(ours.clone(), false)]);
        ensure_shared(&ours).unwrap();
        assert_eq!(mounts(), [(ours.clone(), true)]);
        assert!(detach(&ours).unwrap());
    });
    checked.join().unwrap();
}

/// Over many states of a log, [`is_clean`] says what xfsprogs says.
fn clean_as_xfs_logprint_says() {
    let rounds = std::env::var("LOG_ROUNDS").map_or(12, |rounds| rounds.parse().unwrap());
    let disk = formatted(FsType::Xfs);
    let said_clean = |disk: &LoopDevice| {
        let device = disk.device.to_str().unwrap();
        let output = Command::new("xfs_logprint").args(["-t", device]).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        match (text.contains("<CLEAN>"), text.contains("<DIRTY>")) {
            (true, false) => true,
            (false, true) => false,
            _ => panic!("xfs_logprint: {text}"),
        }
    };
    for round in 0..rounds {
        let mounted = Mounted::device(&disk.device, FsType::Xfs).unwrap();
        // Growing batches, so that the log's end lands anywhere, and goes round.
        let dir = inside(&mounted, &format!("dir{}", round % 3));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        for number in 0..(round * 997) % 6000 {
            fs::write(dir.join(number.to_string()), [0; 100]).unwrap();
        }
        if round % 2 == 0 {
            mounted.sync().unwrap();
        }
        let live = disk.copy();
        assert_eq!(
            is_clean(&live.device, FsType::Xfs).unwrap(),
            said_clean(&live),
            "round {round}, live"
        );
        // Only a log that something was written to can need recovery.
        let shut_down = round % 4 == 2;
        if shut_down {
            shut_down_now(&mounted);
        }
        drop(mounted);
        unused(&disk);
        assert_eq!(
            is_clean(&disk.device, FsType::Xfs).unwrap(),
            said_clean(&disk),
            "round {round}, unmounted"
        );
        assert_eq!(said_clean(&disk), !shut_down, "round {round}");
    }
}
