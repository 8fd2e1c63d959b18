//! What each archived segment holds: where transactions end, and how many rows they changed in which minute.
//!
//! An index lies beside each whole segment (`index/<timeline>/<segment>`). It answers which place in the WAL a time is, and
//! what happened in an hour, without the WAL itself. It is derived: an agent that was killed may leave a segment without
//! one, and it can be made from the segment at any time. Nothing that a restore rests on is only here.
//!
//! The indexes of 16 segments that follow each other are merged into one object, of 256 into another, of 4,096 and 65,536
//! ([`Level`]), so that a year of WAL is found in a few reads ([`Lookup`]).

pub mod build;
pub mod chronicle;
pub mod format;
pub mod level;
pub mod lookup;
pub mod merge;
pub mod merged;
pub mod rebuild;
pub mod summary;
pub mod survey;
pub mod walk;

pub use build::{Indexer, Seen};
pub use format::{IndexError, SegmentIndex};
pub use level::{Group, Level, Span};
pub use lookup::{Activity, Found, Lookup, Unindexed, Wanted};
pub use merge::Merge;
pub use merged::{MergedIndex, Merger};
pub use summary::{Commit, Summary};

use super::store::{Created, StoreError};
use super::{RepoError, Repository};
use crate::pg::SegmentName;

impl Repository {
    /// Puts a segment's index. One that is there already stays: it was made from the same segment.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_index(&self, segment: &SegmentName, index: &SegmentIndex) -> Result<Created, RepoError> {
        let stored = index.encode(segment);
        Ok(self.store().create(&self.layout().index(segment), stored.into()).await?)
    }

    /// A segment's index; `None` if it has none.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn index(&self, segment: &SegmentName) -> Result<Option<SegmentIndex>, RepoError> {
        let key = self.layout().index(segment);
        let stored = match self.store().read(&key, None).await {
            Ok(stored) => stored,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match SegmentIndex::decode(&stored, segment) {
            Ok(index) => Ok(Some(index)),
            Err(error) => Err(RepoError::Damaged { key, problem: error.to_string() }),
        }
    }

    /// Removes an index that cannot be read, so that another can be put.
    ///
    /// # Errors
    /// Of the store.
    pub async fn remove_index(&self, segment: &SegmentName) -> Result<(), RepoError> {
        Ok(self.store().delete(&self.layout().index(segment)).await?)
    }

    /// What the indexes of a group of segments say, in short; `None` if they were not merged.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn merged_index(&self, group: &Group) -> Result<Option<MergedIndex>, RepoError> {
        let key = self.layout().merged(group);
        let stored = match self.store().read(&key, None).await {
            Ok(stored) => stored,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match MergedIndex::decode(&stored, group) {
            Ok(index) => Ok(Some(index)),
            Err(error) => Err(RepoError::Damaged { key, problem: error.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::format::{CommittedDdl, LargeTransaction, MinuteTally, RestorePoint, TransactionEnd};
    use super::*;
    use crate::decode::change::RowCounts;
    use crate::detect::{DdlEvent, DdlKind, Persistence, Relation, RelationKind};
    use crate::pg::{Lsn, Oid, PgTime, RelFile, SegmentNumber, SegmentSize, TimelineHistory, TimelineId, Xid};
    use crate::repo::catalog::LsnRange;

    pub(super) const SIZE: SegmentSize = match SegmentSize::new(1 << 20) {
        Ok(size) => size,
        Err(_) => SegmentSize::DEFAULT,
    };

    /// More than any archive of a test.
    pub(super) const RANGE: LsnRange = LsnRange { from: Lsn::ZERO, to: Lsn::new(1 << 32) };

    pub(super) fn name(number: u64) -> SegmentName {
        SegmentName { timeline: TimelineId::FIRST, number: SegmentNumber::new(number), size: SIZE }
    }

    pub(super) const fn root() -> TimelineHistory {
        TimelineHistory::root(TimelineId::FIRST)
    }

    /// An index of a segment that begins a minute after the one before, and in which transactions ended: each so many
    /// microseconds later, with rows in table 20,000 and more, if its number is not 0; then it was rolled back.
    pub(super) fn index_of(number: u64, happened: &[(i64, u32)]) -> SegmentIndex {
        let mut index = SegmentIndex { records: happened.len() as u64, ..SegmentIndex::default() };
        for (place, (later, table)) in (0_u32..).zip(happened) {
            let lsn = name(number).start() + 100 * 8 * (1 + u64::from(place));
            let time = PgTime::from_micros(number as i64 * 60_000_000 + later);
            let xid = Xid::new(number as u32 * 10 + place + 3);
            let committed = *table != 0;
            index.last = Some((lsn, lsn + 64));
            index.ends_with_transaction = true;
            index.latest = index.latest.max(Some(time));
            index.ends.push(TransactionEnd { lsn, end: lsn + 64, xid, time, committed, subtransactions: vec![] });
            if !committed {
                continue;
            }
            let file = RelFile { tablespace: Oid(1663), database: Oid(5), number: 20_000 + table };
            let rows = RowCounts { inserted: number, deleted: u64::from(*table), ..RowCounts::default() };
            let minute = time.micros().div_euclid(60_000_000);
            for (file, rows) in [(None, RowCounts::default()), (Some(file), rows)] {
                index.minutes.push(MinuteTally { minute, file, transactions: 1, rows });
            }
            let relation = Arc::new(Relation {
                database: Oid(5),
                oid: Oid(*table),
                database_name: "shop".into(),
                schema: "public".into(),
                name: format!("table{table}"),
                kind: RelationKind::Table,
                persistence: Persistence::Permanent,
                owner: None,
            });
            if !index.names.iter().any(|(other, _)| *other == file) {
                index.names.push((file, relation.clone()));
            }
            let large = LargeTransaction { begin: lsn, lsn, xid, time, files: vec![(file, rows)], is_complete: true };
            index.largest.push(large);
            if *table == 4 {
                let kind = if number.is_multiple_of(2) { DdlKind::Truncate } else { DdlKind::Create };
                let event = DdlEvent { kind, lsn, database: Oid(5), relation: Some(relation), object: None };
                index.events.push(CommittedDdl { commit: lsn, xid, time, event });
                index.restore_points.push(RestorePoint { lsn, end: lsn + 64, time, name: b"noon".to_vec() });
            }
        }
        index
    }

    /// A repository with this WAL (which is none) and these indexes.
    pub(super) async fn archive(wal: std::ops::Range<u64>, indexes: &[(u64, SegmentIndex)]) -> Repository {
        let repo = crate::repo::tests::repository();
        for number in wal {
            repo.store().create(&repo.layout().segment(&name(number)), "wal".into()).await.unwrap();
        }
        for (number, index) in indexes {
            assert_eq!(repo.put_index(&name(*number), index).await.unwrap(), Created::New);
        }
        repo
    }
}
