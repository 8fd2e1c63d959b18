//! An S3 of another make, the moto server: conformance, and a bucket whose versions nobody can delete.
//!
//! These tests run where `WALGUARD_MOTO_SERVER` names the program; `scripts/test` installs it and sets that.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::types::{
    DefaultRetention, ObjectLockConfiguration, ObjectLockEnabled, ObjectLockRetentionMode, ObjectLockRule,
};
use bytes::Bytes;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use walguard::pg::{Lsn, SegmentName, SegmentSize, ServerVersion, SystemId, TimelineId};
use walguard::progress::Silent;
use walguard::repo::catalog::CatalogScope;
use walguard::repo::cluster::ClusterIdentity;
use walguard::repo::lease::{Claim, LeaseError};
use walguard::repo::retention::{ExpirePlan, Keep};
use walguard::repo::store::{Checksum, S3Config, S3Store, Store};
use walguard::repo::{Created, RepoError, Repository, SameContent, frame};

use crate::store_conformance::conforms;

const PORT_TRIES: u32 = 5;

/// A running moto server. It is killed with this value.
struct Moto {
    process: Child,
    endpoint: String,
    keys: tempfile::TempDir,
}

impl Moto {
    /// `None` where it is not installed.
    async fn start() -> Option<Self> {
        let Some(program) = std::env::var_os("WALGUARD_MOTO_SERVER").filter(|program| !program.is_empty()) else {
            eprintln!("skipped: WALGUARD_MOTO_SERVER does not name the moto server; `scripts/test` installs it");
            return None;
        };
        let keys = tempfile::tempdir().unwrap();
        std::fs::write(keys.path().join("id"), "testing").unwrap();
        for _ in 0..PORT_TRIES {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut command = Command::new(&program);
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).current_dir("/");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut process = command.spawn().expect("the moto server starts");
            let address = format!("127.0.0.1:{port}");
            let mut is_up = false;
            let begin = Instant::now();
            while !is_up && process.try_wait().unwrap().is_none() {
                assert!(begin.elapsed() < Duration::from_secs(60), "the moto server does not answer");
                tokio::time::sleep(Duration::from_millis(50)).await;
                is_up = tokio::net::TcpStream::connect(&address).await.is_ok();
            }
            if is_up {
                return Some(Self { process, endpoint: format!("http://{address}"), keys });
            }
        }
        panic!("the moto server finds no free port");
    }

    fn client(&self) -> aws_sdk_s3::Client {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(&self.endpoint)
            .region(Region::new("us-east-1"))
            .force_path_style(true)
            .credentials_provider(Credentials::new("testing", "testing", None, None, "test"));
        aws_sdk_s3::Client::from_conf(config.build())
    }

    fn config(&self) -> S3Config {
        let key = Some(self.keys.path().join("id"));
        S3Config {
            endpoint: Some(self.endpoint.clone()),
            region: Some("us-east-1".to_owned()),
            access_key_id_file: key.clone(),
            secret_access_key_file: key,
            ..S3Config::default()
        }
    }

    /// A bucket that keeps every version for a day, whoever asks.
    async fn locked_bucket(&self, name: &str) {
        let client = self.client();
        client.create_bucket().bucket(name).object_lock_enabled_for_bucket(true).send().await.unwrap();
        let retention = DefaultRetention::builder().mode(ObjectLockRetentionMode::Compliance).days(1).build();
        let lock = ObjectLockConfiguration::builder()
            .object_lock_enabled(ObjectLockEnabled::Enabled)
            .rule(ObjectLockRule::builder().default_retention(retention).build());
        client
            .put_object_lock_configuration()
            .bucket(name)
            .object_lock_configuration(lock.build())
            .send()
            .await
            .unwrap();
    }

    /// Versions of objects (not deletion markers) in a bucket.
    async fn versions(&self, bucket: &str) -> usize {
        self.client().list_object_versions().bucket(bucket).send().await.unwrap().versions().len()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill(); // it may have ended by itself
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn an_s3_of_another_make_conforms() {
    let Some(moto) = Moto::start().await else { return };
    moto.client().create_bucket().bucket("plain").send().await.unwrap();
    for checksum in [Checksum::Md5, Checksum::Crc32c, Checksum::None] {
        let config = S3Config { checksum, ..moto.config() };
        let store = S3Store::connect(&config, "plain", &format!("{checksum:?}")).await.unwrap();
        store.probe_create_once("main/probe/1").await.unwrap();
        store.delete("main/probe/1").await.unwrap();
        conforms(&store).await;
    }
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_told_as_such() {
    let Some(moto) = Moto::start().await else { return };
    let store = S3Store::connect(&moto.config(), "missing", "it").await.unwrap();
    let error = store.replace("main/a", Bytes::from_static(b"a")).await.unwrap_err();
    assert!(error.hint().is_some_and(|hint| hint.contains("make the bucket `missing` first")), "{error:?}");
}

fn segment(number: u64) -> SegmentName {
    let size = SegmentSize::new(1 << 20).unwrap();
    SegmentName::at(TimelineId::FIRST, Lsn::new(number << 20), size)
}

#[tokio::test]
async fn a_locked_bucket_archives_leases_and_expires() {
    let Some(moto) = Moto::start().await else { return };
    moto.locked_bucket("locked").await;
    let store = S3Store::connect(&moto.config(), "locked", "it").await.unwrap();
    let repo = Repository::over(Arc::new(store), "main").unwrap();
    let probe = repo.probe().await.unwrap();
    assert_eq!(probe.delete_problem, None, "a deletion leaves a marker, and that is allowed");
    repo.initialize(&ClusterIdentity {
        format: 1,
        system_id: SystemId::new(7),
        server_version: ServerVersion::new(170_000),
        segment_size: SegmentSize::new(1 << 20).unwrap(),
        created_at: Timestamp::now(),
    })
    .await
    .unwrap();

    // Archiving: once, again with the same content, and with other content.
    let same = SameContent::Compressed { limit: 1 << 20 };
    for number in 1..=3 {
        let (key, content) = (repo.layout().segment(&segment(number)), vec![number as u8; 1 << 20]);
        let put = |content: &[u8], level| repo.put_once(&key, frame::compress(content, level).into(), same);
        assert_eq!(put(&content, 1).await.unwrap(), Created::New);
        let versions = moto.versions("locked").await;
        assert_eq!(put(&content, 3).await.unwrap(), Created::Exists);
        assert!(matches!(put(&vec![9; 1 << 20], 1).await, Err(RepoError::Conflict { .. })));
        assert_eq!(repo.read_segment(&segment(number)).await.unwrap().bytes, content);
        if probe.create_once {
            assert_eq!(moto.versions("locked").await, versions, "nothing was written twice");
        }
    }

    // The lease is replaced; old versions stay behind it.
    let claim = |holder: &str| Claim {
        holder: holder.to_owned(),
        host: "host".to_owned(),
        pid: 1,
        time_to_live: Duration::from_secs(60),
    };
    let now = Timestamp::now();
    let held = repo.acquire_lease(&claim("a"), now, |_| false).await.unwrap();
    let held = repo.renew_lease(&claim("a"), &held, now, None).await.unwrap();
    assert!(matches!(repo.acquire_lease(&claim("b"), now, |_| false).await, Err(LeaseError::Held(_))));
    repo.release_lease(&held, now, None).await.unwrap();
    repo.acquire_lease(&claim("b"), now, |_| false).await.unwrap();

    // Expiry: what is expired is no longer there, though the bucket keeps its versions.
    let before = moto.versions("locked").await;
    let unlimited = repo.plan_expire(&Keep { keep_backups: Some(1), keep_for: None }, now).await.unwrap();
    assert!(unlimited.is_empty(), "without a backup nothing goes");
    let plan = ExpirePlan { wal_before: Some(segment(3).start()), ..unlimited };
    let expired = repo.expire(&plan, &Silent, &CancellationToken::new()).await.unwrap();
    assert_eq!(expired.objects, 2);
    let catalog = repo.catalog(CatalogScope::Everything).await.unwrap();
    assert_eq!(catalog.timelines[&TimelineId::FIRST].ranges.as_slice()[0].from, segment(3).start());
    assert!(repo.read_segment(&segment(1)).await.unwrap_err().is_not_found());
    assert_eq!(moto.versions("locked").await, before);
}
