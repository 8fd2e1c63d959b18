//! What we keep, and where: the repository of one cluster.
//!
//! ```text
//!   backup, archive, index ...       whole objects, each written once
//!        |
//!    Repository      names become keys (`layout`), content becomes frames (`frame`), the same object twice is success
//!        |           and another one a conflict (`put`); `catalog` says what is there
//!      Store         six verbs; a folder, S3, or memory
//! ```
//!
//! All durable state is here: an agent that starts on a new machine needs nothing else.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{TryStreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use crate::backoff::RetryPolicy;

pub mod archiver;
pub mod backup;
pub mod bases;
pub mod catalog;
pub mod changes;
pub mod cluster;
mod deliveries;
pub mod drills;
mod error;
pub mod evidence;
pub mod frame;
pub mod gap;
pub mod incidents;
pub mod index;
mod inventory;
pub mod layout;
pub mod lease;
pub mod names;
mod newest;
pub mod put;
pub mod restores;
pub mod retention;
mod segment;
pub mod silences;
pub mod store;
mod url;
pub mod verify;
pub mod wal_push;

use cluster::{ClusterIdentity, FORMAT};
pub use error::RepoError;
pub use inventory::{MANIFEST_BYTES_MAX, UnfinishedBackup};
use layout::Layout;
pub use put::SameContent;
pub use segment::{SegmentRead, SegmentSource};
pub use store::Created;
use store::{ListRequest, LocalStore, ObjectInfo, Retrying, S3Config, Store, StoreError};
use url::Place;

/// Small objects (identity, gaps, histories) asked for at once: hides a store's latency, and 16 of them are nothing.
const SMALL_READS_MAX: usize = 16;

/// The largest history file or JSON object that is read: real ones have some hundred bytes.
const SMALL_OBJECT_BYTES_MAX: usize = 4 << 20;

/// Where the repository is, and how to get in.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `s3://bucket/prefix` or `file:///folder`. What is kept for several clusters can lie at one URL.
    pub url: String,
    /// For `s3:` URLs.
    pub s3: S3Config,
}

/// One cluster's part of the repository. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    store: Arc<dyn Store>,
    layout: Layout,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("url", &self.url()).finish_non_exhaustive()
    }
}

/// What a probe of the store found. That it could be written and read is known when there is a report.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ProbeReport {
    /// The store refuses to write a key twice. Where it does not, walguard looks before it writes and reads back after
    /// it, and two agents that write the same key in the same instant are told late.
    pub create_once: bool,
    /// Why the object of the probe could not be deleted, if it could not: `expire` will not work either.
    pub delete_problem: Option<String>,
}

impl Repository {
    /// The part of the repository at `config.url` that belongs to `cluster`, the name in the settings. Reads secrets
    /// and finds out credentials, but writes nothing; passing trouble is retried for about half a minute a call
    /// ([`Repository::with_retry`] changes that).
    ///
    /// # Errors
    /// [`RepoError::Config`] if the URL, the name or a setting is impossible.
    pub async fn connect(config: &Config, cluster: &str) -> Result<Self, RepoError> {
        let layout = layout_of(cluster)?;
        let store: Arc<dyn Store> = match url::parse_url(&config.url)? {
            Place::Folder(path) => Arc::new(LocalStore::new(path).marked_by(layout.identity())),
            Place::Bucket { bucket, prefix } => {
                Arc::new(store::S3Store::connect(&config.s3, &bucket, &prefix).await.map_err(RepoError::config)?)
            }
        };
        Ok(Self { store, layout }.with_retry(RetryPolicy::PATIENT, CancellationToken::new()))
    }

    /// The part of `store` that belongs to `cluster`, without retries.
    ///
    /// # Errors
    /// If the name cannot be part of a key.
    pub fn over(store: Arc<dyn Store>, cluster: &str) -> Result<Self, RepoError> {
        Ok(Self { store, layout: layout_of(cluster)? })
    }

    /// The same repository, with every call of the store retried under `policy` until `cancel` is cancelled.
    #[must_use]
    pub fn with_retry(self, policy: RetryPolicy, cancel: CancellationToken) -> Self {
        // Not one policy above the other: that would multiply the tries.
        let store = self.store.undecorated().unwrap_or(self.store);
        Self { store: Arc::new(Retrying::new(store, policy, cancel)), layout: self.layout }
    }

