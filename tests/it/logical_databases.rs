//! Several databases of one server, read at once by one agent.

use walguard::detect::WhoSource;
use walguard::detect::incident::Incident;

use crate::archived_wal::repository;
use crate::harness::{Cluster, Restored, Scratch, wait_for};
use crate::managed::*;
use crate::timeline::Following;

async fn to(cluster: &Cluster, database: &str) -> tokio_postgres::Client {
    let config = conninfo(cluster).replace("dbname=app", &format!("dbname=\"{database}\"").replace('"', "'"));
    connect(&(config + " application_name=app")).await
}

fn is_wipe_of<'a>(database: &'a str, table: &'a str) -> impl Fn(&Incident) -> bool + use<'a> {
    move |incident| {
        let mut relations = incident.tables.iter().filter_map(|table| table.relation.as_ref());
        incident.first_harm.is_some()
            && relations.any(|relation| relation.database_name == database && relation.name == table)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_databases_is_kept_watched_and_rebuilt() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    cluster.sql("CREATE DATABASE \"The CRM\" OWNER supa").await;
    let (shop, crm) = (app(&cluster).await, to(&cluster, "The CRM").await);
    for (client, table) in [(&shop, "orders"), (&crm, "contacts")] {
        let make = format!("CREATE TABLE {table} (id int PRIMARY KEY, note text)");
        run(client, &make).await;
        run(client, &format!("INSERT INTO {table} SELECT i, md5(i::text) FROM generate_series(1, 2000) i")).await;
    }
    let settings = "[logical]\ndatabases = [\"The CRM\"]\n[detect]\ngroup_within = \"1s\"\nwindow = \"1s\"";
    let mut agent = agent(&cluster, &scratch).settings(settings).spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    wait_known(&agent).await;
    take_base(&agent, "first").await;
    let bases = repo.changed_databases().await.unwrap();
    assert_eq!(bases.len(), 2);
    for database in bases {
        assert_eq!(repo.bases(database).await.unwrap().len(), 1);
    }
    let told = status(&agent);
    let names: Vec<_> = told["databases"].as_array().unwrap().iter().map(|one| one["database"].clone()).collect();
    assert_eq!(names, ["app", "The CRM"], "{told:#}");
    let slots =
        cluster.text("SELECT count(*) FROM pg_replication_slots WHERE slot_name ~ '^walguard(_[0-9]+)?$' AND active");
    assert_eq!(slots.await, "2");
    let checked = verb(&agent, &["check"]).stdout();
    assert!(checked.contains("of database The CRM"), "{checked}");

    // Each wipe is told, and brought back from its own log.
    run(&crm, "UPDATE contacts SET note = 'new' WHERE id % 50 = 0").await;
    let (before_crm, before_shop) = (contents(&crm).await, contents(&shop).await);
    run(&crm, "DELETE FROM contacts").await;
    let of_crm = wait_incident(&repo, "the wipe of contacts", is_wipe_of("The CRM", "contacts")).await;
    assert!(of_crm.transactions.iter().any(|known| known.who.source <= WhoSource::Activity), "{of_crm:#?}");
    run(&shop, "DELETE FROM orders").await;
    let of_shop = wait_incident(&repo, "the wipe of orders", is_wipe_of("app", "orders")).await;
    assert_ne!(of_crm.id, of_shop.id, "they are nothing of each other");
    let kept = || async {
        let query = "SELECT bool_and(confirmed_flush_lsn >= (SELECT max(l) FROM (VALUES ('0/0'::pg_lsn), ($1)) v(l))) \
                     FROM pg_replication_slots WHERE slot_name LIKE 'walguard%'";
        let lsn = of_shop.seen_to.to_string();
        cluster.text(&query.replace("$1", &format!("'{lsn}'"))).await == "t"
    };
    wait_for("the changes to be kept", DEADLINE, kept).await;
    for (incident, database, before) in [(&of_crm, "The CRM", &before_crm), (&of_shop, "app", &before_shop)] {
        let target = format!("before:{}", incident.id);
        let flags = agent.flags();
        let mut restored = tokio::task::block_in_place(|| Restored::run(&flags, &["--to", &target]));
        assert_eq!(&contents(&restored.client_of(database).await).await, before, "{database}");
        restored.stop().await;
    }
    let flags = agent.flags();
    let mut restored =
        tokio::task::block_in_place(|| Restored::run(&flags, &["--to", "latest", "--database", "The CRM"]));
    assert_eq!(contents(&restored.client_of("The CRM").await).await, contents(&crm).await);
    restored.stop().await;
}

/// Both streams begin again where they were: what one of them was judged to says nothing of the other.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_database_lost_is_told_although_a_later_loss_of_another_was_told_before() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    cluster.sql("CREATE DATABASE crm OWNER supa").await;
    let (shop, crm) = (app(&cluster).await, to(&cluster, "crm").await);
    run(&shop, "CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 2000)").await;
    run(&crm, "CREATE TABLE contacts (id int PRIMARY KEY); INSERT INTO contacts SELECT generate_series(1, 2000)").await;
    let settings = "[logical]\ndatabases = [\"crm\"]\n[detect]\ngroup_within = \"1s\"\nwindow = \"1s\"";
    let mut agent = agent(&cluster, &scratch).settings(settings).spawn();
    agent.wait_streaming(&cluster).await;
    wait_known(&agent).await;
    let repo = repository(&scratch.repo_url()).await;
    let slot = cluster.text("SELECT slot_name FROM pg_replication_slots WHERE database = 'crm'").await;
    assert!(agent.stop().await.success());

    // While no agent runs contacts go first; then its slot is held by somebody else, so that only the other is read.
    run(&crm, "DELETE FROM contacts").await;
    run(&shop, "DELETE FROM orders").await;
    let mut holder = crate::harness::command(cluster.bin("pg_recvlogical"));
    let config = cluster.conninfo_of("postgres").replace("dbname=postgres", "dbname=crm");
    holder.args(["-d", &config, "-S", &slot, "--start", "-f", "/dev/null", "-F", "0", "-s", "0"]);
    holder.args(["-o", "proto_version=1", "-o", "publication_names=walguard"]);
    let mut holder = holder.spawn().unwrap();
    let is_held = || async {
        cluster.text(&format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{slot}'")).await == "t"
    };
    wait_for("the slot to be held", DEADLINE, is_held).await;
    agent.spawn_again();
    wait_incident(&repo, "the wipe of orders", is_wipe_of("app", "orders")).await;
    assert!(!incidents(&repo).await.iter().any(is_wipe_of("crm", "contacts")), "nobody has read it");
    agent.sigkill();
    holder.kill().unwrap();
    holder.wait().unwrap();
    agent.spawn_again();
    wait_incident(&repo, "the wipe of contacts", is_wipe_of("crm", "contacts")).await;
    let orders = incidents(&repo).await.into_iter().filter(is_wipe_of("app", "orders")).count();
    assert_eq!(orders, 1, "told once");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_hears_of_a_wipe_in_any_of_them_while_it_is_fresh() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    cluster.sql("CREATE DATABASE crm OWNER supa").await;
    let (shop, crm) = (app(&cluster).await, to(&cluster, "crm").await);
    run(&shop, "CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 50)").await;
    run(&crm, "CREATE TABLE contacts (id int PRIMARY KEY); INSERT INTO contacts SELECT generate_series(1, 2000)").await;
    let mut agent = agent(&cluster, &scratch).settings("[logical]\ndatabases = [\"crm\"]").spawn();
    agent.wait_streaming(&cluster).await;
    let published = "SELECT count(*) = 1 FROM pg_publication_tables WHERE pubname = 'walguard'";
    wait_sql(&crm, "contacts to be published", published).await;
    run(&shop, "INSERT INTO orders VALUES (1000)").await;
    let flags = agent.flags();
    let mut args = vec!["timeline", "--follow", "--json", "--bucket", "1s", "--from", "60 seconds ago"];
    args.extend(flags.iter().map(String::as_str));
    let following = Following::begin(&args);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    run(&shop, "INSERT INTO orders SELECT generate_series(2001, 2100)").await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    run(&crm, "DELETE FROM contacts").await;
    let (inserted, deleted) = following.until_deleted().await;
    assert_eq!((inserted, deleted), (101, 2_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_hears_of_a_wipe_in_a_database_whose_changes_are_read_since_then() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let shop = app(&cluster).await;
    run(&shop, "CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 50)").await;
    let mut agent = agent(&cluster, &scratch).settings("[logical]\ndatabases = [\"crm\"]").spawn();
    agent.wait_streaming(&cluster).await;
    run(&shop, "INSERT INTO orders VALUES (1000)").await;
    wait_kept(&cluster).await;
    let flags = agent.flags();
    let mut args = vec!["timeline", "--follow", "--json", "--bucket", "1s"];
    args.extend(flags.iter().map(String::as_str));
    let following = Following::begin(&args);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    cluster.sql("CREATE DATABASE crm OWNER supa").await;
    let crm = to(&cluster, "crm").await;
    run(&crm, "CREATE TABLE contacts (id int PRIMARY KEY); INSERT INTO contacts SELECT generate_series(1, 2000)").await;
    let published = "SELECT count(*) = 1 FROM pg_publication_tables WHERE pubname = 'walguard'";
    wait_sql(&crm, "contacts to be published", published).await;
    let is_streaming = || async {
        let told = status(&agent);
        told["databases"].as_array().is_some_and(|all| all.len() == 2 && all.iter().all(|one| one["streaming"] == true))
    };
    wait_for("the new database to be read", DEADLINE, is_streaming).await;
    run(&crm, "DELETE FROM contacts").await;
    let (_, deleted) = following.until_deleted().await;
    assert_eq!(deleted, 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_there_is_waited_for_and_keeps_no_other_from_being_read() {
    let cluster = managed(15).await;
    let scratch = Scratch::new();
    let shop = app(&cluster).await;
    run(&shop, "CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 2000)").await;
    let mut agent = agent(&cluster, &scratch).settings("[logical]\ndatabases = [\"later\"]").spawn();
    agent.wait_streaming(&cluster).await;
    let repo = repository(&scratch.repo_url()).await;
    let is_counted = || async { status(&agent)["detect"]["tables"].as_u64() > Some(0) };
    wait_for("rows to be counted", DEADLINE, is_counted).await;
    run(&shop, "DELETE FROM orders").await;
    wait_incident(&repo, "the wipe of orders", is_wipe_of("app", "orders")).await;
    let told = status(&agent);
    let alarm = told["alarms"]["database later"]["text"].as_str().unwrap_or_default();
    assert!(alarm.contains("later") && alarm.contains("does not exist"), "{told:#}");
    assert_eq!(told["archived"], serde_json::Value::Null, "nothing is known of all databases together");
    let checked = verb(&agent, &["check"]);
    assert!(checked.stdout().contains("database later: "), "{checked}");

    cluster.sql("CREATE DATABASE later OWNER supa").await;
    let later = to(&cluster, "later").await;
    run(&later, "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 2000)").await;
    let is_streaming = || async {
        let told = status(&agent);
        told["databases"].as_array().is_some_and(|all| all.len() == 2 && all.iter().all(|one| one["streaming"] == true))
            && told["alarms"].as_object().is_some_and(|alarms| !alarms.contains_key("database later"))
    };
    wait_for("the new database to be read", DEADLINE, is_streaming).await;
    run(&later, "DELETE FROM t").await;
    wait_incident(&repo, "the wipe of t", is_wipe_of("later", "t")).await;
}
