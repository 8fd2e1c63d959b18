//! A real server is wiped in several ways; the agent says what, how much, who and since when, once, and nothing else.

use std::time::Duration;

use tokio_postgres::Client;
use walguard::detect::incident::{Incident, Rows, State};
use walguard::detect::{RuleName, Severity, WhoSource};
use walguard::repo::Repository;

use crate::archived_wal::repository;
use crate::harness::{Agent, Cluster, Scratch, wait_for, walguard, walguard_command};

const DEADLINE: Duration = Duration::from_secs(60);

/// A server with an agent that knows its tables' rows.
async fn watched(major: u32, tables: &str) -> (Scratch, Cluster, Agent, Repository) {
    let scratch = Scratch::new();
    let cluster = Cluster::builder().major(major).start().await;
    cluster.sql(tables).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    wait_known(&agent).await;
    (scratch, cluster, agent, repo)
}

/// Waits until the agent watches, and rows are counted.
async fn wait_known(agent: &Agent) {
    wait_for("rows to be counted", DEADLINE, || async {
        let status = status(agent);
        status["detect"]["tables"].as_u64() > Some(0) && !status["detect"]["looked_to"].is_null()
    })
    .await;
}

fn status(agent: &Agent) -> serde_json::Value {
    let (flags, http) = (agent.flags(), agent.http());
    let mut args = vec!["status", "--json", "--http", &http];
    args.extend(flags.iter().map(String::as_str));
    walguard(&args).json()["status"].take()
}

async fn incidents(repo: &Repository) -> Vec<Incident> {
    let found = repo.incidents(None).await.unwrap();
    assert_eq!(found.damaged, []);
    found.incidents
}

/// Waits for an incident that is as wanted.
async fn wait_incident(repo: &Repository, what: &str, wanted: impl Fn(&Incident) -> bool) -> Incident {
    wait_for(what, DEADLINE, || async { incidents(repo).await.iter().any(&wanted) }).await;
    incidents(repo).await.into_iter().find(wanted).unwrap()
}

