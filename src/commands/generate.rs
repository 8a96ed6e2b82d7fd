// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a package has beside the program, made from the program itself: man pages,
//! shell completions, an example configuration.

use std::path::Path;

use clap::CommandFactory as _;

use super::{Failure, failed, print};
use crate::cli::{Cli, Shell};
use crate::config;

/// `man`: a page for the program and one for each command, into `dir`, which is made
/// where it is missing.
///
/// # Errors
/// When they cannot be written.
pub fn man(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), dir))
        .map_err(failed(dir.display()))
}

/// `completions`, to standard output.
///
/// # Errors
/// When that cannot be written to.
pub fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// `example-config`, to standard output.
///
/// # Errors
/// As [`completions`].
pub fn example_config() -> Result<(), Failure> {
    print(&config::example())
}
