//! Proofs that a restore works: what a restore says of itself, and drills on good and on damaged repositories, by hand and by
//! the agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use walguard::detect::{Incident, RuleName};
use walguard::pg::Lsn;
use walguard::repo::RepoError;

use crate::archived_wal::{repository, write};
use crate::harness::webhook::Webhook;
use crate::harness::{
    Agent, Cluster, Finished, Restored, Scratch, give_away, restore, wait_for, walguard, walguard_command,
};
use crate::kept_repository::{flip_a_bit, flip_an_early_bit};
use crate::replays::{wait_scanned, wait_watching};

const DEADLINE: Duration = Duration::from_secs(60);

fn run(verb: &[&str], flags: &[String]) -> Finished {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    walguard(&[verb, flags.as_slice()].concat())
}

/// Runs a drill in `place`, and makes sure that nothing is left of it there.
fn drill(place: &Path, flags: &[String], args: &[&str]) -> Finished {
    let place = place.to_str().unwrap();
    let finished = run(&[&["drill", "--json", "--scratch-dir", place], args].concat(), flags);
    assert_nothing_left(Path::new(place), &finished);
    finished
}

/// No directory, and no process that works in one.
fn assert_nothing_left(place: &Path, finished: &Finished) {
    assert!(!place.exists(), "{} is left behind: {finished}", place.display());
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let working = fs::read_link(process.path().join("cwd")).unwrap_or_default();
        assert!(!working.starts_with(place), "{} still works in {}", process.path().display(), working.display());
    }
}

/// The verdict of the point of that name.
fn verdict<'a>(points: &'a Value, name: &str) -> &'a str {
    let point = points.as_array().unwrap().iter().find(|point| point["name"] == name);
    point.unwrap_or_else(|| panic!("no point {name} in {points:#}"))["verdict"].as_str().unwrap()
}

