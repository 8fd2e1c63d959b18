//! The server that WAL comes from: its identity, its history, and the slot that holds WAL back for us.

use std::collections::BTreeSet;

use jiff::Timestamp;
use tokio_postgres::types::PgLsn;

use crate::capture::spool::SpoolError;
use crate::capture::{self, CaptureError, ConnInfo, Walsender};
use crate::pg::{Lsn, Position, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::cluster::{ClusterIdentity, FORMAT};
use crate::repo::lease::LeaseError;
use crate::repo::{RepoError, Repository};

/// Why the server or the repository did not let us go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    /// Of the server.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Of the repository.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// Of the spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Of the lease: another agent archives here.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The server's own history file cannot be read.
    #[error(transparent)]
    History(#[from] crate::pg::ParseHistoryError),
    /// The server changed its segment size: it is another cluster, or was reset.
    #[error("the server's wal_segment_size is {server} bytes; this archive has segments of {archive} bytes")]
    SegmentSize {
        /// Of the server.
        server: u64,
        /// Of the archive.
        archive: u64,
    },
}

impl SourceError {
    /// True if the same may work later without anybody doing anything.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Capture(error) => error.is_transient(),
            Self::Repo(error) => error.is_transient(),
            Self::Spool(error) => error.is_transient(),
            // It ends when the other agent does.
            Self::Lease(LeaseError::Held(_)) => true,
            Self::Lease(error) => error.is_transient(),
            Self::History(_) | Self::SegmentSize { .. } => false,
        }
    }

    /// True if going on could do harm: another cluster's WAL, or WAL that contradicts what is archived.
    pub(super) fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Capture(CaptureError::WrongServer { .. })
                | Self::Repo(
                    RepoError::Conflict { .. }
                        | RepoError::WrongCluster { .. }
                        | RepoError::UnknownFormat { .. }
                        | RepoError::Damaged { .. }
                )
                | Self::SegmentSize { .. }
        ) || matches!(self, Self::Spool(error) if !error.is_transient())
    }

    /// As the stage's own error, for whoever looks for its hint.
    pub(super) fn into_anyhow(self) -> anyhow::Error {
        match self {
            Self::Capture(error) => error.into(),
            Self::Repo(error) => error.into(),
            Self::Spool(error) => error.into(),
            Self::Lease(error) => error.into(),
            error => error.into(),
        }
    }

    /// What the operator can do.
    pub(super) fn hint(&self) -> Option<String> {
        match self {
            Self::Capture(error) => error.hint(),
            Self::Repo(error) => error.hint(),
            Self::Spool(error) => error.hint(),
            Self::Lease(error) => error.hint(),
            Self::History(_) => None,
            Self::SegmentSize { .. } => {
                Some("give the cluster a new name with `--cluster`; the old archive stays restorable".to_owned())
            }
        }
    }
}

/// The server.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) conninfo: ConnInfo,
    pub(super) slot: String,
    pub(super) repo: Repository,
    /// Timelines whose history is in the repository, as far as we know.
    archived_histories: BTreeSet<TimelineId>,
}

/// A connection to a server that was asked who it is.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) walsender: Walsender,
    pub(super) identity: ClusterIdentity,
    /// Its timeline, and the end of its flushed WAL.
    pub(super) at: Position,
}

impl Source {
    pub(super) fn new(conninfo: ConnInfo, slot: String, repo: Repository) -> Self {
        Self { conninfo, slot, repo, archived_histories: BTreeSet::new() }
    }

    /// Connects and asks who is there.
    pub(super) async fn connect(&self) -> Result<Connected, SourceError> {
        let mut walsender = Walsender::connect(&self.conninfo).await?;
        let system = walsender.identify_system().await?;
        let segment_size = walsender.show("wal_segment_size").await?;
        let segment_size: SegmentSize = segment_size
            .parse()
            .map_err(|error| CaptureError::Protocol(format!("wal_segment_size is `{segment_size}`: {error}")))?;
        let identity = ClusterIdentity {
            format: FORMAT,
            system_id: system.system_id,
            server_version: walsender.server_version(),
            segment_size,
            created_at: Timestamp::now(),
        };
        let at = Position { timeline: system.timeline, lsn: system.flush_lsn };
        Ok(Connected { walsender, identity, at })
    }

