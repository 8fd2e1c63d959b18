//! The catalogs over SQL, as the names that the WAL then keeps begin with ([`Names::seed`](crate::detect::Names::seed)).

use tokio_postgres::{Client, Row};

use crate::capture::{self, CaptureError, ConnInfo};
use crate::decode::catalog::{Catalog, CatalogRow, ClassRow};
use crate::decode::rows::RowPlace;
use crate::detect::names::{CatalogFile, Seed, SeedRow};
use crate::pg::{Oid, RelFile};

/// Columns of users' tables that are read of one database: what is beyond finds no room anyway.
const COLUMNS_MAX: i64 = 30_000;

/// A database that was asked, or could not be.
#[derive(Debug)]
pub struct Told {
    /// The database's OID.
    pub database: Oid,
    /// Its name.
    pub name: String,
    /// Its catalogs, or why they could not be read: the role lacks `CONNECT`, for example.
    pub seeds: Result<Vec<Seed>, String>,
}

/// A query or a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] CaptureError),
    /// The server refused a query, or went away.
    #[error("read the catalogs: {0}")]
    Query(#[from] tokio_postgres::Error),
}

/// Reads the catalogs of all databases, or of those in `only`, one after the other. The shared ones come first.
///
/// # Errors
/// If the server cannot be reached or asked at all; of single databases see [`Told::seeds`].
pub async fn read(conninfo: &ConnInfo, only: Option<&[Oid]>) -> Result<(Seed, Vec<Told>), NamesError> {
    let client = capture::connect_sql(conninfo).await?;
    let shared = databases(&client).await?;
    let mut told = Vec::new();
    for row in client.query("SELECT oid, datname FROM pg_database WHERE datallowconn ORDER BY oid", &[]).await? {
        let (database, name) = (Oid(row.try_get(0)?), row.try_get::<_, String>(1)?);
        if only.is_some_and(|only| !only.contains(&database)) {
            continue;
        }
        let seeds = of_database(conninfo, database, &name).await.map_err(|error| error.to_string());
        told.push(Told { database, name, seeds });
    }
    Ok((shared, told))
}

async fn databases(client: &Client) -> Result<Seed, NamesError> {
    let query = "SELECT ctid::text, xmin::text, oid, datname, dattablespace FROM pg_database";
    let rows = client.query(query, &[]).await?;
    let row = |row: &Row| {
        let of =
            CatalogRow::Database { oid: Oid(row.try_get(2)?), name: row.try_get(3)?, tablespace: Oid(row.try_get(4)?) };
        seed_row(row, of)
    };
    let rows = rows.iter().map(row).collect::<Result<_, _>>()?;
    let number: u32 =
        client.query_one("SELECT pg_relation_filenode('pg_database'::regclass)", &[]).await?.try_get(0)?;
    Ok(Seed {
        of: CatalogFile { catalog: Catalog::Database, database: Oid(0) },
        file: RelFile { tablespace: Oid(1664), database: Oid(0), number },
        rows,
    })
}

async fn of_database(conninfo: &ConnInfo, database: Oid, name: &str) -> Result<Vec<Seed>, NamesError> {
    let mut client = capture::connect_sql(&conninfo.clone().with_dbname(name)).await?;
    // One snapshot for all, and nothing that could be held up or hold up.
    let transaction = client
        .build_transaction()
        .read_only(true)
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await?;
    let mut seeds = Vec::new();
    for catalog in Catalog::ALL.into_iter().filter(|catalog| !catalog.is_shared()) {
        let oid = catalog.oid();
        let place = "SELECT pg_relation_filenode($1::oid::regclass), \
                     coalesce(nullif(c.reltablespace, 0), d.dattablespace) \
                     FROM pg_class c, pg_database d WHERE c.oid = $1 AND d.datname = current_database()";
        let row = transaction.query_one(place, &[&oid.0]).await?;
        let file = RelFile { tablespace: Oid(row.try_get(1)?), database, number: row.try_get(0)? };
        let rows = transaction.query(&query(catalog), &[]).await?;
        let rows = rows.iter().map(|row| seed_row(row, of_sql(catalog, row)?)).collect::<Result<_, _>>()?;
        seeds.push(Seed { of: CatalogFile { catalog, database }, file, rows });
    }
    Ok(seeds)
}

