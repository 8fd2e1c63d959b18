//! Which relation a file is, as of a place in the WAL.

use crate::pg::Oid;

/// A relation by its name, as of a place in the WAL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Relation {
    /// The database's OID, 0 for shared relations.
    pub database: Oid,
    /// The relation's OID, which stays when its file changes.
    pub oid: Oid,
    /// The database's name; empty if nobody knows, and for shared relations.
    pub database_name: String,
    /// The schema's name; empty if nobody knows.
    pub schema: String,
    /// The relation's own name; empty if nobody knows.
    pub name: String,
    /// What it is.
    pub kind: RelationKind,
    /// How long its rows last.
    pub persistence: Persistence,
    /// The table that a TOAST table or an index belongs to.
    pub owner: Option<Oid>,
}

/// What a relation is (Postgres: `pg_class.relkind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RelationKind {
    /// `r`, a table or a partition.
    Table,
    /// `p`, a partitioned table, which has no rows of its own.
    PartitionedTable,
    /// `i` and `I`.
    Index,
    /// `S`.
    Sequence,
    /// `t`, the table for the large values of another.
    Toast,
    /// `v`.
    View,
    /// `m`.
    MaterializedView,
    /// `c`.
    CompositeType,
    /// `f`.
    ForeignTable,
}

/// How long rows last (Postgres: `pg_class.relpersistence`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Persistence {
    /// `p`.
    Permanent,
    /// `u`: not in the WAL, gone after a crash.
    Unlogged,
    /// `t`: not in the WAL, gone with the session.
    Temporary,
}
