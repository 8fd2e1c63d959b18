//! Spool -> repository: whole segments and tails, and how far the archive is whole.
//!
//! ```text
//! start      what the repository holds         -> where to go on
//! plan       what the spool holds, what ended  -> what to upload next, how far the archive is whole    (pure)
//! compress   a part of a spool file            -> one zstd frame
//! Archiver   drives them, tries again for ever, and publishes the archived position
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::store::StoreError;
use super::{Created, RepoError, Repository, SameContent};
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::spool::{Spool, SpoolError};
use crate::pg::{Position, SegmentName};

mod compress;
pub mod plan;
pub mod start;

use compress::Compressors;
use plan::{Limits, Outcome, Planner, Tail, Work};
use start::Start;

/// How WAL is archived: the `[archive]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// When the server is told that WAL is safe.
    pub durability: Durability,
    /// WAL of an unfinished segment is sent at least this often, if there is any: how much a disaster may cost.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub tail_interval: Duration,
    /// zstd level of WAL objects, 1 to 19. On WAL, 1 was faster than 3 and not larger.
    pub compression_level: i32,
    /// Objects on their way to the repository at once. Their WAL is 48 MiB at most, or one segment, whatever the number.
    pub uploads_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            durability: Durability::Repository,
            tail_interval: Duration::from_secs(1),
            compression_level: super::frame::LEVEL_DEFAULT,
            uploads_max: 8,
        }
    }
}

impl Config {
    /// Checks what cannot be told from the types.
    ///
    /// # Errors
    /// What is wrong, with the setting's name.
    pub fn check(&self) -> Result<(), String> {
        let Self { tail_interval, compression_level, uploads_max, .. } = self;
        if !(1..=19).contains(compression_level) {
            return Err(format!("archive.compression_level = {compression_level} is not from 1 to 19"));
        }
        // Each is a connection and a task; what they carry is bounded elsewhere.
        if !(1..=64).contains(uploads_max) {
            return Err(format!("archive.uploads_max = {uploads_max} is not from 1 to 64"));
        }
        // More often makes an object of every commit; more seldom is no protection.
        if !(Duration::from_millis(10)..=Duration::from_secs(3_600)).contains(tail_interval) {
            return Err(format!("archive.tail_interval = {tail_interval:?} is not from 10 ms to 1 h"));
        }
        Ok(())
    }
}

/// When the server is told that WAL is safe, so that its slot lets go of it and a synchronous commit returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// When it is in the repository.
    #[default]
    Repository,
    /// When it is in the spool, synced. The spool is then no cache any more: losing it loses WAL.
    Spool,
}

/// WAL that may be compressed or on its way at once. What does not compress takes that much memory; with what waits for
/// the spool's disk and the program itself that stays below 128 MiB. Three segments of 16 MiB hide a store's latency.
const CONTENT_MAX: u64 = 48 << 20;

/// Tails on their way at once when commits wait. At 50 ms a put, a commit then waits for its own put and a quarter of
/// another.
const TAILS_MAX: usize = 4;

/// Obsolete tails deleted at once: deletions are small, and in no hurry.
const DELETIONS_MAX: usize = 4;

/// How long a stop may wait for the repository to take what was received.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// How archiving goes, for the status.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Objects on their way.
    pub in_flight: usize,
    /// Objects made since the start.
    pub objects: u64,
    /// WAL in them, in bytes.
    pub content_bytes: u64,
    /// The same compressed, in bytes.
    pub stored_bytes: u64,
    /// Calls that failed since the start.
    pub failures: u64,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// The repository does not take WAL, and is asked again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Since when.
    pub since: Timestamp,
    /// Failures since.
    pub failures: u64,
    /// The last error, with its causes.
    pub error: String,
    /// What the operator can do.
    pub hint: Option<String>,
}

/// Archiving ended for good.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The repository holds other WAL in its place, or a damaged object: nothing may be called archived past it.
    #[error("archive {what}")]
    Repo {
        /// The object, for people.
        what: String,
        /// What the repository said.
        source: RepoError,
    },
    /// What was spooled cannot be read back.
    #[error("read {what} from the spool")]
    Spool {
        /// The part of a segment, for people.
        what: String,
        /// Why.
        source: SpoolReadError,
    },
}

/// Why a spooled segment cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum SpoolReadError {
    /// It cannot be opened.
    Open(#[from] SpoolError),
    /// It cannot be read or compressed.
    Read(#[from] io::Error),
}

impl ArchiveError {
    /// Never: what passes by itself is tried again inside.
    pub const fn is_transient(&self) -> bool {
        false
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Repo { source, .. } => source.hint(),
            Self::Spool { .. } => Some(
                "start the agent again: what is missing in the spool is streamed again from the server. Nobody else may \
                 remove files from the spool"
                    .to_owned(),
            ),
        }
    }
}

