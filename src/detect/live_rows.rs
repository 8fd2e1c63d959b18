//! How many rows each table has: begun from a count or an estimate, then kept by the WAL.
//!
//! Only commits count. A number is as sure as what it began from: exact from an exact count, from the table's own creation
//! and from a `TRUNCATE`; an estimate from the server's statistics, and after anything that could not be counted.

use foldhash::{HashMap, HashSet};

use super::incident::Rows;
use super::{Relation, Transaction};
use crate::pg::{Lsn, Oid};

/// A table: its database, and its OID, which stays when its file changes.
pub type TableKey = (Oid, Oid);

/// The key of a table.
pub const fn key_of(relation: &Relation) -> TableKey {
    (relation.database, relation.oid)
}

/// Tables whose rows are known; each takes about 100 bytes. Of more tables nothing is known.
const TABLES_MAX: usize = 65_536;

/// A commit is seen by others a moment after its record is written, and so by whoever counts: WAL of that moment.
const LATE_BYTES: u64 = 1 << 20;

/// A table whose rows come and go at this rate has so many deleted as it ever had at once, twice over, before it is taken
/// for one of those, and at least so many.
const CHURN_ROWS_MIN: u64 = 20;

/// How many rows each table has.
#[derive(Debug, Default)]
pub struct LiveRows {
    tables: HashMap<TableKey, Live>,
    /// Databases whose tables were counted since we began.
    seeded: HashSet<Oid>,
}

/// One table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Live {
    /// `None`: nobody knows, only its coming and going was seen.
    count: Option<Rows>,
    /// Commits before this place are in the count already.
    as_of: Lsn,
    /// Those from there up to here may be.
    #[serde(default)]
    unsure_to: Lsn,
    /// Where the last commit that touched it is.
    #[serde(default)]
    touched: Option<Lsn>,
    /// The most that it ever had, as far as that was seen.
    peak: u64,
    inserted: u64,
    deleted: u64,
}

impl Default for Live {
    fn default() -> Self {
        Self { count: None, as_of: Lsn::ZERO, unsure_to: Lsn::ZERO, touched: None, peak: 0, inserted: 0, deleted: 0 }
    }
}

/// What a transaction does to the number of rows of one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowStep {
    /// Rows that come.
    pub inserted: u64,
    /// Rows that go, to another partition too.
    pub deleted: u64,
    /// The table is made by the transaction.
    pub created: bool,
    /// The table is emptied besides, and has so many rows then.
    pub truncated_to: Option<Rows>,
    /// There is no such table any more.
    pub dropped: bool,
    /// All of the above was seen.
    pub is_complete: bool,
}

impl LiveRows {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how many rows a table had once all commits before `as_of` were done, and no other.
    pub fn seed(&mut self, table: TableKey, rows: Rows, as_of: Lsn) {
        self.seed_between(table, rows, as_of, as_of);
    }

    /// Says how many rows a table had when it was counted while the WAL went on from `from` to `to`: the number stays exact
    /// if nobody touched the table just then. An estimate, or a number that is not sure, does not replace what is known exactly.
    pub fn seed_between(&mut self, table: TableKey, rows: Rows, from: Lsn, to: Lsn) {
        let Some(live) = self.entry(table) else { return };
        let late = Lsn::new(from.bytes().saturating_sub(LATE_BYTES));
        let was_touched = to > from && live.touched.is_some_and(|touched| touched >= late);
        let exact = rows.exact && !was_touched;
        if !exact && live.count.is_some_and(|count| count.exact) {
            return;
        }
        if live.count.is_some() && from < live.as_of {
            return; // what the WAL has told since is not in it
        }
        live.count = Some(Rows { exact, ..rows });
        live.as_of = from;
        live.unsure_to = to;
        live.peak = live.peak.max(rows.count);
    }

    /// Whether a database's tables were counted since we began.
    pub fn is_seeded(&self, database: Oid) -> bool {
        self.seeded.contains(&database)
    }

    /// A database's tables are counted.
    pub fn note_seeded(&mut self, database: Oid) {
        self.seeded.insert(database);
    }

    /// WAL may have been missed: what was exact is an estimate now.
    pub fn doubt_all(&mut self) {
        for live in self.tables.values_mut() {
            if let Some(count) = &mut live.count {
                count.exact = false;
            }
        }
    }

    /// Says how many rows were inserted and deleted in a table in all its life (Postgres: `n_tup_ins` and `n_tup_del` of
    /// `pg_stat_user_tables`): a queue is known by it at once.
    pub fn seed_history(&mut self, table: TableKey, inserted: u64, deleted: u64) {
        let Some(live) = self.entry(table) else { return };
        live.inserted = live.inserted.max(inserted);
        live.deleted = live.deleted.max(deleted);
    }

