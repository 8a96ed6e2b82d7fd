//! `init`: storage prepared, once, and the configuration written.

use std::path::Path;

use super::Failure;
use crate::cli;

/// `init`.
///
/// # Errors
/// When storage cannot be prepared; the configuration is not written then.
pub fn run(config: &Path, args: &cli::Init) -> Result<(), Failure> {
    let _ = (config, args);
    todo!("storage")
}
