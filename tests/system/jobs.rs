// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Job volumes: what is asked for on their sockets, and what becomes of what is mounted there.
//!
//! The client here is on the host, where a job volume is as it is in a container; `podman::jobs` has
//! containers.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::{Value, json};

use crate::harness::{Test, Tier, test};
use crate::support::census::{Known, mounts};
use crate::support::ceph;
use crate::support::command::{outcome_of, run};
use crate::support::content::Random;
use crate::support::daemon::Daemon;
use crate::support::site::{Body, Kind, MOUNT_DIR, Site, with_each_store};
use crate::support::wait_until;

const BODIES: &[Body] = &[
    ("what_the_article_asks_for", article),
    ("jobs_do_not_see_each_other", apart),
    ("a_checkpoint_is_of_one_instant", checkpoint),
    ("a_checkpoint_while_dd_writes", checkpoint_of_much),
    ("mounts_go_on_after_a_kill", over_a_kill),
    ("a_checkpoint_is_not_the_end", not_the_end),
    ("one_that_cannot_be_frozen_stops_no_other", unfreezable),
    ("what_changes_nothing_costs_no_commit", no_commit),
    ("changes_and_tags_are_budgeted", budgets),
    ("none_gets_in_before_it_is_known", unknown),
    ("a_mount_out_of_reach_is_settled", out_of_reach),
    ("one_that_spoils_its_socket_loses_nothing", spoilt),
    ("places_that_are_refused", places),
    ("a_directory_swapped_for_a_link_leads_nowhere", swapped),
    ("volume_options_bound_requests", bounds),
    ("a_flood_of_one_scope_drowns_no_other", flood),
];

/// What no store has a part in.
const REFLINK_BODIES: &[Body] = &[
    ("limits", limits),
    ("slow_and_hostile_clients", clients),
    ("only_what_may_be_published_is", verdicts),
    ("other_users_of_the_host_are_refused", other_users),
    ("published_if_missing", if_missing),
    ("mounted_very_often_it_gets_no_more", multiplied),
    (
        "a_discard_that_failed_is_asked_for_again",
        discarded_at_last,
    ),
];

pub fn tests() -> Vec<Test> {
    let mut tests = with_each_store("jobs", BODIES);
    tests.extend(REFLINK_BODIES.iter().map(|(name, body)| {
        test(Tier::Reflink, format!("jobs::{name}"), || {
            body(Kind::Reflink);
        })
    }));
    tests
}

struct Jobs {
    daemon: Option<Daemon>,
    site: Site,
}

impl Jobs {
    fn new(kind: Kind) -> Self {
        Self::with(kind, "")
    }

