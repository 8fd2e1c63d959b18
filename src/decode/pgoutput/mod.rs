//! The messages of logical replication, as the output plugin `pgoutput` writes them, protocol versions 1 to 4.
//!
//! [`Message`] mirrors the protocol, message by message. A [`Decoder`] sees the messages of one connection in order and
//! turns them into the [`Change`](super::Change)s that the physical WAL is turned into, so that whoever counts rows and
//! watches for damage need not know which of the two it looks at. What the two can know differs: a physical change names a
//! file and a page, a logical one the OID of the table, and rows that an `UPDATE` moves to another partition are here a
//! row deleted and a row inserted.
//!
//! (Postgres: `replication/logical/proto.c`, `replication/pgoutput/pgoutput.c`.)

mod cursor;
mod decoder;
mod error;
mod message;
#[cfg(test)]
mod tests;

pub use decoder::Decoder;
pub use error::{Fault, MessageError};
pub use message::{
    Column, Columns, Message, MessageEmitted, Oids, OldRow, Preparation, RelationInfo, ReplicaIdentity, Tuple, Value,
};
