//! Records of archived WAL -> where exactly recovery stops. Pure.
//!
//! Times of transactions do not rise with the WAL: each is taken a moment before its record finds its place, and clocks
//! are set. What a target time means is therefore decided as Postgres decides it: recovery stops before the first record,
//! in the order of the WAL, that ends a transaction later than the target (`recoveryStopsBefore` in
//! `access/transam/xlogrecovery.c`). What is found here is a position, and recovery goes by that.

use crate::decode::rmgr::xact::{self, TransactionEnd};
use crate::decode::rmgr::xlog::{self, Parameters, XlogRecord};
use crate::decode::{DecodeError, Record};
use crate::pg::{Lsn, PgTime, Xid};
use crate::repo::index::SegmentIndex;
use crate::repo::index::format::TransactionEnd as IndexedEnd;
use crate::repo::index::summary::{Commit, Summary};

/// What a scan looks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// The last complete record.
    End,
    /// The first transaction that ended after this (or at it, if exclusive).
    Time { at: PgTime, exclusive: bool },
    /// The first record that does not lie wholly before this place.
    Lsn(Lsn),
    /// What committed before this place, and as little else as can be: recovery stops behind the last record before it that
    /// must be kept. So the transaction that ends here has done less: it holds no lock that keeps readers from a table, and
    /// the files of a database that it drops, which are removed before it commits, are still there.
    Before {
        /// The place.
        lsn: Lsn,
        /// Nothing is consistent before this one.
        floor: Lsn,
    },
    /// The end of this transaction.
    Xid { xid: Xid, exclusive: bool },
    /// The restore point of this name.
    Name(String),
}

/// A transaction's end as plans show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Transaction {
    /// Where its commit record begins.
    pub lsn: Lsn,
    /// Where that record ends.
    pub end: Lsn,
    /// Its id.
    pub xid: Option<Xid>,
    /// When it ended, by the server's clock.
    pub time: PgTime,
}

/// Where recovery stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Stop {
    /// `recovery_target_lsn`: the first record that is not wanted, or with `inclusive` the last that is.
    pub lsn: Lsn,
    /// `recovery_target_inclusive`.
    pub inclusive: bool,
    /// The end of that record: WAL is needed to here.
    pub read_to: Lsn,
    /// The end of the last record that is replayed: what `pg_last_wal_replay_lsn()` must answer.
    pub reached: Lsn,
}

/// What a scan found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Scanned {
    /// Where to stop; `None` if the goal was not met (always for [`Goal::End`]).
    pub(super) stop: Option<Stop>,
    /// The stop that keeps every record seen; `None` if `stop` was found, or nothing was.
    pub(super) everything: Option<Stop>,
    /// The last transaction that committed before the stop.
    pub(super) kept: Option<Transaction>,
    /// The first that committed behind it.
    pub(super) lost: Option<Transaction>,
    /// The time of the last transaction's end, commit or abort, before the stop, and of the one before that.
    pub(super) last_ends: [Option<PgTime>; 2],
    /// The last record before the stop is the end of a transaction.
    pub(super) ends_with_transaction: bool,
    /// The latest time that any record seen carries: what was committed before it is archived.
    pub(super) latest: Option<PgTime>,
    /// When the checkpoint began that the scan's backup begins with, in whole seconds.
    pub(super) began: Option<PgTime>,
    /// The greatest of each setting that a hot standby must not undercut, as far as the WAL says.
    pub(super) parameters: Option<Parameters>,
    /// All places of the restore point that was looked for.
    pub(super) named: Vec<(Lsn, PgTime)>,
    /// The end of the last record seen.
    pub(super) end: Option<Lsn>,
}

/// A scan in progress.
#[derive(Debug)]
pub(super) struct Scan {
    goal: Goal,
    /// Where the backup's WAL begins: the redo point of its checkpoint.
    from: Lsn,
    found: Scanned,
    /// The last record before the stop.
    last: Option<Span>,
    /// The goal is met with the last record: recovery stops before the next one.
    met: bool,
    /// The last record before the stop that must be kept whatever follows: a commit, a `PREPARE TRANSACTION`, a promotion ...
    anchor: Option<Anchor>,
    /// The record behind it.
    behind: Option<Span>,
}

