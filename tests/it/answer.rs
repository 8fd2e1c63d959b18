//! What is done against an incident: its session is ended, its rows are saved, and both are written into it.

use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use walguard::capture::{ConnInfo, Environment};
use walguard::detect::detector::Break;
use walguard::detect::incident::{Incident, IncidentTransaction, TableDamage, TransactionState, incident_id};
use walguard::detect::{Persistence, Relation, RelationKind, RuleName, State, Who};
use walguard::guard::breaker::{self, Breaker};
use walguard::guard::{Sampler, Sessions, flashback};
use walguard::pg::{Lsn, Oid, PgTime, TimelineId, Xid};
use walguard::repo::{RepoError, Repository};
use walguard::serve::status::{Board, Status};
use walguard::supervisor::breaker::Breaking;
use walguard::supervisor::evidence::Saving;
use walguard::supervisor::flashback::Flashback;

use crate::archived_wal::bare_repository;
use crate::harness::{Cluster, Scratch, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);

async fn world() -> (Cluster, Scratch, Repository, ConnInfo) {
    let cluster = Cluster::builder().major(17).start().await;
    cluster
        .sql(
            "GRANT pg_signal_backend, pg_read_all_data TO walguard; CREATE ROLE shop LOGIN; \
             CREATE TABLE basket AS SELECT i AS n FROM generate_series(1, 100) i; ALTER TABLE basket OWNER TO shop",
        )
        .await;
    let scratch = Scratch::new();
    let repo = bare_repository(&scratch.dir("repo"));
    let info = ConnInfo::parse(&cluster.conninfo(), &Environment::default()).unwrap();
    (cluster, scratch, repo, info)
}

async fn xid(client: &tokio_postgres::Client) -> Xid {
    let sql = "SELECT (pg_current_xact_id()::text::bigint % 4294967296)::text";
    Xid::new(client.query_one(sql, &[]).await.unwrap().get::<_, String>(0).parse().unwrap()).unwrap()
}

/// An incident as the detector announces it while its transaction is open.
fn open(by: Xid) -> Incident {
    let id = incident_id(TimelineId::FIRST, Lsn::new(0x1000));
    let mut incident = Incident::new(id, TimelineId::FIRST, Timestamp::now());
    incident.state = State::Open;
    incident.transactions.push(IncidentTransaction {
        xid: Some(by),
        begin: Lsn::new(0x1000),
        lsn: None,
        time: None,
        state: TransactionState::Open,
        is_complete: true,
        inserted: 0,
        updated: 0,
        deleted: 100,
        who: Who::default(),
    });
    let relation = Relation {
        database: Oid(5),
        oid: Oid(16_400),
        database_name: "postgres".to_owned(),
        schema: "public".to_owned(),
        name: "basket".to_owned(),
        kind: RelationKind::Table,
        persistence: Persistence::Permanent,
        owner: None,
    };
    let name = relation.full_name();
    incident.tables.push(TableDamage { name, relation: Some(relation), deleted: 100, ..TableDamage::default() });
    incident
}

