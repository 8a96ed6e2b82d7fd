// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Preparing a pool, once; run again it finishes what an earlier run began.
//!
//! Everything here is told to be ours by a mark that is there from the first
//! moment on: a tag on the pool, a tag on the half-made base, a label in the
//! first sector of a loop device's file. What lacks its mark is left as it is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::report::{Document, LV_COLUMNS, LvRow, POOL};
use super::{LvmStore, config, io_error, process, tool};
use crate::cache::names::{LvName, Tag};
use crate::cache::spec::FsType;
use crate::cache::tags::{DEFAULT, MAKING};
use crate::cache::units::Bytes;
use crate::exec::{self, ExecError};
use crate::storage::{NewLv, Store, StoreError};

/// The base's name. It is found by its tag, so another may be in its place.
const BASE: &str = "friend-default";

/// The first bytes of a file that we made for a loop device. LVM's label is in
/// the second sector, so this stays.
const LABEL: &[u8] = b"lvm-cache-friend: a physical volume of LVM's, for a loop device\n";

/// Size of the metadata area of a group of our own, which cannot be changed later:
/// the default of 1 MiB is full with about 1,100 volumes, this with 18,000.
const METADATA_AREA: Bytes = Bytes::mib(16);

/// Prints what is being done.
pub type Say<'a> = &'a mut dyn FnMut(String);

/// Makes the thin pool `pool` of `size` in the existing group `vg`, and in it the
/// base, an empty XFS of the virtual size `base_size`, which may exceed the pool's.
/// What is there already stays as it is.
///
/// # Errors
/// When the group is not there, has no room, or holds something else by these names.
pub fn init(
    vg: &LvName,
    pool: &LvName,
    size: Bytes,
    base_size: Bytes,
    runtime_dir: &Path,
    say: Say<'_>,
) -> Result<(), StoreError> {
    tool("lvm", "lvm2")?;
    tool("thin_check", "thin-provisioning-tools")?;
    tool("mkfs.xfs", "xfsprogs")?;
    make_pool(vg, pool, Room::Of(size), say)?;
    make_base(vg, pool, base_size, runtime_dir, say)
}

/// [`init`], in a group of its own on a loop device over `file`, which is made
/// with `size` and takes space on its file system only as it is written to.
/// Returns the group's name.
///
/// # Errors
/// As [`init`], and when `file` is there and was not made by this function.
pub fn init_loop(
    file: &Path,
    size: Bytes,
    pool: &LvName,
    base_size: Bytes,
    runtime_dir: &Path,
    say: Say<'_>,
) -> Result<LvName, StoreError> {
    tool("lvm", "lvm2")?;
    tool("losetup", "mount")?;
    if make_file(file, size)? {
        say(format!("made {} of {size}", file.display()));
    }
    let device = ensure_loop(file)?;
    let vg = make_group(&device, file, say)?;
    make_pool(&vg, pool, Room::All, say)?;
    make_base(&vg, pool, base_size, runtime_dir, say)?;
    Ok(vg)
}

/// Sees that `file`, made by [`init_loop`], is behind a loop device (they are gone
/// after a reboot), and returns the device.
///
/// # Errors
/// When the file is not there, or not of our making, or no loop device is to be had.
pub fn ensure_loop(file: &Path) -> Result<PathBuf, StoreError> {
    if !is_ours(file)? {
        return Err(StoreError::Unusable(format!(
            "{}: not a file that `lvm-cache-friend init --loop` made",
            file.display()
        )));
    }
    let found = exec::run(
        "losetup",
        [
            "--noheadings".as_ref(),
            "--output=NAME".as_ref(),
            "--associated".as_ref(),
            file.as_os_str(),
        ],
    )?;
    let first = |output: Vec<u8>| {
        let text = String::from_utf8_lossy(&output).into_owned();
        text.lines().next().map(|line| PathBuf::from(line.trim()))
    };
    if let Some(device) = first(found) {
        return Ok(device);
    }
    let attach = |options: &[&str]| {
        let options = options.iter().map(OsStr::new);
        exec::run("losetup", options.chain([file.as_os_str()]))
    };
    // Direct I/O: otherwise each block is in memory twice, in the page cache of
    // the device and of the file. Not every file system has it.
    let made = attach(&["--find", "--show", "--direct-io=on"])
        .or_else(|_| attach(&["--find", "--show"]))?;
    first(made).ok_or_else(|| StoreError::Failed("losetup named no loop device".into()))
}

