// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor as a program: pools brought up together, told what to do, and let go.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::config::{Size, Supervise};
use super::control;
use super::github::{GitHub, GitHubError};
use super::listener::listen;
use super::podman::Podman;
use super::pool::{Orders, Worker};
use super::slot::GENTLE;
use crate::config::Settings;
use crate::http::server;
use crate::http::socket::{Listening, SocketError};

/// How long stopping at once may take: what is left then, the next start removes.
const STOP: Duration = Duration::from_secs(GENTLE + 30);

/// The supervisor could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// A pool's GitHub cannot be asked.
    #[error("pool {pool}: {source}")]
    GitHub {
        /// The pool.
        pool: String,
        /// Why.
        source: GitHubError,
    },
    /// The socket could not be had, or another supervisor runs.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn runtime() -> Result<tokio::runtime::Runtime, SuperviseError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| SuperviseError::Io {
            what: "starting the runtime",
            source,
        })
}

fn workers(settings: &Settings, supervise: &Supervise) -> Result<Vec<Arc<Worker>>, SuperviseError> {
    let pools = supervise.pools.iter();
    pools
        .map(|pool| {
            let github = GitHub::new(&pool.url, pool.api.as_deref(), &pool.auth);
            let github = github.map_err(|source| SuperviseError::GitHub {
                pool: pool.name.clone(),
                source,
            })?;
            let podman = Podman::new(&supervise.podman_socket);
            Ok(Arc::new(Worker::new(
                pool.clone(),
                github,
                podman,
                settings.socket.clone(),
                supervise.control_socket.with_extension("d"),
                supervise.control_socket.with_extension("jobs"),
            )))
        })
        .collect()
}

/// Has the kernel write no core dump of this process, which holds secrets, and let no other user's process look into it.
///
/// # Errors
/// What the kernel says.
pub fn keep_out_of_dumps() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // A dump that goes to a program (core_pattern) is written whatever the limit is, but for this.
    Ok(prctl::set_dumpable(false)?)
}

/// Looks whether the supervisor could be brought up with these settings: secrets are read, nobody is asked.
///
/// # Errors
/// See [`SuperviseError`].
pub fn check(settings: &Settings, supervise: &Supervise) -> Result<(), SuperviseError> {
    runtime()?.block_on(async { workers(settings, supervise).map(drop) })
}

/// Runs until it was told to end: by SIGTERM or SIGINT, once the jobs that run have ended; by a second
/// one, at once.
///
/// # Errors
/// See [`SuperviseError`].
pub fn run(settings: &Settings, supervise: &Supervise) -> Result<(), SuperviseError> {
    let most = server::raise_limits();
    let listening = Listening::open(&supervise.control_socket, 0)?;
    let (listener, ours) = listening.into_parts();
    let runtime = runtime()?;
    let result = runtime.block_on(live(settings, supervise, listener, most));
    runtime.shutdown_background();
    remove(ours.as_deref());
    result
}

fn remove(socket: Option<&Path>) {
    if let Some(socket) = socket
        && let Err(error) = std::fs::remove_file(socket)
    {
        warn!(socket = %socket.display(), %error, "cannot remove the socket");
    }
}

async fn live(
    settings: &Settings,
    supervise: &Supervise,
    listener: std::os::unix::net::UnixListener,
    most: usize,
) -> Result<(), SuperviseError> {
    let doing = |what: &'static str| move |source| SuperviseError::Io { what, source };
    let terminate = signal(SignalKind::terminate()).map_err(doing("listening for signals"))?;
    let interrupt = signal(SignalKind::interrupt()).map_err(doing("listening for signals"))?;
    let listener = UnixListener::from_std(listener).map_err(doing("listening"))?;
    let workers = workers(settings, supervise)?;
    let listeners = start(supervise, &workers);
    // What the end was asked for with, on the socket.
    let asked = watch::Sender::new(Orders::Run);
    let router = control::router(workers.clone(), asked.clone());
    tokio::spawn(control::report(workers.clone()));
    let served = tokio::spawn(server::serve(
        listener,
        router,
        server::Limits {
            connections: most,
            lifetime: None,
        },
        std::future::pending(),
    ));
    let slots: usize = workers.iter().map(|worker| worker.pool.slots()).sum();
    notify(&[
        NotifyState::Ready,
        NotifyState::Status(&format!("{slots} slots")),
    ]);
    info!(pools = workers.len(), slots, "supervising");
    until_done(supervise, &workers, terminate, interrupt, &asked).await;
    for listener in listeners {
        let _ = tokio::time::timeout(Duration::from_secs(5), listener).await;
    }
    served.abort();
    Ok(())
}

/// Has each pool work: its slots, its images and its jobs, and what asks scale sets for jobs, which ends when the pool
/// is let go.
fn start(supervise: &Supervise, workers: &[Arc<Worker>]) -> Vec<JoinHandle<()>> {
    for worker in workers {
        tokio::spawn(Arc::clone(worker).find());
        tokio::spawn(Arc::clone(worker).watch_image());
        tokio::spawn(Arc::clone(worker).admit_jobs());
        for slot in 0..worker.pool.slots() {
            let worker = Arc::clone(worker);
            tokio::spawn(async move { worker.work(slot).await });
        }
    }
    let listeners = workers.iter().filter_map(|worker| match &worker.pool.size {
        Size::ScaleSet(set) => {
            let (worker, set) = (Arc::clone(worker), set.clone());
            let kept = supervise.control_socket.with_extension("sessions");
            let kept = kept.join(&worker.pool.name);
            Some(tokio::spawn(
                async move { listen(&worker, &set, kept).await },
            ))
        }
        Size::Fixed(_) => None,
    });
    listeners.collect()
}

/// Passes on to the pools what signals and the socket ask for, until nothing is left to do or that takes too long.
async fn until_done(
    supervise: &Supervise,
    workers: &[Arc<Worker>],
    mut terminate: Signal,
    mut interrupt: Signal,
    asked: &watch::Sender<Orders>,
) {
    let mut told = asked.subscribe();
    let mut orders = Orders::Run;
    let mut bound = None;
    loop {
        let done = async {
            for worker in workers {
                worker.done().await;
            }
        };
        let late = async {
            match bound {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let next = tokio::select! {
            _ = terminate.recv() => if orders == Orders::Drain { Orders::Stop } else { Orders::Drain },
            _ = interrupt.recv() => if orders == Orders::Drain { Orders::Stop } else { Orders::Drain },
            _ = told.changed() => *told.borrow_and_update(),
            () = done, if orders >= Orders::Drain => break,
            () = late => break,
        };
        if next <= orders {
            continue;
        }
        orders = next;
        let (time, what) = if orders == Orders::Stop {
            (STOP, "ending all runners")
        } else {
            (supervise.drain_timeout, "draining: no new jobs")
        };
        bound = Some(Instant::now() + time);
        info!(seconds = time.as_secs(), "{what}");
        notify(&[NotifyState::Stopping]);
        for worker in workers {
            worker.orders.send_replace(orders);
            worker.poke();
        }
    }
    if workers.iter().all(|worker| worker.is_empty()) {
        info!("nothing left to do");
    } else {
        warn!("stopped with work left, which the next start takes up");
    }
}

fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(false, state) {
        warn!(%error, "cannot notify systemd");
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::getrlimit;

    use super::*;

    #[test]
    fn no_core_dump_is_written_to_a_file_or_a_program() {
        keep_out_of_dumps().expect("allowed");
        let limits = getrlimit(Resource::RLIMIT_CORE).expect("readable");
        assert_eq!(limits, (0, 0));
        assert!(!prctl::get_dumpable().expect("readable"));
    }
}
