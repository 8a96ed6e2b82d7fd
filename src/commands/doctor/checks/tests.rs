// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each check, on facts that are made up.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::super::facts::{
    Clock, DRIVER, Daemon, FileFact, FileKind, Hook, HookFile, Kernel, Podman, PodmanInfo, SERVICE,
    SOCKET, Selinux, Store, Supervisor, TIMER, Tool,
};
use super::containers::STAGES;
use super::*;
use crate::cache::units::Bytes;
use crate::mount::MountPoint;
use crate::podman::Engine;
use crate::selinux::{Label, LabelError, Labels};
use crate::storage::rbd::Report;
use crate::storage::{Capacity, Trouble};

fn file(path: &str, mode: u32, kind: FileKind) -> FileFact {
    FileFact {
        path: path.into(),
        uid: 0,
        gid: 0,
        mode,
        kind,
    }
}

fn settings_of(store: &str) -> Config {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("config.toml");
    std::fs::write(&file, store).expect("written");
    Config::Read(Box::new(Settings::load(&file).expect("valid")))
}

fn unit(id: &str) -> (String, BTreeMap<String, String>) {
    let properties = [
        ("LoadState", "loaded"),
        ("ActiveState", "active"),
        ("UnitFileState", "enabled"),
        ("NeedDaemonReload", "no"),
        ("PrivateTmp", "no"),
        ("ProtectProc", "default"),
        ("BindPaths", ""),
    ];
    let properties = properties.map(|(name, value)| (name.to_owned(), value.to_owned()));
    (id.to_owned(), properties.into())
}

fn hook(stage: &str) -> HookFile {
    HookFile {
        path: format!("/hooks/{stage}.json").into(),
        hook: Ok(Hook {
            program: "/usr/bin/lvm-cache-friend".into(),
            program_exists: true,
            args: ["lvm-cache-friend", "hook", stage]
                .map(str::to_owned)
                .into(),
            stages: vec![stage.to_owned()],
        }),
    }
}

/// A host on which nothing is wrong.
fn healthy() -> Facts {
    let socket = "/run/lvm-cache-friend/plugin.sock";
    Facts {
        config_file: "/etc/lvm-cache-friend/config.toml".into(),
        config: settings_of("[lvm]\nvg = 'vg0'\npool = 'friend-pool'\n"),
        tools: vec![Tool {
            name: "lvm",
            package: "lvm2",
            version: Some("2.03.16".into()),
        }],
        kernel: Kernel {
            release: "6.1.0-18-amd64".into(),
            xfs: true,
            thin: true,
            rbd: true,
        },
        store: Some(Ok(Store {
            capacity: Capacity {
                data_size: Bytes(Bytes::GIB),
                data_percent: 10.0,
                data_limit: 95.0,
                metadata_size: Bytes::mib(16),
                metadata_percent: 10.0,
                metadata_limit: 75.0,
                group_size: Bytes::mib(1),
                group_percent: 10.0,
            },
            when_full: Some("error".into()),
            ceph: None,
            troubles: Vec::new(),
            drawback: None,
            doomed: 0,
            making: 0,
            unclear: Vec::new(),
            volumes: ["cargo".to_owned()].into(),
            newest: 1_700_000_000,
        })),
        files: vec![
            file("/etc/lvm-cache-friend", 0o755, FileKind::Dir),
            file("/etc/lvm-cache-friend/config.toml", 0o644, FileKind::File),
            file("/etc/lvm-cache-friend/key.pem", 0o600, FileKind::File),
        ],
        socket: Some(file(socket, 0o660, FileKind::Socket)),
        socket_gid: Some(Ok(0)),
        daemon: Daemon::Runs {
            version: env!("CARGO_PKG_VERSION").into(),
            same_namespace: Some(true),
        },
        mount_dir: Some(file("/run/lvm-cache-friend/mnt", 0o750, FileKind::Dir)),
        mount_root: Some(MountPoint {
            id: 1,
            root: "/".into(),
            at: "/run".into(),
            device: (0, 1),
            fs: "tmpfs".into(),
            source: "run".into(),
            shared: true,
            follows: false,
            label: None,
        }),
        podman: Some(Podman {
            info: Ok(PodmanInfo {
                version: "4.3.1".into(),
                volume_plugins: vec!["local".into(), DRIVER.into()],
                event_logger: "journald".into(),
            }),
            conf: Engine {
                hooks_dir: vec!["/hooks".into()],
                volume_plugins: [(DRIVER.to_owned(), PathBuf::from(socket))].into(),
                volume_plugin_timeout: Some(60),
            },
            local_volumes: Ok(["other".to_owned()].into()),
            hooks: STAGES.map(hook).into(),
        }),
        supervisor: Some(Ok(Supervisor {
            check: Ok(()),
            podman_socket: "/run/podman/podman.sock".into(),
            has_podman: true,
            control_socket: "/run/lvm-cache-friend/runners.sock".into(),
            slots: Some(Ok(2)),
        })),
        dockerd: true,
        docker_spec: Some((
            "/etc/docker/plugins/lvm-cache-friend.spec".into(),
            format!("unix://{socket}"),
        )),
        selinux: Some(Selinux {
            enforcing: true,
            unwanted: false,
            labels: Ok(Labels {
                mounts: Some(label("system_u:object_r:container_file_t:s0")),
                sockets: Some(label("system_u:system_r:container_t:s0")),
            }),
            others: Vec::new(),
        }),
        docker_api: Some(Ok("26.1.5".into())),
        clock: Clock {
            now: 1_700_000_000,
            synchronised: true,
        },
        units: Some(Ok([SERVICE, SOCKET, TIMER].map(unit).into())),
    }
}

