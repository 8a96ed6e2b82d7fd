// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The choice of what to restore from: criteria, an index of entries, newest first.
//!
//! The index is inverted: each tag has the list of its entries, and each scope
//! too. Entries are numbered from the newest on, sets of them are bit sets, so
//! that a criterion is a few `AND`s over 1,250 bytes at 10,000 entries and the
//! lowest bit left is the newest match. Tags are kept in order, which makes a
//! prefix a range of them; the union of a long range comes from *blocks*, ready
//! sets of neighbouring tags. A choice makes as many allocations as it has
//! criteria and scopes, however many entries there are.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;

use super::criteria::{Criteria, Criterion, Term};
use super::names::{LvName, Tag};
use super::spec::{Scope, Spec};

/// An entry as the index keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its LV.
    pub lv: LvName,
    /// Its place in the order of publishing ([`super::record::place`]).
    pub seq: u64,
    /// When it was published, seconds since 1970; for people, never for order:
    /// clocks are set back.
    pub created: u64,
    /// Who may read it.
    pub scope: Scope,
    /// Its tags, without the `friend:cache:` before them.
    pub tags: Vec<Tag>,
}

/// What was chosen, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice<'a> {
    /// The entry.
    pub entry: &'a Entry,
    /// Which scope it was found in: 0 is the volume's own ([`Spec::scopes`]).
    pub scope: usize,
    /// Which criterion matched: 0 is the first.
    pub criterion: usize,
    /// The first criterion matched, and each of its terms is a whole tag.
    pub exact: bool,
}

/// The entries that can be chosen from, arranged for choosing.
#[derive(Debug, Clone)]
pub struct Index {
    entries: Vec<Entry>,
    tags: Postings<Tag>,
    scopes: Postings<Scope>,
}

impl Default for Index {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl Index {
    /// An index of `entries`, in any order.
    #[must_use]
    pub fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable_by(|a, b| b.seq.cmp(&a.seq).then_with(|| a.lv.cmp(&b.lv)));
        let mut tags = Collector::default();
        let mut scopes = Collector::default();
        for (number, entry) in (0..).zip(&mut entries) {
            scopes.add(number, &mut entry.scope);
            for tag in &mut entry.tags {
                tags.add(number, tag);
            }
        }
        let words = entries.len().div_ceil(64);
        Self {
            entries,
            tags: tags.finish(words),
            scopes: scopes.finish(words),
        }
    }

    /// Its entries, newest first.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry that `spec` restores from; `None` where no criterion matches.
    ///
    /// Scopes are asked in order, the volume's own first; in a scope the first
    /// criterion that matches any entry wins; in it the newest entry.
    #[must_use]
    pub fn choose(&self, spec: &Spec) -> Option<Choice<'_>> {
        let criteria = &spec.restore.0;
        let mut matching: Vec<Option<Set>> = vec![None; criteria.len()];
        for (scope, name) in spec.scopes().enumerate() {
            let range = self.scopes.exact(name);
            if range.is_empty() {
                continue;
            }
            let in_scope = self.scopes.union(range);
            for (criterion, (wanted, matching)) in criteria.iter().zip(&mut matching).enumerate() {
                let matching = matching.get_or_insert_with(|| self.matching(wanted));
                if let Some(newest) = in_scope.first_common(matching) {
                    return Some(Choice {
                        entry: &self.entries[newest],
                        scope,
                        criterion,
                        exact: criterion == 0
                            && wanted
                                .terms()
                                .iter()
                                .all(|term| matches!(term, Term::Exact(_))),
                    });
                }
            }
        }
        None
    }

    /// The newest entry that `spec` reads and that has all of its save tags; `None` where there are none.
    #[must_use]
    pub fn saved(&self, spec: &Spec) -> Option<&Entry> {
        let tags = spec.save.iter().cloned().map(Term::Exact).collect();
        let wanted = Spec {
            restore: Criteria(vec![Criterion::new(tags)?]),
            ..spec.clone()
        };
        self.choose(&wanted).map(|choice| choice.entry)
    }

    /// The entries, of any scope, that have all of the criterion's terms.
    fn matching(&self, criterion: &Criterion) -> Set {
        let mut terms = criterion.terms().iter().map(|term| match term {
            Term::Exact(tag) => self.tags.exact(tag),
            Term::Prefix(prefix) => self.tags.prefix(prefix.as_str()),
        });
        let mut all = self.tags.union(terms.next().unwrap_or_default());
        for range in terms {
            all.keep_common(&self.tags.union(range));
        }
        all
    }
}

