// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The GitHub action in `action/`: its entry points, run with what GitHub's runner gives them.
//!
//! What the runner does is from its source (actions/runner: `ActionRunner`, `NodeScriptActionHandler`, `FileCommandManager`,
//! `StepsRunner`): inputs by the names of `INPUT_*`, defaults that are evaluated anew for the post step, files for outputs and state.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;

use crate::harness::{Test, Tier, test};
use crate::support::command::{Outcome, outcome_of};
use crate::support::daemon::{Daemon, Plugin};
use crate::support::site::{Kind, Site};
use crate::support::{PROGRAM, temp_dir, wait_until};

pub fn tests() -> Vec<Test> {
    let host: [(&str, fn()); 5] = [
        ("as_actions_cache_has_them", interface),
        ("without_a_job_volume", without),
        ("what_is_refused", refused),
        ("a_client_that_fails", broken),
        ("compared_as_documented", compared),
    ];
    let reflink: [(&str, fn()); 8] = [
        ("hits_and_misses", || story(&mut Native::new())),
        ("keys", keys),
        ("paths", paths),
        ("saved_by_its_own_step", saves),
        ("saved_although_the_job_failed", save_always),
        ("when_it_saves", when),
        ("one_seeds_and_the_others_read", seeds),
        ("a_daemon_that_is_restarted", restarted),
    ];
    let host = host.map(|(name, body)| test(Tier::Host, format!("action::{name}"), body));
    let reflink = reflink.map(|(name, body)| test(Tier::Reflink, format!("action::{name}"), body));
    host.into_iter().chain(reflink).collect()
}

/// Where the action is, in containers too.
pub const ACTION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/action");

/// An `action.yml`, as far as it is used: sections of lines `  name:`, and of lines `    property: value` in them.
struct Manifest {
    sections: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
    runs: BTreeMap<String, String>,
    dir: PathBuf,
}

impl Manifest {
    /// Of the action itself (""), `restore` or `save`.
    fn of(action: &str) -> Self {
        let dir = Path::new(ACTION).join(action);
        let text = fs::read_to_string(dir.join("action.yml")).unwrap();
        let mut manifest = Self {
            sections: BTreeMap::new(),
            runs: BTreeMap::new(),
            dir,
        };
        let (mut section, mut name) = (String::new(), String::new());
        for line in text.lines() {
            let (key, value) = line.trim().split_once(':').unwrap();
            let value = value.trim().trim_matches('\'').to_owned();
            let key = key.to_owned();
            match line.len() - line.trim_start().len() {
                0 => section = key,
                2 if section == "runs" => {
                    manifest.runs.insert(key, value);
                }
                2 => {
                    let names = manifest.sections.entry(section.clone()).or_default();
                    names.insert(key.clone(), BTreeMap::new());
                    name = key;
                }
                4 => {
                    let names = manifest.sections.get_mut(&section).unwrap();
                    names.get_mut(&name).unwrap().insert(key, value);
                }
                _ => panic!("{line:?}"),
            }
        }
        manifest
    }

    fn names(&self, section: &str) -> Vec<&str> {
        let names = self.sections.get(section);
        names
            .into_iter()
            .flat_map(BTreeMap::keys)
            .map(String::as_str)
            .collect()
    }

    fn script(&self, stage: &str) -> PathBuf {
        let script = self.dir.join(&self.runs[stage]);
        assert!(script.is_file(), "{}", script.display());
        script
    }
}

/// A place where steps run: this machine, or a container.
pub trait Runner {
    /// A job begins: it has a job volume, and nothing that an earlier one made.
    fn begin(&mut self);
    /// The job ends, its container with this exit code.
    fn end(&mut self, code: i32);
    /// Runs `node SCRIPT` with nothing but `env` in its environment.
    fn node(&self, env: &BTreeMap<String, String>, script: &Path) -> Outcome;
    /// Runs a shell script, `set -e`, in the workspace.
    fn sh(&self, script: &str) -> String;
    /// The job's home directory, which has the workspace `work` and the runner's `temp`. This test sees them at the same path.
    fn home(&self) -> PathBuf;
    /// Where the job has its job volume.
    fn volume(&self) -> PathBuf;
    /// The tags of each entry.
    fn entries(&self) -> Vec<Vec<String>>;
}

/// How a step went.
struct Step {
    done: Outcome,
    outputs: BTreeMap<String, String>,
    state: BTreeMap<String, String>,
}

impl Step {
    fn output(&self, name: &str) -> &str {
        self.outputs.get(name).map_or("", String::as_str)
    }

