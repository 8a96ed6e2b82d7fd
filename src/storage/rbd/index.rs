// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is in a store on Ceph: volumes, images and snapshots, and which of these nothing needs any more. Pure.
//!
//! All of it is the keys of one RADOS object, and each change of them is one RADOS operation, which is done where the
//! *generation* is still the one that the change was worked out from, and makes it one more. So whatever two hosts do at
//! once, one of them does first, and the other works its change out again. The generation is also what volumes are numbered by.
//!
//! ```text
//! format           1
//! generation       of the last change, in decimal
//! image/IMAGE      an image, from before it is made until after it is gone, with its snapshots
//! volume/NAME      a volume: number, tags, and which image, or snapshot of one, it is
//! ```
//! Nothing is made in the pool that the index does not know of before, and nothing leaves the index before it has left the
//! pool. So what a host that died had half done is told by the index alone, and what the index does not know is not ours.
//! An image outlives its volume while a snapshot of it is needed: by a volume that is that snapshot, or by an
//! image that was cloned from it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::ceph::{Omap, OmapWrite};
use crate::cache::names::LvName;

const FORMAT: &str = "format";
/// What this version reads and writes.
const THIS_FORMAT: &str = "1";
/// The key that each change sets.
pub const GENERATION: &str = "generation";
const IMAGE: &str = "image/";
const VOLUME: &str = "volume/";

/// How much of a volume's name its image's has: librbd takes 96 bytes in all.
const NAME_PART: usize = 64;

/// What makes something, until it is made: what it leaves unfinished is garbage once it has ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Maker {
    /// Its host.
    pub host: String,
    /// Which of the host's processes, ever, and which of that one's operations: `PROCESS.NUMBER`.
    pub process: String,
}

/// A snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SnapshotOf {
    /// The image.
    pub image: String,
    /// The snapshot's name.
    pub snapshot: String,
}

/// What an image was cloned from, and what there is of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What makes it; `None` once it is a volume's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub maker: Option<Maker>,
    /// What it is a clone of, until it was flattened.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub parent: Option<SnapshotOf>,
    /// Its snapshots.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub snapshots: BTreeMap<String, Snapshot>,
}

/// A snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The generation that it was asked for in: later ones are of later content.
    pub at: u64,
    /// What takes it; `None` once a volume needed it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub maker: Option<Maker>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The generation that it appeared in.
    pub seq: u64,
    /// By the clock of the host that made it, seconds since 1970.
    pub created: u64,
    /// In bytes.
    pub size: u64,
    /// Its tags.
    pub tags: Vec<String>,
    /// What it was made a snapshot of.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub origin: Option<Origin>,
    /// The host that made it, or took it over.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub host: Option<String>,
    /// What it holds.
    pub content: Content,
}

/// What a volume was made a snapshot of: the name may have been given again since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its name.
    pub name: String,
    /// Its number.
    pub seq: u64,
}

/// Where a volume's content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// An image that it has to itself.
    Own {
        /// The image.
        image: String,
        /// A snapshot of it that it still equals: it was not active since.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        same: Option<String>,
        /// The generation in which it was last activated; 0: never.
        #[serde(default)]
        active: u64,
        /// It was not deactivated since: its host may write to it at any moment.
        #[serde(skip_serializing_if = "std::ops::Not::not", default)]
        live: bool,
    },
    /// A snapshot, until it is activated: then a clone of it.
    At(SnapshotOf),
}

impl Content {
    /// The image that it is in.
    #[must_use]
    pub fn image(&self) -> &str {
        match self {
            Self::Own { image, .. } => image,
            Self::At(at) => &at.image,
        }
    }

    /// A snapshot that holds the same.
    #[must_use]
    pub fn snapshot(&self) -> Option<SnapshotOf> {
        match self {
            Self::Own { image, same, .. } => same.as_ref().map(|snapshot| SnapshotOf {
                image: image.clone(),
                snapshot: snapshot.clone(),
            }),
            Self::At(at) => Some(at.clone()),
        }
    }
}

