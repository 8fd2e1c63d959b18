//! Taking a base: a snapshot at an exact place, its schema, and all rows, several tables at once.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::{BaseError, FORMAT, Locale, Manifest, PART_BYTES, Sequence, Table, dump, quoted};
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::logical::{self, Coverage};
use crate::capture::{CaptureError, ConnInfo, SlotLife, Walsender, connect_sql, sql_error};
use crate::pg::{BLOCK_SIZE, Lsn, Oid};
use crate::progress::Progress;
use crate::repo::layout;
use crate::repo::{RepoError, Repository};

/// Rows are read by ranges of pages, so that a large table keeps all connections busy: 64 MiB each.
const RANGE_PAGES: u64 = (64 << 20) / BLOCK_SIZE as u64;

/// What to take.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Its name; by default the time.
    pub label: Option<String>,
    /// Where `pg_dump` is; by default where it usually is.
    pub bin_dir: Option<PathBuf>,
    /// Connections that read rows at once.
    pub jobs: usize,
    /// Compression level.
    pub level: i32,
    /// The publications that tell changes.
    pub publications: logical::Config,
}

/// A connection that breaks is made again for about half a minute: the snapshot stays as long as the one that holds it.
const RETRY: RetryPolicy = RetryPolicy::PATIENT;

/// How rows are read.
#[derive(Clone, Debug)]
struct Reading {
    conninfo: ConnInfo,
    snapshot: String,
}

impl Reading {
    /// A connection that sees the snapshot.
    async fn connect(&self) -> Result<Client, BaseError> {
        let client = connect_sql(&self.conninfo).await?;
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{}'; SET LOCAL row_security = off; \
             SET LOCAL datestyle = ISO; SET LOCAL intervalstyle = postgres; SET LOCAL extra_float_digits = 3; \
             SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0",
            self.snapshot.replace('\'', "''")
        );
        client.batch_execute(&begin).await.map_err(|error| sql_error("the server", error))?;
        Ok(client)
    }
}

/// Pages of a table that are read by one statement.
#[derive(Clone, Debug)]
struct Range {
    /// In [`Manifest::tables`].
    table: usize,
    from: u64,
    /// `None`: to the end.
    to: Option<u64>,
}

/// What several workers fill.
#[derive(Debug, Default)]
struct Filled {
    /// Rows of each part of each table.
    parts: Vec<Vec<u64>>,
    content_bytes: u64,
    stored_bytes: u64,
}

/// The tables whose rows are copied: a partition is one, a partitioned table is none.
const TABLES: &str = "\
SELECT c.oid, n.nspname::text, c.relname::text, \
  ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum), \
  NOT CASE c.relreplident WHEN 'f' THEN true WHEN 'n' THEN false \
    WHEN 'i' THEN EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid) \
    ELSE EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid) END, \
  pg_catalog.pg_relation_size(c.oid) / current_setting('block_size')::int8, \
  pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT'), \
  ARRAY(SELECT a.atttypid FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum) \
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND c.oid >= 16384 \
  AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%' \
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass \
    AND d.objid = c.oid AND d.deptype = 'e') \
ORDER BY n.nspname, c.relname";

const SEQUENCES: &str = "\
SELECT c.oid, n.nspname::text, c.relname::text, s.seqincrement < 0, \
  tn.nspname::text, t.relname::text, a.attname::text, \
  pg_catalog.has_sequence_privilege(c.oid, 'SELECT') AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') \
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
  JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid \
  LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid \
    AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0 \
  LEFT JOIN pg_catalog.pg_class t ON t.oid = d.refobjid \
  LEFT JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace \
  LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid \
WHERE c.relkind = 'S' AND c.relpersistence = 'p' AND c.oid >= 16384 \
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.classid = 'pg_catalog.pg_class'::regclass \
    AND e.objid = c.oid AND e.deptype = 'e') \
ORDER BY n.nspname, c.relname";

/// Columns that not every major has are read by their names.
const LOCALE: &str = "\
SELECT pg_catalog.pg_encoding_to_char(d.encoding)::text, d.datcollate::text, d.datctype::text, \
  coalesce(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c'), \
  coalesce(pg_catalog.to_jsonb(d) ->> 'datlocale', pg_catalog.to_jsonb(d) ->> 'daticulocale') \
FROM pg_catalog.pg_database d WHERE d.datname = current_database()";

/// Owners of what is in the database, and whoever was granted something.
const ROLES: &str = "\
SELECT DISTINCT r.rolname::text FROM pg_catalog.pg_shdepend d \
  JOIN pg_catalog.pg_roles r ON r.oid = d.refobjid \
WHERE d.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
  AND d.refclassid = 'pg_catalog.pg_authid'::regclass AND r.rolname NOT LIKE 'pg\\_%' ORDER BY 1";

