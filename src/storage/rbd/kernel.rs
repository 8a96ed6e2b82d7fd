// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images as block devices of the kernel's (krbd), by /sys/bus/rbd, as `rbd map` and `rbd unmap` do it (Ceph's `src/krbd.cc`),
//! but for the wait for udev: devtmpfs has the device by the time that the kernel answers.
//!
//! Which image has which device is never noted anywhere: the kernel tells.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nix::errno::Errno;
use serde_json::{Value, json};

use super::ceph::{CephError, Cluster, PATIENCE};
use crate::cache::spec::FsType;
use crate::exec;
use crate::mount;

const BUS: &str = "/sys/bus/rbd";

/// How long a device that is not mounted may take to go: udev's probes, and children that have not reached their exec
/// yet, hold it for moments.
const LINGER: Duration = Duration::from_millis(500);

/// What the kernel has to know of images (`rbd/features.h`): what they are made with, and `operations`, which an image and its
/// parent have once one is a clone of the other without the parent's protection (clone v2).
const FEATURES: [(u64, &str); 6] = [
    (1, "layering"),
    (4, "exclusive-lock"),
    (8, "object-map"),
    (16, "fast-diff"),
    (32, "deep-flatten"),
    (256, "operations (clone v2)"),
];

/// `KEY_SPEC_THREAD_KEYRING`, linux/keyctl.h.
const THREAD_KEYRING: i32 = -1;

/// Images of one pool and namespace as block devices.
pub struct Kernel {
    fsid: String,
    pool: String,
    namespace: String,
    user: String,
    /// As the kernel takes it: 16 bytes and a head. `None`: the cluster asks for none, or the kernel has it already.
    key: Option<Vec<u8>>,
}

impl std::fmt::Debug for Kernel {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("pool", &self.pool)
            .field("namespace", &self.namespace)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// An image's device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The kernel's number of it: `/dev/rbd` and this.
    pub id: u32,
    /// `(major, minor)`.
    pub number: (u32, u32),
}

impl Device {
    /// Its node.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(self.name())
    }

    /// The number that the cluster gave the kernel's client that has it.
    #[must_use]
    pub fn client(&self) -> Option<i64> {
        let file = Path::new(BUS).join(format!("devices/{}/client_id", self.id));
        let text = fs::read_to_string(file).ok()?;
        text.trim().strip_prefix("client")?.parse().ok()
    }

    /// As which file system it is mounted.
    #[must_use]
    pub fn mounted(&self) -> Option<FsType> {
        mount::mounted_as(&self.name())
    }

    /// Reads anew what the cluster has of the image, such as its size; by itself the kernel does it as soon as it hears of a change.
    ///
    /// # Errors
    /// What the kernel says; ETIMEDOUT where it has no answer from the cluster in time.
    pub fn refresh(&self, patience: Duration) -> io::Result<()> {
        let file = Path::new(BUS).join(format!("devices/{}/refresh", self.id));
        within(patience, move || fs::write(file, "1"))
            .unwrap_or_else(|| Err(Errno::ETIMEDOUT.into()))
    }

    /// Writes what the device's page cache holds.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn flush(&self) -> io::Result<()> {
        File::open(self.path())?.sync_all()
    }

    /// Whether the cluster lets it be read; `None`: that is not known in time.
    #[must_use]
    pub fn is_readable(&self, patience: Duration) -> Option<bool> {
        let path = self.path();
        within(patience, move || read_directly(&path).is_ok())
    }

    fn name(&self) -> String {
        format!("rbd{}", self.id)
    }
}

impl Kernel {
    /// Has the kernel's module loaded, and reads the user's key from where Ceph's tools have it.
    ///
    /// # Errors
    /// Where the kernel has no such module, or one that is too old, or the keyring cannot be read.
    pub fn new(cluster: &Cluster, user: &str, pool: &str, namespace: &str) -> Result<Self, String> {
        if !Path::new(BUS).exists() {
            // Device numbers of one major, as udev's rules for Ceph expect.
            exec::run("modprobe", ["rbd", "single_major=Y"]).map_err(|error| {
                format!("the kernel has no rbd module ({error}): it is in the distribution's kernel package, in Fedora's kernel-modules-core")
            })?;
        }
        let known =
            fs::read_to_string(Path::new(BUS).join("supported_features")).unwrap_or_default();
        let unknown = unknown_features(&known);
        if !unknown.is_empty() {
            return Err(format!(
                "this kernel's rbd module does not know {}: Linux 5.3 or later is needed",
                unknown.join(", ")
            ));
        }
        Ok(Self {
            fsid: cluster.fsid().map_err(|error| error.to_string())?,
            pool: pool.to_owned(),
            namespace: namespace.to_owned(),
            user: user.to_owned(),
            key: key(cluster, user)?,
        })
    }

