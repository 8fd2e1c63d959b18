//! A stretch of time in; what happened in it out: from indexes where there are any, from the WAL itself elsewhere.
//!
//! Segments without an index, and the unfinished last one, are decoded as they are read, so that the last second is there
//! too. What could not be read is said ([`Coverage`]); nothing is made up for it.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::chronicle::Chronicle;
use super::format::SegmentIndex;
use super::lookup::Wanted;
use crate::decode::change::Action;
use crate::decode::rmgr::xact;
use crate::decode::rmgr::xlog::{self, XlogRecord};
use crate::decode::{Change, DecodeError, Reader, Source, WalMajor};
use crate::detect::{Limits, Names, NamesLimits, NamesSnapshot, Observer, Transaction};
use crate::pg::{Lsn, Oid, PgTime, Position, SegmentName, SegmentNumber, TimelineHistory, TimelineId};
use crate::progress::Progress;
use crate::repo::catalog::{Catalog, CatalogScope, LsnRange};
use crate::repo::{RepoError, Repository, SegmentRead};

/// Bytes given to the reader at a time: a record of a page or two never waits for more, and memory holds little beside
/// the segment.
const PIECE_BYTES: usize = 64 << 10;

/// WAL fetched ahead of what is being decoded: four segments of the usual size hide the latency of a store.
const AHEAD_BYTES: u64 = 64 << 20;

/// Without an index that says where open transactions began, decoding begins so many segments early: a transaction
/// that is older is told as incomplete.
const LEAD_SEGMENTS: u64 = 4;

/// With such an index it begins there, but not more than so many bytes early: a transaction may have been forgotten open
/// for days. Snapshots of names are as far apart.
const LEAD_BYTES_MAX: u64 = 1 << 30;

/// Commits lie in the WAL a little out of the order of their times. So long after the end of what is asked for nobody
/// is late any more.
const LATE_MICROS: i64 = 60_000_000;

/// Of up to so many segments each index is read for itself, which tells more of the largest transactions; of more those
/// that were merged.
const SINGLY_MAX: usize = 512;

/// Segments without any time that are looked through for one.
const TIMELESS_SEGMENTS_MAX: usize = 16;

/// Long work is told from so many decoded segments on.
const TOLD_FROM_SEGMENTS: u64 = 8;

/// What of a stretch of time was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Coverage {
    /// Where reading began.
    pub read_from: Option<Lsn>,
    /// Segments of which the index was read.
    pub indexed: u64,
    /// Segments whose WAL was decoded.
    pub decoded: u64,
    /// WAL that is not there, or cannot be read, with what is wrong.
    pub unread: Vec<Unread>,
    /// Indexes that cannot be read; their segments were decoded instead.
    pub damaged_indexes: Vec<String>,
    /// The end of the last record that was read.
    pub read_to: Option<Lsn>,
    /// The earliest time that the archive's first segment carries, if the archive begins later than what was asked for.
    pub begins: Option<PgTime>,
}

/// WAL that was not read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Unread {
    /// Where.
    #[serde(flatten)]
    pub range: LsnRange,
    /// Why.
    pub problem: String,
}

/// The archived WAL of one timeline and its ancestors.
#[derive(Debug)]
pub struct Walk<'a> {
    repo: &'a Repository,
    source: Source,
    path: TimelineHistory,
    /// What is there, in order; for each segment the file that reaches furthest.
    segments: Vec<SegmentName>,
    singly_max: usize,
}

/// What was fetched of a segment.
enum Piece {
    Index(SegmentName, Box<SegmentIndex>),
    Wal(SegmentName, SegmentRead),
    Gone(SegmentName, String),
}

/// Why WAL cannot be walked along.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// There is no such timeline, or nothing is known of how it came to be.
    #[error("the repository knows no timeline {0}")]
    NoTimeline(TimelineId),
    /// Of the store.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The server's version is one that this walguard cannot read.
    #[error("this version of walguard cannot read the WAL of PostgreSQL {0}")]
    Version(u32),
}

impl WalkError {
    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoTimeline(_) => Some("`walguard list` shows the timelines that there are".to_owned()),
            Self::Repo(error) => error.hint(),
            Self::Version(_) => None,
        }
    }
}

/// Times of what ended in a segment.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    earliest: Option<PgTime>,
    latest: Option<PgTime>,
}

impl Times {
    fn see(&mut self, time: PgTime) {
        self.earliest = Some(self.earliest.map_or(time, |earliest| earliest.min(time)));
        self.latest = self.latest.max(Some(time));
    }
}