/// What an [`Archiver`] tells, and is told.
#[derive(Debug)]
pub struct Channels {
    /// Everything before this is durable in the repository.
    pub archived: watch::Sender<Option<Position>>,
    /// How it goes.
    pub report: watch::Sender<Report>,
    /// Commits wait for us: send tails at once.
    pub synchronous: watch::Receiver<bool>,
}

/// Brings what comes into the spool to the repository, for ever.
#[derive(Debug)]
pub struct Archiver {
    uploader: Arc<Uploader>,
    planner: Planner,
    channels: Channels,
    spool: Spool,
    obsolete: VecDeque<Tail>,
}

/// The part that the uploads on their way share.
#[derive(Debug)]
struct Uploader {
    repo: Repository,
    spool: Spool,
    compressors: Compressors,
    /// Compressions at once: one per processor. More would only need more memory.
    processors: Semaphore,
    report: watch::Sender<Report>,
}

type Upload = BoxFuture<'static, (Work, Result<(), ArchiveError>)>;

impl Archiver {
    /// Goes on where the repository stands.
    pub fn new(repo: &Repository, spool: &Spool, config: &Config, start: Start, channels: Channels) -> Self {
        let limits = Limits {
            content_max: CONTENT_MAX,
            uploads_max: config.uploads_max.max(1),
            tails_max: TAILS_MAX,
            tail_interval: config.tail_interval,
        };
        channels.archived.send_replace(start.archived);
        let uploader = Uploader {
            // Failures are told in the status, so the trying again happens here and not below.
            repo: repo.clone().with_retry(RetryPolicy::ONCE, CancellationToken::new()),
            spool: spool.clone(),
            compressors: Compressors::new(config.compression_level),
            processors: Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)),
            report: channels.report.clone(),
        };
        Self {
            uploader: Arc::new(uploader),
            planner: Planner::new(spool.segment_size(), limits, start.archived, start.tails),
            channels,
            spool: spool.clone(),
            obsolete: start.obsolete.into(),
        }
    }

    /// Runs until `stop` is cancelled and then until everything is archived that came into the spool before
    /// `spool_closed` was cancelled, but no longer than ten seconds.
    ///
    /// # Errors
    /// Only what cannot pass: see [`ArchiveError`].
    pub async fn run(mut self, stop: CancellationToken, spool_closed: CancellationToken) -> Result<(), ArchiveError> {
        let mut spooled = self.spool.subscribe();
        let mut uploads: FuturesUnordered<Upload> = FuturesUnordered::new();
        let mut deletions = FuturesUnordered::new();
        let mut give_up_at: Option<Instant> = None;
        loop {
            let now = Instant::now().into_std();
            let outcome = self.planner.observe(&spooled.borrow_and_update(), now);
            self.apply(outcome);
            let eager = give_up_at.is_some() || *self.channels.synchronous.borrow_and_update();
            while let Some(work) = self.planner.next(now, eager) {
                uploads.push(self.uploader.clone().upload(work).boxed());
            }
            self.tell_in_flight(uploads.len());
            while deletions.len() < DELETIONS_MAX
                && let Some(tail) = self.obsolete.pop_front()
            {
                deletions.push(self.uploader.clone().delete(tail));
            }
            if give_up_at.is_some() && spool_closed.is_cancelled() && self.planner.is_idle() && deletions.is_empty() {
                return Ok(());
            }
            let wake_at = self.planner.wake_at().map(Instant::from_std);
            tokio::select! {
                Some((work, result)) = uploads.next() => {
                    result?;
                    let outcome = self.planner.done(&work);
                    self.apply(outcome);
                }
                Some(()) = deletions.next() => {}
                // The sender lives in `self.spool`.
                _ = spooled.changed() => {}
                Ok(()) = self.channels.synchronous.changed() => {}
                () = sleep_until(wake_at) => {}
                () = stop.cancelled(), if give_up_at.is_none() => give_up_at = Some(Instant::now() + DRAIN_MAX),
                () = spool_closed.cancelled(), if give_up_at.is_some() && !spool_closed.is_cancelled() => {}
                () = sleep_until(give_up_at) => {
                    tracing::warn!("stopped before the repository took everything; the server keeps what it did not");
                    return Ok(());
                }
            }
        }
    }

    fn apply(&mut self, outcome: Outcome) {
        if let Some(archived) = outcome.archived {
            self.channels.archived.send_replace(Some(archived));
        }
        for name in outcome.released {
            if let Err(error) = self.spool.remove_segment(&name) {
                tracing::warn!("failed to free the spool of {name}: {}", Chain(&error));
            }
        }
        for run in outcome.finished {
            tracing::info!(timeline = %run.timeline, end = %run.end, "timeline archived to its end");
            if let Err(error) = self.spool.remove_run(&run) {
                tracing::warn!("failed to free the spool of timeline {}: {}", run.timeline, Chain(&error));
            }
        }
        self.obsolete.extend(outcome.obsolete);
    }

    fn tell_in_flight(&self, uploads: usize) {
        self.channels.report.send_if_modified(|r| std::mem::replace(&mut r.in_flight, uploads) != uploads);
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl Uploader {
    /// Makes one object, however long it takes.
    async fn upload(self: Arc<Self>, work: Work) -> (Work, Result<(), ArchiveError>) {
        let result = self.try_upload(&work).await;
        (work, result)
    }

    async fn try_upload(&self, work: &Work) -> Result<(), ArchiveError> {
        let (name, from, to) = work.range();
        let what = || match work {
            Work::Segment(name) => format!("segment {name}"),
            Work::Tail(_) | Work::Merge { .. } => format!("WAL {from} to {to} of segment {name}"),
        };
        let offsets = (name.size.offset_of(from), to - from);
        let stored = {
            let _permit = self.processors.acquire().await.expect("the semaphore is never closed");
            let (spool, compressors) = (self.spool.clone(), self.compressors.clone());
            let task = tokio::task::spawn_blocking(move || {
                let file = spool.open_segment(&name)?;
                Ok(compressors.compress(&file, offsets.0, offsets.1)?)
            });
            task.await
                .expect("compressing does not panic")
                .map_err(|source: SpoolReadError| ArchiveError::Spool { what: what(), source })?
        };
        let key = match work {
            Work::Segment(name) => self.repo.layout().segment(name),
            Work::Tail(tail) | Work::Merge { tail, .. } => self.tail_key(tail),
        };
        let limit = usize::try_from(to - from).expect("an object fits into memory");
        let mut failures = 0;
        loop {
            match self.repo.put_once(&key, stored.clone(), SameContent::Compressed { limit }).await {
                Ok(created) => {
                    self.tell_success(to - from, stored.len() as u64);
                    if created == Created::Exists {
                        tracing::debug!(key, "was there already");
                    }
                    return Ok(());
                }
                Err(RepoError::Store(error)) => {
                    failures += 1;
                    let pause = RetryPolicy::FOREVER.pause(failures).max(retry_after(&error).unwrap_or_default());
                    if self.tell_failure(&error) {
                        tracing::warn!(?pause, "failed to archive {}, will try again: {}", what(), Chain(&error));
                    }
                    tokio::time::sleep(pause).await;
                }
                Err(source) => return Err(ArchiveError::Repo { what: what(), source }),
            }
        }
    }

    /// Deletes a tail whose bytes are elsewhere. One that stays is found and deleted after the next start.
    async fn delete(self: Arc<Self>, tail: Tail) {
        let key = self.tail_key(&tail);
        if let Err(error) = self.repo.store().delete(&key).await {
            tracing::warn!("failed to delete the obsolete {key}: {}", Chain(&error));
        }
    }

    fn tail_key(&self, tail: &Tail) -> String {
        tail_key(&self.repo, &tail.name, tail)
    }

    fn tell_success(&self, content: u64, stored: u64) {
        self.report.send_modify(|r| {
            r.objects += 1;
            r.content_bytes += content;
            r.stored_bytes += stored;
            if let Some(trouble) = r.trouble.take() {
                tracing::info!(failures = trouble.failures, "the repository takes WAL again");
            }
        });
    }

    /// Notes a failure. True if it is worth a line in the log: the first, the second, the fourth ... in a row.
    fn tell_failure(&self, error: &StoreError) -> bool {
        let text = Chain(error).to_string();
        let mut is_news = false;
        self.report.send_modify(|r| {
            r.failures += 1;
            let before = r.trouble.take();
            let failures = before.as_ref().map_or(0, |b| b.failures) + 1;
            is_news = failures.is_power_of_two();
            let since = before.map_or_else(Timestamp::now, |b| b.since);
            r.trouble = Some(Trouble { since, failures, error: text, hint: error.hint() });
        });
        is_news
    }
}

fn tail_key(repo: &Repository, name: &SegmentName, tail: &Tail) -> String {
    let offset = |lsn| u32::try_from(lsn - name.start()).expect("a segment is at most 1 GiB");
    repo.layout().tail(name, offset(tail.from), offset(tail.to))
}

fn retry_after(error: &StoreError) -> Option<Duration> {
    match error {
        StoreError::Unavailable { retry_after, .. } => *retry_after,
        StoreError::NotFound { .. } | StoreError::Refused { .. } => None,
    }
}
