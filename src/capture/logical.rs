//! What logical replication needs on the server: publications that name the tables, and a slot.
//!
//! Two publications, because a table without a replica identity cannot be in one that publishes updates and deletes: the
//! server would then refuse every `UPDATE` and `DELETE` of the application. Such tables are in the second one, which
//! publishes inserts and truncates only.
//!
//! (Postgres: `CheckCmdReplicaIdentity` in `executor/execReplication.c`.)

mod definitions;

use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::connection::sql_error;
use super::probe::Finding;
use super::{CaptureError, ConnInfo, Walsender, connect_sql};
use crate::pg::{Lsn, Oid};

pub use definitions::{Definitions, TableDefinition, rows_depend_on};

/// Tables that are looked at; of more the rest is not published by us.
const TABLES_MAX: i64 = 100_000;

/// The longest name (Postgres: `NAMEDATALEN` less one).
const NAME_BYTES_MAX: usize = 63;

/// Tables named in a finding.
const TABLES_NAMED_MAX: usize = 10;

/// A table that somebody has locked is tried again later.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '2s'; SET statement_timeout = '30s'";

/// How changes are read: the `[logical]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The publication that names the tables. What it says of tables without a replica identity stands in another one,
    /// with this name and `_inserts` behind it.
    pub publication: String,
    /// Make the publications, and keep all tables of the role in them. If not, they are taken as they are.
    pub manage: bool,
    /// Have the slot handed on to standbys, where the server can (from 17 on, with `sync_replication_slots` on the standby):
    /// after a failover changes go on where they were.
    pub failover: bool,
    /// Further databases of the server whose changes are read, besides the one that the connection string names.
    pub databases: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { publication: "walguard".to_owned(), manage: true, failover: true, databases: Vec::new() }
    }
}

impl Config {
    /// Checks what serde does not.
    ///
    /// # Errors
    /// What is wrong, with the setting's name.
    pub fn check(&self) -> Result<(), String> {
        let is_name = |text: &str, longest: usize| (1..=longest).contains(&text.len()) && !text.contains('\0');
        if !is_name(&self.publication, 50) {
            return Err(format!("logical.publication = {:?} is no name of 1 to 50 bytes", self.publication));
        }
        for (place, name) in self.databases.iter().enumerate() {
            if !is_name(name, NAME_BYTES_MAX) {
                return Err(format!("logical.databases: {name:?} is no name of 1 to {NAME_BYTES_MAX} bytes"));
            }
            if self.databases.iter().take(place).any(|other| other == name) {
                return Err(format!("logical.databases names {name:?} twice"));
            }
        }
        Ok(())
    }

    /// The publication of tables without a replica identity.
    pub fn inserts(&self) -> String {
        format!("{}_inserts", self.publication)
    }
}

/// The slot of a further database of the same server: a slot is one database's.
pub fn slot_of(slot: &str, database: Oid) -> String {
    let own = format!("_{database}");
    let cut = slot.len().min(NAME_BYTES_MAX - own.len()); // a slot's name is ASCII
    format!("{}{own}", slot.get(..cut).unwrap_or(slot))
}

/// A table that can be published: not a partition, which goes with its root.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Table {
    /// Its OID.
    pub oid: Oid,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// It is partitioned.
    pub is_partitioned: bool,
    /// The server can say which row is updated or deleted; of a partitioned table: in each partition.
    pub has_identity: bool,
    /// The role may publish it.
    pub is_owned: bool,
    /// The publications that name it, or all tables, of those that we read.
    pub publications: Vec<String>,
}

impl Table {
    /// `"schema"."name"`.
    pub fn sql_name(&self) -> String {
        format!("{}.{}", quoted(&self.schema), quoted(&self.name))
    }

    /// `schema.name`, for people.
    pub fn display_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// What is published, and what could be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Survey {
    /// The database's OID.
    pub database: Oid,
    /// Its name.
    pub database_name: String,
    /// Those of our publications that there are.
    pub publications: Vec<String>,
    /// The publication names all tables, also those to come.
    pub is_for_all: bool,
    /// All tables, in the order of their names.
    pub tables: Vec<Table>,
}

/// A logical slot, as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Its output plugin; `None` of a physical slot.
    pub plugin: Option<String>,
    /// Its database.
    pub database: Option<String>,
    /// What it was told to be safe elsewhere: nothing before this is sent again.
    pub confirmed: Option<Lsn>,
    /// It was invalidated: the server no longer holds its WAL.
    pub is_lost: bool,
    /// It is handed on to standbys; never before 17.
    pub failover: bool,
}

