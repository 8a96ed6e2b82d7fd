// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Podman's record of how a container ended, and what its configuration files say of plugins and hooks. Its API is used by the
//! supervisor alone (`supervisor::podman`).
//!
//! A poststop hook is not told the exit code, the file that conmon wrote it to is
//! gone by then, and `podman inspect` waits for the lock that the hook's caller
//! holds. But the `died` event with the code has been written before Podman 4.3 and
//! later run the hook (libpod/container_internal.go), so it is read where Podman's
//! event logger keeps it: a file, or the journal. With `events_logger = "none"`
//! nobody knows. `start` is written before the `died` of the same run, both under the
//! container's lock: a `died` that a `start` follows is of an earlier run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::exec;

/// Where root's Podman keeps its files if nobody says otherwise.
const TMP_DIR: &str = "/run/libpod";

/// How much of the events file's end is read, in bytes. Some hundred events: what
/// other containers can add between an end and its hook.
const TAIL: u64 = 256 << 10;

/// Events that begin a run of a container, or end it.
const RUNS: [&str; 3] = ["start", "restore", "died"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Logger {
    File,
    Journal,
    None,
}

impl Logger {
    fn named(name: &str) -> Option<Self> {
        match name {
            "file" => Some(Self::File),
            "journald" => Some(Self::Journal),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

/// Where Podman writes its events.
#[derive(Debug, PartialEq, Eq)]
pub struct Events {
    /// Unknown: the file is tried, then the journal.
    logger: Option<Logger>,
    file: PathBuf,
    /// Whose Podman it is, as the journal has it; `None`: not known, so nothing in the journal is believed.
    user: Option<u32>,
}

impl Events {
    /// As the Podman that called this program has it: its own options where it is the
    /// clean-up that conmon started, which has them all, else `containers.conf`.
    #[must_use]
    pub fn of_caller() -> Self {
        let parent = std::os::unix::process::parent_id();
        let strings = |file: &str| -> Vec<String> {
            let bytes = fs::read(format!("/proc/{parent}/{file}")).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            text.split('\0').map(str::to_owned).collect()
        };
        // Podman gives a hook none of its environment.
        let environment = strings("environ");
        let variable = |name: &str| variable(&environment, name);
        let ids = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let rootless = Rootless::find(&ids, variable);
        let files = configuration(variable("CONTAINERS_CONF"), rootless.as_ref());
        Self::find(
            &strings("cmdline"),
            &files,
            rootless.as_ref(),
            root_outside(&ids),
        )
    }

    fn find(
        words: &[String],
        files: &[String],
        rootless: Option<&Rootless>,
        user: Option<u32>,
    ) -> Self {
        let option = |name: &str| {
            let at = words.iter().position(|word| word == name)?;
            words.get(at + 1).filter(|word| !word.is_empty())
        };
        let mut logger = None;
        let mut tmp_dir = None;
        let mut file = None;
        for text in files {
            let Ok(conf) = toml::from_str::<Conf>(text) else {
                continue;
            };
            logger = conf.engine.events_logger.or(logger);
            tmp_dir = conf.engine.tmp_dir.or(tmp_dir);
            file = conf.engine.events_logfile_path.or(file);
        }
        let logger = option("--events-backend").cloned().or(logger);
        let tmp_dir = option("--tmpdir").map(PathBuf::from).or(tmp_dir);
        let tmp_dir = tmp_dir.unwrap_or_else(|| match rootless {
            Some(user) => user.runtime_dir.join("libpod/tmp"),
            None => TMP_DIR.into(),
        });
        Self {
            logger: logger.as_deref().and_then(Logger::named),
            file: file.unwrap_or_else(|| tmp_dir.join("events/events.log")),
            user,
        }
    }

    /// The exit code of a container's last run, 128 and the signal's number where one
    /// ended it; `None` where nobody says. The journal takes what it is sent a moment
    /// later, so it is asked again until `deadline`.
    #[must_use]
    pub fn exit_code(&self, container: &str, deadline: Instant) -> Option<i32> {
        let in_file = || in_file(&tail(&self.file).ok()?, container);
        let in_journal = || in_journal(container, self.user?, deadline);
        match self.logger {
            Some(Logger::File) => in_file(),
            Some(Logger::Journal) => in_journal(),
            Some(Logger::None) => None,
            None => in_file().or_else(in_journal),
        }
    }
}

/// What root's Podman is told about plugins and hooks by the files that it reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// Where hooks are looked for, those that come later before those that come first.
    pub hooks_dir: Vec<PathBuf>,
    /// The sockets of volume plugins, by name.
    pub volume_plugins: BTreeMap<String, PathBuf>,
    /// How long an answer of one may take, in seconds; `None`: as Podman has it.
    pub volume_plugin_timeout: Option<u64>,
}

/// Reads `containers.conf` and its drop-ins. A file that does not parse is passed over: Podman
/// says that itself.
#[must_use]
pub fn engine() -> Engine {
    let only = std::env::var("CONTAINERS_CONF").ok();
    merged(&configuration(only.as_deref(), None))
}

/// A list replaces that of a file before, a table is joined with it (containers.conf(5)).
fn merged(files: &[String]) -> Engine {
    let mut engine = Engine {
        // Its default, on each system that was looked at (containers/common, pkg/config/default.go).
        hooks_dir: vec!["/usr/share/containers/oci/hooks.d".into()],
        volume_plugins: BTreeMap::new(),
        volume_plugin_timeout: None,
    };
    for conf in files
        .iter()
        .filter_map(|text| toml::from_str::<Conf>(text).ok())
    {
        let EngineConf {
            hooks_dir,
            volume_plugins,
            volume_plugin_timeout,
            ..
        } = conf.engine;
        engine.hooks_dir = hooks_dir.unwrap_or(engine.hooks_dir);
        engine.volume_plugins.extend(volume_plugins);
        engine.volume_plugin_timeout = volume_plugin_timeout.or(engine.volume_plugin_timeout);
    }
    engine
}

/// What a variable is set to, in an environment as /proc/PID/environ has it.
fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    let mut values = environment
        .iter()
        .filter_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    values.next().filter(|value| !value.is_empty())
}

/// The user whose Podman it is, where that is not root's.
#[derive(Debug, PartialEq, Eq)]
struct Rootless {
    config_dir: Option<PathBuf>,
    runtime_dir: PathBuf,
}

impl Rootless {
    /// `ids` is our own /proc/PID/uid_map: rootless Podman, and its hooks with it, is root of a user
    /// namespace, and that root is the user outside. Its environment does not tell: what it sets there
    /// as it joins the namespace is not what /proc shows.
    fn find<'a>(ids: &str, variable: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let first: Vec<_> = ids.lines().next()?.split_whitespace().collect();
        let &["0", uid, "1"] = first.as_slice() else {
            return None;
        };
        let home = || Some(Path::new(variable("HOME")?).join(".config"));
        Some(Self {
            config_dir: variable("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home),
            runtime_dir: variable("XDG_RUNTIME_DIR")
                .map_or_else(|| Path::new("/run/user").join(uid), PathBuf::from),
        })
    }
}

/// What we need of `containers.conf`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Conf {
    engine: EngineConf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EngineConf {
    events_logger: Option<String>,
    events_logfile_path: Option<PathBuf>,
    tmp_dir: Option<PathBuf>,
    hooks_dir: Option<Vec<PathBuf>>,
    volume_plugins: BTreeMap<String, PathBuf>,
    volume_plugin_timeout: Option<u64>,
}

/// The texts of all configuration files that Podman reads, in its order
/// (containers.conf(5)).
fn configuration(only: Option<&str>, rootless: Option<&Rootless>) -> Vec<String> {
    let mut files = Vec::new();
    if let Some(only) = only {
        files.push(PathBuf::from(only));
    } else {
        let user = rootless.and_then(|user| user.config_dir.as_deref());
        for dir in [Path::new("/usr/share"), Path::new("/etc")]
            .into_iter()
            .chain(user)
        {
            let conf = dir.join("containers/containers.conf");
            let drop_ins = fs::read_dir(conf.with_extension("conf.d"))
                .into_iter()
                .flatten();
            let mut drop_ins: Vec<_> = drop_ins
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|e| e == "conf"))
                .collect();
            drop_ins.sort();
            files.push(conf);
            files.extend(drop_ins);
        }
    }
    let read = |file| fs::read_to_string(file).ok();
    files.into_iter().filter_map(read).collect()
}

