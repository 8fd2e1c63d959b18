//! Records for standbys that answer queries: exclusive locks, running transactions, invalidations.
//!
//! (Postgres: `storage/standbydefs.h`, `storage/lockdefs.h`.)

use super::invalidation::{self, Invalidations};
use super::text::{Described, put};
use crate::decode::{DecodeError, Fault, Item, List, Record, RmgrId};
use crate::pg::{Oid, Xid};

const LOCK: u8 = 0x00;
const RUNNING_XACTS: u8 = 0x10;
const INVALIDATIONS: u8 = 0x20;

/// What a record of the Standby manager says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyRecord<'a> {
    /// `ACCESS EXCLUSIVE` locks that were taken.
    Lock(List<'a, RelationLock>),
    /// The transactions that are open.
    RunningXacts(RunningXacts<'a>),
    /// What sessions must forget, outside of a transaction.
    Invalidations(Invalidations<'a>),
}

/// An `ACCESS EXCLUSIVE` lock (Postgres: `xl_standby_lock`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationLock {
    /// The transaction that holds it.
    pub xid: u32,
    /// The relation's database, 0 for a shared one.
    pub database: Oid,
    /// The relation's OID: not the number of its file.
    pub relation: Oid,
}

impl Item for RelationLock {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (xid, rest) = bytes.split_first_chunk()?;
        let (database, relation) = rest.split_first_chunk::<4>()?;
        Some(Self { xid: u32::from_le_bytes(*xid), database: Oid::of(database)?, relation: Oid::of(relation)? })
    }
}

/// (Postgres: `xl_running_xacts`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningXacts<'a> {
    /// Some subtransactions are left out.
    pub overflowed: bool,
    /// The next transaction id.
    pub next_xid: u32,
    /// No older transaction runs: whatever is older and has not ended never will.
    pub oldest_running_xid: u32,
    /// The newest transaction that has ended.
    pub latest_completed_xid: u32,
    /// Open top-level transactions.
    pub xids: List<'a, Xid>,
    /// Open subtransactions.
    pub subxids: List<'a, Xid>,
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<StandbyRecord<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::STANDBY {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    Ok(Some(match record.operation() {
        LOCK => StandbyRecord::Lock(main.counted_list(12, "locks")?),
        RUNNING_XACTS => {
            let xids = main.count("number of transactions")?;
            let subxids = main.count("number of subtransactions")?;
            let overflowed = main.bool("overflow")?;
            main.skip(3, "padding")?;
            StandbyRecord::RunningXacts(RunningXacts {
                overflowed,
                next_xid: main.u32("next transaction")?,
                oldest_running_xid: main.u32("oldest running transaction")?,
                latest_completed_xid: main.u32("latest completed transaction")?,
                xids: main.list(xids, 4, "running transactions")?,
                subxids: main.list(subxids, 4, "running subtransactions")?,
            })
        }
        INVALIDATIONS => {
            let (database, tablespace) = (main.oid("database")?, main.oid("tablespace")?);
            let init_file = main.bool("relation cache file")?;
            main.skip(3, "padding")?;
            let messages = main.counted_list(invalidation::BYTES, "invalidation messages")?;
            StandbyRecord::Invalidations(Invalidations { database, tablespace, init_file, messages })
        }
        operation => return Err(main.fault(Fault::UnknownOperation(operation))),
    }))
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        LOCK => "LOCK",
        RUNNING_XACTS => "RUNNING_XACTS",
        INVALIDATIONS => "INVALIDATIONS",
        _ => return None,
    })
}

/// (Postgres: `standby_desc` in `access/rmgrdesc/standbydesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    match read(record)? {
        Some(StandbyRecord::Lock(locks)) => {
            for RelationLock { xid, database, relation } in locks.iter() {
                put!(out, "xid {xid} db {database} rel {relation} ");
            }
        }
        Some(StandbyRecord::RunningXacts(running)) => {
            put!(out, "nextXid {} ", running.next_xid);
            put!(out, "latestCompletedXid {} ", running.latest_completed_xid);
            put!(out, "oldestRunningXid {}", running.oldest_running_xid);
            if !running.xids.is_empty() {
                put!(out, "; {} xacts:", running.xids.len());
                running.xids.iter().for_each(|xid| put!(out, " {xid}"));
            }
            let subxacts = record.major().describes_running_subxacts();
            if running.overflowed {
                out.push_str("; subxid ovf");
            }
            if subxacts && !running.subxids.is_empty() {
                put!(out, "; {} subxacts:", running.subxids.len());
                running.subxids.iter().for_each(|xid| put!(out, " {xid}"));
            }
        }
        Some(StandbyRecord::Invalidations(invalidations)) => {
            invalidation::describe(&invalidations, record.major(), out)?;
        }
        None => {}
    }
    Ok(())
}
