//! Any bytes, in slices of any size, at any place in a segment: records or an error, the same for all slices.
#![no_main]

use libfuzzer_sys::fuzz_target;
use walguard::decode::{DecodeError, Reader, Source, WalMajor};
use walguard::pg::{Lsn, SegmentSize};

/// Where each record lies, and what ended the reading.
fn read(source: Source, at: Lsn, bytes: &[u8], slice: usize) -> (Vec<(Lsn, Lsn)>, Option<DecodeError>) {
    let mut reader = Reader::at_page(source, at);
    let mut found = Vec::new();
    for bytes in bytes.chunks(slice.max(1)) {
        reader.push(bytes);
        loop {
            match reader.next_record() {
                Ok(Some(record)) => found.push((record.lsn, record.end)),
                Ok(None) => break,
                Err(error) => return (found, Some(error)),
            }
        }
    }
    (found, None)
}

fuzz_target!(|input: (u8, u8, u16, &[u8])| {
    let (major, page, slice, bytes) = input;
    let major = WalMajor::ALL[usize::from(major) % WalMajor::ALL.len()];
    let segment_size = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
    let source = Source { major, segment_size, system_id: None };
    let at = Lsn::new((1 << 20) + u64::from(page % 128) * 8192);
    assert_eq!(read(source, at, bytes, bytes.len()), read(source, at, bytes, usize::from(slice)));
});
