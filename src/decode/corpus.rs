//! Records of real servers, and what those servers say of them: a shortest and a longest one of each operation, as
//! `tests/it/decode_parity.rs` found and proved them.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

use proptest::prelude::*;

use super::explain::explain;
use super::record::Around;
use super::rmgr::{heap, heap2, xact};
use super::{Change, DecodeError, Fault, Reader, Record, RecordHeader, RmgrId, Source, WalMajor};
use crate::decode::change::{Action, RowKind};
use crate::pg::{Lsn, Xid};

/// A record that owns its bytes.
#[derive(Clone, Debug)]
struct Sample {
    around: Around,
    lsn: Lsn,
    header: RecordHeader,
    body: Vec<u8>,
    /// The line of `pg_waldump`.
    line: &'static str,
}

const fn around(major: WalMajor) -> Around {
    Around { timeline: None, major }
}

impl Sample {
    fn record(&self) -> Record<'_> {
        let (lsn, end) =
            (self.lsn, Lsn::new((self.lsn.bytes() + u64::from(self.header.total_length)).next_multiple_of(8)));
        let Self { header, .. } = *self;
        Record { lsn, end, header, body: &self.body, around: &self.around }
    }

    fn is(&self, name: &str) -> bool {
        let explanation = explain(&self.record()).unwrap();
        format!("{} {}", explanation.manager, explanation.operation) == name
    }
}

fn samples() -> Vec<Sample> {
    let corpus: [(WalMajor, &[u8], &str); 4] = [
        (
            WalMajor::V15,
            include_bytes!("../../tests/corpus/wal/15.records"),
            include_str!("../../tests/corpus/wal/15.waldump"),
        ),
        (
            WalMajor::V16,
            include_bytes!("../../tests/corpus/wal/16.records"),
            include_str!("../../tests/corpus/wal/16.waldump"),
        ),
        (
            WalMajor::V17,
            include_bytes!("../../tests/corpus/wal/17.records"),
            include_str!("../../tests/corpus/wal/17.waldump"),
        ),
        (
            WalMajor::V18,
            include_bytes!("../../tests/corpus/wal/18.records"),
            include_str!("../../tests/corpus/wal/18.waldump"),
        ),
    ];
    let mut samples = Vec::new();
    for (major, mut records, lines) in corpus {
        for line in lines.lines() {
            let header = RecordHeader::read(records.first_chunk().unwrap());
            let (record, rest) = records.split_at(header.total_length as usize);
            records = rest;
            let lsn = line.split_once("lsn: ").unwrap().1.split_once(',').unwrap().0.parse().unwrap();
            samples.push(Sample {
                around: around(major),
                lsn,
                header,
                body: record[RecordHeader::BYTES..].to_vec(),
                line,
            });
        }
        assert!(records.is_empty());
    }
    samples
}

#[test]
fn every_kind_of_record_is_explained_as_postgres_explains_it() {
    let samples = samples();
    assert!(samples.len() > 4 * 150, "the corpus shrank to {} records", samples.len());
    for sample in &samples {
        assert_eq!(explain(&sample.record()).unwrap().to_string(), sample.line, "PostgreSQL {}", sample.around.major);
    }
}

#[test]
fn every_kind_of_record_means_something() {
    for sample in &samples() {
        let change = Change::read(&sample.record()).unwrap_or_else(|error| panic!("{}: {error}", sample.line));
        assert_eq!(change.xid, sample.header.xid);
        let manager = sample.header.rmgr;
        let fits = match change.action {
            Action::Rows(_) => [RmgrId::HEAP, RmgrId::HEAP2].contains(&manager),
            Action::RelationRow(_) => false, // only logical replication tells rows by their relation
            Action::Truncated(_) => sample.is("Heap TRUNCATE"),
            Action::FileCreated { .. } => sample.is("Storage CREATE"),
            Action::FileTruncated(_) => sample.is("Storage TRUNCATE"),
            Action::Ended(_) | Action::Prepared(_) | Action::Assigned(_) => manager == RmgrId::XACT,
            Action::Invalidated(_) => [RmgrId::XACT, RmgrId::STANDBY].contains(&manager),
            Action::Locked(_) | Action::Running(_) => manager == RmgrId::STANDBY,
            Action::Database(_) => manager == RmgrId::DATABASE,
            Action::Tablespace(_) => manager == RmgrId::TABLESPACE,
            Action::Remapped(_) => manager == RmgrId::RELMAP,
            Action::Sequence(_) => manager == RmgrId::SEQUENCE,
            Action::Message(_) => manager == RmgrId::LOGICAL_MESSAGE,
            Action::Machinery(_) => manager == RmgrId::XLOG,
            Action::Pages => !sample.is("Heap INSERT") && !sample.is("Heap DELETE"),
        };
        assert!(fits, "{:?} of {}", change.action, sample.line);
        read_everything(&sample.record());
    }
}

