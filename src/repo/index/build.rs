//! WAL in, segment by segment; finished transactions and indexes out. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::format::{
    Checkpoint, CommittedDdl, ENDS_MAX, LargeTransaction, MinuteTally, RestorePoint, SegmentIndex, TransactionEnd,
};
use crate::decode::change::{Action, RowCounts};
use crate::decode::rmgr::xlog::XlogRecord;
use crate::decode::{Change, DecodeError, Reader, Record, Source};
use crate::detect::{NamesSnapshot, Observer, Relation, Running, Transaction};
use crate::pg::{Lsn, PgTime, RelFile, SegmentName};

/// Tallies of one index. A segment of 16 MiB spans a minute or less on a busy server; this is for a thousand files in
/// each of many minutes.
const MINUTES_MAX: usize = 65_536;

/// Large transactions of one index, and files of each.
const LARGEST_MAX: usize = 16;

/// Files of one of them. One that touched more is told as incomplete.
const FILES_MAX: usize = 256;

/// Events of one index: a schema of ten thousand tables dropped at once.
const EVENTS_MAX: usize = 65_536;

/// Microseconds of a minute.
const MINUTE: i64 = 60_000_000;

/// What an [`Indexer`] found.
#[derive(Debug)]
pub enum Seen {
    /// A transaction ended.
    Ended(Box<Transaction>),
    /// All records that begin in a segment were seen: its index is done. `None` if it holds more than an index may.
    Segment(SegmentName, Option<Box<SegmentIndex>>),
    /// Which transactions are open; now and then.
    Running(Running),
    /// What relations are called as of the first record that begins in this segment; now and then.
    Names(SegmentName, Box<NamesSnapshot>),
}

/// A segment and its index; `None` if it holds more than an index may.
pub type Indexed = (SegmentName, Option<Box<SegmentIndex>>);

/// Names are told once in so many bytes of WAL: whoever begins with them has a second or two of WAL to read.
const NAMES_EVERY_BYTES: u64 = 1 << 30;

/// Follows the WAL segment by segment, and makes the index of each.
///
/// Say which segment begins ([`Indexer::begin`]), give its bytes in any slices ([`Indexer::push`]), and take what was found
/// ([`Indexer::next_seen`]) until there is no more. What a segment's index holds is the records that *begin* in it; so the index
/// of a segment whose last record crosses into the next is there only when that one was given, too.
#[derive(Debug)]
pub struct Indexer {
    reader: Reader,
    observer: Observer,
    /// The segments that were begun and whose index is not done, the one in work first.
    waiting: VecDeque<SegmentName>,
    builder: Builder,
    /// What is to be told before the next record is read.
    done: VecDeque<Seen>,
    /// The segment whose index is in work was not seen from its beginning, or has damaged WAL: it gets none.
    spoilt: bool,
}

impl Indexer {
    /// Begins with the first record that begins in `first`. What `observer` knows already is as of that record.
    pub fn new(source: Source, first: &SegmentName, observer: Observer) -> Self {
        Self {
            reader: Reader::at_page(source, first.start()),
            observer,
            waiting: VecDeque::new(),
            builder: Builder::default(),
            done: VecDeque::new(),
            spoilt: false,
        }
    }

    /// True if `name` is the segment that follows those given: a segment further on needs a new indexer, and so does a
    /// timeline that does not follow.
    pub fn is_next(&self, name: &SegmentName) -> bool {
        self.reader.pushed_to() == name.start()
            && self.waiting.back().is_none_or(|before| before.timeline <= name.timeline)
    }

    /// Where the next pushed byte belongs.
    pub fn pushed_to(&self) -> Lsn {
        self.reader.pushed_to()
    }

    /// The bytes to come are those of this segment, the next one.
    pub fn begin(&mut self, name: SegmentName) {
        debug_assert!(self.is_next(&name), "{name} does not follow");
        self.waiting.push_back(name);
    }

