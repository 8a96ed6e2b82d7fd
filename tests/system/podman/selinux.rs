// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SELinux: what confined containers do with their volumes is allowed.
//!
//! The guest's root has no labels, and needs none: all outside of containers has the kernel's own label there, and may do everything
//! (`tests/vm/tree`), while a container is confined as on a host of Fedora's. Permissive, the kernel tells of all that it would
//! have refused; enforcing, what it refuses fails.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::Value;

use super::hooks::Hooks;
use super::nested::builds;
use super::{Host, ended_after, mountpoint, supervisor};
use crate::harness::{Group, System, Test, Tier, test};
use crate::support::command::{outcome, run};
use crate::support::podman::Podman;
use crate::support::site::{Kind, Site, mounts_at};

/// The label of containers' files in Debian's policy.
const FILES: &str = "system_u:object_r:container_file_t:s0";

pub fn tests() -> Vec<Test> {
    let bodies: [(&str, fn()); 7] = [
        ("nested", nested),
        ("supervised", supervised),
        ("relabelled", relabelled),
        ("permissive", || all(Kind::Lvm, false)),
        ("enforcing", || all(Kind::Lvm, true)),
        // What is not denied when that is the end of it would not be denied otherwise either.
        ("reflink", || all(Kind::Reflink, true)),
        ("settings", settings),
    ];
    bodies
        .into_iter()
        .map(|(name, body)| {
            test(
                Tier::Guest(Group::Selinux),
                format!("selinux::{name}"),
                body,
            )
            .only_on(System::Tree("trixie"))
            .timeout(900)
        })
        .collect()
}

/// SELinux with a policy, and the kernel's log from now on.
struct Selinux {
    log: File,
}

impl Selinux {
    fn on(enforcing: bool) -> Self {
        let enforce = Path::new("/sys/fs/selinux/enforce");
        if outcome("mountpoint", ["-q", "/sys/fs/selinux"]).status != 0 {
            run("mount", ["-t", "selinuxfs", "selinuxfs", "/sys/fs/selinux"]);
            let config = "SELINUX=permissive\nSELINUXTYPE=default\n";
            fs::write("/etc/selinux/config", config).unwrap();
            run("load_policy", ["-i"]);
            // A container with a user namespace has the host's, which udev would have labelled.
            let devices = ["null", "zero", "full", "tty", "random", "urandom"];
            run("restorecon", devices.map(|name| format!("/dev/{name}")));
            // Ten lines in five seconds are what the log gets if nothing is said.
            fs::write("/proc/sys/kernel/printk_ratelimit", "0").unwrap();
        }
        // What was told of once is told of again after a change to enforcing.
        fs::write(enforce, "1").unwrap();
        fs::write(enforce, if enforcing { "1" } else { "0" }).unwrap();
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        Self { log }
    }

    /// What containers were denied since the last call.
    fn denied(&mut self) -> Vec<String> {
        let mut denied = Vec::new();
        let mut record = [0; 8192];
        loop {
            let length = match self.log.read(&mut record) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("the kernel's log: {error}"),
            };
            let text = String::from_utf8_lossy(&record[..length]).into_owned();
            let ours =
                |field: &str| field.starts_with("scontext=") && field.contains(":container_");
            if text.contains("avc:  denied") && text.split_whitespace().any(ours) {
                denied.push(text);
            }
        }
        denied
    }

    #[track_caller]
    fn nothing_denied(&mut self, what: &str) {
        let denied = self.denied();
        assert!(denied.is_empty(), "{what}: {}", denied.concat());
    }
}

impl Drop for Selinux {
    fn drop(&mut self) {
        let _ = fs::write("/sys/fs/selinux/enforce", "0");
    }
}

fn host(kind: Kind, settings: &str) -> Host {
    let site = Site::new(kind);
    site.configure(settings);
    Host {
        daemon: Some(site.serve()),
        // The guest's own, whichever the store.
        podman: Podman::new(Kind::Lvm),
        site,
    }
}

/// What a job does in a cache: the first and any later one. Its label's categories are the last thing said.
const USE: &str = r#"
    cd /cache
    [ ! -e who ] || { cat who dir/deep/file link >/dev/null; ./busybox true; }
    mkdir -p dir/deep
    date +%N >dir/deep/file
    echo more >>dir/deep/file
    ln -sf dir/deep/file link
    date +%N >who.new; mv who.new who
    cp /bin/busybox new; chmod 755 new; mv new busybox; ./busybox true
    mkfifo pipe; rm pipe; touch gone; rm gone; ls -lR . >/dev/null
    cat /proc/self/attr/current
"#;

/// What a job does with its socket.
const ASK: &str = r#"
    cd /run/lvm-cache-friend
    bin/lvm-cache-friend restore late --key late
    [ ! -e late/who ] || cat late/who >/dev/null
    mkdir -p late/dir; date +%N >late/who; date +%N >late/dir/file
    bin/lvm-cache-friend save late late
    bin/lvm-cache-friend status
    date +%N >own
    cat /proc/self/attr/current
"#;

/// The last line, without the zero byte that some kernels end it with.
fn label(said: &str) -> String {
    let last = said.lines().last().expect("a label");
    last.trim_end_matches('\0').to_owned()
}

