//! The loop that looks after the others: asks the server over SQL what only SQL tells, and tells systemd how we are.

use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio_postgres::types::PgLsn;
use tokio_util::sync::CancellationToken;

use crate::capture::{self, ConnInfo};
use crate::pg::{BLOCK_SIZE, Lsn, Position, TimelineId};
use crate::serve::status::{Board, Status};

/// How often the server is asked. Half of the shortest watchdog that makes sense, and nothing for a server.
const INTERVAL: Duration = Duration::from_secs(5);

/// A server that does not answer a query for so long is asked again later: status must not wait for it.
const ANSWER_MAX: Duration = Duration::from_secs(4);

/// Bytes of the longest header of a WAL page (Postgres: `SizeOfXLogLongPHD` in `access/xlog_internal.h`).
const PAGE_HEADER_MAX: u64 = 40;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) conninfo: ConnInfo,
    /// The name of the stream in `pg_stat_replication`.
    pub(super) stream_name: String,
    pub(super) slot: String,
    pub(super) board: Board,
    /// Commits wait for us.
    pub(super) synchronous: watch::Sender<bool>,
}

/// What SQL tells.
#[derive(Debug)]
struct Answer {
    /// A slot's name and `wal_status`.
    slot: Option<Vec<Option<String>>>,
    sync_state: Option<String>,
    flushed: Option<Lsn>,
    quiet: Option<Quiet>,
}

/// Whatever was committed by `time` lies before `end`.
///
/// The server takes the statement's time first, then its snapshot, then the end of its WAL. A transaction that had ended
/// by that time, and is not in progress in the snapshot, has its commit record before that end; so if the snapshot has
/// none in progress, all have. (Postgres: `RecordTransactionCommit` in `access/transam/xact.c` takes the time and writes
/// the record while the transaction is still in progress.)
#[derive(Clone, Copy, Debug)]
struct Quiet {
    end: Position,
    time: Timestamp,
}

