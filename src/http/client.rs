// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other side of the socket, for our own commands: one request, one connection.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::text::printable;

/// Longest answer that is read, in bytes: a List of many thousand volumes.
const MAX_ANSWER: u64 = 64 << 20;

/// A request to the daemon that was not granted.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: no daemon runs.
    #[error("no daemon answers on this socket")]
    NotRunning,
    /// The daemon refused; this is its reason.
    #[error("{message}")]
    Refused {
        /// The answer's status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// The connection or the answer was broken.
    #[error("talking to the daemon: {0}")]
    Io(#[from] io::Error),
}

/// Posts `body` to `endpoint` of the daemon that listens on `socket` and returns
/// its answer. `timeout` bounds each wait for it.
///
/// # Errors
/// See [`ClientError`].
pub fn call(
    socket: &Path,
    endpoint: &str,
    body: &Value,
    timeout: Duration,
) -> Result<Value, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning,
        _ => error.into(),
    })?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let body = body.to_string();
    // HTTP/1.0: the answer ends with the connection, and comes in no chunks.
    write!(
        stream,
        "POST /{endpoint} HTTP/1.0\r\nHost: plugin\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let (status, body) = split(&answer)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP"))?;
    let body: Value = serde_json::from_slice(body).map_err(io::Error::from)?;
    if status == 200 {
        return Ok(body);
    }
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(rename = "Err")]
        err: String,
    }
    let message = Refusal::deserialize(&body)
        .map_or_else(|_| format!("status {status}"), |r| printable(&r.err));
    Err(ClientError::Refused { status, message })
}

/// Status and body of an HTTP/1 answer.
fn split(answer: &[u8]) -> Option<(u16, &[u8])> {
    let head_end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..head_end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    Some((status.parse().ok()?, &answer[head_end + 4..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_split() {
        for (answer, want) in [
            (
                &b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}"[..],
                Some((200, &b"{}"[..])),
            ),
            (b"HTTP/1.1 404 Not Found\r\n\r\n", Some((404, b""))),
            (b"HTTP/1.1 200\r\n\r\nx", Some((200, b"x"))),
            (b"HTTP/1.1 200 OK\r\n", None),
            (b"", None),
            (b"SSH-2.0\r\n\r\n", None),
        ] {
            assert_eq!(split(answer), want);
        }
    }
}
