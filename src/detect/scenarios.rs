//! Labelled scenarios: what must be reported, and what looks alike and must not. Their precision and recall are printed.

#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::detector::{Asked, Condition, Detector, OpenWork};
use super::incident::{Incident, Rows, TransactionState};
use super::live_rows::key_of;
use super::rule::{Breaker, Config};
use super::silence::Silence;
use super::testing::*;
use super::{
    Actor, DdlEvent, DdlKind, Persistence, Relation, RelationKind, RuleName, Running, Severity, State, Tally,
    Transaction,
};
use super::{Who, WhoSource};
use crate::decode::change::RowCounts;
use crate::pg::{Lsn, Oid, PgTime, TimelineId, Xid};

/// A detector with a clock, a counter of transactions and a ledger of who did what.
struct World {
    detector: Detector,
    xid: u32,
    millis: i64,
    session: Option<i32>,
    source: WhoSource,
    role: &'static str,
    found: Vec<Incident>,
}

impl World {
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn with(config: Config) -> Self {
        let detector = Detector::new(config, TimeZone::UTC, TimelineId::FIRST);
        Self {
            detector,
            xid: 100,
            millis: 0,
            session: Some(1),
            source: WhoSource::Activity,
            role: "app",
            found: Vec::new(),
        }
    }

    /// With tables of so many rows, exactly.
    fn with_tables(tables: &[(&Arc<Relation>, u64)]) -> Self {
        let mut world = Self::new();
        world.seed(tables, true);
        world
    }

    fn seed(&mut self, tables: &[(&Arc<Relation>, u64)], exact: bool) {
        for (table, count) in tables {
            self.detector.live().seed(key_of(table), Rows { count: *count, exact }, Lsn::new(1));
        }
    }

    fn who(&self) -> impl Fn(&Asked) -> Who + use<> {
        let (session, source, role) = (self.session, self.source, self.role);
        move |_| {
            let Some(pid) = session else { return Who::default() };
            let actor = Actor {
                role: Some(role.to_owned()),
                pid: Some(pid),
                backend_start: Some(time(-1_000)),
                ..Actor::default()
            };
            Who { actor, source, note: None }
        }
    }

    fn commit(&mut self, tallies: Vec<Tally>, ddl: Vec<DdlEvent>) -> &mut Self {
        self.xid += 1;
        let ended = transaction(self.xid, self.millis, tallies, ddl);
        self.end(&ended)
    }

    fn end(&mut self, ended: &Transaction) -> &mut Self {
        let mut who = self.who();
        self.detector.transaction(ended, &mut who, at(self.millis + 20));
        self.take();
        self.millis += 100;
        self
    }

    fn open(&mut self, xid: u32, tallies: &[Tally], ddl: &[DdlEvent]) -> &mut Self {
        let mut who = self.who();
        let begin = Lsn::new(1_000 * u64::from(xid) - 500);
        let work = OpenWork {
            xid: Xid::new(xid).unwrap(),
            begin,
            is_prepared: false,
            is_complete: true,
            tallies,
            ddl,
            lsn: begin + 100,
        };
        self.detector.open(&[work], &mut who, at(self.millis));
        self.take();
        self.millis += 100;
        self
    }

    fn take(&mut self) {
        for incident in self.detector.take_changed(at(self.millis + 20)) {
            match self.found.iter_mut().find(|known| known.id == incident.id) {
                Some(known) => *known = incident,
                None => self.found.push(incident),
            }
        }
    }

    fn delete(&mut self, table: &Arc<Relation>, rows: u64) -> &mut Self {
        self.commit(vec![tally(table, deleted(rows))], vec![])
    }

    fn insert(&mut self, table: &Arc<Relation>, rows: u64) -> &mut Self {
        self.commit(vec![tally(table, inserted(rows))], vec![])
    }

    fn update(&mut self, table: &Arc<Relation>, rows: u64) -> &mut Self {
        self.commit(vec![tally(table, updated(rows))], vec![])
    }

    fn ddl(&mut self, kind: DdlKind, table: &Arc<Relation>) -> &mut Self {
        self.commit(vec![], vec![event(kind, table)])
    }

    fn wait(&mut self, millis: i64) -> &mut Self {
        self.millis += millis;
        self.take();
        self
    }

    /// Whatever still waits to be told.
    fn finish(mut self) -> Vec<Incident> {
        self.wait(10_000);
        self.found
    }

    fn rules(self) -> Vec<RuleName> {
        let mut rules: Vec<_> = self.finish().iter().flat_map(|i| i.findings.iter().map(|f| f.rule)).collect();
        rules.sort_unstable();
        rules.dedup();
        rules
    }
}

fn of_kind(kind: RelationKind, persistence: Persistence) -> Arc<Relation> {
    Arc::new(Relation { kind, persistence, ..relation("public", "t", 20_000) })
}

fn t() -> Arc<Relation> {
    table("t", 20_000)
}

fn tables(count: u32) -> Vec<Arc<Relation>> {
    (0..count).map(|n| table(&format!("t{n}"), 21_000 + n)).collect()
}

fn counts(inserted: u64, updated: u64, deleted: u64, moved: u64) -> RowCounts {
    RowCounts { inserted, updated, deleted, moved }
}