/// How much the publications tell of a table's changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coverage {
    /// Nothing, or not of all rows or columns.
    Nothing,
    /// Inserts and truncates.
    Inserts,
    /// Everything.
    All,
}

/// How much is told of one table that has rows of its own: a partition is one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableCoverage {
    /// Its OID.
    pub oid: Oid,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// How much.
    pub coverage: Coverage,
}

/// Tables of which less is told from here on, written into the WAL so that it comes back in its place among the changes.
/// Whoever can run SQL can write such a message, too: then a rebuild says that it is not whole, and that is all.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CoverageTold {
    /// The version of this: 1.
    pub v: u32,
    /// The tables.
    pub tables: Vec<TableCoverage>,
}

/// Messages with this prefix hold a [`CoverageTold`] as JSON.
pub const COVERAGE_PREFIX: &[u8] = b"walguard.coverage";

/// Tables of one message.
const COVERAGE_TOLD_MAX: usize = 100;

impl TableCoverage {
    /// `schema.name`, for people.
    pub fn display_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// The statements that write down that less is told of these tables.
pub fn tell_coverage(tables: &[TableCoverage]) -> Vec<String> {
    let tell = |tables: &[TableCoverage]| {
        let told = CoverageTold { v: 1, tables: tables.to_vec() };
        let content = serde_json::to_string(&told).expect("names become JSON").replace('\'', "''");
        let prefix = String::from_utf8_lossy(COVERAGE_PREFIX);
        // As a literal that means the same whatever `standard_conforming_strings` is.
        let content = content.replace('\\', "\\\\");
        format!("SELECT pg_catalog.pg_logical_emit_message(true, '{prefix}', E'{content}')")
    };
    tables.chunks(COVERAGE_TOLD_MAX).map(tell).collect()
}

/// `server_version_num`: 150007 is 15.7.
async fn server_version(client: &Client) -> Result<i32, CaptureError> {
    let query = "SELECT current_setting('server_version_num')::int4";
    let version = client.query_one(query, &[]).await.and_then(|row| row.try_get(0));
    version.map_err(|error| sql_error("the server", error))
}

/// How much the publications tell of each table, as of the client's snapshot. A row filter or a list of columns tells not all
/// of a table, and so nothing that could be relied on.
///
/// # Errors
/// If the connection breaks, or the role may not look.
pub async fn coverage(client: &Client, config: &Config) -> Result<Vec<TableCoverage>, CaptureError> {
    let wrong = |error| sql_error("the server", error);
    // Before 15 a publication names tables, whole ones, or all.
    let (whole, schemas) = match server_version(client).await? {
        ..150_000 => ("", ""),
        _ => (
            " AND r.prqual IS NULL AND r.prattrs IS NULL",
            " OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace s JOIN pg_catalog.pg_class n ON n.relnamespace = s.pnnspid \
               WHERE s.pnpubid = p.oid AND (n.oid = t.oid OR n.oid IN (SELECT relid FROM pg_catalog.pg_partition_ancestors(t.oid))))",
        ),
    };
    let query = format!(
        "SELECT t.oid, n.nspname::text, t.relname::text, coalesce((\
           SELECT max(CASE WHEN p.pubinsert AND p.pubtruncate AND p.pubupdate AND p.pubdelete THEN 2 \
             WHEN p.pubinsert AND p.pubtruncate THEN 1 ELSE 0 END) \
           FROM pg_catalog.pg_publication p WHERE p.pubname = ANY ($1) AND (p.puballtables \
             OR EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = p.oid{whole} \
               AND (r.prrelid = t.oid OR r.prrelid IN (SELECT relid FROM pg_catalog.pg_partition_ancestors(t.oid)))){schemas})), 0) \
         FROM pg_catalog.pg_class t JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace \
         WHERE t.relkind = 'r' AND t.relpersistence = 'p' AND t.oid >= 16384 \
           AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%' ORDER BY t.oid LIMIT $2"
    );
    let ours = [config.publication.clone(), config.inserts()];
    let rows = client.query(&query, &[&ours.as_slice(), &TABLES_MAX]).await.map_err(wrong)?;
    let read = |row: tokio_postgres::Row| {
        let coverage = match row.try_get::<_, i32>(3)? {
            2 => Coverage::All,
            1 => Coverage::Inserts,
            _ => Coverage::Nothing,
        };
        Ok(TableCoverage { oid: Oid(row.try_get(0)?), schema: row.try_get(1)?, name: row.try_get(2)?, coverage })
    };
    rows.into_iter().map(read).collect::<Result<_, _>>().map_err(wrong)
}

/// No function here opens a table: it would wait for whoever has locked one, for as long as that takes.
/// `{schemas}` is what a publication of whole schemas adds, since 15.
const SURVEY: &str = "\
WITH tables AS (
  SELECT c.oid, n.nspname, c.relname, c.relkind, c.relispartition, c.relowner, c.relnamespace,
    CASE c.relreplident WHEN 'f' THEN true WHEN 'n' THEN false
      WHEN 'i' THEN EXISTS (SELECT FROM pg_catalog.pg_index i
        WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid)
      ELSE EXISTS (SELECT FROM pg_catalog.pg_index i
        WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid) END AS has_identity
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND c.oid >= 16384
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%')
SELECT t.oid, t.nspname::text, t.relname::text, t.relkind = 'p',
  CASE WHEN t.relkind = 'p' THEN (
      WITH RECURSIVE tree (oid) AS (SELECT t.oid
        UNION ALL SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
      SELECT coalesce(bool_and(leaf.has_identity), t.has_identity)
      FROM tree JOIN tables leaf ON leaf.oid = tree.oid AND leaf.relkind = 'r')
    ELSE t.has_identity END,
  pg_catalog.pg_has_role(t.relowner, 'USAGE'),
  ARRAY(SELECT p.pubname::text FROM pg_catalog.pg_publication p
    WHERE p.pubname = ANY ($1) AND (p.puballtables {schemas}
      OR EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = t.oid))
    ORDER BY p.pubname)
FROM tables t WHERE NOT t.relispartition ORDER BY t.nspname, t.relname LIMIT $2";

impl Survey {
    /// Asks the server.
    ///
    /// # Errors
    /// If the connection breaks, or the role may not look.
    pub async fn ask(client: &Client, config: &Config) -> Result<Self, CaptureError> {
        let wrong = |error| sql_error("the server", error);
        let ours = [config.publication.clone(), config.inserts()];
        let query = "SELECT oid, datname::text FROM pg_catalog.pg_database WHERE datname = current_database()";
        let database = client.query_one(query, &[]).await.map_err(wrong)?;
        let query =
            "SELECT pubname::text, puballtables FROM pg_catalog.pg_publication WHERE pubname = ANY ($1) ORDER BY 1";
        let publications = client.query(query, &[&ours.as_slice()]).await.map_err(wrong)?;
        let schemas = match server_version(client).await? {
            ..150_000 => "",
            _ => {
                "OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = t.relnamespace)"
            }
        };
        let query = SURVEY.replace("{schemas}", schemas);
        let rows = client.query(&query, &[&ours.as_slice(), &TABLES_MAX]).await.map_err(wrong)?;
        let table = |row: tokio_postgres::Row| {
            Ok(Table {
                oid: Oid(row.try_get(0)?),
                schema: row.try_get(1)?,
                name: row.try_get(2)?,
                is_partitioned: row.try_get(3)?,
                has_identity: row.try_get(4)?,
                is_owned: row.try_get(5)?,
                publications: row.try_get(6)?,
            })
        };
        Ok(Self {
            database: Oid(database.try_get(0).map_err(wrong)?),
            database_name: database.try_get(1).map_err(wrong)?,
            is_for_all: publications.iter().any(|row| row.try_get(1).unwrap_or(false)),
            publications: publications.iter().filter_map(|row| row.try_get(0).ok()).collect(),
            tables: rows.into_iter().map(table).collect::<Result<_, _>>().map_err(wrong)?,
        })
    }

