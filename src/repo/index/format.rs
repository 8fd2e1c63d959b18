//! An index as a value, as protobuf, and as the bytes of an object. Pure.
//!
//! Times, positions and ids of transactions lie in columns of differences, which are small and much alike, and so
//! compress well.

use std::sync::Arc;

use crate::decode::change::RowCounts;
use crate::decode::rmgr::xlog::Parameters;
use crate::detect::{DdlEvent, DdlKind, Persistence, Relation, RelationKind};
use crate::pg::{Lsn, Oid, PgTime, RelFile, SegmentName, Xid};
use crate::proto;
use crate::repo::frame;

/// The format that this code writes and reads.
pub(super) const FORMAT: u32 = 1;

/// The most that an index holds when it is decompressed: an index that has more is not walguard's.
pub(super) const INDEX_BYTES_MAX: usize = 64 << 20;

/// Ends of transactions in one index. A segment of 16 MiB holds half as many at most; larger segments with more get no
/// index, and are read themselves.
pub const ENDS_MAX: usize = 1_000_000;

/// What a segment holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SegmentIndex {
    /// Records that begin in the segment.
    pub records: u64,
    /// Where the last of them begins and ends.
    pub last: Option<(Lsn, Lsn)>,
    /// The last record is the end of a transaction.
    pub ends_with_transaction: bool,
    /// The latest time that any record carries: of ends of transactions, checkpoints, restore points and promotions.
    pub latest: Option<PgTime>,
    /// Ends of transactions, in WAL order.
    pub ends: Vec<TransactionEnd>,
    /// Checkpoints.
    pub checkpoints: Vec<Checkpoint>,
    /// Named restore points.
    pub restore_points: Vec<RestorePoint>,
    /// Settings that a standby must not undercut, each time they changed.
    pub parameters: Vec<(Lsn, Parameters)>,
    /// What committed transactions did, per minute and file, in this order.
    pub minutes: Vec<MinuteTally>,
    /// Tallies that found no room in `minutes`.
    pub minutes_left_out: u64,
    /// The transactions that committed here and changed most rows, the largest first.
    pub largest: Vec<LargeTransaction>,
    /// Decoding must begin here so that no transaction is missed that was open at the segment's end; `None` if none was.
    pub resume_from: Option<Lsn>,
    /// Whose the files above are, as far as that was known; sorted by file.
    pub names: Vec<(RelFile, Arc<Relation>)>,
    /// What committed transactions did to definitions, in WAL order of their commits.
    pub events: Vec<CommittedDdl>,
    /// Events that found no room.
    pub events_left_out: u64,
}

/// Something that a committed transaction did to a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedDdl {
    /// Where the commit record begins.
    pub commit: Lsn,
    /// The transaction.
    pub xid: Option<Xid>,
    /// When it committed.
    pub time: PgTime,
    /// What it did.
    pub event: DdlEvent,
}

/// The end of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionEnd {
    /// Where its record begins.
    pub lsn: Lsn,
    /// Where its record ends, rounded up to 8 bytes.
    pub end: Lsn,
    /// Its id; `None` for an abort of a transaction that wrote nothing else.
    pub xid: Option<Xid>,
    /// When it ended, by the server's clock.
    pub time: PgTime,
    /// True for a commit.
    pub committed: bool,
    /// The subtransactions that ended with it.
    pub subtransactions: Vec<Xid>,
}

impl TransactionEnd {
    /// True if `xid` is the transaction or one of its subtransactions.
    pub fn includes(&self, xid: Xid) -> bool {
        self.xid == Some(xid) || self.subtransactions.contains(&xid)
    }
}

/// A checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where its record begins.
    pub lsn: Lsn,
    /// Where replay from it begins.
    pub redo: Lsn,
    /// When it began, in whole seconds.
    pub time: PgTime,
}

/// A named restore point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestorePoint {
    /// Where its record begins.
    pub lsn: Lsn,
    /// Where its record ends.
    pub end: Lsn,
    /// When it was made.
    pub time: PgTime,
    /// Its name, in the server's encoding.
    pub name: Vec<u8>,
}

