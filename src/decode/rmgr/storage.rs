//! Records of files made and cut short.
//!
//! (Postgres: `catalog/storage_xlog.h`.)

use super::text::{self, Described, put};
use crate::decode::{DecodeError, Fault, Record, RmgrId};
use crate::pg::{Fork, RelFile};

const CREATE: u8 = 0x10;
const TRUNCATE: u8 = 0x20;

/// What a record of the Storage manager says. It has no block references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageRecord {
    /// A file is made: of a new relation, or the new file of an old one (`TRUNCATE`, rewrites).
    Create {
        /// The file.
        file: RelFile,
        /// Which fork.
        fork: Fork,
    },
    /// A relation is cut short, its maps with it.
    Truncate(Truncate),
}

/// (Postgres: `xl_smgr_truncate`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncate {
    /// Pages that stay of the main fork.
    pub blocks: u32,
    /// The relation's file.
    pub file: RelFile,
    /// `SMGR_TRUNCATE_*`: 1 rows, 2 visibility map, 4 free space map.
    pub flags: i32,
}

impl Truncate {
    /// No row of the relation is left.
    pub const fn empties_heap(&self) -> bool {
        const HEAP: i32 = 1;
        self.blocks == 0 && self.flags & HEAP != 0
    }
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read(record: &Record<'_>) -> Result<Option<StorageRecord>, DecodeError> {
    if record.header.rmgr != RmgrId::STORAGE {
        return Ok(None);
    }
    let mut main = record.main_cursor()?;
    Ok(Some(match record.operation() {
        CREATE => {
            let file = main.relation("created file")?;
            let fork = match main.i32("created fork")? {
                0 => Fork::Main,
                1 => Fork::Fsm,
                2 => Fork::Vm,
                3 => Fork::Init,
                _ => return Err(main.fault(Fault::Impossible("the fork of a created file"))),
            };
            StorageRecord::Create { file, fork }
        }
        TRUNCATE => StorageRecord::Truncate(Truncate {
            blocks: main.u32("pages that stay")?,
            file: main.relation("truncated file")?,
            flags: main.i32("truncated forks")?,
        }),
        operation => return Err(main.fault(Fault::UnknownOperation(operation))),
    }))
}

pub(super) const fn name(operation: u8) -> Option<&'static str> {
    Some(match operation {
        CREATE => "CREATE",
        TRUNCATE => "TRUNCATE",
        _ => return None,
    })
}

/// (Postgres: `smgr_desc` in `access/rmgrdesc/smgrdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    match read(record)? {
        Some(StorageRecord::Create { file, fork }) => out.push_str(&text::path(record, file, fork)),
        Some(StorageRecord::Truncate(Truncate { blocks, file, flags })) => {
            put!(out, "{} to {blocks} blocks flags {flags}", text::path(record, file, Fork::Main));
        }
        None => {}
    }
    Ok(())
}
