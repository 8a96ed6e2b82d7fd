// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The plugin's socket, spoken to as no well-behaved client does.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use lvm_cache_friend::plugin::MAX_WORK;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use crate::harness::Test;
use crate::support::command::outcome;
use crate::support::daemon::{Daemon, Plugin, SOCKET};
use crate::support::site::{Kind, MOUNT_DIR, Site, Stuck, mounts_at, with_store};
use crate::support::{PROGRAM, wait_until};

const ENDPOINTS: [&str; 9] = [
    "Plugin.Activate",
    "VolumeDriver.Create",
    "VolumeDriver.Get",
    "VolumeDriver.List",
    "VolumeDriver.Remove",
    "VolumeDriver.Path",
    "VolumeDriver.Mount",
    "VolumeDriver.Unmount",
    "VolumeDriver.Capabilities",
];

/// Those that look at their body.
const NAMED: [&str; 6] = [
    "VolumeDriver.Create",
    "VolumeDriver.Get",
    "VolumeDriver.Remove",
    "VolumeDriver.Path",
    "VolumeDriver.Mount",
    "VolumeDriver.Unmount",
];

pub fn tests() -> Vec<Test> {
    let mut tests = with_store(
        Kind::Reflink,
        "raw",
        &[
            ("what_is_not_understood_is_refused", refusals),
            ("bad_options_are_refused_by_name", options),
            ("clients_differ", clients),
            ("eight_at_once", eight_at_once),
            ("many_ids_on_one_volume", many_ids),
            ("a_client_that_hangs_up_stops_nothing", hang_up),
            ("list_answers_while_the_store_is_stuck", stuck),
            ("one_daemon_at_a_time", one_daemon),
            ("told_to_stop", told_to_stop),
            ("a_thousand_silent_connections", silent),
            ("a_socket_from_systemd", from_systemd),
            ("log_is_printable", log_is_printable),
            ("ids_of_a_container", ids),
            ("a_command_is_waited_for", waits_for_a_command),
        ],
    );
    // What goes through the store.
    tests.extend(with_store(
        Kind::Lvm,
        "raw",
        &[
            ("bad_options_are_refused_by_name", options),
            ("eight_at_once", eight_at_once),
            ("a_client_that_hangs_up_stops_nothing", hang_up),
            ("list_answers_while_the_store_is_stuck", stuck),
            ("one_daemon_at_a_time", one_daemon),
        ],
    ));
    tests.extend(with_store(
        Kind::Rbd,
        "raw",
        &[
            ("eight_at_once", eight_at_once),
            ("a_client_that_hangs_up_stops_nothing", hang_up),
            ("list_answers_while_the_store_is_stuck", stuck),
            ("one_daemon_at_a_time", one_daemon),
        ],
    ));
    tests
}

fn assert_refused(what: &str, (status, answer): &(u16, Value)) {
    assert!((400..600).contains(status), "{what}: {status} {answer}");
    let text = answer["Err"].as_str().unwrap_or_default();
    assert!(!text.is_empty(), "{what}: {status} {answer}");
    assert!(
        text.chars().count() <= 1001,
        "{what}: {} characters",
        text.len()
    );
    assert!(!text.chars().any(char::is_control), "{what}: {text:?}");
}

/// What no refused request may leave behind.
struct Untouched<'a> {
    site: &'a Site,
    before: String,
}

impl<'a> Untouched<'a> {
    fn new(site: &'a Site) -> Self {
        Self {
            site,
            before: site.everything(),
        }
    }

