//! Rows of the catalogs that say what relations are called and what protects them: bytes -> columns.
//!
//! Only columns that come before the first one of variable length are read, so each lies at a fixed place; which place
//! that is where majors differ, [`WalMajor`] says. (Postgres: `catalog/pg_class.h` and its neighbours.)

use super::WalMajor;
use crate::pg::Oid;

/// Bytes of a name (Postgres: `NAMEDATALEN`).
const NAME_BYTES: usize = 64;

/// A catalog that walguard reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Catalog {
    Class,
    Namespace,
    Database,
    Attribute,
    Index,
    Inherits,
    Trigger,
    Rewrite,
    Policy,
    EventTrigger,
}

impl Catalog {
    /// All of them. In numbers (of snapshots) they are counted from 0 in this order, which never changes.
    pub const ALL: [Self; 10] = [
        Self::Class,
        Self::Namespace,
        Self::Database,
        Self::Attribute,
        Self::Index,
        Self::Inherits,
        Self::Trigger,
        Self::Rewrite,
        Self::Policy,
        Self::EventTrigger,
    ];

    /// The catalog's OID, which is the number of its first file, too.
    pub const fn oid(self) -> Oid {
        Oid(match self {
            Self::Class => 1259,
            Self::Namespace => 2615,
            Self::Database => 1262,
            Self::Attribute => 1249,
            Self::Index => 2610,
            Self::Inherits => 2611,
            Self::Trigger => 2620,
            Self::Rewrite => 2618,
            Self::Policy => 3256,
            Self::EventTrigger => 3466,
        })
    }

    /// The catalog with this OID.
    pub fn of_oid(oid: Oid) -> Option<Self> {
        Self::ALL.into_iter().find(|catalog| catalog.oid() == oid)
    }

    /// One for all databases.
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Database)
    }

    /// Its file is in the file map, not in `pg_class`.
    pub const fn is_mapped(self) -> bool {
        matches!(self, Self::Class | Self::Attribute | Self::Database)
    }

    /// So many bytes from the beginning of a row hold all that is read of it.
    pub const fn bytes(self, major: WalMajor) -> usize {
        match self {
            Self::Class => major.class_columns().rewrite + 4,
            Self::Namespace => 4 + NAME_BYTES,
            Self::Database => major.database_tablespace() + 4,
            Self::Attribute => {
                let (number, dropped) = major.attribute_columns();
                (if number > dropped { number } else { dropped }) + 2
            }
            Self::Index | Self::Inherits => 8,
            Self::Trigger => 84,
            Self::Rewrite => 74,
            Self::Policy => 72,
            Self::EventTrigger => 141,
        }
    }
}

/// A row of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the columns' own names")]
pub enum CatalogRow {
    /// `pg_class`.
    Class(ClassRow),
    /// `pg_namespace`.
    Namespace { oid: Oid, name: String },
    /// `pg_database`.
    Database { oid: Oid, name: String, tablespace: Oid },
    /// `pg_attribute`.
    Attribute { relation: Oid, name: String, number: i16, is_dropped: bool },
    /// `pg_index`.
    Index { index: Oid, table: Oid },
    /// `pg_inherits`.
    Inherits { child: Oid, parent: Oid },
    /// `pg_trigger`.
    Trigger { oid: Oid, relation: Oid, name: String, enabled: u8, is_internal: bool },
    /// `pg_rewrite`.
    Rewrite { oid: Oid, relation: Oid, name: String, enabled: u8 },
    /// `pg_policy`.
    Policy { oid: Oid, relation: Oid, name: String },
    /// `pg_event_trigger`.
    EventTrigger { oid: Oid, name: String, enabled: u8 },
}

/// A row of `pg_class`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassRow {
    /// `oid`.
    pub oid: Oid,
    /// `relname`.
    pub name: String,
    /// `relnamespace`.
    pub namespace: Oid,
    /// `relfilenode`; 0 for mapped catalogs and for what has no file.
    pub file: u32,
    /// `reltablespace`; 0 for the database's own.
    pub tablespace: Oid,
    /// `reltoastrelid`; 0 for none.
    pub toast: Oid,
    /// `relpersistence`.
    pub persistence: u8,
    /// `relkind`.
    pub kind: u8,
    /// `relispartition`.
    pub is_partition: bool,
    /// `relrewrite`: the table that this one will replace, while that is written anew; 0 otherwise.
    pub rewrite: Oid,
}

