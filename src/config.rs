// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration file, parsed and validated once: past here nothing is.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

use crate::cache::evict::{Floor, Limits, Policy};
use crate::cache::names::LvName;
use crate::cache::spec;
use crate::cache::units::Bytes;
use crate::http::socket::{Lock, SocketError};
use crate::logging::LogLevel;
use crate::selinux;
use crate::storage::lvm::{self, LvmStore};
use crate::storage::reflink::ReflinkStore;
use crate::storage::{Store, StoreError};

/// Where the file is looked for.
pub const DEFAULT_FILE: &str = "/etc/lvm-cache-friend/config.toml";

/// Where everything of one boot lives.
pub const RUN_DIR: &str = "/run/lvm-cache-friend";

/// The mode of the directory that volumes are mounted in.
pub const MOUNT_DIR_MODE: u32 = 0o750;

/// Where dockerd listens.
const DOCKER_SOCKET: &str = "/run/docker.sock";

/// Longest path of a unix socket, in bytes: sizeof sun_path less the final NUL,
/// and one for the name that it is bound under at first.
const MAX_SOCKET_PATH: usize = 106;

/// Which store, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// A thin pool.
    Lvm(Lvm),
    /// Image files.
    Reflink(Reflink),
}

/// A thin pool in a volume group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Lvm {
    /// The volume group.
    #[serde(deserialize_with = "parsed")]
    pub vg: LvName,
    /// The thin pool in it.
    #[serde(deserialize_with = "parsed")]
    pub pool: LvName,
    /// The file whose loop device is the group's only disk, when `init --loop`
    /// made it.
    #[serde(default, deserialize_with = "absolute_if_any")]
    pub loop_file: Option<PathBuf>,
}

/// Image files in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Reflink {
    /// The directory, on XFS with reflinks or btrfs.
    #[serde(deserialize_with = "absolute")]
    pub dir: PathBuf,
}

/// What the file says, as it stands there.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Document {
    lvm: Option<Lvm>,
    reflink: Option<Reflink>,
    #[serde(default = "default_socket", deserialize_with = "socket_path")]
    socket: PathBuf,
    #[serde(default = "default_group")]
    socket_group: String,
    #[serde(default = "default_docker", deserialize_with = "socket_if_any")]
    docker_socket: Option<PathBuf>,
    #[serde(default = "default_mount_dir", deserialize_with = "absolute")]
    mount_dir: PathBuf,
    #[serde(default, deserialize_with = "loopback")]
    status_address: Option<SocketAddr>,
    #[serde(default, deserialize_with = "parsed")]
    selinux_context: selinux::Setting,
    #[serde(default = "default_premounted")]
    premounted: usize,
    #[serde(default = "default_scratch", deserialize_with = "parsed")]
    scratch_size: Bytes,
    #[serde(default = "default_empty", deserialize_with = "parsed")]
    empty_size: Bytes,
    #[serde(default = "default_stop", deserialize_with = "duration")]
    stop_timeout: Duration,
    #[serde(default)]
    log_level: LogLevel,
    #[serde(default)]
    job: JobLimits,
    #[serde(default)]
    policy: PolicyTable,
    /// The supervisor's alone ([`crate::supervisor::config`]): a mistake there keeps neither the daemon nor
    /// a hook from its work.
    supervise: Option<de::IgnoredAny>,
}

/// The bounds of the store, as they stand in the file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct PolicyTable {
    max_entries: Option<usize>,
    #[serde(deserialize_with = "duration_if_any")]
    max_age: Option<Duration>,
    #[serde(deserialize_with = "duration_if_any")]
    max_unused: Option<Duration>,
    #[serde(deserialize_with = "parsed")]
    data_floor: Floor,
    #[serde(deserialize_with = "parsed")]
    metadata_floor: Floor,
    #[serde(deserialize_with = "parsed")]
    group_floor: Floor,
    #[serde(deserialize_with = "parsed")]
    cut_off: Floor,
    #[serde(deserialize_with = "duration")]
    keep_used: Duration,
    scope: BTreeMap<String, LimitsTable>,
}