/// What committed transactions did to a file in a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinuteTally {
    /// Minutes since 2000-01-01 00:00 UTC, by the times of the commits.
    pub minute: i64,
    /// The file; `None` counts the transactions as such, whatever they touched.
    pub file: Option<RelFile>,
    /// Transactions that touched it.
    pub transactions: u64,
    /// The rows.
    pub rows: RowCounts,
}

/// A transaction that changed many rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LargeTransaction {
    /// Where its first record begins.
    pub begin: Lsn,
    /// Where its commit record begins.
    pub lsn: Lsn,
    /// Its id.
    pub xid: Option<Xid>,
    /// When it committed.
    pub time: PgTime,
    /// The files in which it changed most rows, the most first.
    pub files: Vec<(RelFile, RowCounts)>,
    /// False if its beginning was not seen: the counts are at least these.
    pub is_complete: bool,
}

impl LargeTransaction {
    /// Rows of the files that are told apart.
    pub fn rows(&self) -> u64 {
        self.files.iter().fold(0, |all, (_, rows)| all.saturating_add(changed(*rows)))
    }
}

pub(super) const fn changed(rows: RowCounts) -> u64 {
    rows.inserted.saturating_add(rows.updated).saturating_add(rows.deleted).saturating_add(rows.moved)
}

