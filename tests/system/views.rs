// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What people and Prometheus are shown: `tree`, `stats`, metrics, the status page, `contrib/`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{self, Expr};
use serde_json::{Value, json};

use crate::docs::{block, type_in};
use crate::harness::{Test, Tier, test};
use crate::support::PROGRAM;
use crate::support::command::{Outcome, outcome_of, run, succeed};
use crate::support::daemon::{Daemon, Plugin, SOCKET};
use crate::support::site::{Kind, Site};
use crate::support::wait_until;

pub fn tests() -> Vec<Test> {
    let tests: [(&str, fn()); 6] = [
        ("tree_and_stats", tree_and_stats),
        ("on_a_terminal", on_a_terminal),
        ("watched", watched),
        ("metrics", metrics),
        ("in_a_browser", in_a_browser),
        ("contrib_asks_for_what_there_is", contrib),
    ];
    let tests = tests.into_iter();
    tests
        .map(|(name, body)| test(Tier::Reflink, format!("views::{name}"), body))
        .collect()
}

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

/// A daemon, and the loopback port that it shows its page on.
fn served(site: &Site) -> (Daemon, u16) {
    // Free now: of the range that the kernel gives out, and it takes another next.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    site.configure(&format!("status-address = \"127.0.0.1:{port}\"\n"));
    let daemon = site.serve();
    wait_until(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
    (daemon, port)
}

/// One use of a volume that is made for it: what it leaves says `text`. The name of the entry that it became.
fn job(plugin: &Plugin, options: &Value, text: &str) -> Option<String> {
    plugin.create("job", options);
    let at = plugin.mount("job", "test");
    fs::write(at.join("text"), text).unwrap();
    let lv = plugin.status("job")["lv"].clone();
    plugin.unmount("job", "test");
    let mut last = Value::Null;
    wait_until(|| {
        last = plugin.status("job")["last_lease"].clone();
        last["lv"] == lv
    });
    plugin.remove("job");
    last["published"].as_str().map(str::to_owned)
}

/// A request, as a client writes it; status, headers, body.
fn http(mut stream: impl Read + Write, request: &str) -> (u16, String, String) {
    stream
        .write_all(format!("{request}\r\nConnection: close\r\n\r\n").as_bytes())
        .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

/// What GET of a path on the plugin's socket answers.
pub fn get(path: &str) -> String {
    let stream = UnixStream::connect(SOCKET).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: plugin");
    let (status, _, body) = http(stream, &request);
    assert_eq!(status, 200, "{body}");
    body
}

/// What a supervisor reports.
fn report(plugin: &Plugin) {
    let slot = |slot: &str, state: &str, job: &str, last: Value| {
        json!({"slot": slot, "state": state, "runner": format!("{slot}-1"), "job": job, "age": 7,
               "hits": 0, "caches": 0, "last": last, "problem": (state == "no state").then_some("<b>no image</b>")})
    };
    let slots = [
        slot("linux-0", "busy", "octo/project <i>build</i>", Value::Null),
        slot("linux-1", "idle", "", json!("success")),
        slot("linux-2", "idle", "", json!("failure")),
        slot("linux-3", "no state", "", Value::Null),
    ];
    let jobs = json!({"success": 5, "failure": 1, "no verdict": 1});
    let pools = json!({"linux": {"assigned": 4, "running": 1, "idle": 2, "wanted": 3}});
    let waits = json!({"sum": 4000.5, "counts": [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]});
    let report =
        json!({"slots": slots, "jobs": jobs, "github_faults": 3, "pools": pools, "waits": waits});
    plugin.ok("Friend.Slots", &report);
}

fn tree_and_stats() {
    let site = Site::new(Kind::Reflink);
    let away = site.outcome(&["stats"]);
    assert!(
        away.status == 1 && away.stderr.contains("no daemon"),
        "{away:?}"
    );
    let daemon = site.serve();
    let plugin = daemon.plugin();
    let first = job(plugin, &json!({"save": "linux one"}), "1").unwrap();
    let second = job(
        plugin,
        &json!({"restore": "linux two; linux", "save": "linux two"}),
        "2",
    )
    .unwrap();
    let third = job(
        plugin,
        &json!({"restore": "linux two; linux", "save": "linux three"}),
        "3",
    )
    .unwrap();
    let fourth = job(
        plugin,
        &json!({"restore": "linux one", "save": "linux four"}),
        "4",
    )
    .unwrap();
    plugin.create("miss", &json!({"restore": "mac"}));
    plugin.mount("miss", "test");
    plugin.create("never", &json!({"restore": "mac", "on-miss": "fail"}));
    plugin.refused(
        "VolumeDriver.Mount",
        &json!({"Name": "never", "ID": "test"}),
    );

    let stats: Value = serde_json::from_str(&site.done(&["stats", "--json"])).unwrap();
    assert_eq!(stats["hits"], json!({"exact": 2, "fallback": 1, "miss": 1}));
    assert_eq!(
        stats["tags"]["two"],
        json!({"exact": 1, "fallback": 1, "miss": 0})
    );
    assert_eq!(
        stats["tags"]["mac"],
        json!({"exact": 0, "fallback": 0, "miss": 1})
    );
    assert_eq!(
        stats["mounts"],
        json!({"exact": 2, "fallback": 1, "base": 2})
    );
    assert_eq!(
        (&stats["published"], &stats["leases"]),
        (&json!(4), &json!(1))
    );
    assert_eq!(stats["refused"], json!({"no match": 1}));
    assert_eq!(stats["entries"], json!({&first: 2, &second: 1}));
    assert!(
        stats["restored_bytes"].as_u64().unwrap() > 1 << 20,
        "{stats}"
    );
    assert!(stats["mount_p99_ms"].as_f64() >= stats["mount_p50_ms"].as_f64());
    assert!(
        stats["failures"][0]["message"]
            .as_str()
            .unwrap()
            .contains("never")
    );
    assert_eq!(stats["pid"], daemon.pid());
    let text = site.done(&["stats"]);
    for words in ["exact 2 (50 %)", "published  4", "no match 1", "mac", "p99"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }

    let names = |tree: &[Value]| -> Vec<String> {
        let names = tree.iter().map(|node| node["name"].as_str().unwrap());
        names.map(str::to_owned).collect()
    };
    let tree: Vec<Value> = serde_json::from_str(&site.done(&["tree", "--json"])).unwrap();
    let base = tree[0]["name"].as_str().unwrap().to_owned();
    assert_eq!(
        names(&tree),
        [&base, &first, &second, &third, &fourth].map(String::clone)
    );
    let columns: Vec<_> = tree
        .iter()
        .map(|node| node["column"].as_u64().unwrap())
        .collect();
    assert_eq!(columns, [0, 0, 1, 1, 0]);
    let hits: Vec<_> = tree
        .iter()
        .map(|node| node["hits"].as_u64().unwrap())
        .collect();
    assert_eq!(hits, [0, 2, 1, 0, 0]);
    let text = site.done(&["tree"]);
    let drawn: Vec<_> = text
        .lines()
        .skip(1)
        .map(|line| &line[line.find(['●', '○', '│', '├']).unwrap()..])
        .collect();
    let want = [
        format!("● {base} base"),
        format!("● {first} linux one"),
        format!("├─● {second} linux two"),
        format!("│ ● {third} linux three"),
        format!("● {fourth} four linux"),
    ];
    assert_eq!(drawn, want);

    // No host is told of where there is one.
    for rows in [&tree, &site.list()] {
        assert!(rows.iter().all(|row| row.get("host").is_none()), "{rows:?}");
    }
    assert!(stats.get("host").is_none(), "{stats}");
    let ended = site.outcome(&["list", "--host", "x"]);
    assert!(
        ended.status == 2 && ended.stderr.contains("this host's alone"),
        "{ended:?}"
    );

    // What a branch hangs on is shown when it is gone, and nothing needs the daemon.
    site.done(&["remove", &first]);
    wait_until(|| !site.everything().contains(&first));
    daemon.stop();
    let text = site.done(&["tree"]);
    assert!(text.contains(&format!("○ {first} (gone)")), "{text}");
    assert!(text.contains(&format!("├─● {second}")), "{text}");
    let tree: Vec<Value> = serde_json::from_str(&site.done(&["tree", "--json"])).unwrap();
    assert!(tree.iter().all(|node| node["hits"].is_null()));
}

/// What a command writes to a terminal of 40 columns.
fn on_terminal(site: &Site, arguments: &str, environment: &[(&str, &str)]) -> String {
    let line = format!(
        "stty rows 24 cols 40; {PROGRAM} --config {} {arguments}",
        site.config.display()
    );
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    command.env_remove("NO_COLOR").env("TERM", "xterm");
    succeed(command.envs(environment.iter().copied()))
}

fn on_a_terminal() {
    let site = Site::new(Kind::Reflink);
    for command in ["list", "tree"] {
        let bold = on_terminal(&site, command, &[]);
        assert!(bold.contains("\u{1b}[1m"), "{bold:?}");
        let plain = on_terminal(&site, command, &[("NO_COLOR", "1")]);
        assert!(!plain.contains('\u{1b}'), "{plain:?}");
        let table = plain.lines().filter(|line| !line.contains('%'));
        for line in table {
            assert!(line.trim_end().chars().count() <= 40, "{line:?}");
        }
        assert!(plain.contains('…'), "{plain:?}");
        let piped = site.done(&[command]);
        assert!(
            !piped.contains('\u{1b}') && !piped.contains('…'),
            "{piped:?}"
        );
    }
}

fn watched() {
    let site = Site::new(Kind::Reflink);
    let mut child = site
        .command(&["list", "--json", "--watch=1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || {
        let mut text = String::new();
        for line in lines.by_ref() {
            let line = line.unwrap();
            text.push_str(&line);
            if line == "]" {
                break;
            }
        }
        serde_json::from_str::<Vec<Value>>(&text).unwrap()
    };
    assert_eq!(next().len(), 1);
    let dir = site.dir.path().join("content");
    fs::create_dir(&dir).unwrap();
    site.done(&["import", dir.to_str().unwrap(), "--tags", "linux"]);
    while next().len() != 2 {}
    // Nobody reads any more: it ends by itself, and well.
    drop(lines);
    assert!(child.wait().unwrap().success());
}

/// Prometheus' text: each sample's name with its labels, and the value.
fn samples(text: &str) -> Vec<(String, BTreeMap<String, String>, f64)> {
    let line = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let Ok(Expr::VectorSelector(selector)) = parser::parse(series) else {
            panic!("{series} names no series");
        };
        let labels = selector.matchers.matchers.into_iter();
        let labels = labels.map(|label| (label.name, label.value)).collect();
        (selector.name.unwrap(), labels, value.parse().unwrap())
    };
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(line).collect()
}

pub fn value(text: &str, series: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(series))?;
    line.trim().parse().ok()
}

fn metrics() {
    let site = Site::new(Kind::Reflink);
    let (daemon, port) = served(&site);
    let plugin = daemon.plugin();
    job(plugin, &json!({"save": "linux"}), "1").unwrap();
    job(plugin, &json!({"restore": "linux"}), "2");
    let text = get("/metrics");
    assert!(samples(&text).len() > 40, "{text}");
    for (series, want) in [
        ("lvm_cache_friend_store_up", 1.0),
        ("lvm_cache_friend_entries", 1.0),
        ("lvm_cache_friend_leases", 0.0),
        ("lvm_cache_friend_mounts_total{restored=\"exact\"}", 1.0),
        ("lvm_cache_friend_mounts_total{restored=\"scratch\"}", 0.0),
        ("lvm_cache_friend_lookups_total{result=\"exact\"}", 1.0),
        ("lvm_cache_friend_mount_seconds_count", 2.0),
        ("lvm_cache_friend_mount_seconds_bucket{le=\"+Inf\"}", 2.0),
        ("lvm_cache_friend_lease_seconds_count", 2.0),
        ("lvm_cache_friend_published_total", 1.0),
        (
            "lvm_cache_friend_unpublished_total{reason=\"no save tags\"}",
            1.0,
        ),
    ] {
        assert_eq!(value(&text, series), Some(want), "{series} in {text}");
    }
    let ratio = |what: &str| {
        let series = format!("lvm_cache_friend_pool_{what}_ratio{{part=\"data\"}}");
        value(&text, &series).unwrap()
    };
    let (used, evict, limit) = (ratio("used"), ratio("evict"), ratio("limit"));
    assert!((0.0..0.5).contains(&used), "{used}");
    assert!(used < evict && evict < limit && limit < 1.0);
    assert!(value(&text, "lvm_cache_friend_pool_size_bytes").unwrap() > 1e9);
    assert!(type_in(&block("metrics")).contains("lvm_cache_friend_store_up 1"));

    let tcp = |request: &str| http(TcpStream::connect(("127.0.0.1", port)).unwrap(), request);
    let (status, head, _) = tcp("GET /metrics HTTP/1.1\r\nHost: localhost");
    assert_eq!(status, 200);
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    let (status, head, page) = tcp(&format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}"));
    assert_eq!(status, 200);
    assert!(
        head.contains("content-security-policy: default-src 'none'"),
        "{head}"
    );
    assert!(page.contains("<html lang=\"en\">"), "{page}");
    // A page elsewhere, whose name leads here.
    assert_eq!(tcp("GET / HTTP/1.1\r\nHost: evil.example").0, 421);
    // Nothing else is to be had there, and no GET of the plugin's.
    let request = "POST /VolumeDriver.List HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0";
    assert_eq!(tcp(request).0, 404);
    for endpoint in ["", "metrics"] {
        let (status, answer) = plugin.call(endpoint, &json!({}));
        assert!(status == 405 && answer["Err"].is_string(), "{answer}");
    }

    // The supervisor's part, where there is one.
    let up = "lvm_cache_friend_supervisor_up";
    assert_eq!(value(&text, up), None, "{text}");
    assert!(page.contains("No supervisor is configured"), "{page}");
    plugin.refused("Friend.Slots", &json!({"slots": 1}));
    let long = json!({"slots": [], "jobs": {"x".repeat(1 << 20): 1}, "github_faults": 0});
    plugin.refused("Friend.Slots", &long);
    assert_eq!(tcp("POST /Friend.Slots HTTP/1.1\r\nHost: localhost").0, 404);
    assert_eq!(value(&get("/metrics"), up), None);
    report(plugin);
    let text = get("/metrics");
    for (series, want) in [
        ("supervisor_up", 1.0),
        ("slots{state=\"busy\"}", 1.0),
        ("slots{state=\"idle\"}", 2.0),
        ("slots{state=\"empty\"}", 0.0),
        ("runner_jobs_assigned{pool=\"linux\"}", 4.0),
        ("runner_jobs_running{pool=\"linux\"}", 1.0),
        ("runners_idle{pool=\"linux\"}", 2.0),
        ("runners_wanted{pool=\"linux\"}", 3.0),
        ("runner_job_wait_seconds_bucket{le=\"1\"}", 1.0),
        ("runner_job_wait_seconds_bucket{le=\"2\"}", 3.0),
        ("runner_job_wait_seconds_bucket{le=\"3600\"}", 3.0),
        ("runner_job_wait_seconds_bucket{le=\"+Inf\"}", 4.0),
        ("runner_job_wait_seconds_sum", 4000.5),
        ("runner_job_wait_seconds_count", 4.0),
        ("runner_jobs_total{verdict=\"success\"}", 5.0),
        ("runner_jobs_total{verdict=\"failure\"}", 1.0),
        ("runner_jobs_total{verdict=\"unknown\"}", 0.0),
        ("github_faults_total", 3.0),
    ] {
        let series = format!("lvm_cache_friend_{series}");
        assert_eq!(value(&text, &series), Some(want), "{series} in {text}");
    }
    assert!(
        !text.contains("no state") && !text.contains("no verdict"),
        "{text}"
    );
    let page = get("/");
    for words in [
        "4 slots",
        "linux-0-1",
        "&lt;i&gt;build",
        "&lt;b&gt;no image",
        "success 5",
    ] {
        assert!(page.contains(words), "{words:?} is not in {page}");
    }

    // Without the store it says so, and what it knows itself.
    let away = format!("{}-away", site.store());
    fs::rename(site.store(), &away).unwrap();
    let text = get("/metrics");
    assert_eq!(value(&text, "lvm_cache_friend_store_up"), Some(0.0));
    assert_eq!(value(&text, "lvm_cache_friend_published_total"), Some(1.0));
    assert_eq!(value(&text, "lvm_cache_friend_entries"), None, "{text}");
    assert!(get("/").contains("The store cannot be read"));
    fs::rename(&away, site.store()).unwrap();
    assert_eq!(
        value(&get("/metrics"), "lvm_cache_friend_store_up"),
        Some(1.0)
    );

    // A port that is taken is no reason not to serve caches; a supervisor that never came is away.
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap().port();
    daemon.stop();
    let text = fs::read_to_string(&site.config).unwrap();
    fs::write(
        &site.config,
        text.replace(&port.to_string(), &taken.to_string()) + "\n[supervise]\n",
    )
    .unwrap();
    let daemon = site.serve();
    job(daemon.plugin(), &json!({"restore": "linux"}), "3");
    assert!(daemon.log().contains("cannot listen on status-address"));
    let text = get("/metrics");
    assert_eq!(value(&text, up), Some(0.0), "{text}");
    assert!(!text.contains("lvm_cache_friend_slots"), "{text}");
    assert!(get("/").contains("The supervisor is down"));
}

/// Where screenshots are kept for whoever wants to look at them.
fn screenshots() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("screenshots");
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// Has Chromium look at the page.
#[track_caller]
fn look(port: u16, name: &str) {
    let check = Path::new(REPOSITORY).join("tests/browser/check.mjs");
    let mut command = Command::new("node");
    command
        .arg(check)
        .arg(format!("http://127.0.0.1:{port}/"))
        .arg(screenshots().join(name));
    let Outcome {
        status,
        stdout,
        stderr,
    } = outcome_of(&mut command);
    assert!(
        status == 0 && stdout.is_empty(),
        "{name} (`tests/vm/deps browser` installs what this needs):\n{stdout}{stderr}"
    );
}

fn in_a_browser() {
    let site = Site::new(Kind::Reflink);
    let (daemon, port) = served(&site);
    let plugin = daemon.plugin();
    look(port, "empty");

    real_data(plugin);
    report(plugin);
    plugin.create(
        "web",
        &json!({"restore": "linux main", "scope": "acme/web"}),
    );
    plugin.mount("web", "test");
    look(port, "data");
    let page = get("/");
    for words in ["acme/web", "&lt;b&gt;", "1 of", "Fallback hits", "no match"] {
        assert!(page.contains(words), "{words:?} is not in {page}");
    }
    assert!(!page.contains("<b>bold"), "what others write is text");

    let filler = Path::new(&site.store()).with_file_name("filler");
    let free = run("df", ["--output=avail,size", "-k", &site.store()]);
    let numbers: Vec<u64> = free
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    let length = format!("{}K", numbers[0] - numbers[1] / 20 + 1024);
    run("fallocate", ["--length", &length, filler.to_str().unwrap()]);
    look(port, "full");
    assert!(get("/").contains("Full:"));
}

/// Some days of a small team: three branches, a scope, a failure, a miss.
fn real_data(plugin: &Plugin) {
    let save = |restore: &str, save: &str| {
        job(plugin, &json!({"restore": restore, "save": save}), save).unwrap();
    };
    save("linux", "linux main a1");
    save("linux a1; linux main", "linux main a2");
    save("linux a2; linux main", "linux main a3");
    save("linux a1", "linux feature-x b1");
    save("linux b1", "linux feature-x b2");
    save("linux a2", "linux fix-y c1");
    save("linux a9; linux main", "linux main a4");
    let scoped = json!({"restore": "linux main", "save": "linux main d1", "scope": "acme/web"});
    job(plugin, &scoped, "scoped").unwrap();
    job(
        plugin,
        &json!({"restore": "linux main", "publish": "never", "save": "linux"}),
        "never",
    );
    plugin.create("strict", &json!({"restore": "mac", "on-miss": "fail"}));
    plugin.refused(
        "VolumeDriver.Mount",
        &json!({"Name": "strict", "ID": "test"}),
    );
    // What a stranger may have put into a name.
    plugin.refused(
        "VolumeDriver.Create",
        &json!({"Name": "x", "Opts": {"restore": "<b>bold</b>"}}),
    );
}

/// Each series that the queries in `contrib/` ask for is one that the daemon gives, with those labels.
fn contrib() {
    let site = Site::new(Kind::Reflink);
    let (daemon, _) = served(&site);
    real_data(daemon.plugin());
    report(daemon.plugin());
    let given = samples(&get("/metrics"));
    let dir = Path::new(REPOSITORY).join("contrib");

    let rules: Value =
        serde_saphyr::from_str(&fs::read_to_string(dir.join("alerts.yml")).unwrap()).unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap();
    let mut queries: Vec<String> = Vec::new();
    for rule in rules {
        assert!(
            rule["alert"].is_string() && rule["annotations"]["summary"].is_string(),
            "{rule}"
        );
        queries.push(rule["expr"].as_str().unwrap().to_owned());
    }
    let alerts = queries.len();
    let board: Value =
        serde_json::from_slice(&fs::read(dir.join("grafana-dashboard.json")).unwrap()).unwrap();
    for panel in board["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let query = target["expr"].as_str().unwrap();
            // Grafana's own words for lengths of time.
            queries.push(
                query
                    .replace("$__rate_interval", "1m")
                    .replace("$__range", "1h"),
            );
        }
    }
    assert!(alerts > 5 && queries.len() > alerts + 10);

    let mut asked = BTreeSet::new();
    for query in &queries {
        let parsed = parser::parse(query).unwrap_or_else(|error| panic!("{query}: {error}"));
        let mut selectors = Vec::new();
        selectors_in(&parsed, &mut selectors);
        assert!(!selectors.is_empty(), "{query}");
        for (name, matchers) in selectors {
            // Prometheus' own.
            if name == "up" {
                continue;
            }
            assert!(
                given
                    .iter()
                    .any(|(given, labels, _)| *given == name && matches(labels, &matchers)),
                "{query}: the daemon gives no {name} with {matchers:?}"
            );
            asked.insert(name);
        }
    }
    // And what is given is of use to somebody.
    for (name, _, _) in &given {
        let base = name.trim_end_matches("_count").trim_end_matches("_sum");
        let known = asked.iter().any(|asked| asked.starts_with(base));
        let alone = [
            "build_info",
            "start_time_seconds",
            "pool_size_bytes",
            "unclear_volumes",
        ];
        assert!(
            known || alone.iter().any(|end| name.ends_with(end)),
            "nobody asks for {name}"
        );
    }
}

