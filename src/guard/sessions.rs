//! SQL -> samples of the sessions, shared by all who ask who did something.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foldhash::{HashMap, HashMapExt as _};
use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Row, Statement};

use super::activity::{Activity, Lock, Prepared, Question, Sample, Session};
use super::nudge::Means;
use crate::capture::{self, CaptureError, ConnInfo};
use crate::detect::{Actor, Who};
use crate::pg::{Lsn, Oid, PgTime, ServerVersion, Xid};

/// A server that does not answer for so long is left, and connected to anew.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The role's rights are looked at again after so long: a grant needs no new start of the agent.
const RIGHTS_EVERY: Duration = Duration::from_secs(30);

/// What time it is there and how far WAL is. First, so that what changes later is in the next sample.
const MOMENT: &str = "SELECT clock_timestamp(), pg_is_in_recovery(), \
    CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_insert_lsn() END, \
    CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_flush_lsn() END";

/// Every lock on a transaction's own id, subtransactions' included, and those on relations that keep everybody out.
/// Bounded: a loop with an exception block makes a subtransaction a turn.
const LOCKS: &str = "SELECT locktype, transactionid::text::bigint, database, relation, pid FROM pg_locks \
    WHERE granted AND pid <> pg_backend_pid() \
    AND (locktype = 'transactionid' AND mode = 'ExclusiveLock' \
         OR locktype = 'relation' AND mode = 'AccessExclusiveLock' AND relation >= 16384) \
    LIMIT 20000";

/// After the locks: whoever has one is then most likely still there.
const ACTIVITY: &str = "WITH a AS MATERIALIZED (\
      SELECT pid, backend_xid, leader_pid, usename, datname, application_name, client_addr, client_port, backend_type, \
             backend_start, xact_start, query_start, state_change, state, left(query, 1024) AS query \
      FROM pg_stat_activity WHERE pid <> pg_backend_pid()) \
    SELECT pid, backend_xid::text::bigint, leader_pid, usename::text, datname::text, application_name, \
           host(client_addr), client_port, backend_type, backend_start, xact_start, query_start, state_change, \
           state = 'active', query \
    FROM a \
    WHERE backend_xid IS NOT NULL OR state_change >= $1 \
       OR pid IN (SELECT leader_pid FROM a WHERE backend_xid IS NOT NULL AND leader_pid IS NOT NULL) \
    ORDER BY backend_xid IS NULL, state_change DESC NULLS LAST LIMIT 2000";

const PREPARED: &str = "SELECT transaction::text::bigint, gid, owner::text, database::text, prepared \
    FROM pg_prepared_xacts LIMIT 2000";

/// What `pg_stat_activity` shows instead of a statement to roles that may not see it.
const HIDDEN: &str = "<insufficient privilege>";

/// What is known of the sessions; clones share it.
#[derive(Clone, Debug)]
pub struct Sessions(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    activity: Mutex<Activity>,
    sample: watch::Sender<Arc<Sample>>,
    /// Somebody wants a sample now.
    wanted: Notify,
}

impl Default for Sessions {
    fn default() -> Self {
        Self::new()
    }
}

