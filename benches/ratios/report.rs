// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Medians, spreads, ratios and the goals beside them.

use std::time::Duration;

/// What a figure is to be.
#[derive(Clone, Copy)]
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
    /// Shown for what it tells.
    None,
}

impl Goal {
    fn of(self, value: f64) -> String {
        let (sign, goal, met) = match self {
            Self::AtMost(goal) => ("≤", goal, value <= goal),
            Self::AtLeast(goal) => ("≥", goal, value >= goal),
            Self::None => return String::new(),
        };
        format!("{sign} {goal}{}", if met { "" } else { "  MISSED" })
    }
}

/// Two things, measured in turns.
pub struct Ratio {
    names: [&'static str; 2],
    times: [Vec<f64>; 2],
}

impl Ratio {
    pub const fn new(one: &'static str, other: &'static str) -> Self {
        Self {
            names: [one, other],
            times: [Vec::new(), Vec::new()],
        }
    }

    pub fn one(&mut self, took: Duration) {
        self.times[0].push(took.as_secs_f64());
    }

    pub fn other(&mut self, took: Duration) {
        self.times[1].push(took.as_secs_f64());
    }

    /// A line for each of the two, and their medians' ratio.
    pub fn print(mut self, goal: Goal) {
        for times in &mut self.times {
            times.sort_by(f64::total_cmp);
        }
        let median = |times: &[f64]| {
            let half = times.len() / 2;
            if times.len() % 2 == 1 {
                times[half]
            } else {
                (times[half - 1] + times[half]) / 2.0
            }
        };
        let ratio = median(&self.times[0]) / median(&self.times[1]);
        let digits = match ratio {
            0.0..0.1 => 3,
            0.1..10.0 => 2,
            _ => 0,
        };
        for (n, times) in self.times.iter().enumerate() {
            let name = format!("{}{}", ["", "  over "][n], self.names[n]);
            let (min, max) = (times[0], times[times.len() - 1]);
            let spread = format!("{} - {}", ms(min), ms(max));
            let tail = if n == 1 {
                format!("{ratio:>9.digits$}  {}", goal.of(ratio))
            } else {
                String::new()
            };
            let line = format!(
                "{name:44} {:>3} {:>10} {spread:>21} {tail}",
                times.len(),
                ms(median(times))
            );
            println!("{}", line.trim_end());
        }
    }
}

fn ms(seconds: f64) -> String {
    let ms = seconds * 1e3;
    let digits = match ms {
        0.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{ms:.digits$}")
}

pub fn heading() {
    println!(
        "{:44} {:>3} {:>10} {:>21} {:>9}  goal",
        "", "n", "median ms", "min - max", "ratio"
    );
}

/// Resident memory: the daemon's, and that of the `lvm` that it keeps.
pub fn memory(what: &str, daemon: u64, lvm: u64, goal: Goal) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let text = format!("{:.1} MiB (its lvm: {:.1} MiB)", mib(daemon), mib(lvm));
    println!("{what:44} {text:>46}  {}", goal.of(mib(daemon)));
}

pub fn count(what: &str, count: u64, goal: Goal) {
    println!("{what:44} {count:>46}  {}", goal.of(count as f64));
}