fn tail(file: &Path) -> io::Result<String> {
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Podman's events file has a JSON object a line. A code of 0 is left out there.
fn in_file(text: &str, container: &str) -> Option<i32> {
    #[derive(Deserialize)]
    struct Event {
        #[serde(rename = "ID")]
        id: String,
        #[serde(rename = "Status")]
        status: String,
        #[serde(rename = "ContainerExitCode", default)]
        code: Option<i32>,
    }
    text.lines()
        .rev()
        .filter(|line| line.contains(container))
        .filter_map(|line| serde_json::from_str::<Event>(line).ok())
        .find(|event| event.id == container && RUNS.contains(&event.status.as_str()))
        .filter(|event| event.status == "died")
        .map(|event| event.code.unwrap_or(0))
}

/// What this namespace's root is outside of it, by the table of its users: the user that rootless Podman is run by, and root itself
/// for root's. It is that one's processes that write Podman's events.
fn root_outside(ids: &str) -> Option<u32> {
    ids.lines().find_map(|line| {
        let mut numbers = line.split_whitespace();
        let root = numbers.next() == Some("0");
        numbers.next().filter(|_| root)?.parse().ok()
    })
}

/// Any user can send the journal entries with all of an event's fields. But it takes down whose process sent one as the
/// kernel tells (`_UID`, systemd.journal-fields(7), "Trusted Journal Fields"): only the entries of the very `user` count.
/// The program's name and path (`_COMM`, `_EXE`) would add nothing, as a user can run any under its own; and the journal
/// lacks them where a process has ended before they were looked at.
fn in_journal(container: &str, user: u32, deadline: Instant) -> Option<i32> {
    let mut query = vec![
        "--quiet".to_owned(),
        "--output=json".to_owned(),
        "--output-fields=PODMAN_EVENT,PODMAN_EXIT_CODE".to_owned(),
        "--lines=1".to_owned(),
        format!("_UID={user}"),
        format!("PODMAN_ID={container}"),
    ];
    query.extend(RUNS.map(|event| format!("PODMAN_EVENT={event}")));
    loop {
        let last = exec::run("journalctl", &query).ok()?;
        let code = in_journal_entry(&String::from_utf8_lossy(&last));
        if code.is_some() || Instant::now() >= deadline {
            return code;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The exit code in the last of a container's entries; `None` where that says no end.
fn in_journal_entry(text: &str) -> Option<i32> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "PODMAN_EVENT")]
        event: String,
        #[serde(rename = "PODMAN_EXIT_CODE", default)]
        code: Option<String>,
    }
    let entry: Entry = serde_json::from_str(text.lines().next()?).ok()?;
    if entry.event != "died" {
        return None;
    }
    entry.code.map_or(Ok(0), |code| code.parse()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found() {
        let of_cleanup = "/usr/bin/podman\0--root\0/var/lib/containers/storage\0--tmpdir\0/run/own\0--events-backend\0file\0container\0cleanup\0abc";
        let conf = "[engine]\nevents_logger = \"file\"\ntmp_dir = \"/run/conf\"\n";
        let none = "[engine]\nevents_logger = \"none\"\n[containers]\nnetns = \"none\"\n";
        let path = "[engine]\nevents_logfile_path = \"/var/log/events\"\n";
        let user = || {
            Some(Rootless {
                config_dir: None,
                runtime_dir: "/run/user/7".into(),
            })
        };
        for (words, files, rootless, logger, file) in [
            ("", vec![], None, None, "/run/libpod/events/events.log"),
            (
                "",
                vec![],
                user(),
                None,
                "/run/user/7/libpod/tmp/events/events.log",
            ),
            (
                of_cleanup,
                vec![],
                user(),
                Some(Logger::File),
                "/run/own/events/events.log",
            ),
            (
                of_cleanup,
                vec![],
                None,
                Some(Logger::File),
                "/run/own/events/events.log",
            ),
            (
                of_cleanup,
                vec![none],
                None,
                Some(Logger::File),
                "/run/own/events/events.log",
            ),
            (
                "podman\0run\0x",
                vec![conf],
                None,
                Some(Logger::File),
                "/run/conf/events/events.log",
            ),
            (
                "podman\0run\0x",
                vec![conf, none],
                None,
                Some(Logger::None),
                "/run/conf/events/events.log",
            ),
            (
                "podman\0--tmpdir",
                vec![path, "no toml ="],
                None,
                None,
                "/var/log/events",
            ),
        ] {
            let words: Vec<String> = words.split('\0').map(str::to_owned).collect();
            let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
            let found = Events::find(&words, &files, rootless.as_ref(), Some(7));
            let want = Events {
                logger,
                file: file.into(),
                user: Some(7),
            };
            assert_eq!(found, want, "{words:?} {files:?}");
        }
    }

    #[test]
    fn whose_entries_count() {
        for (ids, user) in [
            ("         0          0 4294967295\n", Some(0)),
            ("0 1000 1\n1 100000 65536\n", Some(1000)),
            ("1 100000 65536\n0 1000 1\n", Some(1000)),
            ("1 100000 65536\n", None),
            ("", None),
        ] {
            assert_eq!(root_outside(ids), user, "{ids:?}");
        }
    }

    #[test]
    fn plugins_and_hooks() {
        let files = [
            "[engine]\nhooks_dir = [\"/a\", \"/b\"]\nvolume_plugin_timeout = 60\n",
            "no toml =",
            "[engine.volume_plugins]\none = \"/run/one.sock\"\n",
            "[engine]\nhooks_dir = [\"/c\"]\n[engine.volume_plugins]\ntwo = \"/run/two.sock\"\n",
        ]
        .map(str::to_owned);
        let engine = merged(&files);
        assert_eq!(engine.hooks_dir, [PathBuf::from("/c")]);
        assert_eq!(engine.volume_plugin_timeout, Some(60));
        let names: Vec<_> = engine.volume_plugins.keys().map(String::as_str).collect();
        assert_eq!(names, ["one", "two"]);
        let default = merged(&[]);
        assert_eq!(
            default.hooks_dir,
            [PathBuf::from("/usr/share/containers/oci/hooks.d")]
        );
    }

    #[test]
    fn whose_podman_it_is() {
        let user = |config_dir: &str, runtime_dir: &str| {
            Some(Rootless {
                config_dir: (!config_dir.is_empty()).then(|| config_dir.into()),
                runtime_dir: runtime_dir.into(),
            })
        };
        let all = "HOME=/h XDG_CONFIG_HOME=/c XDG_RUNTIME_DIR=/r";
        for (ids, variables, want) in [
            ("         0          0 4294967295\n", all, None),
            // Root's in a container.
            ("0 100000 65536\n", all, None),
            ("0 1 1000\n1000 0 1\n", all, None),
            ("", all, None),
            (
                "         0       1000          1\n         1     200000      65536\n",
                all,
                user("/c", "/r"),
            ),
            (
                "0 1000 1\n",
                "HOME=/h XDG_CONFIG_HOME=",
                user("/h/.config", "/run/user/1000"),
            ),
            ("0 1000 1\n", "HOMES=/x XDG", user("", "/run/user/1000")),
        ] {
            let environment: Vec<_> = variables.split(' ').map(str::to_owned).collect();
            let found = Rootless::find(ids, |name| variable(&environment, name));
            assert_eq!(found, want, "{ids} {variables}");
        }
    }

    #[test]
    fn ends_in_the_events_file() {
        let text = r#"{"ID":"abc","Status":"died","ContainerExitCode":3,"Name":"one","Type":"container"}
{"ID":"abc","Status":"start","Name":"one","Type":"container"}
{"ID":"abc","Status":"died","Name":"one","Type":"container"}
{"ID":"abd","Status":"died","ContainerExitCode":137,"Name":"abc","Type":"container"}
{"ID":"abf","Status":"died","ContainerExitCode":1,"Type":"container"}
{"ID":"abf","Status":"restart","Type":"container"}
{"ID":"abe","Status":"died","ContainerExitCode":1,"Type":"container"}
{"ID":"abe","Status":"start","Type":"container"}
{"ID":"abe","Status":"di"#;
        for (container, code) in [
            ("abc", Some(0)),
            ("abd", Some(137)),
            ("abe", None),
            ("abf", Some(1)),
            ("a", None),
        ] {
            assert_eq!(in_file(text, container), code, "{container}");
        }
    }

    #[test]
    fn ends_in_the_journal() {
        for (text, code) in [
            (r#"{"PODMAN_EVENT":"died","PODMAN_EXIT_CODE":"3"}"#, Some(3)),
            (r#"{"PODMAN_EVENT":"died","MESSAGE":"x"}"#, Some(0)),
            (r#"{"PODMAN_EVENT":"start"}"#, None),
            ("", None),
            ("nonsense", None),
            (r#"{"MESSAGE":"x"}"#, None),
            (r#"{"PODMAN_EVENT":"died","PODMAN_EXIT_CODE":"much"}"#, None),
        ] {
            assert_eq!(in_journal_entry(text), code, "{text}");
        }
    }
}
