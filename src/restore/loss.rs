//! A plan -> what going back there costs: the rows that everything committed behind the stop changed, by table.
//!
//! Around the stop the WAL itself is read, because only there part of a segment counts; further on the indexes tell. What
//! has no index is read as far as that takes no longer than people wait, and what is left out is said.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::error::RestoreError;
use super::path;
use super::plan::{RestorePlan, cancellable};
use crate::decode::change::RowCounts;
use crate::decode::{Change, DecodeError, Reader, Source, WalMajor};
use crate::detect::{Limits, Names, NamesLimits, NamesSnapshot, Observer, Relation, Transaction};
use crate::pg::{Lsn, PgTime, RelFile, SegmentName, SegmentNumber};
use crate::progress::Progress;
use crate::repo::Repository;
use crate::repo::catalog::LsnRange;
use crate::repo::index::lookup::Wanted;

/// Segments read before that of the stop, in search of the beginnings of the transactions on both its sides.
const BACK_MAX: u64 = 8;

/// Bytes of WAL without an index that are read: some seconds. The rest is told as not counted.
const UNINDEXED_BYTES_MAX: u64 = 512 << 20;

/// Tables told one by one.
const TABLES_MAX: usize = 10_000;

/// Before and behind all times of commits.
const ALL_TIMES: (PgTime, PgTime) = (PgTime::from_micros(-(1 << 58)), PgTime::from_micros(1 << 60));

/// Minutes that are added up: more than any WAL spans.
const ALL_MINUTES: i64 = 1 << 40;

/// What is lost by going back to the plan's stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Loss {
    /// Transactions that committed behind the stop.
    pub transactions: u64,
    /// Rows that these changed, by table, the most first.
    pub tables: Vec<TableRows>,
    /// When the last of what was counted committed.
    pub to: Option<PgTime>,
    /// Rows that the last transaction changed that is kept; `None` if that is not known.
    pub kept: Option<Vec<TableRows>>,
    /// Rows that the first transaction changed that is lost; `None` if that is not known.
    pub lost: Option<Vec<TableRows>>,
    /// False if the counts are only at least these, for the reasons in `notes`.
    pub is_complete: bool,
    /// What could not be counted, in sentences.
    pub notes: Vec<String>,
}

/// Rows of a table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TableRows {
    /// The table's full name; of a file that nobody knows a name of, its path.
    pub table: String,
    /// Rows inserted,
    pub inserted: u64,
    /// updated,
    pub updated: u64,
    /// deleted,
    pub deleted: u64,
    /// and moved to another partition.
    pub moved: u64,
}

/// Counts what is lost. Reads a few segments and indexes, and writes nothing; of WAL that cannot be read it says so.
///
/// # Errors
/// Of the store, and if it is cancelled.
pub async fn loss(
    repo: &Repository,
    plan: &RestorePlan,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Loss, RestoreError> {
    // A stop behind the last record has nothing behind it.
    if plan.stop.inclusive {
        return Ok(Loss { is_complete: true, ..Loss::default() });
    }
    let Some(catalog) = plan.catalog.as_deref() else { return Ok(Loss::default()) };
    let identity = &catalog.identity;
    let size = identity.segment_size;
    let Some(major) = WalMajor::of_server(identity.server_version) else { return Ok(Loss::default()) };
    let source = Source { major, segment_size: size, system_id: Some(identity.system_id) };
    progress.begin("count what would be lost", None);
    let stop = SegmentName { timeline: plan.reached().timeline, number: size.segment_of(plan.stop.lsn), size };
    let snapshot = cancellable(cancel, repo.names_before(&plan.whole_path, &stop, major)).await??;
    let mut counting = Counting {
        repo,
        plan,
        source,
        cancel,
        sums: Sums::default(),
        names: BTreeMap::new(),
        snapshot: snapshot.map(|(_, snapshot)| snapshot),
        notes: Vec::new(),
    };
    let counted = counting.run().await;
    progress.end();
    counted?;
    Ok(counting.finish())
}

struct Counting<'a> {
    repo: &'a Repository,
    plan: &'a RestorePlan,
    source: Source,
    cancel: &'a CancellationToken,
    sums: Sums,
    names: BTreeMap<RelFile, Arc<Relation>>,
    /// What relations were called some time before the stop.
    snapshot: Option<NamesSnapshot>,
    notes: Vec<String>,
}

/// Rows by file.
type Files = BTreeMap<RelFile, RowCounts>;

#[derive(Debug, Default)]
struct Sums {
    transactions: u64,
    files: Files,
    /// Rows of files that were too many to be told apart.
    more: RowCounts,
    to: Option<PgTime>,
    kept: Option<(Files, bool)>,
    lost: Option<(Files, bool)>,
    /// Some transaction's beginning was not seen.
    has_partial: bool,
}

