//! A page of a table -> the rows on it.
//!
//! (Postgres: `storage/bufpage.h`, `storage/itemid.h`, `access/htup_details.h`.)

use crate::pg::BLOCK_SIZE;

/// Bytes of a page's header, behind which the line pointers begin.
const HEADER_BYTES: usize = 24;

/// Line pointers of a page at most: each row takes a pointer of 4 bytes and 24 bytes at least
/// (`MaxHeapTuplesPerPage`).
pub const ROWS_MAX: u16 = 291;

/// The line pointer leads to a row (`LP_NORMAL`).
const NORMAL: u32 = 1;

const XMIN_COMMITTED: u16 = 0x0100;
const XMIN_INVALID: u16 = 0x0200;
const XMAX_INVALID: u16 = 0x0800;
const XMAX_LOCK_ONLY: u16 = 0x0080;

/// A row as a page holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRow<'a> {
    /// Its line pointer, from 1.
    pub offset: u16,
    /// The transaction that made it.
    pub xmin: u32,
    /// The transaction that deleted or locked it; 0 if none did.
    pub xmax: u32,
    infomask: u16,
    /// The columns' values, behind the header and the bitmap of nulls.
    pub data: &'a [u8],
}

impl PageRow<'_> {
    /// As far as the page itself tells, the row is there: its maker was not rolled back, and nobody deleted it. Not proof:
    /// what became of a transaction is written to the page late or never.
    pub const fn looks_alive(&self) -> bool {
        let made = self.infomask & (XMIN_COMMITTED | XMIN_INVALID) != XMIN_INVALID;
        let kept = self.xmax == 0 || self.infomask & (XMAX_INVALID | XMAX_LOCK_ONLY) != 0;
        made && kept
    }
}

/// The rows on a page of a table, in the order of their line pointers. A page that is none, of an index for example, has no
/// rows; so has one that is damaged.
pub fn rows(page: &[u8]) -> impl Iterator<Item = PageRow<'_>> {
    let lower = usize::from(u16_at(page, 12).unwrap_or(0));
    let special = u16_at(page, 16).map(usize::from);
    let is_heap = page.len() == BLOCK_SIZE && special == Some(BLOCK_SIZE);
    let pointers = if is_heap { lower.saturating_sub(HEADER_BYTES) / 4 } else { 0 };
    let last = u16::try_from(pointers).unwrap_or(u16::MAX).min(ROWS_MAX);
    (1..=last).filter_map(|offset| row(page, offset))
}

/// The row at a line pointer.
pub fn row(page: &[u8], offset: u16) -> Option<PageRow<'_>> {
    let place = HEADER_BYTES + 4 * usize::from(offset.checked_sub(1)?);
    let pointer = u32_at(page, place)?;
    if pointer >> 15 & 3 != NORMAL {
        return None;
    }
    let (from, length) = ((pointer & 0x7FFF) as usize, (pointer >> 17) as usize);
    let bytes = page.get(from..from.checked_add(length)?)?;
    let header = usize::from(*bytes.get(22)?);
    Some(PageRow {
        offset,
        xmin: u32_at(bytes, 0)?,
        xmax: u32_at(bytes, 4)?,
        infomask: u16_at(bytes, 20)?,
        data: bytes.get(header..)?,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A page with these rows, as `(xmin, xmax, infomask, data)`.
    pub(crate) fn page_of(rows: &[(u32, u32, u16, &[u8])]) -> Vec<u8> {
        let mut page = vec![0; BLOCK_SIZE];
        let mut upper = BLOCK_SIZE;
        for (index, (xmin, xmax, infomask, data)) in rows.iter().enumerate() {
            let length = 24 + data.len();
            upper -= length.next_multiple_of(8);
            let row = &mut page[upper..upper + length];
            row[..4].copy_from_slice(&xmin.to_le_bytes());
            row[4..8].copy_from_slice(&xmax.to_le_bytes());
            row[20..22].copy_from_slice(&infomask.to_le_bytes());
            row[22] = 24;
            row[24..].copy_from_slice(data);
            let pointer = upper as u32 | NORMAL << 15 | (length as u32) << 17;
            page[HEADER_BYTES + 4 * index..][..4].copy_from_slice(&pointer.to_le_bytes());
        }
        page[12..14].copy_from_slice(&((HEADER_BYTES + 4 * rows.len()) as u16).to_le_bytes());
        page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        page[16..18].copy_from_slice(&(BLOCK_SIZE as u16).to_le_bytes());
        page
    }

    #[test]
    fn rows_are_found_by_their_line_pointers() {
        let page = page_of(&[(10, 0, 0, b"one"), (11, 12, 0, b"two"), (11, 12, XMAX_LOCK_ONLY, b"three")]);
        let found: Vec<_> = rows(&page).map(|row| (row.offset, row.data, row.looks_alive())).collect();
        assert_eq!(found, [(1, &b"one"[..], true), (2, b"two", false), (3, b"three", true)]);
        let mut index = page;
        index[16..18].copy_from_slice(&8176_u16.to_le_bytes());
        assert_eq!(rows(&index).count(), 0, "an index has something at the end of its pages");
    }

    proptest! {
        #[test]
        fn a_damaged_page_is_no_panic(mut page in prop::collection::vec(any::<u8>(), BLOCK_SIZE), lower in 0_u16..9000) {
            page[12..14].copy_from_slice(&lower.to_le_bytes());
            page[16..18].copy_from_slice(&(BLOCK_SIZE as u16).to_le_bytes());
            prop_assert!(rows(&page).count() <= ROWS_MAX.into());
        }
    }
}
