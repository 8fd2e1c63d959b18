//! What a record means to whoever counts rows, watches for damage, or keeps names: one [`Change`] per record.

use super::rmgr::database::DatabaseRecord;
use super::rmgr::heap::{self, HeapRecord};
use super::rmgr::heap2::{self, Heap2Record};
use super::rmgr::invalidation::Invalidations;
use super::rmgr::message::LogicalMessage;
use super::rmgr::relmap::{self, MapUpdate};
use super::rmgr::standby::{self, RelationLock, RunningXacts, StandbyRecord};
use super::rmgr::storage::{self, StorageRecord};
use super::rmgr::tablespace::{self, TablespaceRecord};
use super::rmgr::xact::{self, Assignment, Prepare, TransactionEnd, XactRecord};
use super::rmgr::xlog::{self, XlogRecord};
use super::rmgr::{database, message, sequence};
use super::{DecodeError, Fault, List, Parts, Record, RmgrId};
use crate::pg::{Fork, Lsn, Oid, RelFile, Xid};

/// What a record does, and in which transaction.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Where the record begins.
    pub lsn: Lsn,
    /// The first byte behind it.
    pub end: Lsn,
    /// The transaction, or more often than not the *sub*transaction, that does it; `None` outside of transactions, and
    /// for the end of a prepared one ([`TransactionEnd::xid`] has it).
    pub xid: Option<Xid>,
    /// The top-level transaction of `xid`, where the record says so (`wal_level = logical`, once per subtransaction).
    pub top_xid: Option<Xid>,
    /// What it does.
    pub action: Action<'a>,
}

