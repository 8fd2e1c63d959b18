//! What each archived segment holds: where transactions end, and how many rows they changed in which minute.
//!
//! An index lies beside each whole segment (`index/<timeline>/<segment>`). It answers which place in the WAL a time is, and
//! what happened in an hour, without the WAL itself. It is derived: an agent that was killed may leave a segment without
//! one, and it can be made from the segment at any time. Nothing that a restore rests on is only here.

pub mod build;
pub mod format;

pub use build::Indexer;
pub use format::{IndexError, SegmentIndex};

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
}
