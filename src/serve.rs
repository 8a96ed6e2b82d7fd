// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon: engine and socket brought up together, and down again.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::oneshot;

use crate::commands::Failure;
use crate::config::{MOUNT_DIR_MODE, Settings, StoreConfig};
use crate::docker;
use crate::engine::{self, DockerAsk, Engine, EngineError, JobSocket};
use crate::http::server;
use crate::http::socket::{Listening, Lock, SocketError, make_dir};
use crate::job;
use crate::plugin;
use crate::selinux;
use crate::status;
use crate::storage::StoreError;
use crate::{cli, logging};

/// How long a daemon that starts waits for `gc` and `remove`, which hold the store's lock for a commit or two; and how often
/// it looks.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);
const COMMAND_POLL: Duration = Duration::from_millis(20);

/// The daemon could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A setting cannot be honoured.
    #[error("{0}")]
    Setting(String),
    /// The socket or a lock could not be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn doing(what: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::Io { what, source }
}

/// [`StoreConfig::lock`], for a daemon that starts: a command that changes the store in its stead is waited for.
fn await_store(store: &StoreConfig) -> Result<Lock, SocketError> {
    let until = Instant::now() + COMMAND_PATIENCE;
    let mut waits = false;
    loop {
        match store.lock() {
            Err(SocketError::Locked(path)) if Instant::now() < until => {
                if !waits {
                    tracing::info!(lock = %path.display(), "waiting for a command that changes the store now, or another daemon");
                    waits = true;
                }
                std::thread::sleep(COMMAND_POLL);
            }
            done => return done,
        }
    }
}

/// Lets none but root and the plugin's group into the directory that all volumes are mounted in: what is inside has the modes
/// that jobs give it. OCI runtimes open what they bind as root; one that a user runs without root does as that user, without the
/// group: [`Engine::let_pass`].
fn close_to_others(dir: &Path, gid: u32) -> io::Result<()> {
    // No other user's at any moment, whatever it was before.
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    chown(dir, Some(0), Some(gid))?;
    std::fs::set_permissions(dir, Permissions::from_mode(MOUNT_DIR_MODE))
}

/// `serve`.
///
/// # Errors
/// When the daemon cannot be brought up.
pub fn command(config: &Path, args: &cli::Serve) -> Result<(), Failure> {
    let settings = Settings::load(config)?;
    logging::start(args.log_level.unwrap_or(settings.log_level)).map_err(Failure::Usage)?;
    run(&settings).map_err(|error| Failure::Failed(error.to_string()))
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot be brought up.
fn run(settings: &Settings) -> Result<(), ServeError> {
    let max_connections = server::raise_limits();
    let gid = settings.socket_gid().map_err(ServeError::Setting)?;
    selinux::begin(&settings.selinux_context)
        .map_err(|error| ServeError::Setting(error.to_string()))?;
    make_dir(&settings.mount_dir)?;
    // A daemon's alone, so this tells of another one at once.
    let _mount_lock = Lock::existing(&settings.mount_dir)?;
    let _store_lock = await_store(&settings.store)?;
    close_to_others(&settings.mount_dir, gid)
        .map_err(doing("closing the mount directory to other users"))?;
    // Before the engine, which may have much to recover: a client that connects
    // meanwhile waits instead of being turned away.
    let (listener, ours) = Listening::open(&settings.socket, gid)?.into_parts();

    // One thread: what blocks has threads of its own, and an idle daemon none.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(
            plugin::MAX_WORK + plugin::UNMOUNT_THREADS + job::server::MAX_WORK + status::THREADS,
        )
        .build()
        .map_err(doing("starting the runtime"))?;
    let result = runtime.block_on(live(settings, listener, max_connections));
    // Threads that are stuck in the kernel must not keep the process.
    runtime.shutdown_background();
    if let Some(path) = ours
        && let Err(error) = std::fs::remove_file(&path)
    {
        tracing::warn!(socket = %path.display(), %error, "cannot remove the socket");
    }
    result
}

