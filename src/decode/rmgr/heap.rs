//! Records of tables, row by row.
//!
//! (Postgres: `access/heapam_xlog.h`.)

use super::invalidation::{self, Invalidations};
use super::text::{self, Described, put};
use crate::decode::{DecodeError, Fault, List, Record, RmgrId};
use crate::pg::Oid;

/// The operation, without the flag that the page is made anew.
pub(super) const OPERATION: u8 = 0x70;
pub(super) const INIT_PAGE: u8 = 0x80;
const INSERT: u8 = 0x00;
const DELETE: u8 = 0x10;
const UPDATE: u8 = 0x20;
const TRUNCATE: u8 = 0x30;
const HOT_UPDATE: u8 = 0x40;
const CONFIRM: u8 = 0x50;
const LOCK: u8 = 0x60;
const INPLACE: u8 = 0x70;

const INSERT_IS_SPECULATIVE: u8 = 0x04;
const INSERT_ON_TOAST: u8 = 0x10;
const DELETE_IS_SUPER: u8 = 0x08;
const DELETE_IS_PARTITION_MOVE: u8 = 0x10;

/// What a record of the Heap manager says. The page, and with it the relation, is block reference 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeapRecord<'a> {
    /// A row came.
    Insert(Insert),
    /// A row went.
    Delete(Delete),
    /// A row has a new version: on the page of block reference 0; the old one is on that of reference 1, if there is one
    /// of the main fork, or else on the same.
    Update(Update),
    /// Tables are emptied; written beside the physical changes at `wal_level = logical` only.
    Truncate(Truncate<'a>),
    /// A speculative insert (`ON CONFLICT`) holds: the row at this line pointer counts from now on.
    Confirm {
        /// The row's line pointer.
        offset: u16,
    },
    /// A row is locked (`FOR UPDATE`, foreign keys): not changed.
    Lock(TupleLock),
    /// A row of a catalog is overwritten without a new version.
    Inplace(Inplace<'a>),
}

/// (Postgres: `xl_heap_insert`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insert {
    /// The row's line pointer.
    pub offset: u16,
    /// `XLH_INSERT_*`.
    pub flags: u8,
}

impl Insert {
    /// The row counts only once it is confirmed ([`HeapRecord::Confirm`]).
    pub const fn is_speculative(&self) -> bool {
        self.flags & INSERT_IS_SPECULATIVE != 0
    }

    /// The row is a piece of another relation's value; said at `wal_level = logical` only.
    pub const fn is_on_toast(&self) -> bool {
        self.flags & INSERT_ON_TOAST != 0
    }
}

/// (Postgres: `xl_heap_delete`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delete {
    /// What marks the row as deleted: a transaction, or a multixact.
    pub xmax: u32,
    /// The row's line pointer.
    pub offset: u16,
    /// `XLHL_*`.
    pub infobits: u8,
    /// `XLH_DELETE_*`.
    pub flags: u8,
}

impl Delete {
    /// A speculative insert is taken back: the row never was.
    pub const fn is_super(&self) -> bool {
        self.flags & DELETE_IS_SUPER != 0
    }

    /// The row moves to another partition because of an `UPDATE`.
    pub const fn is_partition_move(&self) -> bool {
        self.flags & DELETE_IS_PARTITION_MOVE != 0
    }
}

/// (Postgres: `xl_heap_update`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// No index needs a new entry.
    pub hot: bool,
    /// What marks the old version as superseded.
    pub old_xmax: u32,
    /// Line pointer of the old version.
    pub old_offset: u16,
    /// `XLHL_*`, of the old version.
    pub old_infobits: u8,
    /// `XLH_UPDATE_*`.
    pub flags: u8,
    /// What locks the new version.
    pub new_xmax: u32,
    /// Line pointer of the new version.
    pub new_offset: u16,
}

/// (Postgres: `xl_heap_truncate`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncate<'a> {
    /// The database.
    pub database: Oid,
    /// `XLH_TRUNCATE_*`.
    pub flags: u8,
    /// OIDs of the tables, partitions and tables reached by `CASCADE` included.
    pub relations: List<'a, Oid>,
}

