// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What there is on this host, as it was found. Nothing is judged here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::utsname::uname;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cache::record::Role;
use crate::config::{ConfigError, Settings, StoreConfig};
use crate::docker::Docker;
use crate::exec::{self, ExecError};
use crate::http::client::{self, ClientError};
use crate::mount::{self, MountPoint};
use crate::plugin::wire::Stats;
use crate::podman;
use crate::selinux::{self, LabelError, Labels, Setting};
use crate::storage::{self, Capacity, Listing, Trouble, lvm, rbd};
use crate::supervisor::config::Supervise;
use crate::supervisor::github::Auth;
use crate::supervisor::run;
use crate::supervisor::secret::Source;
use crate::text::unix_now;
use crate::views::rows::Rows;

/// The units' names.
pub const SERVICE: &str = "lvm-cache-friend.service";
/// See [`SERVICE`].
pub const SOCKET: &str = "lvm-cache-friend.socket";
/// It.
pub const TIMER: &str = "lvm-cache-friend-gc.timer";

/// See [`SERVICE`].
pub const SUPERVISOR: &str = "lvm-cache-friend-supervise.service";

/// What the driver is called in Podman's configuration, and our volumes' driver.
pub const DRIVER: &str = "lvm-cache-friend";

/// How long Podman may take, in seconds: it waits for locks of containers that start, and `info` asks
/// the package manager of each program that it runs.
const PODMAN_SECONDS: &str = "60";

/// How long the daemon may take: systemd may have to start it first.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(10);

/// Where dockerd looks for plugins that it did not install (docs.docker.com, "Plugin discovery").
const DOCKER_SPECS: [&str; 2] = [
    "/etc/docker/plugins/lvm-cache-friend.spec",
    "/usr/lib/docker/plugins/lvm-cache-friend.spec",
];

/// All of it. What could not be found out says why.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The configuration's path, and what it says.
    pub config_file: PathBuf,
    pub config: Config,
    pub tools: Vec<Tool>,
    pub kernel: Kernel,
    /// `None`: no configuration names one.
    pub store: Option<Result<Store, String>>,
    /// The configuration, what lies beside it, and where it lies.
    pub files: Vec<FileFact>,
    pub socket: Option<FileFact>,
    /// The group that the configuration gives it to.
    pub socket_gid: Option<Result<u32, String>>,
    pub daemon: Daemon,
    /// The directory that the volumes are mounted in.
    pub mount_dir: Option<FileFact>,
    /// The mount that the volumes are mounted on.
    pub mount_root: Option<MountPoint>,
    /// `None`: it is not installed.
    pub podman: Option<Podman>,
    /// What the configuration says of it, and what there is; `None`: nothing.
    pub supervisor: Option<Result<Supervisor, String>>,
    /// Whether dockerd is installed or runs.
    pub dockerd: bool,
    /// The plugin's spec that it would read, and its text.
    pub docker_spec: Option<(PathBuf, String)>,
    /// `None`: it is off.
    pub selinux: Option<Selinux>,
    /// Its version, as its API says; `None`: no configuration has it asked.
    pub docker_api: Option<Result<String, String>>,
    pub clock: Clock,
    /// Each unit's properties; `None`: systemd does not run here.
    pub units: Option<Result<Units, String>>,
}

/// Units' properties, by the unit's name and the property's.
pub type Units = BTreeMap<String, BTreeMap<String, String>>;

/// What became of reading the configuration.
#[derive(Debug, Clone)]
pub enum Config {
    Missing,
    Bad(String),
    Read(Box<Settings>),
}

/// A tool that is run, or the engine's.
#[derive(Debug, Clone)]
pub struct Tool {
    pub name: &'static str,
    /// Debian's package.
    pub package: &'static str,
    /// Its version, as far as it says one; `None`: not installed.
    pub version: Option<String>,
}

#[derive(Debug, Clone)]
pub struct Kernel {
    pub release: String,
    /// Known to it, or a module that it can load.
    pub xfs: bool,
    pub thin: bool,
    pub rbd: bool,
}

