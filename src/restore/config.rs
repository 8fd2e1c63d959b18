//! What the settings say about restores.

use std::path::PathBuf;

/// The `[restore]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the commands in alarms and reports restore to, each into a directory of its own; an absolute path.
    pub target_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { target_dir: "/srv/restored".into() }
    }
}

impl Config {
    /// Whether these settings can be.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), String> {
        if self.target_dir.is_absolute() {
            return Ok(());
        }
        // Whoever reads an alarm may be in any directory.
        Err(format!("restore.target_dir = {:?} is no absolute path", self.target_dir))
    }
}
