//! Postgres is the judge of the decoder: every record of a workload that drives every resource manager, against
//! `pg_waldump` and `pg_walinspect`. Nothing is left out.
//!
//! With `WALGUARD_TEST_WRITE_CORPUS` in the environment, records that Postgres has confirmed are written to
//! `tests/corpus/wal`, where unit tests and fuzzers take them from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use tokio_postgres::types::Oid as SqlOid;
use walguard::decode::explain::{Explanation, explain};
use walguard::decode::{Block, Image, ImageCompression, Reader, Record, Source, WalMajor};
use walguard::pg::{Fork, Lsn, SegmentName, SegmentSize, SystemId};

use crate::harness::{Cluster, StopMode, command, finish, majors};

/// Every operation of every resource manager that the workload must have driven. What is missing needs millions of
/// transactions (truncations of what is kept of transactions), a crash within a record, or a promotion.
const OPERATIONS: &str = "
    XLOG CHECKPOINT_SHUTDOWN, XLOG CHECKPOINT_ONLINE, XLOG NEXTOID, XLOG SWITCH, XLOG BACKUP_END,
    XLOG PARAMETER_CHANGE, XLOG RESTORE_POINT, XLOG FPW_CHANGE, XLOG FPI_FOR_HINT, XLOG FPI,
    Transaction COMMIT, Transaction PREPARE, Transaction ABORT, Transaction COMMIT_PREPARED,
    Transaction ABORT_PREPARED, Transaction ASSIGNMENT, Transaction INVALIDATION,
    Storage CREATE, Storage TRUNCATE, CLOG ZEROPAGE, Database CREATE_FILE_COPY, Database CREATE_WAL_LOG,
    Database DROP, Tablespace CREATE, Tablespace DROP, MultiXact ZERO_OFF_PAGE, MultiXact ZERO_MEM_PAGE,
    MultiXact CREATE_ID, RelMap UPDATE, Standby LOCK, Standby RUNNING_XACTS, Standby INVALIDATIONS,
    Heap2 REWRITE, Heap2 VISIBLE, Heap2 MULTI_INSERT, Heap2 MULTI_INSERT+INIT, Heap2 LOCK_UPDATED, Heap2 NEW_CID,
    Heap INSERT, Heap INSERT+INIT, Heap DELETE, Heap UPDATE, Heap UPDATE+INIT, Heap HOT_UPDATE, Heap TRUNCATE,
    Heap HEAP_CONFIRM, Heap LOCK, Heap INPLACE,
    Btree INSERT_LEAF, Btree INSERT_UPPER, Btree SPLIT_L, Btree SPLIT_R, Btree DEDUP, Btree DELETE,
    Btree UNLINK_PAGE, Btree NEWROOT, Btree MARK_PAGE_HALFDEAD, Btree VACUUM, Btree REUSE_PAGE,
    Hash INIT_META_PAGE, Hash INIT_BITMAP_PAGE, Hash INSERT, Hash ADD_OVFL_PAGE, Hash SPLIT_ALLOCATE_PAGE,
    Hash SPLIT_PAGE, Hash SPLIT_COMPLETE, Hash SQUEEZE_PAGE, Hash DELETE, Hash UPDATE_META_PAGE,
    Gin CREATE_PTREE, Gin INSERT, Gin SPLIT, Gin VACUUM_PAGE, Gin UPDATE_META_PAGE, Gin INSERT_LISTPAGE,
    Gin DELETE_LISTPAGE, Gin VACUUM_DATA_LEAF_PAGE,
    Gist PAGE_UPDATE, Gist PAGE_SPLIT, Gist PAGE_DELETE,
    Sequence LOG, SPGist ADD_LEAF, SPGist MOVE_LEAFS, SPGist ADD_NODE, SPGist SPLIT_TUPLE, SPGist PICKSPLIT,
    SPGist VACUUM_LEAF, SPGist VACUUM_REDIRECT,
    BRIN CREATE_INDEX, BRIN INSERT, BRIN INSERT+INIT, BRIN SAMEPAGE_UPDATE, BRIN REVMAP_EXTEND, BRIN DESUMMARIZE,
    CommitTs ZEROPAGE, ReplicationOrigin SET, ReplicationOrigin DROP, Generic Generic, LogicalMessage MESSAGE";

/// Operations of Heap2 that 17 renamed.
fn pruning(major: WalMajor) -> &'static str {
    match major {
        WalMajor::V14 | WalMajor::V15 | WalMajor::V16 => "Heap2 PRUNE, Heap2 VACUUM, Heap2 FREEZE_PAGE",
        WalMajor::V17 | WalMajor::V18 => {
            "Heap2 PRUNE_ON_ACCESS, Heap2 PRUNE_VACUUM_SCAN, Heap2 PRUNE_VACUUM_CLEANUP, XLOG CHECKPOINT_REDO"
        }
    }
}