fn all(kind: Kind, enforcing: bool) {
    let mut selinux = Selinux::on(enforcing);
    let host = host(kind, "");
    let _hooks = Hooks::new(&host);
    let podman = &host.podman;
    let mut labels = BTreeSet::new();
    let last = |volume: &str| host.status(volume)["last_lease"].clone();
    let published = |before: &Value, last: &dyn Fn() -> Value| {
        let ended = ended_after(before, last);
        assert!(ended["published"].is_string(), "{ended}");
    };
    let mut uses = 0;
    for fs in ["xfs", "ext4"] {
        let tags = [format!("restore={fs}"), format!("save={fs}")];
        let options = [
            &tags[0],
            &tags[1],
            &format!("fs={fs}"),
            "on-miss=empty",
            "size=512M",
        ];
        podman.create("cache", &options);
        let userns = &["--userns=auto:size=2000"][..];
        let relabelled = [("cache:/cache:z", &[][..]), ("cache:/cache:Z", &[])];
        let plain = [("cache:/cache", &[][..]), ("cache:/cache", userns)];
        // What Podman does by itself is the same for either file system.
        let between = if fs == "xfs" { &relabelled[..] } else { &[] };
        for (mount, more) in [&plain[..1], between, &plain].concat() {
            let before = last("cache");
            let said = podman.sh_with(&[&["-v", mount], more].concat(), USE);
            labels.insert(label(&said));
            uses += 1;
            published(&before, &|| last("cache"));
            selinux.nothing_denied(&format!("{fs} {mount} {more:?}"));
        }
        podman.done(&["volume", "rm", "cache"]);
    }
    assert_eq!(labels.len(), uses, "{labels:?}");
    let confined = |label: &String| label.starts_with("system_u:system_r:container_t:s0:c");
    assert!(labels.iter().all(confined), "{labels:?}");

    podman.create("job", &["type=job", "scope=s"]);
    let late = || last("job")["late"].clone();
    for more in [&[][..], &[], &["--userns=auto:size=2000"]] {
        let before = late();
        let volume = ["-v", "job:/run/lvm-cache-friend:rslave"];
        let said = podman.sh_with(&[&volume, more].concat(), ASK);
        assert!(label(&said).contains(":container_t:s0:c"), "{said}");
        published(&before, &late);
        selinux.nothing_denied(&format!("job {more:?}"));
    }
}

/// A volume that is in use has its label, and a container that is to have it relabelled changes nothing in it.
fn relabelled() {
    let mut selinux = Selinux::on(true);
    let host = host(Kind::Reflink, "");
    let podman = &host.podman;
    podman.create("deep", &["reuse=keep"]);
    let head = ["run", "--detach", "--name", "first", "-v", "deep:/deep"];
    podman.done(&[&head[..], &[&podman.image, "sleep", "3600"]].concat());
    podman.exec("first", "cd /deep; mkdir $(seq 300); echo x >300/x");
    let at = mountpoint("deep");
    let shown = mounts_at(&at);
    assert_eq!(shown.last().expect("mounted").label.as_deref(), Some(FILES));

    let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    let asked = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ATTRIB;
    watch.add_watch(&at, asked).unwrap();
    // Podman gives up at the first file that it cannot give a label, having begun with some others; but where the
    // label is right already, it looks at all of them (`rchcon` of go-selinux).
    for (option, most) in [("Z", 50), ("z", 300)] {
        let mount = format!("deep:/deep:{option}");
        podman.sh_with(&["-v", &mount], "true");
        let mut seen = Vec::new();
        while let Ok(events) = watch.read_events() {
            seen.extend(events.into_iter().filter(|event| event.name.is_some()));
        }
        assert!(seen.len() <= most, "{option}: {}", seen.len());
        let changed = |mask: AddWatchFlags| mask.contains(AddWatchFlags::IN_ATTRIB);
        assert!(!seen.iter().any(|event| changed(event.mask)), "{seen:?}");
    }
    assert_eq!(podman.exec("first", "cat /deep/300/x"), "x\n");
    podman.end(&["first"]);
    selinux.nothing_denied("the second container");
}

/// `podman build` in a job, as docs/nested-builds.md says for such a host.
fn nested() {
    let mut selinux = Selinux::on(true);
    let host = host(Kind::Lvm, "");
    let _hooks = Hooks::new(&host);
    builds(&host, &["--security-opt", "label=type:container_engine_t"]);
    selinux.nothing_denied("podman build");
}

/// A runner of the supervisor's, whose FIFO Podman labels for it.
fn supervised() {
    let mut selinux = Selinux::on(true);
    supervisor::confined();
    selinux.nothing_denied("a runner");
}

/// What the configuration can say. Without a label a container is refused, and that is counted: so what the other tests do not
/// see is not there.
fn settings() {
    let mut selinux = Selinux::on(true);
    let unlabelled = host(Kind::Reflink, "selinux-context = \"none\"\n");
    unlabelled.podman.create("kept", &["reuse=keep"]);
    let write = (unlabelled.podman).run_sh(&["-v", "kept:/kept"], "echo x >/kept/x");
    unlabelled.podman.fails(&write, 1, &["Permission denied"]);
    assert!(!selinux.denied().is_empty());
    drop(unlabelled);

    let its = Site::new(Kind::Reflink);
    let label = "system_u:object_r:container_ro_file_t:s0:c1,c2";
    its.configure(&format!("selinux-context = {label:?}\n"));
    let daemon = its.serve();
    let plugin = daemon.plugin();
    plugin.create("kept", &serde_json::json!({"reuse": "keep"}));
    let at = plugin.mount("kept", "test");
    assert_eq!(mounts_at(&at).last().unwrap().label.as_deref(), Some(label));
    plugin.unmount("kept", "test");
    plugin.remove("kept");
    daemon.stop();
    drop(its);

    let its = Site::new(Kind::Reflink);
    its.configure("selinux-context = \"system_u:object_r:no_such_type_t:s0\"\n");
    let refused = its.outcome(&["serve"]);
    assert_ne!(refused.status, 0, "{refused:?}");
    assert!(refused.stderr.contains("no_such_type_t"), "{refused:?}");
}
