//! Records of what Postgres keeps of transactions beside the tables: commit states, multixacts, commit times, progress of
//! replication.
//!
//! (Postgres: `access/clog.h`, `access/multixact.h`, `access/commit_ts.h`, `replication/origin.h`. Page numbers have 64
//! bits since 17.)

use super::text::{self, Described, put};
use crate::decode::cursor::Cursor;
use crate::decode::{DecodeError, Record};

pub(super) const fn clog_name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        0x00 => "ZEROPAGE",
        0x10 => "TRUNCATE",
        _ => return None,
    })
}

/// (Postgres: `clog_desc` in `access/rmgrdesc/clogdesc.c`.)
pub(super) fn describe_clog(record: &Record<'_>, out: &mut String) -> Described {
    let mut main = record.main_cursor()?;
    put!(out, "page {}", page(record, &mut main)?);
    if record.operation() == 0x10 {
        put!(out, "; oldestXact {}", main.u32("oldest transaction")?);
    }
    Ok(())
}

pub(super) const fn multixact_name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        0x00 => "ZERO_OFF_PAGE",
        0x10 => "ZERO_MEM_PAGE",
        0x20 => "CREATE_ID",
        0x30 => "TRUNCATE_ID",
        _ => return None,
    })
}

/// (Postgres: `multixact_desc` in `access/rmgrdesc/mxactdesc.c`.)
pub(super) fn describe_multixact(record: &Record<'_>, out: &mut String) -> Described {
    let mut main = record.main_cursor()?;
    match record.operation() {
        0x00 | 0x10 => put!(out, "{}", page(record, &mut main)?),
        0x20 => {
            let (multixact, offset) = (main.u32("multixact")?, main.u32("offset")?);
            let members = main.count("number of members")?;
            put!(out, "{multixact} offset {offset} nmembers {members}: ");
            for _ in 0..members {
                let (xid, status) = (main.u32("member")?, main.i32("member's status")?);
                put!(out, "{xid} ({}) ", member_status(status));
            }
        }
        0x30 => {
            main.skip(4, "database")?;
            let (from, to) = (main.u32("first offset")?, main.u32("last offset")?);
            put!(out, "offsets [{from}, {to}), ");
            put!(out, "members [{}, {})", main.u32("first member")?, main.u32("last member")?);
        }
        _ => {}
    }
    Ok(())
}

/// (Postgres: `MultiXactStatus` in `access/multixact.h`.)
const fn member_status(status: i32) -> &'static str {
    match status {
        0 => "keysh",
        1 => "sh",
        2 => "fornokeyupd",
        3 => "forupd",
        4 => "nokeyupd",
        5 => "upd",
        _ => "unk",
    }
}

pub(super) const fn commit_ts_name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        0x00 => "ZEROPAGE",
        0x10 => "TRUNCATE",
        _ => return None,
    })
}

/// (Postgres: `commit_ts_desc` in `access/rmgrdesc/committsdesc.c`.)
pub(super) fn describe_commit_ts(record: &Record<'_>, out: &mut String) -> Described {
    let mut main = record.main_cursor()?;
    match record.operation() {
        0x00 => put!(out, "{}", page(record, &mut main)?),
        0x10 => {
            let page = page(record, &mut main)?;
            put!(out, "pageno {page}, oldestXid {}", main.u32("oldest transaction")?);
        }
        _ => {}
    }
    Ok(())
}

pub(super) const fn origin_name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        0x00 => "SET",
        0x10 => "DROP",
        _ => return None,
    })
}

/// (Postgres: `replorigin_desc` in `access/rmgrdesc/replorigindesc.c`.)
pub(super) fn describe_origin(record: &Record<'_>, out: &mut String) -> Described {
    let mut main = record.main_cursor()?;
    match record.operation() {
        0x00 => {
            let (lsn, node) = (main.lsn("remote position")?, main.u16("origin")?);
            put!(out, "set {node}; lsn {}; force: {}", text::lsn(lsn), main.u8("force")?);
        }
        0x10 => put!(out, "drop {}", main.u16("origin")?),
        _ => {}
    }
    Ok(())
}

fn page(record: &Record<'_>, main: &mut Cursor<'_>) -> Result<i64, DecodeError> {
    match record.major().has_wide_page_numbers() {
        true => main.i64("page number"),
        false => main.i32("page number").map(i64::from),
    }
}
