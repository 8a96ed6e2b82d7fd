// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where each test runs, and how its result comes back.

pub mod agent;
pub mod guest;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Where a test runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// On this machine, without privilege.
    Host,
    /// On this machine's own kernel as root, in a mount namespace of its own with an empty
    /// `/run`.
    Reflink,
    /// In the guest of its group.
    Guest(Group),
    /// On this machine; drives guests of its own ([`crate::support::vm`]).
    Driver,
    /// Not a test: what a driver has its guest run, by [`crate::support::vm::part`].
    Part,
}

/// The guests that tests share: one boot for each, as long as no test in it fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// For what needs device-mapper.
    Lvm,
    /// For what starts containers.
    Podman,
    /// With systemd as init, and so with udev.
    Systemd,
    /// For containers under SELinux: `podman::selinux`.
    Selinux,
    /// With a Ceph cluster in it (tests/vm/ceph); on a tree of its own alone.
    Ceph,
}

impl Group {
    /// Its name, in test names and directories; `.config/nextest.toml` knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lvm => "lvm",
            Self::Podman => "podman",
            Self::Systemd => "systemd",
            Self::Selinux => "selinux",
            Self::Ceph => "ceph",
        }
    }

    /// Its options for `tests/vm/run`. Half of the memory is its disk: a pool of 100 GiB in a file writes 800 MiB of metadata,
    /// and this build's program has more than 100. One processor each: two guests with two each, on two cores, wait for one another's
    /// turn so often that a test takes twice as long.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Lvm => &["--mem", "2048", "--cpus", "1"],
            Self::Podman => &["--mem", "3072", "--cpus", "1"],
            Self::Systemd => &["--mem", "3072", "--cpus", "1", "--systemd"],
            Self::Selinux => &[
                "--mem",
                "3072",
                "--cpus",
                "1",
                "--append",
                "security=selinux selinux=1 enforcing=0",
            ],
            Self::Ceph => &["--mem", "4096", "--cpus", "1"],
        }
    }
}

/// A guest that tests share.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// What its tests need.
    pub group: Group,
    /// What they run on.
    pub system: System,
}

impl Place {
    /// Its name; of another system than this machine's, the system's comes first.
    fn name(self, separator: &str) -> String {
        match self.system {
            System::Own => self.group.name().to_owned(),
            System::Tree(tree) => format!("{tree}{separator}{}", self.group.name()),
        }
    }

    /// Options for `tests/vm/run`.
    fn options(self) -> Vec<&'static str> {
        let mut options = self.group.options().to_vec();
        if let System::Tree(tree) = self.system {
            options.extend(["--tree", tree]);
        }
        options
    }
}

/// What a guest's root is: `tests/vm/tree`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// A Debian of this machine's release.
    Own,
    /// Another Debian, by its name.
    Tree(&'static str),
}

/// Every test in a guest is there for each of them, if it does not say otherwise; which run by default, `.config/nextest.toml` says.
const SYSTEMS: [System; 3] = [System::Own, System::Tree("trixie"), System::Tree("forky")];

/// What has Ceph, and is for its tests alone.
const WITH_CEPH: System = System::Tree("trixie-ceph");

/// One row of a table. Its body panics when it fails.
#[derive(Clone)]
pub struct Test {
    pub name: String,
    tier: Tier,
    system: System,
    only: Option<System>,
    body: Arc<dyn Fn() + Send + Sync>,
    before: fn(),
    timeout: Duration,
}

/// A test, by the name of its module and its own: `podman::two_at_once`.
pub fn test(tier: Tier, name: impl Into<String>, body: impl Fn() + Send + Sync + 'static) -> Test {
    Test {
        name: name.into(),
        tier,
        system: System::Own,
        only: None,
        body: Arc::new(body),
        before: || {},
        timeout: Duration::from_secs(600),
    }
}

impl Test {
    /// How long it may take in its guest before it is ended; ten minutes if nothing is said.
    #[allow(dead_code)]
    pub fn timeout(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    /// What is done on this machine before its guest is asked.
    pub fn before(mut self, before: fn()) -> Self {
        self.before = before;
        self
    }

    /// Has it there for one system alone.
    pub fn only_on(mut self, system: System) -> Self {
        self.only = Some(system);
        self
    }

    fn on_each_system(self) -> Vec<Self> {
        match self.tier {
            Tier::Guest(Group::Ceph) => vec![Self {
                system: WITH_CEPH,
                ..self
            }],
            Tier::Guest(_) => SYSTEMS
                .into_iter()
                .filter(|system| self.only.is_none_or(|only| only == *system))
                .map(|system| Self {
                    system,
                    ..self.clone()
                })
                .collect(),
            _ => vec![self],
        }
    }

    /// What it is listed as: its place first, so that a place can be picked by name.
    fn full_name(&self) -> String {
        match self.tier {
            Tier::Host => format!("host::{}", self.name),
            Tier::Reflink => format!("reflink::{}", self.name),
            Tier::Guest(group) => {
                let place = Place {
                    group,
                    system: self.system,
                };
                format!("guest::{}::{}", place.name("::"), self.name)
            }
            Tier::Driver => format!("driver::{}", self.name),
            Tier::Part => format!("part::{}", self.name),
        }
    }

    fn into_trial(self) -> Trial {
        let name = self.full_name();
        Trial::test(name.clone(), move || match self.tier {
            Tier::Host | Tier::Driver | Tier::Part => {
                (self.body)();
                Ok(())
            }
            Tier::Reflink => {
                isolate();
                (self.body)();
                Ok(())
            }
            Tier::Guest(group) => {
                (self.before)();
                let place = Place {
                    group,
                    system: self.system,
                };
                guest::run(&guest::run_dir(), place, &name, self.timeout).map_err(Into::into)
            }
        })
    }
}

/// The test binary: a list of tests for Cargo and nextest, and what runs in guests and beside
/// them.
pub fn main(tests: Vec<Test>) {
    let tests: Vec<Test> = tests.into_iter().flat_map(Test::on_each_system).collect();
    let mut names = HashSet::new();
    for test in &tests {
        assert!(
            names.insert(test.full_name()),
            "two tests are called {}",
            test.full_name()
        );
    }
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "guest-one", name] => {
            let test = tests
                .iter()
                .find(|test| test.full_name() == name)
                .expect("a test of that name");
            (test.body)();
        }
        [_, "guest-agent", share] => agent::serve(Path::new(share)),
        [_, "guest-keeper", dir, ref arguments @ ..] => guest::keep(Path::new(dir), arguments),
        _ => {
            let arguments = Arguments::from_args();
            let trials = tests
                .into_iter()
                .filter(|test| test.tier != Tier::Part)
                .map(Test::into_trial)
                .collect();
            libtest_mimic::run(&arguments, trials).exit();
        }
    }
}

/// A mount namespace of this test's own. Whatever it mounts is gone with it, even after `kill
/// -9`; below `/run` nothing of this machine is there, so the daemon's default paths are free.
fn isolate() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: it mounts file systems"
    );
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).expect("shared mounts");
    mount(
        Some("run"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .expect("an empty /run");
}

/// `tests/vm/run`, which boots a guest.
pub fn vm_run() -> Command {
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/run"))
}

/// This test binary, which is at the same path in a guest.
pub fn this_binary() -> PathBuf {
    std::env::current_exe().expect("this binary's path")
}
