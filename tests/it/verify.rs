//! Verification reads everything, names what is damaged, and says what follows from it.

use std::fs;
use std::path::Path;

use serde_json::Value;
use walguard::pg::Lsn;

use crate::kept_repository::{Kept, flip_a_bit, truncate};

fn lsn(value: &Value) -> Lsn {
    value.as_str().unwrap().parse().unwrap()
}

fn key_of(path: &Path) -> String {
    let text = path.to_str().unwrap();
    text[text.find("/main/").unwrap() + 1..].to_owned()
}

/// Where the n-th backup is consistent.
fn stop_of(kept: &Kept, backup: usize) -> Lsn {
    lsn(&kept.run(&["list", "--json"]).json()["backups"][backup]["stop"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_repository_is_found_whole_and_not_read_twice() {
    let kept = Kept::new().await;
    let all = kept.run(&["verify", "--json"]).expect(0).json();
    assert_eq!(all["problems_total"], 0);
    assert_eq!(all["checked"]["segments"], kept.segments().iter().filter(|p| !key_of(p).contains(".tail/")).count());
    assert_eq!(all["checked"]["backups"], 2);
    assert!(all["checked"]["parts"].as_u64().unwrap() >= 2);

    let again = kept.run(&["verify", "--new", "--json"]).expect(0).json();
    assert_eq!((&again["checked"]["segments"], &again["checked"]["backups"]), (&Value::from(0), &Value::from(0)));
    assert_eq!(again["verified"], all["verified"], "what was known is still known");
    let text = kept.run(&["verify"]).expect(0).stdout();
    assert!(text.contains("everything is whole") && text.contains("2 backups"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_named_with_the_moments_that_it_costs() {
    let kept = Kept::new().await;
    let (first, second) = (stop_of(&kept, 0), stop_of(&kept, 1));
    let segments = kept.segments();
    let start_of = |path: &Path| {
        let name = path.file_stem().unwrap().to_str().unwrap();
        Lsn::new(
            u64::from_str_radix(&name[8..16], 16).unwrap() << 32 | u64::from_str_radix(&name[16..], 16).unwrap() << 20,
        )
    };
    // A segment between the two backups: what lies behind it is reached from the second only.
    let whole = segments.iter().filter(|path| !key_of(path).contains(".tail/"));
    let victim = whole.clone().find(|path| start_of(path) > first && start_of(path) + (2 << 20) < second).unwrap();
    flip_a_bit(victim);
    let report = kept.run(&["verify", "--json"]).expect(3).json();
    assert_eq!(report["problems_total"], 1, "{report:#}");
    let problem = &report["problems"][0];
    assert_eq!(problem["key"], key_of(victim));
    assert_eq!((&problem["kind"], &problem["backups"]), (&Value::from("damaged"), &Value::Array(Vec::new())));
    let lost = &problem["unreachable"][0];
    assert_eq!((lsn(&lost["from"]), lsn(&lost["to"])), (start_of(victim), second));
    let text = kept.run(&["verify"]).expect(3).stdout();
    assert!(text.contains(&format!("{} to {second} cannot be reached", start_of(victim))), "{text}");

    // A segment behind both: everything from there on is lost.
    let last = whole.clone().next_back().unwrap();
    truncate(last);
    let report = kept.run(&["verify", "--json"]).expect(3).json();
    assert_eq!(report["problems_total"], 2);
    let problem = report["problems"].as_array().unwrap().iter().find(|p| p["key"] == key_of(last)).unwrap();
    let lost = &problem["unreachable"][0];
    assert_eq!(lsn(&lost["from"]), start_of(last));
    assert!(lsn(&lost["to"]) >= kept.end);

    // And one that is gone altogether.
    fs::remove_file(victim).unwrap();
    let report = kept.run(&["verify", "--json"]).expect(3).json();
    let problem = report["problems"].as_array().unwrap().iter().find(|p| p["kind"] == "missing-wal").unwrap();
    assert_eq!(lsn(&problem["unreachable"][0]["from"]), start_of(victim));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_named_with_its_files_and_the_other_stays() {
    let kept = Kept::new().await;
    let first = kept.files("base/first");
    let part = first.iter().find(|path| key_of(path).contains("/base.tar.zst.")).unwrap();
    let whole = fs::read(part).unwrap();
    flip_a_bit(part);
    let report = kept.run(&["verify", "--json"]).expect(3).json();
    assert_eq!(report["problems_total"], 1, "{report:#}");
    let problem = &report["problems"][0];
    assert_eq!((&problem["key"], &problem["backups"][0]), (&Value::from(key_of(part)), &Value::from("first")));
    assert!(!problem["files"].as_array().unwrap().is_empty(), "{problem:#}");
    assert_eq!(lsn(&problem["unreachable"][0]["to"]), stop_of(&kept, 1), "from there on the second one serves");
    let new = kept.run(&["verify", "--new", "--json"]).expect(3).json();
    assert_eq!(new["checked"]["backups"], 1, "what was not whole is looked at again");

    fs::remove_file(part).unwrap();
    let report = kept.run(&["verify", "--json"]).expect(3).json();
    assert_eq!(report["problems"][0]["kind"], "missing-object");
    fs::write(part, whole).unwrap();
    crate::harness::give_away(part);
    kept.run(&["verify", "--new"]).expect(0);

    let manifest = first.iter().find(|path| path.ends_with("manifest")).unwrap();
    flip_a_bit(manifest);
    let report = kept.run(&["verify", "--json"]).expect(3).json();
    let problem = &report["problems"][0];
    assert_eq!((&problem["key"], &problem["backups"][0]), (&Value::from(key_of(manifest)), &Value::from("first")));
}
