//! WAL on the local disk, between the server and the repository: a queue of segment files.
//!
//! ```text
//! <dir>/<cluster>/lock                              held by the agent that uses this spool
//! <dir>/<cluster>/holder                            who that is, for the repository's lease
//! <dir>/<cluster>/repository                        whose WAL went to which repository last
//! <dir>/<cluster>/00000001/000000010000000000000007           a whole segment
//! <dir>/<cluster>/00000001/000000010000000000000008.last      the last one of its timeline, shorter than a segment
//! <dir>/<cluster>/00000002/000000020000000000000008.partial   the one that is being written
//! ```
//!
//! One [`Writer`] appends what the server sends; readers follow the published [`Spooled`], whose every byte is on the
//! disk. A file gets its final name when all of it is synced, so a file without `.partial` can be trusted after a crash;
//! a `.partial` is thrown away and streamed again, because the server keeps the whole segment that a slot points into.
//! The spool is a cache: all of it can be lost without losing WAL, unless `archive.durability = "spool"` says otherwise.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use bytesize::ByteSize;
use tokio::sync::watch;

use crate::atomic_file;
use crate::pg::{Lsn, Position, SegmentName, SegmentSize, TimelineId};

/// The file of [`Spool::remember_repository`].
const REPOSITORY: &str = "repository";

/// Where the spool is, and how much it may hold.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The folder; each cluster has its own below it.
    pub dir: PathBuf,
    /// When so much WAL waits here, no more is read from the server, which then keeps it. At least two segments.
    pub size_max: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        // 4 GiB: more than an hour without a repository at 1 MiB/s of WAL, and small beside any database's own disk.
        Self { dir: PathBuf::from("/var/lib/walguard/spool"), size_max: ByteSize::gib(4) }
    }
}

/// The spool could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// Another process has it open.
    #[error("the spool {} is in use by another agent", path.display())]
    Locked {
        /// The cluster's folder.
        path: PathBuf,
    },
    /// The file system failed. A full disk is one of these, and may pass.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried, a verb.
        op: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The budget is too small to hold the segment being written beside the one being archived.
    #[error("the spool may hold {size_max}, but it needs two WAL segments of {} at least", ByteSize::b(segment.bytes()))]
    BudgetTooSmall {
        /// The budget in the settings.
        size_max: ByteSize,
        /// The cluster's segment size.
        segment: SegmentSize,
    },
    /// The server sent WAL that does not follow what it sent before.
    #[error("WAL at {got} does not follow what was received up to {expected}")]
    NotContiguous {
        /// Where the next byte belongs.
        expected: Lsn,
        /// Where the server said that it is.
        got: Lsn,
    },
}

impl SpoolError {
    /// True if the same call may succeed later: a full or sick disk.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() != io::ErrorKind::PermissionDenied)
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Locked { .. } => Some(
                "one agent per cluster and spool: stop the other one, or give this one its own `--spool`".to_owned(),
            ),
            Self::Io { source, path, .. } if is_full(source) => Some(format!(
                "make room on the disk of {}: `df -h {0}`; until then no WAL is read from the server, which keeps it for the slot",
                path.display()
            )),
            Self::Io { path, .. } => Some(format!(
                "the agent's user must be able to write there: `ls -ld {}`, or choose another `--spool`",
                path.display()
            )),
            Self::BudgetTooSmall { segment, .. } => {
                Some(format!("set `spool.size_max` to {} or more", ByteSize::b(4 * segment.bytes())))
            }
            Self::NotContiguous { .. } => None,
        }
    }
}

/// True for a full disk and for a used-up quota.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Io { op, path, source }
}

/// A stretch of one timeline's WAL without a hole, `[begin, end)`, all of it on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The timeline that it lies on.
    pub timeline: TimelineId,
    /// Where it begins: always the beginning of a segment.
    pub begin: Lsn,
    /// The first byte that is not on the disk.
    pub end: Lsn,
    /// Nothing more comes: the timeline ended here, or a hole follows.
    pub finished: bool,
}

impl Run {
    /// Its end, as a position.
    pub const fn end_position(&self) -> Position {
        Position { timeline: self.timeline, lsn: self.end }
    }
}

