// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `hook STAGE`: what the hooks in hooks.d/ run. They tell the daemon which
//! container uses which volume and how it ended, and keep containers from starting
//! with a silent local volume in place of one of ours.
//!
//! A hook never makes a container fail, but for that last one's refusal: whatever
//! else goes wrong is logged, and the exit code is 0.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use oci_spec::runtime::{Spec, State};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getppid, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};
use tracing::warn;

use super::{Failure, failed, print};
use crate::cache::names::VolumeName;
use crate::cli::{self, Stage};
use crate::config::{ConfigError, Settings};
use crate::http::client;
use crate::logging::{self, LogLevel};
use crate::mount;
use crate::podman::Events;
use crate::text::printable;

/// How long a hook may take where the daemon does not answer. Podman waits for it.
const BOUND: Duration = Duration::from_millis(800);

/// How long the end of a container may take to be told, where it does: how that ended is looked for in a
/// journal that can be large, and a failure is committed to the store, on a host that can be busy.
const RECORD: Duration = Duration::from_secs(10);

/// How much of that the journal may take to have an entry that Podman has sent it.
const JOURNAL: Duration = Duration::from_secs(2);

/// Longest input that is read, in bytes. Podman's configurations have some 20 KiB.
const MAX_INPUT: u64 = 16 << 20;

/// The annotation that names volumes which must be ours: `NAME:TARGET`, several
/// separated by spaces.
const GUARD: &str = "lvm-cache-friend.volume";

/// Runs a stage's hook.
///
/// # Errors
/// In precreate only: when a volume that the container is annotated with is not ours.
pub fn run(config: &Path, args: &cli::Hook) -> Result<(), Failure> {
    // A RUST_LOG that does not parse is no reason for a container to fail.
    let _ = logging::start_in_hook(LogLevel::Warn);
    let stage = args.stage;
    let of = config.to_owned();
    if stage == Stage::Precreate {
        let input = input().map_err(failed("standard input"))?;
        // What comes out is what the container gets: nothing is changed.
        let spec: Result<Spec, _> = serde_json::from_str(&input);
        guard(config, &spec, &input).inspect_err(tell_caller)?;
        let told = spec
            .map_err(|e| format!("the container's configuration: {e}"))
            .and_then(|spec| bounded(BOUND, move || tell_of_start(&of, &spec)));
        if let Err(missed) = told {
            warn!(
                missed,
                "in a user namespace, the container's volumes have their owners on the host"
            );
        }
        return print(&input);
    }
    let told = bounded(BOUND, move || {
        let input = input().map_err(|error| error.to_string())?;
        tell(&of, stage, &input)
    });
    let told = told.and_then(|ended| match ended {
        Some(ended) => bounded(RECORD, move || ended.tell()),
        None => Ok(()),
    });
    if let Err(missed) = told {
        warn!(?stage, missed, "could not report a container to the daemon");
    }
    Ok(())
}

/// Does something within `bound`. Whatever it still waits for then ends with this process.
fn bounded<T: Send + 'static>(
    bound: Duration,
    act: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (done, answer) = mpsc::channel();
    thread::spawn(move || done.send(act()));
    answer
        .recv_timeout(bound)
        .unwrap_or_else(|_| Err(format!("not done within {} ms", bound.as_millis())))
}

fn input() -> io::Result<String> {
    let mut input = String::new();
    io::stdin().take(MAX_INPUT).read_to_string(&mut input)?;
    Ok(input)
}

/// Writes why a container is refused to the standard error of the Podman that runs the
/// hook: it throws away what the hook says on its own, and tells its user the exit
/// status alone (containers/common, pkg/hooks/exec/runtimeconfigfilter.go).
fn tell_caller(why: &Failure) {
    if let Some(mut stderr) = callers_stderr() {
        let why = printable(&why.to_string());
        let _ = writeln!(stderr, "lvm-cache-friend: {why}");
    }
}