/// The store, read as `list` does.
#[derive(Debug, Clone)]
pub struct Store {
    pub capacity: Capacity,
    /// What LVM does when the pool is full; `None` where there is no pool.
    pub when_full: Option<String>,
    /// The cluster's state; `None` where there is none.
    pub ceph: Option<rbd::Report>,
    /// What makes it slower than it could be.
    pub drawback: Option<String>,
    /// What else is wrong with it.
    pub troubles: Vec<Trouble>,
    pub doomed: usize,
    pub making: usize,
    pub unclear: Vec<(String, String)>,
    /// The volumes' names.
    pub volumes: BTreeSet<String>,
    /// When the newest was made, seconds since 1970.
    pub newest: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFact {
    pub path: PathBuf,
    pub uid: u32,
    pub gid: u32,
    /// The permission bits.
    pub mode: u32,
    pub kind: FileKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    File,
    Dir,
    Socket,
    Other,
}

#[derive(Debug, Clone)]
pub enum Daemon {
    /// No configuration says where it listens.
    Unknown,
    Away,
    /// Somebody listens who does not answer as it should.
    Odd(String),
    Runs {
        version: String,
        /// Its mount namespace is this command's; `None`: that could not be seen.
        same_namespace: Option<bool>,
    },
}

#[derive(Debug, Clone)]
pub struct Podman {
    pub info: Result<PodmanInfo, String>,
    pub conf: podman::Engine,
    /// Its own volumes' names.
    pub local_volumes: Result<BTreeSet<String>, String>,
    pub hooks: Vec<HookFile>,
}

#[derive(Debug, Clone, Default)]
pub struct PodmanInfo {
    pub version: String,
    pub volume_plugins: Vec<String>,
    pub event_logger: String,
}

#[derive(Debug, Clone)]
pub struct Supervisor {
    /// What `supervise --check` says, but for credentials, which its unit alone is given.
    pub check: Result<(), String>,
    pub podman_socket: PathBuf,
    /// Whether that is a socket.
    pub has_podman: bool,
    pub control_socket: PathBuf,
    /// How many slots it says that it has; `None`: nobody listens.
    pub slots: Option<Result<usize, String>>,
}

/// A hook's JSON in a directory that Podman reads.
#[derive(Debug, Clone)]
pub struct HookFile {
    pub path: PathBuf,
    pub hook: Result<Hook, String>,
}

#[derive(Debug, Clone)]
pub struct Hook {
    pub program: PathBuf,
    pub program_exists: bool,
    pub args: Vec<String>,
    pub stages: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Selinux {
    /// It refuses, and does not only tell.
    pub enforcing: bool,
    /// The configuration says that nothing is to be labelled.
    pub unwanted: bool,
    /// What the daemon labels, and how.
    pub labels: Result<Labels, LabelError>,
    /// What is mounted of ours with another label, or with none.
    pub others: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
pub struct Clock {
    pub now: u64,
    /// The kernel is told by somebody that it is right.
    pub synchronised: bool,
}

impl Facts {
    /// Looks around.
    pub fn gather(config_file: &Path) -> Self {
        let config = match Settings::load(config_file) {
            Ok(settings) => Config::Read(Box::new(settings)),
            Err(ConfigError::Missing(_)) => Config::Missing,
            Err(error) => Config::Bad(error.to_string()),
        };
        let settings = match &config {
            Config::Read(settings) => Some(&**settings),
            _ => None,
        };
        let dockerd = exec::find_tool("dockerd").is_ok() || Path::new("/run/docker.sock").exists();
        Self {
            tools: tools(settings),
            kernel: kernel(),
            store: settings.map(|settings| store(&settings.store)),
            files: files(config_file),
            socket: settings.and_then(|settings| file(&settings.socket)),
            socket_gid: settings.map(Settings::socket_gid),
            daemon: settings.map_or(Daemon::Unknown, daemon),
            mount_dir: settings.and_then(|settings| file(&settings.mount_dir)),
            mount_root: settings.and_then(|settings| mount_of(&settings.mount_dir)),
            podman: exec::find_tool("podman").is_ok().then(podman),
            supervisor: settings
                .filter(|settings| settings.supervised)
                .map(|settings| supervisor(config_file, settings)),
            dockerd,
            docker_spec: DOCKER_SPECS.iter().find_map(|path| {
                let text = fs::read_to_string(path).ok()?;
                Some((path.into(), text.trim().to_owned()))
            }),
            selinux: selinux::is_on().then(|| selinux(settings)),
            docker_api: settings
                .and_then(|settings| settings.docker_socket.as_deref())
                .filter(|_| dockerd)
                .map(docker_api),
            clock: clock(),
            units: Path::new("/run/systemd/system").exists().then(units),
            config_file: config_file.to_owned(),
            config,
        }
    }
}

fn tools(settings: Option<&Settings>) -> Vec<Tool> {
    // What says each one's version: nothing is decided by it.
    let mut wanted = vec![
        ("mkfs.xfs", "xfsprogs", &["-V"][..]),
        ("xfs_repair", "xfsprogs", &["-V"]),
        ("mkfs.ext4", "e2fsprogs", &["-V"]),
        ("e2fsck", "e2fsprogs", &["-V"]),
    ];
    if let Some(StoreConfig::Lvm(lvm)) = settings.map(|settings| &settings.store) {
        wanted.push(("lvm", "lvm2", &["version"]));
        wanted.push(("thin_check", "thin-provisioning-tools", &["-V"]));
        wanted.push(("thin_ls", "thin-provisioning-tools", &["-V"]));
        wanted.push(("dmsetup", "dmsetup", &["version"]));
        if lvm.loop_file.is_some() {
            wanted.push(("losetup", "mount", &["--version"]));
        }
    }
    wanted
        .into_iter()
        .map(|(name, package, arguments)| Tool {
            name,
            package,
            version: exec::find_tool(name).is_ok().then(|| {
                let said = exec::says(name, arguments).unwrap_or_default();
                version_in(&said).unwrap_or_else(|| "of unknown version".into())
            }),
        })
        .collect()
}

/// The first word with a number and a dot in it.
fn version_in(text: &str) -> Option<String> {
    text.split(|c: char| c.is_whitespace() || "()v,".contains(c))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
        .map(str::to_owned)
}

fn kernel() -> Kernel {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    let running = uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    );
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let modules: String = ["modules.dep", "modules.builtin"]
        .map(|list| fs::read_to_string(format!("/lib/modules/{running}/{list}")))
        .into_iter()
        .flatten()
        .collect();
    let loadable = |name: &str| {
        let file = format!("/{name}.ko");
        modules.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            path.contains(&file)
        })
    };
    Kernel {
        release,
        xfs: filesystems.split_whitespace().any(|word| word == "xfs") || loadable("xfs"),
        thin: Path::new("/sys/module/dm_thin_pool").exists() || loadable("dm-thin-pool"),
        rbd: Path::new("/sys/module/rbd").exists() || loadable("rbd"),
    }
}

