//! The agent understands what it archives: an index lies beside each whole segment, with names, and it is the one that the
//! archive alone would give.

use futures_util::TryStreamExt as _;
use walguard::decode::{Source, WalMajor};
use walguard::detect::{Limits, Names, NamesLimits, Observer};
use walguard::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use walguard::repo::Repository;
use walguard::repo::index::{Indexer, SegmentIndex};
use walguard::repo::layout::Object;

use crate::archived_wal::{DEADLINE, repository, small, small_cluster, status, wait_in_repository, write};
use crate::harness::{Agent, Cluster, Fault, S3, Scratch, StopMode, wait_for};

/// The segments of a timeline that have an index.
async fn indexed(repo: &Repository, timeline: u32) -> Vec<SegmentName> {
    let folder = repo.layout().index_folder(TimelineId::new(timeline).unwrap());
    let keys: Vec<String> = repo.objects(folder, None).map_ok(|object| object.key).try_collect().await.unwrap();
    let names = keys.iter().filter_map(|key| match repo.layout().parse(key, small()) {
        Some(Object::Index(name)) => Some(name),
        _ => None,
    });
    names.collect()
}

/// Waits until the segment before the one that `lsn` lies in has an index.
async fn wait_indexed(repo: &Repository, timeline: u32, lsn: Lsn) {
    wait_for(&format!("the index before {lsn}"), DEADLINE, || async {
        indexed(repo, timeline).await.last().is_some_and(|name| name.end() >= lsn.align_down(1 << 20))
    })
    .await;
}

/// Indexes made from the archive alone, from the oldest snapshot of names on.
async fn rebuilt(repo: &Repository, path: &TimelineHistory, to: Lsn) -> Vec<(SegmentName, SegmentIndex)> {
    let identity = repo.require_identity().await.unwrap();
    let major = WalMajor::of_server(identity.server_version).unwrap();
    let source = Source { major, segment_size: identity.segment_size, system_id: Some(identity.system_id) };
    let first = repo.names_segments(path, small()).await.unwrap()[0];
    let (_, snapshot) = repo.names_before(path, &first, major).await.unwrap().unwrap();
    let names = Names::import(major, NamesLimits::default(), snapshot);
    let mut indexer = Indexer::new(source, &first, Observer::new(names, Limits::default(), false));
    let mut made = Vec::new();
    let mut name = first;
    while name.end() <= to {
        let read = repo.read_segment(&name).await.unwrap();
        let indexes = indexer.take(name, &read.bytes).unwrap();
        made.extend(indexes.into_iter().map(|(name, index)| (name, *index.unwrap())));
        name = name.next();
    }
    made
}

