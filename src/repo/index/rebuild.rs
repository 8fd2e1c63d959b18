//! Indexes that are missing, made from the archived WAL; and how many are missing.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt as _;
use tokio_util::sync::CancellationToken;

use super::build::{Indexer, Seen};
use super::format::SegmentIndex;
use super::level::{Group, Level, Span};
use super::merge::Merge;
use crate::decode::{DecodeError, Source, WalMajor};
use crate::detect::{Limits, Names, NamesLimits, Observer};
use crate::pg::{Lsn, SegmentName, SegmentNumber, SegmentSize, TimelineHistory, TimelineId};
use crate::progress::Progress;
use crate::repo::catalog::LsnRange;
use crate::repo::cluster::ClusterIdentity;
use crate::repo::layout::Object;
use crate::repo::segment::{SegmentRead, SegmentSource};
use crate::repo::store::Created;
use crate::repo::{RepoError, Repository};

/// Where no index tells how far back transactions were open, so many segments before the first one wanted are read, too.
/// Transactions that are older still are told as incomplete.
const BACK_SEGMENTS_MAX: u64 = 64;

/// So much WAL is read to follow names from a snapshot on. Where an agent ran, snapshots are a GiB apart.
const NAMES_BACK_BYTES_MAX: u64 = 4 << 30;

/// Failures that are named.
const FAILED_MAX: usize = 1_000;

/// Which indexes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Only segments that lie in this range, wholly or in part.
    pub range: LsnRange,
    /// Only this timeline's; all timelines' if `None`.
    pub timeline: Option<TimelineId>,
    /// Read the indexes that are there, and make those anew that cannot be read.
    pub check: bool,
    /// Make all anew, and replace those that are there and say something else.
    pub all: bool,
}

impl Default for Options {
    /// What is missing, anywhere.
    fn default() -> Self {
        Self { range: LsnRange { from: Lsn::ZERO, to: Lsn::MAX }, timeline: None, check: false, all: false }
    }
}

/// What was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rebuilt {
    /// False if it was stopped before its end; the same command goes on.
    pub complete: bool,
    /// Whole segments that were looked at.
    pub segments: u64,
    /// Indexes that were not there before.
    pub made: u64,
    /// Indexes that replace one that could not be read, or said something else.
    pub replaced: u64,
    /// Indexes that were made anew and say what was there.
    pub same: u64,
    /// Merged indexes that were not there before.
    pub merged: u64,
    /// Bytes of WAL that were read.
    pub wal_bytes: u64,
    /// Segments whose last record is not archived to its end yet: their index can be made when it is.
    pub waiting: Vec<String>,
    /// Segments of which no index could be made, the first thousand.
    pub failed: Vec<Failed>,
    /// How many those are.
    pub failed_total: u64,
}

/// A segment of which no index could be made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Failed {
    /// Its name.
    pub segment: String,
    /// Why.
    pub problem: String,
}

/// How many indexes are there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct IndexStatus {
    /// Of one timeline.
    pub timeline: TimelineId,
    /// Whole segments that are archived.
    pub segments: u64,
    /// Their stored bytes.
    pub wal_stored_bytes: u64,
    /// Their bytes.
    pub wal_bytes: u64,
    /// Those among them that have an index.
    pub indexed: u64,
    /// Stored bytes of these indexes.
    pub index_bytes: u64,
    /// Merged indexes.
    pub merged: u64,
    /// Their stored bytes.
    pub merged_bytes: u64,
    /// The last segment has no index yet because its last record may go on in the next one. No hole.
    pub last_is_waiting: bool,
    /// Segments without an index, in WAL order.
    pub holes: Vec<IndexHole>,
}

/// Segments that follow each other and have no index.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct IndexHole {
    /// The first.
    pub first: String,
    /// The last.
    pub last: String,
    /// How many.
    pub segments: u64,
}

/// Whole segments of a timeline, by number: stored bytes.
type Listed = BTreeMap<u64, u64>;