/// What a scenario must end in: at least a warning, with these rules among its findings; or nothing above `info`.
enum Expected {
    Alarm(&'static [RuleName]),
    Quiet,
}
use Expected::{Alarm, Quiet};

type Scenario = (&'static str, Expected, fn() -> World);

fn labelled() -> Vec<Scenario> {
    use RuleName as R;
    vec![
        ("DELETE without WHERE", Alarm(&[R::TableEmptied]), || {
            let mut world = World::with_tables(&[(&t(), 5_000)]);
            world.delete(&t(), 5_000);
            world
        }),
        ("a tenth of a table deleted", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::with_tables(&[(&t(), 1_000)]);
            world.delete(&t(), 100);
            world
        }),
        ("99 rows of 150 deleted", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 150)]);
            world.delete(&t(), 99);
            world
        }),
        ("500 rows of a million deleted", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 1_000_000)]);
            world.delete(&t(), 500);
            world
        }),
        ("a tenth by estimate", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::new();
            world.seed(&[(&t(), 100_000)], false);
            world.delete(&t(), 50_000);
            world
        }),
        ("many rows of a table that nobody counted", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::new();
            world.delete(&t(), 20_000);
            world
        }),
        ("a few rows of a table that nobody counted", Quiet, || {
            let mut world = World::new();
            world.delete(&t(), 150);
            world
        }),
        ("a table of 5 rows emptied", Alarm(&[R::TableEmptied]), || {
            let mut world = World::with_tables(&[(&t(), 5)]);
            world.delete(&t(), 5);
            world
        }),
        ("a table of 2 rows emptied", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 2)]);
            world.delete(&t(), 2);
            world
        }),
        ("three tables of 2 rows emptied", Alarm(&[R::TablesEmptied]), || {
            let all = tables(3);
            let mut world = World::with_tables(&all.iter().map(|table| (table, 2)).collect::<Vec<_>>());
            for table in &all {
                world.delete(table, 2);
            }
            world
        }),
        ("wipe in batches of 1,000", Alarm(&[R::TableEmptied]), || {
            let mut world = World::with_tables(&[(&t(), 20_000)]);
            for _ in 0..20 {
                world.delete(&t(), 1_000);
            }
            world
        }),
        ("wipe in single deletes", Alarm(&[R::TableEmptied]), || {
            let mut world = World::with_tables(&[(&t(), 300)]);
            for _ in 0..300 {
                world.delete(&t(), 1);
            }
            world
        }),
        ("half a table in single deletes", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::with_tables(&[(&t(), 600)]);
            for _ in 0..300 {
                world.delete(&t(), 1);
            }
            world
        }),
        ("single deletes, one a minute", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 600)]);
            for _ in 0..300 {
                world.delete(&t(), 1).wait(60_000);
            }
            world
        }),
        ("ON DELETE CASCADE", Alarm(&[R::TableEmptied]), || {
            let (parent, child) = (table("parent", 20_001), table("child", 20_002));
            let mut world = World::with_tables(&[(&parent, 10), (&child, 4_000)]);
            world.commit(vec![tally(&parent, deleted(10)), tally(&child, deleted(4_000))], vec![]);
            world
        }),
        ("all partitions emptied", Alarm(&[R::TableEmptied, R::TablesEmptied]), || {
            let parts = tables(4);
            let mut world = World::with_tables(&parts.iter().map(|table| (table, 1_000)).collect::<Vec<_>>());
            world.commit(parts.iter().map(|table| tally(table, deleted(1_000))).collect(), vec![]);
            world
        }),
        ("rows moved to another partition", Quiet, || {
            let (from, to) = (table("p1", 20_001), table("p2", 20_002));
            let mut world = World::with_tables(&[(&from, 1_000), (&to, 100_000)]);
            world.commit(vec![tally(&from, counts(0, 0, 0, 300)), tally(&to, counts(300, 0, 0, 0))], vec![]);
            world
        }),
        ("DELETE in a prepared transaction", Alarm(&[R::TableEmptied]), || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            let prepared =
                Transaction { prepared: true, ..transaction(900, 50, vec![tally(&t(), deleted(500))], vec![]) };
            world.end(&prepared);
            world
        }),
        ("DELETE rolled back", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            let undone =
                Transaction { committed: false, ..transaction(900, 50, vec![tally(&t(), deleted(500))], vec![]) };
            world.end(&undone);
            world
        }),
        ("UPDATE .. SET deleted = true", Alarm(&[R::MassUpdate]), || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.update(&t(), 500);
            world
        }),
        ("UPDATE that moves every row to another partition", Alarm(&[R::MassUpdate]), || {
            let (from, to) = (table("p1", 20_001), table("p2", 20_002));
            let mut world = World::with_tables(&[(&from, 1_000), (&to, 0)]);
            world.commit(vec![tally(&from, counts(0, 0, 0, 1_000)), tally(&to, counts(1_000, 0, 0, 0))], vec![]);
            world
        }),
        ("rows updated one by one", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 200)]);
            for _ in 0..400 {
                world.update(&t(), 1);
            }
            world
        }),
        ("rows loaded and updated by one transaction", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 0)]);
            world.commit(vec![tally(&t(), counts(10_000, 10_000, 0, 0))], vec![]);
            world
        }),
        ("TRUNCATE", Alarm(&[R::Truncate]), || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.ddl(DdlKind::Truncate, &t());
            world
        }),
        ("TRUNCATE of a table that nobody counted", Alarm(&[R::Truncate]), || {
            let mut world = World::new();
            world.ddl(DdlKind::Truncate, &t());
            world
        }),
        ("TRUNCATE of an empty table", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 0)]);
            world.ddl(DdlKind::Truncate, &t());
            world
        }),
        ("TRUNCATE and load again", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.commit(vec![tally_in(&t(), 30_000, inserted(505))], vec![event(DdlKind::Truncate, &t())]);
            world
        }),
        ("TRUNCATE and load again with less", Alarm(&[R::Truncate]), || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.commit(vec![tally_in(&t(), 30_000, inserted(5))], vec![event(DdlKind::Truncate, &t())]);
            world
        }),
        ("DELETE all and insert as many in one transaction", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.commit(vec![tally(&t(), counts(500, 0, 500, 0))], vec![]);
            world
        }),
        ("DROP TABLE", Alarm(&[R::DropTable]), || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.ddl(DdlKind::DropTable, &t());
            world
        }),
        ("DROP TABLE of one made by the same transaction", Quiet, || {
            let mut world = World::new();
            world.commit(vec![tally(&t(), inserted(9))], vec![event(DdlKind::Create, &t())]);
            world
        }),
        ("DROP of a view, a sequence, an index", Quiet, || {
            let mut world = World::new();
            for kind in
                [RelationKind::View, RelationKind::Sequence, RelationKind::Index, RelationKind::MaterializedView]
            {
                world.ddl(DdlKind::DropOther, &of_kind(kind, Persistence::Permanent));
            }
            world
        }),
        ("nightly DROP of a partition, declared routine", Quiet, || {
            let config = "[[adjust]]\nrules = [\"drop-table\"]\ntables = [\"public.events_*\"]\nseverity = \"off\"";
            let mut world = World::with(toml::from_str(config).unwrap());
            let partition = table("events_2025_12_16", 20_001);
            world.seed(&[(&partition, 90_000)], true);
            world.ddl(DdlKind::DropTable, &partition);
            world
        }),
        ("DROP SCHEMA CASCADE", Alarm(&[R::DropSchema, R::DropTable, R::TablesEmptied]), || {
            let all = tables(3);
            let mut world = World::with_tables(&all.iter().map(|table| (table, 20)).collect::<Vec<_>>());
            let mut ddl: Vec<_> = all.iter().map(|table| event(DdlKind::DropTable, table)).collect();
            ddl.push(event_of(DdlKind::DropSchema, None, "public"));
            world.commit(vec![], ddl);
            world
        }),
        ("DROP DATABASE", Alarm(&[R::DropDatabase]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DropDatabase, None, "shop")]);
            world
        }),
        ("DROP COLUMN", Alarm(&[R::DropColumn]), || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.commit(vec![], vec![event_of(DdlKind::DropColumn, Some(&t()), "email")]);
            world
        }),
        ("swap by rename with a smaller table, the old one dropped", Alarm(&[R::TableReplaced]), || {
            let (old, new) = (table("t", 20_000), table("t", 20_001));
            let mut world = World::with_tables(&[(&old, 5_000)]);
            let ddl = vec![
                event(DdlKind::Create, &new),
                event(DdlKind::DropTable, &old),
                event_of(DdlKind::Alter, Some(&new), "public.t_new"),
            ];
            world.commit(vec![tally(&new, inserted(3_000))], ddl);
            world
        }),
        ("swap by rename with an empty table, the old one kept", Alarm(&[R::TableReplaced]), || {
            let (old, new) = (table("t_old", 20_000), table("t", 20_001));
            let mut world = World::with_tables(&[(&old, 12)]);
            let ddl = vec![
                event(DdlKind::Create, &new),
                event_of(DdlKind::Alter, Some(&old), "public.t"),
                event_of(DdlKind::Alter, Some(&new), "public.t_new"),
            ];
            world.commit(vec![], ddl);
            world
        }),
        ("swap by rename with as much", Quiet, || {
            let (old, new) = (table("t", 20_000), table("t", 20_001));
            let mut world = World::with_tables(&[(&old, 5_000)]);
            let ddl = vec![
                event(DdlKind::Create, &new),
                event(DdlKind::DropTable, &old),
                event_of(DdlKind::Alter, Some(&new), "public.t_new"),
            ];
            world.commit(vec![tally(&new, inserted(5_000))], ddl);
            world
        }),
        ("a table renamed", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 500)]);
            world.commit(vec![], vec![event_of(DdlKind::Alter, Some(&t()), "public.former")]);
            world
        }),
        ("DROP TRIGGER", Alarm(&[R::TriggerRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DropTrigger, Some(&t()), "protect")]);
            world
        }),
        ("DISABLE TRIGGER", Alarm(&[R::TriggerRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DisableTrigger, Some(&t()), "protect")]);
            world
        }),
        ("event trigger disabled", Alarm(&[R::EventTriggerRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DisableEventTrigger, None, "no_drop")]);
            world
        }),
        ("event trigger dropped", Alarm(&[R::EventTriggerRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DropEventTrigger, None, "no_drop")]);
            world
        }),
        ("rule dropped", Alarm(&[R::RuleRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DropRule, Some(&t()), "no_delete")]);
            world
        }),
        ("policy dropped", Alarm(&[R::PolicyRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DropPolicy, Some(&t()), "tenant")]);
            world
        }),
        ("the guard's trigger dropped", Alarm(&[R::GuardRemoved]), || {
            let mut world = World::new();
            world.commit(vec![], vec![event_of(DdlKind::DropTrigger, Some(&t()), "walguard_delete")]);
            world
        }),
        ("migration history replaced by one row", Alarm(&[R::MigrationHistory]), || {
            let history = Arc::new(relation("supabase_migrations", "schema_migrations", 20_000));
            let mut world = World::with_tables(&[(&history, 40)]);
            world.commit(vec![tally(&history, counts(1, 0, 40, 0))], vec![]);
            world
        }),
        ("migration history truncated", Alarm(&[R::MigrationHistory]), || {
            let history = table("schema_migrations", 20_000);
            let mut world = World::with_tables(&[(&history, 40)]);
            world.ddl(DdlKind::Truncate, &history);
            world
        }),
        ("a migration noted", Quiet, || {
            let history = table("alembic_version", 20_000);
            let mut world = World::with_tables(&[(&history, 1)]);
            world.update(&history, 1).commit(vec![tally(&history, counts(1, 0, 1, 0))], vec![]);
            world
        }),
        ("VACUUM FULL, CLUSTER, ALTER TYPE, REINDEX", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 5_000)]);
            for _ in 0..4 {
                world.ddl(DdlKind::Rewrite, &t());
            }
            world
        }),
        ("REFRESH MATERIALIZED VIEW CONCURRENTLY", Quiet, || {
            let view = of_kind(RelationKind::MaterializedView, Persistence::Permanent);
            let mut world = World::with_tables(&[(&view, 5_000)]);
            world.delete(&view, 5_000).ddl(DdlKind::Rewrite, &view);
            world
        }),
        ("unlogged and temporary tables", Quiet, || {
            let mut world = World::new();
            for persistence in [Persistence::Unlogged, Persistence::Temporary] {
                let table = of_kind(RelationKind::Table, persistence);
                world.seed(&[(&table, 500)], true);
                world.delete(&table, 500).ddl(DdlKind::Truncate, &table).ddl(DdlKind::DropTable, &table);
            }
            world
        }),
        ("an index and a TOAST table", Quiet, || {
            let mut world = World::new();
            for kind in [RelationKind::Toast, RelationKind::Index] {
                let relation = of_kind(kind, Persistence::Permanent);
                world.delete(&relation, 50_000).ddl(DdlKind::Truncate, &relation);
            }
            world
        }),
        ("a queue that inserts and deletes at the same rate", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 0)]);
            for round in 0..200 {
                world.insert(&t(), 20 + round % 7);
                for _ in 0..20 + round % 7 {
                    world.delete(&t(), 1);
                }
            }
            world
        }),
        ("a queue whose backlog is worked off", Quiet, || {
            let mut world = World::new();
            world.detector.live().seed_history(key_of(&t()), 2_000_000, 1_999_000);
            world.seed(&[(&t(), 1_000)], false);
            for round in 0..20 {
                world.insert(&t(), 50);
                for _ in 0..if round < 5 { 50 } else { 110 } {
                    world.delete(&t(), 1);
                }
            }
            world
        }),
        ("a queue emptied by one statement", Alarm(&[R::TableEmptied]), || {
            let mut world = World::with_tables(&[(&t(), 0)]);
            for _ in 0..100 {
                world.insert(&t(), 10);
                for _ in 0..9 {
                    world.delete(&t(), 1);
                }
            }
            world.delete(&t(), 100);
            world
        }),
        ("a nightly purge, from the fourth night on", Quiet, || {
            let mut world = World::with_tables(&[(&t(), 10_000)]);
            for _ in 0..6 {
                world.delete(&t(), 2_000).insert(&t(), 2_000).wait(86_400_000);
            }
            let nights = std::mem::take(&mut world.found);
            assert_eq!(nights.len(), 3, "each of the first three is told");
            world.delete(&t(), 2_000);
            world
        }),
        ("the same purge at noon", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::with_tables(&[(&t(), 10_000)]);
            for _ in 0..6 {
                world.delete(&t(), 2_000).insert(&t(), 2_000).wait(86_400_000);
            }
            world.found.clear();
            world.wait(12 * 3_600_000).delete(&t(), 2_000);
            world
        }),
        ("pgbench", Quiet, || {
            let (accounts, tellers, branches, history) = (
                table("pgbench_accounts", 1),
                table("pgbench_tellers", 2),
                table("pgbench_branches", 3),
                table("pgbench_history", 4),
            );
            let mut world = World::with_tables(&[(&accounts, 100_000), (&tellers, 10), (&branches, 1), (&history, 0)]);
            for _ in 0..500 {
                let touched = [&accounts, &tellers, &branches].map(|table| tally(table, updated(1)));
                world.commit(touched.into_iter().chain([tally(&history, inserted(1))]).collect(), vec![]);
            }
            world
        }),
        ("pgbench -i: history truncated while it is empty", Quiet, || {
            let history = table("pgbench_history", 4);
            let mut world = World::new();
            world.ddl(DdlKind::Create, &history).ddl(DdlKind::Truncate, &history);
            world
        }),
        ("restore of a dump", Quiet, || {
            let mut world = World::new();
            for table in &tables(20) {
                world.ddl(DdlKind::Create, table).insert(table, 5_000).ddl(DdlKind::Alter, table);
            }
            world
        }),
        ("a table that no rule may look at", Quiet, || {
            let mut world = World::with(toml::from_str("exclude = [\"public.t\"]").unwrap());
            world.seed(&[(&t(), 500)], true);
            world.delete(&t(), 500).ddl(DdlKind::Truncate, &t());
            world.commit(vec![], vec![event_of(DdlKind::DropTrigger, Some(&t()), "protect")]);
            world
        }),
        ("rows that are found gone after a restart", Alarm(&[R::TableEmptied]), || {
            // Counted after the wipe, whose WAL is read only now.
            let mut world = World::new();
            world.detector.live().seed(key_of(&t()), Rows { count: 0, exact: true }, Lsn::new(1 << 40));
            world.delete(&t(), 12);
            world
        }),
        ("a transaction that was seen from its middle", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::with_tables(&[(&t(), 5_000)]);
            let partial =
                Transaction { is_complete: false, ..transaction(900, 50, vec![tally(&t(), deleted(700))], vec![]) };
            world.end(&partial);
            world
        }),
        ("rows of a file that nobody knows", Alarm(&[R::RowsDeleted]), || {
            let mut world = World::new();
            world.commit(vec![Tally { relation: None, ..tally(&t(), deleted(5_000)) }], vec![]);
            world
        }),
    ]
}

