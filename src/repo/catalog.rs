//! What the repository holds, as one value: WAL by timeline, base backups, gaps; and what can be restored from it.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;

use super::cluster::ClusterIdentity;
use super::gap::Gap;
use crate::pg::{
    Lsn, PgTime, Position, SegmentName, SegmentSize, ServerVersion, SystemId, TimelineHistory, TimelineId,
};
use crate::proto;

/// How much of the repository to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CatalogScope {
    /// All of it. Lists every WAL object: some seconds for a million.
    Everything,
    /// Backups, histories and gaps; of the WAL, on every timeline, only the segment that holds this position and what
    /// comes after.
    WalFrom(Lsn),
    /// Backups, histories and gaps; no WAL.
    WithoutWal,
}

/// What the repository held when it was listed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Catalog {
    /// Whose it is.
    pub identity: ClusterIdentity,
    /// The timelines that WAL or a history was found of.
    pub timelines: BTreeMap<TimelineId, TimelineWal>,
    /// Complete base backups, by start position (then timeline, then label).
    pub backups: Vec<BackupInfo>,
    /// WAL known to be missing, in order of timeline and position.
    pub gaps: Vec<Gap>,
    /// Histories, manifests and gaps that could not be read. What they would have told is not in the catalog.
    pub damaged: Vec<Damage>,
}

/// An object that does not give its content back, or not a possible one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Damage {
    /// Its key.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The WAL of one timeline.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TimelineWal {
    /// How the timeline came to be. Timeline 1 has no ancestors; `None` if a later one's history file is not there.
    pub history: Option<TimelineHistory>,
    /// What is there, tails included, as ranges that do not touch each other, in rising order.
    pub ranges: LsnRanges,
    /// Whole segments.
    pub segments: u64,
    /// Stored bytes of segments and tails.
    pub stored_bytes: u64,
    /// When the object that reaches furthest was stored, by the store's clock.
    pub newest_at: Option<Timestamp>,
}

/// Bytes `[from, to)` of the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct LsnRange {
    /// The first byte.
    pub from: Lsn,
    /// The byte after the last.
    pub to: Lsn,
}

/// A set of WAL bytes of one timeline, as few ranges as possible.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct LsnRanges(Vec<LsnRange>);

impl LsnRanges {
    /// Adds a range; an empty one changes nothing. Cheapest in rising order.
    pub fn insert(&mut self, range: LsnRange) {
        if range.from >= range.to {
            return;
        }
        // Everything in `first..last` touches or overlaps the new range and becomes one with it.
        let first = self.0.partition_point(|r| r.to < range.from);
        let last = first + self.0.iter().skip(first).take_while(|r| r.from <= range.to).count();
        let merged = self
            .0
            .drain(first..last)
            .fold(range, |all, r| LsnRange { from: all.from.min(r.from), to: all.to.max(r.to) });
        self.0.insert(first, merged);
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: LsnRange) {
        let mut rest = Vec::with_capacity(self.0.len() + 1);
        for held in &self.0 {
            let left = LsnRange { from: held.from, to: held.to.min(range.from) };
            let right = LsnRange { from: held.from.max(range.to), to: held.to };
            rest.extend([left, right].into_iter().filter(|part| part.from < part.to));
        }
        // Left and right of an empty range touch: insert makes one of them.
        self.0.clear();
        for part in rest {
            self.insert(part);
        }
    }

    /// True if every byte of `range` is there.
    pub fn contains(&self, range: LsnRange) -> bool {
        self.contiguous_to(range.from) >= range.to
    }

    /// True if nothing is there.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, in rising order.
    pub fn as_slice(&self) -> &[LsnRange] {
        &self.0
    }

    /// The range that holds the byte at `lsn`.
    pub fn containing(&self, lsn: Lsn) -> Option<LsnRange> {
        let index = self.0.partition_point(|r| r.to <= lsn);
        self.0.get(index).filter(|r| r.from <= lsn).copied()
    }

    /// How far the bytes reach without a hole, beginning at `from`: `from` itself if that byte is not there.
    pub fn contiguous_to(&self, from: Lsn) -> Lsn {
        self.containing(from).map_or(from, |range| range.to)
    }

    /// The byte after the last one.
    pub fn end(&self) -> Option<Lsn> {
        self.0.last().map(|r| r.to)
    }

