//! Messages made by hand, and whatever else may come.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

use proptest::prelude::*;

use super::{Decoder, Fault, Message, OldRow, ReplicaIdentity, Value};
use crate::decode::change::{Action, RowKind};
use crate::decode::testing::fuzzed;
use crate::pg::{Lsn, Oid, PgTime, Xid};

/// A message that is put together field by field.
#[derive(Clone, Debug)]
struct Bytes(Vec<u8>);

fn tag(tag: u8) -> Bytes {
    Bytes(vec![tag])
}

impl Bytes {
    fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u8(self, number: u8) -> Self {
        self.put(&[number])
    }

    fn u16(self, number: u16) -> Self {
        self.put(&number.to_be_bytes())
    }

    fn u32(self, number: u32) -> Self {
        self.put(&number.to_be_bytes())
    }

    fn u64(self, number: u64) -> Self {
        self.put(&number.to_be_bytes())
    }

    fn text(self, text: &str) -> Self {
        self.put(text.as_bytes()).u8(0)
    }

    /// A row of one column.
    fn row(self, kind: u8, value: &[u8]) -> Self {
        self.u8(kind).u16(1).u8(b't').u32(value.len() as u32).put(value)
    }
}

fn begin(xid: u32, commit_lsn: u64) -> Bytes {
    tag(b'B').u64(commit_lsn).u64(5).u32(xid)
}

fn commit(lsn: u64) -> Bytes {
    tag(b'C').u8(0).u64(lsn).u64(lsn + 8).u64(7)
}

fn stream(top: u32) -> Bytes {
    tag(b'S').u32(top).u8(1)
}

fn streamed_insert(xid: u32) -> Bytes {
    tag(b'I').u32(xid).u32(16_400).row(b'N', b"1")
}

fn relation() -> Bytes {
    let relation = tag(b'R').u32(16_400).text("public").text("orders").u8(b'd').u16(2);
    relation.u8(1).text("id").u32(23).u32(u32::MAX).u8(0).text("note").u32(25).u32(u32::MAX)
}

fn decoder() -> Decoder {
    Decoder::new(Oid(5))
}

fn xid(number: u32) -> Xid {
    Xid::new(number).unwrap()
}

/// What happens at a change, in words that are easy to compare.
fn say(decoder: &mut Decoder, message: &Bytes) -> String {
    let change = match decoder.read(Lsn::new(64), PgTime::from_micros(99), &message.0) {
        Ok(None) => return String::new(),
        Ok(Some(change)) => change,
        Err(error) => return error.fault.to_string(),
    };
    let whose = match (change.xid, change.top_xid) {
        (Some(xid), Some(top)) => format!("{xid} of {top}: "),
        (Some(xid), None) => format!("{xid}: "),
        _ => String::new(),
    };
    let what = match change.action {
        Action::RelationRow(row) => format!("{:?} {}", row.kind, row.relation),
        Action::Truncated(truncate) => format!(
            "truncate {:?} of {} cascade {} restart {}",
            truncate.relations.iter().map(|oid| oid.0).collect::<Vec<_>>(),
            truncate.database,
            truncate.cascade(),
            truncate.restart_sequences()
        ),
        Action::Ended(end) => format!(
            "{}{} {:?} at {}-{}, {}{:?}{}",
            if end.committed { "commit" } else { "abort" },
            if end.prepared { " prepared" } else { "" },
            end.xid.map(Xid::get),
            change.lsn,
            change.end,
            end.time.micros(),
            end.subxacts().map(Xid::get).collect::<Vec<_>>(),
            end.origin.map_or(String::new(), |origin| format!(" from {}", origin.lsn)),
        ),
        Action::Prepared(prepare) => format!(
            "prepare {} at {}-{}{:?}",
            String::from_utf8_lossy(prepare.gid),
            change.lsn,
            change.end,
            prepare.subxacts.iter().map(Xid::get).collect::<Vec<_>>()
        ),
        Action::Message(message) => format!(
            "message {}={} {}",
            String::from_utf8_lossy(message.prefix),
            String::from_utf8_lossy(message.content),
            message.transactional
        ),
        action => format!("{action:?}"),
    };
    whose + &what
}

fn say_all(messages: &[Bytes]) -> Vec<String> {
    let mut decoder = decoder();
    messages.iter().map(|message| say(&mut decoder, message)).filter(|said| !said.is_empty()).collect()
}

