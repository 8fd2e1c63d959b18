//! Indexes and transactions in; out comes what happened when, bucket by bucket and table by table. Pure.
//!
//! A bucket is a stretch of time: a minute, ten seconds, a day of some zone. Commits belong to the bucket of their time by
//! the server's clock, wherever their records lie.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Span;
use jiff::tz::TimeZone;

use super::SegmentIndex;
use super::format::{CommittedDdl, LargeTransaction};
use super::lookup::Activity;
use crate::decode::change::RowCounts;
use crate::detect::{DdlKind, Relation, RelationKind, Transaction};
use crate::pg::{Lsn, Oid, PgTime, RelFile, Xid};

/// Buckets of one chronicle: a day by the second. A chart of more is read by nobody.
pub const BUCKETS_MAX: usize = 86_400;

/// Counts by bucket and table: 1,000 tables in each of a thousand buckets, about 100 MiB.
const CELLS_MAX: usize = 1_000_000;

/// Events of one chronicle.
const EVENTS_MAX: usize = 100_000;

/// Transactions that are kept as the largest.
const LARGEST_MAX: usize = 1_000;

/// Databases whose names are kept.
const DATABASES_MAX: usize = 10_000;

/// Files whose names are kept.
const NAMES_MAX: usize = 262_144;

/// Tables that the filter left out are remembered by name, so that a slip of the pen can be told: so many.
const OTHERS_MAX: usize = 1_000;

/// Indexes count by the minute.
pub const MINUTE: Duration = Duration::from_secs(60);

const DAY: u64 = 86_400;

/// How long a bucket is: whole seconds, or whole days of a zone, which may have 23 or 25 hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    seconds: u64,
}

impl Width {
    /// What a chart may choose by itself.
    const LADDER: [u64; 16] = [
        60,
        2 * 60,
        5 * 60,
        10 * 60,
        15 * 60,
        30 * 60,
        3_600,
        2 * 3_600,
        3 * 3_600,
        6 * 3_600,
        12 * 3_600,
        DAY,
        2 * DAY,
        7 * DAY,
        14 * DAY,
        30 * DAY,
    ];

    /// One minute: the finest that indexes know.
    pub const MINUTE: Self = Self { seconds: 60 };

    /// Ten seconds, for who looks on.
    pub const TEN_SECONDS: Self = Self { seconds: 10 };

    /// A bucket of this length; `None` unless it is whole seconds, and whole days if it is a day or more.
    pub const fn new(length: Duration) -> Option<Self> {
        let seconds = length.as_secs();
        if seconds == 0 || length.subsec_nanos() != 0 || (seconds >= DAY && !seconds.is_multiple_of(DAY)) {
            return None;
        }
        Some(Self { seconds })
    }

    /// The finest of a minute or more by which `[from, to)` has at most `buckets_max` buckets, or a little more if it is
    /// years.
    pub fn fitting(from: PgTime, to: PgTime, buckets_max: usize) -> Self {
        let length = u64::try_from(to.since(from).as_secs()).unwrap_or_default();
        // One more: neither end need lie at a bucket's beginning.
        let fits = |seconds: &u64| length.div_ceil(*seconds) < buckets_max as u64;
        Self { seconds: Self::LADDER.into_iter().find(fits).unwrap_or(30 * DAY) }
    }

    /// True if indexes, which count by the minute, are too coarse for it.
    pub const fn is_finer_than_indexes(self) -> bool {
        !self.seconds.is_multiple_of(60)
    }

    /// Its length; days have 24 hours here.
    pub const fn length(self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// True if it is days.
    pub const fn is_days(self) -> bool {
        self.seconds >= DAY
    }
}

impl std::fmt::Display for Width {
    /// `minute`, `10 seconds`, `6 hours`, `day`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (unit, name) = match self.seconds {
            seconds if seconds.is_multiple_of(DAY) => (DAY, "day"),
            seconds if seconds.is_multiple_of(3_600) => (3_600, "hour"),
            seconds if seconds.is_multiple_of(60) => (60, "minute"),
            _ => (1, "second"),
        };
        match self.seconds / unit {
            1 => f.write_str(name),
            count => write!(f, "{count} {name}s"),
        }
    }
}

/// Buckets of one width, side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// Where each begins, and where the last ends.
    edges: Vec<PgTime>,
    width: Width,
}

/// A time has more buckets than a chronicle may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("that makes more than {BUCKETS_MAX} buckets")]
pub struct TooManyBuckets;

impl Buckets {
    /// The buckets that `[from, to)` touches. They begin where a clock in `zone` shows a whole number of them since
    /// midnight, by the zone's offset at `from`; days begin with the zone's days.
    ///
    /// # Errors
    /// If they are too many, or lie outside of the calendar.
    pub fn new(from: PgTime, to: PgTime, width: Width, zone: &TimeZone) -> Result<Self, TooManyBuckets> {
        let mut edges = Vec::new();
        if width.is_days() {
            let days = i64::try_from(width.seconds / DAY).map_err(|_| TooManyBuckets)?;
            let midnight = from.timestamp().to_zoned(zone.clone()).start_of_day().map_err(|_| TooManyBuckets)?;
            for count in 0.. {
                let days =
                    days.checked_mul(count).and_then(|days| Span::new().try_days(days).ok()).ok_or(TooManyBuckets)?;
                let next = midnight.checked_add(days).map_err(|_| TooManyBuckets)?;
                edges.push(PgTime::from(next.timestamp()));
                if edges.len() > BUCKETS_MAX + 1 {
                    return Err(TooManyBuckets);
                }
                if PgTime::from(next.timestamp()) >= to && count > 0 {
                    break;
                }
            }
        } else {
            let step = i64::try_from(width.length().as_micros()).map_err(|_| TooManyBuckets)?;
            let offset = i64::from(zone.to_offset(from.timestamp()).seconds()) * 1_000_000;
            let local = from.micros().checked_add(offset).ok_or(TooManyBuckets)?;
            let edge = local.div_euclid(step).checked_mul(step).and_then(|edge| edge.checked_sub(offset));
            let mut edge = edge.ok_or(TooManyBuckets)?;
            loop {
                edges.push(PgTime::from_micros(edge));
                if edge >= to.micros() && edges.len() > 1 {
                    break;
                }
                if edges.len() > BUCKETS_MAX {
                    return Err(TooManyBuckets);
                }
                edge = edge.checked_add(step).ok_or(TooManyBuckets)?;
            }
        }
        Ok(Self { edges, width })
    }

