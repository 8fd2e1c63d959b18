//! Doing what a plan says, in a database that is empty; interrupted, it goes on where it stopped.
//!
//! How far it is stands in the database itself, in the schema `walguard_rebuild`, written in the transaction that does the
//! work: so nothing is done twice. The schema goes when all is done and proved.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, TryStreamExt as _};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::RebuildError;
use super::apply::{self, Writer};
use super::follow::{Event, Follow};
use super::plan::Plan;
use super::post_data::{self, Phase, Statement};
use super::spill::Spill;
use super::sql;
use crate::capture::{ConnInfo, connect_sql, sql_error};
use crate::pg::Lsn;
use crate::progress::Progress;
use crate::repo::Repository;
use crate::repo::bases::{Manifest, PART_BYTES, PART_BYTES_MAX, SCHEMA_BYTES_MAX, Sequence, Table};
use crate::repo::changes::walk::follows;
use crate::repo::changes::{Header, Messages};

/// The settings under which values are read as they were written, and nothing but the rows themselves is done.
const SESSION: &str = "SET standard_conforming_strings = on; SET client_encoding = 'UTF8'; SET datestyle = ISO; \
     SET intervalstyle = postgres; SET extra_float_digits = 3; SET bytea_output = hex; SET xmloption = content; \
     SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
     SET row_security = off; SET check_function_bodies = off; SET synchronous_commit = off; \
     SET default_table_access_method = heap; SET enable_seqscan = off; SET jit = off; SET search_path = pg_catalog; \
     SET maintenance_work_mem = '256MB'";

/// A session of a program that was killed ends what it does, where the server's system can tell.
///
/// (Postgres: `client_connection_check_interval`, since 14.)
const ENDS_WITH_US: &str = "SET client_connection_check_interval = '1s'";

/// Held by the session that leads: one rebuild at a time works in a database. The number is of no meaning.
const LOCK: i64 = 0x7761_6c67_7561_7264;

/// A session whose program was killed holds the lock for a moment still.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
const LOCK_POLL: Duration = Duration::from_millis(100);

const PROGRESS: &str = "CREATE SCHEMA walguard_rebuild; \
     CREATE TABLE walguard_rebuild.progress (base text NOT NULL, stop pg_lsn NOT NULL, applied pg_lsn NOT NULL, \
       phase text NOT NULL, left_empty text NOT NULL); \
     CREATE TABLE walguard_rebuild.parts (relation oid, part int, PRIMARY KEY (relation, part)); \
     CREATE TABLE walguard_rebuild.indexes (name text PRIMARY KEY); \
     CREATE TABLE walguard_rebuild.not_made (number serial, what text NOT NULL);";

/// How to do it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The database into which it goes.
    pub into: ConnInfo,
    /// Connections that copy rows at once.
    pub jobs: usize,
    /// Where changes of transactions are kept that were sent before their commit, if they are many.
    pub spill: PathBuf,
    /// Extensions that the server lacks, and what needs them, may be left out.
    pub partial: bool,
    /// The notes in the database stay when all is done: whoever made the server has something to do still, and removes them
    /// then ([`FORGET`]).
    pub keep_notes: bool,
}

/// Removes the notes of a rebuild.
pub const FORGET: &str = "DROP SCHEMA IF EXISTS walguard_rebuild CASCADE";

/// What was done.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// It went on with what an earlier run had done.
    pub resumed: bool,
    /// Rows copied from the base, by this run.
    pub rows_copied: u64,
    /// Changes of rows repeated, by this run.
    pub changes: u64,
    /// Transactions repeated, by this run.
    pub transactions: u64,
    /// Roles that were made, without a password and without the right to log in.
    pub roles_made: Vec<String>,
    /// What could not be made for want of extensions, and what the server said, the first of it.
    pub not_made: Vec<String>,
    /// Foreign keys to rows that are not there, because their table was left empty.
    pub foreign_keys_left: Vec<String>,
    /// Tables whose rows were counted, and are as many as they should be.
    pub tables_verified: u64,
    /// Rows in them.
    pub rows_verified: u64,
    /// How long each phase took.
    pub seconds: BTreeMap<&'static str, f64>,
}