    fn with(kind: Kind, settings: &str) -> Self {
        let site = Site::new(kind);
        site.configure(settings);
        Self {
            daemon: Some(site.serve()),
            site,
        }
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// A job volume in use.
    fn job(&self, name: &str, options: &Value) -> PathBuf {
        let mut all = options.clone();
        all["type"] = "job".into();
        self.daemon().plugin().create(name, &all);
        let at = self.daemon().plugin().mount(name, "test");
        assert_eq!(at, Path::new(MOUNT_DIR).join(name));
        at
    }

    /// Ends its use, and gives what became of each mount, by path, once `count` are settled.
    fn end(&self, name: &str, count: usize) -> Value {
        self.daemon().plugin().unmount(name, "test");
        let mut last = Value::Null;
        wait_until(|| {
            let status = self.status(name);
            last = status["last_lease"].clone();
            status["state"] == "stale" && last.as_object().map_or(0, |last| last.len()) == count
        });
        assert!(!Path::new(MOUNT_DIR).join(name).exists());
        last
    }

    fn status(&self, name: &str) -> Value {
        self.daemon().plugin().status(name)
    }

    /// An entry whose file `who` says `who`.
    fn entry(&self, who: &str, tags: &str, scope: &str) {
        let at = self.job("maker", &json!({"scope": scope}));
        assert_ok(&ask(&at, &format!("mount x\n< {tags}\n")));
        fs::write(at.join("x/who"), who).unwrap();
        let last = self.end("maker", 1);
        assert!(last["x"]["published"].is_string(), "{last}");
        self.daemon().plugin().remove("maker");
    }
}

/// What is answered to `input`, where it does not matter who asks: quicker than [`ask`].
pub fn ask_here(at: &Path, input: &str) -> String {
    let mut stream = UnixStream::connect(at.join("socket")).unwrap();
    // It may be hung up on before all is said.
    let _ = stream.write_all(input.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Says `input` on a job volume's socket, and gives all that is answered. A process of its own does that: the daemon
/// looks at the client's mounts, and a test is a thread with mounts of its own.
fn ask(at: &Path, input: &str) -> String {
    let mut client = Command::new("ncat");
    client.arg("-U");
    ask_by(client, at, input)
}

/// The same by a client of one's own.
fn ask_by(mut client: Command, at: &Path, input: &str) -> String {
    let mut client = client
        .arg(at.join("socket"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("ncat");
    client
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = client.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn assert_ok(answer: &str) {
    let last = answer.lines().last().unwrap_or_default();
    assert!(last.starts_with("ok "), "{answer:?}");
}

#[track_caller]
fn assert_refused(answer: &str, words: &str) {
    assert!(
        answer.starts_with("error ") && answer.contains(words) && answer.lines().count() == 1,
        "{answer:?} does not say {words:?}"
    );
}

fn article(kind: Kind) {
    let jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({}));
    let request =
        "mount /run/lvm-cache-friend/mnt/job/cargo\n> linux dc5e8c\n> linux\n< linux dc5e8c";
    let answer = ask(&at, request);
    let lines: Vec<_> = answer.lines().collect();
    let store = match kind {
        Kind::Reflink => "reflink",
        Kind::Lvm => crate::support::lvm::TestVg::NAME,
        Kind::Rbd => ceph::STORE,
    };
    assert_eq!(lines.len(), 2, "{answer}");
    assert!(
        lines[0].starts_with(&format!("{store} friend-")),
        "{answer}"
    );
    assert!(lines[1].starts_with("ok restored=base age="), "{answer}");
    assert!(
        lines[1].ends_with("path=/run/lvm-cache-friend/mnt/job/cargo"),
        "{answer}"
    );
    fs::write(at.join("cargo/x"), "one").unwrap();
    let shown = jobs.status("job");
    assert_eq!(shown["mounts"]["cargo"]["restored"], "base", "{shown}");
    let last = jobs.end("job", 1);
    let entry = last["cargo"]["published"]
        .as_str()
        .unwrap_or_else(|| panic!("{last}"));

    let at = jobs.daemon().plugin().mount("job", "test");
    let answer = ask(&at, request);
    assert!(
        answer.starts_with(&format!(
            "{store} {entry}\nok restored=exact criterion=dc5e8c,linux tags=dc5e8c,linux age="
        )),
        "{answer}"
    );
    assert_eq!(fs::read_to_string(at.join("cargo/x")).unwrap(), "one");
    let answer = ask(&at, "mount b\n> linux other\n> li*\n\n\nnever read");
    assert!(
        answer.contains("ok restored=fallback criterion=li* "),
        "{answer}"
    );
    let answer = ask(&at, "lookup\n> linux\n\nstatus\nbye\n");
    assert_eq!(answer.lines().count(), 5, "{answer}");
    assert!(answer.contains("ok mounts=2 verdict=unknown"), "{answer}");
    // Removed by force while in use: all of it ends.
    let body = json!({"Name": "job"});
    let said = jobs.daemon().plugin().refused("VolumeDriver.Remove", &body);
    assert!(said.contains("in use"), "{said}");
    jobs.daemon().plugin().ok("Friend.Remove", &body);
    assert!(!at.exists());
    wait_until(|| mounts().is_empty());
    wait_until(|| jobs.site.list().iter().all(|row| row["kind"] != "volume"));
}

fn apart(kind: Kind) {
    let jobs = Jobs::new(kind);
    jobs.entry("origin", "linux", "-");
    let [one, two] = ["one", "two"].map(|name| jobs.job(name, &json!({"save": "new"})));
    thread::scope(|scope| {
        for at in [&one, &two] {
            scope.spawn(|| {
                assert_ok(&ask(at, "mount a\n> linux\n\nmount deep/b\n> linux\n"));
            });
        }
    });
    let places: Vec<_> = [&one, &two]
        .iter()
        .flat_map(|at| [at.join("a"), at.join("deep/b")])
        .collect();
    for (n, place) in places.iter().enumerate() {
        assert_eq!(fs::read_to_string(place.join("who")).unwrap(), "origin");
        fs::write(place.join("who"), n.to_string()).unwrap();
    }
    for (n, place) in places.iter().enumerate() {
        assert_eq!(
            fs::read_to_string(place.join("who")).unwrap(),
            n.to_string()
        );
    }
    for name in ["one", "two"] {
        let last = jobs.end(name, 2);
        for path in ["a", "deep/b"] {
            assert!(last[path]["published"].is_string(), "{last}");
        }
    }
}

/// A user of the host in no group, and one in the plugin's, each also from a namespace of its own.
fn other_users(kind: Kind) {
    let group = "2000";
    let jobs = Jobs::with(kind, &format!("socket-group = \"{group}\"\n"));
    let at = jobs.job("job", &json!({}));
    assert_ok(&ask(&at, "mount x\n"));
    let by = |groups: &str, words: &[&str]| {
        let mut user = Command::new("setpriv");
        user.args(["--reuid=1234", "--regid=1234", groups]);
        user.args(words);
        user
    };
    let request = "mount evil\n< linux\n\n";
    let member = format!("--groups={group}");
    let namespace = ["unshare", "-Urm"];
    for before in [&[][..], &namespace[..]] {
        let ncat = [before, &["ncat", "-U"]].concat();
        // The very path is closed.
        let stranger = |words: &[&str]| {
            let words = [before, words].concat();
            let outcome = outcome_of(&mut by("--clear-groups", &words));
            assert!(
                outcome.stderr.contains("ermission denied"),
                "{words:?}: {outcome:?}"
            );
        };
        let path = |name: &str| at.join(name).to_str().unwrap().to_owned();
        stranger(&["ls", MOUNT_DIR]);
        stranger(&["ls", &path("x")]);
        stranger(&["ncat", "-U", &path("socket")]);
        // Who may go there is in no container for that.
        let answer = ask_by(by(&member, &ncat), &at, request);
        assert_refused(&answer, "only containers");
    }
    // Nor is a container's root one for a container that it is not in: what the hooks told of is.
    let inside = |pid: &str, words: &[&str]| {
        let enter = [
            "nsenter",
            "--target",
            pid,
            "--mount",
            "--pid",
            "--",
            "setpriv",
            "--reuid=1234",
            "--regid=1234",
            &member,
        ];
        let mut user = Command::new(enter[0]);
        user.args(&enter[1..]).args(words);
        user
    };
    let mut container = Command::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            "echo; exec sleep 3600",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    container
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut [0])
        .unwrap();
    let pid = run("pgrep", ["-P", &container.id().to_string()]);
    let pid = pid.trim();
    let started =
        json!({"Container": "a-container", "Volumes": ["job"], "Pid": pid.parse::<i32>().unwrap()});
    jobs.daemon().plugin().ok("Friend.Started", &started);
    for (words, asks) in [
        (inside(pid, &["ncat", "-U"]), true),
        (
            inside(pid, &["unshare", "-Urmp", "--fork", "ncat", "-U"]),
            true,
        ),
        (
            by(&member, &["unshare", "-Urmp", "--fork", "ncat", "-U"]),
            false,
        ),
        (by(&member, &["ncat", "-U"]), false),
    ] {
        let what = format!("{words:?}");
        let answer = ask_by(words, &at, "status\n");
        assert_eq!(answer.contains("ok mounts=1 "), asks, "{what}: {answer}");
    }
    container.kill().unwrap();
    container.wait().unwrap();
    assert_ok(&ask(&at, "status\n"));
    jobs.end("job", 1);
}

/// A namespace that has the job volume very often, as a job can have it in namespaces of its own: each mount in the volume
/// is copied to each place. Gone when dropped.
struct Multiplied(mpsc::Sender<()>, Option<thread::JoinHandle<()>>);

impl Multiplied {
    fn new(at: &Path, times: usize) -> Self {
        let (end, ended) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let at = at.to_owned();
        let thread = thread::spawn(move || {
            let none = None::<&str>;
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).unwrap();
            let places = tempfile::tempdir_in("/run").unwrap();
            mount(
                Some("places"),
                places.path(),
                Some("tmpfs"),
                MsFlags::empty(),
                none,
            )
            .unwrap();
            for n in 0..times {
                let place = places.path().join(n.to_string());
                fs::create_dir(&place).unwrap();
                mount(Some(&at), &place, none, MsFlags::MS_BIND, none).unwrap();
            }
            ready.send(()).unwrap();
            let _ = ended.recv();
            let _ = umount2(places.path(), MntFlags::MNT_DETACH);
        });
        is_ready.recv().unwrap();
        Self(end, Some(thread))
    }
}

impl Drop for Multiplied {
    fn drop(&mut self) {
        let _ = self.0.send(());
        let _ = self.1.take().unwrap().join();
    }
}

/// A job that makes each mount cost the kernel much more than others' gets no more of them, and others go on.
fn multiplied(kind: Kind) {
    // The kernel's own limit for a namespace, copies of mounts included, is 100,000 (fs.mount-max).
    const TIMES: usize = 10_000;
    const MOST: usize = 8;
    let jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({}));
    let other = jobs.job("other", &json!({}));
    assert_ok(&ask_here(&at, "mount first\n"));
    let mut namespaces = Vec::new();
    let refused = loop {
        let answer = ask_here(&at, &format!("mount x{}\n", namespaces.len()));
        if answer.starts_with("error ") {
            break answer;
        }
        assert_ok(&answer);
        assert!(namespaces.len() < MOST, "it got all that it asked for");
        namespaces.push(Multiplied::new(&at, TIMES));
    };
    assert_refused(&refused, "in so many places");
    let log = jobs.daemon().log();
    assert_eq!(log.matches("mounted in very many places").count(), 1);
    // What it has it keeps, and its end is that of any job.
    fs::write(at.join("first/x"), "x").unwrap();
    assert_ok(&ask_here(&other, "mount x\n"));
    let count = 1 + namespaces.len();
    drop(namespaces);
    jobs.end("job", count);
    jobs.end("other", 1);
}

/// `publish=if-missing`: an entry that has the save tags, where the volume reads, is enough.
fn if_missing(kind: Kind) {
    let jobs = Jobs::new(kind);
    let entries = || {
        let rows = jobs.site.list();
        rows.iter().filter(|row| row["kind"] == "entry").count()
    };
    // The entry's own content, with how it ended, in a volume with these options more.
    let end = |options: &[(&str, &str)], said: &str| {
        let mut all = json!({"publish": "if-missing"});
        for (option, value) in options {
            all[*option] = (*value).into();
        }
        let at = jobs.job("job", &all);
        assert_ok(&ask(&at, "mount x\n> linux\n"));
        fs::write(at.join("x/y"), "y").unwrap();
        let answer = ask(&at, said);
        assert_ok(&answer);
        let last = jobs.end("job", 1)["x"].clone();
        jobs.daemon().plugin().remove("job");
        (last, answer)
    };
    let why = "an entry has its tags already";
    for (options, said, published) in [
        (
            &[("save", "linux one"), ("scope", "a")][..],
            "verdict failure\n",
            "the work failed",
        ),
        (&[("save", "linux one"), ("scope", "a")], "status\n", ""),
        (&[("save", "linux one"), ("scope", "a")], "status\n", why),
        // Restored by another criterion, or from elsewhere: that counts where it would be published.
        (&[("save", "linux"), ("scope", "a")], "status\n", why),
        (&[("save", "linux two"), ("scope", "a")], "status\n", ""),
        (&[("save", "linux one two"), ("scope", "a")], "status\n", ""),
        (
            &[("save", "linux one"), ("scope", "b"), ("read-scopes", "a")],
            "status\n",
            why,
        ),
        (&[("save", "linux one"), ("scope", "b")], "status\n", ""),
        (
            &[
                ("save", "linux one"),
                ("scope", "b"),
                ("publish", "unless-failed"),
            ],
            "status\n",
            "",
        ),
    ] {
        let before = entries();
        let (last, _) = end(options, said);
        assert_eq!(
            last["why"].as_str().unwrap_or_default(),
            published,
            "{options:?} {last}"
        );
        assert_eq!(entries() - before, usize::from(published.is_empty()));
    }
    // A checkpoint is what is there; a new one is enough for the lease's end.
    let before = entries();
    let (last, answer) = end(&[("save", "linux one"), ("scope", "a")], "save x\n");
    assert_eq!(last["why"], why);
    let there = jobs.site.list();
    assert!(
        there
            .iter()
            .any(|row| row["kind"] == "entry" && answer.contains(row["name"].as_str().unwrap())),
        "{answer}"
    );
    assert_eq!(entries(), before);
    let (last, _) = end(&[("save", "linux three"), ("scope", "a")], "save x\n");
    assert_eq!(
        (last["why"].as_str().unwrap(), entries()),
        (why, before + 1)
    );
    // Of many that end at once, one.
    let options = json!({"publish": "if-missing", "save": "all", "scope": "a"});
    let names: Vec<_> = (0..6).map(|n| format!("job{n}")).collect();
    for name in &names {
        let at = jobs.job(name, &options);
        assert_ok(&ask(&at, "mount x\n"));
        fs::write(at.join("x/y"), "y").unwrap();
    }
    thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| jobs.end(name, 1));
        }
    });
    assert_eq!(entries(), before + 2);
}

