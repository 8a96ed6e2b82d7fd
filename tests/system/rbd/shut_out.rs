// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hosts whose kernel's client does not answer, or is on the cluster's blocklist. Nothing that another host does, or their own daemon,
//! puts them there.

use std::fs::File;
use std::io::Write as _;
use std::thread;
use std::time::Duration;

use lvm_cache_friend::storage::{Store as _, StoreError};
use serde_json::{Value, json};

use super::{ENTRY, Namespace, another_host, lv, new, open, reads, write};
use crate::support::ceph::{self, Away, Blocklisted};
use crate::support::command::run;
use crate::support::content::{self, Content};
use crate::support::site::{Kind, Site};
use crate::support::wait_until;

pub const TESTS: [(&str, fn()); 3] = [
    ("a_kernel_that_was_away", a_kernel_that_was_away),
    ("deep_of_another_host", deep_of_another_host),
    ("blocklisted", blocklisted),
];

const LEASE: &[&str] = &["friend:snapshot", "friend:volume:v"];

/// A host's kernel has no connection, for longer than the cluster takes it for alive. Its own daemon publishes, from before that on, and
/// another host removes an entry that is a snapshot of what it has mapped: neither takes its lock, for which librbd has a client shut
/// out. Once it is back its job goes on, the entry is published, and its daemon removes what the other host left.
fn a_kernel_that_was_away() {
    let _namespace = Namespace::fresh();
    let (one, two) = (open(), another_host());
    one.join().unwrap();
    two.join().unwrap();
    let base = one.list().unwrap().lvs[0].name.clone();
    let device = one.snapshot(&base, &new("lease", LEASE, true));
    let device = device.unwrap().unwrap();
    write(&device, 1).unwrap();
    let image = ceph::image_of(&ceph::listed("volume")["lease"])
        .0
        .to_owned();
    one.snapshot(&lv("lease"), &new("old", ENTRY, false))
        .unwrap();
    // It has its lock again.
    write(&device, 2).unwrap();
    let snapshots = || -> Vec<String> {
        let image = &ceph::listed("image")[&image];
        let snapshots = image["snapshots"].as_object().into_iter().flatten();
        snapshots.map(|(name, _)| name.clone()).collect()
    };
    let [old] = &snapshots()[..] else {
        panic!("one entry has one snapshot");
    };

    let away = Away::of_the_kernel();
    let watchers = || {
        let said = ceph::rbd(&["status", "--format", "json", &format!("rbd/caches/{image}")]);
        let said: Value = serde_json::from_str(&said).unwrap();
        said["watchers"].as_array().unwrap().len()
    };
    thread::scope(|scope| {
        // When the kernel tries again is its own affair.
        let published = scope.spawn(|| {
            loop {
                match one.snapshot(&lv("lease"), &new("young", ENTRY, false)) {
                    Err(StoreError::Timeout { .. }) => {}
                    done => return done,
                }
            }
        });
        wait_until(|| watchers() == 0);
        two.change_tags(&lv("old"), &["friend:doomed".parse().unwrap()], &[])
            .unwrap();
        two.remove(&lv("old")).unwrap();
        two.clear_away().unwrap();
        assert_eq!(snapshots(), std::slice::from_ref(old));
        thread::sleep(Duration::from_secs(3));
        assert!(!published.is_finished(), "the kernel has what was written");
        drop(away);
        published.join().unwrap().unwrap();
    });
    write(&device, 3).unwrap();
    let kernel = &ceph::clients()[&ceph::kernel().unwrap()];
    let listed = run("ceph", ["osd", "blocklist", "ls"]);
    assert!(!listed.contains(kernel), "{kernel} {listed}");
    wait_until(|| !snapshots().contains(old));
    let copy = two.snapshot(&lv("young"), &new("copy", LEASE, true));
    let copy = copy.unwrap().unwrap();
    for byte in [1, 2] {
        reads(&copy, byte);
    }
}

