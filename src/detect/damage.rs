//! What a transaction does to each table: rows before and after, emptied, dropped, replaced.

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};

use super::incident::{Rows, TableDamage, grouped};
use super::live_rows::{LiveRows, RowStep, TableKey, key_of};
use super::{DdlEvent, DdlKind, Persistence, Relation, RelationKind, Tally};
use crate::decode::change::RowCounts;
use crate::pg::Lsn;

/// What a transaction, open or ended, did so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'a> {
    pub(super) tallies: &'a [Tally],
    pub(super) ddl: &'a [DdlEvent],
    pub(super) is_complete: bool,
    /// Where it ends; of an open one how far the WAL was read.
    pub(super) lsn: Lsn,
}

/// What it does to one table.
#[derive(Clone, Debug)]
pub(super) struct Damage {
    pub(super) relation: Arc<Relation>,
    pub(super) counts: RowCounts,
    pub(super) step: RowStep,
    pub(super) before: Option<Rows>,
    pub(super) after: Option<Rows>,
    pub(super) truncated: bool,
    /// The table that has its name now, and that one's rows.
    pub(super) replaced_by: Option<(TableKey, Option<Rows>)>,
    /// The full name that the other took, if it was given away before this table was dropped under another.
    pub(super) formerly: Option<String>,
}

impl Damage {
    pub(super) fn key(&self) -> TableKey {
        key_of(&self.relation)
    }

    /// Rows that are gone.
    pub(super) fn lost(&self) -> u64 {
        let after = self.replaced_by.map_or(self.after, |(_, rows)| rows);
        match (self.before, after) {
            (Some(before), Some(after)) => before.count.saturating_sub(after.count),
            (Some(before), None) => before.count,
            (None, _) => self.counts.deleted.saturating_sub(self.counts.inserted),
        }
    }

    /// It had rows, and has none.
    pub(super) fn is_emptied(&self) -> bool {
        let after = self.replaced_by.map_or(self.after, |(_, rows)| rows);
        let had = self.before.map_or(self.counts.deleted, |rows| rows.count);
        after.is_some_and(|after| after.count == 0) && had > 0
    }

    /// Its name; both, if it was renamed before it was dropped.
    pub(super) fn known_as(&self) -> String {
        let name = self.relation.full_name();
        self.formerly.as_ref().map_or(name.clone(), |formerly| format!("{formerly} (renamed to {name})"))
    }

    /// `56 of about 1,200 rows`.
    pub(super) fn of_rows(lost: u64, before: Option<Rows>) -> String {
        match before {
            Some(before) if before.count >= lost => format!("{} of {before} rows", grouped(lost)),
            _ => format!("{} rows", grouped(lost)),
        }
    }

    /// As an incident tells it.
    pub(super) fn told(&self) -> TableDamage {
        TableDamage {
            name: self.relation.full_name(),
            relation: Some((*self.relation).clone()),
            before: self.before,
            after: self.replaced_by.map_or(self.after, |(_, rows)| rows),
            inserted: self.counts.inserted,
            updated: self.counts.updated.saturating_add(self.counts.moved),
            deleted: self.counts.deleted,
            truncated: self.truncated,
            dropped: self.step.dropped,
            replaced: self.replaced_by.is_some(),
            formerly: self.formerly.clone(),
            partition_of: None,
        }
    }
}

/// True for what can lose rows of its own, logged ones.
fn can_lose_rows(relation: &Relation) -> bool {
    relation.kind == RelationKind::Table && relation.persistence == Persistence::Permanent
}

/// Whose rows those of a file are that nobody knows.
fn unknown(tally: &Tally) -> Arc<Relation> {
    Arc::new(Relation {
        database: tally.file.database,
        oid: crate::pg::Oid(tally.file.number),
        database_name: String::new(),
        schema: String::new(),
        name: String::new(),
        kind: RelationKind::Table,
        persistence: Persistence::Permanent,
        owner: None,
    })
}

