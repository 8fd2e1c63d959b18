//! Where an archive stands when an agent starts: found in the repository, never remembered anywhere else.

use futures_util::TryStreamExt as _;

use super::plan::Tail;
use crate::pg::{Lsn, Position, SegmentName, TimelineHistory};
use crate::repo::catalog::{Catalog, CatalogScope, LsnRange, LsnRanges};
use crate::repo::layout::Object;
use crate::repo::{RepoError, Repository};

/// Where to go on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The archive is whole up to here; `None` if there is no WAL of this cluster in it.
    pub archived: Option<Position>,
    /// Tails of the segment that `archived` lies in.
    pub tails: Vec<Tail>,
    /// Tails of segments that are there as a whole: whoever put them was stopped before it deleted the tails.
    pub obsolete: Vec<Tail>,
}

/// Segments before the archived position that are looked at for tails left behind: more than are ever uploaded at once.
const LEFTOVER_SEGMENTS: u64 = 64;

/// Finds how far the archive reaches without a hole along `path`, the server's own history.
///
/// `hint` is a position that the archive should reach: what the slot keeps begins there. With it a short listing is
/// enough; without it, or when the archive does not reach so far, everything is listed.
///
/// # Errors
/// Of the repository.
pub async fn find(repo: &Repository, path: &TimelineHistory, hint: Option<Lsn>) -> Result<Start, RepoError> {
    if let Some(hint) = hint.filter(|lsn| !lsn.is_zero()) {
        let before = Lsn::new(hint.bytes() - 1);
        let catalog = repo.catalog(CatalogScope::WalFrom(before)).await?;
        let reach = covered(&catalog, path).contiguous_to(before);
        if reach >= hint {
            return start_at(repo, &catalog, path, reach).await;
        }
    }
    let catalog = repo.catalog(CatalogScope::Everything).await?;
    match reach(&catalog, path) {
        Some(reach) => start_at(repo, &catalog, path, reach).await,
        None => Ok(Start::default()),
    }
}

/// What is archived along `path`, or known to be missing.
fn covered(catalog: &Catalog, path: &TimelineHistory) -> LsnRanges {
    let size = catalog.identity.segment_size;
    let mut covered = LsnRanges::default();
    let clip = |timeline, from: Lsn, to: Lsn| {
        // A promoted server begins its timeline with a copy of the segment in which the old one ended.
        let begin: Lsn = path.begin_of(timeline)?;
        Some(LsnRange { from: from.max(begin.align_down(size.bytes())), to: to.min(path.end_of(timeline)?) })
    };
    let wal = catalog.timelines.iter().flat_map(|(t, wal)| wal.ranges.as_slice().iter().map(|r| (*t, r.from, r.to)));
    let gaps = catalog.gaps.iter().map(|gap| (gap.timeline, gap.from, gap.to));
    for (timeline, from, to) in wal.chain(gaps) {
        if let Some(range) = clip(timeline, from, to) {
            covered.insert(range);
        }
    }
    covered
}

/// The first hole that nobody explained, or the end. Looked for from the newest base backup on: what lies before it may
/// have been thinned out by `expire`.
fn reach(catalog: &Catalog, path: &TimelineHistory) -> Option<Lsn> {
    let covered = covered(catalog, path);
    let first = covered.as_slice().first()?.from;
    let backup = catalog.backups_on(path).map(|backup| backup.start).max();
    Some(covered.contiguous_to(backup.unwrap_or(first).max(first)))
}

async fn start_at(
    repo: &Repository,
    catalog: &Catalog,
    path: &TimelineHistory,
    reach: Lsn,
) -> Result<Start, RepoError> {
    let size = catalog.identity.segment_size;
    let timeline = path.timeline_at(reach);
    let name = SegmentName::at(timeline, reach, size);
    // At a switch point the bytes before it may be there on the old timeline only; the new one begins its segment anew.
    let own = catalog.timelines.get(&timeline).map_or(name.start(), |wal| wal.ranges.contiguous_to(name.start()));
    let archived = Position { timeline, lsn: own.min(reach).max(name.start()) };

    let mut start = Start { archived: Some(archived), ..Start::default() };
    let first = size.start_of(name.number).bytes().saturating_sub(LEFTOVER_SEGMENTS * size.bytes());
    let first = SegmentName::at(timeline, Lsn::new(first), size);
    let folder = repo.layout().timeline_folder(timeline);
    let objects = repo.objects(folder, Some(repo.layout().before_segment(&first)));
    let (mut tails, mut whole) = (Vec::new(), Vec::new());
    let mut objects = std::pin::pin!(objects);
    while let Some(object) = objects.try_next().await? {
        match repo.layout().parse(&object.key, size) {
            Some(Object::Tail { segment, from, to }) => {
                let at = |offset: u32| segment.start() + u64::from(offset);
                tails.push(Tail::new(segment, at(from), at(to)));
            }
            Some(Object::Segment(segment)) => whole.push(segment.number),
            _ => {}
        }
    }
    for tail in tails {
        if whole.contains(&tail.name.number) {
            start.obsolete.push(tail);
        } else if tail.name.number == name.number {
            start.tails.push(tail);
        }
    }
    Ok(start)
}
