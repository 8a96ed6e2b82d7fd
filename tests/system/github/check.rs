// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Configurations of the supervisor that are refused: by `supervise --check`, and by `supervise` as it starts.

use std::fs;

use super::fake::{Fake, REPOSITORY};
use crate::support::command::run;
use crate::support::daemon::friend_outcome;

/// What is wrong with it, and what is said: line, problem, what is accepted. `TOKEN` stands for a token's file.
const BAD: [(&str, &str, &[&str]); 12] = [
    ("count = 2", "count = 0", &["line 8", "from 1 to 1000"]),
    (
        "http://127.0.0.1",
        "http://git.example",
        &["line 6", "http://git.example", "https://"],
    ),
    (
        "count = 2",
        "count = 2\napi-url = 'http://10.0.0.1/api/v3'",
        &["line 9", "http://10.0.0.1", "https://"],
    ),
    (
        "count = 2",
        "count = 2\ngroup = ''",
        &["line 9", "group", "name or a number"],
    ),
    ("count = 2", "colour = 2", &["line 8", "colour", "labels"]),
    ("count = 2", "", &["count", "scale-set"]),
    ("'host'", "'moon'", &["line 10", "moon", "slirp4netns"]),
    ("'{slot}'", "'{rev}'", &["line 14", "{rev}", "{slot}"]),
    ("'1G'", "'big'", &["cache", "big"]),
    ("'2h'", "'soon'", &["line 11", "soon", "30s"]),
    (
        "'TOKEN'",
        "'ghp_123'",
        &["line 7", "absolute path", "credential:NAME"],
    ),
    ("'TOKEN'", "'/nowhere/token'", &["/nowhere/token"]),
];

pub fn refused() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let token = fake.file("token");
    let good = format!(
        "reflink.dir = {:?}
[supervise]
control-socket = {:?}
[[supervise.pool]]
name = 'linux'
url = '{}/{REPOSITORY}'
token = 'TOKEN'
count = 2
labels = ['linux']
container = {{ image = 'i', network = 'host' }}
job-timeout = '2h'
[[supervise.pool.volume]]
name = 'cache'
options = {{ save = '{{slot}}', size = '1G' }}
target = '/cache'
",
        dir.path(),
        dir.path().join("control"),
        fake.url
    );
    let file = dir.path().join("config.toml");
    let said = |text: &str, arguments: &[&str]| {
        fs::write(&file, text.replace("TOKEN", token.to_str().unwrap())).unwrap();
        friend_outcome(&file, arguments)
    };
    let check = said(&good, &["supervise", "--check"]);
    assert_eq!(check.status, 0, "{check:?}");
    for (right, wrong, words) in BAD {
        let text = good.replacen(right, wrong, 1);
        assert_ne!(text, good, "{right}");
        let check = said(&text, &["supervise", "--check"]);
        let start = said(&text, &["supervise"]);
        for said in [check, start] {
            assert_eq!(said.status, 1, "{wrong}: {said:?}");
            for word in words {
                assert!(said.stderr.contains(word), "{wrong}: {word}: {said:?}");
            }
            if words[0].starts_with("line") {
                assert!(said.stderr.contains("config.toml"), "{said:?}");
            }
        }
    }
    run("chmod", ["0644".as_ref(), token.as_os_str()]);
    let open = said(&good, &["supervise", "--check"]);
    assert_eq!(open.status, 1, "{open:?}");
    assert!(open.stderr.contains("chmod 0600"), "{open:?}");
    // Nothing was begun, and nobody was asked.
    assert!(!dir.path().join("control").exists());
    assert!(fake.state().asked.is_empty());
}
