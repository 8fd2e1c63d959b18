//! Waits until a backup can be restored: until the WAL that it needs is archived.

use std::time::Duration;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::pg::TimelineHistory;
use crate::repo::Repository;
use crate::repo::catalog::BackupInfo;
use crate::repo::catalog::CatalogScope;

use super::BackupError;

/// The first look comes soon; the agent's tails take about a second.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// When to say that something seems to be amiss.
const WARN_AFTER: Duration = Duration::from_secs(30);

/// Waits until the repository holds the WAL from the backup's start to its stop, tails included. Looks at the
/// repository every few seconds.
///
/// # Errors
/// [`BackupError::WalMissing`] after `patience` (`None`: never), [`BackupError::Cancelled`], errors of the repository
/// that do not pass.
pub async fn wait_for_wal(
    repository: &Repository,
    backup: &BackupInfo,
    patience: Option<Duration>,
    cancel: &CancellationToken,
) -> Result<(), BackupError> {
    let began = Instant::now();
    let (mut pause, mut warned) = (PAUSE_MIN, false);
    loop {
        let missing = match repository.catalog(CatalogScope::WalFrom(backup.start)).await {
            Ok(catalog) => {
                // A backup never spans timelines: the server refuses to go on with one when it is promoted.
                match catalog.covered(&TimelineHistory::root(backup.timeline), backup.start, backup.stop) {
                    Ok(()) => return Ok(()),
                    Err(missing) => {
                        BackupError::WalMissing { timeline: missing.timeline, from: missing.from, to: missing.to }
                    }
                }
            }
            Err(error) if error.is_transient() => error.into(),
            Err(error) => return Err(error.into()),
        };
        if patience.is_some_and(|patience| began.elapsed() >= patience) {
            return Err(missing);
        }
        if !warned && began.elapsed() >= WARN_AFTER {
            warned = true;
            tracing::warn!(hint = missing.hint(), "still waiting for the backup's WAL: {missing}");
        }
        cancel.run_until_cancelled(tokio::time::sleep(pause)).await.ok_or(BackupError::Cancelled)?;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}
