//! What can go wrong with a repository, and what the user can do about it.

use super::cluster::{FORMAT, Mismatch};
use super::store::{S3ConfigError, StoreError};

/// The repository could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RepoError {
    /// The settings cannot work.
    #[error("{problem}")]
    Config {
        /// What is wrong.
        problem: String,
        /// What the user can do about it.
        hint: String,
    },
    /// The store failed or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key holds other content than the one that should be written there: somebody else archives here.
    #[error("`{key}` already holds something else")]
    Conflict {
        /// The key.
        key: String,
    },
    /// An object does not give its content back, or not a possible one.
    #[error("`{key}` is damaged: {problem}")]
    Damaged {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The place belongs to another cluster.
    #[error("{url} belongs to another cluster: {mismatch}")]
    WrongCluster {
        /// The place.
        url: String,
        /// In what they differ.
        mismatch: Mismatch,
    },
    /// The place was never initialised.
    #[error("{url} is not initialised")]
    NotInitialized {
        /// The place.
        url: String,
    },
    /// The place was initialised, and is not any more.
    #[error("{url} was initialised, and now nothing is there")]
    Vanished {
        /// The place.
        url: String,
    },
    /// A newer walguard wrote here.
    #[error("`{key}` has format {format}; this version of walguard knows format {FORMAT}")]
    UnknownFormat {
        /// The key.
        key: String,
        /// Its format.
        format: u32,
    },
}

impl RepoError {
    pub(super) fn config(error: S3ConfigError) -> Self {
        Self::Config { problem: error.problem, hint: error.hint }
    }

    /// True if the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Vanished { .. }) || matches!(self, Self::Store(error) if error.is_transient())
    }

    /// True if the object asked for does not exist.
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_not_found())
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Config { hint, .. } => hint,
            Self::Store(error) => return error.hint(),
            Self::Conflict { .. } => {
                "two agents or two clusters write to one place: stop one, or give it a name of its own with `--cluster`; \
                 `walguard list` shows what lies here"
            }
            Self::Damaged { .. } => {
                "`walguard verify` names everything that is damaged, and what that makes unreachable"
            }
            Self::WrongCluster { mismatch: Mismatch::Major { .. }, .. } => {
                "after an upgrade to another major version a new place is needed: give it a name with `--cluster`, for \
                 example one that ends with the version; the old place stays restorable"
            }
            Self::WrongCluster { .. } => "give this cluster a name of its own with `--cluster` or WALGUARD_CLUSTER",
            Self::NotInitialized { .. } => {
                "check the URL and the cluster's name (`--repo`, `--cluster`), and whether a folder is mounted; a new place is \
                 made by `walguard init`"
            }
            Self::Vanished { .. } => {
                "look whether its file system is mounted, or the place was moved or emptied; the agent goes on when it is \
                 back. If it was given up, `walguard init` makes it anew, and a new base backup follows"
            }
            Self::UnknownFormat { .. } => "use the version of walguard that wrote it, or a newer one",
        };
        Some(hint.to_owned())
    }
}
