// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The packages: what is in them, and a host's life with the .deb, over an upgrade and a reboot to its purge.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::docs::{REPOSITORY, block, type_in};
use crate::harness::{Test, Tier, test};
use crate::quickstart::entries;
use crate::support::command::{outcome, run, sh, succeed};
use crate::support::vm::boot_part;
use crate::support::{PROGRAM, busybox_image, temp_dir, wait_until};

pub fn tests() -> Vec<Test> {
    vec![
        test(Tier::Host, "package::content", content),
        test(Tier::Driver, "package::from_install_to_purge", || {
            life(&[]);
        }),
        test(
            Tier::Driver,
            "trixie::package::from_install_to_purge",
            || {
                life(&["--tree", "trixie"]);
            },
        ),
        test(Tier::Part, "package::before_the_reboot", before_the_reboot),
        test(Tier::Part, "package::after_the_reboot", after_the_reboot),
    ]
}

/// Where [`build`] leaves a package for an upgrade.
const NEWER: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/newer.deb");

/// Makes the packages as the documents say, but of the program that is tested, and one of a version above them: once in each run of tests, as guests read the files.
pub fn build() {
    let run = std::env::var("NEXTEST_RUN_ID").unwrap_or_else(|_| std::process::id().to_string());
    fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut built = File::options();
    let built = built.create(true).read(true).write(true).truncate(false);
    let built = built.open(concat!(env!("CARGO_TARGET_TMPDIR"), "/packages-of"));
    let mut built = Flock::lock(built.unwrap(), FlockArg::LockExclusive).unwrap();
    let mut last = String::new();
    built.read_to_string(&mut last).unwrap();
    if last == run {
        return;
    }
    let make = |targets: &[&str]| {
        // A test runner that make started is no part of that.
        let mut make = Command::new("make");
        make.arg("--silent").arg(format!("program={PROGRAM}"));
        make.args(targets).env_remove("MAKEFLAGS");
        succeed(make.current_dir(REPOSITORY));
    };
    // First, as the packer removes what it made before.
    make(&["package"]);
    let newer = [
        "deb",
        "--quiet",
        "--no-build",
        "--fast",
        "--deb-version",
        "9",
    ];
    let output = ["--output", NEWER];
    let mut cargo = Command::new("cargo");
    succeed(cargo.args(newer).args(output).current_dir(REPOSITORY));
    make(&["deb", "rpm"]);
    built.rewind().unwrap();
    built.set_len(0).unwrap();
    built.write_all(run.as_bytes()).unwrap();
}

/// The newest file in a directory of `target/`.
fn newest(dir: &str, extension: &str) -> PathBuf {
    let dir = Path::new(REPOSITORY).join("target").join(dir);
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    files
        .filter(|file| file.extension().is_some_and(|end| end == extension))
        .max_by_key(|file| fs::metadata(file).unwrap().modified().unwrap())
        .expect("a package")
}

fn content() {
    build();
    let deb = newest("debian", "deb");
    run("lintian", ["--fail-on", "error", deb.to_str().unwrap()]);

    let list = |package: &str| -> Vec<String> {
        let name = |line: &str| line.trim_start_matches('.').to_owned();
        let files = package.lines().map(name);
        let mut files: Vec<_> = files.filter(|file| !file.ends_with('/')).collect();
        files.sort();
        files
    };
    let paths = "tar --list --file -";
    let deb = list(&sh(&format!(
        "dpkg-deb --fsys-tarfile {} | {paths}",
        deb.display()
    )));
    let rpm = list(&sh(&format!(
        "rpm --query --list --package {}",
        newest("generate-rpm", "rpm").display()
    )));
    for (package, files) in [("deb", &deb), ("rpm", &rpm)] {
        for wanted in [
            "/usr/bin/lvm-cache-friend",
            "/usr/lib/systemd/system/lvm-cache-friend.service",
            "/usr/lib/systemd/system/lvm-cache-friend.socket",
            "/usr/lib/systemd/system/lvm-cache-friend-gc.timer",
            "/usr/lib/systemd/system/lvm-cache-friend-supervise.service",
            "/usr/lib/sysusers.d/lvm-cache-friend.conf",
            "/usr/lib/tmpfiles.d/lvm-cache-friend.conf",
            "/etc/containers/containers.conf.d/50-lvm-cache-friend.conf",
            "/usr/share/containers/oci/hooks.d/50-lvm-cache-friend-poststop.json",
            "/usr/share/lvm-cache-friend/lvm-cache-friend.spec",
            "/usr/share/bash-completion/completions/lvm-cache-friend",
            "/usr/share/doc/lvm-cache-friend/examples/config.toml",
        ] {
            assert!(
                files.iter().any(|file| file == wanted),
                "the {package} lacks {wanted}: {files:#?}"
            );
        }
        assert!(
            files
                .iter()
                .any(|file| file.starts_with("/usr/share/man/man1/lvm-cache-friend-init.1")),
            "the {package} lacks man pages: {files:#?}"
        );
    }
}

