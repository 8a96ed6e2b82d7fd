// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an LVM command costs: as a process and in one long-lived `lvm` shell, each with and without
//! LVM's asynchronous I/O. The store (src/storage/lvm) rests on the answer.
//!
//! Run as root: `cargo bench --bench lvm_shell`, and with device-mapper, in a guest, what that built:
//! `tests/vm/run -- target/release/deps/lvm_shell-…`. It works on a loop device over a file of its
//! own, with a configuration of LVM's of its own, and leaves nothing behind. Without device-mapper only metadata is changed
//! (`activation=0`), in groups whose volumes exist as text alone. Times are noisy: take the ratios.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tempfile::TempDir;

const GROUP: &str = "friend-bench";
/// Volumes in a group whose volumes are text alone.
const SIZES: [usize; 4] = [20, 1000, 5000, 10_000];
/// How often each is measured; more often where it takes less.
const BUDGET: Duration = Duration::from_secs(4);
const ROUNDS: std::ops::RangeInclusive<usize> = 5..=40;

fn main() {
    // What Cargo passes is not for this bench.
    assert!(
        nix::unistd::geteuid().is_root(),
        "needs root: it sets up a loop device"
    );
    let bench = Bench::new();
    let device_mapper = File::open("/dev/mapper/control").is_ok();
    println!(
        "milliseconds a command, median (least-most); in brackets: how many times less than a process with aio"
    );
    println!(
        "{:<24}{:>32}{:>32}{:>32}{:>32}",
        "", "process, aio", "process", "shell, aio", "shell"
    );
    if device_mapper {
        bench.volumes();
    }
    for size in SIZES {
        bench.text(size);
    }
}

/// A loop device and two configurations.
struct Bench {
    dir: TempDir,
    device: String,
}

impl Bench {
    fn new() -> Self {
        let dir = TempDir::new().expect("a directory");
        let image = dir.path().join("image");
        File::create(&image)
            .and_then(|file| file.set_len(4 << 30))
            .expect("an image");
        let device = tool("losetup", &["--find", "--show", path(&image)], &[]);
        let bench = Self {
            dir,
            device: device.trim().to_owned(),
        };
        for aio in [true, false] {
            let system_dir = bench.system_dir(aio);
            fs::create_dir(&system_dir).expect("a directory");
            let activation = i32::from(File::open("/dev/mapper/control").is_ok());
            let udev = i32::from(Path::new("/run/udev/control").exists());
            let text = format!(
                r#"devices {{ filter=["a|^{device}$|","r|.*|"] use_devicesfile=0 obtain_device_list_from_udev=0 hints="none" }}
                global {{ use_aio={aio} activation={activation} event_activation=0 locking_dir="{dir}/lock" }}
                activation {{ monitoring=0 udev_sync={udev} udev_rules={udev} }}
                backup {{ archive=0 }}
                log {{ report_command_log=1 command_log_selection="log_context=shell || log_type=error" }}
                report {{ output_format="json" }}"#,
                device = bench.device,
                aio = i32::from(aio),
                dir = path(bench.dir.path()),
            );
            fs::write(system_dir.join("lvm.conf"), text).expect("lvm.conf");
        }
        bench
    }

    fn system_dir(&self, aio: bool) -> PathBuf {
        self.dir.path().join(if aio { "aio" } else { "no-aio" })
    }

    /// Sets something up, by the shell.
    fn lvm(&self, arguments: &str) -> String {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        tool("lvm", &arguments, &environment(&self.system_dir(false)))
    }

    /// Real volumes, with device-mapper.
    fn volumes(&self) {
        self.lvm(&format!("vgcreate --yes {GROUP} {}", self.device));
        self.lvm(&format!(
            "lvcreate --yes --type=thin-pool --size=1G --name=pool {GROUP}"
        ));
        for n in 0..20 {
            self.lvm(&format!(
                "lvcreate --yes --thinpool=pool --virtualsize=64m --activate=n --name=lv{n} {GROUP}"
            ));
        }
        let undo = format!("lvremove --yes {GROUP}/new");
        let snapshot = format!(
            "lvcreate --yes --snapshot --name=new --addtag=friend:snapshot --addtag=friend:cache:a --setactivationskip=y {GROUP}/lv1"
        );
        let active = snapshot.replace(
            "--snapshot",
            "--snapshot --ignoreactivationskip --activate=y",
        );
        let inactive = snapshot.replace("--snapshot", "--snapshot --activate=n");
        self.row("snapshot, inactive", &inactive, Some(&undo));
        self.row("snapshot, active", &active, Some(&undo));
        self.row("remove an active one", &undo, Some(&active));
        self.lvm(&format!("lvremove --yes {GROUP}"));
        self.lvm(&format!("vgremove --yes --force {GROUP}"));
    }

