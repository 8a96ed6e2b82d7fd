// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volumes in the index: how one appears, what another is made of, when it gets an image of its own, and how it is taken away.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tracing::warn;

use super::devices::is_held;
use super::images::Making;
use super::index::{Change, Content, Index, Origin, Snapshot, SnapshotOf, Volume};
use super::kernel::Device;
use super::{MANY_SNAPSHOTS, MOST_SNAPSHOTS, MOST_WHILE_MOUNTED, Shared};
use crate::cache::names::{LvName, Tag};
use crate::cache::tags::DOOMED;
use crate::cache::units::Bytes;
use crate::storage::{Lv, NewLv, StoreError, retagged};
use crate::text::unix_now;

/// A snapshot to make a volume of.
pub(super) struct Source {
    pub(super) at: SnapshotOf,
    pub(super) origin: Origin,
    pub(super) size: u64,
    /// It was taken for that, in this generation of the origin's activation, if that was not active.
    pub(super) taken: Option<Option<u64>>,
}

/// A volume as this host lists it, which has these devices.
pub(super) fn as_listed(
    index: &Index,
    devices: &BTreeMap<String, Device>,
    name: &LvName,
    volume: &Volume,
) -> Lv {
    let device = match &volume.content {
        Content::Own { image, .. } => devices.get(image),
        Content::At(_) => None,
    };
    let origin = volume.origin.as_ref().and_then(|origin| {
        let (name, found) = index.volumes.get_key_value(origin.name.as_str())?;
        (found.seq == origin.seq).then(|| name.clone())
    });
    let tags = volume.tags.iter().filter_map(|tag| tag.parse().ok());
    Lv {
        name: name.clone(),
        seq: volume.seq,
        created: volume.created,
        size: Bytes(volume.size),
        tags: tags.collect(),
        origin,
        device: device.map(|device| device.number),
        open: device.is_some_and(|device| device.mounted().is_some() || is_held(device)),
    }
}

impl Shared {
    /// A change of a volume's tags.
    pub(super) fn tagged(
        &self,
        index: &Index,
        lv: &LvName,
        add: &[Tag],
        del: &[Tag],
    ) -> Result<(Change, ()), StoreError> {
        let mut volume = self.get(index, lv)?.clone();
        let tags = retagged(&volume.tags, add, del);
        let changed = tags != volume.tags;
        volume.tags = tags;
        let is_live = matches!(volume.content, Content::Own { live: true, .. });
        if add.iter().any(|tag| tag.as_str() == DOOMED) && !is_live {
            // The host that dooms an entry has it to remove, but for one that another host has mapped.
            volume.host = Some(self.me.host.clone());
        }
        let mut change = Change::default();
        if changed {
            change.volumes.insert(lv.clone(), Some(volume));
        }
        Ok((change, ()))
    }

    /// Makes `new` a copy of `origin`, once.
    pub(super) fn copy(
        self: &Arc<Self>,
        origin: &LvName,
        new: &NewLv,
    ) -> Result<Option<PathBuf>, StoreError> {
        let index = self.view()?;
        self.get(&index, origin)?;
        if index.volumes.contains_key(&new.name) {
            return Err(StoreError::Exists(new.name.clone()));
        }
        self.check_room()?;
        let made = self.make(|making| {
            let source = self.source(origin, &new.name, making)?;
            self.keep_shallow(&index, &source.at.image)?;
            let content = if new.active {
                Content::Own {
                    image: self.make_image(&new.name, Some(&source.at), source.size, making)?,
                    same: None,
                    active: 0,
                    live: true,
                }
            } else {
                Content::At(source.at.clone())
            };
            self.appear(new, source.size, Some(&source), &content, making)?;
            Ok(content)
        });
        match made {
            Ok(content) => self.ready(new, &content),
            // Another host may have removed it meanwhile: then that is what the caller is to know, to choose another.
            Err(error) => match self.volume(origin) {
                Err(gone @ StoreError::NotFound(_)) => Err(gone),
                _ => Err(error),
            },
        }
    }

    /// Has a volume appear that was made, with all its tags.
    pub(super) fn appear(
        &self,
        new: &NewLv,
        size: u64,
        source: Option<&Source>,
        content: &Content,
        making: &Making<'_>,
    ) -> Result<(), StoreError> {
        self.change(|index| {
            if index.volumes.contains_key(&new.name) {
                return Err(StoreError::Exists(new.name.clone()));
            }
            let mut change = Change::default();
            let seq = index.generation + 1;
            let mut content = content.clone();
            if let Content::Own {
                image,
                active,
                live,
                ..
            } = &mut content
            {
                if *live {
                    *active = seq;
                }
                let mut made = index.images.get(image).cloned().ok_or_else(|| {
                    StoreError::Failed(format!(
                        "{}: {image} is not in the index any more",
                        self.name
                    ))
                })?;
                if made.maker.take().as_ref() != Some(&making.me) {
                    // It was given up.
                    return Err(StoreError::NotFound(new.name.clone()));
                }
                change.images.insert(image.clone(), Some(made));
            }
            if let Content::At(at) = &content
                && !index.keeps(at, &making.me)
            {
                // Its last volume was removed meanwhile, by any host.
                return Err(StoreError::NotFound(new.name.clone()));
            }
            if let Some(source) = source {
                self.settle_source(index, source, &mut change);
            }
            change.volumes.insert(
                new.name.clone(),
                Some(Volume {
                    seq,
                    created: unix_now(),
                    size,
                    tags: retagged(&[], &new.tags, &[]),
                    origin: source.map(|source| source.origin.clone()),
                    host: Some(self.me.host.clone()),
                    content,
                }),
            );
            Ok((change, ()))
        })
    }

