// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Podman and Docker: whether they know the plugin, and whether it learns how containers end.

use super::super::State;
use super::super::facts::{DRIVER, Facts};
use super::{Judged, note, ok, or_ok, settings, skipped, wrong};

/// Below this Podman gives up on containers that start at once on a busy disk, in seconds.
const SHORT_TIMEOUT: u64 = 20;

pub fn podman(facts: &Facts) -> Vec<Judged> {
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
pub(super) const STAGES: [&str; 3] = ["precreate", "createRuntime", "poststop"];

pub fn hooks(facts: &Facts) -> Vec<Judged> {
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

pub fn local_volumes(facts: &Facts) -> Vec<Judged> {
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

pub fn docker(facts: &Facts) -> Vec<Judged> {
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
pub fn verdicts(facts: &Facts) -> Vec<Judged> {
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
