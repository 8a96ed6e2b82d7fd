// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon answers, and that as JSON.

/// What the daemon answered: its lines, the last of which begins with `ok`.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) text: String,
}

impl Answer {
    /// Whether a criterion matched.
    pub(super) fn is_hit(&self) -> bool {
        let pairs = Pairs::of(self.text.lines().last().unwrap_or_default());
        matches!(pairs.get("restored"), Some("exact" | "fallback"))
    }

    /// The answer to `verb` as one line of JSON.
    pub(super) fn json(&self, verb: &str) -> String {
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
pub(super) fn quoted(text: &str) -> String {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

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
}
