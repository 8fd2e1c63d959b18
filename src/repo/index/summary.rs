//! What of an index can be added up: of one segment, or of many that follow each other. Pure.

use super::format::{IndexError, SegmentIndex, parameters_of_proto, parameters_to_proto};
use crate::decode::change::RowCounts;
use crate::decode::rmgr::xlog::Parameters;
use crate::pg::{Lsn, PgTime, Xid};
use crate::proto;

/// What segments that follow each other hold, in short.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Segments that have an index and are counted here.
    pub segments: u64,
    /// Records that begin in them.
    pub records: u64,
    /// Where the last of them begins and ends.
    pub last: Option<(Lsn, Lsn)>,
    /// The last record is the end of a transaction.
    pub ends_with_transaction: bool,
    /// The latest time that any record carries: of ends of transactions, checkpoints, restore points and promotions.
    pub latest: Option<PgTime>,
    /// Transactions that committed.
    pub commits: u64,
    /// Transactions, or subtransactions by themselves, that were rolled back.
    pub aborts: u64,
    /// The earliest and the latest time of an end, commit or abort. (Ends are not in the order of their times.)
    pub end_times: Option<(PgTime, PgTime)>,
    /// The time of the last end in WAL order, commit or abort, and of the one before it.
    pub last_ends: [Option<PgTime>; 2],
    /// The first commit in WAL order.
    pub first_commit: Option<Commit>,
    /// The last commit in WAL order.
    pub last_commit: Option<Commit>,
    /// The smallest and the greatest id of a transaction or subtransaction that ended. Ids begin anew after four
    /// thousand million: then everything lies between.
    pub xids: Option<(u32, u32)>,
    /// Rows that committed transactions changed.
    pub rows: RowCounts,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Named restore points.
    pub restore_points: u64,
    /// What committed transactions did to definitions.
    pub events: u64,
    /// Those among `events` by which something is lost.
    pub destructive: u64,
    /// The greatest value of each setting that a standby must not undercut, if any was written.
    pub parameters: Option<Parameters>,
    /// Decoding must begin here so that no transaction is missed that was open at the end of the last segment; `None` if
    /// none was.
    pub resume_from: Option<Lsn>,
}

/// A commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Commit {
    /// Where its record begins.
    pub lsn: Lsn,
    /// Where its record ends, rounded up to 8 bytes.
    pub end: Lsn,
    /// The transaction.
    pub xid: Option<Xid>,
    /// When it committed, by the server's clock.
    pub time: PgTime,
}

impl Summary {
    /// Of one segment.
    pub fn of(index: &SegmentIndex) -> Self {
        let mut summary = Self {
            segments: 1,
            records: index.records,
            last: index.last,
            ends_with_transaction: index.ends_with_transaction,
            latest: index.latest,
            checkpoints: index.checkpoints.len() as u64,
            restore_points: index.restore_points.len() as u64,
            events: (index.events.len() as u64).saturating_add(index.events_left_out),
            // Those that found no room may be anything.
            destructive: (index.events.iter().filter(|event| event.event.kind.is_destructive()).count() as u64)
                .saturating_add(index.events_left_out),
            resume_from: index.resume_from,
            ..Self::default()
        };
        for end in &index.ends {
            summary.end_times = both(summary.end_times, Some((end.time, end.time)));
            summary.last_ends = [Some(end.time), summary.last_ends[0]];
            for xid in end.xid.iter().chain(&end.subtransactions) {
                summary.xids = both(summary.xids, Some((xid.get(), xid.get())));
            }
            if end.committed {
                let commit = Commit { lsn: end.lsn, end: end.end, xid: end.xid, time: end.time };
                summary.commits += 1;
                summary.first_commit = summary.first_commit.or(Some(commit));
                summary.last_commit = Some(commit);
            } else {
                summary.aborts += 1;
            }
        }
        for tally in &index.minutes {
            summary.rows = sum(summary.rows, tally.rows);
        }
        for (_, parameters) in &index.parameters {
            summary.parameters = greatest(summary.parameters, Some(*parameters));
        }
        summary
    }

    /// Adds what follows.
    pub fn add(&mut self, next: &Self) {
        self.segments = self.segments.saturating_add(next.segments);
        self.records = self.records.saturating_add(next.records);
        if next.last.is_some() {
            self.last = next.last;
            self.ends_with_transaction = next.ends_with_transaction;
        }
        self.latest = self.latest.max(next.latest);
        self.commits = self.commits.saturating_add(next.commits);
        self.aborts = self.aborts.saturating_add(next.aborts);
        self.end_times = both(self.end_times, next.end_times);
        self.last_ends = match next.last_ends {
            [None, _] => self.last_ends,
            [last, None] => [last, self.last_ends[0]],
            both => both,
        };
        self.first_commit = self.first_commit.or(next.first_commit);
        self.last_commit = next.last_commit.or(self.last_commit);
        self.xids = both(self.xids, next.xids);
        self.rows = sum(self.rows, next.rows);
        self.checkpoints = self.checkpoints.saturating_add(next.checkpoints);
        self.restore_points = self.restore_points.saturating_add(next.restore_points);
        self.events = self.events.saturating_add(next.events);
        self.destructive = self.destructive.saturating_add(next.destructive);
        self.parameters = greatest(self.parameters, next.parameters);
        self.resume_from = next.resume_from;
    }

