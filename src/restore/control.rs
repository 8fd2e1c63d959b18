//! `global/pg_control` in memory while a restore is under way, so that a power cut leaves a directory that no server starts
//! on, and nothing has to wait for the disk before the end.
//!
//! No server starts without that file. A restore that syncs everything before it lets the file appear writes all pages
//! twice: once as the backup has them, and once as the WAL makes them. So until all is done the file lies in a folder of
//! the memory file system, and `global/pg_control` is a link to it. The server follows the link; whatever happens to
//! processes, the kernel keeps what they wrote. When the machine goes down, the memory goes too, the link leads nowhere, and
//! no server starts on pages of which only some reached the disk.

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::path::PathBuf;

use crate::atomic_file;
use crate::pg::Lsn;
use crate::pg::SystemId;

/// Where it lies in the data directory.
const PLACE: &str = "global/pg_control";

/// A memory file system that every Linux has.
const MEMORY: &str = "/dev/shm";

/// What the folders there begin with.
const FOLDER_PREFIX: &str = "walguard-restore-";

/// Beside the file: which data directory it is for.
const OWNER: &str = "data_directory";

/// A folder to which nothing leads is left alone for so long: its restore may be about to make the link.
const LEFT_BEHIND_AFTER: std::time::Duration = std::time::Duration::from_secs(3_600);

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// How often the file is looked at again after it was moved to the disk, and how long it must have stayed as it is.
const SETTLE_TRIES: u32 = 20;
const SETTLE_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// True if there is a memory file system that a control file can lie in.
pub(super) fn is_possible() -> bool {
    let memory = Path::new(MEMORY);
    is_memory(memory) && rustix::fs::access(memory, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(target_os = "linux")]
fn is_memory(path: &Path) -> bool {
    #[allow(clippy::cast_sign_loss, reason = "the magic number is a bit pattern")]
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type as u64 == TMPFS_MAGIC)
}

#[cfg(not(target_os = "linux"))]
fn is_memory(_: &Path) -> bool {
    false
}

/// Puts a control file into memory, and a link to it into the data directory, which must have none.
///
/// # Errors
/// Of the file systems.
pub(super) fn keep_in_memory(data_dir: &Path, content: &[u8]) -> io::Result<()> {
    sweep(LEFT_BEHIND_AFTER);
    let folder = Path::new(MEMORY).join(format!("{FOLDER_PREFIX}{:016x}", fastrand::u64(..)));
    DirBuilder::new().mode(0o700).create(&folder)?; // fails if somebody else made it
    let file = folder.join("pg_control");
    let write = || {
        fs::write(folder.join(OWNER), data_dir.as_os_str().as_encoded_bytes())?;
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600).open(&file)?.write_all(content)?;
        std::os::unix::fs::symlink(&file, data_dir.join(PLACE))
    };
    write().inspect_err(|_| drop(fs::remove_dir_all(&folder)))
}

/// Removes what restores left in memory whose data directory is gone, or has another control file by now.
fn sweep(age_min: std::time::Duration) {
    let Ok(entries) = fs::read_dir(MEMORY) else { return };
    let is_ours = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.starts_with(FOLDER_PREFIX));
    for folder in entries.flatten().filter(is_ours).map(|entry| entry.path()) {
        let age = fs::symlink_metadata(&folder).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        let Ok(owner) = fs::read(folder.join(OWNER)) else { continue };
        // The path is what this program wrote, byte for byte.
        let owner = PathBuf::from(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&owner));
        let is_used = in_memory(&owner).is_some_and(|file| file.parent() == Some(&folder));
        if age.is_some_and(|age| age >= age_min) && !is_used {
            let _ = fs::remove_dir_all(&folder); // of another user, or gone by now
        }
    }
}

/// The file in memory that the data directory's link leads to, whether it is there or not; `None` if there is no such link.
pub(super) fn in_memory(data_dir: &Path) -> Option<PathBuf> {
    let file = fs::read_link(data_dir.join(PLACE)).ok()?;
    let folder = file.parent()?;
    let is_ours = folder.parent() == Some(Path::new(MEMORY))
        && folder.file_name()?.to_str()?.starts_with(FOLDER_PREFIX)
        && file.file_name()? == "pg_control";
    is_ours.then_some(file)
}

/// What a control file says of its cluster.
///
/// (Postgres: `ControlFileData` in `catalog/pg_control.h`; the beginning is the same in 14 to 18.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Control {
    pub(super) system_id: SystemId,
    /// Where the WAL begins that the latest checkpoint, or restartpoint, does not make dispensable.
    pub(super) redo: Lsn,
}

/// Reads the control file of a directory, wherever it is; `None` if it is not there.
pub(super) fn read(data_dir: &Path) -> Option<Control> {
    let content = fs::read(data_dir.join(PLACE)).ok()?;
    let number = |at: usize| content.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    Some(Control { system_id: SystemId::new(number(0)?), redo: Lsn::new(number(40)?) })
}

