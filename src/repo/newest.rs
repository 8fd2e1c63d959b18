//! The last commit that the repository holds of a timeline: the latest moment that can be restored, by the server's clock.

use super::catalog::Window;
use super::cluster::ClusterIdentity;
use super::{RepoError, Repository};
use crate::decode::rmgr::xact;
use crate::decode::{Reader, Source, WalMajor};
use crate::pg::{BLOCK_SIZE, CommitPoint, Lsn, SegmentName, TimelineHistory};

/// Segments read backwards in search of a commit. A server without any for so long wrote something else: a bulk load,
/// or an index; then the answer is "not known", and costs nobody minutes.
const SEGMENTS_MAX: u32 = 8;

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
        let mut end = window.to;
        for _ in 0..SEGMENTS_MAX {
            let Some(last_byte) = end.bytes().checked_sub(1).map(Lsn::new).filter(|lsn| *lsn >= window.from) else {
                break;
            };
            let number = size.segment_of(last_byte);
            let start = size.start_of(number);
            // The segment with a switch point is there on the newer timeline, unless that wrote nothing yet.
            let newest = SegmentName { timeline: path.file_timeline(number, size), number, size };
            let own = SegmentName { timeline: path.timeline_at(last_byte), number, size };
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
