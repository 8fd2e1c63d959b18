//! Postgres -> bytes: the replication connection and what comes over it.
//!
//! ```text
//! conninfo   text of a connection string     -> ConnInfo
//! dial       a host                          -> a socket, encrypted
//! tls        ConnInfo                        -> a rustls client, channel binding
//! wire       bytes of a socket               -> frames, without copying WAL
//! connection ConnInfo                        -> a session: dialled, encrypted, authenticated
//! walsender  commands of the replication protocol, between streams
//! stream     START_REPLICATION               -> WAL
//! base_backup BASE_BACKUP                    -> the tar archives of a base backup
//! feedback   when to tell the server how far we are                       (pure)
//! logical    publications and slot of logical replication
//! spool      WAL -> local segment files, fsynced: the queue of the archiver
//! probe      what of the server's settings would hurt                     (findings for people)
//! ```
//!
//! The protocol is that of "Streaming Replication Protocol" in PostgreSQL's documentation; the facts beyond it were read
//! in `replication/walsender.c` and `backup/basebackup*.c`, or measured.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

mod authentication;
mod base_backup;
mod connection;
mod conninfo;
mod dial;
mod error;
pub mod feedback;
pub mod logical;
pub mod probe;
pub mod spool;
mod stream;
mod tls;
mod walsender;
mod wire;

pub use base_backup::{BackupEvent, BackupStream, BaseBackupOptions, Checkpoint, Tablespace};
pub use connection::connect_sql;
pub(crate) use connection::sql_error;
pub use conninfo::{ChannelBinding, ConnInfo, Environment, Host, SslMode, TargetSessionAttrs};
pub use error::{CaptureError, ServerError};
pub use feedback::Feedback;
pub use stream::{StreamEvent, WalStream};
pub use walsender::{Created, LogicalSlot, SlotInfo, SlotLife, Start, SystemInfo, Walsender};

/// How the agent reaches the cluster: the `[postgres]` table of the settings.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// A libpq connection string: `postgresql://walguard@db1,db2/?target_session_attrs=read-write` or
    /// `host=/run/postgresql user=walguard`. What it leaves out comes from `PG*` environment variables.
    pub conninfo: String,
    /// A file whose first line is the password; read at each connection, so that a rotated password is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// The physical replication slot that holds WAL back until it is archived.
    pub slot: String,
    /// How the agent shows in `pg_stat_replication`, and the name that `synchronous_standby_names` matches. A name in the
    /// connection string wins.
    pub application_name: String,
    /// How long one host may take to accept, encrypt and authenticate a connection. A value in the connection string wins.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub connect_timeout: Duration,
    /// A stream on which nothing was heard for this long is given up (after half of it, the server is asked to reply):
    /// `wal_receiver_timeout` of a standby.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub receive_timeout: Duration,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("conninfo", &conninfo::redact(&self.conninfo))
            .field("password_file", &self.password_file)
            .field("slot", &self.slot)
            .field("application_name", &self.application_name)
            .field("connect_timeout", &self.connect_timeout)
            .field("receive_timeout", &self.receive_timeout)
            .finish()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            conninfo: String::new(),
            password_file: None,
            slot: "walguard".to_owned(),
            application_name: "walguard".to_owned(),
            connect_timeout: Duration::from_secs(10),
            receive_timeout: Duration::from_secs(60),
        }
    }
}
