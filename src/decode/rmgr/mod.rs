//! What the records of each resource manager say, one module each.
//!
//! Every module has a `read` that gives `None` for other managers' records, and knows how `pg_waldump` names and describes
//! its records. Indexes and the small managers in `slru` are only described: what matters of them are the pages that
//! they touch, which are in the block references.

pub mod database;
pub mod heap;
pub mod heap2;
mod index;
pub mod invalidation;
pub mod message;
pub mod relmap;
pub mod sequence;
mod slru;
pub mod standby;
pub mod storage;
pub mod tablespace;
mod text;
pub mod xact;
pub mod xlog;

use super::{DecodeError, Record, RmgrId};

/// What `pg_waldump` calls the record's operation; `None` if the manager has no such operation, or is an extension's.
///
/// (Postgres: `rm_identify` in `access/rmgrlist.h`.)
pub fn operation_name(record: &Record<'_>) -> Option<&'static str> {
    let operation = record.operation();
    match record.header.rmgr {
        RmgrId::XLOG => xlog::name(operation),
        RmgrId::XACT => xact::name(operation),
        RmgrId::STORAGE => storage::name(operation),
        RmgrId::CLOG => slru::clog_name(operation),
        RmgrId::DATABASE => database::name(record),
        RmgrId::TABLESPACE => tablespace::name(operation),
        RmgrId::MULTIXACT => slru::multixact_name(operation),
        RmgrId::RELMAP => relmap::name(operation),
        RmgrId::STANDBY => standby::name(operation),
        RmgrId::HEAP2 => heap2::name(record),
        RmgrId::HEAP => heap::name(operation),
        RmgrId::BTREE => index::btree::name(operation),
        RmgrId::HASH => index::hash::name(operation),
        RmgrId::GIN => index::gin::name(operation),
        RmgrId::GIST => index::gist::name(operation),
        RmgrId::SEQUENCE => sequence::name(operation),
        RmgrId::SPGIST => index::spgist::name(operation),
        RmgrId::BRIN => index::brin::name(operation),
        RmgrId::COMMIT_TS => slru::commit_ts_name(operation),
        RmgrId::REPLICATION_ORIGIN => slru::origin_name(operation),
        RmgrId::GENERIC => Some("Generic"),
        RmgrId::LOGICAL_MESSAGE => message::name(operation),
        _ => None,
    }
}

/// Appends what `pg_waldump` prints behind the operation.
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Result<(), DecodeError> {
    match record.header.rmgr {
        RmgrId::XLOG => xlog::describe(record, out),
        RmgrId::XACT => xact::describe(record, out),
        RmgrId::STORAGE => storage::describe(record, out),
        RmgrId::CLOG => slru::describe_clog(record, out),
        RmgrId::DATABASE => database::describe(record, out),
        RmgrId::TABLESPACE => tablespace::describe(record, out),
        RmgrId::MULTIXACT => slru::describe_multixact(record, out),
        RmgrId::RELMAP => relmap::describe(record, out),
        RmgrId::STANDBY => standby::describe(record, out),
        RmgrId::HEAP2 => heap2::describe(record, out),
        RmgrId::HEAP => heap::describe(record, out),
        RmgrId::BTREE => index::btree::describe(record, out),
        RmgrId::HASH => index::hash::describe(record, out),
        RmgrId::GIN => index::gin::describe(record, out),
        RmgrId::GIST => index::gist::describe(record, out),
        RmgrId::SEQUENCE => sequence::describe(record, out),
        RmgrId::SPGIST => index::spgist::describe(record, out),
        RmgrId::BRIN => index::brin::describe(record, out),
        RmgrId::COMMIT_TS => slru::describe_commit_ts(record, out),
        RmgrId::REPLICATION_ORIGIN => slru::describe_origin(record, out),
        RmgrId::GENERIC => index::generic::describe(record, out),
        RmgrId::LOGICAL_MESSAGE => message::describe(record, out),
        other => {
            text::put!(out, "rmid: {}", other.0);
            Ok(())
        }
    }
}
