//! The loop that streams WAL into the spool, and tells the server how far it is safe.

use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::path::{Course, course, waits_for};
use super::patience::{LET_GO_AFTER, Patience};
use super::source::{Connected, Source, SourceError};
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::feedback::{self, Feedback};
use crate::capture::spool::{Flush, PENDING_MAX, Spool, SpoolError, Writer};
use crate::capture::{CaptureError, Start, StreamEvent, WalStream, Walsender};
use crate::pg::{Lsn, Position, TimelineHistory, TimelineId};
use crate::repo::archiver::{self, Durability};
use crate::repo::cluster::ClusterIdentity;
use crate::repo::gap::Gap;
use crate::serve::status::{Board, GapSeen, Trouble};

/// The server sends no more than this in one message (`MAX_SEND_SIZE` in `replication/walsender.c`).
const MESSAGE_MAX: u64 = 128 << 10;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Capture {
    pub(super) source: Source,
    pub(super) identity: ClusterIdentity,
    pub(super) spool: Spool,
    pub(super) board: Board,
    pub(super) durability: Durability,
    /// The end of the WAL that we hold, in the spool or in the repository; `None` if there is none.
    pub(super) have: Option<Position>,
    /// Everything before this is durable in the repository.
    pub(super) archived: watch::Receiver<Option<Position>>,
    /// Commits wait for us.
    pub(super) synchronous: watch::Sender<bool>,
    /// Why a base backup is needed now.
    pub(super) backup_wanted: watch::Sender<Option<String>>,
    /// The server said that the WAL which we asked for is gone, in these words.
    pub(super) lost: Option<String>,
}

/// The writer, and the flush that it has on its way.
#[derive(Debug)]
struct Sink {
    writer: Writer,
    flush: Option<Flush>,
    flushing: u64,
    begin: Position,
}

/// How a session ended.
#[derive(Debug)]
enum Ended {
    /// We were asked to stop.
    Stopped,
    /// Connect again at once and look where it goes on: the timeline ended, or WAL was lost.
    Again,
    /// The spool is full. Connect again when there is room: a server that is being stopped would wait for us.
    Full,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("the server is on timeline {server}, but WAL of timeline {ours} is archived already")]
    Stale { server: TimelineId, ours: TimelineId },
    #[error("the server wants to stop, and waits for WAL that the repository does not take; walguard lets it go")]
    LetGo,
    #[error("the server's WAL ends at {server}, before {ours}, up to which it is archived already")]
    Behind { server: Position, ours: Position },
}

impl From<CaptureError> for SessionError {
    fn from(error: CaptureError) -> Self {
        Self::Source(error.into())
    }
}

impl From<SpoolError> for SessionError {
    fn from(error: SpoolError) -> Self {
        Self::Source(error.into())
    }
}

impl SessionError {
    fn is_fatal(&self) -> bool {
        match self {
            Self::Source(error) => error.is_fatal(),
            Self::Stale { .. } | Self::Behind { .. } | Self::LetGo => false,
        }
    }