async fn wait_archived(cluster: &Cluster, agent: &mut Agent) {
    agent.wait_archived(cluster, cluster.lsn().await, DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_proves_a_good_repository_on_every_major_and_leaves_nothing_behind() {
    for major in [15, 18] {
        let cluster = Cluster::builder().major(major).wal_segsize_mib(1).start().await;
        let scratch = Scratch::new();
        let space = scratch.dir("space");
        let client = cluster.client().await;
        client.batch_execute(&format!("CREATE TABLESPACE side LOCATION '{}'", space.display())).await.unwrap();
        client.batch_execute("CREATE DATABASE other").await.unwrap();
        cluster
            .sql(
                "CREATE EXTENSION amcheck; CREATE TABLE orders (id int PRIMARY KEY, note text);
                 CREATE TABLE beside (i int) TABLESPACE side; INSERT INTO beside SELECT generate_series(1, 500);
                 INSERT INTO orders SELECT i, repeat('x', 100) FROM generate_series(1, 1000) i",
            )
            .await;
        let checks = "[[drill.checks]]\nname = 'orders'\ndatabase = 'postgres'\nsql = 'SELECT count(*) FROM orders'\n\
                      expect = '1500'\n[[drill.checks]]\ndatabase = 'postgres'\n\
                      sql = 'SELECT pg_is_in_recovery() AND count(*) = 500 FROM beside'\n";
        let bin = cluster.bin_dir().display();
        let settings = format!("[drill]\namcheck = true\npg_bin_dir = '{bin}'\n{checks}");
        let mut agent = Agent::builder(&cluster, &scratch.repo_url()).settings(&settings).arg("--no-backups").spawn();
        agent.wait_streaming(&cluster).await;
        let flags = agent.flags();
        run(&["backup"], &flags).expect(0);
        cluster.sql("INSERT INTO orders SELECT i, 'late' FROM generate_series(1001, 1500) i").await;
        wait_archived(&cluster, &mut agent).await;

        let place = scratch.join("drill");
        let told = drill(&place, &flags, &[]).expect(0).json();
        assert_eq!(told["outcome"], "proven", "{told:#}");
        for name in ["target", "content", "page checksums", "check orders", "amcheck of postgres", "primary", "pages"] {
            assert_eq!(verdict(&told["points"], name), "passed", "{name}: {told:#}");
        }
        // Whoever has no extension is not told that all is well there.
        assert_eq!(verdict(&told["points"], "amcheck of other"), "unproved");
        let pages = told["points"].as_array().unwrap().iter().find(|point| point["name"] == "pages").unwrap();
        assert!(pages["told"].as_str().unwrap().starts_with("all "), "{pages}");
        assert!(
            told["scratch_bytes_max"].as_u64() > Some(0) && told["seconds"]["replay"].as_f64() > Some(0.0),
            "{told:#}"
        );
        let record = scratch.join("repo").join(told["record"].as_str().unwrap());
        let kept: Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
        assert_eq!(kept["points"], told["points"]);

        if major != 15 {
            continue;
        }
        // What is asked and not so is told, after everything else was looked at.
        cluster.sql("DELETE FROM orders WHERE id > 1200").await;
        wait_archived(&cluster, &mut agent).await;
        let told = drill(&place, &flags, &[]).expect(3).json();
        let wrong = told["points"].as_array().unwrap().iter().find(|point| point["verdict"] == "failed").unwrap();
        assert_eq!((&wrong["expected"], &wrong["found"]), (&json!("1500"), &json!("1200")), "{told:#}");
        assert_eq!(verdict(&told["points"], "pages"), "passed");

        let listed = run(&["drill", "list", "--json"], &flags).expect(0).json();
        let outcomes: Vec<_> = listed.as_array().unwrap().iter().map(|drill| drill["outcome"].clone()).collect();
        assert_eq!(outcomes, ["proven", "wrong"]);
        let status = run(&["status", "--json", "--http", &agent.http()], &flags).json();
        assert_eq!(status["status"]["drills"]["scheduled"], false, "{status:#}");
        let check = run(&["check"], &flags).expect(3).stdout();
        assert!(check.contains("check orders: gave 1200 instead of 1500"), "{check}");
        limits(&place, &flags).await;
    }
}

/// Limits and a stop in the middle leave nothing behind either, and what one that was killed left goes with the next, which
/// restores a random moment; what is to be kept is kept.
async fn limits(place: &Path, flags: &[String]) {
    let told = drill(place, flags, &["--max-bytes", "1 MiB"]).expect(1).json();
    assert!(told["error"].as_str().unwrap().contains("may take 1.0 MiB"), "{told:#}");

    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let args = [&["drill", "--scratch-dir", place.to_str().unwrap()], flags.as_slice()].concat();
    let mut stopped = walguard_command(&args).spawn().unwrap();
    wait_for("the server of a drill", DEADLINE, || async { !data_dirs(place, "PG_VERSION").is_empty() }).await;
    let pid = rustix::process::Pid::from_child(&stopped);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(stopped.wait().unwrap().code(), Some(1));
    assert!(!place.exists());

    // One that was killed leaves its directory and its server; the next removes both.
    let mut killed = walguard_command(&args).spawn().unwrap();
    wait_for("the server of a drill", DEADLINE, || async { !data_dirs(place, "postmaster.pid").is_empty() }).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(place.exists());
    let again = walguard(&[args.as_slice(), &["--random", "--json"]].concat());
    assert!(again.stderr().contains("an earlier drill left behind"), "{again}");
    let told = again.json();
    assert!(told["target"].as_str().unwrap().contains("a random moment"), "{told:#}");
    assert_eq!((verdict(&told["points"], "target"), &told["error"]), ("passed", &Value::Null), "{told:#}");
    assert!(fs::read_dir(place).unwrap().next().is_none(), "it was there before, so it stays, empty");
    fs::remove_dir(place).unwrap();

    let kept = walguard(&[args.as_slice(), &["--keep", "--json"]].concat()).json();
    let kept = PathBuf::from(kept["kept"].as_str().unwrap()).join("data");
    assert!(kept.join("global/pg_control").exists() && !kept.join("postmaster.pid").exists());
    fs::remove_dir_all(place).unwrap();
}

/// Directories of drills in `place` that have this file in their data directory.
fn data_dirs(place: &Path, file: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(place) else { return Vec::new() };
    let dirs = entries.flatten().map(|entry| entry.path().join("data"));
    dirs.filter(|dir| dir.join(file).exists()).collect()
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let (path, into) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() { copy_tree(&path, &into) } else { _ = fs::copy(&path, &into).unwrap() }
    }
}

fn files(folder: &Path, has: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(fs::read_dir(&path).unwrap().flatten().map(|inner| inner.path()));
        } else {
            found.push(path);
        }
    }
    found.retain(|path| has(path.to_str().unwrap()));
    found.sort();
    found
}