    /// Asserts that it succeeded with these outputs and no others; an empty one is not set.
    #[track_caller]
    fn has(&self, hit: &str, matched: &str) {
        assert_eq!(self.done.status, 0, "{:?}", self.done);
        assert_eq!(self.output("cache-hit"), hit, "{:?}", self.done);
        assert_eq!(self.output("cache-matched-key"), matched, "{:?}", self.done);
    }

    /// Asserts that it failed, and said why in an annotation.
    #[track_caller]
    fn failed(&self, words: &str) {
        assert_eq!(self.done.status, 1, "{:?}", self.done);
        assert_annotated(&self.done.stdout, "error", words);
    }

    #[track_caller]
    fn says(&self, words: &str) {
        assert_eq!(self.done.status, 0, "{:?}", self.done);
        assert!(
            self.done.stdout.contains(words),
            "{words:?}: {:?}",
            self.done
        );
    }

    #[track_caller]
    fn warns(&self, words: &str) {
        assert_eq!(self.done.status, 0, "{:?}", self.done);
        assert_annotated(&self.done.stdout, "warning", words);
    }
}

#[track_caller]
fn assert_annotated(log: &str, level: &str, words: &str) {
    let command = format!("::{level}::");
    let found = log
        .lines()
        .any(|line| line.starts_with(&command) && line.contains(words));
    assert!(found, "no {level} {words:?} in {log:?}");
}

/// What a workflow says of a step: `uses` and `with`.
struct Uses<'a> {
    action: &'a str,
    with: Vec<(&'a str, String)>,
}

fn uses<'a>(action: &'a str, path: &str, key: &str) -> Uses<'a> {
    Uses {
        action,
        with: vec![("path", path.to_owned()), ("key", key.to_owned())],
    }
}

impl<'a> Uses<'a> {
    fn with(mut self, name: &'a str, value: &str) -> Self {
        self.with.push((name, value.to_owned()));
        self
    }

    /// Its main step.
    fn run(&self, runner: &dyn Runner) -> Step {
        self.stage(runner, "main", "success", &BTreeMap::new())
    }

    /// Its post step, for a job that went like `status`; `main` is how its main step went.
    fn post(&self, runner: &dyn Runner, main: &Step, status: &str) -> Step {
        let manifest = Manifest::of(self.action);
        // So the runner runs it after any job but a cancelled one.
        assert_eq!(manifest.runs["post-if"], "success() || failure()");
        self.stage(runner, "post", status, &main.state)
    }

    fn stage(
        &self,
        runner: &dyn Runner,
        stage: &str,
        job_status: &str,
        state: &BTreeMap<String, String>,
    ) -> Step {
        let manifest = Manifest::of(self.action);
        let home = runner.home();
        let temp = home.join("temp");
        let mut env = BTreeMap::from([
            ("HOME".to_owned(), home.display().to_string()),
            (
                "GITHUB_WORKSPACE".to_owned(),
                home.join("work").display().to_string(),
            ),
            ("RUNNER_TEMP".to_owned(), temp.display().to_string()),
            (
                "LVM_CACHE_FRIEND_DIR".to_owned(),
                runner.volume().display().to_string(),
            ),
        ]);
        for (name, input) in &manifest.sections["inputs"] {
            let default = input.get("default").map_or("", String::as_str);
            let default = default.replace("${{ job.status }}", job_status);
            let given = self.with.iter().rev().find(|(given, _)| given == name);
            let value = given.map_or(default, |(_, value)| value.clone());
            env.insert(
                format!("INPUT_{}", name.replace(' ', "_").to_uppercase()),
                value,
            );
        }
        for (name, _) in &self.with {
            assert!(manifest.names("inputs").contains(name), "no input {name}");
        }
        env.extend(
            state
                .iter()
                .map(|(name, value)| (format!("STATE_{name}"), value.clone())),
        );
        let files = ["GITHUB_OUTPUT", "GITHUB_STATE", "GITHUB_ENV"].map(|name| {
            let file = temp.join(name);
            fs::write(&file, "").unwrap();
            env.insert(name.to_owned(), file.display().to_string());
            file
        });
        let done = runner.node(&env, &manifest.script(stage));
        let [outputs, state, variables] =
            files.map(|file| told(&fs::read_to_string(file).unwrap()));
        assert!(variables.is_empty(), "{variables:?}");
        let declared = manifest.names("outputs");
        assert!(
            outputs.keys().all(|name| declared.contains(&name.as_str())),
            "{outputs:?}"
        );
        Step {
            done,
            outputs,
            state,
        }
    }
}

