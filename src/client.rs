// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of a job volume: `restore`, `save`, `discard`, `status` and `verdict`.
//!
//! This file is two things. It is a module of the main program, for its subcommands of those names;
//! and it is a program of its own, without dependencies and linked statically (build.rs), which the
//! daemon puts into each job volume: a job's image needs nothing to run it. So it has nothing of
//! this crate's, and nothing but the standard library.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, FileTimes, Metadata};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt as _, lchown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::process::{self, ExitCode};
use std::{env, fmt};

/// Names the socket, where `--socket` does not.
const SOCKET_VARIABLE: &str = "LVM_CACHE_FRIEND_SOCKET";

/// Where it is if nothing else is known.
const USUAL_SOCKET: &str = "/run/lvm-cache-friend/socket";

macro_rules! help {
    ($text:literal) => {
        concat!(
            $text,
            "
      --json          one line of JSON instead of the daemon's answer
      --socket PATH   the job volume's socket [default: $LVM_CACHE_FRIEND_SOCKET, else the one of the
                      job volume that this program lies in, else /run/lvm-cache-friend/socket]
  -h, --help          this text

Exit codes:
  0  done
  1  refused, or failed; standard error says why
  2  wrong usage
  3  there is no job volume here: no socket, or nobody listens
  4  nothing matched, and --fail-on-miss was given"
        )
    };
}

/// The help of the program of its own.
const HELP: &str = "\
Asks lvm-cache-friend for caches, from within a job that has a job volume.

Usage: lvm-cache-friend COMMAND …

Commands:
  restore  mount the best cache, and have paths lead to it
  save     publish what a cache holds now, while the job goes on
  discard  have what is in a cache not published when the job ends
  status   say what is mounted
  verdict  say how the job's work ended

`lvm-cache-friend COMMAND --help` says more.";

/// The help of `restore`.
pub const RESTORE: &str = help!(
    "\
Mount the best cache in the job volume, and have paths lead to it.

Usage: lvm-cache-friend restore NAME [OPTIONS]

Arguments:
  NAME   where in the job volume: a name such as cargo, or a path of up to 8 names

Options:
      --key TERMS     terms separated by spaces, such as \"linux dc5e8c\": what to restore first of all,
                      and the tags of what is published when the job has ended
      --restore-keys CRITERIA
                      what else to restore, in order, if nothing has all of the key's terms: \"linux main;
                      linux-*\", separated by `;` or newlines. May be given several times
      --save TAGS     other tags than the key's for what is published; \"\": nothing is published
      --path PATH     becomes a link to the cache. May be given several times: then each becomes a link to
                      a directory of its own in the cache. What a directory there holds, and the cache does
                      not, is moved into the cache
      --lookup-only   only say what would be restored
      --fail-on-miss  exit with 4, and mount nothing, if nothing matches"
);

/// The help of `save`.
pub const SAVE: &str = help!(
    "\
Publish what a cache holds now, while the job goes on.

Usage: lvm-cache-friend save NAME [TAGS]... [OPTIONS]

Arguments:
  NAME   the cache, as it was restored
  TAGS   its tags beside those of the job volume; without any, those that it was restored with

Options:"
);

/// The help of `discard`.
pub const DISCARD: &str = help!(
    "\
Have what is in a cache not published when the job ends.

Usage: lvm-cache-friend discard NAME [OPTIONS]

Arguments:
  NAME   the cache, as it was restored

Options:"
);

/// The help of `status`.
pub const STATUS: &str = help!(
    "\
Say what is mounted in the job volume.

Usage: lvm-cache-friend status [OPTIONS]

Options:"
);