#[test]
fn a_transaction_gives_its_rows_to_the_transaction_that_began() {
    let messages = [
        begin(700, 0x100),
        tag(b'O').u64(0x20).text("elsewhere"),
        relation(),
        tag(b'Y').u32(20_000).text("public").text("mood"),
        tag(b'I').u32(16_400).row(b'N', b"1"),
        tag(b'U').u32(16_400).row(b'N', b"2"),
        tag(b'U').u32(16_400).row(b'K', b"2").row(b'N', b"3"),
        tag(b'D').u32(16_400).row(b'O', b"3"),
        tag(b'T').u32(2).u8(3).u32(16_400).u32(16_500),
        tag(b'M').u8(1).u64(0x60).text("note").u32(2).put(b"hi"),
        commit(0x100),
        tag(b'M').u8(0).u64(0x60).text("free").u32(0),
    ];
    assert_eq!(
        say_all(&messages),
        [
            "700: Insert 16400",
            "700: Update 16400",
            "700: Update 16400",
            "700: Delete 16400",
            "700: truncate [16400, 16500] of 5 cascade true restart true",
            "700: message note=hi true",
            "700: commit Some(700) at 0/100-0/108, 7[] from 0/20",
            "message free= false",
        ]
    );
}

#[test]
fn streams_of_two_transactions_are_kept_apart_and_their_subtransactions_named_at_the_end() {
    let abort = |top: u32, sub: u32| tag(b'A').u32(top).u32(sub);
    let messages = [
        stream(700),
        relation().0.split_first().map(|(tag, rest)| Bytes(vec![*tag]).u32(700).put(rest)).unwrap(),
        streamed_insert(700),
        streamed_insert(703),
        streamed_insert(702),
        tag(b'E'),
        stream(800),
        streamed_insert(801),
        tag(b'T').u32(801).u32(1).u8(0).u32(16_400),
        tag(b'E'),
        abort(700, 702),
        tag(b'S').u32(700).u8(0),
        streamed_insert(704),
        tag(b'E'),
        abort(800, 800).u64(0x900).u64(42),
        tag(b'c').u32(700).u8(0).u64(0xA00).u64(0xA08).u64(8),
    ];
    assert_eq!(
        say_all(&messages),
        [
            "700: Insert 16400",
            "703 of 700: Insert 16400",
            "702 of 700: Insert 16400",
            "801 of 800: Insert 16400",
            "801 of 800: truncate [16400] of 5 cascade false restart false",
            "702 of 700: abort Some(702) at 0/40-0/40, 99[]",
            "704 of 700: Insert 16400",
            "800: abort Some(800) at 0/40-0/900, 42[801]",
            "700: commit Some(700) at 0/A00-0/A08, 8[703, 704]",
        ]
    );
}

#[test]
fn prepared_transactions_end_twice() {
    let preparation = |tag: Bytes, xid: u32| tag.u64(0x200).u64(0x208).u64(6).u32(xid).text("gid");
    let messages = [
        preparation(tag(b'b'), 700),
        tag(b'I').u32(16_400).row(b'N', b"1"),
        preparation(tag(b'P').u8(0), 700),
        tag(b'K').u8(0).u64(0x300).u64(0x308).u64(9).u32(700).text("gid"),
        stream(800),
        streamed_insert(801),
        tag(b'E'),
        preparation(tag(b'p').u8(0), 800),
        tag(b'r').u8(0).u64(0x208).u64(0x408).u64(6).u64(10).u32(800).text("gid"),
    ];
    assert_eq!(
        say_all(&messages),
        [
            "700: Insert 16400",
            "700: prepare gid at 0/200-0/208[]",
            "commit prepared Some(700) at 0/300-0/308, 9[]",
            "801 of 800: Insert 16400",
            "800: prepare gid at 0/200-0/208[801]",
            "abort prepared Some(800) at 0/40-0/408, 10[]",
        ]
    );
}

