//! Rows that a delete took are read through a snapshot from before it, and can be put back as they are.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::Client;
use walguard::capture::{ConnInfo, Environment};
use walguard::guard::flashback::{Config, Rows, Snapshot, Wanted};
use walguard::pg::Xid;
use walguard::supervisor::flashback::Flashback;

use crate::archived_wal::bare_repository;
use crate::harness::{Agent, Cluster, Scratch, command, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);

fn info(cluster: &Cluster) -> ConnInfo {
    ConnInfo::parse(&cluster.conninfo(), &Environment::default()).unwrap()
}

async fn shop(major: u32) -> Cluster {
    let cluster = Cluster::builder().major(major).conf("autovacuum", "off").start().await;
    cluster
        .sql(
            "GRANT pg_read_all_data TO walguard; \
             CREATE TABLE \"odd Users\" (id int PRIMARY KEY, name text, twice int GENERATED ALWAYS AS (id * 2) STORED, at timestamptz); \
             INSERT INTO \"odd Users\" (id, name, at) SELECT i, CASE WHEN i % 7 = 0 THEN E'two\\nlines, \"quoted\"' WHEN i % 5 = 0 THEN NULL \
               ELSE 'n' || i END, '2025-12-17 08:14+02' FROM generate_series(1, 1000) i",
        )
        .await;
    cluster
}

async fn xid(client: &Client) -> Xid {
    let sql = "SELECT (pg_current_xact_id()::text::bigint % 4294967296)::text";
    Xid::new(client.query_one(sql, &[]).await.unwrap().get::<_, String>(0).parse().unwrap()).unwrap()
}

fn wanted(xids: Vec<Xid>, rows: u64) -> Wanted {
    Wanted { schema: "public".to_owned(), table: "odd Users".to_owned(), xids, rows: Some(rows) }
}

/// Puts rows back with psql, as a person would.
fn put_back(cluster: &Cluster, rows: &Rows) {
    let csv = zstd::decode_all(&rows.stored[..]).unwrap();
    let header = String::from_utf8(csv.split(|b| *b == b'\n').next().unwrap().to_vec()).unwrap();
    let mut psql = command(cluster.bin("psql"));
    psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &cluster.conninfo_of("postgres"), "-c"]);
    psql.arg(format!("COPY \"odd Users\" ({header}) FROM STDIN (FORMAT csv, HEADER)"));
    let mut psql = psql.stdin(Stdio::piped()).spawn().unwrap();
    psql.stdin.take().unwrap().write_all(&csv).unwrap();
    assert!(psql.wait().unwrap().success());
}

const SUM: &str = "SELECT count(*) || ' ' || md5(string_agg(t::text, '|' ORDER BY id)) FROM \"odd Users\" t";

