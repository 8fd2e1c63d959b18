//! Without a database to go into, a rebuild makes a server of its own.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use walguard::detect::incident::Incident;

use crate::archived_wal::repository;
use crate::harness::{Agent, Restored, Scratch, command, finish, restore, restore_command, wait_for, walguard_command};
use crate::managed::*;

#[tokio::test(flavor = "multi_thread")]
async fn by_the_alarms_own_command_what_was_wiped_from_a_managed_database_is_in_a_new_server() {
    let cluster = managed(15).await;
    let (scratch, place) = (Scratch::new(), Scratch::new());
    let client = app(&cluster).await;
    for statement in MANY_KINDS.split(";\n") {
        run(&client, statement).await;
    }
    let settings = format!("[restore]\ntarget_dir = \"{}\"", place.path().display());
    let mut agent = agent(&cluster, &scratch).settings(&settings).spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    wait_known(&agent).await;
    take_base(&agent, "first").await;
    run(&client, "INSERT INTO keyed SELECT 'new', i FROM generate_series(700000, 700100) i").await;
    let before = contents(&client).await;
    run(&client, "DELETE FROM keyed").await;
    let is_wiped = |incident: &Incident| {
        incident.first_harm.is_some() && incident.tables.iter().any(|table| table.name.ends_with("keyed"))
    };
    let wipe = wait_incident(&repo, "the wipe", is_wiped).await;
    wait_kept(&cluster).await;

    // As it is printed, but for the place of the program.
    let shown = verb(&agent, &["incidents", "show", &wipe.id]).expect(0).stdout();
    let line = |last: &str| {
        let mut lines = shown.lines().map(str::trim).filter(|line| line.starts_with("walguard restore"));
        lines.find(|line| line.contains(last)).unwrap_or_else(|| panic!("no {last} in {shown}")).to_owned()
    };
    let sh = |line: &str| {
        let program = walguard_command(&[]).get_program().to_owned();
        let rest = line.strip_prefix("walguard ").unwrap();
        let mut shell = command("/bin/sh");
        shell.args(["-c", &format!("exec \"$0\" {rest} --json")]).arg(program);
        finish(shell)
    };
    let dry = tokio::task::block_in_place(|| sh(&line("--dry-run"))).expect(0).json();
    assert_eq!((&dry["plan"]["base"]["label"], &dry["server"]), (&"first".into(), &serde_json::Value::Null), "{dry:#}");
    assert!(std::fs::read_dir(place.path()).unwrap().next().is_none(), "a dry run writes nothing");
    let told = tokio::task::block_in_place(|| sh(&line("--yes"))).expect(0).json();
    let server = &told["server"];
    let config =
        format!("host={} port={} user=postgres dbname=app", server["socket_dir"].as_str().unwrap(), server["port"]);
    let rebuilt = contents(&connect(&config).await).await;
    let data_dir = server["data_dir"].as_str().unwrap();
    let mut stop = command(cluster.bin("pg_ctl"));
    stop.args(["stop", "-w", "-m", "immediate", "-D", data_dir]);
    tokio::task::block_in_place(|| finish(stop)).expect(0);
    assert!(rebuilt == before, "{told:#}");
    assert!(data_dir.ends_with(&wipe.id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_in_a_new_server_that_is_killed_at_any_moment_goes_on_when_run_again() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY, pad text); CREATE INDEX ON t (pad)").await;
    run(&client, "INSERT INTO t SELECT i, repeat('x', 100) || i FROM generate_series(1, 30000) i").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    run(&client, "UPDATE t SET pad = 'y' || id WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0").await;
    wait_kept(&cluster).await;
    let expected = contents(&client).await;

    let place = Scratch::new();
    let dir = place.join("data");
    let args = ["--to", "latest", "--action", "shutdown"];
    let mut kills = 0;
    for _ in 0..12 {
        let mut killed = spawn_restore(&dir, &agent, &args);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..2_500))).await;
        if killed.try_wait().unwrap().is_some() {
            break; // it was done
        }
        killed.kill().unwrap();
        killed.wait().unwrap();
        kills += 1;
    }
    eprintln!("killed {kills} times");
    if dir.join("walguard-rebuild.json").exists() || !dir.join("PG_VERSION").exists() {
        let told = tokio::task::block_in_place(|| restore(&dir, &agent.flags(), &args)).expect(0).json();
        assert_eq!(
            (&told["server"]["pid"], &told["server"]["remarks"]),
            (&serde_json::Value::Null, &serde_json::json!([]))
        );
    }
    assert!(!dir.join("postmaster.pid").exists(), "it was asked to stop");
    assert_eq!(left_by_a_rebuild(&dir), [] as [String; 0]);

    // It is a cluster like any other from now on.
    let log = place.join("log");
    let mut start = command(cluster.bin("pg_ctl"));
    let options = format!("-c listen_addresses= -c unix_socket_directories={}", dir.display());
    start.args(["start", "-w", "-o", &options, "-D"]).arg(&dir).arg("-l").arg(&log);
    tokio::task::block_in_place(|| finish(start)).expect(0);
    let mut stop = command(cluster.bin("pg_ctl"));
    stop.args(["stop", "-w", "-m", "fast", "-D"]).arg(&dir);
    tokio::task::block_in_place(|| finish(stop)).expect(0);

    // What is there is not overwritten.
    let again = tokio::task::block_in_place(|| restore(&dir, &agent.flags(), &args));
    assert!(again.stderr().contains("holds a cluster"), "{again}");
    let other = ["--to", "latest", "--delta"];
    let refused = tokio::task::block_in_place(|| restore(&place.join("other"), &agent.flags(), &other)).expect(2);
    assert!(refused.stderr().contains("--delta needs `source = \"physical\"`"), "{refused}");

    // Killed when all was proved and only the server was to be handed over.
    let late = place.join("late");
    let mut killed = spawn_restore(&late, &agent, &args);
    let is_done = || async {
        std::fs::read_to_string(late.join("walguard-rebuild.json")).is_ok_and(|note| !note.contains("\"done\":null"))
    };
    while !is_done().await {
        assert!(killed.try_wait().unwrap().is_none(), "it ended before the note was seen");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let told = tokio::task::block_in_place(|| restore(&late, &agent.flags(), &args)).expect(0).json();
    assert_eq!(
        (&told["restore"]["resumed"], &told["restore"]["tables_verified"]),
        (&true.into(), &1.into()),
        "{told:#}"
    );
    assert!(!late.join("walguard-rebuild.json").exists());

    // Left running, it holds what was there; the ordinary way.
    let mut restored = tokio::task::block_in_place(|| Restored::run(&agent.flags(), &["--to", "latest"]));
    assert_eq!(contents(&restored.client_of("app").await).await, expected);
    let wal_level: String = restored.client().await.query_one("SHOW wal_level", &[]).await.unwrap().get(0);
    assert_eq!(wal_level, "replica", "what the rebuild was tuned to is gone");
    restored.stop().await;
}