    /// True if a transaction ended here after `at` (or at it, with `or_at`): where recovery to that time stops if none did
    /// before.
    pub fn has_end_after(&self, at: PgTime, or_at: bool) -> bool {
        self.end_times.is_some_and(|(_, latest)| latest > at || (or_at && latest == at))
    }

    /// True if the transaction, or subtransaction, may have ended here.
    pub fn may_hold(&self, xid: Xid) -> bool {
        self.xids.is_some_and(|(min, max)| (min..=max).contains(&xid.get()))
    }

    /// True if a transaction may have ended here at a time of `[from, to)`.
    pub fn overlaps(&self, from: PgTime, to: PgTime) -> bool {
        self.end_times.is_some_and(|(earliest, latest)| earliest < to && from <= latest)
    }

    pub(super) fn to_proto(&self) -> proto::IndexSummary {
        let (last_lsn, last_end) = self.last.unwrap_or_default();
        let (xid_min, xid_max) = self.xids.unwrap_or_default();
        let commit = |commit: Commit| proto::Commit {
            lsn: commit.lsn.bytes(),
            end: commit.end.bytes(),
            xid: commit.xid.map_or(0, Xid::get),
            time: commit.time.micros(),
        };
        proto::IndexSummary {
            segments: self.segments,
            records: self.records,
            last_lsn: last_lsn.bytes(),
            last_end: last_end.bytes(),
            ends_with_transaction: self.ends_with_transaction,
            latest: self.latest.map(PgTime::micros),
            commits: self.commits,
            aborts: self.aborts,
            earliest_end: self.end_times.map(|(earliest, _)| earliest.micros()),
            latest_end: self.end_times.map(|(_, latest)| latest.micros()),
            last_end_time: self.last_ends[0].map(PgTime::micros),
            end_time_before: self.last_ends[1].map(PgTime::micros),
            first_commit: self.first_commit.map(commit),
            last_commit: self.last_commit.map(commit),
            xid_min,
            xid_max,
            inserted: self.rows.inserted,
            updated: self.rows.updated,
            deleted: self.rows.deleted,
            moved: self.rows.moved,
            checkpoints: self.checkpoints,
            restore_points: self.restore_points,
            events: self.events,
            destructive: self.destructive,
            parameters: self.parameters.map(|parameters| parameters_to_proto(&(Lsn::ZERO, parameters))),
            resume_from: self.resume_from.map_or(0, Lsn::bytes),
        }
    }

    pub(super) fn of_proto(message: proto::IndexSummary) -> Result<Self, IndexError> {
        let time = |micros: Option<i64>| micros.map(PgTime::from_micros);
        let commit = |commit: proto::Commit| Commit {
            lsn: Lsn::new(commit.lsn),
            end: Lsn::new(commit.end),
            xid: Xid::new(commit.xid),
            time: PgTime::from_micros(commit.time),
        };
        let end_times = time(message.earliest_end).zip(time(message.latest_end));
        if end_times.is_some_and(|(earliest, latest)| earliest > latest) || message.xid_min > message.xid_max {
            return Err(IndexError::Impossible("a summary's last comes before its first"));
        }
        let last = (message.last_lsn != 0).then(|| (Lsn::new(message.last_lsn), Lsn::new(message.last_end)));
        Ok(Self {
            segments: message.segments,
            records: message.records,
            last,
            ends_with_transaction: message.ends_with_transaction,
            latest: time(message.latest),
            commits: message.commits,
            aborts: message.aborts,
            end_times,
            last_ends: [time(message.last_end_time), time(message.end_time_before)],
            first_commit: message.first_commit.map(commit),
            last_commit: message.last_commit.map(commit),
            xids: (message.xid_min != 0).then_some((message.xid_min, message.xid_max)),
            rows: RowCounts {
                inserted: message.inserted,
                updated: message.updated,
                deleted: message.deleted,
                moved: message.moved,
            },
            checkpoints: message.checkpoints,
            restore_points: message.restore_points,
            events: message.events,
            destructive: message.destructive,
            parameters: message.parameters.map(|parameters| parameters_of_proto(&parameters).1),
            resume_from: (message.resume_from != 0).then(|| Lsn::new(message.resume_from)),
        })
    }
}

fn both<T: Ord>(a: Option<(T, T)>, b: Option<(T, T)>) -> Option<(T, T)> {
    match (a, b) {
        (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
        (one, None) | (None, one) => one,
    }
}

/// Numbers from objects are not trusted: an absurd sum is an absurd number, and no panic.
pub(super) const fn sum(a: RowCounts, b: RowCounts) -> RowCounts {
    RowCounts {
        inserted: a.inserted.saturating_add(b.inserted),
        updated: a.updated.saturating_add(b.updated),
        deleted: a.deleted.saturating_add(b.deleted),
        moved: a.moved.saturating_add(b.moved),
    }
}

fn greatest(a: Option<Parameters>, b: Option<Parameters>) -> Option<Parameters> {
    let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
    Some(Parameters {
        max_connections: a.max_connections.max(b.max_connections),
        max_worker_processes: a.max_worker_processes.max(b.max_worker_processes),
        max_wal_senders: a.max_wal_senders.max(b.max_wal_senders),
        max_prepared_transactions: a.max_prepared_transactions.max(b.max_prepared_transactions),
        max_locks_per_transaction: a.max_locks_per_transaction.max(b.max_locks_per_transaction),
        wal_level: a.wal_level.max(b.wal_level),
    })
}