/// Takes a base of the database that `conninfo` names, and gives its manifest.
///
/// # Errors
/// [`BaseError`]; what was put so far stays, and is no base.
pub async fn take(
    repo: &Repository,
    conninfo: &ConnInfo,
    request: &Request,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Manifest, BaseError> {
    let work = try_take(repo, conninfo, request, progress);
    cancel.run_until_cancelled(work).await.unwrap_or(Err(BaseError::Cancelled))
}

async fn try_take(
    repo: &Repository,
    conninfo: &ConnInfo,
    request: &Request,
    progress: &dyn Progress,
) -> Result<Manifest, BaseError> {
    let wrong = |error| BaseError::from(sql_error("the server", error));
    let mut walsender = Walsender::connect_to_database(conninfo).await?;
    let version = walsender.server_version();
    let path = std::env::var_os("PATH");
    let program = dump::find(version.major(), request.bin_dir.as_deref(), path.as_deref())?;
    let system = walsender.identify_system().await?;
    let survey = logical::Survey::ask(&logical::connect(conninfo).await?, &request.publications).await?;
    let database = survey.database;
    if repo.last_changes(database, Lsn::MAX).await?.is_none() {
        return Err(BaseError::NoChanges { database: survey.database_name });
    }
    let label = choose_label(repo, database, request.label.as_deref()).await?;

    progress.begin("wait for open transactions", None);
    let slot = format!("walguard_base_{:016x}", fastrand::u64(..));
    let made = walsender.create_logical_slot(&slot, SlotLife::Temporary).await;
    progress.end();
    let made = made?;
    let snapshot = made.snapshot.ok_or_else(|| CaptureError::Protocol("the slot has no snapshot".to_owned()))?;
    let jobs = request.jobs.max(1);
    let reading = Reading { conninfo: conninfo.clone(), snapshot: snapshot.clone() };
    let mut workers = Vec::new();
    for _ in 0..jobs {
        workers.push(reading.connect().await?);
    }
    let Some(first) = workers.first() else { return Err(BaseError::Cancelled) };
    let time: Timestamp = first.query_one("SELECT now()", &[]).await.and_then(|row| row.try_get(0)).map_err(wrong)?;

    progress.begin("read the schema", None);
    let mut stored = 0;
    for section in ["pre-data", "post-data"] {
        let sql = dump::section(&program, conninfo, &snapshot, section).await?;
        stored +=
            repo.put_base_object(repo.layout().base_schema(database, &label, section), sql, request.level).await?;
    }
    progress.end();
    let mut left_out = Vec::new();
    let (mut tables, ranges, bytes) = tables(first, &mut left_out).await.map_err(wrong)?;
    let definitions = logical::Definitions::look(first).await?;
    // As of the snapshot, like everything else: what is published later is told from then on only.
    let told = logical::coverage(first, &request.publications).await?;
    let told: HashMap<Oid, Coverage> = told.into_iter().map(|table| (table.oid, table.coverage)).collect();
    for table in &mut tables {
        let coverage = told.get(&table.oid).copied().unwrap_or(Coverage::Nothing);
        table.unpublished = coverage == Coverage::Nothing;
        table.inserts_only |= coverage == Coverage::Inserts;
    }
    progress.begin("copy rows", Some(bytes));
    let filled = copy(repo, &label, database, (&tables, ranges), (workers, reading), (request.level, progress)).await;
    progress.end();
    let filled = filled?;
    for (table, parts) in tables.iter_mut().zip(filled.parts) {
        table.rows = parts.iter().sum();
        table.parts = parts;
    }
    let client = connect_sql(conninfo).await?;
    let sequences = sequences(&client, &mut left_out).await.map_err(wrong)?;
    let locale = client.query_one(LOCALE, &[]).await.map_err(wrong)?;
    let roles = client.query(ROLES, &[]).await.map_err(wrong)?;
    let extensions = "SELECT extname::text, extversion FROM pg_catalog.pg_extension ORDER BY 1";
    let extensions = client.query(extensions, &[]).await.map_err(wrong)?;
    let large = "SELECT count(*) FROM pg_catalog.pg_largeobject_metadata";
    let large: i64 = client.query_one(large, &[]).await.and_then(|row| row.try_get(0)).map_err(wrong)?;
    if large > 0 {
        left_out.push(format!("{large} large objects: logical replication knows nothing of them"));
    }
    drop(walsender); // the slot goes with it
    let manifest = Manifest {
        format: FORMAT,
        label,
        database,
        database_name: survey.database_name,
        locale: locale_of(&locale).map_err(wrong)?,
        server_version: version,
        timeline: system.timeline,
        consistent: made.consistent,
        time,
        ended_at: Timestamp::now(),
        tables,
        sequences,
        roles: roles.iter().filter_map(|row| row.try_get(0).ok()).collect(),
        definitions,
        extensions: extensions.iter().filter_map(|row| Some((row.try_get(0).ok()?, row.try_get(1).ok()?))).collect(),
        left_out,
        content_bytes: filled.content_bytes,
        stored_bytes: stored + filled.stored_bytes,
    };
    repo.put_base_manifest(&manifest).await?;
    Ok(manifest)
}

fn locale_of(row: &tokio_postgres::Row) -> Result<Locale, tokio_postgres::Error> {
    let (encoding, collate, ctype) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    Ok(Locale { encoding, collate, ctype, provider: row.try_get(3)?, locale: row.try_get(4)? })
}

async fn choose_label(repo: &Repository, database: Oid, wanted: Option<&str>) -> Result<String, BaseError> {
    let label = match wanted {
        Some(wanted) => {
            let problem = layout::check_name(wanted).err().map(|error| error.to_string());
            if let Some(problem) = problem {
                let hint = "choose another name with --label".to_owned();
                return Err(RepoError::Config { problem, hint }.into());
            }
            wanted.to_owned()
        }
        None => Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string(),
    };
    let there = repo.objects(repo.layout().base_folder(database, &label), None);
    match std::pin::pin!(there).try_next().await? {
        Some(_) => Err(BaseError::LabelTaken(label)),
        None => Ok(label),
    }
}

/// The tables, the ranges in which they are read, the largest first, and about how many bytes they have.
async fn tables(
    client: &Client,
    left_out: &mut Vec<String>,
) -> Result<(Vec<Table>, VecDeque<Range>, u64), tokio_postgres::Error> {
    let (mut tables, mut ranges, mut bytes) = (Vec::new(), Vec::new(), 0);
    for row in client.query(TABLES, &[]).await? {
        let table = Table {
            oid: Oid(row.try_get(0)?),
            schema: row.try_get(1)?,
            name: row.try_get(2)?,
            columns: row.try_get(3)?,
            types: row.try_get(7)?,
            inserts_only: row.try_get(4)?,
            unpublished: false,
            rows: 0,
            parts: Vec::new(),
        };
        if !row.try_get::<_, bool>(6)? {
            left_out.push(format!("the rows of {}: the role may not read them", table.display_name()));
            continue;
        }
        let pages = u64::try_from(row.try_get::<_, i64>(5)?).unwrap_or_default();
        bytes += pages * BLOCK_SIZE as u64;
        let mut from = 0;
        loop {
            let to = from + RANGE_PAGES;
            // The last one has no end: the snapshot may see rows on pages that came since.
            let is_last = to >= pages;
            ranges.push((pages, Range { table: tables.len(), from, to: (!is_last).then_some(to) }));
            if is_last {
                break;
            }
            from = to;
        }
        tables.push(table);
    }
    ranges.sort_by_key(|(pages, _)| std::cmp::Reverse(*pages));
    Ok((tables, ranges.into_iter().map(|(_, range)| range).collect(), bytes))
}

async fn copy(
    repo: &Repository,
    label: &str,
    database: Oid,
    (tables, ranges): (&[Table], VecDeque<Range>),
    (workers, reading): (Vec<Client>, Reading),
    (level, progress): (i32, &dyn Progress),
) -> Result<Filled, BaseError> {
    let ranges = Arc::new(Mutex::new(ranges));
    let filled = Arc::new(Mutex::new(Filled { parts: vec![Vec::new(); tables.len()], ..Filled::default() }));
    let shared: Arc<[Table]> = tables.into();
    let (told, mut tell) = tokio::sync::mpsc::unbounded_channel::<u64>();
    let mut running = JoinSet::new();
    for client in workers {
        let worker = Worker {
            repo: repo.clone(),
            label: label.to_owned(),
            database,
            tables: shared.clone(),
            ranges: ranges.clone(),
            filled: filled.clone(),
            reading: reading.clone(),
            level,
            told: told.clone(),
        };
        running.spawn(worker.run(client));
    }
    drop(told);
    loop {
        tokio::select! {
            Some(bytes) = tell.recv() => progress.advance(bytes),
            done = running.join_next() => match done {
                None => break,
                Some(done) => done.expect("copying rows does not panic")?,
            },
        }
    }
    let filled = std::mem::take(&mut *filled.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(filled)
}

struct Worker {
    repo: Repository,
    label: String,
    database: Oid,
    tables: Arc<[Table]>,
    ranges: Arc<Mutex<VecDeque<Range>>>,
    filled: Arc<Mutex<Filled>>,
    reading: Reading,
    level: i32,
    told: tokio::sync::mpsc::UnboundedSender<u64>,
}

impl Worker {
    async fn run(self, mut client: Client) -> Result<(), BaseError> {
        loop {
            let next = self.ranges.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(range) = next else { return Ok(()) };
            let (mut numbers, mut failures) = (Vec::new(), 0);
            while let Err(error) = self.copy(&client, &range, &mut numbers).await {
                failures += 1;
                if !error.is_transient() || RETRY.attempts_max.is_some_and(|most| failures >= most) {
                    return Err(error);
                }
                let pause = RETRY.pause(failures);
                tracing::warn!(failures, ?pause, "failed to copy rows, will try again: {}", Chain(&error));
                tokio::time::sleep(pause).await;
                match self.reading.connect().await {
                    Ok(again) => client = again,
                    Err(again) if again.is_transient() => {}
                    Err(_) => return Err(error), // the snapshot went with the connection that held it
                }
            }
        }
    }

    /// Copies a range. `numbers` are those of its parts that were put before: the snapshot gives the same rows in the same order.
    async fn copy(&self, client: &Client, range: &Range, numbers: &mut Vec<usize>) -> Result<(), BaseError> {
        let Some(table) = self.tables.get(range.table) else { return Ok(()) };
        let wrong = |error| BaseError::from(sql_error("the server", error));
        let to = range.to.map(|to| format!(" AND ctid < '({to},0)'::tid")).unwrap_or_default();
        let columns = table.column_list();
        let statement = format!(
            "COPY (SELECT {columns} FROM ONLY {} WHERE ctid >= '({},0)'::tid{to}) TO STDOUT",
            table.sql_name(),
            range.from
        );
        let mut rows = std::pin::pin!(client.copy_out(&statement).await.map_err(wrong)?);
        let (mut part, mut place) = (Vec::new(), 0);
        while let Some(piece) = rows.next().await {
            let piece = piece.map_err(wrong)?;
            let _ = self.told.send(piece.len() as u64);
            part.extend_from_slice(&piece);
            // Each piece is a row (`CopySendEndOfRow` in `commands/copyto.c`).
            if part.len() >= PART_BYTES && part.last() == Some(&b'\n') {
                self.put(range.table, table, std::mem::take(&mut part), (numbers, place)).await?;
                place += 1;
            }
        }
        if !part.is_empty() {
            self.put(range.table, table, part, (numbers, place)).await?;
        }
        Ok(())
    }

    /// Puts a part of a range, the one at `place` of its `numbers`.
    async fn put(
        &self,
        of: usize,
        table: &Table,
        part: Vec<u8>,
        (numbers, place): (&mut Vec<usize>, usize),
    ) -> Result<(), BaseError> {
        let number = match numbers.get(place) {
            Some(number) => *number,
            None => {
                let rows = part.iter().filter(|byte| **byte == b'\n').count() as u64;
                let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
                filled.content_bytes += part.len() as u64;
                let number = filled.parts.get_mut(of).map_or(0, |parts| {
                    parts.push(rows);
                    parts.len()
                });
                numbers.push(number);
                number
            }
        };
        let key = self.repo.layout().base_rows(self.database, &self.label, table.oid, number);
        let stored = self.repo.put_base_object(key, part, self.level).await?;
        self.filled.lock().unwrap_or_else(PoisonError::into_inner).stored_bytes += stored;
        Ok(())
    }
}

async fn sequences(client: &Client, left_out: &mut Vec<String>) -> Result<Vec<Sequence>, tokio_postgres::Error> {
    let mut sequences = Vec::new();
    for row in client.query(SEQUENCES, &[]).await? {
        let (schema, name): (String, String) = (row.try_get(1)?, row.try_get(2)?);
        if !row.try_get::<_, bool>(7)? {
            left_out.push(format!("the state of sequence {schema}.{name}: the role may not read it"));
            continue;
        }
        let query = format!("SELECT last_value, is_called FROM {}.{}", quoted(&schema), quoted(&name));
        let state = client.query_one(&query, &[]).await?;
        let owner: (Option<String>, Option<String>, Option<String>) =
            (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
        let owned_by = match owner {
            (Some(schema), Some(table), Some(column)) => Some((schema, table, column)),
            _ => None,
        };
        let (last_value, is_called) = (state.try_get(0)?, state.try_get(1)?);
        sequences.push(Sequence { schema, name, last_value, is_called, is_descending: row.try_get(3)?, owned_by });
    }
    Ok(sequences)
}
