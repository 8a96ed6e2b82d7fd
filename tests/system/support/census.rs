// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What there is in a store and around it, counted with its own tools and not with ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lvm_cache_friend::cache::spec::FsType;
use lvm_cache_friend::fs::{Content as Formatted, probe};
use nix::mount::{MsFlags, mount, umount};
use serde_json::Value;

use super::ceph;
use super::command::{outcome, run};
use super::content::{self, Content};
use super::site::{Kind, MOUNT_DIR, Site};

/// By when all that was under way must be done. Far beyond what it takes: this tells a daemon that never settles from a slow one.
const SETTLED: Duration = Duration::from_secs(90);

/// Everything that a store holds and has brought up.
#[derive(Debug)]
pub struct Census {
    store: Store,
    /// Each LV (or image) with its tags.
    pub lvs: BTreeMap<String, BTreeSet<String>>,
    /// Those with a device.
    pub active: BTreeSet<String>,
    /// What belongs to none of them: files, devices.
    pub strays: Vec<String>,
}

#[derive(Debug)]
enum Store {
    /// The thin pool's device, and each volume's number and sectors in it.
    Pool {
        vg: String,
        pool: String,
        volumes: BTreeMap<String, (u64, u64)>,
    },
    Directory(PathBuf),
    /// Each volume, as the index has it.
    Namespace(BTreeMap<String, Value>),
}

/// A volume as it should be.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    pub name: &'a str,
    pub mounted: bool,
}

impl<'a> Known<'a> {
    pub fn idle(name: &'a str) -> Self {
        Self {
            name,
            mounted: false,
        }
    }

    pub fn mounted(name: &'a str) -> Self {
        Self {
            name,
            mounted: true,
        }
    }
}

impl Census {
    /// What there is now in a group, or a directory.
    pub fn of(kind: Kind, store: &str) -> Self {
        // Before the store is looked at: what is not among them any more, that says.
        let pending = fs::read_dir(format!("{MOUNT_DIR}.pending"));
        let pending: Vec<_> = pending.into_iter().flatten().flatten().collect();
        let mut census = match kind {
            Kind::Lvm => thin_pool(store),
            Kind::Reflink => images(Path::new(store)),
            Kind::Rbd => clones(),
        };
        let pending = pending.iter().map(|file| file.path().display().to_string());
        census.strays.extend(pending);
        census
    }

