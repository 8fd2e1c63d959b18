//! Questions to the indexes of a stretch of WAL, answered by reading as few objects as possible.
//!
//! ```text
//!   merged/../65536   |--------------------------------|                 read first
//!   merged/../04096                                     |--|--|
//!   merged/../00256                                            |-|-|
//!   merged/../00016                                                 |||
//!   index/                                                             ....  not merged yet: at most 15
//! ```
//!
//! A question begins with the largest objects that there are (a listing of each level finds them) and looks into their
//! parts only where the sums cannot answer. Of a year of WAL that is some dozens of reads, and a handful where nothing but
//! one place is looked for.
//!
//! **Honest.** Segments without an index are named in each answer, never passed over: what they hold is not known here,
//! and whoever needs to know reads their WAL. An index or merged index that cannot be read counts as one that is not there.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::format::{CommittedDdl, LargeTransaction, MinuteTally, RestorePoint, SegmentIndex};
use super::level::{FAN_OUT, Group, Level, Span};
use super::merged::{MergedIndex, Tallies, begin_of, to_tally};
use super::summary::Summary;
use crate::detect::Relation;
use crate::pg::{Lsn, PgTime, RelFile, SegmentName, SegmentNumber, SegmentSize, TimelineHistory, TimelineId, Xid};
use crate::repo::catalog::LsnRange;
use crate::repo::layout::Object;
use crate::repo::{RepoError, Repository};

/// Objects read at once.
const READS_MAX: usize = 8;

/// Merged indexes that are kept for the next question: of a year there are about a hundred.
const KEPT_MAX: usize = 256;

/// Tallies of an answer: about 100 MiB. (A year by the hour, and a hundred files in each.)
const TALLIES_MAX: usize = 1_000_000;

/// Events of an answer.
const EVENTS_MAX: usize = 262_144;

/// Microseconds of a minute.
const MINUTE: i64 = 60_000_000;

/// Large transactions of an answer.
const LARGEST_MAX: usize = 16;

/// Questions to the indexes of the WAL along one history of timelines.
#[derive(Debug)]
pub struct Lookup {
    repo: Repository,
    path: TimelineHistory,
    size: SegmentSize,
    kept: Mutex<HashMap<Group, Arc<MergedIndex>>>,
}

/// The first segment that may hold what was looked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// This one does, or may: its summary says so.
    Segment(SegmentName, Arc<SegmentIndex>),
    /// This one has no index. Read its WAL, and go on behind it (before it, if the last was looked for).
    Unindexed(SegmentName),
}

/// Segments that follow each other, and have no index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unindexed {
    /// The first of them.
    pub first: SegmentName,
    /// How many they are, at least 1.
    pub segments: u64,
    /// The latest end of a transaction in the indexes before them, and
    pub after: Option<PgTime>,
    /// the earliest in the next index behind them that has any: what they hold happened between, as far as the server's
    /// clock goes forwards.
    pub before: Option<PgTime>,
}

impl Unindexed {
    /// The segments.
    pub fn names(&self) -> impl Iterator<Item = SegmentName> {
        let first = self.first;
        let numbers = first.number.get()..first.number.get().saturating_add(self.segments);
        numbers.map(move |number| SegmentName { number: SegmentNumber::new(number), ..first })
    }
}

/// What transactions did that committed in a span of time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activity {
    /// By time and file, in this order. `minute` is where the unit of time begins that was asked for.
    pub tallies: Vec<MinuteTally>,
    /// Tallies that found no room in the indexes: the sums are at least these.
    pub tallies_left_out: u64,
    /// What was done to definitions, in WAL order of the commits.
    pub events: Vec<CommittedDdl>,
    /// Events that found no room in the indexes, of those that were asked for.
    pub events_left_out: u64,
    /// Named restore points, in WAL order.
    pub restore_points: Vec<RestorePoint>,
    /// The transactions that changed most rows, the largest first; at most 16.
    pub largest: Vec<LargeTransaction>,
    /// Whose the files are, by their last known names.
    pub names: BTreeMap<RelFile, Arc<Relation>>,
    /// Segments without an index that may hold more of it.
    pub unindexed: Vec<Unindexed>,
}

/// Which activity is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Transactions that committed at or after this,
    pub from: PgTime,
    /// and before this. Where one of the two does not lie between two minutes, tallies of the whole minute are given,
    /// and all else exactly.
    pub to: PgTime,
    /// Minutes that a tally of the answer stands for, at least 1: 1 for minutes, 60 for hours, counted from 2000-01-01 UTC.
    pub minutes_each: i64,
    /// Also what loses nothing: tables made, altered, written anew.
    pub all_events: bool,
}

impl Wanted {
    fn holds(&self, time: PgTime) -> bool {
        self.from <= time && time < self.to
    }
}

/// An object that tells of segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Piece {
    Merged(Group),
    Segment(SegmentName),
    Unindexed(TimelineId, Span),
}

/// Whether a visitor has enough.
type Flow = ControlFlow<()>;

/// Is led through the objects of a range, in WAL order or against it.
trait Visitor: Send {
    /// Whether more is wanted of a segment or a group than its summary; `whole` if all of it lies in the range.
    fn wants(&self, summary: &Summary, whole: bool) -> bool;
    /// The first that it wants is enough: it is no use to read ahead of one whose summary says so.
    fn takes_one(&self) -> bool {
        false
    }
    /// Hears of one that it does not want.
    fn skip(&mut self, summary: &Summary);
    /// A group, all of which lies in the range, that it wants. Breaks off here if that is enough; goes on with its parts.
    fn merged(&mut self, index: &MergedIndex) -> Flow;
    /// A segment that it wants. Breaks off everything if that is enough.
    fn segment(&mut self, name: SegmentName, index: Arc<SegmentIndex>) -> Flow;
    /// Segments without an index. Breaks off everything if that is enough.
    fn unindexed(&mut self, first: SegmentName, segments: u64) -> Flow;
}

/// In which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Forwards,
    Backwards,
}

impl Repository {
    /// Questions to the indexes of the WAL that leads to the end of `path`'s timeline.
    pub fn lookup(&self, path: TimelineHistory, size: SegmentSize) -> Lookup {
        Lookup { repo: self.clone(), path, size, kept: Mutex::default() }
    }
}

impl Lookup {
    /// What the segments of `range` hold, as one; and those among them that have no index. A segment that lies in the range
    /// in part counts as a whole.
    ///
    /// # Errors
    /// Of the store.
    pub async fn summary(&self, range: LsnRange) -> Result<(Summary, Vec<Unindexed>), RepoError> {
        let mut sums = Sums::default();
        self.walk(range, Order::Forwards, &mut sums).await?;
        Ok((sums.summary, sums.holes.finish()))
    }

