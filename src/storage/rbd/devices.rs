// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The devices of images on this host: mapped and unmapped, held, and frozen for a snapshot.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tracing::{debug, info, warn};

use super::ceph::PATIENCE;
use super::fleet;
use super::index::{Content, Volume};
use super::kernel::Device;
use super::{LOCK, Shared, io_failed};
use crate::cache::names::LvName;
use crate::mount::Mounted;
use crate::storage::freeze::{self, Frozen};
use crate::storage::{StoreError, lock_until};

impl Shared {
    /// Writes to the image what was written to its device so far, and freezes its file system where that is in use.
    pub(super) fn freeze(&self, lv: &LvName, image: &str) -> Result<Option<Frozen>, StoreError> {
        let device = self.kernel.device(image);
        let Some(device) = device.map_err(|error| self.io("looking for", image, error))? else {
            return Ok(None);
        };
        let what = |error| self.io("writing to", image, error);
        let Some(fs) = device.mounted() else {
            device.flush().map_err(what)?;
            return Ok(None);
        };
        let mounted = match Mounted::device(&device.path(), fs) {
            Ok(mounted) => mounted,
            // Unmounted in the meantime.
            Err(_) if device.mounted().is_none() => {
                device.flush().map_err(what)?;
                return Ok(None);
            }
            Err(error) => return Err(self.io("freezing", image, error.into())),
        };
        // All of it now: little is written while it is frozen.
        mounted.sync().map_err(what)?;
        Frozen::new(&mounted, lv, None).map(Some)
    }

    /// What is mapped on this host, by image.
    pub(super) fn devices(&self) -> Result<BTreeMap<String, Device>, StoreError> {
        (self.kernel.devices()).map_err(|error| self.io("looking for devices of", "", error))
    }

    /// Unmaps what is mapped on this host and is no volume any more: this host had it when it was declared lost, and another one
    /// removed it. Gives whether there may be more: some of it is in use still, or not removed yet.
    pub(super) fn unmap_strays(&self) -> Result<bool, StoreError> {
        // The kernel gives the number of a device that is gone to the next one.
        let lock = self.lock_maps()?;
        // First these: a volume is in the index before its image is mapped.
        let devices = self.devices()?;
        let index = self.view()?;
        let heads: BTreeMap<&str, &Volume> = (index.volumes.values())
            .filter(|volume| matches!(volume.content, Content::Own { .. }))
            .map(|volume| (volume.content.image(), volume))
            .collect();
        let (mut unmapped, mut left) = (false, false);
        for (image, device) in devices {
            let volume = heads.get(image.as_str());
            // Where several hosts are on one machine it may be another one's.
            left |= volume.is_some_and(|volume| !fleet::is_seen_by(volume, &self.me.host));
            // What the index does not know is others'.
            if volume.is_some() || !index.images.contains_key(&image) {
                continue;
            }
            if device.mounted().is_none() && matches!(self.kernel.unmap(&device), Ok(true)) {
                unmapped = true;
                info!(
                    image,
                    "unmapped: it is none of this host's volumes any more"
                );
            } else {
                left = true;
            }
        }
        drop(lock);
        if unmapped {
            // What others could not remove for that.
            self.collect()?;
        }
        Ok(left)
    }

    /// Unmaps what is mapped, not in use, and cannot be read. A kernel's client that the cluster has shut out stays so as long as it has
    /// anything mapped, and with it all that is mapped later. Only to be called before this process maps anything.
    pub(super) fn unmap_dead(&self) -> Result<(), StoreError> {
        let _lock = self.lock_maps()?;
        let index = self.view()?;
        for (image, device) in self.devices()? {
            if !index.images.contains_key(&image) || device.mounted().is_some() || is_held(&device)
            {
                continue;
            }
            match device.is_readable(PATIENCE) {
                Some(true) => {}
                Some(false) => match self.kernel.unmap(&device) {
                    Ok(true) => warn!(image, "unmapped: its device could not be read"),
                    unmapped => debug!(image, ?unmapped, "its device cannot be read"),
                },
                // Nor would others be, and what is mapped may wait as long as it takes.
                None => break,
            }
        }
        Ok(())
    }

    /// Thaws what an earlier daemon of this host left frozen that was killed. Not while another one runs: it may be at a
    /// checkpoint.
    pub(super) fn thaw(&self) -> Result<(), StoreError> {
        let index = self.view()?;
        let devices = match self.kernel.devices() {
            Ok(devices) => devices,
            Err(error) => {
                warn!(%error, "whether anything is frozen is not known");
                return Ok(());
            }
        };
        for (image, device) in devices {
            // Of others.
            if !index.images.contains_key(&image) {
                continue;
            }
            let mounted = device
                .mounted()
                .map(|fs| Mounted::device(&device.path(), fs));
            match mounted {
                Some(Ok(mounted)) => freeze::thaw(&mounted),
                Some(Err(error)) => warn!(image, %error, "whether it is frozen is not known"),
                None => {}
            }
        }
        Ok(())
    }

    /// The device of an image, mapped where it is not.
    pub(super) fn map(&self, image: &str) -> Result<PathBuf, StoreError> {
        let lock = self.lock_maps()?;
        let mapped = match self.kernel.device(image) {
            Ok(Some(device)) => Ok(device),
            Ok(None) => self.kernel.map(self.pool.cluster(), image),
            Err(error) => Err(error),
        };
        drop(lock);
        mapped
            .map(|device| device.path())
            .map_err(|error| self.io("mapping", image, error))
    }

    /// While this is held no process of this host maps or unmaps anything.
    fn lock_maps(&self) -> Result<Flock<File>, StoreError> {
        let path = self.run.join(LOCK);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        // Where the kernel's client is cut off, who holds it may wait without an end.
        let deadline = Instant::now() + PATIENCE;
        let lock = file.and_then(|file| lock_until(file, deadline));
        lock.map_err(io_failed("locking", &path))?
            .ok_or_else(|| self.late(PATIENCE))
    }

    /// Has the device of an image go, where it has one.
    pub(super) fn unmap(&self, lv: &LvName, image: &str) -> Result<(), StoreError> {
        // The kernel gives the number of a device that is gone to the next one.
        let lock = self.lock_maps()?;
        let device = self.kernel.device(image);
        let unmapped = device.and_then(|device| match device {
            Some(device) if device.mounted().is_some() => Ok(false),
            Some(device) => self.kernel.unmap(&device),
            None => Ok(true),
        });
        drop(lock);
        match unmapped {
            Ok(true) => Ok(()),
            Ok(false) => Err(StoreError::Busy(lv.clone())),
            Err(error) => Err(self.io("unmapping", image, error)),
        }
    }
}

/// Whether a device is held: see [`crate::storage::Store::hold`].
pub(super) fn is_held(device: &Device) -> bool {
    File::open(device.path()).is_ok_and(|device| {
        // Shared, as others may be looking too.
        matches!(
            Flock::lock(device, FlockArg::LockSharedNonblock),
            Err((_, Errno::EWOULDBLOCK))
        )
    })
}
