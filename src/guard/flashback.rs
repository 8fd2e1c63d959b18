//! Rows that are gone, read through a snapshot from before they went.
//!
//! A transaction that began before a delete was committed still sees the rows, for as long as it lasts: the server removes
//! no row version that some snapshot needs. That is also its price. While a snapshot is held, vacuum leaves every row that
//! died since in place, in all tables of its database, so that busy tables grow; hence a window of minutes, and a metric of
//! the snapshot's age.
//!
//! What `TRUNCATE` and `DROP` take away is in no snapshot: their files are gone.

use std::io::Write as _;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use tokio_postgres::Client;

use crate::capture::{self, CaptureError, ConnInfo};
use crate::pg::Xid;

/// Whether and how deleted rows are saved: the `[flashback]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Save the rows that an incident deleted, where they can still be read. Needs `SELECT` on the tables.
    pub evidence: bool,
    /// Hold snapshots that are up to so old, so that rows can be read after their delete was committed. 0: none.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub window: Duration,
    /// Databases in which snapshots are held; by default the one of the connection string.
    pub databases: Vec<String>,
    /// Compressed bytes that are saved of a table at most; they are held in memory.
    pub table_bytes_max: ByteSize,
    /// The time that reading the rows of a table may take.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub table_time_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            evidence: false,
            window: Duration::ZERO,
            databases: Vec::new(),
            table_bytes_max: ByteSize::mib(16),
            table_time_max: Duration::from_secs(60),
        }
    }
}

impl Config {
    /// Whether the numbers can be.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), String> {
        let max = Duration::from_secs(24 * 3_600);
        if self.window > max || (!self.window.is_zero() && self.window < Duration::from_secs(10)) {
            return Err(format!("flashback.window = {:?} is neither 0 nor between 10 s and 24 h", self.window));
        }
        if self.table_bytes_max > ByteSize::mib(64) {
            return Err(format!("flashback.table_bytes_max = {} is more than 64 MiB", self.table_bytes_max));
        }
        if !self.window.is_zero() && !self.evidence {
            return Err("flashback.window holds snapshots for nothing without flashback.evidence = true".to_owned());
        }
        Ok(())
    }
}

/// A snapshot that is held.
#[derive(Debug)]
pub struct Snapshot {
    client: Client,
    endpoint: String,
    /// The database that it is of.
    pub database: String,
    /// Whatever was committed after this, by the server's clock, it does not see.
    pub taken_at: Timestamp,
}

/// What is to be read of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The table's schema.
    pub schema: String,
    /// The table's name.
    pub table: String,
    /// The transactions and subtransactions that deleted; if they are too few (the WAL may not tell those of
    /// subtransactions), the rows that anybody deleted, changed or locked since are read.
    pub xids: Vec<Xid>,
    /// Rows that they deleted or changed, as far as known.
    pub rows: Option<u64>,
}

/// Rows that were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// CSV with a header, as `COPY ... FROM` with `FORMAT csv, HEADER` reads it, in one zstd frame with a checksum.
    pub stored: Bytes,
    /// How many there are.
    pub rows: u64,
    /// What is wrong with them, in a sentence: that they are too many, or more than what was deleted.
    pub note: Option<String>,
}

/// A snapshot that does not answer any more is none.
const ANSWER_MAX: Duration = Duration::from_secs(10);

impl Snapshot {
    /// Takes a snapshot of a database, and holds it.
    ///
    /// # Errors
    /// If the server cannot be reached, or does not let us in.
    pub async fn take(info: &ConnInfo, database: &str) -> Result<Self, CaptureError> {
        let info = info.clone().with_dbname(database);
        let endpoint = info.to_string();
        let client = capture::connect_sql(&info).await?;
        let sql = |error| capture::sql_error(&endpoint, error);
        // It is idle by intention. Not every version has all of these.
        let patience = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN \
                        ('idle_in_transaction_session_timeout', 'transaction_timeout', 'idle_session_timeout', \
                         'statement_timeout')";
        client.batch_execute(patience).await.map_err(sql)?;
        // A policy that hides rows must be an error: half of the rows would pass for all of them.
        client.batch_execute("SET row_security = off").await.map_err(sql)?;
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.map_err(sql)?;
        // The statement's time is taken before its snapshot.
        let taken_at: Timestamp =
            client.query_one("SELECT statement_timestamp()", &[]).await.map_err(sql)?.try_get(0).map_err(sql)?;
        Ok(Self { client, endpoint, database: database.to_owned(), taken_at })
    }

    /// True if its connection broke: then it sees nothing any more.
    pub fn is_lost(&self) -> bool {
        self.client.is_closed()
    }

    /// How many transactions began since the oldest that it needs: what vacuum must leave in place.
    ///
    /// # Errors
    /// If the server does not answer.
    pub async fn xmin_age(&self) -> Result<u64, CaptureError> {
        let ask = self
            .client
            .query_one("SELECT age(backend_xmin)::bigint FROM pg_stat_activity WHERE pid = pg_backend_pid()", &[]);
        let row = tokio::time::timeout(ANSWER_MAX, ask).await.map_err(|_| self.silent(ANSWER_MAX))?;
        let age: Option<i64> =
            row.and_then(|row| row.try_get(0)).map_err(|error| capture::sql_error(&self.endpoint, error))?;
        Ok(age.and_then(|age| u64::try_from(age).ok()).unwrap_or_default())
    }

