//! Any body under any header, with a checksum that fits: the reader takes it, and whatever is read of it is an answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use walguard::decode::change::Action;
use walguard::decode::explain::explain;
use walguard::decode::{Change, Reader, Source, WalMajor};
use walguard::pg::{Lsn, SegmentSize};

const PAGE: usize = 8192;

/// A page that holds one record.
fn page(major: WalMajor, at: Lsn, info: u8, rmgr: u8, body: &[u8]) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE);
    page.extend(major.page_magic().to_le_bytes());
    page.extend(0_u16.to_le_bytes()); // flags
    page.extend(1_u32.to_le_bytes()); // timeline
    page.extend(at.bytes().to_le_bytes());
    page.extend(0_u64.to_le_bytes()); // nothing is continued
    let mut header = Vec::from((24 + body.len() as u32).to_le_bytes());
    header.extend(700_u32.to_le_bytes()); // transaction
    header.extend((at.bytes() - 64).to_le_bytes()); // the record before
    header.extend([info, rmgr, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &header);
    page.extend(header);
    page.extend(crc.to_le_bytes());
    page.extend(body);
    page
}

fuzz_target!(|input: (u8, u8, u8, &[u8])| {
    let (major, info, rmgr, body) = input;
    let body = &body[..body.len().min(PAGE - 48)];
    let major = WalMajor::ALL[usize::from(major) % WalMajor::ALL.len()];
    let segment_size = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
    let at = Lsn::new((1 << 20) + PAGE as u64);
    let mut reader = Reader::at_page(Source { major, segment_size, system_id: None }, at);
    reader.push(&page(major, at, info, rmgr, body));
    let record = reader.next_record().expect("the checksum fits").expect("the record is whole");
    if let Ok(explanation) = explain(&record) {
        let _ = explanation.to_string();
    }
    if let Ok(Change { action: Action::Ended(end), .. }) = Change::read(&record) {
        let _ = (end.subxacts().count(), end.dropped_files().count(), end.invalidations.messages.iter().count());
    }
});