    /// The statements that make the publications name what they should: every table of the role, each in the publication
    /// that its replica identity allows. None if they do. What belongs to one table is one statement to the server, and so
    /// one transaction: in between nothing of it would be told.
    pub fn statements(&self, config: &Config) -> Vec<String> {
        let (whole, inserts) = (config.publication.clone(), config.inserts());
        let mut statements = Vec::new();
        if !self.publications.contains(&whole) {
            statements.push(format!("CREATE PUBLICATION {}", quoted(&whole)));
        }
        if !self.publications.contains(&inserts) {
            statements.push(format!("CREATE PUBLICATION {} WITH (publish = 'insert, truncate')", quoted(&inserts)));
        }
        if self.is_for_all {
            return statements; // nothing can be added to it, or taken from it
        }
        for table in self.tables.iter().filter(|table| table.is_owned) {
            let (wanted, other) = if table.has_identity { (&whole, &inserts) } else { (&inserts, &whole) };
            // The children of an inheritance are tables of their own.
            let only = if table.is_partitioned { "" } else { "ONLY " };
            let name = table.sql_name();
            let mut moves = Vec::new();
            if table.publications.contains(other) {
                moves.push(format!("ALTER PUBLICATION {} DROP TABLE {only}{name}", quoted(other)));
            }
            if !table.publications.contains(wanted) {
                moves.push(format!("ALTER PUBLICATION {} ADD TABLE {only}{name}", quoted(wanted)));
            }
            if !table.has_identity && table.publications.contains(&whole) {
                let Table { oid, schema, name, .. } = table.clone();
                moves.extend(tell_coverage(&[TableCoverage { oid, schema, name, coverage: Coverage::Inserts }]));
            }
            if !moves.is_empty() {
                statements.push(moves.join("; "));
            }
        }
        statements
    }

