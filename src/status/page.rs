// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The page for people: plain HTML, made here, that needs no script.

use std::collections::BTreeMap;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::picture::{Label, picture};
use super::{Contents, Supervisor};
use crate::api::runners::Row as Slot;
use crate::cache::evict::Policy;
use crate::cache::lineage::{What, draw};
use crate::cache::record::Role;
use crate::cache::units::Bytes;
use crate::engine::{Engine, Hits, Stats, VolumeView};
use crate::mount;
use crate::storage::Capacity;
use crate::storage::hosts::Fleet;
use crate::text::{age, printable, rfc3339, unix_now};
use crate::views::rows::{Kind, Row, Rows};

/// How many entries are shown, the newest: what somebody looks through, and a page of some 100 KB.
const ENTRIES: usize = 200;

/// How many tags are, those that were asked for most.
const TAGS: usize = 30;

/// How many slots are.
const SLOTS: usize = 200;

/// How many hosts are.
const HOSTS: usize = 200;

/// Longest label in the picture, in characters.
const LABEL: usize = 100;

const STYLE: &str = include_str!("style.css");

/// The page. Without a listing it says why there is none, and shows the rest.
pub(super) fn page(
    engine: &Engine,
    contents: Result<Contents, String>,
    supervisor: &Supervisor,
) -> String {
    let now = unix_now();
    let stats = engine.stats();
    let mut volumes = engine.list();
    volumes.retain(|volume| volume.mountpoint.is_some());
    volumes.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
    let mut fleet = None;
    let listing = contents.map(|contents| {
        let mounts = mount::table().unwrap_or_default();
        fleet = contents.fleet;
        let listing = contents.listing;
        (listing.capacity, Rows::new(&listing, None, &mounts))
    });
    let sections = [
        ("pool", "Pool"),
        ("leases", "In use"),
        ("hosts", "Hosts"),
        ("runners", "Runners"),
        ("counts", "Since the start"),
        ("lineage", "Lineage"),
        ("failures", "Failures"),
    ];
    let body = html! {
        header {
            h1 { "lvm-cache-friend" }
            p { "Store " b { (engine.store_name()) } ", version " (env!("CARGO_PKG_VERSION")) ", up since " (time(stats.since)) " (" (age(now, stats.since)) ")" }
            nav aria-label="Sections" {
                @for (id, name) in sections.iter().filter(|(id, _)| *id != "hosts" || fleet.is_some()) {
                    a href={"#" (id)} { (name) } " "
                }
            }
        }
        main {
            (section("pool", "Pool", &match &listing {
                Ok((full, rows)) => pool(*full, engine.policy(), rows),
                Err(why) => html! { p.alert { strong { "The store cannot be read: " } (printable(why)) } },
            }))
            (section("leases", "In use", &leases(&volumes, stats.volumes)))
            @if let Some(fleet) = &fleet {
                (section("hosts", "Hosts", &hosts(fleet)))
            }
            (section("runners", "Runners", &runners(supervisor, now)))
            (section("counts", "Since the start", &counts(&stats)))
            @if let Ok((_, rows)) = &listing {
                (section("lineage", "Lineage", &lineage(rows, &stats, now)))
            }
            (section("failures", "Last failures", &failures(&stats)))
        }
    };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "lvm-cache-friend: " (engine.store_name()) }
                style { (PreEscaped(STYLE)) }
            }
            body { (body) }
        }
    };
    page.into_string()
}

fn section(id: &str, name: &str, content: &Markup) -> Markup {
    html! {
        section id=(id) aria-labelledby={(id) "-head"} {
            h2 id={(id) "-head"} { (name) }
            (content)
        }
    }
}

/// What may be wider than the screen: reached, and moved, by keyboard too.
fn scrolled(name: &str, content: &Markup) -> Markup {
    html! {
        div.scroll role="region" aria-label=(name) tabindex="0" { (content) }
    }
}

fn time(at: u64) -> Markup {
    let text = rfc3339(at).unwrap_or_default();
    html! { time datetime=(text) { (text) } }
}

fn pool(full: Capacity, policy: &Policy, rows: &Rows) -> Markup {
    let bounds = full.fill().bounds(policy);
    let is_full = bounds.iter().any(|(_, space, _)| space.is_full());
    let is_short = bounds.iter().any(|(_, space, f)| space.missing(*f) > 0);
    html! {
        @if is_full {
            p.alert { strong { "Full: " } "no more volumes are made, and jobs may soon get write errors. Remove entries, or extend the pool." }
        } @else if is_short {
            p.alert { strong { "Nearly full: " } "entries are being evicted where allowed. If this persists, remove entries, or extend the pool." }
        }
        dl.meters {
            @for (bound, space, floor) in bounds {
                div {
                    dt id={"meter-" (bound.word())} { (bound.word()) }
                    dd {
                        meter aria-labelledby={"meter-" (bound.word())} min="0" max="100" optimum="0"
                            low=(space.mark(floor)) high=(space.limit) value=(space.percent) {}
                        " " (format!("{:.1}", space.percent)) " % of " (space.size)
                    }
                }
            }
        }
        p { (rows.rows.iter().filter(|row| row.kind == Kind::Entry).count()) " entries." }
        @let remarks = rows.remarks();
        @if !remarks.is_empty() {
            ul { @for remark in remarks { li { (remark) } } }
        }
    }
}

