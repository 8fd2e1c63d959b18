//! Records of tablespaces made and dropped.
//!
//! (Postgres: `commands/tablespace.h`.)

use super::text::{self, Described, put};
use crate::decode::{DecodeError, Fault, Record, RmgrId};
use crate::pg::Oid;

const CREATE: u8 = 0x00;
const DROP: u8 = 0x10;

/// What a record of the Tablespace manager says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TablespaceRecord<'a> {
    /// A tablespace is made.
    Create {
        /// Its OID.
        tablespace: Oid,
        /// Its directory; empty for one in the data directory.
        path: &'a [u8],
    },
    /// A tablespace is dropped.
    Drop {
        /// Its OID.
        tablespace: Oid,
    },
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<TablespaceRecord<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::TABLESPACE {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    let tablespace = main.oid("tablespace")?;
    Ok(Some(match record.operation() {
        CREATE => TablespaceRecord::Create { tablespace, path: main.text("path of the tablespace")? },
        DROP => TablespaceRecord::Drop { tablespace },
        operation => return Err(main.fault(Fault::UnknownOperation(operation))),
    }))
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        CREATE => "CREATE",
        DROP => "DROP",
        _ => return None,
    })
}

/// (Postgres: `tblspc_desc` in `access/rmgrdesc/tblspcdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    match read(record)? {
        Some(TablespaceRecord::Create { tablespace, path }) => put!(out, "{tablespace} \"{}\"", text::text(path)),
        Some(TablespaceRecord::Drop { tablespace }) => put!(out, "{tablespace}"),
        None => {}
    }
    Ok(())
}
