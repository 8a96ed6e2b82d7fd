// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Power cuts under the supervisor: no job is lost, none runs twice, and nothing is left over. GitHub keeps its power: its
//! stand-in is on this machine.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::copy;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread::{self, sleep};
use std::time::Duration;

use lvm_cache_friend::failpoint::SUPERVISOR;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{SHARE, init, make_group};
use crate::github::fake::{Fake, MAIN, REPOSITORY, Stage, TOKEN};
use crate::support::census::settled;
use crate::support::command::{run, sh};
use crate::support::content::Random;
use crate::support::daemon::Daemon;
use crate::support::lvm::TestVg;
use crate::support::podman::{Podman, Service};
use crate::support::site::Kind;
use crate::support::vm::{VolatileDisk, start_part};
use crate::support::{PROGRAM, image, temp_dir, wait_until};

/// In the guest, where it outlives a power cut: it is there once all is prepared.
const CONFIG: &str = "/etc/lvm-cache-friend/config.toml";

/// What it was given is whole, and so is what it leaves.
const GOOD: &str = "cd /cache; [ ! -e data ] || sha256sum -c sum
    dd if=/dev/urandom of=data bs=64k count=16; sha256sum data >sum";

/// What it writes is in no cache, ever.
const CUT_SHORT: &str = "echo cut short >/cache/data; exec sleep 3600";

