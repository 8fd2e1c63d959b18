//! Indexes of a group of segments -> one object.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::level::{Group, Level, Span};
use super::merged::{MergedIndex, Merger};
use crate::pg::{SegmentName, SegmentNumber};
use crate::repo::layout::Object;
use crate::repo::store::Created;
use crate::repo::{RepoError, Repository};

/// Indexes read at once. Each is in memory as a whole, and some megabytes at most.
const READS_MAX: usize = 4;

/// What became of merging a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// Its object is there now, and was not before.
    New,
    /// Its object was there already.
    Exists,
    /// There may be more WAL of it yet to come.
    Open,
    /// This segment of it is archived and has no index, or one that cannot be read.
    Lacks(SegmentName),
    /// Nothing of it has an index.
    Empty,
}

impl Repository {
    /// Merges the groups that end with `segment`, whose index was just put. Costs nothing for most segments.
    ///
    /// # Errors
    /// Of the store.
    pub async fn merge_indexes_after(&self, segment: &SegmentName) -> Result<(), RepoError> {
        for level in Level::ALL {
            let group = Group::of(segment, level);
            if group.span().to != segment.number.get() + 1 {
                break;
            }
            match self.merge_indexes(&group).await? {
                Merge::New | Merge::Exists => {}
                Merge::Lacks(segment) => {
                    tracing::debug!(%segment, "has no index: its group is not merged");
                    break;
                }
                Merge::Open | Merge::Empty => break,
            }
        }
        Ok(())
    }

    /// Merges the indexes of a group if all its archived segments have one and no more are to come.
    ///
    /// # Errors
    /// Of the store.
    pub async fn merge_indexes(&self, group: &Group) -> Result<Merge, RepoError> {
        let lookup = self.lookup(crate::pg::TimelineHistory::root(group.timeline), group.size);
        let span = group.span();
        if !lookup.list_groups(group.timeline, group.level, span).await?.is_empty() {
            return Ok(Merge::Exists);
        }
        let name = |number: u64| SegmentName { number: SegmentNumber::new(number), ..group.first() };
        let mut merger = Merger::new(*group);
        let mut bare = Vec::new();
        let mut at = span.from;
        if let Some(level) = group.level.below() {
            let parts = lookup.list_groups(group.timeline, level, span).await?;
            if parts.is_empty() {
                return Ok(Merge::Empty);
            }
            for part in &parts {
                bare.push(Span { from: at, to: part.span().from });
                at = part.span().to;
            }
            bare.push(Span { from: at, to: span.to });
            if let Some(lacks) = self.first_archived(group, &bare).await? {
                return Ok(Merge::Lacks(lacks));
            }
            let mut reads = stream::iter(parts)
                .map(|part| async move { Ok::<_, RepoError>((part, readable(self.merged_index(&part).await)?)) })
                .buffered(READS_MAX);
            while let Some((part, index)) = reads.try_next().await? {
                let Some(index) = index else { return Ok(Merge::Lacks(part.first())) };
                merger.merged(&part, &index);
            }
        } else {
            let segments = lookup.list_segments(group.timeline, span).await?;
            if segments.is_empty() {
                return Ok(Merge::Empty);
            }
            for segment in &segments {
                bare.push(Span { from: at, to: segment.number.get() });
                at = segment.number.get() + 1;
            }
            bare.push(Span { from: at, to: span.to });
            if let Some(lacks) = self.first_archived(group, &bare).await? {
                return Ok(Merge::Lacks(lacks));
            }
            let mut reads = stream::iter(segments)
                .map(|segment| async move { Ok::<_, RepoError>((segment, readable(self.index(&segment).await)?)) })
                .buffered(READS_MAX);
            while let Some((segment, index)) = reads.try_next().await? {
                let Some(index) = index else { return Ok(Merge::Lacks(segment)) };
                merger.segment(&segment, &index);
            }
        }
        // What is not archived at its end may be yet to come.
        if at < span.to && !self.is_archived_from(&name(span.to)).await? {
            return Ok(Merge::Open);
        }
        let Some(index) = merger.finish() else { return Ok(Merge::Empty) };
        match self.put_merged_index(group, &index).await? {
            Created::New => Ok(Merge::New),
            Created::Exists => Ok(Merge::Exists),
        }
    }