/// What the spool holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spooled {
    /// Oldest first. All but the last are finished.
    pub runs: Vec<Run>,
    /// Bytes in segment files.
    pub bytes: u64,
}

impl Spooled {
    /// The end of what is on the disk, or `None` if nothing is.
    pub fn position(&self) -> Option<Position> {
        self.runs.last().map(Run::end_position)
    }
}

/// The spool of one cluster, locked for this process. Clones are handles to one spool.
#[derive(Clone, Debug)]
pub struct Spool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    segment_size: SegmentSize,
    size_max: u64,
    holder: String,
    spooled: watch::Sender<Spooled>,
    _lock: File,
}

/// How a segment file is named, by how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// All bytes are there.
    Whole,
    /// Fewer bytes than a segment, and no more will come.
    Last,
    /// Being written.
    Partial,
}

impl Stage {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Last => ".last",
            Self::Partial => ".partial",
        }
    }
}

impl Spool {
    /// Opens (or makes) the spool of `cluster` and takes what an earlier agent left: whole segments and last ones.
    ///
    /// # Errors
    /// [`SpoolError::Locked`] if another process uses it; of the file system; if the budget is too small.
    pub fn open(config: &Config, cluster: &str, segment_size: SegmentSize) -> Result<Self, SpoolError> {
        if config.size_max.as_u64() < 2 * segment_size.bytes() {
            return Err(SpoolError::BudgetTooSmall { size_max: config.size_max, segment: segment_size });
        }
        let folder = config.dir.join(cluster);
        fs::create_dir_all(&folder).map_err(failed("create", &folder))?;
        let lock = take_lock(&folder)?;
        let holder = read_or_make_holder(&folder)?;
        let found = scan(&folder, segment_size)?;
        let inner = Inner {
            folder,
            segment_size,
            size_max: config.size_max.as_u64(),
            holder,
            spooled: watch::Sender::new(found),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Who uses this spool, the same before and after a restart: the holder's name in the repository's lease.
    pub fn holder(&self) -> &str {
        &self.inner.holder
    }

    /// What [`Spool::remember_repository`] was told last.
    pub fn repository(&self) -> Option<String> {
        fs::read_to_string(self.inner.folder.join(REPOSITORY)).ok()
    }

    /// Writes down whose WAL goes to which repository, for agents to come.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remember_repository(&self, repository: &str) -> Result<(), SpoolError> {
        if self.repository().as_deref() == Some(repository) {
            return Ok(());
        }
        let path = self.inner.folder.join(REPOSITORY);
        atomic_file::write(&path, repository.as_bytes()).map_err(failed("write", &path))
    }

    /// The size of the segments in it.
    pub fn segment_size(&self) -> SegmentSize {
        self.inner.segment_size
    }

    /// How many bytes it may hold.
    pub fn size_max(&self) -> u64 {
        self.inner.size_max
    }

    /// What it holds now.
    pub fn spooled(&self) -> Spooled {
        self.inner.spooled.borrow().clone()
    }

    /// Follows what it holds.
    pub fn subscribe(&self) -> watch::Receiver<Spooled> {
        self.inner.spooled.subscribe()
    }

    /// Waits until `more` bytes can come in. Bytes leave with [`Spool::remove_segment`].
    pub async fn wait_for_room(&self, more: u64) {
        let mut receiver = self.inner.spooled.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = receiver.wait_for(|s| s.bytes + more <= self.inner.size_max).await;
    }

    /// True if `more` bytes can come in.
    pub fn has_room(&self, more: u64) -> bool {
        self.inner.spooled.borrow().bytes + more <= self.inner.size_max
    }

    /// Opens a segment to read it, however far it is.
    ///
    /// # Errors
    /// Of the file system; [`io::ErrorKind::NotFound`] inside if it is not there.
    pub fn open_segment(&self, name: &SegmentName) -> Result<File, SpoolError> {
        // A writer may rename it between two tries, and does so once.
        let path = self.path(name, Stage::Whole);
        for stage in [Stage::Partial, Stage::Whole, Stage::Last] {
            match File::open(self.path(name, stage)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => return result.map_err(failed("open", &path)),
            }
        }
        Err(failed("open", &path)(io::ErrorKind::NotFound.into()))
    }

    /// Forgets a segment that is no longer needed here.
    ///
    /// # Errors
    /// Of the file system; one that is not there is no error.
    pub fn remove_segment(&self, name: &SegmentName) -> Result<(), SpoolError> {
        for stage in [Stage::Whole, Stage::Last, Stage::Partial] {
            let path = self.path(name, stage);
            let length = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed("look at", &path)(error)),
            };
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            self.inner.spooled.send_modify(|s| s.bytes = s.bytes.saturating_sub(length));
        }
        Ok(())
    }

    /// Forgets the oldest run, which must be finished, with the files that are left of it.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remove_run(&self, run: &Run) -> Result<(), SpoolError> {
        let size = self.inner.segment_size;
        let mut name = SegmentName::at(run.timeline, run.begin, size);
        while name.start() < run.end {
            self.remove_segment(&name)?;
            name = name.next();
        }
        self.inner.spooled.send_modify(|s| s.runs.retain(|r| (r.timeline, r.begin) != (run.timeline, run.begin)));
        Ok(())
    }

    /// Keeps only what continues an archive that reaches to `archived`, and forgets the rest: what is archived already,
    /// and what lies behind a hole. With `None` (nothing is archived) everything up to the first hole stays.
    ///
    /// # Errors
    /// Of the file system.
    pub fn keep_from(&self, archived: Option<Position>) -> Result<(), SpoolError> {
        let size = self.inner.segment_size;
        let found = self.spooled();
        let kept = continuation(&found.runs, archived, size);
        for run in &found.runs {
            let keep = kept.iter().find(|k| k.timeline == run.timeline && k.end == run.end);
            let end = keep.map_or(run.end, |k| k.begin);
            let mut name = SegmentName::at(run.timeline, run.begin, size);
            while name.start() < end {
                self.remove_segment(&name)?;
                name = name.next();
            }
        }
        self.inner.spooled.send_modify(|s| s.runs = kept);
        Ok(())
    }

    fn path(&self, name: &SegmentName, stage: Stage) -> PathBuf {
        self.inner.folder.join(name.timeline.hex()).join(format!("{name}{}", stage.suffix()))
    }
}

