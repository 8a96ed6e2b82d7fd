// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an administrator has after `init`: a store, a configuration, and the
//! daemon's default paths below `/run`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::mount::{self, MountPoint};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Group, Test, Tier, test};

use super::ceph;
use super::command::{Outcome, outcome, outcome_of, run, succeed};
use super::daemon::{Daemon, Plugin, SOCKET};
use super::lvm::TestVg;
use super::reflink::ReflinkFs;
use super::{PROGRAM, temp_dir};

/// The size of the base that `init` makes here.
const BASE: Bytes = Bytes(Bytes::GIB);

/// Where volumes are mounted if nothing else is configured.
pub const MOUNT_DIR: &str = "/run/lvm-cache-friend/mnt";

/// Which store a site has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Image files on an XFS of its own.
    Reflink,
    /// A thin pool in the guest's group.
    Lvm,
    /// A namespace in the cluster of a guest that has one.
    Rbd,
}

/// A test's name within its part, and what it does with a store of a kind.
pub type Body = (&'static str, fn(Kind));

/// A part's tests with each kind of store: on this machine's own kernel, on LVM in a guest, and on Ceph in another.
pub fn with_each_store(part: &str, bodies: &[Body]) -> Vec<Test> {
    let ceph = [(Tier::Guest(Group::Ceph), Kind::Rbd)];
    with_stores(&[&LOCAL[..], &ceph].concat(), part, bodies)
}

/// The same without Ceph: the part says why.
pub fn with_each_local_store(part: &str, bodies: &[Body]) -> Vec<Test> {
    with_stores(&LOCAL, part, bodies)
}

const LOCAL: [(Tier, Kind); 2] = [
    (Tier::Reflink, Kind::Reflink),
    (Tier::Guest(Group::Lvm), Kind::Lvm),
];

/// Tests with one kind of store alone.
pub fn with_store(kind: Kind, part: &str, bodies: &[Body]) -> Vec<Test> {
    let tier = match kind {
        Kind::Reflink => Tier::Reflink,
        Kind::Lvm => Tier::Guest(Group::Lvm),
        Kind::Rbd => Tier::Guest(Group::Ceph),
    };
    with_stores(&[(tier, kind)], part, bodies)
}

fn with_stores(stores: &[(Tier, Kind)], part: &str, bodies: &[Body]) -> Vec<Test> {
    let tests = stores.iter().flat_map(|&(tier, kind)| {
        let of =
            move |&(name, body): &Body| test(tier, format!("{part}::{name}"), move || body(kind));
        bodies.iter().map(of)
    });
    tests.collect()
}

enum Disk {
    Reflink(ReflinkFs),
    Lvm(TestVg),
    Rbd,
}

/// A store with its configuration.
pub struct Site {
    pub kind: Kind,
    pub config: PathBuf,
    pub dir: TempDir,
    disk: Disk,
}

impl Site {
    /// Storage that nothing has prepared yet.
    pub fn bare(kind: Kind) -> Self {
        let dir = temp_dir();
        Self {
            kind,
            config: dir.path().join("config.toml"),
            dir,
            disk: match kind {
                Kind::Reflink => Disk::Reflink(ReflinkFs::new(8 << 10)),
                Kind::Lvm => Disk::Lvm(TestVg::fresh()),
                Kind::Rbd => {
                    ceph::clear(None);
                    Disk::Rbd
                }
            },
        }
    }

    /// A store after `init`.
    pub fn new(kind: Kind) -> Self {
        let dir = temp_dir();
        let config = dir.path().join("config.toml");
        if kind == Kind::Lvm
            && let Some(vg) = TestVg::kept(&config)
        {
            let disk = Disk::Lvm(vg);
            return Self {
                kind,
                config,
                dir,
                disk,
            };
        }
        let site = if kind == Kind::Rbd {
            // To make the base takes a guest many seconds.
            ceph::clear(Some(BASE));
            let disk = Disk::Rbd;
            Self {
                kind,
                config,
                dir,
                disk,
            }
        } else {
            Self::bare(kind)
        };
        site.init();
        if kind == Kind::Lvm {
            TestVg::keep(&site.config);
        }
        site
    }

    /// Runs `init` for this kind of store and returns what it says.
    #[track_caller]
    pub fn init(&self) -> String {
        let store = self.store();
        let mut arguments = vec!["init", "--base-size", "1G"];
        match self.kind {
            Kind::Reflink => arguments.extend(["--reflink", &store]),
            Kind::Lvm => arguments.extend(["--vg", &store, "--size", "5G"]),
            Kind::Rbd => arguments.extend(["--rbd", &store, "--ceph-user", ceph::USER]),
        }
        self.done(&arguments)
    }

    /// The group's name, the directory, or the pool and its namespace.
    pub fn store(&self) -> String {
        match &self.disk {
            Disk::Reflink(fs) => fs.path().join("caches").to_str().unwrap().to_owned(),
            Disk::Lvm(_) => TestVg::NAME.to_owned(),
            Disk::Rbd => ceph::STORE.to_owned(),
        }
    }

    /// Adds settings above the table that `init` wrote.
    pub fn configure(&self, settings: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        fs::write(&self.config, format!("{settings}{text}")).unwrap();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--config").arg(&self.config).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs the program to its end, well or not.
    #[track_caller]
    pub fn outcome(&self, arguments: &[&str]) -> Outcome {
        outcome_of(&mut self.command(arguments))
    }

    /// Runs the program to success and returns what it wrote.
    #[track_caller]
    pub fn done(&self, arguments: &[&str]) -> String {
        succeed(&mut self.command(arguments))
    }

    /// What `list --json` says.
    #[track_caller]
    pub fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.done(&["list", "--json"])).unwrap()
    }

    /// The names of all LVs with their tags, or of all images, whoever's.
    pub fn everything(&self) -> String {
        match self.kind {
            Kind::Reflink => run(
                "find",
                [
                    &self.store(),
                    "-mindepth",
                    "1",
                    "!",
                    "-name",
                    "~daemon",
                    "-printf",
                    "%P\n",
                ],
            ),
            Kind::Lvm => run(
                "lvs",
                ["--noheadings", "-o", "lv_name,lv_tags", &self.store()],
            ),
            Kind::Rbd => ceph::listed("volume")
                .iter()
                .map(|(name, volume)| format!("{name} {}\n", volume["tags"]))
                .collect(),
        }
    }

    /// Has the store refuse every change, until what this gives is dropped.
    pub fn broken(&self) -> Broken<'_> {
        match self.kind {
            Kind::Reflink => run("chattr", ["+i", &self.store()]),
            Kind::Lvm => run("vgrename", ["--quiet", TestVg::NAME, "away"]),
            Kind::Rbd => {
                ceph::set_format("2");
                String::new()
            }
        };
        Broken(self)
    }

    /// Starts the daemon and waits until it serves.
    pub fn serve(&self) -> Daemon {
        Daemon::start_with(&self.config, Path::new(SOCKET), &[("RUST_LOG", "debug")])
    }
}