    /// Puts what the indexes of a group say. An object that is there already stays: it was made from the same indexes.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_merged_index(&self, group: &Group, index: &MergedIndex) -> Result<Created, RepoError> {
        Ok(self.store().create(&self.layout().merged(group), index.encode().into()).await?)
    }

    /// Removes the merged indexes that tell of `segment`, because its index was made anew.
    ///
    /// # Errors
    /// Of the store.
    pub async fn remove_merged_indexes_of(&self, segment: &SegmentName) -> Result<(), RepoError> {
        // The largest first: what is left half done says nothing that is not so.
        for level in Level::ALL.into_iter().rev() {
            self.store().delete(&self.layout().merged(&Group::of(segment, level))).await?;
        }
        Ok(())
    }

    /// The first whole segment that is archived of these.
    async fn first_archived(&self, group: &Group, spans: &[Span]) -> Result<Option<SegmentName>, RepoError> {
        let layout = self.layout();
        for span in spans.iter().filter(|span| !span.is_empty()) {
            let first = SegmentName { number: SegmentNumber::new(span.from), ..group.first() };
            let folder = layout.timeline_folder(group.timeline);
            let mut behind = std::pin::pin!(self.objects(folder, Some(layout.before_segment(&first))));
            while let Some(object) = behind.try_next().await? {
                match layout.parse(&object.key, group.size) {
                    Some(Object::Segment(found) | Object::Tail { segment: found, .. })
                        if found.number.get() >= span.to =>
                    {
                        break;
                    }
                    Some(Object::Segment(found)) if found.number >= first.number => return Ok(Some(found)),
                    _ => {}
                }
            }
        }
        Ok(None)
    }

    /// True if WAL of the timeline is archived that lies in `segment` or behind it.
    async fn is_archived_from(&self, segment: &SegmentName) -> Result<bool, RepoError> {
        let layout = self.layout();
        let folder = layout.timeline_folder(segment.timeline);
        let mut behind = std::pin::pin!(self.objects(folder, Some(layout.before_segment(segment))));
        while let Some(object) = behind.try_next().await? {
            let found = match layout.parse(&object.key, segment.size) {
                Some(Object::Segment(found) | Object::Tail { segment: found, .. }) => found.number >= segment.number,
                _ => false,
            };
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// An index that cannot be read counts as one that is not there.
fn readable<T>(read: Result<Option<T>, RepoError>) -> Result<Option<T>, RepoError> {
    match read {
        Err(RepoError::Damaged { key, problem }) => {
            tracing::warn!(key, "an index cannot be read: {problem}; `walguard index rebuild --check` makes it anew");
            Ok(None)
        }
        read => read,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SIZE, archive, index_of, name, root};
    use super::*;
    use crate::repo::catalog::LsnRange;

    fn group(level: usize, number: u64) -> Group {
        Group { number, ..Group::of(&name(0), Level::ALL[level]) }
    }

    async fn there(repo: &Repository, level: usize, groups: u64) -> Vec<u64> {
        let mut found = Vec::new();
        for number in 0..groups {
            if repo.merged_index(&group(level, number)).await.unwrap().is_some() {
                found.push(number);
            }
        }
        found
    }

    #[tokio::test]
    async fn groups_are_merged_as_their_last_segment_gets_its_index() {
        let repo = archive(0..300, &[]).await;
        for number in (0..300).filter(|number| *number != 37) {
            repo.put_index(&name(number), &index_of(number, &[(5, 1)])).await.unwrap();
            repo.merge_indexes_after(&name(number)).await.unwrap();
        }
        let expected: Vec<u64> = (0..18).filter(|number| *number != 2).collect();
        assert_eq!(there(&repo, 0, 20).await, expected, "all whole ones but that of segment 37");
        assert_eq!(there(&repo, 1, 2).await, [] as [u64; 0]);
        assert_eq!(repo.merge_indexes(&group(0, 2)).await.unwrap(), Merge::Lacks(name(37)));
        assert_eq!(repo.merge_indexes(&group(1, 0)).await.unwrap(), Merge::Lacks(name(32)));

        repo.put_index(&name(37), &index_of(37, &[(5, 1)])).await.unwrap();
        assert_eq!(repo.merge_indexes(&group(0, 2)).await.unwrap(), Merge::New);
        assert_eq!(repo.merge_indexes(&group(0, 2)).await.unwrap(), Merge::Exists);
        assert_eq!(repo.merge_indexes(&group(1, 0)).await.unwrap(), Merge::New);
        assert_eq!(repo.merged_index(&group(1, 0)).await.unwrap().unwrap().summary().commits, 256);
    }

    #[tokio::test]
    async fn a_group_with_a_hole_in_its_wal_is_merged_once_wal_goes_on_behind_it() {
        let indexes: Vec<_> = (0..10).map(|number| (number, index_of(number, &[(5, 1)]))).collect();
        let repo = archive(0..10, &indexes).await;
        assert_eq!(repo.merge_indexes(&group(0, 0)).await.unwrap(), Merge::Open);
        assert_eq!(repo.merge_indexes(&group(0, 1)).await.unwrap(), Merge::Empty);
        for number in 20..24 {
            repo.store().create(&repo.layout().segment(&name(number)), "wal".into()).await.unwrap();
            repo.put_index(&name(number), &index_of(number, &[(5, 1)])).await.unwrap();
        }
        assert_eq!(repo.merge_indexes(&group(0, 0)).await.unwrap(), Merge::New);
        assert_eq!(repo.merge_indexes(&group(0, 1)).await.unwrap(), Merge::Open);
        let range = LsnRange { from: name(0).start(), to: name(24).start() };
        let (summary, unindexed) = repo.lookup(root(), SIZE).summary(range).await.unwrap();
        assert_eq!(summary.commits, 14);
        assert_eq!(unindexed.iter().map(|hole| (hole.first, hole.segments)).collect::<Vec<_>>(), [(name(10), 10)]);
    }
}