impl Counting<'_> {
    async fn run(&mut self) -> Result<(), RestoreError> {
        let size = self.source.segment_size;
        let catalog = self.plan.catalog.clone();
        let Some(catalog) = catalog.as_deref() else { return Ok(()) };
        let end = catalog.contiguous_to(&self.plan.whole_path, self.plan.backup.start);
        let stop = size.segment_of(self.plan.stop.lsn);
        self.read(stop, stop, LsnRange { from: self.plan.stop.lsn, to: size.end_of(stop) }).await?;
        let rest = LsnRange { from: size.end_of(stop), to: end };
        if rest.from >= rest.to {
            return Ok(());
        }
        let lookup = self.repo.lookup(self.plan.whole_path.clone(), size);
        let (from, to) = ALL_TIMES;
        let wanted = Wanted { from, to, minutes_each: ALL_MINUTES, all_events: false };
        let activity = cancellable(self.cancel, lookup.activity(rest, wanted)).await??;
        let (summary, _) = cancellable(self.cancel, lookup.summary(rest)).await??;
        self.sums.to = self.sums.to.max(summary.last_commit.map(|commit| commit.time));
        self.names.extend(activity.names);
        for tally in activity.tallies {
            match tally.file {
                Some(file) => *self.sums.files.entry(file).or_default() += tally.rows,
                None => {
                    self.sums.transactions += tally.transactions;
                    self.sums.more += tally.rows;
                }
            }
        }
        if activity.tallies_left_out > 0 {
            self.notes.push("the indexes had no room for the rows of all tables".to_owned());
        }
        let mut budget = UNINDEXED_BYTES_MAX / size.bytes();
        for unindexed in activity.unindexed {
            let first = unindexed.first.number;
            let last = SegmentNumber::new(first.get() + unindexed.segments - 1);
            if unindexed.segments > budget {
                let count = unindexed.segments;
                self.notes
                    .push(format!("{count} segments from {} on have no index and are not counted", unindexed.first));
                continue;
            }
            budget -= unindexed.segments;
            self.read(first, last, LsnRange { from: size.start_of(first), to: size.end_of(last).min(end) }).await?;
        }
        Ok(())
    }

    /// The segment to begin with, so that the transactions that end in `first` are seen from their first record on; and
    /// whether that is sure.
    async fn begin(&self, first: SegmentNumber, is_stop: bool) -> Result<(SegmentNumber, bool), RestoreError> {
        let size = self.source.segment_size;
        let earliest =
            SegmentNumber::new(first.get().saturating_sub(BACK_MAX)).max(size.segment_of(self.plan.backup.start));
        if first <= earliest {
            return Ok((first, false));
        }
        let Some((before, _)) = self.file_of(SegmentNumber::new(first.get() - 1)) else { return Ok((first, false)) };
        let index = match cancellable(self.cancel, self.repo.index(&before)).await? {
            Ok(index) => index,
            Err(error) if error.is_transient() => return Err(error.into()),
            Err(_) => None,
        };
        let Some(index) = index else {
            return Ok((SegmentNumber::new(first.get().saturating_sub(2)).max(earliest), false));
        };
        // The last transaction that is kept may have ended in a segment before.
        let kept = self.plan.kept.filter(|_| is_stop).map_or(first, |kept| size.segment_of(kept.lsn));
        let open = index.resume_from.map_or(first, |lsn| size.segment_of(lsn));
        Ok((open.min(kept).clamp(earliest, first), open >= earliest))
    }

    fn file_of(&self, segment: SegmentNumber) -> Option<(SegmentName, Lsn)> {
        path::file_of(self.plan.catalog.as_deref()?, &self.plan.whole_path, segment)
    }

    /// Counts what committed in `range`, which lies in the segments from `first` to `last`. Some before are read for the
    /// beginnings of transactions, and one behind where a record goes on in it.
    async fn read(&mut self, first: SegmentNumber, last: SegmentNumber, range: LsnRange) -> Result<(), RestoreError> {
        let is_stop = range.from == self.plan.stop.lsn;
        let (first, is_from_start) = self.begin(first, is_stop).await?;
        // The snapshot may be older than what is read: of files made in between, the indexes tell the names.
        let names = match self.snapshot.clone() {
            Some(snapshot) => Names::import(self.source.major, NamesLimits::default(), snapshot),
            None => Names::new(self.source.major, NamesLimits::default()),
        };
        let mut pass = Pass {
            reader: Reader::at_page(self.source, self.source.segment_size.start_of(first)),
            observer: Observer::new(names, Limits::default(), is_from_start),
            names: BTreeMap::new(),
            range,
            // Elsewhere only the ends of these may be seen.
            kept: self.plan.kept.filter(|_| is_stop).map(|kept| kept.lsn),
            lost: self.plan.lost.filter(|_| is_stop).map(|lost| lost.lsn),
            sums: std::mem::take(&mut self.sums),
            done: false,
        };
        for number in first.get()..=last.get() + 1 {
            let Some((name, reach)) = self.file_of(SegmentNumber::new(number)) else { break };
            // The names of what is read are in the segment's index, where there is one.
            if let Ok(Some(index)) = cancellable(self.cancel, self.repo.index(&name)).await? {
                self.names.extend(index.names);
            }
            let read = match cancellable(self.cancel, self.repo.read_segment(&name)).await? {
                Ok(read) => read,
                Err(error) if error.is_transient() => return Err(error.into()),
                Err(error) => {
                    self.notes.push(format!("segment {name} cannot be read: {error}"));
                    break;
                }
            };
            let length = usize::try_from(reach.saturating_sub(name.start())).unwrap_or(usize::MAX);
            let bytes = read.bytes.slice(..length.min(read.bytes.len()));
            let taken = tokio::task::spawn_blocking(move || {
                let taken = pass.take(&bytes);
                (pass, taken)
            });
            let (again, taken) = taken.await.expect("counting ends");
            pass = again;
            match taken {
                Ok(()) if !pass.done => {}
                Ok(()) | Err(DecodeError::Unwritten { .. }) => break,
                Err(error) => {
                    self.notes.push(format!("segment {name} cannot be read: {error}"));
                    break;
                }
            }
        }
        self.sums = pass.sums;
        self.names.extend(pass.names);
        Ok(())
    }

    fn finish(mut self) -> Loss {
        let unnamed = self.sums.has_partial || self.sums.lost.as_ref().is_some_and(|(_, is_complete)| !is_complete);
        if unnamed {
            self.notes
                .push("some transactions began before what was read: they changed at least these rows".to_owned());
        }
        if self.sums.more != RowCounts::default() {
            self.notes.push("some rows are of tables that were too many to be told apart".to_owned());
        }
        let names = &self.names;
        let kept = self.sums.kept.as_ref().map(|(files, _)| by_table(files, names));
        let lost = self.sums.lost.as_ref().map(|(files, _)| by_table(files, names));
        let mut tables = by_table(&self.sums.files, names);
        if tables.len() > TABLES_MAX {
            self.notes.push(format!("{} more tables changed", tables.len() - TABLES_MAX));
            tables.truncate(TABLES_MAX);
        }
        let Sums { transactions, to, .. } = self.sums;
        Loss { transactions, tables, to, kept, lost, is_complete: self.notes.is_empty(), notes: self.notes }
    }
}

