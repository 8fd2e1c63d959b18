//! Rows that come and go in each table over some minutes: a wipe in many small transactions is one.

use std::collections::VecDeque;
use std::time::Duration;

use foldhash::{HashMap, HashMapExt as _};

use super::live_rows::TableKey;
use crate::pg::{Lsn, PgTime, Xid};

/// A window has so many steps: what is older than the window by less than one step may still count.
const STEPS: i64 = 20;

/// Tables looked at at once; each takes about 2 KiB at most. Of more, those that rested longest are left out.
const TABLES_MAX: usize = 8_192;

/// Transactions kept one by one for each table; of the others only their number is known.
const TOUCHES_MAX: usize = 16;

/// A transaction that deleted rows of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Its id.
    pub xid: Option<Xid>,
    /// Where it began.
    pub begin: Lsn,
    /// Where the record of its commit begins.
    pub lsn: Lsn,
    /// When it was committed.
    pub time: PgTime,
    /// Rows inserted into the table.
    pub inserted: u64,
    /// Rows deleted from it.
    pub deleted: u64,
}

/// What happened to a table within the window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WindowSum {
    /// Rows inserted.
    pub inserted: u64,
    /// Rows deleted.
    pub deleted: u64,
    /// Transactions that deleted some.
    pub transactions: u64,
    /// Where the first of them ended.
    pub first: Option<(Lsn, PgTime)>,
}

impl WindowSum {
    /// Rows that the table lost.
    pub const fn lost(&self) -> u64 {
        self.deleted.saturating_sub(self.inserted)
    }
}

/// The windows of all tables.
#[derive(Debug)]
pub struct Windows {
    /// Microseconds of a step.
    step: i64,
    tables: HashMap<TableKey, Window>,
    /// The latest time seen: commits are not in the order of their times.
    now: i64,
}

#[derive(Debug, Default)]
struct Window {
    steps: VecDeque<Step>,
    touches: VecDeque<Touch>,
}

#[derive(Debug, Default)]
struct Step {
    number: i64,
    inserted: u64,
    deleted: u64,
    transactions: u64,
    first: Option<(Lsn, PgTime)>,
}

impl Windows {
    /// Windows of this length, at least 20 microseconds.
    pub fn new(span: Duration) -> Self {
        let step = i64::try_from(span.as_micros()).unwrap_or(i64::MAX) / STEPS;
        Self { step: step.max(1), tables: HashMap::new(), now: i64::MIN }
    }

    /// Adds what a committed transaction did to a table.
    pub fn add(&mut self, table: TableKey, touch: Touch) {
        if touch.inserted == 0 && touch.deleted == 0 {
            return;
        }
        self.now = self.now.max(touch.time.micros());
        let number = self.now.div_euclid(self.step);
        if self.tables.len() >= TABLES_MAX && !self.tables.contains_key(&table) {
            self.make_room(number);
        }
        let window = self.tables.entry(table).or_default();
        window.forget_before(number - STEPS);
        if window.steps.back().is_none_or(|step| step.number != number) {
            window.steps.push_back(Step { number, ..Step::default() });
        }
        if let Some(step) = window.steps.back_mut() {
            step.inserted = step.inserted.saturating_add(touch.inserted);
            step.deleted = step.deleted.saturating_add(touch.deleted);
            if touch.deleted > 0 {
                step.transactions += 1;
                step.first.get_or_insert((touch.lsn, touch.time));
            }
        }
        if touch.deleted > 0 {
            if window.touches.len() >= TOUCHES_MAX {
                window.touches.pop_front();
            }
            window.touches.push_back(touch);
        }
    }

    /// What happened to a table within the window that ends with the latest transaction seen.
    pub fn sum(&self, table: TableKey) -> WindowSum {
        let oldest = self.now.div_euclid(self.step) - STEPS;
        let mut sum = WindowSum::default();
        let steps = self.tables.get(&table).into_iter().flat_map(|window| &window.steps);
        for step in steps.filter(|step| step.number > oldest) {
            sum.inserted = sum.inserted.saturating_add(step.inserted);
            sum.deleted = sum.deleted.saturating_add(step.deleted);
            sum.transactions += step.transactions;
            sum.first = sum.first.or(step.first);
        }
        sum
    }