    /// Which object lies where.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the objects are kept.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// The place with the cluster's name, for people. Holds no secret.
    pub fn url(&self) -> String {
        format!("{}/{}", self.store.url().trim_end_matches('/'), self.layout.cluster())
    }

    /// Writes `cluster.json`, once. Where it is already there, it must name the same cluster.
    ///
    /// # Errors
    /// [`RepoError::WrongCluster`] if another cluster's WAL lies here; of the store.
    pub async fn initialize(&self, identity: &ClusterIdentity) -> Result<Created, RepoError> {
        let key = self.layout.identity();
        let mut json = serde_json::to_vec_pretty(identity).expect("an identity becomes JSON");
        json.push(b'\n');
        if self.store.create(&key, json.into()).await? == Created::New {
            return Ok(Created::New);
        }
        self.check_cluster(identity).await?;
        Ok(Created::Exists)
    }

    /// Whose WAL lies here; `None` if the place was never initialised.
    ///
    /// # Errors
    /// [`RepoError::UnknownFormat`], [`RepoError::Damaged`], or of the store.
    pub async fn identity(&self) -> Result<Option<ClusterIdentity>, RepoError> {
        let key = self.layout.identity();
        let Some(json) = self.read_small(&key).await? else { return Ok(None) };
        // The format first: another one may have other fields.
        #[derive(serde::Deserialize)]
        struct Format {
            format: u32,
        }
        let damaged = |error: serde_json::Error| RepoError::Damaged { key: key.clone(), problem: error.to_string() };
        let Format { format } = serde_json::from_slice(&json).map_err(damaged)?;
        if format != FORMAT {
            return Err(RepoError::UnknownFormat { key, format });
        }
        serde_json::from_slice(&json).map(Some).map_err(damaged)
    }

    /// Whose WAL lies here.
    ///
    /// # Errors
    /// [`RepoError::NotInitialized`] if the place was never initialised; as [`Repository::identity`].
    pub async fn require_identity(&self) -> Result<ClusterIdentity, RepoError> {
        self.identity().await?.ok_or_else(|| RepoError::NotInitialized { url: self.url() })
    }

    /// Checks that `server` is the cluster whose WAL lies here.
    ///
    /// # Errors
    /// [`RepoError::WrongCluster`] if it is not; as [`Repository::require_identity`].
    pub async fn check_cluster(&self, server: &ClusterIdentity) -> Result<ClusterIdentity, RepoError> {
        let here = self.require_identity().await?;
        match here.check_same(server) {
            Ok(()) => Ok(here),
            Err(mismatch) => Err(RepoError::WrongCluster { url: self.url(), mismatch }),
        }
    }

    /// Writes, reads and removes an object, and finds out whether the store refuses to write a key twice.
    ///
    /// # Errors
    /// If it cannot be written or read.
    pub async fn probe(&self) -> Result<ProbeReport, RepoError> {
        let key = self.layout.probe(&format!("{:016x}", fastrand::u64(..)));
        let create_once = self.store.probe_create_once(&key).await?;
        if !create_once {
            tracing::warn!(
                url = self.url(),
                "the store does not refuse to write a key twice: will look before each write and read back after it"
            );
        }
        let content = Bytes::from_static(b"walguard probe\n");
        self.store.replace(&key, content.clone()).await?;
        if self.store.read(&key, None).await? != content {
            let problem = "what was read is not what was written".to_owned();
            return Err(RepoError::Damaged { key, problem });
        }
        let deleted = self.store.delete(&key).await;
        let delete_problem = deleted.err().map(|error| crate::backoff::Chain(&error).to_string());
        Ok(ProbeReport { create_once, delete_problem })
    }