/// Where the columns of `pg_class` lie that differ between majors.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClassColumns {
    pub(super) toast: usize,
    pub(super) persistence: usize,
    pub(super) kind: usize,
    pub(super) is_partition: usize,
    pub(super) rewrite: usize,
}

impl CatalogRow {
    /// Reads a row; `None` if there are too few bytes.
    pub fn read(catalog: Catalog, major: WalMajor, data: &[u8]) -> Option<Self> {
        let at = Columns(data);
        Some(match catalog {
            Catalog::Class => {
                let columns = major.class_columns();
                Self::Class(ClassRow {
                    oid: at.oid(0)?,
                    name: at.name(4)?,
                    namespace: at.oid(68)?,
                    file: at.oid(88)?.0,
                    tablespace: at.oid(92)?,
                    toast: at.oid(columns.toast)?,
                    persistence: at.byte(columns.persistence)?,
                    kind: at.byte(columns.kind)?,
                    is_partition: at.byte(columns.is_partition)? != 0,
                    rewrite: at.oid(columns.rewrite)?,
                })
            }
            Catalog::Namespace => Self::Namespace { oid: at.oid(0)?, name: at.name(4)? },
            Catalog::Database => {
                Self::Database { oid: at.oid(0)?, name: at.name(4)?, tablespace: at.oid(major.database_tablespace())? }
            }
            Catalog::Attribute => {
                let (number, dropped) = major.attribute_columns();
                Self::Attribute {
                    relation: at.oid(0)?,
                    name: at.name(4)?,
                    number: i16::from_le_bytes(*at.0.get(number..)?.first_chunk()?),
                    is_dropped: at.byte(dropped)? != 0,
                }
            }
            Catalog::Index => Self::Index { index: at.oid(0)?, table: at.oid(4)? },
            Catalog::Inherits => Self::Inherits { child: at.oid(0)?, parent: at.oid(4)? },
            Catalog::Trigger => Self::Trigger {
                oid: at.oid(0)?,
                relation: at.oid(4)?,
                name: at.name(12)?,
                enabled: at.byte(82)?,
                is_internal: at.byte(83)? != 0,
            },
            Catalog::Rewrite => {
                Self::Rewrite { oid: at.oid(0)?, name: at.name(4)?, relation: at.oid(68)?, enabled: at.byte(73)? }
            }
            Catalog::Policy => Self::Policy { oid: at.oid(0)?, name: at.name(4)?, relation: at.oid(68)? },
            Catalog::EventTrigger => Self::EventTrigger { oid: at.oid(0)?, name: at.name(4)?, enabled: at.byte(140)? },
        })
    }

    /// The beginning of the row as a page holds it, with zeros for columns that are not read: what [`CatalogRow::read`]
    /// takes.
    pub fn write(&self, major: WalMajor) -> (Catalog, Vec<u8>) {
        let catalog = self.catalog();
        let mut out = Draft(vec![0; catalog.bytes(major)]);
        match self {
            Self::Class(class) => {
                let columns = major.class_columns();
                out.oid(0, class.oid);
                out.name(4, &class.name);
                out.oid(68, class.namespace);
                out.oid(88, Oid(class.file));
                out.oid(92, class.tablespace);
                out.oid(columns.toast, class.toast);
                out.put(columns.persistence, &[class.persistence]);
                out.put(columns.kind, &[class.kind]);
                out.put(columns.is_partition, &[class.is_partition.into()]);
                out.oid(columns.rewrite, class.rewrite);
            }
            Self::Namespace { oid, name } => {
                out.oid(0, *oid);
                out.name(4, name);
            }
            Self::Database { oid, name, tablespace } => {
                out.oid(0, *oid);
                out.name(4, name);
                out.oid(major.database_tablespace(), *tablespace);
            }
            Self::Attribute { relation, name, number, is_dropped } => {
                let (number_at, dropped_at) = major.attribute_columns();
                out.oid(0, *relation);
                out.name(4, name);
                out.put(number_at, &number.to_le_bytes());
                out.put(dropped_at, &[(*is_dropped).into()]);
            }
            Self::Index { index: first, table: second } | Self::Inherits { child: first, parent: second } => {
                out.oid(0, *first);
                out.oid(4, *second);
            }
            Self::Trigger { oid, relation, name, enabled, is_internal } => {
                out.oid(0, *oid);
                out.oid(4, *relation);
                out.name(12, name);
                out.put(82, &[*enabled, (*is_internal).into()]);
            }
            Self::Rewrite { oid, relation, name, enabled } => {
                out.oid(0, *oid);
                out.name(4, name);
                out.oid(68, *relation);
                out.put(73, &[*enabled]);
            }
            Self::Policy { oid, relation, name } => {
                out.oid(0, *oid);
                out.name(4, name);
                out.oid(68, *relation);
            }
            Self::EventTrigger { oid, name, enabled } => {
                out.oid(0, *oid);
                out.name(4, name);
                out.put(140, &[*enabled]);
            }
        }
        (catalog, out.0)
    }