impl Watch {
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut client: Option<tokio_postgres::Client> = None;
        let mut failing = false;
        let mut quiet = None;
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            match tokio::time::timeout(ANSWER_MAX, self.ask(&mut client)).await {
                Ok(Ok(answer)) => {
                    failing = false;
                    self.tell(&answer);
                    // One that the archive has not reached yet waits; a newer one would not be reached sooner.
                    quiet = self.prove(quiet.or(answer.quiet));
                }
                other => {
                    client = None;
                    if !failing {
                        failing = true;
                        let error = match other {
                            Ok(Err(error)) => format!("{error:#}"),
                            _ => "no answer".to_owned(),
                        };
                        // Archiving does not depend on it, and the stream tells of a server that is away.
                        tracing::info!("failed to ask the server over SQL: {error}");
                    }
                }
            }
            let status = self.board.snapshot(Timestamp::now());
            notify(&[NotifyState::Watchdog, NotifyState::Status(&line(&status))]);
        }
        notify(&[NotifyState::Stopping]);
        Ok(())
    }

    async fn ask(&self, client: &mut Option<tokio_postgres::Client>) -> anyhow::Result<Answer> {
        if client.as_ref().is_none_or(tokio_postgres::Client::is_closed) {
            *client = Some(capture::connect_sql(&self.conninfo).await?);
        }
        let client = client.as_ref().context("connect")?;
        // Further databases have slots of their own: of all of them the one that is worst.
        let query = "SELECT (SELECT ARRAY[slot_name::text, wal_status] FROM pg_replication_slots \
                      WHERE slot_name = $1 OR plugin = 'pgoutput' AND slot_name ~ ('^' || $1 || '_[0-9]+$') \
                      ORDER BY array_position(ARRAY['lost', 'unreserved', 'extended'], wal_status) LIMIT 1), \
                     (SELECT string_agg(sync_state, ',') FROM pg_stat_replication \
                      WHERE application_name = $2 AND state IN ('streaming', 'catchup')), \
                     CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_flush_lsn() END, \
                     now(), CASE WHEN pg_is_in_recovery() THEN NULL \
                     WHEN pg_snapshot_xmin(pg_current_snapshot()) = pg_snapshot_xmax(pg_current_snapshot()) \
                     THEN pg_current_wal_insert_lsn() END, \
                     CASE WHEN pg_is_in_recovery() THEN NULL \
                     ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END";
        let row = client.query_one(query, &[&self.slot, &self.stream_name]).await?;
        Ok(Answer {
            slot: row.try_get(0)?,
            sync_state: row.try_get(1)?,
            flushed: row.try_get::<_, Option<PgLsn>>(2)?.map(|lsn| Lsn::new(lsn.into())),
            quiet: quiet(row.try_get(3)?, row.try_get(4)?, row.try_get(5)?),
        })
    }

    /// Writes down what is proved, if the archive holds it; gives it back if not yet.
    fn prove(&self, quiet: Option<Quiet>) -> Option<Quiet> {
        let quiet = quiet?;
        let archived = self.board.snapshot(Timestamp::now()).archived;
        let is_same_timeline = archived.is_some_and(|archived| archived.timeline == quiet.end.timeline);
        if archived.is_some_and(|archived| archived.timeline > quiet.end.timeline) {
            return None; // what followed on the newer timeline proves more
        }
        if !is_same_timeline || archived < Some(quiet.end) {
            return Some(quiet);
        }
        self.board.update(|s| {
            s.caught_up_to = Some(quiet.time);
            s.caught_up_position = Some(quiet.end);
        });
        None
    }

    fn tell(&self, answer: &Answer) {
        if let Some(states) = &answer.sync_state {
            let synchronous = states.split(',').any(|s| s == "sync" || s == "quorum");
            self.synchronous.send_if_modified(|s| std::mem::replace(s, synchronous) != synchronous);
            self.board.update(|s| s.server.synchronous = synchronous);
        }
        let slot = answer.slot.as_deref().unwrap_or_default();
        let wal_status = slot.get(1).cloned().flatten();
        self.board.update(|s| {
            s.server.slot_wal_status.clone_from(&wal_status);
            if let (Some(lsn), Some(known)) = (answer.flushed, s.server.flushed) {
                s.server.flushed = Some(Position { lsn: lsn.max(known.lsn), ..known });
            }
        });
        match wal_status.as_deref() {
            Some(status @ ("unreserved" | "lost")) => self.board.raise(
                "slot",
                {
                    let name = slot.first().cloned().flatten().unwrap_or_else(|| self.slot.clone());
                    format!("the server is about to drop WAL that is not archived: slot {name} is {status}")
                },
                Some("raise max_slot_wal_keep_size now, and see why the archive is behind".to_owned()),
            ),
            _ => self.board.clear("slot"),
        }
    }
}

/// The end of the WAL is told as the place of the next record; at the beginning of a page that is behind the page's header,
/// which is not written before that record.
fn quiet(time: Timestamp, end: Option<PgLsn>, timeline: Option<String>) -> Option<Quiet> {
    let timeline = TimelineId::new(u32::from_str_radix(&timeline?, 16).ok()?)?;
    let end = Lsn::new(end?.into());
    let page = end.align_down(BLOCK_SIZE as u64);
    let is_behind_header = end.saturating_sub(page) <= PAGE_HEADER_MAX;
    Some(Quiet { end: Position { timeline, lsn: if is_behind_header { page } else { end } }, time })
}

/// The status in a line, for `systemctl status`.
fn line(status: &Status) -> String {
    let attention = status.attention();
    if let [first, rest @ ..] = attention.as_slice() {
        let more = if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
        return format!("ATTENTION: {first}{more}");
    }
    match (status.archived, status.lag_seconds) {
        (Some(archived), Some(lag)) => format!("archived up to {archived}, {lag:.1} s behind"),
        _ => "starting".to_owned(),
    }
}

/// Tells systemd, if it listens.
pub(super) fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("failed to notify systemd: {error}");
    }
}
