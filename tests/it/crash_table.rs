//! What a death leaves behind, and what the next start does: a test for each row of the table in `walguard::supervisor`.
//!
//! | killed | test |
//! |---|---|
//! | while writing the spool | [`killed_while_writing_the_spool`] |
//! | while uploading | [`killed_while_uploading`] |
//! | after a put whose answer was lost | [`killed_after_a_put_whose_answer_was_lost`] |
//! | between a segment's put and the deletion of its tails | [`killed_between_a_segments_put_and_the_deletion_of_its_tails`] |
//! | between tails | [`killed_between_tails`] |
//! | during a base backup | [`killed_during_a_base_backup`] |
//! | with the spool lost, on a new machine | [`started_on_a_new_machine_without_the_spool`] |
//! | with a spool that is older than the archive | [`started_with_a_spool_that_is_older_than_the_archive`] |
//! | with the slot dropped, its WAL still there | [`started_after_the_slot_was_dropped_but_its_wal_is_there`] |
//! | with the slot dropped, and WAL gone | [`started_after_the_slot_was_dropped_and_wal_is_gone`] |
//! | with the slot invalidated while the agent runs | [`a_slot_that_is_lost_under_a_running_agent_is_told_and_bridged`] |
//! | during a timeline switch | [`killed_during_a_timeline_switch`] |
//!
//! Each test ends alike: what the repository holds is what `pg_receivewal` received beside the agent, without a hole,
//! or the hole is written down.

use std::fs;
use std::path::PathBuf;

use walguard::pg::Lsn;
use walguard::repo::Repository;

use crate::archived_wal::*;
use crate::harness::{Agent, AgentBuilder, Cluster, Fault, S3, Scratch, wait_for};

/// An agent on a store that can be made to fail.
fn on_s3(cluster: &Cluster, s3: &S3) -> AgentBuilder {
    s3.env().into_iter().fold(agent(cluster, &s3.repo_url()), |builder, (name, value)| builder.env(name, &value))
}

/// The end of each row: all is archived, and it is what the judge received.
async fn assert_whole(cluster: &Cluster, agent: &mut Agent, repo: &Repository, judge: Receiver) {
    write(cluster, 500).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(cluster, lsn, DEADLINE).await;
    let judge = judge.finish(cluster, lsn).await;
    assert!(assert_same_wal(repo, &judge, 1, lsn).await > 0);
    assert_no_hole(repo, 1).await;
}

