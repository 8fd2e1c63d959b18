//! The first and the last commit of a window: from when to when one can restore, by the server's clock. The index says it
//! where there is one.

use super::catalog::Window;
use super::cluster::ClusterIdentity;
use super::index::SegmentIndex;
use super::index::format::TransactionEnd;
use super::{RepoError, Repository};
use crate::decode::rmgr::xact;
use crate::decode::{Reader, Source, WalMajor};
use crate::pg::{BLOCK_SIZE, CommitPoint, Lsn, SegmentName, TimelineHistory};

/// Segments read in search of a commit. A server without any for so long wrote something else: a bulk load,
/// or an index; then the answer is "not known", and costs nobody minutes.
const SEGMENTS_MAX: u32 = 8;

/// Indexes read in search of a commit: a second or two of a store's latency.
const INDEXES_MAX: u32 = 128;

/// A commit record may reach into the next segment; one with thousands of subtransactions is as long as this.
const OVERLAP_BYTES: usize = 4 * BLOCK_SIZE;

impl Repository {
    /// The last transaction whose commit lies in the window; `None` if none is found in its last few segments, or if
    /// this version of walguard cannot read the WAL of the server's major.
    ///
    /// # Errors
    /// Of the store, and [`RepoError::Damaged`] if a segment cannot be read.
    pub async fn last_commit(
        &self,
        identity: &ClusterIdentity,
        path: &TimelineHistory,
        window: &Window,
    ) -> Result<Option<CommitPoint>, RepoError> {
        let Some(major) = WalMajor::of_server(identity.server_version) else { return Ok(None) };
        let size = identity.segment_size;
        let source = Source { major, segment_size: size, system_id: Some(identity.system_id) };
        let mut following = Vec::new();
        // The segment behind, if it was not read.
        let mut passed: Option<SegmentName> = None;
        let mut end = window.to;
        let (mut indexes, mut segments) = (0, 0);
        while indexes < INDEXES_MAX && segments < SEGMENTS_MAX {
            let Some(last_byte) = end.bytes().checked_sub(1).map(Lsn::new).filter(|lsn| *lsn >= window.from) else {
                break;
            };
            let number = size.segment_of(last_byte);
            let start = size.start_of(number);
            // The segment with a switch point is there on the newer timeline, unless that wrote nothing yet.
            let newest = SegmentName { timeline: path.file_timeline(number, size), number, size };
            let own = SegmentName { timeline: path.timeline_at(last_byte), number, size };
            if let Some(index) = self.index_if_whole(&newest, end).await? {
                indexes += 1;
                let commits = index.ends.iter().rev().filter_map(commit_of);
                if let Some(commit) = commits.into_iter().find(|commit| commit.end <= window.to) {
                    return Ok(Some(commit).filter(|commit| commit.lsn >= window.from));
                }
                passed = Some(newest);
                end = start;
                continue;
            }
            segments += 1;
            if let Some(behind) = passed.take() {
                let bytes = self.read_segment(&behind).await?.bytes;
                following = bytes.slice(..bytes.len().min(OVERLAP_BYTES)).to_vec();
            }
            let read = match self.read_segment(&newest).await {
                Err(error) if error.is_not_found() && own != newest => self.read_segment(&own).await?,
                read => read?,
            };
            let valid = usize::try_from(read.valid_to.min(end - start)).unwrap_or(usize::MAX).min(read.bytes.len());
            let bytes = read.bytes.slice(..valid);
            let overlap = std::mem::replace(&mut following, bytes.slice(..valid.min(OVERLAP_BYTES)).to_vec());
            let found = tokio::task::spawn_blocking(move || last_commit_in(source, start, &bytes, &overlap));
            if let Some(commit) = found.await.expect("reading WAL does not panic") {
                return Ok(Some(commit));
            }
            end = start;
        }
        Ok(None)
    }

