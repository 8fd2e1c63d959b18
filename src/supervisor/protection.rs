//! The loop that counts what protects tables, and tells what is gone.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::capture::{self, CaptureError, ConnInfo};
use crate::guard::Losses;
use crate::guard::install;
use crate::guard::protection::{ItemKind, Loss, Protection};
use crate::guard::script;
use crate::pg::Oid;
use crate::serve::status::{Board, InForce, ProtectedDatabase, Trouble};

/// Databases that are looked at; each takes a connection of some milliseconds.
const DATABASES_MAX: i64 = 64;

/// What a person reads of an alarm.
const TOLD_MAX: usize = 3;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) conninfo: ConnInfo,
    /// How often. The WAL tells at once; this also sees what the WAL's reader cannot name, and what is there at all.
    pub(super) interval: Duration,
    pub(super) guard: script::Config,
    pub(super) losses: Losses,
    pub(super) board: Board,
}

/// What is known of a database.
#[derive(Debug, Default)]
struct Known {
    last: Protection,
    /// What is gone and did not come back, by the thing that it was.
    outstanding: BTreeMap<(ItemKind, Oid, String), Loss>,
    had_guard: bool,
}

impl Watcher {
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut known: BTreeMap<Oid, Known> = BTreeMap::new();
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let Some(looked) = stop.run_until_cancelled(self.look(&mut known)).await else { break };
            match looked {
                Ok(found) => self.board.update(|s| {
                    s.protection.databases = found;
                    s.protection.trouble = None;
                }),
                Err(error) => {
                    let (text, hint) = (Chain(&error).to_string(), error.hint());
                    tracing::debug!("failed to look at what protects tables: {text}");
                    self.board.update(|s| {
                        let before = s.protection.trouble.as_ref();
                        s.protection.trouble = Some(Trouble::again(before, Timestamp::now(), text, hint));
                    });
                }
            }
            self.alarm(&known);
        }
        Ok(())
    }

    /// Looks at every database that we may connect to.
    async fn look(&self, known: &mut BTreeMap<Oid, Known>) -> Result<Vec<ProtectedDatabase>, CaptureError> {
        let client = capture::connect_sql(&self.conninfo).await?;
        let query = "SELECT oid, datname::text FROM pg_database WHERE datallowconn AND NOT datistemplate \
                     AND has_database_privilege(oid, 'CONNECT') ORDER BY oid LIMIT $1";
        let sql = |error| capture::sql_error("the server", error);
        let rows = client.query(query, &[&DATABASES_MAX]).await.map_err(sql)?;
        drop(client);
        let databases: Vec<(Oid, String)> = rows.iter().map(|row| (Oid(row.get(0)), row.get(1))).collect();
        known.retain(|oid, _| databases.iter().any(|(database, _)| database == oid));
        let mut found = Vec::new();
        for (oid, name) in databases {
            match self.look_at(&name, known.entry(oid).or_default()).await {
                Ok(status) => found.push(status),
                // pg_hba.conf may let us into one database only, and one may be dropped meanwhile: the others matter too.
                Err(error) => {
                    tracing::debug!(database = name, "failed to look at what protects tables: {}", Chain(&error))
                }
            }
        }
        Ok(found)
    }

    async fn look_at(&self, database: &str, known: &mut Known) -> Result<ProtectedDatabase, CaptureError> {
        let client = capture::connect_sql(&self.conninfo.clone().with_dbname(database)).await?;
        let now = Protection::look(&client).await?;
        let suspects: Vec<Oid> = now.tables_lost_since(&known.last).into_iter().collect();
        let left = match suspects.as_slice() {
            [] => Default::default(),
            suspects => Protection::tables_left(&client, suspects).await?,
        };
        let losses = now.losses_since(&known.last, &left);
        for loss in &losses {
            tracing::warn!(database, "{}", loss.text());
            known.outstanding.insert((loss.item, loss.table, loss.name.clone()), loss.clone());
        }
        known.outstanding.retain(|(kind, table, name), _| {
            !now.items
                .iter()
                .any(|(item, in_force)| *in_force && item.kind == *kind && item.table == *table && item.name == *name)
        });
        self.losses.add(losses);
        let report = install::inspect(&client, &self.guard).await?;
        known.had_guard |= report.installed;
        let count = |kind| {
            let (in_force, there) = now.count(kind);
            InForce { in_force: in_force as u64, there: there as u64 }
        };
        let status = ProtectedDatabase {
            database: database.to_owned(),
            at: Some(Timestamp::now()),
            triggers: count(ItemKind::Trigger),
            event_triggers: count(ItemKind::EventTrigger),
            rules: count(ItemKind::Rule),
            policies: count(ItemKind::Policy),
            guard: known.had_guard.then(|| InForce {
                in_force: report.triggers_ok + report.event_triggers_ok,
                there: report.triggers + report.event_triggers,
            }),
            guard_problems: if known.had_guard {
                report.problems.iter().map(|p| format!("{} {} {}", p.kind, p.name, p.problem)).take(20).collect()
            } else {
                Vec::new()
            },
        };
        if !now.is_cut {
            known.last = now;
        }
        Ok(status)
    }

    fn alarm(&self, known: &BTreeMap<Oid, Known>) {
        let all: Vec<&Loss> = known.values().flat_map(|known| known.outstanding.values()).collect();
        if all.is_empty() {
            self.board.clear("protection");
            return;
        }
        let mut text: Vec<String> = all.iter().take(TOLD_MAX).map(|loss| loss.text()).collect();
        if all.len() > TOLD_MAX {
            text.push(format!("and {} more", all.len() - TOLD_MAX));
        }
        let hint = "find out who did it and why before rows go too; put it back, or restart the agent if it is meant";
        self.board.raise("protection", text.join("; "), Some(hint.to_owned()));
    }
}
