//! The messages of one connection, in order, as changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::cursor::Cursor;
use super::message::{Message, OldRow, Preparation, RelationInfo};
use super::{Fault, MessageError};
use crate::decode::List;
use crate::decode::change::{Action, Change, RelationRow, RowKind};
use crate::decode::rmgr::heap;
use crate::decode::rmgr::invalidation::Invalidations;
use crate::decode::rmgr::message::LogicalMessage;
use crate::decode::rmgr::xact::{Origin, Prepare, TransactionEnd};
use crate::pg::{Lsn, Oid, PgTime, Xid};

/// Bytes of descriptions of tables that are kept. One of a dozen columns takes some 300 bytes, so 50,000 tables fit;
/// changes of more tables are counted all the same, only their names must come from elsewhere.
const RELATIONS_BYTES_MAX: usize = 16 << 20;

/// Streamed transactions and subtransactions of theirs that are remembered: some 10 MiB. Changes of more of them still
/// say whose they are, but the end of their transaction no longer lists them.
const XIDS_MAX: usize = 1 << 20;

/// Turns the messages of one replication connection into changes.
///
/// The transaction that a message belongs to is often told by an earlier one, so every message must be seen, in order.
/// After an error, and for a new connection, a new decoder begins: Postgres, too, describes its tables again.
///
/// What a change says beyond the protocol: a row's [`Change::end`] is its [`Change::lsn`]; the time of a streamed abort is
/// the time at which its message was sent unless `streaming = parallel` tells the real one; the time of a transaction that
/// came from elsewhere is that of its commit *there*.
#[derive(Debug)]
pub struct Decoder {
    database: Oid,
    place: Place,
    /// Streamed transactions that have not ended.
    streams: BTreeMap<Xid, Stream>,
    /// Entries in `streams` and their subtransactions.
    xids: usize,
    /// What was said last of each table: a `Relation` message without tag and transaction.
    relations: HashMap<Oid, Box<[u8]>>,
    relations_bytes: usize,
    /// Numbers in the byte order in which the WAL has them, lent out with a change.
    lent: Vec<u8>,
}

/// Where in the protocol the next message stands.
#[derive(Clone, Copy, Debug)]
enum Place {
    Outside,
    /// Between `Begin` and `Commit`.
    Transaction {
        xid: Xid,
        /// Where `Begin` said that the commit is.
        commit_lsn: Lsn,
        origin: Option<Lsn>,
    },
    /// Between `BeginPrepare` and `Prepare`.
    Preparing {
        xid: Xid,
        origin: Option<Lsn>,
    },
    /// Between `StreamStart` and `StreamStop`.
    Stream {
        top: Xid,
    },
}

#[derive(Debug, Default)]
struct Stream {
    subxids: BTreeSet<Xid>,
    origin: Option<Lsn>,
}

/// Where a message came from.
#[derive(Clone, Copy, Debug)]
struct Envelope {
    at: Lsn,
    sent: PgTime,
}

impl Decoder {
    /// A decoder for a new connection to a slot of this database.
    pub fn new(database: Oid) -> Self {
        Self {
            database,
            place: Place::Outside,
            streams: BTreeMap::new(),
            xids: 0,
            relations: HashMap::new(),
            relations_bytes: 0,
            lent: Vec::new(),
        }
    }