/// A record that must be kept, and what [`Scanned`] says when recovery stops behind it.
#[derive(Clone, Copy, Debug)]
struct Anchor {
    end: Lsn,
    last_ends: [Option<PgTime>; 2],
    ends_with_transaction: bool,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    lsn: Lsn,
    end: Lsn,
}

/// Whether more records are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum More {
    Yes,
    No,
}

impl Scan {
    pub(super) fn new(goal: Goal, from: Lsn) -> Self {
        Self { goal, from, found: Scanned::default(), last: None, met: false, anchor: None, behind: None }
    }

    /// Looks at the next record.
    pub(super) fn see(&mut self, record: &Record<'_>) -> Result<More, DecodeError> {
        self.found.end = Some(record.end);
        let end = xact::read(record)?;
        let machinery = xlog::read(record)?;
        if let Some(XlogRecord::Checkpoint(checkpoint)) = machinery
            && checkpoint.redo == self.from
        {
            self.found.began = self.found.began.or(Some(checkpoint.time));
        }
        if let Some(time) = end.map(|end| end.time).or_else(|| time_of(machinery.as_ref())) {
            self.found.latest = self.found.latest.max(Some(time));
        }
        if self.found.stop.is_none() && (self.met || self.stops_before(record, end.as_ref())) {
            self.found.stop = Some(self.early_stop().unwrap_or(Stop {
                lsn: record.lsn,
                inclusive: false,
                read_to: record.end,
                reached: self.last.map_or(record.lsn, |last| last.end),
            }));
        }
        if self.found.stop.is_none() {
            self.keep(record, end.as_ref(), machinery.as_ref());
            return Ok(More::Yes);
        }
        if let (None, Some(end)) = (self.found.lost, end.filter(|end| end.committed)) {
            self.found.lost = Some(transaction(record, &end));
        }
        self.see_name(record, machinery.as_ref());
        Ok(self.more())
    }

    /// The stop behind the last record that must be kept, if that is wanted and others follow it.
    fn early_stop(&mut self) -> Option<Stop> {
        let (anchor, behind) = (self.anchor?, self.behind?);
        if !matches!(self.goal, Goal::Before { .. }) {
            return None;
        }
        self.found.last_ends = anchor.last_ends;
        self.found.ends_with_transaction = anchor.ends_with_transaction;
        Some(Stop { lsn: behind.lsn, inclusive: false, read_to: behind.end, reached: anchor.end })
    }

    /// What was seen up to `end` must be kept.
    const fn set_anchor(&mut self, end: Lsn) {
        let Scanned { last_ends, ends_with_transaction, .. } = self.found;
        self.anchor = Some(Anchor { end, last_ends, ends_with_transaction });
        self.behind = None;
    }

    /// True if what a record did is kept though no later commit says so.
    fn is_anchor(
        &self,
        record: &Record<'_>,
        end: Option<&TransactionEnd<'_>>,
        machinery: Option<&XlogRecord<'_>>,
    ) -> bool {
        let floor = if let Goal::Before { floor, .. } = self.goal { floor } else { Lsn::ZERO };
        // An online checkpoint is none: `DROP DATABASE` asks for one between marking the database, for good, and its commit.
        let is_mark = match machinery {
            Some(XlogRecord::Checkpoint(checkpoint)) => checkpoint.shutdown,
            Some(XlogRecord::ParameterChange(_) | XlogRecord::EndOfRecovery(_)) => true,
            _ => false,
        };
        end.is_some_and(|end| end.committed) || is_mark || xact::is_prepare(record) || record.end <= floor
    }

    const fn more(&self) -> More {
        // Names are looked for to the end: there may be two of one name.
        let done = self.found.lost.is_some() && !matches!(self.goal, Goal::Name(_));
        if done { More::No } else { More::Yes }
    }

    /// True if an index says of its segment's records all that [`Scan::see`] would learn from them. It does not if recovery
    /// may stop there: only the WAL says where the records before and behind that place lie.
    pub(super) fn can_pass_over(&self, index: &SegmentIndex) -> bool {
        if index.last.is_none() || self.found.stop.is_some() {
            return true;
        }
        let stops_here = match &self.goal {
            Goal::End => false,
            Goal::Time { at, exclusive } => index.ends.iter().any(|end| is_past(end.time, *at, *exclusive)),
            Goal::Lsn(lsn) | Goal::Before { lsn, .. } => index.last.is_some_and(|(_, end)| end > padded(*lsn)),
            Goal::Xid { xid, .. } => index.ends.iter().any(|end| end.includes(*xid)),
            Goal::Name(name) => index.restore_points.iter().any(|point| point.name == name.as_bytes()),
        };
        !self.met && !stops_here
    }