/// Limits of one scope.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct LimitsTable {
    max_entries: Option<usize>,
    #[serde(deserialize_with = "duration_if_any")]
    max_age: Option<Duration>,
    #[serde(deserialize_with = "duration_if_any")]
    max_unused: Option<Duration>,
}

impl Default for PolicyTable {
    fn default() -> Self {
        let Policy {
            all,
            data,
            metadata,
            group,
            cut_off,
            ..
        } = Policy::default();
        Self {
            max_entries: all.max_entries,
            max_age: all.max_age,
            max_unused: all.max_unused,
            data_floor: data,
            metadata_floor: metadata,
            group_floor: group,
            cut_off,
            keep_used: Duration::from_secs(600),
            scope: BTreeMap::new(),
        }
    }
}

impl PolicyTable {
    fn policy(self) -> Result<Policy, String> {
        let mut policy = Policy {
            all: Limits {
                max_entries: self.max_entries,
                max_age: self.max_age,
                max_unused: self.max_unused,
            },
            data: self.data_floor,
            metadata: self.metadata_floor,
            group: self.group_floor,
            cut_off: self.cut_off,
            ..Policy::default()
        };
        for (name, table) in self.scope {
            let limits = Limits {
                max_entries: table.max_entries,
                max_age: table.max_age,
                max_unused: table.max_unused,
            };
            if name == EACH_SCOPE {
                policy.each_scope = limits;
            } else {
                let scope = spec::scope(&name).map_err(|why| {
                    format!(
                        "policy.scope.{name:?}: {why}; or \"*\" for each scope that is not named"
                    )
                })?;
                policy.scopes.insert(scope, limits);
            }
        }
        Ok(policy)
    }
}

/// Stands for each scope that has no limits of its own: no tag has a `*`.
const EACH_SCOPE: &str = "*";

/// What one job may do at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct JobLimits {
    /// Bytes of a line.
    pub line: usize,
    /// Criteria of a request.
    pub criteria: usize,
    /// Terms and tags of a request.
    pub terms: usize,
    /// Caches mounted at once.
    pub mounts: usize,
    /// Checkpoints in one use of the job volume (after a restart of the daemon, from then on). At
    /// its end each mount may be published once more.
    pub saves: usize,
    /// Changes to the store a minute: a mount and a checkpoint are three each.
    pub changes: u32,
    /// Bytes of tags in one use of the job volume, of all that it mounts and saves.
    #[serde(deserialize_with = "parsed")]
    pub tags: Bytes,
    /// Connections at once.
    pub connections: usize,
    /// From a request's first byte to its last.
    #[serde(deserialize_with = "duration")]
    pub request_time: Duration,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            line: 4096,
            // The action's: a key, the same as a beginning, and 10 restore keys.
            criteria: 12,
            terms: 64,
            mounts: 32,
            saves: 16,
            changes: 60,
            // The action's key and version, of 600 bytes, for each mount and each checkpoint.
            tags: Bytes(32 << 10),
            connections: 64,
            request_time: Duration::from_secs(30),
        }
    }
}

fn default_socket() -> PathBuf {
    Path::new(RUN_DIR).join("plugin.sock")
}

fn default_docker() -> Option<PathBuf> {
    Some(DOCKER_SOCKET.into())
}

/// The group that the packages create for the plugin's socket (sysusers.d). Where it is missing, root's stands in.
const GROUP: &str = "lvm-cache-friend";

fn default_group() -> String {
    GROUP.into()
}

fn default_mount_dir() -> PathBuf {
    Path::new(RUN_DIR).join("mnt")
}

const fn default_premounted() -> usize {
    32
}

const fn default_scratch() -> Bytes {
    Bytes(Bytes::GIB)
}