fn leases(volumes: &[VolumeView], all: usize) -> Markup {
    let said = |volume: &VolumeView, name: &str| match volume.status.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(list)) => list.len().to_string(),
        Some(value) => value.to_string(),
        None => String::new(),
    };
    let written = |volume: &VolumeView| {
        let bytes = volume.status.get("bytes_written").and_then(Value::as_u64);
        bytes.map_or_else(String::new, |bytes| Bytes(bytes).to_string())
    };
    html! {
        p { (volumes.len()) " of " (all) " volumes." }
        @if !volumes.is_empty() {
            (scrolled("Volumes in use", &html! {
                table {
                    thead { tr {
                        @for head in ["Volume", "Restored", "By", "From", "Written", "Containers"] {
                            th scope="col" { (head) }
                        }
                    } }
                    tbody { @for volume in volumes { tr {
                        th scope="row" { (volume.name) }
                        td { (said(volume, "restored")) }
                        td { (said(volume, "criterion")) }
                        td { code { (said(volume, "from")) } }
                        td { (written(volume)) }
                        td { (said(volume, "containers")) }
                    } } }
                }
            }))
        }
    }
}

fn hosts(fleet: &Fleet) -> Markup {
    let lines = fleet.hosts.iter().take(HOSTS).map(|host| {
        let of = |kind: fn(&Role) -> bool| {
            let here = fleet
                .lvs
                .iter()
                .filter(|of| of.host.as_ref() == Some(&host.id));
            here.filter(|of| kind(&Role::from_tags(&of.lv.tags)))
                .count()
        };
        let leased = of(|role| matches!(role, Role::Volume { lease: Some(_), .. }));
        let volumes = of(|role| matches!(role, Role::Volume { .. }));
        let entries = of(|role| matches!(role, Role::Entry { .. }));
        let state = match (host.lost, host.id == fleet.me) {
            (true, _) => "lost",
            (false, true) => "this host",
            (false, false) => "joined",
        };
        (printable(&host.id), state, [volumes, leased, entries])
    });
    html! {
        p {
            (fleet.hosts.len()) " hosts share the store"
            @if fleet.hosts.len() > HOSTS { ", of which " (HOSTS) " are shown" }
            "."
        }
        (scrolled("Hosts that share the store", &html! {
            table {
                thead { tr {
                    @for head in ["Host", "State", "Volumes", "Leases to publish", "Entries published"] {
                        th scope="col" { (head) }
                    }
                } }
                tbody { @for (id, state, counts) in lines { tr {
                    th scope="row" { code { (id) } }
                    td { (state) }
                    @for n in counts { td.number { (n) } }
                } } }
            }
        }))
    }
}

fn runners(supervisor: &Supervisor, now: u64) -> Markup {
    let report = match supervisor {
        Supervisor::None => return html! { p { "No supervisor is configured." } },
        Supervisor::Away => {
            return html! {
                p.alert { strong { "The supervisor is down: " } "no job gets a runner. " code { "lvm-cache-friend doctor" } " has the reason." }
            };
        }
        Supervisor::Says(report) => report,
    };
    let cells = |slot: &Slot| {
        let age = age(now, now.saturating_sub(slot.age));
        let last = slot.last.clone().unwrap_or_default();
        let problem = slot.problem.clone().unwrap_or_default();
        [&slot.state, &age, &slot.runner, &slot.job, &last, &problem].map(|text| printable(text))
    };
    html! {
        p {
            (report.slots.len()) " slots"
            @if report.slots.len() > SLOTS { ", of which " (SLOTS) " are shown" }
            ". Jobs that ended: " (printable(&listed(&report.jobs))) ". Requests that GitHub did not answer, or refused: " (report.github_faults) "."
        }
        @if !report.slots.is_empty() {
            (scrolled("Slots of runners", &html! {
                table {
                    thead { tr {
                        @for head in ["Slot", "State", "For", "Runner", "Job", "Last job", "Problem"] {
                            th scope="col" { (head) }
                        }
                    } }
                    tbody { @for slot in report.slots.iter().take(SLOTS) { tr {
                        th scope="row" { (printable(&slot.slot)) }
                        @for cell in cells(slot) { td { (cell) } }
                    } } }
                }
            }))
        }
    }
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    let words = counts.iter().map(|(what, n)| format!("{what} {n}"));
    let words: Vec<_> = words.collect();
    if words.is_empty() {
        "none".to_owned()
    } else {
        words.join(", ")
    }
}