    /// Takes an index in place of its segment's records; only if [`Scan::can_pass_over`] allows it.
    pub(super) fn pass_over(&mut self, index: &SegmentIndex) -> More {
        let Some((lsn, end)) = index.last else { return self.more() };
        self.found.end = Some(end);
        self.found.latest = self.found.latest.max(index.latest);
        let began = index.checkpoints.iter().find(|checkpoint| checkpoint.redo == self.from);
        self.found.began = self.found.began.or(began.map(|checkpoint| checkpoint.time));
        if self.found.stop.is_some() {
            let lost = index.ends.iter().find(|end| end.committed);
            self.found.lost = self.found.lost.or(lost.map(indexed));
        } else {
            self.last = Some(Span { lsn, end });
            self.found.ends_with_transaction = index.ends_with_transaction;
            for end in &index.ends {
                self.found.last_ends = [Some(end.time), self.found.last_ends[0]];
                if end.committed {
                    self.found.kept = Some(indexed(end));
                }
            }
            for (_, new) in &index.parameters {
                self.found.parameters = Some(greatest(&self.found.parameters.unwrap_or_default(), new));
            }
            // What else may be in it that must be kept, the index does not tell.
            self.set_anchor(end);
        }
        if let Goal::Name(name) = &self.goal {
            let places = index.restore_points.iter().filter(|point| point.name == name.as_bytes());
            self.found.named.extend(places.map(|point| (point.end, point.time)));
        }
        self.more()
    }

    /// True if recovery may stop as well in the next segments as far on.
    pub(super) const fn is_before_the_stop(&self) -> bool {
        self.found.stop.is_none() && !self.met
    }

    /// Takes the sum of the indexes of segments in which recovery does not stop in their place, as far as
    /// [`Scan::is_before_the_stop`]. Restore points and checkpoints are not in it.
    pub(super) fn pass_over_many(&mut self, summary: &Summary) {
        let Some((lsn, end)) = summary.last else { return };
        self.found.end = Some(end);
        self.found.latest = self.found.latest.max(summary.latest);
        self.last = Some(Span { lsn, end });
        self.found.ends_with_transaction = summary.ends_with_transaction;
        self.found.last_ends = match summary.last_ends {
            [None, _] => self.found.last_ends,
            [last, None] => [last, self.found.last_ends[0]],
            both => both,
        };
        let kept = summary.last_commit.map(|Commit { lsn, end, xid, time }| Transaction { lsn, end, xid, time });
        self.found.kept = kept.or(self.found.kept);
        if let Some(new) = &summary.parameters {
            self.found.parameters = Some(greatest(&self.found.parameters.unwrap_or_default(), new));
        }
        self.set_anchor(end);
    }

    /// What was found. `latest` and everything behind the stop know only what was seen.
    pub(super) fn finish(mut self) -> Scanned {
        if let (None, Some(last)) = (self.found.stop, self.last) {
            let all = Some(Stop { lsn: last.lsn, inclusive: true, read_to: last.end, reached: last.end });
            if self.met { self.found.stop = all } else { self.found.everything = all }
        }
        self.found
    }

    fn stops_before(&self, record: &Record<'_>, end: Option<&TransactionEnd<'_>>) -> bool {
        match &self.goal {
            Goal::End | Goal::Name(_) | Goal::Xid { exclusive: false, .. } => false,
            Goal::Time { at, exclusive } => end.is_some_and(|end| is_past(end.time, *at, *exclusive)),
            Goal::Lsn(lsn) | Goal::Before { lsn, .. } => record.end > padded(*lsn),
            Goal::Xid { xid, exclusive: true } => end.is_some_and(|end| end.includes(*xid)),
        }
    }

