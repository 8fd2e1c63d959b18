//! Changes in, transactions out: what each did, to which relation, and how destructive it was. Pure: no socket, file,
//! clock or task.

#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

pub mod ddl;
pub mod definitions;
pub mod incident;
pub mod names;
pub mod observer;
pub mod relations;
pub mod rule;
pub mod transaction;
pub mod who;

pub use ddl::{DdlEvent, DdlKind};
pub use definitions::Definitions;
pub use incident::{Incident, Severity, State};
pub use names::{Names, NamesLimits, NamesSnapshot};
pub use observer::Observer;
pub use relations::{Persistence, Relation, RelationKind};
pub use rule::RuleName;
pub use transaction::{Limits, OpenTransaction, Owner, Owners, Tally, Transaction, Transactions};
pub use who::{Actor, Who, WhoSource};