    /// The first transaction whose commit lies in the window, at or behind its first place; `None` if none is found in its
    /// first few segments, or if this version of walguard cannot read the WAL of the server's major.
    ///
    /// # Errors
    /// As [`Repository::last_commit`].
    pub async fn first_commit(
        &self,
        identity: &ClusterIdentity,
        path: &TimelineHistory,
        window: &Window,
    ) -> Result<Option<CommitPoint>, RepoError> {
        let Some(major) = WalMajor::of_server(identity.server_version) else { return Ok(None) };
        let size = identity.segment_size;
        let source = Source { major, segment_size: size, system_id: Some(identity.system_id) };
        let is_inside = |commit: &CommitPoint| commit.lsn >= window.from && commit.end <= window.to;
        let mut reader: Option<Reader> = None;
        let (mut indexes, mut segments) = (0, 0);
        let mut start = size.start_of(size.segment_of(window.from));
        while start < window.to && indexes < INDEXES_MAX && segments < SEGMENTS_MAX {
            let number = size.segment_of(start);
            let (name, end) =
                (SegmentName { timeline: path.file_timeline(number, size), number, size }, size.end_of(number));
            // A commit that goes on from the segment before is read to its end.
            let is_between = reader.as_ref().is_none_or(Reader::is_between_records);
            if is_between
                && end <= window.to
                && let Some(index) = self.index_if_whole(&name, end).await?
            {
                indexes += 1;
                if let Some(commit) = index.ends.iter().filter_map(commit_of).find(is_inside) {
                    return Ok(Some(commit));
                }
                reader = None;
                start = end;
                continue;
            }
            segments += 1;
            let own = SegmentName { timeline: path.timeline_at(start), number, size };
            let read = match self.read_segment(&name).await {
                Err(error) if error.is_not_found() && own != name => self.read_segment(&own).await?,
                read => read?,
            };
            let valid = usize::try_from(read.valid_to.min(window.to.saturating_sub(start))).unwrap_or(usize::MAX);
            let bytes = read.bytes.slice(..valid.min(read.bytes.len()));
            let mut taken = reader.take().unwrap_or_else(|| Reader::at_page(source, start));
            let found = tokio::task::spawn_blocking(move || {
                taken.push(&bytes);
                let found = next_commits(&mut taken);
                (taken, found)
            });
            let (again, found) = found.await.expect("reading WAL does not panic");
            if let Some(commit) = found.into_iter().find(is_inside) {
                return Ok(Some(commit));
            }
            reader = Some(again);
            start = end;
        }
        Ok(None)
    }

    /// The index of a segment, if it has one and the segment is wanted up to its end. One that cannot be read is none: the
    /// segment itself is read then.
    async fn index_if_whole(&self, name: &SegmentName, end: Lsn) -> Result<Option<SegmentIndex>, RepoError> {
        if end != name.end() {
            return Ok(None);
        }
        match self.index(name).await {
            Err(RepoError::Damaged { .. }) => Ok(None),
            index => index,
        }
    }
}

/// The end of a transaction in an index, if it is a commit.
fn commit_of(end: &TransactionEnd) -> Option<CommitPoint> {
    let TransactionEnd { lsn, end, xid, time, committed, .. } = *end;
    xid.filter(|_| committed).map(|xid| CommitPoint { lsn, end, xid, time, committed })
}

/// The commits in what was pushed. WAL that cannot be read ends the search.
fn next_commits(reader: &mut Reader) -> Vec<CommitPoint> {
    let mut commits = Vec::new();
    while let Ok(Some(record)) = reader.next_record() {
        if let Ok(Some(transaction)) = xact::read(&record) {
            commits.extend(transaction.point(&record).filter(|commit| commit.committed));
        }
    }
    commits
}

/// The last commit that begins in `bytes`, which begin at `start`, a segment's beginning. WAL that cannot be read ends
/// the search: whoever restores will be told.
fn last_commit_in(source: Source, start: Lsn, bytes: &[u8], following: &[u8]) -> Option<CommitPoint> {
    let end = start + bytes.len() as u64;
    let mut reader = Reader::at_page(source, start);
    let mut last = None;
    for piece in bytes.chunks(64 << 10).chain([following]) {
        reader.push(piece);
        while let Ok(Some(record)) = reader.next_record() {
            if record.lsn >= end {
                return last;
            }
            if let Ok(Some(transaction)) = xact::read(&record)
                && let Some(commit) = transaction.point(&record).filter(|commit| commit.committed)
            {
                last = Some(commit);
            }
        }
    }
    last
}
