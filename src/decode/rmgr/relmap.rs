//! Records of the file map: catalogs whose file `pg_class` cannot tell, because it is needed to read `pg_class`.
//!
//! (Postgres: `utils/relmapper.h`; the map itself is `RelMapFile` in `utils/cache/relmapper.c`.)

use super::text::{Described, put};
use crate::decode::{DecodeError, Fault, Item, List, Record, RmgrId};
use crate::pg::Oid;

const UPDATE: u8 = 0x00;

/// What a map begins with (Postgres: `RELMAPPER_FILEMAGIC`).
const MAGIC: u32 = 0x0059_2717;

/// A new version of the map of a database (Postgres: `xl_relmap_update`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapUpdate<'a> {
    /// The database, 0 for shared catalogs.
    pub database: Oid,
    /// Its tablespace, `pg_global` for shared catalogs.
    pub tablespace: Oid,
    /// Bytes of the map.
    pub bytes: i32,
    /// The catalogs and their files.
    pub mappings: List<'a, Mapping>,
}

/// A catalog and its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The catalog's OID.
    pub catalog: Oid,
    /// Its file's number.
    pub file: u32,
}

impl Item for Mapping {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (catalog, file) = bytes.split_first_chunk()?;
        Some(Self { catalog: Oid(u32::from_le_bytes(*catalog)), file: u32::from_le_bytes(*file.first_chunk()?) })
    }
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it holds no map.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<MapUpdate<'a>>, DecodeError> {
    if record.header.rmgr != RmgrId::RELMAP {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    if record.operation() != UPDATE {
        return Err(main.fault(Fault::UnknownOperation(record.operation())));
    }
    let (database, tablespace) = (main.oid("database")?, main.oid("tablespace")?);
    let bytes = main.i32("size of the map")?;
    if main.u32("magic number of the map")? != MAGIC {
        return Err(main.fault(Fault::Impossible("the magic number of a file map")));
    }
    Ok(Some(MapUpdate { database, tablespace, bytes, mappings: main.counted_list(8, "mappings")? }))
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    match operation {
        UPDATE => Some("UPDATE"),
        _ => None,
    }
}

/// (Postgres: `relmap_desc` in `access/rmgrdesc/relmapdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    if let Some(MapUpdate { database, tablespace, bytes, .. }) = read(record)? {
        put!(out, "database {database} tablespace {tablespace} size {bytes}");
    }
    Ok(())
}