    /// How long each is.
    pub const fn width(&self) -> Width {
        self.width
    }

    /// Where the first begins.
    pub fn from(&self) -> PgTime {
        self.edges.first().copied().unwrap_or(PgTime::from_micros(0))
    }

    /// Where the last ends.
    pub fn to(&self) -> PgTime {
        self.edges.last().copied().unwrap_or(PgTime::from_micros(0))
    }

    /// Begin and end of each.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (PgTime, PgTime)> + '_ {
        self.edges.windows(2).map(|pair| (pair[0], pair[1]))
    }

    /// The bucket that a moment lies in.
    pub fn find(&self, time: PgTime) -> Option<usize> {
        (time < self.to()).then(|| self.edges.partition_point(|edge| *edge <= time).checked_sub(1)).flatten()
    }

    /// The most minutes, counted in whole ones of them from 2000-01-01 UTC, of which each lies in one bucket: 1 to a day.
    pub fn minutes_each(&self) -> i64 {
        let greatest = |a: i64, b: i64| {
            let (mut a, mut b) = (a, b);
            while b != 0 {
                (a, b) = (b, a % b);
            }
            a.abs()
        };
        let minutes = self.edges.iter().map(|edge| edge.micros().div_euclid(60_000_000));
        minutes.fold(1_440, greatest).max(1)
    }

    /// One more bucket behind the last.
    fn extend(&mut self, zone: &TimeZone) {
        let to = self.to();
        let next = Self::new(to, PgTime::from_micros(to.micros().saturating_add(1)), self.width, zone);
        self.edges.extend(next.ok().map(|next| next.to()).filter(|next| *next > to));
    }
}

/// What a chronicle tells of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Patterns of tables; none means all.
    pub tables: Vec<Pattern>,
    /// Patterns of databases' names, or their OIDs; none means all.
    pub databases: Vec<Pattern>,
}

/// A name with `*` for any text and `?` for any character. Of a table it is `table`, `schema.table` or
/// `database.schema.table`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// A pattern as people write it.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// True if `name` is one of those that it stands for.
    pub fn fits(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n) = (0, 0);
        // The last star and how much of the name it takes: if what follows does not fit, it takes one more.
        let mut star = None;
        while n < name.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(c) if *c == '?' || name.get(n) == Some(c) => (p, n) = (p + 1, n + 1),
                _ => {
                    let Some((at, taken)) = star else { return false };
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
            }
        }
        pattern.iter().skip(p).all(|c| *c == '*')
    }

    /// True if it stands for a table of a database that is known.
    pub fn fits_table(&self, schema: &str, table: &str) -> bool {
        match self.0.contains('.') {
            true => self.fits(&format!("{schema}.{table}")),
            false => self.fits(table),
        }
    }

    fn fits_relation(&self, relation: &Relation) -> bool {
        let Relation { database_name, schema, name, .. } = relation;
        match self.0.matches('.').count() {
            0 => self.fits(name),
            1 => self.fits(&format!("{schema}.{name}")),
            _ => self.fits(&format!("{database_name}.{schema}.{name}")),
        }
    }
}

impl Filter {
    /// True if it leaves nothing out.
    pub fn is_all(&self) -> bool {
        self.tables.is_empty() && self.databases.is_empty()
    }

    fn database(&self, oid: Oid, name: &str) -> bool {
        let fits = |pattern: &Pattern| pattern.fits(name) || pattern.0.parse() == Ok(oid.0);
        self.databases.is_empty() || self.databases.iter().any(fits)
    }

    /// Whether it tells of a table. `name` is `database.schema.table`, as incidents have it.
    pub fn is_about(&self, name: &str) -> bool {
        let Some((database, in_database)) = name.split_once('.') else { return self.is_all() };
        let table = in_database.rsplit_once('.').map_or(in_database, |(_, table)| table);
        let is_meant = |pattern: &Pattern| match pattern.0.matches('.').count() {
            0 => pattern.fits(table),
            1 => pattern.fits(in_database),
            _ => pattern.fits(name),
        };
        (self.databases.is_empty() || self.databases.iter().any(|pattern| pattern.fits(database)))
            && (self.tables.is_empty() || self.tables.iter().any(is_meant))
    }

    fn table(&self, file: RelFile, relation: Option<&Relation>) -> bool {
        let of_table = |pattern: &Pattern| match relation {
            Some(relation) => pattern.fits_relation(relation),
            None => pattern.fits(&file.number.to_string()) || pattern.fits(&path(file)),
        };
        let name = relation.map_or("", |relation| &relation.database_name);
        self.database(file.database, name) && (self.tables.is_empty() || self.tables.iter().any(of_table))
    }

    /// `database`: its name, where the event is about no relation that tells it.
    fn event(&self, ddl: &CommittedDdl, database: &str) -> bool {
        let relation = ddl.event.relation.as_deref();
        let name = relation.map_or(database, |relation| &relation.database_name);
        // What belongs to no table is told of unless tables are named.
        self.database(ddl.event.database, name)
            && (self.tables.is_empty()
                || relation.is_some_and(|relation| self.tables.iter().any(|pattern| pattern.fits_relation(relation))))
    }
}

/// `1663/5/16400`.
fn path(file: RelFile) -> String {
    format!("{}/{}/{}", file.tablespace, file.database, file.number)
}

/// What happened, as far as it was heard of.
#[derive(Debug)]
pub struct Chronicle {
    buckets: Buckets,
    filter: Filter,
    /// Counts by bucket and file; `None` counts transactions as such, and rows that were not told apart.
    cells: BTreeMap<(usize, Option<RelFile>), Cell>,
    names: HashMap<RelFile, Arc<Relation>>,
    /// Names of databases, as their relations tell them.
    databases: HashMap<Oid, String>,
    others: BTreeSet<String>,
    events: Vec<CommittedDdl>,
    /// The largest first.
    largest: Vec<LargeTransaction>,
    left_out: u64,
    incomplete: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    transactions: u64,
    rows: RowCounts,
}