/// A change to the index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Volumes as they are to be; `None`: gone.
    pub volumes: BTreeMap<LvName, Option<Volume>>,
    /// The same of images.
    pub images: BTreeMap<String, Option<Image>>,
}

impl Change {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.volumes.is_empty() && self.images.is_empty()
    }

    /// The operation that makes it, on what `index` is.
    #[must_use]
    pub fn write(&self, index: &Index) -> OmapWrite {
        let decimal = |number: u64| number.to_string().into_bytes();
        let json = |value: Result<Vec<u8>, _>| value.expect("numbers and strings");
        let mut write = OmapWrite::default();
        if index.generation == 0 {
            write.create = true;
        } else {
            let before = decimal(index.generation);
            write.compare.insert(GENERATION.to_owned(), before);
        }
        write
            .set
            .insert(GENERATION.to_owned(), decimal(index.generation + 1));
        write.set.insert(FORMAT.to_owned(), THIS_FORMAT.into());
        for (name, volume) in &self.volumes {
            let key = format!("{VOLUME}{name}");
            match volume {
                Some(volume) => _ = write.set.insert(key, json(serde_json::to_vec(volume))),
                None => write.remove.push(key),
            }
        }
        for (name, image) in &self.images {
            let key = format!("{IMAGE}{name}");
            match image {
                Some(image) => _ = write.set.insert(key, json(serde_json::to_vec(image))),
                None => write.remove.push(key),
            }
        }
        write
    }
}

/// What no volume and no image needs any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Garbage {
    /// A snapshot of an image that stays.
    Snapshot(SnapshotOf),
    /// An image, with its snapshots.
    Image(String),
}

impl Garbage {
    /// The image that it is, or is of.
    #[must_use]
    pub fn image(&self) -> &str {
        match self {
            Self::Snapshot(of) => &of.image,
            Self::Image(image) => image,
        }
    }
}

/// All of it, in one generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// Of the last change; 0: there was none yet.
    pub generation: u64,
    /// The volumes.
    pub volumes: BTreeMap<LvName, Volume>,
    /// The images.
    pub images: BTreeMap<String, Image>,
}

impl Index {
    /// Reads the keys of the object.
    ///
    /// # Errors
    /// Of a later version's, and what cannot be read: nothing is to be changed then.
    pub fn parse(keys: &Omap) -> Result<Self, String> {
        let mut index = Self::default();
        let wrong = |key: &str, why: String| format!("the index of the store: {key}: {why}");
        for (key, value) in keys {
            let text = String::from_utf8_lossy(value);
            if key == FORMAT {
                if text != THIS_FORMAT {
                    return Err(wrong(
                        key,
                        format!(
                            "{text}, and this version knows {THIS_FORMAT} alone: it is older than another host's"
                        ),
                    ));
                }
            } else if key == GENERATION {
                index.generation =
                    generation(value).ok_or_else(|| wrong(key, text.into_owned()))?;
            } else if let Some(name) = key.strip_prefix(VOLUME) {
                let name = name
                    .parse::<LvName>()
                    .map_err(|e| wrong(key, e.to_string()))?;
                let volume =
                    serde_json::from_slice(value).map_err(|e| wrong(key, e.to_string()))?;
                index.volumes.insert(name, volume);
            } else if let Some(name) = key.strip_prefix(IMAGE) {
                let image = serde_json::from_slice(value).map_err(|e| wrong(key, e.to_string()))?;
                index.images.insert(name.to_owned(), image);
            }
        }
        Ok(index)
    }

    /// What it is after a change.
    pub fn apply(&mut self, change: &Change) {
        self.generation += 1;
        for (name, volume) in &change.volumes {
            match volume {
                Some(volume) => self.volumes.insert(name.clone(), volume.clone()),
                None => self.volumes.remove(name),
            };
        }
        for (name, image) in &change.images {
            match image {
                Some(image) => self.images.insert(name.clone(), image.clone()),
                None => self.images.remove(name),
            };
        }
    }