/// A set of entries by their numbers; bit 0 of word 0 is the newest.
#[derive(Debug, Clone)]
struct Set(Vec<u64>);

impl Set {
    fn insert(&mut self, number: u32) {
        self.0[number as usize / 64] |= 1 << (number % 64);
    }

    fn add_all(&mut self, other: &[u64]) {
        for (word, other) in self.0.iter_mut().zip(other) {
            *word |= other;
        }
    }

    fn keep_common(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word &= other;
        }
    }

    fn first_common(&self, other: &Self) -> Option<usize> {
        let mut words = self.0.iter().zip(&other.0).map(|(a, b)| a & b);
        let (n, word) = (0..).zip(&mut words).find(|(_, word)| *word != 0)?;
        Some(n * 64 + word.trailing_zeros() as usize)
    }
}

/// Which entries have which key (a tag or a scope).
#[derive(Debug, Clone)]
struct Postings<K> {
    /// Words in a set of entries.
    words: usize,
    /// In ascending order.
    keys: Vec<K>,
    /// Where each key's entries begin in `entries`, and after them its length.
    starts: Vec<u32>,
    /// The entries of the first key, of the second …
    entries: Vec<u32>,
    /// The key that each block begins with, and after them the number of keys.
    block_starts: Vec<u32>,
    /// The set of entries of each block, one after the other.
    block_sets: Vec<u64>,
}

impl<K: Ord> Postings<K> {
    /// Where `key` is: one key or none.
    fn exact(&self, key: &K) -> Range<usize> {
        match self.keys.binary_search(key) {
            Ok(n) => n..n + 1,
            Err(n) => n..n,
        }
    }

    /// The entries that have any of `keys`.
    fn union(&self, keys: Range<usize>) -> Set {
        let mut set = Set(vec![0; self.words]);
        if keys.is_empty() {
            return set;
        }
        let first = self
            .block_starts
            .partition_point(|&start| (start as usize) < keys.start);
        let last = self
            .block_starts
            .partition_point(|&start| start as usize <= keys.end)
            - 1;
        if first >= last {
            self.insert_each(&mut set, keys);
            return set;
        }
        let whole = self.block_starts[first] as usize..self.block_starts[last] as usize;
        self.insert_each(&mut set, keys.start..whole.start);
        for block in self.block_sets[first * self.words..last * self.words].chunks(self.words) {
            set.add_all(block);
        }
        self.insert_each(&mut set, whole.end..keys.end);
        set
    }

    fn insert_each(&self, set: &mut Set, keys: Range<usize>) {
        for &number in
            &self.entries[self.starts[keys.start] as usize..self.starts[keys.end] as usize]
        {
            set.insert(number);
        }
    }
}

impl Postings<Tag> {
    /// Where the tags are that begin with `prefix`.
    fn prefix(&self, prefix: &str) -> Range<usize> {
        let start = self.keys.partition_point(|tag| tag.as_str() < prefix);
        let rest = &self.keys[start..];
        start..start + rest.partition_point(|tag| tag.as_str().starts_with(prefix))
    }
}

/// Gathers keys, entry by entry, for [`Postings`].
struct Collector<K> {
    ids: HashMap<K, u32>,
    /// (id of the key, number of the entry), the latter ascending.
    pairs: Vec<(u32, u32)>,
}

impl<K> Default for Collector<K> {
    fn default() -> Self {
        Self {
            ids: HashMap::new(),
            pairs: Vec::new(),
        }
    }
}

