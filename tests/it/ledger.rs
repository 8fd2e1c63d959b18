//! The promise: any moment comes back exactly. A ledger whose every commit is known is archived by the agent, across a
//! promotion, and restored to twenty of its commits, chosen by chance, by time, by LSN and by transaction id.

use std::fs;
use std::time::Duration;

use tokio_postgres::Client;

use super::harness::{
    Agent, Cluster, Commit, Ledger, Restored, Scratch, StopMode, command, finish, give_away, walguard,
};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// Restores of each major.
const RESTORES: usize = 20;

/// Makes the server a standby of nobody and promotes it: it goes on on a new timeline, in the same place.
async fn switch_timeline(cluster: &mut Cluster) {
    cluster.stop(StopMode::Fast).await;
    let signal = cluster.data_dir().join("standby.signal");
    fs::write(&signal, "").unwrap();
    give_away(&signal);
    cluster.start().await;
    cluster.promote().await;
}

/// Work beside the ledger: what recovery must get right, and what makes WAL of other kinds.
async fn other_work(cluster: &Cluster) {
    let client = cluster.client().await;
    for statement in [
        "DROP TABLE IF EXISTS other; CREATE TABLE other AS SELECT g AS i, md5(g::text) AS t FROM generate_series(1, 2000) g",
        "CREATE INDEX ON other (t); UPDATE other SET t = t || t WHERE i % 2 = 0; DELETE FROM other WHERE i % 3 = 0",
        "VACUUM other",
        "CHECKPOINT",
    ] {
        client.batch_execute(statement).await.unwrap();
    }
}

async fn amcheck(client: &Client) {
    client.batch_execute("CREATE EXTENSION IF NOT EXISTS amcheck").await.unwrap();
    let sql = "SELECT count(bt_index_parent_check(c.oid, true)) FROM pg_class c JOIN pg_am a ON a.oid = c.relam
               WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p'";
    client.query_one(sql, &[]).await.unwrap();
    let sql = "SELECT count(*) FROM pg_class c, verify_heapam(c.oid) v WHERE c.relkind IN ('r', 't', 'm')
               AND c.relpersistence = 'p'";
    let corrupt: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(corrupt, 0, "verify_heapam found corruption");
}

/// The same moment, said in three ways.
fn target(commit: &Commit, way: usize) -> [String; 2] {
    match way % 3 {
        0 => ["--to".into(), format!("{:.6}", commit.time)],
        1 => ["--to".into(), commit.after.to_string()],
        _ => ["--to-xid".into(), commit.xid.to_string()],
    }
}

async fn any_commit_comes_back(major: u32) {
    let mut cluster = Cluster::builder().major(major).wal_segsize_mib(1).start().await;
    let scratch = Scratch::new();
    let mut ledger = Ledger::create(&cluster, u64::from(major)).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    let flags = agent.flags();
    let backup = || {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        assert!([0, 3].contains(&walguard(&[&["backup"], flags.as_slice()].concat()).code()));
    };
    agent.wait_streaming(&cluster).await;
    ledger.run(5).await;
    backup();
    let first = ledger.commits().len();
    ledger.run(25).await;
    other_work(&cluster).await;
    ledger.run(10).await;
    cluster.fill(2).await;
    ledger.run(5).await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    switch_timeline(&mut cluster).await;
    ledger.follow(&cluster).await;
    ledger.run(15).await;
    other_work(&cluster).await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    backup();
    ledger.run(10).await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    assert!(agent.stop().await.success());
    cluster.destroy().await;

    let mut random = fastrand::Rng::with_seed(42);
    let commits = &ledger.commits()[first..];
    for way in 0..RESTORES {
        let commit = random.choice(commits).unwrap();
        let target = target(commit, way);
        let target = [target[0].as_str(), target[1].as_str(), "--pg-bin-dir", cluster.bin_dir().to_str().unwrap()];
        let mut restored = Restored::run(&flags, &target);
        ledger.assert_at(commit.number, &restored.client().await).await;
        if way % 3 == 2 {
            let kept = &restored.told["restore"]["reached"]["transaction"];
            assert_eq!(kept["xid"].as_u64(), Some(u64::from(commit.xid)), "{}", restored.told);
        }
        restored.stop().await;
    }

    // Everything, as a server of its own.
    let args = ["--to", "latest", "--action", "promote", "--pg-bin-dir", cluster.bin_dir().to_str().unwrap()];
    let mut restored = Restored::run(&flags, &args);
    let client = restored.client().await;
    ledger.assert_at(ledger.commits().len() as i64, &client).await;
    amcheck(&client).await;
    if major == 15 {
        let mut pg_amcheck = command(cluster.bin("pg_amcheck"));
        pg_amcheck.args(["--all", "--heapallindexed", "--parent-check", "-U", "postgres"]);
        pg_amcheck.arg("-h").arg(restored.data_dir()).arg("--install-missing");
        finish(pg_amcheck).expect(0);
    }
    client.batch_execute("INSERT INTO ledger VALUES (-1, 0, 'it takes writes')").await.unwrap();
    assert_eq!(restored.told["restore"]["reached"]["timeline"], 3);
    restored.stop().await;
    let mut checksums = command(cluster.bin_dir().join("pg_checksums"));
    checksums.arg("--check").arg("-D").arg(restored.data_dir());
    if cluster.bin_dir().join("pg_checksums").exists() {
        finish(checksums).expect(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_commit_comes_back_exactly_on_15() {
    any_commit_comes_back(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_commit_comes_back_exactly_on_16() {
    any_commit_comes_back(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_commit_comes_back_exactly_on_17() {
    any_commit_comes_back(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_commit_comes_back_exactly_on_18() {
    any_commit_comes_back(18).await;
}
