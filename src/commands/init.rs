// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `init`: storage prepared, once, and the configuration written.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use super::{Failure, failed, print};
use crate::cache::names::LvName;
use crate::cache::spec::FsType;
use crate::cache::units::Bytes;
use crate::cli;
use crate::config::{self, Lvm, RUN_DIR, Rbd, Reflink, StoreConfig};
use crate::logging::{self, LogLevel};
use crate::storage::{lvm, reflink};

/// What was asked for.
enum Wanted {
    Vg(LvName, Bytes),
    Loop(PathBuf, Bytes),
    Reflink(PathBuf),
    Rbd(Rbd),
}

impl Wanted {
    fn new(args: &cli::Init) -> Result<Self, Failure> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(failed(path.display()));
        match (&args.vg, &args.loop_file, &args.reflink, &args.rbd, args.size) {
            (Some(vg), None, None, None, Some(size)) => Ok(Self::Vg(vg.clone(), size)),
            (None, Some(file), None, None, Some(size)) => Ok(Self::Loop(absolute(file)?, size)),
            (None, None, Some(dir), None, None) => Ok(Self::Reflink(absolute(dir)?)),
            (None, None, None, Some(pool), None) => {
                let mut rbd = Rbd::new(pool.clone());
                if let Some(user) = &args.ceph_user {
                    rbd.user = user.clone();
                }
                if let Some(conf) = &args.ceph_conf {
                    rbd.conf = Some(absolute(conf)?);
                }
                Ok(Self::Rbd(rbd))
            }
            _ => Err(Failure::Usage(
                "one of --vg VG --size SIZE, --loop FILE --size SIZE, --reflink DIR and --rbd POOL[/NAMESPACE] is needed"
                    .into(),
            )),
        }
    }

    fn is(&self, store: &StoreConfig, pool: &LvName) -> bool {
        match (self, store) {
            (Self::Vg(vg, _), StoreConfig::Lvm(lvm)) => {
                lvm.loop_file.is_none() && lvm.vg == *vg && lvm.pool == *pool
            }
            (Self::Loop(file, _), StoreConfig::Lvm(lvm)) => lvm.loop_file.as_ref() == Some(file),
            (Self::Reflink(dir), StoreConfig::Reflink(reflink)) => reflink.dir == *dir,
            (Self::Rbd(wanted), StoreConfig::Rbd(rbd)) => {
                // What the host is called is set in the file alone.
                (&wanted.pool, &wanted.user, &wanted.conf) == (&rbd.pool, &rbd.user, &rbd.conf)
            }
            _ => false,
        }
    }
}

/// `init`.
///
/// # Errors
/// When storage cannot be prepared; the configuration is not written then.
pub fn run(config: &Path, args: &cli::Init) -> Result<(), Failure> {
    logging::start(LogLevel::Warn).map_err(Failure::Usage)?;
    let (wanted, pool, base_size) = (Wanted::new(args)?, &args.pool, args.base_size);
    let smallest = FsType::Xfs.min_size();
    if base_size < smallest {
        return Err(Failure::Usage(format!(
            "--base-size {base_size}: an XFS has at least {smallest}"
        )));
    }
    let configured = config::existing(config)?;
    if let Some(settings) = &configured
        && !wanted.is(&settings.store, pool)
    {
        return Err(Failure::Failed(format!(
            "{}: configures another store already ({}); to start over, move that file away first",
            config.display(),
            settings.store
        )));
    }

    let said = Cell::new(false);
    let mut say = |text: String| {
        said.set(true);
        // A reader that is gone does not stop what is half done.
        let _ = print(&format!("{text}\n"));
    };
    let run_dir = Path::new(RUN_DIR);
    let store = match wanted {
        Wanted::Vg(vg, size) => {
            lvm::init(&vg, pool, size, base_size, run_dir, &mut say)?;
            StoreConfig::Lvm(Lvm {
                vg,
                pool: pool.clone(),
                loop_file: None,
            })
        }
        Wanted::Loop(file, size) => {
            let vg = lvm::init_loop(&file, size, pool, base_size, run_dir, &mut say)?;
            StoreConfig::Lvm(Lvm {
                vg,
                pool: pool.clone(),
                loop_file: Some(file),
            })
        }
        Wanted::Reflink(dir) => {
            reflink::init(&dir, base_size)?;
            StoreConfig::Reflink(Reflink { dir })
        }
        Wanted::Rbd(mut rbd) => {
            if let Some(StoreConfig::Rbd(configured)) = configured.as_ref().map(|c| &c.store) {
                rbd = configured.clone();
            }
            rbd.init(base_size, &mut say)?;
            StoreConfig::Rbd(rbd)
        }
    };
    if configured.is_none() {
        config::write(config, &store)?;
        say(format!(
            "wrote {}; `lvm-cache-friend serve` runs the daemon",
            config.display()
        ));
    }
    if !said.get() {
        say(format!("nothing to do: {store} is ready"));
    }
    Ok(())
}
