//! What each transaction did, from its first record to its end.
//!
//! Rows are counted per transaction and file as their records pass, subtransactions apart from their top-level
//! transaction until its end says whose they are. A subtransaction that is rolled back takes its rows along; a prepared
//! transaction stays open until it is committed or rolled back, however long that takes and however often the agent is
//! started anew meanwhile.
//!
//! **Bounded.** So many transactions and so many tallies are kept ([`Limits`]); beyond them rows go into one sum per
//! transaction ([`Transaction::more`]), and transactions that found no place are told as incomplete, never as empty.

use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};

use super::{DdlEvent, Relation, Running};
use crate::decode::Change;
use crate::decode::change::{Action, RowCounts};
use crate::decode::rmgr::xact::TransactionEnd;
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
    /// True for a commit. A subtransaction that is rolled back by itself ends by an abort, too: at `wal_level = replica`
    /// nothing tells it from a transaction of its own.
    pub committed: bool,
    /// It ended by `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    pub prepared: bool,
    /// The subtransactions that ended with it.
    pub subtransactions: u32,
    /// Rows by relation, the subtransactions' that were rolled back not among them; of an abort all that was tried.
    /// Catalogs, TOAST tables and indexes have none. In the order of first touch, subtransactions last.
    pub tallies: Vec<Tally>,
    /// Rows of relations that were too many to be counted one by one.
    pub more: RowCounts,
    /// What it did to definitions, in WAL order.
    pub ddl: Vec<DdlEvent>,
    /// Messages for walguard that it wrote ([`MESSAGE_PREFIX`](super::definitions::MESSAGE_PREFIX)), in no order.
    pub messages: Vec<Arc<[u8]>>,
    /// False if its beginning was not seen, or if there was no room for it: the counts are at least these.
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

    /// Rows of all relations together.
    pub fn rows(&self) -> RowCounts {
        let mut sum = self.more;
        for tally in &self.tallies {
            sum += tally.counts;
        }
        sum
    }
}

/// Whose file it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A user's relation.
    Relation(Arc<Relation>),
    /// A catalog, a TOAST table, an index, or a file in which rows only came to lie anew: its rows are nobody's doing.
    Hidden,
    /// Nobody knows.
    Unknown,
}

/// Who can tell whose file it is.
pub trait Owners {
    /// Whose `file` is, in the eyes of transaction `by`, whose own definitions count before its end.
    fn owner(&self, file: RelFile, by: Option<Xid>) -> Owner;
}

/// How much is kept of what is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open transactions and subtransactions. Postgres itself keeps 64 subtransactions of each session at hand; a loop
    /// with an exception block makes one a turn.
    pub transactions: usize,
    /// Tallies of all open transactions together; each takes about 60 bytes.
    pub tallies: usize,
    /// Tallies of one transaction or subtransaction.
    pub tallies_each: usize,
}

impl Default for Limits {
    /// At most 16 MiB for the tallies and 10 MiB for the transactions.
    fn default() -> Self {
        Self { transactions: 65_536, tallies: 262_144, tallies_each: 16_384 }
    }
}

/// The transactions that are open.
#[derive(Debug)]
pub struct Transactions {
    limits: Limits,
    open: Vec<Open>,
    /// Places in `open` by transaction id.
    places: HashMap<u32, usize>,
    /// The transaction of the record before: most often that of the next one, too.
    last: Option<(Xid, usize)>,
    tallies: usize,
    /// Transactions from this one on began where we could see it; `None` before that is known.
    seen_from: Option<u32>,
    /// Some transaction found no place since the table was last empty: whoever is not in it may be one of those.
    overflowed: bool,
}

/// An open transaction or subtransaction.
#[derive(Debug)]
struct Open {
    xid: Xid,
    /// Its top-level transaction, once the WAL said it.
    top: Option<Xid>,
    begin: Lsn,
    tallies: Vec<FileTally>,
    /// Places in `tallies` by file, once these are too many to look through.
    by_file: HashMap<RelFile, usize>,
    /// The tally of the row before.
    last: usize,
    more: RowCounts,
    is_complete: bool,
    is_prepared: bool,
}