/// What is mounted at `place`, as this namespace sees it.
pub fn mounts_at(place: impl AsRef<Path>) -> Vec<MountPoint> {
    let mut mounts = mount::table().unwrap();
    mounts.retain(|mount| mount.at == place.as_ref());
    mounts
}

/// See [`Site::broken`].
pub struct Broken<'a>(&'a Site);

impl Drop for Broken<'_> {
    fn drop(&mut self) {
        match self.0.kind {
            Kind::Reflink => _ = outcome("chattr", ["-i", &self.0.store()]),
            Kind::Lvm => _ = outcome("vgrename", ["--quiet", "away", TestVg::NAME]),
            Kind::Rbd => ceph::set_format("1"),
        }
    }
}

/// Makes the store hang until it is dropped.
pub struct Stuck<'a> {
    site: &'a Site,
    stopped: Vec<Pid>,
    _away: Option<ceph::Away>,
}

impl<'a> Stuck<'a> {
    pub fn new(site: &'a Site, daemon: &Daemon) -> Self {
        let mut stopped = Vec::new();
        let mut away = None;
        match site.kind {
            Kind::Reflink => {
                run("fsfreeze", ["--freeze", &site.store()]);
            }
            Kind::Lvm => {
                let children = run("pgrep", ["-P", &daemon.pid().to_string()]);
                for pid in children.split_whitespace() {
                    let pid = Pid::from_raw(pid.parse().unwrap());
                    kill(pid, Signal::SIGSTOP).unwrap();
                    stopped.push(pid);
                }
                assert!(!stopped.is_empty(), "no lvm process runs");
            }
            Kind::Rbd => away = Some(ceph::Away::new()),
        }
        Self {
            site,
            stopped,
            _away: away,
        }
    }
}

impl Drop for Stuck<'_> {
    fn drop(&mut self) {
        if self.site.kind == Kind::Reflink {
            outcome("fsfreeze", ["--unfreeze", &self.site.store()]);
        }
        for pid in &self.stopped {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

impl Plugin {
    /// Makes a volume.
    #[track_caller]
    pub fn create(&self, name: &str, options: &Value) {
        self.ok(
            "VolumeDriver.Create",
            &json!({"Name": name, "Opts": options}),
        );
    }

    /// Mounts a volume and returns where.
    #[track_caller]
    pub fn mount(&self, name: &str, id: &str) -> PathBuf {
        let answer = self.ok("VolumeDriver.Mount", &json!({"Name": name, "ID": id}));
        PathBuf::from(answer["Mountpoint"].as_str().unwrap())
    }

    #[track_caller]
    pub fn unmount(&self, name: &str, id: &str) {
        self.ok("VolumeDriver.Unmount", &json!({"Name": name, "ID": id}));
    }

    #[track_caller]
    pub fn remove(&self, name: &str) {
        self.ok("VolumeDriver.Remove", &json!({"Name": name}));
    }

    /// What is said of a volume: what `podman volume inspect` shows as its Status.
    #[track_caller]
    pub fn status(&self, name: &str) -> Value {
        let answer = self.ok("VolumeDriver.Get", &json!({"Name": name}));
        answer["Volume"]["Status"].clone()
    }

    /// The names that List gives.
    #[track_caller]
    pub fn names(&self) -> Vec<String> {
        let answer = self.ok("VolumeDriver.List", &json!({}));
        let volumes = answer["Volumes"].as_array().unwrap();
        let name = |volume: &Value| volume["Name"].as_str().unwrap().to_owned();
        volumes.iter().map(name).collect()
    }
}