const fn default_empty() -> Bytes {
    Bytes(10 * Bytes::GIB)
}

const fn default_stop() -> Duration {
    Duration::from_secs(30)
}

/// The validated configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The store.
    pub store: StoreConfig,
    /// Where the plugin's socket is, unless systemd hands one over.
    pub socket: PathBuf,
    /// Group that may connect to it: a name or a number.
    pub socket_group: String,
    /// The socket of Docker's API, which says how its containers ended; `None`: it is not asked.
    pub docker_socket: Option<PathBuf>,
    /// Where volumes are mounted.
    pub mount_dir: PathBuf,
    /// Where metrics and the status page are shown beside the plugin's socket.
    pub status_address: Option<SocketAddr>,
    /// Which label of SELinux's is on all that containers see.
    pub selinux_context: selinux::Setting,
    /// How many volumes are kept mounted, detached, while nothing uses them.
    pub premounted: usize,
    /// Size of a scratch directory where the volume names none.
    pub scratch_size: Bytes,
    /// Virtual size of a volume that starts empty, where neither it nor a base
    /// says one.
    pub empty_size: Bytes,
    /// How long work that is under way may take after SIGTERM.
    pub stop_timeout: Duration,
    /// What is logged.
    pub log_level: LogLevel,
    /// What one job may do on its socket.
    pub job: JobLimits,
    /// The bounds of the store.
    pub policy: Policy,
    /// For how long an entry is kept in any case that something was restored from.
    pub keep_used: Duration,
    /// Whether there is a supervisor to be heard of.
    pub supervised: bool,
}

/// The configuration cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is none.
    #[error("{}: no such file: create it with `lvm-cache-friend init`, or name another with --config", .0.display())]
    Missing(PathBuf),
    /// It cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It does not say what it should.
    #[error("{}: {problem}", .path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// The line, what is wrong there, and what is accepted.
        problem: String,
    },
}

impl StoreConfig {
    /// Keeps every other daemon, and commands that change a volume, off a store.
    ///
    /// # Errors
    /// `SocketError::Locked` while a daemon has it.
    pub fn lock(&self) -> Result<Lock, SocketError> {
        match self {
            Self::Lvm(lvm) => {
                // Both names are of LVM's alphabet: safe in a file's name.
                let file = format!("{}-{}.lock", lvm.vg, lvm.pool);
                Lock::file(&Path::new(RUN_DIR).join(file))
            }
            // A name that no image can have, as the store's own files beside it.
            Self::Reflink(reflink) => Lock::file(&reflink.dir.join("~daemon")),
        }
    }

    /// Opens the store.
    ///
    /// # Errors
    /// When it is not there, or its tools are not.
    pub fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Lvm(lvm) => {
                if let Some(file) = &lvm.loop_file {
                    lvm::ensure_loop(file)?;
                }
                let (vg, pool) = (lvm.vg.as_str(), lvm.pool.as_str());
                Arc::new(LvmStore::open(vg, pool, Path::new(RUN_DIR))?)
            }
            Self::Reflink(reflink) => Arc::new(ReflinkStore::open(&reflink.dir)?),
        })
    }
}

impl std::fmt::Display for StoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lvm(Lvm {
                vg,
                pool,
                loop_file: None,
            }) => write!(f, "thin pool {vg}/{pool}"),
            Self::Lvm(Lvm {
                vg,
                pool,
                loop_file: Some(file),
            }) => write!(f, "thin pool {vg}/{pool} in the file {}", file.display()),
            Self::Reflink(Reflink { dir }) => write!(f, "image files in {}", dir.display()),
        }
    }
}

