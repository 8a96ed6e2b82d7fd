// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is known of the store in memory. Pure: no I/O, no clock.
//!
//! A listing says what the store held at one moment, and arrives later. Meanwhile the engine publishes entries, gives
//! entries up and makes LVs, so each such change is kept, with its time, until a listing arrives that was asked for
//! after it. Times are passed in; listings must be taken over in the order in which they were asked for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::unix_now;
use crate::cache::names::{LvName, Tag};
use crate::cache::select::{Entry, Index};
use crate::cache::spec::Scope;
use crate::cache::tags::USED_GRAIN;
use crate::cache::units::Bytes;
use crate::storage::Listing;

/// When something was last restored from an entry.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// In seconds since 1970, by a clock that may be set.
    pub at: u64,
    /// By one that is never set.
    pub when: Instant,
}

impl Use {
    /// Just now.
    #[must_use]
    pub fn now() -> Self {
        Self {
            at: unix_now(),
            when: Instant::now(),
        }
    }

    /// Whether it was less than that before `now`.
    pub(super) fn is_within(&self, time: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.when) < time
    }
}

/// The base, as the listing has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    pub lv: LvName,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Virtual size.
    pub size: Bytes,
}

/// What can be restored from, and what has happened to the store since it was last listed.
#[derive(Default)]
pub(super) struct Catalog {
    index: Arc<Index>,
    base: Option<Base>,
    /// Grows whenever `index` or `base` change; 0 before the first listing.
    generation: u64,
    /// LVs that we made, and when.
    made: HashMap<LvName, Instant>,
    /// LVs that the store did not say it made, and when it was asked to: it may have.
    doubtful: HashMap<LvName, Instant>,
    /// Entries that we published, and when.
    born: HashMap<LvName, (Instant, Entry)>,
    /// LVs that we gave up, and when.
    gone: HashMap<LvName, Instant>,
    /// Those of them that do not say so in the store until they are removed.
    leaving: HashSet<LvName>,
    /// Entries found damaged while another program had them active: not used until none has.
    unready: HashSet<LvName>,
    /// When something was last restored from an entry, in this life of the daemon.
    used: HashMap<LvName, Use>,
    /// When a use of an entry was last written to the store, or was about to be, in seconds since 1970.
    noted: HashMap<LvName, u64>,
    /// LVs that are not clearly ours, and why, as far as that was reported.
    reported: HashMap<LvName, String>,
}

impl Catalog {
    /// The entries, newest first. A snapshot: it does not follow later changes.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The base, if there is one.
    pub fn base(&self) -> Option<&Base> {
        self.base.as_ref()
    }

    /// A number that grows whenever [`Catalog::index`] or [`Catalog::base`] change, and is 0 before the first listing.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether `lv` is an entry that can be restored from.
    pub fn has(&self, lv: &LvName) -> bool {
        self.index.entries().iter().any(|entry| entry.lv == *lv)
    }

    /// Takes over what a listing says that was asked for at `asked`; what is newer stays as it is known.
    pub fn take_over(&mut self, mut entries: Vec<Entry>, base: Option<Base>, asked: Instant) {
        self.made.retain(|_, when| *when >= asked);
        self.gone.retain(|_, when| *when >= asked);
        self.born.retain(|_, (when, _)| *when >= asked);
        entries.retain(|entry| !self.is_gone(&entry.lv));
        let born = self.born.values().map(|(_, entry)| entry);
        let newer: Vec<_> = born
            .filter(|born| entries.iter().all(|entry| entry.lv != born.lv))
            .cloned()
            .collect();
        entries.extend(newer);
        self.replace(
            Index::new(entries),
            base.filter(|base| !self.is_gone(&base.lv)),
        );
    }

    fn is_gone(&self, lv: &LvName) -> bool {
        self.gone.contains_key(lv) || self.leaving.contains(lv)
    }

    fn replace(&mut self, index: Index, base: Option<Base>) {
        let is_first = self.generation == 0;
        if is_first || index.entries() != self.index.entries() || base != self.base {
            self.index = Arc::new(index);
            self.base = base;
            self.generation += 1;
        }
    }

    /// Notes that the store has made `lv`, and answered at `now`.
    pub fn make(&mut self, lv: LvName, now: Instant) {
        self.made.insert(lv, now);
    }

    /// Whether a listing that was taken over says nothing of `lv`, as we made it or gave it up after that was asked for.
    pub fn is_newer(&self, lv: &LvName) -> bool {
        self.made.contains_key(lv) || self.gone.contains_key(lv)
    }