/// A repository with two backups and WAL behind both, which is proved to be complete; and copies of it to damage.
struct Damaged {
    scratch: Scratch,
    stops: [Lsn; 2],
    copies: u32,
}

impl Damaged {
    async fn new() -> Self {
        let cluster = Cluster::builder().wal_segsize_mib(1).start().await;
        cluster.sql("CREATE TABLE busy (id bigserial PRIMARY KEY, word text)").await;
        let scratch = Scratch::new();
        let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
        agent.wait_streaming(&cluster).await;
        for label in ["first", "second"] {
            run(&["backup", "--label", label], &agent.flags()).expect(0);
            write(&cluster, 3 << 10).await;
        }
        // Not at the beginning of a segment: its last one is in tails.
        let lsn = cluster.lsn().await;
        wait_for("the proof that all is archived", DEADLINE, || async {
            let Ok(answer) = reqwest::get(agent.url("/status")).await else { return false };
            let status: Value = answer.json().await.unwrap_or_default();
            status["caught_up_position"]["lsn"].as_str().and_then(|lsn| lsn.parse().ok()) >= Some(lsn)
        })
        .await;
        assert!(agent.stop().await.success());
        let list = run(&["list", "--json"], &agent.flags()).json();
        let stop = |n: usize| list["backups"][n]["stop"].as_str().unwrap().parse().unwrap();
        Self { stops: [stop(0), stop(1)], scratch, copies: 0 }
    }

    /// A copy, and the flags that name it.
    fn copy(&mut self) -> (PathBuf, Vec<String>) {
        self.copies += 1;
        let copy = self.scratch.join(format!("copy-{}", self.copies));
        copy_tree(&self.scratch.join("repo"), &copy);
        give_away(&copy);
        let flags = ["--repo", copy.to_str().unwrap(), "--cluster", "main"].map(str::to_owned).to_vec();
        (copy.join("main"), flags)
    }

    /// Runs a drill that must fail, and gives the damage that it names, and its text for people.
    fn drill(&self, flags: &[String], args: &[&str]) -> (Value, Value) {
        let told = drill(&self.scratch.join("drill"), flags, args).expect(1).json();
        assert_eq!(told["outcome"], "failed", "{told:#}");
        assert_eq!(told["damage"].as_array().unwrap().len(), 1, "{told:#}");
        (told["damage"][0].clone(), told)
    }
}

fn lsn(value: &Value) -> Lsn {
    value.as_str().unwrap_or_else(|| panic!("{value} is no LSN")).parse().unwrap()
}