impl<'a> Walk<'a> {
    /// Looks which WAL of `timeline`, or the newest, is there from the time `from` on; without a time, the end of it.
    ///
    /// # Errors
    /// If there is no such timeline, or the server's version is not known; of the store.
    pub async fn open(
        repo: &'a Repository,
        timeline: Option<TimelineId>,
        from: Option<PgTime>,
    ) -> Result<Self, WalkError> {
        let catalog = repo.catalog(CatalogScope::WithoutWal).await?;
        // What a base backup needs was written before it ended; so was what is wanted, if it is later than that.
        let backups = catalog.backups.iter();
        let before = match from {
            Some(from) => backups.filter(|backup| backup.stop_time < from).map(|backup| backup.start).max(),
            None => backups.map(|backup| backup.start).max(),
        };
        // Whose the files are and what is open there was written earlier.
        let before = before.map(|start| Lsn::new(start.bytes().saturating_sub(LEAD_BYTES_MAX)));
        let scope = before.map_or(CatalogScope::Everything, CatalogScope::WalFrom);
        let catalog = repo.catalog(scope).await?;
        let wanted = timeline.or_else(|| catalog.newest_timeline()).unwrap_or(TimelineId::FIRST);
        let path = match catalog.history(wanted) {
            Some(path) => path.clone(),
            None if wanted == TimelineId::FIRST => TimelineHistory::root(wanted),
            None => return Err(WalkError::NoTimeline(wanted)),
        };
        if timeline.is_some() && !catalog.timelines.contains_key(&wanted) {
            return Err(WalkError::NoTimeline(wanted));
        }
        let version = catalog.identity.server_version;
        let major = WalMajor::of_server(version).ok_or(WalkError::Version(version.major()))?;
        let source =
            Source { major, segment_size: catalog.identity.segment_size, system_id: Some(catalog.identity.system_id) };
        let segments = segments_on(&catalog, &path);
        Ok(Self { repo, source, path, segments, singly_max: SINGLY_MAX })
    }

    /// The timeline.
    pub const fn timeline(&self) -> TimelineId {
        self.path.timeline()
    }

    /// True if that place lies on the timeline or on that part of an ancestor that it has.
    pub fn contains(&self, position: Position) -> bool {
        self.path.contains(position)
    }

