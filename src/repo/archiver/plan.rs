//! What to upload next, and how far the archive is whole: the archiver's decisions, without its hands.
//!
//! WAL becomes durable in two ways: as whole segments, several at once, and while a segment is unfinished as *tails*,
//! the bytes that came since the last one. Whatever the order in which uploads end, the archived position moves only
//! over WAL without a hole. Many small tails of a segment that takes its time are merged, as in a log-structured merge
//! tree: 64 tails become one, 64 of those again one, so that a quiet cluster does not leave thousands of objects.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::capture::spool::{Run, Spooled};
use crate::pg::{Lsn, Position, SegmentName, SegmentNumber, SegmentSize};

/// What bounds the archiver, each with its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of WAL that may be in memory or on their way at once. One object is always allowed, however large.
    pub content_max: u64,
    /// Objects on their way at once.
    pub uploads_max: usize,
    /// Of these, tails: in synchronous mode the next one need not wait for the answer to the last.
    pub tails_max: usize,
    /// WAL of an unfinished segment waits no longer than this before it is sent as a tail.
    pub tail_interval: Duration,
}

/// A tail: bytes `[from, to)` of the unfinished segment `name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The segment.
    pub name: SegmentName,
    /// First byte, a position in the WAL.
    pub from: Lsn,
    /// First byte that is not in it.
    pub to: Lsn,
    /// How many times its bytes were merged.
    level: u8,
}

impl Tail {
    /// A tail as it is found in the repository.
    pub const fn new(name: SegmentName, from: Lsn, to: Lsn) -> Self {
        Self { name, from, to, level: 0 }
    }
}

/// One object to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// A whole segment.
    Segment(SegmentName),
    /// Bytes that are nowhere else yet.
    Tail(Tail),
    /// One tail in the place of several, which are deleted when it is durable.
    Merge {
        /// The new one.
        tail: Tail,
        /// Those that it holds.
        replaces: Vec<Tail>,
    },
}

impl Work {
    /// Which bytes of the segment go into the object.
    pub fn range(&self) -> (SegmentName, Lsn, Lsn) {
        match self {
            Self::Segment(name) => (*name, name.start(), name.end()),
            Self::Tail(tail) | Self::Merge { tail, .. } => (tail.name, tail.from, tail.to),
        }
    }

    fn bytes(&self) -> u64 {
        let (_, from, to) = self.range();
        to - from
    }
}

/// What follows from an object that became durable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The archive is whole up to here now.
    pub archived: Option<Position>,
    /// Tails whose bytes are elsewhere in the repository.
    pub obsolete: Vec<Tail>,
    /// Segments that the spool need not keep.
    pub released: Vec<SegmentName>,
    /// Runs of which everything is archived.
    pub finished: Vec<Run>,
}

/// Tails that are merged into one. Reading a segment takes this many requests per level at most, and merging writes
/// each byte once more per level.
const MERGE_FAN_IN: usize = 64;

/// As much goes at once after a pause, without waiting for the interval: on a quiet cluster a commit is off-site at once.
const SMALL_TAIL: u64 = 1 << 20;

/// Decides what to upload next.
#[derive(Debug)]
pub struct Planner {
    size: SegmentSize,
    limits: Limits,
    /// Where the archive stood when the first run is met.
    start: Option<Position>,
    /// Runs as the spool published them, the one being archived first.
    runs: VecDeque<Run>,
    /// The last run that was done with.
    done_with: Option<Run>,
    /// Everything of the first run before this is durable or on its way. `None` until there is a run.
    planned: Option<Lsn>,
    /// Everything of the first run before this is durable.
    archived: Lsn,
    /// What was planned past `archived`: from -> (to, is it durable).
    covered: BTreeMap<Lsn, (Lsn, bool)>,
    /// What is on its way.
    in_flight: Vec<Work>,
    /// Durable tails of segments that are not durable as a whole, by position.
    tails: BTreeMap<SegmentNumber, Vec<Tail>>,
    /// Durable segments that had tails on their way.
    whole: BTreeSet<SegmentNumber>,
    /// Archived segments, until nothing reads them any more.
    releasing: Vec<SegmentName>,
    /// When the last tail was begun.
    tail_begun: Option<Instant>,
    /// Since when bytes wait that are in no tail.
    waiting_since: Option<Instant>,
}