#[derive(Clone, Copy, Debug)]
struct FileTally {
    file: RelFile,
    counts: RowCounts,
}

/// Looking through this many tallies takes no longer than to hash.
const FEW: usize = 8;

/// An open transaction, as rules and status see it.
#[derive(Clone, Copy, Debug)]
pub struct OpenTransaction<'a> {
    /// Its id.
    pub xid: Xid,
    /// Its top-level transaction, if it is known to be a subtransaction.
    pub top: Option<Xid>,
    /// Where its first record begins.
    pub begin: Lsn,
    /// It is prepared, and waits for `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    pub is_prepared: bool,
    /// False if its beginning was not seen.
    pub is_complete: bool,
    /// Rows of relations that were too many to be counted one by one.
    pub more: RowCounts,
    tallies: &'a [FileTally],
}

impl OpenTransaction<'_> {
    /// Rows by file so far; catalogs' are among them.
    pub fn tallies(&self) -> impl Iterator<Item = (RelFile, RowCounts)> {
        self.tallies.iter().map(|tally| (tally.file, tally.counts))
    }
}

impl Transactions {
    /// No transaction is open, as far as anybody knows. `is_from_start` promises that no transaction that matters began
    /// before the first record to come; otherwise those that did are told as incomplete.
    pub fn new(limits: Limits, is_from_start: bool) -> Self {
        Self {
            limits,
            open: Vec::new(),
            places: HashMap::new(),
            last: None,
            tallies: 0,
            seen_from: None,
            overflowed: false,
        }
        .promised(is_from_start)
    }

    const fn promised(mut self, is_from_start: bool) -> Self {
        if is_from_start {
            self.seen_from = Some(0);
        }
        self
    }

    /// Takes a change; gives the transaction that ends with it, without its definitions. Whose the files are is asked at
    /// the end, and before `owners` has heard of that end.
    #[inline]
    pub fn see(&mut self, change: &Change<'_>, owners: &impl Owners) -> Option<Transaction> {
        match &change.action {
            Action::Rows(rows) => {
                if let Some(place) = self.touch(change) {
                    self.count(place, rows.file, rows.counts(), rows.is_surely_catalog());
                }
                None
            }
            Action::RelationRow(row) => {
                if let Some(place) = self.touch(change) {
                    self.count(place, file_of(row.database, row.relation), row.counts(), false);
                }
                None
            }
            Action::Ended(end) => Some(self.end(change, end, owners)),
            _ => {
                self.see_other(change);
                None
            }
        }
    }

    fn see_other(&mut self, change: &Change<'_>) {
        self.touch(change);
        match &change.action {
            Action::Prepared(prepare) => {
                for xid in prepare.xid.into_iter().chain(prepare.subxacts.iter()) {
                    if let Some(place) = self.place_of(xid, change.lsn)
                        && let Some(open) = self.open.get_mut(place)
                    {
                        open.is_prepared = true;
                        open.top = prepare.xid.filter(|top| *top != xid);
                    }
                }
            }
            Action::Assigned(assignment) => {
                for xid in assignment.subxacts.iter() {
                    self.assign(xid, assignment.top, change.lsn);
                }
            }
            Action::Running(running) => {
                if self.seen_from.is_none() && running.next_xid != 0 {
                    self.seen_from = Some(running.next_xid);
                }
                self.see_running(&Running::of(change.lsn, running));
            }
            _ => {}
        }
    }

    /// The transaction's place, made if it is new; `None` if there is no transaction or no room.
    #[inline]
    fn touch(&mut self, change: &Change<'_>) -> Option<usize> {
        let xid = change.xid?;
        if change.top_xid.is_some() {
            self.assign(xid, change.top_xid, change.lsn);
        }
        match self.last {
            Some((last, place)) if last == xid => Some(place),
            _ => self.place_of(xid, change.lsn),
        }
    }

