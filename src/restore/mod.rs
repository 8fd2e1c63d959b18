//! The way back: from a target in people's words to a running server that is proved to stand exactly there.

pub mod binaries;
pub mod directory;
pub mod error;
pub mod extract;
mod instance;
pub mod loss;
mod path;
pub mod plan;
pub mod recovery;
pub mod run;
mod scan;
mod search;
pub mod target;
pub mod wal_fetch;

pub use error::RestoreError;
pub use instance::Listen;
pub use target::Target;
