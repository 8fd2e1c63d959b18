//! What statements do to definitions is recognised from the physical WAL alone, with the right table; what only looks alike
//! is not taken for it. Names come from SQL once, and from the WAL then.

use std::collections::BTreeMap;

use walguard::capture::{ConnInfo, Environment};
use walguard::decode::{Change, Reader, WalMajor};
use walguard::detect::names::{Names, NamesLimits};
use walguard::detect::{DdlKind, Limits, Observer, Transaction};
use walguard::pg::Lsn;
use walguard::supervisor::names;

use crate::decode_parity::{segments, source};
use crate::harness::{Cluster, majors};

/// Everything that ended between two places, as an observer sees it that begins with what SQL tells at `start`.
pub(crate) struct Watched {
    cluster: Cluster,
    system_id: u64,
    start: Lsn,
    names: Option<Names>,
}

impl Watched {
    pub(crate) async fn begin(cluster: Cluster) -> Self {
        let system_id = cluster.text("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
        let start = cluster.lsn().await;
        let names = seeded(&cluster).await;
        Self { cluster, system_id, start, names: Some(names) }
    }

    /// The transactions since the beginning, and the names at the end.
    pub(crate) async fn finish(&mut self) -> (Vec<Transaction>, Names) {
        self.cluster.sql("SELECT pg_logical_emit_message(true, 'end', '')").await;
        let end: Lsn = self.cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        let mut reader = Reader::at_record(source(&self.cluster, self.system_id), self.start);
        let mut observer = Observer::new(self.names.take().unwrap(), Limits::default(), true);
        let mut ended = Vec::new();
        'all: for (at, bytes) in segments(&self.cluster) {
            let skip = usize::try_from(self.start.saturating_sub(at)).unwrap().min(bytes.len());
            reader.push(&bytes[skip..]);
            while let Ok(Some(record)) = reader.next_record() {
                if record.lsn >= end {
                    break 'all;
                }
                ended.extend(observer.see(&record, &Change::read(&record).unwrap()));
            }
        }
        assert_eq!(observer.take_fault(), None);
        let names = observer.names().export();
        (ended, Names::import(major_of(&self.cluster), NamesLimits::default(), names))
    }
}

fn major_of(cluster: &Cluster) -> WalMajor {
    WalMajor::ALL.into_iter().find(|major| major.number() == cluster.major()).unwrap()
}

/// Names as SQL tells them now.
pub(crate) async fn seeded(cluster: &Cluster) -> Names {
    let conninfo = ConnInfo::parse(&cluster.conninfo_of("postgres"), &Environment::default()).unwrap();
    let (shared, databases) = names::read(&conninfo, None).await.unwrap();
    let mut names = Names::new(major_of(cluster), NamesLimits::default());
    names.seed(shared);
    for told in databases {
        told.seeds.unwrap().into_iter().for_each(|seed| names.seed(seed));
    }
    names
}

async fn cluster(major: u32) -> Cluster {
    Cluster::builder()
        .major(major)
        .wal_segsize_mib(1)
        .conf("wal_keep_size", "4GB")
        .conf("autovacuum", "off")
        .conf("max_prepared_transactions", "5")
        .start()
        .await
}

/// An event in words: `truncate public.a`, `drop_trigger public.a guard`.
fn words(transaction: &Transaction) -> Vec<String> {
    let event = |event: &walguard::detect::DdlEvent| {
        let kind = serde_json::to_value(event.kind).unwrap();
        let relation = event.relation.as_ref().map(|r| format!(" {}.{}", r.schema, r.name)).unwrap_or_default();
        let object = event.object.as_ref().map(|object| format!(" {object}")).unwrap_or_default();
        format!("{}{relation}{object}", kind.as_str().unwrap())
    };
    transaction.ddl.iter().map(event).collect()
}