/// How much of a group a pool takes.
#[derive(Debug, Clone, Copy)]
enum Room {
    Of(Bytes),
    All,
}

fn make_pool(vg: &LvName, pool: &LvName, room: Room, say: Say<'_>) -> Result<(), StoreError> {
    let tags = match find(vg, pool)? {
        Some(row) if row.is_thin_pool() => row,
        Some(_) => {
            return Err(StoreError::Unusable(format!(
                "{vg}/{pool} is there and is not a thin pool: choose another name with --pool"
            )));
        }
        None => {
            let free = free_space(vg)?;
            let (size, metadata) = match room {
                Room::Of(size) => (size, metadata_size(size)),
                Room::All => {
                    let metadata = metadata_size(free);
                    let taken = 2 * metadata.0;
                    (Bytes(free.0.saturating_sub(taken)), metadata)
                }
            };
            // LVM keeps a spare of the metadata, as large, for repairs.
            let needed = Bytes(size.0 + 2 * metadata.0);
            if free < needed || size.0 == 0 {
                return Err(StoreError::Full {
                    store: vg.to_string(),
                    detail: format!(
                        "{needed} are needed (of which {metadata} for the pool's metadata and as much for its spare) and {free} are free; choose a smaller --size, or `vgextend {vg} DEVICE`"
                    ),
                });
            }
            let make = [
                "lvcreate".into(),
                "--yes".into(),
                "--type=thin-pool".into(),
                // Whatever lvm.conf's thin_pool_zero says.
                "--zero=y".into(),
                format!("--size={}b", size.round_up(512).0),
                format!("--poolmetadatasize={}b", metadata.0),
                format!("--addtag={POOL}"),
                format!("--name={pool}"),
                vg.to_string(),
            ];
            // Its metadata is wiped, for which it has to come up.
            let more = config::may_activate(vg, &config::host_system_dir());
            lvm_with(&make, &more)?;
            say(format!("made thin pool {vg}/{pool} of {size}"));
            find(vg, pool)?
                .ok_or_else(|| StoreError::Failed(format!("{vg}/{pool} is not there")))?
        }
    };
    // A full pool gives errors at once instead of after a minute in which
    // writes hang. `lvcreate` of LVM 2.03.16 refuses this for pools.
    let ours = tags.lv_tags.split(',').any(|tag| tag == POOL);
    if ours && tags.lv_when_full != "error" {
        lvm(&[
            "lvchange".into(),
            "--yes".into(),
            "--errorwhenfull=y".into(),
            format!("{vg}/{pool}"),
        ])?;
    } else if !ours && tags.lv_when_full != "error" {
        say(format!(
            "{vg}/{pool} was made by someone else and makes writers hang when it is full: `lvchange --errorwhenfull y {vg}/{pool}` lets them fail instead"
        ));
    }
    // What a volume is first given of a block that another one had is zeros then, never the other one's data.
    if !tags.zeroes() {
        if ours {
            lvm(&[
                "lvchange".into(),
                "--yes".into(),
                "--zero=y".into(),
                format!("{vg}/{pool}"),
            ])?;
            say(format!("{vg}/{pool} zeroes new blocks from now on"));
        } else {
            say(format!(
                "{vg}/{pool} was made by someone else and does not zero new blocks, so that a volume may hold what others deleted: `lvchange --zero y {vg}/{pool}` changes that"
            ));
        }
    }
    Ok(())
}

/// Four times what LVM takes for volumes that share nothing (64 bytes a chunk of
/// 64 KiB): snapshots that are written to get mappings of their own for what they
/// share. And enough that the 4 MiB, without which LVM makes nothing more,
/// are a small part of it. The most that device-mapper can use is below 16 GiB.
fn metadata_size(pool: Bytes) -> Bytes {
    let share = Bytes(pool.0 / 256).round_up(4 * Bytes::MIB);
    share.clamp(Bytes::mib(16), Bytes(15 * Bytes::GIB))
}

