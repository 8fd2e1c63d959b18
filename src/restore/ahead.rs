//! WAL put into `pg_wal` ahead of the server that replays it, as far as a budget allows.
//!
//! A `restore_command` costs a process for each segment, and replay waits for it. The restored server has none while we
//! watch it: it is started as a standby that streams from nowhere, which looks for each segment in `pg_wal`
//! and, where it does not find it, waits and looks again (`WaitForWALToBecomeAvailable` in
//! `access/transam/xlogrecovery.c`). So it never takes WAL that is late, or a store that is away, for the end of the WAL:
//! what is not there yet only holds it up. A segment is written elsewhere, proved, and renamed to its place when it is
//! whole. It is a file of its own and never a link to one in a cache, because the server writes over files that it recycles.

use std::collections::VecDeque;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write as _;
use std::num::NonZero;
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::TryStreamExt as _;
use futures_util::stream;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::RestoreError;
use super::path;
use super::plan::RestorePlan;
use super::wal_fetch::FetchError;
use super::wal_fetch::STORE_PATIENCE;
use super::wal_fetch::prove;
use crate::backoff::RetryError;
use crate::backoff::retry;
use crate::pg::Lsn;
use crate::pg::SegmentName;
use crate::pg::TimelineId;
use crate::repo::Repository;
use crate::repo::SegmentSource;
use crate::repo::catalog::Catalog;
use crate::repo::frame;
use crate::repo::store::StoreError;

/// The folder in `pg_wal` in which segments are written before they get their names.
const DRAFTS: &str = "walguard-ahead";

/// Stored bytes of segments that are fetched at once: eight of the usual size compressed hide a store's latency.
const IN_FLIGHT_BYTES: u64 = 128 << 20;

/// No more than this at once, however small they are.
const IN_FLIGHT_MAX: u64 = 8;

/// The least that is placed ahead: the server must have the next segment while it replays one.
const SEGMENTS_MIN: u64 = 4;

/// A segment of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    name: SegmentName,
    /// Recovery reads so many bytes of it.
    bytes: u64,
}

/// All the WAL of a plan, on its way into `pg_wal`.
#[derive(Debug)]
pub(super) struct Ahead {
    repo: Repository,
    catalog: Arc<Catalog>,
    wanted: Vec<Wanted>,
    /// History files of the timelines that there are.
    histories: Vec<TimelineId>,
    pg_wal: PathBuf,
    /// Permissions of a segment's file.
    mode: u32,
    /// So much may lie there that is not replayed yet.
    budget: u64,
    /// Segments that end here or before and lie there already are right: they were put there since the machine was
    /// started, and were whole.
    keeps_to: Lsn,
}

/// How much there is to know about what was placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PlacedWal {
    /// Segments put into `pg_wal`.
    pub segments: u64,
    /// Segments that were there already.
    pub kept: u64,
    /// Bytes fetched from the repository for them.
    pub stored_bytes: u64,
    /// For how long segments were being fetched, unpacked and written.
    pub busy: Duration,
}

/// Counts while it is under way.
#[derive(Debug, Default)]
struct Counts {
    segments: AtomicU64,
    kept: AtomicU64,
    stored_bytes: AtomicU64,
}

impl Ahead {
    /// The WAL that recovery reads from `from` on, in order: of each segment the file that holds the most of it.
    ///
    /// # Errors
    /// If a segment is nowhere, which the plan has excluded.
    pub(super) fn new(
        repo: &Repository,
        plan: &RestorePlan,
        from: Lsn,
        data_dir: &Path,
        mode: u32,
        budget: u64,
        keeps_to: Lsn,
    ) -> Result<Self, RestoreError> {
        let catalog = plan.catalog.clone().ok_or_else(|| missing(plan, from))?;
        // The server reads files of its target's history only.
        let path = catalog.history(plan.timeline).ok_or_else(|| missing(plan, from))?;
        let size = catalog.identity.segment_size;
        let last = size.segment_of(Lsn::new(plan.stop.read_to.bytes().saturating_sub(1)));
        let mut wanted = Vec::new();
        let mut next = size.segment_of(from);
        while next <= last {
            let end = size.end_of(next).min(plan.stop.read_to);
            let found = path::file_of(&catalog, path, next).filter(|(_, reach)| *reach >= end || next == last);
            let (name, _) = found.ok_or_else(|| missing(plan, size.start_of(next)))?;
            wanted.push(Wanted { name, bytes: end - size.start_of(next) });
            next = next.next();
        }
        let histories = catalog.timelines.iter().filter(|(_, wal)| wal.history.is_some());
        let histories = histories.map(|(timeline, _)| *timeline).filter(|timeline| *timeline != TimelineId::FIRST);
        Ok(Self {
            repo: repo.clone(),
            wanted,
            histories: histories.collect(),
            pg_wal: data_dir.join("pg_wal"),
            mode,
            budget: budget.max(SEGMENTS_MIN * size.bytes()),
            keeps_to,
            catalog,
        })
    }

