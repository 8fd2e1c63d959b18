//! Both incidents that walguard was made for, replayed: one incident each, with every table, the right counts, and who did
//! it; told before it is too late, and once; and undone by whoever does what the alarm says and knows nothing else.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use walguard::detect::incident::{Incident, Rows};
use walguard::detect::{RuleName, Severity, State, WhoSource};
use walguard::repo::Repository;

use crate::aftermath::shell;
use crate::archived_wal::{repository, status};
use crate::harness::webhook::Webhook;
use crate::harness::{Agent, Cluster, Fault, S3, Scratch, wait_for, walguard};

const DEADLINE: Duration = Duration::from_secs(60);

/// Small tables of a game, as many as were wiped, with a few rows each.
fn game_tables() -> Vec<(String, u64)> {
    (1..=18_u64).map(|n| (format!("game_{n:02}"), [24, 12, 5, 7, 56, 2][n as usize % 6])).collect()
}

/// An agent that watches `cluster` and tells `receiver`, ready for what comes.
async fn watching(cluster: &Cluster, url: &str, receiver: &Webhook, restore_dir: &Path) -> Agent {
    let settings = format!(
        "[backup]\ninterval = \"0s\"\n[restore]\ntarget_dir = \"{}\"\n{}",
        restore_dir.display(),
        receiver.settings()
    );
    let mut agent = Agent::builder(cluster, url).settings(&settings).spawn();
    agent.wait_streaming(cluster).await;
    wait_watching(&agent, cluster).await;
    agent
}

/// Waits until the agent knows how many rows each table has and sees who is at work, as it does within a second.
pub(crate) async fn wait_watching(agent: &Agent, cluster: &Cluster) {
    wait_scanned(agent, cluster).await;
    let tables = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relpersistence = 'p' AND oid >= 16384";
    let tables = u64::try_from(cluster.number(tables).await).unwrap();
    wait_for("the watch", DEADLINE, || async {
        let status = status(agent).await;
        status["who"]["watching"] == true
            && status["detect"]["watching"] == true
            && status["detect"]["tables"].as_u64() >= Some(tables)
    })
    .await;
}

/// Waits until the agent has read everything that was committed.
pub(crate) async fn wait_scanned(agent: &Agent, cluster: &Cluster) {
    cluster.sql("SELECT pg_logical_emit_message(true, 'mark', '')").await;
    let lsn: walguard::pg::Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    wait_for(&format!("the WAL up to {lsn} to be understood"), DEADLINE, || async {
        let status = status(agent).await;
        let scanned = status["scan"]["position"]["lsn"].as_str().and_then(|lsn| lsn.parse().ok());
        scanned >= Some(lsn)
    })
    .await;
}

/// A base backup, as there is one long before anything happens.
fn back_up(agent: &Agent) {
    let flags = agent.flags();
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup"], words.as_slice()].concat()).expect(0);
}

/// A server that an alarm's commands left running. Ends with this value.
struct Brought {
    pid: Pid,
    client: tokio_postgres::Client,
}

impl Drop for Brought {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::QUIT); // its directory goes next
    }
}

/// Does what the alarm's text says, word for word: looks at the plan, restores, and connects as the restore says at its end.
async fn do_what_it_says(text: &str, cluster: &Cluster, scratch: &Scratch) -> Brought {
    let commands: Vec<&str> =
        text.lines().map(str::trim).filter(|line| line.starts_with("walguard restore ")).collect();
    let [plan, restore] = commands.as_slice() else { panic!("{text}") };
    let plan = shell(plan, cluster, scratch).expect(0).stdout();
    assert!(plan.contains("first lost") && plan.contains("into"), "{plan}");
    assert_eq!(fs::read_dir(scratch.join("restored")).unwrap().count(), 0, "looking writes nothing");
    let said = shell(restore, cluster, scratch).expect(0).stdout();
    let words_of = |name: &str| -> Vec<String> {
        let line = said.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_else(|| panic!("{said}"));
        line.split_whitespace().map(|word| word.trim_end_matches(',').to_owned()).collect()
    };
    let pid = words_of("server").iter().find_map(|word| word.parse().ok()).and_then(Pid::from_raw).unwrap();
    // psql -h SOCKETS -p PORT -U ROLE DATABASE; the role of the backup may not read the tables, the superuser may.
    let psql = words_of("look at it");
    let behind = |flag: &str| psql.iter().skip_while(|word| *word != flag).nth(1).unwrap().clone();
    let mut config = tokio_postgres::Config::new();
    config.host_path(behind("-h")).port(behind("-p").parse().unwrap()).user("postgres").dbname("postgres");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    Brought { pid, client }
}

