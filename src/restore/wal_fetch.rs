//! One WAL file out of the repository, for the server's `restore_command`; and WAL fetched ahead of it.
//!
//! Postgres takes any failure of `restore_command` as the end of the WAL and ends recovery there, unless the command was
//! killed by a signal or exits with more than 125 (`RestoreArchivedFile` in `access/transam/xlogarchive.c`,
//! `wait_result_is_any_signal` in `common/wait_error.c`). So the one answer that means "there is no more" is given only
//! when the repository was read and the file is not in it; everything else is an error, and must reach the server as
//! [`STOP_RECOVERY`].
//!
//! A file that is there ahead of time costs a rename. Files are fetched ahead into a folder beside `%p`, by the restore
//! that watches the server or by a helper process that the first fetch leaves behind; a lock lets only one of them work.
//! Each has its checksum in its name and is read before it is used, so a file that a crash left half-written is dropped.

use std::fs;
use std::fs::File;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::SystemTime;

use futures_util::StreamExt as _;
use futures_util::TryStreamExt as _;
use rustix::fs::FlockOperation;
use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::backoff::RetryPolicy;
use crate::backoff::retry;
use crate::decode::PageHeader;
use crate::decode::WalMajor;
use crate::pg::SegmentName;
use crate::pg::SegmentSize;
use crate::pg::TimelineId;
use crate::repo::RepoError;
use crate::repo::Repository;
use crate::repo::SegmentRead;
use crate::repo::SegmentSource;
use crate::repo::cluster::ClusterIdentity;
use crate::repo::layout::Object;
use crate::restore::error::MAKE_ROOM;

/// Exit code of `wal-fetch` that makes the server abort recovery instead of ending it.
pub const STOP_RECOVERY: u8 = 126;

/// Exit code of `wal-fetch` that means: there is no such file, the WAL may end here.
pub const NOT_THERE: u8 = 1;

/// The folder of files fetched ahead, in `pg_wal`.
const CACHE_FOLDER: &str = "walguard-prefetch";

/// Bytes fetched ahead: four segments of the usual size. They lie on the restored server's disk.
const AHEAD_BYTES: u64 = 64 << 20;

/// How often the prefetcher looks for what the server asked for last.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A file that is not in the repository yet is asked for again after this.
const ABSENT_PAUSE: Duration = Duration::from_secs(2);

/// A helper goes when the server has asked for nothing for so long. The next fetch leaves a new one.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// How long a fetch waits for a file that is being fetched ahead before it fetches it itself.
const IN_FLIGHT_PATIENCE: Duration = Duration::from_secs(20);

/// Keeps trying while the store is away: about ten minutes. Then recovery is stopped, and can be started again.
pub(super) const STORE_PATIENCE: RetryPolicy =
    RetryPolicy { attempts_max: Some(60), pause_min: Duration::from_millis(500), pause_max: Duration::from_secs(10) };

/// What came of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The file is where it was asked for.
    Placed,
    /// The repository does not hold it.
    NotThere,
}

/// A WAL file could not be fetched, although it should be there. Recovery must not end here.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The repository cannot be read, or an object is damaged.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The file's content is not that segment of that cluster.
    #[error("{file} is unusable: {problem}")]
    Unusable {
        /// The file's name.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Later WAL is there, so this is no end.
    #[error("{file} is {found} in the repository, which holds {later} behind it: WAL is missing")]
    Gap {
        /// The file asked for.
        file: String,
        /// `not`, or `only partly`.
        found: &'static str,
        /// A later segment.
        later: String,
    },
    /// The file cannot be written.
    #[error("write {}", .path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

impl FetchError {
    /// True if the same fetch may work later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Repo(error) if error.is_transient())
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Repo(error) => error.hint(),
            Self::Unusable { .. } | Self::Gap { .. } => Some(
                "`walguard list` shows what can be restored, `walguard verify` what is damaged or missing".to_owned(),
            ),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => Some(MAKE_ROOM.to_owned()),
            Self::Write { .. } | Self::Cancelled => None,
        }
    }
}

/// Fetches `file` (`%f`) from the repository to `path` (`%p`), whole, proved, and under its name only once it is complete.
/// The end of the archived WAL is filled up with zeros, which the server takes for what they are. Trouble that may pass
/// is waited for, about ten minutes.
///
/// # Errors
/// If the file cannot be had although it should be there.
pub async fn fetch(
    repo: &Repository,
    file: &str,
    path: &Path,
    cancel: &CancellationToken,
) -> Result<Fetched, FetchError> {
    let what = format!("fetch {file}");
    let content = retry(STORE_PATIENCE, cancel, &what, FetchError::is_transient, || find(repo, file)).await;
    let content = content.map_err(|error| match error {
        crate::backoff::RetryError::Failed(error) => error,
        crate::backoff::RetryError::Cancelled => FetchError::Cancelled,
    })?;
    let Some(content) = content else { return Ok(Fetched::NotThere) };
    place(&content, path).map_err(|source| FetchError::Write { path: path.to_owned(), source })?;
    Ok(Fetched::Placed)
}