impl Truncate<'_> {
    /// `TRUNCATE ... CASCADE`.
    pub const fn cascade(&self) -> bool {
        self.flags & 1 != 0
    }

    /// `TRUNCATE ... RESTART IDENTITY`.
    pub const fn restart_sequences(&self) -> bool {
        self.flags & 2 != 0
    }
}

/// (Postgres: `xl_heap_lock`, `xl_heap_lock_updated`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TupleLock {
    /// What holds the lock: a transaction, or a multixact.
    pub xmax: u32,
    /// The row's line pointer.
    pub offset: u16,
    /// `XLHL_*`.
    pub infobits: u8,
    /// `XLH_LOCK_*`.
    pub flags: u8,
}

/// (Postgres: `xl_heap_inplace`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inplace<'a> {
    /// The row's line pointer.
    pub offset: u16,
    /// What sessions must forget (18 and later; before, the commit says it).
    pub invalidations: Invalidations<'a>,
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<HeapRecord<'a>>, DecodeError> {
    match record.header.rmgr {
        RmgrId::HEAP => read_main(record, record.main_data()?).map(Some),
        _ => Ok(None),
    }
}

/// True if the record locks a row.
pub(in crate::decode) const fn is_lock(record: &Record<'_>) -> bool {
    record.operation() & OPERATION == LOCK
}

#[inline]
pub(in crate::decode) fn read_main<'a>(record: &Record<'a>, main: &'a [u8]) -> Result<HeapRecord<'a>, DecodeError> {
    let mut main = record.cursor(main);
    Ok(match record.operation() & OPERATION {
        INSERT => HeapRecord::Insert(Insert { offset: main.u16("line pointer")?, flags: main.u8("insert flags")? }),
        DELETE => HeapRecord::Delete(Delete {
            xmax: main.u32("xmax")?,
            offset: main.u16("line pointer")?,
            infobits: main.u8("row flags")?,
            flags: main.u8("delete flags")?,
        }),
        operation @ (UPDATE | HOT_UPDATE) => HeapRecord::Update(Update {
            hot: operation == HOT_UPDATE,
            old_xmax: main.u32("old xmax")?,
            old_offset: main.u16("old line pointer")?,
            old_infobits: main.u8("old row flags")?,
            flags: main.u8("update flags")?,
            new_xmax: main.u32("new xmax")?,
            new_offset: main.u16("new line pointer")?,
        }),
        TRUNCATE => {
            let database = main.oid("database")?;
            let count = main.count("number of truncated tables")?;
            let flags = main.u8("truncate flags")?;
            main.skip(3, "padding")?;
            HeapRecord::Truncate(Truncate { database, flags, relations: main.list(count, 4, "truncated tables")? })
        }
        CONFIRM => HeapRecord::Confirm { offset: main.u16("line pointer")? },
        LOCK => HeapRecord::Lock(TupleLock {
            xmax: main.u32("xmax")?,
            offset: main.u16("line pointer")?,
            infobits: main.u8("row flags")?,
            flags: main.u8("lock flags")?,
        }),
        INPLACE => {
            let offset = main.u16("line pointer")?;
            let mut invalidations = Invalidations::default();
            if record.major().inplace_has_invalidations() {
                main.skip(2, "padding")?;
                invalidations.database = main.oid("database")?;
                invalidations.tablespace = main.oid("tablespace")?;
                invalidations.init_file = main.bool("relation cache file")?;
                main.skip(3, "padding")?;
                invalidations.messages = main.counted_list(invalidation::BYTES, "invalidation messages")?;
            }
            HeapRecord::Inplace(Inplace { offset, invalidations })
        }
        operation => return Err(main.fault(Fault::UnknownOperation(operation))),
    })
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        INSERT => "INSERT",
        0x80 => "INSERT+INIT",
        DELETE => "DELETE",
        UPDATE => "UPDATE",
        0xA0 => "UPDATE+INIT",
        HOT_UPDATE => "HOT_UPDATE",
        0xC0 => "HOT_UPDATE+INIT",
        TRUNCATE => "TRUNCATE",
        CONFIRM => "HEAP_CONFIRM",
        LOCK => "LOCK",
        INPLACE => "INPLACE",
        _ => return None,
    })
}

