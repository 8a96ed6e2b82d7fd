// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `pin` and `unpin`: whether an entry may be evicted.

use std::path::Path;

use super::remove::volume_named;
use super::show::absent;
use super::{Failure, open, print};
use crate::cache::names::Tag;
use crate::cache::record::Role;
use crate::cache::tags::PIN;
use crate::cli;

/// `pin`, or `unpin`.
///
/// # Errors
/// [`Failure::NotFound`] when there is nothing of that name.
pub fn run(config: &Path, args: &cli::Pin, pinned: bool) -> Result<(), Failure> {
    let (_, store) = open(config)?;
    let listing = store.list()?;
    let name = &args.name;
    if let Some(volume) = volume_named(&listing, name) {
        return Err(Failure::Failed(format!(
            "{name}: the volume {volume}, and only entries can be pinned: `lvm-cache-friend list` shows their logical volumes"
        )));
    }
    let found = listing.lvs.iter().find(|lv| lv.name.as_str() == name);
    let (lv, role) = match found.map(|lv| (lv, Role::from_tags(&lv.tags))) {
        Some((lv, role @ (Role::Entry { .. } | Role::Base | Role::Volume { .. }))) => (lv, role),
        _ => return Err(absent(&listing, name, store.name())),
    };
    if !matches!(role, Role::Entry { .. }) {
        return Err(Failure::Failed(format!(
            "{name}: only entries can be pinned"
        )));
    }
    let pin: [Tag; 1] = [PIN.parse().expect("a tag")];
    let (add, delete): (&[Tag], &[Tag]) = if pinned { (&pin, &[]) } else { (&[], &pin) };
    store.change_tags(&lv.name, add, delete)?;
    store.persist()?;
    let what = if pinned { "pinned" } else { "not pinned" };
    print(&format!("{name} {what}\n"))
}
