// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whose files a mounted volume shows: file systems by ID-mapped mounts, directories in memory by their owner.

use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::{Gid, Uid};
use tracing::error;

use super::error::io_error;
use super::volume::Backing;
use super::{Engine, EngineError, lock};
use crate::cache::names::VolumeName;
use crate::cache::spec::{Owner, Spec};
use crate::failpoint::reach;
use crate::mount::{self, Mounted};
use crate::userns::Ids;

impl Engine {
    /// Shows a volume in use as a container with the ids `ids` is to see it, which is about to
    /// start: files have the owners that they had inside the last one. Nothing happens where there is no lease.
    ///
    /// The mount that the lease began with stays at the bottom; one with other ids lies upon it.
    ///
    /// # Errors
    /// See [`EngineError`]; the volume is still mounted, as it was.
    pub fn fit(&self, name: &VolumeName, ids: &Ids) -> Result<(), EngineError> {
        let volume = self.volume(name)?;
        let _op = lock(&volume.op);
        let mut now = lock(&volume.now);
        let Some(lease) = now.lease_mut() else {
            return Ok(());
        };
        if lease.shown.as_ref() == Some(ids) {
            return Ok(());
        }
        let at = self.mountpoint(name);
        let Backing::Lv { copy, open, .. } = &lease.backing else {
            own_scratch(lease.mounted(), &volume.spec, ids)
                .map_err(|e| io_error("changing the owner of", &at, e))?;
            lease.shown = Some(ids.clone());
            return Ok(());
        };
        let (lv, device, fs) = (copy.lv.clone(), copy.device.clone(), open.fs);
        let plain_below = lease.plain_below;
        drop(now);
        let mounted = if plain_below && ids.is_host() {
            None
        } else {
            let device = device.map_or_else(|| self.store.activate(&lv), Ok)?;
            let mounted = Mounted::device(&device, fs)
                .map_err(|e| io_error("mounting", &device, e.into()))?;
            self.map_ids(&mounted, ids);
            Some(mounted)
        };
        reach("fit", 1);
        // The lowest one stays: at no moment, and whatever ends the daemon now, is there a mountpoint with nothing on it, where a
        // container would write to the host's memory.
        mount::uncover(&at).map_err(|e| io_error("unmounting", &at, e))?;
        reach("fit", 2);
        if let Some(mounted) = mounted {
            mounted
                .attach(&at)
                .map_err(|e| io_error("mounting at", &at, e))?;
        }
        reach("fit", 3);
        if let Some(lease) = lock(&volume.now).lease_mut() {
            lease.shown = Some(ids.clone());
        }
        Ok(())
    }

    /// Has a mount that was never attached show files with `ids`; where the kernel cannot do that, they are
    /// this host's.
    pub(super) fn map_ids(&self, mounted: &Mounted, ids: &Ids) {
        if ids.is_host() {
            return;
        }
        if let Err(error) = mounted.map_ids(ids)
            && !self.unmapped.swap(true, Ordering::Relaxed)
        {
            error!(%error, "the kernel makes no idmapped mount: in a container with a user namespace, files have the host's owners (said once)");
        }
    }
}

/// Gives a directory in memory to its owner inside of a container: it needs no other mount, as
/// it is nobody's afterwards.
pub(super) fn own_scratch(dir: &Mounted, spec: &Spec, ids: &Ids) -> io::Result<()> {
    let Owner { uid, gid } = spec.owner.unwrap_or_default();
    let Some((uid, gid)) = ids.outside(uid, gid) else {
        return Ok(());
    };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(rustix::fs::fchown(dir.root(), Some(uid), Some(gid))?)
}
