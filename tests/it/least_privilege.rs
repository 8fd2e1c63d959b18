//! Attribution, the nudge, the protection watch, the guard's status, the breaker and evidence work with exactly what
//! `walguard init --print-sql` prints, and what is not switched on is not permitted.

use jiff::Timestamp;
use walguard::capture::{ConnInfo, Environment};
use walguard::detect::WhoSource;
use walguard::guard::breaker::{self, Breaker, Outcome, Target};
use walguard::guard::flashback::{self, Snapshot, Wanted};
use walguard::guard::protection::{ItemKind, Protection};
use walguard::guard::script;
use walguard::guard::{Question, Sampler, Sessions, install};
use walguard::pg::Xid;

use crate::harness::{Cluster, Scratch, walguard};

/// A server on which exactly what these settings print was run, besides what is there of an application.
async fn granted(major: u32, settings: &str) -> (Cluster, ConnInfo) {
    let cluster = Cluster::builder().major(major).start().await;
    cluster
        .sql("CREATE ROLE shop LOGIN; CREATE TABLE basket AS SELECT i AS n FROM generate_series(1, 100) i; ALTER TABLE basket OWNER TO shop")
        .await;
    let scratch = Scratch::new();
    let config = scratch.file("walguard.toml", settings);
    let pg = cluster.conninfo_of("archivist");
    let sql = walguard(&["init", "--print-sql", "--pg", &pg, "--config", config.to_str().unwrap()]).expect(0).stdout();
    cluster.sql(&sql).await;
    let info = ConnInfo::parse(&pg, &Environment::default()).unwrap();
    (cluster, info)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_printed_is_enough_for_what_is_switched_on_and_not_for_the_rest() {
    for (major, is_on) in [(15, true), (17, false), (18, true)] {
        let settings = if is_on { "[detect]\nbreaker = \"terminate\"\n[flashback]\nevidence = true" } else { "" };
        let (cluster, info) = granted(major, settings).await;
        let mut sampler = Sampler::connect(&info).await.unwrap();
        let wiper = cluster.try_client("shop").await.unwrap();
        let snapshot = Snapshot::take(&info, "postgres").await.unwrap();
        wiper.batch_execute("BEGIN; DELETE FROM basket").await.unwrap();
        let sql = "SELECT (pg_current_xact_id()::text::bigint % 4294967296)::text";
        let xid: String = wiper.query_one(sql, &[]).await.unwrap().get(0);
        let xid = Xid::new(xid.parse().unwrap()).unwrap();

        let sessions = Sessions::new();
        sessions.learn(sampler.sample().await.unwrap());
        let who = sessions.who(&Question { xid: Some(xid), ..Question::default() });
        assert_eq!((who.source, &who.note), (WhoSource::Activity, &None), "{who:?}");
        assert!(who.actor.query.is_some() && who.actor.client.is_some(), "{who:?}");
        assert!(sampler.nudge().await.unwrap().is_some(), "the role may nudge");

        let client = walguard::capture::connect_sql(&info).await.unwrap();
        cluster.sql("CREATE TABLE other (n int)").await;
        let config = script::Config { tables: vec!["other".to_owned()], ..script::Config::default() };
        install::install(&cluster.client().await, &config).await.unwrap();
        assert!(install::inspect(&client, &config).await.unwrap().is_whole());
        assert_eq!(Protection::look(&client).await.unwrap().count(ItemKind::Trigger), (2, 2));

        let wanted = Wanted { schema: "public".into(), table: "basket".into(), xids: vec![xid], rows: Some(100) };
        let read = snapshot.read(&wanted, &flashback::Config::default()).await;
        let mut breaker = Breaker::new(info.clone(), breaker::Config { per_hour: 1, spare: Vec::new() });
        let target = Target::of(xid, &who.actor).unwrap();
        let record = breaker.terminate(&target, Timestamp::now()).await;
        if is_on {
            assert_eq!(read.unwrap().rows, 100);
            assert_eq!(record.outcome, Outcome::Terminated);
        } else {
            assert!(read.unwrap_err().to_string().contains("permission denied"));
            assert!(matches!(record.outcome, Outcome::NotPermitted(_)), "{record:?}");
        }
    }
}