    /// Whether what is known of a table's rows was counted behind `lsn`.
    pub fn is_counted_behind(&self, table: TableKey, lsn: Lsn) -> bool {
        self.tables.get(&table).is_some_and(|live| live.count.is_some() && lsn < live.as_of)
    }

    /// Rows just before a transaction that ends at `lsn`.
    pub fn before(&self, table: TableKey, lsn: Lsn, step: &RowStep) -> Option<Rows> {
        if step.created {
            return Some(Rows { count: 0, exact: true });
        }
        let live = self.tables.get(&table)?;
        let count = live.count?;
        if lsn >= live.as_of {
            return Some(count);
        }
        // The count was taken afterwards, and others may have come in between.
        let count = count.count.saturating_add(step.deleted).saturating_sub(step.inserted);
        Some(Rows { count, exact: false })
    }

    /// Rows after a transaction that finds `before`.
    pub fn after(before: Option<Rows>, step: &RowStep) -> Option<Rows> {
        if step.dropped {
            return Some(Rows { count: 0, exact: true });
        }
        if step.truncated_to.is_some() {
            return step.truncated_to;
        }
        let before = before?;
        let sum = before.count.saturating_add(step.inserted);
        // More gone than there were: the number was wrong.
        let exact = before.exact && step.is_complete && sum >= step.deleted;
        Some(Rows { count: sum.saturating_sub(step.deleted), exact })
    }

    /// Takes what a transaction committed at `lsn`.
    pub fn apply(&mut self, table: TableKey, lsn: Lsn, step: &RowStep) {
        if step.dropped {
            self.tables.remove(&table);
            return;
        }
        let before = self.before(table, lsn, step);
        let Some(live) = self.entry(table) else { return };
        live.inserted = live.inserted.saturating_add(step.inserted);
        live.deleted = live.deleted.saturating_add(step.deleted);
        if lsn < live.as_of {
            return; // it is in the count
        }
        live.count = Self::after(before, step);
        if lsn < live.unsure_to && step.truncated_to.is_none() {
            // It may have been counted already.
            live.count = live.count.map(|count| Rows { exact: false, ..count });
        }
        live.as_of = Lsn::new(lsn.bytes().saturating_add(1));
        live.touched = Some(lsn);
        live.peak = live.peak.max(live.count.map_or(0, |rows| rows.count));
    }

    /// The table's rows come and go all the time, as in a queue or a table of sessions: more were deleted than it ever had
    /// at once, twice over, and about as many came.
    pub fn is_churning(&self, table: TableKey) -> bool {
        self.tables.get(&table).is_some_and(|live| {
            live.deleted >= CHURN_ROWS_MIN.max(live.peak.saturating_mul(2))
                && live.inserted.saturating_mul(2) >= live.deleted
        })
    }

    /// Rows now.
    pub fn get(&self, table: TableKey) -> Option<Rows> {
        self.tables.get(&table)?.count
    }

    /// Whether anything is known of a table.
    pub fn knows(&self, table: TableKey) -> bool {
        self.tables.get(&table).is_some_and(|live| live.count.is_some())
    }

    /// Tables of a database that have rows.
    pub fn tables_with_rows(&self, database: Oid) -> usize {
        let has_rows = |live: &Live| live.count.is_some_and(|rows| rows.count > 0);
        self.tables.iter().filter(|(table, live)| table.0 == database && has_rows(live)).count()
    }

    /// Forgets the tables of a database that was dropped.
    pub fn forget_database(&mut self, database: Oid) {
        self.tables.retain(|table, _| table.0 != database);
    }

    /// How many tables are known.
    pub fn len(&self) -> usize {
        self.tables.len()
    }

    /// True if none is.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    fn entry(&mut self, table: TableKey) -> Option<&mut Live> {
        if self.tables.len() >= TABLES_MAX && !self.tables.contains_key(&table) {
            return None;
        }
        Some(self.tables.entry(table).or_default())
    }

    pub(super) fn export(&self) -> Vec<(TableKey, Live)> {
        let mut all: Vec<_> = self.tables.iter().map(|(key, live)| (*key, *live)).collect();
        all.sort_by_key(|(key, _)| *key);
        all
    }

    pub(super) fn import(&mut self, tables: Vec<(TableKey, Live)>) {
        for (key, live) in tables {
            if let Some(entry) = self.entry(key) {
                *entry = live;
            }
        }
    }
}

