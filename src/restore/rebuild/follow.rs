//! Messages of a change log -> what they mean, transaction by transaction.

use std::collections::HashMap;
use std::sync::Arc;

use super::RebuildError;
use crate::decode::pgoutput::{Message, OldRow, RelationInfo, ReplicaIdentity, Tuple};
use crate::pg::{Lsn, Oid, PgTime, Xid};
use crate::repo::bases::Table;
use crate::repo::changes::walk::Order;
use crate::repo::changes::{Header, Sent};

/// What a table looks like, as the server described it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) oid: Oid,
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) columns: Vec<ShapeColumn>,
    pub(super) identity: ReplicaIdentity,
}

/// A column of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ShapeColumn {
    pub(super) name: String,
    pub(super) is_key: bool,
    pub(super) type_oid: Oid,
}

impl Shape {
    fn of(info: &RelationInfo<'_>) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let schema = if info.schema.is_empty() { "pg_catalog".to_owned() } else { text(info.schema) };
        let columns = info.columns.iter().map(|column| ShapeColumn {
            name: text(column.name),
            is_key: column.key,
            type_oid: column.type_oid,
        });
        let (columns, name) = (columns.collect(), text(info.name));
        Self { oid: info.oid, schema, name, columns, identity: info.identity }
    }

    /// True if the table of a base is this one, with the same columns.
    pub(super) fn is(&self, table: &Table) -> bool {
        self.oid == table.oid
            && (&self.schema, &self.name) == (&table.schema, &table.name)
            && self.columns.iter().map(|column| &column.name).eq(&table.columns)
            && self.columns.iter().map(|column| column.type_oid.0).eq(table.types.iter().copied())
    }

    /// True if the server tells which row is updated or deleted.
    pub(super) fn has_identity(&self) -> bool {
        self.identity == ReplicaIdentity::Full || self.columns.iter().any(|column| column.is_key)
    }

    /// `schema.name`, for people.
    pub(super) fn display_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// A change of rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change<'a> {
    Insert {
        table: Oid,
        new: Tuple<'a>,
    },
    Update {
        table: Oid,
        old: Option<OldRow<'a>>,
        new: Tuple<'a>,
    },
    Delete {
        table: Oid,
        old: OldRow<'a>,
    },
    Truncate {
        tables: crate::decode::pgoutput::Oids<'a>,
        restart_identity: bool,
    },
    /// A message that somebody wrote.
    Message {
        prefix: &'a [u8],
        content: &'a [u8],
    },
}

/// What a message means.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event<'a> {
    /// A transaction begins of which everything follows now.
    Begin { commit: Lsn },
    /// A change by that transaction, or by a part of one that was sent before its commit.
    Change { by: By, change: Change<'a> },
    /// A transaction committed: what was sent of it counts.
    Commit(Commit),
    /// A transaction, or a subtransaction of one, that was sent before its end, is rolled back.
    Abort { top: Xid, sub: Xid },
}

/// Whose change it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct By {
    pub(super) top: Xid,
    pub(super) sub: Xid,
    /// It is not known yet whether it commits.
    pub(super) is_streamed: bool,
}

/// The end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Commit {
    pub(super) xid: Xid,
    pub(super) lsn: Lsn,
    pub(super) end: Lsn,
    pub(super) time: PgTime,
    pub(super) is_streamed: bool,
}

/// Follows the messages of a log, object by object.
#[derive(Debug, Default)]
pub(super) struct Follow {
    order: Order,
    top: Option<Xid>,
    in_stream: bool,
    tables: HashMap<Oid, Arc<Shape>>,
}

impl Follow {
    /// The next object begins. True if whatever is open must be forgotten.
    pub(super) fn begin(&mut self, header: &Header) -> bool {
        let forget = self.order.begin(header);
        if forget {
            (self.top, self.in_stream) = (None, false);
            self.tables.clear();
        }
        forget
    }

    /// What was said last of a table.
    ///
    /// # Errors
    /// If nothing was.
    pub(super) fn table(&self, oid: Oid, at: Lsn) -> Result<&Arc<Shape>, RebuildError> {
        let problem = || RebuildError::Damaged { at, problem: format!("table {oid} is not described") };
        self.tables.get(&oid).ok_or_else(problem)
    }

    /// Takes the next message.
    ///
    /// # Errors
    /// If it cannot be read, or not in this place.
    pub(super) fn see<'a>(&mut self, sent: Sent<'a>) -> Result<Option<Event<'a>>, RebuildError> {
        if !self.order.takes(sent.message) {
            if let Some(relation) = self.order.description(sent.message) {
                self.tables.insert(relation.oid, Arc::new(Shape::of(&relation)));
            }
            return Ok(None);
        }
        let damaged = |problem: String| RebuildError::Damaged { at: sent.at, problem };
        let message = Message::read(sent.message, self.in_stream).map_err(|fault| damaged(fault.to_string()))?;
        let change = |follow: &Self, xid: Option<Xid>, change: Change<'a>| {
            let top = follow.top.ok_or_else(|| damaged("a change outside of transactions".to_owned()))?;
            let by = By { top, sub: xid.unwrap_or(top), is_streamed: follow.in_stream };
            Ok(Some(Event::Change { by, change }))
        };
        match message {
            Message::Begin { xid, commit_lsn, .. } => {
                self.top = Some(xid);
                Ok(Some(Event::Begin { commit: commit_lsn }))
            }
            Message::StreamStart { xid, .. } => {
                (self.top, self.in_stream) = (Some(xid), true);
                Ok(None)
            }
            Message::StreamStop => {
                (self.top, self.in_stream) = (None, false);
                Ok(None)
            }
            Message::Relation { relation, .. } => {
                self.tables.insert(relation.oid, Arc::new(Shape::of(&relation)));
                Ok(None)
            }
            Message::Insert { xid, relation, new } => change(self, xid, Change::Insert { table: relation, new }),
            Message::Update { xid, relation, old, new } => {
                change(self, xid, Change::Update { table: relation, old, new })
            }
            Message::Delete { xid, relation, old } => change(self, xid, Change::Delete { table: relation, old }),
            Message::Truncate { xid, restart_identity, relations, .. } => {
                change(self, xid, Change::Truncate { tables: relations, restart_identity })
            }
            Message::Message { xid, message } if message.transactional => {
                change(self, xid, Change::Message { prefix: message.prefix, content: message.content })
            }
            Message::Message { .. } | Message::Origin { .. } | Message::Type { .. } => Ok(None),
            Message::Commit { lsn, end, time } => {
                let xid = self.top.take().ok_or_else(|| damaged("a commit without a beginning".to_owned()))?;
                Ok(Some(Event::Commit(Commit { xid, lsn, end, time, is_streamed: false })))
            }
            Message::StreamCommit { xid, lsn, end, time } => {
                Ok(Some(Event::Commit(Commit { xid, lsn, end, time, is_streamed: true })))
            }
            Message::StreamAbort { xid, subxid, .. } => Ok(Some(Event::Abort { top: xid, sub: subxid })),
            Message::BeginPrepare(_)
            | Message::Prepare(_)
            | Message::StreamPrepare(_)
            | Message::CommitPrepared { .. }
            | Message::RollbackPrepared { .. } => {
                Err(damaged("a prepared transaction, which we never ask for".to_owned()))
            }
        }
    }
}