    /// All objects below `prefix` with keys greater than `after`, page by page, in key order.
    pub fn objects(
        &self,
        prefix: String,
        after: Option<String>,
    ) -> impl stream::Stream<Item = Result<ObjectInfo, RepoError>> + Send + '_ {
        let first = Some(ListRequest { prefix, after, shallow: false });
        stream::try_unfold(first, move |request| async move {
            let Some(request) = request else { return Ok::<_, RepoError>(None) };
            let page = self.store.list(&request).await?;
            let next = page.next.map(|after| ListRequest { after: Some(after), ..request });
            Ok(Some((stream::iter(page.objects.into_iter().map(Ok)), next)))
        })
        .try_flatten()
    }

    /// The objects and folders directly below `prefix`.
    async fn children(&self, prefix: String) -> Result<(Vec<ObjectInfo>, Vec<String>), RepoError> {
        let mut request = ListRequest { prefix, after: None, shallow: true };
        let (mut objects, mut folders) = (Vec::new(), Vec::new());
        loop {
            let page = self.store.list(&request).await?;
            objects.extend(page.objects);
            folders.extend(page.folders);
            request.after = page.next;
            if request.after.is_none() {
                return Ok((objects, folders));
            }
        }
    }

    /// An object of some hundred bytes; `None` if it is not there. An absurdly long one is cut, and then does not parse.
    pub(crate) async fn read_small(&self, key: &str) -> Result<Option<Bytes>, RepoError> {
        match self.store.read(key, Some(0..SMALL_OBJECT_BYTES_MAX as u64)).await {
            Ok(content) => Ok(Some(content)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn layout_of(cluster: &str) -> Result<Layout, RepoError> {
    Layout::new(cluster).map_err(|error| RepoError::Config {
        problem: error.to_string(),
        hint: "choose another name with `--cluster` or WALGUARD_CLUSTER, for example `main`".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::store::MemoryStore;
    use super::*;
    use crate::pg::{SegmentName, SegmentNumber, SegmentSize, ServerVersion, SystemId, TimelineId};

    pub(in crate::repo) fn repository() -> Repository {
        Repository::over(Arc::new(MemoryStore::new()), "main").unwrap()
    }

    pub(in crate::repo) fn identity() -> ClusterIdentity {
        ClusterIdentity {
            format: FORMAT,
            system_id: SystemId::new(7),
            server_version: ServerVersion::new(150_001),
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            created_at: Timestamp::UNIX_EPOCH,
        }
    }

    pub(in crate::repo) fn segment() -> SegmentName {
        SegmentName {
            timeline: TimelineId::FIRST,
            number: SegmentNumber::new(5),
            size: SegmentSize::new(1 << 20).unwrap(),
        }
    }

    #[tokio::test]
    async fn a_place_belongs_to_the_cluster_that_came_first() {
        let repo = repository();
        assert!(matches!(repo.require_identity().await, Err(RepoError::NotInitialized { .. })));
        assert_eq!(repo.initialize(&identity()).await.unwrap(), Created::New);
        let upgraded = ClusterIdentity { server_version: ServerVersion::new(150_009), ..identity() };
        assert_eq!(repo.initialize(&upgraded).await.unwrap(), Created::Exists);
        let other = ClusterIdentity { system_id: SystemId::new(8), ..identity() };
        let error = repo.initialize(&other).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "memory:/main belongs to another cluster: system identifier 7 in the repository, 8 of the server"
        );
        assert!(error.hint().unwrap().contains("WALGUARD_CLUSTER"));
        let major = ClusterIdentity { server_version: ServerVersion::new(160_001), ..identity() };
        assert!(repo.check_cluster(&major).await.unwrap_err().hint().unwrap().contains("upgrade"));
        assert_eq!(repo.identity().await.unwrap(), Some(identity()));
    }

    #[tokio::test]
    async fn a_probe_leaves_nothing() {
        let repo = repository();
        assert_eq!(repo.probe().await.unwrap(), ProbeReport { create_once: true, delete_problem: None });
        let left: Vec<ObjectInfo> = repo.objects(String::new(), None).try_collect().await.unwrap();
        assert_eq!(left, []);
    }

    #[test]
    fn secrets_are_no_part_of_what_is_printed() {
        let error = toml::from_str::<Config>("url = \"s3://b\"\n[s3]\nsecret_access_key = \"hush\"").unwrap_err();
        assert!(error.message().contains("unknown field"), "keys come from files or the environment: {error}");
    }
}
