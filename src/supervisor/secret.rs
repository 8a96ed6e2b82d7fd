// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Secrets from files: read when they are needed, never printed, refused where others can read them.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

/// Longest secret, in bytes. An RSA key of 8192 bits has 6.5 KiB as PEM.
const MAX: u64 = 64 << 10;

/// A secret cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It cannot be read.
    #[error("{}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// It can, by whom it should not.
    #[error("{}: {problem}", .file.display())]
    Refused {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Where a secret is: an absolute path, or `credential:NAME`, a file of that name that systemd
/// prepared (`LoadCredential=` in the unit; systemd.exec(5)).
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// One in `$CREDENTIALS_DIRECTORY`.
    Credential(String),
}

impl TryFrom<String> for Source {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("credential:") {
            let plain = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
            return if plain {
                Ok(Self::Credential(name.to_owned()))
            } else {
                Err(format!("{name:?} is not a credential's name"))
            };
        }
        if Path::new(&text).is_absolute() {
            return Ok(Self::File(text.into()));
        }
        Err(
            "a secret is never written here: write the absolute path of a file that holds it, or credential:NAME"
                .to_owned(),
        )
    }
}

impl Source {
    /// Reads it, without the line's end after it.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn read(&self) -> Result<SecretString, SecretError> {
        match self {
            // Root and the file's owner alone.
            Self::File(file) => read(file, 0o077),
            Self::Credential(name) => {
                let Some(dir) = std::env::var_os("CREDENTIALS_DIRECTORY") else {
                    return Err(SecretError::Refused {
                        file: name.into(),
                        problem: "there is no such credential: $CREDENTIALS_DIRECTORY is not set, \
                                  so the unit has no LoadCredential="
                            .into(),
                    });
                };
                // The directory is the service's own; with an access list in it, the group's bits are its mask.
                read(&Path::new(&dir).join(name), 0o007)
            }
        }
    }
}

fn read(file: &Path, denied: u32) -> Result<SecretString, SecretError> {
    let failed = |source| SecretError::Io {
        file: file.to_owned(),
        source,
    };
    let refused = |problem: String| SecretError::Refused {
        file: file.to_owned(),
        problem,
    };
    let mut open = File::open(file).map_err(failed)?;
    // Of what was opened, not of what the path may lead to by then.
    let meta = open.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(refused("it is no regular file".into()));
    }
    let mode = meta.mode() & 0o7777;
    if mode & denied != 0 {
        return Err(refused(format!(
            "its mode {mode:04o} lets others read it: chmod {:04o}",
            mode & !denied
        )));
    }
    let mut text = String::new();
    let read = (&mut open).take(MAX + 1).read_to_string(&mut text);
    let secret = SecretString::from(text.trim_end().to_owned());
    // The copy with the line's end is not left in memory.
    secrecy::zeroize::Zeroize::zeroize(&mut text);
    let read = read.map_err(failed)?;
    if read as u64 > MAX || read == 0 {
        return Err(refused(format!("a secret has 1 to {MAX} bytes")));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn what_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        fs::write(&file, "s3cret\n").unwrap();
        let source = Source::try_from(file.to_str().unwrap().to_owned()).unwrap();
        for (mode, denied) in [(0o600, false), (0o400, false), (0o640, true), (0o604, true)] {
            fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            match source.read() {
                Ok(secret) => {
                    assert!(!denied, "{mode:o}");
                    assert_eq!(secret.expose_secret(), "s3cret");
                    assert!(!format!("{secret:?}").contains("s3cret"));
                }
                Err(error) => assert!(denied && error.to_string().contains("chmod 0"), "{error}"),
            }
        }
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        source.read().expect_err("empty");
        for text in ["ghp_abc", "credential:", "credential:../x", "token"] {
            Source::try_from(text.to_owned()).expect_err(text);
        }
    }
}
