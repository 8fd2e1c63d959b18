//! `walguard timeline` tells what the statements reported, by table and by time, out of the repository.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use walguard::pg::{Lsn, SegmentName, SegmentNumber, TimelineId};

use crate::archived_wal::{DEADLINE, agent, repository, small_cluster, write};
use crate::harness::{Agent, Cluster, Finished, Scratch, majors, wait_for, walguard, walguard_command};

/// Rows inserted, updated and deleted, by table.
type Counts = BTreeMap<String, [u64; 3]>;

fn timeline(url: &str, args: &[&str]) -> Finished {
    let mut all = vec!["timeline", "--repo", url, "--cluster", "main"];
    all.extend(args);
    walguard(&all)
}

/// Runs statements one by one, each a transaction of its own; gives what the server said of each: rows.
async fn run(cluster: &Cluster, statements: &[&str]) -> Vec<u64> {
    let client = cluster.client().await;
    let mut rows = Vec::new();
    for statement in statements {
        rows.push(client.execute(*statement, &[]).await.unwrap_or_else(|error| panic!("{statement}: {error:?}")));
    }
    rows
}

/// Waits until all that is written now is archived.
async fn archived(agent: &mut Agent, cluster: &Cluster) -> Lsn {
    let end: Lsn = cluster.text("SELECT pg_current_wal_insert_lsn()").await.parse().unwrap();
    cluster.sql("SELECT txid_current()").await; // a commit behind it, so that the WAL is flushed
    agent.wait_archived(cluster, end, DEADLINE).await;
    end
}

