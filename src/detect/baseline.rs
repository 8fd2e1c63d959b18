//! What is normal for a table: how much of it is deleted at which hour of the week, learned by watching.
//!
//! A purge that ran at about this time on three days before is no news; nor is one that runs all day long. What was once
//! reported is learned as well: the third time it is a habit. A table that is emptied is normal only if it was emptied
//! before as often. Of a table whose rows come and go all the time the size of a transaction counts, and not the hour; a
//! size that was reported is usual once it came three times, so that a queue that is drained to nothing is news no more.

use foldhash::HashMap;

use super::live_rows::TableKey;
use crate::pg::PgTime;

/// Tables that are learned; each takes up to 6 KiB, most far less. More are not learned, so that they are reported.
const TABLES_MAX: usize = 4_096;

const MICROS_OF_HOUR: i64 = 3_600_000_000;
const HOURS_OF_DAY: i64 = 24;
const HOURS_OF_WEEK: i64 = 7 * HOURS_OF_DAY;

/// So often something must have happened to be a habit.
const HABIT: u32 = 3;

/// Normal is up to so many times what was seen.
const TOLERANCE: u64 = 2;

/// In so many hours of the week rows are deleted all day long, so that the hour does not matter.
const CONTINUOUS_HOURS: usize = 12;

/// A single transaction is unusual if it deletes so many times more than any did before.
const TRANSACTION_TOLERANCE: u64 = 4;

/// What is normal for all tables.
#[derive(Debug, Default)]
pub struct Baseline {
    tables: HashMap<TableKey, Learned>,
}

/// What is normal for one table.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Learned {
    /// By hour of the week, those in which something was deleted, sorted.
    slots: Vec<Slot>,
    /// The hour that is being watched, counted from 2000.
    hour: i64,
    now: Slot,
    /// The most that one transaction deleted that was not reported.
    transaction_max: u64,
    /// The most that one deleted that was reported, the most first.
    #[serde(default)]
    told_max: [u64; HABIT as usize],
    transactions: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Slot {
    /// Hour of the week, UTC, 0 to 167.
    hour: u8,
    /// The most rows that went within a window; old weeks fade.
    level: u64,
    /// In how many weeks something was deleted in this hour.
    seen: u32,
    /// In how many of them the table was emptied.
    emptied: u32,
}

/// Rows that went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// When.
    pub time: PgTime,
    /// Within the window.
    pub in_window: u64,
    /// By the last transaction alone.
    pub in_transaction: u64,
    /// The table has none left.
    pub emptied: bool,
}

impl Baseline {
    /// Nothing is learned.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether so much was deleted at about this time often enough before.
    pub fn is_normal(&self, table: TableKey, deletion: &Deletion) -> bool {
        let Some(learned) = self.tables.get(&table) else { return false };
        let hour = hour_of(deletion.time);
        let day_hour = hour.rem_euclid(HOURS_OF_DAY);
        let is_continuous = learned.slots.len() >= CONTINUOUS_HOURS;
        // An hour that is being watched counts once it is over.
        let now = (learned.hour != hour && learned.now.seen > 0).then_some(&learned.now);
        let (mut seen, mut emptied) = (0_u32, 0_u32);
        for slot in learned.slots.iter().chain(now) {
            let apart = (i64::from(slot.hour).rem_euclid(HOURS_OF_DAY) - day_hour).rem_euclid(HOURS_OF_DAY);
            let is_near = matches!(apart, 0 | 1 | 23);
            if (is_near || is_continuous) && slot.level.saturating_mul(TOLERANCE) >= deletion.in_window {
                seen = seen.saturating_add(slot.seen);
                emptied = emptied.saturating_add(slot.emptied);
            }
        }
        if deletion.emptied { emptied >= HABIT } else { seen >= HABIT }
    }

    /// Whether no single transaction ever deleted nearly as much of this table: even a queue does not lose all at once.
    pub fn is_unusual_transaction(&self, table: TableKey, deletion: &Deletion) -> bool {
        let learned = self.tables.get(&table).filter(|_| !self.is_new(table));
        learned.is_none_or(|learned| {
            deletion.in_transaction > learned.usual_transaction().saturating_mul(TRANSACTION_TOLERANCE)
        })
    }

