//! Postgres's own vocabulary: positions, timelines, segments, transactions, times and versions, as types.
//!
//! Everything else in walguard speaks in these words. The module is pure and imports nothing.

mod commit;
mod lsn;
mod relation;
mod segment;
mod server;
mod time;
mod timeline;
mod xid;

pub use commit::CommitPoint;
pub use lsn::{Lsn, ParseLsnError};
pub use relation::{BLOCK_SIZE, Fork, Oid, RelFile};
pub use segment::{ParseSegmentNameError, SegmentName, SegmentNumber, SegmentSize, SegmentSizeError};
pub use server::{ServerVersion, SystemId};
pub use time::PgTime;
pub use timeline::{HistoryEntry, ParseHistoryError, Position, TimelineHistory, TimelineId};
pub use xid::Xid;
