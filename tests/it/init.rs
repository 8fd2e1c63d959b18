//! `walguard init`: makes what is missing, overwrites nothing, asks for no more privileges than it says.

use std::fs;

use crate::harness::{Cluster, Scratch, finish, walguard, walguard_command};

/// The flags of `init` for a cluster.
fn flags<'a>(pg: &'a str, repo: &'a str) -> Vec<&'a str> {
    vec!["init", "--pg", pg, "--repo", repo, "--cluster", "main"]
}

#[tokio::test(flavor = "multi_thread")]
async fn init_makes_settings_slot_and_repository_and_repeats_without_harm() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let (pg, repo, config) = (cluster.conninfo(), scratch.repo_url(), scratch.join("walguard.toml"));
    let mut args = flags(&pg, &repo);
    args.extend(["--config", config.to_str().unwrap()]);

    let first = walguard(&args).expect(0).stdout();
    assert_eq!(first.matches("created").count(), 3, "{first}");
    assert_eq!(
        cluster.text("SELECT slot_type FROM pg_replication_slots WHERE restart_lsn IS NOT NULL").await,
        "physical"
    );
    assert!(scratch.join("repo/main/cluster.json").exists());
    let written = fs::read_to_string(&config).unwrap();
    assert!(written.contains("cluster = \"main\"") && written.contains(&repo), "{written}");

    let again = walguard(&args).expect(0).stdout();
    assert_eq!(again.matches("left as it is").count(), 3, "{again}");
    assert_eq!(fs::read_to_string(&config).unwrap(), written);

    // The file is all that the next command needs.
    let checked = walguard(&["check", "--config", config.to_str().unwrap()]);
    assert!(checked.stdout().contains("no base backup"), "{checked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_printed_sql_is_enough_and_nothing_more() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let pg = cluster.conninfo_of("archivist");
    let sql = walguard(&["init", "--print-sql", "--pg", &pg]).expect(0).stdout();
    cluster.sql(&sql).await;
    walguard(&flags(&pg, &scratch.repo_url())).expect(0);
    let attributes = "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls FROM pg_roles \
                      WHERE rolname = 'archivist'";
    assert_eq!(cluster.text(attributes).await, "f");
    let member = "SELECT string_agg(r.rolname, ',') FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid \
                  WHERE m.member = 'archivist'::regrole";
    assert_eq!(cluster.text(member).await, "pg_monitor");
}

#[test]
fn the_sql_is_printed_without_a_server() {
    let sql = walguard(&["init", "--print-sql"]).expect(0).stdout();
    assert!(sql.contains("CREATE ROLE walguard LOGIN REPLICATION;"), "{sql}");
}

#[test]
fn a_password_is_not_written_into_the_settings_file() {
    let scratch = Scratch::new();
    let config = scratch.join("walguard.toml");
    let mut args = flags("postgres://walguard:hunter2@127.0.0.1:1/", "/nowhere");
    args.extend(["--config", config.to_str().unwrap()]);
    let refused = walguard(&args).expect(2);
    assert!(refused.stderr().contains("password_file"), "{refused}");
    assert!(!refused.stderr().contains("hunter2"), "{refused}");
    assert!(!config.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_place_of_another_cluster_is_refused_before_a_slot_is_made() {
    let (one, other) = tokio::join!(Cluster::builder().start(), Cluster::builder().major(16).start());
    let scratch = Scratch::new();
    let repo = scratch.repo_url();
    walguard(&flags(&one.conninfo(), &repo)).expect(0);
    let refused = walguard(&flags(&other.conninfo(), &repo)).expect(1);
    assert!(refused.stderr().contains("belongs to another cluster"), "{refused}");
    assert!(refused.stderr().contains("HINT: "), "{refused}");
    assert_eq!(other.number("SELECT count(*) FROM pg_replication_slots").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_read_json_of_success_and_of_failure() {
    let cluster = Cluster::builder().start().await;
    let scratch = Scratch::new();
    let (pg, repo) = (cluster.conninfo(), scratch.repo_url());
    let mut args = flags(&pg, &repo);
    args.push("--json");
    let done = walguard(&args).expect(0).json();
    assert_eq!(done["slot_created"], true);
    assert!(done["cluster"]["system_id"].is_string(), "{done}");

    let nobody = cluster.conninfo_of("nobody_knows");
    let mut args = flags(&nobody, &repo);
    args.push("--json");
    let failed = walguard(&args).expect(1).json();
    assert_eq!(failed["exit_code"], 1);
    assert!(failed["error"].as_str().unwrap().contains("nobody_knows"), "{failed}");
}

#[test]
fn a_server_that_cannot_be_reached_is_worth_another_try() {
    let scratch = Scratch::new();
    let repo = scratch.repo_url();
    let mut command = walguard_command(&flags("host=127.0.0.1 port=1 user=walguard", &repo));
    command.env("WALGUARD_LOG", "off");
    let failed = finish(command).expect(75);
    assert!(failed.stderr().starts_with("error: connect to the server: "), "{failed}");
}
