// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How we say who we are: with a token, or with those of an App's installation.
//!
//! An App's private key signs a JSON Web Token (RFC 7519) of some minutes, which buys an installation token of an hour. Source:
//! "Authenticating as a GitHub App installation", REST API version 2022-11-28.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderValue, Method, StatusCode, header};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Mutex;

use super::answer::{GitHubError, date};
use super::connect::Client;
use super::{TIMEOUT, rest_request};
use crate::supervisor::secret::Source;

/// How much earlier than now an App's token says it was issued, in seconds, "to allow for clock drift".
const DRIFT: u64 = 60;

/// How long after now it ends, in seconds; GitHub takes ten minutes at most.
const LIFE: u64 = 9 * 60;

/// An installation token that ends sooner than this is not used any more.
const RENEW_BEFORE: Duration = Duration::from_secs(60);

/// How we say who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// A token.
    Token(Source),
    /// A GitHub App's installation.
    App {
        /// The App.
        id: u64,
        /// Its installation.
        installation: u64,
        /// Its private key, PEM.
        key: Source,
    },
}

/// What says who we are.
pub(super) enum Credential {
    Token(HeaderValue),
    App(Box<App>),
}

/// A GitHub App, and its installation's token as long as that lasts.
pub(super) struct App {
    id: u64,
    installation: u64,
    key: RsaKeyPair,
    /// Locked while it is renewed: that is done once.
    token: Mutex<Option<(HeaderValue, Instant)>>,
}

impl Credential {
    /// Reads its secret.
    ///
    /// # Errors
    /// When that cannot be had, or is none.
    pub(super) fn read(auth: &Auth) -> Result<Self, GitHubError> {
        match auth {
            Auth::Token(source) => bearer(&source.read()?).map(Self::Token),
            Auth::App {
                id,
                installation,
                key,
            } => Ok(Self::App(Box::new(App {
                id: *id,
                installation: *installation,
                key: rsa_key(&key.read()?)?,
                token: Mutex::default(),
            }))),
        }
    }

    /// The value of `Authorization` for the REST API at `api`.
    ///
    /// # Errors
    /// When an installation token is wanted and not granted.
    pub(super) async fn header(
        &self,
        client: &Client,
        api: &str,
    ) -> Result<HeaderValue, GitHubError> {
        match self {
            Self::Token(header) => Ok(header.clone()),
            Self::App(app) => app.header(client, api).await,
        }
    }

    /// GitHub does not take it any more: an installation token is renewed by the next request.
    pub(super) async fn refused(&self) {
        if let Self::App(app) = self {
            *app.token.lock().await = None;
        }
    }
}

impl App {
    async fn header(&self, client: &Client, api: &str) -> Result<HeaderValue, GitHubError> {
        let mut token = self.token.lock().await;
        if let Some((header, until)) = &*token
            && Instant::now() + RENEW_BEFORE < *until
        {
            return Ok(header.clone());
        }
        let (header, until) = self.buy(client, api).await?;
        Ok(token.insert((header, until)).0.clone())
    }

    /// A new installation token, and when it ends.
    async fn buy(&self, client: &Client, api: &str) -> Result<(HeaderValue, Instant), GitHubError> {
        #[derive(Deserialize)]
        struct Bought {
            token: SecretString,
            expires_at: Timestamp,
        }
        let path = format!("/app/installations/{}/access_tokens", self.installation);
        let token = bearer(&self.signed(SystemTime::now())?)?;
        let request =
            rest_request(Method::POST, format!("{api}{path}")).header(header::AUTHORIZATION, token);
        let what = format!("{} {path}", Method::POST);
        let asked = Instant::now();
        let answer = client.send(what, request, Vec::new(), TIMEOUT).await?;
        let bought: Bought = answer.json(StatusCode::CREATED)?;
        let now = date(&answer.headers, SystemTime::now());
        let ends = u64::try_from(bought.expires_at.as_second()).unwrap_or(0);
        let life = Duration::from_secs(ends.saturating_sub(now));
        Ok((bearer(&bought.token)?, asked + life))
    }

    /// A token of the App's own, signed with RS256 (RFC 7518, section 3.3).
    fn signed(&self, now: SystemTime) -> Result<SecretString, GitHubError> {
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let claims = json!({"iat": now.saturating_sub(DRIFT), "exp": now + LIFE, "iss": self.id});
        let encoded = |json: serde_json::Value| BASE64.encode(json.to_string());
        let text = encoded(json!({"alg": "RS256", "typ": "JWT"})) + "." + &encoded(claims);
        let mut signature = vec![0; self.key.public().modulus_len()];
        self.key
            .sign(
                &RSA_PKCS1_SHA256,
                &SystemRandom::new(),
                text.as_bytes(),
                &mut signature,
            )
            .map_err(|e| setup(format!("signing with the App's key: {e}")))?;
        Ok(format!("{text}.{}", BASE64.encode(signature)).into())
    }
}

fn setup(problem: impl Into<String>) -> GitHubError {
    GitHubError::Setup(problem.into())
}

/// A key as GitHub gives it out (PKCS #1), or in PKCS #8.
fn rsa_key(text: &SecretString) -> Result<RsaKeyPair, GitHubError> {
    let none = |problem: &dyn fmt::Display| {
        setup(format!("the App's key is no RSA key in PEM: {problem}"))
    };
    let key = PrivateKeyDer::from_pem_slice(text.expose_secret().as_bytes());
    let key = match key.map_err(|e| none(&e))? {
        PrivateKeyDer::Pkcs1(key) => RsaKeyPair::from_der(key.secret_pkcs1_der()),
        PrivateKeyDer::Pkcs8(key) => RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()),
        _ => return Err(none(&"it is one of another kind")),
    };
    key.map_err(|e| none(&e))
}

fn bearer(token: &SecretString) -> Result<HeaderValue, GitHubError> {
    let mut header = HeaderValue::from_str(&format!("Bearer {}", token.expose_secret()))
        .map_err(|_| setup("the token has characters that no token has"))?;
    header.set_sensitive(true);
    Ok(header)
}