/// What a step wrote into a file of the runner's: `NAME<<END`, lines, `END`.
fn told(text: &str) -> BTreeMap<String, String> {
    let mut told = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let (name, end) = line.split_once("<<").unwrap();
        let value: Vec<_> = lines.by_ref().take_while(|line| *line != end).collect();
        told.insert(name.to_owned(), value.join("\n"));
    }
    told
}

/// The program, on this machine's `PATH` or wherever that leads to.
pub fn node() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join("node"));
    let found = found
        .find(|node| node.is_file())
        .expect("node is not on the PATH: apt-get install nodejs");
    found.canonicalize().unwrap()
}

fn on_this_machine(env: &BTreeMap<String, String>, script: &Path) -> Outcome {
    let mut command = Command::new(node());
    let workspace = &env["GITHUB_WORKSPACE"];
    outcome_of(
        command
            .arg(script)
            .env_clear()
            .envs(env)
            .current_dir(workspace),
    )
}

/// A home directory with what a runner has in it.
pub fn make_home(home: &Path) {
    for dir in ["work", "temp"] {
        fs::create_dir_all(home.join(dir)).unwrap();
    }
}

/// Jobs on this machine, where a job volume is as it is in a container.
struct Native {
    daemon: Option<Daemon>,
    site: Site,
    home: Option<TempDir>,
    volume: PathBuf,
}

impl Native {
    fn new() -> Self {
        let site = Site::new(Kind::Reflink);
        Self {
            daemon: Some(site.serve()),
            site,
            home: None,
            volume: PathBuf::new(),
        }
    }

    fn plugin(&self) -> &Plugin {
        self.daemon.as_ref().unwrap().plugin()
    }

    /// A job that does one step and succeeds.
    fn job(&mut self, uses: &Uses<'_>, script: &str) -> Step {
        self.begin();
        let main = uses.run(self);
        self.sh(script);
        if uses.action.is_empty() {
            let post = uses.post(self, &main, "success");
            assert_eq!(post.done.status, 0, "{:?}", post.done);
        }
        self.end(0);
        main
    }
}

impl Runner for Native {
    fn begin(&mut self) {
        let home = temp_dir();
        make_home(home.path());
        self.home = Some(home);
        self.plugin().create("job", &json!({"type": "job"}));
        self.volume = self.plugin().mount("job", "test");
    }

    fn end(&mut self, _: i32) {
        self.plugin().unmount("job", "test");
        self.plugin().remove("job");
        wait_until(|| self.site.list().iter().all(|row| row["kind"] != "volume"));
    }

    fn node(&self, env: &BTreeMap<String, String>, script: &Path) -> Outcome {
        on_this_machine(env, script)
    }

    fn sh(&self, script: &str) -> String {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-ec", script])
            .current_dir(self.home().join("work"));
        crate::support::command::succeed(command.env("HOME", self.home()))
    }

    fn home(&self) -> PathBuf {
        self.home.as_ref().unwrap().path().to_owned()
    }

    fn volume(&self) -> PathBuf {
        self.volume.clone()
    }

    fn entries(&self) -> Vec<Vec<String>> {
        entries(&self.site)
    }
}

/// See [`Runner::entries`].
pub fn entries(site: &Site) -> Vec<Vec<String>> {
    let list = site.list();
    let entries = list.iter().filter(|row| row["kind"] == "entry");
    let tags = entries.map(|row| {
        let tags = row["tags"]
            .as_array()
            .unwrap()
            .iter()
            .map(|tag| tag.as_str().unwrap());
        tags.filter_map(|tag| tag.strip_prefix("friend:cache:"))
            .map(str::to_owned)
            .collect()
    });
    tags.collect()
}

