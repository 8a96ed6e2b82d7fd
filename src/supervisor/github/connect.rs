// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How GitHub's hosts are reached: with TLS, and through a proxy where the environment has one.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::uri::Scheme;
use axum::http::{Uri, header, request};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tower_service::Service;

use super::answer::{Answer, GitHubError};
use crate::text::printable;

/// For a connection, and for a proxy's to the host behind it.
const CONNECT: Duration = Duration::from_secs(10);

/// "All API requests must include a valid User-Agent header", with the application's name.
const USER_AGENT: &str = concat!("lvm-cache-friend/", env!("CARGO_PKG_VERSION"));

/// Longest answer, in bytes. A page of 100 runners has some 60 KiB.
const MAX_ANSWER: usize = 8 << 20;

type AnyError = Box<dyn Error + Send + Sync>;

/// Makes connections, as `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` say, in either case, with curl's meaning.
#[derive(Clone)]
pub(super) struct Connector(HttpsConnector<Tcp>);

impl Connector {
    /// For a GitHub whose API is there.
    pub(super) fn new(api: &str) -> Result<Self, String> {
        let proxies = Arc::new(Matcher::from_env());
        let api: Uri = api.parse().map_err(|e| format!("{api}: {e}"))?;
        let proxy = proxies.intercept(&api);
        // Anything else would be spoken to without TLS, or in another protocol.
        if let Some(scheme) = proxy.and_then(|proxy| proxy.uri().scheme().cloned())
            && scheme != Scheme::HTTP
        {
            return Err(format!(
                "HTTPS_PROXY: {scheme}:// is not supported: http://HOST:PORT is"
            ));
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let provider = rustls::crypto::ring::default_provider();
        let tls = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(provider)
            .map_err(|e| format!("the system's certificates: {e}"))?
            .https_or_http()
            .enable_http1()
            .wrap_connector(Tcp { proxies, tcp });
        Ok(Self(tls))
    }

    /// A client of whichever host a request names.
    pub(super) fn client(&self) -> Client {
        Client(legacy::Client::builder(TokioExecutor::new()).build(self.0.clone()))
    }
}

/// Sends requests.
pub(super) struct Client(legacy::Client<HttpsConnector<Tcp>, Full<Bytes>>);

impl Client {
    /// The whole answer to a request, of whatever status. `what` is its method and path, for messages.
    ///
    /// # Errors
    /// When it is no request, or there is no whole answer within `limit`.
    pub(super) async fn send(
        &self,
        what: String,
        request: request::Builder,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Answer, GitHubError> {
        let away = |problem: &str| GitHubError::Away {
            what: what.clone(),
            problem: printable(problem),
        };
        let request = request.header(header::USER_AGENT, USER_AGENT);
        let request = request.body(Full::new(body.into()));
        let request = request.map_err(|e| away(&e.to_string()))?;
        let whole = async {
            let response = self.0.request(request).await;
            let (parts, body) = response.map_err(|e| away(&causes(&e)))?.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            let body = body.map_err(|e| away(&causes(&*e)))?;
            Ok(Answer {
                what: what.clone(),
                status: parts.status,
                headers: parts.headers,
                body: body.to_bytes(),
            })
        };
        let answer = tokio::time::timeout(limit, whole).await;
        answer.unwrap_or_else(|_| {
            Err(away(&format!(
                "no whole answer within {} s",
                limit.as_secs()
            )))
        })
    }
}

/// An error and what it is due to, in one line.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut texts = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}

/// Connections without TLS yet: to a host, or to what a proxy has connected to it.
#[derive(Clone)]
pub(super) struct Tcp {
    proxies: Arc<Matcher>,
    tcp: HttpConnector,
}

impl Service<Uri> for Tcp {
    type Response = TokioIo<TcpStream>;
    type Error = AnyError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, AnyError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), AnyError>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        // What has no TLS is on this machine.
        let secured = to.scheme() == Some(&Scheme::HTTPS);
        let proxy = self.proxies.intercept(&to).filter(|_| secured);
        let mut tcp = self.tcp.clone();
        let connecting = async move {
            let Some(proxy) = proxy else {
                return Ok(tcp.call(to).await?);
            };
            let mut tunnel = Tunnel::new(proxy.uri().clone(), tcp);
            if let Some(credentials) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(credentials.clone());
            }
            let connected = tunnel.call(to).await;
            connected.map_err(|error| {
                let host = proxy.uri().host().unwrap_or_default();
                let cause = error.source().map_or(String::new(), |e| format!(": {e}"));
                format!("the proxy {host}: {error}{cause}").into()
            })
        };
        Box::pin(async move {
            let connected = tokio::time::timeout(CONNECT, connecting).await;
            connected.unwrap_or_else(|_| Err("no connection within 10 s".into()))
        })
    }
}
