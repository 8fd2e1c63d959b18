//! Logical bases: a database as it was at a place, as SQL and rows, where no copy of its files is to be had.
//!
//! ```text
//! bases/<database>/<label>/pre-data.sql.zst         what `pg_dump --section=pre-data` wrote: types, tables, functions ...
//! bases/<database>/<label>/<table oid>-00001.copy.zst   rows of a table, as COPY writes them (text)
//! bases/<database>/<label>/post-data.sql.zst        `--section=post-data`: indexes, constraints, triggers ...
//! bases/<database>/<label>/manifest.json            written last: the base exists when this does
//! ```
//!
//! All of it is of one snapshot, that of a temporary slot: it sees exactly the transactions whose commit records lie before
//! [`Manifest::consistent`], and the change log holds the others. By hand: `zstd -dc pre-data.sql.zst | psql`, each part with
//! `\copy`, then `post-data.sql.zst`.

mod dump;
mod take;
pub mod upkeep;

use std::path::PathBuf;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;

pub use take::{Request, take};

use super::store::{Created, StoreError};
use super::{RepoError, Repository, SMALL_READS_MAX, SameContent, frame};
use crate::capture::CaptureError;
use crate::capture::logical::Definitions;
use crate::pg::{Lsn, Oid, ServerVersion, TimelineId};

/// The format of [`Manifest`].
pub const FORMAT: u32 = 1;

/// Rows are packed into parts of so much text: an object that fits in memory, and a transaction when they are put back.
pub const PART_BYTES: usize = 8 << 20;

/// A part ends with the row that fills it; no row has more than a GiB of text for each value.
pub const PART_BYTES_MAX: usize = 1 << 30;

/// The longest schema that is kept: some hundred thousand objects.
pub const SCHEMA_BYTES_MAX: usize = 256 << 20;

/// The largest manifest that is read: a million parts.
const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// What a base holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The base's name.
    pub label: String,
    /// The database's OID.
    pub database: Oid,
    /// Its name.
    pub database_name: String,
    /// By which rules its text sorts.
    pub locale: Locale,
    /// The server's version.
    pub server_version: ServerVersion,
    /// The server's timeline.
    pub timeline: TimelineId,
    /// The base holds what was committed before this place, and nothing else.
    pub consistent: Lsn,
    /// When the snapshot was taken, by the server's clock.
    pub time: Timestamp,
    /// When the base was done, by the agent's clock.
    pub ended_at: Timestamp,
    /// Its tables, those of extensions not among them.
    pub tables: Vec<Table>,
    /// Sequences, as they were some time after the snapshot.
    pub sequences: Vec<Sequence>,
    /// Roles that own something or were granted something.
    pub roles: Vec<String>,
    /// What its tables, and other definitions, looked like.
    pub definitions: Definitions,
    /// Extensions with their versions.
    pub extensions: Vec<(String, String)>,
    /// What is in the database and not in the base, and why, for people.
    pub left_out: Vec<String>,
    /// Bytes of the rows' text.
    pub content_bytes: u64,
    /// Bytes of all its objects.
    pub stored_bytes: u64,
}

/// A database's encoding and locale (Postgres: `pg_database`).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Locale {
    /// The encoding's name. What is in the base is UTF-8 whatever that is.
    pub encoding: String,
    /// `datcollate`.
    pub collate: String,
    /// `datctype`.
    pub ctype: String,
    /// `datlocprovider`: `c` is the system's library, `i` is ICU, `b` is PostgreSQL itself.
    pub provider: String,
    /// `datlocale`, of providers other than the system's library.
    pub locale: Option<String>,
}

/// A table of a base.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Table {
    /// Its OID.
    pub oid: Oid,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The columns of the rows, in order; generated ones are not among them.
    pub columns: Vec<String>,
    /// OIDs of these columns' types, in the server that the base was taken of.
    pub types: Vec<u32>,
    /// Nothing tells which row is updated or deleted: after the base only inserts and truncates are known.
    pub inserts_only: bool,
    /// No publication named it, or only some of its rows or columns: after the base nothing of it is known.
    #[serde(default)]
    pub unpublished: bool,
    /// Rows.
    pub rows: u64,
    /// Rows of each part.
    pub parts: Vec<u64>,
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

    /// `"a", "b"`.
    pub fn column_list(&self) -> String {
        self.columns.iter().map(|column| quoted(column)).collect::<Vec<_>>().join(", ")
    }
}

/// A sequence of a base.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sequence {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Its state.
    pub last_value: i64,
    /// `last_value` was given out.
    pub is_called: bool,
    /// It counts down.
    pub is_descending: bool,
    /// The column that it numbers, if it is one's own: schema, table, column.
    pub owned_by: Option<(String, String, String)>,
}