    /// Volumes as text: what reading, writing and committing the metadata costs.
    fn text(&self, size: usize) {
        self.lvm(&format!(
            "pvcreate --yes --metadatasize=64m {}",
            self.device
        ));
        let found = self.lvm(&format!(
            "pvs --noheadings --options=pv_uuid {}",
            self.device
        ));
        let uuid = found
            .split('"')
            .find(|word| word.len() == 38)
            .expect("a UUID");
        let description = self.dir.path().join("group");
        fs::write(&description, description_of(size, uuid, &self.device)).expect("a description");
        self.lvm(&format!(
            "vgcfgrestore --force --file={} {GROUP}",
            path(&description)
        ));
        let list = format!(
            "lvs --options=lv_name,lv_tags,thin_id,lv_time,lv_size,origin --units=b {GROUP}"
        );
        let tag = format!("lvchange --addtag=friend:doomed {GROUP}/lv1");
        let untag = format!("lvchange --deltag=friend:doomed {GROUP}/lv1");
        self.row(&format!("list, {size} volumes"), &list, None);
        self.row(&format!("a tag, {size} volumes"), &tag, Some(&untag));
        self.lvm(&format!("pvremove --yes --force --force {}", self.device));
    }

    /// Measures `command` in each way, by turns; `between` is run between, unmeasured.
    fn row(&self, name: &str, command: &str, between: Option<&str>) {
        let mut shells = [true, false].map(|aio| Shell::start(&self.system_dir(aio)));
        let mut times: [Vec<f64>; 4] = Default::default();
        let begun = Instant::now();
        let mut prepared = name.starts_with("remove");
        while times[3].len() < *ROUNDS.start()
            || (begun.elapsed() < BUDGET * 4 && times[3].len() < *ROUNDS.end())
        {
            for (way, times) in times.iter_mut().enumerate() {
                if prepared && let Some(between) = between {
                    shells[1].run(between);
                }
                prepared = true;
                let start = Instant::now();
                match way {
                    0 | 1 => {
                        let arguments: Vec<&str> = command.split(' ').collect();
                        tool("lvm", &arguments, &environment(&self.system_dir(way == 0)));
                    }
                    _ => shells[way - 2].run(command),
                }
                times.push(start.elapsed().as_secs_f64() * 1000.0);
            }
        }
        if let Some(between) = between.filter(|_| !name.starts_with("remove")) {
            shells[1].run(between);
        }
        let medians = times.each_mut().map(|times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        let mut line = format!("{name:<24}");
        for (times, median) in times.iter().zip(medians) {
            let (least, most) = (times[0], times[times.len() - 1]);
            let cell = format!(
                "{median:.1} ({least:.1}-{most:.1}) [{:.1}]",
                medians[0] / median
            );
            line.push_str(&format!("{cell:>32}"));
        }
        println!("{line}");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Whatever a failed run left.
        let environment = environment(&self.system_dir(false));
        for arguments in [
            &["vgremove", "--yes", "--force", GROUP],
            &["pvremove", "--yes", "--force", &self.device],
        ] {
            let _ = Command::new("lvm")
                .args(arguments)
                .envs(environment.clone())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
        let _ = Command::new("losetup")
            .args(["--detach", &self.device])
            .status();
    }
}

/// The long-lived shell, driven as the store does.
struct Shell {
    child: Child,
    input: Option<ChildStdin>,
    report: File,
}

impl Shell {
    fn start(system_dir: &Path) -> Self {
        let (report, far_end) = std::io::pipe().expect("a pipe");
        fcntl(&far_end, FcntlArg::F_SETFD(FdFlag::empty())).expect("to be inherited");
        let mut child = Command::new("lvm")
            .envs(environment(system_dir))
            .env("LVM_REPORT_FD", far_end.as_raw_fd().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("lvm");
        let report = File::from(std::os::fd::OwnedFd::from(report));
        Self {
            input: child.stdin.take(),
            child,
            report,
        }
    }

    fn run(&mut self, command: &str) {
        let input = self.input.as_mut().expect("it runs");
        writeln!(input, "{command}").expect("it reads");
        let (mut answer, mut chunk) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            let n = self.report.read(&mut chunk).expect("an answer");
            assert!(n > 0, "lvm ended over {command}");
            answer.extend_from_slice(&chunk[..n]);
            if answer.trim_ascii_end().last() == Some(&b'}')
                && let Ok(whole) = serde_json::from_slice::<serde_json::Value>(&answer)
            {
                let status = whole["log"].as_array().and_then(|rows| rows.last());
                let code = status.map(|row| row["log_ret_code"].clone());
                assert_eq!(code, Some("1".into()), "{command}: {whole}");
                return;
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It ends with its input.
        self.input = None;
        let _ = self.child.wait();
    }
}

fn environment(system_dir: &Path) -> Vec<(&'static str, String)> {
    vec![
        ("LC_ALL", "C".into()),
        ("HOME", "/dev/null".into()),
        ("LVM_SYSTEM_DIR", path(system_dir).to_owned()),
        ("LVM_SUPPRESS_FD_WARNINGS", "1".into()),
    ]
}

fn tool(name: &str, arguments: &[&str], environment: &[(&'static str, String)]) -> String {
    let output = Command::new(name)
        .args(arguments)
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {text}{errors}"
    );
    text
}

fn path(path: &Path) -> &str {
    path.to_str().expect("in UTF-8")
}

/// A group of thin volumes with four tags each, in LVM's own format.
fn description_of(volumes: usize, pv: &str, device: &str) -> String {
    let mut serial = 0;
    let mut uuid = || {
        serial += 1;
        format!("{serial:06}-aaaa-bbbb-cccc-dddd-eeee-ffffff")
    };
    let plain = |name: &str, id: String, start: u64, extents: u64, status: &str| {
        format!(
            "{name} {{\nid=\"{id}\"\nstatus=[{status}]\nflags=[]\nsegment_count=1\nsegment1 {{\nstart_extent=0\n\
            extent_count={extents}\ntype=\"striped\"\nstripe_count=1\nstripes=[\"pv0\",{start}]\n}}\n}}\n"
        )
    };
    let mut text = format!(
        "contents=\"Text Format Volume Group\"\nversion=1\n{GROUP} {{\nid=\"{}\"\nseqno=1\nformat=\"lvm2\"\n\
        status=[\"RESIZEABLE\",\"READ\",\"WRITE\"]\nflags=[]\nextent_size=8192\nmax_lv=0\nmax_pv=0\n\
        physical_volumes {{\npv0 {{\nid=\"{pv}\"\ndevice=\"{device}\"\nstatus=[\"ALLOCATABLE\"]\nflags=[]\n\
        dev_size=8388608\npe_start=139264\npe_count=1000\n}}\n}}\nlogical_volumes {{\npool {{\nid=\"{}\"\n\
        status=[\"READ\",\"WRITE\",\"VISIBLE\"]\nflags=[]\nsegment_count=1\nsegment1 {{\nstart_extent=0\n\
        extent_count=256\ntype=\"thin-pool\"\nmetadata=\"pool_tmeta\"\npool=\"pool_tdata\"\n\
        transaction_id={volumes}\nchunk_size=128\ndiscards=\"passdown\"\nzero_new_blocks=1\n}}\n}}\n",
        uuid(),
        uuid()
    );
    for n in 1..=volumes {
        text.push_str(&format!(
            "lv{n} {{\nid=\"{}\"\nstatus=[\"READ\",\"WRITE\",\"VISIBLE\"]\nflags=[\"ACTIVATION_SKIP\"]\n\
            tags=[\"friend:snapshot\",\"friend:cache:linux\",\"friend:cache:main-{n:032}\",\"friend:scope:default\"]\n\
            creation_time={}\ncreation_host=\"h\"\nsegment_count=1\nsegment1 {{\nstart_extent=0\nextent_count=2560\n\
            type=\"thin\"\nthin_pool=\"pool\"\ntransaction_id={}\ndevice_id={n}\n}}\n}}\n",
            uuid(),
            1_700_000_000 + n,
            n - 1
        ));
    }
    text.push_str(&plain("lvol0_pmspare", uuid(), 0, 4, "\"READ\",\"WRITE\""));
    text.push_str(&plain("pool_tmeta", uuid(), 4, 4, "\"READ\",\"WRITE\""));
    text.push_str(&plain("pool_tdata", uuid(), 8, 256, "\"READ\",\"WRITE\""));
    text + "}\n}\n"
}