#[test]
fn a_speculative_insert_counts_when_it_is_confirmed_and_never_if_it_is_taken_back() {
    let samples = samples();
    let insert = samples.iter().find(|sample| sample.is("Heap INSERT")).unwrap();
    let confirm = samples.iter().find(|sample| sample.is("Heap HEAP_CONFIRM")).unwrap();
    let delete = samples.iter().find(|sample| sample.is("Heap DELETE")).unwrap();
    let rows = |sample: &Sample| match Change::read(&sample.record()).unwrap().action {
        Action::Rows(rows) => rows,
        action => panic!("{action:?}"),
    };
    assert_eq!((rows(insert).kind, rows(insert).counts().inserted), (RowKind::Insert, 1));
    assert_eq!((rows(confirm).kind, rows(confirm).counts().inserted), (RowKind::Confirm, 1));
    assert_eq!((rows(delete).kind, rows(delete).counts().deleted), (RowKind::Delete, 1));
    // The flags of a short insert are the last byte of its main data, and so are those of a delete without old row.
    let with_flags = |sample: &Sample, flags: u8| {
        let mut sample = sample.clone();
        *sample.body.last_mut().unwrap() = flags;
        rows(&sample)
    };
    let speculative = with_flags(insert, 0x04);
    assert_eq!((speculative.kind, speculative.counts().inserted), (RowKind::SpeculativeInsert, 0));
    let taken_back = with_flags(delete, 0x08);
    assert_eq!((taken_back.kind, taken_back.counts().deleted), (RowKind::SuperDelete, 0));
    let moved = with_flags(delete, 0x10);
    assert_eq!((moved.kind, moved.counts().deleted, moved.counts().moved), (RowKind::MoveOut, 0, 1));
}

#[test]
fn an_unknown_operation_or_manager_is_told_with_its_place() {
    let samples = samples();
    let heap = samples.iter().find(|sample| sample.header.rmgr == RmgrId::STORAGE).unwrap();
    let mut unknown = heap.clone();
    unknown.header.info = 0xF0;
    let error = Change::read(&unknown.record()).unwrap_err();
    assert_eq!(error.at(), heap.lsn);
    assert!(error.to_string().contains("no operation 0xf0"), "{error}");
    assert!(explain(&unknown.record()).is_err());
    unknown.header.rmgr = RmgrId(77);
    let error = Change::read(&unknown.record()).unwrap_err();
    assert_eq!(error, super::DecodeError::damaged(heap.lsn, Fault::UnknownManager(77)));
    unknown.header.rmgr = RmgrId(137);
    assert!(matches!(Change::read(&unknown.record()).unwrap().action, Action::Pages), "an extension's record");
    let explanation = explain(&unknown.record()).unwrap();
    assert_eq!((&*explanation.manager, &*explanation.operation), ("custom137", "UNKNOWN (f0)"));
    assert_eq!(explanation.description, "rmid: 137");
}

/// Reads all that can be read of a record, whatever it is.
fn read_everything(record: &Record<'_>) {
    if let Ok(explanation) = explain(record) {
        assert!(!explanation.to_string().is_empty());
    }
    if let Ok(Change { action: Action::Ended(end), .. }) = Change::read(record) {
        let _ = (end.subxacts().count(), end.dropped_files().count(), end.invalidations.messages.iter().count());
    }
    let _ = (heap::read(record), heap2::read(record), xact::read_any(record));
    let (short_way, long_way) = (Change::read(record), Change::read_any(record));
    assert_eq!(format!("{short_way:?}"), format!("{long_way:?}"));
}