    /// The end of the last record that is known to be whole; where reading began, if there is none yet.
    pub fn proved_to(&self) -> Lsn {
        self.reader.proved_to().unwrap_or_else(|| self.reader.pushed_to())
    }

    /// The timeline ends here, and the next one goes on in `name`, its copy of the segment that was begun last: the bytes to
    /// come are those from [`Indexer::pushed_to`] on. A record that the old timeline did not finish is dropped.
    pub fn switch(&mut self, name: SegmentName) {
        if let Some(last) = self.waiting.back_mut() {
            debug_assert_eq!(last.number, name.number, "a timeline goes on in another segment");
            *last = name;
        }
        let at = self.reader.proved_to().unwrap_or_else(|| self.reader.pushed_to());
        self.reader = Reader::at_record(self.reader.source(), at);
    }

    /// Adds bytes of the segment that was begun last.
    pub fn push(&mut self, bytes: &[u8]) {
        self.reader.push(bytes);
    }

    /// What comes next; `None` if that is not pushed yet.
    ///
    /// # Errors
    /// If the bytes are not WAL. [`Indexer::skip_page`] goes on behind the damage.
    pub fn next_seen(&mut self) -> Result<Option<Seen>, DecodeError> {
        loop {
            if let Some(done) = self.done.pop_front() {
                return Ok(Some(done));
            }
            // Both are looked at where they were made: moving them costs as much as reading them.
            let found = self.reader.next_record();
            let record = match &found {
                Ok(Some(record)) => record,
                Ok(None) => {
                    if self.reader.is_between_records() {
                        self.finish_through(self.reader.pushed_to());
                    }
                    return Ok(self.done.pop_front());
                }
                Err(error) => return Err(*error),
            };
            let change = Change::read(record);
            let change = match &change {
                Ok(change) => change,
                Err(error) => {
                    self.spoilt = true;
                    return Err(*error);
                }
            };
            if self.waiting.front().is_some_and(|segment| segment.end() <= record.lsn) {
                // The borrow of the record ends before the segments behind it are finished.
                let end = record.lsn;
                let finished = finish(&mut self.waiting, &mut self.builder, &mut self.spoilt, &self.observer, end);
                self.done.extend(finished);
            }
            let ended = self.observer.see(record, change);
            self.builder.see(record, change, ended.as_ref());
            self.done.extend(ended.map(|ended| Seen::Ended(Box::new(ended))));
            self.done.extend(self.observer.take_running().map(Seen::Running));
        }
    }

    fn finish_through(&mut self, end: Lsn) {
        let finished = finish(&mut self.waiting, &mut self.builder, &mut self.spoilt, &self.observer, end);
        self.done.extend(finished);
    }

    /// After an error: goes on with the next record, or with the first on the next page if it is the page that is damaged.
    /// What was not understood is not in any count, and the segment gets no index.
    pub fn skip_page(&mut self) {
        self.spoilt = true;
        self.reader.skip_page();
    }

    /// Takes the next segment's bytes, all of them; gives the indexes that are done.
    ///
    /// # Errors
    /// As [`Indexer::next_seen`].
    pub fn take(&mut self, name: SegmentName, bytes: &[u8]) -> Result<Vec<Indexed>, DecodeError> {
        self.begin(name);
        self.push(bytes);
        let mut indexes = Vec::new();
        while let Some(seen) = self.next_seen()? {
            if let Seen::Segment(name, index) = seen {
                indexes.push((name, index));
            }
        }
        Ok(indexes)
    }

    /// What is known of transactions and names, as of the last record.
    pub const fn observer(&self) -> &Observer {
        &self.observer
    }

    /// The same, to be told more.
    pub const fn observer_mut(&mut self) -> &mut Observer {
        &mut self.observer
    }

    /// What is known, to go on elsewhere.
    pub fn into_observer(self) -> Observer {
        self.observer
    }
}

