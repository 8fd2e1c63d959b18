//! Changes in, transactions out: what each did, to which relation, and how destructive it was. Pure: no socket, file,
//! clock or task.

#![deny(clippy::indexing_slicing, clippy::unwrap_used)]

pub mod baseline;
mod damage;
pub mod ddl;
pub mod definitions;
pub mod detector;
pub mod incident;
mod judge;
mod judged;
pub mod live_rows;
pub mod logical;
pub mod names;
pub mod observer;
pub mod pattern;
pub mod relations;
pub mod rule;
pub mod running;
#[cfg(test)]
mod scenarios;
pub mod silence;
#[cfg(test)]
mod testing;
pub mod transaction;
pub mod who;
pub mod window;

pub use ddl::{DdlEvent, DdlKind};
pub use definitions::Definitions;
pub use detector::Detector;
pub use incident::{Incident, Severity, State};
pub use logical::LogicalObserver;
pub use names::{Names, NamesLimits, NamesSnapshot};
pub use observer::Observer;
pub use relations::{Persistence, Relation, RelationKind};
pub use rule::{Config, RuleName};
pub use running::Running;
pub use transaction::{Limits, OpenTransaction, Owner, Owners, Tally, Transaction, Transactions};
pub use who::{Actor, Who, WhoSource};
