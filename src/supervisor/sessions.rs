//! The loop that looks who is at work in the server, and nudges it when it holds back what an open transaction wrote.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::backoff::{Chain, RetryPolicy};
use crate::capture::{CaptureError, ConnInfo};
use crate::guard::nudge::{Decision, Nudger};
use crate::guard::{Config, Sample, Sampler, Sessions};
use crate::serve::status::{Board, Trouble};

/// A sample takes no more than this share of the time: a server with ten thousand locks is asked less often.
const SHARE: u32 = 20;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) conninfo: ConnInfo,
    pub(super) config: Config,
    pub(super) sessions: Sessions,
    pub(super) board: Board,
}

impl Watcher {
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut failures = 0;
        while !stop.is_cancelled() {
            let Some(ended) = stop.run_until_cancelled(self.watch(&mut failures)).await else { break };
            let Err(error) = ended;
            failures += 1;
            let (text, hint) = (Chain(&error).to_string(), error.hint());
            if failures == 1 {
                // Archiving does not depend on it, and the stream tells of a server that is away.
                tracing::info!("failed to see who is at work: {text}");
            }
            self.board.update(|s| {
                s.who.watching = false;
                s.who.trouble = Some(Trouble::again(s.who.trouble.as_ref(), Timestamp::now(), text, hint));
            });
            stop.run_until_cancelled(tokio::time::sleep(RetryPolicy::FOREVER.pause(failures))).await;
        }
        Ok(())
    }

    /// Watches over one connection, for as long as it lasts.
    async fn watch(&self, failures: &mut u32) -> Result<std::convert::Infallible, CaptureError> {
        let mut sampler = Sampler::connect(&self.conninfo).await?;
        let mut nudger = Nudger::default();
        loop {
            let begun = Instant::now();
            let sample = sampler.sample().await?;
            *failures = 0;
            let took = begun.elapsed();
            let decision = self.decide(&sample, &sampler, &mut nudger);
            self.tell(&sample, took);
            self.sessions.learn(sample);
            let mut wait = self.config.interval.max(took * SHARE);
            match decision {
                Decision::Rest => {}
                Decision::Look(soon) => wait = wait.min(soon),
                Decision::Nudge => {
                    if let Some(means) = sampler.nudge().await? {
                        tracing::debug!(?means, "nudged the server");
                        self.board.update(|s| s.who.nudges_total += 1);
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.sessions.wanted() => {}
            }
        }
    }

    fn decide(&self, sample: &Sample, sampler: &Sampler, nudger: &mut Nudger) -> Decision {
        let (Some(inserted), Some(flushed), Some(means)) = (sample.inserted, sample.flushed, sampler.means()) else {
            return Decision::Rest;
        };
        if !self.config.nudge {
            return Decision::Rest;
        }
        nudger.decide(inserted, flushed, sample.has_open_transaction(), means.apart(), Instant::now())
    }

    fn tell(&self, sample: &Sample, took: Duration) {
        self.board.update(|s| {
            s.who.watching = true;
            s.who.sees_all = sample.sees_all;
            s.who.open_transactions = sample.sessions.iter().filter(|session| session.xid.is_some()).count() as u64;
            s.who.sample_seconds = took.as_secs_f64();
            s.who.trouble = None;
        });
    }
}
