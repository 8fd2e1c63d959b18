//! The listing says what can be restored, from when to when.

use jiff::Timestamp;
use walguard::pg::Lsn;

use crate::kept_repository::{Kept, flip_an_early_bit};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_restorable_reaches_from_the_first_backup_to_the_last_commit() {
    let kept = Kept::new().await;
    let list = kept.run(&["list", "--json"]).expect(0).json();
    let backups = list["backups"].as_array().unwrap();
    let labels: Vec<_> = backups.iter().map(|backup| backup["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["first", "second"]);
    let windows = list["restorable"].as_array().unwrap();
    assert_eq!(windows.len(), 1, "{list:#}");
    let window = &windows[0];
    assert_eq!(window["from"], backups[0]["stop"]);
    assert!(window["to"].as_str().unwrap().parse::<Lsn>().unwrap() >= kept.end);
    let time = |value: &serde_json::Value| value.as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(window["from_time"], backups[0]["stop_time"]);
    assert!(kept.last_writes.contains(&time(&window["last_commit"]["time"])), "{window:#} {:?}", kept.last_writes);
    let first = &window["first_commit"];
    assert!(time(&first["time"]) <= time(&window["last_commit"]["time"]), "{window:#}");
    let lsn = |value: &serde_json::Value| value.as_str().unwrap().parse::<Lsn>().unwrap();
    assert!(lsn(&first["lsn"]) >= lsn(&window["from"]), "{window:#}");

    let text = kept.run(&["list"]).expect(0).stdout();
    assert!(
        text.contains("FROM THE FIRST COMMIT") && text.contains("TO THE LAST COMMIT") && text.contains("second"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_damaged_manifest_hides_no_other_backup() {
    let kept = Kept::new().await;
    let manifest = kept.files("base/first").into_iter().find(|path| path.ends_with("manifest")).unwrap();
    flip_an_early_bit(&manifest);
    let list = kept.run(&["list", "--json"]).expect(3).json();
    assert_eq!(list["damaged"][0]["key"], "main/base/first/manifest");
    assert_eq!(list["backups"][0]["label"], "second");
    assert_eq!(list["restorable"][0]["backups"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_was_never_initialised_is_told_as_such() {
    let scratch = crate::harness::Scratch::new();
    let url = scratch.repo_url();
    let error = crate::harness::walguard(&["list", "--repo", &url, "--cluster", "main"]).expect(1);
    assert!(error.stderr().contains("is not initialised"), "{error}");
    assert!(error.stderr().contains("HINT: check the URL and the cluster's name"), "{error}");
}
