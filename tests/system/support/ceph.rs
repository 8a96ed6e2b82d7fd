// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Ceph cluster of a guest (tests/vm/ceph), and the namespace in it that stores of tests are in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, Once};

use lvm_cache_friend::cache::record::Role;
use lvm_cache_friend::cache::units::Bytes;
use lvm_cache_friend::storage::Store as _;
use lvm_cache_friend::storage::rbd::ceph::{Cluster, Omap, OmapWrite, Pool};
use lvm_cache_friend::storage::rbd::{Place, RbdStore};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::command::{outcome, run, sh};
use super::lvm::DISK;

/// The pool and the namespace, as `init --rbd` takes them.
pub const STORE: &str = "rbd/caches";
/// Who may use that namespace and nothing else.
pub const USER: &str = "cache";
/// Where a host has its runtime files.
pub const RUN: &str = "/run/lvm-cache-friend";
/// Hosts of tests, beside the guest's own.
pub const HOSTS: [&str; 2] = ["one", "two"];

/// What the store's index is called.
pub const INDEX: &str = "lvm-cache-friend.index";

pub fn place() -> Place {
    Place {
        pool: "rbd".to_owned(),
        namespace: "caches".to_owned(),
        user: USER.to_owned(),
        conf: None,
    }
}

/// The configuration of another host, of one's.
pub fn config_of(host: &str, text: &str) -> String {
    text.replace("\n[rbd]\n", &format!("\n[rbd]\nhost = {host:?}\n"))
}

/// Brings the cluster up, where it is not, and gives the guest an id.
pub fn up() {
    up_at("127.0.0.1");
}

/// The same with daemons at another address of this guest's.
pub fn up_at(address: &str) {
    static UP: Once = Once::new();
    UP.call_once(|| {
        if !Path::new("/srv/ceph").exists() {
            run("mkfs.ext4", ["-q", "-F", DISK]);
            run("mkdir", ["/srv/ceph"]);
            run("mount", [DISK, "/srv/ceph"]);
            fs::write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n").unwrap();
        }
        let up = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/ceph"))
            .args(["/srv/ceph", address])
            .status();
        assert!(up.expect("bash").success(), "no cluster");
        // Room for a test that fills it, and for what is written until that is noticed.
        set_quota(Bytes::mib(2048));
    });
}

/// How much the pool takes, for the rest of a test.
pub fn set_quota(size: Bytes) {
    let bytes = size.0.to_string();
    run(
        "ceph",
        ["osd", "pool", "set-quota", "rbd", "max_bytes", &bytes],
    );
}

/// Takes down and removes all that tests have made, but for a base of this size, if there is one.
pub fn clear(base: Option<Bytes>) {
    up();
    // Mounts may be stacked, and some are of namespaces that are about to go.
    sh(
        "while m=$(awk '$1 ~ \"^/dev/rbd\" { print $2; exit }' /proc/mounts) && [ -n \"$m\" ]; do umount -l \"$m\"; done",
    );
    let left = keys();
    if left.is_empty() {
        return;
    }
    // No daemon of an earlier test lives, whatever runtime directory it had.
    let is_joined = |key: &String| key.starts_with("host/");
    let joined = OmapWrite {
        remove: left.into_keys().filter(is_joined).collect(),
        ..OmapWrite::default()
    };
    assert!(pool().write(INDEX, &joined).unwrap());
    for host in hosts(base) {
        let store = RbdStore::open(&place(), &host, Path::new(RUN)).unwrap();
        for lv in store.list().unwrap().lvs {
            if Role::from_tags(&lv.tags) != Role::Base || Some(lv.size) != base {
                super::wait_until(|| store.remove(&lv.name).is_ok());
            }
        }
        // What a daemon had open that was killed is busy for half a minute: `osd_client_watch_timeout`.
        super::wait_until(|| store.clear_away().is_ok());
    }
    if base.is_none() || !keys().keys().any(|key| key.starts_with("volume/")) {
        rados(&["rm", INDEX]);
    }
}

/// Ceph's tool for images, as the store's user.
#[track_caller]
pub fn rbd(arguments: &[&str]) -> String {
    run("rbd", [&["--id", USER][..], arguments].concat())
}

/// Its tool for objects, in the store's namespace.
#[track_caller]
pub fn rados(arguments: &[&str]) -> String {
    let namespace = ["--id", USER, "-p", "rbd", "--namespace", "caches"];
    run("rados", [&namespace[..], arguments].concat())
}