/// Files of one table are one; the most rows come first.
fn by_table(files: &Files, names: &BTreeMap<RelFile, Arc<Relation>>) -> Vec<TableRows> {
    let mut tables: BTreeMap<String, RowCounts> = BTreeMap::new();
    for (file, rows) in files {
        let name = names.get(file).map_or_else(
            || format!("file {}/{}/{}", file.tablespace, file.database, file.number),
            |relation| relation.full_name(),
        );
        *tables.entry(name).or_default() += *rows;
    }
    let rows = |(table, rows): (String, RowCounts)| {
        let RowCounts { inserted, updated, deleted, moved } = rows;
        TableRows { table, inserted, updated, deleted, moved }
    };
    let mut tables: Vec<_> = tables.into_iter().filter(|(_, rows)| *rows != RowCounts::default()).map(rows).collect();
    tables.sort_by_key(|rows| std::cmp::Reverse(rows.inserted + rows.updated + rows.deleted + rows.moved));
    tables
}

struct Pass {
    reader: Reader,
    observer: Observer,
    names: BTreeMap<RelFile, Arc<Relation>>,
    /// Commits whose records begin here count.
    range: LsnRange,
    kept: Option<Lsn>,
    lost: Option<Lsn>,
    sums: Sums,
    /// Everything that counts was seen.
    done: bool,
}

impl Pass {
    fn take(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        self.reader.push(bytes);
        while let Some(record) = self.reader.next_record()? {
            if record.lsn >= self.range.to {
                self.done = true;
                return Ok(());
            }
            let change = Change::read(&record)?;
            let ended = self.observer.see(&record, &change);
            if let Some(ended) = ended.filter(|ended| ended.committed) {
                self.count(&ended);
            }
        }
        Ok(())
    }

    fn count(&mut self, ended: &Transaction) {
        for tally in &ended.tallies {
            if let Some(relation) = &tally.relation {
                self.names.insert(tally.file, relation.clone());
            }
        }
        let files = || ended.tallies.iter().map(|tally| (tally.file, tally.counts)).collect();
        if self.kept == Some(ended.lsn) {
            self.sums.kept = Some((files(), ended.is_complete));
        }
        if self.lost == Some(ended.lsn) {
            self.sums.lost = Some((files(), ended.is_complete));
        }
        if ended.lsn < self.range.from {
            return;
        }
        self.sums.transactions += 1;
        self.sums.to = self.sums.to.max(Some(ended.time));
        self.sums.has_partial |= !ended.is_complete && ended.begin < ended.lsn;
        self.sums.more += ended.more;
        for tally in &ended.tallies {
            *self.sums.files.entry(tally.file).or_default() += tally.counts;
        }
    }
}
