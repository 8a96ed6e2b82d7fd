// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line, from `init` on, as scripts rely on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Test, Tier, test};
use crate::support::census::Known;
use crate::support::command::{Outcome, outcome, run};
use crate::support::daemon::Plugin;
use crate::support::reflink::ReflinkFs;
use crate::support::site::{Kind, Site, with_store};
use crate::support::{PROGRAM, temp_dir, wait_until};

pub fn tests() -> Vec<Test> {
    let mut tests = with_store(
        Kind::Reflink,
        "cli",
        &[
            ("init_again_changes_nothing", init_again),
            ("list_and_show_without_a_daemon", list_and_show),
            ("import_keeps_everything", import_keeps_everything),
            ("import_is_newest", import_is_newest),
            ("import_leaves_nothing_when_it_fails", import_fails),
            ("remove", remove),
            ("exit_codes", exit_codes),
        ],
    );
    // What is of LVM itself, or goes through it in a way of its own.
    tests.extend(with_store(
        Kind::Lvm,
        "cli",
        &[
            ("init_again_changes_nothing", init_again),
            ("init_loop", init_loop),
            ("list_and_show_without_a_daemon", list_and_show),
            ("import_keeps_everything", import_keeps_everything),
            ("remove", remove),
            ("what_is_not_ours_stays", foreign),
        ],
    ));
    tests.extend(with_store(
        Kind::Rbd,
        "cli",
        &[
            ("init_again_changes_nothing", init_again),
            ("list_and_show_without_a_daemon", list_and_show),
            ("import_keeps_everything", import_keeps_everything),
            ("remove", remove),
        ],
    ));
    tests.extend([
        test(Tier::Host, "cli::hooks_wait_for_no_daemon", hooks),
        test(Tier::Reflink, "cli::a_slow_end_is_told", slow_end),
    ]);
    tests
}

#[track_caller]
fn assert_fails(outcome: &Outcome, code: i32, words: &[&str]) {
    assert_eq!(outcome.status, code, "{outcome:?}");
    for word in words {
        assert!(
            outcome.stderr.contains(word),
            "{word:?} is not in: {}",
            outcome.stderr
        );
    }
}

fn kinds(list: &[Value]) -> Vec<&str> {
    list.iter()
        .map(|row| row["kind"].as_str().unwrap())
        .collect()
}

/// Mounts a volume from an entry, which a daemon that runs sees within 5 s only.
fn mount_entry(plugin: &Plugin, name: &str, options: &Value) -> PathBuf {
    plugin.create(name, options);
    let mut answer = Value::Null;
    wait_until(|| {
        let status;
        (status, answer) = plugin.call("VolumeDriver.Mount", &json!({"Name": name, "ID": "x"}));
        status == 200
    });
    PathBuf::from(answer["Mountpoint"].as_str().unwrap())
}

/// A container with a volume of ours, whose hooks are run by hand.
struct Hooked {
    dir: tempfile::TempDir,
    state: String,
}

