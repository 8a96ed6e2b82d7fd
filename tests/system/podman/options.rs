// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options, through all the ways that Podman has for them.

use std::collections::BTreeSet;
use std::fs;

use serde_json::json;

use super::{Body, Host};
use crate::support::podman::{DRIVER, Service, create};
use crate::support::site::{Kind, MOUNT_DIR};

pub const BODIES: &[Body] = &[("options", options), ("malformed_options", malformed)];

/// What options do in the container.
fn options(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    let volumes = [
        ("xfs", &["size=2G", "owner=1000:1000", "mode=0700"][..]),
        (
            "ext4",
            &["fs=ext4", "size=400M", "owner=1000:1000", "mode=0700"],
        ),
        ("o", &["o=fs=ext4,size=400M,owner=1000:1000,mode=0700"]),
        // As a Quadlet's User= and Group= come.
        (
            "quadlet",
            &[
                "o=uid=1000,gid=1000,size=2G",
                "mode=0700",
                "type=cache",
                "device=none",
            ],
        ),
    ];
    for (volume, options) in volumes {
        podman.create(volume, options);
    }
    // As a PersistentVolumeClaim has it.
    let yaml = host.site.dir.path().join("claim.yaml");
    let claim = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": "claim",
            "annotations": {
                "volume.podman.io/driver": DRIVER,
                "volume.podman.io/mount-options": "fs=ext4,size=400M,owner=1000:1000,mode=0700,restore=linux; mac*,save=linux",
            },
        },
    });
    fs::write(&yaml, claim.to_string()).unwrap();
    podman.done(&["kube", "play", yaml.to_str().unwrap()]);

    let names: Vec<_> = volumes
        .iter()
        .map(|(name, _)| *name)
        .chain(["claim"])
        .collect();
    let mounts: Vec<_> = names
        .iter()
        .map(|name| format!("{name}:/c/{name}"))
        .collect();
    let mut arguments = vec!["--user", "1000:1000"];
    for mount in &mounts {
        arguments.extend(["-v", mount]);
    }
    let said = podman.sh_with(
        &arguments,
        "for v in /c/*; do
            [ -z \"$(ls -A $v)\" ]
            echo mine > $v/file
            mount=$(grep \" $v \" /proc/self/mountinfo)
            set -- ${mount#* - }
            echo ${v#/c/} $(stat -c '%u:%g %a' $v) $1 $(df -Pm $v | awk 'END { print ($2 > 1024) }')
            echo \"$mount\" | grep -q nosuid,nodev
        done",
    );
    assert_eq!(
        said,
        "claim 1000:1000 700 ext4 0\n\
         ext4 1000:1000 700 ext4 0\n\
         o 1000:1000 700 ext4 0\n\
         quadlet 1000:1000 700 xfs 1\n\
         xfs 1000:1000 700 xfs 1\n"
    );
}

/// What is refused, by name and with what is accepted, and leaves nothing.
fn malformed(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    let directories = || -> BTreeSet<_> {
        [MOUNT_DIR, "/var/lib/containers/storage/volumes"]
            .into_iter()
            .filter_map(|dir| fs::read_dir(dir).ok())
            .flatten()
            .map(|entry| entry.unwrap().path())
            .collect()
    };
    let before = (host.site.everything(), directories());
    podman.fails(
        &create(DRIVER, "refused", &["colour=red"]),
        125,
        &["option colour", "restore, save"],
    );
    podman.fails(
        &create(DRIVER, "refused", &["o=owner=root"]),
        125,
        &["option owner", "root"],
    );
    {
        let service = Service::start();
        for (options, words) in [
            ("o=save=x,colour=red", &["colour", "restore, save"][..]),
            ("size=much", &["size", "much"]),
            ("size=-1G", &["size"]),
            ("size=1", &["size"]),
            ("restore=a b; c**", &["restore", "c**"]),
            ("restore=ärger", &["restore"]),
            ("save=a*", &["save", "a*"]),
            ("owner=root", &["owner", "root"]),
            ("mode=0999", &["mode", "0999"]),
            ("fs=btrfs", &["fs", "xfs, ext4"]),
            ("publish=sometimes", &["publish", "unless-failed"]),
            ("on-miss=cry", &["on-miss", "base, empty, fail"]),
            ("on-error=ignore", &["on-error", "fail, scratch"]),
            ("reuse=maybe", &["reuse", "fresh, keep"]),
            ("scope=a b", &["scope"]),
            ("read-scopes=a;b", &["read-scopes"]),
            ("type=tmpfs", &["type", "cache, job"]),
            ("on-miss=fail", &["on-miss", "restore"]),
            ("o=inodes=5", &["inodes"]),
            ("save=x\no=save=y", &["save"]),
        ] {
            let (status, answer) = service.create("refused", &options.lines().collect::<Vec<_>>());
            let said = answer["message"].as_str().unwrap_or_default();
            assert!(
                status >= 400 && said.contains("option "),
                "{options}: {status} {answer}"
            );
            for word in words {
                assert!(said.contains(word), "{options}: {word:?} is not in {said}");
            }
        }
    }
    assert!(podman.volumes().is_empty());
    assert!(host.daemon().plugin().names().is_empty());
    assert_eq!((host.site.everything(), directories()), before);
    // The name is free.
    podman.create("refused", &[]);
}
