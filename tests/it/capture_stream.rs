//! Slots and streams: what is received is what the server wrote, through restarts, cuts and promotions.

use std::time::Duration;

use walguard::capture::{
    CaptureError, Config, ConnInfo, Created, Environment, Feedback, Start, StreamEvent, WalStream, Walsender,
};
use walguard::pg::{Lsn, Position, SegmentName, SegmentSize, TimelineHistory, TimelineId};

use crate::capture_connect::{Certificates, connect};
use crate::harness::{Cluster, Proxy, StopMode, majors, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

async fn start(walsender: Walsender, slot: Option<&str>, from: Position) -> WalStream {
    match walsender.start_physical(slot, from).await.unwrap() {
        Start::Streaming(stream) => stream,
        Start::EndOfTimeline { next, .. } => panic!("the timeline ends; next is {next}"),
    }
}

/// Receives until `end`, and gives the bytes.
async fn receive_to(stream: &mut WalStream, end: Lsn) -> Vec<u8> {
    let mut bytes = Vec::new();
    let receive = async {
        while stream.position().lsn < end {
            match stream.next().await.unwrap() {
                StreamEvent::Wal { data, .. } => bytes.extend_from_slice(&data),
                StreamEvent::Keepalive { .. } => {}
                StreamEvent::EndOfTimeline { next } => panic!("the timeline ended; next is {next:?}"),
            }
        }
    };
    tokio::time::timeout(DEADLINE, receive).await.expect("WAL arrives");
    bytes
}

/// The error that a stream ends with.
async fn error_of(stream: &mut WalStream) -> CaptureError {
    let receive = async {
        loop {
            if let Err(error) = stream.next().await {
                return error;
            }
        }
    };
    tokio::time::timeout(DEADLINE, receive).await.expect("the stream ends")
}

/// What the server's segment files hold from `from` on.
fn on_disk(cluster: &Cluster, from: Position, bytes: usize) -> Vec<u8> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut content = Vec::new();
    let mut name = SegmentName::at(from.timeline, from.lsn, size);
    while content.len() < bytes + size.bytes() as usize {
        match std::fs::read(cluster.data_dir().join("pg_wal").join(name.to_string())) {
            Ok(segment) => content.extend(segment),
            Err(_) => break,
        }
        name = name.next();
    }
    let offset = size.offset_of(from.lsn) as usize;
    content[offset..offset + bytes].to_vec()
}

#[tokio::test]
async fn what_is_streamed_is_what_the_server_wrote() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).wal_segsize_mib(1).conf("wal_keep_size", "100MB").start().await;
        let mut walsender = connect(&cluster.conninfo()).await.unwrap();
        assert_eq!(walsender.server_version().major(), major);
        assert_eq!(walsender.show("wal_segment_size").await.unwrap(), "1MB");
        let system = walsender.identify_system().await.unwrap();
        let told = cluster.text("SELECT system_identifier FROM pg_control_system()").await;
        assert_eq!(system.system_id.to_string(), told);
        let from = Position { timeline: system.timeline, lsn: system.flush_lsn.align_down(1 << 20) };
        let mut stream = start(walsender, None, from).await;
        cluster.fill(5).await;
        cluster.sql("CREATE TABLE flushed AS SELECT 1").await;
        let end = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        let bytes = receive_to(&mut stream, end).await;
        assert!(bytes.len() > 5 << 20, "{major}: {}", bytes.len());
        assert_eq!(bytes, on_disk(&cluster, from, bytes.len()), "{major}");

        // The connection is good for more.
        let mut walsender = stream.finish().await.unwrap();
        assert_eq!(walsender.identify_system().await.unwrap().system_id, system.system_id);
    }
}

#[tokio::test]
async fn wal_is_the_same_over_tcp_tls_and_a_unix_socket() {
    let certificates = Certificates::make();
    let cluster = Cluster::builder()
        .wal_segsize_mib(1)
        .conf("wal_keep_size", "100MB")
        .conf("ssl", "on")
        .conf("ssl_cert_file", &certificates.text("server.crt"))
        .conf("ssl_key_file", &certificates.text("server.key"))
        .start()
        .await;
    let begin: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    let from = Position { timeline: TimelineId::FIRST, lsn: begin.align_down(1 << 20) };
    cluster.fill(5).await;
    cluster.sql("CREATE TABLE flushed AS SELECT 1").await;
    let end = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    let tcp = cluster.conninfo();
    for (text, encrypted) in [
        (format!("{tcp} sslmode=disable"), false),
        (format!("{tcp} sslmode=require"), true),
        (cluster.conninfo_socket(), false),
    ] {
        let walsender = connect(&text).await.unwrap();
        assert_eq!(walsender.is_encrypted(), encrypted, "{text}");
        let bytes = receive_to(&mut start(walsender, None, from).await, end).await;
        assert!(bytes.len() > 5 << 20, "{text}");
        assert_eq!(bytes, on_disk(&cluster, from, bytes.len()), "{text}");
    }
}