    /// Whether nothing is known yet of what single transactions delete of this table.
    pub fn is_new(&self, table: TableKey) -> bool {
        self.tables.get(&table).is_none_or(|learned| learned.transactions < u64::from(HABIT))
    }

    /// Takes a deletion, once it was judged. `is_told`: it was reported, and so is no measure by itself.
    pub fn learn(&mut self, table: TableKey, deletion: &Deletion, is_told: bool) {
        if self.tables.len() >= TABLES_MAX && !self.tables.contains_key(&table) {
            return;
        }
        let learned = self.tables.entry(table).or_default();
        let hour = hour_of(deletion.time);
        if hour > learned.hour || learned.now.seen == 0 {
            learned.fold();
            learned.hour = hour;
            let week_hour = u8::try_from(hour.rem_euclid(HOURS_OF_WEEK)).unwrap_or_default();
            learned.now = Slot { hour: week_hour, level: 0, seen: 1, emptied: 0 };
        }
        learned.now.level = learned.now.level.max(deletion.in_window);
        learned.now.emptied = learned.now.emptied.max(u32::from(deletion.emptied));
        learned.note_transaction(deletion.in_transaction, is_told);
        learned.transactions = learned.transactions.saturating_add(1);
    }

    /// Forgets a table that is gone.
    pub fn forget(&mut self, table: TableKey) {
        self.tables.remove(&table);
    }

    pub(super) fn export(&self) -> Vec<(TableKey, Learned)> {
        let mut all: Vec<_> = self.tables.iter().map(|(key, learned)| (*key, learned.clone())).collect();
        all.sort_by_key(|(key, _)| *key);
        all
    }

    pub(super) fn import(&mut self, tables: Vec<(TableKey, Learned)>) {
        for (key, mut learned) in tables.into_iter().take(TABLES_MAX) {
            // Whatever was written: no more slots than hours, and each hour once.
            learned.slots.retain(|slot| i64::from(slot.hour) < HOURS_OF_WEEK);
            learned.slots.sort_by_key(|slot| slot.hour);
            learned.slots.dedup_by_key(|slot| slot.hour);
            self.tables.insert(key, learned);
        }
    }
}

impl Learned {
    fn note_transaction(&mut self, rows: u64, is_told: bool) {
        if !is_told {
            self.transaction_max = self.transaction_max.max(rows);
        } else if let [.., least] = &mut self.told_max
            && rows > *least
        {
            *least = rows;
            self.told_max.sort_unstable_by(|a, b| b.cmp(a));
        }
    }

    /// The most rows that a transaction deletes usually.
    fn usual_transaction(&self) -> u64 {
        let [.., as_a_habit] = self.told_max;
        self.transaction_max.max(as_a_habit)
    }

    /// Adds the hour that is over to those of its kind.
    fn fold(&mut self) {
        let now = std::mem::take(&mut self.now);
        if now.seen == 0 {
            return;
        }
        match self.slots.iter_mut().find(|slot| slot.hour == now.hour) {
            Some(slot) => {
                // A level that was reached once and never again fades within some weeks.
                slot.level = (slot.level - slot.level / 4).max(now.level);
                slot.seen = slot.seen.saturating_add(1);
                slot.emptied = slot.emptied.saturating_add(now.emptied);
            }
            None => {
                self.slots.push(now);
                self.slots.sort_by_key(|slot| slot.hour);
            }
        }
    }
}

