//! The loop that understands the WAL as it comes: what each transaction did to which table, and what each segment holds.
//!
//! It reads what the archiver reads, the spool, from one segment to the next; what has left the spool already it reads from
//! the repository. It never holds up the archiver: when it is behind, or WAL cannot be read, archiving goes on.
//!
//! # Where it begins
//!
//! Nothing that it knows is kept anywhere but in the repository. It begins with the newest snapshot of names from which on no
//! transaction is missed that was open at the end of the archive, and reads the WAL in between again: what was told before
//! is told again, and whoever listens knows it by its place. Without a snapshot the server is asked over SQL.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::derived::Missed;
use super::names::{self, NamesError, Told};
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::ConnInfo;
use crate::capture::spool::{Run, Spool, SpoolError};
use crate::decode::change::RowCounts;
use crate::decode::{DecodeError, Source};
use crate::detect::names::Seed;
use crate::detect::{
    DdlEvent, Definitions, Limits, Names, NamesLimits, NamesSnapshot, Observer, Owner, Owners, Relation, Running,
    Tally, Transaction, Transactions,
};
use crate::pg::{Lsn, Oid, Position, RelFile, SegmentName, SegmentNumber, TimelineHistory, TimelineId, Xid};
use crate::repo::catalog::{CatalogScope, LsnRange};
use crate::repo::index::{Indexer, Seen, SegmentIndex};
use crate::repo::layout::Object;
use crate::repo::{RepoError, Repository};
use crate::serve::status::Board;

/// WAL that is read and decoded at a time: a few milliseconds, and little memory for what is found in it.
const PIECE_BYTES: u64 = 256 << 10;

/// The most WAL that is read again at the start. Snapshots of names are a GiB apart.
const READ_AGAIN_BYTES_MAX: u64 = 4 << 30;

/// Segments whose indexes are looked for at the start.
const INDEXES_LOOKED_FOR: u64 = 256;

/// Open transactions are told of no more often than this.
const OPEN_EVERY: Duration = Duration::from_millis(100);

/// Open transactions told of at a time, those with the most rows first.
const OPEN_MAX: usize = 64;

/// The server is asked for names no more often than this.
const NAMES_EVERY: Duration = Duration::from_secs(10);

/// A loop that ran for so long had found its way; the next failure is a new one.
const WELL_AFTER: Duration = Duration::from_secs(60);

/// What the loop finds, in the order of the WAL.
#[derive(Debug)]
pub(super) enum Observed {
    /// A transaction ended.
    Ended {
        /// The transaction.
        transaction: Box<Transaction>,
        /// On which timeline.
        timeline: TimelineId,
    },
    /// What open transactions did so far, of those that did more since this was told last.
    Open {
        /// On which timeline.
        timeline: TimelineId,
        /// The transactions and subtransactions.
        transactions: Vec<OpenReport>,
    },
    /// The server wrote down which transactions are open.
    Running {
        /// Which.
        running: Running,
        /// On which timeline.
        timeline: TimelineId,
    },
    /// The tables that there are, once names are known and whenever they were told anew.
    Tables(Vec<(RelFile, Arc<Relation>)>),
    /// The server was restored to a moment before what was told already: its timeline branched off here.
    WentBack(Position),
    /// Everything up to here was told. It is the end of the WAL so far.
    CaughtUp {
        /// Here.
        position: Position,
        /// Of this database alone; `None`: of the whole WAL.
        database: Option<Oid>,
    },
}

/// An open transaction, or subtransaction, that changed or deleted rows or definitions.
#[derive(Clone, Debug)]
pub(super) struct OpenReport {
    /// Its id.
    pub(super) xid: Xid,
    /// Where its first record begins.
    pub(super) begin: Lsn,
    /// It is prepared.
    pub(super) is_prepared: bool,
    /// False if its beginning was not seen.
    pub(super) is_complete: bool,
    /// Rows by relation; those of catalogs, TOAST tables and rewrites are left out.
    pub(super) tallies: Vec<Tally>,
    /// What it did to definitions.
    pub(super) ddl: Vec<DdlEvent>,
    /// Messages for walguard.
    pub(super) messages: Vec<Arc<[u8]>>,
}

