//! Records of transactions: how they end, and which are whose subtransactions.
//!
//! (Postgres: `access/xact.h`; the order of the parts is that of `ParseCommitRecord` and `ParseAbortRecord` in
//! `access/rmgrdesc/xactdesc.c`.)

use super::invalidation::{self, Invalidation, Invalidations};
use super::text::{self, Described, put};
use crate::decode::cursor::Cursor;
use crate::decode::{DecodeError, Fault, Item, List, Record, RmgrId};
use crate::pg::{CommitPoint, Fork, Lsn, Oid, PgTime, RelFile, Xid};

const OPERATION: u8 = 0x70;
const COMMIT: u8 = 0x00;
const PREPARE: u8 = 0x10;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
const ASSIGNMENT: u8 = 0x50;
const INVALIDATIONS: u8 = 0x60;
const HAS_INFO: u8 = 0x80;

const INFO_DATABASE: u32 = 1 << 0;
const INFO_SUBXACTS: u32 = 1 << 1;
const INFO_DROPPED_FILES: u32 = 1 << 2;
const INFO_INVALIDATIONS: u32 = 1 << 3;
const INFO_TWO_PHASE: u32 = 1 << 4;
const INFO_ORIGIN: u32 = 1 << 5;
const INFO_GID: u32 = 1 << 7;
const INFO_DROPPED_STATS: u32 = 1 << 8;
const INFO_APPLY_FEEDBACK: u32 = 1 << 29;
const INFO_RELCACHE_FILE: u32 = 1 << 30;
const INFO_FORCE_SYNC: u32 = 1 << 31;

/// What a `PREPARE TRANSACTION` record begins with (Postgres: `TWOPHASE_MAGIC` in `access/transam/twophase.c`).
const PREPARE_MAGIC: u32 = 0x57F9_4534;

/// The end of a transaction: a commit or an abort, prepared or not.
#[derive(Clone, Copy, Debug)]
pub struct TransactionEnd<'a> {
    /// True for a commit.
    pub committed: bool,
    /// It ended by `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    pub prepared: bool,
    /// When, by the server's clock.
    pub time: PgTime,
    /// The top-level transaction; `None` for an abort of a transaction that wrote nothing else.
    pub xid: Option<Xid>,
    /// The database, where the record says it.
    pub database: Option<Oid>,
    /// The name of the prepared transaction, in the server's encoding (`wal_level = logical` only).
    pub gid: Option<&'a [u8]>,
    /// Where the transaction came from, if it was replicated from elsewhere.
    pub origin: Option<Origin>,
    /// Counters of objects that are gone with it (15 and later). Of a commit these are the objects dropped, of an abort
    /// those created.
    pub dropped_stats: List<'a, DroppedStats>,
    /// Which catalog entries it changed. Aborts carry none.
    pub invalidations: Invalidations<'a>,
    /// The client waits until standbys have applied it (`synchronous_commit = remote_apply`).
    pub apply_feedback: bool,
    /// It was made durable before the server went on, whatever `synchronous_commit` says.
    pub forced_sync: bool,
    pub(in crate::decode) subxacts: List<'a, Xid>,
    pub(in crate::decode) dropped: List<'a, RelFile>,
}

/// Where a replicated transaction came from (Postgres: `xl_xact_origin`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Where it committed there.
    pub lsn: Lsn,
    /// When it committed there.
    pub time: PgTime,
}

/// An object whose counters are dropped (Postgres: `xl_xact_stats_item`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DroppedStats {
    /// 1 database, 2 relation, 3 function, 4 replication slot, 5 subscription, 6 backend.
    pub kind: i32,
    /// Its database, 0 for shared objects.
    pub database: Oid,
    /// Its OID, 0 for a database; wider than an OID for extensions' objects.
    pub object: u64,
}

impl Item for DroppedStats {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first_chunk()?;
        let (database, rest) = rest.split_first_chunk()?;
        let (low, rest) = rest.split_first_chunk()?;
        let high = rest.first_chunk().map_or(0, |high| u32::from_le_bytes(*high));
        Some(Self {
            kind: i32::from_le_bytes(*kind),
            database: Oid(u32::from_le_bytes(*database)),
            object: u64::from(high) << 32 | u64::from(u32::from_le_bytes(*low)),
        })
    }
}

impl<'a> TransactionEnd<'a> {
    /// An end of which no more than this is known.
    pub(in crate::decode) fn new(committed: bool, time: PgTime, xid: Option<Xid>) -> Self {
        Self {
            committed,
            prepared: false,
            time,
            xid,
            database: None,
            gid: None,
            origin: None,
            dropped_stats: List::empty(),
            invalidations: Invalidations::default(),
            apply_feedback: false,
            forced_sync: false,
            subxacts: List::empty(),
            dropped: List::empty(),
        }
    }

