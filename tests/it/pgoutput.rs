//! What `pgoutput` of real servers says, in every version of the protocol, is what the statements did: counts by
//! transaction and table, transaction ids, times of commits, tables emptied, messages.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::{Client, SimpleQueryMessage};
use walguard::decode::change::{Action, RowCounts};
use walguard::decode::pgoutput::{Decoder, Message};
use walguard::pg::{Lsn, Oid, PgTime, Xid};

use crate::harness::{Cluster, majors};

/// Rows inserted, updated, deleted, by table.
type Counts = BTreeMap<String, [u64; 3]>;

/// What the server was asked to do, by the transaction's id.
#[derive(Debug, Default)]
struct Asked {
    committed: BTreeMap<Xid, Counts>,
    rolled_back: BTreeSet<Xid>,
    prepared: BTreeSet<Xid>,
}

/// What the messages say.
#[derive(Debug, Default)]
struct Told {
    open: BTreeMap<Xid, Counts>,
    committed: BTreeMap<Xid, Counts>,
    times: BTreeMap<Xid, PgTime>,
    aborted: BTreeSet<Xid>,
    prepared: BTreeSet<Xid>,
    truncated: Vec<(Xid, Vec<String>)>,
    messages: Vec<(Option<Xid>, String)>,
    tags: BTreeSet<char>,
    /// Rows that name their top-level transaction.
    of_subtransactions: u64,
}

