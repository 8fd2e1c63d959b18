//! Logical replication tells nothing of definitions: what is found of their changes, and what a rebuild makes of it.

use walguard::detect::DdlKind;

use crate::archived_wal::repository;
use crate::harness::{Agent, Cluster, Finished, Scratch, finish, walguard_command};
use crate::managed::*;

const TABLES: &str = "CREATE TABLE a (id int PRIMARY KEY, n int); CREATE TABLE b (id int PRIMARY KEY); \
                      CREATE TABLE c (id int PRIMARY KEY); INSERT INTO a SELECT i, i FROM generate_series(1, 10) i";

async fn restore(agent: &Agent, server: &Cluster, database: &str, args: &[&str]) -> Finished {
    server.sql(&format!("CREATE DATABASE {database} TEMPLATE template0")).await;
    let into = server.conninfo_of("postgres").replace("dbname=postgres", &format!("dbname={database}"));
    let mut command = walguard_command(&["restore", "--yes", "--json", "--into", &into]);
    command.args(args).args(agent.flags());
    tokio::task::spawn_blocking(move || finish(command)).await.unwrap()
}

/// What the agent saw last of the catalogs, as it keeps it.
fn seen_last(agent: &Agent) -> Option<String> {
    let folder = std::fs::read_dir(agent.spool().join("main")).ok()?;
    let is_it = |name: &str| name.starts_with("definitions-") && name.ends_with(".json");
    let file = folder.flatten().find(|entry| entry.file_name().to_str().is_some_and(is_it))?;
    std::fs::read_to_string(file.path()).ok()
}

async fn wait_looked(agent: &Agent) {
    crate::harness::wait_for("a first look", DEADLINE, || async { seen_last(agent).is_some() }).await;
}

async fn lsn(client: &tokio_postgres::Client) -> String {
    client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_taken_between_a_change_of_a_table_and_the_look_that_finds_it_has_the_change() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, TABLES).await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    wait_looked(&agent).await;
    agent.sigkill();
    run(&client, "ALTER TABLE a DROP COLUMN n, ADD COLUMN m bigint DEFAULT 7; DROP TABLE b").await;
    take_base(&agent, "second").await;
    agent.spawn_again();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    let is_drop = |incident: &walguard::detect::incident::Incident| incident.title.contains("dropped");
    wait_incident(&repo, "the look that finds the change", is_drop).await;
    run(&client, "INSERT INTO a (id) VALUES (11)").await;
    wait_kept(&cluster).await;
    let told = restore(&agent, &cluster, "rebuilt", &["--to", "latest"]).await.expect(0).json();
    assert_eq!((&told["plan"]["base"]["label"], &told["plan"]["notes"]), (&"second".into(), &serde_json::json!([])));
    let rebuilt = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=rebuilt");
    assert_eq!(contents(&connect(&rebuilt).await).await, contents(&client).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_tables_while_no_agent_looks_is_told_by_the_next_one_once() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, TABLES).await;
    let mut first = agent(&cluster, &scratch).spawn();
    first.wait_streaming(&cluster).await;
    take_base(&first, "first").await;
    wait_looked(&first).await;
    first.sigkill();
    run(&client, "DROP TABLE b").await;
    first.spawn_again();
    let repo = repository(&scratch.repo_url()).await;
    let drops = |table: &'static str| {
        move |incident: &walguard::detect::incident::Incident| {
            let named = |name: &str| name.ends_with(&format!(".{table}"));
            incident.ddl.iter().any(|ddl| ddl.kind == DdlKind::DropTable && ddl.table.as_deref().is_some_and(named))
        }
    };
    wait_incident(&repo, "the drop of b", drops("b")).await;
    assert!(first.stop().await.success());

    // On another machine there is only the base to compare with: that has `b`, which is told once more, and `c`.
    run(&client, "DROP TABLE c").await;
    let mut second = agent(&cluster, &scratch).spawn();
    second.wait_streaming(&cluster).await;
    wait_incident(&repo, "the drop of c", drops("c")).await;

    // An agent that begins anew tells nothing that was told before.
    let told = incidents(&repo).await.len();
    assert!(second.stop().await.success());
    second.spawn_again();
    second.wait_streaming(&cluster).await;
    run(&client, "DROP TABLE a").await;
    wait_incident(&repo, "the drop of a", drops("a")).await;
    assert!(incidents(&repo).await.len() <= told + 1, "{:#?}", incidents(&repo).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_between_which_moments_definitions_changed_and_what_the_guard_saw_of_it() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, TABLES).await;
    let superuser = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=app");
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    crate::harness::walguard(&["guard", "install", "--pg", &superuser]).expect(0);
    take_base(&agent, "first").await;
    wait_looked(&agent).await;

    // What rows do not depend on is rebuilt as it was in the base, and that is said.
    run(&client, "CREATE INDEX a_n ON a (n)").await;
    run(&client, "INSERT INTO a VALUES (20, 20)").await;
    let before = lsn(&client).await;
    run(&client, "ALTER TABLE a ADD COLUMN m int").await;
    let is_found = || async { seen_last(&agent).is_some_and(|text| text.contains("\"m\"")) };
    crate::harness::wait_for("the column to be found", DEADLINE, is_found).await;
    run(&client, "INSERT INTO a VALUES (21, 21, 21)").await;
    wait_kept(&cluster).await;
    let told = restore(&agent, &cluster, "before", &["--to", &before]).await.expect(0).json();
    let notes = told["plan"]["notes"].to_string();
    for wanted in ["CREATE INDEX (index public.a_n)", "table public.a was changed between", "around the target"] {
        assert!(notes.contains(wanted), "{wanted} is not in {notes}");
    }
    let refused = restore(&agent, &cluster, "behind", &["--to", "latest"]).await.expect(1).stderr();
    assert!(
        refused.contains("table public.a was changed between 20") && refused.contains("after base first"),
        "{refused}"
    );
    take_base(&agent, "second").await;
    let told = restore(&agent, &cluster, "behind_2", &["--to", "latest"]).await.expect(0).json();
    assert_eq!(told["plan"]["base"]["label"], "second");

    // Rows may depend on a type.
    run(&client, "CREATE TYPE mood AS ENUM ('calm')").await;
    let into = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=nowhere");
    let refused = || async { verb(&agent, &["restore", "--dry-run", "--to", "latest", "--into", &into]).stderr() };
    let is_refused = || async { refused().await.contains("types, values of types changed between 20") };
    crate::harness::wait_for("the type to be found", DEADLINE, is_refused).await;
}