#[test]
fn a_message_in_the_wrong_place_is_told() {
    let insert = || tag(b'I').u32(16_400).row(b'N', b"1");
    for (messages, fault) in [
        (vec![insert()], "a row comes outside of a transaction"),
        (vec![commit(1)], "a commit comes outside of a transaction"),
        (vec![tag(b'E')], "the end of a stream comes outside of a transaction"),
        (vec![tag(b'O').u64(1).text("x")], "an origin comes outside of a transaction"),
        (vec![begin(700, 1), begin(701, 1)], "a begin comes within another transaction"),
        (vec![stream(700), stream(700)], "a stream comes within another transaction"),
        (vec![stream(700), commit(1)], "a commit comes outside of a transaction"),
        (vec![begin(700, 1), commit(2)], "a commit elsewhere than its transaction's beginning said is impossible"),
        (
            vec![
                tag(b'b').u64(1).u64(2).u64(3).u32(7).text("a"),
                tag(b'P').u8(0).u64(1).u64(2).u64(3).u32(8).text("a"),
            ],
            "it ends transaction 8, the one that began is 7",
        ),
        (vec![begin(0, 1)], "transaction 0 is impossible"),
        (vec![Bytes(Vec::new())], "it is empty"),
        (vec![tag(b'Z')], "no message has the tag 0x5a"),
        (vec![tag(b'E').u8(0), insert()], "1 bytes are left over behind it"),
        (vec![tag(b'T').u32(u32::MAX).u8(0)], "a negative length is impossible"),
        (vec![tag(b'T').u32(1 << 30).u8(0)], "it ends within its tables"),
        (vec![tag(b'R').u32(1).text("a").text("b").u8(b'd').u16(1601)], "the number of columns is impossible"),
    ] {
        assert!(say_all(&messages).contains(&fault.to_owned()), "{:?} for {fault}", say_all(&messages));
    }
}

#[test]
fn a_table_is_described_until_it_is_described_anew() {
    let mut decoder = decoder();
    assert!(decoder.relation(Oid(16_400)).is_none());
    say(&mut decoder, &begin(700, 1));
    say(&mut decoder, &relation());
    let described = decoder.relation(Oid(16_400)).unwrap();
    assert_eq!((described.schema, described.name), (&b"public"[..], &b"orders"[..]));
    assert_eq!((described.identity, described.columns.len()), (ReplicaIdentity::Default, 2));
    let columns: Vec<_> = described.columns.iter().map(|column| (column.key, column.name, column.type_oid.0)).collect();
    assert_eq!(columns, [(true, &b"id"[..], 23), (false, &b"note"[..], 25)]);
    say(&mut decoder, &tag(b'R').u32(16_400).text("").text("renamed").u8(b'f').u16(0));
    let described = decoder.relation(Oid(16_400)).unwrap();
    assert_eq!((described.schema, described.name, described.columns.is_empty()), (&b""[..], &b"renamed"[..], true));
}

#[test]
fn descriptions_of_more_tables_than_are_kept_cost_no_more_memory() {
    let mut decoder = decoder();
    say(&mut decoder, &begin(700, 1));
    let name = "x".repeat(1 << 20);
    for oid in 0..40 {
        assert_eq!(say(&mut decoder, &tag(b'R').u32(oid).text("").text(&name).u8(b'd').u16(0)), "");
    }
    let kept = (0..40).filter(|oid| decoder.relation(Oid(*oid)).is_some()).count();
    assert_eq!(kept, 15, "of 16 MiB");
    // A table that now has a long description loses the old one, and makes room.
    say(&mut decoder, &tag(b'R').u32(0).text("").text(&name.repeat(3)).u8(b'd').u16(0));
    assert!(decoder.relation(Oid(0)).is_none());
    say(&mut decoder, &tag(b'R').u32(39).text("").text(&name).u8(b'd').u16(0));
    assert!(decoder.relation(Oid(39)).is_some());
}

#[test]
fn the_values_of_a_row_are_told_apart() {
    let row = tag(b'U').u32(1).u8(b'O').u16(1).u8(b'n');
    let message = row.u8(b'N').u16(4).u8(b'n').u8(b'u').u8(b't').u32(1).put(b"7").u8(b'b').u32(2).put(&[0, 7]);
    let Message::Update { old: Some(OldRow::Whole(old)), new, .. } = Message::read(&message.0, false).unwrap() else {
        panic!("an update with an old row");
    };
    assert_eq!(old.iter().collect::<Vec<_>>(), [Value::Null]);
    let values: Vec<_> = new.iter().collect();
    assert_eq!(values, [Value::Null, Value::Unchanged, Value::Text(b"7"), Value::Binary(&[0, 7])]);
    assert_eq!((new.len(), new.is_empty()), (4, false));
}

