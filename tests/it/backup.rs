//! Base backups: what the repository holds is what the server sent, whole or not at all; and it comes back as it was.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use walguard::backoff::RetryPolicy;
use walguard::capture::{ConnInfo, Environment, Walsender};
use walguard::pg::{BLOCK_SIZE, Oid, SegmentName, SegmentSize};
use walguard::progress::{Progress, Silent};
use walguard::proto::{BackupManifest, Entry};
use walguard::repo::backup::{
    self, BackupError, Config, Origin, Request, Taken, manifest, page_checksum, reader::Reader,
};
use walguard::repo::layout::ArchiveName;
use walguard::repo::store::{Created, ListPage, ListRequest, LocalStore, Store, StoreError};
use walguard::repo::{Repository, SameContent, frame};
use walguard::restore::extract::{ExtractError, ExtractReport, Placement, extract};

use crate::harness::{self, Cluster, Scratch, StopMode, give_away, majors, wait_for};

const DEADLINE: Duration = Duration::from_secs(60);

/// The relation files that tests fill have some MiB: with parts of 1 MiB a backup has many.
fn small_parts() -> Config {
    Config { part_size: bytesize::ByteSize::mib(1), ..Config::default() }
}

pub(crate) async fn walsender(cluster: &Cluster) -> Walsender {
    let conninfo = ConnInfo::parse(&cluster.conninfo(), &Environment::default()).unwrap();
    Walsender::connect(&conninfo).await.unwrap()
}

/// A repository in a directory, made for the cluster.
pub(crate) async fn repository(scratch: &Scratch, cluster: &Cluster) -> Repository {
    over(Arc::new(LocalStore::new(scratch.dir("repo"))), cluster).await
}

async fn over(store: Arc<dyn Store>, cluster: &Cluster) -> Repository {
    let repository = Repository::over(store, "main").unwrap();
    let origin = Origin::ask(&mut walsender(cluster).await).await.unwrap();
    repository.initialize(&origin.identity()).await.unwrap();
    repository
}

async fn take_with(
    repository: &Repository,
    cluster: &Cluster,
    config: &Config,
    cancel: &CancellationToken,
    progress: &dyn Progress,
) -> Result<Taken, BackupError> {
    backup::run(repository, walsender(cluster).await, config, &Request::default(), progress, cancel).await
}

pub(crate) async fn take(repository: &Repository, cluster: &Cluster) -> Taken {
    take_with(repository, cluster, &small_parts(), &CancellationToken::new(), &Silent).await.unwrap()
}

async fn read_manifest(repository: &Repository, taken: &Taken) -> Arc<BackupManifest> {
    Arc::new(manifest::read(repository, &taken.info.label).await.unwrap())
}

async fn extract_to(
    repository: &Repository,
    manifest: &Arc<BackupManifest>,
    placement: &Placement,
) -> Result<ExtractReport, ExtractError> {
    extract(repository, manifest, placement, &Silent, &CancellationToken::new()).await
}

fn to(data_dir: &Path) -> Placement {
    Placement { data_dir: data_dir.to_owned(), ..Placement::default() }
}

/// Puts the WAL that the source still has where recovery looks for it.
fn copy_wal(source: &Cluster, data: &Path) {
    for entry in fs::read_dir(source.data_dir().join("pg_wal")).unwrap().flatten() {
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), data.join("pg_wal").join(entry.file_name())).unwrap();
        }
    }
    give_away(data);
}

/// Extracts, brings the source's WAL, and starts a server.
async fn restore(repository: &Repository, taken: &Taken, source: &Cluster, data: &Path) -> Cluster {
    extract_to(repository, &read_manifest(repository, taken).await, &to(data)).await.unwrap();
    copy_wal(source, data);
    Cluster::adopt(source.major(), data).await
}