/// Statements outside of transactions, one by one. Each is run as it stands.
const WORKLOAD: &[&str] = &[
    // Rows of all lengths, in all ways.
    "CREATE TABLE plain (id int PRIMARY KEY, kind int, note text) WITH (fillfactor = 70, autovacuum_enabled = off)",
    "CREATE INDEX plain_kind ON plain (kind)",
    "INSERT INTO plain SELECT i, i % 7, repeat('x', i % 90) FROM generate_series(1, 4000) i",
    "COPY plain FROM PROGRAM 'seq -f \"%.0f,1,copied\" 5001 7500' (FORMAT csv)",
    "UPDATE plain SET note = 'hot' WHERE id % 3 = 0",
    "UPDATE plain SET kind = kind + 1, note = repeat('y', 100) WHERE id % 5 = 0",
    "DELETE FROM plain WHERE id BETWEEN 1000 AND 3800",
    "SELECT count(*) FROM plain WHERE kind > 0",
    "CHECKPOINT",
    "VACUUM plain",
    "VACUUM (FREEZE) plain",
    "INSERT INTO plain VALUES (1, 1, 'again') ON CONFLICT (id) DO UPDATE SET note = excluded.note",
    "INSERT INTO plain VALUES (9001, 1, 'new') ON CONFLICT (id) DO NOTHING",
    "DELETE FROM plain WHERE id > 5000",
    "VACUUM (TRUNCATE) plain",
    "BEGIN; CREATE TABLE fresh (id int); INSERT INTO fresh VALUES (1); TRUNCATE fresh; COMMIT",
    "CREATE TABLE pieces (id int PRIMARY KEY, value text)",
    "ALTER TABLE pieces ALTER value SET STORAGE EXTERNAL",
    "INSERT INTO pieces SELECT i, repeat(md5(i::text), 400) FROM generate_series(1, 60) i",
    "UPDATE pieces SET value = value || 'z' WHERE id % 2 = 0",
    "DELETE FROM pieces WHERE id % 3 = 0",
    "VACUUM pieces",
    // Partitions, cascades, sequences.
    "CREATE TABLE parts (id serial, region int, PRIMARY KEY (id, region)) PARTITION BY LIST (region)",
    "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)",
    "CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2)",
    "INSERT INTO parts (region) SELECT 1 + i % 2 FROM generate_series(1, 300) i",
    "UPDATE parts SET region = 2 WHERE id < 50",
    "CREATE TABLE owner (id int PRIMARY KEY)",
    "CREATE TABLE owned (id int PRIMARY KEY, owner int REFERENCES owner ON DELETE CASCADE)",
    "INSERT INTO owner SELECT generate_series(1, 50)",
    "INSERT INTO owned SELECT i, 1 + i % 50 FROM generate_series(1, 500) i",
    "DELETE FROM owner WHERE id < 20",
    "TRUNCATE owner RESTART IDENTITY CASCADE",
    "ALTER SEQUENCE parts_id_seq RESTART",
    "CREATE TABLE keys (id int, word text)",
    "CREATE INDEX keys_id ON keys (id)",
    "CREATE INDEX keys_word ON keys (word)",
    "INSERT INTO keys SELECT i, 'w' || i % 3 FROM generate_series(1, 500) i",
    // Rewrites.
    "VACUUM FULL plain",
    "CLUSTER keys USING keys_id",
    "ALTER TABLE plain ALTER id TYPE bigint",
    "ALTER TABLE plain ADD COLUMN extra int DEFAULT 5",
    "ALTER TABLE plain ADD COLUMN stamp timestamptz DEFAULT clock_timestamp()",
    "ALTER TABLE plain DROP COLUMN note",
    "ALTER TABLE pieces SET UNLOGGED",
    "ALTER TABLE pieces SET LOGGED",
    "REINDEX TABLE keys",
    "REINDEX INDEX CONCURRENTLY keys_word",
    "CREATE MATERIALIZED VIEW seen AS SELECT * FROM plain",
    "REFRESH MATERIALIZED VIEW seen",
    "CREATE TABLE copied AS SELECT * FROM plain",
    "VACUUM FULL pg_class",
    "VACUUM FULL pg_proc",
    "REINDEX TABLE pg_class",
    "CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY)",
    "CREATE TEMP TABLE temporary (id int)",
    "DROP TABLE copied, unlogged",
    "DROP MATERIALIZED VIEW seen",
    // Transactions of all kinds.
    "BEGIN; INSERT INTO keys VALUES (1, 'a'); SAVEPOINT s; INSERT INTO keys VALUES (2, 'b'); ROLLBACK TO s; \
     SAVEPOINT t; INSERT INTO keys VALUES (3, 'c'); COMMIT",
    "BEGIN; CREATE TABLE never (id int); ROLLBACK",
    "DO $$ BEGIN FOR i IN 1..150 LOOP BEGIN INSERT INTO keys VALUES (i, 'sub'); EXCEPTION WHEN OTHERS THEN NULL; END; \
     END LOOP; END $$",
    "BEGIN; INSERT INTO keys VALUES (4, 'd'); SAVEPOINT s; INSERT INTO keys VALUES (5, 'e'); \
     CREATE TABLE prepared (id int); DROP TABLE fresh; PREPARE TRANSACTION 'first'",
    "COMMIT PREPARED 'first'",
    "BEGIN; CREATE TABLE aborted (id int); DROP TABLE prepared; PREPARE TRANSACTION 'it''s the second'",
    "ROLLBACK PREPARED 'it''s the second'",
    "SET synchronous_commit = off; INSERT INTO keys VALUES (6, 'f'); RESET synchronous_commit",
    "SET synchronous_commit = remote_apply; INSERT INTO keys VALUES (6, 'f'); RESET synchronous_commit",
    "CREATE TABLE shared_rows (id int PRIMARY KEY, n int)",
    "INSERT INTO shared_rows SELECT i, 0 FROM generate_series(1, 2300) i",
    // A multixact for each row: locked by the transaction, updated by a subtransaction.
    "DO $$ BEGIN PERFORM 1 FROM shared_rows FOR KEY SHARE; FOR i IN 1..2300 LOOP \
     BEGIN UPDATE shared_rows SET n = 1 WHERE id = i; EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$",
    // A new page of commit states, and a commit record of several pages.
    "CREATE TEMP TABLE burnt (id int)",
    "DO $$ BEGIN FOR i IN 1..34000 LOOP BEGIN INSERT INTO burnt VALUES (i); EXCEPTION WHEN OTHERS THEN NULL; END; \
     END LOOP; END $$",
    // A speculative insert that is taken back: another row with its key comes between look and leap.
    "CREATE TABLE race (id int, key text)",
    "CREATE FUNCTION overtake(k text) RETURNS text LANGUAGE plpgsql VOLATILE AS $$ BEGIN \
     IF current_setting('race.state', true) = 'armed' THEN PERFORM set_config('race.state', 'looked', false); \
     ELSIF current_setting('race.state', true) = 'looked' THEN PERFORM set_config('race.state', 'over', false); \
     INSERT INTO race VALUES (2, k); END IF; RETURN k; END $$",
    "CREATE FUNCTION racing(k text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS \
     $$ BEGIN RETURN overtake(k); END $$",
    "CREATE UNIQUE INDEX race_key ON race (racing(key))",
    "SET race.state = 'armed'; INSERT INTO race VALUES (1, 'k') ON CONFLICT DO NOTHING; SET race.state = 'over'",
    // Whole databases, tablespaces, messages, origins.
    "CREATE DATABASE by_log STRATEGY = wal_log",
    "CREATE DATABASE by_copy STRATEGY = file_copy",
    "ALTER DATABASE by_copy SET TABLESPACE elsewhere",
    "DROP DATABASE by_copy",
    "DROP DATABASE by_log",
    "CREATE TABLE moved (id int PRIMARY KEY) TABLESPACE elsewhere",
    "INSERT INTO moved SELECT generate_series(1, 500)",
    "ALTER TABLE moved SET TABLESPACE pg_default",
    "ALTER TABLE keys SET TABLESPACE elsewhere",
    "TRUNCATE keys",
    "DROP TABLE keys",
    "DROP TABLE race",
    "SELECT pg_logical_emit_message(true, 'walguard', 'kept'), pg_logical_emit_message(false, 'it''s', 'seen')",
    "SELECT pg_logical_emit_message(false, 'long', repeat('long', 9000))",
    "SELECT pg_replication_origin_create('elsewhere')",
    "SELECT pg_replication_origin_session_setup('elsewhere'); BEGIN; \
     SELECT pg_replication_origin_xact_setup('1/23456789', '2026-01-02 03:04:05.678+00'); \
     INSERT INTO owner VALUES (77); COMMIT; BEGIN; \
     SELECT pg_replication_origin_xact_setup('1/2345678A', '2026-01-02 03:04:06+00'); INSERT INTO owner VALUES (78); \
     PREPARE TRANSACTION 'origin'; COMMIT PREPARED 'origin'; SELECT pg_replication_origin_session_reset()",
    "SELECT pg_replication_origin_advance('elsewhere', '1/23456790')",
    "SELECT pg_replication_origin_drop('elsewhere')",
    "SELECT pg_create_restore_point('here and now')",
    "SELECT pg_backup_start('parity', true); SELECT pg_backup_stop(false)",
    // Images that are there to be compared, not to be restored.
    "SET wal_consistency_checking = 'all'; INSERT INTO owner VALUES (79); DELETE FROM owner WHERE id = 79; \
     RESET wal_consistency_checking",
    // Compressed images of pages.
    "SET wal_compression = pglz; CHECKPOINT; UPDATE plain SET kind = kind + 1",
    "SET wal_compression = lz4; CHECKPOINT; UPDATE plain SET kind = kind + 1",
    "SET wal_compression = zstd; CHECKPOINT; UPDATE plain SET kind = kind + 1",
    "RESET wal_compression",
    "ALTER SYSTEM SET full_page_writes = off",
    "SELECT pg_reload_conf(), pg_sleep(0.2)",
    "CHECKPOINT",
    "ALTER SYSTEM SET full_page_writes = on",
    "SELECT pg_reload_conf(), pg_sleep(0.2)",
    "CREATE SCHEMA gone CREATE TABLE one (id int) CREATE TABLE two (id int)",
    "DROP SCHEMA gone CASCADE",
    "SELECT pg_switch_wal()",
    "CHECKPOINT",
    "VACUUM",
];

