//! Silences in the repository, `silences/<id>.json`, written once; one that is ended before its time has another object
//! beside it. And what a detector remembers, `detect/<timeline>-<place>.zst`.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;

use super::layout::check_name;
use super::store::Created;
use super::{RepoError, Repository, SMALL_READS_MAX, SameContent, frame};
use crate::detect::detector::Memory;
use crate::detect::silence::Silence;
use crate::pg::{Lsn, TimelineId};

/// Silences that are read: the newest. Older ones are long over.
const SILENCES_MAX: usize = 500;

/// The longest memory of a detector, as JSON: 65,536 tables of some hundred bytes, and what was learned of 4,096.
const MEMORY_BYTES_MAX: usize = 64 << 20;

/// Memories that are kept: one could be unreadable.
const MEMORIES_KEPT: usize = 2;

/// When a silence was ended before its time.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Lifted {
    at: Timestamp,
    by: String,
}

impl Repository {
    /// Keeps a silence.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if another one has its id; of the store.
    pub async fn put_silence(&self, silence: &Silence) -> Result<Created, RepoError> {
        let key = self.layout().silence(&silence.id);
        let json = serde_json::to_vec_pretty(silence).expect("a silence becomes JSON");
        self.put_once(&key, json.into(), SameContent::Verbatim).await
    }

    /// Ends a silence now; false if there is none of that id. One that is ended already stays as it was.
    ///
    /// # Errors
    /// Of the store.
    pub async fn lift_silence(&self, id: &str, at: Timestamp, by: &str) -> Result<bool, RepoError> {
        if check_name(id).is_err() || self.read_small(&self.layout().silence(id)).await?.is_none() {
            return Ok(false);
        }
        let json = serde_json::to_vec_pretty(&Lifted { at, by: by.to_owned() }).expect("a signature becomes JSON");
        self.store().create(&self.layout().lifted_silence(id), json.into()).await?;
        Ok(true)
    }

    /// The newest silences, over or not, in the order of their ids. One that cannot be read is none: it silences nobody.
    ///
    /// # Errors
    /// Of the store.
    pub async fn silences(&self) -> Result<Vec<Silence>, RepoError> {
        let prefix = self.layout().silences_folder();
        let (objects, _) = self.children(prefix.clone()).await?;
        let id = |key: &str| Some(key.strip_prefix(&prefix)?.strip_suffix(".json")?.to_owned());
        let (lifted, mut ids): (Vec<String>, Vec<String>) =
            objects.iter().filter_map(|object| id(&object.key)).partition(|id| id.ends_with(".lifted"));
        ids.drain(..ids.len().saturating_sub(SILENCES_MAX));
        let lifted = &lifted;
        let reads = stream::iter(ids).map(|id| async move {
            let key = self.layout().silence(&id);
            let Some(json) = self.read_small(&key).await? else { return Ok::<_, RepoError>(None) };
            let mut silence: Silence = match serde_json::from_slice(&json) {
                Ok(silence) => silence,
                Err(error) => {
                    tracing::warn!(key, "a silence cannot be read, and silences nobody: {error}");
                    return Ok(None);
                }
            };
            if lifted.contains(&format!("{id}.lifted")) {
                let lifted = self.read_small(&self.layout().lifted_silence(&id)).await?;
                let lifted = lifted.and_then(|json| serde_json::from_slice::<Lifted>(&json).ok());
                silence.lifted_at = Some(lifted.map_or(silence.from, |lifted| lifted.at));
            }
            Ok(Some(silence))
        });
        let read: Vec<_> = reads.buffered(SMALL_READS_MAX).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }

