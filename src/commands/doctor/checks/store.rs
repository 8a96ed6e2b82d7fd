// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The store: whether it is there, how full it is, and what is left over in it.

use super::super::facts::{Daemon, Facts};
use super::{Judged, note, ok, or_ok, settings, skipped, unconfigured, wrong};
use crate::cache::evict::Bound;
use crate::config::{Lvm, StoreConfig};

pub fn store(facts: &Facts) -> Vec<Judged> {
    match (&facts.store, settings(facts)) {
        (Some(Ok(_)), Some(settings)) => vec![ok(settings.store.to_string())],
        (Some(Err(why)), Some(settings)) => {
            let fix = match &settings.store {
                StoreConfig::Lvm(lvm) => format!(
                    "check `vgs {vg}` and `lvs {vg}` for a missing disk or a renamed group; `init` again creates what is missing",
                    vg = lvm.vg
                ),
                StoreConfig::Reflink(reflink) => {
                    format!("make sure that {} is mounted", reflink.dir.display())
                }
                StoreConfig::Rbd(rbd) => format!(
                    "see whether `ceph --id {user} -s` and `rbd --id {user} ls {pool}` answer on this host; docs/fleet.md has what it needs",
                    user = rbd.user,
                    pool = rbd.pool
                ),
            };
            vec![wrong(why, fix)]
        }
        _ => unconfigured(),
    }
}

pub fn pool(facts: &Facts) -> Vec<Judged> {
    let Some(Ok(store)) = &facts.store else {
        return vec![skipped("the store cannot be read")];
    };
    let Some(settings) = settings(facts) else {
        return unconfigured();
    };
    let room = |bound| {
        match (&settings.store, bound) {
        (StoreConfig::Reflink(_), _) => "free space on that file system".to_owned(),
        (StoreConfig::Rbd(rbd), _) => format!(
            "give pool {} a larger quota, or the cluster more disks (`ceph df detail` says which)",
            rbd.pool.pool
        ),
        (StoreConfig::Lvm(Lvm { vg, pool, .. }), Bound::Data) => {
            format!("lvextend --size +SIZE {vg}/{pool}")
        }
        (StoreConfig::Lvm(Lvm { vg, pool, .. }), Bound::Metadata) => {
            format!("lvextend --poolmetadatasize +SIZE {vg}/{pool}")
        }
        (StoreConfig::Lvm(_), Bound::Group) => {
            "set policy.max-entries (a group's metadata area cannot grow; a new group can have more, by --metadatasize)".to_owned()
        }
    }
    };
    let full = &store.capacity;
    let mut found = Vec::new();
    for (bound, space, floor) in full.fill().bounds(&settings.policy) {
        let finding = format!(
            "{:.1} % of {} for {bound} is used",
            space.percent, space.size
        );
        let fix = format!("remove entries, or {}", room(bound));
        if space.is_full() {
            let limit = space.limit;
            let finding = format!("{finding}; from {limit:.0} % on, no volume is made");
            found.push(wrong(finding, fix));
        } else if space.missing(floor) > 0 {
            let mark = space.mark(floor);
            found.push(note(
                format!("{finding}: entries should have been evicted down to {mark:.0} %"),
                format!("see what may be evicted with lvm-cache-friend gc --dry-run; {fix}"),
            ));
        }
    }
    if let (Some(when_full), StoreConfig::Lvm(lvm)) = (&store.when_full, &settings.store)
        && when_full != "error"
    {
        found.push(wrong(
            format!("writes to a full pool hang for a minute ({when_full}) instead of failing"),
            format!("lvchange --errorwhenfull y {}/{}", lvm.vg, lvm.pool),
        ));
    }
    let troubles = store.troubles.iter();
    found.extend(troubles.map(|trouble| wrong(&trouble.finding, &trouble.fix)));
    if let Some(drawback) = &store.drawback {
        found.push(note(
            drawback,
            "optional: an lvm2 built with its shell makes creating, publishing and removing faster",
        ));
    }
    let size = full.data_size;
    or_ok(found, format!("{:.1} % of {size} used", full.data_percent))
}

pub fn leftovers(facts: &Facts) -> Vec<Judged> {
    let Some(Ok(store)) = &facts.store else {
        return vec![skipped("the store cannot be read")];
    };
    let unclear = store.unclear.iter().map(|(lv, why)| {
        wrong(
            format!("{lv} has contradictory friend: tags, and is left alone: {why}"),
            "remove its friend: tags with lvchange --deltag, or remove the volume",
        )
    });
    let mut found: Vec<_> = unclear.collect();
    let away = !matches!(facts.daemon, Daemon::Runs { .. });
    for (count, what) in [
        (store.doomed, "marked for removal"),
        (store.making, "being imported, or left over from an import"),
    ] {
        if count > 0 {
            let fix = if away {
                "start the daemon, which removes them"
            } else {
                "nothing, if the number drops shortly; otherwise look into the daemon's log"
            };
            found.push(note(format!("{count} {what}"), fix));
        }
    }
    or_ok(found, "none")
}

/// Of a store on Ceph: what the cluster's state is, and that of the images.
pub fn ceph(facts: &Facts) -> Vec<Judged> {
    let Some(Ok(store)) = &facts.store else {
        return Vec::new();
    };
    let Some(report) = &store.ceph else {
        return Vec::new();
    };
    let mut found = Vec::new();
    if let Some(grant) = &report.refused {
        found.push(wrong(
            format!(
                "client.{} may read the store, and not change it",
                report.user
            ),
            format!("an administrator of the cluster grants that: {grant}"),
        ));
    }
    if report.user == "admin" {
        found.push(note(
            "the daemon is client.admin, who may do everything in the cluster",
            "give it a user of its own, and name that in [rbd]: docs/fleet.md",
        ));
    }
    let monitors = &report.monitors;
    let away: Vec<_> = monitors.iter().filter(|(_, there)| !there).collect();
    if !away.is_empty() {
        let names: Vec<_> = away.iter().map(|(name, _)| name.as_str()).collect();
        found.push(note(
            format!(
                "of {} monitors {} are not in the quorum: {}",
                monitors.len(),
                away.len(),
                names.join(", ")
            ),
            "see `ceph -s`",
        ));
    }
    let (deep, from) = report.deep;
    if deep > 0 {
        found.push(note(
            format!(
                "{deep} of {} images are {from} or more clones deep ({} at most; Linux follows 16): to flatten them copies {}",
                report.images, report.deepest, report.to_copy
            ),
            "nothing: each is flattened in the background once it is cloned again, a few objects at a time",
        ));
    }
    or_ok(
        found,
        format!(
            "client.{}, host {}, librbd {}, OSDs of {} or later, monitors: {}; {} images, at most {} clones deep",
            report.user,
            report.host,
            report.librbd,
            report.release,
            monitors
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
            report.images,
            report.deepest
        ),
    )
}