    /// As the stage's own error, for whoever looks for its hint.
    fn into_anyhow(self) -> anyhow::Error {
        match self {
            Self::Source(error) => error.into_anyhow(),
            error => error.into(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Source(error) => error.hint(),
            Self::Stale { .. } => Some(
                "an old primary came back after a failover, or a cluster was restored from a backup: point walguard at \
                 the current primary (several hosts with target_session_attrs=read-write find it), or give the \
                 restored cluster a name of its own with `--cluster`"
                    .to_owned(),
            ),
            Self::LetGo => Some("nothing is lost: the slot keeps the WAL. See why the repository does not take it".to_owned()),
            Self::Behind { .. } => Some(
                "a standby that lags catches up by itself. A primary that lost WAL (a snapshot brought back, a disk \
                 without a working fsync) is another history: give it a name of its own with `--cluster`"
                    .to_owned(),
            ),
        }
    }
}

impl Capture {
    /// Streams until `stop` is cancelled; connects again for ever. What was received is in the spool when it ends.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut sink: Option<Sink> = None;
        let mut failures = 0;
        loop {
            let result = tokio::select! {
                result = self.session(&mut sink, &mut failures, &stop) => result,
                // A session looks for itself while it streams, to keep what it has.
                () = stopped_for(&stop, Duration::from_secs(3)) => Ok(Ended::Stopped),
            };
            self.board.update(|s| {
                s.server.streaming = false;
                s.spool.full = false;
            });
            let settled = self.settle(&mut sink, &stop).await;
            let error = match (result, settled) {
                (_, Err(error)) | (Err(error), Ok(())) if error.is_fatal() => {
                    return Err(error.into_anyhow()).context("stream WAL");
                }
                (Ok(Ended::Stopped), _) => return Ok(()),
                (Ok(Ended::Again), Ok(())) => continue,
                (Ok(Ended::Full), Ok(())) => {
                    self.board.update(|s| s.spool.full = true);
                    let _ = stop.run_until_cancelled(self.spool.wait_for_room(2 * MESSAGE_MAX)).await;
                    self.board.update(|s| s.spool.full = false);
                    continue;
                }
                (Err(error), _) | (Ok(Ended::Again | Ended::Full), Err(error)) => error,
            };
            if stop.is_cancelled() {
                return Ok(());
            }
            failures += 1;
            let pause = RetryPolicy::FOREVER.pause(failures);
            self.tell(&error, failures, pause);
            let _ = stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    fn tell(&self, error: &SessionError, failures: u32, pause: Duration) {
        let text = Chain(error).to_string();
        let mut is_news = false;
        self.board.update(|s| {
            is_news = s.server.trouble.as_ref().is_none_or(|t| t.error != text);
            let trouble = Trouble::again(s.server.trouble.as_ref(), Timestamp::now(), text.clone(), error.hint());
            s.server.trouble = Some(trouble);
        });
        if is_news || failures.is_power_of_two() {
            tracing::warn!(failures, ?pause, "failed to stream WAL, will try again: {text}");
        }
        if matches!(error, SessionError::Stale { .. } | SessionError::Behind { .. }) {
            self.board.raise("server", text, error.hint());
        }
    }

    /// One connection, from looking who is there to the end of its stream.
    async fn session(
        &mut self,
        sink: &mut Option<Sink>,
        failures: &mut u32,
        stop: &CancellationToken,
    ) -> Result<Ended, SessionError> {
        self.board.update(|s| s.server.connections += 1);
        let Connected { mut walsender, at, identity } = self.source.connect_to(&self.identity).await?;
        self.board.update(|s| {
            s.server.version = Some(identity.server_version);
            s.server.flushed = Some(at);
        });
        let names = walsender.show("synchronous_standby_names").await?;
        let synchronous = waits_for(&names, self.source.conninfo.application_name());
        self.synchronous.send_replace(synchronous);
        self.board.update(|s| s.server.synchronous = synchronous);

        let path = self.source.path(&mut walsender, at.timeline).await?;
        if let Some(why) = &self.lost {
            let why = why.clone();
            self.bridge(&mut walsender, &path, sink, &why).await?;
            self.lost = None;
        }
        let restart = self.source.ensure_slot(&mut walsender).await?;
        let mut from = self.from(&path, at, restart).await?;
        if sink.as_ref().is_none_or(|s| s.writer.next() != from) {
            from.lsn = from.lsn.align_down(self.identity.segment_size.bytes());
        }
        let start = match walsender.start_physical(Some(&self.source.slot), from).await {
            Err(CaptureError::WalRemoved(error)) => {
                self.lost = Some(error.to_string());
                return Ok(Ended::Again);
            }
            Err(CaptureError::AheadOfServer(_)) => {
                return Err(SessionError::Behind { server: at, ours: from });
            }
            result => result?,
        };
        let mut stream = match start {
            Start::Streaming(stream) => stream,
            Start::EndOfTimeline { next, .. } => {
                // A promotion since we asked. What we hold ends here.
                tracing::info!(%from, %next, "the timeline ends here");
                self.finish(sink).await?;
                self.have = Some(from);
                return Ok(Ended::Again);
            }
        };
        let sink = self.sink_at(sink, from).await?;
        tracing::info!(server = stream.endpoint(), %from, synchronous, "streaming WAL");
        self.board.clear("server");
        self.board.update(|s| {
            s.server.streaming = true;
            s.server.trouble = None;
        });
        match self.stream(&mut stream, sink, failures, stop).await {
            // A walsender opens a segment when it is about to send it, so this is where it is told mostly.
            Err(SessionError::Source(SourceError::Capture(CaptureError::WalRemoved(error)))) => {
                self.lost = Some(error.to_string());
                Ok(Ended::Again)
            }
            result => result,
        }
    }

    /// Where to stream from: where our WAL ends, as far as the server's history goes along.
    async fn from(&mut self, path: &TimelineHistory, server: Position, restart: Lsn) -> Result<Position, SessionError> {
        let size = self.identity.segment_size;
        let aligned = |at: Position| Position { lsn: at.lsn.align_down(size.bytes()), ..at };
        let Some(have) = self.have else {
            // Nothing is archived: begin with the oldest WAL that the slot holds.
            let timeline = path.timeline_at(restart);
            return Ok(aligned(Position { timeline, lsn: restart }));
        };
        match course(path, have, size) {
            Course::From(from) if from.timeline == server.timeline && from.lsn > server.lsn => {
                Err(SessionError::Behind { server, ours: from })
            }
            Course::From(from) => Ok(from),
            Course::Stale => Err(SessionError::Stale { server: server.timeline, ours: have.timeline }),
            Course::Elsewhere => {
                let found = archiver::start::find(&self.source.repo, path, None).await.map_err(SourceError::from)?;
                let at = found.archived.unwrap_or(Position { timeline: path.timeline_at(restart), lsn: restart });
                let text = format!(
                    "the server was promoted from a server that never was on timeline {}; going on at {at}",
                    have.timeline
                );
                self.board.raise("diverged", text, Some("check that the right standby was promoted".to_owned()));
                self.backup_wanted.send_replace(Some("the server is on another branch of its history".to_owned()));
                Ok(aligned(at))
            }
        }
    }

    /// The sink that writes at `from`: the one we have, if it is there, or a new one.
    async fn sink_at<'a>(&mut self, sink: &'a mut Option<Sink>, from: Position) -> Result<&'a mut Sink, SessionError> {
        if sink.as_ref().is_some_and(|s| s.writer.next() != from) {
            self.finish(sink).await?;
        }
        match sink {
            Some(sink) => Ok(sink),
            none => {
                let at = Position { lsn: from.lsn.align_down(self.identity.segment_size.bytes()), ..from };
                debug_assert_eq!(at, from, "a stream without a writer begins with a segment");
                let writer = Writer::begin(&self.spool, at)?;
                Ok(none.insert(Sink { writer, flush: None, flushing: 0, begin: at }))
            }
        }
    }

