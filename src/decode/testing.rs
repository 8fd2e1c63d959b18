//! WAL made by hand, for tests: what a server writes, and what it leaves behind when it crashes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that is wrong may panic")]

use super::{PageHeader, RecordHeader, RmgrId, Source, WalMajor};
use crate::pg::{BLOCK_SIZE, Lsn, SegmentSize, SystemId, TimelineId};

/// Writes WAL into memory.
#[derive(Debug)]
pub(crate) struct WalWriter {
    pub(crate) source: Source,
    pub(crate) timeline: TimelineId,
    start: Lsn,
    bytes: Vec<u8>,
    previous: Lsn,
}

/// A record as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) lsn: Lsn,
    pub(crate) end: Lsn,
    pub(crate) header: RecordHeader,
    pub(crate) body: Vec<u8>,
}

pub(crate) fn source(major: WalMajor) -> Source {
    Source { major, segment_size: SegmentSize::new(1 << 20).unwrap(), system_id: Some(SystemId::new(42)) }
}

/// A record body that is main data only.
pub(crate) fn main_data(data: &[u8]) -> Vec<u8> {
    let mut body = match u8::try_from(data.len()) {
        Ok(length) => vec![255, length],
        Err(_) => [&[254][..], &(data.len() as u32).to_le_bytes()].concat(),
    };
    body.extend_from_slice(data);
    body
}

impl WalWriter {
    /// Begins at the beginning of a segment.
    pub(crate) fn new(source: Source, start: Lsn) -> Self {
        assert_eq!(source.segment_size.offset_of(start), 0);
        let timeline = TimelineId::FIRST;
        let mut writer = Self { source, timeline, start, bytes: Vec::new(), previous: Lsn::new(start.bytes() - 64) };
        writer.page(None, 0);
        writer
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn at(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    fn room(&self) -> usize {
        (BLOCK_SIZE - self.bytes.len() % BLOCK_SIZE) % BLOCK_SIZE
    }

    fn page(&mut self, flag: Option<u16>, remaining: usize) {
        let at = self.at();
        assert_eq!(self.room(), 0);
        let long = self.source.segment_size.offset_of(at) == 0;
        let info = flag.unwrap_or(0) | if long { 2 } else { 0 } | 4;
        self.bytes.extend(self.source.major.page_magic().to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.timeline.get().to_le_bytes());
        self.bytes.extend(at.bytes().to_le_bytes());
        self.bytes.extend((remaining as u64).to_le_bytes());
        if long {
            self.bytes.extend(self.source.system_id.unwrap().get().to_le_bytes());
            self.bytes.extend((self.source.segment_size.bytes() as u32).to_le_bytes());
            self.bytes.extend((BLOCK_SIZE as u32).to_le_bytes());
        }
        let expected = if long { PageHeader::LONG_BYTES } else { PageHeader::SHORT_BYTES };
        assert_eq!((self.at() - at) as usize, expected);
    }

    fn assemble(&self, rmgr: RmgrId, info: u8, xid: u32, body: &[u8]) -> Vec<u8> {
        let mut record = Vec::new();
        record.extend(((RecordHeader::BYTES + body.len()) as u32).to_le_bytes());
        record.extend(xid.to_le_bytes());
        record.extend(self.previous.bytes().to_le_bytes());
        record.extend([info, rmgr.0, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        record
    }

    fn begin(&mut self) -> Lsn {
        while !self.bytes.len().is_multiple_of(8) {
            self.bytes.push(0);
        }
        if self.room() == 0 {
            self.page(None, 0);
        }
        self.at()
    }

    /// A record, over as many pages as it needs.
    pub(crate) fn record(&mut self, rmgr: RmgrId, info: u8, xid: u32, body: &[u8]) -> Written {
        let lsn = self.begin();
        let record = self.assemble(rmgr, info, xid, body);
        let mut rest = &record[..];
        loop {
            let (now, later) = rest.split_at(rest.len().min(BLOCK_SIZE - self.bytes.len() % BLOCK_SIZE));
            self.bytes.extend(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
            self.page(Some(1), rest.len());
        }
        self.previous = lsn;
        let end = Lsn::new(self.at().bytes().next_multiple_of(8));
        let header = RecordHeader::read(record.first_chunk().unwrap());
        Written { lsn, end, header, body: body.to_vec() }
    }

    /// A segment switch: zeros to the segment's end.
    pub(crate) fn switch(&mut self) -> Written {
        let mut written = self.record(RmgrId::XLOG, 0x40, 0, &[]);
        while self.source.segment_size.offset_of(self.at()) != 0 {
            self.bytes.push(0);
        }
        written.end = self.at();
        written
    }

    /// A record of which the first page is written when the server crashes, and the record that replaces it.
    pub(crate) fn broken_record(&mut self, body: &[u8]) -> Written {
        let lost = self.begin();
        let record = self.assemble(RmgrId(10), 0, 7, body);
        let room = BLOCK_SIZE - self.bytes.len() % BLOCK_SIZE;
        assert!(record.len() > room, "the record must cross a page");
        self.bytes.extend(&record[..room]);
        self.page(Some(8), 0);
        let main = [lost.bytes().to_le_bytes(), 5_i64.to_le_bytes()].concat();
        self.record(RmgrId::XLOG, 0xD0, 0, &main_data(&main))
    }
}

/// Inputs that a fuzzer found worth keeping, each behind its length in two bytes (network order), as `tests/corpus/fuzz`
/// has them.
pub(crate) fn fuzzed(mut packed: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = packed.split_first_chunk()?;
        let (input, rest) = rest.split_at(u16::from_be_bytes(*length).into());
        packed = rest;
        Some(input)
    })
}