/// The standard error of the process that runs this one.
///
/// The caller's own descriptor where that can be had: a file that is opened once more has a position of its own, so
/// what the caller writes next would be written over this; and the journal's socket cannot be opened at all.
fn callers_stderr() -> Option<File> {
    let parent = getppid()?;
    let shared = pidfd_open(parent, PidfdFlags::empty())
        .and_then(|caller| pidfd_getfd(caller, 2, PidfdGetfdFlags::empty()));
    match shared {
        Ok(stderr) => Some(stderr.into()),
        // Where the caller may not be traced, as with Yama (ptrace(2), "Ptrace access mode checking").
        Err(_) => {
            let path = format!("/proc/{}/fd/2", parent.as_raw_nonzero());
            File::options().append(true).open(path).ok()
        }
    }
}

/// Tells the daemon which ids a container will have that is about to start.
fn tell_of_start(config: &Path, spec: &Spec) -> Result<(), String> {
    let Some(settings) = settings(config)? else {
        return Ok(());
    };
    let mut volumes = volumes(spec, &settings.mount_dir);
    // The runtime does the same to these, and cannot do it twice.
    volumes.retain(|_, mapped| !*mapped);
    if volumes.is_empty() {
        return Ok(());
    }
    let linux = spec.linux().as_ref();
    let body = json!({
        "Volumes": volumes.keys().collect::<Vec<_>>(),
        "UidMappings": linux.and_then(|linux| linux.uid_mappings().as_ref()).unwrap_or(&Vec::new()),
        "GidMappings": linux.and_then(|linux| linux.gid_mappings().as_ref()).unwrap_or(&Vec::new()),
    });
    call(&settings.socket, "Friend.Starting", &body, BOUND)
}

