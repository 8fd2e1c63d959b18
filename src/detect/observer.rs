//! Records in, finished transactions out: with their rows by relation, and with what they did to definitions.

use super::definitions::{Definitions, MESSAGE_PREFIX};
use super::names::Names;
use super::{Limits, NamesLimits, Running, Transaction, Transactions};
use crate::decode::change::Action;
use crate::decode::{Change, DecodeError, Record, RmgrId, WalMajor};

/// Follows the WAL, record by record.
#[derive(Debug)]
pub struct Observer {
    transactions: Transactions,
    definitions: Definitions,
    names: Names,
    /// A record of a catalog that could not be read; names may be wrong since.
    fault: Option<DecodeError>,
    running: Option<Running>,
}

impl Observer {
    /// Begins with these names. `is_from_start` promises that no transaction that matters began before the first record
    /// to come; otherwise those that did are told as incomplete.
    pub fn new(names: Names, limits: Limits, is_from_start: bool) -> Self {
        let transactions = Transactions::new(limits, is_from_start);
        Self { transactions, definitions: Definitions::new(), names, fault: None, running: None }
    }

    /// Begins without any names: files stay without, but for those whose names the WAL tells.
    pub fn without_names(major: WalMajor, is_from_start: bool) -> Self {
        Self::new(Names::new(major, NamesLimits::default()), Limits::default(), is_from_start)
    }

    /// Takes the next record and what it means; gives the transaction that ends with it.
    ///
    /// A record of a catalog that cannot be read costs names, and nothing else ([`Observer::take_fault`]).
    #[inline]
    pub fn see(&mut self, record: &Record<'_>, change: &Change<'_>) -> Option<Transaction> {
        match &change.action {
            Action::Rows(rows) => {
                if self.names.is_catalog(rows.file) {
                    self.see_catalog(record, change);
                }
                self.transactions.see(change, &self.names)
            }
            Action::Pages => {
                if self.names.wants_images() && record.header.rmgr == RmgrId::XLOG {
                    let seen = self.names.see_images(record, change.xid);
                    self.note(seen);
                }
                self.transactions.see(change, &self.names)
            }
            _ => self.see_other(change),
        }
    }

    fn see_catalog(&mut self, record: &Record<'_>, change: &Change<'_>) {
        let changes = match self.names.see_rows(record, change.xid) {
            Ok(changes) => changes,
            Err(error) => return self.note(Err(error)),
        };
        let Some(xid) = change.xid else { return };
        for catalog in changes {
            if let Some(file) = catalog.takes_over {
                self.transactions.forget(xid, file);
            }
            self.definitions.see(xid, change.lsn, &catalog, &self.names);
        }
    }

    fn see_other(&mut self, change: &Change<'_>) -> Option<Transaction> {
        let mut ended = self.transactions.see(change, &self.names);
        match &change.action {
            Action::Ended(end) => {
                let done = self.definitions.end(end);
                if let Some(transaction) = &mut ended {
                    transaction.ddl = done.events;
                    transaction.messages = done.messages;
                    transaction.is_complete &= done.left_out == 0;
                }
                self.names.see_end(end);
            }
            Action::Message(message) if message.transactional && message.prefix == MESSAGE_PREFIX => {
                if let Some(xid) = change.xid {
                    self.definitions.see_message(xid, message.content);
                }
            }
            Action::FileCreated { file, fork } => self.names.see_file(*file, *fork, change.xid),
            Action::FileTruncated(truncated) if truncated.empties_heap() => {
                // A vacuum that cuts off empty pages is no part of a transaction.
                if let Some(xid) = change.xid
                    && let Some(relation) = self.names.relation_of_file(truncated.file)
                {
                    self.transactions.forget(xid, truncated.file);
                    self.definitions.see_emptied(xid, change.lsn, relation);
                }
            }
            Action::Locked(locks) => self.names.see_locks(*locks),
            Action::Remapped(update) => self.names.see_map(update),
            Action::Database(database) => self.names.see_database(database, change.xid),
            Action::Running(running) => {
                let running = Running::of(change.lsn, running);
                self.names.see_running(&running);
                self.definitions.see_running(&running);
                self.running = Some(running);
            }
            _ => {}
        }
        ended
    }

    fn note(&mut self, seen: Result<(), DecodeError>) {
        if let Err(error) = seen {
            self.fault.get_or_insert(error);
        }
    }

    /// The first record of a catalog that could not be read since this was asked last.
    pub const fn take_fault(&mut self) -> Option<DecodeError> {
        self.fault.take()
    }

    /// The open transactions as the server wrote them down last, if it did since this was asked last.
    pub const fn take_running(&mut self) -> Option<Running> {
        self.running.take()
    }

    /// The names as of the record that was seen last.
    pub const fn names(&self) -> &Names {
        &self.names
    }

    /// The same, to be told what SQL says.
    pub const fn names_mut(&mut self) -> &mut Names {
        &mut self.names
    }

    /// The names, to go on elsewhere.
    pub fn into_names(self) -> Names {
        self.names
    }

    /// The open transactions.
    pub const fn transactions(&self) -> &Transactions {
        &self.transactions
    }

    /// What open transactions did to definitions.
    pub const fn definitions(&self) -> &Definitions {
        &self.definitions
    }
}