/// The beginning of a segment of 1 MiB by the name of its object.
fn begin_of(segment: &Path) -> Lsn {
    let name = segment.file_stem().unwrap().to_str().unwrap();
    let half = |from: usize| u64::from_str_radix(&name[from..from + 8], 16).unwrap();
    Lsn::new(half(8) << 32 | half(16) << 20)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_on_a_damaged_repository_names_the_damage_and_what_it_makes_unreachable() {
    let mut world = Damaged::new().await;
    let [first, second] = world.stops;
    let segment_between = |folder: &Path, from: Lsn, to: Lsn| {
        let whole = files(&folder.join("wal/00000001"), |path| path.ends_with(".zst") && !path.contains(".tail/"));
        whole.into_iter().find(|path| begin_of(path) > from && begin_of(path) + (1 << 20) < to).unwrap()
    };

    // A WAL object is lost between the backups: the newest state can be restored, others cannot, and that is told.
    let (folder, flags) = world.copy();
    let lost = segment_between(&folder, first, second);
    fs::remove_file(&lost).unwrap();
    let (damage, told) = world.drill(&flags, &[]);
    assert_eq!((&damage["kind"], verdict(&told["points"], "target")), (&json!("missing-wal"), "passed"), "{told:#}");
    let gone = &damage["unreachable"][0];
    assert_eq!((lsn(&gone["from"]), lsn(&gone["to"])), (begin_of(&lost), second));
    assert!(gone["from_time"].is_string() && gone["to_time"].is_string(), "its index tells when that was: {gone}");
    let place = world.scratch.join("drill");
    let text = run(&["drill", "--scratch-dir", place.to_str().unwrap()], &flags).expect(1).stdout();
    let part = format!("unreachable: LSN {} to {second}", begin_of(&lost));
    assert!(text.contains("The drill FAILED") && text.contains(&part), "{text}");

    // One is lost behind both: the plan is refused.
    let (folder, flags) = world.copy();
    let lost = segment_between(&folder, second, Lsn::MAX);
    fs::remove_file(&lost).unwrap();
    let (damage, told) = world.drill(&flags, &[]);
    assert_eq!(lsn(&damage["unreachable"][0]["from"]), begin_of(&lost), "{told:#}");
    assert!(told["error"].as_str().unwrap().contains("is missing from"), "{told:#}");

    // A bit is flipped in a segment that the indexes spare the plan to read: the server comes upon it.
    let (folder, flags) = world.copy();
    let flipped = segment_between(&folder, second, Lsn::MAX);
    flip_a_bit(&flipped);
    let (damage, told) = world.drill(&flags, &["--to", "latest"]);
    let key = |path: &Path| format!("main/{}", path.strip_prefix(&folder).unwrap().display());
    assert_eq!((&damage["key"], &damage["kind"]), (&json!(key(&flipped)), &json!("damaged")), "{told:#}");
    assert_eq!(lsn(&damage["unreachable"][0]["from"]), begin_of(&flipped), "{told:#}");

    // A bit is flipped in a part of the only backup that reaches a moment.
    let (folder, flags) = world.copy();
    let part = files(&folder.join("base"), |path| path.contains("/first/base.tar.zst.")).remove(0);
    flip_a_bit(&part);
    let moment = Lsn::new(second.bytes() - (1 << 20)).to_string();
    let (damage, told) = world.drill(&flags, &["--to", &moment]);
    let key = format!("main/{}", part.strip_prefix(&folder).unwrap().display());
    assert_eq!((&damage["key"], &damage["backups"]), (&json!(key), &json!(["first"])), "{told:#}");
    assert_eq!(lsn(&damage["unreachable"][0]["to"]), second, "from there on the other one serves");
    // And gone altogether.
    fs::remove_file(&part).unwrap();
    let (damage, told) = world.drill(&flags, &["--to", &moment]);
    assert_eq!((&damage["key"], &damage["kind"]), (&json!(key), &json!("missing-object")), "{told:#}");

    // The tails are gone. Nothing is behind them that would show the hole: the agent's own proof does.
    let (folder, flags) = world.copy();
    let tails = files(&folder.join("wal/00000001"), |path| path.contains(".tail/"));
    assert!(!tails.is_empty());
    tails.iter().for_each(|tail| fs::remove_file(tail).unwrap());
    let (damage, told) = world.drill(&flags, &[]);
    let text = damage["problem"].as_str().unwrap();
    assert!(text.starts_with("the end of the WAL is gone") && !damage["unreachable"][0].is_null(), "{told:#}");

    // The newest backup's manifest cannot be read: an older one serves, and people hear of it.
    let (folder, flags) = world.copy();
    flip_an_early_bit(&folder.join("base/second/manifest"));
    let (damage, told) = world.drill(&flags, &[]);
    assert_eq!((&damage["key"], &told["backup"]), (&json!("main/base/second/manifest"), &json!("first")), "{told:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_makes_drills_and_raises_an_alarm_that_ends_with_the_next_proof() {
    let cluster = Cluster::builder().start().await;
    cluster.sql("CREATE TABLE orders (id int)").await;
    let (scratch, receiver) = (Scratch::new(), Webhook::start().await);
    let place = scratch.join("drill");
    let settings = format!(
        "{}\n[drill]\nevery = \"1h\"\nscratch_dir = \"{}\"\n\
         [[drill.checks]]\nname = \"orders\"\ndatabase = \"postgres\"\nsql = \"SELECT count(*) > 0 FROM orders\"\n",
        receiver.settings(),
        place.display()
    );
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).settings(&settings).spawn();
    agent.wait_streaming(&cluster).await;
    let told = receiver.wait("the alarm about the drill", |told| told.text("title").contains("drill")).await;
    assert!(told.text("title").contains("check orders: gave f instead of t"), "{}", told.body);
    assert!(!place.exists());
    let metrics = reqwest::get(agent.url("/metrics")).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("walguard_drill_failures_total{cluster=\"main\"} 1"), "{metrics}");
    assert!(!metrics.contains("walguard_drill_last_success"), "{metrics}");
    let text = run(&["status", "--http", &agent.http()], &agent.flags()).expect(3).stdout();
    assert!(text.contains("never proved to work") && text.contains("next drill"), "{text}");

    // Mended, and proved by somebody's hand. The next agent knows, and says that it is over.
    cluster.sql("INSERT INTO orders VALUES (1)").await;
    wait_archived(&cluster, &mut agent).await;
    assert!(agent.stop().await.success());
    drill(&place, &agent.flags(), &[]).expect(0);
    agent.spawn_again();
    receiver.wait("the end of the alarm", |told| told.text("event") == "resolved").await;
    let status: Value = reqwest::get(agent.url("/status")).await.unwrap().json().await.unwrap();
    let drills = &status["drills"];
    assert!(drills["proven"]["took_seconds"].as_f64() > Some(0.0) && !drills["next_at"].is_null(), "{drills:#}");
    assert_eq!((&drills["last"]["outcome"], &status["alarms"]["drill"]), (&json!("proven"), &Value::Null));
    let metrics = reqwest::get(agent.url("/metrics")).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("walguard_drill_last_success_timestamp_seconds{cluster=\"main\"} 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_before_an_incident_proves_its_rows_and_triggers_and_says_what_differs() {
    let cluster = Cluster::builder().start().await;
    cluster
        .sql(
            "CREATE EXTENSION amcheck; GRANT pg_read_all_data TO walguard;
             CREATE TABLE users (id int PRIMARY KEY); INSERT INTO users SELECT generate_series(1, 40);
             CREATE TABLE \"Odd Name\" (id int); INSERT INTO \"Odd Name\" SELECT generate_series(1, 7);
             CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''kept''; END';
             CREATE TRIGGER keep BEFORE TRUNCATE ON \"Odd Name\" EXECUTE FUNCTION keep()",
        )
        .await;
    let scratch = Scratch::new();
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    wait_watching(&agent, &cluster).await;
    let flags = agent.flags();
    run(&["backup"], &flags).expect(0);
    cluster.sql("DROP TRIGGER keep ON \"Odd Name\"; DELETE FROM users; DELETE FROM \"Odd Name\"").await;
    wait_scanned(&agent, &cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    wait_for("the incident", DEADLINE, || async {
        repo.incidents(None).await.unwrap().incidents.iter().any(|incident| incident.first_harm.is_some())
    })
    .await;
    wait_archived(&cluster, &mut agent).await;
    assert!(agent.stop().await.success());
    let incident = repo.incidents(None).await.unwrap().incidents.remove(0);
    let to = format!("before:{}", incident.id);
    // Paused, and readable: nothing is replayed of the transaction, which took a lock to drop the trigger.
    let mut restored = Restored::run(&flags, &["--to", &to, "--amcheck"]);
    let proof = restored.told["proof"].take();
    let rows = ["rows of postgres.public.users", "rows of postgres.public.\"Odd Name\""];
    let names = ["target", "content", "page checksums", "amcheck of postgres"];
    for name in names.iter().chain(&rows).chain(&["trigger keep on postgres.public.\"Odd Name\""]) {
        assert_eq!(verdict(&proof, name), "passed", "{name}: {proof:#}");
    }
    restored.stop().await;

    // Had the incident counted otherwise, or removed what is not there, somebody must look.
    let doctored = |incident: Option<Incident>| {
        let mut incident = incident.unwrap();
        incident.tables.iter_mut().filter_map(|table| table.before.as_mut()).for_each(|rows| rows.count += 1);
        incident.ddl.iter_mut().for_each(|ddl| ddl.object = Some("other".to_owned()));
        Ok::<_, RepoError>(Some(incident))
    };
    repo.revise_incident(&incident.id, doctored).await.unwrap();
    give_away(&scratch.join("repo"));
    let told = restore(&scratch.join("restored"), &flags, &["--to", &to, "--action", "promote"]).expect(3).json();
    let pid = told["restore"]["running"]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::QUIT).unwrap();
    let users = told["proof"].as_array().unwrap().iter().find(|point| point["name"] == rows[0]).unwrap();
    assert_eq!(
        (&users["verdict"], &users["expected"], &users["found"]),
        (&json!("failed"), &json!("41"), &json!("40"))
    );
    assert_eq!(verdict(&told["proof"], "trigger other on postgres.public.\"Odd Name\""), "failed");
    // Nobody asks a server that does not run.
    let refused = restore(&scratch.join("none"), &flags, &["--to", &to, "--amcheck", "--no-start"]);
    assert_eq!(refused.code(), 2, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_table_and_a_dropped_database_can_be_read_before_their_incidents() {
    let cluster = Cluster::builder().start().await;
    cluster.sql("GRANT pg_read_all_data TO walguard; CREATE TABLE tracks AS SELECT generate_series(1, 30) AS id").await;
    cluster.sql("CREATE TABLE notes (id int)").await;
    let client = cluster.client().await;
    client.batch_execute("CREATE DATABASE shop").await.unwrap();
    let scratch = Scratch::new();
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    wait_watching(&agent, &cluster).await;
    let flags = agent.flags();
    run(&["backup"], &flags).expect(0);
    // Somebody else commits while the first is open: that is kept, and with it the lock, until the server is promoted.
    client.batch_execute("BEGIN; TRUNCATE tracks").await.unwrap();
    cluster.sql("INSERT INTO notes VALUES (1)").await;
    client.batch_execute("COMMIT").await.unwrap();
    cluster.sql("DROP DATABASE shop").await; // in a session of its own
    wait_scanned(&agent, &cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    let find = async |rule: RuleName| {
        let found = repo.incidents(None).await.unwrap().incidents.into_iter();
        let mut found = found.filter(|incident| incident.first_harm.is_some());
        found.find(|incident| incident.findings.iter().any(|finding| finding.rule == rule))
    };
    wait_for("the incidents", DEADLINE, || async {
        find(RuleName::Truncate).await.is_some() && find(RuleName::DropDatabase).await.is_some()
    })
    .await;
    wait_archived(&cluster, &mut agent).await;
    assert!(agent.stop().await.success());
    let (truncate, dropped) = (find(RuleName::Truncate).await.unwrap(), find(RuleName::DropDatabase).await.unwrap());

    let to = format!("before:{}", truncate.id);
    let mut restored = Restored::run(&flags, &["--to", &to]);
    let proof = restored.told["proof"].take();
    let locked = proof.as_array().unwrap().iter().find(|point| point["verdict"] == "unproved").unwrap();
    assert!(locked["name"].as_str().unwrap().contains("tracks") && locked["hint"].is_string(), "{proof:#}");
    restored.stop().await;
    let mut restored = Restored::run(&flags, &["--to", &to, "--action", "promote"]);
    assert_eq!(
        verdict(&restored.told["proof"], "rows of postgres.public.tracks"),
        "passed",
        "{:#}",
        restored.told["proof"]
    );
    restored.stop().await;

    // Its files go before the transaction commits.
    assert_ne!(dropped.id, truncate.id);
    let mut restored = Restored::run(&flags, &["--to", &format!("before:{}", dropped.id)]);
    let running = &restored.told["restore"]["running"];
    let mut config = tokio_postgres::Config::new();
    config.host_path(running["socket_dir"].as_str().unwrap()).port(running["port"].as_u64().unwrap() as u16);
    let shop = config.user("postgres").dbname("shop").connect(tokio_postgres::NoTls).await;
    let (shop, connection) = shop.expect("its files are there");
    tokio::spawn(connection);
    let relations: i64 = shop.query_one("SELECT count(*) FROM pg_class", &[]).await.unwrap().get(0);
    assert!(relations > 300, "{relations}");
    restored.stop().await;
}
