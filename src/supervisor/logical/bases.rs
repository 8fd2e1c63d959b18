//! The loop that takes logical bases: when there is none, when changes were lost, after changes of definitions, and on
//! schedule.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::capture::{ConnInfo, logical};
use crate::pg::{Oid, Position};
use crate::progress::Silent;
use crate::repo::Repository;
use crate::repo::bases::{self, BaseError, Manifest, Request};
use crate::repo::retention::Keep;
use crate::serve::status::{Board, LastBackup, Trouble};
use crate::supervisor::backups::{OnBoard, RETRY};
use crate::supervisor::schedule::Schedule;

/// After a change of definitions more of them follow mostly: a base waits until there was none for so long ...
const QUIET: Duration = Duration::from_secs(60);

/// ... and is not taken sooner than so long after the one before.
const PAUSE: Duration = Duration::from_secs(900);

/// Connections that read rows at once: a managed server may have few, and others need them.
const JOBS: usize = 2;

/// Why a base is wanted before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Wanted {
    /// Changes were lost: nothing behind that can be rebuilt without.
    Lost,
    /// Definitions changed: what follows cannot be rebuilt without.
    Definitions(Timestamp),
}

/// What the loop works with.
#[derive(Debug)]
pub(in crate::supervisor) struct Bases {
    pub(in crate::supervisor) conninfo: ConnInfo,
    pub(in crate::supervisor) repo: Repository,
    pub(in crate::supervisor) database: Oid,
    pub(in crate::supervisor) schedule: Schedule,
    pub(in crate::supervisor) level: i32,
    pub(in crate::supervisor) publications: logical::Config,
    pub(in crate::supervisor) bin_dir: Option<PathBuf>,
    /// What is kept; all if nothing is said.
    pub(in crate::supervisor) keep: Keep,
    pub(in crate::supervisor) board: Board,
    pub(in crate::supervisor) wanted: watch::Sender<Option<Wanted>>,
}

impl Bases {
    pub(in crate::supervisor) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut wanted = self.wanted.subscribe();
        let mut failures = 0;
        let mut last: Option<Option<Timestamp>> = None;
        loop {
            let Some(newest) = last else {
                match stop.run_until_cancelled(self.repo.bases(self.database)).await {
                    None => return Ok(()),
                    Some(Ok(bases)) => {
                        let newest = bases.last();
                        newest.into_iter().for_each(|base| self.tell_last(base));
                        last = Some(newest.map(|base| base.time));
                    }
                    Some(Err(error)) => {
                        failures += 1;
                        self.tell_trouble(&error, error.hint());
                        let _ = stop.run_until_cancelled(tokio::time::sleep(RETRY.pause(failures))).await;
                    }
                }
                if stop.is_cancelled() {
                    return Ok(());
                }
                continue;
            };
            let now = Timestamp::now();
            let reason = *wanted.borrow_and_update();
            let scheduled = self.schedule.next(newest, now);
            let due = match reason {
                None => scheduled,
                Some(reason) => Some(due(reason, newest).min(scheduled.unwrap_or(Timestamp::MAX))),
            };
            self.board.update(|s| s.backups.next_at = due);
            if due.is_none_or(|due| due > now) {
                // The clock may be set meanwhile: look again at least once a minute.
                let wait = due.map(|due| Duration::try_from(due.duration_since(now)).unwrap_or_default());
                let wait = wait.map_or(Duration::from_secs(60), |wait| wait.min(Duration::from_secs(60)));
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    _ = wanted.changed() => {}
                    () = tokio::time::sleep(wait) => {}
                }
                continue;
            }
            tracing::info!(?reason, "taking a logical base");
            let (level, publications, bin_dir) = (self.level, self.publications.clone(), self.bin_dir.clone());
            let request = Request { label: None, bin_dir, jobs: JOBS, level, publications };
            let progress = OnBoard::new(self.board.clone());
            let taken = Box::pin(bases::take(&self.repo, &self.conninfo, &request, &progress, &stop)).await;
            drop(progress);
            match taken {
                Ok(base) => {
                    failures = 0;
                    last = Some(Some(base.time));
                    tracing::info!(label = base.label, stored_bytes = base.stored_bytes, at = %base.consistent, "base taken");
                    for left_out in &base.left_out {
                        tracing::warn!("not in base {}: {left_out}", base.label);
                    }
                    self.tell_last(&base);
                    self.expire(&stop).await;
                    self.wanted.send_if_modified(|w| {
                        let same = *w == reason;
                        if same {
                            *w = None;
                        }
                        same
                    });
                    if reason == Some(Wanted::Lost) {
                        self.board.clear("gap"); // what follows the hole can be rebuilt again
                    }
                }
                Err(BaseError::Cancelled) => return Ok(()),
                Err(error) => {
                    failures += 1;
                    let pause = RETRY.pause(failures);
                    self.tell_trouble(&error, error.hint());
                    tracing::error!(hint = error.hint(), ?pause, "failed to take a base: {}", Chain(&error));
                    let _ = stop.run_until_cancelled(tokio::time::sleep(pause)).await;
                    if stop.is_cancelled() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Removes what the settings do not keep. What fails is tried again after the next base.
    async fn expire(&self, stop: &CancellationToken) {
        if self.keep.keep_backups.is_none() && self.keep.keep_for.is_none() {
            return;
        }
        let expired = async {
            let plans = self.repo.plan_expire_bases(&self.keep, Timestamp::now()).await?;
            self.repo.expire_bases(&plans, &Silent, stop).await
        };
        match expired.await {
            Ok(expired) => tracing::info!(objects = expired.objects, bytes = expired.bytes, "removed what is not kept"),
            Err(error) => tracing::warn!(hint = error.hint(), "failed to remove what is not kept: {}", Chain(&error)),
        }
    }

    fn tell_last(&self, base: &Manifest) {
        let last = LastBackup {
            label: base.label.clone(),
            at: base.time,
            stored_bytes: base.stored_bytes,
            start: Position { timeline: base.timeline, lsn: base.consistent },
            bad_pages: 0,
        };
        self.board.update(|s| {
            s.backups.last = Some(last);
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

/// When a base is taken that is wanted, with the newest as of `last`.
fn due(wanted: Wanted, last: Option<Timestamp>) -> Timestamp {
    match wanted {
        Wanted::Lost => Timestamp::MIN,
        Wanted::Definitions(changed) => {
            let quiet = changed.checked_add(QUIET).unwrap_or(Timestamp::MAX);
            let paused = last.map(|last| last.checked_add(PAUSE).unwrap_or(Timestamp::MAX));
            quiet.max(paused.unwrap_or(quiet))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_definitions_are_waited_out_and_lost_changes_are_not() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        assert_eq!(due(Wanted::Lost, Some(at(10_000))), Timestamp::MIN);
        assert_eq!(due(Wanted::Definitions(at(10_000)), None), at(10_060));
        assert_eq!(due(Wanted::Definitions(at(10_000)), Some(at(5_000))), at(10_060));
        assert_eq!(due(Wanted::Definitions(at(10_000)), Some(at(9_900))), at(10_800));
    }
}
