//! What the indexes of a group of segments say, in short: as a value, merged from them, and as the bytes of an object. Pure.
//!
//! Ends of transactions stay in the segments' indexes. All else is here as exactly as there is room, and where there is
//! none it is said how much is missing: whoever needs that looks into the parts.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::format::{
    self, CommittedDdl, FORMAT, INDEX_BYTES_MAX, IndexError, LargeTransaction, MinuteTally, RestorePoint, SegmentIndex,
};
use super::level::{Group, Span};
use super::summary::{Summary, sum};
use crate::decode::change::RowCounts;
use crate::detect::Relation;
use crate::pg::{RelFile, SegmentName};
use crate::proto;
use crate::repo::frame;

/// Tallies of one object: about a megabyte. Where minutes are too many, hours are counted, or days.
const TALLIES_MAX: usize = 32_768;

/// Events of one object, those that lose something before others.
const EVENTS_MAX: usize = 8_192;

/// Restore points of one object.
const RESTORE_POINTS_MAX: usize = 4_096;

/// Large transactions of one object: as many as of a segment, so that the largest of all are among them.
const LARGEST_MAX: usize = 16;

/// Minutes that a tally of a merged index can stand for.
const UNITS: [i64; 3] = [1, 60, 1_440];

/// What the indexes of a group say, in short.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedIndex {
    /// The parts that were there, in order: each a segment, or a group a sixteenth as large as this one.
    pub parts: Vec<Part>,
    /// Minutes that each tally stands for: 1, 60 or 1,440. A tally's `minute` is where that begins, a multiple of this.
    pub minutes_each: i64,
    /// What committed transactions did, by time and file.
    pub tallies: Vec<MinuteTally>,
    /// Tallies that found no room.
    pub tallies_left_out: u64,
    /// Named restore points, in WAL order.
    pub restore_points: Vec<RestorePoint>,
    /// Restore points that found no room.
    pub restore_points_left_out: u64,
    /// What committed transactions did to definitions, in WAL order of their commits.
    pub events: Vec<CommittedDdl>,
    /// Events by which something is lost that found no room.
    pub destructive_left_out: u64,
    /// Other events that found no room.
    pub harmless_left_out: u64,
    /// The transactions that changed most rows, the largest first.
    pub largest: Vec<LargeTransaction>,
    /// Whose the files above are, by their last known names; sorted by file.
    pub names: Vec<(RelFile, Arc<Relation>)>,
}

/// A part of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which, counted from 0; less than [`super::level::FAN_OUT`].
    pub place: u32,
    /// What it holds.
    pub summary: Summary,
}

impl MergedIndex {
    /// What the whole group holds.
    pub fn summary(&self) -> Summary {
        self.parts.iter().fold(Summary::default(), |mut all, part| {
            all.add(&part.summary);
            all
        })
    }

    /// The segments of a part of `group`.
    pub const fn span_of(group: &Group, place: u32) -> Span {
        let each = group.level.segments() / super::level::FAN_OUT;
        let from = group.span().from.saturating_add(each.saturating_mul(place as u64));
        Span { from, to: from.saturating_add(each) }
    }

