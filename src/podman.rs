//! Podman's record of how a container ended.
//!
//! A poststop hook is not told the exit code, the file that conmon wrote it to is
//! gone by then, and `podman inspect` waits for the lock that the hook's caller
//! holds. But the `died` event with the code has been written before Podman 4.3 and
//! later run the hook (libpod/container_internal.go), so it is read where Podman's
//! event logger keeps it: a file, or the journal. With `events_logger = "none"`
//! nobody knows.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

/// Where Podman keeps its files if nobody says otherwise, as root.
const TMP_DIR: &str = "/run/libpod";

/// How much of the events file's end is read, in bytes. Some hundred events: what
/// other containers can add between an end and its hook.
const TAIL: u64 = 256 << 10;

/// The journal takes what it is sent a moment later.
const JOURNAL_WAIT: Duration = Duration::from_millis(600);

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
}

impl Events {
    /// As the Podman that called this program has it: its own options where it is the
    /// clean-up that conmon started, which has them all, else `containers.conf`.
    #[must_use]
    pub fn of_caller() -> Self {
        let parent = std::os::unix::process::parent_id();
        let words = fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words);
        let words: Vec<String> = words.split('\0').map(str::to_owned).collect();
        Self::find(&words, &configuration())
    }

    fn find(words: &[String], files: &[String]) -> Self {
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
        let tmp_dir = tmp_dir.unwrap_or_else(|| TMP_DIR.into());
        Self {
            logger: logger.as_deref().and_then(Logger::named),
            file: file.unwrap_or_else(|| tmp_dir.join("events/events.log")),
        }
    }

    /// The exit code of a container's last run, 128 and the signal's number where one
    /// ended it; `None` where nobody says.
    #[must_use]
    pub fn exit_code(&self, container: &str) -> Option<i32> {
        let in_file = || in_file(&tail(&self.file).ok()?, container);
        match self.logger {
            Some(Logger::File) => in_file(),
            Some(Logger::Journal) => in_journal(container),
            Some(Logger::None) => None,
            None => in_file().or_else(|| in_journal(container)),
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
    merged(&configuration())
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

/// The texts of all configuration files that root's Podman reads, in its order
/// (containers.conf(5)).
fn configuration() -> Vec<String> {
    let mut files = Vec::new();
    if let Some(only) = std::env::var_os("CONTAINERS_CONF") {
        files.push(PathBuf::from(only));
    } else {
        for conf in [
            "/usr/share/containers/containers.conf",
            "/etc/containers/containers.conf",
        ] {
            files.push(conf.into());
            let drop_ins = fs::read_dir(format!("{conf}.d")).into_iter().flatten();
            let mut drop_ins: Vec<_> = drop_ins
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|e| e == "conf"))
                .collect();
            drop_ins.sort();
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
        .find(|event| event.id == container && event.status == "died")
        .map(|event| event.code.unwrap_or(0))
}

fn in_journal(container: &str) -> Option<i32> {
    let deadline = Instant::now() + JOURNAL_WAIT;
    loop {
        let output = Command::new("journalctl")
            .args(["--quiet", "--output=json", "--lines=1", "PODMAN_EVENT=died"])
            .arg(format!("PODMAN_ID={container}"))
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let code = in_journal_entry(&text);
        if code.is_some() || Instant::now() >= deadline {
            return code;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn in_journal_entry(text: &str) -> Option<i32> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "PODMAN_EXIT_CODE", default)]
        code: Option<String>,
    }
    let entry: Entry = serde_json::from_str(text.lines().next()?).ok()?;
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
        for (words, files, logger, file) in [
            ("", vec![], None, "/run/libpod/events/events.log"),
            (
                of_cleanup,
                vec![],
                Some(Logger::File),
                "/run/own/events/events.log",
            ),
            (
                of_cleanup,
                vec![none],
                Some(Logger::File),
                "/run/own/events/events.log",
            ),
            (
                "podman\0run\0x",
                vec![conf],
                Some(Logger::File),
                "/run/conf/events/events.log",
            ),
            (
                "podman\0run\0x",
                vec![conf, none],
                Some(Logger::None),
                "/run/conf/events/events.log",
            ),
            (
                "podman\0--tmpdir",
                vec![path, "no toml ="],
                None,
                "/var/log/events",
            ),
        ] {
            let words: Vec<String> = words.split('\0').map(str::to_owned).collect();
            let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
            let found = Events::find(&words, &files);
            let want = Events {
                logger,
                file: file.into(),
            };
            assert_eq!(found, want, "{words:?} {files:?}");
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
    fn ends_in_the_events_file() {
        let text = r#"{"ID":"abc","Status":"died","ContainerExitCode":3,"Name":"one","Type":"container"}
{"ID":"abc","Status":"start","Name":"one","Type":"container"}
{"ID":"abc","Status":"died","Name":"one","Type":"container"}
{"ID":"abd","Status":"died","ContainerExitCode":137,"Name":"abc","Type":"container"}
{"ID":"abe","Status":"start","Type":"container"}
{"ID":"abe","Status":"di"#;
        for (container, code) in [
            ("abc", Some(0)),
            ("abd", Some(137)),
            ("abe", None),
            ("a", None),
        ] {
            assert_eq!(in_file(text, container), code, "{container}");
        }
    }

    #[test]
    fn ends_in_the_journal() {
        for (text, code) in [
            (r#"{"PODMAN_EXIT_CODE":"3","MESSAGE":"x"}"#, Some(3)),
            (r#"{"MESSAGE":"x"}"#, Some(0)),
            ("", None),
            ("nonsense", None),
            (r#"{"PODMAN_EXIT_CODE":"much"}"#, None),
        ] {
            assert_eq!(in_journal_entry(text), code, "{text}");
        }
    }
}