async fn find(repo: &Repository, file: &str) -> Result<Option<bytes::Bytes>, FetchError> {
    // An empty place is not the end of the WAL: a folder that is not mounted looks just like it.
    let identity = repo.require_identity().await?;
    if let Some(timeline) = history_of(file) {
        return Ok(repo.read_small(&repo.layout().history(timeline)).await?);
    }
    let Ok(name) = SegmentName::parse(file, identity.segment_size) else { return Ok(None) };
    Ok(find_segment(repo, &identity, &name).await?.map(|read| read.bytes))
}

fn history_of(file: &str) -> Option<TimelineId> {
    let digits = file.strip_suffix(".history").filter(|digits| digits.len() == 8)?;
    u32::from_str_radix(digits, 16).ok().and_then(TimelineId::new)
}

async fn find_segment(
    repo: &Repository,
    identity: &ClusterIdentity,
    name: &SegmentName,
) -> Result<Option<SegmentRead>, FetchError> {
    let mut looked_again = false;
    loop {
        let read = match repo.read_segment(name).await {
            Ok(read) => Some(read),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error.into()),
        };
        if let Some(read) = &read {
            prove(identity, name, &read.bytes)?;
            if read.source == SegmentSource::Whole {
                return Ok(Some(read.clone()));
            }
        }
        // What is not whole is the end of a timeline, or else there is a hole.
        let Some(later) = later_segment(repo, name).await? else { return Ok(read) };
        if looked_again {
            let found = if read.is_some() { "only partly" } else { "not" };
            return Err(FetchError::Gap { file: name.to_string(), found, later: later.to_string() });
        }
        looked_again = true; // it may have been completed while we looked
    }
}