fn verdicts(kind: Kind) {
    let jobs = Jobs::new(kind);
    let mut expected = 0;
    for (options, said, published) in [
        (json!({"save": "a"}), "status\n", true),
        (json!({"save": "a"}), "verdict failure\n", false),
        (
            json!({"save": "a"}),
            "verdict failure\nverdict success\n",
            true,
        ),
        (json!({"save": "a"}), "discard x\n", false),
        (
            json!({"save": "a", "publish": "on-success"}),
            "status\n",
            false,
        ),
        (
            json!({"save": "a", "publish": "on-success"}),
            "verdict success\n",
            true,
        ),
        (
            json!({"save": "a", "publish": "never"}),
            "verdict success\n",
            false,
        ),
        (json!({}), "verdict success\n", false),
    ] {
        let at = jobs.job("job", &options);
        assert_ok(&ask(&at, "mount x\n"));
        fs::write(at.join("x/y"), "y").unwrap();
        assert_ok(&ask(&at, said));
        let last = jobs.end("job", 1);
        assert_eq!(
            last["x"]["published"].is_string(),
            published,
            "{options} {said}: {last}"
        );
        jobs.daemon().plugin().remove("job");
        expected += usize::from(published);
    }
    // Nor is a checkpoint of what failed, unless what failed is published, too.
    for (publish, refused) in [("unless-failed", true), ("always", false)] {
        let at = jobs.job("job", &json!({"publish": publish}));
        assert_ok(&ask(&at, "mount x\n"));
        assert_ok(&ask(&at, "verdict failure\n"));
        let answer = ask(&at, "save x b\n");
        if refused {
            assert_refused(&answer, "failed");
        } else {
            assert_ok(&answer);
            expected += 1;
        }
        jobs.end("job", 1);
        jobs.daemon().plugin().remove("job");
    }
    // How its container ends counts where the job says nothing; and before both, what whoever had it done says of it,
    // but that a job's failure is one.
    let (ended, judged) = ("Friend.Ended", "Friend.Judged");
    for (told, said, published) in [
        (&[(ended, json!(0))][..], "status\n", true),
        (&[(ended, json!(1))], "status\n", false),
        (&[(judged, json!(0)), (ended, json!(100))], "status\n", true),
        (&[(ended, json!(100)), (judged, json!(0))], "status\n", true),
        (&[(ended, json!(0)), (judged, json!(1))], "status\n", false),
        (
            &[(ended, json!(0)), (judged, json!(1))],
            "verdict success\n",
            false,
        ),
        (
            &[(ended, json!(0)), (judged, json!(0))],
            "verdict failure\n",
            false,
        ),
        (
            &[(ended, json!(0)), (judged, Value::Null)],
            "status\n",
            false,
        ),
    ] {
        let options = json!({"save": "a", "publish": "on-success"});
        let at = jobs.job("job", &options);
        let tell = |endpoint: &str, more: (&str, &Value)| {
            let mut body = json!({"Container": "c", "Volumes": ["job"]});
            body[more.0] = more.1.clone();
            jobs.daemon().plugin().ok(endpoint, &body);
        };
        tell("Friend.Started", ("Pid", &json!(1)));
        assert_ok(&ask(&at, "mount x\n"));
        fs::write(at.join("x/y"), "y").unwrap();
        assert_ok(&ask(&at, said));
        for (endpoint, code) in told {
            tell(endpoint, ("ExitCode", code));
        }
        let last = jobs.end("job", 1);
        assert_eq!(
            last["x"]["published"].is_string(),
            published,
            "{told:?} {said}: {last}"
        );
        jobs.daemon().plugin().remove("job");
        expected += usize::from(published);
    }
    let entries = jobs
        .site
        .list()
        .iter()
        .filter(|row| row["kind"] == "entry")
        .count();
    assert_eq!(entries, expected);
}