#[test]
fn rows_count_as_the_physical_ones_do() {
    let mut decoder = decoder();
    say(&mut decoder, &begin(700, 1));
    let message = tag(b'D').u32(16_400).row(b'K', b"1");
    let change = decoder.read(Lsn::new(64), PgTime::from_micros(0), &message.0).unwrap().unwrap();
    let Action::RelationRow(row) = change.action else { panic!("{change:?}") };
    assert_eq!((row.database, row.kind, row.counts().deleted), (Oid(5), RowKind::Delete, 1));
    assert_eq!((change.xid, change.top_xid), (Some(xid(700)), None));
}

/// One of each message, valid in its place, to be cut and changed.
fn one_of_each() -> Vec<(bool, Bytes)> {
    let prepared = |tag: Bytes| tag.u64(1).u64(2).u64(3).u32(7).text("gid");
    vec![
        (false, begin(700, 1)),
        (false, commit(1)),
        (false, tag(b'O').u64(1).text("origin")),
        (false, relation()),
        (true, tag(b'Y').u32(7).u32(1).text("a").text("b")),
        (true, streamed_insert(7)),
        (false, tag(b'U').u32(1).row(b'K', b"2").row(b'N', b"3")),
        (false, tag(b'D').u32(1).row(b'O', b"2")),
        (true, tag(b'T').u32(7).u32(2).u8(3).u32(1).u32(2)),
        (true, tag(b'M').u32(7).u8(1).u64(1).text("p").u32(3).put(b"abc")),
        (false, stream(7)),
        (true, tag(b'E')),
        (false, tag(b'c').u32(7).u8(0).u64(1).u64(2).u64(3)),
        (false, tag(b'A').u32(7).u32(8).u64(1).u64(2)),
        (false, prepared(tag(b'b'))),
        (false, prepared(tag(b'P').u8(0))),
        (false, prepared(tag(b'p').u8(0))),
        (false, tag(b'K').u8(0).u64(1).u64(2).u64(3).u32(7).text("gid")),
        (false, tag(b'r').u8(0).u64(1).u64(2).u64(3).u64(4).u32(7).text("gid")),
    ]
}

#[test]
fn a_message_that_is_cut_short_or_goes_on_is_no_message() {
    for (in_stream, Bytes(message)) in one_of_each() {
        assert!(Message::read(&message, in_stream).is_ok(), "{}", char::from(message[0]));
        for length in 0..message.len() {
            // An abort without place and time is one as well.
            let is_whole = message[0] == b'A' && length == 9;
            assert_eq!(Message::read(&message[..length], in_stream).is_ok(), is_whole, "{length} of {message:?}");
        }
        let longer = [&message[..], &[1]].concat();
        assert!(Message::read(&longer, in_stream).is_err(), "{longer:?}");
    }
    assert_eq!(Message::read(&tag(b'E').u8(1).0, true), Err(Fault::LeftOver(1)));
}

#[test]
fn what_the_fuzzer_found_is_changes_or_errors_and_not_a_panic() {
    let (mut inputs, mut changes) = (0, 0);
    for mut rest in fuzzed(include_bytes!("../../../tests/corpus/fuzz/pgoutput")) {
        let mut decoder = decoder();
        inputs += 1;
        // Messages, each behind its length in one byte, as in `tests/fuzz/fuzz_targets/pgoutput.rs`.
        while let Some((length, behind)) = rest.split_first() {
            let (message, behind) = behind.split_at(behind.len().min(usize::from(*length)));
            rest = behind;
            let _ = (Message::read(message, false).is_ok(), Message::read(message, true).is_ok());
            match decoder.read(Lsn::new(64), PgTime::from_micros(99), message) {
                Ok(change) => changes += usize::from(change.is_some()),
                Err(_) => break,
            }
        }
    }
    assert!(inputs >= 500 && changes >= 100, "{inputs} inputs, {changes} changes: the corpus shrank");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_in_any_order_are_changes_or_errors_and_not_a_panic(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..40),
    ) {
        let mut decoder = decoder();
        for message in messages {
            say(&mut decoder, &Bytes(message));
        }
    }

    #[test]
    fn mutilated_messages_in_any_order_are_changes_or_errors_and_not_a_panic(
        messages in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<u8>()))),
            0..60,
        ),
    ) {
        let (mut decoder, samples) = (decoder(), one_of_each());
        for (sample, change) in messages {
            let mut message = samples[sample.index(samples.len())].1.clone();
            if let Some((at, byte)) = change {
                let at = at.index(message.0.len());
                message.0[at] = byte;
            }
            say(&mut decoder, &message);
        }
    }
}
