//! Which files hold the WAL of a path through timelines. Pure.

use crate::pg::{Lsn, SegmentName, SegmentNumber, TimelineHistory, TimelineId};
use crate::repo::catalog::Catalog;

/// Every timeline of a path, oldest first.
fn timelines(path: &TimelineHistory) -> impl DoubleEndedIterator<Item = TimelineId> + '_ {
    path.ancestors().iter().map(|ancestor| ancestor.timeline).chain([path.timeline()])
}

/// The file that holds the most of a segment along `path`, and how far it does; `None` if its beginning is nowhere.
///
/// The segment with a switch point is begun again by the new timeline, with the same bytes before the switch; where that
/// file is not archived, the old timeline's serves up to the switch.
pub(super) fn file_of(catalog: &Catalog, path: &TimelineHistory, segment: SegmentNumber) -> Option<(SegmentName, Lsn)> {
    let size = catalog.identity.segment_size;
    let (start, end) = (size.start_of(segment), size.end_of(segment));
    timelines(path)
        .filter(|timeline| path.begin_of(*timeline).is_some_and(|begin| size.segment_of(begin) <= segment))
        .filter_map(|timeline| {
            let reach = catalog.timelines.get(&timeline)?.ranges.contiguous_to(start);
            let reach = reach.min(path.end_of(timeline)?).min(end);
            (reach > start).then_some((SegmentName { timeline, number: segment, size }, reach))
        })
        .max_by_key(|(name, reach)| (*reach, name.timeline))
}

/// The timeline that recovery has to follow to read the record `[lsn, end)`: the one that wrote it or, where its file is
/// not whole, the first later one that holds the record.
pub(super) fn recovery_timeline(catalog: &Catalog, path: &TimelineHistory, lsn: Lsn, end: Lsn) -> TimelineId {
    let owner = path.timeline_at(lsn);
    let start = lsn.align_down(catalog.identity.segment_size.bytes());
    timelines(path)
        .filter(|timeline| *timeline >= owner)
        .find(|timeline| {
            let ranges = catalog.timelines.get(timeline).map(|wal| &wal.ranges);
            ranges.is_some_and(|ranges| ranges.contiguous_to(start) >= end)
        })
        .unwrap_or_else(|| path.timeline())
}

/// How far the repository's WAL of `path` is known to go, holes or not.
pub(super) fn known_end(catalog: &Catalog, path: &TimelineHistory) -> Lsn {
    let own = timelines(path).filter_map(|timeline| {
        let end = catalog.timelines.get(&timeline)?.ranges.end()?;
        Some(end.min(path.end_of(timeline)?))
    });
    // A timeline that has a history began, even if nothing of it is archived yet.
    own.chain(path.begin_of(path.timeline())).max().unwrap_or_default()
}
