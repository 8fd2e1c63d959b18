//! A restored server -> what is proved of it: it stands where it should, its pages, its indexes, the rows and triggers that
//! an incident took away.
//!
//! What is proved without asking the server: every frame of the base backup was compared with the BLAKE3 that was taken of
//! it when it was read from the original server, and the WAL is checked record by record by whoever replays it. So each
//! page is one whose checksum was proved when the backup was taken, or one that PostgreSQL itself wrote since.
//!
//! The server is asked over its socket as a superuser, which its private `pg_hba.conf` allows. It is in recovery and so
//! cannot be changed by any of this.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use super::error::RestoreError;
use super::plan::{RestorePlan, cancellable};
use super::run::RestoreReport;
use crate::detect::incident::{DdlFinding, TableDamage};
use crate::detect::{DdlKind, Incident};
use crate::guard::protection::{ItemKind, Protection};
use crate::pg::Oid;
use crate::progress::Progress;
pub use crate::repo::drills::{Point, Verdict};

/// Counting the rows of one table takes no longer than this; what is not counted by then is said.
const COUNT_MAX: Duration = Duration::from_secs(300);

/// Connecting to a server on the same machine takes no longer than this.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Damage that is named one by one, of each database.
const DAMAGE_SHOWN: usize = 10;

/// The longest text of a value or of an error of the server that is kept, in bytes.
const TEXT_BYTES_MAX: usize = 400;

/// What is asked of the restored database by whoever owns it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Check {
    /// What it is called; by default its SQL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The database.
    pub database: String,
    /// A query; of its last result the first column of the only row counts. It can only read.
    pub sql: String,
    /// What that column must be, as text; by default `t`, as a condition says that it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
}

/// How a restored server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Directory of its socket.
    pub socket_dir: PathBuf,
    /// Its port.
    pub port: u16,
    /// A role that can log in: that of the base backup.
    pub role: String,
}

/// What is to be proved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// Tables and B-tree indexes are checked by the `amcheck` extension, in every database that has it.
    pub amcheck: bool,
    /// Checks of whoever owns the database.
    pub checks: &'a [Check],
}

/// What a restore proved by itself.
pub fn of_restore(plan: &RestorePlan, report: &RestoreReport) -> Vec<Point> {
    let target = match &report.reached {
        Some(reached) => {
            let kept = reached.transaction.map(|kept| {
                let xid = kept.xid.map_or_else(|| "?".to_owned(), |xid| xid.to_string());
                format!("; the last transaction kept is {xid}, of {}", kept.time)
            });
            let text = format!("the server stands at {}, as planned{}", reached.lsn, kept.unwrap_or_default());
            Point::new("target", Verdict::Passed, text)
        }
        None => Point::new("target", Verdict::Unproved, "the server was not started")
            .with_hint(format!("started, it recovers to {} and waits there", plan.stop.reached)),
    };
    let extracted = &report.extracted;
    let text = format!(
        "all {} bytes of the backup, in {} files, have the BLAKE3 that was taken when they were read from the original",
        extracted.content_bytes, extracted.files
    );
    vec![target, Point::new("content", Verdict::Passed, text), page_checksums(plan)]
}

/// What is known of the pages' own checksums.
fn page_checksums(plan: &RestorePlan) -> Point {
    let (name, backup) = ("page checksums", &plan.backup);
    match (backup.page_checksums_verified, backup.bad_pages) {
        (true, 0) => {
            Point::new(name, Verdict::Passed, "every page was checked when the backup was taken, and none was wrong")
        }
        (true, bad) => {
            let text = format!("{bad} pages were wrong already when the backup was taken");
            let hint =
                "the original is damaged: `walguard list --json` says where; an older backup may be whole (--backup)";
            Point::new(name, Verdict::Failed, text).with_hint(hint)
        }
        (false, _) => {
            let text = "not proved: the cluster has none, or they were not checked when the backup was taken";
            let hint =
                "`pg_checksums --enable` adds them to a stopped cluster; `backup.verify_page_checksums` checks them";
            Point::new(name, Verdict::Unproved, text).with_hint(hint)
        }
    }
}

