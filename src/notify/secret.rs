//! Secrets that notifications need: named in the settings, kept in files or the environment, read when they are used.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

/// The longest secret that is read, in bytes: keys and URLs have some hundred, and a wrong path must not fill memory.
const BYTES_MAX: u64 = 16 << 10;

/// A secret's text. It cannot be printed: whoever needs it says so with [`Secret::expose`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes a text for a secret.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the one who sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Where a secret is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretPlace {
    /// The first line of a file.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
}

/// A secret could not be read. Names the place, never the content.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file is not there or may not be read.
    #[error("read the secret in {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The place holds nothing, or not one line of text.
    #[error("the secret in {place} is empty, longer than 16 KiB, or no text")]
    Empty {
        /// The file or the variable.
        place: SecretPlace,
    },
    /// The variable is not set.
    #[error("the variable {name} is not set")]
    Variable {
        /// The variable.
        name: String,
    },
}

impl SecretPlace {
    /// Chooses between the two ways to name a secret in the settings; `None` if neither is used.
    pub(super) fn of(file: Option<&PathBuf>, variable: Option<&String>) -> Option<Self> {
        file.cloned().map(Self::File).or_else(|| variable.cloned().map(Self::Variable))
    }

    /// Reads the secret now, so that it can be rotated: the first line, without spaces around it.
    ///
    /// # Errors
    /// If there is none.
    pub fn read(&self) -> Result<Secret, SecretError> {
        let text = match self {
            Self::Variable(name) => std::env::var(name).map_err(|_| SecretError::Variable { name: name.clone() })?,
            Self::File(path) => {
                let fault = |source| SecretError::File { path: path.clone(), source };
                let mut bytes = Vec::new();
                File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes)).map_err(fault)?;
                String::from_utf8(bytes).unwrap_or_default()
            }
        };
        let line = text.lines().next().unwrap_or_default().trim();
        if line.is_empty() || line.len() as u64 > BYTES_MAX || line.chars().any(char::is_control) {
            return Err(SecretError::Empty { place: self.clone() });
        }
        Ok(Secret(line.to_owned()))
    }
}

impl fmt::Display for SecretPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Variable(name) => write!(f, "the variable {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_the_first_line_of_its_file_and_never_printed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, "  hush-hush \nsecond line\n").unwrap();
        let secret = SecretPlace::File(path).read().unwrap();
        assert_eq!(secret.expose(), "hush-hush");
        assert!(!format!("{secret:?}").contains("hush"));
    }

    #[test]
    fn what_cannot_be_a_secret_is_refused_without_being_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let long = "x".repeat(20_000);
        for content in ["", "\n", "  \nsecond", "tab\tin it", long.as_str()] {
            std::fs::write(&path, content).unwrap();
            let error = SecretPlace::File(path.clone()).read().unwrap_err();
            assert!(matches!(error, SecretError::Empty { .. }), "{error}");
            assert!(!error.to_string().contains("xxx") && !error.to_string().contains("tab"));
        }
        assert!(matches!(SecretPlace::File(folder.path().join("none")).read(), Err(SecretError::File { .. })));
        let unset = SecretPlace::Variable("WALGUARD_TEST_THIS_IS_NEVER_SET".to_owned());
        assert!(matches!(unset.read(), Err(SecretError::Variable { .. })));
    }
}
