//! Changes of catalogs -> what a transaction did to definitions, and what its guard says of it.
//!
//! A statement leaves many rows behind: to drop a table deletes rows of a dozen catalogs, to rewrite one makes another table
//! and drops it. Each row alone says little; at the end of the transaction what is implied by something larger is left out.

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};

use super::names::{CatalogChange, CatalogChangeKind, Names};
use super::{DdlEvent, DdlKind, Relation, RelationKind, Running};
use crate::decode::catalog::{CatalogRow, ClassRow};
use crate::decode::change::FIRST_NORMAL_OID;
use crate::decode::rmgr::xact::TransactionEnd;
use crate::pg::{Lsn, Oid, Xid};

/// Events of all open transactions together: a schema of ten thousand tables with as many triggers dropped at once, and
/// more than any person reads. What is beyond is counted.
const EVENTS_MAX: usize = 50_000;

/// Transactions and subtransactions that touch catalogs, open at one time; and relations, or triggers, that one of them
/// makes. What is beyond makes what its transaction is said to have done incomplete.
const OPEN_MAX: usize = 65_536;
const MADE_MAX: usize = 65_536;

/// What open transactions did to definitions.
#[derive(Debug, Default)]
pub struct Definitions {
    open: HashMap<u32, Work>,
    events: usize,
    message_bytes: usize,
    /// Something found no room since nothing was open last.
    overflowed: bool,
}

/// What a transaction did that has ended.
#[derive(Debug, Default)]
pub struct Done {
    /// In WAL order.
    pub events: Vec<DdlEvent>,
    /// Events that found no room.
    pub left_out: u64,
    /// Messages for walguard.
    pub messages: Vec<Arc<[u8]>>,
}

/// What one transaction or subtransaction did.
#[derive(Debug, Default)]
struct Work {
    events: Vec<DdlEvent>,
    /// Relations that it made.
    made: HashSet<(Oid, Oid)>,
    /// Triggers that it made, or made anew: of which table, and called what.
    triggers: HashSet<(Oid, Oid, String)>,
    left_out: u64,
    messages: Vec<Arc<[u8]>>,
}

/// Messages with this prefix (`pg_logical_emit_message`) are for walguard, if they are part of a transaction.
pub const MESSAGE_PREFIX: &[u8] = b"walguard";

/// Bytes of messages of all open transactions together, and of one message: the guard cuts its own far below that.
const MESSAGES_BYTES_MAX: usize = 4 << 20;
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Messages of one transaction: the guard writes one a statement, and the first ones say who it is.
const MESSAGES_EACH_MAX: usize = 64;

/// The schema of TOAST tables and their indexes.
const TOAST_SCHEMA: Oid = Oid(99);

/// A trigger, rule or event trigger does not fire in an ordinary session (Postgres: `tgenabled`, `ev_enabled` and
/// `evtenabled`: `D` is disabled, `R` fires on replicas only).
const fn is_off(enabled: u8) -> bool {
    matches!(enabled, b'D' | b'R')
}

impl Definitions {
    /// Nothing is open.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a change of a catalog that is part of a transaction. `names` has seen it already.
    pub fn see(&mut self, xid: Xid, lsn: Lsn, change: &CatalogChange, names: &Names) {
        let Some(work) = self.work(xid) else { return };
        let Some((kind, relation, object)) = work.recognise(change, names) else { return };
        let Some(work) = self.open.get_mut(&xid.get()) else { return };
        if self.events >= EVENTS_MAX {
            work.left_out += 1;
            return;
        }
        self.events += 1;
        let database = match (&change.before, kind) {
            (Some(CatalogRow::Database { oid, .. }), DdlKind::DropDatabase) => *oid,
            _ => change.database,
        };
        work.events.push(DdlEvent { kind, lsn, database, relation, object });
    }

    /// Takes something that a transaction did, where it is told in so many words.
    pub(super) fn note(&mut self, xid: Xid, event: DdlEvent) {
        let is_full = self.events >= EVENTS_MAX;
        let Some(work) = self.work(xid) else { return };
        if is_full {
            work.left_out += 1;
            return;
        }
        work.events.push(event);
        self.events += 1;
    }

    /// Takes a message for walguard.
    pub fn see_message(&mut self, xid: Xid, content: &[u8]) {
        let room = MESSAGES_BYTES_MAX - self.message_bytes;
        let Some(work) = self.work(xid) else { return };
        if content.len() > MESSAGE_BYTES_MAX.min(room) || work.messages.len() >= MESSAGES_EACH_MAX {
            return;
        }
        work.messages.push(content.into());
        self.message_bytes += content.len();
    }