fn life(system: &[&str]) {
    build();
    let here = temp_dir();
    let path = |name: &str| here.path().join(name).to_str().unwrap().to_owned();
    let share = path("share");
    fs::create_dir(&share).unwrap();
    fs::copy(NEWER, here.path().join("share/newer.deb")).unwrap();
    let (disk, root) = (format!("{}:120G", path("disk")), path("root"));
    let options = [
        system,
        &[
            "--systemd",
            "--mem",
            "2048",
            "--disk",
            &disk,
            "--root",
            &root,
            "--share",
            &share,
        ],
    ]
    .concat();
    let first = boot_part(&options, "package::before_the_reboot");
    print!("{}{}", first.stdout, first.stderr);
    assert!(
        fs::exists(format!("{share}/rebooting")).unwrap(),
        "it came to its end"
    );
    let second = boot_part(&options, "package::after_the_reboot");
    print!("{}{}", second.stdout, second.stderr);
    assert_eq!(second.status, 0);
}

/// What is of the test's place: no network, for containers and for apt, and no manual pages to index. Returns an image's name, by
/// which the documents name it.
pub fn prepare() -> String {
    let image = busybox_image();
    run("podman", ["tag", &image, "docker.io/library/busybox"]);
    fs::create_dir_all("/etc/containers/containers.conf.d").unwrap();
    fs::write(
        "/etc/containers/containers.conf.d/60-test.conf",
        "[containers]\nnetns = \"none\"\n",
    )
    .unwrap();
    fs::write(
        "/etc/apt/apt.conf.d/60-test",
        "Dir::State::Lists \"/tmp/no-lists\";\nAPT::Sandbox::User \"root\";\n",
    )
    .unwrap();
    let _ = fs::remove_file("/var/lib/man-db/auto-update");
    image
}

/// The block that installs, but for what [`build`] has done.
pub fn install() {
    let install = block("install");
    let (built, install) = install.split_once('\n').unwrap();
    assert_eq!(built, "make deb");
    type_in(install);
}

/// Runs a script in a container with a volume at /cache.
pub fn container(volume: &str, image: &str, script: &str) -> String {
    let mount = format!("{volume}:/cache");
    run(
        "podman",
        ["run", "--rm", "-v", &mount, image, "sh", "-ec", script],
    )
}

/// Starts one that waits for [`end_container`] and then adds a line to /cache/dates.
pub fn start_container(name: &str, volume: &str, image: &str) {
    let mount = format!("{volume}:/cache");
    let script =
        "trap 'exit 143' TERM; until [ -e /tmp/go ]; do sleep 0.1; done; date >> /cache/dates";
    run(
        "podman",
        [
            "run", "-d", "--name", name, "-v", &mount, image, "sh", "-ec", script,
        ],
    );
}

pub fn end_container(name: &str) {
    run("podman", ["exec", name, "touch", "/tmp/go"]);
    assert_eq!(run("podman", ["wait", name]).trim(), "0");
    run("podman", ["rm", name]);
}

/// What a unit logged since the boot that is worse than information.
pub fn warnings(unit: &str) -> String {
    run(
        "journalctl",
        [
            "--quiet",
            "--boot",
            "--unit",
            unit,
            "--priority",
            "warning",
            "--output",
            "cat",
        ],
    )
}

fn property(unit: &str, name: &str) -> String {
    run("systemctl", ["show", "--value", "--property", name, unit])
}

/// A container that has nothing to do with caches, but with the hooks, which see a bind mount.
fn other_container(image: &str) {
    let said = container("/tmp", image, "ls -d /cache");
    assert_eq!(said, "/cache\n");
}

const SERVICE: &str = "lvm-cache-friend.service";
const SOCKET: &str = "lvm-cache-friend.socket";