/// The runs that continue an archive which reaches to `archived`, cut to begin at its segment.
fn continuation(runs: &[Run], archived: Option<Position>, size: SegmentSize) -> Vec<Run> {
    let mut kept: Vec<Run> = Vec::new();
    for run in runs {
        let follows = match (kept.last(), archived) {
            // A promoted server begins its timeline in the segment in which the old one ended, or earlier.
            (Some(last), _) => last.finished && run.timeline > last.timeline && run.begin <= last.end,
            (None, Some(at)) => run.timeline == at.timeline && run.begin <= at.lsn && run.end > at.lsn,
            (None, None) => true,
        };
        if follows {
            let begin = match archived {
                Some(at) if kept.is_empty() => at.lsn.align_down(size.bytes()),
                _ => run.begin,
            };
            kept.push(Run { begin, ..*run });
        } else if !kept.is_empty() {
            break;
        }
    }
    kept
}

fn take_lock(folder: &Path) -> Result<File, SpoolError> {
    let path = folder.join("lock");
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed("open", &path))?;
    match atomic_file::lock(&file).map_err(failed("lock", &path))? {
        true => Ok(file),
        false => Err(SpoolError::Locked { path: folder.to_owned() }),
    }
}

fn read_or_make_holder(folder: &Path) -> Result<String, SpoolError> {
    let path = folder.join("holder");
    if let Ok(text) = fs::read_to_string(&path)
        && !text.trim().is_empty()
    {
        return Ok(text.trim().to_owned());
    }
    let holder = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
    atomic_file::write(&path, holder.as_bytes()).map_err(failed("write", &path))?;
    Ok(holder)
}

/// The folder of a timeline's segments. Others lie beside them, and are not the spool's to touch.
fn is_of_timeline(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.len() == 8 && name.bytes().all(|b| b.is_ascii_hexdigit()) && path.is_dir()
}