    fn check(&self, plugin: &Plugin) {
        assert_eq!(plugin.names(), [""; 0]);
        assert_eq!(self.site.everything(), self.before);
        let left: Vec<_> = fs::read_dir(MOUNT_DIR).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// What precreate says of a container's user namespace.
fn ids(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("v1", &json!({}));
    let ranges = |ranges: &[[u64; 3]]| -> Value {
        let range = |[inside, outside, size]: &[u64; 3]| json!({"containerID": inside, "hostID": outside, "size": size});
        ranges.iter().map(range).collect()
    };
    let tell = |uids: &[[u64; 3]], gids: &[[u64; 3]]| {
        let body =
            json!({"Volumes": ["v1"], "UidMappings": ranges(uids), "GidMappings": ranges(gids)});
        plugin.call("Friend.Starting", &body)
    };
    let good = [[0, 100_000, 1000]];
    // Nothing is mounted, so nothing is to be done.
    assert_eq!(tell(&good, &good).0, 200);
    let at = plugin.mount("v1", "test");
    let shown = || {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let place = format!(" {} ", at.display());
        let lines = table.lines().filter(|line| line.contains(&place));
        let options: Vec<_> = lines
            .map(|line| line.split(' ').nth(5).unwrap().to_owned())
            .collect();
        // The one that the lease began with, and one upon it.
        assert!(options.len() <= 2, "{options:?}");
        options.last().cloned().unwrap_or_default()
    };
    let (plain, mapped) = (
        "rw,nosuid,nodev,noatime",
        "rw,nosuid,nodev,noatime,idmapped",
    );
    assert_eq!(tell(&good, &good).0, 200);
    assert_eq!(shown(), mapped);
    for bad in [
        &[[0, 0, 0]][..],
        &[[u64::from(u32::MAX), 0, 2]],
        &[[0, u64::from(u32::MAX), 2]],
    ] {
        assert_refused("a range", &tell(bad, bad));
        assert_refused("a range of users", &tell(bad, &good));
    }
    assert_refused("no groups", &tell(&good, &[]));
    assert_refused("too large", &tell(&[[0, 1 << 32, 1]], &good));
    let many: Vec<_> = (0..400).map(|i| [i, 1000 + 2 * i, 1]).collect();
    assert_refused("many", &tell(&many, &good));
    assert_eq!(shown(), mapped);
    // A container without a namespace of its own.
    assert_eq!(tell(&[], &[]).0, 200);
    assert_eq!(shown(), plain);
    // What the kernel does not map is mounted plainly, and that is said once.
    for second in [5, 6] {
        let overlap = [[0, 100_000, 10], [second, 200_000, 10]];
        assert_eq!(tell(&overlap, &overlap).0, 200);
        assert_eq!(shown(), plain);
    }
    assert_eq!(daemon.log().matches("no idmapped mount").count(), 1);
    plugin.unmount("v1", "test");
    wait_until(|| !at.exists());
    assert_eq!(shown(), "");
}

fn refusals(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let untouched = Untouched::new(&site);

    let long = "a".repeat(5000);
    let names = [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "/etc",
        "a\0b",
        "-a",
        "a b",
        "é",
        "a\n",
        "a*",
        long.as_str(),
    ];
    for endpoint in NAMED {
        for name in names {
            let answer = plugin.call_bytes(
                endpoint,
                json!({"Name": name, "ID": "x"}).to_string().as_bytes(),
            );
            assert_refused(&format!("{endpoint} {name:.20?}"), &answer);
        }
        for body in [
            &b""[..],
            b"{}",
            b"[]",
            b"[\"v1\",\"x\"]",
            b"null",
            b"7",
            b"\"v1\"",
            b"{",
            b"{\"Name\"",
            b"{\"Name\":7}",
            b"{\"Name\":null}",
            b"{\"Name\":[\"v1\"]}",
            b"{\"Name\":{}}",
            b"{\"Name\":true}",
            b"{\"Name\":\"v1\"}}",
            b"\0",
            b"\xff\xfe",
            b"Name=v1",
            b"{\"Name\":\"\xed\xa0\x80\"}",
            b"{\"Name\":\"v1\",\"Name\":\"v2\"}",
        ] {
            let answer = plugin.call_bytes(endpoint, body);
            assert_refused(&format!("{endpoint} {}", body.escape_ascii()), &answer);
        }
        let deep = format!("{{\"Name\":{}1{}}}", "[".repeat(4000), "]".repeat(4000));
        assert_refused("deep", &plugin.call_bytes(endpoint, deep.as_bytes()));
    }
    for body in [
        json!({"Name": "v1", "ID": 7}),
        json!({"Name": "v1", "ID": long}),
    ] {
        for endpoint in ["VolumeDriver.Mount", "VolumeDriver.Unmount"] {
            assert_refused(endpoint, &plugin.call(endpoint, &body));
        }
    }
    // What is well-formed but not there: only Unmount takes it.
    for endpoint in NAMED.iter().filter(|e| !e.ends_with("Create")) {
        let answer = plugin.call(endpoint, &json!({"Name": "unknown", "ID": "x"}));
        if endpoint.ends_with("Unmount") {
            assert_eq!(answer, (200, json!({})));
        } else {
            assert_refused(endpoint, &answer);
            assert_eq!(answer.0, 404, "{endpoint}");
            assert_eq!(answer.1["Err"], "no volume with name unknown found");
        }
    }

    for endpoint in ENDPOINTS {
        let (status, answer) = plugin.call_bytes(endpoint, &vec![b' '; 8 << 20]);
        assert_refused(endpoint, &(status, answer));
        assert_eq!(status, 413, "{endpoint}");
        let path = format!("/{endpoint}");
        for method in ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"] {
            let answer = request(method, &path, "", b"").unwrap();
            assert_refused(method, &answer);
            assert_eq!(answer.0, 405, "{method} {endpoint}");
        }
    }
    for path in [
        "/VolumeDriver.create",
        "/VolumeDriver.Create/",
        "/NetworkDriver.Join",
        "/%00",
        "//",
    ] {
        let answer = request("POST", path, "", b"{}").unwrap();
        assert_refused(path, &answer);
        assert_eq!(answer.0, 404, "{path}");
    }
    untouched.check(plugin);
}

fn options(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let untouched = Untouched::new(&site);
    // Option, value, and a word of what is accepted.
    for (option, value, accepted) in [
        ("colour", "red", "restore"),
        ("Restore ", "a*b", "restore"),
        ("restore", "a*b", "tag"),
        ("restore", "*", "tag"),
        ("restore", "é", "tag"),
        ("save", "a*", "tag"),
        ("save", "a\0b", "tag"),
        ("publish", "maybe", "unless-failed"),
        ("scope", "-x", "letters"),
        ("read-scopes", "a*", "letters"),
        ("size", "big", "30G"),
        ("size", "0", "30G"),
        ("size", "-1G", "30G"),
        ("size", "99999999T", "30G"),
        ("fs", "ntfs", "ext4"),
        ("owner", "me", "1000"),
        ("owner", "1:2:3", "1000"),
        ("owner", "-1", "1000"),
        ("mode", "rwx", "0"),
        ("mode", "99999", "0"),
        ("on-miss", "panic", "base"),
        ("on-error", "panic", "scratch"),
        ("reuse", "maybe", "fresh"),
        ("type", "tmpfs", "cache, job"),
        ("type", "x", "cache"),
        ("o", "size=big", "30G"),
        ("o", "colour=red", "restore"),
    ] {
        let body = json!({"Name": "v1", "Opts": {option: value}});
        let answer = plugin.call("VolumeDriver.Create", &body);
        assert_refused(&body.to_string(), &answer);
        assert_eq!(answer.0, 400, "{body}: {}", answer.1);
        let text = answer.1["Err"].as_str().unwrap();
        let named = if option == "o" {
            value.split('=').next().unwrap()
        } else {
            option.trim()
        };
        assert!(
            text.to_lowercase()
                .contains(&format!("option {}", named.to_lowercase())),
            "{body}: {text}"
        );
        assert!(text.contains(accepted), "{body}: {text}");
    }
    for opts in [
        json!({"size": 3}),
        json!([]),
        json!("size=3G"),
        json!({"size": null}),
    ] {
        let answer = plugin.call("VolumeDriver.Create", &json!({"Name": "v1", "Opts": opts}));
        assert_refused(&opts.to_string(), &answer);
    }
    untouched.check(plugin);
}

/// What Podman and dockerd send, byte for byte where it matters.
fn clients(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let post = |endpoint: &str, headers: &str, body: &[u8]| {
        let answer = request("POST", &format!("/{endpoint}"), headers, body).unwrap();
        assert_eq!(answer.0, 200, "{endpoint}: {}", answer.1);
        answer.1
    };
    let podman = "User-Agent: Go-http-client/1.1\r\n\
                  Content-Type: application/vnd.docker.plugins.v1.1+json\r\n";
    let docker = "Accept: application/vnd.docker.plugins.v1.2+json\r\n";
    for client in [podman, docker, ""] {
        for body in [&b""[..], b"{}", b"{}\n", b"[", b"7"] {
            assert_eq!(
                post("Plugin.Activate", client, body),
                json!({"Implements": ["VolumeDriver"]})
            );
            assert_eq!(
                post("VolumeDriver.Capabilities", client, body),
                json!({"Capabilities": {"Scope": "local"}})
            );
            assert_eq!(
                post("VolumeDriver.List", client, body),
                json!({"Volumes": []})
            );
        }
    }
    // Podman leaves Opts out, dockerd sends null.
    for (client, name, create) in [
        (podman, "p1", &br#"{"Name":"p1"}"#[..]),
        (docker, "d1", b"{\"Name\":\"d1\",\"Opts\":null}\n"),
    ] {
        for _ in 0..2 {
            assert_eq!(post("VolumeDriver.Create", client, create), json!({}));
        }
        let volume = post(
            "VolumeDriver.Get",
            client,
            json!({"Name": name}).to_string().as_bytes(),
        );
        let volume = &volume["Volume"];
        assert_eq!(volume["Name"], name);
        assert!(volume.get("Mountpoint").is_none(), "{volume}");
        let created: jiff::Timestamp = volume["CreatedAt"].as_str().unwrap().parse().unwrap();
        assert!(created.as_second() > 1_700_000_000);
        assert!(volume["Status"].is_object());
        let path = post(
            "VolumeDriver.Path",
            client,
            json!({"Name": name}).to_string().as_bytes(),
        );
        assert_eq!(path, json!({"Mountpoint": ""}));
    }
    let at = plugin.mount("p1", "x");
    for (endpoint, pointer) in [
        ("VolumeDriver.Get", "/Volume/Mountpoint"),
        ("VolumeDriver.Path", "/Mountpoint"),
    ] {
        let answer = plugin.ok(endpoint, &json!({"Name": "p1"}));
        assert_eq!(answer.pointer(pointer).unwrap(), at.to_str().unwrap());
    }
    // Other options than the first time.
    let answer = plugin.call(
        "VolumeDriver.Create",
        &json!({"Name": "p1", "Opts": {"size": "2G"}}),
    );
    assert_refused("other options", &answer);
    assert_eq!(answer.0, 409);

    // Two requests on one connection, the second before the first is answered.
    let mut stream = UnixStream::connect(SOCKET).unwrap();
    let one = "POST /Plugin.Activate HTTP/1.1\r\nHost: plugin\r\nContent-Length: 0\r\n\r\n";
    let last = one.replace("Host", "Connection: close\r\nHost");
    stream
        .write_all((one.to_owned() + &last).as_bytes())
        .unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("VolumeDriver").count(), 2, "{answers}");

    // A body in chunks, and one announced with Expect.
    let mut stream = UnixStream::connect(SOCKET).unwrap();
    stream
        .write_all(
            b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n\
              Transfer-Encoding: chunked\r\n\r\n8\r\n{\"Name\":\r\n5\r\n\"p1\"}\r\n0\r\n\r\n",
        )
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    plugin.unmount("p1", "x");
    for name in ["p1", "d1"] {
        plugin.ok("VolumeDriver.Remove", &json!({"Name": name}));
    }
    assert_eq!(plugin.names(), [""; 0]);
}

fn eight_at_once(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let each = |act: &(dyn Fn(&str) + Sync)| {
        thread::scope(|scope| {
            for n in 0..8 {
                scope.spawn(move || act(&format!("v{n}")));
            }
        });
    };
    each(&|name| plugin.create(name, &json!({"size": "1G"})));
    each(&|name| {
        let at = plugin.mount(name, "x");
        assert_eq!(at, Path::new(MOUNT_DIR).join(name));
        fs::write(at.join("mine"), name).unwrap();
    });
    assert_eq!(plugin.names().len(), 8);
    each(&|name| {
        let text = fs::read_to_string(Path::new(MOUNT_DIR).join(name).join("mine")).unwrap();
        assert_eq!(text, name);
        plugin.unmount(name, "x");
    });
    // The same Create eight times over, and the same Mount.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| plugin.create("one", &json!({})));
        }
    });
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| plugin.mount("one", "x"));
        }
    });
    assert_eq!(
        plugin.names().iter().filter(|name| *name == "one").count(),
        1
    );
    assert_eq!(mounts_at(Path::new(MOUNT_DIR).join("one")).len(), 1);
    plugin.unmount("one", "x");
    assert!(mounts_at(Path::new(MOUNT_DIR).join("one")).is_empty());
}