    /// What wants to be said of the publications. `may_create`: the role may make them.
    fn findings(&self, config: &Config, may_create: bool) -> Vec<Finding> {
        let topic = "publication";
        let list = |tables: Vec<&Table>| {
            let names: Vec<_> = tables.iter().take(TABLES_NAMED_MAX).map(|table| table.display_name()).collect();
            let more = tables.len().saturating_sub(TABLES_NAMED_MAX);
            names.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
        };
        let mut findings = Vec::new();
        if !self.publications.contains(&config.publication) {
            let text = format!("there is no publication {} in database {}", config.publication, self.database_name);
            findings.push(match (config.manage, may_create) {
                (true, true) => Finding::warning(topic, text, "`walguard init` makes it, and so does the agent"),
                (true, false) => Finding::error(
                    topic,
                    text,
                    format!(
                        "GRANT CREATE ON DATABASE {} TO the role, or make it yourself",
                        quoted(&self.database_name)
                    ),
                ),
                (false, _) => Finding::error(
                    topic,
                    text,
                    format!("CREATE PUBLICATION {} FOR TABLE ...", quoted(&config.publication)),
                ),
            });
        } else {
            let published = self.tables.len() - self.unpublished().count();
            let text = format!("{} names {published} of {} tables", config.publication, self.tables.len());
            findings.push(Finding::ok(topic, text));
        }
        let refused: Vec<_> = self.refused(config).collect();
        if !refused.is_empty() {
            findings.push(Finding::error(
                topic,
                format!(
                    "the server refuses UPDATE and DELETE on {}: published, and without a replica identity",
                    list(refused)
                ),
                "give them a primary key or REPLICA IDENTITY FULL, or take them out of the publication",
            ));
        }
        let without: Vec<_> = self.tables.iter().filter(|table| !table.has_identity).collect();
        if !without.is_empty() {
            findings.push(Finding::warning(
                "replica identity",
                format!("updates and deletes of {} are not told by the server, only inserts and truncates", list(without)),
                "ALTER TABLE ... ADD PRIMARY KEY, or ALTER TABLE ... REPLICA IDENTITY FULL (each update and delete then \
                 writes the whole old row to the WAL)",
            ));
        }
        let unowned: Vec<_> = self.tables.iter().filter(|t| t.publications.is_empty() && !t.is_owned).collect();
        if config.manage && !unowned.is_empty() {
            findings.push(Finding::warning(
                topic,
                format!("changes of {} are not seen: they belong to another role", list(unowned)),
                "make walguard's role a member of their owner",
            ));
        } else if !config.manage && self.unpublished().next().is_some() {
            findings.push(Finding::warning(
                topic,
                format!(
                    "changes of {} are not seen: the publication does not name them",
                    list(self.unpublished().collect())
                ),
                format!("ALTER PUBLICATION {} ADD TABLE ...", quoted(&config.publication)),
            ));
        }
        findings
    }

    /// Tables of which nothing is published.
    pub fn unpublished(&self) -> impl Iterator<Item = &Table> {
        self.tables.iter().filter(|table| table.publications.is_empty())
    }

    /// Tables of which inserts and truncates are published, and no update or delete, because nothing tells which row it is.
    pub fn inserts_only<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = &'a Table> {
        let is_it =
            |table: &&Table| !table.publications.is_empty() && !table.publications.contains(&config.publication);
        self.tables.iter().filter(is_it)
    }

    /// Tables whose updates and deletes the server refuses, because they are published and nothing tells which row it is.
    pub fn refused<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = &'a Table> {
        let is_it = |table: &&Table| !table.has_identity && table.publications.contains(&config.publication);
        self.tables.iter().filter(is_it)
    }
}