#[tokio::test]
async fn no_byte_is_lost_to_a_cancelled_call() {
    let cluster = Cluster::builder().wal_segsize_mib(1).conf("wal_keep_size", "100MB").start().await;
    let mut walsender = connect(&cluster.conninfo()).await.unwrap();
    let system = walsender.identify_system().await.unwrap();
    let from = Position { timeline: system.timeline, lsn: system.flush_lsn.align_down(1 << 20) };
    let mut stream = start(walsender, None, from).await;
    cluster.fill(8).await;
    cluster.sql("CREATE TABLE flushed AS SELECT 1").await;
    let end: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    let mut bytes = Vec::new();
    let mut cancelled = 0;
    while stream.position().lsn < end {
        let feedback = Feedback { write: stream.position().lsn, ..Feedback::default() };
        tokio::select! {
            biased;
            event = stream.next() => {
                if let StreamEvent::Wal { data, .. } = event.unwrap() {
                    bytes.extend_from_slice(&data);
                }
            }
            () = std::future::ready(()) => {
                cancelled += 1;
                tokio::task::yield_now().await; // the call was dropped; let the socket become ready
            }
        }
        stream.send_feedback(feedback).await.unwrap();
    }
    assert!(cancelled > 0, "nothing was cancelled");
    assert_eq!(bytes, on_disk(&cluster, from, bytes.len()));
}

#[tokio::test]
async fn a_slot_holds_wal_from_its_creation_on_and_advances_with_flush() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).start().await;
        let mut walsender = connect(&cluster.conninfo()).await.unwrap();
        assert_eq!(walsender.read_slot("walguard").await.unwrap(), None);
        assert_eq!(walsender.create_physical_slot("walguard").await.unwrap(), Created::New);
        assert_eq!(walsender.create_physical_slot("walguard").await.unwrap(), Created::Exists);
        let slot = walsender.read_slot("walguard").await.unwrap().unwrap();
        let restart = slot.restart.expect("WAL is reserved at once");
        assert!(walsender.read_slot("it's").await.is_err());

        let mut stream = start(walsender, Some("walguard"), restart).await;
        cluster.sql("CREATE TABLE t AS SELECT 1").await;
        let end: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        receive_to(&mut stream, end).await;
        stream.send_feedback(Feedback { write: end, flush: end, apply: end, reply_requested: false }).await.unwrap();
        let query = format!("SELECT restart_lsn >= '{end}' FROM pg_replication_slots WHERE slot_name = 'walguard'");
        wait_for("the slot to advance", DEADLINE, || async { cluster.text(&query).await == "t" }).await;

        // Somebody else wants it.
        let mut other = connect(&cluster.conninfo()).await.unwrap();
        let error = other.drop_slot("walguard").await.unwrap_err();
        assert!(matches!(error, CaptureError::SlotInUse(_)), "{error:?}");
        let error = other.start_physical(Some("walguard"), restart).await.unwrap_err();
        assert!(matches!(error, CaptureError::SlotInUse(_)) && error.is_transient(), "{error:?}");

        let mut walsender = stream.finish().await.unwrap();
        walsender.drop_slot("walguard").await.unwrap();
        let error = walsender.drop_slot("walguard").await.unwrap_err();
        assert!(matches!(error, CaptureError::SlotMissing(_)), "{error:?}");
        let error = walsender.start_physical(Some("walguard"), restart).await.unwrap_err();
        assert!(matches!(error, CaptureError::SlotMissing(_)), "{error:?}");
    }
}

