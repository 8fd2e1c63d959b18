//! Files that hold the old bytes or the new ones, whatever happens in between; and files that one process has for itself.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

/// Replaces `path` by `bytes`: draft beside it, fsync, rename, fsync of the folder. The draft is named after the
/// process, so that two of them never write into one.
///
/// # Errors
/// Of the file system; the old file is then untouched.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = draft_path(path);
    let result = write_synced(&draft, bytes).and_then(|()| fs::rename(&draft, path));
    if result.is_err() {
        let _ = fs::remove_file(&draft); // the first error is the one to tell
    }
    result?;
    sync_folder_of(path)
}

/// Makes `path` with `bytes` unless it is there already, in which case nothing is touched and the answer is `false`.
///
/// # Errors
/// Of the file system; nothing that looks like the file is then left.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let draft = draft_path(path);
    // A link fails where the name exists; a rename would replace it.
    let result = write_synced(&draft, bytes).and_then(|()| match fs::hard_link(&draft, path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    });
    let _ = fs::remove_file(&draft);
    if result? {
        sync_folder_of(path)?;
        return Ok(true);
    }
    Ok(false)
}

/// Makes the names in the folder that holds `path` durable.
///
/// # Errors
/// If the folder cannot be opened or synced.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A name that no listing takes for a finished file: it begins with a dot and ends with `.draft`.
fn draft_path(path: &Path) -> std::path::PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}-{:08x}.draft", std::process::id(), fastrand::u32(..)))
}

/// How long a lock is tried for. A process that is being started holds what its parent had open until it runs its program:
/// its lock outlives the parent's by a moment.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Locks an open file or folder for as long as it is open; false if another one has locked it. Waits for half a second at most.
///
/// # Errors
/// If the file system has no locks, or fails.
pub fn lock(file: &File) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_replaces_the_old_one_and_leaves_no_draft() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, b"old").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_created_file_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert!(create(&path, b"first").unwrap());
        assert!(!create(&path, b"second").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write(&folder.path().join("missing/file"), b"bytes").is_err());
    }
}