fn alarms(incidents: &[Incident]) -> Vec<&Incident> {
    let is_told = |incident: &&Incident| {
        incident.severity >= Severity::Warning && incident.is_told() && incident.state != State::Aborted
    };
    incidents.iter().filter(is_told).collect()
}

#[test]
fn precision_and_recall_are_one() {
    let (mut hits, mut misses, mut false_alarms, mut quiet) = (0, 0, 0, 0);
    let mut faults = Vec::new();
    let scenarios = labelled();
    for (name, expected, play) in &scenarios {
        let incidents = play().finish();
        let alarms = alarms(&incidents);
        let rules: Vec<RuleName> = alarms.iter().flat_map(|i| i.findings.iter().map(|finding| finding.rule)).collect();
        match expected {
            Alarm(wanted) if alarms.len() == 1 && wanted.iter().all(|rule| rules.contains(rule)) => hits += 1,
            Alarm(wanted) => {
                misses += 1;
                faults.push(format!("{name}: {} alarms, {rules:?} instead of {wanted:?}", alarms.len()));
            }
            Quiet if alarms.is_empty() => quiet += 1,
            Quiet => {
                false_alarms += 1;
                faults.push(format!("{name}: {}", alarms[0].title));
            }
        }
    }
    let precision = f64::from(hits) / f64::from(hits + false_alarms);
    let recall = f64::from(hits) / f64::from(hits + misses);
    println!(
        "{} scenarios: {hits} found, {misses} missed, {quiet} quiet, {false_alarms} false alarms: precision {precision:.3}, recall {recall:.3}",
        scenarios.len()
    );
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
    assert!(scenarios.len() >= 60, "{}", scenarios.len());
}