/// Asks a running server that was restored what can be asked of it; with an incident, whether what that took away is there.
///
/// # Errors
/// If the server cannot be asked at all, or somebody asked to stop. What is wrong with the data is no error: it is what the
/// points are about.
pub async fn of_server(
    reach: &Reach,
    incident: Option<&Incident>,
    wanted: Wanted<'_>,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Vec<Point>, RestoreError> {
    let mut asking = Asking { server: Server::find(reach).await?, points: Vec::new(), progress, cancel };
    if let Some(incident) = incident {
        asking.rows(incident).await?;
        asking.protection(incident).await?;
    }
    for check in wanted.checks {
        asking.check(check).await?;
    }
    if wanted.amcheck {
        asking.amcheck().await?;
    }
    Ok(asking.points)
}

/// Whether the restored cluster's pages carry checksums.
///
/// # Errors
/// If the server cannot be asked.
pub(super) async fn has_page_checksums(reach: &Reach) -> Result<bool, RestoreError> {
    let server = Server::find(reach).await?;
    let database = server.databases.first().map_or("template1", |(_, name)| name);
    let client = server.connect(database).await?;
    let row = client.query_one("SHOW data_checksums", &[]).await.map_err(|error| cannot_ask(&error))?;
    Ok(row.try_get::<_, String>(0).is_ok_and(|shown| shown == "on"))
}

fn cannot_ask(error: &tokio_postgres::Error) -> RestoreError {
    RestoreError::Asking { problem: told(error) }
}

/// An error of the server, in a line.
fn told(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => cut(&format!("{} ({})", error.message(), error.code().code())),
        None => cut(&error.to_string()),
    }
}

/// Text from a database, bounded and in one line.
fn cut(text: &str) -> String {
    let end = text.floor_char_boundary(TEXT_BYTES_MAX);
    let mut line: String = text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if end < text.len() {
        line.push_str(" ...");
    }
    line
}

/// `"name"`, for a statement.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The server, and whom it takes for its owner.
struct Server {
    reach: Reach,
    superuser: String,
    /// Those that can be connected to, with their OIDs. Not `template1` (its OID is always 1), which is nobody's data.
    databases: Vec<(Oid, String)>,
}

impl Server {
    async fn find(reach: &Reach) -> Result<Self, RestoreError> {
        let mut problem = String::new();
        for database in ["postgres", "template1"] {
            match connect(reach, &reach.role, database).await {
                Ok(client) => return Self::ask(reach, &client).await.map_err(|error| cannot_ask(&error)),
                Err(error) => problem = told(&error),
            }
        }
        Err(RestoreError::Asking { problem })
    }

    async fn ask(reach: &Reach, client: &Client) -> Result<Self, tokio_postgres::Error> {
        let sql = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolsuper AND rolcanlogin ORDER BY oid LIMIT 1";
        let superuser = client.query_opt(sql, &[]).await?.map(|row| row.try_get(0)).transpose()?;
        let sql = "SELECT oid, datname::text FROM pg_catalog.pg_database WHERE datallowconn AND oid <> 1 ORDER BY oid";
        let rows = client.query(sql, &[]).await?;
        let databases = rows.iter().map(|row| Ok((Oid(row.try_get(0)?), row.try_get(1)?)));
        let databases = databases.collect::<Result<_, tokio_postgres::Error>>()?;
        Ok(Self { reach: reach.clone(), superuser: superuser.unwrap_or_else(|| reach.role.clone()), databases })
    }

    async fn connect(&self, database: &str) -> Result<Client, RestoreError> {
        connect(&self.reach, &self.superuser, database).await.map_err(|error| cannot_ask(&error))
    }
}

async fn connect(reach: &Reach, user: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
    let mut config = Config::new();
    config.host_path(&reach.socket_dir).port(reach.port).user(user).dbname(database);
    config.application_name("walguard restore").connect_timeout(CONNECT_MAX);
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection); // ends with the client, or when the server goes
    // Functions and operators are PostgreSQL's own, whatever somebody made in the database. In recovery nobody gives a lock
    // back that a transaction had which is open at this place: it is not waited for.
    client.batch_execute("SET search_path = pg_catalog; SET lock_timeout = '1s'").await?;
    Ok(client)
}