    /// What was said last of a table; `None` if it has had no change, or if too many tables were described.
    pub fn relation(&self, oid: Oid) -> Option<RelationInfo<'_>> {
        RelationInfo::read(&mut Cursor::new(self.relations.get(&oid)?)).ok()
    }

    /// True if the next message begins something new: no transaction or stream is half read.
    pub const fn is_between_transactions(&self) -> bool {
        matches!(self.place, Place::Outside)
    }

    /// True if the next message is told with its transaction, as those between `StreamStart` and `StreamStop` are.
    pub const fn is_in_stream(&self) -> bool {
        matches!(self.place, Place::Stream { .. })
    }

    /// Reads the next message: what it changes, or `None` if it only prepares for messages to come. `at` and `sent` are
    /// the position and the time that Postgres sent with it.
    ///
    /// # Errors
    /// If the message is not one that `pgoutput` writes, or not in this place.
    pub fn read<'a>(
        &'a mut self,
        at: Lsn,
        sent: PgTime,
        message: &'a [u8],
    ) -> Result<Option<Change<'a>>, MessageError> {
        let in_stream = matches!(self.place, Place::Stream { .. });
        let read = Message::read(message, in_stream).and_then(|read| self.see(Envelope { at, sent }, message, read));
        read.map_err(|fault| MessageError { at, fault })
    }

    fn see<'a>(
        &'a mut self,
        envelope: Envelope,
        bytes: &[u8],
        message: Message<'a>,
    ) -> Result<Option<Change<'a>>, Fault> {
        let Envelope { at, sent } = envelope;
        Ok(match message {
            Message::Begin { commit_lsn, xid, .. } => {
                self.enter("a begin", Place::Transaction { xid, commit_lsn, origin: None })?;
                None
            }
            Message::BeginPrepare(Preparation { xid, .. }) => {
                self.enter("a begin of a prepared transaction", Place::Preparing { xid, origin: None })?;
                None
            }
            Message::StreamStart { xid, .. } => {
                self.enter("a stream", Place::Stream { top: xid })?;
                if self.xids < XIDS_MAX && !self.streams.contains_key(&xid) {
                    self.xids += 1;
                    self.streams.insert(xid, Stream::default());
                }
                None
            }
            Message::StreamStop => match self.place {
                Place::Stream { .. } => {
                    self.place = Place::Outside;
                    None
                }
                _ => return Err(Fault::OutsideTransaction("the end of a stream")),
            },
            Message::Origin { lsn, .. } => {
                self.set_origin(lsn)?;
                None
            }
            Message::Relation { relation, .. } => {
                self.describe(relation.oid, bytes, matches!(self.place, Place::Stream { .. }));
                None
            }
            Message::Type { .. } => None,
            Message::Insert { xid, relation, .. } => Some(self.row(at, xid, relation, RowKind::Insert)?),
            Message::Update { xid, relation, .. } => Some(self.row(at, xid, relation, RowKind::Update)?),
            Message::Delete { xid, relation, old: OldRow::Key(_) | OldRow::Whole(_) } => {
                Some(self.row(at, xid, relation, RowKind::Delete)?)
            }
            Message::Truncate { xid, cascade, restart_identity, relations } => {
                let (xid, top_xid) = self.whose("a truncate", xid)?;
                self.lend(relations.iter().map(|oid| oid.0));
                let flags = u8::from(cascade) | u8::from(restart_identity) << 1;
                let relations = List::new(&self.lent, 4);
                let action = Action::Truncated(heap::Truncate { database: self.database, flags, relations });
                Some(Change { lsn: at, end: at, xid: Some(xid), top_xid, action })
            }
            Message::Message { xid, message } => {
                let (xid, top_xid) = match message.transactional {
                    true => self.whose("a message of a transaction", xid).map(|(xid, top)| (Some(xid), top))?,
                    false => (None, None),
                };
                let action = Action::Message(LogicalMessage {
                    database: self.database,
                    transactional: message.transactional,
                    prefix: message.prefix,
                    content: message.content,
                });
                Some(Change { lsn: at, end: message.lsn, xid, top_xid, action })
            }
            Message::Commit { lsn, end, time } => {
                let Place::Transaction { xid, commit_lsn, origin } = self.place else {
                    return Err(Fault::OutsideTransaction("a commit"));
                };
                if commit_lsn != lsn {
                    return Err(Fault::Impossible("a commit elsewhere than its transaction's beginning said"));
                }
                self.place = Place::Outside;
                let ended = TransactionEnd { origin: from(origin, time), ..TransactionEnd::new(true, time, Some(xid)) };
                Some(Change { lsn, end, xid: Some(xid), top_xid: None, action: Action::Ended(ended) })
            }
            Message::StreamCommit { xid, lsn, end, time } => {
                self.outside("the commit of a stream")?;
                let origin = self.close(xid);
                let (origin, subxacts) = (from(origin, time), List::new(&self.lent, 4));
                let ended = TransactionEnd { origin, subxacts, ..TransactionEnd::new(true, time, Some(xid)) };
                let action = Action::Ended(ended);
                Some(Change { lsn, end, xid: Some(xid), top_xid: None, action })
            }
            Message::StreamAbort { xid: top, subxid, at: told } => {
                self.outside("the abort of a stream")?;
                let (end, time) = told.unwrap_or((at, sent));
                let is_whole = subxid == top;
                if is_whole {
                    self.close(top);
                } else {
                    self.lent.clear();
                    let removed = self.streams.get_mut(&top).is_some_and(|stream| stream.subxids.remove(&subxid));
                    self.xids -= usize::from(removed);
                }
                let subxacts = List::new(&self.lent, 4);
                let ended = TransactionEnd { subxacts, ..TransactionEnd::new(false, time, Some(subxid)) };
                let top_xid = (!is_whole).then_some(top);
                Some(Change { lsn: at, end, xid: Some(subxid), top_xid, action: Action::Ended(ended) })
            }
            Message::Prepare(preparation) => {
                let Place::Preparing { xid, origin } = self.place else {
                    return Err(Fault::OutsideTransaction("a preparation"));
                };
                if preparation.xid != xid {
                    return Err(Fault::OtherTransaction { found: preparation.xid, expected: xid });
                }
                self.place = Place::Outside;
                self.lent.clear();
                Some(self.prepared(&preparation, origin))
            }
            Message::StreamPrepare(preparation) => {
                self.outside("the preparation of a stream")?;
                let origin = self.close(preparation.xid);
                Some(self.prepared(&preparation, origin))
            }
            Message::CommitPrepared { lsn, end, time, xid, gid } => {
                self.outside("the commit of a prepared transaction")?;
                let ended = TransactionEnd::new(true, time, Some(xid));
                let action = Action::Ended(TransactionEnd { prepared: true, gid: Some(gid), ..ended });
                Some(Change { lsn, end, xid: None, top_xid: None, action })
            }
            Message::RollbackPrepared { end, time, xid, gid, .. } => {
                self.outside("the rollback of a prepared transaction")?;
                let ended = TransactionEnd::new(false, time, Some(xid));
                let action = Action::Ended(TransactionEnd { prepared: true, gid: Some(gid), ..ended });
                Some(Change { lsn: at, end, xid: None, top_xid: None, action })
            }
        })
    }

    const fn outside(&self, what: &'static str) -> Result<(), Fault> {
        match self.place {
            Place::Outside => Ok(()),
            _ => Err(Fault::WithinTransaction(what)),
        }
    }

    fn enter(&mut self, what: &'static str, place: Place) -> Result<(), Fault> {
        self.outside(what)?;
        self.place = place;
        Ok(())
    }

    /// The transaction, or subtransaction, that does what is told here, and its top-level transaction if that is known to
    /// be another or to be still open.
    fn whose(&mut self, what: &'static str, xid: Option<Xid>) -> Result<(Xid, Option<Xid>), Fault> {
        match (self.place, xid) {
            (Place::Stream { top }, Some(xid)) => {
                if xid == top {
                    return Ok((top, None));
                }
                if self.xids < XIDS_MAX
                    && let Some(stream) = self.streams.get_mut(&top)
                {
                    self.xids += usize::from(stream.subxids.insert(xid));
                }
                Ok((xid, Some(top)))
            }
            (Place::Transaction { xid, .. } | Place::Preparing { xid, .. }, _) => Ok((xid, None)),
            _ => Err(Fault::OutsideTransaction(what)),
        }
    }

    fn row(&mut self, at: Lsn, xid: Option<Xid>, relation: Oid, kind: RowKind) -> Result<Change<'_>, Fault> {
        let (xid, top_xid) = self.whose("a row", xid)?;
        let action = Action::RelationRow(RelationRow { database: self.database, relation, kind });
        Ok(Change { lsn: at, end: at, xid: Some(xid), top_xid, action })
    }

    fn set_origin(&mut self, lsn: Lsn) -> Result<(), Fault> {
        match &mut self.place {
            Place::Transaction { origin, .. } | Place::Preparing { origin, .. } => *origin = Some(lsn),
            Place::Stream { top } => {
                if let Some(stream) = self.streams.get_mut(top) {
                    stream.origin = Some(lsn);
                }
            }
            Place::Outside => return Err(Fault::OutsideTransaction("an origin")),
        }
        Ok(())
    }

    /// A preparation, with the subtransactions that are lent.
    fn prepared<'a>(&'a self, preparation: &Preparation<'a>, origin: Option<Lsn>) -> Change<'a> {
        let Preparation { lsn, end, time, xid, gid } = *preparation;
        let action = Action::Prepared(Prepare {
            xid: Some(xid),
            database: self.database,
            time,
            owner: Oid(0),
            gid,
            origin: from(origin, time),
            subxacts: List::new(&self.lent, 4),
            commit_files: List::empty(),
            abort_files: List::empty(),
            commit_stats: List::empty(),
            abort_stats: List::empty(),
            invalidations: Invalidations::default(),
        });
        Change { lsn, end, xid: Some(xid), top_xid: None, action }
    }

    /// Keeps what a `Relation` message says.
    fn describe(&mut self, oid: Oid, message: &[u8], in_stream: bool) {
        let description = message.get(if in_stream { 5 } else { 1 }..).unwrap_or_default();
        let before = self.relations.get(&oid).map_or(0, |before| before.len());
        let after = self.relations_bytes - before + description.len();
        if after <= RELATIONS_BYTES_MAX {
            self.relations_bytes = after;
            self.relations.insert(oid, description.into());
        } else {
            // Better no name than an old one.
            self.relations_bytes -= before;
            self.relations.remove(&oid);
        }
    }

    /// Forgets a streamed transaction that ends, lends its subtransactions, and gives where it came from.
    fn close(&mut self, xid: Xid) -> Option<Lsn> {
        let Stream { subxids, origin } = self.streams.remove(&xid).map_or_else(Stream::default, |stream| {
            self.xids -= 1 + stream.subxids.len();
            stream
        });
        self.lend(subxids.iter().map(|xid| xid.get()));
        origin
    }

    fn lend(&mut self, numbers: impl Iterator<Item = u32>) {
        self.lent.clear();
        self.lent.extend(numbers.flat_map(u32::to_le_bytes));
    }
}

fn from(origin: Option<Lsn>, time: PgTime) -> Option<Origin> {
    origin.map(|lsn| Origin { lsn, time })
}
