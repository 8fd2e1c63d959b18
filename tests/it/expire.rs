//! Expiry shows its plan first, deletes what the settings do not keep, and never what a kept backup needs.

use crate::kept_repository::{Kept, flip_an_early_bit};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_without_yes_and_what_is_kept_stays_whole() {
    let kept = Kept::new().await;
    let before = kept.files("");
    let usage = kept.run(&["expire"]).expect(2);
    assert!(usage.stderr().contains("HINT: say it with --keep-backups"), "{usage}");

    let dry = kept.run(&["expire", "--keep-backups", "1"]).expect(0).stdout();
    assert!(dry.contains("keep    backup second") && dry.contains("delete  backup first"), "{dry}");
    assert!(dry.contains("this is a dry run"), "{dry}");
    assert_eq!(kept.files(""), before);

    let report = kept.run(&["expire", "--keep-backups", "1", "--yes", "--json"]).expect(0).json();
    assert!(report["expired"]["objects"].as_u64().unwrap() > 4, "{report:#}");
    let after = kept.files("");
    assert_eq!(before.len() - after.len(), usize::try_from(report["expired"]["objects"].as_u64().unwrap()).unwrap());
    assert!(kept.files("base/first").is_empty());

    kept.run(&["verify"]).expect(0);
    let list = kept.run(&["list", "--json"]).expect(0).json();
    assert_eq!(list["backups"].as_array().unwrap().len(), 1);
    assert_eq!(list["backups"][0]["usable"], true);
    assert_eq!(list["restorable"][0]["backups"][0], "second");

    let rest = kept.run(&["expire", "--keep-backups", "1", "--yes"]).expect(0).stdout();
    assert!(rest.contains("nothing to delete"), "{rest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_while_a_manifest_cannot_be_read() {
    let kept = Kept::new().await;
    let manifest = kept.files("base/second").into_iter().find(|path| path.ends_with("manifest")).unwrap();
    flip_an_early_bit(&manifest);
    let before = kept.files("");
    let text = kept.run(&["expire", "--keep-backups", "1", "--yes"]).expect(3).stdout();
    assert!(text.contains("main/base/second/manifest") && text.contains("nothing goes"), "{text}");
    assert_eq!(kept.files(""), before);
}
