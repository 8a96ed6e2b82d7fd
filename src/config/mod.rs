// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration file: parsed and validated once, here, but for `[supervise]` (`supervisor::config`).
//!
//! Here are the settings, and how the file becomes them; the tables with which store there is in `store`, those of
//! limits in `limits`. `values` reads what stands behind a `=`, and `template` writes a file with every setting.

mod limits;
mod store;
mod template;
mod values;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, de};

use self::limits::PolicyTable;
use self::values::{absolute, loopback, parsed, socket_if_any, socket_path};
use crate::cache::evict::Policy;
use crate::cache::units::Bytes;
use crate::logging::LogLevel;
use crate::selinux;

pub use self::limits::JobLimits;
pub use self::store::{CephName, Lvm, PoolSpec, Rbd, Reflink, StoreConfig};
pub use self::template::{example, write};
pub(crate) use self::values::duration;

/// Where the file is looked for.
pub const DEFAULT_FILE: &str = "/etc/lvm-cache-friend/config.toml";

/// Where everything of one boot lives.
pub const RUN_DIR: &str = "/run/lvm-cache-friend";

/// The mode of the directory that volumes are mounted in.
pub const MOUNT_DIR_MODE: u32 = 0o750;

/// Where dockerd listens.
const DOCKER_SOCKET: &str = "/run/docker.sock";

/// What the file says, as it stands there.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Document {
    lvm: Option<Lvm>,
    reflink: Option<Reflink>,
    rbd: Option<Rbd>,
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
        let mut stores = [
            document.lvm.map(StoreConfig::Lvm),
            document.reflink.map(StoreConfig::Reflink),
            document.rbd.map(StoreConfig::Rbd),
        ]
        .into_iter()
        .flatten();
        let store = stores.next().ok_or(
            "no store: one of the tables [lvm] (vg, pool), [reflink] (dir) and [rbd] (pool) is needed",
        )?;
        if stores.next().is_some() {
            return Err("two stores: one of [lvm], [reflink] and [rbd] is needed, not more".into());
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::evict::{Floor, Limits};

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

    #[test]
    fn what_is_refused() {
        for (text, words) in [
            ("", &["no store", "[lvm]", "[reflink]", "[rbd]"][..]),
            (
                "[lvm]\nvg='a'\npool='b'\n[reflink]\ndir='/a'",
                &["not more"],
            ),
            ("[reflink]\ndir='/a'\n[rbd]\npool='b'", &["not more"]),
            ("[rbd]\nuser='a'", &["line 1", "pool"]),
            ("[rbd]\npool='a/b c'", &["line 2", "b c", "letters"]),
            ("[rbd]\npool='a'\nconf='ceph.conf'", &["line 3", "absolute"]),
            ("[rbd]\npool='a'\nhost='a/b'", &["line 3", "a/b", "letters"]),
            ("[rbd]\npool='a'\nkey='secret'", &["line 3", "key", "user"]),
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
        let socket = include_str!("../../plugin/usr/lib/systemd/system/lvm-cache-friend.socket");
        assert!(socket.contains(&format!("\nSocketGroup={GROUP}\n")));
        let users = include_str!("../../plugin/usr/lib/sysusers.d/lvm-cache-friend.conf");
        assert!(users.contains(&format!("\ng {GROUP} -\n")));
    }
}
