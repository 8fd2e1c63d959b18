//! What can keep a restore from being done.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::directory;
use super::extract::ExtractError;
use super::rebuild::RebuildError;
use super::target::TargetError;
use super::wal_fetch::FetchError;
use crate::pg::{Lsn, PgTime, TimelineId};
use crate::repo::RepoError;
use crate::repo::backup::BackupError;
use crate::repo::catalog::Missing;

/// A moment that a restore can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Moment {
    /// Given as `--to LSN` it reaches just this moment.
    pub lsn: Lsn,
    /// The server's clock then, where that is known.
    pub time: Option<PgTime>,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.time {
            Some(time) => write!(f, "{time} (LSN {})", self.lsn),
            None => write!(f, "LSN {}", self.lsn),
        }
    }
}

/// The reachable moments that are nearest to one that is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Nearest {
    /// The last one before it.
    pub before: Option<Moment>,
    /// The first one behind it.
    pub after: Option<Moment>,
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.before, self.after) {
            (Some(before), Some(after)) => write!(f, "the nearest reachable moments are {before} and {after}"),
            (Some(before), None) => write!(f, "the nearest reachable moment is {before}, and none lies behind it"),
            (None, Some(after)) => write!(f, "the nearest reachable moment is {after}, and none lies before it"),
            (None, None) => f.write_str("no moment is reachable"),
        }
    }
}

