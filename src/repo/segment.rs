//! One segment read back: whole, or put together from its tails.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::layout::Object;
use super::store::{ObjectInfo, StoreError};
use super::{RepoError, Repository, SMALL_READS_MAX, frame};
use crate::pg::SegmentName;

/// How often a segment is looked at anew because its tails were replaced by the whole while they were read.
const SEGMENT_READ_TRIES: u32 = 5;

/// WAL of one segment, as far as it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentRead {
    /// The segment's bytes, always as many as a segment has: what is not there is zero.
    pub bytes: Bytes,
    /// So many bytes from the beginning are WAL.
    pub valid_to: u64,
    /// Where they came from.
    pub source: SegmentSource,
}

/// What a segment was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentSource {
    /// The whole segment's object.
    Whole,
    /// The tails of a segment that was never finished, or is not yet.
    Tails,
}

impl Repository {
    /// Reads a whole segment or, if that is not there, puts together what its tails hold.
    ///
    /// # Errors
    /// [`RepoError::Store`] with [`StoreError::NotFound`] if nothing of the segment is there (not even its beginning);
    /// [`RepoError::Damaged`] if an object does not give its content back; of the store.
    pub async fn read_segment(&self, name: &SegmentName) -> Result<SegmentRead, RepoError> {
        let key = self.layout.segment(name);
        for _ in 0..SEGMENT_READ_TRIES {
            match self.store.read(&key, None).await {
                Ok(stored) => {
                    let bytes = self.unpack(&key, stored, name.size.bytes()).await?;
                    return Ok(SegmentRead { bytes, valid_to: name.size.bytes(), source: SegmentSource::Whole });
                }
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            // A tail that disappears was just replaced by the whole segment: look again.
            if let Some(read) = self.read_tails(name).await? {
                return Ok(read);
            }
        }
        Err(StoreError::NotFound { key }.into())
    }

    /// What is there of a segment from byte `from` of it on, without a hole; `None` if nothing is. Reads only the tails that
    /// it needs, for those who look again and again.
    ///
    /// # Errors
    /// As [`Repository::read_segment`], but for what is not there.
    pub async fn read_segment_from(&self, name: &SegmentName, from: u64) -> Result<Option<Bytes>, RepoError> {
        let folder = self.layout.tail_folder(name);
        let listed: Vec<ObjectInfo> = self.objects(folder, None).try_collect().await?;
        let mut tails: Vec<(u64, u64, String)> = Vec::new();
        for object in listed {
            if let Some(Object::Tail { from, to, .. }) = self.layout.parse(&object.key, name.size) {
                tails.push((from.into(), to.into(), object.key));
            }
        }
        let mut found = Vec::new();
        let mut reached = from;
        loop {
            let reaching = tails.iter().filter(|(begin, end, _)| *begin <= reached && reached < *end);
            let Some((begin, end, key)) = reaching.max_by_key(|(_, end, _)| *end) else { break };
            let stored = match self.store.read(key, None).await {
                Ok(stored) => stored,
                // The whole segment has just replaced it.
                Err(StoreError::NotFound { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            let content = self.unpack(key, stored, end - begin).await?;
            let skip = usize::try_from(reached - begin).unwrap_or(usize::MAX);
            found.extend_from_slice(content.get(skip..).unwrap_or_default());
            reached = *end;
        }
        if found.is_empty() {
            let key = self.layout.segment(name);
            let stored = match self.store.read(&key, None).await {
                Ok(stored) => stored,
                Err(StoreError::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let content = self.unpack(&key, stored, name.size.bytes()).await?;
            let skip = usize::try_from(from).unwrap_or(usize::MAX).min(content.len());
            return Ok(Some(content.slice(skip..)).filter(|rest| !rest.is_empty()));
        }
        Ok(Some(found.into()))
    }

    /// `None` if a listed tail is gone. An error if there are none.
    async fn read_tails(&self, name: &SegmentName) -> Result<Option<SegmentRead>, RepoError> {
        let folder = self.layout.tail_folder(name);
        let listed: Vec<ObjectInfo> = self.objects(folder, None).try_collect().await?;
        let tails: Vec<(u32, u32)> = listed
            .iter()
            .filter_map(|object| match self.layout.parse(&object.key, name.size) {
                Some(Object::Tail { from, to, .. }) => Some((from, to)),
                _ => None,
            })
            .collect();
        let chain = tail_chain(&tails);
        if chain.is_empty() {
            return Err(StoreError::NotFound { key: self.layout.segment(name) }.into());
        }
        let size = usize::try_from(name.size.bytes()).expect("a segment fits into memory");
        let mut bytes = vec![0; size];
        let mut valid_to: usize = 0;
        let mut reads = stream::iter(chain)
            .map(|(from, to)| async move {
                let key = self.layout.tail(name, from, to);
                let stored = match self.store.read(&key, None).await {
                    Ok(stored) => stored,
                    Err(StoreError::NotFound { .. }) => return Ok(None),
                    Err(error) => return Err(RepoError::from(error)),
                };
                let content = self.unpack(&key, stored, u64::from(to - from)).await?;
                Ok(Some((key, from as usize, content)))
            })
            .buffered(SMALL_READS_MAX);
        while let Some(read) = reads.try_next().await? {
            let Some((key, from, content)) = read else { return Ok(None) };
            let damaged = |problem: &str| RepoError::Damaged { key: key.clone(), problem: problem.to_owned() };
            let place = bytes
                .get_mut(from..from + content.len())
                .ok_or_else(|| damaged("holds bytes that lie outside of its segment"))?;
            let known = valid_to.saturating_sub(from).min(content.len());
            if place[..known] != content[..known] {
                return Err(damaged("holds other bytes than the tail before it, where they overlap"));
            }
            place.copy_from_slice(&content);
            valid_to = valid_to.max(from + content.len());
        }
        Ok(Some(SegmentRead { bytes: bytes.into(), valid_to: valid_to as u64, source: SegmentSource::Tails }))
    }

    /// The content of a frame that must hold exactly `length` bytes.
    async fn unpack(&self, key: &str, stored: Bytes, length: u64) -> Result<Bytes, RepoError> {
        let limit = usize::try_from(length).expect("an object fits into memory");
        let content = tokio::task::spawn_blocking(move || frame::decompress(&stored, limit))
            .await
            .expect("decompression does not panic")
            .map_err(|error| RepoError::Damaged { key: key.to_owned(), problem: error.to_string() })?;
        if content.len() != limit {
            let problem = format!("holds {} bytes instead of {length}", content.len());
            return Err(RepoError::Damaged { key: key.to_owned(), problem });
        }
        Ok(content.into())
    }
}

/// The tails to read, in order, so that together they cover as much as can be covered without a hole from 0: at each
/// step the one that reaches furthest.
fn tail_chain(tails: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut chain = Vec::new();
    let mut reached = 0;
    while let Some(&best) = tails.iter().filter(|(from, to)| *from <= reached && *to > reached).max_by_key(|t| t.1) {
        chain.push(best);
        reached = best.1;
    }
    chain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{repository, segment};
    use super::*;

    fn content() -> Vec<u8> {
        (0..1u32 << 18).flat_map(u32::to_le_bytes).collect()
    }

    async fn put_tail(repo: &Repository, from: u32, to: u32, content: &[u8]) {
        let key = repo.layout().tail(&segment(), from, to);
        repo.store().create(&key, frame::compress(content, 1).into()).await.unwrap();
    }

    #[tokio::test]
    async fn a_segment_is_put_together_from_its_tails_as_far_as_they_reach() {
        let repo = repository();
        let content = content();
        let slice = |from: u32, to: u32| &content[from as usize..to as usize];
        assert!(repo.read_segment(&segment()).await.unwrap_err().is_not_found());
        // Overlaps, one that another contains, and one behind a hole.
        for (from, to) in [(0, 1000), (500, 3000), (600, 2000), (3000, 3001), (9000, 9500)] {
            put_tail(&repo, from, to, slice(from, to)).await;
        }
        let read = repo.read_segment(&segment()).await.unwrap();
        assert_eq!((read.valid_to, read.source, read.bytes.len()), (3001, SegmentSource::Tails, 1 << 20));
        assert_eq!(&read.bytes[..3001], slice(0, 3001));
        assert!(read.bytes[3001..].iter().all(|byte| *byte == 0));

        repo.store().create(&repo.layout().segment(&segment()), frame::compress(&content, 3).into()).await.unwrap();
        let read = repo.read_segment(&segment()).await.unwrap();
        assert_eq!((read.valid_to, read.source), (1 << 20, SegmentSource::Whole));
        assert_eq!(read.bytes, content);
    }

    #[tokio::test]
    async fn tails_that_contradict_each_other_are_damage() {
        let repo = repository();
        put_tail(&repo, 0, 100, &[1; 100]).await;
        put_tail(&repo, 50, 200, &[2; 150]).await;
        let error = repo.read_segment(&segment()).await.unwrap_err();
        assert!(
            matches!(&error, RepoError::Damaged { key, .. } if key.ends_with("00000032-000000c8.zst")),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn an_object_that_holds_too_little_or_too_much_is_damage() {
        for length in [0, 99, 101] {
            let repo = repository();
            put_tail(&repo, 0, 100, &vec![1; length]).await;
            assert!(matches!(repo.read_segment(&segment()).await, Err(RepoError::Damaged { .. })), "{length}");
        }
        let repo = repository();
        repo.store().create(&repo.layout().segment(&segment()), frame::compress(b"short", 1).into()).await.unwrap();
        assert!(matches!(repo.read_segment(&segment()).await, Err(RepoError::Damaged { .. })));
    }

    proptest! {
        /// The chain reaches as far as the tails do without a hole.
        #[test]
        fn a_chain_of_tails_reaches_as_far_as_it_can(tails in proptest::collection::vec((0u32..40, 1u32..15), 0..12)) {
            let tails: Vec<(u32, u32)> = tails.into_iter().map(|(from, length)| (from, from + length)).collect();
            let covered = |at: u32| tails.iter().any(|(from, to)| *from <= at && at < *to);
            let expected = (0..).find(|at| !covered(*at)).unwrap();
            let chain = tail_chain(&tails);
            let mut reached = 0;
            for (from, to) in &chain {
                prop_assert!(*from <= reached && *to > reached, "{:?}", chain);
                reached = *to;
            }
            prop_assert_eq!(reached, expected);
        }
    }
}
