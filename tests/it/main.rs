//! Integration tests: real PostgreSQL, real S3 protocol, the real program. A module per behaviour.
#![allow(clippy::large_futures, reason = "a test's stack is its own")]

mod agent;
mod archive;
mod archived_wal;
mod backup;
mod capture_base_backup;
mod capture_connect;
mod capture_stream;
mod check;
mod crash_table;
mod decode;
mod decode_counts;
mod decode_parity;
mod definitions;
mod demo;
mod durability;
mod expire;
mod harness;
mod harness_itself;
mod init;
mod kept_repository;
mod ledger;
mod list;
mod pgoutput;
mod restore_by_hand;
mod restore_places;
mod restore_plans;
mod restore_targets;
mod restore_timeline;
mod store_conformance;
mod store_object_lock;
mod sync_commit;
mod verify;
mod wal_explain;
mod wal_fetch;
mod who;
