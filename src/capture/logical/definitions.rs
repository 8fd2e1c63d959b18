//! What tables look like, as a look at the catalogs finds it: logical replication tells nothing of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use tokio_postgres::Client;

use crate::capture::CaptureError;
use crate::capture::connection::sql_error;
use crate::pg::Oid;

/// Tables that are looked at.
const TABLES_MAX: i64 = 50_000;

const TABLES: &str = "\
SELECT c.oid, n.nspname::text, c.relname::text, \
  ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum), \
  ARRAY(SELECT a.atttypid::text || ':' || a.atttypmod::text || a.attgenerated::text \
    FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum) \
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND c.oid >= 16384 \
  AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%' ORDER BY c.oid LIMIT $1";

/// A number for each kind that is another one when anything of that kind is made, changed or dropped: every change writes a
/// new version of a row, with another `xmin`. What belongs to temporary tables comes and goes all day, and is left out.
const OTHERS: &str = "\
SELECT kind, pg_catalog.sum(pg_catalog.hashtextextended(id::text || '.' || version::text, 0)::numeric)::text FROM (\
  SELECT 'indexes' AS kind, i.indexrelid AS id, i.xmin AS version FROM pg_catalog.pg_index i \
    JOIN pg_catalog.pg_class t ON t.oid = i.indrelid WHERE t.relpersistence <> 't' AND t.relkind <> 't' \
  UNION ALL SELECT 'constraints', k.oid, k.xmin FROM pg_catalog.pg_constraint k \
    LEFT JOIN pg_catalog.pg_class t ON t.oid = k.conrelid WHERE t.relpersistence IS DISTINCT FROM 't' \
  UNION ALL SELECT 'column defaults', d.oid, d.xmin FROM pg_catalog.pg_attrdef d \
    JOIN pg_catalog.pg_class t ON t.oid = d.adrelid WHERE t.relpersistence <> 't' \
  UNION ALL SELECT 'triggers', g.oid, g.xmin FROM pg_catalog.pg_trigger g \
    JOIN pg_catalog.pg_class t ON t.oid = g.tgrelid WHERE t.relpersistence <> 't' \
  UNION ALL SELECT 'views and rules', r.oid, r.xmin FROM pg_catalog.pg_rewrite r \
    JOIN pg_catalog.pg_class t ON t.oid = r.ev_class WHERE t.relpersistence <> 't' \
  UNION ALL SELECT 'policies', oid, xmin FROM pg_catalog.pg_policy \
  UNION ALL SELECT 'functions', f.oid, f.xmin FROM pg_catalog.pg_proc f \
    JOIN pg_catalog.pg_namespace n ON n.oid = f.pronamespace WHERE n.nspname NOT LIKE 'pg\\_temp%' \
  UNION ALL SELECT 'sequences', s.seqrelid, s.xmin FROM pg_catalog.pg_sequence s \
    JOIN pg_catalog.pg_class t ON t.oid = s.seqrelid WHERE t.relpersistence <> 't' \
  UNION ALL SELECT 'types', y.oid, y.xmin FROM pg_catalog.pg_type y JOIN pg_catalog.pg_namespace n ON n.oid = y.typnamespace \
    WHERE y.typtype IN ('d', 'e', 'm', 'r') AND n.nspname NOT LIKE 'pg\\_temp%' \
  UNION ALL SELECT 'values of types', oid, xmin FROM pg_catalog.pg_enum \
  UNION ALL SELECT 'schemas', oid, xmin FROM pg_catalog.pg_namespace WHERE nspname NOT LIKE 'pg\\_%' \
  UNION ALL SELECT 'extensions', oid, xmin FROM pg_catalog.pg_extension\
) AS all_kinds WHERE id >= 16384 GROUP BY kind";

/// Kinds that rows may depend on: a value of an enum that is not there is no value.
const OF_ROWS: [&str; 2] = ["types", "values of types"];

/// True if rows may depend on definitions of this kind ([`Definitions::others`]).
pub fn rows_depend_on(kind: &str) -> bool {
    OF_ROWS.contains(&kind)
}

/// A table, as far as its rows are read by it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableDefinition {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Its columns, in order.
    pub columns: Vec<String>,
    /// The type of each: its OID, its modifier, and `s` or `v` if the column is generated (Postgres: `atttypid`, `atttypmod`,
    /// `attgenerated`). Names would depend on the search path.
    pub types: Vec<String>,
}