    /// Its subtransactions that ended with it.
    pub fn subxacts(&self) -> impl Iterator<Item = Xid> + use<'a> {
        self.subxacts.iter()
    }

    /// Files that the end of the transaction removes: of a commit those dropped or replaced, of an abort those created.
    pub fn dropped_files(&self) -> impl Iterator<Item = RelFile> + use<'a> {
        self.dropped.iter()
    }

    /// True if `xid` is the transaction or one of its subtransactions.
    pub fn includes(&self, xid: Xid) -> bool {
        self.xid == Some(xid) || self.subxacts().any(|sub| sub == xid)
    }

    /// The same, with its place. `None` if the transaction has no id.
    pub fn point(&self, record: &Record<'_>) -> Option<CommitPoint> {
        let (lsn, end, xid) = (record.lsn, record.end, self.xid?);
        Some(CommitPoint { lsn, end, xid, time: self.time, committed: self.committed })
    }
}

/// The end of a transaction that the record is; `None` for any other record.
///
/// These are the records at which recovery looks for its target (Postgres: `recoveryStopsBefore` in
/// `access/transam/xlogrecovery.c`).
///
/// # Errors
/// If the record is one, but shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<TransactionEnd<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::XACT {
        return Ok(None);
    }
    let (committed, prepared) = match record.header.info & OPERATION {
        COMMIT => (true, false),
        COMMIT_PREPARED => (true, true),
        ABORT => (false, false),
        ABORT_PREPARED => (false, true),
        _ => return Ok(None),
    };
    read_end(record, committed, prepared).map(Some)
}

/// True for a `PREPARE TRANSACTION`, which lasts without a commit.
pub fn is_prepare(record: &Record<'_>) -> bool {
    record.header.rmgr == RmgrId::XACT && record.header.info & OPERATION == PREPARE
}

fn read_end<'a>(record: &Record<'a>, committed: bool, prepared: bool) -> Result<TransactionEnd<'a>, DecodeError> {
    let mut main = record.main_cursor()?;
    let time = main.time("time of the transaction's end")?;
    let mut end = TransactionEnd { prepared, ..TransactionEnd::new(committed, time, record.header.xid) };
    if record.header.info & HAS_INFO != 0 {
        read_info(&mut main, &mut end, record.major().stats_item_bytes())?;
    }
    Ok(end)
}

fn read_info<'a>(
    main: &mut Cursor<'a>,
    end: &mut TransactionEnd<'a>,
    stats_item_bytes: usize,
) -> Result<(), DecodeError> {
    let info = main.u32("transaction flags")?;
    end.apply_feedback = info & INFO_APPLY_FEEDBACK != 0;
    end.forced_sync = info & INFO_FORCE_SYNC != 0;
    end.invalidations.init_file = info & INFO_RELCACHE_FILE != 0;
    if info & INFO_DATABASE != 0 {
        end.invalidations.database = main.oid("database")?;
        end.invalidations.tablespace = main.oid("default tablespace")?;
        end.database = Some(end.invalidations.database);
    }
    if info & INFO_SUBXACTS != 0 {
        end.subxacts = main.counted_list(4, "subtransactions")?;
    }
    if info & INFO_DROPPED_FILES != 0 {
        end.dropped = main.counted_list(12, "dropped files")?;
    }
    if info & INFO_DROPPED_STATS != 0 {
        end.dropped_stats = main.counted_list(stats_item_bytes, "dropped statistics")?;
    }
    if end.committed && info & INFO_INVALIDATIONS != 0 {
        end.invalidations.messages = main.counted_list(invalidation::BYTES, "invalidation messages")?;
    }
    if info & INFO_TWO_PHASE != 0 {
        end.xid = Xid::new(main.u32("prepared transaction's id")?);
        if info & INFO_GID != 0 {
            end.gid = Some(main.text("prepared transaction's name")?);
        }
    }
    if info & INFO_ORIGIN != 0 {
        end.origin = Some(Origin { lsn: main.lsn("origin's position")?, time: main.time("origin's time")? });
    }
    Ok(())
}

