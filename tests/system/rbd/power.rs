// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two hosts that are two machines, with the cluster on one of them: the other one loses its power while both publish.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Test, Tier, test};
use crate::powercut::{job, published, tell};
use crate::support::ceph;
use crate::support::command::sh;
use crate::support::content::{self, Content, Random};
use crate::support::daemon::{Daemon, Plugin, SOCKET};
use crate::support::site::{Kind, Site};
use crate::support::vm::{boot_part, start_part};
use crate::support::{temp_dir, wait_until};

pub fn tests() -> Vec<Test> {
    vec![
        test(
            Tier::Driver,
            "trixie-ceph::rbd::a_host_loses_its_power",
            a_host_loses_its_power,
        ),
        test(Tier::Part, "rbd::with_the_cluster", with_the_cluster),
        test(Tier::Part, "rbd::without_power_soon", without_power_soon),
        test(Tier::Part, "rbd::with_power_again", with_power_again),
    ]
}

/// Of the host that has the cluster (`tests/vm/run --link`).
const ADDRESS: &str = "10.0.3.1";

/// Until a host is lost: five minutes, on a machine that has as many to spare.
const LOST: Duration = Duration::from_secs(900);

/// The numbers of the second host's jobs begin behind this one.
const OF_TWO: u64 = 1000;

fn a_host_loses_its_power() {
    let dir = temp_dir();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    let options = |side: &str, memory: u32| -> Vec<String> {
        let [link, share] =
            ["link", "share"].map(|name| dir.path().join(name).display().to_string());
        let options = format!(
            "--tree trixie-ceph --timeout 3000 --mem {memory} --link {side}:{link} --share {share}"
        );
        options.split(' ').map(str::to_owned).collect()
    };
    // A guest's process id is in a directory of its own.
    let start = |name: &str, options: &[String], part: &str| {
        let dir = dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        start_part(&dir, options, part)
    };
    let mut one = start("one", &options("listen", 4096), "rbd::with_the_cluster");
    let mut await_it = |what: &str, so: &dyn Fn() -> bool| {
        let since = Instant::now();
        while !so() {
            assert!(one.is_running() && since.elapsed() < 2 * LOST, "not {what}");
            sleep(Duration::from_millis(100));
        }
    };
    await_it("ready", &|| share.join("ready").exists());
    let mut two = start("two", &options("connect", 2048), "rbd::without_power_soon");
    await_it("published", &|| published(&share).len() >= 3);
    // At any moment of its fourth lease.
    sleep(Duration::from_millis(Random::from_clock().below(4000)));
    two.cut_power();
    File::create(share.join("cut")).unwrap();
    await_it("lost", &|| share.join("lost").exists());
    let again = boot_part(&options("connect", 2048), "rbd::with_power_again");
    print!("{}{}", again.stdout, again.stderr);
    assert_eq!(again.status, 0);
    File::create(share.join("over")).unwrap();
    assert!(one.wait().success());
}

/// In a guest, where the two meet.
fn shared(name: &str) -> PathBuf {
    Path::new("/share").join(name)
}

/// Sees that the entry of a job is restored, and whole.
#[track_caller]
fn assert_restored(plugin: &Plugin, number: u64) {
    plugin.create("look", &json!({"restore": format!("job-{number}")}));
    let content = content::read(&plugin.mount("look", "test"));
    assert_eq!(content, Content::Whole(number));
    plugin.unmount("look", "test");
    plugin.remove("look");
}

/// The first host: it works on as if nothing were, and removes what the other one had.
fn with_the_cluster() {
    ceph::up_at(ADDRESS);
    let site = Site::new(Kind::Rbd);
    fs::copy(&site.config, shared("config.toml")).unwrap();
    sh("cp -r /etc/ceph /share/ceph");
    let one = site.serve();
    let plugin = one.plugin();
    File::create(shared("ready")).unwrap();
    let mut mine = 0;
    let mut work = || {
        mine += 1;
        job(plugin, |_| (), "job", mine);
    };
    while !shared("cut").exists() {
        work();
    }
    let begun = Instant::now();
    work();
    println!("the first publish after the cut took {:?}", begun.elapsed());
    // What was published is served, and each is whole; of the one that was cut off there is nothing.
    let see_those_of_two = || {
        let published = published(Path::new("/share"));
        for number in &published {
            assert_restored(plugin, *number);
        }
        published.len()
    };
    println!("{} entries of the other host", see_those_of_two());

    while !one.log().contains("a host is lost: what it had is removed") {
        assert!(begun.elapsed() < LOST, "it is not lost: {}", one.log());
        sleep(Duration::from_secs(1));
    }
    println!("lost after {:?}", begun.elapsed());
    let leases = || {
        let volumes = ceph::listed("volume").into_values();
        let of_two = volumes.filter(|volume| volume["host"] == "two");
        of_two
            .filter(|volume| !volume["tags"].to_string().contains("friend:cache:"))
            .count()
    };
    wait_until(|| leases() == 0);
    see_those_of_two();
    File::create(shared("lost")).unwrap();
    while !shared("over").exists() {
        assert!(
            begun.elapsed() < 3 * LOST,
            "the other host does not come back"
        );
        sleep(Duration::from_millis(200));
    }
    assert_restored(plugin, 2 * OF_TWO);
    one.stop();
}

/// The daemon of the second host.
fn second() -> Daemon {
    sh("cp -r /share/ceph/. /etc/ceph/ && modprobe rbd single_major=Y");
    let text = fs::read_to_string(shared("config.toml")).unwrap();
    let config = Path::new("/tmp/two.toml");
    fs::write(config, ceph::config_of("two", &text)).unwrap();
    Daemon::start_with(config, Path::new(SOCKET), &[])
}

fn without_power_soon() {
    let two = second();
    // At whichever moment: this is lost.
    two.plugin().create("held", &json!({"save": "linux held"}));
    let at = two.plugin().mount("held", "test");
    content::write(&at, OF_TWO);
    for number in OF_TWO + 1.. {
        job(two.plugin(), tell, "job", number);
    }
}

/// It knows that it was lost, and works on.
fn with_power_again() {
    let two = second();
    assert!(
        two.log().contains("another one took it for lost"),
        "{}",
        two.log()
    );
    let last = &two.plugin().status("held")["last_lease"];
    assert!(last["why"].as_str().unwrap().contains("lost"), "{last}");
    job(two.plugin(), tell, "job", 2 * OF_TWO);
    two.stop();
}