/// Makes the publications name what they should, if that is our part, and tells what they name then. What the server
/// refuses for one table keeps no other out; the last refusal is told.
///
/// # Errors
/// If the connection breaks, or a publication can neither be found nor made.
pub async fn publish(client: &Client, config: &Config) -> Result<(Survey, Option<CaptureError>), CaptureError> {
    let survey = Survey::ask(client, config).await?;
    let statements = if config.manage { survey.statements(config) } else { Vec::new() };
    let mut refused = None;
    if !statements.is_empty() {
        client.batch_execute(LOCK_TIMEOUT).await.map_err(|error| sql_error("the server", error))?;
    }
    for statement in &statements {
        tracing::info!("publishing: {statement}");
        if let Err(error) = client.batch_execute(statement).await {
            if client.is_closed() || statement.starts_with("CREATE") {
                return Err(sql_error("the server", error));
            }
            refused = Some(sql_error("the server", error));
        }
    }
    let survey = if statements.is_empty() { survey } else { Survey::ask(client, config).await? };
    if !survey.publications.contains(&config.publication) {
        let problem = format!("there is no publication {} in database {}", config.publication, survey.database_name);
        return Err(CaptureError::Unsupported(problem));
    }
    Ok((survey, refused))
}

/// The slot's state; `None` if there is no such slot.
///
/// # Errors
/// If the connection breaks.
pub async fn slot(client: &Client, name: &str) -> Result<Option<SlotState>, CaptureError> {
    let wrong = |error| sql_error("the server", error);
    let query = "SELECT plugin::text, database::text, confirmed_flush_lsn, wal_status = 'lost', \
                   coalesce((pg_catalog.to_jsonb(s) ->> 'failover')::bool, false) \
                 FROM pg_catalog.pg_replication_slots s WHERE slot_name = $1";
    let Some(row) = client.query_opt(query, &[&name]).await.map_err(wrong)? else { return Ok(None) };
    let confirmed: Option<PgLsn> = row.try_get(2).map_err(wrong)?;
    Ok(Some(SlotState {
        plugin: row.try_get(0).map_err(wrong)?,
        database: row.try_get(1).map_err(wrong)?,
        confirmed: confirmed.map(|lsn| Lsn::new(lsn.into())),
        is_lost: row.try_get::<_, Option<bool>>(3).map_err(wrong)?.unwrap_or_default(),
        failover: row.try_get(4).map_err(wrong)?,
    }))
}

/// Looks at everything that reading changes needs. Changes nothing on the server.
///
/// # Errors
/// If there is no connection to be had, or it breaks: then nothing else matters.
pub async fn preflight(info: &ConnInfo, config: &Config, slot_name: &str) -> Result<Vec<Finding>, CaptureError> {
    let ours = info.clone().with_application_name(&format!("{}-check", info.application_name()));
    let mut walsender = Walsender::connect_to_database(&ours).await?;
    let wal_level = walsender.show("wal_level").await?;
    let mut findings = vec![Finding::ok(
        "server",
        format!("{}: PostgreSQL {}, replication by database", walsender.endpoint(), walsender.server_version()),
    )];
    findings.push(match wal_level.as_str() {
        "logical" => Finding::ok("wal_level", "logical"),
        other => Finding::error(
            "wal_level",
            format!("{other}: the server cannot decode its WAL"),
            "set wal_level = logical (needs a restart); services have a switch for it: rds.logical_replication, \
             cloudsql.logical_decoding",
        ),
    });
    let client = connect_sql(&ours).await?;
    let survey = Survey::ask(&client, config).await?;
    let rights = "SELECT has_database_privilege(current_database(), 'CREATE'), \
                  pg_has_role(current_user, 'pg_monitor', 'MEMBER')";
    let rights = client.query_one(rights, &[]).await.map_err(|error| sql_error("the server", error))?;
    let may = |column: usize| rights.try_get::<_, bool>(column).unwrap_or_default();
    findings.extend(survey.findings(config, may(0)));
    if !may(1) {
        findings.push(Finding::warning(
            "role",
            "the role is not a member of pg_monitor: incidents will not say who it was",
            "GRANT pg_monitor TO the role, if the service allows it",
        ));
    }
    findings.push(match slot(&client, slot_name).await? {
        None => Finding::warning(
            "slot",
            format!("there is no slot {slot_name}: changes are not kept for us yet"),
            "`walguard init` makes it, and so does the agent",
        ),
        Some(SlotState { is_lost: true, .. }) => Finding::error(
            "slot",
            format!("slot {slot_name} was invalidated: the server no longer holds its changes"),
            "the agent makes it anew and records the gap; raise max_slot_wal_keep_size",
        ),
        Some(SlotState { plugin, database, .. }) => match (plugin.as_deref(), database) {
            (Some("pgoutput"), Some(database)) if database == survey.database_name => {
                Finding::ok("slot", format!("{slot_name} of database {database}"))
            }
            _ => Finding::error(
                "slot",
                format!("slot {slot_name} is not one of pgoutput in database {}", survey.database_name),
                "name another one with `postgres.slot`",
            ),
        },
    });
    Ok(findings)
}