/// A file whose two lines always agree is rewritten by renaming, as fast as can be.
fn checkpoint(kind: Kind) {
    let jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({"save": "linux"}));
    assert_ok(&ask(&at, "mount x\n"));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let (dir, stop) = (at.join("x"), Arc::clone(&stop));
        move || {
            let mut n = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                fs::write(dir.join("new"), format!("{n} {n}\n")).unwrap();
                fs::rename(dir.join("new"), dir.join("counter")).unwrap();
                fs::write(dir.join(format!("bulk{}", n % 8)), vec![n as u8; 200_000]).unwrap();
            }
        }
    });
    wait_until(|| at.join("x/counter").exists());
    let answer = ask(&at, "save x mid job\n");
    assert!(
        answer.contains("\nok saved=friend-") && answer.contains(" tags=job,linux,mid ms="),
        "{answer}"
    );
    let two = jobs.job("two", &json!({}));
    let answer = ask(&two, "mount y\n> mid\n");
    assert!(answer.contains("ok restored=exact"), "{answer}");
    let counter = fs::read_to_string(two.join("y/counter")).unwrap();
    let (one, other) = counter.trim_end().split_once(' ').unwrap();
    assert_eq!(one, other, "{counter:?}");
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    jobs.end("two", 1);
    let last = jobs.end("job", 1);
    assert!(
        last["x"]["published"].is_string(),
        "what was written after it: {last}"
    );

    // Unchanged since a checkpoint, the end publishes nothing more.
    let at = jobs.daemon().plugin().mount("job", "test");
    assert_ok(&ask(&at, "mount x\n> linux\n"));
    fs::write(at.join("x/more"), "more").unwrap();
    assert_ok(&ask(&at, "save x\n"));
    assert_refused(&ask(&at, "save z\n"), "nothing is mounted at z");
    jobs.end("job", 1);
}

/// A counter, what follows from it, and a checksum of both.
fn record(counter: u64) -> Vec<u8> {
    let mut random = Random::new(counter);
    let mut bytes = counter.to_le_bytes().to_vec();
    // Of many pages.
    for _ in 0..4096 {
        bytes.extend(random.next().to_le_bytes());
    }
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    bytes.extend(hasher.finish().to_le_bytes());
    bytes
}

/// The counter in a record, which must be whole.
#[track_caller]
fn counter(file: &Path) -> u64 {
    let bytes = fs::read(file).unwrap();
    let counter = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == record(counter), "{}: torn", file.display());
    counter
}

/// Whether a directory that [`checkpoint_of_much`] writes to is of one instant.
#[track_caller]
fn is_of_one_instant(dir: &Path) {
    for writer in ["plain", "synced"] {
        let [first, second] = ["first", "second"].map(|file| counter(&dir.join(writer).join(file)));
        assert!(
            first == second || first == second + 1,
            "{writer}: {first} in the file that is written first, {second} in the other"
        );
    }
}

/// Writes records to two files in turn, in place, until it is to stop.
fn write_records(dir: &Path, sync: bool, stop: &AtomicBool) {
    fs::create_dir(dir).unwrap();
    let files = ["first", "second"].map(|file| File::create(dir.join(file)).unwrap());
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        for file in &files {
            file.write_all_at(&record(n), 0).unwrap();
            if sync {
                file.sync_all().unwrap();
            }
        }
    }
}

/// Who writes, until this is dropped.
struct Writers {
    dd: Child,
    stop: Arc<AtomicBool>,
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let group = Pid::from_raw(self.dd.id().cast_signed());
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.dd.wait();
    }
}

/// `dd` writes, and two writers write records in place, each to two files in turn.
fn checkpoint_of_much(kind: Kind) {
    let jobs = Jobs::new(kind);
    for fs_type in ["xfs", "ext4"] {
        let at = jobs.job("job", &json!({"save": fs_type, "fs": fs_type}));
        assert_ok(&ask(&at, "mount x\n"));
        let dir = at.join("x");
        let mut saved = Vec::new();
        thread::scope(|scope| {
            // Of its own process group, and so is whatever it starts.
            let dd = "while :; do dd if=/dev/urandom of=\"$0\" bs=64k count=512 conv=notrunc status=none; done";
            let dd = Command::new("sh")
                .args(["-c".as_ref(), dd.as_ref(), dir.join("big").as_os_str()])
                .process_group(0)
                .spawn()
                .unwrap();
            let writers = Writers {
                dd,
                stop: Arc::default(),
            };
            for (name, sync) in [("plain", false), ("synced", true)] {
                let (dir, stop) = (dir.join(name), Arc::clone(&writers.stop));
                scope.spawn(move || write_records(&dir, sync, &stop));
            }
            wait_until(|| {
                let files = ["plain/second", "synced/second", "big"];
                let sizes =
                    files.map(|file| fs::metadata(dir.join(file)).map_or(0, |file| file.len()));
                sizes.iter().all(|size| *size > 0)
            });
            for _ in 0..2 {
                let answer = ask(&at, "save x mid\n");
                assert_ok(&answer);
                let mut words = answer.split(['=', ' ', '\n']);
                let entry = words.find(|word| word.starts_with("friend-")).unwrap();
                saved.push(entry.to_owned());
            }
        });
        let census = jobs.site.census();
        for entry in &saved {
            census.check(entry).unwrap();
            census.read(entry, is_of_one_instant).unwrap();
        }
        let other = jobs.job("other", &json!({}));
        let answer = ask(&other, &format!("mount y\n> mid {fs_type}\n"));
        assert!(answer.contains(saved.last().unwrap()), "{answer}");
        is_of_one_instant(&other.join("y"));
        assert!(other.join("y/big").exists());
        for name in ["other", "job"] {
            jobs.end(name, 1);
            jobs.daemon().plugin().remove(name);
        }
    }
}

