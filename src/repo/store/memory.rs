//! Objects in memory: for tests, and for trying things out.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use super::{Created, ListPage, ListRequest, ObjectInfo, Store, StoreError, check_key};

/// Objects on a page of a listing: few, so that tests turn pages too.
const PAGE_OBJECTS_MAX: usize = 100;

/// A store that is gone with the process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    objects: Mutex<BTreeMap<String, (Bytes, Timestamp)>>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, (Bytes, Timestamp)>> {
        // Every change is a single call on the map, so a panic elsewhere cannot have left it half done.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
        check_key("write", key)?;
        let mut objects = self.objects();
        if objects.contains_key(key) {
            return Ok(Created::Exists);
        }
        objects.insert(key.to_owned(), (content, Timestamp::now()));
        Ok(Created::New)
    }

    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        check_key("write", key)?;
        self.objects().insert(key.to_owned(), (content, Timestamp::now()));
        Ok(())
    }

    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        check_key("read", key)?;
        let objects = self.objects();
        let (content, _) = objects.get(key).ok_or_else(|| StoreError::NotFound { key: key.to_owned() })?;
        let Some(range) = range else { return Ok(content.clone()) };
        let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(content.len());
        let (from, to) = (clamp(range.start), clamp(range.end));
        Ok(if from < to { content.slice(from..to) } else { Bytes::new() })
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        let objects = self.objects();
        let mut page = ListPage::default();
        let mut after = request.after.clone();
        loop {
            let begin = match &after {
                Some(after) if *after >= request.prefix => Bound::Excluded(after.clone()),
                _ => Bound::Included(request.prefix.clone()),
            };
            let next = objects.range((begin, Bound::Unbounded)).next();
            let Some((key, (content, modified))) = next.filter(|(key, _)| key.starts_with(&request.prefix)) else {
                return Ok(page);
            };
            if page.objects.len() + page.folders.len() >= PAGE_OBJECTS_MAX {
                page.next = after;
                return Ok(page);
            }
            let rest = key.get(request.prefix.len()..).unwrap_or_default();
            if let (true, Some(slash)) = (request.shallow, rest.find('/')) {
                let folder = key.get(..request.prefix.len() + slash + 1).unwrap_or_default();
                if after.as_deref().is_none_or(|after| folder > after) {
                    page.folders.push(folder.to_owned());
                }
                after = Some(format!("{folder}~")); // sorts after every key in the folder
            } else {
                page.objects.push(ObjectInfo { key: key.clone(), size: content.len() as u64, modified: *modified });
                after = Some(key.clone());
            }
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key("delete", key)?;
        self.objects().remove(key);
        Ok(())
    }

    fn enforces_create_once(&self) -> bool {
        true
    }

    fn url(&self) -> String {
        "memory:".to_owned()
    }
}