/// What is put into the repository beside a segment, once that is archived.
#[derive(Debug)]
pub(super) enum Derived {
    /// A segment's index.
    Index(SegmentName, Box<SegmentIndex>),
    /// What relations are called where a segment begins.
    Names(SegmentName, Box<NamesSnapshot>),
}

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) repo: Repository,
    pub(super) spool: Spool,
    pub(super) source: Source,
    /// For names; under a name of its own.
    pub(super) conninfo: ConnInfo,
    pub(super) board: Board,
    /// The server's history at the start.
    pub(super) path: TimelineHistory,
    pub(super) archived: watch::Receiver<Option<Position>>,
    pub(super) derived: mpsc::Sender<Derived>,
    /// What finds no room there.
    pub(super) missed: Missed,
    pub(super) observed: mpsc::Sender<Observed>,
}

/// The server is being asked for names.
type Asking = JoinHandle<Result<(Seed, Vec<Told>), NamesError>>;

/// Why the loop could not go on; it begins anew.
#[derive(Debug, thiserror::Error)]
enum ScanError {
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error("read segment {name} in the spool")]
    Read { name: SegmentName, source: io::Error },
    #[error("{0}")]
    Lost(&'static str),
}

/// What there is to read.
enum Available {
    /// Bytes of the segment in work, from where the indexer stands.
    Bytes(Bytes),
    /// So many bytes of a segment file in the spool, from where the indexer stands.
    File(std::fs::File, u64),
    /// The timeline ends here; the next one goes on in this segment.
    Switch(SegmentName),
    /// There is a hole; WAL goes on with this segment.
    Jump(SegmentName),
    /// Nothing yet.
    Wait,
}

/// What came of a piece.
struct Step {
    indexer: Indexer,
    seen: Vec<Seen>,
    fault: Option<DecodeError>,
    /// What reading and decoding took of a processor.
    cpu: Duration,
}

