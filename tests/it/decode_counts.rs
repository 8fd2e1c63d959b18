//! Rows counted from the WAL are those that the statements touched: per table, of committed transactions only, at every
//! `wal_level` and on every major.

use std::collections::BTreeMap;

use walguard::decode::change::RowCounts;
use walguard::decode::{Change, Reader};
use walguard::detect::{Limits, Owner, Owners, Transactions};
use walguard::pg::{Lsn, RelFile, Xid};

use crate::decode_parity::{segments, source};
use crate::harness::{Cluster, majors};

/// A table, and what the statements said: rows inserted, updated, deleted, moved to another partition.
type Expected = (&'static str, [u64; 4]);

/// Statements, each sent by itself, and what they do to which tables.
const STATEMENTS: &[(&str, &[Expected])] = &[
    ("INSERT INTO rows SELECT i, i, 'text' FROM generate_series(1, 1000) i", &[("rows", [1000, 0, 0, 0])]),
    ("INSERT INTO rows VALUES (1001, 1, 'a'), (1002, 2, 'b'), (1003, 3, 'c')", &[("rows", [3, 0, 0, 0])]),
    ("COPY rows FROM PROGRAM 'seq -f \"%.0f,1,copied\" 2001 2500' (FORMAT csv)", &[("rows", [500, 0, 0, 0])]),
    // Ten rows are there already: they are updated, the other ten inserted.
    (
        "INSERT INTO rows SELECT i, 0, 'conflict' FROM generate_series(2491, 2510) i \
         ON CONFLICT (id) DO UPDATE SET note = excluded.note",
        &[("rows", [10, 10, 0, 0])],
    ),
    (
        "INSERT INTO rows SELECT i, 0, 'ignored' FROM generate_series(1, 10) i ON CONFLICT DO NOTHING",
        &[("rows", [0, 0, 0, 0])],
    ),
    ("UPDATE rows SET note = 'hot' WHERE id <= 20", &[("rows", [0, 20, 0, 0])]),
    ("UPDATE rows SET n = -n WHERE id BETWEEN 100 AND 149", &[("rows", [0, 50, 0, 0])]),
    ("DELETE FROM rows WHERE id BETWEEN 200 AND 299", &[("rows", [0, 0, 100, 0])]),
    ("SELECT FROM rows WHERE id < 50 FOR UPDATE", &[]),
    // Rolled back, wholly and in part.
    ("BEGIN; DELETE FROM rows; ROLLBACK", &[]),
    (
        "BEGIN; DELETE FROM rows WHERE id = 1; SAVEPOINT a; DELETE FROM rows WHERE id < 50; ROLLBACK TO a; SAVEPOINT b; \
         DELETE FROM rows WHERE id IN (2, 3); SAVEPOINT c; INSERT INTO rows VALUES (9001, 1, 'kept'); COMMIT",
        &[("rows", [1, 0, 3, 0])],
    ),
    (
        "BEGIN; DELETE FROM rows WHERE id IN (4, 5); PREPARE TRANSACTION 'kept'; COMMIT PREPARED 'kept'",
        &[("rows", [0, 0, 2, 0])],
    ),
    ("BEGIN; DELETE FROM rows WHERE id < 100; PREPARE TRANSACTION 'gone'; ROLLBACK PREPARED 'gone'", &[]),
    // A wide row is one row, however many pieces it is kept in.
    ("INSERT INTO wide SELECT i, repeat(md5(i::text), 500) FROM generate_series(1, 5) i", &[("wide", [5, 0, 0, 0])]),
    ("DELETE FROM wide WHERE id <= 3", &[("wide", [0, 0, 3, 0])]),
    // Cascades.
    ("INSERT INTO parent SELECT generate_series(1, 10)", &[("parent", [10, 0, 0, 0])]),
    ("INSERT INTO child SELECT i, 1 + i % 10 FROM generate_series(1, 100) i", &[("child", [100, 0, 0, 0])]),
    ("DELETE FROM parent WHERE id <= 4", &[("parent", [0, 0, 4, 0]), ("child", [0, 0, 40, 0])]),
    // Partitions.
    (
        "INSERT INTO parts SELECT i, 1 + i % 2 FROM generate_series(1, 30) i",
        &[("parts_1", [15, 0, 0, 0]), ("parts_2", [15, 0, 0, 0])],
    ),
    (
        "UPDATE parts SET region = 2 WHERE region = 1 AND id <= 10",
        &[("parts_1", [0, 0, 0, 5]), ("parts_2", [5, 0, 0, 0])],
    ),
    ("DELETE FROM parts WHERE id > 20", &[("parts_1", [0, 0, 5, 0]), ("parts_2", [0, 0, 5, 0])]),
];

/// 15 and later.
const MERGE: (&str, &[Expected]) = (
    "MERGE INTO merged USING (SELECT i FROM generate_series(1, 30) i) source ON merged.id = source.i \
     WHEN MATCHED AND i <= 5 THEN DELETE WHEN MATCHED THEN UPDATE SET n = 1 WHEN NOT MATCHED THEN INSERT VALUES (i, 2)",
    &[("merged", [10, 15, 5, 0])],
);

const TABLES: &str = "
    CREATE TABLE rows (id int PRIMARY KEY, n int, note text);
    CREATE INDEX ON rows (n);
    CREATE TABLE wide (id int, value text);
    ALTER TABLE wide ALTER value SET STORAGE EXTERNAL;
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE);
    CREATE TABLE parts (id int, region int) PARTITION BY LIST (region);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
    CREATE TABLE merged AS SELECT i AS id, 0 AS n FROM generate_series(1, 20) i";

