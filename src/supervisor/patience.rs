//! Notices a server that cannot stop because of us. Pure: time is an argument.
//!
//! A server that is shut down first brings all WAL to its walsenders' clients and waits until they confirm it, for as
//! long as they answer. When the repository is away, that would be for ever; but the slot keeps the WAL, so the server may
//! as well stop. It does not say that it wants to; what shows is how it asks: again after each answer, though nothing
//! moves. (Postgres: `WalSndDone` in `replication/walsender.c`.)

use std::time::{Duration, Instant};

use crate::pg::Lsn;

/// How long a server that wants to stop waits for the repository. Most trouble passes sooner.
pub(super) const LET_GO_AFTER: Duration = Duration::from_secs(10);

/// Answers to a server that asks again and again are no closer than this, or the two would keep a processor busy.
const ANSWERS_APART: Duration = Duration::from_millis(50);

/// So often a server asks in that time only if it wants to stop: `wal_sender_timeout` would have to be below 200 ms.
const ASKED_MIN: u32 = 100;

/// How a server asks for confirmation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patience {
    end: Lsn,
    asked: u32,
    since: Option<Instant>,
}

impl Patience {
    /// The server, whose WAL ends at `end`, asks for an answer. Tells how long the answer should wait.
    pub(super) fn asked(&mut self, end: Lsn, now: Instant) -> Duration {
        if end != self.end || self.since.is_none() {
            *self = Self { end, asked: 0, since: Some(now) };
        }
        self.asked += 1;
        if self.asked <= 3 { Duration::ZERO } else { ANSWERS_APART }
    }

    /// True if the server should no longer wait for us, given what is durable.
    pub(super) fn is_over(&self, durable: Lsn, now: Instant) -> bool {
        let long = self.since.is_some_and(|since| now.saturating_duration_since(since) >= LET_GO_AFTER);
        long && self.asked >= ASKED_MIN && durable < self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_asks_again_and_again_is_let_go_unless_it_has_all() {
        let start = Instant::now();
        let mut patience = Patience::default();
        let mut now = start;
        while now < start + LET_GO_AFTER {
            assert!(!patience.is_over(Lsn::ZERO, now));
            now += patience.asked(Lsn::new(100), now) + Duration::from_millis(1);
        }
        assert!(patience.is_over(Lsn::new(99), now));
        assert!(!patience.is_over(Lsn::new(100), now), "everything is confirmed");
    }

    #[test]
    fn a_server_that_asks_now_and_then_is_not_about_to_stop() {
        let start = Instant::now();
        let mut patience = Patience::default();
        for second in 0..60 {
            patience.asked(Lsn::new(100), start + Duration::from_secs(second));
            assert!(!patience.is_over(Lsn::ZERO, start + Duration::from_secs(second)));
        }
        let mut busy = Patience::default();
        for n in 0..10_000 {
            let now = start + Duration::from_millis(n * 10);
            busy.asked(Lsn::new(n), now);
            assert!(!busy.is_over(Lsn::ZERO, now), "its WAL moves");
        }
    }
}
