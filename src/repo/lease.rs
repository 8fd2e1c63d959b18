//! Who archives here: `lease.json`, the one object that changes.
//!
//! The lease keeps two agents from working on one place by mistake, and tells people which agent it is. It is not what
//! keeps the WAL safe: stores cannot replace an object conditionally on all sides, so two agents that take an expired
//! lease in the same instant may both believe in it for a moment. Every other object is written once, and the second
//! writer of other content is told.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::store::{Created, StoreError};
use super::{RepoError, Repository};
use crate::pg::{PgTime, Position};

/// Who holds a place in the repository, and until when.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lease {
    /// The holder's own id, different for each process.
    pub holder: String,
    /// Its machine, for people.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// When it began to hold it, by its clock.
    pub acquired_at: Timestamp,
    /// Until when it holds it unless it renews it, by its clock. One that was given back has ended.
    pub expires_at: Timestamp,
    /// Up to when everything that was committed is archived, as the last holder proved it. It outlives the holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caught_up: Option<CaughtUp>,
}

/// A proof that the archive holds everything that was committed before a time, also on a server that writes nothing:
/// the server said that whatever was committed by `time` lies before `position`, and the archive reached `position`.
///
/// It stands in the lease because it is the one thing that becomes more true while nothing is written. A restore to a time
/// between the last commit and `time` rests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CaughtUp {
    /// Where everything committed by `time` ends.
    pub position: Position,
    /// The moment, by the server's clock.
    pub time: PgTime,
}

impl CaughtUp {
    /// The later of two.
    pub fn later(a: Option<Self>, b: Option<Self>) -> Option<Self> {
        [a, b].into_iter().flatten().max_by_key(|proof| (proof.position, proof.time))
    }
}

/// Who wants the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// An id of this process's own: random, or made of machine, process and start time.
    pub holder: String,
    /// This machine's name.
    pub host: String,
    /// This process.
    pub pid: u32,
    /// How long the lease holds after each renewal. Renew in a third of that time.
    pub time_to_live: Duration,
}

impl Claim {
    fn lease(&self, acquired_at: Timestamp, now: Timestamp, caught_up: Option<CaughtUp>) -> Lease {
        let time_to_live = SignedDuration::try_from(self.time_to_live).unwrap_or(SignedDuration::MAX);
        Lease {
            holder: self.holder.clone(),
            host: self.host.clone(),
            pid: self.pid,
            acquired_at,
            expires_at: now.saturating_add(time_to_live).unwrap_or(Timestamp::MAX),
            caught_up,
        }
    }
}

/// The lease was not given, or is no longer ours.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody else holds it.
    #[error("the agent on {} (process {}) archives here, since {}", .0.host, .0.pid, .0.acquired_at)]
    Held(Lease),
    /// The repository failed.
    #[error(transparent)]
    Repo(#[from] RepoError),
}

impl LeaseError {
    /// True if the same call may succeed later. A lease that somebody else holds is not: it may be held for years.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Repo(error) if error.is_transient())
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Repo(error) => error.hint(),
            Self::Held(lease) => Some(format!(
                "stop that agent, or give this one a place of its own with `--cluster`; if it is gone already, its lease \
                 ends at {}",
                lease.expires_at
            )),
        }
    }
}

impl From<StoreError> for LeaseError {
    fn from(error: StoreError) -> Self {
        Self::Repo(error.into())
    }
}

impl Repository {
    /// Who holds the lease, or held it last. One that cannot be read counts as none.
    ///
    /// # Errors
    /// Of the store.
    pub async fn lease(&self) -> Result<Option<Lease>, RepoError> {
        let key = self.layout().lease();
        let Some(json) = self.read_small(&key).await? else { return Ok(None) };
        Ok(serde_json::from_slice(&json)
            .inspect_err(|error| tracing::warn!(key, "the lease cannot be read and is taken for none: {error}"))
            .ok())
    }

    /// Takes the lease if nobody holds it, if it expired before `now`, if it is ours already, or if `is_gone` knows that
    /// its holder is no more (a process of this machine that does not run).
    ///
    /// # Errors
    /// [`LeaseError::Held`] if somebody else holds it; of the store.
    pub async fn acquire_lease(
        &self,
        claim: &Claim,
        now: Timestamp,
        is_gone: impl Fn(&Lease) -> bool,
    ) -> Result<Lease, LeaseError> {
        let before = self.lease().await?;
        let ours = claim.lease(now, now, before.as_ref().and_then(|lease| lease.caught_up));
        if before.is_none() && self.store().create(&self.layout().lease(), to_json(&ours)).await? == Created::New {
            return Ok(ours);
        }
        match self.lease().await? {
            Some(held) if held.holder == claim.holder => self.renew_lease(claim, &held, now, None).await,
            Some(held) if held.expires_at > now && !is_gone(&held) => Err(LeaseError::Held(held)),
            _ => {
                self.store().replace(&self.layout().lease(), to_json(&ours)).await?;
                self.check_ours(ours).await
            }
        }
    }

    /// Holds the lease for longer, and writes down what was proved meanwhile.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if somebody else took it meanwhile; of the store.
    pub async fn renew_lease(
        &self,
        claim: &Claim,
        held: &Lease,
        now: Timestamp,
        caught_up: Option<CaughtUp>,
    ) -> Result<Lease, LeaseError> {
        if let Some(other) = self.lease().await?.filter(|lease| lease.holder != held.holder) {
            return Err(LeaseError::Held(other));
        }
        let renewed = claim.lease(held.acquired_at, now, CaughtUp::later(held.caught_up, caught_up));
        self.store().replace(&self.layout().lease(), to_json(&renewed)).await?;
        Ok(renewed)
    }