/// What an earlier agent left in `folder`. A `.partial` is removed: nobody knows how much of it reached the disk.
fn scan(folder: &Path, size: SegmentSize) -> Result<Spooled, SpoolError> {
    let mut found: BTreeMap<(TimelineId, Lsn), (SegmentName, u64, bool)> = BTreeMap::new();
    for timeline in read_dir(folder)?.into_iter().filter(|path| is_of_timeline(path)) {
        for path in read_dir(&timeline)? {
            let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let (stem, last) = match file_name.strip_suffix(Stage::Last.suffix()) {
                Some(stem) => (stem, true),
                None => (file_name.as_str(), false),
            };
            let length = fs::metadata(&path).map_err(failed("look at", &path))?.len();
            match SegmentName::parse(stem, size) {
                Ok(name) if (length == size.bytes()) != last && length <= size.bytes() => {
                    found.insert((name.timeline, name.start()), (name, length, last));
                }
                // A partial, a draft, or something cut short: it is streamed again.
                _ => fs::remove_file(&path).map_err(failed("remove", &path))?,
            }
        }
    }
    let mut spooled = Spooled::default();
    for (name, length, last) in found.into_values() {
        spooled.bytes += length;
        match spooled.runs.last_mut() {
            Some(run) if run.timeline == name.timeline && run.end == name.start() && !run.finished => {
                run.end = name.start() + length;
                run.finished = last;
            }
            _ => spooled.runs.push(Run {
                timeline: name.timeline,
                begin: name.start(),
                end: name.start() + length,
                finished: last,
            }),
        }
    }
    Ok(spooled)
}

fn read_dir(folder: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    let entries = fs::read_dir(folder).map_err(failed("list", folder))?;
    entries.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>().map_err(failed("list", folder))
}

/// Bytes that may wait for the disk. More than one sync's worth at a fast disk's pace, and little beside 128 MiB.
pub const PENDING_MAX: u64 = 4 << 20;

/// Appends to a spool. There is one at a time.
///
/// Bytes are handed over with [`Writer::append`] and stay in memory; [`Writer::flush`] brings everything handed over so
/// far to the disk in one go and publishes it. While a flush is on its way, more can be appended: whoever drives the
/// writer thereby syncs as often as the disk can, with as much as came in meanwhile.
#[derive(Debug)]
pub struct Writer {
    spool: Spool,
    timeline: TimelineId,
    /// Where the next appended byte belongs.
    next: Lsn,
    pending: Vec<Bytes>,
    pending_bytes: u64,
    disk: Option<Disk>,
}

/// The writer's half that works in blocking threads.
#[derive(Debug)]
struct Disk {
    spool: Spool,
    timeline: TimelineId,
    /// Everything before this is synced.
    synced: Lsn,
    /// The segment that `synced` lies in, if it has been begun.
    file: Option<File>,
}

/// A flush on its way; see [`Writer::begin_flush`].
#[derive(Debug)]
pub struct Flush(tokio::task::JoinHandle<(Disk, Vec<Bytes>, Result<(), SpoolError>)>);

impl Writer {
    /// Starts writing at `at`, the beginning of a segment. If the spool's last run ends there, the run goes on;
    /// otherwise that run is finished and a new one begins.
    ///
    /// # Errors
    /// Of the file system.
    pub fn begin(spool: &Spool, at: Position) -> Result<Self, SpoolError> {
        let size = spool.segment_size();
        assert_eq!(size.offset_of(at.lsn), 0, "writing begins at the beginning of a segment, not at {at}");
        let folder = spool.inner.folder.join(at.timeline.hex());
        fs::create_dir_all(&folder).map_err(failed("create", &folder))?;
        atomic_file::sync_folder_of(&folder).map_err(failed("sync", &spool.inner.folder))?;
        spool.inner.spooled.send_modify(|s| match s.runs.last_mut() {
            Some(run) if run.end_position() == at && !run.finished => {}
            last => {
                if let Some(run) = last {
                    run.finished = true;
                }
                s.runs.push(Run { timeline: at.timeline, begin: at.lsn, end: at.lsn, finished: false });
            }
        });
        let disk = Disk { spool: spool.clone(), timeline: at.timeline, synced: at.lsn, file: None };
        Ok(Self {
            spool: spool.clone(),
            timeline: at.timeline,
            next: at.lsn,
            pending: Vec::new(),
            pending_bytes: 0,
            disk: Some(disk),
        })
    }

