// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Places where a test can have the daemon die, as `kill -9` would have it.
//!
//! Built in only with the feature `failpoints`. The variable
//! `LVM_CACHE_FRIEND_FAILPOINT` names the place, as in `publish.3`, or
//! `publish.3:2` for the second time that it is reached.

/// Every place, in the order in which a volume's life reaches them.
pub const ALL: [&str; 25] = [
    "create.1",
    "create.2",
    "create.3",
    "create.4",
    "mount.1",
    "mount.2",
    "mount.3",
    "mount.4",
    "fit.1",
    "fit.2",
    "fit.3",
    "unmount.1",
    "unmount.2",
    "unmount.3",
    "publish.1",
    "publish.2",
    "publish.3",
    "publish.4",
    "refresh.1",
    "refresh.2",
    "refresh.3",
    "refresh.4",
    "remove.1",
    "remove.2",
    "remove.3",
];

/// Every place in the life of a supervisor's slot: before each action, and after it.
pub const SUPERVISOR: [&str; 19] = [
    "register.1",
    "register.2",
    "ready.1",
    "ready.2",
    "ready.3",
    "container.1",
    "container.2",
    "start.1",
    "start.2",
    "judge.1",
    "judge.2",
    "judge.3",
    "end.1",
    "end.2",
    "clear.1",
    "clear.2",
    "clear.3",
    "look.1",
    "look.2",
];

/// Every place between what a scale set tells of a job and the daemon's knowing whose it is.
pub const SCALE_SET: [&str; 6] = [
    "told.1", "admit.1", "admit.2", "admit.3", "admit.4", "admit.5",
];

/// Dies here if the environment says so.
#[cfg(feature = "failpoints")]
pub fn reach(stage: &str, step: u32) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static CHOSEN: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static REACHED: AtomicU32 = AtomicU32::new(0);

    let here = format!("{stage}.{step}");
    let known = |name: &str| {
        [&ALL[..], &SUPERVISOR, &SCALE_SET]
            .iter()
            .any(|list| list.contains(&name))
    };
    assert!(known(&here), "{here} is not in the list");
    let chosen = CHOSEN.get_or_init(|| {
        let text = std::env::var("LVM_CACHE_FRIEND_FAILPOINT").ok()?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
        assert!(known(name), "there is no failpoint {name}");
        Some((
            name.to_owned(),
            count.parse().expect("a count after the colon"),
        ))
    });
    let Some((name, count)) = chosen else { return };
    if *name == here && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == *count {
        let _ = nix::sys::signal::raise(nix::sys::signal::SIGKILL);
    }
}

/// Nothing: the feature `failpoints` is off.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn reach(_stage: &str, _step: u32) {}