impl Sessions {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            activity: Mutex::new(Activity::new()),
            sample: watch::Sender::new(Arc::new(Sample::default())),
            wanted: Notify::new(),
        }))
    }

    /// The newest sample, and each one that follows. Its number is 0 before the first.
    pub fn samples(&self) -> watch::Receiver<Arc<Sample>> {
        self.0.sample.subscribe()
    }

    /// Remembers a sample and tells everybody who waits for one.
    pub fn learn(&self, mut sample: Sample) {
        self.activity(|activity| activity.learn(&sample));
        self.0.sample.send_modify(|last| {
            sample.number = last.number + 1;
            *last = Arc::new(sample);
        });
    }

    /// Who did it, by what is known now.
    pub fn who(&self, question: &Question<'_>) -> Who {
        self.activity(|activity| activity.who(question))
    }

    /// Who does it: of a transaction that is open and in no sample yet, another one is taken at once. Waits for `patience`
    /// at most.
    pub async fn look_up(&self, question: &Question<'_>, patience: Duration) -> Who {
        let has_seen = || question.xid.is_none_or(|xid| self.activity(|activity| activity.has_seen(xid)));
        let mut samples = self.samples();
        let before = samples.borrow_and_update().number;
        let look = async {
            // One that is being taken may have looked before the transaction began.
            while !has_seen() && samples.borrow_and_update().number < before + 2 {
                self.0.wanted.notify_one();
                if samples.changed().await.is_err() {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(patience, look).await;
        self.who(question)
    }

    /// Returns when somebody wants a sample now.
    pub async fn wanted(&self) {
        self.0.wanted.notified().await;
    }

    fn activity<T>(&self, f: impl FnOnce(&mut Activity) -> T) -> T {
        // What a panicking holder left behind is samples, each of them whole enough.
        f(&mut self.0.activity.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A connection that takes samples, and nudges.
#[derive(Debug)]
pub struct Sampler {
    client: Client,
    endpoint: String,
    moment: Statement,
    locks: Statement,
    activity: Statement,
    prepared: Statement,
    last: Option<Timestamp>,
    sees_all: bool,
    rights_at: std::time::Instant,
    means: &'static [Means],
    /// The sessions that no longer changed are remembered by their process, so that samples share what they say of them.
    actors: HashMap<i32, Arc<Actor>>,
}

impl Sampler {
    /// Connects.
    ///
    /// # Errors
    /// If the server cannot be reached, or does not let us in.
    pub async fn connect(info: &ConnInfo) -> Result<Self, CaptureError> {
        let endpoint = info.to_string();
        let client = capture::connect_sql(info).await?;
        let sql = |error| capture::sql_error(&endpoint, error);
        // Our own commits wait for no standby: one of those may be this agent.
        let settings = "SET synchronous_commit = local; SET statement_timeout = '5s'; SET idle_session_timeout = 0";
        client.batch_execute(settings).await.map_err(sql)?;
        let version: String =
            client.query_one("SELECT current_setting('server_version_num')", &[]).await.map_err(sql)?.get(0);
        let version = ServerVersion::new(version.parse().unwrap_or_default());
        let moment = client.prepare(MOMENT).await.map_err(sql)?;
        let locks = client.prepare(LOCKS).await.map_err(sql)?;
        let activity = client.prepare(ACTIVITY).await.map_err(sql)?;
        let prepared = client.prepare(PREPARED).await.map_err(sql)?;
        let sees_all = sees_all(&client).await.map_err(sql)?;
        let rights_at = std::time::Instant::now();
        let means = Means::of(version);
        let actors = HashMap::new();
        Ok(Self { client, endpoint, moment, locks, activity, prepared, last: None, sees_all, rights_at, means, actors })
    }

    /// Takes a sample.
    ///
    /// # Errors
    /// If the server does not answer, or the connection broke. Then connect anew.
    pub async fn sample(&mut self) -> Result<Sample, CaptureError> {
        let endpoint = self.endpoint.clone();
        let answer = tokio::time::timeout(ANSWER_MAX, self.ask()).await;
        match answer {
            Ok(Ok(sample)) => Ok(sample),
            Ok(Err(error)) => Err(capture::sql_error(&endpoint, error)),
            Err(_) => Err(CaptureError::Unreachable {
                what: format!("{endpoint} did not say within {} s who is at work", ANSWER_MAX.as_secs()),
                source: None,
            }),
        }
    }

    async fn ask(&mut self) -> Result<Sample, tokio_postgres::Error> {
        if self.rights_at.elapsed() > RIGHTS_EVERY {
            self.sees_all = sees_all(&self.client).await?;
            self.rights_at = std::time::Instant::now();
        }
        let since: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&self.last];
        // They are sent in this order without waiting for answers: one round trip.
        let (moment, locks, sessions, prepared) = tokio::try_join!(
            self.client.query_one(&self.moment, &[]),
            self.client.query(&self.locks, &[]),
            self.client.query(&self.activity, &since),
            self.client.query(&self.prepared, &[]),
        )?;
        let at: Timestamp = moment.try_get(0)?;
        self.last = Some(at);
        let position = |lsn: Option<PgLsn>| lsn.map(|lsn| Lsn::new(lsn.into()));
        let mut sample = Sample {
            number: 0,
            at: Some(at.into()),
            standby: moment.try_get(1)?,
            sees_all: self.sees_all,
            inserted: position(moment.try_get(2)?),
            flushed: position(moment.try_get(3)?),
            ..Sample::default()
        };
        for row in &locks {
            let pid: i32 = row.try_get(4)?;
            match (row.try_get::<_, &str>(0)?, xid(row, 1)?, row.try_get(2)?, row.try_get(3)?) {
                ("transactionid", Some(xid), _, _) => sample.xids.push((xid, pid)),
                ("relation", _, Some(database), Some(relation)) => {
                    sample.locks.push(Lock { database: Oid(database), relation: Oid(relation), pid });
                }
                _ => {}
            }
        }
        let mut actors = HashMap::with_capacity(sessions.len());
        for row in &sessions {
            let mut session = session(row)?;
            if let Some(known) = self.actors.get(&session.pid).filter(|known| **known == session.actor) {
                session.actor = known.clone();
            }
            actors.insert(session.pid, session.actor.clone());
            sample.sessions.push(session);
        }
        self.actors = actors;
        for row in &prepared {
            let Some(xid) = xid(row, 0)? else { continue };
            let at: Timestamp = row.try_get(4)?;
            let (name, role, database) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
            sample.prepared.push(Prepared { xid, name, role, database, at: at.into() });
        }
        Ok(sample)
    }

    /// How this server would be nudged; `None` if the role may do nothing of the kind.
    pub fn means(&self) -> Option<Means> {
        self.means.first().copied()
    }

    /// Makes the server flush its WAL, by the cheapest means that the role may use. Tells which.
    ///
    /// # Errors
    /// If the server does not answer, or the connection broke.
    pub async fn nudge(&mut self) -> Result<Option<Means>, CaptureError> {
        while let Some(means) = self.means() {
            let Ok(result) = tokio::time::timeout(ANSWER_MAX, self.client.simple_query(means.sql())).await else {
                return Err(CaptureError::Unreachable {
                    what: format!("{} did not flush its WAL within {} s", self.endpoint, ANSWER_MAX.as_secs()),
                    source: None,
                });
            };
            match result.map_err(|error| capture::sql_error(&self.endpoint, error)) {
                Ok(_) => return Ok(Some(means)),
                // Not granted, or not there in this version: the next one, from now on.
                Err(CaptureError::NotPermitted(error)) => self.pass_over(means, &error),
                Err(CaptureError::Server(error)) if error.code == "42883" => self.pass_over(means, &error),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn pass_over(&mut self, means: Means, error: &capture::ServerError) {
        tracing::debug!(?means, "the server cannot be nudged like this: {error}");
        self.means = self.means.get(1..).unwrap_or_default();
    }
}

async fn sees_all(client: &Client) -> Result<bool, tokio_postgres::Error> {
    let row = client.query_one("SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')", &[]).await?;
    row.try_get(0)
}

/// A transaction id; those of the server have 32 bits here, whatever column they come from.
fn xid(row: &Row, column: usize) -> Result<Option<Xid>, tokio_postgres::Error> {
    let number: Option<i64> = row.try_get(column)?;
    Ok(number.and_then(|number| u32::try_from(number & i64::from(u32::MAX)).ok()).and_then(Xid::new))
}

fn session(row: &Row) -> Result<Session, tokio_postgres::Error> {
    let time = |column| row.try_get::<_, Option<Timestamp>>(column).map(|time| time.map(PgTime::from));
    let text = |column| row.try_get::<_, Option<String>>(column);
    let pid: i32 = row.try_get(0)?;
    let query = text(14)?;
    let is_hidden = query.as_deref() == Some(HIDDEN);
    let client = match (text(6)?, row.try_get::<_, Option<i32>>(7)?) {
        (Some(address), Some(port)) if address.contains(':') => Some(format!("[{address}]:{port}")),
        (Some(address), Some(port)) => Some(format!("{address}:{port}")),
        (None, Some(-1)) => Some("local".to_owned()),
        _ => None,
    };
    let actor = Actor {
        role: text(3)?,
        session_user: None,
        database: text(4)?,
        application: text(5)?.filter(|name| !name.is_empty()),
        client,
        pid: Some(pid),
        backend_type: text(8)?,
        backend_start: time(9)?,
        transaction_start: time(10)?,
        query: query.filter(|query| !is_hidden && !query.is_empty()),
        prepared: None,
    };
    Ok(Session {
        pid,
        xid: xid(row, 1)?,
        leader: row.try_get(2)?,
        actor: Arc::new(actor),
        query_start: time(11)?,
        state_change: time(12)?,
        is_active: row.try_get::<_, Option<bool>>(13)?.unwrap_or_default(),
        is_hidden,
    })
}
