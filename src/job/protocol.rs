// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a job asks for on its job volume's socket, and the answers: the original script's lines, parsed one by one.
//!
//! ```text
//! mount cargo
//! > linux dc5e8c
//! > linux
//! < linux dc5e8c
//! ```
//!
//! A blank line, the end of input or the next verb ends a request. The client writes them too ([`super::client`]), and
//! reads the answers; it has none of this crate in it, as it is compiled alone.

use crate::cache::criteria::{BadCriteria, Criterion, Term};
use crate::cache::names::Tag;
use crate::engine::LateView;
use crate::text::{printable, shortened};

/// What a request may hold at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Criteria of one request.
    pub criteria: usize,
    /// Terms and tags of one request together.
    pub terms: usize,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Mount the best entry.
    Mount {
        /// Where, as the job wrote it.
        path: String,
        /// What to restore from; none: what the job volume says.
        criteria: Vec<Criterion>,
        /// Tags of what is published at the end, beside the job volume's.
        save: Vec<Tag>,
    },
    /// Say what a mount would restore.
    Lookup {
        /// As above.
        criteria: Vec<Criterion>,
    },
    /// Publish what a mount holds now.
    Save {
        /// The mount, as the job wrote it.
        path: String,
        /// Tags of what is published; none: those of the mount.
        tags: Vec<Tag>,
    },
    /// Do not publish what a mount holds at the end.
    Discard {
        /// The mount, as the job wrote it.
        path: String,
    },
    /// Say what is mounted.
    Status,
    /// How the job's work ended.
    Verdict {
        /// It succeeded.
        success: bool,
    },
}

/// What one line made complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// A request.
    Request(Request),
    /// A request that is refused, and why.
    Refused(String),
    /// There will be no more.
    Bye,
}

/// Puts requests together out of lines.
#[derive(Debug)]
pub struct Parser {
    limits: Limits,
    pending: Option<Pending>,
    /// Blank lines since the last other one.
    blanks: u32,
}

/// A request of several lines that has not ended yet.
#[derive(Debug)]
struct Pending {
    /// `None` for a lookup.
    path: Option<String>,
    criteria: Vec<Criterion>,
    save: Vec<Tag>,
    terms: usize,
    /// What is wrong with it. It is answered when it ends, as all are.
    fault: Option<String>,
}

