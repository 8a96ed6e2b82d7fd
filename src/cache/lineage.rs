// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lineage: what was made from what, in the order in which it is drawn.
//!
//! Caches come in long chains, each made from the one before it, and now and then two are made from
//! one. So what continues a chain is drawn in its column, and only what branches off opens a new
//! one, as `git log --graph` has it:
//!
//! ```text
//! ●      base
//! ├─●    made from base
//! │ ●    made from that
//! ●      made from base, too: the last that was
//! ```

use std::collections::{HashMap, HashSet};

/// One line of the drawing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    /// What is drawn.
    pub what: What<'a>,
    /// The column, from 0. In each column before it a chain goes on below.
    pub column: usize,
    /// The line of what it was made from.
    pub parent: Option<usize>,
    /// It opens its column, branching off the one before it.
    pub branches: bool,
}

/// What a line shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What<'a> {
    /// One of those given, by its place among them.
    One(usize),
    /// What others were made from, and is not there any more.
    Gone(&'a str),
}

/// Draws what is given as name and name of what it was made from, the oldest first. Whatever is
/// given is drawn once, also where it is said to have been made from itself.
#[must_use]
pub fn draw<'a>(all: &[(&'a str, Option<&'a str>)]) -> Vec<Line<'a>> {
    let by_name: HashMap<&str, usize> = all
        .iter()
        .enumerate()
        .map(|(at, (name, _))| (*name, at))
        .collect();
    let mut children: HashMap<What<'a>, Vec<usize>> = HashMap::new();
    let mut roots = Vec::new();
    let mut gone = HashSet::new();
    for (at, (_, from)) in all.iter().enumerate() {
        match from {
            None => roots.push(What::One(at)),
            Some(from) => {
                let parent = by_name
                    .get(from)
                    .map_or(What::Gone(from), |p| What::One(*p));
                if let What::Gone(name) = parent
                    && gone.insert(name)
                {
                    roots.push(parent);
                }
                children.entry(parent).or_default().push(at);
            }
        }
    }
    let mut drawn = Drawing {
        children,
        seen: HashSet::new(),
        lines: Vec::with_capacity(all.len()),
    };
    for root in roots {
        drawn.tree(root);
    }
    // Whatever goes round in a circle hangs on no root.
    for at in 0..all.len() {
        drawn.tree(What::One(at));
    }
    drawn.lines
}

struct Drawing<'a> {
    children: HashMap<What<'a>, Vec<usize>>,
    seen: HashSet<What<'a>>,
    lines: Vec<Line<'a>>,
}

impl<'a> Drawing<'a> {
    /// Draws what hangs on `root`; no recursion, as a chain may have thousands.
    fn tree(&mut self, root: What<'a>) {
        let mut todo = vec![Line {
            what: root,
            column: 0,
            parent: None,
            branches: false,
        }];
        while let Some(line) = todo.pop() {
            if !self.seen.insert(line.what) {
                continue;
            }
            let (at, column, what) = (self.lines.len(), line.column, line.what);
            self.lines.push(line);
            let children = self.children.remove(&what).unwrap_or_default();
            // The last goes on in this column, below all that branches off.
            let last = children.len().saturating_sub(1);
            for (n, child) in children.into_iter().enumerate().rev() {
                todo.push(Line {
                    what: What::One(child),
                    column: column + usize::from(n < last),
                    parent: Some(at),
                    branches: n < last,
                });
            }
        }
    }
}

impl Line<'_> {
    /// What stands before it in text.
    #[must_use]
    pub fn prefix(&self) -> String {
        let mark = if matches!(self.what, What::Gone(_)) {
            "○"
        } else {
            "●"
        };
        match (self.column, self.branches) {
            (0, _) => mark.to_owned(),
            (column, true) => format!("{}├─{mark}", "│ ".repeat(column - 1)),
            (column, false) => format!("{}{mark}", "│ ".repeat(column)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines such as `a<b`, a made from b; what is drawn of them.
    fn drawn(all: &str) -> String {
        let all: Vec<_> = all
            .split_whitespace()
            .map(|one| match one.split_once('<') {
                Some((name, from)) => (name, Some(from)),
                None => (one, None),
            })
            .collect();
        let lines = draw(&all);
        for (at, line) in lines.iter().enumerate() {
            assert!(line.parent.is_none_or(|parent| parent < at));
        }
        let text = lines.iter().map(|line| {
            let name = match line.what {
                What::One(at) => all[at].0,
                What::Gone(name) => name,
            };
            format!("{}{name}\n", line.prefix())
        });
        text.collect()
    }

    #[test]
    fn trees() {
        for (all, want) in [
            ("", ""),
            ("a", "●a\n"),
            ("a b<a c<b", "●a\n●b\n●c\n"),
            ("a b<a c<b d<a", "●a\n├─●b\n│ ●c\n●d\n"),
            (
                "a b<a c<b d<b e<b f<a",
                "●a\n├─●b\n│ ├─●c\n│ ├─●d\n│ ●e\n●f\n",
            ),
            ("a b<a x", "●a\n●b\n●x\n"),
            ("b<a c<a d<x", "○a\n├─●b\n●c\n○x\n●d\n"),
            // By hand, with lvchange.
            ("a<a", "●a\n"),
            ("a<b b<a c<b", "●a\n●b\n●c\n"),
        ] {
            assert_eq!(drawn(all), want, "{all}");
        }
    }

    #[test]
    fn long_chains() {
        let names: Vec<_> = (0..50_000).map(|n| n.to_string()).collect();
        let all: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(n, name)| (&**name, n.checked_sub(1).map(|n| &*names[n])))
            .collect();
        let lines = draw(&all);
        assert_eq!(lines.len(), all.len());
        assert!(lines.iter().all(|line| line.column == 0));
    }
}
