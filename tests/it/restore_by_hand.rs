//! No lock-in: what the README says about a restore without walguard works, word for word.

use std::fs;
use std::time::Duration;

use crate::harness::{self, Agent, Cluster, Ledger, Scratch, walguard};

const HEADING: &str = "## Restore by hand, without walguard";
const DEADLINE: Duration = Duration::from_secs(60);

/// The shell commands of the README's section.
fn commands() -> Vec<String> {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, section) = readme.split_once(&format!("{HEADING}\n")).expect("the README has the section");
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap().to_owned());
    blocks.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_with_zstd_tar_and_cp_alone_works_as_the_readme_says() {
    let mut cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let elsewhere = scratch.dir("tablespace");
    cluster.sql(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", elsewhere.display())).await;
    cluster.sql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT g FROM generate_series(1, 5000) g").await;
    let mut ledger = Ledger::create(&cluster, 7).await;
    ledger.run(20).await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let flags = agent.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[&["backup", "--label", "whole"][..], &flags].concat()).expect(0);
    ledger.run(20).await;
    cluster.sql("SELECT pg_switch_wal()").await; // so that there are whole segments behind the backup, and pieces
    ledger.run(20).await;
    let lsn = cluster.lsn().await;
    agent.wait_archived(&cluster, lsn, DEADLINE).await;
    agent.sigkill();
    let last = ledger.commits().last().unwrap().number;
    cluster.destroy().await;
    fs::remove_dir_all(&elsewhere).unwrap();

    let data = scratch.join("restored");
    let mut commands = commands();
    let names = &mut commands[0];
    for (name, value) in [
        ("REPO=", scratch.join("repo/main").display().to_string()),
        ("BACKUP=", "$REPO/base/whole".to_owned()),
        ("DATA=", data.display().to_string()),
    ] {
        let line = names.lines().find(|line| line.starts_with(name)).expect("the names come first").to_owned();
        *names = names.replace(&line, &format!("{name}{value}"));
    }
    let start = commands.pop().unwrap();
    assert_eq!(start.trim(), "pg_ctl -D \"$DATA\" start", "which the harness does, on a port of its own");
    let mut shell = harness::command("/bin/bash");
    shell.args(["-euo", "pipefail", "-c", &commands.concat()]);
    harness::finish(shell).expect(0);

    let restored = Cluster::adopt(15, &data).await;
    harness::wait_for("the end of recovery", DEADLINE, || async {
        restored.text("SELECT pg_is_in_recovery()").await == "f"
    })
    .await;
    ledger.assert_at(last, &restored.client().await).await;
    assert_eq!(restored.number("SELECT count(*) FROM moved").await, 5_000);
}
