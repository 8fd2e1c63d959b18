//! The loop that holds the cluster's lease: one agent archives, others wait.
//!
//! The holder's name lies in the spool, so an agent that was killed and started again on the same spool goes on at once.
//! An agent elsewhere waits until the lease ends: that is how a standby agent takes over.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::backoff::{Chain, RetryPolicy};
use crate::repo::Repository;
use crate::repo::lease::{CaughtUp, Claim, Lease};
use crate::serve::status::Board;

/// How long nobody else may archive after the last sign of life.
pub(super) const TIME_TO_LIVE: Duration = Duration::from_secs(60);

/// Three signs of life may get lost before the lease ends.
const RENEW_INTERVAL: Duration = Duration::from_secs(15);

/// Giving it back is a courtesy to the next agent: it may not hold up a stop.
const RELEASE_MAX: Duration = Duration::from_secs(3);

/// Who we are.
pub(super) fn claim(holder: &str) -> Claim {
    Claim { holder: holder.to_owned(), host: host(), pid: std::process::id(), time_to_live: TIME_TO_LIVE }
}

/// This machine's name.
pub(super) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// True for a holder that was a process of this machine and is no more.
pub(super) fn is_gone(claim: &Claim, held: &Lease) -> bool {
    held.host == claim.host
        && !Path::new("/proc").join(held.pid.to_string()).exists()
        && Path::new("/proc/self").exists()
}

/// Renews until `stop`, each time with what is proved of the archive.
///
/// # Errors
/// If somebody else took it: two agents must not work on one place.
pub(super) async fn run(
    repo: Repository,
    claim: Claim,
    mut held: Lease,
    board: Board,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut failures = 0;
    let mut pause = RENEW_INTERVAL;
    while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
        match repo.renew_lease(&claim, &held, Timestamp::now(), proved(&board)).await {
            Ok(renewed) => {
                held = renewed;
                failures = 0;
                pause = RENEW_INTERVAL;
            }
            // The store may be away for hours, and nobody else can take the lease meanwhile either.
            Err(error) if error.is_transient() => {
                failures += 1;
                pause = RetryPolicy::FOREVER.pause(failures);
                tracing::debug!(failures, "failed to renew the lease, will try again: {}", Chain(&error));
            }
            Err(error) => return Err(error).context("keep the lease"),
        }
    }
    Ok(())
}

fn proved(board: &Board) -> Option<CaughtUp> {
    let status = board.snapshot(Timestamp::now());
    let (position, time) = (status.caught_up_position?, status.caught_up_to?);
    Some(CaughtUp { position, time: time.into() })
}

/// Gives it back, so that the next agent need not wait for its end.
pub(super) async fn release(repo: &Repository, held: &Lease, board: &Board) {
    match tokio::time::timeout(RELEASE_MAX, repo.release_lease(held, Timestamp::now(), proved(board))).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("failed to give the lease back, it ends by itself: {}", Chain(&error)),
        Err(_) => tracing::warn!("the repository did not take the lease back in time; it ends by itself"),
    }
}
