//! Who is at work in the server is known while it happens and afterwards, and what an open transaction wrote is seen.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use walguard::capture::{ConnInfo, Environment};
use walguard::detect::WhoSource;
use walguard::guard::{Question, Sampler, Sessions};
use walguard::pg::{Lsn, PgTime, Xid};

use crate::harness::{Agent, Cluster, Scratch, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

fn info(conninfo: &str) -> ConnInfo {
    ConnInfo::parse(conninfo, &Environment::default()).unwrap().with_application_name("walguard-who")
}

async fn shop(cluster: &Cluster) -> Client {
    cluster.sql("CREATE ROLE shop LOGIN; CREATE TABLE basket AS SELECT 1 AS n; ALTER TABLE basket OWNER TO shop").await;
    let config = format!("{} application_name=till", cluster.conninfo_of("shop"));
    let (client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The id in the WAL of what a session is at.
async fn xid(client: &Client) -> Xid {
    let sql = "SELECT (pg_current_xact_id()::text::bigint % 4294967296)::text";
    Xid::new(client.query_one(sql, &[]).await.unwrap().get::<_, String>(0).parse().unwrap()).unwrap()
}

fn ask<'a>(xid: Xid) -> Question<'a> {
    Question { xid: Some(xid), ..Question::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_its_subtransactions_and_a_prepared_one_are_somebodys() {
    for major in [15, 18] {
        let cluster = Cluster::builder().major(major).conf("max_prepared_transactions", "5").start().await;
        let till = shop(&cluster).await;
        let sessions = Sessions::new();
        let mut sampler = Sampler::connect(&info(&cluster.conninfo())).await.unwrap();
        sessions.learn(sampler.sample().await.unwrap());

        till.batch_execute("BEGIN; SAVEPOINT one; DELETE FROM basket; SAVEPOINT two; TRUNCATE basket").await.unwrap();
        let top = xid(&till).await;
        let pid: i32 = till.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        let sample = sampler.sample().await.unwrap();
        let basket = cluster.number("SELECT 'basket'::regclass::oid").await as u32;
        assert!(sample.sees_all && !sample.standby && sample.has_open_transaction());
        assert!(sample.locks.iter().any(|lock| lock.relation.0 == basket && lock.pid == pid), "{sample:?}");
        let subs: Vec<Xid> =
            sample.xids.iter().filter(|(xid, p)| *p == pid && *xid != top).map(|(xid, _)| *xid).collect();
        assert_eq!(subs.len(), 2, "{sample:?}");
        sessions.learn(sample);
        till.batch_execute("PREPARE TRANSACTION 'two steps'").await.unwrap();
        let port: i32 = till.query_one("SELECT inet_client_port()", &[]).await.unwrap().get(0);
        for xid in subs.into_iter().chain([top]) {
            let who = sessions.who(&ask(xid));
            assert_eq!((who.source, &who.note), (WhoSource::Activity, &None), "{who:?}");
            assert_eq!(who.actor.role.as_deref(), Some("shop"));
            assert_eq!(who.actor.application.as_deref(), Some("till"));
            assert_eq!(who.actor.database.as_deref(), Some("postgres"));
            assert_eq!(who.actor.client, Some(format!("127.0.0.1:{port}")));
            assert_eq!(who.actor.pid, Some(pid));
            assert_eq!(who.actor.backend_type.as_deref(), Some("client backend"));
            assert!(who.actor.backend_start.is_some() && who.actor.transaction_start.is_some());
        }
        sessions.learn(sampler.sample().await.unwrap());
        let who = sessions.who(&ask(top));
        assert_eq!((who.actor.prepared.as_deref(), who.actor.pid), (Some("two steps"), Some(pid)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_between_two_samples_is_likely_the_session_that_was_at_it() {
    let cluster = Cluster::builder().start().await;
    let till = shop(&cluster).await;
    let sessions = Sessions::new();
    let mut sampler = Sampler::connect(&info(&cluster.conninfo())).await.unwrap();
    sessions.learn(sampler.sample().await.unwrap());
    till.execute("DELETE FROM basket", &[]).await.unwrap();
    let committed: jiff::Timestamp =
        cluster.client().await.query_one("SELECT timestamp FROM pg_last_committed_xact()", &[]).await.unwrap().get(0);
    sessions.learn(sampler.sample().await.unwrap());
    let question = Question { ended: Some(PgTime::from(committed)), ..Question::default() };
    let who = sessions.who(&question);
    assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Nearby, Some("shop")), "{who:?}");
    assert_eq!(who.actor.query.as_deref(), Some("DELETE FROM basket"));
    assert!(who.note.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_pg_monitor_is_told_what_it_misses() {
    let cluster = Cluster::builder().major(17).start().await;
    cluster.sql("CREATE ROLE nobody_special LOGIN REPLICATION").await;
    let till = shop(&cluster).await;
    let sessions = Sessions::new();
    let mut sampler = Sampler::connect(&info(&cluster.conninfo_of("nobody_special"))).await.unwrap();
    till.batch_execute("BEGIN; DELETE FROM basket").await.unwrap();
    let top = xid(&till).await;
    let sample = sampler.sample().await.unwrap();
    assert!(!sample.sees_all);
    sessions.learn(sample);
    let who = sessions.who(&ask(top));
    assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Activity, Some("shop")));
    assert_eq!((&who.actor.query, &who.actor.client), (&None, &None));
    assert!(who.note.unwrap().contains("pg_monitor"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_up_takes_a_sample_at_once() {
    let cluster = Cluster::builder().start().await;
    let till = shop(&cluster).await;
    let sessions = Sessions::new();
    let mut sampler = Sampler::connect(&info(&cluster.conninfo())).await.unwrap();
    let theirs = sessions.clone();
    let sampling = tokio::spawn(async move {
        loop {
            theirs.wanted().await; // and at no other time
            theirs.learn(sampler.sample().await.unwrap());
        }
    });
    till.batch_execute("BEGIN; DELETE FROM basket").await.unwrap();
    let top = xid(&till).await;
    let who = sessions.look_up(&ask(top), DEADLINE).await;
    assert_eq!(who.actor.role.as_deref(), Some("shop"));
    // One that does not exist is not waited for: two samples are enough to know.
    let unknown = sessions.look_up(&ask(Xid::new(top.get() + 1_000).unwrap()), DEADLINE).await;
    assert_eq!(unknown.source, WhoSource::Unknown);
    sampling.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_sampled_and_says_that_it_is_one() {
    let cluster = Cluster::builder().start().await;
    let standby = cluster.standby().await;
    let mut sampler = Sampler::connect(&info(&standby.conninfo())).await.unwrap();
    let sample = sampler.sample().await.unwrap();
    assert!(sample.standby && sample.inserted.is_none() && sample.flushed.is_none());
}

/// A server whose WAL writer sleeps, as it does when a server was quiet for ten seconds, and an agent.
async fn quiet(major: u32, settings: &str) -> (Cluster, Agent, Scratch) {
    let cluster = Cluster::builder().major(major).conf("wal_writer_delay", "10s").start().await;
    cluster.sql("CREATE TABLE basket AS SELECT 1 AS n").await;
    let scratch = Scratch::new();
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").settings(settings).spawn();
    agent.wait_streaming(&cluster).await;
    wait_for("the agent to watch the sessions", DEADLINE, || async {
        cluster.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'walguard-who'").await == "1"
    })
    .await;
    (cluster, agent, scratch)
}

/// Empties a table in a transaction that stays open, and tells how long it took until that was on the stream.
async fn truncate_in_flight(cluster: &Cluster, patience: Duration) -> Option<Duration> {
    let (wiper, looker) = (cluster.client().await, cluster.client().await);
    let begun = Instant::now();
    wiper.batch_execute("BEGIN; TRUNCATE basket").await.unwrap();
    let end: Lsn = {
        let row = wiper.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
        row.get::<_, String>(0).parse().unwrap()
    };
    let query = format!(
        "SELECT 1 FROM pg_stat_replication WHERE application_name = 'walguard' AND sent_lsn >= '{end}'::pg_lsn"
    );
    let seen = loop {
        if !looker.query(&query, &[]).await.unwrap().is_empty() {
            break Some(begun.elapsed());
        }
        if begun.elapsed() > patience {
            break None;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    wiper.batch_execute("ROLLBACK").await.unwrap();
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_truncate_on_a_quiet_server_is_on_the_stream_within_a_second() {
    for major in [15, 16, 17] {
        let (cluster, _agent, _scratch) = quiet(major, "").await;
        let mut times = Vec::new();
        for _ in 0..5 {
            times.push(truncate_in_flight(&cluster, DEADLINE).await.expect("seen before its end"));
            tokio::time::sleep(Duration::from_millis(1_100)).await; // quiet again: nudges are a second apart
        }
        times.sort();
        eprintln!("PostgreSQL {major}: an open TRUNCATE is on the stream after {times:?}");
        assert!(times[2] < Duration::from_secs(1), "PostgreSQL {major}: {times:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_nudge_an_open_truncate_is_not_seen() {
    let (cluster, _agent, _scratch) = quiet(17, "[who]\nnudge = false").await;
    assert_eq!(truncate_in_flight(&cluster, Duration::from_secs(3)).await, None, "the other test proves something");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_is_not_nudged() {
    let (cluster, _agent, _scratch) = quiet(15, "").await;
    let idler = cluster.client().await;
    idler.batch_execute("BEGIN; INSERT INTO basket VALUES (2)").await.unwrap(); // open and silent from now on
    wait_for("the nudge for the insert", DEADLINE, || async {
        cluster.text("SELECT pg_current_wal_insert_lsn() = pg_current_wal_flush_lsn()").await == "t"
    })
    .await;
    let next = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
    let before = cluster.text(next).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(cluster.text(next).await, before, "a nudge takes a transaction id in this version");
}