fn query(catalog: Catalog) -> String {
    let (columns, from) = match catalog {
        Catalog::Class => (
            "oid, relname, relnamespace, relfilenode, reltablespace, reltoastrelid, relpersistence, relkind, \
             relispartition, relrewrite",
            "pg_class",
        ),
        Catalog::Namespace => ("oid, nspname", "pg_namespace"),
        Catalog::Database => ("oid, datname, dattablespace", "pg_database"),
        Catalog::Attribute => (
            "attrelid, attname, attnum, attisdropped",
            "pg_attribute WHERE attnum > 0 AND attrelid >= 16384 AND \
             (SELECT relkind IN ('r', 'p', 'f') FROM pg_class c WHERE c.oid = attrelid)",
        ),
        Catalog::Index => ("indexrelid, indrelid", "pg_index"),
        Catalog::Inherits => ("inhrelid, inhparent", "pg_inherits"),
        Catalog::Trigger => ("oid, tgrelid, tgname, tgenabled, tgisinternal", "pg_trigger"),
        Catalog::Rewrite => ("oid, ev_class, rulename, ev_enabled", "pg_rewrite"),
        Catalog::Policy => ("oid, polrelid, polname", "pg_policy"),
        Catalog::EventTrigger => ("oid, evtname, evtenabled", "pg_event_trigger"),
    };
    let from = format!("pg_catalog.{from}");
    let limit = if catalog == Catalog::Attribute { format!(" LIMIT {COLUMNS_MAX}") } else { String::new() };
    let (table, rest) = from.split_once(' ').unwrap_or((&from, ""));
    format!("SELECT t.ctid::text, t.xmin::text, {columns} FROM {table} t {rest}{limit}")
}

fn of_sql(catalog: Catalog, row: &Row) -> Result<CatalogRow, tokio_postgres::Error> {
    let oid = |at: usize| row.try_get(at).map(Oid);
    let letter = |at: usize| row.try_get::<_, i8>(at).map(|letter| letter as u8);
    Ok(match catalog {
        Catalog::Class => CatalogRow::Class(ClassRow {
            oid: oid(2)?,
            name: row.try_get(3)?,
            namespace: oid(4)?,
            file: row.try_get(5)?,
            tablespace: oid(6)?,
            toast: oid(7)?,
            persistence: letter(8)?,
            kind: letter(9)?,
            is_partition: row.try_get(10)?,
            rewrite: oid(11)?,
        }),
        Catalog::Namespace => CatalogRow::Namespace { oid: oid(2)?, name: row.try_get(3)? },
        Catalog::Database => CatalogRow::Database { oid: oid(2)?, name: row.try_get(3)?, tablespace: oid(4)? },
        Catalog::Attribute => CatalogRow::Attribute {
            relation: oid(2)?,
            name: row.try_get(3)?,
            number: row.try_get(4)?,
            is_dropped: row.try_get(5)?,
        },
        Catalog::Index => CatalogRow::Index { index: oid(2)?, table: oid(3)? },
        Catalog::Inherits => CatalogRow::Inherits { child: oid(2)?, parent: oid(3)? },
        Catalog::Trigger => CatalogRow::Trigger {
            oid: oid(2)?,
            relation: oid(3)?,
            name: row.try_get(4)?,
            enabled: letter(5)?,
            is_internal: row.try_get(6)?,
        },
        Catalog::Rewrite => {
            CatalogRow::Rewrite { oid: oid(2)?, relation: oid(3)?, name: row.try_get(4)?, enabled: letter(5)? }
        }
        Catalog::Policy => CatalogRow::Policy { oid: oid(2)?, relation: oid(3)?, name: row.try_get(4)? },
        Catalog::EventTrigger => CatalogRow::EventTrigger { oid: oid(2)?, name: row.try_get(3)?, enabled: letter(4)? },
    })
}

/// A row with its place, which the first two columns tell: `(12,3)` and its maker.
fn seed_row(row: &Row, of: CatalogRow) -> Result<SeedRow, tokio_postgres::Error> {
    let (ctid, xmin): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    let mut numbers = ctid.trim_matches(['(', ')']).split(',').map(|number| number.parse::<u32>().unwrap_or_default());
    let block = numbers.next().unwrap_or_default();
    let offset = numbers.next().and_then(|offset| u16::try_from(offset).ok()).unwrap_or_default();
    Ok(SeedRow { place: RowPlace { block, offset }, xmin: xmin.parse().unwrap_or_default(), row: of })
}