/// Ends the segments that end at or before `lsn`.
fn finish(
    waiting: &mut VecDeque<SegmentName>,
    builder: &mut Builder,
    spoilt: &mut bool,
    observer: &Observer,
    lsn: Lsn,
) -> Vec<Seen> {
    let mut finished = Vec::new();
    while let Some(segment) = waiting.front().copied().filter(|segment| segment.end() <= lsn) {
        waiting.pop_front();
        let index = std::mem::take(builder).finish(observer.transactions().resume_from());
        let index = index.filter(|_| !std::mem::take(spoilt)).map(Box::new);
        finished.push(Seen::Segment(segment, index));
        let next = segment.next();
        if next.start().bytes().is_multiple_of(NAMES_EVERY_BYTES.max(segment.size.bytes())) {
            finished.push(Seen::Names(next, Box::new(observer.names().export())));
        }
    }
    finished
}

/// The index of one segment, as far as it was seen.
#[derive(Debug, Default)]
struct Builder {
    index: SegmentIndex,
    minutes: BTreeMap<(i64, Option<FileKey>), (u64, RowCounts)>,
    names: BTreeMap<RelFile, Arc<Relation>>,
    /// More ends than an index may hold.
    too_many: bool,
}

/// Sorts as people look for files: by database first.
type FileKey = (u32, u32, u32);

const fn key_of(file: RelFile) -> FileKey {
    (file.database.0, file.tablespace.0, file.number)
}

impl Builder {
    fn see(&mut self, record: &Record<'_>, change: &Change<'_>, ended: Option<&Transaction>) {
        self.index.records += 1;
        self.index.last = Some((record.lsn, record.end));
        self.index.ends_with_transaction = ended.is_some();
        if let Some(ended) = ended {
            self.end(change, ended);
        } else if let Action::Machinery(machinery) = &change.action {
            self.machinery(record, machinery);
        }
    }

    fn time(&mut self, time: PgTime) {
        self.index.latest = self.index.latest.max(Some(time));
    }

    /// What else restore plans look at (`restore/scan.rs`).
    fn machinery(&mut self, record: &Record<'_>, machinery: &XlogRecord<'_>) {
        let (lsn, end) = (record.lsn, record.end);
        match machinery {
            XlogRecord::Checkpoint(checkpoint) => {
                self.time(checkpoint.time);
                self.index.checkpoints.push(Checkpoint { lsn, redo: checkpoint.redo, time: checkpoint.time });
            }
            XlogRecord::RestorePoint(point) => {
                self.time(point.time);
                self.index.restore_points.push(RestorePoint { lsn, end, time: point.time, name: point.name.to_vec() });
            }
            XlogRecord::EndOfRecovery(recovery) => self.time(recovery.time),
            XlogRecord::ParameterChange(parameters) => self.index.parameters.push((lsn, *parameters)),
            _ => {}
        }
    }

    fn end(&mut self, change: &Change<'_>, ended: &Transaction) {
        self.time(ended.time);
        if self.index.ends.len() >= ENDS_MAX {
            self.too_many = true;
            return;
        }
        let Action::Ended(end) = &change.action else { return };
        self.index.ends.push(TransactionEnd {
            lsn: ended.lsn,
            end: ended.end,
            xid: ended.xid,
            time: ended.time,
            committed: ended.committed,
            subtransactions: end.subxacts().collect(),
        });
        if ended.committed {
            self.tally(ended);
            self.consider(ended);
            self.define(ended);
        }
    }

    fn define(&mut self, ended: &Transaction) {
        let room = EVENTS_MAX - self.index.events.len();
        self.index.events_left_out += ended.ddl.len().saturating_sub(room) as u64;
        let committed = |event| CommittedDdl { commit: ended.lsn, xid: ended.xid, time: ended.time, event };
        self.index.events.extend(ended.ddl.iter().take(room).cloned().map(committed));
    }