/// Checks every file against Postgres's own manifest, as `pg_verifybackup` does, which not every major has here.
/// (Format: "Backup Manifest Format" in PostgreSQL's documentation.)
async fn assert_as_postgres_manifested(repository: &Repository, taken: &Taken, data: &Path) -> usize {
    let key = repository.layout().postgres_manifest(&taken.info.label);
    let stored = repository.store().read(&key, None).await.unwrap();
    let content = frame::decompress(&stored, 64 << 20).unwrap();
    let ours = manifest::read(repository, &taken.info.label).await.unwrap();
    assert_eq!(ours.postgres_manifest_bytes, content.len() as u64);
    assert_eq!(ours.postgres_manifest_blake3, blake3::hash(&content).as_bytes());
    let json: serde_json::Value = serde_json::from_slice(&content).unwrap();
    let files = json["Files"].as_array().unwrap();
    for file in files {
        let name = match file["Path"].as_str() {
            Some(path) => OsString::from(path),
            None => OsString::from_vec(unhex(file["Encoded-Path"].as_str().unwrap())),
        };
        let bytes = fs::read(data.join(&name)).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
        assert_eq!(bytes.len() as u64, file["Size"], "{}", name.display());
        assert_eq!(file["Checksum-Algorithm"], "CRC32C");
        let sum = unhex(file["Checksum"].as_str().unwrap());
        assert_eq!(crc32c::crc32c(&bytes).to_le_bytes(), sum[..], "{}", name.display());
    }
    files.len()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Every file below a directory, with its content and permissions.
fn tree(root: &Path) -> BTreeMap<PathBuf, (Vec<u8>, u32)> {
    let mut files = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let meta = entry.metadata().unwrap();
            let name = entry.path().strip_prefix(root).unwrap().to_owned();
            let mode = meta.permissions().mode() & 0o7777;
            if meta.is_dir() {
                files.insert(name, (Vec::new(), mode));
                folders.push(entry.path());
            } else if meta.is_file() {
                files.insert(name, (fs::read(entry.path()).unwrap(), mode));
            }
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_every_major_comes_back_as_the_server_sent_it() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).start().await;
        cluster.sql("CREATE TABLE big AS SELECT g, repeat(md5(g::text), 8) t FROM generate_series(1, 20000) g").await;
        cluster.sql("CREATE UNLOGGED TABLE fleeting AS SELECT 1; CREATE INDEX ON big (t)").await;
        let scratch = Scratch::new();
        let repository = repository(&scratch, &cluster).await;
        let taken = take(&repository, &cluster).await;
        assert!(taken.info.page_checksums_verified && taken.info.bad_pages == 0, "{major}: {taken:?}");
        assert!(!taken.info.from_standby);
        let manifest = read_manifest(&repository, &taken).await;
        let base = manifest.archives.last().unwrap();
        assert!(base.parts.len() > 3 && base.frame_content_lengths.len() > 20, "several parts, many frames");
        assert!(base.parts.iter().all(|part| part.stored_bytes <= 1 << 20));
        assert_eq!(manifest.role, "walguard");
        assert_eq!(manifest.settings["max_connections"], "30");
        assert_eq!(manifest.settings["data_directory"], cluster.data_dir().to_str().unwrap());

        let data = scratch.join("data");
        let report = extract_to(&repository, &manifest, &to(&data)).await.unwrap();
        assert_eq!(report.stored_bytes, taken.info.stored_bytes);
        assert!(assert_as_postgres_manifested(&repository, &taken, &data).await > 900);
        if major == 15 {
            let postgres_manifest = scratch.join("backup_manifest");
            let key = repository.layout().postgres_manifest(&taken.info.label);
            let stored = repository.store().read(&key, None).await.unwrap();
            fs::write(&postgres_manifest, frame::decompress(&stored, 64 << 20).unwrap()).unwrap();
            let mut verify = std::process::Command::new(cluster.bin("pg_verifybackup"));
            verify.args(["--no-parse-wal", "--exit-on-error", "-m"]).arg(&postgres_manifest).arg(&data);
            harness::finish(verify).expect(0);
        }
        copy_wal(&cluster, &data);
        let restored = Cluster::adopt(major, &data).await;
        assert_eq!(restored.number("SELECT count(*) FROM big").await, 20_000);
        assert_eq!(restored.number("SELECT count(*) FROM fleeting").await, 0, "unlogged tables come back empty");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_an_idle_cluster_is_the_same_as_pg_basebackup_s() {
    let cluster = Cluster::builder().start().await;
    cluster.sql("CREATE TABLE t AS SELECT g FROM generate_series(1, 50000) g").await;
    cluster.sql("VACUUM FREEZE").await; // hint bits are set: reading changes nothing any more
    let odd = [&b"with space and 'quotes'"[..], b"new\nline", b"caf\xe9 latin-1", &[b'x'; 95]];
    for name in odd {
        let path = cluster.data_dir().join(OsStr::from_bytes(name));
        fs::write(&path, name).unwrap();
        give_away(&path);
    }
    cluster.sql("CHECKPOINT").await;
    let scratch = Scratch::new();
    let theirs = scratch.join("theirs");
    let mut command = harness::command(cluster.bin("pg_basebackup"));
    command.args(["-c", "fast", "-X", "none", "--no-manifest", "-d", &cluster.conninfo(), "-D"]).arg(&theirs);
    harness::finish(command).expect(0);
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    let ours = scratch.join("ours");
    extract_to(&repository, &read_manifest(&repository, &taken).await, &to(&ours)).await.unwrap();

    let (mut theirs, mut ours) = (tree(&theirs), tree(&ours));
    for own in ["backup_label", "global/pg_control"] {
        let (theirs, ours) = (theirs.remove(Path::new(own)).unwrap(), ours.remove(Path::new(own)).unwrap());
        assert_eq!(theirs.1, ours.1, "{own} differs in positions, times and label only");
    }
    // The plain format of pg_basebackup links tablespaces; what it unpacks has no map of them.
    assert_eq!(ours.remove(Path::new("tablespace_map")).unwrap().0, b"");
    assert_eq!(theirs.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
    for (path, file) in theirs {
        assert!(file == ours[&path], "{}", path.display());
    }
    for name in odd {
        assert_eq!(ours[Path::new(OsStr::from_bytes(name))].0, name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_cluster_with_group_access_comes_back_with_its_permissions() {
    let mut cluster = Cluster::builder().checksums(false).start().await;
    cluster.stop(StopMode::Fast).await;
    for (path, (_, mode)) in tree(cluster.data_dir()) {
        let group = if mode & 0o100 == 0 { 0o640 } else { 0o750 };
        fs::set_permissions(cluster.data_dir().join(path), fs::Permissions::from_mode(group)).unwrap();
    }
    fs::set_permissions(cluster.data_dir(), fs::Permissions::from_mode(0o750)).unwrap();
    cluster.start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    assert!(!taken.info.page_checksums_verified, "there are no checksums");
    let data = scratch.dir("data"); // an empty directory will do too, whatever its permissions
    let restored = restore(&repository, &taken, &cluster, &data).await;
    assert_eq!(fs::metadata(&data).unwrap().permissions().mode() & 0o777, 0o750);
    assert_eq!(fs::metadata(data.join("global/pg_control")).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(restored.number("SELECT 1").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_come_back_where_the_mapping_says() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let (first, second) = (scratch.dir("first"), scratch.dir("second with \\ backslash"));
    cluster.sql(&format!("CREATE TABLESPACE one LOCATION '{}'", first.display())).await;
    cluster.sql(&format!("CREATE TABLESPACE two LOCATION '{}'", second.display())).await;
    cluster.sql("CREATE TABLE a TABLESPACE one AS SELECT g FROM generate_series(1, 100000) g").await;
    cluster.sql("CREATE TABLE b TABLESPACE two AS SELECT g FROM generate_series(1, 1000) g").await;
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    let manifest = read_manifest(&repository, &taken).await;
    assert_eq!(manifest.archives.len(), 3);
    let oid = |location: &Path| {
        let archive = manifest.archives.iter().find(|a| a.location == location.to_str().unwrap());
        Oid(archive.unwrap().name.parse().unwrap())
    };

    let data = scratch.join("data");
    let refused = extract_to(&repository, &manifest, &to(&data)).await.unwrap_err();
    assert!(matches!(&refused, ExtractError::TablespacePlace { .. }), "{refused:?}");
    assert!(refused.hint().unwrap().contains("--tablespace"), "the hint says what to do");
    assert!(!data.exists(), "nothing is written before all places are known to be free");

    let (moved, moved_too) = (scratch.join("moved"), scratch.join("moved \\ too"));
    let mut placement = to(&data);
    placement.tablespaces = [(oid(&first), moved.clone()), (oid(&second), moved_too.clone())].into();
    let mut wrong = placement.clone();
    wrong.tablespaces.insert(Oid(1), scratch.join("nowhere"));
    assert!(matches!(extract_to(&repository, &manifest, &wrong).await, Err(ExtractError::Mapping { .. })));
    wrong.tablespaces = [(oid(&first), moved.clone()), (oid(&second), moved.clone())].into();
    assert!(matches!(extract_to(&repository, &manifest, &wrong).await, Err(ExtractError::Mapping { .. })));

    extract_to(&repository, &manifest, &placement).await.unwrap();
    for dir in [&moved, &moved_too] {
        give_away(dir);
    }
    copy_wal(&cluster, &data);
    let mut restored = Cluster::adopt(15, &data).await;
    assert_eq!(restored.number("SELECT count(*) FROM a").await, 100_000);
    assert_eq!(restored.number("SELECT count(*) FROM b").await, 1_000);
    let place = restored.text("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'two'").await;
    assert_eq!(Path::new(&place), moved_too);
    restored.stop(StopMode::Fast).await;

    // Where the old places are free, no mapping is needed.
    drop(cluster);
    fs::remove_dir_all(&first).unwrap();
    for entry in fs::read_dir(&second).unwrap().flatten() {
        fs::remove_dir_all(entry.path()).unwrap();
    }
    let data = scratch.join("again");
    extract_to(&repository, &manifest, &to(&data)).await.unwrap();
    assert_as_postgres_manifested(&repository, &taken, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_within_the_data_directory_stays_there() {
    // 15 has them for its own tests only, and sends them with no backup.
    for major in majors().into_iter().filter(|major| *major >= 16) {
        let cluster = Cluster::builder().major(major).conf("allow_in_place_tablespaces", "on").start().await;
        cluster.client().await.simple_query("CREATE TABLESPACE inside LOCATION ''").await.unwrap();
        cluster.sql("CREATE TABLE t TABLESPACE inside AS SELECT g FROM generate_series(1, 1000) g").await;
        let scratch = Scratch::new();
        let repository = repository(&scratch, &cluster).await;
        let taken = take(&repository, &cluster).await;
        let restored = restore(&repository, &taken, &cluster, &scratch.join("data")).await;
        assert_eq!(restored.number("SELECT count(*) FROM t").await, 1_000, "{major}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_named_and_does_not_stop_the_backup() {
    let mut cluster = Cluster::builder().start().await;
    cluster.sql("CREATE TABLE victim AS SELECT g, repeat('x', 500) FROM generate_series(1, 2000) g").await;
    let file = cluster.text("SELECT pg_relation_filepath('victim')").await;
    cluster.stop(StopMode::Fast).await;
    let relation = File::options().read(true).write(true).open(cluster.data_dir().join(&file)).unwrap();
    let mut page = [0; BLOCK_SIZE];
    relation.read_exact_at(&mut page, 7 * BLOCK_SIZE as u64).unwrap();
    assert!(page_checksum::is_intact(&page, 7), "what Postgres wrote is right by our sum too");
    page[4_000] ^= 0x10;
    relation.write_all_at(&page, 7 * BLOCK_SIZE as u64).unwrap();
    // A page whose header claims to be from the far future cannot hide behind the rule for pages changed meanwhile.
    relation.read_exact_at(&mut page, 9 * BLOCK_SIZE as u64).unwrap();
    page[0] = 0x7F;
    relation.write_all_at(&page, 9 * BLOCK_SIZE as u64).unwrap();
    cluster.start().await;

    let scratch = Scratch::new();
    let mut agent = harness::Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    let done = walguard(&["backup", "--json", "--label", "marked"], &flags).expect(3);
    let json = done.json();
    assert_eq!(json["bad_pages"], 2, "{done}");
    assert_eq!(json["damaged_pages"], serde_json::json!([{"file": file, "block": 7}, {"file": file, "block": 9}]));
    assert_eq!(json["wal_archived"], true);
    let text = walguard(&["backup"], &flags).expect(3).stdout();
    assert!(text.contains(&format!("{file} block 7")), "{text}");
    let again = walguard(&["backup", "--label", "marked"], &flags).expect(2);
    assert!(again.stderr().contains("HINT:"), "{again}");
    let impossible = walguard(&["backup", "--label", "a/b"], &flags).expect(2);
    assert!(impossible.stderr().contains("HINT:"), "{impossible}");
}

/// Runs the program on a repository that [`repository`] made.
fn walguard(args: &[&str], flags: &[String]) -> harness::Finished {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    harness::walguard(&[args, &flags].concat())
}

fn flags(scratch: &Scratch, cluster: &Cluster) -> Vec<String> {
    give_away(&scratch.join("repo"));
    let pairs = [("--pg", cluster.conninfo()), ("--repo", scratch.repo_url()), ("--cluster", "main".to_owned())];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

/// Archives whole segments while it lives, as a simple `archive_command` does.
struct Archiving(tokio::task::JoinHandle<()>);

impl Archiving {
    fn start(repository: &Repository, cluster: &Cluster) -> Self {
        let (repository, conninfo) = (repository.clone(), cluster.conninfo_of("postgres"));
        let folder = cluster.data_dir().join("pg_wal");
        Self(tokio::spawn(async move {
            let (client, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            loop {
                let row = client.query_one("SELECT pg_walfile_name(pg_current_wal_lsn())", &[]).await.unwrap();
                let current: String = row.get(0);
                for entry in fs::read_dir(&folder).unwrap().flatten() {
                    let name = entry.file_name().to_str().unwrap().to_owned();
                    let Ok(segment) = SegmentName::parse(&name, SegmentSize::DEFAULT) else { continue };
                    if name < current {
                        let stored = frame::compress(&fs::read(entry.path()).unwrap(), 1);
                        let key = repository.layout().segment(&segment);
                        repository.put_once(&key, stored.into(), SameContent::Verbatim).await.unwrap();
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }))
    }
}

impl Drop for Archiving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_read_while_it_was_written_is_not_called_damaged() {
    let cluster = Cluster::builder().start().await;
    cluster.sql("CREATE TABLE t AS SELECT g, repeat('x', 500) f FROM generate_series(1, 3000) g").await;
    let file = cluster.text("SELECT pg_relation_filepath('t')").await;
    // Once all is frozen, reading changes no page: whoever sets a hint bit puts the page into the WAL too.
    cluster.sql("VACUUM FREEZE t").await;
    cluster.sql("CHECKPOINT").await;
    // What a torn read looks like: the header is old, the rest is not. The server has the pages in memory and puts one
    // of them into the WAL during the backup, but writes none: it sends what the test wrote.
    let relation = File::options().write(true).open(cluster.data_dir().join(&file)).unwrap();
    relation.write_all_at(b"torn", 11 * BLOCK_SIZE as u64 + 6_000).unwrap();
    relation.write_all_at(b"damaged", 12 * BLOCK_SIZE as u64 + 6_000).unwrap();
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let _archiving = Archiving::start(&repository, &cluster);
    let data_came = OnData::default();
    let config = Config { max_rate: Some(bytesize::ByteSize::mib(8)), ..small_parts() };
    let cancel = CancellationToken::new();
    let backup = take_with(&repository, &cluster, &config, &cancel, &data_came);
    let change = async {
        wait_for("the backup to send data", DEADLINE, || async { data_came.0.load(Ordering::Relaxed) }).await;
        cluster.sql("UPDATE t SET g = -g WHERE ctid = '(11,1)'").await;
    };
    let (taken, ()) = tokio::join!(backup, change);
    let taken = taken.unwrap();
    let bad: Vec<_> = taken.bad_pages.iter().map(|page| (page.file.clone(), page.block)).collect();
    assert_eq!(bad, [(file, 12)], "block 11 has a full image in the WAL, block 12 has none");
}

/// Knows whether data of a backup has come.
#[derive(Debug, Default)]
struct OnData(AtomicBool);

impl Progress for OnData {
    fn begin(&self, _: &str, _: Option<u64>) {}
    fn set_total(&self, _: u64) {}
    fn advance(&self, _: u64) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn note(&self, _: &str) {}
    fn end(&self) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_taken_under_load_is_consistent_and_its_pages_are_right() {
    let cluster = Cluster::builder().conf("shared_buffers", "1MB").conf("checkpoint_timeout", "30s").start().await;
    cluster
        .sql("CREATE TABLE account AS SELECT g id, 100 amount, repeat('x', 200) f FROM generate_series(1, 20000) g")
        .await;
    cluster.sql("ALTER TABLE account ADD PRIMARY KEY (id)").await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let _archiving = Archiving::start(&repository, &cluster);
    let stop = CancellationToken::new();
    let load: Vec<_> = (0..3)
        .map(|seed| {
            let (stop, conninfo) = (stop.clone(), cluster.conninfo_of("postgres"));
            tokio::spawn(async move {
                let (client, connection) = tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
                tokio::spawn(connection);
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.is_cancelled() {
                    let (from, to) = (random.i32(1..=20_000), random.i32(1..=20_000));
                    let (low, high) = (from.min(to), from.max(to)); // one order of locks: no deadlock
                    let sql = format!(
                        "BEGIN; UPDATE account SET amount = amount - 1 WHERE id = {low}; \
                         UPDATE account SET amount = amount + 1 WHERE id = {high}; COMMIT"
                    );
                    client.batch_execute(&sql).await.unwrap();
                }
            })
        })
        .collect();
    let config = Config { max_rate: Some(bytesize::ByteSize::mib(16)), ..small_parts() };
    let taken = take_with(&repository, &cluster, &config, &CancellationToken::new(), &Silent).await.unwrap();
    stop.cancel();
    for task in load {
        task.await.unwrap();
    }
    assert_eq!(taken.info.bad_pages, 0, "{:?}", taken.bad_pages);
    let data = scratch.join("data");
    let restored = restore(&repository, &taken, &cluster, &data).await;
    assert_eq!(restored.number("SELECT sum(amount) FROM account").await, 2_000_000);
    assert_eq!(restored.number("SELECT count(*) FROM account").await, 20_000);
    let mut amcheck = harness::command(restored.bin("pg_amcheck"));
    amcheck.args(["--install-missing", "--heapallindexed", "-h", "127.0.0.1", "-U", "postgres", "-d", "postgres"]);
    amcheck.args(["-p", &restored.port().to_string()]);
    harness::finish(amcheck).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_standby_comes_back() {
    let cluster = Cluster::builder().start().await;
    cluster.sql("CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g").await;
    let standby = cluster.standby().await;
    // A standby's backup ends where its last restart point or replay does.
    cluster.sql("CHECKPOINT").await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &standby).await;
    assert!(taken.info.from_standby && taken.info.start <= taken.info.stop, "{taken:?}");
    let data = scratch.join("data");
    extract_to(&repository, &read_manifest(&repository, &taken).await, &to(&data)).await.unwrap();
    fs::remove_file(data.join("standby.signal")).unwrap(); // the standby's own, which came along
    cluster.sql("SELECT pg_switch_wal()").await;
    copy_wal(&cluster, &data);
    let restored = Cluster::adopt(15, &data).await;
    assert_eq!(restored.number("SELECT count(*) FROM t").await, 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_leaves_nothing() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let config = Config { max_rate: Some(bytesize::ByteSize::mib(4)), ..small_parts() };
    let cancel = CancellationToken::new();
    let backup = take_with(&repository, &cluster, &config, &cancel, &Silent);
    let interrupt = async {
        wait_for("parts", DEADLINE, || async { !stored(&repository).await.is_empty() }).await;
        cancel.cancel();
    };
    let (result, ()) = tokio::join!(backup, interrupt);
    assert!(matches!(result, Err(BackupError::Cancelled)), "{result:?}");
    assert_eq!(stored(&repository).await, Vec::<String>::new());
}

/// The objects of all backups.
async fn stored(repository: &Repository) -> Vec<String> {
    let request = ListRequest { prefix: repository.layout().backups_folder(), ..ListRequest::default() };
    let page = repository.store().list(&request).await.unwrap();
    page.objects.into_iter().map(|object| object.key).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_backup_is_no_backup_and_does_not_hinder_the_next() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let flags = flags(&scratch, &cluster);
    let mut settings = String::from("[backup]\npart_size = \"1 MiB\"\n");
    settings += "max_rate = \"4 MiB\"\n";
    let config = scratch.file("walguard.toml", settings);
    let mut args = vec!["backup", "--config", config.to_str().unwrap()];
    args.extend(flags.iter().map(String::as_str));
    let mut killed = harness::walguard_command(&args).spawn().unwrap();
    wait_for("parts", DEADLINE, || async { !stored(&repository).await.is_empty() }).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(stored(&repository).await.iter().all(|key| !key.ends_with("/manifest")));
    assert_eq!(repository.backups().await.unwrap(), []);
    let whole = walguard(&["backup", "--no-wait", "--json"], &flags).expect(0).json();
    let backups = repository.backups().await.unwrap();
    assert_eq!(backups.len(), 1);
    assert_eq!(whole["label"], backups[0].label);
    assert_eq!(whole["wal_archived"], serde_json::Value::Null);
}

/// What a store does wrong.
#[derive(Debug, PartialEq)]
enum Trouble {
    /// A third of all calls fail, some of them after what was asked was done.
    NowAndThen,
    /// Manifests are written, but the answer is that they were not.
    ManifestDenied,
}

#[derive(Debug)]
struct Flaky {
    store: LocalStore,
    trouble: Trouble,
    calls: AtomicU64,
}

impl Flaky {
    fn over(scratch: &Scratch, trouble: Trouble) -> Arc<Self> {
        Arc::new(Self { store: LocalStore::new(scratch.dir("repo")), trouble, calls: AtomicU64::new(0) })
    }

    fn fails(&self, op: &'static str, key: &str) -> Result<(), StoreError> {
        if self.trouble == Trouble::ManifestDenied {
            let (key, hint) = (key.to_owned(), String::new());
            let denied = op == "write" && key.ends_with("/manifest");
            return if denied { Err(StoreError::Refused { op, key, source: "denied".into(), hint }) } else { Ok(()) };
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        match call % 3 {
            0 => Err(StoreError::Unavailable {
                op,
                key: key.to_owned(),
                source: "out of order".into(),
                retry_after: None,
            }),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Flaky {
    async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
        let created = self.store.create(key, content).await?; // done, but the answer is lost
        self.fails("write", key).map(|()| created)
    }
    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        self.store.replace(key, content).await
    }
    async fn read(&self, key: &str, range: Option<std::ops::Range<u64>>) -> Result<Bytes, StoreError> {
        self.fails("read", key)?;
        self.store.read(key, range).await
    }
    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        self.fails("list", &request.prefix)?;
        self.store.list(request).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.store.delete(key).await
    }
    fn enforces_create_once(&self) -> bool {
        self.store.enforces_create_once()
    }
    async fn probe_create_once(&self, key: &str) -> Result<bool, StoreError> {
        self.store.probe_create_once(key).await
    }
    fn url(&self) -> String {
        self.store.url()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_now_and_then_costs_time_and_nothing_else() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    drop(repository(&scratch, &cluster).await);
    let repository = Repository::over(Flaky::over(&scratch, Trouble::NowAndThen), "main").unwrap();
    let repository = repository.with_retry(RetryPolicy::FOREVER, CancellationToken::new());
    let taken = take(&repository, &cluster).await;
    let data = scratch.join("data");
    extract_to(&repository, &read_manifest(&repository, &taken).await, &to(&data)).await.unwrap();
    assert_as_postgres_manifested(&repository, &taken, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_failed_at_its_manifest_is_no_backup() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = over(Flaky::over(&scratch, Trouble::ManifestDenied), &cluster).await;
    let result = take_with(&repository, &cluster, &small_parts(), &CancellationToken::new(), &Silent).await;
    assert!(matches!(result, Err(BackupError::Repo(_))), "{result:?}");
    assert_eq!(stored(&repository).await, Vec::<String>::new(), "neither the manifest nor what it speaks of");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_part_is_named_and_what_was_extracted_cannot_start() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    let manifest = read_manifest(&repository, &taken).await;
    let key = repository.layout().part(&taken.info.label, ArchiveName::Base, 2);
    let path = scratch.join("repo").join(&key);
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (index, damaged) in [flipped, whole[..whole.len() - 1].to_vec(), Vec::new()].into_iter().enumerate() {
        fs::remove_file(&path).unwrap();
        fs::write(&path, damaged).unwrap();
        let data = scratch.join(format!("data{index}"));
        let error = extract_to(&repository, &manifest, &to(&data)).await.unwrap_err();
        assert!(error.to_string().contains(&key), "{error}");
        assert!(error.hint().unwrap().contains("walguard verify"), "{error:?}");
        assert!(!data.join("global/pg_control").exists(), "without it no server starts");
    }
    fs::remove_file(&path).unwrap();
    let error = extract_to(&repository, &manifest, &to(&scratch.join("data3"))).await.unwrap_err();
    assert!(error.to_string().contains(&key), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_manifest_cannot_write_elsewhere() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    let genuine = read_manifest(&repository, &taken).await;
    let outside = scratch.dir("outside");
    let link = |path: &[u8]| Entry {
        path: path.to_vec(),
        kind: walguard::proto::entry::Kind::Symlink.into(),
        target: outside.as_os_str().as_bytes().to_vec(),
        ..Entry::default()
    };
    let file = |path: &[u8]| Entry { path: path.to_vec(), mode: 0o600, size: 10, offset: 512, ..Entry::default() };
    let forged = [
        file(b"../outside/file"),
        file(b"/outside/file"),
        file(b"base/../../outside/file"),
        file(b"base//file"),
        file(b"./file"),
        file(b""),
        file(b"zero\0byte"),
        link(b"base/1"),
        link(b"pg_tblspc/../base"),
    ];
    for (index, entry) in forged.into_iter().enumerate() {
        let mut manifest = (*genuine).clone();
        manifest.archives.last_mut().unwrap().entries.insert(0, entry.clone());
        let data = scratch.join(format!("data{index}"));
        let result = extract_to(&repository, &Arc::new(manifest), &to(&data)).await;
        assert!(matches!(result, Err(ExtractError::Forbidden { .. })), "{entry:?}: {result:?}");
        assert!(!data.exists() && fs::read_dir(&outside).unwrap().next().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_extracted_over_something() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    let manifest = read_manifest(&repository, &taken).await;
    let error = extract_to(&repository, &manifest, &to(cluster.data_dir())).await.unwrap_err();
    assert!(matches!(&error, ExtractError::NotEmpty(path) if path == cluster.data_dir()), "{error:?}");
    let file = scratch.file("file", "content");
    assert!(matches!(extract_to(&repository, &manifest, &to(&file)).await, Err(ExtractError::NotEmpty(_))));
    assert_eq!(cluster.number("SELECT 1").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_range_of_an_archive_can_be_read_by_itself() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let repository = repository(&scratch, &cluster).await;
    let taken = take(&repository, &cluster).await;
    let manifest = read_manifest(&repository, &taken).await;
    let data = scratch.join("data");
    extract_to(&repository, &manifest, &to(&data)).await.unwrap();
    let base = manifest.archives.last().unwrap();
    let reader = Reader::new(&repository, &manifest.label, base).unwrap();
    for entry in base.entries.iter().filter(|entry| entry.size > 0).step_by(50) {
        let expected = fs::read(data.join(OsStr::from_bytes(&entry.path))).unwrap();
        assert!(reader.read(entry.offset..entry.offset + entry.size).await.unwrap() == expected);
        let middle = entry.size / 2;
        let one = reader.read(entry.offset + middle..entry.offset + middle + 1).await.unwrap();
        assert_eq!(one, expected[middle as usize..][..1]);
    }
    let end = base.content_bytes;
    assert_eq!(reader.read(end - 1_024..end + 5_000).await.unwrap(), [0; 1_024], "the tar's trailer");
    assert!(reader.read(end..end + 1).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_into_another_clusters_place_is_refused() {
    let (cluster, other) = (Cluster::builder().start().await, Cluster::builder().start().await);
    let scratch = Scratch::new();
    drop(repository(&scratch, &cluster).await);
    other.sql("SELECT 1").await;
    let same_template = cluster.text("SELECT system_identifier FROM pg_control_system()").await
        == other.text("SELECT system_identifier FROM pg_control_system()").await;
    let other = if same_template { Cluster::builder().wal_segsize_mib(1).start().await } else { other };
    let refused = walguard(&["backup"], &flags(&scratch, &other)).expect(1);
    assert!(refused.stderr().contains("another cluster") && refused.stderr().contains("HINT:"), "{refused}");
}
