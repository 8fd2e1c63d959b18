//! What can go wrong with a base backup.

use crate::capture::CaptureError;
use crate::pg::Lsn;
use crate::pg::TimelineId;
use crate::repo::RepoError;

/// A base backup could not be taken or read.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The server or the connection failed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The repository failed.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The server sent something that is not a tar as Postgres writes it.
    #[error("read the tar `{archive}` at byte {offset}: {problem}")]
    Tar {
        /// `base`, or a tablespace's OID.
        archive: String,
        /// Where in the tar.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The server sent the parts of a backup in an order that cannot be.
    #[error("follow the base backup: {0}")]
    Stream(&'static str),
    /// The label cannot be one.
    #[error("`{0}` cannot be the label of a backup: it takes 1 to 128 of A-Z a-z 0-9 . _ -, and no dot first")]
    Label(String),
    /// There is a backup with this label, or what an interrupted one left.
    #[error("the repository holds something under the label `{0}` already")]
    LabelTaken(String),
    /// There is no such backup.
    #[error("there is no backup `{0}`")]
    NoBackup(String),
    /// What is stored of a backup is not what was written.
    #[error("`{key}` is damaged: {problem}")]
    Damaged {
        /// The object.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The WAL that a backup needs was not archived in time. The backup is there, but cannot be restored yet.
    #[error("the WAL from {from} to {to} of timeline {timeline}, which the backup needs, is not archived yet")]
    WalMissing {
        /// The backup's timeline.
        timeline: TimelineId,
        /// First missing byte.
        from: Lsn,
        /// The byte after the last one missing.
        to: Lsn,
    },
    /// Somebody asked to stop.
    #[error("the backup was stopped on request")]
    Cancelled,
}

impl BackupError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Capture(error) => error.hint(),
            Self::Repo(error) => error.hint(),
            Self::Label(_) => Some("leave --label out: the backup is then named after the moment it begins".into()),
            Self::LabelTaken(label) => Some(format!(
                "choose another label; if `{label}` is what an interrupted backup left, `walguard expire` removes it"
            )),
            Self::NoBackup(_) => Some("see the backups that there are: walguard list".into()),
            Self::Damaged { .. } => {
                Some("see what else is damaged, and which backups are whole: walguard verify".into())
            }
            Self::WalMissing { .. } => Some(
                "let the agent archive it (walguard run), or archive_command (walguard wal-push %p); \
                 watch it with: walguard status"
                    .into(),
            ),
            Self::Tar { .. } | Self::Stream(_) | Self::Cancelled => None,
        }
    }

    /// True if the same backup may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Capture(error) => error.is_transient(),
            Self::Repo(error) => error.is_transient(),
            Self::WalMissing { .. } => true,
            _ => false,
        }
    }
}
