// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many containers that end in many ways, at once: what is left of them.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lvm_cache_friend::supervisor::podman::Podman as Api;
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

use super::hooks::Hooks;
use super::{Body, Host};
use crate::support::census::Known;
use crate::support::content::Random;
use crate::support::podman::Service;
use crate::support::site::{Kind, MOUNT_DIR};
use crate::support::wait_until;

pub const BODIES: &[Body] = &[("nothing_is_left_of_many", many)];

/// How many containers there are, and how many milliseconds one lives at most: on a Ceph cluster in the guest a cache takes seconds
/// to come.
fn containers(kind: Kind) -> (usize, u64) {
    match kind {
        Kind::Reflink | Kind::Lvm => (50, 1500),
        Kind::Rbd => (20, 20_000),
    }
}

/// The job volumes that they use, one container at a time each. An emulated processor has enough to do with two.
fn volumes(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Reflink => &["one", "two", "three", "four"],
        Kind::Lvm | Kind::Rbd => &["one", "two"],
    }
}

/// How a container ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Exit(u8),
    Kill,
    Stop,
    Remove,
    /// And then its volume, which is made anew. Not by `volume rm --force`, which in Podman 4.3 waits for ever if the container's
    /// clean-up runs at that moment: it takes the locks of volume and container in the other order.
    RemoveVolume,
}

/// What a container does, and how long it may.
#[derive(Debug)]
struct Plan {
    end: End,
    /// It asks for three caches and does not wait for them: its end is not the last that is done for it.
    greedy: bool,
    after: Duration,
}

impl Plan {
    fn draw(random: &mut Random, longest: u64) -> Self {
        Self {
            end: match random.below(7) {
                0 => End::Exit(0),
                1 => End::Exit(1),
                2 | 3 => End::Kill,
                4 => End::Stop,
                5 => End::Remove,
                _ => End::RemoveVolume,
            },
            greedy: random.below(2) == 0,
            after: Duration::from_millis(random.below(longest)),
        }
    }

    fn script(&self) -> String {
        let mount = "mount() { /job/bin/lvm-cache-friend restore m$1 --key linux; }\n";
        let work = if self.greedy {
            "for n in 1 2 3; do mount $n; date > /job/m$n/date; done &"
        } else {
            "mount 1; date > /job/m1/date"
        };
        let end = match self.end {
            End::Exit(code) => format!("sleep {}; exit {code}", self.after.as_secs_f32()),
            _ => "exec sleep 3600".to_owned(),
        };
        format!("{mount}{work}\n{end}")
    }
}

/// Podman by its commands, and by its service, which does the same in less of an emulated processor's time.
struct Place {
    host: Host,
    service: Service,
    runtime: Runtime,
}

fn many(kind: Kind) {
    let host = Host::new(kind);
    let _hooks = Hooks::new(&host);
    let place = &Place {
        host,
        service: Service::start(),
        runtime: Builder::new_current_thread().enable_all().build().unwrap(),
    };
    let host = &place.host;
    let mut random = Random::from_clock();
    let volumes = volumes(kind);
    for volume in volumes {
        create(place, volume);
    }
    let known: Vec<_> = volumes.iter().copied().map(Known::idle).collect();
    let settled = || {
        host.site.settled(&known);
        wait_until(|| below_mount_dir() == 0);
    };
    // What is opened once only is open by then.
    let first = Plan {
        end: End::Exit(0),
        greedy: false,
        after: Duration::ZERO,
    };
    run(place, "first", volumes[0], &first);
    settled();
    let before = host.daemon().descriptors();

    let (containers, longest) = containers(kind);
    let plans: Vec<_> = (0..containers)
        .map(|_| Plan::draw(&mut random, longest))
        .collect();
    let next = AtomicUsize::new(0);
    let since = Instant::now();
    thread::scope(|scope| {
        for volume in volumes {
            let (plans, next) = (&plans, &next);
            scope.spawn(move || {
                while let Some(plan) = plans.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run(place, &format!("of-{volume}"), volume, plan);
                }
            });
        }
    });
    let mounted = host.daemon().log().matches("lease ended").count();
    println!(
        "{containers} containers in {:.0?}, with {mounted} caches and more that were not settled",
        since.elapsed()
    );
    assert!(mounted >= containers / 2, "some exit before their first");
    assert_eq!(host.podman.done(&["ps", "--all", "--quiet"]), "");
    settled();
    // A connection that ended is closed a moment later.
    wait_until(|| host.daemon().descriptors().len() <= before.len());
    // Podman 5's service may have had a connection open then that it has not now.
    let mut known = before.clone();
    for open in host.daemon().descriptors() {
        let at = known.iter().position(|known| *known == open);
        known.remove(at.unwrap_or_else(|| panic!("{open} is left; before: {before:?}")));
    }
    for volume in volumes {
        host.podman.done(&["volume", "rm", volume]);
    }
    host.site.settled(&[]);
}

fn create(place: &Place, volume: &str) {
    let (status, said) = place.service.create(volume, &["type=job"]);
    assert_eq!(status, 201, "{said}");
}

/// Runs a container to its end, and removes it.
fn run(place: &Place, name: &str, volume: &str, plan: &Plan) {
    let podman = &place.host.podman;
    let script = plan.script();
    if let End::Exit(code) = plan.end {
        let mount = format!("{volume}:/job:rslave");
        let head = ["run", "--rm", "--name", name, "-v", &mount];
        let tail = [podman.image.as_str(), "sh", "-c", &script];
        let ran = podman.outcome(&[&head[..], &tail].concat());
        assert_eq!(ran.status, i32::from(code), "{ran:?}");
        return;
    }
    let api = Api::new(&place.service.socket);
    let container = json!({
        "name": name,
        "image": podman.image,
        "command": ["sh", "-c", script],
        "volumes": [{"Name": volume, "Dest": "/job", "Options": ["rslave"]}],
    });
    place.runtime.block_on(async {
        let id = api.create(&container).await.unwrap();
        api.start(&id).await.unwrap();
    });
    thread::sleep(plan.after);
    match plan.end {
        End::Exit(_) | End::Kill => place.runtime.block_on(api.signal(name, "KILL")).unwrap(),
        End::Stop => drop(podman.done(&["stop", "--time", "0", name])),
        End::Remove | End::RemoveVolume => {
            podman.done(&["rm", "--force", "--time", "0", name]);
        }
    }
    place.runtime.block_on(async {
        api.wait(name).await.unwrap();
        api.remove(name).await.unwrap();
        if let End::RemoveVolume = plan.end {
            api.remove_volume(volume).await.unwrap();
        }
    });
    if let End::RemoveVolume = plan.end {
        create(place, volume);
    }
}

fn below_mount_dir() -> usize {
    let table = lvm_cache_friend::mount::table().unwrap();
    let below = |at: &Path| at.starts_with(MOUNT_DIR) && at != Path::new(MOUNT_DIR);
    table.iter().filter(|mount| below(&mount.at)).count()
}
