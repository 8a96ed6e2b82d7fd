// SPDX-License-Identifier: Apache-2.0 OR MIT
//! README and docs/ against the code: what is generated from it, which links lead where, and how a
//! page looks.
//!
//! Between `<!-- generated: NAME -->` and `<!-- end of NAME -->` stands what the code gives.
//! `UPDATE_DOCS=1 cargo test --lib documents` writes it there.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _};

use crate::cache::criteria::{MAX_CRITERIA, MAX_TERM, MAX_TERMS};
use crate::cache::spec::options::OPTIONS;
use crate::cache::spec::{FsType, MAX_READ_SCOPES, MAX_SAVE, MIN_SIZE};
use crate::cache::tags;
use crate::cli::Cli;
use crate::{config, supervisor};

/// The most characters of a line that is wrapped by hand.
const WIDTH: usize = 100;

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

fn path(page: &str) -> PathBuf {
    Path::new(REPOSITORY).join(page)
}

fn read(page: &str) -> String {
    let path = path(page);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// README and all pages of docs/, as paths in the repository.
fn pages() -> Vec<String> {
    let files = fs::read_dir(path("docs")).expect("docs/");
    let names = files.map(|file| {
        file.expect("a file")
            .file_name()
            .into_string()
            .expect("UTF-8")
    });
    let mut pages: Vec<_> = names
        .filter(|name| name.ends_with(".md"))
        .map(|name| format!("docs/{name}"))
        .collect();
    pages.sort();
    pages.insert(0, "README.md".into());
    pages
}

/// Fails where a page's part of this name is not what the code gives; with `UPDATE_DOCS` set, writes it.
#[track_caller]
fn assert_generated(page: &str, name: &str, generated: &str) {
    let text = read(page);
    let (begin, end) = (
        format!("<!-- generated: {name} -->\n"),
        format!("<!-- end of {name} -->"),
    );
    let (before, rest) = text
        .split_once(&begin)
        .unwrap_or_else(|| panic!("{page} lacks {begin}"));
    let (current, after) = rest
        .split_once(&end)
        .unwrap_or_else(|| panic!("{page} lacks {end}"));
    let generated = format!("\n{}\n\n", generated.trim());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let updated = format!("{before}{begin}{generated}{end}{after}");
        fs::write(path(page), updated).expect("written");
    } else {
        assert_eq!(
            current, generated,
            "{page} has another {name}: UPDATE_DOCS=1 cargo test --lib documents"
        );
    }
}

#[test]
fn options() {
    let mut table = "| option | meaning | default |\n|---|---|---|\n".to_owned();
    for option in OPTIONS {
        let (name, meaning, default) = (option.name, option.meaning, option.default);
        let _ = writeln!(table, "| `{name}` | {meaning} | {default} |");
    }
    assert_generated("docs/volume-options.md", "options", &table);
}

/// The limits that the page names are those of the parser.
#[test]
fn limits_of_options() {
    let page = read("docs/volume-options.md");
    let text = page.split_whitespace().collect::<Vec<_>>().join(" ");
    for limit in [
        format!("at most {MAX_TERM} bytes each"),
        format!("at most {MAX_CRITERIA} restore keys with {MAX_TERMS} tags in all"),
        format!("{MAX_SAVE} tags in `save`, and {MAX_READ_SCOPES} `read-scopes`"),
        format!(
            "The smallest size is {MIN_SIZE}, or {} for an XFS",
            FsType::Xfs.min_size()
        ),
    ] {
        assert!(
            text.contains(&limit),
            "docs/volume-options.md lacks: {limit}"
        );
    }
}

#[test]
fn settings() {
    let text = format!("```toml\n{}```", config::example());
    assert_generated("docs/configuration.md", "settings", &text);
}

#[test]
fn commands() {
    let mut cli = Cli::command()
        .term_width(WIDTH)
        .disable_help_subcommand(true);
    cli.build();
    let mut list = "| command | |\n|---|---|\n".to_owned();
    let mut help = String::new();
    for command in cli.get_subcommands_mut() {
        let name = command.get_name().to_owned();
        let about = command.get_about().expect("a doc comment").to_string();
        let _ = writeln!(list, "| [`{name}`](#{name}) | {about} |");
        let _ = write!(help, "### {name}\n\n");
        describe(command, &mut help);
    }
    assert_generated("docs/commands.md", "commands", &list);
    assert_generated("docs/commands.md", "help", &help);
}

