// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client program of job volumes, in containers of an image that has nothing but busybox.

use std::path::Path;

use serde_json::{Value, json};

use super::hooks::Hooks;
use super::{Body, Host};
use crate::support::census::mounts;
use crate::support::site::{Kind, MOUNT_DIR};
use crate::support::wait_until;

pub const BODIES: &[Body] = &[("job_client", job_client)];

const VOLUME: &str = "job:/run/lvm-cache-friend:rslave";

/// `c` shows how a command ends, for [`Said`] to read; `t` does so for the client.
const PRELUDE: &str = r#"
PATH=/bin:/run/lvm-cache-friend/bin; cd /root
c() { "$@" >/tmp/out 2>/tmp/err; printf '%s\037%s\037%s\036' $? "$(cat /tmp/err)" "$(cat /tmp/out)"; }
t() { c lvm-cache-friend "$@"; }
"#;

/// How a command ended, and what it wrote.
#[derive(Debug)]
struct Said {
    code: i32,
    err: String,
    out: String,
}

impl Said {
    fn of(record: &str) -> Self {
        let [code, err, out] = record.split('\u{1f}').collect::<Vec<_>>()[..] else {
            panic!("{record:?}");
        };
        Self {
            code: code.parse().unwrap(),
            err: err.to_owned(),
            out: out.to_owned(),
        }
    }
}

/// What is wanted of a command: its exit code, what it says on standard error, and on standard output: all members of an
/// object, or a text's beginning.
type Case<'a> = (&'a str, i32, &'a str, Value);