    /// All mapped images of the pool and namespace, by name.
    ///
    /// # Errors
    /// What reading /sys says.
    pub fn devices(&self) -> io::Result<BTreeMap<String, Device>> {
        let mut devices = BTreeMap::new();
        for entry in fs::read_dir(Path::new(BUS).join("devices"))? {
            let entry = entry?;
            let attribute = |name: &str| {
                fs::read_to_string(entry.path().join(name)).map(|text| text.trim_end().to_owned())
            };
            let of = || {
                Ok::<_, io::Error>((
                    attribute("cluster_fsid")?,
                    attribute("pool")?,
                    attribute("pool_ns")?,
                    attribute("current_snap")?,
                    attribute("name")?,
                    attribute("major")?,
                    attribute("minor")?,
                ))
            };
            // Gone in the meantime.
            let Ok((fsid, pool, namespace, snapshot, name, major, minor)) = of() else {
                continue;
            };
            if fsid != self.fsid
                || pool != self.pool
                || namespace != self.namespace
                || snapshot != "-"
            {
                continue;
            }
            if let (Some(Ok(id)), Ok(major), Ok(minor)) = (
                entry.file_name().to_str().map(str::parse),
                major.parse(),
                minor.parse(),
            ) {
                devices.insert(
                    name,
                    Device {
                        id,
                        number: (major, minor),
                    },
                );
            }
        }
        Ok(devices)
    }

    /// The device of an image, if it is mapped.
    ///
    /// # Errors
    /// As [`Kernel::devices`].
    pub fn device(&self, image: &str) -> io::Result<Option<Device>> {
        Ok(self.devices()?.remove(image))
    }

    /// Maps an image that is not mapped.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn map(&self, cluster: &Cluster, image: &str) -> io::Result<Device> {
        let text = self.description(cluster, image)?;
        if let Some(key) = &self.key {
            // Where the kernel looks for it: with the thread that asks.
            add_key(&self.key_name(), key)?;
        }
        write_bus("add", &text)?;
        self.device(image)?.ok_or_else(|| {
            io::Error::other(format!("the kernel mapped {image} and shows no device"))
        })
    }

    /// Has a device go. `false`: it is in use.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unmap(&self, device: &Device) -> io::Result<bool> {
        let deadline = Instant::now() + LINGER;
        loop {
            match write_bus("remove", &device.id.to_string()) {
                Ok(()) => return Ok(true),
                // Gone in the meantime.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() >= deadline {
                        return Ok(false);
                    }
                    thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn key_name(&self) -> String {
        format!("client.{}", self.user)
    }

    /// What the kernel is to map: `MONITORS OPTIONS POOL IMAGE SNAPSHOT` (Documentation/ABI/testing/sysfs-bus-rbd).
    fn description(&self, cluster: &Cluster, image: &str) -> io::Result<String> {
        let mut options = vec![format!("name={}", self.user)];
        if self.key.is_some() {
            options.push(format!("key={}", self.key_name()));
        }
        // What the administrator has set for `rbd map` holds here as well.
        let set = cluster
            .setting("rbd_default_map_options")
            .unwrap_or_default();
        let mut mode = set
            .split(',')
            .find_map(|option| option.trim().strip_prefix("ms_mode="))
            .map(str::to_owned);
        let dump = cluster
            .ask(&json!({"prefix": "mon dump", "format": "json"}))
            .map_err(io::Error::other)?;
        let dump: Value = serde_json::from_slice(&dump)?;
        let mut monitors = addresses(&dump, mode.as_deref());
        if monitors.is_empty() && mode.is_none() {
            // All of them speak the second protocol alone.
            mode = Some("prefer-crc".to_owned());
            monitors = addresses(&dump, mode.as_deref());
        }
        if monitors.is_empty() {
            return Err(io::Error::other(
                "no monitor has an address that the kernel can speak to",
            ));
        }
        options.extend(mode.map(|mode| format!("ms_mode={mode}")));
        // Where there is no room, who writes is told so, as with other stores: by default the kernel lets writes wait for room,
        // and all who wait for those with them (Linux 5.0 or later).
        options.push("abort_on_full".to_owned());
        // How long mapping waits for the cluster; what is mapped waits as long as it takes.
        options.push(format!("mount_timeout={}", PATIENCE.as_secs()));
        if !self.namespace.is_empty() {
            options.push(format!("_pool_ns={}", self.namespace));
        }
        Ok(format!(
            "{} {} {} {image} -",
            monitors.join(","),
            options.join(","),
            self.pool
        ))
    }
}

/// What the kernel answers, which waits for the cluster as long as it takes; `None`: it does not in time.
fn within<T: Send + 'static>(
    patience: Duration,
    ask: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, answer) = mpsc::channel();
    thread::spawn(move || done.send(ask()));
    answer.recv_timeout(patience).ok()
}

/// Reads the beginning of a device, past the page cache.
fn read_directly(device: &Path) -> io::Result<()> {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let device = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    device.read_exact_at(&mut Block([0; 4096]).0, 0)
}

/// What is needed and is not among the features that the kernel says it knows, as a hexadecimal number; before Linux 4.11 it
/// said nothing.
fn unknown_features(known: &str) -> Vec<&'static str> {
    let known = known.trim().trim_start_matches("0x");
    let known = u64::from_str_radix(known, 16).unwrap_or(0);
    FEATURES
        .iter()
        .filter(|(feature, _)| known & feature == 0)
        .map(|(_, name)| *name)
        .collect()
}

