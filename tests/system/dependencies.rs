// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the program is built from: under which licences, and from where.
//!
//! Known vulnerabilities are not looked for here, since the database of advisories is on the network: `make advisories` does.

use std::process::Command;

use serde_json::Value;

use crate::docs::REPOSITORY;
use crate::harness::{Test, Tier, test};
use crate::support::command::succeed;

pub fn tests() -> Vec<Test> {
    let tests: [(&str, fn()); 2] = [
        ("dependencies::licences_and_sources", packages),
        ("dependencies::licences_in_words", expressions),
    ];
    tests
        .map(|(name, body)| test(Tier::Host, name, body))
        .into()
}

/// Licences that ask for no more than their text and notices, each of which the packages may have under "Apache-2.0 OR MIT".
const ACCEPTED: [&str; 8] = [
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// Where each dependency is from. `Cargo.lock` has the checksum of each.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// A second TLS library would have to be watched beside rustls with ring.
const BANNED: [&str; 3] = ["openssl-sys", "native-tls", "aws-lc-sys"];

fn packages() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut metadata = Command::new(cargo);
    metadata.current_dir(REPOSITORY).args([
        "metadata",
        "--locked",
        "--offline",
        "--format-version=1",
        // Others' need not have been downloaded.
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]);
    let metadata: Value = serde_json::from_str(&succeed(&mut metadata)).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{}", packages.len());
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str();
        assert!(licence.is_some_and(is_accepted), "{name}: {licence:?}");
        let own = name == env!("CARGO_PKG_NAME");
        let source = package["source"].as_str();
        assert_eq!(source, (!own).then_some(REGISTRY), "{name}");
        assert!(!BANNED.contains(&name), "{name}");
    }
}

/// Whether one may have something under accepted licences alone, by an expression of SPDX's, or an old one with slashes.
fn is_accepted(expression: &str) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    any_of(&mut words) && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>) -> bool {
    let mut accepted = all_of(words);
    while words.next_if_eq(&"OR").is_some() {
        accepted |= all_of(words);
    }
    accepted
}

fn all_of(words: &mut Words<'_>) -> bool {
    let mut accepted = one(words);
    while words.next_if_eq(&"AND").is_some() {
        accepted &= one(words);
    }
    accepted
}

fn one(words: &mut Words<'_>) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let accepted = any_of(words);
        return words.next() == Some(")") && accepted;
    }
    let accepted = words.next().is_some_and(|word| ACCEPTED.contains(&word));
    // An exception allows more than the licence does.
    if words.next_if_eq(&"WITH").is_some() {
        words.next();
    }
    accepted
}

fn expressions() {
    for (expression, accepted) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("MIT OR GPL-3.0-only", true),
        ("GPL-3.0-only/MIT", true),
        ("MIT AND GPL-3.0-only", false),
        ("(MIT OR GPL-3.0-only) AND Unicode-3.0", true),
        ("(MIT OR Apache-2.0) AND GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT AND ISC", true),
        ("Apache-2.0 WITH LLVM-exception OR GPL-3.0-only", true),
        ("GPL-3.0-only WITH Classpath-exception-2.0", false),
        ("(MIT", false),
        ("MIT ISC", false),
        ("", false),
    ] {
        assert_eq!(is_accepted(expression), accepted, "{expression:?}");
    }
}
