// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two hosts that are two machines, with the cluster on one of them: the other one loses its power while both publish.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Test, Tier, test};
use crate::support::ceph;
use crate::support::command::sh;
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

const MIB: usize = 1 << 20;

fn a_host_loses_its_power() {
    let dir = temp_dir();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    let options = |side: &str, memory: &str| -> Vec<String> {
        let socket = dir.path().join("link");
        let link = format!("{side}:{}", socket.display());
        let options = [
            "--tree",
            "trixie-ceph",
            "--timeout",
            "3000",
            "--mem",
            memory,
            "--link",
            &link,
            "--share",
        ];
        options
            .map(str::to_owned)
            .into_iter()
            .chain([share.to_str().unwrap().to_owned()])
            .collect()
    };
    let both = |name: &str| dir.path().join(name);
    for name in ["one", "two"] {
        fs::create_dir(both(name)).unwrap();
    }
    let mut one = start_part(
        &both("one"),
        &options("listen", "4096"),
        "rbd::with_the_cluster",
    );
    let mut await_file = |name: &str| {
        let since = Instant::now();
        while !share.join(name).exists() {
            assert!(
                one.is_running() && since.elapsed() < 2 * LOST,
                "there is no {name}"
            );
            sleep(Duration::from_millis(100));
        }
    };
    await_file("ready");
    let mut two = start_part(
        &both("two"),
        &options("connect", "2048"),
        "rbd::without_power_soon",
    );
    await_file("published-3");
    // At any moment of its fourth lease.
    sleep(Duration::from_millis(u64::from(
        getrandom::u32().unwrap() % 4000,
    )));
    two.cut_power();
    File::create(share.join("cut")).unwrap();
    await_file("lost");
    let again = boot_part(&options("connect", "2048"), "rbd::with_power_again");
    print!("{}{}", again.stdout, again.stderr);
    assert_eq!(again.status, 0);
    File::create(share.join("over")).unwrap();
    assert!(one.wait().success());
}

/// In a guest, where the two meet.
fn shared(name: &str) -> PathBuf {
    Path::new("/share").join(name)
}

/// A job of this number's, of a host's; the entry that it leaves.
fn publish(plugin: &Plugin, host: &str, number: usize) -> String {
    let (name, save) = (format!("job{number}"), format!("linux {host}{number}"));
    plugin.create(&name, &json!({"restore": "linux", "save": save}));
    let at = plugin.mount(&name, "test");
    fs::write(at.join("content"), vec![fill(number); 4 * MIB]).unwrap();
    fs::write(at.join("number"), format!("{host}{number}")).unwrap();
    plugin.unmount(&name, "test");
    let mut entry = Value::Null;
    wait_until(|| {
        entry = plugin.status(&name)["last_lease"]["published"].clone();
        entry.is_string()
    });
    plugin.remove(&name);
    entry.as_str().unwrap().to_owned()
}

fn fill(number: usize) -> u8 {
    u8::try_from(number % 200 + 1).unwrap()
}

/// What an entry with these tags holds that a job left: whose it is, and that it is whole.
fn restored(plugin: &Plugin, tags: &str) -> String {
    plugin.create("look", &json!({"restore": tags}));
    let at = plugin.mount("look", "test");
    let whose = fs::read_to_string(at.join("number")).unwrap();
    let number = whose
        .trim_start_matches(char::is_alphabetic)
        .parse()
        .unwrap();
    let content = fs::read(at.join("content")).unwrap();
    assert!(
        content == vec![fill(number); 4 * MIB],
        "{whose} is not whole"
    );
    plugin.unmount("look", "test");
    plugin.remove("look");
    whose
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
        publish(plugin, "one", mine)
    };
    while !shared("cut").exists() {
        work();
    }
    let begun = Instant::now();
    work();
    println!("the first publish after the cut took {:?}", begun.elapsed());
    // What was published is served, and each is whole; of the one that was cut off there is nothing.
    let of_two = |plugin: &Plugin| {
        let published = fs::read_to_string(shared("published")).unwrap();
        let entries: Vec<&str> = published.lines().collect();
        for (number, entry) in entries.iter().enumerate() {
            let number = number + 1;
            assert_eq!(
                restored(plugin, &format!("two{number}")),
                format!("two{number}"),
                "{entry}"
            );
        }
        entries.len()
    };
    println!("{} entries of the other host", of_two(plugin));

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
    of_two(plugin);
    File::create(shared("lost")).unwrap();
    while !shared("over").exists() {
        assert!(
            begun.elapsed() < 3 * LOST,
            "the other host does not come back"
        );
        sleep(Duration::from_millis(200));
    }
    assert_eq!(restored(plugin, "two1000"), "two1000");
    one.stop();
}

/// The daemon of the second host.
fn second() -> Daemon {
    sh("cp -r /share/ceph/. /etc/ceph/ && modprobe rbd single_major=Y");
    let text = fs::read_to_string(shared("config.toml")).unwrap();
    let config = Path::new("/tmp/two.toml");
    fs::write(
        config,
        text.replace("\n[rbd]\n", "\n[rbd]\nhost = \"two\"\n"),
    )
    .unwrap();
    Daemon::start_with(config, Path::new(SOCKET), &[])
}

fn without_power_soon() {
    let two = second();
    // At whichever moment: this is lost.
    two.plugin().create("held", &json!({"save": "linux held"}));
    let at = two.plugin().mount("held", "test");
    fs::write(at.join("number"), "held1").unwrap();
    let mut published = File::options()
        .append(true)
        .create(true)
        .open(shared("published"))
        .unwrap();
    for number in 1.. {
        let entry = publish(two.plugin(), "two", number);
        writeln!(published, "{entry}").unwrap();
        File::create(shared(&format!("published-{number}"))).unwrap();
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
    println!("restored {}", restored(two.plugin(), "linux"));
    publish(two.plugin(), "two", 1000);
    two.stop();
}