    /// The holes between the first byte and the last.
    pub fn holes(&self) -> impl Iterator<Item = LsnRange> + '_ {
        self.0.windows(2).map(|pair| LsnRange { from: pair[0].to, to: pair[1].from })
    }
}

/// A complete base backup, without its lists of frames and files.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BackupInfo {
    /// Its name.
    pub label: String,
    /// The timeline that it was taken on.
    pub timeline: TimelineId,
    /// WAL is needed from here ...
    pub start: Lsn,
    /// ... to here before the restored cluster is consistent: the earliest target.
    pub stop: Lsn,
    /// When it began, by the server's clock.
    pub start_time: PgTime,
    /// When it ended, by the server's clock.
    pub stop_time: PgTime,
    /// The cluster's identifier.
    pub system_id: SystemId,
    /// The server's version.
    pub server_version: ServerVersion,
    /// The cluster's segment size in bytes.
    pub segment_size: SegmentSize,
    /// Taken from a standby.
    pub from_standby: bool,
    /// Bytes of the cluster's files, as tars.
    pub content_bytes: u64,
    /// Bytes of the parts in the repository.
    pub stored_bytes: u64,
    /// The cluster has data checksums and every page was checked.
    pub page_checksums_verified: bool,
    /// Pages whose checksum was wrong.
    pub bad_pages: u64,
}

impl BackupInfo {
    /// Takes over what a manifest says.
    ///
    /// # Errors
    /// What is impossible in it: it was written by another format, or is damaged.
    pub fn from_manifest(manifest: &proto::BackupManifest) -> Result<Self, &'static str> {
        if manifest.format != super::cluster::FORMAT {
            return Err("was written in a format that this version of walguard does not know");
        }
        super::layout::check_name(&manifest.label).map_err(|_| "has an impossible label")?;
        let (start, stop) = (Lsn::new(manifest.start_lsn), Lsn::new(manifest.stop_lsn));
        if start > stop {
            return Err("stops before it starts");
        }
        Ok(Self {
            label: manifest.label.clone(),
            timeline: TimelineId::new(manifest.timeline).ok_or("has no timeline")?,
            start,
            stop,
            start_time: PgTime::from_micros(manifest.start_time),
            stop_time: PgTime::from_micros(manifest.stop_time),
            system_id: SystemId::new(manifest.system_id),
            server_version: ServerVersion::new(manifest.server_version),
            segment_size: SegmentSize::new(manifest.wal_segment_size.into())
                .map_err(|_| "has an impossible WAL segment size")?,
            from_standby: manifest.from_standby,
            content_bytes: manifest.content_bytes,
            stored_bytes: manifest.stored_bytes,
            page_checksums_verified: manifest.page_checksums_verified,
            bad_pages: manifest.bad_pages_total,
        })
    }

    /// Where it starts.
    pub const fn start_position(&self) -> Position {
        Position { timeline: self.timeline, lsn: self.start }
    }

    /// Where the restored cluster is consistent: the earliest target.
    pub const fn consistent_position(&self) -> Position {
        Position { timeline: self.timeline, lsn: self.stop }
    }
}

/// WAL that a path needs and the repository does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Missing {
    /// The timeline that the missing byte belongs to.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub from: Lsn,
    /// The byte after the last of this hole, or of what was asked for.
    pub to: Lsn,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WAL of timeline {} is missing from {} to {}", self.timeline, self.from, self.to)
    }
}

/// A stretch of one timeline, every position of which can be restored.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Window {
    /// The timeline, given to a restore as `--timeline`.
    pub timeline: TimelineId,
    /// The earliest position: a backup is consistent there, or the timeline begins there.
    pub from: Lsn,
    /// The end of the WAL.
    pub to: Lsn,
    /// When the earliest of the backups ended, by the server's clock; for a timeline that begins inside the window's
    /// reach it is still the backup's time.
    pub from_time: PgTime,
    /// When the last WAL of the window was stored, by the store's clock: what was committed well before is in it.
    /// `None` where a hole ends the window.
    pub to_time: Option<Timestamp>,
    /// The backups that a restore into this window can begin with, oldest first.
    pub backups: Vec<String>,
}

