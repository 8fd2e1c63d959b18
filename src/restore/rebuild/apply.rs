//! Changes in, and the server has them: what several transactions of the source come to, as one of the target.
//!
//! Rows of a table with a key are written in sets, by `COPY` and what is compared with it (see `net`). Where only whole rows
//! are compared, and where a change needs what only the server knows, it is a statement of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

use futures_util::SinkExt as _;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::RebuildError;
use super::follow::{Change, Commit, Follow, Shape};
use super::net::{self, NetChanges, Outcome, Taken};
use super::run::{Report, refused};
use super::spill::Part;
use super::sql;
use crate::decode::pgoutput::{Message, ReplicaIdentity};
use crate::pg::{Lsn, Oid};
use crate::repo::bases::Manifest;

/// Statements that go to the server at once.
const BATCH_BYTES: usize = 256 << 10;

/// Memory for changes that wait; of a larger transaction a part is written before its end.
const WAITING_BYTES_MAX: usize = 16 << 20;

/// Transactions are repeated in one until that has so many changes: each costs some statements for each table.
const GROUP_CHANGES: u64 = 20_000;

/// Rows sent at once by a `COPY`.
const COPY_BYTES: usize = 256 << 10;

/// Repeats a transaction that has committed.
pub(super) async fn repeat(
    writer: &mut Writer<'_>,
    follow: &Follow,
    part: &mut Part,
    commit: Commit,
) -> Result<(), RebuildError> {
    let undone = part.take_undone();
    let mut messages = part.messages()?;
    while let Some(message) = messages.next()? {
        let damaged = |problem: String| RebuildError::Damaged { at: commit.lsn, problem };
        let read = Message::read(&message, commit.is_streamed).map_err(|fault| damaged(fault.to_string()))?;
        let (xid, change) = match read {
            Message::Insert { xid, relation, new } => (xid, Change::Insert { table: relation, new }),
            Message::Update { xid, relation, old, new } => (xid, Change::Update { table: relation, old, new }),
            Message::Delete { xid, relation, old } => (xid, Change::Delete { table: relation, old }),
            Message::Truncate { xid, restart_identity, relations, .. } => {
                (xid, Change::Truncate { tables: relations, restart_identity })
            }
            _ => continue,
        };
        if xid.is_none_or(|xid| !undone.contains(&xid)) {
            writer.change(follow, change, commit.lsn).await?;
        }
    }
    Ok(())
}

/// See the module.
pub(super) struct Writer<'a> {
    client: &'a Client,
    base: &'a Manifest,
    report: &'a mut Report,
    /// Tables as they were described last, and whether they are as they were in the base.
    fitting: HashMap<Oid, (Arc<Shape>, bool)>,
    /// Tables that have what their rows are found by.
    prepared: BTreeMap<Oid, Prepared>,
    indexed: BTreeSet<Oid>,
    /// Changes that wait, by table.
    waiting: BTreeMap<Oid, (Arc<Shape>, NetChanges)>,
    waiting_bytes: usize,
    /// Statements that wait, and the rows that each must touch, with their tables.
    text: String,
    wanted: Vec<(Oid, u64)>,
    is_open: bool,
    /// Changes since the target's transaction began, and the source's last commit among them.
    changes: u64,
    last: Option<Commit>,
}

/// What stands ready for a table on this connection.
#[derive(Clone, Debug)]
struct Prepared {
    /// Columns that no `UPDATE` may set: identities that are always given.
    given: BTreeSet<String>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(client: &'a Client, base: &'a Manifest, report: &'a mut Report) -> Self {
        Self {
            client,
            base,
            report,
            fitting: HashMap::new(),
            prepared: BTreeMap::new(),
            indexed: BTreeSet::new(),
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            text: String::new(),
            wanted: Vec::new(),
            is_open: false,
            changes: 0,
            last: None,
        }
    }

    /// A transaction of the source is repeated now.
    pub(super) async fn begin(&mut self) -> Result<(), RebuildError> {
        if !self.is_open {
            self.client.batch_execute("BEGIN").await.map_err(|error| refused("begin a transaction", error))?;
            self.is_open = true;
        }
        Ok(())
    }

