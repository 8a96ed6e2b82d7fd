// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Jobs with `container:`, `services:` and Docker actions, by the Podman in their runner's container.

use super::{Fake, Kind, MAIN, Place, REPOSITORY, Registry, image, story};
use crate::docs::block;
use crate::support::command::run;

/// What the runner would call, as functions of a shell's.
const CALLS: &str = include_str!("containers.sh");

/// The pool of docs/supervisor.md's quick start, and what that page adds to it, with runners of this image.
pub fn pool(fake: &Fake, image: &str) -> String {
    let file = format!("{:?}", fake.file("token"));
    let networks = block("networks-of-containers");
    let (_, networks) = networks.split_once("[supervise.pool.container]\n").unwrap();
    let tmpfs = "tmpfs = [\"/tmp\", \"/var/tmp\", \"/run/runner\"]\n";
    story::replaced(
        &story::at(fake, image, &story::pool()),
        &[
            ("\"/etc/lvm-cache-friend/github-token\"", &file),
            (tmpfs, &format!("{tmpfs}{networks}")),
        ],
    )
}

pub fn containers(kind: Kind) {
    if kind != Kind::Reflink {
        // There is no udev that would make the device.
        run("modprobe", ["tun"]);
    }
    let mut place = Place::configured(kind, |fake| pool(fake, &image("runner-image podman")));
    // Pulled as from anywhere else, over the host's network.
    let registry = Registry::start();
    registry.push(&place.host.podman.image);
    let host = registry.image.split('/').next().unwrap();
    let trusted = format!("[[registry]]\nlocation = '{host}'\ninsecure = true\n");
    let calls = CALLS
        .replace("_IMAGE_", "_")
        .replace("IMAGE", &registry.image)
        .replace(
            "NAME/NAME",
            &format!("{0}/{0}", REPOSITORY.rsplit('/').next().unwrap()),
        );
    for job in ["in_container", "beside"] {
        let script = format!(
            "PATH=$PATH:/run/lvm-cache-friend/bin\nmkdir -p ~/.config/containers\necho \"{trusted}\" >~/.config/containers/registries.conf\n{calls}\nset -x\n{job}"
        );
        let id = place.fake.queue(&MAIN, &script);
        let result = place.ended(id);
        assert_eq!(result, "succeeded", "{job}: {}", place.log(id));
        // What a step in its container and an action wrote is one entry, which the next job has.
        place.published(1);
    }
    place.finish();
}