    fn place_of(&mut self, xid: Xid, lsn: Lsn) -> Option<usize> {
        if let Some(place) = self.places.get(&xid.get()) {
            self.last = Some((xid, *place));
            return Some(*place);
        }
        if self.open.len() >= self.limits.transactions {
            self.overflowed = true;
            return None;
        }
        let place = self.open.len();
        self.open.push(Open {
            xid,
            top: None,
            begin: lsn,
            tallies: Vec::new(),
            by_file: HashMap::new(),
            last: 0,
            more: RowCounts::default(),
            is_complete: self.seen_from.is_some_and(|from| from == 0 || !precedes(xid.get(), from)),
            is_prepared: false,
        });
        self.places.insert(xid.get(), place);
        self.last = Some((xid, place));
        Some(place)
    }

    fn assign(&mut self, xid: Xid, top: Option<Xid>, lsn: Lsn) {
        // The top-level transaction has a place from its subtransaction's first record on: it began no later.
        for (xid, top) in [(top, None), (Some(xid), top)] {
            if let Some(place) = xid.and_then(|xid| self.place_of(xid, lsn))
                && let Some(open) = self.open.get_mut(place)
            {
                open.top = open.top.or(top);
            }
        }
    }

    #[inline]
    fn count(&mut self, place: usize, file: RelFile, counts: RowCounts, is_catalog: bool) {
        if is_catalog {
            return;
        }
        let Some(open) = self.open.get_mut(place) else { return };
        match open.tallies.get_mut(open.last) {
            Some(tally) if tally.file == file => tally.counts += counts,
            _ => {
                let limit = self.limits.tallies_each.min(open.tallies.len() + self.limits.tallies - self.tallies);
                self.tallies += usize::from(open.count_elsewhere(file, counts, limit));
            }
        }
    }

    /// Forgets the rows of a file that an open transaction wrote so far: they were another's, and only came to lie anew.
    pub fn forget(&mut self, xid: Xid, file: RelFile) {
        let open = self.places.get(&xid.get()).and_then(|place| self.open.get_mut(*place));
        if let Some(tally) = open.and_then(|open| open.tallies.iter_mut().find(|tally| tally.file == file)) {
            tally.counts = RowCounts::default();
        }
    }

    fn remove(&mut self, xid: Xid) -> Option<Open> {
        let place = self.places.remove(&xid.get())?;
        let open = self.open.swap_remove(place);
        if let Some(moved) = self.open.get(place) {
            self.places.insert(moved.xid.get(), place);
        }
        self.last = None;
        self.tallies -= open.tallies.len();
        self.overflowed &= !self.open.is_empty();
        Some(open)
    }

    fn end(&mut self, change: &Change<'_>, end: &TransactionEnd<'_>, owners: &impl Owners) -> Transaction {
        let mut transaction = Transaction {
            begin: change.lsn,
            lsn: change.lsn,
            end: change.end,
            xid: end.xid,
            time: end.time,
            committed: end.committed,
            prepared: end.prepared,
            subtransactions: 0,
            tallies: Vec::new(),
            more: RowCounts::default(),
            ddl: Vec::new(),
            messages: Vec::new(),
            // Whoever wrote nothing before its end did nothing that is missing, if we could have seen it.
            is_complete: !self.overflowed
                && end.xid.is_none_or(|xid| {
                    self.seen_from.is_some_and(|from| from == 0 || !precedes(xid.get(), from))
                        || self.places.contains_key(&xid.get())
                }),
        };
        let mut places = HashMap::new();
        if let Some(open) = end.xid.and_then(|xid| self.remove(xid)) {
            transaction.add(open, &mut places, owners);
        }
        for xid in end.subxacts() {
            if transaction.subtransactions == 0 {
                places = transaction.tallies.iter().enumerate().map(|(place, tally)| (tally.file, place)).collect();
            }
            transaction.subtransactions += 1;
            if let Some(open) = self.remove(xid) {
                transaction.add(open, &mut places, owners);
            }
        }
        transaction
    }

    /// The server tells which transactions are open: others of their age that have not ended never will.
    fn see_running(&mut self, running: &Running) {
        let gone: Vec<Xid> = self.open.iter().map(|open| open.xid).filter(|xid| running.is_gone(*xid)).collect();
        for xid in gone {
            self.remove(xid);
        }
    }