/// The daemon ends between a lease's end and its settlement: what was written after a checkpoint is published all the same.
fn not_the_end(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({"save": "a"}));
    assert_ok(&ask(&at, "mount x\n"));
    fs::write(at.join("x/n"), "1").unwrap();
    assert_ok(&ask(&at, "save x middle\n"));
    fs::write(at.join("x/n"), "2").unwrap();
    let busy = File::open(at.join("x/n")).unwrap();
    jobs.daemon().plugin().unmount("job", "test");
    jobs.daemon.take().unwrap().stop();
    drop(busy);
    jobs.daemon = Some(jobs.site.serve());
    let entries = || {
        let rows = jobs.site.list();
        rows.iter().filter(|row| row["kind"] == "entry").count()
    };
    wait_until(|| entries() == 2);
    let at = jobs.job("reader", &json!({}));
    for (tag, holds) in [("a", "2"), ("middle", "1")] {
        assert_ok(&ask(&at, &format!("mount {tag}\n> {tag}\n")));
        assert_eq!(fs::read_to_string(at.join(tag).join("n")).unwrap(), holds);
    }
    jobs.end("reader", 2);
}

/// A process that is in the middle of a write to a file, and stays there.
struct Inside {
    pipe: Option<io::PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Inside {
    fn new(file: &Path) -> Self {
        let file = File::create(file).unwrap();
        let (empty, pipe) = io::pipe().unwrap();
        let (sender, thread_id) = mpsc::channel();
        let thread = thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            let (from, to) = (empty.as_raw_fd(), file.as_raw_fd());
            let null = std::ptr::null_mut();
            // SAFETY: no offsets are given.
            let moved = unsafe { libc::splice(from, null, to, null, 4096, 0) };
            assert_eq!(moved, 0, "{}", io::Error::last_os_error());
        });
        let call = format!("/proc/self/task/{}/syscall", thread_id.recv().unwrap());
        let splice = format!("{} ", libc::SYS_splice);
        wait_until(|| fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&splice)));
        Self {
            pipe: Some(pipe),
            thread: Some(thread),
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        drop(self.pipe.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

fn unfreezable(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    for fs_type in ["xfs", "ext4"] {
        let at = jobs.job("job", &json!({"save": fs_type, "fs": fs_type}));
        assert_ok(&ask(&at, "mount x\n"));
        fs::write(at.join("x/who"), "1").unwrap();
        let inside = Inside::new(&at.join("x/held"));
        let saves = thread::spawn({
            let at = at.clone();
            move || ["save x early\n", "save x early\n"].map(|save| ask(&at, save))
        });
        // Others notice nothing, neither while it is waited for nor later.
        jobs.entry("beside", &format!("beside-{fs_type}"), "-");
        for answer in saves.join().unwrap() {
            assert_refused(&answer, "could not be frozen");
        }
        jobs.entry("after", &format!("after-{fs_type}"), "-");
        // Nor is it kept from its end: what is left behind does not hold the daemon.
        jobs.daemon.take().unwrap().stop();
        jobs.daemon = Some(jobs.site.serve());
        jobs.entry("again", &format!("again-{fs_type}"), "-");
        drop(inside);
        fs::write(at.join("x/who"), "2").unwrap();
        assert_ok(&ask(&at, "save x late\n"));
        // What is still inside at the end of its lease is waited for, by nothing else.
        let inside = Inside::new(&at.join("x/held"));
        assert_refused(&ask(&at, "save x later\n"), "could not be frozen");
        jobs.daemon().plugin().unmount("job", "test");
        jobs.entry("ended", &format!("ended-{fs_type}"), "-");
        drop(inside);
        wait_until(|| jobs.status("job")["last_lease"]["x"]["published"].is_string());
        jobs.daemon().plugin().remove("job");
        let other = jobs.job("other", &json!({}));
        for (tag, holds) in [("late", "2"), (fs_type, "2")] {
            assert_ok(&ask(&other, &format!("mount {tag}\n> {tag} {fs_type}\n")));
            let read = fs::read_to_string(other.join(tag).join("who")).unwrap();
            assert_eq!(read, holds, "{fs_type} {tag}");
        }
        jobs.end("other", 2);
        jobs.daemon().plugin().remove("other");
    }
}

/// What each change to the store changes.
fn commits(site: &Site) -> String {
    match site.kind {
        Kind::Reflink => {
            let seq = fs::metadata(Path::new(&site.store()).join("~seq")).unwrap();
            format!("{:?}", seq.modified().unwrap())
        }
        Kind::Lvm => run(
            "vgs",
            ["--noheadings", "--options", "vg_seqno", &site.store()],
        ),
        Kind::Rbd => ceph::generation(),
    }
}

fn no_commit(kind: Kind) {
    let jobs = Jobs::with(kind, "job.changes = 5\n");
    let at = jobs.job("job", &json!({"save": "a"}));
    assert_ok(&ask(&at, "mount x\n\nmount y\n"));
    let leased = |row: &&Value| row["tags"].to_string().contains("friend:lease");
    wait_until(|| jobs.site.list().iter().filter(leased).count() == 2);
    // Nothing is to be taken back.
    let before = commits(&jobs.site);
    assert_ok(&ask(&at, &"verdict success\n".repeat(50)));
    assert_eq!(commits(&jobs.site), before);
    assert_ok(&ask(&at, "discard x\nverdict failure\n"));
    let before = commits(&jobs.site);
    for request in ["verdict failure\n", "discard x\n"] {
        assert_ok(&ask(&at, &request.repeat(50)));
    }
    assert_eq!(commits(&jobs.site), before);
    let last = jobs.end("job", 2);
    assert!(last["y"]["published"].is_null(), "{last}");
}

fn budgets(kind: Kind) {
    let jobs = Jobs::with(kind, "job.changes = 1\njob.tags = \"100\"\n");
    let at = jobs.job("job", &json!({"save": "a"}));
    let long = "t".repeat(60);
    assert_ok(&ask(&at, &format!("mount x\n< {long}\n")));
    assert_refused(
        &ask(&at, &format!("mount y\n< {long}\n")),
        "at most 100 bytes",
    );
    assert_refused(&ask(&at, &format!("save x {long}\n")), "at most 100 bytes");
    assert_refused(&ask(&at, "save x b\n"), "at most 1 changes");
    // Others have their own.
    let other = jobs.job("other", &json!({}));
    assert_ok(&ask(&other, &format!("mount x\n< {long}\n")));
    jobs.end("other", 1);
    // A failure is always heard. It is taken back as often as there are changes left.
    let refused = (0..1000).find_map(|_| {
        assert_ok(&ask(&at, "verdict failure\n"));
        let answer = ask(&at, "verdict success\n");
        answer.starts_with("error ").then_some(answer)
    });
    assert_refused(&refused.unwrap(), "at most 1 changes");
    let last = jobs.end("job", 1);
    assert_eq!(last["x"]["verdict"], "failure", "{last}");
}

fn over_a_kill(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({"save": "a"}));
    let bad = jobs.job("bad", &json!({"save": "b"}));
    for at in [&at, &bad] {
        assert_ok(&ask(at, "mount x\n\nmount gone\n"));
        fs::write(at.join("x/y"), "y").unwrap();
    }
    assert_ok(&ask(&bad, "verdict failure\n"));
    assert_ok(&ask(&at, "discard gone\n"));
    jobs.daemon.take().unwrap().kill();
    fs::write(at.join("x/meanwhile"), "z").unwrap();
    jobs.daemon = Some(jobs.site.serve());
    let answer = ask(&at, "status\nmount later\n");
    assert!(
        answer.contains("ok mounts=2 ") && answer.contains("path=/run/lvm-cache-friend/mnt/job/x"),
        "{answer}"
    );
    assert_ok(&answer);
    let last = jobs.end("job", 3);
    let entry = last["x"]["published"]
        .as_str()
        .unwrap_or_else(|| panic!("{last}"))
        .to_owned();
    assert!(last["gone"]["published"].is_null(), "{last}");
    let last = jobs.end("bad", 2);
    assert!(last["x"]["published"].is_null(), "{last}");
    let at = jobs.daemon().plugin().mount("job", "test");
    let answer = ask(&at, "mount x\n> a\n");
    assert!(
        answer.contains(&entry) || answer.contains("restored=exact"),
        "{answer}"
    );
    // Ended while nobody looked. (That it is in use is noted behind the answer.)
    let leased = |row: &Value| row["tags"].to_string().contains("friend:lease");
    wait_until(|| jobs.site.list().iter().any(leased));
    jobs.daemon.take().unwrap().kill();
    fs::write(at.join("x/last"), "z").unwrap();
    while lvm_cache_friend::mount::detach(&at.join("x")).unwrap() {}
    while lvm_cache_friend::mount::detach(&at).unwrap() {}
    jobs.daemon = Some(jobs.site.serve());
    wait_until(|| jobs.status("job")["state"] == "stale");
    wait_until(|| !jobs.site.list().iter().any(leased));
    let newest = jobs.job("two", &json!({}));
    assert_ok(&ask(&newest, "mount x\n> a\n"));
    assert!(
        newest.join("x/last").exists(),
        "what was written to its end is published"
    );
    // What is still in use would keep the group from being removed.
    jobs.end("two", 1);
}

/// The daemon starts again and finds a mount where it cannot take hold of it.
fn out_of_reach(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({"save": "a"}));
    assert_ok(&ask(&at, "mount x/y\n\nmount z\n"));
    for path in ["x/y/file", "z/file"] {
        fs::write(at.join(path), "").unwrap();
    }
    let leased = |row: &&Value| row["tags"].to_string().contains("friend:lease");
    wait_until(|| jobs.site.list().iter().filter(leased).count() == 2);
    jobs.daemon.take().unwrap().kill();
    // No path of a mount has such a name in it.
    fs::rename(at.join("x"), at.join("\u{1}")).unwrap();
    jobs.daemon = Some(jobs.site.serve());
    assert!(ask(&at, "status\n").contains("ok mounts=1 "));
    let last = jobs.end("job", 1);
    assert!(last["z"]["published"].is_string(), "{last}");
    let census = jobs.site.settled(&[Known::idle("job")]);
    assert_eq!(census.entries().len(), 1);
}

