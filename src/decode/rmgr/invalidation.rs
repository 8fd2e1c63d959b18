//! Messages that tell sessions to forget what they have cached: which catalog entries a transaction changed.

use super::text::{Described, put};
use crate::decode::{Item, List, WalMajor};
use crate::pg::Oid;

/// Bytes of a message in the WAL.
pub(super) const BYTES: usize = 16;

/// A message (Postgres: `SharedInvalidationMessage` in `storage/sinval.h`). Its padding is garbage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// One entry of a catalog cache, known by the hash of its key.
    Catcache {
        /// Number of the cache; differs between majors.
        cache: i8,
        /// The database, 0 for a shared catalog.
        database: Oid,
        /// Hash of the key.
        hash: u32,
    },
    /// All entries of a catalog.
    Catalog {
        /// The database, 0 for a shared catalog.
        database: Oid,
        /// The catalog's OID.
        catalog: Oid,
    },
    /// What is cached of a relation.
    Relcache {
        /// The database, 0 for a shared relation.
        database: Oid,
        /// The relation's OID; 0 means all relations.
        relation: Oid,
    },
    /// The files of a relation.
    Smgr,
    /// The file map of a database.
    Relmap {
        /// The database, 0 for the map of shared catalogs.
        database: Oid,
    },
    /// Snapshots of a catalog.
    Snapshot {
        /// The database, 0 for a shared catalog.
        database: Oid,
        /// The catalog's OID.
        relation: Oid,
    },
    /// What logical replication has cached of a relation (18 and later).
    Relsync {
        /// The database.
        database: Oid,
        /// The relation's OID; 0 means all relations.
        relation: Oid,
    },
    /// A kind of message that walguard does not know.
    Unknown(i8),
}

impl Item for Invalidation {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<4>()?;
        let (first, rest) = rest.split_first_chunk::<4>()?;
        let (second, _) = rest.split_first_chunk::<4>()?;
        let [kind, ..] = *head;
        let (database, second) = (Oid(u32::from_le_bytes(*first)), u32::from_le_bytes(*second));
        Some(match i8::from_le_bytes([kind]) {
            cache @ 0.. => Self::Catcache { cache, database, hash: second },
            -1 => Self::Catalog { database, catalog: Oid(second) },
            -2 => Self::Relcache { database, relation: Oid(second) },
            -3 => Self::Smgr,
            -4 => Self::Relmap { database },
            -5 => Self::Snapshot { database, relation: Oid(second) },
            -6 => Self::Relsync { database, relation: Oid(second) },
            kind => Self::Unknown(kind),
        })
    }
}

/// Messages, and whether the file that holds a prepared relation cache is stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Invalidations<'a> {
    /// The database whose prepared relation cache is stale, where the record says it.
    pub database: Oid,
    /// Its default tablespace.
    pub tablespace: Oid,
    /// The file with the prepared relation cache is to be removed: a catalog changed that every session reads.
    pub init_file: bool,
    /// The messages.
    pub messages: List<'a, Invalidation>,
}

/// (Postgres: `standby_desc_invalidations` in `access/rmgrdesc/standbydesc.c`.)
pub(super) fn describe(of: &Invalidations<'_>, major: WalMajor, out: &mut String) -> Described {
    if of.messages.is_empty() {
        return Ok(());
    }
    if of.init_file {
        put!(out, "; relcache init file inval dbid {} tsid {}", of.database, of.tablespace);
    }
    out.push_str("; inval msgs:");
    for message in of.messages.iter() {
        match message {
            Invalidation::Catcache { cache, .. } => put!(out, " catcache {cache}"),
            Invalidation::Catalog { catalog, .. } => put!(out, " catalog {catalog}"),
            Invalidation::Relcache { relation, .. } => put!(out, " relcache {relation}"),
            Invalidation::Smgr => out.push_str(" smgr"),
            Invalidation::Relmap { database } => put!(out, " relmap db {database}"),
            Invalidation::Snapshot { relation, .. } => put!(out, " snapshot {relation}"),
            Invalidation::Relsync { relation, .. } if major.has_relsync_invalidation() => {
                put!(out, " relsync {relation}");
            }
            Invalidation::Relsync { .. } => out.push_str(" unrecognized id -6"),
            Invalidation::Unknown(kind) => put!(out, " unrecognized id {kind}"),
        }
    }
    Ok(())
}
