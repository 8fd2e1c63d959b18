//! Groups of segments whose indexes are merged into one object. Pure.

use crate::pg::{SegmentName, SegmentNumber, SegmentSize, TimelineId};

/// Objects of one level that one object of the next holds in short. With 16, what is not merged yet at the end of the WAL
/// is at most 15 objects of each level, and a year of busy WAL (230,000 segments) four objects of the last.
pub const FAN_OUT: u64 = 16;

/// How many segments an object holds in short: 16, 256, 4,096 or 65,536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// All levels, the smallest groups first.
    pub const ALL: [Self; 4] = [Self(1), Self(2), Self(3), Self(4)];

    /// The smallest groups.
    pub const FIRST: Self = Self(1);

    /// Segments of a group.
    pub const fn segments(self) -> u64 {
        FAN_OUT.pow(self.0 as u32)
    }

    /// The level with groups of so many segments.
    pub fn of_segments(segments: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.segments() == segments)
    }

    /// The level whose objects this one's are made from; `None` for the first, whose are made from the segments' indexes.
    pub fn below(self) -> Option<Self> {
        Self::ALL.into_iter().rev().find(|level| *level < self)
    }

    /// The level whose objects are made from this one's.
    pub fn above(self) -> Option<Self> {
        Self::ALL.into_iter().find(|level| *level > self)
    }
}

/// An aligned group of segments of one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group {
    /// The timeline whose segments they are.
    pub timeline: TimelineId,
    /// How many they are.
    pub level: Level,
    /// The how-manieth group of its level, counted from 0 at the beginning of all WAL.
    pub number: u64,
    /// The cluster's segment size.
    pub size: SegmentSize,
}

impl Group {
    /// The group of this level that holds the segment.
    pub const fn of(segment: &SegmentName, level: Level) -> Self {
        let number = segment.number.get() / level.segments();
        Self { timeline: segment.timeline, level, number, size: segment.size }
    }

    /// Its first segment, whether that exists or not.
    pub const fn first(&self) -> SegmentName {
        let number = SegmentNumber::new(self.number.saturating_mul(self.level.segments()));
        SegmentName { timeline: self.timeline, number, size: self.size }
    }

    /// Its segments' numbers.
    pub const fn span(&self) -> Span {
        let from = self.first().number.get();
        Span { from, to: from.saturating_add(self.level.segments()) }
    }

    /// The group of the next level that holds this one.
    pub fn above(&self) -> Option<Self> {
        self.level.above().map(|level| Self::of(&self.first(), level))
    }
}

/// Numbers `[from, to)` of segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first.
    pub from: u64,
    /// The one after the last.
    pub to: u64,
}

impl Span {
    /// How many.
    pub const fn len(&self) -> u64 {
        self.to.saturating_sub(self.from)
    }

    /// True if there is none.
    pub const fn is_empty(&self) -> bool {
        self.to <= self.from
    }

    /// Those of both.
    pub fn and(&self, other: Self) -> Self {
        Self { from: self.from.max(other.from), to: self.to.min(other.to) }
    }

    /// True if all of `other` are among them.
    pub const fn contains(&self, other: Self) -> bool {
        self.from <= other.from && other.to <= self.to
    }
}
