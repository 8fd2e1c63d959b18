//! What the tests of the archive share: the repository as the library reads it, and `pg_receivewal` as the judge.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use walguard::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use walguard::repo::catalog::{Catalog, CatalogScope};
use walguard::repo::store::LocalStore;
use walguard::repo::{self, Repository};

use crate::harness::{Agent, Cluster, Scratch, command, wait_for};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A segment of 1 MiB: rotation matters in most of these tests.
pub(crate) fn small() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// The cluster `main` in a repository.
pub(crate) async fn repository(url: &str) -> Repository {
    let config = repo::Config { url: url.to_owned(), ..repo::Config::default() };
    Repository::connect(&config, "main").await.unwrap()
}

/// The same without an agent that made it: nothing but what the test puts there.
pub(crate) fn bare_repository(folder: &Path) -> Repository {
    Repository::over(Arc::new(LocalStore::new(folder)), "main").unwrap()
}

pub(crate) async fn catalog(repo: &Repository) -> Catalog {
    repo.catalog(CatalogScope::Everything).await.unwrap()
}

/// How far a timeline's WAL reaches in the repository.
pub(crate) async fn archived_end(repo: &Repository, timeline: u32) -> Option<Lsn> {
    let catalog = catalog(repo).await;
    catalog.timelines.get(&TimelineId::new(timeline).unwrap()).and_then(|wal| wal.ranges.end())
}

/// Waits until the repository itself holds a timeline's WAL up to `lsn`.
pub(crate) async fn wait_in_repository(repo: &Repository, timeline: u32, lsn: Lsn) {
    wait_for(&format!("WAL up to {lsn} in the repository"), DEADLINE, || async {
        archived_end(repo, timeline).await >= Some(lsn)
    })
    .await;
}

/// A cluster with 1 MiB segments, and a table to write into.
pub(crate) async fn small_cluster() -> Cluster {
    let cluster = Cluster::builder().wal_segsize_mib(1).start().await;
    cluster.sql("CREATE TABLE busy (id bigserial PRIMARY KEY, word text)").await;
    cluster
}

/// Writes about so many KiB of WAL in commits of some KiB.
pub(crate) async fn write(cluster: &Cluster, kib: u32) {
    let client = cluster.client().await;
    let insert = "INSERT INTO busy (word) SELECT md5(random()::text) FROM generate_series(1, 100)";
    for _ in 0..kib.div_ceil(20) {
        client.batch_execute(insert).await.unwrap();
    }
}

/// `pg_receivewal` beside the agent, from before it until the end of the test.
pub(crate) struct Receiver {
    process: Child,
    dir: PathBuf,
    _scratch: Scratch,
}

impl Receiver {
    pub(crate) async fn start(cluster: &Cluster) -> Self {
        let scratch = Scratch::new();
        let dir = scratch.dir("received");
        cluster.sql("SELECT pg_create_physical_replication_slot('judge', true)").await;
        let mut receiver = command(cluster.bin("pg_receivewal"));
        receiver.arg("-D").arg(&dir).args(["--slot=judge", "--no-loop", "--synchronous"]);
        receiver.arg("-d").arg(cluster.conninfo_of("postgres")).stdout(Stdio::null()).stderr(Stdio::null());
        Self { process: receiver.spawn().unwrap(), dir, _scratch: scratch }
    }

