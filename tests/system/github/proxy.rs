// SPDX-License-Identifier: Apache-2.0 OR MIT
//! GitHub behind a proxy: a small one of our own, behind which each host is the stand-in for GitHub, with TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::fake::{Fake, REPOSITORY};
use super::listening::Listening;
use crate::support::background;
use crate::support::command::sh;

/// In the proxy's address; and as it is sent.
const CREDENTIALS: (&str, &str) = ("me:let-me-out", "bWU6bGV0LW1lLW91dA==");

/// What the proxy was asked for.
type Heads = Arc<Mutex<Vec<String>>>;

/// An authority, and a key and a certificate of its for hosts.
fn certificates(dir: &Path, hosts: &str) -> ServerConfig {
    let make = format!(
        "cd {} && openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority 2>&1
        openssl req -new -newkey rsa:2048 -nodes -keyout host.key -out host.csr -subj /CN=host 2>&1
        echo 'subjectAltName={hosts}' >host.ext
        openssl x509 -req -in host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile host.ext -out host.pem 2>&1",
        dir.display()
    );
    sh(&make);
    let chain = CertificateDer::from_pem_file(dir.join("host.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.join("host.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .unwrap()
}

/// Starts the proxy, which connects each host to `behind`; its address.
fn start(tls: ServerConfig, behind: SocketAddr, heads: &Heads) -> SocketAddr {
    let (listener, address) = background::listener();
    let heads = Arc::clone(heads);
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let serve = async move {
        let listener = TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, heads) = (acceptor.clone(), Arc::clone(&heads));
            tokio::spawn(async move {
                // Clients come and go.
                let _ = connect(stream, &acceptor, behind, &heads).await;
            });
        }
    };
    background::spawn(serve);
    address
}

async fn connect(
    mut stream: TcpStream,
    acceptor: &TlsAcceptor,
    behind: SocketAddr,
    heads: &Heads,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let allowed = head.contains(CREDENTIALS.1);
    heads.lock().unwrap().push(head);
    if !allowed {
        let refused = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n";
        return stream.write_all(refused).await;
    }
    stream
        .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        .await?;
    let mut secured = acceptor.accept(stream).await?;
    let mut plain = TcpStream::connect(behind).await?;
    copy_bidirectional(&mut secured, &mut plain).await?;
    Ok(())
}

pub fn through_it() {
    let dir = tempfile::tempdir().unwrap();
    let tls = certificates(dir.path(), "DNS:github.invalid,DNS:api.github.invalid");
    let fake = Fake::start();
    let behind = fake.url["http://".len()..].parse().unwrap();
    fake.state().base = "https://github.invalid".to_owned();
    let heads = Heads::default();
    let proxy = start(tls, behind, &heads);
    let url = format!(
        "url = 'https://github.invalid/{REPOSITORY}'\napi-url = 'https://api.github.invalid'\n"
    );
    let mut listening = Listening::at(fake, &url);
    let authority = dir.path().join("ca.pem");
    let authority = ("SSL_CERT_FILE", authority.to_str().unwrap());
    let named = format!("http://{}@{proxy}", CREDENTIALS.0);
    listening.start(&[authority, ("https_proxy", &named)]);
    listening.until("it listens", |fake| {
        let state = fake.state();
        state.sets.values().any(|set| set.session().is_some())
    });
    for host in ["api.github.invalid:443", "github.invalid:443"] {
        let begin = format!("CONNECT {host} HTTP/1.1\r\n");
        let heads = heads.lock().unwrap();
        assert!(
            heads.iter().any(|head| head.starts_with(&begin)),
            "{heads:?}"
        );
    }
    listening.kill();
    // No name ends with that one: it is not found without the proxy.
    heads.lock().unwrap().clear();
    let without = ("NO_PROXY", "localhost, .github.invalid");
    listening.start(&[authority, ("HTTPS_PROXY", &named), without]);
    listening.until_log("registration-token: ");
    assert!(heads.lock().unwrap().is_empty());
    listening.kill();
    // It does not let everybody out.
    let wrong = named.replace("let-me-out", "sesame");
    listening.start(&[authority, ("HTTPS_PROXY", &wrong)]);
    listening.until_log("proxy authorization required");
    listening.kill();
    // One that is not spoken to without TLS.
    let unknown = format!("https://{}@{proxy}", CREDENTIALS.0);
    listening.start(&[authority, ("HTTPS_PROXY", &unknown)]);
    listening.until_log("https:// is not supported");
    let log = listening.log();
    for secret in ["let-me-out", CREDENTIALS.1, "sesame"] {
        assert!(!log.contains(secret), "{secret}: {log}");
    }
}