    /// Reads the rows that this snapshot sees and the transactions took away. A failure leaves the snapshot as it was.
    ///
    /// # Errors
    /// If the role may not read the table, it is not there, reading takes too long, or the connection breaks.
    pub async fn read(&self, wanted: &Wanted, config: &Config) -> Result<Rows, CaptureError> {
        let sql = |error| capture::sql_error(&self.endpoint, error);
        self.client.batch_execute("SAVEPOINT evidence").await.map_err(sql)?;
        let limit = config.table_time_max + ANSWER_MAX;
        let Ok(result) = tokio::time::timeout(limit, self.read_within(wanted, config)).await else {
            return Err(self.silent(limit)); // whatever hangs there: nothing more comes from it
        };
        self.client.batch_execute("ROLLBACK TO evidence; RELEASE evidence").await.map_err(sql)?;
        result
    }

    async fn read_within(&self, wanted: &Wanted, config: &Config) -> Result<Rows, CaptureError> {
        let sql = |error| capture::sql_error(&self.endpoint, error);
        let limits = format!(
            "SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = '2s'",
            config.table_time_max.as_millis()
        );
        self.client.batch_execute(&limits).await.map_err(sql)?;
        let name = format!("{}.{}", quoted(&wanted.schema), quoted(&wanted.table));
        // Generated columns cannot be put back. What fits is estimated, so that a server does not send for minutes what is
        // thrown away.
        let about = "SELECT (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute \
                       WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''), \
                     (pg_relation_size(c.oid) / greatest(c.reltuples, 1))::bigint \
                     FROM pg_class c WHERE c.oid = $1::text::regclass";
        let row = self.client.query_one(about, &[&name]).await.map_err(sql)?;
        let columns: Option<String> = row.try_get(0).map_err(sql)?;
        let columns = columns.unwrap_or_default();
        let width = row.try_get::<_, Option<i64>>(1).map_err(sql)?.unwrap_or(1).max(1) as u64;
        // Text compresses about four to one; beyond that the estimate is wrong and what was read is thrown away.
        let rows_max = (config.table_bytes_max.as_u64() * 8 / width).max(10_000);

        let xids: Vec<String> = wanted.xids.iter().map(|xid| format!("\"{xid}\"")).collect();
        let by_them = format!("t.xmax::text = ANY ('{{{}}}')", xids.join(","));
        let exact = self.copy(&name, &columns, &by_them, rows_max, config).await?;
        if exact.note.is_some() || wanted.rows.is_some_and(|rows| exact.rows >= rows) {
            return Ok(exact);
        }
        // Subtransactions that nobody told us of, or a row that others had locked: its mark names them all, and not us.
        let all = self.copy(&name, &columns, "t.xmax::text <> '0'", rows_max, config).await?;
        if all.rows == exact.rows {
            return Ok(exact);
        }
        let more = "rows that others changed or locked since may be among them".to_owned();
        Ok(Rows { note: Some(all.note.map_or(more.clone(), |note| format!("{note}; {more}"))), ..all })
    }

    async fn copy(
        &self,
        name: &str,
        columns: &str,
        condition: &str,
        rows_max: u64,
        config: &Config,
    ) -> Result<Rows, CaptureError> {
        let sql = |error| capture::sql_error(&self.endpoint, error);
        let copy = format!(
            "COPY (SELECT {columns} FROM ONLY {name} AS t WHERE {condition} LIMIT {}) TO STDOUT (FORMAT csv, HEADER)",
            rows_max + 1
        );
        let stream = self.client.copy_out(&copy).await.map_err(sql)?;
        let mut stream = std::pin::pin!(stream);
        let io = |source| CaptureError::Unreachable { what: "compress rows".to_owned(), source: Some(source) };
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).map_err(io)?;
        encoder.include_checksum(true).map_err(io)?;
        let bytes_max = usize::try_from(config.table_bytes_max.as_u64()).unwrap_or(usize::MAX);
        let (mut lines, mut is_quoted, mut is_full) = (0_u64, false, false);
        while let Some(chunk) = stream.try_next().await.map_err(sql)? {
            if is_full {
                continue; // the rest must be read all the same, or the connection is of no more use
            }
            for byte in &chunk {
                match byte {
                    b'"' => is_quoted = !is_quoted,
                    b'\n' if !is_quoted => lines += 1,
                    _ => {}
                }
            }
            encoder.write_all(&chunk).map_err(io)?;
            is_full = encoder.get_ref().len() > bytes_max;
        }
        let stored = Bytes::from(encoder.finish().map_err(io)?);
        let rows = lines.saturating_sub(1);
        let note = (is_full || rows > rows_max).then(|| "there are more rows than are saved".to_owned());
        Ok(Rows { stored, rows, note })
    }

    fn silent(&self, limit: Duration) -> CaptureError {
        let what = format!("{} did not answer within {} s", self.endpoint, limit.as_secs());
        CaptureError::Unreachable { what, source: None }
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_for_nothing_and_one_that_bloats_for_days_are_refused() {
        let check =
            |evidence, seconds| Config { evidence, window: Duration::from_secs(seconds), ..Config::default() }.check();
        assert!(check(true, 600).is_ok() && check(false, 0).is_ok() && check(true, 0).is_ok());
        assert!(check(false, 600).is_err() && check(true, 1).is_err() && check(true, 100_000).is_err());
    }
}