struct Asking<'a> {
    server: Server,
    points: Vec<Point>,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
}

impl Asking<'_> {
    /// Compares the rows of an incident's tables with what was there before it.
    async fn rows(&mut self, incident: &Incident) -> Result<(), RestoreError> {
        self.progress.begin("count the rows of the incident's tables", None);
        let mut by_database: BTreeMap<Oid, Vec<&TableDamage>> = BTreeMap::new();
        for table in &incident.tables {
            match &table.relation {
                Some(relation) => by_database.entry(relation.database).or_default().push(table),
                None => {
                    let text = "nobody knows which table that was";
                    self.points.push(Point::new(format!("rows of {}", cut(&table.name)), Verdict::Unproved, text));
                }
            }
        }
        // What committed between the first harm and a later loss of another table may have changed that table.
        let is_one = incident.transactions.len() == 1 && incident.transactions_more == 0;
        for (database, tables) in by_database {
            let name = self.server.databases.iter().find(|(oid, _)| *oid == database).map(|(_, name)| name.clone());
            let client = match &name {
                Some(name) => Some(self.server.connect(name).await?),
                None => None,
            };
            for table in tables {
                self.progress.note(&table.name);
                let found = match &client {
                    Some(client) => cancellable(self.cancel, count(client, table)).await?,
                    None => Counted::NotThere,
                };
                self.points.push(rows_point(table, &found, is_one));
            }
        }
        if incident.tables_more > 0 {
            let text = format!("{} more tables are not in the incident, which lists a thousand", incident.tables_more);
            self.points.push(Point::new("rows", Verdict::Unproved, text));
        }
        self.progress.end();
        Ok(())
    }

    /// Looks whether triggers, rules and policies that the incident removed are there again.
    async fn protection(&mut self, incident: &Incident) -> Result<(), RestoreError> {
        let gone: Vec<_> = incident.ddl.iter().filter_map(|ddl| Some((ddl, item_of(ddl.kind)?))).collect();
        if gone.is_empty() {
            return Ok(());
        }
        let mut in_force = BTreeSet::new();
        for (_, database) in &self.server.databases {
            let client = self.server.connect(database).await?;
            let found = cancellable(self.cancel, Protection::look(&client)).await?;
            let found = found.map_err(|error| RestoreError::Asking { problem: cut(&error.to_string()) })?;
            let items = found.items.into_iter().filter(|(_, in_force)| *in_force);
            in_force.extend(items.map(|(item, _)| {
                let table = (!item.table_name.is_empty()).then(|| format!("{database}.{}", item.table_name));
                (item.kind, table.unwrap_or_default(), item.name)
            }));
        }
        let mut seen = BTreeSet::new();
        for (ddl, kind) in gone {
            let key =
                (kind, unquoted(ddl.table.as_deref().unwrap_or_default()), ddl.object.clone().unwrap_or_default());
            if seen.insert(key.clone()) {
                self.points.push(protection_point(ddl, kind, in_force.contains(&key)));
            }
        }
        Ok(())
    }

    /// Asks what whoever owns the database wants to know.
    async fn check(&mut self, check: &Check) -> Result<(), RestoreError> {
        let name = format!("check {}", cut(if check.name.is_empty() { &check.sql } else { &check.name }));
        self.progress.begin(&name, None);
        let asked = async {
            let mut config = Config::new();
            let reach = &self.server.reach;
            config.host_path(&reach.socket_dir).port(reach.port).user(&self.server.superuser).dbname(&check.database);
            config.application_name("walguard drill").connect_timeout(CONNECT_MAX);
            let (client, connection) = config.connect(NoTls).await?;
            tokio::spawn(connection); // ends with the client, or when the server goes
            client.batch_execute("SET default_transaction_read_only = on").await?;
            client.simple_query(&check.sql).await
        };
        let answer = cancellable(self.cancel, asked).await?;
        self.progress.end();
        self.points.push(check_point(name, check, answer.map_err(|error| told(&error))));
        Ok(())
    }

    /// Has every table and every B-tree index of every database checked.
    async fn amcheck(&mut self) -> Result<(), RestoreError> {
        self.progress.begin("amcheck", None);
        for (_, database) in self.server.databases.clone() {
            let client = self.server.connect(&database).await?;
            let point = cancellable(self.cancel, amcheck(&client, &database, self.progress)).await?;
            self.points.push(point.map_err(|error| cannot_ask(&error))?);
        }
        self.progress.end();
        Ok(())
    }
}

