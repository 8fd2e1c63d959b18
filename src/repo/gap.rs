//! WAL that is missing for good, and known to be: `gaps/<timeline>-<from>-<to>.json`.

use jiff::Timestamp;

use crate::pg::{Lsn, TimelineId};

/// A hole in a timeline's WAL: nothing between `from` and `to` can be restored, and whatever comes after needs a newer
/// base backup. Written once, so that nobody has to guess.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Gap {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first missing byte.
    pub from: Lsn,
    /// The byte after the last one missing; greater than `from`.
    pub to: Lsn,
    /// Why, for people.
    pub reason: String,
    /// When it was noticed.
    pub at: Timestamp,
}
