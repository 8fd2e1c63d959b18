//! Plans by the commit index: which record a time means, judged by `pg_waldump` and by PostgreSQL's own recovery; and what
//! becomes of damage that a plan did not see.

use std::fs;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use walguard::decode::{Source, WalMajor};
use walguard::detect::Observer;
use walguard::pg::{Lsn, PgTime, SegmentName, TimelineId};
use walguard::progress::Silent;
use walguard::repo::Repository;
use walguard::repo::catalog::CatalogScope;
use walguard::repo::index::Indexer;
use walguard::restore::Target;
use walguard::restore::plan::{Request, RestorePlan, plan};

use crate::archived_wal::repository;
use crate::harness::{Agent, Cluster, Scratch, command, finish, give_away, restore, wait_for, walguard};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// Times that are looked up.
const TIMES: usize = 200;

/// Indexes every whole segment of timeline 1 that has no index yet, as far as that is possible.
pub(crate) async fn index_all(repo: &Repository) {
    let catalog = repo.catalog(CatalogScope::Everything).await.unwrap();
    let identity = &catalog.identity;
    let size = identity.segment_size;
    let major = WalMajor::of_server(identity.server_version).unwrap();
    let source = Source { major, segment_size: size, system_id: Some(identity.system_id) };
    let range = catalog.timelines[&TimelineId::FIRST].ranges.as_slice()[0];
    let mut name = SegmentName::at(TimelineId::FIRST, range.from, size);
    let mut indexer = Indexer::new(source, &name, Observer::without_names(source.major, false));
    while name.end() <= range.to {
        let read = repo.read_segment(&name).await.unwrap();
        for (name, index) in indexer.take(name, &read.bytes).unwrap() {
            repo.put_index(&name, &index.unwrap()).await.unwrap();
        }
        name = SegmentName::at(TimelineId::FIRST, name.end(), size);
    }
}

/// The end of a transaction, as `pg_waldump` tells it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) lsn: Lsn,
    time: PgTime,
    pub(crate) xid: u32,
    pub(crate) committed: bool,
}

/// Every end of a transaction that `pg_waldump` finds behind `from`, in WAL order.
pub(crate) fn dump(cluster: &Cluster, from: Lsn, to: Lsn) -> Vec<End> {
    let mut waldump = command(cluster.bin("pg_waldump"));
    waldump.env("TZ", "UTC").arg("-p").arg(cluster.data_dir().join("pg_wal")).args(["-r", "Transaction"]);
    waldump.args(["-s", &from.to_string(), "-e", &to.to_string()]);
    let lines = finish(waldump).expect(0).stdout();
    let ends = lines.lines().filter_map(|line| {
        let (head, desc) = line.split_once("desc: ")?;
        let word = desc.split(' ').next()?;
        let committed = word.starts_with("COMMIT");
        if !committed && !word.starts_with("ABORT") {
            return None;
        }
        let (before, _) = desc.split_once(" UTC").unwrap_or_else(|| panic!("no time in {line}"));
        let time: Timestamp = format!("{}Z", &before[before.len() - 26..]).parse().unwrap();
        let (_, lsn) = head.split_once("lsn: ").unwrap();
        // Of a prepared transaction the header has no id.
        let xid = match word.ends_with("_PREPARED") {
            true => desc[word.len() + 1..].split(':').next().unwrap().to_owned(),
            false => head.split_once("tx:").unwrap().1.split(',').next().unwrap().trim().to_owned(),
        };
        let lsn = lsn.split(',').next().unwrap().parse().unwrap();
        Some(End { lsn, time: time.into(), xid: xid.parse().unwrap(), committed })
    });
    ends.collect()
}

