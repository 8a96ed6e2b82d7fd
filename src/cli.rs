// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line's shape.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
pub use clap_complete::Shell;

use crate::cache::names::LvName;
use crate::cache::units::Bytes;
use crate::config::{CephName, DEFAULT_FILE, PoolSpec};
use crate::job::client;
use crate::logging::LogLevel;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; standard error says why
  2  wrong usage
  3  nothing of that name was found";

/// Copy-on-write cache volumes for CI containers: a Podman and Docker volume
/// plugin that mounts LVM thin snapshots chosen by tags.
#[derive(Debug, Parser)]
#[command(name = "lvm-cache-friend", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// The configuration file, which `init` writes.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_FILE, global = true)]
    pub config: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create the storage and write the configuration file. Safe to rerun: creates only what is
    /// missing.
    #[command(after_help = EXIT_CODES)]
    Init(Init),
    /// Run the daemon: the volume plugin of Podman and Docker.
    #[command(after_help = EXIT_CODES)]
    Serve(Serve),
    /// Show the entries as a tree, by what each was copied from, with hits and sizes.
    #[command(after_help = EXIT_CODES)]
    Tree(Tree),
    /// Show hit rates, mount times, and what was published and evicted since the daemon started.
    #[command(after_help = EXIT_CODES)]
    Stats(Stats),
    /// List the base image, the entries, and the volumes.
    #[command(after_help = EXIT_CODES)]
    List(List),
    /// Show everything about one volume or logical volume.
    #[command(after_help = EXIT_CODES)]
    Show(Show),
    /// Create an entry from a directory.
    #[command(after_help = EXIT_CODES)]
    Import(Import),
    /// Remove an entry (by its logical volume) or a volume (by its name).
    #[command(after_help = EXIT_CODES)]
    Remove(Remove),
    /// Find what keeps caches from working on this host, and suggest fixes.
    #[command(after_help = EXIT_CODES)]
    Doctor(Doctor),
    /// Pin an entry, so that it is never evicted.
    #[command(after_help = EXIT_CODES)]
    Pin(Pin),
    /// Unpin an entry, so that it may be evicted again.
    #[command(after_help = EXIT_CODES)]
    Unpin(Pin),
    /// Evict the entries that the policy in the configuration does not keep, as the daemon does by
    /// itself.
    #[command(after_help = EXIT_CODES)]
    Gc(Gc),
    /// Run ephemeral GitHub runners, each a container for one job.
    #[command(after_help = EXIT_CODES)]
    Supervise(Supervise),
    /// Show and control the supervisor's runners.
    #[command(after_help = EXIT_CODES)]
    Runners(Runners),
    /// Handle an OCI hook: Podman and the OCI runtime run it as a container starts or ends. Reads
    /// the container's state or configuration from standard input.
    #[command(after_help = EXIT_CODES)]
    Hook(Hook),
    /// (in a job) Mount the best cache in the job volume, and link paths to it.
    #[command(override_help = client::RESTORE)]
    Restore(Client),
    /// (in a job) Publish what a cache holds now, while the job goes on.
    #[command(override_help = client::SAVE)]
    Save(Client),
    /// (in a job) Do not publish a cache when the job ends.
    #[command(override_help = client::DISCARD)]
    Discard(Client),
    /// (in a job) List the caches that are mounted in the job volume.
    #[command(override_help = client::STATUS)]
    Status(Client),
    /// (in a job) Report the job's result.
    #[command(override_help = client::VERDICT)]
    Verdict(Client),
    /// Print a script that completes this program's commands in a shell.
    #[command(hide = true)]
    Completions {
        /// The shell.
        #[arg(value_name = "SHELL", value_enum)]
        shell: Shell,
    },
    /// Write man pages into a directory.
    #[command(hide = true)]
    Man {
        /// The directory.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Print a configuration that shows and explains every setting.
    #[command(hide = true)]
    ExampleConfig,
}

/// Where to keep the caches: exactly one of four.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("store").required(true).multiple(false).args(["vg", "loop_file", "reflink", "rbd"]))]
pub struct Init {
    /// Create a thin pool in this existing volume group.
    #[arg(long, value_name = "VG", requires = "size")]
    pub vg: Option<LvName>,

    /// Create this file, and a volume group with a thin pool on a loop device on it.
    #[arg(long = "loop", value_name = "FILE", requires = "size")]
    pub loop_file: Option<PathBuf>,

    /// Keep image files in this directory, on XFS with reflinks or btrfs.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["size", "pool"])]
    pub reflink: Option<PathBuf>,

    /// Keep images in this Ceph pool, or in a namespace of it, for several hosts.
    #[arg(long, value_name = "POOL[/NAMESPACE]", conflicts_with_all = ["size", "pool"])]
    pub rbd: Option<PoolSpec>,