    /// A file of a relation is emptied in place, which the server does where the transaction itself made the file: by a
    /// `TRUNCATE` behind a statement that wrote the table anew.
    pub(super) fn see_emptied(&mut self, xid: Xid, lsn: Lsn, relation: Arc<Relation>) {
        if relation.kind == RelationKind::Table {
            let database = relation.database;
            self.note(xid, DdlEvent { kind: DdlKind::Truncate, lsn, database, relation: Some(relation), object: None });
        }
    }

    /// What a transaction did so far; `None` if there is no room for one more.
    fn work(&mut self, xid: Xid) -> Option<&mut Work> {
        if self.open.len() >= OPEN_MAX && !self.open.contains_key(&xid.get()) {
            self.overflowed = true;
            return None;
        }
        Some(self.open.entry(xid.get()).or_default())
    }

    /// Messages for walguard of an open transaction or subtransaction.
    pub fn messages(&self, xid: Xid) -> &[Arc<[u8]>] {
        self.open.get(&xid.get()).map_or(&[], |work| &work.messages)
    }

    /// What an open transaction or subtransaction did so far, in WAL order; of what is implied by something larger too.
    pub fn open(&self, xid: Xid) -> &[DdlEvent] {
        self.open.get(&xid.get()).map_or(&[], |work| &work.events)
    }

    /// The open transactions and subtransactions that did something, in no order.
    pub fn transactions(&self) -> impl Iterator<Item = (Xid, &[DdlEvent])> {
        let done = self.open.iter().filter(|(_, work)| !work.events.is_empty());
        done.filter_map(|(xid, work)| Some((Xid::new(*xid)?, work.events.as_slice())))
    }

    /// A transaction ends. Gives what it did, of an abort what it tried.
    pub fn end(&mut self, end: &TransactionEnd<'_>) -> Done {
        if self.open.is_empty() {
            return Done::default();
        }
        let mut all = Work::default();
        for xid in end.xid.into_iter().chain(end.subxacts()) {
            if let Some(work) = self.remove(xid) {
                all.events.extend(work.events);
                all.made.extend(work.made);
                all.triggers.extend(work.triggers);
                all.left_out += work.left_out;
                all.messages.extend(work.messages);
            }
        }
        all.events.sort_by_key(|event| event.lsn);
        all.left_out += u64::from(self.overflowed);
        self.overflowed &= !self.open.is_empty();
        Done { events: all.summary(), left_out: all.left_out, messages: all.messages }
    }

    /// The transactions that are open: others never end.
    pub fn see_running(&mut self, running: &Running) {
        let open = self.open.keys().copied().filter_map(Xid::new);
        for xid in open.filter(|xid| running.is_gone(*xid)).collect::<Vec<_>>() {
            self.remove(xid);
        }
    }

    fn remove(&mut self, xid: Xid) -> Option<Work> {
        let work = self.open.remove(&xid.get())?;
        self.events -= work.events.len();
        self.message_bytes -= work.messages.iter().map(|message| message.len()).sum::<usize>();
        Some(work)
    }
}

/// What, to which relation, and to what of it.
type Recognised = (DdlKind, Option<Arc<Relation>>, Option<String>);