    async fn change(&mut self, follow: &Follow, change: Change<'_>, commit: Lsn) -> Result<(), RebuildError> {
        let damaged = |problem: String| RebuildError::Damaged { at: commit, problem };
        let table = match change {
            Change::Insert { table, .. } | Change::Update { table, .. } | Change::Delete { table, .. } => table,
            Change::Truncate { tables, restart_identity } => {
                return self.truncate(follow, tables.iter().collect(), restart_identity, commit).await;
            }
            Change::Message { .. } => return Ok(()),
        };
        let shape = follow.table(table, commit)?;
        if !self.fits(shape) {
            return Ok(()); // the plan says so, and somebody agreed
        }
        self.report.changes += 1;
        self.changes += 1;
        if shape.identity == ReplicaIdentity::Full {
            return self.compared_whole(shape, change, commit).await;
        }
        if self.waiting.get(&table).is_some_and(|(known, _)| !Arc::ptr_eq(known, shape) && known != shape) {
            self.write(table, commit).await?; // its rows are found by something else from now on
            self.waiting.remove(&table);
        }
        let (_, net) = self.waiting.entry(table).or_insert_with(|| (shape.clone(), NetChanges::default()));
        let before = net.bytes();
        let taken = match change {
            Change::Insert { new, .. } => net.insert(shape, new).map(|()| Taken::Yes),
            Change::Update { old, new, .. } => net.update(shape, old, new),
            Change::Delete { old, .. } => net.delete(shape, old).map(|()| Taken::Yes),
            Change::Truncate { .. } | Change::Message { .. } => Ok(Taken::Yes),
        };
        self.waiting_bytes += net.bytes().saturating_sub(before);
        match (taken.map_err(damaged)?, change) {
            (Taken::Not, Change::Update { old, new, .. }) => {
                self.write(table, commit).await?;
                if let Some(statement) = sql::update(shape, old, new).map_err(damaged)? {
                    self.index(shape).await?;
                    self.statement(table, &statement);
                    self.send(commit).await?;
                }
            }
            _ if self.waiting_bytes >= WAITING_BYTES_MAX => self.write_all(commit).await?,
            _ => {}
        }
        Ok(())
    }

    /// A change of a table of which whole rows are compared, one statement after the other.
    async fn compared_whole(
        &mut self,
        shape: &Arc<Shape>,
        change: Change<'_>,
        commit: Lsn,
    ) -> Result<(), RebuildError> {
        let statement = match change {
            Change::Insert { new, .. } => sql::insert(shape, new).map(|(head, row)| Some(head + &row)),
            Change::Update { old, new, .. } => sql::update(shape, old, new),
            Change::Delete { old, .. } => sql::delete(shape, old).map(Some),
            Change::Truncate { .. } | Change::Message { .. } => Ok(None),
        };
        if let Some(statement) = statement.map_err(|problem| RebuildError::Damaged { at: commit, problem })? {
            self.statement(shape.oid, &statement);
        }
        if self.text.len() >= BATCH_BYTES { self.send(commit).await } else { Ok(()) }
    }

    fn statement(&mut self, table: Oid, statement: &str) {
        self.text += statement;
        self.text += ";\n";
        self.wanted.push((table, 1));
    }

    /// Whether a table is one of the base, and as it was there.
    fn fits(&mut self, shape: &Arc<Shape>) -> bool {
        if let Some((known, fits)) = self.fitting.get(&shape.oid)
            && Arc::ptr_eq(known, shape)
        {
            return *fits;
        }
        let fits = self.base.tables.iter().find(|table| table.oid == shape.oid).is_some_and(|table| shape.is(table));
        self.fitting.insert(shape.oid, (shape.clone(), fits));
        fits
    }

    /// Rows are found by an index that goes when all is done: the table's own are built at the end.
    async fn index(&mut self, shape: &Arc<Shape>) -> Result<(), RebuildError> {
        let Some(columns) = sql::key_columns(shape).filter(|_| self.indexed.insert(shape.oid)) else { return Ok(()) };
        let index = sql::quoted(&format!("walguard_rebuild_{}", shape.oid));
        let name = format!("{}.{index}", sql::quoted(&shape.schema)).replace('\'', "''");
        let statement = format!(
            "CREATE INDEX IF NOT EXISTS {index} ON {} ({columns}); \
             INSERT INTO walguard_rebuild.indexes VALUES ('{name}') ON CONFLICT DO NOTHING",
            sql::table_name(shape)
        );
        let made = self.client.batch_execute(&statement).await;
        made.map_err(|error| {
            refused(format!("make an index by which rows of {} are found", shape.display_name()), error)
        })
    }