fn spool_files(agent: &Agent) -> Vec<String> {
    let Ok(entries) = fs::read_dir(agent.spool().join("main/00000001")) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_writing_the_spool() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await;
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_streaming(&cluster).await;
    write(&cluster, 1_500).await;
    wait_for("a segment that is being written", DEADLINE, || async {
        spool_files(&agent).iter().any(|file| file.ends_with(".partial"))
    })
    .await;
    agent.sigkill();
    assert!(spool_files(&agent).iter().any(|file| file.ends_with(".partial")), "{:?}", spool_files(&agent));
    agent.spawn_again();
    assert_whole(&cluster, &mut agent, &repository(&url).await, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_uploading() {
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    let judge = Receiver::start(&cluster).await;
    let mut agent = on_s3(&cluster, &s3).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    s3.fault(Fault::Hold);
    write(&cluster, 3 << 10).await;
    wait_for("uploads on their way", DEADLINE, || async {
        status(&agent).await["store"]["uploads"].as_u64().unwrap_or(0) >= 2
    })
    .await;
    agent.sigkill();
    s3.heal();
    agent.spawn_again();
    let repo = Repository::connect(&s3.config(), "main").await.unwrap();
    assert_whole(&cluster, &mut agent, &repo, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_after_a_put_whose_answer_was_lost() {
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    let judge = Receiver::start(&cluster).await;
    let mut agent = on_s3(&cluster, &s3).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let before = status(&agent).await["store"]["objects_total"].as_u64().unwrap();
    s3.fault(Fault::FailAfterWrite(1.0));
    let begun = cluster.lsn().await;
    write(&cluster, 3 << 10).await;
    let repo = Repository::connect(&s3.config(), "main").await.unwrap();
    wait_in_repository(&repo, 1, begun + (1 << 20)).await;
    agent.sigkill();
    s3.heal();
    agent.spawn_again();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    assert!(before > 0, "the agent had archived nothing before");
    assert_whole(&cluster, &mut agent, &repo, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_a_segments_put_and_the_deletion_of_its_tails() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await;
    let mut agent = agent(&cluster, &url).spawn();
    write(&cluster, 100).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    // What lies there now is what would be left behind.
    let wal = PathBuf::from(url.strip_prefix("file://").unwrap()).join("main/wal/00000001");
    let tails = fs::read_dir(&wal).unwrap().flatten().map(|e| e.path());
    let tails = tails.max().filter(|path| path.extension().is_some_and(|e| e == "tail")).expect("a segment with tails");
    let kept: Vec<(PathBuf, Vec<u8>)> =
        fs::read_dir(&tails).unwrap().flatten().map(|e| (e.path(), fs::read(e.path()).unwrap())).collect();
    assert!(!kept.is_empty());
    write(&cluster, 2 << 10).await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let end = lsn.align_down(1 << 20) + (1 << 20);
    wait_for("the tails to go", DEADLINE, || async { tails_before(&url, end) == 0 }).await;
    agent.sigkill();
    fs::create_dir_all(&tails).unwrap();
    for (path, content) in kept {
        fs::write(path, content).unwrap();
    }
    crate::harness::give_away(&tails);
    assert!(tails_before(&url, end) > 0);
    agent.spawn_again();
    wait_for("the tails that were left behind to go", DEADLINE, || async { tails_before(&url, end) == 0 }).await;
    assert_whole(&cluster, &mut agent, &repository(&url).await, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_tails() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await;
    let mut agent = agent(&cluster, &url).settings("[archive]\ntail_interval = \"20ms\"").spawn();
    for _ in 0..3 {
        write(&cluster, 60).await;
        agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
        agent.sigkill();
        write(&cluster, 60).await;
        agent.spawn_again();
    }
    assert_whole(&cluster, &mut agent, &repository(&url).await, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_during_a_base_backup() {
    let cluster = small_cluster().await;
    cluster.fill(8).await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await;
    let settings = "[backup]\nmax_rate = \"6 MiB\"\npart_size = \"1 MiB\"";
    let mut agent = Agent::builder(&cluster, &url).settings(settings).spawn();
    let base = PathBuf::from(url.strip_prefix("file://").unwrap()).join("main/base");
    wait_for("parts of a backup", DEADLINE, || async {
        fs::read_dir(&base).is_ok_and(|mut labels| labels.any(|l| fs::read_dir(l.unwrap().path()).unwrap().count() > 1))
    })
    .await;
    agent.sigkill();
    let repo = repository(&url).await;
    assert_eq!(repo.backups().await.unwrap(), [], "an interrupted backup must not look like one");
    assert_eq!(repo.unfinished_backups().await.unwrap().len(), 1);
    agent.spawn_again();
    wait_for("another backup", DEADLINE, || async { repo.backups().await.unwrap().len() == 1 }).await;
    assert_whole(&cluster, &mut agent, &repo, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn started_on_a_new_machine_without_the_spool() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await;
    let mut first = agent(&cluster, &url).spawn();
    write(&cluster, 2 << 10).await;
    first.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    write(&cluster, 1 << 10).await;
    first.sigkill();
    write(&cluster, 1 << 10).await;
    let mut second = agent(&cluster, &url).spawn();
    assert_whole(&cluster, &mut second, &repository(&url).await, judge).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn started_with_a_spool_that_is_older_than_the_archive() {
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    let judge = Receiver::start(&cluster).await;
    let mut first = on_s3(&cluster, &s3).spawn();
    first.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    s3.fault(Fault::Hold);
    write(&cluster, 3 << 10).await;
    let whole = |file: &String| file.len() == 24;
    wait_for("whole segments in the spool", DEADLINE, || async {
        spool_files(&first).iter().filter(|f| whole(f)).count() >= 2
    })
    .await;
    first.sigkill();
    s3.heal();
    let mut second = on_s3(&cluster, &s3).spawn();
    write(&cluster, 2 << 10).await;
    second.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    assert!(second.stop().await.success());
    assert!(spool_files(&first).iter().filter(|f| whole(f)).count() >= 2);
    first.spawn_again();
    let repo = Repository::connect(&s3.config(), "main").await.unwrap();
    assert_whole(&cluster, &mut first, &repo, judge).await;
    assert!(spool_files(&first).iter().filter(|f| whole(f)).count() <= 1, "{:?}", spool_files(&first));
}

#[tokio::test(flavor = "multi_thread")]
async fn started_after_the_slot_was_dropped_but_its_wal_is_there() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let judge = Receiver::start(&cluster).await; // its slot keeps the WAL
    let mut agent = agent(&cluster, &url).spawn();
    write(&cluster, 1 << 10).await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    agent.sigkill();
    drop_slot(&cluster).await;
    write(&cluster, 3 << 10).await;
    agent.spawn_again();
    assert_whole(&cluster, &mut agent, &repository(&url).await, judge).await;
}

/// The slot of an agent that was killed is free when its walsender has noticed.
async fn drop_slot(cluster: &Cluster) {
    let client = cluster.client().await;
    wait_for("the slot to be free", DEADLINE, || async {
        client.batch_execute("SELECT pg_drop_replication_slot('walguard')").await.is_ok()
    })
    .await;
}

/// Makes the server recycle all WAL that no slot holds.
async fn forget_old_wal(cluster: &Cluster) {
    for _ in 0..6 {
        write(cluster, 1 << 10).await;
        cluster.sql("SELECT pg_switch_wal()").await;
        cluster.sql("CHECKPOINT").await;
    }
}

async fn forgetful_cluster() -> Cluster {
    let builder = Cluster::builder().wal_segsize_mib(1).conf("min_wal_size", "2MB").conf("max_wal_size", "4MB");
    let cluster = builder.start().await;
    cluster.sql("CREATE TABLE busy (id bigserial PRIMARY KEY, word text)").await;
    cluster
}

/// The hole is written down, an alarm is up until a base backup is taken after it, and what follows is archived.
async fn assert_bridged(cluster: &Cluster, agent: &mut Agent, repo: &Repository, before: Lsn) {
    write(cluster, 500).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(cluster, lsn, DEADLINE).await;
    let gaps = repo.gaps().await.unwrap();
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    let gap = &gaps[0];
    assert!(gap.from >= before && gap.to > gap.from, "{gap:?}, archived up to {before} before");
    wait_for("a base backup after the gap", DEADLINE, || async {
        repo.backups().await.unwrap().iter().any(|backup| backup.start >= gap.to)
    })
    .await;
    let catalog = catalog(repo).await;
    let wal = &catalog.timelines[&gap.timeline];
    assert_eq!(wal.ranges.containing(Lsn::new(gap.from.bytes() - 1)).unwrap().to, gap.from, "{:?}", wal.ranges);
    assert_eq!(wal.ranges.containing(gap.to).unwrap().from, gap.to, "{:?}", wal.ranges);
    assert!(wal.ranges.end() >= Some(lsn));
    let told = status(agent).await;
    assert_eq!(told["gaps"].as_array().unwrap().len(), 1, "{told}");
    wait_for("the end of the alarm", DEADLINE, || async { status(agent).await["alarms"].get("gap").is_none() }).await;
    assert!(agent.log().contains("is lost"), "the gap is told in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn started_after_the_slot_was_dropped_and_wal_is_gone() {
    let cluster = forgetful_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = Agent::builder(&cluster, &url).spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&url).await;
    wait_for("the first base backup", DEADLINE, || async { !repo.backups().await.unwrap().is_empty() }).await;
    // Nobody begins another segment any more: the archive ends within one, and what it has of that is not lost.
    write(&cluster, 1_200).await;
    let before = cluster.lsn().await;
    agent.wait_archived(&cluster, before, DEADLINE).await;
    agent.sigkill();
    drop_slot(&cluster).await;
    forget_old_wal(&cluster).await;
    agent.spawn_again();
    assert_bridged(&cluster, &mut agent, &repo, before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_lost_under_a_running_agent_is_told_and_bridged() {
    let cluster = forgetful_cluster().await;
    let s3 = S3::start().await;
    let builder = Agent::builder(&cluster, &s3.repo_url()).settings("[spool]\nsize_max = \"2 MiB\"");
    let builder = s3.env().into_iter().fold(builder, |builder, (name, value)| builder.env(name, &value));
    let mut agent = builder.spawn();
    write(&cluster, 1 << 10).await;
    let before = cluster.lsn().await;
    agent.wait_archived(&cluster, before, DEADLINE).await;
    // The spool fills, reading stops, and the server may keep 2 MiB only.
    s3.fault(Fault::Hold);
    cluster.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '2MB'").await;
    cluster.sql("SELECT pg_reload_conf()").await;
    wait_for("the server to give the slot up", DEADLINE, || async {
        forget_old_wal(&cluster).await;
        cluster.text("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'walguard'").await == "lost"
    })
    .await;
    cluster.sql("ALTER SYSTEM RESET max_slot_wal_keep_size").await;
    cluster.sql("SELECT pg_reload_conf()").await;
    s3.heal();
    let repo = Repository::connect(&s3.config(), "main").await.unwrap();
    assert_bridged(&cluster, &mut agent, &repo, before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_during_a_timeline_switch() {
    let mut primary = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let standby = primary.standby().await;
    let hosts = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=walguard dbname=postgres target_session_attrs=read-write",
        primary.port(),
        standby.port()
    );
    let mut agent = agent(&primary, &url).conninfo(&hosts).spawn();
    write(&primary, 2_500).await;
    let lsn = primary.lsn().await;
    agent.wait_archived(&primary, lsn, DEADLINE).await;
    standby.wait_replayed(lsn).await;
    primary.kill9().await;
    standby.promote().await;
    // At once, and a few times while it follows.
    for _ in 0..3 {
        agent.sigkill();
        agent.spawn_again();
        write(&standby, 300).await;
    }
    let end = standby.lsn().await;
    agent.wait_archived(&standby, end, DEADLINE).await;
    let repo = repository(&url).await;
    assert_followed(&repo, &standby, lsn, end).await;
}
