//! Records of databases made and dropped.
//!
//! (Postgres: `commands/dbcommands_xlog.h`. 15 brought a second way to make one, and renumbered the operations.)

use super::text::{Described, put};
use crate::decode::layout::DatabaseOperation;
use crate::decode::{DecodeError, Fault, List, Record, RmgrId};
use crate::pg::Oid;

/// What a record of the Database manager says. It has no block references: whole directories come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseRecord<'a> {
    /// The files of a database are copied (`STRATEGY = file_copy`, the only way before 15; also
    /// `ALTER DATABASE ... SET TABLESPACE`).
    Copy {
        /// Where to.
        to: Directory,
        /// Where from.
        from: Directory,
    },
    /// A database is made page by page, in records that follow (`STRATEGY = wal_log`).
    Create(Directory),
    /// The directories of a database are removed: it was dropped, or moved to another tablespace.
    Drop {
        /// The database.
        database: Oid,
        /// In which tablespaces.
        tablespaces: List<'a, Oid>,
    },
}

/// The directory of a database in a tablespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// The database.
    pub database: Oid,
    /// The tablespace.
    pub tablespace: Oid,
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<DatabaseRecord<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::DATABASE {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    let mut directory = || Ok(Directory { database: main.oid("database")?, tablespace: main.oid("tablespace")? });
    Ok(Some(match record.major().database_operation(record.operation()) {
        DatabaseOperation::Create | DatabaseOperation::CreateFileCopy => {
            DatabaseRecord::Copy { to: directory()?, from: directory()? }
        }
        DatabaseOperation::CreateWalLog => DatabaseRecord::Create(directory()?),
        DatabaseOperation::Drop => {
            DatabaseRecord::Drop { database: main.oid("database")?, tablespaces: main.counted_list(4, "tablespaces")? }
        }
        DatabaseOperation::Unknown => return Err(main.fault(Fault::UnknownOperation(record.operation()))),
    }))
}

pub(super) fn name(record: &Record<'_>) -> Option<&'static str> {
    Some(match record.major().database_operation(record.operation()) {
        DatabaseOperation::Create => "CREATE",
        DatabaseOperation::CreateFileCopy => "CREATE_FILE_COPY",
        DatabaseOperation::CreateWalLog => "CREATE_WAL_LOG",
        DatabaseOperation::Drop => "DROP",
        DatabaseOperation::Unknown => return None,
    })
}

/// (Postgres: `dbase_desc` in `access/rmgrdesc/dbasedesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    match read(record)? {
        Some(DatabaseRecord::Copy { to, from }) => {
            put!(out, "copy dir {}/{} to {}/{}", from.tablespace, from.database, to.tablespace, to.database);
        }
        Some(DatabaseRecord::Create(Directory { database, tablespace })) => {
            put!(out, "create dir {tablespace}/{database}");
        }
        Some(DatabaseRecord::Drop { database, tablespaces }) => {
            out.push_str("dir");
            tablespaces.iter().for_each(|tablespace| put!(out, " {tablespace}/{database}"));
        }
        None => {}
    }
    Ok(())
}
