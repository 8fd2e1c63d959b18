//! What the tests of managed servers share: a server that gives no WAL away, a role that may not much, and an agent with it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use walguard::detect::incident::Incident;
use walguard::repo::Repository;

use crate::harness::{
    Agent, AgentBuilder, Cluster, ClusterBuilder, Finished, Scratch, client_dir, command, finish, wait_for, walguard,
    walguard_command,
};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// What Supabase's `postgres` is: no superuser, but the owner of the tables.
pub(crate) const ROLE: &str = "CREATE ROLE supa LOGIN REPLICATION CREATEROLE CREATEDB; CREATE DATABASE app OWNER supa;";

/// A server whose WAL is not to be had by the ordinary way, with the role and its database.
pub(crate) async fn managed(major: u32) -> Cluster {
    managed_by(Cluster::builder().major(major)).await
}

/// The same with other settings.
pub(crate) async fn managed_by(builder: ClusterBuilder) -> Cluster {
    let builder = builder.conf("wal_level", "logical").conf("max_prepared_transactions", "5");
    let builder = builder.hba("local replication supa reject").hba("host replication supa 127.0.0.1/32 reject");
    let cluster = builder.start().await;
    for statement in ROLE.split_inclusive(';') {
        cluster.sql(statement).await;
    }
    cluster
}

pub(crate) fn conninfo(cluster: &Cluster) -> String {
    cluster.conninfo_of("supa").replace("dbname=postgres", "dbname=app")
}

