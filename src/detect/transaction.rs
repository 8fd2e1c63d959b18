//! What each transaction did, from its first record to its end.

use std::sync::Arc;

use super::{DdlEvent, Relation};
use crate::decode::change::RowCounts;
use crate::pg::{Lsn, Oid, PgTime, RelFile, Xid};

/// A transaction that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Where its first record begins.
    pub begin: Lsn,
    /// Where the record that ends it begins: recovery that stops before this place does not have the transaction.
    pub lsn: Lsn,
    /// The first byte behind that record.
    pub end: Lsn,
    /// Its id; `None` for an abort of a transaction that wrote nothing else.
    pub xid: Option<Xid>,
    /// When it ended, by the server's clock.
    pub time: PgTime,
    /// True for a commit.
    pub committed: bool,
    /// It ended by `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    pub prepared: bool,
    /// The subtransactions that ended with it.
    pub subtransactions: u32,
    /// Rows by relation, the subtransactions' that were rolled back not among them; of an abort all that was tried.
    /// Catalogs, TOAST tables and indexes have none. In the order of first touch.
    pub tallies: Vec<Tally>,
    /// Rows of relations that were too many to be counted one by one.
    pub more: RowCounts,
    /// What it did to definitions, in WAL order.
    pub ddl: Vec<DdlEvent>,
    /// False if its beginning was not seen: the counts are at least these.
    pub is_complete: bool,
}

/// Rows of one relation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    /// The file that the rows were in when first touched.
    pub file: RelFile,
    /// The relation; `None` if nobody knows whose file it is.
    pub relation: Option<Arc<Relation>>,
    /// The rows.
    pub counts: RowCounts,
}

impl Transaction {
    /// The database that it worked in, as far as the rows and definitions that it touched tell.
    pub fn database(&self) -> Option<Oid> {
        let rows = self.tallies.iter().map(|tally| tally.file.database);
        rows.chain(self.ddl.iter().map(|event| event.database)).find(|database| *database != Oid(0))
    }
}
