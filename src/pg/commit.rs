//! The ends of transactions.

use super::{Lsn, PgTime, Xid};

/// A record that ends a transaction (commit or abort, prepared ones included): a place where recovery can stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CommitPoint {
    /// Where the record starts. Recovery that stops before this place does not have the transaction.
    pub lsn: Lsn,
    /// The first byte after the record.
    pub end: Lsn,
    /// The top-level transaction.
    pub xid: Xid,
    /// When it ended by the server's clock. Not in LSN order: the time is taken before the record is placed.
    pub time: PgTime,
    /// True for a commit, false for an abort.
    pub committed: bool,
}
