// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lineage as a picture: an SVG, drawn here.

use maud::{Markup, html};

use crate::cache::lineage::{Line, What};

/// From one line to the next, and from one column to the next, in pixels.
const LINE: usize = 24;
const COLUMN: usize = 18;

/// Where the first dot is, in pixels.
const MARGIN: usize = 12;

/// What a letter takes, in pixels: the style sheet has them set in 12 px, of one width.
const LETTER: usize = 8;

/// A line's text, and what it is.
pub struct Label {
    /// What is said of it.
    pub text: String,
    /// A class for its dot.
    pub class: &'static str,
}

/// Draws `lines`, each with its label. `title` says what it shows to those who do not see it.
pub fn picture(lines: &[Line<'_>], labels: &[Label], title: &str) -> Markup {
    let x = |line: &Line<'_>| MARGIN + line.column * COLUMN;
    let y = |at: usize| MARGIN + at * LINE;
    let width = lines
        .iter()
        .zip(labels)
        .map(|(line, label)| x(line) + 2 * MARGIN + label.text.chars().count() * LETTER)
        .max()
        .unwrap_or(0);
    let height = lines.len() * LINE;
    html! {
        svg xmlns="http://www.w3.org/2000/svg" width=(width) height=(height)
            viewBox={"0 0 " (width) " " (height)} role="img" aria-label=(title) {
            @for (at, line) in lines.iter().enumerate() {
                @if let Some(parent) = line.parent {
                    // Down its parent's column, then across to its own.
                    path d={"M" (x(&lines[parent])) " " (y(parent)) "V" (y(at)) "H" (x(line))} {}
                }
            }
            @for (at, (line, label)) in lines.iter().zip(labels).enumerate() {
                circle class=(label.class) cx=(x(line)) cy=(y(at))
                    r=(if matches!(line.what, What::Gone(_)) { 4 } else { 6 }) {}
                text x=(x(line) + MARGIN) y=(y(at) + 4) { (label.text) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::lineage::draw;

    #[test]
    fn a_branch() {
        let all = [("a", None), ("b", Some("a")), ("c", Some("a"))];
        let lines = draw(&all);
        let label = |text: &str| Label {
            text: text.into(),
            class: "entry",
        };
        let labels = ["a <& b", "b", "c"].map(label);
        let svg = picture(&lines, &labels, "three").into_string();
        for part in [
            "aria-label=\"three\"",
            "M12 12V36H30",
            "M12 12V60H12",
            "a &lt;&amp; b",
            "height=\"72\"",
        ] {
            assert!(svg.contains(part), "{part} is not in {svg}");
        }
    }
}
