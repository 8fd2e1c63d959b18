//! For tests: tables, transactions, and a clock.

use std::sync::Arc;

use jiff::Timestamp;

use super::{DdlEvent, DdlKind, Persistence, Relation, RelationKind, Tally, Transaction};
use crate::decode::change::RowCounts;
use crate::pg::{Lsn, Oid, PgTime, RelFile, Xid};

/// A table of the database `shop`.
pub(super) fn relation(schema: &str, name: &str, oid: u32) -> Relation {
    Relation {
        database: Oid(5),
        oid: Oid(oid),
        database_name: "shop".into(),
        schema: schema.into(),
        name: name.into(),
        kind: RelationKind::Table,
        persistence: Persistence::Permanent,
        owner: None,
    }
}

pub(super) fn table(name: &str, oid: u32) -> Arc<Relation> {
    Arc::new(relation("public", name, oid))
}

pub(super) fn deleted(rows: u64) -> RowCounts {
    RowCounts { deleted: rows, ..RowCounts::default() }
}

pub(super) fn inserted(rows: u64) -> RowCounts {
    RowCounts { inserted: rows, ..RowCounts::default() }
}

pub(super) fn updated(rows: u64) -> RowCounts {
    RowCounts { updated: rows, ..RowCounts::default() }
}

pub(super) fn tally(relation: &Arc<Relation>, counts: RowCounts) -> Tally {
    tally_in(relation, relation.oid.0, counts)
}

/// Rows in another file than the table's first.
pub(super) fn tally_in(relation: &Arc<Relation>, file: u32, counts: RowCounts) -> Tally {
    let file = RelFile { tablespace: Oid(1663), database: relation.database, number: file };
    Tally { file, relation: Some(relation.clone()), counts }
}

pub(super) fn event(kind: DdlKind, relation: &Arc<Relation>) -> DdlEvent {
    DdlEvent { kind, lsn: Lsn::ZERO, database: relation.database, relation: Some(relation.clone()), object: None }
}

pub(super) fn event_of(kind: DdlKind, relation: Option<&Arc<Relation>>, object: &str) -> DdlEvent {
    let object = Some(object.to_owned());
    DdlEvent { kind, lsn: Lsn::ZERO, database: Oid(5), relation: relation.cloned(), object }
}

/// A committed transaction that ended `millis` after [`start`].
pub(super) fn transaction(xid: u32, millis: i64, tallies: Vec<Tally>, ddl: Vec<DdlEvent>) -> Transaction {
    let lsn = 1_000 * u64::from(xid);
    Transaction {
        begin: Lsn::new(lsn - 500),
        lsn: Lsn::new(lsn),
        end: Lsn::new(lsn + 40),
        xid: Xid::new(xid),
        time: time(millis),
        committed: true,
        prepared: false,
        subtransactions: 0,
        tallies,
        more: RowCounts::default(),
        ddl,
        messages: Vec::new(),
        is_complete: true,
    }
}

/// The moment from which tests count: a Wednesday.
pub(super) fn start() -> Timestamp {
    "2025-12-17T08:14:00Z".parse().expect("a time")
}

pub(super) fn time(millis: i64) -> PgTime {
    PgTime::from_micros(PgTime::from(start()).micros() + 1_000 * millis)
}

pub(super) fn at(millis: i64) -> Timestamp {
    time(millis).timestamp()
}