    /// Connects, and refuses any other cluster than `archive`.
    pub(super) async fn connect_to(&self, archive: &ClusterIdentity) -> Result<Connected, SourceError> {
        let connected = self.connect().await?;
        let (expected, found) = (archive.system_id, connected.identity.system_id);
        if expected != found {
            return Err(CaptureError::WrongServer { expected, found }.into());
        }
        let (server, archive) = (connected.identity.segment_size.bytes(), archive.segment_size.bytes());
        if server != archive {
            return Err(SourceError::SegmentSize { server, archive });
        }
        Ok(connected)
    }

    /// How the server's timeline came to be. Every history file on the way is archived first: WAL of a timeline whose
    /// history is missing could not be used.
    pub(super) async fn path(
        &mut self,
        walsender: &mut Walsender,
        timeline: TimelineId,
    ) -> Result<TimelineHistory, SourceError> {
        if timeline == TimelineId::FIRST {
            return Ok(TimelineHistory::root(timeline));
        }
        let (_, content) = match walsender.timeline_history(timeline).await {
            Ok(history) => history,
            // `pg_resetwal -l` and restored clusters may begin with a later timeline and no history.
            Err(CaptureError::Server(error)) if error.code == "58P01" => return Ok(TimelineHistory::root(timeline)),
            Err(error) => return Err(error.into()),
        };
        let path = TimelineHistory::parse(timeline, &String::from_utf8_lossy(&content))?;
        for ancestor in path.ancestors().iter().map(|a| a.timeline).filter(|t| *t > TimelineId::FIRST) {
            if self.archived_histories.contains(&ancestor) {
                continue;
            }
            match walsender.timeline_history(ancestor).await {
                Ok((_, content)) => {
                    self.repo.put_history(ancestor, content).await?;
                }
                // A server may have lost an old one; the newest names all ancestors anyway.
                Err(CaptureError::Server(error)) => {
                    tracing::warn!(timeline = %ancestor, "the server has no history of an ancestor: {error}");
                }
                Err(error) => return Err(error.into()),
            }
            self.archived_histories.insert(ancestor);
        }
        if !self.archived_histories.contains(&timeline) {
            self.repo.put_history(timeline, content).await?;
            self.archived_histories.insert(timeline);
        }
        Ok(path)
    }

    /// Where the slot's WAL begins. A slot that is not there, or holds nothing, is made.
    pub(super) async fn ensure_slot(&self, walsender: &mut Walsender) -> Result<Lsn, SourceError> {
        if let Some(Some(restart)) = self.read_slot(walsender).await? {
            return Ok(restart);
        }
        self.recreate_slot(walsender).await
    }

    /// Drops the slot if there is one, makes it anew, and answers where its WAL begins.
    pub(super) async fn recreate_slot(&self, walsender: &mut Walsender) -> Result<Lsn, SourceError> {
        if self.read_slot(walsender).await?.is_some() {
            tracing::warn!(slot = self.slot, "the slot holds no WAL any more: making it anew");
            walsender.drop_slot(&self.slot).await?;
        }
        walsender.create_physical_slot(&self.slot).await?;
        tracing::info!(slot = self.slot, "made the replication slot");
        match self.read_slot(walsender).await? {
            Some(Some(restart)) => Ok(restart),
            _ => Err(CaptureError::Protocol(format!("the new slot {} holds no WAL", self.slot)).into()),
        }
    }

    /// `None`: there is no such slot. `Some(None)`: it holds no WAL, because it was never used or was invalidated.
    async fn read_slot(&self, walsender: &mut Walsender) -> Result<Option<Option<Lsn>>, SourceError> {
        match walsender.read_slot(&self.slot).await {
            Ok(slot) => Ok(slot.map(|s| s.restart.map(|r| r.lsn))),
            // Before 15 there is no command for it.
            Err(CaptureError::Unsupported(_)) if walsender.server_version().major() < 15 => {
                let client = capture::connect_sql(&self.conninfo).await?;
                let query =
                    "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = $1 AND slot_type = 'physical'";
                let row = client.query_opt(query, &[&self.slot]).await.map_err(|error| CaptureError::Unreachable {
                    what: format!("read the slot over SQL: {error}"),
                    source: None,
                })?;
                Ok(row.map(|row| row.get::<_, Option<PgLsn>>(0).map(|lsn| Lsn::new(lsn.into()))))
            }
            Err(error) => Err(error.into()),
        }
    }
}
