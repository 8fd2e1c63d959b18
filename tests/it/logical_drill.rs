//! Drills with a logical source: the database is rebuilt in a server of its own, and looked at.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use walguard::pg::Lsn;

use crate::harness::{Agent, Finished, Scratch, wait_for};
use crate::kept_repository::flip_a_bit;
use crate::managed::*;

const CHECKS: &str = "
[[drill.checks]]
name = 'orders'
database = 'app'
sql = 'SELECT count(*) FROM public.orders'
expect = '1500'
[[drill.checks]]
name = 'contacts'
database = 'crm'
sql = 'SELECT count(*) = 2 FROM public.contacts'
";

/// Runs a drill in `place`, and makes sure that nothing is left of it there.
fn drill(agent: &Agent, place: &Path, args: &[&str]) -> Finished {
    let finished = verb(agent, &[&["drill", "--json", "--scratch-dir", place.to_str().unwrap()], args].concat());
    assert!(!place.exists(), "{} is left behind: {finished}", place.display());
    finished
}

fn point<'a>(told: &'a Value, name: &str) -> &'a Value {
    let mut points = told["points"].as_array().unwrap().iter();
    points.find(|point| point["name"] == name).unwrap_or_else(|| panic!("no point {name} in {told:#}"))
}

/// All that lies below a folder, without the drafts of what is being written.
fn files(folder: &Path) -> Vec<PathBuf> {
    let is_draft = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with('.');
    let entries = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).filter(|path| !is_draft(path));
    let mut found: Vec<_> = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_rebuilds_a_managed_database_looks_at_it_and_leaves_nothing_behind() {
    for major in [15, 18] {
        let cluster = managed(major).await;
        let scratch = Scratch::new();
        let client = app(&cluster).await;
        run(&client, "CREATE TABLE orders (id int PRIMARY KEY, note text); CREATE INDEX ON orders (note)").await;
        run(&client, "INSERT INTO orders SELECT i, md5(i::text) FROM generate_series(1, 1000) i").await;
        let settings = format!("[drill]\npg_bin_dir = '{}'\n{CHECKS}", cluster.bin_dir().display());
        let mut agent = agent(&cluster, &scratch).settings(&settings).spawn();
        agent.wait_streaming(&cluster).await;
        let place = scratch.join("drill");
        let none = drill(&agent, &place, &[]).expect(1);
        assert!(none.stdout().contains("walguard backup"), "{none}");

        take_base(&agent, "first").await;
        run(&client, "INSERT INTO orders SELECT i, 'late' FROM generate_series(1001, 1500) i").await;
        wait_kept(&cluster).await;
        let told = drill(&agent, &place, &[]).expect(0).json();
        assert_eq!((&told["outcome"], &told["backup"]), (&json!("proven"), &json!("first")), "{told:#}");
        for name in ["target", "rows", "check orders"] {
            assert_eq!(point(&told, name)["verdict"], "passed", "{told:#}");
        }
        assert!(point(&told, "rows")["told"].as_str().unwrap().starts_with("1500 rows in 1 tables"), "{told:#}");
        assert_eq!(told["points"].as_array().unwrap().len(), 3, "checks of other databases are theirs: {told:#}");
        assert_eq!((&told["database"], &told["changes"]), (&json!("app"), &json!(500)));
        let kept: Value =
            serde_json::from_slice(&fs::read(scratch.join("repo").join(told["record"].as_str().unwrap())).unwrap())
                .unwrap();
        assert_eq!(kept["points"], told["points"]);
        let random = drill(&agent, &place, &["--random"]).json();
        assert!(random["target"].as_str().unwrap().contains("random moment"), "{random:#}");
        assert_eq!((&random["error"], &point(&random, "target")["verdict"]), (&Value::Null, &json!("passed")));
        if major != 15 {
            continue;
        }

        // What is not so is told, and by a line.
        run(&client, "DELETE FROM orders WHERE id > 1200").await;
        wait_kept(&cluster).await;
        let told = drill(&agent, &place, &["--database", "app"]).expect(3).json();
        assert_eq!(point(&told, "check orders")["found"], "1200", "{told:#}");
        let other = drill(&agent, &place, &["--database", "nonesuch"]).expect(1);
        assert!(other.stdout().contains("the change logs are those of app"), "{other}");
        let small = drill(&agent, &place, &["--max-bytes", "10 KB"]).expect(1).json();
        assert!(small["error"].as_str().unwrap().contains("the drill may take"), "{small:#}");

        // A table that changed since the base cannot be rebuilt whole; the rest is looked at all the same.
        run(&client, "ALTER TABLE orders ADD COLUMN since date").await;
        run(&client, "INSERT INTO orders VALUES (9001, 'new', '2025-12-17')").await;
        wait_kept(&cluster).await;
        let told = drill(&agent, &place, &[]).expect(3).json();
        assert_eq!(told["outcome"], "wrong", "{told:#}");
        assert!(point(&told, "whole")["told"].as_str().unwrap().contains("orders"), "{told:#}");
        take_base(&agent, "second").await;
        let told = drill(&agent, &place, &[]).expect(3).json();
        let failed: Vec<_> = told["points"].as_array().unwrap().iter().filter(|p| p["verdict"] == "failed").collect();
        assert_eq!((failed.len(), &failed[0]["found"]), (1, &json!("1201")), "{told:#}");

        // Changes that are damaged are named.
        assert!(agent.stop().await.success());
        run(&client, "INSERT INTO orders SELECT i, md5(i::text) FROM generate_series(20000, 22000) i").await;
        agent.spawn_again();
        agent.wait_streaming(&cluster).await;
        wait_kept(&cluster).await;
        let log = files(&scratch.join("repo/main/changes"));
        let largest = log.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
        flip_a_bit(largest);
        let told = drill(&agent, &place, &[]).expect(1).json();
        assert_eq!(told["outcome"], "failed", "{told:#}");
        let name = largest.file_stem().unwrap().to_str().unwrap().split('.').next().unwrap();
        assert!(told["error"].as_str().unwrap().contains(name), "{name}: {told:#}");

        // An end that is gone leaves no hole: the agent's own proof shows it.
        flip_a_bit(largest);
        let proved = || async {
            let lsn: Lsn = cluster.text("SELECT pg_current_wal_insert_lsn()").await.parse().unwrap();
            let status = status(&agent);
            status["caught_up_position"]["lsn"].as_str().and_then(|at| at.parse().ok()) >= Some(lsn)
        };
        wait_for("the proof that all is kept", DEADLINE, proved).await;
        assert!(agent.stop().await.success());
        assert_eq!(drill(&agent, &place, &[]).expect(3).json()["outcome"], "wrong", "all is there again");
        let last = files(&scratch.join("repo/main/changes")).pop().unwrap();
        fs::remove_file(last).unwrap();
        let told = drill(&agent, &place, &[]).expect(1).json();
        let damage = told["damage"][0]["problem"].as_str().unwrap();
        assert!(damage.starts_with("the end of the changes is gone"), "{told:#}");
        let listed = verb(&agent, &["drill", "list"]).expect(0).stdout();
        assert!(listed.contains("app: latest") && listed.contains("proven"), "{listed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_drills_each_of_its_databases_and_a_proof_of_one_says_nothing_of_another() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    cluster.sql("CREATE DATABASE crm OWNER supa").await;
    let shop = app(&cluster).await;
    let crm = connect(&conninfo(&cluster).replace("dbname=app", "dbname=crm")).await;
    run(&shop, "CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 1500)").await;
    run(&crm, "CREATE TABLE contacts (id int PRIMARY KEY); INSERT INTO contacts VALUES (1)").await;
    let place = scratch.join("drill");
    let settings = format!(
        "[logical]\ndatabases = [\"crm\"]\n[drill]\nevery = \"1h\"\nscratch_dir = \"{}\"\n{CHECKS}",
        place.display()
    );
    let mut agent = agent(&cluster, &scratch).settings(&settings).spawn();
    agent.wait_streaming(&cluster).await;
    take_base(&agent, "first").await;
    let drilled = || verb(&agent, &["drill", "list", "--json"]).expect(0).json();
    wait_for("a drill of each", DEADLINE, || async { drilled().as_array().unwrap().len() == 2 }).await;
    let of = |drills: &Value, database: &str| -> Vec<Value> {
        let drills = drills.as_array().unwrap().iter().filter(|drill| drill["database"] == *database);
        drills.map(|drill| drill["outcome"].clone()).collect()
    };
    let drills = drilled();
    assert_eq!((of(&drills, "app"), of(&drills, "crm")), (vec![json!("proven")], vec![json!("wrong")]));
    let alarm = || async { status(&agent)["alarms"]["drill"]["text"].as_str().map(str::to_owned) };
    wait_for("the alarm", DEADLINE, || async { alarm().await.is_some() }).await;
    let text = alarm().await.unwrap();
    assert!(text.starts_with("database crm: ") && text.contains("check contacts"), "{text}");
    let told = status(&agent);
    assert_eq!((&told["drills"]["proven"], &told["drills"]["last"]["outcome"]), (&Value::Null, &json!("wrong")));

    // Somebody's proof of the other changes nothing; one of this one ends it, with the next look.
    run(&crm, "INSERT INTO contacts VALUES (2)").await;
    let kept = || async {
        let lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await;
        let query = format!("SELECT bool_and(confirmed_flush_lsn >= '{lsn}') FROM pg_replication_slots");
        wait_for("the changes to be kept", DEADLINE, || async { cluster.text(&query).await == "t" }).await;
    };
    kept().await;
    assert!(agent.stop().await.success());
    drill(&agent, &place, &["--database", "app"]).expect(0);
    agent.spawn_again();
    wait_for("the alarm of before", DEADLINE, || async { status(&agent)["alarms"]["drill"].is_object() }).await;
    assert!(agent.stop().await.success());
    drill(&agent, &place, &["--database", "crm"]).expect(0);
    agent.spawn_again();
    wait_for("what is proved", DEADLINE, || async { status(&agent)["drills"]["proven"].is_object() }).await;
    assert_eq!(status(&agent)["alarms"]["drill"], Value::Null);
}