/// Statements on indexes of all types, as [`WORKLOAD`]. They drive their managers the same at every `wal_level`.
const INDEXES: &[&str] = &[
    // B-tree: duplicates, splits, pages emptied and used again.
    "CREATE TABLE crowd (id int, word text) WITH (autovacuum_enabled = off)",
    "CREATE INDEX crowd_id ON crowd (id)",
    "CREATE INDEX crowd_word ON crowd (word)",
    "INSERT INTO crowd SELECT i, 'w' || i % 3 FROM generate_series(1, 12000) i",
    "INSERT INTO crowd SELECT -i, repeat(md5(i::text), 3) FROM generate_series(1, 3000) i",
    "DELETE FROM crowd WHERE id BETWEEN 2000 AND 10000",
    "VACUUM crowd",
    "SELECT pg_current_xact_id()",
    "VACUUM crowd",
    "INSERT INTO crowd SELECT i, 'w' || i % 3 FROM generate_series(40000, 45000) i",
    "CREATE TABLE churn (id int PRIMARY KEY, n int, w text) WITH (autovacuum_enabled = off)",
    "CREATE INDEX churn_n ON churn (n)",
    "INSERT INTO churn SELECT i, 1, repeat('c', 30) FROM generate_series(1, 20) i",
    "DO $$ BEGIN FOR i IN 1..60 LOOP UPDATE churn SET n = n + 1; COMMIT; END LOOP; END $$",
    "CREATE INDEX churn_half ON churn (w, n)",
    "DELETE FROM churn WHERE id < 10",
    "DO $$ BEGIN FOR i IN 1..200 LOOP DELETE FROM churn WHERE id = 1; INSERT INTO churn VALUES (1, i, 'again'); COMMIT; \
     PERFORM count(*) FROM churn WHERE id = 1; END LOOP; END $$",
    // The other index types.
    "CREATE TABLE hashed (id int) WITH (autovacuum_enabled = off)",
    "CREATE INDEX hashed_id ON hashed USING hash (id)",
    "INSERT INTO hashed SELECT i % 4000 FROM generate_series(1, 12000) i",
    "INSERT INTO hashed SELECT 7 FROM generate_series(1, 3000) i",
    "DELETE FROM hashed WHERE id % 5 <> 0 OR id = 7",
    "VACUUM hashed",
    "SET enable_seqscan = off; SELECT count(*) FROM hashed WHERE id = 10",
    "INSERT INTO hashed SELECT i FROM generate_series(1, 5000) i",
    "CREATE TABLE words (id int, tags int[]) WITH (autovacuum_enabled = off)",
    "CREATE INDEX words_slow ON words USING gin (tags) WITH (fastupdate = off)",
    "CREATE INDEX words_fast ON words USING gin (tags) WITH (fastupdate = on, gin_pending_list_limit = 64)",
    "INSERT INTO words SELECT i, ARRAY[1, i % 100, i] FROM generate_series(1, 12000) i",
    "DELETE FROM words WHERE id % 3 = 0 OR id BETWEEN 3000 AND 9000",
    "VACUUM words",
    "INSERT INTO words SELECT i, ARRAY[1, i % 100, i] FROM generate_series(1, 3000) i",
    "CREATE TABLE places (id int, at point, box box) WITH (autovacuum_enabled = off)",
    "CREATE INDEX places_gist ON places USING gist (at)",
    "CREATE INDEX places_box ON places USING gist (box)",
    "CREATE INDEX places_quad ON places USING spgist (at)",
    "CREATE INDEX places_kd ON places USING spgist (at kd_point_ops)",
    "INSERT INTO places SELECT i, point(i * 7919 % 1009, i * 104729 % 997), box(point(i, i), point(i + 3, i + 3)) \
     FROM generate_series(1, 5000) i",
    "DELETE FROM places WHERE id > 500",
    "VACUUM places",
    "SELECT pg_current_xact_id()",
    "VACUUM places",
    "INSERT INTO places SELECT i, point(i * 7919 % 1009, i * 104729 % 997), box(point(i, i), point(i + 3, i + 3)) \
     FROM generate_series(1, 3000) i",
    "CREATE TABLE names (id int, name text) WITH (autovacuum_enabled = off)",
    "CREATE INDEX names_trie ON names USING spgist (name)",
    "INSERT INTO names SELECT i, 'http://example.org/' || md5(i::text) FROM generate_series(1, 6000) i",
    "INSERT INTO names SELECT i, 'http://other.example/' || i FROM generate_series(1, 3000) i",
    "INSERT INTO names SELECT i, repeat('http', i % 40) || chr(65 + i % 26) || i FROM generate_series(1, 3000) i",
    "INSERT INTO names SELECT i, NULL FROM generate_series(1, 20) i",
    "DELETE FROM names WHERE id % 2 = 0 OR id < 1000",
    "VACUUM names",
    "SELECT pg_current_xact_id()",
    "VACUUM names",
    "CREATE TABLE ranges (id int, word text) WITH (fillfactor = 10, autovacuum_enabled = off)",
    "CREATE INDEX ranges_brin ON ranges USING brin (id, word) WITH (pages_per_range = 1, autosummarize = off)",
    "INSERT INTO ranges SELECT i, md5(i::text) FROM generate_series(1, 12000) i",
    "SELECT brin_summarize_new_values('ranges_brin')",
    "UPDATE ranges SET word = repeat('z', 300) || id WHERE id % 10 = 0",
    "UPDATE ranges SET id = id - 100000 WHERE id % 100 = 0",
    "SELECT brin_desummarize_range('ranges_brin', 0)",
    "SELECT brin_summarize_new_values('ranges_brin')",
    "CREATE EXTENSION IF NOT EXISTS bloom",
    "CREATE TABLE filtered (a int, b int)",
    "CREATE INDEX filtered_bloom ON filtered USING bloom (a, b)",
    "INSERT INTO filtered SELECT i, i * 7 FROM generate_series(1, 2000) i",
    "DROP TABLE crowd, churn, hashed, words, places, names, ranges, filtered",
];

