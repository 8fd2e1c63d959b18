//! When to tell the server how far we are. Pure: time is an argument.

use std::time::{Duration, Instant};

use crate::pg::Lsn;

/// How far WAL got with us: what a status update tells the server. Each is the position after the last byte.
///
/// `flush` is what counts: the slot lets go of WAL before it, and a synchronous commit waits for it. `0/0` says "not yet":
/// the server then does not take us for a synchronous standby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Received.
    pub write: Lsn,
    /// Durable.
    pub flush: Lsn,
    /// Applied. An archive applies nothing: report what is durable, or commits with `remote_apply` would wait for ever.
    pub apply: Lsn,
    /// Ask the server for a keepalive at once.
    pub reply_requested: bool,
}

/// The server drops us after `wal_sender_timeout` (60 s by default): speak well before half of that.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// Decides when a status update is due.
#[derive(Clone, Debug)]
pub struct Schedule {
    interval: Duration,
    sent_at: Option<Instant>,
    flush_sent: Lsn,
    reply_due: bool,
}

impl Schedule {
    /// Updates at least every `interval`, usually [`INTERVAL`]. The first is due at once.
    pub const fn new(interval: Duration) -> Self {
        Self { interval, sent_at: None, flush_sent: Lsn::ZERO, reply_due: false }
    }

    /// The server asked for a reply (a keepalive with `reply_requested`).
    pub const fn reply_requested(&mut self) {
        self.reply_due = true;
    }

    /// True if an update is due now, with this flush position: because the server asked, because the position advanced (a
    /// synchronous commit may be waiting for it), or because the last update is old.
    pub fn is_due(&self, now: Instant, flush: Lsn) -> bool {
        self.reply_due || flush > self.flush_sent || self.deadline().is_none_or(|deadline| now >= deadline)
    }

    /// When an update is due at the latest; `None` means now.
    pub fn deadline(&self) -> Option<Instant> {
        self.sent_at.map(|sent_at| sent_at + self.interval)
    }

    /// An update was sent.
    pub fn sent(&mut self, now: Instant, flush: Lsn) {
        self.sent_at = Some(now);
        self.flush_sent = self.flush_sent.max(flush);
        self.reply_due = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_is_due_when_asked_for_when_flush_advanced_and_when_the_last_is_old() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL);
        let (old, new) = (Lsn::new(100), Lsn::new(200));
        assert!(schedule.is_due(start, Lsn::ZERO), "the first is due at once");
        schedule.sent(start, old);
        assert!(!schedule.is_due(start, old));
        assert!(schedule.is_due(start, new), "a synchronous commit may wait for it");
        assert!(!schedule.is_due(start + Duration::from_millis(9_999), old));
        assert!(schedule.is_due(start + INTERVAL, old));
        schedule.reply_requested();
        assert!(schedule.is_due(start, old));
        schedule.sent(start, old);
        assert!(!schedule.is_due(start, old), "one reply answers one request");
        assert_eq!(schedule.deadline(), Some(start + INTERVAL));
    }

    #[test]
    fn a_flush_position_that_falls_back_is_no_news() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL);
        schedule.sent(start, Lsn::new(200));
        assert!(!schedule.is_due(start, Lsn::new(100)));
        schedule.sent(start, Lsn::new(100));
        assert!(!schedule.is_due(start, Lsn::new(200)));
    }
}