/// Every file is a table of nobody in particular.
struct Files;

impl Owners for Files {
    fn owner(&self, _file: RelFile, _by: Option<Xid>) -> Owner {
        Owner::Unknown
    }
}

/// What committed transactions did to files, by the number of the file.
fn count(cluster: &Cluster, system_id: u64, start: Lsn, end: Lsn) -> BTreeMap<u32, RowCounts> {
    let mut reader = Reader::at_record(source(cluster, system_id), start);
    let mut transactions = Transactions::new(Limits::default(), true);
    let mut committed: BTreeMap<u32, RowCounts> = BTreeMap::new();
    for (at, bytes) in segments(cluster) {
        let skip = usize::try_from(start.saturating_sub(at)).unwrap().min(bytes.len());
        reader.push(&bytes[skip..]);
        while let Ok(Some(record)) = reader.next_record() {
            if record.lsn >= end {
                return committed;
            }
            let Some(ended) = transactions.see(&Change::read(&record).unwrap(), &Files) else { continue };
            assert!(ended.is_complete, "{ended:?}");
            for tally in ended.tallies.iter().filter(|_| ended.committed) {
                *committed.entry(tally.file.number).or_default() += tally.counts;
            }
        }
    }
    committed
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_counted_as_the_statements_count_them() {
    for (major, level) in majors().into_iter().flat_map(|major| [(major, "replica"), (major, "logical")]) {
        let cluster = Cluster::builder()
            .major(major)
            .wal_segsize_mib(1)
            .conf("wal_level", level)
            .conf("wal_keep_size", "1GB")
            .conf("autovacuum", "off")
            .conf("max_prepared_transactions", "5")
            .start()
            .await;
        cluster.sql(TABLES).await;
        let start = cluster.lsn().await;
        let client = cluster.client().await;
        let merge = (major >= 15).then_some(&MERGE);
        let mut expected: BTreeMap<&str, [u64; 4]> = BTreeMap::new();
        for (statements, effects) in STATEMENTS.iter().chain(merge) {
            for statement in statements.split("; ") {
                client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
            }
            for (table, counts) in *effects {
                let of_table = expected.entry(table).or_default();
                of_table.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
        }
        let end: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        let system_id = cluster.text("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
        let counted = count(&cluster, system_id, start, end);
        for (table, expected) in expected {
            let file = cluster.number(&format!("SELECT pg_relation_filenode('{table}')")).await;
            let RowCounts { inserted, updated, deleted, moved } = counted[&u32::try_from(file).unwrap()];
            assert_eq!([inserted, updated, deleted, moved], expected, "{table} on {major} at {level}");
        }
    }
}
