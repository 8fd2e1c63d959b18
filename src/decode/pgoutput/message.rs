//! One message, as the protocol has it.

use super::Fault;
use super::cursor::Cursor;
use crate::pg::{Lsn, Oid, PgTime, Xid};

/// Columns of a table at most (Postgres: `MaxHeapAttributeNumber` in `access/htup_details.h`).
const COLUMNS_MAX: u16 = 1600;

/// A message of `pgoutput`. Names and texts are in the encoding that the connection asked for.
///
/// Within a stream (`Stream*`, protocol 2 and later) messages say in which transaction they belong: `xid`, and that is
/// the subtransaction if there is one. Elsewhere it is `None`, and the transaction is that of the last
/// [`Message::Begin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are named as the protocol names them; what is not plain is said")]
pub enum Message<'a> {
    /// A transaction that has committed begins.
    Begin { commit_lsn: Lsn, time: PgTime, xid: Xid },
    /// It ends.
    Commit { lsn: Lsn, end: Lsn, time: PgTime },
    /// The transaction came from elsewhere, where it committed at `lsn`.
    Origin { lsn: Lsn, name: &'a [u8] },
    /// What a table looks like: before its first change, and again when it may look otherwise.
    Relation { xid: Option<Xid>, relation: RelationInfo<'a> },
    /// A type that is not built in, before a table that uses it.
    Type { xid: Option<Xid>, oid: Oid, schema: &'a [u8], name: &'a [u8] },
    /// A row comes.
    Insert { xid: Option<Xid>, relation: Oid, new: Tuple<'a> },
    /// A row has a new version.
    Update { xid: Option<Xid>, relation: Oid, old: Option<OldRow<'a>>, new: Tuple<'a> },
    /// A row goes.
    Delete { xid: Option<Xid>, relation: Oid, old: OldRow<'a> },
    /// Tables are emptied.
    Truncate { xid: Option<Xid>, cascade: bool, restart_identity: bool, relations: Oids<'a> },
    /// Somebody wrote a message.
    Message { xid: Option<Xid>, message: MessageEmitted<'a> },
    /// Some changes of a transaction that is still open.
    StreamStart { xid: Xid, first: bool },
    /// As much for now.
    StreamStop,
    /// A streamed transaction has committed.
    StreamCommit { xid: Xid, lsn: Lsn, end: Lsn, time: PgTime },
    /// A streamed transaction, or a subtransaction of it, is rolled back. The place and time are told with
    /// `streaming = parallel` (protocol 4).
    StreamAbort { xid: Xid, subxid: Xid, at: Option<(Lsn, PgTime)> },
    /// A transaction that is prepared begins.
    BeginPrepare(Preparation<'a>),
    /// It is prepared.
    Prepare(Preparation<'a>),
    /// A streamed transaction is prepared.
    StreamPrepare(Preparation<'a>),
    /// A prepared transaction has committed.
    CommitPrepared { lsn: Lsn, end: Lsn, time: PgTime, xid: Xid, gid: &'a [u8] },
    /// A prepared transaction was rolled back.
    RollbackPrepared {
        /// The first byte behind the record that prepared it.
        prepare_end: Lsn,
        /// The first byte behind the record that rolled it back.
        end: Lsn,
        prepared: PgTime,
        time: PgTime,
        xid: Xid,
        gid: &'a [u8],
    },
}

/// A `PREPARE TRANSACTION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preparation<'a> {
    /// Where its record begins.
    pub lsn: Lsn,
    /// The first byte behind it.
    pub end: Lsn,
    /// When.
    pub time: PgTime,
    /// The transaction.
    pub xid: Xid,
    /// Its name.
    pub gid: &'a [u8],
}

/// A message that somebody wrote with `pg_logical_emit_message()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageEmitted<'a> {
    /// It counts only if its transaction commits.
    pub transactional: bool,
    /// The first byte behind its record.
    pub lsn: Lsn,
    /// What kind of message it is.
    pub prefix: &'a [u8],
    /// The message.
    pub content: &'a [u8],
}

/// What a table looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationInfo<'a> {
    /// Its OID.
    pub oid: Oid,
    /// Its schema; `pg_catalog` comes as an empty name.
    pub schema: &'a [u8],
    /// Its name.
    pub name: &'a [u8],
    /// What of an old row the WAL has.
    pub identity: ReplicaIdentity,
    /// Its columns, as far as they are published.
    pub columns: Columns<'a>,
}

/// What the WAL has of a row that is updated or deleted (Postgres: `pg_class.relreplident`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The primary key.
    Default,
    /// Nothing.
    Nothing,
    /// The whole row.
    Full,
    /// The columns of an index.
    Index,
}

/// A column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    /// It belongs to what the WAL has of old rows.
    pub key: bool,
    /// Its name.
    pub name: &'a [u8],
    /// Its type's OID.
    pub type_oid: Oid,
    /// Its type's modifier, -1 for none.
    pub type_modifier: i32,
}

/// Columns of a table, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns<'a> {
    count: u16,
    bytes: &'a [u8],
}

/// What is told of a row that is updated or deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldRow<'a> {
    /// `K`: its replica identity; the other columns are null.
    Key(Tuple<'a>),
    /// `O`: all of it, as the replica identity is `FULL`.
    Whole(Tuple<'a>),
}

/// The values of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    bytes: &'a [u8],
}

/// The value of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// `n`.
    Null,
    /// `u`: a large value that an update left as it was, and that is not sent.
    Unchanged,
    /// `t`: in the words of the type's output function.
    Text(&'a [u8]),
    /// `b`: in the bytes of the type's send function.
    Binary(&'a [u8]),
}

/// OIDs of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oids<'a> {
    bytes: &'a [u8],
}

impl<'a> Message<'a> {
    /// Reads a message, all of it. Whether it lies within a stream depends on the messages before it.
    ///
    /// # Errors
    /// If it is not one that `pgoutput` writes.
    pub fn read(bytes: &'a [u8], in_stream: bool) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(bytes);
        let tag = cursor.u8("tag").map_err(|_| Fault::Empty)?;
        let message = Self::read_body(tag, &mut cursor, in_stream)?;
        cursor.end()?;
        Ok(message)
    }

    fn read_body(tag: u8, cursor: &mut Cursor<'a>, in_stream: bool) -> Result<Self, Fault> {
        let xid = |cursor: &mut Cursor<'a>| match in_stream {
            true => cursor.xid("transaction of the change").map(Some),
            false => Ok(None),
        };
        Ok(match tag {
            b'B' => Self::Begin {
                commit_lsn: cursor.lsn("place of the commit")?,
                time: cursor.time("time of the commit")?,
                xid: cursor.xid("transaction")?,
            },
            b'C' => {
                cursor.no_flags("flags of a commit")?;
                let (lsn, end, time) = ending(cursor)?;
                Self::Commit { lsn, end, time }
            }
            b'O' => Self::Origin { lsn: cursor.lsn("origin's position")?, name: cursor.text("origin's name")? },
            b'R' => Self::Relation { xid: xid(cursor)?, relation: RelationInfo::read(cursor)? },
            b'Y' => Self::Type {
                xid: xid(cursor)?,
                oid: cursor.oid("type")?,
                schema: cursor.text("type's schema")?,
                name: cursor.text("type's name")?,
            },
            b'I' => Self::Insert { xid: xid(cursor)?, relation: cursor.oid("table")?, new: new_row(cursor)? },
            b'U' => {
                let (xid, relation) = (xid(cursor)?, cursor.oid("table")?);
                let old = match cursor.rest().first() {
                    Some(b'N') => None,
                    _ => Some(OldRow::read(cursor)?),
                };
                Self::Update { xid, relation, old, new: new_row(cursor)? }
            }
            b'D' => Self::Delete { xid: xid(cursor)?, relation: cursor.oid("table")?, old: OldRow::read(cursor)? },
            b'T' => Self::read_truncate(xid(cursor)?, cursor)?,
            b'M' => Self::Message { xid: xid(cursor)?, message: MessageEmitted::read(cursor)? },
            b'S' => Self::StreamStart { xid: cursor.xid("transaction")?, first: cursor.u8("first of a stream")? == 1 },
            b'E' => Self::StreamStop,
            b'c' => {
                let xid = cursor.xid("transaction")?;
                cursor.no_flags("flags of a commit")?;
                let (lsn, end, time) = ending(cursor)?;
                Self::StreamCommit { xid, lsn, end, time }
            }
            b'A' => {
                let (xid, subxid) = (cursor.xid("transaction")?, cursor.xid("subtransaction")?);
                let at = match cursor.rest() {
                    [] => None,
                    _ => Some((cursor.lsn("place of the abort")?, cursor.time("time of the abort")?)),
                };
                Self::StreamAbort { xid, subxid, at }
            }
            b'b' => Self::BeginPrepare(Preparation::read(cursor)?),
            b'P' => {
                cursor.no_flags("flags of a preparation")?;
                Self::Prepare(Preparation::read(cursor)?)
            }
            b'p' => {
                cursor.no_flags("flags of a preparation")?;
                Self::StreamPrepare(Preparation::read(cursor)?)
            }
            b'K' => {
                cursor.no_flags("flags of a commit")?;
                let (lsn, end, time) = ending(cursor)?;
                Self::CommitPrepared { lsn, end, time, xid: cursor.xid("transaction")?, gid: cursor.text("name")? }
            }
            b'r' => {
                cursor.no_flags("flags of a rollback")?;
                Self::RollbackPrepared {
                    prepare_end: cursor.lsn("end of the preparation")?,
                    end: cursor.lsn("end of the rollback")?,
                    prepared: cursor.time("time of the preparation")?,
                    time: cursor.time("time of the rollback")?,
                    xid: cursor.xid("transaction")?,
                    gid: cursor.text("name")?,
                }
            }
            tag => return Err(Fault::UnknownTag(tag)),
        })
    }

    fn read_truncate(xid: Option<Xid>, cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        let count = cursor.length("number of tables")?;
        let flags = cursor.u8("options of a truncate")?;
        let length = count.checked_mul(4).ok_or(Fault::Truncated("tables"))?;
        let relations = Oids { bytes: cursor.bytes(length, "tables")? };
        Ok(Self::Truncate { xid, cascade: flags & 1 != 0, restart_identity: flags & 2 != 0, relations })
    }
}

/// Where and when a transaction ends.
fn ending(cursor: &mut Cursor<'_>) -> Result<(Lsn, Lsn, PgTime), Fault> {
    Ok((cursor.lsn("place of the commit")?, cursor.lsn("end of the commit")?, cursor.time("time of the commit")?))
}

fn new_row<'a>(cursor: &mut Cursor<'a>) -> Result<Tuple<'a>, Fault> {
    match cursor.u8("kind of row")? {
        b'N' => Tuple::read(cursor),
        _ => Err(Fault::Impossible("the kind of a row")),
    }
}