fn before_the_reboot() {
    let image = prepare();
    fs::create_dir_all("/var/log/journal").unwrap();
    run("journalctl", ["--flush"]);

    // Installed and nothing more: containers start, and the driver's absence is told.
    install();
    other_container(&image);
    let refused = outcome(
        "podman",
        ["volume", "create", "--driver", "lvm-cache-friend", "early"],
    );
    assert!(
        refused.status == 125 && refused.stderr.contains("plugin.sock"),
        "{refused:?}"
    );
    for unit in [SERVICE, SOCKET] {
        assert_eq!(property(unit, "ActiveState").trim(), "inactive");
    }

    run("vgcreate", ["--quiet", "VG", "/dev/vda"]);
    type_in(&block("init-vg"));
    let again = type_in(&block("init-vg"));
    assert!(again.contains("nothing to do"), "init again: {again}");
    let said = type_in(&block("start"));
    assert!(said.contains("KIND"), "the table at its end: {said}");
    let whose = sh("cd /run/lvm-cache-friend; stat --format '%U %G %a' plugin.sock mnt");
    assert_eq!(
        whose,
        "root lvm-cache-friend 660\nroot lvm-cache-friend 750\n"
    );
    entries(1);

    // An upgrade under a container: the daemon is another, the socket is not, and the lease ends as any.
    start_container("long", "try", &image);
    let (daemon, socket) = (
        property(SERVICE, "MainPID"),
        property(SOCKET, "InvocationID"),
    );
    type_in(&block("upgrade").replace("./lvm-cache-friend_NEW.deb", "/share/newer.deb"));
    let version = ["--show", "--showformat", "${Version}", "lvm-cache-friend"];
    assert_eq!(run("dpkg-query", version), "9");
    assert_ne!(property(SERVICE, "MainPID"), daemon);
    assert_eq!(property(SOCKET, "InvocationID"), socket);
    end_container("long");
    entries(2);
    assert_eq!(
        warnings(SERVICE),
        "",
        "the daemon has nothing to complain of"
    );

    // A store in a file, for after the reboot.
    sh("mkdir /tmp/content
        echo kept > /tmp/content/file
        friend='lvm-cache-friend --config /etc/lvm-cache-friend/loop.toml'
        $friend init --loop /var/lib/caches.img --size 2G --base-size 1G
        $friend import /tmp/content --tags loop");

    // Not even a container that uses a cache holds up the reboot.
    start_container("cut-short", "try", &image);
    let write = "echo cut short >> /cache/dates";
    run("podman", ["exec", "cut-short", "sh", "-c", write]);
    fs::write("/share/rebooting", "").unwrap();
    run("systemctl", ["--no-block", "reboot"]);
    sleep(Duration::from_secs(600));
}

fn after_the_reboot() {
    let image = busybox_image();
    // Nobody has started it. At the first try or at a later one: LVM may take longer than it is given while a host boots.
    for unit in [SERVICE, SOCKET] {
        wait_until(|| property(unit, "ActiveState").trim() == "active");
    }
    println!("warnings since the boot: {}", warnings(SERVICE));
    let before = run(
        "journalctl",
        [
            "--quiet", "--boot", "-1", "--unit", SERVICE, "--output", "cat",
        ],
    );
    assert!(
        before.contains("stopped; mounted volumes stay mounted"),
        "the daemon came to its end: {before}"
    );
    let listed = run("lvm-cache-friend", ["list"]);
    println!("{listed}");
    let active = [
        "--noheadings",
        "--options",
        "lv_name",
        "--select",
        "lv_active=active && tags=friend:snapshot && tags!=friend:volume:try",
        "VG",
    ];
    assert_eq!(
        run("lvs", active),
        "",
        "no entry is active, and none was made so by the boot"
    );
    let dates = container("try", &image, "cat /cache/dates");
    assert_eq!(
        dates.lines().count(),
        2,
        "the newest entry is used again, and what was cut short is none: {dates}"
    );
    run("podman", ["rm", "--force", "cut-short"]);
    run("podman", ["volume", "rm", "try"]);

    // The file is behind no loop device since the boot; the daemon's start sees to that.
    sh(
        "mv /etc/lvm-cache-friend/loop.toml /etc/lvm-cache-friend/config.toml
        losetup --associated /var/lib/caches.img | grep . && exit 1
        systemctl restart lvm-cache-friend.service",
    );
    let driver = [
        "volume",
        "create",
        "--driver",
        "lvm-cache-friend",
        "--opt",
        "restore=loop",
        "looped",
    ];
    run("podman", driver);
    assert_eq!(container("looped", &image, "cat /cache/file"), "kept\n");
    run("podman", ["volume", "rm", "looped"]);

    // Removed: stopped in order, with all data. What a volume's removal left goes behind its answer.
    let kept = || sh("lvs --noheadings --options lv_name,lv_tags | sort");
    wait_until(|| !kept().contains("friend:doomed"));
    let before = kept();
    type_in(&block("remove"));
    wait_until(|| property(SERVICE, "ActiveState").trim() == "inactive");
    assert_eq!(property(SERVICE, "Result").trim(), "success");
    assert_eq!(kept(), before);
    assert!(fs::exists("/etc/lvm-cache-friend/config.toml").unwrap());
    other_container(&image);

    let said = type_in(&block("purge"));
    for word in ["vg = ", "loop-file = \"/var/lib/caches.img\""] {
        assert!(said.contains(word), "purge says what it leaves: {said}");
    }
    assert_eq!(kept(), before);
    for gone in [
        "/etc/lvm-cache-friend",
        "/etc/containers/containers.conf.d/50-lvm-cache-friend.conf",
        "/etc/systemd/system/multi-user.target.wants/lvm-cache-friend.service",
        "/etc/systemd/system/sockets.target.wants/lvm-cache-friend.socket",
        "/etc/systemd/system/timers.target.wants/lvm-cache-friend-gc.timer",
    ] {
        assert!(fs::symlink_metadata(gone).is_err(), "{gone} is gone");
    }
    other_container(&image);
}
