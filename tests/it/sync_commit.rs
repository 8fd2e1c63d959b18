//! `synchronous_standby_names = 'walguard'`: a commit that was acknowledged is in the repository, whatever burns down.

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::archived_wal::*;
use crate::harness::{Agent, Cluster, Scratch, command, finish, wait_for};

/// Transactions that the server acknowledged.
type Acknowledged = Arc<Mutex<BTreeSet<u32>>>;

/// Commits one small transaction after the other until the server is gone.
async fn commit_until_death(client: tokio_postgres::Client, acknowledged: Acknowledged) {
    let write = "INSERT INTO busy (word) VALUES (repeat('x', 100)) RETURNING pg_current_xact_id()::text";
    while let Ok(row) = client.query_one(write, &[]).await {
        // An answer to a statement of its own comes after its commit.
        acknowledged.lock().unwrap().insert(row.get::<_, String>(0).parse().unwrap());
    }
}

/// The transactions whose commit is in the repository, as `pg_waldump` reads them.
async fn committed_in_repository(url: &str, name: &str, cluster: &Cluster, scratch: &Scratch) -> BTreeSet<u32> {
    let config = walguard::repo::Config { url: url.to_owned(), ..Default::default() };
    let repo = walguard::repo::Repository::connect(&config, name).await.unwrap();
    let catalog = catalog(&repo).await;
    let ranges = catalog.timelines[&walguard::pg::TimelineId::FIRST].ranges.clone();
    let [range] = ranges.as_slice() else { panic!("the archive has holes: {ranges:?}") };
    let dir = scratch.dir(&format!("wal-{name}"));
    let mut segment = walguard::pg::SegmentName::at(walguard::pg::TimelineId::FIRST, range.from, small());
    while segment.start() < range.to {
        let read = repo.read_segment(&segment).await.unwrap();
        fs::write(dir.join(segment.to_string()), &read.bytes).unwrap();
        segment = segment.next();
    }
    let mut dump = command(cluster.bin("pg_waldump"));
    dump.arg("-p").arg(&dir).args(["--rmgr=Transaction", "-s", &range.from.to_string()]);
    // It ends with an error where the WAL ends: that is how it finds the end.
    let text = finish(dump).stdout();
    let xid = |line: &str| line.split("tx:").nth(1)?.split(',').next()?.trim().parse().ok();
    text.lines().filter(|line| line.contains("desc: COMMIT")).filter_map(xid).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_commit_is_missing_after_twenty_deaths_of_the_primary() {
    const DEATHS: usize = 20;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut total = 0;
    for death in 0..DEATHS {
        let mut cluster = small_cluster().await;
        let name = format!("c{death}");
        let mut agent = Agent::builder(&cluster, &url).arg("--no-backups").cluster(&name).spawn();
        agent.wait_streaming(&cluster).await;
        cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'walguard'").await;
        cluster.sql("SELECT pg_reload_conf()").await;
        wait_for("commits to wait for the agent", DEADLINE, || async {
            cluster.text("SELECT sync_state FROM pg_stat_replication WHERE application_name = 'walguard'").await
                == "sync"
        })
        .await;
        let acknowledged = Acknowledged::default();
        let mut writers = Vec::new();
        for _ in 0..3 {
            writers.push(tokio::spawn(commit_until_death(cluster.client().await, acknowledged.clone())));
        }
        wait_for("acknowledged commits", DEADLINE, || async { acknowledged.lock().unwrap().len() >= 5 }).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..300))).await;
        cluster.destroy().await;
        for writer in writers {
            writer.await.unwrap();
        }
        agent.sigkill();
        let acknowledged = acknowledged.lock().unwrap().clone();
        let archived = committed_in_repository(&url, &name, &cluster, &scratch).await;
        let missing: Vec<_> = acknowledged.difference(&archived).collect();
        assert!(missing.is_empty(), "death {death}: of {} commits these are lost: {missing:?}", acknowledged.len());
        total += acknowledged.len();
    }
    assert!(total >= DEATHS * 5, "{total} commits");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_commit_waits_for_the_repository_and_not_for_the_tail_interval() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (walguard)'").await;
    cluster.sql("SELECT pg_reload_conf()").await;
    let mut agent = agent(&cluster, &url).settings("[archive]\ntail_interval = \"1h\"").spawn();
    agent.wait_streaming(&cluster).await;
    let client = cluster.client().await;
    let begin = std::time::Instant::now();
    for _ in 0..20 {
        client.batch_execute("INSERT INTO busy (word) VALUES ('x')").await.unwrap();
    }
    let each = begin.elapsed() / 20;
    assert!(each < Duration::from_secs(1), "a commit took {each:?}");
    assert_eq!(status(&agent).await["server"]["synchronous"], true);
    assert!(agent.stop().await.success());
}
