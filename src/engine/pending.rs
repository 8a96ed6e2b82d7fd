// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tags of leases that the store does not have yet.
//!
//! That an LV is leased, and that the work in it has failed, is written to the store behind the answer, and may wait there
//! for a lock for as long as others hold it. A daemon that ends meanwhile would leave an LV that nothing shows to be a
//! lease's, and its next life would give up what was written. So these tags are kept in a directory beside that of the mounts,
//! a file for each LV, from before the answer until the store has them. The next start reads them. They never speak against the
//! store: only an LV that is a volume's, and of no other lease, takes tags from here, and only in the boot that they were written in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::{info, warn};

use super::lock;
use crate::cache::names::{LvName, Tag};
use crate::cache::record::Role;
use crate::cache::tags::MAKING;
use crate::storage::Listing;

/// The tags, in memory and on files.
#[derive(Debug)]
pub(super) struct Pending {
    dir: PathBuf,
    boot: String,
    tags: Mutex<BTreeMap<LvName, BTreeSet<Tag>>>,
}

impl Pending {
    /// Of the daemon that has `mounts` for its mount directory, in the boot `boot`, as earlier lives left them.
    pub fn read(mounts: &Path, boot: &str) -> Self {
        let mut name = mounts.file_name().unwrap_or_default().to_owned();
        name.push(".pending");
        let dir = mounts.with_file_name(name);
        let mut tags = BTreeMap::new();
        for file in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = file.path();
            match file.file_name().to_str().and_then(|name| name.parse().ok()) {
                Some(lv) if let Some(of) = read(&path, boot) => drop(tags.insert(lv, of)),
                // Half written, or of another boot: what was mounted then is cut short anyhow.
                _ => drop(fs::remove_file(&path)),
            }
        }
        Self {
            dir,
            boot: boot.to_owned(),
            tags: Mutex::new(tags),
        }
    }

    /// Keeps in mind that the store is to have a tag on `lv`.
    pub fn add(&self, lv: &LvName, tag: Tag) {
        let mut tags = lock(&self.tags);
        if tags.entry(lv.clone()).or_default().insert(tag) {
            self.write(lv, &tags);
        }
    }

    /// The store has a tag, or is not to have it any more.
    pub fn settle(&self, lv: &LvName, tag: &Tag) {
        let mut tags = lock(&self.tags);
        if let Some(of) = tags.get_mut(lv)
            && of.remove(tag)
        {
            if of.is_empty() {
                tags.remove(lv);
            }
            self.write(lv, &tags);
        }
    }

    /// The lease is settled.
    pub fn forget(&self, lv: &LvName) {
        let mut tags = lock(&self.tags);
        if tags.remove(lv).is_some() {
            self.write(lv, &tags);
        }
    }

    /// Has a listing show what the store would, had it served an earlier life of ours; what that does not concern any more is
    /// forgotten.
    pub fn apply(&self, listing: &mut Listing) {
        let all = lock(&self.tags).clone();
        for (lv, tags) in all {
            let there = listing.lvs.iter_mut().find(|listed| listed.name == lv);
            match there.map(|there| (Role::from_tags(&there.tags), there)) {
                Some((Role::Volume { lease, .. }, there))
                    if lease.as_ref().is_none_or(|lease| *lease == self.boot) =>
                {
                    info!(%lv, "what an earlier life could not write of its lease is known all the same");
                    there
                        .tags
                        .retain(|tag| tag.as_str() != MAKING && !tags.contains(tag));
                    there.tags.extend(tags);
                }
                _ => self.forget(&lv),
            }
        }
    }

    fn write(&self, lv: &LvName, tags: &BTreeMap<LvName, BTreeSet<Tag>>) {
        if let Err(error) = self.try_write(lv, tags.get(lv)) {
            warn!(%lv, %error, dir = %self.dir.display(), "what the store is to be told of a lease could not be written here");
        }
    }

    fn try_write(&self, lv: &LvName, tags: Option<&BTreeSet<Tag>>) -> io::Result<()> {
        let path = self.dir.join(lv.as_str());
        let Some(tags) = tags else {
            return fs::remove_file(path);
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let mut text = format!("{}\n", self.boot);
        for tag in tags {
            text.push_str(tag.as_str());
            text.push('\n');
        }
        // Whole or not at all. No LV's name has a "~".
        let unready = self.dir.join(format!("{lv}~"));
        fs::write(&unready, text)?;
        fs::rename(unready, path)
    }
}

fn read(path: &Path, boot: &str) -> Option<BTreeSet<Tag>> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines();
    if lines.next()? != boot {
        return None;
    }
    lines.map(|line| line.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::units::Bytes;
    use crate::storage::{Capacity, Lv};

    fn listing(tags: &str) -> Listing {
        let lv = Lv {
            name: "l".parse().unwrap(),
            seq: 1,
            created: 1,
            size: Bytes::mib(64),
            tags: tags.split(' ').map(|tag| tag.parse().unwrap()).collect(),
            origin: None,
            device: None,
            open: false,
        };
        Listing {
            lvs: vec![lv],
            capacity: Capacity::default(),
        }
    }

    #[test]
    fn the_next_life_reads_what_this_one_wrote() {
        const BOOT: &str = "b00710c5";
        const V: &str = "friend:snapshot friend:volume:v friend:save:a";
        for (tags, boot, want) in [
            (
                V.to_owned(),
                BOOT,
                format!("{V} friend:failed friend:lease:b00710c5"),
            ),
            (
                format!("{V} friend:making"),
                BOOT,
                format!("{V} friend:failed friend:lease:b00710c5"),
            ),
            (V.to_owned(), "another", V.to_owned()),
            (
                format!("{V} friend:lease:b00710c5"),
                BOOT,
                format!("{V} friend:failed friend:lease:b00710c5"),
            ),
            // The store knows better.
            (
                format!("{V} friend:lease:0000beef"),
                BOOT,
                format!("{V} friend:lease:0000beef"),
            ),
            (
                format!("{V} friend:doomed"),
                BOOT,
                format!("{V} friend:doomed"),
            ),
            (
                "friend:snapshot friend:cache:a".to_owned(),
                BOOT,
                "friend:snapshot friend:cache:a".to_owned(),
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mounts = dir.path().join("mnt");
            let l = "l".parse().unwrap();
            let first = Pending::read(&mounts, BOOT);
            for tag in ["friend:lease:b00710c5", "friend:failed", "friend:other"] {
                first.add(&l, tag.parse().unwrap());
            }
            first.settle(&l, &"friend:other".parse().unwrap());
            let mut seen = listing(&tags);
            let next = Pending::read(&mounts, boot);
            next.apply(&mut seen);
            let shown: Vec<_> = seen.lvs[0].tags.iter().map(|tag| tag.as_str()).collect();
            assert_eq!(shown.join(" "), want, "{tags} {boot}");
            next.forget(&l);
            assert_eq!(
                fs::read_dir(dir.path().join("mnt.pending"))
                    .unwrap()
                    .count(),
                0
            );
        }
    }
}