    /// A snapshot that was taken is needed from now on by more than the process that took it; and by its origin too, as long as that is not
    /// activated.
    pub(super) fn settle_source(&self, index: &Index, source: &Source, change: &mut Change) {
        let Some(unchanged_since) = source.taken else {
            return;
        };
        if let Some(image) = index.images.get(&source.at.image) {
            let mut image = image.clone();
            if let Some(snapshot) = image.snapshots.get_mut(&source.at.snapshot) {
                snapshot.maker = None;
            }
            change.images.insert(source.at.image.clone(), Some(image));
        }
        let Some(origin) = source
            .origin
            .name
            .parse()
            .ok()
            .and_then(|name: LvName| Some((index.volumes.get(&name)?.clone(), name)))
        else {
            return;
        };
        let (mut volume, name) = origin;
        if let Content::Own {
            image,
            same,
            active,
            live: false,
        } = &mut volume.content
            && *image == source.at.image
            && unchanged_since == Some(*active)
            && volume.size == source.size
        {
            *same = Some(source.at.snapshot.clone());
            change.volumes.insert(name, Some(volume));
        }
    }

    /// A snapshot that holds what `origin` holds now, for a volume `new`: one that there is, or one that is taken.
    pub(super) fn source(
        &self,
        origin: &LvName,
        new: &LvName,
        making: &Making<'_>,
    ) -> Result<Source, StoreError> {
        let volume = self.volume(origin)?;
        let from = |volume: &Volume| Origin {
            name: origin.to_string(),
            seq: volume.seq,
        };
        if let Some(at) = volume.content.snapshot() {
            return Ok(Source {
                at,
                origin: from(&volume),
                size: volume.size,
                taken: None,
            });
        }
        let image = volume.content.image().to_owned();
        let device = self.kernel.device(&image);
        let device = device.map_err(|error| self.io("looking for", &image, error))?;
        let is_mounted = device.is_some_and(|device| device.mounted().is_some());
        let failed = |error| self.failed(&error);
        // Before the snapshot is announced, of which there would be more with each try; and before it stands still, which is for the
        // snapshot alone. Freezing writes, and so ends only where the kernel has a connection.
        let opened = self.open_watched(&image).map_err(failed)?;
        let (source, name) = self.change(|index| {
            let volume = self.get(index, origin)?;
            let (
                Content::Own {
                    image: now,
                    active,
                    live,
                    ..
                },
                Some(found),
            ) = (&volume.content, index.images.get(&image))
            else {
                return Err(StoreError::NotFound(origin.clone()));
            };
            if *now != image {
                return Err(StoreError::NotFound(origin.clone()));
            }
            let most = if is_mounted {
                MOST_WHILE_MOUNTED
            } else {
                MOST_SNAPSHOTS
            };
            if found.snapshots.len() >= most {
                return Err(StoreError::Failed(format!(
                    "{origin}: {} entries are snapshots of its image, and Linux maps no image with more than {MOST_SNAPSHOTS}: it gets another one with the next mount after it was unmounted",
                    found.snapshots.len()
                )));
            }
            let name = index.fresh_name(new);
            let mut found = found.clone();
            found.snapshots.insert(
                name.clone(),
                Snapshot {
                    at: index.generation + 1,
                    maker: Some(making.me.clone()),
                },
            );
            let mut change = Change::default();
            change.images.insert(image.clone(), Some(found));
            let source = Source {
                at: SnapshotOf {
                    image: image.clone(),
                    snapshot: name.clone(),
                },
                origin: from(volume),
                size: volume.size,
                taken: Some((!live).then_some(*active)),
            };
            Ok((change, (source, name)))
        })?;
        let frozen = self.freeze(origin, &image)?;
        let taken = opened.snapshot(&name);
        drop(frozen);
        taken.map_err(failed)?;
        Ok(source)
    }

    /// Has a volume's device go. What it holds does not change until it is activated.
    pub(super) fn rest(&self, lv: &LvName) -> Result<(), StoreError> {
        let volume = self.volume(lv)?;
        let Content::Own { image, live, .. } = &volume.content else {
            return Ok(());
        };
        self.unmap(lv, image)?;
        if !live {
            return Ok(());
        }
        self.change(|index| {
            let mut volume = self.get(index, lv)?.clone();
            let mut change = Change::default();
            if let Content::Own { live, .. } = &mut volume.content
                && *live
            {
                *live = false;
                change.volumes.insert(lv.clone(), Some(volume));
            }
            Ok((change, ()))
        })
    }

