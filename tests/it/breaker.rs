//! The breaker ends the session that has the transaction, and no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_postgres::Client;
use walguard::capture::{ConnInfo, Environment};
use walguard::guard::breaker::{Breaker, Config, Outcome, Target};
use walguard::guard::{Question, Sampler, Sessions};
use walguard::pg::{PgTime, Xid};

use crate::harness::{Cluster, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

fn breaker(cluster: &Cluster, per_hour: u32) -> Breaker {
    let info = ConnInfo::parse(&cluster.conninfo(), &Environment::default()).unwrap();
    Breaker::new(info.with_application_name("walguard-breaker"), Config { per_hour, spare: vec!["spared".to_owned()] })
}

async fn server(major: u32) -> Cluster {
    let cluster = Cluster::builder().major(major).start().await;
    cluster.sql("GRANT pg_signal_backend TO walguard; CREATE ROLE shop LOGIN; CREATE ROLE spared LOGIN").await;
    cluster
        .sql(
            "CREATE TABLE basket AS SELECT i AS n FROM generate_series(1, 1000) i; GRANT ALL ON basket TO shop, spared",
        )
        .await;
    cluster
}

/// The id in the WAL of what a session is at, its process, and when it began.
async fn target(client: &Client) -> Target {
    let sql = "SELECT (pg_current_xact_id()::text::bigint % 4294967296)::text, pid, backend_start, usename::text \
               FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let row = client.query_one(sql, &[]).await.unwrap();
    Target {
        xid: Xid::new(row.get::<_, String>(0).parse().unwrap()).unwrap(),
        pid: row.get(1),
        backend_start: PgTime::from(row.get::<_, Timestamp>(2)),
        role: Some(row.get(3)),
    }
}

async fn is_dead(client: &Client) -> bool {
    client.simple_query("SELECT 1").await.is_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_session_of_the_transaction_is_ended_and_nothing_is_lost() {
    for major in [15, 18] {
        let cluster = server(major).await;
        let wiper = cluster.try_client("shop").await.unwrap();
        wiper.batch_execute("BEGIN; SAVEPOINT one; DELETE FROM basket").await.unwrap();
        let top = target(&wiper).await;
        // Known by its subtransaction, as the WAL tells it before the commit, and by what a sample says of that.
        let sessions = Sessions::new();
        let info = ConnInfo::parse(&cluster.conninfo(), &Environment::default()).unwrap();
        let sample = Sampler::connect(&info).await.unwrap().sample().await.unwrap();
        let sub = sample.xids.iter().map(|(xid, _)| *xid).find(|xid| *xid != top.xid).unwrap();
        sessions.learn(sample);
        let who = sessions.who(&Question { xid: Some(sub), ..Question::default() });
        let target = Target::of(sub, &who.actor).unwrap();
        assert_eq!(Target { xid: top.xid, ..target.clone() }, top);

        let mut breaker = breaker(&cluster, 10);
        let mut record = breaker.terminate(&target, Timestamp::now()).await;
        assert_eq!(record.outcome, Outcome::Terminated);
        wait_for("the session's end", DEADLINE, || is_dead(&wiper)).await;
        // Its client hears of it before its transaction is rolled back.
        let sessions_left = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {}", target.pid);
        wait_for("the session to be gone", DEADLINE, || async { cluster.number(&sessions_left).await == 0 }).await;
        assert_eq!(cluster.number("SELECT count(*) FROM basket").await, 1000);
        record.settle(sub, false);
        assert_eq!(record.aborted, Some(true));
        let again = breaker.terminate(&target, Timestamp::now()).await;
        assert_eq!(again.outcome, Outcome::AlreadyGone);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_of_millions_is_ended_while_it_runs() {
    let cluster = server(17).await;
    cluster.sql("CREATE TABLE big AS SELECT i AS n FROM generate_series(1, 1000000) i; GRANT ALL ON big TO shop").await;
    let wiper = cluster.try_client("shop").await.unwrap();
    wiper.batch_execute("BEGIN").await.unwrap();
    let target = target(&wiper).await;
    let deleting = tokio::spawn(async move { wiper.execute("DELETE FROM big", &[]).await });
    wait_for("the delete to run", DEADLINE, || async {
        cluster
            .text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DELETE FROM big%' AND state = 'active'")
            .await
            == "1"
    })
    .await;
    let record = breaker(&cluster, 10).terminate(&target, Timestamp::now()).await;
    assert_eq!(record.outcome, Outcome::Terminated);
    let error = deleting.await.unwrap().unwrap_err();
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("57P01"), "{error:?}");
    assert_eq!(cluster.number("SELECT count(*) FROM big").await, 1_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_innocent_session_is_never_hit() {
    let cluster = server(15).await;
    let mut breaker = breaker(&cluster, 1_000_000);
    breaker.prepare().await.unwrap();

    // A process that another session has now: the same number and a running transaction, but it began at another time.
    let innocent = cluster.try_client("shop").await.unwrap();
    innocent.batch_execute("BEGIN; DELETE FROM basket WHERE n = 1").await.unwrap();
    let its = target(&innocent).await;
    let before = PgTime::from_micros(its.backend_start.micros() - 1);
    for wrong in [
        Target { backend_start: before, ..its.clone() },
        Target { xid: Xid::new(its.xid.get() + 1).unwrap(), ..its.clone() },
        Target { pid: breaker_pid(&cluster).await, ..its.clone() },
    ] {
        assert_eq!(breaker.terminate(&wrong, Timestamp::now()).await.outcome, Outcome::AlreadyGone, "{wrong:?}");
    }
    assert!(!is_dead(&innocent).await);

    // Sessions that come and go, and go on to the next transaction, as those of a pooler do: whatever the breaker is told of
    // them is old by the time it looks.
    let stop = Arc::new(AtomicBool::new(false));
    let (work, killed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (targets, mut known) = tokio::sync::watch::channel(None);
    let mut busy = Vec::new();
    for number in 0..4 {
        let client = cluster.try_client("shop").await.unwrap();
        let (stop, work, killed, targets) = (stop.clone(), work.clone(), killed.clone(), targets.clone());
        let conninfo = cluster.conninfo_of("shop");
        busy.push(tokio::spawn(async move {
            let mut client = client;
            while !stop.load(Ordering::Relaxed) {
                let run = async {
                    client.batch_execute("BEGIN").await?;
                    let its = target(&client).await;
                    client.batch_execute("COMMIT").await?;
                    targets.send_replace(Some(its)); // over: from now on nobody may be hit for it
                    client.batch_execute("BEGIN; DELETE FROM basket WHERE n = 0; COMMIT").await?;
                    Ok::<_, tokio_postgres::Error>(())
                };
                match run.await {
                    Ok(()) => work.fetch_add(1, Ordering::Relaxed),
                    Err(_) => killed.fetch_add(1, Ordering::Relaxed),
                };
                if number % 2 == 0 {
                    let (again, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
                    tokio::spawn(connection);
                    client = again;
                }
            }
        }));
    }
    let begun = Instant::now();
    let mut shots = 0;
    // A busy machine needs longer for as many.
    while begun.elapsed() < Duration::from_secs(5) || shots <= 100 && begun.elapsed() < DEADLINE {
        known.changed().await.unwrap();
        let Some(stale) = known.borrow_and_update().clone() else { continue };
        let record = breaker.terminate(&stale, Timestamp::now()).await;
        assert_eq!(record.outcome, Outcome::AlreadyGone);
        shots += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for task in busy {
        task.await.unwrap();
    }
    eprintln!("{shots} shots at sessions that had gone on, {} transactions", work.load(Ordering::Relaxed));
    assert!(shots > 100, "{shots}");
    assert_eq!(killed.load(Ordering::Relaxed), 0);
    assert!(!is_dead(&innocent).await);
}

async fn breaker_pid(cluster: &Cluster) -> i32 {
    cluster.number("SELECT pid FROM pg_stat_activity WHERE application_name = 'walguard-breaker'").await as i32
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_role_may_not_do_is_said_and_the_cap_holds() {
    let cluster = server(17).await;
    let mut breaker = breaker(&cluster, 2);
    let superuser = cluster.client().await;
    superuser.batch_execute("BEGIN").await.unwrap();
    let its = target(&superuser).await;
    let record = breaker.terminate(&its, Timestamp::now()).await;
    assert!(matches!(record.outcome, Outcome::NotPermitted(_)), "{record:?}");
    assert!(!is_dead(&superuser).await);

    let spared = cluster.try_client("spared").await.unwrap();
    spared.batch_execute("BEGIN").await.unwrap();
    let its = target(&spared).await;
    assert_eq!(breaker.terminate(&its, Timestamp::now()).await.outcome, Outcome::Spared);

    let now = Timestamp::now();
    let mut outcomes = Vec::new();
    for minutes in [0, 30, 59, 61] {
        let client = cluster.try_client("shop").await.unwrap();
        client.batch_execute("BEGIN").await.unwrap();
        let its = target(&client).await;
        outcomes.push(breaker.terminate(&its, now + jiff::SignedDuration::from_mins(minutes)).await.outcome);
    }
    assert_eq!(outcomes, [Outcome::Terminated, Outcome::Terminated, Outcome::CapReached, Outcome::Terminated]);
    let off = Config { per_hour: 0, ..Config::default() };
    let mut off = Breaker::new(ConnInfo::parse(&cluster.conninfo(), &Environment::default()).unwrap(), off);
    assert_eq!(off.terminate(&its, now).await.outcome, Outcome::CapReached, "off unless it is switched on");

    cluster.sql("REVOKE pg_signal_backend FROM walguard").await;
    let client = cluster.try_client("shop").await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let its = target(&client).await;
    let record = breaker.terminate(&its, now + jiff::SignedDuration::from_hours(9)).await;
    assert!(matches!(record.outcome, Outcome::NotPermitted(_)), "{record:?}");
    assert!(!is_dead(&client).await);
}