impl Planner {
    /// Goes on with an archive that is whole up to `archived`, whose unfinished segment has these tails.
    pub fn new(size: SegmentSize, limits: Limits, archived: Option<Position>, tails: Vec<Tail>) -> Self {
        let mut by_segment: BTreeMap<SegmentNumber, Vec<Tail>> = BTreeMap::new();
        for tail in tails {
            by_segment.entry(tail.name.number).or_default().push(tail);
        }
        by_segment.values_mut().for_each(|tails| tails.sort_by_key(|t| t.from));
        Self {
            size,
            limits,
            start: archived,
            runs: VecDeque::new(),
            done_with: None,
            planned: None,
            archived: Lsn::ZERO,
            covered: BTreeMap::new(),
            in_flight: Vec::new(),
            tails: by_segment,
            whole: BTreeSet::new(),
            releasing: Vec::new(),
            tail_begun: None,
            waiting_since: None,
        }
    }

    /// Learns what the spool holds. Ask [`Planner::next`] afterwards.
    pub fn observe(&mut self, spooled: &Spooled, now: Instant) -> Outcome {
        let after = self.done_with.map(|d| spooled.runs.iter().position(|r| same(r, &d)).map_or(0, |i| i + 1));
        self.runs = spooled.runs.iter().skip(after.unwrap_or(0)).copied().collect();
        let mut outcome = Outcome::default();
        self.settle(&mut outcome);
        if self.waiting_since.is_none() && self.has_unplanned() {
            self.waiting_since = Some(now);
        }
        outcome
    }

    /// The next object to make, if there is one and room for it. `eager`: do not wait for the tail interval, because a
    /// commit waits for us or because we are about to stop.
    pub fn next(&mut self, now: Instant, eager: bool) -> Option<Work> {
        let work = self.next_piece(now, eager).or_else(|| self.next_merge())?;
        let in_flight: u64 = self.in_flight.iter().map(Work::bytes).sum();
        let fits = self.in_flight.is_empty()
            || (self.in_flight.len() < self.limits.uploads_max && in_flight + work.bytes() <= self.limits.content_max);
        if !fits {
            return None;
        }
        let (_, _, to) = work.range();
        match &work {
            Work::Segment(_) | Work::Tail(_) => {
                let from = self.planned.unwrap_or(self.archived);
                self.covered.insert(from, (to, false));
                self.planned = Some(to);
                self.waiting_since = self.has_unplanned().then_some(now);
            }
            Work::Merge { .. } => {}
        }
        if matches!(work, Work::Tail(_)) {
            self.tail_begun = Some(now);
        }
        self.in_flight.push(work.clone());
        Some(work)
    }

    /// When to ask again though nothing has happened: a tail falls due.
    pub fn wake_at(&self) -> Option<Instant> {
        self.tail_due()
    }

    /// An object is durable.
    pub fn done(&mut self, work: &Work) -> Outcome {
        let position = self.in_flight.iter().position(|w| w == work);
        self.in_flight.swap_remove(position.expect("only what was begun can be done"));
        let mut outcome = Outcome::default();
        match work {
            Work::Segment(name) => {
                for (_, (_, durable)) in self.covered.range_mut(name.start()..name.end()) {
                    *durable = true; // tails on their way included
                }
                outcome.obsolete.extend(self.tails.remove(&name.number).unwrap_or_default());
                self.whole.insert(name.number);
            }
            Work::Tail(tail) => {
                if let Some((_, durable)) = self.covered.get_mut(&tail.from) {
                    *durable = true;
                }
                self.keep_tail(*tail, &mut outcome);
            }
            Work::Merge { tail, replaces } => {
                if let Some(tails) = self.tails.get_mut(&tail.name.number) {
                    tails.retain(|t| !replaces.contains(t));
                    outcome.obsolete.extend(replaces);
                }
                self.keep_tail(*tail, &mut outcome);
            }
        }
        self.settle(&mut outcome);
        outcome
    }