impl<K: Ord + Hash + Clone> Collector<K> {
    /// Notes that entry `number` has `key`, and makes `key` share the memory of
    /// its equals.
    fn add(&mut self, number: u32, key: &mut K) {
        let id = match self.ids.get_key_value(key) {
            Some((known, &id)) => {
                *key = known.clone();
                id
            }
            None => {
                let id = self.ids.len() as u32;
                self.ids.insert(key.clone(), id);
                id
            }
        };
        self.pairs.push((id, number));
    }

    fn finish(self, words: usize) -> Postings<K> {
        let mut keys: Vec<(K, u32)> = self.ids.into_iter().collect();
        keys.sort_unstable();
        let mut ranks = vec![0; keys.len()];
        for (rank, (_, id)) in keys.iter().enumerate() {
            ranks[*id as usize] = rank;
        }

        let mut starts = vec![0_u32; keys.len() + 1];
        for (id, _) in &self.pairs {
            starts[ranks[*id as usize] + 1] += 1;
        }
        for n in 1..starts.len() {
            starts[n] += starts[n - 1];
        }
        let mut next = starts.clone();
        let mut entries = vec![0; self.pairs.len()];
        for (id, number) in self.pairs {
            let place = &mut next[ranks[id as usize]];
            entries[*place as usize] = number;
            *place += 1;
        }

        let mut postings = Postings {
            words,
            keys: keys.into_iter().map(|(key, _)| key).collect(),
            starts,
            entries,
            block_starts: Vec::new(),
            block_sets: Vec::new(),
        };
        postings.make_blocks();
        postings
    }
}

impl<K: Ord> Postings<K> {
    /// Cuts the keys into blocks of about eight postings a word of a set (a key
    /// with more has a block to itself): what a block leaves to insert one by one
    /// then costs about as much as the blocks of the widest prefix, and all blocks
    /// take about as much memory as the postings.
    fn make_blocks(&mut self) {
        let most = self.words * 8;
        let mut from = 0;
        while from < self.keys.len() {
            let mut to = from + 1;
            while to < self.keys.len() && (self.starts[to + 1] - self.starts[from]) as usize <= most
            {
                to += 1;
            }
            let mut set = Set(vec![0; self.words]);
            self.insert_each(&mut set, from..to);
            self.block_starts.push(from as u32);
            self.block_sets.append(&mut set.0);
            from = to;
        }
        self.block_starts.push(self.keys.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    fn entry(seq: u64, lv: &str, tags: &str, scope: Option<&str>) -> Entry {
        Entry {
            lv: lv.parse().unwrap(),
            seq,
            // The clock runs backwards: it must not matter.
            created: 1_000_000 - seq,
            scope: scope.map(|scope| scope.parse().unwrap()),
            tags: tags.split(' ').map(|tag| tag.parse().unwrap()).collect(),
        }
    }

    /// `[scope read-scopes] criteria`; `None` where they are refused.
    fn spec(text: &str) -> Option<Spec> {
        let (scopes, restore) = match text.strip_prefix('[') {
            Some(rest) => rest.split_once(']').unwrap(),
            None => ("-", text),
        };
        let (scope, read) = scopes.split_once(' ').unwrap_or((scopes, ""));
        let options = [
            ("restore", restore),
            ("scope", scope),
            ("read-scopes", read),
        ];
        let options: BTreeMap<_, _> = options
            .into_iter()
            .map(|(option, value)| (option.to_owned(), value.to_owned()))
            .collect();
        Spec::parse(&options).ok()
    }

    fn told(choice: Option<Choice<'_>>) -> String {
        let Some(choice) = choice else {
            return "nothing".to_owned();
        };
        let criterion = if choice.exact {
            "exact".to_owned()
        } else {
            choice.criterion.to_string()
        };
        let scope = match choice.scope {
            0 => String::new(),
            n => format!(" @{n}"),
        };
        format!("{} {criterion}{scope}", choice.entry.lv)
    }

    #[test]
    fn choices_of_the_table() {
        let mut entries = Vec::new();
        let mut choosing = false;
        let mut cases = 0;
        for (n, line) in (1..).zip(include_str!("select_cases.txt").lines()) {
            let line = line.trim_end();
            if line == "entries" {
                entries.clear();
                choosing = false;
            } else if line == "choices" {
                choosing = true;
            } else if line.is_empty() || line.starts_with('#') {
                continue;
            } else if choosing {
                let (volume, want) = line.split_once("=>").expect("a row with =>");
                let got = match spec(volume.trim()) {
                    Some(spec) => told(Index::new(entries.clone()).choose(&spec)),
                    None => "refused".to_owned(),
                };
                assert_eq!(got, want.trim(), "line {n}: {line}");
                cases += 1;
            } else {
                let (lv, rest) = line.trim().split_once(' ').unwrap();
                let (tags, scope) = match rest.split_once('@') {
                    Some((tags, scope)) => (tags, Some(scope)),
                    None => (rest, None),
                };
                // The order that a listing comes in says nothing.
                let place = entries.len() / 2;
                let seq = entries.len() as u64;
                entries.insert(place, entry(seq, lv, tags.trim(), scope));
            }
        }
        assert!(cases > 0);
    }

    /// What the documentation says, in the fewest words.
    fn naive<'a>(entries: &'a [Entry], spec: &Spec) -> Option<Choice<'a>> {
        for (scope, name) in spec.scopes().enumerate() {
            for (criterion, wanted) in spec.restore.0.iter().enumerate() {
                let matches = |entry: &&Entry| {
                    entry.scope == *name
                        && wanted.terms().iter().all(|term| {
                            entry.tags.iter().any(|tag| match term {
                                Term::Exact(wanted) => tag == wanted,
                                Term::Prefix(prefix) => tag.as_str().starts_with(prefix.as_str()),
                            })
                        })
                };
                if let Some(entry) = entries.iter().filter(matches).max_by_key(|e| e.seq) {
                    return Some(Choice {
                        entry,
                        scope,
                        criterion,
                        exact: criterion == 0 && !wanted.to_string().contains('*'),
                    });
                }
            }
        }
        None
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let scope = prop::sample::select(vec![None, Some("x"), Some("y")]);
        let letters = || 'a'..='h';
        let some: Vec<String> = letters()
            .flat_map(|a| {
                let longer = letters().flat_map(move |b| [format!("{a}{b}"), format!("a{a}{b}")]);
                [a.to_string()].into_iter().chain(longer)
            })
            .collect();
        let tags = prop::collection::vec(prop::sample::select(some), 1..6);
        // Up to several words in a set of entries, and many blocks.
        prop::collection::vec((tags, scope), 0..300)
            .prop_map(|entries| {
                (1..)
                    .zip(entries)
                    .map(|(seq, (tags, scope))| {
                        entry(seq, &format!("lv{seq}"), &tags.join(" "), scope)
                    })
                    .collect::<Vec<_>>()
            })
            .prop_shuffle()
    }