/// A record of the Transaction manager.
#[derive(Clone, Copy, Debug)]
pub enum XactRecord<'a> {
    /// A commit or an abort.
    End(TransactionEnd<'a>),
    /// `PREPARE TRANSACTION`: what a later `COMMIT PREPARED` or `ROLLBACK PREPARED` needs.
    Prepare(Prepare<'a>),
    /// Some subtransactions' top-level transaction is told, because there are many of them.
    Assignment(Assignment<'a>),
    /// A command changed the catalog (`wal_level = logical` only).
    Invalidations(List<'a, Invalidation>),
}

/// A prepared transaction (Postgres: `xl_xact_prepare`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepare<'a> {
    /// The transaction.
    pub xid: Option<Xid>,
    /// Its database.
    pub database: Oid,
    /// When it was prepared.
    pub time: PgTime,
    /// The role that prepared it.
    pub owner: Oid,
    /// Its name, in the server's encoding.
    pub gid: &'a [u8],
    /// Where it came from, if it was replicated from elsewhere.
    pub origin: Option<Origin>,
    /// Its subtransactions.
    pub subxacts: List<'a, Xid>,
    /// Files that its commit will remove.
    pub commit_files: List<'a, RelFile>,
    /// Files that its abort will remove.
    pub abort_files: List<'a, RelFile>,
    /// Counters that its commit will drop.
    pub commit_stats: List<'a, DroppedStats>,
    /// Counters that its abort will drop.
    pub abort_stats: List<'a, DroppedStats>,
    /// What its commit will invalidate.
    pub invalidations: Invalidations<'a>,
}

/// Subtransactions of a transaction that are not told before its end otherwise (Postgres: `xl_xact_assignment`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment<'a> {
    /// The top-level transaction.
    pub top: Option<Xid>,
    /// Subtransactions of it.
    pub subxacts: List<'a, Xid>,
}

/// What a record of a transaction says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read_any<'a>(record: &Record<'a>) -> Result<Option<XactRecord<'a>>, DecodeError> {
    if let Some(end) = read(record)? {
        return Ok(Some(XactRecord::End(end)));
    }
    if record.header.rmgr != RmgrId::XACT {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    Ok(Some(match record.header.info & OPERATION {
        PREPARE => XactRecord::Prepare(read_prepare(record)?),
        ASSIGNMENT => XactRecord::Assignment(Assignment {
            top: Xid::new(main.u32("top-level transaction")?),
            subxacts: main.counted_list(4, "assigned subtransactions")?,
        }),
        INVALIDATIONS => XactRecord::Invalidations(main.counted_list(invalidation::BYTES, "invalidation messages")?),
        _ => return Err(main.fault(Fault::UnknownOperation(record.operation()))),
    }))
}

/// (Postgres: `ParsePrepareRecord` in `access/rmgrdesc/xactdesc.c`.)
fn read_prepare<'a>(record: &Record<'a>) -> Result<Prepare<'a>, DecodeError> {
    let mut main = record.main_cursor()?;
    if main.u32("magic number of a prepared transaction")? != PREPARE_MAGIC {
        return Err(main.fault(Fault::Impossible("the magic number of a prepared transaction")));
    }
    main.skip(4, "length of a prepared transaction")?;
    let xid = Xid::new(main.u32("prepared transaction's id")?);
    let database = main.oid("database")?;
    let time = main.time("time of the preparation")?;
    let owner = main.oid("owner")?;
    let subxacts = main.count("number of subtransactions")?;
    let commit_files = main.count("number of files dropped at commit")?;
    let abort_files = main.count("number of files dropped at abort")?;
    let (mut commit_stats, mut abort_stats) = (0, 0);
    if record.major().prepare_counts_stats() {
        commit_stats = main.count("number of statistics dropped at commit")?;
        abort_stats = main.count("number of statistics dropped at abort")?;
    }
    let invalidations = main.count("number of invalidation messages")?;
    let init_file = main.bool("relation cache file")?;
    main.skip(1, "padding")?;
    let gid_length = usize::from(main.u16("length of the name")?);
    let origin = Origin { lsn: main.lsn("origin's position")?, time: main.time("origin's time")? };
    let stats_bytes = record.major().stats_item_bytes();
    let mut aligned = Aligned { main, at: 0 };
    let gid = aligned.bytes(gid_length, "prepared transaction's name")?;
    Ok(Prepare {
        xid,
        database,
        time,
        owner,
        gid: gid.split(|b| *b == 0).next().unwrap_or_default(),
        origin: record.parts()?.origin.filter(|id| *id != 0).map(|_| origin),
        subxacts: aligned.list(subxacts, 4, "subtransactions")?,
        commit_files: aligned.list(commit_files, 12, "files dropped at commit")?,
        abort_files: aligned.list(abort_files, 12, "files dropped at abort")?,
        commit_stats: aligned.list(commit_stats, stats_bytes, "statistics dropped at commit")?,
        abort_stats: aligned.list(abort_stats, stats_bytes, "statistics dropped at abort")?,
        invalidations: Invalidations {
            init_file,
            messages: aligned.list(invalidations, invalidation::BYTES, "invalidation messages")?,
            ..Invalidations::default()
        },
    })
}