const TABLES: &str = "
    CREATE TABLE a (id int PRIMARY KEY, n int, note text);
    CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a, note text);
    CREATE TABLE c (id serial PRIMARY KEY, old_name int, note text);
    CREATE TABLE parts (id int, region int) PARTITION BY LIST (region);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
    CREATE SCHEMA shop; CREATE TABLE shop.orders (id int PRIMARY KEY); CREATE TABLE shop.lines (id int);
    CREATE VIEW seen AS SELECT id FROM a;
    CREATE MATERIALIZED VIEW summary AS SELECT count(*) FROM a;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE FUNCTION observe() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
    CREATE TRIGGER guard BEFORE TRUNCATE ON a EXECUTE FUNCTION refuse_not();
";

/// Each statement runs by itself; behind it what its transaction (the last one that says anything) did, and nothing else.
const STATEMENTS: &[(&str, &[&str])] = &[
    ("TRUNCATE c", &["truncate public.c"]),
    ("TRUNCATE c RESTART IDENTITY", &["truncate public.c", "alter public.c_id_seq"]),
    ("TRUNCATE a CASCADE", &["truncate public.a", "truncate public.b"]),
    ("TRUNCATE parts", &["truncate public.parts_1", "truncate public.parts_2"]),
    ("BEGIN; TRUNCATE c; INSERT INTO c VALUES (1, 1, 'again'); COMMIT", &["truncate public.c"]),
    ("BEGIN; SAVEPOINT s; TRUNCATE c; ROLLBACK TO s; DELETE FROM c; COMMIT", &[]),
    ("BEGIN; SAVEPOINT s; TRUNCATE c; RELEASE s; COMMIT", &["truncate public.c"]),
    ("BEGIN; TRUNCATE c; PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p'", &["truncate public.c"]),
    // What looks alike.
    ("VACUUM FULL c", &["rewrite public.c"]),
    ("CLUSTER a USING a_pkey", &["rewrite public.a"]),
    ("REINDEX TABLE a", &["rewrite public.a_pkey"]),
    ("ALTER TABLE c ALTER old_name TYPE bigint", &["rewrite public.c"]),
    // The file that the rewrite made is emptied in place.
    (
        "BEGIN; INSERT INTO c VALUES (9, 9); ALTER TABLE c ALTER old_name TYPE int; TRUNCATE c; TRUNCATE c; COMMIT",
        &["rewrite public.c", "truncate public.c"],
    ),
    // Nobody's rows.
    (
        "BEGIN; CREATE TABLE brief (id int); INSERT INTO brief VALUES (1); SAVEPOINT s; TRUNCATE brief; COMMIT",
        &["create public.brief"],
    ),
    ("ALTER TABLE c SET UNLOGGED", &["rewrite public.c"]),
    ("ALTER TABLE c SET LOGGED", &["rewrite public.c"]),
    ("REFRESH MATERIALIZED VIEW summary", &["rewrite public.summary"]),
    ("CREATE TABLE copied AS SELECT generate_series(1, 10) AS id", &["create public.copied"]),
    ("VACUUM c", &[]),
    ("ANALYZE c", &[]),
    (
        "BEGIN; CREATE TABLE passing (id int); INSERT INTO passing VALUES (1); TRUNCATE passing; DROP TABLE passing; COMMIT",
        &[],
    ),
    ("CREATE TEMP TABLE mine (id int)", &[]),
    ("TRUNCATE mine", &[]),
    ("DROP TABLE mine", &[]),
    // Definitions that protect.
    ("ALTER TABLE a DISABLE TRIGGER guard", &["disable_trigger public.a guard"]),
    ("ALTER TABLE a ENABLE TRIGGER guard", &[]),
    ("ALTER TABLE a ENABLE REPLICA TRIGGER guard", &["disable_trigger public.a guard"]),
    ("ALTER TABLE a ENABLE ALWAYS TRIGGER guard", &[]),
    (
        "BEGIN; DROP TRIGGER guard ON a; CREATE TRIGGER guard BEFORE TRUNCATE ON a EXECUTE FUNCTION refuse_not(); COMMIT",
        &[],
    ),
    ("DROP TRIGGER guard ON a", &["drop_trigger public.a guard"]),
    ("CREATE POLICY own ON a USING (id > 0)", &[]),
    ("DROP POLICY own ON a", &["drop_policy public.a own"]),
    ("CREATE RULE keep AS ON DELETE TO a DO INSTEAD NOTHING", &[]),
    ("ALTER TABLE a DISABLE RULE keep", &["drop_rule public.a keep"]),
    ("DROP RULE keep ON a", &["drop_rule public.a keep"]),
    ("CREATE EVENT TRIGGER ddl ON sql_drop EXECUTE FUNCTION observe()", &[]),
    ("ALTER EVENT TRIGGER ddl DISABLE", &["disable_event_trigger ddl"]),
    ("DROP EVENT TRIGGER ddl", &["drop_event_trigger ddl"]),
    // Definitions that hold data.
    ("ALTER TABLE c DROP COLUMN old_name", &["drop_column public.c old_name", "alter public.c"]),
    ("ALTER TABLE copied RENAME TO renamed", &["alter public.renamed public.copied"]),
    ("ALTER TABLE renamed SET SCHEMA shop", &["alter shop.renamed public.copied"]),
    ("DROP TABLE shop.renamed", &["drop_table shop.renamed"]),
    ("DROP VIEW seen", &["drop_other public.seen"]),
    ("DROP TABLE parts_2", &["drop_table public.parts_2"]),
    ("DROP TABLE parts", &["drop_table public.parts_1", "drop_table public.parts"]),
    ("BEGIN; DROP TABLE c; ROLLBACK", &[]),
    ("DROP TABLE c", &["drop_table public.c", "drop_other public.c_id_seq"]),
    ("DROP SCHEMA shop CASCADE", &["drop_table shop.orders", "drop_table shop.lines", "drop_schema shop"]),
    ("DROP DATABASE other", &["drop_database other"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn definitions_that_go_are_recognised_and_what_looks_alike_is_not() {
    for major in majors() {
        let cluster = cluster(major).await;
        let tables = TABLES.replace("refuse_not", "refuse");
        cluster.sql(&tables).await;
        cluster.sql("CREATE DATABASE other").await;
        cluster.sql("INSERT INTO a SELECT i, i, 'x' FROM generate_series(1, 10) i").await;
        let mut watched = Watched::begin(cluster).await;
        let client = watched.cluster.client().await;
        let mut ends = Vec::new();
        for (statements, _) in STATEMENTS {
            for statement in statements.replace("refuse_not", "refuse").split("; ") {
                client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{major}: {statement}: {error:?}"));
            }
            ends.push(watched.cluster.lsn().await);
        }
        let (ended, _) = watched.finish().await;
        let mut before = watched.start;
        let mut wrong = Vec::new();
        for ((statement, expected), end) in STATEMENTS.iter().zip(ends) {
            let own = ended.iter().filter(|t| t.committed && before <= t.lsn && t.lsn < end);
            let mut found: Vec<String> = own.flat_map(words).collect();
            let mut expected: Vec<String> = expected.iter().map(|event| (*event).to_owned()).collect();
            // Which of the things that a statement drops comes first is the server's business; other changes of a table
            // that come with it may be told or not.
            found.retain(|event| expected.contains(event) || !event.starts_with("alter "));
            expected.retain(|event| found.contains(event) || !event.starts_with("alter "));
            found.sort();
            expected.sort();
            found.dedup();
            if found != expected {
                wrong.push(format!("{statement}\n  found    {found:?}\n  expected {expected:?}"));
            }
            before = end;
        }
        assert!(wrong.is_empty(), "on {major}:\n{}", wrong.join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_follow_the_wal_and_are_those_that_sql_tells() {
    for major in majors() {
        let cluster = cluster(major).await;
        cluster.sql(&TABLES.replace("refuse_not", "refuse")).await;
        let mut watched = Watched::begin(cluster).await;
        let cluster = &watched.cluster;
        // Much that moves catalogs about: each is written anew, and databases are made in both ways.
        for statement in [
            "CREATE TABLE later (id int, wide text)",
            "VACUUM FULL pg_class",
            "ALTER TABLE a RENAME TO first",
            "CHECKPOINT",
            "VACUUM FULL pg_trigger",
            "VACUUM FULL pg_namespace",
            "VACUUM FULL pg_attribute",
            "TRUNCATE first CASCADE",
            "CHECKPOINT",
            "VACUUM FULL pg_index",
            "VACUUM FULL pg_inherits",
            "REINDEX TABLE b",
            "ALTER SCHEMA shop RENAME TO store",
            "CREATE TABLE store.more AS SELECT 1 AS id",
            "CREATE DATABASE copy",
            "ALTER TABLE parts DETACH PARTITION parts_2",
            "VACUUM FULL pg_database",
            "ALTER TABLE c ALTER note TYPE varchar(10)",
        ] {
            cluster.sql(statement).await;
        }
        let strategy = if major >= 15 { "CREATE DATABASE filed STRATEGY file_copy" } else { "CREATE DATABASE filed" };
        cluster.sql(strategy).await;
        let own = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=copy");
        let (client, connection) = tokio_postgres::connect(&own, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("CREATE SCHEMA s; CREATE TABLE s.t (id int)").await.unwrap();
        drop(client);
        let (_, followed) = watched.finish().await;
        let told = seeded(&watched.cluster).await;
        assert_eq!(listed(&followed), listed(&told), "on {major}");
        let all = listed(&told);
        assert!(all.values().any(|name| name == "copy.s.t") && all.values().any(|name| name == "postgres.store.more"));
    }
}

fn listed(names: &Names) -> BTreeMap<String, String> {
    names.tables().map(|(file, relation)| (format!("{file:?}"), relation.full_name())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_told_by_table_and_rows_that_only_come_to_lie_anew_are_not() {
    for major in majors() {
        let cluster = cluster(major).await;
        cluster.sql(&TABLES.replace("refuse_not", "refuse")).await;
        let mut watched = Watched::begin(cluster).await;
        let client = watched.cluster.client().await;
        for statement in [
            "INSERT INTO a SELECT i, i, repeat('wide ', 2000) FROM generate_series(1, 50) i",
            "INSERT INTO b SELECT i, i, 'b' FROM generate_series(1, 20) i",
            "ALTER TABLE b ALTER note TYPE varchar(20) USING note || '.'",
            "BEGIN",
            "ALTER TABLE b ALTER note TYPE varchar(30) USING note || '.'",
            "INSERT INTO b VALUES (100, 1, 'after it was written anew'), (101, 1, '')",
            "CREATE TABLE made AS SELECT generate_series(1, 7) AS id",
            "DELETE FROM made WHERE id = 1",
            "COMMIT",
            "REFRESH MATERIALIZED VIEW summary",
            "CREATE INDEX ON a (note)",
            "VACUUM FULL a",
            "DELETE FROM b",
            "DELETE FROM a WHERE id <= 30",
            "UPDATE a SET n = 0",
        ] {
            client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        let (ended, _) = watched.finish().await;
        let mut sums: BTreeMap<String, [u64; 3]> = BTreeMap::new();
        for tally in ended.iter().filter(|t| t.committed).flat_map(|t| &t.tallies) {
            let relation = tally.relation.as_ref().unwrap_or_else(|| panic!("{tally:?} on {major}"));
            let sum = sums.entry(relation.full_name()).or_default();
            let counts = [tally.counts.inserted, tally.counts.updated, tally.counts.deleted];
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        let expected = [
            ("postgres.public.a", [50, 20, 30]),
            ("postgres.public.b", [22, 0, 22]),
            ("postgres.public.made", [7, 0, 1]),
        ];
        assert_eq!(sums, expected.map(|(name, counts)| (name.to_owned(), counts)).into(), "on {major}");
        let kinds: Vec<_> = ended.iter().flat_map(|t| &t.ddl).map(|event| event.kind).collect();
        assert!(
            kinds.iter().all(|kind| matches!(kind, DdlKind::Rewrite | DdlKind::Create | DdlKind::Alter)),
            "{kinds:?}"
        );
    }
}