    fn keep(&mut self, record: &Record<'_>, end: Option<&TransactionEnd<'_>>, machinery: Option<&XlogRecord<'_>>) {
        self.last = Some(Span { lsn: record.lsn, end: record.end });
        self.found.ends_with_transaction = end.is_some();
        if let Some(end) = end {
            self.found.last_ends = [Some(end.time), self.found.last_ends[0]];
            if end.committed {
                self.found.kept = Some(transaction(record, end));
            }
        }
        if let Some(XlogRecord::ParameterChange(new)) = machinery {
            let old = self.found.parameters.unwrap_or_default();
            self.found.parameters = Some(greatest(&old, new));
        }
        if self.is_anchor(record, end, machinery) {
            self.set_anchor(record.end);
        } else if self.behind.is_none() {
            self.behind = Some(Span { lsn: record.lsn, end: record.end });
        }
        self.see_name(record, machinery);
        self.met = match &self.goal {
            Goal::Xid { xid, exclusive: false } => end.is_some_and(|end| end.includes(*xid)),
            Goal::Name(_) => !self.found.named.is_empty(),
            _ => false,
        };
    }

    fn see_name(&mut self, record: &Record<'_>, machinery: Option<&XlogRecord<'_>>) {
        if let (Goal::Name(name), Some(XlogRecord::RestorePoint(point))) = (&self.goal, machinery)
            && point.name == name.as_bytes()
        {
            self.found.named.push((record.end, point.time));
        }
    }
}

/// What an index says of the records from `from` on; `None` if it does not tell them from those before.
pub(super) fn behind(mut index: SegmentIndex, from: Lsn) -> Option<SegmentIndex> {
    if index.latest != latest_listed(&index) {
        // Of a promotion's record it keeps the time, but not the place.
        return None;
    }
    index.ends.retain(|end| end.lsn >= from);
    index.checkpoints.retain(|checkpoint| checkpoint.lsn >= from);
    index.restore_points.retain(|point| point.lsn >= from);
    index.parameters.retain(|(lsn, _)| *lsn >= from);
    index.last = index.last.filter(|(lsn, _)| *lsn >= from);
    index.latest = latest_listed(&index);
    Some(index)
}

/// The latest time of an index's records whose places it says.
fn latest_listed(index: &SegmentIndex) -> Option<PgTime> {
    let ends = index.ends.iter().map(|end| end.time);
    let checkpoints = index.checkpoints.iter().map(|checkpoint| checkpoint.time);
    let points = index.restore_points.iter().map(|point| point.time);
    ends.chain(checkpoints).chain(points).max()
}

fn is_past(time: PgTime, at: PgTime, exclusive: bool) -> bool {
    time > at || (exclusive && time == at)
}

/// Records begin at multiples of 8 bytes: what follows the last one up to there holds nothing.
pub(super) fn padded(end: Lsn) -> Lsn {
    Lsn::new(end.bytes().saturating_add(7) & !7)
}

fn transaction(record: &Record<'_>, end: &TransactionEnd<'_>) -> Transaction {
    Transaction { lsn: record.lsn, end: record.end, xid: end.xid, time: end.time }
}

fn indexed(end: &IndexedEnd) -> Transaction {
    Transaction { lsn: end.lsn, end: end.end, xid: end.xid, time: end.time }
}

/// The server's clock when a record other than a transaction's end was written.
fn time_of(record: Option<&XlogRecord<'_>>) -> Option<PgTime> {
    match record? {
        // A checkpoint carries the time of its beginning, which is before everything that its record stands behind.
        XlogRecord::Checkpoint(checkpoint) => Some(checkpoint.time),
        XlogRecord::RestorePoint(point) => Some(point.time),
        XlogRecord::EndOfRecovery(end) => Some(end.time),
        _ => None,
    }
}

