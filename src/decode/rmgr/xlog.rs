//! Records of the WAL machinery itself.
//!
//! (Postgres: `catalog/pg_control.h` and `access/xlog_internal.h`.)

use super::text::{self, Described, put};
use crate::decode::{DecodeError, Fault, Record, RmgrId};
use crate::pg::{Lsn, Oid, PgTime, TimelineId};

const CHECKPOINT_SHUTDOWN: u8 = 0x00;
const CHECKPOINT_ONLINE: u8 = 0x10;
const NOOP: u8 = 0x20;
const NEXT_OID: u8 = 0x30;
pub(in crate::decode) const SWITCH: u8 = 0x40;
const BACKUP_END: u8 = 0x50;
const PARAMETER_CHANGE: u8 = 0x60;
const RESTORE_POINT: u8 = 0x70;
const FPW_CHANGE: u8 = 0x80;
const END_OF_RECOVERY: u8 = 0x90;
const FPI_FOR_HINT: u8 = 0xA0;
const FPI: u8 = 0xB0;
const OVERWRITE_CONTRECORD: u8 = 0xD0;
const CHECKPOINT_REDO: u8 = 0xE0;

/// What a record of the WAL machinery says. Operations that walguard has no use for are [`XlogRecord::Other`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XlogRecord<'a> {
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// The rest of the segment is unused.
    Switch,
    /// A base backup ended; it began at this place.
    BackupEnd(Lsn),
    /// Settings that a standby must not have smaller changed.
    ParameterChange(Parameters),
    /// Somebody marked this place with a name.
    RestorePoint(RestorePoint<'a>),
    /// A server was promoted: from here on it writes a new timeline.
    EndOfRecovery(EndOfRecovery),
    /// A record that a crash cut off, at this place, is replaced.
    Overwritten {
        /// Where the lost record began.
        lsn: Lsn,
        /// When it was replaced.
        time: PgTime,
    },
    /// The next OID that is not handed out yet.
    NextOid(Oid),
    /// `full_page_writes` was switched on or off.
    FullPageWrites(bool),
    /// Images of pages, in the block references.
    PageImages {
        /// They are there because a hint bit was set on a page with checksums.
        for_hint: bool,
    },
    /// Where replay begins that starts from the next online checkpoint (17 and later).
    CheckpointRedo {
        /// 0 minimal, 1 replica, 2 logical.
        wal_level: i32,
    },
    /// An operation code (see [`Record::operation`]) that is not looked into.
    Other(u8),
}

/// A checkpoint (Postgres: `CheckPoint` in `catalog/pg_control.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where replay begins that starts from this checkpoint.
    pub redo: Lsn,
    /// The server was shut down: no transaction is open.
    pub shutdown: bool,
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// The timeline before, different only right after a promotion.
    pub timeline_before: TimelineId,
    /// The next transaction id, epoch in the high half.
    pub next_xid: u64,
    /// When the checkpoint began, in whole seconds.
    pub time: PgTime,
    /// `full_page_writes` at that time.
    pub full_page_writes: bool,
    /// 0 minimal, 1 replica, 2 logical; `None` before 17.
    pub wal_level: Option<i32>,
    /// The next OID.
    pub next_oid: Oid,
    /// The next multixact.
    pub next_multixact: u32,
    /// The next member of a multixact.
    pub next_multixact_offset: u32,
    /// No row carries an older transaction that is not frozen.
    pub oldest_xid: u32,
    /// The database that holds it back.
    pub oldest_xid_database: Oid,
    /// No row carries an older multixact.
    pub oldest_multixact: u32,
    /// The database that holds it back.
    pub oldest_multixact_database: Oid,
    /// The oldest transaction whose commit time is known, 0 for none.
    pub oldest_commit_time_xid: u32,
    /// The newest transaction whose commit time is known, 0 for none.
    pub newest_commit_time_xid: u32,
    /// The oldest transaction that runs; 0 if it was not looked for (at shutdown, and below `wal_level = replica`).
    pub oldest_active_xid: u32,
}

/// Settings of which a standby needs at least as much (Postgres: `xl_parameter_change`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
    /// 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
}

/// A named place in the WAL, made by `pg_create_restore_point()` (Postgres: `xl_restore_point`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestorePoint<'a> {
    /// When it was made.
    pub time: PgTime,
    /// Its name: up to 63 bytes in the server's encoding.
    pub name: &'a [u8],
}

/// The end of a recovery (Postgres: `xl_end_of_recovery`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndOfRecovery {
    /// When.
    pub time: PgTime,
    /// The timeline that begins.
    pub timeline: TimelineId,
    /// The timeline that was recovered.
    pub timeline_before: TimelineId,
    /// 0 minimal, 1 replica, 2 logical; `None` before 17.
    pub wal_level: Option<i32>,
}

