//! What a disaster costs with the default settings: the primary's machine is gone, and everything that is older than the
//! tail interval and the time to put a tail comes back from S3.

use std::time::{Duration, Instant};

use super::harness::{Agent, Cluster, Ledger, Restored, S3, Scratch, finish, read_number, wait_for, walguard_command};

/// How far back the newest commit that is lost may lie. The aim is two seconds at the 99th percentile, which the benchmark
/// shows; a test on a busy machine leaves room for a stolen second or two and still tells tails from whole segments.
const LOSS_MAX: Duration = Duration::from_secs(5);

/// How long it may take until the agent is ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// Writes beside the ledger until the server is gone.
async fn noise(client: tokio_postgres::Client) {
    let sql = "INSERT INTO noise SELECT g, md5(g::text) FROM generate_series(1, 50) g";
    while client.batch_execute(sql).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await; // a load, not a race for the processor
    }
}

/// Commits for a while (`pause` apart, `writers` others beside it), destroys the primary at once, kills the agent, and
/// restores what S3 holds.
async fn what_is_older_than_the_bound_survives(writers: usize, pause: Duration, commits: usize) {
    let mut cluster = Cluster::builder().start().await;
    let s3 = S3::start().await;
    let mut agent = Agent::builder(&cluster, &s3.repo_url()).arg("--no-backups");
    for (name, value) in s3.env() {
        agent = agent.env(name, &value);
    }
    let mut agent = agent.spawn();
    agent.wait_streaming(&cluster).await;
    let mut ledger = Ledger::create(&cluster, 7).await;
    cluster.sql("CREATE TABLE noise (number int, word text)").await;
    let flags = agent.flags();
    let mut backup = walguard_command(&["backup"]);
    backup.args(&flags).envs(s3.env());
    finish(backup).expect(0);

    let mut beside = Vec::new();
    for _ in 0..writers {
        beside.push(tokio::spawn(noise(cluster.client().await)));
    }
    let mut committed_at = Vec::new();
    for _ in 0..commits {
        ledger.commit().await;
        committed_at.push(Instant::now());
        tokio::time::sleep(pause).await; // how quiet the database is
    }
    let death = Instant::now();
    cluster.destroy().await;
    agent.sigkill();
    for writer in beside {
        writer.await.unwrap();
    }

    let bin = cluster.bin_dir().to_str().unwrap().to_owned();
    let args = ["--to", "latest", "--action", "promote", "--pg-bin-dir", &bin];
    let mut restored = Restored::run_with(&s3.env(), &flags, &args);
    let client = restored.client().await;
    let last = read_number(&client).await;
    ledger.assert_at(last, &client).await;
    let lost = committed_at.get(usize::try_from(last).unwrap()..).unwrap_or_default();
    if let Some(oldest) = lost.first() {
        let age = death.duration_since(*oldest);
        assert!(
            age < LOSS_MAX,
            "of {commits} commits the last {} are lost, the oldest of them {age:?} old",
            lost.len()
        );
    }
    restored.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_primary_that_is_destroyed_comes_back_from_s3() {
    what_is_older_than_the_bound_survives(2, Duration::from_millis(20), 400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_primary_that_is_destroyed_comes_back_from_s3() {
    what_is_older_than_the_bound_survives(0, Duration::from_millis(900), 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_to_be_archived_is_there_after_the_death_of_everything() {
    let mut cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let mut agent = Agent::spawn(&cluster, &scratch.repo_url());
    let flags = agent.flags();
    wait_for("the first base backup", READY_DEADLINE, || async {
        let all: Vec<&str> = ["list", "--json"].into_iter().chain(flags.iter().map(String::as_str)).collect();
        let listed = finish(walguard_command(&all));
        listed.code() == 0 && listed.json()["backups"].as_array().is_some_and(|backups| !backups.is_empty())
    })
    .await;
    let mut ledger = Ledger::create(&cluster, 11).await;
    ledger.run(30).await;
    agent.wait_archived(&cluster, cluster.lsn().await, READY_DEADLINE).await;
    cluster.destroy().await;
    agent.sigkill();
    std::fs::remove_dir_all(agent.spool()).unwrap();

    let bin = cluster.bin_dir().to_str().unwrap().to_owned();
    let mut restored = Restored::run(&flags, &["--to", "latest", "--pg-bin-dir", &bin]);
    ledger.assert_at(30, &restored.client().await).await;
    restored.stop().await;
}