/// A segment of the same timeline that lies behind `name` in the repository.
async fn later_segment(repo: &Repository, name: &SegmentName) -> Result<Option<SegmentName>, RepoError> {
    let after = repo.layout().before_segment(&name.next());
    let mut objects = std::pin::pin!(repo.objects(repo.layout().timeline_folder(name.timeline), Some(after)));
    while let Some(object) = objects.try_next().await? {
        match repo.layout().parse(&object.key, name.size) {
            Some(Object::Segment(later) | Object::Tail { segment: later, .. }) if later.number > name.number => {
                return Ok(Some(later));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The segment begins with the page header that only this segment of this cluster has.
pub(super) fn prove(identity: &ClusterIdentity, name: &SegmentName, content: &[u8]) -> Result<(), FetchError> {
    let unusable = |problem: String| FetchError::Unusable { file: name.to_string(), problem };
    if content.len() as u64 != name.size.bytes() {
        return Err(unusable(format!("it has {} bytes", content.len())));
    }
    let major = WalMajor::of_server(identity.server_version)
        .ok_or_else(|| unusable(format!("PostgreSQL {} is not supported", identity.server_version.major())))?;
    PageHeader::read(content, name.start(), major, name.size, Some(identity.system_id))
        .map_err(|error| unusable(error.to_string()))?;
    Ok(())
}

/// Puts content under a name: whole or not at all, for whoever looks while it is written. The server itself makes it
/// durable (`KeepFileRestoredFromArchive`).
fn place(content: &[u8], path: &Path) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!("{name}.walguard-{}", std::process::id()));
    let result = fs::write(&draft, content).and_then(|()| fs::rename(&draft, path));
    if result.is_err() {
        let _ = fs::remove_file(&draft);
    }
    result
}

/// Files fetched ahead, in a folder beside those that the server asks for.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache of the server that asks for its files at `path` (`%p`).
    pub fn beside(path: &Path) -> Self {
        Self { folder: path.parent().unwrap_or(Path::new(".")).join(CACHE_FOLDER) }
    }

    /// The cache of the server with this data directory.
    pub fn of_server(data_dir: &Path) -> Self {
        Self { folder: data_dir.join("pg_wal").join(CACHE_FOLDER) }
    }

    /// Hands over `file` at `path` if it was fetched ahead and is intact, or is about to be. Notes what the server asked
    /// for, so that whoever fetches ahead goes on behind it.
    pub fn take(&self, file: &str, path: &Path) -> bool {
        if !is_segment(file) || !self.folder.is_dir() {
            return false;
        }
        let _ = fs::write(self.folder.join("wanted"), file); // if nobody is told, nothing is fetched ahead
        let begin = std::time::Instant::now();
        loop {
            if let Some(found) = self.find(file) {
                return take_intact(&found, path);
            }
            let in_flight = self.folder.join(format!(".{file}.draft")).exists() && self.is_watched();
            if !in_flight || begin.elapsed() > IN_FLIGHT_PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// True if somebody fetches ahead.
    pub fn is_watched(&self) -> bool {
        self.try_lock().is_none()
    }

    /// Removes the folder and all that is in it.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.folder);
    }

    fn try_lock(&self) -> Option<File> {
        fs::create_dir_all(&self.folder).ok()?;
        let file = File::options().create(true).truncate(false).write(true).open(self.folder.join("lock")).ok()?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(file)
    }

    fn files(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        entries.flatten().map(|entry| entry.path()).collect()
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        let is_it = |path: &PathBuf| cached_name(path).is_some_and(|(name, _)| name == file);
        self.files().into_iter().find(is_it)
    }

    fn wanted(&self) -> Option<(String, SystemTime)> {
        let path = self.folder.join("wanted");
        let at = fs::metadata(&path).and_then(|meta| meta.modified()).ok()?;
        fs::read_to_string(&path).ok().filter(|name| is_segment(name)).map(|name| (name, at))
    }

    fn keep(&self, name: &SegmentName, content: &[u8]) -> io::Result<()> {
        let draft = self.folder.join(format!(".{name}.draft"));
        fs::write(&draft, content)?;
        fs::rename(&draft, self.folder.join(format!("{name}.{:08x}", crc32c::crc32c(content))))
    }
}

fn is_segment(file: &str) -> bool {
    file.len() == 24 && file.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `000000010000001600000037.1a2b3c4d`.
fn cached_name(path: &Path) -> Option<(&str, u32)> {
    let (name, crc) = path.file_name()?.to_str()?.split_once('.')?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    is_segment(name).then_some((name, crc))
}

fn take_intact(found: &Path, path: &Path) -> bool {
    let Some((_, crc)) = cached_name(found) else { return false };
    let intact = fs::read(found)
        .is_ok_and(|content| SegmentSize::new(content.len() as u64).is_ok() && crc32c::crc32c(&content) == crc);
    if intact {
        return fs::rename(found, path).is_ok();
    }
    let _ = fs::remove_file(found);
    false
}

/// Fetches ahead for the server with this cache, until `cancel` is cancelled or the server has asked for nothing for a
/// minute (`for_ever` false). Does nothing if another does it already. Trouble is left to the fetch that needs the file.
pub async fn prefetch(repo: &Repository, cache: &Cache, for_ever: bool, cancel: &CancellationToken) {
    let Some(lock) = cache.try_lock() else { return };
    let work = async {
        let identity = match repo.require_identity().await {
            Ok(identity) => identity,
            Err(error) => return tracing::warn!("failed to fetch WAL ahead: {}", Chain(&error)),
        };
        let begin = SystemTime::now();
        loop {
            let wanted = cache.wanted();
            let asked_at = wanted.as_ref().map_or(begin, |(_, at)| (*at).max(begin));
            if !for_ever && asked_at.elapsed().is_ok_and(|idle| idle > IDLE_MAX) {
                return;
            }
            let wanted = wanted.and_then(|(name, _)| SegmentName::parse(&name, identity.segment_size).ok());
            let pause = match wanted {
                Some(wanted) if !fill(repo, cache, &identity, &wanted).await => ABSENT_PAUSE,
                _ => POLL_INTERVAL,
            };
            // What the server asks for wakes us, so that the end of the WAL costs no time.
            let (before, until) = (cache.wanted(), std::time::Instant::now() + pause);
            while std::time::Instant::now() < until && cache.wanted() == before {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            if !cache.folder.is_dir() {
                return; // the server's directory is gone, or the restore is over
            }
        }
    };
    cancel.run_until_cancelled(work).await;
    drop(lock);
}

/// Fetches what is missing of the segments behind `wanted`. False if one of them is not to be had now.
async fn fill(repo: &Repository, cache: &Cache, identity: &ClusterIdentity, wanted: &SegmentName) -> bool {
    let depth = (AHEAD_BYTES / wanted.size.bytes()).clamp(1, 16);
    let ahead: Vec<SegmentName> = std::iter::successors(Some(wanted.next()), |name| Some(name.next()))
        .take(usize::try_from(depth).unwrap_or(1))
        .collect();
    // What lies before what is wanted was used, or never will be.
    for path in cache.files() {
        let Some((name, _)) = cached_name(&path) else { continue };
        if !ahead.iter().any(|keep| keep.to_string() == name) && name != wanted.to_string() {
            let _ = fs::remove_file(&path);
        }
    }
    let missing = ahead.into_iter().filter(|name| cache.find(&name.to_string()).is_none());
    let fetches = futures_util::stream::iter(missing).map(|name| async move {
        let draft = InFlight(cache.folder.join(format!(".{name}.draft")));
        if fs::write(&draft.0, []).is_err() {
            return false;
        }
        // Only what is whole: the end of the WAL may grow until the server asks for it.
        match repo.read_segment(&name).await {
            Ok(read) if read.source == SegmentSource::Whole && prove(identity, &name, &read.bytes).is_ok() => {
                cache.keep(&name, &read.bytes).is_ok()
            }
            _ => false,
        }
    });
    // In order, and no further than the first that is not there.
    let mut fetches = fetches.buffered(2);
    while let Some(kept) = fetches.next().await {
        if !kept {
            return false;
        }
    }
    true
}

/// The draft of a file that is being fetched. It goes with this value, unless it was renamed.
struct InFlight(PathBuf);

impl Drop for InFlight {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