impl Catalog {
    /// How `timeline` came to be, if that is known.
    pub fn history(&self, timeline: TimelineId) -> Option<&TimelineHistory> {
        self.timelines.get(&timeline).and_then(|wal| wal.history.as_ref())
    }

    /// The timeline that was begun last.
    pub fn newest_timeline(&self) -> Option<TimelineId> {
        self.timelines.keys().next_back().copied()
    }

    /// The backup with this label.
    pub fn backup(&self, label: &str) -> Option<&BackupInfo> {
        self.backups.iter().find(|backup| backup.label == label)
    }

    /// How far WAL reaches without a hole along `path`, beginning at `from`: `from` itself if that byte is not there.
    ///
    /// A byte counts as there if it lies on the timeline that wrote it, or if a later timeline of the path holds it: the
    /// segment with a switch point is begun again by the new timeline, with the same bytes before the switch.
    pub fn contiguous_to(&self, path: &TimelineHistory, from: Lsn) -> Lsn {
        let size = self.identity.segment_size;
        let mut at = from;
        loop {
            let owner = path.timeline_at(at);
            let begin_of = |t| path.begin_of(t).unwrap_or(Lsn::ZERO);
            // Timelines that hold this byte: its owner, and those that branched off later in the same segment.
            let reach = path
                .ancestors()
                .iter()
                .map(|ancestor| ancestor.timeline)
                .chain([path.timeline()])
                .filter(|t| *t >= owner && size.segment_of(begin_of(*t)) <= size.segment_of(at))
                .filter_map(|t| {
                    let to = self.timelines.get(&t)?.ranges.contiguous_to(at);
                    Some(to.min(path.end_of(t)?))
                })
                .max();
            match reach {
                Some(to) if to > at => at = to,
                _ => return at,
            }
        }
    }

    /// Checks that every byte `[from, to)` along `path` is there.
    ///
    /// # Errors
    /// The first hole.
    pub fn covered(&self, path: &TimelineHistory, from: Lsn, to: Lsn) -> Result<(), Missing> {
        let reached = self.contiguous_to(path, from);
        if reached >= to {
            return Ok(());
        }
        let timeline = path.timeline_at(reached);
        let next = self
            .timelines
            .get(&timeline)
            .and_then(|wal| wal.ranges.as_slice().iter().map(|range| range.from).find(|start| *start > reached));
        let end = path.end_of(timeline).unwrap_or(Lsn::MAX);
        Err(Missing { timeline, from: reached, to: next.unwrap_or(to).min(to).min(end) })
    }

    /// Backups that a restore along `path` can begin with: taken on the path, oldest first.
    pub fn backups_on<'a>(&'a self, path: &'a TimelineHistory) -> impl Iterator<Item = &'a BackupInfo> {
        self.backups.iter().filter(|backup| path.contains(backup.consistent_position()))
    }

    /// What can be restored, by timeline and position. Only meaningful for a catalog with the WAL of the backups in it.
    pub fn windows(&self) -> Vec<Window> {
        let mut windows: Vec<Window> = Vec::new();
        for (timeline, wal) in &self.timelines {
            let Some(path) = &wal.history else { continue };
            let begin = path.begin_of(*timeline).unwrap_or(Lsn::ZERO);
            let first = windows.len();
            for backup in self.backups_on(path) {
                let to = self.contiguous_to(path, backup.start);
                let from = backup.stop.max(begin);
                // Before its stop position the restored cluster is not consistent; and what lies before this
                // timeline's begin belongs to an ancestor.
                if to < backup.stop || to < from || (to == begin && *timeline != backup.timeline) {
                    continue;
                }
                match windows.get_mut(first..).and_then(|own| own.iter_mut().find(|w| w.to == to)) {
                    Some(window) => {
                        window.from = window.from.min(from);
                        window.backups.push(backup.label.clone());
                    }
                    None => windows.push(Window {
                        timeline: *timeline,
                        from,
                        to,
                        from_time: backup.stop_time,
                        to_time: (wal.ranges.end() == Some(to)).then_some(wal.newest_at).flatten(),
                        backups: vec![backup.label.clone()],
                    }),
                }
            }
        }
        windows
    }
}

/// Puts a timeline's WAL together from its objects, in the order of a listing.
#[derive(Debug, Default)]
pub(super) struct TimelineBuilder {
    ranges: LsnRanges,
    segments: u64,
    stored_bytes: u64,
    newest: Option<(Lsn, Timestamp)>,
    /// The segment that tails were last seen of, and how far they reach without a hole from its beginning.
    tails: Option<(SegmentName, u32)>,
}

