// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Real Podman, real containers, the daemon as it is installed: what users do and what Podman does to plugins.
//!
//! `facts` of Podman that are relied on were read from its source (4.3.1) and are named where they matter.

mod action;
mod caches;
mod churn;
mod client;
mod devices;
mod docs;
pub mod doctor;
mod hooks;
mod job_client;
mod jobs;
mod locked;
mod nested;
mod options;
mod registry;
mod selinux;
mod set_jobs;
pub mod story;
mod supervisor;
mod users;

pub use locked::locked_by_others;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Group, Test, Tier, test};
use crate::support::daemon::Daemon;
use crate::support::podman::Podman;
use crate::support::site::{Body, Kind, MOUNT_DIR, Site};
use crate::support::wait_until;

pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (tier, kind) in [
        (Tier::Reflink, Kind::Reflink),
        (Tier::Guest(Group::Podman), Kind::Lvm),
        (Tier::Guest(Group::Ceph), Kind::Rbd),
    ] {
        let bodies = [
            client::BODIES,
            docs::BODIES,
            caches::BODIES,
            options::BODIES,
            hooks::BODIES,
            jobs::BODIES,
            match kind {
                Kind::Reflink => supervisor::BODIES,
                Kind::Lvm | Kind::Rbd => supervisor::GUEST,
            },
            match kind {
                Kind::Reflink => set_jobs::BODIES,
                Kind::Lvm | Kind::Rbd => &[],
            },
            nested::BODIES,
            churn::BODIES,
            users::BODIES,
            devices::BODIES,
            job_client::BODIES,
            action::BODIES,
        ]
        .concat();
        tests.extend(bodies.into_iter().map(|(name, body)| {
            test(tier, format!("podman::{name}"), move || body(kind)).timeout(900)
        }));
    }
    tests.push(
        test(
            Tier::Guest(Group::Systemd),
            "podman::verdicts_in_the_journal",
            hooks::in_the_journal,
        )
        .timeout(900),
    );
    tests.push(test(
        Tier::Reflink,
        "podman::supervised_builds",
        supervisor::builds,
    ));
    tests.push(test(
        Tier::Guest(Group::Podman),
        "podman::made_by_hand",
        caches::made_by_hand,
    ));
    tests.extend(doctor::tests());
    tests.extend(selinux::tests());
    tests
}

/// A host with the daemon and Podman. Parts are taken down in this order.
struct Host {
    podman: Podman,
    daemon: Option<Daemon>,
    site: Site,
}

impl Host {
    fn new(kind: Kind) -> Self {
        Self::configured(kind, "")
    }

    fn configured(kind: Kind, settings: &str) -> Self {
        let site = Site::new(kind);
        site.configure(settings);
        Self {
            daemon: Some(site.serve()),
            podman: Podman::new(kind),
            site,
        }
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it is away only in restart")
    }

    /// Ends the daemon (`kill -9` if `killed`), does something meanwhile, and starts it again.
    fn restart(&mut self, killed: bool, meanwhile: impl FnOnce(&Podman)) {
        let daemon = self.daemon.take().expect("it runs");
        if killed {
            daemon.kill();
        } else {
            daemon.stop();
        }
        meanwhile(&self.podman);
        self.daemon = Some(self.site.serve());
    }

    /// What the daemon says of a volume: what `podman volume inspect` shows as its Status.
    #[track_caller]
    fn status(&self, volume: &str) -> Value {
        self.daemon().plugin().status(volume)
    }

    /// Waits for the end of the lease that a volume's LV had, and returns what became of it.
    fn settled(&self, volume: &str, lv: &Value) -> Value {
        let mut last = Value::Null;
        wait_until(|| {
            last = self.status(volume)["last_lease"].clone();
            last["lv"] == *lv
        });
        last
    }

    /// Runs a script in a container with each of `volumes` at `/NAME`; what it wrote, and what became of each lease.
    #[track_caller]
    fn job(&self, volumes: &[&str], script: &str) -> (String, Vec<Value>) {
        let last = |volume: &&str| self.status(volume)["last_lease"].clone();
        let before: Vec<_> = volumes.iter().map(last).collect();
        let said = self.podman.sh(volumes, script);
        let ended = volumes.iter().zip(before).map(|(volume, before)| {
            let mut ended = Value::Null;
            wait_until(|| {
                ended = last(volume);
                ended != before
            });
            ended
        });
        (said, ended.collect())
    }

    /// Publishes an entry whose file `who` says `who`, without Podman, and returns its LV's name.
    #[track_caller]
    fn entry(&self, who: &str, tags: &str, scope: &str) -> String {
        let plugin = self.daemon().plugin();
        let mut options = json!({"save": tags});
        if !scope.is_empty() {
            options["scope"] = scope.into();
        }
        plugin.create("publisher", &options);
        let at = plugin.mount("publisher", "test");
        fs::write(at.join("who"), who).unwrap();
        let lv = self.status("publisher")["lv"].clone();
        plugin.unmount("publisher", "test");
        let last = self.settled("publisher", &lv);
        plugin.remove("publisher");
        last["published"]
            .as_str()
            .unwrap_or_else(|| panic!("not published: {last}"))
            .to_owned()
    }

    /// The LV of the entry with all of these tags, as `list` has them, and no others.
    #[track_caller]
    fn entries_tagged(&self, tags: &[&str]) -> Vec<String> {
        let mut want: Vec<_> = tags
            .iter()
            .map(|tag| format!("friend:cache:{tag}"))
            .collect();
        want.sort();
        self.site
            .list()
            .into_iter()
            .filter(|row| {
                let mut has: Vec<_> = row["tags"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter_map(|tag| tag.as_str())
                    .filter(|tag| tag.starts_with("friend:cache:"))
                    .map(str::to_owned)
                    .collect();
                has.sort();
                has == want
            })
            .map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    }
}

/// Waits until `last` tells of another lease than `before` did, and returns what became of that.
#[track_caller]
fn ended_after(before: &Value, last: impl Fn() -> Value) -> Value {
    let mut ended = Value::Null;
    wait_until(|| {
        ended = last();
        ended["lv"].is_string() && ended["lv"] != before["lv"]
    });
    ended
}

fn mountpoint(volume: &str) -> std::path::PathBuf {
    Path::new(MOUNT_DIR).join(volume)
}