/// Statements that leave no trace of themselves for a second run.
const CLEANUP: &[&str] = &[
    "DROP TABLE temporary, burnt",
    "DROP TABLE plain, pieces, parts, owner, owned, shared_rows, moved CASCADE",
    "DROP TABLE IF EXISTS prepared",
    "DROP FUNCTION racing, overtake",
    "DROP TABLESPACE elsewhere",
];

/// Builds without lz4 or zstd cannot be asked for them.
fn may_fail(statement: &str) -> bool {
    statement.contains("lz4") || statement.contains("zstd")
}

async fn drive(cluster: &Cluster, statements: &[&str]) {
    let client = cluster.client().await;
    let tablespace = cluster.socket_dir().join("elsewhere");
    if !tablespace.exists() {
        fs::create_dir(&tablespace).unwrap();
        crate::harness::give_away(&tablespace);
    }
    lock_what_another_updates(cluster).await;
    let create = format!("CREATE TABLESPACE elsewhere LOCATION '{}'", tablespace.display());
    for statement in std::iter::once(create.as_str()).chain(statements.iter().copied()) {
        // One simple query is one transaction: what must not share one is sent by itself.
        let result = match statement.contains("BEGIN; ") || statement.contains("CHECKPOINT; ") {
            true => one_by_one(&client, statement).await,
            false => client.batch_execute(statement).await,
        };
        match result {
            Ok(()) => {}
            Err(_) if may_fail(statement) => {}
            Err(error) => panic!("{statement}: {error:?}\n{}", cluster.log()),
        }
    }
}

