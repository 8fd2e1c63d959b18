//! The loop that holds snapshots through which deleted rows are still visible, and what saves those rows.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::capture::ConnInfo;
use crate::detect::incident::Evidence;
use crate::guard::flashback::{Config, Snapshot, Wanted};
use crate::repo::Repository;
use crate::serve::status::{Board, Trouble};

/// A snapshot that was taken because of a suspicion is held for so long at most. A transaction that stays open longer keeps
/// the rows by itself, for those who take a snapshot then.
const SUSPICION_MAX: Duration = Duration::from_secs(10 * 60);

/// A snapshot that is younger than this serves a new suspicion as well.
const FRESH: Duration = Duration::from_secs(2);

/// Snapshots at once: each is a connection of the server.
const HELD_MAX: usize = 16;

/// Tables of which rows are saved, of one incident.
const TABLES_MAX: usize = 64;

/// What holds snapshots; clones share them.
#[derive(Clone, Debug)]
pub struct Flashback(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    conninfo: ConnInfo,
    config: Config,
    repo: Repository,
    board: Board,
    held: Mutex<Vec<Held>>,
}

#[derive(Clone, Debug)]
struct Held {
    /// Whoever reads through it has it alone.
    snapshot: Arc<Mutex<Snapshot>>,
    database: String,
    /// By the server's clock.
    taken_at: Timestamp,
    /// By our clock.
    since: Timestamp,
    /// Taken because of a suspicion.
    is_extra: bool,
}

impl Held {
    fn is_younger(&self, now: Timestamp, age: Duration) -> bool {
        Duration::try_from(now.duration_since(self.since)).is_ok_and(|held| held < age)
    }
}

impl Flashback {
    /// Nothing is held yet. `conninfo` is that of a connection beside the stream.
    pub fn new(conninfo: ConnInfo, config: Config, repo: Repository, board: Board) -> Self {
        Self(Arc::new(Inner { conninfo, config, repo, board, held: Mutex::new(Vec::new()) }))
    }

