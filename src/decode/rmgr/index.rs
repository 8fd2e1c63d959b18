//! Records of indexes, and of extensions that log differences of pages: what `pg_waldump` prints of them.
//!
//! What these records mean to walguard is in their block references: which pages of which index they touch.

use super::text::{self, Described, letter, put};
use crate::decode::cursor::Cursor;
use crate::decode::{Block, DecodeError, List, Record};

/// The data of block reference 0, or nothing.
fn page_data<'a>(record: &Record<'a>) -> Result<&'a [u8], DecodeError> {
    Ok(record.block(0)?.map_or(&[][..], |block| block.data))
}

pub(super) mod btree {
    //! (Postgres: `access/nbtxlog.h`, `btree_desc` in `access/rmgrdesc/nbtdesc.c`.)

    use super::*;

    const DELETE: u8 = 0x70;
    const UNLINK_PAGE: u8 = 0x80;
    const UNLINK_PAGE_META: u8 = 0x90;
    const NEWROOT: u8 = 0xA0;
    const MARK_PAGE_HALFDEAD: u8 = 0xB0;
    const VACUUM: u8 = 0xC0;
    const REUSE_PAGE: u8 = 0xD0;
    const META_CLEANUP: u8 = 0xE0;

    pub(in crate::decode::rmgr) const fn name(operation: u8) -> Option<&'static str> {
        Some(match operation {
            0x00 => "INSERT_LEAF",
            0x10 => "INSERT_UPPER",
            0x20 => "INSERT_META",
            0x30 => "SPLIT_L",
            0x40 => "SPLIT_R",
            0x50 => "INSERT_POST",
            0x60 => "DEDUP",
            DELETE => "DELETE",
            UNLINK_PAGE => "UNLINK_PAGE",
            UNLINK_PAGE_META => "UNLINK_PAGE_META",
            NEWROOT => "NEWROOT",
            MARK_PAGE_HALFDEAD => "MARK_PAGE_HALFDEAD",
            VACUUM => "VACUUM",
            REUSE_PAGE => "REUSE_PAGE",
            META_CLEANUP => "META_CLEANUP",
            _ => return None,
        })
    }

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let major = record.major();
        // 16 put a colon behind each name and commas between all of them.
        let (colon, semicolon) = if major.describes_with_keys() { (":", ",") } else { ("", ";") };
        let conflict = major.conflict_name();
        let mut main = record.main_cursor()?;
        match record.operation() {
            0x00 | 0x10 | 0x20 | 0x50 => put!(out, "off{colon} {}", main.u16("line pointer")?),
            0x30 | 0x40 => {
                put!(out, "level{colon} {}, ", main.u32("level")?);
                put!(out, "firstrightoff{colon} {}, ", main.u16("first right line pointer")?);
                put!(out, "newitemoff{colon} {}, ", main.u16("new line pointer")?);
                put!(out, "postingoff{colon} {}", main.u16("posting list")?);
            }
            0x60 => put!(out, "nintervals{colon} {}", main.u16("number of intervals")?),
            VACUUM => {
                let (deleted, updated) = (main.u16("deleted")?, main.u16("updated")?);
                put!(out, "ndeleted{colon} {deleted}{semicolon} nupdated{colon} {updated}");
                describe_deletions(record, deleted, updated, out)?;
            }
            DELETE => {
                put!(out, "{conflict}{colon} {}{semicolon} ", main.u32("conflict")?);
                let (deleted, updated) = (main.u16("deleted")?, main.u16("updated")?);
                put!(out, "ndeleted{colon} {deleted}{semicolon} nupdated{colon} {updated}");
                if major.describes_catalogs() {
                    put!(out, ", isCatalogRel: {}", letter(main.bool("catalog")?));
                }
                describe_deletions(record, deleted, updated, out)?;
            }
            MARK_PAGE_HALFDEAD => {
                main.skip(4, "downlink")?;
                let (leaf, left) = (main.u32("leaf")?, main.u32("left")?);
                let (right, top) = (main.u32("right")?, main.u32("top parent")?);
                put!(out, "topparent{colon} {top}{semicolon} leaf{colon} {leaf}{semicolon} ");
                put!(out, "left{colon} {left}{semicolon} right{colon} {right}");
            }
            UNLINK_PAGE | UNLINK_PAGE_META => {
                let (left, right) = (main.u32("left")?, main.u32("right")?);
                let level = main.u32("level")?;
                main.skip(4, "padding")?;
                let safe = text::full_xid(main.u64("safe xid")?);
                put!(out, "left{colon} {left}{semicolon} right{colon} {right}{semicolon} level{colon} {level}");
                put!(out, "{semicolon} safexid{colon} {safe}{semicolon} ");
                put!(out, "leafleft{colon} {}{semicolon} ", main.u32("leaf's left")?);
                put!(out, "leafright{colon} {}{semicolon} ", main.u32("leaf's right")?);
                put!(out, "leaftopparent{colon} {}", main.u32("leaf's top parent")?);
            }
            NEWROOT => {
                main.skip(4, "root")?;
                put!(out, "lev{} {}", if colon.is_empty() { "" } else { "el:" }, main.u32("level")?);
            }
            REUSE_PAGE => {
                put!(out, "rel{colon} {}{semicolon} ", text::locator(main.relation("index")?));
                main.skip(4, "page")?;
                put!(out, "{conflict}{colon} {}", text::full_xid(main.u64("conflict")?));
                if major.describes_catalogs() {
                    put!(out, ", isCatalogRel: {}", letter(main.bool("catalog")?));
                }
            }
            META_CLEANUP => {
                let mut meta = record.cursor(page_data(record)?);
                meta.skip(20, "metadata")?;
                put!(out, "last_cleanup_num_delpages{colon} {}", meta.u32("deleted pages")?);
            }
            _ => {}
        }
        Ok(())
    }

    /// (Postgres: `delvacuum_desc`.)
    fn describe_deletions(record: &Record<'_>, deleted: u16, updated: u16, out: &mut String) -> Described {
        let data = page_data(record)?;
        if !record.major().describes_with_keys() || data.is_empty() {
            return Ok(());
        }
        let mut data = record.cursor(data);
        let deleted: List<'_, u16> = data.list(usize::from(deleted), 2, "deleted line pointers")?;
        let updated: List<'_, u16> = data.list(usize::from(updated), 2, "updated line pointers")?;
        out.push_str(", deleted:");
        text::array(out, deleted.iter(), |out, offset| put!(out, "{offset}"));
        out.push_str(", updated:");
        let mut fault = Ok(());
        text::array(out, updated.iter(), |out, offset| {
            if let Err(error) = describe_update(offset, &mut data, out) {
                fault = Err(error);
            }
        });
        fault
    }

    fn describe_update(offset: u16, data: &mut Cursor<'_>, out: &mut String) -> Described {
        let count = usize::from(data.u16("number of deleted heap tids")?);
        let tids: List<'_, u16> = data.list(count, 2, "deleted heap tids")?;
        put!(out, "{{ off: {offset}, nptids: {count}, ptids:");
        text::array(out, tids.iter(), |out, tid| put!(out, "{tid}"));
        out.push_str(" }");
        Ok(())
    }
}