/// What a record of the WAL machinery says; `None` if it is another resource manager's.
///
/// # Errors
/// If its main data is shorter than Postgres writes it, or impossible.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<XlogRecord<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::XLOG {
        return Ok(None);
    }
    let operation = record.operation();
    let mut main = match operation {
        SWITCH => return Ok(Some(XlogRecord::Switch)),
        CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE => return checkpoint(record).map(Some),
        FPI | FPI_FOR_HINT => return Ok(Some(XlogRecord::PageImages { for_hint: operation == FPI_FOR_HINT })),
        NEXT_OID | BACKUP_END | PARAMETER_CHANGE | RESTORE_POINT | FPW_CHANGE | END_OF_RECOVERY
        | OVERWRITE_CONTRECORD | CHECKPOINT_REDO => record.main_cursor()?,
        other => return Ok(Some(XlogRecord::Other(other))),
    };
    let timeline =
        |number: u32| TimelineId::new(number).ok_or_else(|| DecodeError::damaged(record.lsn, Fault::TimelineZero));
    Ok(Some(match operation {
        NEXT_OID => XlogRecord::NextOid(main.oid("next OID")?),
        FPW_CHANGE => XlogRecord::FullPageWrites(main.bool("full_page_writes")?),
        CHECKPOINT_REDO => XlogRecord::CheckpointRedo { wal_level: main.i32("wal_level")? },
        BACKUP_END => XlogRecord::BackupEnd(Lsn::new(main.u64("start of the backup")?)),
        PARAMETER_CHANGE => XlogRecord::ParameterChange(Parameters {
            max_connections: main.i32("max_connections")?,
            max_worker_processes: main.i32("max_worker_processes")?,
            max_wal_senders: main.i32("max_wal_senders")?,
            max_prepared_transactions: main.i32("max_prepared_transactions")?,
            max_locks_per_transaction: main.i32("max_locks_per_transaction")?,
            wal_level: main.i32("wal_level")?,
        }),
        RESTORE_POINT => {
            let time = PgTime::from_micros(main.i64("time of the restore point")?);
            let name = main.bytes(64, "name of the restore point")?;
            XlogRecord::RestorePoint(RestorePoint { time, name: name.split(|b| *b == 0).next().unwrap_or_default() })
        }
        END_OF_RECOVERY => XlogRecord::EndOfRecovery(EndOfRecovery {
            time: PgTime::from_micros(main.i64("time of the end of recovery")?),
            timeline: timeline(main.u32("new timeline")?)?,
            timeline_before: timeline(main.u32("old timeline")?)?,
            wal_level: match record.major().checkpoint_has_wal_level() {
                true => Some(main.i32("wal_level")?),
                false => None,
            },
        }),
        _ => XlogRecord::Overwritten {
            lsn: Lsn::new(main.u64("start of the lost record")?),
            time: PgTime::from_micros(main.i64("time of the replacement")?),
        },
    }))
}

/// Where the lost record began that this one replaces; `None` if it replaces none.
pub(in crate::decode) fn overwritten(record: &Record<'_>) -> Result<Option<Lsn>, DecodeError> {
    Ok(match read(record)? {
        Some(XlogRecord::Overwritten { lsn, .. }) => Some(lsn),
        _ => None,
    })
}