impl Hooked {
    fn new() -> Self {
        let dir = temp_dir();
        let place = |name: &str| dir.path().join(name);
        let [socket, mounts] = ["socket", "mounts"].map(|name| place(name).display().to_string());
        let config =
            format!("socket = {socket:?}\nmount-dir = {mounts:?}\n[reflink]\ndir = \"/x\"\n");
        fs::write(place("config.toml"), config).unwrap();
        let mount =
            json!({"destination": "/cache", "type": "bind", "source": format!("{mounts}/one")});
        let spec = json!({"ociVersion": "1.0.2", "mounts": [mount]});
        fs::write(place("config.json"), spec.to_string()).unwrap();
        let state = json!({"ociVersion": "1.0.2", "id": "c", "status": "created", "pid": 1, "bundle": dir.path()});
        Self {
            state: state.to_string(),
            dir,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Runs a stage's hook, as a Podman that keeps its events in the journal does; tells how long that took.
    fn run(&self, stage: &str) -> Duration {
        let since = Instant::now();
        let mut hook = Command::new("sh")
            .args(["-c", "\"$0\" --config \"$1\" hook \"$2\"; exit $?"])
            .arg(PROGRAM)
            .arg(self.dir.path().join("config.toml"))
            .args([stage, "--events-backend", "journald"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = hook.stdin.take().unwrap();
        stdin.write_all(self.state.as_bytes()).unwrap();
        drop(stdin);
        assert!(hook.wait().unwrap().success(), "{stage}");
        println!("{stage}: {:?}", since.elapsed());
        since.elapsed()
    }

    /// On a busy host the program itself takes its time to start: the bound is seen to hold at one of several tries.
    fn is_done_in_a_second(&self) {
        for stage in ["createRuntime", "poststop"] {
            let bound = Duration::from_secs(1);
            assert!((0..5).any(|_| self.run(stage) < bound), "{stage}");
        }
    }
}

/// Hooks of containers while the daemon is away, and while it hangs: nobody takes their connections, and then no more can wait for that.
fn hooks() {
    let hooked = Hooked::new();
    hooked.is_done_in_a_second();
    let socket = hooked.socket();
    let _listener = UnixListener::bind(&socket).unwrap();
    hooked.is_done_in_a_second();
    let mut waiting = Vec::new();
    let address = UnixAddr::new(&socket).unwrap();
    loop {
        let client = socket::socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK,
            None,
        );
        let client = client.unwrap();
        match socket::connect(client.as_raw_fd(), &address) {
            Ok(()) => waiting.push(client),
            Err(error) => {
                assert_eq!(error, nix::Error::EAGAIN, "after {}", waiting.len());
                break;
            }
        }
    }
    hooked.is_done_in_a_second();
}

/// A daemon that is there is told how a container ended, though the journal takes longer than a hook may where it is away, and is waited
/// for, though the store does.
fn slow_end() {
    const SLOW: Duration = Duration::from_millis(1500);
    let hooked = Hooked::new();
    let entry = r#"{"PODMAN_EVENT":"died","PODMAN_EXIT_CODE":"7"}"#;
    let journal = hooked.dir.path().join("journalctl");
    let script = format!("#!/bin/sh\nsleep {}\necho '{entry}'\n", SLOW.as_secs_f32());
    fs::write(&journal, script).unwrap();
    fs::set_permissions(&journal, fs::Permissions::from_mode(0o755)).unwrap();
    // In this test's own mount namespace.
    run(
        "mount",
        ["--bind", journal.to_str().unwrap(), "/usr/bin/journalctl"],
    );
    let listener = UnixListener::bind(hooked.socket()).unwrap();
    let daemon = thread::spawn(move || {
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            while !asked.ends_with('}') {
                let mut bytes = [0; 1024];
                let length = stream.read(&mut bytes).unwrap();
                assert_ne!(length, 0, "{asked}");
                asked.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
            }
            let ended = asked.starts_with("POST /Friend.Ended ");
            if ended {
                thread::sleep(SLOW);
            }
            // Nobody reads it any more where the hook has given up.
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{}");
            if ended {
                return asked;
            }
        }
    });
    assert!(hooked.run("poststop") > 2 * SLOW);
    let asked = daemon.join().unwrap();
    assert!(asked.contains("\"ExitCode\":7"), "{asked}");
}

fn init_again(kind: Kind) {
    let site = Site::bare(kind);
    assert_fails(&site.outcome(&["list"]), 1, &["no such file", "init"]);
    site.init();
    let config = fs::read(&site.config).unwrap();
    let inode = fs::metadata(&site.config).unwrap().ino();
    let store = site.everything();
    let list = site.list();
    assert_eq!(kinds(&list), ["base"]);

    site.init();
    assert_eq!(fs::read(&site.config).unwrap(), config);
    assert_eq!(
        fs::metadata(&site.config).unwrap().ino(),
        inode,
        "not even written again"
    );
    assert_eq!(site.everything(), store);
    assert_eq!(site.list(), list);

    // With settings of the administrator's own it is still the same.
    site.configure("premounted = 3\n");
    site.init();
    assert!(
        fs::read_to_string(&site.config)
            .unwrap()
            .contains("premounted = 3")
    );

    // Another store is refused, before anything is touched.
    let elsewhere = temp_dir();
    let at = elsewhere.path().join("store");
    let other = match kind {
        Kind::Lvm | Kind::Rbd => site.outcome(&["init", "--reflink", at.to_str().unwrap()]),
        Kind::Reflink => site.outcome(&["init", "--loop", at.to_str().unwrap(), "--size", "1G"]),
    };
    assert_fails(&other, 1, &["another store", site.config.to_str().unwrap()]);
    assert!(!at.exists());
}

fn init_loop(_: Kind) {
    // A file system that has direct I/O.
    let disk = ReflinkFs::new(2 << 10);
    let site = Site::bare(Kind::Reflink);
    let file = disk.path().join("pool.img");
    let path = file.to_str().unwrap();
    let init = [
        "init",
        "--loop",
        path,
        "--size",
        "1G",
        "--base-size",
        "512M",
    ];
    site.done(&init);
    let config = fs::read_to_string(&site.config).unwrap();
    assert!(config.contains(path), "{config}");
    let settings: toml::Table = config.parse().unwrap();
    let vg = settings["lvm"]["vg"].as_str().unwrap();
    let seqno = || run("vgs", ["--noheadings", "-o", "vg_seqno", vg]);
    let before = seqno();
    site.done(&init);
    assert_eq!(seqno(), before);
    assert_eq!(fs::read_to_string(&site.config).unwrap(), config);
    assert_eq!(kinds(&site.list()), ["base"]);

    // As after a boot: the loop device is not there.
    let device = run("losetup", ["--noheadings", "-O", "NAME", "-j", path]);
    run("vgchange", ["-q", "-an", vg]);
    run("losetup", ["--detach", device.trim()]);
    assert_eq!(kinds(&site.list()), ["base"]);

    run("vgremove", ["-q", "-ff", "-y", vg]);
    for device in run("losetup", ["--noheadings", "-O", "NAME", "-j", path]).split_whitespace() {
        run("losetup", ["--detach", device]);
    }
    // A file that it did not make is left alone.
    fs::write(&file, "somebody's").unwrap();
    fs::remove_file(&site.config).unwrap();
    assert_fails(&site.outcome(&init), 1, &[path]);
    assert_eq!(fs::read(&file).unwrap(), b"somebody's");
}

fn list_and_show(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let source = temp_dir();
    fs::write(source.path().join("file"), vec![7; 3 << 20]).unwrap();
    let dir = source.path().to_str().unwrap();
    site.done(&["import", dir, "--tags", "linux main", "--scope", "acme/app"]);
    site.done(&["import", dir, "--tags", "linux"]);
    let restores = json!({"restore": "linux zzz; linux", "save": "next", "on-miss": "fail"});
    let at = mount_entry(daemon.plugin(), "job", &restores);
    // The copy that Create made before these entries were noticed is listed until it is removed.
    site.settled(&[Known::mounted("job")]);

    let check = |mounted: bool| {
        let list = site.list();
        assert_eq!(kinds(&list), ["base", "entry", "entry", "volume"]);
        let [base, newer, older, volume] = &list[..] else {
            panic!("{list:?}");
        };
        assert_eq!(
            base["tags"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|t| *t == "friend:default")
                .count(),
            1
        );
        for row in &list {
            let mut names: Vec<_> = row
                .as_object()
                .unwrap()
                .keys()
                .map(String::as_str)
                .collect();
            names.sort_unstable();
            for name in [
                "created", "kind", "mounted", "name", "origin", "scope", "size", "tags", "used",
                "volume",
            ] {
                assert!(names.contains(&name), "{name} is not in {row}");
            }
            let created: jiff::Timestamp = row["created"].as_str().unwrap().parse().unwrap();
            assert!(created.as_second() > 1_700_000_000);
            assert!(row["size"].as_u64().unwrap() >= 1 << 30, "{row}");
            let used = row["used"].as_u64().unwrap();
            assert!(used < row["size"].as_u64().unwrap(), "{row}");
        }
        assert_eq!(newer["scope"], Value::Null);
        assert_eq!(older["scope"], "acme/app");
        let tags: BTreeSet<_> = older["tags"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_str().unwrap())
            .collect();
        let want = [
            "friend:snapshot",
            "friend:cache:linux",
            "friend:cache:main",
            "friend:scope:acme/app",
        ];
        assert_eq!(tags, BTreeSet::from(want));
        assert!(older["used"].as_u64().unwrap() >= 3 << 20, "{older}");
        assert_eq!(volume["volume"], "job");
        assert_eq!(volume["origin"], newer["name"]);
        assert_eq!(volume["mounted"], mounted);
        for row in [base, newer, older] {
            assert_eq!(row["volume"], Value::Null);
            assert_eq!(row["mounted"], false);
        }

        let table = site.done(&["list"]);
        assert!(
            table.contains("linux main") && table.contains("job"),
            "{table}"
        );

        let story: Value = serde_json::from_str(&site.done(&["show", "job", "--json"])).unwrap();
        assert_eq!(story["options"], restores);
        assert_eq!(story["lineage"][0]["name"], newer["name"]);
        assert_eq!(story["mounted"], mounted);
        assert_eq!(
            story["status"].is_object(),
            mounted,
            "told by the daemon alone"
        );
        let lv = volume["name"].as_str().unwrap();
        let again: Value = serde_json::from_str(&site.done(&["show", lv, "--json"])).unwrap();
        assert_eq!(again["volume"], "job");
        let entry = site.done(&["show", newer["name"].as_str().unwrap()]);
        assert!(entry.contains(lv), "what was made from it: {entry}");
    };
    check(true);
    daemon.plugin().unmount("job", "x");
    assert!(!at.exists());
    daemon.kill();
    check(false);
}

/// What of a tree must survive, by path.
fn picture(root: &Path) -> BTreeMap<String, String> {
    let mut names: Vec<_> = run("find", [root.to_str().unwrap(), "-printf", "%P\n"])
        .lines()
        .map(str::to_owned)
        .collect();
    names.sort();
    let mut inodes = BTreeMap::new();
    let mut picture = BTreeMap::new();
    for name in names {
        let path = root.join(&name);
        let meta = fs::symlink_metadata(&path).unwrap();
        let first = inodes.entry(meta.ino()).or_insert_with(|| name.clone());
        let mut content = DefaultHasher::new();
        if meta.is_file() {
            for part in fs::read(&path).unwrap().chunks(1 << 16) {
                // As quick as holes are; the size tells them apart.
                if part != &[0; 1 << 16][..part.len()] {
                    content.write(part);
                }
            }
        } else if meta.is_symlink() {
            content.write(fs::read_link(&path).unwrap().as_os_str().as_encoded_bytes());
        }
        let size = if meta.is_dir() { 0 } else { meta.len() };
        let is = format!(
            "mode {:o} owner {}:{} links {} same as {first:?} size {size} mtime {}.{} content {:x} {:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.mtime(),
            meta.mtime_nsec(),
            content.finish(),
            attributes(&path),
        );
        picture.insert(name, is);
    }
    picture
}

fn attributes(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = [0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names[..length]
        .split(|&b| b == 0)
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        // XFS shows ACLs a second time by these names of its own.
        .filter(|name| !name.is_empty() && !name.starts_with("trusted.SGI_ACL_"))
        // Of the file system: xfsprogs 7 gives its root `autofsck`.
        .filter(|name| !name.starts_with("trusted.xfs:"))
        .map(|name| {
            let mut value = [0; 4096];
            let length = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..]).unwrap();
            (name, value[..length].to_vec())
        })
        .collect()
}

/// Size of a file that is one hole but for its end and 100 kB in the middle; more
/// than an empty file system takes.
const SPARSE: u64 = 200 << 20;

fn import_keeps_everything(kind: Kind) {
    let site = Site::new(kind);
    // Attributes of all kinds need a file system that has them: not a tmpfs.
    let holder = ReflinkFs::new(512);
    let source = holder.path().join("source tree");
    let at = |name: &str| source.join(name);
    fs::create_dir(&source).unwrap();
    fs::create_dir_all(at("deep/er")).unwrap();
    fs::write(at("deep/er/file"), "content").unwrap();
    fs::hard_link(at("deep/er/file"), at("linked")).unwrap();
    fs::hard_link(at("deep/er/file"), at("deep/linked too")).unwrap();
    symlink("deep/er/file", at("symbolic")).unwrap();
    symlink("/nowhere", at("dangling")).unwrap();
    fs::write(at("unreadable"), "secret").unwrap();
    fs::write(at("program"), "#!/bin/sh\n").unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::write(at("name with\ttab and é"), "x").unwrap();
    let run_at = |tool: &str, arguments: &[&str], name: &str| {
        run(tool, [arguments, &[at(name).to_str().unwrap()]].concat());
    };
    run_at("mkfifo", &[], "pipe");
    run_at("chown", &["1000:1001"], "program");
    run_at("chown", &["-h", "12345:54321"], "symbolic");
    run_at("chown", &["65534:0"], "deep");
    run_at("setfattr", &["-n", "user.comment", "-v", "kept"], "linked");
    run_at("setfattr", &["-n", "trusted.mark", "-v", "kept"], "deep");
    run_at("setcap", &["cap_net_bind_service=+ep"], "program");
    run_at("setfacl", &["-m", "u:1234:rwx,g:4321:r"], "deep/er/file");
    run_at("setfacl", &["-d", "-m", "u:1234:rwx"], "deep");
    fs::set_permissions(at("unreadable"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(at("empty"), fs::Permissions::from_mode(0o4711)).unwrap();
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(SPARSE).unwrap();
    sparse.write_all_at(b"end", SPARSE - 3).unwrap();
    sparse.write_all_at(&[1; 100_000], 8 << 20).unwrap();
    run_at(
        "touch",
        &["-h", "-d", "2001-02-03 04:05:06.789"],
        "symbolic",
    );
    run_at("touch", &["-d", "1999-12-31 23:59:59.123456789"], "deep/er");
    fs::set_permissions(&source, fs::Permissions::from_mode(0o2771)).unwrap();
    run("chown", ["1000:1001", source.to_str().unwrap()]);
    run(
        "touch",
        ["-d", "2005-05-05 05:05:05", source.to_str().unwrap()],
    );
    let before = picture(&source);
    assert!(
        before["program"].contains("security.capability"),
        "{}",
        before["program"]
    );
    assert!(
        before["deep"].contains("posix_acl_default"),
        "{}",
        before["deep"]
    );

    let daemon = site.serve();
    // In a guest one will do.
    let types: &[&str] = match kind {
        Kind::Reflink => &["xfs", "ext4"],
        Kind::Lvm | Kind::Rbd => &["xfs"],
    };
    for &fs in types {
        let text = site.done(&[
            "import",
            source.to_str().unwrap(),
            "--tags",
            fs,
            "--fs",
            fs,
            "--size",
            "4G",
        ]);
        let entry = text.split(':').next().unwrap().to_owned();
        let row = site
            .list()
            .into_iter()
            .find(|row| row["name"] == entry.as_str())
            .unwrap();
        assert_eq!(row["kind"], "entry");
        assert_eq!(row["size"].as_u64(), Some(4 << 30));
        assert!(
            row["used"].as_u64().unwrap() < SPARSE,
            "holes stay holes: {row}"
        );
        let options = json!({"restore": fs, "on-miss": "fail"});
        let at = mount_entry(daemon.plugin(), "v1", &options);
        let after = picture(Path::new(&at));
        for (name, was) in &before {
            assert_eq!(after.get(name), Some(was), "{fs}: {name:?}");
        }
        assert_eq!(after.len(), before.len(), "{fs}: {:?}", after.keys());
        let mut sparse = File::open(Path::new(&at).join("sparse")).unwrap();
        assert!(sparse.metadata().unwrap().blocks() < 2048, "{fs}");
        assert_eq!(sparse.seek(SeekFrom::End(0)).unwrap(), SPARSE);
        daemon.plugin().unmount("v1", "x");
        daemon
            .plugin()
            .ok("VolumeDriver.Remove", &json!({"Name": "v1"}));
    }

    // Owner and mode of the root, where the command line says them.
    site.done(&[
        "import",
        source.to_str().unwrap(),
        "--tags",
        "owned",
        "--owner",
        "7:8",
        "--mode",
        "0700",
    ]);
    let options = json!({"restore": "owned", "on-miss": "fail"});
    let at = mount_entry(daemon.plugin(), "v2", &options);
    let meta = fs::metadata(&at).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (7, 8, 0o700)
    );
    daemon.plugin().unmount("v2", "x");
}

/// What is published while it copies is older.
fn import_is_newest(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let content = temp_dir();
    let mut big = File::create(content.path().join("big")).unwrap();
    for number in 0..64 {
        big.write_all(&vec![number; 1 << 20]).unwrap();
    }
    fs::write(content.path().join("imported"), "").unwrap();
    let dir = content.path().to_str().unwrap();
    let mut import = site.command(&["import", dir, "--tags", "a"]);
    let mut import = import.spawn().unwrap();
    let pid = Pid::from_raw(import.id().try_into().unwrap());
    let making = || {
        site.census()
            .lvs
            .values()
            .any(|tags| tags.contains("friend:making"))
    };
    wait_until(making);
    kill(pid, Signal::SIGSTOP).unwrap();
    assert!(making());

    plugin.create("w", &json!({"save": "a"}));
    let at = plugin.mount("w", "x");
    fs::write(at.join("published"), "").unwrap();
    plugin.unmount("w", "x");
    wait_until(|| site.census().entries().len() == 1);
    kill(pid, Signal::SIGCONT).unwrap();
    assert!(import.wait().unwrap().success());

    wait_until(|| site.census().entries().len() == 2);
    // The daemon may not have noticed yet.
    wait_until(|| {
        plugin.create("v", &json!({"restore": "a"}));
        let at = plugin.mount("v", "x");
        let newest = at.join("imported").exists();
        plugin.unmount("v", "x");
        plugin.remove("v");
        newest
    });
    let listed = site.list();
    let entry = listed
        .iter()
        .find(|row| row["tags"].to_string().contains("friend:cache:a"));
    assert!(
        entry.unwrap()["tags"]
            .to_string()
            .contains("friend:note:after:")
    );
    daemon.stop();
}

fn import_fails(kind: Kind) {
    let site = Site::new(kind);
    let before = site.everything();
    let source = temp_dir();
    let dir = source.path().to_str().unwrap();
    for n in 0..40 {
        let file = File::create(source.path().join(format!("{n}"))).unwrap();
        // No hole and no zero: all of it is copied.
        let mut out = std::io::BufWriter::new(file);
        for _ in 0..16 {
            out.write_all(&[n; 1 << 20]).unwrap();
        }
    }
    let missing = source.path().join("missing");
    for (arguments, code, words) in [
        (
            &["import", missing.to_str().unwrap(), "--tags", "a"][..],
            1,
            &["missing"][..],
        ),
        (
            &["import", "/etc/hostname", "--tags", "a"],
            1,
            &["not a directory"],
        ),
        (&["import", dir, "--tags", ""], 2, &["--tags"]),
        (&["import", dir, "--tags", "a*"], 2, &["--tags", "letters"]),
        (
            &["import", dir, "--tags", "a", "--scope", "x y"],
            2,
            &["--scope"],
        ),
        (
            &["import", dir, "--tags", "a", "--fs", "ntfs"],
            2,
            &["--fs", "ext4"],
        ),
        (
            &["import", dir, "--tags", "a", "--owner", "me"],
            2,
            &["--owner"],
        ),
        (
            &["import", dir, "--tags", "a", "--size", "much"],
            2,
            &["--size", "30G"],
        ),
        (
            &["import", dir, "--tags", "a", "--size", "300M"],
            1,
            &["--size", "too small"],
        ),
    ] {
        assert_fails(&site.outcome(arguments), code, words);
        assert_eq!(site.everything(), before, "{arguments:?}");
    }

    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let child = site
            .command(&["import", dir, "--tags", "a"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        wait_until(|| {
            let children = ["-x", "-P", &pid.to_string(), "cp"];
            outcome("pgrep", children).status == 0
        });
        kill(pid, signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("interrupted"), "{text}");
        assert_eq!(site.everything(), before, "{signal}");
    }

    // Killed, it leaves what the daemon removes at its start.
    let child = site
        .command(&["import", dir, "--tags", "a"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    wait_until(|| site.everything() != before);
    kill(pid, Signal::SIGKILL).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(9));
    assert_eq!(kinds(&site.list()), ["base"], "nothing half-made is listed");
    let _daemon = site.serve();
    wait_until(|| site.everything() == before);
}

fn remove(kind: Kind) {
    let site = Site::new(kind);
    let source = temp_dir();
    let dir = source.path().to_str().unwrap();
    let import = || {
        let text = site.done(&["import", dir, "--tags", "a"]);
        text.split(':').next().unwrap().to_owned()
    };
    let base = site.list()[0]["name"].as_str().unwrap().to_owned();
    let names = || -> Vec<String> {
        site.list()
            .iter()
            .map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    };

    // Without a daemon.
    let entry = import();
    site.done(&["remove", &entry]);
    assert_eq!(names(), [base.as_str()]);
    assert_fails(&site.outcome(&["remove", &entry]), 3, &[&entry]);
    assert_fails(&site.outcome(&["remove", &base]), 1, &["base"]);
    assert_fails(&site.outcome(&["remove", "nobody"]), 3, &["nobody"]);
    assert_fails(&site.outcome(&["remove", "../x"]), 3, &["../x"]);

    // With one.
    let entry = import();
    let daemon = site.serve();
    daemon.plugin().create("v1", &json!({}));
    site.done(&["remove", &entry]);
    assert_fails(&site.outcome(&["pin", "v1"]), 1, &["only entries"]);
    let at = daemon.plugin().mount("v1", "x");
    assert_fails(
        &site.outcome(&["remove", "v1"]),
        1,
        &["v1", "in use", at.to_str().unwrap()],
    );
    assert_fails(&site.outcome(&["remove", &base]), 1, &["base"]);
    assert_fails(&site.outcome(&["remove", "nobody"]), 3, &["nobody"]);
    daemon.plugin().unmount("v1", "x");
    site.done(&["remove", "v1"]);
    assert_eq!(daemon.plugin().names(), [""; 0]);
    wait_until(|| names() == [base.as_str()]);

    // A volume of a daemon that is gone: kept while it is mounted, then removed.
    daemon.plugin().create("v2", &json!({}));
    let at = daemon.plugin().mount("v2", "x");
    daemon.kill();
    for arguments in [&["remove", "v2"][..], &["remove", "--force", "v2"]] {
        let helps =
            "start the daemon, and have it taken away by `lvm-cache-friend remove --force v2`";
        assert_fails(&site.outcome(arguments), 1, &["volume v2", "in use", helps]);
    }
    run("umount", [at.to_str().unwrap()]);
    let lv = site.list()[1]["name"].as_str().unwrap().to_owned();
    site.done(&["remove", &lv]);
    assert_eq!(names(), [base.as_str()]);
    assert_eq!(site.serve().plugin().names(), [""; 0]);
}

fn exit_codes(kind: Kind) {
    let site = Site::new(kind);
    for (arguments, code) in [
        (&["--help"][..], 0),
        (&["--version"], 0),
        (&["help", "import"], 0),
        (&["list"], 0),
        (&["list", "--json"], 0),
        (&["show", "nobody"], 3),
        (&["remove", "nobody"], 3),
        (&["show"], 2),
        (&["dance"], 2),
        (&[], 2),
        (&["init"], 2),
        (&["list", "--yaml"], 2),
        (&["import", "/"], 2),
        (&["serve", "--log-level", "loud"], 2),
    ] {
        let output = site.outcome(arguments);
        assert_eq!(output.status, code, "{arguments:?}: {output:?}");
    }
    assert_fails(
        &site.outcome(&["stats"]),
        1,
        &["no daemon answers", "doctor"],
    );
    let help = site.done(&["--help"]);
    for word in [
        "Exit codes",
        "0  done",
        "1  failed",
        "2  wrong usage",
        "3  ",
    ] {
        assert!(help.contains(word), "{help}");
    }
    // A reader that has seen enough.
    let mut child = site
        .command(&["list"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");

    let good = fs::read_to_string(&site.config).unwrap();
    fs::write(&site.config, format!("colour = 3\n{good}")).unwrap();
    assert_fails(
        &site.outcome(&["list"]),
        1,
        &[
            site.config.to_str().unwrap(),
            "line 1",
            "colour",
            "mount-dir",
        ],
    );
}

/// LVs of others in the group and in the pool, and some that are half ours.
fn foreign(kind: Kind) {
    let site = Site::bare(kind);
    let vg = site.store();
    run(
        "lvcreate",
        ["-q", "-y", "-Wn", "-L", "64M", "-n", "friend-foreign", &vg],
    );
    run(
        "lvcreate",
        [
            "-q",
            "-y",
            "-Wn",
            "-L",
            "64M",
            "-n",
            "tagged",
            "--addtag",
            "friend:cache:x",
            &vg,
        ],
    );
    let typo = site.outcome(&["init", "--vg", "no-such-group", "--size", "1G"]);
    let why = "volume group no-such-group cannot be used: `lvm lvs`: Volume group \"no-such-group\" not found;";
    assert_fails(&typo, 1, &[why, "`vgs` shows which there are"]);
    assert_eq!(typo.stderr.lines().count(), 1, "{}", typo.stderr);
    site.init();
    let in_pool = |name: &str, tags: &[&str]| {
        let pool = format!("{vg}/friend-pool");
        let mut arguments = vec!["-q", "-y", "-kn", "-V", "64M", "-T", &pool, "-n", name];
        for tag in tags {
            arguments.extend(["--addtag", tag]);
        }
        run("lvcreate", &arguments);
    };
    in_pool("friend-mine", &[]);
    in_pool("friend-half", &["friend:cache:a"]);
    in_pool(
        "friend-odd",
        &["friend:snapshot", "friend:default", "friend:doomed"],
    );
    in_pool(
        "friend-new",
        &["friend:snapshot", "friend:cache:a", "friend:unheard-of"],
    );
    let others = || -> Vec<String> {
        let ours = |name: &str| name == "friend-pool" || name == "friend-default";
        let columns = "lv_name,lv_attr,lv_size,lv_tags,lv_time";
        run("lvs", ["--noheadings", "--separator=|", "-o", columns, &vg])
            .lines()
            .map(|line| line.trim().to_owned())
            .filter(|line| {
                let name = line.split('|').next().unwrap();
                !ours(name) && !line.contains("friend:from:")
            })
            .collect()
    };
    let before = others();
    assert_eq!(before.len(), 6, "{before:?}");

    let output = site.outcome(&["list", "--json"]);
    let list: Vec<Value> = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(kinds(&list), ["base"]);
    let text = output.stderr;
    for name in ["friend-half", "friend-odd", "friend-new"] {
        assert!(text.contains(name), "{text}");
        assert_fails(&site.outcome(&["remove", name]), 1, &["left alone"]);
    }
    for name in ["friend-foreign", "friend-mine", "tagged"] {
        assert!(!text.contains(name), "{text}");
        assert_fails(&site.outcome(&["remove", name]), 3, &[name]);
    }

    let daemon = site.serve();
    daemon.plugin().create("v1", &json!({"restore": "a; x"}));
    let at = daemon.plugin().mount("v1", "x");
    fs::write(at.join("file"), "x").unwrap();
    daemon.plugin().unmount("v1", "x");
    daemon
        .plugin()
        .ok("VolumeDriver.Remove", &json!({"Name": "v1"}));
    daemon.stop();
    site.init();
    assert_eq!(others(), before);
}