    /// Makes a volume a snapshot of what it holds, if there are many of its image: it gets another image with its next use. Not if it
    /// is in use, or was used meanwhile.
    fn leave_image(
        self: &Arc<Self>,
        index: &Index,
        lv: &LvName,
        image: &str,
    ) -> Result<bool, StoreError> {
        let snapshots = index.images.get(image).map(|image| image.snapshots.len());
        if snapshots < Some(MANY_SNAPSHOTS) {
            return Ok(false);
        }
        self.keep_shallow(index, image)?;
        match self.rest(lv) {
            Err(StoreError::Busy(_)) => return Ok(false),
            done => done?,
        }
        self.make(|making| {
            let source = self.source(lv, lv, making)?;
            self.change(|index| {
                let mut change = Change::default();
                self.settle_source(index, &source, &mut change);
                // Which has noted that it holds the same.
                let mut volume = match change.volumes.remove(lv) {
                    Some(Some(settled)) => settled,
                    _ => self.get(index, lv)?.clone(),
                };
                let same = volume.content.snapshot().as_ref() == Some(&source.at);
                if same {
                    volume.content = Content::At(source.at.clone());
                    change.volumes.insert(lv.clone(), Some(volume));
                }
                Ok((change, same))
            })
        })
    }

    /// The image of a volume, which becomes one where it is a snapshot. With `live`, its content may change from now on.
    pub(super) fn own_image(
        self: &Arc<Self>,
        lv: &LvName,
        live: bool,
    ) -> Result<String, StoreError> {
        loop {
            let index = self.view()?;
            let volume = self.get(&index, lv)?;
            match &volume.content {
                Content::Own {
                    image,
                    same,
                    live: is_live,
                    ..
                } => {
                    if live && self.leave_image(&index, lv, image)? {
                        continue;
                    }
                    if !live || (*is_live && same.is_none()) {
                        return Ok(image.clone());
                    }
                    let mine = self.change(|index| {
                        let mut volume = self.get(index, lv)?.clone();
                        let mut change = Change::default();
                        let Content::Own {
                            image: now,
                            same,
                            active,
                            live,
                        } = &mut volume.content
                        else {
                            return Ok((change, false));
                        };
                        let mine = now == image;
                        (*same, *active, *live) = (None, index.generation + 1, true);
                        change.volumes.insert(lv.clone(), Some(volume));
                        Ok((change, mine))
                    })?;
                    if mine {
                        return Ok(image.clone());
                    }
                }
                Content::At(at) => match self.cloned(lv, at, volume.size, live)? {
                    Some(image) => return Ok(image),
                    // It was used, or removed, meanwhile.
                    None => self.collect_soon(),
                },
            }
        }
    }

    /// Has a volume that is a snapshot be a clone of that; `None`: it is not that snapshot any more.
    fn cloned(
        &self,
        lv: &LvName,
        at: &SnapshotOf,
        size: u64,
        live: bool,
    ) -> Result<Option<String>, StoreError> {
        self.make(|making| {
            let image = self.make_image(lv, Some(at), size, making)?;
            let taken = self.change(|index| {
                let mut change = Change::default();
                let (Some(volume), Some(made)) = (index.volumes.get(lv), index.images.get(&image))
                else {
                    return Ok((change, false));
                };
                if volume.content != Content::At(at.clone()) {
                    return Ok((change, false));
                }
                let (mut volume, mut made) = (volume.clone(), made.clone());
                if made.maker.take().as_ref() != Some(&making.me) {
                    return Ok((change, false));
                }
                volume.content = Content::Own {
                    image: image.clone(),
                    same: None,
                    active: if live { index.generation + 1 } else { 0 },
                    live,
                };
                change.images.insert(image.clone(), Some(made));
                change.volumes.insert(lv.clone(), Some(volume));
                Ok((change, true))
            })?;
            Ok(taken.then_some(image))
        })
    }

    /// Makes the device of a new volume, or has there be no such volume.
    pub(super) fn ready(
        &self,
        new: &NewLv,
        content: &Content,
    ) -> Result<Option<PathBuf>, StoreError> {
        if !new.active {
            return Ok(None);
        }
        match self.map(content.image()) {
            Ok(path) => Ok(Some(path)),
            Err(error) => {
                match self.forget(&new.name) {
                    Ok(()) => self.collect_soon(),
                    Err(error) => {
                        warn!(lv = %new.name, %error, "a volume that could not be made whole is left");
                    }
                }
                Err(error)
            }
        }
    }

    /// Takes a volume out of the index, and removes what nothing needs then.
    pub(super) fn take_away(&self, lv: &LvName) -> Result<(), StoreError> {
        self.forget(lv)?;
        if let Err(error) = self.collect() {
            // The volume is gone; what it held is tried again.
            warn!(%lv, %error, "what a removed volume held is not freed yet");
        }
        Ok(())
    }

    /// Takes a volume out of the index.
    fn forget(&self, lv: &LvName) -> Result<(), StoreError> {
        self.change(|index| {
            let mut change = Change::default();
            if index.volumes.contains_key(lv) {
                change.volumes.insert(lv.clone(), None);
            }
            Ok((change, ()))
        })
    }
}