/// The store does not take a discard at first: it is refused until it does, and then holds for another life of the daemon.
fn discarded_at_last(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({"save": "a"}));
    assert_ok(&ask(&at, "mount x\n"));
    fs::write(at.join("x/file"), "").unwrap();
    let leased = |row: &Value| row["tags"].to_string().contains("friend:lease");
    let mut lv = None;
    wait_until(|| {
        let rows = jobs.site.list();
        lv = rows
            .iter()
            .find(|row| leased(row))
            .map(|row| row["name"].clone());
        lv.is_some()
    });
    let dir = Path::new(&jobs.site.store()).join(lv.unwrap().as_str().unwrap());
    run("chattr", ["+i".as_ref(), dir.as_os_str()]);
    for _ in 0..2 {
        assert_refused(&ask(&at, "discard x\n"), "not permitted");
    }
    run("chattr", ["-i".as_ref(), dir.as_os_str()]);
    assert_ok(&ask(&at, "discard x\n"));
    jobs.daemon.take().unwrap().kill();
    jobs.daemon = Some(jobs.site.serve());
    let last = jobs.end("job", 1);
    assert!(last["x"]["published"].is_null(), "{last}");
}

/// The daemon starts again, and finds no place for the socket: the job has taken it, or has used up its directory.
fn spoilt(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    let taken = jobs.job("taken", &json!({"save": "a"}));
    let full = jobs.job("full", &json!({"save": "b"}));
    for at in [&taken, &full] {
        assert_ok(&ask(at, "mount x\n"));
        fs::write(at.join("x/file"), "").unwrap();
    }
    let leased = |row: &&Value| row["tags"].to_string().contains("friend:lease");
    wait_until(|| jobs.site.list().iter().filter(leased).count() == 2);
    jobs.daemon.take().unwrap().kill();
    fs::remove_file(taken.join("socket")).unwrap();
    fs::create_dir(taken.join("socket")).unwrap();
    let filled = (0..)
        .map(|n| fs::write(full.join(format!("{n}")), ""))
        .find_map(Result::err);
    assert_eq!(filled.unwrap().kind(), io::ErrorKind::StorageFull);
    jobs.daemon = Some(jobs.site.serve());
    for (name, at) in [("taken", &taken), ("full", &full)] {
        // As the supervisor does again and again.
        jobs.daemon().plugin().mount(name, "supervisor");
        fs::write(at.join("x/later"), "").unwrap();
        jobs.daemon().plugin().unmount(name, "supervisor");
        let last = jobs.end(name, 1);
        assert!(last["x"]["published"].is_string(), "{name}: {last}");
    }
    assert!(mounts().is_empty(), "{:?}", mounts());
}

fn places(kind: Kind) {
    let jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({}));
    let before = jobs.site.list().len();
    symlink("/etc", at.join("link")).unwrap();
    fs::write(at.join("file"), "").unwrap();
    for (path, words) in [
        ("/etc/x", "below /run/lvm-cache-friend/mnt/job"),
        (
            "/run/lvm-cache-friend/mnt/other/x",
            "below /run/lvm-cache-friend/mnt/job",
        ),
        ("../other", "below /run/lvm-cache-friend/mnt/job"),
        ("a/../../b", "below /run/lvm-cache-friend/mnt/job"),
        ("socket", "below /run/lvm-cache-friend/mnt/job"),
        ("bin/x", "below /run/lvm-cache-friend/mnt/job"),
        ("link", "something else than a directory"),
        ("link/x", "something else than a directory"),
        ("file", "something else than a directory"),
    ] {
        assert_refused(&ask(&at, &format!("mount {path}\n")), words);
    }
    assert_eq!(jobs.site.list().len(), before, "nothing was made");
    assert_ok(&ask(&at, "mount a/b\n"));
    for path in ["a/b", "a", "a/b/c"] {
        assert_refused(&ask(&at, &format!("mount {path}\n")), "mounted already");
    }
    // Also by another name.
    fs::rename(at.join("a"), at.join("c")).unwrap();
    assert_refused(&ask(&at, "mount c/b/d\n"), "upon a mount");
    assert!(!Path::new("/etc/x").exists());
    jobs.end("job", 1);
    assert!(mounts().is_empty(), "what was moved is unmounted too");
}

