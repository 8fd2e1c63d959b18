//! However rows are made to go, it is noticed and rightly described; and what is ordinary work alarms nobody.

use std::time::Duration;

use walguard::detect::incident::{Incident, TableDamage};
use walguard::detect::{RuleName, Severity, State, WhoSource};

use crate::archived_wal::repository;
use crate::harness::webhook::Webhook;
use crate::harness::{Agent, Cluster, Scratch, wait_for};
use crate::replays::{wait_scanned, wait_watching};

/// A way to lose rows: what it is called, what it needs, how it is done (each statement by itself), which table suffers,
/// and which rules may speak.
struct Way {
    name: &'static str,
    before: &'static str,
    statements: &'static [&'static str],
    table: &'static str,
    /// Any of these.
    rules: &'static [RuleName],
    /// What must be true of the table.
    holds: fn(&TableDamage) -> bool,
}

fn emptied(damage: &TableDamage) -> bool {
    damage.after.is_some_and(|rows| rows.count == 0)
}

const WAYS: &[Way] = &[
    Way {
        name: "many small transactions",
        before: "CREATE TABLE small_steps (id int PRIMARY KEY); INSERT INTO small_steps SELECT generate_series(1, 1000)",
        statements: &[
            "DELETE FROM small_steps WHERE id <= 200",
            "DELETE FROM small_steps WHERE id <= 400",
            "DELETE FROM small_steps WHERE id <= 600",
            "DELETE FROM small_steps WHERE id <= 800",
            "DELETE FROM small_steps",
        ],
        table: "postgres.public.small_steps",
        rules: &[RuleName::TableEmptied],
        holds: emptied,
    },
    Way {
        name: "single rows, each committed by itself",
        before: "CREATE TABLE single (id int PRIMARY KEY); INSERT INTO single SELECT generate_series(1, 300); \
                 CREATE PROCEDURE one_by_one() LANGUAGE plpgsql AS \
                 $$ BEGIN FOR n IN 1..300 LOOP DELETE FROM single WHERE id = n; COMMIT; END LOOP; END $$",
        statements: &["CALL one_by_one()"],
        table: "postgres.public.single",
        rules: &[RuleName::RowsDeleted, RuleName::TableEmptied],
        holds: |damage| damage.deleted >= 100,
    },
    Way {
        name: "a cascade",
        before: "CREATE TABLE parents (id int PRIMARY KEY); INSERT INTO parents SELECT generate_series(1, 3); \
                 CREATE TABLE children (id int PRIMARY KEY, parent int REFERENCES parents ON DELETE CASCADE); \
                 INSERT INTO children SELECT i, 1 + i % 3 FROM generate_series(1, 400) i",
        statements: &["DELETE FROM parents WHERE id = 1"],
        table: "postgres.public.children",
        rules: &[RuleName::RowsDeleted],
        holds: |damage| damage.deleted == 133,
    },
    Way {
        name: "partitions",
        before: "CREATE TABLE measured (id int, day int) PARTITION BY LIST (day); \
                 CREATE TABLE measured_1 PARTITION OF measured FOR VALUES IN (1); \
                 CREATE TABLE measured_2 PARTITION OF measured FOR VALUES IN (2); \
                 INSERT INTO measured SELECT i, 1 + i % 2 FROM generate_series(1, 400) i",
        statements: &["DELETE FROM measured"],
        table: "postgres.public.measured_2",
        rules: &[RuleName::TableEmptied],
        holds: emptied,
    },
    Way {
        name: "a function",
        before: "CREATE TABLE called (id int); INSERT INTO called SELECT generate_series(1, 400); \
                 CREATE FUNCTION clean() RETURNS void LANGUAGE sql AS 'DELETE FROM called'",
        statements: &["SELECT clean()"],
        table: "postgres.public.called",
        rules: &[RuleName::TableEmptied],
        holds: emptied,
    },
    Way {
        name: "copy and swap",
        before: "CREATE TABLE swapped (id int); INSERT INTO swapped SELECT generate_series(1, 1000)",
        statements: &["BEGIN; CREATE TABLE swapped_new AS SELECT * FROM swapped WHERE id <= 10; \
             ALTER TABLE swapped RENAME TO swapped_old; ALTER TABLE swapped_new RENAME TO swapped; \
             DROP TABLE swapped_old; COMMIT"],
        // It is called so when it goes.
        table: "postgres.public.swapped_old",
        rules: &[RuleName::DropTable, RuleName::TableReplaced],
        holds: |damage| damage.dropped || damage.replaced,
    },
    Way {
        name: "every row marked as deleted",
        before: "CREATE TABLE marked (id int, deleted bool NOT NULL DEFAULT false); \
                 INSERT INTO marked SELECT generate_series(1, 400)",
        statements: &["UPDATE marked SET deleted = true"],
        table: "postgres.public.marked",
        rules: &[RuleName::MassUpdate],
        holds: |damage| damage.updated == 400,
    },
    Way {
        name: "a prepared transaction",
        before: "CREATE TABLE prepared (id int); INSERT INTO prepared SELECT generate_series(1, 400)",
        statements: &["BEGIN; DELETE FROM prepared; PREPARE TRANSACTION 'wipe'", "COMMIT PREPARED 'wipe'"],
        table: "postgres.public.prepared",
        rules: &[RuleName::TableEmptied],
        holds: emptied,
    },
    Way {
        name: "TRUNCATE",
        before: "CREATE TABLE truncated (id int); INSERT INTO truncated SELECT generate_series(1, 400)",
        statements: &["TRUNCATE truncated"],
        table: "postgres.public.truncated",
        rules: &[RuleName::Truncate],
        holds: |damage| damage.truncated && emptied(damage),
    },
    Way {
        name: "DROP TABLE",
        before: "CREATE TABLE dropped (id int); INSERT INTO dropped SELECT generate_series(1, 400)",
        statements: &["DROP TABLE dropped"],
        table: "postgres.public.dropped",
        rules: &[RuleName::DropTable],
        holds: |damage| damage.dropped,
    },
    Way {
        name: "subtransactions",
        before: "CREATE TABLE nested (id int); INSERT INTO nested SELECT generate_series(1, 400)",
        statements: &["BEGIN; SAVEPOINT a; DELETE FROM nested WHERE id <= 200; RELEASE a; SAVEPOINT b; \
                       DELETE FROM nested; COMMIT"],
        table: "postgres.public.nested",
        rules: &[RuleName::TableEmptied],
        holds: emptied,
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn however_rows_are_made_to_go_it_is_noticed() {
    let cluster = Cluster::builder().major(18).conf("max_prepared_transactions", "5").start().await;
    for way in WAYS {
        cluster.sql(way.before).await;
    }
    cluster.sql("ANALYZE").await;
    // What was inserted just before it is deleted is no loss: the agent begins behind the insertions.
    for statement in ["CHECKPOINT", "SELECT pg_switch_wal()", "CHECKPOINT"] {
        cluster.sql(statement).await;
    }
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let receiver = Webhook::start().await;
    let settings = format!("[backup]\ninterval = \"0s\"\n{}", receiver.settings());
    let mut agent = Agent::builder(&cluster, &url).settings(&settings).spawn();
    agent.wait_streaming(&cluster).await;
    wait_watching(&agent, &cluster).await;
    let client = cluster.client().await;
    for way in WAYS {
        for statement in way.statements {
            client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{}: {error:?}", way.name));
        }
    }
    let repo = repository(&url).await;
    let mut missing = Vec::new();
    let is_found = |incidents: &[Incident], way: &Way| {
        incidents.iter().any(|incident| {
            incident.tables.iter().any(|damage| damage.name == way.table && (way.holds)(damage))
                && incident.findings.iter().any(|finding| {
                    way.rules.contains(&finding.rule) && finding.table.as_deref().is_none_or(|table| table == way.table)
                })
        })
    };
    let begin = std::time::Instant::now();
    while begin.elapsed() < Duration::from_secs(60) {
        let found = repo.incidents(None).await.unwrap().incidents;
        missing = WAYS.iter().filter(|way| !is_found(&found, way)).map(|way| way.name).collect();
        if missing.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let found = repo.incidents(None).await.unwrap().incidents;
    let seen: Vec<_> = found.iter().map(|incident| (&incident.title, &incident.findings, &incident.tables)).collect();
    panic!("not noticed: {missing:?}; noticed: {seen:#?}");
}

/// Ordinary work that looks like damage here and there.
const ORDINARY: &[&str] = &[
    "VACUUM FULL accounts",
    "CLUSTER accounts USING accounts_pkey",
    "REINDEX TABLE CONCURRENTLY accounts",
    "REFRESH MATERIALIZED VIEW totals",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY totals",
    "ALTER TABLE queue ALTER job TYPE varchar(100)",
    "ALTER TABLE accounts ADD COLUMN note text NOT NULL DEFAULT ''",
    "UPDATE accounts SET balance = balance + 1 WHERE id <= 400",
    "CREATE TABLE restored AS SELECT * FROM accounts",
    "BEGIN; DELETE FROM accounts; ROLLBACK",
    "CREATE TEMP TABLE mine AS SELECT * FROM accounts",
    "DELETE FROM mine",
    "DROP TABLE mine",
    "TRUNCATE empty_table",
    "DELETE FROM accounts WHERE id = 7",
    "INSERT INTO days SELECT i, 2 FROM generate_series(1, 500) i",
    "DROP TABLE days_1",
    "VACUUM accounts",
    "ANALYZE",
];

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_work_alarms_nobody() {
    let cluster = Cluster::builder().major(16).start().await;
    cluster
        .sql(
            "CREATE TABLE accounts (id int PRIMARY KEY, balance int); \
             INSERT INTO accounts SELECT i, 0 FROM generate_series(1, 1000) i; \
             CREATE MATERIALIZED VIEW totals AS SELECT id % 10 AS d, sum(balance) AS sum FROM accounts GROUP BY 1; \
             CREATE UNIQUE INDEX ON totals (d); CREATE TABLE empty_table (id int); \
             CREATE TABLE queue (id bigserial PRIMARY KEY, job text); \
             INSERT INTO queue (job) SELECT 'waiting' FROM generate_series(1, 200); \
             CREATE TABLE days (id int, day int) PARTITION BY LIST (day); \
             CREATE TABLE days_1 PARTITION OF days FOR VALUES IN (1); \
             CREATE TABLE days_2 PARTITION OF days FOR VALUES IN (2); \
             INSERT INTO days SELECT i, 1 FROM generate_series(1, 500) i; ANALYZE",
        )
        .await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let settings = "[backup]\ninterval = \"0s\"\n[[detect.adjust]]\nrules = [\"drop-table\"]\n\
                    tables = [\"public.days_*\"]\nseverity = \"off\"\n";
    let mut agent = Agent::builder(&cluster, &url).settings(settings).spawn();
    agent.wait_streaming(&cluster).await;
    wait_watching(&agent, &cluster).await;
    let client = cluster.client().await;
    for statement in ORDINARY {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        // A queue in which jobs come and go at the same rate.
        for _ in 0..10 {
            client
                .batch_execute(
                    "INSERT INTO queue (job) SELECT 'job' FROM generate_series(1, 5); \
                     DELETE FROM queue WHERE id IN (SELECT id FROM queue ORDER BY id LIMIT 5)",
                )
                .await
                .unwrap();
        }
    }
    wait_scanned(&agent, &cluster).await;
    let found = repository(&url).await.incidents(None).await.unwrap().incidents;
    // What was announced while it was open, and rolled back then, says so.
    let critical =
        found.iter().filter(|incident| incident.severity >= Severity::Critical && incident.state != State::Aborted);
    let critical: Vec<_> = critical.collect();
    assert!(critical.is_empty(), "{:?}", critical.iter().map(|i| (&i.title, &i.findings)).collect::<Vec<_>>());
}

/// As a pooler in transaction mode hands its clients on: one session of the server, and before each client's transaction
/// the name of its application.
#[tokio::test(flavor = "multi_thread")]
async fn through_a_pooler_the_client_of_that_transaction_is_told_and_no_other() {
    let cluster = Cluster::builder().major(17).start().await;
    let tables = "CREATE ROLE app LOGIN; CREATE TABLE pooled AS SELECT generate_series(1, 500) AS id; \
                  ALTER TABLE pooled OWNER TO app; ANALYZE";
    cluster.sql(tables).await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = Agent::builder(&cluster, &url).settings("[backup]\ninterval = \"0s\"\n").spawn();
    agent.wait_streaming(&cluster).await;
    wait_watching(&agent, &cluster).await;
    let (session, connection) =
        tokio_postgres::connect(&cluster.conninfo_of("app"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for (application, statements) in [
        ("web", "SELECT count(*) FROM pooled"),
        ("cleanup", "BEGIN; DELETE FROM pooled; SELECT pg_sleep(1.5); COMMIT"),
        ("web", "SELECT count(*) FROM pooled"),
    ] {
        session.batch_execute(&format!("SET application_name = '{application}'")).await.unwrap();
        session.batch_execute(statements).await.unwrap();
    }
    let repo = repository(&url).await;
    let told = || async {
        let found = repo.incidents(None).await.unwrap().incidents;
        found.into_iter().find(|incident| incident.state == State::Committed)
    };
    wait_for("the incident", Duration::from_secs(60), || async { told().await.is_some() }).await;
    let incident = told().await.unwrap();
    let who = incident.who().unwrap();
    assert_eq!(who.source, WhoSource::Activity, "{who:?}");
    assert_eq!((who.actor.role.as_deref(), who.actor.application.as_deref()), (Some("app"), Some("cleanup")));
    assert!(who.actor.query.as_deref().unwrap().contains("DELETE FROM pooled"), "{who:?}");
}