#[test]
fn eighteen_tables_emptied_after_their_triggers_were_dropped_are_one_incident() {
    for session in [Some(1), None] {
        let all = tables(18);
        let seeds: Vec<_> = all.iter().zip(1..).map(|(table, n)| (table, n % 7 + 1)).collect();
        let mut world = World::with_tables(&seeds);
        world.session = session;
        for table in &all {
            world.commit(vec![], vec![event_of(DdlKind::DropTrigger, Some(table), "no_truncate")]);
        }
        world.commit(vec![], vec![event_of(DdlKind::DisableEventTrigger, None, "no_drop")]);
        assert_eq!(world.found.len(), 1, "told before the first row is gone");
        assert!(world.found[0].tables.is_empty());
        let first_harm = world.found[0].first_harm.unwrap();
        for (table, rows) in &seeds {
            world.delete(table, *rows);
        }
        let found = world.finish();
        assert_eq!(found.len(), 1, "{:?}", found.iter().map(|i| &i.title).collect::<Vec<_>>());
        let incident = &found[0];
        assert_eq!(
            (incident.tables.len(), incident.severity, incident.state),
            (18, Severity::Critical, State::Committed)
        );
        assert!(incident.tables.iter().all(|table| table.after == Some(Rows { count: 0, exact: true })));
        let rows: u64 = seeds.iter().map(|(_, rows)| rows).sum();
        assert_eq!(incident.rows_lost(), rows);
        assert_eq!(incident.first_harm, Some(first_harm));
        assert!(incident.first_loss.unwrap() > first_harm);
        assert_eq!(incident.transactions.len(), 37);
        assert_eq!(
            incident.title,
            format!("18 tables emptied, 19 protections removed in shop.public, {rows} rows gone")
        );
        assert_eq!(incident.who().unwrap().actor.pid, session);
        assert_eq!(incident.notes.is_empty(), session.is_some(), "what is not known is said");
    }
}