/// Sessions that commit, roll back and prepare beside each other, so that some commit records come behind those of later
/// times.
async fn work_side_by_side(cluster: &Cluster, sessions: u64) {
    let mut tasks = tokio::task::JoinSet::new();
    for session in 0..sessions {
        let client = cluster.client().await;
        tasks.spawn(async move {
            let mut random = fastrand::Rng::with_seed(session);
            if session % 2 == 0 {
                client.batch_execute("SET synchronous_commit = off").await.unwrap();
            }
            for turn in 0..100 {
                let insert = format!(
                    "INSERT INTO busy (word) SELECT md5(random()::text) FROM generate_series(1, {})",
                    random.u32(1..150)
                );
                let statement = match random.u8(..12) {
                    0 => format!("BEGIN; {insert}; ROLLBACK"),
                    1 => format!(
                        "BEGIN; {insert}; PREPARE TRANSACTION '{session}-{turn}'; COMMIT PREPARED '{session}-{turn}'"
                    ),
                    2 => format!(
                        "BEGIN; {insert}; PREPARE TRANSACTION '{session}-{turn}'; ROLLBACK PREPARED '{session}-{turn}'"
                    ),
                    3 => format!("BEGIN; {insert}; SAVEPOINT s; {insert}; ROLLBACK TO s; COMMIT"),
                    _ => insert,
                };
                // One message with several statements would be one transaction.
                for statement in statement.split("; ") {
                    client.batch_execute(statement).await.unwrap();
                }
            }
            client.batch_execute("SET synchronous_commit = off").await.unwrap();
            let commits =
                "DO $$ BEGIN FOR i IN 1..1000 LOOP INSERT INTO busy (word) VALUES (i); COMMIT; END LOOP; END $$";
            client.batch_execute(commits).await.unwrap();
        });
    }
    // While a segment is left, sessions that have looked at the clock wait to write their commit records, and are then
    // woken in no order.
    let switching = cluster.client().await;
    for _ in 0..30 {
        switching.batch_execute("SELECT pg_switch_wal(), pg_sleep(0.05)").await.unwrap();
    }
    tasks.join_all().await;
}

/// A repository with one backup and the WAL of many sessions, indexed.
struct World {
    cluster: Cluster,
    /// Stopped; its settings are used.
    agent: Agent,
    scratch: Scratch,
    repo: Repository,
}

impl World {
    async fn new() -> Self {
        let cluster = Cluster::builder()
            .wal_segsize_mib(1)
            .conf("autovacuum", "off")
            .conf("max_prepared_transactions", "20")
            .conf("wal_keep_size", "1GB")
            .conf("wal_buffers", "64kB")
            .start()
            .await;
        cluster.sql("CREATE TABLE busy (id bigserial PRIMARY KEY, word text)").await;
        let scratch = Scratch::new();
        let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
        agent.wait_streaming(&cluster).await;
        let flags = agent.flags();
        let words: Vec<&str> = flags.iter().map(String::as_str).collect();
        walguard(&[&["backup"], words.as_slice()].concat()).expect(0);
        let begin = cluster.lsn().await;
        // Whether commits come out of order is the scheduler's doing; on a quiet machine it can take a while.
        for round in 0.. {
            assert!(round < 20, "all commits came in the order of their times");
            work_side_by_side(&cluster, 12).await;
            cluster.sql("INSERT INTO busy (word) VALUES ('last')").await;
            let ends = dump(&cluster, begin, cluster.lsn().await);
            if ends.windows(2).any(|pair| pair[0].time > pair[1].time) {
                break;
            }
        }
        agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
        assert!(agent.stop().await.success());
        let repo = repository(&scratch.repo_url()).await;
        index_all(&repo).await;
        give_away(&scratch.join("repo"));
        Self { cluster, agent, scratch, repo }
    }

