//! Messages of logical replication in, finished transactions out: what [`Observer`](super::Observer) is for the WAL itself.
//!
//! Tables are named by the messages themselves. Of definitions the stream tells nothing but `TRUNCATE`; of others comes
//! what the guard writes, as messages of the transaction ([`Transaction::messages`]), and what the agent found in the
//! catalogs and wrote into the WAL itself ([`DefinitionsTold`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::Timestamp;

use super::definitions::{Definitions, MESSAGE_PREFIX};
use super::{DdlEvent, DdlKind, Limits, Owner, Owners, Persistence, Relation, RelationKind, Transaction, Transactions};
use crate::decode::change::Action;
use crate::decode::pgoutput::{Decoder, Message, MessageError, RelationInfo};
use crate::pg::{Lsn, Oid, PgTime, RelFile, Xid};

/// Tables whose names are kept: some 200 bytes each. Rows of more are counted, and told with their OID.
const TABLES_MAX: usize = 65_536;

/// Messages with this prefix hold a [`DefinitionsTold`] as JSON.
pub const DEFINITIONS_PREFIX: &[u8] = b"walguard.definitions";

/// The longest such message: a hundred events, each with three names of 63 bytes that may all be escaped.
const DEFINITIONS_BYTES_MAX: usize = 256 << 10;

/// What became of definitions, as a look at the catalogs found it. Whoever can run SQL can write such a message; it makes
/// an incident, and nothing rests on it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DefinitionsTold {
    /// The version of this: 1.
    pub v: u32,
    /// When the catalogs were looked at before, by the server's clock: it happened later ...
    pub since: Timestamp,
    /// ... and before this.
    pub at: Timestamp,
    /// What happened to tables.
    pub events: Vec<EventTold>,
    /// Other kinds of definitions that changed, and the number that stands for them now
    /// ([`Definitions::others`](crate::capture::logical::Definitions)).
    pub others: BTreeMap<String, String>,
}

/// Something that happened to a table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EventTold {
    /// What.
    pub kind: DdlKind,
    /// The table.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The column that went, or the name that it had.
    pub object: Option<String>,
    /// What the table looks like now ([`TableDefinition::digest`](crate::capture::logical::TableDefinition::digest)); `None`
    /// if it is gone.
    pub digest: Option<String>,
}

/// Follows the messages of one connection.
#[derive(Debug)]
pub struct LogicalObserver {
    decoder: Decoder,
    transactions: Transactions,
    definitions: Definitions,
    tables: Tables,
}

/// The tables of one database, by their OIDs.
#[derive(Debug)]
struct Tables {
    database: Oid,
    database_name: String,
    named: HashMap<Oid, Arc<Relation>>,
}

impl Owners for Tables {
    fn owner(&self, file: RelFile, _by: Option<Xid>) -> Owner {
        self.named.get(&Oid(file.number)).map_or(Owner::Unknown, |relation| Owner::Relation(relation.clone()))
    }
}

impl Tables {
    fn relation(&self, oid: Oid, schema: &[u8], name: &[u8]) -> Relation {
        let schema = if schema.is_empty() { b"pg_catalog" } else { schema };
        Relation {
            database: self.database,
            oid,
            database_name: self.database_name.clone(),
            schema: String::from_utf8_lossy(schema).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            kind: RelationKind::Table,
            persistence: Persistence::Permanent,
            owner: None,
        }
    }

    /// What a message of the agent tells; nothing if it cannot be read.
    fn told(&self, at: Lsn, content: &[u8]) -> Vec<DdlEvent> {
        if content.len() > DEFINITIONS_BYTES_MAX {
            return Vec::new();
        }
        let Ok(DefinitionsTold { v: 1, events, .. }) = serde_json::from_slice(content) else { return Vec::new() };
        let event = |told: EventTold| {
            let relation = self.relation(Oid(told.oid), told.schema.as_bytes(), told.name.as_bytes());
            let (relation, database) = (Some(Arc::new(relation)), self.database);
            DdlEvent { kind: told.kind, lsn: at, database, relation, object: told.object }
        };
        events.into_iter().map(event).collect()
    }

    fn note(&mut self, info: &RelationInfo<'_>) {
        if self.named.len() < TABLES_MAX || self.named.contains_key(&info.oid) {
            let relation = self.relation(info.oid, info.schema, info.name);
            self.named.insert(info.oid, Arc::new(relation));
        }
    }
}

/// Tallies name a table by what stands for its file.
impl Owners for LogicalObserver {
    fn owner(&self, file: RelFile, by: Option<Xid>) -> Owner {
        self.tables.owner(file, by)
    }
}