/// Whether a series with these labels, and those that Prometheus adds, is matched.
fn matches(labels: &BTreeMap<String, String>, matchers: &[Matcher]) -> bool {
    matchers.iter().all(|matcher| {
        if matcher.name == "instance" {
            return true;
        }
        let value = labels.get(&matcher.name).map_or("", String::as_str);
        // Of what is chosen by a pattern, one is enough.
        match &matcher.op {
            MatchOp::Equal => value == matcher.value,
            MatchOp::Re(pattern) => pattern.is_match(value),
            other => panic!("{other:?}"),
        }
    })
}

fn selectors_in(expr: &Expr, found: &mut Vec<(String, Vec<Matcher>)>) {
    let selector = |selector: &parser::VectorSelector| {
        (
            selector.name.clone().expect("by name"),
            selector.matchers.matchers.clone(),
        )
    };
    match expr {
        Expr::VectorSelector(one) => found.push(selector(one)),
        Expr::MatrixSelector(one) => found.push(selector(&one.vs)),
        Expr::Aggregate(one) => selectors_in(&one.expr, found),
        Expr::Unary(one) => selectors_in(&one.expr, found),
        Expr::Binary(one) => {
            selectors_in(&one.lhs, found);
            selectors_in(&one.rhs, found);
        }
        Expr::Paren(one) => selectors_in(&one.expr, found),
        Expr::Subquery(one) => selectors_in(&one.expr, found),
        Expr::Call(call) => call
            .args
            .args
            .iter()
            .for_each(|arg| selectors_in(arg, found)),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => {}
    }
}