    /// Where the next byte belongs.
    pub const fn next(&self) -> Position {
        Position { timeline: self.timeline, lsn: self.next }
    }

    /// Bytes that were appended and not yet given to a flush.
    pub const fn pending(&self) -> u64 {
        self.pending_bytes
    }

    /// Takes the next bytes, without copying them.
    ///
    /// # Errors
    /// [`SpoolError::NotContiguous`] if they belong elsewhere.
    pub fn append(&mut self, start: Lsn, data: Bytes) -> Result<(), SpoolError> {
        if start != self.next {
            return Err(SpoolError::NotContiguous { expected: self.next, got: start });
        }
        let length = data.len() as u64;
        self.next = start.checked_add(length).ok_or(SpoolError::NotContiguous { expected: start, got: Lsn::MAX })?;
        self.pending_bytes += length;
        self.pending.push(data);
        Ok(())
    }

    /// Starts to bring everything appended so far to the disk, in a blocking thread. `None` if there is nothing, or if
    /// the last flush has not been given back with [`Writer::end_flush`].
    pub fn begin_flush(&mut self) -> Option<Flush> {
        if self.pending.is_empty() {
            return None;
        }
        let mut disk = self.disk.take()?;
        let chunks = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        Some(Flush(tokio::task::spawn_blocking(move || {
            let result = disk.write(&chunks);
            (disk, chunks, result)
        })))
    }

    /// Takes a flush back. After an error its bytes are pending again, and nothing is published twice: call
    /// [`Writer::begin_flush`] again when the trouble may have passed.
    ///
    /// # Errors
    /// Of the file system.
    pub fn end_flush(&mut self, done: FlushDone) -> Result<(), SpoolError> {
        let FlushDone(disk, mut chunks, result) = done;
        let written = disk.synced;
        self.disk = Some(disk);
        if result.is_err() {
            // Segments that were finished before the error are synced and published; their bytes do not come back.
            let total: u64 = chunks.iter().map(|c| c.len() as u64).sum();
            let mut done = written - (Lsn::new(self.next.bytes() - self.pending_bytes - total));
            chunks.retain_mut(|chunk| {
                let skip = done.min(chunk.len() as u64);
                done -= skip;
                let _ = chunk.split_to(skip as usize); // at most the chunk's length
                !chunk.is_empty()
            });
            self.pending_bytes += chunks.iter().map(|c| c.len() as u64).sum::<u64>();
            chunks.append(&mut self.pending);
            self.pending = chunks;
        }
        result
    }

    /// Brings everything appended so far to the disk and publishes it.
    ///
    /// # Errors
    /// Of the file system; the bytes are then pending as before.
    pub async fn flush(&mut self) -> Result<(), SpoolError> {
        match self.begin_flush() {
            None => Ok(()),
            Some(flush) => {
                let done = flush.wait().await;
                self.end_flush(done)
            }
        }
    }

    /// Ends the run at the last byte appended: the timeline ends here. What is pending must have been flushed.
    ///
    /// # Errors
    /// Of the file system.
    pub fn finish(mut self) -> Result<(), SpoolError> {
        assert!(self.pending.is_empty(), "finish a run whose last bytes are not on the disk");
        let disk = self.disk.take().expect("a flush was begun and not ended");
        if disk.file.is_some() {
            let name = SegmentName::at(disk.timeline, disk.synced, self.spool.segment_size());
            disk.rename(&name, Stage::Last)?;
        }
        self.spool.inner.spooled.send_modify(|s| {
            if let Some(run) = s.runs.last_mut() {
                run.finished = true;
            }
        });
        Ok(())
    }
}

/// The result of a [`Flush`], for [`Writer::end_flush`].
#[derive(Debug)]
pub struct FlushDone(Disk, Vec<Bytes>, Result<(), SpoolError>);

