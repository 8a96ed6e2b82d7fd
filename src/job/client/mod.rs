// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of a job volume: `restore`, `save`, `discard`, `status` and `verdict`.
//!
//! This directory is two things. It is a module of the main program, for its subcommands of those names;
//! and it is a program of its own, without dependencies and linked statically (build.rs), which the
//! daemon puts into each job volume: a job's image needs nothing to run it. So it has nothing of
//! the rest of this crate, and nothing but the standard library.

mod answer;
mod args;
mod links;

use std::ffi::OsString;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fmt, fs};

use answer::{Answer, quoted};
use args::Args;
use links::links;

macro_rules! help {
    ($text:literal) => {
        concat!(
            $text,
            "
      --json          print the answer as one line of JSON
      --socket PATH   the job volume's socket [default: $LVM_CACHE_FRIEND_SOCKET, else the one of the
                      job volume that this program is in, else /run/lvm-cache-friend/socket]
  -h, --help          print this help

Exit codes:
  0  done
  1  refused or failed; standard error says why
  2  wrong usage
  3  no job volume here: there is no socket, or nothing listens on it
  4  nothing matched, and --fail-on-miss was given"
        )
    };
}

/// The help of the program of its own.
const HELP: &str = "\
Asks lvm-cache-friend for caches, in a job that has a job volume.

Usage: lvm-cache-friend COMMAND …

Commands:
  restore  mount the best cache, and link paths to it
  save     publish what a cache holds now, while the job goes on
  discard  do not publish a cache when the job ends
  status   list the mounted caches
  verdict  report the job's result

`lvm-cache-friend COMMAND --help` has details.";

/// The help of `restore`.
pub const RESTORE: &str = help!(
    "\
Mount the best cache in the job volume, and link paths to it.

Usage: lvm-cache-friend restore NAME [OPTIONS]

Arguments:
  NAME   place in the job volume: a name such as cargo, or a path of up to 8 names

Options:
      --key TAGS      tags separated by spaces, such as \"linux dc5e8c\": the first restore key, and the tags
                      of what is published when the job has ended
      --restore-keys KEYS
                      further restore keys, in order, separated by `;` or newlines: \"linux main; linux-*\".
                      May be given several times
      --save TAGS     publish with these tags instead of the key's; \"\": do not publish
      --path PATH     make PATH a link to the cache. If given several times, each becomes a link to a
                      directory of its own in the cache. What a directory at PATH has, and the cache lacks,
                      is moved into the cache
      --lookup-only   only print what would be restored
      --fail-on-miss  on a miss, mount nothing and exit with 4"
);

/// The help of `save`.
pub const SAVE: &str = help!(
    "\
Publish what a cache holds now, while the job goes on.

Usage: lvm-cache-friend save NAME [TAGS]... [OPTIONS]

Arguments:
  NAME   the cache, as it was restored
  TAGS   tags to publish with, besides those of the job volume [default: those it was restored with]

Options:"
);

/// The help of `discard`.
pub const DISCARD: &str = help!(
    "\
Do not publish a cache when the job ends.

Usage: lvm-cache-friend discard NAME [OPTIONS]

Arguments:
  NAME   the cache, as it was restored

Options:"
);

/// The help of `status`.
pub const STATUS: &str = help!(
    "\
List the caches that are mounted in the job volume.

Usage: lvm-cache-friend status [OPTIONS]

Options:"
);

/// The help of `verdict`.
pub const VERDICT: &str = help!(
    "\
Report the job's result. It overrides the exit code of the job's container.

Usage: lvm-cache-friend verdict success|failure [OPTIONS]

Options:"
);

/// The program of its own.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let (verb, args) = args
        .split_first()
        .map_or(("".into(), &[][..]), |(verb, args)| {
            (verb.to_string_lossy(), args)
        });
    match &*verb {
        "-h" | "--help" | "help" => print(HELP),
        verb if help_of(verb).is_some() => run(verb, args),
        verb => {
            eprintln!("lvm-cache-friend: no such command in a job: {verb:?}\n\n{HELP}");
            ExitCode::from(2)
        }
    }
}

fn help_of(verb: &str) -> Option<&'static str> {
    Some(match verb {
        "restore" => RESTORE,
        "save" => SAVE,
        "discard" => DISCARD,
        "status" => STATUS,
        "verdict" => VERDICT,
        _ => return None,
    })
}

/// Does what `verb` says, and says so.
#[must_use]
pub fn run(verb: &str, args: &[OsString]) -> ExitCode {
    let args = match Args::parse(verb, args) {
        Ok(args) => args,
        Err(why) => {
            eprintln!("lvm-cache-friend: {why}\nTry `lvm-cache-friend {verb} --help`.");
            return ExitCode::from(2);
        }
    };
    if args.help {
        return print(help_of(verb).unwrap_or(HELP));
    }
    let done = act(verb, &args);
    if let Err(failure) = &done {
        eprintln!("lvm-cache-friend: {failure}");
    }
    let code = match &done {
        Ok(_) => 0,
        Err(Failure::Failed(_)) => 1,
        Err(Failure::NoJob(_)) => 3,
        Err(Failure::Miss(_)) => 4,
    };
    let printed = match &done {
        Ok(answer) | Err(Failure::Miss(answer)) if args.json => print(&answer.json(verb)),
        Ok(answer) | Err(Failure::Miss(answer)) => print(&answer.text),
        Err(Failure::Failed(why) | Failure::NoJob(why)) if args.json => {
            print(&format!("{{\"ok\":false,\"error\":{}}}", quoted(why)))
        }
        Err(_) => ExitCode::SUCCESS,
    };
    if code == 0 {
        printed
    } else {
        ExitCode::from(code)
    }
}