/// A lock that must follow a row to a version that is not committed yet.
async fn lock_what_another_updates(cluster: &Cluster) {
    let (updates, locks) = (cluster.client().await, cluster.client().await);
    updates.batch_execute("CREATE TABLE contended AS SELECT 1 AS id, 0 AS n").await.unwrap();
    updates.batch_execute("BEGIN").await.unwrap();
    updates.batch_execute("UPDATE contended SET n = 1").await.unwrap();
    locks.batch_execute("SELECT FROM contended FOR KEY SHARE").await.unwrap();
    updates.batch_execute("COMMIT").await.unwrap();
    updates.batch_execute("DROP TABLE contended").await.unwrap();
}

async fn one_by_one(client: &tokio_postgres::Client, statements: &str) -> Result<(), tokio_postgres::Error> {
    for statement in statements.split("; ") {
        client.batch_execute(statement).await?;
    }
    Ok(())
}

/// A record as we decode it, with what the judges are asked about.
struct Ours {
    explanation: Explanation,
    end: Lsn,
    main_data_bytes: usize,
    /// As `pg_walinspect` prints it.
    blocks: String,
    details: Vec<BlockDetail>,
    /// The record as it lies in the WAL, if it is short.
    bytes: Option<Vec<u8>>,
}

/// Bytes of the longest record that is worth keeping in the corpus.
const CORPUS_RECORD_MAX: u32 = 400;

fn raw(record: &Record<'_>) -> Option<Vec<u8>> {
    let header = record.header;
    (header.total_length <= CORPUS_RECORD_MAX).then(|| {
        let mut bytes = Vec::from(header.total_length.to_le_bytes());
        bytes.extend(header.xid.map_or(0, |xid| xid.get()).to_le_bytes());
        bytes.extend(header.previous.bytes().to_le_bytes());
        bytes.extend([header.info, header.rmgr.0, 0, 0]);
        bytes.extend(header.crc.to_le_bytes());
        bytes.extend(record.body());
        bytes
    })
}

