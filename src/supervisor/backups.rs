//! The loop that takes base backups: when there is none, when WAL was lost, and on schedule.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::schedule::Schedule;
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::{ConnInfo, Walsender};
use crate::progress::{Progress, Silent};
use crate::repo::Repository;
use crate::repo::backup::{self, BackupError, Request};
use crate::repo::catalog::BackupInfo;
use crate::repo::retention::Keep;
use crate::serve::status::{Board, LastBackup, RunningBackup, Trouble};

/// After a backup that failed. A backup is expensive, and what made it fail often lasts.
pub(super) const RETRY: RetryPolicy =
    RetryPolicy { attempts_max: None, pause_min: Duration::from_secs(5), pause_max: Duration::from_secs(15 * 60) };

/// How long a new backup may wait for its WAL before old ones stay for its sake.
const WAL_PATIENCE: Duration = Duration::from_secs(10 * 60);

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Backups {
    pub(super) conninfo: ConnInfo,
    pub(super) repo: Repository,
    pub(super) config: backup::Config,
    pub(super) schedule: Schedule,
    /// What is kept when a new one is there.
    pub(super) keep: Keep,
    pub(super) board: Board,
    /// Why one is needed now.
    pub(super) wanted: watch::Sender<Option<String>>,
}

impl Backups {
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut wanted = self.wanted.subscribe();
        let mut failures = 0;
        let mut last: Option<Timestamp> = None;
        let mut known = false;
        loop {
            if !known {
                match stop.run_until_cancelled(self.repo.backups()).await {
                    None => return Ok(()),
                    Some(Ok(backups)) => {
                        let newest = backups.iter().max_by_key(|b| b.stop_time);
                        last = newest.map(|b| b.start_time.timestamp());
                        self.tell_last(newest);
                        known = true;
                    }
                    Some(Err(error)) => {
                        failures += 1;
                        self.tell_trouble(&error, error.hint());
                        pause(RETRY.pause(failures), &stop).await;
                        if stop.is_cancelled() {
                            return Ok(());
                        }
                        continue;
                    }
                }
            }
            let now = Timestamp::now();
            let reason = wanted.borrow_and_update().clone();
            let due = self.schedule.next(last, now);
            self.board.update(|s| s.backups.next_at = due);
            let is_due = reason.is_some() || due.is_some_and(|due| due <= now);
            if !is_due {
                // The clock may be set meanwhile: look again at least once a minute.
                let wait = due.map_or(Duration::from_secs(60), |due| {
                    Duration::try_from(due.duration_since(now)).unwrap_or_default().min(Duration::from_secs(60))
                });
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    _ = wanted.changed() => {}
                    () = tokio::time::sleep(wait) => {}
                }
                continue;
            }
            tracing::info!(reason = reason.as_deref().unwrap_or("it is due"), "taking a base backup");
            match Box::pin(self.take(&stop)).await {
                Ok(info) => {
                    failures = 0;
                    known = false; // the repository says what there is now
                    tracing::info!(label = info.label, stored_bytes = info.stored_bytes, "base backup taken");
                    self.wanted.send_if_modified(|w| {
                        let same = *w == reason;
                        if same {
                            *w = None;
                        }
                        same
                    });
                    Box::pin(self.expire(&info, &stop)).await;
                    if reason.is_some() {
                        // What follows the hole can be restored again.
                        self.board.clear("gap");
                        self.board.clear("diverged");
                    }
                }
                Err(BackupError::Cancelled) => return Ok(()),
                Err(error) => {
                    failures += 1;
                    let pause_for = RETRY.pause(failures);
                    self.tell_trouble(&error, error.hint());
                    tracing::error!(hint = error.hint(), ?pause_for, "failed to take a base backup: {}", Chain(&error));
                    pause(pause_for, &stop).await;
                    if stop.is_cancelled() {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn take(&self, stop: &CancellationToken) -> Result<BackupInfo, BackupError> {
        // Shown under a name of its own: `synchronous_standby_names` must not take it for the stream.
        let conninfo =
            self.conninfo.clone().with_application_name(&format!("{}-backup", self.conninfo.application_name()));
        let connected = stop.run_until_cancelled(Walsender::connect(&conninfo)).await.ok_or(BackupError::Cancelled)?;
        let progress = OnBoard::new(self.board.clone());
        let request = Request::default();
        let taking = backup::run(&self.repo, connected?, &self.config, &request, &progress, stop);
        let taken = Box::pin(taking).await?;
        if taken.info.bad_pages > 0 {
            let hint = "see `walguard list` for where they are, and check the disk under the server".to_owned();
            let text = format!("base backup {} holds {} damaged pages", taken.info.label, taken.info.bad_pages);
            self.board.raise("pages", text, Some(hint));
        } else {
            self.board.clear("pages");
        }
        Ok(taken.info)
    }

    /// Removes what the settings do not keep, once the new backup can be restored. What fails is tried again after the
    /// next backup.
    async fn expire(&self, backup: &BackupInfo, stop: &CancellationToken) {
        if self.keep.keep_backups.is_none() && self.keep.keep_for.is_none() {
            return;
        }
        if let Err(error) = backup::wait_for_wal(&self.repo, backup, Some(WAL_PATIENCE), stop).await {
            tracing::warn!("removed no old backups, the new one cannot be restored yet: {}", Chain(&error));
            return;
        }
        let expired = async {
            let plan = self.repo.plan_expire(&self.keep, Timestamp::now()).await?;
            for remark in &plan.remarks {
                tracing::warn!("{remark}");
            }
            self.repo.expire(&plan, &Silent, stop).await
        };
        match expired.await {
            Ok(expired) => tracing::info!(objects = expired.objects, bytes = expired.bytes, "removed what is not kept"),
            Err(error) => tracing::warn!(hint = error.hint(), "failed to remove what is not kept: {}", Chain(&error)),
        }
    }

    fn tell_last(&self, newest: Option<&BackupInfo>) {
        let last = newest.map(|b| LastBackup {
            label: b.label.clone(),
            at: b.stop_time.timestamp(),
            stored_bytes: b.stored_bytes,
            start: b.start_position(),
            bad_pages: b.bad_pages,
        });
        self.board.update(|s| {
            s.backups.last = last;
            s.backups.trouble = None;
        });
    }

    fn tell_trouble(&self, error: &dyn std::error::Error, hint: Option<String>) {
        let text = Chain(error).to_string();
        self.board.update(|s| {
            s.backups.trouble = Some(Trouble::again(s.backups.trouble.as_ref(), Timestamp::now(), text, hint));
        });
    }
}

async fn pause(duration: Duration, stop: &CancellationToken) {
    let _ = stop.run_until_cancelled(tokio::time::sleep(duration)).await;
}

/// Shows on the board how far a backup is.
pub(super) struct OnBoard {
    board: Board,
}

impl fmt::Debug for OnBoard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnBoard").finish_non_exhaustive()
    }
}

impl Progress for OnBoard {
    fn begin(&self, _: &str, bytes_total: Option<u64>) {
        self.board.update(|s| {
            let since = s.backups.running.as_ref().map_or_else(Timestamp::now, |r| r.since);
            s.backups.running = Some(RunningBackup { since, bytes_done: 0, bytes_total });
        });
    }

    fn set_total(&self, bytes_total: u64) {
        self.change(|r| r.bytes_total = Some(bytes_total));
    }

    fn advance(&self, bytes: u64) {
        self.change(|r| r.bytes_done += bytes);
    }

    fn note(&self, _: &str) {}

    fn end(&self) {}
}

impl OnBoard {
    pub(super) const fn new(board: Board) -> Self {
        Self { board }
    }

    fn change(&self, change: impl FnOnce(&mut RunningBackup)) {
        self.board.update(|s| s.backups.running.as_mut().map_or((), change));
    }
}

impl Drop for OnBoard {
    fn drop(&mut self) {
        self.board.update(|s| s.backups.running = None);
    }
}