    /// True if nothing but ends of transactions is missing.
    pub const fn is_exact(&self) -> bool {
        self.tallies_left_out == 0 && self.restore_points_left_out == 0 && self.destructive_left_out == 0
    }

    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        use prost::Message as _;
        let part = |part: &Part| proto::IndexPart { place: part.place, summary: Some(part.summary.to_proto()) };
        let message = proto::MergedIndex {
            format: FORMAT,
            parts: self.parts.iter().map(part).collect(),
            minutes_each: u32::try_from(self.minutes_each).unwrap_or(1),
            tallies: self.tallies.iter().map(format::tally_to_proto).collect(),
            tallies_left_out: self.tallies_left_out,
            restore_points: self.restore_points.iter().map(format::restore_point_to_proto).collect(),
            restore_points_left_out: self.restore_points_left_out,
            events: self.events.iter().map(format::event_to_proto).collect(),
            destructive_left_out: self.destructive_left_out,
            harmless_left_out: self.harmless_left_out,
            largest: self.largest.iter().map(format::large_to_proto).collect(),
            names: self.names.iter().map(|(file, relation)| format::name_to_proto(*file, relation)).collect(),
        };
        frame::compress(&message.encode_to_vec(), frame::LEVEL_DEFAULT)
    }

    /// The merged index of `group` in an object's bytes, which are not trusted.
    ///
    /// # Errors
    /// If they are damaged, of another format, or say what cannot be.
    pub fn decode(stored: &[u8], group: &Group) -> Result<Self, IndexError> {
        use prost::Message as _;
        let content = frame::decompress(stored, INDEX_BYTES_MAX)?;
        let message = proto::MergedIndex::decode(content.as_slice())?;
        if message.format != FORMAT {
            return Err(IndexError::Format(message.format));
        }
        let mut parts: Vec<Part> = Vec::new();
        for part in message.parts {
            let follows = parts.last().is_none_or(|before| before.place < part.place);
            let summary = Summary::of_proto(part.summary.unwrap_or_default())?;
            let span = Self::span_of(group, part.place);
            if u64::from(part.place) >= super::level::FAN_OUT || !follows {
                return Err(IndexError::Impossible("its parts are not in order"));
            }
            if summary.segments == 0 || summary.segments > span.len() {
                return Err(IndexError::Impossible("a part has other segments than it can"));
            }
            let start = group.size.bytes().saturating_mul(span.from);
            let end = group.size.bytes().saturating_mul(span.to);
            if summary.last.is_some_and(|(lsn, _)| lsn.bytes() < start || end <= lsn.bytes()) {
                return Err(IndexError::Impossible("a part's last record lies elsewhere"));
            }
            parts.push(Part { place: part.place, summary });
        }
        let minutes_each = i64::from(message.minutes_each);
        let tallies: Vec<_> = message.tallies.iter().map(format::tally_of_proto).collect();
        if !UNITS.contains(&minutes_each) || tallies.iter().any(|tally| tally.minute.rem_euclid(minutes_each) != 0) {
            return Err(IndexError::Impossible("its tallies are of no known span of time"));
        }
        Ok(Self {
            parts,
            minutes_each,
            tallies,
            tallies_left_out: message.tallies_left_out,
            restore_points: message.restore_points.into_iter().map(format::restore_point_of_proto).collect(),
            restore_points_left_out: message.restore_points_left_out,
            events: message.events.into_iter().map(format::event_of_proto).collect::<Result<_, _>>()?,
            destructive_left_out: message.destructive_left_out,
            harmless_left_out: message.harmless_left_out,
            largest: message.largest.iter().map(format::large_of_proto).collect(),
            names: message.names.into_iter().map(format::name_of_proto).collect::<Result<_, _>>()?,
        })
    }
}

/// Makes a merged index of its parts, which are given in order, one at a time.
#[derive(Debug)]
pub struct Merger {
    group: Group,
    merged: MergedIndex,
    tallies: Tallies,
    names: BTreeMap<RelFile, Arc<Relation>>,
}

impl Merger {
    /// Of `group`, no part of which was given yet.
    pub const fn new(group: Group) -> Self {
        let merged = MergedIndex {
            parts: Vec::new(),
            minutes_each: 1,
            tallies: Vec::new(),
            tallies_left_out: 0,
            restore_points: Vec::new(),
            restore_points_left_out: 0,
            events: Vec::new(),
            destructive_left_out: 0,
            harmless_left_out: 0,
            largest: Vec::new(),
            names: Vec::new(),
        };
        Self { group, merged, tallies: Tallies { minutes_each: 1, sums: BTreeMap::new() }, names: BTreeMap::new() }
    }

    /// Takes a segment of a group of the first level.
    pub fn segment(&mut self, name: &SegmentName, index: &SegmentIndex) {
        self.part(name.number.get(), 1, Summary::of(index));
        self.tallies.add(1, &index.minutes);
        self.merged.tallies_left_out = self.merged.tallies_left_out.saturating_add(index.minutes_left_out);
        // What found no room in a segment's index may have been anything.
        self.merged.destructive_left_out = self.merged.destructive_left_out.saturating_add(index.events_left_out);
        self.lists(&index.restore_points, &index.events, &index.largest);
        self.names.extend(index.names.iter().cloned());
    }

    /// Takes a group of the level below.
    pub fn merged(&mut self, group: &Group, index: &MergedIndex) {
        self.part(group.span().from, group.span().len(), index.summary());
        self.tallies.add(index.minutes_each, &index.tallies);
        self.merged.tallies_left_out = self.merged.tallies_left_out.saturating_add(index.tallies_left_out);
        self.merged.destructive_left_out = self.merged.destructive_left_out.saturating_add(index.destructive_left_out);
        self.merged.harmless_left_out = self.merged.harmless_left_out.saturating_add(index.harmless_left_out);
        self.merged.restore_points_left_out =
            self.merged.restore_points_left_out.saturating_add(index.restore_points_left_out);
        self.lists(&index.restore_points, &index.events, &index.largest);
        self.names.extend(index.names.iter().cloned());
    }