/// A miss, hits, and what is saved and what is not, in four jobs: in a guest each takes its time.
pub fn story(runner: &mut dyn Runner) {
    let cargo =
        |action, key| uses(action, "~/.cargo/registry", key).with("restore-keys", "linux-\n");

    // A miss, and a job that fails: its post step saves nothing, and neither does the container's end. A runner's exit code
    // says nothing of the job.
    runner.begin();
    let step = cargo("", "linux-a");
    let main = step.run(runner);
    main.has("", "");
    assert_eq!(main.output("cache-primary-key"), "linux-a");
    runner.sh("echo bad > ~/.cargo/registry/crate");
    step.post(runner, &main, "failure").says("did not succeed");
    runner.end(0);
    assert_eq!(runner.entries().len(), 0);

    // A miss that is saved. What the container ends with afterwards changes nothing.
    runner.begin();
    let main = step.run(runner);
    main.has("", "");
    runner.sh("[ -L ~/.cargo/registry ]; [ ! -e ~/.cargo/registry/crate ]; echo a > ~/.cargo/registry/crate");
    step.post(runner, &main, "success")
        .says("saved with the key: linux-a");
    runner.sh("echo later > ~/.cargo/registry/crate");
    runner.end(1);
    let entries = runner.entries();
    let [tags] = &entries[..] else {
        panic!("{entries:?}")
    };
    assert!(
        tags.contains(&"key:linux-a".to_owned()) && tags.len() == 2,
        "{tags:?}"
    );

    // A hit by a restore key, saved under a key of its own.
    let change =
        |to: &str| format!("cat ~/.cargo/registry/crate; echo {to} > ~/.cargo/registry/crate");
    runner.begin();
    let step = cargo("", "linux-b");
    let main = step.run(runner);
    main.has("false", "linux-a");
    assert_eq!(runner.sh(&change("b")), "a\n");
    step.post(runner, &main, "success")
        .says("saved with the key: linux-b");
    runner.end(0);
    assert_eq!(runner.entries().len(), 2);

    // Looking only, and a miss that is to be a failure: nothing is mounted, and no link is made.
    runner.begin();
    for (key, hit, matched) in [
        ("linux-a", "true", "linux-a"),
        ("linux-", "false", "linux-b"),
    ] {
        let looks = cargo("restore", key).with("lookup-only", "true");
        looks.run(runner).has(hit, matched);
    }
    let misses = uses("restore", "~/.cargo/registry", "macos").with("fail-on-cache-miss", "true");
    let main = misses.run(runner);
    main.failed("Cache not found by the key macos");
    assert_eq!(main.output("cache-hit"), "");
    assert_eq!(main.output("cache-primary-key"), "macos");
    assert!(!runner.home().join(".cargo").exists());
    // An exact hit, which is not saved again.
    let step = cargo("", "linux-a").with("fail-on-cache-miss", "true");
    let main = step.run(runner);
    main.has("true", "linux-a");
    assert_eq!(runner.sh(&change("c")), "a\n");
    step.post(runner, &main, "success").says("not saved again");
    runner.end(0);
    assert_eq!(runner.entries().len(), 2);
}

fn interface() {
    let paths = ["path", "key"];
    let restoring = [
        "restore-keys",
        "fail-on-cache-miss",
        "lookup-only",
        "enableCrossOsArchive",
    ];
    let saving = ["upload-chunk-size", "enableCrossOsArchive"];
    let outputs = ["cache-hit", "cache-matched-key", "cache-primary-key"];
    for (action, inputs, outputs) in [
        (
            "",
            [
                &paths[..],
                &restoring,
                &saving,
                &["save", "save-always", "job-status"],
            ]
            .concat(),
            &outputs[..],
        ),
        ("restore", [&paths[..], &restoring].concat(), &outputs),
        ("save", [&paths[..], &saving].concat(), &[]),
    ] {
        let manifest = Manifest::of(action);
        let mut inputs = inputs;
        inputs.sort_unstable();
        inputs.dedup();
        assert_eq!(manifest.names("inputs"), inputs, "{action}");
        assert_eq!(manifest.names("outputs"), outputs, "{action}");
        let required = |name: &&str| {
            manifest.sections["inputs"][*name]
                .get("required")
                .map(String::as_str)
                == Some("true")
        };
        let required: Vec<_> = inputs.iter().filter(|name| required(name)).collect();
        assert_eq!(required, [&"key", &"path"], "{action}");
        manifest.script("main");
    }
}

/// A runner on a machine that has nothing of ours.
struct Elsewhere(TempDir);

impl Elsewhere {
    fn new() -> Self {
        let home = temp_dir();
        make_home(home.path());
        Self(home)
    }
}

impl Runner for Elsewhere {
    fn begin(&mut self) {}

    fn end(&mut self, _: i32) {}

    fn node(&self, env: &BTreeMap<String, String>, script: &Path) -> Outcome {
        on_this_machine(env, script)
    }

    fn sh(&self, _: &str) -> String {
        unreachable!("no job runs here")
    }

