//! The harness keeps its promises, on every major that is installed.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{Cluster, Ledger, Proxy, StopMode, majors};

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_of_every_major_starts_with_the_asked_segment_size() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).wal_segsize_mib(1).start().await;
        assert_eq!(cluster.text("SHOW wal_segment_size").await, "1MB");
        assert_eq!(cluster.text("SHOW data_checksums").await, "on");
        assert_eq!(cluster.number("SHOW server_version_num").await / 10_000, i64::from(major));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_equals_its_model_and_survives_a_killed_server() {
    let mut cluster = Cluster::builder().wal_segsize_mib(1).checksums(false).start().await;
    let mut ledger = Ledger::create(&cluster, 7).await;
    ledger.run(30).await;
    cluster.kill9().await;
    cluster.start().await;
    ledger.assert_at(30, &cluster.client().await).await;
    let times: Vec<_> = ledger.commits().iter().map(|commit| (commit.time, commit.after)).collect();
    assert!(times.is_sorted(), "commits of one session are in order: {times:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_follows_and_takes_over_on_a_new_timeline() {
    let major = majors().pop().unwrap();
    let mut primary = Cluster::builder().major(major).start().await;
    let mut ledger = Ledger::create(&primary, 8).await;
    ledger.run(5).await;
    let standby = primary.standby().await;
    ledger.run(5).await;
    standby.wait_replayed(primary.lsn().await).await;
    primary.stop(StopMode::Fast).await;
    standby.promote().await;
    ledger.follow(&standby).await;
    ledger.run(5).await;
    ledger.assert_at(15, &standby.client().await).await;
    standby.sql("CHECKPOINT").await;
    assert_eq!(standby.text("SELECT timeline_id FROM pg_control_checkpoint()").await, "2");
}

#[tokio::test]
async fn a_proxy_passes_stalls_cuts_and_refuses() {
    let echo = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(echo.local_addr().unwrap().port()).await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    let mut stream = tokio::net::TcpStream::connect(proxy.address()).await.unwrap();
    let mut answer = [0; 4];
    stream.write_all(b"ping").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");

    proxy.stall(true);
    stream.write_all(b"held").await.unwrap();
    let silent = tokio::time::timeout(Duration::from_millis(50), stream.read_exact(&mut answer)).await;
    assert!(silent.is_err(), "a stalled proxy passes nothing on");
    proxy.stall(false);
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"held");

    proxy.cut();
    assert_eq!(stream.read(&mut answer).await.unwrap_or(0), 0);
    proxy.refuse(true);
    let mut refused = tokio::net::TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(refused.read(&mut answer).await.unwrap_or(0), 0);
}