/// The hosts that have something in the store beside a base of this size.
fn hosts(base: Option<Bytes>) -> BTreeSet<String> {
    let (volumes, images) = (listed("volume"), listed("image"));
    let is_base = |volume: &Value| {
        let tags = volume["tags"].as_array().unwrap();
        let size = volume["size"].as_u64().map(Bytes);
        tags.iter().any(|tag| tag == "friend:default") && size == base
    };
    let of_volumes = volumes.values().filter(|volume| !is_base(volume));
    let host = |value: &Value| value["host"].as_str().map(str::to_owned);
    let of_images = images.values().flat_map(|image| {
        let snapshots = image["snapshots"].as_object();
        let of_snapshots = snapshots
            .into_iter()
            .flat_map(|snapshots| snapshots.values());
        let makers = of_snapshots.map(|snapshot| host(&snapshot["maker"]));
        makers.chain([host(&image["maker"])]).flatten()
    });
    let is_used = |name: &str| {
        volumes.values().any(|volume| image_of(volume).0 == name)
            || images
                .values()
                .any(|image| image["parent"]["image"] == name)
    };
    // What nothing needs any more, anybody may remove.
    let unused = images.keys().any(|name| !is_used(name));
    let any = unused.then(|| HOSTS[0].to_owned());
    let of_volumes = of_volumes.filter_map(host);
    of_volumes.chain(of_images).chain(any).collect()
}

/// The namespace, as its user sees it.
fn pool() -> Arc<Pool> {
    static POOL: Mutex<Option<Arc<Pool>>> = Mutex::new(None);
    let mut pool = POOL.lock().unwrap();
    let connect = || {
        let cluster = Cluster::connect(USER, None).unwrap();
        Arc::new(cluster.pool("rbd", "caches").unwrap())
    };
    Arc::clone(pool.get_or_insert_with(connect))
}

/// All that is in the store's index.
pub fn keys() -> Omap {
    let (keys, more) = pool().page(INDEX, "", "", 1024).unwrap();
    assert!(!more, "more than a test makes");
    keys
}

/// The number of the last change.
pub fn generation() -> String {
    String::from_utf8(keys().remove("generation").unwrap()).unwrap()
}

/// Makes the index one of another version, which no host reads or changes, or what it was.
pub fn set_format(format: &str) {
    set_key("format", format);
}

/// Changes a key of the index as a host does, so that all see it.
pub fn set_key(key: &str, value: &str) {
    super::wait_until(|| {
        let was = generation();
        let next = was.parse::<u64>().unwrap() + 1;
        let write = OmapWrite {
            create: false,
            compare: Omap::from([("generation".to_owned(), was.into_bytes())]),
            set: Omap::from([
                (key.to_owned(), value.as_bytes().to_vec()),
                ("generation".to_owned(), next.to_string().into_bytes()),
            ]),
            remove: Vec::new(),
        };
        pool().write(INDEX, &write).unwrap()
    });
}

/// What the index has of this kind, by name: `volume` or `image`.
pub fn listed(kind: &str) -> BTreeMap<String, Value> {
    keys()
        .iter()
        .filter_map(|(key, value)| {
            let name = key.strip_prefix(kind)?.strip_prefix('/')?;
            Some((name.to_owned(), serde_json::from_slice(value).unwrap()))
        })
        .collect()
}

/// The image that a volume is in, and the snapshot of it that it is, where it is one.
pub fn image_of(volume: &Value) -> (&str, Option<&str>) {
    let content = &volume["content"];
    let field = |kind: &str, name: &str| content[kind][name].as_str();
    match field("own", "image") {
        Some(image) => (image, None),
        None => (field("at", "image").unwrap(), field("at", "snapshot")),
    }
}

