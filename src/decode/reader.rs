//! Pages in, records out.

use super::checksum::{self, RecordChecksum};
use super::record::Around;
use super::{DecodeError, Fault, PageHeader, Record, RecordHeader, WalMajor};
use crate::pg::{BLOCK_SIZE, Lsn, SegmentSize, SystemId, TimelineId};

/// Whose WAL is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The server's major version.
    pub major: WalMajor,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The cluster; `None` takes any, for WAL of unknown origin.
    pub system_id: Option<SystemId>,
}

/// The longest record that Postgres writes, and some: 1020 MiB since 16, less than 1 GiB before.
///
/// (Postgres: `XLogRecordMaxSize` in `access/xlogrecord.h`.)
const RECORD_BYTES_MAX: u32 = 1 << 30;

/// Bytes kept of one record. Longer ones are checked but not kept whole, so that one giant logical message cannot take
/// the memory of a small machine. A commit of 8 million subtransactions still fits.
const RECORD_KEPT_MAX: usize = 32 << 20;

/// What the assembly buffer may keep for the next record.
const PARTIAL_CAPACITY_MAX: usize = 1 << 20;

/// Reads records from a stream of WAL that comes in slices of any size.
///
/// Give it bytes with [`Reader::push`], then take records with [`Reader::next_record`] until it answers `None`, which
/// means "more bytes, please". How the bytes are sliced makes no difference to the records. The buffer holds what was
/// pushed and not yet read: whoever drains the records before the next push bounds it by the size of a push.
///
/// Each record's checksum is proved, and that it names the record before it. After an error the reader stays at it until
/// it is told to go on behind the damage ([`Reader::skip_page`]).
///
/// (Postgres: `access/transam/xlogreader.c`.)
#[derive(Debug)]
pub struct Reader {
    source: Source,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are done with.
    consumed: usize,
    /// Bytes of `buffer` that were pushed; behind them is room for more.
    filled: usize,
    /// The place of `buffer[consumed]` in the WAL.
    at: Lsn,
    state: State,
    /// A record that crosses pages, as far as it came.
    partial: Vec<u8>,
    /// Where the last record began.
    previous: Option<Lsn>,
    /// Where the last record ended.
    proved: Option<Lsn>,
    around: Around,
    /// Where a record began that a crash cut off: the next one must say that it replaces it.
    broken: Option<Lsn>,
    checksum: RecordChecksum,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// At the beginning of a page, of which nothing is known.
    Resync,
    /// Behind a page header, in a record whose beginning was not seen; so many bytes of it are left.
    SkipRecord { remaining: u32 },
    /// A record begins here, or behind padding and page header.
    Record,
    /// In a record that goes on on the next page.
    Continue(Partial),
    /// Behind a switch: zeros up to the end of the segment.
    SkipSegment,
    /// Here it ends.
    Failed(DecodeError),
    /// On a page of which the rest is given up.
    SkipPage,
}

#[derive(Clone, Copy, Debug)]
struct Partial {
    start: Lsn,
    total: u32,
    have: u32,
    /// Of the body so far.
    crc: u32,
}

enum Step {
    Found(Found),
    NeedBytes,
    Again,
}

/// A record that was found, and where its body lies.
struct Found {
    lsn: Lsn,
    end: Lsn,
    header: RecordHeader,
    body: Place,
}

enum Place {
    Buffer { from: usize, to: usize },
    Partial,
}

impl Reader {
    /// A reader of WAL from the page that begins at `at`; the first record is the first that begins on or behind it.
    /// `at` is rounded down to the beginning of its page, and the bytes pushed must begin there.
    pub fn at_page(source: Source, at: Lsn) -> Self {
        Self::new(source, at.align_down(BLOCK_SIZE as u64), State::Resync)
    }

    /// A reader of WAL from exactly `at`, where a record begins or the one before ends.
    pub fn at_record(source: Source, at: Lsn) -> Self {
        Self::new(source, at, State::Record)
    }

    fn new(source: Source, at: Lsn, state: State) -> Self {
        Self {
            source,
            buffer: Vec::new(),
            consumed: 0,
            filled: 0,
            at,
            state,
            partial: Vec::new(),
            previous: None,
            proved: None,
            around: Around { timeline: None, major: source.major },
            broken: None,
            checksum: checksum::fastest(),
        }
    }

    /// What it reads.
    pub const fn source(&self) -> Source {
        self.source
    }