    /// The last transactions that deleted rows of a table within the window, oldest first.
    pub fn touches(&self, table: TableKey) -> impl Iterator<Item = &Touch> {
        let oldest = self.now.saturating_sub(self.step.saturating_mul(STEPS));
        let touches = self.tables.get(&table).into_iter().flat_map(|window| &window.touches);
        touches.filter(move |touch| touch.time.micros() >= oldest)
    }

    /// Forgets a table: its rows are told of already, or it is gone.
    pub fn forget(&mut self, table: TableKey) {
        self.tables.remove(&table);
    }

    /// How many tables are looked at.
    pub fn len(&self) -> usize {
        self.tables.len()
    }

    /// True if none is.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Leaves out what rested a whole window; if nobody did, the quarter that rested longest.
    fn make_room(&mut self, number: i64) {
        self.tables.retain(|_, window| window.last().0 > number - STEPS);
        if self.tables.len() < TABLES_MAX {
            return;
        }
        let mut ages: Vec<_> = self.tables.iter().map(|(table, window)| (window.last(), *table)).collect();
        let (_, first_left, _) = ages.select_nth_unstable(TABLES_MAX / 4);
        let first_left = *first_left;
        self.tables.retain(|table, window| (window.last(), *table) >= first_left);
    }
}

impl Window {
    /// Its last step, and when rows were last deleted.
    fn last(&self) -> (i64, i64) {
        let touched = self.touches.back().map_or(i64::MIN, |touch| touch.time.micros());
        (self.steps.back().map_or(i64::MIN, |step| step.number), touched)
    }

    fn forget_before(&mut self, oldest: i64) {
        while self.steps.front().is_some_and(|step| step.number <= oldest) {
            self.steps.pop_front();
        }
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::pg::Oid;

    const TABLE: TableKey = (Oid(5), Oid(16_400));

    fn touch(second: i64, inserted: u64, deleted: u64) -> Touch {
        Touch {
            xid: Xid::new(7),
            begin: Lsn::new(second as u64),
            lsn: Lsn::new(second as u64 + 1),
            time: PgTime::from_micros(second * 1_000_000),
            inserted,
            deleted,
        }
    }

    fn windows() -> Windows {
        Windows::new(Duration::from_secs(300))
    }

    #[test]
    fn single_deletes_add_up_and_what_is_old_is_forgotten() {
        let mut windows = windows();
        for second in 0..600 {
            windows.add(TABLE, touch(second, 0, 1));
        }
        let sum = windows.sum(TABLE);
        assert!((285..=300).contains(&sum.deleted), "{sum:?}");
        assert_eq!(sum.transactions, sum.deleted);
        assert!(sum.first.unwrap().1 >= PgTime::from_micros(299_000_000), "{sum:?}");
        assert_eq!(windows.touches(TABLE).count(), TOUCHES_MAX);
        windows.add((Oid(5), Oid(1)), touch(10_000, 1, 0));
        assert_eq!(windows.sum(TABLE), WindowSum::default(), "time passes for all tables");
    }

    #[test]
    fn what_comes_back_is_not_lost() {
        let mut windows = windows();
        windows.add(TABLE, touch(1, 40, 0));
        windows.add(TABLE, touch(2, 0, 40));
        windows.add(TABLE, touch(3, 0, 5));
        assert_eq!(windows.sum(TABLE).lost(), 5);
    }

    #[test]
    fn commits_out_of_the_order_of_their_times_count() {
        let mut windows = windows();
        windows.add(TABLE, touch(100, 0, 3));
        windows.add(TABLE, touch(99, 0, 4));
        assert_eq!(windows.sum(TABLE).deleted, 7);
    }

    #[test]
    fn memory_is_bounded_and_those_that_rested_longest_are_left_out() {
        let mut windows = windows();
        for oid in 0..20_000_u32 {
            windows.add((Oid(5), Oid(oid)), touch(i64::from(oid / 100), 0, 1));
        }
        assert!(windows.len() <= TABLES_MAX);
        assert_eq!(windows.sum((Oid(5), Oid(19_999))).deleted, 1);
        assert_eq!(windows.sum((Oid(5), Oid(0))).deleted, 0);
    }
}