impl<'a> Preparation<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        Ok(Self {
            lsn: cursor.lsn("place of the preparation")?,
            end: cursor.lsn("end of the preparation")?,
            time: cursor.time("time of the preparation")?,
            xid: cursor.xid("transaction")?,
            gid: cursor.text("name")?,
        })
    }
}

impl<'a> MessageEmitted<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        let transactional = cursor.u8("flags of a message")? & 1 != 0;
        let (lsn, prefix) = (cursor.lsn("place of the message")?, cursor.text("prefix")?);
        let length = cursor.length("length of the message")?;
        Ok(Self { transactional, lsn, prefix, content: cursor.bytes(length, "message")? })
    }
}

impl<'a> RelationInfo<'a> {
    pub(super) fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        Ok(Self {
            oid: cursor.oid("table")?,
            schema: cursor.text("table's schema")?,
            name: cursor.text("table's name")?,
            identity: match cursor.u8("replica identity")? {
                b'd' => ReplicaIdentity::Default,
                b'n' => ReplicaIdentity::Nothing,
                b'f' => ReplicaIdentity::Full,
                b'i' => ReplicaIdentity::Index,
                _ => return Err(Fault::Impossible("the replica identity")),
            },
            columns: Columns::read(cursor)?,
        })
    }
}

impl<'a> Columns<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        let count = column_count(cursor)?;
        let whole = cursor.rest();
        for _ in 0..count {
            Column::read(cursor)?;
        }
        Ok(Self { count, bytes: until(whole, cursor) })
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// True if there is none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The columns in order.
    pub fn iter(&self) -> impl Iterator<Item = Column<'a>> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        (0..self.count).map_while(move |_| Column::read(&mut cursor).ok())
    }
}

