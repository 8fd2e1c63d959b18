//! Timelines, positions on them, and timeline history files.

use std::fmt;

use super::{Lsn, SegmentNumber, SegmentSize};

/// A timeline: one unbroken line of WAL. Every promotion starts a new one, with a greater number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct TimelineId(u32);

impl TimelineId {
    /// The timeline of a freshly made cluster.
    pub const FIRST: Self = Self(1);

    /// The timeline with this number; `None` for 0, which Postgres never assigns.
    pub const fn new(number: u32) -> Option<Self> {
        match number {
            0 => None,
            number => Some(Self(number)),
        }
    }

    /// Its number, 1 or greater.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Eight hexadecimal digits, as in WAL file names.
    pub fn hex(self) -> String {
        format!("{:08X}", self.0)
    }

    /// The name of its history file, `00000002.history`. Timeline 1 has none.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A place in the WAL of one timeline. Printed as `2:16/B374D848`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// The timeline that `lsn` lies on.
    pub timeline: TimelineId,
    /// The place on it.
    pub lsn: Lsn,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.timeline, self.lsn)
    }
}

/// One ancestor of a timeline: it was followed up to `switch`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// Where the next timeline branched off: the first byte that is not of this one.
    pub switch: Lsn,
    /// Why, as the server wrote it (for people; may be empty).
    pub reason: String,
}

/// How a timeline came to be: its ancestors from the oldest to its parent, and itself.
///
/// (Postgres: `readTimeLineHistory` in `access/transam/timeline.c`.)
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TimelineHistory {
    timeline: TimelineId,
    ancestors: Vec<HistoryEntry>,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors.
    pub const fn root(timeline: TimelineId) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Reads the content of `timeline`'s history file.
    ///
    /// # Errors
    /// If a line does not hold a timeline and a switch point, or if timelines or switch points do not rise.
    pub fn parse(timeline: TimelineId, content: &str) -> Result<Self, ParseHistoryError> {
        let mut ancestors: Vec<HistoryEntry> = Vec::new();
        for (index, line) in content.lines().enumerate() {
            let text = line.trim_start();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let fault = |problem: &'static str| ParseHistoryError { timeline, line: index + 1, problem };
            let mut fields = text.splitn(3, '\t');
            let number = fields.next().and_then(|f| f.trim().parse::<u32>().ok()).and_then(TimelineId::new);
            let parent = number.ok_or_else(|| fault("expected a timeline number"))?;
            let switch: Lsn = fields
                .next()
                .and_then(|f| f.trim().parse().ok())
                .ok_or_else(|| fault("expected the LSN where the timeline ended"))?;
            if ancestors.last().is_some_and(|last| parent <= last.timeline) || parent >= timeline {
                return Err(fault("timelines must be in rising order"));
            }
            if ancestors.last().is_some_and(|last| switch < last.switch) {
                return Err(fault("switch points must not fall"));
            }
            let reason = fields.next().unwrap_or_default().trim().to_owned();
            ancestors.push(HistoryEntry { timeline: parent, switch, reason });
        }
        Ok(Self { timeline, ancestors })
    }

    /// The timeline whose history this is.
    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Its ancestors, oldest first.
    pub fn ancestors(&self) -> &[HistoryEntry] {
        &self.ancestors
    }

    /// Where `timeline` stops being part of this history: its switch point for an ancestor, [`Lsn::MAX`] for the
    /// timeline itself, `None` for a timeline that is not on the path.
    pub fn end_of(&self, timeline: TimelineId) -> Option<Lsn> {
        if timeline == self.timeline {
            return Some(Lsn::MAX);
        }
        self.ancestors.iter().find(|a| a.timeline == timeline).map(|a| a.switch)
    }

    /// Where `timeline` begins on this path: `0/0` for the oldest, its parent's switch point for the others.
    pub fn begin_of(&self, timeline: TimelineId) -> Option<Lsn> {
        let mut begin = Lsn::ZERO;
        for ancestor in &self.ancestors {
            if ancestor.timeline == timeline {
                return Some(begin);
            }
            begin = ancestor.switch;
        }
        (timeline == self.timeline).then_some(begin)
    }

    /// The timeline that the byte at `lsn` belongs to.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.ancestors.iter().find(|a| lsn < a.switch).map_or(self.timeline, |a| a.timeline)
    }

    /// True if a cluster at `position` can go on to this timeline: the position lies on the path, at or before the
    /// place where its timeline was left.
    pub fn contains(&self, position: Position) -> bool {
        self.end_of(position.timeline).is_some_and(|end| position.lsn <= end)
    }

    /// The timeline whose file recovery reads for a segment: the newest that had begun by then, because a promoted
    /// server copies the segment that holds the switch point.
    ///
    /// (Postgres: `XLogFileReadAnyTLI` in `access/transam/xlogrecovery.c`.)
    pub fn file_timeline(&self, segment: SegmentNumber, size: SegmentSize) -> TimelineId {
        let mut timeline = self.timeline;
        for ancestor in self.ancestors.iter().rev() {
            if segment >= size.segment_of(ancestor.switch) {
                break;
            }
            timeline = ancestor.timeline;
        }
        timeline
    }
}

/// A timeline history file that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read history of timeline {timeline}: line {line}: {problem}")]
pub struct ParseHistoryError {
    /// The timeline whose history it should be.
    pub timeline: TimelineId,
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn third() -> TimelineHistory {
        let content = "1\t0/2000100\tno recovery target specified\n\n2\t0/5000000\tbefore 2025-12-17 08:15:00+00\n";
        TimelineHistory::parse(tli(3), content).unwrap()
    }

    #[test]
    fn each_byte_belongs_to_the_timeline_that_wrote_it() {
        let history = third();
        assert_eq!(history.timeline_at(Lsn::new(0x0200_00FF)), tli(1));
        assert_eq!(history.timeline_at(Lsn::new(0x0200_0100)), tli(2));
        assert_eq!(history.timeline_at(Lsn::new(0x0500_0000)), tli(3));
        assert_eq!(history.begin_of(tli(2)), Some(Lsn::new(0x0200_0100)));
        assert_eq!(history.end_of(tli(3)), Some(Lsn::MAX));
        assert_eq!(history.end_of(tli(9)), None);
    }

    #[test]
    fn a_segment_with_a_switch_point_is_read_from_the_newer_timeline() {
        let (history, size) = (third(), SegmentSize::new(16 << 20).unwrap());
        assert_eq!(history.file_timeline(SegmentNumber::new(1), size), tli(1));
        assert_eq!(history.file_timeline(SegmentNumber::new(2), size), tli(2));
        assert_eq!(history.file_timeline(SegmentNumber::new(4), size), tli(2));
        assert_eq!(history.file_timeline(SegmentNumber::new(5), size), tli(3));
    }

    #[test]
    fn a_position_past_its_timelines_end_is_not_on_the_path() {
        let history = third();
        assert!(history.contains(Position { timeline: tli(1), lsn: Lsn::new(0x0200_0100) }));
        assert!(!history.contains(Position { timeline: tli(1), lsn: Lsn::new(0x0200_0101) }));
        assert!(!history.contains(Position { timeline: tli(7), lsn: Lsn::new(1) }));
    }

    #[test]
    fn a_broken_history_names_the_line() {
        for (content, line) in [("x\t0/1\t", 1), ("1\tnowhere\t", 1), ("2\t0/1\t\n1\t0/2\t", 2), ("3\t0/1\t", 1)] {
            assert_eq!(TimelineHistory::parse(tli(3), content).unwrap_err().line, line, "{content:?}");
        }
    }
}