/// The help of `verdict`.
pub const VERDICT: &str = help!(
    "\
Say how the job's work ended. This goes before the exit code of the job's container.

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
            eprintln!("lvm-cache-friend: in a job there is no command {verb:?}\n\n{HELP}");
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

/// The command line after the verb.
#[derive(Debug, Default, PartialEq)]
struct Args {
    /// NAME and what follows it, or the verdict.
    words: Vec<String>,
    help: bool,
    json: bool,
    socket: Option<PathBuf>,
    key: String,
    restore_keys: Vec<String>,
    save: Option<String>,
    paths: Vec<PathBuf>,
    lookup_only: bool,
    fail_on_miss: bool,
}

impl Args {
    fn parse(verb: &str, args: &[OsString]) -> Result<Self, String> {
        let mut all = Self::default();
        let text = |arg: &OsString| {
            let text = arg.clone().into_string();
            text.map_err(|arg| format!("{arg:?} is not UTF-8"))
        };
        let args: Result<Vec<_>, _> = args.iter().map(text).collect();
        let mut args = args?.into_iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                all.words.extend(args);
                break;
            }
            if !arg.starts_with('-') {
                all.words.push(arg);
                continue;
            }
            let (option, inline) = match arg.split_once('=') {
                Some((option, value)) => (option, Some(value.to_owned())),
                None => (&*arg, None),
            };
            let flag = match (verb, option) {
                (_, "-h" | "--help") => Some(&mut all.help),
                (_, "--json") => Some(&mut all.json),
                ("restore", "--lookup-only") => Some(&mut all.lookup_only),
                ("restore", "--fail-on-miss") => Some(&mut all.fail_on_miss),
                _ => None,
            };
            if let Some(flag) = flag {
                if inline.is_some() {
                    return Err(format!("{option} takes no value"));
                }
                *flag = true;
                continue;
            }
            let value = || {
                let value = inline.or_else(|| args.next());
                value.ok_or_else(|| format!("{option} needs a value"))
            };
            match (verb, option) {
                (_, "--socket") => all.socket = Some(value()?.into()),
                ("restore", "--key") => all.key = value()?,
                ("restore", "--restore-keys") => all.restore_keys.push(value()?),
                ("restore", "--save") => all.save = Some(value()?),
                ("restore", "--path") => all.paths.push(value()?.into()),
                _ => return Err(format!("{verb} has no option {option}")),
            }
        }
        if !all.help {
            all.check_words(verb)?;
        }
        Ok(all)
    }

    fn check_words(&self, verb: &str) -> Result<(), String> {
        let words: Vec<_> = self.words.iter().map(String::as_str).collect();
        match (verb, &words[..]) {
            ("status", []) | ("verdict", ["success" | "failure"]) => Ok(()),
            ("status", [word, ..]) => Err(format!("status takes no argument: {word:?}")),
            ("verdict", _) => Err("verdict is success or failure".to_owned()),
            (_, []) => Err(format!("{verb} needs the name of a cache")),
            ("restore" | "discard", [_, word, ..]) => {
                Err(format!("{verb} takes one name: {word:?} is one more"))
            }
            // On a line of the protocol it would be more than one word.
            (_, [name, ..]) if name.is_empty() || name.contains(is_space_or_control) => Err(
                format!("{name:?} is no name of a cache: it has no white space"),
            ),
            _ => Ok(()),
        }
    }

    /// The request of each verb.
    fn request(&self, verb: &str) -> String {
        match verb {
            "restore" => self.mount(),
            _ => format!("{verb} {}\n", terms(&self.words.join(" "))),
        }
    }

    fn mount(&self) -> String {
        let mut text = format!("mount {}\n", self.words[0]) + &self.criteria();
        let tags = terms(self.save.as_ref().unwrap_or(&self.key));
        if !tags.is_empty() {
            text += &format!("< {tags}\n");
        }
        text
    }

    fn lookup(&self) -> String {
        format!("lookup\n{}", self.criteria())
    }

    fn criteria(&self) -> String {
        let others = self.restore_keys.iter();
        let others = others.flat_map(|keys| keys.split([';', '\n']));
        let all = std::iter::once(&*self.key).chain(others).map(terms);
        let lines = all.filter(|terms| !terms.is_empty());
        lines.map(|terms| format!("> {terms}\n")).collect()
    }

    fn socket(&self) -> PathBuf {
        let named = self.socket.clone();
        named
            .or_else(|| Some(env::var_os(SOCKET_VARIABLE)?.into()))
            .or_else(|| {
                let program = env::current_exe().ok()?;
                let beside = program.parent()?.parent()?.join("socket");
                beside.exists().then_some(beside)
            })
            .unwrap_or_else(|| USUAL_SOCKET.into())
    }
}

