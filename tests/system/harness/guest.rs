// SPDX-License-Identifier: Apache-2.0 OR MIT
//! On the host: one guest for each group of tests, booted by the first test that wants it and
//! shared by the others.
//!
//! nextest runs each test as a process of its own, so guests are kept by a process beside them
//! all, the keeper: this binary again. It ends its guest when the test run (nextest, or the one
//! test process of `cargo test`) is over. Host and guest speak through a shared directory:
//! `request`, `output` and `outcome`. A test that fails takes its guest with it: the guest's
//! disk, console and output are kept as they were, and the next test gets a new guest.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::{CommandExt as _, parent_id};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Place, this_binary, vm_run};

/// How often files are looked at, here and in the guest.
pub const POLL: Duration = Duration::from_millis(50);

/// For a guest to boot, with systemd and in software emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

/// For the guest's answer beyond the test's own time.
const GRACE: Duration = Duration::from_secs(30);

/// How many lines of a console or an output say enough.
const TAIL: usize = 40;

/// How many earlier runs keep their wrecks.
const RUNS_KEPT: usize = 5;

/// What the host asks for.
#[derive(Serialize, Deserialize)]
pub struct Request {
    /// The test's full name.
    pub test: String,
    /// Seconds after which it is ended.
    pub timeout: u64,
}

/// What the guest answers.
#[derive(Serialize, Deserialize)]
pub struct Outcome {
    /// Why the test failed, if it did.
    pub failure: Option<String>,
}

/// The directory of this test run's guests.
pub fn run_dir() -> PathBuf {
    let run = std::env::var("NEXTEST_RUN_ID")
        .unwrap_or_else(|_| format!("process-{}", std::process::id()));
    runs_dir().join(run)
}

fn runs_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests")
}

/// Runs a test in its group's guest, which is booted where there is none.
///
/// # Errors
/// What is to be shown of a test that failed: its output, and the guest's console if that is to
/// blame.
pub fn run(run_dir: &Path, place: Place, test: &str, timeout: Duration) -> Result<(), String> {
    let guest = Guest {
        dir: run_dir.join(place.name(".")),
    };
    fs::create_dir_all(&guest.dir).map_err(|error| format!("{}: {error}", guest.dir.display()))?;
    let _turn =
        lock(&guest.dir.join("turn"), FlockArg::LockExclusive).expect("a turn in the guest");
    // Twice, because an idle guest may end just as it is asked.
    for _ in 0..2 {
        let mut patience = timeout + GRACE;
        if !guest.is_alive() {
            guest.boot(place)?;
            patience += BOOT;
        }
        match guest.ask(test, timeout, patience) {
            Answer::Outcome(Outcome { failure: None }) => {
                print!("{}", guest.output());
                return Ok(());
            }
            Answer::Outcome(Outcome {
                failure: Some(failure),
            }) => return Err(guest.wreck(test, &failure, false)),
            Answer::Died => return Err(guest.wreck(test, "ended its guest", true)),
            Answer::Silent => return Err(guest.wreck(test, "the guest does not answer", true)),
            Answer::Gone => {}
        }
    }
    Err(guest.wreck(test, "the guest does not come up", true))
}

enum Answer {
    Outcome(Outcome),
    /// The guest ended before it took the request.
    Gone,
    /// The guest ended after it took the request.
    Died,
    Silent,
}

struct Guest {
    dir: PathBuf,
}

impl Guest {
    fn share(&self, file: &str) -> PathBuf {
        self.dir.join("share").join(file)
    }

    /// Whether a keeper is there. It holds this lock for as long as it lives.
    fn is_alive(&self) -> bool {
        lock(&self.dir.join("alive"), FlockArg::LockExclusiveNonblock).is_err()
    }

    fn boot(&self, place: Place) -> Result<(), String> {
        prune();
        for leftover in ["keeper", "stop", "disk", "console"] {
            let _ = fs::remove_file(self.dir.join(leftover));
        }
        let _ = fs::remove_dir_all(self.dir.join("share"));
        fs::create_dir(self.dir.join("share"))
            .map_err(|error| format!("{}: {error}", self.dir.display()))?;
        let log = File::create(self.dir.join("log"))
            .map_err(|error| format!("{}: {error}", self.dir.display()))?;
        // nextest's own process is the parent of each of its tests; otherwise this process is the
        // whole run.
        let anchor = if std::env::var_os("NEXTEST_RUN_ID").is_some() {
            parent_id()
        } else {
            std::process::id()
        };
        let mut keeper = Command::new(this_binary())
            .arg("guest-keeper")
            .arg(&self.dir)
            .arg(anchor.to_string())
            .args(place.options())
            // Neither a key press nor nextest's end of one test ends the guest of the others.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .map_err(|error| format!("no keeper: {error}"))?;
        while !self.dir.join("keeper").exists() {
            if let Some(status) = keeper.try_wait().expect("the keeper is ours to wait for") {
                return Err(format!(
                    "the guest's keeper ended ({status}):\n{}",
                    tail(&self.dir.join("log"))
                ));
            }
            sleep(POLL);
        }
        // Its parent is this process or, soon, init: nobody waits for it.
        Ok(())
    }

    fn ask(&self, test: &str, timeout: Duration, patience: Duration) -> Answer {
        for file in ["outcome", "output"] {
            let _ = fs::remove_file(self.share(file));
        }
        let request = self.share("request");
        write_whole(
            &request,
            &Request {
                test: test.into(),
                timeout: timeout.as_secs(),
            },
        );
        let begin = Instant::now();
        loop {
            // Looked at before the outcome: what was written before the end counts.
            let alive = self.is_alive();
            if let Some(outcome) = read_whole(&self.share("outcome")) {
                return Answer::Outcome(outcome);
            }
            if !alive {
                return if request.exists() && tail(&self.dir.join("log")).is_empty() {
                    Answer::Gone
                } else {
                    Answer::Died
                };
            }
            if begin.elapsed() > patience {
                return Answer::Silent;
            }
            sleep(POLL);
        }
    }

