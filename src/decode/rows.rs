//! What a record of the heap does to rows, with as much of their content as it holds.
//!
//! [`Change`](super::Change) says that rows changed, and is cheap; this says how, for the few files whose content matters.

use super::cursor::Cursor;
use super::heap_page;
use super::list::List;
use super::rmgr::heap::{self, HeapRecord, Update};
use super::rmgr::heap2::{self, Heap2Record, MultiInsert};
use super::{Block, DecodeError, Fault, Record};
use crate::pg::{Fork, RelFile};

/// Flags of an update that leaves out what the new version has in common with the old one, at its beginning and at its
/// end (Postgres: `XLH_UPDATE_PREFIX_FROM_OLD`, `XLH_UPDATE_SUFFIX_FROM_OLD` in `access/heapam_xlog.h`).
const UPDATE_HAS_PREFIX: u8 = 0x20;
const UPDATE_HAS_SUFFIX: u8 = 0x40;

/// Bytes of a row's header in a page; its bitmap of nulls follows (Postgres: `SizeofHeapTupleHeader`).
const ROW_HEADER_BYTES: usize = 23;

/// Where a row lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowPlace {
    /// The page, counted from the beginning of the file.
    pub block: u32,
    /// The line pointer on it, from 1.
    pub offset: u16,
}

/// What a row holds: the values of its columns, behind its header and bitmap of nulls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowContent<'a> {
    /// All of it.
    Whole(&'a [u8]),
    /// All of it, out of a page image.
    FromImage(Vec<u8>),
    /// What differs from the version before: so many bytes of that one's beginning, these, and so many of its end.
    Difference {
        /// Bytes taken from the beginning of the version before.
        prefix: u16,
        /// Bytes that are new.
        middle: &'a [u8],
        /// Bytes taken from the end of the version before.
        suffix: u16,
    },
}

/// What happens to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowEvent<'a> {
    /// It comes.
    Inserted(RowPlace, RowContent<'a>),
    /// It goes.
    Deleted(RowPlace),
    /// It has a new version.
    Updated {
        /// Where the old version lies.
        old: RowPlace,
        /// Where the new one does.
        new: RowPlace,
        /// What the new one holds.
        content: RowContent<'a>,
    },
}

/// What a record does to the rows of the main fork of the file that it changes; nothing if it is not of the heap, or changes
/// no row (locks, pruning, overwriting in place).
///
/// # Errors
/// If the record, or a page image in it, is not as Postgres writes it.
pub fn row_events<'a>(record: &Record<'a>) -> Result<Option<(RelFile, Vec<RowEvent<'a>>)>, DecodeError> {
    if let Some(heap) = heap::read(record)? {
        return heap_events(record, heap);
    }
    match heap2::read(record)? {
        Some(Heap2Record::MultiInsert(insert)) => multi_insert(record, &insert).map(Some),
        _ => Ok(None),
    }
}

fn heap_events<'a>(
    record: &Record<'a>,
    heap: HeapRecord<'a>,
) -> Result<Option<(RelFile, Vec<RowEvent<'a>>)>, DecodeError> {
    let (block, old_block) = pages(record)?;
    let place = |offset| RowPlace { block: block.number, offset };
    let event = match heap {
        HeapRecord::Insert(insert) => {
            RowEvent::Inserted(place(insert.offset), content(record, &block, insert.offset, None)?)
        }
        HeapRecord::Delete(delete) => RowEvent::Deleted(place(delete.offset)),
        HeapRecord::Update(update) => RowEvent::Updated {
            old: RowPlace { block: old_block.unwrap_or(block.number), offset: update.old_offset },
            new: place(update.new_offset),
            content: content(record, &block, update.new_offset, Some(&update))?,
        },
        HeapRecord::Truncate(_) | HeapRecord::Confirm { .. } | HeapRecord::Lock(_) | HeapRecord::Inplace(_) => {
            return Ok(None);
        }
    };
    Ok(Some((block.relation, vec![event])))
}

