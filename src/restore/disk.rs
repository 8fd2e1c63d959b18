//! The file systems that a restore writes to, and the wait until everything is on them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Between two rounds of writing to the disk what has gathered in memory.
const FLUSH_PAUSE: Duration = Duration::from_millis(300);

/// The file systems, held open. The kernel tells a failed write to whoever syncs a file that was open when it failed, so
/// they are opened before anything is written.
///
/// (Linux: `syncfs(2)` reports errors of the whole file system since 5.8.)
#[derive(Clone, Debug)]
pub(super) struct Disk {
    folders: Arc<Vec<(PathBuf, File)>>,
    /// What a round in the background was told: nobody is told twice.
    failure: Arc<Mutex<Option<(PathBuf, io::Error)>>>,
}

impl Disk {
    /// The file systems that these directories, which are there, lie on.
    ///
    /// # Errors
    /// With the directory that cannot be opened.
    pub(super) fn open<'a>(roots: impl IntoIterator<Item = &'a Path>) -> Result<Self, (PathBuf, io::Error)> {
        let mut folders = Vec::new();
        for root in roots {
            folders.push((root.to_owned(), File::open(root).map_err(|error| (root.to_owned(), error))?));
        }
        Ok(Self { folders: Arc::new(folders), failure: Arc::default() })
    }

    /// Waits until all that was written is durable, the directories' own names too.
    ///
    /// # Errors
    /// With the directory whose file system failed to write something.
    pub(super) fn sync(&self) -> Result<(), (PathBuf, io::Error)> {
        self.sync_files()?;
        if let Some(failure) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(failure);
        }
        let sync_name =
            |root: &PathBuf| crate::atomic_file::sync_folder_of(root).map_err(|error| (root.clone(), error));
        self.folders.iter().try_for_each(|(root, _)| sync_name(root))
    }

    /// One call for each file system, and not one for each of thousands of files.
    #[cfg(target_os = "linux")]
    fn sync_files(&self) -> Result<(), (PathBuf, io::Error)> {
        use std::os::unix::fs::MetadataExt as _;
        let mut synced = BTreeSet::new();
        for (root, folder) in &*self.folders {
            let fault = |error: io::Error| (root.clone(), error);
            if synced.insert(folder.metadata().map_err(fault)?.dev()) {
                rustix::fs::syncfs(folder).map_err(|error| fault(error.into()))?;
            }
        }
        Ok(())
    }

    /// File by file.
    #[cfg(not(target_os = "linux"))]
    fn sync_files(&self) -> Result<(), (PathBuf, io::Error)> {
        fn sync(path: &Path) -> io::Result<()> {
            let metadata = std::fs::symlink_metadata(path)?;
            if metadata.is_dir() {
                for entry in std::fs::read_dir(path)? {
                    sync(&entry?.path())?;
                }
            }
            if metadata.is_symlink() { Ok(()) } else { File::open(path)?.sync_all() }
        }
        let roots: BTreeSet<_> = self.folders.iter().map(|(root, _)| root).collect();
        roots.into_iter().try_for_each(|root| sync(root).map_err(|error| (root.clone(), error)))
    }

    /// Writes to the disk, again and again, what has gathered in memory, so that little is left at the end. Stops, after the
    /// round that is under way, when the answer is dropped. A failure is told by the next [`Disk::sync`].
    pub(super) fn flush_in_background(&self) -> Flushing {
        let (disk, over) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let told = Arc::clone(&over);
        tokio::task::spawn_blocking(move || {
            while !told.load(Ordering::Relaxed) {
                if let Err(failure) = disk.sync_files() {
                    *disk.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
                    return;
                }
                std::thread::sleep(FLUSH_PAUSE);
            }
        });
        Flushing { over }
    }
}

/// See [`Disk::flush_in_background`].
#[derive(Debug)]
pub(super) struct Flushing {
    over: Arc<AtomicBool>,
}

impl Drop for Flushing {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
