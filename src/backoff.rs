//! Trying again: how often, how long apart, and when to stop.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How an operation that failed for a passing reason is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries in all, the first included; `None` is for ever.
    pub attempts_max: Option<u32>,
    /// Pause after the first failure; it doubles with each further one.
    pub pause_min: Duration,
    /// The pause does not grow past this.
    pub pause_max: Duration,
}

impl RetryPolicy {
    /// For loops of the agent: a store or a server may be away for hours, and comes back.
    pub const FOREVER: Self =
        Self { attempts_max: None, pause_min: Duration::from_millis(100), pause_max: Duration::from_secs(10) };

    /// For commands that a person waits for: about half a minute.
    pub const PATIENT: Self =
        Self { attempts_max: Some(8), pause_min: Duration::from_millis(200), pause_max: Duration::from_secs(10) };

    /// For whoever tries again itself, and tells of each failure.
    pub const ONCE: Self = Self { attempts_max: Some(1), ..Self::FOREVER };

    /// The pause after failure number `failures` (from 1): half fixed and half by chance, so that many agents that lost
    /// one store do not come back in step.
    pub fn pause(&self, failures: u32) -> Duration {
        self.pause_at(failures, fastrand::f64())
    }

    /// The same with the chance given, from 0 to 1.
    pub fn pause_at(&self, failures: u32, chance: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        let full = self.pause_min.saturating_mul(1 << doublings).min(self.pause_max);
        full.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }
}

/// How [`retry`] ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum RetryError<E> {
    /// The operation failed for good, or for the last time.
    #[error(transparent)]
    Failed(E),
    /// Somebody asked to stop.
    #[error("stopped on request")]
    Cancelled,
}

/// Runs `operation` until it succeeds, fails with an error that is not transient, runs out of attempts, or `cancel` is
/// cancelled. Each failure that is followed by another try is logged as a warning under `what`, a verb phrase.
///
/// # Errors
/// The operation's last error, or [`RetryError::Cancelled`].
pub async fn retry<T, E, F>(
    policy: RetryPolicy,
    cancel: &CancellationToken,
    what: &str,
    is_transient: impl Fn(&E) -> bool,
    mut operation: impl FnMut() -> F,
) -> Result<T, RetryError<E>>
where
    F: Future<Output = Result<T, E>>,
    E: std::error::Error,
{
    let mut failures = 0;
    loop {
        let result = cancel.run_until_cancelled(operation()).await.ok_or(RetryError::Cancelled)?;
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        if !is_transient(&error) || policy.attempts_max.is_some_and(|max| failures >= max) {
            return Err(RetryError::Failed(error));
        }
        let pause = policy.pause(failures);
        tracing::warn!(failures, ?pause, "failed to {what}, will try again: {}", Chain(&error));
        cancel.run_until_cancelled(tokio::time::sleep(pause)).await.ok_or(RetryError::Cancelled)?;
    }
}

/// An error with its causes in one line, `a: b: c`.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::io;

    #[tokio::test(start_paused = true)]
    async fn a_passing_trouble_is_tried_again_until_it_has_passed() {
        let tries = Cell::new(0);
        let operation = || async {
            tries.set(tries.get() + 1);
            if tries.get() < 4 { Err(io::Error::other("away")) } else { Ok(tries.get()) }
        };
        let stop = CancellationToken::new();
        let result = retry(RetryPolicy::FOREVER, &stop, "ask", |_| true, operation).await;
        assert_eq!(result.unwrap(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lasting_error_is_told_at_once() {
        let tries = Cell::new(0);
        let operation = || async {
            tries.set(tries.get() + 1);
            Err::<(), _>(io::Error::other("denied"))
        };
        let stop = CancellationToken::new();
        let result = retry(RetryPolicy::FOREVER, &stop, "ask", |_| false, operation).await;
        assert!(matches!(result, Err(RetryError::Failed(_))));
        assert_eq!(tries.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_asks_to_stop_is_heard_between_tries() {
        let stop = CancellationToken::new();
        let operation = || async {
            stop.cancel();
            Err::<(), _>(io::Error::other("away"))
        };
        let result = retry(RetryPolicy::FOREVER, &stop, "ask", |_| true, operation).await;
        assert!(matches!(result, Err(RetryError::Cancelled)));
    }

    #[test]
    fn pauses_grow_up_to_their_bound() {
        for failures in 1..100 {
            let pause = RetryPolicy::FOREVER.pause(failures);
            assert!(pause >= Duration::from_millis(50) && pause <= Duration::from_secs(10));
        }
        assert!(RetryPolicy::FOREVER.pause(50) >= Duration::from_secs(5));
    }
}
