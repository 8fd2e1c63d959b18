//! The agent as its operators meet it: failover, two of them, wrong settings, trouble, and what it tells.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;

use crate::archived_wal::*;
use crate::harness::{Agent, Cluster, Fault, S3, Scratch, SmallDisk, StopMode, give_away, wait_for, walguard};

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_is_followed_to_its_new_timeline() {
    let mut primary = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let standby = primary.standby().await;
    let mut agent = agent(&primary, &url).conninfo(&both(&primary, &standby)).spawn();
    write(&primary, 2_500).await;
    let lsn = primary.lsn().await;
    agent.wait_archived(&primary, lsn, DEADLINE).await;
    standby.wait_replayed(lsn).await;
    primary.kill9().await;
    standby.promote().await;
    write(&standby, 2_500).await;
    let end = standby.lsn().await;
    agent.wait_archived(&standby, end, DEADLINE).await;
    assert_followed(&repository(&url).await, &standby, lsn, end).await;
    let told = status(&agent).await;
    assert_eq!(told["archived"]["timeline"], 2, "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_promoted_while_we_stream_from_it_is_followed() {
    let primary = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let standby = primary.standby().await;
    let mut agent = agent(&standby, &url).spawn();
    write(&primary, 2_500).await;
    let lsn = primary.lsn().await;
    standby.wait_replayed(lsn).await;
    agent.wait_archived(&standby, lsn, DEADLINE).await;
    standby.promote().await;
    write(&standby, 2_500).await;
    let end = standby.lsn().await;
    agent.wait_archived(&standby, end, DEADLINE).await;
    assert_followed(&repository(&url).await, &standby, lsn, end).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_the_new_primary_never_had_stays_on_the_old_timeline() {
    let mut primary = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut standby = primary.standby().await;
    let hosts = both(&primary, &standby);
    standby.kill9().await;
    let mut agent = agent(&primary, &url).conninfo(&hosts).spawn();
    write(&primary, 3_500).await;
    let lost = primary.lsn().await;
    agent.wait_archived(&primary, lost, DEADLINE).await;
    primary.destroy().await;
    standby.start().await;
    standby.promote().await;
    write(&standby, 1_500).await;
    let end = standby.lsn().await;
    wait_for("the new timeline", DEADLINE, || async { status(&agent).await["server"]["flushed"]["timeline"] == 2 })
        .await;
    let repo = repository(&url).await;
    wait_in_repository(&repo, 2, end).await;
    let catalog = catalog(&repo).await;
    let [first, second] = [1, 2].map(|t| walguard::pg::TimelineId::new(t).unwrap());
    let switch = catalog.history(second).unwrap().end_of(first).unwrap();
    assert!(switch < lost, "the standby had everything");
    assert!(catalog.timelines[&first].ranges.end() >= Some(lost), "what the new primary never had is archived");
    let ranges = &catalog.timelines[&second].ranges;
    assert_eq!(ranges.as_slice().len(), 1, "{ranges:?}");
    assert_eq!(ranges.as_slice()[0].from, switch.align_down(1 << 20));
    let judge = segments_in(&standby.data_dir().join("pg_wal"), small());
    assert!(assert_same_wal(&repo, &judge, 2, end).await > 0);
    assert!(agent.is_running());
}

fn both(a: &Cluster, b: &Cluster) -> String {
    format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=walguard dbname=postgres target_session_attrs=read-write",
        a.port(),
        b.port()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_primary_that_came_back_is_not_followed() {
    let mut primary = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut standby = primary.standby().await;
    let mut agent = agent(&primary, &url).conninfo(&both(&primary, &standby)).spawn();
    write(&primary, 500).await;
    let lsn = primary.lsn().await;
    agent.wait_archived(&primary, lsn, DEADLINE).await;
    standby.wait_replayed(lsn).await;
    primary.kill9().await;
    standby.promote().await;
    write(&standby, 500).await;
    agent.wait_archived(&standby, standby.lsn().await, DEADLINE).await;
    standby.kill9().await;
    primary.start().await;
    let repo = repository(&url).await;
    let before = archived_end(&repo, 1).await;
    wait_for("an alarm", DEADLINE, || async { status(&agent).await["alarms"].get("server").is_some() }).await;
    write(&primary, 500).await;
    assert_eq!(archived_end(&repo, 1).await, before, "WAL of the old primary was archived");
    primary.kill9().await;
    standby.start().await;
    write(&standby, 100).await;
    agent.wait_archived(&standby, standby.lsn().await, DEADLINE).await;
    wait_for("the end of the alarm", DEADLINE, || async { status(&agent).await["alarms"].get("server").is_none() })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_is_met_again() {
    let mut cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    for _ in 0..2 {
        write(&cluster, 700).await;
        agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
        cluster.restart().await;
    }
    cluster.kill9().await;
    cluster.start().await;
    write(&cluster, 700).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = repository(&url).await;
    assert_no_hole(&repo, 1).await;
    let judge = segments_in(&cluster.data_dir().join("pg_wal"), small());
    assert!(assert_same_wal(&repo, &judge, 1, lsn).await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_agents_one_waits_and_takes_over_when_the_other_is_gone() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut first = agent(&cluster, &url).spawn();
    first.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let mut second = agent(&cluster, &url).spawn();
    wait_for("the second to wait", DEADLINE, || async { status(&second).await["alarms"].get("lease").is_some() }).await;
    assert!(first.is_running());
    // The one that waits connects now and then, to see who the server is.
    let streams =
        "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'walguard' AND state = 'streaming'";
    assert_eq!(cluster.text(streams).await, "1", "two agents stream");
    first.sigkill();
    write(&cluster, 500).await;
    second.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    assert_eq!(status(&second).await["alarms"], serde_json::json!({}));
    assert_no_hole(&repository(&url).await, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_do_not_share_a_spool() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut first = agent(&cluster, &url).spawn();
    first.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let mut second = agent(&cluster, &url).spool(first.spool().clone()).spawn();
    assert_eq!(second.ended(DEADLINE).await.code(), Some(1));
    assert!(second.log().contains("in use by another agent") && second.log().contains("HINT:"), "{}", second.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_does_not_get_into_the_same_place() {
    let ours = small_cluster().await;
    let other = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut first = agent(&ours, &url).spawn();
    first.wait_archived(&ours, ours.lsn().await, DEADLINE).await;
    let mut second = agent(&other, &url).spawn();
    assert_eq!(second.ended(DEADLINE).await.code(), Some(1));
    let log = second.log();
    assert!(log.contains("belongs to another cluster") && log.contains("HINT:") && log.contains("--cluster"), "{log}");
    // Nor does it when it takes the server's place while the agent runs.
    write(&ours, 100).await;
    first.wait_archived(&ours, ours.lsn().await, DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_wal_in_our_place_stops_the_archiving_and_is_told() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let repo = repository(&url).await;
    let next = walguard::pg::SegmentName::at(walguard::pg::TimelineId::FIRST, cluster.lsn().await + (2 << 20), small());
    let other = walguard::repo::frame::compress(&vec![7; 1 << 20], 1);
    repo.store().create(&repo.layout().segment(&next), other.into()).await.unwrap();
    write(&cluster, 4 << 10).await;
    assert_eq!(agent.ended(DEADLINE).await.code(), Some(1));
    let log = agent.log();
    assert!(log.contains("already holds something else") && log.contains(&next.to_string()), "{log}");
    assert!(log.contains("run the archive loop") && log.contains("HINT:"), "{log}");
    assert!(archived_end(&repo, 1).await >= Some(next.start()));
    let lsn = cluster.text("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'walguard'").await;
    // What came slowly stands beside it in tails.
    assert!(lsn.parse::<walguard::pg::Lsn>().unwrap() < next.end(), "the server was told that it is safe: {lsn}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_disk_is_told_and_nothing_is_lost() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let Some(disk) = SmallDisk::mount(&scratch, "size=3m") else { return };
    let judge = Receiver::start(&cluster).await;
    let mut agent = agent(&cluster, &url).spool(disk.path().to_owned()).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let ballast = disk.path().join("ballast");
    let full = fs::write(&ballast, vec![0; 4 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    write(&cluster, 4 << 10).await;
    wait_for("the full disk to be told", DEADLINE, || async {
        status(&agent).await["spool"]["trouble"]["hint"].as_str().is_some_and(|hint| hint.contains("df -h"))
    })
    .await;
    fs::remove_file(&ballast).unwrap();
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = repository(&url).await;
    let judge = judge.finish(&cluster, lsn).await;
    assert!(assert_same_wal(&repo, &judge, 1, lsn).await > 0);
    assert_no_hole(&repo, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_repository_is_told_and_nothing_is_lost() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let Some(disk) = SmallDisk::mount(&scratch, "size=16m") else { return };
    let url = format!("file://{}", disk.path().display());
    let judge = Receiver::start(&cluster).await;
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let before = cluster.lsn().await;
    let ballast = disk.path().join("ballast");
    let full = fs::write(&ballast, vec![0; 20 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    write(&cluster, 4 << 10).await;
    wait_for("the full repository to be told", DEADLINE, || async {
        status(&agent).await["store"]["trouble"]["hint"].as_str().is_some_and(|hint| hint.contains("make room"))
    })
    .await;
    let lsn = cluster.lsn().await;
    let restart: walguard::pg::Lsn = cluster
        .text("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'walguard'")
        .await
        .parse()
        .unwrap();
    assert!(restart <= before, "the server was told that {restart} is safe, nothing behind {before} is");
    fs::remove_file(&ballast).unwrap();
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = repository(&url).await;
    let judge = judge.finish(&cluster, lsn).await;
    assert!(assert_same_wal(&repo, &judge, 1, lsn).await > 0);
    assert_no_hole(&repo, 1).await;
}

/// A folder that was moved away, or a mount point without its file system, is no empty repository.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_gone_is_waited_for_and_not_made_anew_and_nothing_is_lost() {
    for is_mount_point in [false, true] {
        let cluster = small_cluster().await;
        let scratch = Scratch::new();
        let url = scratch.repo_url();
        let (place, away) = (PathBuf::from(url.strip_prefix("file://").unwrap()), scratch.join("away"));
        let judge = Receiver::start(&cluster).await;
        let mut agent = agent(&cluster, &url).spawn();
        agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
        let before = cluster.lsn().await;
        fs::rename(&place, &away).unwrap();
        if is_mount_point {
            fs::create_dir(&place).unwrap();
            give_away(&place);
        }
        let is_untouched = || match fs::read_dir(&place) {
            Ok(entries) => is_mount_point && entries.count() == 0,
            Err(_) => !is_mount_point,
        };
        write(&cluster, 4 << 10).await;
        wait_for("the missing repository to be told", DEADLINE, || async {
            status(&agent).await["store"]["trouble"]["hint"].as_str().is_some_and(|hint| hint.contains("mounted"))
        })
        .await;
        assert!(is_untouched());
        // An agent that begins meanwhile remembers that there was one.
        agent.sigkill();
        agent.spawn_again();
        wait_for("the alarm", DEADLINE, || async {
            let text = status(&agent).await["alarms"]["repository"]["text"].to_string();
            text.contains("was initialised, and now nothing is there")
        })
        .await;
        let flags = agent.flags();
        let listed = walguard(&["list"].into_iter().chain(flags.iter().map(String::as_str)).collect::<Vec<_>>());
        assert!(listed.stderr().contains("is not initialised") && listed.stderr().contains("mounted"), "{listed}");
        write(&cluster, 1 << 10).await;
        assert!(is_untouched());
        let lsn = cluster.lsn().await;
        let restart = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'walguard'";
        let restart: walguard::pg::Lsn = cluster.text(restart).await.parse().unwrap();
        assert!(restart <= before, "the server was told that {restart} is safe, nothing behind {before} is");

        if is_mount_point {
            fs::remove_dir(&place).unwrap();
        }
        fs::rename(&away, &place).unwrap();
        agent.wait_archived(&cluster, lsn, DEADLINE).await;
        let repo = repository(&url).await;
        let judge = judge.finish(&cluster, lsn).await;
        assert!(assert_same_wal(&repo, &judge, 1, lsn).await > 0);
        assert_no_hole(&repo, 1).await;
        let told = status(&agent).await;
        assert!(told["alarms"]["repository"].is_null() && told["store"]["trouble"].is_null(), "{told:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_ends_the_agent_with_a_hint() {
    let cluster = Cluster::builder()
        .wal_segsize_mib(1)
        .hba("host all,replication locked 127.0.0.1/32 scram-sha-256")
        .start()
        .await;
    cluster.sql("CREATE ROLE locked LOGIN REPLICATION PASSWORD 'right'").await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let conninfo = cluster.conninfo_of("locked");
    let mut agent = agent(&cluster, &url).conninfo(&conninfo).env("PGPASSWORD", "wrong").spawn();
    assert_eq!(agent.ended(DEADLINE).await.code(), Some(1));
    assert!(agent.log().contains("password") && agent.log().contains("HINT:"), "{}", agent.log());
    assert!(!agent.log().contains("wrong"), "the password is in the log: {}", agent.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_slot_left_is_told_with_a_hint() {
    let cluster = Cluster::builder().wal_segsize_mib(1).conf("max_replication_slots", "1").start().await;
    cluster.sql("SELECT pg_create_physical_replication_slot('taken')").await;
    let scratch = Scratch::new();
    let mut agent = agent(&cluster, &scratch.repo_url()).spawn();
    assert_eq!(agent.ended(DEADLINE).await.code(), Some(1));
    assert!(agent.log().contains("max_replication_slots"), "{}", agent.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_stopped_archives_what_it_received_and_lets_the_next_one_start_at_once() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).settings("[archive]\ntail_interval = \"1h\"").spawn();
    agent.wait_streaming(&cluster).await;
    write(&cluster, 1_500).await;
    let lsn = cluster.lsn().await;
    wait_for("the WAL to be received", DEADLINE, || async {
        let query = format!("SELECT write_lsn >= '{lsn}' FROM pg_stat_replication WHERE application_name = 'walguard'");
        cluster.text(&query).await == "t"
    })
    .await;
    let repo = repository(&url).await;
    assert!(archived_end(&repo, 1).await < Some(lsn), "the tail waits for its interval");
    assert!(agent.stop().await.success());
    assert!(archived_end(&repo, 1).await >= Some(lsn), "what was received is archived before the end");
    let lease = repo.lease().await.unwrap().unwrap();
    assert!(lease.expires_at <= Timestamp::now(), "the lease is given back: {lease:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_taken_when_there_is_none_and_shown() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let agent = Agent::spawn(&cluster, &url);
    let repo = repository(&url).await;
    wait_for("a backup", DEADLINE, || async { repo.backups().await.is_ok_and(|backups| backups.len() == 1) }).await;
    wait_for("the status to show it", DEADLINE, || async { status(&agent).await["backups"]["last"].is_object() }).await;
    let told = status(&agent).await;
    assert!(told["backups"]["next_at"].is_string(), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_live_and_without_an_agent_comes_from_the_repository() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    write(&cluster, 500).await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let flags = agent.flags();
    let http = agent.http();
    let mut args = vec!["status", "--json", "--http", &http];
    args.extend(flags.iter().map(String::as_str));
    wait_for("a status without anything to look at", DEADLINE, || async {
        let done = walguard(&args);
        done.code() == 0 && done.json()["agent_running"] == true
    })
    .await;
    args.remove(1);
    let text = walguard(&args).expect(0).stdout();
    assert!(text.contains("streaming") && text.contains("archived"), "{text}");

    let metrics = reqwest::get(agent.url("/metrics")).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("walguard_archived_position_bytes{cluster=\"main\"}"), "{metrics}");
    assert!(reqwest::get(agent.url("/readyz")).await.unwrap().status().is_success());
    assert!(agent.stop().await.success());

    let text = walguard(&args).expect(3).stdout();
    assert!(text.contains("no agent archives this cluster") && text.contains("walguard run"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn archive_command_puts_each_file_once() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    assert!(agent.stop().await.success());
    let name = cluster.text("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    write(&cluster, 500).await;
    cluster.sql("SELECT pg_switch_wal()").await;
    let path = cluster.data_dir().join("pg_wal").join(&name);
    let push = |path: &std::path::Path| {
        walguard(&["wal-push", "--json", "--repo", &url, "--cluster", "main", path.to_str().unwrap()])
    };
    assert_eq!(push(&path).expect(0).json()["result"], "stored");
    assert_eq!(push(&path).expect(0).json()["result"], "known");
    let repo = repository(&url).await;
    let segment = walguard::pg::SegmentName::parse(&name, small()).unwrap();
    assert_eq!(repo.read_segment(&segment).await.unwrap().bytes, fs::read(&path).unwrap());

    // Another content under the same name.
    let mut other = fs::read(&path).unwrap();
    *other.last_mut().unwrap() ^= 1;
    let forged = scratch.file(&name, &other);
    let refused = push(&forged).expect(1);
    assert!(refused.stderr().contains("already holds something else"), "{refused}");
    // A segment under another's name.
    let misnamed = scratch.file(&segment.next().to_string(), fs::read(&path).unwrap());
    assert!(push(&misnamed).expect(1).stderr().contains("its first page says"), "a misnamed segment is refused");
    // What else Postgres hands over.
    let label = scratch.file(&format!("{name}.00000028.backup"), "START WAL LOCATION: 0/2000028");
    assert_eq!(push(&label).expect(0).json()["result"], "not needed");
    let history = scratch.file("00000002.history", format!("1\t{}\tno recovery target\n", segment.start() + 5000));
    assert_eq!(push(&history).expect(0).json()["result"], "stored");
    let partial = scratch.file(&format!("{name}.partial"), fs::read(&path).unwrap());
    assert_eq!(push(&partial).expect(0).json()["result"], "stored");
    let unknown = scratch.file("postgresql.conf", "");
    assert!(push(&unknown).expect(1).stderr().contains("is not the name of a WAL file"));
}

/// So long may a commit be away from its archive on a loaded machine before the test calls it broken.
const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_be_shut_down_while_the_agent_streams() {
    let mut cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    write(&cluster, 100).await;
    tokio::time::timeout(SOON, cluster.stop(StopMode::Fast)).await.expect("the server hangs");
    assert!(agent.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_be_shut_down_though_the_spool_is_full() {
    let mut cluster = small_cluster().await;
    let s3 = S3::start().await;
    let builder = agent(&cluster, &s3.repo_url()).settings("[spool]\nsize_max = \"2 MiB\"");
    let mut agent = s3.env().into_iter().fold(builder, |b, (name, value)| b.env(name, &value)).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    s3.fault(Fault::Hold);
    write(&cluster, 6 << 10).await;
    let lsn = cluster.lsn().await;
    wait_for("a full spool", DEADLINE, || async { status(&agent).await["spool"]["full"] == true }).await;
    tokio::time::timeout(SOON, cluster.stop(StopMode::Fast)).await.expect("the server hangs");
    assert!(agent.is_running());
    s3.heal();
    cluster.start().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = walguard::repo::Repository::connect(&s3.config(), "main").await.unwrap();
    assert_no_hole(&repo, 1).await;
}

/// A server that stops waits until its walsenders' clients confirm everything, for as long as they answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_be_shut_down_though_the_repository_is_away() {
    let mut cluster = small_cluster().await;
    let s3 = S3::start().await;
    let builder = agent(&cluster, &s3.repo_url());
    let mut agent = s3.env().into_iter().fold(builder, |b, (name, value)| b.env(name, &value)).spawn();
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    s3.fault(Fault::Hold);
    write(&cluster, 2 << 10).await;
    let lsn = cluster.lsn().await;
    tokio::time::timeout(SOON, cluster.stop(StopMode::Fast)).await.expect("the server hangs");
    assert!(agent.log().contains("lets it go"), "{}", agent.log());
    assert!(agent.is_running());
    s3.heal();
    cluster.start().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    let repo = walguard::repo::Repository::connect(&s3.config(), "main").await.unwrap();
    assert_no_hole(&repo, 1).await;
}