    /// Where the oldest open transaction begins: decoding must begin there again, so that none that is open now is
    /// missed. `None` if none is open.
    pub fn resume_from(&self) -> Option<Lsn> {
        self.open.iter().map(|open| open.begin).min()
    }

    /// The open transactions and subtransactions, in no order.
    pub fn open(&self) -> impl Iterator<Item = OpenTransaction<'_>> {
        self.open.iter().map(|open| OpenTransaction {
            xid: open.xid,
            top: open.top,
            begin: open.begin,
            is_prepared: open.is_prepared,
            is_complete: open.is_complete,
            more: open.more,
            tallies: &open.tallies,
        })
    }

    /// How many transactions and subtransactions are open.
    pub const fn len(&self) -> usize {
        self.open.len()
    }

    /// True if none is open.
    pub const fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

impl Open {
    /// Counts rows of another file than that of the row before; true if it got a new tally.
    fn count_elsewhere(&mut self, file: RelFile, counts: RowCounts, limit: usize) -> bool {
        let known = if self.tallies.len() <= FEW {
            self.tallies.iter().position(|tally| tally.file == file)
        } else {
            self.by_file.get(&file).copied()
        };
        if let Some(tally) = known.and_then(|place| self.tallies.get_mut(place)) {
            tally.counts += counts;
            self.last = known.unwrap_or_default();
            return false;
        }
        if self.tallies.len() >= limit {
            self.more += counts;
            return false;
        }
        self.last = self.tallies.len();
        self.tallies.push(FileTally { file, counts });
        match self.tallies.len() {
            ..=FEW => {}
            len if len == FEW + 1 => {
                self.by_file = self.tallies.iter().enumerate().map(|(place, tally)| (tally.file, place)).collect();
            }
            _ => {
                self.by_file.insert(file, self.last);
            }
        }
        true
    }
}

impl Transaction {
    /// Adds what the transaction itself or one of its subtransactions did; `places` are those in `tallies` by file, or
    /// empty for the first.
    fn add(&mut self, open: Open, places: &mut HashMap<RelFile, usize>, owners: &impl Owners) {
        let is_first = self.tallies.is_empty();
        self.begin = self.begin.min(open.begin);
        self.is_complete &= open.is_complete;
        self.more += open.more;
        for FileTally { file, counts } in open.tallies {
            if counts == RowCounts::default() {
                continue;
            }
            if let Some(tally) = places.get(&file).and_then(|place| self.tallies.get_mut(*place)) {
                tally.counts += counts;
                continue;
            }
            let relation = match owners.owner(file, Some(open.xid)) {
                Owner::Hidden => continue,
                Owner::Relation(relation) => Some(relation),
                Owner::Unknown => None,
            };
            if !is_first {
                places.insert(file, self.tallies.len());
            }
            self.tallies.push(Tally { file, relation, counts });
        }
    }
}

/// What stands for a table's file where changes name the table itself: no file lies in tablespace 0.
pub(super) const fn file_of(database: Oid, relation: Oid) -> RelFile {
    RelFile { tablespace: Oid(0), database, number: relation.0 }
}

