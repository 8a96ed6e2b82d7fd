// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file that `init` writes and `example-config` prints: each setting with its meaning and its default.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use super::{
    ConfigError, DOCKER_SOCKET, JobLimits, Lvm, Rbd, Reflink, StoreConfig, default_group,
    default_mount_dir, default_premounted, default_socket,
};

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
    let rbd = StoreConfig::Rbd(Rbd {
        pool: "rbd/caches".parse().expect("a pool and a namespace"),
        user: "cache".parse().expect("a name"),
        conf: Some("/etc/ceph/ceph.conf".into()),
        host: Some("build-1".parse().expect("a name")),
    });
    // What is not for everyone is shown behind #.
    let hidden = |store: &StoreConfig| -> String {
        store_text(store)
            .lines()
            .map(|line| {
                let hash = if line.starts_with('#') { "" } else { "#" };
                format!("{hash}{line}\n")
            })
            .collect()
    };
    text(&lvm).replace("loop-file =", "#loop-file =")
        + "\n# Or, in place of [lvm]:\n"
        + &hidden(&reflink)
        + "\n# Or:\n"
        + &hidden(&rbd)
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
        StoreConfig::Rbd(rbd) => {
            let mut table = format!(
                "# The Ceph pool that holds the caches as images, with a namespace or without; and which of the\n\
                 # cluster's users the daemon is: docs/fleet.md has what that one may do. Its key is in its keyring.\n\
                 [rbd]\npool = {}\nuser = {}\n",
                quoted(&rbd.pool.to_string()),
                quoted(&rbd.user.to_string())
            );
            if let Some(conf) = &rbd.conf {
                table.push_str(&format!(
                    "# The client's configuration, if it is not /etc/ceph/ceph.conf.\nconf = {}\n",
                    path(conf)
                ));
            }
            if let Some(host) = &rbd.host {
                table.push_str(&format!(
                    "# What this host is called in the fleet: no two may have the same. By default it is made of\n\
                     # /etc/machine-id, which machines that were cloned have in common.\nhost = {}\n",
                    quoted(&host.to_string())
                ));
            }
            table
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Settings, existing};
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

    fn rbd(conf: Option<&str>, host: Option<&str>) -> StoreConfig {
        let name = |name: &str| name.parse().expect("a name");
        StoreConfig::Rbd(Rbd {
            pool: "rbd/caches".parse().expect("a pool and a namespace"),
            user: name("cache"),
            conf: conf.map(Into::into),
            host: host.map(name),
        })
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        for (n, store) in [
            lvm(None),
            lvm(Some("/var/lib/a \"b\".img")),
            reflink("/srv/caches"),
            rbd(None, None),
            rbd(Some("/etc/ceph/b.conf"), Some("b-1")),
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
        let (first, second) = tables.split_once("[reflink]").expect("the second");
        let (second, third) = second.split_once("[rbd]").expect("the third");
        for (store, want) in [
            (
                format!("[lvm]{first}"),
                lvm(Some("/var/lib/lvm-cache-friend.img")),
            ),
            (
                format!("[reflink]{second}"),
                reflink("/var/lib/lvm-cache-friend"),
            ),
            (
                format!("[rbd]{third}"),
                rbd(Some("/etc/ceph/ceph.conf"), Some("build-1")),
            ),
        ] {
            let parsed = Settings::parse(&format!("{settings}{store}")).expect("valid");
            assert_eq!(parsed.store, want);
        }
    }
}