/// Parts that each begin at a multiple of 8 bytes.
struct Aligned<'a> {
    main: Cursor<'a>,
    at: usize,
}

impl<'a> Aligned<'a> {
    fn bytes(&mut self, length: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        self.main.skip(self.at.wrapping_neg() & 7, field)?;
        let bytes = self.main.bytes(length, field)?;
        self.at = length;
        Ok(bytes)
    }

    fn list<T: Item>(&mut self, count: usize, item: usize, field: &'static str) -> Result<List<'a, T>, DecodeError> {
        if count == 0 {
            return Ok(List::empty());
        }
        let length = count.checked_mul(item).ok_or_else(|| self.main.fault(Fault::Truncated(field)))?;
        Ok(List::new(self.bytes(length, field)?, item))
    }
}

pub(super) const fn name(info: u8) -> Option<&'static str> {
    Some(match info & OPERATION {
        COMMIT => "COMMIT",
        PREPARE => "PREPARE",
        ABORT => "ABORT",
        COMMIT_PREPARED => "COMMIT_PREPARED",
        ABORT_PREPARED => "ABORT_PREPARED",
        ASSIGNMENT => "ASSIGNMENT",
        INVALIDATIONS => "INVALIDATION",
        _ => return None,
    })
}

/// (Postgres: `xact_desc` in `access/rmgrdesc/xactdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    match read_any(record)? {
        Some(XactRecord::End(end)) => describe_end(record, &end, out),
        Some(XactRecord::Prepare(prepare)) => describe_prepare(record, &prepare, out),
        Some(XactRecord::Assignment(assignment)) => {
            put!(out, "xtop {}: subxacts:", assignment.top.map_or(0, Xid::get));
            assignment.subxacts.iter().for_each(|xid| put!(out, " {xid}"));
            Ok(())
        }
        Some(XactRecord::Invalidations(messages)) => {
            invalidation::describe(&Invalidations { messages, ..Invalidations::default() }, record.major(), out)
        }
        None => Ok(()),
    }
}

fn describe_end(record: &Record<'_>, end: &TransactionEnd<'_>, out: &mut String) -> Described {
    if let Some(xid) = end.xid.filter(|_| end.prepared) {
        put!(out, "{xid}: ");
    }
    out.push_str(&text::time(end.time));
    describe_files(record, "rels", end.dropped, out);
    text::labelled(out, "subxacts", end.subxacts, |out, xid| put!(out, "{xid}"));
    if end.committed {
        describe_stats("", end.dropped_stats, out);
        invalidation::describe(&end.invalidations, record.major(), out)?;
        if end.apply_feedback {
            out.push_str("; apply_feedback");
        }
        if end.forced_sync {
            out.push_str("; sync");
        }
    }
    describe_origin(record, end.origin, out)?;
    if !end.committed {
        describe_stats("", end.dropped_stats, out);
    }
    Ok(())
}

fn describe_prepare(record: &Record<'_>, prepare: &Prepare<'_>, out: &mut String) -> Described {
    put!(out, "gid {}: {}", text::text(prepare.gid), text::time(prepare.time));
    describe_files(record, "rels(commit)", prepare.commit_files, out);
    describe_files(record, "rels(abort)", prepare.abort_files, out);
    describe_stats("commit ", prepare.commit_stats, out);
    describe_stats("abort ", prepare.abort_stats, out);
    text::labelled(out, "subxacts", prepare.subxacts, |out, xid| put!(out, "{xid}"));
    let invalidations = Invalidations { database: prepare.database, ..prepare.invalidations };
    invalidation::describe(&invalidations, record.major(), out)?;
    describe_origin(record, prepare.origin, out)
}

fn describe_files(record: &Record<'_>, label: &str, files: List<'_, RelFile>, out: &mut String) {
    text::labelled(out, label, files, |out, file| out.push_str(&text::path(record, file, Fork::Main)));
}

fn describe_stats(when: &str, stats: List<'_, DroppedStats>, out: &mut String) {
    text::labelled(out, &format!("{when}dropped stats"), stats, |out, DroppedStats { kind, database, object }| {
        put!(out, "{kind}/{database}/{object}");
    });
}

fn describe_origin(record: &Record<'_>, origin: Option<Origin>, out: &mut String) -> Described {
    if let Some(Origin { lsn, time }) = origin {
        let node = record.parts()?.origin.unwrap_or(0);
        put!(out, "; origin: node {node}, lsn {}, at {}", text::lsn(lsn), text::time(time));
    }
    Ok(())
}
