//! How many rows tables have, over SQL: what the row counts that the WAL then keeps begin with.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::capture::{self, CaptureError, ConnInfo};
use crate::detect::incident::Rows;
use crate::detect::live_rows::TableKey;
use crate::pg::{Lsn, Oid};

/// Tables asked about in one database.
const TABLES_MAX: i64 = 20_000;

/// A table is counted, and not only estimated, if it has no more rows than this by the server's statistics ...
const COUNTED_ROWS_MAX: i64 = 20_000;
/// ... and no more pages (16 MiB), whatever they hold.
const COUNTED_PAGES_MAX: i32 = 2_048;

/// Counting the tables of one database takes no longer than this; the rest is estimated.
const COUNTING_MAX: Duration = Duration::from_secs(5);

/// One table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) table: TableKey,
    /// `None`: the server does not know either.
    pub(super) rows: Option<Rows>,
    /// Commits before this are in the number; none at or behind `to` is.
    pub(super) from: Lsn,
    pub(super) to: Lsn,
    /// Rows inserted and deleted in all its life.
    pub(super) inserted: u64,
    pub(super) deleted: u64,
    /// The full name of the table that it is a partition of.
    pub(super) parent: Option<String>,
}

/// The connection failed, or a query.
#[derive(Debug, thiserror::Error)]
pub(super) enum RowsError {
    #[error(transparent)]
    Connect(#[from] CaptureError),
    #[error("count rows: {0}")]
    Query(#[from] tokio_postgres::Error),
}

/// Tables with what the statistics say. No table is opened for it, so that no lock on one can hold it up.
const TABLES: &str = "\
SELECT c.oid, n.nspname, c.relname, c.relpages, c.reltuples::float8, s.n_live_tup, s.n_tup_ins, s.n_tup_del, \
  has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable, \
  (SELECT pn.nspname || '.' || p.relname FROM pg_catalog.pg_inherits i \
     JOIN pg_catalog.pg_class p ON p.oid = i.inhparent JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace \
     WHERE i.inhrelid = c.oid AND c.relispartition LIMIT 1) AS parent, \
  c.relrowsecurity \
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
  LEFT JOIN pg_catalog.pg_stat_user_tables s ON s.relid = c.oid \
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND c.oid >= 16384 AND n.nspname <> 'information_schema' \
ORDER BY c.relpages LIMIT $1";

/// The tables of all databases that the role may connect to, or of one. A database that cannot be asked is left out.
pub(super) async fn read(conninfo: &ConnInfo, only: Option<Oid>) -> Result<Vec<Counted>, RowsError> {
    let client = capture::connect_sql(conninfo).await?;
    let databases = client
        .query(
            "SELECT oid, datname FROM pg_catalog.pg_database \
             WHERE datallowconn AND has_database_privilege(oid, 'CONNECT') ORDER BY oid",
            &[],
        )
        .await?;
    drop(client);
    let mut counted = Vec::new();
    for row in databases {
        let (database, name) = (Oid(row.try_get(0)?), row.try_get::<_, String>(1)?);
        if only.is_some_and(|only| only != database) {
            continue;
        }
        match of_database(conninfo, database, &name).await {
            Ok(tables) => counted.extend(tables),
            Err(error) => tracing::warn!(database = name, "rows are not counted: {error}"),
        }
    }
    Ok(counted)
}

async fn of_database(conninfo: &ConnInfo, database: Oid, name: &str) -> Result<Vec<Counted>, RowsError> {
    let client = capture::connect_sql(&conninfo.clone().with_dbname(name)).await?;
    // A table that somebody has locked is not waited for.
    client.batch_execute("SET statement_timeout = '1s'; SET lock_timeout = '100ms'").await?;
    let from = position(&client).await?;
    let tables = client.query(TABLES, &[&TABLES_MAX]).await?;
    let to = position(&client).await?;
    let begun = Instant::now();
    let mut counted = Vec::new();
    for row in tables {
        let table = (database, Oid(row.try_get("oid")?));
        let (schema, relation): (String, String) = (row.try_get("nspname")?, row.try_get("relname")?);
        let number = |column| row.try_get::<_, Option<i64>>(column).map(|number| number.unwrap_or_default());
        let (pages, tuples): (i32, f64) = (row.try_get("relpages")?, row.try_get("reltuples")?);
        let alive = number("n_live_tup")?;
        let estimate = match alive {
            1.. => u64::try_from(alive).ok(),
            _ if tuples > 0.0 => Some(tuples as u64),
            // Nothing was ever told of it, or everything forgotten.
            _ => None,
        };
        let mut found = Counted {
            table,
            rows: estimate.map(|count| Rows { count, exact: false }),
            from,
            to,
            inserted: u64::try_from(number("n_tup_ins")?).unwrap_or_default(),
            deleted: u64::try_from(number("n_tup_del")?).unwrap_or_default(),
            parent: row.try_get::<_, Option<String>>("parent")?.map(|parent| format!("{name}.{parent}")),
        };
        // Row security would show a part only.
        let is_whole: bool = row.try_get::<_, bool>("readable")? && !row.try_get::<_, bool>("relrowsecurity")?;
        let is_small = alive <= COUNTED_ROWS_MAX && pages <= COUNTED_PAGES_MAX;
        if is_whole && is_small && begun.elapsed() < COUNTING_MAX {
            let from = position(&client).await?;
            if let Ok(count) = count(&client, &schema, &relation).await {
                let exact = count <= COUNTED_ROWS_MAX;
                let count = u64::try_from(count).unwrap_or_default();
                let to = position(&client).await?;
                found = Counted { rows: Some(Rows { count, exact }), from, to, ..found };
            }
        }
        counted.push(found);
    }
    Ok(counted)
}

/// How far the WAL is flushed: whoever committed before is seen from now on.
async fn position(client: &Client) -> Result<Lsn, tokio_postgres::Error> {
    let query = "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text";
    let text: String = client.query_one(query, &[]).await?.try_get(0)?;
    Ok(text.parse().unwrap_or(Lsn::ZERO))
}

/// The rows of a table, up to one more than are counted.
async fn count(client: &Client, schema: &str, name: &str) -> Result<i64, tokio_postgres::Error> {
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let most = COUNTED_ROWS_MAX + 1;
    let query =
        format!("SELECT count(*) FROM (SELECT 1 FROM ONLY {}.{} LIMIT {most}) AS t", quoted(schema), quoted(name));
    client.query_one(&query, &[]).await?.try_get(0)
}