/// The monitors' addresses in the protocol of `ms_mode`.
fn addresses(dump: &Value, mode: Option<&str>) -> Vec<String> {
    let protocol = match mode {
        None | Some("legacy") => "v1",
        Some(_) => "v2",
    };
    let monitors = dump["mons"].as_array().into_iter().flatten();
    monitors
        .filter_map(|monitor| monitor["public_addrs"]["addrvec"].as_array())
        .flatten()
        .filter(|address| address["type"] == protocol)
        .filter_map(|address| address["addr"].as_str().map(str::to_owned))
        .collect()
}

fn write_bus(what: &str, text: &str) -> io::Result<()> {
    let open = |path: PathBuf| File::options().write(true).open(path);
    // Where the module numbers devices in one major, the other file is there and refuses.
    let mut file = open(Path::new(BUS).join(format!("{what}_single_major"))).or_else(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            open(Path::new(BUS).join(what))
        } else {
            Err(error)
        }
    })?;
    file.write_all(text.as_bytes())
}

/// The user's key: of the settings `key`, `keyfile` and `keyring`, as Ceph's own clients look for it.
fn key(cluster: &Cluster, user: &str) -> Result<Option<Vec<u8>>, String> {
    let setting = |name: &str| cluster.setting(name).filter(|value| !value.is_empty());
    let decoded = |text: &str| {
        BASE64_STANDARD
            .decode(text.trim())
            .map(Some)
            .map_err(|error| format!("the key of client.{user} is none: {error}"))
    };
    if setting("auth_client_required").is_some_and(|methods| methods == "none") {
        return Ok(None);
    }
    if let Some(key) = setting("key") {
        return decoded(&key);
    }
    if let Some(file) = setting("keyfile") {
        let text = fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?;
        return decoded(&text);
    }
    let files = setting("keyring").unwrap_or_default();
    for file in files.split([',', ';', ' ']).filter(|file| !file.is_empty()) {
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("{file}: {error}")),
        };
        if let Some(key) = key_in(&text, &format!("client.{user}")) {
            return decoded(key);
        }
    }
    Err(format!("no key of client.{user} in {files}"))
}

/// The key of `name` in a keyring's text.
fn key_in<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut ours = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line
            .strip_prefix('[')
            .and_then(|line| line.strip_suffix(']'))
        {
            ours = section.trim() == name;
        } else if let Some((key, value)) = line.split_once('=')
            && ours
            && key.trim() == "key"
        {
            return Some(value.trim());
        }
    }
    None
}

/// Gives the kernel a key, for the thread that calls this.
fn add_key(name: &str, key: &[u8]) -> io::Result<()> {
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: two C strings and a payload of the length that is said (add_key(2)).
    let added = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"ceph".as_ptr(),
            name.as_ptr(),
            key.as_ptr(),
            key.len(),
            THREAD_KEYRING,
        )
    };
    if added < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// For what asks a cluster for a device: the error of either.
impl From<CephError> for io::Error {
    fn from(error: CephError) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ceph::IMAGE_FEATURES;
    use super::*;

    #[test]
    fn keys_of_a_keyring() {
        let text = "[client.admin]\n\tkey = QUJD\n\n[client.cache]\n\tkey = REVG\n\tcaps mon = \"profile rbd\"\n";
        assert_eq!(key_in(text, "client.cache"), Some("REVG"));
        assert_eq!(key_in(text, "client.admin"), Some("QUJD"));
        assert_eq!(key_in(text, "client.cach"), None);
        assert_eq!(
            key_in("[client.cache]\ncaps mon = \"key = x\"\n", "client.cache"),
            None
        );
    }

    #[test]
    fn features_of_kernels() {
        let needed = FEATURES.iter().fold(0, |all, (feature, _)| all | feature);
        assert_eq!(needed & !256, IMAGE_FEATURES, "what images are made with");
        // Linux 6.12, and 5.2, which has neither object-map nor fast-diff.
        assert!(unknown_features("0x1bf\n").is_empty());
        assert_eq!(unknown_features("0x1a7\n"), ["object-map", "fast-diff"]);
        assert_eq!(unknown_features("").len(), FEATURES.len());
    }

    #[test]
    fn addresses_of_either_protocol() {
        let dump = json!({"mons": [
            {"name": "a", "public_addrs": {"addrvec": [
                {"type": "v2", "addr": "10.0.0.1:3300", "nonce": 0}, {"type": "v1", "addr": "10.0.0.1:6789", "nonce": 0}]}},
            {"name": "b", "public_addrs": {"addrvec": [{"type": "v2", "addr": "[fd00::2]:3300", "nonce": 0}]}},
        ]});
        assert_eq!(addresses(&dump, None), ["10.0.0.1:6789"]);
        assert_eq!(addresses(&dump, Some("legacy")), ["10.0.0.1:6789"]);
        assert_eq!(
            addresses(&dump, Some("prefer-crc")),
            ["10.0.0.1:3300", "[fd00::2]:3300"]
        );
        assert!(addresses(&json!({}), None).is_empty());
    }
}