async fn revise(repo: &Repository, id: &str, state: State, of_it: TransactionState, time: Option<PgTime>) -> Incident {
    let revised = repo.revise_incident::<RepoError>(id, |newest| {
        let mut next = newest.unwrap();
        next.state = state;
        (next.transactions[0].state, next.transactions[0].time) = (of_it, time);
        Ok(Some(next))
    });
    revised.await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_a_rule_wants_ended_is_and_the_incident_says_what_came_of_it() {
    let (cluster, _scratch, repo, info) = world().await;
    let wiper = cluster.try_client("shop").await.unwrap();
    wiper.batch_execute("BEGIN; DELETE FROM basket").await.unwrap();
    let by = xid(&wiper).await;
    let sessions = Sessions::new();
    let theirs = sessions.clone();
    let mut sampler = Sampler::connect(&info).await.unwrap();
    let sampling = tokio::spawn(async move {
        loop {
            theirs.wanted().await;
            theirs.learn(sampler.sample().await.unwrap());
        }
    });
    let (wanted, receiver) = mpsc::channel(8);
    let breaker = Breaker::new(info, breaker::Config::default());
    let stop = CancellationToken::new();
    let breaking = Breaking { breaker, sessions, repo: repo.clone(), wanted: receiver };
    let running = tokio::spawn(breaking.run(stop.clone()));

    // Nobody has seen whose it is, and the incident is not written yet.
    let incident = open(by);
    let id = incident.id.clone();
    let rule = RuleName::TableEmptied;
    wanted.send((Break { incident: id.clone(), xid: by, rule }, Who::default())).await.unwrap();
    wait_for("the session's end", DEADLINE, || async { wiper.simple_query("SELECT 1").await.is_err() }).await;
    assert_eq!(cluster.number("SELECT count(*) FROM basket").await, 100);
    repo.put_incident(&incident).await.unwrap();
    let actions = async || repo.incident(&id).await.unwrap().unwrap().actions;
    wait_for("the action in the incident", DEADLINE, || async { actions().await.len() == 1 }).await;
    let action = actions().await.remove(0);
    assert_eq!((action.outcome.as_str(), action.xid, action.aborted), ("terminated", Some(by), None));
    revise(&repo, &id, State::Aborted, TransactionState::Aborted, None).await;
    wait_for("the effect in the incident", DEADLINE, || async { actions().await[0].aborted == Some(true) }).await;
    assert_eq!(actions().await.len(), 1);

    // A transaction that nobody has is nobody's: it is said why nothing was done.
    let gone = Xid::new(by.get() + 1_000).unwrap();
    wanted.send((Break { incident: id.clone(), xid: gone, rule }, Who::default())).await.unwrap();
    wait_for("the second action", DEADLINE, || async { actions().await.len() == 2 }).await;
    assert!(actions().await[1].outcome.starts_with("nothing was done: "), "{:?}", actions().await);
    stop.cancel();
    running.await.unwrap().unwrap();
    sampling.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_suspicion_that_comes_true_are_saved_and_noted_in_the_incident() {
    let (cluster, _scratch, repo, info) = world().await;
    let config = flashback::Config { evidence: true, ..flashback::Config::default() };
    let flashback =
        Flashback::new(info.with_application_name("flash"), config, repo.clone(), Board::new(Status::default()));
    let (incidents, receiver) = mpsc::channel(8);
    let stop = CancellationToken::new();
    let saving = Saving { flashback, repo: repo.clone(), incidents: receiver };
    let running = tokio::spawn(saving.run(stop.clone()));

    let wiper = cluster.try_client("shop").await.unwrap();
    wiper.batch_execute("BEGIN; DELETE FROM basket").await.unwrap();
    let by = xid(&wiper).await;
    let incident = repo.put_incident(&open(by)).await.unwrap();
    incidents.send(incident.clone()).await.unwrap();
    // Between its BEGIN and its first query a transaction has no snapshot yet.
    let held = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flash' \
                AND state = 'idle in transaction' AND backend_xmin IS NOT NULL";
    wait_for("the snapshot", DEADLINE, || async { cluster.number(held).await == 1 }).await;
    wiper.batch_execute("COMMIT").await.unwrap();
    let sql = "SELECT timestamp FROM pg_last_committed_xact()";
    let committed: Timestamp = cluster.client().await.query_one(sql, &[]).await.unwrap().get(0);
    let id = incident.id;
    let committed = Some(PgTime::from(committed));
    let incident = revise(&repo, &id, State::Committed, TransactionState::Committed, committed).await;
    incidents.send(incident.clone()).await.unwrap();
    incidents.send(incident).await.unwrap(); // told again, saved once
    let evidence = async || repo.incident(&id).await.unwrap().unwrap().evidence;
    wait_for("the evidence", DEADLINE, || async { evidence().await.len() == 1 }).await;
    let saved = evidence().await.remove(0);
    assert_eq!((saved.rows, saved.table.as_str(), &saved.note), (100, "postgres.public.basket", &None));
    let csv = zstd::decode_all(&repo.store().read(&saved.key, None).await.unwrap()[..]).unwrap();
    assert_eq!(csv.iter().filter(|byte| **byte == b'\n').count(), 101);
    stop.cancel();
    running.await.unwrap().unwrap();
}