impl Parser {
    /// A parser at the beginning of a connection.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pending: None,
            blanks: 0,
        }
    }

    /// Whether a request has begun and not ended.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Takes a line, with or without what ends it.
    pub fn line(&mut self, line: &[u8]) -> Vec<Said> {
        let text = String::from_utf8_lossy(line);
        let text = text.trim();
        if text.is_empty() {
            self.blanks += 1;
            let bye = (self.blanks > 1).then_some(Said::Bye);
            return self.end().into_iter().chain(bye).collect();
        }
        self.blanks = 0;
        let (word, rest) = text
            .split_once(char::is_whitespace)
            .map_or((text, ""), |(word, rest)| (word, rest.trim()));
        // As the original took it: `>linux` too.
        let (word, rest) = match text.as_bytes()[0] {
            b'>' | b'<' => (&text[..1], text[1..].trim()),
            _ => (word, rest),
        };
        match word {
            ">" | "<" => {
                self.detail(word == ">", rest);
                Vec::new()
            }
            "mount" | "lookup" => {
                let ended = self.end();
                let path = (word == "mount").then(|| rest.to_owned());
                let fault = match (word, rest) {
                    ("mount", "") => Some("mount needs a path".to_owned()),
                    ("lookup", rest) if !rest.is_empty() => {
                        Some("lookup takes no path: it mounts nothing".to_owned())
                    }
                    _ => None,
                };
                self.pending = Some(Pending {
                    path,
                    criteria: Vec::new(),
                    save: Vec::new(),
                    terms: 0,
                    fault,
                });
                ended.into_iter().collect()
            }
            _ => {
                let ended = self.end();
                ended
                    .into_iter()
                    .chain([self.one_line(word, rest)])
                    .collect()
            }
        }
    }

    /// Takes the end of input, or of a request.
    pub fn end(&mut self) -> Option<Said> {
        let pending = self.pending.take()?;
        Some(match pending {
            Pending {
                fault: Some(fault), ..
            } => Said::Refused(fault),
            Pending {
                path: Some(path),
                criteria,
                save,
                ..
            } => Said::Request(Request::Mount {
                path,
                criteria,
                save,
            }),
            Pending { criteria, .. } => Said::Request(Request::Lookup { criteria }),
        })
    }

    fn one_line(&self, word: &str, rest: &str) -> Said {
        let (first, others) = rest
            .split_once(char::is_whitespace)
            .map_or((rest, ""), |(first, others)| (first, others.trim()));
        let request = match word {
            "bye" => return Said::Bye,
            "status" => Ok(Request::Status),
            "save" if !first.is_empty() => match tags(others) {
                Ok(tags) if tags.len() <= self.limits.terms => Ok(Request::Save {
                    path: first.to_owned(),
                    tags,
                }),
                Ok(_) => Err(self.too_many()),
                Err(error) => Err(error),
            },
            "discard" if !rest.is_empty() => Ok(Request::Discard {
                path: rest.to_owned(),
            }),
            "save" | "discard" => Err(format!("{word} needs the name of a mount")),
            "verdict" => match rest {
                "success" | "failure" => Ok(Request::Verdict {
                    success: rest == "success",
                }),
                _ => Err("verdict is success or failure".to_owned()),
            },
            _ => Err(format!(
                "{:?} is no request: write mount, lookup, save, discard, status, verdict or bye",
                shortened(word)
            )),
        };
        request.map_or_else(Said::Refused, Said::Request)
    }

    /// A line of criteria or save tags.
    fn detail(&mut self, restore: bool, text: &str) {
        let too_many = self.too_many();
        let limits = self.limits;
        // Without a request, it makes one that is refused.
        let pending = self.pending.get_or_insert_with(|| Pending {
            path: None,
            criteria: Vec::new(),
            save: Vec::new(),
            terms: 0,
            fault: Some("a line of terms or tags without a mount or lookup before it".to_owned()),
        });
        if pending.fault.is_some() {
            return;
        }
        pending.terms += text.split_whitespace().count();
        let added = if pending.terms > limits.terms {
            Err(too_many.clone())
        } else if restore {
            let terms = text.split_whitespace().map(Term::of_job);
            terms
                .collect::<Result<Vec<_>, BadCriteria>>()
                .map(|terms| pending.criteria.extend(Criterion::new(terms)))
                .map_err(|error| error.to_string())
        } else if pending.path.is_none() {
            Err("lookup publishes nothing: it takes no tags".to_owned())
        } else {
            tags(text).map(|tags| pending.save.extend(tags))
        };
        pending.fault = match added {
            Err(fault) => Some(fault),
            Ok(()) if pending.criteria.len() > limits.criteria => Some(too_many),
            Ok(()) => None,
        };
    }

    fn too_many(&self) -> String {
        let Limits { criteria, terms } = self.limits;
        format!("a request has at most {criteria} criteria, and {terms} terms and tags in all")
    }
}

fn tags(text: &str) -> Result<Vec<Tag>, String> {
    let tag = |word: &str| match Term::of_job(word) {
        // `*` stands at no tag's end.
        Ok(Term::Exact(tag)) => Ok(tag),
        Ok(Term::Prefix(prefix)) => Ok(format!("{prefix}-").parse().expect("letters of tags")),
        Err(error) => Err(error.to_string()),
    };
    text.split_whitespace().map(tag).collect()
}

/// The answer to what is refused or failed.
pub(super) fn error(why: &str) -> String {
    format!("error {}\n", printable(why))
}

/// Tags in an answer.
pub(super) fn list(tags: &[Tag]) -> String {
    let tags: Vec<_> = tags.iter().map(Tag::as_str).collect();
    tags.join(",")
}