impl Scan {
    /// Follows the WAL until `stop`. What goes wrong is told on the board, and tried again: no fault here ends the agent.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            match stop.run_until_cancelled(self.follow()).await {
                None => return Ok(()),
                Some(Ok(())) if stop.is_cancelled() => return Ok(()),
                Some(Ok(())) => {
                    // Whoever listened is gone, and its own result tells why.
                    stop.cancelled().await;
                    return Ok(());
                }
                Some(Err(error)) => {
                    // What went well for long is not what failed before.
                    failures = if begun.elapsed() >= WELL_AFTER { 1 } else { failures + 1 };
                    let text = format!("the WAL cannot be watched: {}", Chain(&error));
                    self.board.raise("scan", text, Some("archiving goes on; it is tried again".to_owned()));
                    let pause = RetryPolicy::FOREVER.pause(failures);
                    if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn follow(&mut self) -> Result<(), ScanError> {
        let Some((first, mut indexer)) = self.begin().await? else { return Ok(()) };
        let mut spooled = self.spool.subscribe();
        let mut current = first;
        indexer.begin(current);
        let mut telling = Telling::default();
        let mut asking: Option<Asking> = None;
        let mut asked_at: Option<Instant> = None;
        let mut wanted: BTreeSet<Oid> = BTreeSet::new();
        let mut tables_told = false;
        let mut caught_up = None;
        loop {
            if !tables_told {
                let tables = indexer.observer().names().tables().collect();
                if self.observed.send(Observed::Tables(tables)).await.is_err() {
                    return Ok(());
                }
                tables_told = true;
            }
            wanted.extend(indexer.observer_mut().names_mut().take_incomplete());
            if asking.is_none() && !wanted.is_empty() && asked_at.is_none_or(|at| at.elapsed() >= NAMES_EVERY) {
                asked_at = Some(Instant::now());
                let (conninfo, only) = (self.conninfo.clone(), std::mem::take(&mut wanted));
                asking = Some(tokio::spawn(async move {
                    let only: Vec<Oid> = only.into_iter().collect();
                    names::read(&conninfo, Some(&only)).await
                }));
            }
            if asking.as_ref().is_some_and(JoinHandle::is_finished)
                && let Some(handle) = asking.take()
                && let Ok(Ok((shared, told))) = handle.await
            {
                seed(indexer.observer_mut().names_mut(), shared, told, &self.board);
                tables_told = false;
            }
            match self.available(&current, &indexer).await? {
                Available::Wait => {
                    let position = Position { timeline: current.timeline, lsn: indexer.pushed_to() };
                    if caught_up != Some(position) {
                        caught_up = Some(position);
                        self.board.clear("scan");
                        if self.observed.send(Observed::CaughtUp { position, database: None }).await.is_err() {
                            return Ok(());
                        }
                    }
                    let more = async {
                        tokio::select! {
                            changed = spooled.changed() => changed.is_ok(),
                            changed = self.archived.changed() => changed.is_ok(),
                            () = tokio::time::sleep(NAMES_EVERY) => true,
                        }
                    };
                    if !more.await {
                        return Ok(());
                    }
                    spooled.mark_unchanged();
                }
                Available::Switch(next) => {
                    let fork = self.fork_before(&next, current.timeline, indexer.proved_to()).await?;
                    let Some(fork) = fork else {
                        tracing::info!(from = %current.timeline, to = %next.timeline, "the timeline switches");
                        indexer.switch(next);
                        current = next;
                        continue;
                    };
                    let first = SegmentName::at(next.timeline, fork, next.size);
                    tracing::info!(from = %current.timeline, to = %next.timeline, %fork, "the server went back in time");
                    let names = self.ask().await;
                    let snapshot = Derived::Names(first, Box::new(names.export()));
                    let back = Observed::WentBack(Position { timeline: next.timeline, lsn: fork });
                    if !names.is_empty() && self.derived.send(snapshot).await.is_err()
                        || self.observed.send(back).await.is_err()
                    {
                        return Ok(());
                    }
                    indexer = Indexer::new(self.source, &first, Observer::new(names, Limits::default(), false));
                    indexer.begin(first);
                    current = first;
                    (telling, tables_told) = (Telling::default(), false);
                }
                Available::Jump(next) => {
                    tracing::warn!(from = %indexer.pushed_to(), to = %next.start(), "WAL is missing: going on behind it");
                    let names = indexer.into_observer().into_names();
                    indexer = Indexer::new(self.source, &next, Observer::new(names, Limits::default(), false));
                    indexer.begin(next);
                    current = next;
                }
                available => {
                    let step = self.step(indexer, current, available).await?;
                    indexer = step.indexer;
                    self.board.update(|s| s.scan.cpu_seconds += step.cpu.as_secs_f64());
                    self.tell_fault(step.fault);
                    self.tell_fault(indexer.observer_mut().take_fault());
                    if !self.tell(step.seen, current.timeline, &indexer, &mut telling).await {
                        return Ok(());
                    }
                    if indexer.pushed_to() == current.end() {
                        current = self.next_segment(&current);
                        indexer.begin(current);
                    }
                }
            }
        }
    }

    /// The segment behind `current`, on the timeline on which it is to be read.
    fn next_segment(&self, current: &SegmentName) -> SegmentName {
        let next = current.next();
        let spooled = self.spool.spooled();
        let is_there = |run: &&Run| run.begin <= next.start() && (next.start() < run.end || !run.finished);
        let own = spooled.runs.iter().filter(is_there).find(|run| run.timeline >= next.timeline);
        let known = self.path.file_timeline(next.number, next.size);
        let timeline = own.map_or(known.max(next.timeline), |run| run.timeline);
        SegmentName { timeline, ..next }
    }

    /// Finds the first segment to read, and what is known there.
    async fn begin(&mut self) -> Result<Option<(SegmentName, Indexer)>, ScanError> {
        let size = self.source.segment_size;
        let archived = *self.archived.borrow_and_update();
        if let Some(archived) = archived {
            self.follow_history(archived).await?;
            let here = size.segment_of(archived.lsn);
            let resume = self.resume_from(here).await?;
            let want = size.segment_of(resume.unwrap_or(archived.lsn));
            let at = |number| SegmentName { timeline: self.path.file_timeline(number, size), number, size };
            let names = self.repo.names_before(&self.path, &at(want), self.source.major).await?;
            let near = |name: &SegmentName| archived.lsn.saturating_sub(name.start()) <= READ_AGAIN_BYTES_MAX;
            if let (Some(_), Some((name, snapshot))) = (resume, names.filter(|(name, _)| near(name))) {
                tracing::info!(from = %name, "names were found in the repository: reading the WAL from there on");
                let names = Names::import(self.source.major, NamesLimits::default(), snapshot);
                let observer = Observer::new(names, Limits::default(), true);
                let first = at(name.number);
                return Ok(Some((first, Indexer::new(self.source, &first, observer))));
            }
        }
        let first = match archived {
            Some(archived) => {
                let number = size.segment_of(archived.lsn);
                SegmentName { timeline: archived.timeline, number, size }
            }
            None => {
                let mut spooled = self.spool.subscribe();
                let run = spooled.wait_for(|spooled| !spooled.runs.is_empty()).await;
                let Ok(Some(run)) = run.map(|spooled| spooled.runs.first().copied()) else { return Ok(None) };
                SegmentName::at(run.timeline, run.begin, size)
            }
        };
        let names = self.ask().await;
        // Not quite as of the beginning of the segment; but nothing better is known of what lies before.
        let snapshot = Derived::Names(first, Box::new(names.export()));
        if !names.is_empty() && self.derived.send(snapshot).await.is_err() {
            return Ok(None);
        }
        Ok(Some((first, Indexer::new(self.source, &first, Observer::new(names, Limits::default(), false)))))
    }

    /// Where decoding must begin so that no transaction is missed that was open at the end of the indexed archive before
    /// segment `here`. `None` if no index is near.
    async fn resume_from(&self, here: SegmentNumber) -> Result<Option<Lsn>, ScanError> {
        let size = self.source.segment_size;
        let timeline = self.path.file_timeline(here, size);
        let number = SegmentNumber::new(here.get().saturating_sub(INDEXES_LOOKED_FOR));
        let before = self.repo.layout().before_index(&SegmentName { timeline, number, size });
        let mut newest = None;
        let mut objects = std::pin::pin!(self.repo.objects(self.repo.layout().index_folder(timeline), Some(before)));
        while let Some(object) = objects.try_next().await? {
            if let Some(Object::Index(name)) = self.repo.layout().parse(&object.key, size)
                && name.number < here
            {
                // What an agent before us could not write any more.
                if let Some(before) = newest.filter(|before: &SegmentName| before.end() < name.start()) {
                    self.missed.add_range(timeline, LsnRange { from: before.end(), to: name.start() });
                }
                newest = Some(name);
            }
        }
        let Some(name) = newest else { return Ok(None) };
        let index = self.repo.index(&name).await?;
        Ok(index.map(|index| index.resume_from.unwrap_or(name.end()).min(name.end())))
    }

    /// The history of the timeline that the archive has reached.
    async fn follow_history(&mut self, archived: Position) -> Result<(), ScanError> {
        if archived.timeline != self.path.timeline() {
            let catalog = self.repo.catalog(CatalogScope::WalFrom(Lsn::MAX)).await?;
            if let Some(path) = catalog.history(archived.timeline) {
                self.path = path.clone();
            }
        }
        Ok(())
    }

    /// Names over SQL; empty if the server does not tell them.
    async fn ask(&self) -> Names {
        let mut names = Names::new(self.source.major, NamesLimits::default());
        match names::read(&self.conninfo, None).await {
            Ok((shared, told)) => seed(&mut names, shared, told, &self.board),
            Err(error) => {
                let text = format!("names of tables cannot be read from the server: {error}");
                self.board.raise("names", text, Some("let the role CONNECT to its databases".to_owned()));
            }
        }
        names
    }

    /// Where timeline `next` branched off, if that is before the place up to which `old` was read: a server that was
    /// restored, or promoted without the last of what its primary had written.
    async fn fork_before(
        &mut self,
        next: &SegmentName,
        old: TimelineId,
        read_to: Lsn,
    ) -> Result<Option<Lsn>, ScanError> {
        let catalog = self.repo.catalog(CatalogScope::WalFrom(Lsn::MAX)).await?;
        let Some(path) = catalog.history(next.timeline) else { return Ok(None) };
        self.path = path.clone();
        // Of a branch that it did not come from, nothing behind its own beginning counts.
        let fork = self.path.end_of(old).or_else(|| self.path.begin_of(next.timeline));
        Ok(fork.filter(|fork| *fork < read_to))
    }

    /// What there is to read of the segment in work.
    async fn available(&mut self, current: &SegmentName, indexer: &Indexer) -> Result<Available, ScanError> {
        let (at, size) = (indexer.pushed_to(), current.size);
        let runs = self.spool.spooled().runs;
        if let Some(run) = runs.iter().find(|run| run.timeline == current.timeline && run.begin <= at) {
            if at < run.end {
                match self.spool.open_segment(current) {
                    Ok(file) => {
                        let to = run.end.min(current.end()).min(at + PIECE_BYTES);
                        return Ok(Available::File(file, to.saturating_sub(at)));
                    }
                    Err(SpoolError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            } else if !run.finished {
                return Ok(Available::Wait);
            }
        }
        let next = runs.iter().find(|run| run.timeline > current.timeline && at < run.end);
        if let Some(run) = next.filter(|run| run.begin <= at) {
            return Ok(Available::Switch(SegmentName { timeline: run.timeline, ..*current }));
        }
        // What has left the spool is in the repository.
        let archived = *self.archived.borrow_and_update();
        let is_ahead = |archived: &Position| archived.lsn > at || archived.timeline > current.timeline;
        if let Some(archived) = archived.filter(is_ahead) {
            self.follow_history(archived).await?;
            match self.repo.read_segment(current).await {
                Ok(read) if read.valid_to > size.offset_of(at) => {
                    let from = usize::try_from(size.offset_of(at)).unwrap_or(usize::MAX);
                    let to = usize::try_from(read.valid_to).unwrap_or(usize::MAX).min(read.bytes.len());
                    return Ok(Available::Bytes(read.bytes.slice(from.min(to)..to)));
                }
                Ok(_) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
            // All of it that this timeline has was read: it goes on on a newer one, or behind a hole.
            let timeline = self.path.file_timeline(current.number, size);
            if timeline > current.timeline {
                return Ok(Available::Switch(SegmentName { timeline, ..*current }));
            }
            if let Some(run) = runs.iter().find(|run| run.begin > at) {
                return Ok(Available::Jump(SegmentName::at(run.timeline, run.begin, size)));
            }
            let here = SegmentName { timeline: archived.timeline, number: size.segment_of(archived.lsn), size };
            if here.start() > at {
                return Ok(Available::Jump(here));
            }
        }
        match next {
            Some(run) if archived.is_none() => Ok(Available::Jump(SegmentName::at(run.timeline, run.begin, size))),
            _ => Ok(Available::Wait),
        }
    }

    /// Decodes a piece, where it holds up nobody.
    async fn step(&self, mut indexer: Indexer, current: SegmentName, piece: Available) -> Result<Step, ScanError> {
        let work = move || {
            let begin = thread_cpu();
            let bytes = match piece {
                Available::Bytes(bytes) => bytes,
                Available::File(file, length) => {
                    let offset = current.size.offset_of(indexer.pushed_to());
                    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
                    file.read_exact_at(&mut bytes, offset)
                        .map_err(|source| ScanError::Read { name: current, source })?;
                    bytes.into()
                }
                Available::Switch(_) | Available::Jump(_) | Available::Wait => Bytes::new(),
            };
            let (mut seen, mut fault) = (Vec::new(), None);
            indexer.push(&bytes);
            loop {
                match indexer.next_seen() {
                    Ok(Some(found)) => seen.push(found),
                    Ok(None) => break,
                    // Zeros where a record should begin: the rest of the page says nothing.
                    Err(error) => {
                        fault = fault.or(Some(error));
                        indexer.skip_page();
                    }
                }
            }
            Ok(Step { indexer, seen, fault, cpu: thread_cpu().saturating_sub(begin) })
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or(Err(ScanError::Lost("the decoding of a piece of WAL ended early")))
    }

    fn tell_fault(&self, fault: Option<DecodeError>) {
        let Some(error) = fault else { return };
        self.board.update(|s| s.scan.faults_total += 1);
        let hint = "archiving goes on, and nothing is lost; rows at that place are not counted. \
                    `walguard wal explain` shows the place; please report it";
        self.board.raise("decode", format!("WAL cannot be understood: {error}"), Some(hint.to_owned()));
    }

    /// Tells what was found; false if nobody listens any more.
    async fn tell(&self, seen: Vec<Seen>, timeline: TimelineId, indexer: &Indexer, telling: &mut Telling) -> bool {
        for found in seen {
            match found {
                Seen::Ended(transaction) => {
                    telling.ended(&transaction);
                    if self.observed.send(Observed::Ended { transaction, timeline }).await.is_err() {
                        return false;
                    }
                }
                Seen::Running(running) => {
                    if self.observed.send(Observed::Running { running, timeline }).await.is_err() {
                        return false;
                    }
                }
                Seen::Segment(name, Some(index)) => self.derive(Derived::Index(name, index)),
                Seen::Segment(_, None) => self.board.update(|s| s.scan.unindexed_total += 1),
                Seen::Names(name, names) => self.derive(Derived::Names(name, names)),
            }
        }
        let observer = indexer.observer();
        let open = telling.open(observer.transactions(), observer.definitions(), observer.names(), Instant::now());
        if !open.is_empty() && self.observed.send(Observed::Open { timeline, transactions: open }).await.is_err() {
            return false;
        }
        self.board.update(|s| {
            s.scan.position = Some(Position { timeline, lsn: indexer.pushed_to() });
            s.scan.open_transactions = observer.transactions().len() as u64;
            s.scan.names_overflowed = observer.names().has_overflowed();
        });
        true
    }

    /// Hands on what is put beside the WAL. Where that cannot keep up an index is made from the archive later; of names
    /// there is another snapshot a GiB on.
    fn derive(&self, derived: Derived) {
        if let Err(TrySendError::Full(Derived::Index(name, _))) = self.derived.try_send(derived) {
            self.missed.add(&name);
        }
    }
}

/// Processor time that this thread has taken.
fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or_default(), time.tv_nsec.try_into().unwrap_or_default())
}

/// Tells names, and what hinders them.
fn seed(names: &mut Names, shared: Seed, told: Vec<Told>, board: &Board) {
    names.seed(shared);
    let mut refused = Vec::new();
    for told in told {
        match told.seeds {
            Ok(seeds) => seeds.into_iter().for_each(|seed| names.seed(seed)),
            Err(error) => refused.push(format!("{}: {error}", told.name)),
        }
    }
    if refused.is_empty() {
        return board.clear("names");
    }
    let text = format!("names of tables cannot be read in {}", refused.join("; "));
    board.raise("names", text, Some("GRANT CONNECT ON DATABASE ... TO the role of walguard".to_owned()));
}

/// What was told of open transactions.
#[derive(Debug, Default)]
pub(super) struct Telling {
    /// Rows changed and deleted, and definitions, of each.
    told: HashMap<Xid, (u64, usize)>,
    last: Option<Instant>,
}

impl Telling {
    /// Nothing more is told of a transaction that ended.
    pub(super) fn ended(&mut self, transaction: &Transaction) {
        if let Some(xid) = transaction.xid {
            self.told.remove(&xid);
        }
    }

    /// The open transactions that did more than was told, the largest first.
    pub(super) fn open(
        &mut self,
        transactions: &Transactions,
        definitions: &Definitions,
        owners: &impl Owners,
        now: Instant,
    ) -> Vec<OpenReport> {
        if transactions.is_empty() {
            self.told.clear();
            return Vec::new();
        }
        if self.last.is_some_and(|last| now.duration_since(last) < OPEN_EVERY) {
            return Vec::new();
        }
        self.last = Some(now);
        let lost = |counts: RowCounts| counts.deleted + counts.updated;
        let mut more: Vec<_> = Vec::new();
        for open in transactions.open() {
            let rows: u64 = open.tallies().map(|(_, counts)| lost(counts)).sum::<u64>() + lost(open.more);
            let done = (rows, definitions.open(open.xid).len());
            if done != (0, 0) && self.told.get(&open.xid) != Some(&done) {
                more.push((done, open));
            }
        }
        more.sort_by_key(|(done, open)| (std::cmp::Reverse(*done), open.xid.get()));
        more.truncate(OPEN_MAX);
        let still: BTreeSet<Xid> = transactions.open().map(|open| open.xid).collect();
        self.told.retain(|xid, _| still.contains(xid));
        let report = |(done, open): ((u64, usize), crate::detect::OpenTransaction<'_>)| {
            self.told.insert(open.xid, done);
            let tallies = open.tallies().filter_map(|(file, counts)| {
                let relation = match owners.owner(file, Some(open.xid)) {
                    Owner::Hidden => return None,
                    Owner::Relation(relation) => Some(relation),
                    Owner::Unknown => None,
                };
                Some(Tally { file, relation, counts })
            });
            OpenReport {
                xid: open.xid,
                begin: open.begin,
                is_prepared: open.is_prepared,
                is_complete: open.is_complete,
                tallies: tallies.collect(),
                ddl: definitions.open(open.xid).to_vec(),
                messages: definitions.messages(open.xid).to_vec(),
            }
        };
        more.into_iter().map(report).collect()
    }
}
