// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon on a pool of its own, and a client that measures.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use lvm_cache_friend::http::client;
use serde_json::{Value, json};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lvm-cache-friend");

/// What `init` calls the pool.
pub const POOL: &str = "friend-pool";

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a daemon must have done nothing to count as idle.
const QUIET: Duration = Duration::from_millis(300);

/// A volume group on a disk of its own, prepared by `init`, with its daemon.
pub struct Site {
    pub vg: String,
    program: PathBuf,
    dir: PathBuf,
    daemon: Option<Child>,
}

/// An entry, as `list --json` shows it.
pub struct Listed {
    pub name: String,
    pub size: u64,
}

impl Site {
    /// Everything on `disk` is overwritten.
    pub fn new(vg: &str, disk: &str, size: &str, base_size: &str) -> Self {
        Self::of(Path::new(PROGRAM), vg, disk, size, base_size)
    }

    /// The same, of another build of the program.
    pub fn of(program: &Path, vg: &str, disk: &str, size: &str, base_size: &str) -> Self {
        let dir = Path::new("/run/bench").join(vg);
        fs::create_dir_all(&dir).unwrap();
        // Room for thousands of volumes; a group of `init --loop` has it too.
        run("vgcreate", &["--quiet", "--metadatasize", "16m", vg, disk]);
        let site = Self {
            vg: vg.to_owned(),
            program: program.to_owned(),
            dir,
            daemon: None,
        };
        site.program(&["init", "--vg", vg, "--size", size, "--base-size", base_size]);
        let config = site.config();
        let written = fs::read_to_string(&config).unwrap();
        let settings = format!(
            "socket = {:?}\nmount-dir = {:?}\n",
            site.socket(),
            site.dir.join("mnt")
        );
        fs::write(&config, settings + &written).unwrap();
        site
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("plugin.sock")
    }

    fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Where a volume is mounted while it is.
    pub fn mountpoint(&self, volume: &str) -> PathBuf {
        self.dir.join("mnt").join(volume)
    }

    /// Runs the program on this site's configuration.
    pub fn program(&self, arguments: &[&str]) -> String {
        let config = self.config();
        let arguments = [&["--config", config.to_str().unwrap()], arguments].concat();
        run(self.program.to_str().unwrap(), &arguments)
    }