impl TableDefinition {
    /// Sixteen hexadecimal digits that are others when anything of it is.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for text in [&self.schema, &self.name].into_iter().chain(&self.columns).chain(&self.types) {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        hash.finalize().iter().take(8).fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // a String takes everything
            text
        })
    }
}

/// Definitions of a database, as one look saw them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Definitions {
    /// When, by the server's clock.
    pub at: Timestamp,
    /// Its tables, also partitioned ones, by OID.
    pub tables: BTreeMap<Oid, TableDefinition>,
    /// Other kinds of definitions, by what people call them: a number that changes with anything of that kind.
    pub others: BTreeMap<String, String>,
}

impl Definitions {
    /// Looks, as of the client's snapshot.
    ///
    /// # Errors
    /// If the connection breaks, or the role may not look.
    pub async fn look(client: &Client) -> Result<Self, CaptureError> {
        let wrong = |error| sql_error("the server", error);
        let at = client.query_one("SELECT pg_catalog.statement_timestamp()", &[]).await.map_err(wrong)?;
        let table = |row: &tokio_postgres::Row| {
            let (schema, name) = (row.try_get(1)?, row.try_get(2)?);
            let table = TableDefinition { schema, name, columns: row.try_get(3)?, types: row.try_get(4)? };
            Ok((Oid(row.try_get(0)?), table))
        };
        let tables = client.query(TABLES, &[&TABLES_MAX]).await.map_err(wrong)?;
        let others = client.query(OTHERS, &[]).await.map_err(wrong)?;
        Ok(Self {
            at: at.try_get(0).map_err(wrong)?,
            tables: tables.iter().map(table).collect::<Result<_, _>>().map_err(wrong)?,
            others: others
                .iter()
                .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
                .collect::<Result<_, _>>()
                .map_err(wrong)?,
        })
    }

    /// The digest of a table; `None` if there is no such table.
    pub fn digest(&self, table: Oid) -> Option<String> {
        self.tables.get(&table).map(TableDefinition::digest)
    }

    /// The other kinds of definitions that are not as they were before, with their numbers now.
    pub fn others_since(&self, before: &Self) -> BTreeMap<String, String> {
        let none = String::new();
        let kinds = before.others.keys().chain(self.others.keys());
        let pairs = kinds.map(|kind| (kind, self.others.get(kind).unwrap_or(&none), before.others.get(kind)));
        let changed = pairs.filter(|(_, now, before)| Some(*now) != *before);
        changed.map(|(kind, now, _)| (kind.clone(), now.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, columns: &[&str], types: &[&str]) -> TableDefinition {
        let list = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        TableDefinition { schema: "public".into(), name: name.into(), columns: list(columns), types: list(types) }
    }

    #[test]
    fn a_digest_is_another_one_when_anything_is() {
        let same = table("t", &["a", "b"], &["integer", "text"]);
        assert_eq!(same.digest(), table("t", &["a", "b"], &["integer", "text"]).digest());
        let others = [
            table("u", &["a", "b"], &["integer", "text"]),
            table("t", &["a", "b"], &["bigint", "text"]),
            table("t", &["a"], &["integer", "text"]),
            table("t", &["ab"], &["integer", "text"]),
            table("t", &["b", "a"], &["integer", "text"]),
        ];
        for other in others {
            assert_ne!(same.digest(), other.digest(), "{other:?}");
        }
    }

    #[test]
    fn a_kind_that_came_or_went_has_changed() {
        let look = |others: &[(&str, &str)]| Definitions {
            at: Timestamp::UNIX_EPOCH,
            tables: BTreeMap::new(),
            others: others.iter().map(|(kind, number)| ((*kind).to_owned(), (*number).to_owned())).collect(),
        };
        let (before, now) = (look(&[("a", "1"), ("b", "2"), ("c", "3")]), look(&[("a", "1"), ("b", "9"), ("d", "4")]));
        let changed: Vec<_> = now.others_since(&before).into_iter().collect();
        let text = |text: &str| text.to_owned();
        assert_eq!(changed, [(text("b"), text("9")), (text("c"), text("")), (text("d"), text("4"))]);
        assert_eq!(now.others_since(&now), BTreeMap::new());
    }
}
