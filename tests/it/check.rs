//! `walguard check`: says what is wrong before it hurts, and what to do about it.

use serde_json::Value;

use crate::harness::{Cluster, Finished, Scratch, walguard};

/// Runs `check --json` and gives its findings.
fn findings(pg: &str, scratch: &Scratch, code: i32) -> Vec<Value> {
    let repo = scratch.repo_url();
    let spool = scratch.dir("spool");
    let args =
        ["check", "--json", "--pg", pg, "--repo", &repo, "--cluster", "main", "--spool", spool.to_str().unwrap()];
    let report: Finished = walguard(&args).expect(code);
    report.json()["findings"].as_array().unwrap().clone()
}

/// The findings of a level about a topic.
fn about<'a>(findings: &'a [Value], level: &str, topic: &str) -> Vec<&'a str> {
    let matching = findings.iter().filter(|finding| finding["level"] == level && finding["topic"] == topic);
    matching.map(|finding| finding["text"].as_str().unwrap()).collect()
}

fn init(cluster: &Cluster, scratch: &Scratch) {
    walguard(&["init", "--pg", &cluster.conninfo(), "--repo", &scratch.repo_url(), "--cluster", "main"]).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_was_never_initialised_is_told_how_to_begin() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let found = findings(&cluster.conninfo(), &scratch, 1);
    assert_eq!(about(&found, "error", "repository").len(), 1, "{found:?}");
    assert!(found.iter().any(|finding| finding["hint"].as_str().is_some_and(|hint| hint.contains("walguard init"))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_a_backup_needs_attention_and_has_no_error() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    init(&cluster, &scratch);
    let found = findings(&cluster.conninfo(), &scratch, 3);
    assert_eq!(about(&found, "warning", "backups").len(), 1, "{found:?}");
    assert_eq!(about(&found, "ok", "cluster").len(), 1, "{found:?}");
    assert_eq!(about(&found, "ok", "spool").len(), 1, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_in_the_same_place_is_an_error() {
    let (one, other) = tokio::join!(Cluster::builder().start(), Cluster::builder().major(17).start());
    let scratch = Scratch::new();
    init(&one, &scratch);
    let found = findings(&other.conninfo(), &scratch, 1);
    assert!(about(&found, "error", "cluster")[0].contains("system identifier"), "{found:?}");
}

#[test]
fn a_server_that_is_down_is_an_error_and_the_rest_is_checked_all_the_same() {
    let scratch = Scratch::new();
    let found = findings("host=127.0.0.1 port=1 user=walguard", &scratch, 1);
    assert_eq!(about(&found, "error", "server").len(), 1, "{found:?}");
    assert_eq!(about(&found, "ok", "spool").len(), 1, "{found:?}");
}

#[test]
fn a_repository_that_cannot_be_written_is_an_error() {
    let scratch = Scratch::new();
    let blocked = scratch.file("file", "not a directory");
    let repo = format!("file://{}/repo", blocked.display());
    let pg = "host=127.0.0.1 port=1 user=walguard";
    let report = walguard(&["check", "--pg", pg, "--repo", &repo, "--cluster", "main"]).expect(1);
    assert!(report.stdout().contains("error    repository"), "{report}");
}
