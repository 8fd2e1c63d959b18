//! What a server says of itself, kept with its backups.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::capture::CaptureError;
use crate::capture::Walsender;
use crate::pg::SegmentSize;
use crate::pg::ServerVersion;
use crate::pg::SystemId;
use crate::repo::cluster::ClusterIdentity;
use crate::repo::cluster::FORMAT;

/// Settings kept for a restore. A standby refuses to start with less than its primary's `max_*`; the files may lie
/// outside of the data directory and are then not in the backup; the libraries must be there; and the page size must be
/// the one that this program knows.
const SETTINGS: [&str; 18] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
    "wal_segment_size",
    "wal_level",
    "data_checksums",
    "block_size",
    "data_directory",
    "data_directory_mode",
    "config_file",
    "hba_file",
    "ident_file",
    "shared_preload_libraries",
    "archive_mode",
    "lc_messages",
    "cluster_name",
];

/// The server that a backup is taken of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The cluster's identifier.
    pub system_id: SystemId,
    /// The server's version.
    pub server_version: ServerVersion,
    /// The cluster's WAL segment size.
    pub segment_size: SegmentSize,
    /// It is a standby.
    pub is_standby: bool,
    /// Its pages carry checksums.
    pub data_checksums: bool,
    /// Settings that a restore needs, as `SHOW` prints them; those that the role may not see are missing.
    pub settings: BTreeMap<String, String>,
    /// The role that we are.
    pub role: String,
}

impl Origin {
    /// Asks the server.
    ///
    /// # Errors
    /// If it does not answer, or shows a segment size that cannot be.
    pub async fn ask(walsender: &mut Walsender) -> Result<Self, CaptureError> {
        let system = walsender.identify_system().await?;
        let mut settings = BTreeMap::new();
        for name in SETTINGS {
            match walsender.show(name).await {
                Ok(value) => {
                    settings.insert(name.to_owned(), value);
                }
                // Only members of `pg_read_all_settings` see where files lie, and 14 does not know all settings.
                Err(error) if error.server().is_some() => {
                    tracing::debug!(name, "the server does not show the setting: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        let shown = |name: &str| settings.get(name).map_or("", String::as_str);
        let segment_size = shown("wal_segment_size").parse();
        let segment_size =
            segment_size.map_err(|error| CaptureError::Protocol(format!("read wal_segment_size: {error}")))?;
        Ok(Self {
            system_id: system.system_id,
            server_version: walsender.server_version(),
            segment_size,
            is_standby: walsender.show("in_hot_standby").await? == "on",
            data_checksums: shown("data_checksums") == "on",
            role: walsender.show("session_authorization").await?,
            settings,
        })
    }

    /// The cluster, as a repository knows it.
    pub fn identity(&self) -> ClusterIdentity {
        ClusterIdentity {
            format: FORMAT,
            system_id: self.system_id,
            server_version: self.server_version,
            segment_size: self.segment_size,
            created_at: Timestamp::now(),
        }
    }
}
