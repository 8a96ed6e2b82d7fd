// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `import`: an entry from a directory.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Whence, lseek64};

use super::{Failure, failed, open, print};
use crate::cache::names::{LvName, Tag};
use crate::cache::record::{Role, entry_tags};
use crate::cache::spec::{FsType, Spec};
use crate::cache::tags::{MAKING, SNAPSHOT};
use crate::cache::units::Bytes;
use crate::fs as file_system;
use crate::mount::{self, Mounted};
use crate::selinux;
use crate::storage::{Listing, NewLv, Store};
use crate::text::unix_now;
use crate::{cli, exec};

/// How often progress is shown.
const PROGRESS: Duration = Duration::from_millis(250);

/// What a file or directory takes beside its data, in bytes, on either file
/// system: an inode (512 in XFS, 256 in ext4), its name, its share of tables.
const PER_INODE: u64 = 1024;

/// `import`.
///
/// # Errors
/// When the entry cannot be made; nothing is left behind then.
pub fn run(config: &Path, args: &cli::Import) -> Result<(), Failure> {
    let spec = spec(args)?;
    // Before anything has a thread, so that all have these signals blocked: from
    // here on they are asked for.
    let interrupt = Interrupt::new().map_err(failed("blocking signals"))?;
    let (settings, store) = open(config)?;
    // A store of image files mounts once more what the daemon has mounted.
    selinux::begin(&settings.selinux_context)
        .map_err(|error| Failure::Failed(error.to_string()))?;
    let dir = fs::canonicalize(&args.dir).map_err(failed(args.dir.display()))?;
    if !dir.is_dir() {
        return Err(Failure::Failed(format!(
            "{}: not a directory",
            dir.display()
        )));
    }
    let content = Content::measure(&dir, &interrupt)?;
    let fs = spec.fs.unwrap_or_default();
    let size = size(&spec, fs, content, &store.list()?)?;

    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|e| Failure::Failed(e.to_string()))?;
    let name = LvName::fresh(unix_now(), random);
    let making = Making {
        store: &*store,
        name: &name,
        done: false,
    };
    fill(making, &dir, fs, size, &spec, content, &interrupt)?;
    print(&format!(
        "{name}: {} in {} files and directories, tags: {}\n",
        Bytes(content.bytes),
        content.inodes,
        spec.save
            .iter()
            .map(Tag::as_str)
            .collect::<Vec<_>>()
            .join(" ")
    ))
}

/// The command line's values, checked as those of a volume's options are.
fn spec(args: &cli::Import) -> Result<Spec, Failure> {
    let options: BTreeMap<String, String> = [
        ("save", Some(&args.tags)),
        ("scope", args.scope.as_ref()),
        ("fs", args.fs.as_ref()),
        ("size", args.size.as_ref()),
        ("owner", args.owner.as_ref()),
        ("mode", args.mode.as_ref()),
    ]
    .into_iter()
    .filter_map(|(option, value)| Some((option.to_owned(), value?.clone())))
    .collect();
    let spec = Spec::parse(&options).map_err(|error| {
        let option = if error.option == "save" {
            "tags"
        } else {
            &error.option
        };
        Failure::Usage(format!("--{option}: {}", error.problem))
    })?;
    if spec.save.is_empty() {
        return Err(Failure::Usage(
            "--tags: at least one is needed, for restore keys to match".into(),
        ));
    }
    Ok(spec)
}

/// What a directory holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Content {
    /// Bytes of data, holes left out, each file once however many names it has.
    bytes: u64,
    inodes: u64,
}

impl Content {
    fn measure(dir: &Path, interrupt: &Interrupt) -> Result<Self, Failure> {
        let mut content = Self::default();
        let mut linked = HashSet::new();
        let mut todo = vec![dir.to_owned()];
        while let Some(dir) = todo.pop() {
            if interrupt.pending(Duration::ZERO)? {
                return Err(interrupted());
            }
            content.inodes += 1;
            for entry in fs::read_dir(&dir).map_err(failed(dir.display()))? {
                let entry = entry.map_err(failed(dir.display()))?;
                let path = entry.path();
                let meta = entry.metadata().map_err(failed(path.display()))?;
                if meta.is_dir() {
                    todo.push(path);
                } else if meta.nlink() == 1 || linked.insert((meta.dev(), meta.ino())) {
                    content.inodes += 1;
                    if meta.is_file() {
                        content.bytes += data(&path, &meta).map_err(failed(path.display()))?;
                    }
                }
            }
        }
        Ok(content)
    }