fn counts(tables: &Value) -> Counts {
    let of_table = |table: &Value| {
        let count = |name: &str| table[name].as_u64().unwrap();
        let name = table["name"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
        (name, [count("inserted"), count("updated"), count("deleted")])
    };
    tables.as_array().unwrap().iter().map(of_table).collect()
}

fn add(sum: &mut Counts, more: Counts) {
    for (table, counts) in more {
        sum.entry(table).or_default().iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_are_those_that_the_statements_reported() {
    for major in majors() {
        let cluster = Cluster::builder().major(major).wal_segsize_mib(1).start().await;
        let scratch = Scratch::new();
        let url = scratch.repo_url();
        let mut agent = agent(&cluster, &url).spawn();
        agent.wait_streaming(&cluster).await;
        cluster.sql("CREATE TABLE orders (id int PRIMARY KEY, state text)").await;
        cluster.sql("CREATE TABLE users (id int PRIMARY KEY, name text)").await;
        let said = run(
            &cluster,
            &[
                "INSERT INTO orders SELECT i, 'new' FROM generate_series(1, 20000) i",
                "UPDATE orders SET state = 'paid' WHERE id % 3 = 0",
                "INSERT INTO users SELECT i, md5(i::text) FROM generate_series(1, 24) i",
                "DELETE FROM orders WHERE id % 2 = 0",
            ],
        )
        .await;
        cluster.sql("BEGIN; DELETE FROM users; ROLLBACK").await;
        let deleted = run(&cluster, &["DELETE FROM users"]).await;
        archived(&mut agent, &cluster).await;
        let expected = Counts::from([
            ("orders".to_owned(), [said[0], said[1], said[3]]),
            ("users".to_owned(), [said[2], 0, deleted[0]]),
        ]);
        assert_eq!(expected["users"], [24, 0, 24]);
        for bucket in ["1s", "7s", "1m", "1h", "1 day"] {
            let told = timeline(&url, &["--json", "--bucket", bucket]).expect(0).json();
            assert_eq!(counts(&told["tables"]), expected, "{bucket} on {major}");
            let mut sum = Counts::new();
            for of_bucket in told["buckets"].as_array().unwrap() {
                add(&mut sum, counts(&of_bucket["tables"]));
            }
            assert_eq!(sum, expected, "{bucket} on {major}");
            assert_eq!(told["coverage"]["unread"], Value::Array(Vec::new()));
        }
        // The largest transactions, with id, place and tables.
        let told = timeline(&url, &["--json", "--table", "users", "--min-rows", "24"]).expect(0).json();
        let transactions = told["transactions"].as_array().unwrap();
        assert_eq!(transactions.len(), 2, "{transactions:?}");
        let wiping = transactions.iter().find(|told| told["deleted"] == 24).unwrap();
        let xid = cluster.text("SELECT txid_current()").await.parse::<u64>().unwrap();
        assert!(wiping["xid"].as_u64().unwrap() < xid && wiping["complete"] == true, "{wiping}");
        assert_eq!(wiping["tables"][0]["name"].as_str().unwrap().rsplit('.').next(), Some("users"));
        let shown = timeline(&url, &["--transactions", "--table", "users"]).expect(0).stdout();
        assert!(shown.contains(&format!("xid {}", wiping["xid"])) && shown.contains("24 deleted"), "{shown}");
        assert!(shown.contains(&format!("LSN {}", wiping["commit_lsn"].as_str().unwrap())), "{shown}");

        // Incidents of the tables that were asked for, and of no others.
        let incidents_of = |table: &str| {
            let told = timeline(&url, &["--json", "--table", table]).expect(0).json();
            told["incidents"].as_array().unwrap().len()
        };
        wait_for("the incident", DEADLINE, || async { incidents_of("users") > 0 }).await;
        assert_eq!(incidents_of("nosuch"), 0, "on {major}");
    }
}

/// Whether a segment has an index makes no difference, wherever those without one lie.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_and_wal_tell_the_same() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_streaming(&cluster).await;
    cluster.sql("CREATE TABLE orders AS SELECT i AS id FROM generate_series(1, 1000) i").await;
    write(&cluster, 6 << 10).await;
    cluster.sql("DELETE FROM orders").await;
    write(&cluster, 2 << 10).await;
    let end = archived(&mut agent, &cluster).await;
    let repo = repository(&url).await;
    let size = repo.identity().await.unwrap().unwrap().segment_size;
    let last = SegmentName { timeline: TimelineId::FIRST, number: size.segment_of(end).previous().unwrap(), size };
    wait_for("the last whole segment's index", DEADLINE, || async { repo.index(&last).await.unwrap().is_some() }).await;
    assert!(agent.stop().await.success());
    let by_index = timeline(&url, &["--json"]).expect(0).json();
    assert!(by_index["coverage"]["indexed"].as_u64().unwrap() >= 6, "{}", by_index["coverage"]);
    assert!(counts(&by_index["tables"])["orders"][2] == 1_000, "{}", by_index["tables"]);

    // Without every second index, decoding begins and ends in the middle of records; then without any.
    let mut tellings = vec![by_index];
    for every in [2, 1] {
        for number in 0..=last.number.get() {
            if number.is_multiple_of(every) {
                repo.remove_index(&SegmentName { number: SegmentNumber::new(number), ..last }).await.unwrap();
            }
        }
        tellings.push(timeline(&url, &["--json"]).expect(0).json());
    }
    let indexed = |told: &Value| told["coverage"]["indexed"].as_u64().unwrap();
    assert!(indexed(&tellings[1]) >= 3 && indexed(&tellings[1]) < indexed(&tellings[0]));
    assert_eq!(indexed(&tellings[2]), 0);
    for what in ["tables", "buckets"] {
        let sums = |told: &Value| {
            let rows = told[what].as_array().unwrap().iter();
            let sum = |name: &str| rows.clone().map(|row| row[name].as_u64().unwrap()).sum::<u64>();
            ["transactions", "inserted", "updated", "deleted"].map(sum)
        };
        assert_eq!(sums(&tellings[0]), sums(&tellings[2]), "{what}");
        assert_eq!(sums(&tellings[1]), sums(&tellings[2]), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_wrongly_is_told() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_streaming(&cluster).await;
    write(&cluster, 100).await;
    archived(&mut agent, &cluster).await;
    let refused = |args: &[&str], words: &[&str]| {
        let told = timeline(&url, args).expect(2);
        assert!(words.iter().all(|word| told.stderr().contains(word)), "{words:?} {told}");
    };
    refused(&["--from", "2025-12-17 08:30", "--to", "2025-12-17 08:14"], &["ends before it begins", "HINT"]);
    refused(&["--from", "2025-12-17 08:14 Mars/Olympus"], &["no time zone `Mars/Olympus`"]);
    refused(&["--from", "16/B374D848"], &["takes a time", "wal explain"]);
    refused(&["--from", "soon"], &["`soon`"]);
    refused(&["--from", "2101-01-01 00:00", "--to", "2101-01-01 01:00"], &["yet to come", "HINT", "the zone"]);
    refused(&["--bucket", "1.5s"], &["whole seconds"]);
    refused(&["--from", "30 days ago", "--bucket", "1s"], &["buckets", "--bucket"]);
    refused(&["--timeline", "9"], &["no timeline 9", "walguard list"]);
    refused(&["--follow", "--to", "latest"], &["cannot be used with"]);

    // Nothing there is no failure: it is said what there is.
    let told = timeline(&url, &["--from", "2001-01-01 00:00", "--to", "2001-01-01 01:00"]).expect(0).stdout();
    assert!(told.contains("nothing was committed") && told.contains("the archive begins at"), "{told}");
    let told = timeline(&url, &["--table", "bussy"]).expect(0).stdout();
    assert!(told.contains("nothing of what was asked for"), "{told}");

    // WAL that is gone is said, and everything else is told.
    let repo = repository(&url).await;
    let size = repo.identity().await.unwrap().unwrap().segment_size;
    write(&cluster, 2 << 10).await; // not the first segment, which nobody would miss
    let lost = SegmentName { timeline: TimelineId::FIRST, number: size.segment_of(cluster.lsn().await), size };
    write(&cluster, 3 << 10).await;
    archived(&mut agent, &cluster).await;
    assert!(agent.stop().await.success());
    repo.store().delete(&repo.layout().segment(&lost)).await.unwrap();
    repo.remove_index(&lost).await.unwrap();
    let told = timeline(&url, &["--bucket", "1s"]).expect(3).stdout();
    assert!(told.contains(&format!("NOT READ: WAL from {} to {}", lost.start(), lost.end())), "{told}");
}

/// `walguard timeline --follow --json`, as it goes on.
pub(crate) struct Following {
    process: Child,
    lines: mpsc::Receiver<Value>,
}

impl Following {
    pub(crate) fn begin(args: &[&str]) -> Self {
        let mut process = walguard_command(args).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        // Ends with the process.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str::<Value>(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { process, lines }
    }

    /// Reads on until rows were deleted; gives how many were inserted and deleted by then.
    pub(crate) async fn until_deleted(self) -> (u64, u64) {
        let Self { mut process, lines } = self;
        let wait = tokio::task::spawn_blocking(move || {
            let (mut inserted, mut deleted) = (0, 0);
            let begun = Instant::now();
            while deleted == 0 {
                assert!(begun.elapsed() < Duration::from_secs(120), "nobody was told of the wipe");
                let bucket = lines.recv_timeout(Duration::from_secs(60)).expect("a line for each second");
                inserted += bucket["inserted"].as_u64().unwrap();
                deleted += bucket["deleted"].as_u64().unwrap();
            }
            (inserted, deleted)
        });
        let told = wait.await.unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        told
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_hears_of_a_wipe_while_it_is_fresh() {
    let cluster = small_cluster().await;
    let scratch = Scratch::new();
    let url = scratch.repo_url();
    let mut agent = agent(&cluster, &url).spawn();
    agent.wait_streaming(&cluster).await;
    write(&cluster, 1 << 10).await;
    archived(&mut agent, &cluster).await;
    // The second time nothing was committed in what is looked back at. A busy machine takes seconds from one line to the next.
    for (from, quiet) in [("120 seconds ago", 15), ("10 seconds ago", 0)] {
        let args =
            ["timeline", "--follow", "--json", "--bucket", "1s", "--from", from, "--repo", &url, "--cluster", "main"];
        let following = Following::begin(&args);
        let before = cluster.number("SELECT count(*) FROM busy").await;
        // Over several segments, so that tails become whole segments meanwhile.
        write(&cluster, 2 << 10).await;
        let wiped = run(&cluster, &["DELETE FROM busy"]).await[0];
        cluster.sql("SELECT txid_current()").await;
        assert!(wiped > u64::try_from(before).unwrap());
        let (inserted, deleted) = following.until_deleted().await;
        assert_eq!((inserted, deleted), (wiped, wiped));
        tokio::time::sleep(Duration::from_secs(quiet)).await;
    }
}