fn many_ids(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("v1", &json!({}));
    let ids = ["a".repeat(64), "b".repeat(64)];
    let at = plugin.mount("v1", &ids[0]);
    fs::write(at.join("file"), "first").unwrap();
    for id in [&ids[1], &ids[1], &ids[0]] {
        assert_eq!(plugin.mount("v1", id), at);
    }
    let there = || fs::read_to_string(at.join("file")).is_ok();
    assert!(there());
    // An id that never mounted, and one twice: it is a set, not a count.
    plugin.unmount("v1", &"c".repeat(64));
    plugin.unmount("v1", &ids[0]);
    plugin.unmount("v1", &ids[0]);
    assert!(there());
    plugin.unmount("v1", &ids[1]);
    assert!(
        !at.exists(),
        "a stale bind must fail, not write to the host's disk"
    );
    plugin.unmount("v1", &ids[1]);
    plugin.ok("VolumeDriver.Remove", &json!({"Name": "v1"}));
}

fn hang_up(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let mut stream = UnixStream::connect(SOCKET).unwrap();
    let body = json!({"Name": "v1"}).to_string();
    write!(
        stream,
        "POST /VolumeDriver.Create HTTP/1.1\r\nHost: plugin\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    // Begun, then given up.
    wait_until(|| plugin.names() == ["v1"]);
    drop(stream);
    let at = plugin.mount("v1", "x");
    fs::write(at.join("file"), "x").unwrap();
    plugin.unmount("v1", "x");
}

fn stuck(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("v0", &json!({}));
    let clients = match kind {
        Kind::Reflink => MAX_WORK + 50,
        // Those that go on at the end take a while through LVM in a guest.
        Kind::Lvm | Kind::Rbd => 10,
    };
    let (answered, answers) = mpsc::channel();
    thread::scope(|scope| {
        let stuck = Stuck::new(&site, &daemon);
        for n in 0..clients {
            let answered = answered.clone();
            scope.spawn(move || {
                let name = format!("w{n}");
                let answer = plugin.call("VolumeDriver.Create", &json!({"Name": name}));
                answered.send(answer).unwrap();
            });
        }
        if clients > MAX_WORK {
            // Not begun, and told so in time for a client to read it.
            let refused = answers.recv().unwrap();
            assert_refused("too many", &refused);
            assert_eq!(refused.0, 503, "{}", refused.1);
        }
        for _ in 0..20 {
            assert!(plugin.names().contains(&"v0".to_owned()));
            plugin.ok("VolumeDriver.Get", &json!({"Name": "v0"}));
            plugin.unmount("v0", "x");
            plugin.unmount("nobody", "x");
        }
        drop(stuck);
    });
    drop(answered);
    for answer in answers.iter().filter(|(status, _)| *status != 200) {
        assert_refused("while stuck", &answer);
    }
    plugin.create("v1", &json!({}));
}

fn one_daemon(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("v1", &json!({}));
    let mode = fs::metadata(SOCKET).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);

    let second = site.outcome(&["serve"]);
    assert_eq!(second.status, 1, "{second:?}");
    assert!(second.stderr.contains("another"), "{second:?}");
    // Nor one on the same store with a socket and a mount directory of its own.
    let text = fs::read_to_string(&site.config).unwrap();
    let run_dir = site.dir.path().display();
    let apart = site.dir.path().join("apart.toml");
    let paths = format!("socket = \"{run_dir}/plugin.sock\"\nmount-dir = \"{run_dir}/mnt\"\n");
    fs::write(&apart, paths + &text).unwrap();
    let second = outcome(
        PROGRAM,
        ["--config".as_ref(), apart.as_os_str(), "serve".as_ref()],
    );
    assert_eq!(second.status, 1, "{second:?}");
    assert!(second.stderr.contains("another"), "{second:?}");
    assert_eq!(plugin.names(), ["v1"], "the first goes on");

    // A stale socket is in nobody's way.
    daemon.kill();
    assert!(Path::new(SOCKET).exists());
    let daemon = site.serve();
    assert_eq!(daemon.plugin().names(), ["v1"]);
    daemon.stop();
    assert!(!Path::new(SOCKET).exists());
}

