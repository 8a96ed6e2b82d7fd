// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections: accepted, bounded in number and in idleness, and let go at the end.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::Peer;

/// How long a connection may stay without a whole request header: at its
/// beginning, and between two requests. Podman makes a connection a command;
/// dockerd keeps some, and takes a new one when an idle one was closed.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection may take from its beginning to its end where any user may connect: an answer
/// that is not read would hold it for ever.
pub const PUBLIC_LIFETIME: Duration = Duration::from_secs(60);

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
        Ok((TokioIo::new(stream), Peer::default()))
    }
}

/// How many connections there may be at once, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Beyond it, the oldest that waits for its client's request makes place for a new one.
    pub connections: usize,
    /// `None`: as long as each request's header comes in time.
    pub lifetime: Option<Duration>,
}

/// The connections that are open, in the order in which they were made.
#[derive(Debug, Default)]
struct Open(Mutex<BTreeMap<u64, (Arc<AtomicUsize>, AbortHandle)>>);

impl Open {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (Arc<AtomicUsize>, AbortHandle)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the oldest connection without a request that is worked on.
    fn close_idle(&self) {
        let mut open = self.lock();
        let mut all = open.iter();
        let idle = all.find(|(_, (requests, _))| requests.load(Ordering::Relaxed) == 0);
        if let Some((&number, (_, connection))) = idle {
            connection.abort();
            open.remove(&number);
        }
    }
}

/// Serves `router` on `listener` until `stop`, then takes no more connections and
/// returns once those that are open have been answered. Dropping the future
/// gives up on them.
pub async fn serve(
    listener: impl Listener,
    router: Router,
    limits: Limits,
    stop: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let open = Arc::new(Open::default());
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT);

    let router = TowerToHyperService::new(router);
    let accept = async {
        for number in 0.. {
            let (stream, peer) = accepted(&listener).await;
            if places.available_permits() == 0 {
                open.close_idle();
            }
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .expect("nobody closes the semaphore");
            // As an extension of each request: a layer would copy the whole router for each connection.
            let router = router.clone();
            let requests = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&requests);
            let service = service_fn(move |mut request| {
                request.extensions_mut().insert(peer);
                let answer = router.call(request);
                let under_way = UnderWay::new(&counted);
                async move {
                    let answer = answer.await;
                    drop(under_way);
                    answer
                }
            });
            let connection = graceful.watch(http.serve_connection(stream, service));
            let ended = Arc::clone(&open);
            // Held, as it could have ended before it is noted.
            let mut all = open.lock();
            let task = tokio::spawn(async move {
                let connection = async {
                    // What goes wrong here is the client's: it is gone, silent, or no HTTP.
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "connection ended early");
                    }
                };
                match limits.lifetime {
                    Some(lifetime) => drop(timeout(lifetime, connection).await),
                    None => connection.await,
                }
                ended.lock().remove(&number);
                drop(place);
            });
            all.insert(number, (requests, task.abort_handle()));
        }
    };
    tokio::select! {
        () = accept => {}
        () = stop => {}
    }
    drop(listener);
    graceful.shutdown().await;
}

/// A request that is worked on, until this is dropped.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn new(requests: &Arc<AtomicUsize>) -> Self {
        requests.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(requests))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
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

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn silent_clients_keep_no_other_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "served" }));
        let limits = Limits {
            connections: 2,
            lifetime: None,
        };
        let serving = tokio::spawn(serve(listener, router, limits, std::future::pending()));
        let mut silent = Vec::new();
        for begun in ["", "GET / HT", ""] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(begun.as_bytes()).await.unwrap();
            silent.push(stream);
        }
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut answer = String::new();
        // Far less than a silent one may stay.
        timeout(HEADER_TIMEOUT / 2, client.read_to_string(&mut answer))
            .await
            .expect("a place")
            .unwrap();
        assert!(answer.ends_with("served"), "{answer}");
        // The oldest made place.
        assert_eq!(silent[0].read(&mut [0]).await.unwrap_or(0), 0);
        serving.abort();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_client_that_reads_nothing_is_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let much = || async { "x".repeat(64 << 20) };
        let router = Router::new().route("/", get(much));
        let limits = Limits {
            connections: 1,
            lifetime: Some(Duration::from_millis(50)),
        };
        let serving = tokio::spawn(serve(listener, router, limits, std::future::pending()));
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        client.write_all(request).await.unwrap();
        // Its place is free again, though it still has its connection.
        let mut other = TcpStream::connect(address).await.unwrap();
        other.write_all(request).await.unwrap();
        assert_eq!(other.read(&mut [0]).await.unwrap(), 1);
        drop(client);
        serving.abort();
    }
}