impl<'a> Column<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        Ok(Self {
            key: cursor.u8("flags of a column")? & 1 != 0,
            name: cursor.text("column's name")?,
            type_oid: cursor.oid("column's type")?,
            type_modifier: cursor.i32("column's type modifier")?,
        })
    }
}

impl<'a> OldRow<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        match cursor.u8("kind of row")? {
            b'K' => Tuple::read(cursor).map(Self::Key),
            b'O' => Tuple::read(cursor).map(Self::Whole),
            _ => Err(Fault::Impossible("the kind of a row")),
        }
    }
}

impl<'a> Tuple<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        let count = column_count(cursor)?;
        let whole = cursor.rest();
        for _ in 0..count {
            Value::read(cursor)?;
        }
        Ok(Self { count, bytes: until(whole, cursor) })
    }

    /// How many values there are.
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// True if there is none: a table may have no columns.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The values, in the order of the table's columns.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        (0..self.count).map_while(move |_| Value::read(&mut cursor).ok())
    }
}

impl<'a> Value<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        let sized = |cursor: &mut Cursor<'a>| {
            let length = cursor.length("length of a value")?;
            cursor.bytes(length, "value")
        };
        match cursor.u8("kind of value")? {
            b'n' => Ok(Self::Null),
            b'u' => Ok(Self::Unchanged),
            b't' => sized(cursor).map(Self::Text),
            b'b' => sized(cursor).map(Self::Binary),
            _ => Err(Fault::Impossible("the kind of a value")),
        }
    }
}

impl<'a> Oids<'a> {
    /// The OIDs in order.
    pub fn iter(&self) -> impl Iterator<Item = Oid> + use<'a> {
        self.bytes.as_chunks().0.iter().map(|oid| Oid(u32::from_be_bytes(*oid)))
    }
}

fn column_count(cursor: &mut Cursor<'_>) -> Result<u16, Fault> {
    match cursor.u16("number of columns")? {
        count @ 0..=COLUMNS_MAX => Ok(count),
        _ => Err(Fault::Impossible("the number of columns")),
    }
}

/// What of `whole` the cursor has read since it stood at its beginning.
fn until<'a>(whole: &'a [u8], cursor: &Cursor<'a>) -> &'a [u8] {
    let length = whole.len().saturating_sub(cursor.rest().len());
    whole.get(..length).unwrap_or_default()
}