    fn home(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    fn volume(&self) -> PathBuf {
        self.home().join("none")
    }

    fn entries(&self) -> Vec<Vec<String>> {
        Vec::new()
    }
}

fn without() {
    let runner = Elsewhere::new();
    let step = uses("", "~/.npm", "a").with("restore-keys", "b");
    // No client; then one that nobody answers.
    for client in [false, true] {
        if client {
            let bin = runner.volume().join("bin");
            fs::create_dir_all(&bin).unwrap();
            symlink(PROGRAM, bin.join("lvm-cache-friend")).unwrap();
        }
        let main = step.run(&runner);
        main.has("", "");
        main.warns("no job volume");
        let post = step.post(&runner, &main, "success");
        assert_eq!((post.done.status, &*post.done.stdout), (0, ""));
        for action in ["restore", "save"] {
            let step = uses(action, "~/.npm", "a").run(&runner);
            step.warns("no job volume");
        }
        let misses = uses("", "~/.npm", "a").with("fail-on-cache-miss", "true");
        misses.run(&runner).failed("fail-on-cache-miss");
        assert!(!runner.home().join(".npm").exists());
    }
}

fn refused() {
    let runner = Elsewhere::new();
    let long = "k".repeat(513);
    for (path, key, words) in [
        ("a", long.as_str(), "more than 512 characters"),
        ("a", "one,two", "comma"),
        ("a", " ", "must be given"),
        ("\n \n", "k", "must be given"),
        ("# a\n#b", "k", "must be given"),
        ("**/node_modules", "k", "pattern"),
        ("a\n!a/b", "k", "pattern"),
    ] {
        uses("", path, key).run(&runner).failed(words);
        uses("restore", path, key).run(&runner).failed(words);
        uses("save", path, key).run(&runner).warns(words);
    }
    for (input, value, words) in [
        ("restore-keys", "k-\nx,y", "comma"),
        ("restore-keys", &"k\n".repeat(11), "at most 10"),
        ("save", "sometimes", "on-success"),
    ] {
        let step = uses("", "a", "k").with(input, value);
        let main = step.run(&runner);
        main.failed(words);
        step.post(&runner, &main, "success")
            .says("Nothing is saved");
    }
    // Whatever is in a key, it is no command to the runner.
    let main = uses("", "a", "k\n::notice::x\n##[group]y").run(&runner);
    main.has("", "");
    let commands = main
        .done
        .stdout
        .lines()
        .filter(|line| line.starts_with("::") || line.contains("##["));
    assert_eq!(commands.count(), 1, "{:?}", main.done);
    assert_eq!(
        main.output("cache-primary-key"),
        "k\n::notice::x\n##[group]y"
    );
}

fn keys() {
    let mut runner = Native::new();
    // The first is as long as a tag has room for, and the others are longer.
    let long = |end: &str| format!("{}{end}", "é".repeat(511));
    let keys = [
        "a b-1",
        "a-b-1",
        "a&b ü",
        "A-B-1",
        &"k".repeat(508),
        &long("x"),
        &long("y"),
    ];
    for key in keys {
        runner
            .job(&uses("", "dir", key), &format!("echo '{key}' > dir/key"))
            .has("", "");
    }
    for key in keys {
        let step = runner.job(
            &uses("restore", "dir", key),
            &format!("[ \"$(cat dir/key)\" = '{key}' ]"),
        );
        step.has("true", key);
    }
    // Beginnings are those of keys as they are written. A key is tried as a beginning itself, before the restore keys.
    for (key, restore_keys, matched) in [
        ("a", "", "a&b ü"),
        ("a b", "", "a b-1"),
        ("a-", "", "a-b-1"),
        ("a-b-2", "none\na-b", "a-b-1"),
        ("a-b-", "A", "a-b-1"),
        ("none", "a b\na-", "a b-1"),
        ("none", "a-\na b", "a-b-1"),
        ("none", "a&b", "a&b ü"),
        ("none", "kkk", keys[4]),
        // Neither the tag that tells path lists apart, nor what is before the key in its tag.
        ("none", "path\nkey\nk:", ""),
    ] {
        let step = uses("restore", "dir", key).with("restore-keys", restore_keys);
        let step = runner.job(&step, "");
        step.has(if matched.is_empty() { "" } else { "false" }, matched);
    }
    // Too long for a tag, only part of the key can be told.
    let step = runner.job(
        &uses("restore", "dir", "none").with("restore-keys", "éé"),
        "cat dir/key",
    );
    assert_eq!(step.output("cache-hit"), "false");
    assert!(
        step.output("cache-matched-key").starts_with("ééé"),
        "{:?}",
        step.outputs
    );
    // As many as there may be, and a daemon that takes fewer.
    let many = (0..9).map(|n| format!("none-{n}\n")).collect::<String>() + "a-";
    let step = uses("restore", "dir", "none").with("restore-keys", &many);
    runner.job(&step, "").has("false", "a-b-1");
    let daemon = runner.daemon.take().unwrap();
    daemon.kill();
    runner.site.configure("job.criteria = 10\n");
    runner.daemon = Some(runner.site.serve());
    runner.begin();
    let main = step.run(&runner);
    main.has("", "");
    main.warns("criteria");
    runner.end(0);
}

fn paths() {
    let mut runner = Native::new();
    let list =
        "# Of cargo\n~/.cargo/registry\n  ~/.cargo/git\n\n  #and more\nnode modules\n./target";
    let made = "for dir in ~/.cargo/registry ~/.cargo/git 'node modules' target; do echo \"$dir\" > \"$dir/name\"; done";
    runner.job(&uses("", list, "k"), made).has("", "");
    runner.begin();
    uses("restore", list, "k").run(&runner).has("true", "k");
    let names =
        runner.sh("cat ~/.cargo/registry/name ~/.cargo/git/name 'node modules/name' target/name");
    let ends = ["/.cargo/registry", "/.cargo/git", "node modules", "target"];
    assert!(
        names
            .lines()
            .zip(ends)
            .all(|(name, end)| name.ends_with(end)),
        "{names}"
    );
    assert_eq!(names.lines().count(), 4);
    // A comment makes no other list of it. Restored again in the same job, it is there already.
    let list = list.replace("# Of cargo", "#");
    let list = list.as_str();
    uses("restore", list, "k").run(&runner).has("true", "k");
    // Other paths are another cache, whatever the key.
    uses("restore", "~/.cargo/registry2", "k")
        .run(&runner)
        .has("", "");
    let absolute = runner.home().join("elsewhere");
    uses("restore", absolute.to_str().unwrap(), "k")
        .run(&runner)
        .has("", "");
    runner.sh("[ -d ~/elsewhere ] && [ -L ~/elsewhere ]");

    // What is in the way.
    runner.sh("echo > file");
    let main = uses("restore", "file", "k").run(&runner);
    main.has("", "");
    main.warns("file");
    runner.sh("[ -f file ]");
    runner.end(0);
    runner
        .job(&uses("", "full", "k"), "echo old > full/both")
        .has("", "");
    runner.begin();
    runner.sh("mkdir full; echo new > full/both; echo new > full/own");
    uses("restore", "full", "k").run(&runner).has("true", "k");
    assert_eq!(runner.sh("cat full/both full/own"), "old\nnew\n");
    runner.end(0);
}

fn saves() {
    let mut runner = Native::new();
    // Without a step that restored: what is there is moved in.
    runner.begin();
    uses("save", "out", "k")
        .run(&runner)
        .warns("does not exist");
    runner.sh("mkdir out; echo 1 > out/file");
    uses("save", "out", "k")
        .run(&runner)
        .says("saved with the key: k");
    assert_eq!(runner.sh("cat out/file"), "1\n");
    runner.end(0);
    assert_eq!(runner.entries().len(), 1);

    // What is there already is neither an error nor saved again, and leaves what the job has as it is.
    runner.begin();
    runner.sh("mkdir out; echo 2 > out/file");
    uses("save", "out", "k")
        .run(&runner)
        .says("is there already");
    runner.sh("[ ! -L out ]; rm -r out");
    uses("restore", "out", "k").run(&runner).has("true", "k");
    assert_eq!(runner.sh("cat out/file; echo 3 > out/file"), "1\n");
    uses("save", "out", "k")
        .run(&runner)
        .says("is there already");
    uses("save", "out", "k3")
        .run(&runner)
        .says("saved with the key: k3");
    // A job that makes the directory anew has what is mounted no more.
    runner.sh("rm out; mkdir out; echo 4 > out/file");
    uses("save", "out", "k4")
        .run(&runner)
        .warns("does not lead to");
    runner.end(0);
    assert_eq!(runner.entries().len(), 2);
    runner.begin();
    uses("restore", "out", "k3").run(&runner).has("true", "k3");
    assert_eq!(runner.sh("cat out/file"), "3\n");
    runner.end(0);

    // A main step that looked only, and found nothing: its post step saves as the step of its own does.
    runner.begin();
    let looks = uses("", "out", "k5").with("lookup-only", "true");
    let main = looks.run(&runner);
    main.has("", "");
    runner.sh("mkdir out; echo 5 > out/file");
    looks
        .post(&runner, &main, "success")
        .says("saved with the key: k5");
    runner.end(0);
    assert_eq!(runner.entries().len(), 3);

    // A main step that could not make its link: the post step tries all the same.
    let step = uses("", "out", "k6");
    for mended in [false, true] {
        runner.begin();
        let out = runner.home().join("work/out");
        symlink("elsewhere", &out).unwrap();
        let main = step.run(&runner);
        main.has("", "");
        main.warns("out");
        if mended {
            fs::remove_file(&out).unwrap();
            fs::create_dir(&out).unwrap();
        }
        let post = step.post(&runner, &main, "success");
        if mended {
            post.says("saved with the key: k6");
        } else {
            post.warns("Cache not saved");
        }
        runner.end(0);
        assert_eq!(runner.entries().len(), 3 + usize::from(mended));
    }
}

/// Each value of `save`, after jobs that went well or not, with a cache of the key that is there or not.
fn when() {
    let mut runner = Native::new();
    for (save, always, [new, again, new_failed, again_failed]) in [
        ("", "", [true, false, false, false]),
        ("", "true", [true, false, true, false]),
        ("if-missing", "", [true, false, false, false]),
        ("on-success", "", [true, true, false, false]),
        ("on-success", "true", [true, true, true, true]),
        ("always", "", [true, true, true, true]),
        ("never", "", [false; 4]),
        ("never", "true", [false; 4]),
    ] {
        for (there, status, saved) in [
            (false, "success", new),
            (true, "success", again),
            (false, "failure", new_failed),
            (true, "failure", again_failed),
        ] {
            let what = format!("save: {save:?}, save-always: {always:?}, there: {there}, {status}");
            let key = what.replace(',', "");
            if there {
                runner.job(&uses("", "dir", &key), "echo old > dir/file");
            }
            let before = runner.entries().len();
            runner.begin();
            let mut step = uses("", "dir", &key).with("save-always", always);
            if !save.is_empty() {
                step = step.with("save", save);
            }
            let main = step.run(&runner);
            main.has(
                if there { "true" } else { "" },
                if there { &key } else { "" },
            );
            runner.sh("echo new > dir/file");
            let post = step.post(&runner, &main, status);
            assert_eq!(post.done.status, 0, "{what}: {:?}", post.done);
            runner.end(0);
            assert_eq!(
                runner.entries().len() - before,
                usize::from(saved),
                "{what}: {:?}",
                post.done
            );
            let look = uses("restore", "dir", &key);
            let told = if saved { "new" } else { "old" };
            if there || saved {
                runner
                    .job(&look, &format!("[ $(cat dir/file) = {told} ]"))
                    .has("true", &key);
            }
        }
    }
}

/// As README has it: a job that saves where there is nothing, and jobs that only read.
fn seeds() {
    let mut runner = Native::new();
    let seed = |key| uses("", "dir", key).with("save", "if-missing");
    let read = |key| {
        uses("", "dir", key)
            .with("restore-keys", "linux-")
            .with("save", "never")
    };
    let mut jobs = |step: &Uses<'_>, script: &str| {
        let step = runner.job(step, script);
        (step, runner.entries().len())
    };
    let (step, entries) = jobs(&read("linux-1"), "echo grown > dir/file");
    step.has("", "");
    assert_eq!(entries, 0);
    assert_eq!(jobs(&seed("linux-1"), "echo 1 > dir/file").1, 1);
    for _ in 0..2 {
        let (step, entries) = jobs(
            &read("linux-1"),
            "[ $(cat dir/file) = 1 ]; echo grown > dir/file",
        );
        step.has("true", "linux-1");
        assert_eq!(entries, 1);
        let (step, entries) = jobs(
            &seed("linux-1"),
            "[ $(cat dir/file) = 1 ]; echo grown > dir/file",
        );
        step.has("true", "linux-1");
        assert_eq!(entries, 1);
    }
    let (step, entries) = jobs(
        &read("linux-2"),
        "[ $(cat dir/file) = 1 ]; echo grown > dir/file",
    );
    step.has("false", "linux-1");
    assert_eq!(entries, 1);
    assert_eq!(jobs(&seed("linux-2"), "echo 2 > dir/file").1, 2);
}