async fn work(cluster: &Cluster, round: u32) {
    let client = cluster.client().await;
    for statement in [
        format!("CREATE TABLE t{round} (id int PRIMARY KEY, note text)"),
        format!("INSERT INTO t{round} SELECT i, repeat('x', 1000) FROM generate_series(1, 1500) i"),
        format!("DELETE FROM t{round} WHERE id % 2 = 0"),
        format!("ALTER TABLE t{round} ALTER id TYPE bigint"),
        format!("TRUNCATE t{round}"),
    ] {
        client.batch_execute(&statement).await.unwrap();
    }
    write(cluster, 1500).await;
    if round > 1 {
        client.batch_execute(&format!("DROP TABLE t{}", round - 1)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_archived_segment_has_the_index_that_the_archive_alone_gives_kills_or_not() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = Agent::builder(&cluster, &url).settings("[backup]\ninterval = \"0s\"").spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&url).await;
    for round in 1..=4 {
        work(&cluster, round).await;
        if round % 2 == 0 {
            // An agent that dies before its first index leaves segments to `index rebuild`.
            wait_for("a first index", DEADLINE, || async { !indexed(&repo, 1).await.is_empty() }).await;
            agent.sigkill();
            agent.spawn_again();
            agent.wait_streaming(&cluster).await;
        }
    }
    let end = cluster.lsn().await;
    write(&cluster, 1100).await;
    agent.wait_archived(&cluster, end, DEADLINE).await;
    wait_in_repository(&repo, 1, end).await;
    wait_indexed(&repo, 1, end).await;

    let path = TimelineHistory::root(TimelineId::FIRST);
    let made = rebuilt(&repo, &path, end.align_down(1 << 20)).await;
    assert!(made.len() > 8, "{}", made.len());
    let mut events = Vec::new();
    for (name, expected) in made {
        let mut written = repo.index(&name).await.unwrap().unwrap_or_else(|| panic!("{name} has no index"));
        let mut expected = expected;
        // An agent that was started anew has seen the beginning of more transactions, or of fewer.
        for index in [&mut written, &mut expected] {
            index.largest.iter_mut().for_each(|large| large.is_complete = true);
        }
        assert_eq!(written, expected, "{name}");
        events.extend(written.events.into_iter().map(|ddl| {
            let relation = ddl.event.relation.map(|relation| relation.full_name()).unwrap_or_default();
            format!("{:?} {relation}", ddl.event.kind)
        }));
    }
    for round in 1..=3 {
        let kinds = ["Create", "Rewrite", "Truncate", "DropTable"];
        // What the last round drops lies in the last segment, which is not whole.
        for kind in &kinds[..if round == 3 { 3 } else { 4 }] {
            let event = format!("{kind} postgres.public.t{round}");
            assert!(events.contains(&event), "{event} is not among {events:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_found_no_room_while_the_store_was_away_is_made_from_the_archive() {
    let cluster = small_cluster().await;
    let s3 = S3::start().await;
    let mut builder = Agent::builder(&cluster, &s3.repo_url())
        .settings("[backup]\ninterval = \"0s\"\n[archive]\ndurability = \"spool\"");
    for (name, value) in s3.env() {
        builder = builder.env(name, &value);
    }
    let mut agent = builder.spawn();
    agent.wait_streaming(&cluster).await;
    s3.fault(Fault::Down);
    let client = cluster.client().await;
    // More than wait in the queue.
    for _ in 0..90 {
        client.batch_execute("INSERT INTO busy (word) VALUES ('x'); SELECT pg_switch_wal()").await.unwrap();
    }
    let end = cluster.lsn().await.align_down(1 << 20);
    wait_for("the WAL to be read", DEADLINE, || async {
        let told = status(&agent).await;
        let read = told["scan"]["position"]["lsn"].as_str().and_then(|lsn| lsn.parse::<Lsn>().ok());
        read >= Some(end)
    })
    .await;
    s3.heal();
    write(&cluster, 1100).await;
    let repo = Repository::connect(&s3.config(), "main").await.unwrap();
    wait_in_repository(&repo, 1, end).await;
    wait_for("every index", DEADLINE, || async {
        let timelines = repo.index_status().await.unwrap();
        timelines.iter().any(|timeline| timeline.segments >= 90 && timeline.holes.is_empty())
    })
    .await;
    assert!(agent.stop().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_goes_on_over_a_promotion() {
    let mut cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let standby = cluster.standby().await;
    let conninfo = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=walguard dbname=postgres target_session_attrs=read-write",
        cluster.port(),
        standby.port()
    );
    let mut agent = Agent::builder(&cluster, &url).conninfo(&conninfo).settings("[backup]\ninterval = \"0s\"").spawn();
    agent.wait_streaming(&cluster).await;
    work(&cluster, 1).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    cluster.sql("SELECT pg_logical_emit_message(true, 'end', '')").await;
    let flushed = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    standby.wait_replayed(flushed).await;
    cluster.stop(StopMode::Immediate).await;
    standby.promote().await;
    agent.wait_streaming(&standby).await;
    work(&standby, 2).await;
    work(&standby, 3).await;
    let end = standby.lsn().await;
    write(&standby, 1100).await;
    let repo = repository(&url).await;
    agent.wait_archived(&standby, end, DEADLINE).await;
    wait_indexed(&repo, 2, end).await;
    let second = indexed(&repo, 2).await;
    let mut before = second[0];
    assert_eq!(indexed(&repo, 1).await.last().map(SegmentName::end), Some(before.start()), "no segment is left out");
    let mut rows = 0;
    for name in second {
        assert!(name.number.get() - before.number.get() <= 1, "{before} is followed by {name}");
        before = name;
        let index = repo.index(&name).await.unwrap().unwrap();
        let dropped = index.names.iter().filter(|(_, relation)| relation.name == "t3").map(|(file, _)| *file);
        let of_t3: Vec<_> = dropped.collect();
        let deleted = index.minutes.iter().filter(|tally| tally.file.is_some_and(|file| of_t3.contains(&file)));
        rows += deleted.map(|tally| tally.rows.deleted).sum::<u64>();
    }
    assert_eq!(rows, 750, "the rows of t3 are told with its name, on the new timeline");
}