    /// Up to when things are known: the latest time in the last WAL, or up to when the agent proved that nothing else was
    /// committed. `None` if there is no WAL, or none with a time in it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn known_to(&self) -> Result<Option<PgTime>, WalkError> {
        let mut known = None;
        for name in self.segments.iter().rev().take(TIMELESS_SEGMENTS_MAX) {
            known = self.times(name).await?.latest;
            if known.is_some() {
                break;
            }
        }
        let caught_up = self.repo.lease().await?.and_then(|lease| lease.caught_up);
        let caught_up = caught_up.filter(|caught_up| self.path.contains(caught_up.position));
        Ok(known.max(caught_up.map(|caught_up| caught_up.time)))
    }

    /// Tells `chronicle` what happened in its buckets. Indexes are used if they are fine enough for these.
    ///
    /// # Errors
    /// Of the store. WAL that is missing or damaged is told in the coverage.
    pub async fn tell(&self, chronicle: &mut Chronicle, progress: &dyn Progress) -> Result<Walked, WalkError> {
        let (from, to) = (chronicle.buckets().from(), chronicle.buckets().to());
        let by_index = !chronicle.buckets().width().is_finer_than_indexes();
        let first = self.first_since(from).await?;
        let late = PgTime::from_micros(to.micros().saturating_add(LATE_MICROS));
        let end = (self.first_since(late).await? + 1).min(self.segments.len());
        let wanted = self.segments.get(first..end).unwrap_or_default();
        let mut teller = Teller {
            walk: self,
            coverage: Coverage { read_from: self.segments.get(first).map(SegmentName::start), ..Coverage::default() },
            decoder: None,
            resume: Resume::Unknown,
            expected: None,
            progress,
            is_told: false,
        };
        if first == 0
            && let Some(name) = self.segments.first()
        {
            teller.coverage.begins = self.times(name).await?.earliest.filter(|earliest| *earliest > from);
        }
        if by_index && wanted.len() > self.singly_max {
            self.tell_merged(wanted, chronicle, &mut teller).await?;
        } else {
            self.tell_singly(wanted, by_index, chronicle, &mut teller).await?;
        }
        if teller.is_told {
            progress.end();
        }
        let is_to_end = wanted.last().is_some_and(|last| self.segments.last() == Some(last));
        Ok(Walked { coverage: teller.coverage, decoder: teller.decoder, resume: teller.resume, is_to_end })
    }

    /// Where decoding must begin for what is open at the beginning of `segment`.
    async fn resume_before(&self, segment: SegmentNumber) -> Result<Resume, WalkError> {
        let Some(before) = segment.previous().and_then(|number| self.file(number)) else { return Ok(Resume::Unknown) };
        Ok(self.readable_index(before).await?.0.map_or(Resume::Unknown, |index| Resume::of(&index, before)))
    }

    /// Segment by segment.
    async fn tell_singly(
        &self,
        wanted: &[SegmentName],
        by_index: bool,
        chronicle: &mut Chronicle,
        teller: &mut Teller<'_>,
    ) -> Result<(), WalkError> {
        let Some(first) = wanted.first() else { return Ok(()) };
        teller.resume = self.resume_before(first.number).await?;
        let ahead = (AHEAD_BYTES / self.source.segment_size.bytes()).clamp(1, 8);
        let fetches = stream::iter(wanted).map(|name| self.fetch(name, by_index));
        let mut pieces = fetches.buffered(usize::try_from(ahead).unwrap_or(1));
        while let Some((piece, damage)) = pieces.try_next().await? {
            teller.coverage.damaged_indexes.extend(damage);
            teller.piece(piece, chronicle).await?;
        }
        Ok(())
    }

    /// From merged indexes as far as there are any, and the WAL of segments without one.
    async fn tell_merged(
        &self,
        wanted: &[SegmentName],
        chronicle: &mut Chronicle,
        teller: &mut Teller<'_>,
    ) -> Result<(), WalkError> {
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else { return Ok(()) };
        let asked = Wanted {
            from: chronicle.buckets().from(),
            to: chronicle.buckets().to(),
            minutes_each: chronicle.buckets().minutes_each(),
            all_events: true,
        };
        let lookup = self.repo.lookup(self.path.clone(), self.source.segment_size);
        let activity = lookup.activity(LsnRange { from: first.start(), to: last.end() }, asked).await?;
        chronicle.add_activity(&activity);
        teller.coverage.indexed += wanted.len() as u64;
        teller.coverage.read_to = Some(last.end());
        for hole in &activity.unindexed {
            teller.decoder = None;
            teller.resume = self.resume_before(hole.first.number).await?;
            teller.expected = Some(hole.first.number);
            let mut next = hole.first.number;
            for name in hole.names() {
                next = name.number.next();
                if let Some(file) = self.file(name.number) {
                    teller.coverage.indexed = teller.coverage.indexed.saturating_sub(1);
                    let piece = self.read(file).await?;
                    teller.piece(piece, chronicle).await?;
                }
            }
            match self.file(next) {
                Some(behind) => {
                    teller.missing_before(behind);
                    teller.finish_decoding(behind, chronicle).await?;
                }
                // The end of all: whoever follows goes on decoding.
                None => break,
            }
        }
        Ok(())
    }

    async fn fetch(&self, name: &SegmentName, by_index: bool) -> Result<(Piece, Option<String>), WalkError> {
        let mut damage = None;
        if by_index {
            let (index, problem) = self.readable_index(name).await?;
            damage = problem;
            if let Some(index) = index {
                return Ok((Piece::Index(*name, Box::new(index)), damage));
            }
        }
        Ok((self.read(name).await?, damage))
    }

    /// A segment's index, or what is wrong with it.
    async fn readable_index(&self, name: &SegmentName) -> Result<(Option<SegmentIndex>, Option<String>), WalkError> {
        match self.repo.index(name).await {
            Ok(index) => Ok((index, None)),
            Err(RepoError::Damaged { key, problem }) => Ok((None, Some(format!("{key}: {problem}")))),
            Err(error) => Err(error.into()),
        }
    }

    async fn read(&self, name: &SegmentName) -> Result<Piece, WalkError> {
        match self.repo.read_segment(name).await {
            Ok(mut read) => {
                // What a timeline wrote behind its end is no part of the path.
                let end = self.path.end_of(name.timeline).unwrap_or(Lsn::MAX).min(name.end());
                read.valid_to = read.valid_to.min(end.saturating_sub(name.start()));
                Ok(Piece::Wal(*name, read))
            }
            Err(error @ RepoError::Damaged { .. }) => Ok(Piece::Gone(*name, error.to_string())),
            Err(error) if error.is_not_found() => Ok(Piece::Gone(*name, "it is not in the repository".to_owned())),
            Err(error) => Err(error.into()),
        }
    }

    /// The times that a segment carries.
    async fn times(&self, name: &SegmentName) -> Result<Times, WalkError> {
        if let Some(index) = self.readable_index(name).await?.0 {
            return Ok(times_of(&index));
        }
        let Piece::Wal(_, read) = self.read(name).await? else { return Ok(Times::default()) };
        let mut reader = Reader::at_page(self.source, name.start());
        let mut times = Times::default();
        for piece in valid(&read).chunks(PIECE_BYTES) {
            reader.push(piece);
            // What cannot be read is told when it is read for good.
            while let Ok(Some(record)) = reader.next_record() {
                if let Ok(Some(end)) = xact::read(&record) {
                    times.see(end.time);
                } else if let Ok(Some(XlogRecord::Checkpoint(checkpoint))) = xlog::read(&record) {
                    times.latest = times.latest.max(Some(checkpoint.time));
                }
            }
        }
        Ok(times)
    }

    /// The first segment that has something at or after `from`, found by halves: times rise with the WAL but for a moment.
    async fn first_since(&self, from: PgTime) -> Result<usize, WalkError> {
        let (mut low, mut high) = (0, self.segments.len());
        while low < high {
            let middle = low + (high - low) / 2;
            // One without a time is as late as the next that has one.
            let mut latest = None;
            for name in self.segments.iter().take(high).skip(middle).take(TIMELESS_SEGMENTS_MAX) {
                latest = self.times(name).await?.latest;
                if latest.is_some() {
                    break;
                }
            }
            if latest.is_none_or(|latest| latest >= from) { high = middle } else { low = middle + 1 }
        }
        // The end of a transaction may lie a segment before a time that was taken earlier.
        while let Some(name) = low.checked_sub(1).and_then(|before| self.segments.get(before)) {
            if self.times(name).await?.latest.is_some_and(|latest| latest < from) {
                break;
            }
            low -= 1;
        }
        Ok(low)
    }

    /// The file of a segment, if it is there.
    fn file(&self, number: SegmentNumber) -> Option<&SegmentName> {
        let place = self.segments.binary_search_by_key(&number, |name| name.number).ok()?;
        self.segments.get(place)
    }
}