/// A daemon that is killed and started again in a job, or is away, fails no step.
fn restarted() {
    let mut runner = Native::new();
    let kill = |runner: &mut Native| runner.daemon.take().unwrap().kill();
    let step = uses("", "dir", "k").with("restore-keys", "k");
    // Away when it is to restore; back when it is to save.
    runner.begin();
    kill(&mut runner);
    let main = step.run(&runner);
    main.has("", "");
    main.warns("nobody answers");
    runner.sh("mkdir dir; echo 1 > dir/file");
    runner.daemon = Some(runner.site.serve());
    step.post(&runner, &main, "success")
        .says("saved with the key: k");
    runner.end(0);
    assert_eq!(runner.entries().len(), 1);

    // Saved anew is what the job has, and nothing of what it could not restore.
    let anew = uses("", "dir", "k").with("save", "on-success");
    runner.begin();
    kill(&mut runner);
    let main = anew.run(&runner);
    main.has("", "");
    runner.sh("mkdir dir; echo anew > dir/file");
    runner.daemon = Some(runner.site.serve());
    anew.post(&runner, &main, "success")
        .says("saved with the key: k");
    runner.end(0);
    assert_eq!(runner.entries().len(), 2);

    // Restarted between the steps: what is mounted stays.
    let next = uses("", "dir", "k2").with("restore-keys", "k");
    runner.begin();
    let main = next.run(&runner);
    main.has("false", "k");
    runner.sh("[ $(cat dir/file) = anew ]; echo 2 > dir/file");
    kill(&mut runner);
    runner.daemon = Some(runner.site.serve());
    next.post(&runner, &main, "success")
        .says("saved with the key: k2");
    runner.end(0);
    assert_eq!(runner.entries().len(), 3);

    // Away from then on.
    runner.begin();
    let main = uses("", "dir", "k3").run(&runner);
    runner.sh("echo 3 > dir/file");
    kill(&mut runner);
    let post = uses("", "dir", "k3").post(&runner, &main, "success");
    post.warns("nothing is saved");
    for action in ["restore", "save"] {
        uses(action, "dir", "k4")
            .run(&runner)
            .warns("nobody answers");
    }
    let misses = uses("", "dir", "k4").with("fail-on-cache-miss", "true");
    misses.run(&runner).failed("fail-on-cache-miss");
    runner.daemon = Some(runner.site.serve());
    runner.end(0);
    assert_eq!(runner.entries().len(), 3);
}

