// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether the end of a lease is published, and how.

use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use super::bounds::{PUBLISH_PATIENCE, REQUEST_PATIENCE};
use super::catalog::Use;
use super::prepare::{Of, fresh_lv_name};
use super::volume::{CUT_OFF, Source};
use super::{Engine, EngineError, Verdict, io_error, lock, tag};
use crate::cache::names::{LvName, Tag};
use crate::cache::record::entry_tags;
use crate::cache::spec::{Publish, Spec};
use crate::cache::tags::{MAKING, SNAPSHOT};
use crate::fs::Content;
use crate::mount::Mounted;
use crate::storage::NewLv;

/// What is known of an ended lease once nothing writes to it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub verdict: Verdict,
    /// Everything was written, and the file system is whole.
    pub clean: bool,
    pub changed: bool,
    /// See [`Source::saved`].
    pub saved: bool,
    pub discarded: bool,
    /// See [`super::volume::Lease::cut_off`].
    pub cut_off: bool,
}

/// Whether a lease that ended so is published, or why not.
pub(super) fn refusal(spec: &Spec, end: End) -> Option<&'static str> {
    if spec.save.is_empty() {
        return Some("no save tags");
    }
    if end.discarded {
        return Some("the job discarded it");
    }
    if end.cut_off {
        return Some(CUT_OFF);
    }
    let by_verdict = match (spec.publish, end.verdict) {
        (Publish::Never, _) => Some("publish=never"),
        (Publish::UnlessFailed | Publish::IfMissing, Verdict::Failure) => Some("the work failed"),
        (Publish::OnSuccess, Verdict::Failure | Verdict::Unknown) => Some("no success verdict"),
        _ => None,
    };
    if by_verdict.is_some() {
        by_verdict
    } else if !end.clean {
        Some("it did not end cleanly")
    } else if !end.changed && end.saved {
        Some("nothing changed")
    } else {
        None
    }
}

/// The entry that was made of a lease, or why none was to be.
pub(super) type Outcome = Result<LvName, &'static str>;

impl Engine {
    /// With `publish=if-missing`, the entry that is there already.
    pub(super) fn there(&self, spec: &Spec) -> Option<LvName> {
        let index = Arc::clone(lock(&self.state).catalog.index());
        let found = (spec.publish == Publish::IfMissing).then(|| index.saved(spec));
        found.flatten().map(|entry| entry.lv.clone())
    }

