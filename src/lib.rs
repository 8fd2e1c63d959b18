//! walguard protects a PostgreSQL cluster: it streams the cluster's WAL, keeps it compressed and off-site next to base
//! backups, understands it as it passes, tells people of damage and who did it, and rebuilds the database as it was at any
//! moment since the oldest backup.
//!
//! ```text
//!                    replication connection                         one loop each, under `supervisor`
//!  +----------+  XLogData  +---------+ append +-----------+  read  +---------+   put    +------------+
//!  | Postgres | ---------> | capture | -----> |   spool   | -----> | archive | -------> | repository |  S3 or local
//!  | walsender| <--------- |         | fsync  +-----------+   |    +---------+          | write-once |
//!  +----------+  feedback: flush = archived         |         |                         +------------+
//!       ^                                            \  read  v    +--------+  indexes, names   ^  |
//!       |  SQL: names, row counts, who is at work     `------> scan| decode | -----------------'|  |
//!       +--------------------------------------------------------->| detect |  incidents        |  |
//!                                                                  +--------+ ------------------'  |
//!                                                                      `-----> notify -> people    |
//!  +----------+  base backup extracted, WAL fetched, replay watched to the exact target            |
//!  | restored | <-------------------------------- restore <---------------------------------------+
//!  +----------+
//! ```
//!
//! The modules below stand in the order in which data flows. A module imports only modules that stand before it, and
//! [`pg`]; `tests/tidy.rs` checks that.

pub mod atomic_file;
pub mod backoff;
pub mod capture;
pub mod decode;
pub mod detect;
pub mod guard;
pub mod notify;
pub mod pg;
pub mod progress;
pub mod repo;
pub mod restore;
pub mod serve;
pub mod settings;
pub mod supervisor;

/// The protobuf messages of `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated; the fields are documented in `proto/`")]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/walguard.v1.rs"));
}