    /// The Ceph user, without "client."; "admin" by default.
    #[arg(long, value_name = "ID", conflicts_with_all = ["vg", "loop_file", "reflink"])]
    pub ceph_user: Option<CephName>,

    /// The Ceph client's configuration; /etc/ceph/ceph.conf by default.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vg", "loop_file", "reflink"])]
    pub ceph_conf: Option<PathBuf>,

    /// Name of the thin pool.
    #[arg(
        long,
        value_name = "POOL",
        default_value = "friend-pool",
        conflicts_with = "loop_file"
    )]
    pub pool: LvName,

    /// Size of the pool (--vg) or of the file (--loop), such as 30G.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Bytes>,

    /// Default size of a volume. Thin-provisioned: unused space takes none of the pool.
    #[arg(long, value_name = "SIZE", default_value = "10G")]
    pub base_size: Bytes,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Log level. Overrides log-level in the configuration; RUST_LOG overrides both.
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub log_level: Option<LogLevel>,
}

/// Options of `supervise`.
#[derive(Debug, Args)]
pub struct Supervise {
    /// Only check the configuration and its secrets; connect to nothing, start nothing.
    #[arg(long)]
    pub check: bool,

    /// Log level. Overrides log-level in the configuration; RUST_LOG overrides both.
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub log_level: Option<LogLevel>,
}

/// What `runners` does.
#[derive(Debug, Args)]
pub struct Runners {
    /// What to do.
    #[command(subcommand)]
    pub command: RunnersCommand,
}

/// The commands of `runners`.
#[derive(Debug, Subcommand)]
pub enum RunnersCommand {
    /// List the slots: state, runner, job, and how many of its caches were restored.
    List {
        /// Only this pool.
        pool: Option<String>,
        /// Print one JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Take no new jobs, and remove idle runners.
    Pause {
        /// Only this pool.
        pool: Option<String>,
    },
    /// Take jobs again.
    Resume {
        /// Only this pool.
        pool: Option<String>,
    },
    /// Take no new jobs, and exit when the running ones have ended.
    Drain {
        /// End running jobs, too; nothing of them is published.
        #[arg(long)]
        now: bool,
    },
    /// Show the last lines of a runner's log.
    Logs {
        /// A runner, or a slot.
        runner: String,
        /// Number of lines.
        #[arg(long, value_name = "N", default_value_t = 200)]
        lines: u32,
    },
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// Print one JSON array instead of a table.
    #[arg(long)]
    pub json: bool,

    /// Of a fleet: only what HOST has, its volumes and the entries that it published. HOST is an
    /// id, or how one begins.
    #[arg(long, value_name = "HOST", conflicts_with = "all_hosts")]
    pub host: Option<String>,

    /// Of a fleet: the volumes of the other hosts, too.
    #[arg(long)]
    pub all_hosts: bool,

    /// Whether to repeat it.
    #[command(flatten)]
    pub watch: Watch,
}

/// Options of `tree`.
#[derive(Debug, Args)]
pub struct Tree {
    /// Print one JSON array instead of a tree.
    #[arg(long)]
    pub json: bool,

    /// Whether to repeat it.
    #[command(flatten)]
    pub watch: Watch,
}

/// Options of `stats`.
#[derive(Debug, Args)]
pub struct Stats {
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,

    /// Whether to repeat it.
    #[command(flatten)]
    pub watch: Watch,
}

/// The option of all that can be looked at again and again.
#[derive(Debug, Args)]
pub struct Watch {
    /// Repeat every SECONDS seconds (2 by default), until interrupted.
    #[arg(
        long = "watch",
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "2",
        require_equals = true,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    pub seconds: Option<u64>,
}

/// Options of `show`.
#[derive(Debug, Args)]
pub struct Show {
    /// A volume's name, or a logical volume's.
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Print one JSON object instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// Options of `import`.
#[derive(Debug, Args)]
pub struct Import {
    /// Directory to copy, with ownership, modes, times, hard links, extended attributes, ACLs
    /// and holes.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Tags for restore keys to match, separated by spaces.
    #[arg(long, value_name = "TAGS")]
    pub tags: String,

    /// Scope of the entry; by default none.
    #[arg(long, value_name = "SCOPE")]
    pub scope: Option<String>,

    /// File system to create: xfs (the default) or ext4.
    #[arg(long, value_name = "FS")]
    pub fs: Option<String>,

    /// Size of the file system; by default that of the base image, or what the content needs if
    /// that is more.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<String>,

    /// Owner of the entry's root directory; by default that of DIR.
    #[arg(long, value_name = "UID:GID")]
    pub owner: Option<String>,

