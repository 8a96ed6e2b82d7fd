// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who uses a volume.
//!
//! Clients say when a use begins and when it ends. A client that is killed with its container, or forgets what it knew, says the
//! latter never, and one that mounts for many containers says it once. So what containers' hooks said, and what the kernel
//! shows, are looked at too: a container that was started has the volume's mount in its mount namespace for as long as it lives.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::Engine;
use super::told::Told;
use super::volume::{Lease, Volume};
use crate::engine::lock;
use crate::mount;

/// How many users are named.
const NAMED: usize = 5;

/// What is known in memory of who uses a lease.
struct Known {
    /// Of the file system that is mounted.
    device: Option<(u32, u32)>,
    told: Arc<Told>,
    /// Those who have mounted it, and have not said yet that they are done.
    clients: BTreeSet<String>,
    /// A client has reported its end, and waits for that to be acted on.
    is_left: bool,
}

impl Known {
    fn of(lease: &Lease, leaving: &BTreeSet<String>) -> Self {
        Self {
            device: lease.mounted().device_number().ok(),
            told: Arc::clone(&lease.told),
            clients: lease.ids.difference(leaving).cloned().collect(),
            is_left: !leaving.is_empty(),
        }
    }

    /// Who uses it; `None`: it is not in use any more.
    fn users(&self, at: &Path) -> Option<String> {
        if self.is_left && self.clients.is_empty() {
            return None;
        }
        let running = named(&self.told.running(), "container");
        let Some(Ok(processes)) = self.device.map(|device| mount::users(device, at)) else {
            // Unknown users are users.
            return Some(
                running.unwrap_or_else(|| "a process that cannot be looked for now".into()),
            );
        };
        if !processes.is_empty() {
            return running.or_else(|| named(&processes, "process"));
        }
        // Any container that was started had the mount: those have ended. Without one, a client may be about to start it;
        // but of an earlier life's clients only the containers are left.
        let is_awaited = !self.clients.is_empty() && !self.told.has_containers();
        is_awaited.then(|| "a client that has mounted it and not unmounted it".to_owned())
    }
}

fn named<T: ToString>(all: &[T], kind: &str) -> Option<String> {
    let more = all.len().saturating_sub(NAMED);
    let mut names: Vec<_> = all
        .iter()
        .take(NAMED)
        .map(|one| format!("{kind} {}", one.to_string()))
        .collect();
    if more > 0 {
        names.push(format!("{more} more"));
    }
    (!names.is_empty()).then(|| names.join(", "))
}

impl Engine {
    /// Who uses a volume whose `op` the caller holds; `None`: it is not in use.
    pub(super) fn users_of(&self, volume: &Volume) -> Option<String> {
        let known = {
            let now = lock(&volume.now);
            Known::of(now.lease()?, &now.leaving)
        };
        known.users(&self.mountpoint(&volume.name))
    }
}