fn make_base(
    vg: &LvName,
    pool: &LvName,
    size: Bytes,
    runtime_dir: &Path,
    say: Say<'_>,
) -> Result<(), StoreError> {
    let store = LvmStore::open(vg.as_str(), pool.as_str(), runtime_dir)?;
    let listing = store.list()?;
    let has = |tags: &[Tag], wanted: &str| tags.iter().any(|tag| tag.as_str() == wanted);
    if listing.lvs.iter().any(|lv| has(&lv.tags, DEFAULT)) {
        return Ok(());
    }
    let name: LvName = constant(BASE);
    let (making, default): (Tag, Tag) = (constant(MAKING), constant(DEFAULT));
    let device = match listing.lvs.iter().find(|lv| lv.name == name) {
        None => {
            let new = NewLv {
                name: name.clone(),
                tags: vec![making.clone()],
                active: true,
            };
            store.create(&new, size)?
        }
        Some(lv) if lv.tags == [making.clone()] => Some(store.activate(&name)?),
        Some(_) => {
            return Err(StoreError::Unusable(format!(
                "{vg}/{BASE} is there and was not made by init: `lvchange --addtag {DEFAULT} {vg}/LV` makes a thin volume with an XFS or ext4 the base"
            )));
        }
    };
    let device = device.ok_or_else(|| StoreError::Failed(format!("{vg}/{BASE} has no device")))?;
    crate::fs::make(&device, FsType::Xfs)?;
    // Inactive before it is the base: entries always are.
    store.deactivate(&name)?;
    store.change_tags(&name, &[default], &[making])?;
    say(format!("made the base {vg}/{BASE}, an empty XFS of {size}"));
    Ok(())
}

/// Makes `file`, sparse, with our label in it, all at once; `false`: it is there.
fn make_file(file: &Path, size: Bytes) -> Result<bool, StoreError> {
    let context = |error| io_error(file.display().to_string(), error);
    if file.try_exists().map_err(context)? {
        return Ok(false);
    }
    let name = file
        .file_name()
        .ok_or_else(|| context(io::ErrorKind::InvalidInput.into()))?;
    let new = file.with_file_name(format!(".{}.new", name.to_string_lossy()));
    let make = || -> io::Result<()> {
        // Left over from a run that was cut short; it has nothing in it.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut handle = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        handle.write_all(LABEL)?;
        handle.set_len(size.0)?;
        handle.sync_all()?;
        // A link, not a rename: it never takes the place of a file.
        let made = fs::hard_link(&new, file);
        fs::remove_file(&new)?;
        made
    };
    make().map_err(context)?;
    Ok(true)
}

fn is_ours(file: &Path) -> Result<bool, StoreError> {
    let mut start = [0; LABEL.len()];
    let read = File::open(file).and_then(|mut file| file.read_exact(&mut start));
    match read {
        Ok(()) => Ok(start == LABEL),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(io_error(file.display().to_string(), error)),
    }
}

/// The group on `device`, made where there is none.
fn make_group(device: &Path, file: &Path, say: Say<'_>) -> Result<LvName, StoreError> {
    // Looks at that device alone, which the host's devices file need not list yet. `--devices` would say so too, but not
    // before LVM 2.03.12.
    let only = format!(
        r#"devices/use_devicesfile=0 devices/global_filter=["a|.*|"] devices/filter=["a|^{}$|","r|.*|"]"#,
        device.display()
    );
    let found = lvm_with(
        &[
            "pvs".into(),
            "--reportformat=json".into(),
            "--options=vg_name".into(),
            // A device that is no physical volume yet is no error with this, as long as
            // it is not named as an argument, too.
            "--all".into(),
        ],
        &only,
    )?;
    if let Some(row) = found.groups().find(|row| !row.vg_name.is_empty()) {
        return row.vg_name.parse().map_err(|error| {
            StoreError::Failed(format!("the group in {}: {error}", file.display()))
        });
    }
    let vg = group_name(file);
    lvm(&[
        "vgcreate".into(),
        "--yes".into(),
        // Leaves our label alone.
        "--zero=n".into(),
        format!("--metadatasize={}b", METADATA_AREA.0),
        vg.to_string(),
        device.display().to_string(),
    ])?;
    say(format!("made volume group {vg} in {}", file.display()));
    Ok(vg)
}