impl Repository {
    /// Makes the indexes that are missing, and merges what can be merged. Stops between two segments when `cancel` is
    /// cancelled.
    ///
    /// # Errors
    /// [`RepoError::NotInitialized`]; [`RepoError::UnknownFormat`] if this version cannot read the WAL of the server's major;
    /// of the store. Damaged WAL is no error: the report names it.
    pub async fn rebuild_indexes(
        &self,
        options: Options,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<Rebuilt, RepoError> {
        let identity = self.require_identity().await?;
        let source = self.wal_source(&identity)?;
        let size = identity.segment_size;
        let mut archived = BTreeMap::new();
        for timeline in self.wal_timelines().await? {
            archived.insert(timeline, self.list_wal_segments(timeline, size).await?);
        }
        let histories = self.histories_by_timeline().await?;
        let mut report = Rebuilt { complete: true, ..Rebuilt::default() };
        let mut todo = Vec::new();
        for (timeline, listed) in &archived {
            if options.timeline.is_some_and(|only| only != *timeline) {
                continue;
            }
            let wanted = self.wanted(*timeline, listed, size, &options, &mut report, cancel).await?;
            todo.push((*timeline, wanted));
        }
        let total = todo.iter().map(|(_, wanted)| wanted.len() as u64 * size.bytes()).sum();
        progress.begin("index WAL", Some(total));
        for (timeline, wanted) in todo {
            let path = histories.get(&timeline).cloned().unwrap_or_else(|| TimelineHistory::root(timeline));
            let mut run = Run {
                repo: self,
                source,
                path,
                options: &options,
                archived: &archived,
                todo: wanted,
                barrier: 0,
                total,
                progress,
                cancel,
                report: &mut report,
            };
            run.go().await?;
        }
        progress.end();
        progress.begin("merge indexes", None);
        for (timeline, listed) in &archived {
            if options.timeline.is_none_or(|only| only == *timeline) {
                report.merged += self.merge_missing(*timeline, size, listed, &options, progress, cancel).await?;
            }
        }
        progress.end();
        report.complete = !cancel.is_cancelled();
        Ok(report)
    }

    /// How many segments have an index, timeline by timeline. Lists everything: some seconds for a million segments.
    ///
    /// # Errors
    /// [`RepoError::NotInitialized`]; of the store.
    pub async fn index_status(&self) -> Result<Vec<IndexStatus>, RepoError> {
        let size = self.require_identity().await?.segment_size;
        let mut all = Vec::new();
        for timeline in self.wal_timelines().await? {
            let listed = self.list_wal_segments(timeline, size).await?;
            let indexes = self.list_index_sizes(timeline, size).await?;
            let name = |number: u64| SegmentName { timeline, number: SegmentNumber::new(number), size }.to_string();
            let mut status = IndexStatus {
                timeline,
                segments: listed.len() as u64,
                wal_stored_bytes: listed.values().sum(),
                wal_bytes: listed.len() as u64 * size.bytes(),
                indexed: 0,
                index_bytes: indexes.values().sum(),
                merged: 0,
                merged_bytes: 0,
                last_is_waiting: false,
                holes: Vec::new(),
            };
            let mut holes: Vec<Span> = Vec::new();
            for number in listed.keys() {
                if indexes.contains_key(number) {
                    status.indexed += 1;
                    continue;
                }
                match holes.last_mut() {
                    Some(hole) if hole.to == *number => hole.to += 1,
                    _ => holes.push(Span { from: *number, to: number + 1 }),
                }
            }
            if let (Some(hole), Some(last)) = (holes.last_mut(), listed.keys().next_back())
                && hole.to == last + 1
            {
                status.last_is_waiting = true;
                hole.to -= 1;
            }
            holes.retain(|hole| !hole.is_empty());
            status.holes = holes
                .into_iter()
                .map(|hole| IndexHole { first: name(hole.from), last: name(hole.to - 1), segments: hole.len() })
                .collect();
            for level in Level::ALL {
                let mut objects = std::pin::pin!(self.objects(self.layout().merged_folder(timeline, level), None));
                while let Some(object) = objects.try_next().await? {
                    status.merged += 1;
                    status.merged_bytes += object.size;
                }
            }
            all.push(status);
        }
        Ok(all)
    }

    fn wal_source(&self, identity: &ClusterIdentity) -> Result<Source, RepoError> {
        let Some(major) = WalMajor::of_server(identity.server_version) else {
            return Err(RepoError::Config {
                problem: format!("the WAL of PostgreSQL {} cannot be read", identity.server_version),
                hint: "a newer walguard may know it; archiving and restoring need no index".to_owned(),
            });
        };
        Ok(Source { major, segment_size: identity.segment_size, system_id: Some(identity.system_id) })
    }

    async fn wal_timelines(&self) -> Result<Vec<TimelineId>, RepoError> {
        let (_, folders) = self.children(self.layout().wal_folder()).await?;
        Ok(folders.iter().filter_map(|folder| self.layout().parse_timeline_folder(folder)).collect())
    }

    /// What is known of how timelines came to be. A history that cannot be read hinders nobody who does not need it.
    async fn histories_by_timeline(&self) -> Result<BTreeMap<TimelineId, TimelineHistory>, RepoError> {
        let catalog = self.catalog(crate::repo::catalog::CatalogScope::WithoutWal).await?;
        let known = catalog.timelines.into_iter().filter_map(|(timeline, wal)| Some((timeline, wal.history?)));
        Ok(known.collect())
    }

    async fn list_wal_segments(&self, timeline: TimelineId, size: SegmentSize) -> Result<Listed, RepoError> {
        self.objects(self.layout().timeline_folder(timeline), None)
            .try_filter_map(|object| {
                let found = match self.layout().parse(&object.key, size) {
                    Some(Object::Segment(segment)) if object.size > 0 => Some((segment.number.get(), object.size)),
                    _ => None,
                };
                std::future::ready(Ok(found))
            })
            .try_collect()
            .await
    }

    async fn list_index_sizes(&self, timeline: TimelineId, size: SegmentSize) -> Result<Listed, RepoError> {
        self.objects(self.layout().index_folder(timeline), None)
            .try_filter_map(|object| {
                let found = match self.layout().parse(&object.key, size) {
                    Some(Object::Index(segment)) => Some((segment.number.get(), object.size)),
                    _ => None,
                };
                std::future::ready(Ok(found))
            })
            .try_collect()
            .await
    }

    /// The segments of a timeline whose indexes are to be made.
    async fn wanted(
        &self,
        timeline: TimelineId,
        listed: &Listed,
        size: SegmentSize,
        options: &Options,
        report: &mut Rebuilt,
        cancel: &CancellationToken,
    ) -> Result<BTreeSet<u64>, RepoError> {
        let name = |number: u64| SegmentName { timeline, number: SegmentNumber::new(number), size };
        let is_asked = |number: &u64| {
            let name = name(*number);
            name.start() < options.range.to && options.range.from < name.end()
        };
        let indexes = self.list_index_sizes(timeline, size).await?;
        let mut wanted = BTreeSet::new();
        for number in listed.keys().copied().filter(is_asked) {
            report.segments += 1;
            let is_there = indexes.get(&number).is_some_and(|bytes| *bytes > 0);
            let mut is_good = is_there && !options.all;
            if is_good && options.check && !cancel.is_cancelled() {
                is_good = self.readable_index(&name(number)).await?.is_some();
            }
            if !is_good {
                wanted.insert(number);
            }
        }
        Ok(wanted)
    }

    /// An index that cannot be read counts as one that is not there.
    async fn readable_index(&self, name: &SegmentName) -> Result<Option<SegmentIndex>, RepoError> {
        match self.index(name).await {
            Err(RepoError::Damaged { .. }) => Ok(None),
            read => read,
        }
    }

    async fn is_damaged(&self, group: &Group) -> Result<bool, RepoError> {
        match self.merged_index(group).await {
            Err(RepoError::Damaged { .. }) => Ok(true),
            read => read.map(|_| false),
        }
    }

    /// Merges every group of a timeline that can be merged and is not, or cannot be read where that is looked at. Answers
    /// how many.
    async fn merge_missing(
        &self,
        timeline: TimelineId,
        size: SegmentSize,
        listed: &Listed,
        options: &Options,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<u64, RepoError> {
        let indexes = self.list_index_sizes(timeline, size).await?;
        let lookup = self.lookup(TimelineHistory::root(timeline), size);
        let (Some(first), Some(last)) = (listed.keys().next(), listed.keys().next_back()) else { return Ok(0) };
        let all = Span { from: *first, to: last + 1 };
        let mut made = 0;
        for level in Level::ALL {
            let there = lookup.list_groups(timeline, level, all).await?;
            let there: BTreeSet<u64> = there.into_iter().map(|group| group.number).collect();
            for number in all.from / level.segments()..=last / level.segments() {
                let group = Group { timeline, level, number, size };
                let span = group.span();
                let lacks = || listed.range(span.from..span.to).any(|(number, _)| !indexes.contains_key(number));
                if cancel.is_cancelled() {
                    return Ok(made);
                }
                if lacks() {
                    continue;
                }
                if there.contains(&number) {
                    if !(options.all || options.check) || !self.is_damaged(&group).await? {
                        continue;
                    }
                    self.store().delete(&self.layout().merged(&group)).await?;
                }
                progress.note(&format!("{} segments from {}", level.segments(), group.first()));
                made += u64::from(self.merge_indexes(&group).await? == Merge::New);
            }
        }
        Ok(made)
    }
}

/// Makes the indexes of one timeline's segments.
struct Run<'a> {
    repo: &'a Repository,
    source: Source,
    path: TimelineHistory,
    options: &'a Options,
    archived: &'a BTreeMap<TimelineId, Listed>,
    /// What is not made yet.
    todo: BTreeSet<u64>,
    /// Nothing before this one can be read together with it.
    barrier: u64,
    total: u64,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
    report: &'a mut Rebuilt,
}

/// An indexer, and the segment that it takes next.
struct Work {
    indexer: Indexer,
    next: u64,
}

/// What came of a segment's bytes.
struct Taken {
    indexer: Indexer,
    seen: Vec<Seen>,
    fault: Option<DecodeError>,
}

/// Reads all that there is, behind damage too.
fn take(mut indexer: Indexer, name: SegmentName, bytes: &[u8]) -> Taken {
    let (mut seen, mut fault) = (Vec::new(), None);
    indexer.begin(name);
    indexer.push(bytes);
    loop {
        match indexer.next_seen() {
            // Transactions are told in the indexes.
            Ok(Some(Seen::Ended(_) | Seen::Running(_))) => {}
            Ok(Some(found)) => seen.push(found),
            Ok(None) => return Taken { indexer, seen, fault },
            Err(error) => {
                fault = fault.or(Some(error));
                indexer.skip_page();
            }
        }
    }
}

impl Run<'_> {
    async fn go(&mut self) -> Result<(), RepoError> {
        let mut work: Option<Work> = None;
        let mut ahead = None;
        while let Some(first) = self.todo.first().copied() {
            if self.cancel.is_cancelled() {
                return Ok(());
            }
            let (begin, is_certain) = self.begin_of(first).await?;
            // Go on with what is at hand if it has seen everything since then.
            let mut at_hand = match work.take() {
                Some(work) if begin <= work.next && work.next <= first => work,
                _ => {
                    let (begin, names) = self.names_at(begin).await?;
                    self.total = self.total.saturating_add((first - begin) * self.source.segment_size.bytes());
                    self.progress.set_total(self.total);
                    let observer = Observer::new(names, Limits::default(), is_certain);
                    Work { indexer: Indexer::new(self.source, &self.file(begin), observer), next: begin }
                }
            };
            if self.work(&mut at_hand, &mut ahead).await? {
                work = Some(at_hand);
            }
        }
        Ok(())
    }