impl Flush {
    /// Waits for it. Cancel safe.
    pub async fn wait(mut self) -> FlushDone {
        self.done().await
    }

    /// Waits for it by reference, for `select!`. Cancel safe; not to be called again once it has answered.
    pub async fn done(&mut self) -> FlushDone {
        match (&mut self.0).await {
            Ok((disk, chunks, result)) => FlushDone(disk, chunks, result),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await, // the runtime is shutting down
            },
        }
    }
}

impl Disk {
    fn write(&mut self, chunks: &[Bytes]) -> Result<(), SpoolError> {
        let size = self.spool.segment_size();
        let mut at = self.synced;
        for chunk in chunks {
            let mut rest: &[u8] = chunk;
            while !rest.is_empty() {
                let name = SegmentName::at(self.timeline, at, size);
                let room = usize::try_from(name.end() - at).unwrap_or(usize::MAX);
                let (now, later) = rest.split_at(rest.len().min(room));
                self.write_at(&name, size.offset_of(at), now)?;
                at = at + now.len() as u64;
                rest = later;
                if at == name.end() {
                    self.sync(&name, at)?;
                }
            }
        }
        if at > self.synced {
            self.sync(&SegmentName::at(self.timeline, at, size), at)?;
        }
        Ok(())
    }

    /// Writes at an offset rather than at the end: after an error the same bytes go to the same place again.
    fn write_at(&mut self, name: &SegmentName, offset: u64, bytes: &[u8]) -> Result<(), SpoolError> {
        let path = self.spool.path(name, Stage::Partial);
        let file = match &mut self.file {
            Some(file) => file,
            empty => {
                let mut options = OpenOptions::new();
                let file =
                    options.write(true).create(true).truncate(true).open(&path).map_err(failed("create", &path))?;
                atomic_file::sync_folder_of(&path).map_err(failed("sync folder of", &path))?;
                empty.insert(file)
            }
        };
        file.write_all_at(bytes, offset).map_err(failed("write", &path))
    }

    /// Makes everything before `at`, which lies in segment `name` or at its end, durable, and publishes it.
    fn sync(&mut self, name: &SegmentName, at: Lsn) -> Result<(), SpoolError> {
        let path = self.spool.path(name, Stage::Partial);
        if let Some(file) = &self.file {
            file.sync_data().map_err(failed("sync", &path))?;
        }
        if at == name.end() {
            self.rename(name, Stage::Whole)?;
            self.file = None;
        }
        let more = at - self.synced;
        self.synced = at;
        self.spool.inner.spooled.send_modify(|s| {
            s.bytes += more;
            let run = s.runs.last_mut().expect("the writer's run is the last one");
            assert!(run.timeline == self.timeline && run.end < at, "published {at} after {run:?}");
            run.end = at;
        });
        Ok(())
    }