    /// Room that a file system needs for it.
    fn needs(self) -> u64 {
        self.bytes + self.inodes * PER_INODE
    }
}

/// Bytes of a file that are no holes, in whole blocks.
fn data(path: &Path, meta: &fs::Metadata) -> io::Result<u64> {
    const BLOCK: u64 = 4096;
    if meta.blocks() * 512 >= meta.len() {
        return Ok(Bytes(meta.len()).round_up(BLOCK).0);
    }
    // Fewer blocks than bytes: it has holes, or its file system compresses.
    let file = File::open(path)?;
    let seek = |from: i64, whence| match lseek64(&file, from, whence) {
        Ok(at) => Ok(Some(at)),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(io::Error::from(errno)),
    };
    let (mut bytes, mut at) = (0, 0);
    while let Some(start) = seek(at, Whence::SeekData)? {
        at = seek(start, Whence::SeekHole)?.unwrap_or(meta.len() as i64);
        bytes += Bytes((at - start) as u64).round_up(BLOCK).0;
    }
    Ok(bytes)
}

/// The virtual size that the entry gets.
fn size(spec: &Spec, fs: FsType, content: Content, listing: &Listing) -> Result<Bytes, Failure> {
    // A quarter, for what a file system keeps for itself and its log.
    let needed = Bytes(content.needs() + content.needs() / 4)
        .round_up(Bytes::MIB)
        .max(fs.min_size());
    match spec.size {
        Some(size) if size.0 < content.needs() => Err(Failure::Failed(format!(
            "--size {size} is too small: the content alone takes {}",
            Bytes(content.needs())
        ))),
        Some(size) => Ok(size),
        None => {
            let base = listing
                .lvs
                .iter()
                .find(|lv| Role::from_tags(&lv.tags) == Role::Base)
                .map_or(Bytes(0), |lv| lv.size);
            Ok(needed.max(base))
        }
    }
}

/// A logical volume that is removed again unless it got `done`.
struct Making<'a> {
    store: &'a dyn Store,
    name: &'a LvName,
    done: bool,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.store.remove(self.name)
        {
            eprintln!(
                "{}: cannot be removed ({error}); the daemon will remove it at its next start",
                self.name
            );
        }
    }
}

fn fill(
    mut making: Making,
    dir: &Path,
    fs: FsType,
    size: Bytes,
    spec: &Spec,
    content: Content,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let (store, name) = (making.store, making.name);
    let tag = |text: &str| text.parse::<Tag>().expect("a tag");
    let new = NewLv {
        name: name.clone(),
        tags: vec![tag(SNAPSHOT), tag(MAKING)],
        active: true,
    };
    let device = store
        .create(&new, size)?
        .ok_or_else(|| Failure::Failed(format!("{name}: has no device")))?;
    // Held until the tags are there: a daemon that starts meanwhile tells by
    // it that somebody is still making this one.
    let held = store.hold(name)?;
    file_system::make(&device, fs).map_err(|e| Failure::Failed(e.to_string()))?;
    let mounted = Mounted::device(&device, fs)
        .map_err(|e| Failure::Failed(format!("mounting {}: {e}", device.display())))?;
    let dress = |owner, mode| {
        file_system::dress(mounted.root(), owner, mode).map_err(failed("the root directory"))
    };
    // No lost+found: before the copy, which gives the root its times.
    dress(None, None)?;
    copy(dir, &mounted, content, interrupt)?;
    dress(spec.owner, spec.mode)?;
    mounted.sync().map_err(failed("writing to the store"))?;
    drop(mounted);
    if mount::in_use(&device).map_err(failed(device.display()))?
        || !file_system::is_clean(&device, fs).map_err(failed(device.display()))?
    {
        return Err(Failure::Failed(format!(
            "{name}: its file system was not unmounted cleanly"
        )));
    }
    if interrupt.pending(Duration::ZERO)? {
        return Err(interrupted());
    }
    let mut add: Vec<_> = entry_tags(&spec.save, &spec.scope, None)
        .into_iter()
        .filter(|tag| tag.as_str() != SNAPSHOT)
        .collect();
    // Newer than what was published while it was copied.
    add.extend(store.list()?.published_after(name));
    store.change_tags(name, &add, &[tag(MAKING)])?;
    store.persist()?;
    let there = store.list()?.lvs.into_iter().find(|lv| lv.name == *name);
    if !matches!(
        there.map(|lv| Role::from_tags(&lv.tags)),
        Some(Role::Entry { .. })
    ) {
        return Err(Failure::Failed(format!(
            "{name}: it was removed meanwhile, by another program or by a daemon that considered it left over"
        )));
    }
    making.done = true;
    drop(held);
    // Entries are inactive; this one is whole whether or not that comes true now.
    if let Err(error) = store.deactivate(name) {
        eprintln!("{name}: its device stays active for now: {error}");
    }
    Ok(())
}