/// Removes the control file, wherever it is: no server starts then.
///
/// # Errors
/// Of the file system.
pub(super) fn remove(data_dir: &Path) -> io::Result<()> {
    let folder = in_memory(data_dir).and_then(|file| file.parent().map(Path::to_owned));
    match fs::remove_file(data_dir.join(PLACE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(folder) = folder {
        let _ = fs::remove_dir_all(folder); // 8 KiB of memory are no reason to fail
    }
    Ok(())
}

/// Moves the control file to the disk, durably, once everything else is durable. The server may run: it opens the file anew
/// for every write (`update_controlfile` in `common/controldata_utils.c`), always writes all of it, and from the
/// rename on writes to the new one. What it may have written to the old one just before is looked for and moved too.
///
/// # Errors
/// Of the file systems. The link then stands as it was, or the file is on the disk.
pub(super) fn settle(data_dir: &Path, mode: u32) -> io::Result<()> {
    let Some(memory) = in_memory(data_dir) else { return Ok(()) };
    let place = data_dir.join(PLACE);
    let move_to_disk = |content: &[u8]| {
        let draft = place.with_file_name("pg_control.walguard");
        let _ = fs::remove_file(&draft); // of a restore that was killed just here
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft, &place)?;
        atomic_file::sync_folder_of(&place)
    };
    let mut moved = fs::read(&memory)?;
    move_to_disk(&moved)?;
    let mut quiet = 0;
    for _ in 0..SETTLE_TRIES {
        std::thread::sleep(SETTLE_PAUSE);
        let latest = fs::read(&memory)?;
        if latest == moved {
            quiet += 1;
            if quiet == 3 {
                break;
            }
        } else if fs::read(&place)? == moved {
            move_to_disk(&latest)?;
            moved = latest;
            quiet = 0;
        } else {
            break; // the server has written the new one since, which says all that the old one does
        }
    }
    if let Some(folder) = memory.parent() {
        let _ = fs::remove_dir_all(folder); // nothing leads there any more
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("global")).unwrap();
        folder
    }

    #[test]
    fn what_is_in_memory_is_read_through_the_link_and_gone_with_the_memory() {
        let folder = directory();
        keep_in_memory(folder.path(), b"control").unwrap();
        let place = folder.path().join(PLACE);
        assert_eq!(fs::read(&place).unwrap(), b"control");
        let memory = in_memory(folder.path()).unwrap();
        // The power is cut.
        fs::remove_dir_all(memory.parent().unwrap()).unwrap();
        assert_eq!(fs::read(&place).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(in_memory(folder.path()), Some(memory));
        remove(folder.path()).unwrap();
        assert_eq!(in_memory(folder.path()), None);
    }

    #[test]
    fn a_settled_file_is_on_the_disk_and_memory_is_free() {
        let folder = directory();
        keep_in_memory(folder.path(), b"control").unwrap();
        let memory = in_memory(folder.path()).unwrap();
        fs::write(folder.path().join(PLACE), b"written by the server").unwrap();
        settle(folder.path(), 0o600).unwrap();
        let place = folder.path().join(PLACE);
        assert!(fs::symlink_metadata(&place).unwrap().is_file());
        assert_eq!(fs::read(&place).unwrap(), b"written by the server");
        assert!(!memory.parent().unwrap().exists());
        settle(folder.path(), 0o600).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"written by the server");
    }

    #[test]
    fn what_is_written_while_it_moves_is_not_lost() {
        let folder = directory();
        keep_in_memory(folder.path(), &0u64.to_le_bytes()).unwrap();
        let place = folder.path().join(PLACE);
        let last = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut last = 0u64;
                let begin = std::time::Instant::now();
                while begin.elapsed() < SETTLE_PAUSE * 2 {
                    last += 1;
                    // As the server does: opened by its name, written in place.
                    let mut file = File::options().write(true).open(&place).unwrap();
                    file.write_all(&last.to_le_bytes()).unwrap();
                }
                last
            });
            settle(folder.path(), 0o600).unwrap();
            writer.join().unwrap()
        });
        assert_eq!(fs::read(&place).unwrap(), last.to_le_bytes());
        assert_eq!(in_memory(folder.path()), None);
    }

    #[test]
    fn what_lies_in_memory_for_a_directory_that_is_gone_is_removed_and_nothing_else() {
        let (gone, there) = (directory(), directory());
        for folder in [&gone, &there] {
            keep_in_memory(folder.path(), b"control").unwrap();
        }
        let of_gone = in_memory(gone.path()).unwrap();
        drop(gone);
        sweep(LEFT_BEHIND_AFTER);
        assert!(of_gone.exists(), "its restore may be about to make the link");
        let long_ago = std::time::SystemTime::now() - 2 * LEFT_BEHIND_AFTER;
        for file in [&of_gone, &in_memory(there.path()).unwrap()] {
            File::open(file.parent().unwrap()).unwrap().set_modified(long_ago).unwrap();
        }
        sweep(LEFT_BEHIND_AFTER);
        assert!(!of_gone.parent().unwrap().exists());
        assert_eq!(fs::read(there.path().join(PLACE)).unwrap(), b"control");
        remove(there.path()).unwrap();
    }

    #[test]
    fn links_that_lead_elsewhere_are_not_ours() {
        let folder = directory();
        for target in
            ["/dev/shm/pg_control", "/etc/passwd", "/dev/shm/walguard-restore-1/../x/pg_control", "pg_control"]
        {
            let _ = fs::remove_file(folder.path().join(PLACE));
            std::os::unix::fs::symlink(target, folder.path().join(PLACE)).unwrap();
            assert_eq!(in_memory(folder.path()), None, "{target}");
        }
    }
}