/// A daemon that starts while `gc` or `remove` changes the store in its stead.
fn waits_for_a_command(kind: Kind) {
    let site = Site::new(kind);
    let command = File::create(Path::new(&site.store()).join("~daemon")).unwrap();
    let command = Flock::lock(command, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .unwrap();
    let log = [("RUST_LOG", "info")];
    let daemon = Daemon::spawn(&site.config, Path::new(SOCKET), &log);
    wait_until(|| daemon.log().contains("waiting for a command"));
    assert!(
        daemon
            .plugin()
            .try_call("VolumeDriver.List", b"{}")
            .is_err()
    );
    drop(command);
    wait_until(|| daemon.plugin().try_call("VolumeDriver.List", b"{}").is_ok());
    daemon.stop();
}

fn told_to_stop(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("v1", &json!({}));
    let at = plugin.mount("v1", "x");
    fs::write(at.join("before"), "x").unwrap();
    let silent = UnixStream::connect(SOCKET).unwrap();
    daemon.stop();
    drop(silent);
    fs::write(at.join("after"), "x").unwrap();

    let daemon = site.serve();
    let plugin = daemon.plugin();
    assert_eq!(plugin.mount("v1", "x"), at);
    assert!(at.join("before").exists() && at.join("after").exists());
    plugin.unmount("v1", "x");
    assert!(!at.exists());
}

fn silent(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let mut silent: Vec<_> = (0..1000)
        .map(|_| UnixStream::connect(SOCKET).unwrap())
        .collect();
    // Half a request is silence, too.
    for stream in &mut silent[..100] {
        stream.write_all(b"POST /VolumeDriver.List HT").unwrap();
    }
    for stream in &mut silent[100..200] {
        stream
            .write_all(
                b"POST /VolumeDriver.List HTTP/1.1\r\nHost: plugin\r\nContent-Length: 9\r\n\r\n{",
            )
            .unwrap();
    }
    plugin.create("v1", &json!({}));
    plugin.mount("v1", "x");
    assert_eq!(plugin.names(), ["v1"]);
    plugin.unmount("v1", "x");
    // And it does not last for ever.
    for (n, stream) in silent.iter_mut().enumerate() {
        stream
            .set_read_timeout(Some(Duration::from_secs(90)))
            .unwrap();
        let mut rest = Vec::new();
        stream
            .read_to_end(&mut rest)
            .unwrap_or_else(|e| panic!("{n}: {e}"));
        if (100..200).contains(&n) {
            assert!(rest.starts_with(b"HTTP/1.1 408"), "{}", rest.escape_ascii());
        }
    }
    assert_eq!(plugin.names(), ["v1"]);
}

fn from_systemd(kind: Kind) {
    let site = Site::new(kind);
    // It starts the program at the first connection.
    let mut command = Command::new("systemd-socket-activate");
    command.args(["--listen", SOCKET, PROGRAM, "--config"]);
    command.arg(&site.config).arg("serve");
    fs::create_dir_all(Path::new(SOCKET).parent().unwrap()).unwrap();
    let daemon = Daemon::start_as(command);
    let plugin = daemon.plugin();
    plugin.create("v1", &json!({}));
    assert_eq!(plugin.names(), ["v1"]);
    daemon.stop();
    assert!(Path::new(SOCKET).exists(), "it is systemd's");
}

fn log_is_printable(kind: Kind) {
    let site = Site::new(kind);
    let daemon = site.serve();
    let plugin = daemon.plugin();
    for hostile in ["\u{1b}[31mred", "two\nlines", "\u{202e}reverse"] {
        for body in [
            json!({"Name": hostile}),
            json!({"Name": "v1", "Opts": {hostile: "x"}}),
            json!({"Name": "v1", "Opts": {"save": hostile}}),
            json!({"Name": "v1", "ID": hostile}),
        ] {
            for endpoint in NAMED {
                plugin.call(endpoint, &body);
            }
        }
    }
    plugin.call("VolumeDriver.Create", &json!({"Name": "v1"}));
    plugin.call(
        "VolumeDriver.Mount",
        &json!({"Name": "v1", "ID": "\u{1b}]0;x"}),
    );
    plugin.call(
        "VolumeDriver.Unmount",
        &json!({"Name": "v1", "ID": "\u{1b}]0;x"}),
    );
    let log = daemon.log();
    daemon.stop();
    assert!(log.contains("serving"), "{log}");
    for c in ['\u{1b}', '\u{202e}'] {
        assert!(!log.contains(c), "{log:?}");
    }
    assert!(log.lines().all(|line| !line.starts_with("lines")), "{log}");
}

/// One request with further header lines, on a connection of its own.
fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> io::Result<(u16, Value)> {
    let mut stream = UnixStream::connect(SOCKET)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").expect("a header");
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("content-type: application/vnd.docker.plugins.v1.2+json"),
        "{head}"
    );
    let status = head
        .split(' ')
        .nth(1)
        .expect("a status")
        .parse()
        .expect("a number");
    Ok((status, serde_json::from_str(body)?))
}