/// Runs the commands of `cases` in one container, which has `options` and ends with `end`.
fn run(host: &Host, options: &[&str], cases: &[Case<'_>], end: &str) {
    let commands: Vec<_> = cases.iter().map(|case| case.0).collect();
    let script = format!("{PRELUDE}{}\n{end}", commands.join("\n"));
    let image = &host.podman.image;
    let head = ["run", "--rm", "-v", VOLUME];
    let tail = [image.as_str(), "sh", "-uc", &script];
    let done = host.podman.outcome(&[&head[..], options, &tail].concat());
    let records = done.stdout.split_terminator('\u{1e}');
    let said: Vec<_> = records.map(Said::of).collect();
    assert_eq!(said.len(), cases.len(), "{done:?}");
    for ((command, code, err, out), said) in cases.iter().zip(said) {
        assert_eq!(said.code, *code, "{command}: {said:?}");
        assert!(said.err.contains(err), "{command}: {said:?}");
        assert_eq!(said.err.is_empty(), err.is_empty(), "{command}: {said:?}");
        match out {
            Value::Object(members) => {
                assert!(!said.out.contains('\n'), "{command}: {said:?}");
                let got: Value = serde_json::from_str(&said.out)
                    .unwrap_or_else(|error| panic!("{command}: {error}: {said:?}"));
                for (key, value) in members {
                    assert_eq!(got[key], *value, "{command}: {key} in {said:?}");
                }
            }
            Value::String(text) => assert!(said.out.starts_with(text), "{command}: {said:?}"),
            _ => assert_eq!(said.out, "", "{command}: {said:?}"),
        }
    }
}

fn job_client(kind: Kind) {
    let mut host = Host::new(kind);
    let hooks = Hooks::new(&host);
    host.podman.create("job", &["type=job"]);
    run(
        &host,
        &[],
        &[
            // Nothing matches.
            (
                "t restore cargo --key 'linux one' --fail-on-miss --json",
                4,
                "nothing matches",
                json!({"ok": true, "restored": "base", "criterion": null, "tags": [], "path": null}),
            ),
            (
                "t status --json",
                0,
                "",
                json!({"ok": true, "mounts": [], "verdict": "unknown"}),
            ),
            (
                "t restore cargo --key 'linux one' --restore-keys 'linux; mac-*' --path .cargo/registry --json",
                0,
                "",
                json!({"ok": true, "restored": "base", "path": "/run/lvm-cache-friend/cargo"}),
            ),
            (
                "echo one > .cargo/registry/x; c cat /run/lvm-cache-friend/cargo/x",
                0,
                "",
                json!("one"),
            ),
            (
                "t restore cargo --json",
                1,
                "mounted already",
                json!({"ok": false}),
            ),
            (
                "t save cargo 'more tags' yet --json",
                0,
                "",
                json!({"ok": true, "tags": ["more", "tags", "yet"]}),
            ),
            ("t save nothing", 1, "nothing is mounted", json!(null)),
            // Several links; what is in the way is moved in.
            (
                "mkdir two; echo mine > two/mine; t restore both --key both --path one/deep --path two",
                0,
                "",
                json!(""),
            ),
            (
                "c sh -c 'readlink one/deep; readlink two'",
                0,
                "",
                json!("/run/lvm-cache-friend/both/0-deep\n/run/lvm-cache-friend/both/1-two"),
            ),
            (
                "c cat /run/lvm-cache-friend/both/1-two/mine",
                0,
                "",
                json!("mine"),
            ),
            (
                "t discard both --json",
                0,
                "",
                json!({"ok": true, "discarded": "/run/lvm-cache-friend/both"}),
            ),
            // Places that stay as they are.
            (
                "echo file > file; t restore no --path file --json",
                1,
                "/root/file is not a directory",
                json!({"ok": false, "error": "/root/file is not a directory: it stays as it is"}),
            ),
            ("t restore no --path /dev/shm", 1, "is a mount", json!(null)),
            ("t restore no --path /dev", 1, "is a mount", json!(null)),
            ("t restore no --path two", 1, "is a link to", json!(null)),
            (
                "t restore no --path /run",
                1,
                "the job volume is at /run/lvm-cache-friend",
                json!(null),
            ),
            (
                "t restore no --path /bin/../run/lvm-cache-friend/x",
                1,
                "the job volume is at",
                json!(null),
            ),
            (
                "t restore bin --json",
                1,
                "job volume's own",
                json!({"ok": false}),
            ),
            ("t restore ../x", 1, "leads out", json!(null)),
            // Wrong usage.
            ("t", 2, "no such command", json!(null)),
            ("t list", 2, "no such command", json!(null)),
            ("t restore 'a b'", 2, "no white space", json!(null)),
            ("t restore a --keys b", 2, "no option --keys", json!(null)),
            ("t --help", 0, "", json!("Asks lvm-cache-friend")),
            // No job volume.
            (
                "t status --json --socket /nowhere",
                3,
                "no job volume here: /nowhere",
                json!({"ok": false}),
            ),
            (
                "LVM_CACHE_FRIEND_SOCKET=/nowhere t restore a --path file",
                3,
                "no job volume here: /nowhere",
                json!(null),
            ),
            // From wherever it is run, and by whom.
            (
                "cp /run/lvm-cache-friend/bin/lvm-cache-friend /tmp; c /tmp/lvm-cache-friend status",
                0,
                "",
                json!("mount restored="),
            ),
            (
                "c su user -c '/run/lvm-cache-friend/bin/lvm-cache-friend status --json'",
                0,
                "",
                json!({"ok": true}),
            ),
            // Root in the container can neither change nor shadow it.
            (
                "cd /run/lvm-cache-friend; c stat -c '%a %U' bin/lvm-cache-friend",
                0,
                "",
                json!("555 root"),
            ),
            (
                "c sh -c ': > bin/lvm-cache-friend'",
                1,
                "Read-only",
                json!(null),
            ),
            ("c rm bin/lvm-cache-friend", 1, "Read-only", json!(null)),
            ("c touch bin/other", 1, "Read-only", json!(null)),
            (
                "c chmod 4755 bin/lvm-cache-friend",
                1,
                "Read-only",
                json!(null),
            ),
            ("c mv bin other", 1, "busy", json!(null)),
            ("c rmdir bin", 1, "busy", json!(null)),
            ("c mount -o remount,rw bin", 1, "denied", json!(null)),
            ("t status --json", 0, "", json!({"ok": true})),
            (
                "t verdict success --json",
                0,
                "",
                json!({"ok": true, "verdict": "success"}),
            ),
        ],
        // The verdict goes before this.
        "exit 1",
    );
    let mut last = Value::Null;
    wait_until(|| {
        last = host.status("job")["last_lease"].clone();
        last.as_object().is_some_and(|last| last.len() == 2)
    });
    assert!(last["cargo"]["published"].is_string(), "{last}");
    assert!(last["both"]["published"].is_null(), "{last}");

    let exact = json!({"ok": true, "restored": "exact", "criterion": ["linux", "one"], "tags": ["linux", "one"], "path": null});
    let store = match kind {
        Kind::Reflink => "reflink",
        Kind::Lvm => crate::support::lvm::TestVg::NAME,
        Kind::Rbd => crate::support::ceph::STORE,
    };
    // In a user namespace, where an old crun shows nothing that was mounted in the job volume before.
    run(
        &host,
        &["--userns=auto:size=2000"],
        &[
            (
                "c sh -c ': > /run/lvm-cache-friend/bin/lvm-cache-friend'",
                1,
                "can't create",
                json!(null),
            ),
            (
                "c rm /run/lvm-cache-friend/bin/lvm-cache-friend",
                1,
                "can't remove",
                json!(null),
            ),
            (
                "c chmod 777 /run/lvm-cache-friend/bin",
                1,
                "bin: ",
                json!(null),
            ),
            (
                "t restore cargo --key 'linux one' --lookup-only --path file --json",
                0,
                "",
                exact,
            ),
            ("c ls", 0, "", json!(null)),
            (
                "mkdir reg; echo lost > reg/x; echo kept > reg/y; t restore cargo --key 'linux two' --restore-keys 'linux one' --path reg --json",
                0,
                "",
                json!({"ok": true, "restored": "fallback", "criterion": ["linux", "one"]}),
            ),
            ("c cat reg/x reg/y", 0, "", json!("one\nkept")),
            (
                "ln -s /run/lvm-cache-friend/a/b there; t restore a//b/ --restore-keys 'mo* yet' --fail-on-miss --path there",
                0,
                "",
                json!(format!("{store} friend-")),
            ),
            ("c cat there/x", 0, "", json!("one")),
            (
                "t status",
                0,
                "",
                json!("mount restored=fallback criterion=yet,mo* tags=more,tags,yet age="),
            ),
            ("t verdict failure", 0, "", json!("ok verdict=failure")),
        ],
        "exit 0",
    );
    wait_until(|| {
        last = host.status("job")["last_lease"].clone();
        last["a/b"].is_object()
    });
    assert!(last["cargo"]["published"].is_null(), "{last}");

    // Over a kill of the daemon it is still there, once; and the main program is a client too.
    // Nothing in it handles SIGTERM.
    let start = ["run", "--detach", "--stop-signal", "KILL", "--name", "job"];
    let sleep = ["-v", VOLUME, &host.podman.image, "sleep", "3600"];
    host.podman.done(&[&start[..], &sleep].concat());
    let client = "/run/lvm-cache-friend/bin/lvm-cache-friend";
    host.podman.exec("job", &format!("{client} restore x"));
    host.restart(true, |podman| {
        let gone = podman.outcome(&["exec", "job", client, "status"]);
        assert_eq!(gone.status, 3, "{gone:?}");
    });
    let mounted = "grep -c '/run/lvm-cache-friend/bin ' /proc/self/mountinfo";
    let said = host
        .podman
        .exec("job", &format!("{client} status; {mounted}"));
    let (status, count) = said.trim_end().rsplit_once('\n').unwrap();
    assert!(status.contains("ok mounts=1 "), "{said}");
    assert_eq!(count, "1");
    let socket = Path::new(MOUNT_DIR).join("job/socket");
    let arguments = ["status", "--json", "--socket", socket.to_str().unwrap()];
    let own: Value = serde_json::from_str(&host.site.done(&arguments)).unwrap();
    assert_eq!(own["mounts"].as_array().unwrap().len(), 1, "{own}");
    for help in [&["--help"][..], &["x", "--help"]] {
        let arguments = [&["restore"], help].concat();
        let there = [&["exec", "job", client], &arguments[..]].concat();
        assert_eq!(host.site.done(&arguments), host.podman.done(&there));
    }
    host.podman.end(&["job"]);
    drop(hooks);
    host.podman.done(&["volume", "rm", "job"]);
    wait_until(|| mounts().is_empty());
    host.site.settled(&[]);
}