/// An entry that is a snapshot of what another host writes to, on more parents than the kernel follows: not that is flattened, but the
/// copy, before it is mapped.
fn deep_of_another_host() {
    let _namespace = Namespace::fresh();
    let (one, two) = (open(), another_host());
    let base = one.list().unwrap().lvs[0].name.clone();
    let device = one.snapshot(&base, &new("lease", LEASE, true));
    write(&device.unwrap().unwrap(), 1).unwrap();
    let entry = lv("entry");
    one.snapshot(&lv("lease"), &new(entry.as_str(), ENTRY, false))
        .unwrap();
    let image_of = |name: &str| ceph::image_of(&ceph::listed("volume")[name]).0.to_owned();
    // As far as the index goes. What another host makes nobody collects.
    let base = image_of(base.as_str());
    let mut of_base = ceph::listed("image")[&base].clone();
    let shallow = of_base.to_string();
    of_base["parent"] = json!({"image": "none~0", "snapshot": "s"});
    for number in 0..14 {
        let parent = json!({"image": format!("none~{}", number + 1), "snapshot": "s"});
        let maker = json!({"host": "three", "process": "0123456789abcdef.1"});
        let image = json!({"maker": maker, "parent": parent});
        ceph::set_key(&format!("image/none~{number}"), &image.to_string());
    }
    ceph::set_key(&format!("image/{base}"), &of_base.to_string());

    let device = two.snapshot(&entry, &new("copy", LEASE, true));
    reads(&device.unwrap().unwrap(), 1);
    let has_parent = |name: &str| {
        let image = image_of(name);
        let info = ceph::rbd(&["info", &format!("rbd/caches/{image}")]);
        let known = ceph::listed("image")[&image]["parent"].is_object();
        assert_eq!(info.contains("parent: "), known, "{info}");
        known
    };
    assert!(has_parent("lease") && !has_parent("copy"));
    ceph::set_key(&format!("image/{base}"), &shallow);
}

/// The cluster shuts the kernel's client out: a job's writes fail, nothing of it is published, and who asks for more is told why.
/// Then the daemon's: what a job wrote is published by the next daemon. One that starts serves, with both still on the blocklist.
fn blocklisted() {
    let site = Site::new(Kind::Rbd);
    let others = ceph::clients();
    let daemon = site.serve();
    let plugin = daemon.plugin();
    plugin.create("job", &json!({"save": "linux"}));
    let at = plugin.mount("job", "x");
    content::write(&at, 1);
    let kernel = ceph::kernel().unwrap();
    let kernels = Blocklisted::new(&ceph::clients()[&kernel]);
    let fails = || {
        let mut file = File::create(at.join("more"))?;
        file.write_all(b"more")?;
        file.sync_all()
    };
    wait_until(|| fails().is_err());
    plugin.unmount("job", "x");
    let last = || plugin.status("job")["last_lease"].clone();
    wait_until(|| !last().is_null());
    assert_eq!(last()["published"], Value::Null, "{}", last());
    let mount = json!({"Name": "job", "ID": "y"});
    let said = plugin.refused("VolumeDriver.Mount", &mount);
    assert!(said.contains("blocklist"), "{said}");
    daemon.stop();

    let daemon = site.serve();
    let plugin = daemon.plugin();
    wait_until(|| plugin.call("VolumeDriver.Mount", &mount).0 == 200);
    let now = ceph::kernel().unwrap();
    assert_ne!(now, kernel);
    let at = plugin.mount("job", "y");
    content::write(&at, 2);
    let clients = ceph::clients();
    let its = clients
        .iter()
        .find(|(id, _)| !others.contains_key(*id) && **id != now && **id != kernel);
    let daemons = Blocklisted::new(its.unwrap().1);
    let create = json!({"Name": "late", "Opts": {}});
    let said = plugin.refused("VolumeDriver.Create", &create);
    assert!(said.contains("blocklist"), "{said}");
    plugin.unmount("job", "y");
    daemon.kill();

    let daemon = site.serve();
    let plugin = daemon.plugin();
    wait_until(|| plugin.status("job")["last_lease"]["published"].is_string());
    plugin.create("next", &json!({"restore": "linux"}));
    let read = content::try_read(&plugin.mount("next", "z"));
    assert_eq!(read.unwrap(), Content::Whole(2));
    plugin.unmount("next", "z");
    drop((kernels, daemons));
    daemon.stop();
}