#[test]
fn what_the_fuzzer_found_is_an_answer_and_not_a_panic() {
    let mut inputs = 0;
    for input in super::testing::fuzzed(include_bytes!("../../tests/corpus/fuzz/records")) {
        // As in `tests/fuzz/fuzz_targets/records.rs`: three bytes choose, the rest is the record's body.
        let Some(([major, info, rmgr], body)) = input.split_first_chunk() else { continue };
        let header = RecordHeader {
            total_length: (RecordHeader::BYTES + body.len()) as u32,
            xid: Xid::new(700),
            previous: Lsn::new(8),
            info: *info,
            rmgr: RmgrId(*rmgr),
            crc: 0,
        };
        let major = WalMajor::ALL[usize::from(*major) % WalMajor::ALL.len()];
        read_everything(
            &Sample { around: around(major), lsn: Lsn::new(64), header, body: body.to_vec(), line: "" }.record(),
        );
        inputs += 1;
    }
    assert!(inputs >= 900, "the corpus shrank to {inputs} inputs");
}

/// Where each record lies, and what ended the reading.
fn read_in_slices(source: Source, at: Lsn, bytes: &[u8], slice: usize) -> (Vec<(Lsn, Lsn)>, Option<DecodeError>) {
    let (mut reader, mut found) = (Reader::at_page(source, at), Vec::new());
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

#[test]
fn what_the_fuzzer_found_is_read_the_same_in_slices_of_any_size() {
    let mut inputs = 0;
    for input in super::testing::fuzzed(include_bytes!("../../tests/corpus/fuzz/reader")) {
        // As in `tests/fuzz/fuzz_targets/reader.rs`: four bytes choose, the rest is WAL.
        let Some(([major, page, low, high], bytes)) = input.split_first_chunk() else { continue };
        let major = WalMajor::ALL[usize::from(*major) % WalMajor::ALL.len()];
        let source = Source { system_id: None, ..super::testing::source(major) };
        let at = Lsn::new((1 << 20) + u64::from(page % 128) * 8192);
        let slice = u16::from_le_bytes([*low, *high]).into();
        assert_eq!(read_in_slices(source, at, bytes, bytes.len()), read_in_slices(source, at, bytes, slice));
        inputs += 1;
    }
    assert!(inputs >= 50, "the corpus shrank to {inputs} inputs");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_mutilated_record_is_an_answer_and_not_a_panic(
        sample in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        info in prop::option::of(any::<u8>()),
        manager in prop::option::of(0_u8..24),
        major in prop::option::of(0_usize..5),
    ) {
        let samples = samples();
        let mut sample = samples[sample.index(samples.len())].clone();
        for (at, byte) in changes {
            if !sample.body.is_empty() {
                let at = at.index(sample.body.len());
                sample.body[at] = byte;
            }
        }
        if let Some(cut) = cut {
            sample.body.truncate(cut.index(sample.body.len() + 1));
        }
        // Parts are read only of a record that is whole.
        sample.header.total_length = (RecordHeader::BYTES + sample.body.len()) as u32;
        sample.header.info = info.unwrap_or(sample.header.info);
        sample.header.rmgr = manager.map_or(sample.header.rmgr, RmgrId);
        sample.around.major = major.map_or(sample.around.major, |major| WalMajor::ALL[major]);
        read_everything(&sample.record());
    }

    #[test]
    fn any_main_data_of_any_operation_is_an_answer_and_not_a_panic(
        data in prop::collection::vec(any::<u8>(), 0..200),
        info in any::<u8>(),
        manager in 0_u8..22,
        major in 0_usize..5,
    ) {
        let body = super::testing::main_data(&data);
        let header = RecordHeader {
            total_length: (RecordHeader::BYTES + body.len()) as u32,
            xid: None,
            previous: Lsn::new(8),
            info,
            rmgr: RmgrId(manager),
            crc: 0,
        };
        read_everything(&Sample { around: around(WalMajor::ALL[major]), lsn: Lsn::new(64), header, body, line: "" }.record());
    }
}
