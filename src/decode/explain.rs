//! A record as `pg_waldump` prints it.
//!
//! The description is that of the `pg_waldump` of the record's own major, for every resource manager that comes with
//! Postgres. Two things differ by nature: times are in UTC, where `pg_waldump` uses the zone of whoever runs it, and a name
//! whose bytes are not UTF-8 is shown with replacement characters.

use std::borrow::Cow;
use std::fmt;

use super::rmgr;
use super::{Block, DecodeError, Record, RecordHeader, RmgrId};
use crate::pg::{Fork, Lsn, RelFile, Xid};

/// A record in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Where it begins.
    pub lsn: Lsn,
    /// Its header.
    pub header: RecordHeader,
    /// The resource manager's name; `custom137` for an extension's.
    pub manager: Cow<'static, str>,
    /// What the resource manager calls the operation; `UNKNOWN (f0)` if it has no such operation.
    pub operation: Cow<'static, str>,
    /// What the operation does, in the words of the resource manager.
    pub description: String,
    /// The pages that it touches.
    pub blocks: Vec<BlockExplanation>,
}

/// A page that a record touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockExplanation {
    /// Its number in the record.
    pub id: u8,
    /// The file.
    pub relation: RelFile,
    /// Which of the relation's forks.
    pub fork: Fork,
    /// The page, counted from the beginning of the fork.
    pub number: u32,
    /// The record has an image of the page: its length in bytes as stored, and whether it is applied at replay.
    pub image: Option<(usize, bool)>,
}

/// Explains a record.
///
/// # Errors
/// If the record is not one that Postgres writes. What its header says is readable nevertheless.
pub fn explain(record: &Record<'_>) -> Result<Explanation, DecodeError> {
    let RmgrId(number) = record.header.rmgr;
    let manager = match record.header.rmgr.name() {
        "" => Cow::Owned(format!("custom{number:03}")),
        name => Cow::Borrowed(name),
    };
    let operation = match rmgr::operation_name(record) {
        Some(name) => Cow::Borrowed(name),
        None => Cow::Owned(format!("UNKNOWN ({:x})", record.operation())),
    };
    let mut description = String::new();
    let blocks = record.parts()?.blocks().map(|block| block.map(|block| BlockExplanation::of(&block)));
    let blocks = blocks.collect::<Result<_, _>>()?;
    rmgr::describe(record, &mut description)?;
    Ok(Explanation { lsn: record.lsn, header: record.header, manager, operation, description, blocks })
}

impl BlockExplanation {
    fn of(block: &Block<'_>) -> Self {
        let Block { id, relation, fork, number, image, .. } = *block;
        Self { id, relation, fork, number, image: image.map(|image| (image.bytes.len(), image.apply)) }
    }
}

/// Gives the name of the relation whose file it is, if that is known.
pub type NameOf<'a> = dyn Fn(RelFile) -> Option<String> + 'a;

/// An explanation with names, as one line: `rel 1663/5/16400 (shop.public.orders)`.
#[derive(Clone, Copy)]
pub struct Named<'a> {
    explanation: &'a Explanation,
    name_of: &'a NameOf<'a>,
}

impl Explanation {
    /// The line with the name of each relation behind its file.
    pub const fn named<'a>(&'a self, name_of: &'a NameOf<'a>) -> Named<'a> {
        Named { explanation: self, name_of }
    }
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.explanation.write(f, self.name_of)
    }
}

impl fmt::Display for Explanation {
    /// One line, as `pg_waldump` prints it (Postgres: `XLogDumpDisplayRecord` in `bin/pg_waldump/pg_waldump.c`).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, &|_| None)
    }
}

impl Explanation {
    fn write(&self, f: &mut fmt::Formatter<'_>, name_of: &NameOf<'_>) -> fmt::Result {
        let Self { manager, operation, description, header, .. } = self;
        let images: usize = self.blocks.iter().filter_map(|block| block.image).map(|(length, _)| length).sum();
        let (total, xid) = (header.total_length, header.xid.map_or(0, Xid::get));
        let own = (total as usize).saturating_sub(images);
        let [(high, low), (previous_high, previous_low)] =
            [self.lsn, header.previous].map(|lsn| (lsn.bytes() >> 32, lsn.bytes() & 0xFFFF_FFFF));
        write!(f, "rmgr: {manager:<11} len (rec/tot): {own:6}/{total:6}, tx: {xid:10}, ")?;
        write!(f, "lsn: {high:X}/{low:08X}, prev {previous_high:X}/{previous_low:08X}, ")?;
        write!(f, "desc: {operation} {description}")?;
        for block in &self.blocks {
            let RelFile { tablespace, database, number } = block.relation;
            write!(f, ", blkref #{}: rel {tablespace}/{database}/{number}", block.id)?;
            if let Some(name) = name_of(block.relation) {
                write!(f, " ({name})")?;
            }
            match block.fork {
                Fork::Main => {}
                Fork::Fsm => f.write_str(" fork fsm")?,
                Fork::Vm => f.write_str(" fork vm")?,
                Fork::Init => f.write_str(" fork init")?,
            }
            write!(f, " blk {}", block.number)?;
            match block.image {
                None => {}
                Some((_, true)) => f.write_str(" FPW")?,
                Some((_, false)) => f.write_str(" FPW for WAL verification")?,
            }
        }
        Ok(())
    }
}
