//! What follows an incident, through the whole agent: its rows are saved and can be put back by the report's own command,
//! its session is ended where a rule asks for that, and the guard's word is compared with what was seen.

use std::time::Duration;

use walguard::detect::incident::Incident;
use walguard::detect::{State, WhoSource};

use crate::archived_wal::repository;
use crate::harness::webhook::Webhook;
use crate::harness::{Agent, Cluster, Finished, Scratch, command, finish, program, wait_for, walguard};
use crate::replays::wait_watching;

const DEADLINE: Duration = Duration::from_secs(60);

/// A shell in which `walguard` and PostgreSQL's programs can be called by name, as the user that PostgreSQL runs as.
pub(crate) fn shell(line: &str, cluster: &Cluster, scratch: &Scratch) -> Finished {
    let bin = scratch.dir("bin");
    let link = bin.join("walguard");
    if !link.exists() {
        std::os::unix::fs::symlink(program(), &link).unwrap();
    }
    let mut shell = command("/bin/sh");
    for (name, _) in std::env::vars_os() {
        if ["WALGUARD_", "PG", "AWS_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            shell.env_remove(name);
        }
    }
    let psql = cluster.bin("psql");
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{}:{path}", bin.display(), psql.parent().unwrap().display()));
    shell.env("WALGUARD_PG_BIN_DIR", cluster.bin_dir());
    shell.env("PGHOST", "127.0.0.1").env("PGPORT", cluster.port().to_string()).env("PGUSER", "postgres");
    shell.args(["-c", line]);
    finish(shell)
}

async fn incidents(url: &str) -> Vec<Incident> {
    repository(url).await.incidents(None).await.unwrap().incidents
}

/// Waits for the incident that is like this.
async fn wait_incident(url: &str, what: &str, is_meant: impl Fn(&Incident) -> bool) -> Incident {
    let find = async || incidents(url).await.into_iter().find(|incident| is_meant(incident));
    wait_for(what, DEADLINE, || async { find().await.is_some() }).await;
    find().await.unwrap()
}