impl TimelineBuilder {
    /// A whole segment.
    pub(super) fn segment(&mut self, segment: &SegmentName, stored_bytes: u64, modified: Timestamp) {
        self.segments += 1;
        self.add(LsnRange { from: segment.start(), to: segment.end() }, stored_bytes, modified);
    }

    /// Bytes `[from, to)` of a segment. Counts only where it continues what reaches back to the segment's beginning:
    /// without its page header nothing can be read.
    pub(super) fn tail(&mut self, segment: &SegmentName, from: u32, to: u32, stored_bytes: u64, modified: Timestamp) {
        let reached = self.tails.filter(|(of, _)| of == segment).map_or(0, |(_, reached)| reached);
        let reached = if from <= reached { reached.max(to) } else { reached };
        let begin = segment.start();
        self.tails = Some((*segment, reached));
        self.add(LsnRange { from: begin, to: begin + u64::from(reached) }, stored_bytes, modified);
    }

    fn add(&mut self, range: LsnRange, stored_bytes: u64, modified: Timestamp) {
        self.stored_bytes += stored_bytes;
        self.ranges.insert(range);
        if self.newest.is_none_or(|(to, _)| range.to > to) {
            self.newest = Some((range.to, modified));
        }
    }

    /// The timeline's WAL, with its history.
    pub(super) fn finish(self, history: Option<TimelineHistory>) -> TimelineWal {
        TimelineWal {
            history,
            ranges: self.ranges,
            segments: self.segments,
            stored_bytes: self.stored_bytes,
            newest_at: self.newest.map(|(_, at)| at),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::pg::SegmentNumber;
    use proptest::prelude::*;

    pub(in crate::repo) const MIB: u64 = 1 << 20;

    pub(in crate::repo) fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn size() -> SegmentSize {
        SegmentSize::new(MIB).unwrap()
    }

    fn segment(timeline: u32, number: u64) -> SegmentName {
        SegmentName { timeline: tli(timeline), number: SegmentNumber::new(number), size: size() }
    }

    pub(in crate::repo) fn history(timeline: u32, content: &str) -> TimelineHistory {
        TimelineHistory::parse(tli(timeline), content).unwrap()
    }

    fn identity() -> ClusterIdentity {
        ClusterIdentity {
            format: 1,
            system_id: SystemId::new(7),
            server_version: ServerVersion::new(170_000),
            segment_size: size(),
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    pub(in crate::repo) fn backup(label: &str, timeline: u32, start: u64, stop: u64) -> BackupInfo {
        BackupInfo {
            label: label.to_owned(),
            timeline: tli(timeline),
            start: Lsn::new(start),
            stop: Lsn::new(stop),
            start_time: PgTime::from_micros(0),
            stop_time: PgTime::from_micros(1),
            system_id: SystemId::new(7),
            server_version: ServerVersion::new(170_000),
            segment_size: size(),
            from_standby: false,
            content_bytes: 0,
            stored_bytes: 0,
            page_checksums_verified: true,
            bad_pages: 0,
        }
    }

    /// A catalog with whole segments and tails `(timeline, segment, to)` from a segment's beginning.
    pub(in crate::repo) fn catalog(
        histories: Vec<TimelineHistory>,
        segments: &[(u32, u64)],
        tails: &[(u32, u64, u32)],
    ) -> Catalog {
        let mut timelines = BTreeMap::new();
        for history in histories {
            let timeline = history.timeline().get();
            let mut builder = TimelineBuilder::default();
            for (_, number) in segments.iter().filter(|(t, _)| *t == timeline) {
                builder.segment(&segment(timeline, *number), 100, Timestamp::UNIX_EPOCH);
            }
            for (_, number, to) in tails.iter().filter(|(t, ..)| *t == timeline) {
                builder.tail(&segment(timeline, *number), 0, *to, 10, Timestamp::UNIX_EPOCH);
            }
            timelines.insert(history.timeline(), builder.finish(Some(history)));
        }
        Catalog { identity: identity(), timelines, backups: Vec::new(), gaps: Vec::new(), damaged: Vec::new() }
    }

    #[test]
    fn a_tail_counts_only_where_it_reaches_back_to_the_segments_beginning() {
        let mut builder = TimelineBuilder::default();
        let name = segment(1, 5);
        for (from, to) in [(0, 100), (50, 200), (200, 300), (400, 500)] {
            builder.tail(&name, from, to, 1, Timestamp::UNIX_EPOCH);
        }
        builder.tail(&segment(1, 6), 8, 20, 1, Timestamp::UNIX_EPOCH);
        let wal = builder.finish(None);
        assert_eq!(wal.ranges.as_slice(), [LsnRange { from: name.start(), to: name.start() + 300 }]);
    }

    #[test]
    fn the_segment_of_a_switch_may_exist_on_the_old_timeline_only_as_tails() {
        // Timeline 2 branches off in the middle of segment 3; timeline 1 has it as a tail up to just there.
        let switch = 3 * MIB + 1000;
        let path = history(2, &format!("1\t0/{switch:X}\tpromoted\n"));
        let histories = || vec![TimelineHistory::root(tli(1)), path.clone()];
        let covered = |catalog: &Catalog, to| catalog.covered(&path, Lsn::new(MIB), Lsn::new(to));

        let with_tail = catalog(histories(), &[(1, 1), (1, 2), (2, 3), (2, 4)], &[(1, 3, 1000)]);
        assert_eq!(covered(&with_tail, 5 * MIB), Ok(()));

        // The new timeline's copy of the segment holds the old bytes too.
        let without = catalog(histories(), &[(1, 1), (1, 2), (2, 3), (2, 4)], &[]);
        assert_eq!(covered(&without, 5 * MIB), Ok(()));

        // What the old timeline wrote after the switch is not on the path.
        let old_only = catalog(histories(), &[(1, 1), (1, 2), (1, 3), (1, 4)], &[]);
        let missing = covered(&old_only, 5 * MIB).unwrap_err();
        assert_eq!((missing.timeline, missing.from), (tli(2), Lsn::new(switch)));
    }

    #[test]
    fn a_hole_is_named_from_its_beginning_to_its_end() {
        let path = TimelineHistory::root(tli(1));
        let catalog = catalog(vec![path.clone()], &[(1, 1), (1, 2), (1, 5)], &[]);
        let missing = catalog.covered(&path, Lsn::new(MIB), Lsn::new(6 * MIB)).unwrap_err();
        assert_eq!(missing, Missing { timeline: tli(1), from: Lsn::new(3 * MIB), to: Lsn::new(5 * MIB) });
        assert_eq!(missing.to_string(), "WAL of timeline 1 is missing from 0/300000 to 0/500000");
    }

    #[test]
    fn a_window_reaches_from_the_consistent_point_to_the_first_hole() {
        let mut catalog =
            catalog(vec![TimelineHistory::root(tli(1))], &[(1, 1), (1, 2), (1, 5), (1, 6)], &[(1, 7, 10)]);
        catalog.backups = vec![
            backup("a", 1, MIB + 5, MIB + 100),
            backup("b", 1, 2 * MIB, 2 * MIB + 5),
            backup("broken", 1, 3 * MIB - 5, 5 * MIB), // its own WAL has the hole
            backup("c", 1, 5 * MIB + 9, 6 * MIB),
        ];
        let windows = catalog.windows();
        let short: Vec<_> = windows.iter().map(|w| (w.from.bytes(), w.to.bytes(), w.backups.join("+"))).collect();
        assert_eq!(short, [(MIB + 100, 3 * MIB, "a+b".to_owned()), (6 * MIB, 7 * MIB + 10, "c".to_owned())]);
        assert_eq!(windows[0].to_time, None, "a hole ends it");
        assert!(windows[1].to_time.is_some());
    }

    #[test]
    fn a_promoted_timeline_is_reached_from_its_parents_backup() {
        let switch = 3 * MIB + 1000;
        let path = history(2, &format!("1\t0/{switch:X}\tpromoted\n"));
        let mut catalog =
            catalog(vec![TimelineHistory::root(tli(1)), path], &[(1, 1), (1, 2), (1, 3), (2, 3), (2, 4)], &[]);
        catalog.backups = vec![backup("a", 1, MIB, MIB + 100), backup("late", 1, 3 * MIB + 1001, 3 * MIB + 2000)];
        let windows: Vec<_> = catalog
            .windows()
            .into_iter()
            .map(|w| (w.timeline.get(), w.from.bytes(), w.to.bytes(), w.backups))
            .collect();
        assert_eq!(
            windows,
            [(1, MIB + 100, 4 * MIB, vec!["a".to_owned(), "late".into()]), (2, switch, 5 * MIB, vec!["a".to_owned()]),]
        );
    }

    fn any_ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        proptest::collection::vec((0u64..60, 0u64..12), 0..20)
    }

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_bytes_that_were_inserted_and_not_removed(
            inserted in any_ranges(),
            removed in proptest::collection::vec((0u64..60, 0u64..12), 0..5),
        ) {
            let mut ranges = LsnRanges::default();
            let mut model = BTreeSet::new();
            for (from, length) in inserted {
                ranges.insert(LsnRange { from: Lsn::new(from), to: Lsn::new(from + length) });
                model.extend(from..from + length);
            }
            for (from, length) in removed {
                ranges.remove(LsnRange { from: Lsn::new(from), to: Lsn::new(from + length) });
                model.retain(|byte| !(from..from + length).contains(byte));
            }
            let held: BTreeSet<u64> =
                ranges.as_slice().iter().flat_map(|r| r.from.bytes()..r.to.bytes()).collect();
            prop_assert_eq!(&held, &model);
            for pair in ranges.as_slice().windows(2) {
                prop_assert!(pair[0].to < pair[1].from, "ranges that touch are one: {:?}", ranges);
            }
            for byte in 0..80 {
                let expected = (byte..).find(|b| !model.contains(b)).unwrap();
                prop_assert_eq!(ranges.contiguous_to(Lsn::new(byte)), Lsn::new(expected));
                prop_assert_eq!(ranges.containing(Lsn::new(byte)).is_some(), model.contains(&byte));
            }
        }

        /// Against a model that holds every thousandth byte by itself.
        #[test]
        fn coverage_equals_a_naive_model(
            segments in proptest::collection::btree_set((1u32..4, 0u64..8), 0..20),
            tails in proptest::collection::btree_set((1u32..4, 0u64..8, 1u32..1000), 0..6),
            switches in (0u64..8000, 0u64..8000),
            from in 0u64..8000,
        ) {
            const UNIT: u64 = MIB / 1000;
            // A segment of the model has 1000 units of 1048 bytes and a rest, which belongs to the last.
            let lsn = |unit: u64| Lsn::new(unit / 1000 * MIB + unit % 1000 * UNIT);
            let (first, second) = (switches.0.min(switches.1), switches.0.max(switches.1));
            let path = history(3, &format!("1\t{}\t\n2\t{}\t\n", lsn(first), lsn(second)));
            let histories = vec![TimelineHistory::root(tli(1)), history(2, &format!("1\t{}\t\n", lsn(first))), path.clone()];
            let whole: Vec<_> = segments.iter().copied().collect();
            let scaled: Vec<_> =
                tails.iter().map(|(t, s, to)| (*t, *s, to * u32::try_from(UNIT).unwrap())).collect();
            let catalog = catalog(histories, &whole, &scaled);

            let has = |timeline: u32, unit: u64| {
                segments.contains(&(timeline, unit / 1000))
                    || tails.iter().any(|(t, s, to)| *t == timeline && *s == unit / 1000 && unit % 1000 < u64::from(*to))
            };
            let there = |unit: u64| {
                let owner = if unit < first { 1 } else if unit < second { 2 } else { 3 };
                let begins = [0, first, second];
                (owner..=3).any(|t| {
                    let begin = begins[t as usize - 1];
                    begin / 1000 <= unit / 1000 && has(t, unit)
                })
            };
            let reached = (from..).find(|unit| !there(*unit)).unwrap();
            prop_assert_eq!(catalog.contiguous_to(&path, lsn(from)), lsn(reached));
            prop_assert!(catalog.covered(&path, lsn(from), lsn(reached)).is_ok());
            let missing = catalog.covered(&path, lsn(from), lsn(reached + 1)).unwrap_err();
            prop_assert_eq!(missing.from, lsn(reached));
            prop_assert_eq!(missing.timeline, path.timeline_at(lsn(reached)));
        }
    }
}