/// What a record does.
#[derive(Clone, Copy, Debug)]
pub enum Action<'a> {
    /// Rows come, change or go. Tables, TOAST tables and catalogs alike: it takes names to tell them apart.
    Rows(RowChange),
    /// A row of a table comes, changes or goes, as logical replication tells it: by the table, not by its file.
    RelationRow(RelationRow),
    /// Tables are emptied, told in so many words (`wal_level = logical` only; it goes with the physical changes).
    Truncated(heap::Truncate<'a>),
    /// A file is made.
    FileCreated {
        /// The file.
        file: RelFile,
        /// Which fork.
        fork: Fork,
    },
    /// A file is cut short.
    FileTruncated(storage::Truncate),
    /// A transaction ends; its files and statistics to drop and what it invalidates come with it.
    Ended(TransactionEnd<'a>),
    /// A transaction is prepared, to end later.
    Prepared(Prepare<'a>),
    /// Subtransactions are told whose they are.
    Assigned(Assignment<'a>),
    /// Catalog entries change; at `wal_level = logical` after each command, otherwise told at the end.
    Invalidated(Invalidations<'a>),
    /// Relations are locked against everybody, as `DROP`, `TRUNCATE` and many an `ALTER` do.
    Locked(List<'a, RelationLock>),
    /// The transactions that are open. Others that have not ended never will.
    Running(RunningXacts<'a>),
    /// A database is made or dropped.
    Database(DatabaseRecord<'a>),
    /// A tablespace is made or dropped.
    Tablespace(TablespaceRecord<'a>),
    /// Catalogs have new files.
    Remapped(MapUpdate<'a>),
    /// A sequence has a new state.
    Sequence(RelFile),
    /// Somebody wrote a message.
    Message(LogicalMessage<'a>),
    /// The WAL machinery's own: checkpoints, restore points, the end of a recovery ...
    Machinery(XlogRecord<'a>),
    /// Nothing but pages: of indexes, or of tables without their rows changing. The block references say which.
    Pages,
}

/// Rows that come, change or go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// Where.
    pub file: RelFile,
    /// What happens to them.
    pub kind: RowKind,
    /// How many they are.
    pub rows: u16,
    /// The page; of an update that with the new version.
    pub block: u32,
    /// The line pointer of the row; of an update that of the new version, of several rows 0.
    pub offset: u16,
    /// The rows are pieces of another relation's values. Only `wal_level = logical` says it, and only of inserts:
    /// elsewhere names must tell.
    pub is_on_toast: bool,
}

/// A row of a table that comes, changes or goes, as logical replication tells it. The table is a user's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationRow {
    /// The database.
    pub database: Oid,
    /// The table's OID.
    pub relation: Oid,
    /// What happens to the row: [`RowKind::Insert`], [`RowKind::Update`] or [`RowKind::Delete`]. One that moves to another
    /// partition is deleted here and inserted there.
    pub kind: RowKind,
}

/// What happens to rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// They come.
    Insert,
    /// A row comes that may be taken back at once (`ON CONFLICT`).
    SpeculativeInsert,
    /// A speculative insert holds.
    Confirm,
    /// A speculative insert is taken back.
    SuperDelete,
    /// A row has a new version.
    Update,
    /// A row has a new version on the same page, and no indexed column differs.
    HotUpdate,
    /// A row is overwritten: only in catalogs.
    Overwrite,
    /// A row goes.
    Delete,
    /// A row goes because an `UPDATE` moves it to another partition, where it is inserted.
    MoveOut,
}

/// Rows as statements count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// Rows inserted; those that an `UPDATE` moved here from another partition are among them.
    pub inserted: u64,
    /// Rows updated; those that moved to another partition are not among them.
    pub updated: u64,
    /// Rows deleted.
    pub deleted: u64,
    /// Rows that an `UPDATE` moved to another partition. Of a transaction as a whole they are updates, and as many of its
    /// inserts are none.
    pub moved: u64,
}

/// Relations made by `initdb` have OIDs below this, and so have their files until they are rewritten.
///
/// (Postgres: `FirstNormalObjectId` in `access/transam.h`.)
pub const FIRST_NORMAL_OID: u32 = 16_384;

impl RowChange {
    /// What it adds to the counts of its transaction and relation, if the transaction commits.
    pub fn counts(&self) -> RowCounts {
        self.kind.counts(self.rows)
    }

    /// True if the file is certainly a catalog's or one of its TOAST tables'. A catalog that was rewritten
    /// (`VACUUM FULL`) has another file, which only names can tell.
    pub const fn is_surely_catalog(&self) -> bool {
        self.file.number < FIRST_NORMAL_OID
    }
}

impl RelationRow {
    /// What it adds to the counts of its transaction and relation, if the transaction commits.
    pub fn counts(&self) -> RowCounts {
        self.kind.counts(1)
    }
}

impl RowKind {
    fn counts(self, rows: u16) -> RowCounts {
        let rows = u64::from(rows);
        match self {
            Self::Insert | Self::Confirm => RowCounts { inserted: rows, ..RowCounts::default() },
            Self::Update | Self::HotUpdate => RowCounts { updated: rows, ..RowCounts::default() },
            Self::Delete => RowCounts { deleted: rows, ..RowCounts::default() },
            Self::MoveOut => RowCounts { moved: rows, ..RowCounts::default() },
            Self::SpeculativeInsert | Self::SuperDelete | Self::Overwrite => RowCounts::default(),
        }
    }
}

impl std::ops::AddAssign for RowCounts {
    fn add_assign(&mut self, other: Self) {
        // Those of an index come from the repository, where anything may stand.
        self.inserted = self.inserted.saturating_add(other.inserted);
        self.updated = self.updated.saturating_add(other.updated);
        self.deleted = self.deleted.saturating_add(other.deleted);
        self.moved = self.moved.saturating_add(other.moved);
    }
}

impl<'a> Change<'a> {
    /// What a record does.
    ///
    /// # Errors
    /// If the record is of no known resource manager, or not one that the manager writes.
    #[inline]
    pub fn read(record: &Record<'a>) -> Result<Self, DecodeError> {
        match simple(record) {
            Some(Simple::Row(row)) => Ok(Self::of(record, None, Action::Rows(row))),
            Some(Simple::Pages) => Ok(Self::of(record, None, Action::Pages)),
            Some(Simple::End) => Ok(Self::of(record, None, Action::read_other(record)?)),
            None => Self::read_any(record),
        }
    }

    /// The same as [`Change::read`], the long way.
    #[inline(never)]
    pub(super) fn read_any(record: &Record<'a>) -> Result<Self, DecodeError> {
        let parts = record.parts()?;
        let action = match record.header.rmgr {
            RmgrId::HEAP => heap_action(record, &parts)?,
            RmgrId::HEAP2 => heap2_action(record, &parts)?,
            _ => Action::read_other(record)?,
        };
        Ok(Self::of(record, parts.top_xid, action))
    }

    #[inline]
    const fn of(record: &Record<'a>, top_xid: Option<Xid>, action: Action<'a>) -> Self {
        Self { lsn: record.lsn, end: record.end, xid: record.header.xid, top_xid, action }
    }
}

impl<'a> Action<'a> {
    /// What a record does that is not of the managers of tables.
    fn read_other(record: &Record<'a>) -> Result<Self, DecodeError> {
        let found = match record.header.rmgr {
            RmgrId::BTREE
            | RmgrId::HASH
            | RmgrId::GIN
            | RmgrId::GIST
            | RmgrId::SPGIST
            | RmgrId::BRIN
            | RmgrId::GENERIC
            | RmgrId::CLOG
            | RmgrId::MULTIXACT
            | RmgrId::COMMIT_TS
            | RmgrId::REPLICATION_ORIGIN => Some(Self::Pages),
            RmgrId::XLOG => xlog::read(record)?.map(|read| match read {
                XlogRecord::PageImages { .. } => Self::Pages,
                read => Self::Machinery(read),
            }),
            RmgrId::XACT => xact::read_any(record)?.map(|read| match read {
                XactRecord::End(end) => Self::Ended(end),
                XactRecord::Prepare(prepare) => Self::Prepared(prepare),
                XactRecord::Assignment(assignment) => Self::Assigned(assignment),
                XactRecord::Invalidations(messages) => {
                    Self::Invalidated(Invalidations { messages, ..Invalidations::default() })
                }
            }),
            RmgrId::STORAGE => storage::read(record)?.map(|read| match read {
                StorageRecord::Create { file, fork } => Self::FileCreated { file, fork },
                StorageRecord::Truncate(truncate) => Self::FileTruncated(truncate),
            }),
            RmgrId::STANDBY => standby::read(record)?.map(|read| match read {
                StandbyRecord::Lock(locks) => Self::Locked(locks),
                StandbyRecord::RunningXacts(running) => Self::Running(running),
                StandbyRecord::Invalidations(invalidations) => Self::Invalidated(invalidations),
            }),
            RmgrId::DATABASE => database::read(record)?.map(Self::Database),
            RmgrId::TABLESPACE => tablespace::read(record)?.map(Self::Tablespace),
            RmgrId::RELMAP => relmap::read(record)?.map(Self::Remapped),
            RmgrId::SEQUENCE => sequence::read(record)?.map(|state| Self::Sequence(state.file)),
            RmgrId::LOGICAL_MESSAGE => message::read(record)?.map(Self::Message),
            // An extension's: what its pages are is in the block references, the rest only it knows.
            RmgrId(128..) => Some(Self::Pages),
            _ => None,
        };
        found.ok_or_else(|| DecodeError::damaged(record.lsn, Fault::UnknownManager(record.header.rmgr.0)))
    }
}

/// The file and page of block reference 0, which every change of rows has.
fn page(record: &Record<'_>, parts: &Parts<'_>) -> Result<(RelFile, u32), DecodeError> {
    match parts.blocks().next() {
        Some(block) => block.and_then(|block| match (block.id, block.fork) {
            (0, Fork::Main) => Ok((block.relation, block.number)),
            _ => Err(DecodeError::damaged(record.lsn, Fault::Impossible("the page of a row"))),
        }),
        None => Err(DecodeError::damaged(record.lsn, Fault::Impossible("a row without a page"))),
    }
}

/// What most WAL is made of.
enum Simple {
    /// A change of rows that touches one page.
    Row(RowChange),
    /// One page, and no rows.
    Pages,
    /// The end of a transaction, or what else its manager writes, with nothing beside.
    End,
}

/// The commonest records, in their usual order of parts. `None` says nothing but that the record wants a closer look;
/// [`Change::read_any`] says the same of what is read here, and takes several times as long.
#[inline]
fn simple(record: &Record<'_>) -> Option<Simple> {
    match record.header.rmgr {
        RmgrId::HEAP => {
            let (file, block, main_data) = record.only_page()?;
            match heap_row(record, main_data).ok()? {
                Some((kind, offset, is_on_toast)) => {
                    Some(Simple::Row(RowChange { file, kind, rows: 1, block, offset, is_on_toast }))
                }
                None => heap::is_lock(record).then_some(Simple::Pages),
            }
        }
        RmgrId::BTREE | RmgrId::HASH | RmgrId::GIN | RmgrId::GIST | RmgrId::SPGIST | RmgrId::BRIN => {
            record.only_page().map(|_| Simple::Pages)
        }
        RmgrId::HEAP2 => {
            let (_, _, main_data) = record.only_page()?;
            match heap2::read_main(record, main_data).ok()? {
                Heap2Record::MultiInsert(_) => None,
                _ => Some(Simple::Pages),
            }
        }
        RmgrId::XACT => record.is_only_main().then_some(Simple::End),
        _ => None,
    }
}

/// What happens to the row, its line pointer, and whether it is said to be a piece of another relation's value.
#[inline]
fn heap_row(record: &Record<'_>, main_data: &[u8]) -> Result<Option<(RowKind, u16, bool)>, DecodeError> {
    Ok(Some(match heap::read_main(record, main_data)? {
        HeapRecord::Insert(insert) if insert.is_speculative() => {
            (RowKind::SpeculativeInsert, insert.offset, insert.is_on_toast())
        }
        HeapRecord::Insert(insert) => (RowKind::Insert, insert.offset, insert.is_on_toast()),
        HeapRecord::Delete(delete) if delete.is_super() => (RowKind::SuperDelete, delete.offset, false),
        HeapRecord::Delete(delete) if delete.is_partition_move() => (RowKind::MoveOut, delete.offset, false),
        HeapRecord::Delete(delete) => (RowKind::Delete, delete.offset, false),
        HeapRecord::Update(update) if update.hot => (RowKind::HotUpdate, update.new_offset, false),
        HeapRecord::Update(update) => (RowKind::Update, update.new_offset, false),
        HeapRecord::Confirm { offset } => (RowKind::Confirm, offset, false),
        HeapRecord::Inplace(inplace) => (RowKind::Overwrite, inplace.offset, false),
        HeapRecord::Truncate(_) | HeapRecord::Lock(_) => return Ok(None),
    }))
}

fn heap_action<'a>(record: &Record<'a>, parts: &Parts<'a>) -> Result<Action<'a>, DecodeError> {
    let Some((kind, offset, is_on_toast)) = heap_row(record, parts.main_data)? else {
        return Ok(match heap::read_main(record, parts.main_data)? {
            HeapRecord::Truncate(truncate) => Action::Truncated(truncate),
            _ => Action::Pages,
        });
    };
    let (file, block) = page(record, parts)?;
    Ok(Action::Rows(RowChange { file, kind, rows: 1, block, offset, is_on_toast }))
}

fn heap2_action<'a>(record: &Record<'a>, parts: &Parts<'a>) -> Result<Action<'a>, DecodeError> {
    let Heap2Record::MultiInsert(insert) = heap2::read_main(record, parts.main_data)? else { return Ok(Action::Pages) };
    let (file, block) = page(record, parts)?;
    let (rows, is_on_toast) = (insert.rows, insert.is_on_toast());
    Ok(Action::Rows(RowChange { file, kind: RowKind::Insert, rows, block, offset: 0, is_on_toast }))
}