/// Writes to standard output. A reader that has seen enough is no failure.
fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("lvm-cache-friend: standard output: {error}");
            ExitCode::from(1)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// What was not done; each kind has an exit code.
#[derive(Debug)]
enum Failure {
    Failed(String),
    NoJob(String),
    Miss(Answer),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(why) | Self::NoJob(why) => f.write_str(why),
            Self::Miss(_) => f.write_str("nothing matches, and --fail-on-miss was given"),
        }
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| Failure::Failed(format!("{}: {error}", path.display()))
}

fn act(verb: &str, args: &Args) -> Result<Answer, Failure> {
    let socket = args.socket();
    // First of all, so that a job without a job volume is told that, and nothing else.
    let stream = connect(&socket)?;
    if verb != "restore" {
        return ask(stream, &args.request(verb));
    }
    if args.lookup_only || args.fail_on_miss {
        let answer = ask(connect(&socket)?, &args.lookup())?;
        if args.fail_on_miss && !answer.is_hit() {
            return Err(Failure::Miss(answer));
        }
        if args.lookup_only {
            return Ok(answer);
        }
    }
    // What cannot be done is found before anything is.
    let socket_itself = socket.canonicalize().map_err(failed(&socket))?;
    let job = socket_itself.parent().unwrap_or(Path::new("/"));
    // Without `.` and doubled slashes.
    let at: PathBuf = job.join(&args.words[0]).components().collect();
    let links = links(&args.paths, &at, job)?;
    for link in &links {
        link.check()?;
    }
    let answer = ask(stream, &args.request(verb))?;
    if args.fail_on_miss && !answer.is_hit() {
        // What matched a moment ago is gone.
        let _ = ask(connect(&socket)?, &format!("discard {}\n", args.words[0]));
        return Err(Failure::Miss(answer));
    }
    if !links.is_empty() {
        let there = |path: &Path| fs::metadata(path).map_err(failed(path));
        if there(&at)?.dev() == there(job)?.dev() {
            let why = "the cache is mounted, but not visible at";
            return Err(Failure::Failed(format!("{why} {}", at.display())));
        }
    }
    for link in &links {
        link.make().map_err(|why| {
            Failure::Failed(format!("{why} (the cache is mounted at {})", at.display()))
        })?;
    }
    Ok(answer)
}

fn connect(socket: &Path) -> Result<UnixStream, Failure> {
    UnixStream::connect(socket).map_err(|error| {
        let why = format!("{}: {error}", socket.display());
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::ConnectionRefused => {
                Failure::NoJob(format!("no job volume here: {why}"))
            }
            _ => Failure::Failed(why),
        }
    })
}

/// Makes one request, the only one of its connection.
fn ask(mut stream: UnixStream, request: &str) -> Result<Answer, Failure> {
    // The daemon may refuse a client before it has read what that asks for, so what is answered counts.
    let _ = stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).trim_end().to_owned();
    let last = text.lines().last().unwrap_or_default();
    match last.split_once(' ') {
        Some(("ok", _)) => Ok(Answer { text }),
        Some(("error", why)) => Err(Failure::Failed(why.to_owned())),
        _ => Err(Failure::Failed(format!(
            "no answer from the daemon{}",
            read.map_or_else(|error| format!(": {error}"), |_| String::new())
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// The daemon's part: reads what is asked and answers `answer`.
    fn served(answer: &'static str) -> Result<Answer, Failure> {
        let (client, mut daemon) = UnixStream::pair().unwrap();
        daemon.write_all(answer.as_bytes()).unwrap();
        drop(daemon);
        ask(client, "status\n")
    }

    #[test]
    fn failures() {
        // Answered before it was asked, and hung up on: what was said counts.
        assert_eq!(
            served("vg lv\nok restored=base\n").unwrap().text,
            "vg lv\nok restored=base"
        );
        for (answer, words) in [
            ("error no such \"thing\"\n", "no such \"thing\""),
            ("", "no answer"),
            ("vg lv\n", "no answer"),
        ] {
            let why = served(answer).unwrap_err().to_string();
            assert!(
                why.starts_with(words) || why.contains(words),
                "{answer}: {why}"
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        assert!(matches!(connect(&socket), Err(Failure::NoJob(_))));
        drop(UnixListener::bind(&socket).unwrap());
        assert!(
            matches!(connect(&socket), Err(Failure::NoJob(_))),
            "nobody listens"
        );
        let long = dir.path().join("x".repeat(200));
        assert!(matches!(connect(&long), Err(Failure::Failed(_))));
    }
}