/// Block reference 0, and the page of the old version where that is another one.
fn pages<'a>(record: &Record<'a>) -> Result<(Block<'a>, Option<u32>), DecodeError> {
    let mut blocks = record.parts()?.blocks();
    let none = || DecodeError::damaged(record.lsn, Fault::Impossible("a row without a page"));
    let first = blocks.next().ok_or_else(none)??;
    // Since the minor releases of August 2026 visibility maps are among the references.
    for block in blocks {
        let block = block?;
        if block.id == 1 && block.fork == Fork::Main {
            return Ok((first, Some(block.number)));
        }
    }
    Ok((first, None))
}

fn content<'a>(
    record: &Record<'a>,
    block: &Block<'a>,
    offset: u16,
    update: Option<&Update>,
) -> Result<RowContent<'a>, DecodeError> {
    if block.data.is_empty() {
        return from_image(record, block, offset);
    }
    let mut data = record.cursor(block.data);
    let flags = update.map_or(0, |update| update.flags);
    let prefix = if flags & UPDATE_HAS_PREFIX != 0 { data.u16("row prefix")? } else { 0 };
    let suffix = if flags & UPDATE_HAS_SUFFIX != 0 { data.u16("row suffix")? } else { 0 };
    data.skip(4, "row flags")?;
    let middle = behind_bitmap(&mut data)?;
    Ok(match (prefix, suffix) {
        (0, 0) => RowContent::Whole(middle),
        _ => RowContent::Difference { prefix, middle, suffix },
    })
}

/// Reads the header's length, skips the bitmap of nulls, and gives the rest.
fn behind_bitmap<'a>(data: &mut Cursor<'a>) -> Result<&'a [u8], DecodeError> {
    let header = usize::from(data.u8("row header length")?);
    let bitmap = header.checked_sub(ROW_HEADER_BYTES);
    data.skip(bitmap.ok_or_else(|| data.fault(Fault::Impossible("the header length of a row")))?, "row nulls")?;
    Ok(data.rest())
}

fn from_image<'a>(record: &Record<'a>, block: &Block<'a>, offset: u16) -> Result<RowContent<'a>, DecodeError> {
    let missing = || DecodeError::damaged(record.lsn, Fault::Impossible("a new row that is nowhere"));
    let page = block.image.ok_or_else(missing)?.page(record.lsn)?;
    let row = heap_page::row(&page, offset).ok_or_else(missing)?;
    Ok(RowContent::FromImage(row.data.to_vec()))
}

fn multi_insert<'a>(
    record: &Record<'a>,
    insert: &MultiInsert<'a>,
) -> Result<(RelFile, Vec<RowEvent<'a>>), DecodeError> {
    let (block, _) = pages(record)?;
    let mut data = record.cursor(block.data);
    let mut events = Vec::new();
    for (row, offset) in (0..insert.rows).zip(offsets(insert)) {
        let place = RowPlace { block: block.number, offset };
        if block.data.is_empty() {
            events.push(RowEvent::Inserted(place, from_image(record, &block, offset)?));
            continue;
        }
        // Each row begins at an even place.
        if row > 0 && (block.data.len() - data.rest().len()) % 2 == 1 {
            data.skip(1, "padding between rows")?;
        }
        let length = usize::from(data.u16("row length")?);
        data.skip(4, "row flags")?;
        let header = data.u8("row header length")?;
        let bytes = data.bytes(length, "row")?;
        let bitmap = usize::from(header).checked_sub(ROW_HEADER_BYTES);
        let content = bitmap.and_then(|bitmap| bytes.get(bitmap..));
        let content = content.ok_or_else(|| data.fault(Fault::Impossible("the header length of a row")))?;
        events.push(RowEvent::Inserted(place, RowContent::Whole(content)));
    }
    Ok((block.relation, events))
}

/// The line pointers of the rows, which are 1, 2, 3 ... on a new page.
fn offsets<'a>(insert: &MultiInsert<'a>) -> impl Iterator<Item = u16> + use<'a> {
    let listed: List<'a, u16> = insert.offsets;
    let counted = if listed.is_empty() { insert.rows.min(heap_page::ROWS_MAX) } else { 0 };
    listed.iter().chain(1..=counted)
}
