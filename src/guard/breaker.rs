//! Stops a transaction before it can commit, by ending its session; and no other session.
//!
//! One statement looks once more whether the process still is the session that was seen, by the time at which it began,
//! and still has the transaction; only then does it send the signal. A process number that the system gave to another
//! session meanwhile, and a session that went on to another transaction, do not match.
//!
//! What is left is the moment between that look and the arrival of the signal, some microseconds: a session that commits
//! in it is ended too late, and what it had just begun is rolled back. The record says whether the transaction was really
//! aborted.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::Client;

use crate::backoff::Chain;
use crate::capture::{self, CaptureError, ConnInfo};
use crate::detect::Actor;
use crate::pg::{PgTime, Xid};

/// What the breaker may do: the `[breaker]` table of the settings. Rules say when.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Sessions that are ended within an hour at most: a rule that is wrong must not stop a whole application. 0: none,
    /// whatever the rules say.
    pub per_hour: u32,
    /// Roles whose sessions are never ended.
    pub spare: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { per_hour: 3, spare: Vec::new() }
    }
}

/// A transaction and the session that runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The transaction or one of its subtransactions.
    pub xid: Xid,
    /// The process.
    pub pid: i32,
    /// When its session began.
    pub backend_start: PgTime,
    /// Its role, if known.
    pub role: Option<String>,
}

impl Target {
    /// The session of `actor`, if enough is known of it to be sure.
    pub fn of(xid: Xid, actor: &Actor) -> Option<Self> {
        let (pid, backend_start) = (actor.pid?, actor.backend_start?);
        actor.prepared.is_none().then(|| Self { xid, pid, backend_start, role: actor.role.clone() })
    }
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "why")]
pub enum Outcome {
    /// The signal was sent to the session, which had the transaction.
    Terminated,
    /// No session has the transaction any more: it ended, or it was prepared.
    AlreadyGone,
    /// The role may not do it: it lacks `pg_signal_backend`, or the session is a superuser's.
    NotPermitted(String),
    /// So many sessions were ended within the last hour that no more are.
    CapReached,
    /// The session's role is one of those that are spared.
    Spared,
    /// The server could not be asked.
    Failed(String),
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// When, by our clock.
    pub at: Timestamp,
    /// The transaction.
    pub xid: Xid,
    /// The process.
    pub pid: i32,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Whether the transaction was really aborted, once the WAL told it. `Some(false)`: it was too late.
    pub aborted: Option<bool>,
}

impl Record {
    /// Takes down how the transaction ended.
    pub fn settle(&mut self, xid: Xid, committed: bool) {
        if self.xid == xid {
            self.aborted = Some(!committed);
        }
    }
}

/// A row, true if the signal was sent, if and only if the session is there, is the same, and has the transaction.
const TERMINATE: &str = "SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity AS a \
    WHERE a.pid = $1 AND a.backend_start = $2 AND a.backend_type = 'client backend' AND a.pid <> pg_backend_pid() \
    AND (a.backend_xid::text::bigint = $3 OR EXISTS (\
        SELECT FROM pg_locks AS l WHERE l.pid = a.pid AND l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' \
        AND l.granted AND l.transactionid::text::bigint = $3))";

/// Every moment counts: a server that does not answer by then will not in time.
const ANSWER_MAX: Duration = Duration::from_secs(5);

const HOUR: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);

/// Ends sessions, not too many.
#[derive(Debug)]
pub struct Breaker {
    config: Config,
    conninfo: ConnInfo,
    client: Option<Client>,
    /// When sessions were ended, within the last hour.
    ended: VecDeque<Timestamp>,
}

impl Breaker {
    /// Nothing is done, and no connection made, before somebody asks for it.
    pub fn new(conninfo: ConnInfo, config: Config) -> Self {
        Self { config, conninfo, client: None, ended: VecDeque::new() }
    }

    /// Connects, so that nobody has to wait for that later.
    ///
    /// # Errors
    /// If the server cannot be reached, or does not let us in.
    pub async fn prepare(&mut self) -> Result<(), CaptureError> {
        self.connected().await.map(drop)
    }

    async fn connected(&mut self) -> Result<&Client, CaptureError> {
        match self.client.take() {
            Some(client) if !client.is_closed() => Ok(self.client.insert(client)),
            _ => Ok(self.client.insert(capture::connect_sql(&self.conninfo).await?)),
        }
    }

    /// Ends the session of a transaction.
    pub async fn terminate(&mut self, target: &Target, now: Timestamp) -> Record {
        let outcome = self.try_terminate(target, now).await;
        if outcome == Outcome::Terminated {
            self.ended.push_back(now);
        }
        Record { at: now, xid: target.xid, pid: target.pid, outcome, aborted: None }
    }

    async fn try_terminate(&mut self, target: &Target, now: Timestamp) -> Outcome {
        if target.role.as_ref().is_some_and(|role| self.config.spare.contains(role)) {
            return Outcome::Spared;
        }
        while self.ended.front().is_some_and(|first| now.duration_since(*first) >= HOUR) {
            self.ended.pop_front();
        }
        if self.ended.len() >= self.config.per_hour as usize {
            return Outcome::CapReached;
        }
        match tokio::time::timeout(ANSWER_MAX, self.signal(target)).await {
            Ok(Ok(true)) => Outcome::Terminated,
            Ok(Ok(false)) => Outcome::AlreadyGone,
            Ok(Err(CaptureError::NotPermitted(error))) => Outcome::NotPermitted(error.to_string()),
            Ok(Err(error)) => {
                self.client = None;
                Outcome::Failed(Chain(&error).to_string())
            }
            Err(_) => {
                self.client = None;
                Outcome::Failed(format!("no answer within {} s", ANSWER_MAX.as_secs()))
            }
        }
    }

    async fn signal(&mut self, target: &Target) -> Result<bool, CaptureError> {
        let began = target.backend_start.timestamp();
        let xid = i64::from(target.xid.get());
        let endpoint = self.conninfo.to_string();
        let client = self.connected().await?;
        let row = client.query_opt(TERMINATE, &[&target.pid, &began, &xid]).await;
        let row = row.map_err(|error| capture::sql_error(&endpoint, error))?;
        row.map_or(Ok(false), |row| row.try_get(0)).map_err(|error| capture::sql_error(&endpoint, error))
    }
}