impl LogicalObserver {
    /// Begins with the first message of a connection to a slot of this database.
    pub fn new(database: Oid, database_name: &str) -> Self {
        Self {
            decoder: Decoder::new(database),
            // A transaction is sent from its first change on, whenever that was.
            transactions: Transactions::new(Limits::default(), true),
            definitions: Definitions::new(),
            tables: Tables { database, database_name: database_name.to_owned(), named: HashMap::new() },
        }
    }

    /// Takes the next message; gives the transaction that ends with it. `at` and `sent` are the position and the time that
    /// came with the message.
    ///
    /// # Errors
    /// If the message is not one that `pgoutput` writes, or not in this place. Begin anew then, with a new connection.
    pub fn see(&mut self, at: Lsn, sent: PgTime, message: &[u8]) -> Result<Option<Transaction>, MessageError> {
        if message.first() == Some(&b'R')
            && let Ok(Message::Relation { relation, .. }) = Message::read(message, self.decoder.is_in_stream())
        {
            self.tables.note(&relation);
        }
        let Some(change) = self.decoder.read(at, sent, message)? else { return Ok(None) };
        let mut ended = self.transactions.see(&change, &self.tables);
        match &change.action {
            Action::Ended(end) => {
                let done = self.definitions.end(end);
                if let Some(transaction) = &mut ended {
                    transaction.ddl = done.events;
                    transaction.messages = done.messages;
                    transaction.is_complete &= done.left_out == 0;
                }
            }
            Action::Truncated(truncate) => {
                let Some(xid) = change.xid else { return Ok(ended) };
                for oid in truncate.relations.iter() {
                    let relation = self.tables.named.get(&oid).cloned();
                    // A truncate comes behind the descriptions of its tables.
                    let relation = relation.unwrap_or_else(|| Arc::new(self.tables.relation(oid, b"", b"")));
                    self.definitions.note(
                        xid,
                        DdlEvent {
                            kind: DdlKind::Truncate,
                            lsn: at,
                            database: self.tables.database,
                            relation: Some(relation),
                            object: None,
                        },
                    );
                }
            }
            Action::Message(message) if message.transactional && message.prefix == MESSAGE_PREFIX => {
                if let Some(xid) = change.xid {
                    self.definitions.see_message(xid, message.content);
                }
            }
            Action::Message(message) if message.transactional && message.prefix == DEFINITIONS_PREFIX => {
                if let Some(xid) = change.xid {
                    for event in self.tables.told(at, message.content) {
                        self.definitions.note(xid, event);
                    }
                }
            }
            _ => {}
        }
        Ok(ended)
    }

    /// Takes what was said of a table in messages that are not to be seen themselves.
    pub fn describe(&mut self, info: &RelationInfo<'_>) {
        self.tables.note(info);
    }

    /// The transactions of which a part was sent before their end.
    pub const fn transactions(&self) -> &Transactions {
        &self.transactions
    }

    /// What they did to definitions, and the guard's messages.
    pub const fn definitions(&self) -> &Definitions {
        &self.definitions
    }