pub(super) mod hash {
    //! (Postgres: `access/hash_xlog.h`, `hash_desc` in `access/rmgrdesc/hashdesc.c`.)

    use super::*;

    const VACUUM_ONE_PAGE: u8 = 0xC0;

    pub(in crate::decode::rmgr) const fn name(operation: u8) -> Option<&'static str> {
        Some(match operation {
            0x00 => "INIT_META_PAGE",
            0x10 => "INIT_BITMAP_PAGE",
            0x20 => "INSERT",
            0x30 => "ADD_OVFL_PAGE",
            0x40 => "SPLIT_ALLOCATE_PAGE",
            0x50 => "SPLIT_PAGE",
            0x60 => "SPLIT_COMPLETE",
            0x70 => "MOVE_PAGE_CONTENTS",
            0x80 => "SQUEEZE_PAGE",
            0x90 => "DELETE",
            0xA0 => "SPLIT_CLEANUP",
            0xB0 => "UPDATE_META_PAGE",
            VACUUM_ONE_PAGE => "VACUUM_ONE_PAGE",
            _ => return None,
        })
    }

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let major = record.major();
        let mut main = record.main_cursor()?;
        match record.operation() {
            0x00 => {
                let tuples = general(f64::from_bits(main.u64("number of tuples")?));
                main.skip(4, "hash function")?;
                put!(out, "num_tuples {tuples}, fillfactor {}", main.u16("fill factor")?);
            }
            0x10 => put!(out, "bmsize {}", main.u16("bitmap size")?),
            0x20 => put!(out, "off {}", main.u16("line pointer")?),
            0x30 => {
                let size = main.u16("bitmap size")?;
                put!(out, "bmsize {size}, bmpage_found {}", letter(main.bool("bitmap page found")?));
            }
            0x40 => {
                let bucket = main.u32("new bucket")?;
                main.skip(4, "bucket flags")?;
                let flags = main.u8("flags")?;
                put!(out, "new_bucket {bucket}, meta_page_masks_updated {}, ", letter(flags & 1 != 0));
                put!(out, "issplitpoint_changed {}", letter(flags & 2 != 0));
            }
            0x60 => {
                let (old, new) = (main.u16("old bucket")?, main.u16("new bucket")?);
                put!(out, "old_bucket_flag {old}, new_bucket_flag {new}");
            }
            0x70 => {
                let tuples = main.u16("number of tuples")?;
                put!(out, "ntups {tuples}, is_primary {}", letter(main.bool("primary")?));
            }
            0x80 => {
                let (previous, next) = (main.u32("page before")?, main.u32("page after")?);
                let tuples = main.u16("number of tuples")?;
                put!(out, "prevblkno {previous}, nextblkno {next}, ntups {tuples}, ");
                put!(out, "is_primary {}", letter(main.bool("primary")?));
            }
            0x90 => {
                let (clear, primary) = (main.bool("clear dead marking")?, main.bool("primary")?);
                put!(out, "clear_dead_marking {}, is_primary {}", letter(clear), letter(primary));
            }
            0xB0 => put!(out, "ntuples {}", general(f64::from_bits(main.u64("number of tuples")?))),
            VACUUM_ONE_PAGE => {
                let conflict = main.u32("conflict")?;
                let tuples = match major.conflicts_name_catalogs() {
                    true => i32::from(main.u16("number of tuples")?),
                    false => main.i32("number of tuples")?,
                };
                put!(out, "ntuples {tuples}, {} {conflict}", major.conflict_name());
                if major.describes_catalogs() {
                    put!(out, ", isCatalogRel {}", letter(main.bool("catalog")?));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A number as C's `%g` prints it: six significant digits, no trailing zeros.
    pub(super) fn general(value: f64) -> String {
        const DIGITS: i32 = 6;
        if value == 0.0 || !value.is_finite() {
            return if value.is_nan() { "nan".into() } else { format!("{value}") };
        }
        let scientific = format!("{value:.5e}");
        let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let trim = |text: &str| match text.contains('.') {
            true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => text.to_owned(),
        };
        if !(-4..DIGITS).contains(&exponent) {
            let sign = if exponent < 0 { '-' } else { '+' };
            return format!("{}e{sign}{:02}", trim(mantissa), exponent.unsigned_abs());
        }
        let decimals = usize::try_from(DIGITS - 1 - exponent).unwrap_or(0);
        trim(&format!("{value:.decimals$}"))
    }
}

pub(super) mod gin {
    //! (Postgres: `access/ginxlog.h`, `gin_desc` in `access/rmgrdesc/gindesc.c`.)

    use super::*;

    const IS_DATA: u16 = 1;
    const IS_LEAF: u16 = 2;
    const SPLIT_ROOT: u16 = 4;

    pub(in crate::decode::rmgr) const fn name(operation: u8) -> Option<&'static str> {
        Some(match operation {
            0x10 => "CREATE_PTREE",
            0x20 => "INSERT",
            0x30 => "SPLIT",
            0x40 => "VACUUM_PAGE",
            0x50 => "DELETE_PAGE",
            0x60 => "UPDATE_META_PAGE",
            0x70 => "INSERT_LISTPAGE",
            0x80 => "DELETE_LISTPAGE",
            0x90 => "VACUUM_DATA_LEAF_PAGE",
            _ => return None,
        })
    }

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let mut main = record.main_cursor()?;
        match record.operation() {
            0x20 => describe_insert(record, &mut main, out)?,
            0x30 => {
                main.skip(24, "split pages")?;
                let flags = main.u16("split flags")?;
                put!(out, "isrootsplit: {} ", letter(flags & SPLIT_ROOT != 0));
                put!(out, "isdata: {} isleaf: {}", letter(flags & IS_DATA != 0), letter(flags & IS_LEAF != 0));
            }
            0x90 => match record.block(0)? {
                Some(Block { image: Some(image), .. }) => describe_image(image.apply, out),
                block => {
                    let mut data = record.cursor(block.map_or(&[][..], |block| block.data));
                    describe_recompression(&mut data, out)?;
                }
            },
            0x80 => {
                main.skip(56, "metadata")?;
                put!(out, "ndeleted: {}", main.i32("number of deleted pages")?);
            }
            _ => {}
        }
        Ok(())
    }

    fn describe_image(apply: bool, out: &mut String) {
        out.push_str(if apply { " (full page image)" } else { " (full page image, for WAL verification)" });
    }

    fn describe_insert(record: &Record<'_>, main: &mut Cursor<'_>, out: &mut String) -> Described {
        let flags = main.u16("insert flags")?;
        let (is_data, is_leaf) = (flags & IS_DATA != 0, flags & IS_LEAF != 0);
        put!(out, "isdata: {} isleaf: {}", letter(is_data), letter(is_leaf));
        if !is_leaf {
            put!(out, " children: {}/{}", block_number(main)?, block_number(main)?);
        }
        let block = record.block(0)?;
        if let Some(Block { image: Some(image), .. }) = block {
            describe_image(image.apply, out);
            return Ok(());
        }
        let mut data = record.cursor(block.map_or(&[][..], |block| block.data));
        match (is_data, is_leaf) {
            (false, _) => {
                data.skip(2, "line pointer")?;
                put!(out, " isdelete: {}", letter(data.bool("delete")?));
            }
            (true, true) => describe_recompression(&mut data, out)?,
            (true, false) => {
                data.skip(2, "line pointer")?;
                let (child, key) = (block_number(&mut data)?, block_number(&mut data)?);
                put!(out, " pitem: {child}-{key}/{}", data.u16("line pointer of the key")?);
            }
        }
        Ok(())
    }

    /// A block number in two halves (Postgres: `BlockIdData`).
    fn block_number(cursor: &mut Cursor<'_>) -> Result<u32, DecodeError> {
        let (high, low) = (cursor.u16("page")?, cursor.u16("page")?);
        Ok(u32::from(high) << 16 | u32::from(low))
    }

    /// (Postgres: `desc_recompress_leaf`.)
    fn describe_recompression(data: &mut Cursor<'_>, out: &mut String) -> Described {
        let actions = data.u16("number of actions")?;
        put!(out, " {actions} segments:");
        for _ in 0..actions {
            let (segment, action) = (data.u8("segment")?, data.u8("action")?);
            match action {
                1 => put!(out, " {segment} (delete)"),
                2 | 3 => {
                    data.skip(6, "first item")?;
                    let bytes = usize::from(data.u16("bytes of the posting list")?);
                    data.skip(bytes.next_multiple_of(2), "posting list")?;
                    put!(out, " {segment} ({})", if action == 2 { "insert" } else { "replace" });
                }
                4 => {
                    let items = data.u16("number of items")?;
                    data.skip(usize::from(items) * 6, "items")?;
                    put!(out, " {segment} (add {items} items)");
                }
                _ => {
                    put!(out, " {segment} unknown action {action} ???");
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

pub(super) mod gist {
    //! (Postgres: `access/gistxlog.h`, `gist_desc` in `access/rmgrdesc/gistdesc.c`.)

    use super::*;

    pub(in crate::decode::rmgr) const fn name(operation: u8) -> Option<&'static str> {
        Some(match operation {
            0x00 => "PAGE_UPDATE",
            0x10 => "DELETE",
            0x20 => "PAGE_REUSE",
            0x30 => "PAGE_SPLIT",
            0x60 => "PAGE_DELETE",
            0x70 => "ASSIGN_LSN",
            _ => return None,
        })
    }

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let conflict = record.major().conflict_name();
        let mut main = record.main_cursor()?;
        match record.operation() {
            0x10 => {
                put!(out, "delete: {conflict} {}, ", main.u32("conflict")?);
                put!(out, "nitems: {}", main.u16("number of items")?);
                describe_catalog(record, &mut main, out)?;
            }
            0x20 => {
                put!(out, "rel {}; ", text::locator(main.relation("index")?));
                put!(out, "blk {}; ", main.u32("page")?);
                put!(out, "{conflict} {}", text::full_xid(main.u64("conflict")?));
                describe_catalog(record, &mut main, out)?;
            }
            0x30 => {
                main.skip(18, "original page")?;
                put!(out, "page_split: splits to {} pages", main.u16("number of pages")?);
            }
            0x60 => {
                let xid = text::full_xid(main.u64("deleting transaction")?);
                put!(out, "deleteXid {xid}; downlink {}", main.u16("downlink")?);
            }
            _ => {}
        }
        Ok(())
    }

    fn describe_catalog(record: &Record<'_>, main: &mut Cursor<'_>, out: &mut String) -> Described {
        if record.major().describes_catalogs() {
            put!(out, ", isCatalogRel {}", letter(main.bool("catalog")?));
        }
        Ok(())
    }
}

pub(super) mod spgist {
    //! (Postgres: `access/spgxlog.h`, `spg_desc` in `access/rmgrdesc/spgdesc.c`.)

    use super::*;

    pub(in crate::decode::rmgr) const fn name(operation: u8) -> Option<&'static str> {
        Some(match operation {
            0x10 => "ADD_LEAF",
            0x20 => "MOVE_LEAFS",
            0x30 => "ADD_NODE",
            0x40 => "SPLIT_TUPLE",
            0x50 => "PICKSPLIT",
            0x60 => "VACUUM_LEAF",
            0x70 => "VACUUM_ROOT",
            0x80 => "VACUUM_REDIRECT",
            _ => return None,
        })
    }

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let mut main = record.main_cursor()?;
        match record.operation() {
            0x10 => {
                let (new, nulls) = (main.bool("new page")?, main.bool("nulls")?);
                put!(out, "off: {}, ", main.u16("leaf")?);
                put!(out, "headoff: {}, ", main.u16("head")?);
                put!(out, "parentoff: {}, ", main.u16("parent")?);
                put!(out, "nodeI: {}", main.u16("node")?);
                note(out, &[(new, "newpage"), (nulls, "nulls")]);
            }
            0x20 => {
                let moves = main.u16("moves")?;
                let (new, replaces, nulls) = (main.bool("new page")?, main.bool("replaces")?, main.bool("nulls")?);
                main.skip(1, "padding")?;
                put!(out, "nmoves: {moves}, parentoff: {}, nodeI: {}", main.u16("parent")?, main.u16("node")?);
                note(out, &[(new, "newpage"), (replaces, "replacedead"), (nulls, "nulls")]);
            }
            0x30 => {
                let (old, new) = (main.u16("old line pointer")?, main.u16("new line pointer")?);
                let new_page = main.bool("new page")?;
                let parent = i8::from_le_bytes([main.u8("parent page")?]);
                put!(out, "off: {old}, newoff: {new}, parentBlk: {parent}, ");
                put!(out, "parentoff: {}, nodeI: {}", main.u16("parent")?, main.u16("node")?);
                note(out, &[(new_page, "newpage")]);
            }
            0x40 => {
                let (prefix, postfix) = (main.u16("prefix")?, main.u16("postfix")?);
                let (new, same) = (main.bool("new page")?, main.bool("same page")?);
                put!(out, "prefixoff: {prefix}, postfixoff: {postfix}");
                note(out, &[(new, "newpage"), (same, "same")]);
            }
            0x50 => describe_pick_split(&mut main, out)?,
            0x60 => {
                put!(out, "ndead: {}, ", main.u16("dead")?);
                put!(out, "nplaceholder: {}, ", main.u16("placeholders")?);
                put!(out, "nmove: {}, nchain: {}", main.u16("moves")?, main.u16("chains")?);
            }
            0x70 => put!(out, "ndelete: {}", main.u16("deleted")?),
            0x80 => {
                let conflict = match record.major().describes_with_keys() {
                    true => "snapshotConflictHorizon",
                    false => "newestredirectxid",
                };
                put!(out, "ntoplaceholder: {}, ", main.u16("redirects")?);
                put!(out, "firstplaceholder: {}, ", main.u16("first placeholder")?);
                put!(out, "{conflict}: {}", main.u32("conflict")?);
                if record.major().describes_catalogs() {
                    put!(out, ", isCatalogRel: {}", letter(main.bool("catalog")?));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn describe_pick_split(main: &mut Cursor<'_>, out: &mut String) -> Described {
        let root = main.bool("root split")?;
        main.skip(1, "padding")?;
        let (deleted, inserted) = (main.u16("deleted")?, main.u16("inserted")?);
        main.skip(2, "new pages")?;
        let inner = main.u16("inner")?;
        main.skip(1, "new page")?;
        let (nulls, parent) = (main.bool("nulls")?, main.bool("inner is parent")?);
        main.skip(1, "padding")?;
        put!(out, "ndelete: {deleted}, ninsert: {inserted}, inneroff: {inner}, ");
        put!(out, "parentoff: {}, nodeI: {}", main.u16("parent")?, main.u16("node")?);
        note(out, &[(nulls, "nulls"), (parent, "innerIsParent"), (root, "isRootSplit")]);
        Ok(())
    }

    fn note(out: &mut String, notes: &[(bool, &str)]) {
        notes.iter().filter(|(yes, _)| *yes).for_each(|(_, note)| put!(out, " ({note})"));
    }
}

pub(super) mod brin {
    //! (Postgres: `access/brin_xlog.h`, `brin_desc` in `access/rmgrdesc/brindesc.c`.)

    use super::*;

    pub(in crate::decode::rmgr) const fn name(operation: u8) -> Option<&'static str> {
        Some(match operation {
            0x00 => "CREATE_INDEX",
            0x10 => "INSERT",
            0x90 => "INSERT+INIT",
            0x20 => "UPDATE",
            0xA0 => "UPDATE+INIT",
            0x30 => "SAMEPAGE_UPDATE",
            0x40 => "REVMAP_EXTEND",
            0x50 => "DESUMMARIZE",
            _ => return None,
        })
    }

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let mut main = record.main_cursor()?;
        match record.operation() & 0x70 {
            0x00 => {
                let range = main.u32("pages per range")?;
                put!(out, "v{} pagesPerRange {range}", main.u16("version")?);
            }
            0x10 => {
                put!(out, "heapBlk {} ", main.u32("heap page")?);
                put!(out, "pagesPerRange {} ", main.u32("pages per range")?);
                put!(out, "offnum {}", main.u16("line pointer")?);
            }
            0x20 => {
                let old = main.u16("old line pointer")?;
                main.skip(2, "padding")?;
                let (block, range) = (main.u32("heap page")?, main.u32("pages per range")?);
                let new = main.u16("line pointer")?;
                put!(out, "heapBlk {block} pagesPerRange {range} old offnum {old}, new offnum {new}");
            }
            0x30 => put!(out, "offnum {}", main.u16("line pointer")?),
            0x40 => put!(out, "targetBlk {}", main.u32("target page")?),
            0x50 => {
                put!(out, "pagesPerRange {}, ", main.u32("pages per range")?);
                put!(out, "heapBlk {}, ", main.u32("heap page")?);
                put!(out, "page offset {}", main.u16("page offset")?);
            }
            _ => {}
        }
        Ok(())
    }
}

pub(super) mod generic {
    //! (Postgres: `access/generic_xlog.h`, `generic_desc` in `access/rmgrdesc/genericdesc.c`.)

    use super::*;

    pub(in crate::decode::rmgr) fn describe(record: &Record<'_>, out: &mut String) -> Described {
        let mut main = record.main_cursor()?;
        while !main.is_empty() {
            let (offset, length) = (main.u16("offset")?, main.u16("length")?);
            main.skip(usize::from(length), "difference")?;
            put!(out, "offset {offset}, length {length}{}", if main.is_empty() { "" } else { "; " });
        }
        Ok(())
    }
}
