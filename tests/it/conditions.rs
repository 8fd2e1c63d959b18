//! What is wrong and no transaction's doing, from the server through the agent to the person who is told: WAL that waits, a
//! slot in danger, a gap, a backup of an odd size.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use crate::archived_wal::write;
use crate::harness::webhook::{Told, Webhook};
use crate::harness::{Agent, Cluster, Scratch, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);

/// A message about the incident of this rule, and of this event.
fn about<'a>(rule: &'a str, event: &'a str) -> impl Fn(&Told) -> bool + 'a {
    move |told| told.text("event") == event && told.text("incident").ends_with(&format!("-{rule}"))
}

/// Takes away, or gives back, the right to write into the folder of a timeline's WAL; the rest of the repository works.
fn allow_wal(repo: &Path, allowed: bool) {
    let folder = repo.join("main/wal/00000001");
    fs::set_permissions(folder, Permissions::from_mode(if allowed { 0o700 } else { 0o500 })).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_waits_a_slot_in_danger_and_a_gap_are_told_and_the_first_two_are_over() {
    let cluster =
        Cluster::builder().wal_segsize_mib(1).conf("max_slot_wal_keep_size", "2MB").conf("min_wal_size", "2MB");
    let cluster = cluster.conf("max_wal_size", "3MB").start().await;
    cluster.sql("CREATE TABLE busy (id bigserial PRIMARY KEY, word text)").await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let settings = format!("{}\n[detect]\narchive_lag_max = \"1s\"\n", receiver.settings());
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).settings(&settings).spawn();
    agent.wait_streaming(&cluster).await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;

    allow_wal(&scratch.join("repo"), false);
    write(&cluster, 64).await;
    let late = receiver.wait("the alarm about WAL that waits", about("archive-lag", "opened")).await;
    assert!(late.text("title").contains("waiting"), "{}", late.body);
    // The server keeps 2 MiB for the slot, and no more.
    let is_about_slot = about("slot", "opened");
    wait_for("the alarm about the slot", DEADLINE, || async {
        write(&cluster, 1 << 10).await;
        cluster.sql("CHECKPOINT").await;
        receiver.told().iter().any(&is_about_slot)
    })
    .await;
    let slot = receiver.wait("the alarm about the slot", &is_about_slot).await;
    assert_eq!(slot.text("severity"), "critical", "{}", slot.body);
    allow_wal(&scratch.join("repo"), true);
    receiver.wait("the end of the lag", about("archive-lag", "resolved")).await;
    receiver.wait("the end of the danger", about("slot", "resolved")).await;

    // Without an agent, what the server does not keep is lost.
    let ended = agent.stop().await;
    assert!(ended.success(), "{ended:?}");
    wait_for("the slot to be lost", DEADLINE, || async {
        write(&cluster, 2 << 10).await;
        cluster.sql("CHECKPOINT").await;
        cluster.text("SELECT wal_status FROM pg_replication_slots").await == "lost"
    })
    .await;
    agent.spawn_again();
    let gap = receiver.wait("the alarm about the gap", about("gap", "opened")).await;
    assert!(gap.text("title").contains("is missing for good"), "{}", gap.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_half_as_large_again_is_told() {
    let cluster = Cluster::builder().start().await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let settings = format!("{}\n[backup]\ninterval = \"4s\"\n", receiver.settings());
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).settings(&settings).spawn();
    agent.wait_streaming(&cluster).await;
    let manifests = || {
        let backups = fs::read_dir(scratch.join("repo/main/base")).into_iter().flatten().flatten();
        backups.filter(|backup| backup.path().join("manifest").exists()).count()
    };
    wait_for("the first backup", DEADLINE, || async { manifests() > 0 }).await;
    // Seen as the newest before it is followed by a larger one.
    tokio::time::sleep(Duration::from_secs(6)).await;
    cluster
        .sql(
            "CREATE TABLE large AS SELECT i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 60) j) \
             FROM generate_series(1, 8000) i",
        )
        .await;
    let told = receiver.wait("the alarm about the size", about("backup-size", "opened")).await;
    assert!(told.text("title").contains("% larger than"), "{}", told.body);
    assert!(agent.stop().await.success());
}
