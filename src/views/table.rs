// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tables for people.

use std::io::{self, IsTerminal as _};

use anstyle::Style;
use terminal_size::terminal_size;

/// What headings are set in.
const HEAD: Style = Style::new().bold();

/// How wide the terminal is; `None` where there is none, so that nothing is cut.
pub fn width() -> Option<usize> {
    let (width, _) = io::stdout().is_terminal().then(terminal_size).flatten()?;
    Some(usize::from(width.0))
}

/// Lines in columns as wide as their longest cell, below bold headings. With a width, each line is
/// cut to it.
pub fn table<const N: usize>(
    heads: [&str; N],
    lines: impl IntoIterator<Item = [String; N]>,
    width: Option<usize>,
) -> String {
    let lines: Vec<_> = std::iter::once(heads.map(String::from))
        .chain(lines)
        .collect();
    let mut widths = [0; N];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    widths[N - 1] = 0;
    let mut text = String::new();
    for (n, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(widths);
        let cells: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        let mut out = cells.join("  ");
        if let Some(width) = width
            && out.chars().count() > width
        {
            out = out.chars().take(width.saturating_sub(1)).collect();
            out.push('…');
        }
        let out = out.trim_end();
        text.push_str(&match n {
            0 => format!("{HEAD}{out}{HEAD:#}\n"),
            _ => format!("{out}\n"),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_are_cut() {
        let lines = [["1", "├─● linux"], ["22222", ""]].map(|line| line.map(String::from));
        let plain = |width| {
            let text = table(["A", "LINEAGE"], lines.clone(), width);
            anstream::adapter::strip_str(&text).to_string()
        };
        assert_eq!(plain(None), "A      LINEAGE\n1      ├─● linux\n22222\n");
        assert_eq!(plain(Some(12)), "A      LINE…\n1      ├─● …\n22222\n");
    }
}
