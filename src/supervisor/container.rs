// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A runner's container, as Podman is asked for it.

use std::collections::BTreeMap;
use std::path::Path;

use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};

use super::config::{ContainerText, Pool, Userns};

/// An image's label that says at which path its first process reads the runner's configuration, a line.
pub(super) const HANDED_AT: &str = "lvm-cache-friend.jit-config";

/// What the runner itself reads its configuration from, and takes out of its environment (actions/runner,
/// CommandSettings.cs): where the image has no such label.
const JIT: &str = "ACTIONS_RUNNER_INPUT_JITCONFIG";

/// Has the runner take one job and end with that job's result, end with [`TOO_OLD`] where it is, and show its log (actions/runner,
/// Runner.cs, Program.cs, HostContext.cs). What the configuration says otherwise counts.
const VARIABLES: [(&str, &str); 3] = [
    ("ACTIONS_RUNNER_RETURN_JOB_RESULT_FOR_HOSTED", "true"),
    ("ACTIONS_RUNNER_RETURN_VERSION_DEPRECATED_EXIT_CODE", "1"),
    ("ACTIONS_RUNNER_PRINT_LOG_TO_STDOUT", "1"),
];

/// Longest log of a container, in bytes. A job's own goes to GitHub.
const MAX_LOG: u64 = 8 << 20;

/// How a container gets its runner's configuration; docs/architecture.md says why.
pub(super) enum Given<'a> {
    /// By a FIFO of the host's, at a path in the container.
    Fifo(&'a Path, String),
    /// In the variable that the runner reads.
    Environment(&'a SecretString),
}

/// The container, as Podman's SpecGenerator has it.
pub(super) fn spec(
    pool: &Pool,
    runner: &str,
    labels: &BTreeMap<&'static str, String>,
    given: &Given<'_>,
) -> Value {
    let text = &pool.container;
    let mut env = text.env.clone();
    for (name, value) in VARIABLES {
        env.entry(name.into()).or_insert_with(|| value.into());
    }
    if let Given::Environment(jit) = given {
        env.insert(JIT.into(), jit.expose_secret().into());
    }
    let volumes: Vec<_> = pool
        .volumes
        .iter()
        .map(|volume| {
            // What is mounted in a job volume later is seen in the container.
            let options: &[&str] = if pool.is_job(volume) { &["rslave"] } else { &[] };
            json!({"Name": format!("{runner}-{}", volume.name), "Dest": volume.target, "Options": options})
        })
        .collect();
    let guard: Vec<_> = pool
        .volumes
        .iter()
        .map(|volume| format!("{runner}-{}:{}", volume.name, volume.target))
        .collect();
    let mut spec = json!({
        "name": runner,
        "image": text.image,
        "labels": labels,
        "env": env,
        "mounts": mounts(text, given),
        "volumes": volumes,
        "annotations": {"lvm-cache-friend.volume": guard.join(" ")},
        "restart_policy": "no",
        // A job can write there without end.
        "log_configuration": {"driver": "k8s-file", "size": MAX_LOG},
    });
    let mut set = |name: &str, value: Value| spec[name] = value;
    if guard.is_empty() {
        set("annotations", json!({}));
    }
    if !text.command.is_empty() {
        set("command", json!(text.command));
    }
    if text.read_only {
        set("read_only_filesystem", json!(true));
    }
    if !text.devices.is_empty() {
        set(
            "devices",
            text.devices
                .iter()
                .map(|path| json!({"path": path}))
                .collect(),
        );
    }
    for (name, list) in [
        ("cap_add", &text.cap_add),
        ("unmask", &text.unmask),
        ("selinux_opts", &text.selinux),
    ] {
        if !list.is_empty() {
            set(name, json!(list));
        }
    }
    if let Some(network) = text.network {
        set("netns", json!({"nsmode": network}));
    }
    match text.userns {
        None => {}
        Some(Userns::Host) => set("userns", json!({"nsmode": "host"})),
        // What `podman run --userns=auto:size=N` makes of it.
        Some(Userns::Auto(size)) => {
            let value = if size == 0 {
                String::new()
            } else {
                format!("size={size}")
            };
            set("userns", json!({"nsmode": "auto", "value": value}));
            set(
                "idmappings",
                json!({"AutoUserNs": true, "AutoUserNsOpts": {"Size": size}, "HostUIDMapping": false, "HostGIDMapping": false}),
            );
        }
    }
    let limits = limits(text);
    if limits.as_object().is_some_and(|limits| !limits.is_empty()) {
        set("resource_limits", limits);
    }
    spec
}

/// What is mounted in the container beside its volumes.
fn mounts(text: &ContainerText, given: &Given<'_>) -> Vec<Value> {
    let tmpfs = text.tmpfs.iter();
    let mut mounts: Vec<_> = tmpfs
        .map(|at| json!({"destination": at, "type": "tmpfs", "source": "tmpfs"}))
        .collect();
    // Of a root that is read-only Podman 5 makes /dev/shm a part; before, it was writable as in any container. Podman's own options.
    if text.read_only && !text.tmpfs.iter().any(|at| at == "/dev/shm") {
        mounts.push(json!({
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "nodev", "noexec", "mode=1777", "size=65536k"],
        }));
    }
    if let Given::Fifo(source, target) = given {
        // Z: where the host has SELinux, the container may read it.
        mounts.push(json!({
            "destination": target,
            "type": "bind",
            "source": source,
            "options": ["rbind", "ro", "Z"],
        }));
    }
    mounts
}

fn limits(text: &ContainerText) -> Value {
    let mut limits = json!({});
    if let Some(memory) = text.memory {
        limits["memory"] = json!({"limit": memory.0, "swap": memory.0});
    }
    if let Some(cpus) = text.cpus {
        const PERIOD: u32 = 100_000;
        limits["cpu"] = json!({"period": PERIOD, "quota": (cpus * f64::from(PERIOD)) as i64});
    }
    if let Some(pids) = text.pids {
        limits["pids"] = json!({"limit": pids});
    }
    limits
}