    /// True if everything that the spool holds is archived.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && !self.has_unplanned()
    }

    /// Objects on their way, and bytes of WAL in them.
    pub fn in_flight(&self) -> (usize, u64) {
        (self.in_flight.len(), self.in_flight.iter().map(Work::bytes).sum())
    }

    fn keep_tail(&mut self, tail: Tail, outcome: &mut Outcome) {
        if self.whole.contains(&tail.name.number) {
            outcome.obsolete.push(tail);
            return;
        }
        let tails = self.tails.entry(tail.name.number).or_default();
        let at = tails.partition_point(|t| t.from < tail.from);
        tails.insert(at, tail);
    }

    fn has_unplanned(&self) -> bool {
        match (self.runs.front(), self.planned) {
            (Some(run), Some(planned)) => run.end > planned || self.runs.len() > 1,
            _ => false,
        }
    }

    fn next_piece(&self, now: Instant, eager: bool) -> Option<Work> {
        let (run, planned) = (self.runs.front()?, self.planned?);
        if run.end <= planned {
            return None;
        }
        let name = SegmentName::at(run.timeline, planned, self.size);
        if run.end >= name.end() {
            return Some(Work::Segment(name));
        }
        let tails = self.in_flight.iter().filter(|w| matches!(w, Work::Tail(_))).count();
        let hurry = eager || run.finished;
        if !hurry && self.tail_due().is_none_or(|due| now < due) {
            return None;
        }
        let tails_max = if eager { self.limits.tails_max } else { 1 };
        (tails < tails_max).then(|| Work::Tail(Tail::new(name, planned, run.end)))
    }

    /// When the unfinished segment's bytes that are in no tail should become one.
    fn tail_due(&self) -> Option<Instant> {
        let (run, planned) = (self.runs.front()?, self.planned?);
        let waiting_since = self.waiting_since?;
        if run.end <= planned {
            return None;
        }
        let longest = waiting_since + self.limits.tail_interval;
        if run.end - planned > SMALL_TAIL {
            return Some(longest);
        }
        let paced = self.tail_begun.map_or(waiting_since, |begun| begun + self.limits.tail_interval);
        Some(paced.max(waiting_since).min(longest))
    }

    fn next_merge(&self) -> Option<Work> {
        let run = self.runs.front()?;
        if self.in_flight.iter().any(|w| matches!(w, Work::Merge { .. })) {
            return None;
        }
        let tails = self.tails.get(&self.size.segment_of(self.archived))?;
        let last = tails.last()?;
        let same_level = tails.iter().rev().take_while(|t| t.level == last.level).count();
        let (_, mergeable) = tails.split_at_checked(tails.len().checked_sub(MERGE_FAN_IN)?)?;
        let first = mergeable.first()?;
        let contiguous = mergeable.windows(2).all(|w| matches!(w, [a, b] if a.to == b.from));
        let in_spool = run.timeline == first.name.timeline && run.begin <= first.from && last.to <= run.end;
        (same_level >= MERGE_FAN_IN && contiguous && in_spool).then(|| Work::Merge {
            tail: Tail { name: first.name, from: first.from, to: last.to, level: last.level.saturating_add(1) },
            replaces: mergeable.to_vec(),
        })
    }

    /// Moves the archived position over what is durable without a hole, and on to the next run at a run's end.
    fn settle(&mut self, outcome: &mut Outcome) {
        loop {
            let Some(run) = self.runs.front().copied() else { return };
            if self.planned.is_none() {
                self.archived = match self.start.take() {
                    Some(start) if start.timeline == run.timeline && start.lsn >= run.begin => start.lsn,
                    _ => run.begin,
                };
                self.planned = Some(self.archived);
            }
            let before = self.archived;
            while let Some(first) = self.covered.first_entry()
                && first.get().1
            {
                assert_eq!(*first.key(), self.archived, "the archive has a hole before {:?}", first.key());
                self.archived = first.get().0;
                first.remove();
            }
            if self.archived > before {
                outcome.archived = Some(Position { timeline: run.timeline, lsn: self.archived });
                let mut name = SegmentName::at(run.timeline, before, self.size);
                while name.end() <= self.archived {
                    self.releasing.push(name);
                    name = name.next();
                }
            }
            let busy: BTreeSet<SegmentNumber> = self.in_flight.iter().map(|w| w.range().0.number).collect();
            self.whole.retain(|number| busy.contains(number));
            outcome.released.extend(self.releasing.extract_if(.., |name| !busy.contains(&name.number)));
            if !run.finished || self.archived < run.end || !self.in_flight.is_empty() {
                return;
            }
            outcome.finished.push(run);
            self.runs.pop_front();
            self.done_with = Some(run);
            self.planned = None;
            self.whole.clear();
            self.tails.clear(); // of the last segment, which stays as tails
        }
    }
}

