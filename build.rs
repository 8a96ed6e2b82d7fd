// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds the client of job volumes, a static program of its own, which the daemon has in itself.
//!
//! Not as a binary of this crate: static linking (`crt-static`) is a flag for all of a build, and with glibc a
//! build that has procedural macros, as this one has, cannot have it.

use std::env;
use std::path::Path;
use std::process::Command;

const SOURCE: &str = "src/job/client/mod.rs";

fn main() {
    let dir = Path::new(SOURCE).parent().expect("a directory");
    println!("cargo::rerun-if-changed={}", dir.display());
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("Cargo sets {name}"));
    let out = Path::new(&variable("OUT_DIR")).join("job-client");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args([
        SOURCE,
        "--edition=2024",
        "--crate-name=lvm_cache_friend",
        "-o",
    ]);
    rustc.arg(out).arg("--target").arg(variable("TARGET"));
    for option in ["target-feature=+crt-static", "panic=abort", "strip=symbols"] {
        rustc.args(["-C", option]);
    }
    // As small as can be: each job volume has one in memory.
    for option in ["opt-level=s", "lto=fat", "codegen-units=1"] {
        rustc.args(["-C", option]);
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("linker=");
        option.push(linker);
        rustc.arg("-C").arg(option);
    }
    let status = rustc.status().expect("the compiler that Cargo uses");
    assert!(
        status.success(),
        "{SOURCE} could not be made a static program. It needs the static C library of the target: \
         libc6-dev has it on Debian and Ubuntu, glibc-static on Fedora"
    );
}
