//! `podman build` in a container, whose store is a cache that the job asked for.

use std::fs;

use serde_json::Value;

use super::hooks::Hooks;
use super::{Body, Host};
use crate::support::command::run;
use crate::support::site::Kind;
use crate::support::{JOB_CLIENT, wait_until};

pub const BODIES: &[Body] = &[("nested_build", nested_build)];

/// The bit of CAP_SYS_ADMIN in the sets of `/proc/PID/status` (linux/capability.h).
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// What a job is run with: in a directory that its container has at `/src`.
struct Job<'a> {
    host: &'a Host,
    image: String,
    src: tempfile::TempDir,
}

impl Job<'_> {
    /// Builds an image whose third layer is made by `third`, in a container with 131,072 ids from `first` on; what the build said.
    fn build(&self, first: u32, third: &str) -> String {
        let containerfile = format!(
            "FROM localhost/busybox\nRUN echo one >/one && chown 12:34 /one\nCOPY two /two\nRUN {third}\n"
        );
        fs::write(self.src.path().join("Containerfile"), containerfile).unwrap();
        let script = format!(
            "cat /proc/self/uid_map
            grep ^Cap /proc/self/status
            export XDG_DATA_HOME=/run/lvm-cache-friend/containers
            printf 'mount containers\\n> podman\\n< podman\\n' | perl -e '{JOB_CLIENT}' /run/lvm-cache-friend/socket
            podman image exists localhost/busybox || podman load --quiet --input /src/busybox.tar
            podman build --tag app /src
            podman image inspect --format '{{{{.GraphDriver.Name}}}}' app"
        );
        let ids = format!("0:{first}:131072");
        let src = format!("{}:/src:ro", self.src.path().display());
        let perl = ["/usr/bin/perl", "/usr/lib/x86_64-linux-gnu/perl-base"]
            .map(|lent| format!("{lent}:{lent}:ro"));
        let options = [
            "run",
            "--rm",
            "--uidmap",
            &ids,
            "--gidmap",
            &ids,
            "-v",
            &src,
            "-v",
            &perl[0],
            "-v",
            &perl[1],
            "-v",
            "job:/run/lvm-cache-friend:rslave",
            &self.image,
            "sh",
            "-ec",
            &script,
        ];
        let last = || self.host.status("job")["last_lease"]["containers"].clone();
        let before = last();
        let said = self.host.podman.done(&options);
        println!("{said}");

        let mut words = said.split_whitespace();
        assert!(
            words
                .by_ref()
                .take(3)
                .eq(["0", &first.to_string(), "131072"])
        );
        let sets: Vec<_> = said
            .lines()
            .filter_map(|line| line.strip_prefix("Cap"))
            .collect();
        assert_eq!(sets.len(), 5, "{said}");
        for set in sets {
            let bits = set.split_whitespace().nth(1).unwrap();
            let bits = u64::from_str_radix(bits, 16).unwrap();
            assert_eq!(bits & CAP_SYS_ADMIN, 0, "{set}");
        }
        assert!(said.ends_with("\noverlay\n"), "{said}");

        let mut after = Value::Null;
        wait_until(|| {
            after = last();
            after["lv"].is_string() && after["lv"] != before["lv"]
        });
        assert!(after["published"].is_string(), "{after}");
        said
    }
}

fn nested_build(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    let image = run(
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/builder-image"),
        [""; 0],
    );
    let src = tempfile::tempdir_in("/run").unwrap();
    // Its user is another one on the host.
    run("chmod", ["755".as_ref(), src.path()]);
    fs::write(src.path().join("two"), "two").unwrap();
    let archive = src.path().join("busybox.tar");
    host.podman.done(&[
        "save",
        "--quiet",
        "--format",
        "oci-archive",
        "--output",
        archive.to_str().unwrap(),
        &host.podman.image,
    ]);
    host.podman
        .create("job", &["type=job", "owner=1001000:1001000"]);

    let job = Job {
        host: &host,
        image: image.trim().to_owned(),
        src,
    };
    let third = "cat /one /two >/three";
    let changed = "stat -c %u:%g /one && cat /one /two >/four";
    for (first, third, cached, said) in [
        (1_000_000, third, 0, ""),
        (1_000_000, third, 3, ""),
        // Only the last step is done again, on layers that another range of ids has written.
        (1_000_000, changed, 2, "\n12:34\n"),
    ] {
        let built = job.build(first, third);
        assert_eq!(built.matches("Using cache").count(), cached, "{built}");
        assert!(built.contains(said), "{built}");
    }
}