/// The pairs that say what was restored.
pub(super) fn told(view: &LateView) -> String {
    let mut text = format!("restored={}", view.restored);
    if let Some(criterion) = &view.criterion {
        text += &format!(" criterion={}", criterion.replace(' ', ","));
    }
    if !view.tags.is_empty() {
        text += &format!(" tags={}", list(&view.tags));
    }
    if let Some(age) = view.age {
        text += &format!(" age={age}");
    }
    if view.cut_off {
        text += " cut-off=1";
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::late_path::LatePath;

    const LIMITS: Limits = Limits {
        criteria: 3,
        terms: 6,
    };

    /// All that a connection with this input says, in short.
    fn said(input: &str) -> String {
        let mut parser = Parser::new(LIMITS);
        let mut all: Vec<Said> = Vec::new();
        for line in input.split('\n') {
            all.extend(parser.line(line.as_bytes()));
            if all.last() == Some(&Said::Bye) {
                break;
            }
        }
        all.extend(parser.end());
        let list = |tags: &[Tag]| tags.iter().map(Tag::as_str).collect::<Vec<_>>().join(",");
        let criteria = |criteria: &[Criterion]| {
            let each = criteria.iter().map(ToString::to_string);
            each.collect::<Vec<_>>().join(";")
        };
        let one = |said: &Said| match said {
            Said::Bye => "bye".to_owned(),
            Said::Refused(why) => format!("refused {}", why.split(':').next().unwrap()),
            Said::Request(Request::Mount {
                path,
                criteria: c,
                save,
            }) => format!("mount {path} >{} <{}", criteria(c), list(save)),
            Said::Request(Request::Lookup { criteria: c }) => format!("lookup >{}", criteria(c)),
            Said::Request(Request::Save { path, tags }) => format!("save {path} {}", list(tags)),
            Said::Request(Request::Discard { path }) => format!("discard {path}"),
            Said::Request(Request::Status) => "status".to_owned(),
            Said::Request(Request::Verdict { success }) => format!("verdict {success}"),
        };
        all.iter().map(one).collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn requests() {
        for (input, want) in [
            ("", ""),
            (
                "mount /c/cargo\n> linux dc5e8c\n> linux\n< linux dc5e8c",
                "mount /c/cargo >dc5e8c linux;linux <linux,dc5e8c",
            ),
            ("mount cargo", "mount cargo > <"),
            ("mount cargo\r\n> a\r\n< b\r\n", "mount cargo >a <b"),
            ("mount a b \n>x\n<y", "mount a b >x <y"),
            (
                "mount a\n\nmount b\n\n\nmount c",
                "mount a > < | mount b > < | bye",
            ),
            ("mount a\nmount b", "mount a > < | mount b > <"),
            ("mount a\n>\n<\n> x", "mount a >x <"),
            ("mount a\n> npm-* é:b*c", "mount a >-:b-c npm-* <"),
            ("mount a\n< npm-*", "mount a > <npm--"),
            ("status\nbye\nstatus", "status | bye"),
            (
                "save a x y\nsave a\ndiscard a",
                "save a x,y | save a  | discard a",
            ),
            (
                "verdict success\nverdict failure",
                "verdict true | verdict false",
            ),
            ("lookup\n> a", "lookup >a"),
            // Refused, each at its end.
            ("mount\n> a", "refused mount needs a path"),
            (
                "> a\n> b\n\nstatus",
                "refused a line of terms or tags without a mount or lookup before it | status",
            ),
            ("lookup x", "refused lookup takes no path"),
            ("lookup\n< a", "refused lookup publishes nothing"),
            ("dance\nstatus", "refused \"dance\" is no request | status"),
            (
                "save\ndiscard",
                "refused save needs the name of a mount | refused discard needs the name of a mount",
            ),
            ("verdict perhaps", "refused verdict is success or failure"),
            (
                "mount a\n> *\n> b",
                "refused \"*\" is not a tag or tag prefix",
            ),
            ("mount a\n> a\n> b\n> c", "mount a >a;b;c <"),
            (
                "mount a\n> a\n> b\n> c\n> d",
                "refused a request has at most 3 criteria, and 6 terms and tags in all",
            ),
            ("mount a\n> a b c\n< d e f", "mount a >a b c <d,e,f"),
            (
                "mount a\n> a b c d\n< d e f",
                "refused a request has at most 3 criteria, and 6 terms and tags in all",
            ),
            (
                "save a 1 2 3 4 5 6 7",
                "refused a request has at most 3 criteria, and 6 terms and tags in all",
            ),
        ] {
            assert_eq!(said(input), want, "{input:?}");
        }
    }

    proptest! {
        #[test]
        fn no_input_panics_or_leads_out(input in "(mount|lookup|save|discard|>|<|\\.\\.|/|[ -~é\r\n\t])*") {
            let mut parser = Parser::new(LIMITS);
            for line in input.split('\n') {
                for said in parser.line(line.as_bytes()) {
                    if let Said::Request(Request::Mount { path, .. }) = said
                        && let Ok(path) = LatePath::parse(&path, &[])
                    {
                        prop_assert!(!path.as_str().starts_with('/'));
                        prop_assert!(path.as_str().split('/').all(|name| !name.is_empty() && name != ".."));
                    }
                }
            }
        }
    }
}