    /// The first segment of `range`, in WAL order, whose summary is `wanted`, or that has no index and lies before it;
    /// `None` if there is neither. What is wanted of a summary must be wanted of every sum that has it in it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn first(
        &self,
        range: LsnRange,
        wanted: impl Fn(&Summary) -> bool + Send,
    ) -> Result<Option<Found>, RepoError> {
        self.find(range, Order::Forwards, wanted).await
    }

    /// As [`Lookup::first`], from the range's end: the last segment, or one without an index behind it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn last(
        &self,
        range: LsnRange,
        wanted: impl Fn(&Summary) -> bool + Send,
    ) -> Result<Option<Found>, RepoError> {
        self.find(range, Order::Backwards, wanted).await
    }

    /// The segment in which recovery to the time `at` stops: the first, in WAL order, in which a transaction ended after
    /// it (or at it, with `or_at`), or the first without an index before that. `None` if none did.
    ///
    /// (Times of ends do not rise with the WAL: Postgres stops at the first end whose time is past the target, whatever
    /// follows.)
    ///
    /// # Errors
    /// Of the store.
    pub async fn first_end_after(&self, range: LsnRange, at: PgTime, or_at: bool) -> Result<Option<Found>, RepoError> {
        self.first(range, |summary| summary.has_end_after(at, or_at)).await
    }

    /// The first segment in which the transaction or subtransaction `xid` ended, or the first without an index before it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn end_of(&self, range: LsnRange, xid: Xid) -> Result<Option<Found>, RepoError> {
        let mut from = range.from;
        loop {
            let rest = LsnRange { from, to: range.to };
            match self.first(rest, |summary| summary.may_hold(xid)).await? {
                // Its ids lie around this one, and this one is not among them.
                Some(Found::Segment(name, index)) if !index.ends.iter().any(|end| end.includes(xid)) => {
                    from = name.end();
                }
                found => return Ok(found),
            }
        }
    }

    /// The restore points with this name, in WAL order; and the segments that have no index and may hold others.
    ///
    /// # Errors
    /// Of the store.
    pub async fn restore_points(
        &self,
        range: LsnRange,
        name: &[u8],
    ) -> Result<(Vec<RestorePoint>, Vec<Unindexed>), RepoError> {
        let mut points = Points { name, found: Vec::new(), holes: Holes::default() };
        self.walk(range, Order::Forwards, &mut points).await?;
        Ok((points.found, points.holes.finish()))
    }

    /// What transactions did that committed in the segments of `range`, in a span of time. A segment that lies in the range
    /// in part counts as a whole.
    ///
    /// # Errors
    /// Of the store.
    pub async fn activity(&self, range: LsnRange, wanted: Wanted) -> Result<Activity, RepoError> {
        let mut gathered = Gather::new(wanted);
        self.walk(range, Order::Forwards, &mut gathered).await?;
        Ok(gathered.finish())
    }

    /// The segments of `range` in which a transaction ended at a time of `[from, to)`, in WAL order; and those without an
    /// index that may hold such an end. For whoever wants the ends themselves: of a long span they are many.
    ///
    /// # Errors
    /// Of the store.
    pub async fn segments_with_ends(
        &self,
        range: LsnRange,
        from: PgTime,
        to: PgTime,
    ) -> Result<(Vec<SegmentName>, Vec<Unindexed>), RepoError> {
        let mut names = Names { from, to, found: Vec::new(), holes: Holes::default() };
        self.walk(range, Order::Forwards, &mut names).await?;
        Ok((names.found, names.holes.between(from, to)))
    }

    async fn find(
        &self,
        range: LsnRange,
        order: Order,
        wanted: impl Fn(&Summary) -> bool + Send,
    ) -> Result<Option<Found>, RepoError> {
        let mut find = Find { wanted, order, found: None };
        self.walk(range, order, &mut find).await?;
        Ok(find.found)
    }

    /// The timelines whose files hold `range`, and which of their segments, in WAL order.
    fn stretches(&self, range: LsnRange) -> Vec<(TimelineId, Span)> {
        let mut stretches = Vec::new();
        if range.from >= range.to {
            return stretches;
        }
        let mut from = self.size.segment_of(range.from).get();
        let to = self.size.segment_of(Lsn::new(range.to.bytes() - 1)).get() + 1;
        while from < to {
            let timeline = self.path.file_timeline(SegmentNumber::new(from), self.size);
            let switches = self.path.ancestors().iter().map(|ancestor| self.size.segment_of(ancestor.switch).get());
            let end = switches.filter(|number| *number > from).min().unwrap_or(to).min(to);
            stretches.push((timeline, Span { from, to: end }));
            from = end;
        }
        stretches
    }

    /// The largest objects that tell of `range`, in WAL order.
    async fn cover(&self, range: LsnRange) -> Result<Vec<Piece>, RepoError> {
        let mut pieces = Vec::new();
        for (timeline, span) in self.stretches(range) {
            self.cover_span(timeline, span, Level::ALL.last().copied(), &mut pieces).await?;
        }
        Ok(pieces)
    }

    /// The objects up to `top` that tell of segments of one timeline.
    async fn cover_span(
        &self,
        timeline: TimelineId,
        span: Span,
        top: Option<Level>,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), RepoError> {
        let mut bare = vec![span];
        let mut found: Vec<(u64, Piece)> = Vec::new();
        for level in Level::ALL.into_iter().rev().filter(|level| Some(*level) <= top) {
            let mut rest = Vec::new();
            for span in bare {
                // An object that tells of more than is asked for is worth its listing only where that is much.
                let groups = if span.len() < level.segments() {
                    Vec::new()
                } else {
                    self.list_groups(timeline, level, span).await?
                };
                let mut at = span.from;
                for group in groups {
                    rest.push(Span { from: at, to: group.span().from });
                    at = group.span().to;
                    found.push((group.span().from, Piece::Merged(group)));
                }
                rest.push(Span { from: at, to: span.to });
            }
            rest.retain(|span| !span.is_empty());
            bare = rest;
        }
        for span in bare {
            let mut at = span.from;
            let mut hole = |from: u64, to: u64| {
                if from < to {
                    found.push((from, Piece::Unindexed(timeline, Span { from, to })));
                }
            };
            let segments = self.list_segments(timeline, span).await?;
            for segment in &segments {
                hole(at, segment.number.get());
                at = segment.number.get() + 1;
            }
            hole(at, span.to);
            found.extend(segments.into_iter().map(|segment| (segment.number.get(), Piece::Segment(segment))));
        }
        found.sort_by_key(|(from, _)| *from);
        pieces.extend(found.into_iter().map(|(_, piece)| piece));
        Ok(())
    }

    /// The groups of a level that have an object and tell of segments of `span`.
    pub(super) async fn list_groups(
        &self,
        timeline: TimelineId,
        level: Level,
        span: Span,
    ) -> Result<Vec<Group>, RepoError> {
        let layout = self.repo.layout();
        let first = SegmentName { timeline, number: SegmentNumber::new(span.from), size: self.size };
        let after = layout.before_merged(&Group::of(&first, level));
        self.repo
            .objects(layout.merged_folder(timeline, level), Some(after))
            .try_filter_map(|object| {
                let group = match layout.parse(&object.key, self.size) {
                    Some(Object::Merged(group)) => Some(group),
                    _ => None,
                };
                std::future::ready(Ok(group))
            })
            .try_take_while(|group| std::future::ready(Ok(group.span().from < span.to)))
            .try_filter(|group| std::future::ready(!group.span().and(span).is_empty()))
            .try_collect()
            .await
    }

    /// The segments of `span` that have an index.
    pub(super) async fn list_segments(&self, timeline: TimelineId, span: Span) -> Result<Vec<SegmentName>, RepoError> {
        let layout = self.repo.layout();
        let first = SegmentName { timeline, number: SegmentNumber::new(span.from), size: self.size };
        self.repo
            .objects(layout.index_folder(timeline), Some(layout.before_index(&first)))
            .try_filter_map(|object| {
                let segment = match layout.parse(&object.key, self.size) {
                    Some(Object::Index(segment)) => Some(segment),
                    _ => None,
                };
                std::future::ready(Ok(segment))
            })
            .try_take_while(|segment| std::future::ready(Ok(segment.number.get() < span.to)))
            .try_filter(|segment| std::future::ready(segment.number.get() >= span.from))
            .try_collect()
            .await
    }

    /// Leads `visitor` through what is known of `range`.
    async fn walk(&self, range: LsnRange, order: Order, visitor: &mut dyn Visitor) -> Result<(), RepoError> {
        let stretches = self.stretches(range);
        // Which of a timeline's segments are asked for.
        let asked = |timeline: TimelineId| {
            let stretch = stretches.iter().find(|(other, _)| *other == timeline);
            stretch.map_or(Span { from: 0, to: 0 }, |(_, span)| *span)
        };
        let mut stack = Vec::new(); // the next one last
        push_all(&mut stack, self.cover(range).await?.into_iter().map(Step::new).collect(), order);
        let mut read = HashMap::new();
        while let Some(step) = stack.pop() {
            if let Piece::Unindexed(timeline, span) = step.piece {
                let first = SegmentName { timeline, number: SegmentNumber::new(span.from), size: self.size };
                if visitor.unindexed(first, span.len()).is_break() {
                    return Ok(());
                }
                continue;
            }
            if step.can_be_skipped(visitor, asked) {
                visitor.skip(step.summary.as_ref().unwrap_or(&Summary::default()));
                continue;
            }
            let is_last = step.summary.is_some() && visitor.takes_one();
            let ahead = stack.iter().rev().filter(|next| !next.can_be_skipped(visitor, asked));
            let ahead = ahead.take(if is_last { 0 } else { READS_MAX - 1 });
            let wanted: Vec<Piece> = std::iter::once(&step).chain(ahead).map(|step| step.piece).collect();
            self.read_all(&wanted, &mut read).await?;
            match (step.piece, read.remove(&step.piece).flatten()) {
                (Piece::Segment(name), Some(Read::Segment(index))) => {
                    let summary = Summary::of(&index);
                    if !visitor.wants(&summary, true) {
                        visitor.skip(&summary);
                    } else if visitor.segment(name, index).is_break() {
                        return Ok(());
                    }
                }
                (Piece::Merged(group), Some(Read::Merged(index))) => {
                    let known = Step { summary: Some(index.summary()), ..step };
                    if known.can_be_skipped(visitor, asked) {
                        visitor.skip(&index.summary());
                    } else if !known.is_whole(asked) || visitor.merged(&index).is_continue() {
                        push_all(&mut stack, parts(&group, &index, asked(group.timeline)), order);
                    }
                }
                // It cannot be read, or went since it was listed: what is below it may be there.
                (Piece::Merged(group), _) => {
                    let (mut below, span) = (Vec::new(), asked(group.timeline).and(group.span()));
                    self.cover_span(group.timeline, span, group.level.below(), &mut below).await?;
                    push_all(&mut stack, below.into_iter().map(Step::new).collect(), order);
                }
                (Piece::Segment(name), _) => {
                    let from = name.number.get();
                    stack.push(Step::new(Piece::Unindexed(name.timeline, Span { from, to: from + 1 })));
                }
                (Piece::Unindexed(..), _) => {}
            }
        }
        Ok(())
    }

    /// Reads what is not there yet.
    async fn read_all(&self, pieces: &[Piece], read: &mut HashMap<Piece, Option<Read>>) -> Result<(), RepoError> {
        if pieces.first().is_some_and(|first| read.contains_key(first)) {
            return Ok(());
        }
        let missing: Vec<Piece> = pieces.iter().filter(|piece| !read.contains_key(piece)).copied().collect();
        let mut reads = stream::iter(missing)
            .map(|piece| async move { Ok::<_, RepoError>((piece, self.read(piece).await?)) })
            .buffer_unordered(READS_MAX);
        while let Some((piece, content)) = reads.try_next().await? {
            read.insert(piece, content);
        }
        Ok(())
    }

    /// `None` if it is not there, or cannot be read.
    async fn read(&self, piece: Piece) -> Result<Option<Read>, RepoError> {
        let read = match piece {
            Piece::Unindexed(..) => return Ok(None),
            Piece::Segment(name) => self.repo.index(&name).await.map(|index| index.map(Arc::new).map(Read::Segment)),
            Piece::Merged(group) => {
                let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(index) = kept().get(&group) {
                    return Ok(Some(Read::Merged(index.clone())));
                }
                let read = self.repo.merged_index(&group).await.map(|index| index.map(Arc::new));
                if let Ok(Some(index)) = &read {
                    let mut kept = kept();
                    if kept.len() >= KEPT_MAX {
                        kept.clear();
                    }
                    kept.insert(group, index.clone());
                }
                read.map(|index| index.map(Read::Merged))
            }
        };
        match read {
            Err(RepoError::Damaged { key, problem }) => {
                tracing::warn!(
                    key,
                    "an index cannot be read: {problem}; `walguard index rebuild --check` makes it anew"
                );
                Ok(None)
            }
            read => read,
        }
    }
}