/// Does it.
///
/// # Errors
/// [`RebuildError`]. What was done stays, and the same call goes on with it.
pub async fn run(
    repo: &Repository,
    plan: &Plan,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Report, RebuildError> {
    let work = async {
        let mut first = Rebuild { repo, plan, options, progress, lacking: false, report: Report::new() };
        let (client, done) = first.prepare().await?;
        // Without all extensions there may not be all tables.
        let there = match first.lacking {
            true => Some(there(&client, plan).await?),
            false => None,
        };
        let mut rebuild = Rebuild { plan: there.as_ref().unwrap_or(plan), ..first };
        rebuild.run(&client, done).await?;
        Ok(rebuild.report)
    };
    cancel.run_until_cancelled(work).await.unwrap_or(Err(RebuildError::Cancelled))
}

/// Counts the rows of what an earlier run has rebuilt.
///
/// # Errors
/// [`RebuildError`]; [`RebuildError::Counts`] if they are not what they should be.
pub async fn prove(
    repo: &Repository,
    plan: &Plan,
    options: &Options,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Report, RebuildError> {
    let work = async {
        let first = Rebuild { repo, plan, options, progress, lacking: false, report: Report::new() };
        let client = first.connect().await?;
        first.lock(&client).await?;
        let there = there(&client, plan).await?;
        let mut rebuild = Rebuild { plan: &there, ..first };
        rebuild.report.resumed = true;
        rebuild.verify(&client).await?;
        Ok(rebuild.report)
    };
    cancel.run_until_cancelled(work).await.unwrap_or(Err(RebuildError::Cancelled))
}

/// The plan without the tables and sequences that could not be made.
async fn there(client: &Client, plan: &Plan) -> Result<Plan, RebuildError> {
    let mut plan = plan.clone();
    let tables = plan.base.tables.iter().map(Table::sql_name);
    let sequences = plan.base.sequences.iter().map(Sequence::sql_name);
    let names: Vec<String> = tables.chain(sequences).collect();
    let query = "SELECT n FROM unnest($1::text[]) AS n WHERE pg_catalog.to_regclass(n) IS NOT NULL";
    let found = client.query(query, &[&names]).await.map_err(|error| refused("see what was made", error))?;
    let found: BTreeSet<String> = found.iter().filter_map(|row| row.try_get(0).ok()).collect();
    plan.base.tables.retain(|table| found.contains(&table.sql_name()));
    plan.base.sequences.retain(|sequence| found.contains(&sequence.sql_name()));
    Ok(plan)
}

impl Report {
    const fn new() -> Self {
        Self {
            resumed: false,
            rows_copied: 0,
            changes: 0,
            transactions: 0,
            roles_made: Vec::new(),
            not_made: Vec::new(),
            foreign_keys_left: Vec::new(),
            tables_verified: 0,
            rows_verified: 0,
            seconds: BTreeMap::new(),
        }
    }
}

struct Rebuild<'a> {
    repo: &'a Repository,
    plan: &'a Plan,
    options: &'a Options,
    progress: &'a dyn Progress,
    /// The server lacks extensions, and somebody agreed.
    lacking: bool,
    report: Report,
}

/// Things named that could not be made: more is read by nobody.
const NOT_MADE_MAX: usize = 100;

pub(super) fn refused(doing: impl Into<String>, error: tokio_postgres::Error) -> RebuildError {
    match error.as_db_error() {
        Some(told) => {
            let detail = told.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
            RebuildError::Refused { doing: doing.into(), problem: format!("{}{detail}", told.message()) }
        }
        None => sql_error("the target", error).into(),
    }
}

impl Rebuild<'_> {
    /// Makes the schema, unless an earlier run did. Gives how far that got otherwise.
    async fn prepare(&mut self) -> Result<(Client, Option<Done>), RebuildError> {
        let client = self.connect().await?;
        self.lock(&client).await?;
        let done = self.begin(&client).await?;
        let lacking = self.lacking(&client).await?;
        self.lacking = !lacking.is_empty();
        if done.is_none() {
            if self.lacking && !self.options.partial {
                return Err(RebuildError::Extensions(lacking));
            }
            self.progress.begin("make the schema", None);
            let made = self.schema(&client).await;
            self.progress.end();
            made?;
        }
        Ok((client, done))
    }

    /// Extensions of the base that the server does not have.
    async fn lacking(&self, client: &Client) -> Result<Vec<String>, RebuildError> {
        let wanted: Vec<&str> = self.plan.base.extensions.iter().map(|(name, _)| name.as_str()).collect();
        let query = "SELECT n FROM unnest($1::text[]) AS n \
                     WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = n) ORDER BY n";
        let lacking = client.query(query, &[&wanted]).await.map_err(|error| refused("look for extensions", error))?;
        Ok(lacking.iter().filter_map(|row| row.try_get(0).ok()).collect())
    }

    async fn run(&mut self, client: &Client, done: Option<Done>) -> Result<(), RebuildError> {
        let base = &self.plan.base;
        let phase = done.as_ref().map_or("rows", |done| done.phase.as_str()).to_owned();
        let applied = done.map_or(base.consistent, |done| done.applied);
        if phase == "rows" {
            let begun = Instant::now();
            self.rows(client).await?;
            self.report.seconds.insert("rows", begun.elapsed().as_secs_f64());
            self.phase(client, "changes").await?;
        }
        if phase == "rows" || phase == "changes" {
            let begun = Instant::now();
            self.changes(client, applied).await?;
            self.report.seconds.insert("changes", begun.elapsed().as_secs_f64());
            self.sequences(client).await?;
            self.phase(client, "indexes").await?;
        }
        if phase != "proof" {
            let begun = Instant::now();
            self.progress.begin("build indexes and constraints", None);
            let built = self.post_data(client).await;
            self.progress.end();
            built?;
            self.report.seconds.insert("indexes", begun.elapsed().as_secs_f64());
        }
        let begun = Instant::now();
        self.verify(client).await?;
        self.report.seconds.insert("proof", begun.elapsed().as_secs_f64());
        let query = "SELECT what FROM walguard_rebuild.not_made ORDER BY number";
        let not_made = client.query(query, &[]).await.map_err(|error| refused("see what was not made", error))?;
        self.report.not_made = not_made.iter().filter_map(|row| row.try_get(0).ok()).collect();
        if self.options.keep_notes {
            return Ok(());
        }
        client.batch_execute(FORGET).await.map_err(|error| refused("remove the notes of the rebuild", error))
    }

    async fn connect(&self) -> Result<Client, RebuildError> {
        let client = connect_sql(&self.options.into).await?;
        client.batch_execute(SESSION).await.map_err(|error| refused("set up the session", error))?;
        let _ = client.batch_execute(ENDS_WITH_US).await; // a server of another system cannot
        Ok(client)
    }

    /// Sees to it that nobody else works in the database, also not what a killed run left behind.
    async fn lock(&self, client: &Client) -> Result<(), RebuildError> {
        let look = |error| refused("look who else works in the target", error);
        let begun = Instant::now();
        let query = "SELECT pg_catalog.pg_try_advisory_lock($1)";
        while !client.query_one(query, &[&LOCK]).await.and_then(|row| row.try_get::<_, bool>(0)).map_err(look)? {
            if begun.elapsed() > LOCK_PATIENCE {
                return Err(RebuildError::Busy { database: self.options.into.dbname().to_owned() });
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        // Who led is gone; who only copied rows may not have heard of it.
        let query = "SELECT count(pg_catalog.pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity \
                     WHERE datname = current_database() AND application_name = current_setting('application_name') \
                       AND usename = current_user AND pid <> pg_catalog.pg_backend_pid()";
        while client.query_one(query, &[]).await.and_then(|row| row.try_get::<_, i64>(0)).map_err(look)? > 0 {
            if begun.elapsed() > 2 * LOCK_PATIENCE {
                return Err(RebuildError::Busy { database: self.options.into.dbname().to_owned() });
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        Ok(())
    }

    /// How far an earlier run got; `None` if the database is empty.
    async fn begin(&mut self, client: &Client) -> Result<Option<Done>, RebuildError> {
        let base = &self.plan.base;
        let look = |error| refused("look at the target", error);
        let version = client.query_one("SELECT current_setting('server_version_num')::int4 / 10000", &[]).await;
        let target: i32 = version.and_then(|row| row.try_get(0)).map_err(look)?;
        let (target, source_major) = (u32::try_from(target).unwrap_or_default(), base.server_version.major());
        if target < source_major {
            return Err(RebuildError::Older { target, source_major });
        }
        let there = "SELECT pg_catalog.to_regclass('walguard_rebuild.progress') IS NOT NULL";
        if client.query_one(there, &[]).await.and_then(|row| row.try_get::<_, bool>(0)).map_err(look)? {
            let query = "SELECT base, stop::text, applied::text, phase, left_empty FROM walguard_rebuild.progress";
            let row = client.query_one(query, &[]).await.map_err(look)?;
            let text = |column: usize| row.try_get::<_, String>(column).map_err(look);
            let (label, stop) = (text(0)?, text(1)?);
            if label != base.label || stop.parse() != Ok(self.plan.stop) || text(4)? != self.left_empty() {
                let database = self.options.into.dbname().to_owned();
                return Err(RebuildError::Other { database, label, stop });
            }
            self.report.resumed = true;
            let applied = text(2)?.parse().unwrap_or(base.consistent);
            return Ok(Some(Done { phase: text(3)?, applied }));
        }
        let query = "SELECT n.nspname::text || '.' || c.relname::text FROM pg_catalog.pg_class c \
                     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                     WHERE c.oid >= 16384 AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') \
                       AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%' LIMIT 1";
        match client.query_opt(query, &[]).await.map_err(look)? {
            Some(row) => {
                let found = row.try_get(0).map_err(look)?;
                Err(RebuildError::NotEmpty { database: self.options.into.dbname().to_owned(), found })
            }
            None => Ok(None),
        }
    }

    /// The tables that get no rows, as a rebuild that was begun with others is told apart by.
    fn left_empty(&self) -> String {
        self.plan.left_empty.join(", ")
    }

    async fn phase(&self, client: &Client, phase: &str) -> Result<(), RebuildError> {
        let statement = format!("UPDATE walguard_rebuild.progress SET phase = '{phase}'");
        client.batch_execute(&statement).await.map_err(|error| refused("note how far it is", error))
    }

    async fn schema(&mut self, client: &Client) -> Result<(), RebuildError> {
        let base = &self.plan.base;
        let sql = self.section("pre-data").await?;
        let begin = format!(
            "BEGIN; {PROGRESS} INSERT INTO walguard_rebuild.progress VALUES ('{}', '{}', '{}', 'rows', '{}');",
            base.label.replace('\'', "''"),
            self.plan.stop,
            base.consistent,
            self.left_empty().replace('\'', "''")
        );
        let query = "SELECT r FROM unnest($1::text[]) AS r WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r)";
        let missing = client.query(query, &[&base.roles]).await.map_err(|error| refused("look for roles", error))?;
        for row in missing {
            let role: String = row.try_get(0).map_err(|error| refused("look for roles", error))?;
            let make = format!("CREATE ROLE {} NOLOGIN", sql::quoted(&role));
            client.batch_execute(&make).await.map_err(|error| refused(format!("make role {role}"), error))?;
            self.report.roles_made.push(role);
        }
        let made = match self.lacking {
            true => self.schema_in_part(client, &begin, &sql).await,
            // One simple query, so one transaction: the schema is there with the note of it, or not at all.
            false => client.batch_execute(&format!("{begin}\n{sql}\n;COMMIT;")).await,
        };
        if made.is_err() {
            let _ = client.batch_execute("ROLLBACK").await; // the error says what matters
        }
        made.map_err(|error| refused("make the schema", error))?;
        // The script leaves its own settings behind.
        client.batch_execute(SESSION).await.map_err(|error| refused("set up the session", error))
    }

    /// Makes what can be made, in one transaction, and notes what cannot.
    async fn schema_in_part(&self, client: &Client, begin: &str, sql: &str) -> Result<(), tokio_postgres::Error> {
        client.batch_execute(begin).await?;
        for statement in post_data::split(sql) {
            let made = client.batch_execute(&format!("SAVEPOINT walguard; {statement}\n; RELEASE walguard")).await;
            if let Err(error) = made {
                let what = not_made(&post_data::title(statement), error)?;
                client.batch_execute(&format!("ROLLBACK TO walguard; {what}")).await?;
            }
        }
        client.batch_execute("COMMIT").await
    }

    /// Takes what came of a statement. Without all extensions some cannot be run, and are noted.
    async fn note(
        &self,
        client: &Client,
        statement: &Statement,
        done: Result<(), tokio_postgres::Error>,
    ) -> Result<(), RebuildError> {
        let error = match done {
            Err(error) if self.lacking => error,
            done => return done.map_err(|error| refused(statement.title(), error)),
        };
        let note = not_made(&statement.title(), error).map_err(|error| refused(statement.title(), error))?;
        client.batch_execute(&note).await.map_err(|error| refused("note what was not made", error))
    }

    async fn section(&self, section: &str) -> Result<String, RebuildError> {
        let base = &self.plan.base;
        let key = self.repo.layout().base_schema(base.database, &base.label, section);
        let sql = self.repo.base_object(key.clone(), SCHEMA_BYTES_MAX).await?;
        let problem = |_| crate::repo::RepoError::Damaged { key, problem: "is not UTF-8".to_owned() };
        Ok(String::from_utf8(sql).map_err(problem)?)
    }

    async fn rows(&mut self, client: &Client) -> Result<(), RebuildError> {
        let base = &self.plan.base;
        let query = "SELECT relation, part FROM walguard_rebuild.parts";
        let done = client.query(query, &[]).await.map_err(|error| refused("see what is copied already", error))?;
        let done: BTreeSet<(u32, i32)> =
            done.iter().filter_map(|row| Some((row.try_get(0).ok()?, row.try_get(1).ok()?))).collect();
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for (place, table) in base.tables.iter().enumerate() {
            let numbers = (1..=table.parts.len())
                .filter(|number| !done.contains(&(table.oid.0, i32::try_from(*number).unwrap_or_default())));
            parts.extend(numbers.map(|number| (place, number)));
        }
        self.progress.begin("copy rows", None);
        let queue = Arc::new(Mutex::new(VecDeque::from(parts)));
        let manifest = Arc::new(base.clone());
        let (told, mut tell) = tokio::sync::mpsc::unbounded_channel::<(u64, u64)>();
        let mut workers = JoinSet::new();
        for _ in 0..self.options.jobs.max(1) {
            let client = self.connect().await?;
            let (repo, queue, manifest, told) = (self.repo.clone(), queue.clone(), manifest.clone(), told.clone());
            workers.spawn(async move {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some((place, number)) = next else { return Ok(()) };
                    let _ = told.send(copy_part(&repo, &client, &manifest, place, number).await?);
                }
            });
        }
        drop(told);
        let mut result = Ok(());
        loop {
            tokio::select! {
                Some((rows, bytes)) = tell.recv() => {
                    self.report.rows_copied += rows;
                    self.progress.advance(bytes);
                }
                done = workers.join_next() => match done {
                    None => break,
                    Some(done) => result = result.and(done.expect("copying rows does not panic")),
                },
            }
        }
        self.progress.end();
        result
    }

    async fn changes(&mut self, client: &Client, applied: Lsn) -> Result<(), RebuildError> {
        let base = &self.plan.base;
        let chain = self.repo.changes_since(base.database, base.consistent).await?;
        let mut follow = Follow::default();
        let mut spill = Spill::new(&self.options.spill);
        let mut writer = Writer::new(client, base, &mut self.report);
        let mut before = None;
        // The transaction that follows now is in the base, or was repeated before.
        let mut is_skipped = false;
        self.progress.begin("repeat changes", None);
        let mut objects = std::pin::pin!(chain.read(self.repo));
        'log: while let Some((name, read)) = objects.try_next().await? {
            let object = read?;
            // A hole behind the target is nobody's concern.
            if before.as_ref().is_some_and(|before: &Header| before.to >= self.plan.stop) {
                break;
            }
            follows(before.as_ref(), name)
                .map_err(|broken| RebuildError::Missing { from: broken.after, to: name.from })?;
            self.progress.advance(object.messages.len() as u64);
            if follow.begin(&object.header) {
                spill.forget(); // what was sent of a transaction comes again
            }
            for sent in Messages::new(&object.messages) {
                let sent = sent.map_err(|error| RebuildError::Damaged { at: name.from, problem: error.to_string() })?;
                match follow.see(sent)? {
                    Some(Event::Begin { commit }) => {
                        if commit >= self.plan.stop {
                            break 'log;
                        }
                        is_skipped = commit < applied || commit < base.consistent;
                    }
                    Some(Event::Change { by, .. }) if by.is_streamed || !is_skipped => {
                        spill.add(by.top, sent.message)?
                    }
                    Some(Event::Change { .. }) | None => {}
                    Some(Event::Abort { top, sub }) => spill.abort(top, sub),
                    Some(Event::Commit(commit)) => {
                        if commit.lsn >= self.plan.stop {
                            break 'log;
                        }
                        let part = spill.take(commit.xid);
                        if commit.lsn < applied || commit.lsn < base.consistent {
                            continue;
                        }
                        writer.begin().await?;
                        if let Some(mut part) = part {
                            apply::repeat(&mut writer, &follow, &mut part, commit).await?;
                        }
                        writer.commit(commit).await?;
                    }
                }
            }
            before = Some(object.header);
        }
        let finished = writer.finish().await;
        self.progress.end();
        finished
    }

    async fn sequences(&self, client: &Client) -> Result<(), RebuildError> {
        for sequence in &self.plan.base.sequences {
            let statement = set_sequence(sequence);
            let doing = || format!("set sequence {}.{}", sequence.schema, sequence.name);
            client.batch_execute(&statement).await.map_err(|error| refused(doing(), error))?;
        }
        Ok(())
    }

    /// Rows refer to a table that was left empty.
    fn is_for_want_of_rows(&self, error: &tokio_postgres::Error) -> bool {
        !self.plan.left_empty.is_empty() && error.code() == Some(&SqlState::FOREIGN_KEY_VIOLATION)
    }

    async fn post_data(&mut self, client: &Client) -> Result<(), RebuildError> {
        let query = "SELECT name FROM walguard_rebuild.indexes";
        let indexes = client.query(query, &[]).await.map_err(|error| refused("see which indexes help", error))?;
        let mut drops = String::new();
        for row in indexes {
            let name: String = row.try_get(0).map_err(|error| refused("see which indexes help", error))?;
            drops += &format!("DROP INDEX IF EXISTS {name};");
        }
        // No statement of ours is open then: what helped goes, and is not made again.
        let begin = format!(
            "BEGIN; {drops} DELETE FROM walguard_rebuild.indexes; \
             CREATE TABLE IF NOT EXISTS walguard_rebuild.statements (number int PRIMARY KEY); COMMIT"
        );
        client.batch_execute(&begin).await.map_err(|error| refused("begin with indexes", error))?;
        let query = "SELECT number FROM walguard_rebuild.statements";
        let done = client.query(query, &[]).await.map_err(|error| refused("see what is built already", error))?;
        let done: BTreeSet<i32> = done.iter().filter_map(|row| row.try_get(0).ok()).collect();
        let mut left = post_data::statements(&self.section("post-data").await?);
        left.retain(|statement| !i32::try_from(statement.number).is_ok_and(|number| done.contains(&number)));
        let mut take = |phase: Phase| left.extract_if(.., |statement| statement.phase == phase).collect::<Vec<_>>();
        let indexes = take(Phase::Indexes);
        let mut ordered = take(Phase::Ordered);
        let (foreign_keys, rest) = (take(Phase::ForeignKeys), take(Phase::Rest));
        ordered.extend(self.beside_each_other(indexes).await?);
        ordered.sort_by_key(|statement| statement.number);
        for statement in &ordered {
            self.progress.note(&statement.title());
            let done = execute(client, statement).await;
            self.note(client, statement, done).await?;
        }
        for statement in &self.beside_each_other(foreign_keys).await? {
            match execute(client, statement).await {
                Err(error) if self.is_for_want_of_rows(&error) => self.report.foreign_keys_left.push(statement.title()),
                made => self.note(client, statement, made).await?,
            }
        }
        for statement in &rest {
            self.progress.note(&statement.title());
            let done = execute(client, statement).await;
            self.note(client, statement, done).await?;
        }
        let end = "UPDATE walguard_rebuild.progress SET phase = 'proof'";
        client.batch_execute(end).await.map_err(|error| refused("note how far it is", error))?;
        client.batch_execute(SESSION).await.map_err(|error| refused("set up the session", error))?;
        client.batch_execute("SET enable_seqscan = on").await.map_err(|error| refused("set up the session", error))?;
        client.batch_execute("ANALYZE").await.map_err(|error| refused("analyse the tables", error))
    }

    /// Runs statements on several connections at once. Gives those that need something that is not there yet.
    async fn beside_each_other(&self, statements: Vec<Statement>) -> Result<Vec<Statement>, RebuildError> {
        let jobs = self.options.jobs.clamp(1, statements.len().max(1));
        let queue = Arc::new(Mutex::new(VecDeque::from(statements)));
        let mut workers = JoinSet::new();
        for _ in 0..jobs {
            let client = self.connect().await?;
            let (queue, lacking) = (queue.clone(), self.lacking);
            workers.spawn(async move {
                let mut too_early = Vec::new();
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(statement) = next else { return Ok(too_early) };
                    match execute(&client, &statement).await {
                        Ok(()) => {}
                        // Tried again by itself it is told, or noted.
                        Err(error) if error.code().is_some_and(|code| lacking || is_too_early(code)) => {
                            too_early.push(statement);
                        }
                        Err(error) => return Err(refused(statement.title(), error)),
                    }
                }
            });
        }
        let (mut too_early, mut result) = (Vec::new(), Ok(()));
        while let Some(done) = workers.join_next().await {
            match done.expect("building indexes does not panic") {
                Ok(statements) => too_early.extend(statements),
                Err(error) => result = result.and(Err(error)),
            }
        }
        result?;
        too_early.sort_by_key(|statement: &Statement| statement.number);
        Ok(too_early)
    }

    /// Counts every table that the plan speaks of.
    async fn verify(&mut self, client: &Client) -> Result<(), RebuildError> {
        self.progress.begin("count rows", None);
        let mut wrong = Vec::new();
        for table in &self.plan.base.tables {
            let Some(expected) = self.plan.expected.get(&table.oid) else { continue };
            let query = format!("SELECT count(*) FROM ONLY {}", table.sql_name());
            let counted = client.query_one(&query, &[]).await.and_then(|row| row.try_get::<_, i64>(0));
            let counted = counted.map_err(|error| refused(format!("count {}", table.display_name()), error))?;
            let counted = u64::try_from(counted).unwrap_or_default();
            if counted == *expected {
                self.report.tables_verified += 1;
                self.report.rows_verified += counted;
            } else {
                wrong.push(format!("{} has {counted} and should have {expected}", table.display_name()));
            }
        }
        self.progress.end();
        // What was knowingly left out need not be the same.
        if wrong.is_empty() || !self.plan.remarks.is_empty() {
            Ok(())
        } else {
            Err(RebuildError::Counts { tables: wrong })
        }
    }
}

/// Runs a statement, and notes that in the same transaction.
async fn execute(client: &Client, statement: &Statement) -> Result<(), tokio_postgres::Error> {
    let Statement { number, settings, text, .. } = statement;
    let all = format!("BEGIN; {settings}{text}\n; INSERT INTO walguard_rebuild.statements VALUES ({number}); COMMIT");
    let done = client.batch_execute(&all).await;
    if done.is_err() {
        let _ = client.batch_execute("ROLLBACK").await; // the error says what matters
    }
    done
}

/// The statement that notes that something could not be made.
///
/// # Errors
/// Gives the error back if the server is not what said it.
fn not_made(title: &str, error: tokio_postgres::Error) -> Result<String, tokio_postgres::Error> {
    let Some(told) = error.as_db_error() else { return Err(error) };
    let what = format!("{title}: {}", told.message()).replace('\'', "''");
    Ok(format!(
        "INSERT INTO walguard_rebuild.not_made (what) SELECT '{what}' \
         WHERE (SELECT count(*) FROM walguard_rebuild.not_made) < {NOT_MADE_MAX}"
    ))
}

/// What it needs is made by a later statement; or it and another one waited for each other.
fn is_too_early(code: &SqlState) -> bool {
    [
        // Rows that a foreign key refers to: tried again by itself it says the same, and then it is told.
        SqlState::FOREIGN_KEY_VIOLATION,
        SqlState::UNDEFINED_TABLE,
        SqlState::UNDEFINED_OBJECT,
        SqlState::INVALID_FOREIGN_KEY,
        SqlState::T_R_DEADLOCK_DETECTED,
    ]
    .contains(code)
}

/// What an earlier run did.
#[derive(Debug)]
struct Done {
    phase: String,
    applied: Lsn,
}

/// Copies a part of a table's rows, and notes that in the same transaction. Gives rows and bytes.
async fn copy_part(
    repo: &Repository,
    client: &Client,
    base: &Manifest,
    place: usize,
    number: usize,
) -> Result<(u64, u64), RebuildError> {
    let Some(table) = base.tables.get(place) else { return Ok((0, 0)) };
    let name = table.display_name();
    let doing = |error| refused(format!("copy rows into {name}"), error);
    let key = repo.layout().base_rows(base.database, &base.label, table.oid, number);
    let part = repo.base_object(key, PART_BYTES_MAX + PART_BYTES).await?;
    let bytes = part.len() as u64;
    client.batch_execute("BEGIN").await.map_err(doing)?;
    let columns = table.column_list();
    let columns = if columns.is_empty() { columns } else { format!(" ({columns})") };
    let statement = format!("COPY {}{columns} FROM STDIN", table.sql_name());
    let copied = async {
        let mut rows = std::pin::pin!(client.copy_in(&statement).await?);
        rows.send(bytes::Bytes::from(part)).await?;
        let rows = rows.finish().await?;
        let note = format!("INSERT INTO walguard_rebuild.parts VALUES ({}, {number}); COMMIT", table.oid);
        client.batch_execute(&note).await?;
        Ok(rows)
    };
    let rows = copied.await.map_err(doing)?;
    let expected = number.checked_sub(1).and_then(|place| table.parts.get(place)).copied().unwrap_or_default();
    if rows != expected {
        let problem = format!("part {number} has {rows} rows and should have {expected}");
        return Err(RebuildError::Refused { doing: format!("copy rows into {name}"), problem });
    }
    Ok((rows, bytes))
}

/// The state that a sequence had, or what the column that it numbers has got to since.
fn set_sequence(sequence: &Sequence) -> String {
    let name = sequence.sql_name().replace('\'', "''");
    let (value, is_called) = (sequence.last_value, sequence.is_called);
    match &sequence.owned_by {
        None => format!("SELECT pg_catalog.setval('{name}', {value}, {is_called})"),
        Some((schema, table, column)) => {
            let (extreme, better) = if sequence.is_descending { ("min", "<") } else { ("max", ">") };
            let (table, column) = (format!("{}.{}", sql::quoted(schema), sql::quoted(table)), sql::quoted(column));
            format!(
                "SELECT CASE WHEN m.value {better} {value} OR m.value = {value} THEN pg_catalog.setval('{name}', m.value, true) \
                 ELSE pg_catalog.setval('{name}', {value}, {is_called}) END \
                 FROM (SELECT pg_catalog.{extreme}({column})::int8 AS value FROM {table}) AS m"
            )
        }
    }
}
