//! Base backups over the replication connection, and the preflight.

use std::collections::BTreeMap;
use std::io::Read as _;

use walguard::capture::probe::{Level, preflight};
use walguard::capture::{BackupEvent, BackupStream, BaseBackupOptions, Config, Tablespace};
use walguard::pg::{Oid, Position};

use crate::capture_connect::{connect, info};
use crate::harness::{Cluster, Scratch, majors};

/// A base backup, taken apart.
#[derive(Default)]
struct Taken {
    start: Option<Position>,
    stop: Option<Position>,
    tablespaces: Vec<Tablespace>,
    archives: BTreeMap<Option<Oid>, Vec<u8>>,
    manifest: Option<Vec<u8>>,
}

async fn take(mut stream: BackupStream) -> Taken {
    let mut taken = Taken::default();
    let mut open = None;
    while let Some(event) = stream.next().await.unwrap() {
        match event {
            BackupEvent::Begin { start, tablespaces } => {
                taken.start = Some(start);
                taken.tablespaces = tablespaces;
            }
            BackupEvent::ArchiveBegin { name, .. } => {
                assert!(open.is_none() && taken.manifest.is_none(), "one after the other");
                taken.archives.insert(name, Vec::new());
                open = Some(name);
            }
            BackupEvent::Data(data) => taken.archives.get_mut(&open.expect("in an archive")).unwrap().extend(data),
            BackupEvent::Progress(_) => {}
            BackupEvent::ArchiveEnd => assert!(open.take().is_some()),
            BackupEvent::ManifestBegin => {
                assert!(open.is_none());
                taken.manifest = Some(Vec::new());
            }
            BackupEvent::ManifestData(data) => taken.manifest.as_mut().expect("in the manifest").extend(data),
            BackupEvent::End { stop } => taken.stop = Some(stop),
        }
    }
    assert!(open.is_none());
    assert_eq!(stream.next().await.unwrap(), None, "it stays ended");
    taken
}

/// Names and sizes of what a tar archive holds.
fn members(archive: &[u8]) -> BTreeMap<String, u64> {
    assert!(archive.ends_with(&[0; 1024]), "the archive has its trailer");
    let mut members = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        members.insert(path, content.len() as u64);
    }
    members
}

#[tokio::test]
async fn a_base_backup_is_complete_on_every_major() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).start().await;
        let place = Scratch::new();
        let location = place.dir("fast");
        cluster.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", location.display())).await;
        cluster.sql("CREATE TABLE t TABLESPACE fast AS SELECT generate_series(1, 1000) AS n").await;
        let oid: u32 = cluster.text("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'").await.parse().unwrap();
        let options = BaseBackupOptions { label: "it's a label".to_owned(), ..BaseBackupOptions::default() };
        let taken = take(connect(&cluster.conninfo()).await.unwrap().base_backup(&options).await.unwrap()).await;

        let (start, stop) = (taken.start.unwrap(), taken.stop.unwrap());
        assert!(start < stop, "{major}: {start} {stop}");
        let listed: Vec<_> = taken.tablespaces.iter().map(|t| (t.oid, t.location.clone())).collect();
        assert_eq!(listed, [(Some(Oid(oid)), location.display().to_string()), (None, String::new())], "{major}");
        assert!(taken.tablespaces.iter().all(|t| t.size_kib.is_some()), "sizes are announced");
        let base = members(&taken.archives[&None]);
        for name in ["backup_label", "tablespace_map", "PG_VERSION", "global/pg_control"] {
            assert!(base.contains_key(name), "{major}: {name}");
        }
        let path = cluster.text("SELECT pg_relation_filepath('t')").await;
        let path = path.strip_prefix(&format!("pg_tblspc/{oid}/")).unwrap().to_owned();
        let size = members(&taken.archives[&Some(Oid(oid))]).get(&path).copied().unwrap_or_default();
        assert!(size > 0 && size % 8_192 == 0, "{major}: {path} has {size} bytes");
        let manifest: serde_json::Value = serde_json::from_slice(&taken.manifest.unwrap()).unwrap();
        assert_eq!(manifest["WAL-Ranges"][0]["End-LSN"], stop.lsn.to_string(), "{major}");
        assert_eq!(manifest["WAL-Ranges"][0]["Start-LSN"], start.lsn.to_string(), "{major}");
    }
}

#[tokio::test]
async fn a_base_backup_without_manifest_of_a_standby_under_a_rate_limit_is_complete() {
    let primary = Cluster::builder().start().await;
    let standby = primary.standby().await;
    let options = BaseBackupOptions { manifest: false, max_rate_kib: Some(1 << 20), ..BaseBackupOptions::default() };
    let taken = take(connect(&standby.conninfo()).await.unwrap().base_backup(&options).await.unwrap()).await;
    assert!(taken.manifest.is_none() && taken.stop.is_some());
    assert!(members(&taken.archives[&None]).contains_key("backup_label"));
}

#[tokio::test]
async fn a_backup_that_the_server_refuses_is_told_as_such() {
    let cluster = Cluster::builder().start().await;
    let options = BaseBackupOptions { max_rate_kib: Some(1), ..BaseBackupOptions::default() };
    let mut stream = connect(&cluster.conninfo()).await.unwrap().base_backup(&options).await.unwrap();
    let error = stream.next().await.unwrap_err();
    assert!(error.to_string().contains("MAX_RATE"), "{error}");
    assert!(!error.is_transient());
}

#[tokio::test]
async fn preflight_finds_nothing_in_the_way_of_a_plain_server() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).start().await;
        let config = Config::default();
        let findings = preflight(&info(&cluster.conninfo()), &config).await.unwrap();
        let level = |topic: &str| findings.iter().find(|finding| finding.topic == topic).map(|finding| finding.level);
        assert!(findings.iter().all(|finding| finding.level < Level::Error), "{major}: {findings:#?}");
        assert_eq!(level("slot"), Some(Level::Warning), "{major}: it does not exist yet");
        assert_eq!(level("max_slot_wal_keep_size"), Some(Level::Warning), "{major}");
        for topic in ["version", "clock", "pg_monitor", "role", "wal_level", "max_wal_senders", "data_checksums", "tls"]
        {
            assert_eq!(level(topic), Some(Level::Ok), "{major}: {topic}: {findings:#?}");
        }
        connect(&cluster.conninfo()).await.unwrap().create_physical_slot("walguard").await.unwrap();
        let findings = preflight(&info(&cluster.conninfo()), &config).await.unwrap();
        let slot = findings.iter().find(|finding| finding.topic == "slot").unwrap();
        assert_eq!(slot.level, Level::Ok, "{major}: {slot:?}");
    }
}

#[tokio::test]
async fn preflight_works_when_only_replication_is_allowed() {
    let cluster = Cluster::builder()
        .hba("host replication walguard 127.0.0.1/32 trust")
        .hba("host all walguard 127.0.0.1/32 reject")
        .conf("wal_sender_timeout", "0")
        .conf("synchronous_standby_names", "")
        .start()
        .await;
    let findings = preflight(&info(&cluster.conninfo()), &Config::default()).await.unwrap();
    let level = |topic: &str| findings.iter().find(|finding| finding.topic == topic).map(|finding| finding.level);
    assert_eq!(level("sql"), Some(Level::Warning), "{findings:#?}");
    assert_eq!(level("wal_sender_timeout"), Some(Level::Warning));
    assert_eq!(level("clock"), Some(Level::Ok));
    assert_eq!(level("slot"), Some(Level::Warning));
}