impl Chronicle {
    /// Nothing happened, as far as anybody knows.
    pub fn new(buckets: Buckets, filter: Filter) -> Self {
        Self {
            buckets,
            filter,
            cells: BTreeMap::new(),
            names: HashMap::new(),
            databases: HashMap::new(),
            others: BTreeSet::new(),
            events: Vec::new(),
            largest: Vec::new(),
            left_out: 0,
            incomplete: 0,
        }
    }

    /// The buckets.
    pub const fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// Takes a segment's index. Its counts are by the minute: those of a minute that lies in two buckets go to the bucket
    /// of its beginning.
    pub fn add_index(&mut self, index: &SegmentIndex) {
        for (file, relation) in &index.names {
            self.name(*file, relation);
        }
        self.left_out = self.left_out.saturating_add(index.minutes_left_out).saturating_add(index.events_left_out);
        for tally in &index.minutes {
            let Some(time) = tally.minute.checked_mul(60_000_000).map(PgTime::from_micros) else { continue };
            self.count(time, tally.file, tally.transactions, tally.rows);
        }
        for ddl in &index.events {
            self.event(ddl.clone());
        }
        for large in &index.largest {
            self.consider(large.clone());
        }
    }

    /// Takes what many indexes tell together. Its tallies must be no coarser than [`Buckets::minutes_each`].
    pub fn add_activity(&mut self, activity: &Activity) {
        for (file, relation) in &activity.names {
            self.name(*file, relation);
        }
        self.left_out =
            self.left_out.saturating_add(activity.tallies_left_out).saturating_add(activity.events_left_out);
        for tally in &activity.tallies {
            let Some(time) = tally.minute.checked_mul(60_000_000).map(PgTime::from_micros) else { continue };
            self.count(time, tally.file, tally.transactions, tally.rows);
        }
        for ddl in &activity.events {
            self.event(ddl.clone());
        }
        for large in &activity.largest {
            self.consider(large.clone());
        }
    }

    /// Takes a transaction that has ended; one that was rolled back changes nothing.
    pub fn add_transaction(&mut self, ended: &Transaction) {
        if !ended.committed {
            return;
        }
        for tally in &ended.tallies {
            if let Some(relation) = &tally.relation {
                self.name(tally.file, relation);
            }
        }
        self.count(ended.time, None, 1, ended.more);
        for tally in &ended.tallies {
            self.count(ended.time, Some(tally.file), 1, tally.counts);
        }
        for event in &ended.ddl {
            let event = event.clone();
            self.event(CommittedDdl { commit: ended.lsn, xid: ended.xid, time: ended.time, event });
        }
        if !ended.tallies.is_empty() {
            self.consider(LargeTransaction {
                begin: ended.begin,
                lsn: ended.lsn,
                xid: ended.xid,
                time: ended.time,
                files: ended.tallies.iter().map(|tally| (tally.file, tally.counts)).collect(),
                is_complete: ended.is_complete,
            });
        }
    }

    /// Whose a file is. Later names replace earlier ones.
    pub fn name(&mut self, file: RelFile, relation: &Arc<Relation>) {
        if self.databases.get(&file.database) != Some(&relation.database_name)
            && self.databases.len() < DATABASES_MAX
            && !relation.database_name.is_empty()
        {
            self.databases.insert(file.database, relation.database_name.clone());
        }
        if self.names.len() < NAMES_MAX || self.names.contains_key(&file) {
            self.names.insert(file, relation.clone());
        }
    }

    /// Goes on to tell of what happens until `to`.
    pub fn extend(&mut self, to: PgTime, zone: &TimeZone) {
        while self.buckets.to() < to && self.buckets.edges.len() <= BUCKETS_MAX {
            let before = self.buckets.to();
            self.buckets.extend(zone);
            if self.buckets.to() == before {
                return;
            }
        }
    }

    fn is_wanted(&self, file: RelFile) -> bool {
        self.filter.is_all() || self.filter.table(file, self.names.get(&file).map(Arc::as_ref))
    }

    fn count(&mut self, time: PgTime, file: Option<RelFile>, transactions: u64, rows: RowCounts) {
        let Some(bucket) = self.buckets.find(time) else { return };
        if let Some(file) = file
            && !self.is_wanted(file)
        {
            if let Some(relation) = self.names.get(&file).filter(|_| self.others.len() < OTHERS_MAX) {
                self.others.insert(relation.full_name());
            }
            return;
        }
        if self.cells.len() >= CELLS_MAX && !self.cells.contains_key(&(bucket, file)) {
            self.left_out += 1;
            return;
        }
        let cell = self.cells.entry((bucket, file)).or_default();
        cell.transactions = cell.transactions.saturating_add(transactions);
        cell.rows += rows;
    }

    fn event(&mut self, ddl: CommittedDdl) {
        let database = self.databases.get(&ddl.event.database).map_or("", String::as_str);
        if self.buckets.find(ddl.time).is_none() || !self.filter.event(&ddl, database) {
            return;
        }
        if self.events.len() >= EVENTS_MAX {
            self.left_out += 1;
        } else {
            self.events.push(ddl);
        }
    }

    fn consider(&mut self, mut large: LargeTransaction) {
        if self.buckets.find(large.time).is_none() {
            return;
        }
        large.files.retain(|(file, _)| self.is_wanted(*file));
        if large.files.is_empty() {
            return;
        }
        self.incomplete += u64::from(!large.is_complete);
        let place = self.largest.partition_point(|other| size_of(other) >= size_of(&large));
        if place < LARGEST_MAX {
            self.largest.insert(place, large);
            self.largest.truncate(LARGEST_MAX);
        }
    }