    fn output(&self) -> String {
        fs::read(self.share("output")).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// Ends the guest, puts all of it aside, and says what a reader needs.
    fn wreck(&self, test: &str, failure: &str, console: bool) -> String {
        let _ = File::create(self.dir.join("stop"));
        drop(lock(&self.dir.join("alive"), FlockArg::LockExclusive));
        // Nextest tries again what failed; each try has its wreck.
        let attempt = std::env::var("NEXTEST_ATTEMPT").unwrap_or_else(|_| "1".to_owned());
        let place = self
            .dir
            .with_file_name("wrecks")
            .join(format!("{}.{attempt}", test.replace("::", ".")));
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).expect("a place for the wreck");
        for part in ["share", "disk", "console", "log"] {
            let _ = fs::rename(self.dir.join(part), place.join(part));
        }
        let mut message = format!("{test} {failure}\n{}", tail(&place.join("share/output")));
        let log = tail(&place.join("log"));
        if !log.is_empty() {
            message += &format!("--- tests/vm/run:\n{log}");
        }
        let console = if console {
            tail(&place.join("console"))
        } else {
            String::new()
        };
        if !console.is_empty() {
            message += &format!("--- the guest's console:\n{console}");
        }
        message
            + &format!(
                "--- all of its output, its console and its disk: {}",
                place.display()
            )
    }
}

/// The keeper: boots the guest and ends it with the test run, or when told to.
pub fn keep(dir: &Path, arguments: &[&str]) {
    let (anchor, options) = arguments.split_first().expect("the test run's process id");
    let anchor = Process::new(anchor);
    // Waits, because others look for a moment whether somebody holds it.
    let _alive = lock(&dir.join("alive"), FlockArg::LockExclusive).expect("the keeper's lock");
    // Whatever ends the keeper ends the guest.
    let mut guest = Command::new("setpriv")
        .args(["--pdeathsig", "TERM"])
        .arg(vm_run().get_program())
        .args(["--timeout", "7200", "--disk"])
        .arg(dir.join("disk"))
        .arg("--share")
        .arg(dir.join("share"))
        .arg("--console")
        .arg(dir.join("console"))
        .args(options)
        .arg("--")
        .arg(this_binary())
        .args(["guest-agent", "/share"])
        .spawn()
        .expect("setpriv of util-linux");
    File::create(dir.join("keeper")).expect("a mark that the guest is kept");
    let over = loop {
        if let Some(status) = guest.try_wait().expect("the guest is ours to wait for") {
            if status.success() {
                let _ = fs::remove_file(dir.join("disk"));
            }
            break anchor.is_over();
        }
        if anchor.is_over() || dir.join("stop").exists() {
            let pid = nix::unistd::Pid::from_raw(guest.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM);
            let _ = guest.wait();
            break anchor.is_over();
        }
        sleep(POLL * 4);
    };
    if over {
        let _ = fs::remove_dir_all(dir);
        // Stays where wrecks are in it.
        if let Some(run) = dir.parent() {
            let _ = fs::remove_dir(run);
        }
    }
}

/// A process of somebody else, told from a later one of the same number by when it started.
struct Process {
    stat: PathBuf,
    start: Option<String>,
}

impl Process {
    fn new(pid: &str) -> Self {
        let stat = Path::new("/proc").join(pid).join("stat");
        let start = Self::start(&stat);
        Self { stat, start }
    }

    /// proc(5): field 22, counted from behind the name, which may hold anything. A zombie is
    /// over.
    fn start(stat: &Path) -> Option<String> {
        let text = fs::read_to_string(stat).ok()?;
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        if fields.next()? == "Z" {
            return None;
        }
        fields.nth(18).map(str::to_owned)
    }

    fn is_over(&self) -> bool {
        self.start.is_none() || Self::start(&self.stat) != self.start
    }
}

/// Removes what earlier runs left, but for the wrecks of the last few.
fn prune() {
    let Ok(entries) = fs::read_dir(runs_dir()) else {
        return;
    };
    let mut ended: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|run| {
            // A keeper's directory is gone once its run is.
            fs::read_dir(run).is_ok_and(|parts| {
                parts
                    .flatten()
                    .all(|part| part.file_name() == "wrecks" || !is_kept(&part.path()))
            })
        })
        .filter_map(|run| Some((fs::metadata(&run).ok()?.modified().ok()?, run)))
        .collect();
    ended.sort();
    for (_, run) in ended.iter().rev().skip(RUNS_KEPT) {
        let _ = fs::remove_dir_all(run);
    }
}

fn is_kept(guest: &Path) -> bool {
    Guest { dir: guest.into() }.is_alive()
}

fn lock(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path)?;
    Flock::lock(file, how).map_err(|(_, errno)| errno.into())
}

/// Writes a file that is there with all its content or not at all.
pub fn write_whole(path: &Path, value: &impl Serialize) {
    let part = path.with_extension("part");
    fs::write(&part, serde_json::to_vec(value).expect("JSON"))
        .expect("a file in the shared directory");
    fs::rename(&part, path).expect("a rename in the shared directory");
}

fn read_whole<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    Some(serde_json::from_slice(&bytes).expect("what the other side wrote"))
}

fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    let mut end = lines[lines.len().saturating_sub(TAIL)..].join("\n");
    if !end.is_empty() {
        end.push('\n');
    }
    end
}
