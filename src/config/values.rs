// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values as they stand in the file: how each kind is read, and what is said of one that is none.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize as _, Deserializer, de};

/// Longest path of a unix socket, in bytes: sizeof sun_path less the final NUL,
/// and one for the name that it is bound under at first.
const MAX_SOCKET_PATH: usize = 106;

pub(super) fn parsed<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: std::fmt::Display,
{
    String::deserialize(deserializer)?
        .parse()
        .map_err(de::Error::custom)
}

pub(super) fn parsed_if_any<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: std::fmt::Display,
{
    parsed(deserializer).map(Some)
}

pub(super) fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(de::Error::custom(format_args!(
            "{path:?} is not an absolute path, which begins with /"
        )))
    }
}

pub(super) fn absolute_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    absolute(deserializer).map(Some)
}

pub(super) fn socket_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.as_os_str().is_empty() {
        Ok(None)
    } else if path.is_absolute() {
        Ok(Some(path))
    } else {
        Err(de::Error::custom(format_args!(
            "{path:?} is neither empty nor an absolute path, which begins with /"
        )))
    }
}

pub(super) fn socket_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = absolute(deserializer)?;
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(de::Error::custom(format_args!(
            "{path:?} is too long for a socket: at most {MAX_SOCKET_PATH} bytes"
        )));
    }
    if path.file_name().is_none() {
        return Err(de::Error::custom(format_args!("{path:?} names no file")));
    }
    Ok(path)
}

/// An address of this host alone, or nothing.
pub(super) fn loopback<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(Some(address)),
        Ok(_) => Err(de::Error::custom(format_args!(
            "{text:?} is not a loopback address: as there is no password, use a web server with authentication for others"
        ))),
        Err(_) => Err(de::Error::custom(format_args!(
            "{text:?} is not an address and port: expected one such as \"127.0.0.1:9469\""
        ))),
    }
}

pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    // A day has 24 hours here, and a week 7 days; months and years have no length.
    text.parse::<jiff::Span>()
        .ok()
        .and_then(|span| {
            let days = jiff::SpanRelativeTo::days_are_24_hours();
            Duration::try_from(span.to_duration(days).ok()?).ok()
        })
        .ok_or_else(|| {
            de::Error::custom(format_args!(
                "{text:?} is not a length of time: expected one such as \"30s\", \"2m\" or \"14d\""
            ))
        })
}

pub(super) fn duration_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}