    fn tally(&mut self, ended: &Transaction) {
        let minute = ended.time.micros().div_euclid(MINUTE);
        for tally in &ended.tallies {
            let Some(relation) = &tally.relation else { continue };
            let has_room = self.names.len() < MINUTES_MAX;
            match self.names.entry(tally.file) {
                // A table that is renamed is called by its later name, as a chronicle does.
                std::collections::btree_map::Entry::Occupied(mut entry) => {
                    entry.insert(relation.clone());
                }
                std::collections::btree_map::Entry::Vacant(entry) if has_room => {
                    entry.insert(relation.clone());
                }
                std::collections::btree_map::Entry::Vacant(_) => {}
            }
        }
        let files = ended.tallies.iter().map(|tally| (Some(key_of(tally.file)), tally.counts));
        // Rows of files that are not told apart count for the transactions as such.
        for (file, rows) in std::iter::once((None, ended.more)).chain(files) {
            let has_room = self.minutes.len() < MINUTES_MAX;
            match self.minutes.entry((minute, file)) {
                std::collections::btree_map::Entry::Occupied(mut entry) => {
                    let (transactions, sum) = entry.get_mut();
                    *transactions += 1;
                    *sum += rows;
                }
                std::collections::btree_map::Entry::Vacant(entry) if has_room => {
                    entry.insert((1, rows));
                }
                std::collections::btree_map::Entry::Vacant(_) => self.index.minutes_left_out += 1,
            }
        }
    }

    /// Keeps it if it is among the largest.
    fn consider(&mut self, ended: &Transaction) {
        let size = changed(ended.rows());
        let smallest = self.index.largest.last().map_or(0, size_of);
        if size == 0 || (self.index.largest.len() >= LARGEST_MAX && size <= smallest) {
            return;
        }
        let mut files: Vec<_> = ended.tallies.iter().map(|tally| (tally.file, tally.counts)).collect();
        files.sort_by_key(|(file, rows)| (std::cmp::Reverse(changed(*rows)), *file));
        let is_complete = ended.is_complete && files.len() <= FILES_MAX;
        files.truncate(FILES_MAX);
        let large = LargeTransaction {
            begin: ended.begin,
            lsn: ended.lsn,
            xid: ended.xid,
            time: ended.time,
            files,
            is_complete,
        };
        let place = self.index.largest.partition_point(|other| size_of(other) >= size_of(&large));
        self.index.largest.insert(place, large);
        self.index.largest.truncate(LARGEST_MAX);
    }

    /// `None` if the segment holds more than an index may.
    fn finish(mut self, resume_from: Option<Lsn>) -> Option<SegmentIndex> {
        self.index.resume_from = resume_from;
        self.index.names = self.names.into_iter().collect();
        self.index.minutes = self
            .minutes
            .into_iter()
            .map(|((minute, file), (transactions, rows))| MinuteTally {
                minute,
                file: file.map(|(database, tablespace, number)| RelFile {
                    tablespace: crate::pg::Oid(tablespace),
                    database: crate::pg::Oid(database),
                    number,
                }),
                transactions,
                rows,
            })
            .collect();
        (!self.too_many).then_some(self.index)
    }
}

const fn changed(rows: RowCounts) -> u64 {
    rows.inserted.saturating_add(rows.updated).saturating_add(rows.deleted).saturating_add(rows.moved)
}