fn counts(stats: &Stats) -> Markup {
    let hits = stats.hits;
    let share = |n: u64, of: u64| match of {
        0 => n.to_string(),
        of => format!("{n} ({} %)", (n * 100 + of / 2) / of),
    };
    let ms = |ms: Option<f64>| ms.map_or_else(|| "–".to_owned(), |ms| format!("{ms} ms"));
    let facts = [
        ("Exact hits", share(hits.exact, hits.total())),
        ("Fallback hits", share(hits.fallback, hits.total())),
        ("Misses", share(hits.miss, hits.total())),
        ("Mount, median", ms(stats.mount_p50_ms)),
        ("Mount, 99 of 100", ms(stats.mount_p99_ms)),
        ("Restored", Bytes(stats.restored_bytes).to_string()),
        ("Written", Bytes(stats.written_bytes).to_string()),
        ("Published", stats.published.to_string()),
        ("Not published", listed(&stats.unpublished)),
        ("Refused", listed(&stats.refused)),
        ("Evicted", stats.evicted.to_string()),
    ];
    let mut tags: Vec<(&String, &Hits)> = stats.tags.iter().collect();
    tags.sort_by_key(|(tag, hits)| (std::cmp::Reverse(hits.total()), *tag));
    html! {
        dl.facts { @for (name, value) in facts { div { dt { (name) } dd { (value) } } } }
        @if !tags.is_empty() {
            (scrolled("Hits by tag", &html! {
                table {
                    caption { "Requested tags" @if tags.len() > TAGS { ": " (TAGS) " of " (tags.len()) " tags" } }
                    thead { tr {
                        @for head in ["Tag", "Mounts", "Exact", "Fallback", "Miss"] { th scope="col" { (head) } }
                    } }
                    tbody { @for (tag, hits) in tags.iter().take(TAGS) { tr {
                        th scope="row" { (tag) }
                        @for n in [hits.total(), hits.exact, hits.fallback, hits.miss] { td.number { (n) } }
                    } } }
                }
            }))
        }
    }
}

fn lineage(rows: &Rows, stats: &Stats, now: u64) -> Markup {
    let mut shown: Vec<&Row> = rows
        .rows
        .iter()
        .filter(|row| row.kind != Kind::Volume)
        .collect();
    let entries = shown.iter().filter(|row| row.kind == Kind::Entry).count();
    shown.sort_by_key(|row| (row.kind != Kind::Base, std::cmp::Reverse(row.seq)));
    let bases = shown.len() - entries;
    shown.truncate(bases + ENTRIES);
    shown.sort_by_key(|row| row.seq);
    let pairs: Vec<_> = shown
        .iter()
        .map(|row| (row.name.as_str(), row.from.as_deref()))
        .collect();
    let lines = draw(&pairs);
    let hits = |row: &Row| stats.entries.get(&row.name).copied().unwrap_or(0);
    let labels: Vec<_> = lines
        .iter()
        .map(|line| match line.what {
            What::Gone(name) => {
                let there = rows.rows.iter().any(|row| row.name == name);
                Label {
                    text: format!("{name} ({})", if there { "older" } else { "gone" }),
                    class: "gone",
                }
            }
            What::One(at) => {
                let row = shown[at];
                let mut text = what(row);
                text.push_str(&format!(" · {}", age(now, row.created_seconds)));
                match hits(row) {
                    0 => {}
                    1 => text.push_str(" · 1 hit"),
                    n => text.push_str(&format!(" · {n} hits")),
                }
                if text.chars().count() > LABEL {
                    text = text.chars().take(LABEL - 1).chain(['…']).collect();
                }
                Label {
                    text,
                    class: row.kind.as_str(),
                }
            }
        })
        .collect();
    html! {
        @if entries == 0 {
            p { "No entry yet: the first is published when a job with save tags has ended without a failure." }
        } @else {
            p {
                "What each entry was copied from, oldest first."
                @if entries > ENTRIES {
                    " The newest " (ENTRIES) " of " (entries) " entries: " code { "lvm-cache-friend tree" } " shows all."
                }
            }
            (scrolled("Picture of the lineage", &picture(&lines, &labels, &format!("{} entries and what each was copied from; the table below has the same", shown.len() - bases))))
            details {
                summary { "The same as a table" }
                (scrolled("Entries", &html! {
                    table {
                        thead { tr {
                            @for head in ["Entry", "Tags", "Made from", "Age", "Hits"] { th scope="col" { (head) } }
                        } }
                        tbody { @for row in shown.iter().rev() { tr {
                            th scope="row" { code { (row.name) } }
                            td { (what(row)) }
                            td { @if let Some(from) = &row.from { code { (from) } } }
                            td { (age(now, row.created_seconds)) }
                            td.number { (hits(row)) }
                        } } }
                    }
                }))
            }
        }
    }
}

fn what(row: &Row) -> String {
    if row.kind == Kind::Base {
        return "base".into();
    }
    let mut words: Vec<_> = row.cache_tags.iter().map(ToString::to_string).collect();
    words.extend(row.scope.as_ref().map(|scope| format!("({scope})")));
    words.extend(row.pinned.then(|| "· pinned".to_owned()));
    words.join(" ")
}

fn failures(stats: &Stats) -> Markup {
    html! {
        @if stats.failures.is_empty() {
            p { "None since the start." }
        } @else {
            ol.failures { @for failed in &stats.failures {
                li { (time(failed.at)) " " b { (failed.reason) } " " (printable(&failed.message)) }
            } }
        }
    }
}