/// What `-h` prints of a command and of those below it.
fn describe(command: &mut Command, into: &mut String) {
    let help = command.render_help().to_string();
    // Said once, above them all.
    let text = match help.find("\nExit codes:\n  0  done\n  1  failed;") {
        Some(at) => &help[..at],
        None => &help,
    };
    let _ = write!(into, "```text\n{}\n```\n\n", text.trim_end());
    for below in command.get_subcommands_mut() {
        describe(below, into);
    }
}

#[test]
fn phases() {
    assert_generated("docs/architecture.md", "phases", &crate::engine::phases());
}

/// Each setting of the supervisor is in the tables of docs/supervisor.md, as far as its types tell.
#[test]
fn settings_of_the_supervisor() {
    let page = read("docs/supervisor.md");
    let rows: String = page.lines().filter(|line| line.starts_with('|')).collect();
    let settings = supervisor::config::names();
    assert!(settings.len() > 30, "{settings:?}");
    for setting in settings {
        assert!(
            rows.contains(&format!("`{setting}`")),
            "docs/supervisor.md has no row with `{setting}`"
        );
    }
}

/// Each tag that means something is in docs/lvm-tags.md, and no other.
#[test]
fn tags() {
    let known: BTreeSet<&str> = tags::TAGS.into();
    let page = read("docs/lvm-tags.md");
    let described: BTreeSet<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `friend:"))
        .filter_map(|line| line.split('|').nth(1))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(|tag| {
            let end = tag.find(|c: char| c.is_ascii_uppercase());
            &tag[..end.unwrap_or(tag.len())]
        })
        .collect();
    assert_eq!(described, known);
}

/// The name that a heading has in a link, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    let mut code = false;
    let mut prose = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        } else if !code {
            prose += line;
            prose.push('\n');
        }
    }
    prose
}

/// Documents that are elsewhere.
const BESIDE: [&str; 3] = ["action/README.md", "CONTRIBUTING.md", "CHANGELOG.md"];

#[test]
fn links() {
    let mut sources = pages();
    sources.extend(BESIDE.map(str::to_owned));
    let mut wrong = Vec::new();
    for page in &sources {
        let text = prose(&read(page));
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            if target.contains("://") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let at = if file.is_empty() {
                path(page)
            } else {
                path(page).with_file_name(file)
            };
            let leads = match (at.is_file(), heading) {
                (true, "") => true,
                (true, heading) => {
                    let text = prose(&fs::read_to_string(&at).expect("readable"));
                    let mut headings = text.lines().filter(|line| line.starts_with('#'));
                    headings.any(|line| anchor(line) == heading)
                }
                _ => at.is_dir(),
            };
            if !leads {
                wrong.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(wrong.is_empty(), "links that lead nowhere: {wrong:#?}");
}

/// Made by tests/tested.
const APART: &str = "docs/tested.md";

/// A page says first what it is for and last where to go next, in lines that fit a terminal.
#[test]
fn shape() {
    let mut wrong = Vec::new();
    for page in pages() {
        if page == APART {
            continue;
        }
        let text = read(&page);
        if page == "README.md" {
            let count = text.lines().count();
            if count > 150 {
                wrong.push(format!("{page}: {count} lines, of 150 at most"));
            }
        } else {
            let text = prose(&text);
            let last = text.lines().rfind(|line| line.starts_with("## "));
            if last != Some("## Where to go next") {
                wrong.push(format!("{page}: its last part is not \"Where to go next\""));
            }
            let second = text.lines().nth(2).unwrap_or_default();
            if !text.starts_with("# ") || !second.starts_with(|c: char| c.is_alphabetic()) {
                wrong.push(format!(
                    "{page}: it does not begin with a title and what it is for"
                ));
            }
        }
    }
    for page in pages().into_iter().chain(BESIDE.map(str::to_owned)) {
        if page == APART {
            continue;
        }
        let free = |line: &str| line.starts_with(['|', '<']) || line.contains("](");
        for line in prose(&read(&page)).lines() {
            if line.chars().count() > WIDTH && !free(line) {
                wrong.push(format!("{page}: more than {WIDTH} characters: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