fn store(config: &StoreConfig) -> Result<Store, String> {
    let (store, ceph): (Arc<dyn storage::Store>, _) = match config {
        StoreConfig::Rbd(rbd) => {
            let store = rbd.open().map_err(|e| e.to_string())?;
            let report = store.report().map_err(|e| e.to_string())?;
            (Arc::new(store), Some(report))
        }
        StoreConfig::Lvm(_) | StoreConfig::Reflink(_) => {
            (config.open().map_err(|e| e.to_string())?, None)
        }
    };
    let listing = store.list().map_err(|e| e.to_string())?;
    let when_full = match config {
        StoreConfig::Lvm(lvm) => Some(when_full(lvm.vg.as_str(), lvm.pool.as_str())?),
        StoreConfig::Reflink(_) | StoreConfig::Rbd(_) => None,
    };
    let sorted = Rows::new(&listing, None, &[]);
    let name = |(lv, why): (crate::cache::names::LvName, String)| (lv.to_string(), why);
    Ok(Store {
        capacity: listing.capacity,
        when_full,
        ceph,
        drawback: store.drawback(),
        troubles: store.troubles().map_err(|e| e.to_string())?,
        doomed: sorted.doomed,
        making: sorted.making,
        unclear: sorted.unclear.into_iter().map(name).collect(),
        volumes: volumes(&listing),
        newest: listing.lvs.iter().map(|lv| lv.created).max().unwrap_or(0),
    })
}

