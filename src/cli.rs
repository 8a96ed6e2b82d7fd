// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line's shape.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
pub use clap_complete::Shell;

use crate::cache::names::LvName;
use crate::cache::units::Bytes;
use crate::config::DEFAULT_FILE;
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
    /// Prepare storage, once, and write the configuration; changes nothing when it
    /// has been done.
    #[command(after_help = EXIT_CODES)]
    Init(Init),
    /// Run the daemon that Podman and Docker talk to.
    #[command(after_help = EXIT_CODES)]
    Serve(Serve),
    /// Show what was made from what: the entries as a tree, with hits and sizes.
    #[command(after_help = EXIT_CODES)]
    Tree(Tree),
    /// Show how often what jobs asked for was there, how long Mounts took, and what was published,
    /// since the daemon started.
    #[command(after_help = EXIT_CODES)]
    Stats(Stats),
    /// List the base, the entries that can be restored from, and the volumes.
    #[command(after_help = EXIT_CODES)]
    List(List),
    /// Show all there is to know of one volume or logical volume.
    #[command(after_help = EXIT_CODES)]
    Show(Show),
    /// Make an entry from a directory.
    #[command(after_help = EXIT_CODES)]
    Import(Import),
    /// Remove an entry (by its logical volume) or a volume (by its name).
    #[command(after_help = EXIT_CODES)]
    Remove(Remove),
    /// Look for what keeps caches from working on this host, and say how to mend it.
    #[command(after_help = EXIT_CODES)]
    Doctor(Doctor),
    /// Never evict an entry.
    #[command(after_help = EXIT_CODES)]
    Pin(Pin),
    /// Let an entry that was pinned be evicted again.
    #[command(after_help = EXIT_CODES)]
    Unpin(Pin),
    /// Evict the entries that have to go by the policy in the configuration, as the daemon
    /// does by itself.
    #[command(after_help = EXIT_CODES)]
    Gc(Gc),
    /// Keep ephemeral GitHub runners running, each a container for one job.
    #[command(after_help = EXIT_CODES)]
    Supervise(Supervise),
    /// Show the supervisor's runners, and tell it what to do.
    #[command(after_help = EXIT_CODES)]
    Runners(Runners),
    /// What the hooks in hooks.d run when a container starts or has ended; reads the
    /// OCI runtime's state, or its configuration, from standard input.
    #[command(after_help = EXIT_CODES)]
    Hook(Hook),
    /// In a job: mount the best cache in the job volume, and have paths lead to it.
    #[command(override_help = client::RESTORE)]
    Restore(Client),
    /// In a job: publish what a cache holds now, while the job goes on.
    #[command(override_help = client::SAVE)]
    Save(Client),
    /// In a job: have what is in a cache not published when the job ends.
    #[command(override_help = client::DISCARD)]
    Discard(Client),
    /// In a job: say what is mounted in the job volume.
    #[command(override_help = client::STATUS)]
    Status(Client),
    /// In a job: say how the job's work ended.
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

/// Where the caches will be: exactly one of three.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("store").required(true).multiple(false).args(["vg", "loop_file", "reflink"]))]
pub struct Init {
    /// A thin pool, made in this existing volume group.
    #[arg(long, value_name = "VG", requires = "size")]
    pub vg: Option<LvName>,

    /// A volume group of its own, on a loop device on this file, which is made.
    #[arg(long = "loop", value_name = "FILE", requires = "size")]
    pub loop_file: Option<PathBuf>,

    /// Image files in this directory, on XFS with reflinks or btrfs.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["size", "pool"])]
    pub reflink: Option<PathBuf>,

    /// The pool's name.
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

    /// Virtual size of the base: what a volume has room for that names no size.
    /// It takes space in the pool only as it is written to.
    #[arg(long, value_name = "SIZE", default_value = "10G")]
    pub base_size: Bytes,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// What is logged; goes before the configuration's log-level, and RUST_LOG
    /// before both.
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub log_level: Option<LogLevel>,
}

/// Options of `supervise`.
#[derive(Debug, Args)]
pub struct Supervise {
    /// Only look whether the configuration and its secrets are right; ask nobody, start nothing.
    #[arg(long)]
    pub check: bool,

    /// What is logged; goes before the configuration's log-level, and RUST_LOG
    /// before both.
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
    /// List the slots: state, job, and how many of its caches were restored.
    List {
        /// Of this pool only.
        pool: Option<String>,
        /// One JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Take no new jobs; runners without one go.
    Pause {
        /// This pool only.
        pool: Option<String>,
    },
    /// Take jobs again.
    Resume {
        /// This pool only.
        pool: Option<String>,
    },
    /// Take no new jobs, and end the supervisor when those that run have ended.
    Drain {
        /// End the jobs that run too; nothing of them is published.
        #[arg(long)]
        now: bool,
    },
    /// Show the last lines of a runner's log.
    Logs {
        /// The runner, or its slot.
        runner: String,
        /// How many lines.
        #[arg(long, value_name = "N", default_value_t = 200)]
        lines: u32,
    },
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// One JSON array instead of a table.
    #[arg(long)]
    pub json: bool,

    /// Whether it is shown again and again.
    #[command(flatten)]
    pub watch: Watch,
}

/// Options of `tree`.
#[derive(Debug, Args)]
pub struct Tree {
    /// One JSON array instead of a tree.
    #[arg(long)]
    pub json: bool,

    /// Whether it is shown again and again.
    #[command(flatten)]
    pub watch: Watch,
}

/// Options of `stats`.
#[derive(Debug, Args)]
pub struct Stats {
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,

    /// Whether it is shown again and again.
    #[command(flatten)]
    pub watch: Watch,
}

/// The option of all that can be looked at again and again.
#[derive(Debug, Args)]
pub struct Watch {
    /// Show it again every so many seconds (2 if none are given), until it is interrupted.
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

    /// One JSON object instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// Options of `import`.
#[derive(Debug, Args)]
pub struct Import {
    /// The directory whose content the entry gets, with ownership, modes, times,
    /// hard links, extended attributes, ACLs and holes.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// The tags that criteria will match, separated by spaces.
    #[arg(long, value_name = "TAGS")]
    pub tags: String,

    /// The scope that the entry belongs to; without it, to volumes without scope.
    #[arg(long, value_name = "SCOPE")]
    pub scope: Option<String>,

    /// The file system to make: xfs (the default) or ext4.
    #[arg(long, value_name = "FS")]
    pub fs: Option<String>,

    /// Virtual size; by default that of the base, or what the content needs where
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
    /// One JSON object instead of lines.
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
    /// Only say which entries would go, and why. For room, it is an estimate: the real thing looks
    /// again after each.
    #[arg(long)]
    pub dry_run: bool,

    /// One JSON array instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of `hook`.
#[derive(Debug, Args)]
pub struct Hook {
    /// When in a container's life this is.
    #[arg(value_name = "STAGE", value_enum)]
    pub stage: Stage,
}

/// A stage of the OCI runtime specification, or of Podman's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Before the container is made; refuses one that would get a local volume
    /// in place of a cache.
    #[value(name = "precreate")]
    Precreate,
    /// Its mounts are made, its process is not started yet.
    #[value(name = "createRuntime")]
    CreateRuntime,
    /// It has ended.
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
