// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The block devices that caches are on, which containers have not.

use super::{Body, Host};
use crate::support::command::run;
use crate::support::site::{Kind, MOUNT_DIR};

pub const BODIES: &[Body] = &[("raw_devices", raw_devices)];

/// Whatever a job tries, it gets to the file system of its cache alone, not to the block device below that.
fn raw_devices(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    podman.create("cache", &[]);
    podman.start("user", "cache", "echo x >/cache/x");
    let mount = format!("{MOUNT_DIR}/cache");
    let source = run(
        "findmnt",
        [
            "--noheadings",
            "--nofsroot",
            "--first-only",
            "--output",
            "SOURCE",
            &mount,
        ],
    );
    let device = run("realpath", [source.trim()]);
    let device = device.trim();
    let number = run("stat", ["--format", "%Hr %Lr", device]);
    let node = |place: &str| format!("mknod {place} b {}", number.trim());
    let reads = |place: &str| format!("dd if={place} of=/dev/null bs=512 count=1");

    assert_eq!(podman.exec("user", "find /dev -type b"), "");
    let refused = |options: &[&str], script: &str, words: &str| {
        let outcome = podman.outcome(&podman.run_sh(options, script));
        assert!(
            outcome.status != 0 && outcome.stderr.contains(words),
            "{options:?} {script}: {outcome:?}"
        );
    };
    let cache = ["-v", "cache:/cache"];
    refused(&cache, &node("/tmp/node"), "not permitted");
    refused(&cache, &node("/cache/node"), "not permitted");
    let makes = ["-v", "cache:/cache", "--cap-add", "MKNOD"];
    // What it can make in its cache has no effect there, so none for a job that restores that, either.
    refused(
        &makes,
        &format!("{}; {}", node("/cache/node"), reads("/cache/node")),
        "denied",
    );
    if kind != Kind::Reflink {
        // Elsewhere it is the container's control group that refuses.
        let made = format!("{}; {}", node("/dev/node"), reads("/dev/node"));
        refused(&makes, &made, "not permitted");
    }
    // It takes an option that is set on the host.
    let given = format!("{device}:/dev/raw");
    podman.sh_with(&["--device", &given], &reads("/dev/raw"));
    podman.end(&["user"]);
}
