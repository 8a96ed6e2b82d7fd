// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Thousands of entries at once: thin snapshots made by device-mapper messages, and one restore of LVM's metadata with
//! all of them. The daemon could make each of them too, but for hours.

use std::fmt::Write as _;
use std::fs;

use serde_json::json;

use crate::dm::Pool;
use crate::site::{POOL, Site, run};

/// Publishes one entry with the tag `entries` through the daemon, and copies it until there are `count`.
pub fn fill(site: &mut Site, count: usize) {
    site.start();
    let entry = site.publish("entries", crate::one_file);
    let origin = site.thin_id(&entry.name);
    // The pool has a device for messages only while a volume of it is active.
    site.create("holder", &json!({"restore": "entries"}));
    let mut pool = Pool::open(&site.vg, POOL).unwrap();
    let ids: Vec<u32> = (1..count)
        .map(|_| pool.create_snap(origin).unwrap())
        .collect();
    site.remove("holder");
    site.quiet();
    site.stop();

    let file = "/run/bench/metadata";
    run("vgchange", &["--quiet", "-an", &site.vg]);
    run("vgcfgbackup", &["--quiet", "-f", file, &site.vg]);
    let text = fs::read_to_string(file).unwrap();
    // Sections of volumes stand two tabs deep.
    let begin = text
        .find(&format!("\n\t\t{} {{\n", entry.name))
        .expect("the entry's section")
        + 1;
    let end = begin + text[begin..].find("\n\t\t}\n").expect("its end") + "\n\t\t}\n".len();
    let section = &text[begin..end];
    let value = |key: &str| {
        let at = section.find(key).expect(key) + key.len();
        section[at..].lines().next().unwrap().to_owned()
    };
    let (id, device) = (value("id = "), value("device_id = "));
    let mut sections = String::new();
    for (n, thin) in ids.iter().enumerate() {
        let copy = section
            .replacen(&entry.name, &format!("friend-bench-{n:05}"), 1)
            .replacen(
                &id,
                &format!("\"bench0-0000-0000-0000-0000-0000-{n:06}\""),
                1,
            )
            .replacen(
                &format!("device_id = {device}"),
                &format!("device_id = {thin}"),
                1,
            )
            // The one that was published through the daemon stays the only that matches.
            .replacen(
                "friend:cache:entries",
                &format!("friend:cache:other-{n}"),
                1,
            );
        sections.write_str(&copy).unwrap();
    }
    let metadata = [&text[..end], &sections, &text[end..]].concat();
    fs::write(file, metadata).unwrap();
    run(
        "vgcfgrestore",
        &["--quiet", "--yes", "--force", "-f", file, &site.vg],
    );
    site.start();
    site.quiet();
    let listed = site
        .program(&["list", "--json"])
        .matches("\"entry\"")
        .count();
    assert_eq!(listed, count, "entries listed");
}