impl Work {
    fn recognise(&mut self, change: &CatalogChange, names: &Names) -> Option<Recognised> {
        let database = change.database;
        let relation = |oid: Oid| names.relation(database, oid);
        let is_deleted = change.kind == CatalogChangeKind::Delete;
        match (&change.before, &change.after) {
            (before, Some(CatalogRow::Class(after))) => match before {
                Some(CatalogRow::Class(before)) => self.altered(change, before, after, names),
                _ if change.kind == CatalogChangeKind::Insert => self.created(database, after, names),
                _ => None,
            },
            (Some(CatalogRow::Class(class)), None) if is_deleted => dropped(database, class, names),
            (Some(CatalogRow::Namespace { name, .. }), None) if is_deleted => {
                // Schemas of temporary tables come and go by themselves.
                let is_temporary = name.starts_with("pg_temp_") || name.starts_with("pg_toast_temp_");
                (!is_temporary).then(|| (DdlKind::DropSchema, None, Some(name.clone())))
            }
            (Some(CatalogRow::Database { name, .. }), None) if is_deleted => {
                Some((DdlKind::DropDatabase, None, Some(name.clone())))
            }
            (before, Some(CatalogRow::Trigger { relation: table, name, enabled, .. })) => {
                let was_off =
                    matches!(before, Some(CatalogRow::Trigger { enabled, .. }) if is_off(*enabled)) || before.is_none();
                if !is_off(*enabled) && self.triggers.len() < MADE_MAX {
                    self.triggers.insert((database, *table, name.clone()));
                }
                (is_off(*enabled) && !was_off).then(|| (DdlKind::DisableTrigger, relation(*table), Some(name.clone())))
            }
            (Some(CatalogRow::Trigger { relation: table, name, is_internal, .. }), None) if is_deleted => {
                // Those of foreign keys go with the constraint.
                (!is_internal).then(|| (DdlKind::DropTrigger, relation(*table), Some(name.clone())))
            }
            (
                Some(CatalogRow::Rewrite { enabled: before, .. }),
                Some(CatalogRow::Rewrite { relation: table, name, enabled, .. }),
            ) => (is_off(*enabled) && !is_off(*before))
                .then(|| (DdlKind::DropRule, relation(*table), Some(name.clone()))),
            (Some(CatalogRow::Rewrite { relation: table, name, .. }), None) if is_deleted => {
                // A view's query is a rule of this name, and goes with the view.
                (name != "_RETURN").then(|| (DdlKind::DropRule, relation(*table), Some(name.clone())))
            }
            (Some(CatalogRow::Policy { relation: table, name, .. }), None) if is_deleted => {
                Some((DdlKind::DropPolicy, relation(*table), Some(name.clone())))
            }
            (
                Some(CatalogRow::EventTrigger { enabled: before, .. }),
                Some(CatalogRow::EventTrigger { name, enabled, .. }),
            ) => {
                (is_off(*enabled) && !is_off(*before)).then(|| (DdlKind::DisableEventTrigger, None, Some(name.clone())))
            }
            (Some(CatalogRow::EventTrigger { name, .. }), None) if is_deleted => {
                Some((DdlKind::DropEventTrigger, None, Some(name.clone())))
            }
            (before, Some(CatalogRow::Attribute { relation: table, is_dropped: true, .. })) => match before {
                Some(CatalogRow::Attribute { is_dropped: true, .. }) => None,
                Some(CatalogRow::Attribute { name, .. }) => {
                    Some((DdlKind::DropColumn, relation(*table), Some(name.clone())))
                }
                _ => Some((DdlKind::DropColumn, relation(*table), None)),
            },
            (None, None) if is_deleted => unknown(change),
            _ => None,
        }
    }

    fn created(&mut self, database: Oid, class: &ClassRow, names: &Names) -> Option<Recognised> {
        if self.made.len() < MADE_MAX {
            self.made.insert((database, class.oid));
        }
        if is_systems(class) {
            return None;
        }
        let is_told = matches!(class.kind, b'r' | b'p' | b'v' | b'm' | b'f');
        if !is_told || class.rewrite != Oid(0) || class.persistence == b't' {
            return None;
        }
        Some((DdlKind::Create, names.relation_of(database, class).map(Arc::new), None))
    }

    fn altered(
        &self,
        change: &CatalogChange,
        before: &ClassRow,
        after: &ClassRow,
        names: &Names,
    ) -> Option<Recognised> {
        if after.rewrite != Oid(0) || after.persistence == b't' || is_systems(after) {
            return None;
        }
        let relation = names.relation_of(change.database, after).map(Arc::new);
        if before.file != after.file && before.file != 0 && after.file != 0 {
            let is_moved = before.tablespace != after.tablespace;
            let kind = match after.kind {
                _ if change.takes_over.is_some() || is_moved => DdlKind::Rewrite,
                b'r' if self.made.contains(&(change.database, after.oid)) => return None, // it held nothing of anybody's
                b'r' => DdlKind::Truncate,
                b'S' => DdlKind::Alter,
                _ => DdlKind::Rewrite,
            };
            return Some((kind, relation, None));
        }
        let is_index = matches!(after.kind, b'i' | b'I' | b't' | b'c');
        let is_renamed = (&before.name, before.namespace) != (&after.name, after.namespace);
        let former = || {
            let schema = names.schema_name(change.database, before.namespace).unwrap_or_default();
            if schema.is_empty() { before.name.clone() } else { format!("{schema}.{}", before.name) }
        };
        (!is_index).then(|| (DdlKind::Alter, relation, is_renamed.then(former)))
    }

