//! Bytes of WAL in, records and what they mean out. Pure: no socket, file, clock or task.
//!
//! [`Reader`] cuts pages into [`Record`]s and proves each by its checksum; a record lends out its block references and its
//! main data without copying; [`rmgr`] reads the main data of the resource managers that walguard understands. What
//! differs between majors is in [`WalMajor`] and nowhere else.
//!
//! [`pgoutput`] reads logical replication instead, and says what it reads in the same words: a [`Change`].
//!
//! The bytes are untrusted. Every fault is a [`DecodeError`] that says where in the WAL it lies; none is a panic.

#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

pub mod catalog;
pub mod change;
mod checksum;
#[cfg(test)]
mod corpus;
mod cursor;
mod error;
pub mod explain;
pub mod heap_page;
mod image;
mod layout;
mod list;
mod page;
pub mod pgoutput;
mod reader;
mod record;
pub mod rmgr;
pub mod rows;
#[cfg(test)]
pub(crate) mod testing;

pub use change::Change;
pub use error::{DecodeError, Fault};
pub use layout::WalMajor;
pub use list::{Item, List};
pub use page::PageHeader;
pub use reader::{Reader, Source};
pub use record::{Block, Blocks, Image, ImageCompression, Parts, Record, RecordHeader, RmgrId};
