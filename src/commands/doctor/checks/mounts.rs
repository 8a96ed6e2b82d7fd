// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether containers see what the daemon mounts: its mount namespace, the propagation of mounts, and their labels.

use super::super::facts::{Daemon, Facts, SERVICE};
use super::{Judged, note, ok, or_ok, settings, skipped, unconfigured, wrong};
use crate::selinux::LabelError;

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

pub fn namespace(facts: &Facts) -> Vec<Judged> {
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

pub fn propagation(facts: &Facts) -> Vec<Judged> {
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

pub fn selinux(facts: &Facts) -> Vec<Judged> {
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
