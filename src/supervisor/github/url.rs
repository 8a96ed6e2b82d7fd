// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where runners are registered: the address as a browser has it, and the API's.

use std::fmt;

use axum::http::Uri;

/// Whose runners they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A repository's: owner and name.
    Repository(String, String),
    /// An organization's.
    Organization(String),
    /// An enterprise's.
    Enterprise(String),
}

impl Owner {
    /// Where its runners are, in the REST API.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Self::Repository(owner, name) => format!("/repos/{owner}/{name}"),
            Self::Organization(name) => format!("/orgs/{name}"),
            Self::Enterprise(name) => format!("/enterprises/{name}"),
        }
    }

    /// `owner/name`, of a repository.
    #[must_use]
    pub fn repository(&self) -> Option<String> {
        match self {
            Self::Repository(owner, name) => Some(format!("{owner}/{name}")),
            _ => None,
        }
    }
}

/// The address of a repository, an organization or an enterprise, as a browser has it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Url {
    text: String,
    host: String,
    scheme: String,
    /// Whose runners they are.
    pub owner: Owner,
}

impl TryFrom<String> for Url {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let problem = || {
            format!(
                "{text:?} is not the address of a repository (https://github.com/OWNER/NAME), of an organization \
                 (https://github.com/NAME) or of an enterprise (https://github.com/enterprises/NAME)"
            )
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(problem)?;
        let (host, path) = rest.split_once('/').ok_or_else(problem)?;
        let names: Vec<_> = path.trim_end_matches('/').split('/').collect();
        let name = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty() && name.chars().all(plain) && !name.starts_with('.')
        };
        if !matches!(scheme, "https" | "http")
            || host.is_empty()
            || host.contains('@')
            || !names.iter().all(|n| name(n))
        {
            return Err(problem());
        }
        check_scheme(scheme, host)?;
        let owner = match names[..] {
            ["enterprises", name] => Owner::Enterprise(name.to_owned()),
            [owner, name] => Owner::Repository(owner.to_owned(), name.to_owned()),
            [name] => Owner::Organization(name.to_owned()),
            _ => return Err(problem()),
        };
        Ok(Self {
            host: host.to_owned(),
            scheme: scheme.to_owned(),
            owner,
            text,
        })
    }
}

/// Whether a host, with or without a port, is this machine by its name.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    let name = name.unwrap_or_default();
    let address = name.parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Refuses to say anything to a host where others may listen.
fn check_scheme(scheme: &str, host: &str) -> Result<(), String> {
    if scheme == "http" && !is_loopback(host) {
        return Err(format!(
            "http://{host}: tokens are sent there, where anybody on the way could read them: write https://"
        ));
    }
    Ok(())
}

/// Refuses an API's address that is none, or that tokens may not be sent to.
///
/// # Errors
/// When it is so; the text says what is right.
pub fn check_api(api: &str) -> Result<(), String> {
    let problem = || format!("{api:?} is no address: write https://HOST/api/v3");
    let uri: Uri = api.parse().map_err(|_| problem())?;
    match (uri.scheme_str(), uri.authority()) {
        (Some(scheme @ ("http" | "https")), Some(host)) => check_scheme(scheme, host.host()),
        _ => Err(problem()),
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Url {
    /// Where its REST API is, if the configuration does not say: beside GitHub's and GHE.com's hosts,
    /// below the host of an Enterprise Server (actions/scaleset, config.go).
    #[must_use]
    pub fn api(&self) -> String {
        let Self { scheme, host, .. } = self;
        match host.as_str() {
            "github.com" | "www.github.com" => "https://api.github.com".to_owned(),
            host if host.ends_with(".ghe.com") => format!("{scheme}://api.{host}"),
            host => format!("{scheme}://{host}/api/v3"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, api, path) in [
            (
                "https://github.com/o/r",
                "https://api.github.com",
                "/repos/o/r",
            ),
            ("https://github.com/o/", "https://api.github.com", "/orgs/o"),
            (
                "https://github.com/enterprises/e",
                "https://api.github.com",
                "/enterprises/e",
            ),
            (
                "https://octo.ghe.com/o/r",
                "https://api.octo.ghe.com",
                "/repos/o/r",
            ),
            (
                "https://git.example/o",
                "https://git.example/api/v3",
                "/orgs/o",
            ),
            (
                "http://127.0.0.1:8080/o/r.x",
                "http://127.0.0.1:8080/api/v3",
                "/repos/o/r.x",
            ),
        ] {
            let url = Url::try_from(text.to_owned()).expect(text);
            assert_eq!((url.api().as_str(), url.owner.path().as_str()), (api, path));
        }
        for text in [
            "github.com/o",
            "https://github.com",
            "https://github.com/",
            "ftp://a/b",
            "https://github.com/a/b/c",
            "https://github.com/a b",
            "https://github.com/a/../b",
            "http:///o",
        ] {
            let problem = Url::try_from(text.to_owned()).expect_err(text);
            assert!(
                problem.contains("https://github.com/OWNER/NAME"),
                "{problem}"
            );
        }
    }

    #[test]
    fn without_tls_on_this_machine_only() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:80",
            "LOCALHOST:1",
            "[::1]:80",
            "127.9.9.9",
        ] {
            assert!(Url::try_from(format!("http://{host}/o")).is_ok(), "{host}");
            assert_eq!(check_api(&format!("http://{host}/api/v3")), Ok(()));
        }
        for host in [
            "git.example",
            "10.0.2.2:80",
            "127.0.0.1.example",
            "localhost.example:1",
            "[::2]:80",
        ] {
            let problem = Url::try_from(format!("http://{host}/o")).unwrap_err();
            assert!(problem.contains("https://"), "{problem}");
            check_api(&format!("http://{host}/api/v3")).unwrap_err();
            assert_eq!(check_api(&format!("https://{host}/api/v3")), Ok(()));
        }
        for text in ["api.github.com", "ftp://a", "https://", ""] {
            let problem = check_api(text).unwrap_err();
            assert!(problem.contains("https://HOST/api/v3"), "{text}: {problem}");
        }
    }
}