/// The cluster's clients that are the store's user: the number that it gave each, as the kernel shows its own, and the address.
pub fn clients() -> BTreeMap<String, String> {
    let said = run("ceph", ["daemon", "mon.a", "sessions"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let sessions = said.as_array().unwrap().iter();
    sessions
        .filter(|session| session["entity_name"] == format!("client.{USER}"))
        .map(|session| {
            let address = &session["addrs"]["addrvec"][0];
            let ip_and_port = address["addr"].as_str().unwrap();
            let address = format!("{ip_and_port}/{}", address["nonce"]);
            (format!("client{}", session["global_id"]), address)
        })
        .collect()
}

/// The number of this machine's kernel's client, where it has anything mapped.
pub fn kernel() -> Option<String> {
    let mut devices = fs::read_dir("/sys/bus/rbd/devices").into_iter().flatten();
    let device = devices.next()?.ok()?;
    let id = fs::read_to_string(device.path().join("client_id")).ok()?;
    Some(id.trim().to_owned())
}

/// Puts a client on the cluster's blocklist, by its address, until this is dropped.
pub struct Blocklisted(String);

impl Blocklisted {
    pub fn new(address: &str) -> Self {
        run("ceph", ["osd", "blocklist", "add", address]);
        Self(address.to_owned())
    }
}

impl Drop for Blocklisted {
    fn drop(&mut self) {
        run("ceph", ["osd", "blocklist", "rm", &self.0]);
    }
}

/// The images that have a device, and those of which a snapshot has one.
pub fn mapped() -> BTreeSet<String> {
    let devices = fs::read_dir("/sys/bus/rbd/devices").into_iter().flatten();
    let named = devices.flatten().filter_map(|device| {
        let field = |name: &str| {
            let text = fs::read_to_string(device.path().join(name)).ok()?;
            Some(text.trim().to_owned())
        };
        let is_head = field("pool_ns")? == "caches" && field("current_snap")? == "-";
        is_head.then(|| field("name")).flatten()
    });
    named.collect()
}

/// An image, or a snapshot, as a device beside the store's own. Gone when dropped.
pub struct Mapped(pub PathBuf);

impl Mapped {
    pub fn new(image: &str, snapshot: Option<&str>, options: &[&str]) -> Self {
        let spec = match snapshot {
            Some(snapshot) => format!("{STORE}/{image}@{snapshot}"),
            None => format!("{STORE}/{image}"),
        };
        // Without udev, `rbd map` would wait for it.
        let map = ["device", "map", "--options", "noudev", &spec];
        let device = rbd(&[&map[..], options].concat());
        Self(device.trim().into())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let unmap = ["device", "unmap", "--options", "noudev"].map(AsRef::as_ref);
        let ended = outcome("rbd", unmap.into_iter().chain([self.0.as_os_str()]));
        if ended.status != 0 {
            println!("{}: {ended:?}", self.0.display());
        }
    }
}

/// A daemon of the cluster's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Monitor,
    Osd,
}

impl Part {
    fn program(self) -> (&'static str, [&'static str; 2]) {
        match self {
            Self::Monitor => ("ceph-mon", ["--id", "a"]),
            Self::Osd => ("ceph-osd", ["--id", "0"]),
        }
    }

    /// `kill -9`.
    pub fn kill(self) {
        let program = self.program().0;
        let pid = run("pidof", ["-s", program]);
        kill(Pid::from_raw(pid.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
        super::wait_until(|| outcome("pidof", [program]).status != 0);
    }

    /// Starts it again, outside of the test's cgroup.
    pub fn start(self) {
        let (program, arguments) = self.program();
        let line = format!(
            "echo $$ >/sys/fs/cgroup/cgroup.procs; exec {program} {} >/dev/null 2>&1",
            arguments.join(" ")
        );
        sh(&line);
    }
}

/// Of the monitor, by both of its protocols, and of what daemons bind (`ms_bind_port_min` and `_max`).
const PORTS: &str = "{ 3300, 6789, 6800-7568 }";

/// Packets of Ceph's in this machine are lost, until this is dropped.
pub struct Away(());

impl Away {
    /// All of them.
    pub fn new() -> Self {
        Self::at(
            "input",
            &format!("tcp sport {PORTS} drop; tcp dport {PORTS} drop"),
        )
    }

    /// Those that the kernel's client sends, whose sockets are of no user.
    pub fn of_the_kernel() -> Self {
        let of_processes = "meta skuid 0-4294967295 accept";
        Self::at("output", &format!("{of_processes}; tcp dport {PORTS} drop"))
    }

    fn at(hook: &str, rules: &str) -> Self {
        let chain = format!("type filter hook {hook} priority filter; {rules};");
        sh(&format!(
            "nft 'table inet away {{ chain {hook} {{ {chain} }}; }}'"
        ));
        Self(())
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        sh("nft delete table inet away");
    }
}