    /// Makes what rows of a table are compared with: a temporary table of its columns. Domains are not checked there: of a row
    /// that goes only the key is known.
    async fn prepare(&mut self, shape: &Arc<Shape>) -> Result<Prepared, RebuildError> {
        if let Some(prepared) = self.prepared.get(&shape.oid) {
            return Ok(prepared.clone());
        }
        self.index(shape).await?;
        let doing = || format!("prepare to change rows of {}", shape.display_name());
        let query = "WITH RECURSIVE plain (attnum, attname, attidentity, oid, typtype, typbasetype) AS (\
               SELECT a.attnum, a.attname, a.attidentity, t.oid, t.typtype, t.typbasetype \
               FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
               WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' \
               UNION ALL SELECT p.attnum, p.attname, p.attidentity, t.oid, t.typtype, t.typbasetype \
               FROM plain p JOIN pg_catalog.pg_type t ON t.oid = p.typbasetype WHERE p.typtype = 'd') \
             SELECT attname::text, attidentity = 'a', pg_catalog.format_type(oid, -1) FROM plain WHERE typtype <> 'd' \
             ORDER BY attnum";
        let rows =
            self.client.query(query, &[&sql::table_name(shape)]).await.map_err(|error| refused(doing(), error))?;
        let (mut given, mut columns) = (BTreeSet::new(), String::new());
        for row in rows {
            let column = (|| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)))();
            let (name, is_given, kind): (String, bool, String) = column.map_err(|error| refused(doing(), error))?;
            let _ = write!(columns, ", {} {kind}", sql::quoted(&name)); // a String takes everything
            if is_given {
                given.insert(name);
            }
        }
        let make =
            format!("CREATE TEMPORARY TABLE {} (walguard_part int{columns}) ON COMMIT DELETE ROWS", beside(shape));
        self.client.batch_execute(&make).await.map_err(|error| refused(doing(), error))?;
        let prepared = Prepared { given };
        self.prepared.insert(shape.oid, prepared.clone());
        Ok(prepared)
    }

    async fn truncate(
        &mut self,
        follow: &Follow,
        tables: Vec<Oid>,
        restart_identity: bool,
        commit: Lsn,
    ) -> Result<(), RebuildError> {
        let mut names = Vec::new();
        for table in tables {
            let shape = follow.table(table, commit)?;
            if self.fits(shape) {
                names.push(format!("ONLY {}", sql::table_name(shape)));
            }
        }
        if names.is_empty() {
            return Ok(());
        }
        self.write_all(commit).await?;
        self.report.changes += 1;
        self.changes += 1;
        let restart = if restart_identity { " RESTART IDENTITY" } else { "" };
        let statement = format!("TRUNCATE {}{restart}", names.join(", "));
        self.client.batch_execute(&statement).await.map_err(|error| refused("truncate", error))
    }

    /// Writes everything that waits.
    async fn write_all(&mut self, commit: Lsn) -> Result<(), RebuildError> {
        self.send(commit).await?;
        for table in self.waiting.keys().copied().collect::<Vec<_>>() {
            self.write(table, commit).await?;
        }
        Ok(())
    }

    /// Writes what waits for a table.
    async fn write(&mut self, table: Oid, commit: Lsn) -> Result<(), RebuildError> {
        let Some((shape, net)) = self.waiting.get_mut(&table).filter(|(_, net)| !net.is_empty()) else { return Ok(()) };
        self.waiting_bytes = self.waiting_bytes.saturating_sub(net.bytes());
        let (shape, Outcome { deletes, updates, inserts }) = (shape.clone(), net.take());
        if !deletes.is_empty() || !updates.is_empty() {
            self.change_rows(&shape, (&deletes, &updates), commit).await?;
        }
        if inserts.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = shape.columns.iter().map(|column| sql::quoted(&column.name)).collect();
        let columns = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
        let copy = format!("COPY {}{columns} FROM STDIN", sql::table_name(&shape));
        let lines = inserts.iter().map(|row| (None, row.iter().map(net::text_of).collect()));
        let rows = self.copy(&copy, lines, commit).await?;
        check(&shape, inserts.len(), rows, commit)
    }

    /// Deletes and updates of a table, each kind as one statement.
    async fn change_rows(
        &mut self,
        shape: &Arc<Shape>,
        (deletes, updates): (&[net::Key], &BTreeMap<Vec<bool>, Vec<net::Row>>),
        commit: Lsn,
    ) -> Result<(), RebuildError> {
        let Prepared { given } = self.prepare(shape).await?;
        let beside = beside(shape);
        let columns: Vec<_> = shape.columns.iter().map(|column| sql::quoted(&column.name)).collect();
        let is_key: Vec<bool> = shape.columns.iter().map(|column| column.is_key).collect();
        let copy = format!("COPY {beside} (walguard_part, {}) FROM STDIN", columns.join(", "));
        let gone = deletes.iter().map(|key| {
            let mut key = key.iter();
            let cells = is_key.iter().map(|is_key| if *is_key { key.next().map(|text| &**text) } else { None });
            (Some(0), cells.collect())
        });
        let changed = updates.values().enumerate().flat_map(|(place, rows)| {
            rows.iter().map(move |row| (Some(place + 1), row.iter().map(net::text_of).collect()))
        });
        self.copy(&copy, gone.chain(changed), commit).await?;

        let found: Vec<_> = columns.iter().zip(&is_key).filter(|(_, is_key)| **is_key).collect();
        let found = found.iter().map(|(name, _)| format!("t.{name} = w.{name}")).collect::<Vec<_>>().join(" AND ");
        let table = sql::table_name(shape);
        let (mut text, mut wanted) = (String::new(), Vec::new());
        if !deletes.is_empty() {
            text +=
                &format!("DELETE FROM ONLY {table} AS t USING {beside} AS w WHERE w.walguard_part = 0 AND {found};\n");
            wanted.push(deletes.len());
        }
        for (place, (told, rows)) in updates.iter().enumerate() {
            let set = shape.columns.iter().zip(&columns).zip(told).filter_map(|((column, name), is_told)| {
                let is_set = *is_told && !column.is_key && !given.contains(&column.name);
                is_set.then(|| format!("{name} = w.{name}"))
            });
            let set: Vec<_> = set.collect();
            if !set.is_empty() {
                let part = place + 1;
                text += &format!(
                    "UPDATE ONLY {table} AS t SET {} FROM {beside} AS w WHERE w.walguard_part = {part} AND {found};\n",
                    set.join(", ")
                );
                wanted.push(rows.len());
            }
        }
        // The target's transaction may have more to come.
        text += &format!("TRUNCATE {beside}");
        let doing = || format!("change rows of {}, up to the commit at {commit}", shape.display_name());
        let answers = self.client.simple_query(&text).await.map_err(|error| refused(doing(), error))?;
        for (wanted, touched) in wanted.into_iter().zip(touched(&answers)) {
            check(shape, wanted, touched, commit)?;
        }
        Ok(())
    }

    /// Sends rows; gives how many the server has taken.
    async fn copy<'r>(
        &self,
        statement: &str,
        rows: impl Iterator<Item = (Option<usize>, Vec<Option<&'r str>>)>,
        commit: Lsn,
    ) -> Result<u64, RebuildError> {
        let copied = async {
            let mut sink = std::pin::pin!(self.client.copy_in(statement).await?);
            let mut lines = String::new();
            for (part, cells) in rows {
                if let Some(part) = part {
                    let _ = write!(lines, "{part}\t"); // a String takes everything
                }
                net::copy_line(&mut lines, cells.into_iter());
                if lines.len() >= COPY_BYTES {
                    sink.send(bytes::Bytes::from(std::mem::take(&mut lines))).await?;
                }
            }
            sink.send(bytes::Bytes::from(lines)).await?;
            sink.finish().await
        };
        copied.await.map_err(|error| refused(format!("write rows, up to the commit at {commit}"), error))
    }

    /// Sends the statements that wait, and looks whether each touched the rows that it should.
    async fn send(&mut self, commit: Lsn) -> Result<(), RebuildError> {
        if self.text.is_empty() {
            return Ok(());
        }
        let (text, wanted) = (std::mem::take(&mut self.text), std::mem::take(&mut self.wanted));
        let doing = || format!("repeat the transaction that committed at {commit}");
        let answers = self.client.simple_query(&text).await.map_err(|error| refused(doing(), error))?;
        let touched = touched(&answers);
        for (place, (table, wanted)) in wanted.iter().enumerate() {
            let rows = touched.get(place).copied().unwrap_or_default();
            if rows != *wanted {
                let table = self.fitting.get(table).map_or_else(String::new, |(shape, _)| shape.display_name());
                return Err(RebuildError::Rows { table, wanted: *wanted, rows, commit });
            }
        }
        Ok(())
    }

    /// A transaction of the source was repeated.
    pub(super) async fn commit(&mut self, commit: Commit) -> Result<(), RebuildError> {
        self.report.transactions += 1;
        self.last = Some(commit);
        if self.changes >= GROUP_CHANGES { self.end_group().await } else { Ok(()) }
    }

    async fn end_group(&mut self) -> Result<(), RebuildError> {
        let Some(commit) = self.last.take() else { return Ok(()) };
        self.write_all(commit.lsn).await?;
        let statement = format!("UPDATE walguard_rebuild.progress SET applied = '{}'; COMMIT", commit.end);
        self.client.batch_execute(&statement).await.map_err(|error| refused("commit", error))?;
        (self.is_open, self.changes) = (false, 0);
        Ok(())
    }

    /// Nothing more comes.
    pub(super) async fn finish(mut self) -> Result<(), RebuildError> {
        self.end_group().await
    }
}

/// The temporary table that stands beside a table.
fn beside(shape: &Shape) -> String {
    format!("pg_temp.walguard_{}", shape.oid)
}

/// Rows that each statement touched.
fn touched(answers: &[SimpleQueryMessage]) -> Vec<u64> {
    let rows = answers.iter().filter_map(|answer| match answer {
        SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
        _ => None,
    });
    rows.collect()
}

fn check(shape: &Shape, wanted: usize, rows: u64, commit: Lsn) -> Result<(), RebuildError> {
    let wanted = wanted as u64;
    if rows == wanted {
        return Ok(());
    }
    Err(RebuildError::Rows { table: shape.display_name(), wanted, rows, commit })
}