fn limits(kind: Kind) {
    let jobs = Jobs::with(
        kind,
        "job.line = 200\njob.criteria = 3\njob.terms = 8\njob.mounts = 2\njob.saves = 2\njob.connections = 3\njob.request-time = \"1s\"\n",
    );
    let at = jobs.job("job", &json!({}));
    assert_refused(
        &ask(&at, &format!("mount {}\n", "x".repeat(200))),
        "at most 200 bytes",
    );
    let gigantic = "x".repeat(5 << 20);
    assert_refused(&ask_here(&at, &gigantic), "at most 200 bytes");
    assert_refused(
        &ask(&at, "mount x\n> a\n> b\n> c\n> d\n"),
        "at most 3 criteria",
    );
    assert_refused(&ask(&at, "mount x\n> a b c d e\n< f g h i\n"), "8 terms");
    assert_ok(&ask(&at, "mount x\n> a b c d e\n< f g h\n"));
    assert_ok(&ask(&at, "mount y\n"));
    assert_refused(&ask(&at, "mount z\n"), "at most 2 mounts");
    // What fails does not count.
    assert_refused(&ask(&at, "save y\n"), "it has no tags");
    assert_ok(&ask(&at, "save x\n\nsave y some\n"));
    assert_refused(&ask(&at, "save x\n"), "at most 2 checkpoints");
    let mut slow = UnixStream::connect(at.join("socket")).unwrap();
    slow.write_all(b"mount z\n").unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert_refused(&answer, "not finished within 1 s");
    drop(slow);
    // An idle one may stay as long as it likes. The slow one's place may be free a moment later only.
    let mut idle = Vec::new();
    let answer = loop {
        let mut one = UnixStream::connect(at.join("socket")).unwrap();
        one.set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let mut answer = String::new();
        match one.read_to_string(&mut answer) {
            Ok(_) => break answer,
            Err(_) => idle.push(one),
        }
    };
    assert_refused(&answer, "at most 3 connections");
    assert!((2..=3).contains(&idle.len()), "{}", idle.len());
    drop(idle);
    wait_until(|| {
        let mut stream = UnixStream::connect(at.join("socket")).unwrap();
        let _ = stream.write_all(b"status\nbye\n");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer.contains("ok mounts=2")
    });
}

fn clients(kind: Kind) {
    let jobs = Jobs::new(kind);
    let at = jobs.job("job", &json!({}));
    let other = jobs.job("other", &json!({}));
    // Silent ones take all places of this job, and none of another's.
    let silent: Vec<_> = (0..64)
        .map(|_| UnixStream::connect(at.join("socket")).unwrap())
        .collect();
    assert_ok(&ask(&other, "mount x\n"));
    drop(silent);
    let mut slow = UnixStream::connect(at.join("socket")).unwrap();
    for byte in b"mount slow\r\n> a\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    let mut first = [0; 3];
    slow.read_exact(&mut first).unwrap();
    drop(slow);
    // One that hangs up gets what it asked for all the same.
    let mut gone = UnixStream::connect(at.join("socket")).unwrap();
    gone.write_all(b"mount gone\n\n").unwrap();
    drop(gone);
    wait_until(|| ask(&at, "status\n").contains("ok mounts=2 "));
    for garbage in [
        &b"\0\xff\xfe\n"[..],
        &[0xff; 9000],
        b"mount \xff\n",
        b"\n\n\n\n",
        b">>>>\n<<<",
    ] {
        let mut stream = UnixStream::connect(at.join("socket")).unwrap();
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(!answer.contains("ok "), "{garbage:?}: {answer}");
    }
    assert_ok(&ask(&at, "status\n"));
}

/// While the job swaps a directory for a link out of its volume and back, as fast as it can.
fn swapped(kind: Kind) {
    // Most rounds find no entry, once they have made and opened their place: what mounts takes a guest a second.
    let (rounds, mounting) = match kind {
        Kind::Reflink => (1000, 4),
        Kind::Lvm => (1000, 40),
        Kind::Rbd => (1000, 100),
    };
    let jobs = Jobs::with(kind, "job.changes = 100000\n");
    jobs.entry("origin", "linux", "-");
    let at = jobs.job("job", &json!({"restore": "linux", "on-miss": "fail"}));
    let outside = jobs.site.dir.path().join("outside");
    fs::create_dir_all(&outside).unwrap();
    let start = || {
        let stop = Arc::new(AtomicBool::new(false));
        let (dir, link, outside) = (at.join("dir"), at.join("link"), outside.clone());
        let stopped = Arc::clone(&stop);
        let swapper = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if !link.exists() {
                    let _ = fs::create_dir(&dir);
                    let _ = symlink(&outside, &link);
                }
                let _ = renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE);
            }
        });
        move || {
            stop.store(true, Ordering::Relaxed);
            swapper.join().unwrap();
        }
    };
    let mut stop = start();
    let (mut mounted, mut refused, mut missed) = (0, 0, 0);
    for round in 0..rounds {
        let term = if round % mounting == 0 {
            "linux"
        } else {
            "nothing"
        };
        let answer = ask_here(&at, &format!("mount dir/x\n> {term}\n"));
        let table = lvm_cache_friend::mount::table().unwrap();
        let led = table.iter().find(|mount| mount.at.starts_with(&outside));
        assert!(led.is_none(), "round {round}: {led:?}");
        match answer.lines().last().unwrap_or_default() {
            ok if ok.starts_with("ok ") => {
                mounted += 1;
                // The directory, the client in it, and this.
                let inside = table.iter().filter(|mount| mount.at.starts_with(&at));
                assert_eq!(inside.count(), 3, "round {round}: {table:?}");
                // What it made beneath the mountpoint would stay there, and be in the next test's way.
                stop();
                jobs.daemon().plugin().unmount("job", "test");
                jobs.daemon().plugin().mount("job", "test");
                stop = start();
            }
            miss if miss.contains("no entry matches") => missed += 1,
            error => {
                assert_refused(&format!("{error}\n"), "something else than a directory");
                refused += 1;
            }
        }
    }
    stop();
    println!("{mounted} mounted, {missed} found no entry, {refused} met the link");
    assert!(mounted > 0 && missed > 0 && refused > 0);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