#[tokio::test(flavor = "multi_thread")]
async fn deleted_rows_come_back_exactly_and_only_they_are_saved() {
    for major in [15, 17] {
        let cluster = shop(major).await;
        let before = cluster.text(SUM).await;
        let snapshot = Snapshot::take(&info(&cluster), "postgres").await.unwrap();
        let wiper = cluster.client().await;
        // Another transaction changes other rows, and yet another locks some: neither is the wiper's doing.
        cluster.sql("UPDATE \"odd Users\" SET at = at WHERE id > 990").await;
        wiper.batch_execute("BEGIN; DELETE FROM \"odd Users\" WHERE id <= 600").await.unwrap();
        let by = xid(&wiper).await;
        // Seen while it is open, and after its commit, and after a vacuum that may not take them.
        assert_eq!(snapshot.read(&wanted(vec![by], 600), &Config::default()).await.unwrap().rows, 600);
        wiper.batch_execute("COMMIT").await.unwrap();
        wiper.batch_execute("VACUUM \"odd Users\"").await.unwrap();
        let rows = snapshot.read(&wanted(vec![by], 600), &Config::default()).await.unwrap();
        assert_eq!((rows.rows, &rows.note), (600, &None));
        put_back(&cluster, &rows);
        assert_eq!(cluster.text(SUM).await, before);
        // One that was taken afterwards does not see them any more.
        let late = Snapshot::take(&info(&cluster), "postgres").await.unwrap();
        assert!(late.taken_at > snapshot.taken_at);
        assert_eq!(late.read(&wanted(vec![by], 600), &Config::default()).await.unwrap().rows, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_subtransactions_that_nobody_named_are_found_and_it_is_said_that_others_may_be_among_them() {
    let cluster = shop(17).await;
    let snapshot = Snapshot::take(&info(&cluster), "postgres").await.unwrap();
    let wiper = cluster.client().await;
    wiper.batch_execute("BEGIN; SAVEPOINT one; DELETE FROM \"odd Users\" WHERE id <= 100; RELEASE one").await.unwrap();
    let top = xid(&wiper).await;
    wiper.batch_execute("COMMIT").await.unwrap();
    let rows = snapshot.read(&wanted(vec![top], 100), &Config::default()).await.unwrap();
    assert_eq!(rows.rows, 100);
    assert!(rows.note.unwrap().contains("changed or locked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_an_error_and_the_snapshot_lives_on() {
    let cluster = shop(15).await;
    cluster
        .sql(
            "CREATE TABLE hidden AS SELECT 1 AS n; ALTER TABLE hidden ENABLE ROW LEVEL SECURITY; \
             CREATE TABLE locked AS SELECT 1 AS n; REVOKE pg_read_all_data FROM walguard; \
             GRANT SELECT ON hidden, locked TO walguard",
        )
        .await;
    let snapshot = Snapshot::take(&info(&cluster), "postgres").await.unwrap();
    let wiper = cluster.client().await;
    wiper.batch_execute("BEGIN; DELETE FROM \"odd Users\"; DELETE FROM hidden").await.unwrap();
    let by = xid(&wiper).await;
    wiper.batch_execute("COMMIT; BEGIN; LOCK TABLE locked").await.unwrap();
    let config = Config::default();
    let denied = snapshot.read(&wanted(vec![by], 1000), &config).await.unwrap_err();
    assert!(denied.to_string().contains("permission denied"), "{denied}");
    let of = |table: &str| Wanted { table: table.to_owned(), ..wanted(vec![by], 1) };
    let hidden = snapshot.read(&of("hidden"), &config).await.unwrap_err();
    assert!(hidden.to_string().contains("row-level security"), "{hidden}");
    assert!(snapshot.read(&of("nothing"), &config).await.is_err());
    let locked = snapshot.read(&of("locked"), &config).await.unwrap_err();
    assert!(locked.to_string().contains("lock timeout"), "{locked}");
    cluster.sql("GRANT SELECT ON \"odd Users\" TO walguard").await;
    assert_eq!(snapshot.read(&wanted(vec![by], 1000), &config).await.unwrap().rows, 1000);
    assert!(!snapshot.is_lost());
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_fits_is_cut_and_said() {
    let cluster = shop(17).await;
    cluster.sql("CREATE TABLE big AS SELECT i, md5(i::text) || md5((i * 7)::text) AS x FROM generate_series(1, 200000) i; ANALYZE big").await;
    let snapshot = Snapshot::take(&info(&cluster), "postgres").await.unwrap();
    let wiper = cluster.client().await;
    wiper.batch_execute("BEGIN; DELETE FROM big").await.unwrap();
    let by = xid(&wiper).await;
    wiper.batch_execute("COMMIT").await.unwrap();
    let config = Config { table_bytes_max: bytesize::ByteSize::kib(256), ..Config::default() };
    let big = Wanted { table: "big".to_owned(), ..wanted(vec![by], 200_000) };
    let rows = snapshot.read(&big, &config).await.unwrap();
    assert!(rows.rows < 200_000 && rows.stored.len() < 1 << 20, "{} rows, {} bytes", rows.rows, rows.stored.len());
    assert!(rows.note.unwrap().contains("more rows"));
    let slow = Config { table_time_max: Duration::from_millis(1), ..Config::default() };
    let error = snapshot.read(&big, &slow).await.unwrap_err();
    assert!(error.to_string().contains("statement timeout"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_holds_snapshots_of_its_window_and_tells_how_old_they_are() {
    let cluster = shop(17).await;
    let scratch = Scratch::new();
    let mut agent = Agent::builder(&cluster, &scratch.repo_url())
        .arg("--no-backups")
        .settings("[flashback]\nevidence = true\nwindow = \"10s\"")
        .spawn();
    agent.wait_streaming(&cluster).await;
    let held = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'walguard-flashback' \
                AND state = 'idle in transaction'";
    wait_for("two snapshots", DEADLINE, || async { cluster.number(held).await == 2 }).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let metrics = client.get(agent.url("/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("walguard_flashback_age_seconds{"), "{metrics}");
    // Old ones go: after two windows none of those is left that are held now.
    let first =
        cluster.text("SELECT min(pid) FROM pg_stat_activity WHERE application_name = 'walguard-flashback'").await;
    let gone = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {first}");
    let begun = Timestamp::now();
    wait_for("the oldest to go", DEADLINE, || async { cluster.number(&gone).await == 0 }).await;
    assert!(Timestamp::now().duration_since(begun).as_secs() < 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_suspected_delete_lie_beside_the_incident_without_any_window() {
    let cluster = shop(17).await;
    let scratch = Scratch::new();
    let repo = bare_repository(&scratch.dir("repo"));
    let config = Config { evidence: true, ..Config::default() };
    let board = walguard::serve::status::Board::new(walguard::serve::status::Status::default());
    let flashback = Flashback::new(info(&cluster), config, repo.clone(), board);

    let before = cluster.text(SUM).await;
    let wiper = cluster.client().await;
    wiper.batch_execute("BEGIN; DELETE FROM \"odd Users\"").await.unwrap();
    let by = xid(&wiper).await;
    flashback.suspect("postgres").await;
    wiper.batch_execute("COMMIT").await.unwrap();
    let committed = cluster.client().await;
    let committed: Timestamp =
        committed.query_one("SELECT timestamp FROM pg_last_committed_xact()", &[]).await.unwrap().get(0);
    let id = "00000001-0000000001A2B3C4";
    let nothing = Wanted { table: "nothing".to_owned(), ..wanted(vec![by], 1) };
    let saved = flashback.save(id, "postgres", &[wanted(vec![by], 1000), nothing], Some(committed)).await;
    assert_eq!((saved[0].rows, &saved[0].note), (1000, &None), "{saved:?}");
    assert!(saved[1].key.is_empty() && saved[1].note.as_ref().unwrap().contains("does not exist"), "{saved:?}");
    let stored = repo.store().read(&saved[0].key, None).await.unwrap();
    put_back(&cluster, &Rows { stored, rows: 1000, note: None });
    assert_eq!(cluster.text(SUM).await, before);
    assert_eq!(repo.incidents(None).await.unwrap().incidents.len(), 0, "evidence is no incident");

    // What was committed before any snapshot was held is told, not passed over.
    let late =
        flashback.save(id, "postgres", &[wanted(vec![by], 1)], Some("2020-01-01T00:00:00Z".parse().unwrap())).await;
    assert!(late[0].note.as_ref().unwrap().contains("no snapshot from before"), "{late:?}");
}