fn same(a: &Run, b: &Run) -> bool {
    (a.timeline, a.begin) == (b.timeline, b.begin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::TimelineId;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::new(MIB).unwrap()
    }

    fn limits() -> Limits {
        Limits { content_max: 4 * MIB, uploads_max: 4, tails_max: 3, tail_interval: Duration::from_secs(1) }
    }

    fn run(timeline: u32, begin: u64, end: u64, finished: bool) -> Run {
        Run { timeline: TimelineId::new(timeline).unwrap(), begin: Lsn::new(begin), end: Lsn::new(end), finished }
    }

    fn spooled(runs: &[Run]) -> Spooled {
        Spooled { runs: runs.to_vec(), bytes: 0 }
    }

    fn at(timeline: u32, lsn: u64) -> Position {
        Position { timeline: TimelineId::new(timeline).unwrap(), lsn: Lsn::new(lsn) }
    }

    fn name(timeline: u32, number: u64) -> SegmentName {
        SegmentName { timeline: TimelineId::new(timeline).unwrap(), number: SegmentNumber::new(number), size: size() }
    }

    #[test]
    fn the_archived_position_waits_for_the_slowest_segment() {
        let mut planner = Planner::new(size(), limits(), None, vec![]);
        let now = Instant::now();
        planner.observe(&spooled(&[run(1, 0, 3 * MIB, false)]), now);
        let works: Vec<Work> = std::iter::from_fn(|| planner.next(now, false)).collect();
        assert_eq!(works, [0, 1, 2].map(|n| Work::Segment(name(1, n))));
        assert_eq!(planner.done(&works[2]).archived, None);
        assert_eq!(planner.done(&works[0]).archived, Some(at(1, MIB)));
        let last = planner.done(&works[1]);
        assert_eq!(last.archived, Some(at(1, 3 * MIB)));
        assert_eq!(last.released, [name(1, 1), name(1, 2)]);
        assert!(planner.is_idle());
    }

    #[test]
    fn the_first_bytes_after_a_pause_go_at_once_and_the_next_wait_for_the_interval() {
        let mut planner = Planner::new(size(), limits(), None, vec![]);
        let now = Instant::now();
        planner.observe(&spooled(&[run(1, 0, 100, false)]), now);
        let first = planner.next(now, false).unwrap();
        assert_eq!(first, Work::Tail(Tail::new(name(1, 0), Lsn::new(0), Lsn::new(100))));
        assert_eq!(planner.done(&first).archived, Some(at(1, 100)));
        planner.observe(&spooled(&[run(1, 0, 200, false)]), now + Duration::from_millis(10));
        assert_eq!(planner.next(now + Duration::from_millis(10), false), None);
        let due = planner.wake_at().unwrap();
        assert_eq!(due, now + Duration::from_secs(1));
        assert_eq!(planner.next(due, false), Some(Work::Tail(Tail::new(name(1, 0), Lsn::new(100), Lsn::new(200)))));
    }

    #[test]
    fn a_waiting_commit_is_sent_at_once_and_need_not_wait_for_the_last_answer() {
        let mut planner = Planner::new(size(), limits(), None, vec![]);
        let now = Instant::now();
        for (end, from) in [(100, 0), (200, 100), (300, 200)] {
            planner.observe(&spooled(&[run(1, 0, end, false)]), now);
            let expected = Work::Tail(Tail::new(name(1, 0), Lsn::new(from), Lsn::new(end)));
            assert_eq!(planner.next(now, true), Some(expected));
        }
        planner.observe(&spooled(&[run(1, 0, 400, false)]), now);
        assert_eq!(planner.next(now, true), None, "three tails are on their way");
    }

    #[test]
    fn a_whole_segment_makes_its_tails_obsolete_those_on_their_way_included() {
        let mut planner = Planner::new(size(), limits(), None, vec![]);
        let now = Instant::now();
        planner.observe(&spooled(&[run(1, 0, 100, false)]), now);
        let first = planner.next(now, true).unwrap();
        planner.done(&first);
        planner.observe(&spooled(&[run(1, 0, 200, false)]), now);
        let second = planner.next(now, true).unwrap();
        planner.observe(&spooled(&[run(1, 0, MIB, false)]), now);
        let whole = planner.next(now, true).unwrap();
        assert_eq!(whole, Work::Segment(name(1, 0)));
        let outcome = planner.done(&whole);
        assert_eq!(outcome.archived, Some(at(1, MIB)), "the tail's bytes are in the segment");
        assert_eq!(outcome.obsolete, [Tail::new(name(1, 0), Lsn::new(0), Lsn::new(100))]);
        assert_eq!(outcome.released, [], "the tail on its way may still be reading");
        let outcome = planner.done(&second);
        assert_eq!(outcome.obsolete, [Tail::new(name(1, 0), Lsn::new(100), Lsn::new(200))]);
        assert_eq!(outcome.released, [name(1, 0)]);
    }

    #[test]
    fn an_archive_that_reaches_into_a_segment_is_continued_there() {
        let found = Tail::new(name(1, 0), Lsn::new(0), Lsn::new(500));
        let mut planner = Planner::new(size(), limits(), Some(at(1, 500)), vec![found]);
        let now = Instant::now();
        planner.observe(&spooled(&[run(1, 0, 300, false)]), now);
        assert_eq!(planner.next(now, true), None, "what the spool holds so far is archived already");
        planner.observe(&spooled(&[run(1, 0, MIB, false)]), now);
        let whole = planner.next(now, true).unwrap();
        assert_eq!(planner.done(&whole).obsolete, [found]);
    }

    #[test]
    fn a_timeline_that_ended_stays_as_tails_and_the_next_one_follows() {
        let mut planner = Planner::new(size(), limits(), None, vec![]);
        let now = Instant::now();
        planner.observe(&spooled(&[run(1, 0, 700, true), run(2, 0, 900, false)]), now);
        let old = planner.next(now, false).unwrap();
        assert_eq!(old, Work::Tail(Tail::new(name(1, 0), Lsn::new(0), Lsn::new(700))));
        assert_eq!(planner.next(now, true), None, "first things first");
        let outcome = planner.done(&old);
        assert_eq!((outcome.archived, outcome.finished), (Some(at(1, 700)), vec![run(1, 0, 700, true)]));
        assert_eq!(outcome.obsolete, []);
        let new = planner.next(now, true).unwrap();
        assert_eq!(new, Work::Tail(Tail::new(name(2, 0), Lsn::new(0), Lsn::new(900))));
        // The spool has forgotten the old run by now, or has not.
        planner.observe(&spooled(&[run(1, 0, 700, true), run(2, 0, 950, false)]), now);
        assert_eq!(planner.done(&new).archived, Some(at(2, 900)));
        planner.observe(&spooled(&[run(2, 0, 960, false)]), now);
        assert!(!planner.is_idle());
    }

    #[test]
    fn many_small_tails_become_a_few() {
        let mut planner = Planner::new(size(), limits(), None, vec![]);
        let mut now = Instant::now();
        let mut alive: Vec<Tail> = vec![];
        for end in 1..=20_000u64 {
            now += Duration::from_secs(2);
            planner.observe(&spooled(&[run(1, 0, end, false)]), now);
            while let Some(work) = planner.next(now, false) {
                match &work {
                    Work::Tail(tail) | Work::Merge { tail, .. } => alive.push(*tail),
                    Work::Segment(_) => unreachable!("the segment is not whole"),
                }
                let obsolete = planner.done(&work).obsolete;
                alive.retain(|t| !obsolete.contains(t));
            }
            assert!(alive.len() <= 3 * MERGE_FAN_IN, "{} tails after {end}", alive.len());
        }
        alive.sort_by_key(|t| t.from);
        assert_eq!(alive.iter().fold(Lsn::ZERO, |at, t| if t.from == at { t.to } else { at }), Lsn::new(20_000));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Grow(u64),
        Switch,
        Finish(prop::sample::Index),
        Start(bool),
        Wait(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (1..MIB + MIB / 2).prop_map(Step::Grow),
            1 => Just(Step::Switch),
            6 => any::<prop::sample::Index>().prop_map(Step::Finish),
            6 => any::<bool>().prop_map(Step::Start),
            3 => (1..1500u64).prop_map(Step::Wait),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        // Whatever the order in which uploads end: what is called archived is durable, nothing that the archive still
        // needs is deleted or let go, limits hold, and in the end everything is archived.
        #[test]
        fn what_is_called_archived_is_in_the_repository(steps in steps()) {
            let mut planner = Planner::new(size(), limits(), None, vec![]);
            let mut now = Instant::now();
            let mut runs = vec![run(1, 0, 0, false)];
            let mut flying: Vec<Work> = vec![];
            let mut stored: Vec<Work> = vec![]; // what the repository holds
            let mut done_with = 0;
            let mut archived = at(1, 0);

            let check = |outcome: &Outcome, stored: &mut Vec<Work>, flying: &[Work], runs: &[Run]| {
                stored.retain(|w| match w {
                    Work::Segment(_) => true,
                    Work::Tail(t) | Work::Merge { tail: t, .. } => !outcome.obsolete.contains(t),
                });
                if let Some(archived) = outcome.archived {
                    let run = runs.iter().find(|r| r.timeline == archived.timeline).unwrap();
                    let mut reach = run.begin;
                    while let Some(to) = stored.iter().map(Work::range)
                        .filter(|(n, f, t)| n.timeline == archived.timeline && *f <= reach && *t > reach)
                        .map(|(_, _, t)| t).max() { reach = to; }
                    assert!(reach >= archived.lsn, "{archived} is called archived, {reach} is");
                }
                for name in &outcome.released {
                    assert!(stored.contains(&Work::Segment(*name)), "{name} was let go and is not stored whole");
                    assert!(!flying.iter().any(|w| w.range().0 == *name), "{name} is being read");
                }
            };
            for step in steps.into_iter().chain(std::iter::repeat_n(Step::Start(true), 1)) {
                match step {
                    Step::Grow(bytes) => { let last = runs.last_mut().unwrap(); last.end = last.end + bytes; }
                    Step::Switch => {
                        let last = runs.last_mut().unwrap();
                        last.finished = true;
                        let (timeline, begin) = (last.timeline.get() + 1, last.end.align_down(MIB).bytes());
                        runs.push(run(timeline, begin, begin, false));
                    }
                    Step::Start(eager) => {
                        let outcome = planner.observe(&spooled(&runs[done_with..]), now);
                        done_with += outcome.finished.len();
                        check(&outcome, &mut stored, &flying, &runs);
                        flying.extend(planner.next(now, eager));
                        prop_assert!(flying.len() <= limits().uploads_max);
                        let content: u64 = flying.iter().map(Work::bytes).sum();
                        prop_assert!(flying.len() == 1 || content <= limits().content_max);
                    }
                    Step::Finish(index) if !flying.is_empty() => {
                        let work = flying.swap_remove(index.index(flying.len()));
                        stored.push(work.clone());
                        let outcome = planner.done(&work);
                        done_with += outcome.finished.len();
                        archived = outcome.archived.unwrap_or(archived);
                        check(&outcome, &mut stored, &flying, &runs);
                    }
                    Step::Finish(_) => {}
                    Step::Wait(ms) => now += Duration::from_millis(ms),
                }
            }
            // Let everything end.
            for _ in 0..10_000 {
                let outcome = planner.observe(&spooled(&runs[done_with..]), now);
                done_with += outcome.finished.len();
                flying.extend(planner.next(now, true));
                if let Some(work) = flying.pop() {
                    stored.push(work.clone());
                    let outcome = planner.done(&work);
                    done_with += outcome.finished.len();
                    archived = outcome.archived.unwrap_or(archived);
                    check(&outcome, &mut stored, &flying, &runs);
                }
            }
            prop_assert!(planner.is_idle());
            for run in &runs {
                let mut reach = run.begin;
                while let Some(to) = stored.iter().map(Work::range)
                    .filter(|(n, f, t)| n.timeline == run.timeline && *f <= reach && *t > reach)
                    .map(|(_, _, t)| t).max() { reach = to; }
                prop_assert_eq!(reach, run.end, "timeline {}", run.timeline);
            }
            if runs.last().unwrap().end > runs.last().unwrap().begin {
                prop_assert_eq!(archived, runs.last().unwrap().end_position());
            }
        }
    }
}