async fn watching(cluster: &Cluster, url: &str, settings: &str) -> Agent {
    let settings = format!("[backup]\ninterval = \"0s\"\n{settings}");
    let mut agent = Agent::builder(cluster, url).settings(&settings).arg("--no-backups").spawn();
    agent.wait_streaming(cluster).await;
    wait_watching(&agent, cluster).await;
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_rows_come_back_by_the_command_of_the_report() {
    let cluster = Cluster::builder().start().await;
    cluster
        .sql(
            "GRANT pg_read_all_data TO walguard; \
             CREATE TABLE users (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, note text, twice int \
             GENERATED ALWAYS AS (length(name) * 2) STORED); \
             CREATE TABLE games (id int PRIMARY KEY, owner int REFERENCES users); \
             INSERT INTO users (name, note) SELECT 'user ' || i, CASE i % 4 WHEN 0 THEN NULL WHEN 1 THEN '' \
             WHEN 2 THEN E'a\\tb\\n\\\\.\\n\"c\"' ELSE 'plain, text' END FROM generate_series(1, 40) i; \
             INSERT INTO games SELECT i, i FROM generate_series(1, 12) i",
        )
        .await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let agent = watching(&cluster, &url, "[flashback]\nevidence = true\nwindow = \"10s\"").await;
    let content = "SELECT md5(string_agg(t::text, ',' ORDER BY t::text)) FROM \
                   (SELECT users::text AS t FROM users UNION ALL SELECT games::text FROM games) x";
    let before = cluster.text(content).await;
    wait_for("a snapshot of the window", DEADLINE, || async {
        let held = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%flashback%' AND \
                    state = 'idle in transaction' AND backend_xmin IS NOT NULL";
        cluster.number(held).await > 0
    })
    .await;
    cluster.sql("DELETE FROM games").await;
    cluster.sql("DELETE FROM users").await;
    let incident = wait_incident(&url, "the rows beside the incident", |incident| incident.evidence.len() == 2).await;
    assert_eq!(incident.evidence.iter().map(|saved| saved.rows).sum::<u64>(), 52, "{:?}", incident.evidence);

    let flags = agent.flags();
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    let report = walguard(&[&["incidents", "report", "last"], words.as_slice()].concat()).expect(0).stdout();
    let line =
        report.lines().find(|line| line.starts_with("walguard incidents rows ")).unwrap_or_else(|| panic!("{report}"));
    shell(line, &cluster, &scratch).expect(0);
    assert_eq!(cluster.text(content).await, before, "every value is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_delete_is_ended_before_it_commits_and_nothing_is_lost() {
    let cluster = Cluster::builder().start().await;
    cluster
        .sql(
            "GRANT pg_signal_backend TO walguard; CREATE ROLE app LOGIN; \
             CREATE TABLE t AS SELECT generate_series(1, 1000) AS id; ALTER TABLE t OWNER TO app; ANALYZE",
        )
        .await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let url = scratch.repo_url();
    let settings = format!("[detect]\nbreaker = \"terminate\"\n{}", receiver.settings());
    let _agent = watching(&cluster, &url, &settings).await;
    let app = cluster.try_client("app").await.unwrap();
    // Slow rows: a minute, if nobody ends it.
    let ended = app.batch_execute("DELETE FROM t WHERE pg_sleep(0.06) IS NOT NULL").await.unwrap_err();
    let code = ended.code().map(|code| code.code().to_owned());
    assert!(ended.is_closed() || code.as_deref() == Some("57P01"), "{ended:?}");
    assert_eq!(cluster.number("SELECT count(*) FROM t").await, 1000);
    let incident = wait_incident(&url, "the incident to know what came of it", |incident| {
        incident.state == State::Aborted && incident.actions.iter().any(|action| action.aborted == Some(true))
    })
    .await;
    assert_eq!(incident.actions.len(), 1, "{:?}", incident.actions);
    assert_eq!(incident.actions[0].outcome, "terminated");
    assert!(incident.title.starts_with("rolled back: "), "{}", incident.title);
    assert_eq!(incident.first_harm, None, "there is nothing to go back to");
    let told = receiver.wait("the good news", |told| told.text("event") == "aborted").await;
    assert!(told.text("text").contains("nothing was lost") && !told.text("text").contains("walguard restore"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guards_word_is_compared_with_the_session_that_was_seen() {
    let cluster = Cluster::builder().start().await;
    cluster
        .sql(
            "CREATE ROLE app LOGIN SUPERUSER; CREATE TABLE guarded AS SELECT generate_series(1, 500) AS id; \
             CREATE TABLE bare AS SELECT generate_series(1, 500) AS id; ANALYZE",
        )
        .await;
    let pg = cluster.conninfo_of("postgres");
    walguard(&["guard", "install", "--exclude", "bare", "--pg", &pg]).expect(0);
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let _agent = watching(&cluster, &url, "").await;
    let is_about = |incident: &Incident, table: &str| {
        incident.state == State::Committed && incident.tables.iter().any(|damage| damage.name.ends_with(table))
    };

    let honest = cluster.try_client("app").await.unwrap();
    honest.batch_execute("BEGIN; DELETE FROM guarded; SELECT pg_sleep(2); COMMIT").await.unwrap();
    let incident = wait_incident(&url, "the guarded incident", |incident| is_about(incident, ".guarded")).await;
    let who = incident.who().unwrap();
    assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Guard, Some("app")));
    assert!(who.note.as_deref().is_some_and(|note| note.contains("the agent saw the same session")), "{who:?}");

    // Whoever can run SQL can write such a message, and name another.
    let forged = r#"{"v":1,"role":"innocent","pid":1,"query":"none","what":{"op":"delete","table":"bare","rows":500}}"#;
    let liar = cluster.try_client("app").await.unwrap();
    let pid: i32 = liar.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let sql = format!(
        "BEGIN; DELETE FROM bare; SELECT pg_logical_emit_message(true, 'walguard', '{forged}'); SELECT pg_sleep(2); COMMIT"
    );
    liar.batch_execute(&sql).await.unwrap();
    let incident = wait_incident(&url, "the forged incident", |incident| is_about(incident, ".bare")).await;
    let its = incident.transactions.iter().find(|transaction| transaction.who.actor.pid == Some(pid));
    let who = &its.unwrap_or_else(|| panic!("{:?}", incident.transactions)).who;
    assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Activity, Some("app")));
    let note = who.note.as_deref().unwrap_or_default();
    assert!(note.contains("role innocent") && note.contains("forged"), "{note}");
}
