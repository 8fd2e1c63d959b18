//! Targets on all sides of promotions.

use std::fs;
use std::time::Duration;

use super::harness::{Agent, Cluster, Ledger, Restored, Scratch, StopMode, give_away, walguard};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// Goes on on a new timeline: the server becomes a standby of nobody and is promoted.
async fn promote(cluster: &mut Cluster, ledger: &mut Ledger) {
    cluster.stop(StopMode::Fast).await;
    let signal = cluster.data_dir().join("standby.signal");
    fs::write(&signal, "").unwrap();
    give_away(&signal);
    cluster.start().await;
    cluster.promote().await;
    ledger.follow(cluster).await;
}

async fn assert_restores(flags: &[String], args: &[&str], ledger: &Ledger, number: i64) -> serde_json::Value {
    let mut restored = Restored::run(flags, args);
    ledger.assert_at(number, &restored.client().await).await;
    restored.stop().await;
    restored.told.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_timeline_and_both_sides_of_every_switch_come_back() {
    let mut cluster = Cluster::builder().wal_segsize_mib(1).start().await;
    let scratch = Scratch::new();
    let mut ledger = Ledger::create(&cluster, 9).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    let words: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup"], words.as_slice()].concat()).expect(0);

    let mut ends = Vec::new();
    for _ in 0..2 {
        ledger.run(6).await;
        ends.push(ledger.commits().len() as i64);
        agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
        promote(&mut cluster, &mut ledger).await;
    }
    ledger.run(6).await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    assert!(agent.stop().await.success());
    cluster.stop(StopMode::Fast).await;

    for end in &ends {
        let at = |number: i64| &ledger.commits()[number as usize - 1];
        let (last, first) = (at(*end), at(*end + 1));
        assert_restores(&flags, &["--to", &format!("{:.6}", last.time)], &ledger, last.number).await;
        assert_restores(&flags, &["--to-xid", &last.xid.to_string()], &ledger, last.number).await;
        assert_restores(&flags, &["--to-xid", &first.xid.to_string()], &ledger, first.number).await;
        assert_restores(&flags, &["--to-xid", &first.xid.to_string(), "--exclusive"], &ledger, last.number).await;
        assert_restores(&flags, &["--to", &first.after.to_string()], &ledger, first.number).await;
    }
    // The end of each timeline.
    for (timeline, end) in [("1", ends[0]), ("2", ends[1]), ("3", ledger.commits().len() as i64)] {
        let told = assert_restores(&flags, &["--to", "latest", "--timeline", timeline], &ledger, end).await;
        assert_eq!(told["plan"]["path"].as_array().unwrap().last().unwrap()["timeline"].to_string(), timeline);
    }
    // What is restored in the past goes on on a timeline of its own.
    let args = ["--to-xid", &ledger.commits()[2].xid.to_string(), "--action", "promote"];
    let mut restored = Restored::run(&flags, &args);
    ledger.assert_at(3, &restored.client().await).await;
    assert_eq!(restored.told["restore"]["reached"]["timeline"], 4);
    restored.stop().await;
}
