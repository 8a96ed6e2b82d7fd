// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections: accepted, bounded in number and in idleness, and let go at the end.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::rt::{Read, Write};
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

use super::Peer;

/// How long a connection may stay without a whole request header: at its
/// beginning, and between two requests. Podman makes a connection a command;
/// dockerd keeps some, and takes a new one when an idle one was closed.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Most connections at once, where the descriptors suffice. Those that wait
/// beyond it are in the socket's queue.
const MAX_CONNECTIONS: u64 = 4096;

/// Descriptors kept for everything but connections: two for each mounted volume,
/// and those of the tools that run.
const RESERVED_DESCRIPTORS: u64 = 512;

/// How long to wait when the system lacks what accepting a connection takes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Raises this process's limit of open descriptors as far as it may, and returns
/// how many connections that allows at once.
#[must_use]
pub fn raise_limits() -> usize {
    let descriptors = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() => hard,
        Ok((soft, _)) => soft,
        Err(_) => 1024,
    };
    let free = descriptors.saturating_sub(RESERVED_DESCRIPTORS);
    free.clamp(64, MAX_CONNECTIONS) as usize
}

/// What connections come from.
pub trait Listener {
    /// A connection.
    type Stream: Read + Write + Unpin + Send + 'static;

    /// The next connection, and who made it.
    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Peer)>>;
}

impl Listener for UnixListener {
    type Stream = TokioIo<tokio::net::UnixStream>;

    async fn next(&self) -> io::Result<(Self::Stream, Peer)> {
        let (stream, _) = self.accept().await?;
        let cred = stream.peer_cred().ok();
        let peer = Peer {
            pid: cred.and_then(|cred| cred.pid()),
            uid: cred.map(|cred| cred.uid()),
        };
        Ok((TokioIo::new(stream), peer))
    }
}

impl Listener for TcpListener {
    type Stream = TokioIo<tokio::net::TcpStream>;

    async fn next(&self) -> io::Result<(Self::Stream, Peer)> {
        let (stream, _) = self.accept().await?;
        let peer = Peer {
            pid: None,
            uid: None,
        };
        Ok((TokioIo::new(stream), peer))
    }
}

/// Serves `router` on `listener` until `stop`, then takes no more connections and
/// returns once those that are open have been answered. Dropping the future
/// gives up on them.
pub async fn serve(
    listener: impl Listener,
    router: Router,
    max_connections: usize,
    stop: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(max_connections));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT);

    let router = TowerToHyperService::new(router);
    let accept = async {
        loop {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .expect("nobody closes the semaphore");
            let (stream, peer) = accepted(&listener).await;
            // As an extension of each request: a layer would copy the whole router for each connection.
            let router = router.clone();
            let service = service_fn(move |mut request| {
                request.extensions_mut().insert(peer);
                router.call(request)
            });
            let connection = graceful.watch(http.serve_connection(stream, service));
            tokio::spawn(async move {
                // What goes wrong here is the client's: it is gone, silent, or no HTTP.
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection ended early");
                }
                drop(place);
            });
        }
    };
    tokio::select! {
        () = accept => {}
        () = stop => {}
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn accepted<L: Listener>(listener: &L) -> (L::Stream, Peer) {
    let mut complained = false;
    loop {
        match listener.next().await {
            Ok(accepted) => return accepted,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // EMFILE, ENFILE, ENOMEM: the connection stays in the queue, and trying
            // again at once would spin.
            Err(error) => {
                if !complained {
                    tracing::warn!(%error, "cannot accept connections for now");
                    complained = true;
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