/// Keeps the shortest and the longest record of each operation, and what Postgres says of them, for tests without a server.
fn write_corpus(major: u32, ours: &[Ours]) {
    let mut kept: BTreeMap<String, (&Ours, &Ours)> = BTreeMap::new();
    for ours in ours.iter().filter(|ours| ours.bytes.is_some()) {
        let name = format!("{} {}", ours.explanation.manager, ours.explanation.operation);
        let (shortest, longest) = kept.entry(name).or_insert((ours, ours));
        let length = |ours: &Ours| ours.explanation.header.total_length;
        if length(ours) < length(shortest) {
            *shortest = ours;
        }
        if length(ours) > length(longest) {
            *longest = ours;
        }
    }
    let (mut records, mut lines) = (Vec::new(), String::new());
    for (shortest, longest) in kept.values() {
        let both = shortest.explanation.lsn != longest.explanation.lsn;
        for ours in [shortest].into_iter().chain(both.then_some(longest)) {
            records.extend(ours.bytes.as_deref().unwrap());
            lines += &format!("{}\n", ours.explanation);
        }
    }
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/wal");
    fs::create_dir_all(dir).unwrap();
    fs::write(format!("{dir}/{major}.records"), records).unwrap();
    fs::write(format!("{dir}/{major}.waldump"), lines).unwrap();
}

/// A row of `pg_get_wal_block_info`.
#[derive(Debug, PartialEq, Eq)]
struct BlockDetail {
    lsn: String,
    id: i16,
    tablespace: SqlOid,
    database: SqlOid,
    file: SqlOid,
    fork: i16,
    block: i64,
    image_bytes: i32,
    image: Option<Vec<String>>,
    data: Option<Vec<u8>>,
}

const fn fork_number(fork: Fork) -> i16 {
    match fork {
        Fork::Main => 0,
        Fork::Fsm => 1,
        Fork::Vm => 2,
        Fork::Init => 3,
    }
}

const fn fork_name(fork: Fork) -> &'static str {
    match fork {
        Fork::Main => "main",
        Fork::Fsm => "fsm",
        Fork::Vm => "vm",
        Fork::Init => "init",
    }
}

/// (Postgres: `XLogRecGetBlockRefInfo` with `detailed_format`.)
fn block_text(block: &Block<'_>) -> String {
    let relation = block.relation;
    let mut text = if block.id > 0 { " ".to_owned() } else { String::new() };
    text += &format!(
        "blkref #{}: rel {}/{}/{} fork {} blk {}",
        block.id,
        relation.tablespace,
        relation.database,
        relation.number,
        fork_name(block.fork),
        block.number
    );
    if let Some(Image { bytes, hole_offset, hole_length, compression, apply }) = block.image {
        let verification = if apply { "" } else { " for WAL verification" };
        text += &format!(" (FPW{verification}); hole: offset: {hole_offset}, length: {hole_length}");
        let method = match compression {
            ImageCompression::None => return text,
            ImageCompression::Pglz => "pglz",
            ImageCompression::Lz4 => "lz4",
            ImageCompression::Zstd => "zstd",
        };
        let saved = 8192 - usize::from(hole_length) - bytes.len();
        text += &format!(", compression saved: {saved}, method: {method}");
    }
    text
}

fn block_detail(lsn: Lsn, block: &Block<'_>) -> BlockDetail {
    let image = block.image.map(|image| {
        let mut words = Vec::new();
        words.extend((image.hole_length > 0).then_some("HAS_HOLE"));
        words.extend(image.apply.then_some("APPLY"));
        words.extend(match image.compression {
            ImageCompression::None => None,
            ImageCompression::Pglz => Some("COMPRESS_PGLZ"),
            ImageCompression::Lz4 => Some("COMPRESS_LZ4"),
            ImageCompression::Zstd => Some("COMPRESS_ZSTD"),
        });
        words.into_iter().map(str::to_owned).collect()
    });
    BlockDetail {
        lsn: lsn.to_string(),
        id: i16::from(block.id),
        tablespace: block.relation.tablespace.0,
        database: block.relation.database.0,
        file: block.relation.number,
        fork: fork_number(block.fork),
        block: i64::from(block.number),
        image_bytes: block.image.map_or(0, |image| i32::try_from(image.bytes.len()).unwrap()),
        image,
        data: (!block.data.is_empty()).then(|| block.data.to_vec()),
    }
}

/// The segments of timeline 1 that the server still has, in order and without a hole.
pub(crate) fn segments(cluster: &Cluster) -> Vec<(Lsn, Vec<u8>)> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut found: Vec<(Lsn, Vec<u8>)> = fs::read_dir(cluster.data_dir().join("pg_wal"))
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let name = SegmentName::parse(entry.file_name().to_str()?, size).ok()?;
            Some((name.start(), fs::read(entry.path()).unwrap()))
        })
        .collect();
    found.sort_by_key(|(start, _)| *start);
    found
}

