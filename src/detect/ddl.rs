//! What a transaction did to definitions: tables emptied or dropped, triggers disabled ...

use std::sync::Arc;

use super::Relation;
use crate::pg::{Lsn, Oid};

/// Something that a transaction did to a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DdlEvent {
    /// What.
    pub kind: DdlKind,
    /// The record that shows it first.
    pub lsn: Lsn,
    /// The database; 0 for what belongs to none.
    pub database: Oid,
    /// The relation that it was done to; of a trigger, policy or column the table that it belongs to. `None` for what
    /// belongs to no relation, and for relations that nobody knows.
    pub relation: Option<Arc<Relation>>,
    /// What was dropped or changed, where it is not the relation itself: the name of a schema, database, column,
    /// trigger, rule, policy or event trigger. `None` if nobody knows.
    pub object: Option<String>,
}

/// What can be done to a definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DdlKind {
    /// `TRUNCATE` of a table.
    Truncate,
    /// A table, or a partition of one, is dropped.
    DropTable,
    /// A view, materialized view, sequence, index or foreign table is dropped.
    DropOther,
    /// A schema is dropped; its tables have events of their own.
    DropSchema,
    /// A database is dropped.
    DropDatabase,
    /// A column is dropped.
    DropColumn,
    /// A trigger is dropped.
    DropTrigger,
    /// A trigger is disabled.
    DisableTrigger,
    /// A rewrite rule of a table is dropped or disabled.
    DropRule,
    /// A row security policy is dropped.
    DropPolicy,
    /// An event trigger is dropped.
    DropEventTrigger,
    /// An event trigger is disabled.
    DisableEventTrigger,
    /// A table or other relation is made.
    Create,
    /// A relation's rows are written anew and none is lost: `VACUUM FULL`, `CLUSTER`, `ALTER TABLE` of a type or a
    /// tablespace, `REFRESH MATERIALIZED VIEW`, `REINDEX`.
    Rewrite,
    /// Another change of a relation: a rename, a column more ...
    Alter,
}

impl DdlKind {
    /// All of them, in the order of their numbers in an index, which never change.
    pub const ALL: [Self; 15] = [
        Self::Truncate,
        Self::DropTable,
        Self::DropOther,
        Self::DropSchema,
        Self::DropDatabase,
        Self::DropColumn,
        Self::DropTrigger,
        Self::DisableTrigger,
        Self::DropRule,
        Self::DropPolicy,
        Self::DropEventTrigger,
        Self::DisableEventTrigger,
        Self::Create,
        Self::Rewrite,
        Self::Alter,
    ];

    /// Whether something is lost by it.
    pub const fn is_destructive(self) -> bool {
        !matches!(self, Self::Create | Self::Rewrite | Self::Alter | Self::DropOther)
    }
}