fn checkpoint<'a>(record: &Record<'a>) -> Result<XlogRecord<'a>, DecodeError> {
    let mut main = record.main_cursor()?;
    let redo = Lsn::new(main.u64("redo point")?);
    let timelines = [main.u32("timeline")?, main.u32("timeline before")?].map(TimelineId::new);
    let [Some(timeline), Some(timeline_before)] = timelines else { return Err(main.fault(Fault::TimelineZero)) };
    let full_page_writes = main.bool("full_page_writes")?;
    main.skip(3, "padding")?;
    // 17 put `wal_level` where padding was, so the length stayed the same.
    let wal_level = Some(main.i32("wal_level")?).filter(|_| record.major().checkpoint_has_wal_level());
    Ok(XlogRecord::Checkpoint(Checkpoint {
        redo,
        shutdown: record.operation() == CHECKPOINT_SHUTDOWN,
        timeline,
        timeline_before,
        full_page_writes,
        wal_level,
        next_xid: main.u64("next transaction id")?,
        next_oid: main.oid("next OID")?,
        next_multixact: main.u32("next multixact")?,
        next_multixact_offset: main.u32("next multixact member")?,
        oldest_xid: main.u32("oldest transaction")?,
        oldest_xid_database: main.oid("oldest transaction's database")?,
        oldest_multixact: main.u32("oldest multixact")?,
        oldest_multixact_database: {
            let database = main.oid("oldest multixact's database")?;
            main.skip(4, "padding")?;
            database
        },
        time: PgTime::from_unix_seconds(main.i64("time of the checkpoint")?),
        oldest_commit_time_xid: main.u32("oldest commit time")?,
        newest_commit_time_xid: main.u32("newest commit time")?,
        oldest_active_xid: main.u32("oldest running transaction")?,
    }))
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        CHECKPOINT_SHUTDOWN => "CHECKPOINT_SHUTDOWN",
        CHECKPOINT_ONLINE => "CHECKPOINT_ONLINE",
        NOOP => "NOOP",
        NEXT_OID => "NEXTOID",
        SWITCH => "SWITCH",
        BACKUP_END => "BACKUP_END",
        PARAMETER_CHANGE => "PARAMETER_CHANGE",
        RESTORE_POINT => "RESTORE_POINT",
        FPW_CHANGE => "FPW_CHANGE",
        END_OF_RECOVERY => "END_OF_RECOVERY",
        FPI_FOR_HINT => "FPI_FOR_HINT",
        FPI => "FPI",
        OVERWRITE_CONTRECORD => "OVERWRITE_CONTRECORD",
        CHECKPOINT_REDO => "CHECKPOINT_REDO",
        _ => return None,
    })
}

/// (Postgres: `xlog_desc` in `access/rmgrdesc/xlogdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    let on = |yes| if yes { "on" } else { "off" };
    match read(record)? {
        Some(XlogRecord::Checkpoint(checkpoint)) => describe_checkpoint(&checkpoint, out),
        Some(XlogRecord::NextOid(oid)) => put!(out, "{oid}"),
        Some(XlogRecord::BackupEnd(start)) => out.push_str(&text::lsn(start)),
        Some(XlogRecord::ParameterChange(p)) => {
            put!(out, "max_connections={} max_worker_processes={} ", p.max_connections, p.max_worker_processes);
            put!(out, "max_wal_senders={} max_prepared_xacts={} ", p.max_wal_senders, p.max_prepared_transactions);
            put!(out, "max_locks_per_xact={} ", p.max_locks_per_transaction);
            let mut flags = record.main_cursor()?;
            flags.skip(24, "parameters")?;
            let (hints, times) = (flags.bool("wal_log_hints")?, flags.bool("track_commit_timestamp")?);
            put!(out, "wal_level={} wal_log_hints={} ", text::wal_level(p.wal_level), on(hints));
            put!(out, "track_commit_timestamp={}", on(times));
        }
        Some(XlogRecord::RestorePoint(point)) => out.push_str(&text::text(point.name)),
        Some(XlogRecord::FullPageWrites(on)) => put!(out, "{on}"),
        Some(XlogRecord::EndOfRecovery(end)) => {
            let (timeline, before) = (end.timeline, end.timeline_before);
            put!(out, "tli {timeline}; prev tli {before}; time {}", text::time(end.time));
            if let Some(level) = end.wal_level {
                put!(out, "; wal_level {}", text::wal_level(level));
            }
        }
        Some(XlogRecord::Overwritten { lsn, time }) => {
            put!(out, "lsn {}; time {}", text::lsn(lsn), text::time(time));
        }
        Some(XlogRecord::CheckpointRedo { wal_level }) => put!(out, "wal_level {}", text::wal_level(wal_level)),
        Some(XlogRecord::Switch | XlogRecord::PageImages { .. } | XlogRecord::Other(_)) | None => {}
    }
    Ok(())
}

fn describe_checkpoint(of: &Checkpoint, out: &mut String) {
    let (redo, next_xid) = (text::lsn(of.redo), text::full_xid(of.next_xid));
    put!(out, "redo {redo}; tli {}; prev tli {}; fpw {}; ", of.timeline, of.timeline_before, of.full_page_writes);
    if let Some(level) = of.wal_level {
        put!(out, "wal_level {}; ", text::wal_level(level));
    }
    put!(out, "xid {next_xid}; oid {}; multi {}; ", of.next_oid, of.next_multixact);
    put!(out, "offset {}; oldest xid {} in DB {}; ", of.next_multixact_offset, of.oldest_xid, of.oldest_xid_database);
    put!(out, "oldest multi {} in DB {}; ", of.oldest_multixact, of.oldest_multixact_database);
    let (oldest, newest) = (of.oldest_commit_time_xid, of.newest_commit_time_xid);
    put!(out, "oldest/newest commit timestamp xid: {oldest}/{newest}; oldest running xid {}; ", of.oldest_active_xid);
    out.push_str(if of.shutdown { "shutdown" } else { "online" });
}