    /// The file that holds segment `number` of this timeline's path.
    fn file(&self, number: u64) -> SegmentName {
        let (number, size) = (SegmentNumber::new(number), self.source.segment_size);
        SegmentName { timeline: self.path.file_timeline(number, size), number, size }
    }

    fn is_archived(&self, number: u64) -> bool {
        self.archived.get(&self.file(number).timeline).is_some_and(|listed| listed.contains_key(&number))
    }

    /// With which segment to begin so that no transaction is missed that is open where `first` begins; and whether that is
    /// certain.
    async fn begin_of(&self, first: u64) -> Result<(u64, bool), RepoError> {
        let mut at = first;
        while at > self.barrier && first - at < BACK_SEGMENTS_MAX && self.is_archived(at - 1) {
            // An index that is to be made anew is not relied on.
            let is_doubted = self.options.all && self.todo.contains(&(at - 1));
            if !is_doubted && let Some(index) = self.repo.readable_index(&self.file(at - 1)).await? {
                let Some(lsn) = index.resume_from else { return Ok((at, true)) };
                let begin = self.source.segment_size.segment_of(lsn).get().min(at);
                let is_there = begin >= self.barrier && (begin..at).all(|number| self.is_archived(number));
                // What was open where the archive begins is told as incomplete, now as then.
                let is_certain = begin > 0 && begin > self.barrier && self.is_archived(begin - 1);
                return Ok(if is_there { (begin, is_certain) } else { (at, false) });
            }
            at -= 1;
        }
        Ok((at, false))
    }

