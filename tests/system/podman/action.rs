// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The GitHub action in containers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::hooks::Hooks;
use super::{Body, Host};
use crate::action::{ACTION, Runner, entries, make_home, node, story};
use crate::support::command::Outcome;
use crate::support::wait_until;

pub const BODIES: &[Body] = &[("the_action", |kind| {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    let home = tempfile::tempdir_in("/run").unwrap();
    story(&mut Container { host, home });
})];

/// Jobs in a container, whose exit code is that of the runner's program in it.
struct Container {
    host: Host,
    /// At the same path in the container.
    home: tempfile::TempDir,
}

impl Container {
    /// What a command ends the container with, when it is there.
    fn code(&self) -> PathBuf {
        self.home().join("code")
    }

    fn exec(&self, options: &[&str], command: &[&str]) -> Outcome {
        let work = self.home().join("work");
        let head = ["exec", "--workdir", work.to_str().unwrap()];
        self.host
            .podman
            .outcome(&[&head[..], options, &["job"], command].concat())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Podman 4.3 was seen to wait for itself for ever when `volume rm -f` ended a container.
            let _ = self
                .host
                .podman
                .outcome(&["rm", "--force", "--time", "0", "job"]);
        }
    }
}

impl Runner for Container {
    fn begin(&mut self) {
        let home = self.home();
        fs::remove_dir_all(&home).unwrap();
        make_home(&home);
        self.host.podman.create("job", &["type=job"]);
        let home = home.display();
        // The image has no node, so it is lent by this machine; below /usr it is there anyway.
        let node = node();
        let own = (!node.starts_with("/usr")).then(|| node.to_str().unwrap());
        let lent = ["/usr", "/lib", "/lib64", ACTION].into_iter().chain(own);
        let lent: Vec<_> = lent.map(|path| format!("{path}:{path}:ro")).collect();
        let home = format!("{home}:{home}");
        let volumes = ["job:/run/lvm-cache-friend:rslave", &home];
        let volumes = volumes.into_iter().chain(lent.iter().map(String::as_str));
        let volumes: Vec<_> = volumes.flat_map(|volume| ["--volume", volume]).collect();
        let wait = format!(
            "until [ -e {code} ]; do sleep 0.1; done; exit $(cat {code})",
            code = self.code().display()
        );
        let head = ["run", "--detach", "--name", "job"];
        let tail = [self.host.podman.image.as_str(), "sh", "-c", &wait];
        self.host
            .podman
            .done(&[&head[..], &volumes, &tail].concat());
    }

    fn end(&mut self, code: i32) {
        let (there, unready) = (self.code(), self.home().join("unready"));
        fs::write(&unready, code.to_string()).unwrap();
        fs::rename(&unready, &there).unwrap();
        let podman = &self.host.podman;
        assert_eq!(podman.done(&["wait", "job"]).trim(), code.to_string());
        podman.done(&["rm", "job"]);
        podman.done(&["volume", "rm", "job"]);
        wait_until(|| {
            self.host
                .site
                .list()
                .iter()
                .all(|row| row["kind"] != "volume")
        });
    }

    fn node(&self, env: &BTreeMap<String, String>, script: &Path) -> Outcome {
        let env: Vec<_> = env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let options: Vec<_> = env.iter().flat_map(|pair| ["--env", pair]).collect();
        self.exec(
            &options,
            &[node().to_str().unwrap(), script.to_str().unwrap()],
        )
    }

    fn sh(&self, script: &str) -> String {
        let home = format!("HOME={}", self.home().display());
        let done = self.exec(&["--env", &home], &["sh", "-ec", script]);
        assert_eq!(done.status, 0, "{done:?}");
        done.stdout
    }

    fn home(&self) -> PathBuf {
        self.home.path().to_owned()
    }

    fn volume(&self) -> PathBuf {
        "/run/lvm-cache-friend".into()
    }

    fn entries(&self) -> Vec<Vec<String>> {
        entries(&self.host.site)
    }
}