    /// What happened. Of tables, buckets and transactions those with fewer than `rows_min` changed rows are left out; what
    /// was done to definitions is told always.
    pub fn tell(&self, rows_min: u64) -> Told {
        let mut events: Vec<Vec<Event>> = vec![Vec::new(); self.buckets.iter().len()];
        for ddl in &self.events {
            if let Some(of_bucket) = self.buckets.find(ddl.time).and_then(|bucket| events.get_mut(bucket)) {
                of_bucket.push(Event::of(ddl));
            }
        }
        let mut totals: BTreeMap<TableKey, TableTotal> = BTreeMap::new();
        let mut buckets = Vec::new();
        for (number, ((from, to), mut events)) in self.buckets.iter().zip(events).enumerate() {
            events.sort_by_key(|event| (event.commit_lsn, event.lsn));
            let bucket = self.bucket(number, from, to, events);
            for table in &bucket.tables {
                let total = totals.entry(table.table.key()).or_insert_with(|| TableTotal::new(&table.table, from));
                total.transactions = total.transactions.saturating_add(table.transactions);
                total.rows += table.rows;
                if table.rows.deleted > total.most_deleted {
                    (total.most_deleted, total.most_deleted_in) = (table.rows.deleted, from);
                }
            }
            for event in &bucket.events {
                let Some(table) = event.table.as_ref().filter(|table| table.kind.is_none_or(has_rows)) else {
                    continue;
                };
                let total = totals.entry(table.key()).or_insert_with(|| TableTotal::new(table, from));
                total.truncates += u64::from(event.kind == DdlKind::Truncate);
                total.ddl += u64::from(event.kind != DdlKind::Truncate);
            }
            buckets.push(bucket);
        }
        for bucket in &mut buckets {
            bucket.tables.retain(|table| table.rows.changed() >= rows_min);
        }
        let mut tables: Vec<_> = totals.into_values().collect();
        tables.retain(|total| total.rows.changed() >= rows_min || total.truncates + total.ddl > 0);
        // Who reads this looks for what is gone.
        tables.sort_by_key(|total| std::cmp::Reverse((total.truncates > 0, total.rows.deleted, total.rows.changed())));
        Told {
            buckets,
            tables,
            transactions: self.transactions(rows_min),
            left_out: self.left_out,
            incomplete: self.incomplete,
            others: self.others.iter().cloned().collect(),
        }
    }

    fn bucket(&self, number: usize, from: PgTime, to: PgTime, events: Vec<Event>) -> Bucket {
        let mut tables: BTreeMap<TableKey, TableCount> = BTreeMap::new();
        let mut whole = Cell::default();
        for ((_, file), cell) in self.cells.range((number, None)..(number + 1, None)) {
            let Some(file) = file else {
                whole = *cell;
                continue;
            };
            let table = self.table(*file);
            let count = tables.entry(table.key()).or_insert_with(|| TableCount::new(table));
            // A table that was emptied or rewritten has two files in one bucket; a transaction may have touched both.
            count.transactions = count.transactions.saturating_add(cell.transactions);
            count.rows += cell.rows.into();
        }
        let mut rows = Rows::default();
        if self.filter.is_all() {
            rows += whole.rows.into();
        }
        let mut tables: Vec<_> = tables.into_values().collect();
        tables.iter().for_each(|table| rows += table.rows);
        tables.sort_by_key(|table| std::cmp::Reverse((table.rows.deleted, table.rows.changed())));
        let transactions = match self.filter.is_all() {
            true => whole.transactions,
            false => tables.iter().map(|table| table.transactions).sum(),
        };
        Bucket { from, to, transactions, rows, tables, events }
    }

    fn table(&self, file: RelFile) -> Table {
        match self.names.get(&file) {
            Some(relation) => Table::of(relation),
            None => Table::unnamed(file),
        }
    }

    fn transactions(&self, rows_min: u64) -> Vec<TransactionTold> {
        let mut by_commit: BTreeMap<(Lsn, Option<Xid>), TransactionTold> = BTreeMap::new();
        for large in &self.largest {
            let mut tables: BTreeMap<TableKey, TableCount> = BTreeMap::new();
            for (file, rows) in &large.files {
                let table = self.table(*file);
                let count = tables.entry(table.key()).or_insert_with(|| TableCount::new(table));
                count.transactions = 1;
                count.rows += (*rows).into();
            }
            let mut tables: Vec<_> = tables.into_values().collect();
            tables.sort_by_key(|table| std::cmp::Reverse(table.rows.changed()));
            let mut rows = Rows::default();
            tables.iter().for_each(|table| rows += table.rows);
            let told = TransactionTold {
                xid: large.xid,
                time: large.time,
                begin_lsn: Some(large.begin),
                commit_lsn: large.lsn,
                rows,
                tables,
                events: Vec::new(),
                complete: large.is_complete,
            };
            by_commit.insert((large.lsn, large.xid), told);
        }
        for ddl in &self.events {
            let told = by_commit.entry((ddl.commit, ddl.xid)).or_insert_with(|| TransactionTold {
                xid: ddl.xid,
                time: ddl.time,
                begin_lsn: None,
                commit_lsn: ddl.commit,
                rows: Rows::default(),
                tables: Vec::new(),
                events: Vec::new(),
                complete: true,
            });
            told.events.push(Event::of(ddl));
        }
        let mut told: Vec<_> = by_commit.into_values().collect();
        told.retain(|told| told.rows.changed() >= rows_min.max(1) || told.is_destructive());
        told.sort_by_key(|told| std::cmp::Reverse((told.is_destructive(), told.rows.changed())));
        told
    }
}

fn size_of(large: &LargeTransaction) -> u64 {
    large.files.iter().map(|(_, rows)| Rows::from(*rows).changed()).sum()
}

/// What a chronicle tells.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Told {
    /// Every bucket, in the order of time, also those in which nothing happened.
    pub buckets: Vec<Bucket>,
    /// Tables over the whole time, those first that lost most rows.
    pub tables: Vec<TableTotal>,
    /// The largest transactions; those first that truncated or dropped something.
    pub transactions: Vec<TransactionTold>,
    /// Counts and events that found no room.
    pub left_out: u64,
    /// Transactions whose beginning was not seen: their rows are at least those told.
    pub incomplete: u64,
    /// Tables that the filter left out: at most a thousand.
    #[serde(skip)]
    pub others: Vec<String>,
}

/// A stretch of time.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Bucket {
    /// Where it begins.
    pub from: PgTime,
    /// Where it ends.
    pub to: PgTime,
    /// Transactions that committed; with a filter, of each table those that touched it, in one sum.
    pub transactions: u64,
    /// The rows of all tables told of.
    #[serde(flatten)]
    pub rows: Rows,
    /// Tables, those first that lost most rows.
    pub tables: Vec<TableCount>,
    /// What was done to definitions, in the order of the commits.
    pub events: Vec<Event>,
}