    /// What relations are called at segment `begin`, or further back where a snapshot says it and the WAL from there on is
    /// archived; and where that is. No names if no snapshot is near.
    async fn names_at(&self, begin: u64) -> Result<(u64, Names), RepoError> {
        let (major, size) = (self.source.major, self.source.segment_size);
        let found = self.repo.names_before(&self.path, &self.file(begin), major).await?;
        let is_near = |number: u64| {
            (begin - number).saturating_mul(size.bytes()) <= NAMES_BACK_BYTES_MAX
                && number >= self.barrier
                && (number..begin).all(|number| self.is_archived(number))
        };
        Ok(match found.map(|(name, snapshot)| (name.number.get(), snapshot)).filter(|(number, _)| is_near(*number)) {
            Some((number, snapshot)) => (number, Names::import(major, NamesLimits::default(), snapshot)),
            None => (begin, Names::new(major, NamesLimits::default())),
        })
    }

    /// Reads on until nothing that was read waits for its end and the next segment is not wanted. False if the indexer cannot
    /// go on.
    async fn work(&mut self, work: &mut Work, ahead: &mut Option<(u64, SegmentRead)>) -> Result<bool, RepoError> {
        let first = self.todo.first().copied().unwrap_or(u64::MAX);
        let mut last_fault: Option<DecodeError> = None;
        while work.next <= first || self.todo.range(..=work.next).next().is_some() {
            if self.cancel.is_cancelled() {
                return Ok(false);
            }
            let name = self.file(work.next);
            let read = match ahead.take() {
                Some((number, read)) if number == work.next => read,
                _ => match self.repo.read_segment(&name).await {
                    Ok(read) => read,
                    Err(error) if error.is_not_found() => {
                        self.wait(work.next);
                        self.todo.remove(&work.next); // it went since it was listed
                        self.barrier = work.next + 1;
                        return Ok(false);
                    }
                    Err(RepoError::Damaged { problem, .. }) => {
                        self.fail(work.next, &problem);
                        return Ok(false);
                    }
                    Err(error) => return Err(error),
                },
            };
            self.progress.note(&name.to_string());
            let is_whole = read.source == SegmentSource::Whole;
            let valid = usize::try_from(read.valid_to).unwrap_or(usize::MAX).min(read.bytes.len());
            let bytes = read.bytes.slice(..valid);
            let fresh = Observer::new(Names::new(self.source.major, NamesLimits::default()), Limits::default(), false);
            let indexer = std::mem::replace(&mut work.indexer, Indexer::new(self.source, &name, fresh));
            let decoding = tokio::task::spawn_blocking(move || take(indexer, name, &bytes));
            let following = work.next + 1;
            let reading = async {
                let wanted = is_whole && self.is_archived(following);
                if wanted { self.repo.read_segment(&self.file(following)).await.ok() } else { None }
            };
            let (taken, read) = tokio::join!(decoding, reading);
            *ahead = read.map(|read| (following, read));
            let Taken { indexer, seen, fault } = taken.expect("reading WAL does not panic");
            work.indexer = indexer;
            self.report.wal_bytes += valid as u64;
            self.progress.advance(valid as u64);
            last_fault = fault.or(last_fault);
            for found in seen {
                self.take_up(found, last_fault.as_ref()).await?;
            }
            work.next = following;
            if !is_whole {
                self.wait(following);
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn take_up(&mut self, found: Seen, fault: Option<&DecodeError>) -> Result<(), RepoError> {
        match found {
            Seen::Ended(_) | Seen::Running(_) => {}
            Seen::Names(name, names) if !names.rows.is_empty() => {
                self.repo.put_names(&name, &names, self.source.major).await?;
            }
            Seen::Names(..) => {}
            Seen::Segment(name, index) => {
                // The parent's segments were read for what was open only.
                let number = name.number.get();
                if name.timeline != self.path.timeline() || !self.todo.remove(&number) {
                    return Ok(());
                }
                match (index, fault) {
                    (Some(index), _) => self.store(&name, &index).await?,
                    (None, Some(error)) => self.note_failure(number, error.to_string()),
                    (None, None) => {
                        self.note_failure(number, "holds more ends of transactions than an index can".to_owned());
                    }
                }
            }
        }
        Ok(())
    }

    async fn store(&mut self, name: &SegmentName, index: &SegmentIndex) -> Result<(), RepoError> {
        if self.repo.put_index(name, index).await? == Created::New {
            self.report.made += 1;
            return Ok(());
        }
        if self.repo.readable_index(name).await?.is_some_and(|there| tells_the_same(&there, index)) {
            self.report.same += 1;
            return Ok(());
        }
        // What was merged from it goes first: what is left half done says nothing that is not so.
        self.repo.remove_merged_indexes_of(name).await?;
        self.repo.remove_index(name).await?;
        self.repo.put_index(name, index).await?;
        self.report.replaced += 1;
        Ok(())
    }

    /// What lies before `number` and is not made waits for WAL that is not there yet.
    fn wait(&mut self, number: u64) {
        let later = self.todo.split_off(&number);
        for number in std::mem::replace(&mut self.todo, later) {
            self.report.waiting.push(self.own(number).to_string());
        }
        self.barrier = number;
    }

    /// What is not made up to `number` cannot be.
    fn fail(&mut self, number: u64, problem: &str) {
        let later = self.todo.split_off(&(number + 1));
        for number in std::mem::replace(&mut self.todo, later) {
            self.note_failure(number, problem.to_owned());
        }
        self.barrier = number + 1;
    }

    fn note_failure(&mut self, number: u64, problem: String) {
        self.report.failed_total += 1;
        if self.report.failed.len() < FAILED_MAX {
            self.report.failed.push(Failed { segment: self.own(number).to_string(), problem });
        }
    }

    const fn own(&self, number: u64) -> SegmentName {
        let number = SegmentNumber::new(number);
        SegmentName { timeline: self.path.timeline(), number, size: self.source.segment_size }
    }
}

/// Whether two indexes differ in nothing but whether the beginning of a transaction was seen: an agent that was started
/// anew has seen less of what was open then.
fn tells_the_same(a: &SegmentIndex, b: &SegmentIndex) -> bool {
    let plain = |index: &SegmentIndex| {
        let mut index = index.clone();
        index.largest.iter_mut().for_each(|large| large.is_complete = true);
        index
    };
    a == b || plain(a) == plain(b)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::decode::RmgrId;
    use crate::decode::testing::{WalWriter, main_data, source};
    use crate::pg::ServerVersion;
    use crate::progress::Silent;
    use crate::repo::frame;
    use crate::repo::store::MemoryStore;
    use crate::repo::verify;

    const START: Lsn = Lsn::new(3 << 20);

    fn name(timeline: u32, number: u64) -> SegmentName {
        let size = SegmentSize::new(1 << 20).unwrap();
        SegmentName { timeline: TimelineId::new(timeline).unwrap(), number: SegmentNumber::new(number), size }
    }

    fn row(wal: &mut WalWriter, xid: u32, file: u32) {
        let place: Vec<u8> = [1663, 5, file, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        let body = [&[0, 0, 0, 0], place.as_slice(), &main_data(&[1, 0, 0])].concat();
        wal.record(RmgrId::HEAP, 0, xid, &body);
    }

    fn commit(wal: &mut WalWriter, xid: u32, seconds: i64) {
        wal.record(RmgrId::XACT, 0, xid, &main_data(&(seconds * 1_000_000).to_le_bytes()));
    }

    /// Segments `3..`, in each of which a transaction begins and one commits: the one that began so many segments before.
    fn wal(segments: u64, open_for: u64) -> WalWriter {
        let mut wal = WalWriter::new(source(WalMajor::V15), START);
        // None runs, and the next one is 100.
        let running: Vec<u8> = [0, 0, 0, 100, 100, 99_u32].into_iter().flat_map(u32::to_le_bytes).collect();
        wal.record(RmgrId::STANDBY, 0x10, 0, &main_data(&running));
        more(&mut wal, 0..segments, open_for);
        wal
    }

    fn more(wal: &mut WalWriter, turns: std::ops::Range<u64>, open_for: u64) {
        for turn in turns {
            let xid = 100 + turn as u32;
            row(wal, xid, 20_000 + turn as u32);
            wal.record(RmgrId::GENERIC, 0, 0, &main_data(&[1; 500_000]));
            if let Some(old) = turn.checked_sub(open_for) {
                commit(wal, 100 + old as u32, turn as i64 * 20);
            }
            row(wal, xid, 20_000);
            wal.record(RmgrId::GENERIC, 0, 0, &main_data(&[2; 540_000]));
        }
    }

    async fn repository() -> Repository {
        let repo = Repository::over(Arc::new(MemoryStore::new()), "main").unwrap();
        let source = source(WalMajor::V15);
        let identity = ClusterIdentity {
            system_id: source.system_id.unwrap(),
            server_version: ServerVersion::new(150_004),
            ..crate::repo::tests::identity()
        };
        repo.initialize(&identity).await.unwrap();
        repo
    }

    async fn put(repo: &Repository, name: &SegmentName, bytes: &[u8]) {
        let stored = frame::compress(bytes, 1);
        repo.store().create(&repo.layout().segment(name), stored.into()).await.unwrap();
    }

    /// What an indexer says that saw everything from the beginning.
    fn expected(source: Source, segments: &[(SegmentName, &[u8])]) -> BTreeMap<u64, SegmentIndex> {
        let observer = Observer::new(Names::new(source.major, NamesLimits::default()), Limits::default(), false);
        let mut indexer = Indexer::new(source, &segments[0].0, observer);
        let done = segments.iter().flat_map(|(name, bytes)| indexer.take(*name, bytes).unwrap());
        done.map(|(name, index)| (name.number.get(), *index.unwrap())).collect()
    }

    async fn rebuild(repo: &Repository, options: Options) -> Rebuilt {
        repo.rebuild_indexes(options, &Silent, &CancellationToken::new()).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_missing_or_damaged_is_made_as_it_was_and_nothing_else() {
        let wal = wal(40, 5);
        let segments: Vec<_> =
            (3..).zip(wal.bytes().chunks_exact(1 << 20)).map(|(number, bytes)| (name(1, number), bytes)).collect();
        let repo = repository().await;
        for (name, bytes) in &segments {
            put(&repo, name, bytes).await;
        }
        let expected = expected(wal.source, &segments);
        let last = segments.last().unwrap().0;
        assert_eq!(expected.len(), segments.len() - 1, "the last record goes on");

        let first = rebuild(&repo, Options::default()).await;
        assert_eq!((first.made, first.failed_total), (expected.len() as u64, 0));
        assert_eq!(first.waiting, [last.to_string()]);
        assert_eq!(first.merged, 2, "segments 3 to 15 and 16 to 31");
        for (number, index) in &expected {
            assert_eq!(repo.index(&name(1, *number)).await.unwrap().as_ref(), Some(index), "{number}");
        }
        assert!(expected[&20].largest[0].is_complete);
        let again = rebuild(&repo, Options::default()).await;
        assert_eq!((again.made, again.replaced, again.same), (0, 0, 0));
        assert!(again.wal_bytes <= 8 << 20, "the last one, and what was open before it: {}", again.wal_bytes);

        // Some go, one cannot be read. The transaction that commits in segment 20 was open since segment 15.
        for number in [9, 19, 20, 21, 40] {
            repo.remove_index(&name(1, number)).await.unwrap();
        }
        repo.remove_index(&name(1, 30)).await.unwrap();
        repo.store().create(&repo.layout().index(&name(1, 30)), "nonsense".into()).await.unwrap();
        let status = &repo.index_status().await.unwrap()[0];
        let holes: Vec<u64> = status.holes.iter().map(|hole| hole.segments).collect();
        assert_eq!((holes, status.last_is_waiting, status.merged), (vec![1, 3, 1], true, 2));
        let second = rebuild(&repo, Options { check: true, ..Options::default() }).await;
        assert_eq!((second.made, second.replaced), (5, 1));
        let third = rebuild(&repo, Options { all: true, ..Options::default() }).await;
        assert_eq!((third.made, third.replaced, third.same), (0, 0, expected.len() as u64));
        for (number, index) in &expected {
            assert_eq!(repo.index(&name(1, *number)).await.unwrap().as_ref(), Some(index), "{number}");
        }

        // An index that says something else is replaced, and so is what was merged from it.
        let wrong = SegmentIndex { resume_from: None, records: 1, ..SegmentIndex::default() };
        repo.remove_index(&name(1, 18)).await.unwrap();
        repo.put_index(&name(1, 18), &wrong).await.unwrap();
        let range = LsnRange { from: name(1, 18).start(), to: name(1, 18).end() };
        let fourth = rebuild(&repo, Options { all: true, range, ..Options::default() }).await;
        assert_eq!((fourth.segments, fourth.replaced, fourth.merged), (1, 1, 1));
        assert_eq!(repo.index(&name(1, 18)).await.unwrap().as_ref(), Some(&expected[&18]));
    }

    #[tokio::test]
    async fn damaged_wal_is_named_and_hinders_no_other_segment() {
        let wal = wal(12, 3);
        let repo = repository().await;
        for (number, bytes) in (3..).zip(wal.bytes().chunks_exact(1 << 20)) {
            let mut bytes = bytes.to_vec();
            if number == 7 {
                bytes[700_000] ^= 1;
            }
            put(&repo, &name(1, number), &bytes).await;
        }
        let rebuilt = rebuild(&repo, Options::default()).await;
        let failed: Vec<_> = rebuilt.failed.iter().map(|failed| failed.segment.as_str()).collect();
        assert_eq!(failed, [name(1, 7).to_string()]);
        assert!(rebuilt.failed[0].problem.contains("checksum"), "{:?}", rebuilt.failed);
        assert_eq!(rebuilt.made, 12 - 3);
        // What began before the damage ends behind it.
        let behind = repo.index(&name(1, 8)).await.unwrap().unwrap();
        assert!(behind.largest[0].begin < name(1, 7).start(), "{:?}", behind.largest);
    }

    #[tokio::test]
    async fn after_a_switch_transactions_are_followed_from_the_timeline_before() {
        let mut wal = wal(6, 2);
        let switch = wal.at();
        let at = switch.bytes() >> 20;
        wal.timeline = TimelineId::new(2).unwrap();
        more(&mut wal, 6..12, 2);
        let all: Vec<_> = (3..).zip(wal.bytes().chunks_exact(1 << 20)).collect();
        let path: Vec<_> =
            all.iter().map(|(number, bytes)| (name(if *number < at { 1 } else { 2 }, *number), *bytes)).collect();
        let repo = repository().await;
        for (name, bytes) in &path {
            put(&repo, name, bytes).await;
        }
        let unfinished =
            &all.iter().find(|(number, _)| *number == at).unwrap().1[..(switch.bytes() & 0xF_FFFF) as usize];
        let tail = repo.layout().tail(&name(1, at), 0, unfinished.len() as u32);
        repo.store().create(&tail, frame::compress(unfinished, 1).into()).await.unwrap();
        let history = format!("1\t{switch}\tno recovery target specified\n");
        repo.put_history(TimelineId::new(2).unwrap(), history.into()).await.unwrap();

        let rebuilt = rebuild(&repo, Options::default()).await;
        assert_eq!((rebuilt.failed, rebuilt.waiting.len()), (vec![], 1));
        let expected = expected(wal.source, &path);
        assert_eq!(rebuilt.made, expected.len() as u64);
        for (number, index) in &expected {
            let name = name(if *number < at { 1 } else { 2 }, *number);
            assert_eq!(repo.index(&name).await.unwrap().as_ref(), Some(index), "{name}");
        }
        let only = Options { timeline: TimelineId::new(2), all: true, ..Options::default() };
        let again = rebuild(&repo, only).await;
        assert_eq!((again.made, again.replaced), (0, 0), "{again:?}");
        assert!(again.same > 0);
    }

    #[tokio::test]
    async fn a_verification_finds_indexes_that_do_not_agree_with_their_segments() {
        let wal = wal(6, 1);
        let repo = repository().await;
        for (number, bytes) in (3..).zip(wal.bytes().chunks_exact(1 << 20)) {
            put(&repo, &name(1, number), bytes).await;
        }
        rebuild(&repo, Options::default()).await;
        let verify = async || {
            let options = verify::Options { only_new: false, jobs: 2 };
            let now = jiff::Timestamp::UNIX_EPOCH;
            repo.verify(options, now, &Silent, &CancellationToken::new()).await.unwrap()
        };
        let clean = verify().await;
        assert_eq!((clean.problems, clean.checked.indexes), (vec![], 4));

        let good = repo.index(&name(1, 4)).await.unwrap().unwrap();
        let mut records = good.clone();
        records.records += 1;
        let mut moved = good.clone();
        moved.ends[0].time = crate::pg::PgTime::from_micros(1);
        let mut fewer = good.clone();
        fewer.ends.clear();
        fewer.ends_with_transaction = false;
        for wrong in [records, moved, fewer] {
            repo.remove_index(&name(1, 4)).await.unwrap();
            repo.put_index(&name(1, 4), &wrong).await.unwrap();
            let found = verify().await;
            assert_eq!(found.problems_total, 1, "{:?}", found.problems);
            assert_eq!(found.problems[0].key, Some(repo.layout().index(&name(1, 4))));
            assert!(found.problems[0].unreachable.is_empty());
        }
        repo.remove_index(&name(1, 4)).await.unwrap();
        repo.store().create(&repo.layout().index(&name(1, 4)), "nonsense".into()).await.unwrap();
        let group = Group::of(&name(1, 4), Level::FIRST);
        repo.store().create(&repo.layout().merged(&group), "nonsense".into()).await.unwrap();
        assert_eq!(verify().await.problems_total, 2);
    }
}
