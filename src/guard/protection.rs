//! What protects tables (triggers, event triggers, rules, policies), and what became of it between two looks.
//!
//! The comparison is pure. It sees what no event trigger sees, because that went first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::Client;

use crate::capture::{self, CaptureError};
use crate::detect::DdlKind;
use crate::pg::Oid;

/// What protects the tables of a database.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Protection {
    /// The database's OID.
    pub database: Oid,
    /// The database's name.
    pub database_name: String,
    /// Everything that protects, and whether it is in force.
    pub items: BTreeMap<Item, bool>,
    /// There was more than [`ITEMS_MAX`]: what is missing from `items` may be there.
    pub is_cut: bool,
}

/// Something that protects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// What it is.
    pub kind: ItemKind,
    /// The table; 0 for an event trigger.
    pub table: Oid,
    /// The table's name with its schema; empty for an event trigger.
    pub table_name: String,
    /// Its own name.
    pub name: String,
}

/// What protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ItemKind {
    /// A trigger of a table.
    Trigger,
    /// An event trigger.
    EventTrigger,
    /// A rule of a table.
    Rule,
    /// A row security policy.
    Policy,
    /// Row security of a table as such.
    RowSecurity,
}

/// Something that protected and no longer does.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Loss {
    /// The database's OID.
    pub database: Oid,
    /// The database's name.
    pub database_name: String,
    /// What was done, as the WAL would tell it.
    pub kind: DdlKind,
    /// What it was.
    pub item: ItemKind,
    /// The table's OID; 0 for an event trigger.
    pub table: Oid,
    /// The table's name with its schema; empty for an event trigger.
    pub table_name: String,
    /// Its name.
    pub name: String,
}

impl Loss {
    /// In words: `trigger keep on public.users was dropped`.
    pub fn text(&self) -> String {
        let kind = match self.item {
            ItemKind::Trigger => "trigger",
            ItemKind::EventTrigger => "event trigger",
            ItemKind::Rule => "rule",
            ItemKind::Policy => "policy",
            ItemKind::RowSecurity => "row security",
        };
        let name = if self.item == ItemKind::RowSecurity { String::new() } else { format!(" {}", self.name) };
        let table = if self.table_name.is_empty() { String::new() } else { format!(" on {}", self.table_name) };
        let what = match self.kind {
            DdlKind::DisableTrigger | DdlKind::DisableEventTrigger => "was disabled",
            _ if self.item == ItemKind::RowSecurity => "was disabled",
            _ => "was dropped or disabled",
        };
        format!("{kind}{name}{table} in database {} {what}", self.database_name)
    }
}

/// Losses that wait for whoever asks.
const LOSSES_MAX: usize = 1_024;

/// What was found lost, for whoever makes incidents of it; clones share it.
#[derive(Clone, Debug)]
pub struct Losses(watch::Sender<VecDeque<(u64, Loss)>>);

impl Default for Losses {
    fn default() -> Self {
        Self(watch::Sender::new(VecDeque::new()))
    }
}

impl Losses {
    /// Adds what was found in one look. The oldest make room for it.
    pub fn add(&self, losses: Vec<Loss>) {
        if losses.is_empty() {
            return;
        }
        self.0.send_modify(|all| {
            for loss in losses {
                let number = all.back().map_or(1, |(number, _)| number + 1);
                if all.len() == LOSSES_MAX {
                    all.pop_front();
                }
                all.push_back((number, loss));
            }
        });
    }

    /// All that are known, numbered from 1, and each change of that.
    pub fn subscribe(&self) -> watch::Receiver<VecDeque<(u64, Loss)>> {
        self.0.subscribe()
    }
}

/// Items of a database that are looked at.
pub const ITEMS_MAX: usize = 50_000;

/// What a server may take.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Triggers that belong to constraints are internal: they go with the constraint, which is no protection against deletes.
const LOOK: &str = "\
    SELECT 'T', t.tgrelid, t.tgname::text, t.tgenabled <> 'D' FROM pg_trigger t WHERE NOT t.tgisinternal AND t.tgparentid = 0 \
    UNION ALL SELECT 'E', 0::oid, e.evtname::text, e.evtenabled <> 'D' FROM pg_event_trigger e \
    UNION ALL SELECT 'R', r.ev_class, r.rulename::text, r.ev_enabled <> 'D' FROM pg_rewrite r \
      JOIN pg_class c ON c.oid = r.ev_class WHERE c.relkind IN ('r', 'p') AND r.rulename <> '_RETURN' \
    UNION ALL SELECT 'P', p.polrelid, p.polname::text, true FROM pg_policy p \
    UNION ALL SELECT 'S', c.oid, 'row security', true FROM pg_class c WHERE c.relrowsecurity";