/// The content of an object.
#[derive(Debug)]
enum Read {
    Segment(Arc<SegmentIndex>),
    Merged(Arc<MergedIndex>),
}

/// What to look at.
#[derive(Debug)]
struct Step {
    piece: Piece,
    /// What it holds in short, if that is known before it is read.
    summary: Option<Summary>,
}

impl Step {
    const fn new(piece: Piece) -> Self {
        Self { piece, summary: None }
    }

    /// True if all its segments are asked for, and have an index.
    fn is_whole(&self, asked: impl Fn(TimelineId) -> Span) -> bool {
        match (self.piece, &self.summary) {
            (Piece::Merged(group), Some(summary)) => {
                asked(group.timeline).contains(group.span()) && summary.segments == group.span().len()
            }
            (Piece::Segment(_), _) => true,
            _ => false,
        }
    }

    /// True if it is known that nothing in it is wanted, and that no segment of it is without an index.
    fn can_be_skipped(&self, visitor: &dyn Visitor, asked: impl Fn(TimelineId) -> Span) -> bool {
        let is_full = match (self.piece, &self.summary) {
            (Piece::Unindexed(..), _) | (_, None) => return false,
            (Piece::Merged(group), Some(summary)) => summary.segments == group.span().len(),
            (Piece::Segment(_), _) => true,
        };
        is_full && self.summary.as_ref().is_some_and(|summary| !visitor.wants(summary, self.is_whole(asked)))
    }
}

