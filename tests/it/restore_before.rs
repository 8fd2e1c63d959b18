//! The promise of `restore --to before:<incident>`: everything that committed before the destructive transaction is kept,
//! what committed while it was open included, and nothing else.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;
use tokio_postgres::Client;
use walguard::detect::Incident;
use walguard::pg::{Lsn, TimelineId};
use walguard::repo::catalog::CatalogScope;
use walguard::repo::{RepoError, Repository};

use crate::archived_wal::repository;
use crate::harness::{Agent, Cluster, Ledger, Restored, Scratch, give_away, restore, walguard};
use crate::restore_plans::{dump, index_all};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// Incidents, each of which is taken back.
const INCIDENTS: usize = 20;

/// Rows that each of them deletes.
const VICTIMS: i64 = 60;

/// A transaction that deletes everything, and what had committed before it did.
struct Wipe {
    xid: u32,
    /// The last commit of the ledger before that of the wipe.
    ledger: i64,
}

async fn xid(client: &Client) -> u32 {
    let xid: String = client.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap().get(0);
    (xid.parse::<u64>().unwrap() & 0xFFFF_FFFF) as u32
}

/// Deletes all rows in a transaction that stays open while the ledger and others go on, some of them beyond its commit.
async fn wipe(cluster: &Cluster, ledger: &mut Ledger, number: usize, random: &mut fastrand::Rng) -> Wipe {
    let mut others = tokio::task::JoinSet::new();
    for seed in 0..3 {
        let client = cluster.client().await;
        let mut random = fastrand::Rng::with_seed(number as u64 * 10 + seed);
        others.spawn(async move {
            for _ in 0..random.u32(5..25) {
                let end = *random.choice(&["COMMIT", "COMMIT", "ROLLBACK"]).unwrap();
                let note = "INSERT INTO others VALUES (pg_current_xact_id()::text::bigint, repeat('x', 500))";
                client.batch_execute(&format!("BEGIN; {note}; {end}")).await.unwrap();
            }
        });
    }
    ledger.run(random.usize(1..4)).await;
    let client = cluster.client().await;
    client.batch_execute(&format!("BEGIN; INSERT INTO wipes VALUES ({number}); DELETE FROM victims")).await.unwrap();
    let xid = xid(&client).await;
    ledger.run(random.usize(..3)).await;
    if random.bool() {
        cluster.fill(1).await;
    }
    client.batch_execute("COMMIT").await.unwrap();
    let wipe = Wipe { xid, ledger: ledger.commits().len() as i64 };
    ledger.run(random.usize(1..3)).await;
    others.join_all().await;
    client.batch_execute("INSERT INTO victims SELECT generate_series(1, 60)").await.unwrap();
    wipe
}

/// Keeps an incident that began with the commit at `lsn`, and gives its id.
async fn incident_at(repo: &Repository, lsn: Lsn) -> String {
    let id = format!("00000001-{:016X}", lsn.bytes());
    let now = Timestamp::now();
    let incident: Incident = serde_json::from_value(json!({
        "format": 1, "id": id, "revision": 1, "state": "committed", "severity": "critical",
        "title": "60 of 60 rows deleted from postgres.public.victims", "timeline": 1,
        "first_harm": lsn, "seen_to": lsn,
        "began_at": now, "ended_at": now, "detected_at": now, "updated_at": now,
    }))
    .unwrap();
    let kept = repo.revise_incident(&id, |_| Ok::<_, RepoError>(Some(incident.clone()))).await.unwrap();
    assert!(kept.is_some());
    id
}

async fn numbers(client: &Client, query: &str) -> BTreeSet<i64> {
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn before_an_incident_everything_is_kept_that_committed_earlier_and_nothing_else() {
    let cluster =
        Cluster::builder().wal_segsize_mib(1).conf("autovacuum", "off").conf("wal_keep_size", "1GB").start().await;
    let scratch = Scratch::new();
    let mut ledger = Ledger::create(&cluster, 3).await;
    cluster
        .sql(
            "CREATE TABLE wipes (number bigint); CREATE TABLE others (xid bigint, note text);
             CREATE TABLE victims AS SELECT generate_series(1, 60)::bigint AS id",
        )
        .await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup"], words.as_slice()].concat()).expect(0);
    let mut random = fastrand::Rng::with_seed(8);
    let mut wipes = Vec::new();
    for number in 1..=INCIDENTS {
        wipes.push(wipe(&cluster, &mut ledger, number, &mut random).await);
    }
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    assert!(agent.stop().await.success());
    let repo = repository(&scratch.repo_url()).await;
    index_all(&repo).await;
    let catalog = repo.catalog(CatalogScope::Everything).await.unwrap();
    let end = catalog.timelines[&TimelineId::FIRST].ranges.end().unwrap();
    let ends = dump(&cluster, catalog.backups[0].start, end);
    let universe = numbers(&cluster.client().await, "SELECT xid FROM others").await;

    for (number, wipe) in (1..).zip(&wipes) {
        let harm = ends.iter().find(|end| end.xid == wipe.xid && end.committed).unwrap().lsn;
        let to = format!("before:{}", incident_at(&repo, harm).await);
        give_away(&scratch.join("repo"));
        let earlier: BTreeSet<i64> =
            ends.iter().filter(|end| end.committed && end.lsn < harm).map(|end| i64::from(end.xid)).collect();

        let told = restore(&scratch.join("none"), &flags, &["--to", &to, "--dry-run"]).expect(0).json();
        assert_eq!(told["plan"]["lost"]["xid"].as_u64(), Some(u64::from(wipe.xid)), "{told:#}");
        let later = ends.iter().filter(|end| end.committed && end.lsn >= harm).count();
        assert_eq!(told["loss"]["transactions"].as_u64(), Some(later as u64), "{:#}", told["loss"]);
        let deleted = |rows: &serde_json::Value| {
            let rows = rows.as_array().unwrap().iter();
            rows.filter(|table| table["deleted"] == VICTIMS && table["table"] == "postgres.public.victims").count()
        };
        assert_eq!(deleted(&told["loss"]["lost"]), 1, "{:#}", told["loss"]);

        let mut restored = Restored::run(&flags, &["--to", &to]);
        let client = restored.client().await;
        ledger.assert_at(wipe.ledger, &client).await;
        assert_eq!(numbers(&client, "SELECT id FROM victims").await.len() as i64, VICTIMS);
        assert_eq!(numbers(&client, "SELECT number FROM wipes").await, (1..number).collect());
        let kept = numbers(&client, "SELECT xid FROM others").await;
        assert_eq!(kept, universe.intersection(&earlier).copied().collect(), "incident {number}");
        restored.stop().await;
    }

    // What is no incident, or has destroyed nothing, is refused before anything is done.
    let told = restore(&scratch.join("none"), &flags, &["--to", "before:00000001-00000000000000FF"]).expect(1).stderr();
    assert!(told.contains("there is no incident") && told.contains("HINT: "), "{told}");
    let nowhere = Lsn::new(ends.last().unwrap().lsn.bytes() - 8);
    let to = format!("before:{}", incident_at(&repo, nowhere).await);
    give_away(&scratch.join("repo"));
    let told = restore(&scratch.join("none"), &flags, &["--to", &to]).expect(1).stderr();
    assert!(told.contains("is not in the archived WAL"), "{told}");
}
