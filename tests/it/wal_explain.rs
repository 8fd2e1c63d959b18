//! `walguard wal explain` prints what `pg_waldump` prints, out of the repository.

use std::process::Stdio;

use walguard::pg::{Lsn, SegmentName, TimelineId};

use crate::archived_wal::{DEADLINE, small, small_cluster, write};
use crate::harness::{Agent, Scratch, command, finish, walguard, walguard_command};

#[tokio::test(flavor = "multi_thread")]
async fn archived_wal_is_explained_line_for_line_as_pg_waldump_does() {
    let cluster = small_cluster().await;
    cluster.sql("CREATE TABLE other (id int); SELECT pg_switch_wal()").await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = Agent::builder(&cluster, &url).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let start = small().start_of(small().segment_of(cluster.lsn().await).next());
    write(&cluster, 3 << 10).await;
    cluster.sql("INSERT INTO other VALUES (1), (2)").await;
    cluster.sql("CREATE TABLE named (id int); INSERT INTO named VALUES (1), (2); DELETE FROM named").await;
    let end: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    assert!(end - start > 1 << 20, "a whole segment and a part of one");
    agent.wait_archived(&cluster, end, DEADLINE).await;
    assert!(agent.stop().await.success());

    let explain = |args: &[&str]| {
        let mut all = vec!["wal", "explain"];
        all.extend(args);
        all.extend(["--plain", "--repo", &url, "--cluster", "main"]);
        walguard(&all)
    };
    let mut waldump = command(cluster.bin("pg_waldump"));
    waldump.env("TZ", "UTC").arg("-p").arg(cluster.data_dir().join("pg_wal"));
    waldump.args(["-s", &start.to_string(), "-e", &end.to_string()]);
    let expected = finish(waldump).expect(0).stdout();
    let range = format!("{start}..{end}");
    let explained = explain(&[&range]).expect(0).stdout();
    assert!(expected.lines().count() > 1_000, "{expected}");
    for (ours, theirs) in explained.lines().zip(expected.lines()) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(explained.lines().count(), expected.lines().count());

    // A segment: what begins in it, its last record's rest being in the next one.
    let name = SegmentName::at(TimelineId::FIRST, start, small());
    let of_segment = explain(&[&name.to_string()]).expect(0).stdout();
    let lines = of_segment.lines().count();
    assert!(expected.starts_with(&of_segment) && lines > 100 && lines < expected.lines().count());

    // Filters.
    let commits = expected.lines().filter(|line| line.starts_with("rmgr: Transaction")).collect::<Vec<_>>();
    let ours = explain(&[&range, "--rmgr", "transaction"]).expect(0).stdout();
    assert_eq!(ours.lines().collect::<Vec<_>>(), commits);
    let xid = commits[3].split("tx:").nth(1).unwrap().split(',').next().unwrap().trim();
    let of_xid = expected.lines().filter(|line| line.contains(&format!("tx: {xid:>10},"))).collect::<Vec<_>>();
    let ours = explain(&[&range, "--xid", xid]).expect(0).stdout();
    assert_eq!(ours.lines().collect::<Vec<_>>(), of_xid);
    let file = cluster.text("SELECT pg_relation_filenode('other')::text").await;
    let ours = explain(&[&range, "--relation", &file]).expect(0).stdout();
    assert_eq!(ours.lines().count(), 2, "{ours}");
    assert!(ours.lines().all(|line| line.contains(&format!("/{file} blk 0"))), "{ours}");
    let json = explain(&[&format!("{start}.."), "--json", "--limit", "7"]).expect(0).stdout();
    let objects: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 7);
    for (object, line) in objects.iter().zip(expected.lines()) {
        assert!(
            line.contains(object["description"].as_str().unwrap()) && line.contains(object["rmgr"].as_str().unwrap())
        );
        assert!(line.contains(&format!("tx: {:>10},", object["xid"].as_u64().unwrap())), "{object} {line}");
    }

    // With names each line is the same but for these; this table was made within the WAL that is read.
    let file = cluster.text("SELECT pg_relation_filenode('named')::text").await;
    let plain = explain(&[&range, "--relation", &file]).expect(0).stdout();
    let args = ["wal", "explain", &range, "--relation", &file, "--repo", &url, "--cluster", "main"];
    let named = walguard(&args).expect(0).stdout();
    assert!(plain.lines().count() >= 3, "{plain}");
    for (named, plain) in named.lines().zip(plain.lines()) {
        let (before, rest) = named.split_once(&format!("/{file} (")).unwrap_or_else(|| panic!("no name: {named}"));
        let (name, after) = rest.split_once(')').unwrap();
        assert!(name.ends_with("named"), "{named}");
        assert_eq!(format!("{before}/{file}{after}"), plain);
    }
    let json = walguard(&[&args[..], &["--json", "--limit", "1"]].concat()).expect(0).json();
    assert!(json["blocks"][0]["name"].as_str().unwrap().ends_with("named"), "{json}");

    // A reader that has seen enough is no failure.
    let mut piped = walguard_command(&["wal", "explain", &range, "--repo", &url, "--cluster", "main"]);
    let mut piped = piped.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(piped.stdout.take());
    let piped = piped.wait_with_output().unwrap();
    assert!(piped.status.success() && piped.stderr.is_empty(), "{piped:?}");

    // What cannot be is told.
    let error = explain(&["FF/0..FF/100"]).expect(2);
    assert!(error.stderr().contains("no WAL at FF/0") && error.stderr().contains("HINT: `walguard list`"), "{error}");
    let error = explain(&[&format!("{start}..FF/0")]).expect(2);
    assert!(
        error.stderr().contains("ends at") && error.stdout().lines().count() >= expected.lines().count(),
        "{error}"
    );
    let error = explain(&[&range, "--timeline", "9"]).expect(2);
    assert!(error.stderr().contains("knows no timeline 9"), "{error}");
    let error = explain(&["orders"]).expect(2);
    assert!(error.stderr().contains("neither a WAL segment nor a range"), "{error}");
}