async fn session(cluster: &Cluster, name: &str) -> Client {
    let config = format!("{} application_name={name}", cluster.conninfo_of("postgres"));
    let (client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// What lets the agent count, and not only read the server's estimates.
const MAY_COUNT: &str = "GRANT pg_read_all_data TO walguard;";

#[tokio::test(flavor = "multi_thread")]
async fn eighteen_small_tables_emptied_after_their_triggers_were_dropped_are_one_incident() {
    let mut triggers =
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''kept''; END';".to_owned();
    for n in 1..=18 {
        triggers += &format!(
            "CREATE TABLE t{n} (id int); INSERT INTO t{n} SELECT generate_series(1, {n}); \
             CREATE TRIGGER keep BEFORE TRUNCATE ON t{n} EXECUTE FUNCTION keep();"
        );
    }
    // With the least privileges, by estimates; and exactly.
    for (major, exact) in [(15, false), (17, true)] {
        let tables = if exact { format!("{MAY_COUNT} {triggers}") } else { triggers.clone() };
        let (_scratch, cluster, mut agent, repo) = watched(major, &tables).await;
        let client = session(&cluster, "cleanup").await;
        for n in 1..=18 {
            client.batch_execute(&format!("DROP TRIGGER keep ON t{n}")).await.unwrap();
        }
        let warned = wait_incident(&repo, "the triggers", |incident| !incident.ddl.is_empty()).await;
        assert_eq!((warned.tables.len(), warned.severity), (0, Severity::Warning), "before the first row is gone");
        for n in 1..=18 {
            client.batch_execute(&format!("DELETE FROM t{n}")).await.unwrap();
        }
        let found = wait_incident(&repo, "the wipe", |incident| incident.tables.len() == 18).await;
        assert_eq!(found.id, warned.id);
        assert_eq!((found.state, found.severity), (State::Committed, Severity::Critical));
        assert_eq!(found.rows_lost(), 18 * 19 / 2);
        for n in 1..=18 {
            let name = format!("postgres.public.t{n}");
            let table = found.tables.iter().find(|table| table.name == name).unwrap();
            // By estimates, unless the agent saw in the WAL how the table was made: then it knows better.
            let is = |rows: Option<Rows>, count| rows.is_some_and(|rows| rows.count == count && (rows.exact || !exact));
            let (before, after) = (is(table.before, n), is(table.after, 0));
            assert!(before && after && table.deleted == n, "{name} on {major}: {table:?}");
        }
        let dropped = found.findings.iter().filter(|finding| finding.rule == RuleName::TriggerRemoved).count();
        assert_eq!((dropped, found.transactions.len()), (18, 36));
        assert!(found.first_harm.unwrap() < found.first_loss.unwrap());
        let seen = wait_incident(&repo, "who it was", |incident| {
            incident.who().is_some_and(|who| who.source >= WhoSource::Nearby)
        })
        .await;
        assert_eq!(seen.who().unwrap().actor.application.as_deref(), Some("cleanup"), "{:?}", seen.who());

        // The next agent reads the same WAL, and tells nothing twice.
        agent.sigkill();
        agent.spawn_again();
        agent.wait_streaming(&cluster).await;
        wait_known(&agent).await;
        client.batch_execute("CREATE TABLE later AS SELECT generate_series(1, 50) AS n").await.unwrap();
        client.batch_execute("TRUNCATE later").await.unwrap();
        let later = wait_incident(&repo, "what comes later", |incident| {
            incident.tables.iter().any(|table| table.name == "postgres.public.later")
        })
        .await;
        assert!(later.tables.iter().any(|table| table.truncated));
        let of_wipe =
            incidents(&repo).await.iter().filter(|i| i.tables.iter().any(|t| t.name.ends_with(".t7"))).count();
        assert_eq!(of_wipe, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wipe_is_told_while_it_is_open_answered_and_reported() {
    let tables = format!("{MAY_COUNT} CREATE TABLE t AS SELECT generate_series(1, 20000) AS n");
    let (scratch, cluster, agent, repo) = watched(18, &tables).await;
    let client = session(&cluster, "mistake").await;
    client.batch_execute("BEGIN; DELETE FROM t WHERE n <= 15000").await.unwrap();
    let suspicion = wait_incident(&repo, "the suspicion", |incident| incident.state == State::Open).await;
    assert!(suspicion.title.starts_with("not committed yet: "), "{}", suspicion.title);
    assert_eq!(suspicion.first_harm, None);
    wait_incident(&repo, "who it is", |incident| {
        incident.who().is_some_and(|who| who.source == WhoSource::Activity) && incident.state == State::Open
    })
    .await;
    client.batch_execute("COMMIT").await.unwrap();
    let committed = wait_incident(&repo, "the commit", |incident| incident.state == State::Committed).await;
    assert_eq!(committed.id, suspicion.id);
    assert_eq!(committed.tables[0].after, Some(Rows { count: 5_000, exact: true }), "{:?}", committed.tables);
    let who = committed.who().unwrap();
    assert_eq!((who.source, who.actor.application.as_deref()), (WhoSource::Activity, Some("mistake")));

    assert!(status(&agent)["alarms"]["incident"]["text"].as_str().unwrap().contains("postgres.public.t"));
    let place = ["--repo", &scratch.repo_url(), "--cluster", "main"];
    let run = |args: &[&str], code| {
        let mut all = args.to_vec();
        all.extend(place);
        walguard(&all).expect(code).stdout()
    };
    assert!(run(&["incidents"], 0).contains(&committed.id));
    let shown = run(&["incidents", "show", "last"], 0);
    assert!(shown.contains("15,000 of 20,000 rows deleted") && shown.contains("mistake"), "{shown}");
    let report = run(&["incidents", "report", &committed.id], 0);
    assert!(report.contains(&format!("--to before:{}", committed.id)), "{report}");
    run(&["incidents", "ack", "last", "--by", "ada", "--note", "on it"], 0);
    wait_for("the alarm to be over", DEADLINE, || async { status(&agent)["alarms"]["incident"].is_null() }).await;
    run(&["incidents", "resolve", "last", "--by", "ada"], 0);
    run(&["incidents", "ack", "last", "--by", "bob"], 2);
    assert!(run(&["incidents"], 0).contains("no incidents"));
    run(&["incidents", "show", "00000001-00000000000000AA"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspicion_is_over_when_the_server_dies_before_the_commit() {
    let tables = format!("{MAY_COUNT} CREATE TABLE t AS SELECT generate_series(1, 20000) AS n");
    let (_scratch, mut cluster, _agent, repo) = watched(17, &tables).await;
    let client = session(&cluster, "mistake").await;
    client.batch_execute("BEGIN; DELETE FROM t WHERE n <= 15000").await.unwrap();
    let suspicion = wait_incident(&repo, "the suspicion", |incident| incident.state == State::Open).await;
    cluster.kill9().await;
    cluster.start().await;
    // What is open is written down with a checkpoint, once something was done before it.
    cluster.sql("INSERT INTO t VALUES (0)").await;
    cluster.sql("CHECKPOINT").await;
    let over = wait_incident(&repo, "the end of it", |incident| incident.state == State::Aborted).await;
    assert_eq!(over.id, suspicion.id);
    assert!(over.title.starts_with("rolled back: "), "{}", over.title);
    assert_eq!(cluster.number("SELECT count(*) FROM t").await, 20_001);
    assert!(over.moments.iter().any(|moment| moment.text.contains("gone without a commit")), "{:?}", over.moments);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_looks_alike_is_no_incident_and_a_silence_is_kept() {
    let tables = "GRANT pg_read_all_data TO walguard; CREATE TABLE w AS SELECT generate_series(1, 700) AS n; \
        CREATE TABLE t AS SELECT generate_series(1, 2000) AS n; CREATE TABLE empty (n int); \
        CREATE MATERIALIZED VIEW v AS SELECT n FROM t; CREATE UNLOGGED TABLE u AS SELECT generate_series(1, 500) AS n; \
        CREATE INDEX ON t (n); CREATE TABLE queue (n int); CREATE TABLE spare AS SELECT generate_series(1, 90) AS n;";
    let (scratch, cluster, _agent, repo) = watched(16, tables).await;
    let client = session(&cluster, "upkeep").await;
    for statement in [
        "VACUUM FULL t",
        "CLUSTER t USING t_n_idx",
        "REINDEX TABLE CONCURRENTLY t",
        "ALTER TABLE w ALTER n TYPE bigint",
        "REFRESH MATERIALIZED VIEW v",
        "TRUNCATE empty",
        "TRUNCATE u",
        "DROP TABLE u",
        "CREATE TEMP TABLE x AS SELECT generate_series(1, 500) AS n",
        "TRUNCATE x",
        "DROP TABLE x",
        "UPDATE t SET n = n WHERE n < 900",
        "DELETE FROM t WHERE n < 100",
        "INSERT INTO queue SELECT generate_series(1, 300)",
        "BEGIN; DELETE FROM t; ROLLBACK",
        "BEGIN; DELETE FROM t; INSERT INTO t SELECT generate_series(100, 2000); COMMIT",
    ] {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    walguard_command(&["silence", "--for", "10m", "--reason", "cleaning", "--table", "spare", "--by", "ada"])
        .args(["--repo", &scratch.repo_url(), "--cluster", "main"])
        .status()
        .unwrap();
    tokio::time::sleep(Duration::from_secs(7)).await; // the agent looks for silences every five seconds
    cluster.sql("DELETE FROM spare; DROP TABLE t CASCADE").await;
    let dropped = wait_incident(&repo, "the drop", |i| i.tables.iter().any(|table| table.dropped)).await;
    let told: Vec<_> =
        incidents(&repo).await.into_iter().filter(|incident| incident.severity > Severity::Info).collect();
    let titles: Vec<_> = told.iter().map(|incident| incident.title.as_str()).collect();
    assert!(told.iter().all(|incident| incident.id == dropped.id || incident.state == State::Aborted), "{titles:?}");
    assert!(dropped.is_told(), "only a part of it is silenced");
    let spare =
        dropped.findings.iter().find(|finding| finding.table.as_deref() == Some("postgres.public.spare")).unwrap();
    assert!(spare.silenced);
    assert_eq!(dropped.tables.iter().find(|table| table.dropped).unwrap().before.map(|rows| rows.count), Some(1_901));
}