impl Settings {
    /// Reads and validates `file`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ConfigError::Missing(file.to_owned()));
            }
            Err(source) => {
                return Err(ConfigError::Io {
                    path: file.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text).map_err(|problem| ConfigError::Bad {
            path: file.to_owned(),
            problem,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let document: Document =
            toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
        let store = match (document.lvm, document.reflink) {
            (Some(lvm), None) => StoreConfig::Lvm(lvm),
            (None, Some(reflink)) => StoreConfig::Reflink(reflink),
            (None, None) => {
                return Err(
                    "no store: one of the tables [lvm] (vg, pool) and [reflink] (dir) is needed"
                        .into(),
                );
            }
            (Some(_), Some(_)) => {
                return Err("two stores: [lvm] or [reflink] is needed, not both".into());
            }
        };
        Ok(Self {
            store,
            socket: document.socket,
            socket_group: document.socket_group,
            docker_socket: document.docker_socket,
            mount_dir: document.mount_dir,
            status_address: document.status_address,
            selinux_context: document.selinux_context,
            premounted: document.premounted,
            scratch_size: document.scratch_size,
            empty_size: document.empty_size,
            stop_timeout: document.stop_timeout,
            log_level: document.log_level,
            job: document.job,
            keep_used: document.policy.keep_used,
            policy: document.policy.policy()?,
            supervised: document.supervise.is_some(),
        })
    }

    /// The id of [`Settings::socket_group`]; root's, where that is the default and there is no such group.
    ///
    /// # Errors
    /// When there is no such group.
    pub fn socket_gid(&self) -> Result<u32, String> {
        if let Ok(gid) = self.socket_group.parse() {
            return Ok(gid);
        }
        match nix::unistd::Group::from_name(&self.socket_group) {
            Ok(Some(group)) => Ok(group.gid.as_raw()),
            Ok(None) if self.socket_group == GROUP => Ok(0),
            Ok(None) => Err(format!(
                "socket-group: there is no group {:?}",
                self.socket_group
            )),
            Err(errno) => Err(format!("socket-group {:?}: {errno}", self.socket_group)),
        }
    }
}

/// The settings in `file`; `None` when there is no such file.
///
/// # Errors
/// When it is there and cannot be used.
pub fn existing(file: &Path) -> Result<Option<Settings>, ConfigError> {
    match Settings::load(file) {
        Err(ConfigError::Missing(_)) => Ok(None),
        loaded => loaded.map(Some),
    }
}

/// Writes a new configuration that names `store` and shows every other setting
/// with its default: all of it or, after a crash, nothing.
///
/// # Errors
/// When it cannot be written.
pub fn write(file: &Path, store: &StoreConfig) -> Result<(), ConfigError> {
    let io = |source| ConfigError::Io {
        path: file.to_owned(),
        source,
    };
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    fs::create_dir_all(dir).map_err(io)?;
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push("~");
    let unready = file.with_file_name(name);
    let mut out = fs::File::create(&unready).map_err(io)?;
    out.write_all(text(store).as_bytes())
        .and_then(|()| out.sync_all())
        .and_then(|()| fs::rename(&unready, file))
        .and_then(|()| fs::File::open(dir)?.sync_all())
        .map_err(io)
}

/// A configuration that shows and explains every setting of the daemon, those of each store too.
#[must_use]
pub fn example() -> String {
    let name = |name: &str| name.parse().expect("made of LVM's alphabet");
    let lvm = StoreConfig::Lvm(Lvm {
        vg: name("vg0"),
        pool: name("friend-pool"),
        loop_file: Some("/var/lib/lvm-cache-friend.img".into()),
    });
    let reflink = StoreConfig::Reflink(Reflink {
        dir: "/var/lib/lvm-cache-friend".into(),
    });
    // What is not for everyone is shown behind #.
    let other = store_text(&reflink)
        .replace("[reflink]", "#[reflink]")
        .replace("dir =", "#dir =");
    text(&lvm).replace("loop-file =", "#loop-file =")
        + "\n# Or, in place of [lvm]:\n"
        + &other
        + "\n# [supervise] sets up runners for GitHub jobs: see docs/supervisor.md.\n"
}

fn text(store: &StoreConfig) -> String {
    let job = JobLimits::default();
    let store = store_text(store);
    format!(
        "# Configuration of lvm-cache-friend. A line that begins with # and a setting shows\n\
         # the default. Restart the daemon after a change.\n\
         \n\
         # The plugin's socket (systemd's socket unit overrides this), and the group whose members\n\
         # may use it: they can mount and remove every cache, and are as powerful as root. The packages\n\
         # create the default group; root's stands in where it is missing.\n\
         #socket = {socket}\n\
         #socket-group = {group}\n\
         \n\
         # The socket of Docker's API, which reports how Docker's containers ended. Empty: it is not\n\
         # used, and their results are unknown.\n\
         #docker-socket = {docker}\n\
         \n\
         # Where volumes are mounted, each in a directory of its name.\n\
         #mount-dir = {mount_dir}\n\
         \n\
         # A loopback address and port, such as 127.0.0.1:9469, where any user of this host can\n\
         # see the status page (/) and metrics (/metrics). Empty: only on the plugin's socket.\n\
         #status-address = \"\"\n\
         \n\
         # With SELinux, the label of everything in volumes; by default the policy's label for\n\
         # containers' files. \"none\": no label.\n\
         # selinux-context = \"system_u:object_r:container_file_t:s0\"\n\
         \n\
         # How many idle volumes are kept mounted, out of sight, so that a container's start need not\n\
         # wait for it. Each takes about 0.8 MB of the kernel's memory.\n\
         #premounted = {premounted}\n\
         \n\
         # Size of the directory in memory that on-error=scratch falls back to, for volumes without\n\
         # a size.\n\
         #scratch-size = {scratch}\n\
         \n\
         # Size of a volume that starts empty, if neither it nor the base image has one.\n\
         #empty-size = {empty}\n\
         \n\
         # How long the daemon finishes the work under way when it is stopped.\n\
         #stop-timeout = {stop}\n\
         \n\
         # error, warn, info, debug or trace; `--log-level` and RUST_LOG override it.\n\
         #log-level = {level}\n\
         \n\
         # Limits for one job on the socket of its job volume: bytes of a line, restore keys\n\
         # (criteria) of a request, its terms and tags, caches mounted at once, checkpoints saved in\n\
         # one use, changes to the store a minute, bytes of tags in one use, connections at once, and\n\
         # how long a request may take to arrive.\n\
         #job.line = {line}\n\
         #job.criteria = {criteria}\n\
         #job.terms = {terms}\n\
         #job.mounts = {mounts}\n\
         #job.saves = {saves}\n\
         #job.changes = {changes}\n\
         #job.tags = {tags}\n\
         #job.connections = {connections}\n\
         #job.request-time = {request_time}\n\
         \n\
         # Which entries are evicted, least recently used first: how many there may be, how long ago\n\
         # they may have been published, and last been restored. By default all are kept while there is\n\
         # room. policy.scope.\"NAME\" has the same three for the entries of a scope, \"-\" for those\n\
         # without a scope, and \"*\" for each scope that is not named.\n\
         # policy.max-entries = 1000\n\
         # policy.max-age = \"90d\"\n\
         # policy.max-unused = \"30d\"\n\
         # policy.scope.\"*\".max-entries = 50\n\
         # Free space to keep in the pool's data, in its metadata, and in the volume group's metadata\n\
         # area, as a share or a size; and how long an entry is kept in any case after it was published\n\
         # or restored.\n\
         #policy.data-floor = {data_floor}\n\
         #policy.metadata-floor = {data_floor}\n\
         #policy.group-floor = {data_floor}\n\
         #policy.keep-used = {keep_used}\n\
         # If less than this is free of the pool's data while jobs write, one of them is cut off: of those\n\
         # that wrote much, the least trusted, and of these the one that wrote most. Everything that uses\n\
         # its cache gets I/O errors, and it is not published.\n\
         #policy.cut-off = {cut_off}\n\
         \n\
         {store}",
        socket = path(&default_socket()),
        group = quoted(&default_group()),
        docker = path(Path::new(DOCKER_SOCKET)),
        mount_dir = path(&default_mount_dir()),
        premounted = default_premounted(),
        scratch = quoted("1G"),
        empty = quoted("10G"),
        stop = quoted("30s"),
        level = quoted("info"),
        line = job.line,
        criteria = job.criteria,
        terms = job.terms,
        mounts = job.mounts,
        saves = job.saves,
        changes = job.changes,
        tags = quoted("32K"),
        connections = job.connections,
        request_time = quoted("30s"),
        data_floor = quoted("10%"),
        keep_used = quoted("10m"),
        cut_off = quoted("3%"),
    )
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

/// The table that names a store.
fn store_text(store: &StoreConfig) -> String {
    match store {
        StoreConfig::Lvm(lvm) => {
            let mut table = format!(
                "# The thin pool that holds the caches, and its volume group.\n\
                 [lvm]\nvg = {}\npool = {}\n",
                quoted(lvm.vg.as_str()),
                quoted(lvm.pool.as_str())
            );
            if let Some(file) = &lvm.loop_file {
                table.push_str(&format!(
                    "# The group's only disk: a loop device on this file, attached again at each boot.\n\
                     loop-file = {}\n",
                    path(file)
                ));
            }
            table
        }
        StoreConfig::Reflink(reflink) => format!(
            "# The directory that holds the caches as image files; on XFS with reflinks, or btrfs.\n\
             [reflink]\ndir = {}\n",
            path(&reflink.dir)
        ),
    }
}

fn parsed<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: std::fmt::Display,
{
    String::deserialize(deserializer)?
        .parse()
        .map_err(de::Error::custom)
}

fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(de::Error::custom(format_args!(
            "{path:?} is not an absolute path, which begins with /"
        )))
    }
}

fn absolute_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    absolute(deserializer).map(Some)
}