fn volumes(listing: &Listing) -> BTreeSet<String> {
    let name = |role| match role {
        Role::Volume { volume, .. } => volume.map(|name| name.to_string()),
        _ => None,
    };
    let lvs = listing.lvs.iter();
    lvs.filter_map(|lv| name(Role::from_tags(&lv.tags)))
        .collect()
}

fn when_full(vg: &str, pool: &str) -> Result<String, String> {
    let said = exec::run(
        "lvm",
        [
            "lvs",
            "--reportformat=json",
            &lvm::plain_report(),
            "--options=lv_when_full",
            &format!("{vg}/{pool}"),
        ],
    )
    .map_err(|e| e.to_string())?;
    let said: Value = serde_json::from_slice(&said).map_err(|e| e.to_string())?;
    let value = said.pointer("/report/0/lv/0/lv_when_full");
    let value = value.and_then(Value::as_str);
    value
        .map(str::to_owned)
        .ok_or("LVM does not report it".into())
}

fn file(path: &Path) -> Option<FileFact> {
    let meta = fs::symlink_metadata(path).ok()?;
    let kind = meta.file_type();
    Some(FileFact {
        path: path.to_owned(),
        uid: meta.uid(),
        gid: meta.gid(),
        mode: meta.mode() & 0o7777,
        kind: if kind.is_file() {
            FileKind::File
        } else if kind.is_dir() {
            FileKind::Dir
        } else if kind.is_socket() {
            FileKind::Socket
        } else {
            FileKind::Other
        },
    })
}

/// The configuration's directory and what is in it. Of any other directory than one of ours,
/// the configuration alone.
fn files(config: &Path) -> Vec<FileFact> {
    let Some(dir) = config.parent() else {
        return Vec::new();
    };
    let mut paths = vec![dir.to_owned()];
    if dir.file_name().is_some_and(|name| name == DRIVER) {
        let inside = fs::read_dir(dir).into_iter().flatten().flatten();
        paths.extend(inside.map(|entry| entry.path()));
    } else {
        paths.push(config.to_owned());
    }
    paths.sort();
    paths.iter().filter_map(|path| file(path)).collect()
}

fn daemon(settings: &Settings) -> Daemon {
    match client::call(&settings.socket, "Friend.Stats", &json!({}), DAEMON_TIMEOUT) {
        Ok(said) => match Stats::deserialize(&said) {
            Ok(said) => {
                let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
                let theirs = namespace(&said.pid.to_string());
                Daemon::Runs {
                    version: said.version,
                    same_namespace: theirs.map(|theirs| Some(theirs) == namespace("self")),
                }
            }
            Err(error) => Daemon::Odd(error.to_string()),
        },
        Err(ClientError::NotRunning) => Daemon::Away,
        Err(error) => Daemon::Odd(error.to_string()),
    }
}

/// The mount that `dir`, or what there is of the path to it, lies on.
fn mount_of(dir: &Path) -> Option<MountPoint> {
    let there = dir.ancestors().find(|dir| dir.exists())?;
    let there = there.canonicalize().ok()?;
    let mounts = mount::table().ok()?;
    let upon = mounts
        .into_iter()
        .enumerate()
        .filter(|(_, mount)| there.starts_with(&mount.at));
    // Of several at one place the last is the one that shows.
    upon.max_by_key(|(order, mount)| (mount.at.components().count(), *order))
        .map(|(_, mount)| mount)
}

fn selinux(settings: Option<&Settings>) -> Selinux {
    let setting = settings.map_or(Setting::Policy, |s| s.selinux_context.clone());
    let labels = Labels::of_host(&setting);
    let mut others = Vec::new();
    if let (Some(settings), Ok(labels)) = (settings, &labels) {
        let want = labels.mounts.as_ref().map(selinux::Label::as_str);
        let ours = mount::table().unwrap_or_default().into_iter();
        let ours =
            ours.filter(|m| m.at != settings.mount_dir && m.at.starts_with(&settings.mount_dir));
        others.extend(ours.filter(|m| m.label.as_deref() != want).map(|m| m.at));
    }
    Selinux {
        enforcing: selinux::is_enforcing().unwrap_or(true),
        unwanted: setting == Setting::None,
        labels,
        others,
    }
}