    /// Keeps what a detector remembers as of a place on a timeline, and removes what is older but for one.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_memory(&self, timeline: TimelineId, lsn: Lsn, memory: &Memory) -> Result<(), RepoError> {
        let json = serde_json::to_vec(memory).expect("a memory becomes JSON");
        let stored = tokio::task::spawn_blocking(move || frame::compress(&json, frame::LEVEL_DEFAULT));
        let stored = stored.await.expect("compression does not panic");
        // A replay may remember the same place a little differently: the first one stays.
        self.store().create(&self.layout().memory(timeline, lsn), stored.into()).await?;
        let (objects, _) = self.children(self.layout().memories_folder()).await?;
        for object in objects.iter().rev().skip(MEMORIES_KEPT) {
            self.store().delete(&object.key).await?;
        }
        Ok(())
    }

    /// What the last detector remembered; `None` if there is nothing that can be read.
    ///
    /// # Errors
    /// Of the store.
    pub async fn newest_memory(&self) -> Result<Option<Memory>, RepoError> {
        let (objects, _) = self.children(self.layout().memories_folder()).await?;
        for object in objects.iter().rev().take(MEMORIES_KEPT) {
            let stored = match self.store().read(&object.key, None).await {
                Err(error) if error.is_not_found() => continue,
                read => read?,
            };
            let read = tokio::task::spawn_blocking(move || {
                let json = frame::decompress(&stored, MEMORY_BYTES_MAX).map_err(|error| error.to_string())?;
                serde_json::from_slice(&json).map_err(|error| error.to_string())
            });
            match read.await.expect("decompression does not panic") {
                Ok(memory) => return Ok(Some(memory)),
                Err(problem) => tracing::warn!(key = object.key, "what was learned cannot be read: {problem}"),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::super::tests::repository;
    use super::*;
    use crate::detect::{Config, Detector};

    fn silence(id: &str) -> Silence {
        Silence {
            id: id.to_owned(),
            from: Timestamp::UNIX_EPOCH,
            until: Timestamp::MAX,
            reason: "release".into(),
            by: "ada".into(),
            rules: vec![],
            tables: vec!["public.*".parse().unwrap()],
            roles: vec![],
            applications: vec![],
            lifted_at: None,
        }
    }

    #[tokio::test]
    async fn a_silence_is_there_until_somebody_lifts_it() {
        let repo = repository();
        for id in ["b", "a"] {
            repo.put_silence(&silence(id)).await.unwrap();
        }
        assert_eq!(repo.silences().await.unwrap(), [silence("a"), silence("b")]);
        let at = Timestamp::from_second(50).unwrap();
        assert!(repo.lift_silence("a", at, "bob").await.unwrap());
        assert!(repo.lift_silence("a", Timestamp::from_second(90).unwrap(), "eve").await.unwrap());
        assert!(!repo.lift_silence("c", at, "bob").await.unwrap());
        let lifted = Silence { lifted_at: Some(at), ..silence("a") };
        assert_eq!(repo.silences().await.unwrap(), [lifted, silence("b")]);
    }

    #[tokio::test]
    async fn a_silence_that_cannot_be_read_silences_nobody() {
        let repo = repository();
        repo.store().create(&repo.layout().silence("x"), "{".into()).await.unwrap();
        assert_eq!(repo.silences().await.unwrap(), []);
    }

    #[tokio::test]
    async fn the_newest_memory_that_can_be_read_is_given_and_old_ones_go() {
        let repo = repository();
        let detector = Detector::new(Config::default(), TimeZone::UTC, TimelineId::FIRST);
        assert!(repo.newest_memory().await.unwrap().is_none());
        for lsn in [10, 20, 30] {
            repo.put_memory(TimelineId::FIRST, Lsn::new(lsn), &detector.memory(Lsn::new(lsn))).await.unwrap();
        }
        assert_eq!(repo.children(repo.layout().memories_folder()).await.unwrap().0.len(), 2);
        let newest = repo.layout().memory(TimelineId::FIRST, Lsn::new(30));
        assert_eq!(repo.newest_memory().await.unwrap().unwrap().lsn, Lsn::new(30));
        repo.store().replace(&newest, "rubbish".into()).await.unwrap();
        assert_eq!(repo.newest_memory().await.unwrap().unwrap().lsn, Lsn::new(20));
    }
}
