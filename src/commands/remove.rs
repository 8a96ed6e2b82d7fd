// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `remove`: a volume through the daemon that serves it, all else here.

use std::path::Path;

use serde_json::{Value, json};

use super::show::absent;
use super::{ANSWER_TIMEOUT, Failure, open, print};
use crate::cache::names::{LvName, VolumeName};
use crate::cache::record::Role;
use crate::cli;
use crate::config::Settings;
use crate::http::client::{self, ClientError};
use crate::http::socket::SocketError;
use crate::storage::{Listing, Lv, Store, StoreError, doom};

/// `remove`.
///
/// # Errors
/// [`Failure::NotFound`] when there is nothing of that name.
pub fn run(config: &Path, args: &cli::Remove) -> Result<(), Failure> {
    let (settings, store) = open(config)?;
    let name = &args.name;
    // Held until what is removed is out of every choice: no daemon starts meanwhile, and takes it up.
    let lock = match settings.store.lock() {
        Ok(lock) => Some(lock),
        Err(SocketError::Locked(_)) => None,
        Err(error) => return Err(Failure::Failed(error.to_string())),
    };
    let listing = store.list()?;

    let volume = volume_named(&listing, name);
    if lock.is_none()
        && let Some(volume) = volume.or_else(|| name.parse().ok())
        && through_daemon(&settings, &volume, args.force)?
    {
        return print(&format!("volume {volume} removed\n"));
    }
    let mut marked = Vec::new();
    for lv in listing.lvs.iter().filter(|lv| is_meant(lv, name)) {
        mark(&*store, lv)?;
        marked.push(&lv.name);
    }
    // What takes long keeps no daemon waiting: one that starts now finds them marked, and removes them, too.
    drop(lock);
    for lv in &marked {
        remove(&*store, lv)?;
    }
    if marked.is_empty() {
        return Err(absent(&listing, name, store.name()));
    }
    print(&format!("{name} removed\n"))
}

/// The volume that is called `name`, or whose LV is.
pub(super) fn volume_named(listing: &Listing, name: &str) -> Option<VolumeName> {
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
fn through_daemon(settings: &Settings, volume: &VolumeName, force: bool) -> Result<bool, Failure> {
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
            "{}: {error}, but a daemon uses {}: does it have another configuration?",
            settings.socket.display(),
            settings.store
        )),
        _ => Failure::Failed(error.to_string()),
    };
    let endpoint = if force {
        "Friend.Remove"
    } else {
        "VolumeDriver.Remove"
    };
    match ask(endpoint) {
        Ok(_) => Ok(true),
        Err(ClientError::Refused { status: 404, .. }) => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Takes an LV out of every choice.
fn mark(store: &dyn Store, lv: &Lv) -> Result<(), Failure> {
    let name = &lv.name;
    let role = Role::from_tags(&lv.tags);
    if role == Role::Base {
        return Err(Failure::Failed(format!(
            "{name}: the base image, which volumes start from on a miss, cannot be removed"
        )));
    }
    if lv.open {
        let why = "in use: mounted, or its device is held open";
        return Err(Failure::Failed(match role {
            Role::Volume {
                volume: Some(volume),
                ..
            } => format!(
                "volume {volume} ({name}): {why}, and no daemon serves it: stop its containers first; or start the daemon, and have it taken away by `lvm-cache-friend remove --force {volume}`"
            ),
            _ => format!("{name}: {why}"),
        }));
    }
    // A store too full to take that mark still removes.
    doom(store, name)?;
    Ok(())
}

/// Takes it out of the store: an end before that leaves it to the daemon.
fn remove(store: &dyn Store, lv: &LvName) -> Result<(), Failure> {
    match store.remove(lv) {
        Err(StoreError::Busy(_)) => Err(Failure::Failed(format!(
            "{lv}: came into use meanwhile; marked, and removed once it is free"
        ))),
        other => Ok(other?),
    }
}