pub(crate) async fn app(cluster: &Cluster) -> Client {
    let config = conninfo(cluster) + " application_name=app";
    let (client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

pub(crate) fn agent(cluster: &Cluster, scratch: &Scratch) -> AgentBuilder {
    let builder = Agent::builder(cluster, &scratch.repo_url()).conninfo(&conninfo(cluster));
    builder.settings("source = \"logical\"").arg("--no-backups")
}

pub(crate) async fn run(client: &Client, statements: &str) {
    client.batch_execute(statements).await.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
}

pub(crate) fn status(agent: &Agent) -> serde_json::Value {
    let (flags, http) = (agent.flags(), agent.http());
    let mut args = vec!["status", "--json", "--http", &http];
    args.extend(flags.iter().map(String::as_str));
    walguard(&args).json()["status"].take()
}

pub(crate) fn verb(agent: &Agent, args: &[&str]) -> Finished {
    let flags = agent.flags();
    let mut all = args.to_vec();
    all.extend(flags.iter().map(String::as_str));
    walguard(&all)
}

/// `walguard backup`, with a `pg_dump` that knows every major.
pub(crate) async fn take_base(agent: &Agent, label: &str) {
    let mut backup = walguard_command(&["backup", "--json", "--label", label]);
    backup.args(agent.flags()).env("WALGUARD_PG_BIN_DIR", client_dir());
    tokio::task::spawn_blocking(move || finish(backup).expect(0)).await.unwrap();
}

/// Waits until something is true of the server's catalogs.
pub(crate) async fn wait_sql(client: &Client, what: &str, query: &str) {
    wait_for(what, DEADLINE, || async { client.query_one(query, &[]).await.unwrap().get::<_, bool>(0) }).await;
}

pub(crate) async fn wait_known(agent: &Agent) {
    wait_for("rows to be counted", DEADLINE, || async {
        let status = status(agent);
        status["detect"]["tables"].as_u64() > Some(0) && !status["detect"]["looked_to"].is_null()
    })
    .await;
}

pub(crate) async fn incidents(repo: &Repository) -> Vec<Incident> {
    let found = repo.incidents(None).await.unwrap();
    assert_eq!(found.damaged, []);
    found.incidents
}

pub(crate) async fn wait_incident(repo: &Repository, what: &str, wanted: impl Fn(&Incident) -> bool) -> Incident {
    let begin = Instant::now();
    loop {
        let found = incidents(repo).await;
        if let Some(found) = found.iter().find(|incident| wanted(incident)) {
            return found.clone();
        }
        assert!(begin.elapsed() < DEADLINE, "waited in vain for {what}: {found:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until the slot was told that everything is safe.
pub(crate) async fn wait_kept(cluster: &Cluster) {
    let lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await;
    let query = format!("SELECT confirmed_flush_lsn >= '{lsn}' FROM pg_replication_slots WHERE slot_name = 'walguard'");
    wait_for("the changes to be kept", DEADLINE, || async { cluster.text(&query).await == "t" }).await;
}

/// Everything that a database holds, as `pg_dump` writes it, in an order that does not depend on where rows lie.
pub(crate) fn dump(cluster: &Cluster, database: &str) -> Vec<String> {
    let config = cluster.conninfo_of("postgres").replace("dbname=postgres", &format!("dbname={database}"));
    let mut command = command(cluster.bin("pg_dump"));
    command.args(["--no-publications", "-d", &config]);
    let text = finish(command).expect(0).stdout();
    let is_told =
        |line: &&str| !line.starts_with('\\') && !line.contains("pg_catalog.setval(") && !line.starts_with("--");
    let mut lines: Vec<String> = text.lines().filter(is_told).map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

pub(crate) async fn connect(conninfo: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(conninfo, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// All rows of all tables, in a number for each.
pub(crate) async fn contents(client: &Client) -> BTreeMap<String, String> {
    let tables = "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                  WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'";
    let mut contents = BTreeMap::new();
    for row in client.query(tables, &[]).await.unwrap() {
        let table: String = row.get(0);
        let query = format!(
            "SELECT count(*) || ' ' || coalesce(md5(string_agg(t::text, ';' ORDER BY t::text)), '') FROM ONLY {table} t"
        );
        contents.insert(table, client.query_one(&query, &[]).await.unwrap().get(0));
    }
    contents
}

pub(crate) const MANY_KINDS: &str = "
    CREATE TYPE mood AS ENUM ('calm', 'cross', 'it''s');
    CREATE TABLE kinds (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, mood mood, moods mood[], words text[], doc json,
        docb jsonb, span int4range, big text, amount numeric(12, 4), at timestamptz, took interval, raw bytea, ratio float8,
        twice int GENERATED ALWAYS AS (id * 2) STORED);
    ALTER TABLE kinds ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE whole (a int, b char(5), doc json);
    ALTER TABLE whole REPLICA IDENTITY FULL;
    CREATE TABLE keyed (a text, b int NOT NULL, c text);
    CREATE UNIQUE INDEX keyed_b ON keyed (b);
    ALTER TABLE keyed REPLICA IDENTITY USING INDEX keyed_b;
    CREATE TABLE parts (id int, region int, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
    CREATE TABLE \"Odd \"\"Name\" (\"the key\" serial PRIMARY KEY, part int REFERENCES kinds (id));
    CREATE VIEW calm AS SELECT id FROM kinds WHERE mood = 'calm';
    CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.c := ''by trigger''; RETURN NEW; END';
    CREATE TRIGGER keep BEFORE INSERT ON keyed FOR EACH ROW EXECUTE FUNCTION keep();
    INSERT INTO kinds (mood, moods, words, doc, docb, span, big, amount, at, took, raw, ratio)
      SELECT 'calm', '{calm,it''s}', ARRAY['a,b', 'c\"d', NULL, E'e\\\\f'], '{\"a\": [1,  2]}', '{\"b\": 1}', '[1,5)',
        repeat('x', 20000), i / 7.0, '2025-11-19 08:14:59.123456+02', '1 mon 2 days 03:04:05.6', '\\x00ff', 1.0 / (i + 3)
      FROM generate_series(1, 50) i;
    INSERT INTO whole SELECT i % 5, 'a', '{\"n\": 1}' FROM generate_series(1, 40) i;
    INSERT INTO keyed SELECT 'a', i FROM generate_series(1, 100) i;
    INSERT INTO parts SELECT i, 1 FROM generate_series(1, 100) i;
    INSERT INTO \"Odd \"\"Name\" (part) VALUES (1), (2);";
