//! What can be wrong with WAL.

use crate::pg::Lsn;

/// WAL that cannot be read. The text begins with a lower-case letter and names the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Zeros where a record or a page should begin: this is as far as the server has written. No damage by itself.
    #[error("no WAL is written at {at}")]
    Unwritten {
        /// The first byte that holds nothing.
        at: Lsn,
    },
    /// The page is not of the major version that the reader was made for.
    #[error("the page at {at} has the magic number {found:#06x}, PostgreSQL {major} writes {expected:#06x}", expected = .major.page_magic())]
    OtherVersion {
        /// Where the page begins.
        at: Lsn,
        /// The number in its header.
        found: u16,
        /// The major that was expected.
        major: super::WalMajor,
    },
    /// The bytes are not what Postgres would have written there.
    #[error("damaged WAL at {at}: {fault}")]
    Damaged {
        /// Where the page, record or field begins.
        at: Lsn,
        /// What is wrong.
        fault: Fault,
    },
}

impl DecodeError {
    pub(super) const fn damaged(at: Lsn, fault: Fault) -> Self {
        Self::Damaged { at, fault }
    }

    /// Where in the WAL the trouble lies.
    pub const fn at(&self) -> Lsn {
        match self {
            Self::Unwritten { at } | Self::OtherVersion { at, .. } | Self::Damaged { at, .. } => *at,
        }
    }
}

/// What is wrong with damaged WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Fault {
    #[error("unknown page flags {0:#06x}")]
    PageFlags(u16),
    #[error("the page says it is the one at {0}: a recycled or misplaced segment")]
    PageAddress(Lsn),
    #[error("the first page of a segment lacks the long header")]
    ShortHeader,
    #[error("the page belongs to the cluster with system identifier {0}")]
    OtherCluster(u64),
    #[error("the page says that segments are {0} bytes long")]
    SegmentSize(u32),
    #[error("WAL pages of {0} bytes are not supported")]
    PageSize(u32),
    #[error("the page is of timeline {found}, the one before it of {before}")]
    TimelineFell { found: u32, before: u32 },
    #[error("timeline 0 does not exist")]
    TimelineZero,
    #[error("a record should begin on this page, but the page continues one")]
    UnexpectedContinuation,
    #[error("the page does not continue the record at {0}")]
    MissingContinuation(Lsn),
    #[error("{found} bytes are announced to continue the record, {expected} are missing")]
    ContinuationLength { found: u32, expected: u32 },
    #[error("a record of {0} bytes")]
    RecordLength(u32),
    #[error("the record before is said to begin at {found}, it begins at {expected}")]
    Previous { found: Lsn, expected: Lsn },
    #[error("the checksum is {found:#010x}, the record says {expected:#010x}")]
    Checksum { found: u32, expected: u32 },
    #[error("the record says that it replaces one at {found}, the broken one begins at {expected}")]
    Overwritten { found: Lsn, expected: Lsn },
    #[error("the page replaces a broken record, but the record on it does not say so")]
    NotAnOverwrite,
    #[error("the record ends within its {0}")]
    Truncated(&'static str),
    #[error("unknown part with id {0} in the record")]
    UnknownPart(u8),
    #[error("block references are out of order")]
    BlockOrder,
    #[error("the first block reference names no relation")]
    BlockWithoutRelation,
    #[error("the record's parts do not add up to its length")]
    LengthsDisagree,
    #[error("the resource manager has no operation {0:#04x}")]
    UnknownOperation(u8),
    #[error("no resource manager has the number {0}")]
    UnknownManager(u8),
    #[error("{0} is impossible")]
    Impossible(&'static str),
    #[error("the record is longer than what is kept of one")]
    TooLong,
}