    /// What it did, without what is implied by something larger.
    fn summary(&self) -> Vec<DdlEvent> {
        let key = |event: &DdlEvent| event.relation.as_ref().map(|relation| (relation.database, relation.oid));
        let keys_of = |kinds: &[DdlKind]| -> HashSet<(Oid, Oid)> {
            self.events.iter().filter(|event| kinds.contains(&event.kind)).filter_map(key).collect()
        };
        let dropped = keys_of(&[DdlKind::DropTable, DdlKind::DropOther]);
        let written_anew = keys_of(&[DdlKind::Truncate, DdlKind::Rewrite]);
        let told = keys_of(&[DdlKind::Create, DdlKind::Rewrite, DdlKind::Truncate]);
        let (mut altered, mut emptied) = (HashSet::new(), HashSet::new());
        let mut last_drop: HashMap<(Oid, Oid, &str), Lsn> = HashMap::new();
        for event in self.events.iter().filter(|event| event.kind == DdlKind::DropTrigger) {
            if let (Some((database, oid)), Some(name)) = (key(event), &event.object) {
                last_drop.insert((database, oid, name.as_str()), event.lsn);
            }
        }
        let mut summary = Vec::new();
        for event in &self.events {
            let key = key(event);
            let owner = event.relation.as_ref().and_then(|relation| Some((relation.database, relation.owner?)));
            let is_part = event.relation.as_ref().is_some_and(|relation| relation.kind == RelationKind::Index);
            let of_dropped = key.is_some_and(|key| dropped.contains(&key));
            let is_kept = match event.kind {
                // What the transaction itself made is nobody's loss.
                DdlKind::DropTable | DdlKind::DropOther | DdlKind::Truncate
                    if key.is_some_and(|key| self.made.contains(&key)) =>
                {
                    false
                }
                DdlKind::DropOther if is_part => {
                    !owner.is_some_and(|owner| dropped.contains(&owner) || written_anew.contains(&owner))
                }
                DdlKind::Rewrite if is_part => !owner.is_some_and(|owner| written_anew.contains(&owner)),
                DdlKind::Create => !of_dropped,
                DdlKind::DropTrigger => {
                    let is_made_anew = key
                        .zip(event.object.as_ref())
                        .is_some_and(|((database, oid), name)| self.triggers.contains(&(database, oid, name.clone())));
                    !of_dropped && !is_made_anew
                }
                DdlKind::DisableTrigger | DdlKind::DropRule | DdlKind::DropPolicy | DdlKind::DropColumn => !of_dropped,
                DdlKind::Truncate => !of_dropped && key.is_none_or(|key| emptied.insert(key)),
                DdlKind::Rewrite => !of_dropped,
                DdlKind::Alter if event.object.is_some() => !of_dropped,
                DdlKind::Alter => {
                    !of_dropped
                        && key.is_some_and(|key| !told.contains(&key))
                        && key.is_some_and(|key| altered.insert(key))
                }
                _ => true,
            };
            if is_kept {
                summary.push(event.clone());
            }
        }
        summary
    }
}

/// The server's own: catalogs and their views, and TOAST tables, which go where their tables go.
const fn is_systems(class: &ClassRow) -> bool {
    class.oid.0 < FIRST_NORMAL_OID || class.namespace.0 == TOAST_SCHEMA.0
}

fn dropped(database: Oid, class: &ClassRow, names: &Names) -> Option<Recognised> {
    if class.rewrite != Oid(0) || class.persistence == b't' || is_systems(class) {
        return None;
    }
    let kind = match class.kind {
        b'r' | b'p' => DdlKind::DropTable,
        b'v' | b'm' | b'S' | b'f' | b'i' | b'I' => DdlKind::DropOther,
        _ => return None,
    };
    Some((kind, names.relation_of(database, class).map(Arc::new), None))
}

/// A row is deleted that nobody knows: something of the kind is dropped.
fn unknown(change: &CatalogChange) -> Option<Recognised> {
    use crate::decode::catalog::Catalog;
    let kind = match change.catalog {
        Catalog::Class => DdlKind::DropOther,
        Catalog::Namespace => DdlKind::DropSchema,
        Catalog::Database => DdlKind::DropDatabase,
        Catalog::Trigger => DdlKind::DropTrigger,
        Catalog::Policy => DdlKind::DropPolicy,
        Catalog::EventTrigger => DdlKind::DropEventTrigger,
        Catalog::Attribute | Catalog::Index | Catalog::Inherits | Catalog::Rewrite => return None,
    };
    Some((kind, None, None))
}