/// A restore was refused, or failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The repository cannot be read.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The changes of a database cannot be made a database again.
    #[error(transparent)]
    Rebuild(Box<RebuildError>),
    /// The base backup cannot be read.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The base backup cannot be extracted.
    #[error(transparent)]
    Extract(#[from] ExtractError),
    /// WAL that the plan found cannot be placed before the server.
    #[error(transparent)]
    Wal(#[from] FetchError),
    /// The target cannot be understood.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// No backup can be the beginning of the restore.
    #[error("{problem}")]
    NoBackup {
        /// Why.
        problem: String,
    },
    /// There is no such timeline, or its history is not known.
    #[error("{problem}")]
    Timeline {
        /// What is wrong.
        problem: String,
        /// Those that are there.
        known: Vec<TimelineId>,
    },
    /// The target lies where nothing can be restored.
    #[error("{problem}; {nearest}")]
    Unreachable {
        /// Why.
        problem: String,
        /// What can be reached instead.
        nearest: Nearest,
        /// More WAL may make it reachable.
        not_yet: bool,
    },
    /// WAL between the backup and the target is not in the repository.
    #[error("{missing}; {nearest}")]
    MissingWal {
        /// What.
        missing: Missing,
        /// What can be reached without it.
        nearest: Nearest,
    },
    /// WAL between the backup and the target cannot be read.
    #[error("WAL segment {segment} is unusable: {problem}; {nearest}")]
    DamagedWal {
        /// The segment's name.
        segment: String,
        /// What is wrong with it.
        problem: String,
        /// What can be reached without it.
        nearest: Nearest,
    },
    /// What was to be the target is nowhere in the WAL.
    #[error("{what} is not in the archived WAL from {from} to {to}")]
    NotInWal {
        /// A transaction or a name.
        what: String,
        /// Where the search began.
        from: Lsn,
        /// Where it ended.
        to: Lsn,
    },
    /// The target names several places.
    #[error("there are {} restore points `{name}`", .places.len())]
    AmbiguousName {
        /// The name.
        name: String,
        /// Where they end, and when they were made.
        places: Vec<Moment>,
    },
    /// The cluster's major version is unknown to this walguard.
    #[error("PostgreSQL {major} is not supported")]
    UnsupportedMajor {
        /// The major version.
        major: u32,
    },
    /// PostgreSQL does not run as root, and a restored directory must belong to its user.
    #[error("a restore cannot run as root, because PostgreSQL does not")]
    Root,
    /// The target directory cannot be used.
    #[error("{}: {problem}", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        problem: String,
        /// What the operator can do.
        hint: String,
    },
    /// PostgreSQL's programs of the backup's major version are not there.
    #[error("the programs of PostgreSQL {major} are not found ({problem})")]
    Binaries {
        /// The major version that is needed.
        major: u32,
        /// Where they were looked for, or what is wrong with those found.
        problem: String,
    },
    /// An option makes no sense for this backup.
    #[error("{problem}")]
    Option {
        /// What is wrong.
        problem: String,
        /// What to give instead.
        hint: String,
    },
    /// The restored server ended, or did not do what it was asked to.
    #[error("{problem}; {log_end}")]
    Server {
        /// What happened.
        problem: String,
        /// The last lines of its log, introduced.
        log_end: String,
        /// The whole log.
        log: PathBuf,
        /// Its disk has no room: it cannot even have said so in its log.
        is_disk_full: bool,
    },
    /// The restored server runs, and cannot be asked.
    #[error("the restored server cannot be asked: {problem}")]
    Asking {
        /// What it says, or why it says nothing.
        problem: String,
    },
    /// A limit was reached.
    #[error("{problem}")]
    Limit {
        /// Which, and what was reached.
        problem: String,
        /// Which setting or flag changes it.
        hint: String,
    },
    /// The restored server stands elsewhere than planned.
    #[error("recovery ended elsewhere than planned: {problem}")]
    NotAsPlanned {
        /// What differs.
        problem: String,
        /// The server's log.
        log: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("{action} {}", .path.display())]
    File {
        /// What was tried, a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

/// For whoever has no room on the way.
pub(super) const MAKE_ROOM: &str = "make room, and run the same command again: it goes on with what is there";

/// With less room on its disk (in bytes) a server may have ended for want of it: of its segments each has 16 MiB.
const LITTLE_ROOM: u64 = 32 << 20;

impl RestoreError {
    /// That a server failed whose log ends with `log_tail`.
    pub(super) fn server(problem: String, log_tail: &str, log: &Path) -> Self {
        let log_end = match log_tail.trim() {
            "" => "its log says nothing".to_owned(),
            tail => format!("the end of its log:\n{tail}"),
        };
        let is_disk_full = directory::free_bytes(log).is_some_and(|free| free < LITTLE_ROOM);
        Self::Server { problem, log_end, log: log.to_owned(), is_disk_full }
    }

    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    /// True if somebody asked to stop, and nothing is wrong.
    pub const fn is_cancelled(&self) -> bool {
        match self {
            Self::Cancelled | Self::Extract(ExtractError::Cancelled | ExtractError::Backup(BackupError::Cancelled)) => {
                true
            }
            Self::Rebuild(error) => matches!(**error, RebuildError::Cancelled),
            _ => false,
        }
    }

    /// True if the same restore may work later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Repo(error) => error.is_transient(),
            Self::Rebuild(error) => error.is_transient(),
            Self::Backup(error) => error.is_transient(),
            Self::Extract(error) => error.is_transient(),
            Self::Wal(error) => error.is_transient(),
            Self::Unreachable { not_yet, .. } => *not_yet,
            _ => false,
        }
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Repo(error) => return error.hint(),
            Self::Rebuild(error) => return error.hint(),
            Self::Backup(error) => return error.hint(),
            Self::Extract(error) => return error.hint(),
            Self::Wal(error) => return error.hint(),
            Self::Target(error) => return error.hint(),
            Self::NoBackup { .. } => "`walguard list` shows backups and what can be restored from them".to_owned(),
            Self::Timeline { known, .. } => {
                let known: Vec<_> = known.iter().map(ToString::to_string).collect();
                format!("the repository holds the timelines {}; choose one with --timeline", known.join(", "))
            }
            Self::Unreachable { nearest, not_yet: true, .. } => match nearest.before {
                Some(moment) => format!(
                    "if the agent runs, try again in a moment; everything that is archived now: --to latest (up to {moment})"
                ),
                None => "if the agent runs, try again in a moment".to_owned(),
            },
            Self::Unreachable { nearest, .. }
            | Self::MissingWal { nearest, .. }
            | Self::DamagedWal { nearest, .. } => match (nearest.before, nearest.after) {
                (Some(before), Some(after)) => {
                    format!("--to {} reaches what lies before, --to {} what lies behind", before.lsn, after.lsn)
                }
                (Some(only), None) | (None, Some(only)) => format!("--to {} reaches the nearest moment", only.lsn),
                (None, None) => "`walguard list` shows what can be restored".to_owned(),
            },
            Self::NotInWal { .. } => {
                "if it is newer than what is archived, try again in a moment; another branch of the history is searched \
                 with --timeline"
                    .to_owned()
            }
            Self::AmbiguousName { places, .. } => {
                let places: Vec<_> = places.iter().map(|place| format!("--to {} for {place}", place.lsn)).collect();
                format!("say which one by its position: {}", places.join(", "))
            }
            Self::UnsupportedMajor { .. } => "use a newer walguard".to_owned(),
            Self::Root => "run it as the user that PostgreSQL runs as: sudo -u postgres walguard restore ...".to_owned(),
            Self::Directory { hint, .. } | Self::Option { hint, .. } | Self::Limit { hint, .. } => hint.clone(),
            Self::Binaries { major, .. } => format!(
                "install PostgreSQL {major}, or name the directory of its programs with --pg-bin-dir or \
                 WALGUARD_PG_BIN_DIR; --no-start only prepares the data directory"
            ),
            Self::Server { log, is_disk_full: true, .. } => {
                format!("its disk is full: {MAKE_ROOM}. The server's log is {}", log.display())
            }
            Self::Server { log, .. } | Self::NotAsPlanned { log, .. } => {
                format!("the server's log is {}", log.display())
            }
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                MAKE_ROOM.to_owned()
            }
            Self::File { .. } | Self::Asking { .. } | Self::Cancelled => return None,
        };
        Some(hint)
    }
}

impl From<RebuildError> for RestoreError {
    fn from(error: RebuildError) -> Self {
        match error {
            RebuildError::Repo(error) => Self::Repo(error),
            RebuildError::Cancelled => Self::Cancelled,
            error => Self::Rebuild(Box::new(error)),
        }
    }
}