impl Sequence {
    /// `"schema"."name"`.
    pub fn sql_name(&self) -> String {
        format!("{}.{}", quoted(&self.schema), quoted(&self.name))
    }
}

/// A base could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// Of the server.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Of the repository.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// `pg_dump` is not to be had, or too old.
    #[error("no pg_dump that can read PostgreSQL {major}: {problem}")]
    NoDump {
        /// The server's major version.
        major: u32,
        /// What was found.
        problem: String,
    },
    /// `pg_dump` failed.
    #[error("{program} failed: {problem}")]
    Dump {
        /// Which one.
        program: PathBuf,
        /// What it said last.
        problem: String,
    },
    /// There is no change log that a base could be the beginning of.
    #[error("changes of database {database} are not kept yet")]
    NoChanges {
        /// The database's name.
        database: String,
    },
    /// There is a base of that name.
    #[error("there is a base `{0}` already, or the beginning of one")]
    LabelTaken(String),
    /// Somebody stopped it.
    #[error("stopped before the base was whole: it does not count")]
    Cancelled,
}

impl BaseError {
    /// True if the same may work later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Capture(error) => error.is_transient(),
            Self::Repo(error) => error.is_transient(),
            Self::NoChanges { .. } => true,
            _ => false,
        }
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Capture(error) => return error.hint(),
            Self::Repo(error) => return error.hint(),
            Self::NoDump { .. } => {
                "install PostgreSQL's client programs of that version or a newer one, or name their directory with \
                 WALGUARD_PG_BIN_DIR"
            }
            Self::Dump { .. } => "the role must be able to read every table of the database: GRANT pg_read_all_data",
            Self::NoChanges { .. } => "start the agent first: `walguard run`",
            Self::LabelTaken(_) => "choose another name with --label",
            Self::Cancelled => "the same command can be repeated; it begins anew",
        };
        Some(text.to_owned())
    }
}

impl Repository {
    /// Puts an object of a base, compressed; gives its stored size.
    ///
    /// # Errors
    /// Of the store; a conflict if it holds something else.
    pub(super) async fn put_base_object(&self, key: String, content: Vec<u8>, level: i32) -> Result<u64, RepoError> {
        let stored = tokio::task::spawn_blocking(move || frame::compress(&content, level)).await;
        let stored = stored.expect("compressing does not panic");
        let size = stored.len() as u64;
        self.put_once(&key, stored.into(), SameContent::Compressed { limit: PART_BYTES_MAX + PART_BYTES }).await?;
        Ok(size)
    }

    /// Puts the manifest of a base: from now on there is one.
    ///
    /// # Errors
    /// Of the store.
    pub(super) async fn put_base_manifest(&self, manifest: &Manifest) -> Result<Created, RepoError> {
        let mut json = serde_json::to_vec_pretty(manifest).expect("a manifest becomes JSON");
        json.push(b'\n');
        let key = self.layout().base_manifest(manifest.database, &manifest.label);
        self.put_once(&key, json.into(), SameContent::Verbatim).await
    }

    /// The bases of a database, in the order of their places.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if a manifest cannot be read; of the store.
    pub async fn bases(&self, database: Oid) -> Result<Vec<Manifest>, RepoError> {
        let folder = self.layout().bases_folder(database);
        let (_, labels) = self.children(folder.clone()).await?;
        let labels = labels.iter().filter_map(|name| name.strip_prefix(&folder)?.strip_suffix('/'));
        let read = |label: &str| {
            let key = self.layout().base_manifest(database, label);
            async move {
                let json = match self.store().read(&key, Some(0..MANIFEST_BYTES_MAX)).await {
                    Ok(json) => json,
                    Err(StoreError::NotFound { .. }) => return Ok(None), // one that was not finished
                    Err(error) => return Err(error.into()),
                };
                let damaged = |problem: String| RepoError::Damaged { key: key.clone(), problem };
                let manifest: Manifest = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
                match manifest.format {
                    FORMAT => Ok(Some(manifest)),
                    format => Err(RepoError::UnknownFormat { key: key.clone(), format }),
                }
            }
        };
        let labels: Vec<_> = labels.map(read).collect();
        let mut bases: Vec<Manifest> = stream::iter(labels)
            .buffered(SMALL_READS_MAX)
            .try_filter_map(|base| async { Ok(base) })
            .try_collect()
            .await?;
        bases.sort_by_key(|base| (base.consistent, base.ended_at));
        Ok(bases)
    }

    /// An object of a base, as text: at most `limit` bytes.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn base_object(&self, key: String, limit: usize) -> Result<Vec<u8>, RepoError> {
        let stored = self.store().read(&key, None).await?;
        let read = tokio::task::spawn_blocking(move || frame::decompress(&stored, limit)).await;
        let read = read.expect("decompressing does not panic");
        read.map_err(|error| RepoError::Damaged { key, problem: error.to_string() })
    }
}

pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
