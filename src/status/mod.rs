// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon shows of itself: metrics for Prometheus at `GET /metrics`, and a page for people
//! at `GET /`. On the plugin's socket, and on a loopback port where one is configured.
//!
//! Both are made on the server, for each request, from the store's listing, the engine's memory, and
//! what the supervisor said last; nothing here changes anything. What never happens: a page that waits
//! for a store that is stuck, or for a supervisor, or many of them that keep the store busy.

mod metrics;
mod page;
mod picture;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use serde_json::json;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use crate::api::runners::Report;
use crate::engine::Engine;
use crate::http::answer::{Refusal, ok};
use crate::http::body::Payload;
use crate::plugin::not_a_post;
use crate::storage::Listing;
use crate::storage::hosts::Fleet;

/// How long a page waits for the store.
const PATIENCE: Duration = Duration::from_secs(2);

/// A supervisor that has not been heard of for so long is away. It reports every few seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// The least time from one listing to the next: each is a command of LVM's, which Creates wait for.
const PAUSE: Duration = Duration::from_millis(100);

/// Blocking threads that this needs.
pub const THREADS: usize = 1;

/// Connections at once on the loopback port, where any user of the host may connect.
pub const MAX_CONNECTIONS: usize = 64;

/// No script, nothing from elsewhere, in nobody's frame.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; \
                      base-uri 'none'; form-action 'none'";

/// What is shown, but for the store's listing.
pub struct Status {
    engine: Arc<Engine>,
    /// Whose turn it is to ask the store.
    turn: Arc<Semaphore>,
    /// The configuration has a supervisor.
    supervised: bool,
    /// What that said last, and when.
    report: Mutex<Option<(Instant, Report)>>,
}

/// What is known of the supervisor.
#[derive(Debug, Clone)]
enum Supervisor {
    /// None is configured.
    None,
    /// There should be one, and it was not heard of lately.
    Away,
    /// It said this.
    Says(Report),
}

/// What the store holds.
struct Contents {
    listing: Listing,
    /// Of a fleet: its hosts.
    fleet: Option<Fleet>,
}

/// What is made of that, or of the reason that it is not known, and of the supervisor.
type Maker = fn(&Engine, Result<Contents, String>, &Supervisor) -> String;

/// The two endpoints, and the supervisor's.
pub fn router(status: &Arc<Status>) -> Router {
    let told = Router::new().route("/Friend.Slots", post(told).fallback(not_a_post));
    views().merge(told).with_state(Arc::clone(status))
}

/// The two endpoints for a loopback port.
pub fn public_router(status: &Arc<Status>) -> Router {
    views()
        .with_state(Arc::clone(status))
        .layer(from_fn(only_by_loopback_name))
}

fn views() -> Router<Arc<Status>> {
    Router::new()
        .route("/", get(page).fallback(not_a_get))
        .route("/metrics", get(metrics).fallback(not_a_get))
}

/// Refuses a request that names another host than this one: a web page elsewhere can have its own
/// name resolve to this address, and would then read what its visitor's browser is answered.
async fn only_by_loopback_name(headers: HeaderMap, request: Request, next: Next) -> Response {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    if host.is_none_or(is_loopback_name) {
        return next.run(request).await;
    }
    let why = "this is only served as localhost or a loopback address\n";
    (StatusCode::MISDIRECTED_REQUEST, why).into_response()
}

fn is_loopback_name(host: &str) -> bool {
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn page(State(status): State<Arc<Status>>) -> Response {
    answer("text/html; charset=utf-8", status.made(page::page).await)
}

async fn metrics(State(status): State<Arc<Status>>) -> Response {
    answer(metrics::CONTENT_TYPE, status.made(metrics::text).await)
}

async fn not_a_get() -> Refusal {
    let why = "only GET / (the status page) and GET /metrics are allowed";
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, why)
}

async fn told(State(status): State<Arc<Status>>, body: Payload) -> Result<Response, Refusal> {
    let report = serde_json::from_slice(&body.0)
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.to_string()))?;
    let mut last = status.report.lock().unwrap_or_else(PoisonError::into_inner);
    *last = Some((Instant::now(), report));
    Ok(ok(&json!({})))
}

fn answer(content_type: &'static str, body: String) -> Response {
    let headers: [(HeaderName, HeaderValue); 5] = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ]
    .map(|(name, value)| (name, HeaderValue::from_static(value)));
    (headers, body).into_response()
}

impl Status {
    /// With nothing heard of a supervisor yet.
    #[must_use]
    pub fn new(engine: Arc<Engine>, supervised: bool) -> Arc<Self> {
        Arc::new(Self {
            engine,
            turn: Arc::new(Semaphore::new(1)),
            supervised,
            report: Mutex::new(None),
        })
    }

    fn supervisor(&self) -> Supervisor {
        let last = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((at, report)) if at.elapsed() < SILENCE => Supervisor::Says(report.clone()),
            None if !self.supervised => Supervisor::None,
            _ => Supervisor::Away,
        }
    }

    async fn made(&self, make: Maker) -> String {
        let Ok(Ok(turn)) = timeout(PATIENCE, Arc::clone(&self.turn).acquire_owned()).await else {
            return self.without_store(make);
        };
        let (done, made) = oneshot::channel();
        let (engine, supervisor) = (Arc::clone(&self.engine), self.supervisor());
        tokio::spawn(async move {
            // On a thread of its own, and the making too: the runtime has but one.
            let made = tokio::task::spawn_blocking(move || {
                let contents = engine.listing().and_then(|listing| {
                    let fleet = engine.fleet()?;
                    Ok(Contents { listing, fleet })
                });
                let contents = contents.map_err(|error| error.to_string());
                make(&engine, contents, &supervisor)
            });
            if let Ok(made) = made.await {
                let _ = done.send(made);
            }
            sleep(PAUSE).await;
            drop(turn);
        });
        match timeout(PATIENCE, made).await {
            Ok(Ok(made)) => made,
            _ => self.without_store(make),
        }
    }

    fn without_store(&self, make: Maker) -> String {
        let why = format!("the store did not answer within {} s", PATIENCE.as_secs());
        make(&self.engine, Err(why), &self.supervisor())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_host() {
        for (host, ours) in [
            ("localhost", true),
            ("localhost:9469", true),
            ("127.0.0.1:9469", true),
            ("127.8.9.1", true),
            ("[::1]:9469", true),
            ("[::1]", true),
            ("evil.example", false),
            ("evil.example:9469", false),
            ("192.168.0.7:9469", false),
            ("localhost.evil.example", false),
            ("", false),
        ] {
            assert_eq!(is_loopback_name(host), ours, "{host}");
        }
    }
}