fn greatest(a: &Parameters, b: &Parameters) -> Parameters {
    Parameters {
        max_connections: a.max_connections.max(b.max_connections),
        max_worker_processes: a.max_worker_processes.max(b.max_worker_processes),
        max_wal_senders: a.max_wal_senders.max(b.max_wal_senders),
        max_prepared_transactions: a.max_prepared_transactions.max(b.max_prepared_transactions),
        max_locks_per_transaction: a.max_locks_per_transaction.max(b.max_locks_per_transaction),
        wal_level: a.wal_level.max(b.wal_level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::testing::{WalWriter, Written, main_data, source};
    use crate::decode::{Reader, RmgrId, WalMajor};

    const START: Lsn = Lsn::new(1 << 20);

    struct Wal(WalWriter);

    impl Wal {
        fn new() -> Self {
            Self(WalWriter::new(source(WalMajor::V15), START))
        }

        fn ends(&mut self, info: u8, xid: u32, time: i64) -> Written {
            self.0.record(RmgrId::XACT, info, xid, &main_data(&time.to_le_bytes()))
        }

        fn commit(&mut self, xid: u32, time: i64) -> Written {
            self.ends(0, xid, time)
        }

        fn row(&mut self) -> Written {
            self.0.record(RmgrId(10), 0, 9, &main_data(b"row"))
        }

        fn point(&mut self, name: &str, time: i64) -> Written {
            let mut data = time.to_le_bytes().to_vec();
            data.extend(name.as_bytes());
            data.resize(72, 0);
            self.0.record(RmgrId::XLOG, 0x70, 0, &main_data(&data))
        }

        fn scan(&self, goal: Goal) -> Scanned {
            let mut reader = Reader::at_page(self.0.source, START);
            reader.push(self.0.bytes());
            let mut scan = Scan::new(goal, START);
            while let Some(record) = reader.next_record().unwrap() {
                if scan.see(&record).unwrap() == More::No {
                    break;
                }
            }
            scan.finish()
        }
    }

    fn time(at: i64) -> Goal {
        Goal::Time { at: PgTime::from_micros(at), exclusive: false }
    }

    fn xid(number: u32, exclusive: bool) -> Goal {
        Goal::Xid { xid: Xid::new(number).unwrap(), exclusive }
    }

    #[test]
    fn a_time_stops_before_the_first_later_end_even_if_an_earlier_one_follows() {
        let mut wal = Wal::new();
        let first = wal.commit(3, 100);
        wal.row();
        let late = wal.commit(4, 300);
        wal.commit(5, 200); // its clock was read before, its record came after
        let found = wal.scan(time(250));
        assert_eq!(found.stop.unwrap().lsn, late.lsn);
        assert!(!found.stop.unwrap().inclusive);
        assert_eq!(found.kept.unwrap().lsn, first.lsn);
        assert_eq!(found.lost.unwrap().lsn, late.lsn);
    }

    #[test]
    fn an_abort_after_the_time_stops_too_and_the_lost_one_is_the_next_commit() {
        let mut wal = Wal::new();
        wal.commit(3, 100);
        let abort = wal.ends(0x20, 4, 200);
        let commit = wal.commit(5, 201);
        let found = wal.scan(time(150));
        assert_eq!((found.stop.unwrap().lsn, found.lost.unwrap().lsn), (abort.lsn, commit.lsn));
    }

    #[test]
    fn a_commit_at_the_very_time_is_kept_unless_exclusive() {
        let mut wal = Wal::new();
        wal.commit(3, 100);
        let at = wal.commit(4, 200);
        let behind = wal.commit(5, 300);
        assert_eq!(wal.scan(time(200)).stop.unwrap().lsn, behind.lsn);
        let goal = Goal::Time { at: PgTime::from_micros(200), exclusive: true };
        assert_eq!(wal.scan(goal).stop.unwrap().lsn, at.lsn);
    }

    #[test]
    fn an_lsn_keeps_what_lies_wholly_before_it() {
        let mut wal = Wal::new();
        let first = wal.commit(3, 100);
        let row = wal.row();
        let last = wal.commit(4, 200);
        for (lsn, stop) in [(row.lsn, row.lsn), (row.end, last.lsn), (Lsn::new(row.lsn.bytes() + 8), row.lsn)] {
            let found = wal.scan(Goal::Lsn(lsn));
            assert_eq!((found.stop.unwrap().lsn, found.kept.unwrap().lsn), (stop, first.lsn), "{lsn}");
        }
        // Nothing lies behind the last one: the caller decides whether that is enough.
        let beyond = wal.scan(Goal::Lsn(last.end));
        assert_eq!((beyond.stop, beyond.everything.unwrap().reached, beyond.end), (None, last.end, Some(last.end)));
    }

    #[test]
    fn before_a_place_recovery_stops_behind_the_last_record_that_must_be_kept() {
        let before = |lsn| Goal::Before { lsn, floor: Lsn::ZERO };
        let mut wal = Wal::new();
        wal.commit(3, 100);
        let kept = wal.commit(4, 200);
        let row = wal.row();
        wal.ends(0x20, 5, 250); // an abort: whatever it did, nothing of it is seen
        let harm = wal.commit(6, 300);
        let stop = Stop { lsn: row.lsn, inclusive: false, read_to: row.end, reached: kept.end };
        let found = wal.scan(before(harm.lsn));
        assert_eq!((found.stop, found.kept.unwrap().lsn, found.lost.unwrap().lsn), (Some(stop), kept.lsn, harm.lsn));
        let ends = [Some(PgTime::from_micros(200)), Some(PgTime::from_micros(100))];
        assert_eq!((found.last_ends, found.ends_with_transaction), (ends, true), "those before that stop");
        // Nothing is consistent before this place.
        let found = wal.scan(Goal::Before { lsn: harm.lsn, floor: row.end });
        assert_eq!((found.stop.unwrap().reached, found.kept.unwrap().lsn), (row.end, kept.lsn));
        // Directly behind a commit there is nothing to leave out.
        let next = wal.commit(7, 400);
        assert_eq!(wal.scan(before(next.lsn)).stop.unwrap().lsn, next.lsn);
    }

    #[test]
    fn a_prepared_transaction_before_a_place_is_kept_and_a_mark_that_changes_nothing_is_not() {
        let before = |lsn| Goal::Before { lsn, floor: Lsn::ZERO };
        let mut wal = Wal::new();
        wal.commit(3, 100);
        wal.row();
        let prepared = wal.ends(0x10, 4, 200);
        wal.row();
        let harm = wal.commit(5, 300);
        assert_eq!(wal.scan(before(harm.lsn)).stop.unwrap().reached, prepared.end);
        wal.row();
        wal.point("nightly", 400);
        let next = wal.commit(6, 500);
        assert_eq!(wal.scan(before(next.lsn)).stop.unwrap().reached, harm.end);
    }

    #[test]
    fn a_transaction_is_kept_or_with_exclusive_not() {
        let mut wal = Wal::new();
        let first = wal.commit(3, 100);
        let wanted = wal.commit(4, 200);
        let row = wal.row();
        let lost = wal.commit(5, 300);
        let found = wal.scan(xid(4, false));
        let stop = Stop { lsn: row.lsn, inclusive: false, read_to: row.end, reached: wanted.end };
        assert_eq!((found.stop, found.kept.unwrap().lsn, found.lost.unwrap().lsn), (Some(stop), wanted.lsn, lost.lsn));
        let found = wal.scan(xid(4, true));
        assert_eq!((found.stop.unwrap().lsn, found.kept.unwrap().lsn), (wanted.lsn, first.lsn));
        assert_eq!(found.lost.unwrap().lsn, wanted.lsn);
        assert_eq!(wal.scan(xid(77, false)).stop, None);
        // The last of all: there is no record to stop before.
        let stop = Stop { lsn: lost.lsn, inclusive: true, read_to: lost.end, reached: lost.end };
        assert_eq!(wal.scan(xid(5, false)).stop, Some(stop));
    }

    #[test]
    fn every_place_of_a_name_is_found() {
        let mut wal = Wal::new();
        let first = wal.point("nightly", 100);
        let row = wal.row();
        wal.commit(3, 150);
        let second = wal.point("nightly", 200);
        wal.point("nightly2", 300);
        let found = wal.scan(Goal::Name("nightly".into()));
        assert_eq!(found.named.iter().map(|n| n.0).collect::<Vec<_>>(), [first.end, second.end]);
        assert_eq!(found.stop.unwrap().lsn, row.lsn);
        assert_eq!(wal.scan(Goal::Name("night".into())).stop, None);
    }

    #[test]
    fn the_end_is_the_last_complete_record() {
        let mut wal = Wal::new();
        wal.commit(3, 100);
        let last = wal.commit(4, 200);
        let found = wal.scan(Goal::End);
        let stop = Stop { lsn: last.lsn, inclusive: true, read_to: last.end, reached: last.end };
        assert_eq!((found.stop, found.everything), (None, Some(stop)));
        assert!(found.ends_with_transaction);
        assert_eq!(found.last_ends, [Some(PgTime::from_micros(200)), Some(PgTime::from_micros(100))]);
        assert_eq!(found.lost, None);
    }
}