fn podman() -> Podman {
    let conf = podman::engine();
    Podman {
        info: podman_says(&["info", "--format=json"]).and_then(|said| info(&said)),
        // By driver: what Podman shows of all volumes fails as a whole while a plugin is away.
        local_volumes: podman_says(&["volume", "ls", "--filter=driver=local", "--format=json"])
            .and_then(|said| local_volumes(&said)),
        hooks: hooks(&conf.hooks_dir),
        conf,
    }
}

fn docker_api(socket: &Path) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|e| e.to_string())?;
    let version = runtime.block_on(Docker::new(socket).version());
    version.map_err(|e| e.to_string())
}

fn supervisor(config: &Path, settings: &Settings) -> Result<Supervisor, String> {
    let mut supervise = Supervise::load(config).map_err(|error| error.to_string())?;
    supervise.pools.retain(|pool| {
        let (Auth::Token(secret) | Auth::App { key: secret, .. }) = &pool.auth;
        matches!(secret, Source::File(_))
    });
    let socket = &supervise.control_socket;
    let slots = match client::call(socket, "Runners.List", &json!({}), DAEMON_TIMEOUT) {
        Ok(Value::Array(slots)) => Some(Ok(slots.len())),
        Ok(_) => Some(Err("no list".to_owned())),
        Err(ClientError::NotRunning) => None,
        Err(error) => Some(Err(error.to_string())),
    };
    let podman = file(&supervise.podman_socket);
    Ok(Supervisor {
        check: run::check(settings, &supervise).map_err(|error| error.to_string()),
        has_podman: podman.is_some_and(|file| file.kind == FileKind::Socket),
        podman_socket: supervise.podman_socket,
        control_socket: supervise.control_socket,
        slots,
    })
}

/// What Podman says, within its time.
fn podman_says(arguments: &[&str]) -> Result<Value, String> {
    let words = [&[PODMAN_SECONDS, "podman"], arguments].concat();
    let said = exec::run("timeout", words).map_err(|error| match &error {
        ExecError::Failed { status, .. } if status.code() == Some(124) => {
            format!("podman did not answer within {PODMAN_SECONDS} s")
        }
        _ => error.to_string(),
    })?;
    serde_json::from_slice(&said)
        .map_err(|e| format!("podman printed something else than JSON: {e}"))
}

fn info(said: &Value) -> Result<PodmanInfo, String> {
    let text = |at: &str| said.pointer(at).and_then(Value::as_str).map(str::to_owned);
    let plugins = said.pointer("/plugins/volume").and_then(Value::as_array);
    Ok(PodmanInfo {
        version: text("/version/Version").ok_or("podman info has no version")?,
        event_logger: text("/host/eventLogger").unwrap_or_default(),
        volume_plugins: plugins
            .into_iter()
            .flatten()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect(),
    })
}

fn local_volumes(said: &Value) -> Result<BTreeSet<String>, String> {
    let volumes = said.as_array().ok_or("podman volume ls printed no list")?;
    let local = volumes.iter().filter(|volume| volume["Driver"] == "local");
    Ok(local
        .filter_map(|volume| volume["Name"].as_str().map(str::to_owned))
        .collect())
}

/// The hooks' files in `dirs`, of which a later one's hide those of the same name before it.
fn hooks(dirs: &[PathBuf]) -> Vec<HookFile> {
    let mut paths = BTreeMap::new();
    for dir in dirs {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                paths.insert(entry.file_name(), path);
            }
        }
    }
    let read = |path: PathBuf| HookFile {
        hook: fs::read_to_string(&path)
            .map_err(|e| e.to_string())
            .and_then(|text| hook(&text)),
        path,
    };
    paths.into_values().map(read).collect()
}