/// What `work` does to each table, in the order in which it touched them; those without rows or definitions touched are
/// not among them.
pub(super) fn damages(work: &Work<'_>, live: &LiveRows) -> Vec<Damage> {
    let mut found: Vec<Damage> = Vec::new();
    let mut places: HashMap<TableKey, usize> = HashMap::new();
    let mut last_file: HashMap<TableKey, RowCounts> = HashMap::new();
    let mut of = |relation: &Arc<Relation>, found: &mut Vec<Damage>| {
        *places.entry(key_of(relation)).or_insert_with(|| {
            found.push(Damage {
                relation: relation.clone(),
                counts: RowCounts::default(),
                step: RowStep { is_complete: work.is_complete, ..RowStep::default() },
                before: None,
                after: None,
                truncated: false,
                replaced_by: None,
                formerly: None,
            });
            found.len() - 1
        })
    };
    let mut files: HashMap<TableKey, u32> = HashMap::new();
    for tally in work.tallies {
        let relation = tally.relation.clone().unwrap_or_else(|| unknown(tally));
        if !can_lose_rows(&relation) {
            continue;
        }
        let place = of(&relation, &mut found);
        if let Some(damage) = found.get_mut(place) {
            damage.counts += tally.counts;
            *files.entry(key_of(&relation)).or_default() += 1;
            last_file.insert(key_of(&relation), tally.counts);
        }
    }
    for event in work.ddl {
        let Some(relation) = event.relation.as_ref().filter(|relation| can_lose_rows(relation)) else { continue };
        let is_renamed = event.kind == DdlKind::Alter && event.object.is_some();
        if !is_renamed && !matches!(event.kind, DdlKind::Truncate | DdlKind::DropTable | DdlKind::Create) {
            continue;
        }
        let place = of(relation, &mut found);
        let Some(damage) = found.get_mut(place) else { continue };
        match event.kind {
            DdlKind::Create => damage.step.created = true,
            DdlKind::DropTable => damage.step.dropped = true,
            DdlKind::Truncate => {
                damage.truncated = true;
                // What was written behind the TRUNCATE lies in another file.
                let key = key_of(relation);
                let last = last_file.get(&key).copied().unwrap_or_default();
                let is_sure = files.get(&key).is_none_or(|files| *files > 1 || last.deleted == 0);
                let count = last.inserted.saturating_sub(last.deleted);
                damage.step.truncated_to = Some(Rows { count, exact: is_sure && work.is_complete });
            }
            _ => {}
        }
    }
    for damage in &mut found {
        damage.step.inserted = damage.counts.inserted;
        damage.step.deleted = damage.counts.deleted.saturating_add(damage.counts.moved);
        damage.before = live.before(damage.key(), work.lsn, &damage.step);
        damage.after = LiveRows::after(damage.before, &damage.step);
    }
    find_replacements(work, &mut found);
    found
}

/// A name that another table took.
fn find_replacements(work: &Work<'_>, found: &mut [Damage]) {
    for event in work.ddl.iter().filter(|event| event.kind == DdlKind::Alter) {
        let (Some(new), Some(_)) = (&event.relation, &event.object) else { continue };
        let Some(taken_over) =
            found.iter().find(|damage| damage.key() == key_of(new)).map(|damage| (damage.key(), damage.after))
        else {
            continue;
        };
        let is_same_name = |relation: &Relation| relation.schema == new.schema && relation.name == new.name;
        let was_called = |damage: &Damage| {
            damage.step.dropped && is_same_name(&damage.relation)
                || work.ddl.iter().any(|other| {
                    let former = other.object.as_deref();
                    other.kind == DdlKind::Alter
                        && other.relation.as_ref().is_some_and(|other| key_of(other) == damage.key())
                        && former == Some(former_name(&new.schema, &new.name).as_str())
                })
        };
        let is_old = |damage: &&mut Damage| damage.key() != taken_over.0 && was_called(damage);
        if let Some(old) = found.iter_mut().find(is_old) {
            old.replaced_by = Some(taken_over);
            let known_as =
                Relation { schema: new.schema.clone(), name: new.name.clone(), ..(*old.relation).clone() }.full_name();
            old.formerly = (known_as != old.relation.full_name()).then_some(known_as);
        }
    }
}

