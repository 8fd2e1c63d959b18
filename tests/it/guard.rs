//! The guard tells in the WAL who did it, breaks nothing, protects where it is asked to, and says when it is not whole.

use std::time::Duration;

use tokio_postgres::Client;
use walguard::decode::change::Action;
use walguard::decode::{Change, Reader};
use walguard::detect::WhoSource;
use walguard::guard::message::{self, GuardMessage, Operation, Told};
use walguard::pg::{Lsn, Xid};

use crate::decode_parity::{segments, source};
use crate::harness::{Agent, Cluster, Scratch, wait_for, walguard};

const DEADLINE: Duration = Duration::from_secs(60);

/// A server whose WAL can be read from its small segments.
async fn server(major: u32) -> Cluster {
    Cluster::builder().major(major).wal_segsize_mib(1).conf("wal_keep_size", "1GB").start().await
}

/// The guard's messages since `start`, with their transactions.
async fn told(cluster: &Cluster, start: Lsn) -> Vec<(Xid, GuardMessage)> {
    // Nothing is held back in memory.
    cluster.sql("SELECT pg_logical_emit_message(true, 'test', '')").await;
    let system_id = cluster.text("SELECT system_identifier FROM pg_control_system()").await.parse().unwrap();
    let mut reader = Reader::at_record(source(cluster, system_id), start);
    let mut found = Vec::new();
    for (at, bytes) in segments(cluster) {
        let skip = usize::try_from(start.saturating_sub(at)).unwrap().min(bytes.len());
        reader.push(&bytes[skip..]);
        while let Ok(Some(record)) = reader.next_record() {
            let change = Change::read(&record).unwrap();
            let Action::Message(logical) = change.action else { continue };
            if let Some(read) = message::read(logical.prefix, logical.content) {
                assert!(logical.transactional);
                found.push((change.xid.unwrap(), read));
            }
        }
    }
    found
}

fn guard(cluster: &Cluster, args: &[&str]) -> crate::harness::Finished {
    let pg = cluster.conninfo_of("postgres");
    let mut all = vec!["guard"];
    all.extend(args);
    all.extend(["--pg", &pg]);
    walguard(&all)
}