fn is_space_or_control(c: char) -> bool {
    c.is_whitespace() || c.is_control()
}

/// Words on one line.
fn terms(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
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
            let why = "the cache is mounted, but not seen at";
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
                Failure::NoJob(format!("there is no job volume here: {why}"))
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
            "the daemon gave no answer{}",
            read.map_or_else(|error| format!(": {error}"), |_| String::new())
        ))),
    }
}

/// What the daemon answered: its lines, the last of which begins with `ok`.
#[derive(Debug)]
struct Answer {
    text: String,
}

impl Answer {
    /// Whether a criterion matched.
    fn is_hit(&self) -> bool {
        let pairs = Pairs::of(self.text.lines().last().unwrap_or_default());
        matches!(pairs.get("restored"), Some("exact" | "fallback"))
    }

    /// The answer to `verb` as one line of JSON.
    fn json(&self, verb: &str) -> String {
        let lines: Vec<_> = self.text.lines().collect();
        let (last, others) = lines.split_last().expect("it has been seen to be there");
        let pairs = Pairs::of(last);
        let source = others
            .last()
            .map(|line| quoted(&line.replacen(' ', "/", 1)));
        let source = source.unwrap_or_else(|| "null".to_owned());
        let members = match verb {
            "restore" => format!(
                "\"source\":{source},{},\"ms\":{},\"path\":{}",
                pairs.restored(),
                pairs.number("ms"),
                pairs.string("path")
            ),
            "save" => format!(
                "\"source\":{source},\"saved\":{},\"tags\":{},\"ms\":{}",
                pairs.string("saved"),
                pairs.list("tags", "[]"),
                pairs.number("ms")
            ),
            "discard" => format!("\"discarded\":{}", pairs.string("discarded")),
            "status" => {
                let mounts = others.iter().map(|line| {
                    let pairs = Pairs::of(line);
                    format!("{{{},\"path\":{}}}", pairs.restored(), pairs.string("path"))
                });
                let mounts = mounts.collect::<Vec<_>>().join(",");
                let verdict = pairs.string("verdict");
                format!("\"mounts\":[{mounts}],\"verdict\":{verdict}")
            }
            _ => format!("\"verdict\":{}", pairs.string("verdict")),
        };
        format!("{{\"ok\":true,{members}}}")
    }
}

/// The `KEY=VALUE` of a line, after its first word.
struct Pairs<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Pairs<'a> {
    fn of(line: &'a str) -> Self {
        let mut pairs = Vec::new();
        let mut rest = line.split_once(' ').map_or("", |(_, rest)| rest);
        while let Some((key, after)) = rest.split_once('=') {
            // A path comes last, and may have spaces.
            let (value, others) = match key {
                "path" | "discarded" => (after, ""),
                _ => after.split_once(' ').unwrap_or((after, "")),
            };
            pairs.push((key, value));
            rest = others;
        }
        Self(pairs)
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        let found = self.0.iter().find(|(name, _)| *name == key);
        found.map(|(_, value)| *value)
    }

    fn string(&self, key: &str) -> String {
        self.get(key).map_or_else(|| "null".to_owned(), quoted)
    }

    fn number(&self, key: &str) -> &'a str {
        let is_number = |text: &&str| text.parse::<u64>().is_ok();
        self.get(key).filter(is_number).unwrap_or("null")
    }

    fn list(&self, key: &str, none: &str) -> String {
        let items = |text: &str| text.split(',').map(quoted).collect::<Vec<_>>().join(",");
        let list = self.get(key).map(|text| format!("[{}]", items(text)));
        list.unwrap_or_else(|| none.to_owned())
    }

    /// What was restored, as members of an object.
    fn restored(&self) -> String {
        format!(
            "\"restored\":{},\"criterion\":{},\"tags\":{},\"age\":{}",
            self.string("restored"),
            self.list("criterion", "null"),
            self.list("tags", "[]"),
            self.number("age")
        )
    }
}

