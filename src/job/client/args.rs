// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of each verb, and the request that it becomes.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

/// Names the socket, where `--socket` does not.
const SOCKET_VARIABLE: &str = "LVM_CACHE_FRIEND_SOCKET";

/// Where it is if nothing else is known.
const USUAL_SOCKET: &str = "/run/lvm-cache-friend/socket";

/// The command line after the verb.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Args {
    /// NAME and what follows it, or the verdict.
    pub(super) words: Vec<String>,
    pub(super) help: bool,
    pub(super) json: bool,
    socket: Option<PathBuf>,
    key: String,
    restore_keys: Vec<String>,
    save: Option<String>,
    pub(super) paths: Vec<PathBuf>,
    pub(super) lookup_only: bool,
    pub(super) fail_on_miss: bool,
}

impl Args {
    pub(super) fn parse(verb: &str, args: &[OsString]) -> Result<Self, String> {
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
            ("verdict", _) => Err("the verdict is success or failure".to_owned()),
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
    pub(super) fn request(&self, verb: &str) -> String {
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

    pub(super) fn lookup(&self) -> String {
        format!("lookup\n{}", self.criteria())
    }

    fn criteria(&self) -> String {
        let others = self.restore_keys.iter();
        let others = others.flat_map(|keys| keys.split([';', '\n']));
        let all = std::iter::once(&*self.key).chain(others).map(terms);
        let lines = all.filter(|terms| !terms.is_empty());
        lines.map(|terms| format!("> {terms}\n")).collect()
    }

    pub(super) fn socket(&self) -> PathBuf {
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

#[cfg(test)]
mod tests {
    use super::super::help_of;
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
}