    /// Brings what the sink holds to the disk and ends its run.
    async fn finish(&mut self, sink: &mut Option<Sink>) -> Result<(), SessionError> {
        if let Some(mut sink) = sink.take() {
            sink.drain().await?;
            sink.writer.finish()?;
        }
        Ok(())
    }

    /// After a session: brings what was received to the disk, so that the next one goes on behind it.
    async fn settle(&mut self, sink: &mut Option<Sink>, stop: &CancellationToken) -> Result<(), SessionError> {
        let Some(held) = sink else { return Ok(()) };
        let mut failures = 0;
        loop {
            match held.drain().await {
                Ok(()) => break,
                Err(error) if error.is_transient() && !stop.is_cancelled() => {
                    failures += 1;
                    self.spool_trouble(&error);
                    let pause = RetryPolicy::FOREVER.pause(failures);
                    let _ = stop.run_until_cancelled(tokio::time::sleep(pause)).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.spool_well();
        self.have = Some(held.writer.next());
        Ok(())
    }

    /// The WAL that should come next is gone from the server: says so in the repository and to people, and goes on with
    /// the oldest WAL that there is.
    async fn bridge(
        &mut self,
        walsender: &mut Walsender,
        path: &TimelineHistory,
        sink: &mut Option<Sink>,
        why: &str,
    ) -> Result<(), SessionError> {
        self.finish(sink).await?;
        let size = self.identity.segment_size.bytes();
        let mut restart = self.source.ensure_slot(walsender).await?;
        let Some(mut have) = self.have else {
            // Nothing was archived, so nothing is missing; but the slot claims to hold what is gone.
            self.source.recreate_slot(walsender).await?;
            return Ok(());
        };
        // A stream begins with a segment, and the archive may hold the first part of that: only the rest is lost.
        let archived = *self.archived.borrow();
        have.lsn = archived.filter(|at| at.timeline == have.timeline).map_or(have.lsn, |at| at.lsn.max(have.lsn));
        if restart.align_down(size) <= have.lsn {
            restart = self.source.recreate_slot(walsender).await?;
        }
        let begin = restart.align_down(size);
        let reason = format!("the server no longer had this WAL: {why}");
        for timeline in path.ancestors().iter().map(|a| a.timeline).chain([path.timeline()]) {
            let (first, end) = (path.begin_of(timeline), path.end_of(timeline));
            let (gap_from, gap_to) = (first.unwrap_or(Lsn::ZERO).max(have.lsn), end.unwrap_or(Lsn::MAX).min(begin));
            if timeline < have.timeline || gap_from >= gap_to {
                continue;
            }
            let gap = Gap { timeline, from: gap_from, to: gap_to, reason: reason.clone(), at: Timestamp::now() };
            self.source.repo.put_gap(&gap).await.map_err(SourceError::from)?;
            let seen = GapSeen { from: Position { timeline, lsn: gap_from }, to: gap_to, reason: reason.clone() };
            self.board.update(|s| s.gaps.push(seen));
            self.board.raise(
                "gap",
                format!("WAL from {gap_from} to {gap_to} of timeline {timeline} is lost: {reason}"),
                Some(
                    "moments in it cannot be restored; a new base backup is taken so that what follows can be. Let the \
                     slot hold more WAL: raise max_slot_wal_keep_size"
                        .to_owned(),
                ),
            );
        }
        self.backup_wanted.send_replace(Some("WAL was lost".to_owned()));
        self.have = Some(Position { timeline: path.timeline_at(begin), lsn: begin });
        Ok(())
    }

    async fn stream(
        &mut self,
        stream: &mut WalStream,
        sink: &mut Sink,
        failures: &mut u32,
        stop: &CancellationToken,
    ) -> Result<Ended, SessionError> {
        let mut schedule = feedback::Schedule::new(feedback::INTERVAL);
        let mut spooled = self.spool.subscribe();
        let mut flush_failures = 0;
        let mut flush_again_at: Option<Instant> = None;
        let mut full_since: Option<Instant> = None;
        let mut patience = Patience::default();
        let mut reply_at: Option<Instant> = None;
        loop {
            let now = Instant::now();
            if flush_again_at.is_none_or(|at| at <= now) {
                flush_again_at = None;
                sink.begin_flush();
            }
            let feedback = self.feedback(sink);
            if patience.is_over(feedback.flush, now.into_std()) {
                return Err(SessionError::LetGo);
            }
            if reply_at.is_some_and(|at| at <= now) {
                reply_at = None;
                schedule.reply_requested();
            }
            if schedule.is_due(now.into_std(), feedback.flush) {
                stream.send_feedback(feedback).await?;
                schedule.sent(now.into_std(), feedback.flush);
            }
            let full = !self.spool.has_room(sink.writer.pending() + sink.flushing + MESSAGE_MAX);
            if full != full_since.is_some() {
                full_since = full.then_some(now);
                self.board.update(|s| s.spool.full = full);
                if full {
                    tracing::warn!("the spool is full: reading no WAL until segments have left it");
                }
            }
            if full_since.is_some_and(|since| since + LET_GO_AFTER <= now) {
                return Ok(Ended::Full);
            }
            let may_read = !full && sink.writer.pending() < PENDING_MAX;
            tokio::select! {
                done = flushed(&mut sink.flush) => {
                    sink.flush = None;
                    sink.flushing = 0;
                    match sink.writer.end_flush(done) {
                        Ok(()) => {
                            flush_failures = 0;
                            self.spool_well();
                        }
                        Err(error) if error.is_transient() => {
                            flush_failures += 1;
                            self.spool_trouble(&error);
                            flush_again_at = Some(now + RetryPolicy::FOREVER.pause(flush_failures));
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                event = stream.next(), if may_read => match event? {
                    StreamEvent::Wal { start, server_end, data, .. } => {
                        sink.writer.append(start, data)?;
                        *failures = 0;
                        self.board.received(sink.writer.next(), Timestamp::now());
                        self.tell_server_end(sink, server_end);
                    }
                    StreamEvent::Keepalive { server_end, reply_requested, .. } => {
                        *failures = 0;
                        self.tell_server_end(sink, server_end);
                        if reply_requested {
                            reply_at = Some(now + patience.asked(server_end, now.into_std()));
                        }
                    }
                    StreamEvent::EndOfTimeline { .. } => return Ok(Ended::Again),
                },
                _ = self.archived.changed() => {}
                _ = spooled.changed(), if full => {}
                () = sleep_until(schedule.deadline().map(Instant::from_std)) => {}
                () = sleep_until(flush_again_at) => {}
                () = sleep_until(reply_at) => {}
                () = sleep_until(full_since.map(|since| since + LET_GO_AFTER)) => {}
                () = stop.cancelled() => return Ok(Ended::Stopped),
            }
        }
    }

    /// What is safe to tell the server.
    fn feedback(&self, sink: &Sink) -> Feedback {
        let durable = match self.durability {
            Durability::Spool => Some(sink.on_disk()),
            Durability::Repository => *self.archived.borrow(),
        };
        let flush = durable_lsn(durable, sink.begin);
        Feedback { write: sink.writer.next().lsn.max(flush), flush, apply: flush, reply_requested: false }
    }

    fn tell_server_end(&self, sink: &Sink, server_end: Lsn) {
        let at = Position { timeline: sink.begin.timeline, lsn: server_end };
        self.board.update(|s| {
            s.server.flushed = s.server.flushed.max(Some(at));
            s.server.heard_at = Some(Timestamp::now());
        });
    }

    fn spool_trouble(&self, error: &SpoolError) {
        let text = Chain(error).to_string();
        self.board.update(|s| {
            if s.spool.trouble.is_none() {
                tracing::error!(hint = error.hint(), "failed to write the spool, will try again: {text}");
            }
            s.spool.trouble = Some(Trouble::again(s.spool.trouble.as_ref(), Timestamp::now(), text, error.hint()));
        });
    }

    fn spool_well(&self) {
        let position = self.spool.spooled();
        self.board.update(|s| {
            s.spooled = position.position().or(s.spooled);
            s.spool.bytes = position.bytes;
            s.spool.trouble = None;
        });
    }
}

/// The flush position on the stream's timeline, given what is durable. A stream begins with the segment in which its
/// timeline branched off: what is durable on an older timeline counts up to there.
fn durable_lsn(durable: Option<Position>, begin: Position) -> Lsn {
    match durable {
        Some(at) if at.timeline == begin.timeline => at.lsn,
        Some(at) if at.timeline < begin.timeline => at.lsn.min(begin.lsn),
        _ => Lsn::ZERO,
    }
}

impl Sink {
    fn begin_flush(&mut self) {
        if self.flush.is_none() {
            let pending = self.writer.pending();
            self.flush = self.writer.begin_flush();
            if self.flush.is_some() {
                self.flushing = pending;
            }
        }
    }

    /// Brings everything to the disk.
    async fn drain(&mut self) -> Result<(), SpoolError> {
        if let Some(mut flush) = self.flush.take() {
            let done = flush.done().await;
            self.flushing = 0;
            self.writer.end_flush(done)?;
        }
        self.writer.flush().await
    }

    /// The end of what is on the disk.
    fn on_disk(&self) -> Position {
        let next = self.writer.next();
        Position { lsn: Lsn::new(next.lsn.bytes() - self.writer.pending() - self.flushing), ..next }
    }
}

async fn flushed(flush: &mut Option<Flush>) -> crate::capture::spool::FlushDone {
    match flush {
        Some(flush) => flush.done().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Ends `grace` after `stop` was cancelled.
async fn stopped_for(stop: &CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(grace).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(timeline: u32, lsn: u64) -> Position {
        Position { timeline: TimelineId::new(timeline).unwrap(), lsn: Lsn::new(lsn) }
    }

    #[test]
    fn the_server_never_hears_more_than_what_is_durable_on_its_timeline() {
        assert_eq!(durable_lsn(None, at(1, 100)), Lsn::ZERO);
        assert_eq!(durable_lsn(Some(at(1, 500)), at(1, 100)), Lsn::new(500));
        assert_eq!(durable_lsn(Some(at(1, 50)), at(2, 100)), Lsn::new(50));
        assert_eq!(durable_lsn(Some(at(1, 500)), at(2, 100)), Lsn::new(100), "WAL that the new primary never had");
        assert_eq!(durable_lsn(Some(at(3, 500)), at(2, 100)), Lsn::ZERO);
    }
}