/// What was read, and the way on.
#[derive(Debug)]
pub struct Walked {
    /// What was read.
    pub coverage: Coverage,
    decoder: Option<Decoder>,
    resume: Resume,
    /// The last segment was told of.
    is_to_end: bool,
}

/// Where decoding must begin so that no open transaction is missed.
#[derive(Clone, Copy, Debug)]
enum Resume {
    /// No index says it.
    Unknown,
    /// Here.
    At(Lsn),
}

impl Resume {
    fn of(index: &SegmentIndex, segment: &SegmentName) -> Self {
        Self::At(index.resume_from.unwrap_or_else(|| segment.end()))
    }
}

/// Segments in order, into a chronicle.
struct Teller<'a> {
    walk: &'a Walk<'a>,
    coverage: Coverage,
    /// Decodes, if the segment before was decoded.
    decoder: Option<Decoder>,
    resume: Resume,
    /// The segment that follows those seen.
    expected: Option<SegmentNumber>,
    progress: &'a dyn Progress,
    is_told: bool,
}

impl Teller<'_> {
    async fn piece(&mut self, piece: Piece, chronicle: &mut Chronicle) -> Result<(), WalkError> {
        let (Piece::Index(name, _) | Piece::Wal(name, _) | Piece::Gone(name, _)) = &piece;
        let name = *name;
        self.missing_before(&name);
        self.expected = Some(name.number.next());
        match piece {
            Piece::Index(_, index) => {
                self.finish_decoding(&name, chronicle).await?;
                chronicle.add_index(&index);
                self.coverage.indexed += 1;
                self.coverage.read_to = index.last.map(|(_, end)| end).or(self.coverage.read_to);
                self.resume = Resume::of(&index, &name);
                Ok(())
            }
            Piece::Wal(_, read) => self.decode(&name, &read, chronicle).await,
            Piece::Gone(_, problem) => {
                let range = LsnRange { from: name.start(), to: name.end() };
                self.coverage.unread.push(Unread { range, problem });
                (self.decoder, self.resume) = (None, Resume::Unknown);
                Ok(())
            }
        }
    }

    /// Says what should be there before `name` and is not.
    fn missing_before(&mut self, name: &SegmentName) {
        if let Some(expected) = self.expected.take()
            && expected < name.number
        {
            let range = LsnRange { from: name.size.start_of(expected), to: name.start() };
            self.coverage.unread.push(Unread { range, problem: "it is not in the repository".to_owned() });
            (self.decoder, self.resume) = (None, Resume::Unknown);
        }
    }

    async fn decode(
        &mut self,
        name: &SegmentName,
        read: &SegmentRead,
        chronicle: &mut Chronicle,
    ) -> Result<(), WalkError> {
        let mut decoder = match self.decoder.take() {
            Some(decoder) => decoder,
            None => lead_to(self.walk, name, self.resume).await?,
        };
        self.coverage.decoded += 1;
        if self.coverage.decoded == TOLD_FROM_SEGMENTS {
            self.progress.begin("read WAL", None);
            self.is_told = true;
        }
        let result = decoder.feed(valid(read), &mut |ended| chronicle.add_transaction(ended));
        if self.is_told {
            self.progress.advance(read.valid_to);
        }
        self.coverage.read_to = decoder.reader.proved_to().or(self.coverage.read_to);
        match result {
            Ok(()) => self.decoder = Some(decoder),
            Err(error) => {
                let at = decoder.reader.proved_to().unwrap_or_else(|| name.start()).max(name.start());
                self.resume = Resume::Unknown;
                // Where nothing is written the WAL ends, or a server crashed: the next segment has its own beginning.
                let is_last = self.walk.segments.last() == Some(name);
                if !(is_last && matches!(error, DecodeError::Unwritten { .. })) {
                    let range = LsnRange { from: at, to: name.end() };
                    self.coverage.unread.push(Unread { range, problem: error.to_string() });
                }
            }
        }
        Ok(())
    }

    /// Before a segment whose index says it all: the record that crosses into it belongs to the one before.
    async fn finish_decoding(&mut self, name: &SegmentName, chronicle: &mut Chronicle) -> Result<(), WalkError> {
        let Some(mut decoder) = self.decoder.take() else { return Ok(()) };
        if decoder.reader.is_between_records() {
            return Ok(());
        }
        let Piece::Wal(_, read) = self.walk.read(name).await? else { return Ok(()) };
        decoder.tell_before = Some(name.start());
        // What is wrong with this segment is none of the one before.
        let _ = decoder.feed(valid(&read), &mut |ended| chronicle.add_transaction(ended));
        Ok(())
    }
}

