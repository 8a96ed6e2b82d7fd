//! What the documents show of Podman, as it stands there but for IMAGE and the job.

use super::{Body, Host};
use crate::docs::{block, type_in};
use crate::support::site::Kind;
use crate::support::wait_until;

pub const BODIES: &[Body] = &[("as_documented", as_documented)];

fn as_documented(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    let job = |block: String| {
        type_in(&block.replace("IMAGE", &podman.image).replace(
            " make",
            " sh -c 'touch /cache/file || ls /run/lvm-cache-friend/socket'",
        ))
    };
    job(block("glance"));
    wait_until(|| host.entries_tagged(&["linux", "dc5e8c"]).len() == 1);
    podman.create("try", &["restore=linux"]);
    job(block("annotation"));
    podman.done(&["volume", "rm", "job1"]);
    let said = job(block("job-volume"));
    assert!(said.contains("/run/lvm-cache-friend/socket"), "{said}");

    // Pods take cgroups.
    if kind == Kind::Lvm {
        podman.done(&["tag", &podman.image, "docker.io/library/busybox"]);
        type_in(&block("kube"));
        podman.done(&["wait", "kube-job-job"]);
        podman.done(&["pod", "rm", "--force", "kube-job"]);
        wait_until(|| host.entries_tagged(&["linux", "main"]).len() == 1);
    }
}