pub(crate) fn source(cluster: &Cluster, system_id: u64) -> Source {
    let major = WalMajor::ALL.into_iter().find(|major| major.number() == cluster.major()).unwrap();
    let segment_size = SegmentSize::new(1 << 20).unwrap();
    Source { major, segment_size, system_id: Some(SystemId::new(system_id)) }
}

/// Every record that the server has in its first segments, up to `end`.
fn decode(source: Source, segments: &[(Lsn, Vec<u8>)], end: Lsn) -> Vec<Ours> {
    let mut reader = Reader::at_page(source, segments[0].0);
    let mut ours = Vec::new();
    for (start, bytes) in segments {
        if *start >= end {
            break;
        }
        assert_eq!(*start, reader.pushed_to(), "a segment is missing");
        let mut rest = &bytes[..];
        loop {
            let record = match reader.next_record() {
                Ok(Some(record)) if record.end <= end => record,
                Ok(None) if rest.is_empty() => break,
                // Slices of any size: what Postgres confirms does not depend on them.
                Ok(None) => {
                    let (now, later) = rest.split_at(fastrand::usize(1..100_000).min(rest.len()));
                    reader.push(now);
                    rest = later;
                    continue;
                }
                // Behind the end may be anything that a recycled segment holds.
                Ok(Some(_)) => return ours,
                Err(_) if ours.last().is_some_and(|last: &Ours| last.end >= end) => return ours,
                Err(error) => panic!("{error}"),
            };
            let parts = record.parts().unwrap();
            let blocks: Vec<_> = parts.blocks().map(Result::unwrap).collect();
            ours.push(Ours {
                bytes: raw(&record),
                explanation: explain(&record).unwrap_or_else(|error| panic!("{error}: {record:?}")),
                end: record.end,
                main_data_bytes: parts.main_data.len(),
                blocks: blocks.iter().map(block_text).collect(),
                details: blocks.iter().map(|block| block_detail(record.lsn, block)).collect(),
            });
        }
    }
    ours
}