    /// Waits until it has received up to `lsn` of a timeline, then ends it and gives what it received.
    pub(crate) async fn finish(mut self, cluster: &Cluster, lsn: Lsn) -> BTreeMap<SegmentName, Vec<u8>> {
        let query = format!("SELECT restart_lsn >= '{lsn}' FROM pg_replication_slots WHERE slot_name = 'judge'");
        wait_for("pg_receivewal", DEADLINE, || async { cluster.text(&query).await == "t" }).await;
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        segments_in(&self.dir, small())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The segment files in a directory, `.partial` ones included.
pub(crate) fn segments_in(dir: &Path, size: SegmentSize) -> BTreeMap<SegmentName, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(name) = SegmentName::parse(name.trim_end_matches(".partial"), size) {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// Every byte of `timeline` up to `end` that both have must be the same, and the archive must hold all that the judge
/// holds. Gives the number of segments compared.
pub(crate) async fn assert_same_wal(
    repo: &Repository,
    judge: &BTreeMap<SegmentName, Vec<u8>>,
    timeline: u32,
    end: Lsn,
) -> usize {
    let mut compared = 0;
    for (name, theirs) in judge.iter().filter(|(name, _)| name.timeline.get() == timeline && name.start() < end) {
        let ours = repo.read_segment(name).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let length = usize::try_from(name.end().min(end) - name.start()).unwrap();
        assert!(ours.valid_to >= length as u64, "{name} is archived up to {} of {length} bytes", ours.valid_to);
        assert!(ours.bytes[..length] == theirs[..length], "{name} differs within {length} bytes");
        compared += 1;
    }
    compared
}

/// The archive of a timeline is one range without a hole, and no tail of a whole segment is left.
pub(crate) async fn assert_no_hole(repo: &Repository, timeline: u32) {
    let catalog = catalog(repo).await;
    let wal = &catalog.timelines[&TimelineId::new(timeline).unwrap()];
    assert_eq!(wal.ranges.as_slice().len(), 1, "{:?}", wal.ranges);
    assert_eq!(catalog.gaps, []);
}

/// An agent without scheduled backups: they are not what these tests are about.
pub(crate) fn agent(cluster: &Cluster, repo: &str) -> crate::harness::AgentBuilder {
    Agent::builder(cluster, repo).arg("--no-backups")
}

/// What the running agent says.
pub(crate) async fn status(agent: &Agent) -> serde_json::Value {
    match reqwest::get(agent.url("/status")).await {
        Ok(answer) => answer.json().await.unwrap(),
        Err(_) => serde_json::Value::Null,
    }
}

/// Tails, in a repository in a folder, of timeline 1's segments before the one that begins at `end`.
pub(crate) fn tails_before(url: &str, end: Lsn) -> usize {
    let wal = Path::new(url.strip_prefix("file://").unwrap()).join("main/wal/00000001");
    let Ok(entries) = fs::read_dir(wal) else { return 0 };
    let folders = entries.flatten().map(|e| e.path()).filter(|path| path.extension().is_some_and(|e| e == "tail"));
    let before = folders.filter(|path| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        SegmentName::parse(&name, small()).is_ok_and(|name| name.start() < end)
    });
    before.map(|path| fs::read_dir(path).map_or(0, Iterator::count)).sum()
}

/// Timeline 1 is archived to its end, timeline 2 from there with its history, and both are what the new primary has.
pub(crate) async fn assert_followed(repo: &Repository, promoted: &Cluster, before: Lsn, end: Lsn) {
    let catalog = catalog(repo).await;
    let second = TimelineId::new(2).unwrap();
    let path = catalog.history(second).expect("the new timeline's history is archived").clone();
    let switch = path.end_of(TimelineId::FIRST).expect("timeline 2 follows timeline 1");
    assert!(switch >= before, "promoted at {switch}, archived up to {before}");
    let first = catalog.timelines[&TimelineId::FIRST].ranges.as_slice().first().expect("WAL of timeline 1").from;
    catalog.covered(&path, first, end).unwrap_or_else(|missing| panic!("{missing}"));
    assert_eq!(catalog.gaps, []);
    let history = std::path::Path::new("pg_wal").join(second.history_file_name());
    let theirs = fs::read(promoted.data_dir().join(history)).unwrap();
    let ours = repo.store().read(&repo.layout().history(second), None).await.unwrap();
    assert_eq!(ours, theirs, "the history file is archived verbatim");
    let judge = segments_in(&promoted.data_dir().join("pg_wal"), small());
    assert!(assert_same_wal(repo, &judge, 2, end).await > 0);
}