    fn part(&mut self, first: u64, segments: u64, summary: Summary) {
        let place = first.saturating_sub(self.group.span().from) / segments.max(1);
        debug_assert!(self.group.span().contains(Span { from: first, to: first + segments }), "another group's part");
        self.merged.parts.push(Part { place: u32::try_from(place).unwrap_or(u32::MAX), summary });
    }

    fn lists(&mut self, points: &[RestorePoint], events: &[CommittedDdl], largest: &[LargeTransaction]) {
        let room = RESTORE_POINTS_MAX - self.merged.restore_points.len();
        self.merged.restore_points.extend(points.iter().take(room).cloned());
        let left_out = points.len().saturating_sub(room) as u64;
        self.merged.restore_points_left_out = self.merged.restore_points_left_out.saturating_add(left_out);
        self.merged.events.extend_from_slice(events);
        if self.merged.events.len() > EVENTS_MAX {
            self.drop_events();
        }
        self.merged.largest.extend_from_slice(largest);
        self.merged.largest.sort_by_key(|large| std::cmp::Reverse(large.rows()));
        self.merged.largest.truncate(LARGEST_MAX);
    }

    /// Leaves the oldest that lose something, and the oldest others in the room beside them.
    fn drop_events(&mut self) {
        let is_destructive = |event: &CommittedDdl| event.event.kind.is_destructive();
        let destructive = self.merged.events.iter().filter(|event| is_destructive(event)).count();
        let mut rooms = [EVENTS_MAX.saturating_sub(destructive), EVENTS_MAX];
        let mut dropped = [0_u64; 2];
        self.merged.events.retain(|event| {
            let kind = usize::from(is_destructive(event));
            let has_room = rooms[kind] > 0;
            rooms[kind] = rooms[kind].saturating_sub(1);
            dropped[kind] += u64::from(!has_room);
            has_room
        });
        self.merged.harmless_left_out = self.merged.harmless_left_out.saturating_add(dropped[0]);
        self.merged.destructive_left_out = self.merged.destructive_left_out.saturating_add(dropped[1]);
    }

    /// The merged index; `None` if no part was given.
    pub fn finish(mut self) -> Option<MergedIndex> {
        if self.merged.parts.is_empty() {
            return None;
        }
        self.merged.minutes_each = self.tallies.minutes_each;
        let (tallies, left_out) = self.tallies.finish();
        self.merged.tallies_left_out = self.merged.tallies_left_out.saturating_add(left_out);
        self.merged.tallies = tallies;
        let mut files: Vec<RelFile> = self.merged.tallies.iter().filter_map(|tally| tally.file).collect();
        files.extend(self.merged.largest.iter().flat_map(|large| large.files.iter().map(|(file, _)| *file)));
        files.sort_unstable();
        self.names.retain(|file, _| files.binary_search(file).is_ok());
        self.merged.names = self.names.into_iter().collect();
        Some(self.merged)
    }
}

/// Tallies by time and file, in the finest unit of time in which there is room for them.
#[derive(Debug)]
pub(super) struct Tallies {
    pub(super) minutes_each: i64,
    pub(super) sums: BTreeMap<(i64, Option<RelFile>), (u64, RowCounts)>,
}

impl Tallies {
    fn add(&mut self, minutes_each: i64, tallies: &[MinuteTally]) {
        if minutes_each > self.minutes_each {
            self.widen(minutes_each);
        }
        for tally in tallies {
            self.add_one(tally);
        }
        while self.sums.len() > TALLIES_MAX
            && let Some(wider) = UNITS.into_iter().find(|unit| *unit > self.minutes_each)
        {
            self.widen(wider);
        }
    }

    pub(super) fn add_one(&mut self, tally: &MinuteTally) {
        let begin = begin_of(tally.minute, self.minutes_each);
        let (transactions, rows) = self.sums.entry((begin, tally.file)).or_default();
        *transactions = transactions.saturating_add(tally.transactions);
        *rows = sum(*rows, tally.rows);
    }

    fn widen(&mut self, minutes_each: i64) {
        self.minutes_each = minutes_each;
        for tally in std::mem::take(&mut self.sums).into_iter().map(to_tally) {
            self.add_one(&tally);
        }
    }