    /// A name that no image and no snapshot ever had, for what is made in the next generation for a volume.
    #[must_use]
    pub fn fresh_name(&self, volume: &LvName) -> String {
        // All of LVM's letters are of one byte. `~` is none of them.
        let part = volume.as_str().get(..NAME_PART).unwrap_or(volume.as_str());
        format!("{part}~{}", self.generation + 1)
    }

    /// Whether there is such a snapshot, and is no garbage that is being removed: something needs it, or `me` has just taken it.
    #[must_use]
    pub fn keeps(&self, snapshot: &SnapshotOf, me: &Maker) -> bool {
        let image = self.images.get(&snapshot.image);
        let made = image.and_then(|image| image.snapshots.get(&snapshot.snapshot));
        made.is_some_and(|made| made.maker.as_ref() == Some(me) || self.needs(snapshot))
    }

    fn needs(&self, snapshot: &SnapshotOf) -> bool {
        let mut contents = self.volumes.values().map(|volume| &volume.content);
        let mut parents = self.images.values().map(|image| &image.parent);
        contents.any(|content| content.snapshot().as_ref() == Some(snapshot))
            || parents.any(|parent| parent.as_ref() == Some(snapshot))
    }

    /// Gives up what is being made by nothing that `lives`, so that it may be garbage. What such a maker had under way to finish
    /// it is refused once this is done.
    #[must_use]
    pub fn given_up(&self, lives: impl Fn(&Maker) -> bool) -> Change {
        let mut change = Change::default();
        for (name, image) in &self.images {
            let mut given_up = image.clone();
            let makers = (given_up.snapshots.values_mut())
                .map(|snapshot| &mut snapshot.maker)
                .chain([&mut given_up.maker]);
            for maker in makers {
                maker.take_if(|maker| !lives(maker));
            }
            if given_up != *image {
                change.images.insert(name.clone(), Some(given_up));
            }
        }
        change
    }

    /// Which host may be writing to which image.
    #[must_use]
    pub fn writers(&self) -> BTreeMap<&str, &str> {
        let volumes = self.volumes.values();
        volumes
            .filter_map(|volume| match (&volume.content, &volume.host) {
                (
                    Content::Own {
                        image, live: true, ..
                    },
                    Some(host),
                ) => Some((image.as_str(), host.as_str())),
                _ => None,
            })
            .collect()
    }

    /// What nothing needs or makes, in the order in which it can be removed; what depends on that is told once it is gone.
    #[must_use]
    pub fn garbage(&self) -> Vec<Garbage> {
        let heads: BTreeSet<&str> = self
            .volumes
            .values()
            .filter_map(|volume| match &volume.content {
                Content::Own { image, .. } => Some(image.as_str()),
                Content::At(_) => None,
            })
            .collect();
        let needed: BTreeSet<SnapshotOf> = self
            .volumes
            .values()
            .filter_map(|volume| volume.content.snapshot())
            .chain(
                self.images
                    .values()
                    .filter_map(|image| image.parent.clone()),
            )
            .collect();
        let mut garbage = Vec::new();
        for (name, image) in &self.images {
            let useless: Vec<&String> = image
                .snapshots
                .iter()
                .filter(|(snapshot, kept)| {
                    let of = SnapshotOf {
                        image: name.clone(),
                        snapshot: (*snapshot).clone(),
                    };
                    kept.maker.is_none() && !needed.contains(&of)
                })
                .map(|(snapshot, _)| snapshot)
                .collect();
            let head = image.maker.is_some() || heads.contains(name.as_str());
            garbage.extend(useless.iter().map(|snapshot| {
                Garbage::Snapshot(SnapshotOf {
                    image: name.clone(),
                    snapshot: (*snapshot).clone(),
                })
            }));
            if !head && image.snapshots.len() == useless.len() {
                garbage.push(Garbage::Image(name.clone()));
            }
        }
        garbage
    }