/// A string of JSON (RFC 8259, section 7).
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\0'..='\x1f' => out += &format!("\\u{:04x}", u32::from(c)),
            _ => out.push(c),
        }
    }
    out + "\""
}

/// A path that becomes a link to a cache.
#[derive(Debug)]
struct Link {
    /// With no link on the way to its last name.
    path: PathBuf,
    to: PathBuf,
}

/// The links to the cache at `at`, or to directories in it where they are several.
fn links(paths: &[PathBuf], at: &Path, job: &Path) -> Result<Vec<Link>, Failure> {
    let mut links: Vec<Link> = Vec::new();
    for given in paths {
        let refused = |why: &str| Failure::Failed(format!("--path {}: {why}", given.display()));
        let path = resolved(given).map_err(|error| refused(&error.to_string()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let to = match paths.len() {
            1 => at.to_owned(),
            _ => at.join(format!("{}-{name}", links.len())),
        };
        if path.starts_with(job) || job.starts_with(&path) {
            let why = format!("the job volume is at {}", job.display());
            return Err(refused(&why));
        }
        let overlaps =
            |other: &&Link| path.starts_with(&other.path) || other.path.starts_with(&path);
        if let Some(other) = links.iter().find(overlaps) {
            let why = format!("{} is to be a link too", other.path.display());
            return Err(refused(&why));
        }
        links.push(Link { path, to });
    }
    Ok(links)
}

/// The path with all links on the way to its last name followed; not all of it needs to be there.
fn resolved(path: &Path) -> io::Result<PathBuf> {
    let bad = |why| Err(io::Error::new(ErrorKind::InvalidInput, why));
    let path: PathBuf = env::current_dir()?.join(path).components().collect();
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return bad("it does not end in a name");
    };
    for there in dir.ancestors() {
        let rest = dir.strip_prefix(there).expect("an ancestor");
        match there.canonicalize() {
            Ok(_) if rest.components().any(|name| name == Component::ParentDir) => {
                return bad("it has .. after a directory that is not there");
            }
            Ok(there) => return Ok(there.join(rest).join(name)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the root is there")
}

impl Link {
    /// Finds what is in the way. `true`: the link is there already.
    fn check(&self) -> Result<bool, Failure> {
        let refused = |why: &str| {
            let path = self.path.display();
            Err(Failure::Failed(format!("{path} {why}: it stays as it is")))
        };
        let there = match fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            other => other.map_err(failed(&self.path))?,
        };
        if there.is_symlink() {
            let to = fs::read_link(&self.path).map_err(failed(&self.path))?;
            if to == self.to {
                return Ok(true);
            }
            return refused(&format!("is a link to {}", to.display()));
        }
        if !there.is_dir() {
            return refused("is not a directory");
        }
        let around = self.path.parent().and_then(|dir| fs::metadata(dir).ok());
        if around.is_some_and(|around| around.dev() != there.dev()) {
            return refused("is a mount");
        }
        match immovable(&self.path, there.dev()).map_err(failed(&self.path))? {
            Some(why) => refused(&format!("has {why} in it")),
            None => Ok(false),
        }
    }

    fn make(&self) -> Result<(), Failure> {
        if self.check()? {
            return Ok(());
        }
        let made = || -> io::Result<()> {
            let (Some(dir), Some(name)) = (self.path.parent(), self.path.file_name()) else {
                unreachable!("it was resolved");
            };
            fs::create_dir_all(dir)?;
            // Made first, and moved into place at the end: where that cannot be done nothing is.
            let new = format!(".{}.{}", name.to_string_lossy(), process::id());
            let new = dir.join(new);
            symlink(&self.to, &new)?;
            self.adopt()
                .and_then(|()| fs::rename(&new, &self.path))
                .inspect_err(|_| drop(fs::remove_file(&new)))
        };
        made().map_err(failed(&self.path))
    }

    /// Moves what a directory in the link's place holds to where the link leads.
    fn adopt(&self) -> io::Result<()> {
        let is_dir = self.path.is_dir();
        if is_dir {
            let mut copy = Copy::default();
            copy.all(&self.path, &self.to)
                .inspect_err(|_| copy.undo())?;
        } else if let Err(error) = fs::create_dir(&self.to)
            && error.kind() != ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        if !fs::symlink_metadata(&self.to)?.is_dir() {
            let why = format!("{} in the cache is not a directory", self.to.display());
            return Err(io::Error::new(ErrorKind::NotADirectory, why));
        }
        if is_dir {
            fs::remove_dir_all(&self.path)?;
        }
        Ok(())
    }
}

/// What in a directory on `device` cannot be moved, if anything.
fn immovable(dir: &Path, device: u64) -> io::Result<Option<String>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, there) = (entry.path(), entry.metadata()?);
        if there.is_dir() {
            if there.dev() != device {
                return Ok(Some(format!("a mount ({})", path.display())));
            }
            if let Some(found) = immovable(&path, device)? {
                return Ok(Some(found));
            }
        } else if !there.is_file() && !there.is_symlink() {
            let what = "what is no file, directory or link";
            return Ok(Some(format!("{what} ({})", path.display())));
        }
    }
    Ok(None)
}