/// Why bytes are no index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Not a whole, undamaged frame of a bearable size.
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
    /// Not the message that it should be.
    #[error("not an index: {0}")]
    Proto(#[from] prost::DecodeError),
    /// Of a later walguard.
    #[error("index format {0} is not known to this version of walguard")]
    Format(u32),
    /// A message that no walguard writes.
    #[error("impossible index: {0}")]
    Impossible(&'static str),
}

impl SegmentIndex {
    /// The object's bytes.
    pub fn encode(&self, segment: &SegmentName) -> Vec<u8> {
        use prost::Message as _;
        frame::compress(&self.to_proto(segment).encode_to_vec(), frame::LEVEL_DEFAULT)
    }

    /// The index of `segment` in an object's bytes, which are not trusted.
    ///
    /// # Errors
    /// If they are damaged, of another format, or say what cannot be.
    pub fn decode(stored: &[u8], segment: &SegmentName) -> Result<Self, IndexError> {
        use prost::Message as _;
        let content = frame::decompress(stored, INDEX_BYTES_MAX)?;
        let message = proto::SegmentIndex::decode(content.as_slice())?;
        if message.format != FORMAT {
            return Err(IndexError::Format(message.format));
        }
        Self::of_proto(message, segment)
    }

    fn to_proto(&self, segment: &SegmentName) -> proto::SegmentIndex {
        let (last_lsn, last_end) = self.last.unwrap_or_default();
        proto::SegmentIndex {
            format: FORMAT,
            records: self.records,
            last_lsn: last_lsn.bytes(),
            last_end: last_end.bytes(),
            ends_with_transaction: self.ends_with_transaction,
            latest: self.latest.map(PgTime::micros),
            ends: Some(to_columns(&self.ends, segment.start())),
            checkpoints: self.checkpoints.iter().map(checkpoint_to_proto).collect(),
            restore_points: self.restore_points.iter().map(restore_point_to_proto).collect(),
            parameter_changes: self.parameters.iter().map(parameters_to_proto).collect(),
            minutes: self.minutes.iter().map(tally_to_proto).collect(),
            minutes_left_out: self.minutes_left_out,
            resume_from: self.resume_from.map_or(0, Lsn::bytes),
            largest: self.largest.iter().map(large_to_proto).collect(),
            names: self.names.iter().map(|(file, relation)| name_to_proto(*file, relation)).collect(),
            events: self.events.iter().map(event_to_proto).collect(),
            events_left_out: self.events_left_out,
        }
    }

    fn of_proto(message: proto::SegmentIndex, segment: &SegmentName) -> Result<Self, IndexError> {
        let inside = |lsn: Lsn| segment.start() <= lsn && lsn < segment.end();
        let last = (message.last_lsn != 0).then(|| (Lsn::new(message.last_lsn), Lsn::new(message.last_end)));
        if last.is_some_and(|(lsn, end)| !inside(lsn) || end <= lsn) {
            return Err(IndexError::Impossible("its last record lies elsewhere"));
        }
        let ends = of_columns(message.ends.unwrap_or_default(), segment.start())?;
        if ends.iter().any(|end| !inside(end.lsn) || last.is_none_or(|(lsn, _)| lsn < end.lsn)) {
            return Err(IndexError::Impossible("a transaction's end lies elsewhere"));
        }
        let restore_points: Vec<_> = message.restore_points.into_iter().map(restore_point_of_proto).collect();
        if restore_points.iter().any(|point| !inside(point.lsn)) {
            return Err(IndexError::Impossible("a restore point lies elsewhere"));
        }
        Ok(Self {
            records: message.records,
            last,
            ends_with_transaction: message.ends_with_transaction,
            latest: message.latest.map(PgTime::from_micros),
            ends,
            checkpoints: message.checkpoints.iter().map(checkpoint_of_proto).collect(),
            restore_points,
            parameters: message.parameter_changes.iter().map(parameters_of_proto).collect(),
            minutes: message.minutes.iter().map(tally_of_proto).collect(),
            minutes_left_out: message.minutes_left_out,
            largest: message.largest.iter().map(large_of_proto).collect(),
            resume_from: (message.resume_from != 0).then(|| Lsn::new(message.resume_from)),
            names: message.names.into_iter().map(name_of_proto).collect::<Result<_, _>>()?,
            events: message.events.into_iter().map(event_of_proto).collect::<Result<_, _>>()?,
            events_left_out: message.events_left_out,
        })
    }
}

fn to_columns(ends: &[TransactionEnd], start: Lsn) -> proto::TransactionEnds {
    let mut columns = proto::TransactionEnds::default();
    let (mut lsn_before, mut time_before, mut xid_before) = (start, 0_i64, 0_i64);
    for (row, end) in (0_u32..).zip(ends) {
        columns.lsn.push(end.lsn.saturating_sub(lsn_before) / 8);
        columns.length.push(end.end.saturating_sub(end.lsn) / 8);
        columns.time.push(end.time.micros().wrapping_sub(time_before));
        (lsn_before, time_before) = (end.lsn, end.time.micros());
        let xid = end.xid.map_or(0, |xid| i64::from(xid.get()));
        // A difference of 0 would mean no id: the same id twice in a row is a distance of a whole turn.
        columns.xid.push(match (xid, xid - xid_before) {
            (0, _) => 0,
            (_, 0) => 1 << 32,
            (_, distance) => distance,
        });
        if xid != 0 {
            xid_before = xid;
        }
        if !end.committed {
            columns.aborts.push(row);
        }
        for sub in &end.subtransactions {
            columns.subtransaction_of.push(row);
            columns.subtransaction.push(i64::from(sub.get()) - xid);
        }
    }
    columns
}

fn of_columns(columns: proto::TransactionEnds, start: Lsn) -> Result<Vec<TransactionEnd>, IndexError> {
    let proto::TransactionEnds { lsn, length, time, xid, aborts, subtransaction_of, subtransaction } = columns;
    let rows = lsn.len();
    if rows > ENDS_MAX || [length.len(), time.len(), xid.len()] != [rows; 3] {
        return Err(IndexError::Impossible("its columns have different lengths"));
    }
    if subtransaction.len() != subtransaction_of.len() {
        return Err(IndexError::Impossible("its subtransactions have different lengths"));
    }
    let far = || IndexError::Impossible("a position behind all positions");
    let id = |number: i64| u32::try_from(number).ok().and_then(Xid::new);
    let no_id = || IndexError::Impossible("a transaction id that is none");
    let (mut at, mut now, mut xid_before) = (start.bytes(), 0_i64, 0_i64);
    let mut ends = Vec::with_capacity(rows);
    for (((lsn, length), time), xid) in lsn.into_iter().zip(length).zip(time).zip(xid) {
        at = lsn.checked_mul(8).and_then(|distance| at.checked_add(distance)).ok_or_else(far)?;
        let end = length.checked_mul(8).and_then(|length| at.checked_add(length)).ok_or_else(far)?;
        now = now.wrapping_add(time);
        let xid = match xid {
            0 => None,
            distance => {
                let distance = if distance == 1 << 32 { 0 } else { distance };
                xid_before = xid_before.checked_add(distance).ok_or_else(no_id)?;
                Some(id(xid_before).ok_or_else(no_id)?)
            }
        };
        ends.push(TransactionEnd {
            lsn: Lsn::new(at),
            end: Lsn::new(end),
            xid,
            time: PgTime::from_micros(now),
            committed: true,
            subtransactions: Vec::new(),
        });
    }
    let row = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    let no_row = || IndexError::Impossible("a transaction's end that is not there");
    for number in aborts {
        ends.get_mut(row(number)).ok_or_else(no_row)?.committed = false;
    }
    for (number, distance) in subtransaction_of.into_iter().zip(subtransaction) {
        let end = ends.get_mut(row(number)).ok_or_else(no_row)?;
        let top = end.xid.map_or(0, |xid| i64::from(xid.get()));
        end.subtransactions.push(top.checked_add(distance).and_then(id).ok_or_else(no_id)?);
    }
    Ok(ends)
}

const fn checkpoint_to_proto(checkpoint: &Checkpoint) -> proto::Checkpoint {
    let Checkpoint { lsn, redo, time } = *checkpoint;
    proto::Checkpoint { lsn: lsn.bytes(), redo: redo.bytes(), time: time.micros() }
}

const fn checkpoint_of_proto(message: &proto::Checkpoint) -> Checkpoint {
    let proto::Checkpoint { lsn, redo, time } = *message;
    Checkpoint { lsn: Lsn::new(lsn), redo: Lsn::new(redo), time: PgTime::from_micros(time) }
}

pub(super) fn restore_point_to_proto(point: &RestorePoint) -> proto::RestorePoint {
    let RestorePoint { lsn, end, time, name } = point;
    proto::RestorePoint { lsn: lsn.bytes(), end: end.bytes(), time: time.micros(), name: name.clone() }
}

pub(super) fn restore_point_of_proto(message: proto::RestorePoint) -> RestorePoint {
    let proto::RestorePoint { lsn, end, time, name } = message;
    RestorePoint { lsn: Lsn::new(lsn), end: Lsn::new(end), time: PgTime::from_micros(time), name }
}

pub(super) const fn parameters_to_proto((lsn, parameters): &(Lsn, Parameters)) -> proto::ParameterChange {
    proto::ParameterChange {
        lsn: lsn.bytes(),
        max_connections: parameters.max_connections,
        max_worker_processes: parameters.max_worker_processes,
        max_wal_senders: parameters.max_wal_senders,
        max_prepared_transactions: parameters.max_prepared_transactions,
        max_locks_per_transaction: parameters.max_locks_per_transaction,
        wal_level: parameters.wal_level,
    }
}

pub(super) const fn parameters_of_proto(message: &proto::ParameterChange) -> (Lsn, Parameters) {
    let parameters = Parameters {
        max_connections: message.max_connections,
        max_worker_processes: message.max_worker_processes,
        max_wal_senders: message.max_wal_senders,
        max_prepared_transactions: message.max_prepared_transactions,
        max_locks_per_transaction: message.max_locks_per_transaction,
        wal_level: message.wal_level,
    };
    (Lsn::new(message.lsn), parameters)
}

pub(super) fn tally_to_proto(tally: &MinuteTally) -> proto::MinuteTally {
    let MinuteTally { minute, file, transactions, rows } = *tally;
    let RowCounts { inserted, updated, deleted, moved } = rows;
    let file = file.map_or((0, 0, 0), |file| (file.tablespace.0, file.database.0, file.number));
    let (tablespace, database, file_number) = file;
    proto::MinuteTally { minute, tablespace, database, file_number, transactions, inserted, updated, deleted, moved }
}

pub(super) fn tally_of_proto(message: &proto::MinuteTally) -> MinuteTally {
    let proto::MinuteTally { minute, transactions, inserted, updated, deleted, moved, .. } = *message;
    let rows = RowCounts { inserted, updated, deleted, moved };
    let file = file_of(message);
    MinuteTally { minute, file: (file.number != 0).then_some(file), transactions, rows }
}

const fn file_of(message: &proto::MinuteTally) -> RelFile {
    RelFile { tablespace: Oid(message.tablespace), database: Oid(message.database), number: message.file_number }
}

pub(super) fn large_to_proto(large: &LargeTransaction) -> proto::LargeTransaction {
    let minute = large.time.micros().div_euclid(60_000_000);
    let file = |(file, rows): &(RelFile, RowCounts)| {
        tally_to_proto(&MinuteTally { minute, file: Some(*file), transactions: 1, rows: *rows })
    };
    proto::LargeTransaction {
        begin: large.begin.bytes(),
        lsn: large.lsn.bytes(),
        xid: large.xid.map_or(0, Xid::get),
        time: large.time.micros(),
        files: large.files.iter().map(file).collect(),
        complete: large.is_complete,
    }
}

pub(super) fn large_of_proto(message: &proto::LargeTransaction) -> LargeTransaction {
    LargeTransaction {
        begin: Lsn::new(message.begin),
        lsn: Lsn::new(message.lsn),
        xid: Xid::new(message.xid),
        time: PgTime::from_micros(message.time),
        files: message.files.iter().map(|file| (file_of(file), tally_of_proto(file).rows)).collect(),
        is_complete: message.complete,
    }
}

pub(super) fn name_to_proto(file: RelFile, relation: &Relation) -> proto::FileName {
    proto::FileName {
        tablespace: file.tablespace.0,
        database: file.database.0,
        file_number: file.number,
        relation: Some(relation_to_proto(relation)),
    }
}

pub(super) fn name_of_proto(message: proto::FileName) -> Result<(RelFile, Arc<Relation>), IndexError> {
    let proto::FileName { tablespace, database, file_number, relation } = message;
    let relation = relation.ok_or(IndexError::Impossible("a file's name without a relation"))?;
    let file = RelFile { tablespace: Oid(tablespace), database: Oid(database), number: file_number };
    Ok((file, Arc::new(relation_of_proto(relation)?)))
}

fn relation_to_proto(relation: &Relation) -> proto::Relation {
    let Relation { database, oid, database_name, schema, name, kind, persistence, owner } = relation;
    proto::Relation {
        database: database.0,
        oid: oid.0,
        database_name: database_name.clone(),
        schema: schema.clone(),
        name: name.clone(),
        kind: u32::from(kind.letter()),
        persistence: u32::from(persistence.letter()),
        owner: owner.map_or(0, |owner| owner.0),
    }
}

fn relation_of_proto(message: proto::Relation) -> Result<Relation, IndexError> {
    let letter = |number: u32| u8::try_from(number).unwrap_or_default();
    let unknown = IndexError::Impossible("a relation of a kind that there is not");
    let (Some(kind), Some(persistence)) =
        (RelationKind::of_letter(letter(message.kind)), Persistence::of_letter(letter(message.persistence)))
    else {
        return Err(unknown);
    };
    Ok(Relation {
        database: Oid(message.database),
        oid: Oid(message.oid),
        database_name: message.database_name,
        schema: message.schema,
        name: message.name,
        kind,
        persistence,
        owner: (message.owner != 0).then_some(Oid(message.owner)),
    })
}

pub(super) fn event_to_proto(ddl: &CommittedDdl) -> proto::DdlEvent {
    let CommittedDdl { commit, xid, time, event } = ddl;
    let place = DdlKind::ALL.iter().position(|kind| *kind == event.kind).unwrap_or_default();
    proto::DdlEvent {
        kind: place as u32 + 1, // there are few
        lsn: event.lsn.bytes(),
        commit_lsn: commit.bytes(),
        xid: xid.map_or(0, Xid::get),
        time: time.micros(),
        database: event.database.0,
        relation: event.relation.as_deref().map(relation_to_proto),
        object: event.object.clone().unwrap_or_default(),
    }
}

pub(super) fn event_of_proto(message: proto::DdlEvent) -> Result<CommittedDdl, IndexError> {
    let kind = (message.kind as usize).checked_sub(1).and_then(|place| DdlKind::ALL.get(place));
    let relation = message.relation.map(relation_of_proto).transpose()?;
    Ok(CommittedDdl {
        commit: Lsn::new(message.commit_lsn),
        xid: Xid::new(message.xid),
        time: PgTime::from_micros(message.time),
        event: DdlEvent {
            kind: *kind.ok_or(IndexError::Impossible("an event of a kind that there is not"))?,
            lsn: Lsn::new(message.lsn),
            database: Oid(message.database),
            relation: relation.map(Arc::new),
            object: Some(message.object).filter(|object| !object.is_empty()),
        },
    })
}
