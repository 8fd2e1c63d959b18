//! The loop that brings what logical replication tells into the change log, and to whoever looks for damage.
//!
//! ```text
//! server -> messages -> batch -> object of the change log -> the server is told that it is durable
//!                  `-> observer -> transactions, open ones too -> detect
//! ```
//!
//! The server is told of nothing that is not in the repository (promise 1), so a slot that has been told more than the log
//! holds means that somebody else read from it: that is a gap, recorded and told like one in the WAL.
//!
//! # What a death leaves behind
//!
//! The log's last object says where it ends; the next session begins there. What a session left half sent the server sends
//! again, whole; readers forget the half (`repo::changes::format`). An object whose put was on its way may come into being
//! later: the next session then finds its own place taken by other content, and begins anew behind that.

mod bases;
mod batch;
mod databases;
mod definitions;
mod merging;
mod publications;

use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::batch::{Batch, Puts};
use super::patience::Patience;
use super::scan::{Observed, Telling};
use super::source::SourceError;
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::feedback::{self, Feedback};
use crate::capture::logical::{self, SlotState, Survey};
use crate::capture::{CaptureError, ConnInfo, SlotLife, StreamEvent, WalStream, Walsender};
use crate::detect::LogicalObserver;
use crate::pg::{Lsn, Oid, PgTime, Position, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::changes::{ChangesName, Header};
use crate::repo::cluster::{ClusterIdentity, FORMAT};
use crate::repo::gap::Gap;
use crate::repo::{RepoError, Repository};
use crate::serve::status::{Board, GapSeen, Trouble};

use bases::{Bases, Wanted};
pub(super) use databases::Database;
use definitions::Definitions;
use merging::Merging;
use publications::Publications;

/// Settings of the sessions. The server begins to send a large transaction when its changes take more than the first, the
/// least that it allows: so damage shows before its commit. The others are what subscribers ask for: values are written so
/// that they are read back the same.
///
/// (Postgres: `libpqrcv_connect` in `replication/libpqwalreceiver/libpqwalreceiver.c`.)
const SESSION_SETTINGS: [(&str, &str); 4] = [
    ("logical_decoding_work_mem", "64kB"),
    ("datestyle", "ISO"),
    ("intervalstyle", "postgres"),
    ("extra_float_digits", "3"),
];

/// Without changes the log's end is written down so often, if the server's WAL grew.
const IDLE_EVERY: Duration = Duration::from_secs(10);

/// After a request to stop, what was received is put for no longer than this.
const STOP_MAX: Duration = Duration::from_secs(8);

/// A server that knows who it is, and the database whose changes are read.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) identity: ClusterIdentity,
    pub(super) at: Position,
    pub(super) database: Oid,
    pub(super) database_name: String,
}

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Logical {
    pub(super) conninfo: ConnInfo,
    pub(super) slot: String,
    pub(super) config: logical::Config,
    pub(super) repo: Repository,
    pub(super) origin: Origin,
    /// How long changes wait for their object.
    pub(super) interval: Duration,
    /// Compression level.
    pub(super) level: i32,
    pub(super) board: Board,
    pub(super) observed: mpsc::Sender<Observed>,
    /// Why a base is wanted before its time.
    pub(super) wanted: watch::Sender<Option<Wanted>>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogicalError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("slot {slot} is not one of pgoutput in database {database}: {found}")]
    OtherSlot { slot: String, database: String, found: String },
    #[error("another agent put changes where ours should go")]
    Taken,
    #[error("the server's WAL ends at {server}, before {ours}, up to which its changes are kept already")]
    Behind { server: Position, ours: Position },
    #[error("the server is on timeline {server}, but changes of timeline {ours} are kept already")]
    Stale { server: TimelineId, ours: TimelineId },
    #[error("the server was promoted at {switch}, before {ours}, up to which changes are kept already")]
    Diverged { switch: Lsn, ours: Position },
    #[error("the server wants to stop, and waits for changes that the repository does not take; walguard lets it go")]
    LetGo,
    #[error("the server sends what cannot be read: {0}")]
    Unreadable(String),
}

impl From<CaptureError> for LogicalError {
    fn from(error: CaptureError) -> Self {
        Self::Source(error.into())
    }
}

impl From<RepoError> for LogicalError {
    fn from(error: RepoError) -> Self {
        Self::Source(error.into())
    }
}