/// Copies what is in `dir` to the root of `mounted`.
fn copy(
    dir: &Path,
    mounted: &Mounted,
    content: Content,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let cp = exec::find_tool("cp").map_err(|e| Failure::Failed(e.to_string()))?;
    // The mount is attached nowhere: this is the only path to it.
    let root = PathBuf::from(format!(
        "/proc/{}/fd/{}/",
        std::process::id(),
        mounted.root().as_raw_fd()
    ));
    let mut child = Command::new(&cp)
        // -a alone passes over extended attributes that it fails to copy.
        .args(["-a", "--preserve=all,xattr", "--sparse=always", "--"])
        .arg(dir.join("."))
        .arg(&root)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed(cp.display()))?;
    let ended = watch(&mut child, mounted, content, interrupt);
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended
}

fn watch(
    child: &mut Child,
    mounted: &Mounted,
    content: Content,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let used = || -> u64 {
        fstatvfs(mounted.root()).map_or(0, |fs| {
            (fs.blocks() - fs.blocks_free()) * fs.fragment_size()
        })
    };
    let show = io::stderr().is_terminal();
    let before = used();
    loop {
        if let Some(status) = child.try_wait().map_err(failed("cp"))? {
            if show {
                eprint!("\r\x1b[K");
            }
            return if status.success() {
                Ok(())
            } else {
                Err(Failure::Failed(format!("copying failed: cp: {status}")))
            };
        }
        if interrupt.pending(PROGRESS)? {
            return Err(interrupted());
        }
        if show {
            // An estimate: file systems reserve before they write.
            let done = used().saturating_sub(before).min(content.bytes);
            let percent = done * 100 / content.bytes.max(1);
            eprint!(
                "\r\x1b[Kcopying: {} of {} ({percent} %)",
                Bytes(done),
                Bytes(content.bytes)
            );
            let _ = io::stderr().flush();
        }
    }
}

fn interrupted() -> Failure {
    Failure::Failed("interrupted; nothing was imported".into())
}

/// SIGINT, SIGTERM and SIGHUP, blocked and asked for: what was begun must be
/// undone before the process ends.
struct Interrupt(SignalFd);

impl Interrupt {
    fn new() -> io::Result<Self> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block()?;
        Ok(Self(SignalFd::with_flags(
            &signals,
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?))
    }

    /// Waits for one for so long. Once one came, it stays pending.
    fn pending(&self, wait: Duration) -> Result<bool, Failure> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(wait).expect("less than weeks");
        let ready = poll(&mut fds, wait).map_err(|e| failed("poll")(e.into()))?;
        Ok(ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_measured_once_a_file_and_without_holes() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sub")).expect("made");
        fs::write(at("sub/a"), vec![1; 10_000]).expect("written");
        fs::hard_link(at("sub/a"), at("b")).expect("linked");
        std::os::unix::fs::symlink("b", at("c")).expect("linked");
        let sparse = File::create(at("hole")).expect("made");
        sparse.set_len(1 << 40).expect("set");
        drop(sparse);
        let interrupt = Interrupt::new().expect("blocked");
        let content = Content::measure(dir.path(), &interrupt).expect("measured");
        assert_eq!(
            content,
            Content {
                bytes: 12_288,
                inodes: 5
            }
        );
    }
}
