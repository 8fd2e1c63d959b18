//! The commit index on real WAL: rebuilt, merged, asked; and damaged, which is named and mended.

use std::collections::BTreeMap;

use walguard::pg::{PgTime, SegmentName, TimelineHistory, TimelineId, Xid};
use walguard::repo::Repository;
use walguard::repo::catalog::LsnRange;
use walguard::repo::index::{Found, Group, Level, SegmentIndex, Summary, Wanted};

use crate::archived_wal::{repository, small, small_cluster, wait_in_repository, write};
use crate::harness::{Agent, Scratch, walguard};

/// The whole segments of timeline 1 that are archived, and their indexes.
async fn indexes(repo: &Repository) -> BTreeMap<SegmentName, Option<SegmentIndex>> {
    let catalog = crate::archived_wal::catalog(repo).await;
    let range = catalog.timelines[&TimelineId::FIRST].ranges.as_slice()[0];
    let mut found = BTreeMap::new();
    let mut name = SegmentName::at(TimelineId::FIRST, range.from, small());
    while name.end() <= range.to {
        found.insert(name, repo.index(&name).await.unwrap());
        name = name.next();
    }
    found
}

/// The number of a field of a report.
fn number(report: &serde_json::Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("no {field} in {report:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_are_rebuilt_as_they_were_and_merged_ones_say_what_all_together_do() {
    let cluster = small_cluster().await;
    let place = Scratch::new();
    let mut agent = Agent::spawn(&cluster, &place.repo_url());
    agent.wait_streaming(&cluster).await;

    // Many small transactions beside one that stays open over many segments, with one rolled back to a savepoint in it.
    let long = cluster.client().await;
    long.batch_execute("CREATE TABLE slow (n int)").await.unwrap();
    long.batch_execute("BEGIN; INSERT INTO slow SELECT generate_series(1, 700)").await.unwrap();
    let xid: i64 = long.query_one("SELECT pg_current_xact_id()::text::bigint", &[]).await.unwrap().get(0);
    long.batch_execute("SAVEPOINT a; INSERT INTO slow SELECT generate_series(1, 9); ROLLBACK TO a").await.unwrap();
    write(&cluster, 12_000).await;
    cluster.sql("SELECT pg_create_restore_point('half way')").await;
    tokio::join!(write(&cluster, 5_000), write(&cluster, 5_000), write(&cluster, 5_000));
    long.batch_execute("COMMIT").await.unwrap();
    cluster.sql("DELETE FROM busy WHERE id % 3 = 0").await;
    write(&cluster, 12_000).await;
    cluster.sql("TRUNCATE slow").await;
    write(&cluster, 4_000).await;
    cluster.sql("SELECT pg_switch_wal()").await;
    let inserted = cluster.number("SELECT max(id) FROM busy").await;
    let deleted = inserted / 3 - cluster.number("SELECT count(*) FROM busy WHERE id % 3 = 0").await;
    let file = cluster.number("SELECT pg_relation_filenode('busy')").await;
    cluster.sql("SELECT pg_switch_wal()").await;
    let end = cluster.lsn().await;
    agent.wait_archived(&cluster, end, crate::archived_wal::DEADLINE).await;
    let repo = repository(&place.repo_url()).await;
    wait_in_repository(&repo, 1, small().start_of(small().segment_of(end))).await;
    let flags = agent.flags();
    assert!(agent.stop().await.success());
    let run = |args: &[&str], code: i32| {
        let all: Vec<&str> = args.iter().copied().chain(flags.iter().map(String::as_str)).collect();
        walguard(&all).expect(code)
    };

    // Whatever the agent wrote is what a rebuild makes, segment for segment.
    let live = indexes(&repo).await;
    let report = run(&["index", "rebuild", "--all", "--json"], 0).json();
    assert_eq!(number(&report, "replaced"), 0, "{report:#}");
    assert_eq!(number(&report, "segments"), live.len() as u64);
    let rebuilt = indexes(&repo).await;
    for (name, index) in &live {
        assert!(index.is_none() || *index == rebuilt[name], "{name}");
    }
    let made: Vec<(&SegmentName, &SegmentIndex)> =
        rebuilt.iter().filter_map(|(name, index)| Some((name, index.as_ref()?))).collect();
    assert!(made.len() + 1 >= live.len() && made.len() > 32, "all but the last: {} of {}", made.len(), live.len());
    let status = run(&["index", "status", "--json"], 0).json();
    assert_eq!(status["timelines"][0]["indexed"].as_u64().unwrap(), made.len() as u64);
    assert!(number(&status["timelines"][0], "merged") >= 2, "{status:#}");

    // What all indexes say one by one is what the merged ones say, and what the server knows.
    let lookup = repo.lookup(TimelineHistory::root(TimelineId::FIRST), small());
    let range = LsnRange { from: made[0].0.start(), to: made.last().unwrap().0.end() };
    let mut sum = Summary::default();
    made.iter().for_each(|(_, index)| sum.add(&Summary::of(index)));
    assert_eq!(lookup.summary(range).await.unwrap(), (sum.clone(), vec![]));
    let (first, last) = sum.end_times.unwrap();
    let wanted =
        Wanted { from: first, to: PgTime::from_micros(last.micros() + 1), minutes_each: 60, all_events: false };
    let activity = lookup.activity(range, wanted).await.unwrap();
    let rows = activity.tallies.iter().filter(|tally| tally.file.is_some_and(|of| i64::from(of.number) == file));
    let counted =
        rows.fold((0, 0), |(inserts, deletes), tally| (inserts + tally.rows.inserted, deletes + tally.rows.deleted));
    assert_eq!(counted, (inserted as u64, deleted as u64));
    let points = lookup.restore_points(range, b"half way").await.unwrap();
    assert_eq!((points.0.len(), points.1), (1, vec![]));
    let xid = Xid::new(u32::try_from(xid).unwrap()).unwrap();
    let Some(Found::Segment(name, index)) = lookup.end_of(range, xid).await.unwrap() else {
        panic!("{xid:?} is not found")
    };
    let end = index.ends.iter().find(|end| end.includes(xid)).unwrap();
    assert!(end.committed && end.subtransactions.is_empty(), "the savepoint was rolled back: {end:?}");
    let large = made.iter().find(|(other, _)| **other == name).unwrap().1;
    let large = large.largest.iter().find(|large| large.xid == Some(xid)).unwrap();
    assert_eq!(large.files.iter().map(|(_, rows)| rows.inserted).sum::<u64>(), 700, "{large:?}");

    // Times: the first segment in which something ended later, for each end there is.
    for (_, index) in made.iter().step_by(7) {
        for at in index.ends.iter().step_by(11).map(|end| end.time) {
            let expected =
                made.iter().find(|(_, index)| index.ends.iter().any(|end| end.time > at)).map(|(name, _)| **name);
            let found = lookup.first_end_after(range, at, false).await.unwrap().map(|found| match found {
                Found::Segment(name, _) | Found::Unindexed(name) => name,
            });
            assert_eq!(found, expected, "{at}");
        }
    }

    // What goes missing or is damaged is named, and made again as it was. One is within the long transaction.
    let victims = [*made[4].0, *made[20].0, *made[21].0];
    for victim in victims {
        repo.remove_index(&victim).await.unwrap();
    }
    let broken = *made[9].0;
    repo.remove_index(&broken).await.unwrap();
    repo.store().create(&repo.layout().index(&broken), "nonsense".into()).await.unwrap();
    let status = run(&["index", "status"], 3).stdout();
    assert!(status.contains(&format!("no index: {}\n", victims[0])), "{status}");
    assert!(status.contains(&format!("no index: {} to {}, 2 segments", victims[1], victims[2])), "{status}");
    let verified = run(&["verify"], 3).stdout();
    assert!(verified.contains(&format!("index/00000001/{broken}")), "{verified}");
    assert!(verified.contains("nothing becomes unreachable by it"), "{verified}");
    let report = run(&["index", "rebuild", "--check", "--json"], 0).json();
    assert_eq!((number(&report, "made"), number(&report, "replaced")), (3, 1), "{report:#}");
    assert_eq!(indexes(&repo).await, rebuilt);
    run(&["verify"], 0);

    // Merged indexes are made again from the indexes, and are the same.
    let group = Group::of(made[20].0, Level::FIRST);
    let merged = repo.merged_index(&group).await.unwrap().unwrap();
    repo.remove_merged_indexes_of(made[20].0).await.unwrap();
    let report = run(&["index", "rebuild", "--json"], 0).json();
    assert!(number(&report, "merged") >= 1, "{report:#}");
    assert_eq!(repo.merged_index(&group).await.unwrap().unwrap(), merged);
    // Nor is one that is damaged there for good.
    repo.remove_merged_indexes_of(made[20].0).await.unwrap();
    repo.store().create(&repo.layout().merged(&group), "nonsense".into()).await.unwrap();
    assert_eq!(number(&run(&["index", "rebuild", "--check", "--json"], 0).json(), "merged"), 1);
    assert_eq!(repo.merged_index(&group).await.unwrap().unwrap(), merged);
    let usage = run(&["index", "rebuild", "--from", "yesterday"], 2);
    assert!(usage.stderr().contains("HINT: an LSN looks like"), "{usage}");
}