impl LogicalError {
    fn is_fatal(&self) -> bool {
        matches!(self, Self::Source(error) if error.is_fatal())
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Source(error) => return error.hint(),
            Self::OtherSlot { .. } => "name another slot with `postgres.slot`, or drop that one if nobody needs it",
            Self::Taken => "one agent reads a database's changes; see whether another one runs",
            Self::Stale { .. } | Self::Behind { .. } | Self::Diverged { .. } => {
                "a database that was restored, or a standby promoted without the last changes, is another history: give it a \
                 name of its own with `--cluster`"
            }
            Self::LetGo => "nothing is lost: the slot keeps the WAL. See why the repository does not take it",
            Self::Unreadable(_) => "is there a proxy in between? Please report it; the slot keeps the changes",
        };
        Some(text.to_owned())
    }
}

/// How a session ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Stopped,
    /// Look again where to go on.
    Again,
}

/// Asks a server who it is, over a connection to its database.
pub(super) async fn origin(conninfo: &ConnInfo) -> Result<Origin, SourceError> {
    let mut walsender = Walsender::connect_to_database(conninfo).await?;
    let (identity, at) = identify(&mut walsender).await?;
    drop(walsender);
    let client = logical::connect(conninfo).await?;
    let survey = Survey::ask(&client, &logical::Config::default()).await?;
    Ok(Origin { identity, at, database: survey.database, database_name: survey.database_name })
}

async fn identify(walsender: &mut Walsender) -> Result<(ClusterIdentity, Position), SourceError> {
    let system = walsender.identify_system().await?;
    let segment_size = walsender.show("wal_segment_size").await?;
    let segment_size: SegmentSize = segment_size
        .parse()
        .map_err(|error| CaptureError::Protocol(format!("wal_segment_size is `{segment_size}`: {error}")))?;
    let identity = ClusterIdentity {
        format: FORMAT,
        system_id: system.system_id,
        server_version: walsender.server_version(),
        segment_size,
        created_at: Timestamp::now(),
    };
    Ok((identity, Position { timeline: system.timeline, lsn: system.flush_lsn }))
}

/// Where the log goes on.
#[derive(Clone, Debug)]
struct Course {
    timeline: TimelineId,
    next: ChangesName,
    /// Everything committed before this is in the log.
    end: Lsn,
    /// The log, or what is behind a gap, begins here: the first object says so, even if it is empty.
    is_begin: bool,
}