    /// In order of time and file; and how many found no room, those with fewest rows.
    fn finish(self) -> (Vec<MinuteTally>, u64) {
        let mut tallies: Vec<MinuteTally> = self.sums.into_iter().map(to_tally).collect();
        let left_out = tallies.len().saturating_sub(TALLIES_MAX);
        if left_out > 0 {
            // Those that count transactions as such have no file, and stay.
            tallies.sort_by_key(|tally| std::cmp::Reverse((tally.file.is_none(), format::changed(tally.rows))));
            tallies.truncate(TALLIES_MAX);
            tallies.sort_by_key(|tally| (tally.minute, tally.file));
        }
        (tallies, left_out as u64)
    }
}

/// Where the span of time begins that a minute lies in. Numbers from objects are not trusted: the first of all minutes
/// has no span before it.
pub(super) const fn begin_of(minute: i64, minutes_each: i64) -> i64 {
    minute.saturating_sub(minute.rem_euclid(minutes_each))
}

pub(super) const fn to_tally(
    ((minute, file), (transactions, rows)): ((i64, Option<RelFile>), (u64, RowCounts)),
) -> MinuteTally {
    MinuteTally { minute, file, transactions, rows }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::level::Level;
    use super::super::tests::{index_of, name};
    use super::*;
    use crate::detect::DdlKind;
    use crate::pg::{Lsn, Oid};

    fn group(number: u64, level: Level) -> Group {
        Group { number, ..Group::of(&name(0), level) }
    }

    fn merged(group: Group, indexes: &[(u64, SegmentIndex)]) -> MergedIndex {
        let mut merger = Merger::new(group);
        for (number, index) in indexes {
            merger.segment(&name(*number), index);
        }
        merger.finish().unwrap()
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(
            happened in prop::collection::vec(prop::collection::vec((0_i64..400_000_000, 0_u32..5), 0..4), 1..17),
            number in 0_u64..1_000,
        ) {
            let group = group(number, Level::FIRST);
            let numbers = group.span().from..;
            let indexes: Vec<_> =
                numbers.zip(&happened).map(|(number, happened)| (number, index_of(number, happened))).collect();
            let first = merged(group, &indexes);
            prop_assert_eq!(&MergedIndex::decode(&first.encode(), &group).unwrap(), &first);
            let above = group.above().unwrap();
            let mut merger = Merger::new(above);
            merger.merged(&group, &first);
            let second = merger.finish().unwrap();
            prop_assert_eq!(second.summary(), first.summary());
            prop_assert_eq!(&second.tallies, &first.tallies);
            prop_assert_eq!(MergedIndex::decode(&second.encode(), &above).unwrap(), second);
        }

        #[test]
        fn any_bytes_are_a_merged_index_or_an_error(content in prop::collection::vec(any::<u8>(), 0..300)) {
            let group = group(7, Level::FIRST);
            let _ = MergedIndex::decode(&content, &group);
            let _ = MergedIndex::decode(&frame::compress(&[b"\x08\x01".as_slice(), &content].concat(), 1), &group);
        }
    }

    #[test]
    fn a_merged_index_of_another_group_or_format_is_refused() {
        let stored = merged(group(2, Level::FIRST), &[(33, index_of(33, &[(5, 1)]))]).encode();
        assert!(MergedIndex::decode(&stored, &group(2, Level::FIRST)).is_ok());
        for other in [group(3, Level::FIRST), group(2, Level::ALL[1])] {
            let error = MergedIndex::decode(&stored, &other).unwrap_err();
            assert!(matches!(error, IndexError::Impossible(_)), "{error}");
        }
        let later = frame::compress(b"\x08\x02", 1);
        assert!(matches!(MergedIndex::decode(&later, &group(2, Level::FIRST)), Err(IndexError::Format(2))));
    }

    #[test]
    fn where_minutes_are_too_many_hours_or_days_are_counted_and_no_row_is_lost() {
        let mut index = index_of(0, &[]);
        let files = 40_000_u32;
        for (minutes, unit) in [(vec![0, 1], 60), (vec![0, 60, 1_439], 1_440)] {
            index.minutes = minutes
                .iter()
                .flat_map(|minute| (1..=files / 2).map(|file| (*minute, file)))
                .map(|(minute, number)| MinuteTally {
                    minute,
                    file: Some(RelFile { tablespace: Oid(1663), database: Oid(5), number }),
                    transactions: 1,
                    rows: RowCounts { inserted: 2, ..RowCounts::default() },
                })
                .collect();
            let merged = merged(group(0, Level::FIRST), &[(0, index.clone())]);
            assert_eq!((merged.minutes_each, merged.tallies.len()), (unit, files as usize / 2));
            assert_eq!(merged.tallies[0].rows.inserted, 2 * minutes.len() as u64);
            assert!(merged.is_exact());
        }
        // Of one day there are too many files: those with fewest rows go, and are counted.
        for tally in &mut index.minutes {
            tally.minute = 0;
        }
        for (number, tally) in (1..).zip(&mut index.minutes) {
            tally.file = Some(RelFile { tablespace: Oid(1663), database: Oid(5), number });
            tally.rows.inserted = u64::from(number);
        }
        let merged = merged(group(0, Level::FIRST), &[(0, index.clone())]);
        assert_eq!((merged.tallies.len(), merged.tallies_left_out), (TALLIES_MAX, 60_000 - TALLIES_MAX as u64));
        assert_eq!(merged.tallies.iter().map(|tally| tally.rows.inserted).min(), Some(60_000 - TALLIES_MAX as u64 + 1));
        assert!(!merged.is_exact());
    }

    #[test]
    fn what_loses_something_has_room_before_what_does_not() {
        let event = index_of(2, &[(5, 4)]).events[0].clone();
        let mut indexes = Vec::new();
        for number in 0..4 {
            let mut index = index_of(number, &[]);
            for place in 0..3_000 {
                let mut event = event.clone();
                event.event.kind = if number == 3 { DdlKind::Truncate } else { DdlKind::Create };
                event.commit = Lsn::new(name(number).start().bytes() + place * 8);
                index.events.push(event);
            }
            index.restore_points = vec![index_of(2, &[(5, 4)]).restore_points[0].clone(); 1_500];
            indexes.push((number, index));
        }
        let merged = merged(group(0, Level::FIRST), &indexes);
        let destructive = merged.events.iter().filter(|event| event.event.kind.is_destructive()).count();
        assert_eq!((merged.events.len(), destructive), (EVENTS_MAX, 3_000));
        assert!(merged.events.is_sorted_by_key(|event| event.commit));
        assert_eq!((merged.harmless_left_out, merged.destructive_left_out), (12_000 - EVENTS_MAX as u64, 0));
        assert_eq!((merged.restore_points.len(), merged.restore_points_left_out), (4_096, 6_000 - 4_096));
    }

    #[test]
    fn numbers_beyond_reason_are_added_up_to_other_such_numbers() {
        let mut index = index_of(0, &[(5, 4)]);
        let minute = MinuteTally { minute: i64::MIN, transactions: u64::MAX, ..index.minutes[0] };
        index.minutes.extend([minute, MinuteTally { minute: i64::MAX, ..minute }]);
        for tally in &mut index.minutes {
            tally.rows = RowCounts { inserted: u64::MAX, updated: 1, deleted: u64::MAX, moved: 0 };
        }
        index.largest[0].files[0].1.inserted = u64::MAX;
        (index.minutes_left_out, index.events_left_out, index.records) = (u64::MAX, u64::MAX, u64::MAX);
        let indexes: Vec<_> = (0..16).map(|number| (number, index.clone())).collect();
        let first = merged(group(0, Level::FIRST), &indexes);
        assert_eq!((first.summary().records, first.tallies_left_out), (u64::MAX, u64::MAX));
        let mut above = Merger::new(group(0, Level::ALL[1]));
        above.merged(&group(0, Level::FIRST), &first);
        above.merged(&group(1, Level::FIRST), &first);
        assert_eq!(above.finish().unwrap().destructive_left_out, u64::MAX);
    }

    #[test]
    fn names_are_the_last_known_and_only_of_files_that_are_told_of() {
        let mut late = index_of(9, &[(5, 1)]);
        let mut renamed = (*late.names[0].1).clone();
        renamed.name = "renamed".into();
        late.names[0].1 = Arc::new(renamed);
        let stranger = RelFile { number: 1, ..late.names[0].0 };
        late.names.push((stranger, late.names[0].1.clone()));
        let merged = merged(group(0, Level::FIRST), &[(3, index_of(3, &[(5, 1)])), (9, late)]);
        assert_eq!(merged.names.len(), 1);
        assert_eq!(merged.names[0].1.name, "renamed");
    }
}