/// The settings; `None` where nothing is prepared, so that there is no volume of ours.
fn settings(config: &Path) -> Result<Option<Settings>, String> {
    match Settings::load(config) {
        Ok(settings) => Ok(Some(settings)),
        Err(ConfigError::Missing(_)) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// Tells the daemon of a container that starts; of one that has ended, gives what is to be told.
fn tell(config: &Path, stage: Stage, state: &str) -> Result<Option<Ended>, String> {
    let state: State = serde_json::from_str(state).map_err(|e| format!("the state: {e}"))?;
    let Some(settings) = settings(config)? else {
        return Ok(None);
    };
    let spec = Spec::load(bundle(&state).join("config.json")).map_err(|e| e.to_string())?;
    let volumes = volumes(&spec, &settings.mount_dir);
    if volumes.is_empty() {
        return Ok(None);
    }
    let volumes: Vec<_> = volumes.keys().collect();
    let container = state.id().clone();
    let mut body = json!({"Container": container, "Volumes": volumes});
    if stage != Stage::Poststop {
        body["Pid"] = (*state.pid()).into();
        call(&settings.socket, "Friend.Started", &body, BOUND)?;
        return Ok(None);
    }
    // Whether it is there at all.
    call(&settings.socket, "Plugin.Activate", &json!({}), BOUND)?;
    Ok(Some(Ended {
        socket: settings.socket,
        container,
        body,
    }))
}

/// Where a container's configuration is: where its state says, or where the runtime that calls the hook was told by Podman's conmon.
///
/// crun takes its own working directory for it, until its version 1.27 (NEWS, "createRuntime hooks not receiving bundle path"): `/`, if the
/// container has a user namespace and devices, for whose sake crun was in another mount namespace meanwhile.
fn bundle(state: &State) -> PathBuf {
    let said = state.bundle();
    if said != Path::new("/") {
        return said.clone();
    }
    let caller = std::os::unix::process::parent_id();
    let arguments = fs::read(format!("/proc/{caller}/cmdline")).unwrap_or_default();
    bundle_of(&arguments).unwrap_or_else(|| said.clone())
}

/// The argument `--bundle` of a command line as /proc/PID/cmdline has it.
fn bundle_of(arguments: &[u8]) -> Option<PathBuf> {
    let mut arguments = arguments.split(|&byte| byte == 0);
    arguments.find(|argument| matches!(*argument, b"--bundle" | b"-b"))?;
    let path = arguments.next()?;
    Some(OsStr::from_bytes(path).into())
}

/// A container's end, of which the daemon is to be told.
struct Ended {
    socket: PathBuf,
    container: String,
    body: Value,
}

impl Ended {
    fn tell(mut self) -> Result<(), String> {
        let code = Events::of_caller().exit_code(&self.container, Instant::now() + JOURNAL);
        self.body["ExitCode"] = code.into();
        call(&self.socket, "Friend.Ended", &self.body, RECORD)
    }
}

fn call(socket: &Path, endpoint: &str, body: &Value, timeout: Duration) -> Result<(), String> {
    client::call(socket, endpoint, body, timeout)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// The volumes of ours that a container has mounted, or parts of them, and whether the runtime
/// is to make an idmapped mount of one.
fn volumes(spec: &Spec, mount_dir: &Path) -> BTreeMap<String, bool> {
    let name = |source: &Path| {
        let below = source.strip_prefix(mount_dir).ok()?;
        let name = below.iter().next()?.to_str()?;
        name.parse::<VolumeName>().ok()?;
        Some(name.to_owned())
    };
    let mut volumes = BTreeMap::new();
    for mount in spec.mounts().iter().flatten() {
        if let Some(name) = mount.source().as_deref().and_then(name) {
            let mut options = mount.options().iter().flatten();
            *volumes.entry(name).or_default() |=
                options.any(|o| o.starts_with("idmap") || o.starts_with("ridmap"));
        }
    }
    volumes
}

/// Refuses a container in which one of the volumes that it is annotated with is not
/// a mount of ours: Podman makes a local volume of any name that it does not know.
fn guard(config: &Path, spec: &Result<Spec, serde_json::Error>, text: &str) -> Result<(), Failure> {
    let refused = |why: String| Err(Failure::Failed(why));
    let spec = match spec {
        Ok(spec) => spec,
        // Without the word there is nothing to guard.
        Err(_) if !text.contains(GUARD) => return Ok(()),
        Err(error) => return refused(format!("the container's configuration: {error}")),
    };
    let annotations = spec.annotations().as_ref();
    let Some(wanted) = annotations.and_then(|all| all.get(GUARD)) else {
        return Ok(());
    };
    let settings = Settings::load(config)?;
    let table = mount::table().map_err(failed("the mount table"))?;
    for pair in wanted.split_whitespace() {
        let parsed = pair
            .split_once(':')
            .map(|(name, target)| (name.parse(), target));
        let Some((Ok::<VolumeName, _>(name), target)) = parsed else {
            return refused(format!(
                "annotation {GUARD}={wanted:?}: {pair:?} is not NAME:TARGET"
            ));
        };
        let at = settings.mount_dir.join(name.as_str());
        let mounts = spec.mounts().iter().flatten();
        let here = mounts.filter(|mount| mount.destination() == Path::new(target));
        let sources: Vec<_> = here.filter_map(|mount| mount.source().clone()).collect();
        let hint = format!("podman volume create --driver lvm-cache-friend {name}");
        match sources.last() {
            None => {
                return refused(format!("no volume is mounted at {target}; expected {name}"));
            }
            Some(source) if *source != at => {
                return refused(format!(
                    "{target} is not the cache volume {name}, but {}: a local volume of that name hides it, or it was never created ({hint})",
                    source.display()
                ));
            }
            Some(_) if table.iter().all(|mount| mount.at != at) => {
                return refused(format!(
                    "the cache volume {name} is not mounted there: is the daemon running?"
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_in_command_lines() {
        let create = b"/usr/bin/crun\0--systemd-cgroup\0create\0--bundle\0/var/lib/x/userdata\0--pid-file\0/run/y\0id\0";
        assert_eq!(bundle_of(create), Some("/var/lib/x/userdata".into()));
        assert_eq!(bundle_of(b"crun\0start\0id\0"), None);
        assert_eq!(bundle_of(b"crun\0--bundle"), None);
        assert_eq!(bundle_of(b""), None);
    }

    #[test]
    fn volumes_of_a_container() {
        let spec = json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/a", "type": "bind", "source": "/m/one", "options": ["rbind"]},
                {"destination": "/b", "type": "bind", "source": "/m/two/below", "options": ["idmap"]},
                {"destination": "/c", "type": "bind", "source": "/m"},
                {"destination": "/d", "type": "bind", "source": "/mm/three"},
                {"destination": "/e", "type": "bind", "source": "/m/one"},
                {"destination": "/f", "type": "bind"},
            ],
        });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let found = volumes(&spec, Path::new("/m"));
        let want = [("one", false), ("two", true)];
        assert_eq!(
            found,
            want.map(|(name, mapped)| (name.to_owned(), mapped)).into()
        );
    }
}
