//! Which transactions are open at a place of the WAL, as the server writes it down now and then.

use foldhash::HashSet;

use super::transaction::precedes;
use crate::decode::rmgr::standby::RunningXacts;
use crate::pg::{Lsn, Xid};

/// The open transactions, prepared ones among them: an older one that is not listed has ended, or never will because the
/// server that it ran on is no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// Where the record lies that tells it.
    pub lsn: Lsn,
    listed: HashSet<Xid>,
    oldest: u32,
}

impl Running {
    /// What a record says that lies at `lsn`.
    pub fn of(lsn: Lsn, record: &RunningXacts<'_>) -> Self {
        let listed = record.xids.iter().chain(record.subxids.iter()).collect();
        Self { lsn, listed, oldest: record.oldest_running_xid }
    }

    /// As a record at `lsn` would say it.
    #[cfg(test)]
    pub(super) fn listing(lsn: Lsn, listed: &[Xid], oldest: u32) -> Self {
        Self { lsn, listed: listed.iter().copied().collect(), oldest }
    }

    /// True of a transaction that is open no more. A subtransaction need not be listed itself if there are many; but it is
    /// younger than its transaction, and so than the oldest one.
    pub fn is_gone(&self, xid: Xid) -> bool {
        !self.listed.contains(&xid) && precedes(xid.get(), self.oldest)
    }
}