impl Bucket {
    /// True if nothing happened.
    pub const fn is_empty(&self) -> bool {
        self.transactions == 0 && self.rows.changed() == 0 && self.events.is_empty()
    }
}

/// Rows, as they are added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rows {
    /// Rows that came; of a partition also those that an `UPDATE` moved here.
    pub inserted: u64,
    /// Rows that changed where they were.
    pub updated: u64,
    /// Rows that went.
    pub deleted: u64,
    /// Rows that an `UPDATE` moved to another partition, where they count as inserted.
    pub moved: u64,
}

impl Rows {
    /// Rows touched, those that moved once.
    pub const fn changed(&self) -> u64 {
        let came_and_went = self.inserted.saturating_add(self.updated).saturating_add(self.deleted);
        if self.moved > self.inserted {
            came_and_went.saturating_add(self.moved - self.inserted)
        } else {
            came_and_went
        }
    }

    /// Inserts as statements count them over all partitions together.
    pub const fn statement_inserts(&self) -> u64 {
        self.inserted.saturating_sub(self.moved)
    }

    /// Updates as statements count them.
    pub const fn statement_updates(&self) -> u64 {
        self.updated.saturating_add(self.moved)
    }
}

impl From<RowCounts> for Rows {
    fn from(counts: RowCounts) -> Self {
        let RowCounts { inserted, updated, deleted, moved } = counts;
        Self { inserted, updated, deleted, moved }
    }
}

impl std::ops::AddAssign for Rows {
    fn add_assign(&mut self, other: Self) {
        self.inserted = self.inserted.saturating_add(other.inserted);
        self.updated = self.updated.saturating_add(other.updated);
        self.deleted = self.deleted.saturating_add(other.deleted);
        self.moved = self.moved.saturating_add(other.moved);
    }
}

/// A table, or a file that nobody knows the table of.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Table {
    /// `database.schema.table`, or `file 1663/5/16400`.
    pub name: String,
    /// The same without the database.
    #[serde(skip)]
    pub in_database: String,
    /// The database's name; empty if nobody knows.
    pub database_name: String,
    /// The database's OID.
    pub database: Oid,
    /// The table's OID, if it is known.
    pub oid: Option<Oid>,
    /// What it is, if it is known: indexes and views have events, too.
    pub kind: Option<RelationKind>,
    /// The file, if that is all that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<RelFile>,
}

/// What tables are told apart by: a table keeps its OID when its file changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TableKey {
    Relation(Oid, Oid),
    File(Option<RelFile>),
}

impl Table {
    fn of(relation: &Relation) -> Self {
        let in_database = Relation { database_name: String::new(), ..relation.clone() };
        Self {
            name: relation.full_name(),
            in_database: in_database.full_name(),
            database_name: relation.database_name.clone(),
            database: relation.database,
            oid: Some(relation.oid),
            kind: Some(relation.kind),
            file: None,
        }
    }

    fn unnamed(file: RelFile) -> Self {
        let name = format!("file {}", path(file));
        Self {
            in_database: name.clone(),
            name,
            database_name: String::new(),
            database: file.database,
            oid: None,
            kind: None,
            file: Some(file),
        }
    }

    const fn key(&self) -> TableKey {
        match self.oid {
            Some(oid) => TableKey::Relation(self.database, oid),
            None => TableKey::File(self.file),
        }
    }
}

/// Tables of which rows can come and go; of an index, view or sequence an event says all.
const fn has_rows(kind: RelationKind) -> bool {
    matches!(kind, RelationKind::Table | RelationKind::PartitionedTable | RelationKind::MaterializedView)
}

/// What happened to a table in a bucket or a transaction.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TableCount {
    /// The table.
    #[serde(flatten)]
    pub table: Table,
    /// Transactions that touched it.
    pub transactions: u64,
    /// Its rows.
    #[serde(flatten)]
    pub rows: Rows,
}

impl TableCount {
    fn new(table: Table) -> Self {
        Self { table, transactions: 0, rows: Rows::default() }
    }
}

/// What happened to a table over the whole time.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TableTotal {
    /// The table.
    #[serde(flatten)]
    pub table: Table,
    /// Transactions that touched it.
    pub transactions: u64,
    /// Its rows.
    #[serde(flatten)]
    pub rows: Rows,
    /// How often it was truncated.
    pub truncates: u64,
    /// Other things done to its definition.
    pub ddl: u64,
    /// Rows deleted in the bucket in which most were.
    pub most_deleted: u64,
    /// That bucket's beginning; the first in which the table was touched if none was deleted.
    pub most_deleted_in: PgTime,
}

impl TableTotal {
    fn new(table: &Table, first: PgTime) -> Self {
        Self {
            table: table.clone(),
            transactions: 0,
            rows: Rows::default(),
            truncates: 0,
            ddl: 0,
            most_deleted: 0,
            most_deleted_in: first,
        }
    }
}

/// Something that was done to a definition.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Event {
    /// What.
    pub kind: DdlKind,
    /// Whether something is lost by it.
    pub destructive: bool,
    /// The table that it was done to.
    pub table: Option<Table>,
    /// What was dropped or changed, where it is not the table itself.
    pub object: Option<String>,
    /// The database's OID; 0 for what belongs to none.
    pub database: Oid,
    /// The transaction.
    pub xid: Option<Xid>,
    /// When it committed.
    pub time: PgTime,
    /// The record that shows it first.
    pub lsn: Lsn,
    /// Where its commit record begins.
    pub commit_lsn: Lsn,
}

impl Event {
    fn of(ddl: &CommittedDdl) -> Self {
        let CommittedDdl { commit, xid, time, event } = ddl;
        Self {
            kind: event.kind,
            destructive: event.kind.is_destructive(),
            table: event.relation.as_deref().map(Table::of),
            object: event.object.clone(),
            database: event.database,
            xid: *xid,
            time: *time,
            lsn: event.lsn,
            commit_lsn: *commit,
        }
    }
}