    /// Places the histories of timelines: recovery follows them, and a promoted server takes a number that none of them has.
    ///
    /// # Errors
    /// Of the repository and the file system.
    pub(super) async fn place_histories(&self) -> Result<(), FetchError> {
        for timeline in &self.histories {
            let key = self.repo.layout().history(*timeline);
            let Some(content) = self.repo.read_small(&key).await? else { continue };
            self.write(&timeline.history_file_name(), &content)?;
        }
        Ok(())
    }

    /// Places all segments in order, never more than the budget ahead of what is `replayed`, and tells how far it is.
    ///
    /// # Errors
    /// If a segment cannot be had although the plan found it, or cannot be written; trouble of the store that may pass is
    /// waited for, about ten minutes.
    pub(super) async fn run(
        self,
        replayed: watch::Receiver<Lsn>,
        placed: watch::Sender<Lsn>,
        cancel: CancellationToken,
    ) -> Result<PlacedWal, FetchError> {
        let began = Instant::now();
        let size = self.catalog.identity.segment_size.bytes();
        let in_flight = usize::try_from((IN_FLIGHT_BYTES / size).clamp(1, IN_FLIGHT_MAX)).unwrap_or(1);
        // One core replays.
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let workers = Semaphore::new(cores.saturating_sub(1).clamp(1, in_flight));
        let (counts, buffers) = (Counts::default(), Arc::new(Mutex::new(Vec::new())));
        let idle = AtomicU64::new(0);
        let this = Arc::new(self);
        let place = |wanted: Wanted| {
            let (this, cancel, mut replayed) = (&this, &cancel, replayed.clone());
            let (workers, counts, buffers, idle) = (&workers, &counts, &buffers, &idle);
            async move {
                let waiting = Instant::now();
                let has_room = |replayed: &Lsn| wanted.name.end() <= *replayed + this.budget;
                let room = cancel.run_until_cancelled(replayed.wait_for(has_room)).await;
                let has_room = matches!(room, Some(Ok(_)));
                drop(room); // it holds a lock
                idle.fetch_max(u64::try_from(waiting.elapsed().as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
                if !has_room {
                    return Err(FetchError::Cancelled);
                }
                this.place(wanted, workers, buffers, counts, cancel).await?;
                Ok(wanted.name.end())
            }
        };
        let mut ends = stream::iter(this.wanted.iter().copied()).map(place).buffered(in_flight);
        while let Some(end) = ends.try_next().await? {
            placed.send_replace(end);
        }
        drop(ends);
        let _ = fs::remove_dir_all(this.pg_wal.join(DRAFTS)); // an empty folder disturbs nobody
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(PlacedWal {
            segments: count(&counts.segments),
            kept: count(&counts.kept),
            stored_bytes: count(&counts.stored_bytes),
            busy: began.elapsed().saturating_sub(Duration::from_micros(count(&idle))),
        })
    }

    async fn place(
        self: &Arc<Self>,
        wanted: Wanted,
        workers: &Semaphore,
        buffers: &Arc<Mutex<Vec<Vec<u8>>>>,
        counts: &Counts,
        cancel: &CancellationToken,
    ) -> Result<(), FetchError> {
        // The last one may have come from tails, and is written again.
        let is_last = self.wanted.last() == Some(&wanted);
        if wanted.name.end() <= self.keeps_to && !is_last && self.is_there(&wanted) {
            counts.kept.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let what = format!("fetch WAL segment {}", wanted.name);
        let fetched = retry(STORE_PATIENCE, cancel, &what, FetchError::is_transient, || self.fetch(&wanted)).await;
        let fetched = fetched.map_err(|error| match error {
            RetryError::Failed(error) => error,
            RetryError::Cancelled => FetchError::Cancelled,
        })?;
        let _turn = workers.acquire().await.expect("the semaphore is never closed");
        let (this, buffers) = (Arc::clone(self), Arc::clone(buffers));
        let stored_bytes = match &fetched {
            Fetched::Stored(stored) => stored.len() as u64,
            Fetched::PutTogether(content) => content.len() as u64,
        };
        let worked = tokio::task::spawn_blocking(move || match fetched {
            Fetched::Stored(stored) => {
                let free = || buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let mut content = free().unwrap_or_default();
                let result = this.unpack_and_write(&wanted, &stored, &mut content);
                buffers.lock().unwrap_or_else(PoisonError::into_inner).push(content);
                result
            }
            Fetched::PutTogether(content) => this.write(&wanted.name.to_string(), &content),
        });
        match worked.await {
            Ok(result) => result?,
            Err(failure) => panic::resume_unwind(failure.into_panic()),
        }
        counts.segments.fetch_add(1, Ordering::Relaxed);
        counts.stored_bytes.fetch_add(stored_bytes, Ordering::Relaxed);
        Ok(())
    }

    fn is_there(&self, wanted: &Wanted) -> bool {
        let there = fs::symlink_metadata(self.pg_wal.join(wanted.name.to_string()));
        there.is_ok_and(|file| file.is_file() && file.len() == wanted.name.size.bytes())
    }

    async fn fetch(&self, wanted: &Wanted) -> Result<Fetched, FetchError> {
        let name = &wanted.name;
        match self.repo.store().read(&self.repo.layout().segment(name), None).await {
            Ok(stored) => return Ok(Fetched::Stored(stored)),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(FetchError::Repo(error.into())),
        }
        // Never finished, or finished just now.
        let read = self.repo.read_segment(name).await?;
        let problem = match read.source {
            SegmentSource::Tails if read.valid_to < wanted.bytes => {
                format!("{} bytes of it are archived, and recovery reads {}", read.valid_to, wanted.bytes)
            }
            _ => {
                prove(&self.catalog.identity, name, &read.bytes)?;
                return Ok(Fetched::PutTogether(read.bytes));
            }
        };
        Err(FetchError::Unusable { file: name.to_string(), problem })
    }

    fn unpack_and_write(&self, wanted: &Wanted, stored: &Bytes, content: &mut Vec<u8>) -> Result<(), FetchError> {
        let limit = usize::try_from(wanted.name.size.bytes()).expect("a segment fits into memory");
        let unusable = |problem: String| FetchError::Unusable { file: wanted.name.to_string(), problem };
        frame::decompress_into(stored, limit, content).map_err(|error| unusable(error.to_string()))?;
        prove(&self.catalog.identity, &wanted.name, content)?;
        self.write(&wanted.name.to_string(), content)
    }

    /// Puts a file into `pg_wal`, whole or not at all for whoever looks.
    fn write(&self, name: &str, content: &[u8]) -> Result<(), FetchError> {
        let drafts = self.pg_wal.join(DRAFTS);
        let draft = drafts.join(name);
        let write = || {
            match fs::create_dir(&drafts) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            let mut options = File::options();
            let mut file = options.write(true).create(true).truncate(true).mode(self.mode).open(&draft)?;
            file.write_all(content)?;
            fs::rename(&draft, self.pg_wal.join(name))
        };
        write().map_err(|source| FetchError::Write { path: self.pg_wal.join(name), source })
    }
}

/// A segment as it came.
enum Fetched {
    /// The object of a whole segment.
    Stored(Bytes),
    /// The content of one that is not whole.
    PutTogether(Bytes),
}

fn missing(plan: &RestorePlan, at: Lsn) -> RestoreError {
    let what = format!("the WAL at {at} of timeline {}", plan.timeline);
    RestoreError::NotInWal { what, from: plan.backup.start, to: plan.stop.read_to }
}

/// What has been seen of a server that takes no connections yet: the segment that its startup process says it reads.
///
/// (Postgres: `set_ps_display` in `XLogFileRead`, `access/transam/xlogrecovery.c`.)
#[cfg(target_os = "linux")]
pub(super) fn segment_being_replayed(server: u32, size: crate::pg::SegmentSize) -> Option<SegmentName> {
    let children = fs::read_to_string(format!("/proc/{server}/task/{server}/children")).ok()?;
    let titles = children.split_whitespace().filter_map(|child| fs::read(format!("/proc/{child}/cmdline")).ok());
    let names = titles.filter_map(|title| {
        let title = String::from_utf8_lossy(&title).into_owned();
        let (_, name) = title.split_once("startup recovering ")?;
        SegmentName::parse(name.trim_end_matches(['\0', ' ']), size).ok()
    });
    names.collect::<VecDeque<_>>().pop_front()
}

/// Processes cannot be looked at here.
#[cfg(not(target_os = "linux"))]
pub(super) fn segment_being_replayed(_: u32, _: crate::pg::SegmentSize) -> Option<SegmentName> {
    None
}