/// True if transaction id `a` is older than `b`. They wrap around, so each has two billion before and behind it; those
/// below 3 are older than all.
///
/// (Postgres: `TransactionIdPrecedes` in `access/transam/transam.c`.)
pub(super) const fn precedes(a: u32, b: u32) -> bool {
    if a < 3 || b < 3 {
        return a < b;
    }
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::decode::testing::{WalWriter, main_data, source};
    use crate::decode::{Reader, RmgrId, WalMajor};

    const START: Lsn = Lsn::new(1 << 20);
    const COMMIT: u8 = 0x00;
    const PREPARE: u8 = 0x10;
    const ABORT: u8 = 0x20;
    const COMMIT_PREPARED: u8 = 0x30;
    const INSERT: u8 = 0x00;
    const DELETE: u8 = 0x10;

    struct Wal(WalWriter);

    /// Files with odd numbers are hidden.
    struct Odd;

    impl Owners for Odd {
        fn owner(&self, file: RelFile, _by: Option<Xid>) -> Owner {
            if file.number % 2 == 1 { Owner::Hidden } else { Owner::Unknown }
        }
    }

    fn words(numbers: &[u32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    impl Wal {
        fn new() -> Self {
            Self(WalWriter::new(source(WalMajor::V15), START))
        }

        fn row(&mut self, xid: u32, operation: u8, file: u32) -> Lsn {
            let main: &[u8] = if operation == INSERT { &[1, 0, 0] } else { &[0, 0, 0, 0, 1, 0, 0, 0] };
            let mut body = vec![0, 0, 0, 0];
            body.extend(words(&[1663, 5, file, 0]));
            body.extend(main_data(main));
            // The main data's bytes stand behind all headers; there are no block data in between.
            self.0.record(RmgrId::HEAP, operation, xid, &body).lsn
        }

        /// The end of a transaction with its subtransactions.
        fn end(&mut self, operation: u8, xid: u32, subxacts: &[u32]) {
            let mut data = 100_u64.to_le_bytes().to_vec();
            let mut info = operation;
            let mut header = xid;
            if !subxacts.is_empty() || operation == COMMIT_PREPARED {
                info |= 0x80;
                let two_phase = operation == COMMIT_PREPARED;
                data.extend(words(&[2 | if two_phase { 1 << 4 } else { 0 }, subxacts.len() as u32]));
                data.extend(words(subxacts));
                if two_phase {
                    data.extend(words(&[xid]));
                    header = 0;
                }
            }
            self.0.record(RmgrId::XACT, info, header, &main_data(&data));
        }

        fn running(&mut self, next: u32, oldest: u32, xids: &[u32]) {
            let mut data = words(&[xids.len() as u32, 0, 0, next, oldest, oldest - 1]);
            data.extend(words(xids));
            self.0.record(RmgrId::STANDBY, 0x10, 0, &main_data(&data));
        }

        fn see(&self, transactions: &mut Transactions) -> Vec<Transaction> {
            let mut reader = Reader::at_page(self.0.source, START);
            reader.push(self.0.bytes());
            let mut ended = Vec::new();
            while let Some(record) = reader.next_record().unwrap() {
                ended.extend(transactions.see(&Change::read(&record).unwrap(), &Odd));
            }
            ended
        }

        fn ended(&self) -> Vec<Transaction> {
            self.see(&mut Transactions::new(Limits::default(), true))
        }
    }

    /// `[inserted, deleted]` by file.
    fn counts(transaction: &Transaction) -> Vec<(u32, [u64; 2])> {
        transaction
            .tallies
            .iter()
            .map(|tally| (tally.file.number, [tally.counts.inserted, tally.counts.deleted]))
            .collect()
    }

    #[test]
    fn rows_count_for_the_transaction_that_commits_and_interleaving_makes_no_difference() {
        let mut wal = Wal::new();
        let begin = wal.row(10, INSERT, 20_000);
        wal.row(11, DELETE, 20_000);
        wal.row(10, INSERT, 20_002);
        wal.row(10, INSERT, 20_001); // hidden
        wal.row(10, INSERT, 1259); // a catalog
        wal.row(11, DELETE, 20_000);
        wal.row(10, DELETE, 20_000);
        wal.end(COMMIT, 10, &[]);
        wal.end(ABORT, 11, &[]);
        let ended = wal.ended();
        assert_eq!((ended[0].begin, ended[0].committed, ended[0].is_complete), (begin, true, true));
        assert_eq!(counts(&ended[0]), [(20_000, [1, 1]), (20_002, [1, 0])]);
        assert_eq!((ended[1].committed, counts(&ended[1])), (false, vec![(20_000, [0, 2])]));
    }

    #[test]
    fn a_subtransaction_goes_with_its_top_and_is_dropped_when_rolled_back() {
        let mut wal = Wal::new();
        wal.row(10, DELETE, 20_000);
        wal.row(11, DELETE, 20_000);
        wal.end(ABORT, 11, &[]); // ROLLBACK TO
        wal.row(12, DELETE, 20_000);
        wal.row(13, INSERT, 20_004);
        wal.row(14, INSERT, 20_004);
        wal.end(COMMIT, 10, &[12, 13, 14]);
        let ended = wal.ended();
        assert_eq!(counts(ended.last().unwrap()), [(20_000, [0, 2]), (20_004, [2, 0])]);
        assert_eq!(ended.last().unwrap().subtransactions, 3);
    }

    #[test]
    fn a_prepared_transaction_waits_and_is_no_ghost() {
        let mut wal = Wal::new();
        let begin = wal.row(10, DELETE, 20_000);
        let mut data = words(&[0x57F9_4534, 0, 10, 5]);
        data.extend([0; 16]); // when, and whose
        data.resize(72, 0);
        data[54] = 2; // the name's length
        data.extend(b"p\0");
        wal.0.record(RmgrId::XACT, PREPARE, 10, &main_data(&data));
        wal.running(50, 10, &[10]);
        let mut transactions = Transactions::new(Limits::default(), true);
        assert_eq!(wal.see(&mut transactions), []);
        assert!(transactions.open().all(|open| open.is_prepared));
        assert_eq!((transactions.len(), transactions.resume_from()), (1, Some(begin)));
        wal.end(COMMIT_PREPARED, 10, &[]);
        let ended = wal.ended();
        assert_eq!((counts(&ended[0]), ended[0].prepared), (vec![(20_000, [0, 1])], true));
    }

    #[test]
    fn whoever_is_no_longer_running_is_forgotten() {
        let mut wal = Wal::new();
        wal.row(10, DELETE, 20_000); // its server crashed: it has no end
        wal.row(12, DELETE, 20_000);
        wal.running(50, 12, &[12]);
        let mut transactions = Transactions::new(Limits::default(), true);
        wal.see(&mut transactions);
        assert_eq!(transactions.open().map(|open| open.xid.get()).collect::<Vec<_>>(), [12]);
    }

    #[test]
    fn whoever_may_have_begun_before_is_told_as_incomplete() {
        let mut wal = Wal::new();
        wal.row(10, DELETE, 20_000);
        wal.running(12, 10, &[10, 11]);
        wal.row(11, DELETE, 20_000);
        wal.row(12, DELETE, 20_000);
        for xid in [10, 11, 12] {
            wal.end(COMMIT, xid, &[]);
        }
        let ended = wal.see(&mut Transactions::new(Limits::default(), false));
        assert_eq!(ended.iter().map(|t| t.is_complete).collect::<Vec<_>>(), [false, false, true]);
    }

    #[test]
    fn what_is_too_much_is_summed_and_told_and_memory_stays_bounded() {
        let mut wal = Wal::new();
        for file in 0..100 {
            wal.row(10, DELETE, 20_000 + 2 * file);
            wal.row(10, DELETE, 20_000 + 2 * file);
        }
        for xid in 20..40 {
            wal.row(xid, DELETE, 20_000);
        }
        wal.end(COMMIT, 10, &[]);
        wal.end(COMMIT, 39, &[]);
        wal.end(COMMIT, 20, &[]);
        let limits = Limits { transactions: 10, tallies: 60, tallies_each: 50 };
        let mut transactions = Transactions::new(limits, true);
        let ended = wal.see(&mut transactions);
        assert_eq!((ended[0].tallies.len(), ended[0].more.deleted, ended[0].rows().deleted), (50, 100, 200));
        assert!(!ended[1].is_complete && counts(&ended[1]).is_empty(), "it found no place");
        assert_eq!(counts(&ended[2]), [(20_000, [0, 1])]);
        assert_eq!(transactions.len(), 8);
    }

    #[test]
    fn ids_wrap_around() {
        assert!(precedes(u32::MAX, 3) && !precedes(3, u32::MAX));
        assert!(precedes(3, 4) && !precedes(4, 3) && precedes(2, 3));
    }
}