/// A decoder that has seen enough of what lies before `name` to know the transactions that are open there.
async fn lead_to(walk: &Walk<'_>, name: &SegmentName, resume: Resume) -> Result<Decoder, WalkError> {
    let size = name.size;
    let lead_max = LEAD_BYTES_MAX.div_ceil(size.bytes());
    let (wanted, most) = match resume {
        Resume::At(lsn) => (name.number.get().saturating_sub(size.segment_of(lsn).get()), lead_max),
        Resume::Unknown => (LEAD_SEGMENTS, LEAD_SEGMENTS),
    };
    // What tables are called, and what lay where in their catalogs, is known from a snapshot on.
    let snapshot = walk.repo.names_before(&walk.path, name, walk.source.major).await?;
    let named = snapshot.as_ref().map_or(0, |(of, _)| name.number.get().saturating_sub(of.number.get()));
    let far = wanted.min(most).max(if named <= lead_max { named } else { 0 });
    let mut first = *name;
    while name.number.get() - first.number.get() < far {
        let Some(before) = first.number.previous().and_then(|number| walk.file(number)) else { break };
        first = *before;
    }
    let led = name.number.get() - first.number.get();
    let (begin, is_from_start) = match resume {
        Resume::At(lsn) if led == wanted => (lsn.min(name.start()).max(first.start()), true),
        Resume::At(_) if led > wanted => (first.start(), true),
        // No record begins before the first of all.
        _ => (first.start(), first.number.get() <= 1),
    };
    let mut decoder = Decoder::new(walk.source, begin, is_from_start, name.start());
    if let Some((_, snapshot)) = snapshot {
        decoder.import(snapshot, is_from_start);
    }
    for number in first.number.get()..name.number.get() {
        let Some(file) = walk.file(SegmentNumber::new(number)) else { continue };
        let Piece::Wal(_, read) = walk.read(file).await? else { return Ok(decoder.again(walk.source, name)) };
        let skip = decoder.reader.pushed_to().saturating_sub(file.start());
        let bytes = valid(&read).get(usize::try_from(skip).unwrap_or(usize::MAX)..).unwrap_or_default();
        if (bytes.len() as u64) < size.bytes() - skip || decoder.feed(bytes, &mut |_| ()).is_err() {
            return Ok(decoder.again(walk.source, name));
        }
    }
    Ok(decoder)
}

