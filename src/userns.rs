// SPDX-License-Identifier: Apache-2.0 OR MIT
//! User namespaces: which ids a process has on this host, and mounts that undo it.
//!
//! A cache holds its files under the ids that they have *inside* a container, so that a file of the
//! user 1000 is the user 1000's in the next container too, whose range of ids is another. An
//! *idmapped* mount does that without any chown (Linux 5.12; XFS from 5.19, tmpfs from 6.3): it
//! takes a user namespace for its table of ids, which need not be one that anybody lives in.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, clone};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::pause;
use serde::{Deserialize, Serialize};

/// Most ranges that the kernel takes (user_namespaces(7)).
const MAX_RANGES: usize = 340;

/// `size` ids in a row, the first of which is `inside` in the namespace and `outside` of it. In JSON as
/// the OCI runtime specification has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    #[serde(rename = "containerID")]
    inside: u32,
    #[serde(rename = "hostID")]
    outside: u32,
    size: u32,
}

/// A table of ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdMap(Vec<Range>);

impl IdMap {
    /// Where every id is itself.
    fn host() -> Self {
        Self(vec![Range {
            inside: 0,
            outside: 0,
            size: u32::MAX,
        }])
    }

    /// Reads a table as /proc/PID/uid_map has it.
    fn parse(text: &str) -> Option<Self> {
        let range = |line: &str| {
            let mut numbers = line.split_whitespace().map(|n| n.parse().ok());
            Some(Range {
                inside: numbers.next()??,
                outside: numbers.next()??,
                size: numbers.next()??,
            })
        };
        text.lines().map(range).collect::<Option<_>>().map(Self)
    }

    /// What `self` is seen from outside of `outer`, in which it was made.
    fn within(&self, outer: &Self) -> Self {
        let mut ranges = Vec::new();
        for own in &self.0 {
            for around in &outer.0 {
                let start = own.outside.max(around.inside);
                let own_end = u64::from(own.outside) + u64::from(own.size);
                let end = own_end.min(u64::from(around.inside) + u64::from(around.size));
                if let Some(size @ 1..) = end.checked_sub(start.into()) {
                    ranges.push(Range {
                        inside: own.inside + (start - own.outside),
                        outside: around.outside + (start - around.inside),
                        size: u32::try_from(size).expect("no longer than either"),
                    });
                }
            }
        }
        Self(ranges)
    }

    /// Whether all that it leads to is an id that `other` leads to.
    fn is_part_of(&self, other: &Self) -> bool {
        self.0.iter().all(|own| {
            other.0.iter().any(|around| {
                let end = |range: &Range| u64::from(range.outside) + u64::from(range.size);
                around.outside <= own.outside && end(own) <= end(around)
            })
        })
    }

    fn outside(&self, inside: u32) -> Option<u32> {
        self.0.iter().find_map(|range| {
            let offset = inside.checked_sub(range.inside)?;
            (offset < range.size).then(|| range.outside.checked_add(offset))?
        })
    }

    /// Whether the kernel would take it, but for ranges that overlap.
    fn is_sound(&self) -> bool {
        let fits = |range: &Range| {
            range.size > 0
                && range.inside.checked_add(range.size).is_some()
                && range.outside.checked_add(range.size).is_some()
        };
        (1..=MAX_RANGES).contains(&self.0.len()) && self.0.iter().all(fits)
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|range| u64::from(range.size)).sum()
    }

    fn lines(&self) -> String {
        let mut text = String::new();
        for Range {
            inside,
            outside,
            size,
        } in &self.0
        {
            let _ = writeln!(text, "{inside} {outside} {size}");
        }
        text
    }
}

/// The tables of a user namespace: of users and of groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    users: IdMap,
    groups: IdMap,
}

impl Ids {
    /// Those of this host: every id is itself.
    #[must_use]
    pub fn host() -> Self {
        Self {
            users: IdMap::host(),
            groups: IdMap::host(),
        }
    }