impl Protection {
    /// Looks at the database that `client` is connected to. Every role may.
    ///
    /// # Errors
    /// If the server does not answer.
    pub async fn look(client: &Client) -> Result<Self, CaptureError> {
        let sql = |error| capture::sql_error("the server", error);
        let ask = async {
            let row = client
                .query_one("SELECT oid, datname::text FROM pg_database WHERE datname = current_database()", &[])
                .await
                .map_err(sql)?;
            let (database, database_name) = (Oid(row.try_get(0).map_err(sql)?), row.try_get(1).map_err(sql)?);
            let query = format!(
                "SELECT i.kind, i.oid, coalesce(n.nspname || '.' || c.relname, ''), i.name, i.ok \
                 FROM ({LOOK}) AS i (kind, oid, name, ok) LEFT JOIN pg_class c ON c.oid = i.oid \
                 LEFT JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE n.nspname IS NULL OR n.nspname !~ '^pg_(temp|toast_temp)_' ORDER BY i.oid LIMIT {}",
                ITEMS_MAX + 1
            );
            let rows = client.query(&query, &[]).await.map_err(sql)?;
            let mut found = Self { database, database_name, is_cut: rows.len() > ITEMS_MAX, ..Self::default() };
            for row in rows.iter().take(ITEMS_MAX) {
                let kind = match row.try_get::<_, &str>(0).map_err(sql)? {
                    "T" => ItemKind::Trigger,
                    "E" => ItemKind::EventTrigger,
                    "R" => ItemKind::Rule,
                    "P" => ItemKind::Policy,
                    _ => ItemKind::RowSecurity,
                };
                let (table, name) = (Oid(row.try_get(1).map_err(sql)?), row.try_get(3).map_err(sql)?);
                let item = Item { kind, table, table_name: row.try_get(2).map_err(sql)?, name };
                found.items.insert(item, row.try_get(4).map_err(sql)?);
            }
            Ok(found)
        };
        tokio::time::timeout(ANSWER_MAX, ask).await.unwrap_or_else(|_| {
            let what = format!("the server did not answer within {} s", ANSWER_MAX.as_secs());
            Err(CaptureError::Unreachable { what, source: None })
        })
    }