/// A restore that is there to be killed.
fn spawn_restore(dir: &Path, agent: &Agent, args: &[&str]) -> Child {
    let mut command = restore_command(dir, &agent.flags(), args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// What is in a directory of a rebuild that is not a cluster's, nor its log.
fn left_by_a_rebuild(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let names = names.map(|name| name.into_string().unwrap());
    names.filter(|name| name.contains("walguard-initdb") || name.contains("walguard-rebuild")).collect()
}

/// Law broken: what a killed run left behind was still at work in the folder of the next, whose `initdb` failed of it; the
/// database came back with another locale.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_that_is_killed_while_the_cluster_is_made_goes_on_beside_what_it_left_at_work() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    let place = Scratch::new();
    let dir = place.join("data");
    let args = ["--to", "latest", "--action", "shutdown"];
    for _ in 0..3 {
        let before = left_by_a_rebuild(&dir);
        let is_at_work = || {
            let mut new = left_by_a_rebuild(&dir).into_iter().filter(|name| !before.contains(name));
            new.any(|name| std::fs::read_dir(dir.join(name)).is_ok_and(|files| files.count() > 3))
        };
        let mut killed = spawn_restore(&dir, &agent, &args);
        wait_for("initdb", DEADLINE, || async { is_at_work() }).await;
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    let told = tokio::task::block_in_place(|| restore(&dir, &agent.flags(), &args)).expect(0).json();
    assert_eq!(told["server"]["remarks"], serde_json::json!([]), "{told:#}");
    assert_eq!(told["restore"]["tables_verified"], 1, "{told:#}");
    assert_eq!(left_by_a_rebuild(&dir), [] as [String; 0]);
    assert!(agent.stop().await.success());
}

const LOCALE: &str = "SELECT concat_ws(' ', pg_encoding_to_char(encoding), datcollate, datctype, \
     to_jsonb(d) ->> 'datlocprovider', to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') FROM pg_database d WHERE datname = current_database()";

/// Text sorts as it did, also in a database that every cluster has from the beginning, as a managed service's mostly is.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_comes_back_with_its_locale_and_under_its_name_even_if_that_is_postgres() {
    let icu = "LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'de-AT'";
    let builtin = "LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'";
    for (major, database, locale) in [(15, "postgres", ""), (15, "app", icu), (17, "app", builtin)] {
        let cluster = managed(major).await;
        let scratch = Scratch::new();
        if database == "app" {
            cluster.sql("DROP DATABASE app").await;
            cluster.sql(&format!("CREATE DATABASE app OWNER supa TEMPLATE template0 {locale}")).await;
        } else {
            cluster.sql("GRANT CREATE ON DATABASE postgres TO supa").await;
            cluster.sql("GRANT ALL ON SCHEMA public TO supa").await;
        }
        let info = conninfo(&cluster).replace("dbname=app", &format!("dbname={database}"));
        let client = connect(&info).await;
        run(&client, "CREATE TABLE words (word text PRIMARY KEY); INSERT INTO words VALUES ('a'), ('B'), ('ä'), ('Z')")
            .await;
        let mut agent = agent(&cluster, &scratch).conninfo(&info).spawn();
        agent.wait_streaming(&cluster).await;
        take_base(&agent, "first").await;
        run(&client, "INSERT INTO words VALUES ('ß')").await;
        wait_kept(&cluster).await;
        if major > 15 {
            // It is said before anything is made.
            let (elsewhere, here) = (Scratch::new(), tempfile::tempdir().unwrap());
            let bare = ["--to", "latest", "--pg-bin-dir", here.path().to_str().unwrap()];
            let refused = tokio::task::block_in_place(|| restore(&elsewhere.join("data"), &agent.flags(), &bare));
            assert!(refused.stderr().contains("install PostgreSQL 17 or a newer one"), "{refused}");
            assert!(!elsewhere.join("data").exists());
        }
        let programs = cluster.bin("postgres").parent().unwrap().display().to_string();
        let args = ["--to", "latest", "--pg-bin-dir", &programs];
        let mut restored = tokio::task::block_in_place(|| Restored::run(&agent.flags(), &args));
        let rebuilt = restored.client_of(database).await;
        assert_eq!(restored.told["server"]["remarks"], serde_json::json!([]), "{:#}", restored.told["server"]);
        for query in [LOCALE, "SELECT string_agg(word, ' ' ORDER BY word) FROM words"] {
            let told: String = rebuilt.query_one(query, &[]).await.unwrap().get(0);
            assert_eq!(told, client.query_one(query, &[]).await.unwrap().get::<_, String>(0), "on {major}");
        }
        drop(rebuilt);
        restored.stop().await;
    }
}