fn push_all(stack: &mut Vec<Step>, mut steps: Vec<Step>, order: Order) {
    if order == Order::Forwards {
        steps.reverse();
    }
    stack.append(&mut steps);
}

/// The parts of a group that are asked for, with the holes between them.
fn parts(group: &Group, index: &MergedIndex, asked: Span) -> Vec<Step> {
    let below = group.level.below();
    (0..FAN_OUT as u32)
        .filter_map(|place| {
            let span = MergedIndex::span_of(group, place);
            let name = SegmentName { number: SegmentNumber::new(span.from), ..group.first() };
            let asked = span.and(asked);
            let part = index.parts.iter().find(|part| part.place == place);
            let piece = match (part, below) {
                _ if asked.is_empty() => return None,
                (None, _) => Piece::Unindexed(group.timeline, asked),
                (Some(_), None) => Piece::Segment(name),
                (Some(_), Some(level)) => Piece::Merged(Group::of(&name, level)),
            };
            Some(Step { piece, summary: part.map(|part| part.summary.clone()) })
        })
        .collect()
}

/// Segments without an index, and when they may have been written.
#[derive(Debug, Default)]
struct Holes {
    found: Vec<Unindexed>,
    latest: Option<PgTime>,
    /// So many of `found` have an index with ends of transactions behind them.
    closed: usize,
}

impl Holes {
    fn see(&mut self, summary: &Summary) {
        let Some((earliest, latest)) = summary.end_times else { return };
        for hole in self.found.iter_mut().skip(self.closed) {
            hole.before = Some(earliest);
        }
        self.closed = self.found.len();
        self.latest = self.latest.max(Some(latest));
    }

    fn hole(&mut self, first: SegmentName, segments: u64) {
        if let Some(before) = self.found.get_mut(self.closed..).and_then(<[Unindexed]>::last_mut)
            && before.first.timeline == first.timeline
            && before.first.number.get() + before.segments == first.number.get()
        {
            before.segments += segments;
            return;
        }
        self.found.push(Unindexed { first, segments, after: self.latest, before: None });
    }

    fn finish(self) -> Vec<Unindexed> {
        self.found
    }

    /// Those that may hold an end at a time of `[from, to)`.
    fn between(self, from: PgTime, to: PgTime) -> Vec<Unindexed> {
        let may = |hole: &Unindexed| {
            hole.after.is_none_or(|after| after < to) && hole.before.is_none_or(|before| from <= before)
        };
        self.found.into_iter().filter(may).collect()
    }
}

/// Adds up.
#[derive(Default)]
struct Sums {
    summary: Summary,
    holes: Holes,
}

impl Visitor for Sums {
    fn wants(&self, _summary: &Summary, whole: bool) -> bool {
        !whole
    }

    fn skip(&mut self, summary: &Summary) {
        self.summary.add(summary);
        self.holes.see(summary);
    }

    fn merged(&mut self, _index: &MergedIndex) -> Flow {
        Flow::Continue(())
    }

    fn segment(&mut self, _name: SegmentName, _index: Arc<SegmentIndex>) -> Flow {
        Flow::Continue(()) // a segment is whole, and was added up as such
    }

    fn unindexed(&mut self, first: SegmentName, segments: u64) -> Flow {
        self.holes.hole(first, segments);
        Flow::Continue(())
    }
}

struct Find<W> {
    wanted: W,
    order: Order,
    found: Option<Found>,
}

impl<W: Fn(&Summary) -> bool + Send> Visitor for Find<W> {
    fn wants(&self, summary: &Summary, _whole: bool) -> bool {
        (self.wanted)(summary)
    }

    fn takes_one(&self) -> bool {
        true
    }

    fn skip(&mut self, _summary: &Summary) {}

    fn merged(&mut self, _index: &MergedIndex) -> Flow {
        Flow::Continue(())
    }

    fn segment(&mut self, name: SegmentName, index: Arc<SegmentIndex>) -> Flow {
        self.found = Some(Found::Segment(name, index));
        Flow::Break(())
    }

    fn unindexed(&mut self, first: SegmentName, segments: u64) -> Flow {
        let number = match self.order {
            Order::Forwards => first.number.get(),
            Order::Backwards => first.number.get() + segments.saturating_sub(1),
        };
        self.found = Some(Found::Unindexed(SegmentName { number: SegmentNumber::new(number), ..first }));
        Flow::Break(())
    }
}

struct Points<'a> {
    name: &'a [u8],
    found: Vec<RestorePoint>,
    holes: Holes,
}

impl Points<'_> {
    fn take(&mut self, points: &[RestorePoint]) {
        self.found.extend(points.iter().filter(|point| point.name == self.name).cloned());
    }
}

