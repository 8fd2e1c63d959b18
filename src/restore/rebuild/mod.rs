//! A database from a logical base and the change log behind it, in another server.
//!
//! ```text
//! plan       target, bases, change log -> which base, up to which commit, what that changes        (reads the log once)
//! run        schema, rows, changes in the order of their commits, sequences, indexes; counts verified  (reads it again)
//! post_data  pg_dump's script of indexes and constraints -> statements, and which run beside each other          (pure)
//! apply      changes -> the server, many transactions at once
//! net        changes of a table -> what they come to, row by row                                (pure)
//! follow     messages -> what they mean, transaction by transaction                                 (pure)
//! sql        a change of a row -> the statement that repeats it                                     (pure)
//! private    a server of its own, if no database is named
//! spill      changes of transactions that were sent before their commit, until that comes
//! ```

mod apply;
mod follow;
mod net;
pub mod plan;
mod post_data;
pub mod private;
pub mod run;
mod spill;
mod sql;

use std::io;

use crate::capture::CaptureError;
use crate::pg::{Lsn, PgTime};
use crate::repo::RepoError;

/// A database could not be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// Of the repository.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// Of the server into which it goes.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// There is no base before the target.
    #[error("no base is old enough for {target}{}", oldest.map(|at| format!("; the oldest is as of {at}")).unwrap_or_default())]
    NoBase {
        /// The target, for people.
        target: String,
        /// As of when the oldest base is.
        oldest: Option<Lsn>,
    },
    /// No database was named, and there is not exactly one.
    #[error("{0}")]
    Database(String),
    /// The target cannot be reached.
    #[error("{problem}")]
    Unreachable {
        /// Why, for people.
        problem: String,
        /// The last commit that is known.
        latest: Option<PgTime>,
    },
    /// A kind of target that a change log does not know.
    #[error("a change log knows no {0}")]
    Target(&'static str),
    /// Changes are missing on the way to the target.
    #[error("changes from {from} to {to} are missing")]
    Missing {
        /// From here ...
        from: Lsn,
        /// ... to here.
        to: Lsn,
    },
    /// What would be rebuilt is not what was there, and nobody said that this will do.
    #[error("it cannot be rebuilt whole: {}", .0.join("; "))]
    Partial(Vec<String>),
    /// The database into which it goes is not empty.
    #[error("database {database} is not empty: it has {found}")]
    NotEmpty {
        /// Its name.
        database: String,
        /// Something that it has.
        found: String,
    },
    /// It was begun with another base, up to another moment, or with other tables.
    #[error("database {database} holds another rebuild, up to {stop}")]
    Other {
        /// The database's name.
        database: String,
        /// A base with which it can be gone on with.
        label: String,
        /// The place up to which it goes.
        stop: String,
    },
    /// Somebody wants tables that there are not.
    #[error("base {label} has no table `{pattern}`")]
    NoTable {
        /// The base.
        label: String,
        /// What was meant to name them.
        pattern: String,
    },
    /// Another rebuild works there.
    #[error("another rebuild works in database {database}")]
    Busy {
        /// Its name.
        database: String,
    },
    /// The server into which it goes has not all extensions.
    #[error("the target's server does not have extension {}", .0.join(", "))]
    Extensions(Vec<String>),
    /// The server into which it goes is too old.
    #[error("PostgreSQL {target} is older than {source_major}, from which this base was taken")]
    Older {
        /// Of the target.
        target: u32,
        /// Of the base.
        source_major: u32,
    },
    /// The server refuses a statement.
    #[error("{doing}: {problem}")]
    Refused {
        /// What was done, a verb.
        doing: String,
        /// What the server said.
        problem: String,
    },
    /// A change finds no row, or more than one.
    #[error(
        "a statement that should change {wanted} rows of {table} changed {rows}, in the transaction that committed at {commit}"
    )]
    Rows {
        /// The table.
        table: String,
        /// Rows that should be touched.
        wanted: u64,
        /// Rows that were.
        rows: u64,
        /// The transaction.
        commit: Lsn,
    },
    /// A table has another number of rows than it should.
    #[error("{} rows are not what they should be: {}", tables.len(), tables.join("; "))]
    Counts {
        /// The tables, with both numbers.
        tables: Vec<String>,
    },
    /// A message of the log cannot be used.
    #[error("the change log at {at}: {problem}")]
    Damaged {
        /// Where.
        at: Lsn,
        /// What is wrong.
        problem: String,
    },
    /// A local file cannot be written or read.
    #[error("keep changes in {path}")]
    Spill {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Somebody stopped it.
    #[error("stopped; the same command goes on where it stopped")]
    Cancelled,
}

impl RebuildError {
    /// True if the same may work later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Repo(error) => error.is_transient(),
            Self::Capture(error) => error.is_transient(),
            _ => false,
        }
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Repo(error) => return error.hint(),
            Self::Capture(error) => return error.hint(),
            Self::NoBase { .. } => "take one with `walguard backup`; `walguard list` shows those that there are",
            Self::Database(_) => "name the database with --database, or in the connection string",
            Self::Unreachable { latest: Some(latest), .. } => {
                return Some(format!("the last commit that is known is of {latest}; `--to latest` takes everything"));
            }
            Self::Unreachable { .. } => "`walguard list` shows from when to when changes are kept",
            Self::Target(_) => "it takes `latest`, a time, an LSN, `xid:...` or `before:INCIDENT`",
            Self::Missing { .. } => {
                "moments before that can be reached; for those behind it, name a base that is younger with --backup"
            }
            Self::Partial(_) => {
                "choose a moment before that, or say --partial: what can be rebuilt is, and the report says what is not"
            }
            Self::Other { label, stop, .. } => {
                return Some(format!(
                    "go on with that one with --to {stop} --backup {label} (and the --only that it was begun with), or begin \
                     anew in an empty place"
                ));
            }
            Self::NotEmpty { .. } => "make an empty one: CREATE DATABASE ... TEMPLATE template0",
            Self::NoTable { .. } => {
                "write it as `table` or `schema.table`, with * for any text; --dry-run without --only lists the tables"
            }
            Self::Busy { .. } => {
                "wait until it is done, or end its sessions; the same command goes on with what it left"
            }
            Self::Extensions(_) => {
                "install what brings them and repeat the command, or say --partial: then they and what needs them are left out, \
                 and named"
            }
            Self::Older { .. } => "rebuild it in a server of the same or a newer major version",
            Self::Refused { .. } => {
                "mend what the server complains of (an extension, a role, a privilege) and repeat the command: it goes on \
                 where it stopped"
            }
            Self::Rows { .. } | Self::Counts { .. } => {
                "the base and its changes do not fit together; please report it. Another base may do: --backup"
            }
            Self::Damaged { .. } => "a base behind that place does not need it: --backup",
            Self::Spill { .. } => "make room there, or choose another place with --spool",
            Self::Cancelled => return None,
        };
        Some(text.to_owned())
    }
}