    /// Adds the bytes that follow those pushed before.
    pub fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    /// Adds the bytes that follow those pushed before as [`Reader::push`] does, but has them written where they will be
    /// read: `fill` gets room for `most` bytes, whatever stands there, and says how many it wrote from the beginning on.
    ///
    /// # Errors
    /// Those of `fill`; nothing is added then.
    pub fn push_with<E>(&mut self, most: usize, fill: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<usize, E> {
        let filled = fill(self.room(most))?.min(most);
        self.filled += filled;
        Ok(filled)
    }

    /// Room for so many bytes behind those pushed, which move to the front. What it took once is kept, so that it need not be
    /// cleared again.
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        self.buffer.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.consumed = 0;
        let end = self.filled + bytes;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        self.buffer.get_mut(self.filled..end).unwrap_or_default()
    }

    /// Where the next pushed byte belongs.
    pub fn pushed_to(&self) -> Lsn {
        self.at + self.unread().len() as u64
    }

    /// True if no record is begun: the next one begins with the next byte pushed.
    pub fn is_between_records(&self) -> bool {
        matches!(self.state, State::Record) && self.unread().is_empty()
    }

    /// The end of the last record read ([`Record::end`]); `None` before the first.
    pub const fn proved_to(&self) -> Option<Lsn> {
        self.proved
    }

    /// The timeline of the last page whose header was read.
    pub const fn timeline(&self) -> Option<TimelineId> {
        self.around.timeline
    }