/// See oci-hooks(5), version 1.0.0.
fn hook(text: &str) -> Result<Hook, String> {
    #[derive(Deserialize)]
    struct Document {
        hook: Runs,
        stages: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Runs {
        path: PathBuf,
        #[serde(default)]
        args: Vec<String>,
    }
    let document: Document = serde_json::from_str(text).map_err(|e| e.to_string())?;
    Ok(Hook {
        program_exists: document.hook.path.exists(),
        program: document.hook.path,
        args: document.hook.args,
        stages: document.stages,
    })
}

fn clock() -> Clock {
    // SAFETY: all-zero is a valid timex, in which no mode asks for a change.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes into a timex that is ours.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    Clock {
        now: unix_now(),
        synchronised: state >= 0 && timex.status & libc::STA_UNSYNC == 0,
    }
}

fn units() -> Result<Units, String> {
    let said =
        exec::run("systemctl", ["show", SERVICE, SOCKET, TIMER]).map_err(|e| e.to_string())?;
    Ok(properties(&String::from_utf8_lossy(&said)))
}

/// What `systemctl show` says of several units: `NAME=VALUE` lines, blank ones between units.
fn properties(said: &str) -> Units {
    let unit = |lines: &str| -> BTreeMap<String, String> {
        let pairs = lines.lines().filter_map(|line| line.split_once('='));
        pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    said.split("\n\n")
        .map(unit)
        .filter_map(|properties| Some((properties.get("Id")?.clone(), properties)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (said, want) in [
            ("mkfs.xfs version 6.1.0", Some("6.1.0")),
            ("mke2fs 1.47.0 (5-Feb-2023)", Some("1.47.0")),
            (
                "  LVM version:     2.03.16(2) (2022-05-18)",
                Some("2.03.16"),
            ),
            ("0.9.0", Some("0.9.0")),
            ("runc v1.1.5", Some("1.1.5")),
            ("", None),
            ("nothing of 7 of them", None),
        ] {
            assert_eq!(version_in(said).as_deref(), want, "{said:?}");
        }
    }

    #[test]
    fn what_podman_says() {
        let said = json!({
            "version": {"Version": "4.3.1"}, "host": {"eventLogger": "journald"},
            "plugins": {"volume": ["local", "lvm-cache-friend"]},
        });
        let info = info(&said).unwrap();
        assert_eq!(info.volume_plugins, ["local", "lvm-cache-friend"]);
        assert_eq!((&*info.version, &*info.event_logger), ("4.3.1", "journald"));
        assert!(super::info(&json!({})).is_err());

        let said = json!([{"Name": "a", "Driver": "local"}, {"Name": "b", "Driver": "image"}]);
        assert_eq!(local_volumes(&said).unwrap(), ["a".to_owned()].into());
        assert!(local_volumes(&json!({})).is_err());
    }

    #[test]
    fn hooks_of_all_directories() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let json = |path: &str| {
            json!({"version": "1.0.0", "hook": {"path": path, "args": ["a", "hook", "poststop"]},
                   "when": {"always": true}, "stages": ["poststop"]})
            .to_string()
        };
        fs::write(dirs[0].path().join("1.json"), json("/none")).unwrap();
        fs::write(dirs[0].path().join("2.json"), "{").unwrap();
        fs::write(dirs[0].path().join("3.txt"), "{").unwrap();
        fs::write(dirs[1].path().join("1.json"), json("/proc")).unwrap();
        let missing = PathBuf::from("/no/such/directory");
        let found = hooks(&[dirs[0].path().into(), missing, dirs[1].path().into()]);
        let [first, second] = &found[..] else {
            panic!("{found:?}");
        };
        let hook = first.hook.as_ref().unwrap();
        assert!(hook.program_exists && hook.program == Path::new("/proc"));
        assert!(second.hook.is_err());
    }

    #[test]
    fn units_by_their_names() {
        let said = "Id=a.service\nActiveState=active\nExecStart={ path=/a ; argv[]=a=b }\n\nId=b.socket\nActiveState=\n";
        let units = properties(said);
        assert_eq!(units["a.service"]["ActiveState"], "active");
        assert_eq!(units["b.socket"]["ActiveState"], "");
        assert_eq!(units.len(), 2);
    }
}
