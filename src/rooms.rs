// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The map in lib.rs against the `use` lines of all files: no room needs one that stands below it there, and
//! no two files of a room need each other.
//!
//! Tests are left out: they may use what they like. So is a room's own mod.rs, which is both the contents page of its
//! files and their common ground.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Where nothing is looked for: what is compiled for tests alone.
const TESTS: [&str; 2] = ["rooms", "documents"];

type Module = Vec<String>;

/// Each module below src/ and its text without comments and tests.
fn modules() -> BTreeMap<Module, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut dirs = vec![src.clone()];
    while let Some(dir) = dirs.pop() {
        for file in fs::read_dir(dir).expect("a directory") {
            let path = file.expect("a file").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                let module = module(path.strip_prefix(&src).expect("is in src"));
                let text = fs::read_to_string(&path).expect("UTF-8");
                found.insert(module, code(&text));
            }
        }
    }
    found.retain(|module, _| {
        !module.iter().any(|name| name == "tests")
            && !matches!(&module[..], [name] if name == "lib" || name == "main")
            && !TESTS.contains(&module[0].as_str())
    });
    found
}

fn module(file: &Path) -> Module {
    let path: PathBuf = file.with_extension("");
    let names = path.iter().map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| name != "mod").collect()
}

fn code(text: &str) -> String {
    let tests = [
        "#[cfg(test)]\nmod tests {",
        "#[cfg(test)]\npub(super) mod tests {",
    ];
    let end = tests.iter().filter_map(|tests| text.find(tests)).min();
    let text = &text[..end.unwrap_or(text.len())];
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The paths, from the crate's root, of all that a module's text names with `crate::` or `super::`.
fn needs(module: &Module, text: &str, modules: &BTreeMap<Module, String>) -> BTreeSet<Module> {
    let mut needs = BTreeSet::new();
    let starts = text
        .match_indices("crate::")
        .chain(text.match_indices("super::"));
    for (at, word) in starts {
        let before = text[..at].chars().next_back();
        // The rest of a longer path, or of a macro's `$crate`.
        if before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '$')) {
            continue;
        }
        let mut base = match word {
            "crate::" => Vec::new(),
            _ => module[..module.len() - 1].to_vec(),
        };
        let mut rest = &text[at + word.len()..];
        while let Some(after) = rest.strip_prefix("super::") {
            base.pop();
            rest = after;
        }
        for path in paths(rest) {
            let whole: Module = base.iter().cloned().chain(path).collect();
            // What is no module is an item of one.
            let known = (0..=whole.len()).rev().map(|n| whole[..n].to_vec());
            needs.extend(known.into_iter().find(|path| modules.contains_key(path)));
        }
    }
    needs
}

/// `a::{b, c::d}` as paths: `a::b` and `a::c::d`. What follows it is passed over.
fn paths(text: &str) -> Vec<Module> {
    let (mut found, mut open) = (Vec::new(), Vec::<usize>::new());
    let mut path = Module::new();
    let mut rest = text;
    loop {
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        if !name.is_empty() {
            path.push(name.to_owned());
        }
        if let Some(after) = after.strip_prefix("::") {
            rest = after;
            if let Some(after) = rest.strip_prefix('{') {
                open.push(path.len());
                rest = after.trim_start();
            }
            continue;
        }
        if !name.is_empty() {
            found.push(path.clone());
        }
        let Some(depth) = open.last() else {
            return found;
        };
        path.truncate(*depth);
        let after = after.trim_start();
        rest = if let Some(after) = after.strip_prefix(',') {
            after.trim_start()
        } else if let Some(after) = after.strip_prefix('}') {
            open.pop();
            after
        } else {
            // `as other`: the name was taken already.
            let next = after.find([',', '}']).unwrap_or(after.len());
            &after[next..]
        };
    }
}

/// The rooms of lib.rs's map, in its order: what the lines of the list below "# The rooms" begin with.
fn map() -> Vec<String> {
    let lib = include_str!("lib.rs");
    let (_, map) = lib.split_once("//! # The rooms").expect("the heading");
    let (map, _) = map.split_once("//! # ").expect("the next one");
    let rooms = map.lines().filter_map(|line| {
        let rest = line.strip_prefix("//! - ")?.trim_start_matches('[');
        let rest = rest.strip_prefix('`')?;
        Some(rest.split_once('`')?.0.to_owned())
    });
    rooms.collect()
}

#[test]
fn paths_of_use_trees() {
    let given = "a::{self, b, c::{d, e as f}, g};\nuse h::i;";
    let paths: Vec<_> = paths(given).iter().map(|path| path.join("::")).collect();
    assert_eq!(paths, ["a::self", "a::b", "a::c::d", "a::c::e", "a::g"]);
    assert_eq!(self::paths("a::b(c)"), [["a", "b"]]);
}

#[test]
fn the_map_has_each_room_once() {
    let lib = include_str!("lib.rs");
    let declared = lib.lines().filter_map(|line| {
        let name = line
            .strip_prefix("pub mod ")
            .or(line.strip_prefix("pub(crate) mod "))?;
        name.strip_suffix(';').map(str::to_owned)
    });
    let mut rooms = map();
    rooms.sort();
    assert_eq!(rooms, declared.collect::<Vec<_>>());
}

#[test]
fn no_room_needs_one_below_it_in_the_map() {
    let rooms = map();
    let place = |module: &Module| rooms.iter().position(|room| *room == module[0]);
    let modules = modules();
    let mut wrong = BTreeSet::new();
    for (module, text) in &modules {
        for needed in needs(module, text, &modules) {
            if place(&needed) > place(module) {
                wrong.insert(format!("{} needs {}", module.join("::"), needed.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_files_of_a_room_need_each_other() {
    let modules = modules();
    let mut rooms: BTreeMap<Module, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (module, text) in &modules {
        for needed in needs(module, text, &modules) {
            let shared = module.iter().zip(&needed).take_while(|(a, b)| a == b);
            let shared = shared.count();
            // One of the two is the mod.rs of the other's room.
            if shared == 0 || shared == module.len() || shared == needed.len() {
                continue;
            }
            let room = rooms.entry(module[..shared].to_vec()).or_default();
            let file = room.entry(module[shared].clone()).or_default();
            file.insert(needed[shared].clone());
        }
    }
    for (room, files) in rooms {
        let room = room.join("::");
        let mut left = files.clone();
        // Takes away what needs nothing that is left, over and over: what stays needs itself.
        loop {
            let names: BTreeSet<_> = left.keys().cloned().collect();
            left.retain(|_, needs| needs.iter().any(|need| names.contains(need)));
            if left.len() == names.len() {
                break;
            }
        }
        // And what nothing of it needs is only behind a circle.
        loop {
            let needed: BTreeSet<_> = left.values().flatten().cloned().collect();
            let before = left.len();
            left.retain(|name, _| needed.contains(name));
            if left.len() == before {
                break;
            }
        }
        let circle: Vec<_> = left.keys().map(String::as_str).collect();
        assert!(
            circle.is_empty(),
            "{room}: {circle:?} need each other: {files:#?}"
        );
    }
}