    /// Renews the snapshots of the window, lets go of old ones, and tells how old they are; until `stop` is cancelled.
    ///
    /// # Errors
    /// None: what fails is told in the status and tried again.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let Inner { config, board, .. } = &*self.0;
        let pause = (config.window / 8).clamp(Duration::from_secs(1), Duration::from_secs(15));
        let mut ticks = tokio::time::interval(pause);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let Some(renewed) = stop.run_until_cancelled(self.renew()).await else { break };
            let (age, xmin_age, count) = self.ages().await;
            board.update(|s| {
                s.flashback.snapshots = count;
                s.flashback.age_seconds = age;
                s.flashback.xmin_age = xmin_age;
                s.flashback.trouble = renewed
                    .err()
                    .map(|error| Trouble::again(s.flashback.trouble.as_ref(), Timestamp::now(), error, None));
            });
        }
        Ok(())
    }

    async fn renew(&self) -> Result<(), String> {
        let Inner { conninfo, config, held, .. } = &*self.0;
        let now = Timestamp::now();
        let mut lost = Vec::new();
        for one in held.lock().await.iter() {
            // Whoever reads through it has it: then it is not lost.
            if one.snapshot.try_lock().is_ok_and(|snapshot| snapshot.is_lost()) {
                lost.push(one.taken_at);
            }
        }
        held.lock().await.retain(|one| {
            let age = if one.is_extra { SUSPICION_MAX } else { config.window };
            one.is_younger(now, age) && !lost.contains(&one.taken_at)
        });
        if config.window.is_zero() {
            return Ok(());
        }
        let databases = match config.databases.as_slice() {
            [] => vec![conninfo.dbname().to_owned()],
            named => named.to_vec(),
        };
        let mut result = Ok(());
        for database in databases {
            let is_new =
                |one: &Held| one.database == database && !one.is_extra && one.is_younger(now, config.window / 2);
            if !held.lock().await.iter().any(is_new)
                && let Err(error) = self.take(&database, false).await
            {
                result = Err(error);
            }
        }
        result
    }

    async fn take(&self, database: &str, is_extra: bool) -> Result<(), String> {
        let Inner { conninfo, held, .. } = &*self.0;
        if held.lock().await.len() >= HELD_MAX {
            return Err(format!("{HELD_MAX} snapshots are held already"));
        }
        let snapshot = Snapshot::take(conninfo, database).await.map_err(|error| Chain(&error).to_string())?;
        let (database, taken_at) = (database.to_owned(), snapshot.taken_at);
        let snapshot = Arc::new(Mutex::new(snapshot));
        held.lock().await.push(Held { snapshot, database, taken_at, since: Timestamp::now(), is_extra });
        Ok(())
    }

    /// The age of the oldest in seconds and in transactions, and how many there are.
    async fn ages(&self) -> (Option<f64>, Option<u64>, u64) {
        let held = self.0.held.lock().await.clone();
        let now = Timestamp::now();
        let age = held.iter().map(|one| now.duration_since(one.since).as_secs_f64()).reduce(f64::max);
        let mut oldest = None;
        for one in &held {
            if let Ok(snapshot) = one.snapshot.try_lock() {
                oldest = oldest.max(snapshot.xmin_age().await.ok());
            }
        }
        (age, oldest, held.len() as u64)
    }

    /// A transaction in this database is suspected and still open: holds a snapshot from before its commit, at once.
    pub async fn suspect(&self, database: &str) {
        if !self.0.config.evidence {
            return;
        }
        let now = Timestamp::now();
        let is_fresh = |one: &Held| one.database == database && one.is_younger(now, FRESH);
        if self.0.held.lock().await.iter().any(is_fresh) {
            return;
        }
        if let Err(error) = self.take(database, true).await {
            tracing::warn!(database, "failed to take a snapshot of what a suspected transaction deletes: {error}");
        }
    }

    /// Saves the rows that an incident took from these tables, as far as a snapshot from before `committed_at` (by the
    /// server's clock; `None` while it is open) still sees them. Tells what was saved; a table of which nothing could be
    /// has an entry without a key that says why.
    pub async fn save(
        &self,
        incident: &str,
        database: &str,
        tables: &[Wanted],
        committed_at: Option<Timestamp>,
    ) -> Vec<Evidence> {
        let Inner { config, repo, held, .. } = &*self.0;
        if !config.evidence || tables.is_empty() {
            return Vec::new();
        }
        let is_before = |one: &&Held| committed_at.is_none_or(|committed| one.taken_at < committed);
        let held = held.lock().await.clone();
        let fitting = held.iter().filter(|one| one.database == database).filter(is_before);
        let Some(snapshot) = fitting.max_by_key(|one| one.taken_at) else {
            let why = "no snapshot from before it is held, so its rows cannot be read any more";
            return tables.iter().take(TABLES_MAX).map(|table| unsaved(table, why.to_owned())).collect();
        };
        let (taken_at, snapshot) = (snapshot.taken_at, snapshot.snapshot.lock().await);
        let mut saved = Vec::new();
        for table in tables.iter().take(TABLES_MAX) {
            let rows = match snapshot.read(table, config).await {
                Ok(rows) => rows,
                Err(error) => {
                    saved.push(unsaved(table, Chain(&error).to_string()));
                    continue;
                }
            };
            if rows.rows == 0 {
                saved.push(unsaved(table, "no deleted row is visible any more".to_owned()));
                continue;
            }
            let bytes = rows.stored.len() as u64;
            match repo.put_evidence(incident, &table.schema, &table.table, rows.stored).await {
                Ok(key) => saved.push(Evidence {
                    key,
                    table: format!("{database}.{}.{}", table.schema, table.table),
                    rows: rows.rows,
                    bytes,
                    format: "csv with a header, zstd".to_owned(),
                    taken_at,
                    note: rows.note,
                }),
                Err(error) => saved.push(unsaved(table, Chain(&error).to_string())),
            }
        }
        saved
    }
}

fn unsaved(table: &Wanted, why: String) -> Evidence {
    Evidence {
        key: String::new(),
        table: format!("{}.{}", table.schema, table.table),
        rows: 0,
        bytes: 0,
        format: String::new(),
        taken_at: Timestamp::now(),
        note: Some(why),
    }
}
