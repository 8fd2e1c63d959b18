//! A restored server does nothing to others; handed over, it is the original's heir: in its place, archiving again, on a
//! timeline of its own that the agent follows.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio_postgres::{Client, NoTls};

use crate::archived_wal::repository;
use crate::harness::{Agent, Cluster, Finished, Scratch, StopMode, restore, wait_for, walguard};
use crate::replays::wait_watching;

const DEADLINE: Duration = Duration::from_secs(60);

/// Somebody whom a subscription wants to reach; counts who comes.
async fn publisher() -> (u16, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, came) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let count = came.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            drop(stream);
        }
    });
    (port, came)
}

async fn connect(socket_dir: &str, port: u16) -> Client {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir).port(port).user("postgres").dbname("postgres");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn hand_over(restored: &Path, original: &Path) -> Finished {
    walguard(&["handover", restored.to_str().unwrap(), "--swap", original.to_str().unwrap(), "--yes", "--json"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_leaves_others_alone_until_it_is_handed_over_and_then_takes_the_originals_place() {
    let (scratch, (port, came)) = (Scratch::new(), publisher().await);
    let archive = scratch.dir("archive");
    let mut cluster = Cluster::builder()
        .wal_segsize_mib(1)
        .conf("archive_mode", "on")
        .conf("archive_command", &format!("cp %p {}/%f", archive.display()))
        .conf("wal_retrieve_retry_interval", "100ms")
        .start()
        .await;
    // A statement each: a subscription is not made within a transaction that does more.
    for sql in [
        format!("CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1 port={port}' PUBLICATION p WITH (connect = false)")
            .as_str(),
        "ALTER SUBSCRIPTION s ENABLE",
        "CREATE TABLE t AS SELECT generate_series(1, 100) AS id",
        "GRANT pg_read_all_data TO walguard",
    ] {
        cluster.sql(sql).await;
    }
    wait_for("the original's subscription to ask", DEADLINE, || async { came.load(Ordering::SeqCst) > 0 }).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup"], words.as_slice()].concat()).expect(0);
    cluster.sql("INSERT INTO t VALUES (101)").await;
    let good = cluster.lsn().await;
    cluster.sql("DELETE FROM t").await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;

    // While the original runs, nothing of its place is touched.
    let original = cluster.data_dir().to_owned();
    let restored = original.with_file_name("restored");
    let told = restore(&restored, &flags, &["--to", &good.to_string()]).expect(0).json();
    let refused = hand_over(&restored, &original).expect(1).to_string();
    assert!(
        refused.contains("belongs to a server that runs") && refused.contains("stop its server first"),
        "{refused}"
    );

    cluster.stop(StopMode::Fast).await;
    let (archived, asked) = (names(&archive), came.load(Ordering::SeqCst));
    // As somebody who is careless would leave it: a primary, with work.
    let running = &told["restore"]["running"];
    let (sockets, socket_port) = (running["socket_dir"].as_str().unwrap(), running["port"].as_u64().unwrap() as u16);
    let client = connect(sockets, socket_port).await;
    client.batch_execute("SELECT pg_promote(true, 60)").await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (102)").await.unwrap();
    client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    for (name, value) in [("archive_mode", "off"), ("primary_conninfo", ""), ("max_logical_replication_workers", "0")] {
        let shown: String = client.query_one(&format!("SHOW {name}"), &[]).await.unwrap().get(0);
        assert_eq!(shown, value, "{name}");
    }
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'";
    assert_eq!(client.query_one(workers, &[]).await.unwrap().get::<_, i64>(0), 0);
    // What nobody asked for must not be lost with the marks that `ALTER SYSTEM` drops.
    client.batch_execute("ALTER SYSTEM SET work_mem = '5MB'").await.unwrap();
    drop(client);
    assert_eq!((names(&archive), came.load(Ordering::SeqCst)), (archived.clone(), asked), "it reached out to somebody");

    let handed = hand_over(&restored, &original).expect(0).json();
    let kept = Path::new(handed["kept"].as_str().unwrap()).to_owned();
    assert!(kept.join("global/pg_control").exists() && !restored.exists());
    assert_eq!((handed["data_dir"].as_str(), handed["timeline"].as_u64()), (original.to_str(), Some(2)));
    assert!(names(&original).iter().all(|name| !name.starts_with("walguard-restore") || name.ends_with(".log")));
    assert!(hand_over(&kept, &original).expect(1).to_string().contains("holds no finished restore"));

    cluster.start().await;
    assert_eq!(cluster.number("SELECT count(*) FROM t").await, 102);
    assert_eq!(cluster.text("SHOW work_mem").await, "5MB");
    // The agent goes on on the new timeline, although the old one went further; and so does the original's own archive.
    cluster.sql("INSERT INTO t VALUES (103)").await;
    cluster.sql("SELECT pg_switch_wal()").await;
    agent.wait_streaming(&cluster).await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    wait_for("the new timeline in the archive", DEADLINE, || async {
        let there = names(&archive);
        there.contains(&"00000002.history".to_owned())
            && there.iter().any(|name| name.len() == 24 && name.starts_with("00000002"))
    })
    .await;
    wait_for("the subscription to ask again", DEADLINE, || async { came.load(Ordering::SeqCst) > asked }).await;
    let repo = repository(&scratch.repo_url()).await;
    let gaps = repo.gaps().await.unwrap();
    assert!(gaps.is_empty(), "{gaps:?}");
    // What happens there is seen, with the rows that are there now, and not with those that were counted before.
    wait_watching(&agent, &cluster).await;
    cluster.sql("DELETE FROM t WHERE id > 1").await;
    wait_for("the incident on the new timeline", DEADLINE, || async {
        repo.incidents(None).await.unwrap().incidents.iter().any(|incident| incident.timeline.get() == 2)
    })
    .await;
    let found = repo.incidents(None).await.unwrap().incidents;
    let new: Vec<_> = found.iter().filter(|incident| incident.timeline.get() == 2).collect();
    assert_eq!(new.len(), 1, "{:?}", new.iter().map(|incident| &incident.title).collect::<Vec<_>>());
    assert_eq!(new[0].tables[0].before.map(|rows| rows.count), Some(103), "{:?}", new[0].tables);
    let status: serde_json::Value = reqwest::get(agent.url("/status")).await.unwrap().json().await.unwrap();
    for alarm in ["decode", "scan", "gap", "diverged", "server", "archive"] {
        assert!(status["alarms"].get(alarm).is_none(), "{status:#}");
    }
    let told = restore(&scratch.join("none"), &flags, &["--to", "latest", "--dry-run"]).expect(0).json();
    let path = told["plan"]["path"].as_array().unwrap().iter().map(|leg| leg["timeline"].as_u64().unwrap());
    assert_eq!(path.collect::<Vec<_>>(), [1, 2]);

    // By hand, as is said: it is as it was.
    cluster.stop(StopMode::Fast).await;
    fs::rename(&original, original.with_file_name("undone")).unwrap();
    fs::rename(&kept, &original).unwrap();
    cluster.start().await;
    assert_eq!(cluster.number("SELECT count(*) FROM t").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_command_restores_and_swaps_and_a_bare_one_leaves_recovery_to_others() {
    let mut cluster = Cluster::builder().wal_segsize_mib(1).start().await;
    let scratch = Scratch::new();
    cluster.sql("CREATE TABLE t AS SELECT generate_series(1, 100) AS id").await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup"], words.as_slice()].concat()).expect(0);
    let good = cluster.lsn().await.to_string();
    cluster.sql("DROP TABLE t").await;
    agent.wait_archived(&cluster, cluster.lsn().await, DEADLINE).await;
    let original = cluster.data_dir().to_owned();
    let restored = original.with_file_name("restored");
    let swap = ["--to", &good, "--swap", original.to_str().unwrap()];
    let refused = restore(&restored, &flags, &swap).expect(1).to_string();
    assert!(refused.contains("belongs to a server that runs") && !restored.exists(), "{refused}");
    cluster.stop(StopMode::Fast).await;
    let told = restore(&restored, &flags, &swap).expect(0).json();
    assert_eq!(told["handover"]["timeline"], 2, "{told:#}");
    cluster.start().await;
    assert_eq!(cluster.number("SELECT count(*) FROM t").await, 100);

    // Bare: nothing of ours in it, and `wal-fetch` is all that a manager's own settings need.
    let bare = scratch.join("bare");
    restore(&bare, &flags, &["--to", "latest", "--bare"]).expect(0);
    assert!(names(&bare).iter().all(|name| !name.starts_with("walguard") && !name.ends_with(".signal")));
    assert!(!fs::read_to_string(bare.join("postgresql.auto.conf")).unwrap().contains("restore_command"));
    assert!(bare.join("backup_label").exists());
}
