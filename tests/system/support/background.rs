// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers of tests, which live as long as the test's process.

use std::future::Future;
use std::net::SocketAddr;
use std::thread;

/// Has a future run on a thread and a runtime of its own.
pub fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(future);
    });
}

/// A port of the loopback device, to be taken over by Tokio.
pub fn listener() -> (std::net::TcpListener, SocketAddr) {
    let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Has a router answer there.
pub fn serve(listener: std::net::TcpListener, router: axum::Router) {
    spawn(async {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        axum::serve(listener, router).await.unwrap();
    });
}