/// What became of counting.
enum Counted {
    Rows(u64),
    NotThere,
    /// A transaction that is open at this place has it for itself.
    Locked,
    Not(String),
}

async fn count(client: &Client, table: &TableDamage) -> Counted {
    let Some(relation) = &table.relation else { return Counted::NotThere };
    let counting = async {
        let sql = "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE c.oid = $1 AND c.relkind IN ('r', 'm', 't')";
        let Some(row) = client.query_opt(sql, &[&relation.oid.0]).await? else { return Ok(None) };
        let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        client.batch_execute(&format!("SET statement_timeout = {}", COUNT_MAX.as_millis())).await?;
        let sql = format!("SELECT count(*) FROM ONLY {}.{}", quoted(&schema), quoted(&name));
        client.query_one(&sql, &[]).await?.try_get::<_, i64>(0).map(Some)
    };
    match counting.await {
        Ok(Some(rows)) => Counted::Rows(u64::try_from(rows).unwrap_or_default()),
        Ok(None) => Counted::NotThere,
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Counted::Locked,
        Err(error) => Counted::Not(told(&error)),
    }
}

fn rows_point(table: &TableDamage, found: &Counted, is_one_transaction: bool) -> Point {
    let name = format!("rows of {}", cut(&table.name));
    let before = table.before;
    let expected = before.map(|rows| rows.to_string());
    let made = |verdict, told: String, rows: Option<u64>| {
        let found = rows.map(|rows| rows.to_string());
        Point { expected: expected.clone(), found, ..Point::new(name.clone(), verdict, told) }
    };
    let differs = "compare with what people remember before the application is pointed here; another moment may be meant \
                   (`walguard timeline` shows what happened when)";
    match (found, before) {
        (Counted::Rows(rows), None) => {
            made(Verdict::Unproved, format!("{rows}; how many the incident found is not known"), Some(*rows))
        }
        (Counted::Rows(rows), Some(before)) if before.count == *rows => {
            made(Verdict::Passed, format!("{rows}, as many as before the incident"), Some(*rows))
        }
        (Counted::Rows(rows), Some(before)) if !before.exact => made(
            Verdict::Unproved,
            format!("{rows}; the incident knew only an estimate, {}", before.count),
            Some(*rows),
        ),
        (Counted::Rows(rows), Some(before)) if !is_one_transaction => {
            let text = format!(
                "{rows}, and {} were there when its own first row went; others may have written in between",
                before.count
            );
            made(Verdict::Unproved, text, Some(*rows)).with_hint(differs)
        }
        (Counted::Rows(rows), Some(before)) => {
            let text = format!("{rows}, and {} were there before the incident", before.count);
            made(Verdict::Failed, text, Some(*rows)).with_hint(differs)
        }
        (Counted::NotThere, Some(before)) if before.count > 0 => {
            made(Verdict::Failed, "the table is not there".to_owned(), None).with_hint(differs)
        }
        (Counted::NotThere, _) => {
            made(Verdict::Unproved, "the table is not there, nor is it known to have had rows".to_owned(), None)
        }
        (Counted::Locked, _) => {
            let text =
                "not counted: the transaction that is undone is open at this moment, and has the table to itself";
            let hint = "promoted, the server rolls that back, and the table can be read: `pg_ctl promote`, or --action promote";
            made(Verdict::Unproved, text.to_owned(), None).with_hint(hint)
        }
        (Counted::Not(problem), _) => made(Verdict::Unproved, format!("not counted: {problem}"), None),
    }
}

/// What a change of a definition took away.
const fn item_of(kind: DdlKind) -> Option<ItemKind> {
    match kind {
        DdlKind::DropTrigger | DdlKind::DisableTrigger => Some(ItemKind::Trigger),
        DdlKind::DropEventTrigger | DdlKind::DisableEventTrigger => Some(ItemKind::EventTrigger),
        DdlKind::DropRule => Some(ItemKind::Rule),
        DdlKind::DropPolicy => Some(ItemKind::Policy),
        _ => None,
    }
}