/// An SQL connection to the database whose changes are read.
///
/// # Errors
/// As [`connect_sql`].
pub async fn connect(info: &ConnInfo) -> Result<Client, CaptureError> {
    connect_sql(info).await
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, has_identity: bool, publications: &[&str]) -> Table {
        Table {
            oid: Oid(16_400),
            schema: "public".into(),
            name: name.into(),
            is_partitioned: name.starts_with("parted"),
            has_identity,
            is_owned: !name.starts_with("foreign"),
            publications: publications.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn survey(publications: &[&str], tables: Vec<Table>) -> Survey {
        let publications = publications.iter().map(|name| (*name).to_owned()).collect();
        Survey { database: Oid(5), database_name: "shop".into(), publications, is_for_all: false, tables }
    }

    #[test]
    fn a_table_is_published_as_its_replica_identity_allows_and_moves_when_that_changes() {
        let config = Config::default();
        let first = survey(&[], vec![table("a", true, &[]), table("log", false, &[]), table("foreign", true, &[])]);
        assert_eq!(
            first.statements(&config),
            [
                r#"CREATE PUBLICATION "walguard""#,
                r#"CREATE PUBLICATION "walguard_inserts" WITH (publish = 'insert, truncate')"#,
                r#"ALTER PUBLICATION "walguard" ADD TABLE ONLY "public"."a""#,
                r#"ALTER PUBLICATION "walguard_inserts" ADD TABLE ONLY "public"."log""#,
            ]
        );
        let both = &["walguard", "walguard_inserts"];
        let tables = vec![
            table("a", true, &["walguard"]),
            table("log", false, &["walguard_inserts"]),
            table("lost", false, &["walguard"]),
            table("parted\"", true, &["walguard_inserts"]),
        ];
        assert_eq!(
            survey(both, tables).statements(&config),
            [
                r#"ALTER PUBLICATION "walguard" DROP TABLE ONLY "public"."lost"; "#.to_owned()
                    + r#"ALTER PUBLICATION "walguard_inserts" ADD TABLE ONLY "public"."lost"; "#
                    + "SELECT pg_catalog.pg_logical_emit_message(true, 'walguard.coverage', "
                    + r#"E'{"v":1,"tables":[{"oid":16400,"schema":"public","name":"lost","coverage":"inserts"}]}')"#,
                r#"ALTER PUBLICATION "walguard_inserts" DROP TABLE "public"."parted"""; "#.to_owned()
                    + r#"ALTER PUBLICATION "walguard" ADD TABLE "public"."parted""""#,
            ]
        );
    }

    #[test]
    fn each_further_database_has_a_slot_whose_name_is_its_own_and_not_too_long() {
        assert_eq!(slot_of("walguard", Oid(16_385)), "walguard_16385");
        let (a, b) = (slot_of(&"x".repeat(63), Oid(u32::MAX)), slot_of(&"x".repeat(63), Oid(1)));
        assert_eq!((a.len(), b.len()), (63, 63));
        assert!(a.ends_with("_4294967295") && b.ends_with("x_1"));
    }

    #[test]
    fn what_is_not_published_or_only_in_part_is_told_apart() {
        let config = Config::default();
        let tables = vec![
            table("a", true, &["walguard"]),
            table("log", false, &["walguard_inserts"]),
            table("broken", false, &["walguard"]),
            table("foreign", true, &[]),
        ];
        let survey = survey(&["walguard", "walguard_inserts"], tables);
        let names = |tables: Vec<&Table>| tables.into_iter().map(|table| table.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(survey.unpublished().collect()), ["foreign"]);
        assert_eq!(names(survey.inserts_only(&config).collect()), ["log"]);
        assert_eq!(names(survey.refused(&config).collect()), ["broken"]);
    }
}