fn the_store(facts: &mut Facts) -> &mut Store {
    let Some(Ok(store)) = &mut facts.store else {
        panic!("there is one");
    };
    store
}

/// Has a host have its store on Ceph.
fn on_ceph(facts: &mut Facts) -> &mut Report {
    facts.config = settings_of("[rbd]\npool = 'rbd/caches'\nuser = 'cache'\n");
    let report = Report {
        user: "cache".into(),
        host: "one".into(),
        monitors: vec![("a".into(), true), ("b".into(), true)],
        images: 20,
        deepest: 3,
        deep: (0, 8),
        ..Report::default()
    };
    the_store(facts).ceph.insert(report)
}

fn label(text: &str) -> Label {
    text.parse().expect("a label")
}

fn the_selinux(facts: &mut Facts) -> &mut Selinux {
    facts.selinux.as_mut().expect("it is on")
}

fn the_podman(facts: &mut Facts) -> &mut Podman {
    facts.podman.as_mut().expect("there is one")
}

fn the_supervisor(facts: &mut Facts) -> &mut Supervisor {
    let Some(Ok(supervisor)) = &mut facts.supervisor else {
        panic!("there is one");
    };
    supervisor
}

fn set(facts: &mut Facts, unit: &str, name: &str, value: &str) {
    let Some(Ok(units)) = &mut facts.units else {
        panic!("there are some");
    };
    let unit = units.get_mut(unit).expect("of that name");
    unit.insert(name.to_owned(), value.to_owned());
}

#[test]
fn nothing_is_wrong() {
    let mut facts = healthy();
    for on_ceph_too in [false, true] {
        if on_ceph_too {
            on_ceph(&mut facts);
        }
        let found = all(&facts);
        for found in &found {
            assert!(found.state == State::Ok && found.fix.is_none(), "{found:?}");
        }
        assert_eq!(found.iter().any(|found| found.check == "ceph"), on_ceph_too);
    }
}

/// With nothing prepared, no daemon, no container engine, no systemd.
#[test]
fn nothing_is_there() {
    let facts = Facts {
        config: Config::Missing,
        tools: Vec::new(),
        store: None,
        files: Vec::new(),
        socket: None,
        socket_gid: None,
        daemon: Daemon::Unknown,
        mount_dir: None,
        mount_root: None,
        podman: None,
        supervisor: None,
        dockerd: false,
        docker_spec: None,
        units: None,
        ..healthy()
    };
    let wrong: Vec<_> = all(&facts)
        .into_iter()
        .filter(|found| found.state == State::Wrong)
        .map(|found| found.check)
        .collect();
    assert_eq!(wrong, ["configuration", "podman"]);
    assert!(all(&facts).iter().all(|found| found.check != "supervisor"));
}

