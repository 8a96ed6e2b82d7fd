// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What runs beside the containers: systemd's units, the daemon and its socket, the supervisor.

use super::super::facts::{Config, Daemon, Facts, FileKind, SERVICE, SOCKET, SUPERVISOR, TIMER};
use super::{Judged, note, ok, or_ok, settings, skipped, unconfigured, wrong};

pub fn units(facts: &Facts) -> Vec<Judged> {
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

pub fn socket(facts: &Facts) -> Vec<Judged> {
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

pub fn daemon(facts: &Facts) -> Vec<Judged> {
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

pub fn supervisor(facts: &Facts) -> Vec<Judged> {
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