#[test]
fn a_small_loss_just_before_an_incident_is_a_part_of_it() {
    let (small, large) = (table("profiles", 20_001), table("tracks", 20_002));
    let mut world = World::with_tables(&[(&small, 2), (&large, 56)]);
    world.delete(&small, 2);
    assert!(world.found.is_empty());
    world.delete(&large, 56);
    let found = world.finish();
    assert_eq!(found.len(), 1);
    let names: Vec<_> = found[0].tables.iter().map(|table| table.name.as_str()).collect();
    assert_eq!(names, ["shop.public.tracks", "shop.public.profiles"]);
    assert_eq!(found[0].first_harm, Some(Lsn::new(101_000)), "the restore must reach back to before the first of them");
    assert_eq!(found[0].tables[1].before, Some(Rows { count: 2, exact: true }));
}

#[test]
fn two_sessions_at_work_on_different_tables_are_two_incidents() {
    let all = tables(2);
    let mut world = World::with_tables(&[(&all[0], 500), (&all[1], 500)]);
    world.delete(&all[0], 500);
    world.session = Some(2);
    world.delete(&all[1], 500);
    assert_eq!(world.finish().len(), 2);
}

#[test]
fn a_suspicion_ends_with_the_server_that_its_transaction_ran_on() {
    let mut world = World::with_tables(&[(&t(), 500)]);
    world.open(300, &[tally(&t(), deleted(500))], &[]);
    let tell = |world: &mut World, running: Running| {
        world.detector.see_running(&running, at(world.millis));
        world.take();
        world.found[0].state
    };
    let xid = Xid::new(300).unwrap();
    assert_eq!(tell(&mut world, Running::listing(Lsn::new(290_000), &[], 301)), State::Open, "WAL from before it");
    assert_eq!(tell(&mut world, Running::listing(Lsn::new(310_000), &[xid], 300)), State::Open, "it is listed");
    assert_eq!(tell(&mut world, Running::listing(Lsn::new(310_000), &[], 300)), State::Open, "it may have begun later");
    assert_eq!(tell(&mut world, Running::listing(Lsn::new(320_000), &[], 301)), State::Aborted);
    let found = &world.found[0];
    assert_eq!(found.transactions[0].state, TransactionState::Aborted);
    assert_eq!(found.tables[0].name, "shop.public.t", "what was tried is told");
    assert!(found.title.starts_with("rolled back"), "{}", found.title);
}

#[test]
fn a_session_that_is_only_likely_ties_nothing_that_lies_apart() {
    let (one, other) = (Arc::new(relation("one", "t", 20_001)), Arc::new(relation("other", "t", 20_002)));
    for (source, incidents) in [(WhoSource::Nearby, 2), (WhoSource::Activity, 1)] {
        let mut world = World::with_tables(&[(&one, 500), (&other, 500)]);
        world.source = source;
        world.delete(&one, 500).delete(&other, 500);
        assert_eq!(world.finish().len(), incidents, "{source:?}");
    }
}

#[test]
fn what_comes_later_than_a_minute_is_another_incident() {
    let all = tables(2);
    let mut world = World::with_tables(&[(&all[0], 500), (&all[1], 500)]);
    world.delete(&all[0], 500).wait(61_000).delete(&all[1], 500);
    assert_eq!(world.finish().len(), 2);
}

#[test]
fn a_queue_that_is_drained_to_nothing_wakes_nobody_and_is_no_news_after_three_times() {
    let mut world = World::with_tables(&[(&t(), 0)]);
    world.detector.live().seed_history(key_of(&t()), 2_500, 2_500);
    for _ in 0..20 {
        world.insert(&t(), 50).delete(&t(), 50);
    }
    world.wait(120_000);
    assert_eq!(world.found.len(), 1);
    assert_eq!((world.found[0].severity, world.found[0].transactions.len()), (Severity::Warning, 3));
    world.insert(&t(), 3_000).delete(&t(), 3_000);
    let found = world.finish();
    assert_eq!(found.len(), 2, "so many at once are no habit");
    assert_eq!(found[1].severity, Severity::Critical);
}

