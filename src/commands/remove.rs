// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `remove`: a volume through the daemon that serves it, all else here.

use std::path::Path;

use serde_json::{Value, json};

use super::show::absent;
use super::{ANSWER_TIMEOUT, Failure, open, print};
use crate::cache::names::VolumeName;
use crate::cache::record::{DOOMED, Role};
use crate::cli;
use crate::config::Settings;
use crate::plugin::client::{self, ClientError};
use crate::plugin::socket::SocketError;
use crate::serve::lock_store;
use crate::storage::{Listing, Lv, Store, StoreError};

/// `remove`.
///
/// # Errors
/// [`Failure::NotFound`] when there is nothing of that name.
pub fn run(config: &Path, args: &cli::Remove) -> Result<(), Failure> {
    let (settings, store) = open(config)?;
    let name = &args.name;
    // Held to the end: no daemon starts while this command acts in its stead.
    let _lock = match lock_store(&settings.store) {
        Ok(lock) => Some(lock),
        Err(SocketError::Locked(_)) => None,
        Err(error) => return Err(Failure::Failed(error.to_string())),
    };
    let daemon_runs = _lock.is_none();
    let listing = store.list()?;

    let volume = volume_named(&listing, name);
    if daemon_runs
        && let Some(volume) = volume.or_else(|| name.parse().ok())
        && through_daemon(&settings, &volume)?
    {
        return print(&format!("volume {volume} removed\n"));
    }
    let mut removed = 0;
    for lv in listing.lvs.iter().filter(|lv| is_meant(lv, name)) {
        remove(&*store, lv)?;
        removed += 1;
    }
    if removed == 0 {
        return Err(absent(&listing, name, store.name()));
    }
    print(&format!("{name} removed\n"))
}

/// The volume that is called `name`, or whose LV is.
fn volume_named(listing: &Listing, name: &str) -> Option<VolumeName> {
    listing
        .lvs
        .iter()
        .find_map(|lv| match Role::from_tags(&lv.tags) {
            Role::Volume {
                volume: Some(volume),
                ..
            } if volume.as_str() == name || lv.name.as_str() == name => Some(volume),
            _ => None,
        })
}

/// Whether `lv` is what a command without the daemon's help removes as `name`.
fn is_meant(lv: &Lv, name: &str) -> bool {
    match Role::from_tags(&lv.tags) {
        Role::Foreign | Role::Unclear(_) => false,
        Role::Volume {
            volume: Some(volume),
            ..
        } if volume.as_str() == name => true,
        _ => lv.name.as_str() == name,
    }
}

/// Removes a volume through the daemon; `false` when it knows none of that name.
fn through_daemon(settings: &Settings, volume: &VolumeName) -> Result<bool, Failure> {
    let ask = |endpoint: &str| -> Result<Value, ClientError> {
        client::call(
            &settings.socket,
            endpoint,
            &json!({ "Name": volume.as_str() }),
            ANSWER_TIMEOUT,
        )
    };
    let failed = |error: ClientError| match error {
        ClientError::NotRunning => Failure::Failed(format!(
            "{}: {error}, yet a daemon has {}: does it use another configuration?",
            settings.socket.display(),
            settings.store
        )),
        _ => Failure::Failed(error.to_string()),
    };
    let found = match ask("VolumeDriver.Get") {
        Ok(found) => found,
        Err(ClientError::Refused { status: 404, .. }) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    if let Some(at) = found.pointer("/Volume/Mountpoint").and_then(Value::as_str) {
        return Err(Failure::Failed(format!(
            "{volume}: in use, mounted at {at}: stop the container that uses it first"
        )));
    }
    match ask("VolumeDriver.Remove") {
        Ok(_) => Ok(true),
        Err(ClientError::Refused { status: 404, .. }) => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

fn remove(store: &dyn Store, lv: &Lv) -> Result<(), Failure> {
    let name = &lv.name;
    if Role::from_tags(&lv.tags) == Role::Base {
        return Err(Failure::Failed(format!(
            "{name}: it is the base, what volumes start from when nothing matches; it is not removed"
        )));
    }
    if lv.open {
        return Err(Failure::Failed(format!(
            "{name}: in use: mounted, or its device is held open"
        )));
    }
    // First out of every choice, then out of the store: an end in between leaves
    // the second half to the daemon. A store too full to take that mark still removes.
    match store.change_tags(name, &[DOOMED.parse().expect("a tag")], &[]) {
        Ok(()) | Err(StoreError::Full { .. }) => store.remove(name).map_err(|error| match error {
            StoreError::Busy(_) => Failure::Failed(format!(
                "{name}: it came into use meanwhile; it is marked, and removed once it is free"
            )),
            error => error.into(),
        }),
        Err(StoreError::NotFound(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
