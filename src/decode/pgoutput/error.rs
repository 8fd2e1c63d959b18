//! What can be wrong with a message.

use crate::pg::{Lsn, Xid};

/// A message that cannot be read, or that has no place where it stands. The stream is of no use behind it: a new
/// connection sends again whatever was not confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logical message at {at} cannot be read: {fault}")]
pub struct MessageError {
    /// The position that came with the message.
    pub at: Lsn,
    /// What is wrong.
    pub fault: Fault,
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Fault {
    #[error("it is empty")]
    Empty,
    #[error("no message has the tag {0:#04x}")]
    UnknownTag(u8),
    #[error("it ends within its {0}")]
    Truncated(&'static str),
    #[error("{0} bytes are left over behind it")]
    LeftOver(usize),
    #[error("{0} is impossible")]
    Impossible(&'static str),
    #[error("{0} comes outside of a transaction")]
    OutsideTransaction(&'static str),
    #[error("{0} comes within another transaction")]
    WithinTransaction(&'static str),
    #[error("it ends transaction {found}, the one that began is {expected}")]
    OtherTransaction { found: Xid, expected: Xid },
}