const TABLES: &str = "
    CREATE TABLE kept (id int PRIMARY KEY, note text);
    CREATE TABLE whole (id int, note text);
    ALTER TABLE whole REPLICA IDENTITY FULL;
    CREATE TYPE mood AS ENUM ('calm', 'cross');
    CREATE TABLE typed (id int PRIMARY KEY, mood mood);
    CREATE TABLE parts (id int, region int, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
    CREATE PUBLICATION p FOR ALL TABLES";

async fn run(client: &Client, statements: &str) {
    client.batch_execute(statements).await.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
}

async fn begin(client: &Client) -> Xid {
    run(client, "BEGIN").await;
    let row = client.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap();
    Xid::new(row.get::<_, &str>(0).parse().unwrap()).unwrap()
}

fn counts(of: &[(&str, [u64; 3])]) -> Counts {
    of.iter().map(|(table, counts)| ((*table).to_owned(), *counts)).collect()
}

/// A transaction of these statements, the last of which ends it.
async fn transact(client: &Client, asked: &mut Asked, statements: &[&str], of: &[(&str, [u64; 3])]) -> Xid {
    let xid = begin(client).await;
    for statement in statements {
        run(client, statement).await;
    }
    let is_prepared = statements.iter().any(|statement| statement.starts_with("PREPARE"));
    asked.prepared.extend(is_prepared.then_some(xid));
    if statements.last().unwrap().starts_with("ROLLBACK") {
        asked.rolled_back.insert(xid);
    } else {
        asked.committed.insert(xid, counts(of));
    }
    xid
}

/// Small transactions and large ones, which `logical_decoding_work_mem` makes stream.
async fn work(cluster: &Cluster) -> (Asked, Xid) {
    let (client, other) = (cluster.client().await, cluster.client().await);
    let mut asked = Asked::default();
    let fill = "INSERT INTO kept SELECT i, repeat('x', 100) FROM generate_series(1, 3000) i";
    transact(&client, &mut asked, &[fill, "COMMIT"], &[("kept", [3000, 0, 0])]).await;
    let small = [
        "INSERT INTO whole SELECT i, 'n' FROM generate_series(1, 20) i",
        "UPDATE whole SET note = 'm' WHERE id <= 5",
        "DELETE FROM whole WHERE id > 15",
        "INSERT INTO typed VALUES (1, 'calm'), (2, 'cross')",
        "SELECT pg_logical_emit_message(true, 'walguard', 'kept')",
        "INSERT INTO kept VALUES (1, 'conflict'), (5001, 'new') ON CONFLICT (id) DO UPDATE SET note = excluded.note",
        "COMMIT",
    ];
    let of = [("whole", [20, 5, 5]), ("typed", [2, 0, 0]), ("kept", [1, 1, 0])];
    transact(&client, &mut asked, &small, &of).await;
    // Savepoints, small and streamed.
    for (first, rows) in [(10_000, 10), (20_000, 3_000)] {
        let insert = |from: i32| {
            format!("INSERT INTO kept SELECT i, repeat('y', 100) FROM generate_series({from}, {from} + {rows} - 1) i")
        };
        let (first_rows, dropped, second) = (insert(first), insert(first + 3_000), insert(first + 6_000));
        let statements = [
            &first_rows,
            "SAVEPOINT a",
            &dropped,
            "ROLLBACK TO a",
            "SAVEPOINT b",
            &second,
            "DELETE FROM kept WHERE id = 7",
            "COMMIT",
        ];
        let deleted = u64::from(first == 10_000);
        let of = [("kept", [2 * rows, 0, deleted])];
        transact(&client, &mut asked, &statements, &of).await;
    }
    // Two large ones at once, one of which is rolled back.
    let (kept, dropped) = (begin(&client).await, begin(&other).await);
    for part in 0..4 {
        let from = 100_000 + part * 2_000;
        let series = format!("generate_series({from}, {from} + 999) i");
        run(&client, &format!("SAVEPOINT s{part}; INSERT INTO kept SELECT i, repeat('z', 100) FROM {series}")).await;
        run(&other, &format!("INSERT INTO whole SELECT i, repeat('z', 100) FROM {series}")).await;
    }
    run(&other, "ROLLBACK").await;
    run(&client, "DELETE FROM kept WHERE id >= 100000 AND id % 2 = 0; COMMIT").await;
    asked.committed.insert(kept, counts(&[("kept", [4_000, 0, 2_000])]));
    asked.rolled_back.insert(dropped);
    // Prepared, small and streamed, committed and rolled back.
    for (name, rows, end) in
        [("a", 3, "COMMIT"), ("b", 3_000, "COMMIT"), ("c", 3, "ROLLBACK"), ("d", 3_000, "ROLLBACK")]
    {
        let insert = format!("INSERT INTO whole SELECT i, repeat('p', 100) FROM generate_series(1, {rows}) i");
        let (prepare, end) = (format!("PREPARE TRANSACTION '{name}'"), format!("{end} PREPARED '{name}'"));
        let statements = [&insert, "SAVEPOINT a", "INSERT INTO whole VALUES (0, '')", &prepare, &end];
        transact(&client, &mut asked, &statements, &[("whole", [rows + 1, 0, 0])]).await;
    }
    // A move to another partition is a delete and an insert here.
    let moves = [
        "INSERT INTO parts SELECT i, 1 FROM generate_series(1, 10) i",
        "UPDATE parts SET region = 2 WHERE id <= 4",
        "COMMIT",
    ];
    transact(&client, &mut asked, &moves, &[("parts_1", [10, 0, 4]), ("parts_2", [4, 0, 0])]).await;
    run(&client, "SELECT pg_logical_emit_message(false, 'walguard', 'free')").await;
    // Undone on the way.
    transact(&client, &mut asked, &["DELETE FROM kept", "ROLLBACK"], &[]).await;
    let wipe = ["DELETE FROM kept", "TRUNCATE whole, parts CASCADE", "COMMIT"];
    let rows = 3_000 + 1 + 20 + 6_000 + 2_000 - 1;
    let wiped = transact(&client, &mut asked, &wipe, &[("kept", [0, 0, rows])]).await;
    (asked, wiped)
}

fn add(sum: &mut Counts, more: &Counts) {
    for (table, counts) in more {
        sum.entry(table.clone()).or_default().iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
}

impl Told {
    /// Sees one message, through a decoder that has seen those before it.
    fn see(&mut self, decoder: &mut Decoder, tables: &BTreeMap<Oid, String>, lsn: Lsn, message: &[u8]) {
        self.tags.insert(char::from(message[0]));
        let Some(change) = decoder.read(lsn, PgTime::from_micros(0), message).unwrap() else { return };
        match change.action {
            Action::RelationRow(row) => {
                self.of_subtransactions += u64::from(change.top_xid.is_some());
                let xid = change.xid.unwrap();
                let RowCounts { inserted, updated, deleted, .. } = row.counts();
                let table = tables[&row.relation].clone();
                let described = decoder.relation(row.relation).expect("a table is described before its rows");
                assert_eq!((described.schema, described.name), (&b"public"[..], table.as_bytes()));
                add(self.open.entry(xid).or_default(), &[(table, [inserted, updated, deleted])].into());
            }
            Action::Truncated(truncate) => {
                assert!(truncate.cascade());
                let names = truncate.relations.iter().map(|oid| tables[&oid].clone()).collect();
                self.truncated.push((change.xid.unwrap(), names));
            }
            Action::Prepared(prepare) => {
                let xid = prepare.xid.unwrap();
                self.gather(xid, prepare.subxacts.iter());
                self.prepared.insert(xid);
            }
            Action::Ended(end) => {
                let xid = end.xid.unwrap();
                let counts = self.gather(xid, end.subxacts());
                self.open.remove(&xid);
                if end.committed {
                    self.committed.insert(xid, counts);
                    self.times.insert(xid, end.time);
                } else {
                    self.aborted.insert(xid);
                }
            }
            Action::Message(message) => {
                let text = String::from_utf8_lossy(message.content).into_owned();
                assert_eq!((message.prefix, message.transactional), (&b"walguard"[..], change.xid.is_some()));
                self.messages.push((change.xid, text));
            }
            action => panic!("{action:?}"),
        }
    }

    /// Puts what subtransactions did to what their transaction did.
    fn gather(&mut self, xid: Xid, subxacts: impl Iterator<Item = Xid>) -> Counts {
        for sub in subxacts {
            let of_sub = self.open.remove(&sub).unwrap_or_default();
            add(self.open.entry(xid).or_default(), &of_sub);
        }
        self.open.get(&xid).cloned().unwrap_or_default()
    }
}

/// All messages of a slot, which keeps them.
async fn peek(client: &Client, slot: &str, options: &str) -> Vec<(Lsn, Vec<u8>)> {
    let query = format!(
        "SELECT lsn, encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes('{slot}', NULL, NULL, \
         'publication_names', 'p', 'messages', 'true', {options})"
    );
    let answer = client.simple_query(&query).await.unwrap_or_else(|error| panic!("{options}: {error:?}"));
    let rows = answer.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let byte = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    rows.map(|row| (row.get(0).unwrap().parse().unwrap(), row.get(1).unwrap().as_bytes().chunks(2).map(byte).collect()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_version_of_the_protocol_tells_what_the_statements_did() {
    for major in majors() {
        let builder = Cluster::builder().major(major).conf("wal_level", "logical").conf("autovacuum", "off");
        let builder = builder.conf("logical_decoding_work_mem", "64kB").conf("track_commit_timestamp", "on");
        let cluster = builder.conf("max_prepared_transactions", "5").start().await;
        cluster.sql(TABLES).await;
        cluster.sql("SELECT pg_create_logical_replication_slot('one', 'pgoutput')").await;
        cluster.sql("SELECT pg_create_logical_replication_slot('two', 'pgoutput', false, true)").await;
        let (asked, wiped) = work(&cluster).await;
        let client = cluster.client().await;
        let mut tables = BTreeMap::new();
        for row in
            client.query("SELECT oid, relname::text FROM pg_class WHERE relkind IN ('r', 'p')", &[]).await.unwrap()
        {
            tables.insert(Oid(row.get(0)), row.get::<_, String>(1));
        }
        let mut times = BTreeMap::new();
        for xid in asked.committed.keys() {
            let micros = format!(
                "SELECT (extract(epoch FROM pg_xact_commit_timestamp('{xid}'::xid)) * 1000000 - 946684800000000)::bigint"
            );
            times.insert(*xid, PgTime::from_micros(cluster.number(&micros).await));
        }
        let mut ways = vec![
            ("one", "'proto_version', '1'", "BCIUDTRYM"),
            ("one", "'proto_version', '1', 'binary', 'true'", "BCIUDTRYM"),
            ("one", "'proto_version', '2', 'streaming', 'on'", "BCIUDTRYMSEcA"),
            ("two", "'proto_version', '3', 'streaming', 'on', 'two_phase', 'on'", "BCIUDTRYMSEcAbPKrp"),
            ("two", "'proto_version', '3', 'two_phase', 'on'", "BCIUDTRYMbPKr"),
        ];
        if major >= 16 {
            ways.push((
                "two",
                "'proto_version', '4', 'streaming', 'parallel', 'two_phase', 'on'",
                "BCIUDTRYMSEcAbPKrp",
            ));
            ways.push(("one", "'proto_version', '4', 'streaming', 'parallel', 'origin', 'none'", "BCIUDTRYMSEcA"));
        }
        for (slot, options, tags) in ways {
            let what = format!("PostgreSQL {major}, {options}");
            let messages = peek(&client, slot, options).await;
            let (mut decoder, mut told) = (Decoder::new(Oid(5)), Told::default());
            for (lsn, message) in &messages {
                told.see(&mut decoder, &tables, *lsn, message);
            }
            assert!(decoder.is_between_transactions(), "{what}");
            assert_eq!(told.tags, tags.chars().collect(), "{what}");
            assert_eq!(told.committed, asked.committed, "{what}");
            assert_eq!(told.times, times, "{what}");
            assert_eq!(told.open, BTreeMap::new(), "{what}: all have ended");
            // Of those that were rolled back only streamed and prepared ones are heard, and subtransactions.
            let streams = options.contains("streaming");
            assert_eq!(told.of_subtransactions > 0, streams, "{what}");
            assert!(told.aborted.is_disjoint(&asked.committed.keys().copied().collect()), "{what}");
            assert_eq!(streams || options.contains("two_phase"), !told.aborted.is_empty(), "{what}");
            let prepared = if slot == "two" { asked.prepared.clone() } else { BTreeSet::new() };
            assert_eq!(told.prepared, prepared, "{what}");
            assert_eq!(told.truncated, [(wiped, vec!["whole".into(), "parts_1".into(), "parts_2".into()])], "{what}");
            let texts: BTreeSet<_> = told.messages.iter().map(|(xid, text)| (xid.is_some(), text.as_str())).collect();
            assert_eq!(texts, BTreeSet::from([(true, "kept"), (false, "free")]), "{what}");
            // The aborts' place and time come with `parallel`, and with it only.
            for (_, message) in messages.iter().filter(|(_, message)| message[0] == b'A') {
                let Message::StreamAbort { at, .. } = Message::read(message, false).unwrap() else { panic!() };
                assert_eq!(at.is_some(), options.contains("parallel"), "{what}");
            }
        }
    }
}