/// A copy of a directory into another, where what is there already stays. Owners are kept as far as this
/// user may; extended attributes are not.
#[derive(Debug, Default)]
struct Copy {
    made: Vec<PathBuf>,
    /// Files with several names, and the first of each that was copied.
    names: HashMap<(u64, u64), PathBuf>,
}

impl Copy {
    fn all(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let old = fs::symlink_metadata(from)?;
        let is_new = match fs::symlink_metadata(to) {
            Ok(there) if there.is_dir() && old.is_dir() => false,
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        if is_new {
            self.made.push(to.to_owned());
        }
        if old.is_dir() {
            if is_new {
                fs::create_dir(to)?;
            }
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                self.all(&entry.path(), &to.join(entry.file_name()))?;
            }
        } else if old.is_symlink() {
            symlink(fs::read_link(from)?, to)?;
        } else if let Some(first) = self.names.get(&(old.dev(), old.ino())) {
            return fs::hard_link(first, to);
        } else {
            fs::copy(from, to)?;
            if old.nlink() > 1 {
                self.names.insert((old.dev(), old.ino()), to.to_owned());
            }
        }
        if is_new { dress(to, &old) } else { Ok(()) }
    }

    fn undo(&self) {
        for made in self.made.iter().rev() {
            let _ = fs::remove_file(made).or_else(|_| fs::remove_dir(made));
        }
    }
}