    /// Those that can be restored from.
    pub fn entries(&self) -> BTreeSet<String> {
        let is_entry =
            |tags: &BTreeSet<String>| tags.iter().any(|tag| tag.starts_with("friend:cache:"));
        self.lvs
            .iter()
            .filter(|(_, tags)| is_entry(tags))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Those with a tag.
    pub fn with_tag(&self, tag: &str) -> Vec<&str> {
        self.lvs
            .iter()
            .filter(|(_, tags)| tags.contains(tag))
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// The content of an entry, which must mount from a device that cannot be written to: with no recovery.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn content(&self, entry: &str) -> Result<Content, String> {
        self.read(entry, content::try_read)?
    }

    /// What `read` finds in an entry, which is mounted as above.
    ///
    /// # Errors
    /// Why it does not mount.
    pub fn read<T>(&self, entry: &str, read: impl FnOnce(&Path) -> T) -> Result<T, String> {
        let device = ReadOnly::new(&self.store, entry);
        let (fs, options) = match probe(&device.path()).unwrap() {
            Formatted::Fs(FsType::Xfs) => ("xfs", "nouuid"),
            Formatted::Fs(FsType::Ext4) => ("ext4", ""),
            other => return Err(format!("{other:?}")),
        };
        let at = tempfile::tempdir().unwrap();
        mount(
            Some(&device.path()),
            at.path(),
            Some(fs),
            MsFlags::MS_RDONLY,
            Some(options),
        )
        .map_err(|error| format!("mount: {error}"))?;
        let found = read(at.path());
        umount(at.path()).unwrap();
        Ok(found)
    }

    /// Has the checker of an entry's file system look for damage, and for a log that was not replayed.
    ///
    /// # Errors
    /// What it says.
    pub fn check(&self, entry: &str) -> Result<(), String> {
        let device = ReadOnly::new(&self.store, entry);
        let (checker, option) = match probe(&device.path()).unwrap() {
            Formatted::Fs(FsType::Xfs) => ("xfs_repair", "-n"),
            Formatted::Fs(FsType::Ext4) => ("e2fsck", "-fn"),
            other => return Err(format!("{other:?}")),
        };
        let path = device.path();
        let found = outcome(checker, [option.as_ref(), path.as_os_str()]);
        let said = format!("{}{}", found.stdout, found.stderr);
        // Of a log that it does not replay, e2fsck warns, and xfs_repair too.
        if found.status == 0 && !["ALERT", "Warning"].iter().any(|word| said.contains(word)) {
            Ok(())
        } else {
            Err(format!("{checker}: {}: {said}", found.status))
        }
    }

    /// The ids of all thin devices that the pool has; `None` where another program holds a snapshot of its metadata.
    fn ids_in_pool(&self) -> Option<BTreeSet<u64>> {
        let Store::Pool { vg, pool, .. } = &self.store else {
            return Some(BTreeSet::new());
        };
        let device = |part: &str| format!("/dev/mapper/{}-{}{part}", dm(vg), dm(pool));
        let message = |text| outcome("dmsetup", ["message", &device("-tpool"), "0", text]);
        if message("reserve_metadata_snap").status != 0 {
            return None;
        }
        let options = ["--metadata-snap", "--no-headers", "--format", "DEV"];
        let metadata = device("_tmeta");
        let ids = run("thin_ls", options.into_iter().chain([metadata.as_str()]));
        assert_eq!(message("release_metadata_snap").status, 0);
        let ids = ids.split_whitespace().map(|id| id.parse().unwrap());
        Some(ids.collect())
    }

    /// Those of the thin devices that LVM knows.
    fn ids(&self) -> BTreeSet<u64> {
        match &self.store {
            Store::Pool { volumes, .. } => volumes.values().map(|(id, _)| *id).collect(),
            _ => BTreeSet::new(),
        }
    }

    /// What is there beside one base, entries at rest, and one LV for each of these volumes.
    fn complaints(&self, volumes: &[Known<'_>]) -> Vec<String> {
        let mut complaints = self.strays.clone();
        let mut bases = 0;
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        let entries = self.entries();
        for (name, tags) in &self.lvs {
            let active = self.active.contains(name);
            let shown = || {
                let tags: Vec<_> = tags.iter().map(String::as_str).collect();
                format!("{name} {}", tags.join(" "))
            };
            let volume = tags
                .iter()
                .find_map(|tag| tag.strip_prefix("friend:volume:"));
            let doomed = tags.contains("friend:doomed");
            let leased = tags.iter().any(|tag| tag.starts_with("friend:lease:"));
            let known = volumes
                .iter()
                .find(|known| Some(known.name) == volume && (known.mounted || !leased));
            match known {
                _ if doomed => complaints.push(shown()),
                Some(known) => *found.entry(known.name).or_default() += 1,
                None if volume.is_some() || leased => complaints.push(shown()),
                None if active => complaints.push(format!("active: {}", shown())),
                None if tags.contains("friend:default") => bases += 1,
                None if entries.contains(name) => {}
                None => complaints.push(shown()),
            }
        }
        if bases != 1 {
            complaints.push(format!("{bases} bases"));
        }
        for known in volumes {
            match found.get(known.name).copied().unwrap_or(0) {
                1 => {}
                n => complaints.push(format!("{n} LVs of volume {}", known.name)),
            }
        }
        let mounts = mounts();
        let dirs: BTreeSet<PathBuf> = fs::read_dir(MOUNT_DIR)
            .into_iter()
            .flatten()
            .map(|dir| dir.unwrap().path())
            .collect();
        let expected: BTreeSet<_> = volumes
            .iter()
            .filter(|known| known.mounted)
            .map(|known| Path::new(MOUNT_DIR).join(known.name))
            .collect();
        if mounts != expected {
            complaints.push(format!("mounted: {mounts:?}"));
        }
        if dirs != expected {
            complaints.push(format!("mountpoints: {dirs:?}"));
        }
        complaints
    }
}

impl Site {
    /// What there is now.
    pub fn census(&self) -> Census {
        Census::of(self.kind, &self.store())
    }

    /// See [`settled`].
    #[track_caller]
    pub fn settled(&self, volumes: &[Known<'_>]) -> Census {
        settled(self.kind, &self.store(), volumes)
    }

    /// See [`no_lost_ids`].
    #[track_caller]
    pub fn no_lost_ids(&self) {
        no_lost_ids(self.kind, &self.store());
    }
}

/// Waits until there is nothing but one base, entries at rest, and one LV for each of these volumes: no lease that is not settled,
/// nothing half-made, replaced or doomed, no device, mount or directory that nobody needs.
#[track_caller]
pub fn settled(kind: Kind, store: &str, volumes: &[Known<'_>]) -> Census {
    let since = Instant::now();
    loop {
        let before = signs(store);
        let census = Census::of(kind, store);
        let complaints = census.complaints(volumes);
        if complaints.is_empty() {
            return census;
        }
        assert!(
            since.elapsed() < SETTLED,
            "left over, with {volumes:?}:\n{}",
            complaints.join("\n")
        );
        let again = Instant::now() + Duration::from_secs(2);
        let pause = Duration::from_millis(20);
        std::thread::sleep(pause);
        while kind == Kind::Lvm && signs(store) == before && Instant::now() < again {
            std::thread::sleep(pause);
        }
    }
}

/// Waits until LVM knows all thin devices that the pool has.
#[track_caller]
pub fn no_lost_ids(kind: Kind, store: &str) {
    let since = Instant::now();
    loop {
        let in_pool = Census::of(kind, store).ids_in_pool();
        // What was made in the meantime is known by now.
        let known = Census::of(kind, store).ids();
        let lost = in_pool.map(|ids| ids.difference(&known).copied().collect::<Vec<_>>());
        if lost.as_ref().is_some_and(Vec::is_empty) {
            return;
        }
        assert!(
            since.elapsed() < SETTLED,
            "thin devices that LVM does not know: {lost:?}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What shows that a thin pool or its mounts have changed, and takes no process to look at: a guest has better to do than to
/// run `lvs` over and over. LVM writes the group's description at each commit.
fn signs(vg: &str) -> impl PartialEq {
    let description = fs::metadata(Path::new("/etc/lvm/backup").join(vg));
    let written = description.and_then(|file| file.modified()).ok();
    (written, dm_devices(), mounts())
}

/// A device with what an entry holds, that cannot be written to.
enum ReadOnly {
    /// Beside LVM, which would bring up and take down the volume itself: that takes it ten times as long.
    Thin,
    Loop(PathBuf),
    Rbd(ceph::Mapped),
}

impl ReadOnly {
    /// Of which there is one at a time.
    const NAME: &str = "looked-at";

    fn new(store: &Store, entry: &str) -> Self {
        match store {
            Store::Pool { vg, pool, volumes } => {
                let pool_device = format!("/dev/mapper/{}-{}-tpool", dm(vg), dm(pool));
                if !Path::new(&pool_device).exists() {
                    run("lvchange", ["-q", "-ay", &format!("{vg}/{pool}")]);
                }
                let (id, sectors) = volumes[entry];
                let table = format!("0 {sectors} thin {pool_device} {id}");
                let create = ["create", "--readonly", Self::NAME, "--table", &table];
                run("dmsetup", create);
                Self::Thin
            }
            Store::Directory(store) => {
                // A copy, so that the daemon does not see the device.
                let copy = store.with_file_name("copy");
                let image = store.join(entry).join("image");
                let reflink = "--reflink=always".as_ref();
                run("cp", [reflink, image.as_os_str(), copy.as_os_str()]);
                let options = ["--read-only", "--find", "--show"].map(AsRef::as_ref);
                let device = run("losetup", options.into_iter().chain([copy.as_os_str()]));
                Self::Loop(device.trim().into())
            }
            Store::Namespace(volumes) => {
                let (image, snapshot) = ceph::image_of(&volumes[entry]);
                Self::Rbd(ceph::Mapped::new(image, snapshot, &["--read-only"]))
            }
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Thin => Path::new("/dev/mapper").join(Self::NAME),
            Self::Loop(device) => device.clone(),
            Self::Rbd(device) => device.0.clone(),
        }
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        match self {
            Self::Thin => _ = outcome("dmsetup", ["remove", "--retry", Self::NAME]),
            Self::Loop(device) => {
                outcome("losetup", ["--detach".as_ref(), device.as_os_str()]);
            }
            Self::Rbd(_) => {}
        }
    }
}

/// A name as device-mapper has it.
fn dm(name: &str) -> String {
    name.replace('-', "--")
}

/// Where volumes are mounted, and what is mounted in those.
pub fn mounts() -> BTreeSet<PathBuf> {
    lvm_cache_friend::mount::table()
        .unwrap()
        .into_iter()
        .map(|mount| mount.at)
        .filter(|at| at.starts_with(MOUNT_DIR) && at != Path::new(MOUNT_DIR))
        .collect()
}

/// A second mount of a volume's file system, as a mount namespace somewhere may have one.
pub struct Held {
    at: tempfile::TempDir,
}

impl Held {
    pub fn new(site: &Site, mount: &Path) -> Self {
        let at = tempfile::tempdir_in(site.dir.path()).unwrap();
        run(
            "mount",
            ["--bind".as_ref(), mount.as_os_str(), at.path().as_os_str()],
        );
        Self { at }
    }

    pub fn path(&self) -> &Path {
        self.at.path()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        outcome("umount", [self.at.path()]);
    }
}

fn thin_pool(vg: &str) -> Census {
    let fields = "lv_name,lv_tags,pool_lv,thin_id,lv_size";
    let units = ["--units", "s", "--nosuffix"];
    let report = ["--reportformat", "json", "-o", fields, vg];
    let report = run("lvs", units.into_iter().chain(report));
    let report: Value = serde_json::from_str(&report).unwrap();
    let mut lvs = BTreeMap::new();
    let mut volumes = BTreeMap::new();
    let mut pool = String::new();
    for row in report["report"][0]["lv"].as_array().unwrap() {
        let field = |name: &str| row[name].as_str().unwrap().to_owned();
        if field("pool_lv").is_empty() {
            pool = field("lv_name");
            continue;
        }
        let tags = field("lv_tags");
        let tags = tags
            .split(',')
            .filter(|tag| !tag.is_empty())
            .map(str::to_owned);
        lvs.insert(field("lv_name"), tags.collect());
        let number = |name: &str| field(name).parse().unwrap();
        volumes.insert(field("lv_name"), (number("thin_id"), number("lv_size")));
    }
    let (mut active, mut strays) = (BTreeSet::new(), Vec::new());
    let of_pool = format!("{}-{}", dm(vg), dm(&pool));
    for name in dm_devices() {
        let lv = name.strip_prefix(&format!("{}-", dm(vg)));
        match lv.map(|lv| lv.replace("--", "-")) {
            Some(lv) if lvs.contains_key(&lv) => {
                active.insert(lv);
            }
            Some(_) if !name.starts_with(&of_pool) => strays.push(format!("device {name}")),
            _ => {}
        }
    }
    Census {
        store: Store::Pool {
            vg: vg.to_owned(),
            pool,
            volumes,
        },
        lvs,
        active,
        strays,
    }
}

/// The kernel's device-mapper devices, as sysfs has them.
fn dm_devices() -> Vec<String> {
    let name = |device: fs::DirEntry| fs::read_to_string(device.path().join("dm/name")).ok();
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let names = devices.filter_map(name);
    names.map(|name| name.trim().to_owned()).collect()
}

fn clones() -> Census {
    let (volumes, images) = (ceph::listed("volume"), ceph::listed("image"));
    let mut needed: BTreeSet<&str> = images
        .values()
        .filter_map(|image| image["parent"]["image"].as_str())
        .collect();
    needed.extend(volumes.values().map(|volume| ceph::image_of(volume).0));
    let mut strays: Vec<_> = images
        .iter()
        .filter(|(name, image)| !image["maker"].is_null() || !needed.contains(name.as_str()))
        .map(|(name, image)| format!("image {name}: {image}"))
        .collect();
    let mut active = BTreeSet::new();
    for image in ceph::mapped() {
        let owner = volumes
            .iter()
            .find(|(_, volume)| ceph::image_of(volume) == (image.as_str(), None));
        match owner {
            Some((name, _)) => _ = active.insert(name.clone()),
            None => strays.push(format!("device of image {image}")),
        }
    }
    let tags = |volume: &Value| {
        let tags = volume["tags"].as_array().unwrap().iter();
        tags.map(|tag| tag.as_str().unwrap().to_owned()).collect()
    };
    Census {
        lvs: volumes
            .iter()
            .map(|(name, volume)| (name.clone(), tags(volume)))
            .collect(),
        active,
        strays,
        store: Store::Namespace(volumes),
    }
}

fn images(store: &Path) -> Census {
    let mut census = Census {
        store: Store::Directory(store.to_owned()),
        lvs: BTreeMap::new(),
        active: BTreeSet::new(),
        strays: Vec::new(),
    };
    for entry in fs::read_dir(store).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        // A volume may go while it is looked at.
        let place = store.join(&name);
        let record = fs::read_to_string(place.join("tags.json")).unwrap_or_default();
        // Whatever is in `~new` is no volume yet.
        let record = serde_json::from_str::<Value>(&record).ok();
        if let Some(record) = record.filter(|_| !name.starts_with('~')) {
            let tags = record["tags"].as_array().unwrap().iter();
            let tags = tags.map(|tag| tag.as_str().unwrap().to_owned());
            census.lvs.insert(name, tags.collect());
            for file in fs::read_dir(place).into_iter().flatten() {
                let file = file.unwrap().path();
                if !file.ends_with("image") && !file.ends_with("tags.json") {
                    census.strays.push(file.display().to_string());
                }
            }
        } else if !["~seq", "~lock", "~daemon"].contains(&name.as_str()) {
            census.strays.push(place.display().to_string());
        }
    }
    for line in run(
        "losetup",
        ["--list", "--noheadings", "--output", "NAME,BACK-FILE"],
    )
    .lines()
    {
        // One that is just being made or taken down, by anybody on this machine, has no file.
        let Some((device, file)) = line.trim().split_once(char::is_whitespace) else {
            continue;
        };
        let Ok(below) = Path::new(file.trim()).strip_prefix(store) else {
            continue;
        };
        match below
            .to_str()
            .and_then(|below| below.strip_suffix("/image"))
        {
            Some(lv) if census.lvs.contains_key(lv) => {
                census.active.insert(lv.to_owned());
            }
            _ => census.strays.push(format!("{device} of {file}")),
        }
    }
    census
}