    async fn plan(&self, at: PgTime, exclusive: bool) -> RestorePlan {
        let request = Request { target: Target::Time(at), exclusive, timeline: None, backup: None, verify: false };
        plan(&self.repo, &request, &Silent, &CancellationToken::new()).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_means_the_record_that_postgres_stops_at() {
    let world = World::new().await;
    let catalog = world.repo.catalog(CatalogScope::Everything).await.unwrap();
    let backup = &catalog.backups[0];
    let end = catalog.timelines[&TimelineId::FIRST].ranges.end().unwrap();
    let ends = dump(&world.cluster, backup.start, end);
    let reachable: Vec<_> = ends.iter().filter(|end| end.lsn >= backup.stop).collect();
    let (first, last) = (reachable[0].time, ends.last().unwrap().time);
    let out_of_order: Vec<_> = reachable.windows(2).filter(|pair| pair[0].time > pair[1].time).collect();
    assert!(reachable.len() > 1000 && !out_of_order.is_empty(), "{} ends", reachable.len());

    let mut random = fastrand::Rng::with_seed(11);
    let times = (0..TIMES).map(|turn| {
        let micros = match turn % 4 {
            0 => random.choice(&reachable).unwrap().time.micros() + random.i64(-1..=1),
            1 => {
                let pair = random.choice(&out_of_order).unwrap();
                random.i64(pair[1].time.micros()..=pair[0].time.micros())
            }
            _ => random.i64(first.micros()..last.micros()),
        };
        (PgTime::from_micros(micros.clamp(first.micros(), last.micros() - 1)), random.u8(..4) == 0)
    });
    let mut segments_read = 0;
    for (at, exclusive) in times.collect::<Vec<_>>() {
        let stops = |end: &&End| end.time > at || (exclusive && end.time == at);
        let expected = ends.iter().find(stops).unwrap();
        let plan = world.plan(at, exclusive).await;
        assert_eq!((plan.stop.lsn, plan.stop.inclusive), (expected.lsn, false), "{at}, exclusive: {exclusive}");
        let kept = ends.iter().take_while(|end| end.lsn < expected.lsn).filter(|end| end.committed).last();
        assert_eq!(plan.kept.map(|kept| kept.lsn), kept.map(|kept| kept.lsn), "{at}");
        let lost = ends.iter().find(|end| end.lsn >= expected.lsn && end.committed);
        assert_eq!(plan.lost.map(|lost| lost.lsn), lost.map(|lost| lost.lsn), "{at}");
        segments_read = segments_read.max(plan.segments_read);
    }
    assert!(segments_read <= 4, "a plan read {segments_read} segments");

    // Recovery itself, told only the time, agrees: also between commits out of order.
    let pair = out_of_order[0];
    for at in [PgTime::from_micros(pair[0].time.micros() - 1), reachable[reachable.len() / 2].time] {
        let planned = world.plan(at, false).await;
        let stops = ends.iter().find(|end| end.lsn == planned.stop.lsn).unwrap();
        assert_eq!(world.stops_by_itself(at).await, stops.xid, "{at}");
    }
}

impl World {
    /// The transaction before whose end PostgreSQL stops when it is only told a time.
    async fn stops_by_itself(&self, at: PgTime) -> u32 {
        let place = Scratch::new();
        let data = place.join("data");
        restore(&data, &self.agent.flags(), &["--to", "latest", "--no-start"]).expect(0);
        let auto = data.join("postgresql.auto.conf");
        let settings = fs::read_to_string(&auto).unwrap();
        let at = at.to_string().replace('Z', "+00"); // zones have no names yet when this setting is read
        // Even an empty target besides the one that is set is one too many.
        let others = |line: &&str| !line.starts_with("recovery_target") || line.starts_with("recovery_target_timeline");
        let mut changed: String = settings.lines().filter(others).map(|line| format!("{line}\n")).collect();
        changed += &format!("recovery_target_time = '{at}'\nrecovery_target_action = 'shutdown'\n");
        fs::write(&auto, changed).unwrap();
        let mut server = Cluster::around(self.cluster.major(), &data);
        server.launch();
        wait_for("the end of recovery", ARCHIVE_DEADLINE, || {
            let ended = !server.is_running();
            async move { ended }
        })
        .await;
        let log = server.log();
        let stopped = log.lines().find_map(|line| {
            let (_, rest) = line.split_once("recovery stopping before ")?;
            let (_, rest) = rest.split_once("transaction ")?;
            rest.split(',').next()?.parse().ok()
        });
        stopped.unwrap_or_else(|| panic!("recovery did not say where it stopped: {log}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_the_index_passed_over_ends_the_restore_with_the_segments_name() {
    let world = World::new().await;
    let catalog = world.repo.catalog(CatalogScope::Everything).await.unwrap();
    let range = catalog.timelines[&TimelineId::FIRST].ranges.as_slice()[0];
    let middle = Lsn::new((range.from.bytes() + range.to.bytes()) / 2);
    let name = SegmentName::at(TimelineId::FIRST, middle, catalog.identity.segment_size).to_string();
    let path = world.scratch.join("repo/main/wal/00000001").join(format!("{name}.zst"));
    let mut content = fs::read(&path).unwrap();
    let place = content.len() / 2;
    content[place] ^= 1;
    fs::write(&path, content).unwrap();
    let place = Scratch::new();
    let restored =
        |args: &[&str]| restore(&place.join("data"), &world.agent.flags(), &[&["--to", "latest"], args].concat());
    // Not seen, and said so; seen when asked to look; and never a restore that ends well.
    let planned = restored(&["--dry-run"]).expect(0);
    let plan = &planned.json()["plan"];
    assert!(plan["segments_read"].as_u64().unwrap() < plan["wal_segments"].as_u64().unwrap());
    let told = restored(&["--dry-run", "--verify"]).expect(1).stderr();
    assert!(told.contains(&name) && told.contains("is unusable"), "{told}");
    let told = restored(&[]).expect(1).stderr();
    assert!(told.contains(&name) && told.contains("damaged"), "{told}");
}