/// Times as `pg_walinspect` prints them (`2026-01-02 03:04:05.6+00`) in the form in which `pg_waldump` does.
fn with_waldump_times(text: &str) -> String {
    let is_time = |text: &str| {
        let form = b"dddd-dd-dd dd:dd:dd";
        text.len() >= form.len()
            && text
                .bytes()
                .zip(form)
                .all(|(byte, form)| if *form == b'd' { byte.is_ascii_digit() } else { byte == *form })
    };
    let (mut out, mut rest) = (String::new(), text);
    while let Some(next) = rest.chars().next() {
        match rest.split_once("+00").filter(|(time, _)| is_time(time) && time.len() <= 26) {
            Some((time, behind)) => {
                let (seconds, fraction) = time.split_once('.').unwrap_or((time, ""));
                out += &format!("{seconds}.{fraction:0<6} UTC");
                rest = behind;
            }
            None => {
                out.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    out
}

async fn judge_by_walinspect(cluster: &Cluster, ours: &[Ours], end: Lsn) {
    let client = cluster.client().await;
    client.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect").await.unwrap();
    let start = ours[0].explanation.lsn;
    let query = format!(
        "SELECT start_lsn::text, end_lsn::text, prev_lsn::text, xid::text, resource_manager, record_type, \
         record_length, main_data_length, fpi_length, coalesce(description, ''), coalesce(block_ref, '') \
         FROM pg_get_wal_records_info('{start}', '{end}')"
    );
    let rows = client.query(&query, &[]).await.unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(rows.len(), ours.len());
    let mut differences = Differences::default();
    for (row, ours) in rows.iter().zip(ours) {
        let Explanation { lsn, header, manager, operation, description, blocks } = &ours.explanation;
        let images: usize = blocks.iter().filter_map(|block| block.image).map(|(length, _)| length).sum();
        let text = |column: usize| row.get::<_, String>(column);
        let number = |column: usize| usize::try_from(row.get::<_, i32>(column)).unwrap();
        let theirs = (text(0), text(1), text(2), text(3), text(4), text(5), number(6), number(7), number(8));
        let ours_are = (
            lsn.to_string(),
            ours.end.to_string(),
            header.previous.to_string(),
            header.xid.map_or(0, |xid| xid.get()).to_string(),
            manager.to_string(),
            operation.to_string(),
            header.total_length as usize,
            ours.main_data_bytes,
            images,
        );
        differences.note(ours, &ours_are, &theirs);
        differences.note(ours, description, &with_waldump_times(&text(9)));
        differences.note(ours, &ours.blocks, &text(10));
    }
    differences.assert_none();
}

/// What the judges see otherwise: one example of each operation says enough.
#[derive(Default)]
struct Differences {
    examples: BTreeMap<String, String>,
    count: usize,
}

impl Differences {
    fn note<T: PartialEq + std::fmt::Debug>(&mut self, of: &Ours, ours: &T, theirs: &T) {
        if ours != theirs {
            self.count += 1;
            let Explanation { lsn, manager, operation, .. } = &of.explanation;
            let example = || format!("at {lsn}\n  ours   {ours:?}\n  theirs {theirs:?}");
            self.examples.entry(format!("{manager} {operation}")).or_insert_with(example);
        }
    }

    fn assert_none(&self) {
        let examples: String = self.examples.iter().map(|(name, example)| format!("{name} {example}\n")).collect();
        assert!(self.count == 0, "{} differences, for example\n{examples}", self.count);
    }
}

async fn judge_blocks_by_walinspect(cluster: &Cluster, ours: &[Ours], end: Lsn) {
    let start = ours[0].explanation.lsn;
    let query = format!(
        "SELECT start_lsn::text, block_id, reltablespace, reldatabase, relfilenode, relforknumber, relblocknumber, \
         block_fpi_length, block_fpi_info, block_data FROM pg_get_wal_block_info('{start}', '{end}')"
    );
    let rows = cluster.client().await.query(&query, &[]).await.unwrap_or_else(|error| panic!("{error:?}"));
    let details: Vec<_> = ours.iter().flat_map(|ours| &ours.details).collect();
    for (row, ours) in rows.iter().zip(&details) {
        let theirs = BlockDetail {
            lsn: row.get(0),
            id: row.get(1),
            tablespace: row.get(2),
            database: row.get(3),
            file: row.get(4),
            fork: row.get(5),
            block: row.get(6),
            image_bytes: row.get(7),
            image: row.get(8),
            data: row.get(9),
        };
        assert_eq!(**ours, theirs);
    }
    assert_eq!(rows.len(), details.len());
}

fn judge_by_waldump(cluster: &Cluster, ours: &[Ours]) {
    let mut waldump = command(cluster.bin("pg_waldump"));
    waldump.env("TZ", "UTC").arg("-p").arg(cluster.data_dir().join("pg_wal"));
    waldump.arg("-s").arg(ours[0].explanation.lsn.to_string());
    // It ends where no WAL is written, and calls that an error.
    let output = finish(waldump).stdout();
    let mut theirs = output.lines();
    let mut differences = Differences::default();
    for ours in ours {
        differences.note(ours, &ours.explanation.to_string().as_str(), &theirs.next().unwrap_or("nothing"));
    }
    differences.assert_none();
}

async fn judge(major: u32) {
    if !majors().contains(&major) {
        eprintln!("PostgreSQL {major} is not installed: its WAL is not judged");
        return;
    }
    let mut cluster = Cluster::builder()
        .major(major)
        .wal_segsize_mib(1)
        .conf("wal_keep_size", "8GB")
        .conf("max_wal_size", "2GB")
        .conf("autovacuum", "off")
        .conf("max_prepared_transactions", "5")
        .start()
        .await;
    drive(&cluster, &[WORKLOAD, INDEXES, CLEANUP].concat()).await;
    cluster.set_conf("wal_level", "logical");
    cluster.restart().await;
    // Catalogs are rewritten with a map of their rows only if a slot needs it.
    cluster.sql("SELECT pg_create_logical_replication_slot('judge', 'test_decoding')").await;
    drive(&cluster, &[WORKLOAD, CLEANUP].concat()).await;
    cluster.sql("SELECT pg_drop_replication_slot('judge')").await;
    cluster.kill9().await;
    cluster.start().await;
    cluster.sql("CHECKPOINT").await;
    let end: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    cluster.sql("SELECT pg_current_xact_id()").await;
    let system_id = cluster.text("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
    let source = source(&cluster, system_id);
    let ours = decode(source, &segments(&cluster), end);
    println!("PostgreSQL {major}: {} records up to {end}", ours.len());
    judge_by_walinspect(&cluster, &ours, end).await;
    if major >= 16 {
        judge_blocks_by_walinspect(&cluster, &ours, end).await;
    }
    if cluster.bin_dir().join("pg_waldump").exists() {
        judge_by_waldump(&cluster, &ours);
    }
    if std::env::var_os("WALGUARD_TEST_WRITE_CORPUS").is_some() {
        write_corpus(major, &ours);
    }
    let name = |ours: &Ours| format!("{} {}", ours.explanation.manager, ours.explanation.operation);
    let driven: BTreeSet<_> = ours.iter().map(name).collect();
    let wanted = [OPERATIONS, pruning(source.major)].join(", ");
    let missing: Vec<_> = wanted.split(',').map(str::trim).filter(|name| !driven.contains(*name)).collect();
    assert!(missing.is_empty(), "PostgreSQL {major}: the workload did not drive {missing:?}; it did {driven:?}");
    cluster.stop(StopMode::Immediate).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_of_15_is_what_postgres_says_it_is() {
    judge(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_of_16_is_what_postgres_says_it_is() {
    judge(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_of_17_is_what_postgres_says_it_is() {
    judge(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_of_18_is_what_postgres_says_it_is() {
    judge(18).await;
}