    /// Notes that the store was to make `lv`, and has not said by `now` that it did.
    pub fn doubt(&mut self, lv: LvName, now: Instant) {
        self.doubtful.insert(lv, now);
    }

    /// Whether it is not known of an LV if the store has made it.
    #[cfg(test)]
    pub fn is_in_doubt(&self) -> bool {
        !self.doubtful.is_empty()
    }

    /// Takes out of a listing that was asked for at `asked` what the store did not say it made, and gives that: it is to
    /// be removed. What such a listing does not have, and was to be made before, never will be: a store does one
    /// thing after another.
    pub fn settle_doubts(&mut self, listing: &mut Listing, asked: Instant) -> Vec<LvName> {
        let doubtful = &mut self.doubtful;
        let made: Vec<LvName> = listing
            .lvs
            .extract_if(.., |lv| doubtful.contains_key(&lv.name))
            .map(|lv| lv.name)
            .collect();
        doubtful.retain(|lv, when| *when >= asked || made.contains(lv));
        made
    }

    /// Adds an entry that we published by `now`. It is the newest until a listing says its number, and counts as used: it
    /// is what the next job looks for.
    pub fn publish(&mut self, lv: LvName, scope: Scope, tags: Vec<Tag>, now: Use) {
        let newest = self.index.entries().first().map_or(0, |entry| entry.seq);
        let entry = Entry {
            lv: lv.clone(),
            seq: newest + 1,
            created: now.at,
            scope,
            tags,
        };
        let mut entries = self.index.entries().to_vec();
        entries.push(entry.clone());
        self.index = Arc::new(Index::new(entries));
        self.generation += 1;
        self.used.insert(lv.clone(), now);
        self.born.insert(lv, (now.when, entry));
    }

    /// Forgets `lv`, if it is an entry or the base, as it was given up by `now`.
    pub fn give_up(&mut self, lv: &LvName, now: Instant) {
        self.gone.insert(lv.clone(), now);
        self.born.remove(lv);
        let base = self.base.clone().filter(|base| base.lv != *lv);
        if self.has(lv) {
            let left = self.index.entries().iter().filter(|entry| entry.lv != *lv);
            self.replace(Index::new(left.cloned().collect()), base);
        } else if base != self.base {
            self.base = base;
            self.generation += 1;
        }
    }

    /// As [`Catalog::give_up`], for what is to be removed and is not marked so in the store: listings have it until
    /// then.
    pub fn discard(&mut self, lv: &LvName, now: Instant) {
        self.give_up(lv, now);
        self.leaving.insert(lv.clone());
    }

    /// Notes that `lv` was removed by `now`.
    pub fn remove(&mut self, lv: &LvName, now: Instant) {
        if self.leaving.remove(lv) {
            self.gone.insert(lv.clone(), now);
        }
    }

    /// Notes that an entry is damaged, or not finished, while another program has it active.
    pub fn hold_back(&mut self, lv: LvName) {
        self.unready.insert(lv);
    }

    /// The entries that are held back.
    pub fn held_back(&self) -> &HashSet<LvName> {
        &self.unready
    }

    /// Holds those of `lvs` back no longer.
    pub fn release(&mut self, lvs: &HashSet<LvName>) {
        self.unready.retain(|lv| !lvs.contains(lv));
    }

    /// Notes that something is restored from an entry now.
    pub fn restore_from(&mut self, entry: &LvName, now: Use) {
        self.used.insert(entry.clone(), now);
    }

    /// Notes that a lease begins now with what was restored from an entry. Gives whether that is to be written to the
    /// store, which is so once in [`USED_GRAIN`].
    pub fn lease_from(&mut self, entry: &LvName, now: Use) -> bool {
        self.restore_from(entry, now);
        let noted = self.noted.get(entry);
        let due = noted.is_none_or(|noted| now.at.abs_diff(*noted) >= USED_GRAIN);
        if due {
            self.noted.insert(entry.clone(), now.at);
        }
        due
    }

    /// When something was last restored from entries, in this life of the daemon.
    pub fn uses(&self) -> &HashMap<LvName, Use> {
        &self.used
    }

    /// Forgets the uses of entries that are not `there`, but for those of the time `keep` before `now`: what was just
    /// published is in the next listing only.
    pub fn forget_uses(&mut self, keep: Duration, now: Instant, there: &HashSet<&LvName>) {
        self.used
            .retain(|lv, used| used.is_within(keep, now) || there.contains(lv));
        self.noted.retain(|lv, _| there.contains(lv));
    }

