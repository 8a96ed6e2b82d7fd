// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The stand-in for GitHub as a program, for `make demo`: see [`fake`].
//!
//! It takes a directory, and puts the App's key, a `token`, and its own address (`url`) there. Then it does what it is
//! told on its standard input, and answers each line with one:
//!
//! - `queue main|fork VERSION FILE`: queues a job of that origin, which runs the script with `job=NUMBER version=VERSION` before
//!   it; the job's number
//! - `await NUMBER FILE`: when that job has ended, its log is in the file; its result

#[path = "../support/background.rs"]
#[allow(dead_code)]
mod background;
#[path = "../support/command.rs"]
#[allow(dead_code)]
mod command;
#[allow(dead_code)]
mod fake;
mod support {
    pub(crate) use super::{background, command};
}

use std::fs;
use std::io::stdin;
use std::time::Duration;

use fake::{FORK, Fake, MAIN, REPOSITORY};

fn main() {
    let dir = std::path::PathBuf::from(std::env::args_os().nth(1).expect("a directory"));
    let fake = Fake::start();
    // Builds on an emulated processor leave a runner that little of it.
    fake.state().silent = Duration::from_secs(60);
    fs::copy(fake.file("token"), dir.join("token")).unwrap();
    fs::write(dir.join("url"), format!("{}/{REPOSITORY}", fake.url)).unwrap();
    for line in stdin().lines() {
        let line = line.unwrap();
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["queue", origin, version, file] => {
                let origin = if origin == "main" { MAIN } else { FORK };
                let script = fs::read_to_string(file).unwrap();
                let script = |job| format!("job={job} version={version}\n{script}");
                println!("{}", fake.queue_with(&origin, script));
            }
            ["await", job, file] => {
                let job = job.parse().unwrap();
                let result = loop {
                    match fake.result(job) {
                        Some(result) => break result,
                        None => std::thread::sleep(Duration::from_millis(20)),
                    }
                };
                fs::write(file, &fake.state().jobs[&job].log).unwrap();
                println!("{result}");
            }
            _ => panic!("{line:?} is nothing that it does"),
        }
    }
}