    fn rename(&self, name: &SegmentName, stage: Stage) -> Result<(), SpoolError> {
        let (from, to) = (self.spool.path(name, Stage::Partial), self.spool.path(name, stage));
        fs::rename(&from, &to).map_err(failed("rename", &from))?;
        atomic_file::sync_folder_of(&to).map_err(failed("sync folder of", &to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    const MIB: u64 = 1 << 20;

    fn config(dir: &Path) -> Config {
        Config { dir: dir.to_owned(), size_max: ByteSize::mib(8) }
    }

    fn open(dir: &Path) -> Spool {
        Spool::open(&config(dir), "main", SegmentSize::new(MIB).unwrap()).unwrap()
    }

    fn at(timeline: u32, lsn: u64) -> Position {
        Position { timeline: TimelineId::new(timeline).unwrap(), lsn: Lsn::new(lsn) }
    }

    fn run(timeline: u32, begin: u64, end: u64, finished: bool) -> Run {
        Run { timeline: TimelineId::new(timeline).unwrap(), begin: Lsn::new(begin), end: Lsn::new(end), finished }
    }

    fn name(timeline: u32, lsn: u64) -> SegmentName {
        SegmentName::at(TimelineId::new(timeline).unwrap(), Lsn::new(lsn), SegmentSize::new(MIB).unwrap())
    }

    /// Different bytes at every position.
    fn wal(from: u64, length: u64) -> Bytes {
        (from..from + length).map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8).collect()
    }

    fn content(spool: &Spool, name: &SegmentName) -> Vec<u8> {
        let mut bytes = Vec::new();
        spool.open_segment(name).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    async fn write(spool: &Spool, from: Position, length: u64) -> Writer {
        let mut writer = Writer::begin(spool, from).unwrap();
        writer.append(from.lsn, wal(from.lsn.bytes(), length)).unwrap();
        writer.flush().await.unwrap();
        writer
    }

    #[tokio::test]
    async fn what_is_appended_is_cut_into_segments() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let mut writer = Writer::begin(&spool, at(1, MIB)).unwrap();
        for from in (0..5).map(|n| MIB + n * 600_000) {
            writer.append(Lsn::new(from), wal(from, 600_000)).unwrap();
        }
        assert_eq!(spool.spooled().position(), Some(at(1, MIB)), "nothing is published before it is on the disk");
        writer.flush().await.unwrap();
        let end = MIB + 3_000_000;
        assert_eq!(spool.spooled(), Spooled { runs: vec![run(1, MIB, end, false)], bytes: 3_000_000 });
        for segment in [MIB, 2 * MIB, 3 * MIB] {
            let length = MIB.min(end - segment);
            assert_eq!(content(&spool, &name(1, segment)), wal(segment, length));
        }
    }

    #[tokio::test]
    async fn wal_that_does_not_follow_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = write(&open(dir.path()), at(1, 0), 100).await;
        let error = writer.append(Lsn::new(101), wal(101, 1)).unwrap_err();
        assert!(matches!(error, SpoolError::NotContiguous { .. }));
    }

    #[tokio::test]
    async fn a_restart_keeps_whole_segments_and_forgets_the_one_being_written() {
        let dir = tempfile::tempdir().unwrap();
        drop(write(&open(dir.path()), at(1, 0), 2 * MIB + 500).await);
        let spool = open(dir.path());
        assert_eq!(spool.spooled(), Spooled { runs: vec![run(1, 0, 2 * MIB, false)], bytes: 2 * MIB });
        assert!(spool.open_segment(&name(1, 2 * MIB)).is_err());
        // It is streamed again, and the run goes on.
        write(&spool, at(1, 2 * MIB), 700).await;
        assert_eq!(spool.spooled().runs, [run(1, 0, 2 * MIB + 700, false)]);
    }

    #[tokio::test]
    async fn a_finished_timeline_survives_a_restart_with_its_unfinished_segment() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        write(&spool, at(1, 0), MIB + 500).await.finish().unwrap();
        drop(write(&spool, at(2, MIB), 900).await);
        drop(spool);
        let spool = open(dir.path());
        assert_eq!(spool.spooled().runs, [run(1, 0, MIB + 500, true)]);
        assert_eq!(content(&spool, &name(1, MIB)), wal(MIB, 500));
    }

    #[tokio::test]
    async fn a_restart_keeps_only_what_continues_the_archive() {
        let size = SegmentSize::new(MIB).unwrap();
        let kept = |runs: &[Run], archived| continuation(runs, archived, size);
        let whole = run(1, 0, 4 * MIB, false);
        assert_eq!(kept(&[whole], Some(at(1, 2 * MIB + 5))), [run(1, 2 * MIB, 4 * MIB, false)]);
        assert_eq!(kept(&[whole], Some(at(1, 4 * MIB))), [], "all of it is archived");
        assert_eq!(kept(&[whole], Some(at(1, 9 * MIB))), [], "the archive is further than this spool");
        assert_eq!(kept(&[run(1, 3 * MIB, 4 * MIB, false)], Some(at(1, MIB))), [], "a hole lies before it");
        assert_eq!(kept(&[whole], Some(at(2, MIB))), [], "of another timeline");
        let (old, new) = (run(1, 0, MIB + 5, true), run(2, MIB, 3 * MIB, false));
        assert_eq!(kept(&[old, new], Some(at(1, 7))), [old, new]);
        assert_eq!(kept(&[old, new], Some(at(2, 2 * MIB))), [run(2, 2 * MIB, 3 * MIB, false)]);
        assert_eq!(kept(&[old, run(2, 2 * MIB, 3 * MIB, false)], Some(at(1, 7))), [old], "a hole lies between");
        assert_eq!(kept(&[old, new], None), [old, new]);
    }

