//! `walguard demo`: shows what it says, and leaves nothing.

use std::fs;

use crate::harness::{Cluster, Scratch, finish, walguard_command};

#[test]
fn the_demo_brings_every_row_back_and_leaves_nothing() {
    let scratch = Scratch::new();
    let bin = Cluster::builder().create().bin_dir().to_owned();
    let mut demo = walguard_command(&["demo", "--rows", "1000", "--json", "--pg-bin-dir", bin.to_str().unwrap()]);
    demo.env("TMPDIR", scratch.path());
    let report = finish(demo).expect(0).json();
    assert_eq!(report["before"]["rows"], 1000);
    assert_eq!(report["after"]["rows"], 0);
    assert_eq!(report["restored"], report["before"]);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "the demo leaves nothing behind");
}

#[test]
fn a_demo_that_cannot_begin_says_what_is_missing() {
    let scratch = Scratch::new();
    let mut demo = walguard_command(&["demo", "--pg-bin-dir", scratch.path().to_str().unwrap()]);
    demo.env("TMPDIR", scratch.path());
    let failed = finish(demo).expect(1);
    assert!(failed.stderr().contains("HINT: install PostgreSQL"), "{failed}");
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "the demo leaves nothing behind");
}