#[tokio::test]
async fn a_synchronous_commit_waits_for_flush_and_for_nothing_else() {
    let cluster = Cluster::builder().start().await;
    let mut walsender = connect(&cluster.conninfo()).await.unwrap();
    walsender.create_physical_slot("walguard").await.unwrap();
    let restart = walsender.read_slot("walguard").await.unwrap().unwrap().restart.unwrap();
    let mut stream = start(walsender, Some("walguard"), restart).await;
    cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'walguard'").await;
    cluster.sql("SELECT pg_reload_conf()").await;
    wait_for("the setting", DEADLINE, || async { cluster.text("SHOW synchronous_standby_names").await == "walguard" })
        .await;
    let client = cluster.client().await;
    let mut commit = tokio::spawn(async move { client.batch_execute("CREATE TABLE t AS SELECT 1").await });
    let wait_event = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let acknowledged = async {
        loop {
            let waits = cluster.text(wait_event).await == "1";
            // Received is not durable: it keeps waiting.
            let write = stream.position().lsn;
            stream.send_feedback(Feedback { write, ..Feedback::default() }).await.unwrap();
            if waits {
                assert!(!commit.is_finished(), "the commit did not wait for flush");
                let end = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
                receive_to(&mut stream, end).await;
                let feedback = Feedback { write: end, flush: end, apply: end, reply_requested: false };
                stream.send_feedback(feedback).await.unwrap();
                return (&mut commit).await;
            }
        }
    };
    tokio::time::timeout(DEADLINE, acknowledged).await.expect("the commit returns").unwrap().unwrap();
}

#[tokio::test]
async fn wal_that_is_gone_is_told_as_such() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).wal_segsize_mib(1).conf("max_slot_wal_keep_size", "1MB");
        let cluster = cluster.conf("min_wal_size", "2MB").conf("max_wal_size", "3MB").start().await;
        let mut walsender = connect(&cluster.conninfo()).await.unwrap();
        walsender.create_physical_slot("walguard").await.unwrap();
        let restart = walsender.read_slot("walguard").await.unwrap().unwrap().restart.unwrap();
        cluster.fill(6).await;
        cluster.sql("CREATE TABLE flushed AS SELECT 1").await;
        cluster.sql("CHECKPOINT").await;
        let error = match walsender.start_physical(Some("walguard"), restart).await {
            Ok(Start::Streaming(mut stream)) => error_of(&mut stream).await,
            Ok(Start::EndOfTimeline { next, .. }) => panic!("{next}"),
            Err(error) => error,
        };
        assert!(matches!(error, CaptureError::WalRemoved(_)), "{major}: {error:?}");
        assert!(!error.is_transient() && error.hint().is_some());
        // Without a slot it is the same.
        let error = match connect(&cluster.conninfo()).await.unwrap().start_physical(None, restart).await {
            Ok(Start::Streaming(mut stream)) => error_of(&mut stream).await,
            Ok(Start::EndOfTimeline { next, .. }) => panic!("{next}"),
            Err(error) => error,
        };
        assert!(matches!(error, CaptureError::WalRemoved(_)), "{major}: {error:?}");
    }
}

#[tokio::test]
async fn a_position_past_the_servers_end_is_told_as_such() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).start().await;
        let walsender = connect(&cluster.conninfo()).await.unwrap();
        let from = Position { timeline: TimelineId::FIRST, lsn: Lsn::new(0xFF_0000_0000) };
        let error = error_of(&mut start(walsender, None, from).await).await;
        assert!(matches!(error, CaptureError::AheadOfServer(_)), "{major}: {error:?}");
    }
}

