//! Archived WAL along a path -> what a scan finds in it, reading as little of it as indexes allow.
//!
//! A segment's index says where its transactions end, and so whether recovery may stop in it. Only where it may, and where
//! there is no index, the WAL itself is read; of all other segments the index tells the same as their records would, and of
//! many of them together a merged index does. What is found does therefore not depend on which indexes are there.

use futures_util::{StreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use super::error::RestoreError;
use super::path;
use super::plan::cancellable;
use super::scan::{self, Goal, More, Scan, Scanned};
use crate::backoff::Chain;
use crate::decode::{DecodeError, Reader, Source, WalMajor};
use crate::pg::{Lsn, SegmentName, SegmentNumber, TimelineHistory};
use crate::progress::Progress;
use crate::repo::catalog::{Catalog, LsnRange};
use crate::repo::index::summary::Summary;
use crate::repo::index::{SegmentIndex, lookup};
use crate::repo::{RepoError, Repository, SegmentRead};

/// Bytes of WAL read ahead of the decoder: four segments of the usual size hide a store's latency. Of larger segments
/// one is read ahead.
const READ_AHEAD_BYTES: u64 = 64 << 20;

/// Indexes read ahead. They are small, and a store's latency is all that they cost.
const INDEXES_AHEAD: usize = 16;

/// Segments that are passed over at once, or else one by one.
const JUMP_MIN: u64 = 4;

/// Where to look.
pub(super) struct Search<'a> {
    pub(super) repo: &'a Repository,
    pub(super) catalog: &'a Catalog,
    pub(super) path: &'a TimelineHistory,
    /// Reads all WAL, whatever indexes say: then it is proved to be whole.
    pub(super) everything: bool,
    pub(super) progress: &'a dyn Progress,
    pub(super) cancel: &'a CancellationToken,
}

/// What was found.
pub(super) struct Found {
    pub(super) scanned: Scanned,
    /// The WAL was looked through up to here.
    pub(super) to: Lsn,
    /// Why not further, if WAL cannot be read.
    pub(super) problem: Option<(SegmentName, String)>,
    /// Segments that were read. The others were passed over by their index.
    pub(super) segments_read: u64,
}

/// A segment on the way.
struct Piece {
    name: SegmentName,
    /// The path needs the segment up to here.
    reach: Lsn,
    index: Option<SegmentIndex>,
    wal: Option<Result<SegmentRead, RepoError>>,
}

