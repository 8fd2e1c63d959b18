//! Records of sequences.
//!
//! (Postgres: `commands/sequence.h`.)

use super::text::{self, Described, put};
use crate::decode::{DecodeError, Fault, Record, RmgrId};
use crate::pg::RelFile;

const LOG: u8 = 0x00;

/// A sequence's new state: its only row, whole (Postgres: `xl_seq_rec`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceState<'a> {
    /// The sequence's file.
    pub file: RelFile,
    /// Its row, header included.
    pub tuple: &'a [u8],
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<SequenceState<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::SEQUENCE {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    if record.operation() != LOG {
        return Err(main.fault(Fault::UnknownOperation(record.operation())));
    }
    Ok(Some(SequenceState { file: main.relation("sequence")?, tuple: main.rest() }))
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    match operation {
        LOG => Some("LOG"),
        _ => None,
    }
}

/// (Postgres: `seq_desc` in `access/rmgrdesc/seqdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    if let Some(state) = read(record)? {
        put!(out, "rel {}", text::locator(state.file));
    }
    Ok(())
}