    #[tokio::test]
    async fn what_is_not_kept_leaves_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        drop(write(&open(dir.path()), at(1, 0), 4 * MIB).await);
        let spool = open(dir.path());
        spool.keep_from(Some(at(1, 2 * MIB + 5))).unwrap();
        assert_eq!(spool.spooled(), Spooled { runs: vec![run(1, 2 * MIB, 4 * MIB, false)], bytes: 2 * MIB });
        assert!(spool.open_segment(&name(1, 0)).is_err());
        spool.keep_from(Some(at(1, 4 * MIB))).unwrap();
        assert_eq!(spool.spooled(), Spooled::default());
    }

    #[tokio::test]
    async fn a_spool_has_one_agent() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let second = Spool::open(&config(dir.path()), "main", SegmentSize::new(MIB).unwrap());
        assert!(matches!(second, Err(SpoolError::Locked { .. })));
        let holder = spool.holder().to_owned();
        drop(spool);
        let spool = open(dir.path());
        assert_eq!(spool.holder(), holder, "the holder is the same after a restart");
        assert_eq!(spool.repository(), None);
        spool.remember_repository("7 file:///srv/repo/main").unwrap();
        drop(spool);
        assert_eq!(open(dir.path()).repository().as_deref(), Some("7 file:///srv/repo/main"));
    }

    #[tokio::test]
    async fn a_full_budget_makes_the_writer_wait_until_segments_leave() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let _writer = write(&spool, at(1, 0), 8 * MIB).await;
        assert!(!spool.has_room(1));
        let waiting = spool.wait_for_room(MIB);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        spool.remove_segment(&name(1, 0)).unwrap();
        waiting.await;
        assert_eq!(spool.spooled().bytes, 7 * MIB);
    }

    #[tokio::test]
    async fn bytes_that_the_disk_refused_are_written_when_it_takes_them() {
        let dir = tempfile::tempdir().unwrap();
        let spool = open(dir.path());
        let mut writer = write(&spool, at(1, 0), 300).await;
        writer.append(Lsn::new(300), wal(300, 2 * MIB - 300)).unwrap();
        writer.append(Lsn::new(2 * MIB), wal(2 * MIB, 50)).unwrap();
        // A folder in the way of the second segment: the first one is finished, the rest is not.
        let obstacle = dir.path().join("main/00000001").join(format!("{}.partial", name(1, MIB)));
        fs::create_dir(&obstacle).unwrap();
        writer.flush().await.unwrap_err();
        assert_eq!(spool.spooled().position(), Some(at(1, MIB)));
        assert_eq!(writer.next(), at(1, 2 * MIB + 50));
        fs::remove_dir(&obstacle).unwrap();
        writer.append(Lsn::new(2 * MIB + 50), wal(2 * MIB + 50, 50)).unwrap();
        writer.flush().await.unwrap();
        assert_eq!(spool.spooled().position(), Some(at(1, 2 * MIB + 100)));
        for (segment, length) in [(0, MIB), (MIB, MIB), (2 * MIB, 100)] {
            assert_eq!(content(&spool, &name(1, segment)), wal(segment, length));
        }
    }

    #[test]
    fn what_others_keep_in_the_spool_outlives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        let (told, draft) = (dir.path().join("main/notify/told.json"), dir.path().join("main/00000001/draft"));
        for path in [&told, &draft] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "{}").unwrap();
        }
        drop(open(dir.path()));
        assert_eq!((told.exists(), draft.exists()), (true, false));
    }

    #[test]
    fn a_budget_below_two_segments_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Spool::open(&config(dir.path()), "main", SegmentSize::DEFAULT).unwrap_err();
        assert!(matches!(error, SpoolError::BudgetTooSmall { .. }));
        assert!(error.hint().unwrap().contains("64"));
    }
}