impl Visitor for Points<'_> {
    fn wants(&self, summary: &Summary, _whole: bool) -> bool {
        summary.restore_points > 0
    }

    fn skip(&mut self, summary: &Summary) {
        self.holes.see(summary);
    }

    fn merged(&mut self, index: &MergedIndex) -> Flow {
        if index.restore_points_left_out > 0 {
            return Flow::Continue(());
        }
        self.holes.see(&index.summary());
        self.take(&index.restore_points);
        Flow::Break(())
    }

    fn segment(&mut self, _name: SegmentName, index: Arc<SegmentIndex>) -> Flow {
        self.holes.see(&Summary::of(&index));
        self.take(&index.restore_points);
        Flow::Continue(())
    }

    fn unindexed(&mut self, first: SegmentName, segments: u64) -> Flow {
        self.holes.hole(first, segments);
        Flow::Continue(())
    }
}

struct Names {
    from: PgTime,
    to: PgTime,
    found: Vec<SegmentName>,
    holes: Holes,
}

impl Visitor for Names {
    fn wants(&self, summary: &Summary, _whole: bool) -> bool {
        summary.overlaps(self.from, self.to)
    }

    fn skip(&mut self, summary: &Summary) {
        self.holes.see(summary);
    }

    fn merged(&mut self, _index: &MergedIndex) -> Flow {
        Flow::Continue(())
    }

    fn segment(&mut self, name: SegmentName, index: Arc<SegmentIndex>) -> Flow {
        self.holes.see(&Summary::of(&index));
        let wanted = |time: PgTime| self.from <= time && time < self.to;
        if index.ends.iter().any(|end| wanted(end.time)) {
            self.found.push(name);
        }
        Flow::Continue(())
    }

    fn unindexed(&mut self, first: SegmentName, segments: u64) -> Flow {
        self.holes.hole(first, segments);
        Flow::Continue(())
    }
}

struct Gather {
    wanted: Wanted,
    /// The span of time, widened to whole minutes.
    minutes: (PgTime, PgTime),
    tallies: Tallies,
    activity: Activity,
    holes: Holes,
}

impl Gather {
    fn new(wanted: Wanted) -> Self {
        let floor = |micros: i64| micros.saturating_sub(micros.rem_euclid(MINUTE));
        let (from, to) = (wanted.from.micros(), wanted.to.micros());
        let ceiling = if floor(to) == to { to } else { floor(to).saturating_add(MINUTE) };
        let minutes = (PgTime::from_micros(floor(from)), PgTime::from_micros(ceiling));
        let minutes_each = if wanted.minutes_each < 1 { 1 } else { wanted.minutes_each };
        let activity = Activity {
            tallies: Vec::new(),
            tallies_left_out: 0,
            events: Vec::new(),
            events_left_out: 0,
            restore_points: Vec::new(),
            largest: Vec::new(),
            names: BTreeMap::new(),
            unindexed: Vec::new(),
        };
        Self {
            wanted,
            minutes,
            tallies: Tallies { minutes_each, sums: BTreeMap::new() },
            activity,
            holes: Holes { found: Vec::new(), latest: None, closed: 0 },
        }
    }

    /// Takes what lies in the span of time.
    fn take(&mut self, minutes_each: i64, tallies: &[MinuteTally], from: &Lists<'_>) {
        for tally in tallies {
            let begin = tally.minute.saturating_mul(MINUTE);
            let end = begin.saturating_add(minutes_each.saturating_mul(MINUTE));
            if begin >= self.minutes.1.micros() || end <= self.minutes.0.micros() {
                continue;
            }
            let key = (begin_of(tally.minute, self.tallies.minutes_each), tally.file);
            if self.tallies.sums.len() < TALLIES_MAX || self.tallies.sums.contains_key(&key) {
                self.tallies.add_one(tally);
            } else {
                self.activity.tallies_left_out = self.activity.tallies_left_out.saturating_add(1);
            }
        }
        for event in from.events {
            let is_asked_for = self.wanted.all_events || event.event.kind.is_destructive();
            if !is_asked_for || !self.wanted.holds(event.time) {
                continue;
            }
            if self.activity.events.len() < EVENTS_MAX {
                self.activity.events.push(event.clone());
            } else {
                self.activity.events_left_out = self.activity.events_left_out.saturating_add(1);
            }
        }
        let wanted = self.wanted;
        let large = from.largest.iter().filter(|large| wanted.holds(large.time));
        self.activity.largest.extend(large.cloned());
        self.activity.largest.sort_by_key(|large| std::cmp::Reverse(large.rows()));
        self.activity.largest.truncate(LARGEST_MAX);
        self.activity.names.extend(from.names.iter().cloned());
    }

    fn take_points(&mut self, points: &[RestorePoint]) {
        let wanted = self.wanted;
        self.activity.restore_points.extend(points.iter().filter(|point| wanted.holds(point.time)).cloned());
    }

    fn finish(self) -> Activity {
        let Self { minutes: (from, to), tallies, mut activity, holes, .. } = self;
        activity.tallies = tallies.sums.into_iter().map(to_tally).collect();
        activity.unindexed = holes.between(from, to);
        activity
    }
}

/// What an index and a merged index have in common.
struct Lists<'a> {
    events: &'a [CommittedDdl],
    largest: &'a [LargeTransaction],
    names: &'a [(RelFile, Arc<Relation>)],
}

impl Visitor for Gather {
    fn wants(&self, summary: &Summary, _whole: bool) -> bool {
        // Restore points have times of their own, which no end needs to share.
        summary.overlaps(self.minutes.0, self.minutes.1) || summary.restore_points > 0
    }

    fn skip(&mut self, summary: &Summary) {
        self.holes.see(summary);
    }

    fn merged(&mut self, index: &MergedIndex) -> Flow {
        let summary = index.summary();
        let (from, to) = self.minutes;
        if !summary.overlaps(from, to) && index.restore_points_left_out == 0 {
            self.holes.see(&summary);
            self.take_points(&index.restore_points);
            return Flow::Break(());
        }
        let unit = index.minutes_each.saturating_mul(MINUTE);
        let is_inside = summary.end_times.is_none_or(|(earliest, latest)| from <= earliest && latest < to);
        // Where the span of time ends within it: can it be cut there?
        let is_border = |time: PgTime| time.micros().rem_euclid(unit) == 0;
        let can_be_cut = is_border(from) && is_border(to);
        // One that is not asked for may have taken the place of one that is, also in the part of a minute just outside.
        let is_large_inside =
            index.largest.len() < LARGEST_MAX || index.largest.iter().all(|large| self.wanted.holds(large.time));
        let is_exact = index.is_exact() && (index.harmless_left_out == 0 || !self.wanted.all_events);
        let is_fine = self.tallies.minutes_each % index.minutes_each == 0;
        if !is_exact || !is_fine || !is_large_inside || !(is_inside || can_be_cut) {
            return Flow::Continue(());
        }
        self.holes.see(&summary);
        let MergedIndex { events, largest, names, .. } = index;
        self.take(index.minutes_each, &index.tallies, &Lists { events, largest, names });
        self.take_points(&index.restore_points);
        Flow::Break(())
    }