impl Logical {
    /// Reads changes until `stop` is cancelled; connects again for ever.
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut failures = 0;
        loop {
            let result = tokio::select! {
                result = self.session(&mut failures, &stop) => result,
                // A session looks for itself, to keep what it has.
                () = stopped_for(&stop, STOP_MAX) => Ok(Ended::Stopped),
            };
            self.board.update(|s| s.server.streaming = false);
            let error = match result {
                Ok(Ended::Stopped) => return Ok(()),
                Ok(Ended::Again) => continue,
                Err(LogicalError::Source(error)) if error.is_fatal() => {
                    return Err(error.into_anyhow()).context("read changes");
                }
                Err(error) => error,
            };
            debug_assert!(!error.is_fatal());
            if stop.is_cancelled() {
                return Ok(());
            }
            failures += 1;
            let pause = RetryPolicy::FOREVER.pause(failures);
            self.tell(&error, failures, pause);
            let _ = stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    fn tell(&self, error: &LogicalError, failures: u32, pause: Duration) {
        let text = Chain(error).to_string();
        let mut is_news = false;
        self.board.update(|s| {
            is_news = s.server.trouble.as_ref().is_none_or(|t| t.error != text);
            let trouble = Trouble::again(s.server.trouble.as_ref(), Timestamp::now(), text.clone(), error.hint());
            s.server.trouble = Some(trouble);
        });
        if is_news || failures.is_power_of_two() {
            tracing::warn!(failures, ?pause, hint = error.hint(), "failed to read changes, will try again: {text}");
        }
        if !matches!(error, LogicalError::Source(_) | LogicalError::LetGo) {
            self.board.raise("server", text, error.hint());
        }
    }

    async fn session(&self, failures: &mut u32, stop: &CancellationToken) -> Result<Ended, LogicalError> {
        self.board.update(|s| s.server.connections += 1);
        let with = |info: ConnInfo, (name, value)| info.with_setting(name, value);
        let conninfo = SESSION_SETTINGS.into_iter().fold(self.conninfo.clone(), with);
        let mut walsender = Walsender::connect_to_database(&conninfo).await?;
        let (identity, at) = identify(&mut walsender).await?;
        let (expected, found) = (self.origin.identity.system_id, identity.system_id);
        if expected != found {
            return Err(CaptureError::WrongServer { expected, found }.into());
        }
        self.board.update(|s| {
            s.server.version = Some(identity.server_version);
            s.server.flushed = Some(at);
        });
        // Before the slot: it cannot decode changes from before its publication was made.
        let client = logical::connect(&self.conninfo).await?;
        let (survey, _) = logical::publish(&client, &self.config).await?;
        let publications = survey.publications;
        let last = self.last().await?;
        self.check_history(&mut walsender, at, last.as_ref()).await?;
        let confirmed = self.ensure_slot(&mut walsender, &client).await?;
        drop(client);
        let course = self.course(at, last.as_ref(), confirmed).await?;
        let stream = walsender.start_logical(&self.slot, course.end, &publications).await?;
        tracing::info!(server = stream.endpoint(), from = %course.end, "reading changes of {}", self.origin.database_name);
        self.board.clear("server");
        self.board.update(|s| {
            s.server.streaming = true;
            s.server.trouble = None;
            s.archived = Some(Position { timeline: course.timeline, lsn: course.end });
        });
        let result = self.stream(stream, course, failures, stop).await;
        match result {
            Err(LogicalError::Source(SourceError::Repo(RepoError::Conflict { .. }))) => Err(LogicalError::Taken),
            result => result,
        }
    }

    /// The header of the log's last object.
    async fn last(&self) -> Result<Option<Header>, RepoError> {
        let Some(name) = self.repo.last_changes(self.origin.database, Lsn::MAX).await? else { return Ok(None) };
        Ok(Some(self.repo.changes(name).await?.header))
    }

    /// Refuses a server that does not go on where the log ends.
    async fn check_history(
        &self,
        walsender: &mut Walsender,
        at: Position,
        last: Option<&Header>,
    ) -> Result<(), LogicalError> {
        let Some(last) = last else { return Ok(()) };
        let ours = Position { timeline: last.timeline, lsn: last.to };
        if at.timeline < ours.timeline {
            return Err(LogicalError::Stale { server: at.timeline, ours: ours.timeline });
        }
        if at.timeline > ours.timeline {
            let (_, content) = walsender.timeline_history(at.timeline).await?;
            let path = TimelineHistory::parse(at.timeline, &String::from_utf8_lossy(&content));
            let path = path.map_err(SourceError::from)?;
            return match path.end_of(ours.timeline) {
                Some(switch) if ours.lsn <= switch => Ok(()),
                Some(switch) => Err(LogicalError::Diverged { switch, ours }),
                None => Err(LogicalError::Diverged { switch: Lsn::ZERO, ours }),
            };
        }
        if at.lsn < ours.lsn { Err(LogicalError::Behind { server: at, ours }) } else { Ok(()) }
    }

    /// Up to where the slot was told that changes are safe. A slot that is not there, or was invalidated, is made anew.
    async fn ensure_slot(
        &self,
        walsender: &mut Walsender,
        client: &tokio_postgres::Client,
    ) -> Result<Lsn, LogicalError> {
        let slot = logical::slot(client, &self.slot).await?;
        let database = &self.origin.database_name;
        match slot {
            Some(SlotState {
                plugin: Some(plugin),
                database: Some(of),
                confirmed: Some(confirmed),
                is_lost: false,
                failover,
            }) if plugin == "pgoutput" && of == *database => {
                // One that was made by an older walguard, or before the settings said so.
                if walsender.knows_failover() && failover != self.config.failover {
                    walsender.set_failover(&self.slot, self.config.failover).await?;
                }
                return Ok(confirmed);
            }
            Some(SlotState { plugin: Some(plugin), database: Some(of), .. })
                if plugin == "pgoutput" && of == *database =>
            {
                tracing::warn!(slot = self.slot, "the slot holds no changes any more: making it anew");
                walsender.drop_slot(&self.slot).await?;
            }
            Some(SlotState { plugin, database: of, .. }) => {
                let found = match (plugin, of) {
                    (Some(plugin), Some(of)) => format!("it is one of {plugin} in database {of}"),
                    _ => "it is a physical one".to_owned(),
                };
                return Err(LogicalError::OtherSlot { slot: self.slot.clone(), database: database.clone(), found });
            }
            None => {}
        }
        tracing::info!(slot = self.slot, "making the slot; this waits for the transactions that are open now");
        let life = SlotLife::Kept { failover: self.config.failover };
        let made = walsender.create_logical_slot(&self.slot, life).await?;
        tracing::info!(slot = self.slot, from = %made.consistent, "made the replication slot");
        Ok(made.consistent)
    }

    /// Where the log goes on. What lies between its end and the slot is lost, and said to be.
    async fn course(&self, at: Position, last: Option<&Header>, confirmed: Lsn) -> Result<Course, LogicalError> {
        let timeline = at.timeline;
        let begin = ChangesName { database: self.origin.database, from: confirmed, part: 0, merged_to: None };
        let Some(last) = last else { return Ok(Course { timeline, next: begin, end: confirmed, is_begin: true }) };
        if confirmed <= last.to {
            return Ok(Course { timeline, next: last.next(), end: last.to, is_begin: false });
        }
        let reason = "the slot no longer held these changes: it was dropped, invalidated, or read by somebody else";
        let gap = Gap { timeline, from: last.to, to: confirmed, reason: reason.to_owned(), at: Timestamp::now() };
        self.repo.put_gap(&gap).await?;
        let from = Position { timeline, lsn: last.to };
        self.board.update(|s| s.gaps.push(GapSeen { from, to: confirmed, reason: reason.to_owned() }));
        self.board.raise(
            "gap",
            format!("changes from {} to {confirmed} of {} are lost: {reason}", last.to, self.origin.database_name),
            Some(
                "moments in it cannot be rebuilt; a new base is taken so that what follows can be. Let the slot hold more WAL: raise max_slot_wal_keep_size; one slot serves \
                 one agent"
                    .to_owned(),
            ),
        );
        self.wanted.send_replace(Some(Wanted::Lost));
        Ok(Course { timeline, next: begin, end: confirmed, is_begin: true })
    }

    async fn stream(
        &self,
        mut stream: WalStream,
        course: Course,
        failures: &mut u32,
        stop: &CancellationToken,
    ) -> Result<Ended, LogicalError> {
        let timeline = course.timeline;
        let mut batch = Batch::new(course.next, course.end);
        let mut puts = Puts::new(self, &course);
        let mut view = View::new(self, timeline);
        let mut schedule = feedback::Schedule::new(feedback::INTERVAL);
        let mut put_at: Option<Instant> = None;
        let mut patience = Patience::default();
        let mut reply_at: Option<Instant> = None;
        let mut stopping = false;
        if course.is_begin {
            puts.begin(batch.take());
        }
        loop {
            let now = Instant::now();
            if puts.is_idle() {
                let idle = puts.last_at() + IDLE_EVERY;
                let is_due = batch.is_full()
                    || put_at.is_some_and(|at| at <= now)
                    || stopping && !batch.is_empty()
                    || batch.to() > puts.durable() && idle <= now;
                if is_due && (!batch.is_empty() || batch.to() > puts.durable()) {
                    puts.begin(batch.take());
                    put_at = None;
                } else if stopping {
                    let flush = puts.durable();
                    let _ = stream.send_feedback(told(flush)).await;
                    return Ok(Ended::Stopped);
                }
            }
            let flush = puts.durable();
            if patience.is_over(flush, now.into_std()) {
                return Err(LogicalError::LetGo);
            }
            if reply_at.is_some_and(|at| at <= now) {
                reply_at = None;
                schedule.reply_requested();
            }
            if schedule.is_due(now.into_std(), flush) {
                stream.send_feedback(told(flush)).await?;
                schedule.sent(now.into_std(), flush);
            }
            let may_read = !stopping && !batch.is_overfull();
            let wait_idle = (batch.to() > flush && batch.is_empty()).then(|| puts.last_at() + IDLE_EVERY);
            tokio::select! {
                done = puts.done() => {
                    let durable = done?;
                    *failures = 0;
                    self.board.archived(Position { timeline, lsn: durable });
                }
                event = stream.next(), if may_read => match event? {
                    StreamEvent::Wal { start, sent_at, data, .. } => {
                        *failures = 0;
                        batch.add(start, sent_at, &data).map_err(LogicalError::Unreadable)?;
                        put_at = put_at.or(Some(now + self.interval));
                        self.received(timeline, batch.to());
                        if !view.see(start, sent_at, &data).await {
                            stop.cancelled().await;
                            return Ok(Ended::Stopped);
                        }
                    }
                    StreamEvent::Keepalive { server_end, reply_requested, .. } => {
                        *failures = 0;
                        batch.reached(server_end);
                        self.received(timeline, server_end);
                        if reply_requested {
                            reply_at = Some(now + patience.asked(server_end, now.into_std()));
                            // A server that is being stopped waits until we have everything.
                            if batch.to() > flush {
                                put_at = Some(now);
                            }
                        }
                        if !view.caught_up(batch.to()).await {
                            stop.cancelled().await;
                            return Ok(Ended::Stopped);
                        }
                    }
                    StreamEvent::EndOfTimeline { .. } => return Ok(Ended::Again),
                },
                () = sleep_until(schedule.deadline().map(Instant::from_std)) => {}
                () = sleep_until(reply_at) => {}
                () = sleep_until(put_at), if puts.is_idle() => {}
                () = sleep_until(wait_idle), if puts.is_idle() => {}
                () = stop.cancelled(), if !stopping => stopping = true,
            }
        }
    }

    fn received(&self, timeline: TimelineId, server_end: Lsn) {
        let at = Position { timeline, lsn: server_end };
        self.board.update(|s| {
            s.server.flushed = s.server.flushed.max(Some(at));
            s.server.heard_at = Some(Timestamp::now());
        });
        self.board.received(at, Timestamp::now());
    }
}

const fn told(flush: Lsn) -> Feedback {
    Feedback { write: flush, flush, apply: flush, reply_requested: false }
}

/// What is understood of the messages, for whoever looks for damage. What cannot be understood is told, and kept all the
/// same.
struct View<'a> {
    logical: &'a Logical,
    timeline: TimelineId,
    /// `None` after a message that could not be understood, until the next session.
    observer: Option<LogicalObserver>,
    telling: Telling,
    caught_up: Lsn,
}