/// A way to break a host.
type Break = fn(&mut Facts);

#[test]
fn each_fault_is_found() {
    use State::{Note, Skipped, Wrong};
    let cases: [(&str, State, &str, Break); 58] = [
        ("configuration", Wrong, "init", |f| {
            f.config = Config::Missing;
        }),
        ("configuration", Wrong, "line 3", |f| {
            f.config = Config::Bad("line 3".into());
        }),
        ("permissions", Wrong, "go-w", |f| f.files[1].mode = 0o664),
        ("permissions", Wrong, "go-w", |f| f.files[0].mode = 0o777),
        ("permissions", Wrong, "1000", |f| f.files[1].uid = 1000),
        ("permissions", Wrong, "0600", |f| f.files[2].mode = 0o644),
        ("permissions", Wrong, "chmod 0750", |f| {
            f.mount_dir.as_mut().expect("there").mode = 0o755;
        }),
        ("permissions", Skipped, "no config", |f| f.files.clear()),
        ("tools", Wrong, "apt install lvm2", |f| {
            f.tools[0].version = None;
        }),
        ("kernel", Wrong, "no XFS", |f| f.kernel.xfs = false),
        ("kernel", Wrong, "dm-thin", |f| f.kernel.thin = false),
        ("kernel", Wrong, "5.8", |f| {
            f.kernel.release = "4.19.0-1".into();
        }),
        ("kernel", Note, "idmapped", |f| {
            f.kernel.release = "5.15.0".into();
        }),
        ("kernel", Note, "version", |f| {
            f.kernel.release = "new".into();
        }),
        ("store", Wrong, "vgs vg0", |f| {
            f.store = Some(Err("gone".into()));
        }),
        ("store", Skipped, "configuration", |f| {
            f.config = Config::Missing;
            f.store = None;
        }),
        ("pool", Note, "lvextend --size", |f| {
            the_store(f).capacity.data_percent = 91.0;
        }),
        ("pool", Wrong, "lvextend --size", |f| {
            the_store(f).capacity.data_percent = 95.0;
        }),
        ("pool", Wrong, "--poolmetadatasize", |f| {
            the_store(f).capacity.metadata_percent = 99.0;
        }),
        ("pool", Wrong, "--metadatasize", |f| {
            the_store(f).capacity.group_percent = 99.0;
        }),
        ("pool", Wrong, "--errorwhenfull y vg0/friend-pool", |f| {
            the_store(f).when_full = Some("queue".into());
        }),
        ("pool", Wrong, "lvconvert --repair vg0/friend-pool", |f| {
            the_store(f).troubles = vec![Trouble {
                finding: "it is read-only".into(),
                fix: "lvconvert --repair vg0/friend-pool".into(),
            }];
        }),
        ("pool", Note, "built with its shell", |f| {
            the_store(f).drawback = Some("LVM's shell cannot be used".into());
        }),
        ("pool", Skipped, "cannot", |f| {
            f.store = Some(Err("gone".into()));
        }),
        ("leftovers", Wrong, "contradictory", |f| {
            the_store(f).unclear = vec![("lv1".into(), "why".into())];
        }),
        ("leftovers", Note, "marked for removal", |f| {
            the_store(f).doomed = 2;
        }),
        ("leftovers", Note, "start the daemon", |f| {
            the_store(f).making = 1;
            f.daemon = Daemon::Away;
        }),
        ("units", Skipped, "systemd", |f| f.units = None),
        ("units", Wrong, "bus", |f| f.units = Some(Err("bus".into()))),
        ("units", Wrong, "copy plugin/usr", |f| {
            set(f, SERVICE, "LoadState", "not-found");
        }),
        ("units", Wrong, "unmask", |f| {
            set(f, SOCKET, "LoadState", "masked");
        }),
        ("units", Wrong, "journalctl", |f| {
            set(f, SERVICE, "ActiveState", "failed");
        }),
        ("units", Wrong, "enable --now", |f| {
            set(f, SOCKET, "ActiveState", "inactive");
        }),
        ("units", Note, "after init", |f| {
            set(f, SERVICE, "ActiveState", "inactive");
            f.config = Config::Missing;
        }),
        ("units", Wrong, "at boot", |f| {
            set(f, SERVICE, "UnitFileState", "disabled");
        }),
        ("units", Note, "only after a publish", |f| {
            set(f, TIMER, "ActiveState", "inactive");
        }),
        ("units", Note, "daemon-reload", |f| {
            set(f, SERVICE, "NeedDaemonReload", "yes");
        }),
        ("socket", Wrong, "does not exist", |f| f.socket = None),
        ("socket", Wrong, "not a socket", |f| {
            f.socket.as_mut().expect("there").kind = FileKind::File;
        }),
        ("socket", Wrong, "0660", |f| {
            f.socket.as_mut().expect("there").mode = 0o666;
        }),
        ("socket", Note, "SocketGroup=", |f| {
            f.socket_gid = Some(Ok(7));
        }),
        ("socket", Wrong, "no group", |f| {
            f.socket_gid = Some(Err("there is no group".into()));
        }),
        ("daemon", Wrong, "does not run", |f| f.daemon = Daemon::Away),
        ("daemon", Wrong, "restart", |f| {
            f.daemon = Daemon::Odd("no JSON".into());
        }),
        ("daemon", Note, "0.0.9", |f| {
            f.daemon = Daemon::Runs {
                version: "0.0.9".into(),
                same_namespace: Some(true),
            };
        }),
        ("namespace", Wrong, "not this one", |f| {
            f.daemon = Daemon::Runs {
                version: env!("CARGO_PKG_VERSION").into(),
                same_namespace: Some(false),
            };
        }),
        ("namespace", Wrong, "PrivateTmp=yes", |f| {
            set(f, SERVICE, "PrivateTmp", "yes");
            f.daemon = Daemon::Away;
        }),
        ("namespace", Skipped, "does not run", |f| {
            f.daemon = Daemon::Away;
        }),
        ("propagation", Wrong, "--make-shared /run", |f| {
            f.mount_root.as_mut().expect("there").shared = false;
        }),
        ("podman", Wrong, "50-lvm-cache-friend.conf", |f| {
            let info = the_podman(f).info.as_mut().expect("there");
            info.volume_plugins.clear();
        }),
        ("podman", Wrong, "/elsewhere", |f| {
            the_podman(f).conf.volume_plugins = [(DRIVER.into(), "/elsewhere".into())].into();
        }),
        ("podman", Note, "volume_plugin_timeout", |f| {
            the_podman(f).conf.volume_plugin_timeout = None;
        }),
        ("verdicts", Note, "events_logger", |f| {
            let info = the_podman(f).info.as_mut().expect("there");
            info.event_logger = "none".into();
        }),
        ("hooks", Wrong, "no hook for poststop in /hooks", |f| {
            the_podman(f).hooks.pop();
        }),
        ("hooks", Wrong, "silently", |f| {
            let hook = the_podman(f).hooks[0].hook.as_mut().expect("read");
            hook.program_exists = false;
        }),
        ("hooks", Wrong, "no container at all", |f| {
            the_podman(f).hooks.push(HookFile {
                path: "/hooks/other.json".into(),
                hook: Err("EOF".into()),
            });
        }),
        ("local-volumes", Wrong, "podman volume rm cargo", |f| {
            the_podman(f).local_volumes = Ok(["cargo".to_owned()].into());
        }),
        ("docker", Note, "no spec file", |f| f.docker_spec = None),
    ];
    let more: [(&str, State, &str, Break); 30] = [
        ("kernel", Wrong, "no rbd", |f| {
            on_ceph(f);
            f.kernel.rbd = false;
        }),
        ("store", Wrong, "rbd --id cache ls rbd/caches", |f| {
            on_ceph(f);
            f.store = Some(Err("no monitor answers".into()));
        }),
        ("pool", Note, "give pool rbd a larger quota", |f| {
            on_ceph(f);
            the_store(f).capacity.data_percent = 91.0;
        }),
        ("ceph", Wrong, "ceph auth caps client.cache", |f| {
            on_ceph(f).refused = Some("ceph auth caps client.cache".into());
        }),
        ("ceph", Note, "client.admin", |f| {
            on_ceph(f).user = "admin".into();
        }),
        ("ceph", Note, "not in the quorum: b", |f| {
            on_ceph(f).monitors[1].1 = false;
        }),
        ("ceph", Note, "copies 3 GiB", |f| {
            let report = on_ceph(f);
            (report.deep.0, report.to_copy) = (2, Bytes(3 * Bytes::GIB));
        }),
        ("ceph", State::Ok, "at most 3 clones deep", |f| {
            on_ceph(f);
        }),
        ("selinux", Skipped, "off", |f| f.selinux = None),
        ("selinux", Wrong, "does not know a:b:c", |f| {
            the_selinux(f).labels = Err(LabelError::Unknown(label("a:b:c")));
        }),
        ("selinux", Wrong, "install container-selinux", |f| {
            the_selinux(f).labels = Err(LabelError::Policy("no file".into()));
        }),
        ("selinux", Wrong, "if it were enforcing", |f| {
            the_selinux(f).enforcing = false;
            the_selinux(f).labels = Err(LabelError::Policy("no file".into()));
        }),
        ("selinux", Note, "\"none\"", |f| {
            the_selinux(f).unwanted = true;
            the_selinux(f).labels = Ok(Labels::default());
        }),
        ("selinux", Note, "job volume's socket", |f| {
            let labels = the_selinux(f).labels.as_mut().expect("there");
            labels.sockets = None;
        }),
        ("selinux", Note, "/mnt/a (and 1 more)", |f| {
            the_selinux(f).others = ["/mnt/a".into(), "/mnt/b".into()].into();
        }),
        ("verdicts", Note, "the check hooks", |f| {
            the_podman(f).hooks.clear();
        }),
        ("verdicts", Note, "the check podman", |f| {
            the_podman(f).info = Err("no answer".into());
        }),
        ("verdicts", Note, "nobody listens", |f| {
            f.docker_api = Some(Err("nobody listens".into()));
        }),
        ("verdicts", Note, "docker-socket", |f| f.docker_api = None),
        ("verdicts", Skipped, "neither", |f| {
            f.podman = None;
            f.dockerd = false;
        }),
        ("docker", Wrong, "echo unix:///run", |f| {
            f.docker_spec = Some(("/etc/docker/x.spec".into(), "unix:///x".into()));
        }),
        ("docker", Skipped, "not installed", |f| {
            f.docker_spec = None;
            f.dockerd = false;
        }),
        ("supervisor", Wrong, "line 3", |f| {
            f.supervisor = Some(Err("line 3".into()));
        }),
        ("supervisor", Wrong, "mode 0600", |f| {
            the_supervisor(f).check = Err("its mode".into());
        }),
        ("supervisor", Wrong, "podman.socket", |f| {
            the_supervisor(f).has_podman = false;
        }),
        ("supervisor", Wrong, "no job gets a runner", |f| {
            the_supervisor(f).slots = None;
        }),
        ("supervisor", Wrong, "restart", |f| {
            the_supervisor(f).slots = Some(Err("no JSON".into()));
        }),
        ("clock", Note, "set-ntp", |f| f.clock.synchronised = false),
        ("clock", Wrong, "behind", |f| f.clock.now -= 4000),
        ("podman", Wrong, "neither", |f| {
            f.podman = None;
            f.dockerd = false;
        }),
    ];
    let mut untested: Vec<_> = CHECKS.iter().map(|(name, _)| *name).collect();
    for (check, state, words, fault) in cases.into_iter().chain(more) {
        let mut facts = healthy();
        fault(&mut facts);
        let found = all(&facts);
        let says = |f: &&Finding| {
            let fix = f.fix.as_deref().unwrap_or_default();
            f.finding.contains(words) || fix.contains(words)
        };
        let found: Vec<_> = found.iter().filter(|f| f.check == check).collect();
        assert!(
            found.iter().any(|f| f.state == state && says(f)),
            "{check} does not say {words:?}: {found:?}"
        );
        // What is wrong says how to mend it.
        for found in found {
            let fixable = matches!(found.state, State::Wrong | State::Note);
            assert_eq!(found.fix.is_some(), fixable, "{found:?}");
        }
        untested.retain(|name| *name != check);
    }
    assert_eq!(untested, [""; 0]);
}
