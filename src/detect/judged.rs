//! How far an agent before us has judged what transactions did: what lies before is not told again.

use std::collections::HashMap;

use super::incident::Incident;
use super::{Relation, Transaction};
use crate::pg::Lsn;

/// How far, in the WAL or in each database.
#[derive(Debug, Default)]
pub(super) struct Judged {
    /// Databases are streamed apart from each other.
    pub(super) is_apart: bool,
    to: Lsn,
    /// By the database's name.
    by_database: HashMap<String, Lsn>,
}

impl Judged {
    /// An incident was found up to the place that it was seen to.
    pub(super) fn restore(&mut self, incident: &Incident) {
        self.to = self.to.max(incident.seen_to);
        let tables = incident.tables.iter().map(|table| table.name.as_str());
        for name in tables.chain(incident.ddl.iter().filter_map(|ddl| ddl.table.as_deref())) {
            let to = self.by_database.entry(database_of(name)).or_default();
            *to = incident.seen_to.max(*to);
        }
    }

    /// The WAL goes on elsewhere; nothing behind `to` was judged.
    pub(super) fn forget(&mut self, to: Lsn) {
        self.to = to;
        self.by_database.clear();
    }

    /// Whether a transaction was judged.
    pub(super) fn holds(&self, transaction: &Transaction) -> bool {
        if !self.is_apart {
            return transaction.lsn <= self.to;
        }
        let relations = transaction.tallies.iter().filter_map(|tally| tally.relation.as_deref());
        let mut relations = relations.chain(transaction.ddl.iter().filter_map(|event| event.relation.as_deref()));
        let is_held = |relation: &Relation| {
            self.by_database.get(&relation.database_name).is_some_and(|to| transaction.lsn <= *to)
        };
        relations.next().is_some_and(is_held)
    }
}

/// The first part of a full name, without the quotes around it.
fn database_of(name: &str) -> String {
    match name.strip_prefix('"') {
        None => name.split('.').next().unwrap_or_default().to_owned(),
        Some(quoted) => {
            let mut database = String::new();
            let mut rest = quoted.chars().peekable();
            while let Some(c) = rest.next() {
                match c {
                    '"' if rest.peek() == Some(&'"') => {
                        rest.next();
                        database.push('"');
                    }
                    '"' => break,
                    c => database.push(c),
                }
            }
            database
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::super::incident::DdlFinding;
    use super::super::{DdlKind, testing};
    use super::*;
    use crate::pg::TimelineId;

    #[test]
    fn the_database_is_the_first_part_of_a_name() {
        assert_eq!(database_of("shop.public.orders"), "shop");
        assert_eq!(database_of("\"The \"\"Shop\"\".v2\".public.orders"), "The \"Shop\".v2");
        assert_eq!(database_of(""), "");
    }

    #[test]
    fn what_one_database_was_judged_to_says_nothing_of_another_that_is_streamed_apart() {
        let mut incident = Incident::new("x".to_owned(), TimelineId::FIRST, Timestamp::UNIX_EPOCH);
        incident.seen_to = Lsn::new(1_000);
        incident.ddl.push(DdlFinding {
            kind: DdlKind::DropTable,
            lsn: Lsn::new(900),
            xid: None,
            table: Some("shop.public.orders".to_owned()),
            object: None,
        });
        let of = |database: &str| {
            let mut relation = testing::relation("public", "orders", 7);
            relation.database_name = database.to_owned();
            let mut transaction = testing::transaction(1, 0, Vec::new(), Vec::new());
            transaction.lsn = Lsn::new(900);
            transaction.ddl.push(testing::event(DdlKind::DropTable, &Arc::new(relation)));
            transaction
        };
        let mut judged = Judged::default();
        judged.restore(&incident);
        assert!(judged.holds(&of("shop")) && judged.holds(&of("crm")), "one WAL is read in order");
        judged.is_apart = true;
        assert!(judged.holds(&of("shop")) && !judged.holds(&of("crm")));
        judged.forget(Lsn::ZERO);
        assert!(!judged.holds(&of("shop")));
    }
}
