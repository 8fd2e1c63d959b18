//! The archive holds what the server wrote: every byte, soon, whatever happens to the agent and the store.

use std::process::Stdio;
use std::time::Duration;

use crate::archived_wal::*;
use crate::harness::{Cluster, Fault, S3, Scratch, command, finish, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn wal_of_a_running_server_is_archived_byte_for_byte() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await;
    let mut agent = agent(&cluster, &url).spawn();
    write(&cluster, 5 << 10).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = repository(&url).await;
    assert!(archived_end(&repo, 1).await >= Some(lsn), "the server was told more than is true");
    let judge = judge.finish(&cluster, lsn).await;
    assert!(assert_same_wal(&repo, &judge, 1, lsn).await >= 5);
    assert_no_hole(&repo, 1).await;
    assert!(agent.stop().await.success());
}

/// `pgbench` at a pace that leaves the machine to others, until it is dropped.
struct Load(std::process::Child);

impl Load {
    fn start(cluster: &Cluster) -> Self {
        let mut init = command(cluster.bin("pgbench"));
        init.args(["-q", "-i", "-s", "1", "-d"]).arg(cluster.conninfo_of("postgres"));
        finish(init).expect(0);
        let mut load = command(cluster.bin("pgbench"));
        load.args(["-c", "2", "-T", "600", "--rate=200", "-n", "-d"]).arg(cluster.conninfo_of("postgres"));
        Self(load.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archive_equals_what_pg_receivewal_got_though_the_agent_dies_and_the_store_fails() {
    const DEATHS: usize = 20;
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    s3.fault(Fault::Reject(0.05));
    s3.fault(Fault::FailAfterWrite(0.05));
    let judge = Receiver::start(&cluster).await;
    let load = Load::start(&cluster);
    let mut builder = agent(&cluster, &s3.repo_url());
    for (name, value) in s3.env() {
        builder = builder.env(name, &value);
    }
    let mut agent = builder.spawn();
    for death in 0..DEATHS {
        let ddl = format!(
            "CREATE TABLE t{death} AS SELECT g, md5(g::text) FROM generate_series(1, 2000) g; \
             CREATE INDEX ON t{death} (md5); DROP TABLE IF EXISTS t{}",
            death.wrapping_sub(2)
        );
        cluster.sql(&ddl).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(200..2_500))).await;
        agent.sigkill();
        agent.spawn_again();
    }
    drop(load);
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    assert!(s3.failed() > 20, "the store failed {} times only", s3.failed());
    s3.heal();
    assert!(agent.stop().await.success());

    let repo = walguard::repo::Repository::connect(&s3.config(), "main").await.unwrap();
    let judge = judge.finish(&cluster, lsn).await;
    assert!(assert_same_wal(&repo, &judge, 1, lsn).await >= 10);
    assert_no_hole(&repo, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_on_a_quiet_server_is_in_the_repository_within_two_seconds() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let mut worst = Duration::ZERO;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..1_500))).await;
        write(&cluster, 1).await;
        let lsn = cluster.lsn().await;
        let begin = std::time::Instant::now();
        agent.wait_archived(&cluster, lsn, DEADLINE).await;
        worst = worst.max(begin.elapsed());
    }
    assert!(worst < Duration::from_secs(2), "a commit was off-site after {worst:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tails_are_deleted_when_their_segment_is_whole() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).settings("[archive]\ntail_interval = \"50ms\"").spawn();
    for _ in 0..20 {
        write(&cluster, 100).await;
        agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    }
    let whole = cluster.lsn().await.align_down(1 << 20);
    wait_for("obsolete tails to go", DEADLINE, || async { tails_before(&url, whole) == 0 }).await;
    assert_no_hole(&repository(&url).await, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_the_store_is_away_and_the_spool_is_full() {
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    let mut builder = agent(&cluster, &s3.repo_url()).settings("[spool]\nsize_max = \"3 MiB\"");
    for (name, value) in s3.env() {
        builder = builder.env(name, &value);
    }
    let judge = Receiver::start(&cluster).await;
    let mut agent = builder.spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    s3.fault(Fault::Down);
    write(&cluster, 8 << 10).await;
    let lsn = cluster.lsn().await;
    wait_for("a full spool", DEADLINE, || async { status(&agent).await["spool"]["full"] == true }).await;
    let told = status(&agent).await;
    assert!(told["store"]["trouble"]["error"].is_string(), "{told}");
    assert!(told["spool"]["bytes"].as_u64().unwrap() <= 3 << 20, "{told}");
    let flushed = cluster.text("SELECT flush_lsn FROM pg_stat_replication WHERE application_name = 'walguard'").await;
    assert!(flushed.parse::<walguard::pg::Lsn>().unwrap() < lsn, "the server was told that lost WAL is safe");
    s3.heal();
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = walguard::repo::Repository::connect(&s3.config(), "main").await.unwrap();
    let judge = judge.finish(&cluster, lsn).await;
    assert_same_wal(&repo, &judge, 1, lsn).await;
    assert_no_hole(&repo, 1).await;
    assert_eq!(status(&agent).await["store"]["trouble"], serde_json::Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_durability_spool_the_server_lets_go_while_the_store_is_away_and_nothing_is_lost() {
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    let mut builder = agent(&cluster, &s3.repo_url()).settings("[archive]\ndurability = \"spool\"");
    for (name, value) in s3.env() {
        builder = builder.env(name, &value);
    }
    let judge = Receiver::start(&cluster).await;
    let mut agent = builder.spawn();
    agent.wait_streaming(&cluster).await;
    s3.fault(Fault::Down);
    write(&cluster, 4 << 10).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await; // in the spool
    agent.sigkill();
    cluster.sql("CHECKPOINT").await; // the server forgets what the slot does not hold
    s3.heal();
    agent.spawn_again();
    let repo = walguard::repo::Repository::connect(&s3.config(), "main").await.unwrap();
    wait_in_repository(&repo, 1, lsn).await;
    let judge = judge.finish(&cluster, lsn).await;
    assert_same_wal(&repo, &judge, 1, lsn).await;
    assert_no_hole(&repo, 1).await;
}