/// `friend-` and the file's name without its extension. Once made, the group's
/// name is read from the file, whatever that is called.
fn group_name(file: &Path) -> LvName {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let safe: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '+') {
                c
            } else {
                '-'
            }
        })
        // Half of device-mapper's 127 bytes, in which each - counts twice, is
        // left to the volumes' names.
        .take(24)
        .collect();
    constant(&format!("friend-{safe}"))
}

fn find(vg: &LvName, lv: &LvName) -> Result<Option<LvRow>, StoreError> {
    let found = lvm(&[
        "lvs".into(),
        "--reportformat=json".into(),
        format!("--options={LV_COLUMNS}"),
        format!("--select=lv_name=\"{lv}\""),
        vg.to_string(),
    ]);
    match found {
        Ok(found) => Ok(found.lvs().next().cloned()),
        Err(error) => Err(StoreError::Unusable(format!(
            "volume group {vg} cannot be used: {error}; `vgs` shows which there are, and `lvm-cache-friend init --loop FILE` makes one in a file"
        ))),
    }
}

fn free_space(vg: &LvName) -> Result<Bytes, StoreError> {
    let found = lvm(&[
        "vgs".into(),
        "--reportformat=json".into(),
        "--units=b".into(),
        "--nosuffix".into(),
        "--options=vg_free".into(),
        vg.to_string(),
    ])?;
    found
        .groups()
        .find_map(|row| row.vg_free.parse().ok())
        .map(Bytes)
        .ok_or_else(|| StoreError::Failed(format!("LVM shows no free space of {vg}")))
}

/// One command with the host's own configuration, but for how it reports: this is done once.
fn lvm(args: &[String]) -> Result<Document, StoreError> {
    lvm_with(args, "")
}

/// [`lvm`] with more settings.
fn lvm_with(args: &[String], more: &str) -> Result<Document, StoreError> {
    let host = config::host_system_dir();
    let plain = config::plain_report_and(more);
    let all = args.iter().chain([&plain]);
    let query = args.iter().any(|arg| arg == "--reportformat=json");
    // Neither the settings nor the columns say anything of what went wrong.
    let command = || match query {
        true => args[0].clone(),
        false => args.join(" "),
    };
    let output =
        exec::run_with_env("lvm", all, &process::environment(&host)).map_err(
            |error| match error {
                ExecError::Failed { stderr, .. } => {
                    let lines: Vec<_> = stderr.trim().lines().map(str::trim).collect();
                    StoreError::Failed(format!("`lvm {}`: {}", command(), lines.join("; ")))
                }
                _ => error.into(),
            },
        )?;
    if !query {
        return Ok(Document::default());
    }
    Document::parse(&output)
        .map_err(|error| StoreError::Failed(format!("`lvm {}`: {error}", command())))
}

/// A name or tag of our own, which is known to be one.
fn constant<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("made of the alphabet")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_names() {
        for (file, group) in [
            ("/var/lib/caches.img", "friend-caches"),
            ("/a b/ü c.x.img", "friend---c.x"),
            ("/x", "friend-x"),
            (
                "/0123456789012345678901234567890",
                "friend-012345678901234567890123",
            ),
        ] {
            assert_eq!(group_name(Path::new(file)).as_str(), group, "{file}");
        }
    }

    #[test]
    fn metadata_sizes() {
        for (pool, metadata) in [
            (Bytes::mib(300), Bytes::mib(16)),
            (Bytes(30 * Bytes::GIB), Bytes::mib(120)),
            (Bytes(1 << 50), Bytes(15 * Bytes::GIB)),
        ] {
            assert_eq!(metadata_size(pool), metadata, "{pool}");
        }
    }

    #[test]
    fn a_file_is_made_once_and_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("caches.img");
        assert!(make_file(&file, Bytes::mib(64)).unwrap());
        assert_eq!(fs::metadata(&file).unwrap().len(), 64 << 20);
        assert!(is_ours(&file).unwrap());
        assert!(!make_file(&file, Bytes::mib(128)).unwrap());
        assert_eq!(fs::metadata(&file).unwrap().len(), 64 << 20);

        for content in ["", "short", &"x".repeat(1 << 16)] {
            let other = dir.path().join("other");
            fs::write(&other, content).unwrap();
            assert!(!make_file(&other, Bytes::mib(64)).unwrap());
            assert!(!is_ours(&other).unwrap());
            assert_eq!(fs::read_to_string(&other).unwrap(), content);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
