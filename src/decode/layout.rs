//! What differs between major versions.

use std::fmt;

use super::catalog::ClassColumns;
use crate::pg::ServerVersion;

/// A major version whose WAL walguard can read. Minor releases of one share a page format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum WalMajor {
    V14,
    V15,
    V16,
    V17,
    V18,
}

impl WalMajor {
    /// All of them, oldest first.
    pub const ALL: [Self; 5] = [Self::V14, Self::V15, Self::V16, Self::V17, Self::V18];

    /// The WAL format of a server, `None` if walguard does not know it.
    pub const fn of_server(version: ServerVersion) -> Option<Self> {
        match version.major() {
            14 => Some(Self::V14),
            15 => Some(Self::V15),
            16 => Some(Self::V16),
            17 => Some(Self::V17),
            18 => Some(Self::V18),
            _ => None,
        }
    }

    /// The major that writes this number at the beginning of every page.
    pub fn of_page_magic(magic: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|major| major.page_magic() == magic)
    }

    /// The major version: 15.
    pub const fn number(self) -> u32 {
        match self {
            Self::V14 => 14,
            Self::V15 => 15,
            Self::V16 => 16,
            Self::V17 => 17,
            Self::V18 => 18,
        }
    }

    /// What every WAL page begins with (Postgres: `XLOG_PAGE_MAGIC` in `access/xlog_internal.h`).
    pub const fn page_magic(self) -> u16 {
        match self {
            Self::V14 => 0xD10D,
            Self::V15 => 0xD110,
            Self::V16 => 0xD113,
            Self::V17 => 0xD116,
            Self::V18 => 0xD118,
        }
    }

    /// The bits of `bimg_info` that say that a page image is compressed: pglz, lz4, zstd.
    ///
    /// 15 moved them; what 14 calls "apply" is pglz since (Postgres: `BKPIMAGE_*` in `access/xlogrecord.h`).
    pub(super) const fn image_compression_bits(self) -> [u8; 3] {
        match self {
            Self::V14 => [0x02, 0, 0],
            _ => [0x04, 0x08, 0x10],
        }
    }

    /// The bit of `bimg_info` that says that the image is to be restored at replay, not only to be compared.
    pub(super) const fn image_apply_bit(self) -> u8 {
        match self {
            Self::V14 => 0x04,
            _ => 0x02,
        }
    }

    /// Bytes of one dropped-statistics item in a commit or abort record, 0 where there are none.
    ///
    /// (Postgres: `xl_xact_stats_item` in `access/xact.h`.)
    pub(super) const fn stats_item_bytes(self) -> usize {
        match self {
            Self::V14 => 0,
            Self::V15 | Self::V16 | Self::V17 => 12,
            Self::V18 => 16,
        }
    }

    /// A `PREPARE TRANSACTION` record counts the statistics dropped at commit and at abort.
    ///
    /// (Postgres: `xl_xact_prepare` in `access/xact.h`.)
    pub(super) const fn prepare_counts_stats(self) -> bool {
        self.at_least(Self::V15)
    }

    /// `wal_level` is in checkpoints and ends of recovery.
    ///
    /// (Postgres: `CheckPoint` in `catalog/pg_control.h`, `xl_end_of_recovery` in `access/xlog_internal.h`.)
    pub(super) const fn checkpoint_has_wal_level(self) -> bool {
        self.at_least(Self::V17)
    }

    /// What an operation of the Heap2 manager is (Postgres: `XLOG_HEAP2_*` in `access/heapam_xlog.h`).
    pub(super) const fn heap2_operation(self, operation: u8) -> Heap2Operation {
        match (operation, self.at_least(Self::V17)) {
            (0x00, _) => Heap2Operation::Rewrite,
            (0x10, false) => Heap2Operation::Prune,
            (0x20, false) => Heap2Operation::Vacuum,
            (0x30, false) => Heap2Operation::FreezePage,
            (0x10, true) => Heap2Operation::PruneOnAccess,
            (0x20, true) => Heap2Operation::PruneVacuumScan,
            (0x30, true) => Heap2Operation::PruneVacuumCleanup,
            (0x40, _) => Heap2Operation::Visible,
            (0x50, _) => Heap2Operation::MultiInsert,
            (0x60, _) => Heap2Operation::LockUpdated,
            (0x70, _) => Heap2Operation::NewCid,
            _ => Heap2Operation::Unknown,
        }
    }

    /// What an operation of the Database manager is (Postgres: `XLOG_DBASE_*` in `commands/dbcommands_xlog.h`).
    pub(super) const fn database_operation(self, operation: u8) -> DatabaseOperation {
        match (operation, self.at_least(Self::V15)) {
            (0x00, false) => DatabaseOperation::Create,
            (0x00, true) => DatabaseOperation::CreateFileCopy,
            (0x10, true) => DatabaseOperation::CreateWalLog,
            (0x10, false) | (0x20, true) => DatabaseOperation::Drop,
            _ => DatabaseOperation::Unknown,
        }
    }

    /// An update of a row in place carries the invalidations that it causes.
    ///
    /// (Postgres: `xl_heap_inplace` in `access/heapam_xlog.h`.)
    pub(super) const fn inplace_has_invalidations(self) -> bool {
        self.at_least(Self::V18)
    }

    /// Freezing is logged as plans for groups of rows; before, row by row.
    pub(super) const fn freezes_by_plan(self) -> bool {
        self.at_least(Self::V16)
    }

    /// Records that may end queries on a standby say whether they concern a catalog.
    pub(super) const fn conflicts_name_catalogs(self) -> bool {
        self.at_least(Self::V16)
    }

    /// The message that a publication changed exists (Postgres: `SHAREDINVALRELSYNC_ID` in `storage/sinval.h`).
    pub(super) const fn has_relsync_invalidation(self) -> bool {
        self.at_least(Self::V18)
    }

    /// Page numbers of `pg_xact`, `pg_multixact` and `pg_commit_ts` have 64 bits.
    pub(super) const fn has_wide_page_numbers(self) -> bool {
        self.at_least(Self::V17)
    }

    /// `pg_waldump` describes Heap and Btree records as `key: value, ...`.
    pub(super) const fn describes_with_keys(self) -> bool {
        self.at_least(Self::V16)
    }

    /// `pg_waldump` prints whether a record that may end queries on a standby concerns a catalog.
    pub(super) const fn describes_catalogs(self) -> bool {
        self.at_least(Self::V17)
    }

    /// `pg_waldump` prints the running subtransactions.
    pub(super) const fn describes_running_subxacts(self) -> bool {
        self.at_least(Self::V16)
    }

    /// What `pg_waldump` calls the xid before which a standby's queries may not look.
    pub(super) const fn conflict_name(self) -> &'static str {
        if self.at_least(Self::V16) { "snapshotConflictHorizon" } else { "latestRemovedXid" }
    }

    /// Where columns of `pg_class` lie, counted from a row's first column (Postgres: `catalog/pg_class.h`; 18 brought
    /// `relallfrozen`).
    pub(super) const fn class_columns(self) -> ClassColumns {
        let more = if self.at_least(Self::V18) { 4 } else { 0 };
        ClassColumns {
            toast: 108 + more,
            persistence: 114 + more,
            kind: 115 + more,
            is_partition: 127 + more,
            rewrite: 128 + more,
        }
    }

    /// Where `attnum` and `attisdropped` lie in a row of `pg_attribute` (Postgres: `catalog/pg_attribute.h`).
    pub(super) const fn attribute_columns(self) -> (usize, usize) {
        match self {
            Self::V14 | Self::V15 => (78, 101),
            Self::V16 | Self::V17 => (74, 95),
            Self::V18 => (74, 91),
        }
    }

    /// Where `dattablespace` lies in a row of `pg_database` (Postgres: `catalog/pg_database.h`; before 15 the locale's
    /// names, of fixed length, came before it).
    pub(super) const fn database_tablespace(self) -> usize {
        match self {
            Self::V14 => 224,
            _ => 92,
        }
    }

    /// The directory in a tablespace that is this major's (Postgres: `TABLESPACE_VERSION_DIRECTORY`).
    pub const fn tablespace_directory(self) -> &'static str {
        match self {
            Self::V14 => "PG_14_202107181",
            Self::V15 => "PG_15_202209061",
            Self::V16 => "PG_16_202307071",
            Self::V17 => "PG_17_202406281",
            Self::V18 => "PG_18_202506291",
        }
    }

    const fn at_least(self, other: Self) -> bool {
        self.number() >= other.number()
    }
}

/// Operations of the Heap2 manager, by meaning: the numbers moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heap2Operation {
    Rewrite,
    Prune,
    Vacuum,
    FreezePage,
    PruneOnAccess,
    PruneVacuumScan,
    PruneVacuumCleanup,
    Visible,
    MultiInsert,
    LockUpdated,
    NewCid,
    Unknown,
}

/// Operations of the Database manager, by meaning: the numbers moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DatabaseOperation {
    /// Before 15, all databases were made by copying files.
    Create,
    CreateFileCopy,
    CreateWalLog,
    Drop,
    Unknown,
}

impl fmt::Display for WalMajor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}