fn size_of(large: &LargeTransaction) -> u64 {
    large.files.iter().map(|(_, rows)| changed(*rows)).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::format::IndexError;
    use super::*;
    use crate::decode::testing::{WalWriter, main_data, source};
    use crate::decode::{RmgrId, WalMajor};
    use crate::detect::{DdlEvent, DdlKind, Limits, Names, NamesLimits, Persistence, RelationKind};
    use crate::pg::{Oid, SegmentSize, TimelineId, Xid};
    use crate::repo::frame;

    const START: Lsn = Lsn::new(1 << 20);

    fn name(lsn: Lsn) -> SegmentName {
        SegmentName::at(TimelineId::FIRST, lsn, SegmentSize::new(1 << 20).unwrap())
    }

    /// A row of a user's table.
    fn row(wal: &mut WalWriter, xid: u32, file: u32) {
        let place: Vec<u8> = [1663, 5, file, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        let body = [&[0, 0, 0, 0], place.as_slice(), &main_data(&[1, 0, 0])].concat();
        wal.record(RmgrId::HEAP, 0, xid, &body);
    }

    fn commit(wal: &mut WalWriter, xid: u32, seconds: i64) -> (Lsn, Lsn) {
        let written = wal.record(RmgrId::XACT, 0, xid, &main_data(&(seconds * 1_000_000).to_le_bytes()));
        (written.lsn, written.end)
    }

    /// Enough that the next record lies in a later segment, after records that cross into it.
    fn fill(wal: &mut WalWriter) {
        for _ in 0..3 {
            wal.record(RmgrId::GENERIC, 0, 9, &main_data(&[1; 500_000]));
        }
    }

    fn indexes(wal: &WalWriter) -> Vec<(SegmentName, SegmentIndex)> {
        let mut indexer = Indexer::new(wal.source, &name(START), observer());
        let mut found = Vec::new();
        for (number, bytes) in (0_u64..).zip(wal.bytes().chunks_exact(1 << 20)) {
            let indexes = indexer.take(name(START + (number << 20)), bytes).unwrap();
            found.extend(indexes.into_iter().map(|(name, index)| (name, *index.unwrap())));
        }
        found
    }

    fn observer() -> Observer {
        Observer::new(Names::new(WalMajor::V17, NamesLimits::default()), Limits::default(), true)
    }

    #[test]
    fn an_index_holds_what_begins_in_its_segment_and_comes_when_that_is_whole() {
        let mut wal = WalWriter::new(source(WalMajor::V17), START);
        row(&mut wal, 10, 20_000);
        row(&mut wal, 10, 20_000);
        let first = commit(&mut wal, 10, 61);
        row(&mut wal, 11, 20_001);
        fill(&mut wal);
        let second = commit(&mut wal, 11, 125);
        fill(&mut wal);
        fill(&mut wal);
        let found = indexes(&wal);
        assert_eq!(found[0].0, name(START));
        let ends: Vec<Vec<(Lsn, Lsn)>> =
            found.iter().map(|(_, index)| index.ends.iter().map(|end| (end.lsn, end.end)).collect()).collect();
        assert_eq!(ends[..2], [vec![first], vec![second]]);
        let index = &found[0].1;
        let tallies: Vec<_> =
            index.minutes.iter().map(|t| (t.minute, t.file.map(|f| f.number), t.rows.inserted)).collect();
        assert_eq!(tallies, [(1, None, 0), (1, Some(20_000), 2)]);
        assert_eq!((index.largest[0].xid, index.largest[0].files[0].1.inserted), (Xid::new(10), 2));
        assert!(index.resume_from.is_some_and(|lsn| lsn > first.0), "transaction 11 is open");
        let (_, end) = index.last.unwrap();
        assert!(end > name(START).end(), "the last record crosses into the next segment");
        assert!(
            found.len() >= 3 && found.len() < wal.bytes().len() >> 20,
            "the last segment's last record is not whole"
        );
    }

    #[test]
    fn a_record_longer_than_a_segment_leaves_an_index_without_records() {
        let mut wal = WalWriter::new(source(WalMajor::V17), START);
        wal.record(RmgrId::GENERIC, 0, 9, &main_data(&vec![1; 3 << 20]));
        commit(&mut wal, 9, 1);
        fill(&mut wal);
        fill(&mut wal);
        let found = indexes(&wal);
        assert_eq!(found.iter().map(|(_, index)| index.records).take(3).collect::<Vec<_>>(), [1, 0, 0]);
        assert_eq!((found[1].1.last, found[3].1.ends.len()), (None, 1));
    }

    #[test]
    fn damage_is_an_error_and_not_an_index() {
        let mut wal = WalWriter::new(source(WalMajor::V17), START);
        commit(&mut wal, 10, 61);
        fill(&mut wal);
        fill(&mut wal);
        let mut bytes = wal.bytes()[..1 << 20].to_vec();
        bytes[9000] ^= 1;
        let mut indexer = Indexer::new(wal.source, &name(START), observer());
        assert!(indexer.take(name(START), &bytes).is_err());
        // It goes on behind the damage, and the damaged segment has no index.
        indexer.skip_page();
        let mut found = Vec::new();
        while let Some(seen) = indexer.next_seen().unwrap() {
            found.extend(matches!(seen, Seen::Segment(_, None)).then_some(()));
        }
        for (number, bytes) in (1_u64..).zip(wal.bytes().chunks_exact(1 << 20).skip(1)) {
            let indexes = indexer.take(name(START + (number << 20)), bytes).unwrap();
            found.extend(indexes.iter().filter(|(_, index)| index.is_none()).map(|_| ()));
        }
        assert_eq!(found.len(), 1);
    }

    fn any_end() -> impl Strategy<Value = (u64, u64, i64, u32, bool, Vec<u32>)> {
        let times = prop_oneof![any::<i64>(), 800_000_000_000_000_i64..800_000_000_001_000];
        (1_u64..9, 1_u64..9, times, 0_u32..9, any::<bool>(), prop::collection::vec(1_u32..u32::MAX, 0..3))
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(rows in prop::collection::vec(any_end(), 0..50), resume in 0_u64..3) {
            let segment = name(START);
            let mut index = SegmentIndex { records: rows.len() as u64, ..SegmentIndex::default() };
            let mut at = segment.start();
            for (step, length, time, xid, committed, subtransactions) in rows {
                at = at + 8 * step;
                index.last = Some((at, at + 8 * length));
                index.ends.push(TransactionEnd {
                    lsn: at,
                    end: at + 8 * length,
                    xid: Xid::new(xid.wrapping_mul(1_000_000_007)),
                    time: PgTime::from_micros(time),
                    committed,
                    subtransactions: subtransactions.into_iter().filter_map(Xid::new).collect(),
                });
            }
            index.latest = index.ends.iter().map(|end| end.time).max();
            let relation = Arc::new(Relation {
                database: Oid(5),
                oid: Oid(20_000),
                database_name: "shop".into(),
                schema: "public".into(),
                name: "orders".into(),
                kind: RelationKind::Table,
                persistence: Persistence::Permanent,
                owner: (resume > 0).then_some(Oid(7)),
            });
            let file = RelFile { tablespace: Oid(1663), database: Oid(5), number: 20_001 };
            index.names = vec![(file, relation.clone())];
            index.events = index.ends.iter().zip(DdlKind::ALL.into_iter().cycle()).map(|(end, kind)| CommittedDdl {
                commit: end.lsn,
                xid: end.xid,
                time: end.time,
                event: DdlEvent {
                    kind,
                    lsn: end.lsn,
                    database: Oid(5),
                    relation: kind.is_destructive().then(|| relation.clone()),
                    object: (!kind.is_destructive()).then(|| "column".to_owned()),
                },
            }).collect();
            index.events_left_out = resume;
            index.resume_from = (resume > 0).then(|| Lsn::new(resume));
            prop_assert_eq!(SegmentIndex::decode(&index.encode(&segment), &segment).unwrap(), index);
        }

        #[test]
        fn any_bytes_are_an_index_or_an_error(content in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = SegmentIndex::decode(&content, &name(START));
            let _ = SegmentIndex::decode(&frame::compress(&[b"\x08\x01".as_slice(), &content].concat(), 1), &name(START));
        }
    }

    #[test]
    fn an_index_of_another_segment_or_format_is_refused() {
        let mut wal = WalWriter::new(source(WalMajor::V17), START);
        commit(&mut wal, 10, 61);
        fill(&mut wal);
        fill(&mut wal);
        let stored = indexes(&wal)[0].1.encode(&name(START));
        let error = SegmentIndex::decode(&stored, &name(START).next()).unwrap_err();
        assert!(matches!(error, IndexError::Impossible(_)), "{error}");
        let later = frame::compress(b"\x08\x02", 1);
        assert!(matches!(SegmentIndex::decode(&later, &name(START)), Err(IndexError::Format(2))));
    }
}