impl<'a> View<'a> {
    fn new(logical: &'a Logical, timeline: TimelineId) -> Self {
        let Origin { database, database_name, .. } = &logical.origin;
        let observer = Some(LogicalObserver::new(*database, database_name));
        Self { logical, timeline, observer, telling: Telling::default(), caught_up: Lsn::ZERO }
    }

    /// False if nobody listens any more.
    async fn see(&mut self, at: Lsn, sent: PgTime, message: &[u8]) -> bool {
        let Some(observer) = &mut self.observer else { return true };
        let (timeline, observed) = (self.timeline, &self.logical.observed);
        match observer.see(at, sent, message) {
            Ok(Some(transaction)) => {
                self.telling.ended(&transaction);
                let transaction = Box::new(transaction);
                if observed.send(Observed::Ended { transaction, timeline }).await.is_err() {
                    return false;
                }
            }
            Ok(None) => {}
            Err(error) => {
                let board = &self.logical.board;
                board.update(|s| s.scan.faults_total += 1);
                let hint = "the changes are kept, and nothing is lost; damage is not looked for until the next connection. \
                            Please report it";
                board.raise("decode", format!("changes cannot be understood: {error}"), Some(hint.to_owned()));
                self.observer = None;
                return true;
            }
        }
        if observer.transactions().is_empty() {
            return true;
        }
        let open = self.telling.open(observer.transactions(), observer.definitions(), observer, Instant::now());
        let open_transactions = observer.transactions().len() as u64;
        self.logical.board.update(|s| s.scan.open_transactions = open_transactions);
        open.is_empty() || observed.send(Observed::Open { timeline, transactions: open }).await.is_ok()
    }

    async fn caught_up(&mut self, to: Lsn) -> bool {
        if to <= self.caught_up {
            return true;
        }
        self.caught_up = to;
        let position = Position { timeline: self.timeline, lsn: to };
        let open_transactions = self.observer.as_ref().map_or(0, |observer| observer.transactions().len()) as u64;
        self.logical.board.update(|s| {
            s.scan.position = Some(position);
            s.scan.open_transactions = open_transactions;
        });
        let database = Some(self.logical.origin.database);
        self.logical.observed.send(Observed::CaughtUp { position, database }).await.is_ok()
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