    /// Those of a process, as this one sees them.
    ///
    /// # Errors
    /// When there is no such process, or what else reading its tables says.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        let table = |name: &str| {
            let text = fs::read_to_string(format!("/proc/{pid}/{name}"))?;
            // Without ranges, the process has no ids yet.
            IdMap::parse(&text)
                .filter(IdMap::is_sound)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, name.to_owned()))
        };
        Ok(Self {
            users: table("uid_map")?,
            groups: table("gid_map")?,
        })
    }

    /// Those of a namespace that somebody in `outer` makes with these tables; without any, its own.
    ///
    /// # Errors
    /// When no namespace can have them.
    pub fn made_in(outer: &Self, users: &IdMap, groups: &IdMap) -> Result<Self, String> {
        if users.0.is_empty() && groups.0.is_empty() {
            return Ok(outer.clone());
        }
        let made = |map: &IdMap, outer: &IdMap| {
            let seen = map.is_sound().then(|| map.within(outer));
            seen.filter(IdMap::is_sound)
                .ok_or_else(|| format!("no user namespace can have these ids: {map:?}"))
        };
        Ok(Self {
            users: made(users, &outer.users)?,
            groups: made(groups, &outer.groups)?,
        })
    }

    /// Whether every id is itself.
    #[must_use]
    pub fn is_host(&self) -> bool {
        *self == Self::host()
    }

    /// Whether all of these ids are among those of `other`.
    #[must_use]
    pub fn are_part_of(&self, other: &Self) -> bool {
        self.users.is_part_of(&other.users) && self.groups.is_part_of(&other.groups)
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.users.count()
    }

    /// What a user and a group inside are outside; `None` where one of them is nobody.
    #[must_use]
    pub fn outside(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        Some((self.users.outside(uid)?, self.groups.outside(gid)?))
    }

    /// A user namespace with these tables, in which nobody lives.
    ///
    /// # Errors
    /// EINVAL where ranges overlap, or what else the kernel says.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        // The kernel makes one for a process only, which then has it for nothing else.
        let mut stack = vec![0; 64 << 10];
        let wait = || {
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            loop {
                pause();
            }
        };
        // SAFETY: the child has its own copy of the memory (no CLONE_VM), in which it calls
        // nothing but prctl(2) and pause(2): no lock, no allocator.
        let child = unsafe {
            clone(
                Box::new(wait),
                &mut stack,
                CloneFlags::CLONE_NEWUSER,
                Some(Signal::SIGCHLD as i32),
            )
        }?;
        let proc = |name: &str| format!("/proc/{child}/{name}");
        let made = fs::write(proc("uid_map"), self.users.lines())
            .and_then(|()| fs::write(proc("gid_map"), self.groups.lines()))
            .and_then(|()| fs::File::open(proc("ns/user")));
        let _ = kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
        Ok(made?.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(ranges: &[(u32, u32, u32)]) -> IdMap {
        let range = |&(inside, outside, size)| Range {
            inside,
            outside,
            size,
        };
        IdMap(ranges.iter().map(range).collect())
    }

    fn ids(ranges: &[(u32, u32, u32)]) -> Ids {
        Ids {
            users: map(ranges),
            groups: map(ranges),
        }
    }

    #[test]
    fn tables_are_read_and_written() {
        let text = "         0       1000          1\n         1     100000      65536\n";
        let read = IdMap::parse(text).unwrap();
        assert_eq!(read, map(&[(0, 1000, 1), (1, 100_000, 65_536)]));
        assert_eq!(IdMap::parse(&read.lines()), Some(read));
        for bad in ["0 0", "0 0 x", "-1 0 1", "0 0 4294967296"] {
            assert_eq!(IdMap::parse(bad), None, "{bad}");
        }
        let json = r#"[{"containerID":0,"hostID":1,"size":2}]"#;
        let read: IdMap = serde_json::from_str(json).unwrap();
        assert_eq!(read, map(&[(0, 1, 2)]));
    }

    #[test]
    fn namespaces_in_namespaces() {
        let rootless = ids(&[(0, 1000, 1), (1, 100_000, 65_536)]);
        let made = |outer: &Ids, ranges: &[(u32, u32, u32)]| {
            Ids::made_in(outer, &map(ranges), &map(ranges))
        };
        // Rootful, with a namespace and without.
        let auto = [(0, 500_000, 1024)];
        assert_eq!(made(&Ids::host(), &auto), Ok(ids(&auto)));
        assert_eq!(made(&Ids::host(), &[]), Ok(Ids::host()));
        assert!(made(&Ids::host(), &[(0, 0, u32::MAX)]).unwrap().is_host());
        // Rootless: Podman's own, keep-id, and tables of it all.
        assert_eq!(made(&rootless, &[]), Ok(rootless.clone()));
        let keep = [(0, 1, 1000), (1000, 0, 1), (1001, 1001, 64_536)];
        let want = [(0, 100_000, 1000), (1000, 1000, 1), (1001, 101_000, 64_536)];
        assert_eq!(made(&rootless, &keep), Ok(ids(&want)));
        let all = [(0, 0, 1), (1, 1, 65_536)];
        assert_eq!(made(&rootless, &all), Ok(rootless.clone()));
        // What it has not itself, nobody in it can have.
        for bad in [(0, 70_000, 1), (0, 0, 0), (u32::MAX, 0, 2)] {
            assert!(made(&rootless, &[bad]).is_err(), "{bad:?}");
        }
        assert!(made(&rootless, &keep).unwrap().are_part_of(&rootless));
        assert!(rootless.are_part_of(&Ids::host()));
        assert!(!Ids::host().are_part_of(&rootless));
        assert_eq!(ids(&want).outside(1000, 0), Some((1000, 100_000)));
        assert_eq!(ids(&want).outside(1000, 70_000), None);
    }

    proptest! {
        #[test]
        fn within_is_one_after_the_other(
            own in prop::collection::vec((0_u32..50, 0_u32..50, 1_u32..20), 1..3),
            outer in prop::collection::vec((0_u32..50, 0_u32..50, 1_u32..20), 1..3),
        ) {
            let (own, outer) = (map(&own), map(&outer));
            let both = own.within(&outer);
            for range in &both.0 {
                for i in [0, range.size - 1] {
                    let (inside, outside) = (range.inside + i, range.outside + i);
                    let all = |map: &IdMap, id: u32| -> Vec<u32> {
                        let ranges = map.0.iter();
                        ranges.filter_map(|r| IdMap(vec![*r]).outside(id)).collect()
                    };
                    let through = all(&own, inside);
                    prop_assert!(through.iter().any(|&id| all(&outer, id).contains(&outside)));
                }
            }
        }
    }
}