fn socket_if_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.as_os_str().is_empty() {
        Ok(None)
    } else if path.is_absolute() {
        Ok(Some(path))
    } else {
        Err(de::Error::custom(format_args!(
            "{path:?} is neither empty nor an absolute path, which begins with /"
        )))
    }
}

fn socket_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = absolute(deserializer)?;
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(de::Error::custom(format_args!(
            "{path:?} is too long for a socket: at most {MAX_SOCKET_PATH} bytes"
        )));
    }
    if path.file_name().is_none() {
        return Err(de::Error::custom(format_args!("{path:?} names no file")));
    }
    Ok(path)
}

/// An address of this host alone, or nothing.
fn loopback<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(Some(address)),
        Ok(_) => Err(de::Error::custom(format_args!(
            "{text:?} is not a loopback address: as there is no password, use a web server with authentication for others"
        ))),
        Err(_) => Err(de::Error::custom(format_args!(
            "{text:?} is not an address and port: expected one such as \"127.0.0.1:9469\""
        ))),
    }
}

pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    // A day has 24 hours here, and a week 7 days; months and years have no length.
    text.parse::<jiff::Span>()
        .ok()
        .and_then(|span| {
            let days = jiff::SpanRelativeTo::days_are_24_hours();
            Duration::try_from(span.to_duration(days).ok()?).ok()
        })
        .ok_or_else(|| {
            de::Error::custom(format_args!(
                "{text:?} is not a length of time: expected one such as \"30s\", \"2m\" or \"14d\""
            ))
        })
}