async fn live(
    settings: &Settings,
    listener: std::os::unix::net::UnixListener,
    max_connections: usize,
) -> Result<(), ServeError> {
    let mut signals = Signals::new().map_err(doing("listening for signals"))?;
    let listener = UnixListener::from_std(listener).map_err(doing("listening"))?;

    let (jobs, sockets) = mpsc::unbounded_channel();
    let (asks, asked) = mpsc::unbounded_channel();
    let docker = settings.docker_socket.as_ref().map(|_| asks);
    let started = tokio::task::spawn_blocking({
        let settings = settings.clone();
        move || start(&settings, jobs, docker)
    });
    let engine = tokio::select! {
        started = started => match started {
            Ok(engine) => engine?,
            Err(panic) => return Err(doing("starting the engine")(io::Error::other(panic))),
        },
        // Recovery is all or nothing at every step: the next start takes it up.
        name = signals.next() => {
            tracing::info!("{name} while starting: stopped");
            return Ok(());
        }
    };

    tokio::spawn(job::server::serve(
        Arc::clone(&engine),
        settings.job,
        sockets,
    ));
    if let Some(socket) = &settings.docker_socket {
        tokio::spawn(docker::listen(Arc::clone(&engine), socket.clone(), asked));
    }
    let (stop, stopped) = oneshot::channel();
    let status = status::Status::new(Arc::clone(&engine), settings.supervised);
    let router = plugin::router(Arc::clone(&engine)).merge(status::router(&status));
    let limits = server::Limits {
        connections: max_connections,
        lifetime: None,
    };
    let serving = server::serve(listener, router, limits, async {
        let _ = stopped.await;
    });
    tokio::pin!(serving);
    if let Some(address) = settings.status_address {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                let router = status::public_router(&status);
                let never = std::future::pending();
                let most = server::Limits {
                    connections: status::MAX_CONNECTIONS,
                    lifetime: Some(server::PUBLIC_LIFETIME),
                };
                // Ended with the runtime: nothing is lost with a page.
                tokio::spawn(server::serve(listener, router, most, never));
                tracing::info!(%address, "status page and metrics");
            }
            // Caches are served all the same.
            Err(error) => {
                tracing::error!(%address, %error, "cannot listen on status-address: no status page there");
            }
        }
    }
    let volumes = engine.list().len();
    notify(&[
        NotifyState::Ready,
        NotifyState::Status(&format!("Serving {}", settings.store)),
    ]);
    tracing::info!(
        store = %settings.store, socket = %settings.socket.display(), volumes, "serving"
    );

    let name = tokio::select! {
        name = signals.next() => name,
        () = &mut serving => unreachable!("nobody has told it to stop"),
    };
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("Finishing what is under way"),
    ]);
    tracing::info!("{name}: finishing the work under way");
    let bound = settings.stop_timeout;
    let _ = stop.send(());
    let finish = tokio::task::spawn_blocking(move || engine.stop(bound));
    let (_, finished) = tokio::join!(tokio::time::timeout(bound, serving), finish);
    if finished.unwrap_or(false) {
        tracing::info!("stopped; mounted volumes stay mounted");
    } else {
        tracing::warn!(
            seconds = bound.as_secs(),
            "stopped with work left undone: the next start takes it up"
        );
    }
    Ok(())
}

fn start(
    settings: &Settings,
    jobs: UnboundedSender<JobSocket>,
    docker: Option<UnboundedSender<DockerAsk>>,
) -> Result<Arc<Engine>, ServeError> {
    let store = settings.store.serve()?;
    Ok(Engine::start(
        store,
        engine::Settings {
            mount_dir: settings.mount_dir.clone(),
            premounted: settings.premounted,
            scratch_size: settings.scratch_size,
            empty_size: settings.empty_size,
            policy: settings.policy.clone(),
            keep_used: settings.keep_used,
            jobs,
            docker,
        },
    )?)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(false, state) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}
