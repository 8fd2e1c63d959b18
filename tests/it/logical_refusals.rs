//! What cannot be rebuilt, or not whole, is said before somebody needs it, and refused when he does.

use std::process::Stdio;

use crate::archived_wal::repository;
use crate::harness::{Agent, Cluster, Finished, Scratch, finish, walguard_command};
use crate::managed::*;

async fn restore(agent: &Agent, server: &Cluster, database: &str, args: &[&str]) -> Finished {
    let into = server.conninfo_of("postgres").replace("dbname=postgres", &format!("dbname={database}"));
    let mut command = walguard_command(&["restore", "--yes", "--json", "--into", &into]);
    command.args(args).args(agent.flags());
    tokio::task::spawn_blocking(move || finish(command)).await.unwrap()
}

/// Tables of users in a database.
async fn tables(server: &Cluster, database: &str) -> i64 {
    let into = server.conninfo_of("postgres").replace("dbname=postgres", &format!("dbname={database}"));
    let query = "SELECT count(*) FROM pg_class WHERE oid >= 16384 AND relkind = 'r'";
    connect(&into).await.query_one(query, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_a_table_that_no_publication_names_are_never_taken_for_none() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE told (id int PRIMARY KEY)").await;
    run(&client, "CREATE TABLE untold (id int PRIMARY KEY)").await;
    run(&client, "CREATE PUBLICATION chosen FOR TABLE told").await;
    let own = "[logical]\npublication = \"chosen\"\nmanage = false";
    let mut agent = agent(&cluster, &scratch).settings(own).spawn();
    agent.wait_streaming(&cluster).await;
    let checked = verb(&agent, &["check"]).stdout();
    assert!(checked.contains("changes of public.untold are not seen"), "{checked}");
    take_base(&agent, "first").await;
    run(&client, "INSERT INTO told VALUES (1); INSERT INTO untold VALUES (1)").await;
    wait_kept(&cluster).await;
    cluster.sql("CREATE DATABASE rebuilt TEMPLATE template0").await;
    let refused = restore(&agent, &cluster, "rebuilt", &["--to", "latest"]).await.expect(1).stderr();
    assert!(refused.contains("changes of public.untold behind base first are not known"), "{refused}");
    assert!(refused.contains("HINT: ") && refused.contains("--partial"), "{refused}");
    assert_eq!(tables(&cluster, "rebuilt").await, 0, "nothing was done");
    let partial = restore(&agent, &cluster, "rebuilt", &["--to", "latest", "--partial"]).await.expect(3).json();
    assert!(partial["plan"]["remarks"].to_string().contains("public.untold"), "{partial:#}");

    // A base from after it was published has all of it.
    run(&client, "ALTER PUBLICATION chosen ADD TABLE untold").await;
    take_base(&agent, "second").await;
    run(&client, "INSERT INTO untold VALUES (2)").await;
    wait_kept(&cluster).await;
    cluster.sql("CREATE DATABASE whole TEMPLATE template0").await;
    let told = restore(&agent, &cluster, "whole", &["--to", "latest"]).await.expect(0).json();
    assert_eq!((&told["plan"]["base"]["label"], &told["restore"]["rows_verified"]), (&"second".into(), &3.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_kept_goes_and_what_is_damaged_or_missing_is_named() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    for (number, label) in ["first", "second", "third"].into_iter().enumerate() {
        take_base(&agent, label).await;
        // An object of the log for each.
        run(&client, &format!("INSERT INTO t VALUES ({})", 1_000 + number)).await;
        wait_kept(&cluster).await;
    }
    let repo = repository(&scratch.repo_url()).await;
    let [database] = repo.changed_databases().await.unwrap().try_into().unwrap();
    let whole = verb(&agent, &["verify", "--json"]).expect(0).json();
    assert_eq!((&whole["bases"], &whole["problems_total"]), (&3.into(), &0.into()), "{whole:#}");
    assert_eq!(whole["base_objects"], 9, "a schema in two parts, and rows");
    let before = repo.changes_after(database, None).await.unwrap();
    let shown = verb(&agent, &["expire", "--keep-backups", "2"]).expect(0).stdout();
    assert!(shown.contains("deletes base first") && shown.contains("dry run"), "{shown}");
    assert_eq!(repo.bases(database).await.unwrap().len(), 3, "nothing was deleted yet");
    let told = verb(&agent, &["expire", "--keep-backups", "2", "--yes", "--json"]).expect(0).json();
    assert!(told["expired"]["objects"].as_u64() > Some(4), "{told:#}");
    let kept = repo.bases(database).await.unwrap();
    assert_eq!(kept.iter().map(|base| base.label.as_str()).collect::<Vec<_>>(), ["second", "third"]);
    let left = repo.changes_after(database, None).await.unwrap();
    assert!(left.len() < before.len() && left[0].from <= kept[0].consistent, "{left:?} of {before:?}");
    assert!(verb(&agent, &["expire", "--keep-backups", "2"]).expect(0).stdout().contains("nothing goes"));
    verb(&agent, &["verify"]).expect(0);
    cluster.sql("CREATE DATABASE rebuilt TEMPLATE template0").await;
    let told = restore(&agent, &cluster, "rebuilt", &["--to", "latest", "--backup", "second"]).await.expect(0).json();
    assert_eq!(told["restore"]["rows_verified"], 103);

    // A part of a base that is damaged, and objects of the log that are gone: the first, and one on the way.
    for number in 0..3 {
        run(&client, &format!("INSERT INTO t VALUES ({})", 2_000 + number)).await;
        wait_kept(&cluster).await;
    }
    assert!(agent.stop().await.success());
    let table = kept[1].tables[0].oid;
    let part = repo.layout().base_rows(database, "third", table, 1);
    let file = std::path::Path::new(scratch.repo_url().strip_prefix("file://").unwrap()).join(&part);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&file, bytes).unwrap();
    let left = repo.changes_after(database, None).await.unwrap();
    let lost = left[left.len() - 2];
    assert!(left.len() >= 4, "{left:?}");
    for name in [left[0], lost] {
        repo.store().delete(&repo.layout().changes(&name)).await.unwrap();
    }
    let told = verb(&agent, &["verify"]).expect(3).stdout();
    assert!(told.contains(&part) && told.contains("base third cannot be rebuilt"), "{told}");
    assert!(told.contains(&format!("changes from {} to", lost.from)) && told.contains("are missing"), "{told}");
    assert!(told.contains("base second can be rebuilt alone"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_tables_that_are_named_get_rows_and_what_that_breaks_is_said() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE users (id int PRIMARY KEY); INSERT INTO users VALUES (1), (2)").await;
    run(&client, "CREATE TABLE orders (id int PRIMARY KEY, owner int REFERENCES users)").await;
    run(&client, "INSERT INTO orders VALUES (1, 1); CREATE TABLE log (line text)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    run(&client, "INSERT INTO orders VALUES (2, 2); INSERT INTO users VALUES (3); DELETE FROM orders WHERE id = 1")
        .await;
    wait_kept(&cluster).await;
    for database in ["a", "b"] {
        cluster.sql(&format!("CREATE DATABASE {database} TEMPLATE template0")).await;
    }
    let all = restore(&agent, &cluster, "a", &["--to", "latest"]).await.expect(1).stderr();
    assert!(all.contains("public.log"), "of a table without a key not all is known: {all}");
    let unknown = restore(&agent, &cluster, "a", &["--to", "latest", "--only", "order"]).await.expect(1).stderr();
    assert!(unknown.contains("has no table `order`") && unknown.contains("HINT: "), "{unknown}");
    let told = restore(&agent, &cluster, "a", &["--to", "latest", "--only", "ord*", "--only", "public.users"]).await;
    assert_eq!(
        told.expect(0).json()["restore"]["rows_verified"],
        4,
        "whole, without the table of which not all is known"
    );
    let told = restore(&agent, &cluster, "b", &["--to", "latest", "--only", "orders"]).await.expect(0).json();
    assert_eq!(told["plan"]["left_empty"], serde_json::json!(["public.log", "public.users"]));
    assert!(told["restore"]["foreign_keys_left"][0].as_str().unwrap().contains("public.orders"), "{told:#}");
    let there = connect(&cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=b")).await;
    let rows =
        there.query_one("SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM users)", &[]).await.unwrap();
    assert_eq!((rows.get::<_, i64>(0), rows.get::<_, i64>(1)), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_and_deletes_that_are_told_no_more_are_missed_before_a_rebuild_passes_for_whole() {
    let cluster = managed(17).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 9)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    run(&client, "DELETE FROM t WHERE id = 1").await;
    let before = cluster.text("SELECT pg_current_wal_insert_lsn()").await;
    run(&client, "ALTER TABLE t DROP CONSTRAINT t_pkey").await;
    let moved =
        "SELECT EXISTS (SELECT FROM pg_publication_tables WHERE pubname = 'walguard_inserts' AND tablename = 't')";
    wait_sql(&client, "the table to be published as far as it can be", moved).await;
    run(&client, "DELETE FROM t WHERE id = 2").await; // which nobody tells
    wait_kept(&cluster).await;
    for database in ["refused", "rebuilt"] {
        cluster.sql(&format!("CREATE DATABASE {database} TEMPLATE template0")).await;
    }
    let refused = restore(&agent, &cluster, "refused", &["--to", "latest"]).await.expect(1).stderr();
    assert!(refused.contains("updates and deletes of table public.t were no longer told"), "{refused}");
    assert_eq!(tables(&cluster, "refused").await, 0, "nothing was done");
    let told = restore(&agent, &cluster, "rebuilt", &["--to", &before]).await.expect(0).json();
    assert_eq!(told["restore"]["rows_verified"], 8, "what lies before that can be reached");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_the_server_gave_up_is_a_gap_behind_which_a_new_base_begins() {
    let cluster =
        managed_by(Cluster::builder().major(16).wal_segsize_mib(1).conf("max_slot_wal_keep_size", "2MB")).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    run(&client, "INSERT INTO t VALUES (1)").await;
    wait_kept(&cluster).await;
    let kept = cluster.text("SELECT pg_current_wal_insert_lsn()").await;
    assert!(agent.stop().await.success());
    run(&client, "INSERT INTO t VALUES (2)").await;
    let lost = cluster.text("SELECT pg_current_wal_insert_lsn()").await;
    for _ in 0..8 {
        cluster.sql("SELECT pg_logical_emit_message(false, '', repeat('x', 900000)); SELECT pg_switch_wal()").await;
    }
    cluster.sql("CHECKPOINT").await;
    let status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'walguard'";
    assert_eq!(cluster.text(status).await, "lost");
    agent.spawn_again();
    agent.wait_streaming(&cluster).await;
    run(&client, "INSERT INTO t VALUES (3)").await;
    wait_kept(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    assert_eq!(crate::archived_wal::catalog(&repo).await.gaps.len(), 1);
    for database in ["a", "b", "c"] {
        cluster.sql(&format!("CREATE DATABASE {database} TEMPLATE template0")).await;
    }
    for to in ["latest", &lost] {
        let refused = restore(&agent, &cluster, "a", &["--to", to]).await.expect(1).stderr();
        assert!(refused.contains("are missing") && refused.contains("HINT: "), "{to}: {refused}");
    }
    assert_eq!(tables(&cluster, "a").await, 0, "nothing was done");
    let told = restore(&agent, &cluster, "b", &["--to", &kept]).await.expect(0).json();
    assert_eq!(told["restore"]["rows_verified"], 1, "what lies before the gap");
    take_base(&agent, "second").await;
    run(&client, "INSERT INTO t VALUES (4)").await;
    wait_kept(&cluster).await;
    let told = restore(&agent, &cluster, "c", &["--to", "latest"]).await.expect(0).json();
    assert_eq!(told["restore"]["rows_verified"], 4, "what lies behind it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_hold_the_database_is_told_what_it_lacks_and_left_as_it_was() {
    let cluster = managed(16).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY)").await;
    // Gone since 17.
    let app_database = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=app");
    run(&connect(&app_database).await, "CREATE EXTENSION adminpack").await;
    let uses = "CREATE VIEW reads AS SELECT pg_catalog.pg_file_write('x', 'y', false) AS bytes;
        CREATE FUNCTION body(n int) RETURNS int LANGUAGE SQL BEGIN ATOMIC SELECT CASE WHEN n > 0 THEN 1 ELSE 2 END; SELECT n; END";
    run(&connect(&app_database).await, uses).await;
    run(&client, "INSERT INTO t VALUES (1)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    let older = Cluster::builder().major(15).start().await;
    let refused = restore(&agent, &older, "postgres", &["--to", "latest"]).await.expect(1).stderr();
    assert!(refused.contains("PostgreSQL 15 is older than 16") && refused.contains("HINT: "), "{refused}");
    let newer = Cluster::builder().major(18).start().await;
    let refused = restore(&agent, &newer, "postgres", &["--to", "latest"]).await.expect(1).stderr();
    let told = "the target's server does not have extension adminpack";
    assert!(refused.contains(told) && refused.contains("HINT: install what brings them"), "{refused}");
    for server in [&older, &newer] {
        assert_eq!(tables(server, "postgres").await, 0, "something was left behind");
    }
    // What needs it is left out if somebody says so, and named.
    newer.sql("CREATE DATABASE part TEMPLATE template0").await;
    let part = restore(&agent, &newer, "part", &["--to", "latest", "--partial"]).await.expect(3).json();
    let not_made = part["restore"]["not_made"].to_string();
    assert!(not_made.contains("CREATE EXTENSION IF NOT EXISTS adminpack") && not_made.contains("reads"), "{part:#}");
    let there = newer.conninfo_of("postgres").replace("dbname=postgres", "dbname=part");
    let there = connect(&there).await;
    let query = "SELECT (SELECT count(*) FROM t) = 1 AND public.body(3) = 3 AND to_regclass('reads') IS NULL \
                 AND to_regnamespace('walguard_rebuild') IS NULL \
                 AND EXISTS (SELECT FROM pg_index WHERE indrelid = 't'::regclass AND indisprimary)";
    assert!(there.query_one(query, &[]).await.unwrap().get::<_, bool>(0), "{part:#}");
    // Mended, the same command does it.
    run(&connect(&app_database).await, "DROP VIEW reads").await;
    run(&connect(&app_database).await, "DROP EXTENSION adminpack").await;
    take_base(&agent, "second").await;
    restore(&agent, &newer, "postgres", &["--to", "latest"]).await.expect(0);
    let again = restore(&agent, &newer, "postgres", &["--to", "latest"]).await.expect(1).stderr();
    assert!(again.contains("is not empty: it has public.t"), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_that_was_begun_is_gone_on_with_however_far_the_log_has_grown_since() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY, pad text); CREATE INDEX ON t (pad); CREATE INDEX ON t (pad, id)")
        .await;
    run(&client, "INSERT INTO t SELECT i, repeat('x', 100) || i FROM generate_series(1, 60000) i").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    run(&client, "UPDATE t SET pad = 'y' || id WHERE id % 3 = 0").await;
    let target = cluster.text("SELECT pg_current_wal_insert_lsn()").await;
    wait_kept(&cluster).await;
    let expected = contents(&client).await;

    let into = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=rebuilt");
    cluster.sql("CREATE DATABASE rebuilt TEMPLATE template0").await;
    let rebuild = |args: &[&str]| {
        let mut command = walguard_command(&[&["restore", "--into", &into], args].concat());
        command.args(agent.flags());
        command
    };
    let finished = |args: &[&str]| tokio::task::block_in_place(|| finish(rebuild(args)));
    let planned = || finished(&["--json", "--dry-run", "--to", &target]).expect(0).json()["plan"]["stop"].clone();
    let stop = planned();

    let mut killed = rebuild(&["--yes", "--to", &target]);
    let mut killed = killed.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let half = connect(&into).await;
    let begun = "SELECT to_regclass('walguard_rebuild.progress') IS NOT NULL";
    while !half.query_one(begun, &[]).await.unwrap().get::<_, bool>(0) {
        assert!(killed.try_wait().unwrap().is_none(), "it ended before its notes were seen");
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(half.query_one(begun, &[]).await.unwrap().get::<_, bool>(0), "it was killed too late");

    run(&client, "DELETE FROM t WHERE id % 7 = 0").await;
    wait_kept(&cluster).await;
    assert_eq!(planned(), stop, "the same target is the same rebuild");
    let other = finished(&["--yes", "--to", "latest"]).expect(1).stderr();
    let stop = stop.as_str().unwrap();
    let hint = format!("--to {stop} --backup first");
    assert!(other.contains("holds another rebuild") && other.contains(&hint), "{other}");
    let told = finished(&["--json", "--yes", "--to", stop, "--backup", "first"]).expect(0).json();
    assert_eq!(told["restore"]["resumed"], true, "{told:#}");
    assert_eq!(contents(&connect(&into).await).await, expected);
}