    proptest! {
        #[test]
        fn choices_are_the_naive_ones(
            entries in entries(),
            criteria in "(([ab]\\*?|[a-h]{2}\\*?|a[a-h]{2}) ){1,3}(;(([ab]|[a-i]{2}\\*?|a[a-h]{2}) ){1,3}){0,3}",
            scopes in prop::sample::select(vec!["-", "x", "x -", "z x", "- x y", "y z -"]),
        ) {
            let index = Index::new(entries.clone());
            let spec = spec(&format!("[{scopes}]{criteria}")).unwrap();
            prop_assert_eq!(index.choose(&spec), naive(&entries, &spec));
            let newest_first = index.entries().is_sorted_by(|a, b| a.seq > b.seq);
            prop_assert!(newest_first && index.entries().len() == entries.len());
        }

        #[test]
        fn criteria_are_read_as_written(text in "([a-c]{1,3}\\*?[ ;]{1,2}){0,10}") {
            let criteria: Criteria = text.parse().unwrap();
            prop_assert_eq!(criteria.to_string().parse(), Ok(criteria));
        }
    }

    #[test]
    fn equal_tags_share_memory() {
        let entries = vec![entry(1, "a", "linux", None), entry(2, "b", "linux", None)];
        let index = Index::new(entries);
        let [b, a] = index.entries() else { panic!() };
        assert!(std::ptr::eq(a.tags[0].as_str(), b.tags[0].as_str()));
    }
}