impl Search<'_> {
    /// Looks through the WAL from `from` to `to`, or to what is looked for.
    ///
    /// # Errors
    /// If the store fails; WAL that is damaged is part of what is found.
    pub(super) async fn run(&self, goal: Goal, from: Lsn, to: Lsn) -> Result<Found, RestoreError> {
        let (found, jumped) = self.run_with(goal.clone(), from, to, !self.everything).await?;
        // Then the checkpoint with which the backup begins must tell that it began before the time, and sums have none.
        if jumped && matches!(goal, Goal::Time { .. }) && found.scanned.last_ends[0].is_none() {
            return Ok(self.run_with(goal, from, to, false).await?.0);
        }
        Ok(found)
    }

    /// As [`Search::run`]; also whether many segments were passed over at once, which happens only if it `may_jump`.
    async fn run_with(&self, goal: Goal, from: Lsn, to: Lsn, may_jump: bool) -> Result<(Found, bool), RestoreError> {
        let identity = &self.catalog.identity;
        let size = identity.segment_size;
        let major = WalMajor::of_server(identity.server_version)
            .ok_or(RestoreError::UnsupportedMajor { major: identity.server_version.major() })?;
        let source = Source { major, segment_size: size, system_id: Some(identity.system_id) };
        let first = size.segment_of(from);
        let last = size.segment_of(Lsn::new(to.bytes().saturating_sub(1)));
        self.progress.begin("look through archived WAL", Some(to.saturating_sub(size.start_of(first))));
        let mut pass = Pass { source, reader: None, scan: Scan::new(goal.clone(), from), from };
        let mut found = Found { scanned: Scanned::default(), to: from, problem: None, segments_read: 0 };
        // Until a jump was tried the segments are taken one by one: no record of a segment before may go on behind it.
        let (mut may_jump, mut jumped) = (may_jump, false);
        let mut until = if may_jump { first } else { last };
        let mut came_to = None;
        let mut pieces = self.pieces(first, until, last, from, to).boxed();
        loop {
            let Some(piece) = cancellable(self.cancel, pieces.next()).await? else {
                if until >= last || came_to != Some(until) {
                    break;
                }
                let mut next = until.next();
                if may_jump && pass.is_clear() {
                    may_jump = false;
                    if let Some((landing, summary)) = self.jump(&goal, next, last, to).await? {
                        pass.pass_over_many(&summary);
                        found.to = size.start_of(landing);
                        self.progress.advance(found.to.saturating_sub(size.start_of(next)));
                        (next, jumped) = (landing, true);
                    }
                }
                until = if may_jump { next } else { last };
                pieces = self.pieces(next, until, last, from, to).boxed();
                continue;
            };
            let Piece { name, reach, index, wal } = piece?;
            came_to = Some(name.number);
            let passed = index.as_ref().and_then(|index| pass.pass_over(index));
            let more = match passed {
                Some(more) => {
                    self.progress.advance(reach.saturating_sub(name.start()));
                    Ok(more)
                }
                None => {
                    let wal = match wal {
                        Some(wal) => wal,
                        None => cancellable(self.cancel, self.repo.read_segment(&name)).await?,
                    };
                    let bytes = match wal {
                        Ok(read) if name.start() + read.valid_to >= reach => read.bytes,
                        Ok(read) => {
                            found.problem = Some((name, format!("it ends after {} bytes", read.valid_to)));
                            break;
                        }
                        Err(error @ RepoError::Damaged { .. }) => {
                            found.problem = Some((name, error.to_string()));
                            break;
                        }
                        Err(error) if error.is_not_found() => {
                            found.problem = Some((name, Chain(&error).to_string()));
                            break;
                        }
                        Err(error) => return Err(error.into()),
                    };
                    found.segments_read += 1;
                    let length = usize::try_from(reach.saturating_sub(name.start())).unwrap_or(usize::MAX);
                    let slice = bytes.slice(..length.min(bytes.len()));
                    self.progress.advance(slice.len() as u64);
                    let taken = tokio::task::spawn_blocking(move || pass.take(&name, &slice, index.as_ref()));
                    let (again, more) = taken.await.expect("decoding ends");
                    pass = again;
                    more
                }
            };
            match more {
                Ok(More::Yes) => found.to = reach,
                Ok(More::No) => {
                    found.to = reach;
                    break;
                }
                // The server had written no further when the file was archived.
                Err(DecodeError::Unwritten { at }) if name.number == last => {
                    found.to = at;
                    break;
                }
                Err(error) => {
                    found.problem = Some((name, error.to_string()));
                    break;
                }
            }
        }
        self.progress.end();
        found.scanned = pass.scan.finish();
        Ok((found, jumped))
    }

    /// The first segment from `at` on in which recovery may stop, and the sum of the indexes of those before it; `None` if
    /// some of these have no index, or if they are so few that their own indexes do.
    async fn jump(
        &self,
        goal: &Goal,
        at: SegmentNumber,
        last: SegmentNumber,
        to: Lsn,
    ) -> Result<Option<(SegmentNumber, Summary)>, RestoreError> {
        let size = self.catalog.identity.segment_size;
        let lookup = self.repo.lookup(self.path.clone(), size);
        let whole = LsnRange { from: size.start_of(at), to: size.start_of(last) };
        if whole.from >= whole.to {
            return Ok(None);
        }
        let number = |found: Option<lookup::Found>| match found {
            Some(lookup::Found::Segment(name, _) | lookup::Found::Unindexed(name)) => name.number,
            None => last,
        };
        let landing = match goal {
            Goal::Time { at, exclusive } => {
                number(cancellable(self.cancel, lookup.first_end_after(whole, *at, *exclusive)).await??)
            }
            Goal::Xid { xid, .. } => number(cancellable(self.cancel, lookup.end_of(whole, *xid)).await??),
            // The last record that begins before it may end behind it.
            Goal::Lsn(lsn) | Goal::Before { lsn, .. } => {
                SegmentNumber::new(size.segment_of(*lsn).get().saturating_sub(1))
            }
            Goal::End => last,
            // All places of a name are looked for.
            Goal::Name(_) => return Ok(None),
        };
        let landing = landing.min(last);
        if landing.get() < at.get() + JUMP_MIN {
            return Ok(None);
        }
        let summary = async |landing: SegmentNumber| {
            let passed = LsnRange { from: size.start_of(at), to: size.start_of(landing) };
            cancellable(self.cancel, lookup.summary(passed)).await
        };
        let (mut landing, (mut sum, mut unindexed)) = (landing, summary(landing).await??);
        // The newest segments may have no index yet.
        if let Some(first) = unindexed.first().map(|unindexed| unindexed.first.number) {
            landing = first;
            if landing.get() < at.get() + JUMP_MIN {
                return Ok(None);
            }
            (sum, unindexed) = summary(landing).await??;
        }
        // What goes on into the landing's segment is in the sum, unless a timeline ends in between.
        let is_whole = unindexed.is_empty() && sum.segments == landing.get() - at.get();
        let is_one_timeline = self.path.timeline_at(size.start_of(at)) == self.path.timeline_at(size.end_of(landing));
        let ends = sum.last.is_none_or(|(_, end)| match goal {
            Goal::Lsn(lsn) | Goal::Before { lsn, .. } => end <= scan::padded(*lsn),
            _ => end <= size.end_of(landing).min(to),
        });
        Ok((is_whole && is_one_timeline && ends).then_some((landing, sum)))
    }

    /// The segments of the path from `first` to `until`, each with its index or, where that does not serve, its WAL. `last` is
    /// the last that is searched.
    fn pieces(
        &self,
        first: SegmentNumber,
        until: SegmentNumber,
        last: SegmentNumber,
        from: Lsn,
        to: Lsn,
    ) -> impl stream::Stream<Item = Result<Piece, RestoreError>> + Send + '_ {
        let size = self.catalog.identity.segment_size;
        let file_of = move |number: u64| path::file_of(self.catalog, self.path, SegmentNumber::new(number));
        let ahead = usize::try_from((READ_AHEAD_BYTES / size.bytes()).clamp(1, 4)).unwrap_or(1);
        stream::iter(first.get()..=until.get())
            .map(move |number| Some((file_of(number)?, (number < last.get()).then(|| file_of(number + 1)).flatten())))
            .take_while(|file| std::future::ready(file.is_some()))
            .filter_map(std::future::ready)
            .map(move |((name, reach), next)| async move {
                let next = next.map(|(name, _)| name);
                let index = if reach < name.end() { None } else { self.index(&name, next, from, to).await? };
                Ok::<_, RestoreError>((name, reach.min(to), index))
            })
            .buffered(INDEXES_AHEAD)
            .map(|piece| async {
                let (name, reach, index) = piece?;
                // What has an index is read only once it is known that it must be.
                let wal = if index.is_some() { None } else { Some(self.repo.read_segment(&name).await) };
                Ok(Piece { name, reach, index, wal })
            })
            .buffered(ahead)
    }

    /// The index of a whole segment, if it can stand for it: what begins in the segment ends on the path, before `to`.
    async fn index(
        &self,
        name: &SegmentName,
        next: Option<SegmentName>,
        from: Lsn,
        to: Lsn,
    ) -> Result<Option<SegmentIndex>, RestoreError> {
        // How far the last segment's last record goes only the WAL says.
        let Some(next) = next.filter(|_| !self.everything) else { return Ok(None) };
        let index = match self.repo.index(name).await {
            Ok(Some(index)) => index,
            Ok(None) => return Ok(None),
            Err(RepoError::Damaged { key, problem }) => {
                tracing::warn!("index {key} cannot be read, so the segment itself is: {problem}");
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let end = index.last.map_or(name.start(), |(_, end)| end);
        if end > to || (end > name.end() && next.timeline != name.timeline) {
            return Ok(None);
        }
        Ok(if from <= name.start() { Some(index) } else { scan::behind(index, from) })
    }
}

/// Reader and scan, which go to another thread and back.
struct Pass {
    source: Source,
    /// None where the segment before was passed over.
    reader: Option<Reader>,
    scan: Scan,
    /// Records before this one are not replayed.
    from: Lsn,
}

impl Pass {
    /// True if no record that was begun is unfinished, and the stop is not reached.
    fn is_clear(&self) -> bool {
        self.reader.as_ref().is_none_or(Reader::is_between_records) && self.scan.is_before_the_stop()
    }

    fn pass_over_many(&mut self, summary: &Summary) {
        self.reader = None;
        self.scan.pass_over_many(summary);
    }

    /// Takes a segment's index in its place, if that is possible: not while a record of a segment before goes on in it.
    fn pass_over(&mut self, index: &SegmentIndex) -> Option<More> {
        let is_between = self.reader.as_ref().is_none_or(Reader::is_between_records);
        if !is_between || !self.scan.can_pass_over(index) {
            return None;
        }
        self.reader = None;
        Some(self.scan.pass_over(index))
    }

    fn take(
        mut self,
        name: &SegmentName,
        bytes: &[u8],
        index: Option<&SegmentIndex>,
    ) -> (Self, Result<More, DecodeError>) {
        let more = self.drain(name.start(), bytes, index);
        (self, more)
    }

    fn drain(&mut self, start: Lsn, bytes: &[u8], mut index: Option<&SegmentIndex>) -> Result<More, DecodeError> {
        let reader = self.reader.get_or_insert_with(|| Reader::at_page(self.source, start));
        reader.push(bytes);
        while let Some(record) = reader.next_record()? {
            // What went on from the segment before is complete: the rest may be in the index.
            if record.lsn >= start
                && let Some(index) = index.take()
                && self.scan.can_pass_over(index)
            {
                self.reader = None;
                return Ok(self.scan.pass_over(index));
            }
            if record.lsn >= self.from && self.scan.see(&record)? == More::No {
                return Ok(More::No);
            }
        }
        Ok(More::Yes)
    }
}
