//! A store that tries again what failed for a passing reason.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{Created, ListPage, ListRequest, Store, StoreError};
use crate::backoff::{RetryError, RetryPolicy, retry};

/// Calls another store under a [`RetryPolicy`]. A call whose answer was lost may have been performed, so a `create` that
/// is tried again can say `Exists` of our own object: the caller compares contents anyway.
#[derive(Clone, Debug)]
pub struct Retrying {
    store: Arc<dyn Store>,
    policy: RetryPolicy,
    cancel: CancellationToken,
}

impl Retrying {
    /// Calls `store` under `policy` until `cancel` is cancelled; a call that was given up then fails as unavailable.
    pub fn new(store: Arc<dyn Store>, policy: RetryPolicy, cancel: CancellationToken) -> Self {
        Self { store, policy, cancel }
    }

    async fn run<T, F>(&self, op: &'static str, key: &str, operation: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let what = format!("{op} `{key}`");
        match retry(self.policy, &self.cancel, &what, StoreError::is_transient, operation).await {
            Ok(value) => Ok(value),
            Err(RetryError::Failed(error)) => Err(error),
            Err(RetryError::Cancelled) => Err(StoreError::Unavailable {
                op,
                key: key.to_owned(),
                source: "stopped on request".into(),
                retry_after: None,
            }),
        }
    }
}

#[async_trait]
impl Store for Retrying {
    async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
        self.run("write", key, || self.store.create(key, content.clone())).await
    }

    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        self.run("write", key, || self.store.replace(key, content.clone())).await
    }

    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        self.run("read", key, || self.store.read(key, range.clone())).await
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        self.run("list", &request.prefix, || self.store.list(request)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.run("delete", key, || self.store.delete(key)).await
    }

    fn enforces_create_once(&self) -> bool {
        self.store.enforces_create_once()
    }

    async fn probe_create_once(&self, key: &str) -> Result<bool, StoreError> {
        self.run("probe", key, || self.store.probe_create_once(key)).await
    }

    fn url(&self) -> String {
        self.store.url()
    }

    fn undecorated(&self) -> Option<Arc<dyn Store>> {
        Some(Arc::clone(&self.store))
    }
}