    /// Whose row it is.
    pub const fn catalog(&self) -> Catalog {
        match self {
            Self::Class(_) => Catalog::Class,
            Self::Namespace { .. } => Catalog::Namespace,
            Self::Database { .. } => Catalog::Database,
            Self::Attribute { .. } => Catalog::Attribute,
            Self::Index { .. } => Catalog::Index,
            Self::Inherits { .. } => Catalog::Inherits,
            Self::Trigger { .. } => Catalog::Trigger,
            Self::Rewrite { .. } => Catalog::Rewrite,
            Self::Policy { .. } => Catalog::Policy,
            Self::EventTrigger { .. } => Catalog::EventTrigger,
        }
    }
}

/// Columns at fixed places.
struct Columns<'a>(&'a [u8]);

impl Columns<'_> {
    fn byte(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn oid(&self, at: usize) -> Option<Oid> {
        self.0.get(at..)?.first_chunk().map(|chunk| Oid(u32::from_le_bytes(*chunk)))
    }

    /// A name is in the database's encoding, of which nobody tells; almost all are UTF-8.
    fn name(&self, at: usize) -> Option<String> {
        let bytes: &[u8; NAME_BYTES] = self.0.get(at..)?.first_chunk()?;
        let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(String::from_utf8_lossy(name).into_owned())
    }
}

/// A row that is being put together.
struct Draft(Vec<u8>);

impl Draft {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn oid(&mut self, at: usize, oid: Oid) {
        self.put(at, &oid.0.to_le_bytes());
    }

    fn name(&mut self, at: usize, name: &str) {
        let bytes = name.as_bytes();
        self.put(at, bytes.get(..NAME_BYTES - 1).unwrap_or(bytes));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_row() -> impl Strategy<Value = CatalogRow> {
        let text = "[a-z_é]{0,20}";
        (0..10_usize, any::<[u32; 6]>(), text, any::<[u8; 3]>(), any::<bool>()).prop_map(
            |(kind, [a, b, c, d, e, f], name, [x, y, z], flag)| {
                let (first, second) = (Oid(a), Oid(b));
                match Catalog::ALL.get(kind).unwrap() {
                    Catalog::Class => CatalogRow::Class(ClassRow {
                        oid: first,
                        name,
                        namespace: second,
                        file: c,
                        tablespace: Oid(d),
                        toast: Oid(e),
                        persistence: x,
                        kind: y,
                        is_partition: flag,
                        rewrite: Oid(f),
                    }),
                    Catalog::Namespace => CatalogRow::Namespace { oid: first, name },
                    Catalog::Database => CatalogRow::Database { oid: first, name, tablespace: second },
                    Catalog::Attribute => CatalogRow::Attribute {
                        relation: first,
                        name,
                        number: i16::from_le_bytes([x, y]),
                        is_dropped: flag,
                    },
                    Catalog::Index => CatalogRow::Index { index: first, table: second },
                    Catalog::Inherits => CatalogRow::Inherits { child: first, parent: second },
                    Catalog::Trigger => {
                        CatalogRow::Trigger { oid: first, relation: second, name, enabled: z, is_internal: flag }
                    }
                    Catalog::Rewrite => CatalogRow::Rewrite { oid: first, relation: second, name, enabled: z },
                    Catalog::Policy => CatalogRow::Policy { oid: first, relation: second, name },
                    Catalog::EventTrigger => CatalogRow::EventTrigger { oid: first, name, enabled: z },
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(row in any_row()) {
            for major in WalMajor::ALL {
                let (catalog, bytes) = row.write(major);
                prop_assert_eq!(bytes.len(), catalog.bytes(major));
                prop_assert_eq!(CatalogRow::read(catalog, major, &bytes), Some(row.clone()));
            }
        }

        #[test]
        fn too_few_bytes_are_no_row(kind in 0..10_usize, bytes in prop::collection::vec(any::<u8>(), 0..250)) {
            for major in WalMajor::ALL {
                let catalog = *Catalog::ALL.get(kind).unwrap();
                let row = CatalogRow::read(catalog, major, &bytes);
                prop_assert!(row.is_none() || bytes.len() + 1 >= catalog.bytes(major));
            }
        }
    }
}
