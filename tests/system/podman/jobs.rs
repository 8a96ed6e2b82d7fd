//! Job volumes in containers.

use serde_json::Value;

use super::hooks::Hooks;
use super::{Body, Host};
use crate::support::site::Kind;
use crate::support::{JOB_CLIENT, wait_until};

pub const BODIES: &[Body] = &[("job_volumes", job_volumes)];

/// A container with the job volume `job`, mounted with `propagation`; its exit status and what it said.
fn run(host: &Host, propagation: &str, script: &str) -> (i32, String) {
    let volume = format!("job:/run/lvm-cache-friend{propagation}");
    // The image has no client, so perl is lent by this machine.
    let lent = ["/usr", "/lib", "/lib64"].map(|dir| format!("{dir}:{dir}:ro"));
    let options: Vec<_> = lent.iter().flat_map(|lent| ["-v", lent]).collect();
    let script = format!(
        "PATH=/bin:/usr/bin\nask() {{ perl -e '{JOB_CLIENT}' /run/lvm-cache-friend/socket; }}\n{script}"
    );
    let head = ["run", "--rm", "-v", &volume];
    let tail = [host.podman.image.as_str(), "/bin/sh", "-ec", &script];
    let done = host.podman.outcome(&[&head[..], &options, &tail].concat());
    (done.status, done.stdout + &done.stderr)
}

fn job_volumes(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    host.podman.create("job", &["type=job"]);
    let request = "mount /run/lvm-cache-friend/cargo\n> linux dc5e8c\n> linux\n< linux dc5e8c";
    for (script, published, said) in [
        ("date > cargo/x; exit 1", false, "restored=base"),
        ("[ ! -e cargo/x ]; date > cargo/x", true, "restored=base"),
        (
            "cat cargo/x; date > cargo/x; exit 7",
            false,
            "restored=exact",
        ),
    ] {
        let script = format!(
            "cd /run/lvm-cache-friend\nprintf '{}' | ask | tee /tmp/answer\ngrep -q '^ok ' /tmp/answer\n{script}",
            request.replace('\n', "\\n")
        );
        let before = host.status("job")["last_lease"]["cargo"]["lv"].clone();
        let (_, output) = run(&host, ":rslave", &script);
        assert!(output.contains(said), "{output}");
        let mut last = Value::Null;
        wait_until(|| {
            last = host.status("job")["last_lease"]["cargo"].clone();
            last["lv"].is_string() && last["lv"] != before
        });
        assert_eq!(last["published"].is_string(), published, "{script}: {last}");
    }
    let (_, output) = run(&host, ":rslave", "echo 'mount /etc/x' | ask");
    assert!(
        output.starts_with("error ") && output.contains("below /run/lvm-cache-friend"),
        "{output}"
    );
    let (_, output) = run(&host, "", "echo 'mount x' | ask");
    assert!(
        output.starts_with("error ") && output.contains(":rslave"),
        "{output}"
    );
}
