//! Incidents for tests.

use jiff::Timestamp;

use crate::detect::incident::{
    Finding, Incident, IncidentTransaction, Rows, Severity, State, TableDamage, TransactionState, incident_id,
};
use crate::detect::rule::RuleName;
use crate::detect::{Actor, Who, WhoSource};
use crate::pg::{Lsn, PgTime, TimelineId, Xid};

pub(super) fn second(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// A committed wipe of four tables.
pub(super) fn incident(number: u64, detected_at: Timestamp) -> Incident {
    let lsn = Lsn::new(0x1A2B_3C40 + number);
    let mut incident = Incident::new(incident_id(TimelineId::FIRST, lsn), TimelineId::FIRST, detected_at);
    incident.state = State::Committed;
    incident.severity = Severity::Critical;
    incident.title = "4 tables emptied, 95 rows gone".to_owned();
    incident.first_harm = Some(lsn);
    incident.seen_to = lsn;
    let exact = |count| Some(Rows { count, exact: true });
    let rows =
        [("shop.public.scores", 47), ("shop.public.users", 24), ("shop.public.games", 12), ("shop.public.moves", 12)];
    incident.tables = rows
        .into_iter()
        .map(|(name, count)| TableDamage {
            name: name.to_owned(),
            before: exact(count),
            after: exact(0),
            deleted: count,
            ..TableDamage::default()
        })
        .collect();
    incident.findings = vec![Finding {
        rule: RuleName::TablesEmptied,
        severity: Severity::Critical,
        text: "4 tables of shop have no rows left".to_owned(),
        table: None,
        xid: Xid::new(4711),
        lsn: Some(lsn),
        at: detected_at,
        silenced: false,
    }];
    let actor = Actor {
        role: Some("app_owner".to_owned()),
        database: Some("shop".to_owned()),
        application: Some("psql".to_owned()),
        client: Some("10.0.0.7:51234".to_owned()),
        pid: Some(4242),
        query: Some("DELETE FROM users;\nDELETE FROM games".to_owned()),
        ..Actor::default()
    };
    incident.transactions = vec![IncidentTransaction {
        xid: Xid::new(4711),
        begin: lsn,
        lsn: Some(lsn),
        time: Some(PgTime::from(detected_at)),
        state: TransactionState::Committed,
        is_complete: true,
        inserted: 0,
        updated: 0,
        deleted: 95,
        who: Who { actor, source: WhoSource::Activity, note: None },
    }];
    incident
}

/// The same while its transaction is open.
pub(super) fn open(mut incident: Incident) -> Incident {
    incident.state = State::Open;
    incident.first_harm = None;
    for transaction in &mut incident.transactions {
        (transaction.state, transaction.lsn, transaction.time) = (TransactionState::Open, None, None);
    }
    incident
}