const fn hour_of(time: PgTime) -> i64 {
    time.micros().div_euclid(MICROS_OF_HOUR)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::pg::Oid;

    const TABLE: TableKey = (Oid(5), Oid(16_400));

    fn deletion(hour: i64, rows: u64) -> Deletion {
        let time = PgTime::from_micros(hour * MICROS_OF_HOUR + 1);
        Deletion { time, in_window: rows, in_transaction: rows, emptied: false }
    }

    fn emptied(hour: i64, rows: u64) -> Deletion {
        Deletion { emptied: true, ..deletion(hour, rows) }
    }

    #[test]
    fn a_transactions_size_that_was_reported_is_usual_once_it_came_three_times() {
        let mut baseline = Baseline::new();
        for rows in [50, 40, 9_000] {
            assert!(baseline.is_new(TABLE) && baseline.is_unusual_transaction(TABLE, &deletion(1, 40)));
            baseline.learn(TABLE, &deletion(1, rows), true);
        }
        assert!(!baseline.is_unusual_transaction(TABLE, &deletion(1, 50)));
        assert!(baseline.is_unusual_transaction(TABLE, &deletion(1, 9_000)), "once is no habit");
        baseline.learn(TABLE, &deletion(1, 9_000), true);
        baseline.learn(TABLE, &deletion(1, 9_000), true);
        assert!(!baseline.is_unusual_transaction(TABLE, &deletion(1, 9_000)));
    }

    #[test]
    fn a_nightly_purge_is_normal_after_three_nights_and_at_night_only() {
        let mut baseline = Baseline::new();
        for night in 0..3 {
            assert!(!baseline.is_normal(TABLE, &deletion(night * 24 + 3, 1_000)), "night {night}");
            baseline.learn(TABLE, &deletion(night * 24 + 3, 1_000), false);
        }
        let night = |hour: i64, rows| baseline.is_normal(TABLE, &deletion(3 * 24 + hour, rows));
        assert!(night(3, 1_000) && night(4, 1_900) && night(2, 10), "about as much at about that time");
        assert!(!night(3, 2_100) && !night(9, 1_000), "much more, or at another time");
        assert!(!baseline.is_normal(TABLE, &emptied(3 * 24 + 3, 1_000)), "it was never emptied");
    }

    #[test]
    fn a_weekly_purge_is_normal_after_three_weeks() {
        let mut baseline = Baseline::new();
        for week in 0..3 {
            assert!(!baseline.is_normal(TABLE, &emptied(week * 168 + 50, 70)));
            baseline.learn(TABLE, &emptied(week * 168 + 50, 70), false);
        }
        assert!(baseline.is_normal(TABLE, &emptied(3 * 168 + 50, 70)));
    }

    #[test]
    fn what_happens_all_day_long_is_normal_at_any_hour() {
        let mut baseline = Baseline::new();
        for hour in 0..13 {
            baseline.learn(TABLE, &deletion(hour, 500), false);
        }
        assert!(baseline.is_normal(TABLE, &deletion(20, 800)) && !baseline.is_normal(TABLE, &deletion(20, 1_100)));
    }

    #[test]
    fn one_wipe_makes_no_habit_however_many_transactions_it_takes() {
        let mut baseline = Baseline::new();
        for _ in 0..1_000 {
            baseline.learn(TABLE, &deletion(5, 10_000), false);
        }
        assert!(!baseline.is_normal(TABLE, &deletion(5, 100)) && !baseline.is_normal(TABLE, &deletion(29, 100)));
    }

    #[test]
    fn a_transaction_that_is_much_larger_than_any_before_is_unusual() {
        let mut baseline = Baseline::new();
        assert!(baseline.is_unusual_transaction(TABLE, &deletion(1, 1)), "nothing is known yet");
        for hour in 0..3 {
            baseline.learn(TABLE, &deletion(hour, 10), false);
        }
        assert!(!baseline.is_unusual_transaction(TABLE, &deletion(9, 40)));
        assert!(baseline.is_unusual_transaction(TABLE, &deletion(9, 41)));
    }

    #[test]
    fn what_was_learned_survives_a_restart() {
        let mut baseline = Baseline::new();
        for night in 0..3 {
            baseline.learn(TABLE, &deletion(night * 24 + 3, 1_000), false);
        }
        let json = serde_json::to_string(&baseline.export()).unwrap();
        let mut again = Baseline::new();
        again.import(serde_json::from_str(&json).unwrap());
        assert!(again.is_normal(TABLE, &deletion(3 * 24 + 3, 1_000)));
        assert_eq!(again.export(), baseline.export());
    }

    #[test]
    fn memory_is_bounded() {
        let mut baseline = Baseline::new();
        for oid in 0..5_000 {
            baseline.learn((Oid(5), Oid(oid)), &deletion(1, 1), false);
        }
        for hour in 0..2_000 {
            baseline.learn(TABLE, &deletion(hour, 1), false);
        }
        let export = baseline.export();
        assert!(export.len() == TABLES_MAX && export.iter().all(|(_, learned)| learned.slots.len() <= 168));
    }
}