fn duration_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lvm(loop_file: Option<&str>) -> StoreConfig {
        StoreConfig::Lvm(Lvm {
            vg: "vg0".parse().expect("a name"),
            pool: "friend-pool".parse().expect("a name"),
            loop_file: loop_file.map(Into::into),
        })
    }

    fn reflink(dir: &str) -> StoreConfig {
        StoreConfig::Reflink(Reflink { dir: dir.into() })
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        for (n, store) in [
            lvm(None),
            lvm(Some("/var/lib/a \"b\".img")),
            reflink("/srv/caches"),
        ]
        .iter()
        .enumerate()
        {
            let file = dir.path().join(format!("sub{n}/config.toml"));
            assert_eq!(existing(&file).expect("no file yet"), None);
            write(&file, store).expect("written");
            let settings = existing(&file).expect("readable").expect("a file");
            assert_eq!(settings.store, *store);
            assert_eq!(settings.premounted, 32);
            assert_eq!(
                fs::read_dir(file.parent().expect("it has one"))
                    .expect("readable")
                    .count(),
                1,
                "nothing is left beside it"
            );
        }
    }

    #[test]
    fn bounds_of_the_store() {
        let parse = |text: &str| Settings::parse(&format!("{text}\n[reflink]\ndir='/a'"));
        let policy = |text: &str| parse(text).map(|settings| settings.policy);
        assert_eq!(policy(""), Ok(Policy::default()));
        let days = |n: u64| Some(Duration::from_secs(n * 24 * 60 * 60));
        let scopes = "policy.max-entries=9\npolicy.max-age='2w'\npolicy.data-floor='20G'\n\
            policy.scope.'*'.max-unused='1d'\npolicy.scope.'a/b'.max-age='36h'\npolicy.scope.-.max-entries=3";
        let limits = |max_entries, max_age, max_unused| Limits {
            max_entries,
            max_age,
            max_unused,
        };
        let want = Policy {
            all: limits(Some(9), days(14), None),
            each_scope: limits(None, None, days(1)),
            scopes: [
                (None, limits(Some(3), None, None)),
                (
                    Some("a/b".parse().expect("a tag")),
                    limits(None, Some(Duration::from_secs(36 * 60 * 60)), None),
                ),
            ]
            .into(),
            data: Floor::Bytes(Bytes(20 * Bytes::GIB)),
            ..Policy::default()
        };
        assert_eq!(policy(scopes), Ok(want));
        for (text, words) in [
            ("policy.max-entries='many'", ["line 1", "many"]),
            ("policy.max-age='1 month'", ["line 1", "14d"]),
            ("policy.data-floor='99%'", ["line 1", "90%"]),
            ("policy.scope.'a b'.max-entries=3", ["a b", "letters"]),
            ("policy.scope.a.data-floor='9%'", ["line 1", "max-age"]),
        ] {
            let problem = policy(text).expect_err(text);
            for word in words {
                assert!(
                    problem.contains(word),
                    "{text}: {word:?} is not in: {problem}"
                );
            }
        }
    }

    /// With every setting that is shown behind # set.
    fn uncommented(text: &str) -> String {
        text.lines()
            .map(|line| match line.strip_prefix('#') {
                Some(setting) if !setting.starts_with(' ') => setting,
                _ => line,
            })
            .map(|line| format!("{line}\n"))
            .collect()
    }

    #[test]
    fn who_may_use_the_socket() {
        let gid = |text: &str| {
            let settings = Settings::parse(&format!("{text}\n[reflink]\ndir='/a'"));
            settings.expect("valid").socket_gid()
        };
        // Where a package is installed, as on the socket that systemd makes.
        let group = nix::unistd::Group::from_name(GROUP).expect("readable");
        assert_eq!(gid(""), Ok(group.map_or(0, |group| group.gid.as_raw())));
        assert_eq!(gid("socket-group='root'"), Ok(0));
        assert_eq!(gid("socket-group='2000'"), Ok(2000));
        let missing = gid("socket-group='no-such-group'").expect_err("none");
        assert!(missing.contains("no-such-group"), "{missing}");
        let socket = include_str!("../plugin/usr/lib/systemd/system/lvm-cache-friend.socket");
        assert!(socket.contains(&format!("\nSocketGroup={GROUP}\n")));
        let users = include_str!("../plugin/usr/lib/sysusers.d/lvm-cache-friend.conf");
        assert!(users.contains(&format!("\ng {GROUP} -\n")));
    }

    #[test]
    fn the_comments_show_the_defaults() {
        let store = reflink("/srv/caches");
        let plain = Settings::parse(&text(&store)).expect("valid");
        let uncommented = uncommented(&text(&store));
        assert_eq!(Settings::parse(&uncommented).expect("valid"), plain);
        assert_eq!(
            uncommented.matches("\n#").count(),
            text(&store).matches("\n# ").count()
        );
    }

    #[test]
    fn the_example_has_every_setting() {
        assert_eq!(Settings::parse(&example()).expect("valid").store, lvm(None));
        let all = uncommented(&example());
        let (settings, tables) = all.split_once("[lvm]").expect("the first store");
        let (first, second) = tables.split_once("[reflink]").expect("the other");
        for (store, want) in [
            (
                format!("[lvm]{first}"),
                lvm(Some("/var/lib/lvm-cache-friend.img")),
            ),
            (
                format!("[reflink]{second}"),
                reflink("/var/lib/lvm-cache-friend"),
            ),
        ] {
            let parsed = Settings::parse(&format!("{settings}{store}")).expect("valid");
            assert_eq!(parsed.store, want);
        }
    }

    #[test]
    fn what_is_refused() {
        for (text, words) in [
            ("", &["no store", "[lvm]", "[reflink]"][..]),
            (
                "[lvm]\nvg='a'\npool='b'\n[reflink]\ndir='/a'",
                &["not both"],
            ),
            ("[lvm]\nvg='a'", &["line 1", "pool"]),
            ("[lvm]\nvg='a b'\npool='p'", &["line 2", "letters"]),
            ("[lvm]\nvg=3\npool='p'", &["line 2", "string"]),
            (
                "[lvm]\nvg='a'\npool='p'\nsize='3G'",
                &["line 4", "size", "loop-file"],
            ),
            ("[reflink]\ndir='a'", &["line 2", "absolute"]),
            (
                "colour=3\n[reflink]\ndir='/a'",
                &["line 1", "colour", "mount-dir"],
            ),
            ("premounted=-1\n[reflink]\ndir='/a'", &["line 1", "-1"]),
            (
                "scratch-size='big'\n[reflink]\ndir='/a'",
                &["line 1", "30G"],
            ),
            (
                "stop-timeout='soon'\n[reflink]\ndir='/a'",
                &["line 1", "30s"],
            ),
            (
                "stop-timeout='-3s'\n[reflink]\ndir='/a'",
                &["line 1", "30s"],
            ),
            (
                "log-level='loud'\n[reflink]\ndir='/a'",
                &["line 1", "debug"],
            ),
            (
                "socket='plugin.sock'\n[reflink]\ndir='/a'",
                &["line 1", "absolute"],
            ),
            (
                "docker-socket='docker.sock'\n[reflink]\ndir='/a'",
                &["line 1", "absolute"],
            ),
            (
                "status-address='0.0.0.0:9469'\n[reflink]\ndir='/a'",
                &["line 1", "loopback"],
            ),
            (
                "status-address='localhost'\n[reflink]\ndir='/a'",
                &["line 1", "127.0.0.1:9469"],
            ),
            (
                "selinux-context='container_file_t'\n[reflink]\ndir='/a'",
                &["line 1", "container_file_t", "none"],
            ),
            ("[reflink\ndir='/a'", &["line 1"]),
        ] {
            let problem = Settings::parse(text).expect_err(text);
            for word in words {
                assert!(
                    problem.contains(word),
                    "{text}: {word:?} is not in: {problem}"
                );
            }
        }
        let long = format!("socket='/{}'\n[reflink]\ndir='/a'", "s".repeat(106));
        assert!(
            Settings::parse(&long)
                .expect_err("too long")
                .contains("106")
        );
    }
}