/// A name for people, without its quotes.
fn unquoted(name: &str) -> String {
    name.replace('"', "")
}

fn protection_point(ddl: &DdlFinding, kind: ItemKind, is_there: bool) -> Point {
    let what = match kind {
        ItemKind::Trigger => "trigger",
        ItemKind::EventTrigger => "event trigger",
        ItemKind::Rule => "rule",
        ItemKind::Policy | ItemKind::RowSecurity => "policy",
    };
    let on = ddl.table.as_deref().map(|table| format!(" on {}", cut(table))).unwrap_or_default();
    let Some(object) = ddl.object.as_deref() else {
        return Point::new(format!("{what}{on}"), Verdict::Unproved, "nobody knows its name");
    };
    let name = format!("{what} {}{on}", cut(object));
    if is_there {
        return Point::new(name, Verdict::Passed, "is there again, in force");
    }
    let hint = "make it again before the application writes; it may have been off before the incident, too";
    Point::new(name, Verdict::Failed, "is missing, or not in force").with_hint(hint)
}

fn check_point(name: String, check: &Check, answer: Result<Vec<SimpleQueryMessage>, String>) -> Point {
    let expected = check.expect.clone().unwrap_or_else(|| "t".to_owned());
    let hint = "look at it with `walguard drill --keep`, or mend the check: it must give one row";
    let messages = match answer {
        Ok(messages) => messages,
        Err(problem) => {
            let text = format!("the query failed: {problem}");
            return Point { expected: Some(expected), ..Point::new(name, Verdict::Failed, text) }.with_hint(hint);
        }
    };
    // Of the last statement that gives rows.
    let mut rows: Vec<Option<String>> = Vec::new();
    for message in &messages {
        match message {
            SimpleQueryMessage::RowDescription(_) => rows.clear(),
            SimpleQueryMessage::Row(row) if rows.len() < 2 => {
                rows.push(row.try_get(0).ok().flatten().map(str::to_owned))
            }
            _ => {}
        }
    }
    let (verdict, text, found) = match rows.as_slice() {
        [Some(found)] if *found == expected => (Verdict::Passed, format!("gave {}", cut(found)), Some(cut(found))),
        [Some(found)] => {
            (Verdict::Failed, format!("gave {} instead of {}", cut(found), cut(&expected)), Some(cut(found)))
        }
        [None] => (Verdict::Failed, format!("gave NULL instead of {}", cut(&expected)), None),
        [] => (Verdict::Failed, "gave no row".to_owned(), None),
        _ => (Verdict::Failed, "gave more than one row".to_owned(), None),
    };
    let point = Point { expected: Some(cut(&expected)), found, ..Point::new(name, verdict, text) };
    if verdict == Verdict::Failed { point.with_hint(hint) } else { point }
}

/// Heaps and TOAST tables, and B-trees, as `pg_amcheck` chooses them. What is not logged cannot be read in recovery.
/// (Postgres: `compile_relation_list_one_db` in `bin/pg_amcheck/pg_amcheck.c`.)
const AMCHECKED: &str = "\
SELECT c.oid, n.nspname::text || '.' || c.relname::text, a.amname = 'btree' \
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am a ON a.oid = c.relam \
  LEFT JOIN pg_index i ON i.indexrelid = c.oid \
WHERE c.relpersistence = 'p' AND (c.relkind IN ('r', 'm', 't') AND a.amname = 'heap' \
  OR c.relkind = 'i' AND a.amname = 'btree' AND i.indisready AND i.indisvalid) ORDER BY c.oid";