impl Brought {
    async fn number(&self, query: &str) -> i64 {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }
}

async fn incidents(url: &str) -> Vec<Incident> {
    repository(url).await.incidents(None).await.unwrap().incidents
}

/// A session of the application's role.
async fn application(cluster: &Cluster, name: &str) -> tokio_postgres::Client {
    let conninfo = format!("{} application_name={name}", cluster.conninfo_of("app"));
    let (client, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn eighteen_small_tables_emptied_after_their_triggers_were_dropped_are_one_incident_told_before_a_row_is_gone() {
    let cluster = Cluster::builder().start().await;
    cluster
        .sql(
            "CREATE ROLE app LOGIN; CREATE SCHEMA game AUTHORIZATION app; \
             CREATE FUNCTION game.refuse() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN RAISE 'protected'; END $$; ALTER FUNCTION game.refuse OWNER TO app",
        )
        .await;
    for (table, rows) in game_tables() {
        cluster
            .sql(&format!(
                "CREATE TABLE game.{table} (id int PRIMARY KEY, note text); ALTER TABLE game.{table} OWNER TO app; \
                 INSERT INTO game.{table} SELECT i, 'note ' || i FROM generate_series(1, {rows}) i; \
                 CREATE TRIGGER protect BEFORE TRUNCATE ON game.{table} EXECUTE FUNCTION game.refuse()"
            ))
            .await;
    }
    cluster.sql("ANALYZE").await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let url = scratch.repo_url();
    let mut agent = watching(&cluster, &url, &receiver, &scratch.dir("restored")).await;
    back_up(&agent);
    cluster.sql("INSERT INTO game.game_01 VALUES (1000, 'the last good commit')").await;

    let app = application(&cluster, "migrate.py").await;
    for (table, _) in game_tables() {
        app.batch_execute(&format!("DROP TRIGGER protect ON game.{table}")).await.unwrap();
    }
    // The alarm is there, and no row is gone.
    let first = receiver.wait("the alarm about the triggers", |told| told.text("title").contains("trigger")).await;
    assert!(cluster.number("SELECT count(*) FROM game.game_01").await > 0);
    assert_eq!(first.body["rows_lost"], 0, "{}", first.body);

    for (table, _) in game_tables() {
        app.batch_execute(&format!("DELETE FROM game.{table}")).await.unwrap();
    }
    let all = game_tables().iter().map(|(_, rows)| rows).sum::<u64>() + 1;
    let alarm = receiver
        .wait("the alarm about all tables", |told| told.body["tables"].as_array().is_some_and(|t| t.len() == 18))
        .await;
    let brought = do_what_it_says(alarm.text("text"), &cluster, &scratch).await;
    for (table, rows) in game_tables() {
        let rows = if table == "game_01" { rows + 1 } else { rows };
        assert_eq!(brought.number(&format!("SELECT count(*) FROM game.{table}")).await, rows as i64, "{table}");
    }
    let triggers = "SELECT count(*) FROM pg_trigger WHERE tgname = 'protect'";
    assert_eq!(
        (brought.number(triggers).await, cluster.number(triggers).await),
        (18, 0),
        "the protection is back, too"
    );
    drop(brought);
    let found = incidents(&url).await;
    assert_eq!(found.len(), 1, "{:?}", found.iter().map(|i| (&i.id, &i.title)).collect::<Vec<_>>());
    let incident = &found[0];
    assert_eq!((incident.state, incident.severity), (State::Committed, Severity::Critical));
    for (table, rows) in game_tables() {
        let rows = if table == "game_01" { rows + 1 } else { rows };
        let name = format!("postgres.game.{table}");
        let damage = incident.tables.iter().find(|damage| damage.name == name).unwrap_or_else(|| panic!("{name}"));
        let count = |rows: Option<Rows>| rows.map(|rows| rows.count);
        assert_eq!((damage.deleted, count(damage.before), count(damage.after)), (rows, Some(rows), Some(0)), "{name}");
    }
    assert_eq!(incident.ddl.len(), 18, "each trigger that was dropped");
    assert!(incident.first_harm < incident.first_loss);
    let who = &incident.transactions.iter().find(|t| t.deleted > 0).unwrap().who;
    assert!(who.source >= WhoSource::Nearby, "{who:?}");
    assert_eq!(who.actor.role.as_deref(), Some("app"), "{who:?}");
    assert_eq!(who.actor.application.as_deref(), Some("migrate.py"));
    assert_eq!(all, incident.tables.iter().map(|damage| damage.deleted).sum::<u64>());
    // Read again from the beginning, it is still one, and nobody is told anew.
    let told = receiver.told().len();
    agent.sigkill();
    agent.spawn_again();
    agent.wait_streaming(&cluster).await;
    wait_scanned(&agent, &cluster).await;
    assert_eq!(incidents(&url).await.len(), 1);
    assert_eq!(receiver.told().len(), told, "{:?}", receiver.told());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_emptied_with_its_migration_history_is_one_incident_that_names_both() {
    let cluster = Cluster::builder().major(17).start().await;
    cluster
        .sql(
            "CREATE ROLE app LOGIN SUPERUSER; CREATE SCHEMA supabase_migrations; \
             CREATE TABLE supabase_migrations.schema_migrations (version text PRIMARY KEY, name text); \
             INSERT INTO supabase_migrations.schema_migrations SELECT '2025' || i, 'm' FROM generate_series(1001, 1011) i; \
             CREATE TABLE profiles (id int PRIMARY KEY); INSERT INTO profiles VALUES (1), (2); \
             CREATE TABLE audio_tracks (id int PRIMARY KEY, owner int REFERENCES profiles ON DELETE CASCADE); \
             INSERT INTO audio_tracks SELECT i, 1 + i % 2 FROM generate_series(1, 56) i; \
             CREATE TABLE vision_versions (id int); INSERT INTO vision_versions VALUES (1), (2); ANALYZE",
        )
        .await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let url = scratch.repo_url();
    let agent = watching(&cluster, &url, &receiver, &scratch.dir("restored")).await;
    back_up(&agent);
    cluster.sql("INSERT INTO profiles VALUES (3)").await;
    let app = application(&cluster, "supabase").await;
    for statement in [
        "TRUNCATE vision_versions",
        "DELETE FROM profiles",
        "BEGIN; DELETE FROM supabase_migrations.schema_migrations; \
         INSERT INTO supabase_migrations.schema_migrations VALUES ('20251119', 'remote_schema'); COMMIT",
    ] {
        app.batch_execute(statement).await.unwrap();
    }
    let alarm = receiver
        .wait("the alarm about all tables", |told| told.body["tables"].as_array().is_some_and(|t| t.len() == 4))
        .await;
    let brought = do_what_it_says(alarm.text("text"), &cluster, &scratch).await;
    for (table, rows) in
        [("profiles", 3), ("audio_tracks", 56), ("vision_versions", 2), ("supabase_migrations.schema_migrations", 11)]
    {
        assert_eq!(brought.number(&format!("SELECT count(*) FROM {table}")).await, rows, "{table}");
    }
    drop(brought);
    let found = incidents(&url).await;
    assert_eq!(found.len(), 1, "{:?}", found.iter().map(|i| (&i.id, &i.title)).collect::<Vec<_>>());
    let incident = &found[0];
    let after = |name: &str| {
        let damage = incident.tables.iter().find(|damage| damage.name == name).unwrap_or_else(|| panic!("{name}"));
        (damage.before.map(|rows| rows.count), damage.after.map(|rows| rows.count))
    };
    assert_eq!(after("postgres.public.profiles"), (Some(3), Some(0)));
    assert_eq!(after("postgres.public.audio_tracks"), (Some(56), Some(0)));
    assert_eq!(after("postgres.public.vision_versions"), (Some(2), Some(0)));
    assert_eq!(after("postgres.supabase_migrations.schema_migrations"), (Some(11), Some(1)));
    let rules: Vec<RuleName> = incident.findings.iter().map(|finding| finding.rule).collect();
    assert!(rules.contains(&RuleName::MigrationHistory), "{rules:?}");
    assert_eq!(incident.severity, Severity::Critical);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_that_could_not_be_told_is_told_once_and_says_that_it_is_late() {
    let cluster = Cluster::builder().start().await;
    cluster.sql("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 500); ANALYZE").await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let url = scratch.repo_url();
    let mut agent = watching(&cluster, &url, &receiver, &scratch.dir("restored")).await;
    receiver.set_away(true);
    cluster.sql("DELETE FROM t").await;
    wait_for("the incident", DEADLINE, || async { !incidents(&url).await.is_empty() }).await;
    // Killed between detection and notification, while nobody can be told.
    agent.sigkill();
    receiver.set_away(false);
    agent.spawn_again();
    receiver.wait("the alarm", |told| told.text("title").contains("emptied")).await;
    agent.wait_streaming(&cluster).await;
    wait_scanned(&agent, &cluster).await;
    agent.sigkill();
    agent.spawn_again();
    agent.wait_streaming(&cluster).await;
    wait_scanned(&agent, &cluster).await;
    assert_eq!(incidents(&url).await.len(), 1);
    assert_eq!(receiver.told().len(), 1, "{:?}", receiver.told());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_does_not_wait_for_a_repository_that_is_away_and_is_told_once_whatever_dies_meanwhile() {
    for is_killed in [false, true] {
        let cluster = Cluster::builder().start().await;
        cluster.sql("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 500); ANALYZE").await;
        let (s3, receiver) = (S3::start().await, Webhook::start().await);
        let settings = format!("[backup]\ninterval = \"0s\"\n{}", receiver.settings());
        let builder = Agent::builder(&cluster, &s3.repo_url()).settings(&settings);
        let mut agent = s3.env().into_iter().fold(builder, |b, (name, value)| b.env(name, &value)).spawn();
        agent.wait_streaming(&cluster).await;
        wait_watching(&agent, &cluster).await;
        s3.fault(Fault::Down);
        cluster.sql("DELETE FROM t").await;
        receiver.wait("the alarm", |told| told.text("title").contains("emptied")).await;
        let seen = status(&agent).await;
        // Two, if the server happened to write the delete down before its commit: the suspicion was told, too.
        assert!(matches!(seen["detect"]["unwritten"].as_u64(), Some(1 | 2)), "{seen}");
        if is_killed {
            agent.sigkill();
        }
        s3.heal();
        if is_killed {
            agent.spawn_again();
        }
        let repo = Repository::connect(&s3.config(), "main").await.unwrap();
        wait_for("the incident to be written", DEADLINE, || async {
            !repo.incidents(None).await.unwrap().incidents.is_empty()
        })
        .await;
        agent.wait_streaming(&cluster).await;
        wait_scanned(&agent, &cluster).await;
        wait_for("its record", DEADLINE, || async { status(&agent).await["notify"]["unrecorded"] == 0 }).await;
        let incidents = repo.incidents(None).await.unwrap().incidents;
        assert_eq!(incidents.len(), 1);
        let told = receiver.told();
        let events: Vec<&str> = told.iter().map(|told| told.text("event")).collect();
        assert!(matches!(events[..], ["opened"] | ["opened", "committed"]), "{told:?}");
        assert_eq!(repo.deliveries(&incidents[0].id).await.unwrap().len(), told.len());
    }
}
