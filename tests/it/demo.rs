//! `walguard demo`: shows what it says, and leaves nothing.

use std::fs;

use crate::harness::{Cluster, Scratch, finish, walguard_command};

#[test]
fn the_demo_plays_the_wipe_and_brings_every_row_and_trigger_back_by_the_alarms_own_command() {
    let scratch = Scratch::new();
    let bin = Cluster::builder().create().bin_dir().to_owned();
    let mut demo = walguard_command(&["demo", "--json", "--pg-bin-dir", bin.to_str().unwrap()]);
    demo.env("TMPDIR", scratch.path());
    let told = finish(demo).expect(0).json();
    let content = |name: &str| ["rows", "users", "triggers"].map(|what| told[name][what].as_i64().unwrap());
    assert_eq!((content("before"), content("after")), ([485, 24, 18], [0, 0, 0]));
    assert_eq!(told["restored"], told["before"]);
    assert_eq!(told["rows_when_warned"], told["before"]["rows"], "the first alarm came before a row was gone");
    let who = told["who"].as_str().unwrap();
    assert!(who.contains("role game_owner") && who.contains("application migrate.py"), "{who}");
    assert!(told["command"].as_str().unwrap().starts_with("walguard restore --to before:"));
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