    /// Which of these tables are there.
    ///
    /// # Errors
    /// If the server does not answer.
    pub async fn tables_left(client: &Client, tables: &[Oid]) -> Result<BTreeSet<Oid>, CaptureError> {
        let numbers: Vec<u32> = tables.iter().map(|oid| oid.0).collect();
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&numbers];
        let ask = client.query("SELECT oid FROM pg_class WHERE oid = ANY ($1)", &parameters);
        let rows = tokio::time::timeout(ANSWER_MAX, ask).await.map_err(|_| CaptureError::Unreachable {
            what: format!("the server did not answer within {} s", ANSWER_MAX.as_secs()),
            source: None,
        })?;
        let rows = rows.map_err(|error| capture::sql_error("the server", error))?;
        Ok(rows.iter().map(|row| Oid(row.get(0))).collect())
    }

    /// How many of a kind are in force, and how many there are.
    pub fn count(&self, kind: ItemKind) -> (usize, usize) {
        let of_kind = || self.items.iter().filter(|(item, _)| item.kind == kind);
        (of_kind().filter(|(_, in_force)| **in_force).count(), of_kind().count())
    }

    /// Tables of what was in force `before` and is not now.
    pub fn tables_lost_since(&self, before: &Self) -> BTreeSet<Oid> {
        self.lost_since(before).map(|(item, _)| item.table).filter(|table| *table != Oid(0)).collect()
    }

    /// What was in force `before` and is not now, of the tables that are left; what went with its table did not leave that
    /// unprotected. A table that was renamed has all it had.
    pub fn losses_since(&self, before: &Self, tables_left: &BTreeSet<Oid>) -> Vec<Loss> {
        let is_left = |table: Oid| table == Oid(0) || tables_left.contains(&table);
        let lost = self.lost_since(before).filter(|(item, _)| is_left(item.table));
        lost.map(|(item, is_there)| Loss {
            database: self.database,
            database_name: self.database_name.clone(),
            kind: match (item.kind, is_there) {
                (ItemKind::Trigger, true) => DdlKind::DisableTrigger,
                (ItemKind::Trigger, false) => DdlKind::DropTrigger,
                (ItemKind::EventTrigger, true) => DdlKind::DisableEventTrigger,
                (ItemKind::EventTrigger, false) => DdlKind::DropEventTrigger,
                (ItemKind::Rule, _) => DdlKind::DropRule,
                (ItemKind::Policy | ItemKind::RowSecurity, _) => DdlKind::DropPolicy,
            },
            item: item.kind,
            table: item.table,
            table_name: item.table_name.clone(),
            name: item.name.clone(),
        })
        .collect()
    }

    /// Items that were in force and are not, and whether they are there at all.
    fn lost_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = (&'a Item, bool)> {
        let now: BTreeMap<_, bool> = self
            .items
            .iter()
            .map(|(item, in_force)| ((item.kind, item.table, item.name.as_str()), *in_force))
            .collect();
        let is_same = self.database == before.database && !self.is_cut;
        before.items.iter().filter(move |(_, in_force)| is_same && **in_force).filter_map(move |(item, _)| {
            match now.get(&(item.kind, item.table, item.name.as_str())) {
                Some(true) => None,
                Some(false) => Some((item, true)),
                None => Some((item, false)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(kind: ItemKind, table: u32, name: &str) -> Item {
        let table_name = if table == 0 { String::new() } else { format!("public.t{table}") };
        Item { kind, table: Oid(table), table_name, name: name.to_owned() }
    }

    fn protection(items: &[(ItemKind, u32, &str, bool)]) -> Protection {
        let items = items.iter().map(|(kind, table, name, ok)| (item(*kind, *table, name), *ok)).collect();
        Protection { database: Oid(5), database_name: "shop".to_owned(), items, is_cut: false }
    }

    fn losses(before: &Protection, now: &Protection, left: &[u32]) -> Vec<(DdlKind, String)> {
        let left = left.iter().map(|oid| Oid(*oid)).collect();
        now.losses_since(before, &left).into_iter().map(|loss| (loss.kind, loss.name)).collect()
    }

    #[test]
    fn what_was_dropped_or_disabled_is_told_and_what_came_is_not() {
        use ItemKind::{EventTrigger, Policy, Rule, Trigger};
        let before = protection(&[
            (Trigger, 1, "keep", true),
            (Trigger, 2, "keep", true),
            (Trigger, 3, "off", false),
            (EventTrigger, 0, "no_drop", true),
            (EventTrigger, 0, "no_truncate", true),
            (Policy, 1, "own_rows", true),
            (Rule, 1, "no_delete", true),
        ]);
        let now = protection(&[
            (Trigger, 2, "keep", false),
            (Trigger, 3, "new", true),
            (EventTrigger, 0, "no_truncate", false),
        ]);
        let expected = [
            (DdlKind::DropTrigger, "keep"),
            (DdlKind::DisableTrigger, "keep"),
            (DdlKind::DropEventTrigger, "no_drop"),
            (DdlKind::DisableEventTrigger, "no_truncate"),
            (DdlKind::DropRule, "no_delete"),
            (DdlKind::DropPolicy, "own_rows"),
        ];
        let found = losses(&before, &now, &[1, 2, 3]);
        assert_eq!(found, expected.map(|(kind, name)| (kind, name.to_owned())));
        assert!(losses(&now, &now, &[]).is_empty());
    }

    #[test]
    fn what_goes_with_its_table_is_no_loss_of_protection() {
        let before = protection(&[(ItemKind::Trigger, 1, "keep", true), (ItemKind::Trigger, 2, "keep", true)]);
        let now = protection(&[]);
        assert_eq!(now.tables_lost_since(&before), BTreeSet::from([Oid(1), Oid(2)]));
        assert_eq!(losses(&before, &now, &[2]).len(), 1);
    }

    #[test]
    fn a_table_that_was_renamed_has_lost_nothing() {
        let before = protection(&[(ItemKind::Trigger, 1, "keep", true)]);
        let mut now = protection(&[]);
        now.items.insert(Item { table_name: "public.other".to_owned(), ..item(ItemKind::Trigger, 1, "keep") }, true);
        assert!(losses(&before, &now, &[1]).is_empty());
    }

    #[test]
    fn a_look_that_did_not_see_all_tells_nothing() {
        let before = protection(&[(ItemKind::Trigger, 1, "keep", true)]);
        let now = Protection { is_cut: true, ..protection(&[]) };
        assert!(losses(&before, &now, &[1]).is_empty());
    }
}