#[tokio::test]
async fn a_promotion_ends_the_timeline_and_names_the_next() {
    for major in majors() {
        let primary = Cluster::builder().major(major).start().await;
        let standby = primary.standby().await;
        let mut walsender = connect(&standby.conninfo()).await.unwrap();
        let system = walsender.identify_system().await.unwrap();
        let from = Position { timeline: system.timeline, lsn: system.flush_lsn.align_down(16 << 20) };
        let mut stream = start(walsender, None, from).await;
        standby.promote().await;
        let ended = async {
            loop {
                if let StreamEvent::EndOfTimeline { next } = stream.next().await.unwrap() {
                    return next.expect("the next timeline is named");
                }
            }
        };
        let next = tokio::time::timeout(DEADLINE, ended).await.expect("the timeline ends");
        assert_eq!(next.timeline.get(), 2);
        assert_eq!(stream.next().await.unwrap(), StreamEvent::EndOfTimeline { next: Some(next) }, "it stays ended");
        assert_eq!(stream.position().lsn, next.lsn, "everything up to the switch was sent");

        let mut walsender = stream.finish().await.unwrap();
        let (name, content) = walsender.timeline_history(next.timeline).await.unwrap();
        assert_eq!(name, "00000002.history");
        let history = TimelineHistory::parse(next.timeline, std::str::from_utf8(&content).unwrap()).unwrap();
        assert_eq!(history.end_of(system.timeline), Some(next.lsn));

        // The end of the old timeline gives the same answer, without a stream.
        let end = Position { timeline: system.timeline, lsn: next.lsn };
        let Start::EndOfTimeline { walsender, next: again } = walsender.start_physical(None, end).await.unwrap() else {
            panic!("{major}: a stream");
        };
        assert_eq!(again, next);
        let mut stream = start(walsender, None, next).await;
        standby.sql("CREATE TABLE after AS SELECT 1").await;
        let flushed = standby.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        receive_to(&mut stream, flushed).await;

        // Past the switch point, the old timeline is not this server's history.
        let past = Position { timeline: system.timeline, lsn: next.lsn + 1 };
        let error = connect(&standby.conninfo()).await.unwrap().start_physical(None, past).await.unwrap_err();
        assert!(matches!(error, CaptureError::Diverged(_)), "{major}: {error:?}");
        let error = connect(&standby.conninfo()).await.unwrap().timeline_history(TimelineId::new(9).unwrap()).await;
        assert!(error.is_err());
    }
}

/// A stream through a proxy that gives up after a second.
async fn stream_through(proxy: &Proxy) -> WalStream {
    let config = Config {
        conninfo: format!("host=127.0.0.1 port={} user=walguard", proxy.port()),
        receive_timeout: Duration::from_secs(1),
        ..Config::default()
    };
    let info = ConnInfo::from_config(&config, &Environment::default()).unwrap();
    let mut walsender = Walsender::connect(&info).await.unwrap();
    let system = walsender.identify_system().await.unwrap();
    start(walsender, None, Position { timeline: system.timeline, lsn: system.flush_lsn }).await
}

#[tokio::test]
async fn a_silent_server_that_answers_is_kept_and_one_that_does_not_is_given_up() {
    let cluster = Cluster::builder().start().await;
    let proxy = Proxy::start(cluster.port()).await;
    let mut stream = stream_through(&proxy).await;
    // An idle server says nothing for 30 s: only because it is asked, it is heard within the second.
    let kept = async {
        let mut signs = 0;
        while signs < 4 {
            if let StreamEvent::Keepalive { .. } = stream.next().await.unwrap() {
                signs += 1;
            }
        }
    };
    tokio::time::timeout(DEADLINE, kept).await.expect("signs of life");
    proxy.stall(true);
    let error = error_of(&mut stream).await;
    assert!(matches!(error, CaptureError::Unreachable { .. }) && error.is_transient(), "{error:?}");
    assert!(error.to_string().contains("nothing was heard"), "{error}");

    proxy.stall(false);
    let mut stream = stream_through(&proxy).await;
    proxy.cut();
    let error = error_of(&mut stream).await;
    assert!(matches!(error, CaptureError::Unreachable { .. }) && error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn a_server_that_stops_in_any_way_is_a_passing_trouble() {
    let mut cluster = Cluster::builder().start().await;
    for mode in [StopMode::Smart, StopMode::Fast, StopMode::Immediate] {
        let mut walsender = connect(&cluster.conninfo()).await.unwrap();
        let system = walsender.identify_system().await.unwrap();
        let from = Position { timeline: system.timeline, lsn: system.flush_lsn };
        let mut stream = start(walsender, None, from).await;
        // The server waits until what it sent is received: the two must run at once.
        let (error, ()) = tokio::join!(follow_to_the_end(&mut stream), cluster.stop(mode));
        assert!(error.is_transient(), "{mode:?}: {error:?}");
        let error = connect(&cluster.conninfo()).await.unwrap_err();
        assert!(error.is_transient(), "{mode:?}: {error:?}");
        cluster.start().await;
    }
}

/// As [`error_of`], telling the server what was received as an agent does.
async fn follow_to_the_end(stream: &mut WalStream) -> CaptureError {
    loop {
        if let Err(error) = stream.next().await {
            return error;
        }
        let at = stream.position().lsn;
        let feedback = Feedback { write: at, flush: at, apply: at, reply_requested: false };
        if let Err(error) = stream.send_feedback(feedback).await {
            return error;
        }
    }
}
