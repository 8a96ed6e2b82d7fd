// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which processes are in a container, as the kernel tells.
//!
//! A process is in a container if it has that one's mount namespace, or a PID namespace at or below that one's, or a
//! control group at or below that one's. So what `podman exec` starts is in it, and what containers within the
//! container run, whatever namespaces they share with what. A user of the host can make namespaces, but none of
//! these: a PID namespace is a child of its maker's, and a process gets into a control group only by a process that may
//! write to that and to all above, up to the one that it leaves (cgroups(7), "Delegation containment").

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::userns::Ids;

/// A namespace: the device and inode number of its file. Free for another once nothing is in it any more.
type Namespace = (u64, u64);

/// Most PID namespaces, one in the other, that the kernel makes (`MAX_PID_NS_LEVEL` of linux/pid_namespace.h).
const MAX_DEPTH: usize = 32;

/// What is known of a container that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its ids.
    pub ids: Ids,
    mounts: Namespace,
    /// `None`: it has this process's own.
    pids: Option<Namespace>,
    /// Its path in the unified hierarchy; `None` where its name does not tell whose it is.
    cgroup: Option<String>,
}

mod ioctl {
    // linux/nsfs.h
    nix::ioctl_none_bad!(ns_get_parent, nix::request_code_none!(0xb7, 0x2));
}

impl Container {
    /// The container with this id, of which this is a process.
    ///
    /// # Errors
    /// When there is no such process, or what else reading its namespaces says.
    pub fn of_process(id: &str, pid: i32) -> io::Result<Self> {
        let pids = namespace(file_of(pid, "ns/pid"))?;
        Ok(Self {
            ids: Ids::of_process(pid)?,
            mounts: namespace(file_of(pid, "ns/mnt"))?,
            pids: (pids != namespace("/proc/self/ns/pid")?).then_some(pids),
            cgroup: own_cgroup(&cgroup(pid)?, id).map(str::to_owned),
        })
    }

    /// Whether a process is in it. No process that is gone is.
    #[must_use]
    pub fn holds(&self, pid: i32) -> bool {
        namespace(file_of(pid, "ns/mnt")).is_ok_and(|mounts| mounts == self.mounts)
            || self.pids.is_some_and(|pids| is_below(pid, pids))
            || self.cgroup.as_deref().is_some_and(|own| {
                let its = cgroup(pid).unwrap_or_default();
                let below = its.strip_prefix(own);
                below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
    }
}

fn file_of(pid: i32, name: &str) -> String {
    format!("/proc/{pid}/{name}")
}

fn namespace(file: impl AsRef<Path>) -> io::Result<Namespace> {
    let meta = fs::metadata(file)?;
    Ok((meta.dev(), meta.ino()))
}

/// Whether a process's PID namespace is `above`, or one that was made in it.
fn is_below(pid: i32, above: Namespace) -> bool {
    let Ok(mut file) = File::open(file_of(pid, "ns/pid")) else {
        return false;
    };
    for _ in 0..=MAX_DEPTH {
        match file.metadata() {
            Ok(meta) if (meta.dev(), meta.ino()) == above => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
        // SAFETY: NS_GET_PARENT takes no argument.
        let Ok(parent) = (unsafe { ioctl::ns_get_parent(file.as_raw_fd()) }) else {
            // This process's own has none that it may see.
            return false;
        };
        // SAFETY: it gives a new descriptor, which is no other's.
        file = unsafe { OwnedFd::from_raw_fd(parent) }.into();
    }
    false
}

/// A process's path in the unified hierarchy; empty where there is none.
fn cgroup(pid: i32) -> io::Result<String> {
    let text = fs::read_to_string(file_of(pid, "cgroup"))?;
    let unified = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(unified.unwrap_or_default().to_owned())
}

/// The part of the path of a control group that ends in the one that was made for the container, which has its id in its
/// name: `libpod-ID.scope`, `docker-ID.scope`, `libpod-ID` or `ID`. Below that the runtime may have made others.
fn own_cgroup<'a>(path: &'a str, id: &str) -> Option<&'a str> {
    // An id that is as short as a name could be a part of another's.
    if id.len() < 32 {
        return None;
    }
    let at = path.rfind(id)?;
    let end = path[at..].find('/').map_or(path.len(), |end| at + end);
    Some(&path[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2";

    #[test]
    fn control_groups_of_containers() {
        for (path, own) in [
            (
                "/machine.slice/libpod-ID.scope/container",
                Some("/machine.slice/libpod-ID.scope"),
            ),
            (
                "/machine.slice/libpod-ID.scope",
                Some("/machine.slice/libpod-ID.scope"),
            ),
            ("/docker/ID", Some("/docker/ID")),
            (
                "/libpod_parent/libpod-ID/a/b",
                Some("/libpod_parent/libpod-ID"),
            ),
            ("/user.slice/user-7.slice/session-1.scope", None),
            ("/", None),
            ("", None),
        ] {
            let (path, own) = (path.replace("ID", ID), own.map(|own| own.replace("ID", ID)));
            assert_eq!(own_cgroup(&path, ID), own.as_deref());
        }
        assert_eq!(own_cgroup("/user.slice", "user"), None);
    }

    #[test]
    fn a_process_that_is_gone_is_in_none() {
        let own = i32::try_from(std::process::id()).unwrap();
        let own = Container::of_process(ID, own).unwrap();
        assert_eq!(own.pids, None);
        // Above the kernel's most.
        assert!(!own.holds(i32::MAX));
        assert!(Container::of_process(ID, i32::MAX).is_err());
    }
}