#[test]
fn what_is_declared_routine_is_no_part_of_a_wipe_that_happens_beside_it() {
    let config = "[[adjust]]\nrules = [\"drop-table\"]\ntables = [\"public.events_*\"]\nseverity = \"off\"";
    let mut world = World::with(toml::from_str(config).unwrap());
    let (night, day) = (table("events_2025_12_16", 20_001), table("events_2025_12_17", 20_002));
    world.seed(&[(&t(), 500), (&night, 90_000), (&day, 90_000)], true);
    world.delete(&t(), 500).ddl(DdlKind::DropTable, &night).delete(&day, 90_000);
    let found = world.finish();
    assert_eq!(found.len(), 1);
    let names: Vec<_> = found[0].tables.iter().map(|table| table.name.as_str()).collect();
    assert_eq!(names, ["shop.public.t", "shop.public.events_2025_12_17"]);
}

#[test]
fn wal_of_the_past_raises_no_suspicion_whose_end_the_count_has_seen() {
    let mut world = World::new();
    let from = Lsn::new(2_000_000);
    world.detector.live().seed_between(key_of(&t()), Rows { count: 900, exact: true }, from, from);
    let truncated = [event(DdlKind::Truncate, &t())];
    world.open(900, &[tally(&t(), inserted(100))], &truncated);
    assert!(world.found.is_empty(), "{:?}", world.found);
    world.open(3_000, &[tally(&t(), inserted(100))], &truncated);
    assert_eq!(world.found.len(), 1);
}

#[test]
fn a_wipe_in_single_deletes_is_one_incident_with_its_first_transaction_and_all_rows() {
    let mut world = World::with_tables(&[(&t(), 400)]);
    for _ in 0..400 {
        world.delete(&t(), 1);
    }
    let found = world.finish();
    assert_eq!(found.len(), 1);
    let incident = &found[0];
    assert_eq!(incident.first_harm, Some(Lsn::new(101_000)));
    let table = &incident.tables[0];
    assert_eq!((table.before.unwrap().count, table.after.unwrap().count, table.deleted), (400, 0, 400));
    assert_eq!(incident.transactions.len() as u64 + incident.transactions_more, 400);
    assert_eq!(incident.title, "shop.public.t emptied in 400 transactions: 400 of 400 rows deleted");
}

#[test]
fn an_incident_that_only_grows_is_given_every_few_seconds() {
    let mut world = World::with_tables(&[(&t(), 2_000)]);
    let mut given = 0;
    for n in 0..1_000_u32 {
        let ended = transaction(200 + n, world.millis, vec![tally(&t(), deleted(1))], vec![]);
        world.detector.transaction(&ended, &mut |_| Who::default(), at(world.millis));
        given += world.detector.take_changed(at(world.millis)).len();
        world.millis += 20;
    }
    assert!((3..=6).contains(&given), "{given} revisions in 20 seconds");
}

#[test]
fn a_suspicion_is_told_while_the_transaction_is_open_and_told_as_committed_then() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(400))], &[]);
    assert!(world.found.is_empty(), "less than a tenth");
    world.open(900, &[tally(&t(), deleted(600))], &[]);
    let suspicion = world.found[0].clone();
    assert_eq!((suspicion.state, suspicion.first_harm), (State::Open, None));
    assert_eq!(suspicion.title, "not committed yet: 600 of 5,000 rows deleted from shop.public.t");
    world.wait(6_000).open(900, &[tally(&t(), deleted(3_000))], &[]);
    assert_eq!(world.found[0].transactions[0].deleted, 3_000);
    let ended = transaction(900, world.millis, vec![tally(&t(), deleted(5_000))], vec![]);
    let found = {
        world.end(&ended);
        world.finish()
    };
    assert_eq!(found.len(), 1);
    let incident = &found[0];
    assert_eq!((&incident.id, incident.state), (&suspicion.id, State::Committed));
    assert_eq!(incident.first_harm, Some(ended.lsn));
    assert_eq!((incident.transactions.len(), incident.transactions[0].state), (1, TransactionState::Committed));
    let table = &incident.tables[0];
    assert_eq!((table.before.unwrap().count, table.after.unwrap().count, table.deleted), (5_000, 0, 5_000));
}

#[test]
fn a_suspicion_that_is_rolled_back_is_told_as_such_and_nothing_is_lost() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(5_000))], &[]);
    let undone = Transaction { committed: false, ..transaction(900, world.millis, vec![], vec![]) };
    world.end(&undone);
    assert_eq!(world.detector.live().get(key_of(&t())), Some(Rows { count: 5_000, exact: true }));
    let found = world.finish();
    assert_eq!((found.len(), found[0].state, found[0].first_harm), (1, State::Aborted, None));
    assert_eq!(found[0].title, "rolled back: shop.public.t emptied: 5,000 of 5,000 rows deleted");
    assert_eq!(found[0].tables[0].deleted, 5_000, "what was tried is told");
}

/// Law broken: one row that was deleted half a second after a wipe had been rolled back made an alarm of it, which said that the
/// wipe was committed.
#[test]
fn what_was_rolled_back_stays_that_whatever_is_committed_on_the_same_table_later() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(4_000))], &[]);
    let undone = Transaction { committed: false, ..transaction(900, world.millis, vec![], vec![]) };
    world.end(&undone);
    world.delete(&t(), 1);
    let found = world.finish();
    assert_eq!((found.len(), found[0].state, found[0].first_harm), (1, State::Aborted, None));
    assert_eq!((found[0].title.starts_with("rolled back: "), found[0].tables[0].deleted), (true, 4_000));

    // When it succeeds the second time it is an alarm of its own, with its own counts.
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(4_000))], &[]);
    world.end(&Transaction { committed: false, ..transaction(900, world.millis, vec![], vec![]) });
    world.delete(&t(), 5_000);
    let mut found = world.finish();
    found.sort_by_key(|incident| incident.state == State::Committed);
    let states: Vec<_> = found.iter().map(|incident| (incident.state, incident.tables[0].deleted)).collect();
    assert_eq!(states, [(State::Aborted, 4_000), (State::Committed, 5_000)]);
    assert_eq!(found[1].transactions.len(), 1);
}

