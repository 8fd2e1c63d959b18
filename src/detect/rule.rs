//! The rules: what each is called.

use std::fmt;
use std::str::FromStr;

/// A rule by its name, which never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleName {
    /// Many rows of a table were deleted, in one transaction or within some minutes.
    RowsDeleted,
    /// A table has no rows left.
    TableEmptied,
    /// Several tables have no rows left.
    TablesEmptied,
    /// A table was truncated.
    Truncate,
    /// A table was dropped.
    DropTable,
    /// A schema was dropped.
    DropSchema,
    /// A database was dropped.
    DropDatabase,
    /// A column was dropped.
    DropColumn,
    /// Another table took a table's name, and has fewer rows.
    TableReplaced,
    /// Many rows of a table were updated.
    MassUpdate,
    /// A trigger was dropped or disabled.
    TriggerRemoved,
    /// An event trigger was dropped or disabled.
    EventTriggerRemoved,
    /// A rewrite rule of a table was dropped or disabled.
    RuleRemoved,
    /// A row security policy was dropped.
    PolicyRemoved,
    /// The guard's own objects were dropped or disabled.
    GuardRemoved,
    /// The history of migrations was deleted from, truncated or dropped.
    MigrationHistory,
    /// A base backup is much larger or smaller than the one before.
    BackupSize,
    /// The archive stays behind the server.
    ArchiveLag,
    /// WAL is missing for good.
    Gap,
    /// The replication slot is in danger.
    Slot,
    /// WAL cannot be understood: it is archived, but nobody watches it.
    UnreadableWal,
}

impl RuleName {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::RowsDeleted,
        Self::TableEmptied,
        Self::TablesEmptied,
        Self::Truncate,
        Self::DropTable,
        Self::DropSchema,
        Self::DropDatabase,
        Self::DropColumn,
        Self::TableReplaced,
        Self::MassUpdate,
        Self::TriggerRemoved,
        Self::EventTriggerRemoved,
        Self::RuleRemoved,
        Self::PolicyRemoved,
        Self::GuardRemoved,
        Self::MigrationHistory,
        Self::BackupSize,
        Self::ArchiveLag,
        Self::Gap,
        Self::Slot,
        Self::UnreadableWal,
    ];

    /// The name, `rows-deleted`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RowsDeleted => "rows-deleted",
            Self::TableEmptied => "table-emptied",
            Self::TablesEmptied => "tables-emptied",
            Self::Truncate => "truncate",
            Self::DropTable => "drop-table",
            Self::DropSchema => "drop-schema",
            Self::DropDatabase => "drop-database",
            Self::DropColumn => "drop-column",
            Self::TableReplaced => "table-replaced",
            Self::MassUpdate => "mass-update",
            Self::TriggerRemoved => "trigger-removed",
            Self::EventTriggerRemoved => "event-trigger-removed",
            Self::RuleRemoved => "rule-removed",
            Self::PolicyRemoved => "policy-removed",
            Self::GuardRemoved => "guard-removed",
            Self::MigrationHistory => "migration-history",
            Self::BackupSize => "backup-size",
            Self::ArchiveLag => "archive-lag",
            Self::Gap => "gap",
            Self::Slot => "slot",
            Self::UnreadableWal => "unreadable-wal",
        }
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// There is no such rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no rule `{0}`; the rules are {all}", all = RuleName::ALL.map(RuleName::as_str).join(", "))]
pub struct UnknownRule(pub String);

impl FromStr for RuleName {
    type Err = UnknownRule;

    fn from_str(text: &str) -> Result<Self, UnknownRule> {
        Self::ALL.into_iter().find(|rule| rule.as_str() == text).ok_or_else(|| UnknownRule(text.to_owned()))
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_rule_has_one_name_everywhere() {
        for rule in RuleName::ALL {
            assert_eq!(serde_json::to_string(&rule).unwrap(), format!("\"{rule}\""));
            assert_eq!(rule.as_str().parse::<RuleName>().unwrap(), rule);
        }
        assert!("truncated".parse::<RuleName>().unwrap_err().to_string().contains("truncate"));
    }
}
