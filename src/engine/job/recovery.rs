// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A job volume whose lease goes on after a restart of the daemon.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use rustix::fs::ResolveFlags;
use rustix::io::Errno;
use tracing::{info, warn};

use super::dir::open_beneath;
use crate::cache::late_path::LatePath;
use crate::engine::survey::{SeenLate, fs_of, is_scratch};
use crate::engine::volume::{Backing, Job, Late, Lease, OpenFs, Volume, may_publish};
use crate::engine::{Engine, Verdict, lock};
use crate::mount::{self, MountPoint, Mounted};

impl Engine {
    /// Takes a job volume's lease up again after a restart, with those of `mounts` that are in it.
    /// What goes on leaves `seen`.
    pub(in crate::engine) fn go_on_job(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        at: &MountPoint,
        mounts: &[MountPoint],
        seen: &mut Vec<SeenLate>,
    ) -> io::Result<Arc<Job>> {
        let dir = Mounted::in_place(&at.at)?;
        if dir.device_number()? != at.device {
            return Err(Errno::STALE.into());
        }
        let job = self.job(volume, dir);
        for m in mounts {
            let Ok(inside) = m.at.strip_prefix(&at.at) else {
                continue;
            };
            let found = seen.iter().position(|seen| seen.device == m.device);
            if found.is_none() && !is_scratch(m) {
                continue;
            }
            let path = inside.to_str().ok_or_else(|| "not UTF-8".to_owned());
            let went_on = path
                .and_then(|path| LatePath::parse(path, &[]))
                .and_then(|path| {
                    let late = self.go_on_late(&job, &path, m, found.map(|at| &seen[at]));
                    Ok((path, late.map_err(|e| e.to_string())?))
                });
            match went_on {
                Ok((path, late)) => {
                    info!(volume = job.name(), %path, "its mount goes on");
                    lock(&job.now).mounts.insert(path, Some(late));
                    found.map(|at| seen.swap_remove(at));
                }
                Err(error) => {
                    warn!(volume = job.name(), at = %m.at.display(), error, "its mount cannot be taken hold of: it is not published");
                }
            }
        }
        Ok(job)
    }

    fn go_on_late(
        self: &Arc<Self>,
        job: &Arc<Job>,
        path: &LatePath,
        m: &MountPoint,
        seen: Option<&SeenLate>,
    ) -> io::Result<Late> {
        // The job may have moved what is around the mount since the table was read.
        let place = open_beneath(job.dir.root(), path.as_str(), ResolveFlags::empty())?;
        if mount::id_of(place.as_fd())? != m.id {
            return Err(Errno::STALE.into());
        }
        let mounted = Mounted::clone_of(place.as_fd())?;
        let (spec, backing, mark) = match seen {
            Some(seen) => {
                let mark = (may_publish(&seen.spec) && seen.making)
                    .then(|| self.mark_leased(seen.lv.clone(), seen.failed));
                let backing = Backing::Lv {
                    copy: seen.copy(),
                    open: OpenFs {
                        mounted,
                        fs: fs_of(m),
                    },
                    baseline: None,
                };
                if seen.failed {
                    let mut now = lock(&job.now);
                    now.verdict = Verdict::Failure;
                    now.failed.insert(seen.lv.clone());
                }
                (seen.spec.clone(), backing, mark)
            }
            None => {
                let spec = job.volume.spec.of_request(&[], &[]).unwrap_or_default();
                (spec, Backing::Scratch(mounted), None)
            }
        };
        Ok(Late {
            volume: Arc::new(Volume::late_of(&job.volume, path, spec)),
            lease: Lease {
                mark,
                ..Lease::new(backing)
            },
            place,
        })
    }
}