/// Gives a copy the owner, mode and times of what it was made of.
fn dress(copy: &Path, of: &Metadata) -> io::Result<()> {
    let _ = lchown(copy, Some(of.uid()), Some(of.gid()));
    if of.is_symlink() {
        return Ok(());
    }
    // Opened before its mode may forbid that.
    let file = File::open(copy)?;
    file.set_permissions(of.permissions())?;
    let times = FileTimes::new().set_accessed(of.accessed()?);
    file.set_times(times.set_modified(of.modified()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn parse(line: &[&str]) -> Result<Args, String> {
        let args: Vec<_> = line[1..].iter().map(OsString::from).collect();
        Args::parse(line[0], &args)
    }

    #[test]
    fn requests() {
        for (line, want) in [
            (&["restore", "cargo"][..], "mount cargo\n"),
            (
                &[
                    "restore",
                    "cargo",
                    "--key",
                    "linux dc5e8c",
                    "--restore-keys",
                    "linux main; linux-*",
                ],
                "mount cargo\n> linux dc5e8c\n> linux main\n> linux-*\n< linux dc5e8c\n",
            ),
            (
                &[
                    "restore",
                    "--restore-keys=a\n b\t c ;;\n",
                    "--restore-keys",
                    "d",
                    "--json",
                    "x/y",
                ],
                "mount x/y\n> a\n> b c\n> d\n",
            ),
            (
                &["restore", "x", "--key", "a\nb", "--save", ""],
                "mount x\n> a b\n",
            ),
            (&["restore", "x", "--save=c  d"], "mount x\n< c d\n"),
            (&["restore", "--", "-x"], "mount -x\n"),
            (&["save", "x"], "save x\n"),
            (&["save", "x", "a b", "c\nd"], "save x a b c d\n"),
            (&["discard", "x"], "discard x\n"),
            (&["status", "--json"], "status \n"),
            (&["verdict", "failure"], "verdict failure\n"),
        ] {
            let args = parse(line).unwrap_or_else(|why| panic!("{line:?}: {why}"));
            assert_eq!(args.request(line[0]), want, "{line:?}");
        }
        let args = parse(&[
            "restore",
            "x",
            "--key",
            "a",
            "--restore-keys",
            "b",
            "--lookup-only",
        ]);
        assert_eq!(args.unwrap().lookup(), "lookup\n> a\n> b\n");
    }

    #[test]
    fn usage() {
        for (line, words) in [
            (&["restore"][..], "needs the name"),
            (&["restore", "a", "b"], "one name"),
            (&["restore", ""], "white space"),
            (&["restore", "a b"], "white space"),
            (&["save", "a\nverdict"], "white space"),
            (&["discard", "a\u{7}"], "white space"),
            (&["discard"], "needs the name"),
            (
                &["discard", "a", "--key", "b"],
                "discard has no option --key",
            ),
            (&["restore", "a", "--key"], "--key needs a value"),
            (&["restore", "a", "-k"], "no option -k"),
            (&["restore", "a", "--json=yes"], "takes no value"),
            (&["status", "a"], "no argument"),
            (&["verdict"], "success or failure"),
            (&["verdict", "maybe"], "success or failure"),
            (&["verdict", "success", "failure"], "success or failure"),
        ] {
            let why = parse(line).expect_err(&format!("{line:?}"));
            assert!(why.contains(words), "{line:?}: {why}");
        }
        for verb in ["restore", "save", "discard", "status", "verdict"] {
            assert!(parse(&[verb, "--help"]).unwrap().help);
            assert!(help_of(verb).unwrap().contains("--socket PATH"));
        }
    }

    #[test]
    fn answers() {
        for (verb, text, want) in [
            (
                "restore",
                "vg friend-1\nok restored=exact criterion=dc5e8c,linux tags=a=b,dc5e8c,linux age=5 ms=12 path=/run/x/a b=c",
                json!({"ok": true, "source": "vg/friend-1", "restored": "exact", "criterion": ["dc5e8c", "linux"],
                       "tags": ["a=b", "dc5e8c", "linux"], "age": 5, "ms": 12, "path": "/run/x/a b=c"}),
            ),
            (
                "restore",
                "vg friend-1\nok restored=base age=77",
                json!({"ok": true, "source": "vg/friend-1", "restored": "base", "criterion": null,
                       "tags": [], "age": 77, "ms": null, "path": null}),
            ),
            (
                "restore",
                "ok restored=scratch ms=1 path=/é\"\\",
                json!({"ok": true, "source": null, "restored": "scratch", "criterion": null,
                       "tags": [], "age": null, "ms": 1, "path": "/é\"\\"}),
            ),
            (
                "save",
                "vg friend-2\nok saved=friend-2 tags=a,b ms=3",
                json!({"ok": true, "source": "vg/friend-2", "saved": "friend-2", "tags": ["a", "b"], "ms": 3}),
            ),
            (
                "discard",
                "ok discarded=/run/x/a b",
                json!({"ok": true, "discarded": "/run/x/a b"}),
            ),
            (
                "status",
                "mount restored=fallback criterion=li* tags=linux age=1 path=/x/a b\nmount restored=empty path=/x/c\nok mounts=2 verdict=unknown",
                json!({"ok": true, "verdict": "unknown", "mounts": [
                    {"restored": "fallback", "criterion": ["li*"], "tags": ["linux"], "age": 1, "path": "/x/a b"},
                    {"restored": "empty", "criterion": null, "tags": [], "age": null, "path": "/x/c"}]}),
            ),
            (
                "status",
                "ok mounts=0 verdict=failure",
                json!({"ok": true, "verdict": "failure", "mounts": []}),
            ),
            (
                "verdict",
                "ok verdict=success",
                json!({"ok": true, "verdict": "success"}),
            ),
        ] {
            let line = Answer {
                text: text.to_owned(),
            }
            .json(verb);
            assert!(!line.contains('\n'), "{line}");
            let got: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(got, want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn strings_come_back(text in "\\PC*|[\0-\u{ff}\"\\\\]*") {
            let back: Value = serde_json::from_str(&quoted(&text)).unwrap();
            prop_assert_eq!(back, Value::from(text));
        }

        #[test]
        fn whatever_is_answered_is_json(text in "(ok |mount |[a-z]+=|path=|[ -~é\n\"\\\\])*", verb in 0..5_usize) {
            let verb = ["restore", "save", "discard", "status", "verdict"][verb];
            let line = Answer { text: format!("{text}\nok x") }.json(verb);
            prop_assert!(serde_json::from_str::<Value>(&line).is_ok(), "{}", line);
        }
    }

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

    /// A place with `cache`, a cache, in `job`, a job volume.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(place.at("job/cache")).unwrap();
            place
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().canonicalize().unwrap().join(path)
        }

        /// Makes `paths` links to the cache, if nothing is in the way.
        fn links(&self, paths: &[&str]) -> Result<(), String> {
            let paths: Vec<_> = paths.iter().map(|path| self.at(path)).collect();
            let made = links(&paths, &self.at("job/cache"), &self.at("job")).and_then(|links| {
                for link in &links {
                    link.check()?;
                }
                links.iter().try_for_each(Link::make)
            });
            made.map_err(|why| why.to_string())
        }

        fn write(&self, path: &str, text: &str) {
            fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
            fs::write(self.at(path), text).unwrap();
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.at(path)).unwrap_or_default()
        }
    }

    #[test]
    fn links_to_a_cache() {
        let place = Place::new();
        // Nothing there, its parents neither; then the link is.
        for _ in 0..2 {
            place.links(&["home/.cargo/registry"]).unwrap();
            assert_eq!(
                fs::read_link(place.at("home/.cargo/registry")).unwrap(),
                place.at("job/cache")
            );
        }
        // An empty directory.
        fs::create_dir(place.at("empty")).unwrap();
        place.links(&["empty/."]).unwrap();
        assert!(place.at("empty").is_symlink());
        // One with content: what was restored stays.
        place.write("job/cache/old", "restored");
        place.write("job/cache/sub/old", "restored");
        place.write("job/cache/dir/x", "restored");
        symlink("old", place.at("job/cache/link")).unwrap();
        place.write("full/old", "lost");
        place.write("full/sub/old", "lost");
        place.write("full/sub/new", "moved");
        place.write("full/dir", "a file, where a directory was restored");
        place.write("full/link/x", "a directory, where a link was restored");
        place.write("full/more/.hidden", "moved");
        fs::set_permissions(
            place.at("full/more/.hidden"),
            fs::Permissions::from_mode(0o400),
        )
        .unwrap();
        fs::set_permissions(place.at("full/more"), fs::Permissions::from_mode(0o2500)).unwrap();
        fs::hard_link(place.at("full/sub/new"), place.at("full/twin")).unwrap();
        symlink("../nowhere", place.at("full/more-link")).unwrap();
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for name in ["full/sub/new", "full/more"] {
            File::open(place.at(name))
                .unwrap()
                .set_modified(then)
                .unwrap();
        }
        place.links(&["full"]).unwrap();
        assert_eq!(
            fs::read_link(place.at("full")).unwrap(),
            place.at("job/cache")
        );
        for (path, want) in [
            ("full/old", "restored"),
            ("full/sub/old", "restored"),
            ("full/sub/new", "moved"),
            ("full/twin", "moved"),
            ("full/dir/x", "restored"),
            ("full/link", "restored"),
            ("full/more/.hidden", "moved"),
        ] {
            assert_eq!(place.read(path), want, "{path}");
        }
        let metadata = |path| fs::symlink_metadata(place.at(path)).unwrap();
        assert_eq!(metadata("full/twin").ino(), metadata("full/sub/new").ino());
        assert_eq!(metadata("full/more").mode() & 0o7777, 0o2500);
        assert_eq!(metadata("full/more/.hidden").mode() & 0o7777, 0o400);
        assert_eq!(
            fs::read_link(place.at("full/more-link")).unwrap(),
            Path::new("../nowhere")
        );
        for path in ["full/more", "full/sub/new"] {
            assert_eq!(metadata(path).modified().unwrap(), then, "{path}");
        }
        let left = fs::read_dir(place.at(".")).unwrap().count();
        assert_eq!(left, 4, "job, home, empty, full, and nothing half-made");
    }

    #[test]
    fn links_to_directories_of_a_cache() {
        let place = Place::new();
        place.write("job/cache/1-git/x", "restored");
        place.write("git/x", "lost");
        place.write("bin/y", "moved");
        fs::set_permissions(place.at("bin"), fs::Permissions::from_mode(0o700)).unwrap();
        place.links(&["a/registry", "git", "bin"]).unwrap();
        for (path, to) in [
            ("a/registry", "0-registry"),
            ("git", "1-git"),
            ("bin", "2-bin"),
        ] {
            let to = place.at("job/cache").join(to);
            assert_eq!(fs::read_link(place.at(path)).unwrap(), to);
            assert!(fs::symlink_metadata(to).unwrap().is_dir());
        }
        assert_eq!(place.read("git/x"), "restored");
        assert_eq!(place.read("bin/y"), "moved");
        assert_eq!(fs::metadata(place.at("bin")).unwrap().mode() & 0o777, 0o700);
        // A cache that has something else there leads nowhere.
        let place = Place::new();
        symlink("/etc", place.at("job/cache/0-a")).unwrap();
        let why = place.links(&["a", "b"]).unwrap_err();
        assert!(why.contains("0-a"), "{why}");
    }

    #[test]
    fn paths_that_stay_as_they_are() {
        let place = Place::new();
        place.write("file", "file");
        place.write("with-socket/x", "x");
        symlink("file", place.at("link")).unwrap();
        symlink("job", place.at("link-to-job")).unwrap();
        let _socket = UnixListener::bind(place.at("with-socket/socket")).unwrap();
        for (paths, words) in [
            (&["file"][..], "not a directory"),
            (&["link"], "is a link to file"),
            (&["with-socket"], "no file, directory or link"),
            (&["fresh", "file"], "not a directory"),
            (&["file/x"], "Not a directory"),
            (&["job"], "job volume"),
            (&["job/x"], "job volume"),
            (&["link-to-job/new/x"], "job volume"),
            (&["new/../../x"], ".. after"),
            (&["job/.."], "end in a name"),
            (&[""], "job volume"),
            (&["a", "b", "a/c"], "a link too"),
            (&["a/b/c", "a/b"], "a link too"),
        ] {
            let why = place.links(paths).expect_err(&format!("{paths:?}"));
            assert!(why.contains(words), "{paths:?}: {why}");
        }
        assert!(
            !place.at("fresh").exists(),
            "refused before anything is done"
        );
        assert_eq!(place.read("with-socket/x"), "x");
        assert_eq!(fs::read_dir(place.at("job/cache")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(place.at(".")).unwrap().count(), 5);
        assert!(resolved(Path::new("/")).is_err());
    }
}
