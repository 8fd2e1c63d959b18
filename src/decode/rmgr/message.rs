//! Messages that somebody wrote into the WAL with `pg_logical_emit_message()`; at every `wal_level`.
//!
//! (Postgres: `replication/message.h`.)

use super::text::{self, Described, put};
use crate::decode::{DecodeError, Fault, Record, RmgrId};
use crate::pg::Oid;

const MESSAGE: u8 = 0x00;

/// A message (Postgres: `xl_logical_message`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogicalMessage<'a> {
    /// The database in which it was written.
    pub database: Oid,
    /// It counts only if its transaction commits.
    pub transactional: bool,
    /// What kind of message it is, in the server's encoding.
    pub prefix: &'a [u8],
    /// The message.
    pub content: &'a [u8],
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if its lengths do not fit.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<LogicalMessage<'a>>, DecodeError> {
    match record.header.rmgr {
        RmgrId::LOGICAL_MESSAGE => read_main(record, record.main_data()?).map(Some),
        _ => Ok(None),
    }
}

pub(in crate::decode) fn read_main<'a>(record: &Record<'a>, main: &'a [u8]) -> Result<LogicalMessage<'a>, DecodeError> {
    let mut main = record.cursor(main);
    if record.operation() != MESSAGE {
        return Err(main.fault(Fault::UnknownOperation(record.operation())));
    }
    let database = main.oid("database")?;
    let transactional = main.bool("transactional")?;
    main.skip(3, "padding")?;
    let mut length = |field| {
        let length = main.u64(field)?;
        usize::try_from(length).map_err(|_| main.fault(Fault::Impossible("the length of a message")))
    };
    let (prefix, content) = (length("length of the prefix")?, length("length of the message")?);
    let prefix = main.bytes(prefix, "prefix of the message")?;
    let prefix = prefix.split(|b| *b == 0).next().unwrap_or_default();
    Ok(LogicalMessage { database, transactional, prefix, content: main.bytes(content, "message")? })
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    match operation {
        MESSAGE => Some("MESSAGE"),
        _ => None,
    }
}

/// (Postgres: `logicalmsg_desc` in `access/rmgrdesc/logicalmsgdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    let Some(message) = read(record)? else { return Ok(()) };
    let kind = if message.transactional { "transactional" } else { "non-transactional" };
    let (prefix, length) = (text::text(message.prefix), message.content.len());
    put!(out, "{kind}, prefix \"{prefix}\"; payload ({length} bytes): ");
    let mut separator = "";
    for byte in message.content {
        put!(out, "{separator}{byte:02X}");
        separator = " ";
    }
    Ok(())
}