    /// How many images a kernel opens for this one beside it: its parents.
    #[must_use]
    pub fn depth(&self, image: &str) -> usize {
        let mut depth = 0;
        let mut image = self.images.get(image);
        while let Some(parent) = image.and_then(|image| image.parent.as_ref()) {
            depth += 1;
            if depth > self.images.len() {
                break;
            }
            image = self.images.get(&parent.image);
        }
        depth
    }
}

/// Reads the value of [`GENERATION`].
#[must_use]
pub fn generation(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> LvName {
        text.parse().unwrap()
    }

    fn of(image: &str, snapshot: &str) -> SnapshotOf {
        SnapshotOf {
            image: image.to_owned(),
            snapshot: snapshot.to_owned(),
        }
    }

    fn own(image: &str) -> Content {
        Content::Own {
            image: image.to_owned(),
            same: None,
            active: 0,
            live: false,
        }
    }

    fn maker(process: &str) -> Maker {
        Maker {
            host: "h".to_owned(),
            process: process.to_owned(),
        }
    }

    fn volume(content: Content) -> Volume {
        Volume {
            seq: 1,
            created: 0,
            size: 1 << 20,
            tags: vec!["a".to_owned()],
            origin: None,
            host: None,
            content,
        }
    }

    fn image(parent: Option<SnapshotOf>, snapshots: &[&str]) -> Image {
        let kept = |name: &&str| ((*name).to_owned(), Snapshot { at: 1, maker: None });
        Image {
            maker: None,
            parent,
            snapshots: snapshots.iter().map(kept).collect(),
        }
    }

    /// What is in the index is there again when it is read, and each change is refused on another generation.
    #[test]
    fn written_and_read() {
        let mut index = Index::default();
        let mut keys = Omap::new();
        let mut change = Change::default();
        change.volumes.insert(name("v"), Some(volume(own("i"))));
        change
            .images
            .insert("i".into(), Some(image(Some(of("p", "s")), &["t"])));
        let write = change.write(&index);
        assert!(write.create && write.compare.is_empty());
        keys.extend(write.set.clone());
        index.apply(&change);
        assert_eq!(Index::parse(&keys).unwrap(), index);
        assert_eq!(index.generation, 1);
        let mut gone = Change::default();
        gone.volumes.insert(name("v"), None);
        gone.images.insert("i".into(), None);
        let write = gone.write(&index);
        assert_eq!(write.compare[GENERATION], b"1");
        assert_eq!(write.remove, ["volume/v", "image/i"]);
        for (key, value) in [
            ("format", "2"),
            ("generation", "x"),
            ("volume/v", "{}"),
            ("image/i", "7"),
        ] {
            let mut wrong = keys.clone();
            wrong.insert(key.into(), value.into());
            let error = Index::parse(&wrong).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
        // What a later version may add beside, as long as the format is the same.
        keys.insert("host/x".into(), b"{}".to_vec());
        assert!(Index::parse(&keys).is_ok());
    }

    #[test]
    fn what_nothing_needs() {
        let mut index = Index::default();
        // An entry that is a snapshot of a lease's image, which has another one that nothing needs, and a copy of the entry.
        index
            .images
            .insert("lease".into(), image(None, &["entry", "old"]));
        index
            .images
            .insert("copy".into(), image(Some(of("lease", "entry")), &[]));
        index.volumes.insert(name("lease"), volume(own("lease")));
        index
            .volumes
            .insert(name("entry"), volume(Content::At(of("lease", "entry"))));
        index.volumes.insert(name("copy"), volume(own("copy")));
        let garbage = Index::garbage;
        assert_eq!(garbage(&index), [Garbage::Snapshot(of("lease", "old"))]);
        index
            .images
            .get_mut("lease")
            .unwrap()
            .snapshots
            .remove("old");
        assert_eq!(garbage(&index), []);
        // The lease goes: its image stays for the entry.
        index.volumes.remove("lease");
        assert_eq!(garbage(&index), []);
        // So it does for the copy alone.
        index.volumes.remove("entry");
        assert_eq!(garbage(&index), []);
        index.volumes.remove("copy");
        assert_eq!(garbage(&index), [Garbage::Image("copy".into())]);
        index.images.remove("copy");
        assert_eq!(
            garbage(&index),
            [
                Garbage::Snapshot(of("lease", "entry")),
                Garbage::Image("lease".into())
            ]
        );
    }

    #[test]
    fn what_is_being_made() {
        let mut index = Index::default();
        let mut made = image(None, &[]);
        made.maker = Some(maker("p"));
        index.images.insert("i".into(), made);
        let mut shot = image(None, &["s"]);
        shot.snapshots.get_mut("s").unwrap().maker = Some(maker("p"));
        index.images.insert("j".into(), shot);
        index.volumes.insert(name("j"), volume(own("j")));
        assert_eq!(index.garbage(), []);
        assert!(index.given_up(|maker| maker.process == "p").is_empty());
        let mut without = index.clone();
        without.apply(&index.given_up(|maker| maker.process == "q"));
        assert_eq!(
            without.garbage(),
            [Garbage::Image("i".into()), Garbage::Snapshot(of("j", "s"))]
        );
        // Its volume may be removed meanwhile.
        index.volumes.clear();
        assert_eq!(index.garbage(), []);
    }

    #[test]
    fn who_may_be_writing() {
        let mut index = Index::default();
        for (image, host, live) in [
            ("a", Some("me"), true),
            ("b", Some("other"), true),
            ("c", Some("other"), false),
            ("d", None, true),
        ] {
            let mut of = volume(own(image));
            of.host = host.map(str::to_owned);
            if let Content::Own { live: is_live, .. } = &mut of.content {
                *is_live = live;
            }
            index.volumes.insert(name(image), of);
        }
        assert_eq!(
            index.writers(),
            BTreeMap::from([("a", "me"), ("b", "other")])
        );
    }

    #[test]
    fn names_and_depth() {
        let mut index = Index {
            generation: 41,
            ..Index::default()
        };
        assert_eq!(index.fresh_name(&name("friend-x")), "friend-x~42");
        let long = index.fresh_name(&name(&"y".repeat(120)));
        assert!(long.len() < 96, "{long}");
        index.images.insert("a".into(), image(None, &["s"]));
        index
            .images
            .insert("b".into(), image(Some(of("a", "s")), &["s"]));
        index
            .images
            .insert("c".into(), image(Some(of("b", "s")), &[]));
        assert_eq!(
            ["a", "b", "c", "none"].map(|name| index.depth(name)),
            [0, 1, 2, 0]
        );
        // Never so, and no reason to hang.
        index.images.get_mut("a").unwrap().parent = Some(of("c", "s"));
        assert!(index.depth("c") >= 3);
    }

    /// What a host does to a store, at random; see `nothing_needed_is_removed`.
    #[derive(Debug, Clone)]
    enum Step {
        Create,
        Copy(usize),
        Publish(usize),
        Remove(usize),
        Collect(usize),
        Die(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            1 => Just(Step::Create),
            3 => (0_usize..8).prop_map(Step::Copy),
            3 => (0_usize..8).prop_map(Step::Publish),
            3 => (0_usize..8).prop_map(Step::Remove),
            4 => (0_usize..4).prop_map(Step::Collect),
            1 => (0_usize..8).prop_map(Step::Die),
        ]
    }

    proptest! {
        /// Over any order of what is made, copied, published, removed, left half made and collected: what a volume needs, its
        /// image, its snapshot and all parents of these, is never garbage; and once all volumes are gone, nothing is left.
        #[test]
        fn nothing_needed_is_removed(steps in prop::collection::vec(step(), 0..60)) {
            let mut index = Index::default();
            for step in steps {
                let names: Vec<LvName> = index.volumes.keys().cloned().collect();
                let pick = |number: usize| names.get(number % names.len().max(1)).cloned();
                let mut change = Change::default();
                let fresh = name(&format!("v{}", index.generation));
                match step {
                    Step::Create => {
                        let made = index.fresh_name(&fresh);
                        change.images.insert(made.clone(), Some(image(None, &[])));
                        change.volumes.insert(fresh, Some(volume(own(&made))));
                    }
                    Step::Copy(number) | Step::Publish(number) | Step::Die(number) => {
                        let Some(origin) = pick(number) else { continue };
                        let content = index.volumes[&origin].content.clone();
                        let at = content.snapshot().unwrap_or_else(|| {
                            let taken = index.fresh_name(&fresh);
                            let mut found = index.images[content.image()].clone();
                            let maker = matches!(step, Step::Die(_)).then(|| maker("dead"));
                            found.snapshots.insert(taken.clone(), Snapshot { at: index.generation + 1, maker });
                            change.images.insert(content.image().to_owned(), Some(found));
                            of(content.image(), &taken)
                        });
                        match step {
                            Step::Publish(_) => _ = change.volumes.insert(fresh, Some(volume(Content::At(at)))),
                            _ => {
                                let made = index.fresh_name(&fresh) + "i";
                                let mut clone = image(Some(at), &[]);
                                if matches!(step, Step::Die(_)) {
                                    clone.maker = Some(maker("dead"));
                                } else {
                                    change.volumes.insert(fresh, Some(volume(own(&made))));
                                }
                                change.images.insert(made, Some(clone));
                            }
                        }
                    }
                    Step::Remove(number) => {
                        let Some(gone) = pick(number) else { continue };
                        change.volumes.insert(gone, None);
                    }
                    Step::Collect(number) => {
                        index.apply(&index.given_up(|_| false));
                        let garbage = index.garbage();
                        if garbage.is_empty() { continue }
                        remove(&index, &garbage[number % garbage.len()], &mut change);
                    }
                }
                index.apply(&change);
                whole(&index)?;
            }
            let all: Vec<LvName> = index.volumes.keys().cloned().collect();
            let mut change = Change::default();
            change.volumes.extend(all.into_iter().map(|name| (name, None)));
            index.apply(&change);
            index.apply(&index.given_up(|_| false));
            while let Some(next) = index.garbage().first() {
                let mut change = Change::default();
                remove(&index, next, &mut change);
                index.apply(&change);
                whole(&index)?;
            }
            prop_assert_eq!(index.images.len(), 0);
        }
    }

    /// As the store does it: an image only once it has no snapshots.
    fn remove(index: &Index, garbage: &Garbage, change: &mut Change) {
        let (name, changed) = match garbage {
            Garbage::Snapshot(of) => {
                let mut found = index.images[&of.image].clone();
                found.snapshots.remove(&of.snapshot);
                (&of.image, Some(found))
            }
            Garbage::Image(name) if !index.images[name].snapshots.is_empty() => return,
            Garbage::Image(name) => (name, None),
        };
        change.images.insert(name.clone(), changed);
    }

    /// All that volumes and images are made of is there.
    fn whole(index: &Index) -> Result<(), TestCaseError> {
        let there = |at: &SnapshotOf| {
            index
                .images
                .get(&at.image)
                .is_some_and(|image| image.snapshots.contains_key(&at.snapshot))
        };
        for (name, volume) in &index.volumes {
            let image = index.images.get(volume.content.image());
            prop_assert!(image.is_some(), "{} has no image", name);
            prop_assert!(
                volume.content.snapshot().is_none_or(|at| there(&at)),
                "{} lost its snapshot",
                name
            );
        }
        for (name, image) in &index.images {
            prop_assert!(
                image.parent.as_ref().is_none_or(there),
                "{} lost its parent",
                name
            );
        }
        Ok(())
    }
}
