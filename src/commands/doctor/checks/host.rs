// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host: its configuration, who may change that, tools, kernel and clock.

use std::path::Path;

use super::super::facts::{Config, Daemon, Facts, FileFact, FileKind};
use super::{Judged, note, ok, or_ok, settings, skipped, wrong};
use crate::config::{MOUNT_DIR_MODE, StoreConfig};

/// How far another clock may differ from this one, in seconds, before one of them is wrong.
const CLOCK_SLACK: u64 = 300;

pub fn configuration(facts: &Facts) -> Vec<Judged> {
    let file = facts.config_file.display();
    vec![match &facts.config {
        Config::Read(settings) => ok(format!("{file}: {}", settings.store)),
        Config::Missing => wrong(
            format!("{file} does not exist: nothing is set up yet"),
            "lvm-cache-friend init --vg VG --size SIZE, or with --loop FILE, --reflink DIR or --rbd POOL",
        ),
        Config::Bad(why) => wrong(
            why.replace('\n', " "),
            "correct it; `lvm-cache-friend example-config` explains each setting",
        ),
    }]
}

pub fn permissions(facts: &Facts) -> Vec<Judged> {
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

pub fn tools(facts: &Facts) -> Vec<Judged> {
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

pub fn kernel(facts: &Facts) -> Vec<Judged> {
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
    let rbd = settings(facts).is_some_and(|s| matches!(s.store, StoreConfig::Rbd(_)));
    if rbd && !kernel.rbd {
        found.push(wrong(
            format!("Linux {release} has no rbd"),
            "install all modules of the kernel (Fedora: kernel-modules-core)",
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

pub fn clock(facts: &Facts) -> Vec<Judged> {
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
