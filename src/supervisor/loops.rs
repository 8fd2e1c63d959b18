//! Lifetimes: one place that spawns, one token that stops, and the first loop that ends names itself.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// After a stop, loops that have not ended by now are dropped. The archiver gives itself ten seconds for what it holds.
const STOP_MAX: Duration = Duration::from_secs(15);

/// Loops that live and die together.
#[derive(Debug)]
pub(super) struct Loops {
    stop: CancellationToken,
    running: JoinSet<(&'static str, anyhow::Result<()>)>,
}

impl Loops {
    /// `stop` ends them all.
    pub(super) fn new(stop: CancellationToken) -> Self {
        Self { stop, running: JoinSet::new() }
    }

    /// Starts a loop. It is to run until its token is cancelled.
    pub(super) fn start<F, Fut>(&mut self, name: &'static str, run: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let future = run(self.stop.clone());
        self.running.spawn(async move { (name, future.await) });
    }

    /// Waits until somebody asks for a stop, or a loop ends on its own, which stops the others. Then waits for all.
    ///
    /// # Errors
    /// That of the loop that ended first, with its name. A loop that ends without an error before it should is one too.
    pub(super) async fn run(mut self) -> anyhow::Result<()> {
        let mut first: anyhow::Result<()> = Ok(());
        tokio::select! {
            () = self.stop.cancelled() => {}
            Some(ended) = self.running.join_next() => {
                first = verdict(ended).and_then(|name| match self.stop.is_cancelled() {
                    true => Ok(()),
                    false => Err(anyhow!("the {name} loop ended on its own")),
                });
            }
        }
        self.stop.cancel();
        let others = async {
            while let Some(ended) = self.running.join_next().await {
                match verdict(ended) {
                    Err(error) if first.is_ok() => first = Err(error),
                    Err(error) => tracing::error!("failed to {error:#}"),
                    Ok(_) => {}
                }
            }
        };
        if tokio::time::timeout(STOP_MAX, others).await.is_err() {
            tracing::warn!("loops that do not end are dropped: {}", self.running.len());
        }
        first
    }
}

fn verdict(ended: Result<(&'static str, anyhow::Result<()>), tokio::task::JoinError>) -> anyhow::Result<&'static str> {
    match ended {
        Ok((name, Ok(()))) => Ok(name),
        Ok((name, Err(error))) => Err(error).with_context(|| format!("run the {name} loop")),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(error.into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_fails_stops_the_others_and_names_itself() {
        let mut loops = Loops::new(CancellationToken::new());
        loops.start("archive", |stop| async move {
            stop.cancelled().await;
            Ok(())
        });
        loops.start("capture", |_| async { Err(anyhow!("slot is gone")) });
        let error = loops.run().await.unwrap_err();
        assert_eq!(format!("{error:#}"), "run the capture loop: slot is gone");
    }

    #[tokio::test]
    async fn a_loop_that_just_ends_is_an_error_too() {
        let mut loops = Loops::new(CancellationToken::new());
        loops.start("capture", |_| async { Ok(()) });
        let error = loops.run().await.unwrap_err();
        assert_eq!(format!("{error:#}"), "the capture loop ended on its own");
    }

    #[tokio::test]
    async fn a_stop_that_was_asked_for_is_no_error() {
        let stop = CancellationToken::new();
        let mut loops = Loops::new(stop.clone());
        loops.start("archive", |stop| async move {
            stop.cancelled().await;
            Ok(())
        });
        stop.cancel();
        loops.run().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_does_not_stop_is_dropped_in_the_end() {
        let stop = CancellationToken::new();
        let mut loops = Loops::new(stop.clone());
        loops.start("archive", |_| std::future::pending());
        stop.cancel();
        loops.run().await.unwrap();
    }
}
