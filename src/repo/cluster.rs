//! Whose WAL this is: `cluster.json`.

use jiff::Timestamp;

use crate::pg::{SegmentSize, ServerVersion, SystemId};

/// The format that this version of walguard reads and writes.
pub const FORMAT: u32 = 1;

/// The cluster that a place in the repository belongs to, written once when it is initialised.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ClusterIdentity {
    /// The repository format: 1.
    pub format: u32,
    /// Made by `initdb`, shared by standbys.
    pub system_id: SystemId,
    /// The server's version when the place was initialised; minor releases come and go, the major stays.
    pub server_version: ServerVersion,
    /// The cluster's WAL segment size in bytes.
    pub segment_size: SegmentSize,
    /// When the place was initialised, by the initialising machine's clock.
    pub created_at: Timestamp,
}

/// In what two clusters differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Another cluster altogether.
    #[error("system identifier {here} in the repository, {server} of the server")]
    SystemId {
        /// What the repository holds.
        here: SystemId,
        /// What the server says.
        server: SystemId,
    },
    /// The cluster was upgraded; WAL of one major means nothing to another.
    #[error("major version {here} in the repository, {server} of the server")]
    Major {
        /// What the repository holds.
        here: u32,
        /// What the server says.
        server: u32,
    },
    /// `pg_resetwal --wal-segsize` was used.
    #[error("WAL segments of {} bytes in the repository, {} of the server", here.bytes(), server.bytes())]
    SegmentSize {
        /// What the repository holds.
        here: SegmentSize,
        /// What the server says.
        server: SegmentSize,
    },
}

impl ClusterIdentity {
    /// Checks that `server` is the cluster that this place belongs to. The minor version and the time do not matter.
    ///
    /// # Errors
    /// The first thing in which they differ.
    pub fn check_same(&self, server: &Self) -> Result<(), Mismatch> {
        if self.system_id != server.system_id {
            return Err(Mismatch::SystemId { here: self.system_id, server: server.system_id });
        }
        if self.server_version.major() != server.server_version.major() {
            let (here, server) = (self.server_version.major(), server.server_version.major());
            return Err(Mismatch::Major { here, server });
        }
        if self.segment_size != server.segment_size {
            return Err(Mismatch::SegmentSize { here: self.segment_size, server: server.segment_size });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(system: u64, version: u32, mib: u64) -> ClusterIdentity {
        ClusterIdentity {
            format: FORMAT,
            system_id: SystemId::new(system),
            server_version: ServerVersion::new(version),
            segment_size: SegmentSize::new(mib << 20).unwrap(),
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_minor_upgrade_is_the_same_cluster_and_nothing_else_is() {
        let here = identity(7, 150_001, 16);
        assert_eq!(here.check_same(&identity(7, 150_020, 16)), Ok(()));
        assert!(matches!(here.check_same(&identity(8, 150_001, 16)), Err(Mismatch::SystemId { .. })));
        assert!(matches!(here.check_same(&identity(7, 160_001, 16)), Err(Mismatch::Major { here: 15, server: 16 })));
        assert!(matches!(here.check_same(&identity(7, 150_001, 1)), Err(Mismatch::SegmentSize { .. })));
    }

    #[test]
    fn an_identity_reads_back_from_json_and_keeps_all_digits() {
        let identity = identity(u64::MAX, 180_001, 64);
        let json = serde_json::to_string(&identity).unwrap();
        assert!(json.contains(r#""18446744073709551615""#), "{json}");
        assert_eq!(serde_json::from_str::<ClusterIdentity>(&json).unwrap(), identity);
    }
}
