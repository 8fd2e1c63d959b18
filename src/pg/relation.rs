//! Files of tables and indexes.

use std::fmt;

/// Bytes of a page of a table or of WAL. Builds with other sizes exist, but no distribution ships one.
pub const BLOCK_SIZE: usize = 8192;

/// An object id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Oid(pub u32);

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The file of a relation, as block references name it.
///
/// (Postgres: `RelFileLocator` in `storage/relfilelocator.h`, `RelFileNode` before 16.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct RelFile {
    /// The tablespace's OID: 1663 is `pg_default`, 1664 `pg_global`.
    pub tablespace: Oid,
    /// The database's OID, 0 for shared relations.
    pub database: Oid,
    /// The file's number, which is not the relation's OID once the relation was rewritten.
    pub number: u32,
}

/// Which of a relation's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fork {
    /// Its rows.
    Main,
    /// The free space map.
    Fsm,
    /// The visibility map.
    Vm,
    /// What an unlogged relation is reset to.
    Init,
}