/// A name as an event of a rename tells the former one.
pub(super) fn former_name(schema: &str, name: &str) -> String {
    if schema.is_empty() { name.to_owned() } else { format!("{schema}.{name}") }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn exact(count: u64) -> Option<Rows> {
        Some(Rows { count, exact: true })
    }

    fn live(rows: &[(u32, u64)]) -> LiveRows {
        let mut live = LiveRows::new();
        for (oid, count) in rows {
            live.seed((crate::pg::Oid(5), crate::pg::Oid(*oid)), Rows { count: *count, exact: true }, Lsn::new(1));
        }
        live
    }

    fn of(tallies: &[Tally], ddl: &[DdlEvent], live: &LiveRows) -> Vec<Damage> {
        damages(&Work { tallies, ddl, is_complete: true, lsn: Lsn::new(100) }, live)
    }

    #[test]
    fn a_table_in_two_files_is_one_table() {
        let t = table("t", 20_000);
        let found = of(
            &[tally(&t, deleted(3)), tally_in(&t, 30_000, inserted(7))],
            &[event(DdlKind::Truncate, &t)],
            &live(&[(20_000, 50)]),
        );
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].before, found[0].after, found[0].lost()), (exact(50), exact(7), 43));
    }

    #[test]
    fn a_table_that_takes_anothers_name_is_weighed_against_it() {
        let (old, new) = (table("t", 20_000), table("t", 20_001));
        let renamed = event_of(DdlKind::Alter, Some(&new), "public.t_new");
        let made = event(DdlKind::Create, &new);
        let dropped = event(DdlKind::DropTable, &old);
        let rows = live(&[(20_000, 50)]);
        let found = of(&[tally(&new, inserted(7))], &[made.clone(), dropped, renamed.clone()], &rows);
        let swapped = found.iter().find(|damage| damage.relation.oid.0 == 20_000).unwrap();
        assert_eq!((swapped.lost(), swapped.told().after, swapped.told().replaced), (43, exact(7), true));
        assert_eq!(swapped.told().formerly, None, "it was dropped under its own name");

        let away = table("t_old", 20_000);
        let away = event_of(DdlKind::Alter, Some(&away), "public.t");
        let found = of(&[], &[made, away, renamed], &rows);
        let swapped = found.iter().find(|damage| damage.relation.oid.0 == 20_000).unwrap();
        assert!(swapped.is_emptied() && swapped.lost() == 50, "{swapped:?}");
        let told = swapped.told();
        assert_eq!((told.name.as_str(), told.formerly.as_deref()), ("shop.public.t_old", Some("shop.public.t")));
    }

    #[test]
    fn what_is_not_logged_or_no_table_is_no_damage() {
        let mut relation = relation("public", "t", 20_000);
        relation.persistence = Persistence::Unlogged;
        let unlogged = Arc::new(relation.clone());
        relation.persistence = Persistence::Permanent;
        relation.kind = RelationKind::MaterializedView;
        let view = Arc::new(relation);
        let tallies = [tally(&unlogged, deleted(100)), tally(&view, deleted(100))];
        assert!(of(&tallies, &[event(DdlKind::Truncate, &unlogged)], &LiveRows::new()).is_empty());
    }

    #[test]
    fn rows_of_a_file_that_nobody_knows_are_told_by_its_number() {
        let t = table("t", 20_000);
        let tally = Tally { relation: None, ..tally(&t, deleted(9)) };
        let found = of(&[tally], &[], &LiveRows::new());
        assert_eq!((found[0].lost(), found[0].told().name.as_str()), (9, "relation 20000 of database 5"));
    }
}