    /// Gives the lease back at `now`, so that the next agent need not wait for its end; what was proved stays. A lease of
    /// somebody else is left alone.
    ///
    /// # Errors
    /// Of the store.
    pub async fn release_lease(
        &self,
        held: &Lease,
        now: Timestamp,
        caught_up: Option<CaughtUp>,
    ) -> Result<(), LeaseError> {
        if let Some(lease) = self.lease().await?.filter(|lease| lease.holder == held.holder) {
            let ended = Lease { expires_at: now, caught_up: CaughtUp::later(lease.caught_up, caught_up), ..lease };
            self.store().replace(&self.layout().lease(), to_json(&ended)).await?;
        }
        Ok(())
    }

    /// Of two who replaced an expired lease, the one whose words stand has it.
    async fn check_ours(&self, ours: Lease) -> Result<Lease, LeaseError> {
        match self.lease().await? {
            Some(other) if other.holder != ours.holder => Err(LeaseError::Held(other)),
            _ => Ok(ours),
        }
    }
}

fn to_json(lease: &Lease) -> bytes::Bytes {
    serde_json::to_vec_pretty(lease).expect("a lease becomes JSON").into()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::store::MemoryStore;
    use super::*;
    use crate::pg::{Lsn, TimelineId};

    fn claim(holder: &str) -> Claim {
        Claim {
            holder: holder.to_owned(),
            host: format!("host-of-{holder}"),
            pid: 4711,
            time_to_live: Duration::from_secs(60),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_765_958_400 + second).unwrap()
    }

    fn repository() -> Repository {
        Repository::over(Arc::new(MemoryStore::new()), "main").unwrap()
    }

    const NEVER: fn(&Lease) -> bool = |_| false;

    #[tokio::test]
    async fn a_held_lease_names_its_holder_and_is_free_after_its_end() {
        let repo = repository();
        let held = repo.acquire_lease(&claim("a"), at(0), NEVER).await.unwrap();
        let error = repo.acquire_lease(&claim("b"), at(59), NEVER).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the agent on host-of-a (process 4711) archives here, since 2025-12-17T08:00:00Z"
        );
        assert!(!error.is_transient());
        assert!(error.hint().unwrap().contains("2025-12-17T08:01:00Z"));
        let taken = repo.acquire_lease(&claim("b"), at(61), NEVER).await.unwrap();
        assert_eq!(taken.holder, "b");
        // The first holder, slow or asleep, finds out at its next renewal.
        let error = repo.renew_lease(&claim("a"), &held, at(62), None).await.unwrap_err();
        assert!(matches!(error, LeaseError::Held(other) if other == taken));
    }

    #[tokio::test]
    async fn a_renewed_lease_lasts_longer_and_keeps_its_beginning() {
        let repo = repository();
        let held = repo.acquire_lease(&claim("a"), at(0), NEVER).await.unwrap();
        let renewed = repo.renew_lease(&claim("a"), &held, at(50), None).await.unwrap();
        assert_eq!((renewed.acquired_at, renewed.expires_at), (at(0), at(110)));
        assert!(repo.acquire_lease(&claim("b"), at(100), NEVER).await.is_err());
        assert_eq!(repo.acquire_lease(&claim("a"), at(100), NEVER).await.unwrap().acquired_at, at(0));
    }

    #[tokio::test]
    async fn a_released_lease_is_free_at_once_and_only_its_holder_releases_it() {
        let repo = repository();
        let held = repo.acquire_lease(&claim("a"), at(0), NEVER).await.unwrap();
        repo.release_lease(&Lease { holder: "b".into(), ..held.clone() }, at(0), None).await.unwrap();
        assert_eq!(repo.lease().await.unwrap(), Some(held.clone()));
        repo.release_lease(&held, at(1), None).await.unwrap();
        repo.acquire_lease(&claim("b"), at(1), NEVER).await.unwrap();
    }

    #[tokio::test]
    async fn a_killed_agent_of_the_same_machine_is_not_waited_for() {
        let repo = repository();
        repo.acquire_lease(&claim("a"), at(0), NEVER).await.unwrap();
        let taken = repo.acquire_lease(&claim("b"), at(1), |lease| lease.host == "host-of-a").await.unwrap();
        assert_eq!(taken.holder, "b");
    }

    #[tokio::test]
    async fn what_was_proved_outlives_renewals_holders_and_the_release() {
        let proof = |lsn, micros| {
            let position = Position { timeline: TimelineId::FIRST, lsn: Lsn::new(lsn) };
            Some(CaughtUp { position, time: PgTime::from_micros(micros) })
        };
        let repo = repository();
        let held = repo.acquire_lease(&claim("a"), at(0), NEVER).await.unwrap();
        assert_eq!(held.caught_up, None);
        let held = repo.renew_lease(&claim("a"), &held, at(1), proof(100, 7)).await.unwrap();
        let held = repo.renew_lease(&claim("a"), &held, at(2), proof(90, 6)).await.unwrap();
        assert_eq!(held.caught_up, proof(100, 7), "an older proof does not replace a newer one");
        repo.release_lease(&held, at(3), proof(100, 9)).await.unwrap();
        assert_eq!(repo.acquire_lease(&claim("b"), at(4), NEVER).await.unwrap().caught_up, proof(100, 9));
    }

    #[tokio::test]
    async fn a_lease_that_cannot_be_read_is_none() {
        let repo = repository();
        repo.store().replace("main/lease.json", "rubbish".into()).await.unwrap();
        assert_eq!(repo.acquire_lease(&claim("a"), at(0), NEVER).await.unwrap().holder, "a");
    }
}