    fn segment(&mut self, _name: SegmentName, index: Arc<SegmentIndex>) -> Flow {
        let summary = Summary::of(&index);
        self.holes.see(&summary);
        self.take_points(&index.restore_points);
        if summary.overlaps(self.minutes.0, self.minutes.1) {
            let SegmentIndex { events, largest, names, minutes, .. } = &*index;
            self.take(1, minutes, &Lists { events, largest, names });
            self.activity.tallies_left_out = self.activity.tallies_left_out.saturating_add(index.minutes_left_out);
            self.activity.events_left_out = self.activity.events_left_out.saturating_add(index.events_left_out);
        }
        Flow::Continue(())
    }

    fn unindexed(&mut self, first: SegmentName, segments: u64) -> Flow {
        self.holes.hole(first, segments);
        Flow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::super::format::TransactionEnd;
    use super::super::merge::Merge;
    use super::super::tests::{RANGE, SIZE, archive, index_of, name, root};
    use super::*;
    use crate::decode::change::RowCounts;
    use crate::repo::layout::Layout;
    use crate::repo::store::{Created, ListPage, ListRequest, ObjectInfo, Store, StoreError};

    fn time(micros: i64) -> PgTime {
        PgTime::from_micros(micros)
    }

    /// What brute force makes of the same indexes.
    fn tallies(indexes: &[(u64, SegmentIndex)], wanted: &Wanted) -> Vec<MinuteTally> {
        let mut sums: BTreeMap<(i64, Option<RelFile>), (u64, RowCounts)> = BTreeMap::new();
        for tally in indexes.iter().flat_map(|(_, index)| &index.minutes) {
            let (begin, end) = (tally.minute * MINUTE, (tally.minute + 1) * MINUTE);
            if end > wanted.from.micros() && begin < wanted.to.micros() {
                let key = (tally.minute - tally.minute.rem_euclid(wanted.minutes_each), tally.file);
                let (transactions, rows) = sums.entry(key).or_default();
                *transactions += tally.transactions;
                *rows += tally.rows;
            }
        }
        sums.into_iter().map(to_tally).collect()
    }

    /// Segments of the archive: whether each has an index, and what happened in it.
    fn any_archive() -> impl Strategy<Value = Vec<Option<Vec<(i64, u32)>>>> {
        let happened = prop::collection::vec((0_i64..400_000_000, 0_u32..5), 0..4);
        prop::collection::vec(prop::option::weighted(0.97, happened), 30..600)
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever is merged and whatever is not: an answer is what looking through all indexes gives.
        #[test]
        fn an_answer_is_what_all_indexes_together_say(
            happened in any_archive(),
            begin in 3_u64..40,
            is_merged in any::<bool>(),
            span in (0_i64..700, 0_i64..300),
            odd in (0_i64..MINUTE, 0_i64..MINUTE, any::<bool>()),
            cut in (0_u64..40, 0_u64..40),
        ) {
            block_on(async {
                let mut indexes = Vec::new();
                let mut bare = Vec::new();
                for (number, happened) in (begin..).zip(&happened) {
                    match happened {
                        Some(happened) => indexes.push((number, index_of(number, happened))),
                        None => bare.push(number),
                    }
                }
                let end = begin + happened.len() as u64;
                let repo = archive(begin..end, &indexes).await;
                if is_merged {
                    for level in Level::ALL {
                        for number in 0..=end / level.segments() {
                            let group = Group { number, ..Group::of(&name(0), level) };
                            let lacks = bare.iter().any(|bare| group.span().contains(Span { from: *bare, to: bare + 1 }));
                            let merge = repo.merge_indexes(&group).await.unwrap();
                            prop_assert!(!lacks || !matches!(merge, Merge::New), "{group:?}");
                            // A group is not merged while one of its parts is not.
                            let is_open = |lacking: SegmentName| lacking.number.get() + FAN_OUT > end;
                            let is_fine = match merge {
                                Merge::New | Merge::Empty | Merge::Open => true,
                                Merge::Lacks(segment) => lacks || is_open(segment),
                                Merge::Exists => false,
                            };
                            prop_assert!(is_fine, "{merge:?}");
                        }
                    }
                }
                // What is asked for.
                let (from, to) = (begin + cut.0.min(happened.len() as u64 - 1), end - cut.1.min(15));
                prop_assume!(from < to);
                let range = LsnRange { from: name(from).start() + 77, to: name(to).start() };
                indexes.retain(|(number, _)| (from..to).contains(number));
                bare.retain(|number| (from..to).contains(number));
                let (odd_from, odd_to) = if odd.2 { (odd.0, odd.1) } else { (0, 0) };
                let wanted = Wanted {
                    from: time(span.0 * MINUTE + odd_from),
                    to: time((span.0 + span.1) * MINUTE + odd_to),
                    minutes_each: if span.1 % 2 == 0 { 1 } else { 60 },
                    all_events: true,
                };
                let lookup = repo.lookup(root(), SIZE);

                let (summary, unindexed) = lookup.summary(range).await.unwrap();
                let mut expected = Summary::default();
                indexes.iter().for_each(|(_, index)| expected.add(&Summary::of(index)));
                prop_assert_eq!(summary, expected);
                let named: Vec<u64> = unindexed.iter().flat_map(Unindexed::names).map(|name| name.number.get()).collect();
                prop_assert_eq!(&named, &bare);

                let at = wanted.from;
                let found = lookup.first_end_after(range, at, false).await.unwrap();
                let is_it = |index: &SegmentIndex| index.ends.iter().any(|end| end.time > at);
                let first = indexes.iter().find(|(_, index)| is_it(index)).map(|(number, _)| *number);
                let first_bare = bare.first().filter(|bare| first.is_none_or(|first| **bare < first)).copied();
                let found = found.map(|found| match found {
                    Found::Segment(name, _) => (name.number.get(), true),
                    Found::Unindexed(name) => (name.number.get(), false),
                });
                prop_assert_eq!(found, first_bare.map(|bare| (bare, false)).or(first.map(|first| (first, true))));

                let last = lookup.last(range, |summary| summary.commits > 0).await.unwrap();
                let expected = indexes.iter().rev().find(|(_, index)| index.ends.iter().any(|end| end.committed));
                let expected = expected.map(|(number, _)| *number).max(bare.last().copied());
                let last = last.map(|found| match found {
                    Found::Segment(name, _) | Found::Unindexed(name) => name.number.get(),
                });
                prop_assert_eq!(last, expected);

                let activity = lookup.activity(range, wanted).await.unwrap();
                prop_assert_eq!(activity.tallies, tallies(&indexes, &wanted));
                let events = indexes.iter().flat_map(|(_, index)| &index.events);
                let events: Vec<_> = events.filter(|event| wanted.holds(event.time)).cloned().collect();
                prop_assert_eq!(activity.events, events);
                let points = indexes.iter().flat_map(|(_, index)| &index.restore_points);
                let points: Vec<_> = points.filter(|point| wanted.holds(point.time)).cloned().collect();
                prop_assert_eq!(activity.restore_points, points);
                let large = indexes.iter().flat_map(|(_, index)| &index.largest);
                let mut large: Vec<_> = large.filter(|large| wanted.holds(large.time)).cloned().collect();
                large.sort_by_key(|large| std::cmp::Reverse(large.rows()));
                large.truncate(LARGEST_MAX);
                let rows = |all: &[LargeTransaction]| all.iter().map(LargeTransaction::rows).collect::<Vec<_>>();
                prop_assert_eq!(rows(&activity.largest), rows(&large));

                let (names, _) = lookup.segments_with_ends(range, wanted.from, wanted.to).await.unwrap();
                let has_ends = |index: &SegmentIndex| index.ends.iter().any(|end| wanted.holds(end.time));
                let expected: Vec<_> =
                    indexes.iter().filter(|(_, index)| has_ends(index)).map(|(number, _)| name(*number)).collect();
                prop_assert_eq!(names, expected);

                let (points, _) = lookup.restore_points(range, b"noon").await.unwrap();
                prop_assert_eq!(points.len(), indexes.iter().flat_map(|(_, index)| &index.restore_points).count());
                Ok(())
            })?;
        }
    }

    #[tokio::test]
    async fn a_transaction_is_found_by_its_id_or_a_subtransactions() {
        let mut indexes: Vec<_> = (0..40).map(|number| (number, index_of(number, &[(5, 1)]))).collect();
        let (odd, inner) = (Xid::new(4_000_000_000), Xid::new(7_777).unwrap());
        indexes[20].1.ends[0] =
            TransactionEnd { xid: odd, subtransactions: vec![inner], ..indexes[20].1.ends[0].clone() };
        let repo = archive(0..40, &indexes).await;
        let lookup = repo.lookup(root(), SIZE);
        for xid in [odd.unwrap(), inner] {
            let found = lookup.end_of(RANGE, xid).await.unwrap().unwrap();
            assert!(matches!(found, Found::Segment(found, _) if found == name(20)), "{found:?}");
        }
        let found = lookup.end_of(RANGE, Xid::new(7_778).unwrap()).await.unwrap();
        assert!(
            matches!(found, Some(Found::Unindexed(found)) if found == name(40)),
            "not in what has an index: {found:?}"
        );
    }

    #[tokio::test]
    async fn a_large_transaction_just_outside_takes_nobodys_place() {
        // The last three end in the minute in which the span of time ends, and behind its end.
        let mut indexes: Vec<_> = (0..15).map(|number| (number, index_of(number, &[(5, 1)]))).collect();
        indexes.push((15, index_of(15, &[(5, 1), (40_000_000, 3), (40_000_001, 3), (40_000_002, 3)])));
        let repo = archive(0..32, &indexes).await;
        let merged = repo.merge_indexes(&Group { number: 0, ..Group::of(&name(0), Level::FIRST) }).await.unwrap();
        assert!(matches!(merged, Merge::New), "{merged:?}");
        let range = LsnRange { from: name(0).start(), to: name(16).start() };
        let to = time(15 * MINUTE + 20_000_000);
        let wanted = Wanted { from: time(0), to, minutes_each: 1, all_events: true };
        let found = repo.lookup(root(), SIZE).activity(range, wanted).await.unwrap();
        assert_eq!(found.largest.len(), 16, "one of each segment");
    }

    #[tokio::test]
    async fn after_a_switch_the_new_timelines_indexes_count() {
        // Timeline 1 went on after timeline 2 had branched off within segment 20.
        let indexes: Vec<_> = (0..48).map(|number| (number, index_of(number, &[(5, 1)]))).collect();
        let repo = archive(0..48, &indexes).await;
        for number in 0..3 {
            repo.merge_indexes(&Group { number, ..Group::of(&name(0), Level::FIRST) }).await.unwrap();
        }
        let second = TimelineId::new(2).unwrap();
        for number in 20..30 {
            let index = index_of(number, &[(5, 2), (6, 2)]);
            repo.put_index(&SegmentName { timeline: second, ..name(number) }, &index).await.unwrap();
        }
        let switch = name(20).start() + 4096;
        let path = TimelineHistory::parse(second, &format!("1\t{switch}\tpromoted\n")).unwrap();
        let lookup = repo.lookup(path, SIZE);
        let range = LsnRange { from: name(0).start(), to: name(30).start() };
        let (summary, unindexed) = lookup.summary(range).await.unwrap();
        assert_eq!((summary.segments, summary.commits, unindexed), (30, 20 + 2 * 10, vec![]));
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_looked_for_below_and_then_named() {
        let indexes: Vec<_> = (0..32).map(|number| (number, index_of(number, &[(5, 1)]))).collect();
        let repo = archive(0..32, &indexes).await;
        let group = Group::of(&name(3), Level::FIRST);
        repo.store().create(&repo.layout().merged(&group), "nonsense".into()).await.unwrap();
        repo.remove_index(&name(4)).await.unwrap();
        repo.store().create(&repo.layout().index(&name(4)), "nonsense".into()).await.unwrap();
        let range = LsnRange { from: name(0).start(), to: name(32).start() };
        let (summary, unindexed) = repo.lookup(root(), SIZE).summary(range).await.unwrap();
        assert_eq!((summary.segments, summary.commits), (31, 31));
        let hole = Unindexed { first: name(4), segments: 1, after: indexes[3].1.latest, before: indexes[5].1.latest };
        assert_eq!(unindexed, [hole]);
    }

    /// The indexes of a year of a busy server, made up as they are read: a commit in each segment, one every 137 seconds.
    #[derive(Debug, Default)]
    struct Year {
        reads: AtomicUsize,
        lists: AtomicUsize,
    }

    /// As many as leave most of each level that is not merged into the next.
    const YEAR: u64 = 229_375;

    fn moment(number: u64) -> PgTime {
        time(number as i64 * 137_000_000)
    }

    impl Year {
        fn summary(span: Span) -> Summary {
            let first = index(span.from);
            let mut summary = Summary::of(&index(span.to - 1));
            summary.segments = span.len();
            summary.commits = span.len();
            summary.end_times = Some((first.ends[0].time, summary.end_times.unwrap().1));
            summary
        }

        fn merged(group: &Group) -> MergedIndex {
            let minutes_each = if group.level > Level::ALL[1] { 60 } else { 1 };
            let mut tallies = Tallies { minutes_each, sums: BTreeMap::new() };
            for number in group.span().from..group.span().to {
                index(number).minutes.iter().for_each(|tally| tallies.add_one(tally));
            }
            let part = |place| {
                let summary = Self::summary(MergedIndex::span_of(group, place));
                super::super::merged::Part { place, summary }
            };
            MergedIndex {
                parts: (0..16).map(part).collect(),
                minutes_each,
                tallies: tallies.sums.into_iter().map(to_tally).collect(),
                tallies_left_out: 0,
                restore_points: vec![],
                restore_points_left_out: 0,
                events: vec![],
                destructive_left_out: 0,
                harmless_left_out: 0,
                largest: vec![],
                names: vec![],
            }
        }
    }

    fn index(number: u64) -> SegmentIndex {
        let mut index = SegmentIndex { records: 1, latest: Some(moment(number)), ..SegmentIndex::default() };
        let lsn = name(number).start() + 800;
        let end = lsn + 64;
        let time = moment(number);
        index.last = Some((lsn, end));
        index.ends = vec![TransactionEnd { lsn, end, xid: None, time, committed: true, subtransactions: vec![] }];
        let minute = time.micros().div_euclid(MINUTE);
        index.minutes = vec![MinuteTally { minute, file: None, transactions: 1, rows: RowCounts::default() }];
        index
    }

    #[async_trait]
    impl Store for Year {
        async fn create(&self, _: &str, _: Bytes) -> Result<Created, StoreError> {
            Ok(Created::Exists)
        }

        async fn replace(&self, _: &str, _: Bytes) -> Result<(), StoreError> {
            Ok(())
        }

        async fn read(&self, key: &str, _: Option<std::ops::Range<u64>>) -> Result<Bytes, StoreError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            match Layout::new("main").unwrap().parse(key, SIZE) {
                Some(Object::Index(name)) => Ok(index(name.number.get()).encode(&name).into()),
                Some(Object::Merged(group)) => Ok(Self::merged(&group).encode().into()),
                _ => Err(StoreError::NotFound { key: key.to_owned() }),
            }
        }

        async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
            self.lists.fetch_add(1, Ordering::Relaxed);
            let layout = Layout::new("main").unwrap();
            let level =
                Level::ALL.into_iter().find(|level| layout.merged_folder(TimelineId::FIRST, *level) == request.prefix);
            let each = level.map_or(1, Level::segments);
            let keys = (0..YEAR / each).map(|number| match level {
                Some(level) => layout.merged(&Group { number, ..Group::of(&name(0), level) }),
                None => layout.index(&name(number)),
            });
            let after = request.after.clone().unwrap_or_default();
            let mut keys: Vec<String> = keys.filter(|key| *key > after).take(1_001).collect();
            let next = (keys.len() > 1_000).then(|| keys.remove(1_000)).and_then(|_| keys.last().cloned());
            let modified = jiff::Timestamp::UNIX_EPOCH;
            let objects = keys.into_iter().map(|key| ObjectInfo { key, size: 1, modified }).collect();
            Ok(ListPage { objects, folders: vec![], next })
        }

        async fn delete(&self, _: &str) -> Result<(), StoreError> {
            Ok(())
        }

        fn enforces_create_once(&self) -> bool {
            true
        }

        fn url(&self) -> String {
            "memory:".to_owned()
        }
    }

