// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Content of a cache that tells whether it is whole: a job's work, in miniature.

use std::fs;
use std::io;
use std::path::Path;

/// In how many files.
const FILES: u64 = 12;

/// The longest of them, in bytes.
const LONGEST: u64 = 48 << 10;

/// Written last, removed first.
const DONE: &str = "done";

/// What is found in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing at all.
    Blank,
    /// All that was written, of this number.
    Whole(u64),
}

/// Numbers without a pattern, the same ones for the same seed (Steele and others' SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed that is another one in each run, and is printed.
    pub fn from_clock() -> Self {
        let seed = std::time::UNIX_EPOCH
            .elapsed()
            .expect("a clock past 1970")
            .subsec_nanos();
        println!("random seed: {seed}");
        Self(seed.into())
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn bytes_of(number: u64, file: u64) -> Vec<u8> {
    let mut random = Random::new(number << 8 | file);
    let length = random.below(LONGEST) as usize + 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Replaces what `dir` holds by the content of another number. Nothing is flushed: that is not a job's business.
///
/// # Errors
/// What the file system says; `dir` holds half of it then.
pub fn try_write(dir: &Path, number: u64) -> io::Result<()> {
    match fs::remove_file(dir.join(DONE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for file in 0..FILES {
        let below = dir.join(format!("d{}", file % 3));
        fs::create_dir_all(&below)?;
        fs::write(below.join(format!("f{file}")), bytes_of(number, file))?;
    }
    fs::write(dir.join(DONE), number.to_string())
}

/// [`try_write`], which must succeed.
#[track_caller]
pub fn write(dir: &Path, number: u64) {
    if let Err(error) = try_write(dir, number) {
        panic!("writing {number} to {}: {error}", dir.display());
    }
}

/// What `dir` holds, or what is wrong with it.
///
/// # Errors
/// What is missing or is not as it was written.
pub fn try_read(dir: &Path) -> Result<Content, String> {
    let say = |error: io::Error| format!("{}: {error}", dir.display());
    if fs::read_dir(dir).map_err(say)?.next().is_none() {
        return Ok(Content::Blank);
    }
    let number = fs::read_to_string(dir.join(DONE))
        .map_err(|error| format!("not written to its end: {error}"))?;
    let number = number
        .parse()
        .map_err(|error| format!("{number:?}: {error}"))?;
    for file in 0..FILES {
        let path = dir.join(format!("d{}/f{file}", file % 3));
        match fs::read(&path) {
            Ok(found) if found == bytes_of(number, file) => {}
            Ok(_) => return Err(format!("{} is not of {number}", path.display())),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    Ok(Content::Whole(number))
}

/// What `dir` holds, all of it.
#[track_caller]
pub fn read(dir: &Path) -> Content {
    try_read(dir).unwrap_or_else(|wrong| panic!("{wrong}"))
}
