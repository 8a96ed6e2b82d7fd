// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Podman, told of the plugin as the package does, and what goes on in containers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use super::busybox_image;
use super::command::{Outcome, outcome_of, succeed};
use super::daemon::Plugin;
use super::site::Kind;

/// The driver's name in the drop-in that is installed.
pub const DRIVER: &str = "lvm-cache-friend";

/// The id that Podman mounts with, whatever the container (libpod/volume_internal_common.go).
pub const CLIENT: &str = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2";

/// Where Podman reads drop-ins from.
const DROP_INS: &str = "/etc/containers/containers.conf.d";

/// Podman with no containers and no volumes. Dropping it removes those that there are then.
pub struct Podman {
    pub image: String,
    /// Shared with containers that are started, at the same path.
    shared: tempfile::TempDir,
    _place: DropIn,
}

impl Podman {
    /// Configures it for the place where tests of this kind run.
    pub fn new(kind: Kind) -> Self {
        let cgroups = match kind {
            Kind::Lvm | Kind::Rbd => "",
            Kind::Reflink => {
                fresh_places();
                "cgroups = \"disabled\"\n"
            }
        };
        fs::create_dir_all(DROP_INS).unwrap();
        fs::copy(
            concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/plugin/etc/containers/containers.conf.d/50-lvm-cache-friend.conf"
            ),
            Path::new(DROP_INS).join("50-lvm-cache-friend.conf"),
        )
        .unwrap();
        let place = DropIn::new(
            "55-place",
            &format!(
                "[containers]\n{cgroups}netns = \"none\"\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
                 [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
                 [network]\nnetwork_backend = \"netavark\"\n"
            ),
        );
        // For --userns=auto: containers-storage looks for this name, of which shadow 4.20 wants an account.
        for file in ["/etc/subuid", "/etc/subgid"] {
            fs::write(file, "containers:1000000:1000000\n").unwrap();
        }
        let mut accounts = fs::read_to_string("/etc/passwd").unwrap();
        if !accounts.contains("\ncontainers:") {
            accounts += "containers:x:990:990::/:/usr/sbin/nologin\n";
            fs::write("/etc/passwd", accounts).unwrap();
        }
        Self {
            image: busybox_image(),
            shared: tempfile::tempdir_in("/run").unwrap(),
            _place: place,
        }
    }

    /// Runs `podman ARGUMENTS…`, however it ends.
    #[track_caller]
    pub fn outcome(&self, arguments: &[&str]) -> Outcome {
        outcome_of(Command::new("podman").args(arguments))
    }

    /// Runs `podman ARGUMENTS…` to success and returns what it wrote.
    #[track_caller]
    pub fn done(&self, arguments: &[&str]) -> String {
        succeed(Command::new("podman").args(arguments))
    }

    /// Runs `podman ARGUMENTS…`, which must end with `status` (125: refused, 126: the container did not start) and say all
    /// of `words` on its stderr.
    #[track_caller]
    pub fn fails(&self, arguments: &[&str], status: i32, words: &[&str]) {
        let outcome = self.outcome(arguments);
        // Podman takes any error of a container's start that says "not found" for a command that was not found: 127.
        let seen = if outcome.status == 127 {
            126
        } else {
            outcome.status
        };
        assert_eq!(seen, status, "podman {arguments:?}: {outcome:?}");
        for word in words {
            assert!(
                outcome.stderr.contains(word),
                "podman {arguments:?} does not say {word:?}: {outcome:?}"
            );
        }
    }

    /// Makes a volume of ours with options such as `restore=linux`.
    #[track_caller]
    pub fn create(&self, name: &str, options: &[&str]) {
        self.done(&create(DRIVER, name, options));
    }

    /// Runs a shell script, `set -e`, in a container with each of `volumes` at `/NAME`; what it wrote.
    #[track_caller]
    pub fn sh(&self, volumes: &[&str], script: &str) -> String {
        let mounts: Vec<_> = volumes
            .iter()
            .map(|name| format!("{name}:/{name}"))
            .collect();
        let mut options = Vec::new();
        for mount in &mounts {
            options.extend(["-v", mount]);
        }
        self.sh_with(&options, script)
    }

    /// The same with options of `podman run` instead of volumes.
    #[track_caller]
    pub fn sh_with(&self, options: &[&str], script: &str) -> String {
        self.done(&self.run_sh(options, script))
    }