async fn client_of(cluster: &Cluster, user: &str, application: &str) -> Client {
    let config = format!("{} application_name={application}", cluster.conninfo_of(user));
    let (client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

const SHOP: &str = "
    CREATE ROLE app NOLOGIN; CREATE ROLE bob LOGIN IN ROLE app;
    CREATE TABLE users AS SELECT i AS n FROM generate_series(1, 100) i;
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE);
    INSERT INTO parent SELECT generate_series(1, 50);
    INSERT INTO child SELECT i, i FROM generate_series(1, 50) i;
    CREATE TABLE parts (id int, region int) PARTITION BY LIST (region);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE kept_out (n int); INSERT INTO kept_out VALUES (1);
    INSERT INTO parts SELECT i, 1 FROM generate_series(1, 30) i;
    ALTER TABLE users OWNER TO app; ALTER TABLE parent OWNER TO app; ALTER TABLE child OWNER TO app;
    ALTER TABLE parts OWNER TO app; GRANT ALL ON kept_out, parts_1 TO app;";

fn rows(told: &Told) -> Option<(Operation, &str, Option<u64>)> {
    match told {
        Told::Rows { operation, table, rows, .. } => Some((*operation, table, *rows)),
        Told::Definitions { .. } => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guard_tells_in_the_wal_who_did_what() {
    for major in [15, 18] {
        let cluster = server(major).await;
        cluster.sql(SHOP).await;
        guard(&cluster, &["install", "--exclude", "kept_out", "--updates"]).expect(0);
        let bob = client_of(&cluster, "bob", "till").await;
        let pid: i32 = bob.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        let start = cluster.lsn().await;
        bob.batch_execute("SET ROLE app; SET walguard.reason = 'spring cleaning'").await.unwrap();
        for sql in [
            "DELETE FROM users WHERE n <= 39",
            "DELETE FROM users WHERE n < 0",
            "UPDATE users SET n = n + 1 WHERE n > 90",
            "DELETE FROM parent",
            "DELETE FROM parts",
            "TRUNCATE users",
            "DELETE FROM kept_out",
            "ALTER TABLE parent ADD COLUMN more int",
            "DROP TABLE child",
        ] {
            bob.batch_execute(sql).await.unwrap();
        }
        let all = told(&cluster, start).await;
        let counted: Vec<_> = all.iter().filter_map(|(_, message)| rows(&message.what)).collect();
        let expected = [
            (Operation::Delete, "users", Some(39)),
            (Operation::Update, "users", Some(10)),
            // What a foreign key cascades to, too.
            (Operation::Delete, "child", Some(50)),
            (Operation::Delete, "parent", Some(50)),
            (Operation::Delete, "parts", Some(30)),
            (Operation::Truncate, "users", None),
        ];
        let sorted = |list: &[(Operation, &str, Option<u64>)]| {
            let mut list: Vec<_> = list.iter().map(|entry| format!("{entry:?}")).collect();
            list.sort();
            list
        };
        assert_eq!(sorted(&counted), sorted(&expected), "PostgreSQL {major}");
        let commands = all.iter().filter_map(|(_, message)| match &message.what {
            Told::Definitions { dropped, command, objects, .. } => {
                Some((*dropped, command.as_str(), objects[0].1.as_str()))
            }
            Told::Rows { .. } => None,
        });
        let commands = commands.collect::<Vec<_>>();
        assert_eq!(commands, [(false, "ALTER TABLE", "public.parent"), (true, "DROP TABLE", "public.child")]);
        for (_, message) in &all {
            let who = &message.who;
            assert_eq!(who.source, WhoSource::Guard);
            assert_eq!(who.actor.role.as_deref(), Some("app"));
            assert_eq!(who.actor.session_user.as_deref(), Some("bob"));
            assert_eq!(who.actor.application.as_deref(), Some("till"));
            assert_eq!(who.actor.database.as_deref(), Some("postgres"));
            assert_eq!(who.actor.pid, Some(pid));
            assert!(who.actor.client.as_ref().unwrap().starts_with("127.0.0.1:"));
            assert_eq!(message.reason.as_deref(), Some("spring cleaning"));
        }
        assert_eq!(all[0].1.who.actor.query.as_deref(), Some("DELETE FROM users WHERE n <= 39"));
        let began = format!("SELECT backend_start FROM pg_stat_activity WHERE pid = {pid}");
        let began: jiff::Timestamp = cluster.client().await.query_one(&began, &[]).await.unwrap().get(0);
        assert_eq!(all[0].1.who.actor.backend_start, Some(began.into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_message_lies_in_the_transaction_that_did_it() {
    let cluster = server(17).await;
    cluster.sql(SHOP).await;
    guard(&cluster, &["install"]).expect(0);
    let client = cluster.client().await;
    let start = cluster.lsn().await;
    client.batch_execute("BEGIN; DELETE FROM users").await.unwrap();
    let xid: String = client.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap().get(0);
    client.batch_execute("ROLLBACK").await.unwrap();
    let all = told(&cluster, start).await;
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].0.to_string(), xid, "no subtransaction's id is used up for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guards_own_failure_breaks_no_statement() {
    let cluster = server(15).await;
    cluster.sql(SHOP).await;
    guard(&cluster, &["install"]).expect(0);
    let start = cluster.lsn().await;
    for damage in [
        "REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(boolean, text, bytea) FROM walguard_guard, PUBLIC",
        "REVOKE pg_read_all_stats FROM walguard_guard",
        "CREATE OR REPLACE FUNCTION walguard_guard.message(what json) RETURNS bytea LANGUAGE plpgsql AS \
         'BEGIN RETURN NULL; END'",
    ] {
        cluster.sql(damage).await;
        cluster
            .sql("DELETE FROM users WHERE n <= 10; TRUNCATE parts; CREATE TABLE more (n int); DROP TABLE more")
            .await;
    }
    assert!(told(&cluster, start).await.is_empty());
    let report = guard(&cluster, &["status", "--json"]).expect(3).json();
    let problems = report["problems"].as_array().unwrap();
    assert!(problems.iter().any(|problem| problem["name"] == "walguard_guard.message"), "{report}");
    guard(&cluster, &["install"]).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn installing_twice_changes_nothing_and_takes_no_lock_and_new_tables_are_found() {
    let cluster = server(17).await;
    cluster.sql(SHOP).await;
    guard(&cluster, &["install"]).expect(0);
    let triggers = "SELECT string_agg(oid::text, ',' ORDER BY oid) FROM pg_trigger WHERE NOT tgisinternal";
    let before = cluster.text(triggers).await;
    let writer = cluster.client().await;
    writer.batch_execute("BEGIN; INSERT INTO users VALUES (1)").await.unwrap();
    guard(&cluster, &["install"]).expect(0);
    assert_eq!(cluster.text(triggers).await, before);
    // A table that somebody writes to cannot get its trigger now, and nobody waits for it for long.
    for sql in ["COMMIT", "CREATE TABLE later (n int)", "BEGIN", "INSERT INTO later VALUES (1)"] {
        writer.batch_execute(sql).await.unwrap();
    }
    assert!(guard(&cluster, &["install"]).expect(1).stderr().contains("lock timeout"));
    writer.batch_execute("COMMIT").await.unwrap();
    let report = guard(&cluster, &["status", "--json"]).expect(3).json();
    assert_eq!((report["triggers"].as_u64(), report["triggers_ok"].as_u64()), (Some(14), Some(12)), "{report}");
    assert!(guard(&cluster, &["install"]).expect(0).stdout().contains("14 of 14"));
    // What is no longer asked for goes.
    guard(&cluster, &["install", "--tables", "users"]).expect(0);
    let left = "SELECT string_agg(DISTINCT tgrelid::regclass::text, ',') FROM pg_trigger WHERE NOT tgisinternal";
    assert_eq!(cluster.text(left).await, "users");
    guard(&cluster, &["uninstall"]).expect(0);
    assert_eq!(cluster.text(left).await, "");
    assert_eq!(cluster.number("SELECT count(*) FROM pg_roles WHERE rolname = 'walguard_guard'").await, 0);
    assert!(guard(&cluster, &["status"]).expect(3).stdout().contains("is not installed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_printed_is_what_is_installed() {
    let cluster = server(15).await;
    cluster.sql(SHOP).await;
    let sql = walguard(&["guard", "sql", "--protect"]).expect(0).stdout();
    cluster.sql(&sql).await;
    guard(&cluster, &["status", "--protect"]).expect(0);
    let gone = walguard(&["guard", "sql", "--uninstall"]).expect(0).stdout();
    cluster.sql(&gone).await;
    assert_eq!(cluster.number("SELECT count(*) FROM pg_event_trigger").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_without_superuser_installs_all_but_the_event_triggers() {
    let cluster = server(17).await;
    cluster
        .sql(
            "CREATE ROLE owner LOGIN CREATEROLE; GRANT ALL ON DATABASE postgres TO owner; \
             GRANT ALL ON SCHEMA public TO owner; SET ROLE owner; CREATE TABLE own AS SELECT 1 AS n",
        )
        .await;
    let pg = cluster.conninfo_of("owner");
    walguard(&["guard", "install", "--no-definitions", "--pg", &pg]).expect(0);
    let start = cluster.lsn().await;
    client_of(&cluster, "owner", "x").await.batch_execute("DELETE FROM own").await.unwrap();
    assert_eq!(told(&cluster, start).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn protection_refuses_to_empty_and_to_drop_unless_somebody_says_why() {
    for major in [15, 18] {
        let cluster = server(major).await;
        cluster.sql(SHOP).await;
        cluster.sql("CREATE TABLE queue AS SELECT 1 AS n; ANALYZE").await;
        guard(&cluster, &["install", "--protect", "--exclude", "kept_out"]).expect(0);
        let client = cluster.client().await;
        for refused in [
            "DELETE FROM users",
            "DELETE FROM users WHERE true",
            "TRUNCATE users",
            "DROP TABLE users",
            "DROP SCHEMA public CASCADE",
            "ALTER TABLE users DISABLE TRIGGER walguard_delete",
            "ALTER TABLE users DISABLE TRIGGER ALL",
            "DROP TRIGGER walguard_keep_rows ON users",
            "DROP FUNCTION walguard_guard.refuse_delete CASCADE",
            "SET session_replication_role = replica; DELETE FROM users",
        ] {
            let error = client.batch_execute(refused).await.expect_err(refused);
            let error = error.as_db_error().unwrap();
            assert!(error.message().contains("refused"), "{refused}: {error}");
            assert!(error.hint().unwrap().contains("walguard.reason"), "{error}");
        }
        client.batch_execute("RESET session_replication_role").await.unwrap();
        for harmless in [
            "DELETE FROM users WHERE n <= 50",
            "DELETE FROM queue",
            "CREATE TEMP TABLE t (n int); DROP TABLE t",
            "TRUNCATE kept_out",
            "DROP TABLE kept_out",
        ] {
            client.batch_execute(harmless).await.unwrap_or_else(|error| panic!("{harmless}: {error:?}"));
        }
        assert_eq!(cluster.number("SELECT count(*) FROM users").await, 50);
        client.batch_execute("SET walguard.reason = 'the shop is closed'").await.unwrap();
        client.batch_execute("DELETE FROM users; TRUNCATE parts; DROP TABLE users").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_tells_which_protection_is_gone_and_how_many_triggers_are_really_there() {
    let cluster = server(15).await;
    cluster.sql(SHOP).await;
    cluster
        .sql(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'; \
         CREATE TRIGGER keep BEFORE TRUNCATE ON users EXECUTE FUNCTION no(); \
         CREATE TRIGGER keep BEFORE TRUNCATE ON parent EXECUTE FUNCTION no()",
        )
        .await;
    guard(&cluster, &["install"]).expect(0);
    let scratch = Scratch::new();
    let mut agent = Agent::builder(&cluster, &scratch.repo_url())
        .arg("--no-backups")
        .settings("[protection]\ninterval = \"1s\"")
        .spawn();
    agent.wait_streaming(&cluster).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let status = async || {
        let answer = client.get(agent.url("/status")).send().await.unwrap();
        serde_json::from_slice::<serde_json::Value>(&answer.bytes().await.unwrap()).unwrap()
    };
    let database = |status: &serde_json::Value| status["protection"]["databases"][0].clone();
    wait_for("the first look", DEADLINE, || async { database(&status().await)["triggers"]["there"] == 14 }).await;
    let whole = database(&status().await);
    assert_eq!((&whole["guard"]["in_force"], &whole["guard"]["there"]), (&14.into(), &14.into()), "{whole}");

    cluster
        .sql("DROP TRIGGER keep ON users; ALTER TABLE parent DISABLE TRIGGER walguard_delete; DROP TABLE child")
        .await;
    wait_for("the alarm", DEADLINE, || async { status().await["alarms"]["protection"].is_object() }).await;
    let text = status().await["alarms"]["protection"]["text"].as_str().unwrap().to_owned();
    assert!(text.contains("trigger keep on public.users in database postgres was dropped"), "{text}");
    assert!(text.contains("trigger walguard_delete on public.parent in database postgres was disabled"), "{text}");
    assert!(!text.contains("child"), "{text}");
    let lost = database(&status().await);
    assert_eq!((&lost["guard"]["in_force"], &lost["guard"]["there"]), (&11.into(), &12.into()), "{lost}");

    cluster.sql("CREATE TRIGGER keep BEFORE TRUNCATE ON users EXECUTE FUNCTION no()").await;
    cluster.sql("ALTER TABLE parent ENABLE ALWAYS TRIGGER walguard_delete").await;
    wait_for("the alarm to pass", DEADLINE, || async { status().await["alarms"]["protection"].is_null() }).await;
}