    /// Mode of the entry's root directory, such as 0755; by default that of DIR.
    #[arg(long, value_name = "MODE")]
    pub mode: Option<String>,
}

/// Options of `remove`.
#[derive(Debug, Args)]
pub struct Remove {
    /// A volume's name, or an entry's logical volume.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// A volume that is in use, too: its mount is taken away, and its lease ends as any other, once the containers that
    /// still have it have ended. Needs the daemon.
    #[arg(long)]
    pub force: bool,
}

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Print one JSON object instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// Options of `pin` and `unpin`.
#[derive(Debug, Args)]
pub struct Pin {
    /// The entry's logical volume.
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Options of `gc`.
#[derive(Debug, Args)]
pub struct Gc {
    /// Only print which entries would be evicted, and why. For room, it is an estimate: the real
    /// eviction checks again after each entry.
    #[arg(long)]
    pub dry_run: bool,

    /// Print one JSON array instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of `hook`.
#[derive(Debug, Args)]
pub struct Hook {
    /// Stage of the container's life.
    #[arg(value_name = "STAGE", value_enum)]
    pub stage: Stage,
}

/// A stage of the OCI runtime specification, or of Podman's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Before the container is created; refuses one that would get a local volume instead of a
    /// cache.
    #[value(name = "precreate")]
    Precreate,
    /// After its mounts are made, before its process starts.
    #[value(name = "createRuntime")]
    CreateRuntime,
    /// After it has ended.
    #[value(name = "poststop")]
    Poststop,
}

/// What [`client`] reads itself, as it does in a job volume, where it is without this program.
#[derive(Debug, Args)]
pub struct Client {
    /// Its arguments, as they are.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    #[test]
    fn the_shape_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage() {
        for (line, want) in [
            ("init --vg a --size 3G", None),
            ("init --vg a --pool p --size 3G --base-size 1G", None),
            ("init --loop /f --size 3G", None),
            ("init --reflink /d", None),
            ("init --reflink /d --base-size 1G", None),
            ("init --rbd rbd", None),
            (
                "init --rbd rbd/caches --ceph-user cache --ceph-conf /c --base-size 1G",
                None,
            ),
            ("init --rbd rbd/", Some(ErrorKind::ValueValidation)),
            (
                "init --rbd rbd --size 3G",
                Some(ErrorKind::ArgumentConflict),
            ),
            (
                "init --reflink /d --ceph-user cache",
                Some(ErrorKind::ArgumentConflict),
            ),
            ("--config /c list --json", None),
            ("list --config /c", None),
            ("show a --json", None),
            ("import /d --tags a", None),
            (
                "import /d --tags a --fs ext4 --owner 1:2 --mode 0755 --scope s --size 3G",
                None,
            ),
            ("remove a", None),
            ("doctor --json", None),
            ("tree --json", None),
            ("stats --watch", None),
            ("list --json --watch=5", None),
            ("tree --watch=0", Some(ErrorKind::ValueValidation)),
            ("pin a", None),
            ("unpin a", None),
            ("pin", Some(ErrorKind::MissingRequiredArgument)),
            ("gc", None),
            ("gc --dry-run --json", None),
            ("gc a", Some(ErrorKind::UnknownArgument)),
            ("hook precreate", None),
            ("hook createRuntime", None),
            ("hook poststop", None),
            ("restore cargo --key a --path /x", None),
            ("restore --json --key a cargo --config", None),
            ("status --no-such-option", None),
            ("restore --help", Some(ErrorKind::DisplayHelp)),
            ("completions bash", None),
            ("completions dash", Some(ErrorKind::InvalidValue)),
            ("man /d", None),
            ("example-config", None),
            ("hook", Some(ErrorKind::MissingRequiredArgument)),
            ("hook prestart", Some(ErrorKind::InvalidValue)),
            ("serve --log-level debug", None),
            ("init", Some(ErrorKind::MissingRequiredArgument)),
            ("init --vg a", Some(ErrorKind::MissingRequiredArgument)),
            ("init --loop /f", Some(ErrorKind::MissingRequiredArgument)),
            (
                "init --vg a --loop /f --size 3G",
                Some(ErrorKind::ArgumentConflict),
            ),
            (
                "init --vg a --reflink /d --size 3G",
                Some(ErrorKind::ArgumentConflict),
            ),
            (
                "init --reflink /d --size 3G",
                Some(ErrorKind::ArgumentConflict),
            ),
            (
                "init --reflink /d --pool p",
                Some(ErrorKind::ArgumentConflict),
            ),
            ("init --vg a --size much", Some(ErrorKind::ValueValidation)),
            ("init --vg a/b --size 3G", Some(ErrorKind::ValueValidation)),
            ("import /d", Some(ErrorKind::MissingRequiredArgument)),
            ("list --yaml", Some(ErrorKind::UnknownArgument)),
            ("dance", Some(ErrorKind::InvalidSubcommand)),
        ] {
            let words = std::iter::once("lvm-cache-friend").chain(line.split(' '));
            let got = Cli::try_parse_from(words).err().map(|e| e.kind());
            assert_eq!(got, want, "{line}");
        }
    }
}