/// (Postgres: `heap_desc` in `access/rmgrdesc/heapdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    let keys = record.major().describes_with_keys();
    match read_main(record, record.main_data()?)? {
        HeapRecord::Insert(Insert { offset, flags }) if keys => put!(out, "off: {offset}, flags: 0x{flags:02X}"),
        HeapRecord::Insert(Insert { offset, flags }) => put!(out, "off {offset} flags 0x{flags:02X}"),
        HeapRecord::Delete(Delete { xmax, offset, infobits, flags }) if keys => {
            put!(out, "xmax: {xmax}, off: {offset}, {}, flags: 0x{flags:02X}", infobit_list("infobits", infobits));
        }
        HeapRecord::Delete(Delete { offset, infobits, flags, .. }) => {
            put!(out, "off {offset} flags 0x{flags:02X} {}", infobit_words(infobits));
        }
        HeapRecord::Update(u) if keys => {
            put!(out, "old_xmax: {}, old_off: {}, ", u.old_xmax, u.old_offset);
            put!(out, "{}, flags: 0x{:02X}, ", infobit_list("old_infobits", u.old_infobits), u.flags);
            put!(out, "new_xmax: {}, new_off: {}", u.new_xmax, u.new_offset);
        }
        HeapRecord::Update(u) => {
            put!(out, "off {} xmax {} flags 0x{:02X} ", u.old_offset, u.old_xmax, u.flags);
            put!(out, "{}; new off {} xmax {}", infobit_words(u.old_infobits), u.new_offset, u.new_xmax);
        }
        HeapRecord::Truncate(truncate) => describe_truncate(&truncate, keys, out),
        HeapRecord::Confirm { offset } => put!(out, "off{} {offset}", if keys { ":" } else { "" }),
        HeapRecord::Lock(lock) => describe_lock(&lock, "xid", keys, out),
        HeapRecord::Inplace(Inplace { offset, invalidations }) => {
            put!(out, "off{} {offset}", if keys { ":" } else { "" });
            invalidation::describe(&invalidations, record.major(), out)?;
        }
    }
    Ok(())
}

fn describe_truncate(truncate: &Truncate<'_>, keys: bool, out: &mut String) {
    let (cascade, restart) = (truncate.cascade(), truncate.restart_sequences());
    let count = truncate.relations.len();
    if keys {
        let flags = [(cascade, "CASCADE"), (restart, "RESTART_SEQS")];
        put!(out, "flags: [{}], nrelids: {count}, relids:", words(&flags).join(", "));
        text::array(out, truncate.relations.iter(), |out, oid| put!(out, "{oid}"));
    } else {
        put!(out, "{}{}", if cascade { "cascade " } else { "" }, if restart { "restart_seqs " } else { "" });
        put!(out, "nrelids {count} relids");
        truncate.relations.iter().for_each(|oid| put!(out, " {oid}"));
    }
}

pub(super) fn describe_lock(lock: &TupleLock, holder: &str, keys: bool, out: &mut String) {
    let TupleLock { xmax, offset, infobits, flags } = *lock;
    if keys {
        put!(out, "xmax: {xmax}, off: {offset}, {}, flags: 0x{flags:02X}", infobit_list("infobits", infobits));
    } else {
        put!(out, "off {offset}: {holder} {xmax}: flags 0x{flags:02X} {}", infobit_words(infobits));
    }
}

fn words(flags: &[(bool, &'static str)]) -> Vec<&'static str> {
    flags.iter().filter(|(set, _)| *set).map(|(_, word)| *word).collect()
}

/// (Postgres: `XLHL_*` in `access/heapam_xlog.h`.)
fn infobits(bits: u8) -> Vec<&'static str> {
    let all = ["IS_MULTI", "LOCK_ONLY", "EXCL_LOCK", "KEYSHR_LOCK", "KEYS_UPDATED"];
    all.into_iter().enumerate().filter(|(bit, _)| bits & (1 << bit) != 0).map(|(_, word)| word).collect()
}

fn infobit_list(key: &str, bits: u8) -> String {
    format!("{key}: [{}]", infobits(bits).join(", "))
}

fn infobit_words(bits: u8) -> String {
    infobits(bits).into_iter().flat_map(|word| [word, " "]).collect()
}
