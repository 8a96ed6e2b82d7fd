// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The judgements: each a function of what was found, and of nothing else.

use std::path::Path;

use super::facts::{
    Config, DRIVER, Daemon, Facts, FileFact, FileKind, SERVICE, SOCKET, SUPERVISOR, TIMER,
};
use super::{Finding, State};
use crate::cache::evict::Bound;
use crate::config::{Lvm, MOUNT_DIR_MODE, Settings, StoreConfig};
use crate::selinux::LabelError;

/// Below this Podman gives up on containers that start at once on a busy disk, in seconds.
const SHORT_TIMEOUT: u64 = 20;

/// How far another clock may differ from this one, in seconds, before one of them is wrong.
const CLOCK_SLACK: u64 = 300;

/// What a bare judgement is before it bears its check's name.
type Judged = (State, String, Option<String>);

/// A check's name, and what judges.
type Check = (&'static str, fn(&Facts) -> Vec<Judged>);

const CHECKS: [Check; 20] = [
    ("configuration", configuration),
    ("permissions", permissions),
    ("tools", tools),
    ("kernel", kernel),
    ("store", store),
    ("pool", pool),
    ("leftovers", leftovers),
    ("units", units),
    ("socket", socket),
    ("daemon", daemon),
    ("namespace", namespace),
    ("propagation", propagation),
    ("selinux", selinux),
    ("podman", podman),
    ("hooks", hooks),
    ("local-volumes", local_volumes),
    ("docker", docker),
    ("verdicts", verdicts),
    ("supervisor", supervisor),
    ("clock", clock),
];

/// All findings, in the order of the checks.
pub fn all(facts: &Facts) -> Vec<Finding> {
    let judge = |(check, judge): &Check| {
        let finding = |(state, finding, fix)| Finding {
            check,
            state,
            finding,
            fix,
        };
        judge(facts).into_iter().map(finding).collect::<Vec<_>>()
    };
    CHECKS.iter().flat_map(judge).collect()
}

fn ok(finding: impl Into<String>) -> Judged {
    (State::Ok, finding.into(), None)
}

fn skipped(why: impl Into<String>) -> Judged {
    (State::Skipped, why.into(), None)
}

fn note(finding: impl Into<String>, fix: impl Into<String>) -> Judged {
    (State::Note, finding.into(), Some(fix.into()))
}

fn wrong(finding: impl Into<String>, fix: impl Into<String>) -> Judged {
    (State::Wrong, finding.into(), Some(fix.into()))
}

/// What was found to be wrong or worth a note; where that is nothing, that all is well.
fn or_ok(found: Vec<Judged>, well: impl Into<String>) -> Vec<Judged> {
    if found.is_empty() {
        vec![ok(well)]
    } else {
        found
    }
}

fn settings(facts: &Facts) -> Option<&Settings> {
    match &facts.config {
        Config::Read(settings) => Some(settings),
        Config::Missing | Config::Bad(_) => None,
    }
}

fn unconfigured() -> Vec<Judged> {
    vec![skipped("there is no configuration")]
}

fn configuration(facts: &Facts) -> Vec<Judged> {
    let file = facts.config_file.display();
    vec![match &facts.config {
        Config::Read(settings) => ok(format!("{file}: {}", settings.store)),
        Config::Missing => wrong(
            format!("{file} does not exist: nothing is set up yet"),
            "lvm-cache-friend init --vg VG --size SIZE, or with --loop FILE or --reflink DIR",
        ),
        Config::Bad(why) => wrong(
            why.replace('\n', " "),
            "correct it; `lvm-cache-friend example-config` explains each setting",
        ),
    }]
}

fn permissions(facts: &Facts) -> Vec<Judged> {
    let mut found = Vec::new();
    for FileFact {
        path,
        uid,
        mode,
        kind,
        ..
    } in &facts.files
    {
        let name = path.display();
        // In a directory for all (/tmp), a file can be replaced by its owner alone.
        let shared_dir = *kind == FileKind::Dir && mode & 0o1000 != 0;
        if *uid != 0 {
            found.push(wrong(
                format!("{name} belongs to user {uid}, who can thereby run anything as root"),
                format!("chown root:root {name}"),
            ));
        } else if mode & 0o022 != 0 && !shared_dir {
            found.push(wrong(
                format!("{name} is writable by others (mode {mode:04o})"),
                format!("chmod go-w {name}"),
            ));
        }
        if *kind == FileKind::File && mode & 0o077 != 0 && may_be_secret(path) {
            found.push(wrong(
                format!("{name} may contain a secret, and others can read it (mode {mode:04o})"),
                format!("chmod 0600 {name}"),
            ));
        }
    }
    if facts.files.is_empty() {
        return vec![skipped("there is no configuration yet")];
    }
    // The daemon sees to it, at each start.
    if let Some(dir) = facts.mount_dir.as_ref().filter(|dir| dir.mode & 0o007 != 0)
        && matches!(facts.daemon, Daemon::Runs { .. })
    {
        found.push(wrong(
            format!(
                "{} is open to all users of this host (mode {:04o}): they can go into mounted volumes, and as far as jobs' sockets",
                dir.path.display(),
                dir.mode
            ),
            format!("chmod {MOUNT_DIR_MODE:04o} {}", dir.path.display()),
        ));
    }
    or_ok(found, "only root can change the configuration")
}

/// Beside the configuration: keys and tokens for the supervisor.
fn may_be_secret(path: &Path) -> bool {
    path.extension().is_none_or(|extension| extension != "toml")
}

fn tools(facts: &Facts) -> Vec<Judged> {
    let missing = facts.tools.iter().filter(|tool| tool.version.is_none());
    let found = missing.map(|tool| {
        wrong(
            format!("{} is not installed", tool.name),
            format!(
                "apt install {}, or your distribution's package of it",
                tool.package
            ),
        )
    });
    let there = facts.tools.iter().filter_map(|tool| {
        let version = tool.version.as_ref()?;
        Some(format!("{} {version}", tool.name))
    });
    or_ok(found.collect(), there.collect::<Vec<_>>().join(", "))
}

fn kernel(facts: &Facts) -> Vec<Judged> {
    let kernel = &facts.kernel;
    let release = &kernel.release;
    let mut found = Vec::new();
    if !kernel.xfs {
        found.push(wrong(
            format!("Linux {release} has no XFS"),
            "install all modules of the kernel, or set fs=ext4 for each volume",
        ));
    }
    let lvm = settings(facts).is_some_and(|s| matches!(s.store, StoreConfig::Lvm(_)));
    if lvm && !kernel.thin {
        found.push(wrong(
            format!("Linux {release} has no dm-thin-pool"),
            "install all modules of the kernel, or use `init --reflink`",
        ));
    }
    match version(release) {
        Some(version) if version < (5, 8) => found.push(wrong(
            format!("Linux {release} is too old: detached mounts, openat2 and LOOP_CONFIGURE are needed"),
            "use Linux 5.8 or later",
        )),
        Some(version) if version < (5, 19) => found.push(note(
            format!("Linux {release} does not support idmapped mounts of XFS: in containers with a user namespace, files have their owners on the host"),
            "use Linux 5.19 or later (5.12 for fs=ext4)",
        )),
        Some(_) => {}
        None => found.push(note(
            format!("Linux {release:?}: unknown version"),
            "make sure that it is 5.19 or later",
        )),
    }
    or_ok(found, format!("Linux {release}"))
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn store(facts: &Facts) -> Vec<Judged> {
    match (&facts.store, settings(facts)) {
        (Some(Ok(_)), Some(settings)) => vec![ok(settings.store.to_string())],
        (Some(Err(why)), Some(settings)) => {
            let fix = match &settings.store {
                StoreConfig::Lvm(lvm) => format!(
                    "check `vgs {vg}` and `lvs {vg}` for a missing disk or a renamed group; `init` again creates what is missing",
                    vg = lvm.vg
                ),
                StoreConfig::Reflink(reflink) => {
                    format!("make sure that {} is mounted", reflink.dir.display())
                }
            };
            vec![wrong(why, fix)]
        }
        _ => unconfigured(),
    }
}

fn pool(facts: &Facts) -> Vec<Judged> {
    let Some(Ok(store)) = &facts.store else {
        return vec![skipped("the store cannot be read")];
    };
    let Some(settings) = settings(facts) else {
        return unconfigured();
    };
    let room = |bound| {
        match (&settings.store, bound) {
        (StoreConfig::Reflink(_), _) => "free space on that file system".to_owned(),
        (StoreConfig::Lvm(Lvm { vg, pool, .. }), Bound::Data) => {
            format!("lvextend --size +SIZE {vg}/{pool}")
        }
        (StoreConfig::Lvm(Lvm { vg, pool, .. }), Bound::Metadata) => {
            format!("lvextend --poolmetadatasize +SIZE {vg}/{pool}")
        }
        (StoreConfig::Lvm(_), Bound::Group) => {
            "set policy.max-entries (a group's metadata area cannot grow; a new group can have more, by --metadatasize)".to_owned()
        }
    }
    };
    let full = &store.capacity;
    let mut found = Vec::new();
    for (bound, space, floor) in full.fill().bounds(&settings.policy) {
        let finding = format!(
            "{:.1} % of {} for {bound} is used",
            space.percent, space.size
        );
        let fix = format!("remove entries, or {}", room(bound));
        if space.is_full() {
            let limit = space.limit;
            let finding = format!("{finding}; from {limit:.0} % on, no volume is made");
            found.push(wrong(finding, fix));
        } else if space.missing(floor) > 0 {
            let mark = space.mark(floor);
            found.push(note(
                format!("{finding}: entries should have been evicted down to {mark:.0} %"),
                format!("see what may be evicted with lvm-cache-friend gc --dry-run; {fix}"),
            ));
        }
    }
    if let (Some(when_full), StoreConfig::Lvm(lvm)) = (&store.when_full, &settings.store)
        && when_full != "error"
    {
        found.push(wrong(
            format!("writes to a full pool hang for a minute ({when_full}) instead of failing"),
            format!("lvchange --errorwhenfull y {}/{}", lvm.vg, lvm.pool),
        ));
    }
    let troubles = store.troubles.iter();
    found.extend(troubles.map(|trouble| wrong(&trouble.finding, &trouble.fix)));
    if let Some(drawback) = &store.drawback {
        found.push(note(
            drawback,
            "optional: an lvm2 built with its shell makes creating, publishing and removing faster",
        ));
    }
    let size = full.data_size;
    or_ok(found, format!("{:.1} % of {size} used", full.data_percent))
}

fn leftovers(facts: &Facts) -> Vec<Judged> {
    let Some(Ok(store)) = &facts.store else {
        return vec![skipped("the store cannot be read")];
    };
    let unclear = store.unclear.iter().map(|(lv, why)| {
        wrong(
            format!("{lv} has contradictory friend: tags, and is left alone: {why}"),
            "remove its friend: tags with lvchange --deltag, or remove the volume",
        )
    });
    let mut found: Vec<_> = unclear.collect();
    let away = !matches!(facts.daemon, Daemon::Runs { .. });
    for (count, what) in [
        (store.doomed, "marked for removal"),
        (store.making, "being imported, or left over from an import"),
    ] {
        if count > 0 {
            let fix = if away {
                "start the daemon, which removes them"
            } else {
                "nothing, if the number drops shortly; otherwise look into the daemon's log"
            };
            found.push(note(format!("{count} {what}"), fix));
        }
    }
    or_ok(found, "none")
}

fn units(facts: &Facts) -> Vec<Judged> {
    let units = match &facts.units {
        None => return vec![skipped("systemd is not running here")],
        Some(Err(why)) => return vec![wrong(why, "see `systemctl status`")],
        Some(Ok(units)) => units,
    };
    let mut found = Vec::new();
    for unit in [SERVICE, SOCKET] {
        let property = |name: &str| {
            let unit = units.get(unit);
            unit.and_then(|all| all.get(name))
                .map_or("", String::as_str)
        };
        let now = format!("systemctl enable --now {unit}");
        match (property("LoadState"), property("ActiveState")) {
            ("loaded", "active" | "activating" | "reloading") => {
                if !property("UnitFileState").starts_with("enabled") {
                    found.push(wrong(
                        format!("{unit} is not started at boot"),
                        format!("systemctl enable {unit}"),
                    ));
                }
            }
            ("loaded", "failed") => found.push(wrong(
                format!("{unit} has failed"),
                format!(
                    "find the reason with journalctl --unit {unit}; then systemctl restart {unit}"
                ),
            )),
            ("loaded", _) if matches!(facts.config, Config::Missing) => {
                found.push(note(
                    format!("{unit} does not run, as nothing is set up yet"),
                    format!("after init: {now}"),
                ));
            }
            ("loaded", _) => found.push(wrong(format!("{unit} does not run"), now)),
            ("masked", _) => found.push(wrong(
                format!("{unit} is masked"),
                format!("systemctl unmask {unit}"),
            )),
            _ => found.push(wrong(
                format!("systemd has no unit {unit}"),
                "install the package, or copy plugin/usr to /usr; then systemctl daemon-reload",
            )),
        }
        if property("NeedDaemonReload") == "yes" {
            found.push(note(
                format!("{unit} has changed since systemd read it"),
                format!("systemctl daemon-reload, then systemctl restart {unit}"),
            ));
        }
    }
    let timer = units.get(TIMER).and_then(|all| all.get("ActiveState"));
    if timer.is_none_or(|state| state != "active") && !matches!(facts.config, Config::Missing) {
        found.push(note(
            format!("{TIMER} does not run: old entries are evicted only after a publish"),
            format!("systemctl enable --now {TIMER}"),
        ));
    }
    or_ok(found, "enabled and active")
}

fn socket(facts: &Facts) -> Vec<Judged> {
    let Some(settings) = settings(facts) else {
        return unconfigured();
    };
    let name = settings.socket.display();
    let Some(socket) = &facts.socket else {
        return vec![wrong(
            format!("{name} does not exist"),
            format!("systemctl enable --now {SOCKET}"),
        )];
    };
    if socket.kind != FileKind::Socket {
        return vec![wrong(
            format!("{name} is not a socket"),
            format!("remove it; then systemctl restart {SOCKET}"),
        )];
    }
    let mut found = Vec::new();
    if socket.uid != 0 || socket.mode & 0o007 != 0 {
        found.push(wrong(
            format!("{name} is accessible to more than root and its group (user {}, mode {:04o}): they can read and remove every cache", socket.uid, socket.mode),
            format!("chown root {name}; chmod 0660 {name}"),
        ));
    }
    match &facts.socket_gid {
        Some(Ok(gid)) if *gid != socket.gid => found.push(note(
            format!("{name} belongs to group {}, not to {} as configured", socket.gid, settings.socket_group),
            format!("with systemd, set SocketGroup= in a drop-in of {SOCKET}; without, restart the daemon"),
        )),
        Some(Err(why)) => found.push(wrong(why, "create the group, or configure another")),
        _ => {}
    }
    or_ok(found, name.to_string())
}

fn daemon(facts: &Facts) -> Vec<Judged> {
    let start = format!("systemctl enable --now {SOCKET} {SERVICE}");
    vec![match &facts.daemon {
        Daemon::Unknown => return unconfigured(),
        Daemon::Away => wrong(
            "it does not run: containers with a cache volume can neither start nor end properly",
            start,
        ),
        Daemon::Odd(why) => wrong(
            format!("unexpected reply on its socket; is another program listening there? {why}"),
            format!("systemctl restart {SERVICE}; if that does not help, look into its log"),
        ),
        Daemon::Runs { version, .. } if version != env!("CARGO_PKG_VERSION") => note(
            format!(
                "it has version {version}, this program {}",
                env!("CARGO_PKG_VERSION")
            ),
            format!("systemctl restart {SERVICE} (containers go on meanwhile)"),
        ),
        Daemon::Runs { version, .. } => ok(format!("version {version} answers")),
    }]
}

/// Settings of a unit that give it mounts of its own (systemd.exec(5)).
const PRIVATE: [&str; 20] = [
    "BindPaths",
    "BindReadOnlyPaths",
    "ExecPaths",
    "InaccessiblePaths",
    "MountImages",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateMounts",
    "PrivateTmp",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
    "TemporaryFileSystem",
];

fn namespace(facts: &Facts) -> Vec<Judged> {
    let mut found = Vec::new();
    let service = match &facts.units {
        Some(Ok(units)) => units.get(SERVICE),
        _ => None,
    };
    for (name, value) in service.into_iter().flatten() {
        let off = ["", "no", "default", "[not set]"].contains(&value.as_str());
        if PRIVATE.contains(&name.as_str()) && !off {
            found.push(wrong(
                format!("{SERVICE} has {name}={value}: the daemon then has mounts of its own, and containers see an empty directory of the host's disk"),
                format!("remove it from the unit's drop-ins (systemctl cat {SERVICE}), then systemctl daemon-reload and restart"),
            ));
        }
    }
    match facts.daemon {
        Daemon::Runs {
            same_namespace: Some(false),
            ..
        } if found.is_empty() => found.push(wrong(
            "the daemon's mount namespace is not this one: what it mounts is not visible here",
            "run it in the host's namespace: it cannot serve from a container or under unshare",
        )),
        Daemon::Runs { .. } => {}
        _ if found.is_empty() => return vec![skipped("the daemon does not run")],
        _ => {}
    }
    or_ok(found, "the daemon uses the host's mounts")
}

fn propagation(facts: &Facts) -> Vec<Judged> {
    let Some(settings) = settings(facts) else {
        return unconfigured();
    };
    let dir = settings.mount_dir.display();
    match &facts.mount_root {
        Some(mount) if mount.shared => vec![ok(format!("{dir} is on a shared mount"))],
        // It makes it one at its start.
        Some(_) if !matches!(facts.daemon, Daemon::Runs { .. }) => {
            vec![skipped("the daemon ensures it, and does not run")]
        }
        Some(mount) => vec![wrong(
            format!(
                "{dir} is on {}, which is not shared: containers do not see what is mounted there later",
                mount.at.display()
            ),
            format!("mount --make-shared {}", mount.at.display()),
        )],
        None => vec![wrong(
            format!("{dir} is on no mount that is visible here"),
            "run doctor on the host itself",
        )],
    }
}

fn selinux(facts: &Facts) -> Vec<Judged> {
    let Some(selinux) = &facts.selinux else {
        return vec![skipped("it is off")];
    };
    let consequence = if selinux.enforcing {
        "confined containers cannot use caches"
    } else {
        "confined containers could not use caches if it were enforcing"
    };
    let package =
        "install container-selinux, or configure the label of containers' files: selinux-context";
    let labels = match &selinux.labels {
        Ok(labels) => labels,
        Err(error @ LabelError::Unknown(_)) => {
            return vec![wrong(
                error.to_string(),
                "correct or remove it: the default is the policy's label for containers' files",
            )];
        }
        Err(LabelError::Policy(why)) => {
            return vec![wrong(format!("{why}: {consequence}"), package)];
        }
    };
    if selinux.unwanted {
        return vec![note(
            format!("selinux-context is \"none\": {consequence}"),
            "remove it from the configuration if they should",
        )];
    }
    let mut found = Vec::new();
    if labels.sockets.is_none() {
        found.push(note(
            "the label of containers' processes is unknown: confined ones cannot connect to a job volume's socket",
            "install container-selinux",
        ));
    }
    if let [first, more @ ..] = &selinux.others[..] {
        let more = match more.len() {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        found.push(note(
            format!(
                "{}{more} is mounted with another label than volumes get now",
                first.display()
            ),
            "nothing: its next use has the right one",
        ));
    }
    let mode = if selinux.enforcing {
        "enforcing"
    } else {
        "permissive"
    };
    let label = labels.mounts.as_ref().map(ToString::to_string);
    let label = label.unwrap_or_default();
    or_ok(found, format!("{mode}; volumes are {label}"))
}

fn podman(facts: &Facts) -> Vec<Judged> {
    let Some(podman) = &facts.podman else {
        return vec![if facts.dockerd {
            skipped("it is not installed")
        } else {
            wrong(
                "neither Podman nor Docker is installed",
                "apt install podman",
            )
        }];
    };
    let info = match &podman.info {
        Ok(info) => info,
        Err(why) => return vec![wrong(why, "run `podman info` and see its error")],
    };
    let drop_in = "copy plugin/etc/containers/containers.conf.d/50-lvm-cache-friend.conf to /etc/containers/containers.conf.d; a file that Podman reads later may override it";
    let mut found = Vec::new();
    if !info.volume_plugins.iter().any(|name| name == DRIVER) {
        found.push(wrong(
            format!("Podman {} has no volume plugin {DRIVER}", info.version),
            drop_in,
        ));
    }
    if let (Some(path), Some(settings)) = (podman.conf.volume_plugins.get(DRIVER), settings(facts))
        && *path != settings.socket
    {
        found.push(wrong(
            format!(
                "Podman looks for the plugin at {}, the daemon listens on {}",
                path.display(),
                settings.socket.display()
            ),
            "set the same path in both: [engine.volume_plugins] in containers.conf, and socket in the configuration",
        ));
    }
    match podman.conf.volume_plugin_timeout {
        Some(seconds) if seconds >= SHORT_TIMEOUT => {}
        seconds => found.push(note(
            format!("Podman waits only {} s for the plugin: many containers at once on a busy disk can take longer", seconds.unwrap_or(5)),
            "volume_plugin_timeout = 60 in [engine] of containers.conf",
        )),
    }
    or_ok(found, format!("Podman {} knows the plugin", info.version))
}

/// The stages that hooks.d/ has.
const STAGES: [&str; 3] = ["precreate", "createRuntime", "poststop"];

fn hooks(facts: &Facts) -> Vec<Judged> {
    let Some(podman) = &facts.podman else {
        return vec![skipped("Podman is not installed")];
    };
    let dirs: Vec<_> = podman
        .conf
        .hooks_dir
        .iter()
        .map(|d| d.display().to_string())
        .collect();
    let dirs = dirs.join(", ");
    let mut found = Vec::new();
    for file in &podman.hooks {
        if let Err(why) = &file.hook {
            found.push(wrong(
                format!("{}: {why}: no container at all starts", file.path.display()),
                "correct or remove it",
            ));
        }
    }
    let ours = |stage: &str| {
        podman.hooks.iter().find_map(|file| {
            let hook = file.hook.as_ref().ok()?;
            let named = hook.args.ends_with(&["hook".to_owned(), stage.to_owned()]);
            (named && hook.stages.iter().any(|s| s == stage)).then_some((file, hook))
        })
    };
    for stage in STAGES {
        match ours(stage) {
            None => found.push(wrong(
                format!("no hook for {stage} in {dirs}, where Podman looks"),
                "copy hooks.d/*.json there, or add their directory to hooks_dir in [engine] of containers.conf",
            )),
            Some((file, hook)) if !hook.program_exists => found.push(wrong(
                format!("{} names {}, which does not exist: Podman silently skips it", file.path.display(), hook.program.display()),
                "install the program there, or change the path",
            )),
            Some(_) => {}
        }
    }
    or_ok(found, format!("all three in {dirs}"))
}

fn local_volumes(facts: &Facts) -> Vec<Judged> {
    let Some(podman) = &facts.podman else {
        return vec![skipped("Podman is not installed")];
    };
    let local = match &podman.local_volumes {
        Ok(local) => local,
        Err(why) => return vec![wrong(why, "run `podman volume ls` and see its error")],
    };
    let Some(Ok(store)) = &facts.store else {
        return vec![skipped("the store cannot be read")];
    };
    let both = local.intersection(&store.volumes).map(|name| {
        wrong(
            format!("{name} is a local volume of Podman, which hides the cache volume of that name: containers write to the host's disk, without a cache"),
            format!("podman volume rm {name}, if nothing in it is needed; then podman volume create --driver {DRIVER} … {name}"),
        )
    });
    or_ok(both.collect(), "none hides a cache volume")
}

fn docker(facts: &Facts) -> Vec<Judged> {
    let (Some(settings), true) = (
        settings(facts),
        facts.dockerd || facts.docker_spec.is_some(),
    ) else {
        return vec![skipped("Docker is not installed, or nothing is configured")];
    };
    let want = format!("unix://{}", settings.socket.display());
    vec![match &facts.docker_spec {
        Some((path, text)) if *text == want => ok(format!("{} names the socket", path.display())),
        Some((path, text)) => wrong(
            format!(
                "{} names {text:?}, the daemon listens on {want}",
                path.display()
            ),
            format!("echo {want} > {}", path.display()),
        ),
        // It may be there for other things.
        None => note(
            "Docker is installed but has no spec file of the plugin, so it cannot use it",
            format!(
                "if it should, mkdir -p /etc/docker/plugins && echo {want} > /etc/docker/plugins/lvm-cache-friend.spec"
            ),
        ),
    }]
}

/// Whether it is known how containers end, for each of the two that run them.
fn verdicts(facts: &Facts) -> Vec<Judged> {
    let unknown = |whose: &str, why: &str, fix: &str| {
        let finding = format!(
            "{whose}: results of containers are unknown, so publish=on-success publishes nothing: {why}"
        );
        note(finding, fix)
    };
    let podman = facts.podman.as_ref().map(|podman| {
        let well = |found: &Judged| matches!(found.0, State::Ok);
        match &podman.info {
            _ if !hooks(facts).iter().all(well) => unknown(
                "Podman",
                "its hooks are not installed correctly",
                "see the check hooks",
            ),
            Ok(info) if info.event_logger == "none" => unknown(
                "Podman",
                "it keeps no events",
                "events_logger = \"journald\" or \"file\" in [engine] of containers.conf",
            ),
            Ok(_) => ok("Podman: known, by its hooks and its events"),
            Err(_) => unknown("Podman", "`podman info` fails", "see the check podman"),
        }
    });
    let docker = facts.dockerd.then(|| match &facts.docker_api {
        Some(Ok(version)) => ok(format!("Docker {version}: known, by its API")),
        Some(Err(why)) => unknown(
            "Docker",
            why,
            "start it, or set docker-socket in the configuration",
        ),
        None => unknown(
            "Docker",
            "its API is not used",
            "set docker-socket in the configuration",
        ),
    });
    let found: Vec<_> = podman.into_iter().chain(docker).collect();
    if found.is_empty() {
        return vec![skipped("neither Podman nor Docker is installed")];
    }
    found
}

fn supervisor(facts: &Facts) -> Vec<Judged> {
    let supervisor = match &facts.supervisor {
        None => return Vec::new(),
        Some(Err(why)) => {
            return vec![wrong(
                why.replace('\n', " "),
                "correct it; docs/supervisor.md explains each setting",
            )];
        }
        Some(Ok(supervisor)) => supervisor,
    };
    let mut found = Vec::new();
    if let Err(why) = &supervisor.check {
        found.push(wrong(
            why,
            "put the token or the App's key into that file, with mode 0600; `lvm-cache-friend supervise --check` checks again",
        ));
    }
    if !supervisor.has_podman {
        found.push(wrong(
            format!(
                "{} is not a socket: the supervisor cannot reach Podman",
                supervisor.podman_socket.display()
            ),
            "systemctl enable --now podman.socket, or set podman-socket in [supervise]",
        ));
    }
    let socket = supervisor.control_socket.display();
    match &supervisor.slots {
        Some(Ok(slots)) => return or_ok(found, format!("{slots} slots")),
        Some(Err(why)) => found.push(wrong(
            format!("unexpected reply on {socket}; is another program listening there? {why}"),
            format!("systemctl restart {SUPERVISOR}; if that does not help, look into its log"),
        )),
        None => found.push(wrong(
            format!("it does not answer on {socket}: no job gets a runner"),
            format!("systemctl enable --now {SUPERVISOR}; if that fails, journalctl --unit {SUPERVISOR} has the reason"),
        )),
    }
    found
}

fn clock(facts: &Facts) -> Vec<Judged> {
    let mut found = Vec::new();
    let newest = match &facts.store {
        Some(Ok(store)) => store.newest,
        _ => 0,
    };
    let fix = "synchronize it with NTP: timedatectl set-ntp true";
    let ahead = newest.saturating_sub(facts.clock.now);
    if ahead > CLOCK_SLACK {
        found.push(wrong(
            format!(
                "the newest volume was made {ahead} s in the future: this clock is behind, or was ahead"
            ),
            fix,
        ));
    }
    if !facts.clock.synchronised {
        found.push(note("the system clock is not synchronized (NTP)", fix));
    }
    or_ok(found, "synchronized")
}

#[cfg(test)]
mod tests;
