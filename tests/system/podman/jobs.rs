// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Job volumes in containers.

use std::path::Path;
use std::{fs, thread};

use super::hooks::Hooks;
use super::{Body, Host, ended_after};
use crate::support::site::Kind;
use crate::support::{command, wait_until};

pub const BODIES: &[Body] = &[("job_volumes", job_volumes)];

/// A container with the job volume `job`, mounted with `propagation`; its exit status and what it said.
fn run(host: &Host, propagation: &str, script: &str) -> (i32, String) {
    let volume = format!("job:/run/lvm-cache-friend{propagation}");
    // The image has neither ncat nor socat, so this machine lends its own.
    let lent = ["/usr", "/lib", "/lib64"].map(|dir| format!("{dir}:{dir}:ro"));
    let options: Vec<_> = lent.iter().flat_map(|lent| ["-v", lent]).collect();
    let script = format!("PATH=/bin:/usr/bin\n{script}");
    let head = ["run", "--rm", "-v", &volume];
    let tail = [host.podman.image.as_str(), "/bin/sh", "-ec", &script];
    let done = host.podman.outcome(&[&head[..], &options, &tail].concat());
    (done.status, done.stdout + &done.stderr)
}

fn job_volumes(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    host.podman.create("job", &["type=job"]);
    // As the article has it, but for the path and for what GitHub puts in.
    let request = r"
        ncat -U /run/lvm-cache-friend/socket <<EOF
        mount /run/lvm-cache-friend/cargo
        > linux dc5e8c
        > linux main
        < linux main dc5e8c
        EOF
    "
    .replace("\n        ", "\n");
    let ncat = request.trim();
    let socat = ncat.replace("ncat -U ", "socat -t 60 - UNIX:");
    for (ask, script, published, said) in [
        (ncat, "date > cargo/x; exit 1", false, "restored=base"),
        (
            ncat,
            "[ ! -e cargo/x ]; date > cargo/x",
            true,
            "restored=base",
        ),
        (
            &socat,
            "cat cargo/x; date > cargo/x; exit 7",
            false,
            "restored=exact",
        ),
    ] {
        let script = format!(
            "cd /run/lvm-cache-friend\nask() {{ {ask}\n}}\nask | tee /tmp/answer\ngrep -q '^ok ' /tmp/answer\n{script}"
        );
        let last = || host.status("job")["last_lease"]["cargo"].clone();
        let before = last();
        let (_, output) = run(&host, ":rslave", &script);
        assert!(output.contains(said), "{output}");
        let ended = ended_after(&before, last);
        assert_eq!(
            ended["published"].is_string(),
            published,
            "{script}: {ended}"
        );
    }
    // A script tells one that failed by its last line.
    let ask = "ask() { echo \"mount $1\" | ncat -U /run/lvm-cache-friend/socket | tail -n 1; }";
    let script = "case $(ask x) in 'ok '*) ;; *) exit 1; esac\nask /etc/x";
    let (_, output) = run(&host, ":rslave", &format!("{ask}\n{script}"));
    assert!(
        output.starts_with("error ") && output.contains("below /run/lvm-cache-friend"),
        "{output}"
    );
    let (_, output) = run(&host, "", &format!("{ask}\nask x"));
    assert!(
        output.starts_with("error ") && output.contains(":rslave"),
        "{output}"
    );
    if kind == Kind::Reflink {
        private_mounts(&host, ask);
    }
}

/// A program of root's makes all mounts of the host private, as mmdebstrap 1.5 does: a job that begins later is not hurt, one that
/// runs is told. Here in a mount namespace of the test's own.
fn private_mounts(host: &Host, ask: &str) {
    let make_private = || command::run("mount", ["--make-rprivate", "/"]);
    make_private();
    let (_, output) = run(host, ":rslave", &format!("{ask}\nask x"));
    assert!(output.starts_with("ok "), "{output}");
    let dir = Path::new("/run/lvm-cache-friend/mnt/job");
    let script =
        "cd /run/lvm-cache-friend; touch ready; until [ -e go ]; do sleep 0.1; done; ask x";
    let (_, output) = thread::scope(|scope| {
        let job = scope.spawn(|| run(host, ":rslave", &format!("{ask}\n{script}")));
        wait_until(|| dir.join("ready").exists());
        make_private();
        fs::write(dir.join("go"), "").unwrap();
        job.join().unwrap()
    });
    assert!(
        output.starts_with("error ") && output.contains("not shared any more"),
        "{output}"
    );
}