/// WAL in, transactions out.
#[derive(Debug)]
struct Decoder {
    reader: Reader,
    observer: Box<Observer>,
    /// Databases whose catalogs were looked for.
    databases: HashSet<Oid>,
    /// Transactions whose end begins before this are none of ours.
    tell_from: Lsn,
    /// So are those whose end begins here or later.
    tell_before: Option<Lsn>,
}

impl Decoder {
    fn new(source: Source, begin: Lsn, is_from_start: bool, tell_from: Lsn) -> Self {
        let names = Names::new(source.major, NamesLimits::default());
        Self {
            reader: Reader::at_page(source, begin),
            observer: Box::new(Observer::new(names, Limits::default(), is_from_start)),
            databases: HashSet::new(),
            tell_from,
            tell_before: None,
        }
    }

    /// The same without what lies before `name`; names are kept.
    fn again(&self, source: Source, name: &SegmentName) -> Self {
        let mut again = Self::new(source, name.start(), false, self.tell_from.max(name.start()));
        again.import(self.observer.names().export(), false);
        again
    }

    /// Begins with these names.
    fn import(&mut self, snapshot: NamesSnapshot, is_from_start: bool) {
        let names = Names::import(self.reader.source().major, NamesLimits::default(), snapshot);
        *self.observer = Observer::new(names, Limits::default(), is_from_start);
    }

    fn feed(&mut self, bytes: &[u8], tell: &mut dyn FnMut(&Transaction)) -> Result<(), DecodeError> {
        for piece in bytes.chunks(PIECE_BYTES) {
            self.reader.push(piece);
            while let Some(record) = self.reader.next_record()? {
                let lsn = record.lsn;
                if self.tell_before.is_some_and(|end| lsn >= end) {
                    return Ok(());
                }
                let change = Change::read(&record)?;
                if let Action::Rows(rows) = &change.action
                    && rows.is_surely_catalog()
                    && self.databases.insert(rows.file.database)
                {
                    self.observer.names_mut().assume_catalogs(rows.file.database, rows.file.tablespace);
                }
                let ended = self.observer.see(&record, &change);
                if let Some(ended) = ended.filter(|_| lsn >= self.tell_from) {
                    tell(&ended);
                }
            }
        }
        Ok(())
    }
}

/// Reads on as more is archived.
#[derive(Debug)]
pub struct Follower<'a> {
    repo: &'a Repository,
    source: Source,
    path: TimelineHistory,
    decoder: Decoder,
    /// Rounds in which nothing was new.
    idle: u32,
}

/// What a round of following brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// So many bytes were new.
    pub bytes: u64,
    /// WAL that cannot be read, and was passed over.
    pub unread: Vec<Unread>,
    /// A promotion began this timeline, which is followed from here on.
    pub timeline: Option<TimelineId>,
}

/// After so many rounds without anything new it is looked for a new timeline.
const IDLE_ROUNDS: u32 = 5;

impl<'a> Follower<'a> {
    /// Goes on where `walked` ended.
    ///
    /// # Errors
    /// Of the store.
    pub async fn behind(walk: &Walk<'a>, walked: Walked) -> Result<Self, WalkError> {
        let decoder = match (walked.decoder, walk.segments.last()) {
            (Some(decoder), _) => decoder,
            (None, Some(last)) if walked.is_to_end => lead_to(walk, &last.next(), walked.resume).await?,
            // Nothing was committed lately, and the last segment goes on.
            (None, Some(last)) => lead_to(walk, last, walk.resume_before(last.number).await?).await?,
            (None, None) => {
                let begin = walk.path.begin_of(walk.path.timeline()).unwrap_or(Lsn::ZERO);
                let begin = begin.max(Lsn::new(walk.source.segment_size.bytes()));
                Decoder::new(walk.source, begin, false, begin)
            }
        };
        Ok(Self { repo: walk.repo, source: walk.source, path: walk.path.clone(), decoder, idle: 0 })
    }

