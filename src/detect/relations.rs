//! Which relation a file is, as of a place in the WAL.

use crate::pg::Oid;

/// A relation by its name, as of a place in the WAL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
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
    /// The table that a TOAST table or an index belongs to; of a partition the partitioned table.
    pub owner: Option<Oid>,
}

impl RelationKind {
    /// Of `pg_class.relkind`; `None` for a letter that no server walguard knows has.
    pub const fn of_letter(letter: u8) -> Option<Self> {
        Some(match letter {
            b'r' => Self::Table,
            b'p' => Self::PartitionedTable,
            b'i' | b'I' => Self::Index,
            b'S' => Self::Sequence,
            b't' => Self::Toast,
            b'v' => Self::View,
            b'm' => Self::MaterializedView,
            b'c' => Self::CompositeType,
            b'f' => Self::ForeignTable,
            _ => return None,
        })
    }

    /// The letter in `pg_class.relkind`.
    pub const fn letter(self) -> u8 {
        match self {
            Self::Table => b'r',
            Self::PartitionedTable => b'p',
            Self::Index => b'i',
            Self::Sequence => b'S',
            Self::Toast => b't',
            Self::View => b'v',
            Self::MaterializedView => b'm',
            Self::CompositeType => b'c',
            Self::ForeignTable => b'f',
        }
    }
}

impl Persistence {
    /// Of `pg_class.relpersistence`; `None` for a letter that no server walguard knows has.
    pub const fn of_letter(letter: u8) -> Option<Self> {
        Some(match letter {
            b'p' => Self::Permanent,
            b'u' => Self::Unlogged,
            b't' => Self::Temporary,
            _ => return None,
        })
    }

    /// The letter in `pg_class.relpersistence`.
    pub const fn letter(self) -> u8 {
        match self {
            Self::Permanent => b'p',
            Self::Unlogged => b'u',
            Self::Temporary => b't',
        }
    }
}

impl Relation {
    /// `database.schema.table` for people, in quotes where a part is no plain identifier.
    pub fn full_name(&self) -> String {
        let parts = [&self.database_name, &self.schema, &self.name];
        let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).map(|part| quoted(part)).collect();
        match (parts.is_empty(), self.name.is_empty()) {
            (false, false) => parts.join("."),
            _ => format!("relation {} of database {}", self.oid, self.database),
        }
    }

    /// `"schema"."table"`, for a statement: always quoted, so that no name is read as anything else.
    pub fn sql_name(&self) -> String {
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        if self.schema.is_empty() {
            quoted(&self.name)
        } else {
            format!("{}.{}", quoted(&self.schema), quoted(&self.name))
        }
    }
}

/// An identifier, in quotes unless it is a plain one; for people.
fn quoted(name: &str) -> std::borrow::Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit();
    if !name.is_empty() && name.chars().all(is_plain) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        return name.into();
    }
    // Whoever may name a table must not be able to write what a terminal takes for a command, or for another line.
    let shown: String = name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    format!("\"{}\"", shown.replace('"', "\"\"")).into()
}

/// What a relation is (Postgres: `pg_class.relkind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Persistence {
    /// `p`.
    Permanent,
    /// `u`: not in the WAL, gone after a crash.
    Unlogged,
    /// `t`: not in the WAL, gone with the session.
    Temporary,
}