/// A job fills what it may fill, under the tags of another scope.
fn flood(kind: Kind) {
    let jobs = Jobs::new(kind);
    jobs.entry("b", "linux one", "b");
    let of_b = |jobs: &Jobs| -> Vec<Value> {
        let mut rows = jobs.site.list();
        rows.retain(|row| row["scope"] == "b");
        for row in &mut rows {
            // These change by themselves: with time, and when the LV that it was made of goes.
            for changing in ["age_seconds", "exclusive", "origin"] {
                row.as_object_mut().unwrap().remove(changing);
            }
        }
        rows
    };
    let before = of_b(&jobs);
    let at = jobs.job("job", &json!({"scope": "a"}));
    assert_ok(&ask(&at, "mount x\n< linux one\n"));
    fs::write(at.join("x/who"), "a").unwrap();
    let saves = "save x linux one friend:scope:b\n\n".repeat(17);
    let answer = ask(&at, &saves);
    let ends: Vec<_> = answer
        .lines()
        .filter(|line| line.starts_with("ok ") || line.starts_with("error "))
        .collect();
    assert_eq!(ends.len(), 17, "{answer}");
    assert!(
        ends[..16].iter().all(|end| end.starts_with("ok ")),
        "{answer}"
    );
    assert_refused(ends[16], "at most 16 checkpoints");
    jobs.end("job", 1);
    assert_eq!(of_b(&jobs), before);
    let entries = |scope: &str| {
        let rows = jobs.site.list();
        rows.iter()
            .filter(|row| row["kind"] == "entry" && row["scope"] == scope)
            .count()
    };
    assert_eq!((entries("a"), entries("b")), (17, 1));
    let at = jobs.job("other", &json!({"scope": "b"}));
    assert_ok(&ask(&at, "mount x\n> linux one\n"));
    assert_eq!(fs::read_to_string(at.join("x/who")).unwrap(), "b");
    jobs.end("other", 1);
}

/// A job whose scope nobody has said yet gets nothing, and then what it was waiting for.
fn unknown(kind: Kind) {
    let mut jobs = Jobs::new(kind);
    jobs.entry("trusted", "linux", "trusted");
    jobs.entry("unscoped", "linux", "-");
    jobs.entry("own", "linux", "fork");
    let at = jobs.job("job", &json!({"admit": "later", "publish": "on-success"}));
    let wanted = "mount x\n> linux\n< linux new\n";
    let early = thread::spawn({
        let at = at.clone();
        move || ask(&at, wanted)
    });
    let admit = |jobs: &Jobs, options: Value| {
        let body = json!({"Name": "job", "Opts": options});
        jobs.daemon().plugin().call("Friend.Admit", &body)
    };
    // What needs no scope is answered meanwhile; by the second answer the first request has long come.
    assert_ok(&ask(&at, "status\n"));
    let refused = admit(&jobs, json!({"scope": "fork", "size": "1T"}));
    assert!(
        refused.0 == 400 && refused.1["Err"].as_str().unwrap().contains("size"),
        "{refused:?}"
    );
    assert_ok(&ask(&at, "status\n"));
    assert!(!early.is_finished(), "{:?}", early.join());
    assert!(!at.join("x").exists());

    let options = json!({"scope": "fork", "read-scopes": "trusted", "save": "job-7"});
    assert_eq!(admit(&jobs, options.clone()).0, 200);
    let answer = early.join().unwrap();
    assert_ok(&answer);
    assert_eq!(
        fs::read_to_string(at.join("x/who")).unwrap(),
        "own",
        "{answer}"
    );
    // Once is for ever, in another life of the daemon too.
    for _ in 0..2 {
        assert_eq!(admit(&jobs, options.clone()).0, 200);
        let (status, body) = admit(&jobs, json!({"scope": "trusted"}));
        assert_eq!(status, 409, "{body}");
        let daemon = jobs.daemon.take().unwrap();
        daemon.kill();
        jobs.daemon = Some(jobs.site.serve());
    }
    assert_ok(&ask(&at, "mount y\n> other\n> linux\n"));
    assert_eq!(fs::read_to_string(at.join("y/who")).unwrap(), "own");
    fs::write(at.join("x/who"), "new").unwrap();
    assert_ok(&ask(&at, "verdict success\n"));
    let last = jobs.end("job", 2);
    let rows = jobs.site.list();
    let published = rows
        .iter()
        .find(|row| row["name"] == last["x"]["published"]);
    let published = published.unwrap_or_else(|| panic!("{last}"));
    assert_eq!(published["scope"], "fork");
    assert!(
        published["tags"].to_string().contains("job-7"),
        "{published}"
    );

    for options in [
        json!({"admit": "later"}),
        json!({"type": "job", "admit": "later", "scope": "trusted"}),
        json!({"type": "job", "admit": "soon"}),
    ] {
        let body = json!({"Name": "v", "Opts": options});
        let why = jobs.daemon().plugin().refused("VolumeDriver.Create", &body);
        assert!(why.contains("admit"), "{why}");
    }
}

fn bounds(kind: Kind) {
    let jobs = Jobs::new(kind);
    jobs.entry("a", "linux one", "a");
    jobs.entry("b", "linux one", "b");
    jobs.entry("other", "macos one", "a");
    let who = |at: &Path, request: &str| {
        let answer = ask(at, &format!("mount x\n{request}"));
        assert_ok(&answer);
        fs::read_to_string(at.join("x/who")).unwrap_or_default()
    };
    for (options, request, want) in [
        (json!({"scope": "a"}), "> linux\n", "a"),
        (json!({"scope": "b"}), "> linux\n", "b"),
        (
            json!({"scope": "c"}),
            "> linux\n> one\n> scope:b\n> friend:scope:b\n",
            "",
        ),
        (json!({"scope": "c", "read-scopes": "b a"}), "> one\n", "b"),
        (json!({"scope": "a", "restore": "linux"}), "> one\n", "a"),
        (json!({"scope": "a", "restore": "linux"}), "> macos\n", ""),
        (json!({"scope": "a", "restore": "macos"}), "", "other"),
    ] {
        let at = jobs.job("job", &options);
        assert_eq!(who(&at, request), want, "{options} {request}");
        jobs.end("job", 1);
        jobs.daemon().plugin().remove("job");
    }
    // Who only asks is refused nothing.
    let at = jobs.job("job", &json!({"on-miss": "fail"}));
    let answer = ask(&at, "lookup\n> linux\n");
    assert!(answer.contains("ok restored=empty"), "{answer}");
    let answer = ask(&at, "mount x\n> linux\n");
    assert!(answer.contains("error no entry matches"), "{answer}");
    jobs.end("job", 0);
    jobs.daemon().plugin().remove("job");
    let at = jobs.job("job", &json!({"scope": "c", "save": "always"}));
    assert_ok(&ask(&at, "mount x\n< friend:scope:a new\n"));
    fs::write(at.join("x/y"), "").unwrap();
    jobs.end("job", 1);
    let rows = jobs.site.list();
    let new = rows
        .iter()
        .find(|row| row["kind"] == "entry" && row["scope"] == "c")
        .unwrap();
    let tags = new["tags"].to_string();
    assert!(
        tags.contains("friend:cache:friend:scope:a") && tags.contains("friend:cache:always"),
        "{tags}"
    );
    let reuse = json!({"Name": "v", "Opts": {"type": "job", "reuse": "keep"}});
    assert!(
        jobs.daemon()
            .plugin()
            .refused("VolumeDriver.Create", &reuse)
            .contains("reuse")
    );
}
