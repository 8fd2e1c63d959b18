//! Clusters that are laid out in unusual ways, and servers that do not come up.

use std::fs::{self, File};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::harness::{Agent, Cluster, Ledger, Restored, Scratch, command, give_away, restore, wait_for, walguard};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

fn backup(flags: &[String]) {
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup"], words.as_slice()].concat()).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_comes_back_at_the_place_that_is_named_for_it() {
    let cluster = Cluster::builder().wal_segsize_mib(1).start().await;
    let scratch = Scratch::new();
    let (old, new) = (scratch.dir("old"), scratch.join("new"));
    let client = cluster.client().await;
    client.batch_execute(&format!("CREATE TABLESPACE side LOCATION '{}'", old.display())).await.unwrap();
    cluster
        .sql("CREATE TABLE beside (i int) TABLESPACE side; INSERT INTO beside SELECT generate_series(1, 1000)")
        .await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    backup(&flags);
    cluster.sql("INSERT INTO beside SELECT generate_series(1, 500)").await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;

    // Its old place is not free: nothing is written.
    let refused = restore(&scratch.join("restored"), &flags, &["--to", "latest"]).expect(1).stderr();
    assert!(refused.contains("HINT: name another place: --tablespace"), "{refused}");
    let unknown = ["--to", "latest", "--tablespace", "/nowhere=/elsewhere"];
    let refused = restore(&scratch.join("restored"), &flags, &unknown).expect(1).stderr();
    assert!(refused.contains("no tablespace `/nowhere`") && refused.contains(old.to_str().unwrap()), "{refused}");
    assert!(!scratch.join("restored").exists());

    let place = format!("{}={}", old.display(), new.display());
    let mut restored = Restored::run(&flags, &["--to", "latest", "--tablespace", &place]);
    let client = restored.client().await;
    let count: i64 = client.query_one("SELECT count(*) FROM beside", &[]).await.unwrap().get(0);
    let location: String = client
        .query_one("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'side'", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!((count, location.as_str()), (1500, new.to_str().unwrap()));
    restored.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_settings_lie_elsewhere_comes_back_with_what_its_wal_needs() {
    // As Debian keeps them.
    let cluster = Cluster::builder().wal_segsize_mib(1).conf("max_connections", "77").create();
    let scratch = Scratch::new();
    let etc = scratch.dir("etc");
    for file in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::rename(cluster.data_dir().join(file), etc.join(file)).unwrap();
    }
    give_away(&etc);
    let log = File::create(scratch.join("log")).unwrap();
    let mut server = command(cluster.bin("postgres"));
    server.arg("-D").arg(cluster.data_dir());
    for (name, file) in
        [("config_file", "postgresql.conf"), ("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")]
    {
        server.arg("-c").arg(format!("{name}={}", etc.join(file).display()));
    }
    let mut server = server.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    wait_for("the server", ARCHIVE_DEADLINE, || async { cluster.try_client("postgres").await.is_ok() }).await;
    cluster.sql("CREATE ROLE walguard LOGIN REPLICATION; GRANT pg_monitor TO walguard").await;
    let mut ledger = Ledger::create(&cluster, 1).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    backup(&flags);
    ledger.run(5).await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    let mut restored = Restored::run(&flags, &["--to", "latest"]);
    let client = restored.client().await;
    ledger.assert_at(5, &client).await;
    let show: String = client.query_one("SHOW max_connections", &[]).await.unwrap().get(0);
    assert_eq!(show, "77");
    for file in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        assert!(restored.data_dir().join(file).exists(), "{file}");
    }
    restored.stop().await;
    kill_process(Pid::from_child(&server), Signal::QUIT).unwrap();
    server.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_never_archives_nor_connects_to_the_original_and_waits_for_no_standby() {
    let cluster = Cluster::builder().wal_segsize_mib(1).conf("archive_mode", "on").conf("archive_command", "/bin/true");
    let cluster = cluster.conf("primary_conninfo", "host=nowhere").start().await;
    let scratch = Scratch::new();
    let mut ledger = Ledger::create(&cluster, 1).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'walguard'").await;
    cluster.sql("SELECT pg_reload_conf()").await;
    backup(&flags);
    ledger.run(3).await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    let mut restored = Restored::run(&flags, &["--to", "latest", "--action", "promote"]);
    let client = restored.client().await;
    for (name, value) in [
        ("archive_mode", "off"),
        ("archive_command", "(disabled)"),
        ("primary_conninfo", ""),
        ("synchronous_standby_names", ""),
    ] {
        let shown: String = client.query_one(&format!("SHOW {name}"), &[]).await.unwrap().get(0);
        assert_eq!(shown, value, "{name}");
    }
    // With a standby to wait for this would never return.
    client.batch_execute("INSERT INTO ledger VALUES (-7, 7, '')").await.unwrap();
    restored.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_is_told_with_the_end_of_its_log() {
    let cluster = Cluster::builder().wal_segsize_mib(1).start().await;
    let scratch = Scratch::new();
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    // Installed there, not here.
    cluster.set_conf("shared_preload_libraries", "nonesuch");
    backup(&agent.flags());
    let told = restore(&scratch.join("restored"), &agent.flags(), &["--to", "latest"]).expect(1).stderr();
    for part in ["ended by itself", "could not access file \"nonesuch\"", "HINT: the server's log is"] {
        assert!(told.contains(part), "{part:?} is not in: {told}");
    }
}