    /// Of several leases that end at once and publish what is missing, the first does: the others wait, behind all answers.
    /// Taken before the volume's `op`: a Mount that waits for that would wait for the publish of another volume.
    pub(super) fn turn_to_publish(&self, spec: &Spec) -> Option<MutexGuard<'_, ()>> {
        (spec.publish == Publish::IfMissing).then(|| lock(&self.missing))
    }

    /// Publishes a lease that ended so, unless that is refused. The caller has [`Engine::turn_to_publish`].
    pub(super) fn publish_unless(
        &self,
        spec: &Spec,
        refused: Option<&'static str>,
        publish: impl FnOnce() -> Result<LvName, EngineError>,
    ) -> Result<Outcome, EngineError> {
        let there = || self.there(spec).map(|_| "an entry has its tags already");
        match refused.or_else(there) {
            Some(why) => Ok(Err(why)),
            None => publish().map(Ok),
        }
    }

    /// Makes an entry of an LV that is not written to any more.
    pub(super) fn publish(
        &self,
        spec: &Spec,
        lv: &LvName,
        source: &Source,
    ) -> Result<LvName, EngineError> {
        let new = NewLv {
            name: fresh_lv_name(),
            tags: entry_tags(&spec.save, &spec.scope, source.lv.as_ref()),
            active: false,
        };
        self.with_room(spec, PUBLISH_PATIENCE, || {
            Ok(self.make_lv(Of::Lv(lv), &new)?)
        })?;
        self.born(new.name.clone(), spec);
        Ok(new.name)
    }

    /// Puts an entry that was just published into the index.
    fn born(&self, lv: LvName, spec: &Spec) {
        let (scope, tags) = (spec.scope.clone(), spec.save.clone());
        lock(&self.state)
            .catalog
            .publish(lv, scope, tags, Use::now());
        self.upkeep.tidy();
    }

    /// Makes an entry of an LV whose file system is mounted: consistent, as the
    /// store freezes it, but its log needs a recovery. That happens here, once,
    /// before anybody can match it. `written` says whether all that was written before could be stored: freezing a
    /// file system does not.
    pub(super) fn publish_mounted(
        &self,
        spec: &Spec,
        lv: &LvName,
        tags: &[Tag],
        written: impl FnOnce() -> Result<(), EngineError>,
    ) -> Result<LvName, EngineError> {
        let making = NewLv {
            name: fresh_lv_name(),
            tags: vec![tag(SNAPSHOT), tag(MAKING)],
            active: true,
        };
        let known = || lock(&self.state).catalog.generation();
        let before = known();
        let device = self.with_room(spec, REQUEST_PATIENCE, || {
            Ok(self.make_lv(Of::Lv(lv), &making)?)
        })?;
        let made = (|| {
            written()?;
            self.recover_log(lv, &making.name, device)?;
            let mut tags = tags.to_vec();
            // What was published since it was made is older all the same.
            if known() != before {
                tags.extend(self.store.list()?.published_after(&making.name));
            }
            (self.store).change_tags(&making.name, &tags, &[tag(MAKING)])?;
            self.persist();
            Ok(())
        })();
        match made {
            Ok(()) => {
                self.born(making.name.clone(), spec);
                Ok(making.name)
            }
            Err(error) => {
                let _ = self.doom(&making.name);
                Err(error)
            }
        }
    }

    /// Has the file system on `snapshot`, one of the mounted `lv`, recover its log, and sees that it is whole.
    fn recover_log(
        &self,
        lv: &LvName,
        snapshot: &LvName,
        device: Option<PathBuf>,
    ) -> Result<(), EngineError> {
        let device = device.map_or_else(|| self.store.activate(snapshot), Ok)?;
        let held = crate::fs::probe(&device).map_err(|e| io_error("reading", &device, e))?;
        let Content::Fs(fs) = held else {
            return Err(EngineError::Damaged(format!("{lv}: no file system on it")));
        };
        drop(Mounted::device(&device, fs).map_err(|e| io_error("mounting", &device, e.into()))?);
        self.wait_unmounted(snapshot, &device)?;
        if !crate::fs::is_clean(&device, fs).map_err(|e| io_error("checking", &device, e))? {
            return Err(EngineError::Damaged(format!(
                "{lv}: its file system is damaged"
            )));
        }
        Ok(self.store.deactivate(snapshot)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Failure, Success, Unknown};

    #[test]
    fn what_is_published() {
        const CLEAN: &str = "it did not end cleanly";
        const SAME: &str = "nothing changed";
        // save · publish · verdict · clean · changed · saved -> why not
        for (save, publish, verdict, clean, changed, saved, want) in [
            ("a", "unless-failed", Unknown, true, true, false, None),
            ("a", "unless-failed", Success, true, true, false, None),
            (
                "a",
                "unless-failed",
                Failure,
                true,
                true,
                false,
                Some("the work failed"),
            ),
            (
                "a",
                "unless-failed",
                Unknown,
                false,
                true,
                false,
                Some(CLEAN),
            ),
            (
                "a",
                "on-success",
                Unknown,
                true,
                true,
                false,
                Some("no success verdict"),
            ),
            (
                "a",
                "on-success",
                Failure,
                true,
                true,
                false,
                Some("no success verdict"),
            ),
            ("a", "on-success", Success, true, true, false, None),
            ("a", "on-success", Success, false, true, false, Some(CLEAN)),
            ("a", "if-missing", Unknown, true, true, false, None),
            (
                "a",
                "if-missing",
                Failure,
                true,
                true,
                false,
                Some("the work failed"),
            ),
            ("a", "always", Unknown, true, true, false, None),
            ("a", "always", Failure, true, true, false, None),
            ("a", "always", Success, false, true, false, Some(CLEAN)),
            (
                "a",
                "never",
                Success,
                true,
                true,
                false,
                Some("publish=never"),
            ),
            (
                "",
                "always",
                Success,
                true,
                true,
                false,
                Some("no save tags"),
            ),
            // The same content under tags that it had not is news.
            ("a", "always", Success, true, false, false, None),
            ("a", "always", Success, true, false, true, Some(SAME)),
            ("a", "unless-failed", Unknown, true, false, true, Some(SAME)),
            ("a", "unless-failed", Unknown, true, true, true, None),
        ] {
            let options = [("restore", "a"), ("save", save), ("publish", publish)];
            let options = options.iter().filter(|(_, value)| !value.is_empty());
            let options = options
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect();
            let spec = Spec::parse(&options).unwrap();
            let end = End {
                verdict,
                clean,
                changed,
                saved,
                discarded: false,
                cut_off: false,
            };
            assert_eq!(refusal(&spec, end), want, "{options:?} {end:?}");
        }
    }
}
