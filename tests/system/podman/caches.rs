// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What containers find in their caches, and what becomes of what they leave there.

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Body, Host, mountpoint};
use crate::support::command::{run, sh};
use crate::support::lvm::TestVg;
use crate::support::podman::Service;
use crate::support::site::Kind;
use crate::support::wait_until;

pub const BODIES: &[Body] = &[
    ("choices", choices),
    ("two_at_once", two_at_once),
    ("afresh_or_kept", afresh_or_kept),
    ("what_is_published", what_is_published),
    ("misses", misses),
    ("scratch", scratch),
];

/// What volumes are restored from, by their options.
fn choices(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    let entries = [
        ("aaa", "linux aaa", ""),
        ("bbb", "bbb", ""),
        ("abc", "linux abc npm/deps=1", ""),
        ("team", "bbb", "team"),
    ]
    .map(|(who, tags, scope)| (who, host.entry(who, tags, scope)));

    // options, one a line -> restored, from whom, by which criterion
    let rows = [
        ("restore=linux zzz; bbb; linux a*", "fallback", "bbb", "bbb"),
        (
            "restore=linux zzz; linux a*; bbb",
            "fallback",
            "abc",
            "linux a*",
        ),
        ("restore=linux aaa; linux", "exact", "aaa", "aaa linux"),
        ("restore=aaa linux", "exact", "aaa", "aaa linux"),
        ("restore=a* linux", "fallback", "abc", "linux a*"),
        ("restore=zz*; npm/*", "fallback", "abc", "npm/*"),
        ("restore=linux", "exact", "abc", "linux"),
        ("restore=zzz; yyy*", "base", "", ""),
        (
            "o=publish=never,restore=linux zzz; bbb",
            "fallback",
            "bbb",
            "bbb",
        ),
        // Scopes in their order, criteria within each.
        ("restore=bbb\nscope=team", "exact", "team", "bbb"),
        ("restore=linux\nscope=team", "base", "", ""),
        (
            "restore=linux; bbb\nscope=team\nread-scopes=-",
            "fallback",
            "team",
            "bbb",
        ),
        (
            "restore=linux\nscope=team\nread-scopes=other -",
            "exact",
            "abc",
            "linux",
        ),
    ];
    let names: Vec<_> = (0..rows.len()).map(|n| format!("v{n}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    podman.create(names[0], &[rows[0].0]);
    {
        let service = Service::start();
        for (name, (options, ..)) in names.iter().zip(rows).skip(1) {
            let made = service.create(name, &options.lines().collect::<Vec<_>>());
            assert_eq!(made.0, 201, "{options}: {made:?}");
        }
    }
    for (volume, (options, restored, who, criterion)) in podman.inspect(&names).iter().zip(rows) {
        let status = &volume["Status"];
        assert_eq!(status["state"], "ready", "{options}: {status}");
        assert_eq!(status["restored"], restored, "{options}: {status}");
        if let Some((_, lv)) = entries.iter().find(|(w, _)| *w == who) {
            assert_eq!(status["from"], lv.as_str(), "{options}: {status}");
            assert_eq!(status["criterion"], criterion, "{options}: {status}");
            assert!(
                status["age_seconds"].is_u64() && status["prepare_ms"].is_u64(),
                "{status}"
            );
        }
    }

    // The choice is made again when the container starts.
    let newer = host.entry("newer", "linux abc", "");
    let read = podman.sh(
        &["v0", "v1", "v2", "v6", "v9"],
        "for n in 0 1 2 6 9; do cat /v$n/who; echo; done",
    );
    assert_eq!(read, "bbb\nnewer\naaa\nnewer\nteam\n");
    wait_until(|| host.status("v6")["last_lease"]["from"] == newer.as_str());
}

/// Two containers that run at once from one XFS entry.
fn two_at_once(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    let entry = host.entry("both", "linux", "");
    podman.create("v1", &["restore=linux", "save=first"]);
    podman.create("v2", &["restore=linux", "save=second"]);
    podman.start("c1", "v1", "[ $(cat /v1/who) = both ]; echo 1 > /v1/mark");
    podman.start(
        "c2",
        "v2",
        "[ $(cat /v2/who) = both ]; [ ! -e /v2/mark ]; echo 2 > /v2/more",
    );
    assert_eq!(podman.exec("c1", "ls /v1"), "mark\nwho\n");
    let mountinfo = podman.exec("c2", "ls /v2 >&2; grep ' /v2 ' /proc/self/mountinfo");
    for flag in ["nosuid", "nodev", "noatime", " - xfs "] {
        assert!(mountinfo.contains(flag), "{flag} is not in {mountinfo}");
    }

    let mut leased = Vec::new();
    for (inspected, volume) in podman.inspect(&["v1", "v2"]).iter().zip(["v1", "v2"]) {
        assert_eq!(
            inspected["Mountpoint"],
            mountpoint(volume).to_str().unwrap()
        );
        let status = &inspected["Status"];
        for (key, want) in [
            ("state", "mounted"),
            ("restored", "exact"),
            ("criterion", "linux"),
            ("from", entry.as_str()),
        ] {
            assert_eq!(status[key], want, "{status}");
        }
        assert!(
            status["mount_ms"].is_u64() && status["bytes_written"].is_u64(),
            "{status}"
        );
        leased.push(status["lv"].clone());
    }
    podman.end(&["c1", "c2"]);
    for (lv, (volume, tag)) in leased.iter().zip([("v1", "first"), ("v2", "second")]) {
        let last = host.settled(volume, lv);
        assert_eq!(last["from"], entry.as_str(), "{last}");
        assert!(last["bytes_written"].as_u64().unwrap() > 0, "{last}");
        assert_eq!(last["verdict"], "unknown", "{last}");
        assert_eq!(
            host.entries_tagged(&[tag]),
            [last["published"].as_str().unwrap()]
        );
        assert!(!mountpoint(volume).exists());
    }
    assert_eq!(
        podman.inspect(&["v1"])[0]["Status"]["last_lease"],
        host.status("v1")["last_lease"]
    );
    podman.create("v3", &["restore=first"]);
    podman.create("v4", &["restore=second"]);
    assert_eq!(
        podman.sh(&["v3", "v4"], "cd /; ls v3/* v4/*"),
        "v3/mark\nv3/who\nv4/more\nv4/who\n"
    );
}

/// The same volumes again and again.
fn afresh_or_kept(kind: Kind) {
    let mut host = Host::new(kind);
    host.entry("entry", "linux first", "");
    // It saves under other tags than it restores: each use starts as the first.
    host.podman.create("v1", &["restore=first", "save=other"]);
    // It goes on from what it saved.
    host.podman
        .create("v2", &["restore=linux mine; linux", "save=linux mine"]);
    // Neither restore nor save: an ordinary volume.
    host.podman.create("v3", &[]);
    let volumes = ["v1", "v2", "v3"];
    let script =
        "for v in v1 v2 v3; do echo x >> /$v/uses; echo $(wc -l < /$v/uses) $(ls /$v); done";
    let mut uses = Vec::new();
    for want in [
        "1 uses who\n1 uses who\n1 uses\n",
        "1 uses who\n2 uses who\n2 uses\n",
    ] {
        let (said, ended) = host.job(&volumes, script);
        assert_eq!(said, want);
        uses.push(ended);
    }
    for (n, restored) in ["fallback", "exact"].into_iter().enumerate() {
        assert_eq!(uses[n][0]["restored"], "exact", "{:?}", uses[n]);
        assert_eq!(uses[n][1]["restored"], restored, "{:?}", uses[n]);
    }
    assert_eq!(host.entries_tagged(&["other"]).len(), 2);
    assert_eq!(
        host.podman.inspect(&["v3"])[0]["Status"]["restored"],
        "kept"
    );

    // All of it is there after a restart, and what was only read is not published again.
    host.restart(false, |_| {});
    let (said, ended) = host.job(
        &volumes,
        "for v in v1 v2 v3; do ls /$v; done; cat /v2/uses /v3/uses",
    );
    assert_eq!(said, "who\nuses\nwho\nuses\nx\nx\nx\nx\n");
    assert_eq!(
        (&ended[1]["published"], &ended[1]["why"]),
        (&Value::Null, &json!("nothing changed"))
    );
}

/// One container with a volume for each value of `publish`.
fn what_is_published(kind: Kind) {
    let host = Host::new(kind);
    let values = [
        "never",
        "always",
        "on-success",
        "unless-failed",
        "if-missing",
    ];
    {
        let service = Service::start();
        for value in values {
            service.create(
                value,
                &[&format!("save={value}"), &format!("publish={value}")],
            );
        }
    }
    host.podman.create("default", &["save=default"]);
    host.podman.create("unsaved", &["restore=linux"]);
    let written = [&values[..], &["default", "unsaved"]].concat();
    // A job that wrote nothing has nothing to publish; its entry would hide what another one wrote meanwhile.
    host.podman.create("untouched", &["save=untouched"]);
    let volumes = [&written[..], &["untouched"]].concat();
    let script = format!(
        "for volume in {}; do echo x > /$volume/file; done",
        written.join(" ")
    );
    let (_, ended) = host.job(&volumes, &script);
    for (volume, last) in volumes.iter().zip(ended) {
        let why = match *volume {
            "never" => "publish=never",
            "on-success" => "no success verdict",
            "unsaved" => "no save tags",
            "untouched" => "nothing changed",
            _ => "",
        };
        let entries = host.entries_tagged(&[volume]);
        if why.is_empty() {
            assert_eq!(entries, [last["published"].as_str().unwrap()], "{last}");
        } else {
            assert_eq!(
                (&last["why"], &last["published"]),
                (&json!(why), &Value::Null)
            );
            assert!(entries.is_empty());
        }
    }
    // What somebody may write to is never tagged.
    for row in host.site.list() {
        let tagged = row["tags"].to_string().contains("friend:cache:");
        assert_eq!(tagged, row["kind"] == "entry", "{row}");
    }
}

fn misses(kind: Kind) {
    let host = Host::new(kind);
    let podman = &host.podman;
    podman.create(
        "empty",
        &["restore=linux", "on-miss=empty", "fs=ext4", "size=1G"],
    );
    podman.create("fail", &["restore=linux", "on-miss=fail"]);
    assert_eq!(host.status("empty")["restored"], "empty");
    let said = podman.sh(
        &["empty"],
        "grep ' /empty ' /proc/self/mountinfo; ls -A /empty",
    );
    assert!(
        said.contains(" - ext4 ") && said.lines().count() == 1,
        "{said}"
    );
    podman.fails(
        &podman.run_sh(&["-v", "fail:/c"], "echo never"),
        126,
        &["no entry matches the restore keys of volume fail"],
    );
    assert!(!mountpoint("fail").exists());
    host.entry("late", "linux", "");
    assert_eq!(
        podman.sh(&["empty", "fail"], "cat /empty/who /fail/who"),
        "latelate"
    );
}

/// A store that does not serve.
fn scratch(kind: Kind) {
    let mut host = Host::new(kind);
    {
        let _broken = host.site.broken();
        for (name, options) in [
            ("late", &["restore=linux", "on-error=scratch"][..]),
            ("kept", &["on-error=scratch"]),
        ] {
            host.podman.create(name, options);
        }
    }
    // Known to the daemon alone, until the store serves again.
    wait_until(|| {
        let names: Vec<_> = host
            .site
            .list()
            .iter()
            .map(|row| row["volume"].clone())
            .collect();
        ["late", "kept"]
            .iter()
            .all(|name| names.contains(&json!(name)))
    });
    host.restart(false, |_| {});
    assert_eq!(host.podman.volumes(), ["kept", "late"]);
    host.podman.done(&["volume", "rm", "late", "kept"]);
    let podman = &host.podman;
    podman.create(
        "scratch",
        &[
            "restore=linux",
            "save=linux",
            "on-error=scratch",
            "size=1G",
            "mode=0750",
        ],
    );
    podman.create("fail", &["restore=linux", "save=linux"]);
    // With the end of this, both need new copies.
    podman.start("c1", "scratch", "true");
    podman.start("c2", "fail", "true");
    {
        let _broken = host.site.broken();
        podman.end(&["c1", "c2"]);
        podman.fails(
            &podman.run_sh(&["-v", "fail:/c"], "echo never"),
            126,
            &["VolumeDriver.Mount"],
        );
        let said = podman.sh(
            &["scratch"],
            "cd scratch; grep ' /scratch ' /proc/self/mountinfo; stat -c %a .; df -Pm . | tail -n 1 | awk '{ print $2 }'; echo x > file",
        );
        for words in ["nosuid,nodev", " - tmpfs ", "\n750\n1024\n"] {
            assert!(said.contains(words), "{said}");
        }
        assert!(host.daemon().log().contains("on-error=scratch"));
        assert_eq!(podman.volumes(), ["fail", "scratch"]);
    }
    let said = podman.sh(
        &["scratch", "fail"],
        "ls /scratch /fail; grep -E ' /(scratch|fail) ' /proc/self/mountinfo",
    );
    assert_eq!(said.matches(" - xfs ").count(), 2, "{said}");
    assert!(!said.contains("\nfile"), "{said}");
}

/// What others make in the group, with LVM's own tools.
pub fn made_by_hand() {
    let host = Host::new(Kind::Lvm);
    let (podman, vg) = (&host.podman, TestVg::NAME);
    podman.create("waiting", &["restore=old", "on-miss=fail"]);

    // As the original script leaves them: no scope, and a snapshot by its name and tags alone.
    // Tags come first here, as in the script: what is half made is no entry yet, and nobody's to remove.
    sh(&format!(
        "lvcreate -q -y -V 1G --thinpool friend-pool -n friend-script --addtag friend:snapshot --addtag friend:cache:old {vg} 2>&1"
    ));
    wait_until(|| {
        let log = host.daemon().log();
        log.lines()
            .any(|line| line.contains("friend-script") && line.contains("blank yet"))
    });
    sh(&format!(
        "mkfs.xfs -q /dev/{vg}/friend-script
        mkdir -p /tmp/made
        mount /dev/{vg}/friend-script /tmp/made
        echo script > /tmp/made/who
        umount /tmp/made"
    ));
    // The daemon is to see it within 5 s; how long it takes is shown, as a busy machine may take longer.
    let made = Instant::now();
    wait_until(|| host.status("waiting")["restored"] == "exact");
    println!("found after {:?}", made.elapsed());
    assert_eq!(podman.sh(&["waiting"], "cat /waiting/who"), "script\n");

    // Not ours: no tags, tags that make no sense, tags of two kinds.
    sh(&format!(
        "for lv in friend-foreign 'friend-half --addtag friend:cache:old' \
            'friend-both --addtag friend:snapshot --addtag friend:cache:old --addtag friend:volume:waiting' \
            'friend-odd --addtag friend:snapshot --addtag friend:cache:old --addtag friend:opt:size=much'; do
            lvcreate -q -y -V 64M --thinpool friend-pool -n $lv {vg} 2>&1
        done
        lvcreate -q -y -L 64M -n friend-plain --addtag friend:snapshot --addtag friend:cache:old {vg} 2>&1
        echo precious > /dev/{vg}/friend-foreign"
    ));
    let theirs = || {
        let fields = "lv_name,lv_uuid,lv_tags,lv_size,lv_attr,lv_time,lv_active";
        let them = ["foreign", "half", "both", "odd", "plain"];
        let them = them.map(|name| format!("{vg}/friend-{name}"));
        let options = ["--noheadings", "--separator=;", "-o", fields];
        run(
            "lvs",
            options.into_iter().chain(them.iter().map(String::as_str)),
        )
    };
    let before = theirs();
    assert_eq!(before.lines().count(), 5, "{before}");
    wait_until(|| {
        let log = host.daemon().log();
        ["half", "both", "odd"]
            .iter()
            .all(|name| log.contains(&format!("friend-{name}")))
    });
    podman.create("v1", &["restore=old", "save=new"]);
    assert_eq!(
        podman.sh(&["v1"], "cat /v1/who; echo x > /v1/x"),
        "script\n"
    );
    podman.done(&["volume", "rm", "v1", "waiting"]);
    let mut host = host;
    host.restart(false, |_| {});
    wait_until(|| host.entries_tagged(&["new"]).len() == 1);
    assert_eq!(theirs(), before);
    assert!(
        fs::read(format!("/dev/{vg}/friend-foreign"))
            .unwrap()
            .starts_with(b"precious\n")
    );
}