    /// Requests (reads and listings) that the questions of a responder cost, each asked by itself.
    #[tokio::test]
    async fn a_year_of_wal_is_found_in_a_few_reads() {
        let store = Arc::new(Year::default());
        let repo = Repository::over(store.clone(), "main").unwrap();
        let range = LsnRange { from: name(0).start(), to: name(YEAR).start() };
        let cost = || {
            let (reads, lists) = (store.reads.swap(0, Ordering::Relaxed), store.lists.swap(0, Ordering::Relaxed));
            assert!(lists <= 5, "one listing for each level: {lists}");
            reads
        };
        // 3 objects of the last level, 7 of the one below, then 15, 15, and 15 segments.
        const TOP: usize = 3 + 7 + 15 + 15 + 15;

        for (at, reads_max) in
            [(1_000, READS_MAX + 4), (YEAR / 2, READS_MAX + 4), (YEAR - 9_000, READS_MAX + 3 + 10), (YEAR - 2, TOP)]
        {
            let lookup = repo.lookup(root(), SIZE);
            let found = lookup.first_end_after(range, moment(at), false).await.unwrap();
            assert!(matches!(found, Some(Found::Segment(found, _)) if found == name(at + 1)), "{found:?}");
            let reads = cost();
            assert!(reads <= reads_max, "{reads} reads to find one moment of a year");
        }
        let lookup = repo.lookup(root(), SIZE);
        let (summary, unindexed) = lookup.summary(range).await.unwrap();
        assert_eq!((summary.commits, unindexed), (YEAR, vec![]));
        assert!(cost() <= TOP);

        // An hour in the middle, and the whole year by the day.
        let hour = |hour: i64| time(hour * 60 * MINUTE);
        let wanted = Wanted { from: hour(4_000), to: hour(4_001), minutes_each: 1, all_events: true };
        let activity = repo.lookup(root(), SIZE).activity(range, wanted).await.unwrap();
        assert_eq!(activity.tallies.len(), 26, "a commit every 137 seconds");
        let reads = cost();
        assert!(reads <= TOP + 4 + 4, "{reads} reads to show an hour of a year");
        let wanted = Wanted { from: hour(0), to: hour(9_000), minutes_each: 1_440, all_events: true };
        let activity = repo.lookup(root(), SIZE).activity(range, wanted).await.unwrap();
        assert_eq!(activity.tallies.iter().map(|tally| tally.transactions).sum::<u64>(), YEAR);
        assert_eq!(activity.tallies.len() as u64, YEAR * 137 / 86_400 + 1);
        assert!(cost() <= TOP);
        // The next question finds what the last one read.
        lookup.summary(range).await.unwrap();
        assert!(cost() <= 15, "segments' indexes are not kept");
    }
}