/// On this machine: cuts the power at a step of a slot's life before its job, while that runs, and at a step after it. Each run has other steps.
pub fn over_cuts() {
    let here = temp_dir();
    let path = |name: &str| here.path().join(name).to_str().unwrap().to_owned();
    let (root, share) = (path("root"), path("share"));
    let disk = VolatileDisk::new(here.path());
    fs::create_dir(&share).unwrap();
    let share = Path::new(&share);
    let fake = Fake::start();
    let url = &fake.url;
    // A guest is up again sooner than GitHub gives the job up that its runner had.
    fake.state().silent = Duration::from_secs(20);
    let pool = format!(
        "\n[supervise]\npodman-socket = '/run/podman-service.sock'\n\
         [[supervise.pool]]\nname = 'linux'\nurl = '{url}/{REPOSITORY}'\napi-url = '{url}'\ntoken = '/run/token'\n\
         labels = ['linux']\ncount = 2\ncontainer = {{ image = 'localhost/runner', network = 'host' }}\n\
         [[supervise.pool.volume]]\nname = 'cache'\ntarget = '/cache'\noptions = {{ restore = 'layers', save = 'layers' }}\n"
    );
    fs::write(share.join("pool"), pool).unwrap();
    fs::write(share.join("port"), url.rsplit(':').next().unwrap()).unwrap();

    let is_running = |job: u64| matches!(fake.state().jobs[&job].stage, Stage::Running(_));
    let boot = |failpoint: &str, until: &dyn Fn() -> bool| {
        let variable = format!("LVM_CACHE_FRIEND_FAILPOINT={failpoint}");
        let mut options = vec!["--net", "--root", &root];
        options.extend(["--share", share.to_str().unwrap()]);
        if !failpoint.is_empty() {
            options.extend(["--env", &variable]);
        }
        let options = disk.options(&options);
        let mut guest = start_part(here.path(), &options, "powercut::supervise");
        while !until() {
            assert!(guest.is_running(), "it works until its power is cut");
            sleep(Duration::from_millis(20));
        }
        guest
    };
    let mut random = Random::from_clock();
    let mut one_of = |steps: &[&'static str]| steps[random.below(steps.len() as u64) as usize];
    let (before, after) = SUPERVISOR.split_at(SUPERVISOR.len() / 2);
    let ended = |job: &u64| fake.result(*job).is_some();
    let reached = share.join("reached");
    let mut jobs = BTreeSet::new();
    let mut cut_short = BTreeSet::<u64>::new();
    for step in [one_of(before), "", one_of(after)] {
        let is_job = step.is_empty();
        let job = fake.queue(&MAIN, if is_job { CUT_SHORT } else { GOOD });
        let mut guest = boot(step, &|| {
            if is_job {
                is_running(job) && jobs.iter().all(ended)
            } else {
                reached.exists()
            }
        });
        guest.cut_power();
        disk.lose_what_was_not_flushed();
        let _ = fs::remove_file(&reached);
        jobs.insert(job);
        cut_short.extend(jobs.iter().filter(|job| is_running(**job)));
        println!("cut at {step:?}; jobs {jobs:?}, running {cut_short:?}");
    }
    jobs.insert(fake.queue(&MAIN, GOOD));
    let mut last = boot("", &|| jobs.iter().all(ended));
    File::create(share.join("drain")).unwrap();
    assert!(last.wait().success());
    for job in jobs {
        let expected = if cut_short.contains(&job) {
            "abandoned"
        } else {
            "succeeded"
        };
        assert_eq!(fake.result(job), Some(expected), "job {job}");
        assert_eq!(fake.state().jobs[&job].runs, 1, "job {job}");
    }
    let runners: Vec<_> = fake.state().runners.values().cloned().collect();
    assert!(runners.is_empty(), "{runners:?}");
}

/// In the guest: the daemon and the supervisor, until that has died of its failpoint, or is to drain. Nothing is left then.
pub fn supervise() {
    let share = Path::new(SHARE);
    if !fs::exists(CONFIG).unwrap() {
        prepare(share);
    }
    reach_github(
        fs::read_to_string(share.join("port"))
            .unwrap()
            .parse()
            .unwrap(),
    );
    fs::write("/run/token", TOKEN).unwrap();
    run("chmod", ["600", "/run/token"]);
    let daemon = Daemon::start(Path::new(CONFIG));
    let _service = Service::start();
    let mut supervisor = Command::new(PROGRAM);
    supervisor.args(["--config", CONFIG, "supervise", "--log-level", "debug"]);
    let mut supervisor = supervisor.spawn().unwrap();
    let drain = share.join("drain");
    wait_until(|| drain.exists() || supervisor.try_wait().unwrap().is_some());
    if !drain.exists() {
        File::create(share.join("reached")).unwrap();
        sleep(Duration::from_secs(600));
    }
    let pid = Pid::from_raw(supervisor.id().cast_signed());
    kill(pid, Signal::SIGTERM).unwrap();
    assert!(supervisor.wait().unwrap().success());
    for list in [&["ps", "--all"][..], &["volume", "ls"]] {
        let quiet = [list, &["--quiet"]].concat();
        assert_eq!(run("podman", quiet), "", "podman {list:?}");
    }
    let census = settled(Kind::Lvm, TestVg::NAME, &[]);
    let entries = census.entries();
    assert!(!entries.is_empty());
    for entry in &entries {
        let check = |at: &Path| sh(&format!("cd {} && sha256sum --check sum", at.display()));
        census.read(entry, check).unwrap();
    }
    println!("{} entries, all whole", entries.len());
    daemon.stop();
}

/// Makes the stand-in for GitHub be on the guest's loopback device too, as no other is spoken to without TLS: the guest's network
/// has this machine at 10.0.2.2.
fn reach_github(port: u16) {
    run("ip", ["link", "set", "lo", "up"]);
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    thread::spawn(move || {
        for here in listener.incoming() {
            let here = here.unwrap();
            let Ok(there) = TcpStream::connect(("10.0.2.2", port)) else {
                continue;
            };
            for (mut from, mut to) in [
                (here.try_clone().unwrap(), there.try_clone().unwrap()),
                (there, here),
            ] {
                thread::spawn(move || {
                    let _ = copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
}

fn prepare(share: &Path) {
    // It is not dropped: what it configures outlives this.
    std::mem::forget(Podman::new(Kind::Lvm));
    image("runner-image");
    make_group();
    let config = Path::new(CONFIG);
    init(config);
    let text = fs::read_to_string(config).unwrap();
    let pool = fs::read_to_string(share.join("pool")).unwrap();
    fs::write(config, text + &pool).unwrap();
    run("sync", [""; 0]);
}
