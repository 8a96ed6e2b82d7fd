// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the documents show of Podman, as it stands there but for IMAGE and the work that jobs do.

use super::{Body, Host};
use crate::docs::{block, type_in};
use crate::support::site::Kind;
use crate::support::wait_until;

pub const BODIES: &[Body] = &[
    ("as_documented", as_documented),
    ("job_volumes_as_documented", job_volumes_as_documented),
];

fn as_documented(kind: Kind) {
    let host = Host::new(kind);
    run(&host, &block("glance"), "date > /cache/file");
    wait_until(|| host.entries_tagged(&["linux", "dc5e8c"]).len() == 1);
    host.podman.create("try", &["restore=linux"]);
    run(&host, &block("annotation"), "cat /cache/file");
}

/// Types a block in, with a job for its IMAGE.
fn run(host: &Host, block: &str, job: &str) {
    let script = format!("{} sh -ec '{job}'", host.podman.image);
    let block = block.replace("IMAGE make", &script);
    type_in(&block.replace("IMAGE", &script));
}

fn job_volumes_as_documented(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    run(
        &host,
        &block("job-volume"),
        "test -S /run/lvm-cache-friend/socket",
    );
    let in_job = |script: &str| {
        let mut options = vec!["-v", "job1:/run/lvm-cache-friend:rslave"];
        // The image has neither ncat nor what it needs.
        for lent in ["/usr:/usr:ro", "/lib:/lib:ro", "/lib64:/lib64:ro"] {
            options.extend(["-v", lent]);
        }
        podman.sh_with(
            &options,
            &format!("PATH=/bin:/usr/bin; cd /tmp; touch Cargo.lock\n{script}"),
        )
    };
    let build = "date > ~/.cargo/registry/crate\n[ -L ~/.cargo/registry ]";
    in_job(&block("client").replace("cargo build", build));
    in_job(&block("ncat"));

    podman.done(&["volume", "rm", "job1"]);
    run(
        &host,
        &block("nested-volume"),
        "grep -q \" 131072$\" /proc/self/uid_map",
    );
}