/// Law broken: what others deleted from a table while a suspicious transaction was open was told as that one's commit.
#[test]
fn what_others_commit_beside_an_open_wipe_does_not_commit_it() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(4_000))], &[]);
    let begin = world.millis;
    world.delete(&t(), 1).wait(1_000);
    assert_eq!((world.found.len(), world.found[0].state), (1, State::Open));
    assert_eq!(world.found[0].tables[0].deleted, 4_000);
    world.end(&transaction(900, begin, vec![tally(&t(), deleted(4_000))], vec![]));
    let found = world.finish();
    // The row of the other is one of those that the table lost.
    assert_eq!((found.len(), found[0].state, found[0].tables[0].deleted), (1, State::Committed, 4_001));
}

#[test]
fn a_suspicion_about_a_subtransaction_becomes_its_top_level_transactions() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(901, &[tally(&t(), deleted(5_000))], &[]);
    let mut ended = transaction(902, world.millis, vec![tally(&t(), deleted(5_000))], vec![]);
    ended.begin = Lsn::new(899_000);
    ended.subtransactions = 1;
    world.end(&ended);
    let found = world.finish();
    assert_eq!((found.len(), found[0].state, found[0].transactions.len()), (1, State::Committed, 1));
    assert_eq!(found[0].transactions[0].xid, Xid::new(902));
}

#[test]
fn the_breaker_is_asked_for_once_and_only_where_the_settings_want_it() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(5_000))], &[]);
    assert_eq!(world.detector.take_breaks(), []);

    let config = Config { breaker: Breaker::Terminate, ..Config::default() };
    let mut world = World::with(config);
    world.seed(&[(&t(), 5_000)], true);
    world.open(900, &[tally(&t(), deleted(4_000))], &[]).open(900, &[tally(&t(), deleted(4_500))], &[]);
    let breaks = world.detector.take_breaks();
    assert_eq!((breaks.len(), breaks[0].xid, breaks[0].rule), (1, Xid::new(900).unwrap(), RuleName::RowsDeleted));
    assert_eq!(breaks[0].incident, world.found[0].id);
}

fn silence(tables: &str) -> Silence {
    Silence {
        id: "s1".into(),
        from: start(),
        until: "2025-12-17T09:14:00Z".parse::<Timestamp>().unwrap(),
        reason: "release".into(),
        by: "ada".into(),
        rules: vec![],
        tables: vec![tables.parse().unwrap()],
        roles: vec![],
        applications: vec![],
        lifted_at: None,
    }
}

#[test]
fn a_silence_silences_what_it_covers_and_never_a_wiped_database() {
    let all = tables(4);
    let seeds: Vec<_> = all.iter().map(|table| (table, 50)).collect();
    let mut world = World::with_tables(&seeds);
    world.detector.set_silences(vec![silence("public.*")]);
    world.delete(&all[0], 50);
    assert_eq!(world.found.len(), 1);
    assert_eq!(world.found[0].silenced_by.as_ref().unwrap().id, "s1");
    assert!(alarms(&world.found).is_empty());
    world.delete(&all[1], 50).delete(&all[2], 50).wait(1_000);
    assert!(world.found[0].is_told(), "most of the database is gone");
    let mut world = World::with_tables(&seeds);
    world.detector.set_silences(vec![silence("public.t0")]);
    world.delete(&all[1], 50);
    assert!(world.found[0].is_told());
}

#[test]
fn a_replay_tells_nothing_twice_and_finds_what_is_new() {
    let all = tables(2);
    let seeds = [(&all[0], 500), (&all[1], 500)];
    let play = |world: &mut World| {
        for _ in 0..500 {
            world.delete(&all[0], 1);
        }
    };
    let mut world = World::with_tables(&seeds);
    play(&mut world);
    let kept = world.finish();
    // Another agent, that has the incidents and reads the same WAL again.
    let mut world = World::with_tables(&seeds);
    world.detector.restore(kept.clone());
    play(&mut world);
    assert_eq!(world.found, []);
    world.delete(&all[1], 500);
    let found = world.finish();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].id, kept[0].id, "the same session, within a minute");
    assert_eq!(found[0].tables.len(), 2);
    // One that has them not finds the same, under the same name.
    let mut world = World::with_tables(&seeds);
    play(&mut world);
    let again = world.finish();
    assert_eq!((again.len(), &again[0].id, again[0].first_harm), (1, &kept[0].id, kept[0].first_harm));
}

#[test]
fn a_suspicion_that_is_kept_is_ended_by_the_next_agent() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.open(900, &[tally(&t(), deleted(5_000))], &[]);
    let kept = world.finish();
    for committed in [true, false] {
        let mut world = World::with_tables(&[(&t(), 5_000)]);
        world.detector.restore(kept.clone());
        let rows = vec![tally(&t(), deleted(5_000))];
        world.end(&Transaction { committed, ..transaction(900, 300, rows, vec![]) });
        let found = world.finish();
        let state = if committed { State::Committed } else { State::Aborted };
        assert_eq!((found.len(), &found[0].id, found[0].state), (1, &kept[0].id, state));
    }
}

#[test]
fn a_condition_is_one_incident_while_it_lasts_and_resolved_when_it_is_over() {
    let mut world = World::new();
    let lag = |text: &str| Condition {
        rule: RuleName::ArchiveLag,
        severity: Severity::Warning,
        text: text.to_owned(),
        lsn: Lsn::new(77),
    };
    world.detector.condition(lag("6 minutes"), at(0));
    world.detector.condition(lag("7 minutes"), at(60_000));
    world.wait(61_000);
    assert_eq!((world.found.len(), world.found[0].title.as_str()), (1, "7 minutes"));
    assert_eq!((world.found[0].state, world.found[0].first_harm), (State::Open, None));
    // The next agent goes on with it.
    let kept = world.found.clone();
    let mut world = World::new();
    world.detector.restore(kept);
    world.detector.condition(lag("7 minutes"), at(120_000));
    world.wait(121_000);
    assert_eq!(world.found, []);
    world.detector.condition_over(RuleName::ArchiveLag, at(180_000));
    let found = world.finish();
    assert_eq!((found.len(), found[0].state), (1, State::Resolved));
}