    /// Starts the daemon and waits until it serves.
    pub fn start(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))
            .unwrap();
        let daemon = Command::new(&self.program)
            .arg("--config")
            .arg(self.config())
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        let begin = Instant::now();
        while self.try_call("Plugin.Activate", &json!({})).is_err() {
            assert!(
                begin.elapsed() < PATIENCE,
                "the daemon does not come up: {}",
                self.log()
            );
            sleep(Duration::from_millis(20));
        }
    }

    pub fn stop(&mut self) {
        let Some(mut daemon) = self.daemon.take() else {
            return;
        };
        let pid = nix::unistd::Pid::from_raw(daemon.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
        let status = daemon.wait().unwrap();
        assert!(
            status.success(),
            "the daemon ended with {status}: {}",
            self.log()
        );
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn try_call(&self, endpoint: &str, body: &Value) -> Result<Value, client::ClientError> {
        client::call(&self.socket(), endpoint, body, PATIENCE)
    }

    fn call(&self, endpoint: &str, body: &Value) -> Value {
        match self.try_call(endpoint, body) {
            Ok(answer) => answer,
            Err(error) => panic!("{endpoint} {body}: {error}\n{}", self.log()),
        }
    }

    /// How long the volume's Create takes.
    pub fn create(&self, volume: &str, options: &Value) -> Duration {
        let body = json!({"Name": volume, "Opts": options});
        let begin = Instant::now();
        self.call("VolumeDriver.Create", &body);
        begin.elapsed()
    }

    /// How long the volume's Mount takes: a connection, the request, the answer.
    pub fn mount(&self, volume: &str) -> Duration {
        let body = json!({"Name": volume, "ID": "bench"});
        let begin = Instant::now();
        self.call("VolumeDriver.Mount", &body);
        let took = begin.elapsed();
        assert!(self.mountpoint(volume).is_dir());
        took
    }

    pub fn unmount(&self, volume: &str) {
        self.call(
            "VolumeDriver.Unmount",
            &json!({"Name": volume, "ID": "bench"}),
        );
    }

    pub fn remove(&self, volume: &str) {
        self.call("VolumeDriver.Remove", &json!({"Name": volume}));
    }

    /// What `inspect` shows of a volume.
    pub fn status(&self, volume: &str) -> Value {
        self.call("VolumeDriver.Get", &json!({"Name": volume}))["Volume"]["Status"].take()
    }

    /// Ends the volume's lease: the entry that it became, and how long that took.
    pub fn end(&self, volume: &str) -> (String, Duration) {
        let begin = Instant::now();
        self.unmount(volume);
        loop {
            let status = self.status(volume);
            if let Some(name) = status["last_lease"]["published"].as_str() {
                return (name.to_owned(), begin.elapsed());
            }
            assert!(begin.elapsed() < PATIENCE, "not published: {status}");
            sleep(Duration::from_millis(10));
        }
    }

    /// How long a request on a job volume's socket takes, which must be granted.
    pub fn ask(&self, volume: &str, request: &str) -> Duration {
        let begin = Instant::now();
        let mut stream = UnixStream::connect(self.mountpoint(volume).join("socket")).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let took = begin.elapsed();
        let granted = answer
            .lines()
            .last()
            .is_some_and(|last| last.starts_with("ok"));
        assert!(granted, "{request}: {answer}");
        took
    }

    /// Publishes an entry with the tags `save`, filled by `fill`.
    pub fn publish(&self, save: &str, fill: impl FnOnce(&Path)) -> Listed {
        self.create("publisher", &json!({"save": save}));
        self.mount("publisher");
        fill(&self.mountpoint("publisher"));
        let (name, _) = self.end("publisher");
        self.quiet();
        self.remove("publisher");
        self.quiet();
        let rows: Vec<Value> = serde_json::from_str(&self.program(&["list", "--json"])).unwrap();
        let row = rows
            .iter()
            .find(|row| row["name"] == name.as_str())
            .expect("it is listed");
        Listed {
            name,
            size: row["size"].as_u64().unwrap(),
        }
    }

    /// The thin device id of an LV, by which device-mapper knows it.
    pub fn thin_id(&self, lv: &str) -> u64 {
        let text = run(
            "lvs",
            &[
                "--noheadings",
                "-o",
                "thin_id",
                &format!("{}/{lv}", self.vg),
            ],
        );
        text.trim().parse().unwrap()
    }

    /// Waits until the daemon has nothing to do any more.
    pub fn quiet(&self) {
        let begin = Instant::now();
        let mut last = (self.activity(), Instant::now());
        while last.1.elapsed() < QUIET {
            assert!(
                begin.elapsed() < PATIENCE,
                "the daemon does not come to rest: {}",
                self.log()
            );
            sleep(Duration::from_millis(20));
            let activity = self.activity();
            if activity != last.0 {
                last = (activity, Instant::now());
            }
        }
    }

    /// Grows whenever the daemon or its tool does something: wakes up, or goes on computing.
    fn activity(&self) -> u64 {
        let of = |pid| switches(pid).values().sum::<u64>() + ticks(pid);
        of(self.pid()) + self.tool().map_or(0, of)
    }

    /// How often one of the daemon's threads woke up while `time` passed.
    pub fn wake_ups(&self, time: Duration) -> u64 {
        let before = switches(self.pid());
        sleep(time);
        let mut after = switches(self.pid());
        // To end, a thread has to wake up.
        let ended = before
            .keys()
            .filter(|thread| !after.contains_key(*thread))
            .count() as u64;
        for (thread, count) in &mut after {
            *count -= before.get(thread).unwrap_or(&0);
        }
        ended + after.values().sum::<u64>()
    }

    fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("it runs").id()
    }

    /// The long-lived `lvm`.
    fn tool(&self) -> Option<u32> {
        let children = format!("/proc/{0}/task", self.pid());
        fs::read_dir(children).unwrap().flatten().find_map(|task| {
            let children = fs::read_to_string(task.path().join("children")).ok()?;
            children.split_whitespace().next()?.parse().ok()
        })
    }

    /// Resident memory in bytes: of the daemon, and of its `lvm`.
    pub fn resident(&self) -> (u64, u64) {
        (resident(self.pid()), self.tool().map_or(0, resident))
    }
}

/// Context switches of each thread of a process: one at least each time that it wakes up.
fn switches(pid: u32) -> BTreeMap<OsString, u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| {
            // A thread may end meanwhile.
            let text = fs::read_to_string(task.path().join("status")).ok()?;
            let kinds = ["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"];
            Some((
                task.file_name(),
                kinds.map(|kind| field(&text, kind)).iter().sum(),
            ))
        })
        .collect()
}

/// Processor time of a process so far, in clock ticks (proc(5), utime and stime).
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let (_, fields) = stat.rsplit_once(") ").unwrap_or_default();
    let times = fields.split(' ').skip(11).take(2);
    times.filter_map(|time| time.parse::<u64>().ok()).sum()
}

fn resident(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/status")).map_or(0, |text| field(&text, "VmRSS:") << 10)
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Runs a tool to success; what it wrote.
pub fn run(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{tool}: {error}"));
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
