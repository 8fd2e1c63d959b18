//! Any messages of logical replication, one after the other: changes or errors, and what a message lends can be read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use walguard::decode::change::Action;
use walguard::decode::pgoutput::{Decoder, Message, OldRow};
use walguard::pg::{Lsn, Oid, PgTime};

/// Reads all that a message lends.
fn read_everything(message: Message<'_>) {
    match message {
        Message::Insert { new, .. } => assert_eq!(new.iter().count(), new.len()),
        Message::Update { old, new, .. } => {
            assert_eq!(new.iter().count(), new.len());
            if let Some(OldRow::Key(old) | OldRow::Whole(old)) = old {
                assert_eq!(old.iter().count(), old.len());
            }
        }
        Message::Delete { old: OldRow::Key(old) | OldRow::Whole(old), .. } => assert_eq!(old.iter().count(), old.len()),
        Message::Relation { relation, .. } => assert_eq!(relation.columns.iter().count(), relation.columns.len()),
        _ => {}
    }
}

// Messages, each behind its length in one byte: a fuzzer finds its way through them without help.
fuzz_target!(|input: &[u8]| {
    let mut decoder = Decoder::new(Oid(5));
    let mut rest = input;
    let mut at = 64;
    while let Some((length, behind)) = rest.split_first() {
        let (message, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        at += 8;
        for in_stream in [false, true] {
            if let Ok(message) = Message::read(message, in_stream) {
                read_everything(message);
            }
        }
        match decoder.read(Lsn::new(at), PgTime::from_micros(7), message) {
            Ok(Some(change)) => match change.action {
                Action::Ended(end) => assert!(end.subxacts().all(|sub| Some(sub) != end.xid)),
                Action::Prepared(prepare) => assert!(prepare.subxacts.iter().all(|sub| Some(sub) != prepare.xid)),
                Action::Truncated(truncate) => assert!(truncate.relations.iter().count() * 4 < message.len()),
                _ => {}
            },
            Ok(None) => {}
            Err(_) => return, // what comes behind is not to be understood
        }
    }
});