    /// The arguments that [`Podman::sh_with`] runs Podman with.
    pub fn run_sh<'a>(&'a self, options: &[&'a str], script: &'a str) -> Vec<&'a str> {
        let mut arguments = vec!["run", "--rm"];
        arguments.extend(options);
        arguments.extend([self.image.as_str(), "sh", "-ec", script]);
        arguments
    }

    /// Starts a container that has a volume at `/VOLUME`, runs a script there, and then waits for [`Podman::end`].
    #[track_caller]
    pub fn start(&self, container: &str, volume: &str, script: &str) {
        let shared = self.shared.path().display();
        let ready = self.shared.path().join(container);
        let _ = fs::remove_file(&ready);
        self.done(&[
            "run",
            "--detach",
            "--name",
            container,
            "--volume",
            &format!("{volume}:/{volume}"),
            "--volume",
            &format!("{shared}:{shared}"),
            // Nothing in it handles SIGTERM.
            "--stop-signal",
            "KILL",
            &self.image,
            "sh",
            "-ec",
            &format!("{script}\n: > {}; exec sleep 3600", ready.display()),
        ]);
        super::wait_until(|| ready.exists());
    }

    /// Runs a shell script, `set -e`, in a container that was started.
    #[track_caller]
    pub fn exec(&self, container: &str, script: &str) -> String {
        self.done(&["exec", container, "sh", "-ec", script])
    }

    /// Ends containers and removes them.
    #[track_caller]
    pub fn end(&self, containers: &[&str]) {
        self.done(&[&["rm", "--force", "--time", "0"], containers].concat());
    }

    /// What `podman volume inspect` says of each volume.
    #[track_caller]
    pub fn inspect(&self, volumes: &[&str]) -> Vec<Value> {
        let said = self.done(&[&["volume", "inspect"], volumes].concat());
        serde_json::from_str(&said).expect("JSON")
    }

    /// The names that `podman volume ls` gives, sorted; it must say nothing else.
    #[track_caller]
    pub fn volumes(&self) -> Vec<String> {
        let listed = self.outcome(&["volume", "ls", "--quiet"]);
        assert!(listed.status == 0 && listed.stderr.is_empty(), "{listed:?}");
        let mut names: Vec<_> = listed.stdout.lines().map(str::to_owned).collect();
        names.sort();
        names
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Containers first: `volume rm --force` of one that is just ending can wait for ever (Podman 4.3).
        for all in [&["rm", "-af", "--time", "0"][..], &["volume", "rm", "-af"]] {
            let ended = self.outcome(all);
            if ended.status != 0 {
                println!("podman {all:?}: {ended:?}");
            }
        }
    }
}

/// The arguments of `podman volume create`.
pub fn create<'a>(driver: &'a str, name: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["volume", "create", "--driver", driver];
    for option in options {
        arguments.extend(["--opt", option]);
    }
    arguments.push(name);
    arguments
}

/// Podman as a service, which does much in less time than as many commands do. Ended when dropped.
pub struct Service {
    pub socket: PathBuf,
    child: Child,
    client: Plugin,
}

impl Service {
    pub fn start() -> Self {
        let socket = Path::new("/run/podman-service.sock");
        let child = Command::new("podman")
            .args(["system", "service", "--time=0"])
            .arg(format!("unix://{}", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        super::wait_until(|| UnixStream::connect(socket).is_ok());
        Self {
            socket: socket.to_owned(),
            child,
            client: Plugin::new(socket),
        }
    }

    /// Makes a volume of ours; the HTTP status and what is answered.
    #[track_caller]
    pub fn create(&self, name: &str, options: &[&str]) -> (u16, Value) {
        let options: BTreeMap<_, _> = options
            .iter()
            .map(|option| option.split_once('=').unwrap_or((option, "")))
            .collect();
        let volume = json!({"Name": name, "Driver": DRIVER, "Options": options});
        self.client.call("v4.0.0/libpod/volumes/create", &volume)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A further drop-in of containers.conf, as long as this lives. Of two that say the same, the one with the later name counts.
pub struct DropIn(PathBuf);

impl DropIn {
    pub fn new(name: &str, text: &str) -> Self {
        fs::create_dir_all(DROP_INS).unwrap();
        let file = Path::new(DROP_INS).join(name).with_extension("conf");
        fs::write(&file, text).unwrap();
        Self(file)
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Places of this test's own for all that Podman keeps, in the test's own mount namespace, whose `/run` is empty already.
fn fresh_places() {
    let none = None::<&str>;
    let tmpfs = |at: &str, mode: &str| {
        fs::create_dir_all(at).unwrap();
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(mode),
        )
        .unwrap();
    };
    let policy =
        fs::read("/etc/containers/policy.json").expect("Debian's configuration of containers");
    tmpfs("/etc/containers", "mode=755");
    fs::write("/etc/containers/policy.json", policy).unwrap();
    tmpfs("/var/lib/containers", "mode=755");
    // The file of its locks is there: two databases must not share it.
    tmpfs("/dev/shm", "mode=1777");
    for name in ["subuid", "subgid", "passwd"] {
        let (own, file) = (Path::new("/run").join(name), Path::new("/etc").join(name));
        fs::copy(&file, &own).unwrap();
        mount(Some(&own), &file, none, MsFlags::MS_BIND, none).unwrap();
    }
    // crun takes cgroup2 alone, no mixture with the first version.
    mount(
        Some("cgroup2"),
        "/sys/fs/cgroup",
        Some("cgroup2"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
}
