// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `podman build` in a container, whose store is a cache that the job asked for.

use std::fs;
use std::path::Path;

use super::hooks::Hooks;
use super::{Body, Host, ended_after};
use crate::docs::block;
use crate::support::command::run;
use crate::support::image;
use crate::support::site::Kind;

pub const BODIES: &[Body] = &[("nested_build", nested_build)];

/// The bit of CAP_SYS_ADMIN in the sets of `/proc/PID/status` (linux/capability.h).
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// What the user `builder` runs: as documented, but that the image to build on is there, as from a registry.
fn script() -> String {
    let build = block("nested-job").replace(
        "podman build",
        "podman image exists localhost/busybox || podman load --quiet --input busybox.tar\npodman build",
    );
    format!(
        "cat /proc/self/uid_map
        grep ^Cap /proc/self/status
        cd /src
        {build}
        podman image inspect --format 'driver={{{{.GraphDriver.Name}}}}' app"
    )
}

fn nested_build(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    builds(&host, &[]);
}

/// The same image, changed a little, in one job after the other, whose containers have these options more.
pub fn builds(host: &Host, options: &[&str]) {
    let podman = &host.podman;
    let image = image("builder-image");
    let src = tempfile::tempdir_in("/run").unwrap();
    let src = src.path();
    // Its reader is another user on this host.
    run("chmod", ["755".as_ref(), src]);
    let archive = src.join("busybox.tar");
    let archive = archive.to_str().unwrap();
    podman.done(&["save", "--quiet", "--output", archive, &podman.image]);
    fs::write(src.join("two"), "two").unwrap();
    podman.create("job", &["type=job", "owner=1000:1000"]);

    let third = "cat /one /two >/three";
    let changed = "stat -c %u:%g /one && cat /one /two >/four";
    for (first_id, third, cached, said) in [
        (1_000_000, third, 0, ""),
        (3_000_000, third, 3, ""),
        // Only the last step is done again. What users of the first range own, users of this range do.
        (5_000_000, changed, 2, "\n12:34\n"),
    ] {
        let containerfile = format!(
            "FROM localhost/busybox\nRUN echo one >/one && chown 12:34 /one\nCOPY two /two\nRUN {third}\n"
        );
        fs::write(src.join("Containerfile"), containerfile).unwrap();
        let built = job(host, &image, src, first_id, options);
        assert_eq!(built.matches("Using cache").count(), cached, "{built}");
        assert!(built.contains(said), "{built}");
    }
}

/// Runs [`script`] in a container that has 131,072 ids from `first_id` on; what it said.
fn job(host: &Host, image: &str, src: &Path, first_id: u32, options: &[&str]) -> String {
    let last = || host.status("job")["last_lease"]["containers"].clone();
    let before = last();
    let ids = format!("0:{first_id}:131072");
    let ids = ["--uidmap", &ids, "--gidmap", &ids];
    // Under SELinux, a label that the job may read.
    let src = format!("{}:/src:ro,z", src.display());
    let volumes = ["-v", &src, "-v", "job:/run/lvm-cache-friend:rslave"];
    let script = script();
    let tail = [image, "sh", "-ec", &script];
    let said = host
        .podman
        .done(&[&["run", "--rm"], &ids[..], &volumes, options, &tail].concat());

    let uid_map: Vec<_> = said.split_whitespace().take(3).collect();
    assert_eq!(uid_map, ["0", &first_id.to_string(), "131072"]);
    let sets: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("Cap"))
        .collect();
    assert_eq!(sets.len(), 5, "{said}");
    for set in sets {
        let bits = set.split_whitespace().last().unwrap();
        let bits = u64::from_str_radix(bits, 16).unwrap();
        assert_eq!(bits & CAP_SYS_ADMIN, 0, "{set}");
    }
    assert!(said.ends_with("\ndriver=overlay\n"), "{said}");

    let after = ended_after(&before, last);
    assert!(after["published"].is_string(), "{after}");
    said
}