/// True if the transaction's counts may be too small.
pub(super) fn is_partial(transaction: &Transaction) -> bool {
    !transaction.is_complete || transaction.more != crate::decode::change::RowCounts::default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const TABLE: TableKey = (Oid(5), Oid(16_400));

    fn rows(count: u64, exact: bool) -> Rows {
        Rows { count, exact }
    }

    fn step(inserted: u64, deleted: u64) -> RowStep {
        RowStep { inserted, deleted, is_complete: true, ..RowStep::default() }
    }

    #[test]
    fn the_wal_keeps_a_count_exact_and_an_estimate_an_estimate() {
        for exact in [true, false] {
            let mut live = LiveRows::new();
            live.seed(TABLE, rows(100, exact), Lsn::new(10));
            live.apply(TABLE, Lsn::new(11), &step(5, 30));
            assert_eq!(live.get(TABLE), Some(rows(75, exact)));
        }
    }

    #[test]
    fn what_the_count_held_already_is_not_counted_twice() {
        let mut live = LiveRows::new();
        live.seed(TABLE, rows(88, true), Lsn::new(10));
        let before = live.before(TABLE, Lsn::new(9), &step(0, 12));
        assert_eq!(before, Some(rows(100, false)), "the table had its 12 rows then");
        live.apply(TABLE, Lsn::new(9), &step(0, 12));
        assert_eq!(live.get(TABLE), Some(rows(88, true)));
    }

    #[test]
    fn a_count_that_cannot_be_is_an_estimate_from_then_on() {
        let mut live = LiveRows::new();
        live.seed(TABLE, rows(3, true), Lsn::new(10));
        live.apply(TABLE, Lsn::new(11), &step(0, 5));
        assert_eq!(live.get(TABLE), Some(rows(0, false)));
        live.apply(TABLE, Lsn::new(12), &RowStep { truncated_to: Some(rows(2, true)), ..step(2, 0) });
        assert_eq!(live.get(TABLE), Some(rows(2, true)), "a TRUNCATE makes it sure again");
        live.apply(TABLE, Lsn::new(13), &RowStep { is_complete: false, ..step(2, 0) });
        assert_eq!(live.get(TABLE), Some(rows(4, false)));
    }

    #[test]
    fn a_new_table_is_counted_from_nothing_and_a_dropped_one_forgotten() {
        let mut live = LiveRows::new();
        live.apply(TABLE, Lsn::new(11), &RowStep { created: true, ..step(7, 1) });
        assert_eq!(live.get(TABLE), Some(rows(6, true)));
        live.apply(TABLE, Lsn::new(12), &RowStep { dropped: true, ..step(0, 0) });
        assert!(live.is_empty());
    }

    #[test]
    fn an_estimate_does_not_replace_a_count() {
        let mut live = LiveRows::new();
        live.seed(TABLE, rows(100, true), Lsn::new(10));
        live.seed(TABLE, rows(90, false), Lsn::new(20));
        assert_eq!(live.get(TABLE), Some(rows(100, true)));
        assert_eq!(live.before((Oid(5), Oid(1)), Lsn::new(30), &step(0, 1)), None);
    }

    #[test]
    fn a_queue_is_known_by_its_coming_and_going_and_a_table_that_shrinks_is_none() {
        let mut live = LiveRows::new();
        live.seed(TABLE, rows(10, true), Lsn::new(1));
        let shrinking = (Oid(5), Oid(16_500));
        live.seed(shrinking, rows(1_000, true), Lsn::new(1));
        for lsn in 2..50 {
            live.apply(TABLE, Lsn::new(lsn), &step(1, 1));
            live.apply(shrinking, Lsn::new(lsn), &step(0, 20));
        }
        assert!(live.is_churning(TABLE) && !live.is_churning(shrinking));
        live.seed_history(shrinking, 50_000, 49_000);
        assert!(live.is_churning(shrinking), "its statistics say what we did not see");
    }

    #[test]
    fn a_table_that_was_touched_while_it_was_counted_is_not_known_exactly() {
        let mut live = LiveRows::new();
        live.seed_between(TABLE, rows(100, true), Lsn::new(10), Lsn::new(20));
        live.apply(TABLE, Lsn::new(15), &step(0, 1));
        assert_eq!(live.get(TABLE), Some(rows(99, false)));
        live.seed_between(TABLE, rows(99, true), Lsn::new(10 + LATE_BYTES), Lsn::new(20 + LATE_BYTES));
        assert_eq!(live.get(TABLE), Some(rows(99, false)), "its commit may not have been seen yet");
        live.seed_between(TABLE, rows(99, true), Lsn::new(16 + LATE_BYTES), Lsn::new(20 + LATE_BYTES));
        assert_eq!(live.get(TABLE), Some(rows(99, true)));
        // What the WAL makes sure stays so, whatever was counted while it went on.
        let lsn = 30 + LATE_BYTES;
        live.apply(TABLE, Lsn::new(lsn), &step(0, 9));
        live.seed_between(TABLE, rows(91, true), Lsn::new(lsn + 1), Lsn::new(lsn + 9));
        assert_eq!(live.get(TABLE), Some(rows(90, true)));
    }

    #[test]
    fn memory_is_bounded() {
        let mut live = LiveRows::new();
        for oid in 0..70_000 {
            live.seed((Oid(5), Oid(oid)), rows(1, true), Lsn::new(1));
        }
        assert_eq!(live.len(), TABLES_MAX);
    }
}
