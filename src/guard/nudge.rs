//! When to ask the server for WAL that it holds back. Pure: time is an argument.
//!
//! A walsender sends what is flushed. The WAL writer flushes whole pages, and on a quiet server it sleeps for seconds: the
//! few records of an open `TRUNCATE` or `DROP` may lie in memory until the commit. Whatever flushes takes them along.
//! (Postgres: `XLogBackgroundFlush` in `access/transam/xlog.c`, `WalWriterMain` in `postmaster/walwriter.c`.)

use std::time::{Duration, Instant};

use crate::pg::{BLOCK_SIZE, Lsn, ServerVersion};

/// WAL that lies in memory for so long is asked for: the WAL writer had its chance, unless it sleeps.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// Bytes of the longest header of a WAL page (Postgres: `SizeOfXLogLongPHD` in `access/xlog_internal.h`).
const PAGE_HEADER_MAX: u64 = 40;

/// A way to make a server flush its WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// A message outside of any transaction, flushed at once: about 60 bytes of WAL. From 17 on.
    Message,
    /// A list of the running transactions, which the WAL writer flushes soon. Uses no transaction id; from 16 on, and only
    /// for roles that were granted it.
    Snapshot,
    /// A message in a transaction of its own, whose commit flushes: about 100 bytes and a transaction id.
    Transaction,
    /// A transaction id and nothing else; its commit wakes the WAL writer.
    TransactionId,
}

impl Means {
    /// What a server of this version can do, cheapest first.
    pub const fn of(version: ServerVersion) -> &'static [Self] {
        match version.major() {
            17.. => &[Self::Message, Self::Snapshot, Self::Transaction, Self::TransactionId],
            16 => &[Self::Snapshot, Self::Transaction, Self::TransactionId],
            _ => &[Self::Transaction, Self::TransactionId],
        }
    }

    /// The statement. The session's commits must not wait for standbys (`synchronous_commit = local`): one of them may be
    /// ourselves.
    pub const fn sql(self) -> &'static str {
        match self {
            Self::Message => "SELECT pg_logical_emit_message(false, 'walguard.nudge', '', true)",
            Self::Snapshot => "SELECT pg_log_standby_snapshot()",
            Self::Transaction => "SELECT pg_logical_emit_message(true, 'walguard.nudge', '')",
            Self::TransactionId => "SELECT pg_current_xact_id()",
        }
    }

    /// Two nudges are so far apart at least. A transaction id a second is 31 million a year, of two billion that a server
    /// may be behind with freezing.
    pub const fn apart(self) -> Duration {
        match self {
            Self::Message | Self::Snapshot => Duration::from_millis(250),
            Self::Transaction | Self::TransactionId => Duration::from_secs(1),
        }
    }
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: all is flushed, nothing is open, or the server flushes by itself.
    Rest,
    /// Look again after this time: some WAL is in memory and may not stay there.
    Look(Duration),
    /// Nudge.
    Nudge,
}

/// Sees how far WAL is inserted and flushed, and decides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nudger {
    /// The end of flushed WAL, and since when it has been behind.
    behind: Option<(Lsn, Instant)>,
    last: Option<Instant>,
}

impl Nudger {
    /// Decides. `is_open`: somebody but us has an open transaction with a number or a lock; without one there is nothing
    /// that anybody waits to see. `apart` is [`Means::apart`] of what would be used.
    pub fn decide(&mut self, inserted: Lsn, flushed: Lsn, is_open: bool, apart: Duration, now: Instant) -> Decision {
        if !is_open || end_of_records(inserted) <= flushed {
            self.behind = None;
            return Decision::Rest;
        }
        let since = match self.behind {
            Some((at, since)) if at == flushed => since,
            _ => {
                self.behind = Some((flushed, now));
                now
            }
        };
        let waited = now.saturating_duration_since(since);
        let rested = self.last.map_or(apart, |last| now.saturating_duration_since(last));
        let wait = PATIENCE.saturating_sub(waited).max(apart.saturating_sub(rested));
        if !wait.is_zero() {
            return Decision::Look(wait);
        }
        self.last = Some(now);
        self.behind = None;
        Decision::Nudge
    }
}

/// The place of the next record lies behind the header of its page, which is not written before that record.
const fn end_of_records(inserted: Lsn) -> Lsn {
    let past = inserted.bytes() % BLOCK_SIZE as u64;
    if past <= PAGE_HEADER_MAX { Lsn::new(inserted.bytes() - past) } else { inserted }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APART: Duration = Duration::from_secs(1);

    fn lsn(at: u64) -> Lsn {
        Lsn::new(0x10_0000 + at)
    }

    #[test]
    fn wal_that_stays_in_memory_is_asked_for_once_in_a_while() {
        let (mut nudger, start) = (Nudger::default(), Instant::now());
        let millis = |n| start + Duration::from_millis(n);
        let mut decide = |n| nudger.decide(lsn(300), lsn(100), true, APART, millis(n));
        assert_eq!(decide(0), Decision::Look(PATIENCE));
        assert_eq!(decide(60), Decision::Look(Duration::from_millis(40)));
        assert_eq!(decide(100), Decision::Nudge);
        assert_eq!(decide(150), Decision::Look(Duration::from_millis(950)));
        assert_eq!(decide(1_099), Decision::Look(Duration::from_millis(1)));
        assert_eq!(decide(1_100), Decision::Nudge);
    }

    #[test]
    fn a_server_that_flushes_by_itself_is_left_alone() {
        let (mut nudger, start) = (Nudger::default(), Instant::now());
        for n in 0..100 {
            let at = start + Duration::from_millis(90 * n);
            assert_ne!(nudger.decide(lsn(n * 100 + 300), lsn(n * 100), true, APART, at), Decision::Nudge);
        }
    }

    #[test]
    fn an_idle_server_is_left_alone() {
        let (mut nudger, start) = (Nudger::default(), Instant::now());
        for n in 0..100 {
            let at = start + Duration::from_secs(n);
            assert_eq!(nudger.decide(lsn(300), lsn(300), true, APART, at), Decision::Rest);
            assert_eq!(nudger.decide(lsn(300), lsn(100), false, APART, at), Decision::Rest, "nothing is open");
            // All is flushed up to the end of a page: the next record will lie behind a header that is not there yet.
            assert_eq!(nudger.decide(lsn(24), lsn(0), true, APART, at), Decision::Rest);
            assert_eq!(nudger.decide(lsn(40), lsn(0), true, APART, at), Decision::Rest);
        }
    }

    #[test]
    fn the_cheapest_means_come_first() {
        assert_eq!(Means::of(ServerVersion::new(180_001)).first(), Some(&Means::Message));
        assert_eq!(Means::of(ServerVersion::new(160_004)).first(), Some(&Means::Snapshot));
        assert_eq!(Means::of(ServerVersion::new(150_020)).first(), Some(&Means::Transaction));
    }
}