    /// Whether it is to be reported that `lv` is not clearly ours: once for each reason.
    pub fn report(&mut self, lv: &LvName, why: &str) -> bool {
        let before = self.reported.insert(lv.clone(), why.to_owned());
        before.as_deref() != Some(why)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::storage::Lv;

    /// Times by the tick of a clock of the test's own.
    struct Clock(Instant);

    impl Clock {
        fn at(&self, tick: u64) -> Instant {
            self.0 + Duration::from_millis(tick)
        }
    }

    fn clock() -> Clock {
        Clock(Instant::now())
    }

    fn lv(name: &str) -> LvName {
        name.parse().unwrap()
    }

    fn entry(name: &str, seq: u64) -> Entry {
        Entry {
            lv: lv(name),
            seq,
            created: 1,
            scope: None,
            tags: vec!["a".parse().unwrap()],
        }
    }

    fn base(name: &str) -> Base {
        Base {
            lv: lv(name),
            created: 1,
            size: Bytes::mib(64),
        }
    }

    fn listing(names: &[&str]) -> Listing {
        let lvs = names.iter().map(|name| Lv {
            name: lv(name),
            seq: 1,
            created: 1,
            size: Bytes::mib(64),
            tags: Vec::new(),
            origin: None,
            device: None,
            open: false,
        });
        Listing {
            lvs: lvs.collect(),
            ..Listing::default()
        }
    }

    fn publish(catalog: &mut Catalog, name: &str, now: Instant) {
        let tags = vec!["a".parse().unwrap()];
        catalog.publish(lv(name), None, tags, Use { at: 1, when: now });
    }

    /// A use at a second of the clock that may be set, and a tick of the other.
    fn used(at: u64, when: Instant) -> Use {
        Use { at, when }
    }

    /// The names of the entries, newest first.
    fn entries(catalog: &Catalog) -> Vec<&str> {
        let entries = catalog.index().entries().iter();
        entries.map(|entry| entry.lv.as_str()).collect()
    }

    #[test]
    fn what_was_published_stays_until_a_later_listing_says_what_became_of_it() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        catalog.take_over(vec![entry("old", 3)], None, clock.at(0));
        publish(&mut catalog, "new", clock.at(2));
        assert_eq!(entries(&catalog), ["new", "old"]);
        // Asked for before, and in the very moment.
        for asked in [1, 2] {
            catalog.take_over(vec![entry("old", 3)], None, clock.at(asked));
            assert_eq!(entries(&catalog), ["new", "old"]);
        }
        // It knows the number.
        catalog.take_over(
            vec![entry("old", 3), entry("other", 8), entry("new", 7)],
            None,
            clock.at(2),
        );
        assert_eq!(entries(&catalog), ["other", "new", "old"]);
        // Asked for later: another program has removed it.
        catalog.take_over(vec![entry("old", 3)], None, clock.at(3));
        assert_eq!(entries(&catalog), ["old"]);
    }

