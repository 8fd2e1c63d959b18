//! A managed server, seen by a role that owns tables and may replicate, and nothing else: what is wiped is told, and every
//! change is kept once, whatever happens to the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use tokio_postgres::Client;
use walguard::decode::pgoutput::{Message, Value};
use walguard::detect::incident::{Incident, Rows, State};
use walguard::detect::{DdlKind, RuleName, Severity, WhoSource};
use walguard::pg::{Lsn, Oid, Xid};
use walguard::repo::Repository;
use walguard::repo::changes::walk::{Order, follows};
use walguard::repo::changes::{Header, Messages};

use crate::archived_wal::repository;
use crate::harness::{
    Agent, Cluster, Proxy, Scratch, StopMode, client_dir, finish, wait_for, walguard, walguard_command,
};
use crate::managed::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_managed_database_is_told_with_its_tables_rows_and_author() {
    for major in [15, 17] {
        let cluster = managed(major).await;
        let scratch = Scratch::new();
        let client = app(&cluster).await;
        run(
            &client,
            "CREATE TABLE profiles (id int PRIMARY KEY, name text); INSERT INTO profiles VALUES (1, 'a'), (2, 'b');
             CREATE TABLE audio_tracks (id int PRIMARY KEY); INSERT INTO audio_tracks SELECT generate_series(1, 56);
             CREATE TABLE vision_versions (id int PRIMARY KEY); INSERT INTO vision_versions VALUES (1), (2);
             CREATE TABLE parted (id int, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
             CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
             CREATE TABLE log (line text);
             CREATE SCHEMA supabase_migrations;
             CREATE TABLE supabase_migrations.schema_migrations (version text PRIMARY KEY);
             INSERT INTO supabase_migrations.schema_migrations SELECT 20250100 + i FROM generate_series(1, 40) i;",
        )
        .await;
        let mut agent = agent(&cluster, &scratch).spawn();
        agent.wait_streaming(&cluster).await;
        let repo = repository(&scratch.repo_url()).await;
        wait_known(&agent).await;
        wait_for("sessions to be watched", DEADLINE, || async { status(&agent)["who"]["watching"] == true }).await;
        // The application goes on as before, also where nothing tells which row it is.
        run(&client, "INSERT INTO log VALUES ('a'), ('b'); UPDATE log SET line = 'c'; DELETE FROM log").await;

        let wiped_at = Instant::now();
        run(
            &client,
            "BEGIN; DELETE FROM profiles; DELETE FROM audio_tracks; TRUNCATE vision_versions;
             DELETE FROM supabase_migrations.schema_migrations;
             INSERT INTO supabase_migrations.schema_migrations VALUES ('20251119'); SELECT pg_sleep(1.5); COMMIT",
        )
        .await;
        // Who it was may be known a moment later than what.
        let is_known = |incident: &Incident| {
            incident.tables.len() == 4 && incident.transactions[0].who.source == WhoSource::Activity
        };
        let found = wait_incident(&repo, "the wipe, and whose it is", is_known).await;
        eprintln!("PostgreSQL {major}: written down {:?} after the statement began", wiped_at.elapsed());
        assert_eq!((found.state, found.severity), (State::Committed, Severity::Critical));
        let rules: BTreeSet<RuleName> = found.findings.iter().map(|finding| finding.rule).collect();
        assert!(rules.contains(&RuleName::MigrationHistory), "{found:#?}");
        let rows: BTreeMap<&str, (Option<Rows>, Option<Rows>)> =
            found.tables.iter().map(|table| (table.name.as_str(), (table.before, table.after))).collect();
        let exact = |count| Some(Rows { count, exact: true });
        assert_eq!(rows["app.public.profiles"], (exact(2), exact(0)));
        assert_eq!(rows["app.public.audio_tracks"], (exact(56), exact(0)));
        assert_eq!(rows["app.public.vision_versions"], (exact(2), exact(0)));
        assert_eq!(rows["app.supabase_migrations.schema_migrations"], (exact(40), exact(1)));
        let who = &found.transactions[0].who;
        assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Activity, Some("supa")), "{who:?}");
        assert_eq!(who.actor.application.as_deref(), Some("app"));

        // A table that goes is found in the catalogs, and one that comes is published and watched.
        run(&client, "DROP TABLE audio_tracks; CREATE TABLE orders (id int PRIMARY KEY)").await;
        let is_drop = |incident: &Incident| incident.ddl.iter().any(|event| event.kind == DdlKind::DropTable);
        let dropped = wait_incident(&repo, "the dropped table", is_drop).await;
        let name = dropped.ddl.iter().find(|event| event.kind == DdlKind::DropTable).unwrap();
        assert!(format!("{name:?}").contains("audio_tracks"), "{name:?}");
        let published =
            "SELECT count(*) FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid WHERE relname = 'orders'";
        let config = conninfo(&cluster).replace("user=supa", "user=postgres");
        let (super_client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        wait_for("the new table to be published", DEADLINE, || async {
            super_client.query_one(published, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        wait_kept(&cluster).await;

        let shown = verb(&agent, &["timeline", "--from", "10 minutes ago"]).expect(0).stdout();
        for text in
            ["TRUNCATE public.vision_versions", "deleted public.audio_tracks 56", "DROP TABLE public.audio_tracks"]
        {
            assert!(shown.contains(text), "{text} is not in\n{shown}");
        }
        let checked = verb(&agent, &["check", "--json"]).json();
        let findings = checked["findings"].as_array().unwrap();
        let of = |topic: &str| findings.iter().find(|finding| finding["topic"] == topic).cloned().unwrap_or_default();
        assert_eq!((&of("wal_level")["level"], &of("slot")["level"]), (&"ok".into(), &"ok".into()), "{checked:#}");
        assert!(of("replica identity")["text"].as_str().unwrap().contains("public.log"), "{checked:#}");
        assert_eq!(of("changes")["level"], "ok", "{checked:#}");
        assert!(verb(&agent, &["list"]).expect(0).stdout().contains("app"));
        let refused = verb(&agent, &["wal", "explain", "0/0..1/0"]);
        assert!(refused.stderr().contains("this source is logical"), "{refused}");
        assert!(agent.stop().await.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_delete_is_announced_while_its_transaction_is_open() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 20000)").await;
    let (pg, repo, config) = (conninfo(&cluster), scratch.repo_url(), scratch.join("walguard.toml"));
    let mut args = vec!["init", "--source", "logical", "--pg", &pg, "--repo", &repo, "--cluster", "main", "--config"];
    args.push(config.to_str().unwrap());
    let made = walguard(&args).expect(0).stdout();
    assert!(made.contains("logical, database app: 1 tables published"), "{made}");
    let slot = "SELECT plugin || ' ' || database FROM pg_replication_slots WHERE slot_name = 'walguard'";
    assert_eq!(cluster.text(slot).await, "pgoutput app");
    let again = walguard(&args).expect(0).stdout();
    assert_eq!(again.matches("left as it is").count(), 3, "{again}");
    assert!(std::fs::read_to_string(&config).unwrap().contains("\nsource = \"logical\"\n"));
    // The file is all that the next command needs, and the agent goes on with the slot.
    run(&client, "INSERT INTO orders VALUES (20001)").await;
    let checked = walguard(&["check", "--config", config.to_str().unwrap()]);
    assert!(checked.stdout().contains("no changes are kept yet"), "{checked}");
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    wait_known(&agent).await;
    wait_kept(&cluster).await;
    assert_eq!(read(&repo).await.ids().collect::<Vec<_>>(), [20_001], "what came behind `init` is there");
    run(&client, "BEGIN; SAVEPOINT a; DELETE FROM orders").await;
    let is_known = |incident: &Incident| {
        incident.state == State::Open && incident.transactions[0].who.actor.role.as_deref() == Some("supa")
    };
    let open = wait_incident(&repo, "the open delete, and whose it is", is_known).await;
    assert_eq!(open.tables[0].name, "app.public.orders");
    run(&client, "ROLLBACK").await;
    wait_incident(&repo, "the rollback", |incident| incident.id == open.id && incident.state == State::Aborted).await;
    assert_eq!(client.query_one("SELECT count(*) FROM orders", &[]).await.unwrap().get::<_, i64>(0), 20_001);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_gone_is_a_gap_that_is_recorded_and_told() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE orders (id int PRIMARY KEY)").await;
    let builder = Agent::builder(&cluster, &scratch.repo_url()).conninfo(&conninfo(&cluster));
    let mut agent = builder.settings("source = \"logical\"").spawn();
    agent.wait_streaming(&cluster).await;
    run(&client, "INSERT INTO orders VALUES (1)").await;
    wait_kept(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    let [database] = repo.changed_databases().await.unwrap().try_into().unwrap();
    wait_for("the first base", DEADLINE, || async { !repo.bases(database).await.unwrap().is_empty() }).await;
    assert!(agent.stop().await.success());
    cluster.sql("SELECT pg_drop_replication_slot('walguard')").await;
    run(&client, "INSERT INTO orders VALUES (2)").await;
    agent.spawn_again();
    agent.wait_streaming(&cluster).await;
    run(&client, "INSERT INTO orders VALUES (3)").await;
    wait_kept(&cluster).await;
    let told = read(&repo).await;
    assert_eq!(told.ids().collect::<Vec<_>>(), [1, 3]);
    let [(from, to)] = told.holes.as_slice() else { panic!("{:?}", told.holes) };
    let gaps = crate::archived_wal::catalog(&repo).await.gaps;
    assert_eq!(gaps.iter().map(|gap| (gap.from, gap.to)).collect::<Vec<_>>(), [(*from, *to)]);
    // What follows can be rebuilt: the agent has taken a base behind it.
    wait_for("a base behind the gap", DEADLINE, || async {
        repo.bases(database).await.unwrap().last().is_some_and(|base| base.consistent > *to)
    })
    .await;
    let bases = repo.bases(database).await.unwrap();
    assert_eq!((bases.len(), bases[0].tables.len()), (2, 1), "the first was taken at the start: {bases:#?}");
    assert!(verb(&agent, &["list"]).expect(0).stdout().contains(&bases[0].label));
    wait_incident(&repo, "the gap", |incident| incident.findings.iter().any(|f| f.rule == RuleName::Gap)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_somebody_has_locked_keeps_no_agent_from_reading_changes() {
    let cluster = managed(16).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id)").await;
    run(&client, "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (1000)").await;
    run(&client, "CREATE TABLE free (id int PRIMARY KEY)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    agent.sigkill();
    let locking = app(&cluster).await;
    run(&locking, "BEGIN; LOCK TABLE parts IN ACCESS EXCLUSIVE MODE").await;
    agent.spawn_again();
    agent.wait_streaming(&cluster).await;
    run(&client, "INSERT INTO free VALUES (7)").await;
    wait_kept(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    assert_eq!(read(&repo).await.ids().collect::<Vec<_>>(), [7]);
    assert_eq!(verb(&agent, &["check", "--json"]).json()["findings"][1]["level"], "ok");
    run(&locking, "ROLLBACK").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_changes_go_on_where_they_were() {
    let mut primary = managed(17).await;
    primary.sql("SELECT pg_create_physical_replication_slot('standby', true)").await;
    let mut standby = primary.standby().await;
    for (name, value) in
        [("hot_standby_feedback", "on"), ("primary_slot_name", "standby"), ("sync_replication_slots", "on")]
    {
        standby.set_conf(name, value);
    }
    standby.restart().await;
    // The agent never has what the standby has not.
    primary.sql("ALTER SYSTEM SET synchronized_standby_slots = 'standby'").await;
    primary.sql("SELECT pg_reload_conf()").await;
    let scratch = Scratch::new();
    let client = app(&primary).await;
    run(&client, "CREATE TABLE orders (id bigint PRIMARY KEY)").await;
    let both = format!("127.0.0.1,127.0.0.1 port={},{}", primary.port(), standby.port());
    let both = conninfo(&primary).replace(&format!("127.0.0.1 port={}", primary.port()), &both);
    let mut agent = agent(&primary, &scratch).conninfo(&(both + " target_session_attrs=read-write")).spawn();
    agent.wait_streaming(&primary).await;
    run(&client, "INSERT INTO orders SELECT generate_series(1, 500)").await;
    wait_kept(&primary).await;
    let synced = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'walguard' AND synced AND NOT temporary";
    wait_for("the slot to be on the standby", DEADLINE, || async {
        primary.sql("SELECT pg_logical_emit_message(true, '', '')").await; // a slot follows when there is something to follow
        standby.number(synced).await == 1
    })
    .await;
    run(&client, "INSERT INTO orders SELECT generate_series(501, 900)").await;
    wait_kept(&primary).await;
    primary.stop(StopMode::Immediate).await;
    standby.promote().await;
    agent.wait_streaming(&standby).await;
    run(&app(&standby).await, "INSERT INTO orders SELECT generate_series(901, 1000)").await;
    wait_kept(&standby).await;
    let told = read(&repository(&scratch.repo_url()).await).await;
    assert_eq!(told.holes, [], "nothing is missing");
    let mut ids: Vec<i64> = told.ids().collect();
    ids.sort_unstable();
    assert!(ids == (1..=1000).collect::<Vec<_>>(), "{} rows are told", ids.len());
}

/// What a change log tells, transaction by transaction, as somebody would who rebuilds the table.
#[derive(Debug, Default)]
struct Told {
    /// First columns of inserted rows, by transaction, in the order of the commits.
    committed: Vec<(Lsn, Xid, Vec<i64>)>,
    /// Where the chain is broken.
    holes: Vec<(Lsn, Lsn)>,
    sessions: BTreeSet<String>,
    streamed: u64,
}

impl Told {
    fn ids(&self) -> impl Iterator<Item = i64> {
        self.committed.iter().flat_map(|(_, _, ids)| ids.iter().copied())
    }
}

/// How many objects the change log of the only database has.
async fn objects(repo: &Repository) -> usize {
    match repo.changed_databases().await.unwrap()[..] {
        [database] => repo.changes_after(database, None).await.unwrap().len(),
        _ => 0,
    }
}

async fn read(repo: &Repository) -> Told {
    let [database] = repo.changed_databases().await.unwrap().try_into().unwrap();
    let chain = repo.changes_since(database, Lsn::ZERO).await.unwrap();
    read_from(repo, database, chain).await
}

async fn read_from(repo: &Repository, _database: Oid, chain: walguard::repo::changes::walk::Chain) -> Told {
    let mut told = Told::default();
    let mut order = Order::default();
    let mut before: Option<Header> = None;
    // Rows of open transactions and of their subtransactions.
    let mut open: BTreeMap<Xid, BTreeMap<Xid, Vec<i64>>> = BTreeMap::new();
    let (mut top, mut in_stream) = (None, false);
    let mut objects = std::pin::pin!(chain.read(repo));
    while let Some((name, changes)) = objects.try_next().await.unwrap() {
        let changes = changes.unwrap();
        if let Err(broken) = follows(before.as_ref(), name) {
            told.holes.push((broken.after, name.from));
        }
        if order.begin(&changes.header) {
            open.clear();
            (top, in_stream) = (None, false);
        }
        let mut described = BTreeSet::new();
        for sent in Messages::new(&changes.messages) {
            let sent = sent.unwrap();
            if !order.takes(sent.message) {
                described.extend(order.description(sent.message).map(|relation| relation.oid));
                continue;
            }
            match Message::read(sent.message, in_stream).unwrap() {
                Message::Begin { xid, .. } => top = Some(xid),
                Message::StreamStart { xid, .. } => {
                    (top, in_stream) = (Some(xid), true);
                    told.streamed += 1;
                }
                Message::StreamStop => in_stream = false,
                Message::Relation { relation, .. } => drop(described.insert(relation.oid)),
                Message::Insert { xid, relation, new } => {
                    assert!(described.contains(&relation), "an object describes its tables");
                    let Some(Value::Text(id)) = new.iter().next() else { panic!("{new:?}") };
                    let id = std::str::from_utf8(id).unwrap().parse().unwrap();
                    let top = top.unwrap();
                    open.entry(top).or_default().entry(xid.unwrap_or(top)).or_default().push(id);
                }
                Message::Commit { lsn, .. } => {
                    let rows = open.remove(&top.unwrap()).unwrap_or_default();
                    told.committed.push((lsn, top.unwrap(), rows.into_values().flatten().collect()));
                }
                Message::StreamCommit { xid, lsn, .. } => {
                    let rows = open.remove(&xid).unwrap_or_default();
                    told.committed.push((lsn, xid, rows.into_values().flatten().collect()));
                }
                Message::StreamAbort { xid, subxid, .. } if xid == subxid => drop(open.remove(&xid)),
                Message::StreamAbort { xid, subxid, .. } => {
                    open.entry(xid).or_default().remove(&subxid);
                }
                _ => {}
            }
        }
        told.sessions.insert(changes.header.session.clone());
        before = Some(changes.header);
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn no_change_is_lost_or_kept_twice_when_the_agent_is_killed_the_network_cut_and_the_server_restarted() {
    let mut cluster = managed(15).await;
    let scratch = Scratch::new();
    let setup = app(&cluster).await;
    run(&setup, "CREATE TABLE orders (id bigint PRIMARY KEY, note text)").await;
    let proxy = Proxy::start(cluster.port()).await;
    let through = conninfo(&cluster).replace(&format!("port={}", cluster.port()), &format!("port={}", proxy.port()));
    let mut agent = agent(&cluster, &scratch).conninfo(&through).spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    let mut next = 1_i64;
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut seed = fastrand::Rng::with_seed(seed);
    for round in 0..20 {
        let kept_before = objects(&repo).await;
        // Small and large transactions, savepoints, rollbacks, one that stays open over the kill, and a prepared one.
        let (client, other) = (app(&cluster).await, app(&cluster).await);
        let mut take = |count: i64| {
            next += count;
            format!("generate_series({}, {}) i", next - count, next - 1)
        };
        let insert = |series: String| format!("INSERT INTO orders SELECT i, repeat('x', 100) FROM {series};");
        run(&other, &format!("BEGIN; {}", insert(take(3_000)))).await;
        for _ in 0..seed.usize(1..8) {
            run(&client, &insert(take(1))).await;
        }
        let (first, undone, second) = (insert(take(10)), insert(take(2_000)), insert(take(2_000)));
        run(&client, &format!("BEGIN; {first} SAVEPOINT a; {undone} ROLLBACK TO a; {second} COMMIT")).await;
        run(&client, &format!("BEGIN; {} ROLLBACK", insert(take(2_000)))).await;
        run(&client, &format!("BEGIN; {} PREPARE TRANSACTION 'p'", insert(take(20)))).await;
        tokio::time::sleep(Duration::from_millis(seed.u64(50..700))).await;
        match round % 4 {
            1 => proxy.cut(),
            3 => {
                proxy.stall(true);
                tokio::time::sleep(Duration::from_millis(seed.u64(50..300))).await;
                proxy.cut();
                proxy.stall(false);
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(seed.u64(0..400))).await;
        if round % 2 == 0 {
            // Others may die before they kept anything: on a busy machine that is most of them.
            wait_for("something to be kept", DEADLINE, || async { objects(&repo).await > kept_before }).await;
        }
        agent.sigkill();
        run(&other, "COMMIT").await;
        run(&client, "COMMIT PREPARED 'p'").await;
        if round % 6 == 5 {
            drop((client, other));
            cluster.stop(StopMode::Fast).await;
            cluster.start().await;
        }
        agent.spawn_again();
        agent.wait_streaming(&cluster).await;
    }
    wait_kept(&cluster).await;
    let told = read(&repo).await;
    assert_eq!(told.holes, [], "the chain is whole");
    assert!(told.sessions.len() >= 10 && told.streamed > 0, "{:?} {}", told.sessions, told.streamed);
    let mut ids: Vec<i64> = told.ids().collect();
    ids.sort_unstable();
    let client = app(&cluster).await;
    let rows = client.query("SELECT id FROM orders ORDER BY id", &[]).await.unwrap();
    let expected: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert!(ids == expected, "{} rows are told and {} are there", ids.len(), expected.len());
    // From any place on, the same is told of what commits behind it.
    let [database] = repo.changed_databases().await.unwrap().try_into().unwrap();
    let names = repo.changes_after(database, None).await.unwrap();
    for name in names.iter().step_by(names.len().div_ceil(8)) {
        let chain = repo.changes_since(database, name.from).await.unwrap();
        let part = read_from(&repo, database, chain).await;
        let behind =
            |told: &Told| told.committed.iter().filter(|(lsn, ..)| *lsn >= name.from).cloned().collect::<Vec<_>>();
        assert!(behind(&part) == behind(&told), "from {} on", name.from);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_log_whose_folder_is_gone_goes_on_when_it_is_back() {
    let cluster = managed(16).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE orders (id bigint PRIMARY KEY)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    run(&client, "INSERT INTO orders SELECT generate_series(1, 500)").await;
    wait_kept(&cluster).await;
    let (url, away) = (scratch.repo_url(), scratch.join("away"));
    let place = url.strip_prefix("file://").unwrap();
    std::fs::rename(place, &away).unwrap();
    run(&client, "INSERT INTO orders SELECT generate_series(501, 900)").await;
    wait_for("the missing repository to be told", DEADLINE, || async {
        status(&agent)["store"]["trouble"]["hint"].as_str().is_some_and(|hint| hint.contains("mounted"))
    })
    .await;
    // By an agent that never saw the log, it is not taken for one that is to be begun.
    agent.sigkill();
    agent.spawn_again();
    wait_for("the alarm", DEADLINE, || async { status(&agent)["alarms"]["repository"].is_object() }).await;
    assert!(!std::path::Path::new(place).exists());
    std::fs::rename(&away, place).unwrap();
    run(&client, "INSERT INTO orders SELECT generate_series(901, 1000)").await;
    wait_kept(&cluster).await;
    let told = read(&repository(&url).await).await;
    assert_eq!(told.holes, [], "nothing is missing");
    assert_eq!(told.ids().collect::<Vec<_>>(), (1..=1000).collect::<Vec<_>>());
}

/// Everything that a change can be: of keys, of large values, moves between partitions, savepoints, truncates, much at once.
async fn work(client: &Client, round: i32) {
    let large = round % 2 == 0;
    let rows = if large { 1_000 } else { 30 };
    run(
        client,
        &format!(
            "BEGIN;
             UPDATE kinds SET mood = 'cross' WHERE id % 7 = {round} % 7;
             UPDATE kinds SET big = repeat('y{round}', 9000) WHERE id = {round} + 1;
             UPDATE keyed SET b = b + 100000 WHERE b <= {round} * 3 + 3;
             SAVEPOINT a;
             INSERT INTO keyed SELECT 'gone', i FROM generate_series(500000, 500000 + {rows}) i;
             DELETE FROM parts;
             ROLLBACK TO a;
             SAVEPOINT b;
             INSERT INTO keyed SELECT E'line\\n\\ttab', i FROM generate_series(1000000 + {round} * 10000, 1000000 + {round} * 10000 + {rows}) i;
             RELEASE b;
             UPDATE parts SET region = 2 WHERE id % 10 = {round};
             DELETE FROM whole WHERE ctid IN (SELECT ctid FROM whole WHERE a = {round} % 5 LIMIT 2);
             UPDATE whole SET b = 'b{round}', doc = NULL WHERE a = 4;
             INSERT INTO kinds (mood, big) VALUES ('it''s', repeat('z', {rows}));
             DELETE FROM \"Odd \"\"Name\" WHERE part = {round};
             INSERT INTO \"Odd \"\"Name\" (part) VALUES ({round} + 3);
             COMMIT"
        ),
    )
    .await;
    if round == 3 {
        run(
            client,
            "BEGIN; INSERT INTO parts VALUES (900, 1); TRUNCATE parts; INSERT INTO parts VALUES (901, 2); COMMIT",
        )
        .await;
        run(client, "BEGIN; DELETE FROM keyed WHERE b % 2 = 0; PREPARE TRANSACTION 'p'").await;
        run(client, "COMMIT PREPARED 'p'").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_managed_database_is_rebuilt_as_it_was_before_the_wipe_and_as_it_is_now() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    for statement in MANY_KINDS.split(";\n") {
        run(&client, statement).await;
    }
    let mut agent = agent(&cluster, &scratch).settings("[detect]\ngroup_within = \"1s\"\nwindow = \"1s\"").spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    wait_known(&agent).await;
    work(&client, 0).await;
    // A transaction that is open while the base is taken, and one that begins before and ends behind it.
    let busy = app(&cluster).await;
    run(&busy, "BEGIN; INSERT INTO keyed SELECT 'open', i FROM generate_series(2000000, 2001000) i").await;
    let release = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        run(&busy, "COMMIT").await;
    });
    let (flags, other) = (agent.flags(), agent.flags());
    let taking = tokio::task::spawn_blocking(move || {
        let mut all = vec!["backup", "--json", "--label", "first"];
        all.extend(flags.iter().map(String::as_str));
        walguard(&all)
    });
    for round in 1..5 {
        work(&client, round).await;
    }
    release.await.unwrap();
    let taken = taking.await.unwrap().expect(0).json();
    assert_eq!(taken["tables"].as_array().unwrap().len(), 6, "{taken:#}");
    let mut points = Vec::new();
    for round in 5..9 {
        work(&client, round).await;
        points.push((cluster.text("SELECT pg_current_wal_lsn()").await, contents(&client).await));
    }
    wait_kept(&cluster).await;
    let before_wipe = dump(&cluster, "app");
    // What is wiped is an incident of its own.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    run(&client, "BEGIN; DELETE FROM keyed; DELETE FROM whole").await;
    let xid: String = client.query_one("SELECT pg_current_xact_id()::text", &[]).await.unwrap().get(0);
    run(&client, "COMMIT").await;
    let is_wiped = |incident: &Incident| {
        incident
            .tables
            .iter()
            .any(|table| table.name.ends_with("keyed") && table.after.is_some_and(|rows| rows.count == 0))
    };
    let wipe = wait_incident(&repo, "the wipe", is_wiped).await;
    work(&client, 9).await;
    wait_kept(&cluster).await;

    let into =
        |database: &str| cluster.conninfo_of("postgres").replace("dbname=postgres", &format!("dbname={database}"));
    let restore = |to: &[&str], database: &str| {
        let into = into(database);
        let mut all = vec!["restore", "--yes", "--json", "--into", &into, "--to"];
        all.extend(to);
        all.extend(other.iter().map(String::as_str));
        walguard(&all)
    };
    cluster.sql("CREATE DATABASE before_wipe OWNER supa TEMPLATE template0").await;
    cluster.sql("CREATE DATABASE latest OWNER supa TEMPLATE template0").await;
    let told = restore(&[&format!("before:{}", wipe.id), "--dry-run"], "before_wipe").expect(0).json();
    assert_eq!(told["plan"]["base"]["label"], "first");
    assert_eq!(told["plan"]["first_lost"]["lsn"], wipe.first_harm.unwrap().to_string());
    let told = restore(&[&format!("xid:{xid}"), "--exclusive"], "before_wipe").expect(0).json();
    assert_eq!(told["plan"]["first_lost"]["xid"].to_string().trim_matches('"'), xid);
    let rebuilt = dump(&cluster, "before_wipe");
    let differ: Vec<_> = rebuilt.iter().filter(|line| !before_wipe.contains(line)).take(5).collect();
    assert!(rebuilt == before_wipe, "{} and {} lines; {differ:?}", rebuilt.len(), before_wipe.len());
    let told = restore(&["latest"], "latest").expect(0).json();
    assert!(told["restore"]["rows_verified"].as_u64() > Some(0), "{told:#}");
    assert!(dump(&cluster, "latest") == dump(&cluster, "app"));

    // Any moment on the way, and a newer server.
    for (name, (lsn, expected)) in [("point_1", &points[0]), ("point_2", &points[2])] {
        cluster.sql(&format!("CREATE DATABASE {name} OWNER supa TEMPLATE template0")).await;
        restore(&[lsn.as_str()], name).expect(0);
        assert_eq!(&contents(&connect(&into(name)).await).await, expected, "as of {lsn}");
    }
    if let Some(newest) = crate::harness::majors().last().filter(|major| **major > 15) {
        let newer = Cluster::builder().major(*newest).start().await;
        let place = newer.conninfo_of("postgres");
        let mut all = vec!["restore", "--yes", "--json", "--to", "latest", "--into", &place];
        all.extend(other.iter().map(String::as_str));
        let told = walguard(&all).expect(0).json();
        assert_eq!(told["restore"]["roles_made"], serde_json::json!(["supa"]), "{told:#}");
        assert_eq!(contents(&connect(&place).await).await, contents(&client).await, "in PostgreSQL {newest}");
    }

    // What cannot be done is refused before anything is.
    let again = restore(&["latest"], "latest");
    assert!(again.stderr().contains("is not empty"), "{again}");
    let early = restore(&["2020-01-01 00:00 UTC"], "latest");
    assert!(early.stderr().contains("no base is old enough"), "{early}");
    run(&client, "ALTER TABLE keyed ADD COLUMN d int; INSERT INTO keyed (b) VALUES (-1)").await;
    wait_kept(&cluster).await;
    cluster.sql("CREATE DATABASE refused OWNER supa TEMPLATE template0").await;
    let changed = restore(&["latest"], "refused");
    let is_told =
        changed.stderr().contains("table public.keyed was changed") && changed.stderr().contains("after base first");
    assert!(is_told, "{changed}");
    let dump_of_refused = dump(&cluster, "refused");
    assert!(!dump_of_refused.iter().any(|line| line.contains("CREATE TABLE")), "nothing was done");
}

/// The snapshot is held by another connection than those that read rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_base_goes_on_when_a_connection_breaks_that_reads_rows() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let client = app(&cluster).await;
    run(&client, "CREATE TABLE a (id int PRIMARY KEY, pad text); CREATE TABLE b (id int PRIMARY KEY)").await;
    // Several parts, so that some are there already when it breaks.
    run(&client, "INSERT INTO a SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 40000) i").await;
    run(&client, "INSERT INTO b SELECT generate_series(1, 1000)").await;
    let mut agent = agent(&cluster, &scratch).spawn();
    agent.wait_streaming(&cluster).await;
    let expected = contents(&client).await;

    let mut backup = walguard_command(&["backup", "--json", "--label", "first"]);
    backup.args(agent.flags()).env("WALGUARD_PG_BIN_DIR", client_dir());
    let ended = cluster.client().await;
    let ending = tokio::spawn(async move {
        let query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                     WHERE application_name LIKE '%-base' AND state = 'active' AND query LIKE 'COPY (SELECT%'";
        let (begun, mut ends) = (Instant::now(), 0);
        while ends < 3 && begun.elapsed() < Duration::from_secs(30) {
            ends += ended.query_one(query, &[]).await.unwrap().get::<_, i64>(0);
        }
        ends
    });
    let taken = tokio::task::spawn_blocking(move || finish(backup)).await.unwrap().expect(0).json();
    assert!(ending.await.unwrap() > 0, "none was ended");
    assert_eq!(taken["tables"].as_array().unwrap().len(), 2);
    run(&client, "DELETE FROM b").await;
    cluster.sql("CREATE DATABASE rebuilt TEMPLATE template0").await;
    let into = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=rebuilt");
    let mut restore =
        walguard_command(&["restore", "--yes", "--to", taken["consistent"].as_str().unwrap(), "--into", &into]);
    restore.args(agent.flags());
    tokio::task::spawn_blocking(move || finish(restore)).await.unwrap().expect(0);
    assert_eq!(contents(&connect(&into).await).await, expected);
}