#[test]
fn what_was_learned_and_counted_survives_a_restart() {
    let mut world = World::with_tables(&[(&t(), 10_000)]);
    for _ in 0..4 {
        world.delete(&t(), 2_000).insert(&t(), 2_000).wait(86_400_000);
    }
    let json = serde_json::to_vec(&world.detector.memory(Lsn::new(1_000_000))).unwrap();
    let (millis, xid) = (world.millis, world.xid);
    let mut world = World::new();
    world.detector.remember(serde_json::from_slice(&json).unwrap());
    (world.millis, world.xid) = (millis, xid);
    world.delete(&t(), 2_000);
    assert_eq!(world.detector.live().get(key_of(&t())), Some(Rows { count: 8_000, exact: true }));
    assert_eq!(world.rules(), []);
}

#[test]
fn an_answer_is_kept_while_more_is_found_and_a_closed_incident_grows_no_more() {
    let mut world = World::with_tables(&[(&t(), 5_000)]);
    world.delete(&t(), 2_000);
    let mut answered = world.found[0].clone();
    let signature = super::incident::Signature { by: "ada".into(), at: at(0), note: None };
    answered.acknowledge(signature.clone()).unwrap();
    world.detector.answered(&answered);
    world.delete(&t(), 3_000).wait(1_000);
    assert_eq!((world.found.len(), world.found[0].state), (1, State::Acknowledged));
    let mut closed = world.found[0].clone();
    closed.resolve(signature).unwrap();
    world.detector.answered(&closed);
    world.insert(&t(), 900).delete(&t(), 900);
    assert_eq!(world.finish().len(), 2);
}

#[test]
fn who_it_was_may_come_to_light_a_moment_later() {
    let mut world = World::with_tables(&[(&t(), 500)]);
    world.session = None;
    world.delete(&t(), 500);
    assert_eq!(world.found[0].notes, ["who did it is not known: nobody saw the session that did it"]);
    world.session = Some(1);
    let mut asked = Vec::new();
    let know = world.who();
    let now = at(world.millis + 200);
    world.detector.ask_again(
        &mut |question| {
            asked.push(question.clone());
            know(question)
        },
        now,
    );
    world.wait(1_000);
    assert_eq!((asked.len(), asked[0].database.as_deref(), asked[0].tables[0].as_str()), (1, Some("shop"), "t"));
    assert_eq!(asked[0].ended, Some(time(0)));
    let incident = &world.found[0];
    assert_eq!((incident.who().unwrap().source, incident.notes.len()), (WhoSource::Activity, 0));
    world.detector.ask_again(&mut |_| panic!("it is known"), now);
}

#[test]
fn row_counts_are_estimates_if_wal_was_missed_since_they_were_kept() {
    let mut world = World::with_tables(&[(&t(), 500)]);
    world.insert(&t(), 10);
    for (begins, exact) in [(150_000, true), (250_000, false)] {
        let memory = world.detector.memory(Lsn::new(200_000));
        let mut detector = Detector::new(Config::default(), TimeZone::UTC, TimelineId::FIRST);
        detector.remember(memory);
        detector.begins_at(Lsn::new(begins));
        assert_eq!(detector.live().get(key_of(&t())), Some(Rows { count: 510, exact }));
    }
}

#[test]
fn a_partition_says_what_it_is_a_part_of() {
    let mut world = World::with_tables(&[(&t(), 500)]);
    world.detector.set_parents([(key_of(&t()), "shop.public.events".to_owned())]);
    world.delete(&t(), 500);
    assert_eq!(world.found[0].tables[0].partition_of.as_deref(), Some("shop.public.events"));
}

#[test]
fn incidents_are_bounded_whatever_happens() {
    let mut world = World::new();
    let all = tables(1_500);
    world.seed(&all.iter().map(|table| (table, 10)).collect::<Vec<_>>(), true);
    let ddl = all.iter().map(|table| event_of(DdlKind::DropTrigger, Some(table), "protect")).collect();
    world.commit(all.iter().map(|table| tally(table, deleted(10))).collect(), ddl);
    for _ in 0..300 {
        world.delete(&all[0], 0).insert(&all[0], 7).delete(&all[0], 7);
    }
    let found = world.finish();
    assert_eq!(found.len(), 1);
    let incident = &found[0];
    assert_eq!((incident.tables.len(), incident.tables_more), (1_000, 500));
    assert_eq!((incident.ddl.len(), incident.ddl_more), (1_000, 500));
    assert!(incident.findings.len() <= 1_000 && incident.transactions.len() <= 200 && incident.moments.len() <= 1_000);
    let json = serde_json::to_vec(incident).unwrap();
    assert!(json.len() < 2 << 20, "{} bytes", json.len());
}

#[test]
fn oids_of_other_databases_are_other_tables() {
    let here = t();
    let there =
        Arc::new(Relation { database: Oid(6), database_name: "other".into(), ..relation("public", "t", 20_000) });
    let mut world = World::with_tables(&[(&here, 500), (&there, 500)]);
    world.session = None;
    world.delete(&here, 500).delete(&there, 500);
    assert_eq!(world.finish().len(), 2);
}

#[test]
fn times_before_the_server_began_to_count_do_no_harm() {
    let mut world = World::with_tables(&[(&t(), 500)]);
    for micros in [i64::MIN, i64::MAX, 0] {
        let odd = Transaction {
            time: PgTime::from_micros(micros),
            ..transaction(900, 0, vec![tally(&t(), deleted(100))], vec![])
        };
        world.end(&odd);
    }
    assert!(!world.finish().is_empty());
}