    /// What was said last of a table.
    pub fn relation(&self, oid: Oid) -> Option<RelationInfo<'_>> {
        self.decoder.relation(oid)
    }

    /// True if no transaction or stream is half read.
    pub const fn is_between_transactions(&self) -> bool {
        self.decoder.is_between_transactions()
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const TABLE: u32 = 16_400;

    fn number(tag: u8, numbers: &[&[u8]]) -> Vec<u8> {
        [&[tag], numbers.concat().as_slice()].concat()
    }

    fn begin(xid: u32) -> Vec<u8> {
        number(b'B', &[&0x200_u64.to_be_bytes(), &5_i64.to_be_bytes(), &xid.to_be_bytes()])
    }

    fn commit() -> Vec<u8> {
        number(b'C', &[&[0], &0x200_u64.to_be_bytes(), &0x230_u64.to_be_bytes(), &5_i64.to_be_bytes()])
    }

    /// One column, `id`, which is the key.
    fn relation(in_stream: Option<u32>) -> Vec<u8> {
        let xid = in_stream.map(u32::to_be_bytes);
        let xid: &[u8] = xid.as_ref().map_or(&[], |xid| xid);
        let column: &[u8] = b"\x01id\0\x00\x00\x00\x17\xff\xff\xff\xff";
        number(b'R', &[xid, &TABLE.to_be_bytes(), b"public\0orders\0d", &1_u16.to_be_bytes(), column])
    }

    fn delete(in_stream: Option<u32>) -> Vec<u8> {
        let xid = in_stream.map(u32::to_be_bytes);
        let xid: &[u8] = xid.as_ref().map_or(&[], |xid| xid);
        number(b'D', &[xid, &TABLE.to_be_bytes(), b"K", &1_u16.to_be_bytes(), b"t", &1_u32.to_be_bytes(), b"7"])
    }

    fn truncate() -> Vec<u8> {
        number(b'T', &[&1_u32.to_be_bytes(), &[0], &TABLE.to_be_bytes()])
    }

    fn see(observer: &mut LogicalObserver, messages: &[Vec<u8>]) -> Vec<Transaction> {
        let mut ended = Vec::new();
        for message in messages {
            ended.extend(observer.see(Lsn::new(0x100), PgTime::from_micros(9), message).unwrap());
        }
        ended
    }

    #[test]
    fn rows_and_truncates_are_told_with_the_name_of_their_table() {
        let mut observer = LogicalObserver::new(Oid(5), "shop");
        let messages = [begin(700), relation(None), delete(None), delete(None), truncate(), commit()];
        let [ended] = see(&mut observer, &messages).try_into().unwrap();
        assert_eq!((ended.xid, ended.lsn, ended.end), (Xid::new(700), Lsn::new(0x200), Lsn::new(0x230)));
        assert!(ended.committed && ended.is_complete);
        let [tally] = ended.tallies.as_slice() else { panic!("{ended:?}") };
        assert_eq!(tally.relation.as_ref().unwrap().full_name(), "shop.public.orders");
        assert_eq!(tally.counts.deleted, 2);
        let [event] = ended.ddl.as_slice() else { panic!("{ended:?}") };
        assert_eq!((event.kind, event.relation.as_ref().unwrap().oid), (DdlKind::Truncate, Oid(TABLE)));
        assert!(observer.transactions().is_empty());
    }

    #[test]
    fn what_is_streamed_before_the_commit_shows_as_open() {
        let mut observer = LogicalObserver::new(Oid(5), "shop");
        let start = number(b'S', &[&700_u32.to_be_bytes(), &[1]]);
        // By a subtransaction.
        let messages = [start, relation(Some(701)), delete(Some(701)), delete(Some(701)), vec![b'E']];
        assert_eq!(see(&mut observer, &messages), []);
        let open: Vec<_> = observer.transactions().open().filter(|open| open.tallies().count() > 0).collect();
        let [open] = open.as_slice() else { panic!("{open:?}") };
        assert_eq!((open.xid, open.top), (Xid::new(701).unwrap(), Xid::new(700)));
        let (file, counts) = open.tallies().next().unwrap();
        assert_eq!(counts.deleted, 2);
        assert!(matches!(observer.owner(file, None), Owner::Relation(relation) if relation.name == "orders"));
        let ending = [&[0][..], &0x200_u64.to_be_bytes(), &0x230_u64.to_be_bytes(), &5_i64.to_be_bytes()].concat();
        let commit = number(b'c', &[&700_u32.to_be_bytes(), &ending]);
        let [ended] = see(&mut observer, &[commit]).try_into().unwrap();
        assert_eq!((ended.xid, ended.tallies[0].counts.deleted), (Xid::new(700), 2));
    }

    #[test]
    fn what_the_agent_found_in_the_catalogs_comes_back_in_its_place() {
        let event = |kind, name: &str| {
            let (schema, name) = ("public".into(), name.into());
            EventTold { kind, oid: 7, schema, name, object: None, digest: None }
        };
        let told = DefinitionsTold {
            v: 1,
            since: Timestamp::UNIX_EPOCH,
            at: Timestamp::UNIX_EPOCH,
            events: vec![event(DdlKind::DropTable, "a"), event(DdlKind::Create, "b")],
            others: BTreeMap::new(),
        };
        let emit = |content: &[u8]| {
            let length = u32::try_from(content.len()).unwrap().to_be_bytes();
            number(b'M', &[&[1], &0x180_u64.to_be_bytes(), DEFINITIONS_PREFIX, b"\0", &length, content])
        };
        let mut observer = LogicalObserver::new(Oid(5), "shop");
        let message = emit(&serde_json::to_vec(&told).unwrap());
        let [ended] = see(&mut observer, &[begin(700), message, commit()]).try_into().unwrap();
        let kinds: Vec<_> = ended.ddl.iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [DdlKind::DropTable], "a table of the same OID that is gone again was never there");
        assert_eq!(ended.ddl[0].relation.as_ref().unwrap().full_name(), "shop.public.a");
        let [ended] = see(&mut observer, &[begin(700), emit(b"{"), commit()]).try_into().unwrap();
        assert_eq!(ended.ddl, []);
    }

    #[test]
    fn bytes_that_are_no_message_are_an_error() {
        let mut observer = LogicalObserver::new(Oid(5), "shop");
        for message in [&b""[..], b"x", b"C", b"D\0\0\x40\x10K"] {
            assert!(observer.see(Lsn::new(1), PgTime::from_micros(0), message).is_err(), "{message:?}");
        }
    }
}