    /// Tells `chronicle` of what was archived since the last time.
    ///
    /// # Errors
    /// Of the store; the next round may work.
    pub async fn go_on(&mut self, chronicle: &mut Chronicle) -> Result<Followed, WalkError> {
        let mut followed = Followed::default();
        while let Some(bytes) = self.next_bytes().await? {
            followed.bytes += bytes.len() as u64;
            self.idle = 0;
            let at = self.decoder.reader.pushed_to();
            let Err(error) = self.decoder.feed(&bytes, &mut |ended| chronicle.add_transaction(ended)) else { continue };
            let from = self.decoder.reader.proved_to().unwrap_or(at);
            let next = self.source.segment_size.end_of(self.source.segment_size.segment_of(at));
            followed.unread.push(Unread { range: LsnRange { from, to: next }, problem: error.to_string() });
            let next = SegmentName::at(self.path.timeline(), next, self.source.segment_size);
            self.decoder = self.decoder.again(self.source, &next);
        }
        self.idle += 1;
        if self.idle.is_multiple_of(IDLE_ROUNDS) {
            followed.timeline = self.look_for_promotion().await?;
        }
        Ok(followed)
    }

    /// What is there behind the last byte that was read, up to the end of its segment.
    async fn next_bytes(&self) -> Result<Option<Bytes>, WalkError> {
        let at = self.decoder.reader.pushed_to();
        let size = self.source.segment_size;
        let number = size.segment_of(at);
        // The segment with a switch point is there on the newer timeline, unless that wrote nothing yet.
        for timeline in [self.path.file_timeline(number, size), self.path.timeline_at(at)] {
            let name = SegmentName { timeline, number, size };
            let end = self.path.end_of(timeline).unwrap_or(Lsn::MAX).min(name.end());
            let Some(mut bytes) = self.repo.read_segment_from(&name, size.offset_of(at)).await? else { continue };
            bytes.truncate(usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX));
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    async fn look_for_promotion(&mut self) -> Result<Option<TimelineId>, WalkError> {
        let at = Position { timeline: self.path.timeline(), lsn: self.decoder.reader.pushed_to() };
        let newer = self.repo.histories().await?.into_iter().filter(|path| path.timeline() > at.timeline);
        // One that branched off before what was read already is another story.
        let Some(path) = newer.filter(|path| path.contains(at)).max_by_key(TimelineHistory::timeline) else {
            return Ok(None);
        };
        self.path = path;
        Ok(Some(self.path.timeline()))
    }
}

fn valid(read: &SegmentRead) -> &[u8] {
    let valid = usize::try_from(read.valid_to).unwrap_or(usize::MAX);
    read.bytes.get(..valid).unwrap_or(&read.bytes)
}

fn times_of(index: &SegmentIndex) -> Times {
    let mut times = Times::default();
    index.ends.iter().for_each(|end| times.see(end.time));
    times.latest = times.latest.max(index.latest);
    times
}

/// The segments along `path` whose beginning is there: of each the file that reaches furthest, and of two that reach
/// equally far the later timeline's.
fn segments_on(catalog: &Catalog, path: &TimelineHistory) -> Vec<SegmentName> {
    let size = catalog.identity.segment_size;
    let timelines = path.ancestors().iter().map(|ancestor| ancestor.timeline).chain([path.timeline()]);
    let mut found: BTreeMap<SegmentNumber, (Lsn, SegmentName)> = BTreeMap::new();
    for timeline in timelines {
        let (Some(wal), Some(begin), Some(end)) =
            (catalog.timelines.get(&timeline), path.begin_of(timeline), path.end_of(timeline))
        else {
            continue;
        };
        for range in wal.ranges.as_slice() {
            let mut number = size.segment_of(range.from).max(size.segment_of(begin));
            loop {
                let name = SegmentName { timeline, number, size };
                let reach = range.to.min(end).min(name.end());
                if reach <= name.start() {
                    break;
                }
                if range.from <= name.start() && found.get(&number).is_none_or(|(other, _)| *other <= reach) {
                    found.insert(number, (reach, name));
                }
                number = number.next();
            }
        }
    }
    found.into_values().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::tz::TimeZone;

    use super::super::chronicle::{Buckets, Filter, Width};
    use super::super::format::{MinuteTally, TransactionEnd};
    use super::*;
    use crate::decode::change::RowCounts;
    use crate::pg::{RelFile, SegmentSize, ServerVersion, SystemId, Xid};
    use crate::progress::Silent;
    use crate::repo::cluster::{ClusterIdentity, FORMAT};
    use crate::repo::frame;
    use crate::repo::store::MemoryStore;

    const SEGMENTS: u64 = 700;

    fn segment(number: u64) -> SegmentName {
        let size = SegmentSize::new(1 << 20).unwrap();
        SegmentName { timeline: TimelineId::FIRST, number: SegmentNumber::new(number), size }
    }

    /// A transaction each 20 seconds, in a segment of its own, that deletes as many rows as the segment has a number.
    fn index(number: u64) -> SegmentIndex {
        let lsn = segment(number).start() + 40;
        let time = PgTime::from_micros(i64::try_from(number).unwrap() * 20_000_000);
        let tally = |file, rows| MinuteTally { minute: time.micros() / 60_000_000, file, transactions: 1, rows };
        let file =
            RelFile { tablespace: Oid(1663), database: Oid(5), number: 20_000 + u32::try_from(number % 7).unwrap() };
        SegmentIndex {
            records: 1,
            last: Some((lsn, lsn + 8)),
            latest: Some(time),
            ends: vec![TransactionEnd {
                lsn,
                end: lsn + 8,
                xid: Xid::new(u32::try_from(number + 3).unwrap()),
                time,
                committed: true,
                subtransactions: Vec::new(),
            }],
            minutes: vec![
                tally(None, RowCounts::default()),
                tally(Some(file), RowCounts { deleted: number, ..RowCounts::default() }),
            ],
            ..SegmentIndex::default()
        }
    }

    async fn repository() -> Repository {
        let repo = Repository::over(Arc::new(MemoryStore::new()), "main").unwrap();
        let identity = ClusterIdentity {
            format: FORMAT,
            system_id: SystemId::new(7),
            server_version: ServerVersion::new(170_001),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
        };
        repo.initialize(&identity).await.unwrap();
        let nothing = frame::compress(&vec![0; 1 << 20], 1);
        for number in (1..=SEGMENTS).filter(|number| !(400..403).contains(number)) {
            let name = segment(number);
            repo.store().create(&repo.layout().segment(&name), nothing.clone().into()).await.unwrap();
            // Some have no index, and some that have one are no WAL: nobody looks.
            if !(200..202).contains(&number) {
                repo.put_index(&name, &index(number)).await.unwrap();
                repo.merge_indexes_after(&name).await.unwrap();
            }
        }
        repo
    }

    #[tokio::test]
    async fn merged_indexes_tell_what_single_ones_do_and_what_is_missing_is_said() {
        let repo = repository().await;
        let mut walk = Walk::open(&repo, None, None).await.unwrap();
        assert_eq!(walk.segments.len(), 697);
        let at = |seconds: i64| PgTime::from_micros(seconds * 1_000_000);
        for (from, to, width) in [(0, 14_000, 60), (3_000, 9_000, 600), (3_333, 9_999, 120), (7_900, 8_200, 60)] {
            let width = Width::new(std::time::Duration::from_secs(width)).unwrap();
            let buckets = Buckets::new(at(from), at(to), width, &TimeZone::UTC).unwrap();
            let mut told = Vec::new();
            for singly_max in [0, usize::MAX] {
                walk.singly_max = singly_max;
                let mut chronicle = Chronicle::new(buckets.clone(), Filter::default());
                let walked = walk.tell(&mut chronicle, &Silent).await.unwrap();
                told.push((chronicle.tell(0), walked.coverage.unread));
            }
            let inside = |number: &u64| {
                let time = i64::try_from(*number).unwrap() * 20;
                let is_there = !(200..202).contains(number) && !(400..403).contains(number);
                is_there && at(time) >= buckets.from() && at(time) < buckets.to()
            };
            let expected: u64 = (1..=SEGMENTS).filter(inside).sum();
            for (told, unread) in &told {
                assert_eq!(told.buckets.iter().map(|bucket| bucket.rows.deleted).sum::<u64>(), expected);
                let begins: Vec<_> = unread.iter().map(|unread| unread.range.from).collect();
                assert!(from > 8_000 || to < 8_000 || begins.contains(&segment(400).start()), "{unread:?}");
            }
            assert_eq!(told[0].0.buckets, told[1].0.buckets);
            assert_eq!(told[0].0.tables, told[1].0.tables);
        }
    }
}