/// Whatever is wrong with the client, or with its answers, is a miss.
fn broken() {
    let runner = Elsewhere::new();
    let bin = runner.volume().join("bin");
    fs::create_dir_all(&bin).unwrap();
    let client = bin.join("lvm-cache-friend");
    for script in [
        "exit 7",
        "echo no JSON",
        "echo '{\"ok\":false,\"error\":\"the store is full\"}'; exit 1",
        "kill -9 $$",
        "exec /nowhere",
    ] {
        fs::write(&client, format!("#!/bin/sh\n{script}\n")).unwrap();
        crate::support::command::run("chmod", ["+x".as_ref(), client.as_os_str()]);
        let step = uses("", "dir", "k");
        let main = step.run(&runner);
        main.has("", "");
        main.warns("Nothing is restored");
        step.post(&runner, &main, "success")
            .warns("Cache not saved");
        uses("save", "dir", "k")
            .run(&runner)
            .warns("Cache not saved");
        let misses = uses("restore", "dir", "k").with("fail-on-cache-miss", "true");
        misses.run(&runner).failed("fail-on-cache-miss");
    }
}

/// Each line of README's table names the test that shows it.
fn compared() {
    let text = fs::read_to_string(Path::new(ACTION).join("README.md")).unwrap();
    let table = text
        .split("| | actions/cache | here | test |\n")
        .nth(1)
        .unwrap();
    let rows: Vec<_> = table
        .lines()
        .skip(1)
        .take_while(|line| !line.is_empty())
        .collect();
    assert!(rows.len() > 10);
    let tests: Vec<_> = tests().iter().map(|test| test.name.clone()).collect();
    for row in rows {
        let named = row.trim_end_matches('|').rsplit('|').next().unwrap();
        for name in named.split(',') {
            let name = name.trim().trim_matches('`');
            assert!(
                tests
                    .iter()
                    .any(|test| test.ends_with(&format!("action::{name}"))),
                "{name}: {row}"
            );
        }
    }
}

fn save_always() {
    let mut runner = Native::new();
    runner.begin();
    let [always, not] = ["always", "not"].map(|name| {
        uses("", name, "k").with(
            "save-always",
            if name == "always" { "true" } else { "false" },
        )
    });
    let mains = [&always, &not].map(|step| step.run(&runner));
    runner.sh("echo 1 > always/file; echo 1 > not/file");
    not.post(&runner, &mains[1], "failure")
        .says("did not succeed");
    always
        .post(&runner, &mains[0], "failure")
        .says("saved with the key: k");
    runner.end(1);
    assert_eq!(runner.entries().len(), 1);
    runner.begin();
    uses("restore", "always", "k").run(&runner).has("true", "k");
    uses("restore", "not", "k").run(&runner).has("", "");
    runner.end(0);
}
