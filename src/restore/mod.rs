//! The way back: from a target in people's words to a running server that is proved to stand exactly there.

mod ahead;
pub mod binaries;
mod compare;
pub mod config;
mod control;
pub mod directory;
mod disk;
pub mod drill;
pub mod error;
pub mod extract;
pub mod handover;
mod instance;
pub mod loss;
mod pages;
mod path;
pub mod plan;
pub mod proof;
pub mod rebuild;
pub mod recovery;
pub mod run;
mod scan;
mod search;
mod standby;
mod state;
pub mod target;
mod tuning;
pub mod wal_fetch;

pub use ahead::PlacedWal;
pub use config::Config;
pub use error::RestoreError;
pub use instance::Listen;
pub use target::Target;
