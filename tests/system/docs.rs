// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The documents' command blocks: each is run by a test as it stands, or says why not.
//!
//! The line before a block of commands says which: `<!-- run: ID -->`, and a test has it of [`block`] by that ID; or
//! `<!-- not run: REASON -->`. What they print is a block of `text`, after `<!-- prints: ID -->`: see [`assert_shown`].

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Test, Tier, test};
use crate::support::command::succeed;

pub fn tests() -> Vec<Test> {
    let tests: [(&str, fn()); 2] = [
        ("docs::every_block_is_run_or_says_why_not", every_block),
        ("docs::every_source_names_its_licence", every_source),
    ];
    tests
        .map(|(name, body)| test(Tier::Host, name, body))
        .into()
}

pub const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

/// The commands of the block with this ID.
#[track_caller]
pub fn block(id: &str) -> String {
    let mut blocks = blocks().unwrap();
    blocks
        .remove(id)
        .unwrap_or_else(|| panic!("no document has a block {id}"))
}

/// Fails where commands wrote something else than the document shows after them (`<!-- prints: ID -->`): each of its lines, in this
/// order, where `…` stands for anything.
#[track_caller]
pub fn assert_shown(id: &str, written: &str) {
    let shown = block(&format!("prints {id}"));
    let mut lines = written.lines();
    for wanted in shown.lines() {
        let has = |line: &str| {
            let mut rest = line;
            wanted.split('…').map(str::trim).all(|part| {
                let found = rest.find(part).map(|at| at + part.len());
                rest = &rest[found.unwrap_or(0)..];
                found.is_some()
            })
        };
        assert!(lines.any(has), "{wanted:?} is not in\n{written}");
    }
}

/// Runs commands as somebody in a checkout does who stops at the first that fails; what they wrote.
#[track_caller]
pub fn type_in(commands: &str) -> String {
    succeed(
        Command::new("/bin/sh")
            .args(["-ec", commands])
            .current_dir(REPOSITORY),
    )
}

fn every_block() {
    let blocks = blocks().unwrap_or_else(|problem| panic!("{problem}"));
    let sources = files("tests/system", "rs");
    let sources: String = sources
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect();
    for id in blocks.keys() {
        let used = match id.strip_prefix("prints ") {
            Some(id) => format!("assert_shown(\"{id}\""),
            None => format!("block(\"{id}\")"),
        };
        assert!(sources.contains(&used), "no test has {used}");
    }
}

fn every_source() {
    let sources = ["src", "tests", "benches"].map(|dir| files(dir, "rs"));
    for file in sources.iter().flatten() {
        let text = fs::read_to_string(file).unwrap();
        let licence = "// SPDX-License-Identifier: Apache-2.0 OR MIT\n";
        assert!(
            text.starts_with(licence),
            "{} does not begin with {licence}",
            file.display()
        );
    }
}

/// The blocks to be run, by their IDs; or what is wrong with one.
fn blocks() -> Result<BTreeMap<String, String>, String> {
    let mut documents = files("docs", "md");
    documents.extend(["README.md", "CONTRIBUTING.md"].map(|name| Path::new(REPOSITORY).join(name)));
    let mut blocks = BTreeMap::new();
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        let (mut before, mut lines) = ("", text.lines().enumerate());
        while let Some((number, line)) = lines.next() {
            if let Some(language) = line.trim_start().strip_prefix("```") {
                let content: String = lines
                    .by_ref()
                    .map(|(_, line)| line)
                    .take_while(|line| !line.trim_start().starts_with("```"))
                    .map(|line| format!("{line}\n"))
                    .collect();
                let place = format!("{}:{}", document.display(), number + 1);
                let mark = |name: &str| {
                    let text = before.strip_prefix(name)?.strip_suffix(" -->")?;
                    (!text.is_empty()).then_some(text)
                };
                let run = match (language, mark("<!-- run: "), mark("<!-- not run: ")) {
                    ("sh" | "toml", Some(id), None) => Some(id.to_owned()),
                    ("text", _, _) => mark("<!-- prints: ").map(|id| format!("prints {id}")),
                    ("sh", None, Some(_)) => None,
                    ("sh", _, _) => {
                        return Err(format!(
                            "{place}: the line before it says neither <!-- run: ID --> nor <!-- not run: REASON -->"
                        ));
                    }
                    ("bash" | "shell" | "console", _, _) => {
                        return Err(format!("{place}: commands are in blocks of `sh`"));
                    }
                    _ => None,
                };
                if let Some(id) = run
                    && blocks.insert(id.clone(), content).is_some()
                {
                    return Err(format!("{place}: a second block {id}"));
                }
            }
            before = line;
        }
    }
    Ok(blocks)
}

/// The files below a directory of the repository whose names end so.
fn files(dir: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![Path::new(REPOSITORY).join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|end| end == extension) {
                found.push(path);
            }
        }
    }
    found
}
