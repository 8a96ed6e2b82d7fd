// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a cluster has to be able to do, and what `doctor` says of one.

use nix::errno::Errno;
use serde_json::{Value, json};

use super::ceph::{CephError, Cluster, Omap, OmapWrite};
use super::index::GENERATION;
use super::{DEEP, INDEX, RbdStore, Shared};
use crate::cache::units::Bytes;
use crate::storage::StoreError;

/// The first release whose OSDs clone snapshots that are not protected (clone v2). Releases are in the order of the alphabet.
const FIRST_RELEASE: &str = "mimic";

/// Of so many images at most it is counted what flattening them would copy: each is opened for that.
const MOST_COUNTED: usize = 16;

/// What is to be known of a store on Ceph.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// The cluster's user, without `client.`.
    pub user: String,
    /// This host's id.
    pub host: String,
    /// The version of librbd's interface.
    pub librbd: String,
    /// The oldest release that OSDs may have, such as `reef`.
    pub release: String,
    /// The monitors' names, and whether each is in the quorum.
    pub monitors: Vec<(String, bool)>,
    /// Why the user may not change the index, and the command that grants it; `None`: it may.
    pub refused: Option<String>,
    /// How many images there are.
    pub images: usize,
    /// How many clones deep the deepest of them is.
    pub deepest: usize,
    /// How many are so deep that they are flattened when they are cloned next, and from which depth on that is.
    pub deep: (usize, usize),
    /// What that copies, of 16 of them at most.
    pub to_copy: Bytes,
}

impl RbdStore {
    /// Looks at the cluster and at the images.
    ///
    /// # Errors
    /// When the cluster cannot be read.
    pub fn report(&self) -> Result<Report, StoreError> {
        let shared = &self.shared;
        let failed = |error: CephError| shared.failed(&error);
        let cluster = shared.pool.cluster();
        let index = shared.view()?;
        let depths: Vec<_> = index
            .images
            .keys()
            .map(|image| (image, index.depth(image)))
            .collect();
        let deep = depths.iter().filter(|(_, depth)| *depth >= DEEP);
        let mut to_copy = 0;
        for (image, _) in deep.clone().take(MOST_COUNTED) {
            match shared.inherited(image) {
                Ok(bytes) => to_copy += bytes,
                // Removed in the meantime.
                Err(error) if error.errno == Errno::ENOENT => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let monitors = ask(cluster, "mon dump").map_err(failed)?;
        let osds = ask(cluster, "osd dump").map_err(failed)?;
        Ok(Report {
            user: shared.place.user.clone(),
            host: shared.me.host.clone(),
            librbd: cluster.librbd(),
            release: release(&osds).to_owned(),
            monitors: quorum(&monitors),
            refused: shared.may_write()?,
            images: depths.len(),
            deepest: depths.iter().map(|(_, depth)| *depth).max().unwrap_or(0),
            deep: (deep.count(), DEEP),
            to_copy: Bytes(to_copy),
        })
    }
}

impl Shared {
    /// Bytes that an image has from its parents alone, in whole objects.
    fn inherited(&self, image: &str) -> Result<u64, CephError> {
        let image = self.pool.look_at(image, None)?;
        let (all, _) = image.differs(None, true)?;
        let (own, _) = image.differs(None, false)?;
        Ok(all.saturating_sub(own))
    }

    /// Asks for a change that is not made, as no generation is what it compares with; `Some`: why the user may not.
    fn may_write(&self) -> Result<Option<String>, StoreError> {
        let change = OmapWrite {
            create: false,
            compare: Omap::from([(GENERATION.to_owned(), b"none".to_vec())]),
            set: Omap::new(),
            remove: vec!["none".to_owned()],
        };
        match self.pool.write(INDEX, &change) {
            Ok(_) => Ok(None),
            Err(error) if matches!(error.errno, Errno::EPERM | Errno::EACCES) => {
                Ok(Some(self.place.grant()))
            }
            Err(error) => Err(self.failed(&error)),
        }
    }
}

fn ask(cluster: &Cluster, prefix: &str) -> Result<Value, CephError> {
    let answer = cluster.ask(&json!({"prefix": prefix, "format": "json"}))?;
    serde_json::from_slice(&answer).map_err(|_| CephError {
        what: format!("the monitors' answer to {prefix:?}"),
        errno: Errno::EBADMSG,
    })
}

/// What a cluster cannot do that is needed, and the command that helps.
pub(super) fn check_cluster(cluster: &Cluster) -> Result<(), String> {
    let osds = ask(cluster, "osd dump").map_err(|error| error.to_string())?;
    suffices(release(&osds))
}

fn suffices(release: &str) -> Result<(), String> {
    if release >= FIRST_RELEASE {
        return Ok(());
    }
    Err(format!(
        "this cluster allows OSDs of Ceph {release:?}, which do not know clone v2 (images that are cloned from snapshots without protection); once all OSDs are newer: ceph osd require-osd-release RELEASE"
    ))
}

fn release(osds: &Value) -> &str {
    osds["require_osd_release"].as_str().unwrap_or_default()
}

/// The monitors by name, and which are in the quorum, of what `ceph mon dump` says.
fn quorum(dump: &Value) -> Vec<(String, bool)> {
    let inside: Vec<_> = dump["quorum"].as_array().into_iter().flatten().collect();
    let monitors = dump["mons"].as_array().into_iter().flatten();
    monitors
        .map(|monitor| {
            let name = monitor["name"].as_str().unwrap_or_default().to_owned();
            (name, inside.contains(&&monitor["rank"]))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        for (release, want) in [
            ("luminous", false),
            ("", false),
            ("mimic", true),
            ("reef", true),
            ("tentacle", true),
        ] {
            assert_eq!(suffices(release).is_ok(), want, "{release}");
        }
        let said = suffices("luminous").expect_err("too old");
        assert!(said.contains("clone v2") && said.contains("ceph osd require-osd-release"));
    }

    #[test]
    fn monitors_of_a_quorum() {
        let dump =
            json!({"mons": [{"rank": 0, "name": "a"}, {"rank": 1, "name": "b"}], "quorum": [1]});
        assert_eq!(
            quorum(&dump),
            [("a".to_owned(), false), ("b".to_owned(), true)]
        );
    }
}