    /// The next record, or `None` if its last byte is not pushed yet.
    ///
    /// # Errors
    /// If the bytes are not the WAL of this source, or end ([`DecodeError::Unwritten`]).
    #[inline]
    pub fn next_record(&mut self) -> Result<Option<Record<'_>>, DecodeError> {
        match self.find_simple() {
            Some(found) => Ok(Some(self.lend(&found))),
            None => self.next_of_any_kind(),
        }
    }

    /// The same as [`Reader::next_record`], the long way.
    fn next_of_any_kind(&mut self) -> Result<Option<Record<'_>>, DecodeError> {
        match self.find() {
            Ok(None) => Ok(None),
            Ok(Some(found)) => Ok(Some(self.lend(&found))),
            Err(error) => {
                self.state = State::Failed(error);
                Err(error)
            }
        }
    }

    /// The commonest record in one go: it follows another on its page, it ends on that page and is all there, it is not the
    /// WAL machinery's own, and nothing is wrong with it. `None` says nothing but that [`Reader::find`] must have a look,
    /// which says the same of what is found here, and takes twice as long.
    #[inline]
    fn find_simple(&mut self) -> Option<Found> {
        if !matches!(self.state, State::Record) || self.broken.is_some() {
            return None;
        }
        let padding = self.at.bytes().wrapping_neg() & 7;
        let lsn = self.at.bytes().wrapping_add(padding);
        let on_page = lsn as usize % BLOCK_SIZE;
        let from = self.consumed + padding as usize;
        let bytes = self.buffer.get(from..self.filled)?;
        let head = bytes.first_chunk()?;
        let header = RecordHeader::read(head);
        let total = header.total_length as usize;
        let body = bytes.get(RecordHeader::BYTES..total)?;
        let is_simple = on_page > 0 && total <= BLOCK_SIZE - on_page && header.rmgr != super::RmgrId::XLOG;
        if !is_simple || self.previous != Some(header.previous) || (self.checksum)(head, body) != header.crc {
            return None;
        }
        let at = lsn.checked_add(total as u64)?;
        let (lsn, end) = (Lsn::new(lsn), Lsn::new(at.checked_next_multiple_of(8)?));
        self.consumed = from + total;
        self.at = Lsn::new(at);
        self.previous = Some(lsn);
        self.proved = Some(end);
        let body = Place::Buffer { from: from + RecordHeader::BYTES, to: from + total };
        Some(Found { lsn, end, header, body })
    }

    /// After an error: gives up what is left of the page, and goes on with the first record that begins on a later one.
    /// Without an error nothing is given up.
    pub fn skip_page(&mut self) {
        let State::Failed(error) = self.state else { return };
        if self.is_at_page() && error.at() == self.at && !self.unread().is_empty() {
            self.consume(1); // the page itself is damaged: none of it is read
        }
        self.partial.clear();
        (self.previous, self.broken) = (None, None);
        self.state = if self.is_at_page() { State::Resync } else { State::SkipPage };
    }

    fn skip_rest_of_page(&mut self) -> Step {
        let skipped = self.room_on_page().min(self.unread().len());
        self.consume(skipped);
        if !self.is_at_page() || skipped == 0 {
            return Step::NeedBytes;
        }
        self.state = State::Resync;
        Step::Again
    }

    fn unread(&self) -> &[u8] {
        self.buffer.get(self.consumed..self.filled).unwrap_or_default()
    }

    fn consume(&mut self, bytes: usize) {
        self.consumed += bytes;
        self.at = Lsn::new(self.at.bytes().saturating_add(bytes as u64));
    }

    /// Bytes from here to the end of the page; a whole page at its beginning.
    const fn room_on_page(&self) -> usize {
        BLOCK_SIZE - (self.at.bytes() % BLOCK_SIZE as u64) as usize
    }

    const fn is_at_page(&self) -> bool {
        self.at.bytes().is_multiple_of(BLOCK_SIZE as u64)
    }

    fn find(&mut self) -> Result<Option<Found>, DecodeError> {
        loop {
            let step = match self.state {
                State::Record => self.begin_record()?,
                State::Continue(partial) => self.continue_record(partial)?,
                State::Resync => self.resync()?,
                State::SkipRecord { remaining } => self.skip_record(remaining)?,
                State::SkipSegment => self.skip_segment(),
                State::Failed(error) => return Err(error),
                State::SkipPage => self.skip_rest_of_page(),
            };
            match step {
                Step::Found(found) => return Ok(Some(found)),
                Step::NeedBytes => return Ok(None),
                Step::Again => {}
            }
        }
    }

    fn begin_record(&mut self) -> Result<Step, DecodeError> {
        let padding = (self.at.bytes().wrapping_neg() & 7) as usize;
        if self.unread().len() < padding {
            return Ok(Step::NeedBytes);
        }
        self.consume(padding);
        if self.is_at_page() {
            let Some(page) = self.read_page()? else { return Ok(Step::NeedBytes) };
            if page.continues {
                return Err(DecodeError::damaged(self.at, Fault::UnexpectedContinuation));
            }
            self.consume(page.length);
        }
        let Some((total, _)) = self.unread().split_first_chunk::<4>() else { return Ok(Step::NeedBytes) };
        let total = u32::from_le_bytes(*total);
        if total == 0 {
            return Err(DecodeError::Unwritten { at: self.at });
        }
        if total < RecordHeader::BYTES as u32 || total > RECORD_BYTES_MAX {
            return Err(DecodeError::damaged(self.at, Fault::RecordLength(total)));
        }
        if total as usize > self.room_on_page() {
            if self.partial.capacity() > PARTIAL_CAPACITY_MAX {
                self.partial = Vec::new();
            }
            self.partial.clear();
            self.state = State::Continue(Partial { start: self.at, total, have: 0, crc: 0 });
            return Ok(Step::Again);
        }
        self.whole_record(total as usize)
    }

    /// A record that lies on one page is lent from the buffer.
    fn whole_record(&mut self, total: usize) -> Result<Step, DecodeError> {
        let Some(bytes) = self.unread().get(..total) else { return Ok(Step::NeedBytes) };
        let Some((head, body)) = bytes.split_first_chunk() else { return Ok(Step::NeedBytes) };
        let (header, crc) = (RecordHeader::read(head), (self.checksum)(head, body));
        let place = Place::Buffer { from: self.consumed + RecordHeader::BYTES, to: self.consumed + total };
        let lsn = self.at;
        self.consume(total);
        self.prove(lsn, header, crc, place)
    }

    fn continue_record(&mut self, mut partial: Partial) -> Result<Step, DecodeError> {
        let missing = partial.total - partial.have;
        if self.is_at_page() {
            let Some(page) = self.read_page()? else { return Ok(Step::NeedBytes) };
            if page.overwrites {
                self.broken = Some(partial.start);
                self.consume(page.length);
                self.state = State::Record;
                return Ok(Step::Again);
            }
            if !page.continues {
                return Err(DecodeError::damaged(self.at, Fault::MissingContinuation(partial.start)));
            }
            if page.remaining != missing {
                let fault = Fault::ContinuationLength { found: page.remaining, expected: missing };
                return Err(DecodeError::damaged(self.at, fault));
            }
            self.consume(page.length);
        }
        let take = self.room_on_page().min(missing as usize).min(self.unread().len());
        let fragment = self.buffer.get(self.consumed..self.consumed + take).unwrap_or_default();
        let kept = fragment.len().min(RECORD_KEPT_MAX.saturating_sub(self.partial.len()));
        self.partial.extend_from_slice(fragment.get(..kept).unwrap_or_default());
        let header_left = RecordHeader::BYTES.saturating_sub(partial.have as usize);
        partial.crc = crc32c::crc32c_append(partial.crc, fragment.get(header_left..).unwrap_or_default());
        partial.have += take as u32; // at most a page
        self.consume(take);
        self.state = State::Continue(partial);
        if partial.have < partial.total {
            let again = take > 0 && self.is_at_page();
            return Ok(if again { Step::Again } else { Step::NeedBytes });
        }
        let Some((head, _)) = self.partial.split_first_chunk() else { return Ok(Step::NeedBytes) };
        let (header, crc) = (RecordHeader::read(head), checksum::with_header(partial.crc, head));
        self.state = State::Record;
        self.prove(partial.start, header, crc, Place::Partial)
    }

    /// What must hold of a record whose bytes are all there. `at` stands behind it.
    fn prove(&mut self, lsn: Lsn, header: RecordHeader, crc: u32, body: Place) -> Result<Step, DecodeError> {
        if crc != header.crc {
            return Err(DecodeError::damaged(lsn, Fault::Checksum { found: crc, expected: header.crc }));
        }
        if let Some(expected) = self.previous.filter(|previous| *previous != header.previous) {
            return Err(DecodeError::damaged(lsn, Fault::Previous { found: header.previous, expected }));
        }
        self.previous = Some(lsn);
        let aligned = self.at.bytes().saturating_add(7) & !7;
        let mut end = Lsn::new(aligned);
        if header.rmgr == super::RmgrId::XLOG && header.info & 0xF0 == super::rmgr::xlog::SWITCH {
            let size = self.source.segment_size.bytes();
            end = Lsn::new(aligned.checked_next_multiple_of(size).unwrap_or(u64::MAX));
            self.state = State::SkipSegment;
        }
        self.proved = Some(end);
        let found = Found { lsn, end, header, body };
        if let Some(expected) = self.broken.take() {
            self.prove_overwrite(&found, expected)?;
        }
        Ok(Step::Found(found))
    }

    /// The record behind a lost one names the lost one.
    fn prove_overwrite(&self, found: &Found, expected: Lsn) -> Result<(), DecodeError> {
        match super::rmgr::xlog::overwritten(&self.lend(found))? {
            Some(replaced) if replaced == expected => Ok(()),
            Some(replaced) => Err(DecodeError::damaged(found.lsn, Fault::Overwritten { found: replaced, expected })),
            None => Err(DecodeError::damaged(found.lsn, Fault::NotAnOverwrite)),
        }
    }

    #[inline]
    fn lend(&self, found: &Found) -> Record<'_> {
        let body = match found.body {
            Place::Buffer { from, to } => self.buffer.get(from..to),
            Place::Partial => self.partial.get(RecordHeader::BYTES..),
        };
        Record {
            lsn: found.lsn,
            end: found.end,
            header: found.header,
            body: body.unwrap_or_default(),
            around: &self.around,
        }
    }

    fn resync(&mut self) -> Result<Step, DecodeError> {
        let Some(page) = self.read_page()? else { return Ok(Step::NeedBytes) };
        self.state = match page.continues {
            true => State::SkipRecord { remaining: page.remaining },
            false => State::Record,
        };
        self.consume(page.length);
        Ok(Step::Again)
    }

    fn skip_record(&mut self, remaining: u32) -> Result<Step, DecodeError> {
        if remaining == 0 {
            self.state = State::Record;
            return Ok(Step::Again);
        }
        if self.is_at_page() {
            let Some(page) = self.read_page()? else { return Ok(Step::NeedBytes) };
            self.consume(page.length);
            if page.overwrites {
                self.state = State::Record;
                return Ok(Step::Again);
            }
            if !page.continues || page.remaining != remaining {
                let fault = Fault::ContinuationLength { found: page.remaining, expected: remaining };
                return Err(DecodeError::damaged(self.at, fault));
            }
        }
        let take = self.room_on_page().min(remaining as usize).min(self.unread().len());
        self.consume(take);
        self.state = State::SkipRecord { remaining: remaining - take as u32 };
        Ok(if take == 0 { Step::NeedBytes } else { Step::Again })
    }

    fn skip_segment(&mut self) -> Step {
        let behind = self.source.segment_size.offset_of(self.at);
        if behind == 0 {
            self.state = State::Record;
            return Step::Again;
        }
        let left = (self.source.segment_size.bytes() - behind) as usize; // at most 1 GiB
        let take = left.min(self.unread().len());
        self.consume(take);
        if take < left { Step::NeedBytes } else { Step::Again }
    }

    /// The header of the page that begins here, which is not yet consumed.
    fn read_page(&mut self) -> Result<Option<PageHeader>, DecodeError> {
        let source = &self.source;
        let page = PageHeader::read(self.unread(), self.at, source.major, source.segment_size, source.system_id)?;
        if let Some(page) = page {
            if let Some(before) = self.around.timeline.filter(|before| *before > page.timeline) {
                let fault = Fault::TimelineFell { found: page.timeline.get(), before: before.get() };
                return Err(DecodeError::damaged(self.at, fault));
            }
            self.around.timeline = Some(page.timeline);
        }
        Ok(page)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decode::testing::{WalWriter, Written, main_data, source};
    use crate::decode::{RmgrId, rmgr};

    fn read_all(reader: &mut Reader, bytes: &[u8], mut slice: impl FnMut() -> usize) -> Vec<Written> {
        let mut records = Vec::new();
        let mut rest = bytes;
        loop {
            while let Some(record) = reader.next_record().unwrap() {
                let Record { lsn, end, header, body, .. } = record;
                assert!(record.is_whole());
                records.push(Written { lsn, end, header, body: body.to_vec() });
            }
            if rest.is_empty() {
                return records;
            }
            let (now, later) = rest.split_at(slice().clamp(1, rest.len()));
            reader.push(now);
            rest = later;
        }
    }

    #[derive(Clone, Debug)]
    enum Write {
        Record { length: usize },
        Switch,
        Broken,
    }

    fn writes() -> impl Strategy<Value = Vec<Write>> {
        let write = prop_oneof![
            20 => (0_usize..400).prop_map(|length| Write::Record { length }),
            5 => (0_usize..40_000).prop_map(|length| Write::Record { length }),
            1 => Just(Write::Switch),
            1 => Just(Write::Broken),
        ];
        prop::collection::vec(write, 1..80)
    }

    fn write(writes: &[Write]) -> (WalWriter, Vec<Written>) {
        let mut wal = WalWriter::new(source(WalMajor::V15), Lsn::new(3 << 20));
        let mut written = Vec::new();
        for (index, step) in writes.iter().enumerate() {
            written.push(match step {
                Write::Record { length } => {
                    wal.record(RmgrId(10), 0, 1 + index as u32, &main_data(&vec![index as u8; *length]))
                }
                Write::Switch => wal.switch(),
                Write::Broken => wal.broken_record(&main_data(&[9; 20_000])),
            });
        }
        (wal, written)
    }

    #[test]
    fn after_damage_reading_goes_on_with_the_next_page() {
        let (wal, written) = write(&vec![Write::Record { length: 300 }; 200]);
        for (damaged, slice) in [(9_000, 1_000), (9_000, 100_000), (8_192, 1_000), (24_576 + 1, 7)] {
            let mut bytes = wal.bytes().to_vec();
            bytes[damaged] ^= 0x55;
            let mut reader = Reader::at_page(wal.source, written[0].lsn);
            let (mut found, mut errors) = (Vec::new(), 0);
            for piece in bytes.chunks(slice) {
                reader.push(piece);
                loop {
                    match reader.next_record() {
                        Ok(None) => break,
                        Ok(Some(record)) => found.push(record.lsn),
                        Err(_) => {
                            errors += 1;
                            reader.skip_page();
                        }
                    }
                }
            }
            let hit = Lsn::new(3 << 20) + damaged as u64;
            let page = hit.align_down(BLOCK_SIZE as u64);
            let whole = written.iter().filter(|record| {
                record.end <= page || record.lsn >= page + BLOCK_SIZE as u64 // on other pages altogether
            });
            let missing: Vec<Lsn> = whole.map(|record| record.lsn).filter(|lsn| !found.contains(lsn)).collect();
            assert!(errors >= 1 && missing.is_empty(), "damage at {damaged}: {errors} errors, {missing:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_records_do_not_depend_on_how_the_bytes_were_sliced(
            steps in writes(),
            slices in prop::collection::vec(prop_oneof![1_usize..64, 1_usize..20_000], 1..200),
        ) {
            let (wal, written) = write(&steps);
            let mut reader = Reader::at_page(wal.source, Lsn::new(3 << 20));
            let mut at = 0;
            let read = read_all(&mut reader, wal.bytes(), || { at += 1; slices[at % slices.len()] });
            prop_assert_eq!(&read, &written);
            prop_assert_eq!(reader.proved_to(), written.last().map(|w| w.end));
        }

        #[test]
        fn the_quick_way_to_a_record_finds_what_the_long_way_finds(steps in writes(), slice in 1_usize..20_000) {
            let (wal, _) = write(&steps);
            let mut readers = [0, 1].map(|_| Reader::at_page(wal.source, Lsn::new(3 << 20)));
            for bytes in wal.bytes().chunks(slice) {
                let [quick, long] = &mut readers;
                quick.push(bytes);
                long.push_with(bytes.len(), |room| { room.copy_from_slice(bytes); Ok::<_, DecodeError>(bytes.len()) }).unwrap();
                loop {
                    let found = [quick.next_record().unwrap(), long.next_of_any_kind().unwrap()];
                    let [quick, long] = found.map(|r| r.map(|r| (r.lsn, r.end, r.timeline(), r.header, r.body)));
                    prop_assert_eq!(quick, long);
                    if quick.is_none() {
                        break;
                    }
                }
            }
            prop_assert_eq!(readers[0].proved_to(), readers[1].proved_to());
        }

        #[test]
        fn reading_may_begin_at_any_page(steps in writes(), page in 0_usize..60) {
            let (wal, written) = write(&steps);
            let start = page.min(wal.bytes().len() / BLOCK_SIZE) * BLOCK_SIZE;
            let at = Lsn::new((3 << 20) + start as u64);
            // Behind a switch a segment holds zeros, where nothing can be found out.
            let is_zero = wal.bytes()[start..].iter().take(8).all(|b| *b == 0);
            prop_assume!(!is_zero && start < wal.bytes().len());
            let expected: Vec<_> = written.into_iter().filter(|w| w.lsn >= at).collect();
            let mut reader = Reader::at_page(wal.source, at);
            prop_assert_eq!(read_all(&mut reader, &wal.bytes()[start..], || 5000), expected);
        }

        #[test]
        fn a_flipped_bit_is_found_or_harmless_but_never_a_wrong_record(
            steps in writes(), byte in any::<prop::sample::Index>(), bit in 0_u8..8,
        ) {
            let (wal, written) = write(&steps);
            let mut bytes = wal.bytes().to_vec();
            let byte = byte.index(bytes.len());
            bytes[byte] ^= 1 << bit;
            let mut reader = Reader::at_page(wal.source, Lsn::new(3 << 20));
            reader.push(&bytes);
            let mut read = 0;
            while let Ok(Some(record)) = reader.next_record() {
                prop_assert_eq!((record.lsn, record.header), (written[read].lsn, written[read].header));
                prop_assert_eq!(record.body, &written[read].body[..]);
                read += 1;
            }
        }

        #[test]
        fn any_bytes_are_an_answer_and_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let mut reader = Reader::at_record(source(WalMajor::V18), Lsn::new((3 << 20) + 40));
            reader.push(&bytes);
            while let Ok(Some(record)) = reader.next_record() {
                let _ = record.parts();
            }
            let record = Record {
                lsn: Lsn::new(8),
                end: Lsn::new(16),
                header: RecordHeader::read(&[0; 24]),
                body: &bytes,
                around: &Around { timeline: None, major: WalMajor::V15 },
            };
            let header = RecordHeader { total_length: 24 + bytes.len() as u32, ..record.header };
            let record = Record { header, ..record };
            if let Ok(parts) = record.parts() {
                parts.blocks().for_each(|block| { block.unwrap(); });
            }
            for info in 0..=255 {
                let header = RecordHeader { info, rmgr: RmgrId(info & 1), ..header };
                let _ = rmgr::xact::read(&Record { header, ..record });
                let _ = rmgr::xlog::read(&Record { header, ..record });
            }
        }
    }

    #[test]
    fn the_page_header_of_each_major_is_known_and_others_are_refused() {
        for major in WalMajor::ALL {
            let mut wal = WalWriter::new(source(major), Lsn::new(1 << 20));
            wal.record(RmgrId(10), 0, 3, &main_data(b"row"));
            for reads in WalMajor::ALL {
                let mut reader = Reader::at_page(source(reads), Lsn::new(1 << 20));
                reader.push(wal.bytes());
                let result = reader.next_record();
                match reads == major {
                    true => assert!(result.unwrap().is_some()),
                    false => assert!(matches!(result, Err(DecodeError::OtherVersion { .. }))),
                }
            }
        }
    }

    #[test]
    fn a_recycled_segment_and_foreign_wal_are_refused() {
        let mut wal = WalWriter::new(source(WalMajor::V15), Lsn::new(1 << 20));
        wal.record(RmgrId(10), 0, 3, &main_data(b"row"));
        let fault = |mut reader: Reader| {
            reader.push(wal.bytes());
            match reader.next_record() {
                Err(DecodeError::Damaged { fault, .. }) => fault,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(fault(Reader::at_page(wal.source, Lsn::new(2 << 20))), Fault::PageAddress(Lsn::new(1 << 20)));
        let other = Source { system_id: Some(SystemId::new(43)), ..wal.source };
        assert_eq!(fault(Reader::at_page(other, Lsn::new(1 << 20))), Fault::OtherCluster(42));
        let other = Source { segment_size: SegmentSize::new(2 << 20).unwrap(), ..wal.source };
        assert!(matches!(fault(Reader::at_page(other, Lsn::new(1 << 20))), Fault::SegmentSize(_)));
    }

    #[test]
    fn zeros_are_the_end_of_what_was_written_and_no_damage() {
        let mut wal = WalWriter::new(source(WalMajor::V15), Lsn::new(1 << 20));
        let record = wal.record(RmgrId(10), 0, 3, &main_data(b"row"));
        let mut reader = Reader::at_page(wal.source, Lsn::new(1 << 20));
        reader.push(wal.bytes());
        reader.push(&[0; 64]);
        assert!(reader.next_record().unwrap().is_some());
        assert_eq!(reader.next_record().unwrap_err(), DecodeError::Unwritten { at: record.end });
        assert_eq!(reader.proved_to(), Some(record.end));
    }

    #[test]
    fn a_record_that_replaces_another_than_the_lost_one_is_refused() {
        let mut wal = WalWriter::new(source(WalMajor::V15), Lsn::new(1 << 20));
        wal.broken_record(&main_data(&[1; 9000]));
        let mut bytes = wal.bytes().to_vec();
        // The place of the lost record, 24 (page) + 24 (record) + 2 (main data header) into the second page.
        let at = BLOCK_SIZE + 24 + 24 + 2;
        bytes[at] ^= 0xFF;
        let record = &bytes[BLOCK_SIZE + 24..][..42];
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
        bytes[BLOCK_SIZE + 24 + 20..][..4].copy_from_slice(&crc.to_le_bytes());
        let mut reader = Reader::at_page(wal.source, Lsn::new(1 << 20));
        reader.push(&bytes);
        let error = reader.next_record().unwrap_err();
        assert!(matches!(error, DecodeError::Damaged { fault: Fault::Overwritten { .. }, .. }), "{error}");
    }

    #[test]
    fn a_giant_record_is_proved_without_being_kept() {
        let mut wal = WalWriter::new(source(WalMajor::V15), Lsn::new(1 << 20));
        let giant = wal.record(RmgrId(21), 0, 3, &main_data(&vec![7; RECORD_KEPT_MAX + 1000]));
        let small = wal.record(RmgrId(10), 0, 3, &main_data(b"row"));
        let mut reader = Reader::at_page(wal.source, Lsn::new(1 << 20));
        for bytes in wal.bytes().chunks(1 << 20) {
            reader.push(bytes);
            if let Some(record) = reader.next_record().unwrap() {
                assert_eq!((record.lsn, record.is_whole()), (giant.lsn, false));
                assert!(record.parts().is_err());
                break;
            }
        }
        assert!(reader.partial.len() <= RECORD_KEPT_MAX);
        assert_eq!(reader.next_record().unwrap().unwrap().lsn, small.lsn);
        wal.record(RmgrId(10), 0, 3, &main_data(&[1; 9000]));
        let pushed = reader.pushed_to() - Lsn::new(1 << 20);
        reader.push(&wal.bytes()[pushed as usize..]);
        reader.next_record().unwrap().unwrap();
        assert!(reader.partial.capacity() <= PARTIAL_CAPACITY_MAX);
    }
}
