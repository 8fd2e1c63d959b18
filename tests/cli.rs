//! What the command line says, word for word. `TRYCMD=overwrite cargo test --test cli` writes down what changed.

use std::process::{Command, Stdio};

#[test]
fn the_command_line_says_what_is_written_down() {
    let cases = trycmd::TestCases::new();
    // What whoever runs the tests has set must not count: an empty variable is as good as none.
    for name in ["CONFIG", "PG", "REPO", "CLUSTER", "SPOOL"] {
        cases.env(format!("WALGUARD_{name}"), "");
    }
    cases.env("PGHOST", "").env("WALGUARD_LOG", "off");
    cases.case("tests/cli/*.trycmd");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    for args in [&["completions", "bash"][..], &["init", "--print-settings"], &["--help"]] {
        let mut walguard = Command::new(env!("CARGO_BIN_EXE_walguard"));
        walguard.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut walguard = walguard.spawn().unwrap();
        drop(walguard.stdout.take()); // as `head` does
        let output = walguard.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
