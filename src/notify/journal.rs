//! What was told, on the local disk: written before a message is sent and after it was taken, so that an agent that is
//! killed in between, or whose repository is down, does not tell everything again.
//!
//! ```text
//! <spool>/<cluster>/notify/<incident>.<channel>.<event>.json
//! ```
//!
//! It is a cache: the records in the repository are the truth, and outlive this machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::queue::Told;
use crate::atomic_file;

/// Files that are read at the start; more were never written in good order.
const FILES_MAX: usize = 100_000;
/// A file is some 500 bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Files older than this are removed at the start: nothing of that age is told.
const KEPT: Duration = Duration::from_secs(30 * 86_400);

/// The folder.
#[derive(Clone, Debug)]
pub struct Journal {
    folder: PathBuf,
}

/// How far a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// It is being sent: if this is found at a start, nobody knows whether it arrived.
    Sending,
    /// It was taken; the repository does not know yet.
    Told,
    /// It was taken, and the repository knows.
    Recorded,
}

/// A file of the journal.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Entry {
    /// How far it is.
    pub progress: Progress,
    /// What is or was told; while it is being sent, as it will be.
    pub told: Told,
}

impl Journal {
    /// The journal of a cluster whose spool is in `folder`. Nothing is touched.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.join("notify") }
    }

    /// Writes down how far a message is, durably.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write(&self, entry: &Entry) -> io::Result<()> {
        let path = self.path(&entry.told)?;
        if !self.folder.is_dir() {
            fs::create_dir_all(&self.folder)?;
            atomic_file::sync_folder_of(&self.folder)?;
        }
        atomic_file::write(&path, &serde_json::to_vec(entry).map_err(io::Error::other)?)
    }

    /// Reads all of it, and removes what is very old. What cannot be read is left out: the repository knows better.
    ///
    /// # Errors
    /// If the folder is there and cannot be listed.
    pub fn read(&self) -> io::Result<Vec<Entry>> {
        let files = match fs::read_dir(&self.folder) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut entries = Vec::new();
        for file in files.take(FILES_MAX) {
            let path = file?.path();
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if !meta.is_file() {
                continue;
            }
            let age = meta.modified().ok().and_then(|modified| modified.elapsed().ok());
            if age.is_some_and(|age| age > KEPT) {
                let _ = fs::remove_file(&path); // it will be tried again at the next start
                continue;
            }
            let is_ours = path.extension().is_some_and(|extension| extension == "json");
            if !is_ours || meta.len() > FILE_BYTES_MAX {
                continue;
            }
            match fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
                Ok(Ok(entry)) => entries.push(entry),
                Ok(Err(error)) => tracing::warn!(path = %path.display(), "failed to read what was told: {error}"),
                Err(error) => tracing::warn!(path = %path.display(), "failed to read what was told: {error}"),
            }
        }
        Ok(entries)
    }

    fn path(&self, told: &Told) -> io::Result<PathBuf> {
        let name = format!("{}.{}.{}.json", told.incident, told.channel, told.key());
        // An incident's id came from the repository.
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if name.starts_with('.') || name.len() > 200 || !name.bytes().all(plain) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot be a file's name")));
        }
        Ok(self.folder.join(name))
    }
}