/// A transaction that changed many rows, or a definition.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TransactionTold {
    /// Its id.
    pub xid: Option<Xid>,
    /// When it committed.
    pub time: PgTime,
    /// Where its first record begins, if that was seen.
    pub begin_lsn: Option<Lsn>,
    /// Where its commit record begins: recovery that stops there does not have it.
    pub commit_lsn: Lsn,
    /// Its rows.
    #[serde(flatten)]
    pub rows: Rows,
    /// By table, the most first; from an index the sixteen that changed most.
    pub tables: Vec<TableCount>,
    /// What it did to definitions.
    pub events: Vec<Event>,
    /// False if its beginning was not seen: the counts are at least these.
    pub complete: bool,
}

impl TransactionTold {
    /// True if it truncated or dropped something, or disabled what protects it.
    pub fn is_destructive(&self) -> bool {
        self.events.iter().any(|event| event.destructive)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::format::MinuteTally;
    use super::*;
    use crate::detect::{DdlEvent, Persistence, Tally};

    const ORDERS: u32 = 20_000;
    const USERS: u32 = 20_001;

    fn time(text: &str) -> PgTime {
        text.parse::<jiff::Timestamp>().unwrap().into()
    }

    fn zone(name: &str) -> TimeZone {
        TimeZone::get(name).unwrap()
    }

    fn file(number: u32) -> RelFile {
        RelFile { tablespace: Oid(1663), database: Oid(5), number }
    }

    fn relation(oid: u32, name: &str) -> Arc<Relation> {
        Arc::new(Relation {
            database: Oid(5),
            oid: Oid(oid),
            database_name: "shop".to_owned(),
            schema: "public".to_owned(),
            name: name.to_owned(),
            kind: RelationKind::Table,
            persistence: Persistence::Permanent,
            owner: None,
        })
    }

    fn rows(inserted: u64, updated: u64, deleted: u64) -> RowCounts {
        RowCounts { inserted, updated, deleted, moved: 0 }
    }

    /// A commit by transaction `xid`, whose record begins there.
    fn commit(xid: u32, at: &str, tallies: &[(u32, Option<&str>, RowCounts)]) -> Transaction {
        let tallies = tallies.iter().map(|(number, name, counts)| Tally {
            file: file(*number),
            relation: name.map(|name| relation(*number, name)),
            counts: *counts,
        });
        Transaction {
            begin: Lsn::new(u64::from(xid)),
            lsn: Lsn::new(u64::from(xid)),
            end: Lsn::new(u64::from(xid) + 8),
            xid: Xid::new(xid),
            time: time(at),
            committed: true,
            prepared: false,
            subtransactions: 0,
            tallies: tallies.collect(),
            more: RowCounts::default(),
            ddl: Vec::new(),
            messages: Vec::new(),
            is_complete: true,
        }
    }

    fn ddl(kind: DdlKind, relation: Option<Arc<Relation>>, object: Option<&str>) -> DdlEvent {
        DdlEvent { kind, lsn: Lsn::new(1), database: Oid(5), relation, object: object.map(str::to_owned) }
    }

    fn hour(filter: Filter) -> Chronicle {
        let (from, to) = (time("2025-12-17T06:00:00Z"), time("2025-12-17T07:00:00Z"));
        Chronicle::new(Buckets::new(from, to, Width::MINUTE, &TimeZone::UTC).unwrap(), filter)
    }

    fn tables(patterns: &[&str]) -> Filter {
        Filter { tables: patterns.iter().map(|text| Pattern::new(text)).collect(), databases: Vec::new() }
    }

    #[test]
    fn rows_belong_to_the_bucket_of_their_commit_and_to_their_table() {
        let mut chronicle = hour(Filter::default());
        chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &[(ORDERS, Some("orders"), rows(5, 2, 0))]));
        chronicle.add_transaction(&commit(
            4,
            "2025-12-17T06:14:59.999999Z",
            &[(ORDERS, Some("orders"), rows(0, 0, 7)), (USERS, None, rows(0, 0, 24))],
        ));
        // Not in that hour, and rolled back.
        chronicle.add_transaction(&commit(5, "2025-12-17T05:59:59.999999Z", &[(ORDERS, None, rows(0, 0, 1))]));
        chronicle.add_transaction(&commit(6, "2025-12-17T07:00:00Z", &[(ORDERS, None, rows(0, 0, 1))]));
        let aborted = Transaction {
            committed: false,
            ..commit(7, "2025-12-17T06:14:30Z", &[(ORDERS, Some("orders"), rows(0, 0, 1_000))])
        };
        chronicle.add_transaction(&aborted);
        let told = chronicle.tell(0);
        let bucket = &told.buckets[14];
        assert_eq!((bucket.transactions, bucket.rows), (2, rows(5, 2, 31).into()));
        let of_tables: Vec<_> =
            bucket.tables.iter().map(|table| (table.table.name.as_str(), table.rows.deleted)).collect();
        assert_eq!(of_tables, [("file 1663/5/20001", 24), ("shop.public.orders", 7)]);
        assert_eq!(told.buckets.iter().filter(|bucket| !bucket.is_empty()).count(), 1);
        assert_eq!(told.buckets.len(), 60);
        assert_eq!(told.transactions.iter().map(|told| told.xid).collect::<Vec<_>>(), [Xid::new(4), Xid::new(3)]);
        let total = told.tables.iter().find(|total| total.table.oid == Some(Oid(ORDERS))).unwrap();
        assert_eq!((total.most_deleted, total.most_deleted_in), (7, time("2025-12-17T06:14:00Z")));
    }

    #[test]
    fn counts_of_an_index_that_anybody_may_have_written_stay_within_their_bounds() {
        let tally = MinuteTally {
            minute: time("2025-12-17T06:00:00Z").micros() / 60_000_000,
            file: Some(file(ORDERS)),
            transactions: u64::MAX,
            rows: RowCounts { inserted: u64::MAX, updated: u64::MAX, deleted: u64::MAX, moved: u64::MAX },
        };
        let index = SegmentIndex {
            minutes: vec![tally, tally],
            minutes_left_out: u64::MAX,
            events_left_out: u64::MAX,
            ..SegmentIndex::default()
        };
        let mut chronicle = hour(Filter::default());
        chronicle.add_index(&index);
        chronicle.add_index(&index);
        let told = chronicle.tell(0);
        assert_eq!((told.left_out, told.tables[0].transactions), (u64::MAX, u64::MAX));
    }

    #[test]
    fn an_index_tells_what_its_transactions_told() {
        let transactions = [
            commit(3, "2025-12-17T06:14:00Z", &[(ORDERS, Some("orders"), rows(5, 2, 0))]),
            commit(4, "2025-12-17T06:14:01Z", &[(ORDERS, Some("orders"), rows(0, 0, 7)), (USERS, None, rows(1, 1, 1))]),
            commit(5, "2025-12-17T06:31:00Z", &[(USERS, None, rows(9, 0, 0))]),
        ];
        let tally = |minute: i64, number: Option<u32>, transactions, rows| MinuteTally {
            minute: time("2025-12-17T06:00:00Z").micros() / 60_000_000 + minute,
            file: number.map(file),
            transactions,
            rows,
        };
        let index = SegmentIndex {
            minutes: vec![
                tally(14, None, 2, RowCounts::default()),
                tally(14, Some(ORDERS), 2, rows(5, 2, 7)),
                tally(14, Some(USERS), 1, rows(1, 1, 1)),
                tally(31, None, 1, RowCounts::default()),
                tally(31, Some(USERS), 1, rows(9, 0, 0)),
            ],
            largest: transactions
                .iter()
                .map(|ended| LargeTransaction {
                    begin: ended.begin,
                    lsn: ended.lsn,
                    xid: ended.xid,
                    time: ended.time,
                    files: ended.tallies.iter().map(|tally| (tally.file, tally.counts)).collect(),
                    is_complete: true,
                })
                .collect(),
            names: vec![(file(ORDERS), relation(ORDERS, "orders"))],
            ..SegmentIndex::default()
        };
        let (mut by_index, mut by_transaction) = (hour(Filter::default()), hour(Filter::default()));
        by_index.add_index(&index);
        transactions.iter().for_each(|ended| by_transaction.add_transaction(ended));
        assert_eq!(by_index.tell(0), by_transaction.tell(0));
    }

    #[test]
    fn a_table_that_changed_its_file_is_one_table() {
        let mut chronicle = hour(Filter::default());
        let mut emptied = commit(4, "2025-12-17T06:14:30Z", &[]);
        emptied.ddl.push(ddl(DdlKind::Truncate, Some(relation(ORDERS, "orders")), None));
        chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &[(ORDERS, Some("orders"), rows(5, 0, 0))]));
        chronicle.add_transaction(&emptied);
        let mut again = commit(5, "2025-12-17T06:14:40Z", &[(30_000, None, rows(2, 0, 0))]);
        again.tallies[0].relation = Some(relation(ORDERS, "orders"));
        chronicle.add_transaction(&again);
        let told = chronicle.tell(0);
        assert_eq!(told.tables.len(), 1);
        assert_eq!((told.tables[0].rows.inserted, told.tables[0].truncates), (7, 1));
        assert_eq!(told.buckets[14].tables.len(), 1);
        // What truncates has no rows, and stands first nevertheless.
        assert_eq!((told.transactions[0].xid, told.transactions[0].events.len()), (Xid::new(4), 1));
    }

    #[test]
    fn a_row_that_moved_is_an_update_and_no_insert() {
        let mut chronicle = hour(Filter::default());
        let moved = RowCounts { moved: 5, ..RowCounts::default() };
        let parts = [(ORDERS, Some("parts_1"), moved), (USERS, Some("parts_2"), rows(5, 0, 0))];
        chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &parts));
        let told = chronicle.tell(0);
        let rows = told.buckets[14].rows;
        assert_eq!((rows.statement_inserts(), rows.statement_updates(), rows.changed()), (0, 5, 5));
    }

    #[test]
    fn a_filter_takes_tables_by_pattern_and_remembers_what_it_left_out() {
        let named =
            [("orders", 1), ("shop.public.orders", 1), ("*.orders", 1), ("public.*", 2), ("order?", 1), ("*", 2)];
        for (pattern, buckets) in named.into_iter().chain([("public.users", 0), ("other.public.*", 0), ("ORDERS", 0)]) {
            let mut chronicle = hour(tables(&[pattern]));
            chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &[(ORDERS, Some("orders"), rows(5, 0, 0))]));
            chronicle.add_transaction(&commit(4, "2025-12-17T06:15:00Z", &[(USERS, Some("accounts"), rows(1, 0, 0))]));
            let told = chronicle.tell(0);
            assert_eq!(told.buckets.iter().filter(|bucket| !bucket.is_empty()).count(), buckets, "{pattern}");
            assert_eq!((told.transactions.len(), told.others.len()), (buckets, 2 - buckets), "{pattern}");
        }
        let mut chronicle = hour(tables(&["20001"]));
        chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &[(USERS, None, rows(5, 0, 0))]));
        assert_eq!(chronicle.tell(0).buckets[14].transactions, 1, "a file of no name goes by its number");
        for (database, transactions) in [("shop", 1), ("s*", 1), ("5", 1), ("other", 0)] {
            let filter = Filter { tables: Vec::new(), databases: vec![Pattern::new(database)] };
            let mut chronicle = hour(filter);
            chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &[(ORDERS, Some("orders"), rows(5, 0, 0))]));
            assert_eq!(chronicle.tell(0).buckets[14].transactions, transactions, "{database}");
        }
    }

    #[test]
    fn few_rows_are_left_out_and_what_is_gone_for_good_never() {
        let mut chronicle = hour(Filter::default());
        chronicle.add_transaction(&commit(3, "2025-12-17T06:14:00Z", &[(ORDERS, Some("orders"), rows(99, 0, 0))]));
        let mut dropped = commit(4, "2025-12-17T06:15:00Z", &[(USERS, Some("users"), rows(1, 0, 0))]);
        dropped.ddl.push(ddl(DdlKind::DropTrigger, Some(relation(USERS, "users")), Some("guard")));
        chronicle.add_transaction(&dropped);
        let told = chronicle.tell(100);
        assert_eq!(told.buckets[14].tables, []);
        assert_eq!(told.buckets[14].rows.inserted, 99, "the sum is that of all");
        assert_eq!(told.tables.iter().map(|total| total.table.oid).collect::<Vec<_>>(), [Some(Oid(USERS))]);
        assert_eq!(told.transactions.iter().map(|told| told.xid).collect::<Vec<_>>(), [Xid::new(4)]);
        assert_eq!(told.buckets[15].events[0].object.as_deref(), Some("guard"));
    }

    #[test]
    fn buckets_begin_where_the_clocks_of_the_zone_show_it() {
        let kolkata = zone("Asia/Kolkata"); // 5 hours and a half ahead
        let (from, to) = (time("2025-12-17T06:14:10Z"), time("2025-12-17T08:14:10Z"));
        let hours = Buckets::new(from, to, Width::new(Duration::from_secs(3_600)).unwrap(), &kolkata).unwrap();
        assert_eq!((hours.from(), hours.to()), (time("2025-12-17T05:30:00Z"), time("2025-12-17T08:30:00Z")));
        assert_eq!(hours.minutes_each(), 30);
        let minutes = Buckets::new(from, to, Width::MINUTE, &kolkata).unwrap();
        assert_eq!(minutes.minutes_each(), 1);
        assert_eq!((minutes.from(), minutes.iter().len()), (time("2025-12-17T06:14:00Z"), 121));
        assert_eq!(minutes.find(time("2025-12-17T06:13:59.999999Z")), None);
        assert_eq!(minutes.find(time("2025-12-17T06:15:00Z")), Some(1));
        assert_eq!(minutes.find(minutes.to()), None);
    }

    #[test]
    fn days_are_those_of_the_zone_also_when_clocks_are_set() {
        let berlin = zone("Europe/Berlin");
        let day = Width::new(Duration::from_secs(86_400)).unwrap();
        let (from, to) = (time("2025-10-25T12:00:00Z"), time("2025-10-27T12:00:00Z"));
        let days = Buckets::new(from, to, day, &berlin).unwrap();
        let hours: Vec<_> = days.iter().map(|(from, to)| to.since(from).as_hours()).collect();
        assert_eq!((days.from(), hours), (time("2025-10-24T22:00:00Z"), vec![24, 25, 24]));
    }

    #[test]
    fn a_width_is_chosen_that_fits_and_too_many_buckets_are_refused() {
        let from = time("2025-12-17T06:00:30Z");
        let chosen = |seconds: i64| {
            Width::fitting(from, PgTime::from_micros(from.micros() + seconds * 1_000_000), 61).to_string()
        };
        assert_eq!(
            [0, 3_600, 3_601, 86_400, 7 * 86_400, 366 * 86_400].map(chosen),
            ["minute", "minute", "2 minutes", "30 minutes", "3 hours", "7 days"]
        );
        let second = Width::new(Duration::from_secs(1)).unwrap();
        let year = PgTime::from_micros(from.micros() + 366 * 86_400_000_000);
        assert_eq!(Buckets::new(from, year, second, &TimeZone::UTC), Err(TooManyBuckets));
        let ever = Buckets::new(PgTime::from_micros(i64::MIN), PgTime::from_micros(i64::MAX), second, &TimeZone::UTC);
        assert_eq!(ever, Err(TooManyBuckets));
        for length in [Duration::ZERO, Duration::from_millis(1_500), Duration::from_secs(86_401)] {
            assert_eq!(Width::new(length), None, "{length:?}");
        }
        assert!(second.is_finer_than_indexes() && !Width::MINUTE.is_finer_than_indexes());
        assert!(Width::new(Duration::from_secs(90)).unwrap().is_finer_than_indexes());
    }

    #[test]
    fn a_chronicle_can_go_on() {
        let mut chronicle = hour(Filter::default());
        chronicle.extend(time("2025-12-17T07:01:30Z"), &TimeZone::UTC);
        assert_eq!(chronicle.buckets().to(), time("2025-12-17T07:02:00Z"));
        chronicle.add_transaction(&commit(3, "2025-12-17T07:01:59Z", &[(ORDERS, None, rows(5, 0, 0))]));
        assert_eq!(chronicle.tell(0).buckets[61].rows.inserted, 5);
    }

    proptest! {
        /// Every moment of the time lies in exactly one bucket, and buckets leave no room between them.
        #[test]
        fn buckets_lie_side_by_side(
            from in 700_000_000_000_000_i64..900_000_000_000_000,
            length in 1_i64..40_000_000_000,
            width in prop_oneof![1_u64..86_400, (1_u64..4).prop_map(|days| days * 86_400)],
            zone_name in prop_oneof![Just("UTC"), Just("Asia/Kolkata"), Just("America/New_York"), Just("Pacific/Chatham")],
        ) {
            let width = Width::new(Duration::from_secs(width)).unwrap();
            let (from, to) = (PgTime::from_micros(from), PgTime::from_micros(from + length));
            let buckets = Buckets::new(from, to, width, &zone(zone_name)).unwrap();
            prop_assert!(buckets.from() <= from && to <= buckets.to());
            prop_assert!(buckets.iter().all(|(from, to)| from < to));
            for (number, (from, to)) in buckets.iter().enumerate() {
                prop_assert_eq!(buckets.find(from), Some(number));
                prop_assert_eq!(buckets.find(PgTime::from_micros(to.micros() - 1)), Some(number));
            }
            prop_assert!(buckets.find(from).is_some() && buckets.find(PgTime::from_micros(to.micros() - 1)).is_some());
        }

        /// A pattern fits what a regular expression of the same meaning fits.
        #[test]
        fn a_pattern_fits_as_its_meaning_says(pattern in "[ab*?]{0,6}", name in "[ab]{0,6}") {
            fn meaning(pattern: &[u8], name: &[u8]) -> bool {
                match (pattern.first(), name.first()) {
                    (None, _) => name.is_empty(),
                    (Some(b'*'), _) => {
                        meaning(&pattern[1..], name) || (!name.is_empty() && meaning(pattern, &name[1..]))
                    }
                    (Some(_), None) => false,
                    (Some(p), Some(n)) => (*p == b'?' || p == n) && meaning(&pattern[1..], &name[1..]),
                }
            }
            prop_assert_eq!(Pattern::new(&pattern).fits(&name), meaning(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