async fn amcheck(client: &Client, database: &str, progress: &dyn Progress) -> Result<Point, tokio_postgres::Error> {
    let name = format!("amcheck of {}", cut(database));
    let sql = "SELECT n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'amcheck'";
    let Some(row) = client.query_opt(sql, &[]).await? else {
        let text = "not checked: the database has no extension amcheck, and a server in recovery cannot be given one";
        let hint = format!("on the original: CREATE EXTENSION amcheck in {}", cut(database));
        return Ok(Point::new(name, Verdict::Unproved, text).with_hint(hint));
    };
    let schema = quoted(&row.try_get::<_, String>(0)?);
    let (mut tables, mut indexes) = (0_u64, 0_u64);
    let (mut damage, mut not): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for row in client.query(AMCHECKED, &[]).await? {
        let (oid, relation, is_index): (u32, String, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        progress.note(&format!("{database}.{relation}"));
        let sql = if is_index {
            format!("SELECT NULL FROM {schema}.bt_index_check({oid}::oid::regclass)")
        } else {
            format!(
                "SELECT 'block ' || blkno || coalesce(', row ' || offnum, '') || ': ' || msg \
                 FROM {schema}.verify_heapam({oid}::oid::regclass, check_toast => true) LIMIT {DAMAGE_SHOWN}"
            )
        };
        match client.simple_query(&sql).await {
            Ok(messages) if !is_index => {
                tables += 1;
                let rows = messages.iter().filter_map(|message| match message {
                    SimpleQueryMessage::Row(row) => row.try_get(0).ok().flatten(),
                    _ => None,
                });
                damage.extend(rows.map(|text| format!("{}: {}", cut(&relation), cut(text))));
            }
            Ok(_) => indexes += 1,
            // What damage is has a class of its own: `XX000`, `XX001`, `XX002`; the checks themselves say so of indexes.
            Err(error) if error.code().is_some_and(|code| code.code().starts_with("XX")) => {
                damage.push(format!("{}: {}", cut(&relation), told(&error)));
            }
            Err(error) if error.is_closed() => return Err(error),
            Err(error) => not.push(format!("{}: {}", cut(&relation), told(&error))),
        }
    }
    let looked_at = format!("{tables} tables and {indexes} indexes");
    if !damage.is_empty() {
        let shown = damage.iter().take(DAMAGE_SHOWN).cloned().collect::<Vec<_>>().join("; ");
        let text = format!("of {looked_at} something is damaged: {shown}");
        let hint = "the same damage is likely in the original: run `pg_amcheck` there; an index is mended by REINDEX";
        return Ok(Point::new(name, Verdict::Failed, text).with_hint(hint));
    }
    match not.first() {
        Some(first) => {
            let text = format!("{looked_at} are sound; {} could not be checked: {first}", not.len());
            Ok(Point::new(name, Verdict::Unproved, text))
        }
        None => Ok(Point::new(name, Verdict::Passed, format!("{looked_at} are sound"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::incident::Rows;

    fn table(before: Option<(u64, bool)>) -> TableDamage {
        let before = before.map(|(count, exact)| Rows { count, exact });
        TableDamage { name: "shop.public.users".to_owned(), before, ..TableDamage::default() }
    }

    #[test]
    fn rows_count_against_the_incident_only_where_that_is_sure() {
        let verdict = |before, found, is_one| rows_point(&table(before), &found, is_one).verdict;
        assert_eq!(verdict(Some((7, true)), Counted::Rows(7), true), Verdict::Passed);
        assert_eq!(verdict(Some((7, false)), Counted::Rows(7), false), Verdict::Passed);
        assert_eq!(verdict(Some((7, true)), Counted::Rows(6), true), Verdict::Failed);
        assert_eq!(verdict(Some((7, true)), Counted::Rows(6), false), Verdict::Unproved, "others may have written");
        assert_eq!(verdict(Some((7, false)), Counted::Rows(6), true), Verdict::Unproved, "an estimate");
        assert_eq!(verdict(None, Counted::Rows(6), true), Verdict::Unproved);
        assert_eq!(verdict(Some((7, true)), Counted::NotThere, true), Verdict::Failed);
        assert_eq!(verdict(Some((0, true)), Counted::NotThere, true), Verdict::Unproved);
    }

    #[test]
    fn text_of_a_database_is_cut_and_stays_in_its_line() {
        assert_eq!(cut("a\nb\u{1b}[31m"), "a b [31m");
        let long = "ä".repeat(500);
        assert!(cut(&long).len() <= TEXT_BYTES_MAX + 4);
    }
}
