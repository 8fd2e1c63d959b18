//! Headers of WAL pages.

use super::{DecodeError, Fault, WalMajor};
use crate::pg::{BLOCK_SIZE, Lsn, SegmentSize, SystemId, TimelineId};

/// The header of a WAL page.
///
/// (Postgres: `XLogPageHeaderData` and `XLogLongPageHeaderData` in `access/xlog_internal.h`; the checks are those of
/// `XLogReaderValidatePageHeader` in `access/transam/xlogreader.c`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// The timeline of the first record on the page. The copy of a segment that a promoted server makes may keep the
    /// old timeline up to the page with the switch point.
    pub timeline: TimelineId,
    /// Bytes of the record continued here that are still missing, 0 if none is continued.
    pub remaining: u32,
    /// The page continues a record of the page before.
    pub continues: bool,
    /// The page begins anew because the record that should be continued here was lost in a crash.
    pub overwrites: bool,
    /// Bytes of the header: 40 on the first page of a segment, 24 on others.
    pub length: usize,
}

const FIRST_IS_CONTRECORD: u16 = 0x1;
const LONG_HEADER: u16 = 0x2;
const REMOVABLE: u16 = 0x4;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x8;
const FLAGS: u16 = FIRST_IS_CONTRECORD | LONG_HEADER | REMOVABLE | FIRST_IS_OVERWRITE_CONTRECORD;

impl PageHeader {
    /// Bytes of the header of most pages.
    pub const SHORT_BYTES: usize = 24;
    /// Bytes of the header of a segment's first page.
    pub const LONG_BYTES: usize = 40;

    /// Reads the header of the page at `at` from the beginning of `bytes`; `Ok(None)` if more bytes are needed.
    ///
    /// # Errors
    /// If it is not a header that a server of this major, cluster and segment size writes at `at`. `system_id` `None`
    /// takes any cluster's.
    pub fn read(
        bytes: &[u8],
        at: Lsn,
        major: WalMajor,
        size: SegmentSize,
        system_id: Option<SystemId>,
    ) -> Result<Option<Self>, DecodeError> {
        let fault = |fault| DecodeError::damaged(at, fault);
        let Some((short, rest)) = bytes.split_first_chunk::<{ Self::SHORT_BYTES }>() else { return Ok(None) };
        let [m0, m1, i0, i1, t0, t1, t2, t3, a0, a1, a2, a3, a4, a5, a6, a7, r0, r1, r2, r3, ..] = *short;
        let magic = u16::from_le_bytes([m0, m1]);
        if magic == 0 && short.iter().all(|b| *b == 0) {
            return Err(DecodeError::Unwritten { at });
        }
        if magic != major.page_magic() {
            return Err(DecodeError::OtherVersion { at, found: magic, major });
        }
        let info = u16::from_le_bytes([i0, i1]);
        if info & !FLAGS != 0 {
            return Err(fault(Fault::PageFlags(info)));
        }
        let address = Lsn::new(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]));
        if address != at {
            return Err(fault(Fault::PageAddress(address)));
        }
        let timeline = u32::from_le_bytes([t0, t1, t2, t3]);
        let timeline = TimelineId::new(timeline).ok_or_else(|| fault(Fault::TimelineZero))?;
        let long = info & LONG_HEADER != 0;
        if long {
            let Some((more, _)) = rest.split_first_chunk::<16>() else { return Ok(None) };
            let [s0, s1, s2, s3, s4, s5, s6, s7, z0, z1, z2, z3, b0, b1, b2, b3] = *more;
            let cluster = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            if system_id.is_some_and(|expected| expected.get() != cluster) {
                return Err(fault(Fault::OtherCluster(cluster)));
            }
            let segment = u32::from_le_bytes([z0, z1, z2, z3]);
            if u64::from(segment) != size.bytes() {
                return Err(fault(Fault::SegmentSize(segment)));
            }
            let page = u32::from_le_bytes([b0, b1, b2, b3]);
            if page as usize != BLOCK_SIZE {
                return Err(fault(Fault::PageSize(page)));
            }
        } else if size.offset_of(at) == 0 {
            return Err(fault(Fault::ShortHeader));
        }
        Ok(Some(Self {
            timeline,
            remaining: u32::from_le_bytes([r0, r1, r2, r3]),
            continues: info & FIRST_IS_CONTRECORD != 0,
            overwrites: info & FIRST_IS_OVERWRITE_CONTRECORD != 0,
            length: if long { Self::LONG_BYTES } else { Self::SHORT_BYTES },
        }))
    }
}
