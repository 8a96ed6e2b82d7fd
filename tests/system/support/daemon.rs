// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon as a process, and a plugin client that says what it is told, byte for byte.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::PROGRAM;
use super::command::{Outcome, outcome_of, succeed};

/// Where `serve` listens if nothing else is configured.
pub const SOCKET: &str = "/run/lvm-cache-friend/plugin.sock";

/// By when a failpoint must be reached. Far beyond what it takes: this tells one that nothing reaches.
const REACHED: Duration = Duration::from_secs(90);

/// `lvm-cache-friend --config CONFIG ARGUMENTS…`, to success; what it wrote.
#[track_caller]
pub fn friend(config: &Path, arguments: &[&str]) -> String {
    succeed(&mut command(config, arguments))
}

/// The same, however it ends.
#[track_caller]
pub fn friend_outcome(config: &Path, arguments: &[&str]) -> Outcome {
    outcome_of(&mut command(config, arguments))
}

fn command(config: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("--config").arg(config).args(arguments);
    command
}

/// A running daemon. Dropping it kills it, and shows its log where the test failed.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    _dir: tempfile::TempDir,
    plugin: Plugin,
}

impl Daemon {
    /// Starts `serve` and waits until it answers on the default socket.
    pub fn start(config: &Path) -> Self {
        Self::start_with(config, Path::new(SOCKET), &[])
    }

    /// The same with a socket, and with variables in its environment (failpoints, log level).
    pub fn start_with(config: &Path, socket: &Path, environment: &[(&str, &str)]) -> Self {
        Self::spawn(config, socket, environment).serving()
    }

    /// Runs `command`, which becomes the daemon, and waits until it answers on the default socket.
    pub fn start_as(command: Command) -> Self {
        Self::spawn_as(command, Path::new(SOCKET)).serving()
    }

    fn serving(mut self) -> Self {
        super::wait_until(|| {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon ended instead of serving: {status}");
            }
            matches!(self.plugin.try_call("Plugin.Activate", b""), Ok((200, _)))
        });
        self
    }

    /// Starts `serve` and does not wait: for one that is to die on the way up.
    pub fn spawn(config: &Path, socket: &Path, environment: &[(&str, &str)]) -> Self {
        let mut command = command(config, &["serve"]);
        command.envs(environment.iter().copied());
        Self::spawn_as(command, socket)
    }

    fn spawn_as(mut command: Command, socket: &Path) -> Self {
        let dir = super::temp_dir();
        let log = dir.path().join("log");
        let file = File::create(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self {
            child,
            log,
            _dir: dir,
            plugin: Plugin::new(socket),
        }
    }

    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has open, sorted: sockets and the like without their numbers.
    pub fn descriptors(&self) -> Vec<String> {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let mut open: Vec<_> = open
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .map(|to| to.display().to_string())
            .map(|to| to.split(":[").next().unwrap_or_default().to_owned())
            .collect();
        open.sort();
        open
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Waits until it has died of SIGKILL: at the failpoint that it was given, if nobody else sent it.
    pub fn died(mut self) {
        let since = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                since.elapsed() < REACHED,
                "the daemon lives: its failpoint was not reached"
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(status.signal(), Some(9), "the daemon ended by itself");
    }

    /// SIGTERM, and a clean end.
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "after SIGTERM: {status}");
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        assert_eq!(self.wait().signal(), Some(9));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("--- the daemon's log:\n{}", self.log());
        }
    }
}

/// A client of the volume plugin's socket. Each call is a connection of its own.
#[derive(Clone)]
pub struct Plugin {
    socket: PathBuf,
}

impl Plugin {
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// Calls `VolumeDriver.Create` or the like; the HTTP status and what the body says.
    #[track_caller]
    pub fn call(&self, endpoint: &str, body: &Value) -> (u16, Value) {
        self.call_bytes(endpoint, body.to_string().as_bytes())
    }

    /// The same with a body of any bytes.
    #[track_caller]
    pub fn call_bytes(&self, endpoint: &str, body: &[u8]) -> (u16, Value) {
        match self.try_call(endpoint, body) {
            Ok(answer) => answer,
            Err(error) => panic!("{endpoint}: {error}"),
        }
    }

    /// A call that must succeed.
    #[track_caller]
    pub fn ok(&self, endpoint: &str, body: &Value) -> Value {
        let (status, answer) = self.call(endpoint, body);
        assert!(status == 200, "{endpoint} {body}: {status} {answer}");
        answer
    }

    /// A call that must be refused; what `Err` says.
    #[track_caller]
    pub fn refused(&self, endpoint: &str, body: &Value) -> String {
        let (status, answer) = self.call(endpoint, body);
        match answer["Err"].as_str() {
            Some(error) if status >= 400 && !error.is_empty() => error.to_owned(),
            _ => panic!("{endpoint} {body} was not refused: {status} {answer}"),
        }
    }

    /// A call to a daemon that may be away.
    ///
    /// # Errors
    /// No connection, or one that ends before a whole answer.
    pub fn try_call(&self, endpoint: &str, body: &[u8]) -> io::Result<(u16, Value)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        // A server that has seen enough may answer and close before it has read everything.
        let sent = write!(
            stream,
            "POST /{endpoint} HTTP/1.1\r\nHost: plugin\r\nContent-Type: application/vnd.docker.plugins.v1.1+json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        )
        .and_then(|()| stream.write_all(body));
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer)
            && answer.is_empty()
        {
            return Err(error);
        }
        if answer.is_empty() {
            sent?;
        }
        let answer = String::from_utf8(answer).map_err(io::Error::other)?;
        let broken = || io::Error::other(format!("no whole HTTP answer: {answer:?}"));
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(broken)?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .ok_or_else(broken)?;
        let body = serde_json::from_str(body).map_err(|_| broken())?;
        Ok((status, body))
    }
}