    #[test]
    fn what_was_given_up_does_not_come_back_with_a_listing_from_before() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        let all = || vec![entry("one", 1), entry("two", 2)];
        catalog.take_over(all(), Some(base("base")), clock.at(0));
        catalog.give_up(&lv("one"), clock.at(2));
        catalog.give_up(&lv("base"), clock.at(2));
        assert_eq!((entries(&catalog), catalog.base()), (vec!["two"], None));
        catalog.take_over(all(), Some(base("base")), clock.at(1));
        assert_eq!((entries(&catalog), catalog.base()), (vec!["two"], None));
        // It was not removed, and can be used again.
        catalog.take_over(all(), Some(base("base")), clock.at(3));
        assert_eq!(entries(&catalog), ["two", "one"]);
        assert_eq!(catalog.base(), Some(&base("base")));
    }

    #[test]
    fn what_was_published_and_given_up_is_gone_for_listings_from_before() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        publish(&mut catalog, "one", clock.at(2));
        catalog.give_up(&lv("one"), clock.at(3));
        catalog.take_over(vec![], None, clock.at(1));
        assert!(entries(&catalog).is_empty());
        catalog.take_over(vec![entry("one", 1)], None, clock.at(2));
        assert!(entries(&catalog).is_empty());
    }

    #[test]
    fn what_was_discarded_stays_away_until_it_is_removed() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        let all = || vec![entry("one", 1), entry("two", 2)];
        catalog.take_over(all(), Some(base("base")), clock.at(0));
        catalog.discard(&lv("one"), clock.at(1));
        catalog.discard(&lv("base"), clock.at(1));
        for asked in [2, 3] {
            catalog.take_over(all(), Some(base("base")), clock.at(asked));
            assert_eq!((entries(&catalog), catalog.base()), (vec!["two"], None));
        }
        for name in ["one", "base", "two"] {
            catalog.remove(&lv(name), clock.at(5));
        }
        catalog.take_over(all(), Some(base("base")), clock.at(4));
        assert_eq!((entries(&catalog), catalog.base()), (vec!["two"], None));
        catalog.take_over(vec![entry("two", 2)], None, clock.at(6));
        assert!(catalog.leaving.is_empty() && catalog.gone.is_empty());
    }

    #[test]
    fn generations_count_changes_alone() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        let mut before = catalog.generation();
        let mut changes = |catalog: &Catalog| {
            let changed = catalog.generation() > before;
            before = catalog.generation();
            changed
        };
        let listed = || vec![entry("one", 1)];
        catalog.take_over(vec![], None, clock.at(0));
        assert!(changes(&catalog));
        catalog.take_over(listed(), Some(base("base")), clock.at(1));
        assert!(changes(&catalog));
        catalog.take_over(listed(), Some(base("base")), clock.at(2));
        assert!(!changes(&catalog));
        catalog.give_up(&lv("of-a-volume"), clock.at(3));
        catalog.make(lv("of-another"), clock.at(3));
        catalog.doubt(lv("none"), clock.at(3));
        catalog.hold_back(lv("one"));
        catalog.lease_from(&lv("one"), used(1, clock.at(3)));
        assert!(!changes(&catalog));
        catalog.take_over(listed(), Some(base("another")), clock.at(4));
        assert!(changes(&catalog));
        publish(&mut catalog, "two", clock.at(5));
        assert!(changes(&catalog));
        catalog.give_up(&lv("another"), clock.at(5));
        assert!(changes(&catalog));
        catalog.give_up(&lv("one"), clock.at(5));
        assert!(changes(&catalog));
        catalog.give_up(&lv("one"), clock.at(6));
        assert!(!changes(&catalog));
    }

    #[test]
    fn what_was_just_made_is_not_missed() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        catalog.make(lv("new"), clock.at(2));
        catalog.take_over(vec![], None, clock.at(1));
        assert!(catalog.is_newer(&lv("new")));
        catalog.take_over(vec![], None, clock.at(3));
        assert!(!catalog.is_newer(&lv("new")));
        catalog.give_up(&lv("new"), clock.at(4));
        assert!(catalog.is_newer(&lv("new")));
    }

    #[test]
    fn doubts_last_until_a_later_listing() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        catalog.doubt(lv("late"), clock.at(2));
        catalog.doubt(lv("never"), clock.at(2));
        // Asked for before: neither can be in it, and either may come yet.
        assert!(
            catalog
                .settle_doubts(&mut listing(&["x"]), clock.at(1))
                .is_empty()
        );
        let mut listed = listing(&["x", "late"]);
        assert_eq!(
            catalog.settle_doubts(&mut listed, clock.at(3)),
            [lv("late")]
        );
        assert_eq!(listed.lvs.len(), 1);
        // It is removed a while after: until then it is seen again.
        let mut listed = listing(&["x", "late", "never"]);
        assert_eq!(
            catalog.settle_doubts(&mut listed, clock.at(4)),
            [lv("late")]
        );
        assert_eq!(listed.lvs.len(), 2);
        assert!(
            catalog
                .settle_doubts(&mut listing(&["x"]), clock.at(5))
                .is_empty()
        );
        assert!(catalog.doubtful.is_empty());
    }

    #[test]
    fn uses_are_written_once_an_hour() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        let one = lv("one");
        let at = |seconds| used(seconds, clock.at(0));
        catalog.restore_from(&one, at(5));
        assert!(catalog.lease_from(&one, at(10)));
        assert!(!catalog.lease_from(&one, at(9 + USED_GRAIN)));
        assert!(catalog.lease_from(&one, at(10 + USED_GRAIN)));
        // The clock was set back.
        assert!(!catalog.lease_from(&one, at(11)));
        assert!(catalog.lease_from(&one, at(9)));
        assert_eq!(catalog.uses()[&one].at, 9);
    }

    #[test]
    fn uses_are_forgotten_with_their_entries() {
        let (clock, mut catalog) = (clock(), Catalog::default());
        for (name, tick) in [("there", 1), ("removed", 1), ("just-published", 9)] {
            catalog.lease_from(&lv(name), used(1, clock.at(tick)));
        }
        let keep = clock.at(10) - clock.at(5);
        catalog.forget_uses(keep, clock.at(10), &HashSet::from([&lv("there")]));
        let mut left: Vec<_> = catalog.uses().keys().map(LvName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["just-published", "there"]);
        assert_eq!(catalog.noted.len(), 1);
    }

    #[test]
    fn damaged_entries_are_held_back_until_they_are_released() {
        let mut catalog = Catalog::default();
        catalog.hold_back(lv("one"));
        catalog.hold_back(lv("two"));
        catalog.release(&HashSet::from([lv("two"), lv("three")]));
        assert_eq!(*catalog.held_back(), HashSet::from([lv("one")]));
    }

    #[test]
    fn each_reason_is_reported_once() {
        let mut catalog = Catalog::default();
        let one = lv("one");
        let reports: Vec<_> = ["a", "a", "b", "b", "a"]
            .iter()
            .map(|why| catalog.report(&one, why))
            .collect();
        assert_eq!(reports, [true, false, true, false, true]);
    }

    /// What happens, one after another, to a store and to what is known of it.
    #[derive(Debug, Clone)]
    enum Step {
        /// We publish an entry.
        Publish,
        /// We give an entry up that is known: that one of them.
        GiveUp(usize),
        /// The same, but the store does not take the mark.
        Discard(usize),
        /// What was discarded is removed.
        Remove,
        /// The store is to publish an entry and does not answer; it does so now, later, or never.
        Doubt(Option<bool>),
        /// Another program makes an entry, or removes one.
        OtherMakes,
        OtherRemoves(usize),
        /// Another program makes an LV the base, or takes that away.
        OtherSetsBase(bool),
        /// A listing is asked for, unless one is on its way.
        Ask,
        /// It arrives.
        Arrive,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => Just(Step::Publish),
            2 => any::<usize>().prop_map(Step::GiveUp),
            1 => any::<usize>().prop_map(Step::Discard),
            1 => Just(Step::Remove),
            2 => prop::option::of(any::<bool>()).prop_map(Step::Doubt),
            1 => Just(Step::OtherMakes),
            1 => any::<usize>().prop_map(Step::OtherRemoves),
            1 => any::<bool>().prop_map(Step::OtherSetsBase),
            3 => Just(Step::Ask),
            3 => Just(Step::Arrive),
        ];
        prop::collection::vec(step, 1..50)
    }

    /// A store, and beside it everything that ever happened: what is to be known is computed anew from that each time.
    #[derive(Default)]
    struct Naive {
        /// The entries that the store has, and their numbers.
        store: BTreeMap<LvName, u64>,
        base: Option<Base>,
        seq: u64,
        /// What the store was to publish and does only before it is listed next.
        late: Vec<LvName>,
        /// What the store did not say it published.
        doubtful: HashSet<LvName>,
        /// What was discarded, and is not removed yet.
        discarded: HashSet<LvName>,
        /// What we published (`true`) or gave up, by the tick.
        history: Vec<(u64, LvName, bool)>,
        /// What the last listing to arrive says, and when it was asked for.
        listed: (u64, BTreeMap<LvName, u64>, Option<Base>),
    }

    impl Naive {
        fn add(&mut self, lv: LvName) {
            self.seq += 1;
            self.store.insert(lv, self.seq);
        }

        fn list(&mut self, asked: u64) -> (u64, BTreeMap<LvName, u64>, Option<Base>) {
            for lv in std::mem::take(&mut self.late) {
                self.add(lv);
            }
            (asked, self.store.clone(), self.base.clone())
        }

        fn expected(&self) -> HashSet<LvName> {
            let (asked, listed, _) = &self.listed;
            let mut known: HashSet<LvName> = listed.keys().cloned().collect();
            for (when, lv, published) in &self.history {
                if when < asked {
                    continue;
                }
                if *published {
                    known.insert(lv.clone());
                } else {
                    known.remove(lv);
                }
            }
            known.retain(|lv| !self.doubtful.contains(lv) && !self.discarded.contains(lv));
            known
        }
    }

    fn arrive(
        catalog: &mut Catalog,
        naive: &mut Naive,
        clock: &Clock,
        listed: (u64, BTreeMap<LvName, u64>, Option<Base>),
    ) {
        let asked = clock.at(listed.0);
        let names: Vec<_> = listed.1.keys().map(LvName::as_str).collect();
        let mut listing = listing(&names);
        let found = catalog.settle_doubts(&mut listing, asked);
        // They are removed at once.
        for lv in &found {
            naive.store.remove(lv);
        }
        let entries = listing.lvs.iter().map(|lv| Entry {
            seq: listed.1[&lv.name],
            ..entry(lv.name.as_str(), 0)
        });
        catalog.take_over(entries.collect(), listed.2.clone(), asked);
        naive.listed = listed;
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

        #[test]
        fn whatever_happens_while_listings_are_on_their_way(steps in steps()) {
            let (clock, mut catalog, mut naive) = (clock(), Catalog::default(), Naive::default());
            catalog.take_over(vec![], None, clock.at(0));
            let mut on_its_way = None;
            let last = steps.len() as u64;
            for (tick, step) in (0..).zip(steps) {
                let before = (Arc::clone(catalog.index()), catalog.base().cloned(), catalog.generation());
                let fresh = lv(&format!("lv{tick}"));
                match step {
                    Step::Publish => {
                        naive.add(fresh.clone());
                        naive.history.push((tick, fresh.clone(), true));
                        publish(&mut catalog, fresh.as_str(), clock.at(tick));
                        prop_assert_eq!(entries(&catalog)[0], fresh.as_str());
                    }
                    Step::GiveUp(which) => {
                        let known = catalog.index().entries();
                        if !known.is_empty() {
                            let lv = known[which % known.len()].lv.clone();
                            naive.store.remove(&lv);
                            naive.history.push((tick, lv.clone(), false));
                            catalog.give_up(&lv, clock.at(tick));
                        }
                    }
                    Step::Discard(which) => {
                        let known = catalog.index().entries();
                        if !known.is_empty() {
                            let lv = known[which % known.len()].lv.clone();
                            naive.discarded.insert(lv.clone());
                            catalog.discard(&lv, clock.at(tick));
                        }
                    }
                    Step::Remove => {
                        for lv in naive.discarded.drain() {
                            naive.store.remove(&lv);
                            catalog.remove(&lv, clock.at(tick));
                            naive.history.push((tick, lv, false));
                        }
                    }
                    Step::Doubt(done) => {
                        match done {
                            Some(true) => naive.add(fresh.clone()),
                            Some(false) => naive.late.push(fresh.clone()),
                            None => {}
                        }
                        naive.doubtful.insert(fresh.clone());
                        catalog.doubt(fresh, clock.at(tick));
                    }
                    Step::OtherMakes => naive.add(fresh),
                    Step::OtherRemoves(which) => {
                        let there: Vec<_> = naive.store.keys().cloned().collect();
                        if !there.is_empty() {
                            naive.store.remove(&there[which % there.len()]);
                        }
                    }
                    Step::OtherSetsBase(set) => naive.base = set.then(|| base(fresh.as_str())),
                    Step::Ask => {
                        if on_its_way.is_none() {
                            on_its_way = Some(naive.list(tick));
                        }
                    }
                    Step::Arrive => {
                        if let Some(listed) = on_its_way.take() {
                            arrive(&mut catalog, &mut naive, &clock, listed);
                        }
                    }
                }
                let known: HashSet<_> = catalog.index().entries().iter().map(|e| e.lv.clone()).collect();
                prop_assert_eq!(&known, &naive.expected());
                prop_assert_eq!(catalog.base(), naive.listed.2.as_ref());
                let same = before.0.entries() == catalog.index().entries() && before.1.as_ref() == catalog.base();
                prop_assert_eq!(same, before.2 == catalog.generation());
            }
            for lv in naive.discarded.drain() {
                naive.store.remove(&lv);
                catalog.remove(&lv, clock.at(last));
            }
            // Once nothing happens any more, two listings say all: the first may find what was in doubt.
            for tick in [last + 1, last + 2] {
                let listed = naive.list(tick);
                arrive(&mut catalog, &mut naive, &clock, listed);
            }
            let known: BTreeMap<_, _> = catalog.index().entries().iter().map(|e| (e.lv.clone(), e.seq)).collect();
            prop_assert_eq!(known, naive.store);
            prop_assert!(catalog.doubtful.is_empty() && catalog.made.is_empty());
            prop_assert!(catalog.born.is_empty() && catalog.gone.is_empty() && catalog.leaving.is_empty());
        }
    }
}
